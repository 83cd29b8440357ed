"""What another peer packed becomes typed and bounded entries, or is refused."""

import asyncio
import contextlib
import math
import struct
import time
from functools import partial

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st
from loop_lags import least_cpu_s, longest_slice

from peer.errors import WireError
from peer.identity import PeerID
from peer.kademlia.routing import key_id_of
from peer.kademlia.validation import (
    MAX_ENTRIES,
    MAX_MESSAGE_BYTES,
    Entry,
    EntryChecker,
    Record,
    pack,
    pack_entries,
    packed_bytes,
    unpack,
    unpack_entries,
    unpack_subkey,
)

KEY = key_id_of("key")
SOMEBODY = PeerID(b"\x12\x20" + bytes(32))
SUBKEYS = st.integers(0, 2**31 - 1) | st.binary(max_size=64)
ENTRIES = st.builds(Entry, st.binary(max_size=200), st.floats(allow_nan=False, allow_infinity=False))
PACKABLE = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=20)
    | st.binary(max_size=40)
    | st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=30)),
    lambda inner: (
        st.lists(inner, max_size=5) | st.dictionaries(st.integers(0, 9) | st.text(max_size=3), inner)
    ),
    max_leaves=12,
)


class OnlyGood:
    def validate(self, record: Record) -> bool:
        return bool(record.value == b"good")


def wrapped(inner: bytes) -> bytes:
    """Adds the marker of dictionaries."""
    packed: bytes = msgpack.packb(msgpack.ExtType(0x50, inner))
    return packed


def dictionary(rows: object, *common: object) -> bytes:
    """`common`: the value of all rows without one."""
    return wrapped(msgpack.packb([math.inf, 1.0, rows, *common]))


@given(st.dictionaries(SUBKEYS, ENTRIES, max_size=20))
def test_what_is_packed_is_unpacked(entries: dict[int | bytes, Entry]) -> None:
    packed = pack_entries(entries)
    assert unpack_entries(packed) == entries
    assert len(packed) <= packed_bytes(entries)


@given(st.binary(max_size=300) | PACKABLE.map(msgpack.packb))
def test_any_bytes_are_a_plain_value_or_refused(data: bytes) -> None:
    for parse, types in ((unpack, (str, bytes, int)), (unpack_subkey, (bytes, int))):
        with contextlib.suppress(WireError):
            assert type(parse(data)) in types


@given(
    st.binary(max_size=300)
    | st.binary(max_size=300).map(wrapped)
    | PACKABLE.map(dictionary)
    | st.builds(
        dictionary,
        st.lists(
            st.tuples(PACKABLE, PACKABLE, PACKABLE)
            | st.tuples(SUBKEYS, st.binary(), PACKABLE)
            | st.tuples(SUBKEYS, st.floats())
        ),
        st.binary() | PACKABLE,
    )
)
def test_any_bytes_are_entries_or_refused(data: bytes) -> None:
    try:
        entries = unpack_entries(data)
    except WireError:
        return
    assert len(entries) <= MAX_ENTRIES
    for subkey, (value, expires_at) in entries.items():
        assert type(subkey) in (int, bytes)
        assert type(value) is bytes
        assert type(expires_at) is float
        assert math.isfinite(expires_at)
    assert unpack_entries(pack_entries(entries)) == entries


def test_a_value_that_several_entries_have_is_packed_once() -> None:
    name = pack("the-swarm-P34zNYj18tCK.3.27")
    index: dict[int | bytes, Entry] = {n: Entry(name, 1.7e9 + n) for n in range(128)}
    beside: dict[int | bytes, Entry] = {b"peer": Entry(pack(bytes(300)), 1.7e9)}
    assert unpack_entries(pack_entries(index | beside)) == index | beside
    assert pack_entries(index | beside).count(name) == 1
    assert len(pack_entries(index)) < 128 * 13
    assert pack_entries(beside) == dictionary([[b"peer", *beside[b"peer"]]]).replace(
        msgpack.packb(1.0), msgpack.packb(1.7e9), 1
    ), "hivemind reads dictionaries without such values"


@pytest.mark.parametrize("common", ["text", 7, None, [b"value"], msgpack.ExtType(0x50, b"x"), bytes(161)])
def test_entries_with_a_malformed_common_value_are_left_out(common: object) -> None:
    assert unpack_entries(dictionary([[2, 2.0], GOOD], common)) == {1: Entry(b"value", 2.0)}


@pytest.mark.parametrize(
    "row", [[True, 2.0], [-1, 2.0], [2, 2], [2, math.nan], [2, b"value"], [2], [[2], 2.0]]
)
def test_a_malformed_entry_with_the_common_value_is_left_out(row: object) -> None:
    assert unpack_entries(dictionary([row, [3, 2.0]], b"value")) == {3: Entry(b"value", 2.0)}


GOOD = [1, b"value", 2.0]


@pytest.mark.parametrize(
    "row",
    [
        [2, b"value"],
        [2, 2.0],
        [True, b"value", 2.0],
        [-1, b"value", 2.0],
        [2**31, b"value", 2.0],
        ["text", b"value", 2.0],
        [bytes(65), b"value", 2.0],
        [[2], b"value", 2.0],
        [2, "text", 2.0],
        [2, b"value", 2],
        [2, b"value", math.nan],
        [2, b"value", math.inf],
        [2, msgpack.ExtType(0x50, b"x"), 2.0],
        [msgpack.ExtType(0x40, b"\x91\x02"), b"value", 2.0],
        {"2": b"value"},
        None,
    ],
)
def test_a_malformed_entry_is_left_out(row: object) -> None:
    assert unpack_entries(dictionary([row, GOOD, row])) == {1: Entry(b"value", 2.0)}


@pytest.mark.parametrize("rows", [{1: GOOD}, None, b"rows", 3])
def test_a_dictionary_of_another_form_is_refused(rows: object) -> None:
    with pytest.raises(WireError):
        unpack_entries(dictionary(rows))
    with pytest.raises(WireError):
        unpack_entries(wrapped(msgpack.packb(rows)))
    with pytest.raises(WireError):
        unpack_entries(dictionary([], b"value", b"more"))


def test_a_dictionary_has_its_own_type() -> None:
    packed = dictionary([GOOD])
    assert len(unpack_entries(packed)) == 1
    inner = msgpack.unpackb(packed).data
    with pytest.raises(WireError):
        unpack_entries(msgpack.packb(msgpack.ExtType(0x51, inner)))


def test_too_many_entries_are_sampled() -> None:
    many = dictionary([[n, b"", 2.0] for n in range(MAX_ENTRIES + 500)])
    samples = [set(unpack_entries(many)) for _ in range(2)]
    assert [len(sample) for sample in samples] == [MAX_ENTRIES] * 2
    assert samples[0] != samples[1]


def nested(depth: int, inner: bytes = b"\x01") -> bytes:
    """Nested tuples, as msgpack's extension type 64."""
    for _ in range(depth):
        inner = b"\xc9" + (len(inner) + 1).to_bytes(4, "big") + b"\x40\x91" + inner
    return inner


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        nested(1),
        nested(5000),
        b"\x91" * 90_000,
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\xcb" + struct.pack(">d", math.nan),
        b"\xd6\xff" + bytes(4),  # a time
        b"\xc3",
        b"\x80",
        b"\x01\x01",
    ],
)
def test_other_types_and_impossible_lengths_are_refused_by_all(data: bytes) -> None:
    for parse in (unpack, unpack_subkey, unpack_entries):
        with pytest.raises(WireError):
            parse(data)
    for odd in (wrapped(data), wrapped(b"\x93\x01\x01" + data)):
        with pytest.raises(WireError):
            unpack_entries(odd)


def test_messages_of_many_tiny_objects_are_parsed_at_once() -> None:
    """A message of 4 MB used to have 105,000 entries, which blocked the loop for 10 s. A message of 128 KiB has room
    for these.
    """
    tiny = dictionary([[n % 128, b"", 1.0] for n in range(9000)])
    nothing = wrapped(b"\x93\xc0\xc0\xdd" + (120_000).to_bytes(4, "big") + b"\xc0" * 120_000)
    entries = dictionary([[n, b"", 1.0] for n in range(MAX_ENTRIES)])
    for data in (tiny, nothing, entries):
        assert 0.05 * MAX_MESSAGE_BYTES < len(data) <= MAX_MESSAGE_BYTES
        assert len(unpack_entries(data)) <= MAX_ENTRIES
        assert least_cpu_s(partial(unpack_entries, data)) < 0.03
    with pytest.raises(WireError):
        unpack_entries(dictionary([[n, b"", 1.0] for n in range(105_000)]))


class Slow:
    """A validator that takes half a millisecond for each record, as if it checked five signatures."""

    def validate(self, record: Record) -> bool:
        ends = time.thread_time() + 0.0005
        while time.thread_time() < ends:
            pass
        return True


def test_only_good_entries_are_kept() -> None:
    entries: dict[int | bytes, Entry] = {n: Entry([b"good", b"bad"][n % 2], 1.0) for n in range(9)}
    kept = asyncio.run(EntryChecker().accepted(OnlyGood(), SOMEBODY, KEY, entries))
    assert set(kept) == {0, 2, 4, 6, 8}


def test_many_messages_at_once_leave_turns_to_others() -> None:
    entries: dict[int | bytes, Entry] = {n: Entry(b"value", 1.0) for n in range(50)}

    async def run() -> float:
        checker = EntryChecker()
        return await longest_slice(
            lambda: asyncio.gather(*(checker.accepted(Slow(), SOMEBODY, KEY, entries) for _ in range(20)))
        )

    assert asyncio.run(run()) < 0.02, "0.5 s of checks"
