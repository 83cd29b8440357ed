"""What all gRPC servers and callers share: how a server starts, how a call is refused, how its messages are read.

A message that can't be parsed counts as an empty one, which whoever reads it refuses. gRPC by itself would log a
traceback for each, and give a caller None in place of a reply. A handler that
fails unexpectedly ends only its own call.
"""

import asyncio
import inspect
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Generic, TypeVar

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from google.protobuf.message import DecodeError
from grpc import StatusCode

from peer import PROTOCOL_VERSION
from peer.errors import ExpertError, PortError, StateError, WireError
from peer.formatting import endpoint
from peer.identity import Identity
from peer.loop import Restarts
from peer.rpc.channels import SERVER_OPTIONS
from peer.transport.addresses import require_free_port

logger = logging.getLogger(__name__)

M = TypeVar("M")
Parse = Callable[[bytes], M]
_RETRY_KEY = "talkoot-retry-after-s"
_LONGEST_RETRY_S = 3600.0
_KINDS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")
"""Of handlers: each has one of these."""
_GRPC = logging.getLogger("grpc._cython.cygrpc")


def make_server(max_calls: int, restarts: Restarts | None = None) -> grpc.aio.Server:
    """A server without services and ports. `max_calls`: at the same time, of all services; more are refused.

    `restarts`: counts handlers that fail unexpectedly.
    """
    _GRPC.addFilter(_is_of_ours)
    return grpc.aio.server(
        interceptors=[TolerantInterceptor(restarts)],
        options=SERVER_OPTIONS,
        maximum_concurrent_rpcs=max_calls,
    )


def server_credentials(identity: Identity, certificate: bytes) -> grpc.ServerCredentials:
    """TLS with this peer's key and its DER certificate."""
    pem = x509.load_der_x509_certificate(certificate).public_bytes(serialization.Encoding.PEM)
    return grpc.ssl_server_credentials([(identity.private_key_pem(), pem)])


async def listen(
    server: grpc.aio.Server,
    credentials: grpc.ServerCredentials,
    host: str,
    port: int,
    exit_path: Path | None = None,
) -> int:
    """Starts a server on an address of this machine, and on the unix socket to which its tunnel leads, if it has one.

    Returns its port. `port`: 0 for any free one. Raises PortError when it can't listen there.
    """
    require_free_port(host, port)
    try:
        bound: int = server.add_secure_port(endpoint(host, port), credentials)
        if exit_path is not None:
            server.add_secure_port(f"unix:{exit_path}", credentials)
    except RuntimeError as error:
        raise PortError(f"can't listen on {host} port {port}: pass another port") from error
    await server.start()
    return bound


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


def make_stub(stub: Callable[[Any], Any], channel: grpc.aio.Channel) -> Any:
    """A generated stub that parses replies tolerantly: those that can't be parsed are empty."""
    return stub(_Calls(channel))


class RequestReader(Generic[M]):
    """Reads the messages of one call.

    A read that has begun is never cancelled, and ends with the call: gRPC does not free the message of a read that
    nobody waits for (grpc issue 43360).
    """

    def __init__(self, stream: AsyncIterator[M]) -> None:
        self._stream = stream
        self._reading: asyncio.Future[M | None] | None = None

    async def next(self) -> M | None:
        """The next message; None at the end."""
        self._reading = asyncio.ensure_future(anext(self._stream, None))
        self._reading.add_done_callback(note_failure)
        return await asyncio.shield(self._reading)


class TolerantInterceptor(grpc.aio.ServerInterceptor):
    """Makes a server parse requests tolerantly, and end a call whose handler fails unexpectedly."""

    def __init__(self, restarts: Restarts | None = None) -> None:
        self._restarts = restarts

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:  # no such method
            return None
        behaviour = {
            kind: self._supervised(getattr(handler, kind)) for kind in _KINDS if getattr(handler, kind)
        }
        return handler._replace(request_deserializer=_or_empty(handler.request_deserializer), **behaviour)

    def _supervised(self, behaviour: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        async def replies(request: Any, context: Any) -> AsyncIterator[Any]:
            async with self._ending(context):
                async for reply in behaviour(request, context):
                    yield reply

        async def reply(request: Any, context: Any) -> Any:
            async with self._ending(context):
                return await behaviour(request, context)

        return replies if inspect.isasyncgenfunction(behaviour) else reply

    @asynccontextmanager
    async def _ending(self, context: Any) -> AsyncIterator[None]:
        """gRPC itself would tell the caller what failed."""
        try:
            yield
        except grpc.aio.BaseError:  # the handler ended the call, or the caller has gone
            raise
        except NotImplementedError:  # a method that a generated base class has, and ours does not
            await context.abort(StatusCode.UNIMPLEMENTED, "this peer does not serve this method")
        except Exception:
            if self._restarts is not None:
                self._restarts.note("answer a call")
            logger.exception("could not answer a call")
            await context.abort(StatusCode.INTERNAL, "this peer failed to answer")


def note_failure(transfer: "asyncio.Future[Any]") -> None:
    """For transfers that nobody may be waiting for any more."""
    if not transfer.cancelled() and (error := transfer.exception()) is not None:
        logger.debug("a message was not read or written: %s", error)


class _Calls:
    """What a generated stub needs of a channel."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._channel = channel

    def __getattr__(self, kind: str) -> Callable[..., Any]:
        """`kind`: such as `unary_unary`."""
        make_call = getattr(self._channel, kind)

        def make(method: str, *, response_deserializer: Parse[Any], **more: Any) -> Any:
            return make_call(method, response_deserializer=_or_empty(response_deserializer), **more)

        return make


def _or_empty(parse: Parse[M]) -> Parse[M]:
    def parsed(data: bytes) -> M:
        try:
            return parse(data)
        except DecodeError:
            return parse(b"")

    return parsed


def _is_of_ours(record: logging.LogRecord) -> bool:
    """Drops gRPC's complaints that a caller, who has gone or does not read, took no message or status.

    gRPC itself passes over them once it knows that the call has ended. On a busy machine it may learn that later, and
    then it logs a traceback.
    """
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, grpc.aio.InternalError):
        logger.debug("a call ended before its answer: %s", error)
        return False
    return True
