"""The state of an expert: it is transferred whole, and nothing else is accepted in its place."""

from collections.abc import Callable

import pytest
import torch
from checkpoint_samples import MOMENT, WEIGHT, assert_same, changed, without
from expert_samples import AN_UID, backward, make_manifest, random_rows

from dht.manifest import OptimizerSpec
from expert_server.experts.expert import Expert
from expert_server.experts.format import State
from peer.errors import StateError


def train(expert: Expert, steps: int) -> None:
    """Takes optimizer steps that depend only on the update count."""
    for _ in range(steps):
        seed = 2 * expert.update_count
        backward(expert, random_rows(seed), random_rows(seed + 1))


def trained_expert(steps: int, optimizer: OptimizerSpec | None = None) -> Expert:
    manifest = make_manifest(warmup_updates=4)
    if optimizer is not None:
        manifest = manifest.model_copy(update={"optimizer": optimizer})
    expert = Expert(AN_UID, manifest)
    train(expert, steps)
    return expert


@pytest.mark.parametrize("steps", [0, 1, 5])
@pytest.mark.parametrize(
    "optimizer",
    [
        OptimizerSpec(),
        OptimizerSpec(name="adam"),
        OptimizerSpec(name="sgd"),
        OptimizerSpec(name="sgd", momentum=0.0),
    ],
    ids=["adamw", "adam", "sgd", "sgd without momentum"],
)
def test_an_imported_expert_trains_on_as_if_it_had_never_stopped(
    steps: int, optimizer: OptimizerSpec
) -> None:
    stayed, restored = trained_expert(steps, optimizer), trained_expert(2, optimizer)
    restored.import_state(trained_expert(steps, optimizer).export_state(), steps)
    assert restored.update_count == steps
    for expert in (stayed, restored):
        train(expert, 5)
    assert restored.update_count == stayed.update_count == steps + 5
    assert_same(restored.export_state(), stayed.export_state())


def test_an_exported_state_is_a_copy_and_so_is_an_imported_one() -> None:
    expert, other = trained_expert(1), trained_expert(0)
    state = expert.export_state()
    before = {name: tensor.clone() for name, tensor in state.items()}
    other.import_state(state, 1)
    train(expert, 1)
    train(other, 1)
    assert_same(state, before)
    assert not any(tensor.requires_grad for tensor in state.values())


SQUARES, STEPS = "optimizer.attention_input.weight.exp_avg_sq", "optimizer.attention_input.weight.step"
WRONG_STATES: dict[str, tuple[Callable[[State], State], str]] = {
    "empty": (lambda state: {}, "lacks"),
    "no weight": (without(WEIGHT), f"lacks '{WEIGHT}'"),
    "no moment": (without(MOMENT), f"lacks '{MOMENT}'"),
    "no step": (without(STEPS), "lacks"),
    "one more": (lambda state: state | {"block.more": torch.zeros(1)}, "has the unknown 'block.more'"),
    "shape": (changed(WEIGHT, lambda t: t.T.contiguous()), r"is \(\(16, 48\)"),
    "shape of a moment": (changed(MOMENT, lambda t: t[:1]), r"is \(\(1, 16\)"),
    "dtype": (changed(WEIGHT, lambda t: t.half()), "float16"),
    "dtype of a step": (changed(STEPS, lambda t: t.long()), "int64"),
    "NaN": (changed(WEIGHT, lambda t: t * float("nan")), f"'{WEIGHT}' .* not finite"),
    "infinite moment": (changed(MOMENT, lambda t: t + float("inf")), "not finite"),
    "negative square": (changed(SQUARES, lambda t: t - 1), "negative"),
    "negative step": (changed(STEPS, lambda t: t - 9), "negative"),
}


@pytest.mark.parametrize(("make_wrong", "message"), WRONG_STATES.values(), ids=WRONG_STATES)
def test_a_state_that_is_not_this_experts_is_refused_and_changes_nothing(
    make_wrong: Callable[[State], State], message: str
) -> None:
    expert = trained_expert(2)
    before = expert.export_state()
    with pytest.raises(StateError, match=message):
        expert.import_state(make_wrong(trained_expert(3).export_state()), 3)
    assert_same(expert.export_state(), before)
    assert expert.update_count == 2


@pytest.mark.parametrize(("steps", "update_count"), [(3, 0), (0, 3), (3, -1)])
def test_an_update_count_that_does_not_fit_the_moments_is_refused(steps: int, update_count: int) -> None:
    with pytest.raises(StateError, match=f"{update_count} updates don't fit moments of"):
        trained_expert(0).import_state(trained_expert(steps).export_state(), update_count)


def test_an_expert_that_is_not_finite_is_not_exported() -> None:
    expert = trained_expert(1)
    with torch.no_grad():
        next(expert.block.parameters()).fill_(float("nan"))
    with pytest.raises(StateError, match="not finite"):
        expert.export_state()
