"""What of another trainer's dense part is taken, and what becomes of one's own then."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from peer.averaging import partner_weight
from peer.errors import StateError
from trainer_client.averaging.dense_part import MAX_AGE, DenseForm, DensePart, SharedParameters, require_near

SWARM = "sauna-QmFounder"

ages = st.integers(0, 10**6)
seeds = st.integers(0, 2**31)


def make_model(seed: int = 0, width: int = 5) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, width), nn.LayerNorm(width))


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return SharedParameters(model).read().tensors


def trained(model: nn.Module, seed: int, scale: float = 0.1) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def take_step(part: SharedParameters, move: float = 0.0) -> None:
    with part.stepping(), torch.no_grad():
        for parameter in part.model.parameters():
            parameter.add_(move)


def meet(one: SharedParameters, other: SharedParameters, met: int = 0) -> None:
    """Both sides of a meeting, as the wire would have it."""
    mine, theirs = one.read(), other.read()
    one.merge("other", mine, theirs.tensors, theirs.age, partner_weight(mine.age, theirs.age, met), 0.0)
    other.merge("one", theirs, mine.tensors, mine.age, partner_weight(theirs.age, mine.age, met), 0.0)


def part_of(seed: int, age: int) -> SharedParameters:
    return SharedParameters(trained(make_model(), seed), age)


@given(seeds, seeds, ages, ages)
def test_two_that_met_are_the_same_age_and_nearer(first: int, second: int, a: int, b: int) -> None:
    one, other = part_of(first, a), part_of(second, b)
    before = [part.read() for part in (one, other)]
    meet(one, other)
    take_step(one)
    take_step(other)
    here, there = one.read(), other.read()
    assert here.age == there.age == max(a, b) + 1
    for found, share in ((here, partner_weight(a, b, 0)), (there, 1 - partner_weight(b, a, 0))):
        for name in here.tensors:
            expected = (1 - share) * before[0].tensors[name] + share * before[1].tensors[name]
            torch.testing.assert_close(found.tensors[name], expected)


@given(seeds, ages, ages)
def test_equals_stay_equal_to_the_bit(seed: int, a: int, b: int) -> None:
    one, other = part_of(seed, a), part_of(seed, b)
    before = one.read().tensors
    meet(one, other)
    take_step(one)
    for name, tensor in one.read().tensors.items():
        assert torch.equal(tensor, before[name])


def test_steps_taken_meanwhile_are_kept() -> None:
    one, other = part_of(1, 10), part_of(2, 10)
    before = [part.read().tensors for part in (one, other)]
    meet(one, other)
    take_step(one, 0.25)
    for name, tensor in one.read().tensors.items():
        torch.testing.assert_close(tensor, (before[0][name] + before[1][name]) / 2 + 0.25)
    assert one.age == 11


def test_nothing_changes_while_a_step_is_computed() -> None:
    """A forward pass may be under way: only the end of an optimizer step merges."""
    one, other = part_of(1, 10), part_of(2, 10)
    before = one.read().tensors
    meet(one, other)
    assert all(torch.equal(tensor, before[name]) for name, tensor in one.read().tensors.items())
    assert one.take_merges() == []
    take_step(one)
    (merge,) = one.take_merges()
    assert (merge.peer, merge.share, merge.age) == ("other", 0.5, 11)
    assert one.take_merges() == []


def test_a_merge_that_nobody_waits_for_any_more_is_left_out() -> None:
    one, other = part_of(1, 10), part_of(2, 10)
    mine = one.read()
    done = one.merge("other", mine, other.read().tensors, 10, 0.5, 0.0)
    done.cancel()
    take_step(one)
    assert all(torch.equal(tensor, mine.tensors[name]) for name, tensor in one.read().tensors.items())


def test_a_broken_step_counts_for_nothing() -> None:
    part = part_of(1, 10)
    with pytest.raises(ZeroDivisionError), part.stepping():
        raise ZeroDivisionError
    assert (part.age, part.steps) == (10, 0)
    take_step(part)
    assert (part.age, part.steps) == (11, 1)


def test_subscribers_are_told_of_each_whole_step_until_they_leave() -> None:
    part, told = part_of(1, 10), [0, 0]

    def first() -> None:
        told[0] += 1

    def second() -> None:
        told[1] += 1

    leave = part.subscribe(first)
    part.subscribe(second)
    take_step(part)
    with pytest.raises(ZeroDivisionError), part.stepping():
        raise ZeroDivisionError
    assert told == [1, 1]
    leave()
    leave()
    take_step(part)
    assert told == [1, 2]


def test_lies_about_the_age_do_not_add_up() -> None:
    part = part_of(1, MAX_AGE)
    take_step(part)
    assert part.age == MAX_AGE


def test_the_form_is_of_shapes_types_names_and_meanings() -> None:
    form = DenseForm.of(make_model(1), SWARM, "bytes", "switch")
    assert form.fingerprint == DenseForm.of(make_model(2), SWARM, "bytes", "switch").fingerprint
    others = [
        DenseForm.of(make_model(width=6), SWARM, "bytes", "switch"),
        DenseForm.of(make_model().double(), SWARM, "bytes", "switch"),
        DenseForm.of(nn.Sequential(*reversed(list(make_model().children()))), SWARM, "bytes", "switch"),
        DenseForm.of(make_model(), "banya-QmFounder", "bytes", "switch"),
        DenseForm.of(make_model(), SWARM, "bpe", "switch"),
        DenseForm.of(make_model(), SWARM, "bytes", "base"),
    ]
    assert form.fingerprint not in {other.fingerprint for other in others}


def test_a_dense_part_comes_over_as_it_is() -> None:
    form, tensors = DenseForm.of(make_model(), SWARM), tensors_of(make_model())
    data = form.to_bytes(tensors, 7)
    assert len(data) <= form.max_bytes
    read = form.from_bytes(data, 7)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in read.items())


def changed(name: str, change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    tensors = tensors_of(make_model())
    return tensors | {name: change(tensors[name])}


def without(name: str) -> dict[str, Tensor]:
    return {other: tensor for other, tensor in tensors_of(make_model()).items() if other != name}


WRONG: dict[str, tuple[dict[str, Tensor], str]] = {
    "another shape": (changed("0.weight", lambda t: t.T.contiguous()), "tensors are not those"),
    "another type": (changed("0.weight", Tensor.double), "tensors are not those"),
    "one missing": (without("0.bias"), "tensors are not those"),
    "one more": (changed("0.bias", Tensor.clone) | {"gift": torch.zeros(2)}, "tensors are not those"),
    "NaN": (changed("0.weight", lambda t: t * math.nan), "not finite"),
    "infinite": (changed("1.bias", lambda t: t + math.inf), "not finite"),
}


@pytest.mark.parametrize(("tensors", "reason"), WRONG.values(), ids=WRONG)
def test_what_is_not_of_the_form_is_refused(tensors: dict[str, Tensor], reason: str) -> None:
    form = DenseForm.of(make_model(), SWARM)
    with pytest.raises(StateError, match=reason):
        form.from_bytes(form.to_bytes(tensors, 7), 7)


@pytest.mark.parametrize("age", [0, 8])
def test_what_is_not_as_old_as_was_offered_is_refused(age: int) -> None:
    form = DenseForm.of(make_model(), SWARM)
    with pytest.raises(StateError, match="another dense part than was offered"):
        form.from_bytes(form.to_bytes(tensors_of(make_model()), age), 7)


@given(seeds, st.floats(0.0, 0.3))
def test_what_was_trained_from_the_same_beginning_is_near(seed: int, scale: float) -> None:
    mine, theirs = tensors_of(make_model()), tensors_of(trained(make_model(), seed, scale))
    difference = require_near(mine, theirs)
    gap = math.sqrt(sum(float((mine[n] - theirs[n]).double().square().sum()) for n in mine))
    whole = math.sqrt(sum(float(tensor.double().square().sum()) for tensor in mine.values()))
    assert difference == pytest.approx(gap / whole, abs=1e-6)


FAR: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "zeros": lambda tensors: {name: torch.zeros_like(tensor) for name, tensor in tensors.items()},
    "much larger": lambda tensors: {name: 10 * tensor for name, tensor in tensors.items()},
    "the sign turned": lambda tensors: {name: -tensor for name, tensor in tensors.items()},
    "one tensor blown up": lambda tensors: tensors | {"0.bias": torch.full((5,), 1e4)},
    "noise": lambda tensors: {name: torch.randn(tensor.shape) * 0.5 for name, tensor in tensors.items()},
}


@pytest.mark.parametrize("make", FAR.values(), ids=FAR)
def test_what_no_training_makes_is_refused(
    make: Callable[[dict[str, Tensor]], dict[str, Tensor]],
) -> None:
    torch.manual_seed(0)
    mine = tensors_of(trained(make_model(), 1))
    with pytest.raises(StateError):
        require_near(mine, make(mine))


def test_a_part_is_read_as_a_copy() -> None:
    part = part_of(1, 3)
    read: DensePart = part.read()
    take_step(part, 1.0)
    assert read.age == 3
    assert not torch.equal(read.tensors["0.bias"], part.read().tensors["0.bias"])
