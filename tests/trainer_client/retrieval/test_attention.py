"""Chunked cross-attention compared with a loop over rows, and which outputs may depend on which inputs."""

import math

import torch
from expert_fakes import make_manifest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dht.manifest import Manifest, ModelSpec
from talkoot.train.local import LocalSwarm
from trainer_client.model import LanguageModel
from trainer_client.retrieval.attention import NOTHING, ChunkedCrossAttention, RetrievalSpec
from trainer_client.settings import TrainerSettings

SPEC = RetrievalSpec(chunk=4, neighbours=2, length=6, layers=(1,))
SMALL = Manifest.model_validate(
    {"name": "sauna", "model": {"layers": 2, "hidden": 16, "heads": 2, "context": 24, "feed_forward": 32}}
)


def found_by(tokens_BT: Tensor, spec: RetrievalSpec) -> Tensor:
    """Neighbours that depend only on all tokens of their chunk. Some chunks have fewer."""
    chunks = spec.chunks(tokens_BT.shape[1])
    neighbours = spec.nothing(len(tokens_BT), chunks)
    for row, tokens_T in enumerate(tokens_BT):
        for chunk in range(chunks):
            some = tokens_T[chunk * spec.chunk : (chunk + 1) * spec.chunk]
            drawn = torch.Generator().manual_seed(hash(tuple(some.tolist())) % 2**31)
            for each in range(int(torch.randint(spec.neighbours + 1, (), generator=drawn))):
                length = int(torch.randint(1, spec.length + 1, (), generator=drawn))
                neighbours[row, chunk, each, :length] = torch.randint(256, (length,), generator=drawn)
    return neighbours


def awakened(model: LanguageModel) -> LanguageModel:
    """Gives cross-attention random parameters in place of the zeros that it starts with."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.startswith("retrieval.attention") and "output" in name:
            nn.init.normal_(parameter, std=0.5, generator=generator)
    return model


def make_model() -> LanguageModel:
    return awakened(LanguageModel(SMALL, lambda layer: nn.Identity(), retrieval=SPEC))


def naive(layer: ChunkedCrossAttention, x_TD: Tensor, encoded_UNLD: Tensor, present_UNL: Tensor) -> Tensor:
    """Row by row and head by head, as in algorithm 1 of the paper, with smeared keys and an option that adds
    nothing.
    """
    rows = []
    size = layer.query.out_features // layer.heads

    def key_and_value(encoded_D: Tensor, head: int) -> Tensor:
        both_2HC: Tensor = layer.key_value(layer.neighbour_norm(encoded_D)).view(2, layer.heads, size)
        return both_2HC[:, head]

    for position, row_D in enumerate(x_TD):
        chunk = (position + 1) // layer.chunk - 1
        if chunk < 0:
            rows.append(row_D)
            continue
        query = layer.query(layer.norm(row_D)).view(layer.heads, size)
        seen = []
        for head in range(layer.heads):
            scores, values = [torch.zeros(())], [torch.zeros(size)]
            smear = layer.smear_H[head].sigmoid()
            for encoded_LD, present_L in zip(encoded_UNLD[chunk], present_UNL[chunk], strict=True):
                key_before = torch.zeros(size)
                for encoded_D, is_there in zip(encoded_LD, present_L, strict=True):
                    key, value = key_and_value(encoded_D, head)
                    if is_there:
                        smeared = smear * key_before + (1 - smear) * key
                        scores.append(query[head] @ smeared / math.sqrt(size))
                        values.append(value)
                    key_before = key
            shares = torch.stack(scores).softmax(dim=0)
            seen.append((shares[:, None] * torch.stack(values)).sum(dim=0))
        rows.append(row_D + layer.output(torch.cat(seen)))
    return torch.stack(rows)


@given(st.integers(0, 2**31), st.integers(1, 19))
@settings(max_examples=20)
def test_each_row_attends_to_the_neighbours_of_the_last_whole_chunk(seed: int, length: int) -> None:
    torch.default_generator.manual_seed(seed)
    model = ModelSpec(layers=1, hidden=8, heads=2, context=32, feed_forward=8)
    layer = ChunkedCrossAttention(model, chunk=4)
    nn.init.normal_(layer.output.weight)
    chunks = length // 4
    nn.init.normal_(layer.smear_H)
    x_BTD, encoded_BUNLD = torch.randn(2, length, 8), torch.randn(2, chunks, 2, 3, 8)
    present_BUNL = torch.rand(2, chunks, 2, 3) < 0.6
    read = layer.keys_values(encoded_BUNLD.flatten(0, 1), present_BUNL.flatten(0, 1))
    expected = [naive(layer, *each) for each in zip(x_BTD, encoded_BUNLD, present_BUNL, strict=True)]
    torch.testing.assert_close(layer(x_BTD, read), torch.stack(expected), atol=1e-5, rtol=1e-4)


@given(st.integers(0, 2**31), st.integers(0, 23))
@settings(max_examples=30)
def test_a_changed_token_changes_no_logit_before_it_though_it_changes_neighbours(seed: int, at: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(256, (2, 24), generator=generator)
    changed = tokens.clone()
    changed[0, at] = (changed[0, at] + 1) % 256
    model = make_model()
    with torch.no_grad():
        before = model(tokens, found_by(tokens, SPEC))
        after = model(changed, found_by(changed, SPEC))
    torch.testing.assert_close(after[0, :at], before[0, :at], rtol=0, atol=1e-5)
    torch.testing.assert_close(after[1], before[1], rtol=0, atol=1e-5)


def test_a_row_finds_what_follows_its_own_token_in_a_neighbour_before_anything_is_learned() -> None:
    torch.default_generator.manual_seed(0)
    layer = ChunkedCrossAttention(
        ModelSpec(layers=1, hidden=256, heads=1, context=32, feed_forward=8), chunk=1
    )
    encoded_1NLD = torch.randn(1, 1, 20, 256)
    read = layer.keys_values(encoded_1NLD, torch.ones(1, 1, 20, dtype=torch.bool))
    scores_LK = layer.query(layer.norm(encoded_1NLD[0, 0])) @ read.keys_PHKC[0, 0].T
    assert scores_LK[:-1].argmax(dim=1).tolist() == list(range(1, 20))


def test_neighbours_change_the_rows_from_the_end_of_their_chunk_to_that_of_the_next() -> None:
    model, tokens = make_model(), torch.randint(256, (1, 12))
    none, some = SPEC.nothing(1, 3), SPEC.nothing(1, 3)
    some[0, 0, 0, :3] = 7
    with torch.no_grad():
        # After the last layer, rows no longer affect each other.
        differs_T = (model(tokens, some) - model(tokens, none))[0].abs().amax(dim=1) > 1e-6
    assert differs_T.tolist() == [False] * 3 + [True] * 4 + [False] * 5


def test_a_model_that_reads_begins_as_one_that_does_not() -> None:
    plain = LanguageModel(SMALL, lambda layer: nn.Identity())
    reading = LanguageModel(SMALL, lambda layer: nn.Identity(), retrieval=SPEC)
    tokens = torch.randint(256, (2, 24))
    torch.testing.assert_close(reading(tokens, found_by(tokens, SPEC)), plain(tokens))
    assert all(torch.equal(reading.state_dict()[name], each) for name, each in plain.state_dict().items())


def test_what_is_read_learns_and_padding_does_not_matter() -> None:
    model, tokens = make_model(), torch.randint(256, (2, 25))
    neighbours = found_by(tokens[:, :-1], SPEC)
    torch.autograd.backward(model.loss(tokens, neighbours))
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    wider = torch.nn.functional.pad(neighbours, (0, 3), value=NOTHING)
    torch.testing.assert_close(model.loss(tokens, wider), model.loss(tokens, neighbours))


@given(
    st.integers(0, 2**31),
    st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=3),
)
@settings(max_examples=20)
def test_sequences_that_grow_read_what_whole_ones_do(seed: int, growths: list[list[int]]) -> None:
    torch.default_generator.manual_seed(seed)
    manifest = make_manifest((2, 3))
    spec = RetrievalSpec(chunk=4, neighbours=2, length=6, layers=tuple(range(manifest.model.layers)))
    swarm = LocalSwarm(manifest, TrainerSettings(top_k=manifest.routing.top_k))
    model = awakened(LanguageModel(manifest, swarm.mixture, retrieval=spec)).eval()
    most = manifest.model.context
    texts = [torch.randint(256, (min(sum(growth), most),)) for growth in growths]
    states = [model.begin() for _ in texts]
    for step in range(max(map(len, growths))):
        some = [n for n, growth in enumerate(growths) if step < len(growth)]
        some = [n for n in some if states[n].length < len(texts[n])]
        if not some:
            continue
        new = [texts[n][states[n].length :][: growths[n][step]].tolist() for n in some]
        neighbours = []
        for n, tokens in zip(some, new, strict=True):
            begin, end = (spec.chunks(at) for at in (states[n].length, states[n].length + len(tokens)))
            neighbours.append(found_by(texts[n][None], spec)[0, begin:end])
        logits_SV = model.extend(new, [states[n] for n in some], neighbours)
        for n, logits_V in zip(some, logits_SV, strict=True):
            whole = texts[n][None, : states[n].length]
            with torch.no_grad():
                expected_V = model(whole, found_by(whole, spec))[0, -1]
            torch.testing.assert_close(logits_V, expected_V, atol=2e-5, rtol=2e-4)
