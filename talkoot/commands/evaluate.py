"""The command `evaluate`."""

from typing import Annotated

import typer

from talkoot.options import Checkpoint, Join, TextField, TrainedState, TrainerCommand, WaitForExperts, command, given_settings
from talkoot.terminal import LogFormat


def evaluate(
    paths: Annotated[list[str], typer.Argument(metavar="FILE", help="Text, as `talkoot train --data`.")],
    *,
    join: Join = None,
    checkpoint: Checkpoint = None,
    field: TextField = None,
    wait_for_experts_s: WaitForExperts = None,
    threads: int | None = None,
    state: TrainedState = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of a table.")
    ] = False,
) -> None:
    """Measure how well a trained model knows a text: loss, perplexity, bits per byte."""
    flags = given_settings(locals(), TrainerCommand.role())
    with command(LogFormat.JSON if as_json else LogFormat.TEXT) as (terminal, signals):
        from talkoot.train.evaluating import run_evaluate

        run_evaluate(terminal, signals, join, paths, flags)
