"""What the watcher does if it cannot join: it gives up with a wrong invite, and waits for a swarm that it knows."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from loop_holds import holds
from simulated_readings import (
    INVITE,
    NOW,
    Asked,
    manifest,
    memory,
    node,
    peer,
    picture_of,
    replica,
    trainer,
)

from benchmarks.simulated_p2p import Link, simulated_world
from benchmarks.simulated_swarm import SimulatedSwarm
from dht.announcements import MAX_LATENCIES
from dht.directory import View
from dht.invites import Invite
from dht.swarm import Swarm
from dht.uid import UID
from peer.errors import SwarmError, UnreachableError
from peer.metrics import total
from peer.wire import admission_pb2
from talkoot.dashboard import watcher as watcher_module
from talkoot.dashboard.picture import HostChecks, Picture
from talkoot.dashboard.watcher import Watcher, WatchIntervals
from talkoot.status import SwarmReading


def failing(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    async def join(*_: Any, **__: Any) -> Swarm:
        raise error

    monkeypatch.setattr(watcher_module, "join_swarm", join)


async def until_told(watcher: Watcher) -> None:
    """Runs the watcher until there is news."""
    running = asyncio.create_task(watcher.run())
    told = asyncio.create_task(watcher.news())
    try:
        async with asyncio.timeout(60):
            await asyncio.wait({running, told}, return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            await running
    finally:
        for task in (running, told):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, SwarmError):
                await task


def watched(folder: Path, picture: Picture | None) -> Watcher:
    asked = Asked(folder, picture)
    asked.history.close()  # nothing is kept here
    return asked.watcher


def test_who_sees_the_page_does_not_see_the_token(tmp_path: Path) -> None:
    token = admission_pb2.Token(grant=b"secret", signature=b"secret").SerializeToString()
    asked = Asked(tmp_path, picture_of([node(0)]))
    secret = replace(INVITE, token=token)
    watcher = Watcher(secret, WatchIntervals(2.0), tmp_path, asked.store, None)
    assert Invite.parse(watcher.state().invite) == INVITE
    asked.history.close()


def test_an_invite_of_no_swarm_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, SwarmError("know no manifest"))
    with pytest.raises(SwarmError, match="know no manifest"):
        asyncio.run(until_told(watched(tmp_path, None)))


@pytest.mark.parametrize("error", [SwarmError("know no manifest"), UnreachableError("nobody answers")])
def test_a_swarm_that_was_seen_before_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    failing(monkeypatch, error)
    picture = picture_of([node(0)])
    watcher = watched(tmp_path, picture)
    with caplog.at_level(logging.WARNING):
        asyncio.run(until_told(watcher))
    assert watcher.unreachable_since is not None
    assert watcher.picture is picture
    assert f"cannot reach the swarm: {error}" in caplog.text


def test_attempts_to_join_are_logged_once_while_nobody_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def join(*_: Any, stage: Callable[[str], None], **__: Any) -> Swarm:
        stage("joining")
        raise UnreachableError("nobody answers")

    monkeypatch.setattr(watcher_module, "join_swarm", join)
    monkeypatch.setattr(watcher_module, "_JOIN_AGAIN_S", 0.0)
    watcher = watched(tmp_path, None)

    async def until_third_attempt() -> None:
        running = asyncio.create_task(watcher.run())
        async with asyncio.timeout(60):
            while total(watcher.failures) < 3:
                await watcher.news()
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running

    with caplog.at_level(logging.INFO):
        asyncio.run(until_third_attempt())
    assert caplog.messages == [
        "joining",
        "cannot reach the swarm: nobody answers; the page shows the last state",
    ]


def test_a_swarm_that_was_never_seen_is_waited_for_when_nobody_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, UnreachableError("nobody answers"))
    watcher = watched(tmp_path, None)
    asyncio.run(until_told(watcher))
    assert (watcher.picture, total(watcher.failures)) == (None, 1)
    assert watcher.unreachable_since is not None


def test_many_nodes_and_trainers_do_not_hold_the_loop(tmp_path: Path) -> None:
    """Strangers may make up as many as are shown."""
    nodes = {peer(number): node(number) for number in range(5000)}
    called = dict.fromkeys([*nodes][:MAX_LATENCIES], 0.1)
    trainers = {info.peer_id: info for info in (trainer(n, node_latency_s=called) for n in range(1000))}
    swarm = manifest((64, 64))
    replicas = {uid: (replica(uid, n % len(nodes)),) for n, uid in enumerate(swarm.uids())}
    reading = SwarmReading("sauna", View(swarm, replicas, nodes, NOW), nodes, trainers)
    watcher = watched(tmp_path, None)
    watcher._surveys = (memory(),)
    watcher._checks[memory().entry.memory] = HostChecks(checks=1, lies=1, caught={peer(0): None})

    at_once = partial(
        picture_of, [*nodes.values()], [*trainers.values()], swarm=swarm, replicas=[r for (r,) in replicas.values()]
    )  # fmt: skip
    at_once()
    began = time.thread_time()
    at_once()
    held_by_a_picture_s = time.thread_time() - began

    def pauses() -> bool:
        longest_s, _ = asyncio.run(holds(watcher._note(reading, ())))
        return longest_s < held_by_a_picture_s / 3

    assert any(pauses() for _ in range(3))
    assert watcher.picture is not None
    assert len(watcher.picture.nodes) == len(nodes)
    assert watcher.picture.memories[0]["caught"] == [peer(0).to_base58()]


def test_what_is_seen_is_saved_although_the_clock_was_set_back(tmp_path: Path) -> None:
    asked, picture = Asked(tmp_path, None), picture_of([node(0)], replicas=[replica(UID(0, (0, 0)), 0)])
    watcher, hour_ago = asked.watcher, NOW - 3600
    watcher._intervals = replace(watcher._intervals, experts_every_s=0.0)

    async def remember() -> None:
        await watcher._remember(picture, NOW)
        await watcher._remember(picture, hour_ago)

    asyncio.run(remember())
    found = asked.history.read("expert_replicas", hour_ago - 60, hour_ago, 300, 8)
    assert [at for at, value in found[0][1] if value is not None][:1] == [pytest.approx(hour_ago, abs=15)]
    asked.history.close()


@pytest.mark.parametrize(("cells", "least_s", "most_s"), [(1, 15.0, 16.0), (400, 30.0, 60.0)])
def test_memories_are_surveyed_less_often_if_that_takes_many_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cells: int, least_s: float, most_s: float
) -> None:
    began, spent = list[float](), list[int]()

    async def libraries() -> Any:
        return {peer(0): (memory().entry,)}

    with simulated_world() as loop:

        async def scenario() -> None:
            swarm = await SimulatedSwarm.start(loop, 20, 16, Link(0.1), 1, with_contacts=True)
            (reader, *_) = swarm.peers

            async def survey(*_: Any) -> Any:
                began.append(loop.time())
                before = reader.dht.spent_bytes
                await reader.registry.get([f"{number}" for number in range(cells)])
                spent.append(reader.dht.spent_bytes - before)

            monkeypatch.setattr(watcher_module, "survey", survey)
            memories: Any = SimpleNamespace(libraries=libraries)
            async with asyncio.timeout(150):
                await watched(tmp_path, None)._survey_memories(memories)

        with pytest.raises(TimeoutError):
            loop.run_until_complete(scenario())
    pauses = [after - before for before, after in pairwise(began)]
    assert all(least_s <= pause_s < most_s for pause_s in pauses)
    assert pauses == [pytest.approx(max(15.0, cost / 10_000), abs=2.0) for cost in spent[: len(pauses)]]
