"""The commands `service install`, `remove` and `status`."""

from typing import Annotated, Any

import typer

from talkoot.commands.doctor import node_command
from talkoot.options import Join, NodeState, command
from talkoot.terminal import LogFormat

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
def status() -> None:
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
