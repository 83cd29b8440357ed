"""A node of its own under callers that do everything wrong for minutes: it holds no more than before, and serves.

`python -m pytest -m slow tests/expert_server/test_soak.py`; TALKOOT_SOAK_S sets the seconds.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import linear_regression, median

import numpy as np
import psutil
import pytest
import torch
from node_process import NodeProcess, found_by_a_trainer, started
from troublemakers import Troublemakers
from village import eventually

from dht.manifest import Manifest
from dht.registry import NodeInfo
from dht.uid import UID
from expert_server.expert import BackwardPart, Expert
from peer.channels import ChannelPool
from peer.loop import LoopThread
from trainer_client.calls import Answer, Direction, GrpcCaller, KeptAt, Request

pytestmark = pytest.mark.filterwarnings("ignore:path is deprecated:DeprecationWarning")  # hivemind's, on 3.11

SOAK_S = float(os.environ.get("TALKOOT_SOAK_S", "600"))
CALLERS = 6
HIDDEN, ROWS = 64, 12
MANIFEST_TOML = f"""
name = "soak"
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
"""One expert for the caller that is right, the others for those that are not."""
SETTINGS = {
    "experts": 4,
    "threads": 2,
    "max_call_s": 5,
    "max_kept_bytes": 4 * 2**20,  # soon full
    "checkpoint_every_s": 1,
}


@dataclass(frozen=True)
class Sample:
    """What the node holds at one moment."""

    at_s: float
    memory_mb: float
    """Resident."""
    descriptors: int
    threads: int
    tasks: int


def sample(node: NodeProcess) -> Sample:
    process = psutil.Process(node.process.pid)
    memory_mb = process.memory_info().rss / 2**20
    tasks = int(node.metric("talkoot_tasks"))
    return Sample(time.monotonic(), memory_mb, process.num_fds(), process.num_threads(), tasks)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[NodeProcess]:
    with started(tmp_path, MANIFEST_TOML, **SETTINGS) as running:
        yield running
        assert running.process.poll() is None, "the node died"


class RightCaller:
    """Calls one expert that nobody else calls, and knows every answer from its own copy of it."""

    def __init__(self, node: NodeInfo, caller: GrpcCaller, manifest: Manifest) -> None:
        self.calls = 0
        self._node, self._caller = node, caller
        self._expert = Expert(OWN, manifest)

    async def call_until(self, is_over: Callable[[], bool]) -> None:
        while not is_over():
            await self.call()
            await asyncio.sleep(0.02)

    async def call(self) -> None:
        """Forward and backward, once with what the node has kept and once without."""
        generator = torch.Generator().manual_seed(self.calls)
        inputs, gradients = torch.randn(2, ROWS, HIDDEN, generator=generator).unbind()
        lengths, positions = torch.tensor([ROWS]), torch.arange(ROWS)
        answer = await self._ask("forward", inputs, None, keep=self.calls % 2 == 0)
        self._assert_close(answer, self._expert.forward(inputs, lengths, positions))
        answer = await self._ask("backward", inputs, gradients, kept=answer.kept)
        (expected,) = self._expert.backward([BackwardPart(inputs, gradients, lengths, positions)])
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
        kept: KeptAt | None = None,
    ) -> Answer:
        request = Request(
            OWN,
            [ROWS],
            range(ROWS),
            inputs.numpy(),
            None if gradients is None else gradients.numpy(),
            keep,
            kept,
        )
        (answer,) = [a async for a in self._caller.call(self._node, direction, [request], 30.0)]
        assert answer.error is None, answer.error
        return answer

    def _assert_close(self, answer: Answer, expected: torch.Tensor) -> None:
        assert answer.tensor is not None
        np.testing.assert_allclose(answer.tensor, expected.numpy(), rtol=1e-3, atol=1e-4)


async def soak(node: NodeProcess, folder: Path, seconds: float) -> list[Sample]:
    """Samples of the time of trouble; before and after all is quiet."""
    samples: list[Sample] = []
    async with contextlib.AsyncExitStack() as stack:
        info, manifest, swarm_id = await stack.enter_async_context(found_by_a_trainer(node, folder))
        channels = ChannelPool()
        stack.push_async_callback(channels.close)
        right = RightCaller(info, GrpcCaller(channels, swarm_id, HIDDEN), manifest)
        await right.call()
        quiet = await asyncio.to_thread(sample, node)
        troublemakers = Troublemakers(info, manifest, swarm_id, SHARED)
        async with asyncio.TaskGroup() as group:
            trouble = group.create_task(troublemakers.trouble(seconds, CALLERS))
            group.create_task(right.call_until(trouble.done))
            while not trouble.done():
                samples.append(await asyncio.to_thread(sample, node))
                await asyncio.wait([trouble], timeout=0.5)
        await right.call()
        print(f"{right.calls} right calls beside {dict(troublemakers.made)}")
        assert right.calls > seconds

        async def is_quiet_again() -> bool:
            now = await asyncio.to_thread(sample, node)
            return now.tasks <= quiet.tasks and now.descriptors <= quiet.descriptors

        await eventually(is_quiet_again, 30)
    print([round(one.memory_mb) for one in samples[:: len(samples) // 60 + 1]])
    return samples


def growth(times: Sequence[float], values: Sequence[float]) -> float:
    """By the straight line through all, from the first to the last."""
    return linear_regression(times, values).slope * (times[-1] - times[0])


def assert_flat(samples: Sequence[Sample]) -> None:
    """In the second half nothing grows, but for what the allocator and calls under way make."""
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


def test_a_node_holds_no_more_after_a_little_trouble(
    node: NodeProcess, loop: LoopThread, tmp_path: Path
) -> None:
    assert_flat(loop.run(soak(node, tmp_path, 12.0), 90))


@pytest.mark.slow
@pytest.mark.timeout(SOAK_S + 120)
def test_a_node_holds_no_more_after_long_trouble(node: NodeProcess, loop: LoopThread, tmp_path: Path) -> None:
    assert_flat(loop.run(soak(node, tmp_path, SOAK_S), SOAK_S + 90))
