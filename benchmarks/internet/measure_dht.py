"""Measures on the real DHT code what `dht_model` uses: `python -m benchmarks.internet.measure_dht`.

Writes hops.json. For look-ups of several keys at a time in swarms of several sizes, it contains: rounds and calls,
bytes of questions and of answers (without the values), how often each value arrived, and the share of the calls that
went to the seven nodes nearest to a key. `find` and `frugal` read values, `nearest` is what a writer does before it
stores, and `store` has the bytes of one call that stores items, without the items. A look-up is warm if the same peer
has looked up the same keys several times before.
"""

import argparse
import heapq
import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.simulated_p2p import CALL_OVERHEAD_BYTES, Link, Network, VirtualLoop, simulated_world
from benchmarks.simulated_swarm import LIFETIME_S, SimulatedPeer, SimulatedSwarm
from peer.identity import PeerID
from peer.kademlia import lookups
from peer.kademlia.lookups import Item
from peer.kademlia.routing import key_id_of
from peer.kademlia.search import DEFAULT_LIMITS, SearchLimits
from peer.kademlia.validation import ITEM_OVERHEAD_BYTES, packed_bytes
from peer.wire import dht_pb2

FIGURES = Path(__file__).with_name("hops.json")
KEYS = (1, 4, 16, 64)
_KINDS = {"find": DEFAULT_LIMITS, "frugal": lookups.FRUGAL, "nearest": lookups._NEAREST}
_FRONT = 7
_KEYS, _VALUE_BYTES = 256, 1000
_TRIES = 6
_WARMED_BY = 6
"""How often the same keys are looked up before a warm look-up. A real node looks up the same keys in each period, and
soon knows which nodes are near them.
"""


class _CountingNetwork(Network):
    """A simulated network that counts only the calls of look-ups."""

    def __init__(self, link: Link, seed: int) -> None:
        super().__init__(link, seed)
        self.near: dict[bytes, set[bytes]] = {}
        """The nodes nearest to each key. Keys and nodes are given as bytes."""
        self.clear()

    def clear(self) -> None:
        self.store_calls = self.store_bytes = 0
        self.calls = self.questions = self.answers = self.values = self.near_calls = 0

    async def call(self, sender: PeerID, receiver: PeerID, method: str, request: bytes) -> bytes:
        answer = await super().call(sender, receiver, method, request)
        if method == "store":
            items = dht_pb2.StoreRequest.FromString(request)
            self.store_calls += 1
            brought = sum(map(len, items.values)) + ITEM_OVERHEAD_BYTES * len(items.values)
            self.store_bytes += len(request) + len(answer) + 2 * CALL_OVERHEAD_BYTES - brought
        if method == "find":
            self.calls += 1
            self.questions += len(request) + CALL_OVERHEAD_BYTES
            values = [r.value for r in dht_pb2.FindResponse.FromString(answer).results if r.value]
            self.values += sum(map(len, values))
            self.answers += len(answer) + CALL_OVERHEAD_BYTES - sum(map(len, values))
            keys = dht_pb2.FindRequest.FromString(request).keys
            self.near_calls += any(receiver.to_bytes() in self.near[key] for key in keys if key in self.near)
        return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", default="30,1000,10000")
    options = parser.parse_args()
    found: list[dict[str, Any]] = []
    for nodes in options.nodes.split(","):
        found += measure(int(nodes))
        FIGURES.write_text(json.dumps(found, indent=1) + "\n")


def measure(nodes: int, seed: int = 1) -> list[dict[str, Any]]:
    with simulated_world() as loop:
        found: list[dict[str, Any]] = loop.run_until_complete(_measure(loop, nodes, seed))
        return found


async def _measure(loop: VirtualLoop, nodes: int, seed: int) -> list[dict[str, Any]]:
    link = Link()
    swarm = await SimulatedSwarm.start(loop, nodes, max(256, nodes), link, seed, True, with_contacts=True)
    network = _CountingNetwork(link, seed)
    network.peers = swarm.network.peers
    for peer in swarm.peers:
        peer.transport._network = network
    for peer in swarm.peers:
        peer.dht.validator = None
    keys = [f"key {number}" for number in range(_KEYS)]
    items = [Item(key, b"writer", bytes(_VALUE_BYTES), loop.unix_time() + LIFETIME_S) for key in keys]
    await swarm.peers[0].lookups.store(items)
    found = []
    for kind, limits in _KINDS.items():
        for count in KEYS:
            for is_warm in (False, True):
                tries = [
                    await _look(loop, swarm, network, keys, count, limits, is_warm) for _ in range(_TRIES)
                ]
                means = {name: round(statistics.mean(each[name] for each in tries), 2) for name in tries[0]}
                found.append({"nodes": nodes, "kind": kind, "keys": count, "warm": is_warm, **means})
                print(found[-1])
    network.clear()
    for peer in swarm.rng.sample(swarm.peers, _TRIES):
        await swarm.announce(peer, swarm.rng.sample(list(swarm.hosts), 4), LIFETIME_S)
    found.append(
        {"nodes": nodes, "kind": "store", "bytes": round(network.store_bytes / network.store_calls, 1)}
    )
    print(found[-1])
    return found


async def _look(
    loop: VirtualLoop,
    swarm: SimulatedSwarm,
    network: _CountingNetwork,
    keys: list[str],
    count: int,
    limits: SearchLimits,
    is_warm: bool,
) -> dict[str, float]:
    """The figures of one look-up by one peer, divided by the number of keys."""
    room = 0 if limits.quorum > _FRONT else None
    peer: SimulatedPeer = swarm.rng.choice(swarm.peers)
    ids = [key_id_of(key) for key in swarm.rng.sample(keys, count)]
    network.near = {}
    for key in ids:
        nearest = heapq.nsmallest(_FRONT, swarm.peers, key=lambda p: p.dht.node_id ^ key)
        network.near[key.to_bytes(20, "big")] = {p.peer_id.to_bytes() for p in nearest}
    # Look-ups of random keys are counted separately, so there are none here.
    peer.lookups._sample_at = loop.time() + 1e6
    for _ in range(_WARMED_BY if is_warm else 0):
        await peer.lookups.find(ids, limits, room=room)
    network.clear()
    began = loop.time()
    found = await peer.lookups.find(ids, limits, besides_self=True, room=room)
    return {
        "rounds": statistics.mean(each.search.rounds for each in found.values()),
        "seconds_by_rtt": (loop.time() - began) / network.link.rtt_s,
        "calls": network.calls / count,
        "question_bytes": network.questions / count,
        "answer_bytes": network.answers / count,
        "copies": network.values / sum(packed_bytes(each.entries) for each in found.values()),
        "near_share": network.near_calls / max(1, network.calls),
    }


if __name__ == "__main__":
    main()
