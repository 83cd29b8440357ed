"""What the machine says about itself: its name, clocks, battery, load and free memory."""

import ctypes
import platform
import sys
import time
from dataclasses import dataclass

import psutil

from peer.errors import UserError
from peer.formatting import bytes_in_words

_TIMEX_BYTES = 256
"""More than the size of `struct timex` on any architecture."""
_TIME_ERROR = 5
_TESTED = ("Linux", "x86_64")
_TO_SET_THE_CLOCK = {
    "linux": "`timedatectl set-ntp true`",
    "darwin": "turn on System Settings > General > Date & Time > Set time and date automatically",
    "win32": "turn on Settings > Time & language > Date & time > Set time automatically",
}


@dataclass(frozen=True, slots=True)
class ProcessorTimes:
    """Seconds since the machine started, summed over all cores."""

    total: float
    busy: float


def system() -> str:
    """The operating system and the kind of processor, such as `Linux x86_64`."""
    return f"{platform.system()} {platform.machine()}"


def why_experimental() -> str:
    """What a user should know about Talkoot on this operating system; empty if it is tested."""
    name, machine = platform.system(), platform.machine()
    if (name, machine) == _TESTED:
        return ""
    if name == _TESTED[0]:
        return (
            f"Talkoot on {machine} is experimental: it is tested on emulated machines; tell us how it works"
        )
    name = {"Darwin": "macOS"}.get(name, name)
    return f"Talkoot on {name} is experimental: nobody has run it there yet; tell us how it works"


def seconds_since_boot() -> float:
    """A steady clock that also counts while the machine sleeps."""
    if sys.platform == "linux":
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    if sys.platform == "darwin":
        return time.clock_gettime(time.CLOCK_MONOTONIC_RAW)
    return time.monotonic()


def clock_is_synchronised() -> bool | None:
    """Whether the clock is synchronised, according to Linux's kernel (adjtimex(2)); None if that is not known."""
    if sys.platform != "linux":
        return None
    kept = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(_TIMEX_BYTES))
    return None if kept < 0 else kept != _TIME_ERROR


def how_to_set_the_clock() -> str:
    return _TO_SET_THE_CLOCK[sys.platform]


def processor_times() -> ProcessorTimes:
    times = psutil.cpu_times()
    if sys.platform == "linux":
        total = sum(times) - times.guest - times.guest_nice  # these two are also counted in user and nice
        return ProcessorTimes(total, total - times.idle - times.iowait)
    if sys.platform == "win32":
        total = times.user + times.system + times.idle  # interrupts are also counted in system
    else:
        total = sum(times)
    return ProcessorTimes(total, total - times.idle)


def load() -> float:
    """The number of busy cores, averaged over the last minute. On Windows it is 0 at first: psutil counts from the
    first call.
    """
    return psutil.getloadavg()[0]


def on_battery() -> bool:
    """A machine that does not report a battery counts as plugged in."""
    try:
        battery = psutil.sensors_battery()
    except OSError:
        return False
    return battery is not None and battery.power_plugged is False


def require_free_memory(size: int, needed_by: str, refusal: type[UserError]) -> None:
    """Raises `refusal` unless this many bytes of memory are free. `needed_by`: what takes them, such as `the model`."""
    free = psutil.virtual_memory().available
    if size > free:
        raise refusal(
            f"{needed_by} takes {bytes_in_words(size)}, but only {bytes_in_words(free)} of memory are free: end other "
            "programs, or use a machine with more"
        )
