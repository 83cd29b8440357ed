"""An invite as it is passed on a command line: itself, or the file that holds it, which other users can't see there."""

from pathlib import Path

from peer.errors import InviteError

_LONGEST_LINE = 8192
"""Characters read from a file with an invite; Invite says what is too long."""


def invite_text(join: str) -> str:
    """What was passed as --join: an invite, or `@` and the file that holds it. Raises InviteError."""
    if not join.startswith("@"):
        return join
    try:
        with Path(join[1:]).open(encoding="utf-8") as file:
            return file.readline(_LONGEST_LINE)
    except (OSError, UnicodeDecodeError) as error:
        raise InviteError(f"can't read the invite from {join[1:]}: {error}") from error
