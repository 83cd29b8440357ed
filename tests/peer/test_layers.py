import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from peer.layers import TransformerLayer, group_by_length, seeded

HIDDEN, HEADS, FEED_FORWARD = 16, 2, 32

lengths_lists = st.lists(st.integers(1, 20), min_size=1, max_size=8)
seeds = st.integers(0, 2**32 - 1)


def build_layer() -> TransformerLayer:
    return seeded(7, lambda: TransformerLayer(HIDDEN, HEADS, FEED_FORWARD))


def random_rows(rows: int, seed: int) -> Tensor:
    return torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(seed))


def rising_positions(lengths: list[int], seed: int) -> Tensor:
    """Positions with gaps, as routing per token leaves them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.cat([torch.randint(1, 5, (n,), generator=generator).cumsum(0) for n in lengths])


def attention_by_the_book(layer: TransformerLayer, x: Tensor, positions: Tensor) -> Tensor:
    """One segment, head by head, with complex rotations."""
    width = HIDDEN // HEADS
    qkv = layer.attention_input(layer.attention_norm(x)).view(-1, 3, HEADS, width)
    turns = torch.polar(torch.ones(1), positions[:, None] * 10_000.0 ** (-torch.arange(0, width, 2) / width))
    outputs = []
    for head in range(HEADS):
        q, k = (
            torch.complex(qkv[:, i, head, : width // 2], qkv[:, i, head, width // 2 :]) * turns
            for i in (0, 1)
        )
        scores = (q @ k.conj().T).real / width**0.5
        scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
        outputs.append(scores.softmax(-1) @ qkv[:, 2, head])
    x = x + layer.attention_output(torch.cat(outputs, dim=1))
    output: Tensor = x + layer.feed_forward(layer.feed_forward_norm(x))
    return output


@settings(deadline=None, max_examples=40)
@given(lengths_lists, seeds)
def test_packed_segments_give_what_each_gives_alone(lengths: list[int], seed: int) -> None:
    layer = build_layer()
    x, positions = random_rows(sum(lengths), seed), rising_positions(lengths, seed)
    packed = layer(x, torch.tensor(lengths), positions)
    alone = [
        attention_by_the_book(layer, rows, places)
        for rows, places in zip(torch.split(x, lengths), torch.split(positions, lengths), strict=True)
    ]
    torch.testing.assert_close(packed, torch.cat(alone), atol=1e-5, rtol=1e-4)


@settings(deadline=None, max_examples=40)
@given(lengths_lists, seeds)
def test_packed_segments_give_the_gradients_that_each_gives_alone(lengths: list[int], seed: int) -> None:
    layer = build_layer()
    x = random_rows(sum(lengths), seed).requires_grad_()
    grad, positions = random_rows(sum(lengths), seed + 1), rising_positions(lengths, seed)
    inputs = [x, *layer.parameters()]
    packed = torch.autograd.grad(layer(x, torch.tensor(lengths), positions), inputs, grad)
    parts = zip(torch.split(x, lengths), torch.split(positions, lengths), strict=True)
    alone = torch.cat([layer(rows, torch.tensor([len(rows)]), places) for rows, places in parts])
    torch.testing.assert_close(packed, torch.autograd.grad(alone, inputs, grad), atol=1e-4, rtol=1e-3)


@settings(deadline=None, max_examples=40)
@given(lengths_lists, seeds, st.data())
def test_a_row_changes_no_earlier_row_and_no_other_segment(
    lengths: list[int], seed: int, data: st.DataObject
) -> None:
    segment = data.draw(st.integers(0, len(lengths) - 1))
    row = data.draw(st.integers(0, lengths[segment] - 1))
    start, end = sum(lengths[:segment]), sum(lengths[: segment + 1])
    layer = build_layer()
    x, positions = random_rows(sum(lengths), seed), rising_positions(lengths, seed)
    changed_x = x.clone()
    changed_x[start + row] = random_rows(1, seed + 1)[0] * 10
    before = layer(x, torch.tensor(lengths), positions)
    after = layer(changed_x, torch.tensor(lengths), positions)
    torch.testing.assert_close(after[: start + row], before[: start + row])
    torch.testing.assert_close(after[end:], before[end:])
    assert not torch.allclose(after[start + row], before[start + row])


def test_a_segment_that_is_not_finite_leaves_the_others_finite() -> None:
    layer, lengths = build_layer(), [3, 5, 2]
    x, positions = random_rows(10, 0), rising_positions(lengths, 0)
    x[3:8] = torch.nan
    output = layer(x, torch.tensor(lengths), positions)
    assert output[:3].isfinite().all()
    assert output[8:].isfinite().all()


def test_only_distances_between_positions_matter() -> None:
    layer, lengths = build_layer(), torch.tensor([6, 3])
    x, positions = random_rows(9, 0), rising_positions([6, 3], 0)
    torch.testing.assert_close(
        layer(x, lengths, positions), layer(x, lengths, positions + 100), atol=1e-4, rtol=1e-4
    )
    assert not torch.allclose(layer(x, lengths, positions), layer(x, lengths, positions * 2), atol=1e-4)


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
