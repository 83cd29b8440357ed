"""How long a work holds the event loop at once, in seconds of computing, so that a busy machine changes little."""

import asyncio
import gc
import time
from collections.abc import Callable, Coroutine
from typing import Any
from unittest.mock import patch

from peer import loop

_SLICE_S = loop._SLICE_S


async def holds(work: Coroutine[Any, Any, None]) -> tuple[float, float]:
    """Runs a work that waits for nobody. Returns the longest time for which it held the loop, and its whole time.

    Time slices are as long as outside of simulations, even in one.
    """
    gc.collect()
    gc.disable()  # a collection takes longer, the more the other tests left
    try:
        with patch("peer.loop._SLICE_S", _SLICE_S):
            task, longest_s = asyncio.create_task(work), 0.0
            began = last = time.thread_time()
            while not task.done():
                await asyncio.sleep(0)
                now = time.thread_time()
                longest_s, last = max(longest_s, now - last), now
            await task
        return longest_s, last - began
    finally:
        gc.enable()


def pauses(work: Callable[[], Coroutine[Any, Any, None]], share: float) -> bool:
    """Whether a work holds the loop for less than this share of its time at once. On a busy machine it has three
    attempts.
    """

    async def attempt() -> bool:
        longest_s, whole_s = await holds(work())
        return longest_s / whole_s < share

    return any(asyncio.run(attempt()) for _ in range(3))
