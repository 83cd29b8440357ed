"""Models that answer from passages: what they learn, what they find with it, and which answers they give."""

import math
import threading
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from shelf import (
    DIMENSIONS,
    MANIFEST,
    PAIRS,
    QUESTIONS,
    SHELF,
    TOKENIZER,
    Shelf,
    learned,
    model_of,
    passage,
    settings,
)
from torch import Tensor, nn

from dht.manifest import Manifest
from dht.memory import Passage
from peer.errors import DataError, SettingsError, UnreachableError, UserError
from talkoot.train.local import LocalSwarm
from trainer_client.data.questions import Question, QuestionBatches
from trainer_client.data.tokenizer import ByteTokenizer
from trainer_client.data.tokenizer import Tokens as Encoded
from trainer_client.decoding import MOST_ROWS, make_decoder
from trainer_client.encoder_decoder import EncoderDecoder
from trainer_client.memory.encoder import to_vectors
from trainer_client.model import LanguageModel
from trainer_client.retrieval.answering import (
    Answerer,
    Continuations,
    PassageLookup,
    QueryEncoder,
    Reader,
    check_encoder,
    make_rag_model,
)
from trainer_client.retrieval.lookup import NeighbourLoader
from trainer_client.retrieval.rag import Tokens
from trainer_client.training.loop import Training

generators = pytest.mark.parametrize("manifest", [MANIFEST, PAIRS], ids=["decoder", "encoder-decoder"])


@pytest.mark.parametrize(
    ("objective", "manifest"),
    [
        pytest.param("rag-sequence", MANIFEST, id="rag-sequence-decoder", marks=pytest.mark.slow),
        pytest.param("rag-token", PAIRS, id="rag-token-encoder-decoder"),
        pytest.param("rag-token", MANIFEST, id="rag-token-decoder", marks=pytest.mark.slow),
        pytest.param("rag-sequence", PAIRS, id="rag-sequence-encoder-decoder", marks=pytest.mark.slow),
    ],
)
def test_generator_and_query_encoder_learn_and_answers_name_their_sources(
    objective: str, manifest: Manifest
) -> None:
    model, training, lookup = learned(objective, 60, manifest)
    assert training.history.validation_losses[-1] < training.history.validation_losses[0] / 4
    assert model.questions.change.weight.abs().sum() > 0
    assert lookup.counts.failed == lookup.counts.without == 0
    answerer = Answerer(model)
    for question in QUESTIONS:
        found, _ = lookup.search([question.text])
        for marginal in ("sequence", "token"):
            answers = answerer.answers(question.text, found, marginal)
            best = answers[0]
            assert best.text == question.answer
            assert best.probability == max(each.probability for each in answers)
            assert sum(source.share for source in best.sources) == pytest.approx(1)
            assert [source.share for source in best.sources] == sorted(
                (source.share for source in best.sources), reverse=True
            )


@generators
def test_a_model_learns_from_questions_without_answers(manifest: Manifest) -> None:
    """Of an encoder-decoder's empty answer, nothing is text."""
    chosen = settings(steps=1)
    model = model_of(chosen, manifest)
    questions = [Question(f"what is {name}?") for name in ("kiuas", "vihta")]
    batches = QuestionBatches(questions, 0, 0.5, model.reader.target, TOKENIZER.token_bytes)
    loader = NeighbourLoader(
        PassageLookup(SHELF, model.questions, 2), lambda number: batches.batch(number, 5)
    )
    summary = Training(model, batches, chosen, None, loader).run(lambda progress: None, threading.Event())
    assert summary.validation_loss_last is not None
    assert summary.bits_per_byte == (
        math.inf if manifest is PAIRS else pytest.approx(summary.validation_loss_last / math.log(2))
    )


@generators
def test_the_loss_is_the_papers_sum_over_what_was_found(manifest: Manifest) -> None:
    """Computed with the generator alone, one passage after another."""
    for objective in ("rag-sequence", "rag-token"):
        model = model_of(settings(objective=objective), manifest).eval()
        found, _ = PassageLookup(SHELF, model.questions, 2).search([each.text for each in QUESTIONS[:2]])
        expected, tokens = 0.0, 0
        for row, question in enumerate(QUESTIONS[:2]):
            chances = model.questions.log_probabilities(found, 2)[row].exp()
            target = model.reader.target(question)
            likelihoods_KL = torch.stack(
                [
                    _by_whole_sequences(
                        model.generator, model.reader.source(question.text, hit.passage), target
                    )
                    for hit in found.hits[row]
                ]
            ).exp()
            summed = (
                (chances @ likelihoods_KL.prod(1)).log()
                if objective == "rag-sequence"
                else (chances @ likelihoods_KL).log().sum()
            )
            expected -= summed.item()
            tokens += len(target)
        assert model.loss(QUESTIONS[:2], found).item() == pytest.approx(expected / tokens, rel=1e-4)


def _by_whole_sequences(
    generator: LanguageModel | EncoderDecoder, source: Sequence[int], target: Tokens
) -> Tensor:
    return torch.stack(
        [
            next_logits(generator, source, target[:at]).log_softmax(-1)[token]
            for at, token in enumerate(target)
        ]
    )


def next_logits(
    generator: LanguageModel | EncoderDecoder, source: Sequence[int], written: Sequence[int]
) -> Tensor:
    """The logits [V] of the token after what is written, computed from scratch."""
    if isinstance(generator, EncoderDecoder):
        logits_RV = generator([source], [[*written, generator.end]])
    else:
        (logits_RV,) = generator(torch.tensor([[*source, *written]]))
    last_V: Tensor = logits_RV[-1]
    return last_V


def test_gradients_reach_the_query_encoder_and_no_passage() -> None:
    model = model_of(settings())
    found, _ = PassageLookup(SHELF, model.questions, 2).search([QUESTIONS[0].text])
    torch.autograd.backward(model.loss(QUESTIONS[:1], found))
    assert all(parameter.grad is not None for parameter in model.parameters())
    change = model.questions.change.weight.grad
    assert change is not None
    assert change.abs().sum() > 0
    assert not isinstance(found.hits[0][0].vector_D, Tensor)


def test_the_query_encoder_begins_as_the_search_ranks() -> None:
    questions = QueryEncoder(DIMENSIONS)
    texts = [each.text for each in QUESTIONS]
    vectors_QD = SHELF.encode(texts)
    assert (
        np.abs(questions.turn(vectors_QD).astype(int) - to_vectors(vectors_QD.astype(np.float32))).max() <= 1
    )
    found, results = PassageLookup(SHELF, questions, 5).search(texts)
    for row, result in zip(questions.log_probabilities(found, 5), results, strict=True):
        values = row.tolist()
        assert values == sorted(values, reverse=True)
        assert math.fsum(map(math.exp, values)) == pytest.approx(1)
        assert len(result.hits) == 5


def test_a_turned_question_finds_other_passages() -> None:
    questions = QueryEncoder(DIMENSIONS)
    with torch.no_grad():
        questions.change.weight.copy_(-2 * torch.eye(DIMENSIONS))
    (plain,) = SHELF.search([QUESTIONS[0].text], 1, turn=None)
    (turned,) = SHELF.search([QUESTIONS[0].text], 1, turn=questions.turn)
    assert plain.hits[0].passage.title == "kiuas"
    assert turned.hits[0].passage.title != "kiuas"


def test_without_hosts_training_goes_on() -> None:
    shelf = Shelf([passage("kiuas", "red")])
    shelf.is_there = False
    model = model_of(settings())
    lookup = PassageLookup(shelf, model.questions, 2)
    found = lookup.learned(QUESTIONS[:2])
    loss = model.loss(QUESTIONS[:2], found)
    assert loss.isfinite()
    torch.autograd.backward(loss)
    assert (lookup.counts.failed, lookup.counts.without) == (1, 2)
    with pytest.raises(UnreachableError):
        lookup.search([QUESTIONS[0].text])


def test_a_question_without_a_known_word_finds_nothing() -> None:
    model = model_of(settings())
    found, (result,) = PassageLookup(SHELF, model.questions, 2).search(["miksi?"])
    assert not result.is_understood
    assert found.hits == [()]
    assert model.questions.log_probabilities(found, 2).eq(-math.inf).all()


def test_passages_that_contradict_each_other_give_an_answer_each() -> None:
    """The passages differ only in a colour, so both answers are as likely, and each names its own source."""
    shelf = Shelf([passage("kiuas", "red"), passage("kiuas", "blue")])
    model = model_of(settings())
    found, _ = PassageLookup(shelf, model.questions, 2).search(["what colour is kiuas?"])
    certain = {"red": (*b" red", 10), "blue": (*b" blue", 10)}

    def _colour(source: Sequence[int]) -> str:
        return "red" if b"is red" in bytes(source) else "blue"

    class Copying(nn.Module):
        """A model that writes the colour it has read."""

        context, first_scored, can_extend, retrieval = 64, 1, False, None

        def log_likelihood(
            self, sources: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]
        ) -> Tensor:
            longest = max(map(len, targets))
            rows = [
                [0.0 if certain[_colour(source)] == tuple(target) else -5.0] + [0.0] * (longest - 1)
                for source, target in zip(sources, targets, strict=True)
            ]
            return torch.tensor(rows)

        def forward(self, tokens_BT: Tensor) -> Tensor:
            logits_BTV = torch.full((*tokens_BT.shape, 256), -20.0)
            for row, tokens in enumerate(tokens_BT.tolist()):
                said = bytes(tokens).rpartition(b"?\n")[2]
                answer = certain[_colour(tokens)]
                logits_BTV[row, -1, answer[len(said)] if len(said) < len(answer) else 10] = 20.0
            return logits_BTV

    model.generator = Copying()  # type: ignore[assignment]  # all of a model that decoding uses
    first, second, *_ = Answerer(model).answers("what colour is kiuas?", found, "sequence")
    assert {first.text, second.text} == {"red", "blue"}
    for answer in (first, second):
        assert 0.2 < answer.probability < 0.8
        assert answer.sources[0].hit.passage.text == f"kiuas is {answer.text}"
        assert answer.sources[0].share > 0.9


@generators
def test_answers_are_scored_a_few_at_a_time(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All at once, they could be more rows than a node accepts in one call: here 100 sequences."""
    model = model_of(settings(memory_passages=5), manifest)
    found, _ = PassageLookup(SHELF, model.questions, 5).search(["what colour is kiuas?"])
    log_likelihood, rows = model.generator.log_likelihood, list[int]()

    def counting(sources: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]) -> Tensor:
        rows.append(len(sources) * (max(map(len, sources)) + max(map(len, targets))))
        return log_likelihood(sources, targets)

    monkeypatch.setattr(model.generator, "log_likelihood", counting)
    some = Answerer(model).answers("what colour is kiuas?", found, "sequence")
    assert len(rows) > 1
    assert max(rows) <= MOST_ROWS
    monkeypatch.setattr("trainer_client.retrieval.answering.MOST_ROWS", 10**6)
    whole = Answerer(model).answers("what colour is kiuas?", found, "sequence")
    assert [each.text for each in some] == [each.text for each in whole]
    assert [each.probability for each in some] == pytest.approx([each.probability for each in whole])


@pytest.mark.parametrize("objective", ["rag-sequence", "rag-token"])
@pytest.mark.parametrize("name", ["questions.log_sharpness", "generator.head.weight"])
@generators
def test_predictions_that_are_not_finite_are_no_answer(objective: str, name: str, manifest: Manifest) -> None:
    """Broken experts and strangers' checkpoints can cause this although each of their numbers is finite."""
    chosen = settings(objective=objective)
    model = model_of(chosen, manifest)
    found, _ = PassageLookup(SHELF, model.questions, 2).search([QUESTIONS[0].text])
    with torch.no_grad():
        model.get_parameter(name).fill_(3e38)
    with pytest.raises(UserError, match="is not finite"):
        Answerer(model).answers(QUESTIONS[0].text, found, chosen.marginal)


def test_a_tokenizer_without_a_line_end_is_refused() -> None:
    class Stripping(ByteTokenizer):
        def encode(self, *texts: str) -> Encoded:
            return super().encode(*(text.strip() for text in texts))

    with pytest.raises(DataError, match="another one, such as bpe"):
        Reader(Stripping(), MANIFEST.model, 24)


def test_what_the_context_can_not_hold_is_refused_and_passages_are_cut() -> None:
    reader = model_of(settings(memory_length=1000)).reader
    long = Passage("x " * 400, "t", "s", 0, "MIT")
    source = reader.source("why?", long)
    assert len(source) + reader.longest <= 64
    assert bytes(source).endswith(b"\nwhy?\n")
    with pytest.raises(DataError, match="shorten the question"):
        reader.source("w" * 60, long)
    with pytest.raises(DataError, match="another tokenizer"):
        reader.target(Question("why?", ("a" * 40,)))
    assert reader.target(Question("why?")) == (reader.end,)
    assert reader.text((*b" a b", reader.end)) == "a b"


def test_an_encoder_has_its_context_for_the_passage_and_the_question() -> None:
    reader = model_of(settings(memory_length=1000), PAIRS).reader
    source = reader.source("why?", Passage("x " * 400, "t", "s", 0, "MIT"))
    assert len(source) == 64
    assert bytes(source).endswith(b"\nwhy?\n")
    with pytest.raises(DataError, match="shorten the question"):
        reader.source("w" * 63, None)
    assert reader.target(Question("why?", ("a b",))) == (*b" a b", reader.end)
    assert reader.end == 256, "the model's own, which is no text"
    assert reader.text((*b" a", 256 + 7, *b"b", reader.end)) == "ab"


@generators
def test_questions_that_do_not_fit_are_named_before_anything_is_learned(manifest: Manifest) -> None:
    reader = model_of(settings(), manifest).reader
    reader.check(QUESTIONS)
    with pytest.raises(DataError, match=r"question 6, 'why w+': the question has \d+ tokens"):
        reader.check([*QUESTIONS, Question("why " + "w" * 80, ("so",))])
    with pytest.raises(DataError, match=r"question 1, 'why\?': the answer 'a+' has \d+ tokens"):
        reader.check([Question("why?", ("a" * 80,)), *QUESTIONS])


def test_another_encoder_is_refused() -> None:
    check_encoder(SHELF, SHELF.encoder.sha256.hex())
    for other in (None, "00"):
        with pytest.raises(SettingsError, match="with the encoder of another memory"):
            check_encoder(SHELF, other)


@generators
def test_decoding_goes_on_from_what_experts_have_computed_as_whole_sequences_do(manifest: Manifest) -> None:
    """With real experts in this process, and with prefixes that branch and continue."""
    swarm = LocalSwarm(manifest, settings())
    model = make_rag_model(manifest, swarm.mixture, TOKENIZER, DIMENSIONS, swarm.settings).eval()
    sources = [[*b"kiuas is red\nwhat?\n"], [*b"vihta is green, and so is a leaf\nwhat?\n"]]
    following = Continuations(make_decoder(model.generator), sources)
    first, second, third = map(ord, "abc")
    for prefixes in ([()], [(first,), (second,)], [(first, third), (first, first), (second, third)]):
        found_NKV = following(prefixes, range(2))
        for row, prefix in enumerate(prefixes):
            for place, source in enumerate(sources):
                expected_V = next_logits(model.generator, source, prefix).log_softmax(-1)
                torch.testing.assert_close(found_NKV[row, place], expected_V, atol=1e-4, rtol=1e-3)
    following.close()
