"""Models that answer questions from passages of a memory: retrieval-augmented generation (RAG).

Lewis et al. 2020 (arXiv 2005.11401). A generator reads each of the passages found for a question, followed by the
question, and then writes the answer. (In an encoder-decoder, the encoder reads and the decoder writes.) Its predictions
with all passages are summed, weighted by how well each passage fits the question (`rag`). The generator and the query
encoder, which changes the question's vector, learn together; the passages' vectors stay fixed.

Shapes: B questions, K passages for each, L tokens of an answer, D numbers in a vector, V words of the vocabulary, A
answers.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dht.manifest import Manifest, ModelSpec
from dht.memory import MAX_QUERIES, MemoryID, Part, Passage, Vectors
from peer.errors import DataError, SettingsError, TalkootError
from trainer_client.data.questions import Question
from trainer_client.data.special_tokens import SpecialTokens
from trainer_client.data.tokenizer import Tokenizer
from trainer_client.decoding import MOST_ROWS, Decoder, Decoding, make_decoder, require_finite
from trainer_client.encoder_decoder import EncoderDecoder, make_model
from trainer_client.memory.encoder import to_vectors
from trainer_client.memory.retriever import Hit, SearchResult, Turn
from trainer_client.model import LanguageModel, MixtureModel
from trainer_client.retrieval.lookup import RetrievalCounts
from trainer_client.retrieval.rag import (
    NextTokens,
    Tokens,
    decode_sequence,
    decode_token,
    passage_log_probabilities,
    sequence_log_likelihood,
    token_log_likelihood,
)
from trainer_client.settings import Marginal, TrainerSettings

BEAM = 4
LONGEST_ANSWER = 64
"""The longest answer, in tokens."""
_SHARPNESS = 12.0
"""The initial sharpness of the softmax over passages, whose scores are cosines."""
_SHOWN = 3
"""How many answers are shown."""


class AskedMemory(Protocol):
    """A memory, as `SwarmClient.memory` returns it."""

    @property
    def id(self) -> MemoryID: ...

    @property
    def encoder(self) -> Part: ...

    def encode(self, texts: Sequence[str]) -> Vectors: ...

    def search(self, texts: Sequence[str], k: int, *, turn: Turn | None) -> list[SearchResult]: ...


@dataclass(frozen=True)
class Found:
    """The passages found for some questions."""

    vectors_BD: Tensor
    """The questions' vectors from the memory's encoder. Of unit length, or zeros."""
    hits: Sequence[Sequence[Hit]]
    """The hits of each question, best first, at most K."""

    @classmethod
    def of(cls, vectors_BD: Vectors, hits: Sequence[Sequence[Hit]]) -> "Found":
        return cls(_units(torch.from_numpy(vectors_BD)), hits)


def _units(vectors: Tensor) -> Tensor:
    return F.normalize(vectors.float(), dim=-1)


class QueryEncoder(nn.Module):
    """Changes the vectors that a memory's encoder gives to questions, and scores passages with them. At first, it
    scores like a search: by the cosine and the shared words.
    """

    def __init__(self, dimensions: int) -> None:
        super().__init__()
        self.change: nn.Linear = nn.Linear(dimensions, dimensions, bias=False)
        nn.init.zeros_(self.change.weight)
        self.log_sharpness: nn.Parameter = nn.Parameter(torch.tensor(math.log(_SHARPNESS)))
        self.word_weight: nn.Parameter = nn.Parameter(torch.ones(()))
        """The weight of words relative to the cosine, as a multiple of the memory's own."""

    def forward(self, vectors_BD: Tensor) -> Tensor:
        """The changed vectors, scaled to unit length."""
        return F.normalize(vectors_BD + self.change(vectors_BD), dim=-1)

    @torch.no_grad()
    def turn(self, vectors_BD: Vectors) -> Vectors:
        """The vectors that searches look for."""
        return to_vectors(self(_units(torch.from_numpy(vectors_BD))).numpy())

    def log_probabilities(self, found: Found, passages: int) -> Tensor:
        """log p(z|x) of the first passages for each question, [B, K]; -inf where fewer were found."""
        size = len(found.hits), passages
        vectors_BKD = np.zeros((*size, found.vectors_BD.shape[-1]), np.float32)
        words_BK, found_BK = torch.zeros(size), torch.zeros(size, dtype=torch.bool)
        for row, hits in enumerate(found.hits):
            for place, hit in enumerate(hits):
                vectors_BKD[row, place] = hit.vector_D
                words_BK[row, place] = hit.score - hit.similarity
                found_BK[row, place] = True
        cosines_BK = (_units(torch.from_numpy(vectors_BKD)) @ self(found.vectors_BD)[:, :, None])[:, :, 0]
        scores_BK = self.log_sharpness.exp() * (cosines_BK + self.word_weight * words_BK)
        return passage_log_probabilities(scores_BK, found_BK)


class RagModel(MixtureModel):
    """A generator, and the query encoder that finds passages for it."""

    def __init__(
        self,
        generator: LanguageModel | EncoderDecoder,
        reader: "Reader",
        dimensions: int,
        marginal: Marginal,
        passages: int,
    ) -> None:
        """`dimensions`: of the memory's vectors. `passages`: how many are read for a question."""
        super().__init__()
        self.generator = generator
        self.questions: QueryEncoder = QueryEncoder(dimensions)
        self.first_scored = 1
        self.marginal, self.passages = marginal, passages
        self.reader = reader

    def log_likelihood(self, questions: Sequence[Question], found: Found) -> Tensor:
        """log p(y|x) of the questions' answers, [B]. If no passages were found, the question alone is read."""
        passages_BK = self.questions.log_probabilities(found, self.passages)
        tokens_BKL = self._scored(questions, found, [self.reader.target(each) for each in questions])
        blind_B1 = torch.tensor([[not hits] for hits in found.hits])
        first_BK = torch.arange(self.passages) == 0
        passages_BK = passages_BK.masked_fill(blind_B1 & first_BK, 0.0)
        likelihood = sequence_log_likelihood if self.marginal == "sequence" else token_log_likelihood
        return likelihood(passages_BK, tokens_BKL)

    def loss(self, questions: Sequence[Question], found: Found) -> Tensor:
        """The mean over the answers' tokens, in nats. []"""
        tokens = sum(len(self.reader.target(each)) for each in questions)
        return -self.log_likelihood(questions, found).sum() / tokens

    def _scored(self, questions: Sequence[Question], found: Found, targets: Sequence[Tokens]) -> Tensor:
        """log p(y_i|x,z,y_<i), [B, K, L]; for a question without passages, log p(y_i|x,y_<i)."""
        sources, answers, places = [], [], []
        for row, (question, hits, target) in enumerate(zip(questions, found.hits, targets, strict=True)):
            for place, hit in enumerate(hits or [None]):
                sources.append(self.reader.source(question.text, None if hit is None else hit.passage))
                answers.append(target)
                places.append(row * self.passages + place)
        tokens_NL = self.generator.log_likelihood(sources, answers)
        every = tokens_NL.new_zeros(len(questions) * self.passages, tokens_NL.shape[1])
        every = every.index_put((torch.tensor(places),), tokens_NL)
        return every.view(len(questions), self.passages, -1)


class Reader:
    """How a passage, a question and an answer become tokens."""

    def __init__(self, tokenizer: Tokenizer, spec: ModelSpec, length: int) -> None:
        """`spec`: the generator's. `length`: the most tokens that are read of each passage.

        Raises DataError if the tokenizer does not encode a line break as one token.
        """
        self._tokenizer = tokenizer
        self._context = spec.context
        self._length = length
        ends = self._encode("\n")
        if len(ends) != 1:
            raise DataError("this tokenizer has no token for the end of a line: use another one, such as bpe")
        (self._line_end,) = ends
        has_encoder = bool(spec.encoder_layers)
        self.end: int = SpecialTokens(len(tokenizer.token_bytes)).end if has_encoder else self._line_end
        """The token that ends an answer."""
        self.longest: int = min(LONGEST_ANSWER, spec.context if has_encoder else spec.context // 4)
        """The most tokens of an answer, including its end."""
        self._room = spec.context if has_encoder else spec.context - self.longest

    def source(self, question: str, passage: Passage | None) -> list[int]:
        """The tokens to read. The passage comes first, shortened so that the rest fits into the context. Raises
        DataError.
        """
        asked = self._encode(f"{_one_line(question)}\n")
        room = self._room - len(asked)
        if room < 1:
            raise DataError(
                f"the question has {len(asked)} tokens, but this swarm's models see only "
                f"{self._context}: shorten the question"
            )
        if passage is None:
            return asked
        read = self._encode(f"{_one_line(passage.title)}\n{_one_line(passage.text)}")
        return [*read[: min(self._length, room - 1)], self._line_end, *asked]

    def target(self, question: Question) -> Tokens:
        """The tokens to write: the answer, encoded as in the middle of a text, and its end. Raises DataError if it has
        too many.
        """
        answer = _one_line(question.answer)
        tokens = self._encode(f" {answer}") if answer else []
        if len(tokens) >= self.longest:
            raise DataError(
                f"the answer {answer[:40]!r} has {len(tokens)} tokens, but an answer may have only {self.longest - 1}: "
                "shorten it, or use another tokenizer, such as bpe"
            )
        return *tokens, self.end

    def check(self, questions: Sequence[Question]) -> None:
        """Raises DataError, which names the first question that does not fit."""
        for number, question in enumerate(questions, 1):
            try:
                self.source(question.text, None)
                self.target(question)
            except DataError as error:
                raise DataError(f"question {number}, {question.text[:40]!r}: {error}") from error

    def text(self, tokens: Tokens) -> str:
        token_bytes = self._tokenizer.token_bytes
        # an encoder-decoder may write marks, which are not text
        text = b"".join(token_bytes[token] for token in tokens if token < len(token_bytes))
        return text.decode(errors="replace").strip()

    def _encode(self, text: str) -> list[int]:
        tokens: list[int] = self._tokenizer.encode(text).tolist()
        return tokens


def _one_line(text: str) -> str:
    return " ".join(text.split())


def make_rag_model(
    manifest: Manifest,
    make_mixture: Callable[[int], nn.Module],
    tokenizer: Tokenizer,
    dimensions: int,
    settings: TrainerSettings,
) -> RagModel:
    """The model for a trainer's settings. `dimensions`: of the memory's vectors."""
    reader = Reader(tokenizer, manifest.model, settings.memory_length)
    generator = make_model(manifest, make_mixture, len(tokenizer.token_bytes))
    return RagModel(generator, reader, dimensions, settings.marginal, settings.passages_read)


def check_encoder(memory: AskedMemory, learned: str | None) -> None:
    """Raises SettingsError unless the memory has the encoder whose vectors the model learned with."""
    if learned != memory.encoder.sha256.hex():
        raise SettingsError(
            f"memory: the model learned to find passages with the encoder of another memory, not of {memory.id}: pass "
            "the memory that it learned with, or train a model with this one"
        )


class PassageLookup:
    """Finds passages for questions with a model's query encoder, in its present state. For any thread."""

    def __init__(self, memory: AskedMemory, questions: QueryEncoder, passages: int) -> None:
        self.counts: RetrievalCounts = RetrievalCounts()
        self._memory, self._questions, self._passages = memory, questions, passages

    def search(self, texts: Sequence[str]) -> tuple[Found, list[SearchResult]]:
        """Raises UserError if the question is too long, or the DHT does not answer."""
        results = self._memory.search(texts, self._passages, turn=self._questions.turn)
        return Found.of(self._memory.encode(texts), [result.hits for result in results]), results

    def learned(self, questions: Sequence[Question]) -> Found:
        """Looks up passages for training. If nobody answers, training continues without them."""
        texts = [question.text for question in questions]
        self.counts.add(chunks=len(texts))
        try:
            parts = [self.search(texts[at : at + MAX_QUERIES])[0] for at in range(0, len(texts), MAX_QUERIES)]
        except TalkootError as error:
            self.counts.note_failed(self._memory.id, error)
            parts = [self.nothing(questions)]
        found = Found(torch.cat([part.vectors_BD for part in parts]), list(chain(*(p.hits for p in parts))))
        self.counts.add(without=sum(not hits for hits in found.hits))
        return found

    def nothing(self, questions: Sequence[Question]) -> Found:
        dimensions = self._questions.change.in_features
        return Found.of(np.zeros((len(questions), dimensions), np.int8), [()] * len(questions))


@dataclass(frozen=True)
class Source:
    """A passage that was read, and its share in an answer."""

    hit: Hit
    share: float
    """p(z|x,y): how much of the answer's probability comes from this passage."""


@dataclass(frozen=True)
class Answer:
    text: str
    """Empty if the passages don't contain the answer."""
    probability: float
    sources: Sequence[Source]
    """The source with the largest share comes first."""


class Continuations:
    """Predicts the tokens that follow prefixes of an answer, for each source. Usually computes only the last token of
    each prefix.
    """

    def __init__(self, decoder: Decoder, sources: Sequence[Sequence[int]]) -> None:
        self._decoder, self._sources = decoder, sources
        self._decodings: dict[tuple[int, Tokens], Decoding] = {}

    def __call__(self, prefixes: Sequence[Tokens], places: Sequence[int]) -> Tensor:
        """Log probabilities with these sources, [N, K, V]. Raises UserError if one is not a number."""
        known, self._decodings = self._decodings, {}
        for prefix in prefixes:
            for place in places:
                # of several prefixes with the same beginning, one continues from the existing state
                decoding = known.pop((place, prefix[:-1]), None) if prefix else None
                if decoding is None:
                    decoding = self._decoder.begin(self._sources[place], prefix)
                else:
                    decoding.append(prefix[-1])
                self._decodings[place, prefix] = decoding
        for old in known.values():
            old.end()
        logits_RV = require_finite(self._decoder.logits(list(self._decodings.values())))
        return logits_RV.log_softmax(-1).view(len(prefixes), len(places), -1)

    def close(self) -> None:
        for each in self._decodings.values():
            each.end()
        self._decodings.clear()


class Answerer:
    """Answers questions with a trained model. For any thread."""

    def __init__(self, model: RagModel, is_usable: Callable[[], bool] = lambda: True) -> None:
        """`is_usable`: as for `Decoder`."""
        model.eval()
        self._model, self._reader, self._is_usable = model, model.reader, is_usable

    @torch.no_grad()
    def answers(
        self,
        question: str,
        found: Found,
        marginal: Marginal,
        beam: int = BEAM,
        between: Callable[[], None] = lambda: None,
    ) -> list[Answer]:
        """The best answers to the question in `found`, which has passages; the best first. Raises UserError.

        `between` is called after each computation, and may raise.
        """

        def is_usable() -> bool:
            between()
            return self._is_usable()

        (hits,) = found.hits
        end, longest = self._reader.end, self._reader.longest
        passages_K = require_finite(self._model.questions.log_probabilities(found, len(hits))[0])
        sources = [self._reader.source(question, hit.passage) for hit in hits]
        places = range(len(hits))

        def score(answers: Sequence[Tokens]) -> Tensor:
            """log p(y|x,z), [A, K]."""
            rows = len(sources) * (max(map(len, sources)) + max(map(len, answers)))
            most = max(1, MOST_ROWS // rows)
            parts = [score_some(answers[at : at + most]) for at in range(0, len(answers), most)]
            return torch.cat(parts)

        def score_some(answers: Sequence[Tokens]) -> Tensor:
            while True:
                log_NL = self._model.generator.log_likelihood(
                    [source for _ in answers for source in sources],
                    [answer for answer in answers for _ in sources],
                )
                if is_usable():
                    return require_finite(log_NL.sum(-1)).view(len(answers), len(sources))

        following = Continuations(make_decoder(self._model.generator, is_usable), sources)

        def with_passage(place: int) -> NextTokens:
            return lambda prefixes: following(prefixes, [place])[:, 0]

        try:
            if marginal == "token":
                found_here = decode_token(
                    passages_K, lambda prefixes: following(prefixes, places), beam, end, longest
                )
            else:
                found_here = decode_sequence(
                    passages_K, [with_passage(k) for k in places], score, beam, end, longest
                )
        finally:
            following.close()
        best = found_here[:_SHOWN]
        shares_AK = (passages_K + score([each.tokens for each in best])).softmax(-1)
        return [
            Answer(
                self._reader.text(each.tokens),
                math.exp(each.log_probability),
                sorted(
                    (Source(hit, share) for hit, share in zip(hits, shares_K, strict=True)),
                    key=lambda source: -source.share,
                ),
            )
            for each, shares_K in zip(best, shares_AK.tolist(), strict=True)
        ]
