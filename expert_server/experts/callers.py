"""How much one caller may move an expert: its share of the optimizer steps, and the size and the direction of its
gradients. Pure. With Adam, a step is equally long however few rows it has and however small its gradient is. So a
caller with many tiny batches would cause most of the steps. In a common step, a caller with large gradients would
outweigh all others. And one with gradients of the wrong sign would undo what others have learnt.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf, isfinite, sqrt
from operator import itemgetter
from statistics import median_high
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

WINDOW_STEPS = 256
"""The window: shares are counted over the last steps of an expert, at most this many and at most `LONGEST_S` old."""
LONGEST_S = 120.0
"""After this time, a step no longer counts. Otherwise the rows of a caller that has left would limit all others for
good.
"""
MOST_OF_ROWS = 2.0
"""The share of the steps that a caller may cause, as a multiple of its share of the rows."""
MOST_SIZE = 4.0
"""How large a caller's gradients may be, as a multiple of the median of all callers'."""
MOST_PULL = 2.0
"""How much one group's gradients count in the sum of all, as a multiple of the median."""
_RECENT_CALLS = 8
"""How many calls of a caller determine its usual size."""
_MOST_DIRECTIONS = 64
"""How many callers' directions are kept. When there are more, the group with the most loses one."""
_MOST_ENTRIES = 4096
"""The most numbers that are stored for a window. If many callers share each step, the window has fewer steps."""
_NOTHING = 1e-9
"""Shares of a step or a group below this are only rounding errors."""
_SIZES_IN_A_SORT = 16
"""Once one in this many of all sizes has changed, the median is computed again; with fewer sizes, each time."""


class _Step(NamedTuple):
    at: float
    rows: Mapping[str, int]
    """The rows that each caller has sent since the previous step."""
    parts: Mapping[str, float]
    """The share of the step that each caller caused: its share of the rows whose gradients were in it."""
    group_parts: Mapping[str, float]
    """The share of the step that each group of callers caused."""


class _Pull(NamedTuple):
    """The direction in which a caller's rows in the window move the expert."""

    direction: NDArray[np.float64]
    """Roughly the sum of the rows' directions."""
    weight: float
    """The sum of the sizes of their gradients."""


@dataclass
class _Group:
    """Callers that may be one person."""

    name: str
    members: int = 0
    """Members with rows in the window."""
    rows: int = 0
    """Rows in the window."""


class Callers:
    """What the callers of one expert did in its last steps, and what they may do next. Bounded. A group of callers may
    take part in a step only if the steps that it caused in the window are within its limit. The limit is `MOST_OF_ROWS`
    times its share of the rows, or an equal share of the steps among the groups that sent rows, whichever is larger. So
    in any window, a group causes at most one step more than its limit. The same holds for each caller within its group.
    A caller alone, or with half of the rows, is never over its limit. Nor can all callers be over theirs for long,
    because their limits add up to twice the steps.

    A caller is also held back while its gradients point against those of most other groups, and against the sum of all.
    If liars are a minority of the groups, they can't silence a caller that no honest group opposes. Honest callers with
    other inputs pass, because unrelated gradients agree about as often as they oppose each other. Callers that are held
    back have no vote, so never all of them are. Keys cost nothing, so callers are judged in groups: those with the same
    token, or in the same neighbourhood.
    """

    def __init__(self, window_steps: int = WINDOW_STEPS, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._most_steps = window_steps - 1
        """One less than the window has, because the next step belongs to it too."""
        self._steps: deque[_Step] = deque()
        self._entries = 0
        self._rows_since: dict[str, int] = {}
        """Each caller's rows since the last step."""
        self._rows: dict[str, int] = {}
        """Each caller's rows in the window. Callers without rows are dropped."""
        self._all_rows = 0
        self._caused: dict[str, float] = {}
        """How many steps in the window each caller caused."""
        self._caused_by_group: dict[str, float] = {}
        self._sizes: dict[str, deque[float]] = {}
        """The sizes of each caller's last calls. Callers with no rows in the window are forgotten."""
        self._usual_sizes: dict[str, float] = {}
        """For each caller, the median of its sizes."""
        self._usual_size = inf
        """The median of the usual sizes, in which each group counts once."""
        self._sizes_since = 0
        """How many sizes were recorded since that median was computed."""
        self._pulls: dict[str, _Pull] = {}
        self._contrary: set[str] = set()
        """Callers held back for their directions."""
        self._groups: dict[str, _Group] = {}
        """Groups with rows in the window, by name."""
        self._group_of: dict[str, _Group] = {}
        """The group of each caller with rows in the window."""

    def note_rows(self, caller: str, group: str, rows: int, size: float) -> float:
        """Records a part of a backward batch before its step. `size`: the root mean square of its gradients. `group`:
        see `Session.group`.

        Returns a factor of at most 1 that scales this size down to `MOST_SIZE` times the usual one. A caller's usual
        size is the median of its last calls. The usual size is the median over callers, in which each group counts
        once, so a minority of the groups can't move it beyond the sizes of the others. The gradients of a caller alone
        are not scaled.
        """
        while self._steps and self._steps[0].at < self._clock() - LONGEST_S:
            self._forget_first()
        if len(self._rows_since) >= _MOST_ENTRIES:
            self.note_step({})  # many keys have sent gradients, and no step could be made of any
        self._rows_since[caller] = self._rows_since.get(caller, 0) + rows
        if caller not in self._rows:
            self._group_of[caller] = self._groups.setdefault(group, _Group(group))
            self._group_of[caller].members += 1
        self._group_of[caller].rows += rows
        self._rows[caller] = self._rows.get(caller, 0) + rows
        self._all_rows += rows
        if not size > 0:  # also true for NaN
            return 1.0
        sizes = self._sizes.setdefault(caller, deque(maxlen=_RECENT_CALLS))
        sizes.append(size)
        self._usual_sizes[caller] = sorted(sizes)[(len(sizes) - 1) // 2]
        if len(self._sizes) == 1:
            return 1.0
        self._sizes_since += 1
        if self._sizes_since > len(self._sizes) // _SIZES_IN_A_SORT:
            self._usual_size, self._sizes_since = self._take_usual_size(), 0
        return min(1.0, MOST_SIZE * self._usual_size / size)

    @property
    def compares_directions(self) -> bool:
        """Whether there are enough callers that one could be held back for its direction."""
        return len(self._rows) >= 3

    def note_direction(self, caller: str, rows: int, direction: NDArray[np.float64]) -> None:
        """Records which way these rows would move the expert (`direction_of`), after `note_rows`.

        A direction that is not finite is ignored. Only gradients that are not finite have one, and no step follows from
        those. Earlier gradients count as if they had at most `MOST_SIZE` times the present usual size, because they may
        be from a time when nobody else called, and nothing limited them.
        """
        if not isfinite(direction @ direction):
            return
        most = MOST_SIZE * self._usual_size
        weight = rows * min(most, self._sizes[caller][-1]) if caller in self._sizes else 0.0
        if (before := self._pulls.pop(caller, None)) is not None:
            earlier_rows = self._rows[caller] - rows
            left = earlier_rows / self._rows[caller]
            if earlier_rows and left * before.weight > most * earlier_rows:
                left = most * earlier_rows / before.weight
            direction = direction + left * before.direction
            weight += left * before.weight
        elif len(self._pulls) == _MOST_DIRECTIONS:
            names = Counter(self._group_of[name].name for name in self._pulls)
            ((crowd, _),) = names.most_common(1)
            del self._pulls[next(n for n in self._pulls if self._group_of[n].name == crowd)]
        self._pulls[caller] = _Pull(direction, weight)
        self._contrary.discard(caller)
        if self._opposes_most(caller):
            self._contrary.add(caller)

    def is_held_back(self, caller: str) -> bool:
        """Whether the caller has caused more than its share of the steps in the window, or opposes the others."""
        if caller not in self._rows:
            return False
        # found contrary while there were others, who have left since: no direction has been noted that could clear it
        if caller in self._contrary and self.compares_directions:
            return True
        group = self._group_of[caller]
        even = 1 / len(self._groups)
        most = max(MOST_OF_ROWS * self._rows[caller] / self._all_rows, even / group.members)
        most_of_group = max(MOST_OF_ROWS * group.rows / self._all_rows, even)
        steps, of_group = len(self._steps), self._caused_by_group.get(group.name, 0.0)
        return self._caused.get(caller, 0.0) > most * steps or of_group > most_of_group * steps + _NOTHING

    def note_step(self, rows: Mapping[str, int]) -> None:
        """Records a step. `rows`: each caller's number of rows with gradients in it."""
        total = sum(rows.values())
        parts = {caller: own / total for caller, own in rows.items() if own}
        group_parts: dict[str, float] = {}
        for caller, part in parts.items():
            group = self._group_of[caller].name if caller in self._group_of else caller
            _add(group_parts, group, part)
            _add(self._caused, caller, part)
            _add(self._caused_by_group, group, part)
        step = _Step(self._clock(), self._rows_since, parts, group_parts)
        self._rows_since = {}
        self._steps.append(step)
        self._entries += len(step.rows) + len(step.parts)
        while len(self._steps) > self._most_steps or (self._entries > _MOST_ENTRIES and len(self._steps) > 1):
            self._forget_first()

    def _opposes_most(self, caller: str) -> bool:
        groups = {name: self._group_of[name].name for name in self._pulls}
        if len(set(groups.values())) == 1:  # they share a line, as in a school
            groups = {name: name for name in groups}
        own = self._pulls[caller].direction
        products: dict[str, float] = {}
        votes: dict[str, float] = {}
        for name, (direction, _) in self._pulls.items():
            group, product = groups[name], float(direction @ own)
            products[group] = products.get(group, 0.0) + product
            if name not in self._contrary:
                votes[group] = votes.get(group, 0.0) + product
        del votes[groups[caller]]
        others = len(products) - 1
        if others < 2 or sum(vote < 0 for vote in votes.values()) <= others / 2:
            return False
        pulls: dict[str, NDArray[np.float64]] = {}
        for name, (direction, _) in self._pulls.items():
            pulls[groups[name]] = pulls.get(groups[name], 0.0) + direction
        sizes = {group: sqrt(pull @ pull) for group, pull in pulls.items()}
        most = MOST_PULL * median_high(sizes.values())
        # at the end of training, those of honest callers come to nothing
        return sum(min(1.0, most / size) * products[group] for group, size in sizes.items() if size) < 0

    def _take_usual_size(self) -> float:
        """Takes the upper median."""
        counts = Counter(self._group_of[caller].name for caller in self._usual_sizes)
        half = len(counts) / 2 + _NOTHING
        for caller, size in sorted(self._usual_sizes.items(), key=itemgetter(1)):
            half -= 1 / counts[self._group_of[caller].name]
            if half < 0:
                return size
        return inf

    def _forget_first(self) -> None:
        step = self._steps.popleft()
        self._entries -= len(step.rows) + len(step.parts)
        for caller, part in step.parts.items():
            _add(self._caused, caller, -part)
        for group, part in step.group_parts.items():
            _add(self._caused_by_group, group, -part)
        for caller, rows in step.rows.items():
            self._all_rows -= rows
            self._rows[caller] -= rows
            its = self._group_of[caller]
            its.rows -= rows
            if not self._rows[caller]:
                del self._rows[caller], self._group_of[caller]
                its.members -= 1
                if not its.members:
                    del self._groups[its.name]
                self._sizes.pop(caller, None)
                self._usual_sizes.pop(caller, None)
                self._pulls.pop(caller, None)
                self._contrary.discard(caller)


def _add(steps: dict[str, float], name: str, part: float) -> None:
    """Adds to the named entry, and drops it if nothing is left."""
    left = steps.pop(name, 0.0) + part
    if left > _NOTHING:
        steps[name] = left
