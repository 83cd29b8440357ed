"""Calls to nodes over home lines: what each request and answer takes on the links, and at the processors.

A call goes from its trainer's upload through the node's download, then to the node's processor, and back. If no hole
can be punched through a node's router, the calls go through a relay, whose links carry the bytes too. A dead node never
answers, and a node whose queue is too long refuses at once. A dispatcher uses `ModelCaller` in place of the network.

Real trainers wait for each of their calls. The calls of drawn trainers are started and reported in arrays.
"""

import asyncio
import math
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from grpc import StatusCode

from benchmarks.internet.fluid import WAY, Fluids, Integers, Jobs, Numbers
from benchmarks.internet.world import Link
from benchmarks.simulated_p2p import CALL_OVERHEAD_BYTES
from dht.announcements import NodeInfo
from dht.manifest import Manifest
from peer.codec import codec_of, encoded_bytes
from peer.errors import ExpertError
from peer.identity import PeerID
from trainer_client.dispatch.batches import AnsweredRows, CallReply, ExpertReply, Kept, NodeCall

MOST_QUEUED = 65536
"""Rows that may wait at a node: the default of its setting `max_queued_rows`."""
_QUEUES_EVERY_S = 0.1
_FORWARD, _BACKWARD = 1 / 3, 2 / 3
"""How the computing for a row is shared between the forward and the backward call."""
_HEADER_BYTES, _BYTES_OF_EXPERT = 180, 12
_BYTES_OF_ROW, _BYTES_OF_SLOT, _BYTES_OF_PRODUCT = 2, 4, 2
"""Bytes in messages, as in `expert.proto` with codecs other than fp32: for the position of a row; for each row and
weight of an expert; for each product.
"""
_LONGEST_RETRY_S, _LEAST_RETRY_S = 30.0, 0.05
_UPDATE = np.float32(0.1)
"""Experts answer this share of their inputs."""
_FIRST_ROOM = 1024
_WAYS = 3
"""The stages of a call: the way there, the processor, and the way back."""
_SILENT_AFTER_S = 25.0
"""The time after which a peer counts as silent: `peer.rpc.channels` asks after 20 s whether a peer lives, and waits 10
s for an answer.
"""


class Machine(Link, Protocol):
    """The machine of a volunteer or a trainer."""

    @property
    def rows_per_s(self) -> float:
        """Rows per second of one expert, forward and backward."""
        ...

    @property
    def is_hostile(self) -> bool: ...


@dataclass(frozen=True)
class Costs:
    """Assumptions about calls that do not depend on the machines."""

    call_s: float = 0.0005
    """Seconds of a node's processor that every call takes, however many rows it has."""
    jitter: float = 0.1
    """The standard deviation of the logarithms of delays and of computing times."""
    punched: float = 0.8
    """The share of the nodes behind routers to which a hole can be punched (Ford, Srisuresh and Kegel 2005: 82% for
    UDP).
    """


@dataclass(frozen=True)
class Sent:
    """Calls that one trainer begins at the same time. Shape: C calls."""

    nodes: Integers  # [C]
    rows: Integers  # [C]
    slots: Integers  # [C], rows of all experts
    experts: Integers  # [C]

    def bytes(self, forward: bool, row_bytes: int) -> tuple[Numbers, Numbers]:
        """Bytes of the requests and of the answers."""
        base = _HEADER_BYTES + CALL_OVERHEAD_BYTES
        experts = self.experts * _BYTES_OF_EXPERT
        tensor = self.rows * row_bytes
        back = base + tensor + self.rows * _BYTES_OF_ROW + experts
        if forward:
            there = base + tensor + self.rows * _BYTES_OF_ROW + self.slots * _BYTES_OF_SLOT + experts
            return there.astype(float), back.astype(float)
        return (base + tensor).astype(float), (back + self.slots * _BYTES_OF_PRODUCT).astype(float)


@dataclass(frozen=True)
class Told:
    """Answers and refusals of calls that drawn trainers made."""

    owners: Integers
    places: Integers
    at: Numbers
    refused: "np.ndarray[tuple[int], np.dtype[np.bool_]]"


class Calls:
    """All calls under way, and the trainers' own computing. Peers are numbered: nodes first, then trainers."""

    def __init__(
        self,
        machines: Sequence[Machine],
        nodes: int,
        row_bytes: int,
        rng: np.random.Generator,
        costs: Costs | None = None,
        slot_s: float = 0.01,
    ) -> None:
        """`machines`: those of all peers; the first `nodes` are nodes."""
        self.nodes = nodes
        self.row_bytes = row_bytes
        self.alive = np.ones(len(machines), bool)
        self._died_at = np.full(len(machines), math.inf)
        self.sent_bytes = np.zeros(len(machines))
        self.rates = np.array([machine.rows_per_s for machine in machines])
        self.hostile = np.array([machine.is_hostile for machine in machines])
        self.slot_s = slot_s
        self._costs = costs or Costs()
        self._rng = rng
        count = self._count = len(machines)
        up, down = ([getattr(m, name) / 8 for m in machines] for name in ("up_bps", "down_bps"))
        self._fluids = Fluids(np.array([*up, *down, *self.rates]), slot_s, _WAYS * nodes * (count - nodes))
        self._rtt_s = np.array([machine.rtt_s for machine in machines])
        self._relays = self._draw_relays(machines[:nodes])
        self._queued = np.zeros(nodes)
        self._queues_at = 0.0
        self._waiting: dict[int, asyncio.Future[bool]] = {}
        self._due: dict[int, list[Told]] = {}
        # Properties of each call by its tag. Tags are reused.
        self._free: list[int] = []
        self._columns = {name: np.zeros(0) for name in ("work", "back", "delay", "ends")}
        self._numbers = {
            name: np.zeros(0, np.int64) for name in ("stage", "caller", "node", "owner", "place", "rows")
        }

    @property
    def now(self) -> float:
        return self._fluids.now

    def queued_rows(self) -> Numbers:
        """Rows queued at each node, updated every few slots."""
        return self._queued

    def kill(self, peer: int) -> None:
        self.alive[peer] = False
        self._died_at[peer] = self.now

    def is_silent(self, peer: int) -> bool:
        """Whether callers have noticed that the peer is dead: connected callers only do when it has not responded for a
        while.
        """
        return bool(self.now >= self._died_at[peer] + _SILENT_AFTER_S)

    # Beginning

    def begin(
        self, caller: int, sent: Sent, forward: bool, at: float, ends: float, owner: int, places: Integers
    ) -> Integers:
        """Begins calls and returns their tags. `owner`, `places`: identify the calls in `Told`, unless `answer` waits
        for them.
        """
        count, costs = len(sent.nodes), self._costs
        there, back = sent.bytes(forward, self.row_bytes)
        tags = self._take_tags(count)
        jitter = np.exp(costs.jitter * self._rng.standard_normal((2, count)))
        relays = self._relays[sent.nodes]
        rtt_s = self._rtt_s[caller] + self._rtt_s[sent.nodes]
        rtt_s = rtt_s + np.where(relays >= 0, 2 * self._rtt_s[relays], 0.0)
        part = _FORWARD if forward else _BACKWARD
        work = (sent.slots * part + costs.call_s * self.rates[sent.nodes]) * jitter[0]
        for name, column in {
            "work": work,
            "back": back,
            "delay": rtt_s / 2 * jitter[1],
            "ends": ends,
        }.items():
            self._columns[name][tags] = column
        numbers: dict[str, int | Integers] = {"stage": 0, "caller": caller, "owner": owner, "place": places}
        for name, values in (numbers | {"node": sent.nodes, "rows": sent.slots}).items():
            self._numbers[name][tags] = values
        callers = np.full(count, caller)
        self._carry(tags, callers, sent.nodes, relays, there, np.full(count, at))
        return tags

    def compute(self, peer: int, work: float, at: float, owner: int) -> int:
        """Starts a computation on a trainer's own processor, and returns its tag."""
        tags = self._take_tags(1)
        self._columns["ends"][tags] = math.inf
        for name, number in (("stage", 3), ("caller", peer), ("node", peer), ("owner", owner), ("place", -1)):
            self._numbers[name][tags] = number
        way = np.full((1, WAY), self._fluids.nothing)
        way[0, 0] = 2 * self._count + peer
        self._fluids.add(
            Jobs(tags, way, np.array([work]), np.array([at]), np.array([math.inf]), np.array([-1]))
        )
        return int(tags[0])

    async def answer(self, tag: int) -> bool:
        """Waits for a call or a computation. Returns False if it was refused. Wait right after starting it, since tags
        are reused.
        """
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiting[tag] = future
        try:
            return await future
        finally:
            if self._waiting.get(tag) is future:
                del self._waiting[tag]

    # Time

    def step(self) -> list[Told]:
        """Lets a slot pass. Returns what drawn trainers learn in the next slot."""
        tags, at, given_up = self._fluids.step()
        if self._fluids.now >= self._queues_at:
            self._queues_at = self._fluids.now + _QUEUES_EVERY_S
            first = 2 * self._count
            waiting = self._fluids.waiting(first + self.nodes)[first:]
            self._queued = waiting / _FORWARD
        self._release(given_up)
        stages = self._numbers["stage"][tags]
        for stage, follow in enumerate((self._arrived, self._done, self._answered, self._computed)):
            some = np.flatnonzero(stages == stage)
            if len(some):
                follow(tags[some], at[some])
        return self._due.pop(round(self._fluids.now / self.slot_s), [])

    def _arrived(self, tags: Integers, at: Numbers) -> None:
        """Handles requests that have been sent in full."""
        nodes = self._numbers["node"][tags]
        at = at + self._columns["delay"][tags]
        lives = self.alive[nodes]
        self._release(tags[~lives])
        full = lives & (self._queued[nodes] + self._numbers["rows"][tags] > MOST_QUEUED)
        if full.any():
            self._tell(tags[full], at[full] + self._columns["delay"][tags[full]], True)
        taken = lives & ~full
        tags, nodes, at = tags[taken], nodes[taken], at[taken]
        ways = np.full((len(tags), WAY), self._fluids.nothing)
        ways[:, 0] = 2 * self._count + nodes
        self._numbers["stage"][tags] = 1
        groups = self._groups(tags)
        self._fluids.add(
            Jobs(tags, ways, self._columns["work"][tags], at, self._columns["ends"][tags], groups)
        )

    def _done(self, tags: Integers, at: Numbers) -> None:
        """Handles calls that nodes have computed."""
        nodes = self._numbers["node"][tags]
        lives = self.alive[nodes]
        self._release(tags[~lives])
        tags, nodes, at = tags[lives], nodes[lives], at[lives]
        callers, back = self._numbers["caller"][tags], self._columns["back"][tags]
        self._numbers["stage"][tags] = 2
        self._carry(tags, nodes, callers, self._relays[nodes], back, at)

    def _answered(self, tags: Integers, at: Numbers) -> None:
        self._tell(tags, at + self._columns["delay"][tags], False)

    def _computed(self, tags: Integers, at: Numbers) -> None:
        self._tell(tags, at, False)

    def _tell(self, tags: Integers, at: Numbers, refused: bool) -> None:
        owners, places = self._numbers["owner"][tags], self._numbers["place"][tags]
        drawn = owners >= 0
        for tag, when in zip(tags[~drawn].tolist(), at[~drawn].tolist(), strict=True):
            if (future := self._waiting.pop(tag, None)) is not None:
                future.get_loop().call_at(when, _set, future, not refused)
        self._release(tags)
        slots = np.maximum((at / self.slot_s).astype(np.int64) + 1, round(self._fluids.now / self.slot_s))
        for slot in np.unique(slots[drawn]).tolist():
            some = drawn & (slots == slot)
            told = Told(owners[some], places[some], at[some], np.full(int(some.sum()), refused))
            self._due.setdefault(slot, []).append(told)

    # Tags

    def _take_tags(self, count: int) -> Integers:
        while len(self._free) < count:
            size = len(self._numbers["stage"])
            more = max(size, _FIRST_ROOM)
            for name, column in self._columns.items():
                self._columns[name] = np.append(column, np.zeros(more))
            for name, numbers in self._numbers.items():
                self._numbers[name] = np.append(numbers, np.zeros(more, np.int64))
            self._free.extend(range(size + more - 1, size - 1, -1))
        tags = np.array(self._free[len(self._free) - count :], np.int64)
        del self._free[len(self._free) - count :]
        return tags

    def _release(self, tags: Integers) -> None:
        self._free.extend(tags.tolist())

    # Ways

    def _carry(
        self,
        tags: Integers,
        senders: Integers,
        receivers: Integers,
        relays: Integers,
        size: Numbers,
        at: Numbers,
    ) -> None:
        ways = np.full((len(tags), WAY), self._fluids.nothing)
        ways[:, 0], ways[:, 1] = senders, self._count + receivers
        through = relays >= 0
        ways[through, 2], ways[through, 3] = self._count + relays[through], relays[through]
        ends = self._columns["ends"][tags]
        self._fluids.add(Jobs(tags, ways, size, at, ends, self._groups(tags)))
        np.add.at(self.sent_bytes, senders, size)

    def _groups(self, tags: Integers) -> Integers:
        """The group of each call: calls of one trainer to one node share a connection each way, and one turn at the
        processor.
        """
        pairs = (self._numbers["caller"][tags] - self.nodes) * self.nodes + self._numbers["node"][tags]
        return pairs * _WAYS + self._numbers["stage"][tags]

    def _draw_relays(self, machines: Sequence[Machine]) -> Integers:
        """Draws the relay through which each node is called; -1: it needs none."""
        relays = np.full(len(machines), -1)
        public = [number for number, machine in enumerate(machines) if not machine.nat]
        hidden = [number for number, machine in enumerate(machines) if machine.nat]
        for number in hidden if public else ():
            if self._rng.random() >= self._costs.punched:
                relays[number] = public[int(self._rng.integers(len(public)))]
        return relays


def _set(future: "asyncio.Future[bool]", value: bool) -> None:
    if not future.done():
        future.set_result(value)


def row_bytes(manifest: Manifest) -> int:
    return encoded_bytes(1, manifest.width, codec_of(manifest.wire.codec))


class ModelCaller:
    """The network for one trainer's dispatcher."""

    def __init__(self, calls: Calls, trainer: int, numbers: dict[PeerID, int]) -> None:
        """`trainer`, `numbers`: this trainer's number and those of nodes, as in `calls`."""
        self._calls = calls
        self._trainer = trainer
        self._numbers = numbers

    def is_silent(self, node: NodeInfo) -> bool:
        return self._calls.is_silent(self._numbers[node.peer_id])

    async def call(self, call: NodeCall) -> AsyncGenerator[CallReply, None]:
        """Makes a call. Experts answer a share of their inputs; hostile nodes answer values that are far too large."""
        calls, batch = self._calls, call.batch
        number, now = self._numbers[call.node.peer_id], asyncio.get_running_loop().time()
        slots = call.slots
        counts = [len(batch.rows), int(slots.sum()), len(batch.uids)]
        sent = Sent(np.array([number]), *(np.array([count]) for count in counts))
        forward = call.direction == "forward"
        (tag,) = calls.begin(
            self._trainer, sent, forward, now, now + call.deadline_s, -1, np.array([0])
        ).tolist()
        try:
            async with asyncio.timeout(call.deadline_s):
                is_taken = await calls.answer(tag)
        except TimeoutError:
            raise ExpertError(StatusCode.DEADLINE_EXCEEDED, "no answer in time") from None
        if not is_taken:
            wait_s = float(calls.queued_rows()[number]) / float(calls.rates[number])
            raise ExpertError(
                StatusCode.RESOURCE_EXHAUSTED,
                "too many rows wait",
                retry_after_s=min(max(wait_s, _LEAST_RETRY_S), _LONGEST_RETRY_S),
            )
        for uid in batch.uids:
            yield ExpertReply(batch, uid)
        places = np.flatnonzero(slots.any(axis=1))
        factor = _UPDATE if not calls.hostile[number] else np.float32(1e9)
        if call.gradients is None:
            yield AnsweredRows(batch, places, slots[places], factor * call.inputs[places])
            yield Kept(batch, b"kept")
            return
        product = (call.gradients[places] * _UPDATE * call.inputs[places]).sum(axis=1, keepdims=True)
        products = np.where(slots[places], product, np.float32(0)).astype(np.float32)
        yield AnsweredRows(batch, places, slots[places], factor * call.gradients[places], products)
