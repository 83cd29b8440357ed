"""The encoder-decoder with experts in this process: which tokens affect which, and that caching changes nothing."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from attending import attending_experts
from expert_fakes import make_manifest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dht.manifest import Manifest
from peer.errors import SettingsError
from talkoot.train.local import LocalSwarm
from trainer_client.data.pairs import Pairs
from trainer_client.decoding import TargetDecoder
from trainer_client.dispatch.batches import Segments
from trainer_client.encoder_decoder import EncoderDecoder, make_model
from trainer_client.inference import generate
from trainer_client.model import LanguageModel, require_memory
from trainer_client.moe import rebalance
from trainer_client.retrieval.attention import RetrievalSpec
from trainer_client.settings import Sampling, TrainerSettings

TOKENS, END = 256, 256
tokens_lists = st.lists(st.integers(0, TOKENS - 1), min_size=1, max_size=12)
pairs_lists = st.lists(st.tuples(tokens_lists, tokens_lists), min_size=1, max_size=4)
kinds = st.sampled_from(["transformer", "ffn"])
locals_ = st.sampled_from(["layer", "attention"])


def two_layers(kind: str = "transformer", width: int | None = None, **model: Any) -> Manifest:
    """An encoder layer and a decoder layer."""
    sizes: dict[str, Any] = {"hidden": 16, "layers": 2, "local": "attention", "local_layers": 0}
    return make_manifest((2, 3), k=2, kind=kind, width=width, causal=(False, True), **(sizes | model))


def make(manifest: Manifest | None = None) -> EncoderDecoder:
    with attending_experts():
        manifest = two_layers() if manifest is None else manifest
        swarm = LocalSwarm(manifest, TrainerSettings(top_k=manifest.routing.top_k))
        return EncoderDecoder(manifest, swarm.mixture, TOKENS).eval()


def split(pairs: Sequence[tuple[list[int], list[int]]]) -> Pairs:
    return Pairs([source for source, _ in pairs], [[*target, END] for _, target in pairs])


@settings(max_examples=20, deadline=None)
@given(pairs_lists, kinds, locals_, st.sampled_from([None, 8]), st.data())
def test_a_changed_token_changes_no_logit_before_it_and_none_of_another_pair(
    pairs: list[tuple[list[int], list[int]]], kind: str, local: str, width: int | None, data: st.DataObject
) -> None:
    model = make(two_layers(kind, width, local=local, local_layers=1))
    sources, targets = split(pairs)
    number = data.draw(st.integers(0, len(pairs) - 1))
    at = data.draw(st.integers(0, len(pairs[number][1]) - 1))
    changed = [list(target) for target in targets]
    changed[number][at] = (changed[number][at] + 1) % TOKENS
    with torch.no_grad():
        before, after = (
            torch.split(model(sources, some), list(map(len, some))) for some in (targets, changed)
        )
    for other in range(len(pairs)):
        if other != number:
            torch.testing.assert_close(after[other], before[other], rtol=0, atol=1e-5)
    # The logits at a token's place predict that token.
    torch.testing.assert_close(after[number][: at + 1], before[number][: at + 1], rtol=0, atol=1e-5)
    assert not torch.allclose(after[number][at + 1], before[number][at + 1])


@settings(max_examples=20, deadline=None)
@given(pairs_lists, kinds, locals_, st.data())
def test_a_changed_token_of_a_source_changes_all_of_its_own_target_and_no_other(
    pairs: list[tuple[list[int], list[int]]], kind: str, local: str, data: st.DataObject
) -> None:
    model = make(two_layers(kind, local=local))
    sources, targets = split(pairs)
    number = data.draw(st.integers(0, len(pairs) - 1))
    at = data.draw(st.integers(0, len(sources[number]) - 1))
    changed = [list(source) for source in sources]
    changed[number][at] = (changed[number][at] + 1) % TOKENS
    with torch.no_grad():
        before, after = (
            torch.split(model(some, targets), list(map(len, targets))) for some in (sources, changed)
        )
    for other in range(len(pairs)):
        if other == number:
            assert (after[other] != before[other]).any(dim=1).all()
        else:
            torch.testing.assert_close(after[other], before[other], rtol=0, atol=1e-5)


@pytest.mark.parametrize("local_layers", [0, 1])
def test_experts_show_an_encoder_later_tokens_and_a_decoder_none(local_layers: int) -> None:
    """The experts' own attention does this: without a local part, nothing else mixes tokens."""
    model = make(two_layers(local="layer", local_layers=local_layers))
    x_RD = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    changed_RD = x_RD.clone()
    changed_RD[5] += 0.01 * x_RD[5]
    segments = Segments.whole(1, 6)
    with torch.no_grad():
        for layer, sees_later in ((0, True), (1, False)):
            both = [model.mixtures[layer](rows, segments) for rows in (x_RD, changed_RD)]
            assert torch.equal(both[0][:5], both[1][:5]) is not sees_later


@settings(max_examples=15, deadline=None)
@given(pairs_lists, kinds)
def test_each_pair_of_a_batch_is_as_if_it_were_alone(
    pairs: list[tuple[list[int], list[int]]], kind: str
) -> None:
    model, (sources, targets) = make(two_layers(kind)), split(pairs)
    with torch.no_grad():
        together = model.log_likelihood(sources, targets)
        assert together.shape == (len(pairs), max(map(len, targets)))
        for row, source, target in zip(together, sources, targets, strict=True):
            predicted = model([source], [target]).log_softmax(-1)
            alone = predicted[range(len(target)), target]
            torch.testing.assert_close(row[: len(target)], alone, rtol=1e-4, atol=1e-4)
            assert not row[len(target) :].any()
        mean = -together.sum() / sum(map(len, targets))
        torch.testing.assert_close(model.loss(Pairs(sources, targets)), mean)


@settings(max_examples=10, deadline=None)
@given(pairs_lists, kinds, locals_)
def test_a_target_is_continued_as_if_nothing_of_it_were_kept(
    pairs: list[tuple[list[int], list[int]]], kind: str, local: str
) -> None:
    model = make(two_layers(kind, local=local, local_layers=1))
    assert model.can_extend
    decoder = TargetDecoder(model)
    sequences = [decoder.begin(source) for source, _ in pairs]
    for step in range(4):
        logits_SV = decoder.logits(sequences)
        prefixes = [sequence.tokens[1:] for sequence in sequences]
        encoded = model.encode([source for source, _ in pairs])
        expected_SV = model.next_token_logits(encoded, prefixes)
        torch.testing.assert_close(logits_SV, expected_SV, atol=2e-5, rtol=2e-4)
        for sequence, (_, target) in zip(sequences, pairs, strict=True):
            sequence.append(target[step % len(target)])


def test_a_source_that_was_read_without_experts_is_read_again() -> None:
    model, answers, read = make(), iter([False, True, True]), list[object]()
    model.encoder_norm.register_forward_pre_hook(lambda module, given: read.append(given))
    decoder = TargetDecoder(model, lambda: next(answers))
    sequence = decoder.begin([1, 2, 3])
    decoder.logits([sequence])
    sequence.append(4)
    decoder.logits([sequence])
    assert len(read) == 2


def test_equal_sources_are_encoded_once() -> None:
    model = make()
    first, second, third = model.encode([(1, 2), (3,), [1, 2]])
    assert first[0] is third[0]
    assert not torch.equal(first[0][:, :, :1], second[0])


def test_sequences_with_equal_sources_read_them_once_and_go_on_from_what_is_written() -> None:
    model, read = make(), list[object]()
    model.encoder_norm.register_forward_pre_hook(lambda module, given: read.append(given))
    decoder = TargetDecoder(model)
    first = decoder.begin([1, 2, 3])
    decoder.logits([first])
    second = decoder.begin((1, 2, 3), [4, 5])
    logits_1V = decoder.logits([second])
    assert len(read) == 1
    expected_1V = model.next_token_logits(model.encode([[1, 2, 3]]), [[4, 5]])
    torch.testing.assert_close(logits_1V, expected_1V, atol=2e-5, rtol=2e-4)
    for each in (first, second):
        each.end()
    decoder.logits([decoder.begin([1, 2, 3])])
    assert len(read) == 3, "the test's own, and one of what nobody had kept"


def test_writing_ends_with_the_end_token_and_with_the_context() -> None:
    model = make()
    sampling = Sampling(temperature=0, max_tokens=100)
    nn.init.zeros_(model.head.weight)
    with torch.no_grad():
        written = list(generate(model, [1, 2, 3], sampling))
        assert written == [0] * (model.context - 1)
        model.head.weight[model.end] = 100 * model.head.weight.new_ones(16)
        model.norm = nn.Sequential(nn.Linear(16, 16), nn.Softmax(-1))
        assert list(generate(model, [1, 2, 3], sampling)) == []


def test_without_rows_to_keep_whole_targets_are_computed() -> None:
    model = make()
    model.mixtures[1] = Passing()
    assert not model.can_extend
    written = list(generate(model, [1, 2, 3], Sampling(temperature=0, max_tokens=3)))
    prefix: list[int] = []
    for token in written:
        assert model.next_token_logits(model.encode([[1, 2, 3]]), [prefix]).argmax() == token
        prefix.append(token)


class Passing(nn.Module):
    """A mixture without experts."""

    def forward(self, x_RD: torch.Tensor, segments: Segments) -> torch.Tensor:
        return x_RD


def test_it_learns_to_copy_its_source() -> None:
    manifest = two_layers(hidden=32)
    swarm = LocalSwarm(manifest, TrainerSettings(top_k=2))
    model = EncoderDecoder(manifest, swarm.mixture, 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sources = [[a, b, c] for a in range(3) for b in range(3) for c in range(2)]
    pairs = Pairs(sources, [[*source, model.end] for source in sources])
    first = model.loss(pairs).item()
    for _ in range(40):
        optimizer.zero_grad()
        torch.autograd.backward(model.loss(pairs))
        optimizer.step()
        rebalance(model)
    assert model.loss(pairs).item() < first / 4
    assert all(expert.update_count for expert in swarm.dispatcher.experts.values())


def test_equal_manifests_give_equal_parameters() -> None:
    first, second = (
        EncoderDecoder(two_layers(), lambda layer: nn.Linear(2, 2), 8).state_dict() for _ in range(2)
    )
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert first["embedding.weight"].shape == first["head.weight"].shape == (8 + 2 + 100, 16)


def test_the_manifest_says_which_model_it_is() -> None:
    plain = make_manifest((2, 3))
    assert isinstance(make_model(plain, lambda layer: nn.Identity(), TOKENS), LanguageModel)
    assert isinstance(make_model(two_layers(), lambda layer: nn.Identity(), TOKENS), EncoderDecoder)
    with pytest.raises(SettingsError, match="an encoder-decoder can't read a memory while it writes"):
        RetrievalSpec.of(TrainerSettings(memory="docs"), two_layers().model)
    with pytest.raises(SettingsError, match="is an encoder-decoder, which this command can't use"):
        LanguageModel(two_layers(), lambda layer: nn.Identity())


def test_a_model_that_does_not_fit_is_refused_before_it_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = two_layers()
    model = EncoderDecoder(manifest, lambda layer: nn.Linear(2, 2), 8)
    size = sum(parameter.nbytes for parameter in model.parameters())
    memory = SimpleNamespace(available=size + 1000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    require_memory(manifest, lambda layer: nn.Linear(2, 2), 8, 1)
    memory.available = size - 1000
    with pytest.raises(SettingsError, match="the trainer's part of this swarm's model takes"):
        require_memory(manifest, lambda layer: nn.Linear(2, 2), 8, 1)


def test_a_source_longer_than_the_context_is_a_programmer_error() -> None:
    with pytest.raises(AssertionError, match="at most 16 tokens"):
        make().encode([[0] * 17])
    with pytest.raises(AssertionError, match="without tokens"):
        make().encode([[]])
