"""A training run gives its model the neighbours of each batch, and of the validation text."""

import threading
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from dht.manifest import Manifest
from trainer_client.data.corpus import Dataset
from trainer_client.model import LanguageModel
from trainer_client.retrieval.attention import RetrievalSpec
from trainer_client.settings import TrainerSettings
from trainer_client.training.loop import Training

SPEC = RetrievalSpec(chunk=8, neighbours=1, length=8, layers=(0,))
MANIFEST = Manifest.model_validate(
    {"name": "sauna", "model": {"layers": 1, "hidden": 16, "heads": 2, "context": 16, "feed_forward": 16}}
)


class Oracle:
    """A source that gives away the next chunk."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        self.asked: list[int] = []
        self.lock = threading.Lock()

    def training(self, number: int, tokens_BT: Tensor) -> Tensor:
        with self.lock:
            self.asked.append(number)
        assert torch.equal(tokens_BT, self._dataset.batch(number, 2))
        return self._following(tokens_BT)

    def validation(self, batches: Sequence[Tensor]) -> list[Tensor]:
        return [self._following(tokens_BT) for tokens_BT in batches]

    def _following(self, tokens_BT: Tensor) -> Tensor:
        given = SPEC.nothing(len(tokens_BT), 2)
        given[:, 0, 0] = tokens_BT[:, 8:16]
        return given


def trained(in_flight: int) -> tuple[list[int], list[float]]:
    tokens = np.random.default_rng(0).integers(0, 256, 2000).astype(np.uint8)
    dataset = Dataset(tokens, 16)
    oracle = Oracle(dataset)

    def make_model() -> LanguageModel:
        return LanguageModel(MANIFEST, lambda layer: nn.Identity(), retrieval=SPEC)

    settings = TrainerSettings(steps=6, batch_size=2, accumulate=2, in_flight=in_flight, seed=0)
    training = Training(make_model(), dataset, settings, make_model, oracle)
    before = {name: each.detach().clone() for name, each in training.part.model.named_parameters()}
    training.run(lambda progress: None, threading.Event())
    moved = [
        float((each - before[name]).detach().abs().max())
        for name, each in training.part.model.named_parameters()
        if name.startswith("retrieval")
    ]
    return sorted(oracle.asked), moved


def test_each_batch_is_trained_with_its_neighbours_and_what_reads_them_learns() -> None:
    for in_flight in (1, 3):
        asked, moved = trained(in_flight)
        assert asked[:12] == list(range(12))
        assert min(moved) > 0
