"""One configuration of `benchmarks.recipe`: trained with the real trainer and the nodes' own experts, in one process.

Progress is saved in a file, from which a run that was stopped continues.
"""

import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.recipe_configurations import Configuration, Size
from benchmarks.recipe_texts import BYTE_KINDS, Mixed, byte_kinds
from dht.uid import UID
from expert_server.experts.expert import Expert
from peer.codec import Integers
from talkoot.train.local import LocalSwarm
from trainer_client.data.corpus import Dataset
from trainer_client.model import LanguageModel
from trainer_client.moe import RemoteMixtureOfExperts
from trainer_client.routers import ROUTERS
from trainer_client.training.loop import Training, validation_loss
from trainer_client.training.record import Progress

SAVE_EVERY = 250
_FINAL_BATCHES = 64


@dataclass
class Run:
    """A model in training, with all its experts."""

    configuration: Configuration
    size: Size
    training: Training
    model: LanguageModel
    experts: dict[UID, Expert]
    cpu_s: float = 0.0
    load_cv: float = 0.0
    """How unevenly rows were spread over experts (the coefficient of variation), summed over steps."""

    @classmethod
    def begin(cls, configuration: Configuration, size: Size, data: Mixed) -> "Run":
        manifest, settings = configuration.manifest(size), configuration.trainer_settings(size)
        if configuration.expert_kind is None:
            model, experts = LanguageModel(manifest, lambda layer: nn.Identity()), {}
        else:
            swarm = LocalSwarm(manifest, settings)
            model, experts = LanguageModel(manifest, swarm.mixture), swarm.dispatcher.experts
        return cls(configuration, size, Training(model, data, settings), model, experts)

    def train(self, file: Path, stop: threading.Event) -> bool:
        """Continues from the file, and saves progress there. Returns whether all steps are done."""
        if file.exists():
            self._load(file)
        last = time.process_time()

        def observe(progress: Progress) -> None:
            nonlocal last
            now = time.process_time()
            self.cpu_s += now - last
            last = now
            self.load_cv += progress.load_cv or 0.0
            if progress.step % SAVE_EVERY == 0 or progress.step == progress.steps:
                self._save(file)

        self.training.run(observe, stop)
        self._save(file)
        return self.training.step == self.configuration.steps_of(self.size)

    def _save(self, file: Path) -> None:
        tensors = self.training.export_state()
        assert tensors is not None, "between two steps"
        counts = {}
        for uid, expert in self.experts.items():
            counts[str(uid)] = expert.update_count
            tensors |= {f"expert.{uid}/{name}": tensor for name, tensor in expert.export_state().items()}
        age = self.training.part.age
        known = {"updates": counts, "age": age, "cpu_s": self.cpu_s, "load_cv": self.load_cv}
        temporary = file.with_suffix(".new")
        save_file(tensors, temporary, {"recipe": json.dumps(known)})
        temporary.replace(file)

    def _load(self, file: Path) -> None:
        with safe_open(file, "pt") as opened:
            known = json.loads(opened.metadata()["recipe"])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # it is no dict
        self.cpu_s, self.load_cv = known["cpu_s"], known["load_cv"]
        states: dict[str, dict[str, Tensor]] = {}
        for name in [name for name in tensors if name.startswith("expert.")]:
            uid, _, part = name.removeprefix("expert.").partition("/")
            states.setdefault(uid, {})[part] = tensors.pop(name)
        self.training.import_state(tensors, known["age"])
        for uid, expert in self.experts.items():
            expert.import_state(states[str(uid)], known["updates"][str(uid)])

    def curve(self) -> dict[str, Any]:
        """The measured losses on held-out text by step, in nats per byte."""
        history = self.training.history
        return {
            "steps": self.training.step,
            "curve": dict(zip(map(str, history.validated), history.validation_losses, strict=True)),
            "validation_loss": history.validation_losses[-1],
        }

    def results(self, data: Mixed) -> dict[str, Any]:
        """The results of a finished run, for JSON. Losses are in nats per byte, on held-out text."""
        batches = max(1, _FINAL_BATCHES * self.size.validation_batches // 16) // 4 or 1
        numbers = [sum(p.numel() for p in self.model.parameters())]
        numbers += [sum(p.numel() for p in expert.block.parameters()) for expert in self.experts.values()]
        return self.curve() | {
            "loss_of_domain": self._losses(data.domains, batches),
            "out_of_domain": self._losses(data.held_out, batches),
            "parameters": sum(numbers),
            "flops_per_token": self.configuration.flops(self.size),
            "cpu_s": self.cpu_s,
            "load_cv": self.load_cv / self.training.step if self.experts else None,
            "chosen": self._chosen(data, batches) if self.experts else None,
        }

    def _losses(self, domains: Mapping[str, Dataset], batches: int) -> dict[str, float]:
        return {
            name: validation_loss(self.model, domain.validation_batches(self.size.batch, batches))
            for name, domain in domains.items()
        }

    def _chosen(self, data: Mixed, batches: int) -> dict[str, Any]:
        """How many rows each expert of each layer gets, by domain and by kind of byte."""
        experts = self.configuration.manifest(self.size).experts.count
        layers = len(self.model.mixtures)
        by_domain = np.zeros((layers, len(data.domains), experts), dtype=np.int64)
        by_kind = np.zeros((layers, len(BYTE_KINDS), experts), dtype=np.int64)
        with torch.no_grad(), scores_of(self.model.mixtures) as scores:
            self.model.eval()
            for number, domain in enumerate(data.domains.values()):
                for tokens in domain.validation_batches(self.size.batch, batches):
                    self.model(tokens[:, :-1])
                    kinds = byte_kinds(tokens[:, :-1]).flatten().numpy()
                    for layer, of_layer in enumerate(scores):
                        chosen = self._choose(layer, of_layer)  # (R, k)
                        np.add.at(by_domain[layer, number], chosen, 1)
                        np.add.at(by_kind[layer], (kinds[:, None], chosen), 1)
                    scores.clear()
            self.model.train()
        return {"domains": by_domain.tolist(), "kinds": by_kind.tolist()}

    def _choose(self, layer: int, scores: tuple[Tensor, ...]) -> Integers:
        """The numbers of each row's experts, counted in the order of the grid. [R, k]"""
        mixture, grid = self.model.mixtures[layer], self.configuration.manifest(self.size).experts.grid
        assert isinstance(mixture, RemoteMixtureOfExperts)
        alive = tuple(np.ones(grid[: d + 1], dtype=bool) for d in range(len(grid)))
        router = ROUTERS[self.configuration.trainer_settings(self.size).router]
        bias = None if mixture.balance is None else mixture.balance.table()
        tables = [table.numpy() for table in scores]
        found = router.choose(tables, alive, self.configuration.top_k, None, bias)
        experts: Integers = np.ravel_multi_index(tuple(np.moveaxis(found.coordinates, -1, 0)), grid)
        return experts


@contextmanager
def scores_of(mixtures: nn.ModuleList) -> Iterator[list[tuple[Tensor, ...]]]:
    """Collects what the gate of each mixture returns, in the order in which the mixtures are called."""
    found: list[tuple[Tensor, ...]] = []
    gates = [mixture.gate for mixture in mixtures if isinstance(mixture, RemoteMixtureOfExperts)]
    hooks = [gate.register_forward_hook(lambda module, args, output: found.append(output)) for gate in gates]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def shared_information(counts: list[list[int]]) -> float:
    """How much a row's expert tells about its class: mutual information as a share of the class's entropy, 0 to 1."""
    joint = np.array(counts, dtype=np.float64)
    joint /= joint.sum()
    classes, experts = joint.sum(axis=1, keepdims=True), joint.sum(axis=0, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        information = np.nansum(joint * np.log(joint / (classes * experts)))
        entropy = -np.nansum(classes * np.log(classes))
    return float(information / entropy) if entropy else 0.0
