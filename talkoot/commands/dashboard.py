"""The command `dashboard`."""

from typing import Annotated

import typer

from talkoot.commands.options import Config, Format, Join, State, command
from talkoot.console import LogFormat


def dashboard(
    *,
    join: Join = None,
    host: Annotated[
        str | None, typer.Option(metavar="A", help="Address to listen on.  [default: 127.0.0.1]")
    ] = None,
    port: Annotated[
        int | None, typer.Option(help="TCP port of the page; 0: any free one.  [default: 8080]")
    ] = None,
    state: State = None,
    config: Config = None,
    log_format: Format = LogFormat.TEXT,
) -> None:
    """Show a swarm on a web page, and to Prometheus and other programs."""
    flags = {"host": host, "port": port, "state": state}
    with command(log_format) as (terminal, _):
        from talkoot.dashboard.run import run_dashboard

        run_dashboard(terminal, join, config, flags)
