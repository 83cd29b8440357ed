"""p2pd is killed under a node, a lone founder and a trainer: it is started again, and all is announced anew."""

import asyncio
import contextlib
import gc
import logging
import os
import signal
import time
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
from callers import numbered_identities
from real_swarm import DEADLINE_S, LOCAL, ONCE_EACH, UIDS, Village, eventually, serving

from dht.invites import Invite
from dht.swarm import Swarm
from expert_server.node import Node
from expert_server.status import NodeState
from peer.errors import StartError
from peer.host import Host
from peer.identity import Identity
from peer.loop import LoopThread
from peer.transport.addresses import NetworkConfig
from peer.transport.p2pd import Daemon, start_daemon
from trainer_client.client import SwarmClient, TrainerTiming
from trainer_client.settings import TrainerSettings

pytestmark = pytest.mark.filterwarnings("ignore:path is deprecated:DeprecationWarning")  # hivemind's, on 3.11


PERIOD_S = 2.0
"""Between announcements. Shorter-lived ones expire on a busy machine, and others adopt what is well hosted."""


@pytest.fixture(scope="module")
def identities() -> list[Identity]:
    return numbered_identities(4)


@pytest.fixture
def complaints(loop: LoopThread) -> Iterator[list[dict[str, Any]]]:
    """What asyncio says of tasks and futures whose errors nobody looked at."""
    heard: list[dict[str, Any]] = []
    loop.loop.call_soon_threadsafe(
        loop.loop.set_exception_handler, lambda loop, context: heard.append(context)
    )
    yield heard
    loop.loop.call_soon_threadsafe(loop.loop.set_exception_handler, None)


async def kill_p2pd(swarm: Swarm) -> None:
    os.kill(swarm.host.p2p._child.pid, signal.SIGKILL)


def held_starts(monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """While it is not set, no p2pd starts: what holds without one can be looked at."""
    may_start = asyncio.Event()
    may_start.set()

    async def start_when_told(*arguments: Any) -> Daemon:
        await may_start.wait()
        return await start_daemon(*arguments)

    monkeypatch.setattr("peer.host.start_daemon", start_when_told)
    return may_start


async def renewed_since(observer: Swarm, node: Node, moment: float) -> bool:
    """Whether all that the node hosts was announced after this time."""
    lifetime_s = 3 * PERIOD_S
    found = await observer.registry.replicas(list(node.runtime.experts))
    me = node.swarm.host.peer_id
    return all(
        any(r.peer_id == me and r.expires_at > moment + lifetime_s for r in hosts) for hosts in found.values()
    )


def test_killed_p2pds_are_started_again_and_everything_is_found_again(
    loop: LoopThread,
    identities: list[Identity],
    tmp_path: Path,
    complaints: list[dict[str, Any]],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario(village: Village) -> None:
        may_start = held_starts(monkeypatch)
        first = await village.found(experts=4, spare=0, announce_every_s=PERIOD_S)
        invite = await first.swarm.invite()
        second = await village.join(1, invite, experts=4, spare=0, announce_every_s=PERIOD_S)
        observer = await village.observe(2, invite)
        tasks = [await village.run(node) for node in (first, second)]
        await eventually(lambda: sees_all(observer))
        await eventually(lambda: knows(first, second))
        held_before = held()

        for restarts, node in enumerate((second, first), start=1):
            await eventually(partial(is_state, node, NodeState.SERVING))  # it has missed the other
            may_start.clear()
            moment = time.time()
            address = await node.swarm.host.bootstrap_addresses()
            await kill_p2pd(node.swarm)
            await eventually(partial(is_state, node, NodeState.UNREACHABLE))
            assert node.status().peers == 0
            may_start.set()
            await eventually(partial(is_state, node, NodeState.SERVING))
            await eventually(partial(renewed_since, observer, node, moment))
            assert (
                node.swarm.metrics.get_sample_value("talkoot_p2pd_restarts_total")
                == node.swarm.host.restarts
                == 1
            )
            assert await node.swarm.host.bootstrap_addresses() == address, "old addresses stay good"
            assert caplog.text.count("the libp2p daemon ended with status -9; starting it again") == restarts

        await kill_p2pd(observer)
        await eventually(lambda: sees_all(observer))
        assert observer.host.restarts == 1

        late = await village.observe(3, invite)
        await eventually(lambda: sees_all(late))
        await late.stop()
        assert not any(task.done() for task in tasks)
        await eventually(lambda: holds_no_more_than(held_before))

    play(loop, Village(identities, contextlib.AsyncExitStack(), tmp_path), scenario)
    gc.collect()
    assert complaints == []


async def knows(node: Node, other: Node) -> bool:
    """Whether it remembers where the other is."""
    return any(
        other.swarm.host.peer_id.to_base58() in address for address in node.swarm.host.bootstrap_candidates
    )


async def has_children(expected: list[psutil.Process]) -> bool:
    return psutil.Process().children(recursive=True) == expected


async def is_state(node: Node, state: NodeState) -> bool:
    return node.status().state is state


async def sees_all(swarm: Swarm) -> bool:
    return await serving(swarm) == ONCE_EACH


def held() -> tuple[int, int, int]:
    """Processes, descriptors, tasks."""
    process = psutil.Process()
    return len(process.children(recursive=True)), process.num_fds(), len(asyncio.all_tasks())


async def holds_no_more_than(before: tuple[int, int, int]) -> bool:
    return all(now <= then for now, then in zip(held(), before, strict=True))


def play(loop: LoopThread, village: Village, scenario: Any) -> None:
    async def run() -> None:
        async with village.stack:
            await scenario(village)

    loop.run(run(), 240)


def test_a_lone_founder_survives_ten_kills_with_its_experts_and_manifest(
    loop: LoopThread, identities: list[Identity], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(village: Village) -> None:
        may_start = held_starts(monkeypatch)
        node = await village.found(experts=8, announce_every_s=PERIOD_S)
        task = await village.run(node)
        invite = await node.swarm.invite()
        for kills in range(1, 11):
            may_start.clear()
            await kill_p2pd(node.swarm)
            await eventually(partial(is_state, node, NodeState.UNREACHABLE))
            may_start.set()
            await eventually(partial(has_restarted, node.swarm.host, kills))
        assert not task.done()
        await eventually(partial(is_state, node, NodeState.SERVING))
        observer = await village.observe(1, invite)
        await eventually(lambda: sees_all(observer))
        assert len(node.runtime.experts) == len(UIDS)

    monkeypatch.setattr("peer.host._RESTART_PAUSES_S", (0.0, 0.1))
    play(loop, Village(identities, contextlib.AsyncExitStack(), tmp_path), scenario)


def test_a_trainer_goes_on_and_leaves_at_once_while_its_p2pd_is_dead(
    loop: LoopThread, identities: list[Identity], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(*arguments: Any) -> None:
        await asyncio.Event().wait()

    async def found(village: Village) -> tuple[Node, Invite]:
        node = await village.found(experts=8)
        return node, await node.swarm.invite()

    village = Village(identities, contextlib.AsyncExitStack(), tmp_path)
    node, invite = loop.run(found(village), 120)
    try:
        timing = TrainerTiming(refresh_every_s=0.2)
        with SwarmClient(invite, TrainerSettings.load(), tmp_path / "trainer", timing=timing) as client:
            host = client._joined.swarm.host
            for restarts in (1, 2):
                os.kill(host.p2p._child.pid, signal.SIGKILL)
                deadline = time.monotonic() + DEADLINE_S
                while host.restarts < restarts:
                    assert time.monotonic() < deadline
                    time.sleep(0.01)
                client.wait_for_experts(DEADLINE_S, lambda text: None)
                assert client.dispatcher.live_experts() == len(UIDS)
            assert node.swarm.host.peer_id in host.peers()
            monkeypatch.setattr("peer.host.start_daemon", never)
            os.kill(host.p2p._child.pid, signal.SIGKILL)
    finally:
        loop.run(village.stack.aclose(), 120)


def test_a_p2pd_that_does_not_start_is_tried_for_ever_with_bounded_pauses(
    loop: LoopThread,
    identities: list[Identity],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tries: list[float] = []
    faults = [StartError("no p2pd for this test")] * 7 + [RuntimeError("nobody foresaw this")]

    async def fails(*arguments: Any) -> Daemon:
        tries.append(time.monotonic())
        if faults:
            raise faults.pop(0)
        return await start_daemon(*arguments)

    async def scenario() -> None:
        host = await Host.start(identities[0], NetworkConfig(LOCAL))
        try:
            monkeypatch.setattr("peer.host.start_daemon", fails)
            os.kill(host.p2p._child.pid, signal.SIGKILL)
            await eventually(partial(has_restarted, host, 1))
            assert host.alive
        finally:
            await host.stop()

    monkeypatch.setattr("peer.host._RESTART_PAUSES_S", (0.0, 0.05, 0.1, 0.2))
    loop.run(scenario(), 120)
    waits = [after - before for before, after in pairwise(tries)]
    assert len(tries) == 9
    assert all(wait >= 0.9 * pause for wait, pause in zip(waits, (0.05, 0.1, *[0.2] * 5), strict=False))
    assert caplog.text.count("can't be started again: no p2pd for this test") == 1, "said once"
    assert "could not supervise the libp2p daemon" in caplog.text


async def has_restarted(host: Host, times: int) -> bool:
    return host.alive and host.restarts >= times


def test_stopping_while_p2pd_is_being_started_leaves_nothing(
    loop: LoopThread, identities: list[Identity], complaints: list[dict[str, Any]]
) -> None:
    async def scenario() -> None:
        children_before = psutil.Process().children(recursive=True)
        for delay_s in (0.0, 0.05, 0.15):
            host = await Host.start(identities[0], NetworkConfig(LOCAL))
            child = psutil.Process(host.p2p._child.pid)
            child.kill()
            await asyncio.sleep(delay_s)  # somewhere within the start
            await host.stop()
            await eventually(lambda: has_children(children_before))

    loop.run(scenario(), 120)
    gc.collect()
    assert complaints == []


@pytest.fixture(autouse=True)
def logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
