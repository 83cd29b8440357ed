"""The commands' options: those of their settings, made from the settings models, and those that several commands share.

Settings are imported only when a command is asked for its options, so that `talkoot --help` is instant.
"""

import os
import re
import shlex
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from functools import cached_property
from inspect import Parameter, Signature
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Literal,
    NoReturn,
    TypeVar,
    Union,
    get_args,
    get_origin,
)

import typer
from typer.core import TyperCommand, TyperGroup

from peer.errors import InstallationError, SettingsError, UserError
from peer.platform.signals import ask_to_stop
from talkoot.signals import Stopped, StopSignals
from talkoot.terminal import LogFormat, Terminal, escaped, results_not_written, set_up_logging

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from peer.settings import RoleSettings

Settings = TypeVar("Settings", bound="RoleSettings")


Join = Annotated[
    str | None,
    typer.Option(metavar="INVITE", help="The swarm's invite, or @FILE that contains it."),
]
Bootstrap = Annotated[
    list[str] | None,
    typer.Option(
        metavar="ADDRESS",
        help="Another node to join through: address or invite.",
    ),
]
Config = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Settings in TOML. Environment variables override the file, and options override both.",
    ),
]
NodeState = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="The node's state folder.  [default: ~/.local/state/talkoot/node]"),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Format = Annotated[
    LogFormat, typer.Option(metavar="text|json", help="Lines for people, or JSON lines for programs.")
]

_FLAGS = {
    "drain_timeout_s": "--drain-timeout",
    "wait_for_experts_s": "--wait-for-experts",
    "only_when_idle": "--only-when-idle/--even-when-busy",
    "not_on_battery": "--not-on-battery/--on-battery",
}
"""Flags other than a setting's own name. A switch has only these."""
_METAVARS = {
    **dict.fromkeys(("state", "checkpoint", "tensorboard"), "DIR"),
    **dict.fromkeys(("log", "plot", "denylist"), "FILE"),
    **dict.fromkeys(("name", "field", "tokenizer", "model_name"), "NAME"),
    "data": "PATH",
    "deny": "PEERID",
    "device": "DEVICE",
    "in_flight": "N|auto",
    **dict.fromkeys(("memory", "memory_disk"), "SIZE"),
    "schedule": "HOURS",
}
_METAVARS_BY_ENDING = {
    "host": "ADDRESS",
    "_file": "FILE",
    "port": "PORT",
    "_s": "SECONDS",
    "_mbit": "MBIT/S",
    "_bytes": "BYTES",
}
_METAVARS_BY_TYPE = {int: "N", float: "X", Path: "PATH"}
_FIRST_COLUMN = 26
"""The width of the options column in the help. The text of a wider option begins on the next line."""


_JOINED = f"{__name__}.joined"

_UsageError: type[Exception] = typer.BadParameter.__mro__[1]
"""The base of all errors about a command line. typer exports only this one of its subclasses."""


class _WrongCommandLine(typer.BadParameter):
    """A command line that can't be understood, reported in one line like other user errors."""

    def show(self, file: Any = None) -> None:
        print(_error_line(SettingsError(self.message)), file=file or sys.stderr)


class PlainCommand(TyperCommand):
    """A command whose help and errors are for people: without Python's types and inequalities.

    If it has `--join` without a `--bootstrap` of its own, it gets one: `join` is then an invite with these addresses.
    """

    @cached_property
    def _bootstrap(self) -> Any:
        """The added option; None: there is none."""
        names = {parameter.name for parameter in self.params}
        return _bootstrap_option() if "join" in names and "bootstrap" not in names else None

    def get_params(self, ctx: Any) -> list[Any]:
        params: list[Any] = []
        for parameter in super().get_params(ctx):
            params.append(parameter)
            if parameter.name == "join" and self._bootstrap is not None:
                params.append(self._bootstrap)
        return params

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        rest = self._parse_args(ctx, args)
        if self._bootstrap is not None:
            join, given = ctx.params["join"], ctx.params.pop("bootstrap", None) or ()
            ctx.meta[_JOINED] = _join_options(join, given)
            if given:
                ctx.params["join"] = _joined_through(join, given)
        return rest

    def _parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            with printing():
                return super().parse_args(ctx, args)
        except _UsageError as error:
            from pydantic import ValidationError

            from peer.settings import describe_problems

            param = getattr(error, "param", None)
            if not isinstance(error.__cause__, ValidationError) or param is None:
                raise _in_one_line(error, ctx) from error
            flag = (param.opts or [param.name])[0]
            raise _WrongCommandLine(describe_problems(flag, error.__cause__.errors())) from error

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return [re.sub(r"[{}]", "", piece) for piece in super().collect_usage_pieces(ctx)]

    def help_records(self, ctx: Any) -> "dict[str, tuple[str, str]]":
        """The help of each argument and option, by its name."""
        records = {parameter.name: parameter.get_help_record(ctx) for parameter in self.get_params(ctx)}
        return {name: _in_words(record) for name, record in records.items() if record is not None}

    def format_options(self, ctx: Any, formatter: Any) -> None:
        records = self.help_records(ctx)
        arguments = {parameter.name for parameter in self.get_params(ctx)} & {
            parameter.name for parameter in self.params if parameter.param_type_name == "argument"
        }
        for heading, wanted in (("Arguments", True), ("Options", False)):
            if rows := [record for name, record in records.items() if (name in arguments) is wanted]:
                with formatter.section(heading):
                    formatter.write_dl(rows, col_max=_FIRST_COLUMN)


def _bootstrap_option() -> Any:
    def joined(bootstrap: Bootstrap = None) -> None:
        """A function with the option, which typer reads."""

    return _options_of(joined)[0]


def _joined_through(join: str | None, bootstrap: Sequence[str]) -> str:
    """The invite with these addresses, as text. Ends the process with one line if one of them is not valid."""
    from dht.invites import invite_of, read_bootstrap

    try:
        return str(invite_of(join).through(read_bootstrap(bootstrap)))
    except UserError as error:
        _fail(error)


def _join_options(join: str | None, bootstrap: Sequence[str]) -> str:
    shown = join if join is not None and join.startswith("@") else "INVITE"
    through = ("ADDRESS" if each.startswith("talkoot") else each for each in bootstrap)
    return " ".join(
        [f"--join {shlex.quote(shown)}", *(f"--bootstrap {shlex.quote(each)}" for each in through)]
    )


def join_options(context: typer.Context) -> str:
    """The `--join` and `--bootstrap` that were given, to be typed again. Invites that were given as text are not shown,
    because they may contain a secret.
    """
    options: str = context.meta[_JOINED]
    return options


def _options_of(function: Any) -> list[Any]:
    """The options that typer makes of a function's signature."""
    app = typer.Typer(add_completion=False)
    app.command()(function)
    return list(typer.main.get_command(app).params)


def _in_one_line(error: Any, ctx: Any) -> _WrongCommandLine:
    if similar := getattr(error, "possibilities", None):
        shown = {
            flag
            for parameter in ctx.command.get_params(ctx)
            if not getattr(parameter, "hidden", False)  # a removed one
            for flag in (*parameter.opts, *parameter.secondary_opts)
        }
        wanted = error.option_name.lstrip("-")  # with their dashes, short options all look alike
        error.possibilities = [
            each for each in similar if each in shown and get_close_matches(wanted, [each.lstrip("-")])
        ]
    message = error.format_message().rstrip(".")
    see = " See" if message.endswith("?") else "; see"
    return _WrongCommandLine(f"{message}{see} `{ctx.command_path} --help`")


def _in_words(record: tuple[str, str]) -> tuple[str, str]:
    option, text = record
    option = re.sub(r" <[^>]*>", "", option)
    if "/" not in option:  # if an option has two names, the shorter
        *names, last = option.split(", ")
        flag, *metavar = last.split(" ")
        longer = [name for name in names if name.startswith(flag)]
        option = ", ".join([*(name for name in names if name not in longer), " ".join([flag, *metavar])])
    text = re.sub(r"(; |  \[)(-?[\d.]+)<=x<=(-?[\d.]+)\]", _from_to, text)
    return option, re.sub(r"(; |  \[)x>=-?[\d.]+\]", lambda match: "]" if match[1] == "; " else "", text)


def _from_to(match: re.Match[str]) -> str:
    least, most = (f"{float(bound):g}" for bound in match.groups()[1:])
    return f"{match[1]}from {least} to {most}]"


class GroupedCommands(TyperGroup):
    """A group of commands. Its help lists them under headings, each with its whole summary."""

    sections: ClassVar[Mapping[str, Sequence[str]]] = {}
    """Headings, each with the names of its commands; if empty, there is one heading."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        is_help = not args and self.no_args_is_help
        try:
            with printing():
                return super().parse_args(ctx, args)
        except _UsageError as error:
            if is_help:
                raise
            raise _in_one_line(error, ctx) from error

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        try:
            return super().resolve_command(ctx, args)
        except _UsageError as error:
            raise _in_one_line(error, ctx) from error

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        width = max(len(name) for name in self.commands)
        for heading, names in (self.sections or {"Commands": tuple(self.commands)}).items():
            with formatter.section(heading):
                rows = [(name.ljust(width), _summary(self.commands[name])) for name in names]
                formatter.write_dl(rows)


def _summary(command: Any) -> str:
    """The first sentence of its help, uncut."""
    return re.split(r"\.(?:\s|$)", " ".join((command.help or "").split()))[0]


class SettingsCommand(PlainCommand):
    """A command that has settings as options, in addition to its function's parameters.

    Every setting of its roles is an option. `load_settings` reads the given values.
    """

    sections: ClassVar[Mapping[str, Sequence[str]]]
    """The contents of `--help`: headings, each with the names of settings and of the function's parameters.

    Other options are accepted too.
    """

    @staticmethod
    def roles() -> "Mapping[type[RoleSettings], Collection[str]]":
        """The settings models, and which of their settings are options."""
        raise NotImplementedError

    changed_help: ClassVar[Mapping[str, str]] = {}
    """The help of settings that mean something else in this command. `{default}` stands for that of the setting."""

    @cached_property
    def _setting_options(self) -> list[Any]:
        options = [option for role, names in self.roles().items() for option in make_options(role, names)]
        for option in options:
            if (text := self.changed_help.get(option.name)) is not None:
                _, mark, default = option.help.partition("  [default: ")
                option.help = text.format(default=mark + default)
        return options

    def get_params(self, ctx: Any) -> list[Any]:
        return [*self._setting_options, *super().get_params(ctx)]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Moves the settings' values from the function's arguments to the context."""
        rest = super().parse_args(ctx, args)
        values = {option.name: ctx.params.pop(option.name, None) for option in self._setting_options}
        given = {name: value for name, value in values.items() if value not in (None, [], ())}
        ctx.meta[__name__] = {
            role: {name: given[name] for name in names if name in given}
            for role, names in self.roles().items()
        }
        return rest

    def format_options(self, ctx: Any, formatter: Any) -> None:
        records = self.help_records(ctx)
        *_, last = self.sections
        for heading, names in self.sections.items():
            rows = [records[name] for name in (*names, *(["help"] if heading == last else []))]
            with formatter.section(heading):
                formatter.write_dl(
                    [(option.ljust(_FIRST_COLUMN), text) for option, text in rows], col_max=_FIRST_COLUMN
                )


def load_settings(context: typer.Context, role: type[Settings]) -> Settings:
    """Reads settings from a command's options, the environment and its `--config`. Raises SettingsError."""
    return role.load(context.params.get("config"), **given_settings(context, role))


def given_settings(context: Any, role: "type[RoleSettings]") -> dict[str, Any]:
    """The settings that were given as options of a SettingsCommand."""
    given: dict[str, Any] = context.meta[__name__][role]
    return given


def make_options(role: "type[RoleSettings]", names: Collection[str]) -> list[Any]:
    """Options for a role's settings: flag, type and help come from the field."""
    parameters = [
        Parameter(
            name,
            Parameter.KEYWORD_ONLY,
            default=None,
            annotation=_annotation(name, role.model_fields.get(name)),
        )
        for name in names
    ]

    def settings(**values: Any) -> None:
        """A function with the options as its signature, which typer reads."""

    settings.__signature__ = Signature(parameters)  # type: ignore[attr-defined]  # functions may have one
    return _options_of(settings)


def _annotation(name: str, field: "FieldInfo | None") -> Any:
    """`field`: None for a removed setting, whose value is ignored."""
    flag = f"--{name.replace('_', '-')}"
    if field is None:
        return Annotated[
            str | None, typer.Option(flag, hidden=True, help="No longer exists, and is ignored.")
        ]
    kind = _value_type(field)
    if kind is bool:
        flags = [_FLAGS.get(name, f"{flag}/--no-{flag.removeprefix('--')}")]
    else:
        flags = [flag, *([_FLAGS[name]] if name in _FLAGS else [])]
    option = typer.Option(
        *flags,
        help=help_of(field, several=get_origin(kind) is list),
        metavar=None if kind is bool else _metavar(name, field, kind),
    )
    return Annotated[kind | None, option]


def _value_type(field: "FieldInfo") -> Any:
    """The type that the command line parses. Other types are parsed as text, which the settings model then reads."""
    from pydantic import BeforeValidator

    kinds = [kind for kind in _alternatives(field.annotation) if kind is not NoneType]
    if get_origin(kinds[0]) is tuple:
        return list[str]
    if any(isinstance(each, BeforeValidator) for each in field.metadata):
        return str
    return kinds[0] if len(kinds) == 1 and kinds[0] in (bool, int, float, Path) else str


def _metavar(name: str, field: "FieldInfo", kind: Any) -> str:
    if choices := _choices(field):
        return "|".join(choices)
    # for a trainer, not for a node's machine
    if name == "memory" and str in _alternatives(field.annotation):
        return "NAME"
    by_ending = (word for ending, word in _METAVARS_BY_ENDING.items() if name.endswith(ending))
    return _METAVARS.get(name) or next(by_ending, None) or _METAVARS_BY_TYPE.get(kind, "TEXT")


def _choices(field: "FieldInfo") -> list[str]:
    """The allowed words, if a setting can only be one of some words."""
    kinds = [kind for kind in _alternatives(field.annotation) if kind is not NoneType]
    return list(get_args(kinds[0])) if len(kinds) == 1 and get_origin(kinds[0]) is Literal else []


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def help_of(field: "FieldInfo", *, several: bool) -> str:
    """The setting's help and its default, which is in words if the value itself says nothing."""
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


class NodeCommand(SettingsCommand):
    sections: ClassVar[Mapping[str, Sequence[str]]] = {
        "Swarm": ("join", "new", "bootstrap", "invite_file", "name"),
        "Resources": (
            "experts",
            "memory",
            "memory_disk",
            "device",
            "threads",
            "upload_mbit",
            "download_mbit",
        ),
        "When to work": ("schedule", "only_when_idle", "not_on_battery", "niceness"),
        "Network": ("host", "port", "announce_host", "relay_mbit"),
        "Settings and output": ("state", "config", "check", "log_format"),
    }

    @staticmethod
    def roles() -> "Mapping[type[RoleSettings], Collection[str]]":
        from expert_server.settings import NodeSettings

        return {NodeSettings: _all_settings(NodeSettings)}


class DoctorCommand(NodeCommand):
    """`talkoot doctor`, which is `talkoot node --check` with its own help."""

    sections: ClassVar[Mapping[str, Sequence[str]]] = {
        "Swarm": ("join", "new", "bootstrap"),
        "Resources": ("experts", "memory", "device", "precision", "threads"),
        "Network": ("host", "port", "metrics_port"),
        "Settings and output": ("state", "config", "cached", "as_json"),
    }

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        rest = super().parse_args(ctx, args)
        ctx.params["check"] = True
        return rest


class TrainCommand(SettingsCommand):
    sections: ClassVar[Mapping[str, Sequence[str]]] = {
        "Swarm": ("join", "bootstrap", "local", "name", "min_experts"),
        "Data": ("data", "objective", "field", "tokenizer"),
        "Training": (
            "steps",
            "batch_size",
            "in_flight",
            "learning_rate",
            "preset",
            "average_every",
            "memory",
            "threads",
        ),
        "Checkpoints": ("resume", "checkpoint", "checkpoint_every"),
        "Settings and output": ("state", "config", "log", "json_file", "log_format"),
    }

    @staticmethod
    def roles() -> "Mapping[type[RoleSettings], Collection[str]]":
        from trainer_client.settings import TrainerSettings

        return {TrainerSettings: _all_settings(TrainerSettings)}


_TRAINED_MODEL = ("checkpoint", "memory", "wait_for_experts_s", "threads", "state", "p2pd")
_TRAINED_MODEL_SHOWN = ("join", "bootstrap", "checkpoint", "memory", "state", "threads", "wait_for_experts_s")


class TrainedModelCommand(SettingsCommand):
    """A command that reads the results of `talkoot train`."""

    changed_help: ClassVar[Mapping[str, str]] = {
        "checkpoint": "Folder of checkpoints, or one of its files.  [default: the newest run's]",
        "memory": "Memory that the model reads, by name or id.  [default: the one that it learned with]",
        "state": "The trainer's state folder, where its checkpoints are.{default}",
        "wait_for_experts_s": "How long to wait for the first live expert.{default}",
    }


_SERVED_SETTINGS = (
    "name",
    "host",
    "port",
    "announce_host",
    "announce_port",
    "reachability",
    "upload_mbit",
    "upnp",
    "p2pd",
    "p2pd_port",
    "announce_every_s",
    "max_calls",
)
_SERVED_SHOWN = ("host", "port", "announce_host", "upload_mbit", "name")


class PublishCommand(SettingsCommand):
    """A command that serves a memory from its folder."""

    sections: ClassVar[Mapping[str, Sequence[str]]] = {
        "Swarm": ("join", "bootstrap", "state"),
        "Network": _SERVED_SHOWN,
        "Output": ("log_format",),
    }

    @staticmethod
    def roles() -> "Mapping[type[RoleSettings], Collection[str]]":
        from expert_server.settings import NodeSettings

        return {NodeSettings: _SERVED_SETTINGS}


class RevokeCommand(PublishCommand):
    sections: ClassVar[Mapping[str, Sequence[str]]] = {
        "Passages": ("match", "passage", "dry_run"),
        **PublishCommand.sections,
    }


class GenerateCommand(TrainedModelCommand):
    sections: ClassVar[Mapping[str, Sequence[str]]] = {
        "Text": ("prompt", "max_tokens", "temperature", "top_k", "top_p", "seed"),
        "Model": _TRAINED_MODEL_SHOWN,
    }

    @staticmethod
    def roles() -> "Mapping[type[RoleSettings], Collection[str]]":
        from trainer_client.settings import Sampling, TrainerSettings

        return {TrainerSettings: _TRAINED_MODEL, Sampling: _all_settings(Sampling)}


class AskCommand(TrainedModelCommand):
    sections: ClassVar[Mapping[str, Sequence[str]]] = {
        "Question": ("question", "objective", "memory_passages"),
        "Model": (*_TRAINED_MODEL_SHOWN[:2], "model", *_TRAINED_MODEL_SHOWN[2:]),
        "Output": ("as_json",),
    }

    changed_help: ClassVar[Mapping[str, str]] = {
        **TrainedModelCommand.changed_help,
        "objective": "How the passages are summed: rag-sequence for each answer as a whole, rag-token for each of its "
        "tokens.  [default: as the model learned]",
        "memory_passages": "Passages that are read.  [default: as many as the model learned with]",
    }

    @cached_property
    def _setting_options(self) -> list[Any]:
        options = super()._setting_options
        next(option for option in options if option.name == "objective").metavar = "rag-sequence|rag-token"
        return options

    @staticmethod
    def roles() -> "Mapping[type[RoleSettings], Collection[str]]":
        from trainer_client.settings import TrainerSettings

        return {TrainerSettings: (*_TRAINED_MODEL, "objective", "memory_passages")}


class EvaluateCommand(TrainedModelCommand):
    sections: ClassVar[Mapping[str, Sequence[str]]] = {
        "Text": ("paths", "field"),
        "Model": _TRAINED_MODEL_SHOWN,
        "Output": ("as_json",),
    }

    @staticmethod
    def roles() -> "Mapping[type[RoleSettings], Collection[str]]":
        from trainer_client.settings import TrainerSettings

        return {TrainerSettings: (*_TRAINED_MODEL, "field")}


class ServeCommand(TrainedModelCommand):
    sections: ClassVar[Mapping[str, Sequence[str]]] = {
        "Model": (*_TRAINED_MODEL_SHOWN[:2], "model", *_TRAINED_MODEL_SHOWN[2:], "model_name"),
        "Server": ("host", "port", "api_key_file"),
        "Limits": ("max_tokens", "max_streams", "max_waiting", "max_per_client"),
        "Settings and output": ("config", "log_format"),
    }

    @staticmethod
    def roles() -> "Mapping[type[RoleSettings], Collection[str]]":
        from talkoot.serve.settings import ServeSettings
        from trainer_client.settings import TrainerSettings

        return {TrainerSettings: _TRAINED_MODEL, ServeSettings: _all_settings(ServeSettings)}


class ExportCommand(TrainedModelCommand):
    sections: ClassVar[Mapping[str, Sequence[str]]] = {
        "Folder": ("out", "data_note", "allow_missing", "keep", "keep_by"),
        "Swarm": ("join", "bootstrap", "wait_for_experts_s", "download_mbit"),
        "Dense part": ("resume", "checkpoint", "state", "tokenizer", "router"),
        "Output": ("as_json",),
    }

    changed_help: ClassVar[Mapping[str, str]] = {
        **TrainedModelCommand.changed_help,
        "checkpoint": "Take the dense part from this run: its folder of checkpoints, or one of its files.",
        "tokenizer": "The tokenizer of the live trainers: bytes, or a tokenizer.json.  [default: bytes]",
        "router": "The router of the live trainers.  [default: detected]",
        "wait_for_experts_s": "How long to wait for experts that no live node hosts.{default}",
    }

    @staticmethod
    def roles() -> "Mapping[type[RoleSettings], Collection[str]]":
        from trainer_client.settings import TrainerSettings

        more = ("tokenizer", "router", "balance", "top_k", "field", "batch_size")
        return {TrainerSettings: (*_TRAINED_MODEL, *more)}


class DashboardCommand(SettingsCommand):
    sections: ClassVar[Mapping[str, Sequence[str]]] = {
        "Options": ("join", "bootstrap", "host", "port", "refresh_s", "state", "config", "log_format"),
    }

    @staticmethod
    def roles() -> "Mapping[type[RoleSettings], Collection[str]]":
        from talkoot.dashboard.settings import DashboardSettings

        return {DashboardSettings: _all_settings(DashboardSettings)}


def _all_settings(role: "type[RoleSettings]") -> tuple[str, ...]:
    return *role.model_fields, *sorted(role.removed)


@contextmanager
def command(
    log_format: LogFormat = LogFormat.TEXT, *, as_json: bool = False, is_service: bool = False
) -> Iterator[tuple[Terminal, StopSignals]]:
    """The context of every command: it turns user errors into one line, and signals into the exit status.

    When nobody reads its standard output any more, or its disk is full, a service continues. Without a reader, any
    other command stops as if somebody had asked it to, so that it closes what it opened. On a full disk, it fails.
    """
    # torch's threads must not spin while they wait, because others need the cores; OpenMP reads this when torch is
    # imported
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.umask(os.umask(0o077) | 0o022)  # no other user may write to the files that a command writes
    signals = StopSignals()
    shown = LogFormat.JSON if as_json else log_format
    terminal = Terminal(shown, None if is_service else ask_to_stop, is_service=is_service)
    try:
        set_up_logging(terminal)
        yield terminal, signals
    except UserError as error:
        _fail(error)
    except ImportError as error:
        if error.name is None or error.name.partition(".")[0] in _OWN_PACKAGES:
            raise
        _fail(InstallationError(f"can't import {error.name}: {error}; install Talkoot again"))
    except (Stopped, Exception) as error:
        stopped = error if isinstance(error, Stopped) else signals.lost_in(error)
        if stopped is None:
            raise
        is_cut_off = terminal.is_unread and not is_service
        raise typer.Exit(_CUT_OFF if is_cut_off else stopped.exit_status) from None
    finally:
        signals.ignore()


@contextmanager
def printing() -> Iterator[None]:
    """The context of what is printed without a `Terminal`, such as help: if its disk is full, it fails in one line."""
    try:
        yield
    except BrokenPipeError:  # typer ends the process
        raise
    except OSError as error:
        _fail(results_not_written(error))


_CUT_OFF = 128 + 13
"""The exit status of Unix tools that end because nobody reads their output: SIGPIPE has the number 13."""
_OWN_PACKAGES = ("peer", "dht", "expert_server", "trainer_client", "talkoot")
"""A failed import of one of these is a bug, not a problem of the installation."""


def _fail(error: UserError) -> NoReturn:
    with suppress(OSError):  # nobody reads it
        print(_error_line(error), file=sys.stderr)  # noqa: T201  # the one line
    raise typer.Exit(error.exit_status) from None


def _error_line(error: UserError) -> str:
    return f"error: {escaped(' '.join(str(error).split()))} [{error.code}]"
