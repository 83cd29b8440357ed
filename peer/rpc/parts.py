"""Fetches the parts of memories from the peers that have them. Each part is named by its hash, so any peer's copy will
do.
"""

import asyncio
import hashlib
import logging
from collections.abc import Callable, Iterable
from functools import partial
from typing import TypeVar

from peer import PROTOCOL_VERSION
from peer.bounded import BoundedDict
from peer.errors import StateError, TransferError, WireError
from peer.identity import PeerID
from peer.loop import cancel_all
from peer.rates import RateLimit
from peer.rpc.channels import ChannelPool, Contact
from peer.rpc.sessions import SessionClient
from peer.rpc.transfer import SnapshotClient, SnapshotReceiver, fair_time_s
from peer.wire import memory_pb2, memory_pb2_grpc

logger: logging.Logger = logging.getLogger(__name__)

T = TypeVar("T")

_OPEN_S = 5.0
_LIMIT_S = 600.0
"""The longest time that one part may take from one peer."""
_AT_ONCE = 2
"""How many peers are downloaded from in parallel for one part. The earlier one ends when a third is asked."""
_MOST_PEERS = 8
"""Peers that are asked for one part."""
_REMEMBERED = 1024


class PartClient:
    """Fetches parts of memories. Close it when done."""

    def __init__(
        self,
        swarm_id: str,
        sessions: SessionClient,
        channels: ChannelPool,
        down: RateLimit,
        *,
        count: Callable[[int], None] = lambda size: None,
    ) -> None:
        """`sessions`: show others who fetches. `down`: the limit of download. `count`: called with the number of bytes
        received.
        """
        self._swarm_id = swarm_id
        self._sessions = sessions
        self._channels = channels
        self._down = down
        self._count = count
        self._failed = BoundedDict[PeerID, None](_REMEMBERED)
        """Peers that were slow, or failed to give a part, when they were asked last."""

    async def close(self) -> None:
        await self._sessions.close()
        await self._channels.close()

    def service(self, max_bytes: int) -> SnapshotClient:
        """A client for the parts of other peers. `max_bytes`: the limit for one part."""
        return SnapshotClient(
            memory_pb2_grpc.MemoryServiceStub,
            self._channels,
            self._sessions,
            partial(SnapshotReceiver, max_bytes, self._count),
            open_s=_OPEN_S,
            limit_s=_LIMIT_S,
        )

    async def fetch(
        self, peer: Contact, memory: str, name: bytes, max_bytes: int, library: bytes = b""
    ) -> bytes:
        """Fetches a file that should be the part of this name, which is not checked here. `library`: shows the peer the
        publisher's record that lists the memory. Raises TransferError if the file did not arrive, and StateError if it
        is not a file of that size.
        """
        request = memory_pb2.FetchPartRequest(
            protocol_version=PROTOCOL_VERSION,
            swarm_id=self._swarm_id,
            memory=memory,
            name=name,
            library=library,
        )
        what = f"part {name.hex()[:8]} of memory {memory} of {peer.peer_id}"
        incoming = await self.service(max_bytes).download(peer, "FetchPart", request, what, self._down)
        _, data = await asyncio.to_thread(incoming.whole)
        return data

    async def fetch_any(
        self,
        peers: Iterable[Contact],
        memory: str,
        name: bytes,
        max_bytes: int,
        check: Callable[[bytes], T],
        wrong: Callable[[PeerID], None] = lambda peer_id: None,
    ) -> T:
        """The result of `check` for the part, from the first peer whose copy it accepts. At most eight peers are asked,
        one after another; those that failed before come last. A slow download continues while the next peer is asked.
        `check` raises WireError if a file is not that part. It does not run on the loop. `wrong` is called with each
        peer that gave another file. Raises TransferError if no peer gives the part.
        """
        reason = "nobody is known to have it"
        patience_s = fair_time_s(max_bytes)
        left = sorted(peers, key=lambda peer: peer.peer_id in self._failed)[:_MOST_PEERS]
        fetching: dict[asyncio.Task[T], PeerID] = {}
        try:
            while left or fetching:
                if left:
                    if len(fetching) == _AT_ONCE:
                        await cancel_all([next(iter(fetching))])
                        del fetching[next(iter(fetching))]
                    peer = left.pop(0)
                    fetch = self._fetch_checked(peer, memory, name, max_bytes, check)
                    fetching[asyncio.create_task(fetch)] = peer.peer_id
                done, slow = await asyncio.wait(
                    fetching, timeout=patience_s if left else None, return_when=asyncio.FIRST_COMPLETED
                )
                if not done:
                    self._failed.update((fetching[task], None) for task in slow)
                for task in done:
                    peer_id = fetching.pop(task)
                    try:
                        found = task.result()
                    except TransferError as error:
                        reason = str(error)
                    except (WireError, StateError) as error:
                        reason = f"{peer_id} gave another file: {error}"
                        logger.warning("part %s of memory %s: %s", name.hex()[:8], memory, reason)
                        wrong(peer_id)
                    else:
                        self._failed.pop(peer_id, None)
                        return found
                    self._failed[peer_id] = None
        finally:
            await cancel_all(fetching)
        raise TransferError(f"part {name.hex()[:8]} of memory {memory} did not arrive: {reason}")

    async def _fetch_checked(
        self, peer: Contact, memory: str, name: bytes, max_bytes: int, check: Callable[[bytes], T]
    ) -> T:
        data = await self.fetch(peer, memory, name, max_bytes)
        return await asyncio.to_thread(check, data)


def check_sha256(name: bytes, data: bytes) -> bytes:
    """Returns the data. Raises WireError if the name is not its SHA-256."""
    if hashlib.sha256(data).digest() != name:
        raise WireError("its SHA-256 does not match")
    return data
