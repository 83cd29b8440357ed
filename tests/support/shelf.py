"""A memory of a few passages in this process, and models that learn to answer from it, for tests."""

import threading
from collections.abc import Sequence

import numpy as np
from callers import numbered_identity
from torch import Tensor, nn

from dht.manifest import Manifest
from dht.memory import MemoryID, Part, Passage, Vectors
from peer.errors import UnreachableError
from trainer_client.data.questions import Question, QuestionBatches
from trainer_client.data.tokenizer import ByteTokenizer
from trainer_client.memory.encoder import StaticEncoder, words_of
from trainer_client.memory.retriever import Hit, SearchResult, Turn, ranked_by_words
from trainer_client.retrieval.answering import PassageLookup, RagModel, make_rag_model
from trainer_client.retrieval.lookup import NeighbourLoader
from trainer_client.settings import TrainerSettings
from trainer_client.training.loop import Training

HOST = numbered_identity(1).peer_id
DIMENSIONS = 16
TOKENIZER = ByteTokenizer()
MANIFEST = Manifest.model_validate(
    {
        "name": "answers",
        "preset": "none",
        "model": {"layers": 1, "hidden": 16, "heads": 2, "context": 64, "feed_forward": 32},
        "experts": {"grid": [2, 2]},
        "routing": {"top_k": 2},
    }
)
PAIRS = MANIFEST.model_copy(
    update={"model": MANIFEST.model.model_copy(update={"layers": 2, "causal": (False, True)})}
)
"""A model with an encoder for the passage and the question, and a decoder for the answer."""
COLOURS = {"kiuas": "red", "vihta": "green", "loyly": "white", "kauha": "blue", "laude": "brown"}


class Shelf:
    """A memory in this process, with a random vector for each word."""

    id = MemoryID.of("shelf", HOST)
    encoder = Part(bytes(32), 1)
    dimensions = DIMENSIONS

    def __init__(self, passages: Sequence[Passage]) -> None:
        words = sorted({word for each in passages for word in words_of(f"{each.title} {each.text}")})
        rng = np.random.default_rng(0)
        vectors_VD = rng.integers(-127, 128, (len(words), DIMENSIONS)).astype(np.int8)
        ones_V = np.ones(len(words), np.float32)
        self._encoder = StaticEncoder(words, vectors_VD, ones_V, ones_V)
        self._passages = passages
        self._vectors_ND = self._encoder.encode([f"{each.title}\n{each.text}" for each in passages])
        self.is_there = True

    def encode(self, texts: Sequence[str]) -> Vectors:
        return self._encoder.encode(texts)

    def search(self, texts: Sequence[str], k: int, *, turn: Turn | None) -> list[SearchResult]:
        if not self.is_there:
            raise UnreachableError("nobody is there")
        vectors_QD = self.encode(texts) if turn is None else turn(self.encode(texts))
        results = []
        for text, query_D in zip(texts, vectors_QD.astype(np.int64), strict=True):
            whole = int(query_D @ query_D)
            if not whole:
                results.append(SearchResult((), is_understood=False))
                continue
            hits = [
                Hit(passage, score, score, self.id, b"", HOST, vector_D)
                for passage, vector_D in zip(self._passages, self._vectors_ND, strict=True)
                for score in [float(query_D @ vector_D.astype(np.int64)) / whole]
            ]
            results.append(SearchResult(ranked_by_words(text, hits, self._encoder.rarity)[:k]))
        return results


def passage(name: str, colour: str) -> Passage:
    return Passage(f"{name} is {colour}", name, "sauna.txt", 0, "CC0-1.0")


SHELF = Shelf([passage(*each) for each in COLOURS.items()])
QUESTIONS = [Question(f"what colour is {name}?", (colour,)) for name, colour in COLOURS.items()]


def settings(**more: object) -> TrainerSettings:
    values = {
        "objective": "rag-sequence",
        "memory": "shelf",
        "batch_size": 5,
        "validation_batches": 1,
        "seed": 0,
    }
    return TrainerSettings.model_validate(values | {"memory_passages": 2, "memory_length": 24} | more)


class Unmixed(nn.Module):
    """Takes the place of a mixture, without experts, in either kind of model."""

    def forward(self, x: Tensor, segments: object = None) -> Tensor:
        return x


def model_of(chosen: TrainerSettings, manifest: Manifest = MANIFEST) -> RagModel:
    return make_rag_model(manifest, lambda layer: Unmixed(), TOKENIZER, DIMENSIONS, chosen)


def learned(
    objective: str, steps: int, manifest: Manifest = MANIFEST
) -> tuple[RagModel, Training, PassageLookup]:
    passages = 2
    chosen = settings(objective=objective, steps=steps, memory_passages=passages, learning_rate=1e-2)
    model = model_of(chosen, manifest)
    batches = QuestionBatches([*QUESTIONS, *QUESTIONS], 0, 0.5, model.reader.target, TOKENIZER.token_bytes)
    lookup = PassageLookup(SHELF, model.questions, passages)
    loader = NeighbourLoader(lookup, lambda number: batches.batch(number, 5))
    training = Training(model, batches, chosen, None, loader)
    training.run(lambda progress: None, threading.Event())
    loader.close()
    return model, training, lookup
