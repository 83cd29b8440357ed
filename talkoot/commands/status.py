"""The command `status`."""

from typing import Annotated

import typer

from talkoot.options import Join, command
from talkoot.terminal import LogFormat


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
