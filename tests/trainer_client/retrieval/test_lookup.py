"""Neighbours of batches: looked up ahead, without giving anything away, and left out if no host answers."""

import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from callers import numbered_identity
from commands import wait_until
from torch import Tensor

from dht.memory import MemoryID, Passage
from peer.errors import UnreachableError
from trainer_client.data.tokenizer import ByteTokenizer
from trainer_client.memory.retriever import Hit, SearchResult
from trainer_client.retrieval.attention import NOTHING, RetrievalSpec
from trainer_client.retrieval.cache import NeighbourCache
from trainer_client.retrieval.lookup import NeighbourLoader, NeighbourLookup

HOST = numbered_identity(1).peer_id
SPEC = RetrievalSpec(chunk=8, neighbours=2, length=16, layers=(0,))
LIMIT_S = 60.0


class Echo:
    """A memory that has, for each text, passages that begin with it. It counts requests."""

    id = MemoryID.of("echo", HOST)

    def __init__(self) -> None:
        self.revision = 1
        self.asked: list[str] = []
        self.missing: tuple[tuple[int, ...], ...] = ()
        self.is_there = True
        self.may_answer = threading.Event()
        self.may_answer.set()

    def search(self, texts: Sequence[str], k: int, *, by_words: bool) -> list[SearchResult]:
        assert self.may_answer.wait(LIMIT_S)
        assert not by_words
        if not self.is_there:
            raise UnreachableError("nobody is there")
        self.asked += texts
        return [SearchResult(self._hits(text, k), missing=self.missing) for text in texts]

    def _hits(self, text: str, k: int) -> tuple[Hit, ...]:
        passages = [Passage(f"{n} {text}", f"page {n}", "echo", 0, "MIT") for n in range(k)]
        vector_D = np.zeros(8, np.int8)
        return tuple(Hit(each, 1.0, 1.0, self.id, b"", HOST, vector_D) for each in passages)


def lookup(memory: Echo, cache: NeighbourCache | None = None, spec: RetrievalSpec = SPEC) -> NeighbourLookup:
    return NeighbourLookup(memory, ByteTokenizer(), spec, most_overlap=0.5, cache=cache)


def tokens(text: str) -> Tensor:
    return torch.tensor([list(text.encode())])


def text_of(tokens_L: Tensor) -> str:
    return bytes(tokens_L[tokens_L != NOTHING].tolist()).decode()


def test_each_whole_chunk_gets_the_tokens_of_its_neighbours() -> None:
    memory = Echo()
    looking = lookup(memory)
    given = looking.learned(tokens("aaaa bbbcccc dddeee"))
    assert given.shape == (1, 2, 2, 16)
    # A passage with all words of a chunk comes from the text's own document.
    assert memory.asked == ["aaaa bbb", "cccc ddd"]
    assert (given == NOTHING).all()
    written = looking.written([list(b"aaaa bbb")])
    counts = looking.counts.values()
    assert (counts["memory_chunks"], counts["memory_chunks_without"]) == (3, 2)
    assert [text_of(each) for each in written[0].tokens_NL] == ["0 aaaa bbb", "1 aaaa bbb"]
    assert [each.title for each in written[0].passages] == ["page 0", "page 1"]


def test_a_chunk_is_looked_up_once_for_each_revision(tmp_path: Path) -> None:
    memory, cache = Echo(), NeighbourCache(tmp_path / "found")
    for revision in (1, 1, 2):
        memory.revision = revision
        lookup(memory, cache).learned(tokens("aaaa bbbcccc ddde"))
    assert memory.asked == ["aaaa bbb", "cccc ddd"] * 2
    cache.close()


def test_a_chunk_is_looked_up_again_if_more_passages_of_it_are_read(tmp_path: Path) -> None:
    memory, cache = Echo(), NeighbourCache(tmp_path / "found")
    more = replace(SPEC, neighbours=20)
    for spec in (SPEC, more, more, SPEC):
        (found,) = lookup(memory, cache, spec).written([list(b"aaaa bbb")])
        assert len(found.passages) == spec.neighbours
    assert memory.asked == ["aaaa bbb"] * 2
    cache.close()


def test_what_may_be_incomplete_is_not_kept(tmp_path: Path) -> None:
    memory, cache = Echo(), NeighbourCache(tmp_path / "found")
    memory.missing = ((1, 2),)
    for _ in range(2):
        lookup(memory, cache).written([list(b"aaaa bbb")])
    assert memory.asked == ["aaaa bbb"] * 2
    cache.close()


def test_training_goes_on_without_neighbours_while_nobody_answers() -> None:
    memory = Echo()
    memory.is_there = False
    looking = lookup(memory)
    given = looking.learned(tokens("aaaa bbbcccc ddde"))
    assert (given == NOTHING).all()
    counts = looking.counts.values()
    assert counts["memory_failed_lookups"] == 1
    assert counts["memory_chunks"] == counts["memory_chunks_without"] == 2


def test_batches_are_looked_up_before_they_are_asked_for() -> None:
    memory, wanted = Echo(), [tokens(f"batch {number}  x") for number in range(20)]
    loader = NeighbourLoader(lookup(memory), wanted.__getitem__, ahead=3)
    try:
        loader.training(0, wanted[0])
        wait_until(lambda: {"batch 1 ", "batch 2 ", "batch 3 "} <= set(memory.asked), "three look-ups")
        assert "batch 9 " not in memory.asked
        for number in range(1, 6):
            loader.training(number, wanted[number])
        assert len(memory.asked) == len(set(memory.asked))
    finally:
        loader.close()


def test_steps_in_flight_that_lag_behind_look_nothing_up_again() -> None:
    memory, wanted = Echo(), [tokens(f"batch {number}  x") for number in range(20)]
    loader = NeighbourLoader(lookup(memory), wanted.__getitem__, ahead=2, behind=2)
    try:
        for number in (2, 0, 1, 5, 3, 4, 8, 6, 7):
            loader.training(number, wanted[number])
    finally:
        loader.close()
    assert len(memory.asked) == len(set(memory.asked))


def test_neighbours_that_come_too_late_are_left_out() -> None:
    memory = Echo()
    memory.may_answer.clear()
    looking = lookup(memory)
    loader = NeighbourLoader(looking, lambda number: tokens("aaaa bbbc"), ahead=1, patience_s=0.05)
    try:
        assert (loader.training(0, tokens("aaaa bbbc")) == NOTHING).all()
        counts = looking.counts.values()
        assert counts["memory_late_batches"] == counts["memory_waits"] == 1
    finally:
        memory.may_answer.set()
        loader.close()


def test_closing_waits_for_no_host() -> None:
    memory = Echo()
    memory.may_answer.clear()
    loader = NeighbourLoader(lookup(memory), lambda number: tokens("aaaa bbbc"), ahead=5, patience_s=0.05)
    try:
        loader.training(0, tokens("aaaa bbbc"))
        began = time.monotonic()
        loader.close()
        assert time.monotonic() - began < LIMIT_S / 4
    finally:
        memory.may_answer.set()
    wait_until(lambda: not any(t.name.startswith("neighbours") for t in threading.enumerate()), "its threads")
    assert len(memory.asked) <= 2  # what two threads had begun
