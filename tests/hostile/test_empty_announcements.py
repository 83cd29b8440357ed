"""A stranger announces experts that it does not have, which costs it only one signature each."""

from collections.abc import Collection
from pathlib import Path

import pytest
from callers import numbered_identities
from real_swarm import UIDS, Play, Village, eventually, playing
from stranger import Stranger, new_identities

from dht.announcements import ReplicaAnnouncement, ReplicaState
from dht.uid import UID
from expert_server.hosting.placement import preference
from peer.averaging import MAX_UPDATE_COUNT
from peer.identity import Identity
from peer.loop import LoopThread


@pytest.fixture
def identities() -> list[Identity]:
    return numbered_identities(2)


@pytest.fixture
def play(loop: LoopThread, identities: list[Identity], tmp_path: Path) -> Play:
    return playing(loop, identities, tmp_path)


async def announce(stranger: Stranger, uids: Collection[UID], update_count: int = 0) -> None:
    """Announces that the stranger serves the experts. Its server gives nothing."""
    await stranger.serve({})
    await stranger.publish_node()
    replicas = [ReplicaAnnouncement(uid, ReplicaState.SERVING, update_count) for uid in uids]
    await stranger.swarm.experts.announce(replicas, 60)


def test_no_expert_is_given_up_to_a_peer_that_does_not_have_it(play: Play) -> None:
    async def scenario(village: Village) -> None:
        host = await village.found(experts=4, spare=0)
        invite = await host.swarm.invite()
        other = await village.join(1, invite, experts=4, spare=0)
        me, mine = host.swarm.host.peer_id, set(host.runtime.experts)
        await host.hosting.look()  # it makes room only for what it has seen hosted
        keen = next(
            identity
            for identity in new_identities(64)
            if any(preference(uid, identity.peer_id) > preference(uid, me) for uid in mine)
        )
        async with Stranger.joined(invite, keen) as stranger:
            await announce(stranger, mine, update_count=10)
            await other.swarm.experts.withdraw(other.runtime.experts, 60)
            for _ in range(5):
                await host.hosting.announce()
                await host.hosting.look()
                assert set(host.runtime.experts) == mine, "nobody else has them"

    play(scenario)


def test_experts_that_nobody_gives_keep_no_others_from_being_replicated(play: Play) -> None:
    async def scenario(village: Village) -> None:
        founder = await village.found(experts=0, spare=4)
        joiner = village.identities[1].peer_id
        ranked = sorted(UIDS, key=lambda uid: preference(uid, joiner))
        real, made_up = ranked[:4], ranked[4:]  # what the other would take first
        assert len(await founder.replicas.take(real, MAX_UPDATE_COUNT)) == 4
        invite = await founder.swarm.invite()
        async with Stranger.joined(invite) as stranger:
            await announce(stranger, made_up)
            node = await village.join(1, invite, experts=2, spare=0, replicas=2)

            async def replicated() -> bool:
                await node.hosting.replicate()
                return len(node.runtime.experts) == 2

            await eventually(replicated)
            assert set(node.runtime.experts) <= set(real)

    play(scenario)
