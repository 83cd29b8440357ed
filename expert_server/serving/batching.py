"""Which work is computed next: the queue that merges work into batches and is fair to every caller. Pure.

Start-time fair queueing (Goyal, Vin & Cheng 1996) over groups of callers, by rows. Each group has a virtual time: the
rows computed for it. So has each caller, and the group with the least leaves its turn to the caller with the least in
it. That caller determines the expert and direction of the next batch: backward before forward, then by deadline. Other
callers' work for that expert joins in the same order. Experts with a batch in progress are skipped.

Shape suffixes: R = rows, D = width.
"""

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from heapq import heapify, heappop, heappush, heapreplace
from itertools import count, islice
from types import MappingProxyType
from typing import Literal, TypeAlias

from grpc import StatusCode
from torch import Tensor

from dht.uid import UID
from expert_server.experts.graphs import ForwardGraph, Rows, SharedGraph, SharedPass
from expert_server.experts.grouped import MOST_EXPERTS
from expert_server.experts.guard import StepOutcome
from peer.bounded import Displacement, Owner
from peer.errors import ExpertError
from peer.formatting import counted

Direction: TypeAlias = Literal["forward", "backward"]
Key: TypeAlias = tuple[UID, Direction]

_RATE_MEMORY = 0.9  # the weight of the previous rate when a new batch is measured
_RETRY_UNMEASURED_S = 1.0
_RETRY_LEAST_S, _RETRY_MOST_S = 0.05, 30.0
_REMEMBERED_GROUPS = 1024


@dataclass(frozen=True, slots=True, eq=False)
class WorkItem:
    """One expert's part of one call, validated."""

    uid: UID
    direction: Direction
    rows: Rows
    deadline: float
    """Monotonic seconds. After it, nobody waits for the result."""
    caller: str
    """The caller, for fairness and for the log."""
    group: str
    """With whom the caller shares: see `Session.group`."""
    keep: bool = False
    """In forward: whether a backward call will follow."""

    def __post_init__(self) -> None:
        assert (self.rows.gradients is None) == (self.direction == "forward"), "only backward has gradients"

    @property
    def key(self) -> Key:
        return self.uid, self.direction

    @property
    def shared(self) -> SharedPass | None:
        """The forward pass that it shares with other experts' work, if no backward pass has used it."""
        graph = self.rows.graph
        return graph.version if isinstance(graph, SharedGraph) and graph.version.is_whole else None


@dataclass(frozen=True, slots=True)
class Result:
    """The result of a work item."""

    tensor: Tensor
    """[R, D]: updates in forward, gradients of the inputs in backward; on the CPU, float32."""
    update_count: int
    graph: ForwardGraph | SharedGraph | None = None
    """The graph of a forward pass that was to be kept. None if the item was merged with others."""
    step: StepOutcome = StepOutcome.NONE
    updates: Tensor | None = None
    """[R, D]: in backward, if they were computed again."""
    is_clipped: bool = False
    """Whether the expert used less than the whole gradient."""
    version: int = 0
    """In forward: the version of the parameters that computed the updates."""

    @property
    def skipped_update(self) -> bool:
        return StepOutcome.SKIPPED in self.step

    @property
    def withheld_update(self) -> bool:
        return StepOutcome.WITHHELD in self.step

    @property
    def rolled_back(self) -> bool:
        return StepOutcome.ROLLED_BACK in self.step


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """A work item in the queue. Compared by identity."""

    work: WorkItem
    order: int
    """The number of its arrival."""
    future: "asyncio.Future[Result]"
    discard: Callable[["Entry"], None]

    def cancel(self) -> None:
        """Takes the work out of the queue at once."""
        self.discard(self)
        self.future.cancel()


class BatchQueue:
    """A bounded queue that merges work of one expert and direction into batches, and is fair to every group of callers,
    and to the callers in each.

    Among groups that always have work waiting, none is ever ahead of another by more rows than one batch, one work
    item, or what is computed together with one item (`pop_alike`), whichever is largest. The same holds for the callers
    in a group. A group that arrives or returns starts at the same point as those furthest behind. A caller that does so
    starts behind the others in its group: otherwise, one person with new keys again and again would go first each time.
    """

    def __init__(self, max_queued_rows: int, max_batch_rows: int) -> None:
        self.rows: int = 0
        self._max_queued_rows = max_queued_rows
        self._max_batch_rows = max_batch_rows
        self._order = count()
        self._waiting: dict[int, Entry] = {}
        """All entries, by order."""
        self._by_deadline = _Line(self._waiting, directions_alike=True)
        self._by_key: dict[Key, dict[str, _Line]] = {}
        """For each expert and direction, a line for each caller with such work. Lines are never empty."""
        self._callers: dict[str, _Caller] = {}
        """Callers with work waiting."""
        self._groups: dict[str, _Group] = {}
        """Groups with work waiting."""
        self._ahead: dict[str, int] = {}
        """Virtual times of groups that left while they were ahead of others."""
        self._virtual_time = 0
        """The smallest virtual time of all groups when the last batch was chosen. No group's is smaller."""
        self._measured_rows = self._measured_s = 0.0

    def make_room(self, work: WorkItem) -> list[Entry]:
        """If there is no room for this work, takes out work of the callers with the most rows, latest deadlines first.
        Takes out nothing if this work's caller would be the one with the most. So a caller that keeps to its share
        always has room, and loses nothing (longest queue drop, as in `peer.budget`).
        """
        missing = self.rows + len(work.rows) - self._max_queued_rows
        if missing <= 0:
            return []
        names = {Owner(caller.group.name, name): name for name, caller in self._callers.items()}
        rows = {owner: self._rows_of(name) for owner, name in names.items()}
        displacement = Displacement(rows, self._owner(work), len(work.rows))
        taken: list[Entry] = []
        while missing > 0:
            largest = displacement.richest()
            if largest is None:
                for entry in taken:
                    self._callers[entry.work.caller].latest.put_back(entry)
                return []
            taken.append(self._callers[names[largest]].latest.pop())
            displacement.take(largest, len(taken[-1].work.rows))
            missing -= len(taken[-1].work.rows)
        return [self._take(entry) for entry in taken]

    def push(
        self, work: WorkItem, future: "asyncio.Future[Result]", discard: Callable[[Entry], None]
    ) -> Entry:
        """Raises ExpertError (RESOURCE_EXHAUSTED) if there is no room for the rows. `discard`: calls the queue's method
        of that name while holding the queue's lock.
        """
        if self.rows + len(work.rows) > self._max_queued_rows:
            raise ExpertError(
                StatusCode.RESOURCE_EXHAUSTED,
                f"no room for {counted(len(work.rows), 'row')}: {self.rows} of at most {self._max_queued_rows} are "
                f"already waiting, {self._rows_of(work.caller)} of them yours",
                retry_after_s=self.retry_after_s(work.caller if self._rows_of(work.caller) else None),
            )
        entry = Entry(work, next(self._order), future, discard)
        self._waiting[entry.order] = entry
        self.rows += len(work.rows)
        caller = self._callers.get(work.caller) or self._enter(work)
        caller.rows += len(work.rows)
        lines = self._by_key.setdefault(work.key, {})
        if work.caller not in lines:
            lines[work.caller] = _Line(self._waiting)
        for line in (self._by_deadline, caller.line, caller.latest, lines[work.caller]):
            line.push(entry)
        return entry

    def pop(
        self, now: float, busy: Set[UID] = frozenset(), held: Mapping[str, Set[UID]] = MappingProxyType({})
    ) -> tuple[list[Entry], list[Entry]]:
        """Takes the next batch, for an expert that is not busy, and also takes out all work whose deadline has passed.

        `held`: for each caller, experts whose work is skipped.
        """
        expired: list[Entry] = []
        while self._waiting:
            _, deadline, order = self._by_deadline.first()
            if deadline > now:
                return self._take_batch(busy, held), expired
            expired.append(self._take(self._waiting[order]))
        return [], expired

    def pop_alike(
        self, entry: Entry, busy: Set[UID], most_rows: int, fits: Callable[[WorkItem], bool]
    ) -> list[Entry]:
        """Takes more work of an entry's caller, to be computed with it: the first item of each other expert that is not
        busy. If the entry shares a forward pass, takes all work that shares it. Otherwise takes work that shares none,
        in order, up to `most_rows` and `MOST_EXPERTS` in all. `fits`: whether the work may be computed together with
        others'.
        """
        first, shared, passed_over = entry.work, entry.work.shared, {*busy, entry.work.uid}
        turns = sorted(
            line.first()
            for (uid, direction), lines in self._by_key.items()
            if direction == first.direction and uid not in passed_over and (line := lines.get(first.caller))
        )
        found: list[Entry] = []
        rows = len(first.rows)
        for _, _, order in turns:
            work = self._waiting[order].work
            if work.keep != first.keep or work.shared is not shared or not fits(work):
                continue
            rows += len(work.rows)
            if shared is None and (len(found) + 1 == MOST_EXPERTS or rows > most_rows):
                break
            found.append(self._waiting[order])
        for each in found:
            self._charge(each.work)
            self._take(each)
        return found

    def discard(self, entry: Entry) -> None:
        """Takes out work that nobody waits for, if it is still in the queue."""
        if entry.order in self._waiting:
            self._take(entry)

    def remove(self, uid: UID) -> list[Entry]:
        """Takes out all work for one expert."""
        directions: tuple[Direction, ...] = ("forward", "backward")
        lines = [line for d in directions for line in self._by_key.get((uid, d), {}).values()]
        orders = [order for line in lines for _, _, order in line.items()]
        return [self._take(self._waiting[order]) for order in orders]

    def clear(self) -> list[Entry]:
        """Takes out everything."""
        return [self._take(entry) for entry in list(self._waiting.values())]

    def measure(self, rows: int, seconds: float) -> None:
        """Records how long a batch took."""
        self._measured_rows = _RATE_MEMORY * self._measured_rows + rows
        self._measured_s = _RATE_MEMORY * self._measured_s + seconds

    def retry_after_s(self, caller: str | None) -> float:
        """Estimates from the measured rate how long the waiting work of one caller, or of all, will take."""
        if not self._measured_rows:
            return _RETRY_UNMEASURED_S
        rows = self.rows
        if caller is not None:  # it takes turns with the others
            own = self._callers.get(caller)
            rows = 0 if own is None else min(rows, own.rows * len(self._groups) * own.group.callers)
        estimate = rows * self._measured_s / self._measured_rows
        return min(max(estimate, _RETRY_LEAST_S), _RETRY_MOST_S)

    def _rows_of(self, caller: str) -> int:
        return self._callers[caller].rows if caller in self._callers else 0

    def _owner(self, work: WorkItem) -> Owner:
        """A caller stays in one group as long as it has work waiting, even if its session changes."""
        caller = self._callers.get(work.caller)
        return Owner(work.group if caller is None else caller.group.name, work.caller)

    def _take_batch(self, busy: Set[UID], held: Mapping[str, Set[UID]]) -> list[Entry]:
        """Takes the next batch. A caller does not join if its group would then be more than a batch ahead of the group
        whose turn it is, or if it would be so far ahead of another caller in its group.
        """
        choosers = self._turns(
            (caller, first)
            for caller in self._callers.values()
            if (first := self._first(caller, busy | held.get(caller.name, frozenset())))
        )
        if not choosers:
            return []
        self._virtual_time = min(group.virtual_time for group in self._groups.values())
        virtual_time, (_, _, order), _ = choosers[0]
        most = virtual_time + self._max_batch_rows
        least_in = {callers[0][2].group.name: callers[0][0] for _, _, callers in choosers}
        uid, lines = self._waiting[order].work.uid, self._by_key[self._waiting[order].work.key]
        able = [(self._callers[name], line) for name, line in lines.items() if uid not in held.get(name, ())]
        turns = self._turns((caller, line.first()) for caller, line in able)  # the chooser's turn comes first
        batch: list[Entry] = []
        rows = 0
        while turns:
            virtual_time, (_, _, order), callers = turns[0]
            _, _, caller = callers[0]
            entry = self._waiting[order]
            size = len(entry.work.rows)
            if batch and (rows + size > self._max_batch_rows or virtual_time + size > most):
                break
            if batch and caller.virtual_time + size > least_in[caller.group.name] + self._max_batch_rows:
                heappop(turns)
                continue
            rows += size
            self._charge(entry.work)
            batch.append(self._take(entry))
            if caller.name in lines:
                heapreplace(callers, (caller.virtual_time, lines[caller.name].first(), caller))
            else:
                heappop(callers)
            if callers:
                heapreplace(turns, (caller.group.virtual_time, callers[0][1], callers))
            else:
                heappop(turns)
        return batch

    @staticmethod
    def _turns(firsts: "Iterable[tuple[_Caller, _Turn]]") -> "list[_GroupTurn]":
        """A heap of the groups, each with a heap of its callers, from the first entry of each caller."""
        callers: dict[str, list[_CallerTurn]] = {}
        for caller, first in firsts:
            callers.setdefault(caller.group.name, []).append((caller.virtual_time, first, caller))
        turns: list[_GroupTurn] = []
        for own in callers.values():
            heapify(own)
            turns.append((own[0][2].group.virtual_time, own[0][1], own))
        heapify(turns)
        return turns

    def _charge(self, work: WorkItem) -> None:
        caller = self._callers[work.caller]
        caller.virtual_time += len(work.rows)
        caller.group.virtual_time += len(work.rows)
        caller.group.latest = max(caller.group.latest, caller.virtual_time)

    def _first(self, caller: "_Caller", busy: Set[UID]) -> "_Turn | None":
        """The caller's first entry for an expert that is not busy."""
        first = caller.line.first()
        if self._waiting[first[-1]].work.uid not in busy:
            return first
        lines = (lines.get(caller.name) for (uid, _), lines in self._by_key.items() if uid not in busy)
        return min((line.first() for line in lines if line), default=None)

    def _take(self, entry: Entry) -> Entry:
        work = entry.work
        del self._waiting[entry.order]
        self.rows -= len(work.rows)
        caller, lines = self._callers[work.caller], self._by_key[work.key]
        caller.rows -= len(work.rows)
        for line in (self._by_deadline, caller.line, caller.latest, lines[work.caller]):
            line.note_left()
        if not lines[work.caller].length:
            del lines[work.caller]
            if not lines:
                del self._by_key[work.key]
        if not caller.line.length:
            self._leave(caller)
        return entry

    def _enter(self, work: WorkItem) -> "_Caller":
        group = self._groups.get(work.group)
        if group is None:
            virtual_time = max(self._ahead.pop(work.group, 0), self._virtual_time)
            group = self._groups[work.group] = _Group(work.group, virtual_time)
        line, latest = _Line(self._waiting), _Line(self._waiting, is_reversed=True)
        caller = self._callers[work.caller] = _Caller(work.caller, group, group.latest, line, latest)
        group.callers += 1
        return caller

    def _leave(self, caller: "_Caller") -> None:
        """Remembers for a while how far ahead a leaving group was. Otherwise it would gain by leaving and returning."""
        del self._callers[caller.name]
        group = caller.group
        group.callers -= 1
        if group.callers:
            return
        del self._groups[group.name]
        if not self._groups:
            self._ahead.clear()
            self._virtual_time = 0
            return
        self._ahead[group.name] = group.virtual_time
        if len(self._ahead) > _REMEMBERED_GROUPS:
            ahead = {name: time for name, time in self._ahead.items() if time > self._virtual_time}
            self._ahead = dict(islice(ahead.items(), max(0, len(ahead) - _REMEMBERED_GROUPS // 2), None))


_Turn: TypeAlias = tuple[int, float, int]
"""The sort key: whether the work goes after all others, its deadline, and its order of arrival."""


class _Line:
    """One caller's work for one key, by deadline and then by arrival. Entries that have left are skipped, and dropped
    later.
    """

    __slots__ = ("_directions_alike", "_heap", "_sign", "_waiting", "length")

    def __init__(
        self, waiting: Mapping[int, Entry], directions_alike: bool = False, is_reversed: bool = False
    ) -> None:
        """`is_reversed`: the last entry comes first."""
        self.length = 0
        """How many entries wait."""
        self._waiting = waiting
        self._directions_alike = directions_alike
        self._sign = -1 if is_reversed else 1
        self._heap: list[_Turn] = []

    def push(self, entry: Entry) -> None:
        self.put_back(entry)
        self.length += 1

    def put_back(self, entry: Entry) -> None:
        """Undoes `pop`."""
        can_wait = entry.work.direction == "forward" and not self._directions_alike
        sign = self._sign
        heappush(self._heap, (sign * can_wait, sign * entry.work.deadline, sign * entry.order))

    def first(self) -> _Turn:
        """The line must not be empty."""
        while abs(self._heap[0][-1]) not in self._waiting:
            heappop(self._heap)
        return self._heap[0]

    def pop(self) -> Entry:
        """Takes out the first entry. It counts as waiting until it is put back or leaves."""
        turn = self.first()
        heappop(self._heap)
        return self._waiting[abs(turn[-1])]

    def items(self) -> Iterator[_Turn]:
        """All work items, in any order."""
        return (item for item in self._heap if abs(item[-1]) in self._waiting)

    def note_left(self) -> None:
        self.length -= 1
        if len(self._heap) > 2 * self.length + 64:
            self._heap = list(self.items())
            heapify(self._heap)


@dataclass(slots=True)
class _Group:
    name: str
    virtual_time: int
    """The rows computed for all its callers."""
    callers: int = 0
    latest: int = 0
    """The largest virtual time of any of its callers."""


@dataclass(slots=True)
class _Caller:
    name: str
    group: _Group
    virtual_time: int
    """The rows computed for it, compared with others in its group."""
    line: _Line
    latest: _Line
    """The caller's entries in reverse order."""
    rows: int = 0


_CallerTurn: TypeAlias = tuple[int, _Turn, _Caller]
"""A caller's virtual time, and its first entry. No two entries are equal, so that callers are never compared."""
_GroupTurn: TypeAlias = tuple[int, _Turn, list[_CallerTurn]]
"""A group's virtual time, the first entry of the caller whose turn it is, and the turns of all its callers."""
