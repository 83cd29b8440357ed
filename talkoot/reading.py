"""A swarm as it is seen from outside: its nodes, experts and trainers, by what they wrote to the DHT."""

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from hivemind.p2p import PeerID

from dht.directory import Directory, View
from dht.announcements import TrainerInfo
from dht.registry import NodeInfo, Replica
from dht.swarm import Swarm

_NODES_AT_ONCE = 512
"""Node records asked for in one look-up, which has one deadline."""
_LOOK_AGAIN_S = 300.0
"""Seconds until a peer that is listed, and has no record, is looked up again."""


@dataclass(frozen=True)
class Reading:
    """A swarm at one moment, as the DHT knows it."""

    swarm: str
    view: View
    nodes: dict[PeerID, NodeInfo]
    """Nodes that host nothing included."""
    trainers: dict[PeerID, TrainerInfo] = field(default_factory=dict)
    warning: str = ""
    """That the manifest expires soon."""

    def to_dict(self) -> dict[str, Any]:
        """The form of `talkoot status --json`. Ages and times in seconds."""
        uids = self.view.manifest.uids()
        return {
            "swarm": self.swarm,
            "read_at": self.view.read_at,
            "warning": self.warning or None,
            "nodes": [_node_dict(node, self.view.read_at) for node in self.nodes.values()],
            "trainers": [_trainer_dict(trainer, self.view.read_at) for trainer in self.trainers.values()],
            "experts": {
                "total": len(uids),
                "alive": self.view.live_experts(),
                "list": [
                    {"uid": str(uid), "replicas": [_replica_dict(r) for r in self.view.replicas.get(uid, ())]}
                    for uid in uids
                ],
            },
        }


class SwarmReader:
    """Reads one swarm again and again. It only reads: it announces nothing, and calls no node but for the DHT."""

    def __init__(
        self,
        swarm: Swarm,
        *,
        list_every_s: float = 0.0,
        most_nodes: int = 65536,
        now: Callable[[], float] = time.time,
    ) -> None:
        """`list_every_s`: between two looks through the whole index of nodes; those that host experts show at once."""
        self._swarm = swarm
        self._directory = Directory(swarm.registry, swarm.manifest, refresh_every_s=1.0)
        self._list_every_s = list_every_s
        self._most_nodes = most_nodes
        self._now = now
        self._listed_at = float("-inf")
        self._idle: set[PeerID] = set()
        """Nodes that hosted nothing when they were read last."""
        self._not_there: dict[PeerID, float] = {}
        """Peers that were listed and had no record: when to look again."""

    async def read(self) -> Reading:
        """Raises UnreachableError when the DHT does not answer in time."""
        registry = self._swarm.registry
        view = await self._directory.refresh()
        if self._now() >= self._listed_at + self._list_every_s:
            await self._list()
        others = await self._nodes(self._idle - set(view.nodes))
        trainers = await registry.trainers(await registry.trainer_ids())
        record = self._swarm.manifest_record
        await record.look()
        nodes = {**view.nodes, **others}
        return Reading(self._swarm.keys.swarm_id, view, nodes, trainers, record.warning)

    async def _list(self) -> None:
        """Anybody can list peers that are not there: they are looked up seldom, and no more than `most_nodes`."""
        now = self._now()
        listed = await self._swarm.registry.node_ids(self._most_nodes)
        self._listed_at = now
        self._not_there = {p: at for p, at in self._not_there.items() if p in listed and now < at}
        self._idle = set(listed - self._not_there.keys())

    async def _nodes(self, peers: Collection[PeerID]) -> dict[PeerID, NodeInfo]:
        wanted, found = list(peers), dict[PeerID, NodeInfo]()
        for start in range(0, len(wanted), _NODES_AT_ONCE):
            found |= await self._swarm.registry.nodes(wanted[start : start + _NODES_AT_ONCE])
        look_again = self._now() + _LOOK_AGAIN_S
        for peer in wanted:
            if peer not in found:
                self._not_there[peer] = look_again
        self._idle -= self._not_there.keys()
        return found


def _node_dict(node: NodeInfo, read_at: float) -> dict[str, Any]:
    return {
        "peer_id": node.peer_id.to_base58(),
        "name": node.name or None,
        "activity": node.activity.name.lower(),
        "addresses": list(node.addresses),
        "reachability": node.reachability.name.lower(),
        "experts": node.expert_count,
        "capacity": node.expert_capacity,
        "updates": node.updates,
        "rows": node.rows_processed,
        "rows_per_s": node.rows_per_s,
        "contributed_hours": round(node.contributed_s / 3600, 1),
        "protocol_version": node.protocol_version,
        "software_version": node.software_version,
        "up_s": read_at - node.started_at,
        "expires_in_s": node.expires_at - read_at,
    }


def _trainer_dict(trainer: TrainerInfo, read_at: float) -> dict[str, Any]:
    return {
        "peer_id": trainer.peer_id.to_base58(),
        "name": trainer.name or None,
        "step": trainer.step,
        "steps": trainer.steps,
        "loss": trainer.loss,
        "validation_loss": trainer.validation_loss,
        "bits_per_byte": trainer.bits_per_byte,
        "tokens_per_s": trainer.tokens_per_s,
        "failures": dict(trainer.failures),
        "software_version": trainer.software_version,
        "up_s": read_at - trainer.started_at,
        "expires_in_s": trainer.expires_at - read_at,
    }


def _replica_dict(replica: Replica) -> dict[str, Any]:
    return {
        "peer_id": replica.peer_id.to_base58(),
        "state": replica.state.name.lower(),
        "update_count": replica.update_count,
    }
