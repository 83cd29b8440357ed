"""The command `train`."""

from pathlib import Path
from typing import Annotated

import typer

from talkoot.commands.options import (
    Config,
    Deny,
    Format,
    Join,
    MetricsHost,
    MetricsPort,
    Name,
    State,
    TextField,
    Threads,
    WaitForExperts,
    command,
    given_settings,
)
from talkoot.console import LogFormat

NOT_SETTINGS = ("join", "local", "config", "resume", "json_file", "log_format")
"""Options of the command itself; all others are fields of the role's settings."""


def train(
    *,
    join: Join = None,
    local: Annotated[
        Path | None,
        typer.Option(
            metavar="SWARM.TOML", help="Train this manifest's model in this process alone, without a swarm."
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH",
            help="A text, .jsonl or .parquet file, a folder of them, or a glob in quotes. May be given several times.  "
            "[default: Python's own help]",
        ),
    ] = None,
    field: TextField = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="bytes; bpe, byte pairs learned from the text; or a tokenizer.json.  [default: bytes]",
        ),
    ] = None,
    vocabulary: Annotated[int | None, typer.Option(help="Tokens that bpe learns.  [default: 4096]")] = None,
    steps: Annotated[
        int | None, typer.Option(help="Training steps, those before a resume too.  [default: 200]")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences in a batch.  [default: 8]")] = None,
    accumulate: Annotated[int | None, typer.Option(help="Batches in a step.  [default: 1]")] = None,
    in_flight: Annotated[
        str | None,
        typer.Option(
            metavar="N|auto",
            help="Steps under way at once, or as many as hide the latency of experts.  [default: 1]",
        ),
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Highest step size of the dense part.  [default: 0.002]")
    ] = None,
    weight_decay: Annotated[
        float | None, typer.Option(help="Of the dense part's matrices.  [default: 0.01]")
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(metavar="P", help="Of the dense part's activations: fp32 or bf16.  [default: fp32]"),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="From which batches, noise and dropout are drawn.  [default: this trainer's own]"),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Router, gate and step size that learned best with this kind of experts: transformer or ffn.",
        ),
    ] = None,
    router: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="How tokens find experts: product-key, noisy-top-k, switch, base or glam."
            "  [default: product-key]",
        ),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Experts for each token.  [default: the router's own number]")
    ] = None,
    validate_every: Annotated[
        int | None, typer.Option(help="Steps between validations.  [default: only before and after]")
    ] = None,
    call_deadline_s: Annotated[
        float | None, typer.Option(help="Longest that a call to experts may take.  [default: 10]")
    ] = None,
    grace_s: Annotated[
        float | None, typer.Option(help="Wait for late answers once there are enough.  [default: 0.5]")
    ] = None,
    k_min: Annotated[
        int | None, typer.Option(help="Answers that a token needs before others may be late.  [default: 2]")
    ] = None,
    wait_for_experts_s: WaitForExperts = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Folder of checkpoints.  [default: one for each run, in the state folder]"
        ),
    ] = None,
    average_every: Annotated[
        int | None,
        typer.Option(
            help="Steps between averages with another trainer's dense part; 0: never.  [default: 20]"
        ),
    ] = None,
    average_host: Annotated[
        str | None,
        typer.Option(metavar="A", help="Where other trainers reach this one.  [default: first interface]"),
    ] = None,
    average_port: Annotated[
        int | None, typer.Option(help="TCP port for them.  [default: any free one]")
    ] = None,
    start_from: Annotated[
        str | None,
        typer.Option(
            metavar="swarm|fresh",
            help="Begin a new run with the freshest dense part in the swarm, or anew.  [default: swarm]",
        ),
    ] = None,
    checkpoint_every: Annotated[
        int | None, typer.Option(help="Steps between checkpoints; 0: only at the end.  [default: 100]")
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on from the newest checkpoint, with its settings and data where no others are given.",
        ),
    ] = False,
    log: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Append a JSON line for each step.")
    ] = None,
    tensorboard: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write there what TensorBoard shows.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the loss there at the end, as PNG.")
    ] = None,
    threads: Threads = None,
    metrics_port: MetricsPort = None,
    metrics_host: MetricsHost = None,
    name: Name = None,
    state: State = None,
    deny: Deny = None,
    config: Config = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the summary there, as JSON.")
    ] = None,
    log_format: Format = LogFormat.TEXT,
) -> None:
    """Train a language model on the experts of a swarm."""
    flags = given_settings(locals(), NOT_SETTINGS)
    with command(log_format) as (terminal, signals):
        from talkoot.train.run import run_train

        run_train(terminal, signals, join, local, config, flags, resume=resume, json_file=json_file)
