"""The command `generate`."""

from typing import Annotated

import typer

from talkoot.options import Checkpoint, Join, TrainedState, WaitForExperts, command
from talkoot.terminal import LogFormat


def generate(
    *,
    join: Join = None,
    checkpoint: Checkpoint = None,
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
    threads: int | None = None,
    state: TrainedState = None,
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
        from talkoot.train.generating import run_generate

        run_generate(terminal, signals, join, prompt, flags, sampling)
