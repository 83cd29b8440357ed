"""Another peer's copy moves one's own no further than one's own updates do, whatever the copy and however many there
are.
"""

from math import hypot, log
from statistics import median

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peer.clipping import MEETINGS, OwnMoves, believed_updates, clip, distance

numbers = st.floats(-(2.0**100), 2.0**100, width=32)
tensors = st.fixed_dictionaries(
    {name: st.lists(numbers, min_size=3, max_size=3).map(torch.tensor) for name in "ab"}
)
ordinary = st.fixed_dictionaries(
    {name: st.lists(st.floats(-1, 1, width=32), min_size=3, max_size=3).map(torch.tensor) for name in "ab"}
)
radii = st.fixed_dictionaries({name: st.floats(0, 10) for name in "ab"})
shares = st.floats(0, 0.5)


def length(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor.double()))


@given(ordinary, tensors, radii, shares)
def test_a_meeting_moves_no_tensor_further_than_half_the_radius(
    mine: dict[str, Tensor], theirs: dict[str, Tensor], radii: dict[str, float], share: float
) -> None:
    found = clip(mine, mine, theirs, radii, share)
    assert 0 <= found.belief <= 1
    for name, tensor in mine.items():
        rounding = 1e-5 * (1 + radii[name])
        assert length(found.tensors[name] - tensor) <= share * radii[name] + rounding


@given(ordinary, st.lists(tensors, min_size=1, max_size=30), radii)
def test_colluders_move_a_tensor_by_half_the_radius_each_at_most(
    mine: dict[str, Tensor], hostile: list[dict[str, Tensor]], radii: dict[str, float]
) -> None:
    now = mine
    for theirs in hostile:
        now = clip(now, now, theirs, radii, 0.5).tensors
    for name, tensor in mine.items():
        assert length(now[name] - tensor) <= len(hostile) * (radii[name] / 2 + 1e-4)


@given(tensors, tensors, shares)
def test_within_the_radius_it_is_the_weighted_average(
    mine: dict[str, Tensor], theirs: dict[str, Tensor], share: float
) -> None:
    found = clip(mine, mine, theirs, dict.fromkeys("ab", 1e40), share)
    assert found.belief == pytest.approx(1 if distance(mine, theirs) else 0)
    for name, tensor in mine.items():
        expected = torch.lerp(tensor.double(), theirs[name].double(), share)
        torch.testing.assert_close(found.tensors[name], expected.float())


@given(tensors, radii, shares)
def test_equal_copies_stay_equal(mine: dict[str, Tensor], radii: dict[str, float], share: float) -> None:
    found = clip(mine, mine, mine, radii, share)
    torch.testing.assert_close(found.tensors, mine, rtol=0, atol=0)


@given(ordinary, ordinary, ordinary, radii, shares)
def test_what_changed_since_the_snapshot_is_kept(
    base: dict[str, Tensor],
    since: dict[str, Tensor],
    theirs: dict[str, Tensor],
    radii: dict[str, float],
    share: float,
) -> None:
    current = {name: tensor + since[name] for name, tensor in base.items()}
    found = clip(current, base, theirs, radii, share).tensors
    alone = clip(base, base, theirs, radii, share).tensors
    torch.testing.assert_close({n: found[n] - since[n] for n in found}, alone, rtol=1e-5, atol=1e-5)


@given(ordinary, ordinary, radii, shares)
def test_two_that_meet_come_nearer(
    mine: dict[str, Tensor], theirs: dict[str, Tensor], radii: dict[str, float], share: float
) -> None:
    here = clip(mine, mine, theirs, radii, share).tensors
    there = clip(theirs, theirs, mine, radii, share).tensors
    for name in mine:
        before, after = length(mine[name] - theirs[name]), length(here[name] - there[name])
        assert after <= before - 2 * share * min(before, radii[name]) + 1e-5


def test_a_tensor_that_never_moved_believes_nothing() -> None:
    mine, theirs = {"a": torch.zeros(3)}, {"a": torch.ones(3)}
    found = clip(mine, mine, theirs, {}, 0.5)
    torch.testing.assert_close(found.tensors, mine, rtol=0, atol=0)
    assert found.belief == 0


@settings(max_examples=25)
@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=40), st.lists(ordinary, min_size=40, max_size=40))
def test_the_radius_is_twice_the_median_of_own_moves_whatever_others_gave(
    steps: list[float], given_by_others: list[dict[str, Tensor]]
) -> None:
    moves, now = OwnMoves(), torch.zeros(4, dtype=torch.float64)
    moves.start({"a": now})
    for size, others in zip(steps, given_by_others, strict=False):
        now = now + torch.tensor([size, 0, 0, 0], dtype=torch.float64)
        present = moves.present({"a": now})
        found = moves.radii(present)
        now = now + 100 * others["a"][0]  # the meeting moved it, and that counts for nothing
        moves.note(present)
        moves.start({"a": now})
    assert found["a"] == pytest.approx(2 * median(steps[-MEETINGS:]), rel=1e-6)


def test_only_own_updates_are_moves() -> None:
    moves = OwnMoves()
    at = {"a": torch.ones(3)}
    assert moves.present(at) == {}, "nothing is known yet"
    assert not moves.are_none({})
    moves.start(at)
    assert moves.present(at) == {}, "it took no update"
    assert moves.are_none({})
    assert moves.present({"a": torch.zeros(3), "b": torch.zeros(3)}) == {"a": pytest.approx(3**0.5)}
    moves.note({"a": 1.0})
    moves.lose_start()
    assert moves.present({"a": torch.zeros(3)}) == {}, "a rollback is no move"
    assert moves.radii({}) == {"a": 2.0}
    assert not moves.are_none({})


def test_partners_without_end_move_an_idle_copy_by_a_few_radii() -> None:
    moves = OwnMoves()
    moves.note({"a": 1.0})
    radii = []
    for _ in range(100):
        radii.append(moves.radii({})["a"])
        moves.note({})
    assert radii[0] == 2
    assert sum(radii) / 2 < 1 + log(100)
    assert moves.radii({"a": 1.0})["a"] == 2, "an update of its own ends it"


def test_a_sketch_tells_distances_of_large_tensors() -> None:
    generator = torch.Generator().manual_seed(3)
    for shape in ((1021,), (1022,), (512, 300), (65_536,)):
        start = torch.randn(shape, generator=generator)
        noise = 0.01 * torch.randn(shape, generator=generator)
        for move in (noise, column_of(shape), torch.full(shape, 0.01)):
            moves = OwnMoves()
            moves.start({"a": start})
            (found,) = moves.present({"a": start + move}).values()
            assert found == pytest.approx(length(move), rel=0.1)


def column_of(shape: tuple[int, ...]) -> Tensor:
    """A move of one column, or of one number."""
    move = torch.zeros(shape)
    move[..., 0] = 1.0
    return move


def test_the_reach_is_of_all_tensors_together_and_grows_while_nobody_is_met() -> None:
    moves = OwnMoves()
    moves.note({"a": 3.0, "b": 4.0})
    assert moves.reach({}, "ab") == 8 * 2 * 5
    assert moves.reach({"a": 0.1}, "ab") == pytest.approx(8 * 2 * hypot((3 + 0.1) / 2, 4))
    assert moves.reach({"a": 30.0, "b": 40.0}, "ab") == 8 * 2 * 50
    assert moves.reach({}, "c") == 0


@given(st.integers(0, 10**15), st.integers(0, 10**15), shares, st.floats(0, 1))
def test_a_count_grows_by_believed_updates_alone(
    mine: int, claimed: int, share: float, belief: float
) -> None:
    found = believed_updates(mine, claimed, share, belief)
    assert mine <= found <= mine + max(0, claimed - mine) / 2
    assert believed_updates(mine, claimed, share, 0.0) == mine


@pytest.mark.parametrize(
    ("faster", "noisiness", "most", "refusals"),
    [(1, 3, 1.3, 0), (4, 3, 6, 0), (8, 3, 60, 70), (1, 30, 1.6, 0), (4, 30, 3, 0), (8, 30, 9, 0)],
)
def test_replicas_of_unequal_speed_stay_together(
    faster: int, noisiness: float, most: float, refusals: int
) -> None:
    """Both descend one slope with noisy gradients and meet after each round. Distances are in moves of the slower one.

    On a steep slope with little noise, a replica that is eight times as slow falls behind.
    """
    generator = torch.Generator().manual_seed(faster)
    size, rounds = 2000, 60
    copies, steps = [torch.zeros(size), torch.zeros(size)], (10, 10 * faster)
    moves, apart, refused = [OwnMoves(), OwnMoves()], [], 0
    for copy, own in zip(copies, moves, strict=True):
        own.start({"a": copy})
    target = torch.randn(size, generator=generator)
    for _ in range(rounds):
        for copy, count in zip(copies, steps, strict=True):
            for _ in range(count):
                noise = noisiness * torch.randn(size, generator=generator)
                copy += 1e-3 * (target - copy + noise).sign()
        states: list[dict[str, Tensor]] = [{"a": copy} for copy in copies]
        apart.append(distance(*states))
        for n, (own, theirs) in enumerate(zip(moves, reversed(states), strict=True)):
            present = own.present(states[n])
            if apart[-1] > own.reach(present, "a"):
                refused += 1
                continue
            share = min(0.5, steps[1 - n] / sum(steps))
            merged = clip(states[n], states[n], theirs, own.radii(present), share).tensors
            own.note(present)
            own.start(merged)
            copies[n] = merged["a"]
    slowest = moves[0].radii({})["a"] / 2
    assert max(apart) <= most * slowest
    assert refused <= refusals


@pytest.mark.parametrize("noisiness", [0.3, 3])
def test_a_steady_push_does_not_make_the_radius_grow_for_long(noisiness: float) -> None:
    """After each round of own updates, the only partner is hostile and as far away as permitted, always in one
    direction.

    Own updates pull back, and those are moves too. One of two hosts is not a minority: it costs half a radius each
    time.
    """
    generator = torch.Generator().manual_seed(5)
    size, moves = 2000, OwnMoves()
    copy, push = torch.zeros(size), torch.randn(size, generator=generator)
    push /= length(push)
    moves.start({"a": copy})
    radii = []
    for _ in range(200):
        for _ in range(10):
            copy += 1e-3 * (noisiness * torch.randn(size, generator=generator) - copy).sign()
        present = moves.present({"a": copy})
        radii.append(moves.radii(present)["a"])
        theirs = {"a": copy + 0.99 * moves.reach(present, "a") * push}
        merged = clip({"a": copy}, {"a": copy}, theirs, moves.radii(present), 0.5).tensors
        moves.note(present)
        moves.start(merged)
        copy = merged["a"]
    assert max(radii) <= 1.8 * radii[0]
    assert length(copy) <= sum(radii) / 2
