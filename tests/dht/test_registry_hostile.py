"""Peers write what they have no right to write, and others see nothing of it."""

import time
from collections.abc import Iterator

import pytest
from stranger import new_identities
from three_hosts import (
    FIRST,
    LIFETIME_S,
    MANIFEST,
    SECOND,
    SERVING,
    Swarm,
    node_record,
    swarm_for,
    three_hosts,
)

from dht.announcements import NodeInfo, ReplicaAnnouncement, read_node
from dht.directory import Directory
from dht.records import MAX_REPLICAS_OF_RECORD, sign_record
from dht.uid import UID
from peer.errors import UnreachableError
from peer.host import Host
from peer.identity import PeerID
from peer.kademlia.validation import MAX_KEY_BYTES
from peer.loop import LoopThread
from peer.wire import records_pb2


@pytest.fixture(scope="module")
def hosts(loop: LoopThread) -> Iterator[list[Host]]:
    with three_hosts(loop) as hosts:
        yield hosts


@pytest.fixture
def swarm(loop: LoopThread, hosts: list[Host], request: pytest.FixtureRequest) -> Swarm:
    return swarm_for(loop, hosts, request)


@pytest.mark.parametrize("certificate", ["another peer's", "none", "of another version"])
def test_a_node_with_a_wrong_certificate_is_left_out(swarm: Swarm, certificate: str) -> None:
    own = bytearray(swarm.hosts[1].identity.make_certificate())
    own[12] ^= 1
    wrong = {
        "another peer's": swarm.hosts[2].identity.make_certificate(),
        "none": b"",
        "of another version": bytes(own),
    }[certificate]

    async def scenario() -> None:
        await swarm.registry(1).publish_node(node_record(swarm.hosts[1], certificate=wrong), LIFETIME_S)
        await swarm.registry(2).publish_node(node_record(swarm.hosts[2]), LIFETIME_S)
        found = await swarm.registry(0).nodes([host.peer_id for host in swarm.hosts])
        assert set(found) == {swarm.hosts[2].peer_id}

    swarm.run(scenario())


def announcement(key: str, expires_at: float) -> records_pb2.RecordPayload:
    body = records_pb2.Announcement(state=records_pb2.REPLICA_STATE_SERVING)
    return records_pb2.RecordPayload(key=key, expires_at=expires_at, announcement=body)


def test_a_peer_cannot_announce_for_another(swarm: Swarm) -> None:
    async def scenario() -> None:
        victim, liar = swarm.hosts[1], swarm.hosts[2]
        await swarm.experts(1).announce([ReplicaAnnouncement(FIRST, SERVING, 7)], LIFETIME_S)
        key, until = swarm.keys.expert(FIRST), time.time() + 2 * LIFETIME_S
        forged = sign_record(liar.identity, announcement(key, until))
        assert not await swarm.store(2, key, victim.peer_id.to_bytes(), forged, until)
        assert not await swarm.store(2, swarm.keys.expert(SECOND), victim.peer_id.to_bytes(), forged, until)
        found = await swarm.experts(0).replicas([FIRST, SECOND])
        assert [(r.peer_id, r.update_count) for r in found[FIRST]] == [(victim.peer_id, 7)]
        assert found[SECOND] == ()
        assert await swarm.store(2, key, liar.peer_id.to_bytes(), forged, until), "its own it may"

    swarm.run(scenario())


def test_a_plain_value_does_not_hide_the_announcements(swarm: Swarm) -> None:
    async def scenario() -> None:
        await swarm.experts(1).announce([ReplicaAnnouncement(FIRST, SERVING)], LIFETIME_S)
        until = time.time() + 500
        for key in (swarm.keys.expert(FIRST), swarm.keys.prefix(0), swarm.keys.prefix(0, (0,))):
            assert not await swarm.store(2, key, None, b"mine", until)
            assert not await swarm.store(2, key, None, key, until)
        assert len((await swarm.experts(0).replicas([FIRST]))[FIRST]) == 1
        assert await swarm.experts(0).prefixes([(0, ())], 4) == {(0, ()): {0}}

    swarm.run(scenario())


@pytest.mark.parametrize("subkey", [True, "1", -1, 4096, b"1"])
def test_what_is_no_coordinate_does_not_get_into_a_prefix(swarm: Swarm, subkey: object) -> None:
    async def scenario() -> None:
        prefix = swarm.keys.prefix(0, (0,))
        assert not await swarm.store(2, prefix, subkey, prefix, time.time() + 500)
        await swarm.experts(1).announce([ReplicaAnnouncement(FIRST, SERVING)], LIFETIME_S)
        (active,) = (await swarm.experts(0).prefixes([(0, (0,))], 4096)).values()
        assert [type(coordinate) for coordinate in active] == [int]
        assert active == {1}

    swarm.run(scenario())


def test_records_that_live_too_long_are_accepted_by_nobody_and_the_writer_is_told(swarm: Swarm) -> None:
    async def scenario() -> None:
        with pytest.raises(UnreachableError, match="no DHT peer accepted our records"):
            await swarm.experts(1).announce([ReplicaAnnouncement(FIRST, SERVING)], 10_000.0)
        assert await swarm.experts(0).replicas([FIRST]) == {FIRST: ()}

    swarm.run(scenario())


def test_experts_off_the_manifests_grid_do_not_disturb_the_directory(swarm: Swarm) -> None:
    async def scenario() -> None:
        # Coordinates outside the manifest's grid, and those of grids with one dimension more or less.
        off = [(2, 99), (77, 0), (2,), (2, 3, 0)]
        stray = [ReplicaAnnouncement(UID(0, coordinate), SERVING) for coordinate in off]
        await swarm.experts(1).announce([ReplicaAnnouncement(SECOND, SERVING), *stray], LIFETIME_S)
        await swarm.registry(1).publish_node(node_record(swarm.hosts[1]), LIFETIME_S)
        directory = Directory(swarm.experts(0), MANIFEST, refresh_every_s=60)
        for view in (await directory.refresh(), await directory.refresh()):  # the second by its prefixes
            assert set(view.replicas) == {SECOND}
            assert view.live_experts() == 1

    swarm.run(scenario())


def test_whoever_says_that_it_hosts_hundreds_of_experts_takes_little_of_a_readers_time(swarm: Swarm) -> None:
    async def scenario() -> None:
        key, until = swarm.keys.prefix(0), time.time() + 500
        state = records_pb2.REPLICA_STATE_SERVING
        replicas = [
            records_pb2.Announcement(state=state, following=[7, n]) for n in range(MAX_REPLICAS_OF_RECORD)
        ]
        for liar in new_identities(40):
            hosting = records_pb2.Hosting(replicas=replicas)
            record = sign_record(liar, records_pb2.RecordPayload(key=key, expires_at=until, hosting=hosting))
            assert await swarm.store(2, key, liar.peer_id.to_bytes(), record, until)
        await swarm.experts(1).announce([ReplicaAnnouncement(FIRST, SERVING)], LIFETIME_S)
        for reader in (swarm.experts(n) for n in range(3)):
            found = await reader.replicas([FIRST])
            assert [replica.peer_id for replica in found[FIRST]] == [swarm.hosts[1].peer_id]
            region = reader.regions.recent((0, ()), [0])
            assert region is not None
            assert region.size <= MAX_KEY_BYTES

    swarm.run(scenario())


def test_an_expert_whose_prefix_nobody_renews_is_found_after_a_few_refreshes(swarm: Swarm) -> None:
    async def scenario() -> None:
        host, until = swarm.hosts[1], time.time() + 300
        key, row, layer = swarm.keys.expert(FIRST), swarm.keys.prefix(0, (0,)), swarm.keys.prefix(0)
        record = sign_record(host.identity, announcement(key, until))
        assert await swarm.store(1, key, host.peer_id.to_bytes(), record, until)
        for prefix, other in ((layer, 2), (row, 3)):
            assert await swarm.store(1, prefix, other, prefix, until)
        await swarm.registry(1).publish_node(node_record(host), LIFETIME_S)
        directory = Directory(swarm.experts(0), MANIFEST, refresh_every_s=60)
        for _ in range(20):  # each draws 16 of 24
            if (await directory.refresh()).hosts(FIRST):
                break
        assert directory.view.hosts(FIRST)
        assert (await directory.refresh()).hosts(FIRST), "and is known from now on"

    swarm.run(scenario())


def test_a_manifest_under_a_foreign_subkey_is_not_stored(swarm: Swarm) -> None:
    async def scenario() -> None:
        until = time.time() + 3600
        payload = records_pb2.RecordPayload(
            key=swarm.keys.manifest, expires_at=until, manifest_json=b"the liar's"
        )
        forged = sign_record(swarm.hosts[1].identity, payload)
        assert not await swarm.store(1, swarm.keys.manifest, swarm.keys.author.to_bytes(), forged, until)
        assert await swarm.registry(2).find_founder_record(swarm.keys.manifest) is None

    swarm.run(scenario())


def test_a_peer_listed_in_a_wrong_shard_is_not_stored(swarm: Swarm) -> None:
    async def scenario() -> None:
        peer_id = swarm.hosts[1].peer_id
        wrong = swarm.keys.node_shard(f"{peer_id.to_bytes()[-1] ^ 1:02x}")
        assert not await swarm.store(1, wrong, peer_id.to_bytes(), wrong, time.time() + 60)
        assert await swarm.registry(2).node_ids() == frozenset()

    swarm.run(scenario())


def test_a_record_that_breaks_its_parser_hides_no_others(
    swarm: Swarm, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def parse(payload: records_pb2.RecordPayload, peer_id: PeerID) -> NodeInfo | None:
        if payload.node.name == "breaks it":
            raise TypeError("unforeseen")
        return read_node(payload, peer_id)

    monkeypatch.setattr("dht.registry.read_node", parse)

    async def scenario() -> None:
        await swarm.registry(1).publish_node(node_record(swarm.hosts[1], name="breaks it"), LIFETIME_S)
        await swarm.registry(2).publish_node(node_record(swarm.hosts[2]), LIFETIME_S)
        found = await swarm.registry(0).nodes([host.peer_id for host in swarm.hosts])
        assert set(found) == {swarm.hosts[2].peer_id}

    swarm.run(scenario())
    assert f"can't parse what {swarm.hosts[1].peer_id} wrote (node)" in caplog.text
