"""An expert with one host survives on another node's disk when that host dies for good."""

import logging
import time
from collections.abc import Callable, Collection
from pathlib import Path

import pytest
import torch
from callers import numbered_identities
from checkpoint_samples import update_counts
from garbage_server import garbage_server
from real_swarm import UIDS, Play, Village, eventually, playing, train

from dht.announcements import NodeInfo, Replica, ReplicaState
from dht.uid import UID
from expert_server.experts.format import State
from expert_server.hosting.placement import preference
from expert_server.hosting.standby import StandbyCopies
from expert_server.node import Node
from expert_server.settings import NodeSettings
from expert_server.state.transfer import Fetched
from peer.errors import TransferError
from peer.identity import Identity, PeerID
from peer.loop import LoopThread
from peer.metrics import total


@pytest.fixture(scope="module")
def identities() -> list[Identity]:
    return numbered_identities(3)


def lack(state: State) -> None:
    del state[min(state)]


def add(state: State) -> None:
    state["block.more"] = torch.zeros(1)


def reshape(state: State) -> None:
    state[min(state)] = torch.zeros(3, 5, 7)


def retype(state: State) -> None:
    state[min(state)] = state[min(state)].double()


def overflow(state: State) -> None:
    state[min(state)].view(-1)[0] = torch.inf


def negate(state: State) -> None:
    state[next(name for name in state if name.endswith(".exp_avg_sq"))] -= 1


def unstep(state: State) -> None:
    for name in [name for name in state if name.startswith("optimizer.")]:
        del state[name]


def void(state: State) -> None:
    state.clear()


SPOILS = [lack, add, reshape, retype, overflow, negate, unstep, void]


@pytest.fixture
def play(loop: LoopThread, identities: list[Identity], tmp_path: Path) -> Play:
    return playing(loop, identities, tmp_path)


async def copied(node: Node, standby: StandbyCopies | None = None) -> int:
    """Looks at the swarm, and makes copies. Returns the number of copies since the start."""
    standby = standby or node._standby
    await node.hosting.announce()
    await node.hosting.look()
    await standby.copy()
    return int(total(standby.copied))


def limited(node: Node, limit: int, clock: Callable[[], float] = time.monotonic) -> StandbyCopies:
    """The node's standby copies with another limit."""
    return StandbyCopies(NodeSettings(), node.swarm, node.replicas, lambda: node.hosting.seen, limit, clock)


def prefer(keeper: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes this node the one that copies whatever has one host."""

    def prefers(uid: UID, peer_id: PeerID) -> bytes:
        return bytes([peer_id == keeper.swarm.host.peer_id]) + preference(uid, peer_id)

    monkeypatch.setattr("expert_server.hosting.placement.preference", prefers)


def test_an_expert_whose_other_host_has_died_is_copied_although_that_one_is_still_announced(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(village: Village) -> None:
        keeper = await village.found(experts=0, spare=8)
        invite = await keeper.swarm.invite()
        living, dead = [await village.join(n, invite, experts=8, replicas=2) for n in (1, 2)]
        await train(living, dict.fromkeys(living.runtime.experts, 3))
        for host in (dead, living):
            await host.hosting.replicate()
            await host.hosting.announce()
        assert {*living.runtime.experts} == {*dead.runtime.experts} == {*UIDS}
        assert await copied(keeper) == 0
        monkeypatch.setattr(
            keeper.swarm.host, "has_failed", lambda peer_id: peer_id == dead.swarm.host.peer_id
        )
        assert await copied(keeper) == len(UIDS)

    play(scenario)


def test_a_copy_is_served_although_its_dead_host_is_still_announced(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Announcements live for minutes in a large swarm. While the node itself is cut off, it takes nothing."""

    async def scenario(village: Village) -> None:
        keeper = await village.found(experts=0, spare=8, announce_every_s=120)
        invite = await keeper.swarm.invite()
        dying, living = [
            await village.join(n, invite, experts=4, spare=0, announce_every_s=120) for n in (1, 2)
        ]
        held = {*dying.runtime.experts}
        await train(dying, dict.fromkeys(held, 3))
        for uid in held:
            copy = await dying.runtime.run(dying.runtime.experts[uid].checkpoint)
            await keeper.replicas.checkpoints.keep(uid, copy)
        for host in (dying, living):
            await host.hosting.announce()
        with monkeypatch.context() as patch:
            patch.setattr(keeper.swarm.host, "has_failed", lambda peer_id: True)
            for _ in range(3):
                await keeper.hosting.look()
        assert not keeper.runtime.experts
        await dying.swarm.stop()

        async def adopted() -> bool:
            await keeper.hosting.look()  # an expert must be vacant twice in a row
            return set(keeper.runtime.experts) == held

        await eventually(adopted)
        assert {expert.update_count for expert in keeper.runtime.experts.values()} == {3}

    play(scenario)


def test_an_orphan_goes_on_from_the_copy_on_another_nodes_disk(play: Play) -> None:
    async def scenario(village: Village) -> None:
        keeper = await village.found(experts=0, spare=8, announce_every_s=1)
        host = await village.join(1, await keeper.swarm.invite(), experts=8, announce_every_s=1)
        states = await train(host, dict.fromkeys(UIDS, 3))
        await host.hosting.announce()
        assert await copied(keeper) == len(UIDS)
        assert not keeper.runtime.experts, "it keeps states, and serves nothing"
        assert await copied(keeper) == len(UIDS), "nothing has changed"

        await host.swarm.stop()  # its announcements expire, and its disk is out of reach

        async def adopted() -> bool:
            await keeper.hosting.look()  # an expert must be vacant twice in a row
            return set(keeper.runtime.experts) == set(UIDS)

        await eventually(adopted)
        for uid, state in states.items():
            expert = keeper.runtime.experts[uid]
            assert expert.update_count == 3
            torch.testing.assert_close(await keeper.runtime.run(expert.export_state), state)

    play(scenario)


def test_who_has_a_copy_is_let_go_first(play: Play) -> None:
    async def scenario(village: Village) -> None:
        keeper = await village.found(experts=0, spare=8)
        invite = await keeper.swarm.invite()
        other = await village.join(1, invite, experts=0, spare=8)
        host = await village.join(2, invite, experts=8)
        await train(host, dict.fromkeys(UIDS, 3))
        await host.hosting.announce()
        await copied(keeper)
        await other.hosting.look()  # it has seen them hosted
        await host.swarm.experts.withdraw(UIDS, 60)
        for _ in range(2):
            await other.hosting.look()
        assert not other.runtime.experts
        for _ in range(2):
            await keeper.hosting.look()
        assert [expert.update_count for expert in keeper.runtime.experts.values()] == [3] * len(UIDS)
        await other.hosting.look()
        assert not other.runtime.experts

    play(scenario)


def test_no_more_than_told_are_copied_the_stalest_first(play: Play) -> None:
    async def scenario(village: Village) -> None:
        keeper = await village.found(experts=0, spare=0)
        standby = limited(keeper, 2)
        host = await village.join(1, await keeper.swarm.invite(), experts=8)
        await train(host, {uid: 1 + number for number, uid in enumerate(UIDS)})
        await host.hosting.announce()
        assert await copied(keeper, standby) == 2
        assert await keeper.replicas.checkpoints.newest() == {UIDS[-1]: 8, UIDS[-2]: 7}
        assert await copied(keeper, standby) == 2, "and no others later"
        await train(host, {UIDS[-2]: 5})
        await host.hosting.announce()
        assert await copied(keeper, standby) == 3, "only newer states of the same"
        assert await keeper.replicas.checkpoints.newest() == {UIDS[-1]: 8, UIDS[-2]: 12}

    play(scenario)


def test_copies_of_experts_that_others_host_by_now_make_room_for_new_ones_that_arrive(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = set[UID]()

    async def refuse(node: NodeInfo, uid: UID) -> Fetched:
        asked.add(uid)
        raise TransferError("it has no state")

    async def scenario(village: Village) -> None:
        keeper = await village.found(experts=0, spare=0)
        # on a busy machine, a host may not answer once, and would not count
        monkeypatch.setattr(keeper.swarm.host, "has_failed", lambda peer_id: False)

        prefer(keeper, monkeypatch)  # the first host may be the one to copy what only the second has
        standby = limited(keeper, 3)
        invite = await keeper.swarm.invite()
        first = await village.join(1, invite, experts=4)
        alone = {*first.runtime.experts}
        await train(first, dict.fromkeys(alone, 3))
        await first.hosting.announce()
        own, *_ = alone
        trained = await first.runtime.run(first.runtime.experts[own].checkpoint)
        await keeper.replicas.checkpoints.keep(own, trained)
        assert await copied(keeper, standby) == 2
        before = {*await keeper.replicas.checkpoints.newest()}
        assert own in before <= alone

        second = await village.join(2, invite, experts=8, replicas=2)
        await second.hosting.replicate()
        assert {*second.runtime.experts} == {*UIDS}
        await train(second, dict.fromkeys(UIDS, 1))
        await second.hosting.announce()

        async def has_asked() -> bool:
            assert await copied(keeper, standby) == 2
            return bool(asked)

        with monkeypatch.context() as patch:
            patch.setattr(keeper.replicas.states, "fetch", refuse)
            await eventually(has_asked)
        assert asked.isdisjoint(alone)
        assert {*await keeper.replicas.checkpoints.newest()} == before, "no state has arrived"

        async def has_made_room() -> bool:
            return await copied(keeper, standby) == 4

        await eventually(has_made_room)  # or a state may not arrive at first
        after = {*await keeper.replicas.checkpoints.newest()}
        assert len(after) == 3, "no more than before"
        assert after & alone == {own}, "its own checkpoint stays"
        assert await copied(keeper, standby) == 4, "these have one host"

    play(scenario)


def test_a_copy_stays_if_its_hosts_die_before_the_one_that_would_take_its_place_has_arrived(
    play: Play, identities: list[Identity], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(village: Village) -> None:
        keeper, gone = await village.found(experts=0, spare=0), set[PeerID]()
        monkeypatch.setattr(keeper.swarm.host, "has_failed", gone.__contains__)
        prefer(keeper, monkeypatch)
        host = await village.join(1, await keeper.swarm.invite(), experts=8)
        await train(host, dict.fromkeys(UIDS, 3))
        hosts = [identity.peer_id for identity in identities[1:]]
        before, after, seen = {*UIDS[:2]}, {*UIDS[2:4]}, dict[UID, tuple[Replica, ...]]()
        standby = StandbyCopies(NodeSettings(), keeper.swarm, keeper.replicas, lambda: seen, limit=2)

        def hosted(uids: Collection[UID], peers: list[PeerID]) -> dict[UID, tuple[Replica, ...]]:
            return {
                uid: tuple(Replica(uid, peer, ReplicaState.SERVING, 3, 0, 0.0, 1e12) for peer in peers)
                for uid in uids
            }

        async def copies() -> set[UID]:
            await standby.copy()
            return {*await keeper.replicas.checkpoints.newest()}

        seen |= hosted(before, hosts[:1])
        assert await copies() == before
        seen |= hosted(before, hosts) | hosted(after, hosts[:1])
        fetch = keeper.replicas.states.fetch

        async def fetch_while_hosts_die(node: NodeInfo, uid: UID) -> Fetched:
            fetched = await fetch(node, uid)
            gone.update(hosts)
            return fetched

        with monkeypatch.context() as patch:
            patch.setattr(keeper.replicas.states, "fetch", fetch_while_hosts_die)
            assert await copies() == before
        assert gone
        gone.clear()
        assert await copies() == after

    play(scenario)


def test_what_is_no_state_of_its_expert_takes_no_copys_place(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(village: Village) -> None:
        keeper = await village.found(experts=0, spare=0)
        host = await village.join(1, await keeper.swarm.invite(), experts=8)
        await train(host, dict.fromkeys(UIDS, 1))
        await host.hosting.announce()
        assert await copied(keeper) == len(UIDS)
        before = {uid: update_counts(keeper.replicas.checkpoints._store, uid) for uid in UIDS}
        fetch, spoils = keeper.replicas.states.fetch, iter(2 * SPOILS)

        async def fetch_spoilt(node: NodeInfo, uid: UID) -> Fetched:
            fetched = await fetch(node, uid)
            next(spoils)(fetched.checkpoint.state)
            return fetched

        monkeypatch.setattr(keeper.replicas.states, "fetch", fetch_spoilt)
        for _ in range(2):
            await train(host, dict.fromkeys(UIDS, 1))
            await host.hosting.announce()
            assert await copied(keeper) == len(UIDS)
        assert {uid: update_counts(keeper.replicas.checkpoints._store, uid) for uid in UIDS} == before

    play(scenario)


def test_a_host_that_answers_with_no_messages_does_not_end_who_copies_its_experts(
    play: Play, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its DHT node may still have answered a moment ago."""

    async def scenario(village: Village) -> None:
        keeper = await village.found(experts=0, spare=0)
        host = await village.join(1, await keeper.swarm.invite(), experts=8)
        await train(host, dict.fromkeys(UIDS, 1))
        await host.hosting.announce()
        peer = host.swarm.host
        assert peer.server is not None
        await peer.server.stop(None)
        monkeypatch.setattr(keeper.swarm.host, "has_failed", lambda peer_id: False)
        async with garbage_server(peer.identity, peer.certificate, peer.port):
            assert await copied(keeper) == 0
        assert total(keeper.replicas.states.metrics.fetches, outcome="broken") == len(UIDS)

    play(scenario)
    assert not [record for record in caplog.records if record.exc_info]


@pytest.mark.parametrize("answered", [True, False])
def test_that_a_host_is_too_busy_for_a_copy_is_no_news(
    play: Play, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, answered: bool
) -> None:
    caplog.set_level(logging.INFO)

    async def refuse(node: NodeInfo, uid: UID) -> Fetched:
        raise TransferError("RESOURCE_EXHAUSTED: too many new snapshots were asked for lately", answered)

    async def scenario(village: Village) -> None:
        keeper = await village.found(experts=0, spare=0)
        host = await village.join(1, await keeper.swarm.invite(), experts=8)
        await train(host, dict.fromkeys(UIDS, 1))
        await host.hosting.announce()
        monkeypatch.setattr(keeper.replicas.states, "fetch", refuse)
        assert await copied(keeper) == 0

    play(scenario)
    assert ("could not copy expert" in caplog.text) is not answered


def test_a_copy_is_renewed_when_its_host_has_moved_on_or_it_is_old(play: Play) -> None:
    async def scenario(village: Village) -> None:
        now = 1000.0
        keeper = await village.found(experts=0, spare=0)
        standby = limited(keeper, 1, lambda: now)
        host = await village.join(1, await keeper.swarm.invite(), experts=8)
        await train(host, {UIDS[0]: 200})
        for more, later_s, copies in ((0, 0, 1), (1, 0, 1), (1, 0, 2), (1, 0, 2), (0, 1800, 3), (0, 1800, 3)):
            await train(host, {UIDS[0]: more})
            now += later_s
            await host.hosting.announce()
            assert await copied(keeper, standby) == copies, (more, later_s)

    play(scenario)


def test_a_paused_node_copies_nothing(play: Play) -> None:
    async def scenario(village: Village) -> None:
        keeper = await village.found(experts=0, spare=8)
        host = await village.join(1, await keeper.swarm.invite(), experts=8)
        await train(host, dict.fromkeys(UIDS, 1))
        await host.hosting.announce()
        await keeper.pause()
        assert await copied(keeper) == 0
        await keeper.resume()
        assert await copied(keeper) == len(UIDS)

    play(scenario)


def test_a_pause_ends_the_copying_that_is_under_way(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(village: Village) -> None:
        keeper = await village.found(experts=0, spare=8)
        host = await village.join(1, await keeper.swarm.invite(), experts=8)
        await train(host, dict.fromkeys(UIDS, 1))
        await host.hosting.announce()
        fetch = keeper.replicas.states.fetch

        async def fetch_and_pause(node: NodeInfo, uid: UID) -> Fetched:
            await keeper.pause()
            return await fetch(node, uid)

        monkeypatch.setattr(keeper.replicas.states, "fetch", fetch_and_pause)
        assert 1 <= await copied(keeper) <= 3 < len(UIDS), "those that were under way, and no others"

    play(scenario)


def test_a_slow_host_does_not_delay_the_next_round(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(village: Village) -> None:
        keeper = await village.found(experts=0, spare=8)
        host = await village.join(1, await keeper.swarm.invite(), experts=8)
        await train(host, dict.fromkeys(UIDS, 1))
        await host.hosting.announce()
        now, fetch = 0.0, keeper.replicas.states.fetch

        async def fetch_slowly(node: NodeInfo, uid: UID) -> Fetched:
            nonlocal now
            now += 200
            return await fetch(node, uid)

        monkeypatch.setattr(keeper.replicas.states, "fetch", fetch_slowly)
        standby = limited(keeper, 8, lambda: now)
        assert await copied(keeper, standby) == 2, "the third would begin after the 300 s from round to round"
        assert await copied(keeper, standby) == 4

    play(scenario)


def test_what_a_node_hosts_since_its_last_look_it_does_not_copy(play: Play) -> None:
    async def scenario(village: Village) -> None:
        host = await village.found(experts=8)
        await train(host, dict.fromkeys(UIDS, 1))
        await host.hosting.announce()
        keeper = await village.join(1, await host.swarm.invite(), experts=8, replicas=2)
        assert await copied(keeper) == 0
        assert set(keeper.runtime.experts) == set(UIDS), "further replicas"

    play(scenario)


def test_a_node_that_shall_keep_no_copies_keeps_none(play: Play) -> None:
    async def scenario(village: Village) -> None:
        node = await village.found(experts=8, standby_every_s=0)
        await node._standby.run()  # ends

    play(scenario)
