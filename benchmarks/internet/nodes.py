"""Nodes in a simulated world: the product's registry, hosting and membership, around experts that are only counted.

In an `InternetSwarm`, nodes join, leave, sleep and die.
"""

import asyncio
import contextlib
import math
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

from benchmarks.internet.dht_model import ModelDHT, ModelLookups, Owed, without_owing
from benchmarks.internet.stand_ins import (
    CountedCheckpoints,
    CountedExpert,
    CountingRuntime,
    SharedExperts,
    SharedRegistry,
)
from benchmarks.internet.world import HomeLine, Link, Peer, World
from benchmarks.simulated_p2p import SimulatedIdentity
from dht.announcements import Activity, NodeInfo, Reachability, Replica
from dht.experts import ExpertRegistry
from dht.founder_records import LIFETIME_S, ManifestRecord
from dht.manifest import Manifest
from dht.membership import Membership, PeerStore
from dht.records import SwarmKeys
from dht.registry import Registry
from dht.relays import RelayKeeper
from dht.uid import UID
from dht.upkeep import UpkeepPeriod
from expert_server.experts.format import Checkpoint
from expert_server.hosting.averaging import choose_partners, pause_after, replicas_to_meet
from expert_server.hosting.manager import LOOKS_PER_PERIOD, HostingManager
from expert_server.hosting.placement import serving_elsewhere
from expert_server.hosting.replicas import LocalReplicas
from expert_server.hosting.standby import StandbyCopies
from expert_server.settings import NodeSettings
from expert_server.state.transfer import Fetched
from expert_server.status import NodeRecordBuilder, NodeState, NodeStatus
from peer.averaging import last_meeting, partner_weight
from peer.clipping import believed_updates
from peer.errors import TransferError, UnreachableError
from peer.identity import PeerID
from peer.loop import RetryingRounds
from peer.parsing import ParseGuard
from peer.relays.circuits import BEAT_S
from peer.relays.dialler import HEAD_START_S
from peer.relays.reservations import ANSWERS, WANTED, SlowRelays
from peer.transport.addresses import Multiaddress
from peer.wire import state_pb2

_ASK_S = 5.0
_CHECKPOINT_EVERY_S = 60.0
_ACQUAINTANCES, _KNOWN_FOR_S = 20, 60.0
_BUFFER_S = 2.0
"""How long a small message waits at most in the queue of a home router whose line is full: assumed."""
_IN_A_ROW_S = ANSWERS * BEAT_S
"""A relay is slow after several slow answers in a row."""
_TRIPS_TO_RESERVE = 5
"""Round trips of a new connection, a session and a reservation."""


@dataclass(frozen=True)
class SwarmPlan:
    """The properties of a simulated swarm."""

    manifest: Manifest
    state_bytes: float = 7e6
    """Bytes of an expert's state with its optimizer, as transferred."""
    updates_per_s: float = 0.2
    """Updates that each replica takes per second."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings that all nodes have, apart from the number of experts they host."""


class CountedStates:
    """Stands for `StateClient`: fetching a state takes as long as the links need."""

    def __init__(self, node: "SimulatedNode") -> None:
        self._node = node

    def is_withholding(self, peer_id: PeerID) -> bool:
        return False  # simulated nodes say at once that they are busy

    async def fetch(self, node: NodeInfo, uid: UID, sha256: bytes = b"") -> Fetched:
        me, swarm = self._node.peer, self._node.swarm
        other = swarm.nodes.get(node.peer_id)
        if other is None or not swarm.world.reachable(me, other.peer):
            await asyncio.sleep(_ASK_S)
            raise TransferError(f"{node.peer_id} does not answer", answered=False)
        expert = other.runtime.experts.get(uid)
        if expert is None:
            await asyncio.sleep(swarm.world.rtt_s(me, other.peer))
            raise TransferError(f"{node.peer_id} has no {uid}", answered=True)
        count = expert.update_count
        if not await swarm.transfer(other, self._node):
            raise TransferError(f"{node.peer_id} stopped answering", answered=False)
        expert.shared_count = max(expert.shared_count, count)
        met = other.replicas.history.of(uid).get(me.peer_id)
        return Fetched(Checkpoint({}, count), b"", met.mine if met else 0)

    async def ask(
        self,
        node: NodeInfo,
        reason: int,
        uids: Collection[UID],
        sha256: bytes = b"",
        base_sha256: bytes = b"",
    ) -> int:
        me, swarm = self._node.peer, self._node.swarm
        other = swarm.nodes.get(node.peer_id)
        if other is None or not swarm.world.reachable(me, other.peer):
            await asyncio.sleep(_ASK_S)
            return 0
        await asyncio.sleep(swarm.world.rtt_s(me, other.peer))
        if reason != state_pb2.ASK_REASON_ADOPT or other.replicas.leaving or not other.peer.is_alive:
            return 0
        other.spawn(other.hosting.adopt_from(me.peer_id, list(uids)))
        return len(uids)


class SimulatedHost:
    """Stands for `Host`."""

    def __init__(self, swarm: "InternetSwarm", peer: Peer) -> None:
        self.peer_id = peer.peer_id
        self._world = swarm.world
        self._peer = peer
        self._known: tuple[PeerID, ...] = ()  # a set of them would take ten times as much memory
        self._known_until = 0.0

    def peers(self) -> frozenset[PeerID]:
        """Some of the DHT peers that the node knows."""
        world = self._world
        if world.time() >= self._known_until:
            rng = world.rng("acquaintances")
            known = world.random_servers(rng, self._peer.half, _ACQUAINTANCES)
            self._known = tuple([peer.peer_id for peer in known if peer is not self._peer])
            self._known_until = world.time() + (_KNOWN_FOR_S if known else 0.0)
        return frozenset(self._known)

    async def join(self, addresses: Sequence[Multiaddress]) -> list[Multiaddress]:
        return []

    def reached_at(self, peer_id: PeerID) -> list[Multiaddress]:
        return []

    def has_failed(self, peer_id: PeerID) -> bool:
        return False


class SimulatedReplicas(LocalReplicas):
    """Takes experts in as much time as real nodes do, since others may want the same ones."""

    async def take(self, *args: Any) -> list[UID]:
        return await without_owing(partial(super().take, *args))


@dataclass
class _Membership:
    """Stands for `dht.swarm.Swarm`, with those parts that hosting uses."""

    host: SimulatedHost
    experts: ExpertRegistry
    manifest: Manifest
    manifest_record: ManifestRecord
    peer_store: PeerStore
    guard: ParseGuard
    membership: Membership = field(init=False)

    @property
    def registry(self) -> Registry:
        return self.experts.registry

    @property
    def keys(self) -> SwarmKeys:
        return self.registry.keys

    async def keep_manifest(self) -> None:
        await self.manifest_record.republish()


class SimulatedNode:
    """A volunteer's node, from its start until it leaves or dies."""

    def __init__(
        self, swarm: "InternetSwarm", peer: Peer, experts: int, disk: dict[UID, dict[str, int]]
    ) -> None:
        """`experts`: how many to host. `disk`: the checkpoints on the machine's disk, including those of
        earlier runs.
        """
        self.swarm = swarm
        self.peer = peer
        self.disk = disk
        self.started_at = swarm.world.time()
        self.useful_since: float | None = None
        """When the node first served an expert, in seconds of the world; None: it has not yet."""
        world, plan, now = swarm.world, swarm.plan, swarm.world.now
        self.settings = swarm.settings(experts)
        rng = world.rng("nodes")
        lookups: Any = ModelLookups(swarm.dht, peer)
        identity: Any = peer.identity
        registry = SharedRegistry(lookups, swarm.keys, identity, guard=swarm.guard, now=now, rng=rng)
        registry.lookups = lookups
        self.experts = SharedExperts(registry, plan.manifest)
        self.period = UpkeepPeriod(
            self.settings.announce_every_s, lambda: registry.spent_bytes, world.rng("periods")
        )
        member: Any = _Membership(
            SimulatedHost(swarm, peer),
            self.experts,
            plan.manifest,
            ManifestRecord(registry, swarm.manifest_record, now=now),
            PeerStore(None),
            swarm.guard,
        )
        self.registry = registry
        self.membership = Membership(
            member.host, registry, member.peer_store, now=now, steady=world.time, rng=rng
        )
        self.runtime = CountingRuntime(plan.updates_per_s, world.time)
        self.checkpoints = CountedCheckpoints(disk)
        self.states = CountedStates(self)
        stand_ins: tuple[Any, Any, Any] = self.runtime, self.checkpoints, self.states
        self.replicas = SimulatedReplicas(member, *stand_ins, (), period=self.period, now=now)
        self.hosting = HostingManager(self.settings, member, self.replicas, now)
        self._standby = StandbyCopies(
            self.settings, member, self.replicas, lambda: self.hosting.seen, clock=world.time
        )
        self._record = NodeRecordBuilder(self.settings, identity.make_certificate(), now())
        restarts: Any = swarm  # The swarm stands for `Restarts`: it has `note`.
        self._rounds = RetryingRounds(self.settings.announce_every_s, restarts=restarts)
        self.relays: list[Peer] = []
        """The relays that the node has chosen, if others cannot reach it directly."""
        self._relay_keeper = RelayKeeper(member, 0, rng, world.time)
        self._slow_relays = SlowRelays(partial(rng.uniform, 0.5, 1.0))
        self._tasks: set[asyncio.Task[Any]] = set()
        self._activity = Activity.SERVING

    @property
    def takings(self) -> int:
        """How many times it has taken an expert into service."""
        return int(self.runtime.takings)

    @property
    def living_relays(self) -> list[Peer]:
        """The relays through which a node behind a router can be reached now."""
        return [relay for relay in self.relays if self.swarm.world.reachable(self.peer, relay)]

    def start(self) -> None:
        """Joins the swarm, and runs until `end` is called."""
        self.spawn(self._run())

    def spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(work, loop=self.swarm.world.loop)
        self._tasks.add(task)
        task.add_done_callback(self._note_end)

    def _note_end(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) and not isinstance(error, UnreachableError):
            self.swarm.faults.append(error)

    def end(self) -> None:
        """Ends at once, like a killed process."""
        for task in list(self._tasks):
            task.cancel()

    async def leave(self) -> None:
        """Hands its experts over, as a node does when it is stopped, and ends."""
        self._activity = Activity.LEAVING
        with contextlib.suppress(UnreachableError):
            await self._publish()
            await self._average(is_last=True)
            await self.hosting.release(self.settings.drain_timeout_s)
            await self.registry.leave(self.period.lifetime_s)
        self.swarm.remove(self)

    async def _run(self) -> None:
        """Starts and runs like `expert_server.node.Node`."""
        await self._rounds.run("start", self._keep_relays, self.hosting.take_first, self._publish)
        self._note_useful()
        self.spawn(self._look_around())
        self.spawn(self._average_now_and_then())
        self.spawn(self._copy_now_and_then())
        saved_at, owed = self.swarm.world.time(), Owed()
        self.period.begin()
        while True:
            await self._sleep(self.period.rest_s(owed.seconds), owed)
            self.period.note_round()
            await self._rounds.insist(
                "announce", self._keep_relays, self.hosting.announce, self._publish, self._stay_member
            )
            self._note_useful()
            if self.swarm.world.time() >= saved_at + _CHECKPOINT_EVERY_S:
                saved_at = self.swarm.world.time()
                self.checkpoints.save(self.runtime.experts.values())

    async def _look_around(self) -> None:
        owed = Owed()
        for look in self.hosting.looks():
            await self._rounds.run("look", look)
            self._note_useful()
            await self._sleep(self.period.drawn_s(1 / LOOKS_PER_PERIOD), owed)

    async def _average_now_and_then(self) -> None:
        every_s, rng = self.settings.average_every_s, self.swarm.world.rng("averaging")
        took_s, owed = 0.0, Owed()
        while every_s:
            await self._sleep(pause_after(every_s, took_s, rng), owed)
            began = self.swarm.world.time()
            with contextlib.suppress(UnreachableError):
                await self._average()
            took_s = self.swarm.world.time() - began + owed.seconds

    async def _copy_now_and_then(self) -> None:
        owed = Owed()
        while self.settings.standby_every_s:
            await self._sleep(self.settings.standby_every_s, owed)
            with contextlib.suppress(UnreachableError):
                await self._standby.copy()

    async def _sleep(self, seconds: float, owed: Owed) -> None:
        self.experts.regions.forget_recent()  # thousands of nodes would keep many versions of each region
        await owed.sleep(seconds)
        if self.peer.awake is not None:
            await self.peer.awake.wait()

    async def _keep_relays(self) -> None:
        """Keeps relays as `RelayKeeper` and `Reservations` do, and lets `RelayKeeper` choose them."""
        if not self.peer.link.nat:
            return
        now = self.swarm.world.time()
        self.relays = self.living_relays
        slow = [
            relay
            for relay in self.relays
            if self._slow_relays.should_replace(relay.peer_id, self.answer_s(relay, _IN_A_ROW_S), now)
        ]
        if not slow and len(self.relays) >= WANTED:
            return
        candidates = await self._relay_keeper._candidates()
        found = [self.swarm.world.by_id.get(node.peer_id) for node in candidates]
        free = [
            relay
            for relay in found
            if relay is not None and relay not in self.relays and self.swarm.world.reachable(self.peer, relay)
        ]
        while free and len(self.relays) < WANTED:
            self.relays.append(free.pop(0))
        for relay in slow[:1]:
            trial_s = _TRIPS_TO_RESERVE * self.answer_s(free[0]) if free else math.inf
            is_faster = trial_s <= self.answer_s(relay, _IN_A_ROW_S)
            self._slow_relays.searched(relay.peer_id, is_faster, now)
            if is_faster:
                self.relays[self.relays.index(relay)] = free[0]

    def answer_s(self, relay: Peer, later_s: float = 0.0) -> float:
        """How long a relay takes to answer now, or some seconds later if nothing is added to its link."""
        now = self.swarm.world.time()
        waits_s = min(_BUFFER_S, self.peer.busy_s(now)) + min(_BUFFER_S, relay.busy_s(now + later_s))
        return self.swarm.world.rtt_s(self.peer, relay) + waits_s

    async def _stay_member(self) -> None:
        await self.membership.check(announced=True)

    async def _average(self, is_last: bool = False) -> None:
        """Averages with one other replica for half of its experts; for all of them before the node leaves."""
        me, rng = self.peer.peer_id, self.swarm.world.rng("averaging")
        seen = {} if is_last else self.hosting.seen
        replicas = await replicas_to_meet(self.experts, self.runtime.experts, seen, me)
        if is_last:
            found = [rng.choice(o) for hosts in replicas.values() if (o := serving_elsewhere(hosts, me))]
        else:
            found = choose_partners(replicas, me, self._unshared, rng)
        nodes = await self.registry.nodes({replica.peer_id for replica in found}) if found else {}
        for replica in found:
            if replica.peer_id in nodes:
                with contextlib.suppress(TransferError):
                    await self._meet(replica.uid, nodes[replica.peer_id])

    def _unshared(self, replica: Replica) -> int | None:
        expert = self.runtime.experts.get(replica.uid)
        return None if expert is None else expert.update_count - expert.shared_count

    async def _meet(self, uid: UID, node: NodeInfo) -> None:
        """Replaces both replicas by their average, unless a transfer fails."""
        other = self.swarm.nodes.get(node.peer_id)
        mine = self.runtime.experts.get(uid)
        base = 0 if mine is None else mine.update_count
        theirs = (await self.states.fetch(node, uid)).checkpoint.update_count
        if mine is None or other is None or not await self.swarm.transfer(self, other):
            return
        self._take_average(other.peer.peer_id, mine, base, theirs)
        if (expert := other.runtime.experts.get(uid)) is not None:
            other._take_average(self.peer.peer_id, expert, theirs, base)

    def _take_average(self, partner: PeerID, expert: "CountedExpert", base: int, theirs: int) -> None:
        history = self.replicas.history
        believed = history.capped_claim(expert.uid, base, theirs)
        met = last_meeting(history.of(expert.uid).get(partner), 0)
        mine = believed_updates(base, believed, partner_weight(base, believed, met), 1.0)
        history.record(expert.uid, partner, mine, believed)
        expert.import_state({}, mine + expert.update_count - base)
        expert.shared_count = expert.update_count

    async def _publish(self) -> None:
        record = self._record.record(
            _status(len(self.runtime.experts), self.hosting.capacity),
            self._activity,
            self.swarm.world.now(),
            addresses=[] if self.peer.link.nat else ["203.0.113.7:50051"],
            metrics_address="",
            reachability=Reachability.RELAYED if self.peer.link.nat else Reachability.DIRECT,
            relay_addresses=[
                f"/ip4/203.0.113.7/tcp/50051/p2p/{relay.peer_id}/p2p-circuit/p2p/{self.peer.peer_id}"
                for relay in self.relays
            ],
        )
        await self.registry.publish_node(record, self.period.lifetime_s)

    def _note_useful(self) -> None:
        if self.useful_since is None and self.runtime.experts:
            self.useful_since = self.swarm.world.time()


@cache
def _status(experts: int, capacity: int) -> NodeStatus:
    """The status of a node that hosts this many experts."""
    return NodeStatus(
        NodeState.SERVING, experts, capacity, 0, 0, 0, 0, 20, "", 0, 0, 0, None, None, 0, 0, 0.0, 1,
        0, 0, 0.0, 0, 0,
    )  # fmt: skip


class InternetSwarm:
    """One swarm in a world. Add nodes, then let time pass."""

    def __init__(self, world: World, plan: SwarmPlan) -> None:
        self.world = world
        self.plan = plan
        self.dht = ModelDHT(world)
        self.guard = ParseGuard()
        self.nodes: dict[PeerID, SimulatedNode] = {}
        """The nodes that run, including sleeping ones."""
        self.takings_of_ended = 0
        self.faults: list[BaseException] = []
        """Exceptions that the product's code should not have raised."""
        founder: Any = SimulatedIdentity(0)
        self.keys = SwarmKeys(plan.manifest.name, founder.peer_id)
        lookups: Any = ModelLookups(self.dht, Peer(-1, founder, HomeLine()))
        registry = Registry(lookups, self.keys, founder, guard=self.guard, now=world.now)
        self.manifest_record = registry.sign_manifest(plan.manifest.to_json(), world.now() + LIFETIME_S)
        self._settings: dict[int, NodeSettings] = {}

    def note(self, name: str) -> None:
        """Stands for `Restarts.note` of all nodes."""
        error = sys.exception()
        if error is not None:
            self.faults.append(error)

    async def transfer(self, sender: SimulatedNode, receiver: SimulatedNode) -> bool:
        """Transfers an expert's state, which `receiver` fetches. Returns whether it arrived."""
        relays = sender.living_relays if sender.peer.link.nat else []
        if len(relays) > 1:
            # the receiver dials the second relay a second later, and takes the one that answers first
            first_s, second_s = map(receiver.answer_s, relays[:2])
            if HEAD_START_S + second_s < first_s:
                relays.reverse()
        if sender.peer.link.nat and not relays:
            await asyncio.sleep(_ASK_S)
            return False
        return await self.world.transfer(sender.peer, receiver.peer, self.plan.state_bytes, relays=relays[:1])

    def settings(self, experts: int) -> NodeSettings:
        """The settings of a node that hosts this many."""
        if experts not in self._settings:
            self._settings[experts] = NodeSettings(**{"experts": experts, **self.plan.settings})
        return self._settings[experts]

    def join(self, link: Link, experts: int, before: "SimulatedNode | None" = None) -> SimulatedNode:
        """Starts a node. `before`: the node that ran on the same machine before, whose identity and disk the new one
        has.
        """
        peer = self.world.add(link, None if before is None else before.peer.identity)
        node = SimulatedNode(self, peer, experts, {} if before is None else before.disk)
        self.nodes[peer.peer_id] = node
        node.start()
        return node

    def crash(self, node: SimulatedNode) -> None:
        """Ends a node like a killed process."""
        node.end()
        self.remove(node)

    def leave(self, node: SimulatedNode) -> None:
        """Lets a node begin to leave, which takes a while."""
        node.end()
        node.spawn(node.leave())

    def sleep(self, node: SimulatedNode) -> None:
        """Puts a node's machine to sleep: its processes stand still, and nobody reaches it."""
        node.peer.awake = asyncio.Event()
        self.world.kill(node.peer)

    def resume(self, node: SimulatedNode) -> None:
        """Wakes a node's machine up. The node continues with what it had in memory."""
        if node.peer.awake is None:
            return
        self.world.revive(node.peer)
        node.peer.awake.set()
        node.peer.awake = None

    def remove(self, node: SimulatedNode) -> None:
        self.world.kill(node.peer)
        if self.nodes.get(node.peer.peer_id) is node:
            self.takings_of_ended += node.takings
            del self.nodes[node.peer.peer_id]

    @property
    def takings(self) -> int:
        """How many times any node has taken an expert into service."""
        return self.takings_of_ended + sum(node.takings for node in self.nodes.values())

    def hosts(self) -> dict[UID, list[SimulatedNode]]:
        """The nodes that really serve each expert now: they are awake and not leaving."""
        found: dict[UID, list[SimulatedNode]] = {uid: [] for uid in self.plan.manifest.uids()}
        for node in self.nodes.values():
            if node.peer.is_alive and not node.replicas.leaving:
                for uid in node.runtime.experts:
                    found[uid].append(node)
        return found

    def share_served(self) -> float:
        """The share of all experts that somebody serves."""
        found = self.hosts()
        return sum(map(bool, found.values())) / len(found)
