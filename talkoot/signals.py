"""How commands stop: the first signal stops them in an orderly way, and later ones only speed that up."""

import asyncio
import gc
import os
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

from peer.platform.signals import Alarm, on_loop, stop_signals

T = TypeVar("T")

_GENTLE_S = 1.0
"""How long a training step may continue after the signal before it is interrupted."""


class Stopped(BaseException):
    """Somebody asked this process to stop. Not an Exception, so that error handlers let it through."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_status: int = 128 + number


def exit_at_once_on_signals() -> None:
    """Makes signals end the process from now on, for periods in which there is nothing to clean up."""
    for number in stop_signals():
        signal.signal(number, _exit_at_once)


def _exit_at_once(number: int, frame: FrameType | None) -> None:
    os._exit(128 + number)


class StopSignals:
    """Raises Stopped in the main thread on the first signal. For commands whose main thread runs no event loop."""

    def __init__(self) -> None:
        self.received: Stopped | None = None
        self._raised = False
        self._is_handled = False
        self._event: threading.Event | None = None
        self._install()
        self._alarm = Alarm(self._raise)

    def _install(self) -> None:
        for number in stop_signals():
            signal.signal(number, self._on_signal)

    @contextmanager
    def importing(self) -> Iterator[None]:
        """While inside, a signal ends the process at once. An exception could be lost: torch drops those raised while
        numpy is imported. Garbage collection skips what is imported: torch and other packages create a quarter of a
        million objects that live as long as the process.
        """
        exit_at_once_on_signals()
        gc.disable()
        try:
            yield
        finally:
            gc.enable()
            gc.freeze()
            self._install()

    @contextmanager
    def gently(self, event: threading.Event) -> Iterator[None]:
        """While inside, a signal first sets the event. It raises Stopped only if that has had no effect within a
        second.
        """
        self._event = event
        try:
            yield
        finally:
            self._event = None
            self._alarm.cancel()

    def lost_in(self, error: BaseException) -> Stopped | None:
        """The Stopped that was raised, if this error took its place: torch replaces an exception that ends some of its
        functions. An error of the clean-up took no place, because it was raised while Stopped was handled.
        """
        if not self._raised or self._is_handled:
            return None
        context: BaseException | None = error
        while context is not None and not isinstance(context, Stopped):
            context = context.__context__
        return self.received if context is None else None

    def ignore(self) -> None:
        """Ignores signals from now on, so that the process can finish stopping."""
        self._is_handled = True
        _ignore_stop_signals()
        self._alarm.cancel()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        first = self.received is None
        if self.received is None:
            self.received = Stopped(number)
        if first and self._event is not None:
            self._event.set()
            self._alarm.set(_GENTLE_S)
        else:
            self._raise()

    def _raise(self) -> None:
        if self.received is not None and not self._raised:
            self._raised = True
            raise self.received


async def run_until_stopped(work: Coroutine[Any, Any, T], hurry: Callable[[], None] = lambda: None) -> T:
    """Runs `work`. The first signal cancels it, and later ones call `hurry`. Raises Stopped once it has cleaned up.

    For commands whose main thread runs the event loop. Afterwards signals are ignored, because the process is ending.
    """
    loop = asyncio.get_running_loop()
    task = loop.create_task(work)
    received: list[int] = []

    def stop(number: int) -> None:
        received.append(number)
        if len(received) == 1:
            task.cancel()
        else:
            hurry()

    with on_loop(loop, stop_signals(), stop):
        try:
            return await task
        except asyncio.CancelledError:
            if received:
                raise Stopped(received[0]) from None
            raise


def _ignore_stop_signals() -> None:
    for number in stop_signals():
        signal.signal(number, signal.SIG_IGN)
