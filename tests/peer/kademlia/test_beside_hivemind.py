"""hivemind's own `DHTNode` and ours in one network, in both directions: messages have the same form and meaning.

hivemind's nodes get IDs derived as ours are. hivemind checks and bounds nothing, and keeps values without subkeys,
which our nodes refuse.
"""

import asyncio
import math
import random
import statistics
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgpack
import pytest
from hivemind.dht.protocol import DHTProtocol
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DictionaryDHTValue
from hivemind.proto import dht_pb2 as their_pb2
from hivemind.utils import MSGPackSerializer
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.hivemind_nodes import our_node, their_node
from benchmarks.simulated_p2p import Link, Network, SimulatedIdentity
from peer.identity import PeerID
from peer.kademlia.bootstrap import meet_neighbours
from peer.kademlia.lookups import Item, Lookups
from peer.kademlia.node import KademliaNode, Row
from peer.kademlia.routing import id_bytes, key_id_of, node_id_of
from peer.kademlia.validation import DICTIONARY, Entry, pack, pack_entries, unpack
from peer.wire import dht_pb2

LIFETIME_S = 60.0
WAIT_S = 30.0
"""How long hivemind's nodes wait for an answer. All peers answer, but a busy machine may stall for seconds."""


class Mixed:
    """A network of both kinds of nodes."""

    def __init__(self) -> None:
        self.network = Network(Link(rtt_s=0.0), seed=1)
        self.ours: list[KademliaNode] = []
        self.theirs: list[Any] = []

    async def grow(self, ours: int, theirs: int) -> "Mixed":
        """Adds nodes of both kinds in turns. Each joins through a random node of the network."""
        kinds = ["ours"] * ours + ["theirs"] * theirs
        random.Random(1).shuffle(kinds)
        for kind in kinds:
            name = SimulatedIdentity(len(self.names)).peer_id
            if kind == "ours":
                node = await our_node(self.network, name)
                if self.names:
                    assert await node.ping(random.choice(self.names), dials_back=True)
                    await meet_neighbours(node)
                self.ours.append(node)
            else:
                by = [f"/ip4/127.0.0.1/tcp/1/p2p/{random.choice(self.names)}"] if self.names else None
                self.theirs.append(
                    await their_node(
                        self.network, name, initial_peers=by, wait_timeout=WAIT_S, cache_nearest=0
                    )
                )
        return self

    @property
    def names(self) -> list[PeerID]:
        theirs = [PeerID(node.peer_id.to_bytes()) for node in self.theirs]
        return [*(node.peer_id for node in self.ours), *theirs]

    def holders(self, key: str) -> int:
        ours = sum(bool(node.storage.get(key_id_of(key))) for node in self.ours)
        place = DHTID.generate(source=key)
        return ours + sum(place in node.protocol.storage for node in self.theirs)


def play(scenario: Callable[[Mixed], Awaitable[None]], ours: int = 1, theirs: int = 1) -> None:
    async def run() -> None:
        random.seed(1)
        mixed = await Mixed().grow(ours, theirs)
        await scenario(mixed)
        for node in mixed.theirs:
            node.is_alive = False

    asyncio.run(run())


async def store(node: KademliaNode, *items: Item) -> set[tuple[str, int | bytes]]:
    return await Lookups(node).store(items)


async def found(node: KademliaNode, key: str) -> dict[int | bytes, tuple[Any, float]]:
    """What other nodes answer, and what it holds itself."""
    entries = (await Lookups(node).find([key_id_of(key)]))[key_id_of(key)].entries
    return {subkey: (unpack(entry.value), entry.expires_at) for subkey, entry in entries.items()}


async def they_find(node: Any, key: str) -> dict[Any, tuple[Any, float]]:
    got = await node.get(key, latest=True)
    return {} if got is None else {subkey: tuple(item) for subkey, item in got.value.items()}


@pytest.mark.parametrize("count", [1, 6])
def test_who_joins_enters_the_tables_of_those_it_meets(count: int) -> None:
    async def scenario(mixed: Mixed) -> None:
        for node in mixed.ours:
            known = {peer_id for _, peer_id in node.table}
            assert known <= {*mixed.names} - {node.peer_id}
            assert len(known) >= count
        for node in mixed.theirs:
            known = {PeerID(peer.to_bytes()) for peer in node.protocol.routing_table.peer_id_to_uid}
            assert known <= {*mixed.names} - {PeerID(node.peer_id.to_bytes())}
            assert len(known) >= count

    play(scenario, count, count)


def test_a_ping_tells_the_time_and_whether_the_other_dials_back() -> None:
    async def scenario(mixed: Mixed) -> None:
        (ours,), (theirs,) = mixed.ours, mixed.theirs
        answer = await ours.ping(PeerID(theirs.peer_id.to_bytes()), dials_back=True)
        assert answer is not None
        assert answer.available
        assert abs(answer.dht_time - time.time()) < 5
        assert await theirs.protocol.call_ping(theirs_id(ours), validate=True, strict=True) == ours.node_id

    play(scenario)


def theirs_id(node: KademliaNode) -> Any:
    """hivemind's ID object for one of our nodes."""
    return PeerID(node.peer_id.to_bytes())


@pytest.mark.parametrize(("ours", "theirs"), [(1, 1), (6, 6)])
def test_each_finds_what_the_other_stores(ours: int, theirs: int) -> None:
    async def scenario(mixed: Mixed) -> None:
        until = time.time() + LIFETIME_S
        assert await store(mixed.ours[0], Item("a", 1, b"one", until), Item("a", b"two", "2", until + 1))
        assert await mixed.theirs[0].store("b", b"three", until, subkey=3)
        expected_a, expected_b = {1: (b"one", until), b"two": ("2", until + 1)}, {3: (b"three", until)}
        for node in mixed.ours:
            assert await found(node, "a") == expected_a
            assert await found(node, "b") == expected_b
        for node in mixed.theirs:
            assert await they_find(node, "a") == expected_a
            assert await they_find(node, "b") == expected_b

    play(scenario, ours, theirs)


def test_many_keys_at_once_are_stored_and_found_each_way() -> None:
    async def scenario(mixed: Mixed) -> None:
        until, numbers = time.time() + LIFETIME_S, range(40)
        ours, theirs = mixed.ours[0], mixed.theirs[0]
        items = [Item(f"ours {n}", n, f"{n}", until) for n in numbers]
        assert len(await store(ours, *items)) == len(items)
        stored = await theirs.store_many([f"theirs {n}" for n in numbers], [b"x"] * 40, until, list(numbers))
        assert all(stored.values())
        got = await theirs.get_many([f"ours {n}" for n in numbers])
        assert [got[f"ours {n}"].value[n].value for n in numbers] == [f"{n}" for n in numbers]
        ids = [key_id_of(f"theirs {n}") for n in numbers]
        answers = await Lookups(ours).find(ids)
        assert [list(answers[key].entries) for key in ids] == [[n] for n in numbers]

    play(scenario, 5, 5)


def test_a_newer_entry_replaces_an_older_one_and_not_the_other_way_round() -> None:
    async def scenario(mixed: Mixed) -> None:
        now = time.time()
        ours, theirs = mixed.ours[0], mixed.theirs[0]
        assert await store(ours, Item("key", 1, "second", now + 40))
        assert not await theirs.store("key", "first", now + 20, subkey=1)
        assert await theirs.store("key", "third", now + 60, subkey=1)
        assert not await store(ours, Item("key", 1, "second", now + 40))
        assert await theirs.store("key", "beside", now + 10, subkey=2)
        expected = {1: ("third", now + 60), 2: ("beside", now + 10)}
        assert await found(ours, "key") == expected
        assert await they_find(theirs, "key") == expected

    play(scenario)


def test_what_has_expired_is_gone() -> None:
    async def scenario(mixed: Mixed) -> None:
        now = time.time()
        ours, theirs = mixed.ours[0], mixed.theirs[0]
        await store(ours, Item("ours", 1, "short", now + 2), Item("ours", 2, "long", now + 60))
        is_kept = await theirs.store("theirs", "short", now + 2, subkey=1)
        assert is_kept or time.time() > now + 2
        assert not await store(ours, Item("ours", 3, "past", now - 1))
        await asyncio.sleep(now + 2.05 - time.time())
        assert set(await they_find(theirs, "ours")) >= {2}
        assert set(await found(ours, "ours")) == {2}
        assert [s for s, (_, until) in (await found(ours, "theirs")).items() if until > time.time()] == []

    play(scenario)


def test_a_key_is_at_five_nodes() -> None:
    """How far a writer's reach extends depends on the random keys that it has looked up, so all nodes write."""

    async def scenario(mixed: Mixed) -> None:
        until, holders = time.time() + LIFETIME_S, list[int]()
        for writer, node in enumerate(mixed.ours):
            lookups, keys = Lookups(node), [f"ours {writer} {number}" for number in range(8)]
            await lookups.sample()
            await lookups.store([Item(key, 1, "x", until) for key in keys])
            holders += map(mixed.holders, keys)
        await mixed.theirs[0].store("theirs", "x", until, subkey=1)
        assert min(holders) >= 5
        assert statistics.mean(holders) <= 7, (
            "the writer keeps what it stores, and all within usual reach get it"
        )
        assert 5 <= mixed.holders("theirs") <= 6

    play(scenario, 10, 10)


@pytest.mark.parametrize(("ours", "theirs", "is_ours"), [(3, 0, True), (3, 0, False), (0, 1, True)])
def test_a_newcomer_is_handed_what_it_should_store(ours: int, theirs: int, is_ours: bool) -> None:
    async def scenario(mixed: Mixed) -> None:
        until, numbers = time.time() + LIFETIME_S, range(50)
        if ours:
            await store(mixed.ours[0], *(Item(f"key {n}", n, "x", until) for n in numbers))
        else:
            await mixed.theirs[0].store_many([f"key {n}" for n in numbers], ["x"] * 50, until, list(numbers))
        await mixed.grow(is_ours, not is_ours)

        def has(key: str) -> bool:
            if is_ours:
                return bool(mixed.ours[-1].storage.get(key_id_of(key)))
            return DHTID.generate(source=key) in mixed.theirs[-1].protocol.storage

        async with asyncio.timeout(WAIT_S):  # with fewer nodes than holders, all have all
            while not all(has(f"key {n}") for n in numbers):  # noqa: ASYNC110  # what others do
                await asyncio.sleep(0.01)

    play(scenario, ours, theirs)


def test_a_value_without_subkeys_is_refused_by_ours() -> None:
    async def scenario(mixed: Mixed) -> None:
        until = time.time() + LIFETIME_S
        (ours,), (theirs,) = mixed.ours, mixed.theirs
        place = DHTID.generate(source="key")
        assert await theirs.protocol.call_store(theirs_id(ours), [place], [pack("x")], until) == [False]
        assert await theirs.protocol.call_store(
            theirs_id(ours), [place], [pack("x")], until, subkeys=[7]
        ) == [True]
        assert unpack(ours.storage.get(key_id_of("key"))[7].value) == "x"

    play(scenario)


def test_a_whole_dictionary_is_stored_each_way() -> None:
    async def scenario(mixed: Mixed) -> None:
        until = time.time() + LIFETIME_S
        (ours,), (theirs,) = mixed.ours, mixed.theirs
        packed = pack_entries({n: Entry(pack(f"{n}"), until + n) for n in range(5)})
        name = PeerID(theirs.peer_id.to_bytes())
        assert await ours.store(name, [Row(key_id_of("ours"), DICTIONARY, packed, until + 4)]) == [True]
        assert theirs.protocol.storage.get(DHTID.generate(source="ours")).expiration_time == until + 4
        dictionary = DictionaryDHTValue()
        for n in range(5):
            dictionary.store(n, pack(f"{n}"), until + n)
        place = DHTID.generate(source="theirs")
        assert await theirs.protocol.call_store(theirs_id(ours), [place], [dictionary], until) == [True]
        assert {s: e.expires_at for s, e in ours.storage.get(place).items()} == {
            n: until + n for n in range(5)
        }
        (value, expires_at), nearest = (await theirs.protocol.call_find(theirs_id(ours), [place]))[place]
        assert dict(value.items()) == dict(dictionary.items())
        assert expires_at == until + 4
        assert not nearest, "one does not hear of itself"

    play(scenario)


def test_a_peer_that_is_gone_gives_no_answer() -> None:
    async def scenario(mixed: Mixed) -> None:
        (ours,), (theirs,) = mixed.ours, mixed.theirs
        gone = PeerID(theirs.peer_id.to_bytes())
        mixed.network.kill([gone])
        assert await ours.ping(gone, 0.05) is None
        assert not len(ours.table)

    play(scenario)


ENTRIES = st.builds(Entry, st.binary(max_size=200), st.floats(0, 2**33))


def all_differ(entries: Mapping[Any, Entry]) -> bool:
    return len({value for value, _ in entries.values()}) == len(entries)


# All subkeys have one type: hivemind's heap fails at two of different types that expire at the same time. No two
# entries have the same value: we pack it once, which hivemind does not know.
@given(
    st.dictionaries(st.integers(0, 2**31 - 1), ENTRIES, max_size=20).filter(all_differ)
    | st.dictionaries(st.binary(max_size=64), ENTRIES, max_size=20).filter(all_differ),
    st.text(max_size=30),
)
@settings(max_examples=50)
def test_keys_and_dictionaries_are_packed_as_theirs(entries: dict[int | bytes, Entry], key: str) -> None:
    assert key_id_of(key) == DHTID.generate(source=key)
    assert id_bytes(key_id_of(key)) == DHTID.generate(source=key).to_bytes()
    assert node_id_of(key.encode()) == DHTID.generate(source=key.encode())
    assert pack(key) == MSGPackSerializer.dumps(key)
    theirs = MSGPackSerializer.loads(pack_entries(entries))
    with theirs.freeze():
        assert {subkey: Entry(*entry) for subkey, entry in theirs.items()} == entries
    assert theirs.maxsize == math.inf
    assert DHTProtocol.IS_DICTIONARY == DICTIONARY
    assert msgpack.unpackb(pack(key)) == key


@pytest.mark.parametrize("name", sorted(dht_pb2.DESCRIPTOR.message_types_by_name))
def test_messages_have_the_fields_of_theirs(name: str) -> None:
    def fields(module: Any) -> dict[str, tuple[int, int, bool]]:
        described = getattr(module, name).DESCRIPTOR.fields
        shared = (f for f in described if f.name != "auth" and f.number < 15)
        return {f.name: (f.number, f.type, f.is_repeated) for f in shared}

    assert fields(dht_pb2) == fields(their_pb2)
