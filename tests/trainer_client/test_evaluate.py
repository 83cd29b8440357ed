"""How well a model predicts a text."""

import math

import numpy as np
import pytest
import torch
from expert_fakes import make_manifest
from hypothesis import given
from hypothesis import strategies as st
from run_samples import TEXT
from torch import nn

from peer.errors import DataError, UserError
from trainer_client.inference import combined, evaluate, pieces
from trainer_client.model import LanguageModel

BYTES = [bytes([value]) for value in range(256)]
TOKENS = np.frombuffer(TEXT.encode(), np.uint8)


def make_model(vocabulary: int = 256, prefix: int = 0) -> LanguageModel:
    return LanguageModel(make_manifest((2, 3), prefix=prefix), lambda layer: nn.Identity(), vocabulary)


@given(st.data(), st.integers(2, 200), st.integers(1, 20), st.integers(1, 7))
def test_every_token_but_the_first_is_predicted_once(
    data: st.DataObject, length: int, context: int, batch_size: int
) -> None:
    first = data.draw(st.integers(1, context))
    batches = list(pieces(np.arange(length, dtype=np.uint16), context, batch_size, first))
    predicted = [token for batch in batches for token in batch[:, first:].flatten().tolist()]
    assert predicted == list(range(first, length))
    assert all(batch.shape[0] <= batch_size and batch.shape[1] <= context + 1 for batch in batches)
    assert all(torch.equal(batch[:, 1:], batch[:, :-1] + 1) for batch in batches)


def test_the_loss_is_the_mean_over_all_tokens() -> None:
    model = make_model()
    tokens = TOKENS[:70]  # four pieces of 16 and one of 5
    sums = [model.loss(batch).item() * batch[:, 1:].numel() for batch in pieces(tokens, 16, 1)]
    found = evaluate(model, tokens, BYTES, batch_size=3)
    assert found.tokens == found.bytes == 69
    assert found.loss == pytest.approx(sum(sums) / 69, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(found.loss))
    assert found.bits_per_byte == pytest.approx(found.loss / math.log(2))


def test_bits_per_byte_count_the_bytes_of_tokens() -> None:
    tokens = np.array([2, 0, 1, 1], np.uint16)
    found = evaluate(make_model(3), tokens, [b"a", b"bcd", b"not predicted"], batch_size=1)
    assert (found.tokens, found.bytes) == (3, 7)
    assert found.bits_per_byte == pytest.approx(found.loss * 3 / 7 / math.log(2))


@given(st.lists(st.integers(2, 60), min_size=1, max_size=4))
def test_texts_together_count_every_token_alike(lengths: list[int]) -> None:
    model = make_model()
    ends = np.cumsum(lengths)
    texts = [TOKENS[end - length : end] for end, length in zip(ends, lengths, strict=True)]
    each = [evaluate(model, tokens, BYTES, 2) for tokens in texts]
    found = combined(each)
    assert found.tokens == found.bytes == sum(lengths) - len(lengths)
    mean = float(np.average([one.loss for one in each], weights=[one.tokens for one in each]))
    assert found.loss == pytest.approx(mean)
    assert found.perplexity == pytest.approx(math.exp(mean))
    assert (
        min(one.loss for one in each) <= found.loss * (1 + 1e-9) <= max(one.loss for one in each) * (1 + 2e-9)
    )


def test_a_batch_that_does_not_count_is_computed_again() -> None:
    asked: list[int] = []

    def observe(done: int) -> bool:
        asked.append(done)
        return len(asked) != 2

    found = evaluate(make_model(), TOKENS[:49], BYTES, 1, observe)
    assert asked == [16, 32, 32, 48]
    assert found == evaluate(make_model(), TOKENS[:49], BYTES, 1)


@pytest.mark.parametrize(("prefix", "length"), [(0, 0), (0, 1), (1, 1), (5, 5)])
def test_a_text_with_nothing_to_predict_is_refused(prefix: int, length: int) -> None:
    with pytest.raises(
        DataError, match=f"has {length} tokens?, .* number {max(1, prefix) + 1}: give a longer"
    ):
        evaluate(make_model(prefix=prefix), TOKENS[:length], BYTES, 1)


def test_with_a_routing_prefix_every_token_after_it_is_predicted_from_as_much_at_least() -> None:
    model, tokens = make_model(prefix=5), TOKENS[:70]
    log_chances = [
        model(torch.tensor(tokens[None, start : at + 1].astype(np.int64)))[0, -1].log_softmax(dim=-1)[
            tokens[at + 1]
        ]
        for at in range(4, 69)
        for start in [(at - 4) // 12 * 12]  # a piece predicts 12 of its 17 tokens
    ]
    found = evaluate(model, tokens, BYTES, batch_size=3)
    assert found.tokens == found.bytes == 65
    assert found.loss == pytest.approx(-torch.stack(log_chances).mean().item(), rel=1e-5)


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    model = make_model()
    nn.init.constant_(model.head.weight, math.nan)
    with pytest.raises(UserError, match="not finite: the model's checkpoint or an expert is broken"):
        evaluate(model, TOKENS[:70], BYTES, 1)


def test_evaluating_changes_no_parameter_and_draws_nothing() -> None:
    model = make_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    evaluate(model, TOKENS[:100], BYTES, 4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
