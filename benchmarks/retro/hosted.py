"""Training that reads a memory of hosts on this machine: what their distance costs, and what their failures do.

The retriever, the look-ups and the training are the real ones. Hosts answer in this process, after a round trip's wait.
"""

import asyncio
import random
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from grpc import StatusCode
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.memory.built import build_memory, open_shards, write_memory
from benchmarks.memory.lying import KINDS, REPLICAS, KnownDirectory, ShardHost, opened
from benchmarks.simulated_p2p import SimulatedIdentity
from dht.announcements import NodeInfo
from dht.manifest import Manifest
from expert_server.memory.shard import Shard
from peer.errors import ExpertError
from peer.loop import LoopThread
from trainer_client.data.corpus import Dataset
from trainer_client.data.tokenizer import ByteTokenizer
from trainer_client.memory.calls import Method
from trainer_client.memory.memories import Memory
from trainer_client.model import LanguageModel
from trainer_client.retrieval.attention import RetrievalSpec
from trainer_client.retrieval.lookup import NeighbourLoader, NeighbourLookup
from trainer_client.settings import TrainerSettings
from trainer_client.training.loop import Training

RTT_S = 0.08
HOSTS = 8
FAULTS = ("honest", "half of them die", "forged text", "omits the best", "malformed answers")
"""Of a fourth of the hosts, but where they die."""
_LIARS = HOSTS // 4
_DYING = "half of them die"
_DIE_AFTER = 10
"""Calls of all hosts together."""
_SPEC = RetrievalSpec(chunk=64, neighbours=2, length=128, layers=(1,))
_BATCH, _CONTEXT, _HIDDEN = 4, 256, 128
_HELD_OUT = 50
_LIMIT_S = 60.0
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


class DistantCaller:
    """Calls that take a round trip of wall-clock time, and fail once their host has died."""

    def __init__(self, hosts: Sequence[ShardHost], rtt_s: float, *, half_die: bool) -> None:
        self._hosts = {host.peer_id: host for host in hosts}
        self._mortal = {host.peer_id for host in hosts[::2]} if half_die else set()
        self._rtt_s = rtt_s
        self._calls = 0
        self.cpu_s = 0.0
        """Of the hosts."""

    async def call(self, node: NodeInfo, method: Method, request: Any, deadline_s: float) -> Any:
        self._calls += 1
        if node.peer_id in self._mortal and self._calls > _DIE_AFTER:
            raise ExpertError(StatusCode.UNAVAILABLE, "it has died")
        host = self._hosts[node.peer_id]
        await asyncio.sleep(self._rtt_s)
        began = time.thread_time()
        answer = await host.answer(method, request)
        self.cpu_s += time.thread_time() - began
        return answer


class Waiting(nn.Module):
    """In place of experts: nothing but the round trips of a forward and of a backward call."""

    def forward(self, x_BTD: Tensor) -> Tensor:
        result: Tensor = _Wait.apply(x_BTD)  # type: ignore[no-untyped-call]  # torch has no types for it
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
    """A memory, and a text to learn from."""

    def __init__(self, folder: Path, characters: float) -> None:
        """`characters`: of each work, at most, and about."""
        self._built, held_out = build_memory(folder / "works", _HELD_OUT, characters)
        self._manifest = write_memory(
            folder / "memory",
            self._built,
            self._built.vectors_ND,
            self._built.cells_NT,
            lambda number: self._built.passages[number],
        )
        self._shards = {info.root: shard for info, shard in open_shards(folder / "memory", self._manifest)}
        texts = [passage.text for passage in self._built.passages] + held_out
        self.passage = texts[0]
        self.tokens = np.frombuffer("\n".join(texts).encode(), np.uint8)

    def hosts(self, kind: str) -> list[ShardHost]:
        """Each shard is at two of them. Those that lie are the last."""
        rng, placed = random.Random(0), [dict[bytes, Shard]() for _ in range(HOSTS)]
        for root, shard in self._shards.items():
            # no protocol finds what liars alone have
            first = rng.randrange(HOSTS - _LIARS)
            others = rng.sample([n for n in range(HOSTS) if n != first], REPLICAS - 1)
            for number in (first, *others):
                placed[number][root] = shard
        liar = KINDS.get(kind, ShardHost)
        return [
            (liar if number >= HOSTS - _LIARS else ShardHost)(
                SimulatedIdentity(number + 1).peer_id, self._manifest, some
            )
            for number, some in enumerate(placed)
        ]

    @contextmanager
    def opened(self, loop: LoopThread, kind: str, rtt_s: float) -> Iterator[tuple[Memory, DistantCaller]]:
        hosts = self.hosts(kind)
        caller = DistantCaller(hosts, rtt_s, half_die=kind == _DYING)
        with opened(KnownDirectory(self._built, self._manifest, hosts), caller, loop, _LIMIT_S) as memory:
            yield memory, caller


class Ready:
    """Passages that are there already, the same for all chunks."""

    def __init__(self, text: str) -> None:
        tokens = torch.tensor(list(text.encode())[: _SPEC.length])
        self._given = _SPEC.nothing(_BATCH, _SPEC.chunks(_CONTEXT))
        self._given[..., : len(tokens)] = tokens

    def training(self, number: int, tokens_BT: Tensor) -> Tensor:
        return self._given

    def validation(self, batches: Sequence[Tensor]) -> list[Tensor]:
        return [self._given for _ in batches]


def train(
    tokens: NDArray[np.uint8], steps: int, source: NeighbourLookup | Ready | None, *, waits: bool
) -> dict[str, Any]:
    """The figures of a run. `source`: of passages; None: its model reads nothing. `waits`: for experts."""
    settings = TrainerSettings(
        steps=steps, batch_size=_BATCH, seed=0, validation_batches=2, warmup_steps=min(20, steps // 2)
    )
    dataset = Dataset(tokens, _CONTEXT, 0, validation_share=0.02)
    spec = None if source is None else _SPEC
    model = LanguageModel(_MANIFEST, lambda layer: Waiting() if waits else nn.Identity(), retrieval=spec)
    with ExitStack() as stack:
        neighbours: NeighbourLoader[Tensor, Tensor] | Ready | None
        if isinstance(source, NeighbourLookup):
            neighbours = NeighbourLoader(source, partial(dataset.batch, batch_size=_BATCH))
            stack.enter_context(closing(neighbours))
        else:
            neighbours = source
        began_s = time.process_time()
        summary = Training(model, dataset, settings, None, neighbours).run(
            lambda progress: None, threading.Event()
        )
        cpu_s = time.process_time() - began_s
    figures = {
        "cpu_s": cpu_s,
        "steps": summary.steps,
        "tokens_per_s": summary.tokens_per_s,
        "validation_loss": summary.validation_loss_last,
    }
    return figures | (source.counts.values() if isinstance(source, NeighbourLookup) else {})


def pace(hosted: HostedMemory, steps: int, rounds: int) -> dict[str, Any]:
    """Tokens per second where a call of experts or of hosts takes 80 ms.

    In turns, since other work on the machine comes and goes: with look-ups; with passages that are there already; and
    without any, by a model that reads none. What is compared is of the same round.
    """
    found: dict[str, list[dict[str, Any]]] = {"looked_up": [], "ready": [], "none": []}
    ready = Ready(hosted.passage)
    loop = LoopThread()
    try:
        for _ in range(rounds):
            with hosted.opened(loop, "honest", RTT_S) as (memory, caller):
                looked_up = train(hosted.tokens, steps, lookup_in(memory), waits=True)
            found["looked_up"].append(looked_up | {"hosts_cpu_s": caller.cpu_s})
            found["ready"].append(train(hosted.tokens, steps, ready, waits=True))
            found["none"].append(train(hosted.tokens, steps, None, waits=True))
    finally:
        loop.close()
    tokens = steps * _BATCH * _CONTEXT
    cpu_s = {name: statistics.median(each["cpu_s"] for each in some) for name, some in found.items()}
    cpu_s["hosts"] = statistics.median(each["hosts_cpu_s"] for each in found["looked_up"])
    rates = {name: [each["tokens_per_s"] for each in some] for name, some in found.items()}
    waited = [each["memory_waited_s"] * each["tokens_per_s"] / tokens for each in found["looked_up"]]
    return {
        "tokens_per_s": rates,
        "waited_share": statistics.median(waited),
        "cpu_ms_per_1000_tokens": {name: 1e6 * each / tokens for name, each in cpu_s.items()},
    }


def lookup_in(memory: Memory) -> NeighbourLookup:
    return NeighbourLookup(memory, ByteTokenizer(), _SPEC, most_overlap=0.5)


def faults(hosted: HostedMemory, steps: int) -> dict[str, Any]:
    """By the fault, how a run ended, and for how many chunks of other text it finds what it would of honest hosts."""
    found: dict[str, Any] = {}
    tokens_BT = torch.from_numpy(hosted.tokens[: 32 * (_CONTEXT + 1)].astype(np.int64)).view(32, -1)
    honest: Tensor | None = None
    loop = LoopThread()
    try:
        for kind in FAULTS:
            with hosted.opened(loop, kind, 0.0) as (memory, _):
                lookup = lookup_in(memory)
                figures = train(hosted.tokens, steps, lookup, waits=False)
                given = lookup.learned(tokens_BT)
            honest = given if honest is None else honest
            same = float((given == honest).flatten(2).all(dim=2).float().mean())
            found[kind] = figures | {"same_neighbours": same}
    finally:
        loop.close()
    return found
