"""What `talkoot train` writes for other tools: JSON lines, TensorBoard, and a plot of the loss."""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np

from peer.errors import StartError
from talkoot.terminal import check_writable, to_json
from trainer_client.optional import require
from trainer_client.training.record import History

logger = logging.getLogger(__name__)

Write = Callable[[Mapping[str, Any]], None]
"""Is told the figures of each step."""

_PLOT_POINTS = 2000


@contextmanager
def logs_written(log: Path | None, tensorboard: Path | None) -> Iterator[list[Write]]:
    """Gives what is to be told of each step. Raises UserError when a log can't be written."""
    with ExitStack() as stack:
        writers: list[Write] = []
        if log is not None:
            writers.append(_JsonLines(stack.enter_context(_appended(log))).write)
        if tensorboard is not None:
            writers.append(stack.enter_context(_tensorboard(tensorboard)))
        yield writers


def check_plot(path: Path) -> None:
    """Raises UserError when nothing can be drawn there."""
    require("matplotlib", "plot", "--plot")
    check_writable(path, "--plot")


def plot_losses(history: History, path: Path) -> None:
    """A PNG with the loss of all steps, a mean over the steps about each, and the validation loss."""
    from matplotlib.figure import Figure

    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # it tells of its fonts

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    losses = np.array(history.losses, np.float64)
    every = max(1, math.ceil(len(losses) / _PLOT_POINTS))
    steps = np.arange(1, len(losses) + 1)
    axes.plot(steps[::every], losses[::every], color="0.8", linewidth=0.8, label="training, each step")
    width = max(1, len(losses) // 50)
    if width > 1 and np.isfinite(losses).any():
        axes.plot(
            steps[::every], _means_about(losses, width)[::every], label=f"training, mean of {width} steps"
        )
    axes.plot(history.validated, history.validation_losses, "o-", label="held-out text")
    axes.set(xlabel="steps", ylabel="loss in nats per token", title="Loss")
    axes.legend()
    axes.grid(alpha=0.3)
    try:
        figure.savefig(path, format="png")
    except OSError as error:
        logger.warning("could not write the plot %s: %s", path, error.strerror or error)


def _means_about(losses: "np.ndarray[Any, np.dtype[np.float64]]", width: int) -> Any:
    """Of the finite losses among the `width` up to each step."""
    finite = np.isfinite(losses)
    sums = np.cumsum(np.where(finite, losses, 0.0))
    counts = np.cumsum(finite).astype(np.float64)
    sums[width:] -= sums[:-width].copy()
    counts[width:] -= counts[:-width].copy()
    return np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)


@contextmanager
def _appended(path: Path) -> Iterator[IO[str]]:
    try:
        file = path.open("a", encoding="utf-8", buffering=1)
    except OSError as error:
        raise StartError(f"can't write {path}: {error.strerror}; pass another --log FILE") from error
    try:
        yield file
    finally:
        with suppress(OSError):  # what could not be written is tried once more
            file.close()


class _JsonLines:
    """A line for each step; a full disk ends them, and not the training."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file
        self._failed = False

    def write(self, values: Mapping[str, Any]) -> None:
        if self._failed:
            return
        try:
            self._file.write(to_json({"time": time.time(), **values}) + "\n")
        except OSError as error:
            self._failed = True
            logger.warning("no more lines in %s: %s", self._file.name, error.strerror or error)


@contextmanager
def _tensorboard(folder: Path) -> Iterator[Write]:
    require("tensorboard", "tensorboard", "--tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    try:
        writer = SummaryWriter(str(folder))
    except OSError as error:
        raise StartError(f"can't write {folder}: {error.strerror}; pass another --tensorboard DIR") from error

    def write(values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, int | float) and name not in {"step", "steps"}:
                writer.add_scalar(name, value, values["step"])
        for cause, count in values["failures"].items():
            writer.add_scalar(f"failures/{cause}", count, values["step"])

    try:
        yield write
    finally:
        writer.close()
