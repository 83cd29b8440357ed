"""Links and processors that many jobs share, modelled as fluids: in each slot of time, jobs get even shares.

A job is a transfer, which needs every link on its way, or a computation, which needs one processor. In each slot every
resource is divided evenly among its jobs, and each job gets the smallest of its shares. What is left over is divided
once more among the others (progressive filling: Bertsekas and Gallager, Data Networks, section 6.5.2). So links are
shared as by TCP connections with equal round trips, and processors as by a fair queue of small pieces.

All jobs of a slot are computed together, in arrays. The end of a job is exact as long as no other job starts or ends in
its last slot.

Shapes: L resources, J jobs, W resources on the way of a job.
"""

from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

WAY = 4
"""The largest number of resources that one job needs: two links, or four if a relay is used."""
_ROUNDS = 2
_PLENTY = 1e30
_LEAST = 1e-9
"""A share of a slot's capacity, or of a job, below this counts as nothing."""
_MOST_OVER = 0.3
"""When more than this share of the jobs in the arrays have ended, the arrays are compacted."""


@dataclass(frozen=True)
class Jobs:
    """Jobs that are added together."""

    tags: Integers  # [J], by which the caller knows them
    ways: Integers  # [J, W], numbers of resources; `Fluids.nothing` fills the rest
    amounts: Numbers  # [J]
    starts: Numbers  # [J]
    ends: Numbers  # [J], when a job is given up
    groups: Integers  # [J]; those of one group share what one job would get; -1: alone

    def only(self, some: "npt.NDArray[np.bool_] | Integers") -> "Jobs":
        return Jobs(*(getattr(self, field.name)[some] for field in fields(self)))


def joined(some: list[Jobs]) -> Jobs:
    return Jobs(*(np.concatenate([getattr(jobs, field.name) for jobs in some]) for field in fields(Jobs)))


def no_jobs() -> Jobs:
    none, whole = np.zeros(0), np.zeros(0, np.int64)
    return Jobs(whole, np.zeros((0, WAY), np.int64), none, none, none, whole)


class Fluids:
    """Resources, and the jobs under way on them. Time advances in slots, from 0."""

    def __init__(self, capacity: Numbers, slot_s: float, groups: int = 0) -> None:
        """`capacity` [L]: what each resource can do per second. `groups`: the number of groups."""
        self.now = 0.0
        self.slot_s = slot_s
        self.nothing = len(capacity)
        """The number of a resource with unlimited capacity."""
        self._capacity = np.append(capacity, _PLENTY) * slot_s
        self._in_group = np.zeros(groups, np.int16)
        self._later: dict[int, list[Jobs]] = {}
        """Jobs by the slot in which they start."""
        # The jobs under way. One that has ended has nothing left, and uses no resource.
        self._jobs = no_jobs()
        self._hops = [np.zeros(0, np.int32)] * WAY
        self._left = np.zeros(0)
        self._moved = np.zeros(0)
        """How much later each job started than the slot in which it was first computed."""
        self._weights = np.zeros(0)
        self._over = 0

    def add(self, jobs: Jobs) -> None:
        """Adds jobs. One that started before the present slot is computed from this slot on, and its end is moved back
        by as much.
        """
        slots = np.maximum((jobs.starts / self.slot_s).astype(np.int64), round(self.now / self.slot_s))
        first, last = (int(slots.min()), int(slots.max())) if len(slots) else (0, -1)
        if first == last:
            self._later.setdefault(first, []).append(jobs)
            return
        for slot in np.unique(slots).tolist():
            self._later.setdefault(slot, []).append(jobs.only(slots == slot))

    def waiting(self, resources: int) -> Numbers:
        """The work left of the jobs whose way begins at each of the first `resources` resources."""
        left: Numbers = np.bincount(self._hops[0], self._left, self.nothing + 1)[:resources].astype(float)
        return left

    def step(self) -> tuple[Integers, Numbers, Integers]:
        """Lets one slot pass. Returns the jobs that ended, in any order, the end of each, and the jobs that were given
        up.
        """
        self._admit()
        begins, self.now = self.now, (round(self.now / self.slot_s) + 1) * self.slot_s
        if len(self._left) == self._over:
            return np.zeros(0, np.int64), np.zeros(0), np.zeros(0, np.int64)
        given, share = self._divide()
        before, after = self._left, self._left - given
        ended = np.flatnonzero((before > 0) & (after <= _LEAST * self._jobs.amounts))
        part = np.minimum(1.0, before[ended] / np.maximum(share[ended], 1 / _PLENTY))
        at = begins + part * self.slot_s + self._moved[ended]
        self._left = after
        self._end(ended)
        late = np.flatnonzero((after > 0) & (self._jobs.ends <= self.now))
        self._end(late)
        return self._jobs.tags[ended], at, self._jobs.tags[late]

    def _end(self, numbers: Integers) -> None:
        self._left[numbers] = 0.0
        self._weights[numbers] = 0.0
        for hop in self._hops:
            hop[numbers] = self.nothing
        groups = self._jobs.groups[numbers]
        np.subtract.at(self._in_group, groups[groups >= 0], 1)
        self._over += len(numbers)

    def _admit(self) -> None:
        coming = self._later.pop(round(self.now / self.slot_s), None)
        if not coming:
            return
        if self._over > _MOST_OVER * len(self._left):
            stays = np.flatnonzero(self._left > 0)
            self._jobs, self._left, self._over = self._jobs.only(stays), self._left[stays], 0
            self._moved, self._weights = self._moved[stays], self._weights[stays]
            self._hops = [hop[stays] for hop in self._hops]
        new = joined(coming)
        in_group = np.flatnonzero(new.groups >= 0)
        np.add.at(self._in_group, new.groups[in_group], 1)
        weights = np.ones(len(new.tags))
        weights[in_group] = 1.0 / self._in_group[new.groups[in_group]]
        self._jobs = joined([self._jobs, new])
        self._left = np.concatenate([self._left, new.amounts])
        self._moved = np.concatenate([self._moved, new.starts - self.now])
        self._weights = np.concatenate([self._weights, weights])
        ways = new.ways.astype(np.int32).T
        self._hops = [np.concatenate([hop, more]) for hop, more in zip(self._hops, ways, strict=True)]

    def _divide(self) -> tuple[Numbers, Numbers]:
        """What each job gets in this slot, and how large its first even share was. Both are [J]."""
        size, room = len(self._capacity), self._capacity
        # Few jobs have a third and a fourth resource.
        parts = [slice(None)] * 2 + [np.flatnonzero(hop != self.nothing) for hop in self._hops[2:]]
        hops = [hop[part] for hop, part in zip(self._hops, parts, strict=True)]
        left, weights = self._left, self._weights
        given, first = np.zeros(0), np.zeros(0)
        for number in range(_ROUNDS):
            share = np.full(len(left), _PLENTY)
            loads = sum(np.bincount(hop, weights[part], size) for hop, part in zip(hops, parts, strict=True))
            each = room / np.maximum(loads, 1e-9)
            for hop, part in zip(hops, parts, strict=True):
                share[part] = np.minimum(share[part], each[hop])
            share *= weights
            more = np.minimum(share, left)
            given, first = (given + more, first) if number else (more, share)
            if number == _ROUNDS - 1:
                break
            used = sum(np.bincount(hop, more[part], size) for hop, part in zip(hops, parts, strict=True))
            room = np.maximum(room - used, 0.0)
            room[room <= _LEAST * self._capacity] = 0.0
            left = left - more
            has_room = left > 0
            for hop, part in zip(hops, parts, strict=True):
                has_room[part] &= room[hop] > 0
            weights = np.where(has_room, weights, 0.0)
        return given, first
