"""A peer that claims more updates for its expert than are possible does not get its way for ever."""

from functools import partial
from pathlib import Path

import pytest
import torch
from callers import numbered_identities
from real_swarm import Play, Village, playing, train
from test_standby import copied

from dht.uid import UID
from expert_server.experts.format import State
from expert_server.node import Node
from peer.averaging import MAX_UPDATE_COUNT
from peer.identity import Identity
from peer.loop import LoopThread

MOST = 10 * 3 + 30_000
"""The largest claim that is believed where the other node's experts have taken 3 updates."""


@pytest.fixture(scope="module")
def identities() -> list[Identity]:
    return numbered_identities(2)


@pytest.fixture
def play(loop: LoopThread, identities: list[Identity], tmp_path: Path) -> Play:
    return playing(loop, identities, tmp_path)


async def honest_and_liar(village: Village, replicas: int) -> tuple[Node, Node, UID]:
    """Two nodes, and the expert that only the liar hosts."""
    liar = await village.found(experts=1)
    (uid,) = liar.runtime.experts
    honest = await village.join(
        1, await liar.swarm.invite(), experts=8, replicas=replicas, standby_every_s=300
    )
    assert uid not in honest.runtime.experts
    await train(honest, dict.fromkeys(honest.runtime.experts, 3))
    await honest.hosting.announce()
    return honest, liar, uid


async def claim(node: Node, uid: UID, update_count: int) -> State:
    """Takes one update and then claims `update_count` of them. Returns the state."""
    state = (await train(node, {uid: 1}))[uid]
    await node.runtime.run(partial(node.runtime.experts[uid].import_state, state, update_count))
    await node.hosting.announce()
    return state


def test_a_copy_of_an_absurd_count_keeps_no_later_copies_out(play: Play) -> None:
    async def scenario(village: Village) -> None:
        now = 1000.0
        honest, liar, uid = await honest_and_liar(village, replicas=1)
        honest._standby._clock = lambda: now
        await claim(liar, uid, MAX_UPDATE_COUNT)
        assert await copied(honest) == 1
        assert await honest.replicas.checkpoints.newest() == {uid: MOST}

        state = await claim(liar, uid, 40_000)
        assert await copied(honest) == 1, "it is believed to have taken no more, and the copy is young"
        now += 1800
        assert await copied(honest) == 2
        assert await honest.replicas.checkpoints.newest() == {uid: MOST}
        kept = honest.replicas.checkpoints._store.load_newest(uid)
        assert kept is not None
        torch.testing.assert_close(kept.state, state)

    play(scenario)


def test_a_replica_of_an_absurd_count_counts_what_can_be(play: Play) -> None:
    async def scenario(village: Village) -> None:
        honest, liar, uid = await honest_and_liar(village, replicas=2)
        await claim(liar, uid, MAX_UPDATE_COUNT)
        await honest.hosting.replicate()
        assert honest.runtime.experts[uid].update_count == MOST

    play(scenario)
