"""What peers announce, and what other peers then see: three real hosts."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from loop_lags import longest_slice
from raw_dht import read_raw
from three_hosts import (
    CLAIMED,
    FIRST,
    LIFETIME_S,
    MANIFEST,
    SECOND,
    SERVING,
    THIRD,
    Swarm,
    node_record,
    swarm_for,
    three_hosts,
)

from dht.announcements import Replica, ReplicaAnnouncement
from dht.directory import Directory
from dht.experts import ExpertRegistry
from dht.manifest import Manifest
from dht.records import SwarmKeys, open_record
from dht.registry import Registry
from dht.uid import UID
from peer import PROTOCOL_VERSION
from peer.errors import UnreachableError
from peer.host import Host
from peer.identity import PeerID
from peer.kademlia.node import KademliaNode, Row
from peer.kademlia.validation import unpack
from peer.loop import LoopThread
from peer.metrics import new_registry
from peer.wire import records_pb2


@pytest.fixture(scope="module")
def hosts(loop: LoopThread) -> Iterator[list[Host]]:
    with three_hosts(loop) as hosts:
        yield hosts


@pytest.fixture
def swarm(loop: LoopThread, hosts: list[Host], request: pytest.FixtureRequest) -> Swarm:
    return swarm_for(loop, hosts, request)


async def eventually(check: Callable[[], Awaitable[bool]], deadline_s: float = 60.0) -> None:
    async with asyncio.timeout(deadline_s):
        while True:
            if await check():
                return
            await asyncio.sleep(0.1)


def test_another_peer_sees_what_was_announced(swarm: Swarm) -> None:
    async def scenario() -> None:
        before = time.time()
        announced = [ReplicaAnnouncement(FIRST, SERVING, 41), ReplicaAnnouncement(THIRD, CLAIMED, 0, before)]
        await swarm.experts(1).announce(announced, LIFETIME_S, queued_rows=12)
        found = await swarm.experts(2).replicas([FIRST, SECOND, THIRD])
        (first,), second, (third,) = found[FIRST], found[SECOND], found[THIRD]
        me = swarm.hosts[1].peer_id
        assert first == Replica(FIRST, me, SERVING, 41, 12, 0.0, first.expires_at)
        assert third == Replica(THIRD, me, CLAIMED, 0, 12, before, third.expires_at)
        assert second == ()
        assert before + LIFETIME_S <= first.expires_at <= time.time() + LIFETIME_S

    swarm.run(scenario())


def test_prefixes_are_the_active_coordinates_of_all_peers(swarm: Swarm) -> None:
    async def scenario() -> None:
        await asyncio.gather(
            swarm.experts(1).announce(
                [ReplicaAnnouncement(FIRST, SERVING), ReplicaAnnouncement(THIRD, CLAIMED)], LIFETIME_S
            ),
            swarm.experts(2).announce([ReplicaAnnouncement(SECOND, SERVING)], LIFETIME_S),
        )
        found = await swarm.experts(0).prefixes([(0, ()), (1, ()), (0, (0,)), (0, (1,)), (0, (2,))], 4)
        assert found == {(0, ()): {0, 2}, (1, ()): {1}, (0, (0,)): {1}, (0, (1,)): set(), (0, (2,)): {3}}

    swarm.run(scenario())


def test_a_renewed_announcement_takes_the_place_of_the_old(swarm: Swarm) -> None:
    async def scenario() -> None:
        experts = swarm.experts(1)
        await experts.announce([ReplicaAnnouncement(FIRST, CLAIMED)], LIFETIME_S)
        await experts.announce([ReplicaAnnouncement(FIRST, SERVING, 3)], LIFETIME_S)
        await swarm.experts(2).announce([ReplicaAnnouncement(FIRST, SERVING, 5)], LIFETIME_S)
        found = (await swarm.experts(0).replicas([FIRST]))[FIRST]
        counts = {replica.peer_id: (replica.state, replica.update_count) for replica in found}
        assert counts == {swarm.hosts[1].peer_id: (SERVING, 3), swarm.hosts[2].peer_id: (SERVING, 5)}
        assert len(found) == 2

    swarm.run(scenario())


def test_withdrawn_replicas_are_gone_at_once_and_the_others_stay(swarm: Swarm) -> None:
    async def scenario() -> None:
        for n in (1, 2):
            await swarm.experts(n).announce(
                [ReplicaAnnouncement(FIRST, SERVING), ReplicaAnnouncement(SECOND, SERVING)], LIFETIME_S
            )
        await swarm.experts(1).withdraw([FIRST], LIFETIME_S)
        found = await swarm.experts(0).replicas([FIRST, SECOND])
        assert {replica.peer_id for replica in found[FIRST]} == {swarm.hosts[2].peer_id}
        assert {replica.peer_id for replica in found[SECOND]} == {host.peer_id for host in swarm.hosts[1:]}

    swarm.run(scenario())


def test_a_node_record_is_seen_in_full(swarm: Swarm) -> None:
    async def scenario() -> None:
        host = swarm.hosts[1]
        record = node_record(
            host,
            software_version="1.0\x1b[31m\n" + "x" * 99,
            addresses=[*(f"10.0.0.1:{port}" for port in range(1, 21))],
            memory_shards=3,
            memory_bytes=2**63,
            memory_queries=9,
            memory_queries_per_s=float("nan"),
        )
        await swarm.registry(1).publish_node(record, LIFETIME_S)
        found = await swarm.registry(2).nodes([host.peer_id, swarm.hosts[0].peer_id])
        assert set(found) == {host.peer_id}
        node = found[host.peer_id]
        assert node.addresses == tuple(f"10.0.0.1:{port}" for port in range(1, 9))
        assert node.software_version.isprintable()
        assert len(node.software_version) <= 32
        assert node.certificate_pem.startswith(b"-----BEGIN CERTIFICATE-----")
        assert (node.expert_count, node.expert_capacity) == (2, 5)
        assert (node.rows_processed, node.updates, node.started_at) == (2**40, 7, 1.5)
        assert node.protocol_version == PROTOCOL_VERSION
        assert (node.memory_shards, node.memory_queries, node.memory_queries_per_s) == (3, 9, 0.0)
        assert node.memory_bytes < 2**63  # JSON can hold it exactly

    swarm.run(scenario())


@pytest.mark.parametrize("has_left", [False, True])
def test_a_node_that_is_started_again_goes_on_after_what_it_said_before(swarm: Swarm, has_left: bool) -> None:
    """A restarted node starts with short periods. But its announcements must not expire before those that holders have,
    since holders would keep the old ones.
    """

    async def scenario() -> None:
        host, earlier = swarm.hosts[1], swarm.registry(1)
        await earlier.publish_node(node_record(host, renew_every_s=150.0), 450.0)
        await swarm.experts(1).announce([ReplicaAnnouncement(FIRST, SERVING)], 450.0)
        if has_left:
            await earlier.leave(450.0)
        again = swarm.experts(1, time.time)
        await again.registry.publish_node(node_record(host, expert_count=4), LIFETIME_S)
        await again.announce([ReplicaAnnouncement(SECOND, SERVING)], LIFETIME_S)
        reader = swarm.registry(2)
        assert (await reader.nodes([host.peer_id]))[host.peer_id].expert_count == 4
        found = await swarm.experts(2).replicas([FIRST, SECOND])
        assert [len(found[uid]) for uid in (FIRST, SECOND)] == [0, 1]

    swarm.run(scenario())


def test_a_node_that_first_reaches_nobody_reads_later_what_it_said_before(swarm: Swarm) -> None:
    async def scenario() -> None:
        host = swarm.hosts[1]
        await swarm.registry(1).publish_node(node_record(host, renew_every_s=150.0), 450.0)
        again = swarm.registry(1, time.time)
        patient_s, again._deadline_s = again._deadline_s, 0.0
        with pytest.raises(UnreachableError):
            await again.publish_node(node_record(host, expert_count=4), LIFETIME_S)
        again._deadline_s = patient_s
        await again.publish_node(node_record(host, expert_count=4), LIFETIME_S)
        assert (await swarm.registry(2).nodes([host.peer_id]))[host.peer_id].expert_count == 4

    swarm.run(scenario())


def test_a_node_whose_earlier_record_was_not_found_at_first_reads_it_again(
    swarm: Swarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When it has just joined, perhaps only this peer itself answers in time."""
    infos, missed = Registry._infos, [1]

    async def missing_once(registry: Registry, kind: object, peers: object, *more: Any, **names: Any) -> Any:
        return {} if missed and missed.pop() else await infos(registry, kind, peers, *more, **names)  # type: ignore[arg-type]  # as they come

    async def scenario() -> None:
        host = swarm.hosts[1]
        await swarm.registry(1).publish_node(node_record(host, renew_every_s=150.0), 450.0)
        again = swarm.registry(1, time.time)
        monkeypatch.setattr(Registry, "_infos", missing_once)
        with pytest.raises(UnreachableError):
            await again.publish_node(node_record(host, expert_count=4), LIFETIME_S)
        await again.publish_node(node_record(host, expert_count=4), LIFETIME_S)
        assert (await swarm.registry(2).nodes([host.peer_id]))[host.peer_id].expert_count == 4

    swarm.run(scenario())


def test_records_that_the_holders_already_have_count_as_stored(
    swarm: Swarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when an answer was lost, and the call was repeated. A node that read a refusal there would not start."""
    store = KademliaNode.store

    async def repeated(node: KademliaNode, peer_id: PeerID, rows: Sequence[Row]) -> Sequence[bool] | None:
        await store(node, peer_id, rows)
        return await store(node, peer_id, rows)

    async def not_here(dht: KademliaNode, by_key: object) -> set[object]:
        return set()

    async def scenario() -> None:
        monkeypatch.setattr(KademliaNode, "store", repeated)
        monkeypatch.setattr(
            "peer.kademlia.lookups._store_here", not_here
        )  # others are nearer, in larger swarms
        host = swarm.hosts[1]
        await swarm.registry(1).publish_node(node_record(host, expert_count=4), LIFETIME_S)
        assert (await swarm.registry(2).nodes([host.peer_id]))[host.peer_id].expert_count == 4

    swarm.run(scenario())


@pytest.mark.parametrize("leaves", [False, True])
def test_a_node_can_be_started_again_soon_after_it_was_started_again(swarm: Swarm, leaves: bool) -> None:
    """Each run may end after it has announced experts and before it has renewed its record."""

    async def scenario() -> None:
        host, reader = swarm.hosts[1], swarm.registry(2)
        await swarm.registry(1).publish_node(node_record(host, renew_every_s=150.0), 450.0)
        for queued_rows in (3, 4, 5):
            again = swarm.experts(1, time.time)
            await again.registry.publish_node(node_record(host, expert_count=queued_rows), LIFETIME_S)
            for _ in range(4):
                await again.announce([ReplicaAnnouncement(FIRST, SERVING)], LIFETIME_S, queued_rows)
            assert (await reader.nodes([host.peer_id]))[host.peer_id].expert_count == queued_rows
            [replica] = (await swarm.experts(2).replicas([FIRST]))[FIRST]
            assert replica.queued_rows == queued_rows
            if leaves:
                await again.registry.leave(LIFETIME_S)

    swarm.run(scenario())


def test_a_trainer_that_is_started_again_is_heard_at_once(swarm: Swarm) -> None:
    async def scenario() -> None:
        peer_id = swarm.hosts[1].peer_id
        await swarm.registry(1).publish_trainer(records_pb2.TrainerRecord(step=9, renew_every_s=150.0), 450.0)
        again = swarm.registry(1, time.time)
        await again.publish_trainer(records_pb2.TrainerRecord(step=12), LIFETIME_S)
        assert (await swarm.registry(2).trainers([peer_id]))[peer_id].step == 12

    swarm.run(scenario())


def test_reading_many_node_records_leaves_turns_to_others(
    swarm: Swarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of nodes in a large swarm, of which each record's certificate is parsed and many signatures are checked again."""
    registry = swarm.experts(2).registry
    peers = [PeerID(bytes([18, 32, n, *bytes(31)])) for n in range(200)]

    async def get(keys: Sequence[str], *options: Any) -> Any:
        await asyncio.sleep(0)
        return {key: {peer.to_bytes(): (b"", 0.0)} for key, peer in zip(keys, peers, strict=True)}

    def read_slowly(*of: Any) -> None:
        ends = time.thread_time() + 0.0005
        while time.thread_time() < ends:
            pass

    monkeypatch.setattr(registry, "get", get)
    monkeypatch.setattr(registry, "_info", read_slowly)

    async def look() -> None:
        await registry.nodes(peers)
        await asyncio.sleep(0)

    async def scenario() -> None:
        assert await longest_slice(look) < 0.03, "0.1 s together"

    swarm.run(scenario())


def test_a_node_that_left_is_gone_at_once(swarm: Swarm) -> None:
    async def scenario() -> None:
        host = swarm.hosts[1]
        await swarm.registry(1).publish_node(node_record(host), LIFETIME_S)
        assert host.peer_id in await swarm.registry(0).nodes([host.peer_id])
        await swarm.registry(1).leave(LIFETIME_S)
        assert not await swarm.registry(0).nodes([host.peer_id])

    swarm.run(scenario())


def test_all_nodes_are_listed_through_their_shards(swarm: Swarm) -> None:
    async def scenario() -> None:
        for n, host in enumerate(swarm.hosts):
            await swarm.registry(n).publish_node(node_record(host), LIFETIME_S)
        assert await swarm.registry(0).node_ids() == {host.peer_id for host in swarm.hosts}

    swarm.run(scenario())


def test_an_expired_announcement_disappears(swarm: Swarm) -> None:
    async def scenario() -> None:
        await swarm.experts(1).announce(
            [ReplicaAnnouncement(FIRST, SERVING), ReplicaAnnouncement(SECOND, SERVING)], 1.0
        )
        await swarm.experts(2).announce([ReplicaAnnouncement(SECOND, SERVING)], LIFETIME_S)
        reader = swarm.experts(0)

        async def is_gone() -> bool:
            return not (await reader.replicas([FIRST]))[FIRST]

        await eventually(is_gone)
        assert {r.peer_id for r in (await reader.replicas([SECOND]))[SECOND]} == {swarm.hosts[2].peer_id}

    swarm.run(scenario())


def test_a_reader_leaves_out_what_has_expired_by_its_own_clock(swarm: Swarm) -> None:
    async def scenario() -> None:
        await swarm.experts(1).announce([ReplicaAnnouncement(FIRST, SERVING)], LIFETIME_S)
        await swarm.registry(1).publish_node(node_record(swarm.hosts[1]), LIFETIME_S)
        later = swarm.experts(0, now=lambda: time.time() + LIFETIME_S)
        assert await later.replicas([FIRST]) == {FIRST: ()}
        assert await later.registry.nodes([swarm.hosts[1].peer_id]) == {}

    swarm.run(scenario())


def test_nothing_to_say_and_nothing_to_ask_costs_no_call(swarm: Swarm) -> None:
    async def scenario() -> None:
        experts = swarm.experts(1)
        await experts.announce([], LIFETIME_S)
        await experts.withdraw([], LIFETIME_S)
        assert await experts.replicas([]) == {}
        assert await experts.registry.nodes([]) == {}
        assert await experts.prefixes([], 4) == {}

    swarm.run(scenario())


def test_a_dht_that_does_not_answer_is_unreachable_in_bounded_time(swarm: Swarm) -> None:
    async def scenario() -> None:
        host = swarm.hosts[1]
        hurried = ExpertRegistry(Registry(host.dht, swarm.keys, host.identity, deadline_s=0.0), MANIFEST)
        for call in (
            hurried.replicas([FIRST]),
            hurried.announce([ReplicaAnnouncement(FIRST, SERVING)], LIFETIME_S),
        ):
            with pytest.raises(UnreachableError, match="did not answer within 0 s"):
                await call

    swarm.run(scenario())


def test_what_is_asked_of_the_dht_is_counted(swarm: Swarm) -> None:
    metrics, host = new_registry(), swarm.hosts[1]

    def value(name: str, **labels: str) -> float | None:
        return metrics.get_sample_value(f"talkoot_dht_{name}", labels)

    async def scenario() -> None:
        experts = ExpertRegistry(Registry(host.dht, swarm.keys, host.identity, metrics=metrics), MANIFEST)
        await experts.announce([ReplicaAnnouncement(FIRST, SERVING)], LIFETIME_S)
        await experts.replicas([FIRST, SECOND])
        await experts.replicas([])  # asks for nothing
        assert value("records_stored_total") == 1
        assert value("keys_read_total") == value("hops_count") == value("hops_bucket", le="12.0") == 2
        assert value("seconds_count", operation="get") == 2
        assert value("seconds_count", operation="store") == 1

    swarm.run(scenario())


def test_the_directory_of_another_peer_has_consistent_tables(swarm: Swarm) -> None:
    async def scenario() -> None:
        nodes = {1: [FIRST, SECOND], 2: [SECOND, THIRD]}
        for n, uids in nodes.items():
            await swarm.experts(n).announce([ReplicaAnnouncement(uid, SERVING) for uid in uids], LIFETIME_S)
            await swarm.registry(n).publish_node(node_record(swarm.hosts[n]), LIFETIME_S)
        # One is hosted by a peer without a node record, so nobody can call it. The other is only claimed.
        await swarm.experts(0).announce([ReplicaAnnouncement(UID(1, (2, 2)), SERVING)], LIFETIME_S)
        await swarm.experts(1).announce([ReplicaAnnouncement(UID(1, (0, 3)), CLAIMED)], LIFETIME_S)

        directory = Directory(swarm.experts(0), MANIFEST, refresh_every_s=60)
        assert directory.view.live_experts() == 0
        before = time.time()
        view = await directory.refresh()
        assert view is directory.view
        assert before <= view.read_at <= time.time()
        assert set(view.nodes) == {swarm.hosts[n].peer_id for n in nodes}
        assert view.live_experts() == 3

        for layer, live in ((0, {FIRST, SECOND}), (1, {THIRD})):
            rows_I, cells_IJ = view.tables(layer)
            assert {UID(layer, (int(i), int(j))) for i, j in np.argwhere(cells_IJ)} == live
            assert np.array_equal(rows_I, cells_IJ.any(axis=1))

        only_second = frozenset({swarm.hosts[2].peer_id})
        assert view.live_experts(only_second) == 2
        assert np.argwhere(view.tables(1, only_second)[1]).tolist() == []
        assert {replica.peer_id for replica in view.hosts(SECOND)} == {swarm.hosts[n].peer_id for n in nodes}

        await swarm.experts(2).withdraw([THIRD], LIFETIME_S)
        assert (await directory.refresh()).live_experts() == 2
        assert view.live_experts() == 3, "an old view does not change"

    swarm.run(scenario())


def test_that_the_founder_has_written_no_record_is_nobodys_fault(
    swarm: Swarm, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)

    async def scenario() -> None:
        reader = swarm.registry(2)
        assert await reader.find_founder_record(reader.keys.revocations) is None
        assert reader.stored_founder_record(reader.keys.revocations) is None

    swarm.run(scenario())
    assert "left out" not in caplog.text


def test_a_manifest_is_found_and_outlives_a_republication(swarm: Swarm) -> None:
    async def scenario() -> None:
        until = time.time() + 3600
        author = swarm.registry(0)
        record = author.sign_manifest(MANIFEST.to_json(), until)
        await swarm.registry(1).republish(record)
        found = await swarm.registry(2).find_founder_record(swarm.keys.manifest)
        assert found == record
        assert Manifest.from_json(found.payload.manifest_json) == MANIFEST

    swarm.run(scenario())


def test_two_authors_of_one_name_do_not_see_each_other(swarm: Swarm) -> None:
    async def scenario() -> None:
        until = time.time() + 3600
        rival = Registry(
            swarm.hosts[1].dht,
            SwarmKeys(swarm.keys.name, swarm.hosts[1].peer_id),
            swarm.hosts[1].identity,
        )
        records = []
        for author, text in ((swarm.registry(0), b"first"), (rival, b"second")):
            records.append(author.sign_manifest(text, until))
            await author.republish(records[-1])
        reader = swarm.registry(2)
        assert await reader.find_founder_record(reader.keys.manifest) == records[0]
        assert await rival.find_founder_record(rival.keys.manifest) == records[1]
        assert reader.read_founder_record(reader.keys.manifest, records[1].data) is None

    swarm.run(scenario())


def test_what_is_stored_can_be_unsealed_by_anyone(swarm: Swarm) -> None:
    async def scenario() -> None:
        await swarm.experts(1).announce([ReplicaAnnouncement(FIRST, SERVING, 9)], LIFETIME_S)
        key, peer_id = swarm.keys.prefix(FIRST.layer), swarm.hosts[1].peer_id
        found = await read_raw(swarm.hosts[2], key)
        payload = open_record(unpack(found[peer_id.to_bytes()].value), key, peer_id, time.time())
        assert [replica.update_count for replica in payload.hosting.replicas] == [9]

    swarm.run(scenario())
