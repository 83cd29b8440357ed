"""Where the nodes of a swarm are listed: in shards that split as they fill up. Pure functions.

A shard is named by hex digits, two at least; a node belongs into every shard whose digits begin its own. It is listed
in the first one that has room, and readers look further where a shard is well filled. So no key outgrows 32 KB: about
330 entries of 95 bytes. Four digits hold 13 million nodes.
"""

from collections.abc import Iterator, Mapping

from hivemind.p2p import PeerID

FEWEST_DIGITS, MOST_DIGITS = 2, 4
FULL = 192
"""Nodes in a shard beyond which new ones go into the shards below it; some more come in at the same moment."""


def digits_of(peer_id: bytes) -> str:
    """The digits that begin with those of each shard that the peer belongs into. They are from a hash."""
    return bytes(reversed(peer_id[-MOST_DIGITS // 2 :])).hex()


def shards_of(peer_id: PeerID) -> list[str]:
    """All shards that a node may be listed in, the largest first."""
    digits = digits_of(peer_id.to_bytes())
    return [digits[:count] for count in range(FEWEST_DIGITS, MOST_DIGITS + 1)]


def first_shards() -> list[str]:
    return [f"{number:0{FEWEST_DIGITS}x}" for number in range(16**FEWEST_DIGITS)]


def below(shard: str, listed: int) -> Iterator[str]:
    """The shards to read after this one, which lists so many. From half full: it may have been full just now."""
    if 2 * listed >= FULL and len(shard) < MOST_DIGITS:
        for digit in range(16):
            yield f"{shard}{digit:x}"


def choose(peer_id: PeerID, others: Mapping[str, int]) -> str:
    """The shard to be listed in, where `others` says how many other nodes each of `shards_of` lists."""
    shards = shards_of(peer_id)
    return next((shard for shard in shards if others.get(shard, 0) < FULL), shards[-1])
