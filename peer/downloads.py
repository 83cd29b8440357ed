"""Snapshots that are fetched from other peers: whoever was cut off goes on where it was, while the other keeps them."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc
from grpc import StatusCode

from peer.rpc.channels import ChannelPool, Contact
from peer.errors import ExpertError, TransferError, UnreachableError
from peer.garbage import make_stub
from peer.own_sessions import OwnSessions
from peer.rates import Rate
from peer.rpc.sessions import Metadata
from peer.rpc.transfer import STALL_S, Incoming, receive

_ATTEMPTS = 5
"""How often a download is begun or resumed."""
_BUSY_ATTEMPTS = 20
"""How often it is tried at a peer that others keep busy."""
_BACKOFF_S = 0.2
"""Before the second attempt; it doubles with each, up to eight times."""
_PASSING = {
    StatusCode.UNAUTHENTICATED,  # the session had ended: the next attempt opens another
    StatusCode.UNAVAILABLE,
    StatusCode.RESOURCE_EXHAUSTED,
    StatusCode.DEADLINE_EXCEEDED,
    StatusCode.CANCELLED,
    StatusCode.INTERNAL,
    StatusCode.UNKNOWN,
}
"""Of a download that is worth another attempt."""


@dataclass(frozen=True)
class SnapshotService:
    """A gRPC service of other peers that gives snapshots. Close it when done."""

    stub_class: Callable[[Any], Any]
    """The generated one."""
    channels: ChannelPool
    sessions: OwnSessions
    """What shows others who calls."""
    incoming: Callable[[], Incoming]
    """Where a snapshot goes, from its beginning on."""
    open_s: float
    """Longest that opening a session may take."""
    limit_s: float
    """Longest that a download may take, all attempts together."""

    async def close(self) -> None:
        await self.sessions.close()
        await self.channels.close()

    async def stub(self, peer: Contact) -> tuple[Any, Metadata]:
        """With what its calls carry. Raises TransferError, and ExpertError when the peer opens no session."""
        try:
            channel = await self.channels.reach(peer)
        except UnreachableError as error:
            raise TransferError(str(error)) from error
        stub = make_stub(self.stub_class, channel)
        return stub, await self.sessions.metadata(peer.peer_id, channel, self.open_s)

    async def download(self, peer: Contact, method: str, request: Any, what: str, down: Rate) -> Incoming:
        """By calls of the method, each from where the last was cut off.

        `request`: whose `sha256` and `offset` are set for each; its first `sha256`: of the snapshot that is wanted,
        empty: as it is now. `what`: for errors, such as "expert 0.1.2 of node Qm…". `down`: how fast it may come.
        Raises TransferError, and StateError when what came can't be right.
        """
        try:
            async with asyncio.timeout(self.limit_s):
                return await self._download(peer, method, request, what, down)
        except TimeoutError:
            raise TransferError(f"{what} did not come within {self.limit_s:.0f} s") from None

    async def _download(self, peer: Contact, method: str, request: Any, what: str, down: Rate) -> Incoming:
        wanted: bytes = request.sha256
        incoming = self.incoming()
        session: Metadata = ()
        attempts = busy = 0
        while True:
            try:
                stub, session = await self.stub(peer)
                request.sha256 = incoming.header.sha256 if incoming.header is not None else wanted
                request.offset = incoming.offset
                call = getattr(stub, method)(request, timeout=self.limit_s, metadata=session)
                await _receive(call, incoming, down, what, wanted)
                reason = "the stream ended early"
            except (grpc.aio.AioRpcError, ExpertError) as error:
                status = error.status if isinstance(error, ExpertError) else error.code()
                reason = f"{status.name}: {error if isinstance(error, ExpertError) else error.details()}"
                busy += status is StatusCode.RESOURCE_EXHAUSTED
                if status is StatusCode.DEADLINE_EXCEEDED and incoming.header is None:
                    raise TransferError(f"{what} did not come: {reason}") from error  # the peer says nothing
                if status is StatusCode.FAILED_PRECONDITION and incoming.header and not wanted:
                    incoming = self.incoming()  # the snapshot is gone, as after a restart: begin anew
                elif status not in _PASSING:
                    raise TransferError(f"{what} was not given: {reason}", True) from error
            if incoming.is_whole:
                return incoming
            attempts += 1
            if attempts - busy >= _ATTEMPTS or busy >= _BUSY_ATTEMPTS:
                raise TransferError(f"{what} did not come: {reason}", answered=busy > 0)
            await asyncio.sleep(_BACKOFF_S * 2 ** min(attempts - 1, 3))
            self.sessions.ended(peer.peer_id, session)  # the attempt may have failed for that


async def _receive(call: Any, incoming: Incoming, down: Rate, what: str, wanted: bytes) -> None:
    try:
        await receive(call, incoming, down, wanted)
    except TimeoutError:
        raise TransferError(f"{what} stalled on its way for {STALL_S:.0f} s") from None
    finally:
        call.cancel()
