"""Replicas of one expert on real nodes: they take different updates, meet, and have the same state again."""

import asyncio
import random
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from callers import numbered_identities
from real_swarm import LOCAL, MANIFEST, UIDS, Play, Village, eventually, playing, serving, step, train

from dht.announcements import NodeInfo, Replica, ReplicaState
from dht.manifest import Manifest
from dht.swarm import join_swarm
from dht.uid import UID
from expert_server.experts.expert import Expert
from expert_server.experts.format import Checkpoint, State
from expert_server.hosting import whole_states
from expert_server.hosting.averaging import choose_partners
from expert_server.hosting.whole_states import choose
from expert_server.node import Node
from expert_server.state.checkpoints import CheckpointStore
from expert_server.state.transfer import Fetched
from peer.errors import StateError, TransferError
from peer.host import NetworkConfig
from peer.identity import Identity, PeerID
from peer.loop import LoopThread
from peer.metrics import total
from peer.wire import state_pb2

TWICE: dict[str, Any] = {"experts": 8, "replicas": 2}
AN_UID, OTHER_UID = UIDS[0], UIDS[5]
NAME = "block.attention_input.weight"


def fetched(node: Node) -> int:
    """How many states the node has fetched from others."""
    return int(total(node.replicas.states.metrics.fetches, outcome="fetched"))


@pytest.fixture(scope="module")
def identities() -> list[Identity]:
    return numbered_identities(4)


@pytest.fixture
def play(loop: LoopThread, identities: list[Identity], tmp_path: Path) -> Play:
    return playing(loop, identities, tmp_path)


async def couple(
    village: Village, updates: int, manifest: Manifest = MANIFEST, **settings: Any
) -> tuple[Node, Node]:
    """Two nodes that host the same experts, which took updates before the second node came."""
    first = await village.found(manifest=manifest, **TWICE, **settings)
    await train(first, dict.fromkeys(UIDS, updates))
    await first.hosting.announce()
    second = await village.join(1, await first.swarm.invite(), **TWICE, **settings)
    await second.hosting.replicate()
    return first, second


async def state_of(node: Node, uid: UID) -> State:
    return await node.runtime.run(node.runtime.experts[uid].export_state)


async def different_step(node: Node, uid: UID, move: float = 0.01) -> None:
    def take() -> None:
        expert = node.runtime.experts[uid]
        with torch.no_grad():
            expert.block.get_parameter(NAME.removeprefix("block.")).add_(move)
        step(expert)

    await node.runtime.run(take)


def way_gone(before: State, theirs: State, after: State) -> float:
    """How far weights moved from `before` towards `theirs`, as a share of the distance."""
    way, gone = (state[NAME].double() - before[NAME].double() for state in (theirs, after))
    share = float((gone * way).sum() / way.square().sum())
    torch.testing.assert_close(gone, share * way, atol=1e-6, rtol=1e-4)
    return share


async def meet(node: Node, other: Node, uid: UID) -> None:
    (info,) = (await node.swarm.registry.nodes([other.swarm.host.peer_id])).values()
    await node.averaging.meet(uid, info)


def test_a_joiner_replicates_what_has_one_replica_with_its_updates(play: Play) -> None:
    async def scenario(village: Village) -> None:
        first, second = await couple(village, 3)
        assert set(second.runtime.experts) == set(UIDS)
        for uid in UIDS:
            torch.testing.assert_close(
                await state_of(second, uid), await state_of(first, uid), atol=0, rtol=0
            )
        assert {e.update_count for e in second.runtime.experts.values()} == {3}
        assert set((await serving(first.swarm)).values()) == {2}
        assert second.status().replicated == 8
        assert fetched(second) == 8
        third = await village.join(2, await first.swarm.invite(), **TWICE)
        await third.hosting.replicate()
        assert len(third.runtime.experts) == 1, "two replicas of each are enough, but nobody idles"

    play(scenario)


def test_replicas_of_the_fewest_come_first_and_fill_the_room_alone(play: Play) -> None:
    async def scenario(village: Village) -> None:
        first = await village.found(**TWICE)
        invite = await first.swarm.invite()
        second = await village.join(1, invite, experts=5, spare=3, replicas=3)
        await second.hosting.replicate()
        assert len(second.runtime.experts) == 5, "spare room is for orphans"
        third = await village.join(2, invite, experts=4, replicas=3)
        await third.hosting.replicate()
        assert set(third.runtime.experts) >= set(UIDS) - set(second.runtime.experts)
        assert len(third.runtime.experts) == 4

    play(scenario)


@pytest.mark.parametrize("uid", UIDS[::3])
def test_a_node_that_returns_first_replicates_what_others_continued_from_older_states(
    play: Play, uid: UID
) -> None:
    """Whichever expert that is: with room for one of eight, it would otherwise take another."""

    async def scenario(village: Village) -> None:
        first = await village.found(**TWICE)
        await train(first, dict.fromkeys(UIDS, 20))
        await first.hosting.announce()
        back = await village.join(1, await first.swarm.invite(), experts=1, replicas=2)
        newer = await first.runtime.run(first.runtime.experts[uid].checkpoint)
        await back.replicas.checkpoints.keep(uid, Checkpoint(newer.state, 21))
        await back.hosting.replicate()
        assert {each: e.update_count for each, e in back.runtime.experts.items()} == {uid: 21}

    play(scenario)


def test_two_replicas_that_took_different_updates_meet_and_come_together(play: Play) -> None:
    async def scenario(village: Village) -> None:
        first, second = await couple(village, 2, average_every_s=60)
        await village.run(second)
        for _ in range(3):
            await different_step(first, AN_UID)
        await different_step(second, AN_UID, -0.01)
        before = await state_of(first, AN_UID), await state_of(second, AN_UID)
        await meet(first, second, AN_UID)

        async def averaged() -> bool:
            return total(second.averaging.averagings) == 1

        await eventually(averaged)
        after = await state_of(first, AN_UID), await state_of(second, AN_UID)
        # Since the second node fetched the state, they took 3 updates and 1. No replica has more than half of the
        # weight in an average.
        assert way_gone(before[0], before[1], after[0]) == pytest.approx(0.25, rel=1e-3)
        assert 0 < way_gone(before[1], before[0], after[1]) < 0.5, (
            "3 steps away is further than 1 step reaches"
        )
        first_count, second_count = (node.runtime.experts[AN_UID].update_count for node in (first, second))
        assert first_count == 5
        assert 3 <= second_count <= 4, "half of the 2 that the other has more, as far as it is believed"
        assert total(first.averaging.averagings) == 1

        await second.hosting.announce()
        seen = fetched(first)
        first.averaging._rng = random.Random(4)
        for _ in range(4):
            await first.averaging.average_some()
        assert fetched(first) - seen < 8, "the one that has just met is left out"

    play(scenario)


def test_updates_since_the_last_meeting_stay_when_their_node_leaves(play: Play) -> None:
    async def scenario(village: Village) -> None:
        first, second = await couple(village, 2, average_every_s=60, drain_timeout_s=20)
        await village.run(second)
        for _ in range(3):
            await different_step(first, AN_UID)
        await different_step(second, AN_UID, -0.01)
        before = await state_of(first, AN_UID), await state_of(second, AN_UID)
        await first.hosting.announce()
        await first.stop()

        async def averaged() -> bool:
            return not torch.equal((await state_of(second, AN_UID))[NAME], before[1][NAME])

        await eventually(averaged)
        assert 0 < way_gone(before[1], before[0], await state_of(second, AN_UID)) <= 0.5

    play(scenario)


def test_what_a_leaving_node_has_accumulated_is_in_the_last_average(play: Play) -> None:
    optimizer = MANIFEST.optimizer.model_copy(update={"rows_per_update": 10})
    manifest = MANIFEST.model_copy(update={"optimizer": optimizer})

    async def scenario(village: Village) -> None:
        first, second = await couple(village, 2, manifest=manifest, average_every_s=60, drain_timeout_s=20)
        await village.run(second)
        expert = second.runtime.experts[AN_UID]
        assert expert.update_count == 1, "a step of two calls of 5 rows"
        await train(first, {AN_UID: 1})
        for _ in range(2):
            await different_step(second, AN_UID)
        before = await state_of(second, AN_UID)
        await first.hosting.announce()
        await first.stop()

        async def averaged() -> bool:
            """Whether the other node has taken one more update."""
            return not torch.equal((await state_of(second, AN_UID))[NAME], before[NAME])

        await eventually(averaged)

    play(scenario)


async def three_full_nodes(village: Village) -> list[Node]:
    """The first two host all experts. The third has replicas of half of them."""
    brief: dict[str, Any] = {"experts": 4, "spare": 0, "replicas": 2, "announce_every_s": 2.0}
    first = await village.found(**brief)
    invite = await first.swarm.invite()
    nodes = [first, *[await village.join(number, invite, **brief) for number in (1, 2)]]
    await nodes[2].hosting.replicate()
    assert [len(node.runtime.experts) for node in nodes] == [4, 4, 4]
    return nodes


def test_full_nodes_drop_what_others_host_too_for_what_nobody_hosts(play: Play) -> None:
    async def scenario(village: Village) -> None:
        first, second, third = await three_full_nodes(village)
        for node in (first, second, third):
            await node.hosting.announce()  # on a busy machine, the first announcements may have expired
        staying = first, third
        for node in staying:
            await node.hosting.look()  # full nodes make room only for what they have seen hosted
            await village.run(node)
        await second.swarm.experts.withdraw(UIDS, 60)  # or it would take the lifetime of an announcement
        await second.swarm.host.stop()

        async def all_are_hosted() -> bool:
            return {uid for node in staying for uid in node.runtime.experts} == set(UIDS)

        await eventually(all_are_hosted)

    play(scenario)


def test_a_full_node_that_makes_room_for_what_nobody_hosts_continues_it_from_an_old_checkpoint(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if it gave that expert up long ago, so that it would otherwise remove the checkpoint at this moment."""
    give_up = CheckpointStore.give_up

    def forgetful(store: CheckpointStore, uids: Any, needed: Any) -> None:
        give_up(store, uids, needed, keep=0)

    async def scenario(village: Village) -> None:
        first, second, third = await three_full_nodes(village)
        staying = first, third
        alone = set(UIDS) - {uid for node in staying for uid in node.runtime.experts}
        await train(second, dict.fromkeys(alone, 3))
        for uid in alone:
            checkpoint = await second.runtime.run(second.runtime.experts[uid].checkpoint)
            for node in staying:
                await node.replicas.checkpoints.keep(uid, checkpoint)
                await node.replicas.checkpoints.give_up([uid], alone)
        monkeypatch.setattr(CheckpointStore, "give_up", forgetful)
        for node in (first, second, third):
            await node.hosting.announce()
        for node in staying:
            await node.hosting.look()
            await village.run(node)
        await second.swarm.experts.withdraw(UIDS, 60)
        await second.swarm.host.stop()

        async def all_are_hosted() -> bool:
            return {uid for node in staying for uid in node.runtime.experts} == set(UIDS)

        await eventually(all_are_hosted)
        adopted = {uid: e for node in staying for uid, e in node.runtime.experts.items() if uid in alone}
        assert {uid: expert.update_count for uid, expert in adopted.items()} == dict.fromkeys(alone, 3)

    play(scenario)


def test_updates_taken_while_two_meet_are_not_lost(play: Play) -> None:
    async def scenario(village: Village) -> None:
        first, second = await couple(village, 2)
        await train(second, {AN_UID: 1})
        theirs = await state_of(second, AN_UID)
        fetch = first.replicas.states.fetch

        async def train_and_fetch(*arguments: Any) -> Any:
            await train(first, {AN_UID: 4})
            return await fetch(*arguments)

        first.replicas.states.fetch = train_and_fetch  # type: ignore[method-assign, assignment]
        begun = await state_of(first, AN_UID)
        await meet(first, second, AN_UID)
        expert = first.runtime.experts[AN_UID]
        assert expert.update_count == 2 + 4, "half of one update more is none"
        alone = Expert(AN_UID, first.swarm.manifest)
        alone.import_state(begun, 2)
        for _ in range(4):
            step(alone)
        found, stepped = await state_of(first, AN_UID), alone.export_state()
        # Only the other has taken an update since they met, so it has half of the weight in the average.
        torch.testing.assert_close(found[NAME], stepped[NAME] + (theirs[NAME] - begun[NAME]) / 2)

    play(scenario)


def test_a_replica_that_was_rolled_back_meanwhile_is_not_averaged(play: Play) -> None:
    async def scenario(village: Village) -> None:
        first, second = await couple(village, 2)
        await train(second, {AN_UID: 1})
        fetch = first.replicas.states.fetch

        async def roll_back_and_fetch(*arguments: Any) -> Any:
            await first.runtime.run(first.runtime.experts[AN_UID].guard._roll_back)
            return await fetch(*arguments)

        first.replicas.states.fetch = roll_back_and_fetch  # type: ignore[method-assign, assignment]
        with pytest.raises(StateError, match="replaced or rolled back while"):
            await meet(first, second, AN_UID)
        assert first.runtime.experts[AN_UID].update_count == 2

    play(scenario)


def test_a_hint_that_the_dht_does_not_confirm_moves_nothing(play: Play) -> None:
    """A stranger sends requests under its own identity, and in the name of a node that is not leaving."""

    async def scenario(village: Village) -> None:
        first = await village.found(experts=3, replicas=2, average_every_s=60)
        invite = await first.swarm.invite()
        second = await village.join(1, invite, experts=0, spare=8, average_every_s=60)
        await village.run(second)
        await village.run(first)
        (info,) = (await first.swarm.registry.nodes([second.swarm.host.peer_id])).values()
        hosted = list(first.runtime.experts)
        states = {uid: await state_of(first, uid) for uid in hosted}
        assert await first.replicas.states.ask(info, state_pb2.ASK_REASON_ADOPT, hosted) == 3
        vacant = sorted(set(UIDS) - set(hosted))
        assert await first.replicas.states.ask(info, state_pb2.ASK_REASON_ADOPT, vacant) == 5
        (info,) = (await second.swarm.registry.nodes([first.swarm.host.peer_id])).values()
        accepted = await second.replicas.states.ask(
            info, state_pb2.ASK_REASON_AVERAGE, hosted[:1], b"a" * 32, b"b" * 32
        )
        assert accepted == 1

        async def followed() -> bool:
            return not first.averaging._hints._waiting and not second.averaging._hints._waiting

        await eventually(followed)
        async with second.hosting._changing:  # whatever it began is over
            assert not second.runtime.experts
        for uid, state in states.items():
            torch.testing.assert_close(await state_of(first, uid), state, atol=0, rtol=0)
        assert fetched(first) == fetched(second) == 0

    play(scenario)


def test_a_node_that_restarts_goes_on_from_a_fresher_replica(play: Play) -> None:
    async def scenario(village: Village) -> None:
        first, second = await couple(village, 2)
        await second.stop()
        states = await train(first, {AN_UID: 3})
        await first.hosting.announce()
        back = await village.join(1, await first.swarm.invite(), **TWICE)
        await back.hosting.replicate()
        counts = {uid: expert.update_count for uid, expert in back.runtime.experts.items()}
        assert counts == dict.fromkeys(UIDS, 2) | {AN_UID: 5}
        torch.testing.assert_close(await state_of(back, AN_UID), states[AN_UID], atol=0, rtol=0)
        assert fetched(back) == 1, "the others were on its disk"
        assert total(back.replicas.checkpoints.restored) == 7

    play(scenario)


def test_when_no_replica_gives_its_state_none_is_made_up(play: Play) -> None:
    async def scenario(village: Village) -> None:
        first = await village.found(**TWICE, announce_every_s=30)
        await train(first, dict.fromkeys(UIDS, 1))
        await first.hosting.announce()
        swarm = await join_swarm(village.identities[1], await first.swarm.invite(), NetworkConfig(LOCAL))
        second = await village.start(swarm, TWICE)
        assert first.swarm.host.server is not None
        await first.swarm.host.server.stop(None)  # it is still announced
        await second.hosting.replicate()
        assert not second.runtime.experts
        assert total(second.replicas.states.metrics.fetches, outcome="failed") >= 1
        assert set((await serving(second.swarm)).values()) == {1}

    play(scenario)


def test_a_node_first_averages_what_others_lack_most_and_passes_over_what_it_just_tried(play: Play) -> None:
    async def scenario(village: Village) -> None:
        first, _ = await couple(village, 1)
        tried: list[UID] = []

        async def fetch(_: NodeInfo, uid: UID, sha256: bytes = b"") -> Fetched:
            tried.append(uid)
            raise TransferError("the partner does not answer")

        first.replicas.states.fetch = fetch  # type: ignore[method-assign, assignment]
        await train(first, dict.fromkeys(UIDS, 1) | dict.fromkeys(UIDS[::2], 3))
        await first.averaging.average_some()
        assert sorted(tried) == sorted(UIDS[::2])
        await first.averaging.average_some()
        assert sorted(tried) == sorted(UIDS), (
            "half of all in each round, whether they could be averaged or not"
        )

    play(scenario)


def test_a_partner_that_freezes_for_a_while_does_not_make_averages_rare(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pauses follow the usual duration of averages, because that shows how slow the line is."""
    monkeypatch.setattr("expert_server.hosting.averaging._AT_ONCE", 1)
    durations: list[float] = []

    def pause_after(every_s: float, took_s: float, rng: random.Random) -> float:
        durations.append(took_s)
        return 0.01

    monkeypatch.setattr("expert_server.hosting.averaging.pause_after", pause_after)

    async def scenario(village: Village) -> None:
        first, _ = await couple(village, 1, average_every_s=60)
        now, tried = 0.0, list[UID]()
        fetch = first.replicas.states.fetch

        async def fetch_slowly(node: NodeInfo, uid: UID, sha256: bytes = b"") -> Fetched:
            nonlocal now
            tried.append(uid)
            now += 100 if uid == AN_UID else 1
            return await fetch(node, uid, sha256)

        monkeypatch.setattr(first.replicas.states, "fetch", fetch_slowly)
        monkeypatch.setattr(first.averaging, "_clock", lambda: now)
        averaging = asyncio.create_task(first.averaging._average_now_and_then())

        async def all_were_averaged_twice() -> bool:
            await train(first, dict.fromkeys(UIDS, 1))
            return all(tried.count(uid) >= 2 for uid in UIDS)

        await eventually(all_were_averaged_twice)
        averaging.cancel()
        assert 3 <= max(durations) <= 5, "half of eight, each in a second"

    play(scenario)


def test_partners_are_others_that_serve_and_about_half_of_the_experts_seek_one() -> None:
    me, *others = (PeerID(b"\x12\x20" + bytes([n]) * 32) for n in range(4))

    def hosts(uid: UID, *states: ReplicaState) -> list[Replica]:
        found = zip((me, *others), (ReplicaState.SERVING, *states), strict=False)
        return [Replica(uid, peer, state, 0, 0, 0.0, 1.0) for peer, state in found]

    def partners(hosts: dict[UID, list[Replica]]) -> list[Replica]:
        return choose_partners(hosts, me, lambda _: 0, random.Random(0))

    uids = [UID(0, (n, 0)) for n in range(400)]
    chosen = partners({uid: hosts(uid, ReplicaState.SERVING, ReplicaState.SERVING) for uid in uids})
    assert {replica.peer_id for replica in chosen} == set(others[:2])
    assert len(chosen) == 200
    assert len({replica.uid for replica in chosen}) == len(chosen)
    assert len({replica.uid.coordinate[0] // 10 for replica in chosen}) == 40, "random ones"
    for state in (ReplicaState.LEAVING, ReplicaState.CLAIMED):
        assert partners({uid: hosts(uid, state) for uid in uids}) == []
    assert partners({uid: hosts(uid) for uid in uids}) == []


def test_those_that_lack_the_most_updates_are_met_first() -> None:
    me, other = (PeerID(b"\x12\x20" + bytes([n]) * 32) for n in range(2))
    uids = [UID(0, (n, 0)) for n in range(9)]
    hosts = {uid: [Replica(uid, other, ReplicaState.SERVING, 0, 0, 0.0, 1.0)] for uid in uids}

    def unshared(replica: Replica) -> int | None:
        number = replica.uid.coordinate[0]
        return None if number == 8 else number

    numbers = [
        [replica.uid.coordinate[0] for replica in choose_partners(hosts, me, unshared, random.Random(seed))]
        for seed in range(40)
    ]
    assert all(found in ([7, 6, 5, 4], [7, 6, 5, 4, 3]) for found in numbers)
    assert {len(found) for found in numbers} == {4, 5}, "half of nine, on average"


def report(node: Node, uid: UID, here: int, elsewhere: int) -> None:
    """A trainer says that it got so many updates from the node, and from others."""
    reports = node.runtime.experts[uid].reports
    for call in range(here + 1):
        reports.note("a trainer", "a line", call + call * elsewhere // here)


@pytest.mark.parametrize("starts", ["the one left behind", pytest.param("the other", marks=pytest.mark.slow)])
def test_a_replica_that_trainers_left_behind_becomes_a_copy_of_the_other(play: Play, starts: str) -> None:
    async def scenario(village: Village) -> None:
        first, second = await couple(village, 2, average_every_s=3600)
        await village.run(first)
        await village.run(second)
        await different_step(second, AN_UID, -0.01)
        for _ in range(40):
            await different_step(first, AN_UID)
        report(first, AN_UID, 40, 1)
        for node in (first, second):
            await node.hosting.announce()
        for number in range(3):  # far away, again and again, and never too late
            before = await state_of(second, AN_UID), await state_of(first, AN_UID)
            report(second, AN_UID, 1, 40)
            pair = (second, first) if starts == "the one left behind" else (first, second)
            await meet(*pair, AN_UID)

            async def is_even(first_state: State = before[1]) -> bool:
                return torch.equal((await state_of(second, AN_UID))[NAME], first_state[NAME])

            await eventually(is_even)
            assert second.runtime.experts[AN_UID].update_count == 42 + 40 * number

            async def averaged(times: int = number + 1) -> bool:
                return total(first.averaging.averagings) == times

            await eventually(averaged)  # the few updates of the other one are in it
            assert 0 < way_gone(before[1], before[0], await state_of(first, AN_UID)) < 0.1
            for _ in range(40):
                await different_step(first, AN_UID)
            await different_step(second, AN_UID, -0.01)
            await first.hosting.announce()

    play(scenario)


def test_a_replica_that_is_called_as_often_as_the_other_never_becomes_a_copy(play: Play) -> None:
    async def scenario(village: Village) -> None:
        first, second = await couple(village, 2)
        await different_step(second, AN_UID, -0.01)
        for _ in range(40):
            await different_step(first, AN_UID)
        report(second, AN_UID, 40, 40)
        before = await state_of(second, AN_UID)
        await first.hosting.announce()
        await meet(second, first, AN_UID)
        assert total(second.averaging.refused) == 1, "whatever the other one says that it has taken"
        torch.testing.assert_close(await state_of(second, AN_UID), before, atol=0, rtol=0)

    play(scenario)


def test_what_was_restored_while_the_others_were_cut_off_gives_way_to_their_state(play: Play) -> None:
    async def scenario(village: Village) -> None:
        first, second = await couple(village, 2)
        await second.stop()
        await first.swarm.experts.withdraw(UIDS, 60)
        back = await village.join(1, await first.swarm.invite(), **TWICE)
        assert total(back.replicas.checkpoints.restored) == 8, "it saw no other host"
        for _ in range(40):
            await different_step(first, AN_UID)
        for uid in (AN_UID, OTHER_UID):
            await different_step(back, uid, -0.01)
        for node in (first, back):
            await node.hosting.announce()
        states = await state_of(first, AN_UID), await state_of(back, OTHER_UID)
        for uid in (AN_UID, OTHER_UID):
            await meet(back, first, uid)
        torch.testing.assert_close(await state_of(back, AN_UID), states[0], atol=0, rtol=0)
        assert back.runtime.experts[AN_UID].update_count == 42
        assert back.runtime.experts[OTHER_UID].update_count == 3, "the other replica is not ahead of this one"
        assert way_gone(states[1], await state_of(first, OTHER_UID), await state_of(back, OTHER_UID)) < 0.5

        await different_step(back, AN_UID, -0.01)
        before = await state_of(back, AN_UID)
        for _ in range(40):
            await different_step(first, AN_UID)
        await meet(back, first, AN_UID)
        torch.testing.assert_close(await state_of(back, AN_UID), before, atol=0, rtol=0)

    play(scenario)


def test_what_began_anew_while_its_hosts_were_down_gives_way_to_their_state(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trainers call it at once, so it takes updates even while it compares states."""

    async def scenario(village: Village) -> None:
        first = await village.found(**TWICE)
        await train(first, dict.fromkeys(UIDS, 2))
        await first.hosting.announce()
        await first.swarm.experts.withdraw([AN_UID], 60)
        second = await village.join(1, await first.swarm.invite(), **TWICE)
        await second.hosting.replicate()
        assert second.runtime.experts[AN_UID].update_count == 0, "it saw no other host"
        await different_step(second, AN_UID, -0.01)
        for node in (first, second):
            await node.hosting.announce()

        def choose_while_it_trains(*arguments: Any) -> tuple[int, Checkpoint]:
            step(second.runtime.experts[AN_UID])
            return choose(*arguments)

        monkeypatch.setattr(whole_states, "choose", choose_while_it_trains)
        await meet(second, first, AN_UID)
        torch.testing.assert_close(
            await state_of(second, AN_UID), await state_of(first, AN_UID), atol=0, rtol=0
        )

    play(scenario)


def test_an_expert_of_a_new_swarm_does_not_give_way_to_the_first_that_claims_more(play: Play) -> None:
    async def scenario(village: Village) -> None:
        first, second = await couple(village, 2)
        for _ in range(40):
            await different_step(second, AN_UID)
        await second.hosting.announce()
        await meet(first, second, AN_UID)
        assert total(first.averaging.refused) == 1
        assert first.runtime.experts[AN_UID].update_count == 2

    play(scenario)


def test_what_was_trained_here_does_not_give_way_to_the_only_other_host_once_it_was_restored_long_ago(
    play: Play,
) -> None:
    """A stranger that hosts the expert too, and claims more updates, could otherwise replace it at night."""

    async def scenario(village: Village) -> None:
        founder = await village.found(experts=0, spare=0)
        invite = await founder.swarm.invite()
        first = await village.join(1, invite, **TWICE)
        await first.hosting.replicate()
        await train(first, dict.fromkeys(UIDS, 3))
        await first.stop()
        first = await village.join(1, invite, **TWICE)
        assert total(first.replicas.checkpoints.restored) == 8
        stranger = await village.join(2, invite, **TWICE)
        await stranger.hosting.replicate()
        for _ in range(40):
            await different_step(stranger, AN_UID)
        first.replicas._provisional_since.clear()  # it was long ago
        for node in (first, stranger):
            await node.hosting.announce()
        before = await state_of(first, AN_UID)
        with suppress(TransferError, StateError):
            await meet(first, stranger, AN_UID)
        assert total(first.averaging.refused) == 1
        torch.testing.assert_close(await state_of(first, AN_UID), before, atol=0, rtol=0)

    play(scenario)
