"""Strangers lie about the time and about who is reachable, and the machine's own clock is set: no node stops."""

import asyncio
import contextlib
import time
from pathlib import Path
from typing import Any

import pytest
from callers import numbered_identities
from real_swarm import LOCAL, MANIFEST, Play, Village, eventually, playing
from stranger import Stranger
from victim import founder, honest_caller, member

from dht.announcements import ReplicaState
from dht.invites import Invite
from dht.manifest import Manifest
from dht.swarm import Swarm, join_swarm
from peer import clock
from peer.bounded import BoundedDict
from peer.host import NetworkConfig
from peer.loop import LoopThread
from peer.wire import dht_pb2

FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1")
HOUR_S = 3600.0
STEPS = {"+3600": "forward", "-3600": "back"}


@pytest.fixture
def play(loop: LoopThread, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Play:
    monkeypatch.setattr(clock.CLOCK, "_others", BoundedDict(8))  # this process goes on with the right ones
    return playing(loop, numbered_identities(3), tmp_path)


def test_a_node_starts_whatever_two_of_three_peers_say(
    play: Play, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(village: Village) -> None:
        node = await village.found(experts=1)
        node.swarm.host.dht.now = time.time  # on another machine, whose clock notes nothing here
        invite = await node.swarm.invite()

        async def lie(request: Any, context: Any) -> Any:
            return dht_pb2.PingResponse(peer=liar.dht.info, dht_time=time.time() + lead_s, available=False)

        async with contextlib.AsyncExitStack() as stack:
            addresses = list(invite.bootstrap)
            for _ in range(2):
                liar = await stack.enter_async_context(Stranger.joined(invite))
                liar.dht.now = time.time
                await liar.answer(ping=lie)
                addresses += liar.swarm.host.bootstrap_addresses()
            # The honest peer is not among those that a restarting node happens to ask.
            liars = addresses[len(invite.bootstrap) :]
            for asked, lead_s in ((addresses, HOUR_S), (liars, HOUR_S), (liars, 0.0)):
                caplog.clear()
                swarm = await join_swarm(
                    village.identities[1], Invite(invite.keys, tuple(asked)), NetworkConfig(LOCAL)
                )
                stack.push_async_callback(swarm.stop)
                assert swarm.manifest == MANIFEST
                is_wrong, is_unreached = lead_s > 0, lead_s == 0
                assert ("clock is 60 min behind those of most of the" in caplog.text) == is_wrong
                # with a wrong clock, others do not try
                assert ("none of the 2 peers asked can reach this one" in caplog.text) == is_unreached
                await swarm.stop()

    play(scenario)


@pytest.mark.slow
@pytest.mark.skipif(not FAKETIME.exists(), reason="needs the Debian package faketime")
def test_a_node_survives_when_its_machines_clock_is_set(
    loop: LoopThread, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_by = tmp_path / "clock"
    set_clock(set_by, "+0")
    for name, value in {
        "LD_PRELOAD": str(FAKETIME),
        "FAKETIME_TIMESTAMP_FILE": str(set_by),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }.items():
        monkeypatch.setenv(name, value)

    async def scenario(invite: Invite, manifest: Manifest) -> None:
        async with Stranger.joined(invite, serves_dht=False) as observer:
            info = await observer.node(invite.keys.author)
            async with honest_caller(info, observer.keys.swarm_id, manifest) as caller:
                for step in STEPS:
                    await asyncio.to_thread(set_clock, set_by, step)
                    await caller.call_for(3.0, pause_s=0.2)
                    await asyncio.to_thread(set_clock, set_by, "+0")
                    await eventually(lambda: is_announced(observer.swarm, manifest))
                assert caller.share >= 0.95, caller.last_error

    with founder(tmp_path, announce_every_s=1.0) as node:
        manifest = Manifest.from_toml(tmp_path / "swarm.toml")
        node.until(lambda: node.status().experts == 4, "its experts")
        loop.run(scenario(node.invite, manifest), 120)
        log = "\n".join(node.log_lines)
        assert all(f"clock was set {way} by 60 min" in log for way in STEPS.values())
        assert node.alive


@pytest.mark.slow
@pytest.mark.skipif(not FAKETIME.exists(), reason="needs the Debian package faketime")
def test_a_node_whose_clock_is_minutes_fast_sees_the_hosts_and_begins_no_expert_anew(
    loop: LoopThread, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def trained(invite: Invite, manifest: Manifest) -> None:
        async with Stranger.joined(invite, serves_dht=False) as observer:
            info = await observer.node(invite.keys.author)
            async with honest_caller(info, observer.keys.swarm_id, manifest) as caller:
                for _ in range(4 * len(caller.uids)):
                    await caller.call("backward")
                assert not caller.failed, caller.last_error

    async def counts_of(invite: Invite, manifest: Manifest) -> list[int]:
        """The update counts of all replicas that another host serves."""
        async with Stranger.joined(invite, serves_dht=False) as observer:
            found = await observer.swarm.experts.replicas(manifest.uids())
            return [
                replica.update_count
                for hosts in found.values()
                for replica in hosts
                if replica.peer_id != invite.keys.author and replica.state is ReplicaState.SERVING
            ]

    with founder(tmp_path, announce_every_s=1.0) as node:
        manifest = Manifest.from_toml(tmp_path / "swarm.toml")
        node.until(lambda: node.status().experts == 4, "its experts")
        loop.run(trained(node.invite, manifest), 120)
        monkeypatch.setenv("LD_PRELOAD", str(FAKETIME))
        monkeypatch.setenv("FAKETIME", "+120")
        monkeypatch.setenv("FAKETIME_DONT_FAKE_MONOTONIC", "1")
        with member(tmp_path, node.invite, announce_every_s=1.0) as fast:
            fast.until(lambda: fast.status().experts, "an expert")
            fast.until(lambda: loop.run(counts_of(node.invite, manifest), 120), "its announcement")
            assert all(loop.run(counts_of(node.invite, manifest), 120)), "it did not begin anew"
            assert "clock is 2 min ahead of that of the peer asked" in "\n".join(fast.log_lines)


def set_clock(set_by: Path, offset: str) -> None:
    """Sets the clock in one step: libfaketime ends its process if it reads an empty file."""
    written = set_by.with_suffix(".new")
    written.write_text(f"{offset}\n")
    written.replace(set_by)


async def is_announced(swarm: Swarm, manifest: Manifest) -> bool:
    """Whether all experts were announced within the last few seconds."""
    found = await swarm.experts.replicas(manifest.uids())
    now = time.time()
    return all(hosts and all(now < r.expires_at < now + 60 for r in hosts) for hosts in found.values())
