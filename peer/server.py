"""gRPC servers, whose log does not fill with callers that have gone."""

import logging

import grpc

from peer.rpc.channels import SERVER_OPTIONS
from peer.garbage import GarbageInterceptor

logger = logging.getLogger(__name__)

_GRPC = logging.getLogger("grpc._cython.cygrpc")


def make_server(max_calls: int) -> grpc.aio.Server:
    """Without services and ports. `max_calls`: at once, of all services; more are refused."""
    _GRPC.addFilter(_is_of_ours)
    return grpc.aio.server(
        interceptors=[GarbageInterceptor()], options=SERVER_OPTIONS, maximum_concurrent_rpcs=max_calls
    )


def _is_of_ours(record: logging.LogRecord) -> bool:
    """Not so when gRPC took no message or status for a caller.

    The caller has gone, or does not read. gRPC itself passes over it once it knows that the call has ended; on a busy
    machine it may learn that after the error, which it then logs with its traceback.
    """
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, grpc.aio.InternalError):
        logger.debug("a call ended before its answer: %s", error)
        return False
    return True
