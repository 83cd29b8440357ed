"""How `talkoot train` shows its progress: a bar, log lines or JSON lines, and the summary."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.table import Table

from peer.formatting import counted
from talkoot.terminal import Terminal
from talkoot.progress import StepBar

logger = logging.getLogger(__name__)

Values = Mapping[str, Any]
"""A step's figures: those of `Progress`, and of the swarm."""

_LINE_EVERY_STEPS = 10
_COUNTS = frozenset(
    (
        *("resumed_at", "skipped_steps", "hedged_calls", "hedges_won", "repeated_forward", "reselected_rows"),
        *(
            "unanswered_rows",
            "late_backward",
            "spot_checks",
            "differing_answers",
            "odd_answers",
            "wrong_answers",
        ),
        *("skipped_updates", "rollbacks", "averagings", "checkpoint"),
    )
)
"""What many runs have none of."""


@contextmanager
def progress_shown(terminal: Terminal, steps: int, done: int) -> Iterator[Callable[[Values], None]]:
    """Gives the function that shows each step: a bar when somebody watches, else JSON or log lines.

    `done`: steps before this run.
    """
    if terminal.json:
        yield lambda values: terminal.event("step", values)
        return
    if not terminal.live:
        yield _log_step
        return
    with StepBar(console=terminal.err) as bar:
        first = "going on" if done else "validating before the first step"
        task = bar.add_task(first, total=steps, completed=done)
        yield lambda values: bar.update(task, completed=values["step"], description=describe(values))


def describe(values: Values) -> str:
    """A step in one line."""
    failures = ", ".join(f"{count} {cause}" for cause, count in sorted(values["failures"].items()))
    validation = ""
    if values["validation_loss"] is not None:
        validation = (
            f", validation loss {values['validation_loss']:.3f} ({values['bits_per_byte']:.3f} bits per byte, "
            f"perplexity {values['perplexity']:.4g})"
        )
    in_flight = ""
    if values["in_flight"] > 1:
        in_flight = (
            f"{values['in_flight']} steps in flight, gradient {counted(values['staleness'], 'update')} old, "
        )
    averaged = f"averaged {counted(values['averagings'], 'time')}, " if values["averagings"] else ""
    return (
        f"loss {values['loss']:.3f}{validation}, {values['tokens_per_s']:.0f} tokens/s, {in_flight}{averaged}"
        f"{values['experts_live']} of {counted(values['experts_total'], 'expert')} live, {failures or 'no failures'}"
    )


def summary_table(values: Values) -> Table:
    """Counts that are 0 and have nothing to tell are left out."""
    table = Table(title="stopped" if values["stopped"] else "done", show_header=False)
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    for name, value in values.items():
        if name != "stopped" and (name not in _COUNTS or value):
            shown = f"{value:.3f}" if isinstance(value, float) else "not measured" if value is None else value
            if isinstance(value, dict):
                shown = ", ".join(f"{count} {cause}" for cause, count in value.items()) or "none"
            table.add_row(name.replace("_", " "), str(shown))
    return table


def _log_step(values: Values) -> None:
    step, steps = values["step"], values["steps"]
    if step % _LINE_EVERY_STEPS == 0 or step in {1, steps}:
        logger.info("step %d of %d, %s left: %s", step, steps, _duration(values["left_s"]), describe(values))


def _duration(seconds: float) -> str:
    minutes = math.ceil(seconds / 60)
    return (
        f"{seconds:.0f} s" if seconds < 100 else f"{minutes} min" if minutes < 100 else f"{minutes // 60} h"
    )
