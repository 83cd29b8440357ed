"""Continuing sequences: caching changes nothing, and each sequence comes out as if it were alone."""

from collections.abc import Callable, Sequence
from typing import get_args

import pytest
import torch
from expert_fakes import make_manifest
from hypothesis import given, settings
from hypothesis import strategies as st
from router_fakes import every_router, k_of
from torch import Tensor, nn

from dht.manifest import Manifest
from talkoot.train.local import LocalSwarm
from trainer_client.decoding import Decoding, EncoderSource, TextDecoder
from trainer_client.model import LanguageModel, SequenceState
from trainer_client.settings import RouterName, TrainerSettings

PROMPTS = st.lists(st.lists(st.integers(0, 255), min_size=4, max_size=20), min_size=1, max_size=4)


class Watched(LanguageModel):
    """A model that records the lengths of the sequences in each computation."""

    def __init__(self, manifest: Manifest, make_mixture: Callable[[int], nn.Module]) -> None:
        super().__init__(manifest, make_mixture)
        self.seen: list[list[int]] = []

    def extend(
        self,
        tokens: Sequence[Sequence[int]],
        states: Sequence[SequenceState],
        neighbours: Sequence[Tensor] = (),
    ) -> Tensor:
        self.seen.append([len(each) for each in tokens])
        return super().extend(tokens, states, neighbours)


def make_model(manifest: Manifest, router: RouterName = "product-key") -> Watched:
    """A model with experts in this process, whose attention does not have the zeros that it starts with."""
    swarm = LocalSwarm(manifest, TrainerSettings(router=router, top_k=manifest.routing.top_k))
    for expert in swarm.dispatcher.experts.values():
        for name, parameter in expert.block.named_parameters():
            if "attention_output" in name:
                nn.init.normal_(parameter, std=0.3)
    return Watched(manifest, swarm.mixture)


def uncached(model: LanguageModel, sequence: Decoding) -> Tensor:
    """The logits of the next token, computed from all tokens."""
    with torch.no_grad():
        logits_V: Tensor = model(torch.tensor([sequence.tokens]))[0, -1]
        return logits_V


def check(model: Watched, prompts: list[list[int]], seed: int, steps: int) -> None:
    decoder = TextDecoder(model)
    generator = torch.Generator().manual_seed(seed)
    sequences = [decoder.begin(prompt) for prompt in prompts]
    for _ in range(steps):
        logits_SV = decoder.logits(sequences)
        assert torch.equal(logits_SV, decoder.logits(sequences))
        for logits_V, sequence in zip(logits_SV, sequences, strict=True):
            torch.testing.assert_close(logits_V, uncached(model, sequence), atol=2e-5, rtol=2e-4)
            sequence.append(int(torch.randint(256, (1,), generator=generator)))
    for sequence in sequences:
        sequence.end()
        sequence.end()


@pytest.mark.slow
@given(
    PROMPTS,
    st.integers(0, 2**31),
    st.sampled_from(get_args(RouterName)),
    st.sampled_from([0, 3]),
    st.sampled_from(["attention", "layer"]),
    st.sampled_from([None, 8]),
    st.sampled_from(["ffn", "transformer"]),
)
@settings(max_examples=25)
def test_what_is_kept_of_a_sequence_changes_nothing(
    prompts: list[list[int]],
    seed: int,
    router: RouterName,
    prefix: int,
    local: str,
    width: int | None,
    kind: str,
) -> None:
    manifest = make_manifest(
        (2, 3),
        k=k_of(router),
        kind=kind,
        prefix=prefix,
        width=width,
        hidden=16,
        layers=2,
        local=local,
        local_layers=2,
    )
    check(make_model(manifest, router), prompts, seed, steps=4)


@every_router
def test_what_is_kept_of_a_sequence_changes_nothing_with_any_router(name: RouterName) -> None:
    manifest = make_manifest((2, 3), k=k_of(name), prefix=3, hidden=16, layers=2, local="attention")
    check(make_model(manifest, name), [list(range(20)), [1, 2, 3, 4]], seed=0, steps=4)


def test_a_token_costs_one_row_until_the_context_is_full() -> None:
    model = make_model(make_manifest((2, 3), k=2, kind="ffn"))
    decoder = TextDecoder(model)
    sequence = decoder.begin(list(range(12)))
    for token in range(14):
        decoder.logits([sequence])
        sequence.append(token)
    assert model.seen == [[12], [1], [1], [1], [1], [8], *[[1]] * 8]


def test_sequences_of_all_lengths_are_computed_at_once() -> None:
    model = make_model(make_manifest((2, 3), k=2, kind="ffn"))
    decoder = TextDecoder(model)
    sequences = [decoder.begin(list(range(length))) for length in (3, 9, 5)]
    decoder.logits(sequences)
    for sequence in sequences:
        sequence.append(0)
    decoder.logits(sequences)
    assert model.seen == [[3, 5, 9], [1, 1, 1]]


def test_a_computation_that_fails_or_does_not_count_is_repeated_from_the_first_token() -> None:
    model = make_model(make_manifest((2, 3), k=2, kind="ffn"))
    answers = iter([True, False, True])
    decoder = TextDecoder(model, lambda: next(answers))
    sequence = decoder.begin([1, 2, 3])
    decoder.logits([sequence])
    sequence.append(4)
    logits_V = decoder.logits([sequence])[0]
    assert model.seen == [[3], [1], [4]]
    torch.testing.assert_close(logits_V, uncached(model, sequence))


def test_experts_of_other_packages_are_given_whole_sequences() -> None:
    model = make_model(make_manifest((2, 3), k=2, kind="transformer"))
    model.mixtures[0] = nn.Identity()
    check(model, [[1, 2, 3], [4, 5]], 0, steps=3)
    assert model.seen == []


def test_a_sequence_costs_all_its_rows_and_those_of_a_source_that_was_not_read() -> None:
    assert Decoding([1, 2, 3], 16, 1).next_rows == 3
    source = EncoderSource((1,) * 10)
    assert Decoding([1, 2], 16, 1, source).next_rows == 12
    source.encoded = ()
    assert Decoding([1, 2], 16, 1, source).next_rows == 2
