"""The event loop: uvloop's where uvloop is available."""

import asyncio
import sys
import time
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")

_SLICE_S = 0.2


def new_event_loop() -> asyncio.AbstractEventLoop:
    """A new loop. asyncio's own loop on Windows is the one that supports child processes and any number of
    connections.
    """
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


def result_of(future: "Future[T]", timeout_s: float | None) -> T:
    """Waits for a future on the main thread, so that signals are still handled. Raises TimeoutError, or the future's
    error.

    On Windows, a signal does not interrupt a wait, so there the wait is split into many short ones.
    """
    if sys.platform != "win32":
        return future.result(timeout_s)
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    while True:
        left = _SLICE_S if deadline is None else min(_SLICE_S, max(0.0, deadline - time.monotonic()))
        try:
            return future.result(left)
        except TimeoutError:
            if future.done():  # the future itself raised this error, or has ended just now
                return future.result()
            if deadline is not None and time.monotonic() >= deadline:
                raise
