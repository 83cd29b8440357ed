"""The command `train`."""

from pathlib import Path
from typing import Annotated

import typer

from talkoot.options import Config, Deny, Format, Join, MetricsHost, State, TextField, TrainerCommand, WaitForExperts, command, given_settings
from talkoot.terminal import LogFormat
from talkoot.lasting import lasting_imports


def train(
    *,
    join: Join = None,
    local: Annotated[
        Path | None,
        typer.Option(
            metavar="SWARM.TOML", help="Train this manifest's model in this process alone, without a swarm."
        ),
    ] = None,
    data: Annotated[list[str] | None, typer.Option(metavar="PATH")] = None,
    field: TextField = None,
    tokenizer: Annotated[str | None, typer.Option(metavar="NAME")] = None,
    vocabulary: int | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    accumulate: int | None = None,
    in_flight: Annotated[str | None, typer.Option(metavar="N|auto")] = None,
    learning_rate: float | None = None,
    weight_decay: float | None = None,
    precision: str | None = None,
    seed: int | None = None,
    preset: str | None = None,
    router: str | None = None,
    top_k: int | None = None,
    validate_every: int | None = None,
    call_deadline_s: float | None = None,
    grace_s: float | None = None,
    k_min: int | None = None,
    wait_for_experts_s: WaitForExperts = None,
    checkpoint: Annotated[Path | None, typer.Option(metavar="DIR")] = None,
    average_every: int | None = None,
    average_host: Annotated[str | None, typer.Option(metavar="A")] = None,
    average_port: int | None = None,
    start_from: str | None = None,
    checkpoint_every: int | None = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on from the newest checkpoint, with its settings and data where no others are given.",
        ),
    ] = False,
    log: Annotated[Path | None, typer.Option(metavar="FILE")] = None,
    tensorboard: Annotated[Path | None, typer.Option(metavar="DIR")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE")] = None,
    threads: int | None = None,
    metrics_port: int | None = None,
    metrics_host: MetricsHost = None,
    name: str | None = None,
    state: State = None,
    deny: Deny = None,
    config: Config = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the summary there, as JSON.")
    ] = None,
    log_format: Format = LogFormat.TEXT,
) -> None:
    """Train a language model on the experts of a swarm."""
    flags = given_settings(locals(), TrainerCommand.role())
    with command(log_format) as (terminal, signals):
        with lasting_imports():
            from talkoot.train.session import run_train

        run_train(terminal, signals, join, local, config, flags, resume=resume, json_file=json_file)
