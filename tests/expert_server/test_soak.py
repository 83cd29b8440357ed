"""A node in its own process, under callers that do everything wrong for minutes: its memory does not grow, and it
serves.

`python -m pytest -m slow tests/expert_server/test_soak.py`; TALKOOT_SOAK_S sets the seconds.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import linear_regression, median

import numpy as np
import psutil
import pytest
import torch
from callers import a_caller
from expert_fakes import Collected, Request, ask
from hostile_callers import Troublemakers
from node_process import found_by_a_trainer, started
from real_swarm import eventually
from victim import NodeVictim

from dht.announcements import NodeInfo
from dht.manifest import Manifest
from dht.uid import UID
from expert_server.experts.expert import Expert
from expert_server.experts.graphs import Rows
from expert_server.node import NodeTiming
from peer.loop import LoopThread
from peer.rpc.channels import ChannelPool
from trainer_client.dispatch.batches import Direction
from trainer_client.dispatch.grpc_caller import GrpcCaller

SOAK_S = float(os.environ.get("TALKOOT_SOAK_S", "600"))
CALLERS = 6
FLAT_MB = 3.0
HIDDEN, ROWS = 64, 12
MANIFEST_TOML = f"""
name = "soak"
preset = "none"
[model]
layers = 1
hidden = {HIDDEN}
heads = 2
context = 32
feed_forward = 64
[experts]
grid = [2, 2]
[routing]
top_k = 2
[optimizer]
name = "sgd"  # small differences stay small
momentum = 0.0
learning_rate = 1e-3
"""
OWN, *SHARED = (UID(0, (i, j)) for i in range(2) for j in range(2))
"""One expert for the caller that behaves, and others for those that do not."""
SETTINGS = {
    "experts": 4,
    "threads": 2,
    "max_kept_bytes": 4 * 2**20,  # soon full
    "checkpoint_every_s": 1,
    "p2pd": "off",  # its tasks come when it is ready, which would be after the first sample
}


@dataclass(frozen=True)
class Sample:
    """The memory, descriptors and tasks of the node at one moment."""

    at_s: float
    memory_mb: float
    """Resident memory."""
    descriptors: int
    threads: int
    tasks: int


def sample(node: NodeVictim) -> Sample:
    process = psutil.Process(node.process.pid)
    memory_mb = process.memory_info().rss / 2**20
    tasks = int(node.metric("talkoot_tasks"))
    return Sample(time.monotonic(), memory_mb, process.num_fds(), process.num_threads(), tasks)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[NodeVictim]:
    with started(tmp_path, MANIFEST_TOML, NodeTiming(max_call_s=5), **SETTINGS) as running:
        yield running
        assert running.process.poll() is None, "the node died"


class RightCaller:
    """Calls one expert that nobody else calls, and checks every answer with its own copy of the expert."""

    def __init__(self, node: NodeInfo, caller: GrpcCaller, manifest: Manifest) -> None:
        self.calls = 0
        self._node, self._caller = node, caller
        self._expert = Expert(OWN, manifest)

    async def call_until(self, is_over: Callable[[], bool]) -> None:
        while not is_over():
            await self.call()
            await asyncio.sleep(0.02)

    async def call(self) -> None:
        """Calls forward and backward, once with what the node has kept and once without."""
        generator = torch.Generator().manual_seed(self.calls)
        inputs, gradients = torch.randn(2, ROWS, HIDDEN, generator=generator).unbind()
        lengths, positions = torch.tensor([ROWS]), torch.arange(ROWS)
        answer = await self._ask("forward", inputs, None, keep=self.calls % 2 == 0)
        self._assert_close(answer, self._expert.forward(Rows(inputs, lengths, positions)))
        answer = await self._ask("backward", inputs, gradients, kept=answer.kept)
        (expected,), _ = self._expert.backward([Rows(inputs, lengths, positions, gradients)])
        self._assert_close(answer, expected)
        self.calls += 1

    @property
    def updates(self) -> int:
        return self._expert.update_count

    async def _ask(
        self,
        direction: Direction,
        inputs: torch.Tensor,
        gradients: torch.Tensor | None,
        keep: bool = False,
        kept: bytes | None = None,
    ) -> Collected:
        numbers = None if gradients is None else gradients.numpy()
        request = Request(OWN, [ROWS], range(ROWS), inputs.numpy(), numbers)
        answer = await ask(
            self._caller, self._node, direction, request, deadline_s=30.0, keep=keep, kept=kept
        )
        assert not answer.errors, answer.errors
        return answer

    def _assert_close(self, answer: Collected, expected: torch.Tensor) -> None:
        np.testing.assert_allclose(answer.tensor(OWN), expected.numpy(), rtol=1e-3, atol=1e-4)


class Siege:
    """Callers that make trouble for a node, and one that behaves."""

    def __init__(self, node: NodeVictim, info: NodeInfo, manifest: Manifest, swarm_id: str) -> None:
        self._channels = ChannelPool()
        self._node, self._info, self._manifest, self._swarm_id = node, info, manifest, swarm_id
        self._right = RightCaller(
            info, GrpcCaller(self._channels, swarm_id, HIDDEN, sessions=a_caller(swarm_id)), manifest
        )
        self._rounds = 0

    async def close(self) -> None:
        await self._channels.close()

    async def quiet(self) -> Sample:
        """A sample while nobody calls: the smallest that is seen with one connection."""
        await self._right.call()
        return await asyncio.to_thread(sample, self._node)

    async def trouble(self, seconds: float) -> list[Sample]:
        samples: list[Sample] = []
        calls_before = self._right.calls
        troublemakers = Troublemakers(self._info, self._manifest, self._swarm_id, SHARED, seed=self._rounds)
        self._rounds += 1
        async with asyncio.TaskGroup() as group:
            trouble = group.create_task(troublemakers.trouble(seconds, CALLERS))
            group.create_task(self._right.call_until(trouble.done))
            while not trouble.done():
                samples.append(await asyncio.to_thread(sample, self._node))
                await asyncio.wait([trouble], timeout=0.5)
        calls = self._right.calls - calls_before
        print(f"{calls} right calls beside {dict(troublemakers.made)}")
        assert calls > 0
        return samples

    async def quiet_again(self, before: Sample) -> Sample:
        """Waits until the node has no more tasks and descriptors than before."""
        now = before

        async def is_quiet() -> bool:
            nonlocal now
            now = await self.quiet()
            return now.tasks <= before.tasks and now.descriptors <= before.descriptors

        try:
            await eventually(is_quiet)
        finally:
            print(f"before {before}, after {now}")
        return now


@contextlib.asynccontextmanager
async def siege(node: NodeVictim, folder: Path) -> AsyncIterator[Siege]:
    async with found_by_a_trainer(node, folder) as (info, manifest, swarm_id):
        of_node = Siege(node, info, manifest, swarm_id)
        try:
            yield of_node
        finally:
            await of_node.close()


async def soak(node: NodeVictim, folder: Path, seconds: float) -> list[Sample]:
    """Returns samples from the time of trouble. Before and after, nobody calls."""
    async with siege(node, folder) as besiegers:
        before = await besiegers.quiet()
        samples = await besiegers.trouble(seconds)
        await besiegers.quiet_again(before)
    print([round(one.memory_mb) for one in samples[:: len(samples) // 60 + 1]])
    return samples


async def rounds(node: NodeVictim, folder: Path, seconds: float, most: int) -> list[float]:
    """How many megabytes the node's memory grows in each round of trouble, up to the first round that adds
    almost none.
    """
    grown: list[float] = []
    async with siege(node, folder) as besiegers:
        first = before = await besiegers.quiet()
        while len(grown) < most and (not grown or grown[-1] > FLAT_MB):
            await besiegers.trouble(seconds)
            after = await besiegers.quiet_again(first)
            grown.append(after.memory_mb - before.memory_mb)
            before = after
    return grown


def growth(times: Sequence[float], values: Sequence[float]) -> float:
    """The growth by the regression line from the first to the last sample, at most the difference of the running
    medians.

    To a regression line, one step in the middle, such as a new thread in a bounded pool, looks one and a half times as
    large.
    """
    running = [median(values[n : n + 5]) for n in range(len(values) - 4)]
    line = linear_regression(times, values).slope * (times[-1] - times[0])
    return min(line, max(running) - min(running))


def assert_flat(samples: Sequence[Sample]) -> None:
    """Checks that nothing grows in the second half, apart from what the allocator and calls under way cause."""
    half = samples[len(samples) // 2 :]
    minutes = (half[-1].at_s - half[0].at_s) / 60
    tolerances = {"memory_mb": 10 + 1.0 * minutes, "descriptors": 3, "threads": 2, "tasks": CALLERS}
    too_much = []
    for name, tolerance in tolerances.items():
        values = [getattr(sample, name) for sample in half]
        grown = growth([sample.at_s for sample in half], values)
        line = (
            f"{name}: median {median(values):.1f}, most {max(values):.1f}, "
            f"grown by {grown:.2f} in {minutes:.2f} min, allowed {tolerance:.2f}"
        )
        print(line)
        if grown > tolerance or max(values) > 1.1 * median(values) + 3 * CALLERS:
            too_much.append(line)
    assert not too_much


def test_growth_is_as_high_as_a_step_and_as_steep_as_a_line() -> None:
    times = [0.5 * n for n in range(80)]
    noise = [n % 5 == 0 for n in range(80)]
    assert growth(times, [17 + 2 * (n >= 40) + noise[n] for n in range(80)]) == 2
    assert 2.5 < growth(times, [17 + n // 20 + noise[n] for n in range(80)]) < 4
    assert growth(times, [3.0 * time for time in times]) == pytest.approx(3.0 * times[-1], rel=0.06)
    assert growth(times, [-time for time in times]) < 0


@pytest.mark.slow
def test_a_node_holds_no_more_after_a_little_trouble(
    node: NodeVictim, loop: LoopThread, tmp_path: Path
) -> None:
    """The allocator takes more and more at first. But memory that is never freed makes every round grow."""
    grown = loop.run(rounds(node, tmp_path, 2.5, most=8), 110)
    assert grown[-1] <= FLAT_MB, f"MB that each round added: {grown}"
    assert "Handshake failed" not in node.log.read_text()


@pytest.mark.slow
@pytest.mark.timeout(SOAK_S + 120)
def test_a_node_holds_no_more_after_long_trouble(node: NodeVictim, loop: LoopThread, tmp_path: Path) -> None:
    assert_flat(loop.run(soak(node, tmp_path, SOAK_S), SOAK_S + 90))
