"""A node that comes back continues with the experts it had, whether it was stopped politely or killed."""

import logging
from collections.abc import Collection, Mapping
from pathlib import Path

import pytest
import torch
from callers import numbered_identities
from real_swarm import LOCAL, UIDS, Play, Village, end, eventually, playing, train

from dht.swarm import found_swarm
from dht.uid import UID
from expert_server.experts.format import State
from expert_server.node import Node
from peer import clock
from peer.averaging import MAX_UPDATE_COUNT
from peer.errors import TransferError
from peer.host import NetworkConfig
from peer.identity import Identity
from peer.loop import LoopThread
from peer.metrics import total


@pytest.fixture(scope="module")
def identities() -> list[Identity]:
    return numbered_identities(3)


@pytest.fixture
def play(loop: LoopThread, identities: list[Identity], tmp_path: Path) -> Play:
    return playing(loop, identities, tmp_path)


async def announced(node: Node, uids: Collection[UID]) -> dict[UID, int]:
    """The update counts that this node announces in the DHT."""
    found = await node.swarm.experts.replicas(uids)
    me = node.swarm.host.peer_id
    return {uid: r.update_count for uid, hosts in found.items() for r in hosts if r.peer_id == me}


async def assert_goes_on(node: Node, states: Mapping[UID, State], updates: Mapping[UID, int]) -> None:
    assert {uid: node.runtime.experts[uid].update_count for uid in updates} == updates
    for uid, state in states.items():
        found = await node.runtime.run(node.runtime.experts[uid].export_state)
        torch.testing.assert_close(found, state, atol=0, rtol=0)
    assert await announced(node, updates) == updates


def test_a_node_that_stopped_politely_comes_back_with_its_experts(play: Play) -> None:
    async def scenario(village: Village) -> None:
        node = await village.found(experts=4, checkpoint_every_s=0)
        updates = dict(zip(node.runtime.experts, (3, 0, 1, 2), strict=True))
        states = await train(node, updates)
        await node.stop()
        again = await village.found(experts=4)
        assert set(again.runtime.experts) >= {uid for uid, count in updates.items() if count}
        await assert_goes_on(again, states, updates)
        saves = again.replicas.checkpoints
        assert (total(saves.saved), total(saves.failed), total(saves.restored)) == (0, 0, 3)

    play(scenario)


def test_a_killed_node_comes_back_with_its_last_checkpoints(play: Play) -> None:
    async def scenario(village: Village) -> None:
        keeper = await village.found(experts=2, spare=0)
        invite = await keeper.swarm.invite()
        node = await village.join(1, invite, experts=3, spare=0, checkpoint_every_s=0.2)
        running = await village.run(node)
        updates = dict.fromkeys(node.runtime.experts, 2)
        states = await train(node, updates)

        async def saved() -> bool:
            return (
                total(node.replicas.checkpoints.saved) >= 3
                and await node.replicas.checkpoints.newest() == updates
            )

        await eventually(saved)
        await end(running)
        await train(node, updates)  # these updates are lost
        await node.swarm.host.stop()  # no farewell: it is announced for 30 s more

        again = await village.join(1, invite, experts=3)
        assert set(again.runtime.experts) == set(updates)
        await assert_goes_on(again, states, updates)

    play(scenario)


def test_a_node_prefers_the_experts_it_has_checkpoints_of(play: Play) -> None:
    async def scenario(village: Village) -> None:
        first = await village.found(experts=8)
        likes = sorted(first.runtime.experts)[3:5]
        await train(first, dict.fromkeys(likes, 2))
        await first.stop()
        again = await village.found(experts=2)
        assert sorted(again.runtime.experts) == likes

    play(scenario)


def test_a_node_brings_back_what_others_began_anew_while_it_was_away(play: Play) -> None:
    async def scenario(village: Village) -> None:
        founder = await village.found(experts=0, spare=0)
        invite = await founder.swarm.invite()
        node = await village.join(1, invite, experts=8)
        likes = dict.fromkeys(sorted(node.runtime.experts)[3:5], 5)
        states = await train(node, likes)
        await node.stop()

        stranger = await village.join(2, invite, experts=8)
        await train(stranger, dict.fromkeys(likes, 1))
        await stranger.hosting.announce()
        again = await village.join(1, invite, experts=2)
        assert set(again.runtime.experts) == likes.keys()
        await assert_goes_on(again, states, likes)

    play(scenario)


def test_a_checkpoint_far_behind_a_host_that_does_not_answer_is_not_used_at_first(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    stale, recent = UIDS[:2]

    async def scenario(village: Village) -> None:
        host = await village.found(experts=8)
        node = await village.join(1, await host.swarm.invite(), experts=0, spare=2)
        for uid, updates in ((stale, 5), (recent, 19)):
            await train(host, {uid: updates})
            saved = await host.runtime.run(host.runtime.experts[uid].checkpoint)
            await node.replicas.checkpoints.keep(uid, saved)
            await train(host, {uid: 20 - updates})
        await host.hosting.announce()

        async def fail(*_: object) -> None:
            raise TransferError("the host has frozen")

        monkeypatch.setattr(node.replicas.states, "fetch", fail)
        assert await node.replicas.take([stale, recent], MAX_UPDATE_COUNT, enough=2) == [recent]
        assert node.replicas.withheld() == {stale}
        node.replicas._withheld.failed(stale, clock.now() + 30)
        assert await node.replicas.take([stale], MAX_UPDATE_COUNT, enough=2) == [stale]
        assert {uid: e.update_count for uid, e in node.runtime.experts.items()} == {stale: 5, recent: 19}

    play(scenario)


def test_an_adopted_expert_goes_on_from_the_adopters_checkpoint(play: Play) -> None:
    async def scenario(village: Village) -> None:
        heir = await village.found(experts=8)
        states = await train(heir, dict.fromkeys(UIDS, 1))
        await heir.stop()

        swarm = await found_swarm(village.identities[0], heir.swarm.manifest, NetworkConfig(LOCAL))
        again = await village.start(swarm, {"experts": 0, "spare": 8, "announce_every_s": 0.5})
        assert not again.runtime.experts
        await village.run(again)

        async def adopted() -> bool:
            return again.status().adopted == 8 and await announced(again, UIDS) == dict.fromkeys(UIDS, 1)

        await eventually(adopted)
        await assert_goes_on(again, states, dict.fromkeys(UIDS, 1))

    play(scenario)


def test_a_node_serves_on_when_its_folder_cannot_be_written(
    play: Play, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(village: Village) -> None:
        name = village.identities[0].peer_id.to_base58()
        (village.folder / name).mkdir()
        (village.folder / name / "checkpoints").write_text("a file in the folder's place")
        node = await village.found(experts=2, checkpoint_every_s=0.1)
        running = await village.run(node)
        await train(node, dict.fromkeys(node.runtime.experts, 1))

        async def failed() -> bool:
            return total(node.replicas.checkpoints.failed) >= 2

        await eventually(failed)
        assert not running.done()
        await train(node, dict.fromkeys(node.runtime.experts, 1))
        await node.stop()

    play(scenario)
    lines = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert any(line.startswith("could not save 2 experts, such as ") for line in lines)


def test_checkpoints_of_another_swarm_are_not_taken(play: Play) -> None:
    async def scenario(village: Village) -> None:
        node = await village.found(experts=8)
        await train(node, dict.fromkeys(UIDS, 1))
        await node.stop()
        other = await village.found(
            experts=8, manifest=node.swarm.manifest.model_copy(update={"name": "banya"})
        )
        assert {expert.update_count for expert in other.runtime.experts.values()} == {0}

    play(scenario)
