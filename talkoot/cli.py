"""The command `talkoot`: the commands in their order, and what it says without one.

The command `dashboard`.

The command `demo`.

The command `doctor`: `node --check` under the name by which it is looked for.

The command `evaluate`.

The command `generate`.

The command `invite`: a founder lets people in, and takes that back.

Imports that last as long as the process: torch and hivemind make a quarter of a million objects.

The command `node`: what volunteers run.

The commands `service install`, `remove` and `status`.

The command `status`.

The commands by which volunteers steer a running node: pause, resume, stop and logs.

The command `train`.
"""

import gc
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from typer.core import TyperGroup

from peer import PROTOCOL_VERSION, SOFTWARE_VERSION
from peer.errors import SettingsError
from talkoot.options import (
    Checkpoint,
    Config,
    DashboardCommand,
    Deny,
    Format,
    Join,
    MetricsHost,
    NodeCommand,
    NodeState,
    State,
    TextField,
    TrainedState,
    TrainerCommand,
    WaitForExperts,
    command,
    given_settings,
)
from talkoot.terminal import LogFormat


def dashboard(
    *,
    join: Join = None,
    host: Annotated[str | None, typer.Option(metavar="A")] = None,
    port: int | None = None,
    state: State = None,
    config: Config = None,
    log_format: Format = LogFormat.TEXT,
) -> None:
    """Show a swarm on a web page, and to Prometheus and other programs."""
    flags = given_settings(locals(), DashboardCommand.role())
    with command(log_format) as (terminal, _):
        from talkoot.dashboard.server import run_dashboard

        run_dashboard(terminal, join, config, flags)


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
            metavar="PATH",
            help="A file or folder of text, as `talkoot train --data`.  [default: Python's own help]",
        ),
    ] = None,
    link: Annotated[
        str | None,
        typer.Option(
            metavar="LINK",
            help="Emulate this link before every node: rate, delay there and back, jitter, lost packets, such as "
            "100mbit,80ms or 20mbit,80ms,5ms,0.1%.  [default: none]",
        ),
    ] = None,
) -> None:
    """Start a swarm on this machine, train on it, kill a node, and watch it go on."""
    with command(LogFormat.TEXT) as (terminal, _):
        from talkoot.demo.links import Link
        from talkoot.demo.scenario import DemoPlan, run_demo

        before = None if link is None else Link.parse(link)
        run_demo(terminal, DemoPlan(nodes, steps, kill, data, link=before), json_file)


def doctor(context: typer.Context) -> None:
    """Check this machine and say what to mend, as `node --check` does; with --join, against a swarm."""
    node = node_command(context)
    with node.make_context("talkoot doctor", ["--check", *context.args]) as checking:
        node.invoke(checking)


def node_command(context: typer.Context) -> Any:
    """`talkoot node`, for those that take its options."""
    return cast(TyperGroup, context.find_root().command).commands["node"]


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
        from talkoot.train.trained import run_evaluate

        run_evaluate(terminal, signals, join, paths, flags)


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
        from talkoot.train.trained import run_generate

        run_generate(terminal, signals, join, prompt, flags, sampling)


def invite(
    *,
    role: Annotated[
        str | None,
        typer.Option(
            metavar="R",
            help="node: hosts experts; trainer: trains; reader: only uses what was trained.  [default: trainer]",
        ),
    ] = None,
    expires: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Until when it holds, such as 12h or 30d.  [default: 30d]"),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Whom it is for: only your list says so.  [default: nobody]")
    ] = None,
    listed: Annotated[
        bool, typer.Option("--list", help="List the invites that you made, instead of making one.")
    ] = False,
    revoke: Annotated[
        str | None, typer.Option(metavar="SERIAL", help="Let nobody in with that one any more.")
    ] = None,
    state: NodeState = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Make an invite for a swarm that you founded, which admits by token. It is a secret until it expires."""
    with command(LogFormat.JSON if as_json else LogFormat.TEXT) as (terminal, _):
        from talkoot.node.invites import InviteRequest, run_invite, run_list, run_revoke

        if listed:
            run_list(terminal, state)
        elif revoke is not None:
            run_revoke(terminal, state, revoke)
        else:
            run_invite(terminal, state, InviteRequest.parse(role, expires, name))


@contextmanager
def imports_without_gc() -> Iterator[None]:
    """No garbage collection looks through what is imported inside, neither meanwhile nor later."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()


NOT_FIT_STATUS = 1


def node(
    *,
    new: Annotated[
        Path | None, typer.Option(metavar="SWARM.TOML", help="Found a swarm with this manifest.")
    ] = None,
    join: Join = None,
    experts: int | None = None,
    spare: int | None = None,
    host: Annotated[str | None, typer.Option(metavar="A")] = None,
    dht_port: int | None = None,
    grpc_port: int | None = None,
    metrics_port: int | None = None,
    metrics_host: MetricsHost = None,
    name: str | None = None,
    state: State = None,
    device: Annotated[str | None, typer.Option(metavar="D")] = None,
    precision: str | None = None,
    threads: int | None = None,
    memory: Annotated[str | None, typer.Option(metavar="SIZE")] = None,
    upload_mbit: float | None = None,
    download_mbit: float | None = None,
    schedule: Annotated[str | None, typer.Option(metavar="HOURS")] = None,
    only_when_idle: Annotated[bool | None, typer.Option("--only-when-idle/--even-when-busy")] = None,
    not_on_battery: Annotated[bool | None, typer.Option("--not-on-battery/--on-battery")] = None,
    niceness: int | None = None,
    announce_every_s: float | None = None,
    drain_timeout_s: Annotated[float | None, typer.Option("--drain-timeout-s", "--drain-timeout")] = None,
    bootstrap: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MULTIADDR", help="Another peer to join the DHT by. May be given several times."
        ),
    ] = None,
    deny: Deny = None,
    config: Config = None,
    invite_file: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Write this node's invite there.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Only check whether this machine can serve: exit status 0 or 1.")
    ] = False,
    cached: Annotated[
        bool, typer.Option("--cached", help="With --check: print what the last check found.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --check: print one JSON object.")] = False,
    log_format: Format = LogFormat.TEXT,
) -> None:
    """Host experts, in a new swarm or in one that you were invited to."""
    flags = given_settings(locals(), NodeCommand.role())
    with command(LogFormat.JSON if as_json else log_format) as (terminal, _):
        with imports_without_gc():
            from talkoot.node.launch import Origin, run_node

        origin = Origin(new, join, tuple(bootstrap or ()))
        if check:
            from talkoot.doctor.examination import run_check

            if not run_check(terminal, origin, config, flags, cached=cached):
                raise typer.Exit(NOT_FIT_STATUS)
            return
        if cached or as_json:
            raise SettingsError("--cached and --json are for --check")
        run_node(terminal, origin, config, flags, invite_file)


service = typer.Typer(
    help="Run a node as a systemd service of this user.", no_args_is_help=True, rich_markup_mode=None
)


@service.command(
    "install",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    options_metavar="[OPTIONS] [NODE OPTIONS]",
)
def install(
    context: typer.Context,
    *,
    join: Join = None,
    state: NodeState = None,
    as_root: Annotated[bool, typer.Option("--as-root", help="Let the node run as root.")] = False,
    print_only: Annotated[
        bool, typer.Option("--print", help="Print the unit file, and install nothing.")
    ] = False,
) -> None:
    """Run a node as a systemd service of this user. All other options go to `talkoot node`."""
    options = _node_options(context)
    with command(LogFormat.TEXT) as (terminal, _):
        from talkoot.node.service import make_service, run_install

        run_install(terminal, make_service(options, join, state), as_root=as_root, print_only=print_only)


@service.command("remove")
def remove() -> None:
    """Stop the service and remove it. The node's checkpoints stay."""
    with command(LogFormat.TEXT) as (terminal, _):
        from talkoot.node.service import run_remove

        run_remove(terminal)


@service.command("status")
def service_status() -> None:
    """Say whether the service runs. Exit status 1 when it does not."""
    with command(LogFormat.TEXT) as (terminal, _):
        from talkoot.node.service import run_status

        if not run_status(terminal):
            raise typer.Exit(1)


def _node_options(context: typer.Context) -> dict[str, Any]:
    """The options of `talkoot node` that were given, checked as it would: values by their flags, True for switches."""
    node = node_command(context)
    parsed = node.make_context("talkoot node", list(context.args))
    given: dict[str, Any] = {}
    for parameter in node.params:
        name = parameter.name or ""
        source = parsed.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            value = parsed.params[name]
            flags = parameter.secondary_opts if value is False else parameter.opts
            given[flags[0]] = value is False or value
    return given


def status(
    *,
    join: Join = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Look again and again, until Ctrl-C.")] = False,
) -> None:
    """List the nodes, trainers and experts of a swarm."""
    with command(LogFormat.JSON if as_json else LogFormat.TEXT) as (terminal, _):
        from talkoot.status import run_status

        run_status(terminal, join, watch)


def pause(
    *,
    duration: Annotated[
        str | None,
        typer.Option("--for", metavar="TIME", help="Resume by itself after that, such as 30m, 2h or 1d."),
    ] = None,
    state: NodeState = None,
) -> None:
    """Let a running node host nothing, until resumed or restarted."""
    with command(LogFormat.TEXT) as (terminal, _):
        from talkoot.node.remote import run_pause

        run_pause(terminal, state, duration)


def resume(*, state: NodeState = None) -> None:
    """Let a paused node go on."""
    with command(LogFormat.TEXT) as (terminal, _):
        from talkoot.node.remote import run_resume

        run_resume(terminal, state)


def stop(
    *,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Wait until the node has left and its process is gone.")
    ] = True,
    state: NodeState = None,
) -> None:
    """Let a running node leave its swarm in order, and end."""
    with command(LogFormat.TEXT) as (terminal, _):
        from talkoot.node.remote import run_stop

        run_stop(terminal, state, wait=wait)


def logs(
    *,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Print new lines as they come, until Ctrl-C.")
    ] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="How many of the last lines.")] = 100,
    state: NodeState = None,
) -> None:
    """Print what a node logged, whether it runs or not."""
    with command(LogFormat.TEXT) as (terminal, _):
        from talkoot.node.remote import run_logs

        run_logs(terminal, state, lines, follow=follow)


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
        with imports_without_gc():
            from talkoot.train.session import run_train

        run_train(terminal, signals, join, local, config, flags, resume=resume, json_file=json_file)


WELCOME = """\
Neighbours train a large neural network together. There are three things you can do:

  talkoot node --join INVITE        run a node, which hosts experts on this machine
  talkoot train --join INVITE       train a model on the experts of a swarm
  talkoot dashboard --join INVITE   watch a swarm on a web page

An invite is one line that somebody gives you. Without one:

  talkoot demo                      see a whole swarm work on this machine
  talkoot doctor                    check whether this machine can take part
  talkoot node --new SWARM.TOML     found a swarm

`talkoot --help` lists all commands."""

app = typer.Typer(
    help="Volunteers host experts; trainers train a language model on them.",
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main() -> None:
    """The console entry. Ends the process as soon as the command has ended.

    All that a command opened it has closed by then. Python's own end takes a second and more, when torch is there, and
    threads of gRPC run on in it.
    """
    try:
        app()
    except SystemExit as end:
        if end.code is not None and not isinstance(end.code, int):
            raise
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):  # whoever read it has gone
                stream.flush()
        os._exit(end.code or 0)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"talkoot {SOFTWARE_VERSION}, protocol version {PROTOCOL_VERSION}")
        raise typer.Exit


@app.callback()
def _talkoot(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_print_version, help="Print software and protocol version."
        ),
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(WELCOME)


app.command(cls=NodeCommand)(node)
app.command(cls=TrainerCommand)(train)
app.command()(status)
app.command(cls=DashboardCommand)(dashboard)
app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    options_metavar="[NODE OPTIONS]",
)(doctor)
app.command()(demo)
app.command(cls=TrainerCommand)(generate)
app.command(cls=TrainerCommand)(evaluate)
app.command()(pause)
app.command()(resume)
app.command()(stop)
app.command()(logs)
app.add_typer(service, name="service")
app.command()(invite)


if __name__ == "__main__":
    main()
