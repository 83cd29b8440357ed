"""What trainers report about the updates of one expert. From that, its host sees whether it was left behind: whether
they call the other replicas far more often, for example because this host is slow. Pure.

Other hosts could claim any number of updates of their own, so they are not asked.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass

_LEFT_BEHIND = 0.25
"""A replica is left behind if it gets less than this share of the updates that each of the others gets on average."""
_LEAST_ELSEWHERE = 32
"""Fewer updates elsewhere prove nothing: a trainer that chooses one of two replicas at random may choose the same one
several times in a row.
"""
_MOST_TRAINERS = 256
_LONGEST_S = 600.0
"""A trainer that has not reported for this long does not count. Otherwise those that have left would be a majority."""


@dataclass
class _Trainer:
    group: str
    total: int
    """All its updates of the expert, according to its last report."""
    heard_at: float
    here: float = 0.0
    """Its recent updates at this host."""
    elsewhere: float = 0.0
    """Its recent updates at other hosts."""


class UpdateReports:
    """The recent reports about one expert. Bounded."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._trainers: dict[str, _Trainer] = {}
        """Those that reported longest ago come first."""

    def note(self, trainer: str, group: str, total: int) -> None:
        """Records a report, which comes with each call that leads to an update here. `total`: how many updates of the
        expert the trainer has got so far, from all hosts. `group`: see `Session.group`.
        """
        known = self._trainers.pop(trainer, None)
        if known is None:
            known = _Trainer(group, total, 0.0)
        else:
            known.here += 1  # the previous call
            known.elsewhere += max(0, total - known.total - 1)  # a trainer that restarts counts from 0 again
        known.total, known.heard_at = total, self._clock()
        self._trainers[trainer] = known
        if len(self._trainers) > _MOST_TRAINERS:
            # keys cost nothing, so the largest group forgets one of its own
            ((crowd, _),) = Counter(each.group for each in self._trainers.values()).most_common(1)
            del self._trainers[next(name for name, each in self._trainers.items() if each.group == crowd)]

    def note_averaged(self) -> None:
        """Call it when the replica was averaged: earlier updates count half."""
        for trainer in self._trainers.values():
            trainer.here, trainer.elsewhere = trainer.here / 2, trainer.elsewhere / 2

    def start_over(self) -> None:
        """Call it when the replica has taken over another one's state."""
        for trainer in self._trainers.values():
            trainer.here = trainer.elsewhere = 0.0

    def is_left_behind(self, others: int = 1) -> bool:
        """Whether trainers got far more updates from each of the `others` than from this host: both most groups of
        trainers, so that a minority can't make it seem so, and all together, because each may prefer another host.
        """
        since = self._clock() - _LONGEST_S
        here, elsewhere = defaultdict[str, float](float), defaultdict[str, float](float)
        for trainer in (each for each in self._trainers.values() if each.heard_at >= since):
            here[trainer.group] += trainer.here
            elsewhere[trainer.group] += trainer.elsewhere
        neglecting = sum(here[group] * others < _LEFT_BEHIND * elsewhere[group] for group in here)
        return (
            neglecting > len(here) / 2
            and sum(elsewhere.values()) >= _LEAST_ELSEWHERE
            and sum(here.values()) * others < _LEFT_BEHIND * sum(elsewhere.values())
        )
