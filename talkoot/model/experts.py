"""The experts of a swarm as an export reads them: their hosts, and the parameters of each."""

import asyncio
import random
from collections import deque
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from itertools import chain, zip_longest

from dht.admission import EXPORT
from dht.announcements import NodeInfo, Replica
from dht.regions import Prefix
from dht.swarm import Swarm
from dht.uid import UID
from expert_server.experts.format import BLOCK, State
from expert_server.hosting.placement import plausible_updates, state_sources, usual_updates
from expert_server.hosting.whole_states import WholeParameters
from expert_server.state.transfer import StateClient
from peer.averaging import max_plausible_updates
from peer.identity import PeerID
from peer.metrics import total
from peer.rates import download_limit
from trainer_client.client import SwarmClient

_READ_AT_ONCE = 512
"""Experts, or grid prefixes, in one look-up."""
_LISTED = 4096
"""In a layer with more experts than this, only those with a prefix in the DHT are read."""
_MOST_AT_ONCE, _AT_ONCE_AT_A_NODE = 16, 2
"""How many experts are fetched at the same time: from all nodes, and on average from each node."""
_LAYER_SHARE = 4
"""Each expert that is being fetched may take the memory of three. All of them together take less than this share of a
layer.
"""
_RETRY_S = 2.0
_TICK_S = 0.2


@dataclass(frozen=True, eq=False)
class TakenExpert:
    """An expert's parameters, as a node gave them."""

    uid: UID
    peer_id: PeerID
    update_count: int
    """The update count, limited to what is plausible."""
    state: State

    @property
    def tensors(self) -> State:
        """The tensors by their names in the block."""
        return {name.removeprefix(BLOCK): tensor for name, tensor in self.state.items()}


class SwarmExperts:
    """All experts of a swarm. Call `survey` first. For the loop's thread, except `each`. Close it when done."""

    def __init__(self, swarm: Swarm, download_mbit: float | None, wait_s: float) -> None:
        """`wait_s`: how long to wait for experts whose hosts are gone, counted from the last expert that arrived."""
        self.hosts: Mapping[UID, Sequence[Replica]] = {}
        """The replicas of each expert that some node serves."""
        self.nodes: dict[PeerID, NodeInfo] = {}
        self._swarm = swarm
        self._wait_s = wait_s
        self._give_up_at: float | None = None
        self._most_updates = 0
        self._unreachable = set[PeerID]()
        self._rng = random.SystemRandom()
        self._states = StateClient(
            swarm.keys.swarm_id,
            swarm.manifest,
            swarm.session_client(EXPORT),
            download_limit(download_mbit),
            swarm.host.channels(_MOST_AT_ONCE * _AT_ONCE_AT_A_NODE),
            guard=swarm.guard,
        )
        self._parameters = WholeParameters(swarm.manifest, self._states, self._rng)

    @property
    def received_bytes(self) -> int:
        return int(total(self._states.metrics.bytes, direction="received"))

    async def survey(self) -> list[UID]:
        """Reads who hosts what. Returns the experts that no node serves. Raises UnreachableError."""
        replicas: dict[UID, tuple[Replica, ...]] = {}
        uids = await self._listed_uids()
        for start in range(0, len(uids), _READ_AT_ONCE):
            replicas |= await self._swarm.experts.replicas(uids[start : start + _READ_AT_ONCE])
        await self._read_nodes({replica.peer_id for replica in chain.from_iterable(replicas.values())})
        self._most_updates = plausible_updates(usual_updates(replicas))
        found = {uid: self._sources(some) for uid, some in replicas.items()}
        self.hosts = {uid: sources for uid, sources in found.items() if sources}
        return [uid for uid in self._swarm.manifest.uids() if uid not in self.hosts]

    async def fetch(self, uid: UID) -> TakenExpert | None:
        """The expert's parameters from its hosts. If none of them answers, waits for another host; then None."""
        hosts = self.hosts.get(uid, ())
        while True:
            nodes = [self.nodes[replica.peer_id] for replica in hosts]
            most = min(self._most_updates, max_plausible_updates([each.update_count for each in hosts]))
            taken = await self._parameters.fetch(uid, nodes, _capped_at(most), self._unreachable)
            if taken is not None:
                peer_id, checkpoint = taken
                self._give_up_at = None
                return TakenExpert(uid, peer_id, checkpoint.update_count, checkpoint.state)
            now = asyncio.get_running_loop().time()
            if self._give_up_at is None:
                self._give_up_at = now + self._wait_s
            if now >= self._give_up_at:
                return None
            await asyncio.sleep(_RETRY_S)
            replicas = (await self._swarm.experts.replicas([uid]))[uid]
            await self._read_nodes({replica.peer_id for replica in replicas})
            hosts = self._sources(replicas)

    def each(
        self, client: SwarmClient, uids: Collection[UID], tick: Callable[[], None]
    ) -> Generator[tuple[UID, TakenExpert | None]]:
        """Fetches the experts, from several nodes at the same time, and yields each once it has arrived. Not for the
        loop's thread.

        `tick` is called at intervals.
        """
        waiting, running = deque(self._in_turns(uids)), dict[Future[TakenExpert | None], UID]()
        most = min(_MOST_AT_ONCE, _AT_ONCE_AT_A_NODE * max(1, len(self.nodes)), len(uids) // _LAYER_SHARE)
        try:
            while waiting or running:
                while waiting and len(running) < max(1, most):
                    uid = waiting.popleft()
                    running[client.submit(self.fetch(uid))] = uid
                done, _ = wait(running, _TICK_S, FIRST_COMPLETED)
                tick()
                for future in done:
                    yield running.pop(future), future.result()
        finally:
            for future in running:
                future.cancel()

    async def close(self) -> None:
        self._parameters.close()
        await self._states.close()

    def _in_turns(self, uids: Collection[UID]) -> list[UID]:
        """The first expert of each node, then the second of each, and so on."""
        by_host: dict[PeerID, list[UID]] = {}
        for uid in uids:
            by_host.setdefault(self.hosts[uid][0].peer_id, []).append(uid)
        turns = chain.from_iterable(zip_longest(*by_host.values()))
        return [uid for uid in turns if uid is not None]

    def _sources(self, replicas: Collection[Replica]) -> list[Replica]:
        sources = state_sources(replicas, self._swarm.host.peer_id, self._rng)
        return [replica for replica in sources if replica.peer_id in self.nodes]

    async def _read_nodes(self, peers: Collection[PeerID]) -> None:
        """A node that did not answer is tried again once it has renewed its record."""
        for peer_id, node in (await self._swarm.registry.nodes(peers)).items():
            known = self.nodes.get(peer_id)
            if known is not None and node.expires_at > known.expires_at:
                self._unreachable.discard(peer_id)
            self.nodes[peer_id] = node

    async def _listed_uids(self) -> list[UID]:
        manifest = self._swarm.manifest
        if manifest.experts.count <= _LISTED:
            return manifest.uids()
        frontier: list[Prefix] = [(layer, ()) for layer in range(manifest.model.layers)]
        for size in manifest.experts.grid:
            longer: list[Prefix] = []
            for start in range(0, len(frontier), _READ_AT_ONCE):
                found = await self._swarm.experts.prefixes(frontier[start : start + _READ_AT_ONCE], size)
                longer += [
                    (layer, (*c, nxt)) for (layer, c), active in found.items() for nxt in sorted(active)
                ]
            frontier = longer
        return [UID(layer, coordinate) for layer, coordinate in frontier]


def _capped_at(most: int) -> Callable[[int], int]:
    return lambda claimed: min(claimed, most)
