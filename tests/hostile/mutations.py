"""Structure-aware mutation of real messages, as a stranger does who knows their format.

Each format has a function that takes a message and a random generator, and returns a corrupted message: some fields are
dropped, doubled, exchanged or replaced by values that may break parsers, at any depth. One message in five is corrupted
only as bytes.
"""

import json
import math
import random
import struct
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import msgpack
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

Mutate: TypeAlias = Callable[[bytes, random.Random], bytes]

_INTEGERS = (
    0,
    1,
    2,
    127,
    128,
    255,
    2**16,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**53,
    2**62,
    2**63 - 1,
    2**63,
    2**64 - 1,
)
_FLOATS = (0.0, -0.0, -1.0, 1e-310, 1e30, 1e300, math.inf, -math.inf, math.nan)
_TEXTS = (
    "", " ", "\0", "\n", "\x1b[2J", "\u202e", "a" * 300, "é" * 40, "\U0001f9d6", "..", "/", "-1", "0", "1e9", "NaN",
    "٣", "null", "true", "[2**63, 0]", "9" * 400, "0" * 30,
    "127.0.0.1:99999", "[::1]:80", "/ip4/127.0.0.1/tcp/x/p2p/y",
    "/onion/a:80/dns/b/p2p/c", "/ip4/1.2.3.4/tcp/1/p2p/Q/ip4/1.2.3.4/tcp/1/p2p/Q", "0.0.0.0", "9999999.0",
)  # fmt: skip
_LONG = 20_000
_NOT_TEXT = (b"\xff", b"\xc3\x28", b"\xed\xa0\x80", b"\x80" * 20)


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    at, end = sorted((rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)))
    match rng.randrange(6):
        case 0:
            return data[:at]
        case 1:
            return data[:at] + data[end:]
        case 2:
            return data[:end] + data[at:end] * rng.choice((1, 1, 30)) + data[end:]
        case 3:
            return data[:at] + rng.randbytes(rng.randrange(1, 20)) + data[end:]
        case 4:
            return rng.randbytes(rng.randrange(300))
        case _:
            spoilt = bytearray(data)
            for _ in range(rng.randint(1, 4)):
                if spoilt:
                    spoilt[rng.randrange(len(spoilt))] ^= 1 << rng.randrange(8)
            return bytes(spoilt)


def _or_bytes(mutate: Mutate) -> Mutate:
    def either(data: bytes, rng: random.Random) -> bytes:
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            if len(data) < _LONG:  # else it would grow and grow
                data = (mutate_bytes if rng.random() < 0.2 else mutate)(data, rng)
        return data

    return either


def _mutate_text(data: bytes, rng: random.Random) -> bytes:
    """Drops, doubles, exchanges or replaces the words between separators."""
    text = data.decode(errors="replace")
    separator = rng.choice("/:.-, =&\"'\n")
    words = text.split(separator)
    at, other = rng.randrange(len(words)), rng.randrange(len(words))
    match rng.randrange(5):
        case 0:
            del words[at]
        case 1:
            words.insert(at, words[other])
        case 2:
            words[at], words[other] = words[other], words[at]
        case 3:
            words[at] = rng.choice(_TEXTS)
        case _:
            words[at] = words[at].swapcase() + rng.choice(_TEXTS)
    return separator.join(words).encode(errors="replace")


def _mutate_tree(tree: Any, rng: random.Random) -> Any:
    """Mutates lists, dictionaries and plain values, as in JSON and msgpack."""
    if isinstance(tree, dict) and tree and rng.random() < 0.8:
        key = rng.choice(list(tree))
        entries = dict(tree)
        match rng.randrange(6):
            case 0:
                del entries[key]
            case 1:
                entries[rng.choice(_TEXTS)] = entries[key]
            case _:
                entries[key] = _mutate_tree(tree[key], rng)
        return entries
    if isinstance(tree, list) and tree and rng.random() < 0.8:
        items, at = list(tree), rng.randrange(len(tree))
        match rng.randrange(6):
            case 0:
                del items[at]
            case 1:
                items.insert(at, items[rng.randrange(len(items))])
            case 2:
                items *= 50
            case _:
                items[at] = _mutate_tree(tree[at], rng)
        return items
    match rng.randrange(8):
        case 0:
            return rng.choice(_INTEGERS) * rng.choice((1, 1, -1))
        case 1:
            return rng.choice(_FLOATS)
        case 2:
            return rng.choice(_TEXTS)
        case 3:
            return rng.choice((None, True, False, [], {}, [[]], {"": {}}))
        case 4 if isinstance(tree, bytes):
            return mutate_bytes(tree, rng)
        case 4:
            return [tree]
        case 5:
            return _nested(rng.choice((5, 200, 2000)), tree)
        case 6 if type(tree) in (int, float):
            return tree + rng.choice((-1, 1, 0.5))
        case _:
            return {"a": tree}


def _nested(depth: int, tree: Any) -> Any:
    for _ in range(depth):
        tree = [tree]
    return tree


def _mutate_json(data: bytes, rng: random.Random) -> bytes:
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        return mutate_bytes(data, rng)
    try:
        return json.dumps(_mutate_tree(tree, rng)).encode()
    except RecursionError:
        return b"[" * 100_000


def _mutate_msgpack(data: bytes, rng: random.Random) -> bytes:
    try:
        tree = msgpack.unpackb(data, strict_map_key=False)
    except (ValueError, TypeError, RecursionError):
        return mutate_bytes(data, rng)
    if isinstance(tree, msgpack.ExtType):
        code = rng.choice((tree.code, tree.code, tree.code, 0, 1, 127))
        return bytes(msgpack.packb(msgpack.ExtType(code, _mutate_msgpack(tree.data, rng))))
    try:
        return bytes(msgpack.packb(_mutate_tree(tree, rng)))
    except (ValueError, OverflowError, TypeError, RecursionError):
        return mutate_bytes(data, rng)


def _mutate_safetensors(data: bytes, rng: random.Random) -> bytes:
    """Mutates the length, the JSON header after it, and the tensors' bytes."""
    length = int.from_bytes(data[:8], "little")
    if not 0 < length <= len(data) - 8:
        return mutate_bytes(data, rng)
    header, rest = data[8 : 8 + length], data[8 + length :]
    if rng.random() < 0.8:
        header = _mutate_json(header, rng)
    else:
        rest = mutate_bytes(rest, rng)
    said = len(header) if rng.random() < 0.9 else rng.choice(_INTEGERS)
    return struct.pack("<Q", said) + header + rest


Field: TypeAlias = tuple[int, int, Any]
"""A protobuf field's number, its wire type, and its value: an integer, or bytes."""


def _mutate_protobuf(data: bytes, rng: random.Random) -> bytes:
    fields = _fields(data)
    if not fields:
        return mutate_bytes(data, rng)
    at = rng.randrange(len(fields))
    number, kind, value = fields[at]
    match rng.randrange(8):
        case 0:
            del fields[at]
        case 1:
            fields.insert(at, fields[rng.randrange(len(fields))])
        case 2:
            fields *= rng.choice((2, 40))
        case 3:
            fields[at] = (rng.choice((number + 1, number + 2, 1, 500)), kind, value)
        case _:
            fields[at] = (number, kind, _mutate_value(kind, value, rng))
    return b"".join(map(_encoded, fields))


def _mutate_value(kind: int, value: Any, rng: random.Random) -> Any:
    if kind == 0:
        return rng.choice((*_INTEGERS, value + 1, max(0, value - 1)))
    if kind == 1:
        return struct.pack("<d", rng.choice((*_FLOATS, float(rng.choice(_INTEGERS)), -1e300)))
    if kind == 5:
        return struct.pack("<f", rng.choice((0.0, -1.0, math.inf, math.nan, 1e30)))
    if _fields(value) and rng.random() < 0.6:
        return _mutate_protobuf(value, rng)  # it may be a message, or look like one
    match rng.randrange(5):
        case 0:
            return rng.choice(_TEXTS).encode()
        case 1:
            return rng.choice(_NOT_TEXT)
        case 2:
            return value * rng.choice((0, 2, 100))
        case 3:
            return _mutate_text(value, rng)
        case _:
            return mutate_bytes(value, rng)


def _fields(data: bytes) -> list[Field]:
    """The fields of a message. Empty if the data is not a message."""
    fields, at = list[Field](), 0
    try:
        while at < len(data):
            tag, at = _varint(data, at)
            number, kind = tag >> 3, tag & 7
            if kind == 0:
                value, at = _varint(data, at)
                fields.append((number, kind, value))
                continue
            if kind == 2:
                size, at = _varint(data, at)
            else:
                size = {1: 8, 5: 4}[kind]
            if number == 0 or at + size > len(data):
                return []
            fields.append((number, kind, data[at : at + size]))
            at += size
    except (IndexError, KeyError):
        return []
    return fields


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value, at, shift = value | (byte & 127) << shift, at + 1, shift + 7
        if byte < 128:
            return value, at


def _encoded(field: Field) -> bytes:
    number, kind, value = field
    head = _encode_varint(number << 3 | kind)
    if kind == 0:
        return head + _encode_varint(value)
    size = _encode_varint(len(value)) if kind == 2 else b""
    return b"".join((head, size, value))


def _encode_varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


_EDGES: dict[int, tuple[float, ...]] = {
    FieldDescriptor.TYPE_DOUBLE: (*_FLOATS, -1e300, 5e-324, 2.0**64),
    FieldDescriptor.TYPE_FLOAT: (*_FLOATS[:4], 3e38, 1e-45, math.inf, -math.inf, math.nan),
    FieldDescriptor.TYPE_UINT32: (0, 1, 2**31 - 1, 2**31, 2**32 - 1),
    FieldDescriptor.TYPE_FIXED32: (0, 2**32 - 1),
    FieldDescriptor.TYPE_SINT32: (0, -1, 2**31 - 1, -(2**31)),
    FieldDescriptor.TYPE_UINT64: (0, 1, 2**53, 2**63 - 1, 2**63, 2**64 - 1),
    FieldDescriptor.TYPE_FIXED64: (0, 2**64 - 1),
    FieldDescriptor.TYPE_BOOL: (False, True),
    FieldDescriptor.TYPE_ENUM: (0, 77, 2**31 - 1, -1),
}


def edges(message: Message, longest: int, many: int) -> Iterator[tuple[str, bytes]]:
    """The message with one field at an edge of its type, for each field and edge, at any depth: what it is, and the
    bytes. Fields of a message that is not set are not reached. `longest`: bytes of a long text. `many`: elements of a
    long list.
    """
    whole = message.SerializeToString()
    yield "empty", b""
    yield "twice", whole + whole
    yield "with an unknown field", whole + _encoded((999, 2, b"x" * 1000))
    for field in message.DESCRIPTOR.fields:
        rest, own = _copy(message), type(message)()
        rest.ClearField(field.name)
        others = rest.SerializeToString()
        yield f"without {field.name}", others
        value = getattr(message, field.name)
        if not field.is_repeated:
            for what, encoded in _field_edges(own, field, value, longest, many):
                yield f"{field.name}: {what}", others + encoded
            continue
        getattr(own, field.name).extend(value[1:])
        first = value[0] if value else None
        for what, encoded in _field_edges(type(message)(), field, first, longest, many):
            yield f"first of {field.name}: {what}", others + encoded + own.SerializeToString()
            yield f"one more of {field.name}: {what}", whole + encoded
        one = next(iter(_EDGES.get(field.type, ())), None)
        element = _encoded((field.number, 2, b"")) if one is None else _number(type(message)(), field, one)
        yield f"{many} of {field.name}", others + element * many


def _field_edges(
    holder: Message, field: Any, value: Any, longest: int, many: int
) -> Iterator[tuple[str, bytes]]:
    """The field alone, with each edge. `holder`: an empty message. `value`: a real one; None if there is none."""
    if field.message_type is not None:
        for what, data in () if value is None else edges(value, longest, many):
            yield what, _encoded((field.number, 2, data))
    elif field.type in _EDGES:
        for number in _EDGES[field.type]:
            yield f"{number}", _number(_copy(holder), field, number)
    else:
        texts = [b"", b"\0", *_NOT_TEXT, "\x1b[2J\u202e".encode(), b"a" * longest]
        if isinstance(value, bytes):
            texts += [value[:-1], value + b"\0", value * 2]
        for data in texts:
            yield f"{data[:8]!r}, {len(data)} bytes", _encoded((field.number, 2, data))


def _number(holder: Message, field: Any, number: float) -> bytes:
    if field.is_repeated:
        getattr(holder, field.name).append(number)
    else:
        setattr(holder, field.name, number)
    return holder.SerializeToString()


def _copy(message: Message) -> Message:
    copy = type(message)()
    copy.CopyFrom(message)
    return copy


text, json_text, packed, safetensors, protobuf = map(
    _or_bytes, (_mutate_text, _mutate_json, _mutate_msgpack, _mutate_safetensors, _mutate_protobuf)
)
