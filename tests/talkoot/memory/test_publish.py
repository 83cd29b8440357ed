"""Publishing memories and revoking passages: who may do it, from which folders, and until when."""

import asyncio
import contextlib
import hashlib
import json
import shutil
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from callers import numbered_identity
from commands import assert_one_clear_line, run_here
from expert_fakes import virtual_time
from hypothesis import given
from hypothesis import strategies as st
from memory_folders import SampleMemory, passages_in
from memory_hosts import SimpleHost
from memory_peers import until
from memory_samples import node_info
from published_memories import HOST as HOSTING
from published_memories import memory_id, replicas, until_hosted
from published_memories import publishing as publishing_node
from real_swarm import Village, playing

from dht.admission import Role, make_token, read_grant
from dht.announcements import NodeInfo, ReplicaState
from dht.invites import Invite
from dht.library import WANTED_REPLICAS, MemoryRegistry, RegionHost
from dht.manifest import Manifest
from dht.memory import MemoryID, Part
from dht.records import SwarmKeys
from dht.swarm import Swarm, found_swarm, join_swarm
from expert_server.memory.following import PublisherFollower
from expert_server.memory.store import MemoryStore
from expert_server.settings import NodeSettings
from peer.errors import InviteError, LibraryError, SettingsError, StateFolderError
from peer.host import NetworkConfig
from peer.identity import Identity, PeerID
from peer.loop import LoopThread
from peer.transport.addresses import Multiaddress
from peer.wire import admission_pb2
from talkoot.memory.build import UNPUBLISHED, was_never_published
from talkoot.memory.inspection import open_memory
from talkoot.memory.publish import Publication, _publish, advice
from talkoot.memory.publishers import Publisher, publisher_of
from talkoot.memory.replication import Replication
from talkoot.memory.revoke import _FollowerWatch, _revoke
from talkoot.memory.selection import Selection
from talkoot.memory.unlist import _unlist
from talkoot.node.invites import FoundedSwarm
from talkoot.terminal import LogFormat, Terminal

HOST = "127.0.0.1"
MEMORY = SampleMemory.make()
FOUNDER, FIRST, SECOND, LIBRARIAN = (numbered_identity(number) for number in range(4))
SETTINGS = NodeSettings(announce_every_s=0.5, p2pd="off")
pytestmark = pytest.mark.usefixtures("long_lives")
SERVING, LEAVING = ReplicaState.SERVING, ReplicaState.LEAVING


def swarm_manifest(mode: str) -> Manifest:
    return Manifest.model_validate(
        {
            "name": "sauna",
            "model": {"layers": 1, "hidden": 8, "heads": 2, "context": 8, "feed_forward": 8},
            "experts": {"grid": [2, 2]},
            "routing": {"top_k": 2},
            "admission": {"mode": mode},
        }
    )


# Folders


def test_a_folder_is_read_whole_before_it_is_published(tmp_path: Path) -> None:
    MEMORY.write(tmp_path / "memory")
    store = open_memory(tmp_path / "memory", lambda text: None)
    assert set(store.shards) == set(MEMORY.roots)
    assert store.manifest.passages == 80


def broken(what: str, folder: Path) -> None:
    MEMORY.write(folder)
    shard = folder / "shards" / MEMORY.roots[0].hex()
    if what == "no shard":
        shard.unlink()
    elif what == "no encoder":
        (folder / "parts" / MEMORY.manifest.encoder.sha256.hex()).unlink()
    elif what == "no manifest":
        (folder / "manifest").unlink()
    elif what == "another manifest":
        (folder / "manifest").write_bytes(b"not a manifest")
    elif what == "a changed shard":
        data = bytearray(shard.read_bytes())
        data[-3] ^= 1
        shard.write_bytes(data)
    else:
        (folder / "shards").rename(folder / "elsewhere")


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("no shard", "lacks 1 shard"),
        ("no encoder", "lacks its encoder or codebook"),
        ("no manifest", "is not a memory"),
        ("another manifest", "is damaged"),
        ("a changed shard", "is damaged"),
        ("no folder of shards", "is not a memory"),
    ],
)
def test_a_broken_folder_is_not_published(tmp_path: Path, what: str, said: str) -> None:
    broken(what, tmp_path / "memory")
    with pytest.raises(LibraryError, match=said):
        open_memory(tmp_path / "memory", lambda text: None)


def test_a_folder_that_is_none_is_one_clear_line(tmp_path: Path) -> None:
    founded(tmp_path / "node")
    ended = run_here("memory", "publish", str(tmp_path), "--state", str(tmp_path / "node"), "--host", HOST)
    assert_one_clear_line(ended, "is not a memory", "talkoot memory build")


# Who publishes


def founded(folder: Path) -> Invite:
    """Makes a state folder as a founder's node leaves it."""
    folder.mkdir(parents=True)
    identity = Identity.load_or_create(folder / "identity.key")
    invite = Invite(SwarmKeys("sauna", identity.peer_id), (_address(identity),))
    FoundedSwarm(invite=str(invite), admission="token").save(folder)
    return invite


def _address(identity: Identity, port: int = 31337) -> Multiaddress:
    return Multiaddress(f"/ip4/127.0.0.1/tcp/{port}/p2p/{identity.peer_id.to_base58()}")


def test_a_founder_publishes_by_the_key_of_its_node_which_may_be_running(tmp_path: Path) -> None:
    invite = founded(tmp_path / "node")
    for join in (None, str(invite)):
        with publisher_of(join, tmp_path / "node") as publisher:
            assert publisher.signer.peer_id == invite.keys.author
            assert publisher.identity.peer_id != invite.keys.author, "the node's address leads to the node"
            assert publisher.invite.keys == invite.keys
            grant = read_grant(admission_pb2.Token.FromString(publisher.invite.token).grant)
            assert (grant.role, grant.swarm_id) == (Role.LIBRARIAN, invite.keys.swarm_id)
            assert time.time() < grant.expires_at < time.time() + 40 * 86400
    assert not (tmp_path / "node" / "lock").exists()


def test_a_librarian_publishes_by_a_key_of_its_own_which_it_keeps(tmp_path: Path) -> None:
    invite = str(Invite(SwarmKeys("sauna", FOUNDER.peer_id), (_address(FOUNDER),)))
    with publisher_of(invite, tmp_path / "own") as publisher:
        assert publisher.signer is publisher.identity
        first = publisher.identity.peer_id
        with pytest.raises(StateFolderError), publisher_of(invite, tmp_path / "own"):
            pass
    with publisher_of(invite, tmp_path / "own") as publisher:
        assert publisher.identity.peer_id == first


def test_the_founder_of_another_swarm_is_no_founder_here(tmp_path: Path) -> None:
    founded(tmp_path / "node")
    invite = str(Invite(SwarmKeys("sauna", LIBRARIAN.peer_id), (_address(LIBRARIAN),)))
    with publisher_of(invite, tmp_path / "node") as publisher:
        assert publisher.signer is publisher.identity
        assert publisher.invite.token == b""
    with pytest.raises(SettingsError, match="--join"), publisher_of(None, tmp_path / "own"):
        pass


def test_a_folder_without_the_founders_key_publishes_nothing(tmp_path: Path) -> None:
    founded(tmp_path / "node")
    (tmp_path / "node" / "identity.key").unlink()
    with (
        pytest.raises(SettingsError, match="no longer has the key"),
        publisher_of(None, tmp_path / "node"),
    ):
        pass


# Who hosts what

peers = st.integers(0, 3).map(lambda number: numbered_identity(number).peer_id)
shorts = st.sampled_from([shard.short for shard in MEMORY.manifest.shards]) | st.binary(
    min_size=8, max_size=8
)
hosts = st.builds(RegionHost, peers, st.sampled_from([SERVING, LEAVING]), st.frozensets(shorts, max_size=4))
regions = st.sampled_from(list(MEMORY.manifest.by_region))


@given(st.dictionaries(regions, st.lists(hosts, max_size=5)), st.none() | peers)
def test_only_others_that_serve_a_shard_count(
    found: Mapping[int, list[RegionHost]], besides: PeerID | None
) -> None:
    counted = Replication.of(MEMORY.manifest, found, besides)
    assert set(counted.by_root) == set(MEMORY.roots), "others don't exist"
    for shard in MEMORY.manifest.shards:
        expected = {
            host.peer_id
            for host in found.get(MEMORY.manifest.region_of[shard], [])
            if host.state is SERVING and shard.short in host.shards
        }
        assert counted.by_root[shard.root] == expected - {besides}
    assert counted.fewest == min(map(len, counted.by_root.values()))
    assert (counted.below(2) == 0) == (counted.fewest >= 2)


@pytest.mark.parametrize(
    ("hosting", "reachability", "said"),
    [
        (0, "", "--memory-disk"),
        (1, "", "two replicas need another"),
        (2, "", "no room left"),
        (1, "forward TCP port 1 on your router", "may not reach this machine: forward TCP port 1"),
        (0, "forward TCP port 1 on your router", "can't reach this machine: forward TCP port 1"),
        (0, "forward TCP port 1 on your router", "`talkoot node --memory-disk 5GB`"),
    ],
)
def test_a_publisher_hears_what_may_be_wrong(hosting: int, reachability: str, said: str) -> None:
    assert said in advice(hosting, reachability)


# What is revoked


class WatchedHosts:
    """Hosts of a memory, some of which never answer."""

    manifest: bytes = b"the next revision"

    def __init__(self, silent: Collection[PeerID], announced: Collection[PeerID]) -> None:
        self.announced = announced
        self._silent = silent

    async def fetch(self, host: NodeInfo, memory: str, name: bytes, most: int, library: bytes) -> bytes:
        if host.peer_id in self._silent:
            await asyncio.Event().wait()
        return self.manifest

    async def nodes(self, peers: Collection[PeerID]) -> dict[PeerID, NodeInfo]:
        return {peer: replace(node_info(peer), name="Benno") for peer in peers}

    def watch(self, log_format: LogFormat) -> _FollowerWatch:
        async def announced() -> Replication:
            return Replication({bytes(32): frozenset(self.announced)})

        async def check_listed() -> None:
            pass

        part = Part(hashlib.sha256(self.manifest).digest(), len(self.manifest))
        entry = SimpleNamespace(memory="notes", revision=2, manifest=part)
        publication: Any = SimpleNamespace(
            entry=entry, parts=self, announced=announced, library=b"signed", check_listed=check_listed
        )
        swarm: Any = SimpleNamespace(registry=self)
        return _FollowerWatch(Terminal(log_format), swarm, publication)


def test_a_host_that_stalls_does_not_hide_what_others_deleted() -> None:
    hosts = [numbered_identity(number).peer_id for number in range(2, 12)]
    watch = WatchedHosts(hosts[:9], hosts).watch(LogFormat.TEXT)
    with virtual_time() as runner:
        runner.run(watch._look())
    assert watch.in_words.startswith("1 of 10 hosts have deleted them; no confirmation yet from Benno (")
    assert watch.in_words.endswith(") and 1 more")


@pytest.mark.parametrize("log_format", [LogFormat.TEXT, LogFormat.JSON])
def test_a_host_that_dies_before_it_deletes_a_passage_is_named(
    capsys: pytest.CaptureFixture[str], log_format: LogFormat
) -> None:
    dead, live = (numbered_identity(number).peer_id for number in (2, 3))
    hosts = WatchedHosts([dead], [dead, live])
    watch = hosts.watch(log_format)

    async def scenario() -> None:
        waiting = asyncio.create_task(watch.until_all_follow())
        await asyncio.sleep(300)
        assert not waiting.done()
        hosts.announced = [live]  # its announcements have expired
        await waiting

    with virtual_time() as runner:
        runner.run(scenario())
    out = capsys.readouterr().out
    if log_format is LogFormat.JSON:
        said = json.loads(out)
        assert (said["hosts"], said["unconfirmed"]) == (2, [dead.to_base58()])
    else:
        name = f"Benno ({dead.to_base58()[-8:]})"
        assert f"done: 1 of 2 hosts have deleted them; no confirmation yet from {name}. Nodes" in out


def test_passages_of_a_memory_that_was_never_published_only_leave_its_folder(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("A sauna is hot. " * 200 + "Written by Anna\nVirtanen. " + "A lake is cold. " * 200)
    folder, base = tmp_path / "memory", tmp_path / "base"
    revoke = ("memory", "revoke", str(folder), "--match", "anna virtanen", "--state", str(tmp_path / "node"))
    assert run_here("memory", "build", str(text), "-o", str(base), "--name", "notes").returncode == 0
    shutil.copytree(base, folder)
    ended = run_here(*revoke)
    assert ended.returncode == 0, ended.stderr
    assert "by Anna Virtanen. A lake is cold" in ended.stdout
    assert f"removed 1 passage from {folder}; it was never published" in ended.stdout
    store = open_memory(folder, lambda text: None)
    assert (store.manifest.revision, len(store.manifest.revoked)) == (2, 1)
    assert not (tmp_path / "node").exists()

    # in doubt, the revocation is published
    shutil.rmtree(folder)
    more = tmp_path / "more.txt"
    more.write_text("More by Anna Virtanen. " * 20)
    built = run_here("memory", "build", str(more), "-o", str(folder), "--base", str(base))
    assert built.returncode == 0, built.stderr
    for there in (folder, base):
        revoke = (*revoke[:2], str(there), *revoke[3:])
        assert_one_clear_line(run_here(*revoke), "--join")
        assert not open_memory(there, lambda text: None).manifest.revoked


def test_with_an_invite_a_revocation_is_always_published(tmp_path: Path) -> None:
    MEMORY.write(tmp_path)
    (tmp_path / UNPUBLISHED).touch()
    ended = run_here("memory", "revoke", str(tmp_path), "--match", "title 7", "--join", "no invite")
    assert_one_clear_line(ended, "invite")
    assert not open_memory(tmp_path, lambda text: None).manifest.revoked


# In a swarm


@contextlib.asynccontextmanager
async def swarm_of(mode: str, folder: Path) -> AsyncIterator[tuple[Swarm, list[SimpleHost], Invite]]:
    """The founder, and two peers that host memories."""
    async with contextlib.AsyncExitStack() as stack:
        founder = await found_swarm(FOUNDER, swarm_manifest(mode), NetworkConfig(HOST))
        stack.push_async_callback(founder.stop)
        invite = await founder.invite()
        hosts = []
        for number, identity in enumerate((FIRST, SECOND)):
            swarm = await join_swarm(
                identity, _with_token(invite, Role.NODE), NetworkConfig(HOST), roles=(Role.NODE,)
            )
            stack.push_async_callback(swarm.stop)
            hosts.append(SimpleHost(swarm, folder / f"host {number}", stack))
        yield founder, hosts, invite


def _with_token(invite: Invite, role: Role) -> Invite:
    token = make_token(FOUNDER, invite.keys.swarm_id, role, time.time() + 3600, 1 + role.value)
    return Invite(invite.keys, invite.bootstrap, token.SerializeToString())


async def eventually(check: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(60):
        while True:
            if await check():
                return
            await asyncio.sleep(0.05)


async def taken(host: SimpleHost) -> None:
    async def listed() -> bool:
        entry = await host.entry()
        return entry is not None and bool(await host.memories.some_hosts(entry))

    await eventually(listed)
    await host.take()


def publishing(publisher: Publisher, store: MemoryStore) -> "asyncio.Task[None]":
    terminal = Terminal(LogFormat.JSON)
    return asyncio.create_task(_publish(terminal, publisher, store, SETTINGS, HOST))


def founder_with(invite: Invite) -> Publisher:
    return Publisher(FOUNDER, LIBRARIAN, _with_token(invite, Role.LIBRARIAN), None)


def librarian_with(invite: Invite) -> Publisher:
    return Publisher(LIBRARIAN, LIBRARIAN, _with_token(invite, Role.LIBRARIAN), None)


def events(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize(
    ("mode", "by"), [pytest.param("open", founder_with, marks=pytest.mark.slow), ("token", librarian_with)]
)
def test_a_memory_is_published_until_two_others_have_it_and_then_revoked_from_them(
    loop: LoopThread, tmp_path: Path, capsys: pytest.CaptureFixture[str], mode: str, by: Any
) -> None:
    async def scenario() -> None:
        store = MEMORY.write(tmp_path / "memory")
        async with swarm_of(mode, tmp_path) as (founder, hosts, invite):
            publisher = by(invite)
            (store.folder / UNPUBLISHED).touch()
            published = publishing(publisher, store)
            reading = MemoryRegistry(founder.registry)
            memory = MemoryID.of(store.manifest.name, publisher.signer.peer_id)

            async def are_all_offered() -> bool:
                regions = await reading.region_hosts(memory, store.manifest.by_region)
                offered = {root for found in regions.values() for host in found for root in host.shards}
                return offered == {shard.root[:8] for shard in store.manifest.shards}

            assert len(store.manifest.by_region) > 1
            await eventually(are_all_offered)
            await taken(hosts[0])
            assert not was_never_published(store.folder)
            await asyncio.sleep(0)
            assert not published.done()
            assert LIBRARIAN.peer_id not in await founder.registry.node_ids()
            await taken(hosts[1])
            async with asyncio.timeout(60):
                await published
            *_, last = events(capsys)
            assert (last["event"], last["passages"], last["replicas"]) == ("published", 80, 2)
            assert last["publisher"] == publisher.signer.peer_id.to_base58()

            found = Selection.parse([], "title 7").find(store)
            revoked = asyncio.create_task(
                _revoke(Terminal(LogFormat.JSON), publisher, store, found, SETTINGS, HOST)
            )

            async def second() -> bool:
                libraries = await reading.libraries()
                return any(entry.revision == 2 for entry in libraries[publisher.signer.peer_id])

            await eventually(second)
            for host in hosts:
                assert not revoked.done()
                await eventually(host.follow)
            async with asyncio.timeout(60):
                await revoked
            *_, last = events(capsys)
            assert (last["event"], last["revision"], last["hosts"]) == ("revoked", 2, 2)
            assert LIBRARIAN.peer_id not in await founder.registry.node_ids()
            (entry,) = (await reading.libraries())[publisher.signer.peer_id]
            assert entry.passages == 76
            for some in (store, hosts[0].store, hosts[1].store):
                assert some is not None
                left = [passage for root in some.shards for passage in passages_in(some, root)]
                assert sum(passage is None for passage in left) == 4
                assert not any(passage.title == "title 7" for passage in left if passage is not None)

    loop.run(scenario(), 180)


@pytest.mark.parametrize("nodes", [2, pytest.param(5, marks=pytest.mark.slow)])
def test_hosts_that_seldom_look_delete_a_revoked_passage_within_seconds(
    loop: LoopThread, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nodes: int
) -> None:
    """The period of a node with many cells, or in a large swarm, is minutes long."""
    until_due, pauses = PublisherFollower.until_due, dict[PublisherFollower, float]()

    async def noted(follower: PublisherFollower, pause_s: float) -> None:
        pauses[follower] = pause_s
        await until_due(follower, pause_s)

    monkeypatch.setattr(PublisherFollower, "until_due", noted)

    async def scenario(village: Village) -> None:
        founder = await publishing_node(village, MEMORY)
        hosts = [founder]
        invite = await founder.swarm.invite()
        for number in range(1, nodes):
            hosts.append(await village.join(number, invite, **HOSTING))
        for node in hosts:
            await village.run(node)
        memory = memory_id(village, MEMORY)
        await until_hosted(founder.swarm, memory, WANTED_REPLICAS, MEMORY)

        async def all_announced() -> bool:
            """Whether what the nodes have is announced. None begins to take more, because nothing lacks replicas."""
            stores = [store for node in hosts for store in node.memories.hosted.stores.values()]
            stored = Counter(root for store in stores for root in store.shards)
            return await replicas(founder.swarm, memory, MEMORY) == stored

        for node in hosts:
            node.period.wanted_s, node.period._most = 180.0, 1.0
        await until(lambda: all(pauses.get(node.memories.publishers, 0.0) > 100 for node in hosts))
        await eventually(all_announced)
        store = MEMORY.write(tmp_path / "published")
        found = Selection.parse([], "title 7").find(store)
        publisher = Publisher(FOUNDER, LIBRARIAN, _with_token(invite, Role.LIBRARIAN), None)
        async with asyncio.timeout(20):
            await _revoke(Terminal(LogFormat.JSON), publisher, store, found, SETTINGS, HOST)
        for number, node in enumerate(hosts):
            for hosted in node.memories.hosted.stores.values():
                left = [each for root in hosted.shards for each in passages_in(hosted, root)]
                assert not any(each.title == "title 7" for each in left if each is not None), number

    playing(loop, [numbered_identity(number) for number in (0, 1, 2, 4, 5)], tmp_path)(scenario)


def test_a_stopped_publisher_leaves_what_others_have_and_goes_on_when_it_is_started_again(
    loop: LoopThread, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        store = MEMORY.write(tmp_path / "memory")
        async with swarm_of("token", tmp_path) as (_, hosts, invite):
            first = publishing(founder_with(invite), store)
            await taken(hosts[0])

            first.cancel()
            began = time.monotonic()
            with pytest.raises(asyncio.CancelledError):
                await first
            assert time.monotonic() - began < 60
            assert "goes on with the rest" in caplog.text
            entry = await hosts[1].entry()
            assert entry is not None

            async def withdrawn() -> bool:
                some = await hosts[1].memories.some_hosts(entry)
                return {host.peer_id for host in some} == {FIRST.peer_id}

            await eventually(withdrawn)
            await hosts[1].take()
            async with asyncio.timeout(60):
                await publishing(founder_with(invite), store)

    loop.run(scenario(), 180)


def test_two_who_publish_one_folder_both_end_when_others_have_it(loop: LoopThread, tmp_path: Path) -> None:
    async def scenario() -> None:
        store = MEMORY.write(tmp_path / "memory")
        async with swarm_of("open", tmp_path) as (_, hosts, invite):
            with_token = _with_token(invite, Role.LIBRARIAN)
            both = [
                publishing(Publisher(FOUNDER, numbered_identity(number), with_token, None), store)
                for number in (3, 4)
            ]
            for host in hosts:
                await taken(host)
            async with asyncio.timeout(60):
                await asyncio.gather(*both)

    loop.run(scenario(), 180)


@pytest.mark.parametrize("revision", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_who_published_another_revision_at_the_same_time_is_told_so(
    loop: LoopThread, tmp_path: Path, revision: int
) -> None:
    async def scenario() -> None:
        store = MEMORY.write(tmp_path / "memory")
        async with swarm_of("open", tmp_path) as (founder, hosts, invite):
            published = publishing(founder_with(invite), store)
            await taken(hosts[0])
            memories = MemoryRegistry(founder.registry)
            ((entry,),) = (await memories.libraries()).values()
            other = replace(entry, manifest=Part(b"o" * 32, 100), revision=revision)
            await memories.publish_library([other])
            with pytest.raises(
                LibraryError, match=f"revision {revision} of .* has meanwhile been published with your key"
            ):
                async with asyncio.timeout(60):
                    await published

    loop.run(scenario(), 180)


def test_a_librarian_that_is_revoked_while_it_publishes_is_told_so(loop: LoopThread, tmp_path: Path) -> None:
    async def scenario() -> None:
        store = MEMORY.write(tmp_path / "memory")
        async with swarm_of("token", tmp_path) as (founder, hosts, invite):
            published = publishing(librarian_with(invite), store)
            await taken(hosts[0])
            await founder.revocations.publish([1 + Role.LIBRARIAN.value])
            with pytest.raises(LibraryError, match=r"\(the token was revoked\): ask the founder"):
                async with asyncio.timeout(60):
                    await published

    loop.run(scenario(), 180)


def test_a_memory_is_taken_off_the_list(
    loop: LoopThread, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def scenario() -> None:
        store = MEMORY.write(tmp_path / "memory")
        async with swarm_of("open", tmp_path) as (founder, hosts, invite):
            published = publishing(founder_with(invite), store)
            await taken(hosts[0])
            terminal = Terminal(LogFormat.JSON)
            other = Publisher(FOUNDER, numbered_identity(4), _with_token(invite, Role.LIBRARIAN), None)
            await _unlist(terminal, other, "python-docs", SETTINGS, HOST)
            assert events(capsys)[-1]["event"] == "unlisted"
            with pytest.raises(LibraryError, match="is no longer published"):
                async with asyncio.timeout(60):
                    await published
            assert await MemoryRegistry(founder.registry).libraries() == {FOUNDER.peer_id: ()}
            with pytest.raises(LibraryError, match=r"you publish no memory 'python-docs' .* publish: none"):
                await _unlist(terminal, other, "python-docs", SETTINGS, HOST)

    loop.run(scenario(), 180)


def test_those_who_only_say_that_they_host_a_memory_do_not_count(loop: LoopThread, tmp_path: Path) -> None:
    async def scenario() -> None:
        store = MEMORY.write(tmp_path / "memory")
        async with contextlib.AsyncExitStack() as stack:
            founder, hosts, invite = await stack.enter_async_context(swarm_of("open", tmp_path))
            publisher = founder_with(invite)
            swarm = await stack.enter_async_context(publisher.joined(SETTINGS, HOST, lambda text: None))
            publication = Publication(swarm, store, publisher, SETTINGS, HOST)
            await stack.enter_async_context(publication.published(lambda text: None))
            regions = {
                region: (SERVING, [shard.root for shard in shards])
                for region, shards in MEMORY.manifest.by_region.items()
            }
            for liar in (hosts[0].swarm, founder):
                await MemoryRegistry(liar.registry).announce(publication.entry.memory, regions, 60)
            await taken(hosts[1])

            async def all_seen() -> bool:
                return len((await publication.announced()).hosts) == 3

            await eventually(all_seen)
            proven = await publication.replication()
            assert proven.hosts == {SECOND.peer_id}
            assert (proven.fewest, proven.below(2)) == (1, 4)

    loop.run(scenario(), 180)


def test_who_may_not_publish_is_told_so(loop: LoopThread, tmp_path: Path) -> None:
    async def scenario() -> None:
        store = MEMORY.write(tmp_path / "memory")
        async with swarm_of("open", tmp_path) as (founder, _, invite):
            with pytest.raises(LibraryError, match="is open, so only its founder publishes"):
                await publishing(librarian_with(invite), store)
            assert await MemoryRegistry(founder.registry).libraries() == {}
        async with swarm_of("token", tmp_path) as (founder, _, invite):
            reader = Publisher(LIBRARIAN, LIBRARIAN, _with_token(invite, Role.READER), None)
            with pytest.raises(InviteError, match=r"for a reader, not for a librarian: .* --state") as caught:
                await publishing(reader, store)
            assert "If you founded the swarm" in str(caught.value)

    loop.run(scenario(), 180)


def test_an_older_revision_is_not_published_nor_built_upon(loop: LoopThread, tmp_path: Path) -> None:
    async def scenario() -> None:
        old = MEMORY.write(tmp_path / "old")
        new = MEMORY.revoking((MEMORY.roots[0], 3)).write(tmp_path / "new")
        async with swarm_of("open", tmp_path) as (_, hosts, invite):
            published = publishing(founder_with(invite), new)
            for host in hosts:
                await taken(host)
            await published
            with pytest.raises(LibraryError, match=r"revision 2 of .* is published, and this is revision 1"):
                await publishing(founder_with(invite), old)
            found = Selection.parse([], "title 9").find(old)
            with pytest.raises(LibraryError, match="revision 2 of"):
                await _revoke(Terminal(LogFormat.JSON), founder_with(invite), old, found, SETTINGS, HOST)
            assert old.manifest.revision == 1, "nothing was written"

    loop.run(scenario(), 180)
