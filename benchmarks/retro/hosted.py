"""Training that reads a memory of hosts on this machine: what distance costs, and what failures of hosts do.

The retriever, the look-ups and the training are the real ones. To measure the pace, the hosts are in a process of their
own, as nodes are, and calls to experts only wait for a round trip. Hosts that fail are in this process.
"""

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.apart import Standby
from benchmarks.memory.built import build_memory, open_shards, write_memory
from benchmarks.memory.lying import KINDS, SWARM, KnownDirectory, LocalCaller, ShardHost, opened
from benchmarks.memory.throughput import node_of
from benchmarks.retro.hosts import HOSTS, LIARS, RTT_S, placed
from benchmarks.simulated_p2p import SimulatedIdentity
from dht.announcements import NodeInfo
from dht.manifest import Manifest
from peer.identity import Identity, PeerID
from peer.loop import LoopThread
from peer.rpc.channels import ChannelPool
from peer.rpc.sessions import SessionClient
from peer.wire import session_pb2
from trainer_client.data.corpus import Dataset
from trainer_client.data.tokenizer import ByteTokenizer
from trainer_client.memory.calls import GrpcMemoryCaller, Method
from trainer_client.memory.memories import Memory
from trainer_client.model import LanguageModel
from trainer_client.retrieval.attention import RetrievalSpec
from trainer_client.retrieval.lookup import NeighbourLoader, NeighbourLookup, RetrievalCounts
from trainer_client.settings import TrainerSettings
from trainer_client.training.loop import Training
from trainer_client.training.record import Progress

Say: TypeAlias = Callable[[str], None]
"""Called with each measurement in words."""
FAULTS = ("honest", "half of them die", "forged text", "omits the best", "malformed answers")
"""The faults that are tested. In each run a quarter of the hosts has the fault; if hosts die, half of them do."""
_DYING = "half of them die"
_DIE_AFTER = 10
"""Hosts die after this many calls to all hosts together."""
_SPEC = RetrievalSpec(layers=(1,))
"""How trainers read by default."""
_BATCH, _CONTEXT, _HIDDEN = 4, 256, 128
_HELD_OUT = 50
_LIMIT_S = 60.0
_SETTLED = 12
"""The number of steps after which the pace is measured."""
_MANIFEST = Manifest.model_validate(
    {
        "name": "hosted",
        "preset": "none",
        "model": {
            "layers": 2,
            "hidden": _HIDDEN,
            "heads": 4,
            "context": _CONTEXT,
            "feed_forward": 4 * _HIDDEN,
        },
    }
)


class DyingCaller(LocalCaller):
    """Makes calls to hosts in this process, half of which die."""

    _calls = 0

    async def call(self, node: NodeInfo, method: Method, request: Any, deadline_s: float) -> Any:
        self._calls += 1
        if self._calls > _DIE_AFTER:
            self.dead.update(list(self._hosts)[::2])
        return await super().call(node, method, request, deadline_s)


class Waiting(nn.Module):
    """Takes the place of experts: it only waits for the round trips of a forward and a backward call."""

    def forward(self, x_BTD: Tensor) -> Tensor:
        result: Tensor = _Wait.apply(x_BTD)
        return result


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x_BTD: Tensor) -> Tensor:
        time.sleep(RTT_S)
        return x_BTD.clone()

    @staticmethod
    def backward(context: Any, gradient_BTD: Tensor) -> Tensor:
        time.sleep(RTT_S)
        return gradient_BTD


class HostedMemory:
    """A memory, and a text to train on."""

    def __init__(self, folder: Path, characters: float) -> None:
        """`characters`: roughly the largest number of characters of each work."""
        self._folder = folder / "memory"
        self._built, held_out = build_memory(folder / "works", _HELD_OUT, characters)
        self._manifest = write_memory(
            self._folder,
            self._built,
            self._built.vectors_ND,
            self._built.cells_NT,
            lambda number: self._built.passages[number],
        )
        self._shards = {info.root: shard for info, shard in open_shards(self._folder, self._manifest)}
        texts = [passage.text for passage in self._built.passages] + held_out
        self.passage = texts[0]
        self.tokens = np.frombuffer("\n".join(texts).encode(), np.uint8)

    @contextmanager
    def with_faults(self, loop: LoopThread, kind: str) -> Iterator[Memory]:
        """Opens the memory at hosts in this process, some of which have the fault."""
        liar = KINDS.get(kind, ShardHost)
        peers = [SimulatedIdentity(number + 1).peer_id for number in range(HOSTS)]
        hosts = self._hosts(peers, [ShardHost] * (HOSTS - LIARS) + [liar] * LIARS)
        caller = (DyingCaller if kind == _DYING else LocalCaller)(hosts)
        with opened(KnownDirectory(self._built, self._manifest, hosts), caller, loop, _LIMIT_S) as memory:
            yield memory

    @contextmanager
    def distant(self, loop: LoopThread) -> Iterator[tuple[Memory, Callable[[], float]]]:
        """Opens the memory at hosts in another process, a round trip away. Also yields a function that returns their
        CPU seconds.
        """
        with ExitStack() as stack:
            standby = Standby("benchmarks.retro.hosts", [str(self._folder)], _LIMIT_S)
            stack.callback(standby.close)
            nodes = [node_of(where) for where in standby.ask("where")["hosts"]]
            hosts = self._hosts([node.peer_id for node in nodes], [ShardHost] * HOSTS)
            identity = Identity.load_or_create(self._folder / "caller.key")

            async def connect() -> tuple[ChannelPool, SessionClient]:
                return ChannelPool(), SessionClient(identity, SWARM, (session_pb2.RIGHT_MEMORY,))

            channels, sessions = loop.run(connect())
            stack.callback(lambda: loop.run(channels.close()))
            stack.callback(lambda: loop.run(sessions.close()))
            directory = KnownDirectory(self._built, self._manifest, hosts, nodes)
            caller = GrpcMemoryCaller(channels, sessions)
            memory = stack.enter_context(opened(directory, caller, loop, _LIMIT_S))
            yield memory, lambda: standby.ask("cpu")["seconds"]

    def _hosts(self, peers: Sequence[PeerID], kinds: Sequence[type[ShardHost]]) -> list[ShardHost]:
        return [
            kind(peer_id, self._manifest, {root: self._shards[root] for root in roots})
            for peer_id, kind, roots in zip(peers, kinds, placed(self._shards), strict=True)
        ]


class Ready:
    """A source that always gives the same passage, without a look-up."""

    def __init__(self, text: str) -> None:
        tokens = torch.tensor(list(text.encode())[: _SPEC.length])
        self._given = _SPEC.nothing(_BATCH, _SPEC.chunks(_CONTEXT))
        self._given[..., : len(tokens)] = tokens

    def training(self, number: int, tokens_BT: Tensor) -> Tensor:
        return self._given

    def validation(self, batches: Sequence[Tensor]) -> list[Tensor]:
        return [self._given for _ in batches]


@dataclass
class _Pace:
    """Measures the pace of steps once a run has settled. Before that, the look-ups of the first batches are all made at
    once.
    """

    first: int
    last: int
    counts: RetrievalCounts | None
    hosts_cpu_s: Callable[[], float]
    _marks: list[dict[str, float]] = field(default_factory=list)

    def observe(self, progress: Progress) -> None:
        if progress.step in (self.first, self.last):
            counts = {} if self.counts is None else self.counts.values()
            self._marks.append(
                {
                    "s": time.monotonic(),
                    "cpu_s": time.process_time(),
                    "hosts_cpu_s": self.hosts_cpu_s(),
                    **counts,
                }
            )

    def figures(self) -> dict[str, float]:
        """What was spent between the first and the last step of the measurement."""
        before, after = self._marks
        return {"steps": self.last - self.first} | {name: after[name] - before[name] for name in after}


def train(
    tokens: NDArray[np.uint8],
    steps: int,
    source: NeighbourLookup | Ready | None,
    *,
    waits: bool,
    hosts_cpu_s: Callable[[], float] = lambda: 0.0,
) -> tuple[dict[str, Any], dict[str, float]]:
    """Trains a model. Returns the figures of the run, and those of its pace.

    `source`: where passages come from; None: the model reads nothing. `waits`: whether the model waits for experts.
    """
    settings = TrainerSettings(
        steps=steps, batch_size=_BATCH, seed=0, validation_batches=2, warmup_steps=min(20, steps // 2)
    )
    dataset = Dataset(tokens, _CONTEXT, 0, validation_share=0.02)
    spec = None if source is None else _SPEC
    model = LanguageModel(_MANIFEST, lambda layer: Waiting() if waits else nn.Identity(), retrieval=spec)
    counts = source.counts if isinstance(source, NeighbourLookup) else None
    # The time of the last step includes the validation.
    pace = _Pace(min(_SETTLED, steps // 2), steps - 1, counts, hosts_cpu_s)
    with ExitStack() as stack:
        neighbours: NeighbourLoader[Tensor, Tensor] | Ready | None
        if isinstance(source, NeighbourLookup):
            neighbours = NeighbourLoader(source, partial(dataset.batch, batch_size=_BATCH))
            stack.enter_context(closing(neighbours))
        else:
            neighbours = source
        summary = Training(model, dataset, settings, None, neighbours).run(pace.observe, threading.Event())
    figures = {"steps": summary.steps, "validation_loss": summary.validation_loss_last}
    return figures | ({} if counts is None else counts.values()), pace.figures()


def pace(hosted: HostedMemory, steps: int, rounds: int, say: Say) -> dict[str, Any]:
    """Measures how long steps take where a call to experts or hosts takes 80 ms.

    Three variants take turns, since other work on the machine varies: with look-ups, with passages that are there
    already, and with a model that reads none. Only figures of the same round are compared.
    """
    found = defaultdict[str, list[dict[str, float]]](list)
    ready = Ready(hosted.passage)
    loop = LoopThread()
    try:
        with hosted.distant(loop) as (memory, hosts_cpu_s):
            for number in range(rounds):
                sources: dict[str, NeighbourLookup | Ready | None] = {
                    "looked_up": lookup_in(memory),
                    "ready": ready,
                    "none": None,
                }
                for name, source in sources.items():
                    _, figures = train(hosted.tokens, steps, source, waits=True, hosts_cpu_s=hosts_cpu_s)
                    found[name].append(figures)
                    say(f"pace, round {number + 1} of {rounds}, {name}: {tokens_per_s(figures):.0f} tokens/s")
    finally:
        loop.close()
    return found


def tokens_per_s(figures: Mapping[str, float]) -> float:
    return figures["steps"] * _BATCH * _CONTEXT / figures["s"]


def ms_per_1000_tokens(figures: Mapping[str, float], name: str = "cpu_s") -> float:
    """Milliseconds of CPU time for 1,000 tokens."""
    return 1e6 * figures[name] / (figures["steps"] * _BATCH * _CONTEXT)


def lookup_in(memory: Memory) -> NeighbourLookup:
    return NeighbourLookup(memory, ByteTokenizer(), _SPEC, most_overlap=0.5)


def faults(hosted: HostedMemory, steps: int, say: Say) -> dict[str, Any]:
    """For each fault: how a run ended, and for how many chunks of other text it finds the same as with honest hosts."""
    found: dict[str, Any] = {}
    tokens_BT = torch.from_numpy(hosted.tokens[: 32 * (_CONTEXT + 1)].astype(np.int64)).view(32, -1)
    honest: Tensor | None = None
    loop = LoopThread()
    try:
        for kind in FAULTS:
            with hosted.with_faults(loop, kind) as memory:
                lookup = lookup_in(memory)
                figures, _ = train(hosted.tokens, steps, lookup, waits=False)
                given = lookup.learned(tokens_BT)
            honest = given if honest is None else honest
            same = float((given == honest).flatten(2).all(dim=2).float().mean())
            found[kind] = figures | {"same_neighbours": same}
            say(f"hosts: {kind}: loss {figures['validation_loss']:.4f} after {figures['steps']} steps")
    finally:
        loop.close()
    return found
