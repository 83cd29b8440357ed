"""How long to wait for experts: deadlines that follow from how long calls took lately. Pure: reads no clock."""

from collections import deque
from dataclasses import dataclass

LEAST_KNOWN = 32
"""With fewer calls than that nothing is said about how long they take."""

_WINDOW = 256
_USUAL, _SLOW = 0.9, 0.95
_DEADLINE_FACTOR = 4.0
_LEAST_HEDGE_S = 0.05
"""Quicker answers are not worth a second call."""


class CallTimes:
    """How long the last 256 calls in one direction took, in seconds."""

    def __init__(self) -> None:
        self._last: deque[float] = deque(maxlen=_WINDOW)

    def add(self, seconds: float) -> None:
        self._last.append(seconds)

    def add_unfinished(self, seconds: float) -> None:
        """Of a call that was given up after so long. It counts as at least as slow as most, so that a deadline that
        is too short for many calls gets longer.
        """
        self.add(max(seconds, self.quantile(_USUAL) or 0.0))

    def quantile(self, part: float) -> float | None:
        """What `part` of the calls did not exceed; None while too few are known."""
        if len(self._last) < LEAST_KNOWN:
            return None
        return sorted(self._last)[min(int(part * len(self._last)), len(self._last) - 1)]


@dataclass(frozen=True)
class WaitPolicy:
    """How long to wait for experts. Times in seconds."""

    call_deadline_s: float
    """No call lasts longer."""
    grace_s: float
    """How long to wait for the rest once every row has `k_min` answers."""
    k_min: int
    """A row with fewer answers has its experts chosen again."""
    least_deadline_s: float = 3.0
    """The deadline becomes no shorter than that."""
    most_hedged: float = 0.1
    """Calls sent to a second replica, as a part of all calls, at most."""

    def deadline_s(self, call_times: CallTimes) -> float:
        """Of the next call: four times what nine in ten took lately, between the bounds."""
        usual = call_times.quantile(_USUAL)
        if usual is None:
            return self.call_deadline_s
        return min(self.call_deadline_s, max(self.least_deadline_s, _DEADLINE_FACTOR * usual))

    def hedge_after_s(self, call_times: CallTimes) -> float:
        """When a forward call is slow enough to ask another replica too: when 19 in 20 would have answered, and at
        the latest after a third of the deadline.

        "The Tail at Scale" (Dean and Barroso, 2013) asks after the 95th percentile.
        """
        latest = self.deadline_s(call_times) / 3
        slow = call_times.quantile(_SLOW)
        return latest if slow is None else min(max(slow, _LEAST_HEDGE_S), latest)

    def may_hedge(self, hedged: int, calls: int) -> bool:
        """Whether one call more of `calls` may be sent twice, after `hedged`."""
        return hedged < self.most_hedged * calls
