"""Nodes that cannot start say why, and leave nothing behind."""

import contextlib
import socket
from dataclasses import replace
from pathlib import Path

import pytest
from callers import numbered_identities
from real_swarm import (
    LOCAL,
    MANIFEST,
    Play,
    Village,
    children,
    playing,
)

from dht.records import SwarmKeys
from dht.swarm import found_swarm, join_swarm
from peer import PROTOCOL_VERSION
from peer.errors import StartError, SwarmError, UnreachableError
from peer.host import NetworkConfig
from peer.identity import Identity
from peer.loop import LoopThread


@pytest.fixture(scope="module")
def identities() -> list[Identity]:
    return numbered_identities(4)


@pytest.fixture
def play(loop: LoopThread, identities: list[Identity], tmp_path: Path) -> Play:
    return playing(loop, identities, tmp_path)


def test_a_busy_port_is_named_and_nothing_is_left(play: Play) -> None:
    async def scenario(village: Village) -> None:
        before = children()
        with socket.create_server((LOCAL, 0)) as server:
            port = server.getsockname()[1]
            with pytest.raises(StartError, match=f"port {port}.*pass another"):
                await found_swarm(village.identities[0], MANIFEST, NetworkConfig(LOCAL, port))
            with pytest.raises(StartError, match=f"port {port}.*pass another"):
                await village.found(experts=1, metrics_port=port)
        assert children() == before

    play(scenario)


def test_another_manifest_is_refused_whether_or_not_others_are_in_the_swarm(play: Play) -> None:
    async def scenario(village: Village) -> None:
        state = village.folder / "founder"
        other = MANIFEST.model_copy(update={"routing": MANIFEST.routing.model_copy(update={"top_k": 1})})
        swarm = await found_swarm(village.identities[0], MANIFEST, NetworkConfig(LOCAL), state=state)
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(swarm.stop)
            witness = await village.join(1, await swarm.invite(), experts=1)
            bootstrap = witness.swarm.host.bootstrap_addresses()
        before = children()
        for folder in (None, state):
            with pytest.raises(
                SwarmError, match=r"another manifest: in that one, routing\.top_k is 2, not 1\. A sw"
            ):
                await found_swarm(
                    village.identities[0], other, NetworkConfig(LOCAL), bootstrap=bootstrap, state=folder
                )
        assert children() == before

        await witness.stop()
        with pytest.raises(SwarmError, match="pass the original file, or choose another name"):
            await found_swarm(village.identities[0], other, NetworkConfig(LOCAL), state=state)
        assert children() == before

    play(scenario)


def test_an_invite_to_a_swarm_that_is_not_there_is_refused_and_leaves_nothing(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dht.swarm._MANIFEST_DEADLINE_S", 0.5)

    async def scenario(village: Village) -> None:
        node = await village.found(experts=1)
        before = children()
        invite = await node.swarm.invite()
        wrong = (
            replace(invite, keys=SwarmKeys("sauna", village.identities[2].peer_id)),  # another author
            replace(invite, keys=SwarmKeys("banya", invite.keys.author)),  # another name
        )
        for changed in wrong:
            with pytest.raises(UnreachableError, match="this node belongs to swarm"):
                await join_swarm(village.identities[1], changed, NetworkConfig(LOCAL))
        assert children() == before

    play(scenario)


def test_a_manifest_of_another_version_is_refused_naming_both(play: Play) -> None:
    async def scenario(village: Village) -> None:
        later = MANIFEST.model_copy(update={"protocol_version": 7})
        swarm = await found_swarm(village.identities[0], later, NetworkConfig(LOCAL))
        village.stack.push_async_callback(swarm.stop)
        before = children()
        with pytest.raises(SwarmError, match=f"protocol version 7, this software {PROTOCOL_VERSION}"):
            await join_swarm(village.identities[1], await swarm.invite(), NetworkConfig(LOCAL))
        assert children() == before

    play(scenario)
