"""Answers to questions about facts that are not in the model's weights, from a memory on hosts, one of which dies.

The generator, the query encoder, the search and the hosts' answers are the real ones. There are no experts: every layer
is the trainer's, and hosts answer in this process.
"""

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor, nn

from benchmarks.memory.built import BuiltMemory, open_shards, write_memory
from benchmarks.memory.lying import KnownDirectory, LocalCaller, ShardHost, opened
from benchmarks.rag.facts import Asked, Thing, passages_of, things
from benchmarks.scratch import scratch_folder
from benchmarks.simulated_p2p import SimulatedIdentity
from dht.manifest import Manifest
from dht.memory import MemoryID, Passage
from expert_server.memory.shard import Shard
from peer.loop import LoopThread
from talkoot.memory.build import text_of
from talkoot.memory.clustering import build_codebook, two_cells
from talkoot.memory.dual_training import NumberedTexts, TrainingPairs, train_dual_encoder
from talkoot.memory.training import WordCounter, train_word_vectors
from trainer_client.data.questions import Question, QuestionBatches
from trainer_client.data.tokenizer import BytePairTokenizer
from trainer_client.decoding import make_decoder
from trainer_client.memory.memories import Memory
from trainer_client.memory.retriever import Hit
from trainer_client.retrieval.answering import (
    BEAM,
    Answerer,
    Continuations,
    Found,
    PassageLookup,
    RagModel,
    make_rag_model,
)
from trainer_client.retrieval.lookup import NeighbourLoader
from trainer_client.retrieval.rag import beam_search
from trainer_client.settings import Marginal, Objective, TrainerSettings
from trainer_client.training.loop import ReadSource, Training

DIMENSIONS, GRID = 64, (4, 4)
HOSTS = 4
PASSAGES = 4
"""The number of passages that are read for a question."""
_LIMIT_S = 600.0
_RAG_BATCH = 16
_QUESTIONS = 6
"""The number of training questions about each thing."""
_OBJECTIVES: dict[Marginal, Objective] = {"sequence": "rag-sequence", "token": "rag-token"}


@dataclass(frozen=True)
class Size:
    """The sizes of the training and of the test."""

    learned: int = 2000
    """The number of things that models are trained on."""
    asked: int = 100
    """The number of test questions, each about another thing."""
    steps: int = 2000
    """Training steps with the right passage given."""
    rag_steps: int = 100
    """Training steps of RAG after those."""
    batch: int = 32
    vocabulary: int = 1536
    hidden: int = 64
    layers: int = 2
    encoder_layers: int = 0
    """The number of encoder layers before these, for an encoder-decoder."""


QUICK = Size(200, 6, 20, 3, 8, 400, 16, 1)


class World:
    """Things, questions about them, the tokenizer, and the encoder of passages."""

    def __init__(self, size: Size) -> None:
        rng, taken = random.Random(0), set[str]()
        self.learned = things(rng, size.learned, taken, tested=False)
        self.tested = things(rng, size.asked, taken, tested=True)
        self.changed = [thing.changed(rng) for thing in self.tested]
        self.questions = {
            Question(asked.text, (asked.answer,)): asked
            for thing in self.learned
            for asked in [thing.ask(rng, tested=False) for _ in range(_QUESTIONS)]
        }
        self.asked = [thing.ask(rng, tested=True) for thing in self.tested]
        texts = [*map(text_of, passages_of(self.learned)), *(each.text for each in self.questions)]
        self.tokenizer = BytePairTokenizer.learn(texts, sum(map(len, texts)), size.vocabulary)
        words = WordCounter()
        for passage in passages_of([*self.learned, *self.tested]):
            words.add(text_of(passage))
        for question in self.questions:
            words.add(question.text)
        counted = words.finish()
        number = {word: at for at, word in enumerate(counted.vocabulary)}
        pairs = TrainingPairs(
            NumberedTexts.of([question.text for question in self.questions], number),
            NumberedTexts.of([text_of(asked.passage) for asked in self.questions.values()], number),
            NumberedTexts.of([text_of(asked.negative(rng)) for asked in self.questions.values()], number),
        )
        self.encoder = train_dual_encoder(counted, train_word_vectors(counted, DIMENSIONS), pairs)
        causal = [False] * size.encoder_layers + [True] * size.layers if size.encoder_layers else []
        manifest = {
            "layers": size.encoder_layers + size.layers, "causal": causal, "hidden": size.hidden, "heads": 4,
            "context": 128, "feed_forward": 4 * size.hidden,
        }  # fmt: skip
        self.manifest = Manifest.model_validate({"name": "answers", "preset": "none", "model": manifest})

    def model(self, marginal: Marginal, passages: int, **more: Any) -> tuple[RagModel, TrainerSettings]:
        settings = TrainerSettings(
            objective=_OBJECTIVES[marginal], memory="facts", memory_passages=passages, seed=0,
            validation_batches=1, validate_every=0, threads=1, **more,
        )  # fmt: skip
        model = make_rag_model(
            self.manifest, lambda layer: WithoutExperts(), self.tokenizer, DIMENSIONS, settings
        )
        return model, settings

    def train(
        self,
        model: RagModel,
        settings: TrainerSettings,
        source: Callable[[QuestionBatches], AbstractContextManager[ReadSource]],
    ) -> None:
        batches = QuestionBatches(
            list(self.questions), 0, 0.02, model.reader.target, self.tokenizer.token_bytes
        )
        with source(batches) as reads:
            Training(model, batches, settings, None, reads).run(lambda progress: None, threading.Event())


class WithoutExperts(nn.Module):
    """Takes the place of a mixture of experts. `segments` is what an encoder-decoder also passes to a mixture."""

    def forward(self, x: Tensor, segments: object = None) -> Tensor:
        return x


class Given:
    """A source of passages that needs no search: it gives the passage that answers a question, or none."""

    def __init__(self, of: Callable[[Question], Sequence[Hit]]) -> None:
        self._of = of

    def training(self, number: int, batch: Sequence[Question]) -> Found:
        return Found.of(np.zeros((len(batch), DIMENSIONS), np.int8), [self._of(each) for each in batch])

    def validation(self, batches: Sequence[Sequence[Question]]) -> Sequence[Found]:
        return [self.training(0, batch) for batch in batches]


def _hit(passage: Passage) -> Hit:
    host = SimulatedIdentity(0).peer_id
    return Hit(passage, 1.0, 1.0, MemoryID.of("facts", host), b"", host, np.ones(DIMENSIONS, np.int8))


@contextmanager
def hosted(world: World, some: Sequence[Thing]) -> Iterator[tuple[Memory, Callable[[], None]]]:
    """A memory of the passages about these things, each host with half of the shards. Also yields a function that kills
    a host.
    """
    passages = passages_of(some)
    vectors_ND = world.encoder.encode([text_of(passage) for passage in passages])
    codebook = build_codebook(vectors_ND, GRID)
    built = BuiltMemory(passages, vectors_ND, two_cells(codebook, vectors_ND), world.encoder, codebook, GRID)
    loop = LoopThread()
    with scratch_folder() as folder, closing(loop):
        path = folder / "memory"
        manifest = write_memory(path, built, vectors_ND, built.cells_NT, passages.__getitem__)
        placed = [dict[bytes, Shard]() for _ in range(HOSTS)]
        for number, (info, shard) in enumerate(open_shards(path, manifest)):
            for host in (number, number + 1):
                placed[host % HOSTS][info.root] = shard
        hosts = [
            ShardHost(SimulatedIdentity(number + 1).peer_id, manifest, shards)
            for number, shards in enumerate(placed)
        ]
        caller = LocalCaller(hosts)
        with opened(KnownDirectory(built, manifest, hosts), caller, loop, _LIMIT_S) as memory:
            yield memory, lambda: caller.dead.add(hosts[0].peer_id)


def measure(size: Size, show: Callable[[str], None] = lambda what: None) -> dict[str, Any]:
    """The share of the test questions that are answered exactly, for each way of answering."""
    began, cpu_s = time.process_time(), dict[str, float]()

    def done(what: str, following: str) -> None:
        nonlocal began
        cpu_s[what] = time.process_time() - began
        began = time.process_time()
        show(following)

    show("encoder")
    world = World(size)
    done("encoder", "reader")
    reader, settings = world.model("sequence", 1, steps=size.steps, batch_size=size.batch, learning_rate=3e-3)
    gold = {question: (_hit(asked.passage),) for question, asked in world.questions.items()}
    world.train(reader, settings, lambda batches: nullcontext(Given(gold.__getitem__)))
    done("reader", "closed-book")
    closed, settings = world.model(
        "sequence", 1, steps=size.steps // 2, batch_size=size.batch, learning_rate=3e-3
    )
    world.train(closed, settings, lambda batches: nullcontext(Given(lambda question: ())))
    done("closed_book", "RAG")
    exact: dict[str, float] = {}
    found: dict[str, list[str]] = {}
    with hosted(world, [*world.learned, *world.tested]) as (memory, kill):
        models: dict[Marginal, RagModel] = {}
        for marginal in _OBJECTIVES:
            model, settings = world.model(
                marginal, PASSAGES, steps=size.rag_steps, batch_size=_RAG_BATCH, learning_rate=1e-3
            )
            model.load_state_dict(reader.state_dict())
            models[marginal] = model
            lookup = PassageLookup(memory, model.questions, PASSAGES)
            world.train(model, settings, partial(_looked_up, lookup))
        done("rag", "answers")
        before, after = (
            _recall(world.asked, PassageLookup(memory, each.questions, PASSAGES))
            for each in (reader, models["sequence"])
        )
        found["closed_book"] = [_without_passage(closed, asked.text) for asked in world.asked]
        found["dpr_reader"] = _answers(reader, world.asked, memory, 1, "sequence")
        found["rag_token"] = _answers(models["token"], world.asked, memory, PASSAGES, "token")
        found["rag_sequence"] = _answers(models["sequence"], world.asked, memory, PASSAGES, "sequence")
        found["gold"] = [
            Answerer(models["sequence"]).answers(asked.text, _gold(asked), "sequence")[0].text
            for asked in world.asked
        ]
        half = len(world.asked) // 2
        found["killed"] = _answers(models["sequence"], world.asked[:half], memory, PASSAGES, "sequence")
        kill()
        found["killed"] += _answers(models["sequence"], world.asked[half:], memory, PASSAGES, "sequence")
    with hosted(world, [*world.learned, *world.changed]) as (memory, _):
        found["changed"] = _answers(models["sequence"], world.asked, memory, PASSAGES, "sequence")
    done("answers", "")
    right = [asked.answer for asked in world.asked]
    for name in ("closed_book", "dpr_reader", "rag_token", "rag_sequence", "gold"):
        exact[name] = _share(found[name], right)
    followed = [
        is_now == thing.facts[asked.what]
        for asked, thing, was, is_now in zip(
            world.asked, world.changed, found["rag_sequence"], found["changed"], strict=True
        )
        if was == asked.answer != thing.facts[asked.what]
    ]
    return {
        "questions": len(world.asked),
        "passages": len(passages_of([*world.learned, *world.tested])),
        "parameters": sum(p.numel() for p in reader.parameters()),
        "exact": exact,
        "found_first": {"before": before, "after": after},
        "changed": {"right_before": len(followed), "followed": sum(followed) / max(1, len(followed))},
        "same_with_a_host_killed": _share(found["killed"], found["rag_sequence"]),
        "cpu_s": cpu_s,
    }


@contextmanager
def _looked_up(lookup: PassageLookup, batches: QuestionBatches) -> Iterator[ReadSource]:
    loader = NeighbourLoader(lookup, partial(batches.batch, batch_size=_RAG_BATCH), workers=1)
    with closing(loader):
        yield loader


def _share(answers: Sequence[str], right: Sequence[str]) -> float:
    return sum(a == b for a, b in zip(answers, right, strict=True)) / max(1, len(right))


def _gold(asked: Asked) -> Found:
    return Given(lambda question: (_hit(asked.passage),)).training(0, [Question(asked.text)])


def _answers(
    model: RagModel, asked: Sequence[Asked], memory: Memory, passages: int, marginal: Marginal
) -> list[str]:
    answerer = Answerer(model)
    lookup = PassageLookup(memory, model.questions, passages)
    answers = []
    for each in asked:
        found, _ = lookup.search([each.text])
        best = answerer.answers(each.text, found, marginal) if found.hits[0] else []
        answers.append(best[0].text if best else "")
    return answers


def _recall(asked: Sequence[Asked], lookup: PassageLookup) -> float:
    """The share of the questions for which the right passage is found first."""
    found, _ = lookup.search([each.text for each in asked])
    firsts = [hits[0].passage.text if hits else "" for hits in found.hits]
    return _share(firsts, [each.passage.text for each in asked])


def _without_passage(model: RagModel, question: str) -> str:
    model.eval()
    reader = model.reader
    following = Continuations(make_decoder(model.generator), [reader.source(question, None)])

    def after(prefixes: Sequence[tuple[int, ...]]) -> Tensor:
        return following(prefixes, [0])[:, 0]

    best = beam_search(after, BEAM, reader.end, reader.longest)
    following.close()
    return reader.text(best[0].tokens)
