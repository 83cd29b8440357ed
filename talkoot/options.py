"""What the commands share: options, and what stands around every command."""

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, get_args, get_origin

import typer
from typer.core import TyperCommand, TyperOption

from peer.errors import InstallationError, UserError
from talkoot.signals import Stopped, StopSignals
from talkoot.terminal import LogFormat, Terminal, set_up_logging

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from peer.settings import RoleSettings

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
State = Annotated[Path | None, typer.Option(metavar="DIR")]
NodeState = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="The node's state folder.  [default: ~/.local/state/talkoot/node]"),
]
TrainedState = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="The trainer's state folder, where its checkpoints are.  [default: ~/.local/state/talkoot/trainer]",
    ),
]
TextField = Annotated[str | None, typer.Option(metavar="NAME")]
WaitForExperts = Annotated[float | None, typer.Option("--wait-for-experts-s", "--wait-for-experts")]
MetricsHost = Annotated[str | None, typer.Option(metavar="A")]
Deny = Annotated[list[str] | None, typer.Option(metavar="PEERID")]
Checkpoint = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Folder of checkpoints, or one of its files.  [default: that of the trainer's newest run]",
    ),
]
Format = Annotated[LogFormat, typer.Option(help="Lines for people, or JSON lines for programs.")]


class SettingsCommand(TyperCommand):
    """A command with options that are settings of its role: what they are stands there, and in their help from there.

    Only who asks a command for its options imports the settings: `talkoot --help` does without.
    """

    @staticmethod
    def role() -> "type[RoleSettings]":
        raise NotImplementedError

    def get_params(self, ctx: Any) -> Any:
        fields = self.role().model_fields
        for option in self.params:
            if option.name in fields and isinstance(option, TyperOption) and option.help is None:
                option.help = help_of(fields[option.name], several=option.multiple)
                option.metavar = option.metavar or "|".join(_choices(fields[option.name].annotation)) or None
        return super().get_params(ctx)


class NodeCommand(SettingsCommand):
    @staticmethod
    def role() -> "type[RoleSettings]":
        from expert_server.settings import NodeSettings

        return NodeSettings


class TrainerCommand(SettingsCommand):
    @staticmethod
    def role() -> "type[RoleSettings]":
        from trainer_client.settings import TrainerSettings

        return TrainerSettings


class DashboardCommand(SettingsCommand):
    @staticmethod
    def role() -> "type[RoleSettings]":
        from talkoot.dashboard.settings import DashboardSettings

        return DashboardSettings


def help_of(field: "FieldInfo", *, several: bool) -> str:
    """What the setting is, and its default: in words, where the value says nothing."""
    assert field.description is not None, "every setting has one"
    text, _, default = field.description.partition("; unset: ")
    if field.default not in (None, ()):
        default = _shown(field.default)
    more = " May be given several times." if several else ""
    return f"{text[0].upper()}{text[1:]}.{more}" + (f"  [default: {default}]" if default else "")


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _choices(kind: Any) -> list[str]:
    """Of a setting that has one of some words, those words."""
    words = get_args(kind) if get_origin(kind) is Literal else ()
    return [*words, *(word for part in get_args(kind) for word in _choices(part))]


def given_settings(options: Mapping[str, Any], role: "type[RoleSettings]") -> dict[str, Any]:
    """Of a command's options those that were given and are settings of its role."""
    return {name: options[name] for name in role.model_fields if options.get(name) not in (None, [])}


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
