"""A full node exchanges a replica that others host often enough for one that has too few."""

from pathlib import Path

import pytest
from callers import numbered_identities
from real_swarm import UIDS, Play, Village, eventually, playing, serving

from expert_server.hosting.placement import preference
from expert_server.node import Node
from peer.averaging import MAX_UPDATE_COUNT
from peer.identity import Identity
from peer.loop import LoopThread
from peer.metrics import total


@pytest.fixture
def identities() -> list[Identity]:
    return numbered_identities(3)


@pytest.fixture
def play(loop: LoopThread, identities: list[Identity], tmp_path: Path) -> Play:
    return playing(loop, identities, tmp_path)


def test_of_three_replicas_one_goes_for_an_expert_with_a_single_one(
    play: Play, identities: list[Identity]
) -> None:
    peer_ids = [identity.peer_id for identity in identities]
    crowded = next((u for u in UIDS if min(peer_ids, key=lambda p: preference(u, p)) != peer_ids[0]), UIDS[0])
    least_keen = min(peer_ids[1:], key=lambda p: preference(crowded, p))

    async def scenario(village: Village) -> None:
        founder = await village.found(experts=8)
        invite = await founder.swarm.invite()
        nodes: list[Node] = [
            await village.join(number, invite, experts=1, spare=1, replicas=2) for number in (1, 2)
        ]
        for node in nodes:
            assert await node.replicas.take([crowded], MAX_UPDATE_COUNT, enough=9) == [crowded]
        assert (await serving(founder.swarm))[crowded] == 3
        leaver = next(node for node in nodes if node.swarm.host.peer_id == least_keen)
        for _ in range(3):
            await leaver.hosting.look()
            assert set(leaver.runtime.experts) == {crowded}, "it waits whether the others stay"
        await leaver.hosting.look()
        assert total(leaver.hosting.exchanged) == 1
        (taken,) = leaver.runtime.experts
        assert taken != crowded

        async def spread() -> bool:
            return await serving(founder.swarm) == {**dict.fromkeys(UIDS, 1), crowded: 2, taken: 2}

        await eventually(spread)
        for _ in range(5):
            await leaver.hosting.look()
        assert set(leaver.runtime.experts) == {taken}

    play(scenario)
