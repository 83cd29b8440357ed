"""The command `invite`: a founder lets people in, and takes that back."""

from typing import Annotated

import typer

from talkoot.options import NodeState, command
from talkoot.terminal import LogFormat


def invite(
    *,
    role: Annotated[
        str | None,
        typer.Option(
            metavar="R",
            help="node: hosts experts; trainer: trains; reader: only uses what was trained.  [default: trainer]",
        ),
    ] = None,
    expires: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Until when it holds, such as 12h or 30d.  [default: 30d]"),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Whom it is for: only your list says so.  [default: nobody]")
    ] = None,
    listed: Annotated[
        bool, typer.Option("--list", help="List the invites that you made, instead of making one.")
    ] = False,
    revoke: Annotated[
        str | None, typer.Option(metavar="SERIAL", help="Let nobody in with that one any more.")
    ] = None,
    state: NodeState = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Make an invite for a swarm that you founded, which admits by token. It is a secret until it expires."""
    with command(LogFormat.JSON if as_json else LogFormat.TEXT) as (terminal, _):
        from talkoot.node.invites import Wish, run_invite, run_list, run_revoke

        if listed:
            run_list(terminal, state)
        elif revoke is not None:
            run_revoke(terminal, state, revoke)
        else:
            run_invite(terminal, state, Wish.parse(role, expires, name))
