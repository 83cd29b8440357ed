"""A swarm without a network: real blocks behind an `ExpertCaller` that can be made to fail, and a clock that jumps."""

import asyncio
import contextlib
import functools
import math
import selectors
import time
from collections.abc import AsyncGenerator, Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from attending import attend
from grpc import StatusCode
from torch import Tensor, nn

from dht.announcements import NodeInfo, Replica, ReplicaState
from dht.directory import Directory, View
from dht.manifest import ExpertSpec, Manifest, ModelSpec, RoutingSpec
from dht.uid import UID
from expert_server.blocks import build_block
from peer.codec import Booleans, Floats, Integers
from peer.errors import ExpertError
from peer.identity import PeerID
from peer.transport.endpoints import Endpoint
from trainer_client.dispatch.batches import (
    AnsweredRows,
    CallReply,
    Direction,
    ExpertCaller,
    ExpertPart,
    ExpertReply,
    ForwardPass,
    HeldSequence,
    Kept,
    NodeBatch,
    NodeCall,
    RoutedRows,
    Segments,
    shares,
)
from trainer_client.dispatch.dispatcher import Dispatcher
from trainer_client.routers import best

T = TypeVar("T")


class _Selector(selectors.DefaultSelector):
    """Does not wait, but moves the clock forward."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready:
            assert timeout is not None, "everything waits for something that will never happen"
            self.now += max(0.0, timeout)
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """A loop that runs timers in order without waiting: when nothing else is to do, its time jumps to the next
    timer.
    """

    def __init__(self) -> None:
        self._virtual = _Selector()
        super().__init__(self._virtual)

    def time(self) -> float:
        return self._virtual.now


class VirtualRunner:
    """Runs coroutines one after another on one loop.

    `asyncio.Runner` is not used: after each run on the main thread it turns its SIGINT handler's state into an error,
    which includes the task's result as text. For arrays that takes longer than the tests themselves.
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
    """How an expert or a peer answers: with which error, if any, and after how many seconds."""

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
    """One call as the node received it."""

    made: NodeCall
    began: float

    @property
    def peer_id(self) -> PeerID:
        return self.made.node.peer_id

    @property
    def direction(self) -> Direction:
        return self.made.direction

    @property
    def deadline_s(self) -> float:
        return self.made.deadline_s

    @property
    def batch(self) -> NodeBatch:
        return self.made.batch

    @property
    def uids(self) -> list[UID]:
        return list(self.batch.uids)


async def send_to_best(
    dispatcher: Dispatcher,
    inputs: Floats,
    scores: Sequence[Floats],
    k: int,
    sequence_length: int,
    keep: bool = False,
    held: Sequence[HeldSequence] | None = None,
) -> ForwardPass:
    """Makes a forward pass of layer 0 in which each row is sent to its best live experts."""
    live = await dispatcher.find(0, scores, k)
    segments = Segments.whole(len(inputs) // sequence_length, sequence_length)
    rows = RoutedRows(0, live.tables[-1].shape, inputs, scores, k, segments, keep, held=held)
    return await dispatcher.send(rows, best(scores, live.tables, k), live)


@dataclass(frozen=True, eq=False)
class ExpertWork:
    """The part of a call that one expert of a node computes."""

    uid: UID
    inputs: Floats  # [m, W]
    lengths: Integers
    positions: Integers
    gradients: Floats | None = None  # [m, W], of its updates


@dataclass(frozen=True, eq=False)
class Request:
    """Rows that are for one expert only."""

    uid: UID
    lengths: Sequence[int]
    positions: Sequence[int]
    inputs: Floats  # [r, W]
    gradients: Floats | None = None  # [r, W]


def make_call(
    node: NodeInfo,
    direction: Direction,
    requests: Sequence[Request],
    deadline_s: float,
    *,
    keep: bool = False,
    kept: bytes | None = None,
) -> NodeCall:
    """A call in which each expert has its own rows, in the order of the requests."""
    counts = [len(request.inputs) for request in requests]
    experts = np.repeat(np.arange(len(requests)), counts)[:, None]
    batch = NodeBatch(
        np.arange(sum(counts)),
        np.concatenate([np.array(request.lengths) for request in requests]),
        np.concatenate([np.array(request.positions) for request in requests]),
        tuple(request.uid for request in requests),
        experts,
    )
    gradients = None
    if direction == "backward":
        gradients = np.concatenate([g for request in requests if (g := request.gradients) is not None])
    return NodeCall(
        node,
        direction,
        batch,
        deadline_s,
        np.concatenate([request.inputs for request in requests]),
        np.ones(experts.shape, np.float32),
        gradients,
        keep=keep,
        kept=kept,
        counts=np.ones(experts.shape, np.bool_),
    )


@dataclass(eq=False)
class Collected:
    """The results of a call."""

    call: NodeCall
    replies: list[CallReply] = field(default_factory=list)
    error: ExpertError | None = None
    seconds: float = 0.0

    @property
    def status(self) -> StatusCode | None:
        return self.error.status if self.error is not None else None

    @property
    def kept(self) -> bytes | None:
        return next((reply.request_id for reply in self.replies if isinstance(reply, Kept)), None)

    @property
    def answered(self) -> list[UID]:
        """The experts that have answered all their rows, in the order of their last answers."""
        left, found = {part.uid: set(part.places.tolist()) for part in self.call.batch.parts()}, []
        for reply in self.replies:
            if isinstance(reply, AnsweredRows):
                for uid, places in left.items():
                    had = bool(places)
                    places -= set(reply.places.tolist())
                    if had and not places:
                        found.append(uid)
        return found

    @property
    def errors(self) -> dict[UID, ExpertError]:
        said = [reply for reply in self.replies if isinstance(reply, ExpertReply)]
        return {reply.uid: reply.error for reply in said if reply.error is not None}

    @property
    def update_counts(self) -> dict[UID, int]:
        return {r.uid: r.update_count for r in self.replies if isinstance(r, ExpertReply) and r.error is None}

    def tensor(self, uid: UID) -> Floats:
        """The answers of an expert whose rows are its own."""
        (places,) = [part.places for part in self.call.batch.parts() if part.uid == uid]
        found = np.full_like(self.call.inputs, np.nan)
        for reply in self.replies:
            if isinstance(reply, AnsweredRows):
                found[reply.places] = reply.tensor
        assert np.isfinite(found[places]).all(), "not all rows were answered"
        return found[places]


async def collect(caller: ExpertCaller, call: NodeCall) -> Collected:
    collected, began = Collected(call), time.monotonic()
    try:
        async for reply in caller.call(call):
            collected.replies.append(reply)
    except ExpertError as error:
        collected.error = error
    collected.seconds = time.monotonic() - began
    return collected


async def ask(
    caller: ExpertCaller,
    node: NodeInfo,
    direction: Direction,
    *requests: Request,
    deadline_s: float = 20.0,
    keep: bool = False,
    kept: bytes | None = None,
) -> Collected:
    """Makes a call and collects the answers. Raises ExpertError."""
    collected = await collect(caller, make_call(node, direction, requests, deadline_s, keep=keep, kept=kept))
    if collected.error is not None:
        raise collected.error
    return collected


def works_of(call: NodeCall) -> list[tuple[ExpertPart, ExpertWork]]:
    """What the node computes for a call, expert by expert."""
    batch, works = call.batch, []
    share = shares(call.weights, batch.asked)
    for part in batch.parts():
        gradients = None
        if call.gradients is not None:
            gradients = share[part.places, part.slots][:, None] * call.gradients[part.places]
        works.append(
            (part, ExpertWork(part.uid, call.inputs[part.places], *batch.segments(part.places), gradients))
        )
    return works


class FakeDirectory(Directory):
    """A directory with fixed contents."""

    def __init__(self, view: View) -> None:
        self.view = view
        self.forgotten: list[PeerID] = []

    def forget(self, peer_id: PeerID) -> None:
        self.forgotten.append(peer_id)


class FakeSwarm:
    """All experts of a manifest, with expert i at peer i modulo `peers`. It is its trainers' `ExpertCaller`.

    Its blocks take no optimizer steps. A call without an answer ends `overshoot_s` after its deadline, like a real one.
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
        """`more_hosts`: peers that have a replica of every expert."""
        uids = self.manifest.uids() if live is None else list(live)
        replicas = {
            uid: tuple(make_replica(uid, peer_id) for peer_id in (self.peer_of[uid], *more_hosts))
            for uid in uids
        }
        nodes = {peer_id: make_node(peer_id) for peer_id in (*self.peer_of.values(), *more_hosts)}
        return FakeDirectory(View(self.manifest, replicas, nodes, 1.0))

    def block(self, uid: UID) -> nn.Module:
        if uid not in self._blocks:
            self._blocks[uid] = _attending_block(self.manifest, uid, len(self._blocks))
        return self._blocks[uid]

    def called(self, direction: Direction) -> list[Call]:
        return [call for call in self.calls if call.direction == direction]

    def rows_sent(self, direction: Direction, uid: UID) -> int:
        return sum(
            len(part.places)
            for call in self.called(direction)
            for part in call.batch.parts()
            if part.uid == uid
        )

    async def call(self, call: NodeCall) -> AsyncGenerator[CallReply, None]:
        """Answers each row when all of its experts have ended, or at 80% of the deadline with the answers so far."""
        began, peer_id, batch = now(), call.node.peer_id, call.batch
        self.calls.append(Call(call, began))
        try:
            peer, ends = self._behaviour(peer_id), began + call.deadline_s
            await self._wait_until(began + peer.after_s, ends)
            if peer.error is not None:
                raise peer.error
            behaviours = {uid: self._behaviour(uid) for uid in batch.uids}
            works = sorted(works_of(call), key=lambda work: behaviours[work[0].uid].after_s)
            answered, over = np.zeros_like(batch.asked), ~batch.asked
            updates, gradients = np.zeros((2, *batch.asked.shape, call.inputs.shape[1]), np.float32)
            sent = np.zeros(len(batch.rows), np.bool_)
            flush_at = began + 0.8 * call.deadline_s
            for part, work in works:
                behaviour = behaviours[part.uid]
                due = began + peer.after_s + behaviour.after_s
                if due > flush_at > now():
                    await self._wait_until(flush_at, ends)
                    ready = answered.any(axis=1) & ~sent
                    if ready.any():
                        yield self._answer(call, ready, answered, updates, gradients)
                    sent |= ready
                await self._wait_until(due, ends)
                over[part.places, part.slots] = True
                if behaviour.error is not None:
                    yield ExpertReply(batch, part.uid, behaviour.error)
                else:
                    yield ExpertReply(batch, part.uid, update_count=self.update_count(peer_id, part.uid))
                    answered[part.places, part.slots] = True
                    updates[part.places, part.slots] = self.compute("forward", work)
                    if call.direction == "backward":
                        gradients[part.places, part.slots] = self.compute("backward", work)
                ready = over.all(axis=1) & answered.any(axis=1) & ~sent
                if now() >= flush_at:
                    ready = answered.any(axis=1) & ~sent
                if ready.any():
                    yield self._answer(call, ready, answered, updates, gradients)
                sent |= ready
        finally:
            self.ended += 1

    def _answer(
        self, call: NodeCall, ready: Booleans, answered: Booleans, updates: Floats, gradients: Floats
    ) -> AnsweredRows:
        places = np.flatnonzero(ready)
        mask, f = answered[ready], updates[ready]
        if call.gradients is None:
            means = (shares(call.weights[ready], mask)[..., None] * f).sum(axis=1)
            return AnsweredRows(call.batch, places, mask, means.astype(np.float32))
        products = np.where(mask, (call.gradients[ready][:, None] * f).sum(axis=2), 0).astype(np.float32)
        total = gradients[ready].sum(axis=1).astype(np.float32)
        return AnsweredRows(call.batch, places, mask, total, products)

    def update_count(self, peer_id: PeerID, uid: UID) -> int:
        return 0

    def compute(self, direction: Direction, work: ExpertWork) -> Floats:
        """What the expert computes for these rows."""
        inputs = torch.from_numpy(work.inputs.copy())
        with torch.enable_grad():
            inputs.requires_grad_(direction == "backward")
            outputs: Tensor = self.block(work.uid)(
                inputs, torch.from_numpy(work.lengths), torch.from_numpy(work.positions)
            )
            answered = outputs - inputs
            if direction == "backward":
                assert work.gradients is not None
                (answered,) = torch.autograd.grad(answered, inputs, torch.from_numpy(work.gradients))
        answer: Floats = answered.detach().numpy()
        return answer

    def _behaviour(self, of: UID | PeerID) -> Behaviour:
        return self.behaviours.get(of, WELL)

    async def _wait_until(self, due: float, ends: float) -> None:
        """Waits until `due`. Raises DEADLINE_EXCEEDED if the deadline comes first."""
        left = (due if due < ends else ends + self.overshoot_s) - now()
        if left > 0:
            await asyncio.sleep(left)
        if due >= ends:
            raise ExpertError(StatusCode.DEADLINE_EXCEEDED, "no answer in time")


@functools.lru_cache(1024)
def _attending_block(manifest: Manifest, uid: UID, seed: int) -> nn.Module:
    """A block for all swarms of such a manifest, since properties make hundreds of these. Nobody changes it."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return attend(build_block(manifest, uid)).requires_grad_(False)


def make_peer_id(number: int) -> PeerID:
    return PeerID(b"\x12\x20" + number.to_bytes(32, "big"))


def make_node(peer_id: PeerID) -> NodeInfo:
    return NodeInfo(peer_id=peer_id, addresses=(Endpoint("127.0.0.1:1"),), expires_at=math.inf)


def make_replica(uid: UID, peer_id: PeerID) -> Replica:
    return Replica(uid, peer_id, ReplicaState.SERVING, 0, 0, 0.0, math.inf)


def make_manifest(
    grid: tuple[int, ...],
    k: int = 1,
    kind: str = "transformer",
    prefix: int = 0,
    width: int | None = None,
    gate_width: int | None = None,
    product_keys: bool = True,
    **model: Any,
) -> Manifest:
    small = {"layers": 1, "hidden": 8, "heads": 2, "context": 16, "local_layers": 1, "feed_forward": 16}
    return Manifest(
        name="sauna",
        model=ModelSpec.model_validate(small | model),
        experts=ExpertSpec(grid=grid, kind=kind, width=width),
        routing=RoutingSpec(top_k=k, prefix=prefix, product_keys=product_keys, gate_width=gate_width),
    )


def random_rows(rows: int, width: int = 8, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal((rows, width), dtype=np.float32)
