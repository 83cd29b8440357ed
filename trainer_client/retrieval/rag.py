"""RAG-Sequence and RAG-Token, as functions of the outputs of a retriever and a generator.

Lewis et al. 2020 (arXiv 2005.11401), sections 2.1 and 2.5. Everything is in logarithms. Gradients flow to whatever
computed the scores of the passages and the logits of the tokens: to the query encoder, but not to the passages.

Shapes: B questions, K passages found for each, L tokens of an answer, V words of the vocabulary, N prefixes, A answers.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

Tokens: TypeAlias = tuple[int, ...]
NextTokens: TypeAlias = Callable[[Sequence[Tokens]], Tensor]
"""Returns the log probabilities of the token after each prefix, [N, V]; with each passage, [N, K, V]."""


@dataclass(frozen=True)
class Hypothesis:
    """An answer or its beginning, including the end token if it has one."""

    tokens: Tokens
    log_probability: float


def passage_log_probabilities(scores_BK: Tensor, found_BK: Tensor | None = None) -> Tensor:
    """log p(z|x), [B, K]: a softmax over the passages that were found. `found`: False where there are fewer than K.

    For a question without any passage, all are -inf.
    """
    if found_BK is None:
        return scores_BK.log_softmax(-1)
    # a row of -inf has no softmax, and no gradient
    some_B1 = found_BK.any(-1, keepdim=True)
    masked_BK = scores_BK.masked_fill(~found_BK & some_B1, -math.inf)
    return masked_BK.log_softmax(-1).masked_fill(~found_BK, -math.inf)


def sequence_log_likelihood(passages_BK: Tensor, tokens_BKL: Tensor) -> Tensor:
    """log p(y|x) of RAG-Sequence, [B]: log Σ_z p(z|x) Π_i p(y_i|x,z,y_<i). The whole answer comes from one passage.

    `passages`: log p(z|x). `tokens`: log p(y_i|x,z,y_<i) of the answer's tokens, and 0 after its end.
    """
    return (passages_BK + tokens_BKL.sum(-1)).logsumexp(-1)


def token_log_likelihood(passages_BK: Tensor, tokens_BKL: Tensor) -> Tensor:
    """log p(y|x) of RAG-Token, [B]: Σ_i log Σ_z p(z|x) p(y_i|x,z,y_<i). Each token may come from another passage."""
    return (passages_BK[..., None] + tokens_BKL).logsumexp(-2).sum(-1)


def next_token_log_probabilities(passages_K: Tensor, next_NKV: Tensor) -> Tensor:
    """log Σ_z p(z|x) p(y_i|x,z,y_<i) of RAG-Token for every token, [N, V]."""
    return (passages_K[:, None] + next_NKV).logsumexp(-2)


def beam_search(following: NextTokens, beam: int, end: int, longest: int) -> list[Hypothesis]:
    """The best answers found, best first, at most `beam`. An answer without `end` has `longest` tokens.

    At each step, the `beam` best are kept, including finished ones, because no answer becomes more probable with more
    tokens.
    """
    kept = [Hypothesis((), 0.0)]
    for _ in range(longest):
        done = [each for each in kept if each.tokens[-1:] == (end,)]
        growing = [each for each in kept if each.tokens[-1:] != (end,)]
        if not growing:
            break
        next_NV = following([each.tokens for each in growing])
        totals_NV = next_NV + next_NV.new_tensor([each.log_probability for each in growing])[:, None]
        values, places = totals_NV.flatten().topk(min(beam, totals_NV.numel()))
        for value, place in zip(values.tolist(), places.tolist(), strict=True):
            row, token = divmod(place, totals_NV.shape[1])
            if value > -math.inf:
                done.append(Hypothesis((*growing[row].tokens, token), value))
        kept = sorted(done, key=lambda each: (-each.log_probability, each.tokens))[:beam]
    return kept


@torch.no_grad()
def decode_token(
    passages_K: Tensor, following: NextTokens, beam: int, end: int, longest: int
) -> list[Hypothesis]:
    """RAG-Token's answers, best first: an ordinary beam search, since each next token has one distribution."""

    def marginalised(prefixes: Sequence[Tokens]) -> Tensor:
        return next_token_log_probabilities(passages_K, following(prefixes))

    return beam_search(marginalised, beam, end, longest)


@torch.no_grad()
def decode_sequence(
    passages_K: Tensor,
    following: Sequence[NextTokens],
    score: Callable[[Sequence[Tokens]], Tensor],
    beam: int,
    end: int,
    longest: int,
) -> list[Hypothesis]:
    """RAG-Sequence's answers, best first: a beam search with each passage, whose answers are then scored with all of
    them.

    `following`: for each passage, predicts the next tokens. `score`: returns log p(y|x,z) of whole answers with each
    passage, [A, K].
    """
    answers = sorted(
        {
            each.tokens
            for of_passage, log_probability in zip(following, passages_K.tolist(), strict=True)
            if log_probability > -math.inf
            for each in beam_search(of_passage, beam, end, longest)
        }
    )
    if not answers:
        return []
    values = (passages_K + score(answers)).logsumexp(-1).tolist()
    hypotheses = [Hypothesis(tokens, value) for tokens, value in zip(answers, values, strict=True)]
    return sorted(hypotheses, key=lambda each: (-each.log_probability, each.tokens))
