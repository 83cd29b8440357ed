"""The commands by which volunteers steer a running node, and make it a service."""

from typing import Annotated, Any, cast

import typer
from typer.core import TyperGroup

from talkoot.console import LogFormat
from talkoot.options import Join, NodeState, State, command

_service = typer.Typer(
    help="Run a node as a systemd service of this user.", no_args_is_help=True, rich_markup_mode=None
)


def add_to(app: typer.Typer) -> None:
    """Adds them to the command `talkoot`."""
    for each in (pause, resume, stop, logs):
        app.command()(each)
    app.add_typer(_service, name="service")


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
        from talkoot.steer_command import run_pause

        run_pause(terminal, state, duration)


def resume(*, state: NodeState = None) -> None:
    """Let a paused node go on."""
    with command(LogFormat.TEXT) as (terminal, _):
        from talkoot.steer_command import run_resume

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
        from talkoot.steer_command import run_stop

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
        from talkoot.logs_command import run_logs

        run_logs(terminal, state, lines, follow=follow)


@_service.command(
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
    options = _node_options(context)
    with command(LogFormat.TEXT) as (terminal, _):
        from talkoot.service_command import make_service, run_install

        run_install(terminal, make_service(options, join, state), as_root=as_root, print_only=print_only)


@_service.command("remove")
def service_remove() -> None:
    """Stop the service and remove it. The node's checkpoints stay."""
    with command(LogFormat.TEXT) as (terminal, _):
        from talkoot.service_command import run_remove

        run_remove(terminal)


@_service.command("status")
def service_status() -> None:
    """Say whether the service runs. Exit status 1 when it does not."""
    with command(LogFormat.TEXT) as (terminal, _):
        from talkoot.service_command import run_status

        if not run_status(terminal):
            raise typer.Exit(1)


def node_command(context: typer.Context) -> Any:
    """`talkoot node`, for those that take its options."""
    return cast(TyperGroup, context.find_root().command).commands["node"]


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
