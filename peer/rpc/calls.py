"""What all gRPC services and callers share: how a call is refused, how its messages are parsed.

A message that can't be parsed counts as an empty one, which whoever reads it refuses. gRPC by itself would log a
traceback for each, and give a caller None in place of a reply.
"""

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError
from grpc import StatusCode

from peer import PROTOCOL_VERSION
from peer.errors import ExpertError, StateError, WireError
from peer.loop import is_cancelled

logger: logging.Logger = logging.getLogger(__name__)

M = TypeVar("M")
Parse = Callable[[bytes], M]
_RETRY_KEY = "talkoot-retry-after-s"
_LONGEST_RETRY_S = 3600.0


def require_same_swarm(own_swarm_id: str, protocol_version: int, swarm_id: str) -> None:
    """Raises ExpertError (FAILED_PRECONDITION) if the caller speaks another version or means another swarm."""
    if protocol_version != PROTOCOL_VERSION:
        raise ExpertError(
            StatusCode.FAILED_PRECONDITION,
            f"this node speaks protocol version {PROTOCOL_VERSION}, the caller {protocol_version}",
        )
    if swarm_id != own_swarm_id:
        raise ExpertError(
            StatusCode.FAILED_PRECONDITION,
            f"this node belongs to swarm {own_swarm_id}, the call is for {swarm_id[:64]!r}",
        )


@asynccontextmanager
async def abort_on_error(
    context: grpc.aio.ServicerContext[Any, Any], longest_s: float | None = None, late: str = ""
) -> AsyncIterator[None]:
    """Ends the call with the status of an error that is raised inside.

    `late`: the message if it takes longer than `longest_s`, or if a TimeoutError says nothing.
    """
    try:
        async with asyncio.timeout(longest_s):
            yield
    except WireError as error:
        await context.abort(StatusCode.INVALID_ARGUMENT, str(error))
    except ExpertError as error:
        await context.abort(error.status, str(error), retry_metadata(error.retry_after_s))
    except StateError as error:
        await context.abort(StatusCode.FAILED_PRECONDITION, str(error))
    except TimeoutError as error:
        await context.abort(StatusCode.DEADLINE_EXCEEDED, str(error) or late)


def retry_metadata(retry_after_s: float) -> tuple[tuple[str, str], ...]:
    """The trailing metadata of a refused call that says when it is worth a retry; empty if that is not known."""
    return ((_RETRY_KEY, f"{retry_after_s:.3f}"),) if retry_after_s else ()


def retry_after_s(metadata: Iterable[tuple[str, str | bytes]] | None, otherwise: float) -> float:
    """When the other side says a retry is worth it, within bounds; `otherwise` if it says nothing sensible."""
    for key, value in metadata or ():
        if key == _RETRY_KEY:
            try:
                seconds = float(value)
            except ValueError:
                break
            return min(seconds, _LONGEST_RETRY_S) if math.isfinite(seconds) and seconds > 0 else otherwise
    return otherwise


def make_stub(
    stub: Callable[[Any], Any],
    channel: grpc.aio.Channel,
    sends_one: bool = False,
    most_bytes: int | None = None,
) -> Any:
    """A generated stub that parses replies tolerantly: those that can't be parsed, or have more bytes, are empty.

    `sends_one`: its methods that take a stream are given one request instead. That is the same to the server.
    """
    return stub(_Calls(channel, sends_one, most_bytes))


@contextmanager
def while_open() -> Iterator[None]:
    """Raises ExpertError (UNAVAILABLE) if the channel of a call inside is closed, as a pool does to make room.

    gRPC tells who waits for a call by a CancelledError, which would end the task as if somebody had cancelled it.
    """
    try:
        yield
    except (asyncio.CancelledError, grpc.aio.UsageError) as error:
        if is_cancelled():
            raise
        raise ExpertError(StatusCode.UNAVAILABLE, "the channel was closed during the call") from error


def note_failure(transfer: "asyncio.Future[Any]") -> None:
    """For transfers that nobody may be waiting for any more."""
    if not transfer.cancelled() and (error := transfer.exception()) is not None:
        logger.debug("a message was not read or written: %s", error)


class _Calls:
    """What a generated stub needs of a channel."""

    def __init__(self, channel: grpc.aio.Channel, sends_one: bool, most_bytes: int | None) -> None:
        self._channel = channel
        self._sends_one = sends_one
        self._most_bytes = most_bytes

    def __getattr__(self, kind: str) -> Callable[..., Any]:
        """`kind`: such as `unary_unary`."""
        make_call = getattr(self._channel, kind.replace("stream_", "unary_") if self._sends_one else kind)

        def make(method: str, *, response_deserializer: Parse[Any], **more: Any) -> Any:
            parse = or_empty(response_deserializer, self._most_bytes)
            return make_call(method, response_deserializer=parse, **more)

        return make


def or_empty(parse: Parse[M], most_bytes: int | None = None) -> Parse[M]:
    """Parses what can be parsed and has at most so many bytes, and gives an empty message for the rest."""

    def parsed(data: bytes) -> M:
        try:
            return parse(b"" if most_bytes is not None and len(data) > most_bytes else data)
        except DecodeError:
            return parse(b"")

    return parsed
