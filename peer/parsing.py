"""What happens if a stranger's message can't be parsed: it is ignored. And how its parts are counted before that.

A parser raises its own error (a TalkootError) for what it refuses. Any other exception is a bug in the parser that a
stranger has found. It must not reach the caller, because a task that ends with it would end the process.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal, TypeAlias, TypeVar, get_args

from prometheus_client import CollectorRegistry, Counter

from peer.bounded import BoundedDict
from peer.errors import TalkootError
from peer.formatting import printable
from peer.metrics import start_at_zero

logger: logging.Logger = logging.getLogger(__name__)

T = TypeVar("T")
Descriptor: TypeAlias = Any
"""The descriptor of a protobuf message type. Its class depends on protobuf's implementation."""

Message = Literal[
    "address",
    "node",
    "trainer",
    "replica",
    "manifest",
    "revocations",
    "dht",
    "session",
    "call",
    "state",
    "dense",
    "memory",
    "receipt",
]
"""What was parsed. `dht`: a message or a value of the DHT itself; `state`: of an expert; `dense`: a dense part;
`memory`: a record or a part of a memory.
"""
_PEERS = 1024
"""Peers for which a failure has been logged."""


class ParseGuard:
    """Guards the parsers of strangers' messages. One for each process, from `Swarm.guard`."""

    def __init__(self, metrics: CollectorRegistry | None = None) -> None:
        failures = Counter(
            "talkoot_parse_failures",
            "Messages of others that made a parser fail in a way that it should not.",
            ["message"],
            registry=metrics,
        )
        self.failures: Counter = start_at_zero(failures, *get_args(Message))
        self._logged = BoundedDict[str, None](_PEERS)

    def read(self, message: Message, writer: object, parse: Callable[[], T]) -> T | None:
        """The parser's result; None if it raises. `writer`: the peer, for the log."""
        try:
            return parse()
        except TalkootError as error:
            reason = str(error)
        except Exception as error:  # noqa: BLE001  # a bug in the parser must not end the caller's task
            reason = self._note_failure(message, writer, error)
        logger.debug("left out what %s wrote (%s): %s", printable(str(writer)), message, reason)
        return None

    @contextmanager
    def guarding(self, message: Message, writer: object, refusal: type[TalkootError]) -> Iterator[None]:
        """For a parser whose caller handles `refusal`: raises `refusal` instead of errors that are not Talkoot's."""
        try:
            yield
        except TalkootError:
            raise
        except Exception as error:
            raise refusal(self._note_failure(message, writer, error)) from error

    def _note_failure(self, message: Message, writer: object, error: Exception) -> str:
        """Counts and logs what a parser raised that is not Talkoot's. Returns what to say of the message."""
        self.failures.labels(message).inc()
        cause = printable(f"{type(error).__name__}: {error}")
        who = printable(str(writer))
        if who not in self._logged:
            self._logged[who] = None
            logger.warning("can't parse what %s wrote (%s), and ignore it: %s", who, message, cause)
            logger.debug("where it failed", exc_info=error)
        return f"a message that can't be parsed: {cause}"


def has_few_parts(data: bytes, kind: Descriptor, most: int) -> bool:
    """Whether an encoded message of this type has at most this many parts: its fields, and those of nested messages
    that contain messages. Reads no more of them, so 10,000 take a few ms, whatever the data.
    """
    left, unread = most, [(kind, 0, len(data))]
    try:
        while unread:
            kind, at, end = unread.pop()
            nested = _with_messages(kind)
            while at < end:
                left -= 1
                tag, at = _read_varint(data, at)
                match tag & 7:  # the wire type of the field
                    case 0:
                        _, at = _read_varint(data, at)
                    case 1:
                        at += 8
                    case 2:
                        size, at = _read_varint(data, at)
                        if inner := nested.get(tag >> 3):
                            unread.append((inner, at, at + size))
                        at += size
                    case 5:
                        at += 4
                    case _:
                        return False
                if left < 0:
                    return False
    except IndexError:
        return False
    return True


@cache
def _with_messages(kind: Descriptor) -> Mapping[int, Descriptor]:
    """The fields of this type whose messages contain messages themselves: their types, by field number."""
    kinds = {field.number: field.message_type for field in kind.fields if field.message_type is not None}
    return {n: each for n, each in kinds.items() if any(f.message_type is not None for f in each.fields)}


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    """The number, and where it ends. Raises IndexError if it does not end within 64 bits."""
    if (number := data[at]) < 128:
        return number, at + 1
    number &= 127
    for shift in range(7, 70, 7):
        at += 1
        number |= (data[at] & 127) << shift
        if data[at] < 128:
            return number, at + 1
    raise IndexError
