"""The event loop: uvloop's where there is one."""

import asyncio
import sys
import time
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")

_SLICE_S = 0.2


def new_event_loop() -> asyncio.AbstractEventLoop:
    """Else asyncio's own, which on Windows is the one that has child processes and any number of connections."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


def result_of(future: "Future[T]", timeout_s: float | None) -> T:
    """Waits for it on the main thread, so that signals are heard meanwhile. Raises TimeoutError, and what it raised.

    On Windows no signal ends a wait, so there it is many short ones.
    """
    if sys.platform != "win32":
        return future.result(timeout_s)
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    while True:
        left = _SLICE_S if deadline is None else min(_SLICE_S, max(0.0, deadline - time.monotonic()))
        try:
            return future.result(left)
        except TimeoutError:
            if future.done():  # with this error, or at this moment
                return future.result()
            if deadline is not None and time.monotonic() >= deadline:
                raise
