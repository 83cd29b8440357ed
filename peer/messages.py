"""Messages of a gRPC stream, read one after another."""

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any, Generic, TypeVar

logger = logging.getLogger(__name__)

M = TypeVar("M")


def note_failure(transfer: "asyncio.Future[Any]") -> None:
    """Nobody may be waiting for it any more."""
    if not transfer.cancelled() and (error := transfer.exception()) is not None:
        logger.debug("a message was not read or written: %s", error)


class Messages(Generic[M]):
    """Those that one call sends.

    A read that has begun is never cancelled, and ends with the call: gRPC does not free the message of a read that
    nobody waits for (grpc issue 43360).
    """

    def __init__(self, stream: AsyncIterator[M]) -> None:
        self._stream = stream
        self._reading: asyncio.Future[M | None] | None = None

    async def next(self) -> M | None:
        """None at the end."""
        self._reading = asyncio.ensure_future(anext(self._stream, None))
        self._reading.add_done_callback(note_failure)
        return await asyncio.shield(self._reading)
