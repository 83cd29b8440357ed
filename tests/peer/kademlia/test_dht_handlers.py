"""Hostile requests neither stop a DHT node nor displace what honest peers stored."""

import asyncio
import math
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from benchmarks.simulated_p2p import Link, SimulatedIdentity, VirtualLoop, simulated_world
from benchmarks.simulated_swarm import SimulatedPeer, SimulatedSwarm
from dht.announcements import ReplicaAnnouncement, ReplicaState
from dht.records import sign_record
from dht.uid import UID
from peer.identity import PeerID
from peer.kademlia.hivemind import (
    DHTID,
    DHTProtocol,
    DictionaryDHTValue,
    MSGPackSerializer,
    P2PContext,
    dht_pb2,
)
from peer.kademlia.storage import StoreBounds
from peer.kademlia.validation import node_id_of
from peer.metrics import total
from peer.wire import records_pb2

HOME = UID(0, (0, 1))
STRANGER: Any = SimulatedIdentity(1000)


@pytest.fixture
def world() -> Iterator[VirtualLoop]:
    with simulated_world() as loop:
        yield loop


def play(
    loop: VirtualLoop, scenario: Callable[[SimulatedSwarm, SimulatedPeer], Awaitable[None]], nodes: int = 1
) -> None:
    """The strangers send to the first peer, which hosts the first experts."""

    async def run() -> None:
        swarm = await SimulatedSwarm.start(loop, nodes, 4, Link(rtt_s=0.1), seed=1)
        await scenario(swarm, swarm.peers[0])

    loop.run_until_complete(run())


async def send(peer: SimulatedPeer, name: str, request: Any, sender: PeerID = STRANGER.peer_id) -> Any:
    p2p: Any = peer.dht.p2p
    name = f"DHTProtocol.rpc_{name}"
    return await p2p.handlers[name](request, P2PContext(name, peer.peer_id, sender))


def store_request(key: str, subkey: object, value: object, expires_at: float, **more: Any) -> Any:
    return dht_pb2.StoreRequest(
        keys=[DHTID.generate(source=key).to_bytes()],
        subkeys=[subkey if isinstance(subkey, bytes) and not subkey else MSGPackSerializer.dumps(subkey)],
        values=[value.packed if isinstance(value, Packed) else MSGPackSerializer.dumps(value)],
        expiration_time=[expires_at],
        **{"in_cache": [False], **more},
    )


class Packed:
    """Bytes that are not valid msgpack."""

    def __init__(self, packed: bytes) -> None:
        self.packed = packed


def nested(depth: int, inner: bytes = b"\x01") -> bytes:
    """Nested tuples, as hivemind packs them."""
    for _ in range(depth):
        inner = b"\xc9" + (len(inner) + 1).to_bytes(4, "big") + b"\x40\x91" + inner
    return inner


async def held(peer: SimulatedPeer, key: str) -> dict[object, tuple[bytes, float]]:
    request = dht_pb2.FindRequest(keys=[DHTID.generate(source=key).to_bytes()])
    (result,) = (await send(peer, "find", request)).results
    if result.type == dht_pb2.NOT_FOUND:
        return {}
    return {subkey: tuple(entry) for subkey, entry in MSGPackSerializer.loads(result.value).items()}


def announced_by(identity: Any, key: str, expires_at: float) -> bytes:
    body = records_pb2.Announcement(state=records_pb2.REPLICA_STATE_SERVING)
    return sign_record(identity, records_pb2.RecordPayload(key=key, expires_at=expires_at, announcement=body))


@pytest.mark.parametrize(
    "value",
    [
        nested(2300),
        nested(300, b"\xc0"),
        b"\xc7\x02\x50" + nested(1),
        b"\x91" * 15_000,
        b"\xc1",
        b"",
        MSGPackSerializer.dumps({1: 2}),
    ],
)
def test_a_value_of_an_odd_form_is_refused_and_ends_nobody(world: VirtualLoop, value: bytes) -> None:
    async def scenario(swarm: SimulatedSwarm, peer: SimulatedPeer) -> None:
        until = world.unix_time() + 60
        for subkey in (b"", 3, None, b"x"):
            answer = await send(peer, "store", store_request("key", subkey, Packed(value), until))
            assert list(answer.store_ok) == [False]
        assert await held(peer, "key") == {}

    play(world, scenario)


@pytest.mark.parametrize("expires_in_s", [math.inf, math.nan, -math.inf, -5.0, 1e300, 10_000.0])
def test_an_entry_with_an_odd_expiry_is_refused(world: VirtualLoop, expires_in_s: float) -> None:
    async def scenario(swarm: SimulatedSwarm, peer: SimulatedPeer) -> None:
        key, until = swarm.keys.prefix(5), world.unix_time() + expires_in_s
        await send(peer, "store", store_request(key, 3, key, until))
        dictionary = DictionaryDHTValue()
        dictionary.frozen = True
        dictionary.store(4, MSGPackSerializer.dumps(key), until)
        await send(peer, "store", store_request(key, b"", dictionary, until))
        assert await held(peer, key) == {}

    play(world, scenario)


def test_a_replayed_announcement_does_not_end_the_newer_one(world: VirtualLoop) -> None:
    async def scenario(swarm: SimulatedSwarm, peer: SimulatedPeer) -> None:
        key, now = swarm.keys.expert(UID(0, (7, 7))), world.unix_time()
        subkey = STRANGER.peer_id.to_bytes()
        for lifetime_s in (20, 60, 20):
            record = announced_by(STRANGER, key, now + lifetime_s)
            await send(peer, "store", store_request(key, subkey, record, now + lifetime_s))
        await asyncio.sleep(30)
        assert (await held(peer, key))[subkey][1] == now + 60

    play(world, scenario)


def test_what_is_stored_as_cached_does_not_hide_the_rest(world: VirtualLoop) -> None:
    async def scenario(swarm: SimulatedSwarm, peer: SimulatedPeer) -> None:
        key, until = swarm.keys.expert(HOME), world.unix_time() + 600
        request = store_request(
            key, STRANGER.peer_id.to_bytes(), announced_by(STRANGER, key, until), until, in_cache=[True]
        )
        assert list((await send(peer, "store", request)).store_ok) == [False]
        assert swarm.hosts[HOME].peer_id.to_bytes() in await held(peer, key)

    play(world, scenario)


def test_a_dictionary_that_is_handed_over_is_taken_beyond_its_first_old_entry(world: VirtualLoop) -> None:
    async def scenario(swarm: SimulatedSwarm, peer: SimulatedPeer) -> None:
        key, until = swarm.keys.prefix(5), world.unix_time() + 60
        await send(peer, "store", store_request(key, 3, key, until))
        dictionary = DictionaryDHTValue()
        for coordinate, its_until in ((3, until - 10), (4, until), ("odd", until)):
            dictionary.store(coordinate, MSGPackSerializer.dumps(key), its_until)
        assert list((await send(peer, "store", store_request(key, b"", dictionary, until))).store_ok) == [
            True
        ]
        assert {name: expiry for name, (_, expiry) in (await held(peer, key)).items()} == {3: until, 4: until}

    play(world, scenario)


def test_messages_beyond_their_bounds_get_empty_answers(world: VirtualLoop) -> None:
    async def scenario(swarm: SimulatedSwarm, peer: SimulatedPeer) -> None:
        keys = [DHTID(n).to_bytes() for n in range(257)]
        assert len((await send(peer, "find", dht_pb2.FindRequest(keys=keys[:256]))).results) == 256
        assert not (await send(peer, "find", dht_pb2.FindRequest(keys=keys))).results
        assert not (await send(peer, "find", dht_pb2.FindRequest(keys=[b"short"]))).results
        key, until = swarm.keys.prefix(5), world.unix_time() + 60
        big = store_request(key, 3, key, until)
        big.keys.append(big.keys[0])
        big.subkeys.append(big.subkeys[0])
        big.expiration_time.append(until)
        assert list((await send(peer, "store", big)).store_ok) == [False, False], "a value is missing"
        big.values.append(bytes(2**20))
        assert list((await send(peer, "store", big)).store_ok) == [False, False]
        assert await held(peer, key) == {}

    play(world, scenario)


def test_one_peer_has_one_node_id_whatever_it_claims(world: VirtualLoop) -> None:
    async def scenario(swarm: SimulatedSwarm, peer: SimulatedPeer) -> None:
        table = peer.dht.protocol.routing_table
        other = await swarm.make_peer()
        claimed = [DHTID.generate().to_bytes() for _ in range(30)] + [
            other.dht.node_id.to_bytes(),
            peer.dht.node_id.to_bytes(),
        ]
        for node_id in (b"", b"short", bytes(40), *claimed):
            sender = dht_pb2.NodeInfo(node_id=node_id)
            await send(peer, "ping", dht_pb2.PingRequest(peer=sender))
            await send(peer, "find", dht_pb2.FindRequest(peer=sender, keys=[bytes(20)]))
            await send(peer, "store", dht_pb2.StoreRequest(peer=sender))
        await asyncio.sleep(1)
        assert table.uid_to_peer_id == {node_id_of(STRANGER.peer_id.to_bytes()): STRANGER.peer_id}

    play(world, scenario)


@pytest.mark.parametrize("name", [b"", b"\x12\x20" + bytes(31), bytes(34), b"\x12\x20" + bytes(33)])
def test_a_peer_whose_name_is_no_peer_id_has_no_place(world: VirtualLoop, name: bytes) -> None:
    async def scenario(swarm: SimulatedSwarm, peer: SimulatedPeer) -> None:
        node = dht_pb2.NodeInfo(node_id=node_id_of(name).to_bytes())
        await send(peer, "ping", dht_pb2.PingRequest(peer=node), PeerID(name))
        assert not peer.dht.protocol.routing_table.uid_to_peer_id

    play(world, scenario)


def test_the_routing_table_stays_small_however_many_strangers_come(world: VirtualLoop) -> None:
    async def scenario(swarm: SimulatedSwarm, peer: SimulatedPeer) -> None:
        for n in range(2000):
            stranger: Any = SimulatedIdentity(10_000 + n)
            node = dht_pb2.NodeInfo(node_id=bytes(20))
            await send(peer, "find", dht_pb2.FindRequest(peer=node), stranger.peer_id)
        table = peer.dht.protocol.routing_table
        assert len(table.peer_id_to_uid) == len(table.uid_to_peer_id) <= 2 * 20 * len(table.buckets)
        assert len(table.buckets) < 64

    play(world, scenario)


def test_a_newcomer_is_handed_all_it_should_store_in_messages_within_the_bound(world: VirtualLoop) -> None:
    async def scenario(swarm: SimulatedSwarm, peer: SimulatedPeer) -> None:
        uids = [UID(0, (n, n)) for n in range(1000)]
        await peer.registry.announce([ReplicaAnnouncement(uid, ReplicaState.SERVING) for uid in uids], 600.0)
        newcomer = await swarm.make_peer()
        await swarm.join(newcomer)
        await asyncio.sleep(10)
        assert isinstance(newcomer.dht.protocol, DHTProtocol)
        missing = [uid for uid in uids if not await held(newcomer, swarm.keys.expert(uid))]
        assert missing == []

    play(world, scenario)


async def turns_during(work: Awaitable[object]) -> int:
    """How often another task gets a turn in the meantime."""
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count())
    await work
    counting.cancel()
    return turns


def test_a_look_up_of_many_keys_lets_other_tasks_run(world: VirtualLoop) -> None:
    async def scenario(swarm: SimulatedSwarm, peer: SimulatedPeer) -> None:
        request = dht_pb2.FindRequest(keys=[DHTID(n).to_bytes() for n in range(256)])
        assert await turns_during(send(peer, "find", request)) >= 256 / 8

    play(world, scenario)


def test_beyond_a_full_answer_no_values_are_packed(
    world: VirtualLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(swarm: SimulatedSwarm, peer: SimulatedPeer) -> None:
        peer.dht.protocol.rpc_find.__self__._bounds = StoreBounds(answer_bytes=1000)
        until = world.unix_time() + 60
        names = [swarm.keys.prefix(layer) for layer in range(64)]
        for name in names:
            await send(peer, "store", store_request(name, 3, name, until))
        request = dht_pb2.FindRequest(keys=[DHTID.generate(source=name).to_bytes() for name in names])
        packed: list[object] = []

        def pack(value: object) -> bytes:
            packed.append(value)
            return bytes(600)

        monkeypatch.setattr("peer.kademlia.node.MSGPackSerializer.dumps", pack)
        response = await send(peer, "find", request)
        assert [result.type for result in response.results].count(dht_pb2.FOUND_DICTIONARY) == 1
        assert len(packed) == 2

    play(world, scenario)


def test_strangers_make_a_node_send_what_it_stores_no_faster_than_a_rate(world: VirtualLoop) -> None:
    async def scenario(swarm: SimulatedSwarm, peer: SimulatedPeer) -> None:
        handlers, storage = peer.dht.protocol.rpc_find.__self__, peer.dht.protocol.storage
        handlers._bounds = StoreBounds(handed_bytes_per_s=10_000.0)
        refusals = handlers._metrics.not_handed_over
        uids = [UID(0, (n, n)) for n in range(100)]
        await peer.registry.announce([ReplicaAnnouncement(uid, ReplicaState.SERVING) for uid in uids], 600.0)
        sent, began = swarm.network.traffic.by_method["store"], world.time()
        for _ in range(100):
            newcomer = await swarm.make_peer()
            node = dht_pb2.NodeInfo(node_id=newcomer.dht.node_id.to_bytes())
            await send(peer, "ping", dht_pb2.PingRequest(peer=node), newcomer.peer_id)
            await asyncio.sleep(0.1)
        handed = swarm.network.traffic.by_method["store"] - sent
        most = 1 + (world.time() - began + 16) * 10_000 / storage.bytes
        assert 1 <= handed <= most
        assert total(refusals) >= 100 - most
        await asyncio.sleep(60)
        newcomer = await swarm.make_peer()
        refused = total(refusals)
        await swarm.join(newcomer, [peer])
        assert total(refusals) == refused, "a while later newcomers get it again"

    play(world, scenario)
