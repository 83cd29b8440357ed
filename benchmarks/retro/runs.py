"""Trains models with and without a store of passages on the same tokens, and measures their loss on held-out text.

A model that reads is compared with a deeper one that does as many operations per token, and with itself when the
passages are drawn at random.
"""

import itertools
import json
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.retro.store import Store
from benchmarks.retro.translations import ADDED, LEARNED
from dht.manifest import Manifest
from trainer_client.model import LanguageModel
from trainer_client.retrieval.attention import RetrievalSpec
from trainer_client.settings import TrainerSettings
from trainer_client.training.loop import Training
from trainer_client.training.record import Progress

OVERLAPS = {"none": 0.0, "12.5%": 0.125, "50%": 0.5, "all": 1.0}
"""The largest share of the eight-word sequences of a target that may also be in a neighbour."""
SHARES = (0.25, 0.5, 1.0)
"""The shares of the store that are used."""
LEARNED_OVERLAP = 0.5
"""The largest overlap of neighbours in training: the default of trainers."""
WAYS = ("reads", "deeper")
_VALIDATED = "real 50%"
"""The variant that models that read are validated with."""
_TESTED_AT_ONCE = 16
"""Sequences that are tested at once."""


@dataclass(frozen=True)
class Size:
    """What is trained, and on how much text."""

    steps: int = 600
    batch: int = 4
    hidden: int = 64
    heads: int = 4
    layers: int = 2
    context: int = 256
    vocabulary: int = 2048
    held_out: int = 120
    """Held-out sequences of each domain."""
    characters: float = math.inf
    """The largest number of characters of each domain."""
    learning_rate: float = 3e-3
    spec: RetrievalSpec = field(default_factory=lambda: RetrievalSpec(64, 1, 160, (0,)))

    def manifest(self, layers: int, seed: int) -> Manifest:
        """The manifest of a model without experts: every layer is the trainer's."""
        model = {
            "layers": layers, "hidden": self.hidden, "heads": self.heads, "context": self.context,
            "feed_forward": 4 * self.hidden, "seed": seed,
        }  # fmt: skip
        return Manifest.model_validate({"name": "retro", "preset": "none", "model": model})

    def flops(self, layers: int, *, reads: bool) -> int:
        """FLOPs of a forward pass for each token: two for each multiplication with a weight or a score."""
        D, spec = self.hidden, self.spec
        plain = layers * (24 * D * D + 2 * self.context * D) + 2 * D * self.vocabulary
        if not reads:
            return plain
        read = spec.neighbours * spec.length
        encoder = max(1, self.heads // 4) * D // self.heads
        encoded = read * (8 * D * encoder + 4 * spec.length * encoder) // spec.chunk
        attended = len(spec.layers) * (4 * D * D * read // spec.chunk + 4 * D * D + 4 * read * D)
        return plain + encoded + attended

    @property
    def deeper(self) -> int:
        """The number of layers with which a model without a store does about as many operations as one that
        reads (2% fewer), or more.
        """
        wanted = 0.98 * self.flops(self.layers, reads=True)
        return next(n for n in itertools.count(self.layers) if self.flops(n, reads=False) >= wanted)


QUICK = Size(40, 4, 32, 2, 2, 128, 512, 12, 2e5, 3e-3, RetrievalSpec(32, 1, 80, (0,)))


@dataclass(frozen=True)
class HeldOut:
    """Held-out sequences of one text, and the neighbours that models get with them."""

    tokens_ST: Tensor
    given: Mapping[str, Tensor]
    """The neighbours for each variant: [S, U, N, L]."""


@dataclass(frozen=True)
class World:
    """What all models have in common."""

    size: Size
    tokens_ST: Tensor
    """The tokens of the training text."""
    given: Tensor
    """The neighbours that the models that read get with them."""
    tested: Mapping[str, HeldOut]
    bytes_V: NDArray[np.int64]
    """The number of bytes of each token."""
    about: Mapping[str, Any]

    @classmethod
    def make(cls, store: Store, size: Size) -> "World":
        known, every = store.where(LEARNED), store.where(LEARNED, ADDED)
        learned = store.sequences(store.learned, size.steps * size.batch, known)
        held_out = store.sequences(store.held_out[LEARNED], size.held_out, known)
        given = {f"real {each}": store.neighbours(held_out, most) for each, most in OVERLAPS.items()}
        for share in SHARES[:-1]:
            part = store.again(held_out, store.where(LEARNED, share=share))
            given[f"share {share}"] = store.neighbours(part, LEARNED_OVERLAP)
        given["random"] = store.drawn(held_out, known)
        new = store.sequences(store.held_out[ADDED], size.held_out, known)
        added = store.again(new, every)
        given_new = {
            "before": store.neighbours(new, LEARNED_OVERLAP),
            "added": store.neighbours(added, LEARNED_OVERLAP),
            "random": store.drawn(new, every),
        }
        about = {
            "passages": {name: store.domains.count(name) for name in (LEARNED, ADDED)},
            "overlap_of_nearest": {LEARNED: store.overlaps(held_out), ADDED: store.overlaps(added)},
            "tokens_learned": size.steps * size.batch * size.context,
            "sequences_learned": len(learned),
        }
        tested = {LEARNED: HeldOut(held_out.tokens_ST, given), ADDED: HeldOut(new.tokens_ST, given_new)}
        given_learned = store.neighbours(learned, LEARNED_OVERLAP, learned=True)
        return cls(size, learned.tokens_ST, given_learned, tested, store.byte_lengths, about)

    def save(self, file: Path) -> None:
        tensors = {"tokens": self.tokens_ST, "given": self.given, "bytes": torch.from_numpy(self.bytes_V)}
        for name, tested in self.tested.items():
            tensors[f"{name}/tokens"] = tested.tokens_ST
            tensors |= {f"{name}/given/{variant}": given for variant, given in tested.given.items()}
        # the largest token is small
        small = {name: tensor.to(torch.int16).contiguous() for name, tensor in tensors.items()}
        save_file(small, file, {"about": json.dumps(self.about)})

    @classmethod
    def load(cls, file: Path, size: Size) -> "World":
        with safe_open(file, "pt") as opened:
            about = json.loads(opened.metadata()["about"])
            tensors = {name: opened.get_tensor(name).long() for name in opened.keys()}  # noqa: SIM118  # it is not a dict
        tested = {}
        for name in [name.removesuffix("/tokens") for name in tensors if name.endswith("/tokens")]:
            begin = f"{name}/given/"
            given = {each.removeprefix(begin): t for each, t in tensors.items() if each.startswith(begin)}
            tested[name] = HeldOut(tensors[f"{name}/tokens"], given)
        return cls(size, tensors["tokens"], tensors["given"], tested, tensors["bytes"].numpy(), about)


class _Batches:
    """The training sequences in an order that follows from a seed, and their neighbours, in the form that `Training`
    takes.
    """

    def __init__(self, world: World, seed: int) -> None:
        self._world = world
        self._order = np.random.default_rng(seed).permutation(len(world.tokens_ST))
        self._tested = next(each for each in world.tested.values() if _VALIDATED in each.given)
        self.context, self.sequences = world.size.context, len(world.tokens_ST)

    def batch(self, step: int, batch_size: int) -> Tensor:
        return self._world.tokens_ST[self._rows(step, batch_size)]

    def training(self, number: int, tokens_BT: Tensor) -> Tensor:
        return self._world.given[self._rows(number, len(tokens_BT))]

    def validation_batches(self, batch_size: int, count: int) -> list[Tensor]:
        return [self._tested.tokens_ST[:batch_size]]

    def validation(self, batches: Sequence[Tensor]) -> Sequence[Tensor]:
        return [self._tested.given[_VALIDATED][: len(batches[0])]]

    def bytes_per_token(self, batches: Sequence[Tensor], first: int = 1) -> float:
        return float(self._world.bytes_V[batches[0][:, first:].numpy()].mean())

    def _rows(self, step: int, batch_size: int) -> Tensor:
        places = np.arange(step * batch_size, (step + 1) * batch_size) % len(self._order)
        return torch.from_numpy(self._order[places])


def train(
    world: World,
    way: str,
    seed: int,
    file: Path | None,
    stop: Callable[[], bool],
    show: Callable[[int, float], None],
) -> tuple[LanguageModel, dict[str, Any]] | None:
    """Trains a model. Returns it with what it cost, or None if it was stopped. `file`: where progress is saved, to
    continue from.
    """
    size, reads = world.size, way == "reads"
    layers = size.layers if reads else size.deeper
    spec = size.spec if reads else None
    model = LanguageModel(size.manifest(layers, seed), lambda layer: nn.Identity(), size.vocabulary, spec)
    batches = _Batches(world, seed)
    settings = TrainerSettings(
        steps=size.steps, batch_size=size.batch, seed=seed, validation_batches=1,
        learning_rate=size.learning_rate, warmup_steps=min(100, size.steps // 4),
    )  # fmt: skip
    training = Training(model, batches, settings, None, batches if reads else None)
    cpu_s = 0.0
    if file is not None and file.exists():
        with safe_open(file, "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # it is not a dict
        cpu_s = tensors.pop("cpu_s").item()
        training.import_state(tensors, 0)
    began, stopped = time.process_time(), threading.Event()

    def observe(progress: Progress) -> None:
        show(progress.step, progress.loss)
        if stop():
            stopped.set()

    training.run(observe, stopped)
    cpu_s += time.process_time() - began
    if file is not None:
        tensors = training.export_state() or {}
        save_file(tensors | {"cpu_s": torch.tensor(cpu_s, dtype=torch.float64)}, file)
    if training.step < size.steps:
        return None
    return model, {
        "layers": layers,
        "flops_per_token": size.flops(layers, reads=reads),
        "parameters": sum(p.numel() for p in model.parameters()),
        "cpu_s": cpu_s,
        "loss_last": float(np.mean(training.history.losses[-50:])),
    }


def test(world: World, model: LanguageModel) -> dict[str, dict[str, list[float]]]:
    """Bits per byte of each held-out sequence, by text and by variant of neighbours."""
    found = {}
    for name, tested in world.tested.items():
        bytes_S = world.bytes_V[tested.tokens_ST[:, 1:].numpy()].sum(axis=1)
        given: dict[str, Tensor | None] = {"nothing": None}
        if model.retrieval is not None:
            given |= tested.given
        found[name] = {
            variant: (np.array(_nats(model, tested.tokens_ST, each)) / math.log(2) / bytes_S).tolist()
            for variant, each in given.items()
        }
    return found


@torch.no_grad()
def _nats(model: LanguageModel, tokens_ST: Tensor, neighbours: Tensor | None) -> list[float]:
    """For each sequence, the sum of the losses of all its predictions, in nats."""
    model.eval()
    nats: list[float] = []
    for at in range(0, len(tokens_ST), _TESTED_AT_ONCE):
        tokens_BT = tokens_ST[at : at + _TESTED_AT_ONCE]
        given = None if neighbours is None else neighbours[at : at + _TESTED_AT_ONCE]
        logits_BTV = model(tokens_BT[:, :-1], given)
        loss_BT = nn.functional.cross_entropy(logits_BTV.transpose(1, 2), tokens_BT[:, 1:], reduction="none")
        nats += loss_BT.double().sum(dim=1).tolist()
    return nats
