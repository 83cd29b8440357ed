"""Which peers of a swarm can be relays for one that others can't connect to."""

import random

from dht.participants import NodeInfo
from dht.registry import Registry
from peer.errors import UnreachableError
from peer.host import Host
from peer.multiaddresses import is_public, is_relayed

_SAMPLED = 24
"""DHT peers of which it is looked whether they are nodes that could be asked, or relays."""


async def some_nodes(host: Host, registry: Registry, rng: random.Random) -> list[NodeInfo]:
    """Some other nodes, in random order; none when the DHT does not answer."""
    peers = sorted(host.peers(), key=lambda peer: peer.to_bytes())
    sample = rng.sample(peers, min(_SAMPLED, len(peers)))
    try:
        found = await registry.nodes(sample)
    except UnreachableError:
        return []
    return list(found.values())


async def find_relays(host: Host, registry: Registry, rng: random.Random, most: int) -> list[str]:
    """Addresses of some peers that others reach, one of each. libp2p relays over public addresses only."""
    nodes = await some_nodes(host, registry, rng)
    listed = [address for node in nodes for address in node.bootstrap_addresses]
    usable = [a for a in (*listed, *host.joined_by, *host.known) if is_public(a) and not is_relayed(a)]
    by_peer = {address.rpartition("/p2p/")[2]: address for address in usable}
    by_peer.pop(host.peer_id.to_base58(), None)
    return rng.sample(list(by_peer.values()), min(most, len(by_peer)))
