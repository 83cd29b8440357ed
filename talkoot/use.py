"""The commands that use a trained model: evaluate and generate."""

from pathlib import Path
from typing import Annotated

import typer

from talkoot.console import LogFormat
from talkoot.options import Join, State, TextField, Threads, WaitForExperts, command

_Checkpoint = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Folder of checkpoints, or one of its files.  [default: that of the trainer's newest run]",
    ),
]


def add_to(app: typer.Typer) -> None:
    """Adds them to the command `talkoot`."""
    for each in (generate, evaluate):
        app.command()(each)


def generate(
    *,
    join: Join = None,
    checkpoint: _Checkpoint = None,
    prompt: Annotated[
        str, typer.Option(metavar="TEXT", help="What the text goes on from; - reads standard input.")
    ] = "",
    max_tokens: Annotated[int | None, typer.Option(help="Tokens to generate.  [default: 200]")] = None,
    temperature: Annotated[
        float | None, typer.Option(help="How daring; 0 takes the likeliest always.  [default: 0.8]")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Draw from the k likeliest tokens.  [default: all]")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="Draw from the likeliest that make up this probability.  [default: 1]"),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Equal seeds draw alike.  [default: any]")] = None,
    wait_for_experts_s: WaitForExperts = None,
    threads: Threads = None,
    state: State = None,
) -> None:
    """Print the text that a trained model makes of a prompt, as it comes."""
    flags = {
        "checkpoint": checkpoint,
        "wait_for_experts_s": wait_for_experts_s,
        "threads": threads,
        "state": state,
    }
    sampling = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
    }
    with command(LogFormat.TEXT) as (terminal, signals):
        from talkoot.generate_command import run_generate

        run_generate(terminal, signals, join, prompt, flags, sampling)


def evaluate(
    paths: Annotated[list[str], typer.Argument(metavar="FILE...", help="Text, as `talkoot train --data`.")],
    *,
    join: Join = None,
    checkpoint: _Checkpoint = None,
    field: TextField = None,
    wait_for_experts_s: WaitForExperts = None,
    threads: Threads = None,
    state: State = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of a table.")
    ] = False,
) -> None:
    """Measure how well a trained model knows a text: loss, perplexity, bits per byte."""
    flags = {
        "checkpoint": checkpoint,
        "field": field,
        "wait_for_experts_s": wait_for_experts_s,
        "threads": threads,
        "state": state,
    }
    with command(LogFormat.JSON if as_json else LogFormat.TEXT) as (terminal, signals):
        from talkoot.evaluate_command import run_evaluate

        run_evaluate(terminal, signals, join, paths, flags)
