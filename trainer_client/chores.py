"""What a trainer does beside training: each task begins again when it fails, and says so."""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

logger = logging.getLogger(__name__)

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0
"""Before a task begins again; each time twice as long, unless it has run for longer than the longest."""


class Chores:
    """Tasks of one loop. They fail by mistakes in the program alone: what peers do, each handles itself."""

    def __init__(self, first_pause_s: float = _FIRST_PAUSE_S) -> None:
        self.failures = 0
        self._first_pause_s = first_pause_s
        self._tasks: list[asyncio.Task[None]] = []

    def begin(self, name: str, run: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._tasks.append(asyncio.create_task(self._keep(name, run), name=name))

    async def end(self) -> None:
        """Ending twice is harmless."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _keep(self, name: str, run: Callable[[], Coroutine[Any, Any, None]]) -> None:
        pause_s, now = self._first_pause_s, asyncio.get_running_loop().time
        while True:
            began = now()
            try:
                await run()
            except Exception:
                self.failures += 1
                if now() - began > _LONGEST_PAUSE_S:
                    pause_s = self._first_pause_s
                logger.exception("could not %s; trying again in %.0f s", name, pause_s)
            else:
                return
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
