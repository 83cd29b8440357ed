"""Whether hosts have the shards that they announce: each is asked for a random passage with its Merkle proof.

Announcements cost nothing. Without proofs, a few liars could make a swarm believe that a shard has enough replicas, and
its last real host would drop it, or leave.
"""

import asyncio
import logging
import random
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace

import grpc
from grpc import StatusCode

from dht.announcements import NodeInfo
from dht.memory import MemoryID, Place, ShardInfo, prove
from dht.registry import some_of
from dht.swarm import Swarm
from expert_server.memory.placement import SeenShard, ShardKey
from peer import PROTOCOL_VERSION
from peer.errors import ExpertError, TransferError, WireError
from peer.identity import PeerID
from peer.loop import side_by_side
from peer.rates import Backoff
from peer.rpc.calls import status_of, while_open
from peer.rpc.parts import PartClient
from peer.wire import memory_pb2

logger: logging.Logger = logging.getLogger(__name__)

_CHECKED, _AT_ONCE = 8, 8
"""Claims that are checked in one look, and proofs that are waited for at the same time."""
_PROOF_S = 10.0
"""The longest time that a proof may take."""
_TRIES = 3
"""How many passages a host is asked to prove, since one may have been revoked without this node's knowledge."""
_DOUBTED_S = 300.0
"""How long all announcements of a host are ignored after it gave a wrong proof."""
_MISSED_S = 15.0
"""How long the announcements of a host are ignored if it was not reached or gave no passage. This is short, because its
node record may only be late or old, as when it has just started again. The time doubles with each further failure.
"""
_INCONCLUSIVE = {
    StatusCode.CANCELLED,
    StatusCode.DEADLINE_EXCEEDED,
    StatusCode.NOT_FOUND,  # it may have just started, and serves nothing before it has verified its disk
    StatusCode.RESOURCE_EXHAUSTED,
    StatusCode.UNAUTHENTICATED,  # the session has ended
    StatusCode.UNAVAILABLE,
}
"""A call that ends with one of these statuses says nothing about what the host has."""


class ReplicaProofs:
    """Asks hosts to prove what they announce, and remembers which could not."""

    def __init__(
        self,
        swarm: Swarm,
        parts: PartClient,
        revoked: Callable[[MemoryID], Collection[Place]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`revoked`: returns a memory's revoked passages. A host has only the hashes of those."""
        self._swarm = swarm
        self._revoked = revoked
        self._parts = parts
        self._rng = random.SystemRandom()
        self._clock = clock
        self._wrong = Backoff[PeerID](_DOUBTED_S, _DOUBTED_S)
        """Hosts that gave a wrong proof."""
        self._missed = Backoff[PeerID](_MISSED_S, _DOUBTED_S)
        """Hosts that were not reached, or gave no passage."""

    def doubted(self) -> frozenset[PeerID]:
        """The hosts whose claims don't count now."""
        now = self._clock()
        return frozenset(self._wrong.held_back(now) | self._missed.held_back(now))

    async def check_some(self, seen: Mapping[ShardKey, SeenShard]) -> None:
        """Checks a few random claims of other hosts. Raises UnreachableError."""
        # a dead host takes as long as a proof may take, and stays announced for some periods
        spared = self.doubted() | {self._swarm.host.peer_id}
        await self.proven(await asyncio.to_thread(self._some_claims, seen, spared), seen)

    def _some_claims(
        self, seen: Mapping[ShardKey, SeenShard], spared: frozenset[PeerID]
    ) -> list[tuple[PeerID, ShardKey]]:
        """Each claim is as likely as any other. Slow: strangers may claim thousands of shards each."""
        claims = [(peer_id, key) for key, shard in seen.items() for peer_id in shard.serving - spared]
        return some_of(claims, _CHECKED)

    async def proven(
        self, claims: Collection[tuple[PeerID, ShardKey]], seen: Mapping[ShardKey, SeenShard]
    ) -> set[tuple[PeerID, ShardKey]]:
        """Asks hosts to prove these claims, and returns those that are proven. Hosts that fail are doubted from now on.
        Raises UnreachableError.
        """
        hosts = {peer_id for peer_id, _ in claims}
        nodes = await self._swarm.registry.nodes(hosts)
        missed = hosts - nodes.keys()
        found: set[tuple[PeerID, ShardKey]] = set()

        async def check(peer_id: PeerID, key: ShardKey) -> None:
            try:
                is_proven = await self._proves(nodes[peer_id], key, seen[key])
            except (TransferError, TimeoutError) as error:
                logger.debug("%s gave no proof of shard %s: %s", peer_id, key, error)
                missed.add(peer_id)
                return
            if is_proven:
                found.add((peer_id, key))
                self._missed.succeeded(peer_id)
            else:
                self._wrong.failed(peer_id, self._clock())

        await side_by_side((check(*claim) for claim in claims if claim[0] in nodes), _AT_ONCE)
        for peer_id in missed:
            self._missed.failed(peer_id, self._clock())
        return found

    async def _proves(self, node: NodeInfo, key: ShardKey, shard: SeenShard) -> bool:
        """Raises TransferError and TimeoutError if the host was not reached or gave no passage."""
        info = shard.info
        request = memory_pb2.ReadRequest(
            protocol_version=PROTOCOL_VERSION,
            swarm_id=self._swarm.keys.swarm_id,
            memory=str(key.memory),
            shards=[
                memory_pb2.ShardPositions(
                    root=key.root,
                    positions=self._rng.sample(range(info.leaves), min(_TRIES, info.leaves)),
                )
            ],
        )
        try:
            async with asyncio.timeout(_PROOF_S):
                stub, session = await self._parts.service(0).stub(node)
                with while_open():
                    reply = await stub.Read(request, timeout=_PROOF_S, metadata=session)
            revoked = self._revoked(key.memory)
            passages = list(_asked_for(reply, request))
            if not passages:
                raise TransferError("it gives none of the passages")
            return any(_is_proven(given, shard.info, revoked) for given in passages)
        except (grpc.aio.AioRpcError, ExpertError, WireError) as error:
            if isinstance(error, WireError) or status_of(error) not in _INCONCLUSIVE:
                logger.debug("%s did not prove that it has shard %s: %s", node.peer_id, key, error)
                return False
            raise TransferError(str(error)) from error


def believed(seen: Mapping[ShardKey, SeenShard], doubted: Collection[PeerID]) -> dict[ShardKey, SeenShard]:
    """The result of a look, without the claims of doubted hosts. Slow with many shards."""
    return {key: replace(shard, serving=shard.serving.difference(doubted)) for key, shard in seen.items()}


def _asked_for(
    reply: memory_pb2.ReadReply, request: memory_pb2.ReadRequest
) -> Iterable[memory_pb2.ProvenPassage]:
    wanted = list(request.shards[0].positions)
    return [given for given in reply.passages[:_TRIES] if given.position in wanted]


def _is_proven(given: memory_pb2.ProvenPassage, info: ShardInfo, revoked: Collection[Place]) -> bool:
    """Raises WireError."""
    proof = prove(given, info)
    return not proof.is_revoked or proof.text in revoked
