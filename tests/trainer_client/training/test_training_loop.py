"""The training loop, its schedule and its figures."""

import math
import statistics
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from byte_texts import byte_dataset
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from dht.manifest import Manifest
from peer.errors import RevokedInviteError, UserError
from trainer_client.model import LanguageModel
from trainer_client.settings import TrainerSettings
from trainer_client.training.loop import Training, learning_rate, validation_loss
from trainer_client.training.record import Progress, Summary, Validation, longest_stall

TEXT = b"In the sauna one must behave as in church. " * 60


class FailingModel(LanguageModel):
    """A model whose training losses are not finite in the given steps."""

    def __init__(self, bad_steps: range | set[int], value: float = math.nan) -> None:
        super().__init__(make_manifest(), lambda layer: nn.Identity())
        self.bad_steps = bad_steps
        self.value = value
        self.step = 0

    def loss(self, tokens_BT: Tensor, neighbours_BUNL: Tensor | None = None) -> Tensor:
        loss = super().loss(tokens_BT)
        if not self.training:
            return loss
        self.step += 1
        return loss * self.value if self.step in self.bad_steps else loss


class BadStepsModel(LanguageModel):
    """A model whose losses are not finite in steps with these numbers, whichever copy computes them."""

    def __init__(self, bad_steps: set[int]) -> None:
        super().__init__(make_manifest(), lambda layer: nn.Identity())
        self.bad_steps = bad_steps
        self.number = -1

    def begin_step(self, number: int) -> None:
        self.number = number

    def loss(self, tokens_BT: Tensor, neighbours_BUNL: Tensor | None = None) -> Tensor:
        bad = self.training and self.number in self.bad_steps
        return super().loss(tokens_BT) * (math.nan if bad else 1.0)


class SteepModel(LanguageModel):
    """A model whose loss is finite but whose gradient is not: a square root at 0."""

    def loss(self, tokens_BT: Tensor, neighbours_BUNL: Tensor | None = None) -> Tensor:
        return super().loss(tokens_BT) + (0 * self.head.weight.sum()).square().sqrt()


class Meeting(nn.Module):
    """In training, each call waits until this many threads are in it, as all would wait at once for distant experts."""

    def __init__(self, gate: threading.Barrier) -> None:
        super().__init__()
        self.gate = gate

    def forward(self, x_BTD: Tensor) -> Tensor:
        if self.training:
            self.gate.wait(60)
        return x_BTD


def make_manifest() -> Manifest:
    model = {"layers": 1, "hidden": 16, "heads": 2, "context": 16, "feed_forward": 32}
    return Manifest.model_validate({"name": "sauna", "model": model})


def make_settings(**given: Any) -> TrainerSettings:
    small = {"steps": 12, "batch_size": 4, "warmup_steps": 2, "learning_rate": 1e-2, "validation_batches": 2}
    return TrainerSettings.load(**(small | given))


def run(
    settings: TrainerSettings,
    model: LanguageModel | None = None,
    stop_after: int | None = None,
    clock: Iterator[float] | None = None,
) -> tuple[Summary, list[Progress]]:
    model = model or LanguageModel(make_manifest(), lambda layer: nn.Identity())
    seen: list[Progress] = []
    stop = threading.Event()

    def observe(progress: Progress) -> None:
        seen.append(progress)
        if progress.step == stop_after:
            stop.set()

    if stop_after == 0:
        stop.set()
    timed: dict[str, Any] = {} if clock is None else {"clock": lambda: next(clock)}
    summary = Training(model, byte_dataset(TEXT, 16), settings).run(observe, stop, **timed)
    return summary, seen


def run_in_flight(
    make_mixture: Callable[[int], nn.Module], stop_after: int | None = None, **given: Any
) -> tuple[Summary, list[Progress]]:
    def make_model() -> LanguageModel:
        return LanguageModel(make_manifest(), make_mixture)

    seen: list[Progress] = []
    stop = threading.Event()

    def observe(progress: Progress) -> None:
        seen.append(progress)
        if progress.step == stop_after:
            stop.set()

    training = Training(make_model(), byte_dataset(TEXT, 16), make_settings(**given), make_model)
    return training.run(observe, stop), seen


def test_training_lowers_the_loss_on_held_out_text() -> None:
    summary, seen = run(make_settings(steps=60))
    assert summary.steps == len(seen) == 60
    assert summary.validation_loss_last is not None
    assert summary.validation_loss_last < summary.validation_loss_first - 1
    assert summary.loss_first == seen[0].loss
    assert summary.loss_last == seen[-1].loss
    assert summary.skipped_steps == 0
    assert summary.tokens_per_s > 0


@pytest.mark.parametrize("in_flight", [3, "auto"])
def test_steps_in_flight_learn_too(in_flight: int | str) -> None:
    summary, seen = run_in_flight(lambda layer: nn.Identity(), steps=60, in_flight=in_flight)
    assert summary.steps == len(seen) == 60
    assert summary.validation_loss_last is not None
    assert summary.validation_loss_last < summary.validation_loss_first - 1
    assert [progress.step for progress in seen] == list(range(1, 61))


def test_steps_in_flight_wait_for_experts_at_the_same_time() -> None:
    gate = threading.Barrier(3)
    summary, seen = run_in_flight(lambda layer: Meeting(gate), steps=12, in_flight=3)
    assert summary.steps == 12
    assert max(progress.in_flight for progress in seen) == 3
    assert max(progress.staleness for progress in seen) >= 2
    assert summary.staleness is not None
    assert 0 < summary.staleness < 3


def test_a_bad_step_in_flight_is_skipped_and_costs_the_others_nothing() -> None:
    models: list[BadStepsModel] = []

    def make() -> LanguageModel:
        models.append(BadStepsModel({3, 7}))
        return models[-1]

    dataset = byte_dataset(TEXT, 16, seed=0)
    training = Training(make(), dataset, make_settings(in_flight=3), make)
    summary = training.run(lambda progress: None, threading.Event())
    assert (summary.steps, summary.skipped_steps) == (12, 2)
    assert training.part.age == 10, "what was skipped has taught nothing"
    assert all(parameter.isfinite().all() for parameter in models[0].parameters())


def test_training_with_steps_in_flight_stops_with_what_it_has() -> None:
    summary, seen = run_in_flight(lambda layer: nn.Identity(), stop_after=5, in_flight=4)
    assert summary.steps == len(seen) == 5


def test_equal_runs_give_equal_losses() -> None:
    first, second = run(make_settings())[1], run(make_settings())[1]
    assert [progress.loss for progress in first] == [progress.loss for progress in second]


def test_validation_comes_before_the_first_step_and_after_the_last() -> None:
    model = LanguageModel(make_manifest(), lambda layer: nn.Identity())
    batches = byte_dataset(TEXT, 16).validation_batches(4, 2)
    before = validation_loss(model, batches)
    summary, seen = run(make_settings(validate_every=0), model)
    assert summary.validation_loss_first == before
    assert summary.validation_loss_last == validation_loss(model, batches)
    assert [progress.step for progress in seen if progress.validation_loss is not None] == [12]


def test_each_validation_is_told_from_the_first_on_and_the_last_one_again_at_a_resume() -> None:
    model, told = LanguageModel(make_manifest(), lambda layer: nn.Identity()), list[Validation]()
    data, stop = byte_dataset(TEXT, 16), threading.Event()
    training = Training(model, data, make_settings(steps=12))
    summary = training.run(lambda progress: None, stop, validated=told.append)
    assert [validation.step for validation in told] == [0, 10, 12]
    assert (told[0].loss, told[-1].loss) == (summary.validation_loss_first, summary.validation_loss_last)
    assert told[-1].bits_per_byte == summary.bits_per_byte
    again, told_again = Training(model, data, make_settings(steps=13)), list[Validation]()
    again.history = training.history
    again.run(lambda progress: None, stop, validated=told_again.append)
    assert [validation.step for validation in told_again] == [12, 13]
    assert told_again[0] == told[-1]


def test_validation_comes_every_so_many_steps() -> None:
    _, seen = run(make_settings(validate_every=5))
    assert [progress.step for progress in seen if progress.validation_loss is not None] == [5, 10, 12]


def test_validation_takes_no_gradient_and_leaves_the_model_in_training() -> None:
    model = LanguageModel(make_manifest(), lambda layer: nn.Identity())
    validation_loss(model, byte_dataset(TEXT, 16).validation_batches(4, 2))
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_stop_ends_training_between_two_steps_with_what_it_has() -> None:
    summary, seen = run(make_settings(validate_every=2), stop_after=5)
    assert summary.steps == len(seen) == 5
    assert summary.loss_last == seen[-1].loss
    assert summary.validation_loss_last == seen[3].validation_loss


def training_without_experts(in_flight: int) -> Training:
    def make() -> LanguageModel:
        return LanguageModel(make_manifest(), lambda layer: nn.Identity())

    return Training(make(), byte_dataset(TEXT, 16), make_settings(in_flight=in_flight), make)


@pytest.mark.parametrize("in_flight", [1, 3])
def test_a_step_whose_check_fails_is_not_taken(in_flight: int) -> None:
    checks = 0

    def check() -> None:
        nonlocal checks
        checks += 1
        if checks == 5:
            raise RevokedInviteError("the token was revoked")

    training = training_without_experts(in_flight)
    with pytest.raises(RevokedInviteError):
        training.run(lambda progress: None, threading.Event(), check=check)
    assert training.step == training.part.age == 4
    assert training.export_state() is not None, "no step was interrupted"


@pytest.mark.parametrize("in_flight", [1, 3])
def test_training_that_is_interrupted_within_a_step_sums_up_what_it_has(in_flight: int) -> None:
    checks = 0

    def check() -> None:
        nonlocal checks
        checks += 1
        if checks == 5:
            raise KeyboardInterrupt

    def run(*interrupts: type[BaseException]) -> Summary:
        nonlocal checks
        checks = 0
        training = training_without_experts(in_flight)
        return training.run(lambda progress: None, threading.Event(), check=check, interrupts=interrupts)

    summary = run(KeyboardInterrupt)
    assert summary.steps == 4
    assert summary.loss_last is not None
    with pytest.raises(KeyboardInterrupt):
        run()


def test_stop_before_the_first_step_gives_an_empty_summary() -> None:
    summary, seen = run(make_settings(), stop_after=0)
    assert seen == []
    assert (summary.steps, summary.loss_first, summary.loss_last) == (0, None, None)
    assert (summary.tokens_per_s, summary.longest_stall_s) == (0, 0)
    assert summary.validation_loss_last is None  # it was measured before the first step only


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_step_with_a_loss_that_is_not_finite_is_skipped_and_counted(value: float) -> None:
    model = FailingModel({1, 4, 5, 12}, value)
    summary, seen = run(make_settings(), model)
    assert summary.skipped_steps == 4
    assert summary.steps == 12
    assert [p.step for p in seen if not math.isfinite(p.loss)] == [1, 4, 5, 12]
    assert (summary.loss_first, summary.loss_last) == (seen[1].loss, seen[10].loss)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_step_with_a_gradient_that_is_not_finite_changes_no_parameter() -> None:
    model = SteepModel(make_manifest(), lambda layer: nn.Identity())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    summary, _ = run(make_settings(steps=3), model)
    assert summary.skipped_steps == 3
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_training_ends_with_a_clear_error_after_ten_bad_steps_in_a_row() -> None:
    with pytest.raises(UserError, match=r"10 steps in a row, up to step 12: .*learning_rate"):
        run(make_settings(steps=30), FailingModel(range(3, 31)))


def test_nine_bad_steps_in_a_row_are_survived() -> None:
    summary, _ = run(make_settings(steps=20), FailingModel(range(2, 11)))
    assert (summary.steps, summary.skipped_steps) == (20, 9)


def test_figures_come_from_the_clock_and_leave_validation_out() -> None:
    # start; first validation done; steps 1 and 2; a validation; steps 3 and 4; the last validation; the end
    times = iter([0.0, 10.0, 20.0, 30.0, 130.0, 134.0, 140.0, 150.0, 151.0])
    summary, seen = run(make_settings(steps=4, validate_every=2), clock=times)
    assert [progress.step_s for progress in seen] == [10, 10, 4, 6]
    tokens = 4 * 16
    assert [progress.tokens_per_s for progress in seen] == [
        pytest.approx(tokens * steps / passed) for steps, passed in [(1, 10), (2, 20), (3, 24), (4, 30)]
    ]
    assert summary.tokens_per_s == pytest.approx(tokens * 4 / 30)
    assert summary.longest_stall_s == 10 - 6
    assert summary.seconds == 151


def test_stall_is_the_longest_interval_less_the_median() -> None:
    assert longest_stall([1.0, 1.2, 0.8, 9.0, 1.0]) == 8.0


@pytest.mark.parametrize("intervals", [[], [3.0], [2.0, 2.0, 2.0]])
def test_steady_steps_have_no_stall(intervals: list[float]) -> None:
    assert longest_stall(intervals) == 0


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50))
def test_a_stall_is_never_negative_nor_longer_than_the_longest_interval(intervals: list[float]) -> None:
    assert 0 <= longest_stall(intervals) <= max(intervals)
    assert longest_stall(intervals) + statistics.median(intervals) == pytest.approx(max(intervals))


def test_the_rate_rises_linearly_then_falls_as_a_cosine() -> None:
    settings = make_settings(steps=110, warmup_steps=10, learning_rate=1e-3)
    rates = [learning_rate(step, settings) for step in range(110)]
    assert rates[0] == pytest.approx(1e-4)
    assert rates[9] == pytest.approx(1e-3)
    assert rates[10] == pytest.approx(1e-3)
    assert rates[60] == pytest.approx(0.55e-3)
    assert rates[109] == pytest.approx(1e-4, rel=0.01)
    assert rates[10:] == sorted(rates[10:], reverse=True)


@given(st.integers(1, 50), st.integers(0, 60), st.integers(0, 60))
def test_the_rate_is_always_positive_and_never_above_the_highest(steps: int, warmup: int, step: int) -> None:
    settings = make_settings(steps=steps, warmup_steps=warmup, learning_rate=1e-3)
    assert 0 < learning_rate(step, settings) <= 1e-3 * (1 + 1e-9)


def test_accumulated_batches_make_the_step_of_one_large_batch() -> None:
    models = [LanguageModel(make_manifest(), lambda layer: nn.Identity()) for _ in range(2)]
    parts = run(make_settings(steps=3, batch_size=4, accumulate=3), models[0])
    whole = run(make_settings(steps=3, batch_size=12), models[1])
    assert [p.loss for p in parts[1]] == pytest.approx([p.loss for p in whole[1]], rel=1e-4)
    assert [p.epoch for p in parts[1]] == [p.epoch for p in whole[1]]
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict(), rtol=1e-3, atol=1e-4)


def test_one_bad_batch_of_several_skips_the_step() -> None:
    model = FailingModel({2}, math.nan)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    summary, _ = run(make_settings(steps=1, accumulate=3), model)
    assert summary.skipped_steps == 1
    assert model.step == 2
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_bfloat16_learns_and_leaves_parameters_in_float32() -> None:
    seen: set[torch.dtype] = set()

    class Watching(nn.Module):
        def forward(self, x_BTD: Tensor) -> Tensor:
            seen.add((x_BTD @ x_BTD.mT).dtype)
            return x_BTD

    model = LanguageModel(make_manifest(), lambda layer: Watching())
    summary, _ = run(make_settings(steps=60, precision="bf16"), model)
    assert torch.bfloat16 in seen
    assert summary.validation_loss_last is not None
    assert summary.validation_loss_last < summary.validation_loss_first - 1
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert {parameter.grad.dtype for parameter in model.parameters() if parameter.grad is not None} == {
        torch.float32
    }


def test_weight_decay_shrinks_matrices_and_no_biases_and_norms() -> None:
    models = [LanguageModel(make_manifest(), lambda layer: nn.Identity()) for _ in range(2)]
    for model, decay in zip(models, (0.0, 1.0), strict=True):
        run(make_settings(steps=1, warmup_steps=0, weight_decay=decay), model)
    plain, decayed = (dict(model.named_parameters()) for model in models)
    assert decayed["head.weight"].norm() < 0.995 * plain["head.weight"].norm()
    assert torch.equal(decayed["norm.weight"], plain["norm.weight"])


def test_perplexity_and_bits_per_byte_are_of_the_held_out_text() -> None:
    summary, seen = run(make_settings(validate_every=6))
    assert [(p.perplexity is None, p.bits_per_byte is None) for p in seen] == [
        (p.validation_loss is None,) * 2 for p in seen
    ]
    assert summary.validation_loss_last is not None
    assert summary.perplexity == pytest.approx(math.exp(summary.validation_loss_last))
    assert summary.bits_per_byte == pytest.approx(summary.validation_loss_last / math.log(2))
    assert seen[-1].perplexity == summary.perplexity
    stopped, _ = run(make_settings(steps=6), stop_after=2)
    assert (stopped.validation_loss_last, stopped.perplexity, stopped.bits_per_byte) == (None, None, None)


def test_progress_tells_how_long_it_takes_and_how_often_the_text_was_seen() -> None:
    times = iter([0.0, 10.0, 20.0, 30.0, 36.0, 44.0, 150.0, 151.0])
    _, seen = run(make_settings(steps=4), clock=times)
    assert [progress.left_s for progress in seen] == [30, 20, pytest.approx(26 / 3), 0]
    sequences = byte_dataset(TEXT, 16).sequences
    assert [progress.epoch for progress in seen] == [4 * step / sequences for step in range(1, 5)]


@pytest.mark.parametrize(
    ("key", "value"), [("steps", 0), ("k_min", 0), ("grace_s", -1), ("call_deadline_s", math.inf)]
)
def test_settings_out_of_bounds_are_refused(key: str, value: float) -> None:
    with pytest.raises(UserError, match=key):
        make_settings(**{key: value})
