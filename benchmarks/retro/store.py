"""The texts that models learn from and are tested on, and the store of passages that they read.

Documents are pages of Python's documentation, entries of FOLDOC, and chapters of the Bible. Those held out are in no
store. The Bible is learned by no model: its passages are added to the store afterwards.

Shapes: S sequences, T tokens of one, U chunks of a sequence, Q queries, N passages, K candidates.
"""

import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.memory import corpora
from dht.memory import Passage
from peer.files import write_atomically
from talkoot.memory.build import text_of
from talkoot.memory.passages import read_passages
from talkoot.memory.training import WordCounter, train_static_encoder
from trainer_client.data.tokenizer import BytePairTokenizer, Tokenizer
from trainer_client.memory.encoder import StaticEncoder
from trainer_client.retrieval.attention import NOTHING, RetrievalSpec
from trainer_client.retrieval.neighbours import Chunk, Document, Runs, chosen, chunks_of, document_of

LEARNED = ("python", "foldoc")
ADDED = "bible"
CANDIDATES = 24
_HELD_OUT = 0.06
_LEAST_CHARACTERS = 200
"""Of a document."""
_AT_ONCE = 256
_LEARNED_CHARACTERS = 4_000_000
"""From which the tokenizer is learned, about."""

Texts: TypeAlias = list[tuple[Document, str]]


@dataclass(frozen=True)
class Sequences:
    """Tokens in pieces of the model's context and one, each with its document's name and what was found for it."""

    tokens_ST: Tensor
    documents: Sequence[Document]
    chunks: Sequence[Sequence[Chunk]]
    candidates_SUK: NDArray[np.int64]
    """Passages of the whole store, the nearest first; none of the sequence's own document."""

    def __len__(self) -> int:
        return len(self.tokens_ST)


class Store:
    """Texts, passages and their encoder, all in this process."""

    def __init__(
        self, folder: Path, characters: float, context: int, vocabulary: int, spec: RetrievalSpec
    ) -> None:
        """`folder`: for the works and the encoder, which is taken from there if it is there.

        `characters`: of each work, at most, and about.
        """
        self._folder, self._context, self._spec = folder, context, spec
        works = {each.name: each for each in corpora.installed()}
        names = [name for name in LEARNED if name in works] or list(works)
        self.added = ADDED if ADDED in works and ADDED not in names else None
        wanted = [*names, *([self.added] if self.added else [])]
        files = dict(
            zip(wanted, corpora.write([works[name] for name in wanted], folder, characters), strict=True)
        )
        self.learned: dict[str, Texts] = {}
        self.held_out: dict[str, Texts] = {}
        self.passages: list[Passage] = []
        self.domains: list[str] = []
        """Of each passage."""
        for name, file in files.items():
            kept, out = self._split(file)
            self.learned[name], self.held_out[name] = kept, out
            known = {document for document, _ in kept}
            for passage in read_passages([file]):
                if document_of(passage) in known:
                    self.passages.append(passage)
                    self.domains.append(name)
        self.names = names
        texts = [text for name in names for _, text in self.learned[name]]
        random.Random(0).shuffle(texts)
        size, some = 0, []
        for text in texts:
            some.append(text)
            size += len(text)
            if size > _LEARNED_CHARACTERS:
                break
        self.tokenizer: Tokenizer = BytePairTokenizer.learn(some, size, vocabulary)
        self.byte_lengths = np.array([len(each) for each in self.tokenizer.token_bytes])

    def _split(self, file: Path) -> tuple[Texts, Texts]:
        """The documents of a work that are learned, and those that are held out."""
        kept, out = Texts(), Texts()
        rng = random.Random(file.name)
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                row = json.loads(line)
                # as `talkoot memory build` calls them
                document = (row["title"][:256], f"{file.name}:{number}")
                if len(row["text"]) >= _LEAST_CHARACTERS:
                    (out if rng.random() < _HELD_OUT else kept).append((document, row["text"]))
        return kept, out

    @cached_property
    def encoder(self) -> StaticEncoder:
        """Learned from the passages of what is learned, as a memory's is from its first revision."""
        kept = self._folder / "encoder"
        if kept.exists():
            return StaticEncoder.from_bytes(kept.read_bytes())
        words = WordCounter()
        for passage, domain in zip(self.passages, self.domains, strict=True):
            if domain in self.names:
                words.add(text_of(passage))
        encoder = train_static_encoder(words.finish())
        write_atomically(kept, encoder.to_bytes())
        return encoder

    @cached_property
    def vectors_ND(self) -> NDArray[np.float32]:
        return self.encoder.encode([text_of(passage) for passage in self.passages]).astype(np.float32)

    @cached_property
    def tokens(self) -> Callable[[int], Tensor]:
        """Of a passage, as many as are read: int64 [L], -1 after its end."""
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

    def where(self, domains: Sequence[str], share: float = 1.0) -> NDArray[np.bool_]:
        """Which passages a store of these works has, and of them a share."""
        is_there = np.isin(self.domains, domains)
        return is_there & (np.random.default_rng(0).random(len(is_there)) < share)

    def sequences(self, texts: Texts, most: int, there_N: NDArray[np.bool_], seed: int = 0) -> Sequences:
        """Drawn from all documents. One that is longer than a sequence shares none with others."""
        rng = random.Random(seed)
        texts = rng.sample(texts, len(texts))
        pieces: list[NDArray[np.int64]] = []
        documents: list[Document] = []
        size = self._context + 1
        rest, rest_of = np.empty(0, np.int64), None
        for document, text in texts:
            tokens = self.tokenizer.encode(text + "\n").astype(np.int64)
            if len(tokens) < size:  # short ones follow each other
                rest, rest_of = np.concatenate((rest, tokens)), document
                if len(rest) >= size:
                    pieces.append(rest[:size])
                    documents.append(rest_of)
                    rest = np.empty(0, np.int64)
                continue
            for at in range(0, len(tokens) - size + 1, self._context):
                pieces.append(tokens[at : at + size])
                documents.append(document)
        order = rng.sample(range(len(pieces)), min(most, len(pieces)))
        tokens_ST = torch.from_numpy(np.stack([pieces[n] for n in order]))
        documents = [documents[n] for n in order]
        chunks = [chunks_of(tokens_T[:-1].tolist(), self._spec.chunk, self.decode) for tokens_T in tokens_ST]
        # what the last chunk's neighbours are read for is one token: nothing to be given away
        return Sequences(tokens_ST, documents, chunks, self.find(chunks, documents, there_N))

    def again(self, sequences: Sequences, there_N: NDArray[np.bool_]) -> Sequences:
        """The same, with what is found in another store."""
        return replace(sequences, candidates_SUK=self.find(sequences.chunks, sequences.documents, there_N))

    def decode(self, tokens: Sequence[int]) -> str:
        return b"".join(self.tokenizer.token_bytes[token] for token in tokens).decode(errors="replace")

    def find(
        self, chunks: Sequence[Sequence[Chunk]], documents: Sequence[Document], there_N: NDArray[np.bool_]
    ) -> NDArray[np.int64]:
        """The nearest passages that are there and of other documents: [S, U, K]."""
        texts = [chunk.text for some in chunks for chunk in some]
        numbers_N = np.flatnonzero(there_N)
        vectors_ND = self.vectors_ND[numbers_N]
        own: dict[Document, list[int]] = {}
        for place, number in enumerate(numbers_N.tolist()):
            own.setdefault(document_of(self.passages[number]), []).append(place)
        per = len(chunks[0])
        found = np.empty((len(texts), CANDIDATES), np.int64)
        for at in range(0, len(texts), _AT_ONCE):
            queries_QD = self.encoder.encode(texts[at : at + _AT_ONCE]).astype(np.float32)
            scores_QN = queries_QD @ vectors_ND.T
            for row in range(len(queries_QD)):
                scores_QN[row, own.get(documents[(at + row) // per], [])] = -math.inf
            best = np.argpartition(-scores_QN, CANDIDATES, axis=1)[:, :CANDIDATES]
            order = np.take_along_axis(-scores_QN, best, axis=1).argsort(axis=1)
            found[at : at + _AT_ONCE] = numbers_N[np.take_along_axis(best, order, axis=1)]
        return found.reshape(len(chunks), per, CANDIDATES)

    def neighbours(self, sequences: Sequences, most_overlap: float) -> Tensor:
        """What the model is given, [S, U, N, L], by the rule that trainers follow."""
        spec = self._spec
        given = spec.nothing(len(sequences), len(sequences.chunks[0]))
        for row, some in enumerate(sequences.chunks):
            for place, chunk in enumerate(some):
                numbers = sequences.candidates_SUK[row, place].tolist()
                by_text = {id(self.passages[n]): n for n in numbers}
                found = chosen(chunk, [self.passages[n] for n in numbers], spec.neighbours, (), most_overlap)
                for slot, passage in enumerate(found):
                    given[row, place, slot] = self.tokens(by_text[id(passage)])
        return given

    def drawn(self, sequences: Sequences, there_N: NDArray[np.bool_]) -> Tensor:
        """Neighbours that have nothing to do with the text."""
        rng, spec = np.random.default_rng(1), self._spec
        numbers_N = np.flatnonzero(there_N)
        shape = (len(sequences), len(sequences.chunks[0]), spec.neighbours)
        numbers = rng.choice(numbers_N, size=shape)
        return torch.stack([self.tokens(n) for n in numbers.ravel().tolist()]).view(*shape, spec.length)

    def overlaps(self, sequences: Sequences) -> float:
        """The mean share of targets that the nearest candidate gives away."""
        shares = [
            Runs(chunk.target).overlap(self.passages[int(candidates_K[0])].text)
            for some, candidates_UK in zip(sequences.chunks, sequences.candidates_SUK, strict=True)
            for chunk, candidates_K in zip(some, candidates_UK, strict=True)
        ]
        return float(np.mean(shares))
