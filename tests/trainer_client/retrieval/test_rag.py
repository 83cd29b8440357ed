"""RAG's formulas compared with sums over all passages and answers, and its decoding compared with all answers."""

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from trainer_client.retrieval.rag import (
    Hypothesis,
    NextTokens,
    Tokens,
    beam_search,
    decode_sequence,
    decode_token,
    passage_log_probabilities,
    sequence_log_likelihood,
    token_log_likelihood,
)

END, VOCABULARY, LONGEST = 0, 3, 3
SEEDS = st.integers(0, 2**31)


def all_answers() -> list[Tokens]:
    """All answers that end, and all that have the greatest length."""
    inner = range(1, VOCABULARY)
    ended = [(*some, END) for n in range(LONGEST) for some in itertools.product(inner, repeat=n)]
    return [*ended, *itertools.product(inner, repeat=LONGEST)]


def prefixes() -> list[Tokens]:
    return [some for n in range(LONGEST) for some in itertools.product(range(1, VOCABULARY), repeat=n)]


class Tables:
    """A generator with a random distribution for each prefix and passage."""

    def __init__(self, seed: int, passages: int) -> None:
        drawn = torch.Generator().manual_seed(seed)
        self.number = {prefix: at for at, prefix in enumerate(prefixes())}
        size = (len(self.number), passages, VOCABULARY)
        self.log_NKV = (2 * torch.randn(size, generator=drawn, dtype=torch.float64)).log_softmax(-1)
        self.passages_K = (2 * torch.randn(passages, generator=drawn, dtype=torch.float64)).log_softmax(-1)

    def following(self, some: Sequence[Tokens]) -> Tensor:
        return self.log_NKV[[self.number[prefix] for prefix in some]]

    def with_passage(self, k: int) -> NextTokens:
        return lambda some: self.following(some)[:, k]

    def decode_sequence(self, beam: int) -> list[Hypothesis]:
        """Decodes RAG-Sequence with beam search for each passage."""
        count = len(self.passages_K)

        def score(answers: Sequence[Tokens]) -> Tensor:
            return torch.stack([self.log_KL(answer).sum(-1) for answer in answers])

        each = [self.with_passage(k) for k in range(count)]
        return decode_sequence(self.passages_K, each, score, beam, END, LONGEST)

    def probability(self, answer: Tokens, k: int) -> float:
        """Π_i p(y_i|x,z,y_<i)."""
        return math.prod(
            math.exp(self.log_NKV[self.number[answer[:at]], k, token]) for at, token in enumerate(answer)
        )

    def sequence(self, answer: Tokens) -> float:
        """Σ_z p(z|x) Π_i p(y_i|x,z,y_<i)."""
        return sum(math.exp(p) * self.probability(answer, k) for k, p in enumerate(self.passages_K.tolist()))

    def token(self, answer: Tokens) -> float:
        """Π_i Σ_z p(z|x) p(y_i|x,z,y_<i)."""
        return math.prod(
            sum(
                math.exp(p) * math.exp(self.log_NKV[self.number[answer[:at]], k, token])
                for k, p in enumerate(self.passages_K.tolist())
            )
            for at, token in enumerate(answer)
        )

    def log_KL(self, answer: Tokens) -> Tensor:
        following = self.following([answer[:at] for at in range(len(answer))])  # (L, K, V)
        return following[range(len(answer)), :, list(answer)].T


@given(SEEDS, st.integers(1, 4))
def test_both_likelihoods_are_the_papers_sums(seed: int, passages: int) -> None:
    tables = Tables(seed, passages)
    whole = {"sequence": 0.0, "token": 0.0}
    for answer in all_answers():
        arguments = (tables.passages_K[None], tables.log_KL(answer)[None])
        sequence, token = sequence_log_likelihood(*arguments).exp(), token_log_likelihood(*arguments).exp()
        assert sequence.item() == pytest.approx(tables.sequence(answer), rel=1e-9)
        assert token.item() == pytest.approx(tables.token(answer), rel=1e-9)
        whole["sequence"] += sequence.item()
        whole["token"] += token.item()
    assert whole == {"sequence": pytest.approx(1), "token": pytest.approx(1)}


@given(SEEDS)
def test_answers_of_different_lengths_are_scored_together(seed: int) -> None:
    tables, answers = Tables(seed, 3), [(1, END), (2, 1, END), (END,)]
    padded_BKL = torch.zeros(3, 3, LONGEST, dtype=torch.float64)
    for row, answer in enumerate(answers):
        padded_BKL[row, :, : len(answer)] = tables.log_KL(answer)
    for likelihood in (sequence_log_likelihood, token_log_likelihood):
        together = likelihood(tables.passages_K.expand(3, -1), padded_BKL)
        alone = [likelihood(tables.passages_K[None], tables.log_KL(answer)[None])[0] for answer in answers]
        torch.testing.assert_close(together, torch.stack(alone))


@given(SEEDS)
def test_with_one_passage_both_are_the_generator(seed: int) -> None:
    tables = Tables(seed, 1)
    for answer in all_answers():
        arguments = (tables.passages_K[None], tables.log_KL(answer)[None])
        expected = pytest.approx(tables.probability(answer, 0), rel=1e-9)
        assert sequence_log_likelihood(*arguments).exp().item() == expected
        assert token_log_likelihood(*arguments).exp().item() == expected


def test_tiny_probabilities_do_not_vanish() -> None:
    passages_BK = torch.tensor([[-2000.0, 0.0]]).log_softmax(-1)
    tokens_BKL = torch.full((1, 2, 50), -80.0)
    assert sequence_log_likelihood(passages_BK, tokens_BKL).item() == pytest.approx(-4000)
    assert token_log_likelihood(passages_BK, tokens_BKL).item() == pytest.approx(-4000)


def test_passages_that_were_not_found_have_no_part() -> None:
    scores_BK = torch.tensor([[1.0, 2.0, 9.0], [1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], requires_grad=True)
    found_BK = torch.tensor([[True, True, False], [True, True, True], [False, False, False]])
    log_BK = passage_log_probabilities(scores_BK, found_BK)
    torch.testing.assert_close(log_BK[0, :2], torch.tensor([1.0, 2.0]).log_softmax(-1))
    torch.testing.assert_close(log_BK[1], passage_log_probabilities(scores_BK)[1])
    assert log_BK[0, 2] == -math.inf
    assert (log_BK[2] == -math.inf).all()
    sequence_log_likelihood(log_BK[:2], torch.full((2, 3, 4), -1.0)).sum().backward()
    assert scores_BK.grad is not None
    assert scores_BK.grad.isfinite().all()
    assert scores_BK.grad[0, 2] == 0


@pytest.mark.parametrize("likelihood", [sequence_log_likelihood, token_log_likelihood])
def test_gradients_reach_the_encoder_of_questions_and_the_generator(likelihood: "object") -> None:
    """Both are trained: which passage answers, and what to say then. The passages' vectors do not change."""
    assert callable(likelihood)
    torch.default_generator.manual_seed(0)
    questions, passages_PD = nn.Embedding(2, 8), torch.randn(4, 8)
    generator = nn.Embedding(4, 5)  # what follows depends on the passage alone
    answers = torch.tensor([3, 1])
    optimizer = torch.optim.Adam([*questions.parameters(), *generator.parameters()], 0.1)
    losses = []
    for _ in range(150):
        scores_BP = questions(torch.arange(2)) @ passages_PD.T
        found_BK = scores_BP.topk(3).indices  # of the passages, the best three are read
        log_z_BK = passage_log_probabilities(scores_BP.gather(1, found_BK))
        log_y_BKV = generator(found_BK).log_softmax(-1)
        log_y_BK1 = log_y_BKV.gather(-1, answers[:, None, None].expand(-1, 3, 1))
        loss = -likelihood(log_z_BK, log_y_BK1).mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in questions.parameters())
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in generator.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 < losses[0]


@given(SEEDS, st.integers(2, 4))
@settings(max_examples=30)
def test_gradients_are_those_of_the_sums(seed: int, passages: int) -> None:
    drawn = torch.Generator().manual_seed(seed)
    scores = torch.randn(1, passages, generator=drawn, dtype=torch.float64, requires_grad=True)
    tokens = torch.randn(1, passages, 2, generator=drawn, dtype=torch.float64, requires_grad=True)
    for likelihood in (sequence_log_likelihood, token_log_likelihood):
        torch.autograd.gradcheck(
            lambda s, t, of=likelihood: of(passage_log_probabilities(s), t), (scores, tokens)
        )


@given(SEEDS, st.integers(1, 4))
@settings(max_examples=40)
def test_a_wide_beam_finds_all_answers_in_their_order(seed: int, passages: int) -> None:
    tables, wide = Tables(seed, passages), 100
    found = {
        "token": decode_token(tables.passages_K, tables.following, wide, END, LONGEST),
        "sequence": tables.decode_sequence(wide),
    }
    exact = {"token": tables.token, "sequence": tables.sequence}
    for name, hypotheses in found.items():
        assert {each.tokens for each in hypotheses} == set(all_answers())
        for hypothesis in hypotheses:
            assert math.exp(hypothesis.log_probability) == pytest.approx(
                exact[name](hypothesis.tokens), rel=1e-6
            )
        values = [hypothesis.log_probability for hypothesis in hypotheses]
        assert values == sorted(values, reverse=True)


@given(SEEDS, st.integers(1, 3), st.integers(1, 3))
@settings(max_examples=40)
def test_a_narrow_beam_scores_what_it_meets_exactly(seed: int, passages: int, beam: int) -> None:
    tables = Tables(seed, passages)
    for hypothesis in tables.decode_sequence(beam):
        assert math.exp(hypothesis.log_probability) == pytest.approx(
            tables.sequence(hypothesis.tokens), rel=1e-6
        )
    tokens = decode_token(tables.passages_K, tables.following, beam, END, LONGEST)
    assert len(tokens) <= beam
    for hypothesis in tokens:
        assert math.exp(hypothesis.log_probability) == pytest.approx(
            tables.token(hypothesis.tokens), rel=1e-6
        )


def test_an_answer_that_no_passage_likes_best_may_be_the_best() -> None:
    """For each passage alone, another answer is first. The answer that is second for each is the best over both."""
    tables = Tables(0, 2)
    tables.passages_K = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
    begin = torch.tensor([[0.0, 0.55, 0.45], [0.55, 0.0, 0.45]], dtype=torch.float64).log()
    tables.log_NKV[tables.number[()]] = begin
    tables.log_NKV[tables.number[1,]] = tables.log_NKV[tables.number[2,]] = torch.tensor(
        [[1.0, 0.0, 0.0]] * 2, dtype=torch.float64
    ).log()
    best, *_ = tables.decode_sequence(2)
    assert best.tokens == (2, END)
    assert math.exp(best.log_probability) == pytest.approx(0.45)
    greedy, *_ = tables.decode_sequence(1)
    assert greedy.tokens != (2, END)


def test_without_a_passage_nothing_is_said() -> None:
    tables = Tables(0, 2)
    tables.passages_K = torch.full((2,), -math.inf, dtype=torch.float64)
    assert tables.decode_sequence(3) == []
    assert decode_token(tables.passages_K, tables.following, 3, END, LONGEST) == []


def test_a_beam_goes_on_while_any_answer_grows() -> None:
    tables = Tables(1, 1)
    found = beam_search(tables.with_passage(0), 100, END, 2)
    assert all(each.tokens[-1] == END or len(each.tokens) == 2 for each in found)
    assert beam_search(tables.with_passage(0), 2, END, 0)[0].tokens == ()
