"""What the commands share: options, and what stands around every command."""

import os
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from peer.errors import InstallationError, UserError
from talkoot.console import LogFormat, Terminal, set_up_logging
from talkoot.signals import Stopped, StopSignals

USER_ERROR_STATUS = 2
_OWN = ("peer", "dht", "expert_server", "trainer_client", "talkoot")
"""An import among these that fails is a fault of ours."""

Join = Annotated[
    str | None,
    typer.Option(metavar="INVITE", help="The invite of the swarm, or @FILE with the file that holds it."),
]
Config = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Settings as TOML; the environment is stronger, and options are strongest."
    ),
]
State = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Folder of identity and state; one process at a time uses it."),
]
NodeState = Annotated[Path | None, typer.Option(metavar="DIR", help="The node's state folder.")]
Threads = Annotated[int | None, typer.Option(help="Torch threads.  [default: one for each core]")]
TextField = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="Which field of .jsonl and .parquet files is the text.  [default: text]"
    ),
]
WaitForExperts = Annotated[
    float | None,
    typer.Option(
        "--wait-for-experts-s",
        "--wait-for-experts",
        help="Longest wait, in seconds, while no expert is live.  [default: 60]",
    ),
]
Name = Annotated[str | None, typer.Option(help="What the swarm's dashboards call you.  [default: no name]")]
MetricsPort = Annotated[int | None, typer.Option(help="TCP port of /metrics.  [default: any free one]")]
MetricsHost = Annotated[
    str | None,
    typer.Option(
        metavar="A",
        help="IP address of /metrics; any but loopback is announced to the swarm.  [default: 127.0.0.1]",
    ),
]
Deny = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PEERID",
        help="Have nothing to do with this peer, as with those in the file `denylist` in the state folder. May be "
        "given several times.",
    ),
]
Checkpoint = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Folder of checkpoints, or one of its files.  [default: that of the trainer's newest run]",
    ),
]
Format = Annotated[LogFormat, typer.Option(help="Lines for people, or JSON lines for programs.")]


def given_settings(options: Mapping[str, Any], others: Collection[str]) -> dict[str, Any]:
    """Of a command's options those that were given and are settings of its role, by their fields: all but `others`."""
    return {name: value for name, value in options.items() if name not in others and value not in (None, [])}


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
        _fail(error)
    except ImportError as error:
        if error.name is None or error.name.partition(".")[0] in _OWN:
            raise
        _fail(InstallationError(f"can't import {error.name}: {error}; install Talkoot again"))
    except Stopped as stopped:
        raise typer.Exit(stopped.exit_status) from None
    finally:
        signals.ignore()


def _fail(error: UserError) -> NoReturn:
    print(f"error: {' '.join(str(error).split())} [{error.code}]", file=sys.stderr)  # noqa: T201  # the one line
    raise typer.Exit(USER_ERROR_STATUS) from None
