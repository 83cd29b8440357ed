"""Pauses of a node: it gives up its experts and stays in the swarm, until it may go on."""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from datetime import datetime
from typing import Any

from expert_server.machine import Machine
from expert_server.manners import Cause, MachineState, OwnersWord, reasons_to_pause
from expert_server.settings import NodeSettings

logger = logging.getLogger(__name__)

Step = Callable[[], Coroutine[Any, Any, None]]


class Pauses:
    """Whether a node hosts experts now, by its settings and its owner's word. One change at a time.

    A pause breaks off what takes experts. What was broken off must leave nothing that `release` does not give up.
    """

    def __init__(
        self, settings: NodeSettings, take: Step, release: Step, now: Callable[[], float] = time.time
    ) -> None:
        """`take` and `release`: begin and end to host."""
        self.hosts = False
        """Whether the node hosts experts, or would if there were any for it."""
        self.taking = False
        """Whether it just begins to."""
        self.why: Sequence[str] = ()
        """Why it is paused or about to be, in words that follow `paused`; else nothing."""
        self._settings = settings
        self._take, self._release = take, release
        self._now = now
        self._machine = Machine(settings)
        self._reasons: dict[Cause, str] = {}
        self._word = OwnersWord()
        self._changing = asyncio.Lock()
        self._running: asyncio.Timeout | None = None
        """Around what a pause breaks off."""
        self._releasing: asyncio.Task[None] | None = None
        self._ended = False

    @property
    def set_aside(self) -> Sequence[str]:
        """Why it would be paused, had its owner not told it to go on."""
        return self._word.set_aside(self._reasons)

    async def look(self) -> None:
        """Looks at the hour and the machine, and does what follows. Raises what `take` raises."""
        state = MachineState()
        if self._settings.only_when_idle or self._settings.not_on_battery:
            state = await asyncio.to_thread(self._machine.look)
        when = datetime.fromtimestamp(self._now())  # local time, by the clock on the wall
        self._reasons = reasons_to_pause(self._settings, when, state)
        await self._settle()

    async def pause(self, reason: str, for_s: float | None = None) -> None:
        """Returns when the experts are given up."""
        until = None if for_s is None else self._now() + for_s
        words = reason if until is None else f"{reason} until {datetime.fromtimestamp(until):%H:%M}"
        self._word.pause(words, until)
        await self._settle()

    async def resume(self) -> None:
        """Sets aside the reasons to pause that there are now, until they have passed. Raises what `take` raises."""
        self._word.go_on(self._reasons)
        await self._settle()

    @property
    def in_words(self) -> str:
        """Why it is paused, or would be if it were not told to go on; else empty."""
        if self.why:
            return paused_in_words(self.why)
        if self.set_aside:
            return f"told to go on, else {paused_in_words(self.set_aside)}"
        return ""

    async def end(self) -> None:
        """Breaks off what takes experts, and changes nothing any more."""
        self._ended = True
        self._break_off()
        async with self._changing:
            if self._releasing is not None:
                await self._give_up()

    async def _settle(self) -> None:
        """Hosts or does not, as is right now; what is right may change meanwhile."""
        self.why = self._word.judge(self._reasons, self._now())
        if self.why:
            self._break_off()
        async with self._changing:
            if self._releasing is not None:
                await self._give_up()
            while not self._ended and self.hosts is bool(self.why):
                if self.hosts:
                    logger.info(paused_in_words(self.why))
                    await self._give_up()
                else:
                    await self._begin()

    async def _begin(self) -> None:
        self.hosts = self.taking = True
        try:
            ended = await self._run(self._take)
        finally:
            self.taking = False
        if (
            not ended and not self._ended
        ):  # even if it may go on already: half of the experts are no state to be in
            await self._give_up()

    async def _give_up(self) -> None:
        """In a task of its own, which whoever comes next waits for, too.

        Experts that are out of service but not yet saved must not be lost when the one who waits is cancelled.
        """
        releasing = self._releasing or asyncio.create_task(self._release(), name="release of experts")
        self._releasing = releasing
        try:
            await asyncio.shield(releasing)
        finally:
            if releasing.done():
                self._releasing = None
        self.hosts = False

    async def _run(self, step: Step) -> bool:
        """Says whether it came to its end, and was not broken off."""
        try:
            async with asyncio.timeout(None) as running:
                self._running = running
                await step()
        except TimeoutError:
            if not running.expired():
                raise
            return False
        finally:
            self._running = None
        return True

    def _break_off(self) -> None:
        if self._running is not None:
            self._running.reschedule(0)
            self._running = None


def paused_in_words(why: Sequence[str]) -> str:
    """Such as `paused until 22:00` or `paused: on battery; until 22:00`."""
    return (
        f"paused {why[0]}" if len(why) == 1 and why[0].startswith("until ") else f"paused: {'; '.join(why)}"
    )
