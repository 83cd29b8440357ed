"""The contenders of the benchmark `moe`: each starts what it needs for all cases, and offers a step for each case.

A step is forward, backward and an optimizer step of every called expert.
"""

import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from math import prod

import torch
from torch import nn

from benchmarks.moe_narrow import WAYS, NarrowBound, Sizes, step_on_one_core
from benchmarks.rival_blocks import SEQUENCE, RivalFeedForward, RivalTransformer
from benchmarks.village import START_LIMIT_S, running_node
from dht.manifest import ModelSpec
from peer.layers import TransformerLayer, make_norm

GRID = (4, 4)
TOP_K = 4
HIDDEN = 256
NARROW = Sizes((16, SEQUENCE, HIDDEN), (8, 8), width=64, heads=1, feed_forward=256, top_k=TOP_K)
SHAPES = {"ffn": (64, 1, HIDDEN), "transformer": (16, SEQUENCE, HIDDEN), "narrow": NARROW.shape}
GRIDS = {"ffn": GRID, "transformer": GRID, "narrow": NARROW.grid}
BLOCKS = {"ffn": RivalFeedForward, "transformer": RivalTransformer}
IN_FLIGHT = 2
_BRIEF_S = 5.0

MANIFEST = """
name = "benchmark"
preset = "none"
[model]
layers = 1
hidden = {hidden}
context = {context}
[experts]
{experts}
[routing]
top_k = {top_k}
[optimizer]
weight_decay = 0.0
"""
EXPERTS = {
    "ffn": f'grid = {list(GRID)}\nkind = "rival-ffn"',
    "transformer": f'grid = {list(GRID)}\nkind = "rival-transformer"',
    "narrow": f'grid = {list(NARROW.grid)}\nkind = "transformer"\nwidth = {NARROW.width}\nheads = {NARROW.heads}\n'
    f"feed_forward = {NARROW.feed_forward}",
}


@dataclass(frozen=True)
class Standing:
    """A contender that has started for one case."""

    steps: Sequence[Callable[[], None]]
    """Ways to do a step. The fastest counts."""
    in_flight: Sequence[Callable[[], None]]
    """Ways to do a step when several threads do steps at once."""
    facts: dict[str, float] = field(default_factory=dict)
    failures: Callable[[], dict[str, int]] = dict
    """Returns the number of failed calls so far, by cause."""


def measure(step: Callable[[], None], samples: int, seconds: float) -> dict[str, float]:
    """Runs steps for `seconds` after some warm-up steps. Returns samples per second, from the median step."""
    least = 2 if seconds < _BRIEF_S else 3
    for _ in range(least - 1):
        step()
    intervals: list[float] = []
    began = time.perf_counter()
    while time.perf_counter() - began < seconds or len(intervals) < least:
        before = time.perf_counter()
        step()
        intervals.append(time.perf_counter() - before)
    return {"samples_per_s": samples / statistics.median(intervals), "steps": len(intervals)}


def measure_in_flight(step: Callable[[], None], samples: int, seconds: float) -> dict[str, float]:
    """Like `measure`, but with threads that each do step after step. The figure comes from the time that all steps
    take.
    """
    ready = threading.Barrier(IN_FLIGHT + 1)
    began = 0.0

    def work() -> int:
        step()
        ready.wait()  # All threads have done their first step, and the time is noted before the next.
        ready.wait()
        steps = 0
        while not steps or time.perf_counter() - began < seconds:
            step()
            steps += 1
        return steps

    with ThreadPoolExecutor(IN_FLIGHT) as threads:
        working = [threads.submit(work) for _ in range(IN_FLIGHT)]
        ready.wait()
        began = time.perf_counter()
        ready.wait()
        steps = sum(each.result() for each in working)
        return {"samples_per_s": samples * steps / (time.perf_counter() - began), "steps": steps}


def make_step(mixture: Callable[..., torch.Tensor], shape: tuple[int, ...]) -> Callable[[], None]:
    def step() -> None:
        x_BTD = torch.randn(shape, requires_grad=True)
        torch.autograd.backward(mixture(x_BTD).square().mean())

    return step


class Bound:
    """The same compute in one process: each expert forward, then again with its graph, backward, fused Adam."""

    def __init__(self, case: str) -> None:
        self._shape = SHAPES[case]
        self._blocks = [BLOCKS[case](ModelSpec(hidden=HIDDEN)) for _ in range(GRID[0] * GRID[1])]
        self._optimizers = [torch.optim.Adam(b.parameters(), lr=1e-3, fused=True) for b in self._blocks]
        self._locks = [threading.Lock() for _ in self._blocks]
        self._gate = torch.nn.Linear(HIDDEN, sum(GRID))

    def step_on_one_core(self) -> None:
        torch.set_num_threads(1)  # For this thread only.
        self.step()

    def step(self) -> None:
        x_BTD = torch.randn(self._shape)
        scores = self._gate(x_BTD.mean(dim=1))
        logits_BE = (scores[:, : GRID[0], None] + scores[:, None, GRID[0] :]).flatten(1)
        top_BK, chosen_BK = logits_BE.topk(TOP_K, dim=1)
        outputs = torch.zeros(self._shape[0], TOP_K, *self._shape[1:])
        where = [(chosen_BK == expert).nonzero(as_tuple=True) for expert in range(len(self._blocks))]
        for expert, (samples, slots) in enumerate(where):
            if len(samples):
                with torch.no_grad(), self._locks[expert]:
                    outputs[samples, slots] = _on_samples(self._blocks[expert], x_BTD[samples])
        outputs.requires_grad_()
        mixed_BTD = torch.einsum("bk,bktd->btd", top_BK.softmax(dim=1), outputs)
        torch.autograd.backward(mixed_BTD.square().mean())
        assert outputs.grad is not None
        gradient_BTD = torch.zeros(self._shape)
        for expert, (samples, slots) in enumerate(where):
            if len(samples):
                own_BTD = self._backward(expert, x_BTD[samples], outputs.grad[samples, slots])
                gradient_BTD.index_add_(0, samples, own_BTD)

    def _backward(self, expert: int, x_STD: torch.Tensor, gradients_STD: torch.Tensor) -> torch.Tensor:
        with self._locks[expert]:
            inputs = x_STD.requires_grad_()
            torch.autograd.backward(_on_samples(self._blocks[expert], inputs), gradients_STD)
            self._optimizers[expert].step()
            self._optimizers[expert].zero_grad()
        assert inputs.grad is not None
        return inputs.grad


def _on_samples(block: torch.nn.Module, x_STD: torch.Tensor) -> torch.Tensor:
    lengths_S = torch.full((x_STD.shape[0],), x_STD.shape[1])
    output: torch.Tensor = block(x_STD.flatten(0, 1), lengths_S, lengths_S).view_as(x_STD)
    return output


@contextmanager
def bound(case: str) -> Iterator[Standing]:
    if case == "narrow":
        steps = [NarrowBound(NARROW, way).step for way in WAYS]
        yield Standing(steps, [step_on_one_core(NARROW, way) for way in WAYS])
    else:
        made = Bound(case)
        yield Standing([made.step], [made.step_on_one_core])


@contextmanager
def talkoot(case: str) -> Iterator[Standing]:
    """Starts a node in a process of its own with the command. This process is the trainer."""
    from trainer_client.client import SwarmClient, TrainerTiming
    from trainer_client.settings import TrainerSettings

    torch.set_num_threads(1)  # For the trainer, whose own part is small.
    manifest = MANIFEST.format(hidden=HIDDEN, context=SEQUENCE, experts=EXPERTS[case], top_k=TOP_K)
    settings, timing = TrainerSettings(call_deadline_s=60.0), TrainerTiming(least_deadline_s=60.0)
    with (
        running_node(manifest, experts=prod(GRIDS[case])) as node,
        SwarmClient(node.invite, settings, node.folder / "trainer", timing=timing) as client,
    ):
        client.wait_for_experts(START_LIMIT_S, lambda text: None)
        mixture = client.mixture(0, choose_by="token" if case == "narrow" else "sequence")
        step = make_step(mixture, SHAPES[case])
        facts = {"start_s": node.start_s, "processes": 2}
        yield Standing([step], [step], facts, lambda: client.dispatcher.metrics.failures_by_cause())


@contextmanager
def hivemind(case: str) -> Iterator[Standing]:
    """Starts hivemind.moe's server in the background, as its own tests do. This process is the client."""
    import psutil
    from hivemind import DHT
    from hivemind.moe import RemoteMixtureOfExperts
    from hivemind.moe.server.layers import name_to_block, name_to_input
    from hivemind.moe.server.server import background_server

    rows, columns = GRIDS[case]
    uids = [f"expert.{i}.{j}" for i in range(rows) for j in range(columns)]
    if case == "narrow":
        name_to_block["narrow"], name_to_input["narrow"] = _narrow_expert, name_to_input["transformer"]
    width = NARROW.width if case == "narrow" else HIDDEN
    before = len(psutil.Process().children(recursive=True))
    began = time.monotonic()
    with (
        background_server(
            expert_uids=uids,
            expert_cls=case,
            hidden_dim=width,
            device="cpu",
            optim_cls=partial(torch.optim.Adam, lr=1e-3),
            num_handlers=os.cpu_count(),  # its default of eight for each expert is several times slower on few cores
        ) as server
    ):
        start_s = time.monotonic() - began
        processes = len(psutil.Process().children(recursive=True)) - before
        dht = DHT(initial_peers=server.addrs, start=True, client_mode=True)
        try:
            layer = RemoteMixtureOfExperts(
                in_features=width, grid_size=(rows, columns), dht=dht, uid_prefix="expert.", k_best=TOP_K
            )
            mask = torch.zeros(SHAPES[case][:2], dtype=torch.bool)
            down = nn.Sequential(make_norm("layer", HIDDEN), nn.Linear(HIDDEN, width, bias=False))
            up = nn.Linear(width, HIDDEN, bias=False)

            def mixture(x_BTD: torch.Tensor) -> torch.Tensor:
                output: torch.Tensor = layer(x_BTD.squeeze(1)) if case == "ffn" else layer(x_BTD, mask)
                return output

            def narrow_mixture(x_BTD: torch.Tensor) -> torch.Tensor:
                output: torch.Tensor = x_BTD + up(mixture(down(x_BTD)))
                return output

            step = make_step(narrow_mixture if case == "narrow" else mixture, SHAPES[case])
            yield Standing([step], [step], {"start_s": start_s, "processes": processes})
        finally:
            dht.shutdown()


class SampleTransformer(nn.Module):
    """Talkoot's narrow expert for hivemind's server: it takes whole samples [S, T, W], and a mask that it ignores."""

    def __init__(self, block: TransformerLayer) -> None:
        super().__init__()
        self.block = block

    def forward(self, x_STW: torch.Tensor, mask_ST: torch.Tensor) -> torch.Tensor:
        samples, length, _ = x_STW.shape
        lengths_S = torch.full((samples,), length)
        positions_R = torch.arange(length).repeat(samples)
        output: torch.Tensor = self.block(x_STW.flatten(0, 1), lengths_S, positions_R).view_as(x_STW)
        return output


def _narrow_expert(width: int) -> nn.Module:
    assert width == NARROW.width, "a server makes them of the width it is told"
    return SampleTransformer(NARROW.expert())


CONTENDERS: dict[str, Callable[[str], AbstractContextManager[Standing]]] = {
    "talkoot": talkoot,
    "hivemind": hivemind,
    "bound": bound,
}


def stand_by(name: str) -> None:
    """Starts for all cases, reports that it has, and measures what each line of the standard input asks for."""
    with ExitStack() as stack:
        standing = {case: stack.enter_context(CONTENDERS[name](case)) for case in SHAPES}
        print("{}", flush=True)
        for line in sys.stdin:
            asked = json.loads(line)
            case, seconds = asked["case"], asked["seconds"]
            contender, samples = standing[case], SHAPES[case][0]
            steps = contender.in_flight if asked["in_flight"] else contender.steps
            measured = measure_in_flight if asked["in_flight"] else measure
            runs = [measured(step, samples, seconds / len(steps)) for step in steps]
            result = max(runs, key=lambda run: run["samples_per_s"])
            if failures := contender.failures():
                raise SystemExit(f"calls failed: {failures}")
            print(json.dumps(result | contender.facts), flush=True)
