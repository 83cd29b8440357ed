"""The language model, with mixtures that are computed in this process."""

import math
from collections.abc import Coroutine
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dht.beam_search import Selection
from dht.directory import LiveExperts
from dht.manifest import Manifest
from peer.errors import SettingsError
from talkoot.train.local import LocalSwarm
from trainer_client.dispatch.batches import ForwardPass, RoutedRows
from trainer_client.model import LanguageModel, require_memory
from trainer_client.retrieval.attention import RetrievalSpec
from trainer_client.settings import TrainerSettings


class DenseMixture(nn.Module):
    """Computes what a single expert without attention would give each token."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, hidden), nn.GELU())

    def forward(self, x_BTD: Tensor) -> Tensor:
        y_BTD: Tensor = x_BTD + self.inner(x_BTD)
        return y_BTD


def make_manifest(**model: int | str) -> Manifest:
    small = {"layers": 2, "hidden": 32, "heads": 2, "context": 16, "feed_forward": 64}
    return Manifest.model_validate({"name": "sauna", "model": small | model})


def make_model(**model: int | str) -> LanguageModel:
    return LanguageModel(make_manifest(**model), lambda layer: DenseMixture(32))


def test_there_are_logits_for_every_position() -> None:
    logits = make_model()(torch.randint(256, (3, 16)))
    assert logits.shape == (3, 16, 256)
    assert logits.dtype == torch.float32


@settings(max_examples=20, deadline=None)
@given(
    st.integers(0, 2**32 - 1), st.integers(0, 15), st.integers(0, 2), st.sampled_from(["layer", "attention"])
)
def test_a_changed_token_changes_no_logit_before_it(
    seed: int, at: int, local_layers: int, local: str
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(256, (2, 16), generator=generator)
    changed = tokens.clone()
    changed[0, at] = (changed[0, at] + 1) % 256
    model = make_model(local_layers=local_layers, local=local)
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    torch.testing.assert_close(after[0, :at], before[0, :at], rtol=0, atol=1e-5)
    torch.testing.assert_close(after[1], before[1], rtol=0, atol=1e-5)
    assert not torch.allclose(after[0, at], before[0, at])


@pytest.mark.parametrize(("local", "local_layers"), [("layer", 1), ("attention", 0)])
def test_a_later_position_sees_an_earlier_token_through_the_local_part(local: str, local_layers: int) -> None:
    tokens = torch.zeros(1, 16, dtype=torch.int64)
    changed = tokens.clone()
    changed[0, 0] = 1
    model = make_model(local=local, local_layers=local_layers)
    assert not torch.allclose(model(tokens)[0, -1], model(changed)[0, -1])


def test_the_loss_is_the_mean_of_minus_log_probability_in_nats() -> None:
    model = make_model()
    tokens = torch.randint(256, (2, 9))
    probabilities = model(tokens[:, :-1]).softmax(dim=-1)
    chosen = [probabilities[b, t, tokens[b, t + 1]].item() for b in range(2) for t in range(8)]
    expected = -sum(map(math.log, chosen)) / len(chosen)
    assert model.loss(tokens).item() == pytest.approx(expected, rel=1e-4)


def test_the_loss_leaves_the_tokens_of_the_routing_prefix_out() -> None:
    manifest = Manifest.model_validate({**make_manifest().model_dump(), "routing": {"prefix": 3}})
    model = LanguageModel(manifest, lambda layer: DenseMixture(32))
    tokens = torch.randint(256, (2, 9))
    predicted = model(tokens[:, :-1]).log_softmax(dim=-1)
    chosen = [predicted[b, t, tokens[b, t + 1]] for b in range(2) for t in range(2, 8)]
    torch.testing.assert_close(model.loss(tokens), -torch.stack(chosen).mean())


@pytest.mark.parametrize("prefix", [0, 4])
def test_likelihoods_are_those_of_each_sequence_alone_and_no_padding_is_sent(
    prefix: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = make_manifest()
    routing = manifest.routing.model_copy(update={"prefix": prefix})
    swarm = LocalSwarm(manifest.model_copy(update={"routing": routing}), TrainerSettings())
    send, sent = swarm.dispatcher.send, list[int]()

    def counting(
        rows: RoutedRows, selection: Selection, live: LiveExperts
    ) -> Coroutine[Any, Any, ForwardPass]:
        sent.append(len(rows.inputs))
        return send(rows, selection, live)

    monkeypatch.setattr(swarm.dispatcher, "send", counting)
    model = LanguageModel(swarm.manifest, swarm.mixture).eval()
    sources, targets = [[1], [2, 3, 4, 5, 6, 7, 8, 9], [10, 11, 12]], [[13, 14], [15], [16, 17, 18]]
    with torch.no_grad():
        together = model.log_likelihood(sources, targets)
        assert sent == [2 + 8 + 5] * 2
        for row, (source, target) in enumerate(zip(sources, targets, strict=True)):
            logits = model(torch.tensor([[*source, *target[:-1]]]))[0, len(source) - 1 :]
            expected = logits.log_softmax(-1)[range(len(target)), target].tolist()
            padded = expected + [0.0] * (3 - len(target))
            assert together[row].tolist() == pytest.approx(padded, abs=1e-5)


def test_the_first_loss_is_near_that_of_guessing() -> None:
    loss = make_model().loss(torch.randint(256, (8, 17))).item()
    assert loss == pytest.approx(math.log(256), abs=0.6)


def test_equal_manifests_give_equal_parameters_and_other_seeds_other_ones() -> None:
    torch.default_generator.manual_seed(1)
    first = make_model(seed=3).state_dict()
    torch.default_generator.manual_seed(2)
    second = make_model(seed=3).state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = make_model(seed=4).state_dict()
    assert not torch.equal(first["embedding.weight"], other["embedding.weight"])


def test_equal_vocabularies_give_equal_parameters_too() -> None:
    first, second = (LanguageModel(make_manifest(), lambda layer: DenseMixture(32), 500) for _ in range(2))
    assert first(torch.tensor([[499]])).shape == (1, 1, 500)
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())


def test_the_manifest_chooses_norm_and_activation_of_the_dense_part() -> None:
    manifest = make_manifest(norm="rms", activation="swiglu")
    modules = [type(m) for m in LanguageModel(manifest, lambda layer: nn.Identity()).modules()]
    assert modules.count(nn.RMSNorm) == 2 * 2 + 1
    assert modules.count(nn.SiLU) == 2
    assert nn.LayerNorm not in modules


@pytest.mark.parametrize("local_layers", [0, 2])
def test_with_local_attention_the_mixture_takes_the_place_of_a_feed_forward_block(local_layers: int) -> None:
    """Switch Transformer (arXiv 2101.03961), figure 2: attention, then the mixture, with no feed-forward block in
    between.
    """
    model = make_model(local_layers=local_layers, local="attention")
    names = set(model.local[0].state_dict())
    last = f"layers.{local_layers}."
    assert {name for name in names if name.startswith(last)} == {
        f"{last}attention_{part}" for part in ("norm.weight", "norm.bias", "input.weight", "output.weight")
    }
    whole = make_model(local_layers=local_layers).local[0].state_dict()
    assert {name for name in names if not name.startswith(last)} == set(whole)


def test_what_a_mixture_draws_changes_no_other_parameter() -> None:
    def plain(layer: int) -> nn.Module:
        return DenseMixture(32)

    def with_more(layer: int) -> nn.Module:
        mixture = DenseMixture(32)
        mixture.more = nn.Linear(32, 32)
        return mixture

    first = LanguageModel(make_manifest(), plain).state_dict()
    second = LanguageModel(make_manifest(), with_more).state_dict()
    assert first.keys() < second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_mixtures_start_different_from_each_other() -> None:
    parameters = make_model().state_dict()
    assert not torch.equal(parameters["mixtures.0.inner.1.weight"], parameters["mixtures.1.inner.1.weight"])


def test_the_highest_seed_of_a_manifest_works() -> None:
    make_model(seed=2**63 - 1)


def test_each_layer_asks_for_its_own_mixture() -> None:
    asked: list[int] = []

    def make_mixture(layer: int) -> nn.Module:
        asked.append(layer)
        return nn.Identity()

    LanguageModel(make_manifest(layers=3), make_mixture)
    assert asked == [0, 1, 2]


def test_a_sequence_longer_than_the_context_is_a_programmer_error() -> None:
    with pytest.raises(AssertionError, match="at most 16 tokens"):
        make_model()(torch.zeros(1, 17, dtype=torch.int64))


def test_the_model_learns_a_small_text() -> None:
    model = make_model()
    tokens = torch.tensor([list(b"sauna sauna sauna")])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    first = model.loss(tokens).item()
    for _ in range(30):
        optimizer.zero_grad()
        loss = model.loss(tokens)
        torch.autograd.backward(loss)
        optimizer.step()
    assert model.loss(tokens).item() < first / 4


def test_a_model_that_does_not_fit_is_refused_before_it_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = make_manifest(layers=2)
    size = sum(parameter.nbytes for parameter in LanguageModel(manifest, make_gate, 7).parameters())
    memory = SimpleNamespace(available=4 * size)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    require_memory(manifest, make_gate, 7, 4)
    memory.available = 3 * size
    with pytest.raises(
        SettingsError, match=r"the trainer's part of this swarm's model takes .* end other programs"
    ):
        require_memory(manifest, make_gate, 7, 4)
    reads = RetrievalSpec(chunk=2)
    whole = sum(parameter.nbytes for parameter in LanguageModel(manifest, make_gate, 7, reads).parameters())
    memory.available = 4 * whole
    require_memory(manifest, make_gate, 7, 4, reads)
    memory.available = 2 * (size + whole)
    require_memory(manifest, make_gate, 7, 4)
    with pytest.raises(SettingsError, match="the trainer's part of this swarm's model takes"):
        require_memory(manifest, make_gate, 7, 4, reads)
    huge = {"layers": 64, "hidden": 16384, "heads": 256, "local_layers": 16, "feed_forward": 65536}
    with pytest.raises(SettingsError, match="TB"):
        require_memory(Manifest.model_validate({"name": "huge", "model": huge}), make_gate, 7, 4)


def make_gate(layer: int) -> nn.Module:
    return nn.Linear(8, 3)
