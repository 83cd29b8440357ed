"""Peers that call servers and prove their identity, for tests."""

import functools
from collections.abc import Sequence
from typing import Any

from stranger import new_identity

from peer.identity import Identity
from peer.rpc.sessions import Metadata, Right, SessionClient, Sessions
from peer.wire import session_pb2

RIGHTS: tuple[Right, ...] = (
    session_pb2.RIGHT_FORWARD,
    session_pb2.RIGHT_BACKWARD,
    session_pb2.RIGHT_FETCH,
    session_pb2.RIGHT_EXPORT,
)


_CALLER = 100
"""The number of the identity that makes most calls. Servers and hosts have the small numbers."""


@functools.cache
def numbered_identity(number: int) -> Identity:
    """The same identity for all tests of this process."""
    return new_identity()


def numbered_identities(count: int) -> list[Identity]:
    return [numbered_identity(number) for number in range(count)]


def a_caller(
    swarm_id: str, identity: Identity | None = None, rights: Sequence[Right] = RIGHTS
) -> SessionClient:
    """`identity`: by default always the same one, which no server has."""
    return SessionClient(identity or numbered_identity(_CALLER), swarm_id, rights)


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


def opened(
    sessions: Sessions,
    server: Identity,
    swarm_id: str,
    identity: Identity | None = None,
    near: str = "",
    rights: Sequence[Right] = RIGHTS,
) -> Metadata:
    """Opens a session without a round trip. Returns the metadata of the caller's calls. `near`: the neighbourhood that
    the caller comes from.
    """
    request = a_caller(swarm_id, identity, rights).statement(server.peer_id, sessions.challenges.new())
    return (("talkoot-session-bin", sessions.open(request, near).session),)
