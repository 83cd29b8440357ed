"""Training runs on a swarm without a network, saved in a real folder."""

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from expert_fakes import make_manifest
from router_fakes import LearningSwarm, mixtures
from torch import Tensor, nn

from trainer_client.data.corpus import Dataset
from trainer_client.model import LanguageModel
from trainer_client.settings import RouterName, TrainerSettings
from trainer_client.training.checkpoints import CheckpointSaver, RunStart, prepare_run
from trainer_client.training.loop import Training
from trainer_client.training.record import Progress, Summary

TEXT = "In the sauna one must behave as in church. " * 60
SWARM = "sauna-QmFounder"
MANIFEST = make_manifest((2, 3), hidden=16, feed_forward=32)


@dataclass(frozen=True)
class Ran:
    """The results of a run."""

    summary: Summary
    losses: list[float]
    parameters: dict[str, Tensor]
    folder: Path


def write_text(folder: Path, text: str = TEXT) -> Path:
    path = folder / "sauna.txt"
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
    return path


def make_settings(**given: Any) -> TrainerSettings:
    small = {"steps": 10, "batch_size": 4, "warmup_steps": 2, "learning_rate": 1e-2, "validation_batches": 2}
    return TrainerSettings.load(**(small | given))


def start(state: Path, settings: TrainerSettings, resume: bool = False) -> RunStart:
    return prepare_run(settings, resume, SWARM, state, lambda text: None)


def train_from(began: RunStart, model: LanguageModel, stop_after: int | None = None) -> Ran:
    """Trains, and saves at the end, as the command does."""
    settings, stop = began.settings, threading.Event()
    seed = settings.seed or 0
    dataset = Dataset(began.corpus.tokens, 16, seed, settings.validation_share, began.tokenizer.token_bytes)
    training = Training(model, dataset, settings)
    began.restore(training)
    saver = CheckpointSaver(began, training, MANIFEST, seed)
    losses: list[float] = []

    def observe(progress: Progress) -> None:
        losses.append(progress.loss)
        saver.save_if_due()
        if progress.step == stop_after:
            stop.set()

    summary = training.run(observe, stop)
    saver.save()
    parameters = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return Ran(summary, losses, parameters, saver.folder)


def train_dense(began: RunStart, stop_after: int | None = None) -> Ran:
    """Trains without experts."""
    model = LanguageModel(MANIFEST, lambda layer: nn.Identity(), len(began.tokenizer.token_bytes))
    return train_from(began, model, stop_after)


def train_on(swarm: LearningSwarm, router: RouterName, began: RunStart, stop_after: int | None = None) -> Ran:
    with mixtures(swarm, router) as make_mixture:
        model = LanguageModel(MANIFEST, make_mixture, len(began.tokenizer.token_bytes))
        return train_from(began, model, stop_after)


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
