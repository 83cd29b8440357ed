"""The command `talkoot`: the commands in their order, and what it says without one."""

import logging
import os
import sys
from contextlib import suppress
from typing import Annotated

import typer

from peer import PROTOCOL_VERSION, SOFTWARE_VERSION
from talkoot.commands.dashboard import dashboard
from talkoot.commands.demo import demo
from talkoot.commands.doctor import doctor
from talkoot.commands.evaluate import evaluate
from talkoot.commands.generate import generate
from talkoot.commands.invite import invite
from talkoot.commands.node import node
from talkoot.options import DashboardCommand, NodeCommand, TrainerCommand
from talkoot.commands.service import service
from talkoot.commands.status import status
from talkoot.commands.steer import logs, pause, resume, stop
from talkoot.commands.train import train

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
