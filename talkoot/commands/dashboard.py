"""The command `dashboard`."""

from typing import Annotated

import typer

from talkoot.options import Config, DashboardCommand, Format, Join, State, command, given_settings
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
