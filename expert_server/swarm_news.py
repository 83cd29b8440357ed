"""News of the rest of the swarm for a node's owner: who has gone, who trains, and what the model has learned."""

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass

from dht.announcements import Replica, ReplicaState
from dht.memory import MemoryID
from dht.registry import Registry, some_of
from dht.uid import UID
from expert_server.memory.placement import SeenShard, ShardKey
from peer.formatting import age_in_words, counted
from peer.identity import PeerID
from peer.rates import pause_at_rate

logger: logging.Logger = logging.getLogger(__name__)

_MOST_ASKED = 16
"""The most nodes that are looked up at once."""
_MOST_NAMED = 64
"""The most hosts whose names are looked up and remembered."""
_MOST_READ = 8
"""The most trainers whose records are read, drawn at random. Trainers average, so their losses are alike."""
TRAINERS_EVERY_S, _LONGEST_PAUSE_S = 60.0, 1800.0
"""The pause between two looks at the trainers."""
_OLD_S = 120.0
"""Younger losses count as present ones."""
_BYTES_PER_S = 100.0
"""The average traffic of these looks. Among 24 nodes, one takes 65 KB, as much as all else in a period."""


@dataclass(frozen=True)
class TrainingNews:
    """How the swarm's training goes. Losses are the lowest validation loss of the trainers that are active or have just
    left, in nats per token.
    """

    trainers: int | None = None
    """About how many are active; None: not known yet."""
    loss: float | None = None
    """The last loss that the node heard of."""
    loss_at_first: float | None = None
    """The first loss that the node heard of."""
    heard_at: float | None = None
    """When the node last heard of a loss, by its monotonic clock."""


class SwarmNews:
    """Watches the swarm's trainers, and notices nodes that no longer host the experts or passages they did."""

    def __init__(
        self,
        registry: Registry,
        seen: Callable[[], Mapping[UID, tuple[Replica, ...]]],
        seen_shards: Callable[[], Mapping[ShardKey, SeenShard]],
        trainers_here: Callable[[], int],
        trainers_every_s: float = TRAINERS_EVERY_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`seen`: the replicas that this node saw in its last look. `seen_shards`: the shards of memories, of which a
        look sees only some. `trainers_here`: how many use its experts now.
        """
        self.training: TrainingNews = TrainingNews()
        self._registry = registry
        self._seen = seen
        self._seen_shards = seen_shards
        self._trainers_here = trainers_here
        self._hosts: frozenset[PeerID] = frozenset()
        self._regions: Mapping[tuple[MemoryID, int], Set[PeerID]] = {}
        """The hosts in each region of a memory that the last look read."""
        self._doubted: dict[PeerID, float] = {}
        """When the records of missing hosts expire, unless they are renewed."""
        self._gone: set[PeerID] = set()
        """Hosts that were reported, but are still announced somewhere."""
        self._trainers_every_s = trainers_every_s
        self._clock = clock
        self._next_at = float("-inf")
        self._names: dict[PeerID, str] = {}
        """The names of hosts; empty for those that have none."""

    async def look(self) -> None:
        """Raises UnreachableError."""
        await self._note_gone()
        now = self._clock()
        if now < self._next_at:
            return
        spent = self._registry.spent_bytes
        listed, about = await self._registry.some_trainer_ids(_MOST_READ)
        some = some_of(listed, _MOST_READ)
        # a run may begin and end between two looks; a trainer that leaves announces its last loss
        read = await self._registry.trainers(some, with_left=True)
        active = sum(not info.left for info in read.values())
        # anybody can list trainers that don't exist
        live = round(about * active / max(1, len(some)))
        before = self.training
        losses = [info.validation_loss for info in read.values() if info.validation_loss is not None]
        loss, heard_at = (min(losses), now) if losses else (before.loss, before.heard_at)
        self.training = TrainingNews(
            live, loss, loss if before.loss_at_first is None else before.loss_at_first, heard_at
        )
        cost = self._registry.spent_bytes - spent
        self._next_at = now + pause_at_rate(cost, _BYTES_PER_S, self._trainers_every_s, _LONGEST_PAUSE_S)

    @property
    def loss_age(self) -> str:
        """How long ago the node last heard of the loss, in words; empty if that was just now, or never."""
        heard_at = self.training.heard_at
        age_s = 0.0 if heard_at is None else self._clock() - heard_at
        return age_in_words(age_s) if age_s >= _OLD_S else ""

    async def _note_gone(self) -> None:
        """Reports each host that has disappeared without leaving, or had to leave."""
        hosts = _serving(self._seen()) - {self._registry.peer_id}
        regions = await asyncio.to_thread(_hosts_by_region, self._seen_shards())
        present = hosts.union(*regions.values())
        # each look reads some regions of a memory, so only those that the last one read, too, show who is missing
        before = [self._regions[region] for region in self._regions.keys() & regions.keys()]
        missing = (frozenset(self._doubted).union(*before) - present) | (self._hosts - hosts)
        missing -= self._gone | {self._registry.peer_id}
        self._gone &= present
        self._hosts, self._regions = hosts, regions
        await self._report(sorted(missing)[:_MOST_ASKED])
        await self._learn_names(hosts)

    async def _report(self, missing: Sequence[PeerID]) -> None:
        """Reports those of these hosts whose record is no longer there. It may expire later than what they host."""
        known = await self._registry.nodes(missing, with_left=True)
        doubted = dict[PeerID, float]()
        for peer_id in missing:
            name, why = peer_id.with_name(self._names.get(peer_id)), self._registry.why_out(peer_id)
            node = known.get(peer_id)
            if why:
                logger.info("node %s, whose invite %s, has left; %s", name, why, self._still_used())
            elif node is None:
                logger.info("node %s has gone; %s", name, self._still_used())
            elif not node.left and self._doubted.get(peer_id, node.expires_at) == node.expires_at:
                doubted[peer_id] = node.expires_at
            if why or node is None:
                self._gone.add(peer_id)
        self._doubted = doubted

    async def _learn_names(self, hosts: frozenset[PeerID]) -> None:
        """Looks each host's name up while it is there."""
        self._names = {peer_id: name for peer_id, name in self._names.items() if peer_id in hosts}
        room = _MOST_NAMED - len(self._names)
        if unnamed := sorted(hosts - self._names.keys())[: min(_MOST_ASKED, room)]:
            known = await self._registry.nodes(unnamed)
            self._names |= {peer_id: known[peer_id].name if peer_id in known else "" for peer_id in unnamed}

    def _still_used(self) -> str:
        users = self._trainers_here()
        return (
            f"{counted(users, 'trainer')} used this node in the last minute" if users else "this node goes on"
        )


def _serving(seen: Mapping[UID, tuple[Replica, ...]]) -> frozenset[PeerID]:
    return frozenset(
        replica.peer_id
        for replicas in seen.values()
        for replica in replicas
        if replica.state is ReplicaState.SERVING
    )


def _hosts_by_region(seen: Mapping[ShardKey, SeenShard]) -> dict[tuple[MemoryID, int], set[PeerID]]:
    """The hosts that serve any shard of each region. Slow: strangers may announce all shards."""
    hosts = defaultdict[tuple[MemoryID, int], set[PeerID]](set)
    for key, shard in seen.items():
        hosts[key.memory, shard.region] |= shard.serving
    return hosts
