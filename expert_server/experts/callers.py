"""How much one caller may move an expert: its share of the optimizer steps, and the size of its gradients. Pure.

A step is as long however few rows it is of, and with Adam however small the gradient. So whoever sent many tiny batches
would cause most of the steps, and whoever sent large gradients would drown those of others in a common step.
"""

import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import NamedTuple

WINDOW_STEPS = 256
"""The last steps of an expert, in which shares are counted, unless they took longer than `LONGEST_S`."""
LONGEST_S = 120.0
"""A step no longer counts after it. Else the rows of a caller that has left would hold all others back for good."""
MOST_OF_ROWS = 2.0
"""The part of the steps that a caller may cause, as a multiple of its part of the rows."""
MOST_SIZE = 4.0
"""How large a caller's gradients may be, as a multiple of the median of all callers'."""
_RECENT_CALLS = 8
"""Those of a caller from which its usual size is taken."""
_MOST_ENTRIES = 4096
"""Numbers kept for the steps of one window. If many callers share each step, the window is of fewer steps."""
_NOTHING = 1e-9
"""Of a step: less is what rounding leaves."""


class _Step(NamedTuple):
    at: float
    rows: Mapping[str, int]
    """Those that each caller has sent since the step before."""
    parts: Mapping[str, float]
    """The part of the step that each caller caused: its part of the rows whose gradients were in it."""


class Callers:
    """What the callers of one expert did in its last steps, and what they may do next. Bounded.

    Take any window that ends with a step that a caller takes part in. It has caused at most `MOST_OF_ROWS` times its
    part of the rows in that window, or the nth part of the steps if n callers sent rows, and one step more. For it may
    take part in a step only if what it caused before is within its share (`is_over`). A caller alone, or with half of
    the rows, is never over. Nor are all callers for long: in the end those who still call sent all the rows, and then
    their shares come to twice the steps.
    """

    def __init__(self, window_steps: int = WINDOW_STEPS, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._most_steps = window_steps - 1
        """The next step belongs to the window, too."""
        self._steps: deque[_Step] = deque()
        self._entries = 0
        self._rows_since: dict[str, int] = {}
        """Since the last step."""
        self._rows: dict[str, int] = {}
        """In the window; of no caller without any."""
        self._all_rows = 0
        self._caused: dict[str, float] = {}
        """Steps in the window."""
        self._sizes: dict[str, deque[float]] = {}
        """Of each caller's last calls. Callers with no rows in the window are forgotten."""
        self._usual_sizes: dict[str, float] = {}
        """The median of these, of each caller."""

    def note_rows(self, caller: str, rows: int, size: float) -> float:
        """Notes a part of a backward batch before its step. `size`: root mean square of its gradients.

        Returns the factor, at most 1, that brings this size to `MOST_SIZE` times the usual one: the median over all
        callers of the median of their last calls. A minority of the callers can't move it beyond the sizes of the
        others, and of two callers the one with small gradients can't shrink the other's. A caller alone has nobody to
        drown.
        """
        while self._steps and self._steps[0].at < self._clock() - LONGEST_S:
            self._forget_first()
        if len(self._rows_since) >= _MOST_ENTRIES:
            self.note_step({})  # so many keys sent gradients, and none that a step could be made of
        self._rows_since[caller] = self._rows_since.get(caller, 0) + rows
        self._rows[caller] = self._rows.get(caller, 0) + rows
        self._all_rows += rows
        if not size > 0:  # nor is NaN
            return 1.0
        sizes = self._sizes.setdefault(caller, deque(maxlen=_RECENT_CALLS))
        sizes.append(size)
        self._usual_sizes[caller] = sorted(sizes)[(len(sizes) - 1) // 2]
        if len(self._sizes) == 1:
            return 1.0
        usual = sorted(self._usual_sizes.values())[len(self._usual_sizes) // 2]
        return min(1.0, MOST_SIZE * usual / size)

    def is_over(self, caller: str) -> bool:
        """Whether it has caused more than its share of the steps in the window."""
        if caller not in self._rows:
            return False
        share = max(MOST_OF_ROWS * self._rows[caller] / self._all_rows, 1 / len(self._rows))
        return self._caused.get(caller, 0.0) > share * len(self._steps)

    def note_step(self, rows: Mapping[str, int]) -> None:
        """Notes a step with the gradients of so many rows of each caller."""
        total = sum(rows.values())
        step = _Step(
            self._clock(), self._rows_since, {caller: own / total for caller, own in rows.items() if own}
        )
        self._rows_since = {}
        for caller, part in step.parts.items():
            self._caused[caller] = self._caused.get(caller, 0.0) + part
        self._steps.append(step)
        self._entries += len(step.rows) + len(step.parts)
        while len(self._steps) > self._most_steps or (self._entries > _MOST_ENTRIES and len(self._steps) > 1):
            self._forget_first()

    def _forget_first(self) -> None:
        step = self._steps.popleft()
        self._entries -= len(step.rows) + len(step.parts)
        for caller, rows in step.rows.items():
            self._all_rows -= rows
            self._rows[caller] -= rows
            if not self._rows[caller]:
                del self._rows[caller]
                self._sizes.pop(caller, None)
                self._usual_sizes.pop(caller, None)
        for caller, part in step.parts.items():
            left = self._caused.pop(caller, 0.0) - part
            if left > _NOTHING:
                self._caused[caller] = left
