"""Drawing tokens, and text from tokens."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
from expert_fakes import make_manifest
from hypothesis import given
from hypothesis import strategies as st
from run_samples import MANIFEST
from torch import Tensor, nn

from peer.errors import DataError, SettingsError, UserError
from trainer_client.inference import choices, decoded, generate, make_generator, next_token
from trainer_client.model import LanguageModel
from trainer_client.settings import Sampling

LOGITS = torch.log(torch.tensor([0.1, 0.5, 0.15, 0.25]))
BYTES = [bytes([value]) for value in range(256)]


def sampling(**given: Any) -> Sampling:
    return Sampling.load(None, **({"seed": 1, "temperature": 1.0} | given))


def drawn(draws: int = 2000, **given: Any) -> Counter[int]:
    how = sampling(**given)
    generator = make_generator(how.seed)
    return Counter(next_token(LOGITS, how, generator) for _ in range(draws))


def make_model(prefix: int = 0) -> LanguageModel:
    return LanguageModel(make_manifest((2, 3), prefix=prefix), lambda layer: nn.Identity())


def test_tokens_are_drawn_as_likely_as_the_model_says() -> None:
    counts = drawn()
    assert [counts[token] / 2000 for token in range(4)] == pytest.approx([0.1, 0.5, 0.15, 0.25], abs=0.04)


def test_temperature_zero_takes_the_likeliest_and_a_low_one_nearly() -> None:
    assert drawn(20, temperature=0) == {1: 20}
    assert drawn(20, temperature=1e-30) == {1: 20}
    assert drawn(temperature=0.5)[1] / 2000 == pytest.approx(0.25 / 0.345, abs=0.04)


def test_a_high_temperature_makes_all_alike() -> None:
    assert min(drawn(temperature=100).values()) > 400


def test_top_k_draws_of_the_k_likeliest() -> None:
    counts = drawn(top_k=2)
    assert counts.keys() == {1, 3}
    assert counts[1] / 2000 == pytest.approx(2 / 3, abs=0.04)
    assert drawn(top_k=1000).keys() == {0, 1, 2, 3}


def test_top_p_draws_of_the_fewest_that_make_it_up() -> None:
    assert drawn(300, top_p=0.5).keys() == {1}
    assert drawn(300, top_p=0.51).keys() == {1, 3}
    assert drawn(300, top_p=0.8).keys() == {1, 2, 3}
    assert drawn(300, top_p=1e-9).keys() == {1}
    assert drawn(300, top_p=1e-300).keys() == {1}


@given(
    st.lists(st.integers(-40, 40).map(lambda n: n / 4), min_size=1, max_size=200),
    st.sampled_from([0.1, 0.8, 1.0, 20.0]),
    st.none() | st.integers(1, 250),
    st.floats(0.001, 1),
    st.integers(1, 8),
)
def test_the_choices_are_those_of_all_tokens_in_order(
    logits: list[float], temperature: float, k: int | None, p: float, sorted_first: int
) -> None:
    how = sampling(temperature=temperature, top_k=k, top_p=p)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer_client.inference._FIRST_SORTED", sorted_first)
        ids, chances = choices(torch.tensor(logits), how)
    order = sorted(range(len(logits)), key=lambda token: -logits[token])[:k]
    expected = [math.exp((logits[token] - logits[order[0]]) / temperature) for token in order]
    before = [sum(expected[:n]) / sum(expected) for n in range(len(expected))]
    found = dict(zip(ids.tolist(), (chances / chances.max()).tolist(), strict=True))
    for token, chance, mass in zip(order, expected, before, strict=True):
        if abs(mass - p) > 1e-5:  # nearer than that, it is decided by rounding
            assert found.pop(token, 0.0) == pytest.approx(chance if mass < p else 0.0, abs=1e-5)
        else:
            found.pop(token, None)
    assert not any(found.values())


@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=20),
    st.floats(0, 100),
    st.integers(1, 30),
    st.floats(0.001, 1),
)
def test_what_is_drawn_is_among_the_top_k(logits: list[float], temperature: float, k: int, p: float) -> None:
    how = sampling(temperature=temperature, top_k=k, top_p=p)
    token = next_token(torch.tensor(logits), how, make_generator(how.seed))
    assert sum(logit > logits[token] for logit in logits) < k


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_an_error(value: float) -> None:
    with pytest.raises(UserError, match="not finite"):
        next_token(torch.tensor([0.0, value]), sampling(), make_generator(sampling().seed))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", -1),
        ("temperature", math.nan),
        ("top_k", 0),
        ("top_p", 0),
        ("top_p", 1.5),
        ("max_tokens", 0),
    ],
)
def test_sampling_out_of_bounds_is_named(key: str, value: float) -> None:
    with pytest.raises(SettingsError, match=key):
        sampling(**{key: value})


def test_equal_seeds_give_equal_text_and_others_other() -> None:
    model = make_model()
    first, same, other = (
        list(generate(model, [65], sampling(seed=seed, max_tokens=30))) for seed in (1, 1, 2)
    )
    assert first == same != other
    assert len(first) == 30


def test_without_a_seed_each_text_is_another() -> None:
    how = sampling(seed=None).model_copy(update={"seed": None, "max_tokens": 30})
    assert list(generate(make_model(), [65], how)) != list(generate(make_model(), [65], how))


def test_past_the_context_the_older_half_is_dropped() -> None:
    seen: list[list[int]] = []

    class Watched(LanguageModel):
        def forward(self, tokens_BT: Tensor, neighbours_BUNL: Tensor | None = None) -> Tensor:
            seen.append(tokens_BT[0].tolist())
            return super().forward(tokens_BT)

    model = Watched(MANIFEST, lambda layer: nn.Identity())
    prompt = list(range(40))
    out = list(generate(model, prompt, sampling(max_tokens=11)))
    text = prompt + out
    assert seen == [text[24:40], *(text[33 : 41 + i] for i in range(9)), text[42:50]]
    assert not model.training


def test_a_prompt_shorter_than_the_routing_prefix_is_refused() -> None:
    """The model has never learned to predict what follows fewer tokens."""
    with pytest.raises(
        DataError, match="has 3 tokens, but this swarm's models need 4 or more: give a longer"
    ):
        next(generate(make_model(prefix=4), [1, 2, 3], sampling()))
    assert len(list(generate(make_model(prefix=4), [1, 2, 3, 4], sampling(max_tokens=30)))) == 30


def test_a_token_that_does_not_count_is_computed_again() -> None:
    answers = iter([False, False, True, True])
    out = list(generate(make_model(), [1], sampling(max_tokens=2), lambda: next(answers)))
    assert out == list(generate(make_model(), [1], sampling(max_tokens=2)))
    assert next(answers, None) is None


def test_text_comes_as_soon_as_its_characters_are_whole() -> None:
    assert list(decoded("aä日".encode(), BYTES)) == ["a", "ä", "日"]
    assert list(decoded([0, 1], ["ä日".encode()[:3], "ä日".encode()[3:]])) == ["ä", "日"]
    assert list(decoded(b"a\xffb\xc3", BYTES)) == ["a", "\ufffd", "b", "\ufffd"]
