"""Two replicas that meet come together, no update of either is lost, and none counts for more than it can be."""

import random

import torch
from checkpoint_samples import AN_UID, OTHER_UID, make_expert, step
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dht.uid import UID
from expert_server.experts.format import State
from expert_server.hosting.averaging import averaged
from peer.averaging import AveragingHistory, freshest_first, max_plausible_updates, partner_weight
from peer.identity import PeerID

counts = st.integers(0, 10**6)
numbers = st.floats(-(2.0**20), 2.0**20, width=32)
NAMES = ("block.w", "optimizer.w.exp_avg", "optimizer.w.exp_avg_sq", "optimizer.w.step", "block.seen")


def tensor(name: str, values: list[float]) -> Tensor:
    if name == "block.seen":
        return torch.tensor([int(abs(value)) % 1000 for value in values])
    found = torch.tensor(values)
    if name.endswith(".step"):
        return found.abs().round()
    return found.abs() if name.endswith("_sq") else found


states = st.fixed_dictionaries({name: st.lists(numbers, min_size=3, max_size=3) for name in NAMES}).map(
    lambda found: {name: tensor(name, values) for name, values in found.items()}
)


@given(counts, counts, counts)
def test_whatever_another_claims_it_is_half_of_an_average_at_most(mine: int, theirs: int, met: int) -> None:
    share = partner_weight(mine, theirs, met)
    assert 0 <= share <= 0.5
    assert 0.5 <= share + partner_weight(theirs, mine, met) <= 1, "the two come nearer"


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
        meetings.record(AN_UID, PeerID(b"\x12\x20" + bytes(32)), count)
    assert count <= mine + 100 * sum(max(pause_s, 10) for pause_s in pauses)


@given(st.lists(counts, min_size=2, max_size=8), st.integers(1, 10**15), st.integers(0, 2**32))
def test_of_three_none_is_the_freshest_for_claiming_most(honest: list[int], more: int, seed: int) -> None:
    rng, liar = random.Random(seed), max(honest) + more
    claims = [*honest, liar]
    first = {freshest_first(claims, int, rng)[0] for _ in range(64)}
    assert first - {liar}, "an honest one may be the first"
    assert min(first) >= min(honest)
    assert max_plausible_updates(claims) <= max(honest) + 30_000


def test_who_took_more_updates_since_the_meeting_weighs_more() -> None:
    assert partner_weight(130, 110, 100) == 0.25
    assert partner_weight(110, 120, 100) == 0.5
    assert partner_weight(110, 100, 100) == 0
    assert partner_weight(5, 5, 0) == partner_weight(0, 0, 0) == partner_weight(7, 7, 7) == 0.5
    assert partner_weight(9, 3, 50) == 0, "one that went back to an older checkpoint has taken none since"


@given(states, states, counts, counts, counts)
def test_both_sides_come_nearer_and_to_the_same_state_after_as_many_updates(
    mine: State, theirs: State, a: int, b: int, met: int
) -> None:
    here = averaged(mine, mine, theirs, partner_weight(a, b, met))
    there = averaged(theirs, theirs, mine, partner_weight(b, a, met))
    if a == b:
        torch.testing.assert_close(here, there)
    for name in ("block.w", "optimizer.w.exp_avg"):
        before, after = (mine[name] - theirs[name]).abs(), (here[name] - there[name]).abs()
        assert (after <= before / 2 + 1).all(), "within what float32 holds"


@given(states, st.floats(0, 1))
def test_equal_states_stay_as_they_are(state: State, share: float) -> None:
    torch.testing.assert_close(averaged(state, state, state, share), state, atol=0, rtol=0)


@given(states, states, st.floats(0, 1))
def test_an_average_lies_between_the_two_and_has_their_types(
    mine: State, theirs: State, share: float
) -> None:
    found = averaged(mine, mine, theirs, share)
    assert {name: t.dtype for name, t in found.items()} == {name: t.dtype for name, t in mine.items()}
    for name, result in found.items():
        assert (torch.minimum(mine[name], theirs[name]) <= result).all()
        assert (result <= torch.maximum(mine[name], theirs[name])).all()


@given(states, states, states, st.floats(0, 1))
def test_second_moments_never_become_negative(now: State, base: State, theirs: State, share: float) -> None:
    assert (averaged(now, base, theirs, share)["optimizer.w.exp_avg_sq"] >= 0).all()


def test_updates_taken_while_the_other_came_are_kept() -> None:
    base, theirs, now = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 2.0]), torch.tensor([1.5, 2.5])
    found = averaged({"block.w": now}, {"block.w": base}, {"block.w": theirs}, 0.5)
    assert found["block.w"].tolist() == [2.5, 2.5]


def test_the_optimizers_count_of_steps_is_the_larger_and_what_came_since() -> None:
    name = "optimizer.w.step"
    now, base, theirs = ({name: torch.tensor(count)} for count in (12.0, 10.0, 30.0))
    assert averaged(now, base, theirs, 0.1)[name] == 32
    assert averaged(now, base, {name: torch.tensor(4.0)}, 0.9)[name] == 12


def test_one_that_never_stepped_counts_for_nothing() -> None:
    fresh, trained = make_expert(), make_expert(3)
    mine, theirs = fresh.export_state(), trained.export_state()
    share = partner_weight(trained.update_count, fresh.update_count, 0)
    torch.testing.assert_close(averaged(theirs, theirs, mine, share), theirs)
    fresh.import_state(averaged(mine, mine, theirs, 0.5), trained.update_count)
    step(fresh)
    assert fresh.update_count == 4


def test_an_expert_goes_on_from_an_average() -> None:
    one, other = make_expert(3), step(make_expert(2), 4)
    first, second = one.export_state(), other.export_state()
    one.import_state(averaged(first, first, second, 0.4), 6)
    step(one, 2)
    assert one.update_count == 8
    assert one.guard.rollbacks == 0


def test_the_memory_of_meetings_is_bounded() -> None:
    meetings: AveragingHistory[UID] = AveragingHistory()
    peers = [PeerID(b"\x12\x20" + bytes([n]) * 32) for n in range(100)]
    for n, peer_id in enumerate(peers):
        meetings.record(AN_UID, peer_id, n)
    assert meetings.of(AN_UID) == {peer_id: n for n, peer_id in enumerate(peers) if n >= 68}
    assert meetings.of(OTHER_UID) == {}
    meetings.forget(AN_UID)
    assert meetings.of(AN_UID) == {}
