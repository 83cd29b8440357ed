"""What `talkoot train` shows and writes: its progress and summary, and logs for other tools.

Progress is a bar, log lines or JSON lines. The logs are JSON lines, TensorBoard's files and a plot of the loss.
"""

import logging
import math
import os
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import numpy as np

from peer.errors import SettingsError, StartError
from peer.files import kind_of
from peer.formatting import counted
from peer.settings import require_extra
from talkoot.terminal import StepBar, Terminal, check_writable, to_json, write_whole
from trainer_client.training.record import History, Validation

logger: logging.Logger = logging.getLogger(__name__)

Values = Mapping[str, Any]
"""A step's figures: those of `Progress`, and those of the swarm."""
Write = Callable[[Mapping[str, Any]], None]
"""Called with the figures of each step."""
_LINE_EVERY_STEPS = 10
_PLOT_POINTS = 2000
_COUNTS = {
    "skipped_steps": ("step", "skipped"),
    "hedged_calls": ("call", "made twice"),
    "hedges_won": ("expert", "answered first by the second call"),
    "repeated_calls": ("call", "repeated"),
    "reselected_rows": ("row", "sent to other experts"),
    "unanswered_rows": ("row", "without an answer"),
    "late_gradients": ("gradient", "too late"),
    "checked_rows": ("row", "checked"),
    "failed_spot_checks": ("check", "failed"),
    "wrong_answers": ("answer", "wrong"),
    "skipped_updates": ("update", "of experts skipped"),
    "rollbacks": ("rollback", "of experts"),
    "averagings": ("averaging", "with other trainers"),
    "memory_failed_lookups": ("look-up", "in the memory failed"),
    "memory_late_batches": ("time", "without the memory, which was too slow"),
}
"""Counts that are 0 in most runs. The summary shows them only if they are not."""
_CONNECTING = "the first calls take longest: connections and sessions are opened"


@contextmanager
def progress_shown(terminal: Terminal, steps: int, done: int) -> Iterator[Callable[[Values], None]]:
    """Yields a function that shows each step: on a bar if somebody is watching, otherwise as JSON or log lines.

    `done`: the steps before this run.
    """
    if terminal.json:
        yield lambda values: terminal.event("step", values)
        return
    first = f"{_CONNECTING}; {'going on' if done else 'validating before the first step'}"
    if not terminal.live:
        logger.info("%s", first)
        yield _log_step
        return
    with StepBar(console=terminal.err) as bar:
        task = bar.add_task(first, total=steps, completed=done)
        yield lambda values: bar.update(task, completed=values["step"], description=describe(values))


def describe(values: Values) -> str:
    """A step as one line. A validation has a line of its own."""
    failures = ", ".join(f"{count} {cause}" for cause, count in sorted(values["failures"].items()))
    in_flight = ""
    if values["in_flight"] > 1:
        in_flight = (
            f"{values['in_flight']} steps in flight, gradient {counted(values['staleness'], 'update')} old, "
        )
    averaged = f"averaged {counted(values['averagings'], 'time')}, " if values["averagings"] else ""
    return (
        f"loss {values['loss']:.3f}, {values['tokens_per_s']:.0f} tokens/s, {in_flight}{averaged}"
        f"{values['experts_live']} of {counted(values['experts_total'], 'expert')} live, "
        + (f"failed calls: {failures}" if failures else "no failed calls")
    )


def describe_validation(validation: Validation) -> str:
    """A validation as one line."""
    when = f"after step {validation.step}" if validation.step else "before the first step"
    why = ""
    if validation.unanswered_rows:
        rows = counted(validation.unanswered_rows, "row")
        why = f"; no expert answered for {rows}, so it may be higher than usual"
    return (
        f"validation loss {when}: {validation.loss:.3f} ({validation.bits_per_byte:.3f} bits per byte, "
        f"perplexity {validation.perplexity:.4g}){why}"
    )


def summary_lines(values: Values) -> Iterator[str]:
    """The summary in words."""
    done = values["steps"] - values["resumed_at"]
    how = "stopped after" if values["stopped"] else "trained"
    before = f" ({values['steps']:,} in all)" if values["resumed_at"] else ""
    yield (
        f"{how} {counted(done, 'step', ',')}{before} in {_duration(values['seconds'])} at "
        f"{values['tokens_per_s']:,.0f} tokens/s"
    )
    if values["validation_loss_last"] is not None:
        yield (
            f"validation loss {values['validation_loss_first']:.3f} at first, {values['validation_loss_last']:.3f} at "
            f"last: {values['bits_per_byte']:.3f} bits per byte, perplexity {values['perplexity']:.4g}"
        )
    if values["loss_first"] is not None:
        yield f"training loss {values['loss_first']:.3f} in the first step, {values['loss_last']:.3f} in the last"
    if values["load_max_over_mean"] is not None:
        yield (
            f"the busiest expert got {values['load_max_over_mean']:.1f} times the tokens of the mean one "
            f"(load_cv {values['load_cv']:.2f}; 0 is even)"
        )
    if asked := values.get("memory_chunks"):
        gave = asked - values["memory_chunks_without"]
        why = "" if gave else ": a model gets none of the documents that it learns from"
        yield f"the memory gave passages for {gave:,} of {counted(asked, 'look-up', ',')}{why}"
    failures = ", ".join(f"{count} {cause}" for cause, count in sorted(values["failures"].items()))
    yield f"calls that failed: {failures or 'none'}; longest stall {values['longest_stall_s']:.1f} s"
    counts = (
        f"{counted(values[name], noun)} {rest}" for name, (noun, rest) in _COUNTS.items() if values.get(name)
    )
    if also := ", ".join(counts):
        yield f"also: {also}"


@contextmanager
def logs_written(log: Path | None, tensorboard: Path | None) -> Iterator[list[Write]]:
    """Yields the functions that write each step. Raises UserError if a log can't be written."""
    with ExitStack() as stack:
        writers: list[Write] = []
        if log is not None:
            writers.append(_JsonLines(stack.enter_context(_appended(log))).write)
        if tensorboard is not None:
            writers.append(stack.enter_context(_tensorboard(tensorboard)))
        yield writers


def check_plot(path: Path) -> None:
    """Raises UserError if a plot can't be written there."""
    require_extra("matplotlib", "plot", "--plot")
    if path.suffix.lower() not in ("", ".png"):
        raise SettingsError(f"--plot {path}: the plot is a PNG, so pass a file whose name ends in .png")
    check_writable(path, "--plot")


def plot_losses(history: History, path: Path) -> None:
    """Writes a PNG with the loss of each step, its moving average, and the validation loss."""
    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # it logs its fonts, also while it is imported
    from matplotlib.figure import Figure

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
    picture = BytesIO()
    figure.savefig(picture, format="png")
    try:
        write_whole(path, picture.getvalue())
    except OSError as error:
        logger.warning("could not write the plot %s: %s", path, error.strerror or error)


def _log_step(values: Values) -> None:
    step, steps = values["step"], values["steps"]
    if step % _LINE_EVERY_STEPS == 0 or step in {1, steps}:
        logger.info("step %d of %d, %s left: %s", step, steps, _duration(values["left_s"]), describe(values))


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes} min {rest:02d} s" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def _means_about(losses: "np.ndarray[Any, np.dtype[np.float64]]", width: int) -> Any:
    """The mean of the finite losses among the last `width` up to each step."""
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
        with suppress(OSError):
            if _is_cut_off(path):
                file.write("\n")
        yield file
    finally:
        with suppress(OSError):  # closing tries again to write what could not be written
            file.close()


def _is_cut_off(path: Path) -> bool:
    """Whether the file's last line has no end, because the disk was full or the machine stopped."""
    if kind_of(path) != stat.S_IFREG:
        return False
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        return file.read() not in (b"", b"\n")


class _JsonLines:
    """Writes a line for each step. On a full disk it stops, and training continues."""

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
    require_extra("tensorboard", "tensorboard", "--tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    try:
        writer = SummaryWriter(str(folder))
    except OSError as error:
        raise StartError(f"can't write {folder}: {error.strerror}; pass another --tensorboard DIR") from error

    failed = False

    def write(values: Mapping[str, Any]) -> None:
        nonlocal failed
        if failed:
            return
        numbers = {f"failures/{cause}": count for cause, count in values["failures"].items()}
        numbers |= {name: value for name, value in values.items() if name not in {"step", "steps"}}
        try:
            for name, value in numbers.items():
                if isinstance(value, int | float):
                    writer.add_scalar(name, value, values["step"])
        except OSError as error:
            failed = True
            logger.warning("no more values in %s: %s", folder, error.strerror or error)

    try:
        yield write
    finally:
        with suppress(OSError):  # closing tries again to write what could not be written
            writer.close()
