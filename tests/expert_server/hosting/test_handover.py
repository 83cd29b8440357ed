"""No expert is lost that another node can still get: a node that leaves hands over, and one that is killed leaves
replicas.
"""

import asyncio
import logging
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from callers import numbered_identities
from real_swarm import DEADLINE_S, UIDS, Play, Village, end, eventually, playing, serving, train
from test_restart import announced

from dht.announcements import NodeInfo, Replica, ReplicaAnnouncement, ReplicaState
from dht.directory import Directory
from dht.swarm import Swarm
from dht.uid import UID
from expert_server.experts.format import State
from expert_server.experts.graphs import Rows
from expert_server.hosting.manager import _CLAIM_WITHIN_S, _HEIRS, _MOST_HEIRS, Handover
from expert_server.hosting.placement import serving_elsewhere
from expert_server.node import Node
from expert_server.serving.batching import WorkItem
from expert_server.status import NodeState
from peer.averaging import MAX_UPDATE_COUNT
from peer.errors import ExpertError, StateError, TransferError, UnreachableError
from peer.identity import Identity, PeerID
from peer.loop import LoopThread
from peer.metrics import total

LEAVES: dict[str, Any] = {"drain_timeout_s": 600}


@pytest.fixture(scope="module")
def identities() -> list[Identity]:
    return numbered_identities(4)


@pytest.fixture
def play(loop: LoopThread, identities: list[Identity], tmp_path: Path) -> Play:
    return playing(loop, identities, tmp_path)


async def assert_hosted(nodes: list[Node], states: Mapping[UID, State], updates: Mapping[UID, int]) -> None:
    """Checks that exactly one of the nodes has each of these experts, with these states."""
    found = {uid: (node, expert) for node in nodes for uid, expert in node.runtime.experts.items()}
    assert sum(len(node.runtime.experts) for node in nodes) == len(found)
    assert {uid: found[uid][1].update_count for uid in updates} == updates
    for uid, state in states.items():
        node, expert = found[uid]
        torch.testing.assert_close(await node.runtime.run(expert.export_state), state, atol=0, rtol=0)


def test_a_node_that_leaves_hands_its_experts_over_with_their_updates(
    play: Play, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    async def scenario(village: Village) -> None:
        leaver = await village.found(experts=8, **LEAVES)
        invite = await leaver.swarm.invite()
        heirs = [await village.join(n, invite, experts=0, spare=4) for n in (1, 2)]
        for heir in heirs:
            await village.run(heir)
        updates = {uid: n % 4 for n, uid in enumerate(UIDS)}
        running = await village.run(leaver)
        states = await train(leaver, updates)
        await end(running)
        await leaver.stop()
        assert leaver.status().offline == 0
        assert all(len(heir.runtime.experts) == 4 for heir in heirs)
        await assert_hosted(heirs, states, updates)
        assert total(leaver.hosting.handed_over) == sum(heir.status().adopted for heir in heirs) == 8
        assert set(await serving(heirs[0].swarm)) == set(UIDS)
        assert total(leaver.replicas.states.metrics.bytes, direction="sent") == sum(
            total(heir.replicas.states.metrics.bytes, direction="received") for heir in heirs
        )

    play(scenario)
    assert "gave up 8 experts: others host 8, only this node's checkpoints have 0" in caplog.messages


def test_a_leaving_node_says_how_many_experts_others_serve_at_that_moment(
    play: Play, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    async def scenario(village: Village) -> None:
        leaver = await village.found(experts=8, **LEAVES)
        other = await village.join(1, await leaver.swarm.invite(), experts=5, spare=0, replicas=2)
        await other.hosting.replicate()
        assert (len(other.runtime.experts), len(leaver.hosting.alone)) == (5, 8)
        await leaver.stop()

    play(scenario)
    (said,) = (message for message in caplog.messages if message.startswith("gives up"))
    assert said.startswith("gives up 8 experts, of which other nodes serve 5 too; nodes with room ")


def test_the_only_node_of_a_swarm_leaves_at_once(play: Play) -> None:
    async def scenario(village: Village) -> None:
        node = await village.found(experts=8, **LEAVES)
        states = await train(node, dict.fromkeys(UIDS, 1))
        await node.stop()
        again = await village.found(experts=8)
        await assert_hosted([again], states, dict.fromkeys(UIDS, 1))

    play(scenario)


def test_what_nobody_has_room_for_stays_in_the_checkpoints(play: Play) -> None:
    async def scenario(village: Village) -> None:
        leaver = await village.found(experts=8, **LEAVES)
        heir = await village.join(1, await leaver.swarm.invite(), experts=0, spare=3)
        for node in (leaver, heir):
            await village.run(node)
        await train(leaver, dict.fromkeys(UIDS, 2))
        alone = await leaver.hosting.release(600)
        assert alone == 5
        assert len(heir.runtime.experts) == total(leaver.hosting.handed_over) == 3
        assert await leaver.replicas.checkpoints.newest() == dict.fromkeys(UIDS, 2)
        assert not leaver.runtime.experts

    play(scenario)


@pytest.mark.parametrize(
    ("spare", "accepts"), [(0, 0), (8, 0), (8, 1)], ids=["full", "refuses", "accepts-one-and-takes-none"]
)
def test_if_the_first_nodes_that_it_reads_do_not_take_all_a_leaving_node_reads_more(
    play: Play, monkeypatch: pytest.MonkeyPatch, spare: int, accepts: int
) -> None:
    """A large swarm has too many nodes to read all of them."""
    later_s = 0.0
    monkeypatch.setattr(
        "expert_server.hosting.manager.Handover",
        partial(Handover, clock=lambda: time.monotonic() + later_s),
    )

    async def scenario(village: Village) -> None:
        nonlocal later_s
        leaver = await village.found(experts=8, **LEAVES)
        invite = await leaver.swarm.invite()
        first = await village.join(1, invite, experts=0, spare=spare)
        second = await village.join(2, invite, experts=0, spare=8)
        for node in (leaver, first, second):
            await village.run(node)
        read: list[int] = []
        ask = leaver.replicas.states.ask

        async def read_some(swarm: Swarm, most: int) -> dict[PeerID, NodeInfo]:
            read.append(most)
            near = [first] if most == _HEIRS else [first, second]
            return await swarm.registry.nodes([node.swarm.host.peer_id for node in near])

        async def answer(node: NodeInfo, reason: Any, uids: Collection[UID], *args: Any) -> int:
            if node.peer_id != first.swarm.host.peer_id:
                return await ask(node, reason, uids, *args)
            return accepts if len(uids) == 8 else 0

        monkeypatch.setattr("expert_server.hosting.manager.some_nodes", read_some)
        monkeypatch.setattr(leaver.replicas.states, "ask", answer)
        leaving = asyncio.ensure_future(leaver.hosting.release(600))
        async with asyncio.timeout(8):
            while len(second.runtime.experts) < 8 - accepts:  # noqa: ASYNC110  # nothing says when it adopts one
                await asyncio.sleep(0.05)
        later_s = _CLAIM_WITHIN_S
        assert await leaving == 0
        assert read == [_HEIRS, _MOST_HEIRS]
        assert len(second.runtime.experts) == 8

    play(scenario)


def test_experts_find_the_first_heirs_though_no_more_can_be_read(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(village: Village) -> None:
        leaver = await village.found(experts=8, **LEAVES)
        heir = await village.join(1, await leaver.swarm.invite(), experts=0, spare=3)
        for node in (leaver, heir):
            await village.run(node)

        async def read_some(swarm: Swarm, most: int) -> dict[PeerID, NodeInfo]:
            if most == _MOST_HEIRS:
                raise UnreachableError("no DHT peer answered")
            return await swarm.registry.nodes([heir.swarm.host.peer_id])

        monkeypatch.setattr("expert_server.hosting.manager.some_nodes", read_some)
        assert await leaver.hosting.release(600) == 5
        assert len(heir.runtime.experts) == 3

    play(scenario)


def test_a_node_that_can_ask_nobody_does_not_say_that_nobody_hosts_its_experts(
    play: Play, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def unreachable(*_: object) -> dict[UID, tuple[Replica, ...]]:
        raise UnreachableError("no DHT peer answered")

    async def scenario(village: Village) -> None:
        caplog.set_level(logging.INFO)
        node = await village.found(experts=8, **LEAVES)
        monkeypatch.setattr(node.swarm.experts, "replicas", unreachable)
        await node.hosting.release(600)
        assert "gave up 8 experts, of which this node has checkpoints" in caplog.messages
        assert node.status().offline is None

    play(scenario)


@pytest.mark.parametrize("room", [8, pytest.param(0, marks=pytest.mark.slow)])
def test_no_host_is_lost_when_two_that_share_experts_leave_at_the_same_moment(play: Play, room: int) -> None:
    """Each has read that the other one serves them, and has averaged with it. A third node may have room for them."""

    async def scenario(village: Village) -> None:
        settings: dict[str, Any] = {"average_every_s": 600.0, **LEAVES}
        first = await village.found(experts=8, **settings)
        invite = await first.swarm.invite()
        second = await village.join(1, invite, experts=0, spare=4, **settings)
        assert len(await second.replicas.take(UIDS[:4], MAX_UPDATE_COUNT, enough=2)) == 4
        heir = await village.join(2, invite, experts=0, spare=room)
        await village.run(heir)
        both_have_averaged = asyncio.Barrier(2)

        async def leave(node: Node) -> int:
            async def average(others: Mapping[UID, Sequence[Replica]], silent: set[PeerID]) -> None:
                await node.averaging.average_last(others, silent)
                await both_have_averaged.wait()

            return await node.hosting.release(600, average)

        alone = await asyncio.gather(leave(first), leave(second))
        assert set(heir.runtime.experts) == set(UIDS[:room])
        assert sum(alone) == 0 if room else sum(alone) >= 8  # both may see that the other one leaves

    play(scenario)


def test_a_peer_that_does_not_answer_keeps_nobody_longer_than_the_timeout(play: Play) -> None:
    """That peer is announced and has room, but does not react to requests to adopt."""

    async def scenario(village: Village) -> None:
        leaver = await village.found(experts=8, **LEAVES)
        invite = await leaver.swarm.invite()
        deaf = await village.join(1, invite, experts=0, spare=8)
        deaf.averaging.accept_hint = lambda hint: len(hint.uids)  # type: ignore[method-assign]  # says yes, does nothing
        deaf.averaging._runs = True
        assert await leaver.hosting.release(1.0) == 8

    play(scenario)


@pytest.mark.parametrize("error", [TransferError("it is busy", answered=True), StateError("it is broken")])
def test_a_host_that_answers_but_can_not_be_averaged_with_still_serves(
    play: Play, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    async def scenario(village: Village) -> None:
        leaver = await village.found(experts=8, average_every_s=600.0, **LEAVES)
        other = await village.join(1, await leaver.swarm.invite(), experts=0, spare=8)
        assert len(await other.replicas.take(UIDS, MAX_UPDATE_COUNT, enough=2)) == 8

        async def fails(*_: Any) -> None:
            raise error

        monkeypatch.setattr(leaver.replicas.states, "fetch", fails)
        assert await leaver.hosting.release(600, leaver.averaging.average_last) == 0

    play(scenario)


@pytest.mark.slow
@pytest.mark.parametrize("has_failed", [True, False])
def test_a_partner_that_does_not_answer_holds_up_no_other_expert(
    play: Play, monkeypatch: pytest.MonkeyPatch, has_failed: bool
) -> None:
    """A node shares six experts with a partner that has frozen, one with another partner, and hosts one alone. None of
    its updates is lost, though the frozen partner is still announced. If its DHT node still answered, its experts are
    handed over after the averages.
    """
    averaging_s = 600.0 if has_failed else 4.0  # time for an average with the other partner
    monkeypatch.setattr("expert_server.hosting.averaging._LAST_AVERAGING_S", averaging_s)
    monkeypatch.setattr("expert_server.hosting.manager._AVERAGE_WITHIN_S", averaging_s / 2)
    monkeypatch.setattr("expert_server.hosting.whole_states._PATIENCE_S", 0.1)

    async def scenario(village: Village) -> None:
        averages: dict[str, Any] = {"average_every_s": 600.0}
        leaver = await village.found(experts=8, **averages, **LEAVES)
        invite = await leaver.swarm.invite()
        frozen = await village.join(1, invite, experts=0, spare=6, **averages)
        assert len(await frozen.replicas.take(UIDS[:6], MAX_UPDATE_COUNT, enough=2)) == 6
        partner = await village.join(2, invite, experts=0, spare=1, **averages)
        assert await partner.replicas.take([UIDS[6]], MAX_UPDATE_COUNT, enough=2)
        heir = await village.join(3, invite, experts=0, spare=8, replicas=2)
        for node in (partner, heir):
            await village.run(node)
        await train(leaver, dict.fromkeys(UIDS, 4))
        for node in (leaver, heir):
            unless_frozen(monkeypatch, node, frozen)
        failed = {frozen.swarm.host.peer_id} if has_failed else ()
        monkeypatch.setattr(leaver.swarm.host, "has_failed", failed.__contains__)
        stopping = asyncio.create_task(leaver.stop())

        async def others_have_all() -> bool:
            hosted = {**partner.runtime.experts, **heir.runtime.experts}
            return {uid: expert.update_count for uid, expert in hosted.items()} == dict.fromkeys(UIDS, 4)

        await eventually(others_have_all)
        assert set(partner.runtime.experts) == {UIDS[6]}
        leaver.hurry()
        await stopping

    play(scenario)


def test_a_leaving_nodes_expert_is_not_adopted_if_enough_others_serve_it(play: Play) -> None:
    async def scenario(village: Village) -> None:
        leaver = await village.found(experts=8, **LEAVES)
        invite = await leaver.swarm.invite()
        other, second = [await village.join(n, invite, experts=0, spare=2) for n in (1, 2)]
        assert len(await other.replicas.take(UIDS[:2], MAX_UPDATE_COUNT, enough=2)) == 2
        assert await second.replicas.take(UIDS[:1], MAX_UPDATE_COUNT, enough=3)
        heir = await village.join(3, invite, experts=0, spare=8, replicas=2)
        leaver.replicas.leave()
        await leaver.replicas.offer(UIDS)
        await heir.hosting.adopt_from(leaver.swarm.host.peer_id, UIDS)
        assert set(heir.runtime.experts) == set(UIDS[1:])

    play(scenario)


@pytest.mark.parametrize("is_asked", [True, False])
def test_no_expert_is_begun_anew_because_its_host_leaves_just_then(
    play: Play, monkeypatch: pytest.MonkeyPatch, is_asked: bool
) -> None:
    async def scenario(village: Village) -> None:
        leaver = await village.found(experts=8, **LEAVES)
        await train(leaver, dict.fromkeys(UIDS, 2))
        heir = await village.join(1, await leaver.swarm.invite(), experts=8)
        build = heir.replicas._build_for

        async def build_while_it_leaves(*arguments: Any) -> None:
            await leaver.hosting.release(0)
            await build(*arguments)

        monkeypatch.setattr(heir.replicas, "_build_for", build_while_it_leaves)
        leaver.replicas.leave()
        await leaver.replicas.offer(UIDS)
        if is_asked:
            await heir.hosting.adopt_from(leaver.swarm.host.peer_id, UIDS)
        else:
            await heir.hosting.replicate()
        assert not leaver.runtime.experts
        assert not heir.runtime.experts

    play(scenario)


def unless_frozen(monkeypatch: pytest.MonkeyPatch, node: Node, frozen: Node) -> None:
    """Lets calls by the node to the frozen one wait for ever."""

    def patch(name: str) -> None:
        call = getattr(node.replicas.states, name)

        async def wait_or_call(peer: NodeInfo, *more: Any, **options: Any) -> Any:
            if peer.peer_id == frozen.swarm.host.peer_id:
                await asyncio.Event().wait()
            return await call(peer, *more, **options)

        monkeypatch.setattr(node.replicas.states, name, wait_or_call)

    patch("fetch")
    patch("ask")


@pytest.mark.parametrize(("has_failed", "answer_within_s"), [(False, 0.5), (True, 600.0)])
def test_an_heir_that_does_not_answer_holds_up_no_other_and_one_that_failed_lately_is_asked_last(
    play: Play, monkeypatch: pytest.MonkeyPatch, has_failed: bool, answer_within_s: float
) -> None:
    monkeypatch.setattr("expert_server.hosting.manager._ANSWER_WITHIN_S", answer_within_s)

    async def scenario(village: Village) -> None:
        leaver = await village.found(experts=8, **LEAVES)
        invite = await leaver.swarm.invite()
        frozen = await village.join(1, invite, experts=0, spare=8)
        heir = await village.join(2, invite, experts=0, spare=8)
        await village.run(heir)
        unless_frozen(monkeypatch, leaver, frozen)
        failed = {frozen.swarm.host.peer_id} if has_failed else ()
        monkeypatch.setattr(leaver.swarm.host, "has_failed", failed.__contains__)
        assert await asyncio.wait_for(leaver.hosting.release(600), DEADLINE_S) == 0
        assert set(heir.runtime.experts) == set(UIDS)

    play(scenario)


def test_a_dht_that_fails_once_while_experts_are_left_to_others_ends_no_adoption(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(village: Village) -> None:
        leaver = await village.found(experts=8, **LEAVES)
        invite = await leaver.swarm.invite()
        other = await village.join(1, invite, experts=0, spare=2)
        assert len(await other.replicas.take(UIDS[:2], MAX_UPDATE_COUNT, enough=2)) == 2
        await other._publish_record()  # it has no room any more
        heir = await village.join(2, invite, experts=0, spare=6)
        for node in (other, heir):
            await village.run(node)
        look, failures = leaver.swarm.experts.replicas, count()

        async def fails_once(uids: Collection[UID], **options: Any) -> Mapping[UID, Sequence[Replica]]:
            if set(uids) == set(UIDS[:2]) and next(failures) == 0:
                raise UnreachableError("no DHT peer answered")
            return await look(uids, **options)

        monkeypatch.setattr(leaver.swarm.experts, "replicas", fails_once)
        assert await leaver.hosting.release(600, leaver.averaging.average_last) == 0
        assert next(failures) > 0
        assert set(heir.runtime.experts) == set(UIDS[2:])

    play(scenario)


def test_an_heir_whose_adoption_failed_is_asked_again(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the only node with room. It claims the experts, and their states then break off."""
    monkeypatch.setattr("expert_server.hosting.manager._CLAIM_WITHIN_S", 0.5)

    async def scenario(village: Village) -> None:
        leaver = await village.found(experts=8, **LEAVES)
        heir = await village.join(1, await leaver.swarm.invite(), experts=0, spare=8)
        for node in (leaver, heir):
            await village.run(node)
        fetch, pass_over, claims_seen = heir.replicas.states.fetch, Handover._pass_over, asyncio.Event()

        def note_claims(handover: Handover, replicas: Mapping[UID, Collection[Replica]]) -> None:
            pass_over(handover, replicas)
            if all(hosts_besides(leaver, hosts) for hosts in replicas.values()):
                claims_seen.set()

        async def fetch_unless_first(node: NodeInfo, uid: UID, *args: Any, **options: Any) -> Any:
            if not claims_seen.is_set():
                await asyncio.wait_for(claims_seen.wait(), DEADLINE_S)
                raise TransferError("it broke off", answered=True)
            return await fetch(node, uid, *args, **options)

        monkeypatch.setattr(Handover, "_pass_over", note_claims)
        monkeypatch.setattr(heir.replicas.states, "fetch", fetch_unless_first)
        assert await asyncio.wait_for(leaver.hosting.release(600), DEADLINE_S) == 0
        assert set(heir.runtime.experts) == set(UIDS)

    def hosts_besides(leaver: Node, hosts: Collection[Replica]) -> list[Replica]:
        return [replica for replica in hosts if replica.peer_id != leaver.swarm.host.peer_id]

    play(scenario)


def test_an_heir_adopts_also_while_it_looks_for_what_to_host(play: Play) -> None:
    """A node makes one look at a time, and the states that a look fetches may arrive slowly."""

    async def scenario(village: Village) -> None:
        leaver = await village.found(experts=8, **LEAVES)
        heir = await village.join(1, await leaver.swarm.invite(), experts=0, spare=8)
        for node in (leaver, heir):
            await village.run(node)
        await train(leaver, dict.fromkeys(UIDS, 1))
        async with heir.hosting._changing:
            assert await asyncio.wait_for(leaver.hosting.release(600), DEADLINE_S) == 0
        assert set(heir.runtime.experts) == set(UIDS)

    play(scenario)


def test_a_node_leaves_while_an_expert_of_others_is_fetched_to_prove_it(play: Play) -> None:
    async def scenario(village: Village) -> None:
        leaver = await village.found(experts=8, **LEAVES)
        joiner, uid = await village.join(1, await leaver.swarm.invite(), experts=0, spare=1), UIDS[0]
        assert await joiner.replicas.take([uid], MAX_UPDATE_COUNT, enough=2) == [uid]
        replicas = (await leaver.swarm.experts.replicas([uid]))[uid]
        (other,) = serving_elsewhere(replicas, leaver.swarm.host.peer_id)
        asked = asyncio.Event()

        async def never(*_: Any, **__: Any) -> Any:
            asked.set()
            await asyncio.Event().wait()

        leaver.replicas.states.fetch = never  # type: ignore[method-assign]  # a host that stalls
        proving = asyncio.create_task(leaver.replicas.are_given(uid, [other], 1))
        await asyncio.wait_for(asked.wait(), DEADLINE_S)
        leaver.replicas.leave()
        assert not await asyncio.wait_for(proving, DEADLINE_S)
        assert not await leaver.replicas.are_given(uid, [other], 1)

    play(scenario)


def test_a_host_that_announces_an_older_state_is_not_asked_to_prove_that_it_has_one(play: Play) -> None:
    async def scenario(village: Village) -> None:
        host = await village.found(experts=8, **LEAVES)
        joiner, uid = await village.join(1, await host.swarm.invite(), experts=0, spare=1), UIDS[0]
        assert await joiner.replicas.take([uid], MAX_UPDATE_COUNT, enough=2) == [uid]
        replicas = (await host.swarm.experts.replicas([uid]))[uid]
        (other,) = serving_elsewhere(replicas, host.swarm.host.peer_id)
        assert await host.replicas.are_given(uid, [other], 1)
        fetches = total(host.replicas.states.metrics.fetches)
        await train(host, {uid: 3})
        assert not await host.replicas.are_given(uid, [other], 1)
        assert total(host.replicas.states.metrics.fetches) == fetches
        assert not await host.replicas.are_given(uid, [replace(other, update_count=3)], 1), "it lies"

    play(scenario)


def test_what_is_being_taken_stays_claimed_though_a_renewal_failed(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("expert_server.hosting.replicas._ANNOUNCE_EVERY_S", 0.01)

    async def scenario(village: Village) -> None:
        host, uid = await village.found(experts=8, **LEAVES), UIDS[0]
        joiner = await village.join(1, await host.swarm.invite(), experts=0, spare=1, announce_every_s=0.5)
        states, experts = joiner.replicas.states, joiner.swarm.experts
        fetch, announce, times, renewed = states.fetch, experts.announce, count(), asyncio.Event()

        async def announce_unless_second(replicas: Collection[ReplicaAnnouncement], *more: Any) -> None:
            time = next(times) if replicas else 0
            if time == 1:
                raise ValueError("a bug")
            await announce(replicas, *more)
            if time == 2:
                renewed.set()

        async def fetch_late(*args: Any, **more: Any) -> Any:
            await asyncio.wait_for(renewed.wait(), DEADLINE_S)
            return await fetch(*args, **more)

        monkeypatch.setattr(experts, "announce", announce_unless_second)
        monkeypatch.setattr(states, "fetch", fetch_late)
        assert await joiner.replicas.take([uid], MAX_UPDATE_COUNT, enough=2) == [uid]

    play(scenario)


def test_a_hurried_node_waits_for_nobody(play: Play) -> None:
    async def scenario(village: Village) -> None:
        leaver = await village.found(experts=8, **LEAVES)
        invite = await leaver.swarm.invite()
        await village.join(1, invite, experts=0, spare=8)
        asked = asyncio.Event()

        async def never(*_: Any, **__: Any) -> int:
            asked.set()
            await asyncio.Event().wait()
            return 0

        leaver.replicas.states.ask = never  # type: ignore[method-assign]
        stopping = asyncio.create_task(leaver.stop())
        await asyncio.wait_for(asked.wait(), DEADLINE_S)
        assert leaver.status().state is NodeState.DRAINING
        leaver.hurry()
        await stopping

    play(scenario)


def test_a_node_hurried_while_it_withdraws_experts_withdraws_them_all_the_same(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(village: Village) -> None:
        leaver = await village.found(experts=8, **LEAVES)
        heir = await village.join(1, await leaver.swarm.invite(), experts=0, spare=8)
        for node in (leaver, heir):
            await village.run(node)
        withdraw, withdrawing = leaver.swarm.experts.withdraw, asyncio.Event()

        async def withdraw_unless_first(*arguments: Any) -> None:
            if not withdrawing.is_set():
                withdrawing.set()
                await asyncio.Event().wait()
            await withdraw(*arguments)

        monkeypatch.setattr(leaver.swarm.experts, "withdraw", withdraw_unless_first)
        releasing = asyncio.create_task(leaver.hosting.release(600))
        await asyncio.wait_for(withdrawing.wait(), DEADLINE_S)
        leaver.hosting.hurry()
        await releasing
        replicas = await heir.swarm.experts.replicas(UIDS)
        assert leaver.swarm.host.peer_id not in {r.peer_id for hosts in replicas.values() for r in hosts}

    play(scenario)


def test_a_node_hurried_before_it_has_looked_does_not_claim_that_nobody_else_serves_its_experts(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(village: Village) -> None:
        leaver = await village.found(experts=8, **LEAVES)
        looking = asyncio.Event()

        async def never(*_: Any, **__: Any) -> Mapping[UID, Sequence[Replica]]:
            looking.set()
            await asyncio.Event().wait()
            return {}

        monkeypatch.setattr(leaver.swarm.experts, "replicas", never)
        stopping = asyncio.create_task(leaver.stop())
        await asyncio.wait_for(looking.wait(), DEADLINE_S)
        leaver.hurry()
        await stopping
        assert leaver.hosting.offline is None

    play(scenario)


def test_a_leaving_node_looks_less_and_less_often_whether_its_experts_are_served(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("expert_server.hosting.manager._ANSWER_WITHIN_S", 600.0)
    monkeypatch.setattr("expert_server.hosting.manager._FIRST_PAUSE_S", 0.05)

    async def scenario(village: Village) -> None:
        leaver = await village.found(experts=8, **LEAVES)
        frozen = await village.join(1, await leaver.swarm.invite(), experts=0, spare=8)
        unless_frozen(monkeypatch, leaver, frozen)
        look, looks = leaver.swarm.experts.replicas, 0

        async def counted(uids: Collection[UID], **options: Any) -> Mapping[UID, Sequence[Replica]]:
            nonlocal looks
            looks += 1
            return await look(uids, **options)

        monkeypatch.setattr(leaver.swarm.experts, "replicas", counted)
        await leaver.hosting.release(1.0)
        assert 2 < looks < 12, "at twenty a second, it would be 20"

    play(scenario)


def test_a_leaving_replica_is_called_no_more_and_still_counts_as_a_host(play: Play) -> None:
    async def scenario(village: Village) -> None:
        node = await village.found(experts=8, **LEAVES)
        observer = await village.observe(1, await node.swarm.invite())
        node.replicas.leave()
        await node.replicas.offer(node.runtime.experts)
        await node.hosting.announce()
        view = await Directory(observer.experts, observer.manifest, refresh_every_s=60).refresh()
        assert view.live_experts() == 0
        assert {r.state for hosts in view.replicas.values() for r in hosts} == {ReplicaState.LEAVING}
        rows = Rows(torch.ones(1, 8), torch.tensor([1]), torch.tensor([0]))
        work = WorkItem(UIDS[0], "forward", rows, deadline=1e12, caller="test", group="test")
        with pytest.raises(ExpertError, match="this node is leaving"):
            node.runtime.enqueue(work)

    play(scenario)


def test_an_expert_whose_withdrawal_fails_is_still_announced(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(village: Village) -> None:
        node = await village.found(experts=2)
        uid = next(iter(node.runtime.experts))

        async def fail(*_: object) -> None:
            raise UnreachableError("the DHT does not answer")

        with monkeypatch.context() as patch:
            patch.setattr(node.swarm.experts, "withdraw", fail)
            with pytest.raises(UnreachableError):
                await node.replicas.release([uid])
        await train(node, {uid: 2})
        await node.hosting.announce()
        assert await announced(node, [uid]) == {uid: 2}

    play(scenario)


def test_experts_that_were_given_up_are_taken_again(play: Play) -> None:
    async def scenario(village: Village) -> None:
        node = await village.found(experts=5, **LEAVES)
        updates = dict.fromkeys(node.runtime.experts, 3)
        states = await train(node, updates)
        assert await node.hosting.release(5) == 5
        assert not node.runtime.experts
        assert await announced(node, UIDS) == {}
        await node.hosting.look()
        assert not node.runtime.experts
        await node.hosting.take_first()
        assert set(node.runtime.experts) == set(updates)
        await assert_hosted([node], states, updates)
        assert await announced(node, UIDS) == updates

    play(scenario)


def test_after_a_node_was_killed_the_others_still_have_what_it_replicated(play: Play) -> None:
    async def scenario(village: Village) -> None:
        first = await village.found(experts=8, replicas=2, announce_every_s=4.0)
        running = await village.run(first)
        states = await train(first, dict.fromkeys(UIDS, 2))
        await first.hosting.announce()
        second = await village.join(
            1, await first.swarm.invite(), experts=8, replicas=2, announce_every_s=4.0
        )
        assert not second.runtime.experts
        await village.run(second)

        async def replicated() -> bool:
            return len(second.runtime.experts) == 8

        await eventually(replicated)
        await end(running)
        await first.swarm.host.stop()  # no farewell
        await assert_hosted([second], states, dict.fromkeys(UIDS, 2))

    play(scenario)
