"""How often a peer announces itself and looks around: as often as its owner wants, unless that costs too much.

The cost of a round grows with the swarm, and with what the peer hosts. So the period grows with the bytes of the peer's
own DHT calls since the last round. Announcements live until the next one is due, and a while longer. So in a large
swarm a dead node is noticed later, but upkeep does not fill a home line.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable

ROUND_BYTES = 9_000
"""What a round may cost before the period grows. With a period of 10 s, that is 7.2 kbit/s of this peer's calls, and
about as much of others' calls to it.
"""
MOST_STRETCHED = 18
"""The longest period, as a multiple of the wanted one."""
_LONGEST_S = 190.0
"""The longest period."""
_LATE_S = 60.0
"""How late the next announcement may come before others take the peer for dead."""
_LIVES = 3
"""The longest lifetime of announcements in periods. If periods are short, two announcements in a row may get lost."""
_WEIGHT = 0.25
"""The weight of the last period in the running mean of costs."""
_LEAST_PAUSE = 0.25
"""The shortest pause after a slow round, as a share of the period."""
_JITTER = 0.1
"""The share by which pauses vary, so that no two peers stay in step."""


def lifetime_s(period_s: float) -> float:
    """The lifetime of announcements: until the next one, which may be late."""
    return min(_LIVES * period_s, (1 + _JITTER) * period_s + _LATE_S)


LONGEST_LIFETIME_S: float = lifetime_s(_LONGEST_S)
"""The longest lifetime of announcements, with any period."""


class UpkeepPeriod:
    """The period of a peer's rounds of one kind."""

    def __init__(
        self,
        wanted_s: float,
        spent: Callable[[], float],
        rng: random.Random | None = None,
        most_stretched: float = MOST_STRETCHED,
    ) -> None:
        """`wanted_s`: the shortest period. `spent`: returns the bytes of this peer's calls to the DHT for these
        rounds since it started.
        """
        self.wanted_s = wanted_s
        self._spent = spent
        self._rng = rng or random.SystemRandom()
        self._most = max(1.0, min(most_stretched, _LONGEST_S / wanted_s))
        self._mean = 0.0
        self._before = spent()

    @property
    def seconds(self) -> float:
        """The current length in seconds."""
        return self.wanted_s * min(max(1.0, self._mean / ROUND_BYTES), self._most)

    @property
    def lifetime_s(self) -> float:
        """The lifetime of what is announced now."""
        return lifetime_s(self.seconds)

    def drawn_s(self, part: float = 1.0) -> float:
        """A pause of about this share of the period, drawn at random."""
        return part * self.seconds * self._rng.uniform(1 - _JITTER, 1 + _JITTER)

    def rest_s(self, took_s: float) -> float:
        """The pause after a round that took so long: rounds begin once in a period, unless they are slow."""
        return max(self.drawn_s() - took_s, self.drawn_s(_LEAST_PAUSE))

    async def repeat(self, work: Callable[[], Awaitable[None]]) -> None:
        """Does this work once in each period, first after a pause, until cancelled."""
        loop_time, took_s = asyncio.get_running_loop().time, 0.0
        self.begin()
        while True:
            await asyncio.sleep(self.rest_s(took_s))
            began = loop_time()
            self.note_round()
            await work()
            took_s = loop_time() - began

    def begin(self) -> None:
        """Leaves out what has been spent so far. Joining costs as much as many rounds, but happens once."""
        self._before = self._spent()

    def note_round(self) -> None:
        """Records the end of a period. Its cost affects the following periods, but only a little, because others may
        have made it expensive.
        """
        spent = self._spent()
        cost = min(spent - self._before, self._most * ROUND_BYTES)
        self._mean += _WEIGHT * (cost - self._mean)
        self._before = spent
