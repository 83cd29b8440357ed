"""A node that leaves: which of its experts have no other host, and who of the others adopts them."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection
from itertools import groupby

from hivemind.p2p import PeerID

from dht.registry import NodeInfo, Replica, ReplicaState
from dht.swarm import Swarm
from dht.uid import UID
from expert_server.hosting.placement import heirs
from expert_server.state.servicer import MAX_UIDS_IN_ASK
from expert_server.state.transfer import StateClient
from peer.wire import state_pb2

_LOOK_EVERY_S = 0.2
_CLAIM_WITHIN_S = 10.0
"""After that an heir that has not claimed what it was given is passed over: it may be leaving too."""


class Departure:
    """One leave. It asks nodes with room to adopt what nobody else serves, and sees in the DHT that they do."""

    def __init__(
        self,
        swarm: Swarm,
        client: StateClient,
        uids: Collection[UID],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.alone = set(uids)
        """The experts that nobody else serves, as far as was seen."""
        self.handed_over = 0
        self._swarm = swarm
        self._client = client
        self._clock = clock
        self._nodes: dict[PeerID, NodeInfo] = {}
        self._rooms: dict[PeerID, int] = {}
        self._asked: dict[UID, tuple[PeerID, float]] = {}

    async def hand_over(self, withdraw: Callable[[list[UID]], Awaitable[None]]) -> None:
        """Returns when others serve all of them, or nobody is left to ask.

        `withdraw` is given what others serve. Raises UnreachableError when the DHT does not answer.
        """
        await self._withdraw_served(withdraw)
        if self.alone:
            await self._find_rooms()
        while self.alone:
            await self._ask(sorted(self.alone - self._asked.keys()))
            if not self.alone & self._asked.keys():
                return
            await asyncio.sleep(_LOOK_EVERY_S)
            self._pass_over(await self._withdraw_served(withdraw))

    async def _withdraw_served(
        self, withdraw: Callable[[list[UID]], Awaitable[None]]
    ) -> dict[UID, tuple[Replica, ...]]:
        """Gives all replicas of the experts that were alone."""
        me = self._swarm.host.peer_id
        replicas = await self._swarm.registry.replicas(self.alone)
        served = [uid for uid, hosts in replicas.items() if serving_elsewhere(hosts, me)]
        self.alone.difference_update(served)
        self.handed_over += sum(uid in self._asked for uid in served)
        if served:
            await withdraw(served)
        return replicas

    async def _find_rooms(self) -> None:
        me = self._swarm.host.peer_id
        others = await self._swarm.registry.node_ids() - {me}
        self._nodes = await self._swarm.registry.nodes(others)
        self._rooms = {p: node.expert_capacity - node.expert_count for p, node in self._nodes.items()}

    async def _ask(self, uids: Collection[UID]) -> None:
        """Asks the heirs, all at once, and goes on to others for what they don't take."""
        left = list(uids)
        while shares := self._shares(left):
            async with asyncio.TaskGroup() as group:
                for heir, share in shares:
                    group.create_task(self._ask_one(heir, share))
            left = [uid for uid in left if uid not in self._asked]

    def _shares(self, uids: Collection[UID]) -> list[tuple[PeerID, list[UID]]]:
        found = heirs(uids, self._rooms)
        by_heir = groupby(sorted(found, key=lambda uid: (found[uid].to_bytes(), uid)), key=found.__getitem__)
        return [(heir, list(share)[:MAX_UIDS_IN_ASK]) for heir, share in by_heir]

    async def _ask_one(self, heir: PeerID, share: list[UID]) -> None:
        accepted = await self._client.ask(self._nodes[heir], state_pb2.ASK_REASON_ADOPT, share)
        for uid in share[:accepted]:
            self._asked[uid] = heir, self._clock()
        full = accepted < len(share)
        self._rooms[heir] = 0 if full else self._rooms[heir] - accepted

    def _pass_over(self, replicas: dict[UID, tuple[Replica, ...]]) -> None:
        """Forgets heirs that do not come."""
        for uid, (heir, asked_at) in list(self._asked.items()):
            claimed = any(replica.peer_id == heir for replica in replicas.get(uid, ()))
            if not claimed and self._clock() > asked_at + _CLAIM_WITHIN_S:
                del self._asked[uid]
                self._rooms[heir] = 0


def serving_elsewhere(hosts: Collection[Replica], me: PeerID) -> list[Replica]:
    """The replicas of others that answer calls."""
    return [r for r in hosts if r.state is ReplicaState.SERVING and r.peer_id != me]
