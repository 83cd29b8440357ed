"""Memories in the DHT: who may publish them, what readers accept of stored data, and which hosts have their regions."""

import contextlib
import time
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from callers import numbered_identity
from dht_peers import forget_all
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st
from loop_holds import pauses
from raw_dht import Gullible, read_raw, store_raw
from record_samples import EXPIRES_AT, NOW, VALIDATOR, refused, stored

from dht.admission import Denylist, Mode, Role, SwarmAdmission, make_badge, make_token
from dht.announcements import NodeInfo, ReplicaState
from dht.founder_records import LIFETIME_S
from dht.library import (
    LibraryEntry,
    MemoryRegistry,
    RegionHost,
    find_memory,
    read_library,
    read_region,
    with_entry,
)
from dht.memory import MAX_SHARDS, MAX_SHARDS_OF_REGION, MemoryID, Part
from dht.records import (
    INDEX_PIECE,
    MAX_LIBRARY_BYTES,
    MAX_LIFETIME_S,
    MAX_MANIFEST_LIFETIME_S,
    MAX_MEMORIES,
    RecordValidator,
    SwarmKeys,
    open_record,
    sign_record,
)
from dht.registry import Registry
from peer.clock import CLOCK_TOLERANCE_S
from peer.errors import LibraryError, RecordError, TalkootError, UnreachableError
from peer.host import Host, NetworkConfig
from peer.identity import Identity
from peer.kademlia.lookups import Item
from peer.kademlia.validation import Record
from peer.loop import LoopThread
from peer.parsing import ParseGuard
from peer.wire import admission_pb2, records_pb2

FOUNDER, LIBRARIAN, STRANGER = (numbered_identity(number) for number in range(3))
KEYS = SwarmKeys("sauna", FOUNDER.peer_id)
MONTH_S = LIFETIME_S
Regions = dict[int, tuple[ReplicaState, Collection[bytes]]]
SERVING, LEAVING = ReplicaState.SERVING, ReplicaState.LEAVING


def entry(name: str = "python-docs", publisher: Identity = FOUNDER, **changes: Any) -> LibraryEntry:
    sample = LibraryEntry(
        MemoryID.of(name, publisher.peer_id),
        publisher.peer_id,
        Part(b"m" * 32, 4000),
        1,
        295_000,
        2**28,
        ("PSF-2.0",),
        "Python's documentation",
        40,
        (16, 16),
    )
    return replace(sample, **changes)


def library(
    *entries: LibraryEntry, expires_at: float = EXPIRES_AT, keys: SwarmKeys = KEYS
) -> records_pb2.RecordPayload:
    body = records_pb2.Library(memories=[each.message() for each in entries])
    return records_pb2.RecordPayload(key=keys.library, expires_at=expires_at, library=body)


def badge_of(role: Role, holder: Identity, expires_at: float = 2 * EXPIRES_AT) -> admission_pb2.Badge:
    token = make_token(FOUNDER, KEYS.swarm_id, role, expires_at, 7)
    return make_badge(token, holder.peer_id)


def rules(mode: Mode | None, **options: Any) -> SwarmAdmission:
    admission = SwarmAdmission(KEYS, **options)
    if mode is not None:
        admission.learn(FOUNDER.public_key, mode)
    return admission


def as_stored(writer: Identity, payload: records_pb2.RecordPayload) -> Record:
    return stored(payload.key, writer.peer_id.to_bytes(), sign_record(writer, payload), payload.expires_at)


# Who may write a library


def checked(mode: Mode | None, writer: Identity, payload: records_pb2.RecordPayload, **options: Any) -> None:
    """Raises RecordError if a peer that knows this admission mode refuses the record."""
    rule = rules(mode, **options).check_record
    RecordValidator(lambda: NOW, rule, swarm_id=KEYS.swarm_id).check(as_stored(writer, payload))


@pytest.mark.parametrize("mode", ["open", "token", None])
def test_the_founder_publishes_in_every_swarm(mode: Mode | None) -> None:
    checked(mode, FOUNDER, library(entry()))


@pytest.mark.parametrize("mode", ["open", None])
def test_others_publish_nothing_in_an_open_swarm(mode: Mode | None) -> None:
    """The same holds where a peer does not know the mode yet."""
    payload = library(entry(publisher=LIBRARIAN))
    for role in Role:
        payload.badge.CopyFrom(badge_of(role, LIBRARIAN))
        with pytest.raises(RecordError, match="only the founder"):
            checked(mode, LIBRARIAN, payload)


@pytest.mark.parametrize("role", Role)
def test_of_the_tokens_only_a_librarians_lets_one_publish(role: Role) -> None:
    payload = library(entry(publisher=LIBRARIAN))
    payload.badge.CopyFrom(badge_of(role, LIBRARIAN))
    if role is Role.LIBRARIAN:
        checked("token", LIBRARIAN, payload, now=lambda: NOW)
    else:
        with pytest.raises(RecordError, match=f"a {role.word}'s token does not allow"):
            checked("token", LIBRARIAN, payload, now=lambda: NOW)


def test_a_librarian_publishes_nothing_without_a_valid_badge_of_its_own() -> None:
    payload = library(entry(publisher=LIBRARIAN))
    with pytest.raises(RecordError, match="there is none"):
        checked("token", LIBRARIAN, payload)
    payload.badge.CopyFrom(badge_of(Role.LIBRARIAN, STRANGER))
    with pytest.raises(RecordError, match="another peer's"):
        checked("token", LIBRARIAN, payload)
    payload.badge.CopyFrom(badge_of(Role.LIBRARIAN, LIBRARIAN, NOW - 1))
    with pytest.raises(RecordError, match="expired"):
        checked("token", LIBRARIAN, payload, now=lambda: NOW)
    payload.badge.CopyFrom(badge_of(Role.LIBRARIAN, LIBRARIAN))
    denylist = Denylist(None, [LIBRARIAN.peer_id.to_base58()])
    with pytest.raises(RecordError, match="denied"):
        checked("token", LIBRARIAN, payload, now=lambda: NOW, denylist=denylist)


@pytest.mark.parametrize("role", Role)
def test_nodes_and_librarians_announce_regions(role: Role) -> None:
    payload = region()
    payload.badge.CopyFrom(badge_of(role, LIBRARIAN))
    if role in (Role.NODE, Role.LIBRARIAN):
        checked("token", LIBRARIAN, payload, now=lambda: NOW)
    else:
        with pytest.raises(RecordError, match="does not allow"):
            checked("token", LIBRARIAN, payload, now=lambda: NOW)


# What a record may contain


def region(
    shards: bytes = b"r" * 8, state: int = SERVING.value, expires_at: float = EXPIRES_AT
) -> records_pb2.RecordPayload:
    key = KEYS.memory_region(entry().memory, 34)
    payload = records_pb2.RecordPayload(key=key, expires_at=expires_at)
    payload.region.CopyFrom(records_pb2.RegionRecord(shards=shards))
    payload.region.state = state  # type: ignore[assignment]  # hostile ones are of no known number
    return payload


def test_a_library_lives_long_and_a_region_does_not() -> None:
    VALIDATOR.check(as_stored(FOUNDER, library(entry(), expires_at=NOW + MAX_MANIFEST_LIFETIME_S)))
    late = NOW + MAX_MANIFEST_LIFETIME_S + CLOCK_TOLERANCE_S + 1
    refused(as_stored(FOUNDER, library(entry(), expires_at=late)), "live longer")
    VALIDATOR.check(as_stored(FOUNDER, region(expires_at=NOW + MAX_LIFETIME_S)))
    late = NOW + MAX_LIFETIME_S + CLOCK_TOLERANCE_S + 1
    refused(as_stored(FOUNDER, region(expires_at=late)), "live longer than 600 s")


@pytest.mark.parametrize(
    "key",
    [
        KEYS.manifest,
        KEYS.revocations,
        KEYS.node(FOUNDER.peer_id),
        KEYS.memory_index(entry().memory, 34),
        KEYS.memory_region(entry().memory, 34),
        f"{KEYS.swarm_id}.1.library",
        f"{KEYS.library}.1",
    ],
    ids=["manifest", "revocations", "node", "memory", "region", "layer", "below"],
)
def test_a_library_is_under_its_own_key_alone(key: str) -> None:
    payload = library(entry())
    refused(stored(key, FOUNDER.peer_id.to_bytes(), sign_record(FOUNDER, payload)), "another key or subkey")
    payload.key = key
    refused(as_stored(FOUNDER, payload), "kind does not match its key")


def test_nothing_else_is_under_the_librarys_key() -> None:
    node = records_pb2.NodeRecord(addresses=["203.0.113.77:1"])
    for payload in (
        records_pb2.RecordPayload(key=KEYS.library, expires_at=EXPIRES_AT, node=node),
        records_pb2.RecordPayload(key=KEYS.library, expires_at=EXPIRES_AT, region=region().region),
        records_pb2.RecordPayload(key=KEYS.library, expires_at=EXPIRES_AT, manifest_json=b"{}"),
        records_pb2.RecordPayload(key=KEYS.library, expires_at=EXPIRES_AT),
    ):
        refused(as_stored(FOUNDER, payload), "kind does not match its key")
    for subkey in (3, FOUNDER.peer_id.to_bytes()):
        refused(stored(KEYS.library, subkey, KEYS.library), "no index entries")


def test_a_library_has_no_more_than_its_bounds() -> None:
    most = [entry(f"memory-{number}", about="", licenses=()) for number in range(MAX_MEMORIES)]
    VALIDATOR.check(as_stored(FOUNDER, library(*most)))
    refused(as_stored(FOUNDER, library(*most, entry())), "more memories than one publisher may have")
    large = library(entry(about="x" * MAX_LIBRARY_BYTES))
    refused(as_stored(FOUNDER, large), "more memories than one publisher may have")
    refused(as_stored(FOUNDER, library(entry(about="x" * 17_000))), "too large")


@pytest.mark.parametrize("length", [1, 7, 9, 8 * MAX_SHARDS_OF_REGION + 8])
def test_a_region_of_cut_or_too_many_roots_is_refused(length: int) -> None:
    refused(as_stored(FOUNDER, region(bytes(length))), "a region's list of shards")
    VALIDATOR.check(as_stored(FOUNDER, region(bytes(8 * MAX_SHARDS_OF_REGION))))


def test_index_entries_lead_to_regions() -> None:
    memory = MemoryID.of("n" * 24, FOUNDER.peer_id)
    keys = SwarmKeys("s" * 32, FOUNDER.peer_id)
    for number in (0, 3, INDEX_PIECE, 4095):
        key = keys.memory_index(memory, number)
        VALIDATOR.check(stored(key, number, key))
        refused(stored(key, (number + INDEX_PIECE) % 4096, key), "another piece")


# What readers accept of a record


def test_an_entry_is_read_as_it_was_written() -> None:
    listed = entry(), entry("bible", about="", licenses=())
    assert read_library(library(*listed), FOUNDER.peer_id) == listed


@pytest.mark.parametrize(
    "changes",
    [
        {"name": ""},
        {"name": "\x1b[31mred"},
        {"name": "a.b"},
        {"name": "x" * 25},
        {"manifest_sha256": b"m" * 31},
        {"manifest_bytes": 0},
        {"manifest_bytes": 2**40},
        {"revision": 0},
        {"licenses": ["MIT"] * 9},
        {"shards": 2**31},
        {"grid": [5000]},
        {"grid": [4096, 4096]},
        {"grid": [1] * 1000},
    ],
)
def test_a_library_with_a_wrong_entry_is_refused(changes: dict[str, Any]) -> None:
    payload = library(entry("bible"), entry())
    wrong = payload.library.memories[1]
    for field, value in changes.items():
        wrong.ClearField(field)
        wrong.MergeFrom(records_pb2.LibraryEntry(**{field: value}))
    with pytest.raises(TalkootError):
        read_library(payload, FOUNDER.peer_id)


def test_one_publisher_has_no_two_memories_of_one_name() -> None:
    with pytest.raises(RecordError, match="two memories with the same name"):
        read_library(library(entry(), entry(revision=2)), FOUNDER.peer_id)


def test_texts_of_a_publisher_are_harmless_on_a_terminal() -> None:
    escape = "\x1b]0;owned\x07 \u202e\nnext"
    (read,) = read_library(library(entry(about=escape, licenses=(escape,))), FOUNDER.peer_id)
    assert read.about.isprintable()
    assert all(text.isprintable() for text in read.licenses)


@pytest.mark.parametrize("state", [0, ReplicaState.CLAIMED.value, 99])
def test_a_region_in_another_state_is_refused(state: int) -> None:
    with pytest.raises(RecordError, match=r"the region has the unknown state|a region can't be claimed"):
        read_region(region(state=state), FOUNDER.peer_id)


@given(st.binary(max_size=200), st.binary(max_size=200))
def test_hostile_bytes_raise_nothing_but_their_own_errors(listed: bytes, shards: bytes) -> None:
    library_field, region_field = bytes([10 << 3 | 2]), bytes([11 << 3 | 2])
    for field, data in (
        (library_field, b"\x0a" + bytes([len(listed) % 128]) + listed),
        (region_field, shards),
    ):
        payload = records_pb2.RecordPayload()
        with contextlib.suppress(DecodeError):
            payload.ParseFromString(field + _varint(len(data)) + data)
        for read in (read_library, read_region):
            with contextlib.suppress(TalkootError):
                read(payload, FOUNDER.peer_id)


def _varint(number: int) -> bytes:
    return bytes([number]) if number < 128 else bytes([number & 127 | 128, number >> 7])


names = st.text(max_size=30)
entries = st.builds(
    records_pb2.LibraryEntry,
    name=names | st.just("ab"),
    manifest_sha256=st.binary(min_size=31, max_size=33),
    manifest_bytes=st.integers(0, 2**64 - 1),
    revision=st.integers(0, 2**32 - 1),
    passages=st.integers(0, 2**64 - 1),
    licenses=st.lists(names, max_size=9),
    grid=st.lists(st.integers(0, 5000), max_size=5) | st.just([16, 16]),
    about=st.text(max_size=300),
)


@given(st.lists(entries, max_size=3))
def test_an_entry_that_is_read_is_one_that_could_be_published(listed: list[records_pb2.LibraryEntry]) -> None:
    payload = library()
    payload.library.memories.extend(listed)
    with contextlib.suppress(TalkootError):
        read = read_library(payload, FOUNDER.peer_id)
        assert read_library(library(*read), FOUNDER.peer_id) == read


# Revisions


def test_a_publishers_library_keeps_its_other_memories() -> None:
    first, second = entry(), entry("bible")
    assert with_entry((first,), second) == (first, second)
    assert with_entry((first, second), first) == (second, first)
    newer = entry(revision=2, manifest=Part(b"n" * 32, 4100))
    assert with_entry((first, second), newer) == (second, newer)


def test_an_older_or_another_revision_is_not_published() -> None:
    with pytest.raises(LibraryError, match=r"revision 3 of .* is published, and this is revision 2"):
        with_entry((entry(revision=3),), entry(revision=2))
    with pytest.raises(LibraryError, match="another revision 3"):
        with_entry((entry(revision=3),), entry(revision=3, manifest=Part(b"n" * 32, 4000)))


def test_a_memory_is_found_by_its_name_or_its_id() -> None:
    ours, theirs, other = entry(), entry(publisher=LIBRARIAN), entry("bible")
    libraries = {FOUNDER.peer_id: (ours, other), LIBRARIAN.peer_id: (theirs,)}
    assert find_memory(libraries, "bible") == other
    assert find_memory(libraries, str(theirs.memory)) == theirs
    assert find_memory({FOUNDER.peer_id: (other,)}, None) == other
    with pytest.raises(LibraryError, match="several memories"):
        find_memory(libraries, None)
    with pytest.raises(LibraryError, match="several publishers") as several:
        find_memory(libraries, "python-docs")
    assert str(ours.memory) in str(several.value)
    assert str(theirs.memory) in str(several.value)
    with pytest.raises(LibraryError, match=f"pass one of {other.memory}"):
        find_memory({FOUNDER.peer_id: (other,)}, "wikipedia")
    for nothing in ({}, {FOUNDER.peer_id: ()}):
        with pytest.raises(LibraryError, match="no memory is published"):
            find_memory(nothing, "bible")


# Over real sockets


@contextlib.asynccontextmanager
async def swarm(
    mode: Mode, badges: Sequence[admission_pb2.Token | None] = (None, None, None), gullible: int = -1
) -> AsyncIterator[tuple[list[Host], list[Registry]]]:
    """The founder, a second peer and a third, each with the swarm's rules. One of them may accept anything it
    is given.
    """
    hosts: list[Host] = []
    registries: list[Registry] = []
    try:
        for number, token in enumerate(badges):
            identity, admission = numbered_identity(number), rules(mode)
            if token is not None:
                admission.present(token, identity.peer_id)
            validator = RecordValidator(rule=admission.check_record, swarm_id=KEYS.swarm_id)
            hosts.append(
                await Host.start(
                    identity,
                    NetworkConfig("127.0.0.1"),
                    bootstrap=hosts[0].bootstrap_addresses() if hosts else [],
                    validator=Gullible() if number == gullible else validator,
                )
            )
            registries.append(Registry(hosts[-1].dht, KEYS, identity, admission))
        yield hosts, registries
    finally:
        for host in reversed(hosts):
            await host.stop()


def run(loop: LoopThread, scenario: Callable[[], Any]) -> None:
    loop.run(scenario(), 120)


def test_what_the_founder_publishes_others_read(loop: LoopThread) -> None:
    async def scenario() -> None:
        async with swarm("open") as (_, (founder, second, third)):
            assert await MemoryRegistry(second).libraries() == {}
            # Signed with the founder's key, but announced by another peer.
            publishing = MemoryRegistry(third)
            await publishing.publish_library([entry(), entry("bible")], FOUNDER)
            for registry in (founder, second, third):
                read = await MemoryRegistry(registry).libraries()
                assert read == {FOUNDER.peer_id: (entry(), entry("bible"))}
            # It replaces the other at once, though both records expire at the same time.
            await MemoryRegistry(founder).publish_library([entry(revision=2)])
            assert await publishing.libraries() == {FOUNDER.peer_id: (entry(revision=2),)}

    run(loop, scenario)


def test_in_an_open_swarm_nobody_takes_what_others_publish(loop: LoopThread) -> None:
    async def scenario() -> None:
        async with swarm("open") as (_, (_, second, third)):
            with pytest.raises(UnreachableError, match="accepted"):
                await MemoryRegistry(second).publish_library([entry(publisher=LIBRARIAN)])
            assert await MemoryRegistry(third).libraries() == {}

    run(loop, scenario)


def test_what_a_stranger_stores_at_a_holder_without_rules_is_not_read(loop: LoopThread) -> None:
    async def scenario() -> None:
        async with swarm("open", gullible=2) as (hosts, (founder, second, _)):
            until = time.time() + MONTH_S
            own = sign_record(STRANGER, library(entry(publisher=STRANGER), expires_at=until))
            data = library(entry("forged"), expires_at=until).SerializeToString()
            as_founder = records_pb2.SignedRecord(
                payload=data,
                public_key=FOUNDER.public_key,
                signature=STRANGER.sign(FOUNDER.public_key + data),
            ).SerializeToString()
            for subkey, record in ((STRANGER, own), (FOUNDER, as_founder)):
                assert await store_raw(hosts[2], KEYS.library, subkey.peer_id.to_bytes(), record, until)
            await MemoryRegistry(founder).publish_library([entry()])
            for registry in (founder, second):
                assert await MemoryRegistry(registry).libraries() == {FOUNDER.peer_id: (entry(),)}

    run(loop, scenario)


def token(role: Role, serial: int) -> admission_pb2.Token:
    return make_token(FOUNDER, KEYS.swarm_id, role, time.time() + 3600, serial)


def test_two_publishers_of_one_name_have_two_memories(loop: LoopThread) -> None:
    async def scenario() -> None:
        tokens = None, token(Role.LIBRARIAN, 1), token(Role.NODE, 2)
        async with swarm("token", tokens) as (_, (founder, librarian, node)):
            theirs = entry(publisher=LIBRARIAN, about="theirs")
            await MemoryRegistry(founder).publish_library([entry()])
            await MemoryRegistry(librarian).publish_library([theirs])
            reading = MemoryRegistry(node)
            assert await reading.libraries() == {FOUNDER.peer_id: (entry(),), LIBRARIAN.peer_id: (theirs,)}
            assert entry().memory != theirs.memory
            with pytest.raises(UnreachableError, match="accepted"):
                await reading.publish_library([entry(publisher=STRANGER)])
            assert node._admission is not None
            node._admission.revoke([1])
            assert await reading.libraries() == {FOUNDER.peer_id: (entry(),)}

    run(loop, scenario)


def test_no_memory_goes_back_to_an_older_revision(loop: LoopThread) -> None:
    async def scenario() -> None:
        async with swarm("open", gullible=2) as (hosts, (founder, second, _)):
            reading = MemoryRegistry(second)
            new = time.time() + MONTH_S
            old = sign_record(FOUNDER, library(entry(revision=4), expires_at=new - 5))
            await MemoryRegistry(founder).publish_library([entry(revision=5)])
            assert await reading.libraries() == {FOUNDER.peer_id: (entry(revision=5),)}
            # An old record that is sent again once the holders have lost the newer one.
            for host in hosts:
                forget_all(host.dht.storage)
            assert await store_raw(hosts[2], KEYS.library, FOUNDER.peer_id.to_bytes(), old, new - 5)
            assert await reading.libraries() == {FOUNDER.peer_id: (entry(revision=5),)}
            # A record that was signed later, by mistake.
            later = new + 60
            record = sign_record(FOUNDER, library(entry(revision=3), entry("bible"), expires_at=later))
            assert await store_raw(hosts[2], KEYS.library, FOUNDER.peer_id.to_bytes(), record, later)
            read = await reading.libraries()
            assert read == {FOUNDER.peer_id: (entry(revision=5), entry("bible"))}

    run(loop, scenario)


def test_what_another_peer_shows_counts_only_if_it_is_signed_and_newer(loop: LoopThread) -> None:
    async def scenario() -> None:
        async with swarm("open") as (_, (founder, second, _)):
            until = time.time() + MONTH_S
            publishing, reading = MemoryRegistry(founder), MemoryRegistry(second)
            await publishing.publish_library([entry(revision=2)])
            first = publishing.record_of(FOUNDER.peer_id)
            await publishing.publish_library([entry(revision=3)])
            second_record = publishing.record_of(FOUNDER.peer_id)
            show = partial(reading.hear, caller=STRANGER.peer_id)
            assert [show(FOUNDER.peer_id, second_record) for _ in range(2)] == [True, False]
            own = sign_record(STRANGER, library(entry(publisher=STRANGER), expires_at=until))
            for publisher in (FOUNDER, STRANGER):
                for record in (first, own, second_record[:-1], b"junk", bytes(100_000)):
                    assert not show(publisher.peer_id, record)
            assert reading.record_of(FOUNDER.peer_id) == second_record
            assert reading.record_of(STRANGER.peer_id) == b""
            assert await reading.libraries() == {FOUNDER.peer_id: (entry(revision=3),)}

    run(loop, scenario)


def test_what_was_read_is_known_in_a_later_run(loop: LoopThread) -> None:
    async def scenario() -> None:
        async with swarm("open", gullible=2) as (hosts, (founder, second, _)):
            new = time.time() + MONTH_S
            old = sign_record(FOUNDER, library(entry("bible"), expires_at=new - 5))
            await MemoryRegistry(founder).publish_library([entry(revision=5)])
            reading = MemoryRegistry(second)
            await reading.libraries()
            for host in hosts:
                forget_all(host.dht.storage)
            assert await store_raw(hosts[2], KEYS.library, FOUNDER.peer_id.to_bytes(), old, new - 5)
            assert await MemoryRegistry(second).libraries() == {FOUNDER.peer_id: (entry("bible"),)}
            later = MemoryRegistry(second)
            later.restore(reading.saved())
            assert await later.libraries() == {FOUNDER.peer_id: (entry(revision=5),)}
            # A file that was cut off, and one that is something else.
            for cut in range(0, len(reading.saved()), 7):
                other = MemoryRegistry(second)
                other.restore(reading.saved()[:cut])
                assert not other.saved()

    run(loop, scenario)


def test_a_library_outlives_its_holders_and_its_publisher_renews_it(loop: LoopThread) -> None:
    async def scenario() -> None:
        async with swarm("open") as (hosts, (founder, second, third)):
            keeping = MemoryRegistry(second)
            await MemoryRegistry(founder).publish_library([entry()])
            await keeping.libraries()
            for host in hosts:
                forget_all(host.dht.storage)
            await keeping.keep_libraries()
            assert await MemoryRegistry(third).libraries() == {FOUNDER.peer_id: (entry(),)}

    run(loop, scenario)


def test_the_publisher_alone_renews_its_library_in_the_second_half_of_its_life(loop: LoopThread) -> None:
    async def scenario() -> None:
        async with swarm("open") as (hosts, (founder, second, _)):
            old = time.time() + 0.4 * MONTH_S
            record = sign_record(FOUNDER, library(entry(), expires_at=old))
            assert await store_raw(hosts[1], KEYS.library, FOUNDER.peer_id.to_bytes(), record, old)

            async def expiries_after_keeping(registry: Registry) -> set[float]:
                keeping = MemoryRegistry(registry)
                assert await keeping.libraries() == {FOUNDER.peer_id: (entry(),)}
                await keeping.keep_libraries()
                return {each.expires_at for each in (await read_raw(hosts[2], KEYS.library)).values()}

            assert await expiries_after_keeping(second) == {old}
            (renewed,) = await expiries_after_keeping(founder)
            assert renewed > time.time() + 0.9 * MONTH_S
            assert await expiries_after_keeping(founder) == {renewed}

    run(loop, scenario)


def test_a_library_that_does_not_fit_is_not_published(loop: LoopThread) -> None:
    async def scenario() -> None:
        async with swarm("open") as (_, (founder, _, _)):
            many = [entry(f"memory-{number}") for number in range(MAX_MEMORIES + 1)]
            long = [entry(f"memory-{number}", about="x" * 256) for number in range(MAX_MEMORIES)]
            for entries in (many, long):
                with pytest.raises(LibraryError, match="don't fit"):
                    await MemoryRegistry(founder).publish_library(entries)

    run(loop, scenario)


def test_hosts_of_regions_are_found_by_the_index(loop: LoopThread, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dht.library._REGIONS_AT_ONCE", 2)
    listed, memory, other = entry(), entry().memory, entry("bible").memory
    first, second, third = (bytes([number]) * 32 for number in range(3))

    async def scenario() -> None:
        async with swarm("open") as (hosts, (a, b, c)):
            one, two, reading = MemoryRegistry(a), MemoryRegistry(b), MemoryRegistry(c)
            assert await reading.active_regions(listed) == frozenset()
            assert await reading.some_hosts(listed) == ()
            await one.announce(memory, {1: (SERVING, [first, second]), 15: (LEAVING, [third])}, 60)
            await two.announce(memory, {1: (SERVING, [first])}, 60)
            await two.announce(other, {2: (SERVING, [third])}, 60)
            await two.announce(memory, {9: (ReplicaState.WITHDRAWN, [])}, 60)
            assert await reading.active_regions(listed) == {1, 15}
            assert await reading.active_regions(replace(listed, grid=(15,))) == {1}, (
                "such a grid has no region 15"
            )
            ours = RegionHost(hosts[0].peer_id, SERVING, frozenset({first[:8], second[:8]}))
            theirs = RegionHost(hosts[1].peer_id, SERVING, frozenset({first[:8]}))
            leaving = RegionHost(hosts[0].peer_id, LEAVING, frozenset({third[:8]}))
            found = await reading.region_hosts(memory, [1, 15, 7])
            assert set(found[1]) == {ours, theirs}
            assert (found[15], found[7]) == ((leaving,), ())
            some = await reading.some_hosts(listed)
            assert {host.peer_id for host in some} == {hosts[0].peer_id, hosts[1].peer_id}
            # whatever regions strangers mark, no hosts are hidden
            await one.announce(memory, {1: (ReplicaState.WITHDRAWN, [])}, 60)
            marks = [(b.keys.memory_index(memory, number), number) for number in range(3 * INDEX_PIECE)]
            await b.store([Item(key, number, key, b.now() + 60) for key, number in marks])
            some = await reading.some_hosts(listed)
            assert some
            assert set(some) <= {theirs, leaving}
            assert await reading.region_hosts(memory, [1]) == {1: (theirs,)}

    run(loop, scenario)


def node_record(number: int) -> records_pb2.NodeRecord:
    certificate = numbered_identity(number).make_certificate()
    return records_pb2.NodeRecord(
        addresses=["203.0.113.7:50051"], certificate=certificate, name="sauna", updates=7
    )


def test_a_host_says_in_some_of_its_regions_how_to_call_it(loop: LoopThread) -> None:
    memory = entry().memory
    regions: Regions = {n: (SERVING, [b"r" * 32]) for n in range(5)}

    async def scenario() -> None:
        async with swarm("open") as (hosts, (a, b, _)):
            announcing, reading = MemoryRegistry(a), MemoryRegistry(b)

            async def said() -> list[NodeInfo]:
                found = await reading.region_hosts(memory, list(regions), with_contacts=True)
                assert {host.peer_id for (host,) in found.values()} == {hosts[0].peer_id}
                return [host.node for (host,) in found.values() if host.node is not None]

            await announcing.store(await announcing.announcements(memory, regions, 60, most_contacts=2))
            assert not await said(), "it has no node record yet"
            await a.publish_node(node_record(0), 60)
            await announcing.store(await announcing.announcements(memory, regions, 60, most_contacts=2))
            contacts = await said()
            assert len(contacts) == 2
            published = (await b.nodes([hosts[0].peer_id]))[hosts[0].peer_id]
            for contact in contacts:
                assert (contact.addresses, contact.name) == (published.addresses, published.name)
                assert (contact.certificate_pem, contact.updates) == (published.certificate_pem, 0)
            unasked = await reading.region_hosts(memory, list(regions))
            assert all(host.node is None for (host,) in unasked.values())
            await a.leave(60)
            await announcing.store(await announcing.announcements(memory, regions, 60, most_contacts=2))
            assert not await said()

    run(loop, scenario)


def test_an_announcement_that_a_later_one_has_overtaken_is_not_missed(loop: LoopThread) -> None:
    memory = entry().memory

    async def scenario() -> None:
        async with swarm("open") as (_, (a, b, _)):
            announcing, reading = MemoryRegistry(a), MemoryRegistry(b)
            withdrawn: Regions = {1: (ReplicaState.WITHDRAWN, [])}
            older = await announcing.announcements(memory, withdrawn, 60)
            newer = await announcing.announcements(memory, {1: (SERVING, [b"r" * 32])}, 60)
            await announcing.store(newer)
            await announcing.store(older)  # which everybody refuses
            assert len((await reading.region_hosts(memory, [1]))[1]) == 1
            newest = await announcing.announcements(memory, withdrawn, 60)
            stored_later = await announcing.announcements(memory, withdrawn, 60)
            await announcing.store(stored_later)
            a._written.clear()
            with pytest.raises(UnreachableError, match="accepted our records"):
                await announcing.store(newest)

    run(loop, scenario)


def test_a_region_leads_to_nobody_but_its_host() -> None:
    payload = region()
    payload.region.node.CopyFrom(node_record(1))
    with pytest.raises(RecordError, match="not that of peer"):
        read_region(payload, FOUNDER.peer_id, with_contact=True)
    assert read_region(payload, LIBRARIAN.peer_id, with_contact=True) is not None
    payload.region.node.CopyFrom(records_pb2.NodeRecord(left=True))
    host = read_region(payload, FOUNDER.peer_id, with_contact=True)
    assert host is not None
    assert host.node is None


def test_a_memory_of_many_regions_has_its_index_under_several_keys(loop: LoopThread) -> None:
    async def scenario() -> None:
        async with swarm("open") as (_, (a, b, _)):
            regions: Regions = {
                number: (SERVING, [b"r" * 32]) for number in (0, INDEX_PIECE - 1, INDEX_PIECE, 2000, 2175)
            }
            await MemoryRegistry(a).announce(entry().memory, regions, 60)
            assert await MemoryRegistry(b).active_regions(entry(grid=(128, 256), shards=MAX_SHARDS)) == set(
                regions
            )

    run(loop, scenario)


def test_what_is_no_region_is_left_out_beside_its_hosts(loop: LoopThread) -> None:
    memory = entry().memory

    async def scenario() -> None:
        async with swarm("open", gullible=2) as (hosts, (a, b, _)):
            await MemoryRegistry(a).announce(memory, {1: (SERVING, [b"r" * 32])}, 60)
            key, until = KEYS.memory_region(memory, 1), time.time() + 60
            wrong = records_pb2.RecordPayload(
                key=key, expires_at=until, announcement=records_pb2.Announcement(state=SERVING.value)
            )
            cut = records_pb2.RecordPayload(
                key=key, expires_at=until, region=records_pb2.RegionRecord(state=SERVING.value, shards=b"cut")
            )
            for payload in (wrong, cut):
                record = sign_record(STRANGER, payload)
                assert await store_raw(hosts[2], key, STRANGER.peer_id.to_bytes(), record, until)
                until = payload.expires_at = until + 1
            assert await store_raw(hosts[2], key, 77, key, until)
            found = await MemoryRegistry(b).region_hosts(memory, [1])
            assert [host.peer_id for host in found[1]] == [hosts[0].peer_id]

    run(loop, scenario)


def reading(key: str, stored_there: dict[object, tuple[bytes, float]]) -> Any:
    """What a registry is for a reader, with these values under the key."""

    async def get(keys: list[str], limits: object = None) -> Any:
        return {each: stored_there if each == key else {} for each in keys}

    return SimpleNamespace(
        keys=KEYS,
        get=get,
        guard=ParseGuard(),
        unseal=lambda value, key, peer_id: open_record(value, key, peer_id, time.time()),
    )


def test_records_that_strangers_put_into_a_region_do_not_hold_the_loop() -> None:
    memory, until = entry().memory, time.time() + 60
    key, stored_there = KEYS.memory_region(memory, 0), dict[object, tuple[bytes, float]]()
    shards = b"".join(number.to_bytes(8) for number in range(256))
    for number in range(250):
        stranger = numbered_identity(number)
        body = records_pb2.RegionRecord(state=SERVING.value, shards=shards)
        payload = records_pb2.RecordPayload(key=key, expires_at=until, region=body)
        stored_there[stranger.peer_id.to_bytes()] = sign_record(stranger, payload), until
    registry = reading(key, stored_there)

    async def read() -> None:
        assert len((await MemoryRegistry(registry).region_hosts(memory, [0]))[0]) == 250

    assert pauses(read, 1 / 3)


def test_lists_of_many_publishers_do_not_hold_the_loop() -> None:
    """One librarian's token may have many peers."""
    until, stored_there = time.time() + 60, dict[object, tuple[bytes, float]]()
    for number in range(60):
        publisher = numbered_identity(number)
        entries = [entry(f"docs-{n}", publisher, about="x" * 60) for n in range(MAX_MEMORIES)]
        record = sign_record(publisher, library(*entries, expires_at=until))
        stored_there[publisher.peer_id.to_bytes()] = record, until
    registry = reading(KEYS.library, stored_there)

    async def read() -> None:
        assert len(await MemoryRegistry(registry).libraries()) == 60

    assert pauses(read, 1 / 4)
