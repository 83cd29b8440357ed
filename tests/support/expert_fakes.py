"""A swarm without a network: real blocks behind an `ExpertCaller` that fails when told, and a clock that jumps."""

import asyncio
import contextlib
import math
import selectors
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from grpc import StatusCode
from torch import Tensor, nn

from dht.announcements import NodeInfo, Replica, ReplicaState
from dht.directory import Directory, View
from dht.manifest import ExpertSpec, Manifest, ModelSpec, RoutingSpec
from dht.uid import UID
from expert_server.blocks import build_block
from peer.codec import Floats
from peer.errors import ExpertError
from peer.identity import PeerID
from peer.transport.endpoints import Endpoint
from trainer_client.dispatch.batches import (
    Answer,
    Direction,
    ExpertBatch,
    ForwardPass,
    KeptForward,
    NodeCall,
    Request,
    RoutedRows,
)
from trainer_client.dispatch.dispatcher import Dispatcher
from trainer_client.routers import best

T = TypeVar("T")


class _Selector(selectors.DefaultSelector):
    """Instead of waiting, it lets time pass."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready:
            assert timeout is not None, "everything waits for something that will never happen"
            self.now += max(0.0, timeout)
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """Runs timers in order and at once: `time()` jumps to the next one when there is nothing else to do."""

    def __init__(self) -> None:
        self._virtual = _Selector()
        super().__init__(self._virtual)

    def time(self) -> float:
        return self._virtual.now


class VirtualRunner:
    """Runs coroutines one after the other on one loop.

    Not an `asyncio.Runner`: at the end of each run on the main thread, that makes an error of its SIGINT handler,
    and with it a text of the task's result. For arrays this takes longer than the tests themselves.
    """

    def __init__(self) -> None:
        self._loop = VirtualLoop()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self._loop.run_until_complete(coroutine)

    def get_loop(self) -> VirtualLoop:
        return self._loop

    def close(self) -> None:
        left = asyncio.all_tasks(self._loop)
        for task in left:
            task.cancel()
        if left:
            self._loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()


@contextlib.contextmanager
def virtual_time() -> Iterator[VirtualRunner]:
    runner = VirtualRunner()
    try:
        yield runner
    finally:
        runner.close()


def now() -> float:
    return asyncio.get_running_loop().time()


@dataclass(frozen=True)
class Behaviour:
    """How an expert or a peer answers: with which error, if any, and how many seconds late."""

    status: StatusCode | None = None
    after_s: float = 0.0
    retry_after_s: float = 0.0

    @property
    def error(self) -> ExpertError | None:
        return None if self.status is None else ExpertError(self.status, "as told", self.retry_after_s)


WELL = Behaviour()
SILENT = Behaviour(after_s=math.inf)


def fails(status: StatusCode = StatusCode.UNAVAILABLE, after_s: float = 0.0) -> Behaviour:
    return Behaviour(status, after_s)


@dataclass(frozen=True)
class Call:
    """One call to one node, as the node saw it."""

    peer_id: PeerID
    direction: Direction
    requests: Sequence[Request]
    deadline_s: float
    began: float

    @property
    def uids(self) -> list[UID]:
        return [request.batch.uid for request in self.requests]


async def send_to_best(
    dispatcher: Dispatcher,
    inputs: Floats,
    scores: Sequence[Floats],
    k: int,
    sequence_length: int,
    keep: bool = False,
) -> ForwardPass:
    """A forward pass of layer 0 in which each row is sent to its best live experts."""
    live = await dispatcher.find(0, scores, k)
    rows = RoutedRows(0, inputs, scores, k, sequence_length, keep)
    return await dispatcher.send(rows, best(scores, live.tables, k), live)


def make_request(
    uid: UID,
    lengths: Sequence[int],
    positions: Sequence[int],
    inputs: Floats,
    gradients: Floats | None = None,
    *,
    keep: bool = False,
    kept: KeptForward | None = None,
) -> Request:
    """One that stands alone: its rows are all there are."""
    rows = np.arange(len(inputs))
    batch = ExpertBatch(uid, rows, np.zeros_like(rows), np.array(lengths), np.array(positions))
    return Request(batch, inputs, gradients, keep, kept)


class FakeDirectory(Directory):
    """Knows what it is told."""

    def __init__(self, view: View) -> None:
        self.view = view
        self.forgotten: list[PeerID] = []

    def forget(self, peer_id: PeerID) -> None:
        self.forgotten.append(peer_id)


class FakeSwarm:
    """All experts of a manifest, expert i hosted by peer i modulo `peers`. The `ExpertCaller` of its trainers.

    Its blocks take no optimizer steps. A call without an answer ends `overshoot_s` after its deadline, as real ones do.
    """

    overshoot_s = 0.01

    def __init__(self, manifest: Manifest, peers: int | None = None) -> None:
        self.manifest = manifest
        self.peer_of = {
            uid: make_peer_id(i % (peers or len(manifest.uids()))) for i, uid in enumerate(manifest.uids())
        }
        self.behaviours: dict[UID | PeerID, Behaviour] = {}
        self.calls: list[Call] = []
        self.ended = 0
        self._blocks: dict[UID, nn.Module] = {}

    def directory(
        self, live: Iterable[UID] | None = None, more_hosts: Iterable[PeerID] = ()
    ) -> FakeDirectory:
        """`more_hosts` have a replica of every expert."""
        uids = self.manifest.uids() if live is None else list(live)
        replicas = {
            uid: tuple(make_replica(uid, peer_id) for peer_id in (self.peer_of[uid], *more_hosts))
            for uid in uids
        }
        nodes = {peer_id: make_node(peer_id) for peer_id in (*self.peer_of.values(), *more_hosts)}
        return FakeDirectory(View(self.manifest, replicas, nodes, 1.0))

    def block(self, uid: UID) -> nn.Module:
        if uid not in self._blocks:
            self._blocks[uid] = build_block(self.manifest, uid).requires_grad_(False)
        return self._blocks[uid]

    def called(self, direction: Direction) -> list[Call]:
        return [call for call in self.calls if call.direction == direction]

    def rows_sent(self, direction: Direction, uid: UID) -> int:
        return sum(
            len(request.inputs)
            for call in self.called(direction)
            for request in call.requests
            if request.batch.uid == uid
        )

    async def call(self, call: NodeCall) -> AsyncIterator[Answer]:
        began, peer_id = now(), call.node.peer_id
        self.calls.append(Call(peer_id, call.direction, call.requests, call.deadline_s, began))
        try:
            peer, ends = self._behaviour(peer_id), began + call.deadline_s
            await self._wait_until(began + peer.after_s, ends)
            if peer.error is not None:
                raise peer.error
            parts = [(self._behaviour(request.batch.uid), request) for request in call.requests]
            for behaviour, request in sorted(parts, key=lambda part: part[0].after_s):
                await self._wait_until(began + peer.after_s + behaviour.after_s, ends)
                if behaviour.error is None:
                    yield Answer(request.batch, peer_id, self.compute(call.direction, request))
                else:
                    yield Answer(request.batch, peer_id, None, behaviour.error)
        finally:
            self.ended += 1

    def compute(self, direction: Direction, request: Request) -> Floats:
        """What the expert answers."""
        inputs = torch.from_numpy(request.inputs.copy())
        with torch.enable_grad():
            inputs.requires_grad_(direction == "backward")
            outputs: Tensor = self.block(request.batch.uid)(
                inputs, torch.from_numpy(request.batch.lengths), torch.from_numpy(request.batch.positions)
            )
            answered = outputs - inputs
            if direction == "backward":
                assert request.gradients is not None
                (answered,) = torch.autograd.grad(answered, inputs, torch.from_numpy(request.gradients))
        answer: Floats = answered.detach().numpy()
        return answer

    def _behaviour(self, of: UID | PeerID) -> Behaviour:
        return self.behaviours.get(of, WELL)

    async def _wait_until(self, due: float, ends: float) -> None:
        """Raises DEADLINE_EXCEEDED when `due` is not before the end."""
        left = (due if due < ends else ends + self.overshoot_s) - now()
        if left > 0:
            await asyncio.sleep(left)
        if due >= ends:
            raise ExpertError(StatusCode.DEADLINE_EXCEEDED, "no answer in time")


def make_peer_id(number: int) -> PeerID:
    return PeerID(b"\x12\x20" + number.to_bytes(32, "big"))


def make_node(peer_id: PeerID) -> NodeInfo:
    return NodeInfo(peer_id, (Endpoint("127.0.0.1:1"),), b"", 1, "0", 1, 1, 0, 0, 0.0, (), math.inf)


def make_replica(uid: UID, peer_id: PeerID) -> Replica:
    return Replica(uid, peer_id, ReplicaState.SERVING, 0, 0, 0.0, math.inf)


def make_manifest(
    grid: tuple[int, ...],
    k: int = 1,
    kind: str = "transformer",
    prefix: int = 0,
    width: int | None = None,
    **model: int | str,
) -> Manifest:
    small = {"layers": 1, "hidden": 8, "heads": 2, "context": 16, "local_layers": 1, "feed_forward": 16}
    return Manifest(
        name="sauna",
        model=ModelSpec.model_validate(small | model),
        experts=ExpertSpec(grid=grid, kind=kind, width=width),
        routing=RoutingSpec(top_k=k, prefix=prefix),
    )


def random_rows(rows: int, width: int = 8, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal((rows, width), dtype=np.float32)
