"""Two replicas that meet become equal, no update of either is lost, and no replica gets more weight than
is plausible.
"""

import asyncio
import random
from collections.abc import Collection
from statistics import median_high
from typing import Any

import torch
from checkpoint_samples import AN_UID, OTHER_UID, make_expert, step
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dht.announcements import Replica, ReplicaState
from dht.uid import UID
from expert_server.experts.format import State, moving_tensors
from expert_server.hosting.averaging import averaged, is_astray, pause_after, replicas_to_meet
from peer.averaging import (
    MAX_UPDATE_COUNT,
    AveragingHistory,
    Meeting,
    drawn_stale_last,
    is_behind,
    last_meeting,
    max_plausible_updates,
    partner_weight,
)
from peer.identity import PeerID

counts = st.integers(0, 10**6)
numbers = st.floats(-(2.0**20), 2.0**20, width=32)
NAMES = ("block.w", "optimizer.w.exp_avg", "optimizer.w.exp_avg_sq", "optimizer.w.step", "block.seen")


def tensor(name: str, values: list[float]) -> Tensor:
    if name == "block.seen":
        return torch.tensor([int(abs(value)) % 1000 for value in values])
    found = torch.tensor(values)
    if name.endswith(".step"):
        return found.abs().round()[0]
    return found.abs() if name.endswith("_sq") else found


states = st.fixed_dictionaries({name: st.lists(numbers, min_size=3, max_size=3) for name in NAMES}).map(
    lambda found: {name: tensor(name, values) for name, values in found.items()}
)
radii = st.fixed_dictionaries({name: st.floats(0, 2.0**20) for name in NAMES})


@given(st.integers(1, 32))
def test_no_half_of_the_others_makes_a_replica_think_that_it_went_astray(others: int) -> None:
    assert not any(is_astray(refused, others) for refused in range(others // 2 + 1))
    assert is_astray(others, others) is (others > 1), "one that is far slower than all others"


@given(counts, counts, counts, counts)
def test_whatever_another_claims_it_is_half_of_an_average_at_most(
    mine: int, theirs: int, my_met: int, their_met: int
) -> None:
    share = partner_weight(mine, theirs, Meeting(my_met, their_met))
    assert 0 <= share <= 0.5
    back = partner_weight(theirs, mine, Meeting(their_met, my_met))
    assert 0.5 <= share + back <= 1, "the two come nearer"


@given(counts, st.integers(0, 10**15), st.lists(st.floats(0, 100), max_size=20))
def test_claims_grow_an_update_count_no_faster_than_anybody_trains(
    mine: int, claimed: int, pauses: list[float]
) -> None:
    now, count = 0.0, mine
    meetings: AveragingHistory[UID] = AveragingHistory(lambda: now)
    for pause_s in pauses:
        now += pause_s
        believed = meetings.capped_claim(AN_UID, count, claimed)
        assert believed <= claimed
        count = max(count, believed)
        meetings.record(AN_UID, PeerID(b"\x12\x20" + bytes(32)), count, believed)
    assert count <= mine + 100 * sum(max(pause_s, 10) for pause_s in pauses)


@given(st.lists(counts, min_size=2, max_size=8), st.integers(1, 10**15), st.integers(0, 2**32))
def test_of_three_none_comes_first_for_claiming_most(honest: list[int], more: int, seed: int) -> None:
    rng, liar = random.Random(seed), max(honest) + more
    claims = [*honest, liar]
    first = {drawn_stale_last(claims, int, rng)[0] for _ in range(64)}
    assert first - {liar}, "an honest one may be the first"
    assert not is_behind(min(first), median_high(claims))
    assert max_plausible_updates(claims) <= max(honest) + 30_000


@given(st.floats(1, 1e3), st.floats(0, 1e4), st.randoms(use_true_random=False))
def test_averaging_takes_a_third_of_the_time_at_most(
    every_s: float, took_s: float, rng: random.Random
) -> None:
    assert every_s / 2 <= pause_after(every_s, 0.0, rng) <= 1.5 * every_s
    assert took_s <= 0.334 * (took_s + pause_after(every_s, took_s, rng))


def test_who_took_more_updates_since_the_meeting_weighs_more() -> None:
    met = Meeting(100, 100)
    assert partner_weight(130, 110, met) == 0.25
    assert partner_weight(110, 120, met) == 0.5
    assert partner_weight(110, 100, met) == 0
    for count in (5, 7):
        assert partner_weight(count, count, Meeting(count, count)) == 0.5
    assert partner_weight(60, 3, Meeting(50, 50)) == 0, (
        "one that went back to an older state has taken none since"
    )
    assert partner_weight(150, 90, Meeting(100, 40)) == 0.5, "both took 50, whatever counts they went on with"


def test_a_meeting_is_dated_by_what_each_went_on_with() -> None:
    assert last_meeting(None, 0) == Meeting(0, 0)
    assert last_meeting(None, 30) == Meeting(30, 30), "this peer restarted, and the other did not"
    assert last_meeting(Meeting(20, 10), 0) == Meeting(20, 10), "the other restarted"
    assert last_meeting(Meeting(20, 10), 15) == Meeting(20, 15), (
        "the other believed some of this peer's updates"
    )


def merged(current: State, base: State, theirs: State, share: float) -> State:
    """The average if nothing is clipped."""
    return averaged(current, base, theirs, dict.fromkeys(current, 1e12), share, MAX_UPDATE_COUNT)[0]


@given(states, states, counts, counts)
def test_both_sides_come_nearer_and_to_the_same_state_after_as_many_updates(
    mine: State, theirs: State, a: int, b: int
) -> None:
    here = merged(mine, mine, theirs, partner_weight(a, b, Meeting(0, 0)))
    there = merged(theirs, theirs, mine, partner_weight(b, a, Meeting(0, 0)))
    name = "block.w"
    if a == b:
        torch.testing.assert_close(here[name], there[name])
    before, after = (mine[name] - theirs[name]).abs(), (here[name] - there[name]).abs()
    assert (after <= before / 2 + 1).all(), "within what float32 holds"


@given(states, radii, st.floats(0, 0.5))
def test_equal_states_stay_as_they_are(state: State, radii: dict[str, float], share: float) -> None:
    found, _ = averaged(state, state, state, radii, share, MAX_UPDATE_COUNT)
    torch.testing.assert_close(found, state, atol=0, rtol=0)


@given(states, states, radii, st.floats(0, 0.5), st.integers(0, 10**15))
def test_an_average_moves_each_tensor_by_half_its_radius_at_most_and_has_its_type(
    mine: State, theirs: State, radii: dict[str, float], share: float, most_steps: int
) -> None:
    found, belief = averaged(mine, mine, theirs, radii, share, most_steps)
    assert 0 <= belief <= 1
    assert {name: t.dtype for name, t in found.items()} == {name: t.dtype for name, t in mine.items()}
    for name in moving_tensors(mine):
        rounding = 1e-6 * float(mine[name].norm() + found[name].norm())
        assert float((found[name] - mine[name]).norm()) <= share * radii[name] + rounding
    assert (found["optimizer.w.step"] <= mine["optimizer.w.step"] + most_steps).all()
    torch.testing.assert_close(found["block.seen"], mine["block.seen"], rtol=0, atol=0)


@given(states, states, states, st.floats(0, 0.5))
def test_second_moments_stay_between_two_thirds_of_the_own_and_four_times(
    now: State, base: State, theirs: State, share: float
) -> None:
    found, own = merged(now, base, theirs, share)["optimizer.w.exp_avg_sq"], now["optimizer.w.exp_avg_sq"]
    assert (found >= own / 1.5).all()
    assert (found <= own * 4).all()


def test_a_first_moment_gets_no_larger_than_its_own_second_moment_explains() -> None:
    own = {"optimizer.w.exp_avg": torch.zeros(2), "optimizer.w.exp_avg_sq": torch.tensor([0.0, 1e-4])}
    theirs = {"optimizer.w.exp_avg": torch.ones(2), "optimizer.w.exp_avg_sq": torch.ones(2)}
    found = merged(own, own, theirs, 0.5)
    assert found["optimizer.w.exp_avg"][0] == 0, "or the next step would divide by nearly nothing"
    assert 0 < found["optimizer.w.exp_avg"][1] < 0.15


def test_updates_taken_while_the_other_came_are_kept() -> None:
    base, theirs, now = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 2.0]), torch.tensor([1.5, 2.5])
    found = merged({"block.w": now}, {"block.w": base}, {"block.w": theirs}, 0.5)
    assert found["block.w"].tolist() == [2.5, 2.5]


def test_the_optimizers_count_of_steps_grows_by_what_is_believed_of_the_other() -> None:
    def state(weight: float, steps: float) -> State:
        return {"block.w": torch.tensor([weight]), "optimizer.w.step": torch.tensor(steps)}

    def steps(theirs: State, radius: float, most_steps: int) -> float:
        now, base = state(0.0, 12.0), state(0.0, 10.0)
        found, _ = averaged(now, base, theirs, {"block.w": radius}, 0.5, most_steps)
        return float(found["optimizer.w.step"])

    assert steps(state(1.0, 30.0), 2.0, 100) == 12 + 10
    assert steps(state(1.0, 30.0), 0.25, 100) == 12 + 2, "a quarter of the way was believed"
    assert steps(state(1.0, 1e15), 2.0, 30) == 12 + 10, "no more than the update count that is believed"
    assert steps(state(1.0, 4.0), 2.0, 100) == 12


def test_one_that_never_stepped_counts_for_nothing() -> None:
    fresh, trained = make_expert(), make_expert(3)
    mine, theirs = fresh.export_state(), trained.export_state()
    share = partner_weight(trained.update_count, fresh.update_count, Meeting(0, 0))
    torch.testing.assert_close(merged(theirs, theirs, mine, share), theirs)
    found, belief = averaged(mine, mine, theirs, fresh.own_moves.radii({}), 0.5, 3)
    torch.testing.assert_close(found, mine, rtol=0, atol=0)
    assert belief == 0, "and believes nothing"


def test_an_expert_goes_on_from_an_average() -> None:
    one, other = make_expert(3), step(make_expert(2), 4)
    first, second = one.export_state(), other.export_state()
    one.import_state(merged(first, first, second, 0.4), 6)
    step(one, 2)
    assert one.update_count == 8
    assert one.guard.rollbacks == 0


def test_the_memory_of_meetings_is_bounded() -> None:
    meetings: AveragingHistory[UID] = AveragingHistory()
    peers = [PeerID(b"\x12\x20" + bytes([n]) * 32) for n in range(100)]
    for n, peer_id in enumerate(peers):
        meetings.record(AN_UID, peer_id, n, n + 1)
    assert meetings.of(AN_UID) == {peer_id: Meeting(n, n + 1) for n, peer_id in enumerate(peers) if n >= 68}
    assert meetings.of(OTHER_UID) == {}
    meetings.forget(AN_UID)
    assert meetings.of(AN_UID) == {}


def test_only_the_hosts_of_experts_that_nobody_else_was_seen_to_serve_are_read_before_an_average() -> None:
    me, other = (PeerID(b"\x12\x20" + bytes([n]) * 32) for n in range(2))
    uids = [UID(0, (n,)) for n in range(4)]

    def replica(uid: UID, host: PeerID, state: ReplicaState = ReplicaState.SERVING) -> Replica:
        return Replica(uid, host, state, 0, 0, 0.0, 1.0)

    seen = {
        uids[0]: [replica(uids[0], me), replica(uids[0], other)],
        uids[1]: [replica(uids[1], me), replica(uids[1], other, ReplicaState.CLAIMED)],
        uids[2]: [replica(uids[2], me)],
        UID(9, (9,)): [replica(UID(9, (9,)), other)],
    }
    read: list[UID] = []

    class Registry:
        async def replicas(self, wanted: Collection[UID]) -> dict[UID, tuple[Replica, ...]]:
            read.extend(wanted)
            return {uid: (replica(uid, other),) for uid in wanted}

    registry: Any = Registry()
    found = asyncio.run(replicas_to_meet(registry, uids, seen, me))
    assert read == uids[1:]
    assert found == {uids[0]: seen[uids[0]]} | {uid: (replica(uid, other),) for uid in uids[1:]}
