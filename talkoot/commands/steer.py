"""The commands by which volunteers steer a running node: pause, resume, stop and logs."""

from typing import Annotated

import typer

from talkoot.options import NodeState, command
from talkoot.terminal import LogFormat


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
        from talkoot.node.logs import run_logs

        run_logs(terminal, state, lines, follow=follow)
