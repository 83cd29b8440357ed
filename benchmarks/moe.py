"""Samples per second of one mixture layer: Talkoot, hivemind.moe, and the bound, side by side in one run.

Forward, backward and an optimizer step of every called expert; 16 experts on a 4 × 4 grid, top-4, hidden 256, each
sample routed as a whole, gate and DHT on both sides, fp32 on the wire, loopback (Talkoot's with TLS). The expert
modules are hivemind's own on all sides. The bound is the same compute in one process, with recompute and fused Adam,
without network.

    python -m benchmarks.moe [--quick] [--json FILE]

Every contender runs in a process of its own, and they take turns, so that whatever else the machine does hits all.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.apart import run_apart
from benchmarks.rival_blocks import SEQUENCE, RivalFeedForward, RivalTransformer
from benchmarks.village import START_LIMIT_S, running_node
from dht.manifest import ModelSpec

GRID = (4, 4)
TOP_K = 4
HIDDEN = 256
SHAPES = {"ffn": (64, 1, HIDDEN), "transformer": (16, SEQUENCE, HIDDEN)}
BLOCKS = {"ffn": RivalFeedForward, "transformer": RivalTransformer}
TARGETS = {
    "ffn_vs_hivemind": 15.0,
    "transformer_vs_hivemind": 2.3,
    "ffn_vs_bound": 0.80,
    "transformer_vs_bound": 0.95,
}
_BRIEF_S = 5.0
_START_AND_STOP_S = 60.0

MANIFEST = """
name = "benchmark"
[model]
layers = 1
hidden = {hidden}
context = {context}
[experts]
grid = [4, 4]
kind = "rival-{case}"
[routing]
top_k = {top_k}
[optimizer]
weight_decay = 0.0
"""


def measure(step: Callable[[], None], samples: int, seconds: float) -> dict[str, float]:
    """Runs steps for a while, the first ones unmeasured. Samples per second from the median step."""
    least = 2 if seconds < _BRIEF_S else 3
    for _ in range(least):
        step()
    intervals: list[float] = []
    began = time.perf_counter()
    while time.perf_counter() - began < seconds or len(intervals) < least:
        before = time.perf_counter()
        step()
        intervals.append(time.perf_counter() - before)
    return {"samples_per_s": samples / statistics.median(intervals), "steps": len(intervals)}


def make_step(mixture: Callable[..., torch.Tensor], shape: tuple[int, ...]) -> Callable[[], None]:
    def step() -> None:
        x_BTD = torch.randn(shape, requires_grad=True)
        torch.autograd.backward(mixture(x_BTD).square().mean())

    return step


def run_bound(case: str, seconds: float) -> dict[str, float]:
    """The same compute in one process: each expert forward, then again with its graph, backward, fused Adam."""
    shape = SHAPES[case]
    blocks = [BLOCKS[case](ModelSpec(hidden=HIDDEN)) for _ in range(GRID[0] * GRID[1])]
    optimizers = [torch.optim.Adam(block.parameters(), lr=1e-3, fused=True) for block in blocks]
    gate = torch.nn.Linear(HIDDEN, sum(GRID))

    def step() -> None:
        x_BTD = torch.randn(shape)
        scores = gate(x_BTD.mean(dim=1))
        logits_BE = (scores[:, : GRID[0], None] + scores[:, None, GRID[0] :]).flatten(1)
        top_BK, chosen_BK = logits_BE.topk(TOP_K, dim=1)
        outputs = torch.zeros(shape[0], TOP_K, *shape[1:])
        where = [(chosen_BK == expert).nonzero(as_tuple=True) for expert in range(len(blocks))]
        for block, (samples, slots) in zip(blocks, where, strict=True):
            if len(samples):
                with torch.no_grad():
                    outputs[samples, slots] = _on_samples(block, x_BTD[samples])
        outputs.requires_grad_()
        weights_BK = top_BK.softmax(dim=1)
        mixed_BTD = torch.einsum("bk,bktd->btd", weights_BK, outputs)
        torch.autograd.backward(mixed_BTD.square().mean())
        assert outputs.grad is not None
        gradient_BTD = torch.zeros(shape)
        for block, optimizer, (samples, slots) in zip(blocks, optimizers, where, strict=True):
            if len(samples):
                inputs = x_BTD[samples].requires_grad_()
                torch.autograd.backward(_on_samples(block, inputs), outputs.grad[samples, slots])
                assert inputs.grad is not None
                gradient_BTD.index_add_(0, samples, inputs.grad)
                optimizer.step()
                optimizer.zero_grad()

    return measure(step, shape[0], seconds)


def _on_samples(block: torch.nn.Module, x_STD: torch.Tensor) -> torch.Tensor:
    lengths_S = torch.full((x_STD.shape[0],), x_STD.shape[1])
    output: torch.Tensor = block(x_STD.flatten(0, 1), lengths_S, lengths_S).view_as(x_STD)
    return output


def run_talkoot(case: str, seconds: float) -> dict[str, float]:
    """A node in a process of its own, started with the command; this process is the trainer."""
    from trainer_client.client import SwarmClient
    from trainer_client.settings import TrainerSettings

    manifest = MANIFEST.format(hidden=HIDDEN, context=SEQUENCE, case=case, top_k=TOP_K)
    with (
        running_node(manifest, experts=GRID[0] * GRID[1]) as node,
        SwarmClient(
            node.invite, TrainerSettings(call_deadline_s=60.0, least_deadline_s=60.0), node.folder / "trainer"
        ) as client,
    ):
        client.wait_for_experts(START_LIMIT_S, lambda text: None)
        mixture = client.mixture(0, choose_by="sequence")
        result = measure(make_step(mixture, SHAPES[case]), SHAPES[case][0], seconds)
        failures = dict(client.dispatcher.stats.failures)
    if failures:
        raise SystemExit(f"calls failed: {failures}")
    return result | {"start_s": node.start_s, "processes": 2}


def run_hivemind(case: str, seconds: float) -> dict[str, float]:
    """hivemind.moe's server in the background, as its own tests start it; this process is the client."""
    import psutil
    from hivemind import DHT
    from hivemind.moe import RemoteMixtureOfExperts
    from hivemind.moe.server.server import background_server

    uids = [f"expert.{i}.{j}" for i in range(GRID[0]) for j in range(GRID[1])]
    began = time.monotonic()
    with (
        background_server(
            expert_uids=uids,
            expert_cls=case,
            hidden_dim=HIDDEN,
            device="cpu",
            optim_cls=partial(torch.optim.Adam, lr=1e-3),
            num_handlers=os.cpu_count(),  # its default of eight for each expert is several times slower on few cores
        ) as server
    ):
        start_s = time.monotonic() - began
        processes = len(psutil.Process().children(recursive=True))
        dht = DHT(initial_peers=server.addrs, start=True, client_mode=True)
        try:
            layer = RemoteMixtureOfExperts(
                in_features=HIDDEN, grid_size=GRID, dht=dht, uid_prefix="expert.", k_best=TOP_K
            )
            mask = torch.zeros(SHAPES[case][:2], dtype=torch.bool)

            def mixture(x_BTD: torch.Tensor) -> torch.Tensor:
                output: torch.Tensor = layer(x_BTD.squeeze(1)) if case == "ffn" else layer(x_BTD, mask)
                return output

            result = measure(make_step(mixture, SHAPES[case]), SHAPES[case][0], seconds)
        finally:
            dht.shutdown()
    return result | {"start_s": start_s, "processes": processes}


CONTENDERS = {"talkoot": run_talkoot, "hivemind": run_hivemind, "bound": run_bound}


def compare(rounds: int, seconds: float, console: Console) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for case in SHAPES:
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
        for number in range(rounds):
            for name in CONTENDERS:
                with console.status(f"{case}, round {number + 1} of {rounds}: {name}"):
                    arguments = ["--contender", name, "--case", case, "--seconds", str(seconds)]
                    runs[name].append(run_apart("benchmarks.moe", arguments, _START_AND_STOP_S + 5 * seconds))
        for name, measured in runs.items():
            results[f"{case}_{name}"] = measured[-1] | {
                "samples_per_s": statistics.median(run["samples_per_s"] for run in measured)
            }
        ours = results[f"{case}_talkoot"]["samples_per_s"]
        for rival in ("hivemind", "bound"):
            results[f"{case}_vs_{rival}"] = ours / results[f"{case}_{rival}"]["samples_per_s"]
    return results


def show(results: dict[str, Any], console: Console) -> None:
    table = Table(title="one mixture layer, forward + backward + optimizer step: samples/s")
    for column in ("", *CONTENDERS, "× hivemind (target)", "of the bound (target)"):
        table.add_column(column, justify="right")
    for case in SHAPES:
        table.add_row(
            case,
            *(f"{results[f'{case}_{name}']['samples_per_s']:.1f}" for name in CONTENDERS),
            *(
                f"{results[key]:.2f} ({TARGETS[key]:.2f}) {'reached' if results[key] >= TARGETS[key] else 'missed'}"
                for key in (f"{case}_vs_hivemind", f"{case}_vs_bound")
            ),
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="one short round, under 60 seconds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--case", choices=SHAPES, default="ffn", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=None, help="measured seconds of each run")
    options = parser.parse_args()
    seconds = options.seconds or (2.0 if options.quick else 10.0)
    if options.contender:
        print(json.dumps(CONTENDERS[options.contender](options.case, seconds)))
        return
    console = Console(width=150)
    results = compare(1 if options.quick else 3, seconds, console)
    show(results, console)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
