"""An observer of a chaos run: it sends every replica the same rows again and again, and records the answers."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from benchmarks.chaos.accounts import Death, Observation
from benchmarks.chaos.swarm import HOST, ChaosSwarm, Node
from dht.announcements import NodeInfo, Replica, ReplicaState
from dht.invites import Invite
from dht.swarm import Swarm, join_swarm
from dht.uid import UID
from peer.codec import Floats
from peer.errors import ExpertError, UnreachableError
from peer.host import NetworkConfig
from peer.identity import Identity, PeerID
from peer.rpc.channels import ChannelPool
from peer.wire import session_pb2
from trainer_client.dispatch.batches import AnsweredRows, ExpertReply, NodeBatch, NodeCall
from trainer_client.dispatch.grpc_caller import GrpcCaller

logger = logging.getLogger(__name__)

TOLERANCE = 0.75
"""The largest difference between two answers, against the larger of them. Honest replicas that had taken 25, 100 and
200 updates apart and never averaged differed by up to 0.45, 0.58 and 0.56.
"""
_ROWS = 4
_CALL_S = 2.0
_BEFORE_DEATH_S = 1.0
_LOOK_EVERY_S = 2.0
_LARGEST = 1e4
"""No row that a sound expert answers is larger."""


class Watcher:
    """Joins the swarm as a trainer does. Call `stop` when done."""

    def __init__(self, swarm: Swarm, chaos: ChaosSwarm, clock: Callable[[], float] = time.monotonic) -> None:
        self.observations: list[Observation] = []
        self.deaths: list[Death] = []
        self.probes = 0
        self.wrong: list[str] = []
        """Answers that no sound expert would give."""
        self.differing = 0
        """How many pairs of replicas answered the same rows too differently."""
        self._swarm = swarm
        self._chaos = chaos
        self._clock = clock
        self._began = clock()
        self._channels = ChannelPool()
        width = swarm.manifest.width
        swarm_id = swarm.keys.swarm_id
        sessions = swarm.session_client(session_pb2.RIGHT_FORWARD)
        self._caller = GrpcCaller(self._channels, swarm_id, width, sessions=sessions)
        self._rows: Floats = np.random.default_rng(0).standard_normal((_ROWS, width)).astype(np.float32)
        self._known: dict[str, dict[str, int]] = {}
        """Node → expert → update count, as in each node's last answer."""
        self._infos: dict[PeerID, NodeInfo] = {}
        self._replicas: dict[UID, tuple[Replica, ...]] = {}
        self._tasks: list[asyncio.Task[None]] = []

    @classmethod
    async def join(cls, invite: Invite, chaos: ChaosSwarm, folder: Path) -> "Watcher":
        identity = Identity.load_or_create(folder / "identity.key")
        swarm = await join_swarm(identity, invite, NetworkConfig(HOST, serves_dht=False), state=folder)
        watcher = cls(swarm, chaos)
        watcher._tasks = [
            asyncio.create_task(swarm.membership.keep(5.0)),
            asyncio.create_task(watcher._keep_looking()),
        ]
        return watcher

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._channels.close()
        await self._swarm.stop()

    def begin(self) -> None:
        """Sets the time to 0: all times are counted from now on."""
        self._began = self._clock()
        self.observations = [Observation(0.0, self._counts())]

    def served(self) -> int:
        """The number of experts that answered the last time."""
        return len(self._counts())

    def replicas(self) -> int:
        return sum(map(len, self._counts().values()))

    async def note_death(self, node: Node, deed: str) -> None:
        """Records a node's death. Call it just before the node dies."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_BEFORE_DEATH_S):
                await self._probe(node)
        saved: dict[str, int] = {}
        for each in self._chaos.nodes:
            for uid, count in self._chaos.checkpoints(each).items():
                saved[uid] = max(saved.get(uid, 0), count)
        self.deaths.append(Death(self._clock() - self._began, node.name, self._counts(), saved, deed))
        self._known.pop(node.name, None)

    async def look(self) -> None:
        """Sends the rows to all replicas that are reachable."""
        uids = self._swarm.manifest.uids()
        with contextlib.suppress(UnreachableError):
            self._replicas = await self._swarm.experts.replicas(uids)
            peers = {replica.peer_id for hosts in self._replicas.values() for replica in hosts}
            self._infos |= await self._swarm.registry.nodes(peers)
        well = [node for node in self._chaos.nodes if node.is_well]
        answers = await asyncio.gather(*(self._probe(node) for node in well))
        self.observations.append(Observation(self._clock() - self._began, self._counts()))
        self._compare([tensors for tensors in answers if tensors])

    async def _keep_looking(self) -> None:
        while True:
            await self.look()
            await asyncio.sleep(_LOOK_EVERY_S)

    async def _probe(self, node: Node) -> dict[UID, Floats]:
        """What each expert of a node answers for the rows. Empty if the node does not answer."""
        life = node.lives
        info = next((i for p, i in self._infos.items() if p.to_base58() == node.peer_id), None)
        uids = self._announced_by(node)
        if info is None or not uids:
            return {}
        batch = NodeBatch.apart(uids, [_ROWS], range(_ROWS))
        weights = np.ones(batch.experts.shape, np.float32)
        call = NodeCall(info, "forward", batch, _CALL_S, np.tile(self._rows, (len(uids), 1)), weights)
        counts, tensors = dict[str, int](), dict[UID, Floats]()
        try:
            async for reply in self._caller.call(call):
                match reply:
                    case ExpertReply(error=None):
                        counts[str(reply.uid)] = reply.update_count
                    case AnsweredRows():
                        of_rows = batch.experts[reply.places, 0]
                        tensors |= {uids[e]: reply.tensor[of_rows == e] for e in np.unique(of_rows).tolist()}
        except ExpertError as error:
            logger.debug("%s did not answer: %s", node.name, error)
            return {}
        if node.lives == life and node.child is not None and node.child.exit_status is None:
            self._known[node.name] = counts
        self._check(node, tensors)
        return tensors

    def _announced_by(self, node: Node) -> list[UID]:
        return [
            uid
            for uid, hosts in self._replicas.items()
            if any(
                r.peer_id.to_base58() == node.peer_id
                and r.state in (ReplicaState.SERVING, ReplicaState.LEAVING)
                for r in hosts
            )
        ]

    def _check(self, node: Node, tensors: dict[UID, Floats]) -> None:
        self.probes += len(tensors)
        for uid, tensor in tensors.items():
            if tensor.shape != self._rows.shape or not np.isfinite(tensor).all():
                self.wrong.append(f"{node.name} {uid}: not finite")
            elif float(np.abs(tensor).max()) > _LARGEST:
                self.wrong.append(f"{node.name} {uid}: {np.abs(tensor).max():.3g}")

    def _compare(self, answers: Sequence[dict[UID, Floats]]) -> None:
        for number, some in enumerate(answers):
            for others in answers[number + 1 :]:
                for uid in some.keys() & others.keys():
                    self.differing += difference(some[uid], others[uid]) > TOLERANCE

    def _counts(self) -> dict[str, dict[str, int]]:
        counts: dict[str, dict[str, int]] = {}
        for node, experts in self._known.items():
            for uid, count in experts.items():
                counts.setdefault(uid, {})[node] = count
        return counts


def difference(one: Floats, other: Floats) -> float:
    """How far two answers [R, W] are apart: 0 when they are equal, 1 when one is zero, 2 at most."""
    largest = max(float(np.linalg.norm(one)), float(np.linalg.norm(other)))
    return float(np.linalg.norm(one - other)) / max(largest, 1e-6)
