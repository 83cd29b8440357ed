"""The runtime while everything happens at once: every work ends, none is computed twice, and the counts add up."""

import asyncio
import contextlib
import itertools
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import uvloop
from grpc import StatusCode
from torch import Tensor

from dht.manifest import ExpertSpec, Manifest, ModelSpec
from dht.uid import UID
from expert_server.experts.expert import Expert
from expert_server.experts.graphs import Rows
from expert_server.experts.guard import StepOutcome
from expert_server.serving.batching import WorkItem
from expert_server.serving.runtime import Runtime
from peer.errors import ExpertError
from peer.metrics import total

WIDTH = 8
MANIFEST = Manifest(
    name="stress",
    model=ModelSpec(layers=1, hidden=WIDTH, heads=2, feed_forward=8),
    experts=ExpertSpec(grid=(6,)),
)
UIDS = MANIFEST.uids()
ALWAYS_THERE, BROKEN = UIDS[:3], UIDS[2]
CALLERS, CALLS = 24, 40
LEAST_DONE = CALLERS * CALLS // 10
"""The smallest number of successful calls for a valid test. A slow machine refuses most calls, so then there are more
calls.
"""
MAX_ROWS = 9


@dataclass
class Witness:
    """Records what the compute threads do, and notices what must never happen."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    under_way: Counter[UID | None] = field(default_factory=Counter)
    """Batches under way, by expert; for functions that are run, by None."""
    computed: Counter[int] = field(default_factory=Counter)
    """How many rows of each work were computed."""
    batches: int = 0
    steps: int = 0
    wrong: list[str] = field(default_factory=list)

    @contextlib.contextmanager
    def sees(self, uid: UID | None) -> Iterator[None]:
        with self.lock:
            self.under_way[uid] += 1
            if max(self.under_way.values()) > 1 or (self.under_way[None] and self.under_way.total() > 1):
                self.wrong.append(f"at the same time: {self.under_way}")
        try:
            yield
        finally:
            with self.lock:
                self.under_way[uid] -= 1

    def note_batch(self, inputs_RD: Tensor) -> None:
        with self.lock:
            self.batches += 1
            self.computed.update(inputs_RD[:, 0].int().tolist())


class WatchedExpert(Expert):
    """An expert that returns its inputs after a while, some doubled, and is not computed together with others."""

    grouped_block = None

    def __init__(self, uid: UID, witness: Witness) -> None:
        super().__init__(uid, MANIFEST)
        self._witness = witness

    def forward(self, rows: Rows) -> Tensor:
        with self._witness.sees(self.uid):
            self._witness.note_batch(rows.inputs)
            time.sleep(2e-5 * len(rows))
            if self.uid == BROKEN and len(rows) % 3 == 0:
                raise RuntimeError("out of memory")
        return rows.inputs.clone()

    def backward(self, parts: Sequence[Rows], **_: Any) -> tuple[list[Tensor], StepOutcome]:
        with self._witness.sees(self.uid):
            self._witness.note_batch(torch.cat([part.inputs for part in parts]))
            self._witness.steps += 1
            time.sleep(2e-5 * sum(len(part.inputs) for part in parts))
            self.update_count += 1
        return [2 * part.gradients for part in parts if part.gradients is not None], StepOutcome.TAKEN


class Stress:
    """Callers, and a task that adds, removes and runs things, all from one seed."""

    def __init__(self, seed: int, threads: int) -> None:
        self.witness = Witness()
        self.ends: dict[int, StatusCode | str] = {}
        """How each work ended: a status, or "cancelled"."""
        self.done = 0
        """How many works succeeded."""
        self.rows: dict[int, int] = {}
        self._one_more = asyncio.Event()
        self.ran: Counter[str] = Counter()
        self._rng = random.Random(seed)
        experts: dict[UID, Expert] = {uid: WatchedExpert(uid, self.witness) for uid in ALWAYS_THERE}
        self.runtime = Runtime(experts, max_queued_rows=60, max_batch_rows=20, threads=threads)

    async def all_at_once(self) -> None:
        """Runs everything until every caller has made its calls, and enough calls have succeeded.

        Raises TimeoutError if a call never ends.
        """
        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            callers = [
                group.create_task(self._call_often("greedy" if n % 2 else str(n % 8))) for n in range(CALLERS)
            ]
            changes = [group.create_task(step()) for step in (self._add_and_remove, self._run_often)]
            await asyncio.wait(callers)
            for change in changes:
                change.cancel()

    async def have_ended(self, calls: int) -> None:
        async with asyncio.timeout(60):
            while len(self.ends) < calls:
                self._one_more.clear()
                await self._one_more.wait()

    async def _call_often(self, caller: str) -> None:
        for calls in itertools.count():
            if calls >= CALLS and self.done >= LEAST_DONE:
                return
            work = self._work(caller)
            number = int(work.rows.inputs[0, 0])
            call = asyncio.create_task(self._submit(number, work))
            if self._rng.random() < 0.2:
                await asyncio.sleep(self._rng.uniform(0, 0.004))
                call.cancel()
            await asyncio.wait([call])
            if call.cancelled():
                self.ends[number] = "cancelled"
            else:
                call.result()  # raises what it should not have
            self._one_more.set()
            if self.ends[number] is StatusCode.UNAVAILABLE:
                return

    async def _submit(self, number: int, work: WorkItem) -> None:
        try:
            result = await self.runtime.enqueue(work).future
        except ExpertError as error:
            self.ends[number] = error.status
        else:
            factor = 1 if work.direction == "forward" else 2
            torch.testing.assert_close(result.tensor, factor * work.rows.inputs)
            self.ends[number] = StatusCode.OK
            self.done += 1

    def _work(self, caller: str) -> WorkItem:
        rows, backward = self._rng.randint(1, MAX_ROWS), self._rng.random() < 0.4
        number = len(self.rows)
        self.rows[number] = rows
        inputs = torch.full((rows, WIDTH), float(number))
        deadline = time.monotonic() + self._rng.choice([0.002, 0.02, float("inf")])
        return WorkItem(
            uid=self._rng.choice(UIDS),
            direction="backward" if backward else "forward",
            rows=Rows(
                inputs,
                lengths=torch.ones(rows, dtype=torch.int64),
                positions=torch.zeros(rows, dtype=torch.int64),
                gradients=inputs if backward else None,
            ),
            deadline=deadline,
            caller=caller,
            group=caller,
        )

    async def _add_and_remove(self) -> None:
        while True:
            await asyncio.sleep(self._rng.uniform(0, 0.005))
            uid = self._rng.choice(UIDS)
            if uid in self.runtime.experts and uid not in ALWAYS_THERE:
                self.runtime.remove(uid)
            else:
                self.runtime.add(WatchedExpert(uid, self.witness))

    async def _run_often(self) -> None:
        while True:
            await asyncio.sleep(self._rng.uniform(0, 0.005))
            run = asyncio.create_task(self.runtime.run(self._alone))
            if self._rng.random() < 0.3:
                await asyncio.sleep(0)
                run.cancel()
            (end,) = await asyncio.gather(run, return_exceptions=True)
            self.ran[type(end).__name__] += 1

    def _alone(self) -> None:
        with self.witness.sees(None):
            time.sleep(1e-4)
            if self._rng.random() < 0.3:
                raise ZeroDivisionError

    def check(self) -> None:
        witness, metrics = self.witness, self.runtime.metrics
        assert witness.wrong == []
        assert self.ends.keys() == self.rows.keys()
        for number, end in self.ends.items():
            computed = witness.computed[number]
            if end in (StatusCode.OK, StatusCode.INTERNAL):
                assert computed == self.rows[number], (number, end)
            elif end == "cancelled":
                assert computed in (0, self.rows[number])
            else:
                assert computed == 0, (number, end)
        counts = Counter(self.ends.values())
        gone = counts["cancelled"]
        assert self.runtime.queued_rows == 0
        assert total(metrics.rows) == witness.computed.total()
        assert total(metrics.batches) <= witness.batches, (
            "callers whose gradients differ grossly are computed apart"
        )
        assert total(metrics.updates) == witness.steps
        assert 0 <= total(metrics.failed, cause="expired") - counts[StatusCode.DEADLINE_EXCEEDED] <= gone
        assert 0 <= total(metrics.failed, cause="refused") - counts[StatusCode.RESOURCE_EXHAUSTED] <= gone
        assert 0 <= total(metrics.failed, cause="failed") - counts[StatusCode.INTERNAL] <= gone


@pytest.mark.parametrize("threads", [pytest.param(1, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_every_work_ends_whatever_happens_beside_it(seed: int, threads: int) -> None:
    async def scenario() -> None:
        stress = Stress(seed, threads)
        await stress.runtime.start()
        try:
            await stress.all_at_once()
        finally:
            await stress.runtime.stop()
        stress.check()
        assert StatusCode.UNAVAILABLE not in stress.ends.values()
        assert stress.ran["NoneType"] > 0

    uvloop.run(scenario())


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize(
    "seed", [pytest.param(0, marks=pytest.mark.slow), 1, pytest.param(2, marks=pytest.mark.slow)]
)
def test_a_stop_in_the_middle_of_everything_ends_all_of_it(seed: int, threads: int) -> None:
    async def scenario() -> None:
        stress = Stress(seed, threads)
        await stress.runtime.start()
        everything = asyncio.create_task(stress.all_at_once())
        await stress.have_ended((1 + seed) * CALLERS * CALLS // 5)
        assert not everything.done()
        await stress.runtime.stop()
        await everything
        stress.check()
        assert StatusCode.UNAVAILABLE in stress.ends.values()
        assert not [t for t in threading.enumerate() if t.name.startswith("compute")]

    uvloop.run(scenario())
