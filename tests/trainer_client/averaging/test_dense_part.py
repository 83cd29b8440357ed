"""What a trainer accepts of another's dense part, and how its own changes."""

import math
from collections.abc import Callable
from concurrent.futures import Future

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from peer.averaging import Meeting, partner_weight
from peer.errors import StateError
from trainer_client.averaging.dense_part import (
    MAX_AGE,
    DenseForm,
    DenseMerge,
    DensePart,
    PeerDensePart,
    SharedParameters,
    require_near,
)

SWARM = "sauna-QmFounder"
NEVER = Meeting(0, 0)

ages = st.integers(0, 10**6)
seeds = st.integers(0, 2**31)


def make_model(seed: int = 0, width: int = 5) -> nn.Module:
    torch.default_generator.manual_seed(seed)
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


def meet(one: SharedParameters, other: SharedParameters) -> None:
    """Both sides of a first meeting, as over the network."""
    mine, theirs = one.read(), other.read()
    merge(one, mine, theirs)
    merge(other, theirs, mine)


def merge(part: SharedParameters, mine: DensePart, theirs: DensePart) -> "Future[DenseMerge]":
    share = partner_weight(mine.age, theirs.age, NEVER)
    given = PeerDensePart(theirs.tensors, theirs.age, 0.0, part.moves_to(mine))
    return part.merge("other", mine, given, share)


def part_of(seed: int, age: int) -> SharedParameters:
    part = SharedParameters(trained(make_model(), seed), age)
    led_from_the_beginning(part)
    return part


def led_from_the_beginning(part: SharedParameters) -> None:
    """Makes it seem that own steps led from the common initial parameters to the present ones."""
    width = len(part.read().tensors["1.bias"])
    part._own_moves.start(tensors_of(make_model(width=width)))


@settings(max_examples=25)
@given(seeds, seeds, ages, ages)
def test_two_that_met_are_nearer_and_each_moved_no_further_than_by_own_steps(
    first: int, second: int, a: int, b: int
) -> None:
    one, other = part_of(first, a), part_of(second, b)
    start, mine, theirs = tensors_of(make_model()), one.read(), other.read()
    meet(one, other)
    take_step(one)
    take_step(other)
    here, there = one.read(), other.read()
    for found, was, met in ((here, mine, theirs), (there, theirs, mine)):
        assert was.age <= found.age - 1 <= max(a, b)
        share = partner_weight(was.age, met.age, NEVER)
        for name, tensor in was.tensors.items():
            way, own = met.tensors[name] - tensor, float((tensor - start[name]).norm())
            factor = min(1.0, 2 * own / float(way.norm())) if way.any() else 1.0
            torch.testing.assert_close(found.tensors[name], tensor + share * factor * way)


@settings(max_examples=25)
@given(seeds, st.floats(-1e30, 1e30), ages, st.integers(1, 20))
def test_whatever_others_give_they_move_a_tensor_no_further_than_own_steps_do(
    seed: int, number: float, claimed: int, meetings: int
) -> None:
    """This holds however many they are. The age does not grow where nothing was accepted."""
    part = part_of(seed, 10)
    before, start = part.read().tensors, tensors_of(make_model())
    lie = {name: torch.full_like(tensor, number) for name, tensor in before.items()}
    for _ in range(meetings):
        merge(part, part.read(), DensePart(lie, claimed))
        take_step(part)
    for name, tensor in part.read().tensors.items():
        most = meetings * float((before[name] - start[name]).norm())
        assert float((tensor - before[name]).norm()) <= 1.001 * most
    if abs(number) > 1e9:
        assert part.age <= 10 + meetings


def test_a_trainer_without_steps_of_its_own_believes_nobody() -> None:
    part = SharedParameters(make_model(), 10)
    before, theirs = part.read(), DensePart(tensors_of(trained(make_model(), 1)), 1000)
    part.require_in_reach(before, theirs.tensors, part.moves_to(before))
    merge(part, before, theirs)
    take_step(part)
    assert all(torch.equal(tensor, before.tensors[name]) for name, tensor in part.read().tensors.items())
    assert part.age == 11


def test_what_is_further_than_own_steps_explain_is_out_of_reach_until_they_explain_it() -> None:
    part = SharedParameters(make_model())
    far = {name: tensor + 1.0 for name, tensor in part.read().tensors.items()}
    take_step(part, 0.01)
    with pytest.raises(StateError, match="further"):
        part.require_in_reach(part.read(), far, part.moves_to(part.read()))
    for _ in range(9):
        take_step(part, -0.01)
    part.require_in_reach(part.read(), far, part.moves_to(part.read()))


def regression_loss(seed: int, radius: float | None = None) -> float:
    """The mean loss of two trainers that average every 5 of 150 steps, each with its own batches.

    `radius`: used for every tensor in place of the radii of `OwnMoves`.
    """
    parts = [SharedParameters(make_model(seed, 4)) for _ in range(2)]
    if radius is not None:
        for part in parts:
            everywhere = dict.fromkeys(part._tensors, radius)
            part._own_moves.radii = lambda _, radii=everywhere: radii  # type: ignore[method-assign, misc]  # plain averaging
    optimizers = [torch.optim.Adam(part.model.parameters(), 1e-2) for part in parts]
    batches = [torch.Generator().manual_seed(seed + 1 + number) for number in range(2)]
    noises = torch.Generator().manual_seed(seed)
    target = make_model(seed + 7, 4)

    def loss(part: SharedParameters, inputs: Tensor) -> Tensor:
        noise = 0.5 * torch.randn(len(inputs), 4, generator=noises)
        return nn.functional.mse_loss(part.model(inputs), target(inputs).detach() + noise)

    for step in range(150):
        for part, optimizer, generator in zip(parts, optimizers, batches, strict=True):
            optimizer.zero_grad()
            torch.autograd.backward(loss(part, torch.randn(16, 3, generator=generator)))
            with part.stepping():
                optimizer.step()
        if step % 5 == 4:
            one, other = (part.read() for part in parts)
            merge(parts[0], one, other)
            merge(parts[1], other, one)
    held_out = torch.randn(256, 3, generator=torch.Generator().manual_seed(seed))
    return float(sum(loss(part, held_out).item() for part in parts)) / 2


@pytest.mark.slow
def test_without_hostiles_the_loss_is_that_of_plain_averaging() -> None:
    losses = [(regression_loss(seed), regression_loss(seed, math.inf)) for seed in range(4)]
    clipped, plain = map(sum, zip(*losses, strict=True))
    assert abs(clipped / plain - 1) < 0.005


@given(seeds, ages, ages)
def test_equals_stay_equal_to_the_bit(seed: int, a: int, b: int) -> None:
    one, other = part_of(seed, a), part_of(seed, b)
    before = one.read().tensors
    meet(one, other)
    take_step(one)
    for name, tensor in one.read().tensors.items():
        assert torch.equal(tensor, before[name])


def test_steps_taken_meanwhile_are_kept() -> None:
    one, still, other = part_of(1, 10), part_of(1, 10), part_of(2, 10)
    for part, move in ((one, 0.25), (still, 0.0)):
        merge(part, part.read(), other.read())
        take_step(part, move)
    for name, tensor in one.read().tensors.items():
        torch.testing.assert_close(tensor, still.read().tensors[name] + 0.25)
    assert one.age == 11
    assert not still.moves_to(still.read())
    for name, move in one.moves_to(one.read()).items():
        assert move == pytest.approx(0.25 * tensors_of(one.model)[name].numel() ** 0.5), "part of the next"
    assert one.moves_to(one.read()).keys() == tensors_of(one.model).keys()


def test_nothing_changes_while_a_step_is_computed() -> None:
    """A forward pass may be under way, so averages are merged only at the end of an optimizer step."""
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
    done = merge(one, mine, other.read())
    done.cancel()
    take_step(one)
    assert all(torch.equal(tensor, mine.tensors[name]) for name, tensor in one.read().tensors.items())


@pytest.mark.parametrize("replaced_first", [False, True])
def test_an_average_that_began_before_the_part_was_replaced_changes_nothing(replaced_first: bool) -> None:
    """A trainer that joins may be called while it waits for the dense part that it starts from."""
    part, adopted = SharedParameters(make_model()), tensors_of(trained(make_model(), 1))
    base, theirs = part.read(), DensePart(tensors_of(trained(make_model(), 2)), 100)
    if replaced_first:
        part.replace(adopted, 100)
    done = merge(part, base, theirs)
    if not replaced_first:
        part.replace(adopted, 100)
    take_step(part)
    after = part.read()
    assert after.age == 101
    assert all(torch.equal(tensor, adopted[name]) for name, tensor in after.tensors.items())
    assert part.moves_to(after) == {}
    with pytest.raises(StateError, match="was replaced"):
        done.result(timeout=0)


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
    with pytest.raises(StateError, match="not the dense part that was offered"):
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
    torch.default_generator.manual_seed(0)
    mine = tensors_of(trained(make_model(), 1))
    with pytest.raises(StateError):
        require_near(mine, make(mine))


def test_a_part_is_read_as_a_copy() -> None:
    part = part_of(1, 3)
    read: DensePart = part.read()
    take_step(part, 1.0)
    assert read.age == 3
    assert not torch.equal(read.tensors["0.bias"], part.read().tensors["0.bias"])
