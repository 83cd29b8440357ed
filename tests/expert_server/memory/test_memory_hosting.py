"""Nodes that host memories in a real swarm: they take shards, verify them, follow revisions, and hand over."""

import asyncio
import errno
import logging
import shutil
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from callers import InSession, a_caller, numbered_identities
from grpc import StatusCode
from memory_folders import DIMENSIONS, SampleMemory, passages_in
from memory_peers import MEMORY_RIGHTS, read_request, search_request, until
from published_memories import HOST, folder, list_memories, memory_id, publishing, replicas, until_hosted
from real_swarm import DEADLINE_S, Play, Village, end, eventually, playing

from dht.announcements import NodeInfo
from dht.library import MOST_CONTACTS, LibraryEntry, MemoryRegistry
from dht.memory import MemoryID, MemoryManifest
from dht.swarm import Swarm
from dht.upkeep import ROUND_BYTES
from expert_server.memory.fetching import PartFetcher
from expert_server.memory.hosting import MemoryHosting
from expert_server.memory.placement import ShardKey
from expert_server.memory.store import MemoryStore
from expert_server.node import Node
from peer.errors import TransferError, UnreachableError
from peer.files import PlainFile, write_atomically
from peer.identity import Identity, PeerID
from peer.kademlia.lookups import Item
from peer.loop import LoopThread
from peer.metrics import total
from peer.rates import RateLimit
from peer.rpc.parts import PartClient

MEMORY = SampleMemory.make(each=100)
SECOND = SampleMemory.make("other-docs", seed=7, licenses=("GFDL-1.3-only",))
SIZE = sum(len(data) for data in MEMORY.files.values())


@pytest.fixture(scope="module")
def identities() -> list[Identity]:
    return numbered_identities(3)


@pytest.fixture
def play(loop: LoopThread, identities: list[Identity], tmp_path: Path, long_lives: None) -> Play:
    return playing(loop, identities, tmp_path)


def fetched(node: Node) -> int:
    return int(total(node.memories._metrics.fetches, outcome="fetched"))


async def stub_of(village: Village, swarm: Swarm, node: Node) -> InSession:
    client = PartClient(
        swarm.keys.swarm_id,
        a_caller(swarm.keys.swarm_id, None, MEMORY_RIGHTS),
        swarm.host.channels(8),
        RateLimit(None),
    )
    village.stack.push_async_callback(client.close)
    peer_id = node.swarm.host.peer_id
    info = (await swarm.registry.nodes([peer_id]))[peer_id]
    return InSession(*await client.service(2**24).stub(info))


async def text_of(stub: InSession, swarm: Swarm, memory: MemoryID, root: bytes, position: int) -> str | None:
    request = read_request(memory, (root, [position]))
    request.swarm_id = swarm.keys.swarm_id
    while True:
        try:
            (proven,) = (await stub.Read(request)).passages
            break
        except grpc.aio.AioRpcError as error:
            # said while the shard's file is replaced because a passage in it was revoked
            if error.code() is not StatusCode.UNAVAILABLE:
                raise
    text: str | None = proven.passage.text if proven.HasField("passage") else None
    return text


def test_a_memory_spreads_outlives_its_publisher_and_is_hosted_again(
    play: Play, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    async def scenario(village: Village) -> None:
        founder = await publishing(village, MEMORY)
        memory, invite = memory_id(village, MEMORY), await founder.swarm.invite()
        first_task = await village.run(founder)
        await until_hosted(founder.swarm, memory, 1, MEMORY)
        second, third = await village.join(1, invite, **HOST), await village.join(2, invite, **HOST)
        for node in (second, third):
            await village.run(node)
        # Two replicas are enough, so the two nodes divide the shards.
        await until_hosted(second.swarm, memory, 2, MEMORY)
        await until(lambda: second.state.name == "SERVING")
        await until(lambda: second.status().memory_shards + third.status().memory_shards >= 4)
        # The node is killed, so it withdraws nothing.
        await end(first_task)
        await founder.swarm.host.stop()
        await until(lambda: second.memories.hosted.shards == third.memories.hosted.shards == 4)
        gone = f"node {founder.swarm.host.peer_id.to_base58()[-8:]} has gone"
        await until(lambda: any(message.startswith(gone) for message in caplog.messages))
        # Both now have all shards, with the encoder and the codebook.
        for number in (1, 2):
            store = MemoryStore.open(folder(village, number, MEMORY))
            assert store.missing_parts() == []
        stub = await stub_of(village, third.swarm, second)
        assert (
            await text_of(stub, third.swarm, memory, MEMORY.roots[1], 5)
            == MEMORY.passages[MEMORY.roots[1]][0][5].text
        )

        async def says_so() -> bool:
            nodes = await third.swarm.registry.nodes([second.swarm.host.peer_id])
            return [node.memory_shards for node in nodes.values()] == [4]

        await eventually(says_so)

    play(scenario)


def test_what_came_stays_when_the_publisher_vanishes_half_way_and_the_rest_comes_when_it_is_back(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch, has_vanished = PartFetcher.fetch, asyncio.Event()
    came, late, lost = list[bytes](), list[bytes](), list[bytes]()

    async def half(fetcher: PartFetcher, memory: MemoryID, hosts: Any, name: bytes, *more: Any) -> Any:
        if name in MEMORY.files and name not in came and len(came) < 2:
            came.append(name)
        if name not in MEMORY.files or name in came:
            return await fetch(fetcher, memory, hosts, name, *more)
        late.append(name)
        await has_vanished.wait()
        try:
            return await fetch(fetcher, memory, hosts, name, *more)
        except (TransferError, UnreachableError):
            lost.append(name)
            raise

    monkeypatch.setattr(PartFetcher, "fetch", half)
    # between the publisher's end and its return, it can't prove what it announces
    monkeypatch.setattr("expert_server.memory.proofs._MISSED_S", 0.5)
    monkeypatch.setattr("expert_server.memory.proofs._DOUBTED_S", 1.0)

    async def scenario(village: Village) -> None:
        founder = await publishing(village, MEMORY)
        memory, task = memory_id(village, MEMORY), await village.run(founder)
        await until_hosted(founder.swarm, memory, 1, MEMORY)
        node = await village.join(1, await founder.swarm.invite(), **HOST)
        await village.run(node)
        await until(lambda: bool(late))
        await until(lambda: node.memories.hosted.mine() == {ShardKey(memory, root) for root in came})
        await end(task)
        await founder.swarm.host.stop()
        has_vanished.set()
        await until(lambda: bool(lost))
        store = node.memories.hosted.served[str(memory)]
        assert passages_in(store, came[0]) == MEMORY.passages[came[0]][0]
        back = await village.join(0, await node.swarm.invite(), **HOST)
        await village.run(back)
        await until(lambda: set(store.shards) == set(MEMORY.roots))

    play(scenario)


def test_what_is_revoked_goes_from_all_hosts(play: Play) -> None:
    async def scenario(village: Village) -> None:
        founder = await publishing(village, MEMORY)
        memory = memory_id(village, MEMORY)
        await village.run(founder)
        node = await village.join(1, await founder.swarm.invite(), **HOST)
        await village.run(node)
        await until_hosted(founder.swarm, memory, 2, MEMORY)
        root = MEMORY.roots[2]
        later = MEMORY.revoking((root, 9))
        # The founder's node follows revisions as well: it fetches from any node that serves the new manifest.
        await asyncio.to_thread(
            founder.memories.hosted.served[str(memory)].follow, later.manifest.serialize()
        )
        await list_memories(founder, later)
        stub = await stub_of(village, founder.swarm, node)

        async def is_gone() -> bool:
            return await text_of(stub, founder.swarm, memory, root, 9) is None

        await eventually(is_gone)
        assert MEMORY.passages[root][0][9].text not in {
            passage.text for passage in passages_in(node.memories.hosted.served[str(memory)], root) if passage
        }
        assert await text_of(stub, founder.swarm, memory, root, 8) is not None
        again = MemoryStore.open(folder(village, 1, MEMORY))
        assert again.manifest.revision == 2

    play(scenario)


def test_a_node_that_restarts_serves_what_is_on_its_disk_and_fetches_what_was_damaged(
    play: Play, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(village: Village) -> None:
        founder = await publishing(village, MEMORY)
        memory, invite = memory_id(village, MEMORY), await founder.swarm.invite()
        await village.run(founder)
        node = await village.join(1, invite, **HOST)
        running = await village.run(node)
        await until_hosted(founder.swarm, memory, 2, MEMORY)
        await end(running)
        await node.stop()
        damaged = folder(village, 1, MEMORY) / "shards" / MEMORY.roots[0].hex()
        data = bytearray(damaged.read_bytes())
        data[-9] ^= 255
        damaged.write_bytes(data)
        with caplog.at_level(logging.WARNING):
            back = await village.join(1, invite, **HOST)
            await village.run(back)
            await until(lambda: back.memories.hosted.shards == 4)
        assert "on disk is not used, and will be fetched again" in caplog.text
        assert damaged.read_bytes() == MEMORY.files[MEMORY.roots[0]]
        await until(lambda: fetched(back) == 1)

    play(scenario)


def test_wrong_bytes_are_refused_and_come_from_another_host(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of three hosts gives the wrong shard whenever it is asked."""

    async def scenario(village: Village) -> None:
        founder = await publishing(village, MEMORY)
        memory, invite = memory_id(village, MEMORY), await founder.swarm.invite()
        await village.run(founder)
        liar = await village.join(1, invite, **HOST)
        await village.run(liar)
        await until_hosted(founder.swarm, memory, 2, MEMORY)
        store = liar.memories.hosted.served[str(memory)]
        asked, give = list[bytes](), store.file

        def another(name: bytes) -> tuple[PlainFile, bytes]:
            if name not in MEMORY.roots:
                return give(name)
            asked.append(name)
            return give(MEMORY.roots[1 if name == MEMORY.roots[0] else 0])

        monkeypatch.setattr(store, "file", another)
        monkeypatch.setattr("expert_server.memory.hosting.WANTED_REPLICAS", 3)
        last = await village.join(2, invite, **HOST)
        contacts = last.memories._fetcher._contacts

        async def the_liar_first(hosts: Iterable[PeerID], name: bytes) -> list[NodeInfo]:
            found = await contacts(hosts, name)
            return sorted(found, key=lambda node: node.peer_id != liar.swarm.host.peer_id)

        monkeypatch.setattr(last.memories._fetcher, "_contacts", the_liar_first)
        await village.run(last)
        await until(lambda: last.memories.hosted.shards == 4)
        for root, (passages, _) in MEMORY.passages.items():
            assert passages_in(last.memories.hosted.served[str(memory)], root) == passages
        assert asked
        assert total(last.memories._metrics.fetches, outcome="wrong")

    play(scenario)


def test_refused_memories_and_licences_are_not_hosted(play: Play) -> None:
    async def scenario(village: Village) -> None:
        founder = await publishing(village, MEMORY, SECOND)
        invite = await founder.swarm.invite()
        await village.run(founder)
        by_name = await village.join(1, invite, **HOST, memory_refuse=("python-docs",))
        by_license = await village.join(2, invite, **HOST, memory_licenses=("CC0-1.0",))
        for node in (by_name, by_license):
            await village.run(node)
        await until(lambda: by_name.memories.hosted.shards == by_license.memories.hosted.shards == 4)
        assert list(by_name.memories.hosted.served) == [str(memory_id(village, SECOND))]
        assert list(by_license.memories.hosted.served) == [str(memory_id(village, MEMORY))]
        assert not folder(village, 1, MEMORY).exists()

    play(scenario)


def test_a_licence_that_only_the_manifest_names_is_refused_once(
    play: Play, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The list of refusals has room for eight."""
    caplog.set_level(logging.INFO)
    many = SampleMemory.make("many-licences", seed=3, licenses=(*(f"L-{n}" for n in range(8)), "secret"))
    fetched, fetch = Counter[bytes](), PartClient.fetch

    async def counting(parts: PartClient, peer: Any, memory: str, name: bytes, most: int) -> bytes:
        fetched[name] += 1
        return await fetch(parts, peer, memory, name, most)

    monkeypatch.setattr(PartClient, "fetch", counting)

    async def scenario(village: Village) -> None:
        founder = await publishing(village, many, MEMORY)
        await village.run(founder)
        allowed = tuple(license for license in (*many.manifest.licenses, "CC0-1.0") if license != "secret")
        node = await village.join(1, await founder.swarm.invite(), **HOST, memory_licenses=allowed)
        await village.run(node)
        await until(lambda: node.memories.hosted.shards == 4)
        refused = f"does not host memory {memory_id(village, many)}"
        await until(lambda: refused in caplog.text)  # or both would fetch the manifest at the same time
        for _ in range(3):
            await node.memories.publishers.follow()
            await node.memories.look()
        assert fetched[MemoryStore(Path(), many.manifest.serialize()).part.sha256] == 1
        assert list(node.memories.hosted.served) == [str(memory_id(village, MEMORY))]
        assert not folder(village, 1, many).exists()

    play(scenario)


async def a_host_that_has_not_looked(village: Village, memory: SampleMemory = MEMORY) -> Node:
    """It knows the founder's memory, of which it has no shards. Its look must be started by hand."""
    founder = await publishing(village, memory)
    await village.run(founder)
    await until_hosted(founder.swarm, memory_id(village, memory), 1, memory)
    node = await village.join(1, await founder.swarm.invite(), **HOST)
    node.memories.resume()
    await node.memories.publishers.follow()
    return node


def test_shards_that_were_others_turn_are_looked_at_again_before_the_next_look(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = list[int]()
    region_hosts = MemoryRegistry.region_hosts

    async def counting(
        registry: MemoryRegistry, memory: MemoryID, regions: Collection[int], **how: Any
    ) -> Any:
        reads.append(len(regions))
        return await region_hosts(registry, memory, regions, **how)

    def second_look(preferred: int, missing: int, looks: int, nodes: float) -> bool:
        return looks >= 2

    monkeypatch.setattr("expert_server.memory.placement.is_called", second_look)

    async def scenario(village: Village) -> None:
        node = await a_host_that_has_not_looked(village)
        monkeypatch.setattr(MemoryRegistry, "region_hosts", counting)
        await node.memories.look_again()
        assert reads == [], "nothing was seen to lack anything"
        await node.memories.look()
        assert node.memories.hosted.shards == 0
        await node.memories.look_again()
        assert node.memories.hosted.shards == len(MEMORY.roots)
        reads.clear()
        await node.memories.look()
        whole = reads[0]
        async with asyncio.timeout(60):
            while (
                node.memories._placement.lacking()
            ):  # on a busy machine, a host's record or proof may be late
                await asyncio.sleep(0.5)
                await node.memories.look()
        reads.clear()
        await node.memories.look_again()
        assert (whole, reads) == (4, []), "enough serve them now"

    play(scenario)


def test_a_look_knows_whether_shards_were_just_taken_and_whether_room_lacks(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("expert_server.memory.placement.is_called", lambda *how: True)

    async def scenario(village: Village) -> None:
        node = await a_host_that_has_not_looked(village)
        hosted, survey = node.memories.hosted, node.memories._survey
        read, looks = survey.read, list[tuple[bool, bool]]()

        async def noting(*what: Any, is_busy: bool, is_short: bool) -> Any:
            looks.append((is_busy, is_short))
            return await read(*what, is_busy=is_busy, is_short=is_short)

        monkeypatch.setattr(survey, "read", noting)
        enough = hosted._most_bytes
        hosted._most_bytes = hosted.disk_bytes + SIZE - 1
        for _ in range(6):
            await node.memories.look()
        assert 0 < hosted.shards < len(MEMORY.roots)
        no, busy, short = (False, False), (True, False), (False, True)
        assert (looks[:2], looks[-1]) == ([no, (True, True)], short)
        hosted._most_bytes = enough
        for _ in range(3):
            await node.memories.look()
        assert hosted.shards == len(MEMORY.roots)
        hosted._most_bytes = 1
        await node.memories.look()
        assert looks[-4:] == [short, busy, no, short]

    play(scenario)


def test_a_node_that_has_taken_or_dropped_a_shard_announces_only_its_cell(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("expert_server.memory.placement.is_called", lambda *how: True)
    announced = list[dict[int, str]]()

    async def scenario(village: Village) -> None:
        node = await a_host_that_has_not_looked(village)
        registry = node.memories.hosted._memories
        announcements = registry.announcements

        async def noting(memory: MemoryID, regions: Any, *how: Any) -> list[Item]:
            announced.append({region: state.name for region, (state, _) in regions.items()})
            return await announcements(memory, regions, *how)

        monkeypatch.setattr(registry, "announcements", noting)
        await node.memories.look()
        regions = MEMORY.manifest.by_region.keys()
        assert len(regions) == len(MEMORY.roots) == len(announced)
        assert sorted(announced, key=str) == sorted(({region: "SERVING"} for region in regions), key=str)

        hosted, memory = node.memories.hosted, memory_id(village, MEMORY)
        store, gone = hosted.stores[memory], MEMORY.manifest.shards[0]
        region = MEMORY.manifest.region_of[gone]
        await hosted.write(memory, store, lambda: store.drop(gone.root))
        announced.clear()
        await hosted.announce(memory, {region})
        await hosted.announce(memory)
        kept = dict.fromkeys(regions - {region}, "SERVING")
        assert announced == [{region: "WITHDRAWN"}, kept]

    play(scenario)


def test_an_announcement_of_all_regions_does_not_overwrite_a_later_one(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    can_be_made, can_be_stored = asyncio.Event(), asyncio.Event()
    announcements, store = MemoryRegistry.announcements, MemoryRegistry.store
    made = list[Collection[int]]()

    async def slow(registry: MemoryRegistry, memory: MemoryID, regions: Any, *how: Any) -> list[Item]:
        made.append(regions)
        if len(made) == 1:
            await can_be_made.wait()
        return await announcements(registry, memory, regions, *how)

    async def slowly_stored(registry: MemoryRegistry, items: list[Item]) -> None:
        if len(items) > 3:
            await can_be_stored.wait()
        await store(registry, items)

    async def scenario(village: Village) -> None:
        founder = await publishing(village, MEMORY)
        other = await village.join(1, await founder.swarm.invite(), experts=0)
        memory, hosted = memory_id(village, MEMORY), founder.memories.hosted
        await hosted.verify()
        await hosted.announce_all()
        monkeypatch.setattr(MemoryRegistry, "announcements", slow)
        monkeypatch.setattr(MemoryRegistry, "store", slowly_stored)
        gone = MEMORY.manifest.shards[0]
        region = MEMORY.manifest.region_of[gone]
        of_all = asyncio.create_task(hosted.announce_all())
        await until(lambda: len(made) == 1)
        files = hosted.stores[memory]
        await hosted.write(memory, files, lambda: files.drop(gone.root))
        withdrawing = asyncio.create_task(hosted.announce(memory, {region}))
        await asyncio.sleep(0.1)
        can_be_made.set()
        await withdrawing  # though the others are not stored yet
        can_be_stored.set()
        await of_all
        assert list(made[1]) == [region]
        hosts = await MemoryRegistry(other.swarm.registry).region_hosts(memory, MEMORY.manifest.by_region)
        assert {each: len(some) for each, some in hosts.items()} == {
            each: int(each != region) for each in MEMORY.manifest.by_region
        }

    play(scenario)


def test_a_region_whose_last_withdrawal_nobody_took_is_withdrawn_again(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(village: Village) -> None:
        founder = await publishing(village, MEMORY)
        memory, hosted = memory_id(village, MEMORY), founder.memories.hosted
        await hosted.verify()
        can_be_stored, stored = asyncio.Event(), list[dict[int, str]]()

        async def announcements(_: MemoryID, regions: Any, *how: Any) -> list[Any]:
            return [{region: state.name for region, (state, _) in regions.items()}]

        async def store(items: list[Any]) -> None:
            stored.append(items[0])
            number = len(stored)
            if number == 2:
                await can_be_stored.wait()
            if number == 3:
                raise UnreachableError("no DHT peer accepted our records")

        monkeypatch.setattr(hosted, "_memories", SimpleNamespace(announcements=announcements, store=store))
        await hosted.announce_all()
        files, gone = hosted.stores[memory], MEMORY.manifest.shards[0]
        region = MEMORY.manifest.region_of[gone]
        await hosted.write(memory, files, lambda: files.drop(gone.root))
        first = asyncio.create_task(hosted.announce(memory, {region}))
        await until(lambda: len(stored) == 2)
        with pytest.raises(UnreachableError):
            await hosted.announce(memory, {region})
        can_be_stored.set()
        await first
        await hosted.announce_all()
        assert stored[3][region] == "WITHDRAWN"
        await hosted.announce_all()
        assert region not in stored[4]

    play(scenario)


def test_a_memory_whose_announcements_nobody_takes_keeps_no_other_from_being_announced(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For example, because strangers sit around one of its keys, or because it is too large for the line."""

    async def scenario(village: Village) -> None:
        founder = await publishing(village, MEMORY, SECOND)
        hosted, memories = founder.memories.hosted, {memory_id(village, each) for each in (MEMORY, SECOND)}
        await hosted.verify()
        stored, refused = set[MemoryID](), set[MemoryID]()

        async def announcements(memory: MemoryID, *how: Any) -> list[Any]:
            return [memory]

        async def store(items: list[Any]) -> None:
            if refused.issuperset(items):
                raise UnreachableError("no DHT peer accepted our records")
            stored.update(items)

        monkeypatch.setattr(hosted, "_memories", SimpleNamespace(announcements=announcements, store=store))
        for memory in memories:
            stored.clear()
            refused = {memory}
            for _ in range(2):  # as often as a node tries in each period
                with pytest.raises(UnreachableError):
                    await hosted.announce_all()
            assert stored == memories - refused

    play(scenario)


def test_in_few_of_its_regions_a_host_says_how_to_call_it(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("expert_server.memory.placement.is_called", lambda *how: True)
    large = SampleMemory.make("large", grid=(4, 4))

    async def scenario(village: Village) -> None:
        node = await a_host_that_has_not_looked(village, large)
        memory, me = memory_id(village, large), node.swarm.host.peer_id
        reading = await village.observe(2, await node.swarm.invite())

        async def regions_with_contact() -> int:
            registry, regions = MemoryRegistry(reading.registry), large.manifest.by_region
            hosts = await registry.region_hosts(memory, regions, with_contacts=True)
            mine = [host for some in hosts.values() for host in some if host.peer_id == me]
            assert len(mine) == 16
            return sum(host.node is not None for host in mine)

        while node.memories.hosted.shards < 16:  # the first look reads only eight regions
            await node.memories.look()
        assert await regions_with_contact() == MOST_CONTACTS, "the first ones that it took"
        await node.memories.hosted.announce_all()
        assert await regions_with_contact() == MOST_CONTACTS

    play(scenario)


@pytest.mark.parametrize("costly", ["announce", "look", "follow"])
def test_what_a_memory_costs_does_not_delay_the_announcements_of_experts(
    play: Play, monkeypatch: pytest.MonkeyPatch, costly: str
) -> None:
    async def scenario(village: Village) -> None:
        node = await publishing(village, MEMORY)
        other = await village.join(1, await node.swarm.invite(), experts=0)
        await village.run(other)

        async def work() -> None:
            await node.swarm.registry.get([f"{number}" for number in range(2000)])

        memories = node.memories
        places: dict[str, tuple[object, str]] = {
            "announce": (memories.hosted, "announce_all"),
            "look": (memories, "look"),
            "follow": (memories.publishers, "follow"),
        }
        monkeypatch.setattr(*places[costly], work)
        await village.run(node)
        await until(lambda: node._memory_period.seconds > 3 * node._memory_period.wanted_s)
        assert node.period.seconds == node.period.wanted_s

    play(scenario)


@pytest.mark.parametrize("is_killed", [False, True])
def test_what_a_restarted_host_announces_counts_at_once_though_its_last_period_was_long(
    play: Play, monkeypatch: pytest.MonkeyPatch, is_killed: bool
) -> None:
    async def scenario(village: Village) -> None:
        founder = await publishing(village, MEMORY)
        memory, invite = memory_id(village, MEMORY), await founder.swarm.invite()
        await village.run(founder)
        node = await village.join(1, invite, **HOST)
        running = await village.run(node)
        await until_hosted(founder.swarm, memory, 2, MEMORY)
        stretch(node)
        await node.memories.hosted.announce_all()
        await end(running)
        await (node.swarm.host.stop() if is_killed else node.stop())
        monkeypatch.setattr("expert_server.memory.placement.is_called", lambda *how: False)
        back = await village.join(1, invite, **HOST)
        await village.run(back)
        hosted, gone = back.memories.hosted, MEMORY.manifest.shards[0]
        await until(lambda: hosted.shards == len(MEMORY.roots))
        store = hosted.stores[memory]
        await hosted.write(memory, store, lambda: store.drop(gone.root))

        async def are_seen() -> bool:
            seen = await replicas(founder.swarm, memory, MEMORY)
            return seen == {root: 2 - (root == gone.root) for root in MEMORY.roots}

        await eventually(are_seen)
        await until(lambda: back.state.name == "SERVING")

    play(scenario)


def test_memories_are_announced_as_soon_as_the_dht_answers_again_however_long_their_period_is(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(village: Village) -> None:
        node = await publishing(village, MEMORY)
        tries, answers = list[float](), iter([False, False, False, True])

        async def announce() -> None:
            tries.append(asyncio.get_running_loop().time())
            if not next(answers, True):
                raise UnreachableError("no DHT peer answered")

        monkeypatch.setattr(node.memories.hosted, "announce_all", announce)
        stretch(node)
        await node._announce_memories()
        assert len(tries) == 4
        assert tries[-1] - tries[0] < node._memory_period.seconds / 2

    play(scenario)


def test_a_node_that_resumes_announces_its_memories_at_once(play: Play) -> None:
    async def scenario(village: Village) -> None:
        node = await publishing(village, MEMORY)
        other = await village.join(1, await node.swarm.invite(), experts=0)
        memory = memory_id(village, MEMORY)
        await node.memories.hosted.verify()
        await node.memories.hosted.announce_all()
        await until_hosted(other.swarm, memory, 1, MEMORY)
        await node.pause()
        assert not any((await replicas(other.swarm, memory, MEMORY)).values())
        await node.resume()
        await until_hosted(other.swarm, memory, 1, MEMORY)

    play(scenario)


def test_a_node_that_leaves_stays_announced_until_others_have_its_shards(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(village: Village) -> None:
        node = await publishing(village, MEMORY, drain_timeout_s=60)
        other = await village.join(1, await node.swarm.invite(), experts=0)
        await village.run(other)
        running = await village.run(node)
        await until_hosted(other.swarm, memory_id(village, MEMORY), 1, MEMORY)
        await end(running)
        rounds, announce_all = list[bool](), node.memories.hosted.announce_all

        async def noting() -> None:
            rounds.append(node.memories.hosted.leaving)
            await announce_all()

        monkeypatch.setattr(node.memories.hosted, "announce_all", noting)
        stopping = asyncio.create_task(node.stop())
        await until(lambda: len(rounds) >= 4)
        node.hurry()
        await stopping
        assert all(rounds)

    play(scenario)


def stretch(node: Node) -> None:
    """Makes the node's announcements of memories as rare as an expensive memory does."""
    node._memory_period._mean = float(node._memory_period._most * ROUND_BYTES)
    assert node._memory_period.seconds > 5


def test_how_many_nodes_look_is_counted_in_a_small_swarm_and_estimated_in_a_large_one() -> None:
    def lookers(peers: int, estimated: float) -> float:
        swarm = SimpleNamespace(
            host=SimpleNamespace(peers=lambda: range(peers)),
            registry=SimpleNamespace(lookups=SimpleNamespace(estimated_nodes=estimated)),
        )
        memory = MemoryID("docs", "abcdefghijkl")
        hosting: Any = SimpleNamespace(_swarm=swarm, _survey=SimpleNamespace(shares={memory: 0.25}))
        found = MemoryHosting._lookers(hosting)
        assert found.keys() == {memory}
        return found[memory]

    assert lookers(3, 7.0) == 1.0
    assert lookers(180, 10_000.0) == 2500.0
    assert lookers(180, 100.0) == 181 / 4, "no fewer than it knows"


def test_a_shard_whose_hosts_nobody_tells_does_not_end_the_other_downloads(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    region_hosts, fetch = MemoryRegistry.region_hosts, PartFetcher.fetch
    unread = MEMORY.manifest.region_of[MEMORY.manifest.by_root[MEMORY.roots[-1]]]
    has_failed = asyncio.Event()

    async def failing(
        registry: MemoryRegistry, memory: MemoryID, regions: Collection[int], **how: Any
    ) -> Any:
        if list(regions) == [unread]:
            has_failed.set()
            raise UnreachableError("no other peer of the swarm answers")
        return await region_hosts(registry, memory, regions, **how)

    async def late(fetcher: PartFetcher, memory: MemoryID, hosts: Any, name: bytes, *more: Any) -> Any:
        if name in MEMORY.files:
            await has_failed.wait()
        return await fetch(fetcher, memory, hosts, name, *more)

    def called(preferred: int, missing: int, looks: int, nodes: float) -> bool:
        return True

    monkeypatch.setattr("expert_server.memory.placement.is_called", called)
    monkeypatch.setattr("expert_server.memory.hosting.TAKEN_AT_ONCE", len(MEMORY.roots))

    async def scenario(village: Village) -> None:
        node = await a_host_that_has_not_looked(village)
        monkeypatch.setattr(MemoryRegistry, "region_hosts", failing)
        monkeypatch.setattr(PartFetcher, "fetch", late)
        await node.memories.look()
        taken = {key.root for key in node.memories.hosted.mine()}
        assert taken == set(MEMORY.roots[:-1])

    play(scenario)


def test_hosts_that_keep_a_look_waiting_end_it_after_a_while(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    began = list[bytes]()

    async def silent(
        fetcher: PartFetcher,
        memory: MemoryID,
        hosts: Any,
        name: bytes,
        most_bytes: int,
        check: Any,
        *more: Any,
    ) -> Any:
        if name not in MEMORY.roots:
            return await fetch(fetcher, memory, hosts, name, most_bytes, check, *more)
        began.append(name)
        await asyncio.sleep(0.2)
        raise TransferError("nobody answers")

    def called(preferred: int, missing: int, looks: int, nodes: float) -> bool:
        return True

    fetch = PartFetcher.fetch
    monkeypatch.setattr("expert_server.memory.placement.is_called", called)
    monkeypatch.setattr("expert_server.memory.hosting.TAKEN_AT_ONCE", 1)

    async def scenario(village: Village) -> None:
        node = await a_host_that_has_not_looked(village)
        monkeypatch.setattr(PartFetcher, "fetch", silent)
        monkeypatch.setattr("expert_server.memory.hosting._BEGIN_WITHIN_S", 0.1)
        await node.memories.look()
        assert len(began) == 1
        monkeypatch.setattr("expert_server.memory.hosting._BEGIN_WITHIN_S", 60.0)
        await node.memories.look()
        assert len(began) == 1 + len(MEMORY.roots), "the next look goes on"

    play(scenario)


def test_what_a_kill_left_of_memories_is_removed_at_the_next_start(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise revoked shards would stay on disk, and files that count towards no limit."""

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    async def scenario(village: Village) -> None:
        kept, gone = folder(village, 0, MEMORY), folder(village, 0, SECOND)
        MEMORY.write(kept)
        with monkeypatch.context() as patch:
            patch.setattr("os.replace", killed)  # while a shard is written
            with pytest.raises(KeyboardInterrupt):
                write_atomically(kept / "shards" / MEMORY.roots[0].hex(), b"half of a shard")
            with pytest.raises(KeyboardInterrupt):
                write_atomically(kept.parent / "libraries", b"half of the lists")
        later = replace(MEMORY.manifest, revision=2, shards=MEMORY.manifest.shards[:3]).serialize()
        with monkeypatch.context() as patch:
            patch.setattr(MemoryStore, "drop", killed)  # while a revision is followed
            with pytest.raises(KeyboardInterrupt):
                MemoryStore.open(kept).follow(later)
        store, remove_tree = SECOND.write(gone), shutil.rmtree

        def remove_half(path: Path) -> None:
            remove_tree(path / "shards")
            (path / "manifest").unlink()
            killed()

        with monkeypatch.context() as patch:
            patch.setattr("shutil.rmtree", remove_half)  # while a memory is removed
            with pytest.raises(KeyboardInterrupt):
                store.remove()
        assert len(list((kept / "shards").iterdir())) == 5
        assert any(kept.parent.rglob(f"parts/{SECOND.manifest.encoder.sha256.hex()}"))
        founder = await village.found(**HOST)
        assert set((kept / "shards").iterdir()) == {kept / "shards" / root.hex() for root in MEMORY.roots[:3]}
        assert list(kept.parent.iterdir()) == [kept]
        await village.run(founder)
        await until(lambda: founder.memories.hosted.shards == 3)

    play(scenario)


def test_a_memory_is_served_though_what_a_kill_left_of_it_can_not_be_removed_yet(
    play: Play, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """For example, because another program reads it on Windows."""
    unlink, left = Path.unlink, {64 * "0", f".{64 * '0'}.new"}

    def unlink_unless_read(path: Path, missing_ok: bool = False) -> None:
        if path.name in left:
            raise PermissionError(errno.EACCES, "another program reads it", str(path))
        unlink(path, missing_ok)

    async def scenario(village: Village) -> None:
        kept = folder(village, 0, MEMORY)
        MEMORY.write(kept)
        for name in left:
            (kept / "shards" / name).write_bytes(b"revoked")
        monkeypatch.setattr(Path, "unlink", unlink_unless_read)
        founder = await village.found(**HOST)
        await founder.memories.hosted.verify()
        assert founder.memories.hosted.shards == len(MEMORY.roots)

    play(scenario)
    assert "another program reads it" in caplog.text


def test_folders_that_are_no_memory_are_left_alone(play: Play, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(village: Village) -> None:
        MEMORY.write(folder(village, 0, MEMORY))
        broken = folder(village, 0, SECOND)
        SECOND.write(broken, lambda root: False)
        (broken / "shards").rmdir()
        other = broken.with_name("notes")
        other.mkdir()
        with caplog.at_level(logging.WARNING):
            founder = await village.found(**HOST)
            await village.run(founder)
            await until(lambda: founder.memories.hosted.shards == 4)
        assert f"{broken} is not used" in caplog.text
        assert f"{other} is not used" in caplog.text
        assert other.exists()

    play(scenario)


def test_a_node_takes_no_more_than_its_disk_may_hold(play: Play) -> None:
    async def scenario(village: Village) -> None:
        founder = await publishing(village, MEMORY)
        memory = memory_id(village, MEMORY)
        await village.run(founder)
        node = await village.join(1, await founder.swarm.invite(), **HOST | {"memory_disk": SIZE // 2 + 3000})
        await village.run(node)
        await until(lambda: node.memories.hosted.shards >= 1)

        async def settled() -> bool:
            return (
                sum((await replicas(founder.swarm, memory, MEMORY)).values())
                == 4 + node.memories.hosted.shards
            )

        await eventually(settled)
        assert node.memories.hosted.shards <= 2
        assert node.memories.hosted.disk_bytes <= SIZE // 2 + 3000

    play(scenario)


def test_a_limit_below_the_smallest_shard_is_a_clear_warning(
    play: Play, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(village: Village) -> None:
        founder = await publishing(village, MEMORY)
        await village.run(founder)
        node = await village.join(1, await founder.swarm.invite(), **HOST | {"memory_disk": 2000})
        with caplog.at_level(logging.WARNING):
            await village.run(node)
            await until(lambda: f"no room for memory {memory_id(village, MEMORY)}" in caplog.text)
        assert "--memory-disk leaves 2 kB" in caplog.text
        assert node.memories.hosted.disk_bytes == 0
        assert not folder(village, 1, MEMORY).exists()

    play(scenario)


def test_a_full_disk_is_a_clear_warning_and_nothing_is_lost(
    play: Play, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(village: Village) -> None:
        founder = await publishing(village, MEMORY)
        await village.run(founder)
        node = await village.join(1, await founder.swarm.invite(), **HOST)
        save = MemoryStore.save
        saved: list[bytes] = []

        def until_full(store: MemoryStore, root: bytes, data: bytes) -> None:
            if len(saved) == 2:
                raise OSError(errno.ENOSPC, "No space left on device")
            save(store, root, data)
            saved.append(root)

        monkeypatch.setattr(MemoryStore, "save", until_full)
        with caplog.at_level(logging.WARNING):
            await village.run(node)
            await until(lambda: "the disk is full" in caplog.text)
        assert node.memories.hosted.shards == 2
        assert "--memory-disk" in caplog.text
        assert total(node.restarts.count) == 0

    play(scenario)


def test_a_node_that_leaves_waits_until_others_have_what_it_had_alone(play: Play) -> None:
    async def scenario(village: Village) -> None:
        founder = await publishing(village, MEMORY, drain_timeout_s=100)
        memory, invite = memory_id(village, MEMORY), await founder.swarm.invite()
        task = await village.run(founder)
        await until_hosted(founder.swarm, memory, 1, MEMORY)
        node = await village.join(1, invite, **HOST)
        running = await village.run(node)
        await end(task)
        await founder.stop()
        assert node.memories.hosted.shards == 4
        await end(running)

    play(scenario)


def test_nodes_that_leave_together_do_not_wait_for_each_other(play: Play) -> None:
    async def scenario(village: Village) -> None:
        founder = await publishing(village, MEMORY, drain_timeout_s=200)
        node = await village.join(1, await founder.swarm.invite(), **HOST, drain_timeout_s=200)
        for each in (founder, node):
            await village.run(each)
        await until_hosted(founder.swarm, memory_id(village, MEMORY), 2, MEMORY)
        async with asyncio.timeout(DEADLINE_S):
            await asyncio.gather(founder.stop(), node.stop())

    play(scenario)


@pytest.mark.parametrize("asks", [False, True])
def test_a_node_that_can_ask_nobody_does_not_say_that_nobody_serves_its_shards(
    play: Play, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, asks: bool
) -> None:
    async def unreachable(*_: object, **__: object) -> Any:
        raise UnreachableError("no DHT peer answered")

    async def scenario(village: Village) -> None:
        founder = await publishing(village, MEMORY)
        await village.run(founder)
        await until_hosted(founder.swarm, memory_id(village, MEMORY), 1, MEMORY)
        monkeypatch.setattr(MemoryRegistry, "region_hosts", unreachable)
        caplog.set_level(logging.INFO)
        await founder.memories.release(100.0 if asks else 0)
        said = [message for message in caplog.messages if message.startswith("stopped serving")]
        assert said == ["stopped serving 4 shards of memories; they stay on disk"]

    play(scenario)


def test_a_node_leaves_while_publishers_unlist_what_it_hosts(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(village: Village) -> None:
        founder = await publishing(village, MEMORY, SECOND)
        await village.run(founder)
        memories, hosted = founder.memories, founder.memories.hosted
        await until(lambda: hosted.shards == len(MEMORY.roots) + len(SECOND.roots))
        region_hosts = memories._memories.region_hosts

        async def unlisted_meanwhile(memory: MemoryID, regions: Collection[int]) -> Any:
            for other in hosted.stores.keys() - {memory}:
                await hosted.remove(other)
            return await region_hosts(memory, regions)

        monkeypatch.setattr(memories._memories, "region_hosts", unlisted_meanwhile)
        mine = hosted.mine()
        assert await memories._without_other_host(mine) == mine
        assert not hosted.stores

    play(scenario)


def test_a_paused_node_serves_no_memories_and_takes_them_again(play: Play) -> None:
    async def scenario(village: Village) -> None:
        founder = await publishing(village, MEMORY)
        memory = memory_id(village, MEMORY)
        await village.run(founder)
        await until_hosted(founder.swarm, memory, 1, MEMORY)
        await founder.pause()
        assert founder.memories.hosted.shards == 0
        assert not +(await replicas(founder.swarm, memory, MEMORY))
        await founder.resume()
        assert founder.memories.hosted.shards == 4
        await until_hosted(founder.swarm, memory, 1, MEMORY)

    play(scenario)


def test_stopping_in_the_middle_of_a_download_leaves_whole_shards_alone(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(village: Village) -> None:
        founder = await publishing(village, MEMORY)
        invite = await founder.swarm.invite()
        await village.run(founder)
        node = await village.join(1, invite, **HOST)
        begun, fetch = asyncio.Event(), PartClient.fetch

        async def stall(parts: PartClient, peer: Any, memory: str, name: bytes, most: int) -> bytes:
            data = await fetch(parts, peer, memory, name, most)
            if name == MEMORY.roots[1]:
                begun.set()
                await asyncio.Event().wait()
            return data

        monkeypatch.setattr(PartClient, "fetch", stall)
        running = await village.run(node)
        async with asyncio.timeout(60):
            await begun.wait()
        async with asyncio.timeout(60):
            await end(running)
            await node.stop()
        names = {path.name for path in (folder(village, 1, MEMORY) / "shards").iterdir()}
        assert names <= {root.hex() for root in MEMORY.roots} - {MEMORY.roots[1].hex()}

    play(scenario)


def test_a_memory_that_its_publisher_lists_no_more_is_removed(play: Play) -> None:
    async def scenario(village: Village) -> None:
        founder = await publishing(village, MEMORY, SECOND)
        await village.run(founder)
        node = await village.join(1, await founder.swarm.invite(), **HOST)
        await village.run(node)
        await until(lambda: node.memories.hosted.shards == 8)
        await list_memories(founder, SECOND)
        await until(lambda: node.memories.hosted.shards == 4)
        await until(lambda: not folder(village, 1, MEMORY).exists())

    play(scenario)


@pytest.mark.parametrize("is_hosted", [True, False])
def test_a_revision_that_is_not_what_its_publisher_lists_is_fetched_once(
    play: Play, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, is_hosted: bool
) -> None:
    async def scenario(village: Village) -> None:
        founder = await publishing(village, MEMORY)
        memory = memory_id(village, MEMORY)
        await village.run(founder)
        await until_hosted(founder.swarm, memory, 1, MEMORY)
        node = await village.join(1, await founder.swarm.invite(), **HOST)
        publishers, stores = node.memories.publishers, node.memories.hosted.stores
        registry = MemoryRegistry(founder.swarm.registry)
        (entry,) = (await registry.libraries())[founder.swarm.host.peer_id]
        if is_hosted:
            await village.run(node)
            await until(lambda: memory in stores)
        fetch, names = PartFetcher.fetch, list[bytes]()

        async def counted(fetcher: PartFetcher, memory: MemoryID, hosts: Any, name: bytes, *more: Any) -> Any:
            if fetcher is node.memories._fetcher and name == entry.manifest.sha256:
                names.append(name)
            return await fetch(fetcher, memory, hosts, name, *more)

        monkeypatch.setattr(PartFetcher, "fetch", counted)
        await registry.publish_library([replace(entry, revision=9)])
        if not is_hosted:
            await village.run(node)
        await until(lambda: memory in publishers._wrong)
        for _ in range(3):
            await publishers.follow()
            await publishers.meet()
        assert len(names) == 1
        assert "not what its publisher lists" in caplog.text
        assert (memory in stores) == is_hosted
        mended = replace(MEMORY, manifest=replace(MEMORY.manifest, revision=10))
        own, data = founder.memories.hosted.served[str(memory)], mended.manifest.serialize()
        await asyncio.to_thread(own.follow, data)
        await list_memories(founder, mended)
        await until(lambda: memory in stores and stores[memory].manifest.revision == 10)

    play(scenario)


def test_a_host_that_starts_again_knows_the_newest_lists_that_it_saw(play: Play) -> None:
    """Otherwise a peer that stores an older list again could remove memories from the host."""

    async def scenario(village: Village) -> None:
        founder = await publishing(village, MEMORY)
        await village.run(founder)
        invite = await founder.swarm.invite()
        node = await village.join(1, invite, **HOST)
        task = await village.run(node)
        await until(lambda: node.memories.hosted.shards == 4)
        await node.memories.publishers.follow()
        await end(task)
        await node.stop()
        again = await village.join(1, invite, **HOST)
        assert again.memories._memories.saved() == node.memories._memories.saved() != b""

    play(scenario)


def test_a_memory_that_goes_while_its_revision_comes_is_no_full_disk(
    play: Play, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(village: Village) -> None:
        founder = await publishing(village, MEMORY)
        memory = memory_id(village, MEMORY)
        await village.run(founder)
        node = await village.join(1, await founder.swarm.invite(), **HOST)
        await village.run(node)
        await until(lambda: node.memories.hosted.shards == 4)
        later = MEMORY.revoking((MEMORY.roots[2], 9))
        asked = []

        async def removed_meanwhile(entry: LibraryEntry) -> tuple[bytes, MemoryManifest]:
            await node.memories.hosted.remove(memory)
            asked.append(entry)
            return later.manifest.serialize(), later.manifest

        monkeypatch.setattr(node.memories.publishers, "_fetch_manifest", removed_meanwhile)
        await list_memories(founder, later)
        await node.memories.publishers.follow()
        await until(lambda: bool(asked))
        await node.memories.publishers.follow()
        await asyncio.gather(node.memories.hosted.remove(memory), node.memories.hosted.remove(memory))
        assert "can't write" not in caplog.text
        assert node.memories.hosted._full_until == 0.0
        assert total(node.restarts.count) == 0

    play(scenario)


def test_without_disk_nothing_is_hosted_or_asked_for(play: Play) -> None:
    async def scenario(village: Village) -> None:
        founder = await publishing(village, MEMORY)
        memory = memory_id(village, MEMORY)
        await village.run(founder)
        await until_hosted(founder.swarm, memory, 1, MEMORY)
        node = await village.join(1, await founder.swarm.invite(), **HOST | {"memory_disk": 0})
        await village.run(node)

        async def announced() -> bool:
            return node.swarm.host.peer_id in await founder.swarm.registry.nodes([node.swarm.host.peer_id])

        await eventually(announced)
        assert node.memories.hosted.shards == 0
        assert not folder(village, 1, MEMORY).exists()
        request = search_request(memory, 1, bytes(DIMENSIONS), MEMORY.roots[0])
        request.swarm_id = node.swarm.keys.swarm_id
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await (await stub_of(village, founder.swarm, node)).Search(request)
        assert raised.value.code() is StatusCode.NOT_FOUND

    play(scenario)


def test_a_memory_that_nobody_lists_any_more_makes_room_for_others(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For example the memory of a librarian whose token was revoked."""
    monkeypatch.setattr("expert_server.memory.following._UNLISTED_S", 0.0)

    async def scenario(village: Village) -> None:
        founder = await publishing(village, MEMORY, SECOND)
        await village.run(founder)
        node = await village.join(1, await founder.swarm.invite(), **HOST | {"memory_disk": SIZE + 5000})
        follow, listed = node.memories._memories.follow, [memory_id(village, MEMORY)]

        async def by_another() -> dict[PeerID, tuple[LibraryEntry, ...]]:
            entries = (entry for some in (await follow()).values() for entry in some)
            return {node.swarm.host.peer_id: tuple(entry for entry in entries if entry.memory in listed)}

        monkeypatch.setattr(node.memories._memories, "follow", by_another)
        await village.run(node)
        await until(lambda: node.memories.hosted.shards == 4)
        listed[:] = [memory_id(village, SECOND)]
        await until(
            lambda: list(node.memories.hosted.served) == [str(listed[0])] and node.memories.hosted.shards == 4
        )
        assert not folder(village, 1, MEMORY).exists()

    play(scenario)
