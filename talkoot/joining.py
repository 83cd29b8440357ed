"""Which swarm a command is for."""

from dht.invites import Invite
from peer.errors import SettingsError


def invite_of(join: str | None) -> Invite:
    """What was passed as --join. Raises SettingsError when nothing was, and InviteError."""
    if join is None:
        raise SettingsError(
            "pass --join INVITE: the line that you were given, or @FILE with the file that holds it"
        )
    return Invite.read(join)
