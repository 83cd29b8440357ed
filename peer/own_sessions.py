"""The sessions that this peer has opened with others: what a call to a server carries to show who calls."""

import asyncio
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence

import grpc
from grpc import StatusCode
from hivemind.p2p import PeerID

from peer import PROTOCOL_VERSION
from peer.errors import ExpertError
from peer.garbage import make_stub
from peer.identity import SESSION_DOMAIN, Identity
from peer.rpc.sessions import NONCE_BYTES, SESSION_KEY, Metadata, Right
from peer.wire import admission_pb2, session_pb2, session_pb2_grpc

_RENEW_AT = 0.8
"""Of a session's lifetime: after that a new one is opened before it ends."""
_LONGEST_LIFETIME_S = 7 * 86400.0
_MAX_SESSION_BYTES = 64


class OwnSessions:
    """Opens sessions when they are needed, one with each server, and remembers them. For one event loop.

    A session that a server does not know any more is told by `ended`; the call can then be repeated, for a server looks
    at the session before it does anything.
    """

    def __init__(
        self,
        identity: Identity,
        swarm_id: str,
        rights: Sequence[Right],
        badge: admission_pb2.Badge | None = None,
        *,
        limit: int = 1024,
        now: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`limit`: sessions remembered; the one opened longest ago is forgotten first. `now`: what statements say,
        `clock`: what lifetimes are measured by.
        """
        self.opened = 0
        self._identity = identity
        self._swarm_id = swarm_id
        self._rights = rights
        self._badge = badge
        self._limit = limit
        self._now = now
        self._clock = clock
        self._known: OrderedDict[PeerID, tuple[Metadata, float]] = OrderedDict()
        """By server: what calls carry, and until when."""
        self._opening: dict[PeerID, asyncio.Task[Metadata]] = {}

    def known(self, server: PeerID) -> Metadata | None:
        """What calls to this server carry, if a session is open."""
        found = self._known.get(server)
        return found[0] if found is not None and self._clock() < found[1] else None

    async def metadata(self, server: PeerID, channel: grpc.aio.Channel, deadline_s: float) -> Metadata:
        """What calls to this server carry. Opens a session when none is; who comes meanwhile waits for the same.

        Raises ExpertError with the server's status when it opens none.
        """
        if (known := self.known(server)) is not None:
            return known
        opening = self._opening.get(server)
        if opening is None:
            opening = self._opening[server] = asyncio.create_task(self._open(server, channel, deadline_s))
            opening.add_done_callback(lambda task: self._note_opened(server, task))
        return await asyncio.shield(opening)

    def ended(self, server: PeerID, metadata: Metadata) -> None:
        """The server does not know this session any more."""
        found = self._known.get(server)
        if found is not None and found[0] == metadata:
            del self._known[server]

    async def close(self) -> None:
        """Ends what is being opened."""
        opening = list(self._opening.values())
        for task in opening:
            task.cancel()
        await asyncio.gather(*opening, return_exceptions=True)

    async def _open(self, server: PeerID, channel: grpc.aio.Channel, deadline_s: float) -> Metadata:
        stub = make_stub(session_pb2_grpc.SessionServiceStub, channel)
        try:
            reply: session_pb2.OpenReply = await stub.Open(self.statement(server), timeout=deadline_s)
        except grpc.aio.AioRpcError as error:
            raise ExpertError(error.code(), f"no session: {error.details() or ''}"[:500]) from error
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            raise ExpertError(StatusCode.UNAVAILABLE, "the channel was closed meanwhile") from error
        if len(reply.session) > _MAX_SESSION_BYTES:
            raise ExpertError(StatusCode.DATA_LOSS, "the server gave no usable session")
        metadata = ((SESSION_KEY, reply.session),)
        lifetime_s = min(max(reply.lifetime_s, 0.0), _LONGEST_LIFETIME_S)
        self._known[server] = metadata, self._clock() + _RENEW_AT * lifetime_s
        self._known.move_to_end(server)
        if len(self._known) > self._limit:
            self._known.popitem(last=False)
        self.opened += 1
        return metadata

    def statement(self, server: PeerID) -> session_pb2.OpenRequest:
        """Proves to this server, now, who calls."""
        statement = session_pb2.OpenStatement(
            protocol_version=PROTOCOL_VERSION,
            swarm_id=self._swarm_id,
            server=server.to_bytes(),
            caller=self._identity.peer_id.to_bytes(),
            time=self._now(),
            nonce=secrets.token_bytes(NONCE_BYTES),
            rights=self._rights,
            badge=self._badge,
        ).SerializeToString()
        return session_pb2.OpenRequest(
            statement=statement,
            public_key=self._identity.public_key,
            signature=self._identity.sign(statement, SESSION_DOMAIN),
        )

    def _note_opened(self, server: PeerID, task: "asyncio.Task[Metadata]") -> None:
        del self._opening[server]
        if not task.cancelled():
            task.exception()  # told to whoever waits; nobody may any more
