"""Looks up the neighbours of chunks in a memory of the swarm, and fetches those of coming batches in advance."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from typing import Generic, Protocol, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor

from dht.memory import MAX_QUERIES, MemoryID, Passage
from peer.bounded import BoundedDict
from peer.errors import TalkootError
from trainer_client.data.tokenizer import Tokenizer
from trainer_client.memory.encoder import words_of
from trainer_client.memory.retriever import MOST_CHARACTERS, SearchResult
from trainer_client.retrieval.attention import NOTHING, RetrievalSpec
from trainer_client.retrieval.cache import NeighbourCache
from trainer_client.retrieval.neighbours import Chunk, chosen, chunks_of, own_documents

logger: logging.Logger = logging.getLogger(__name__)

_SPARE = 8
"""How many more passages than needed are looked up for each chunk, because some may be left out."""
_KEPT = 2048
"""How many passages' tokens and words are remembered."""
_WARN_EVERY_S = 60.0


class Searched(Protocol):
    """A memory, as `SwarmClient.memory` returns it."""

    @property
    def id(self) -> MemoryID: ...

    @property
    def revision(self) -> int: ...

    def search(self, texts: Sequence[str], k: int, *, by_words: bool) -> list[SearchResult]: ...


@dataclass
class RetrievalCounts:
    """Counts of what retrieval has done so far."""

    chunks: int = 0
    """Chunks that needed neighbours."""
    cached: int = 0
    """Chunks whose neighbours were known from an earlier look-up."""
    without: int = 0
    """Chunks that got no neighbours: nobody answered, or all neighbours would have revealed the text."""
    failed: int = 0
    """Failed look-ups of batches."""
    late: int = 0
    """Batches that were trained without neighbours, because these took too long."""
    waits: int = 0
    """Batches whose neighbours were not ready when training needed them."""
    waited_s: float = 0.0
    """Seconds that training has waited for neighbours."""
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _warned_at: float = field(default=-_WARN_EVERY_S, repr=False)

    def note_failed(self, memory: MemoryID, error: TalkootError) -> None:
        """Counts a failed look-up, after which the model continues without neighbours. Logs it now and then."""
        self.add(failed=1)
        with self._lock:
            if time.monotonic() - self._warned_at < _WARN_EVERY_S:
                return
            self._warned_at = time.monotonic()
        logger.warning("the model continues without the memory %s: %s", memory, error)

    def add(self, **counts: float) -> None:
        with self._lock:
            for name, count in counts.items():
                setattr(self, name, getattr(self, name) + count)

    def values(self) -> dict[str, float]:
        """The counts, for a summary."""
        with self._lock:
            return {
                "memory_chunks": self.chunks,
                "memory_chunks_cached": self.cached,
                "memory_chunks_without": self.without,
                "memory_failed_lookups": self.failed,
                "memory_late_batches": self.late,
                "memory_waits": self.waits,
                "memory_waited_s": self.waited_s,
            }


@dataclass(frozen=True)
class Neighbours:
    """The tokens that a model gets for one chunk, and their passages."""

    tokens_NL: Tensor
    passages: tuple[Passage, ...] = ()


Find: TypeAlias = Callable[[Sequence[Sequence[int]]], Sequence[Neighbours]]
"""Returns the neighbours of each of some chunks of tokens, for a text that is being written."""


class NeighbourLookup:
    """Finds neighbours in one memory. For any thread."""

    def __init__(
        self,
        memory: Searched,
        tokenizer: Tokenizer,
        spec: RetrievalSpec,
        *,
        most_overlap: float = 1.0,
        cache: NeighbourCache | None = None,
    ) -> None:
        """`most_overlap`: the share of a target's runs of words that its neighbours may contain in training."""
        self.spec = spec
        self.counts: RetrievalCounts = RetrievalCounts()
        self._memory = memory
        self._tokenizer = tokenizer
        self._most_overlap = most_overlap
        self._cache = cache
        self._wanted = spec.neighbours + _SPARE
        self._tokens = BoundedDict[str, Tensor](_KEPT)
        self._words = BoundedDict[str, list[str]](_KEPT)
        self._lock = threading.Lock()

    def written(self, chunks: Sequence[Sequence[int]]) -> list[Neighbours]:
        """The neighbours of chunks of a text that is being written. All are allowed: the text that follows does not
        exist yet, so no neighbour can reveal it.
        """
        some = [Chunk(self._decode(tokens)) for tokens in chunks]
        found = [candidates[: self.spec.neighbours] for candidates in self._candidates(some)]
        self.counts.add(without=sum(not passages for passages in found))
        return [self._neighbours(passages) for passages in found]

    def learned(self, tokens_BT: Tensor) -> Tensor:
        """The neighbours of the whole chunks of sequences that a model should predict, [B, U, N, L], without those that
        would reveal the text.

        `tokens_BT`: int64 [B, T + 1].
        """
        rows = [chunks_of(tokens_T[:-1].tolist(), self.spec.chunk, self._decode) for tokens_T in tokens_BT]
        every = self._candidates(list(chain.from_iterable(rows)))
        given, without = self.spec.nothing(len(rows), len(rows[0])), 0
        for row, chunks in enumerate(rows):
            candidates, every = every[: len(chunks)], every[len(chunks) :]
            own = own_documents(chunks, candidates, self._words_of)
            for place, (chunk, some) in enumerate(zip(chunks, candidates, strict=True)):
                passages = chosen(chunk, some, self.spec.neighbours, own, self._most_overlap, self._words_of)
                given[row, place] = self._neighbours(passages).tokens_NL
                without += not passages
        self.counts.add(without=without)
        return given

    def nothing(self, tokens_BT: Tensor) -> Tensor:
        """The neighbours of a batch for which nothing was found. `tokens_BT`: int64 [B, T + 1]."""
        return self.spec.nothing(len(tokens_BT), self.spec.chunks(tokens_BT.shape[1] - 1))

    def _candidates(self, chunks: Sequence[Chunk]) -> list[list[Passage]]:
        """Candidates for each chunk, the nearest first; empty if nobody answers."""
        texts = [chunk.text[-MOST_CHARACTERS:] for chunk in chunks]
        memory, revision = str(self._memory.id), self._memory.revision
        kept = {} if self._cache is None else self._cache.get(memory, revision, texts)
        # fewer were looked up when the model read fewer passages of a chunk
        known = {text: found for text, found in kept.items() if len(found) >= self._wanted}
        cached = sum(text in known for text in texts)
        new = [text for text in dict.fromkeys(texts) if text not in known]
        for at in range(0, len(new), MAX_QUERIES):
            known |= self._search(new[at : at + MAX_QUERIES], revision)
        self.counts.add(chunks=len(texts), cached=cached)
        return [known.get(text, []) for text in texts]

    def _search(self, texts: Sequence[str], revision: int) -> dict[str, list[Passage]]:
        try:
            results = self._memory.search(texts, self._wanted, by_words=False)
        except TalkootError as error:  # the memory's hosts are not there: the model goes on without
            self.counts.note_failed(self._memory.id, error)
            return {}
        found = {
            text: [hit.passage for hit in result.hits] for text, result in zip(texts, results, strict=True)
        }
        if self._cache is not None:
            # if a host did not answer, there may be better ones
            whole = {
                text: found[text] for text, result in zip(texts, results, strict=True) if not result.missing
            }
            self._cache.put(str(self._memory.id), revision, whole)
        return found

    def _neighbours(self, passages: Sequence[Passage]) -> Neighbours:
        tokens_NL = self.spec.nothing()
        for place, passage in enumerate(passages):
            tokens_NL[place] = self._tokens_of(passage.text)
        return Neighbours(tokens_NL, tuple(passages))

    def _tokens_of(self, text: str) -> Tensor:
        with self._lock:
            known = self._tokens.get(text)
        if known is None:
            tokens = self._tokenizer.encode(text)[: self.spec.length].astype(np.int64)
            padding = (0, self.spec.length - len(tokens))
            known = torch.from_numpy(np.pad(tokens, padding, constant_values=NOTHING))
            with self._lock:
                self._tokens[text] = known
        return known

    def _words_of(self, text: str) -> list[str]:
        with self._lock:
            known = self._words.get(text)
        if known is None:
            known = words_of(text)
            with self._lock:
                self._words[text] = known
        return known

    def _decode(self, tokens: Sequence[int]) -> str:
        token_bytes = self._tokenizer.token_bytes
        return b"".join(token_bytes[token] for token in tokens).decode(errors="replace")


Batch = TypeVar("Batch")
Batch_contra = TypeVar("Batch_contra", contravariant=True)
Read = TypeVar("Read")
Read_co = TypeVar("Read_co", covariant=True)


class Lookup(Protocol[Batch_contra, Read_co]):
    """Looks up what the model reads with a batch. For any thread."""

    @property
    def counts(self) -> RetrievalCounts: ...

    def learned(self, batch: Batch_contra, /) -> Read_co:
        """What the model reads when it learns from the batch."""

    def nothing(self, batch: Batch_contra, /) -> Read_co:
        """What the model reads if nothing was found."""


class NeighbourLoader(Generic[Batch, Read]):
    """Provides what the model reads with its training batches, looked up before it is needed. Close it when done."""

    def __init__(
        self,
        lookup: Lookup[Batch, Read],
        batch: Callable[[int], Batch],
        *,
        ahead: int = 8,
        behind: int = 0,
        workers: int = 2,
        patience_s: float = 30.0,
    ) -> None:
        """`batch`: returns the batch of a number, always the same. `ahead`: how many batches are looked up
        in advance. `behind`: by how many batches a step in flight may lag behind the newest one.
        """
        self._lookup = lookup
        self._batch = batch
        self._ahead = ahead
        self._behind = behind
        self._patience_s = patience_s
        self._workers = ThreadPoolExecutor(workers, "neighbours")
        self._lock = threading.Lock()
        self._begun: dict[int, Future[Read] | None] = {}
        """None if it was given. It is remembered, so that a step that lags behind does not begin it again."""

    def training(self, number: int, batch: Batch) -> Read:
        began = time.monotonic()
        with self._lock:
            for each in range(number, number + self._ahead + 1):
                if each not in self._begun:
                    self._begun[each] = self._workers.submit(self._look_up, each)
            future = self._begun[number] or self._workers.submit(self._look_up, number)
            self._begun[number] = None
            for old in [each for each in self._begun if each < number - self._behind]:
                if (waiting := self._begun.pop(old)) is not None:
                    waiting.cancel()
        is_early = not future.done()
        try:
            return future.result(self._patience_s)
        except TimeoutError:
            self._lookup.counts.add(late=1)
            return self._lookup.nothing(batch)
        finally:
            self._lookup.counts.add(waits=is_early, waited_s=time.monotonic() - began)

    def validation(self, batches: Sequence[Batch]) -> list[Read]:
        return [self._lookup.learned(batch) for batch in batches]

    def close(self) -> None:
        """Abandons the look-ups in progress. Each ends with the search that it awaits."""
        self._workers.shutdown(wait=False, cancel_futures=True)

    def _look_up(self, number: int) -> Read:
        return self._lookup.learned(self._batch(number))
