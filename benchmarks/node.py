"""A node under many trainers, and a node with many experts.

Eight trainers, each a process of its own, train on one node of 16 experts: together they should reach what one alone
reaches, and the slowest at least half of its fair share. Then a node serves 256 small experts. It is measured how soon
it serves them, in how many processes, and in how much memory once each has taken a step; and the same for
hivemind.moe's server with the same experts.

    python -m benchmarks.node [--quick] [--json FILE]

`--quick` measures the trainers for a few seconds and leaves hivemind.moe out, which takes most of a minute to start.
"""

import argparse
import asyncio
import json
import signal
import sys
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.apart import Child
from benchmarks.command import command_parser, write_figures
from benchmarks.village import START_LIMIT_S, running_node
from dht.invites import Invite
from dht.manifest import Manifest
from dht.swarm import join_swarm
from peer.host import NetworkConfig
from peer.identity import Identity
from peer.rpc.channels import ChannelPool
from peer.wire import session_pb2
from trainer_client.dispatch.batches import ExpertReply, NodeBatch, NodeCall
from trainer_client.dispatch.grpc_caller import GrpcCaller

TRAINERS = 8
BATCH, HIDDEN = 64, 256
MANY_GRID, MANY_HIDDEN = (16, 16), 64
TARGETS = {
    "eight_trainers_vs_one": "at least 1.00",
    "slowest_of_fair_share": "at least 0.50",
    "many_experts_start_s": "at most 5.0",
    "many_experts_processes": "at most 3",
    "many_experts_memory_vs_bound": "at most 1.00",
}

_MANIFEST = """
name = "benchmark"
preset = "none"
[model]
layers = 1
hidden = {hidden}
heads = 4
context = 128
feed_forward = {feed_forward}
[experts]
grid = [{grid[0]}, {grid[1]}]
kind = "{kind}"
"""


def manifest(grid: tuple[int, int], hidden: int, kind: str) -> str:
    return _MANIFEST.format(grid=grid, hidden=hidden, feed_forward=4 * hidden, kind=kind)


# Many trainers


def train(invite: str, state: Path, seconds: float) -> None:
    """Runs one trainer: it prints a line when it is ready, begins when it reads one, and prints how many steps it did
    in time.
    """
    from trainer_client.client import SwarmClient, TrainerTiming
    from trainer_client.settings import TrainerSettings

    torch.set_num_threads(1)
    settings, timing = TrainerSettings(call_deadline_s=60.0), TrainerTiming(least_deadline_s=60.0)
    with SwarmClient(Invite.parse(invite), settings, state, timing=timing) as client:
        client.wait_for_experts(START_LIMIT_S, lambda text: None)
        mixture = client.mixture(0)

        def step() -> None:
            x_BTD = torch.randn(BATCH, 1, HIDDEN, requires_grad=True)
            torch.autograd.backward(mixture(x_BTD).square().mean())

        step()
        print("{}", flush=True)
        sys.stdin.readline()
        steps, ends = 0, time.monotonic() + seconds
        while time.monotonic() < ends:
            step()
            steps += 1
        print(
            json.dumps({"steps": steps, "failures": client.dispatcher.metrics.failures_by_cause()}),
            flush=True,
        )


def trainers_at_once(count: int, invite: str, folder: Path, seconds: float) -> list[float]:
    """Samples per second of each of `count` trainers at once."""
    with ExitStack() as stack:
        trainers = []
        for number in range(count):
            state = folder / f"trainer-{count}-{number}"
            arguments = ["--trainer", invite, "--state", str(state), "--seconds", str(seconds)]
            trainers.append(Child("benchmarks.node", arguments))
            stack.callback(trainers[-1].close)
        for trainer in trainers:
            trainer.hear()
        for trainer in trainers:
            trainer.tell()
        results = [trainer.hear() for trainer in trainers]
    if failed := [result["failures"] for result in results if result["failures"]]:
        raise SystemExit(f"calls failed: {failed}")
    return [BATCH * result["steps"] / seconds for result in results]


def measure_trainers(seconds: float) -> dict[str, float]:
    with running_node(manifest((4, 4), HIDDEN, "rival-ffn"), experts=16) as node:
        invite = str(node.invite)
        (alone,) = trainers_at_once(1, invite, node.folder, seconds)
        together = trainers_at_once(TRAINERS, invite, node.folder, seconds)
    return {
        "one_trainer_samples_per_s": alone,
        "eight_trainers_samples_per_s": sum(together),
        "eight_trainers_vs_one": sum(together) / alone,
        "slowest_of_fair_share": min(together) / (sum(together) / TRAINERS),
    }


# Many experts


async def step_all(invite: Invite, state: Path) -> int:
    """Sends every expert of the swarm a backward call. Returns how many experts answered."""
    swarm = await join_swarm(
        Identity.load_or_create(state / "key"), invite, NetworkConfig("127.0.0.1", serves_dht=False)
    )
    channels = ChannelPool()
    try:
        uids, width = swarm.manifest.uids(), swarm.manifest.width
        (host,) = {replica.peer_id for r in (await swarm.experts.replicas(uids)).values() for replica in r}
        node = (await swarm.registry.nodes([host]))[host]
        batch = NodeBatch.apart(uids, [1] * 4, [0] * 4)
        rows = np.random.default_rng(0).standard_normal((len(batch.rows), width)).astype(np.float32)
        sessions = swarm.session_client(session_pb2.RIGHT_BACKWARD)
        caller = GrpcCaller(channels, invite.keys.swarm_id, width, sessions=sessions)
        weights = np.ones(batch.experts.shape, np.float32)
        call = NodeCall(node, "backward", batch, 60.0, rows, weights, rows)
        replies = [reply async for reply in caller.call(call)]
        return sum(isinstance(reply, ExpertReply) and reply.error is None for reply in replies)
    finally:
        await channels.close()
        await swarm.stop()


def measure_many_experts() -> dict[str, float]:
    text = manifest(MANY_GRID, MANY_HIDDEN, "rival-ffn")
    count = MANY_GRID[0] * MANY_GRID[1]
    with running_node(text, experts=count) as node:
        (node.folder / "observer").mkdir()
        answered = asyncio.run(step_all(node.invite, node.folder / "observer"))
        if answered != count:
            raise SystemExit(f"{answered} of {count} experts answered")
        processes, memory = tree(node.pid)
        parsed = Manifest.from_toml(node.folder / "swarm.toml")
    from benchmarks.rival_blocks import RivalFeedForward

    weights = sum(p.nbytes for p in RivalFeedForward(parsed.model).parameters())
    state = count * weights * (1 + parsed.optimizer.moments)
    bound = 1.5 * state + 500 * 2**20
    return {
        "many_experts_start_s": node.start_s,
        "many_experts_processes": processes,
        "many_experts_memory_mib": memory / 2**20,
        "many_experts_state_mib": state / 2**20,
        "many_experts_memory_vs_bound": memory / bound,
    }


def serve_hivemind() -> None:
    """Runs hivemind.moe's server of the same experts until it is killed. Prints a line when it serves."""
    from hivemind.moe.server.server import background_server

    uids = [f"expert.{i}.{j}" for i in range(MANY_GRID[0]) for j in range(MANY_GRID[1])]
    optimizer = partial(torch.optim.Adam, lr=1e-3)
    with background_server(
        expert_uids=uids, expert_cls="ffn", hidden_dim=MANY_HIDDEN, device="cpu", optim_cls=optimizer
    ):
        print("{}", flush=True)
        signal.pause()


def measure_hivemind(limit_s: float) -> dict[str, float | str]:
    began = time.monotonic()
    server = Child("benchmarks.node", ["--hivemind"])
    try:
        server.hear(limit_s)
        start_s = time.monotonic() - began
        processes, memory = tree(server.pid)
        return {
            "hivemind_many_experts_start_s": start_s,
            "hivemind_many_experts_processes": processes,
            "hivemind_many_experts_memory_mib": memory / 2**20,
        }
    except TimeoutError:
        return {"hivemind_many_experts": f"not serving after {limit_s:.0f} s"}
    except SystemExit:
        return {"hivemind_many_experts": "did not start"}
    finally:
        server.close()


def tree(pid: int) -> tuple[int, int]:
    """The number of processes below and including this one, and their memory in bytes, with shared memory
    counted once.
    """
    family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    return len(family), sum(process.memory_full_info().pss for process in family)


def show(results: dict[str, float | str], console: Console) -> None:
    table = Table("", "measured", "target", title="one node: many trainers, many experts")
    for name, value in results.items():
        text = value if isinstance(value, str) else f"{value:.2f}"
        table.add_row(name.replace("_", " "), text, TARGETS.get(name, ""))
    console.print(table)


def main() -> None:
    parser = command_parser(__doc__, "fewer seconds, without hivemind.moe")
    parser.add_argument("--seconds", type=float, help="measured seconds with trainers (default: 15)")
    parser.add_argument(
        "--rival-limit", type=float, default=120.0, metavar="S", help="seconds hivemind.moe may take to start"
    )
    parser.add_argument("--trainer", metavar="INVITE", help=argparse.SUPPRESS)
    parser.add_argument("--state", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--hivemind", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.trainer:
        train(options.trainer, options.state, options.seconds)
        return
    if options.hivemind:
        serve_hivemind()
        return
    seconds = options.seconds or (5.0 if options.quick else 15.0)
    console = Console(width=110)
    results: dict[str, float | str] = {}
    with console.status("trainers"):
        results |= measure_trainers(seconds)
    with console.status("256 experts"):
        results |= measure_many_experts()
    if not options.quick:
        with console.status("256 experts of hivemind.moe"):
            results |= measure_hivemind(options.rival_limit)
    show(results, console)
    write_figures(options.json, results)


if __name__ == "__main__":
    main()
