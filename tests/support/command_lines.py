"""Parses command lines as `talkoot` does, without running them."""

from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup

from talkoot.cli import app

_TALKOOT: Any = typer.main.get_command(app)


def require_parses(words: Sequence[str]) -> None:
    """Raises an exception that says what is wrong if there is no such command, option or value."""
    command, node = _TALKOOT, _TALKOOT.commands["node"]
    rest = list(words)
    while isinstance(command, TyperGroup) and rest and not rest[0].startswith("-"):
        if rest[0] not in command.commands:
            raise LookupError(f"no command {rest[0]}; there are {', '.join(command.commands)}")
        command = command.commands[rest.pop(0)]
    if isinstance(command, TyperGroup):  # what its options do, they do while they are read
        known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
        if unknown := [word for word in rest if word not in known]:
            raise LookupError(f"no option {unknown[0]}")
        return
    try:
        with command.make_context("talkoot", rest) as context:
            if context.allow_extra_args:  # the rest is for the node
                node.make_context("talkoot node", list(context.args))
    except typer.Exit:
        pass  # --help ends so
