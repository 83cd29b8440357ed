"""Trainers of a real swarm arrive at one dense part, and a trainer that joins continues from there."""

import contextlib
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from byte_texts import byte_dataset
from memory_samples import SampleMemory
from training_swarm import MANIFEST, TEXT, founded

from dht.invites import Invite
from peer.loop import LoopThread
from peer.medoid import medoid
from peer.metrics import total
from trainer_client.averaging.averager import Averaging
from trainer_client.client import SwarmClient
from trainer_client.data.questions import Question, QuestionBatches
from trainer_client.data.tokenizer import ByteTokenizer
from trainer_client.model import LanguageModel
from trainer_client.retrieval.answering import PassageLookup, make_rag_model
from trainer_client.retrieval.lookup import NeighbourLoader
from trainer_client.settings import TrainerSettings
from trainer_client.training.loop import Training
from trainer_client.training.record import Progress

LIMIT_S = 400.0
WORDS = SampleMemory.with_words()
NAME = WORDS.manifest.name
QUESTIONS = [Question(f"what is word{n}?", (f"word{n + 1}",)) for n in range(40)]


@dataclass
class Trainer:
    """A trainer as `talkoot train` makes one."""

    client: SwarmClient
    training: Training
    averaging: Averaging


@contextlib.contextmanager
def trainer(invite: str, state: Path, seed: int, in_flight: int = 1) -> Iterator[Trainer]:
    settings = TrainerSettings.load(
        seed=seed, steps=2000, batch_size=2, validation_batches=2, warmup_steps=2, average_every=2,
        announce_every_s=0.5, check_share=0, in_flight=in_flight,
    )  # fmt: skip
    with SwarmClient(Invite.parse(invite), settings, state) as client:
        client.wait_for_experts(LIMIT_S, lambda text: None)
        dataset = byte_dataset(TEXT.encode(), client.manifest.model.context, seed)
        make = partial(LanguageModel, client.manifest, client.mixture)
        training = Training(make(), dataset, settings, make)
        yield Trainer(client, training, client.average(training.part, "bytes", settings.router))


@contextlib.contextmanager
def asking_trainer(invite: str, state: Path, seed: int) -> Iterator[Trainer]:
    """A trainer as `talkoot train --objective rag-token` makes one."""
    settings = TrainerSettings.load(
        seed=seed, objective="rag-token", memory=NAME, memory_length=16, batch_size=2, steps=2000,
        validation_batches=1, warmup_steps=2, average_every=2, announce_every_s=0.5, check_share=0,
    )  # fmt: skip
    with contextlib.ExitStack() as exits:
        client = exits.enter_context(SwarmClient(Invite.parse(invite), settings, state))
        client.wait_for_experts(LIMIT_S, lambda text: None)
        memory, tokenizer = client.memory(NAME), ByteTokenizer()
        make = partial(
            make_rag_model, client.manifest, client.mixture, tokenizer, memory.dimensions, client.settings
        )
        model = make()
        batches = QuestionBatches(QUESTIONS, seed, 0.1, model.reader.target, tokenizer.token_bytes)
        lookup = PassageLookup(memory, model.questions, model.passages)
        loader = NeighbourLoader(lookup, lambda number: batches.batch(number, settings.batch_size))
        exits.callback(loader.close)
        training = Training(model, batches, client.settings, make, loader)
        yield Trainer(client, training, client.average(training.part, "bytes", settings.router, "answers"))


def distance(one: Trainer, other: Trainer, but: str = "nothing") -> float:
    """The distance over all tensors, except those with `but` in their names."""
    mine, theirs = one.training.part.read().tensors, other.training.part.read().tensors
    return max(float((mine[name] - theirs[name]).abs().max()) for name in mine if but not in name)


def wait_for_ages(watcher: Trainer, *others: Trainer) -> None:
    """Waits until the DHT says how many steps are in the others' dense parts now."""
    ages = {other.averaging.peer_id: other.training.part.age for other in others}
    deadline = time.monotonic() + LIMIT_S
    while {partner.peer_id: partner.dense_age for partner in watcher.averaging.partners} != ages:
        assert time.monotonic() < deadline, watcher.averaging.partners
        watcher.client._loop.run(watcher.averaging.find_partners(), LIMIT_S)


def train_together(*trainers: Trainer, meetings: int) -> None:
    """Trains with each trainer on its own thread, until each has averaged `meetings` times."""
    enough = threading.Event()
    short = set(range(len(trainers)))

    def watch(number: int, trainer: Trainer, _: Progress) -> None:
        if total(trainer.averaging.metrics.ends, end="averaged") >= meetings:
            short.discard(number)
        if not short:
            enough.set()

    with ThreadPoolExecutor(len(trainers)) as threads:
        runs = [
            threads.submit(trainer.training.run, partial(watch, number, trainer), enough)
            for number, trainer in enumerate(trainers)
        ]
        for run in runs:
            run.result(LIMIT_S)


@pytest.fixture
def village(loop: LoopThread, tmp_path: Path, long_lives: None) -> Iterator[str]:
    with founded(loop, tmp_path, experts=8) as founder:
        yield founder.invite


def test_two_become_one_and_a_third_begins_there(village: str, tmp_path: Path) -> None:
    with (
        trainer(village, tmp_path / "a", 1) as first,
        trainer(village, tmp_path / "b", 2, in_flight=2) as second,
    ):
        assert distance(first, second) == 0, "both begin by the manifest's seed"
        first_tensors = first.training.part.read().tensors
        train_together(first, second, meetings=6)
        for each in (first, second):
            assert not total(each.averaging.metrics.ends, end="refused")
        # They had the same meetings, apart from a last one that only one side has finished.
        merges = zip(first.training.part.take_merges(), second.training.part.take_merges(), strict=False)
        shares = [(ours.share, theirs.share) for ours, theirs in merges]
        assert len(shares) >= 2
        assert all(0 <= min(pair) <= max(pair) == 0.5 for pair in shares), "who is behind takes half, at most"
        now = first.training.part.read().tensors
        moved = max(
            float((now[name] - first_tensors[name]).abs().max()) for name in now if ".balance." not in name
        )
        assert distance(first, second, but=".balance.") < moved, (
            "what each learned since they met, and no more"
        )

        with trainer(village, tmp_path / "c", 3) as third:
            wait_for_ages(third, first, second)
            form = third.averaging.form
            trained = [form.trained(t.training.part.read().tensors) for t in (first, second, third)]
            nearest = (first, second)[medoid(trained[:2], trained[2], random.Random(0))]
            age = third.client.take_whole(third.averaging)
            assert age == min(t.training.part.age for t in (first, second)) == third.training.part.age
            assert distance(third, nearest, but=".balance.") == 0


@pytest.mark.slow
def test_a_third_asks_as_two_have_learned_to_together(
    loop: LoopThread, tmp_path: Path, long_lives: None
) -> None:
    """An encoder-decoder and its query encoder are averaged, and a trainer that joins gets both whole."""
    parts = {"model": MANIFEST.model.model_copy(update={"context": 64, "causal": (False, True)})}
    with (
        founded(loop, tmp_path, experts=8, parts=parts, memories=[WORDS]) as founder,
        asking_trainer(founder.invite, tmp_path / "a", 1) as first,
        asking_trainer(founder.invite, tmp_path / "b", 2) as second,
    ):
        train_together(first, second, meetings=4)
        assert not any(total(each.averaging.metrics.ends, end="refused") for each in (first, second))
        with asking_trainer(founder.invite, tmp_path / "c", 3) as third:
            wait_for_ages(third, first, second)
            new = third.training.part.read().tensors
            assert third.client.take_whole(third.averaging) == third.training.part.age
            assert 0 in [distance(third, other, but=".balance.") for other in (first, second)]
            taken = third.training.part.read().tensors
            asking = {name for name in taken if name.startswith("questions.")}
            assert asking == {"questions.change.weight", "questions.log_sharpness", "questions.word_weight"}
            assert not any(torch.equal(taken[name], new[name]) for name in asking)
