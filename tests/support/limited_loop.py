"""The event loop that the tests share, whose timeouts say where a scenario waited."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from peer.loop import LoopThread

T = TypeVar("T")

_LONGEST_S = 300.0
"""A scenario without a limit of its own ends after this time, before pytest would end the test without a word about it.
"""
_CLEAN_UP_S = 120.0
"""The time that a scenario has to end once its own is over."""


class LimitedLoop(LoopThread):
    """Cancels a scenario on the loop itself when its time is over, so that the traceback names the line that waited."""

    def run(self, coroutine: Coroutine[Any, Any, T], timeout_s: float | None = None) -> T:
        limit_s = _LONGEST_S if timeout_s is None else timeout_s

        async def limited() -> T:
            async with asyncio.timeout(limit_s):
                return await coroutine

        return super().run(limited(), limit_s + _CLEAN_UP_S)
