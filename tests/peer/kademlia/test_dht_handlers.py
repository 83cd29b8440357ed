"""Hostile requests neither stop a DHT node nor displace what honest peers stored."""

import asyncio
import math
import os
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import msgpack
import pytest
from loop_lags import longest_slice

from benchmarks.simulated_p2p import (
    Link,
    SimulatedContacts,
    SimulatedIdentity,
    SimulatedTransport,
    VirtualLoop,
    simulated_world,
)
from benchmarks.simulated_swarm import SimulatedPeer, SimulatedSwarm
from dht.announcements import ReplicaAnnouncement, ReplicaState
from dht.directory import Directory
from dht.records import sign_record
from dht.uid import UID
from peer.identity import PeerID
from peer.kademlia.routing import id_bytes, key_id_of, node_id_of
from peer.kademlia.storage import StoreBounds
from peer.kademlia.validation import (
    MAX_FIND_KEYS,
    MAX_ITEMS,
    MAX_MESSAGE_BYTES,
    Entries,
    Entry,
    pack,
    pack_entries,
    unpack_entries,
)
from peer.metrics import total, totals
from peer.rates import FairTurns, RateLimit, SharedBudget
from peer.wire import dht_pb2, records_pb2

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


REPLIES = {"ping": dht_pb2.PingResponse, "store": dht_pb2.StoreResponse, "find": dht_pb2.FindResponse}


async def send(peer: SimulatedPeer, method: str, request: Any, sender: PeerID = STRANGER.peer_id) -> Any:
    reply: Any = REPLIES[method]
    return reply.FromString(await peer.transport.handlers[method](sender, request.SerializeToString()))


def store_request(key: str, subkey: object, value: object, expires_at: float, **more: Any) -> Any:
    return dht_pb2.StoreRequest(
        keys=[id_bytes(key_id_of(key))],
        subkeys=[subkey if isinstance(subkey, bytes) and not subkey else pack(subkey)],
        values=[value.packed if isinstance(value, Packed) else pack(value)],
        expiration_time=[expires_at],
        **{"in_cache": [False], **more},
    )


class Packed:
    """Bytes that are not valid msgpack."""

    def __init__(self, packed: bytes) -> None:
        self.packed = packed


def nested(depth: int, inner: bytes = b"\x01") -> bytes:
    """Nested tuples, as msgpack's extension type 64."""
    for _ in range(depth):
        inner = b"\xc9" + (len(inner) + 1).to_bytes(4, "big") + b"\x40\x91" + inner
    return inner


def answering(swarm: SimulatedSwarm, peer_id: PeerID) -> None:
    """Lets a stranger answer pings; otherwise no peer adds it to a routing table."""

    async def answer(caller: PeerID, request: bytes) -> bytes:
        return dht_pb2.PingResponse(peer=dht_pb2.NodeInfo(node_id=bytes(20))).SerializeToString()

    SimulatedTransport(swarm.network, peer_id).handlers["ping"] = answer


async def held(peer: SimulatedPeer, key: str) -> Entries:
    request = dht_pb2.FindRequest(keys=[id_bytes(key_id_of(key))])
    (result,) = (await send(peer, "find", request)).results
    if result.type == dht_pb2.RESULT_TYPE_NOT_FOUND:
        return {}
    return unpack_entries(result.value)


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
        pack({1: 2}),
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
        dictionary = Packed(pack_entries({4: Entry(pack(key), until)}))
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
        key, until = swarm.keys.prefix(HOME.layer), world.unix_time() + 600
        request = store_request(
            key, STRANGER.peer_id.to_bytes(), announced_by(STRANGER, key, until), until, in_cache=[True]
        )
        assert list((await send(peer, "store", request)).store_ok) == [False]
        assert swarm.hosts[HOME].peer_id.to_bytes() in await held(peer, key)

    play(world, scenario)


def test_a_dictionary_that_is_handed_over_is_taken_but_for_its_bad_entries(world: VirtualLoop) -> None:
    async def scenario(swarm: SimulatedSwarm, peer: SimulatedPeer) -> None:
        key, until = swarm.keys.prefix(5), world.unix_time() + 60
        await send(peer, "store", store_request(key, 3, key, until))
        other = swarm.keys.prefix(6)
        brought = ((3, key, until - 10), (4, key, until), (5, other, until), (500, key, until))
        handed_over = pack_entries({n: Entry(pack(v), t) for n, v, t in brought})
        answer = await send(peer, "store", store_request(key, b"", Packed(handed_over), until))
        assert list(answer.store_ok) == [True]
        assert {name: expiry for name, (_, expiry) in (await held(peer, key)).items()} == {3: until, 4: until}

    play(world, scenario)


def test_messages_beyond_their_bounds_get_empty_answers(world: VirtualLoop) -> None:
    async def scenario(swarm: SimulatedSwarm, peer: SimulatedPeer) -> None:
        keys = [id_bytes(n) for n in range(MAX_FIND_KEYS + 1)]
        assert len((await send(peer, "find", dht_pb2.FindRequest(keys=keys[:-1]))).results) == MAX_FIND_KEYS
        assert not (await send(peer, "find", dht_pb2.FindRequest(keys=keys))).results
        assert not (await send(peer, "find", dht_pb2.FindRequest(keys=[b"short"]))).results
        key, until = swarm.keys.prefix(5), world.unix_time() + 60
        odd = store_request(key, 3, key, until)
        odd.keys.append(odd.keys[0])
        odd.subkeys.append(odd.subkeys[0])
        odd.expiration_time.append(until)
        assert not (await send(peer, "store", odd)).store_ok, "a value is missing"
        many = store_request(key, 3, key, until)
        for name in ("keys", "subkeys", "values", "expiration_time"):
            getattr(many, name).extend(list(getattr(many, name)) * MAX_ITEMS)
        assert not (await send(peer, "store", many)).store_ok
        assert await held(peer, key) == {}

    play(world, scenario)


def test_an_answer_fits_into_a_message_and_the_rest_is_asked_again(world: VirtualLoop) -> None:
    async def scenario(swarm: SimulatedSwarm, peer: SimulatedPeer) -> None:
        until, names = world.unix_time() + 60, [swarm.keys.expert(UID(0, (9, n))) for n in range(16)]
        strangers: list[Any] = [SimulatedIdentity(2000 + n) for n in range(45)]
        for name in names:
            for stranger in strangers:
                record = announced_by(stranger, name, until)
                subkey = stranger.peer_id.to_bytes()
                (stored,) = (
                    await send(peer, "store", store_request(name, subkey, record, until), stranger.peer_id)
                ).store_ok
                assert stored
        ids = [key_id_of(name) for name in names]
        request = dht_pb2.FindRequest(keys=[id_bytes(key) for key in ids])
        answer = await send(peer, "find", request)
        assert 1 < len(answer.results) < len(names)
        assert answer.ByteSize() <= MAX_MESSAGE_BYTES - 2**11
        assert all(len(unpack_entries(result.value)) == 45 for result in answer.results)
        client = await swarm.make_peer(serves_dht=False)
        await client.dht.ping(peer.peer_id)
        found = await client.registry.lookups.find(ids)
        assert [len(found[key].entries) for key in ids] == [45] * len(names)

    play(world, scenario)


def test_a_peer_that_asks_for_more_than_its_share_hears_of_neighbours_only(world: VirtualLoop) -> None:
    async def scenario(swarm: SimulatedSwarm, peer: SimulatedPeer) -> None:
        handlers = peer.server
        upload = peer.dht.upload = RateLimit(2e5, world.time)
        handlers._answers = SharedBudget(*StoreBounds().answer_rates(upload.limit))
        withheld, other = handlers._metrics.withheld, SimulatedIdentity(1001).peer_id
        request = dht_pb2.FindRequest(
            keys=[id_bytes(key_id_of(swarm.keys.node(other.peer_id))) for other in swarm.peers]
        )

        async def ask(sender: PeerID) -> Any:
            answer = await send(peer, "find", request, sender)
            assert len(answer.results) == len(request.keys)
            return [result.type for result in answer.results]

        full, empty = (
            [kind] * len(request.keys)
            for kind in (dht_pb2.RESULT_TYPE_DICTIONARY, dht_pb2.RESULT_TYPE_NOT_FOUND)
        )
        began, asked = world.time(), 0
        while await ask(STRANGER.peer_id) == full:
            asked += 1
            assert upload.bytes < 16 * 250_000 * 1.1, "a quarter of 1 MB/s, for 16 s"
        assert asked > 100
        assert await ask(STRANGER.peer_id) == empty
        assert total(withheld) == 2 * len(request.keys)
        assert await ask(other) == full, "who asked for nothing yet"
        await asyncio.sleep(60)
        assert await ask(STRANGER.peer_id) == full
        assert world.time() - began < 100

    play(world, scenario)


def test_a_peer_that_makes_others_work_without_end_gets_empty_answers(world: VirtualLoop) -> None:
    async def scenario(swarm: SimulatedSwarm, peer: SimulatedPeer) -> None:
        key, until = swarm.keys.prefix(5), world.unix_time() + 60
        forged = Packed(pack_entries({n: Entry(b"\xc4\x01x", until) for n in range(500)}))
        refused = peer.server._metrics.refused
        sent = 0
        while not total(refused):
            await send(peer, "store", store_request(key, b"", forged, until))
            sent += 1
            assert sent < 40
        find = dht_pb2.FindRequest(keys=[id_bytes(key_id_of(key))])
        assert not (await send(peer, "find", find)).results
        assert len((await send(peer, "find", find, SimulatedIdentity(1001).peer_id)).results) == 1
        await asyncio.sleep(10)
        assert len((await send(peer, "find", find)).results) == 1

    play(world, scenario)


def test_entries_under_a_full_key_count_as_the_work_that_they_make(world: VirtualLoop) -> None:
    """To store one more entry, all entries of its key are unpacked."""

    async def scenario(swarm: SimulatedSwarm, peer: SimulatedPeer) -> None:
        handlers, key, until = peer.server, swarm.keys.prefix(HOME.layer), world.unix_time() + 60

        async def work_of_one(number: int) -> float:
            stranger: Any = SimulatedIdentity(number)
            record = announced_by(stranger, key, until)
            request = store_request(key, stranger.peer_id.to_bytes(), record, until)
            await send(peer, "store", request, stranger.peer_id)
            return float(handlers._work._taken[stranger.peer_id] - handlers._work._virtual)

        first = await work_of_one(2000)
        for number in range(2001, 2240):
            await work_of_one(number)
        assert first < 5
        assert await work_of_one(2240) > 20

    play(world, scenario)


def test_index_entries_under_a_full_key_count_as_work_although_they_are_short(world: VirtualLoop) -> None:
    """Their common value is packed once, so 128 of them take fewer bytes than a few records."""

    async def scenario(swarm: SimulatedSwarm, peer: SimulatedPeer) -> None:
        key, until = swarm.keys.prefix(5), world.unix_time() + 60
        entries = Packed(pack_entries({n: Entry(pack(key), until) for n in range(128)}))
        await send(peer, "store", store_request(key, b"", entries, until))
        packed = peer.dht.storage.packed(key_id_of(key))
        assert len(packed) < 2000

        async def work_of(number: int, method: str, request: Any) -> float:
            stranger: Any = SimulatedIdentity(number)
            await send(peer, method, request, stranger.peer_id)
            return float(peer.server._work._taken[stranger.peer_id] - peer.server._work._virtual)

        find = dht_pb2.FindRequest(keys=[id_bytes(key_id_of(key))], have=[1])
        assert await work_of(2000, "find", find) == 1 + 128 / 32
        one = Packed(pack_entries({0: Entry(pack(key), until + 1)}))
        assert await work_of(2001, "store", store_request(key, b"", one, until)) == 1 + 128 / 32

    play(world, scenario)


def test_a_record_counts_as_more_work_than_an_index_entry(world: VirtualLoop) -> None:
    """A strange record's signature, and the two of its badge, take 0.35 ms to check."""

    async def scenario(swarm: SimulatedSwarm, peer: SimulatedPeer) -> None:
        key, until = swarm.keys.prefix(5), world.unix_time() + 60

        async def work_of(number: int, values: bytes) -> float:
            stranger: Any = SimulatedIdentity(number)
            entries = Packed(pack_entries({n: Entry(values, until) for n in range(100)}))
            await send(peer, "store", store_request(key, b"", entries, until), stranger.peer_id)
            return float(peer.server._work._taken[stranger.peer_id] - peer.server._work._virtual)

        assert await work_of(2000, bytes(100)) == 100
        assert await work_of(2001, bytes(200)) == 300

    play(world, scenario)


def test_a_dictionary_counts_as_the_work_of_unpacking_it_even_if_it_has_no_entries(
    world: VirtualLoop,
) -> None:
    """Tens of thousands of empty lists take 15 to 40 ms, and 8 MB of memory meanwhile."""

    async def scenario(swarm: SimulatedSwarm, peer: SimulatedPeer) -> None:
        key, until = swarm.keys.prefix(5), world.unix_time() + 60
        rows: list[list[object]] = [[] for _ in range(100_000)]
        lists = Packed(pack(msgpack.ExtType(0x50, pack([0.0, 0.0, rows]))))
        assert not unpack_entries(lists.packed)
        refused, sent = peer.server._metrics.refused, 0
        while not total(refused):
            await send(peer, "store", store_request(key, b"", lists, until))
            sent += 1
            assert sent < 50

    play(world, scenario)


def test_a_handler_that_fails_unexpectedly_gives_an_empty_answer_and_says_so_once(
    world: VirtualLoop, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def breaks(*question: object) -> None:
        raise RuntimeError("a mistake\n\x1b[31m")

    async def scenario(swarm: SimulatedSwarm, peer: SimulatedPeer) -> None:
        guard = peer.server.guard
        key, until = swarm.keys.prefix(5), world.unix_time() + 60
        find = dht_pb2.FindRequest(keys=[id_bytes(key_id_of(key))])
        monkeypatch.setattr(peer.dht.storage, "packed", breaks)
        monkeypatch.setattr(peer.dht.storage, "put", breaks)
        for _ in range(3):
            assert await send(peer, "find", find) == dht_pb2.FindResponse()
            answer = await send(peer, "store", store_request(key, 3, key, until))
            assert answer == dht_pb2.StoreResponse()
        assert totals(guard.failures, "message")["dht"] == 6
        (line,) = caplog.messages
        assert "a mistake" in line
        assert line.isprintable()
        assert not peer.server._under_way

    play(world, scenario)


def test_an_entry_at_which_the_validator_fails_is_left_out_and_counted(
    world: VirtualLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(swarm: SimulatedSwarm, peer: SimulatedPeer) -> None:
        key, until = swarm.keys.prefix(5), world.unix_time() + 60
        validator: Any = peer.dht.validator
        guard = peer.server.guard
        validate = validator.validate

        def breaks_at_four(record: Any) -> bool:
            if record.subkey == pack(4):
                raise TypeError("unforeseen")
            return bool(validate(record))

        monkeypatch.setattr(validator, "validate", breaks_at_four)
        packed = pack_entries({n: Entry(pack(key), until) for n in (3, 4, 5)})
        answer = await send(peer, "store", store_request(key, b"", Packed(packed), until))
        assert list(answer.store_ok) == [True]
        assert set(await held(peer, key)) == {3, 5}
        assert totals(guard.failures, "message")["dht"] == 1

    play(world, scenario)


def test_a_trainer_that_gets_to_know_a_large_swarm_is_served_within_its_share(world: VirtualLoop) -> None:
    async def run() -> None:
        swarm = await SimulatedSwarm.start(world, 4, 1024, Link(rtt_s=0.1), seed=1, in_place=True)
        trainer = await swarm.make_peer(serves_dht=False)
        await swarm.join(trainer)
        directory = Directory(trainer.experts, swarm.manifest, refresh_every_s=3.0, now=world.unix_time)
        for _ in range(3):
            view = await directory.refresh()
            assert view.live_experts() == 1024
            await asyncio.sleep(3.0)
        handlers = [peer.server for peer in swarm.peers]
        assert not any(total(h._metrics.withheld) or total(h._metrics.refused) for h in handlers)

    world.run_until_complete(run())


def test_calls_under_way_are_bounded_for_each_peer_and_in_all(world: VirtualLoop) -> None:
    """Nobody answers the pings that were requested."""

    async def scenario(swarm: SimulatedSwarm, peer: SimulatedPeer) -> None:
        handlers = peer.server
        handlers._dials = FairTurns(1e4, 1e4)
        senders = [SimulatedIdentity(3000 + n).peer_id for n in range(500)]

        def pings(sender: PeerID, count: int) -> None:
            node = dht_pb2.NodeInfo(node_id=id_bytes(node_id_of(sender.to_bytes())))
            request = dht_pb2.PingRequest(peer=node, validate=True)
            tasks.extend(asyncio.create_task(send(peer, "ping", request, sender)) for _ in range(count))

        tasks: list[asyncio.Task[Any]] = []
        pings(senders[0], 200)
        await asyncio.sleep(0.1)
        assert handlers._under_way[senders[0]] == 64
        for sender in senders[1:]:
            pings(sender, 3)
        await asyncio.sleep(0.1)
        assert handlers._under_way.total() == 512
        newest = [handlers._under_way[sender] for sender in senders[200:300]]
        assert newest == [1] * 100, "when there are many, each has one"
        await asyncio.gather(*tasks)
        assert not handlers._under_way

    play(world, scenario)


def test_one_peer_has_one_node_id_whatever_it_claims(world: VirtualLoop) -> None:
    async def scenario(swarm: SimulatedSwarm, peer: SimulatedPeer) -> None:
        table = peer.dht.table
        answering(swarm, STRANGER.peer_id)
        other = await swarm.make_peer()
        claimed = [os.urandom(20) for _ in range(30)] + [
            id_bytes(other.dht.node_id),
            id_bytes(peer.dht.node_id),
        ]
        for node_id in (b"", b"short", bytes(40), *claimed):
            sender = dht_pb2.NodeInfo(node_id=node_id)
            await send(peer, "ping", dht_pb2.PingRequest(peer=sender))
            await send(peer, "find", dht_pb2.FindRequest(peer=sender, keys=[bytes(20)]))
            await send(peer, "store", dht_pb2.StoreRequest(peer=sender))
        await asyncio.sleep(1)
        assert dict(table) == {node_id_of(STRANGER.peer_id.to_bytes()): STRANGER.peer_id}

    play(world, scenario)


@pytest.mark.parametrize("name", [b"", b"\x12\x20" + bytes(31), bytes(34), b"\x12\x20" + bytes(33)])
def test_a_peer_whose_name_is_no_peer_id_has_no_place(world: VirtualLoop, name: bytes) -> None:
    async def scenario(swarm: SimulatedSwarm, peer: SimulatedPeer) -> None:
        node = dht_pb2.NodeInfo(node_id=id_bytes(node_id_of(name)))
        await send(peer, "ping", dht_pb2.PingRequest(peer=node), PeerID(name))
        assert not len(peer.dht.table)

    play(world, scenario)


def test_the_routing_table_stays_small_however_many_strangers_come(world: VirtualLoop) -> None:
    async def scenario(swarm: SimulatedSwarm, peer: SimulatedPeer) -> None:
        for n in range(2000):
            stranger: Any = SimulatedIdentity(10_000 + n)
            answering(swarm, stranger.peer_id)
            node = dht_pb2.NodeInfo(node_id=bytes(20))
            await send(peer, "find", dht_pb2.FindRequest(peer=node), stranger.peer_id)
            await asyncio.sleep(0.02)  # few are called back at the same time
        table = peer.dht.table
        assert len(table) == len(dict(table)) <= 2 * 20 * len(table._buckets)
        assert len(table) > 100
        assert len(table._buckets) < 64

    play(world, scenario)


def test_a_caller_that_does_not_answer_enters_no_table_and_few_are_called_back(world: VirtualLoop) -> None:
    async def scenario(swarm: SimulatedSwarm, peer: SimulatedPeer) -> None:
        pings, node = swarm.network.traffic.by_method, dht_pb2.NodeInfo(node_id=bytes(20))
        before = pings["ping"]
        for _ in range(3):
            for n in range(200):
                stranger: Any = SimulatedIdentity(10_000 + n)
                await send(peer, "find", dht_pb2.FindRequest(peer=node), stranger.peer_id)
            await asyncio.sleep(1)
        assert pings["ping"] - before == 16, "at the same time"
        await asyncio.sleep(5)
        assert not len(peer.dht.table)
        assert not peer.dht._called_back

    play(world, scenario)


def test_strangers_that_ask_to_be_dialled_back_wait_for_turns(world: VirtualLoop) -> None:
    """A caller can name other addresses each time, and each may be somebody's."""

    async def scenario(swarm: SimulatedSwarm, peer: SimulatedPeer) -> None:
        dialled = swarm.network.traffic.by_method
        before = dialled["ping"]
        request = dht_pb2.PingRequest(validate=True)
        senders = [SimulatedIdentity(10_000 + n).peer_id for n in range(400)]
        await asyncio.gather(*(send(peer, "ping", request, sender) for sender in senders))
        assert dialled["ping"] - before < 100, "a burst, and as many of one neighbourhood as may wait"
        assert total(peer.server._metrics.refused) > 280

    play(world, scenario)


def test_a_pong_with_a_contact_counts_as_an_answer(world: VirtualLoop) -> None:
    async def scenario(swarm: SimulatedSwarm, peer: SimulatedPeer) -> None:
        transport = SimulatedTransport(swarm.network, peer.peer_id, SimulatedContacts(swarm.network))
        transport.handlers, peer.dht.transport = peer.transport.handlers, transport
        upload = peer.dht.upload = RateLimit(2e5, world.time)
        peer.server._answers = SharedBudget(*StoreBounds().answer_rates(upload.limit))
        peer.server._work = SharedBudget(1e6, 1e6)
        told = sent = 0
        for _ in range(5000):
            answer = await send(peer, "ping", dht_pb2.PingRequest())
            told += answer.peer.HasField("contact")
            sent += answer.ByteSize()
        assert 1000 < told < 4500
        assert answer.dht_time, "it still hears the time"
        assert upload.bytes == sent < 50_000 * 16 * 1.1

    play(world, scenario)


def test_a_newcomer_is_handed_all_it_should_store_in_messages_within_the_bound(world: VirtualLoop) -> None:
    async def scenario(swarm: SimulatedSwarm, peer: SimulatedPeer) -> None:
        uids = [UID(0, (n, n)) for n in range(1000)]
        await peer.experts.announce([ReplicaAnnouncement(uid, ReplicaState.SERVING) for uid in uids], 600.0)
        newcomer = await swarm.make_peer()
        await swarm.join(newcomer)
        await asyncio.sleep(10)
        missing = [n for n in range(1000) if not await held(newcomer, swarm.keys.prefix(0, (n,)))]
        assert missing == []

    play(world, scenario)


def test_a_newcomer_that_goes_away_is_handed_nothing_more(world: VirtualLoop) -> None:
    async def scenario(swarm: SimulatedSwarm, peer: SimulatedPeer) -> None:
        uids = [UID(0, (n, n)) for n in range(1000)]
        await peer.experts.announce([ReplicaAnnouncement(uid, ReplicaState.SERVING) for uid in uids], 600.0)
        newcomer, stored = await swarm.make_peer(), list[bytes]()

        async def silent(caller: PeerID, request: bytes) -> bytes:
            stored.append(request)
            await asyncio.Event().wait()
            return b""

        newcomer.transport.handlers["store"] = silent
        node = dht_pb2.NodeInfo(node_id=id_bytes(newcomer.dht.node_id))
        await send(peer, "ping", dht_pb2.PingRequest(peer=node), newcomer.peer_id)
        await asyncio.sleep(60)
        assert len(stored) == 1

    play(world, scenario)


def test_look_ups_by_many_leave_turns_to_others(world: VirtualLoop) -> None:
    async def scenario(swarm: SimulatedSwarm, peer: SimulatedPeer) -> None:
        table = peer.dht.table
        for n in range(200):
            other = SimulatedIdentity(4000 + n).peer_id
            table.add(node_id_of(other.to_bytes()), other)
        request = dht_pb2.FindRequest(keys=[os.urandom(20) for _ in range(MAX_FIND_KEYS)])
        callers = [SimulatedIdentity(4000 + n).peer_id for n in range(50)]
        slice_s = await longest_slice(
            lambda: asyncio.gather(*(send(peer, "find", request, caller) for caller in callers))
        )
        assert slice_s < 0.05, "0.3 s together"

    play(world, scenario)


def test_strangers_make_a_node_send_what_it_stores_no_faster_than_a_rate(world: VirtualLoop) -> None:
    async def scenario(swarm: SimulatedSwarm, peer: SimulatedPeer) -> None:
        storage, refusals = peer.dht.storage, peer.dht.metrics.not_handed_over
        peer.dht.bounds = StoreBounds(handed_bytes_per_s=10_000.0)
        uids = [UID(0, (n, n)) for n in range(100)]
        await peer.experts.announce([ReplicaAnnouncement(uid, ReplicaState.SERVING) for uid in uids], 600.0)
        sent, began = swarm.network.traffic.by_method["store"], world.time()
        for _ in range(100):
            newcomer = await swarm.make_peer()
            node = dht_pb2.NodeInfo(node_id=id_bytes(newcomer.dht.node_id))
            await send(peer, "ping", dht_pb2.PingRequest(peer=node), newcomer.peer_id)
            await asyncio.sleep(0.1)
        await asyncio.sleep(0.5)
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
