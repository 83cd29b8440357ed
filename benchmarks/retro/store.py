"""The texts that models are trained and tested on, and the store of passages that they read.

Models are trained on chapters of one translation of the Bible, and the store has another translation: the same in other
words. No model is trained on the New Testament; its passages are added to the store afterwards.

Shapes: S sequences, T tokens of one, U chunks of a sequence, Q queries, N passages, K candidates.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.retro.translations import ADDED, LEARNED, Translations
from dht.memory import Passage
from peer.files import write_atomically
from talkoot.memory.build import text_of
from talkoot.memory.passages import split
from talkoot.memory.training import WordCounter, train_static_encoder
from trainer_client.data.tokenizer import BytePairTokenizer, Tokenizer
from trainer_client.memory.encoder import StaticEncoder
from trainer_client.retrieval.attention import NOTHING, RetrievalSpec
from trainer_client.retrieval.neighbours import Chunk, Runs, chosen, chunks_of, own_documents

CANDIDATES = 24
_HELD_OUT = 0.1
_AT_ONCE = 256


@dataclass(frozen=True)
class Sequences:
    """Tokens in pieces that are one longer than the model's context, and the passages found for each."""

    tokens_ST: Tensor
    chunks: Sequence[Sequence[Chunk]]
    candidates_SUK: NDArray[np.int64]
    """Passages from the whole store, nearest first."""

    def __len__(self) -> int:
        return len(self.tokens_ST)


class Store:
    """Texts, passages and their encoder, all in this process."""

    def __init__(
        self, folder: Path, works: Translations, context: int, vocabulary: int, spec: RetrievalSpec
    ) -> None:
        """`folder`: where the encoder is saved. If it is there already, it is loaded."""
        self._folder, self._context, self._spec = folder, context, spec
        rng = random.Random(0)
        self.learned: list[str] = []
        self.held_out: dict[str, list[str]] = {LEARNED: [], ADDED: list(works.told[ADDED].values())}
        for text in works.told[LEARNED].values():
            (self.held_out[LEARNED] if rng.random() < _HELD_OUT else self.learned).append(text)
        self.passages: list[Passage] = []
        self.domains: list[str] = []
        """The domain of each passage."""
        for name, chapters in works.stored.items():
            for title, text in chapters.items():
                for offset, piece in split([text]):
                    self.passages.append(Passage(piece, title, works.source, offset, works.license))
                    self.domains.append(name)
        texts = [*self.learned, *works.stored[LEARNED].values()]
        size = sum(map(len, texts))
        self.tokenizer: Tokenizer = BytePairTokenizer.learn(texts, size, vocabulary)
        self.byte_lengths = np.array([len(each) for each in self.tokenizer.token_bytes])

    @cached_property
    def encoder(self) -> StaticEncoder:
        """The encoder, trained on the first passages, as a memory's encoder is on its first revision."""
        kept = self._folder / "encoder"
        if kept.exists():
            return StaticEncoder.from_bytes(kept.read_bytes())
        words = WordCounter()
        for passage, domain in zip(self.passages, self.domains, strict=True):
            if domain == LEARNED:
                words.add(text_of(passage))
        encoder = train_static_encoder(words.finish())
        write_atomically(kept, encoder.to_bytes())
        return encoder

    @cached_property
    def vectors_ND(self) -> NDArray[np.float32]:
        return self.encoder.encode([text_of(passage) for passage in self.passages]).astype(np.float32)

    @cached_property
    def tokens(self) -> Callable[[int], Tensor]:
        """A function that returns the tokens of a passage, as many as are read: int64 [L], with -1 after the end."""
        known: dict[int, Tensor] = {}
        length = self._spec.length

        def tokens_of(number: int) -> Tensor:
            if number not in known:
                tokens = self.tokenizer.encode(self.passages[number].text)[:length].astype(np.int64)
                known[number] = torch.from_numpy(
                    np.pad(tokens, (0, length - len(tokens)), constant_values=NOTHING)
                )
            return known[number]

        return tokens_of

    def where(self, *domains: str, share: float = 1.0) -> NDArray[np.bool_]:
        """Which passages are of these domains, or, with a `share`, a random part of those."""
        is_there = np.isin(self.domains, domains)
        return is_there & (np.random.default_rng(0).random(len(is_there)) < share)

    def sequences(self, texts: Sequence[str], most: int, there_N: NDArray[np.bool_]) -> Sequences:
        """Draws sequences from all texts."""
        rng, size = random.Random(0), self._context + 1
        pieces = [
            tokens[at : at + size]
            for text in texts
            if len(tokens := self.tokenizer.encode(text + "\n").astype(np.int64)) >= size
            for at in range(0, len(tokens) - size + 1, self._context)
        ]
        drawn = rng.sample(pieces, min(most, len(pieces)))
        tokens_ST = torch.from_numpy(np.stack(drawn))
        # The last chunk's neighbours are read for one token only, so there is nothing to give away.
        chunks = [chunks_of(tokens_T[:-1].tolist(), self._spec.chunk, self.decode) for tokens_T in tokens_ST]
        return Sequences(tokens_ST, chunks, self.find(chunks, there_N))

    def again(self, sequences: Sequences, there_N: NDArray[np.bool_]) -> Sequences:
        """The same sequences, with the passages found in another store."""
        return replace(sequences, candidates_SUK=self.find(sequences.chunks, there_N))

    def decode(self, tokens: Sequence[int]) -> str:
        return b"".join(self.tokenizer.token_bytes[token] for token in tokens).decode(errors="replace")

    def find(self, chunks: Sequence[Sequence[Chunk]], there_N: NDArray[np.bool_]) -> NDArray[np.int64]:
        """The nearest passages that the store has: [S, U, K]."""
        texts = [chunk.text for some in chunks for chunk in some]
        numbers_N = np.flatnonzero(there_N)
        vectors_ND = self.vectors_ND[numbers_N]
        found = np.empty((len(texts), CANDIDATES), np.int64)
        for at in range(0, len(texts), _AT_ONCE):
            queries_QD = self.encoder.encode(texts[at : at + _AT_ONCE]).astype(np.float32)
            scores_QN = queries_QD @ vectors_ND.T
            best = np.argpartition(-scores_QN, CANDIDATES, axis=1)[:, :CANDIDATES]
            order = np.take_along_axis(-scores_QN, best, axis=1).argsort(axis=1)
            found[at : at + _AT_ONCE] = numbers_N[np.take_along_axis(best, order, axis=1)]
        return found.reshape(len(chunks), -1, CANDIDATES)

    def neighbours(self, sequences: Sequences, most_overlap: float, *, learned: bool = False) -> Tensor:
        """The neighbours that the model gets: [S, U, N, L].

        `learned`: whether to apply the rule of trainers, who cannot know that the store has nothing from the text's own
        document.
        """
        spec = self._spec
        given = spec.nothing(len(sequences), len(sequences.chunks[0]))
        for row, some in enumerate(sequences.chunks):
            numbers_UK = sequences.candidates_SUK[row].tolist()
            candidates = [[self.passages[n] for n in numbers_K] for numbers_K in numbers_UK]
            own = own_documents(some, candidates) if learned else ()
            for place, chunk in enumerate(some):
                number_of = dict(zip(map(id, candidates[place]), numbers_UK[place], strict=True))
                found = chosen(chunk, candidates[place], spec.neighbours, own, most_overlap)
                for slot, passage in enumerate(found):
                    given[row, place, slot] = self.tokens(number_of[id(passage)])
        return given

    def drawn(self, sequences: Sequences, there_N: NDArray[np.bool_]) -> Tensor:
        """Random neighbours, which have nothing to do with the text."""
        rng, spec = np.random.default_rng(1), self._spec
        numbers_N = np.flatnonzero(there_N)
        shape = (len(sequences), len(sequences.chunks[0]), spec.neighbours)
        numbers = rng.choice(numbers_N, size=shape)
        return torch.stack([self.tokens(n) for n in numbers.ravel().tolist()]).view(*shape, spec.length)

    def overlaps(self, sequences: Sequences) -> float:
        """The mean share of a target that the nearest candidate contains."""
        shares = [
            Runs(chunk.target).overlap(self.passages[int(candidates_K[0])].text)
            for some, candidates_UK in zip(sequences.chunks, sequences.candidates_SUK, strict=True)
            for chunk, candidates_K in zip(some, candidates_UK, strict=True)
        ]
        return float(np.mean(shares))
