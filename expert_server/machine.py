"""What a node sees of the machine it runs on."""

import contextlib
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass

import psutil

from expert_server.manners import Load, MachineState, OtherUse
from expert_server.settings import NodeSettings

_CPU_BATCH_ROWS, _GPU_BATCH_ROWS = 128, 2048


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def batch_rows_of(settings: NodeSettings, device_types: Iterable[str]) -> int:
    """Up to how many rows works are merged: from where on a device gains little by more.

    No further: a forward pass that is merged keeps no graph, and steps that are answered together come again together,
    with nothing to compute in between.
    """
    return settings.max_batch_rows or (_CPU_BATCH_ROWS if set(device_types) == {"cpu"} else _GPU_BATCH_ROWS)


def threads_of(settings: NodeSettings) -> int:
    """Of torch; more than one for each core only wait for each other."""
    return min(settings.threads or usable_cores(), usable_cores())


@dataclass(frozen=True, slots=True)
class _Times:
    """Clocks of the processor, all in seconds."""

    at: float
    total: float
    """Of all cores."""
    busy: float
    own: float
    """Of this process and its children."""


class Machine:
    """Looks at the machine now and then. A look takes some milliseconds, and belongs on no event loop."""

    def __init__(self, settings: NodeSettings) -> None:
        self._settings = settings
        self._use = OtherUse(settings)
        self._process = psutil.Process()
        self._last = self._times()

    def look(self) -> MachineState:
        return MachineState(
            on_battery=self._settings.not_on_battery and _on_battery(),
            busy=self._settings.only_when_idle and self._use.note(self._load()),
        )

    def _load(self) -> Load:
        before, self._last = self._last, self._times()
        total = self._last.total - before.total
        others = (self._last.busy - before.busy) - (self._last.own - before.own)
        percent = 100 * min(1.0, max(0.0, others) / total) if total > 0 else 0.0
        return Load(before.at, self._last.at, percent)

    def _times(self) -> _Times:
        machine = psutil.cpu_times()
        total = sum(machine) - machine.guest - machine.guest_nice  # Linux counts guests as user, too
        own = 0.0
        for process in (self._process, *self._process.children(recursive=True)):
            with contextlib.suppress(psutil.Error):  # it has ended
                used = process.cpu_times()
                own += used.user + used.system
        return _Times(time.monotonic(), total, total - machine.idle - machine.iowait, own)


def _on_battery() -> bool:
    """A machine that does not tell is plugged in."""
    try:
        battery = psutil.sensors_battery()
    except OSError:
        return False
    return battery is not None and battery.power_plugged is False
