"""The identity under which memories are published: the founder's, with the key in its node's state folder, or a
librarian's.
"""

import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import platformdirs

from dht.admission import Role, make_token, new_serial
from dht.invites import Invite, invite_of
from dht.swarm import Stage, Swarm, join_swarm, with_known_peers
from expert_server.settings import NodeSettings
from peer.errors import (
    ExpiredInviteError,
    InviteError,
    LibraryError,
    RecordError,
    RevokedInviteError,
    SettingsError,
)
from peer.files import StateFolder
from peer.identity import Identity
from talkoot.node.control import node_folder
from talkoot.node.invites import FILE, FoundedSwarm
from talkoot.node.launch import network_config

_TOKEN_S = 30 * 86400.0
_FOUNDER_SHOULD = "pass --state with the state folder of the node that was started with --new"


@dataclass(frozen=True)
class Publisher:
    """A publisher, and the peer that serves what it publishes."""

    signer: Identity
    """Signs the list of memories."""
    identity: Identity
    """The identity of the peer. A founder's peer has a temporary one, because the founder's node may be running."""
    invite: Invite
    state: Path | None
    """Where the peer saves what it knows of the swarm."""

    @asynccontextmanager
    async def joined(self, settings: NodeSettings, host: str, stage: Stage) -> AsyncIterator[Swarm]:
        """Runs the peer, listening on `host`, while inside. Raises UserError, also if the publisher may not publish."""
        try:
            swarm = await join_swarm(
                self.identity,
                self.invite,
                network_config(settings, host),
                state=self.state,
                roles=(Role.LIBRARIAN,),
                stage=stage,
            )
        except (RevokedInviteError, ExpiredInviteError):
            raise
        except InviteError as error:
            raise InviteError(f"{error}. If you founded the swarm, {_FOUNDER_SHOULD}") from error
        try:
            if swarm.admission.mode == "open" and self.signer.peer_id != swarm.keys.author:
                raise LibraryError(
                    f"swarm {swarm.keys.name!r} is open, so only its founder publishes memories: on the founder's "
                    f"machine, {_FOUNDER_SHOULD}"
                )
            yield swarm
        finally:
            await swarm.stop()

    def check_may_publish(self, swarm: Swarm) -> None:
        """Raises LibraryError if its token was revoked, or has expired."""
        if self.signer.peer_id != swarm.host.peer_id:
            return
        try:
            swarm.admission.check_own()
        except RecordError as error:
            raise LibraryError(
                f"nodes no longer host your memories ({error}): ask the founder of swarm "
                f"{swarm.keys.name!r} for another invite"
            ) from error

    def signer_beside(self, swarm: Swarm) -> Identity | None:
        """The identity that signs lists in place of the peer; None: the peer itself."""
        return None if self.signer.peer_id == swarm.host.peer_id else self.signer


@contextmanager
def publisher_of(join: str | None, state: Path | None) -> Iterator[Publisher]:
    """The founder, if the state folder is that of its node, which may be running; otherwise a librarian. `join`: the
    invite as given; a founder needs none. `state`: by default, the node's folder if the swarm was founded with it,
    otherwise a separate folder for publishing. Raises UserError.
    """
    invite = None if join is None else Invite.read(join)
    founded = _founded(node_folder(state), invite)
    if founded is not None:
        with tempfile.TemporaryDirectory(prefix="talkoot-publish-") as folder:
            own = Identity.load_or_create(Path(folder) / "identity.key")
            founder = Identity.load_or_create(node_folder(state) / "identity.key")
            yield Publisher(founder, own, _with_token(founded, invite, founder), None)
        return
    invite = invite_of(join)
    with closing(StateFolder(state or platformdirs.user_state_path("talkoot") / "publisher")) as own_folder:
        identity = Identity.load_or_create(own_folder.path / "identity.key")
        yield Publisher(identity, identity, invite, own_folder.path)


def _founded(folder: Path, invite: Invite | None) -> Invite | None:
    """The invite of the swarm that was founded with this folder, unless `join` names another swarm. Raises
    SettingsError.
    """
    if not (folder / FILE).exists():
        return None
    founded = with_known_peers(Invite.parse(FoundedSwarm.load(folder).invite), folder)
    if invite is not None and invite.keys != founded.keys:
        return None
    if Identity.load_or_create(folder / "identity.key").peer_id != founded.keys.author:
        raise SettingsError(f"{folder} no longer has the key of the swarm's founder")
    return founded


def _with_token(founded: Invite, given: Invite | None, founder: Identity) -> Invite:
    """The invite with a token for the founder's second peer. The token is for this run, and is not saved."""
    keys = founded.keys
    token = make_token(founder, keys.swarm_id, Role.LIBRARIAN, time.time() + _TOKEN_S, new_serial())
    through = founded.through(() if given is None else given.bootstrap)
    return replace(through, token=token.SerializeToString())
