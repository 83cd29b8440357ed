"""The command `doctor`: `node --check` under the name by which it is looked for."""

from typing import Any, cast

import typer
from typer.core import TyperGroup


def doctor(context: typer.Context) -> None:
    """Check this machine and say what to mend, as `node --check` does; with --join, against a swarm."""
    node = node_command(context)
    with node.make_context("talkoot doctor", ["--check", *context.args]) as checking:
        node.invoke(checking)


def node_command(context: typer.Context) -> Any:
    """`talkoot node`, for those that take its options."""
    return cast(TyperGroup, context.find_root().command).commands["node"]
