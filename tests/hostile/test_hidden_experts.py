"""Strangers with specially made keys crowd around an expert's key in the DHT, to hide its host."""

import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from callers import numbered_identities
from dht_peers import forget_all
from real_swarm import LOCAL, MANIFEST, UIDS, Play, Village, playing
from stranger import DHTHandler, Stranger, digest, identities_near, packed

from dht.announcements import ReplicaAnnouncement, ReplicaState
from dht.swarm import Swarm, found_swarm, join_swarm
from peer.host import NetworkConfig
from peer.kademlia.lookups import Lookups
from peer.kademlia.routing import node_id_of
from peer.kademlia.validation import Entry, pack_entries
from peer.loop import LoopThread
from peer.wire import dht_pb2, records_pb2

HIDDEN = UIDS[0]
HONEST = 4
"""The number of honest DHT nodes. One hosts the expert."""
HOSTILE = 8
LOOKS = 20

Lie = Callable[[bytes], dict[str, Any]]
"""What a stranger answers for a key."""


@pytest.fixture
def play(loop: LoopThread, tmp_path: Path) -> Play:
    return playing(loop, numbered_identities(HONEST + 1), tmp_path)


@pytest.mark.slow
def test_a_crowd_of_made_up_peers_beside_an_expert_does_not_hide_it(play: Play) -> None:
    """There are eight strangers among four honest nodes, and a watcher that has seen nothing before."""

    async def scenario(village: Village) -> None:
        host = await found_swarm(village.identities[0], MANIFEST, NetworkConfig(LOCAL))
        village.stack.push_async_callback(host.stop)
        invite, key = await host.invite(), host.keys.prefix(HIDDEN.layer)
        others = await asyncio.gather(
            *(join_swarm(village.identities[n], invite, NetworkConfig(LOCAL)) for n in range(1, HONEST))
        )
        for swarm in others:
            village.stack.push_async_callback(swarm.stop)
        identities = identities_near(key, HOSTILE, among=500)
        strangers = [Stranger.joined(invite, identity) for identity in identities]
        crowd = Crowd(
            key, await asyncio.gather(*(village.stack.enter_async_context(one) for one in strangers))
        )
        watcher = await village.observe(HONEST, invite)
        for lie in (crowd.nothing, crowd.worthless, crowd.nobody):
            await crowd.tell(lie)
            await host.experts.announce([ReplicaAnnouncement(HIDDEN, ReplicaState.SERVING)], 60.0)
            for swarm in (host, *others):
                await swarm.experts.replicas([HIDDEN])  # as nodes do all the time
            seen = [await sees(watcher, host) for _ in range(LOOKS)]
            assert sum(seen) >= 0.95 * LOOKS, lie.__name__

    play(scenario)


async def sees(watcher: Swarm, host: Swarm) -> bool:
    """Whether a look finds the expert's host, without any earlier look."""
    forget_all(watcher.host.dht.storage)
    watcher.registry.lookups = Lookups(watcher.host.dht)
    found = await watcher.experts.replicas([HIDDEN])
    return host.host.peer_id in {replica.peer_id for replica in found[HIDDEN]}


class Crowd:
    """Peers near a key that store nothing and all tell the same lie."""

    def __init__(self, key: str, strangers: list[Stranger]) -> None:
        self._key = key
        self._strangers = strangers
        place = int.from_bytes(digest(key), "big")
        names = [b"\x12\x20" + os.urandom(32) for _ in range(5000)]
        self._nobody = sorted(names, key=lambda name: node_id_of(name) ^ place)[:100]

    def nothing(self, key: bytes) -> dict[str, Any]:
        """Says that nothing is stored, and names only peers of the crowd."""
        return self._named([stranger.peer_id.to_bytes() for stranger in self._strangers])

    def worthless(self, key: bytes) -> dict[str, Any]:
        """Answers only a valid record of a stranger."""
        if key != digest(self._key):
            return self.nothing(key)
        subkey, value, until = self._record
        entries = pack_entries({subkey: Entry(value, until)})
        return {**self.nothing(key), "type": dht_pb2.RESULT_TYPE_DICTIONARY, "value": entries}

    def nobody(self, key: bytes) -> dict[str, Any]:
        """Names nearer nodes that don't exist."""
        return self._named(self._nobody[:20])

    async def tell(self, lie: Lie) -> None:
        until = time.time() + 500
        first = self._strangers[0]
        announcement = records_pb2.Announcement(state=records_pb2.REPLICA_STATE_WITHDRAWN)
        payload = records_pb2.RecordPayload(key=self._key, expires_at=until, announcement=announcement)
        self._record = first.peer_id.to_bytes(), packed(await first.publish(payload)), until

        for stranger in self._strangers:
            await stranger.answer(**self._handlers(stranger, lie))

    def _handlers(self, stranger: Stranger, lie: Lie) -> dict[str, DHTHandler]:
        own = stranger.dht.info

        async def find(request: Any, context: Any) -> Any:
            answers = [dht_pb2.FindResult(**lie(key)) for key in request.keys]
            return dht_pb2.FindResponse(results=answers, peer=own)

        async def store(request: Any, context: Any) -> Any:
            return dht_pb2.StoreResponse(store_ok=[True] * len(request.keys), peer=own)

        return {"find": find, "store": store}

    def _named(self, names: list[bytes]) -> dict[str, Any]:
        ids = [node_id_of(name).to_bytes() for name in names]
        return {"type": dht_pb2.RESULT_TYPE_NOT_FOUND, "nearest_node_ids": ids, "nearest_peer_ids": names}
