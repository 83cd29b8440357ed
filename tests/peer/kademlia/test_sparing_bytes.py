"""Look-ups transfer what the reader lacks, and no more."""

import asyncio
import math
import random
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
from dht_peers import forget_all
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.simulated_p2p import Link, simulated_world
from benchmarks.simulated_swarm import SimulatedPeer, SimulatedSwarm
from peer.identity import PeerID
from peer.kademlia.lookups import FRUGAL, STORED_AGAIN, Item
from peer.kademlia.node import Spending
from peer.kademlia.routing import REPLICAS, id_bytes, key_id_of, node_id_of
from peer.kademlia.search import DEFAULT_LIMITS, IterativeSearch, SearchLimits
from peer.kademlia.validation import MAX_KEY_BYTES, SMALL_ENTRY_BYTES, Entries, Entry, entry_bytes, some_of
from peer.wire import dht_pb2

KEY = "shared"
WRITERS = 8


def play(
    scenario: Callable[[SimulatedSwarm], Coroutine[Any, Any, None]],
    nodes: int = 14,
    contacts: bool = False,
    in_place: bool = True,
) -> None:
    """`contacts`: whether nodes name others in contacts, as real ones do. `in_place`: whether they know many others
    from the start, without having joined.
    """
    with simulated_world() as loop:

        async def run() -> None:
            swarm = await SimulatedSwarm.start(
                loop, nodes, 4, Link(rtt_s=0.1), seed=1, in_place=in_place, with_contacts=contacts
            )
            for peer in swarm.peers:
                peer.dht.validator = None
            await scenario(swarm)

        loop.run_until_complete(run())


async def write(swarm: SimulatedSwarm, lifetime_s: float, writers: int = WRITERS) -> None:
    until = swarm.peers[0].registry.now() + lifetime_s
    for n in range(writers):
        await swarm.peers[n].lookups.store([Item(KEY, n, bytes(1000), until)])


async def newcomer(swarm: SimulatedSwarm) -> SimulatedPeer:
    reader = await swarm.make_peer(serves_dht=False)
    reader.dht.validator = None
    await swarm.join(reader)
    return reader


def test_a_writer_is_told_no_values() -> None:
    async def scenario(swarm: SimulatedSwarm) -> None:
        swarm.network.traffic.largest = 0
        await write(swarm, 60)
        assert not swarm.network.traffic.largest, "all but the first look up a key that has values"
        reader = await newcomer(swarm)
        found = (await reader.lookups.find([key_id_of(KEY)]))[key_id_of(KEY)]
        assert set(found.entries) == set(range(WRITERS))

    play(scenario)


def test_what_a_reader_has_is_not_told_again_and_what_is_new_is() -> None:
    async def scenario(swarm: SimulatedSwarm) -> None:
        key = key_id_of(KEY)
        await write(swarm, 60)
        reader = await newcomer(swarm)
        before = (await reader.lookups.find([key]))[key].entries
        swarm.network.traffic.largest = 0
        again = (await reader.lookups.find([key]))[key]
        assert swarm.network.traffic.largest < 100
        assert again.entries == before
        assert again.search.found_after is not None, "to have the same is to have a value"
        await write(swarm, 90, writers=2)
        swarm.network.traffic.largest = 0
        renewed = (await reader.lookups.find([key]))[key].entries
        assert 2_000 < swarm.network.traffic.largest < 3_000
        assert {n for n, entry in renewed.items() if entry != before[n]} == {0, 1}

    play(scenario)


def test_witnesses_do_not_return_entries_that_have_been_renewed_since() -> None:
    async def scenario(swarm: SimulatedSwarm) -> None:
        key, readers = key_id_of(KEY), swarm.peers[20:]
        for peer in swarm.peers:
            peer.lookups._sample_at = peer.lookups._replace_at = math.inf
        await write(swarm, 300)
        for peer in swarm.peers:
            await peer.lookups.find([key])  # stores what it reads
        await write(swarm, 600)
        before = swarm.network.traffic.sent
        for reader in readers:
            found = (await reader.lookups.find([key], FRUGAL))[key]
            assert len(found.entries) == WRITERS
            assert len({entry.expires_at for entry in found.entries.values()}) == 1
        assert swarm.network.traffic.sent - before < 2 * 1000 * WRITERS * len(readers)

    play(scenario, nodes=30, in_place=False)


def holders(swarm: SimulatedSwarm, until: float) -> set[PeerID]:
    """The peers that have the first writer's item with this expiry."""
    key = key_id_of(KEY)
    stored = {peer.peer_id: peer.dht.storage.get(key).get(0) for peer in swarm.peers}
    return {peer for peer, entry in stored.items() if entry is not None and entry.expires_at == until}


@contextmanager
def away(swarm: SimulatedSwarm, peer: SimulatedPeer) -> Iterator[None]:
    """Until the block ends, nobody reaches the peer."""
    name = peer.peer_id.to_bytes()
    transport = swarm.network.peers.pop(name)
    yield
    swarm.network.peers[name] = transport


async def store_again(swarm: SimulatedSwarm) -> tuple[set[PeerID], int]:
    """The first peer writes its item once more. Returns who holds it then, and how many calls looked for nodes."""
    await asyncio.sleep(20)
    writer, until = swarm.peers[0], swarm.peers[0].registry.now() + 90
    before = swarm.network.traffic.by_method["find"]
    assert await writer.lookups.store([Item(KEY, 0, bytes(1000), until)])
    return holders(swarm, until), swarm.network.traffic.by_method["find"] - before


def test_a_writer_stores_at_the_same_nodes_a_few_times_without_looking_for_nearer_ones() -> None:
    async def scenario(swarm: SimulatedSwarm) -> None:
        first, calls = await store_again(swarm)
        assert calls
        assert len(first) >= REPLICAS
        for _ in range(STORED_AGAIN):
            assert await store_again(swarm) == (first, 0)
        again, calls = await store_again(swarm)
        assert calls, "others may have joined since"
        assert len(again) >= REPLICAS

    play(scenario, nodes=30, contacts=True)


def test_a_writer_looks_for_others_as_soon_as_a_holder_does_not_answer() -> None:
    async def scenario(swarm: SimulatedSwarm) -> None:
        before, _ = await store_again(swarm)
        dead = min(
            before - {swarm.peers[0].peer_id}, key=lambda peer: node_id_of(peer.to_bytes()) ^ key_id_of(KEY)
        )
        swarm.network.kill([dead])
        swarm.peers = [peer for peer in swarm.peers if peer.peer_id != dead]
        after, calls = await store_again(swarm)
        assert calls
        assert len(after - {swarm.peers[0].peer_id}) >= REPLICAS - 1
        nearest = sorted(swarm.peers, key=lambda peer: peer.dht.node_id ^ key_id_of(KEY))[:REPLICAS]
        assert {peer.peer_id for peer in nearest} <= after
        assert dead not in after
        assert await store_again(swarm) == (after, 0), "it forgets the dead one"

    play(scenario, nodes=30, contacts=True)


def test_a_writer_looks_for_the_nearest_as_soon_as_it_knows_a_nearer_one() -> None:
    async def scenario(swarm: SimulatedSwarm) -> None:
        key = key_id_of(KEY)
        nearest = min(swarm.peers[1:], key=lambda peer: peer.dht.node_id ^ key)
        with away(swarm, nearest):
            before, _ = await store_again(swarm)
        assert nearest.peer_id not in before
        assert await store_again(swarm) == (before, 0), "it has not heard of the other"
        assert await swarm.peers[0].dht.ping(nearest.peer_id) is not None
        after, calls = await store_again(swarm)
        assert calls
        assert nearest.peer_id in after

    play(scenario, nodes=30, contacts=True)


def test_a_writer_with_few_holders_looks_for_others_as_soon_as_it_knows_one() -> None:
    async def scenario(swarm: SimulatedSwarm) -> None:
        key = key_id_of(KEY)
        farthest = max(swarm.peers[1:], key=lambda peer: peer.dht.node_id ^ key)
        with away(swarm, farthest):
            before, _ = await store_again(swarm)
            assert len(before) == REPLICAS - 1
            assert farthest.peer_id not in before
            assert await store_again(swarm) == (before, 0), "there are no others"
        assert await swarm.peers[0].dht.ping(farthest.peer_id) is not None
        after, _ = await store_again(swarm)
        assert farthest.peer_id in after

    play(scenario, nodes=REPLICAS, contacts=True)


def test_a_writer_does_not_wait_for_late_holders_before_it_looks_for_others() -> None:
    async def scenario(swarm: SimulatedSwarm) -> None:
        before, _ = await store_again(swarm)
        swarm.network.kill(before - {swarm.peers[0].peer_id})
        swarm.peers = [peer for peer in swarm.peers if peer.peer_id.to_bytes() in swarm.network.peers]
        began = asyncio.get_running_loop().time()
        after, _ = await store_again(swarm)
        assert len(after) >= REPLICAS
        assert asyncio.get_running_loop().time() - began < 20 + 2.0

    play(scenario, nodes=30, contacts=True)


def test_a_writer_whose_holders_are_all_gone_stores_at_others_once_there_are_any() -> None:
    async def scenario(swarm: SimulatedSwarm) -> None:
        writer, until = await newcomer(swarm), swarm.peers[0].registry.now() + 90
        peers = dict(swarm.network.peers)
        swarm.network.kill([peer.peer_id for peer in swarm.peers])
        for _ in range(2):
            assert not await writer.lookups.store([Item(KEY, 0, b"", until)])
        swarm.network.peers |= peers
        for peer in swarm.peers:
            await writer.dht.ping(peer.peer_id)
        assert await writer.lookups.store([Item(KEY, 0, b"", until)])

    play(scenario, contacts=True)


def test_a_writer_that_stores_twice_at_once_looks_for_others_no_later() -> None:
    async def scenario(swarm: SimulatedSwarm) -> None:
        writer = swarm.peers[0].lookups
        await store_again(swarm)
        for _ in range(STORED_AGAIN):
            item = Item(KEY, 0, bytes(1000), swarm.peers[0].registry.now() + 90)
            await asyncio.gather(writer.store([item]), writer.store([item]))
        _, calls = await store_again(swarm)
        assert calls

    play(scenario, nodes=30, contacts=True)


def test_a_frugal_look_up_finds_the_same_for_fewer_bytes() -> None:
    async def scenario(swarm: SimulatedSwarm) -> None:
        key, sent = key_id_of(KEY), {}
        await write(swarm, 60)
        for limits in (DEFAULT_LIMITS, FRUGAL):
            reader = await newcomer(swarm)
            await reader.lookups.sample()
            before = swarm.network.traffic.sent
            found = (await reader.lookups.find([key], limits))[key]
            sent[limits] = swarm.network.traffic.sent - before
            assert set(found.entries) == set(range(WRITERS))
        assert sent[FRUGAL] < sent[DEFAULT_LIMITS] / 1.5

    play(scenario)


def test_a_frugal_look_up_passes_over_the_dead() -> None:
    async def scenario(swarm: SimulatedSwarm) -> None:
        await write(swarm, 60)
        reader = await newcomer(swarm)
        holders = sorted(swarm.peers, key=lambda peer: peer.dht.node_id ^ key_id_of(KEY))
        swarm.network.kill([peer.peer_id for peer in holders[:2]])
        for keys in ([key_id_of(KEY)], [key_id_of(KEY), key_id_of("nothing is here")]):
            found = await reader.lookups.find(keys, FRUGAL)
            assert set(found[key_id_of(KEY)].entries) == set(range(WRITERS))

    play(scenario)


def test_liars_that_take_their_time_do_not_delay_a_frugal_look_up_one_after_the_other() -> None:
    async def scenario(swarm: SimulatedSwarm) -> None:
        key, loop = key_id_of(KEY), asyncio.get_running_loop()
        await write(swarm, 600)
        reader = await newcomer(swarm)
        await reader.lookups.sample()
        holders = sorted(swarm.peers, key=lambda peer: peer.dht.node_id ^ key)
        for liar in holders[:5]:
            await liar.dht.transport.serve("find", partial(answer_late, liar.dht.info))
        for _ in range(6):  # late answers make the reader patient
            forget_all(reader.dht.storage)
            began = loop.time()
            found = (await reader.lookups.find([key], FRUGAL))[key]
            assert found.entries
            assert loop.time() - began < 6.0

    play(scenario, nodes=30)


async def answer_late(own: dht_pb2.NodeInfo, sender: PeerID, data: bytes) -> bytes:
    """Answers after two seconds that it has nothing and knows nobody."""
    count = len(dht_pb2.FindRequest.FromString(data).keys)
    await asyncio.sleep(2.0)
    return dht_pb2.FindResponse(peer=own, results=[dht_pb2.FindResult()] * count).SerializeToString()


def test_a_holder_gives_some_entries_of_many_if_asked_for_few() -> None:
    async def scenario(swarm: SimulatedSwarm) -> None:
        key = key_id_of(KEY)
        await write(swarm, 60)
        reader = await newcomer(swarm)
        swarm.network.traffic.largest = 0
        found = (await reader.lookups.find([key], FRUGAL, room=3000))[key].entries
        assert 0 < swarm.network.traffic.largest < 3_200
        assert len(found) > 2, "each holder draws for itself"

    play(scenario)


@pytest.mark.parametrize("claimed", [1, WRITERS, 2**32 - 1])
def test_holders_that_give_some_entries_say_how_many_they_have_and_one_alone_is_not_believed(
    claimed: int,
) -> None:
    async def scenario(swarm: SimulatedSwarm) -> None:
        key = key_id_of(KEY)
        await write(swarm, 600)
        for peer in swarm.peers:  # writers keep what they wrote, and may be near
            if len(peer.dht.storage.get(key)) < WRITERS:
                forget_all(peer.dht.storage)
        liar = min(swarm.peers, key=lambda peer: peer.dht.node_id ^ key)

        async def answer(sender: PeerID, data: bytes) -> bytes:
            response = await liar.server.find(sender, dht_pb2.FindRequest.FromString(data))
            for result in response.results:
                result.entries = claimed
            return response.SerializeToString()

        await liar.dht.transport.serve("find", answer)
        for limits in (FRUGAL, DEFAULT_LIMITS):
            reader = await newcomer(swarm)
            found = (await reader.lookups.find([key], limits, room=1500))[key]
            assert len(found.entries) < WRITERS
            assert len(found.entries) + found.unread == WRITERS
            whole = (await reader.lookups.find([key], limits, room=MAX_KEY_BYTES))[key]
            assert (len(whole.entries), whole.unread) == (WRITERS, 0)

    play(scenario)


def test_a_count_of_what_only_one_node_has_seen_is_not_believed() -> None:
    """Of a key under which honest nodes have nothing, records can be made up together with their count."""

    async def scenario(swarm: SimulatedSwarm) -> None:
        key = key_id_of(KEY)
        nearest = sorted(swarm.peers, key=lambda peer: peer.dht.node_id ^ key)
        until = swarm.peers[0].registry.now() + 600

        async def answer(sender: PeerID, data: bytes) -> bytes:
            response = await nearest[0].server.find(sender, dht_pb2.FindRequest.FromString(data))
            for result in response.results:
                result.entries = 512
            return response.SerializeToString()

        await nearest[0].dht.transport.serve("find", answer)
        for large in (0, 1):
            if large:
                nearest[0].dht.storage.put(key, {1: Entry(bytes(1000), until)})
            for limits in (FRUGAL, DEFAULT_LIMITS):
                reader = await newcomer(swarm)
                found = (await reader.lookups.find([key], limits, room=1500))[key]
                assert (len(found.entries), found.unread) == (large, 0)

    play(scenario)


@given(st.lists(st.integers(1, 400), max_size=40), st.integers(0, 4000), st.integers(0, 2**32))
def test_some_entries_are_all_small_ones_and_as_many_others_as_fit(
    sizes: list[int], room: int, seed: int
) -> None:
    entries: Entries = {n: Entry(bytes(size), 1.0) for n, size in enumerate(sizes)}
    kept = some_of(entries, room, random.Random(seed))
    large = {n for n, entry in entries.items() if entry_bytes(n, entry) > SMALL_ENTRY_BYTES}
    assert kept.items() <= entries.items()
    assert entries.keys() - large <= kept.keys()
    left = room - sum(entry_bytes(n, kept[n]) for n in large & kept.keys())
    assert left >= 0
    assert all(entry_bytes(n, entries[n]) > left for n in large - kept.keys())


def test_an_answer_names_no_more_strangers_than_wanted() -> None:
    async def scenario(swarm: SimulatedSwarm) -> None:
        asked, asking = swarm.peers[:2]
        for wanted, named in ((0, 0), (3, 3), (None, 20)):
            request = dht_pb2.FindRequest(keys=[id_bytes(key_id_of(KEY))], contacts=wanted)
            answer = await asked.server.find(asking.peer_id, request)
            assert len(answer.contacts) == len(answer.results[0].nearest_peer_ids) == named
            assert len(answer.results[0].nearest_known) == 0

    play(scenario, nodes=40, contacts=True)


def test_witnesses_far_from_a_key_are_asked_for_no_contacts() -> None:
    async def scenario(swarm: SimulatedSwarm) -> None:
        asked: list[tuple[PeerID, dht_pb2.FindRequest]] = []
        reader, call = swarm.peers[0], swarm.network.call
        reader.lookups._sample_at = math.inf

        async def noted(sender: PeerID, receiver: PeerID, method: str, request: bytes) -> bytes:
            asked.append((receiver, dht_pb2.FindRequest.FromString(request)))
            return await call(sender, receiver, method, request)

        swarm.network.call = noted  # type: ignore[method-assign]  # to look at what is asked
        without, ids = 0, {peer.dht.node_id: peer.peer_id for peer in swarm.peers}
        for number in range(4):
            key = key_id_of(f"{KEY} {number}")
            near = {peer_id for node, peer_id in ids.items() if node ^ key <= reader.lookups.usual_reach()}
            asked.clear()
            await reader.lookups.find([key])
            # calls of the look-up before, which no longer need an answer, may still be made
            own = [(peer_id, request) for peer_id, request in asked if id_bytes(key) in request.keys]
            strangers = [peer_id for peer_id, request in own if not request.contacts]
            assert near.isdisjoint(strangers)
            without += len(strangers)
        assert without >= 4

    play(scenario, nodes=60, contacts=True)


def test_a_frugal_look_up_asks_each_witness_for_all_keys_in_one_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario(swarm: SimulatedSwarm) -> None:
        reader, call = swarm.peers[0], swarm.network.call
        names = [f"{KEY} {number}" for number in range(6)]
        keys = [key_id_of(name) for name in names]
        until = reader.registry.now() + 300
        await swarm.peers[1].lookups.store([Item(name, 0, bytes(1000), until) for name in names])
        far = sorted(swarm.peers[2:], key=lambda peer: min(peer.dht.node_id ^ key for key in keys))[-2:]
        witnesses = {peer.dht.node_id: peer.peer_id for peer in far}
        monkeypatch.setattr(reader.lookups, "witnesses", lambda number: witnesses)
        reader.lookups._sample_at = reader.lookups._replace_at = math.inf
        asked: dict[PeerID, list[dht_pb2.FindRequest]] = {peer_id: [] for peer_id in witnesses.values()}

        async def noted(sender: PeerID, receiver: PeerID, method: str, request: bytes) -> bytes:
            if receiver in asked:
                asked[receiver].append(dht_pb2.FindRequest.FromString(request))
            return await call(sender, receiver, method, request)

        monkeypatch.setattr(swarm.network, "call", noted)
        found = await reader.lookups.find(keys, FRUGAL)
        assert all(found[key].entries for key in keys)
        for calls in asked.values():
            assert len(calls) == 1
            assert sorted(calls[0].keys) == sorted(map(id_bytes, keys))
            assert len(calls[0].have) == len(keys), "a witness would return what is found already"

    play(scenario, nodes=60)


@pytest.mark.parametrize("limits", [DEFAULT_LIMITS, FRUGAL])
def test_further_witnesses_are_asked_only_for_keys_at_which_all_may_be_liars_each_in_one_call(
    monkeypatch: pytest.MonkeyPatch, limits: SearchLimits
) -> None:
    async def scenario(swarm: SimulatedSwarm) -> None:
        reader, call = swarm.peers[0], swarm.network.call
        keys = [key_id_of(f"{KEY} {number}") for number in range(6)]
        far = sorted(swarm.peers[1:], key=lambda peer: min(peer.dht.node_id ^ key for key in keys))[-16:]
        further = {peer.dht.node_id: peer.peer_id for peer in far}
        first = dict([*further.items()][:2])
        drawn: list[int] = []

        def witnesses(number: int) -> dict[int, PeerID]:
            drawn.append(number)
            return first if number == DEFAULT_LIMITS.witnesses else further

        monkeypatch.setattr(reader.lookups, "witnesses", witnesses)
        reader.lookups._sample_at = reader.lookups._replace_at = math.inf
        await reader.lookups.find(keys, limits)
        assert drawn == [2], "there are no liars"

        asked: dict[PeerID, list[list[bytes]]] = {peer_id: [] for peer_id in further.values()}

        async def noted(sender: PeerID, receiver: PeerID, method: str, request: bytes) -> bytes:
            if receiver in asked and method == "find":
                asked[receiver].append(sorted(dht_pb2.FindRequest.FromString(request).keys))
            return await call(sender, receiver, method, request)

        monkeypatch.setattr(swarm.network, "call", noted)
        misled = keys[:3]
        monkeypatch.setattr(
            IterativeSearch, "may_be_misled", property(lambda search: search.key in misled), raising=False
        )
        await reader.lookups.find(keys, limits)
        assert drawn == [2, 2, 16]
        wanted = sorted(map(id_bytes, misled))
        for node, peer_id in further.items():
            if node not in first and all(node ^ key > 3 * reader.lookups.usual_reach() for key in keys):
                assert asked[peer_id] == [wanted]

    play(scenario, nodes=60)


def test_few_calls_for_a_key_that_was_looked_up_before_ask_for_names() -> None:
    async def scenario(swarm: SimulatedSwarm) -> None:
        asked: list[dht_pb2.FindRequest] = []
        reader, call = swarm.peers[0], swarm.network.call
        reader.lookups._sample_at = math.inf

        async def noted(sender: PeerID, receiver: PeerID, method: str, request: bytes) -> bytes:
            asked.append(dht_pb2.FindRequest.FromString(request))
            answer = await call(sender, receiver, method, request)
            if not asked[-1].contacts:
                response = dht_pb2.FindResponse.FromString(answer)
                assert not response.contacts
                assert not any(result.nearest_node_ids for result in response.results)
            return answer

        swarm.network.call = noted  # type: ignore[method-assign]  # to look at what is asked
        key = key_id_of(KEY)
        await reader.lookups.find([key])
        asked.clear()
        for _ in range(10):
            await reader.lookups.find([key])
        with_names = [request for request in asked if request.contacts]
        assert 0 < len(with_names) < len(asked) / 2
        assert all(request.known for request in with_names)
        assert not any(request.known for request in asked if not request.contacts)

    play(scenario, nodes=40, contacts=True)


def test_the_first_answer_proves_that_a_record_is_held() -> None:
    """A peer looks in every period whether others still hold its record."""

    async def scenario(swarm: SimulatedSwarm) -> None:
        peer = swarm.peers[0]
        peer.lookups._sample_at = peer.lookups._replace_at = math.inf
        name = peer.registry.keys.node(peer.peer_id)
        key, subkey = key_id_of(name), peer.peer_id.to_bytes()

        async def look() -> tuple[bool, int]:
            before = swarm.network.traffic.by_method["find"]
            is_seen = await peer.registry.is_seen_by_others()
            return is_seen, swarm.network.traffic.by_method["find"] - before

        await peer.lookups.store([Item(name, subkey, bytes(1000), peer.registry.now() + 60)])
        near = peer.lookups.near(key)
        assert await look() == (True, 1)
        assert peer.lookups.near(key) == near, "it starts from all of them the next time"
        others = sorted(swarm.peers[1:], key=lambda other: other.dht.node_id ^ key)
        first = others[0].dht.storage
        forget_all(first)
        first.put(key, {b"a stranger's": Entry(b"something", peer.registry.now() + 60)})
        is_seen, calls = await look()
        assert is_seen
        assert calls > 1, "what others write under the same key proves nothing"
        for each in swarm.peers:  # also the peer itself, which would hand it over to one that it meets
            forget_all(each.dht.storage)
        is_seen, calls = await look()
        assert not is_seen
        assert calls >= DEFAULT_LIMITS.front + DEFAULT_LIMITS.doubt - 1, "all near ones have said so"

    play(scenario)


def test_calls_are_counted_for_the_purpose_for_which_they_are_made() -> None:
    async def scenario(swarm: SimulatedSwarm) -> None:
        reader, some, other = swarm.peers[0], Spending(), Spending()

        async def look() -> None:
            await reader.lookups.find([reader.lookups._random_key()], FRUGAL)

        async def spent(by: Spending) -> None:
            with by.counted():
                await asyncio.gather(look(), look())  # in tasks of their own

        await look()
        before = reader.dht.spent_bytes
        assert some.bytes == 0 < before
        await spent(some)
        assert some.bytes == reader.dht.spent_bytes - before
        first = some.bytes
        await asyncio.gather(spent(some), spent(other), look())
        assert some.bytes > first
        assert other.bytes > 0
        assert some.bytes + other.bytes < reader.dht.spent_bytes - before

    play(scenario)
