"""Each router compared with its formula, over live experts."""

from itertools import pairwise
from typing import Any, get_args

import numpy as np
import pytest
import torch
from expert_fakes import make_manifest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dht.beam_search import Selection, select_experts
from dht.directory import PrefixTables, prefix_tables
from peer.codec import Floats, Integers
from peer.errors import SettingsError
from peer.wire import expert_pb2
from trainer_client.dispatch.batches import relative_weights
from trainer_client.routers import (
    ROUTERS,
    Gate,
    NodeLimit,
    balanced,
    best,
    best_others_by_chance,
    experts_for_each_row,
    log_total,
    noisy_scores,
    probability_among_live,
    sigmoid_of_logit,
    softmax_of_answered,
)
from trainer_client.settings import RouterName

seeds = st.integers(0, 2**32 - 1)
grids = st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple)


def make_rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def all_live(*grid: int) -> PrefixTables:
    return prefix_tables(np.ones(grid, dtype=np.bool_))


def some_live(grid: tuple[int, ...], seed: int) -> PrefixTables:
    live = make_rng(seed).random(grid) < 0.6
    live[(0,) * len(grid)] = True
    return prefix_tables(live)


def random_scores(rows: int, grid: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed % 2**63)
    return [torch.randn(rows, size, generator=generator) for size in grid]


def arrays(scores: list[Tensor]) -> list[Floats]:
    return [table.detach().numpy() for table in scores]


def live_logits(scores: list[Tensor], alive: PrefixTables) -> tuple[Tensor, Tensor]:
    """The logits [R, E] and the coordinates [E, dims] of all live experts."""
    live = np.argwhere(alive[-1])
    coordinates = np.repeat(live[None], len(scores[0]), axis=0)
    return Gate.logits(tuple(scores), coordinates, alive[-1].shape), torch.from_numpy(live)


def answered(logits: Tensor) -> Tensor:
    return torch.ones_like(logits, dtype=torch.bool)


# Worked numbers


def worked(gate: list[list[float]], k: int, router: RouterName) -> list[list[float]]:
    """The weights of all experts if the gate's softmax is `gate`."""
    scores = [torch.tensor(gate).log()]
    alive = all_live(len(gate[0]))
    selection = ROUTERS[router].choose(arrays(scores), alive, k, None, None)
    logits = Gate.logits(tuple(scores), selection.coordinates, (len(gate[0]),))
    weights = ROUTERS[router].weigh(scores, alive, logits, torch.from_numpy(selection.valid))
    full = torch.zeros(len(gate), len(gate[0]))
    full.scatter_(1, torch.from_numpy(selection.coordinates[..., 0]), weights)
    return full.tolist()


@pytest.mark.parametrize("router", ["product-key", "noisy-top-k", "glam"])
def test_top_2_of_the_worked_gate_renormalised(router: RouterName) -> None:
    (weights,) = worked([[0.04, 0.8, 0.01, 0.15]], 2, router)
    assert weights == pytest.approx([0, 0.84, 0, 0.16], abs=0.005)
    assert weights == pytest.approx([0, 0.8 / 0.95, 0, 0.15 / 0.95])


@pytest.mark.parametrize("router", ["product-key", "noisy-top-k", "glam"])
def test_worked_gates_of_two_tokens_renormalised(router: RouterName) -> None:
    first, second = worked([[0.2, 0.6, 0.1, 0.1], [0.1, 0.6, 0.2, 0.1]], 2, router)
    assert first == pytest.approx([0.25, 0.75, 0, 0])
    assert second == pytest.approx([0, 0.75, 0.25, 0])


def test_switch_sends_the_worked_gate_to_its_best_and_weighs_it_by_its_probability() -> None:
    (weights,) = worked([[0.04, 0.8, 0.01, 0.15]], 1, "switch")
    assert weights == pytest.approx([0, 0.8, 0, 0])


# Choosing


@settings(max_examples=30, deadline=None)
@given(seeds, grids, st.integers(1, 4))
def test_best_are_the_live_experts_with_the_highest_logits(seed: int, grid: tuple[int, ...], k: int) -> None:
    alive = some_live(grid, seed)
    scores = random_scores(5, grid, seed)
    logits, _ = live_logits(scores, alive)
    selection = best(arrays(scores), alive, k)
    found = min(k, logits.shape[1])
    assert (selection.valid.sum(axis=1) == found).all()
    expected = logits.sort(dim=1, descending=True).values[:, :found]
    torch.testing.assert_close(torch.from_numpy(selection.scores[:, :found]), expected)


@pytest.mark.parametrize("second", [0.05, 0.25, 0.4, 0.5])
def test_the_second_expert_is_kept_with_twice_its_weight_as_probability(second: float) -> None:
    rows = 20_000
    scores = [torch.tensor([1 - second, second]).log().expand(rows, -1)]
    selection = best_others_by_chance(arrays(scores), all_live(2), 2, make_rng())
    assert selection.valid[:, 0].all()
    assert selection.valid[:, 1].mean() == pytest.approx(min(1, 2 * second), abs=0.015)


def test_in_evaluation_the_second_expert_is_always_kept() -> None:
    scores = arrays(random_scores(50, (3, 3)))
    assert best_others_by_chance(scores, all_live(3, 3), 2, None).valid.all()


def test_chance_makes_no_expert_of_an_empty_slot() -> None:
    scores = arrays(random_scores(200, (3,)))
    alive = prefix_tables(np.array([False, True, False]))
    selection = best_others_by_chance(scores, alive, 2, make_rng())
    assert selection.valid.tolist() == [[True, False]] * 200


@settings(max_examples=30, deadline=None)
@given(seeds, grids, st.integers(1, 40))
def test_balanced_gives_each_live_expert_its_part_of_the_rows(
    seed: int, grid: tuple[int, ...], rows: int
) -> None:
    alive = some_live(grid, seed)
    selection = balanced(arrays(random_scores(rows, grid, seed)), alive, 1, make_rng())
    assert selection.valid.all()
    counts = np.zeros(grid, int)
    np.add.at(counts, tuple(selection.coordinates[:, 0].T), 1)
    experts = alive[-1].sum()
    assert not counts[~alive[-1]].any()
    assert set(counts[alive[-1]]) <= {rows // experts, -(-rows // experts)}


@settings(max_examples=30, deadline=None)
@given(seeds, grids)
def test_balanced_gives_the_logits_of_those_it_chose(seed: int, grid: tuple[int, ...]) -> None:
    scores = random_scores(7, grid, seed)
    selection = balanced(arrays(scores), some_live(grid, seed), 1, make_rng())
    logits = Gate.logits(tuple(scores), selection.coordinates, grid)
    torch.testing.assert_close(torch.from_numpy(selection.scores), logits)


def test_balanced_is_greedy_in_evaluation() -> None:
    scores = [torch.tensor([[2.0, 1.0, 0.0]]).expand(6, -1)]
    assert balanced(arrays(scores), all_live(3), 1, None).coordinates.flatten().tolist() == [0] * 6
    trained = balanced(arrays(scores), all_live(3), 1, make_rng()).coordinates.flatten()
    assert np.bincount(trained).tolist() == [2, 2, 2]


@pytest.mark.parametrize("name", get_args(RouterName))
@pytest.mark.parametrize("rng", [None, make_rng()], ids=["evaluation", "training"])
def test_where_no_expert_is_live_none_is_chosen(name: RouterName, rng: np.random.Generator | None) -> None:
    scores = random_scores(4, (2, 3))
    nobody = prefix_tables(np.zeros((2, 3), np.bool_))
    router = ROUTERS[name]
    selection = router.choose(arrays(scores), nobody, 2 if router.k != 1 else 1, rng, None)
    assert not selection.valid.any()
    logits = Gate.logits(tuple(scores), selection.coordinates, (2, 3)).requires_grad_()
    weights = router.weigh(scores, nobody, logits, torch.from_numpy(selection.valid))
    torch.autograd.backward(weights.sum())
    assert not weights.any()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


# Few nodes


def of_best_nodes_one_by_one(
    logits: Floats, nodes: Integers, k: int, most: int
) -> tuple[set[int], list[float]]:
    """For one row: the nodes that it may go to, and the scores of its experts, best first."""
    sizes = {
        node: np.logaddexp.reduce(sorted(logits[nodes == node].astype(np.float64))[-k:])
        for node in set(nodes.tolist()) - {-1}
    }
    allowed = set(sorted(sizes, key=lambda node: -sizes[node])[:most])
    is_there = np.isin(nodes, list(allowed))
    there, elsewhere = (sorted(logits[part], reverse=True) for part in (is_there, ~is_there))
    return allowed, [*there, *elsewhere][:k]


def limited(
    scores: list[Floats], alive: PrefixTables, k: int, bias: Floats | None, limit: NodeLimit
) -> Selection:
    return ROUTERS["product-key"].choose(scores, alive, k, None, bias, limit)


@settings(deadline=None)
@given(seeds, grids, st.integers(3, 5), st.integers(2, 4), st.integers(1, 6), st.booleans())
def test_under_a_limit_rows_take_the_best_experts_of_their_best_nodes(
    seed: int, grid: tuple[int, ...], k: int, most: int, hosts: int, biased: bool
) -> None:
    rng, alive, scores = make_rng(seed), some_live(grid, seed), arrays(random_scores(5, grid, seed))
    nodes = np.where(alive[-1], rng.integers(0, hosts, grid), -1)
    bias = rng.standard_normal(grid, dtype=np.float32) if biased else None
    found = limited(scores, alive, k, bias, NodeLimit(nodes, most))
    assert found.valid.shape == (5, k)
    for row in range(5):
        logits = np.zeros(grid, np.float32)
        for d, table in enumerate(scores):
            logits = logits + table[row].reshape([-1 if e == d else 1 for e in range(len(grid))])
        logits = logits if bias is None else logits + bias
        chosen = [tuple(c) for c in found.coordinates[row, found.valid[row]].tolist()]
        assert len(set(chosen)) == len(chosen)
        at = {int(nodes[c]) for c in chosen}
        assert -1 not in at
        if most >= k:
            continue  # then it is a choice among all
        allowed, expected = of_best_nodes_one_by_one(logits[alive[-1]], nodes[alive[-1]], k, most)
        assert at <= allowed or np.isin(nodes, list(allowed)).sum() < k
        np.testing.assert_allclose([logits[c] for c in chosen], expected, rtol=1e-5, atol=1e-6)


@settings(deadline=None)
@given(seeds, grids, st.integers(2, 3), st.integers(0, 5))
def test_under_a_limit_a_row_chooses_by_its_own_scores(
    seed: int, grid: tuple[int, ...], most: int, changed: int
) -> None:
    """This keeps routing causal."""
    rng, alive, scores = make_rng(seed), some_live(grid, seed), arrays(random_scores(6, grid, seed))
    limit = NodeLimit(np.where(alive[-1], rng.integers(0, 4, grid), -1), most)
    before = limited(scores, alive, 4, None, limit)
    others = [table.copy() for table in scores]
    for table in others:
        table[changed] += rng.standard_normal(table.shape[1], dtype=np.float32)
    after = limited(others, alive, 4, None, limit)
    same = np.arange(6) != changed
    np.testing.assert_array_equal(after.coordinates[same], before.coordinates[same])
    np.testing.assert_array_equal(after.valid[same], before.valid[same])


def test_a_row_takes_its_best_experts_elsewhere_where_its_nodes_have_fewer_than_k() -> None:
    scores = [np.array([[5, 4, 3, 2, 1]], np.float32)]
    one_each = limited(scores, all_live(5), 4, None, NodeLimit(np.arange(5), 2))
    assert one_each.valid.all()
    assert one_each.coordinates[0, :, 0].tolist() == [0, 1, 2, 3]
    # Two experts at its best node come before a better one elsewhere.
    found = limited(scores, all_live(5), 3, None, NodeLimit(np.array([0, 1, 2, 0, -1]), 1))
    assert found.coordinates[0, :, 0].tolist() == [0, 3, 1]
    nobody = limited(scores, all_live(5), 4, None, NodeLimit(np.array([0, -1, -1, -1, -1]), 2))
    assert nobody.valid.tolist() == [[True, False, False, False]]


def test_among_more_experts_than_can_be_listed_candidates_of_the_search_are_taken() -> None:
    grid = (80, 80)
    scores, alive = arrays(random_scores(4, grid)), all_live(*grid)
    nodes = make_rng().integers(0, 5, grid)
    found = limited(scores, alive, 4, None, NodeLimit(nodes, 2))
    assert found.valid.all()
    for row in range(4):
        assert len(set(nodes[tuple(found.coordinates[row].T)].tolist())) <= 2
    everyone = best(scores, alive, 4)
    assert (found.scores[:, 0] <= everyone.scores[:, 0]).all()


def test_a_node_counts_with_its_best_k_experts_alone() -> None:
    scores = [np.array([[1, 1, *[0] * 10]], np.float32)]
    found = limited(scores, all_live(12), 2, None, NodeLimit(np.array([0, 0, *[1] * 10]), 1))
    assert found.coordinates[0, :, 0].tolist() == [0, 1], "ten poor ones together outweigh no two good ones"


def test_experts_without_a_host_take_no_place() -> None:
    scores = [np.array([[5, 4, 3, 2]], np.float32)]
    found = limited(scores, all_live(4), 3, None, NodeLimit(np.array([-1, 0, 0, 0]), 2))
    assert found.coordinates[0, :, 0].tolist() == [1, 2, 3]
    assert found.valid.all()


def test_nodes_whose_experts_are_far_behind_still_come_before_no_node() -> None:
    scores = [np.array([[1e4, -1, -2, -3]], np.float32)]
    found = limited(scores, all_live(4), 3, None, NodeLimit(np.array([0, 1, 2, 1]), 2))
    assert found.coordinates[0, :, 0].tolist() == [0, 1, 3], "two nodes alone"


def test_of_more_experts_than_can_be_listed_few_are_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def counted(scores: list[Floats], alive: PrefixTables, k: int, *more: Any) -> Selection:
        asked.append(k)
        return select_experts(scores, alive, k, *more)

    monkeypatch.setattr("trainer_client.routers.select_experts", counted)
    limit = NodeLimit(make_rng().integers(0, 5, (80, 80)), 2)
    limited(arrays(random_scores(4, (80, 80))), all_live(80, 80), 4, None, limit)
    assert asked == [64]


def test_the_expert_that_the_bias_puts_first_is_always_kept() -> None:
    scores, bias = [np.array([[0, -20]], np.float32)], np.array([0, 40], np.float32)
    choose = ROUTERS["noisy-top-k"].choose
    for seed in range(20):
        selection = choose(scores, all_live(2), 2, make_rng(seed), bias)
        assert selection.coordinates[0, 0].tolist() == [1]
        assert selection.valid[0, 0]


def test_a_gate_that_diverged_still_chooses_within_the_limit() -> None:
    scores = [np.array([[np.nan, np.inf, -np.inf, 0], [np.nan] * 4], np.float32)]
    found = limited(scores, all_live(4), 3, None, NodeLimit(np.array([0, 1, 2, 1]), 2))
    assert found.valid.any(axis=1).all()


# Weights


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(get_args(RouterName)), seeds, grids, st.integers(1, 4))
def test_a_rows_experts_weigh_in_the_ratios_in_which_a_node_mixes_them(
    name: RouterName, seed: int, grid: tuple[int, ...], k: int
) -> None:
    """All routers must guarantee this, with any subset of the experts answering."""
    alive, scores = some_live(grid, seed), random_scores(5, grid, seed)
    k = min(ROUTERS[name].k or k, int(alive[-1].sum()))
    selection = ROUTERS[name].choose(arrays(scores), alive, k, None, None)
    logits = Gate.logits(tuple(scores), selection.coordinates, grid)
    there = torch.from_numpy(selection.valid & (make_rng(seed).random(selection.valid.shape) < 0.7))
    weights = ROUTERS[name].weigh(scores, alive, logits, there).numpy()
    assert not weights[~there.numpy()].any()
    relative = relative_weights(logits.numpy(), there.numpy(), expert_pb2.CODEC_FP32)
    for row in range(5):
        if weights[row].any():
            expected = relative[row] / relative[row].sum()
            np.testing.assert_allclose(weights[row] / weights[row].sum(), expected, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(get_args(RouterName)), seeds, grids, st.integers(1, 4), st.integers(0, 3), st.booleans()
)
def test_a_score_for_each_expert_routes_as_product_keys_with_the_same_sums(
    name: RouterName, seed: int, grid: tuple[int, ...], k: int, most: int, training: bool
) -> None:
    """`most`: the most nodes for each row; 0: any number."""
    router, alive, scores = ROUTERS[name], some_live(grid, seed), random_scores(5, grid, seed)
    k = min(router.k or k, int(alive[-1].sum()))
    every, _ = live_logits(scores, all_live(*grid))
    nodes = np.where(alive[-1], make_rng(seed).integers(3, size=grid), -1)
    limit = NodeLimit(nodes, most) if most else None
    chosen, weights = [], []
    for tables in (scores, [every]):
        rng = make_rng(seed) if training else None
        selection = router.choose(arrays(tables), alive, k, rng, limit=limit)
        logits = Gate.logits(tuple(tables), selection.coordinates, grid)
        chosen.append(np.where(selection.valid[..., None], selection.coordinates, -1))
        weights.append(router.weigh(tables, alive, logits, torch.from_numpy(selection.valid)))
    np.testing.assert_array_equal(chosen[0], chosen[1])
    torch.testing.assert_close(weights[0], weights[1])


@settings(max_examples=30, deadline=None)
@given(seeds, grids)
def test_log_total_is_the_logsumexp_over_all_live_experts(seed: int, grid: tuple[int, ...]) -> None:
    alive = some_live(grid, seed)
    scores = random_scores(4, grid, seed)
    expected = live_logits(scores, alive)[0].double().logsumexp(dim=1)
    torch.testing.assert_close(log_total(scores, alive), expected)


@settings(max_examples=30, deadline=None)
@given(seeds, grids)
def test_probabilities_of_all_live_experts_sum_to_1_and_are_their_softmax(
    seed: int, grid: tuple[int, ...]
) -> None:
    alive = some_live(grid, seed)
    scores = random_scores(4, grid, seed)
    logits, _ = live_logits(scores, alive)
    weights = probability_among_live(scores, alive, logits, answered(logits))
    torch.testing.assert_close(weights, logits.softmax(dim=1))


def test_gradient_of_a_probability_reaches_the_scores_of_experts_that_were_not_chosen() -> None:
    scores = [table.requires_grad_() for table in random_scores(3, (2, 3))]
    logits = Gate.logits(tuple(scores), np.zeros((3, 1, 2), np.int64), (2, 3))
    weights = probability_among_live(scores, all_live(2, 3), logits, answered(logits))
    found = torch.autograd.grad(weights.sum(), scores)
    every, _ = live_logits(scores, all_live(2, 3))
    expected = torch.autograd.grad(every.softmax(dim=1)[:, 0].sum(), scores)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
        assert one[:, 1].abs().min() > 0


def test_scores_far_apart_keep_the_probability_finite() -> None:
    scores = [torch.tensor([[400.0, -400.0]], requires_grad=True), torch.tensor([[0.0, 300.0]])]
    alive = prefix_tables(np.array([[False, False], [True, False]]))
    logits = Gate.logits(tuple(scores), np.array([[[1, 0]]]), (2, 2))
    weights = probability_among_live(scores, alive, logits, answered(logits))
    (gradient,) = torch.autograd.grad(weights.sum(), scores[0])
    assert 0 <= weights.item() <= 1
    assert gradient.isfinite().all()


def test_expert_that_came_alive_since_weighs_no_more_than_1() -> None:
    scores = [torch.tensor([[0.0, 9.0]])]
    logits = Gate.logits(tuple(scores), np.array([[[1]]]), (2,))
    alive = prefix_tables(np.array([True, False]))
    assert probability_among_live(scores, alive, logits, answered(logits)).item() == 1


def test_base_weighs_an_expert_by_the_sigmoid_of_its_own_logit() -> None:
    logits = torch.tensor([[-2.0], [0.0], [3.0]], requires_grad=True)
    there = torch.tensor([[True], [True], [False]])
    weights = sigmoid_of_logit([], (), logits, there)
    torch.autograd.backward(weights.sum())
    assert weights.flatten().tolist() == pytest.approx([1 / (1 + np.exp(2)), 0.5, 0])
    assert logits.grad is not None
    assert logits.grad.flatten().tolist() == pytest.approx([0.1050, 0.25, 0], abs=1e-4)


@pytest.mark.parametrize("weigh", [softmax_of_answered, probability_among_live, sigmoid_of_logit])
def test_expert_that_did_not_answer_weighs_nothing_and_gives_no_gradient(weigh: object) -> None:
    assert callable(weigh)
    scores = random_scores(2, (3,))
    logits = torch.randn(2, 2, requires_grad=True)
    weights = weigh(scores, all_live(3), logits, torch.tensor([[True, False], [False, False]]))
    torch.autograd.backward(weights.square().sum())
    assert weights[0, 0] > 0
    assert weights.flatten()[1:].tolist() == [0, 0, 0]
    assert logits.grad is not None
    assert logits.grad.flatten()[1:].tolist() == [0, 0, 0]


# Noise


def test_noise_has_the_softplus_of_the_spread_as_its_standard_deviation() -> None:
    """H(x) = x W_g + normal * softplus(x W_noise)."""
    clean, spread = torch.zeros(40_000, 3), torch.tensor([-1.0, 0.0, 2.0]).expand(40_000, -1)
    (noisy,) = noisy_scores([clean], [spread], make_rng())
    assert noisy.mean(dim=0).abs().max() < 0.05
    expected = [float(np.log1p(np.exp(x))) for x in (-1, 0, 2)]
    assert noisy.std(dim=0).tolist() == pytest.approx(expected, rel=0.03)


def test_noise_follows_from_the_seed_and_differs_from_row_to_row() -> None:
    scores, spreads = random_scores(3, (4, 4)), [torch.zeros(3, 4)] * 2
    first, again = (noisy_scores(scores, spreads, make_rng(5)) for _ in range(2))
    other = noisy_scores(scores, spreads, make_rng(6))
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    added = first[0] - scores[0]
    assert not any(torch.allclose(one, two) for one, two in pairwise(added))


def test_gradient_reaches_how_wide_the_noise_is() -> None:
    spread = torch.zeros(3, 4, requires_grad=True)
    (noisy,) = noisy_scores([torch.zeros(3, 4)], [spread], make_rng())
    torch.autograd.backward(noisy.softmax(dim=1)[:, 0].sum())
    assert spread.grad is not None
    assert spread.grad.abs().min() > 0


# How many experts


@pytest.mark.parametrize(
    ("name", "k"), [("product-key", 4), ("noisy-top-k", 2), ("switch", 1), ("base", 1), ("glam", 2)]
)
def test_each_router_has_its_own_number_of_experts_for_a_token(name: RouterName, k: int) -> None:
    assert experts_for_each_row(name, None, make_manifest((4, 4), k=4)) == k
    assert experts_for_each_row(name, None, make_manifest((4, 4), k=1)) == 1


@pytest.mark.parametrize("name", ["product-key", "noisy-top-k", "glam"])
def test_top_k_may_be_anything_up_to_the_manifests(name: RouterName) -> None:
    assert experts_for_each_row(name, 3, make_manifest((4, 4), k=4)) == 3
    with pytest.raises(SettingsError, match=r"top_k: .* allows 4 experts for each token, not 5"):
        experts_for_each_row(name, 5, make_manifest((4, 4), k=4))


@pytest.mark.parametrize("name", ["switch", "base"])
def test_top_1_routers_refuse_another_number(name: RouterName) -> None:
    assert experts_for_each_row(name, 1, make_manifest((4, 4), k=4)) == 1
    with pytest.raises(SettingsError, match=f"top_k: {name} sends each token to 1 expert, not to 2"):
        experts_for_each_row(name, 2, make_manifest((4, 4), k=4))


def test_base_refuses_a_layer_that_it_can_not_balance() -> None:
    assert experts_for_each_row("base", None, make_manifest((16, 16))) == 1
    with pytest.raises(SettingsError, match="base balances at most 256 experts"):
        experts_for_each_row("base", None, make_manifest((257,)))
