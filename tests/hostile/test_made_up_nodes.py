"""A stranger lists thousands of nodes that do not exist. The lists are not signed, so that takes it only seconds."""

import random
import time
from pathlib import Path

from callers import numbered_identities
from real_swarm import UIDS, Village, playing
from stranger import Stranger

from dht.records import digits_of, first_shards
from peer.identity import PeerID
from peer.kademlia.routing import id_bytes, key_id_of
from peer.kademlia.validation import DICTIONARY, Entries, Entry, pack, pack_entries
from peer.loop import LoopThread
from peer.metrics import total
from peer.wire import dht_pb2

_LISTED = 100
"""How many are listed in each shard, so that the shard seems to be split."""


async def list_made_up_nodes(stranger: Stranger, at: PeerID, shards: list[str]) -> None:
    rng = random.Random(shards[0])
    for shard in shards:
        key = stranger.keys.node_shard(shard)
        packed, last = pack(key), bytes([int(shard, 16)])
        names = [b"\x12\x20" + rng.randbytes(31) + last for _ in range(_LISTED)]
        assert all(digits_of(name).startswith(shard) for name in names)
        entries: Entries = {name: Entry(packed, time.time() + 500) for name in names}
        request = dht_pb2.StoreRequest(
            peer=stranger.dht.info,
            keys=[id_bytes(key_id_of(key))],
            subkeys=[DICTIONARY],
            values=[pack_entries(entries)],
            expiration_time=[0.0],
            in_cache=[False],
        )
        await stranger.store_at(at, request)


def test_a_leaving_node_looks_for_heirs_among_made_up_nodes_at_a_bounded_cost(
    loop: LoopThread, tmp_path: Path
) -> None:
    async def scenario(village: Village) -> None:
        leaver = await village.found(experts=8)
        invite = await leaver.swarm.invite()
        heir = await village.join(1, invite, experts=0, spare=8)
        async with Stranger.joined(invite) as stranger:
            await list_made_up_nodes(stranger, leaver.swarm.host.peer_id, first_shards()[:64])
        assert leaver.swarm.host.dht.storage.bytes > 2**18, "the lists are long"
        await village.run(heir)
        keys_read = leaver.swarm.registry._keys_read
        before = total(keys_read)
        assert await leaver.hosting.release(20) == 0, "others host all of them"
        assert total(keys_read) - before < 3000
        assert set(heir.runtime.experts) == set(UIDS)

    playing(loop, numbered_identities(2), tmp_path)(scenario)
