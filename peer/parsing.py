"""What happens if a stranger's message can't be parsed: it is ignored.

A parser raises its own error (a TalkootError) for what it refuses. Any other exception is a bug in the parser that a
stranger has found. It must not reach the caller, because a task that ends with it would end the process.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, TypeVar, get_args

from prometheus_client import CollectorRegistry, Counter

from peer.bounded import BoundedDict
from peer.errors import TalkootError
from peer.formatting import printable
from peer.metrics import start_at_zero

logger: logging.Logger = logging.getLogger(__name__)

T = TypeVar("T")

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
            with self.guarding(message, writer, TalkootError):
                return parse()
        except TalkootError as error:
            logger.debug("left out what %s wrote (%s): %s", printable(str(writer)), message, error)
            return None

    @contextmanager
    def guarding(self, message: Message, writer: object, refusal: type[TalkootError]) -> Iterator[None]:
        """For a parser whose caller handles `refusal`: raises `refusal` instead of errors that are not Talkoot's."""
        try:
            yield
        except TalkootError:
            raise
        except Exception as error:
            self.failures.labels(message).inc()
            cause = printable(f"{type(error).__name__}: {error}")
            who = printable(str(writer))
            if who not in self._logged:
                self._logged[who] = None
                logger.warning("can't parse what %s wrote (%s), and ignore it: %s", who, message, cause)
                logger.debug("where it failed", exc_info=True)
            raise refusal(f"a message that can't be parsed: {cause}") from error
