"""Peers that call servers, and show who they are, for tests."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peer.identity import Identity
from peer.rpc.sessions import Metadata, Right, SessionClient, Sessions
from peer.wire import session_pb2

RIGHTS: tuple[Right, ...] = (
    session_pb2.RIGHT_FORWARD,
    session_pb2.RIGHT_BACKWARD,
    session_pb2.RIGHT_FETCH,
)


def new_identity() -> Identity:
    with tempfile.TemporaryDirectory() as folder:
        return Identity.load_or_create(Path(folder) / "peer.key")


def a_caller(
    swarm_id: str, identity: Identity | None = None, rights: Sequence[Right] = RIGHTS
) -> SessionClient:
    """`identity`: a new one unless given."""
    return SessionClient(identity or new_identity(), swarm_id, rights)


class InSession:
    """A stub whose calls are in a session."""

    def __init__(self, stub: Any, metadata: Metadata) -> None:
        self._stub = stub
        self._metadata = metadata

    def __getattr__(self, method: str) -> Any:
        call = getattr(self._stub, method)

        def in_session(*arguments: Any, **options: Any) -> Any:
            return call(*arguments, metadata=self._metadata, **options)

        return in_session


def opened(sessions: Sessions, server: Identity, swarm_id: str) -> Metadata:
    """What a new caller's calls carry, without a round trip."""
    request = a_caller(swarm_id).statement(server.peer_id)
    return (("talkoot-session-bin", sessions.open(request).session),)
