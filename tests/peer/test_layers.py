from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from peer.choices import Activation, Norm
from peer.layers import TransformerLayer, group_by_length, make_feed_forward, make_norm, seeded

HIDDEN, HEADS, FEED_FORWARD = 16, 2, 32

lengths_lists = st.lists(st.integers(1, 20), min_size=1, max_size=8)
seeds = st.integers(0, 2**32 - 1)
norms = st.sampled_from(get_args(Norm))
activations = st.sampled_from(get_args(Activation))


def build_layer(
    norm: Norm = "layer",
    activation: Activation = "gelu",
    head_size: int | None = None,
    *,
    causal: bool = True,
) -> TransformerLayer:
    return seeded(
        7,
        lambda: TransformerLayer(HIDDEN, HEADS, FEED_FORWARD, norm, activation, head_size, causal=causal),
    )


head_sizes = st.sampled_from([None, 4, 12])
layers = st.builds(build_layer, norms, activations, head_sizes, causal=st.booleans())
causal_layers = st.builds(build_layer, norms, activations, head_sizes)


def random_rows(rows: int, seed: int) -> Tensor:
    return torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(seed))


def rising_positions(lengths: list[int], seed: int) -> Tensor:
    """Positions with gaps, as routing of single tokens leaves them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.cat([torch.randint(1, 5, (n,), generator=generator).cumsum(0) for n in lengths])


def attention_by_the_book(layer: TransformerLayer, x: Tensor, positions: Tensor) -> Tensor:
    """Attention of one segment, head by head, with complex rotations."""
    width = layer.attention_output.in_features // HEADS
    qkv = layer.attention_input(layer.attention_norm(x)).view(-1, 3, HEADS, width)
    turns = torch.polar(torch.ones(1), positions[:, None] * 10_000.0 ** (-torch.arange(0, width, 2) / width))
    outputs = []
    for head in range(HEADS):
        q, k = (
            torch.complex(qkv[:, i, head, : width // 2], qkv[:, i, head, width // 2 :]) * turns
            for i in (0, 1)
        )
        scores = (q @ k.conj().T).real / width**0.5
        if layer.causal:
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
        outputs.append(scores.softmax(-1) @ qkv[:, 2, head])
    x = x + layer.attention_output(torch.cat(outputs, dim=1))
    output: Tensor = x + layer.feed_forward(layer.feed_forward_norm(x))
    return output


@settings(deadline=None, max_examples=40)
@given(layers, lengths_lists, seeds)
def test_packed_segments_give_what_each_gives_alone(
    layer: TransformerLayer, lengths: list[int], seed: int
) -> None:
    x, positions = random_rows(sum(lengths), seed), rising_positions(lengths, seed)
    packed = layer(x, torch.tensor(lengths), positions)
    alone = [
        attention_by_the_book(layer, rows, places)
        for rows, places in zip(torch.split(x, lengths), torch.split(positions, lengths), strict=True)
    ]
    torch.testing.assert_close(packed, torch.cat(alone), atol=1e-5, rtol=1e-4)


@settings(deadline=None, max_examples=40)
@given(layers, lengths_lists, seeds)
def test_packed_segments_give_the_gradients_that_each_gives_alone(
    layer: TransformerLayer, lengths: list[int], seed: int
) -> None:
    x = random_rows(sum(lengths), seed).requires_grad_()
    grad, positions = random_rows(sum(lengths), seed + 1), rising_positions(lengths, seed)
    inputs = [x, *layer.parameters()]
    packed = torch.autograd.grad(layer(x, torch.tensor(lengths), positions), inputs, grad)
    parts = zip(torch.split(x, lengths), torch.split(positions, lengths), strict=True)
    alone = torch.cat([layer(rows, torch.tensor([len(rows)]), places) for rows, places in parts])
    torch.testing.assert_close(packed, torch.autograd.grad(alone, inputs, grad), atol=1e-4, rtol=1e-3)


@settings(deadline=None, max_examples=40)
@given(causal_layers, lengths_lists, seeds, st.data())
def test_a_row_changes_no_earlier_row_and_no_other_segment(
    layer: TransformerLayer, lengths: list[int], seed: int, data: st.DataObject
) -> None:
    segment = data.draw(st.integers(0, len(lengths) - 1))
    row = data.draw(st.integers(0, lengths[segment] - 1))
    start, end = sum(lengths[:segment]), sum(lengths[: segment + 1])
    x, positions = random_rows(sum(lengths), seed), rising_positions(lengths, seed)
    changed_x = x.clone()
    changed_x[start + row] = random_rows(1, seed + 1)[0] * 10
    before = layer(x, torch.tensor(lengths), positions)
    after = layer(changed_x, torch.tensor(lengths), positions)
    torch.testing.assert_close(after[: start + row], before[: start + row])
    torch.testing.assert_close(after[end:], before[end:])
    assert not torch.allclose(after[start + row], before[start + row])


@settings(deadline=None, max_examples=20)
@given(lengths_lists, seeds, st.data())
def test_without_causality_a_row_changes_all_of_its_segment_and_no_other(
    lengths: list[int], seed: int, data: st.DataObject
) -> None:
    segment = data.draw(st.integers(0, len(lengths) - 1))
    row = data.draw(st.integers(0, lengths[segment] - 1))
    start, end = sum(lengths[:segment]), sum(lengths[: segment + 1])
    x, positions = random_rows(sum(lengths), seed), rising_positions(lengths, seed)
    changed_x = x.clone()
    changed_x[start + row] = random_rows(1, seed + 1)[0] * 10
    layer = build_layer(causal=False)
    before, after = (layer(each, torch.tensor(lengths), positions) for each in (x, changed_x))
    torch.testing.assert_close(after[:start], before[:start])
    torch.testing.assert_close(after[end:], before[end:])
    assert (after[start:end] != before[start:end]).any(dim=1).all()


@pytest.mark.parametrize("causal", [True, False])
def test_a_segment_that_is_not_finite_leaves_the_others_finite(causal: bool) -> None:
    layer, lengths = build_layer(causal=causal), [3, 5, 2]
    x, positions = random_rows(10, 0), rising_positions(lengths, 0)
    x[3:8] = torch.nan
    output = layer(x, torch.tensor(lengths), positions)
    assert output[:3].isfinite().all()
    assert output[8:].isfinite().all()


@settings(deadline=None, max_examples=40)
@given(layers, lengths_lists, seeds, st.integers(1, 1000))
def test_only_distances_between_positions_matter(
    layer: TransformerLayer, lengths: list[int], seed: int, distance: int
) -> None:
    x, positions = random_rows(sum(lengths), seed), rising_positions(lengths, seed)
    here, there = (layer(x, torch.tensor(lengths), places) for places in (positions, positions + distance))
    torch.testing.assert_close(here, there, atol=1e-3, rtol=1e-3)
    stretched = layer(x, torch.tensor(lengths), positions * 2)
    assert torch.allclose(here, stretched, atol=1e-6) == (max(lengths) == 1)


@pytest.mark.parametrize("activation", ["swiglu", "geglu"])
def test_gated_blocks_follow_their_paper(activation: Activation) -> None:
    """Shazeer, arXiv 2002.05202, section 2."""
    block = seeded(7, lambda: make_feed_forward(HIDDEN, FEED_FORWARD, activation))
    (both, output), x = block.parameters(), random_rows(5, 0)
    gate, value = both.chunk(2)
    gated = x @ gate.T
    by_the_book = gated * gated.sigmoid() if activation == "swiglu" else gated * normal_distribution(gated)
    torch.testing.assert_close(block(x), (by_the_book * (x @ value.T)) @ output.T, atol=1e-5, rtol=1e-4)


def normal_distribution(x: Tensor) -> Tensor:
    return (1 + torch.erf(x / 2**0.5)) / 2


def test_rms_norm_divides_by_the_root_of_the_mean_square() -> None:
    """Zhang and Sennrich, arXiv 1910.07467, equation 4."""
    x = random_rows(5, 0) * 3
    expected = x / x.square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(make_norm("rms", HIDDEN)(x), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("norm", get_args(Norm))
def test_gradients_of_rows_near_zero_stay_small(norm: Norm) -> None:
    x = (random_rows(5, 0) * 1e-9).requires_grad_()
    (gradient,) = torch.autograd.grad(make_norm(norm, HIDDEN)(x).sum(), x)
    assert gradient.abs().max() < 400


@settings(max_examples=40)
@given(
    norms,
    activations,
    st.integers(1, 8),
    st.integers(1, 40),
    st.none() | st.integers(1, 9).map(lambda n: 2 * n),
)
def test_parameters_are_as_many_as_stated(
    norm: Norm, activation: Activation, heads: int, inner: int, head_size: int | None
) -> None:
    """With `head_size`, attention has heads * head_size inner columns, whatever the hidden size."""
    hidden = 4 * heads
    layer = TransformerLayer(hidden, heads, inner, norm, activation, head_size)
    x_RD = torch.zeros(3, hidden)
    assert layer(x_RD, torch.tensor([3]), torch.arange(3)).shape == x_RD.shape
    columns = heads * (head_size or 4)
    norms = 2 * (2 if norm == "layer" else 1) * hidden
    feed_forward = 2 * hidden * inner + hidden + inner if activation == "gelu" else 3 * hidden * inner
    assert sum(p.numel() for p in layer.parameters()) == norms + 4 * hidden * columns + feed_forward


@settings(deadline=None, max_examples=20)
@given(layers, lengths_lists, seeds)
def test_bfloat16_autocast_changes_little_and_gives_float32(
    layer: TransformerLayer, lengths: list[int], seed: int
) -> None:
    x, positions = random_rows(sum(lengths), seed), rising_positions(lengths, seed)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = layer(x, torch.tensor(lengths), positions)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, layer(x, torch.tensor(lengths), positions), atol=0.05, rtol=0.05)


@settings(deadline=None)
@given(st.lists(st.integers(1, 1000), min_size=1, max_size=200))
def test_groups_hold_every_segment_once_with_little_padding(lengths: list[int]) -> None:
    groups = group_by_length(lengths)
    assert sorted(segment for group in groups for segment in group) == list(range(len(lengths)))
    for group in groups:
        sizes = [lengths[segment] for segment in group]
        assert sizes[0] == max(sizes)
        assert max(sizes) * len(sizes) <= 1.5 * sum(sizes)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**63 - 1))
def test_seeded_parameters_follow_from_the_seed_alone(seed: int) -> None:
    first, second, other = (seeded(s, lambda: nn.Linear(3, 3)) for s in (seed, seed, seed ^ 1))
    assert torch.equal(first.weight, second.weight)
    assert not torch.equal(first.weight, other.weight)


def test_seeded_leaves_the_global_generator_as_it_was() -> None:
    before = torch.get_rng_state()
    build_layer()
    assert torch.equal(torch.get_rng_state(), before)
