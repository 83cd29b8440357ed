"""Snapshots of trained state, sent between peers in chunks and with a checksum.

An interrupted download resumes where it stopped, as long as the other peer still caches the snapshot.
"""

import asyncio
import hashlib
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import grpc
from grpc import StatusCode

from peer.averaging import MAX_UPDATE_COUNT
from peer.bounded import BoundedDict, Displacement, Owner
from peer.budget import interruptible
from peer.codec import CHUNK_BYTES, MAX_CHUNK_BYTES, joined
from peer.errors import ExpertError, StateError, TransferError, UnreachableError, WireError
from peer.formatting import printable
from peer.rates import Pace, RateLimit
from peer.rpc.calls import make_stub, status_of, while_open
from peer.rpc.channels import ChannelPool, Contact
from peer.rpc.sessions import Metadata, SessionClient
from peer.wire import state_pb2

LEAST_BYTES_PER_S = 32_768
"""The slowest transfer that is waited for: a quarter of an upload of 1 Mbit/s."""
GRACE_S = 10.0
"""How long a transfer may stall."""
_FAIR_BYTES_PER_S = 125_000
_FAIR_S = 10.0
"""While others wait, a transfer may take this long, plus the time that its bytes take at the rate above."""
_CUT_OFF = "others wait, and your transfer was slow or not your only one: go on with it soon"
_BUSY_S = 1.0
_ATTEMPTS = 5
"""How many times a download is started or resumed."""
_BUSY_ATTEMPTS = 20
"""How many times a download is started or resumed if the peer is busy with other transfers."""
_PATIENCE_S = 30.0
"""A download is given up after an attempt that ends this long after the last attempt that brought at least a chunk."""
_BACKOFF_S = 0.2
"""The pause before the second attempt. It doubles up to eight times that."""
_PASSING = {
    StatusCode.UNAUTHENTICATED,  # the session had ended; the next attempt opens another
    StatusCode.UNAVAILABLE,
    StatusCode.RESOURCE_EXHAUSTED,
    StatusCode.DEADLINE_EXCEEDED,
    StatusCode.CANCELLED,
    StatusCode.INTERNAL,
    StatusCode.UNKNOWN,
}
"""If a download ends with one of these statuses, another attempt is worthwhile."""
M = TypeVar("M")


class Bytes(Protocol):
    """Data that is sent in parts. Reading a file may raise OSError."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> bytes: ...


class CachedSnapshot(Protocol):
    """A snapshot that other peers may fetch."""

    @property
    def key(self) -> Hashable: ...

    @property
    def sha256(self) -> bytes: ...

    @property
    def expires_at(self) -> float: ...


S = TypeVar("S", bound=CachedSnapshot)


class SnapshotCache(Generic[S]):
    """The newest snapshots, until they expire. Pure: `now` is an argument."""

    def __init__(self, limit: int, lifetime_s: float) -> None:
        self.lifetime_s = lifetime_s
        self._kept = BoundedDict[tuple[Hashable, bytes], S](limit)  # oldest first

    def put(self, snapshot: S, now: float) -> None:
        self._drop_expired(now)
        self._kept[snapshot.key, snapshot.sha256] = snapshot

    def find(self, key: Hashable, sha256: bytes, now: float) -> S | None:
        self._drop_expired(now)
        return self._kept.get((key, sha256))

    def all(self, now: float) -> Iterable[S]:
        self._drop_expired(now)
        return self._kept.values()

    @property
    def in_memory(self) -> list[S]:
        """All snapshots, including expired ones that have not been dropped yet. Thread-safe."""
        return list(self._kept.values())

    def __len__(self) -> int:
        return len(self._kept)

    def _drop_expired(self, now: float) -> None:
        for key in [key for key, snapshot in self._kept.items() if snapshot.expires_at <= now]:
            del self._kept[key]


class SnapshotReceiver:
    """Assembles a snapshot. Does no I/O, and accepts nothing that the header did not announce."""

    def __init__(self, max_bytes: int, count: Callable[[int], None]) -> None:
        """`max_bytes`: the limit for the whole snapshot. `count` is called with the size of each chunk."""
        self.header: state_pb2.StateHeader | None = None
        self._max_bytes = max_bytes
        self._count = count
        self._data = bytearray()

    @property
    def offset(self) -> int:
        """Bytes received."""
        return len(self._data)

    @property
    def is_whole(self) -> bool:
        return self.header is not None and len(self._data) == self.header.total_bytes

    def begin(self, header: state_pb2.StateHeader, sha256: bytes = b"") -> None:
        """Takes the header of the chunks that follow. `sha256`: the snapshot that was asked for. Raises StateError."""
        if len(header.sha256) != 32:
            raise StateError("a state must begin with its header")
        if header.total_bytes > self._max_bytes:
            raise StateError(
                f"the state has {header.total_bytes} bytes, more than the {self._max_bytes} that are "
                "possible in this swarm"
            )
        if header.update_count > MAX_UPDATE_COUNT:
            raise StateError(f"the state claims {header.update_count} updates, more than are possible")
        if (self.header is not None and header != self.header) or (sha256 and header.sha256 != sha256):
            raise StateError("this is not the snapshot that was asked for")
        self.header = header

    def take(self, chunk: bytes) -> None:
        """Adds a chunk. Raises StateError."""
        assert self.header is not None, "the header comes first"
        if not 1 <= len(chunk) <= MAX_CHUNK_BYTES:
            raise StateError(f"after the header come chunks of 1 to {MAX_CHUNK_BYTES} bytes")
        if len(self._data) + len(chunk) > self.header.total_bytes:
            raise StateError("the state is longer than its header says")
        self._data += chunk
        self._count(len(chunk))

    def whole(self) -> tuple[state_pb2.StateHeader, bytes]:
        """The header and the data. Slow, so don't call it on the loop's thread. Raises StateError if they don't
        match.
        """
        if self.header is None or not self.is_whole:
            raise StateError("the state is incomplete")
        if hashlib.sha256(self._data).digest() != self.header.sha256:
            raise StateError("the checksum does not match: the state was changed in transit")
        return self.header, joined([self._data])


@dataclass(frozen=True)
class SnapshotClient:
    """Downloads snapshots from a gRPC service of other peers. Close it when done."""

    stub_class: Callable[[Any], Any]
    """The generated stub."""
    channels: ChannelPool
    sessions: SessionClient
    """This peer's sessions with others."""
    incoming: Callable[[], SnapshotReceiver]
    """Makes the receiver of a new download."""
    open_s: float
    """The longest time that opening a session may take."""
    limit_s: float
    """The longest time that a download may take, over all attempts."""

    async def close(self) -> None:
        await self.sessions.close()
        await self.channels.close()

    async def stub(self, peer: Contact) -> tuple[Any, Metadata]:
        """A stub and the metadata for its calls. Raises TransferError, and ExpertError if the peer opens no session."""
        try:
            async with asyncio.timeout(self.open_s):
                channel = await self.channels.reach(peer)
        except UnreachableError as error:
            raise TransferError(str(error)) from error
        except TimeoutError as error:
            raise TransferError(f"no connection to {peer.peer_id} within {self.open_s:.0f} s") from error
        stub = make_stub(self.stub_class, channel)
        return stub, await self.sessions.metadata(peer.peer_id, channel, self.open_s)

    async def download(
        self, peer: Contact, method: str, request: Any, what: str, down: RateLimit
    ) -> SnapshotReceiver:
        """Downloads a snapshot with calls of the method. Each call continues where the last one stopped.

        `request`: its `sha256` names the snapshot, or is empty for the current state; its `offset` is set for each
        call. `what`: for errors, such as "expert 0.1.2 of node Qm…". `down`: the limit of bandwidth. Raises
        TransferError, and StateError if what arrives can't be right.
        """
        try:
            async with asyncio.timeout(self.limit_s):
                return await self._download(peer, method, request, what, down)
        except TimeoutError:
            raise TransferError(f"{what} did not arrive within {self.limit_s:.0f} s") from None

    async def _download(
        self, peer: Contact, method: str, request: Any, what: str, down: RateLimit
    ) -> SnapshotReceiver:
        wanted: bytes = request.sha256
        incoming = self.incoming()
        session: Metadata = ()
        attempts = busy = 0
        clock = asyncio.get_running_loop().time
        progress_at = clock()
        while True:
            offset = incoming.offset
            try:
                stub, session = await self.stub(peer)
                request.sha256 = incoming.header.sha256 if incoming.header is not None else wanted
                request.offset = incoming.offset
                with while_open():
                    call = getattr(stub, method)(request, timeout=self.limit_s, metadata=session)
                    await _receive(call, incoming, down, what, wanted)
                reason = "the stream ended early"
            except (grpc.aio.AioRpcError, ExpertError) as error:
                status = status_of(error)
                said = str(error) if isinstance(error, ExpertError) else printable(error.details() or "")
                reason = f"{status.name}: {said}"
                busy += status is StatusCode.RESOURCE_EXHAUSTED
                if status is StatusCode.DEADLINE_EXCEEDED and incoming.header is None:
                    raise TransferError(
                        f"{what} did not arrive: {reason}"
                    ) from error  # the peer does not answer
                if status is StatusCode.FAILED_PRECONDITION and incoming.header and not wanted:
                    incoming = self.incoming()  # the snapshot is gone, as after a restart: start over
                elif status not in _PASSING:
                    raise TransferError(f"{what} was refused: {reason}", True) from error
            if incoming.is_whole:
                return incoming
            attempts += 1
            if incoming.offset - offset >= CHUNK_BYTES:
                progress_at = clock()
            is_late = clock() - progress_at > _PATIENCE_S
            if is_late or attempts - busy >= _ATTEMPTS or busy >= _BUSY_ATTEMPTS:
                raise TransferError(f"{what} did not arrive: {reason}", answered=busy > 0)
            await asyncio.sleep(_BACKOFF_S * 2 ** min(attempts - 1, 3))
            self.sessions.ended(
                peer.peer_id, session
            )  # the attempt may have failed because the session had ended


class TransferPace(Pace):
    """How fast a transfer must be at least, in either direction."""

    def __init__(self) -> None:
        super().__init__(LEAST_BYTES_PER_S, GRACE_S)

    async def read(self, message: Awaitable[M], size_of: Callable[[M], int]) -> M:
        """Waits for the next message. Raises TimeoutError if the transfer stalls or is too slow."""
        return await self.wait(message, CHUNK_BYTES, size_of)

    async def write(self, message: Awaitable[M], size: int) -> M:
        """Waits until a message is taken. Raises TimeoutError if the receiver reads too slowly."""
        return await self.wait(message, size, lambda _: size)


class TransferSlots:
    """Limits the transfers in progress, and shares them fairly between groups of peers, and then between the peers in
    each. For one event loop.

    If all slots are taken, the peer with the most, in the group with the most, gives one to a newcomer. If no group or
    peer has more slots than the newcomer's would then have, the newcomer gets the oldest slot, once that transfer has
    had enough time at a fair rate. A transfer that loses its slot may resume later, unless `can_resume` says otherwise.
    """

    def __init__(
        self, most: int, clock: Callable[[], float] = time.monotonic, *, can_resume: bool = True
    ) -> None:
        """`can_resume`: if not, no transfer makes way before it has had enough time, however many its peer has."""
        self._most = most
        self._can_resume = can_resume
        self._clock = clock
        self._taken: dict[object, tuple[Owner, float, Callable[[], None]]] = {}
        """For each slot, its owner, the time after which it has had its share, and what cuts it off; the oldest slot
        first.
        """

    def __len__(self) -> int:
        return len(self._taken)

    @contextmanager
    def taken(self, owner: Owner, size: int) -> Iterator[None]:
        """A slot for a transfer of about `size` bytes by the current task. Raises ExpertError (RESOURCE_EXHAUSTED)."""
        with interruptible(_CUT_OFF) as interrupt:
            if len(self._taken) >= self._most:
                self._cut_one_off(owner)
            enough_at = self._clock() + fair_time_s(size)
            slot = object()
            self._taken[slot] = owner, enough_at, interrupt
            try:
                yield
            finally:
                self._taken.pop(slot, None)

    def has_room_for(self, owner: Owner) -> bool:
        """Whether `taken` would give this owner a slot."""
        return len(self._taken) < self._most or self._victim(owner) is not None

    def _cut_one_off(self, newcomer: Owner) -> None:
        victim = self._victim(newcomer)
        if victim is None:
            message = f"{len(self._taken)} transfers are running here; try again soon"
            raise ExpertError(StatusCode.RESOURCE_EXHAUSTED, message, retry_after_s=_BUSY_S)
        _, _, interrupt = self._taken.pop(victim)
        interrupt()

    def _victim(self, newcomer: Owner) -> object | None:
        """The slot that makes way for the newcomer's. All must be taken."""
        count = Counter(owner for owner, _, _ in self._taken.values())
        of_group = Counter(owner.group for owner, _, _ in self._taken.values())
        now, own, own_group = self._clock(), count[newcomer] + 1, of_group[newcomer.group] + 1

        def may_make_way(owner: Owner) -> bool:
            is_near = owner.group == newcomer.group
            return count[owner] >= own if is_near else of_group[owner.group] >= own_group

        greedy = Displacement(count, newcomer, 1).richest() if self._can_resume else None
        owned = (slot for slot, (owner, _, _) in self._taken.items() if owner == greedy)
        slow = (
            slot
            for slot, (owner, enough_at, _) in self._taken.items()
            if now > enough_at and may_make_way(owner)
        )
        return next(owned if greedy is not None else slow, None)


def fair_time_s(size: int) -> float:
    """How long a transfer of this many bytes may take while others wait."""
    return _FAIR_S + size / _FAIR_BYTES_PER_S


async def receive(
    call: Any,
    incoming: SnapshotReceiver,
    down: RateLimit,
    sha256: bytes = b"",
    begun: Callable[[], None] = lambda: None,
) -> None:
    """Reads all replies of a call. Raises AioRpcError, StateError, and TimeoutError if a reply stalls. `begun` is
    called once a valid header has arrived.
    """
    pace = TransferPace()
    reply = await pace.read(call.read(), _size_of)
    if reply is grpc.aio.EOF or reply.WhichOneof("part") != "header":
        raise StateError("a state must begin with its header")
    incoming.begin(reply.header, sha256)
    begun()
    while (reply := await pace.read(call.read(), _size_of)) is not grpc.aio.EOF:
        incoming.take(reply.chunk)
        await down.take(len(reply.chunk))


async def send(
    context: grpc.aio.ServicerContext[Any, state_pb2.FetchReply],
    header: state_pb2.StateHeader,
    data: Bytes,
    offset: int,
    up: RateLimit,
    count: Callable[[int], None],
) -> None:
    """Answers a call with a snapshot, from an offset on, no faster than `up`. `count` is called with the size of each
    chunk.

    Raises WireError if the offset is past its end, and TimeoutError if the receiver reads too slowly.
    """
    if offset > len(data):
        raise WireError(f"offset {offset} is beyond the {len(data)} bytes of the snapshot")
    pace = TransferPace()
    await pace.write(context.write(state_pb2.FetchReply(header=header)), 0)
    for chunk in chunked(data, offset):
        await up.take(len(chunk))
        await pace.write(context.write(state_pb2.FetchReply(chunk=chunk)), len(chunk))
        count(len(chunk))


def chunked(data: Bytes, offset: int = 0) -> Iterator[bytes]:
    for start in range(offset, len(data), CHUNK_BYTES):
        yield data[start : start + CHUNK_BYTES]


def _size_of(reply: Any) -> int:
    return 0 if reply is grpc.aio.EOF else len(reply.chunk)


async def _receive(call: Any, incoming: SnapshotReceiver, down: RateLimit, what: str, wanted: bytes) -> None:
    try:
        await receive(call, incoming, down, wanted)
    except TimeoutError as error:
        raise TransferError(f"{what} did not arrive: {error}") from None
    finally:
        call.cancel()
