"""Which work is computed next: the queue that merges work into batches and is fair to every caller. Pure.

Start-time fair queueing (Goyal, Vin & Cheng 1996) over callers, by rows. Each caller has a virtual time: the rows
computed for it. The caller with the least determines the expert and direction of the next batch: backward before
forward, then by deadline. Other callers' work for that expert joins in the same order. Experts with a batch in progress
are skipped.

Shape suffixes: R = rows, D = width.
"""

import asyncio
from collections.abc import Callable, Iterator, Mapping, Set
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
from peer.errors import ExpertError

Direction: TypeAlias = Literal["forward", "backward"]
Key: TypeAlias = tuple[UID, Direction]

_RATE_MEMORY = 0.9  # the weight of the previous rate when a new batch is measured
_RETRY_UNMEASURED_S = 1.0
_RETRY_LEAST_S, _RETRY_MOST_S = 0.05, 30.0
_REMEMBERED_CALLERS = 1024


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
    keep: bool = False
    """In forward: whether a backward call will follow."""
    group: str = ""
    """Callers in one group may be one person under several keys; empty for a caller by itself."""

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
    """A bounded queue that merges work of one expert and direction into batches, and is fair to every caller.

    Among callers that always have work waiting, none is ever ahead of another by more rows than one batch, one work
    item, or what is computed together with one item (`pop_alike`), whichever is largest. A caller that arrives or
    returns starts at the same point as those furthest behind.
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
        self._ahead: dict[str, int] = {}
        """Virtual times of callers that left while they were ahead of others."""
        self._virtual_time = 0
        """The smallest virtual time of all callers when the last batch was chosen. No caller's is smaller."""
        self._measured_rows = self._measured_s = 0.0

    def make_room(self, work: WorkItem) -> list[Entry]:
        """If there is no room for this work, takes out work of the callers with the most rows, latest deadlines first.
        Takes out nothing if this work's caller would be the one with the most. So a caller that keeps to its share (the
        room divided by the number of callers) always has room, and loses nothing (longest queue drop, as in
        `peer.budget`).
        """
        missing = self.rows + len(work.rows) - self._max_queued_rows
        if missing <= 0:
            return []
        wanted = self._rows_of(work.caller) + len(work.rows)
        rows = {name: caller.rows for name, caller in self._callers.items() if name != work.caller}
        taken: list[Entry] = []
        while missing > 0:
            largest = max(rows, key=rows.__getitem__, default=work.caller)
            if rows.get(largest, 0) <= wanted:
                for entry in taken:
                    self._callers[entry.work.caller].latest.put_back(entry)
                return []
            taken.append(self._callers[largest].latest.pop())
            rows[largest] -= len(taken[-1].work.rows)
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
                f"no room for {len(work.rows)} rows: {self.rows} of at most {self._max_queued_rows} are already "
                "waiting, "
                f"{self._rows_of(work.caller)} of them yours",
                retry_after_s=self.retry_after_s(work.caller if self._rows_of(work.caller) else None),
            )
        entry = Entry(work, next(self._order), future, discard)
        self._waiting[entry.order] = entry
        self.rows += len(work.rows)
        caller = self._callers.get(work.caller) or self._enter(work.caller)
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
            self._callers[first.caller].virtual_time += len(each.work.rows)
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

    def retry_after_s(self, caller: str | None = None) -> float:
        """Estimates from the measured rate how long the waiting work of one caller, or of all, will take."""
        if not self._measured_rows:
            return _RETRY_UNMEASURED_S
        rows = self.rows
        if caller is not None:  # it takes turns with the others
            rows = min(rows, self._rows_of(caller) * len(self._callers))
        estimate = rows * self._measured_s / self._measured_rows
        return min(max(estimate, _RETRY_LEAST_S), _RETRY_MOST_S)

    def _rows_of(self, caller: str) -> int:
        return self._callers[caller].rows if caller in self._callers else 0

    def _take_batch(self, busy: Set[UID], held: Mapping[str, Set[UID]]) -> list[Entry]:
        """Takes the next batch. A caller does not join if it would then be more than a batch ahead of the caller whose
        turn it is.
        """
        callers = self._callers.values()
        choosers = [
            (caller.virtual_time, *first)
            for caller in callers
            if (first := self._first(caller, busy | held.get(caller.name, frozenset())))
        ]
        if not choosers:
            return []
        self._virtual_time = min(caller.virtual_time for caller in callers)
        virtual_time, _, _, order = min(choosers)
        most = virtual_time + self._max_batch_rows
        uid, lines = self._waiting[order].work.uid, self._by_key[self._waiting[order].work.key]
        turns = [
            (self._callers[name].virtual_time, line.first(), name)
            for name, line in lines.items()
            if uid not in held.get(name, ())
        ]
        heapify(turns)  # the chooser's turn comes first
        batch: list[Entry] = []
        rows = 0
        while turns:
            virtual_time, (_, _, order), name = turns[0]
            entry = self._waiting[order]
            rows += len(entry.work.rows)
            virtual_time += len(entry.work.rows)
            if batch and (rows > self._max_batch_rows or virtual_time > most):
                break
            self._callers[name].virtual_time = virtual_time
            batch.append(self._take(entry))
            if name in lines:
                heapreplace(turns, (virtual_time, lines[name].first(), name))
            else:
                heappop(turns)
        return batch

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

    def _enter(self, name: str) -> "_Caller":
        virtual_time = max(self._ahead.pop(name, 0), self._virtual_time)
        line, latest = _Line(self._waiting), _Line(self._waiting, is_reversed=True)
        caller = self._callers[name] = _Caller(name, virtual_time, line, latest)
        return caller

    def _leave(self, caller: "_Caller") -> None:
        """Remembers for a while how far ahead a leaving caller was. Otherwise it would gain by leaving and
        returning.
        """
        del self._callers[caller.name]
        if not self._callers:
            self._ahead.clear()
            self._virtual_time = 0
            return
        self._ahead[caller.name] = caller.virtual_time
        if len(self._ahead) > _REMEMBERED_CALLERS:
            ahead = {name: time for name, time in self._ahead.items() if time > self._virtual_time}
            self._ahead = dict(islice(ahead.items(), max(0, len(ahead) - _REMEMBERED_CALLERS // 2), None))


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
class _Caller:
    name: str
    virtual_time: int
    line: _Line
    latest: _Line
    """The caller's entries in reverse order."""
    rows: int = 0
