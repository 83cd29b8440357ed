"""The signals that ask a process to stop, also from inside, and an alarm."""

import _thread
import asyncio
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType

if sys.platform == "win32":
    _CLOSED, _ALARM = signal.SIGBREAK, signal.SIGABRT
else:
    _CLOSED, _ALARM = signal.SIGHUP, signal.SIGALRM
"""The signals of a closed terminal and of an alarm. On Windows, nobody sends the former, and a process that aborts ends
in any case.
"""


def stop_signals() -> list[signal.Signals]:
    """The signals that end a command: Ctrl-C, a request to end, and a closed terminal unless that is ignored."""
    always = [signal.SIGINT, signal.SIGTERM]
    return always if signal.getsignal(_CLOSED) is signal.SIG_IGN else [*always, _CLOSED]


def ask_to_stop() -> None:
    """Asks this process to stop, from any thread, like somebody who ends it. Its main thread handles the signal."""
    if sys.platform == "win32":
        _thread.interrupt_main(signal.SIGTERM)
    else:
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, signal.SIGTERM)


@contextmanager
def on_loop(
    loop: asyncio.AbstractEventLoop, numbers: Iterable[signal.Signals], handle: Callable[[int], None]
) -> Iterator[None]:
    """Handles these signals on the main thread's loop while inside. Afterwards they are ignored."""
    numbers = list(numbers)
    for number in numbers:
        if sys.platform == "win32":
            signal.signal(number, lambda number, _: loop.call_soon_threadsafe(handle, number))
        else:
            loop.add_signal_handler(number, handle, number)
    try:
        yield
    finally:
        if sys.platform != "win32":
            signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
            for number in numbers:
                loop.remove_signal_handler(number)
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)
        if sys.platform != "win32":
            signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)


class Alarm:
    """Calls back on the main thread after a while, between two bytecodes of whatever runs there. One for each
    process.
    """

    def __init__(self, ring: Callable[[], None]) -> None:
        self._ring = ring
        self._timer: threading.Timer | None = None
        signal.signal(_ALARM, self._on_signal)

    def set(self, seconds: float) -> None:
        if sys.platform != "win32":
            signal.setitimer(signal.ITIMER_REAL, seconds)
            return
        self.cancel()
        self._timer = threading.Timer(seconds, _thread.interrupt_main, [_ALARM])
        self._timer.daemon = True
        self._timer.start()

    def cancel(self) -> None:
        """Cancelling twice is harmless."""
        if sys.platform != "win32":
            signal.setitimer(signal.ITIMER_REAL, 0)
        elif self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if sys.platform != "win32" or self._timer is not None:
            self._ring()
