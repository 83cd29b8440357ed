"""Two replicas that meet become one: the same on both sides, and no update of either is lost."""

import pytest
import torch
from checkpoint_samples import AN_UID, OTHER_UID, make_expert, step
from hivemind.p2p import PeerID
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dht.uid import UID
from expert_server.averaging import averaged
from expert_server.expert import State
from peer.meetings import Meetings, their_share

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
def test_the_shares_of_two_that_meet_add_up_to_one(mine: int, theirs: int, met: int) -> None:
    share = their_share(mine, theirs, met)
    assert 0 <= share <= 1
    assert share + their_share(theirs, mine, met) == pytest.approx(1)


def test_who_took_more_updates_since_the_meeting_weighs_more() -> None:
    assert their_share(130, 110, 100) == 0.25
    assert their_share(100, 110, 100) == 1
    assert their_share(110, 100, 100) == 0
    assert their_share(5, 5, 0) == their_share(0, 0, 0) == their_share(7, 7, 7) == 0.5
    assert their_share(3, 9, 50) == 1, "one that went back to an older checkpoint has taken none since"


@given(states, states, counts, counts, counts)
def test_both_sides_come_to_the_same_state(mine: State, theirs: State, a: int, b: int, met: int) -> None:
    here = averaged(mine, mine, theirs, their_share(a, b, met))
    there = averaged(theirs, theirs, mine, their_share(b, a, met))
    torch.testing.assert_close(here, there)


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


def test_one_that_never_stepped_takes_over_the_moments_of_the_other() -> None:
    fresh, trained = make_expert(), make_expert(3)
    mine, theirs = fresh.export_state(), trained.export_state()
    share = their_share(fresh.update_count, trained.update_count, 0)
    torch.testing.assert_close(averaged(mine, mine, theirs, share), theirs)
    torch.testing.assert_close(averaged(theirs, theirs, mine, 1 - share), theirs)


def test_an_expert_goes_on_from_an_average() -> None:
    one, other = make_expert(3), step(make_expert(2), 4)
    first, second = one.export_state(), other.export_state()
    one.import_state(averaged(first, first, second, 0.4), 6)
    step(one, 2)
    assert one.update_count == 8
    assert one.guard.rollbacks == 0


def test_the_memory_of_meetings_is_bounded() -> None:
    meetings: Meetings[UID] = Meetings()
    peers = [PeerID(b"\x12\x20" + bytes([n]) * 32) for n in range(100)]
    for n, peer_id in enumerate(peers):
        meetings.note(AN_UID, peer_id, n)
    assert meetings.of(AN_UID) == {peer_id: n for n, peer_id in enumerate(peers) if n >= 68}
    assert meetings.of(OTHER_UID) == {}
    meetings.forget(AN_UID)
    assert meetings.of(AN_UID) == {}
