"""Text that is written chunk by chunk reads the same passages as the same text computed at once."""

from collections.abc import Sequence

import torch
from expert_fakes import make_manifest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dht.memory import Passage
from talkoot.train.local import LocalSwarm
from trainer_client.decoding import TextDecoder
from trainer_client.inference import generate
from trainer_client.model import LanguageModel
from trainer_client.retrieval.attention import RetrievalSpec
from trainer_client.retrieval.lookup import Neighbours
from trainer_client.settings import Sampling, TrainerSettings

SPEC = RetrievalSpec(chunk=4, neighbours=2, length=6, layers=(0, 1))


class Library:
    """Has for each chunk a passage with its tokens in reverse, and records requests."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, ...]] = []

    def find(self, chunks: Sequence[Sequence[int]]) -> list[Neighbours]:
        self.asked += [tuple(chunk) for chunk in chunks]
        return [self.of(chunk) for chunk in chunks]

    def of(self, chunk: Sequence[int]) -> Neighbours:
        tokens = SPEC.nothing()
        tokens[0, :4] = torch.tensor(list(reversed(chunk)))
        return Neighbours(tokens, (Passage("text", f"{list(chunk)}", "source", 0, "MIT"),))


def make_model(*, remote: bool) -> LanguageModel:
    manifest = make_manifest((2, 3))
    swarm = LocalSwarm(manifest, TrainerSettings(top_k=manifest.routing.top_k))
    model = LanguageModel(manifest, swarm.mixture if remote else lambda layer: nn.Identity(), retrieval=SPEC)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.startswith("retrieval.attention") and "output" in name:
            nn.init.normal_(parameter, std=0.5, generator=generator)
    return model


def check(prompts: Sequence[Sequence[int]], steps: int, *, remote: bool) -> None:
    model, library = make_model(remote=remote), Library()
    decoder = TextDecoder(model, find=library.find)
    sequences = [decoder.begin(prompt) for prompt in prompts]
    for step in range(steps):
        logits_SV = decoder.logits(sequences)
        for sequence, logits_V in zip(sequences, logits_SV, strict=True):
            tokens = sequence.tokens
            chunks = [tokens[at : at + 4] for at in range(0, len(tokens) // 4 * 4, 4)]
            given = [library.of(chunk).tokens_NL for chunk in chunks]
            given_BUNL = torch.stack(given)[None] if given else SPEC.nothing(1, 0)
            with torch.no_grad():
                expected_V = model(torch.tensor([tokens]), given_BUNL)[0, -1]
            torch.testing.assert_close(logits_V, expected_V, atol=2e-5, rtol=2e-4)
            sequence.append((7 * step + len(tokens)) % 256)


@given(
    st.lists(st.lists(st.integers(0, 255), min_size=1, max_size=20), min_size=1, max_size=3), st.booleans()
)
@settings(max_examples=15, deadline=None)
def test_each_token_is_predicted_as_from_the_whole_text(prompts: list[list[int]], remote: bool) -> None:
    check(prompts, 10, remote=remote)


def test_a_chunk_is_looked_up_once_and_named_once() -> None:
    library = Library()
    decoder = TextDecoder(make_model(remote=True), find=library.find)
    sequence = decoder.begin([1, 2, 3, 4, 5, 6, 7])
    named = []
    for token in (8, 9, 10):
        decoder.logits([sequence])
        named.append([passage.title for passage in sequence.take_read()])
        sequence.append(token)
    decoder.logits([sequence])
    assert named == [["[1, 2, 3, 4]"], ["[5, 6, 7, 8]"], []]
    assert library.asked == [(1, 2, 3, 4), (5, 6, 7, 8)]


def test_a_model_whose_memory_is_away_writes_on() -> None:
    sampling = Sampling(temperature=0, max_tokens=6)
    alone = list(generate(make_model(remote=True), [1, 2, 3, 4], sampling))
    nothing = list(
        generate(
            make_model(remote=True),
            [1, 2, 3, 4],
            sampling,
            find=lambda some: [Neighbours(SPEC.nothing())] * len(some),
        )
    )
    assert alone == nothing
