"""Budgets: over any time, a caller gets at most its rate and one burst, and no other caller's budget is affected."""

import contextlib

import pytest
import torch
from grpc import StatusCode
from hypothesis import given
from hypothesis import strategies as st
from tls_expert_server import FIRST, MANIFEST, ROWS, Call, Edge, Runner, make, run

from dht.uid import UID
from expert_server.experts.accumulation import MOST_APART
from expert_server.experts.expert import Expert
from expert_server.experts.graphs import Rows
from expert_server.serving.batching import Direction, Result, WorkItem
from expert_server.serving.compute import by_size, compute
from expert_server.serving.servicer import BudgetLimits, Budgets
from expert_server.settings import NodeSettings
from peer.errors import ExpertError
from peer.metrics import total
from peer.rpc.calls import retry_after_s, retry_metadata

__all__ = ["run"]

EXPERT = UID(0, (0, 0))


def takes(
    budgets: Budgets, caller: str, now: float, rows: int = 1, direction: Direction = "backward"
) -> bool:
    with contextlib.suppress(ExpertError):
        budgets.take(caller, direction, rows, [EXPERT], now)
        return True
    return False


@given(st.lists(st.tuples(st.floats(0, 2), st.integers(1, 200)), max_size=80), st.floats(1, 1000))
def test_no_caller_gets_more_rows_than_its_rate_and_one_burst(
    calls: list[tuple[float, int]], rate: float
) -> None:
    budgets, now, got = Budgets(BudgetLimits(rows_per_s=rate)), 0.0, 0
    for pause_s, rows in calls:
        now += pause_s
        if takes(budgets, "flood", now, rows):
            got += rows
    assert got <= rate * (now + 5.0) + 200 + 1e-6  # the last call may be as large as it likes
    assert takes(budgets, "another", now, 200)


def test_who_comes_back_when_it_was_told_is_served() -> None:
    budgets = Budgets(BudgetLimits(updates_per_s=2.0))
    while takes(budgets, "a", 0.0):
        pass
    with pytest.raises(ExpertError, match="budget of optimizer steps") as caught:
        budgets.take("a", "backward", 1, [EXPERT], 0.0)
    assert caught.value.status is StatusCode.RESOURCE_EXHAUSTED
    assert takes(budgets, "a", 0.0, direction="forward")  # costs no step
    assert takes(budgets, "a", caught.value.retry_after_s)
    assert total(budgets.refused) == 2


def test_the_steps_of_one_expert_are_bounded_and_others_are_not_touched() -> None:
    budgets = Budgets(BudgetLimits(expert_updates_per_hour=60.0))
    done = sum(takes(budgets, "a", float(second)) for second in range(0, 7200, 10))
    assert 120 <= done <= 120 + 11  # two hours, and a burst of ten minutes
    budgets.take("a", "backward", 1, [UID(0, (1, 1))], 7200.0)


def test_without_limits_nothing_is_counted() -> None:
    budgets = Budgets(BudgetLimits())
    assert all(takes(budgets, str(n), 0.0, 10**9) for n in range(100))
    assert BudgetLimits.of(NodeSettings.load()) == BudgetLimits()


@given(st.text(max_size=20))
def test_whatever_a_server_says_of_when_to_come_back_is_within_reason(said: str) -> None:
    assert 0 < retry_after_s([("talkoot-retry-after-s", said)], 1.0) <= 3600


def test_when_to_come_back_is_told() -> None:
    assert retry_after_s(retry_metadata(2.5), 1.0) == 2.5
    assert retry_after_s(retry_metadata(0.0), 1.0) == 1.0
    assert retry_after_s(None, 1.0) == 1.0


# Over a real socket


def test_a_caller_beyond_its_budget_is_refused_and_another_is_served(run: Runner) -> None:
    async def scenario(edge: Edge) -> None:
        outcomes = [await make(edge, Call("backward", seed=seed)) for seed in range(4)]
        codes = [outcome.code for outcome in outcomes]
        assert codes[0] is StatusCode.OK
        assert codes[-1] is StatusCode.RESOURCE_EXHAUSTED
        assert "try again in" in outcomes[-1].details
        updates = edge.updates()
        assert (await make(edge.as_another(), Call("backward", seed=9))).code is StatusCode.OK
        assert edge.updates() == updates + 1

    run(scenario, budget=BudgetLimits(rows_per_s=ROWS / 5.0))


# Gradients of several callers in one batch


def work(caller: str, size: float, seed: int = 0) -> WorkItem:
    generator = torch.Generator().manual_seed(seed)
    width = MANIFEST.width
    inputs, gradients = (torch.randn(4, width, generator=generator) for _ in range(2))
    rows = Rows(inputs, torch.tensor([4]), torch.arange(4), size * gradients)
    return WorkItem(FIRST, "backward", rows, 1e9, caller, caller)


def change(batch: list[WorkItem]) -> torch.Tensor:
    """How a batch changes the first expert's parameters."""
    expert = Expert(FIRST, MANIFEST)
    before = torch.cat([p.detach().clone().flatten() for p in expert.block.parameters()])
    assert all(isinstance(result, Result) for result in compute(expert, batch))
    expert.settle()
    return torch.cat([p.detach().flatten() for p in expert.block.parameters()]) - before


def test_callers_whose_gradients_are_alike_share_a_step() -> None:
    batch = [work("a", 1.0), work("b", MOST_APART / 2, 1), work("a", 1.0, 2)]
    assert len(by_size(batch)) == 1
    expert = Expert(FIRST, MANIFEST)
    compute(expert, batch)
    assert expert.update_count == 1


def test_one_callers_huge_gradients_do_not_drown_anothers() -> None:
    honest, huge = work("honest", 1e-3), work("huge", 1e6, 1)
    assert [[w.caller for w in group] for group in by_size([huge, honest])] == [["honest"], ["huge"]]
    alone, together, drowned = change([honest]), change([huge, honest]), change([huge])
    cosine = torch.nn.functional.cosine_similarity
    # The step for both contains the honest caller's whole step, in addition to the other's.
    assert cosine(together - drowned, alone, dim=0) > 0.7
    assert together.norm() < 3 * alone.norm()


def test_tiny_gradients_of_another_do_not_shrink_ones_step() -> None:
    honest, tiny = work("honest", 1.0), work("tiny", 1e-9, 1)
    cosine = torch.nn.functional.cosine_similarity(change([honest]), change([tiny, honest]), dim=0)
    assert cosine > 0.7


def test_results_come_in_the_order_of_the_works() -> None:
    batch = [work("huge", 1e6, 1), work("honest", 1e-3, 2), work("tiny", 0.0, 3)]
    expert = Expert(FIRST, MANIFEST)
    results = compute(expert, batch)
    assert expert.update_count == 3
    for result, each in zip(results, batch, strict=True):
        assert isinstance(result, Result)
        assert each.rows.gradients is not None
        ratio = result.tensor.norm() / each.rows.gradients.norm().clamp(min=1e-30)
        assert ratio < 100
