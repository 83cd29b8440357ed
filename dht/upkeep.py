"""How often a peer announces itself and looks around: as often as its owner wants, unless that costs too much.

What a round costs grows with the swarm, and with what the peer hosts. So its period grows with the bytes that the
peer's own calls to the DHT took since the last one. Announcements live for three periods: others forget a dead node
later in a large swarm, and no home line is filled by upkeep.
"""

import random
from collections.abc import Callable

ROUND_BYTES = 12_500
"""What a round may cost before the period grows. If it is 10 s long, that is 10 kbit/s of this peer's calls, and about
as much of others' calls to it.
"""
MOST_STRETCHED = 18
"""How many times the wanted period the longest one is."""
_LONGEST_S = 190.0
"""No announcement may live for more than 600 s."""
_LIFETIMES = 3
_WEIGHT = 0.25
"""The weight of the last period in the mean of what periods cost."""
_JITTER = 0.1
"""Part by which pauses differ, so that no two peers stay in step."""


class UpkeepPeriod:
    """The period of one peer's rounds."""

    def __init__(
        self,
        wanted_s: float,
        spent: Callable[[], float],
        rng: random.Random | None = None,
        most_stretched: float = MOST_STRETCHED,
    ) -> None:
        """`wanted_s`: the shortest. `spent`: gives the bytes of this peer's calls to the DHT, since it started."""
        self.wanted_s = wanted_s
        self._spent = spent
        self._rng = rng or random.SystemRandom()
        self._most = max(1.0, min(most_stretched, _LONGEST_S / wanted_s))
        self._mean = 0.0
        self._before = spent()

    @property
    def seconds(self) -> float:
        """The present length in seconds."""
        return self.wanted_s * min(max(1.0, self._mean / ROUND_BYTES), self._most)

    @property
    def lifetime_s(self) -> float:
        """The lifetime of what is announced now."""
        return _LIFETIMES * self.seconds

    def drawn_s(self, part: float = 1.0) -> float:
        """About this share of the period, for a pause."""
        return part * self.seconds * self._rng.uniform(1 - _JITTER, 1 + _JITTER)

    def note_round(self) -> None:
        """Notes the end of a period: its cost affects the next ones, but a single one never much, as others may have
        made it expensive.
        """
        spent = self._spent()
        cost = min(spent - self._before, self._most * ROUND_BYTES)
        self._mean += _WEIGHT * (cost - self._mean)
        self._before = spent
