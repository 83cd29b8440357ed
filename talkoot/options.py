"""What the commands share: options, and what stands around every command."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from peer.errors import UserError
from talkoot.console import LogFormat, Terminal, set_up_logging
from talkoot.signals import Stopped, StopSignals

USER_ERROR_STATUS = 2

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
Name = Annotated[str | None, typer.Option(help="What the swarm's dashboards call you.  [default: no name]")]
MetricsHost = Annotated[
    str | None,
    typer.Option(
        metavar="A",
        help="IP address of /metrics; any but loopback is announced to the swarm.  [default: 127.0.0.1]",
    ),
]
Format = Annotated[LogFormat, typer.Option(help="Lines for people, or JSON lines for programs.")]


@contextmanager
def command(log_format: LogFormat) -> Iterator[tuple[Terminal, StopSignals]]:
    """Around every command: errors of the user in one line, signals as exit status."""
    # torch's threads must not spin while they wait: others need the cores; OpenMP reads this when torch is imported
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
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
