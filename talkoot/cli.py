"""The command `talkoot`. What is slow to import is imported inside the commands, so that --help is instant."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from peer import PROTOCOL_VERSION, SOFTWARE_VERSION
from peer.errors import UserError
from talkoot.console import LogFormat, Terminal, set_up_logging
from talkoot.signals import Stopped, StopSignals

USER_ERROR_STATUS = 2

app = typer.Typer(
    help="Volunteers host experts; trainers train a language model on them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Join = Annotated[str | None, typer.Option(metavar="INVITE", help="The invite of the swarm to join.")]
Config = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Settings as TOML; flags are stronger, then the environment."),
]
State = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Folder of identity and state; one process at a time uses it."),
]
Threads = Annotated[int | None, typer.Option(help="Torch threads.  [default: one for each core]")]
Format = Annotated[LogFormat, typer.Option(help="Lines for people, or JSON lines for programs.")]


def main() -> None:
    """The console entry."""
    app()


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"talkoot {SOFTWARE_VERSION}, protocol version {PROTOCOL_VERSION}")
        raise typer.Exit


@app.callback()
def _talkoot(
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_print_version, help="Print software and protocol version."
        ),
    ] = False,
) -> None:
    pass


@app.command()
def node(
    *,
    new: Annotated[
        Path | None, typer.Option(metavar="SWARM.TOML", help="Found a swarm with this manifest.")
    ] = None,
    join: Join = None,
    experts: Annotated[
        int | None, typer.Option(help="Experts to host.  [default: a quarter of the free memory]")
    ] = None,
    spare: Annotated[
        int | None,
        typer.Option(help="Experts to adopt beyond those when their host has gone.  [default: half as many]"),
    ] = None,
    host: Annotated[
        str | None,
        typer.Option(
            metavar="A", help="IP address to listen on and announce.  [default: this machine's first]"
        ),
    ] = None,
    dht_port: Annotated[
        int | None, typer.Option(help="TCP port of the DHT.  [default: any free one]")
    ] = None,
    grpc_port: Annotated[
        int | None, typer.Option(help="TCP port of the expert service.  [default: any free one]")
    ] = None,
    metrics_port: Annotated[
        int | None, typer.Option(help="TCP port of /metrics, on loopback.  [default: any free one]")
    ] = None,
    state: State = None,
    threads: Threads = None,
    announce_every_s: Annotated[
        float | None, typer.Option(help="Seconds between announcements.  [default: 10]")
    ] = None,
    drain_timeout_s: Annotated[
        float | None,
        typer.Option(
            "--drain-timeout",
            help="Longest that it waits, when it leaves, for others to take its experts over, in seconds.  "
            "[default: 30]",
        ),
    ] = None,
    bootstrap: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MULTIADDR", help="Another peer to join the DHT by. May be given several times."
        ),
    ] = None,
    config: Config = None,
    invite_file: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Write this node's invite there.")
    ] = None,
    log_format: Format = LogFormat.TEXT,
) -> None:
    """Host experts, in a new swarm or in one that you were invited to."""
    flags = {
        "experts": experts,
        "spare": spare,
        "host": host,
        "dht_port": dht_port,
        "grpc_port": grpc_port,
        "metrics_port": metrics_port,
        "state": state,
        "threads": threads,
        "announce_every_s": announce_every_s,
        "drain_timeout_s": drain_timeout_s,
    }
    with _command(log_format) as (terminal, _):
        from talkoot.node_command import Origin, run_node

        origin = Origin(new, join, tuple(bootstrap or ()))
        run_node(terminal, origin, config, flags, invite_file)


@app.command()
def train(
    *,
    join: Join = None,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH", help="A text file, or a folder of .txt files.  [default: Python's own help]"
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps.  [default: 200]")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences in a step.  [default: 8]")] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Highest step size of the dense part.  [default: 0.002]")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="From which batches are drawn.  [default: this trainer's own]")
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
    threads: Threads = None,
    state: State = None,
    config: Config = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the summary there, as JSON.")
    ] = None,
    log_format: Format = LogFormat.TEXT,
) -> None:
    """Train a language model on the experts of a swarm."""
    flags = {
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "seed": seed,
        "validate_every": validate_every,
        "call_deadline_s": call_deadline_s,
        "grace_s": grace_s,
        "k_min": k_min,
        "threads": threads,
        "state": state,
    }
    with _command(log_format) as (terminal, signals):
        from talkoot.train_command import run_train

        run_train(terminal, signals, join, data, config, flags, json_file)


@app.command()
def status(
    *,
    join: Join = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """List the nodes and experts of a swarm."""
    with _command(LogFormat.JSON if as_json else LogFormat.TEXT) as (terminal, _):
        from talkoot.status import run_status

        run_status(terminal, join)


@app.command()
def demo(
    *,
    nodes: Annotated[int, typer.Option(min=1, max=16, help="Nodes to start.")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 180,
    kill: Annotated[bool, typer.Option("--kill/--no-kill", help="Kill a node half-way.")] = True,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write what was measured there, as JSON.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH", help="A text file, or a folder of .txt files.  [default: Python's own help]"
        ),
    ] = None,
) -> None:
    """Start a swarm on this machine, train on it, kill a node, and watch it go on."""
    with _command(LogFormat.TEXT) as (terminal, _):
        from talkoot.demo import DemoPlan, run_demo

        run_demo(terminal, DemoPlan(nodes, steps, kill, data), json_file)


@contextmanager
def _command(log_format: LogFormat) -> Iterator[tuple[Terminal, StopSignals]]:
    """Around every command: errors of the user in one line, signals as exit status."""
    signals = StopSignals()
    terminal = Terminal(log_format)
    try:
        set_up_logging(terminal)
        yield terminal, signals
    except UserError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)  # noqa: T201  # the one line
        raise typer.Exit(USER_ERROR_STATUS) from None
    except Stopped as stopped:
        raise typer.Exit(stopped.exit_status) from None
    finally:
        signals.ignore()


if __name__ == "__main__":
    main()
