"""The time by which records expire. It does not jump when somebody sets this machine's clock.

All peers of a swarm compare expiry times with their own clocks. If a clock were set wrong by an hour, even for a
moment, everything stored would expire, or last an hour longer. So a process keeps its old time at first. It adopts the
new setting when most of the peers it asked agree with it, or after a while if it could ask nobody. Other peers only
decide between the machine's old setting and its new one, so liars can't impose another time.

A clock may also be wrong from the start. If it is fast, records of peers that are alive look expired. So a peer whose
clock is ahead of most others' lets records expire that much later, by at most ten minutes (`earliest`). It changes
nothing else. So if most of the peers that it asked lie, all they achieve is that it notices later that others are gone.
"""

import logging
import time
from collections.abc import Callable

from peer.bounded import BoundedDict
from peer.formatting import age_in_words
from peer.platform.machine import seconds_since_boot

logger: logging.Logger = logging.getLogger(__name__)

CLOCK_TOLERANCE_S = 3.0
"""How far the clocks of two peers may differ. Beyond that, records are refused, or expire too early for some peers."""
MOST_AHEAD_S = 600.0
"""How far ahead a clock may be and still be allowed for: as long as announcements live at most. Others refuse what a
peer announces whose clock is further ahead.
"""
_STEP_S = 1.0
"""A clock that jumps by more than this was set by somebody, not just corrected."""
_ALONE_S = 600.0
"""How long a peer that can ask nobody keeps its old time."""
_REMEMBERED = 64


class SwarmClock:
    """One machine's clock, and what other peers' clocks said. The clocks it reads are arguments."""

    def __init__(self, wall: Callable[[], float], steady: Callable[[], float]) -> None:
        """`wall`: Unix time, which may be set at any moment. `steady`: a clock in seconds that nobody can set, with any
        origin.
        """
        self._wall = wall
        self._steady = steady
        self._offset = wall() - steady()
        """Seconds from the steady clock to the time in use. Other peers' offsets are relative to the steady clock, too.
        """
        self._others: BoundedDict[str, float] = BoundedDict(_REMEMBERED)
        self._set_at: float | None = None
        """When the clock was set to a time that has not been adopted, by the steady clock."""

    def now(self) -> float:
        """Unix time in seconds."""
        steady, wall = self._steady(), self._wall()
        offset = wall - steady
        if abs(offset - self._offset) <= _STEP_S:
            self._offset, self._set_at = offset, None
        else:
            self._judge(offset, steady)
        return steady + self._offset

    def note(self, peer: str, its_time: float) -> None:
        """Remembers what another peer's clock says now."""
        if is_time(its_time):
            self._others[peer] = its_time - self._steady()

    @property
    def ahead_s(self) -> float:
        """How far the time in use is ahead of most other peers' clocks, in seconds; 0 if it is not, hardly, or by more
        than can be allowed for.
        """
        if not self._others:
            return 0.0
        most_are_no_later = sorted(self._others.values())[len(self._others) // 2]
        ahead_s = self._offset - most_are_no_later
        return ahead_s if CLOCK_TOLERANCE_S < ahead_s <= MOST_AHEAD_S else 0.0

    @property
    def error_s(self) -> float:
        """How far this machine's clock is ahead of most other peers' clocks, in seconds; 0 if nobody was asked."""
        own = self._wall() - self._steady()
        errors = sorted((0.0, *(own - other for other in self._others.values())), key=abs)
        return errors[len(errors) // 2]

    @property
    def warning(self) -> str:
        """A warning in words if most peers disagree with this machine's clock; else empty."""
        error_s = self.error_s
        if abs(error_s) <= CLOCK_TOLERANCE_S:
            return ""
        side = "ahead of" if error_s > 0 else "behind"
        asked = len(self._others)
        theirs = "that of the peer asked" if asked == 1 else f"those of most of the {asked} peers asked"
        return (
            f"this machine's clock is {age_in_words(abs(error_s))} {side} {theirs}: set it right. Until then, "
            + (
                "others notice that much later when this machine goes offline"
                if self.ahead_s
                else "this machine and others take each other's records for outdated, so it may see no nodes"
            )
        )

    @property
    def doubt(self) -> str:
        """The warning as the end of an error that a wrong clock can cause; empty if there is no warning."""
        warning = self.warning
        return f". But first, {warning}" if warning else ""

    def _judge(self, offset: float, steady: float) -> None:
        """Adopts the clock's new setting if most peers agree with it, or after a while if there are no peers."""
        if self._set_at is None:
            self._set_at = steady
            by_s = offset - self._offset
            way = "forward" if by_s > 0 else "back"
            logger.warning("this machine's clock was set %s by %s", way, age_in_words(abs(by_s)))
        others = list(self._others.values())
        siding = sum(abs(other - offset) < abs(other - self._offset) for other in others)
        if siding > len(others) / 2 or (not others and steady > self._set_at + _ALONE_S):
            self._offset, self._set_at = offset, None


def is_time(seconds: float) -> bool:
    """Whether a number from another peer can be a Unix time. It can't be NaN, and is far below the largest numbers."""
    return 0 <= seconds <= 2.0**40


CLOCK = SwarmClock(time.time, seconds_since_boot)
"""The one clock of this process."""
now: Callable[[], float] = CLOCK.now


def earliest(now: float) -> float:
    """The earliest time that it may be when this machine's clock says `now`. What others announce has expired if its
    expiry is no later than that.
    """
    return now - CLOCK.ahead_s
