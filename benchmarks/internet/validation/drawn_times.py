"""A kind of expert that sleeps as long as a randomly drawn computer would take to compute it.

The processor and the spread of its times are set by environment variables of the node's process.
"""

import os
import random
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.internet.validation.scenario import service_s
from dht.manifest import ModelSpec

KINDS = {"drawn-times": f"{__name__}:DrawnTimes"}
_ROWS_PER_S, _JITTER, _SEED = "DRAWN_TIMES_ROWS_PER_S", "DRAWN_TIMES_JITTER", "DRAWN_TIMES_SEED"


class DrawnTimes(nn.Module):
    """Scales each column. The outputs depend only on the rows, not on the time taken."""

    def __init__(self, model: ModelSpec) -> None:
        super().__init__()
        self.scale = nn.Parameter(0.5 + 0.1 * torch.rand(model.hidden))
        self._processor = Processor.of(os.environ)

    def forward(self, x_RD: Tensor, lengths_S: Tensor, positions_R: Tensor) -> Tensor:
        if x_RD.device.type != "meta":
            self._processor.compute(len(x_RD), backward=False)
        output_RD: Tensor = x_RD + _Delayed.apply(x_RD * self.scale, self._processor)
        return output_RD


class Processor:
    """A processor that sleeps for as long as the work takes."""

    def __init__(self, rows_per_s: float, jitter: float, seed: str) -> None:
        self._rows_per_s = rows_per_s
        self._jitter = jitter
        self._rng = random.Random(seed)

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> "Processor":
        return cls(float(environment[_ROWS_PER_S]), float(environment[_JITTER]), environment[_SEED])

    def compute(self, rows: int, *, backward: bool) -> None:
        time.sleep(service_s(rows, self._rows_per_s, self._jitter, self._rng, backward))

    def __deepcopy__(self, memo: object) -> "Processor":
        return self


class _Delayed(torch.autograd.Function):
    """The identity, whose gradient takes as long as a backward pass."""

    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, processor: Processor) -> Tensor:
        ctx.processor = processor
        return x_RD.view_as(x_RD)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        ctx.processor.compute(len(gradients[0]), backward=True)
        return gradients[0], None


def environment_of(package: Path, rows_per_s: float, jitter: float, seed: str) -> dict[str, str]:
    """The environment for a node's process. `package`: a folder that offers `KINDS`."""
    path = import_path(str(package))
    return {"PYTHONPATH": path, _ROWS_PER_S: str(rows_per_s), _JITTER: str(jitter), _SEED: seed}


def import_path(*folders: str) -> str:
    """The PYTHONPATH of a process in another folder that imports from these folders, and what this process can."""
    return os.pathsep.join([*folders, os.getcwd(), os.environ.get("PYTHONPATH", "")])
