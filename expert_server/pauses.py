"""Pauses: a node gives up its experts and stays in the swarm, until its owner, its schedule and its machine let it
resume.

Pure functions and classes, which are given times and samples, decide why to pause. `Machine` takes the samples, and
`PauseController` acts on the decision.
"""

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from typing import Any

import psutil

from expert_server.settings import NodeSettings
from peer.loop import first_of, tolerating
from peer.platform.machine import on_battery, processor_times

logger: logging.Logger = logging.getLogger(__name__)

LOOK_EVERY_S = 2.0
"""Time between two looks at the schedule, the battery and the load of other programs."""
BUSY_AFTER_S = 10.0
"""The load of other programs must be high over this window before a node pauses."""
IDLE_AFTER_S = 120.0
"""That load must be low over this window before the node resumes."""
_IDLE_SHARE = 0.4
"""The load at which to resume, as a share of the load at which to pause."""


class PauseCause(Enum):
    """Why a node pauses without a command of its owner."""

    SCHEDULE = "schedule"
    BATTERY = "battery"
    BUSY = "busy"


@dataclass(frozen=True, slots=True)
class Load:
    """Other programs' use of all cores between two moments, in monotonic seconds."""

    start: float
    end: float
    percent: float


class LoadMonitor:
    """Whether other programs need the machine. It starts as idle.

    It becomes busy when their mean load over `BUSY_AFTER_S` reaches `busy_percent`, and idle again when the mean over
    `IDLE_AFTER_S` is at most two fifths of that. A new window begins with each change, so changes are at least one
    window apart.
    """

    def __init__(self, busy_percent: float) -> None:
        """`busy_percent`: percent of all cores."""
        self.busy = False
        self._busy_percent = busy_percent
        self._idle_percent = _IDLE_SHARE * busy_percent
        self._loads: deque[Load] = deque()
        """The loads in the window, oldest first."""

    def note(self, load: Load) -> bool:
        """Adds the load since the last sample. Returns whether the machine is busy now."""
        self._loads.append(load)
        start = load.end - (IDLE_AFTER_S if self.busy else BUSY_AFTER_S)
        while self._loads[0].end <= start:
            self._loads.popleft()
        if self._loads[0].start <= start:  # the samples cover the whole window
            mean = _mean(self._loads, start)
            busy = mean > self._idle_percent if self.busy else mean >= self._busy_percent
            if busy is not self.busy:
                self.busy = busy
                self._loads.clear()
        return self.busy


def _mean(loads: Collection[Load], start: float) -> float:
    """The mean percentage from `start` on. The mean of equal numbers is exact, because a threshold may equal them."""
    parts = [(load.percent, load.end - max(load.start, start)) for load in loads]
    last = parts[-1][0]
    above = sum((percent - last) * seconds for percent, seconds in parts)
    return last + above / sum(seconds for _, seconds in parts)


@dataclass(frozen=True)
class MachineState:
    """The present state of the machine."""

    on_battery: bool = False
    busy: bool = False
    """Whether other programs keep it busy."""


def reasons_to_pause(settings: NodeSettings, when: datetime, machine: MachineState) -> dict[PauseCause, str]:
    """The reasons, in words that follow `paused`. `when`: local time."""
    found = {}
    if settings.schedule is not None and not settings.schedule.allows(when):
        found[PauseCause.SCHEDULE] = f"until {settings.schedule.next_start(when)}"
    if settings.not_on_battery and machine.on_battery:
        found[PauseCause.BATTERY] = "on battery"
    if settings.only_when_idle and machine.busy:
        found[PauseCause.BUSY] = "while other programs need the machine"
    return found


class OwnerOverride:
    """The owner's last command, which overrides every setting.

    A pause lasts until its time is over or until the next command. A resume overrides the present reasons to pause,
    each until it no longer holds, so that nobody has to undo it.
    """

    def __init__(self) -> None:
        self._pause: str | None = None
        self._until: float | None = None
        self._overridden: set[PauseCause] = set()

    def pause(self, reason: str, until: float | None = None) -> None:
        """`reason`: in words that follow `paused`. `until`: Unix time in seconds; None: until the next command."""
        self._pause, self._until = reason, until
        self._overridden.clear()

    def resume(self, causes: Collection[PauseCause]) -> None:
        """`causes`: the causes that hold now."""
        self._pause = None
        self._overridden = set(causes)

    def judge(self, reasons: Mapping[PauseCause, str], now: float) -> list[str]:
        """Why to pause now, the owner's reason first. Forgets overrides that no longer apply."""
        if self._until is not None and now >= self._until:
            self._pause = self._until = None
        self._overridden &= reasons.keys()
        own = [] if self._pause is None else [self._pause]
        return own + [words for cause, words in reasons.items() if cause not in self._overridden]

    def overridden(self, reasons: Mapping[PauseCause, str]) -> list[str]:
        """The reasons to pause that the owner's resume overrides."""
        return [words for cause, words in reasons.items() if cause in self._overridden]


@dataclass(frozen=True, slots=True)
class _Times:
    """CPU times, all in seconds."""

    at: float
    total: float
    """The time of all cores together."""
    busy: float
    own: float
    """The time of this process and its children."""


class Machine:
    """Samples the battery and the load. A sample takes some milliseconds, so take it off the event loop."""

    def __init__(self, settings: NodeSettings) -> None:
        self._settings = settings
        self._load_monitor = LoadMonitor(settings.busy_percent)
        self._process = psutil.Process()
        self._last = self._times()

    def look(self) -> MachineState:
        return MachineState(
            on_battery=self._settings.not_on_battery and on_battery(),
            busy=self._settings.only_when_idle and self._load_monitor.note(self._load()),
        )

    def _load(self) -> Load:
        before, self._last = self._last, self._times()
        total = self._last.total - before.total
        others = (self._last.busy - before.busy) - (self._last.own - before.own)
        percent = 100 * min(1.0, max(0.0, others) / total) if total > 0 else 0.0
        return Load(before.at, self._last.at, percent)

    def _times(self) -> _Times:
        machine = processor_times()
        own = 0.0
        for process in (self._process, *self._process.children(recursive=True)):
            with contextlib.suppress(psutil.Error):  # the process has ended
                used = process.cpu_times()
                own += used.user + used.system
        return _Times(time.monotonic(), machine.total, machine.busy, own)


Step = Callable[[], Coroutine[Any, Any, None]]


class PauseController:
    """Whether a node hosts experts now, according to its settings and its owner's commands. It makes one change at a
    time.

    A pause cancels a `take` in progress, and `release` must give up whatever that leaves.
    """

    def __init__(
        self,
        settings: NodeSettings,
        take: Step,
        release: Step,
        now: Callable[[], float] = time.time,
        look_every_s: float = LOOK_EVERY_S,
    ) -> None:
        """`take` and `release`: start and stop hosting experts. `look_every_s`: how often it looks by itself during
        `take`.
        """
        self.hosts = False
        """Whether the node hosts experts, or would host some if they needed a host."""
        self.taking = False
        """Whether it is just starting to host."""
        self.why: Sequence[str] = ()
        """Why it is paused or about to pause, in words that follow `paused`; else empty."""
        self._settings = settings
        self._take, self._release = take, release
        self._now = now
        self._look_every_s = look_every_s
        self._machine = Machine(settings)
        self._reasons: dict[PauseCause, str] = {}
        self._owner = OwnerOverride()
        self._changing = asyncio.Lock()
        self._running: asyncio.Timeout | None = None
        """The timeout around `take`, which a pause cancels."""
        self._releasing: asyncio.Task[None] | None = None
        self._ended = False

    @property
    def overridden(self) -> Sequence[str]:
        """Why it would be paused if its owner had not resumed it."""
        return self._owner.overridden(self._reasons)

    async def look(self) -> None:
        """Looks at the clock and the machine, and pauses or resumes accordingly. Raises what `take` raises."""
        if not self.taking:  # otherwise `_watch` looks
            await self._find_reasons()
        await self._settle()

    async def _find_reasons(self) -> None:
        state = MachineState()
        if self._settings.only_when_idle or self._settings.not_on_battery:
            state = await asyncio.to_thread(self._machine.look)
        when = datetime.fromtimestamp(self._now())  # local time, by the system's clock
        self._reasons = reasons_to_pause(self._settings, when, state)

    async def pause(self, reason: str, for_s: float | None = None) -> None:
        """Returns when the experts are given up."""
        until = None if for_s is None else self._now() + for_s
        words = reason if until is None else f"{reason} until {datetime.fromtimestamp(until):%H:%M}"
        self._owner.pause(words, until)
        await self._settle()

    async def resume(self) -> None:
        """Overrides the present reasons to pause, until they no longer hold. Raises what `take` raises."""
        self._owner.resume(self._reasons)
        await self._settle()

    @property
    def in_words(self) -> str:
        """Why it is paused, or would be if its owner had not resumed it; else empty."""
        if self.why:
            return paused_in_words(self.why)
        if self.overridden:
            return f"resumed by hand, else {paused_in_words(self.overridden)}"
        return ""

    async def end(self) -> None:
        """Cancels the taking of experts. Nothing changes after that."""
        self._ended = True
        self._cancel_taking()
        async with self._changing:
            if self._releasing is not None:
                await self._give_up()

    async def _settle(self) -> None:
        """Starts or stops hosting, until it matches the reasons to pause, which may change meanwhile."""
        self._judge()
        async with self._changing:
            if self._releasing is not None:
                await self._give_up()
            while not self._ended and self.hosts is bool(self.why):
                if self.hosts:
                    logger.info(paused_in_words(self.why))
                    await self._give_up()
                else:
                    await self._start_hosting()

    async def _start_hosting(self) -> None:
        self.hosts = self.taking = True
        is_cancelled = False
        try:
            async with asyncio.timeout(None) as running:
                self._running = running
                await first_of(self._take(), self._watch())
        except TimeoutError:
            if not (is_cancelled := running.expired()):
                raise
        finally:
            self._running, self.taking = None, False
        if is_cancelled and not self._ended:
            # even if it may resume already: it must not stay with half of the experts
            await self._give_up()

    async def _watch(self) -> None:
        """Looks for reasons to pause while experts are taken, which may last long. They end it."""
        while True:
            await asyncio.sleep(self._look_every_s)
            with tolerating("look for reasons to pause"):
                await self._find_reasons()
            self._judge()

    def _judge(self) -> None:
        self.why = self._owner.judge(self._reasons, self._now())
        if self.why:
            self._cancel_taking()

    async def _give_up(self) -> None:
        """Releases the experts in a separate task, which the next caller waits for as well.

        If the caller is cancelled, experts that are out of service but not yet saved must not be lost.
        """
        releasing = self._releasing or asyncio.create_task(self._release(), name="release of experts")
        self._releasing = releasing
        try:
            await asyncio.shield(releasing)
        finally:
            if releasing.done():
                self._releasing = None
        self.hosts = False

    def _cancel_taking(self) -> None:
        if self._running is not None:
            self._running.reschedule(0)
            self._running = None


def paused_in_words(why: Sequence[str]) -> str:
    """The pause in words, such as `paused until 22:00` or `paused: on battery; until 22:00`."""
    return (
        f"paused {why[0]}" if len(why) == 1 and why[0].startswith("until ") else f"paused: {'; '.join(why)}"
    )
