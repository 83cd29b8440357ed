"""Which manifests of publishers a host of memories fetches."""

import asyncio
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from expert_fakes import make_peer_id, virtual_time

from dht.library import LibraryEntry
from dht.memory import MAX_MANIFEST_BYTES, MemoryID, Part
from expert_server.memory import following
from expert_server.memory.following import HostingRules, PublisherFollower
from peer.errors import TransferError
from peer.identity import PeerID
from peer.loop import Restarts, cancel_all

HOSTILE, HONEST = make_peer_id(1), make_peer_id(2)
SWARM: Any = SimpleNamespace(host=SimpleNamespace(restarts=Restarts()))


@dataclass
class Store:
    manifest: Any = field(default_factory=lambda: SimpleNamespace(revision=0))
    shards: dict[bytes, Any] = field(default_factory=dict)


@dataclass
class World:
    """What a follower reads and what it fetches; nothing ever arrives."""

    listed: dict[PeerID, list[LibraryEntry]] = field(default_factory=dict)
    stores: dict[MemoryID, Store] = field(default_factory=dict)
    room: int = 10**12
    leaving: bool = False
    is_full: bool = False
    fetched: dict[PeerID, int] = field(default_factory=lambda: {HOSTILE: 0, HONEST: 0})

    looks: int = 0

    async def follow(self) -> dict[PeerID, tuple[LibraryEntry, ...]]:
        self.looks += 1
        return {publisher: tuple(entries) for publisher, entries in self.listed.items()}

    async def some_hosts(self, *arguments: Any) -> tuple[()]:
        return ()

    async def save_libraries(self) -> None: ...

    async def keep_libraries(self) -> None: ...

    async def fetch(self, memory: MemoryID, hosts: Any, name: bytes, size: int, *more: Any) -> bytes:
        (publisher,) = set(hosts) & self.fetched.keys()
        self.fetched[publisher] += size
        raise TransferError("it does not arrive")

    def is_put_off(self, memory: MemoryID) -> bool:
        return False

    def put_off(self, memory: MemoryID) -> bool:
        return True

    def hear(self, publisher: PeerID, record: bytes, caller: PeerID) -> bool:
        return record == b"newer"


def entry(publisher: PeerID, name: str, size: int) -> LibraryEntry:
    return LibraryEntry(
        MemoryID.of(name, publisher), publisher, Part(bytes(32), size), 1, 10**9, 10**12, (), "", 100, (4,)
    )


@pytest.mark.parametrize("is_hosted", [True, False])
def test_a_publisher_of_ever_new_manifests_fills_no_hosts_line(
    is_hosted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    world: Any = World()
    now = 1000.0
    monkeypatch.setattr(following, "time", SimpleNamespace(monotonic=lambda: now))
    follower = PublisherFollower(world, HostingRules(10**12), SWARM, world, world, lambda: None)
    seconds = 600
    for period in range(seconds // 30):
        now += 30.0
        world.listed = {
            HOSTILE: [
                entry(HOSTILE, f"junk-{n}-{0 if is_hosted else period}", MAX_MANIFEST_BYTES)
                for n in range(32)
            ],
            HONEST: [entry(HONEST, "python-docs", 100_000)],
        }
        if is_hosted:
            world.stores = {each.memory: Store() for some in world.listed.values() for each in some}

        async def look() -> None:
            await follower.follow()
            await follower.meet()

        asyncio.run(look())
    assert MAX_MANIFEST_BYTES <= world.fetched[HOSTILE] <= 3 * MAX_MANIFEST_BYTES + 16 * 2**10 * seconds
    assert world.fetched[HONEST] == 100_000 * seconds // 30, "each of its revisions"


class Silent(World):
    """The hostile publisher's manifests neither arrive nor fail."""

    def __init__(self, *entries: LibraryEntry) -> None:
        super().__init__({HOSTILE: list(entries), HONEST: [entry(HONEST, "python-docs", 100_000)]})
        self.arriving = self.most_arriving = 0

    async def fetch(self, memory: MemoryID, hosts: Any, *what: Any) -> bytes:
        if HONEST in hosts:
            return await super().fetch(memory, hosts, *what)
        self.arriving += 1
        self.most_arriving = max(self.most_arriving, self.arriving)
        try:
            return await asyncio.Future()
        finally:
            self.arriving -= 1


@pytest.mark.parametrize("is_hosted", [True, False])
def test_a_publisher_whose_manifests_never_arrive_delays_no_other(
    is_hosted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    world: Any = Silent(*(entry(HOSTILE, f"junk-{n}", 1000) for n in range(32)))
    if is_hosted:
        world.stores = {each.memory: Store() for some in world.listed.values() for each in some}

    async def run() -> None:
        follower = PublisherFollower(world, HostingRules(10**12), SWARM, world, world, lambda: None)
        time = asyncio.get_running_loop().time
        for look in range(1, 10):
            began = time()
            await follower.follow()
            await follower.meet()
            assert time() - began <= 6.0
            assert world.fetched[HONEST] == look * 100_000
        await follower.close()

    with virtual_time() as runner:
        monkeypatch.setattr(following, "time", SimpleNamespace(monotonic=runner.get_loop().time))
        runner.run(run())
    assert world.most_arriving == 1
    assert world.arriving == 0


def looks(monkeypatch: pytest.MonkeyPatch, world: Any, shown: str, seconds: float) -> int:
    """How often a follower looks within this time, while a stranger shows the record ten times a second."""
    follower = PublisherFollower(world, HostingRules(10**12), SWARM, world, world, lambda: None)

    async def follow() -> None:
        while True:
            await follower.follow()
            await follower.until_due(600.0)

    async def show() -> None:
        while True:
            await asyncio.sleep(0.1)
            follower.hear(make_peer_id(3), shown, b"newer")

    async def run() -> None:
        tasks = [asyncio.create_task(work) for work in (follow(), show())]
        await asyncio.sleep(seconds)
        await cancel_all(tasks)

    with virtual_time() as runner:
        monkeypatch.setattr(following, "time", SimpleNamespace(monotonic=runner.get_loop().time))
        runner.run(run())
    return int(world.looks)


def test_callers_that_show_newer_lists_without_end_cause_a_look_every_three_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hosted = entry(HONEST, "python-docs", 100_000)
    for memory, expected in ((str(hosted.memory), 20), ("python-docs-000000000000", 1), ("\x00", 1)):
        world: Any = World({HONEST: [hosted]}, {hosted.memory: Store()})
        assert expected <= looks(monkeypatch, world, memory, 60.0) <= expected + 1


def test_a_list_that_was_shown_before_causes_no_look_once_its_revision_is_followed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hosted = entry(HONEST, "python-docs", 100_000)
    for revision, expected in ((1, 1), (0, 20)):
        world: Any = World({HONEST: [hosted]}, {hosted.memory: Store(SimpleNamespace(revision=revision))})
        monkeypatch.setattr(World, "hear", lambda *shown: False)
        assert expected <= looks(monkeypatch, world, str(hosted.memory), 60.0) <= expected + 1


def test_a_memory_that_states_no_licence_is_under_none_that_a_node_hosts() -> None:
    memory, rules = MemoryID.of("docs", HOSTILE), HostingRules(1, licenses=frozenset({"CC0-1.0"}))
    assert rules.refusal(memory, ()) == "it states no licence, and this node hosts only some"
    assert not rules.refusal(memory, ["CC0-1.0"])
    assert not HostingRules(1).refusal(memory, ())
