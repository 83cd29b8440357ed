"""A paused node gives up its experts and stays in the swarm; later it continues where it was."""

import asyncio
import gc
import time
import weakref
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from callers import InSession, numbered_identities, opened
from grpc import StatusCode
from real_swarm import DEADLINE_S, LOCAL, MANIFEST, Play, Village, eventually, hosts_of, playing, serving

from dht.announcements import NodeInfo
from dht.swarm import Swarm, found_swarm, join_swarm
from dht.uid import UID
from expert_server.experts.expert import Expert
from expert_server.experts.graphs import Rows
from expert_server.node import Node, NodeTiming
from expert_server.pauses import Machine, MachineState, PauseController
from expert_server.settings import NodeSettings
from expert_server.status import NodeState
from peer import PROTOCOL_VERSION
from peer.errors import UnreachableError
from peer.host import NetworkConfig
from peer.identity import Identity, PeerID
from peer.loop import LoopThread
from peer.rpc.channels import ChannelPool
from peer.wire import expert_pb2, expert_pb2_grpc


@pytest.fixture(scope="module")
def identities() -> list[Identity]:
    return numbered_identities(2)


@pytest.fixture
def play(loop: LoopThread, identities: list[Identity], tmp_path: Path) -> Play:
    return playing(loop, identities, tmp_path)


LOOKS_OFTEN = NodeTiming(claim_wait_s=0.1, look_every_s=0.05)


def step(expert: Expert) -> None:
    inputs, gradients = torch.randn(2, 5, 8).unbind()
    expert.backward([Rows(inputs, torch.tensor([5]), torch.arange(5), gradients)])


async def train(node: Node, count: int) -> None:
    for expert in node.runtime.experts.values():
        for _ in range(count):
            await node.runtime.run(lambda expert=expert: step(expert))  # type: ignore[misc]  # a default binds now


def updates(node: Node) -> dict[UID, int]:
    return {uid: expert.update_count for uid, expert in node.runtime.experts.items()}


async def looks(node: Node, count: int) -> None:
    """Waits until the node has checked this many times whether it must pause."""
    seen, look = 0, node._pauses.look

    async def counted() -> None:
        nonlocal seen
        await look()
        seen += 1

    async def is_enough() -> bool:
        return seen >= count

    node._pauses.look = counted  # type: ignore[method-assign]
    try:
        await eventually(is_enough)
    finally:
        node._pauses.look = look  # type: ignore[method-assign]


def elsewhen() -> str:
    """A range of hours that does not include the present one."""
    start = datetime.now() + timedelta(hours=10)
    return f"{start:%H}:00-{start + timedelta(hours=4):%H}:00"


async def record_of(node: Node, observer: Swarm) -> NodeInfo:
    """The node's record as the observer sees it. On a busy machine a short-lived announcement may expire before the
    next one.
    """
    found: dict[PeerID, NodeInfo] = {}

    async def is_there() -> bool:
        found.update(await observer.registry.nodes([node.swarm.host.peer_id]))
        return bool(found)

    await eventually(is_there)
    return found[node.swarm.host.peer_id]


async def call(swarm: Swarm, node: Node, uid: UID, pool: ChannelPool, *, keep: bool = False) -> Any:
    """A forward call as a trainer makes it. Returns the only reply."""
    info = await record_of(node, swarm)
    channel = await pool.get(info.addresses[0], info.certificate_pem)
    session = opened(node.sessions, node.swarm.host.identity, swarm.keys.swarm_id)
    stub = InSession(expert_pb2_grpc.ExpertServiceStub(channel), session)
    header = expert_pb2.CallHeader(
        protocol_version=PROTOCOL_VERSION,
        swarm_id=swarm.keys.swarm_id,
        request_id=time.monotonic_ns().to_bytes(16, "big"),
        width=8,
        codec=expert_pb2.CODEC_FP32,
        segment_lengths=[5],
        positions=range(5),
        experts=[expert_pb2.ExpertRows(uid=str(uid))],
        keep=keep,
    )
    payload = torch.randn(5, 8).numpy().tobytes()
    requests = [expert_pb2.CallRequest(header=header), expert_pb2.CallRequest(chunk=payload)]
    (reply,) = [reply async for reply in stub.Forward(iter(requests), timeout=60)]
    return reply


def test_a_paused_node_gives_up_its_experts_and_goes_on_with_the_same(play: Play) -> None:
    async def scenario(village: Village) -> None:
        node = await village.found(experts=4, spare=0, announce_every_s=1)
        observer = await village.observe(1, await node.swarm.invite())
        await village.run(node)
        await train(node, 3)
        before = updates(node)
        experts = [weakref.ref(expert) for expert in node.runtime.experts.values()]

        await node.pause("by its owner")
        status = node.status()
        assert (status.state, status.pause_reason, status.experts) == (
            NodeState.PAUSED,
            "paused: by its owner",
            0,
        )
        assert status.memory_bytes == 0
        assert node.swarm.metrics.get_sample_value("talkoot_paused") == 1

        async def serves_nothing() -> bool:
            return not await serving(observer)

        await eventually(serves_nothing)
        gc.collect()
        assert not any(expert() for expert in experts), "still in memory"
        info = await record_of(node, observer)
        assert (info.expert_count, info.expert_capacity) == (0, 0)  # a peer as before

        async def two_rounds_later() -> bool:
            return (await record_of(node, observer)).expires_at > info.expires_at + 1.0

        await eventually(two_rounds_later)  # in which others' experts might be adopted
        assert not node.runtime.experts
        await node.resume()
        assert updates(node) == before

        async def serves() -> bool:
            status = node.status()
            is_seen = set(await serving(observer)) == set(before)
            return (status.state, status.pause_reason) == (NodeState.SERVING, "") and is_seen

        await eventually(serves)
        assert node.swarm.metrics.get_sample_value("talkoot_paused") == 0

    play(scenario)


def test_calls_to_a_paused_node_are_refused_and_kept_passes_forgotten(play: Play) -> None:
    async def scenario(village: Village) -> None:
        node = await village.found(experts=2)
        observer = await village.observe(1, await node.swarm.invite())
        pool = ChannelPool()
        village.stack.push_async_callback(pool.close)
        uid = next(iter(node.runtime.experts))
        reply = await call(observer, node, uid, pool, keep=True)
        assert (reply.experts[0].status, reply.kept) == (0, True)
        used = node.status().memory_bytes
        await node.pause()
        assert node.status().memory_bytes == 0 < used
        (refused,) = (await call(observer, node, uid, pool, keep=True)).experts
        assert refused.status == StatusCode.NOT_FOUND.value[0]
        assert refused.message == f"expert {uid} is not hosted here"
        await node.resume()
        assert (await call(observer, node, uid, pool)).experts[0].status == 0
        assert node.status().calls == 3

    play(scenario)


def test_a_node_pauses_on_battery_and_goes_on_when_plugged_in(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    battery = SimpleNamespace(power_plugged=True)
    monkeypatch.setattr(psutil, "sensors_battery", lambda: battery)

    async def scenario(village: Village) -> None:
        node = await village.found(experts=2, not_on_battery=True, timing=LOOKS_OFTEN)
        await village.run(node)
        await train(node, 1)
        before = updates(node)

        async def paused() -> bool:
            return node.status().pause_reason == "paused: on battery" and not node.runtime.experts

        async def serves() -> bool:
            return node.status().state is NodeState.SERVING and updates(node) == before

        battery.power_plugged = False
        await eventually(paused)
        battery.power_plugged = True
        await eventually(serves)
        battery.power_plugged = False
        await eventually(paused)
        await node.pause("by its owner", for_s=600)
        assert node.status().pause_reason.startswith("paused: by its owner until ")
        await node.pause("by its owner", for_s=0.5)
        battery.power_plugged = True
        await eventually(serves)

    play(scenario)


@pytest.mark.parametrize("starts", [True, False])
def test_a_node_pauses_on_battery_though_it_is_still_taking_experts(
    play: Play, monkeypatch: pytest.MonkeyPatch, starts: bool
) -> None:
    """Taking them may last long on a slow line."""
    battery = SimpleNamespace(power_plugged=starts)
    monkeypatch.setattr(psutil, "sensors_battery", lambda: battery)

    async def scenario(village: Village) -> None:
        founder = await found_swarm(village.identities[0], MANIFEST, NetworkConfig(LOCAL))
        village.stack.push_async_callback(founder.stop)
        swarm = await join_swarm(village.identities[1], await founder.invite(), NetworkConfig(LOCAL))
        timing = NodeTiming(claim_wait_s=600, look_every_s=0.05)
        starting = asyncio.create_task(village.start(swarm, {"experts": 4, "not_on_battery": True}, timing))
        if not starts:
            await village.run(await starting)
            battery.power_plugged = True

        async def claims() -> bool:
            return bool(await hosts_of(swarm))

        await eventually(claims)
        battery.power_plugged = False
        node = await asyncio.wait_for(starting, DEADLINE_S)

        async def paused() -> bool:
            return node.status().state is NodeState.PAUSED and not await hosts_of(swarm)

        await eventually(paused)

    play(scenario)


def test_a_look_at_the_machine_that_fails_does_not_end_the_taking_of_experts(
    loop: LoopThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = list[Machine]()

    def look(machine: Machine) -> MachineState:
        looks.append(machine)
        if len(looks) == 2:
            raise psutil.AccessDenied
        return MachineState()

    async def take() -> None:
        while len(looks) < 3:  # noqa: ASYNC110  # a thread adds to it
            await asyncio.sleep(0.01)

    async def release() -> None:
        raise AssertionError("there is no reason to pause")

    monkeypatch.setattr(Machine, "look", look)
    pauses = PauseController(NodeSettings(not_on_battery=True), take, release, look_every_s=0.01)
    loop.run(pauses.look(), DEADLINE_S)
    assert pauses.hosts


def test_outside_its_hours_a_node_starts_paused_and_its_owner_wins(play: Play) -> None:
    async def scenario(village: Village) -> None:
        hours = elsewhen()
        node = await village.found(experts=2, schedule=hours, timing=LOOKS_OFTEN)
        await village.run(node)
        begins = hours.split("-")[0]
        status = node.status()
        assert (status.state, status.experts) == (NodeState.PAUSED, 0)
        assert status.pause_reason == f"paused until {begins}"
        await node.resume()
        await looks(node, 3)
        status = node.status()
        assert (status.state, status.experts) == (NodeState.SERVING, 2)
        assert status.pause_reason == f"resumed by hand, else paused until {begins}"
        await node.pause()
        assert node.status().pause_reason == f"paused: by its owner; until {begins}"

    play(scenario)


def test_a_pause_breaks_off_the_taking_of_experts(play: Play) -> None:
    async def scenario(village: Village) -> None:
        founder = await found_swarm(village.identities[0], MANIFEST, NetworkConfig(LOCAL))
        village.stack.push_async_callback(founder.stop)
        swarm = await join_swarm(village.identities[1], await founder.invite(), NetworkConfig(LOCAL))
        node = await village.start(
            swarm, {"experts": 4, "schedule": elsewhen()}, NodeTiming(claim_wait_s=600)
        )
        resuming = asyncio.create_task(node.resume())

        async def claimed() -> bool:
            return bool(await hosts_of(swarm))

        await eventually(claimed)
        assert node.status().state is NodeState.JOINING
        await node.pause()
        await resuming
        assert node.status().state is NodeState.PAUSED
        assert not await hosts_of(swarm)

    play(scenario)


def test_of_many_words_at_once_the_last_counts(play: Play) -> None:
    async def scenario(village: Village) -> None:
        node = await village.found(experts=3, announce_every_s=0.5, timing=LOOKS_OFTEN)
        await village.run(node)
        await train(node, 2)
        before = updates(node)
        for last in (node.pause, node.resume):
            words = [node.pause, node.pause, node.resume, node.resume, node.pause, node.resume, last, last]
            await asyncio.gather(*(word() for word in words))
            paused = last == node.pause
            assert node.status().state is (NodeState.PAUSED if paused else NodeState.SERVING)
            assert updates(node) == ({} if paused else before)

            async def is_announced() -> bool:
                return set(await serving(node.swarm)) == set(updates(node))

            await eventually(is_announced)

    play(scenario)


@pytest.mark.parametrize("first", ["pause", "resume", "stop"])
def test_a_node_may_be_stopped_while_it_pauses_or_goes_on(play: Play, first: str) -> None:
    async def scenario(village: Village) -> None:
        node = await village.found(experts=4)
        invite = await node.swarm.invite()
        observer = await village.observe(1, invite)
        await train(node, 2)
        before = updates(node)
        if first == "resume":
            await node.pause()
        others = [node.pause, node.resume, *([node.stop] if first != "stop" else []), node.pause]
        begun = asyncio.create_task(getattr(node, first)())
        await asyncio.sleep(0)
        await asyncio.gather(begun, *(other() for other in others))
        assert node.status().state is NodeState.STOPPING
        await node.pause()
        await node.resume()  # after the end, too, these are harmless
        with pytest.raises(UnreachableError):  # it was the DHT's only server, and is gone
            await hosts_of(observer)
        assert await node.replicas.checkpoints.newest() == before

    play(scenario)


def test_experts_are_saved_though_the_one_who_paused_is_cancelled(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(village: Village) -> None:
        node = await village.found(experts=3)
        await train(node, 2)
        before = updates(node)
        given_up, goes_on = asyncio.Event(), asyncio.Event()
        save_all_within = node.replicas.checkpoints.save_all_within

        async def save_late(*arguments: Any) -> None:
            given_up.set()
            await goes_on.wait()
            await save_all_within(*arguments)

        monkeypatch.setattr(node.replicas.checkpoints, "save_all_within", save_late)
        pausing = asyncio.create_task(node.pause())
        await given_up.wait()
        pausing.cancel()
        await asyncio.gather(pausing, return_exceptions=True)
        assert not node.runtime.experts
        stopping = asyncio.create_task(node.stop())
        await asyncio.sleep(0)
        goes_on.set()
        await stopping
        assert await node.replicas.checkpoints.newest() == before

    play(scenario)


def test_what_was_contributed_is_there_after_a_restart(play: Play) -> None:
    async def scenario(village: Village) -> None:
        node = await village.found(experts=2)
        observer = await village.observe(1, await node.swarm.invite())
        pool = ChannelPool()
        village.stack.push_async_callback(pool.close)
        await call(observer, node, next(iter(node.runtime.experts)), pool)
        assert node.status().contributed_rows == 5
        await node.stop()
        again = await village.found(experts=2)
        assert (again.status().rows, again.status().contributed_rows) == (0, 5)

    play(scenario)
