"""Experts, stores and checkpoints for tests."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dht.manifest import Manifest
from dht.uid import UID
from expert_server.experts.expert import Expert
from expert_server.experts.format import Checkpoint, State, StateForm, moment_name
from expert_server.experts.graphs import Rows
from expert_server.experts.guard import CHECK_EVERY_UPDATES
from expert_server.state.checkpoints import CheckpointStore

MANIFEST = Manifest.model_validate(
    {
        "name": "sauna",
        "model": {"layers": 2, "hidden": 8, "heads": 2, "context": 8, "feed_forward": 8},
        "experts": {"grid": [2, 2]},
        "routing": {"top_k": 2},
    }
)
AN_UID, OTHER_UID = UID(1, (0, 1)), UID(0, (1, 1))
SWARM = "sauna-QmFounder"


def make_store(
    folder: Path, keep: int = 2, swarm_id: str = SWARM, manifest: Manifest = MANIFEST
) -> CheckpointStore:
    return CheckpointStore(folder, swarm_id, manifest, keep, now=lambda: 1000.5)


def update_counts(store: CheckpointStore, uid: UID) -> list[int]:
    """The update counts of an expert's checkpoints, newest first."""
    return [entry.update_count for entry in store.entries(uid)]


def step(expert: Expert, steps: int = 1) -> Expert:
    """Takes optimizer steps that depend only on the update count."""
    for _ in range(steps):
        generator = torch.Generator().manual_seed(expert.update_count)
        inputs, gradients = torch.randn(2, 5, 8, generator=generator).unbind()
        expert.backward([Rows(inputs, torch.tensor([5]), torch.arange(5), gradients)])
    return expert


def explode(expert: Expert) -> None:
    """Trains an expert on probation until it is rolled back."""
    with torch.no_grad():
        for parameter in expert.block.parameters():
            parameter.mul_(1e6)
    for _ in range(CHECK_EVERY_UPDATES):
        if not expert.refuted:
            step(expert)
    assert expert.refuted


def make_expert(steps: int = 0, uid: UID = AN_UID) -> Expert:
    return step(Expert(uid, MANIFEST), steps)


def save(store: CheckpointStore, expert: Expert) -> Path:
    store.save(expert.uid, expert.checkpoint())
    return store.path(expert.uid, expert.update_count)


def assert_same(first: State, second: State) -> None:
    torch.testing.assert_close(first, second, atol=0, rtol=0)


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def without(name: str) -> Callable[[State], State]:
    return lambda state: {key: tensor for key, tensor in state.items() if key != name}


def changed(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[State], State]:
    return lambda state: state | {name: change(state[name])}


WEIGHT, MOMENT = "block.attention_input.weight", "optimizer.attention_input.weight.exp_avg"


LARGER = MANIFEST.model_copy(
    update={"model": MANIFEST.model.model_copy(update={"hidden": 32, "feed_forward": 128})}
)
"""The states of its experts have about 150 kB."""


def filled_with(number: int) -> Checkpoint:
    """A state of an expert of `LARGER` in which all numbers are the same."""
    form = StateForm.of(LARGER)
    outline = dict(form.block)
    for name, like in form.parameters.items():
        outline |= {moment_name(name, m): ((), torch.float32) if m == "step" else like for m in form.moments}
    state = {name: torch.full(shape, float(number), dtype=dtype) for name, (shape, dtype) in outline.items()}
    return Checkpoint(state, number)
