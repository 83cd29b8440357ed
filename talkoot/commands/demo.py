"""The command `demo`."""

from pathlib import Path
from typing import Annotated

import typer

from talkoot.options import command
from talkoot.terminal import LogFormat


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
        from talkoot.demo.scenario import DemoPlan, run_demo
        from talkoot.demo.links import Link

        before = None if link is None else Link.parse(link)
        run_demo(terminal, DemoPlan(nodes, steps, kill, data, link=before), json_file)
