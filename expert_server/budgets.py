"""What one caller may cost a node: rows, and steps of its experts. Pure and bounded: `now` is passed in.

The generic cell rate algorithm: of each caller it is remembered when the work so far would have been done at the rate
that it is allowed. A call may come while that is no further away than the burst, however large the call is.
"""

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from operator import itemgetter

from grpc import StatusCode

from dht.uid import UID
from expert_server.serving.batching import Direction
from expert_server.settings import NodeSettings
from peer.errors import ExpertError

_BURST_S = 5.0
_EXPERT_BURST_S = 600.0
_REMEMBERED = 65_536


@dataclass(frozen=True)
class BudgetLimits:
    """Of each caller; None: no bound."""

    rows_per_s: float | None = None
    """Forward and backward together."""
    updates_per_s: float | None = None
    """Optimizer steps that its calls cause, of all experts together."""
    expert_updates_per_hour: float | None = None
    """Optimizer steps of one expert."""

    @classmethod
    def of(cls, settings: NodeSettings) -> "BudgetLimits":
        return cls(
            settings.caller_rows_per_s,
            settings.caller_updates_per_s,
            settings.caller_expert_updates_per_hour,
        )


@dataclass
class _Meter:
    """One rate, for as many as there are; who was not seen for longest is forgotten, and begins anew."""

    rate: float | None
    """Per second."""
    burst_s: float
    due: OrderedDict[Hashable, float] = field(default_factory=OrderedDict)

    def wait_s(self, key: Hashable, now: float) -> float:
        """How long until the next may come."""
        if self.rate is None:
            return 0.0
        return max(0.0, self.due.get(key, now) - now - self.burst_s)

    def take(self, key: Hashable, amount: float, now: float) -> None:
        if self.rate is None:
            return
        self.due[key] = max(now, self.due.get(key, now)) + amount / self.rate
        self.due.move_to_end(key)
        if len(self.due) > _REMEMBERED:
            self.due.popitem(last=False)


class Budgets:
    """All callers of one node."""

    def __init__(self, limits: BudgetLimits) -> None:
        self.refused = 0
        """Calls that were beyond their caller's budget."""
        hourly = limits.expert_updates_per_hour
        self._rows = _Meter(limits.rows_per_s, _BURST_S)
        self._updates = _Meter(limits.updates_per_s, _BURST_S)
        self._of_expert = _Meter(None if hourly is None else hourly / 3600, _EXPERT_BURST_S)
        self._bounded = limits != BudgetLimits()

    def take(self, caller: str, direction: Direction, parts: Sequence[tuple[UID, int]], now: float) -> None:
        """Counts a call with so many rows for each expert. Raises ExpertError (RESOURCE_EXHAUSTED): nothing is counted.

        An expert's steps are its parts: several that are merged into one batch take one step, which is each one's.
        """
        if not self._bounded:
            return
        steps = {(caller, uid) for uid, _ in parts} if direction == "backward" else set[tuple[str, UID]]()
        waits = {"rows": self._rows.wait_s(caller, now)}
        if steps:
            waits["optimizer steps"] = self._updates.wait_s(caller, now)
            waits["steps of one expert"] = max(self._of_expert.wait_s(step, now) for step in steps)
        what, wait_s = max(waits.items(), key=itemgetter(1))
        if wait_s:
            self.refused += 1
            raise ExpertError(
                StatusCode.RESOURCE_EXHAUSTED,
                f"your budget of {what} at this node is spent: come back in {wait_s:.1f} s",
                retry_after_s=wait_s,
            )
        self._rows.take(caller, sum(rows for _, rows in parts), now)
        for step in steps:
            self._updates.take(caller, 1, now)
            self._of_expert.take(step, 1, now)
