"""Text generation with experts on a node, token by token.

Each token needs one call for each mixture, one after another. So one stream is compared with the costs that cannot be
avoided: the same model's computing in one process, and as many calls of one row; on a slow link also the round trips.
Then 16 streams that are decoded together are compared with the same in one process. The cost of computing the whole
text again for each token is measured, too. Everything is measured in one run, and the contenders take turns.

    python -m benchmarks.decoding [--quick] [--json FILE]
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Literal, TypeAlias

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.apart import end_in_order_when_stopped
from benchmarks.command import command_parser, write_figures
from benchmarks.emulated import emulated_links
from benchmarks.scratch import scratch_folder
from benchmarks.village import START_LIMIT_S, RunningNode, running_node
from dht.manifest import Manifest
from dht.swarm import Swarm, join_swarm
from expert_server.blocks import build_block
from peer.host import NetworkConfig
from peer.identity import Identity
from peer.loop import LoopThread
from peer.rpc.channels import ChannelPool
from peer.rpc.sessions import SessionClient
from peer.wire import session_pb2
from talkoot.demo.links import free_ports
from talkoot.model.opened import OpenedExperts
from talkoot.train.local import run_at_once
from trainer_client.client import SwarmClient, TrainerTiming
from trainer_client.decoding import TextDecoder
from trainer_client.dispatch.batches import AnsweredRows, CallReply, NodeBatch, NodeCall
from trainer_client.dispatch.grpc_caller import GrpcCaller
from trainer_client.model import LanguageModel
from trainer_client.moe import RemoteMixtureOfExperts
from trainer_client.routers import Routing
from trainer_client.settings import TrainerSettings

Kind: TypeAlias = Literal["transformer", "ffn"]

LAYERS, STREAMS, PROMPT = 4, 16, 64
DELAY_S = 0.05
KINDS: tuple[Kind, ...] = ("transformer", "ffn")
TARGETS = {
    "one_stream_vs_bound": "at most 1.30",
    "one_stream_at_50_ms_vs_round_trips": "at most 1.20",
    "streams_vs_local": "at least 0.50",
}
_HOST = "127.0.0.1"
_MANIFEST = """
name = "benchmark"
preset = "none"
[model]
layers = {layers}
hidden = 256
heads = 4
context = 256
feed_forward = 512
local = "attention"
[experts]
grid = [4, 4]
kind = "{kind}"
[routing]
top_k = 2
"""


def manifest(kind: str) -> str:
    return _MANIFEST.format(layers=LAYERS, kind=kind)


class Contender:
    """A model that continues several texts. `step` computes one more token of each."""

    def __init__(self, model: LanguageModel, streams: int) -> None:
        self._decoder = TextDecoder(model)
        prompts = np.random.default_rng(0).integers(0, 256, (streams, PROMPT)).tolist()
        self._sequences = [self._decoder.begin(tokens) for tokens in prompts]
        self.step()

    @property
    def texts(self) -> list[list[int]]:
        """The tokens of each text."""
        return [sequence.tokens for sequence in self._sequences]

    def step(self) -> None:
        logits_SV = self._decoder.logits(self._sequences)
        for sequence, token in zip(self._sequences, logits_SV.argmax(dim=1).tolist(), strict=True):
            sequence.append(token)


class Whole:
    """Computes the whole text for each token, as `talkoot generate` once did."""

    def __init__(self, model: LanguageModel) -> None:
        self._model = model
        self.text = np.random.default_rng(0).integers(0, 256, PROMPT).tolist()

    @torch.no_grad()
    def step(self) -> None:
        self.text.append(int(self._model(torch.tensor([self.text]))[0, -1].argmax()))


@contextmanager
def empty_calls(node: RunningNode) -> Iterator[Callable[[], object]]:
    """Makes a forward call of one row to one expert, and waits for the answer."""
    loop, channels = LoopThread(), ChannelPool()
    folder = node.folder / "empty"
    folder.mkdir()

    async def start() -> tuple[GrpcCaller, NodeCall, Swarm]:
        identity = Identity.load_or_create(folder / "key")
        swarm = await join_swarm(identity, node.invite, NetworkConfig(_HOST, serves_dht=False))
        uid = swarm.manifest.uids()[0]
        (replica, *_) = (await swarm.experts.replicas([uid]))[uid]
        info = (await swarm.registry.nodes([replica.peer_id]))[replica.peer_id]
        sessions = SessionClient(identity, node.invite.keys.swarm_id, (session_pb2.RIGHT_FORWARD,))
        caller = GrpcCaller(channels, node.invite.keys.swarm_id, swarm.manifest.width, sessions=sessions)
        batch = NodeBatch.apart([uid], [1], [0])
        row = np.random.default_rng(0).standard_normal((1, swarm.manifest.width)).astype(np.float32)
        return caller, NodeCall(info, "forward", batch, 60.0, row, np.ones((1, 1), np.float32)), swarm

    async def collect(caller: GrpcCaller, call: NodeCall) -> list[CallReply]:
        replies = [reply async for reply in caller.call(call)]
        assert any(isinstance(reply, AnsweredRows) for reply in replies), "no answer"
        return replies

    caller, call, swarm = loop.run(start())
    try:
        yield lambda: loop.run(collect(caller, call))
    finally:
        loop.run(channels.close())
        loop.run(swarm.stop())
        loop.close()


def seconds_of(steps: dict[str, Callable[[], object]], times: int) -> dict[str, float]:
    """The median time of a step of each contender. They take turns step by step, so that other work on the machine
    slows all of them.
    """
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(times):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            taken[name].append(time.perf_counter() - began)
    return {f"{name}_s": statistics.median(seconds) for name, seconds in taken.items()}


@contextmanager
def remote_model(node: RunningNode) -> Iterator[LanguageModel]:
    settings, timing = TrainerSettings(call_deadline_s=60.0), TrainerTiming(least_deadline_s=60.0)
    with SwarmClient(node.invite, settings, node.folder / "trainer", timing=timing) as client:
        client.wait_for_experts(START_LIMIT_S, lambda text: None)
        yield LanguageModel(client.manifest, client.mixture).requires_grad_(False)


def in_this_process(parsed: Manifest) -> LanguageModel:
    """The same model with all experts in this process, as `talkoot serve --model` opens it."""
    routing = Routing.of(TrainerSettings().in_swarm(parsed), parsed, 0)
    blocks = {uid: build_block(parsed, uid).eval() for uid in parsed.uids()}
    experts = OpenedExperts(parsed, blocks)
    model = LanguageModel(
        parsed, lambda layer: RemoteMixtureOfExperts(layer, parsed, experts, run_at_once, routing)
    )
    return model.requires_grad_(False)


def measure_nearby(kind: Kind, times: int) -> dict[str, float]:
    """Measures over the loopback interface."""
    with ExitStack() as stack:
        flags = ["--threads", "1", "--niceness", "0"]
        node = stack.enter_context(running_node(manifest(kind), LAYERS * 16, flags))
        parsed = Manifest.from_toml(node.folder / "swarm.toml")
        local = in_this_process(parsed)
        remote = stack.enter_context(remote_model(node))
        empty_call = stack.enter_context(empty_calls(node))
        one = {"local": Contender(local, 1).step, "remote": Contender(remote, 1).step}
        many = {"local_streams": Contender(local, STREAMS), "remote_streams": Contender(remote, STREAMS)}
        for step in (*one.values(), empty_call):
            step()
        found = seconds_of({**one, "empty_call": empty_call}, times)
        found |= seconds_of({name: contender.step for name, contender in many.items()}, times)
        found |= seconds_of({"whole": Whole(remote).step}, 5)
    bound = found["local_s"] + LAYERS * found["empty_call_s"]
    return found | {
        "one_stream_vs_bound": found["remote_s"] / bound,
        "one_stream_tokens_per_s": 1 / found["remote_s"],
        "whole_tokens_per_s": 1 / found["whole_s"],
        "streams_tokens_per_s": STREAMS / found["remote_streams_s"],
        "streams_vs_local": found["local_streams_s"] / found["remote_streams_s"],
    }


def measure_far(kind: Kind, times: int) -> dict[str, float]:
    """Measures with a round trip of 50 ms to the node."""
    target = free_ports(_HOST, 1)
    with ExitStack() as stack:
        folder = stack.enter_context(scratch_folder())
        links = stack.enter_context(emulated_links(f"{DELAY_S * 1000:.0f}ms", [target]))
        (folder / "node.toml").write_text(f"announce_port = {links.ports[0][0]}\n")
        flags = ["--config", str(folder / "node.toml"), "--port", str(target[0])]
        flags += ["--threads", "1", "--niceness", "0"]
        node = stack.enter_context(running_node(manifest(kind), LAYERS * 16, flags))
        contender = Contender(stack.enter_context(remote_model(node)), 1)
        contender.step()
        found = seconds_of({"one_stream_at_50_ms": contender.step}, times)
    vs_round_trips = found["one_stream_at_50_ms_s"] / (LAYERS * DELAY_S)
    return found | {"one_stream_at_50_ms_vs_round_trips": vs_round_trips}


def show(results: dict[str, float], console: Console) -> None:
    table = Table(title=f"{LAYERS} mixtures, hidden 256, top-2 of 16 experts; a prompt of {PROMPT} tokens")
    for column in ("", *KINDS, "goal"):
        table.add_column(column, justify="right")
    names = dict.fromkeys(key.split(".", 1)[1] for key in results)
    for name in names:
        figures = [results.get(f"{kind}.{name}") for kind in KINDS]
        table.add_row(
            name.replace("_", " "),
            *(_shown(name, figure) for figure in figures),
            TARGETS.get(name, ""),
        )
    console.print(table)


def _shown(name: str, figure: float | None) -> str:
    if figure is None:
        return ""
    is_time = name.endswith("_s") and not name.endswith("_per_s")
    return f"{figure * 1000:.2f} ms" if is_time else f"{figure:.2f}"


def main() -> None:
    parser = command_parser(__doc__, "one short round of Transformer experts, under a minute")
    options = parser.parse_args()
    end_in_order_when_stopped()
    torch.set_num_threads(1)
    results: dict[str, float] = {}
    for kind in KINDS[:1] if options.quick else KINDS:
        figures = measure_nearby(kind, 20 if options.quick else 60)
        figures |= measure_far(kind, 5 if options.quick else 20)
        results |= {f"{kind}.{name}": value for name, value in figures.items()}
    show(results, Console(width=120))
    write_figures(options.json, results)


if __name__ == "__main__":
    main()
