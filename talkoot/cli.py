"""The command `talkoot`. What is slow to import is imported inside the commands, so that --help is instant."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, cast

import typer
import typer.main
from typer.core import TyperGroup

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

service = typer.Typer(
    help="Run a node as a systemd service of this user.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(service, name="service")

Join = Annotated[str | None, typer.Option(metavar="INVITE", help="The invite of the swarm to join.")]
Config = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Settings as TOML; flags are stronger, then the environment."),
]
State = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Folder of identity and state; one process at a time uses it."),
]
NodeState = Annotated[Path | None, typer.Option(metavar="DIR", help="The node's state folder.")]
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


@app.command()
def pause(
    *,
    duration: Annotated[
        str | None,
        typer.Option("--for", metavar="TIME", help="Resume by itself after that, such as 30m, 2h or 1d."),
    ] = None,
    state: NodeState = None,
) -> None:
    """Let a running node host nothing until it is resumed, or restarted."""
    with _command(LogFormat.TEXT) as (terminal, _):
        from talkoot.steer_command import run_pause

        run_pause(terminal, state, duration)


@app.command()
def resume(*, state: NodeState = None) -> None:
    """Let a paused node go on."""
    with _command(LogFormat.TEXT) as (terminal, _):
        from talkoot.steer_command import run_resume

        run_resume(terminal, state)


@app.command()
def stop(
    *,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Wait until the node has left and its process is gone.")
    ] = True,
    state: NodeState = None,
) -> None:
    """Let a running node leave its swarm in order, and end."""
    with _command(LogFormat.TEXT) as (terminal, _):
        from talkoot.steer_command import run_stop

        run_stop(terminal, state, wait=wait)


@app.command()
def logs(
    *,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Print new lines as they come, until Ctrl-C.")
    ] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="How many of the last lines.")] = 100,
    state: NodeState = None,
) -> None:
    """Print what a node logged, whether it runs or not."""
    with _command(LogFormat.TEXT) as (terminal, _):
        from talkoot.logs_command import run_logs

        run_logs(terminal, state, lines, follow=follow)


@service.command(
    "install",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    options_metavar="[OPTIONS] [NODE OPTIONS]",
)
def service_install(
    context: typer.Context,
    *,
    join: Join = None,
    state: State = None,
    as_root: Annotated[bool, typer.Option("--as-root", help="Let the node run as root.")] = False,
    print_only: Annotated[
        bool, typer.Option("--print", help="Print the unit file, and install nothing.")
    ] = False,
) -> None:
    """Run a node as a systemd service of this user. All other options go to `talkoot node`."""
    options = _node_options(context.args)
    with _command(LogFormat.TEXT) as (terminal, _):
        from talkoot.service_command import make_service, run_install

        run_install(terminal, make_service(options, join, state), as_root=as_root, print_only=print_only)


@service.command("remove")
def service_remove() -> None:
    """Stop the service and remove it. The node's checkpoints stay."""
    with _command(LogFormat.TEXT) as (terminal, _):
        from talkoot.service_command import run_remove

        run_remove(terminal)


@service.command("status")
def service_status() -> None:
    """Say whether the service runs. Exit status 1 when it does not."""
    with _command(LogFormat.TEXT) as (terminal, _):
        from talkoot.service_command import run_status

        if not run_status(terminal):
            raise typer.Exit(1)


def _node_options(arguments: list[str]) -> dict[str, Any]:
    """The options of `talkoot node` that were given, checked as it would: values by their flags, True for switches."""
    command = cast(TyperGroup, typer.main.get_command(app)).commands["node"]
    context = command.make_context("node", list(arguments))
    given: dict[str, Any] = {}
    for parameter in command.params:
        source = context.get_parameter_source(parameter.name or "")
        if source is None or source.name != "COMMANDLINE":
            continue
        value = context.params[parameter.name or ""]
        flags = parameter.secondary_opts if value is False else parameter.opts
        given[flags[0]] = value is False or value
    return given


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
