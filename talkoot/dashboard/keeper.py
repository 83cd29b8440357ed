"""The history, used from the event loop: its file is written and read on other threads, one call at a time."""

import asyncio
import logging
import sqlite3
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from talkoot.dashboard.history import History, HistoryLostError, Point, Sample
from talkoot.dashboard.picture import Picture

logger = logging.getLogger(__name__)

T = TypeVar("T")

_PICTURE = "picture"
_SAY_EVERY_S = 600.0
"""A full disk fails each write, every few seconds."""


class Keeper:
    """Owns the history. Close it when done."""

    def __init__(self, history: History) -> None:
        self.failures = 0
        """Calls that failed, as of a full disk."""
        self._history = history
        self._lock = asyncio.Lock()
        self._say_at = 0.0

    async def add(self, samples: Sequence[Sample], now: float) -> None:
        await self._run(partial(self._history.add, samples, now), None)

    async def read(
        self,
        metric: str,
        since: float,
        now: float,
        most_points: int,
        most_series: int,
        only: str | None = None,
    ) -> list[tuple[str, list[Point]]]:
        """Nothing when the file can't be read."""
        return await self._run(
            partial(self._history.read, metric, since, now, most_points, most_series, only), []
        )

    async def keep_picture(self, picture: Picture) -> None:
        await self._run(lambda: self._history.keep(_PICTURE, picture.to_json()), None)

    async def kept_picture(self) -> Picture | None:
        kept = await self._run(partial(self._history.kept, _PICTURE), None)
        try:
            return Picture.from_json(kept)
        except ValueError:
            return None

    async def close(self) -> None:
        async with self._lock:
            await asyncio.to_thread(self._history.close)

    async def _run(self, call: Callable[[], T], otherwise: T) -> T:
        async with self._lock:
            # what runs on the thread can't be cancelled: whoever comes next must not begin before it has ended
            running = asyncio.ensure_future(asyncio.to_thread(call))
            try:
                return await asyncio.shield(running)
            except asyncio.CancelledError:
                await asyncio.wait([running])
                raise
            except HistoryLostError:
                self.failures += 1  # the history said so
            except sqlite3.Error as error:
                self.failures += 1
                if time.monotonic() >= self._say_at:
                    self._say_at = time.monotonic() + _SAY_EVERY_S
                    logger.warning("the history can't be used: %s", error)
        return otherwise
