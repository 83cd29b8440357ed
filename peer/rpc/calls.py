"""What all gRPC services and callers share: how a call is refused, and how its messages are parsed.

A message that can't be parsed counts as an empty one, which its reader then refuses. gRPC by itself would log a
traceback for each, and return None to a caller in place of a reply. A message of very many parts counts as empty, too:
3 MB of empty messages or strings would block the loop for a quarter of a second, and take 100 MB of memory.
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
from peer.parsing import Descriptor, has_few_parts

logger: logging.Logger = logging.getLogger(__name__)

M = TypeVar("M")
Parse = Callable[[bytes], M]
_RETRY_KEY = "talkoot-retry-after-s"
_LONGEST_RETRY_S = 3600.0
_COUNTED_BYTES = 64 * 2**10
"""Only messages larger than this have their parts counted."""
MOST_PARTS = 10_000
"""The most parts of a message: its fields, and those of nested messages that contain messages. A call names up to 4,096
experts, and its answer has as many blocks of rows.
"""


def require_same_swarm(own_swarm_id: str, protocol_version: int, swarm_id: str) -> None:
    """Raises ExpertError (FAILED_PRECONDITION) if the caller uses another protocol version or is in another swarm."""
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
    """Ends the call with the status of any error raised inside.

    `late`: the message if it takes longer than `longest_s`, or if a TimeoutError has no message.
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


def status_of(error: ExpertError | grpc.aio.AioRpcError) -> StatusCode:
    """How a call ended that this peer made."""
    return error.status if isinstance(error, ExpertError) else error.code()


def retry_metadata(retry_after_s: float) -> tuple[tuple[str, str], ...]:
    """The trailing metadata that tells a refused caller when to retry; empty if that is not known."""
    return ((_RETRY_KEY, f"{retry_after_s:.3f}"),) if retry_after_s else ()


def retry_after_s(metadata: Iterable[tuple[str, str | bytes]] | None, otherwise: float) -> float:
    """In how many seconds the other side suggests a retry, within bounds; `otherwise` if it suggests nothing
    sensible.
    """
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
    most_parts: int = MOST_PARTS,
) -> Any:
    """A generated stub that parses replies tolerantly: replies that can't be parsed, or are too large, are empty.

    `sends_one`: methods that take a stream of requests are called with a single request. To the server that is the
    same. `most_bytes`, `most_parts`: see `or_empty`.
    """
    return stub(_Calls(channel, sends_one, most_bytes, most_parts))


@contextmanager
def while_open() -> Iterator[None]:
    """Raises ExpertError (UNAVAILABLE) if the channel of a call inside is closed, as when a pool makes room.

    By itself, gRPC raises CancelledError where the call is awaited, which would end the task as if somebody had
    cancelled it.
    """
    try:
        yield
    except (asyncio.CancelledError, grpc.aio.UsageError) as error:
        if is_cancelled():
            raise
        raise ExpertError(StatusCode.UNAVAILABLE, "the channel was closed during the call") from error


def note_failure(transfer: "asyncio.Future[Any]") -> None:
    """Logs the error of a transfer that nobody may be waiting for any more."""
    if not transfer.cancelled() and (error := transfer.exception()) is not None:
        logger.debug("a message was not read or written: %s", error)


class _Calls:
    """The part of a channel that a generated stub needs."""

    def __init__(
        self, channel: grpc.aio.Channel, sends_one: bool, most_bytes: int | None, most_parts: int
    ) -> None:
        self._channel = channel
        self._sends_one = sends_one
        self._most_bytes, self._most_parts = most_bytes, most_parts

    def __getattr__(self, kind: str) -> Callable[..., Any]:
        """`kind`: a method of the channel, such as `unary_unary`."""
        make_call = getattr(self._channel, kind.replace("stream_", "unary_") if self._sends_one else kind)

        def make(method: str, *, response_deserializer: Parse[Any], **more: Any) -> Any:
            parse = or_empty(response_deserializer, self._most_bytes, self._most_parts)
            return make_call(method, response_deserializer=parse, **more)

        return make


def or_empty(parse: Parse[M], most_bytes: int | None = None, most_parts: int = MOST_PARTS) -> Parse[M]:
    """A parser that returns an empty message for data that can't be parsed, is larger than `most_bytes`, or has more
    parts than `most_parts`.
    """
    # the parser of a generated class is bound to that class
    kind: Descriptor | None = getattr(getattr(parse, "__self__", None), "DESCRIPTOR", None)

    def is_small(data: bytes) -> bool:
        if most_bytes is not None and len(data) > most_bytes:
            return False
        return kind is None or len(data) <= _COUNTED_BYTES or has_few_parts(data, kind, most_parts)

    def parsed(data: bytes) -> M:
        try:
            return parse(data if is_small(data) else b"")
        except DecodeError:
            return parse(b"")

    return parsed
