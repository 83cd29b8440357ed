"""Nodes of a real swarm, with p2pd, DHT, gRPC and torch: several nodes on one loop."""

import asyncio
import logging
import socket
import urllib.request
from collections import Counter
from collections.abc import Callable, Collection, Coroutine, Sequence
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from callers import numbered_identities
from real_swarm import (
    DEADLINE_S,
    LOCAL,
    MANIFEST,
    ONCE_EACH,
    UIDS,
    Play,
    Village,
    end,
    eventually,
    hosts_of,
    node_settings,
    playing,
    serving,
)

from dht.announcements import Replica
from dht.directory import Directory
from dht.experts import ExpertRegistry
from dht.registry import Registry
from dht.swarm import Swarm, found_swarm, join_swarm
from dht.uid import UID
from expert_server.node import Node, NodeTiming
from expert_server.status import NodeState
from peer import PROTOCOL_VERSION
from peer.errors import DaemonError, UnreachableError
from peer.host import NetworkConfig
from peer.identity import Identity
from peer.loop import LoopThread
from peer.metrics import total
from peer.rpc.channels import ChannelPool
from peer.wire import expert_pb2, expert_pb2_grpc


@pytest.fixture(scope="module")
def identities() -> list[Identity]:
    return numbered_identities(4)


@pytest.fixture
def play(loop: LoopThread, identities: list[Identity], tmp_path: Path) -> Play:
    return playing(loop, identities, tmp_path)


Look = Callable[[Collection[UID]], Coroutine[Any, Any, dict[UID, tuple[Replica, ...]]]]


def test_a_founder_hosts_as_many_experts_as_it_is_told(play: Play) -> None:
    async def scenario(village: Village) -> None:
        node = await village.found(experts=3)
        assert len(node.runtime.experts) == 3
        observer = await village.observe(1, await node.swarm.invite())
        assert await serving(observer) == Counter(list(node.runtime.experts))
        replicas = await observer.experts.replicas(list(node.runtime.experts))
        assert {r.peer_id for hosts in replicas.values() for r in hosts} == {node.swarm.host.peer_id}
        status = node.status()
        assert (status.state, status.experts, status.capacity) == (NodeState.SERVING, 3, 5)
        assert (status.adopted, status.updates, status.rows, status.queued_rows) == (0, 0, 0, 0)

    play(scenario)


def test_a_node_hosts_no_more_than_there_are(play: Play) -> None:
    async def scenario(village: Village) -> None:
        node = await village.found(experts=100)
        assert set(node.runtime.experts) == set(UIDS)
        late = await village.join(1, await node.swarm.invite(), experts=2)
        assert len(late.runtime.experts) == 0
        assert late.status().state is NodeState.SERVING

    play(scenario)


def test_without_a_number_a_node_hosts_what_fits_its_memory(play: Play) -> None:
    async def scenario(village: Village) -> None:
        node = await village.found()
        assert set(node.runtime.experts) == set(UIDS)

    play(scenario)


def test_a_joiner_takes_what_is_vacant(play: Play) -> None:
    async def scenario(village: Village) -> None:
        first = await village.found(experts=5)
        second = await village.join(1, await first.swarm.invite(), experts=8)
        assert set(second.runtime.experts) == set(UIDS) - set(first.runtime.experts)
        assert await serving(first.swarm) == await serving(second.swarm) == ONCE_EACH

    play(scenario)


def look_together(swarms: Sequence[Swarm], monkeypatch: pytest.MonkeyPatch) -> None:
    """No node claims an expert before all have looked for vacant ones, and none looks again before all have claimed."""
    barrier = asyncio.Barrier(len(swarms))
    for swarm in swarms:
        monkeypatch.setattr(swarm.experts, "replicas", waiting_twice(swarm.experts.replicas, barrier))


def waiting_twice(look: Look, barrier: asyncio.Barrier) -> Look:
    looks = 0

    async def look_and_wait(uids: Collection[UID], **how: Any) -> dict[UID, tuple[Replica, ...]]:
        nonlocal looks
        looks += 1
        if looks == 2:
            await barrier.wait()
        found = await look(uids, **how)
        if looks == 1:
            await barrier.wait()
        return found

    return look_and_wait


@pytest.mark.parametrize("each", [3, 6])
def test_two_joiners_at_once_never_host_the_same_expert(
    play: Play, monkeypatch: pytest.MonkeyPatch, each: int
) -> None:
    """With 3 each, there are just enough vacant experts; with 6 each, both want all of them."""

    async def scenario(village: Village) -> None:
        first = await village.found(experts=2)
        invite = await first.swarm.invite()
        swarms = [await join_swarm(village.identities[n], invite, NetworkConfig(LOCAL)) for n in (1, 2)]
        look_together(swarms, monkeypatch)
        others = await asyncio.gather(
            *(village.start(swarm, {"experts": each}, NodeTiming()) for swarm in swarms)
        )
        hosted = Counter(uid for node in (first, *others) for uid in node.runtime.experts)
        assert hosted == ONCE_EACH
        assert await serving(first.swarm) == ONCE_EACH
        assert all(len(node.runtime.experts) <= each for node in others)

    play(scenario)


def test_a_founder_waits_for_no_claims_of_others(play: Play) -> None:
    async def scenario(village: Village) -> None:
        async with asyncio.timeout(DEADLINE_S):
            node = await village.found(experts=8, timing=NodeTiming(claim_wait_s=2 * DEADLINE_S))
        assert await serving(node.swarm) == ONCE_EACH

    play(scenario)


@pytest.mark.parametrize(
    ("settings", "is_said"), [({}, True), ({"memory_disk": 10**6}, False), ({"spare": 1}, False)]
)
def test_a_node_that_hosts_nothing_says_what_it_does(
    play: Play, caplog: pytest.LogCaptureFixture, settings: dict[str, Any], is_said: bool
) -> None:
    caplog.set_level(logging.INFO)

    async def scenario(village: Village) -> None:
        await village.found(experts=0, **settings)
        assert ("hosts no experts and no passages" in caplog.text) is is_said

    play(scenario)


def test_claims_of_others_are_waited_for_once_a_peer_is_known(play: Play) -> None:
    async def scenario(village: Village) -> None:
        node = await village.found(experts=8, timing=NodeTiming(claim_wait_s=30))
        assert node.replicas.claim_wait_s == 0
        await village.join(1, await node.swarm.invite(), experts=0)
        await eventually(lambda: knows_others(node))
        assert node.replicas.claim_wait_s == 30

    play(scenario)


async def knows_others(node: Node) -> bool:
    return bool(node.swarm.host.peers())


def test_a_node_that_stops_politely_is_listed_no_more(play: Play) -> None:
    async def scenario(village: Village) -> None:
        first = await village.found(experts=4, spare=0)
        second = await village.join(1, await first.swarm.invite(), experts=4, drain_timeout_s=600)
        observer = await village.observe(2, await first.swarm.invite())
        assert await serving(observer) == ONCE_EACH
        await second.stop()
        assert await serving(observer) == Counter(list(first.runtime.experts))
        assert await hosts_of(observer) == {first.swarm.host.peer_id}

    play(scenario)


def test_the_founder_may_leave_and_others_still_join(play: Play) -> None:
    async def scenario(village: Village) -> None:
        first = await village.found(experts=4)
        second = await village.join(1, await first.swarm.invite(), experts=2)
        await first.stop()
        third = await village.join(2, await second.swarm.invite(), experts=8)
        assert third.swarm.manifest == MANIFEST
        assert set(third.runtime.experts) >= set(UIDS) - set(second.runtime.experts)

    play(scenario)


def test_orphans_of_a_vanished_founder_are_adopted_by_the_others(play: Play) -> None:
    async def scenario(village: Village) -> None:
        founder = await village.found(experts=8, announce_every_s=0.5)
        running = await village.run(founder)
        invite = await founder.swarm.invite()
        heirs = [await village.join(n, invite, experts=0, spare=6, announce_every_s=0.5) for n in (1, 2)]
        observer = await village.observe(3, invite)
        assert all(len(heir.runtime.experts) == 0 for heir in heirs)
        for heir in heirs:
            await village.run(heir)

        await end(running)
        await founder.swarm.host.stop()  # no farewell

        async def adopted() -> bool:
            hosted = {uid for heir in heirs for uid in heir.runtime.experts}
            hosts = {heir.swarm.host.peer_id for heir in heirs}
            if not hosted == set(UIDS) == set(await serving(observer)) or await hosts_of(observer) != hosts:
                return False
            # The experts are counted after they are announced.
            return sum(heir.status().adopted for heir in heirs) >= len(UIDS)

        # Announcements live for 1.5 s, and an expert must be vacant in two looks in a row.
        await eventually(adopted)
        assert all(heir.status().experts <= heir.status().capacity == 6 for heir in heirs)

    play(scenario)


def test_a_node_without_spare_room_adopts_nothing(play: Play, long_lives: None) -> None:
    async def scenario(village: Village) -> None:
        node = await village.found(experts=2, spare=0, announce_every_s=0.5)
        own = set(node.runtime.experts)
        await village.run(node)
        observer = await village.observe(1, await node.swarm.invite())
        renewed: set[float] = set()

        async def announced_often() -> bool:
            for hosts in (await observer.experts.replicas(sorted(own))).values():
                renewed.update(replica.expires_at for replica in hosts)
            return len(renewed) >= 5

        await eventually(announced_often)
        assert set(node.runtime.experts) == own

        async def serves_its_own() -> bool:
            return await serving(observer) == Counter(list(own))

        await eventually(serves_its_own)  # a busy machine may be late with an announcement

    play(scenario)


def test_a_trainer_finds_and_calls_a_node_by_what_the_dht_says(play: Play) -> None:
    async def scenario(village: Village) -> None:
        node = await village.found(experts=3)
        observer = await village.observe(1, await node.swarm.invite())
        view = await Directory(observer.experts, observer.manifest, refresh_every_s=60).refresh()
        assert view.live_experts() == 3
        (info,) = view.nodes.values()
        assert info.addresses == (node.address,)
        assert (info.expert_count, info.expert_capacity, info.protocol_version) == (3, 5, PROTOCOL_VERSION)
        assert [a.endpoint for a in node.swarm.host.bootstrap_addresses()] == list(info.addresses)
        pool = ChannelPool()
        try:
            channel = await pool.get(info.addresses[0], info.certificate_pem)
            assert await pool.get(info.addresses[0], info.certificate_pem) is channel
            stub: Any = expert_pb2_grpc.ExpertServiceStub(channel)
            request = expert_pb2.InfoRequest(
                protocol_version=PROTOCOL_VERSION, swarm_id=observer.keys.swarm_id
            )
            reply = await stub.Info(request, timeout=60)
            assert {UID.parse(expert.uid) for expert in reply.experts} == set(node.runtime.experts)
            await node.stop()
            with pytest.raises(grpc.aio.AioRpcError):
                await stub.Info(request, timeout=2)
        finally:
            await pool.close()

    play(scenario)


def test_a_node_serves_on_an_ipv6_address(play: Play) -> None:
    if not socket.has_ipv6 or not any(a.address == "::1" for a in psutil.net_if_addrs().get("lo", [])):
        pytest.skip("this machine has no IPv6")

    async def scenario(village: Village) -> None:
        swarm = await found_swarm(village.identities[0], MANIFEST, NetworkConfig("::1"))
        node = await Node.start(node_settings(experts=1), swarm, host="::1", state=village.state(swarm))
        village.stack.push_async_callback(node.stop)
        assert node.address.startswith("[::1]:")
        observer = await join_swarm(
            village.identities[1], await swarm.invite(), NetworkConfig("::1", serves_dht=False)
        )
        village.stack.push_async_callback(observer.stop)
        (info,) = (await observer.registry.nodes([swarm.host.peer_id])).values()
        pool = ChannelPool()
        village.stack.push_async_callback(pool.close)
        stub: Any = expert_pb2_grpc.ExpertServiceStub(await pool.get(info.addresses[0], info.certificate_pem))
        request = expert_pb2.InfoRequest(protocol_version=PROTOCOL_VERSION, swarm_id=observer.keys.swarm_id)
        assert len((await stub.Info(request, timeout=60)).experts) == 1

    play(scenario)


def test_a_node_stores_its_record_before_it_announces_experts(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the node is killed in between, its next run reads from the record how long the announcements live."""
    known: list[bool] = []
    announce = ExpertRegistry.announce

    async def announcing(experts: ExpertRegistry, *args: Any) -> None:
        registry = experts.registry
        known.append(registry.peer_id in await registry.nodes([registry.peer_id]))
        await announce(experts, *args)

    async def scenario(village: Village) -> None:
        monkeypatch.setattr(ExpertRegistry, "announce", announcing)
        await village.found(experts=2)
        assert known
        assert known[0]

    play(scenario)


def fetch(address: str) -> tuple[str, str]:
    with urllib.request.urlopen(address, timeout=60) as response:
        return response.headers["Content-Type"], response.read().decode()


def test_a_node_starts_even_if_nobody_takes_its_record_at_first(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("expert_server.node._FIRST_RECORD_PAUSES_S", (0.01, 0.01))
    publish, refusals = Registry.publish_node, [1, 2]

    async def refused_twice(registry: Registry, *record: Any, **options: Any) -> None:
        if refusals:
            refusals.pop()
            raise UnreachableError("no DHT peer accepted our records")
        await publish(registry, *record, **options)

    async def scenario(village: Village) -> None:
        founder = await village.found()
        monkeypatch.setattr(Registry, "publish_node", refused_twice)
        node = await village.join(1, await founder.swarm.invite())
        me = node.swarm.host.peer_id
        assert me in await founder.swarm.registry.nodes([me])

    play(scenario)


def test_a_mistake_in_one_task_does_not_end_the_node(
    play: Play, monkeypatch: pytest.MonkeyPatch, long_lives: None
) -> None:
    async def scenario(village: Village) -> None:
        node = await village.found(experts=2, spare=0, announce_every_s=0.5)

        async def breaks() -> None:
            raise KeyError("a mistake")

        monkeypatch.setattr(node._standby, "run", breaks)
        running = await village.run(node)

        async def went_on() -> bool:
            return total(node.restarts.count) >= 2 and node.state is NodeState.SERVING

        await eventually(went_on)
        assert not running.done()

    play(scenario)


def test_metrics_are_served_on_loopback_as_prometheus_text(play: Play) -> None:
    async def scenario(village: Village) -> None:
        node = await village.found(experts=3)
        assert node.metrics_address.startswith("http://127.0.0.1:")
        kind, text = await asyncio.to_thread(fetch, node.metrics_address)
        assert kind.startswith("text/plain")
        values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        assert float(values["talkoot_experts"]) == 3
        for name in (
            "rows",
            "batches",
            "updates",
            "skipped_updates",
            "rollbacks",
            "experts_adopted",
            "experts_restored",
            "checkpoints_saved",
            "checkpoint_failures",
            "dht_failures",
            "experts_handed_over",
            "averagings",
            "p2pd_restarts",
        ):
            assert float(values[f"talkoot_{name}_total"]) == 0
            assert f"# TYPE talkoot_{name}_total counter" in text
        assert float(values['talkoot_failed_work_items_total{cause="expired"}']) == 0
        for outcome in ("fetched", "failed", "broken"):
            assert float(values[f'talkoot_state_fetches_total{{outcome="{outcome}"}}']) == 0
        for direction in ("sent", "received"):
            assert float(values[f'talkoot_state_bytes_total{{direction="{direction}"}}']) == 0
        assert float(values["process_open_fds"]) > 0
        assert float(values["talkoot_tasks"]) > 0
        await node.stop()
        with pytest.raises(OSError, match="refused"):
            await asyncio.to_thread(fetch, node.metrics_address)

    play(scenario)


def test_a_node_comes_back_with_its_identity(play: Play) -> None:
    async def scenario(village: Village) -> None:
        first = await village.found(experts=4)
        invite = await first.swarm.invite()
        second = await village.join(1, invite, experts=4)
        peer_id, hosted = second.swarm.host.peer_id, set(second.runtime.experts)
        await second.stop()
        again = await village.join(1, invite, experts=4)
        assert again.swarm.host.peer_id == peer_id
        assert set(again.runtime.experts) == hosted
        assert await serving(first.swarm) == ONCE_EACH

    play(scenario)


def test_a_node_whose_p2pd_can_not_be_started_says_so_and_serves(
    play: Play, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, long_lives: None
) -> None:
    async def fails(*arguments: Any) -> None:
        raise DaemonError("no p2pd for this test")

    async def scenario(village: Village) -> None:
        swarm = await found_swarm(village.identities[0], MANIFEST, NetworkConfig(LOCAL, p2pd=True))
        node = await village.start(swarm, {"experts": 2, "announce_every_s": 0.5})
        task = await village.run(node)

        async def said() -> bool:
            return "reached by relays only: no p2pd for this test" in caplog.text

        await eventually(said)
        assert not task.done()
        assert node.status().state is NodeState.SERVING

    monkeypatch.setattr("peer.transport.p2pd.start_daemon", fails)
    play(scenario)
