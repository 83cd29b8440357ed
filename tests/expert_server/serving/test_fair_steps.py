"""Whatever one caller sends, it gets only its share of an expert's steps, and its gradients do not drown out
others'.
"""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from runtime_samples import FIRST, HIDDEN, NEVER, make_runtime, submit, with_runtime

from dht.manifest import ExpertSpec, Manifest, ModelSpec, OptimizerSpec
from expert_server.experts.callers import Callers
from expert_server.experts.expert import Expert
from expert_server.experts.graphs import Rows
from expert_server.experts.guard import StepOutcome
from expert_server.serving.batching import Result, WorkItem
from expert_server.serving.compute import compute, compute_together
from expert_server.serving.runtime import Runtime
from peer.errors import ExpertError
from peer.metrics import total


def make_manifest(
    kind: str = "transformer", rows_per_update: int = 1, learning_rate: float = 3e-3
) -> Manifest:
    return Manifest(
        name="test",
        model=ModelSpec(layers=1, hidden=HIDDEN, heads=2, context=32, feed_forward=32),
        experts=ExpertSpec(grid=(2, 3), kind=kind),
        optimizer=OptimizerSpec(
            learning_rate=learning_rate, warmup_updates=0, rows_per_update=rows_per_update
        ),
    )


MANIFEST = make_manifest()


def work(caller: str, rows: int = 4, size: float = 1.0, seed: int = 0) -> WorkItem:
    inputs, gradients = torch.randn(2, rows, HIDDEN, generator=torch.Generator().manual_seed(seed)).unbind()
    part = Rows(inputs, torch.tensor([rows]), torch.arange(rows), size * gradients)
    return WorkItem(FIRST, "backward", part, NEVER, caller, caller)


def result_of(result: Result | ExpertError) -> Result:
    assert isinstance(result, Result)
    return result


def state_of(expert: Expert) -> torch.Tensor:
    expert.settle()
    return torch.cat([each.detach().flatten().clone() for each in expert.parameters])


def expert_with_one_over(caller: str = "tiny", rows_per_update: int = 1) -> Expert:
    """An expert with three callers, one of which has caused most of the steps with few rows."""
    expert = Expert(FIRST, make_manifest(rows_per_update=rows_per_update))
    for name in ("a", "b"):
        expert.callers.note_rows(name, name, 100, 4.0)
        expert.callers.note_step({name: 100})
    for _ in range(3):
        expert.callers.note_rows(caller, caller, 1, 4.0)
        expert.callers.note_step({caller: 1})
    assert expert.callers.is_held_back(caller)
    return expert


class _NoRule(Callers):
    def note_rows(self, caller: str, group: str, rows: int, size: float) -> float:
        return 1.0

    def note_direction(self, caller: str, rows: int, direction: NDArray[np.float64]) -> None:
        pass

    def is_held_back(self, caller: str) -> bool:
        return False


def test_an_expert_learns_beside_a_caller_that_floods_it_with_flipped_gradients() -> None:
    """That caller sends fifty tiny batches for each honest one, a thousand times as large. Four of the five callers are
    honest.
    """
    manifest = make_manifest("ffn", learning_rate=1e-2)
    unprotected = Expert(FIRST, manifest)
    unprotected.callers = _NoRule()
    first, *_, last = losses_beside_a_flood(make_runtime(unprotected), 6)
    assert last > 2 * first
    runtime = make_runtime(Expert(FIRST, manifest))
    first, *_, last = losses_beside_a_flood(runtime, 24)
    assert last < 0.5 * first
    assert total(runtime.metrics.updates) <= 1.3 * 24 + 1
    assert total(runtime.metrics.withheld_updates) >= 0.9 * 24 * 50
    assert total(runtime.metrics.clipped_rows) >= 0.9 * 24 * 50


@pytest.mark.slow
def test_an_expert_learns_beside_fifty_keys_of_one_line_that_flood_it() -> None:
    runtime = make_runtime(Expert(FIRST, make_manifest("ffn", learning_rate=1e-2)))
    first, *_, last = losses_beside_a_flood(runtime, 24, keys=50, group="one line")
    assert last < 0.5 * first


def test_many_keys_of_one_line_buy_no_steps_by_gradients_of_many_sizes_in_one_batch() -> None:
    expert = Expert(FIRST, MANIFEST)
    for name in "abc":
        compute(expert, [work(name, 50)])
    batch = [replace(work(f"key {n}", 1, 100.0 ** (n - 6), n), group="one line") for n in range(7)]
    steps = [result_of(result).step for result in compute(expert, batch)]
    assert steps.count(StepOutcome.TAKEN) <= 2


@pytest.mark.parametrize("kind", ["ffn", "transformer"])
def test_gradients_of_flipped_signs_are_dropped_and_all_honest_ones_count(kind: str) -> None:
    """However large, in whole batches or in parts, from two callers of seven."""
    expert = Expert(FIRST, make_manifest(kind))
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(HIDDEN, HIDDEN, generator=generator) / HIDDEN**0.5
    withheld = Counter[str]()

    def call(caller: str, rows: Rows) -> None:
        sent = WorkItem(FIRST, "backward", rows, NEVER, caller, caller)
        withheld[caller[:4]] += result_of(compute(expert, [sent])[0]).withheld_update

    for _ in range(12):
        for number in range(7):
            inputs = torch.randn(64, HIDDEN, generator=generator)
            ones = torch.ones(64, dtype=torch.int64)
            part = Rows(inputs, ones, torch.zeros_like(ones))
            error = expert.forward(part) - inputs @ target
            if number < 5:
                call(f"honest {number}", replace(part, gradients=error))
                continue
            size = 64 if number == 5 else 16
            for begin in range(0, 64, size):
                rows = slice(begin, begin + size)
                tensors = inputs[rows], ones[rows], part.positions[rows], -3 * error[rows]
                call(f"flipping {number}", Rows(*tensors))
    assert not withheld["hone"]
    assert withheld["flip"] >= 11 * (1 + 4)


def test_a_row_of_huge_inputs_hides_no_flipped_gradients() -> None:
    """Its norm overflows where gradients are compared. In the expert, it becomes a row of zeros."""
    expert = Expert(FIRST, make_manifest("ffn"))
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(HIDDEN, HIDDEN, generator=generator) / HIDDEN**0.5
    steps = list[StepOutcome]()
    for _ in range(12):
        for caller in ("a", "b", "c", "d", "flipping"):
            inputs = torch.randn(64, HIDDEN, generator=generator)
            ones = torch.ones(64, dtype=torch.int64)
            error = expert.forward(Rows(inputs, ones, torch.zeros_like(ones))) - inputs @ target
            if caller == "flipping":
                inputs[0], error[0] = 3.3e38 * (torch.arange(HIDDEN) % 2), 0
                error *= -3
            rows = Rows(inputs, ones, torch.zeros_like(ones), error)
            result = result_of(compute(expert, [WorkItem(FIRST, "backward", rows, NEVER, caller, caller)])[0])
            if caller == "flipping":
                steps.append(result.step)
    assert steps[1:] == [StepOutcome.WITHHELD] * 11


def losses_beside_a_flood(runtime: Runtime, turns: int, keys: int = 1, group: str = "") -> list[float]:
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(HIDDEN, HIDDEN, generator=generator) / HIDDEN**0.5
    losses = []

    async def gradients(rows: int) -> Rows:
        inputs = torch.randn(rows, HIDDEN, generator=generator)
        part = Rows(inputs, torch.ones(rows, dtype=torch.int64), torch.zeros(rows, dtype=torch.int64))
        updates = (await submit(runtime, WorkItem(FIRST, "forward", part, NEVER, "anybody", "a line"))).tensor
        error = updates - inputs @ target
        losses.append(float(error.square().mean()))
        return replace(part, gradients=2 * error / error.numel())

    async def scenario() -> None:
        for turn in range(turns):
            honest = await gradients(500)
            caller = f"honest {turn % 4}"
            await submit(runtime, WorkItem(FIRST, "backward", honest, NEVER, caller, caller))
            assert honest.gradients is not None
            for row in torch.arange(50)[:, None]:
                tiny = Rows(
                    honest.inputs[row],
                    honest.lengths[row],
                    honest.positions[row],
                    -1e3 * honest.gradients[row],
                )
                name = f"hostile {int(row) % keys}"
                await submit(runtime, WorkItem(FIRST, "backward", tiny, NEVER, name, group or name))

    with_runtime(runtime, scenario)
    return losses


def test_honest_callers_take_the_steps_that_they_took_without_the_rule() -> None:
    expert, plain = Expert(FIRST, MANIFEST), Expert(FIRST, MANIFEST)
    plain.callers = _NoRule()
    for seed in range(60):
        batch = [work(f"trainer {seed % 5}", 3 + seed % 4, 1.0, seed)]
        batch += [work(f"trainer {(seed + 1) % 5}", 4, 1.0, seed + 1)] * (seed % 3 == 0)
        for one, other in zip(compute(expert, batch), compute(plain, batch), strict=True):
            assert torch.equal(result_of(one).tensor, result_of(other).tensor)
    assert expert.update_count == plain.update_count == 60
    assert torch.equal(state_of(expert), state_of(plain))


@pytest.mark.parametrize("rows_per_update", [1, 6])
def test_a_caller_over_its_share_is_answered_and_takes_no_step(rows_per_update: int) -> None:
    expert, plain = expert_with_one_over(rows_per_update=rows_per_update), Expert(FIRST, MANIFEST)
    before = state_of(expert)
    sent = work("tiny", 1)
    result = result_of(compute(expert, [sent])[0])
    assert result.withheld_update
    torch.testing.assert_close(result.tensor, result_of(compute(plain, [sent])[0]).tensor)
    assert (expert.update_count, expert.accumulated_rows) == (0, 0)
    assert torch.equal(state_of(expert), before)
    assert not any("accumulated" in name for name in expert.export_state()), "it is no part of the state"


def test_others_take_their_step_beside_one_that_is_over() -> None:
    expert, plain = expert_with_one_over(), Expert(FIRST, MANIFEST)
    results = compute(expert, [work("tiny", 1), work("a", 8, seed=1)])
    assert [result_of(result).withheld_update for result in results] == [True, False]
    compute(plain, [work("a", 8, seed=1)])
    assert torch.equal(state_of(expert), state_of(plain))


@pytest.mark.parametrize("rows_per_update", [1, 6])
def test_what_was_withheld_is_in_no_later_step(rows_per_update: int) -> None:
    """Otherwise a caller that floods an expert could reverse others' steps with all that was withheld from it."""
    expert = expert_with_one_over(rows_per_update=rows_per_update)
    plain = Expert(FIRST, make_manifest(rows_per_update=rows_per_update))
    before = expert.export_state().keys()
    for seed in range(3):
        compute(expert, [work("tiny", 4, seed=seed)])
    assert expert.export_state().keys() == before, "no gradients wait"
    for _ in range(10):
        expert.callers.note_rows("b", "b", 10, 1.0)
        expert.callers.note_step({"b": 10})
    assert not expert.callers.is_held_back("tiny")
    for each in (expert, plain):
        assert result_of(compute(each, [work("a", 8, seed=2)])[0]).step is StepOutcome.TAKEN
    assert torch.equal(state_of(expert), state_of(plain))


def test_a_caller_does_not_end_what_others_accumulate_more_often_than_its_share() -> None:
    """It could do so with gradients of another size, which need a step of their own."""
    counts = []
    for callers in (Callers(), _NoRule()):
        expert = Expert(FIRST, make_manifest(rows_per_update=32))
        expert.callers = callers
        for turn in range(120):
            compute(expert, [work(f"honest {turn % 4}", 8, 1.0, turn)])
            compute(expert, [work("hostile", 1, 1e-3, turn)])
        counts.append(expert.update_count)
    fair, unfair = counts
    assert unfair >= 200
    assert fair <= (120 / 4 + 2) / (1 - 2 / 5)  # of each 5 steps one is the caller's, and ends another


def test_a_batch_that_fails_buys_its_caller_no_steps() -> None:
    """After a failed batch, each work is computed by itself."""
    expert = Expert(FIRST, MANIFEST)
    for name in "abc":
        compute(expert, [work(name, 50)])
    spoilt = work("hostile", 1)
    spoilt.rows.inputs.fill_(3e38)
    *results, failed = compute(expert, [*(work("hostile", 1, 1.0, seed) for seed in range(20)), spoilt])
    assert isinstance(failed, ExpertError)
    assert [result_of(result).withheld_update for result in results] == [False] * 2 + [True] * 18
    assert expert.update_count == 3 + 2


def test_narrow_experts_computed_together_hold_the_caller_back_as_well() -> None:
    uids = MANIFEST.uids()[:5]
    experts = [Expert(uid, MANIFEST) for uid in uids]
    for name in ("a", "b"):
        experts[1].callers.note_rows(name, name, 100, 1.0)
        experts[1].callers.note_step({name: 100})
    experts[1].callers.note_rows("tiny", "tiny", 1, 1.0)
    experts[1].callers.note_step({"tiny": 1})
    experts[1].callers.note_step({"tiny": 1})
    works = [replace(work("tiny", 3, 1e3 if n == 1 else 1.0, n), uid=uid) for n, uid in enumerate(uids)]
    results = [result_of(result) for result in compute_together(experts, works)]
    assert [each.withheld_update for each in results] == [n == 1 for n in range(5)]
    assert [each.is_clipped for each in results] == [n == 1 for n in range(5)]
    assert [expert.update_count for expert in experts] == [1, 0, 1, 1, 1]
    for sent, result in zip(works, results, strict=True):
        alone = result_of(compute(Expert(sent.uid, MANIFEST), [sent])[0])
        torch.testing.assert_close(result.tensor, alone.tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("size", [1e3, 1e30])
def test_the_answer_to_gradients_that_were_scaled_down_is_that_to_what_was_sent(size: float) -> None:
    """This holds where attention mixes the rows, too: all rows of a call are scaled alike."""
    expert, plain = Expert(FIRST, MANIFEST), Expert(FIRST, MANIFEST)
    for name in "ab":
        expert.callers.note_rows(name, name, 4, 1.0)
    sent = work("hostile", 6, size)
    result = result_of(compute(expert, [sent])[0])
    assert result.is_clipped
    (expected,), _ = plain.backward([sent.rows])
    torch.testing.assert_close(result.tensor, expected, rtol=1e-4, atol=1e-5 * size)
