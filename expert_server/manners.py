"""The manners of a node: why it should pause now. Pure: times, samples and settings are passed in."""

from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import Enum

from expert_server.settings import NodeSettings


class Cause(Enum):
    """What lets a node pause, beside its owner's word."""

    SCHEDULE = "schedule"
    BATTERY = "battery"
    BUSY = "busy"


@dataclass(frozen=True, slots=True)
class Load:
    """What other programs used of all cores between two moments, in monotonic seconds."""

    start: float
    end: float
    percent: float


class OtherUse:
    """Whether other programs need the machine. It begins as not busy.

    It becomes busy when their mean load over `busy_after_s` reaches `busy_percent`, and idle again when that over
    `idle_after_s` is at most `idle_percent`. Each window begins anew when it changes, so it never changes faster.
    """

    def __init__(self, settings: NodeSettings) -> None:
        self.busy = False
        self._settings = settings
        self._loads: deque[Load] = deque()
        """Of the window, oldest first."""

    def note(self, load: Load) -> bool:
        """Takes the load since the last look. Says whether the machine is busy now."""
        settings = self._settings
        self._loads.append(load)
        start = load.end - (settings.idle_after_s if self.busy else settings.busy_after_s)
        while self._loads[0].end <= start:
            self._loads.popleft()
        if self._loads[0].start <= start:  # the loads reach back far enough
            mean = _mean(self._loads, start)
            busy = mean > settings.idle_percent if self.busy else mean >= settings.busy_percent
            if busy is not self.busy:
                self.busy = busy
                self._loads.clear()
        return self.busy


def _mean(loads: Collection[Load], start: float) -> float:
    """Percent, from `start` on."""
    parts = [(load.percent, load.end - max(load.start, start)) for load in loads]
    return sum(percent * seconds for percent, seconds in parts) / sum(seconds for _, seconds in parts)


@dataclass(frozen=True)
class MachineState:
    """How the machine is now."""

    on_battery: bool = False
    busy: bool = False
    """With other programs."""


def reasons_to_pause(settings: NodeSettings, when: datetime, machine: MachineState) -> dict[Cause, str]:
    """In words that follow `paused`. `when`: local time."""
    found = {}
    if settings.schedule is not None and not settings.schedule.allows(when):
        found[Cause.SCHEDULE] = f"until {settings.schedule.next_start(when)}"
    if settings.not_on_battery and machine.on_battery:
        found[Cause.BATTERY] = "on battery"
    if settings.only_when_idle and machine.busy:
        found[Cause.BUSY] = "while other programs need the machine"
    return found


class OwnersWord:
    """What the owner said last. It wins over every setting.

    A pause lasts until its time or the next word. Going on sets aside the reasons to pause that there are at that
    moment, each until it has passed: nobody has to remember to take it back.
    """

    def __init__(self) -> None:
        self._pause: str | None = None
        self._until: float | None = None
        self._set_aside: set[Cause] = set()

    def pause(self, reason: str, until: float | None = None) -> None:
        """`reason`: in words that follow `paused`; `until`: Unix time in seconds, None: the next word."""
        self._pause, self._until = reason, until
        self._set_aside.clear()

    def go_on(self, causes: Collection[Cause]) -> None:
        """`causes`: of the settings, that there are now."""
        self._pause = None
        self._set_aside = set(causes)

    def judge(self, reasons: Mapping[Cause, str], now: float) -> list[str]:
        """Why to pause now, the owner's word before the settings'. Forgets what has passed."""
        if self._until is not None and now >= self._until:
            self._pause = self._until = None
        self._set_aside &= reasons.keys()
        own = [] if self._pause is None else [self._pause]
        return own + [words for cause, words in reasons.items() if cause not in self._set_aside]

    def set_aside(self, reasons: Mapping[Cause, str]) -> list[str]:
        """The reasons to pause that the owner has set aside."""
        return [words for cause, words in reasons.items() if cause in self._set_aside]
