"""How long commands show their progress."""

import time
from collections.abc import Callable
from typing import TypeAlias

from peer.formatting import age_in_words

Show: TypeAlias = Callable[[str, str], None]
"""Called with what is being done, and how much of it is done."""
_SHOWN_EVERY_S, _LOGGED_EVERY_S = 0.2, 5.0


class Progress:
    """Shows progress, no more often than somebody can read it."""

    def __init__(self, stage: Callable[[str], None], is_live: bool, what: str = "") -> None:
        """`is_live`: the terminal shows a single line, which is replaced. `what`: what it shows already."""
        self._stage, self._every_s = stage, _SHOWN_EVERY_S if is_live else _LOGGED_EVERY_S
        self._what, self._at = what, 0.0

    def show(self, what: str, detail: str) -> None:
        now = time.monotonic()
        if what != self._what:
            self._what, self._at = what, now
            self._stage(what)
        elif now >= self._at + self._every_s:
            self._at = now
            self._stage(f"{what}: {detail}")


class Rate:
    """Reports how much of something is done, and how fast."""

    def __init__(self, show: Show, what: str, total: int | None, noun: str = "passages") -> None:
        self._show, self._what, self._total, self._noun = show, what, total, noun
        self._began = time.monotonic()

    def at(self, done: int, more: str = "", total: int | None = None) -> None:
        total = total or self._total
        rate = done / max(time.monotonic() - self._began, 1e-3)
        share = f"{done:,}" if total is None else f"{done:,} of {total:,}"
        left = "" if total is None or not done else f", {age_in_words((total - done) / rate)} left"
        self._show(self._what, f"{share} {self._noun}, {rate:,.0f} a second{more}{left}")

    def step(self, step: int, steps: int, loss: float) -> None:
        """Shows a step of training."""
        self.at(step, f", loss {loss:.2f}", steps)
