"""A pool closes channels to make room, even those with calls under way: the calls end with an error, and no
task ends.
"""

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
from grpc import StatusCode
from relayed import LOCAL, SWARM, closing, serve, until

from peer.errors import ExpertError
from peer.identity import Identity
from peer.rates import RateLimit
from peer.rpc.channels import ChannelPool, KnownPeer
from peer.rpc.sessions import SessionClient
from peer.rpc.transfer import SnapshotClient, SnapshotReceiver
from peer.wire import session_pb2, state_pb2, state_pb2_grpc

STATE = bytes(range(10))
HEADER = state_pb2.StateHeader(total_bytes=len(STATE), sha256=hashlib.sha256(STATE).digest(), update_count=1)


class StallingServicer(state_pb2_grpc.StateServiceServicer):
    """Sends half of a state, and the rest when the caller comes back for it."""

    def __init__(self) -> None:
        self.offsets: list[int] = []
        self.has_given = asyncio.Event()

    async def Fetch(self, request: state_pb2.FetchRequest, context: Any) -> None:
        self.offsets.append(request.offset)
        await context.write(state_pb2.FetchReply(header=HEADER))
        if request.offset:
            await context.write(state_pb2.FetchReply(chunk=STATE[request.offset :]))
            return
        await context.write(state_pb2.FetchReply(chunk=STATE[:5]))
        self.has_given.set()
        await asyncio.Event().wait()


@contextlib.asynccontextmanager
async def a_peer_that_stalls(
    identities: tuple[Identity, Identity],
) -> AsyncIterator[tuple[StallingServicer, ChannelPool, SessionClient, KnownPeer]]:
    """Such a peer, and what is needed to call it, with a pool that has room for one channel."""
    served, service, pool = await serve(identities[0]), StallingServicer(), ChannelPool(1)
    state_pb2_grpc.add_StateServiceServicer_to_server(service, served.server.services)
    sessions = SessionClient(identities[1], SWARM, (session_pb2.RIGHT_FETCH,))
    async with closing(served):
        yield service, pool, sessions, KnownPeer(served.peer_id, (served.endpoint,), served.pem)
        await sessions.close()
        await pool.close()


def test_a_download_whose_channel_is_closed_goes_on_by_another(identity: Identity, other: Identity) -> None:
    async def scenario() -> None:
        async with a_peer_that_stalls((identity, other)) as (service, pool, sessions, known):
            got: list[int] = []
            client = SnapshotClient(
                state_pb2_grpc.StateServiceStub, pool, sessions,
                lambda: SnapshotReceiver(100, got.append), open_s=60, limit_s=60,
            )  # fmt: skip
            request = state_pb2.FetchRequest()
            fetching = asyncio.create_task(client.download(known, "Fetch", request, "it", RateLimit(None)))
            async with asyncio.timeout(60):
                await service.has_given.wait()
                await until(lambda: got)
                await pool.get(f"{LOCAL}:1", known.certificate_pem)
                assert (await fetching).whole() == (HEADER, STATE)
            assert service.offsets == [0, 5]

    asyncio.run(scenario())


def test_a_session_on_a_closed_channel_is_refused_and_nobody_is_cancelled(
    identity: Identity, other: Identity
) -> None:
    async def scenario() -> None:
        async with a_peer_that_stalls((identity, other)) as (_, pool, sessions, known):
            channel = await pool.reach(known)
            await pool.get(f"{LOCAL}:1", known.certificate_pem)
            with pytest.raises(ExpertError, match="the channel was closed") as caught:
                await sessions.metadata(known.peer_id, channel, 60)
            assert caught.value.status is StatusCode.UNAVAILABLE

    asyncio.run(scenario())
