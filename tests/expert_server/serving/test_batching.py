import asyncio
import contextlib
from collections import Counter
from collections.abc import Set
from dataclasses import replace
from itertools import combinations, count
from typing import get_args

import pytest
import torch
from grpc import StatusCode
from hypothesis import given, settings
from hypothesis import strategies as st
from loop_lags import least_cpu_s

from dht.uid import UID
from expert_server.experts.graphs import Rows, SharedGraph, SharedPass
from expert_server.experts.grouped import MOST_EXPERTS
from expert_server.serving.batching import BatchQueue, Direction, Entry, WorkItem
from peer.errors import ExpertError

FIRST, SECOND = UID(0, (0, 0)), UID(0, (0, 1))
NEVER = float("inf")
MAX_BATCH_ROWS, MAX_WORK_ROWS = 10, 16
BOUND = max(MAX_BATCH_ROWS, MAX_WORK_ROWS)


def make_work(
    rows: int = 4,
    uid: UID = FIRST,
    direction: Direction = "forward",
    deadline: float = NEVER,
    caller: str = "a trainer",
    group: str | None = None,
) -> WorkItem:
    """`group`: by default, the caller is a group by itself."""
    inputs = torch.empty(rows, 1)
    gradients = inputs if direction == "backward" else None
    positions = torch.empty(rows, dtype=torch.int64)
    rows_of_work = Rows(inputs, torch.tensor([rows]), positions, gradients)
    return WorkItem(uid, direction, rows_of_work, deadline, caller, caller if group is None else group)


LOOP = asyncio.new_event_loop()
LOOP.close()


def add(queue: BatchQueue, work: WorkItem) -> Entry:
    """Adds work with a future that nobody waits for."""
    return queue.push(work, asyncio.Future(loop=LOOP), queue.discard)


def push(queue: BatchQueue, work: WorkItem) -> tuple[Entry, list[Entry]]:
    """Adds work as the runtime does. Returns the entry, and the entries that had to make room for it."""
    displaced = queue.make_room(work)
    return add(queue, work), displaced


class ModelQueue:
    """What BatchQueue should do, computed by full scans."""

    def __init__(self, max_queued_rows: int, max_batch_rows: int) -> None:
        self.max_queued_rows, self.max_batch_rows = max_queued_rows, max_batch_rows
        self.entries: list[Entry] = []
        self.virtual_times: dict[str, int] = {}
        self.virtual_time = 0

    @property
    def rows(self) -> int:
        return self.rows_of(None)

    def rows_of(self, caller: str | None) -> int:
        return sum(len(entry.work.rows) for entry in self.entries if caller in (None, entry.work.caller))

    def displaced_by(self, work: WorkItem) -> list[Entry]:
        left = list(self.entries)
        while sum(len(entry.work.rows) for entry in left) + len(work.rows) > self.max_queued_rows:
            rows = Counter({entry.work.caller: 0 for entry in self.entries})
            for entry in left:
                rows[entry.work.caller] += len(entry.work.rows)
            wanted = rows.pop(work.caller, 0) + len(work.rows)
            largest = max(rows, key=lambda name: rows[name], default="")
            if rows[largest] <= wanted:
                return []
            left.remove(max((e for e in left if e.work.caller == largest), key=self.place))
        return [entry for entry in self.entries if entry not in left]

    def refuses(self, work: WorkItem) -> bool:
        return self.rows + len(work.rows) > self.max_queued_rows

    def add(self, entry: Entry) -> None:
        caller = entry.work.caller
        if not self.rows_of(caller):
            self.virtual_times[caller] = max(self.virtual_times.get(caller, 0), self.virtual_time)
        self.entries.append(entry)

    def take(self, entries: list[Entry]) -> None:
        self.entries = [entry for entry in self.entries if entry not in entries]
        if not self.entries:
            self.virtual_times, self.virtual_time = {}, 0

    def place(self, entry: Entry) -> tuple[bool, float, int]:
        return entry.work.direction == "forward", entry.work.deadline, entry.order

    def turn(self, entry: Entry) -> tuple[float, bool, float, int]:
        return self.virtual_times[entry.work.caller], *self.place(entry)

    def pop(self, now: float, busy: Set[UID]) -> tuple[list[Entry], list[Entry]]:
        in_order = sorted(self.entries, key=lambda entry: (entry.work.deadline, entry.order))
        expired = [entry for entry in in_order if entry.work.deadline <= now]
        self.take(expired)
        batch: list[Entry] = []
        if free := [entry for entry in self.entries if entry.work.uid not in busy]:
            chosen = min(free, key=self.turn)
            turn = self.virtual_times[chosen.work.caller]
            self.virtual_time = min(self.virtual_times[entry.work.caller] for entry in self.entries)
            while joining := [e for e in self.entries if e.work.key == chosen.work.key and e not in batch]:
                entry = min(joining, key=self.turn)
                rows = len(entry.work.rows) + sum(len(e.work.rows) for e in batch)
                lead = self.virtual_times[entry.work.caller] + len(entry.work.rows) - turn
                if batch and max(rows, lead) > self.max_batch_rows:
                    break
                self.virtual_times[entry.work.caller] += len(entry.work.rows)
                batch.append(entry)
            self.take(batch)
        return batch, expired


uids = st.sampled_from([FIRST, SECOND])
callers = st.sampled_from(["a", "b", "c"])
directions = st.sampled_from(get_args(Direction))
works = st.builds(make_work, st.integers(1, 8), uids, directions, st.integers(0, 40).map(float), callers)
operations = st.one_of(
    works,
    works,
    st.tuples(st.just("pop"), st.integers(0, 3), st.frozensets(uids)),
    st.tuples(st.just("discard"), st.integers(0, 100)),
    st.tuples(st.just("remove"), uids),
)


@settings(deadline=None, max_examples=100)
@given(st.lists(operations, max_size=60))
def test_queue_does_what_full_scans_would(steps: list[object]) -> None:
    queue, model, now = BatchQueue(30, 10), ModelQueue(30, 10), 0.0
    pushed: list[Entry] = []
    for step in steps:
        match step:
            case WorkItem():
                displaced = model.displaced_by(step)
                callers = {entry.work.caller for entry in model.entries} | {step.caller}
                assert set(queue.make_room(step)) == set(displaced)
                assert all(model.rows_of(e.work.caller) > 30 / len(callers) for e in displaced)
                is_fair = model.rows_of(step.caller) + len(step.rows) <= 30 / len(callers)
                model.take(displaced)
                if model.refuses(step):
                    assert not is_fair
                    with pytest.raises(ExpertError):
                        add(queue, step)
                else:
                    pushed.append(add(queue, step))
                    model.add(pushed[-1])
            case "pop", int(elapsed), frozenset() as busy:
                now += elapsed
                assert queue.pop(now, busy) == model.pop(now, busy)
            case "discard", int(index) if pushed:
                entry = pushed[index % len(pushed)]
                queue.discard(entry)
                model.take([entry])
            case "remove", UID() as uid:
                removed = [entry for entry in model.entries if entry.work.uid == uid]
                assert sorted(queue.remove(uid), key=lambda entry: entry.order) == removed
                model.take(removed)
        assert queue.rows == model.rows
    assert sorted(queue.clear(), key=lambda entry: entry.order) == model.entries
    assert queue.pop(NEVER) == ([], [])


def test_earliest_deadline_chooses_the_expert_and_the_order_in_its_batch() -> None:
    queue = BatchQueue(100, 10)
    late, other, early = (
        add(queue, make_work(uid=uid, deadline=deadline))
        for uid, deadline in ((FIRST, 9.0), (SECOND, 5.0), (FIRST, 1.0))
    )
    assert queue.pop(0.0) == ([early, late], [])
    assert queue.pop(0.0) == ([other], [])


def test_directions_are_not_merged_and_backward_goes_first() -> None:
    queue = BatchQueue(100, 100)
    forward = add(queue, make_work(direction="forward", deadline=1.0))
    backward = add(queue, make_work(direction="backward", deadline=2.0))
    assert queue.pop(0.0) == ([backward], [])
    assert queue.pop(0.0) == ([forward], [])


def test_backward_of_one_caller_does_not_go_before_forward_of_another() -> None:
    queue = BatchQueue(100, 4)
    forward = add(queue, make_work(caller="a"))
    backward = [add(queue, make_work(direction="backward", caller="b")) for _ in range(2)]
    assert [queue.pop(0.0)[0] for _ in range(3)] == [[backward[0]], [forward], [backward[1]]]


def test_callers_of_one_expert_share_a_batch() -> None:
    queue = BatchQueue(100, 100)
    entries = [add(queue, make_work(caller=caller)) for caller in "abc"]
    assert queue.pop(0.0) == (entries, [])


def test_work_larger_than_a_batch_runs_alone() -> None:
    queue = BatchQueue(100, 10)
    large, small = add(queue, make_work(rows=50)), add(queue, make_work(rows=1))
    assert queue.pop(0.0) == ([large], [])
    assert queue.pop(0.0) == ([small], [])


def test_expired_work_is_never_in_a_batch() -> None:
    queue = BatchQueue(100, 100)
    expired, alive = add(queue, make_work(deadline=1.0)), add(queue, make_work(deadline=2.0))
    assert queue.pop(1.0) == ([alive], [expired])


# Fairness


@st.composite
def arrivals(draw: st.DrawFn) -> dict[str, list[tuple[int, UID, Direction, float]]]:
    """For each caller, a cycle of works. Some of its work is always waiting."""
    work = st.tuples(st.integers(1, MAX_WORK_ROWS), uids, directions, st.floats(1, 1e6))
    return {name: draw(st.lists(work, min_size=1, max_size=5)) for name in "abcd"[: draw(st.integers(2, 4))]}


@given(arrivals(), st.integers(0, 3), st.integers(BOUND + 1, 80), st.integers(0, 20))
def test_served_rows_of_waiting_callers_stay_within_one_batch_or_work(
    cycles: dict[str, list[tuple[int, UID, Direction, float]]], late: int, depth: int, head_start: int
) -> None:
    """The `late` callers come after `head_start` batches. From then on all callers have `depth` rows waiting."""
    queue, names = BatchQueue(10**6, MAX_BATCH_ROWS), list(cycles)
    waiting: Counter[str] = Counter()
    served: Counter[str] = Counter()
    computed: set[Entry] = set()
    pushed: Counter[str] = Counter()
    for batch_number in range(head_start + 40):
        if batch_number == head_start:
            served.clear()
        active = names if batch_number >= head_start else names[: max(1, len(names) - late)]
        for name in active:
            while waiting[name] < depth:
                rows, uid, direction, deadline = cycles[name][pushed[name] % len(cycles[name])]
                add(queue, make_work(rows, uid, direction, deadline, name))
                waiting[name] += rows
                pushed[name] += 1
        batch, expired = queue.pop(0.0)
        assert not expired
        assert not computed & set(batch)
        computed |= set(batch)
        for entry in batch:
            waiting[entry.work.caller] -= len(entry.work.rows)
            served[entry.work.caller] += len(entry.work.rows)
        if batch_number >= head_start:
            # They differ by at most BOUND from equal virtual times; earlier callers may already have been BOUND ahead
            # or behind.
            most = BOUND if head_start == 0 else 2 * BOUND
            assert all(abs(served[a] - served[b]) <= most for a, b in combinations(names, 2))


@given(st.lists(st.tuples(works, st.booleans()), max_size=40))
def test_nothing_is_lost_or_computed_twice_and_nothing_expired_is_computed(
    steps: list[tuple[WorkItem, bool]],
) -> None:
    queue, clock = BatchQueue(10**6, MAX_BATCH_ROWS), count()
    pushed: list[Entry] = []
    done: list[Entry] = []
    for work, pops in steps:
        pushed.append(add(queue, work))
        if pops:
            now = next(clock)
            batch, expired = queue.pop(now)
            assert all(entry.work.deadline > now for entry in batch)
            assert all(entry.work.deadline <= now for entry in expired)
            done += batch + expired
    while queue.rows:
        batch, expired = queue.pop(0.0)
        done += batch + expired
    assert sorted(done, key=lambda entry: entry.order) == pushed


def test_a_caller_with_short_deadlines_does_not_starve_others() -> None:
    queue = BatchQueue(10**6, 10)
    for _ in range(100):
        add(queue, make_work(10, deadline=1.0, caller="greedy"))
    patient = add(queue, make_work(10, SECOND, deadline=1000.0, caller="patient"))
    batches = [queue.pop(0.0)[0] for _ in range(2)]
    assert [patient] in batches


def test_a_caller_that_leaves_and_returns_has_not_gained_by_it() -> None:
    queue = BatchQueue(10**6, 10)
    for _ in range(4):
        add(queue, make_work(10, deadline=5.0, caller="steady"))
    served = []
    for _ in range(4):
        if not queue._rows_of("returning"):
            add(queue, make_work(10, SECOND, deadline=1.0, caller="returning"))
        served += [entry.work.caller for entry in queue.pop(0.0)[0]]
    assert Counter(served) == {"returning": 2, "steady": 2}


@pytest.mark.parametrize("is_new_each_time", [False, True])
@pytest.mark.parametrize("keys", [1, 8])
def test_many_keys_of_one_line_have_the_turns_of_one_caller(keys: int, is_new_each_time: bool) -> None:
    queue, served, made = BatchQueue(10**6, 10), Counter[bool](), count()
    waiting: list[str] = []
    for _ in range(60):
        add(queue, make_work(10, SECOND, deadline=1e6, caller="honest"))
        while len(waiting) < keys:
            name = f"key {next(made) if is_new_each_time else len(waiting)}"
            waiting.append(name)
            add(queue, make_work(10, deadline=1.0, caller=name, group="one line"))
        (entry,), _ = queue.pop(0.0)
        served[entry.work.caller == "honest"] += 1
        if entry.work.caller != "honest":
            waiting.remove(entry.work.caller)
    assert served == {True: 30, False: 30}


def test_a_new_key_again_and_again_does_not_keep_others_of_its_line_waiting() -> None:
    queue, served = BatchQueue(10**6, 10), Counter[str]()
    for number in range(60):
        if not queue._rows_of("steady"):
            add(queue, make_work(10, SECOND, deadline=1e6, caller="steady", group="one line"))
        if not any(name.startswith("new") for name in queue._callers):
            add(queue, make_work(10, deadline=1.0, caller=f"new {number}", group="one line"))
        served.update(entry.work.caller[:3] for entry in queue.pop(0.0)[0])
    assert served["ste"] >= 29


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(1, 3), min_size=2, max_size=3), st.data())
def test_groups_and_the_callers_in_each_have_equal_shares(sizes: list[int], data: st.DataObject) -> None:
    """As long as all of them have work waiting."""
    owners = [(f"line {n}", f"{n}.{key}") for n, size in enumerate(sizes) for key in range(size)]
    queue, served, depth = BatchQueue(10**6, MAX_BATCH_ROWS), Counter[str](), 40
    for _ in range(60):
        for group, name in owners:
            while queue._rows_of(name) < depth:
                rows, uid = data.draw(st.integers(1, MAX_WORK_ROWS)), data.draw(uids)
                add(queue, make_work(rows, uid, caller=name, group=group))
        for entry in queue.pop(0.0)[0]:
            served[entry.work.caller] += len(entry.work.rows)
            served[entry.work.group] += len(entry.work.rows)
    for alike in (
        {group for group, _ in owners},
        *({n for g, n in owners if g == group} for group, _ in owners),
    ):
        assert all(abs(served[a] - served[b]) <= BOUND for a, b in combinations(alike, 2))


def test_many_keys_of_one_line_that_fill_the_queue_leave_a_newcomer_its_half() -> None:
    queue = BatchQueue(100, 10)
    for number in range(100):
        add(queue, make_work(1, caller=f"key {number}", group="one line"))
    entries = [push(queue, make_work(1, caller="honest"))[0] for _ in range(50)]
    with pytest.raises(ExpertError):
        push(queue, make_work(1, caller="honest"))
    with pytest.raises(ExpertError):
        push(queue, make_work(2, caller="one more key", group="one line"))
    waiting = queue.clear()
    assert len(waiting) == 100
    assert set(entries) <= set(waiting)


def test_callers_that_come_and_go_leave_nothing_behind() -> None:
    queue = BatchQueue(10**6, 10)
    add(queue, make_work(1, SECOND, deadline=1e6, caller="stays"))
    for n in range(5000):
        add(queue, make_work(1, deadline=1.0, caller=f"passing {n}"))
        add(queue, make_work(1, SECOND, deadline=1e6, caller="stays"))
        queue.pop(0.0)
    assert len(queue._ahead) <= 1024
    queue.clear()
    assert [queue._ahead, queue._groups, queue._callers, queue._by_key, queue._waiting] == [
        {},
        {},
        {},
        {},
        {},
    ]


# The bounds


def test_full_queue_says_when_to_ask_again() -> None:
    queue = BatchQueue(10, 10)
    add(queue, make_work(rows=8))
    queue.measure(rows=100, seconds=50.0)
    with pytest.raises(
        ExpertError, match="no room for 3 rows: 8 of at most 10 are already waiting"
    ) as caught:
        add(queue, make_work(rows=3))
    assert caught.value.status is StatusCode.RESOURCE_EXHAUSTED
    assert caught.value.retry_after_s == pytest.approx(4.0)


def test_a_caller_alone_may_fill_the_queue() -> None:
    queue = BatchQueue(10, 10)
    add(queue, make_work(rows=6))
    add(queue, make_work(rows=4))
    assert queue.rows == 10


def test_a_caller_whose_rows_fill_the_queue_is_told_when_they_are_done() -> None:
    queue = BatchQueue(100, 10)
    add(queue, make_work(rows=50, caller="greedy"))
    add(queue, make_work(rows=50, caller="other"))
    queue.measure(rows=100, seconds=1.0)
    with pytest.raises(
        ExpertError, match="100 of at most 100 are already waiting, 50 of them yours"
    ) as caught:
        push(queue, make_work(rows=2, caller="greedy"))
    assert caught.value.status is StatusCode.RESOURCE_EXHAUSTED
    assert caught.value.retry_after_s == pytest.approx(1.0)


@pytest.mark.parametrize("strangers", [1, 2, 9])
def test_strangers_that_fill_the_queue_together_leave_a_newcomer_its_share(strangers: int) -> None:
    queue = BatchQueue(100, 10)
    for number in range(100):
        add(queue, make_work(rows=1, caller=f"stranger {number % strangers}"))
    entries = [push(queue, make_work(rows=1, caller="honest"))[0] for _ in range(100 // (strangers + 1))]
    waiting = queue.clear()
    assert len(waiting) == 100
    assert set(entries) <= set(waiting)


def test_who_comes_to_a_full_queue_gets_room_from_the_one_that_filled_it() -> None:
    queue = BatchQueue(10, 10)
    early, *late = (add(queue, make_work(5, deadline=d, caller="greedy")) for d in (1.0, 2.0))
    entry, displaced = push(queue, make_work(1, caller="other"))
    assert displaced == late
    assert queue.pop(0.0) == ([early, entry], [])


@pytest.mark.parametrize("caller", ["a newcomer", "a stranger"])
def test_what_comes_to_a_full_queue_costs_about_as_little_however_much_waits(caller: str) -> None:
    """This holds for work that is accepted and for work that is refused. The event loop does it for each expert of a
    call.
    """

    def cpu_s(rows: int) -> float:
        queue, works = (
            BatchQueue(rows, MAX_BATCH_ROWS),
            [make_work(1, caller=c) for c in ("a stranger", "another")],
        )
        for work in rows // 2 * works:
            add(queue, work)
        work = make_work(2, caller=caller)

        def come() -> None:
            for _ in range(20):
                with contextlib.suppress(ExpertError):
                    push(queue, work)

        return least_cpu_s(come)

    assert cpu_s(20_000) < 20 * cpu_s(200)


def test_no_one_is_displaced_for_work_that_is_refused_anyway() -> None:
    queue = BatchQueue(10, 10)
    add(queue, make_work(5, caller="greedy"))
    add(queue, make_work(5, caller="fair"))
    assert queue.make_room(make_work(6, caller="other")) == []
    assert queue.rows == 10


def test_no_one_is_displaced_when_the_room_would_not_be_enough() -> None:
    queue = BatchQueue(8, 8)
    for rows, deadline in ((4, 1.0), (1, 2.0)):
        add(queue, make_work(rows, deadline=deadline, caller="greedy"))
    add(queue, make_work(3, caller="other"))
    assert queue.make_room(make_work(4, caller="third")) == []  # one row less would not do
    assert queue.rows == 8


@pytest.mark.parametrize(("max_batch_rows", "least", "most"), [(128, 0.97, 1.0), (8192, 0.0, 0.8)])
def test_steps_over_a_slow_link_stay_apart_unless_their_work_is_merged(
    max_batch_rows: int, least: float, most: float
) -> None:
    queue = BatchQueue(10**6, max_batch_rows)
    rows, row_s, link_s = 256, 0.001, 0.512
    steps = 4  # 3 are enough for a server that is never idle, if they are evenly apart
    on_the_way = [0.0] * steps
    now = busy_s = 0.0
    while now < 100:
        for _ in range(sum(arrives <= now for arrives in on_the_way)):
            add(queue, make_work(rows))
            on_the_way.remove(min(on_the_way))
        batch, _ = queue.pop(now)
        if not batch:
            now = min(on_the_way)
            continue
        took_s = sum(len(entry.work.rows) for entry in batch) * row_s
        now, busy_s = now + took_s, busy_s + took_s
        on_the_way += [now + link_s] * len(batch)
    assert least <= busy_s / now <= most


def shared_work(shared: SharedPass, uid: UID, index: int) -> WorkItem:
    work = make_work(4, uid, "backward")
    return replace(work, rows=replace(work.rows, graph=SharedGraph(shared, index, None)))


MANY = [UID(0, (0, number)) for number in range(20)]


def test_what_is_alike_is_taken_in_order_up_to_a_number_of_rows() -> None:
    queue = BatchQueue(1000, MAX_BATCH_ROWS)
    for uid in MANY:
        add(queue, make_work(4, uid))
    others = [
        make_work(4, MANY[1], "backward", 100.0), make_work(4, MANY[2], caller="another"), make_work(4, MANY[3]),
    ]  # fmt: skip
    for other in others:
        add(queue, other)
    busy, refused = MANY[5], MANY[6]
    (first, *_), _ = queue.pop(0.0, frozenset(set(MANY) - {MANY[0]}))
    found = queue.pop_alike(first, {busy}, 20, lambda work: work.uid != refused)
    assert [entry.work.uid for entry in found] == [MANY[n] for n in (1, 2, 3, 4)]
    assert {(entry.work.direction, entry.work.caller) for entry in found} == {("forward", "a trainer")}
    found = queue.pop_alike(first, set(), 1000, lambda work: True)
    assert len(found) == MOST_EXPERTS - 1
    assert queue.rows == 4 * (20 + 3 - 1 - 4 - len(found))
    queue.clear()
    assert queue.pop_alike(first, set(), 1000, lambda work: True) == []


def test_what_shares_a_pass_is_taken_whole_and_nothing_else_with_it() -> None:
    queue = BatchQueue(1000, MAX_BATCH_ROWS)
    inputs = torch.zeros(12, 1)
    passes = [SharedPass(inputs, inputs, [], [4, 4, 4], 100) for _ in range(2)]
    for uid, shared, index in zip(MANY, 3 * passes, (0, 0, 1, 1, 2, 2), strict=False):
        add(queue, shared_work(shared, uid, index))
    add(queue, make_work(4, MANY[7], "backward"))
    (first,), _ = queue.pop(0.0)
    found = queue.pop_alike(first, set(), 1, lambda work: True)
    assert [entry.work.uid for entry in found] == [MANY[2], MANY[4]]
    (first,), _ = queue.pop(0.0)
    passes[1].take()
    found = queue.pop_alike(first, set(), 100, lambda work: True)
    assert [entry.work.uid for entry in found] == [MANY[3], MANY[5], MANY[7]], "a used pass is none"


def test_a_caller_pays_for_what_is_computed_together() -> None:
    queue = BatchQueue(1000, MAX_BATCH_ROWS)
    for uid in MANY[:8]:
        for caller in ("a", "b"):
            add(queue, make_work(4, uid, caller=caller, deadline=1.0 if caller == "a" else 2.0))
    (first, *_), _ = queue.pop(0.0)
    taken = queue.pop_alike(first, set(), 16, lambda work: True)
    assert [entry.work.caller for entry in (first, *taken)] == 4 * ["a"]
    turns: list[str] = []
    while len(turns) < 4:
        batch, _ = queue.pop(0.0)
        turns += [entry.work.caller for entry in batch]
    assert Counter(turns)["b"] >= 3, "it is behind"
