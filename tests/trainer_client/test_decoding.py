"""Continuing sequences: each as if it were alone."""

import torch
from expert_fakes import make_manifest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from trainer_client.decoding import Decoder
from trainer_client.model import LanguageModel

PROMPTS = st.lists(st.lists(st.integers(0, 255), min_size=1, max_size=40), min_size=1, max_size=5)


@given(PROMPTS, st.integers(0, 2**31))
def test_sequences_of_all_lengths_are_continued_as_if_alone(prompts: list[list[int]], seed: int) -> None:
    model = LanguageModel(make_manifest((2, 3)), lambda layer: nn.Identity())
    together = Decoder(model)
    sequences = [together.begin(prompt) for prompt in prompts]
    alone = Decoder(model)
    others = [alone.begin(prompt) for prompt in prompts]
    generator = torch.Generator().manual_seed(seed)
    for _ in range(3):
        logits_SV = together.logits(sequences)
        for logits_V, sequence, other in zip(logits_SV, sequences, others, strict=True):
            torch.testing.assert_close(logits_V, alone.logits([other])[0])
            token = int(torch.randint(256, (1,), generator=generator))
            sequence.append(token)
            other.append(token)
