"""One trainer's side of a meeting, whoever began it: its dense part as it goes out, and what becomes of the other's."""

import asyncio
import hashlib
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from grpc import StatusCode
from hivemind.p2p import PeerID

from peer.errors import ExpertError, StateError
from peer.averaging import Meetings, their_share
from peer.rpc.transfer import Incoming, Snapshots
from peer.wire import state_pb2
from trainer_client.dispatch.policy import CircuitBreakers
from trainer_client.dense import MAX_AGE, DenseForm, Tensors, require_near
from trainer_client.averaging.dense_part import DensePart, Merge, SharedPart

logger = logging.getLogger(__name__)

_KEPT = 2
_KEPT_S = 300.0
"""How long a snapshot is kept for those who were cut off."""
_LEFT_ALONE_S, _LONGEST_LEFT_ALONE_S = 10.0, 900.0


@dataclass
class AveragingCounts:
    """Counts since the start."""

    averaged: int = 0
    refused: int = 0
    """Dense parts of others that were broken, or too far from one's own."""
    failed: int = 0
    """Exchanges that this trainer began and that broke off, or to which nobody answered."""
    given: int = 0
    """Times that others took the dense part to begin with."""
    bytes_sent: int = 0
    bytes_received: int = 0


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The dense part as it goes to others."""

    key: bytes
    """The fingerprint of its form."""
    part: DensePart
    met: Mapping[PeerID, int]
    """Whom this trainer had met at that moment, and how old both were then."""
    data: bytes
    sha256: bytes
    expires_at: float

    def header(self, peer_id: PeerID | None = None) -> state_pb2.StateHeader:
        """For the peer that gets it."""
        return state_pb2.StateHeader(
            update_count=self.part.age,
            total_bytes=len(self.data),
            sha256=self.sha256,
            met_update_count=0 if peer_id is None else self.met.get(peer_id, 0),
        )


@dataclass(frozen=True, eq=False)
class Theirs:
    """Another trainer's dense part, looked through."""

    tensors: Tensors
    age: int
    difference: float


class Meeting:
    """What a trainer has for its meetings, of which one is at a time. For the loop's thread."""

    def __init__(
        self, form: DenseForm, part: SharedPart, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.form = form
        self.part = part
        self.counts = AveragingCounts()
        self.breakers = CircuitBreakers(_LEFT_ALONE_S, _LONGEST_LEFT_ALONE_S)
        self.clock = clock
        self.ended_at_step = 0
        """Steps of this trainer when its last meeting ended, whoever began it."""
        self.is_on = False
        self._meetings: Meetings[bytes] = Meetings(clock)
        self._snapshots: Snapshots[Snapshot] = Snapshots(_KEPT, _KEPT_S)

    def begin(self) -> None:
        """Raises ExpertError (RESOURCE_EXHAUSTED) while another meeting is on."""
        if self.is_on:
            raise ExpertError(
                StatusCode.RESOURCE_EXHAUSTED, "this trainer averages with another; try again soon"
            )
        self.is_on = True

    def end(self) -> None:
        self.is_on = False
        self.ended_at_step = self.part.steps

    async def snapshot(self) -> Snapshot:
        """Of the dense part as it is now."""
        met = self._meetings.of(self.form.fingerprint)
        part, data, sha256 = await asyncio.to_thread(self._pack)
        expires_at = self.clock() + _KEPT_S
        return Snapshot(self.form.fingerprint, part, met, data, sha256, expires_at)

    async def kept_snapshot(self, sha256: bytes) -> Snapshot:
        """One that was begun before, or one of now when `sha256` is empty; it is kept for whoever is cut off.

        Raises ExpertError (FAILED_PRECONDITION) when it is kept no more.
        """
        if sha256:
            found = self._snapshots.find(self.form.fingerprint, sha256, self.clock())
            if found is None:
                raise ExpertError(
                    StatusCode.FAILED_PRECONDITION, "that snapshot is kept no more: begin anew without one"
                )
            return found
        for kept in self._snapshots.all(self.clock()):
            if kept.part.age == self.part.age and kept.met == self._meetings.of(self.form.fingerprint):
                return kept
        snapshot = await self.snapshot()
        self._snapshots.put(snapshot, self.clock())
        return snapshot

    async def look_through(self, mine: DensePart, incoming: Incoming) -> Theirs:
        """Raises StateError when what came is not to be averaged with."""
        return await asyncio.to_thread(self._open, mine, incoming)

    def refuse(self, peer_id: PeerID, error: StateError) -> None:
        """That trainer is left alone for a while, each time longer."""
        self.counts.refused += 1
        self.leave_alone(peer_id)
        logger.warning("passing over the dense part of trainer %s: %s", peer_id, error)

    def leave_alone(self, peer_id: PeerID) -> None:
        """For a while, each time longer."""
        self.breakers.failed(peer_id, self.clock())

    async def merge(self, base: Snapshot, theirs: Theirs, met_update_count: int, peer_id: PeerID) -> Merge:
        """Waits for the end of the next step."""
        met = max(base.met.get(peer_id, 0), met_update_count)
        their_age = self._meetings.believed(self.form.fingerprint, base.part.age, theirs.age)
        share = their_share(base.part.age, their_age, met)
        done = self.part.merge(
            peer_id.to_base58(), base.part, theirs.tensors, their_age, share, theirs.difference
        )
        merge = await asyncio.wrap_future(done)
        self._meetings.note(self.form.fingerprint, peer_id, max(base.part.age, their_age))
        self.breakers.succeeded(peer_id)
        self.counts.averaged += 1
        return merge

    def incoming(self) -> Incoming:
        return Incoming(self.form.max_bytes, self.count_received)

    def count_received(self, size: int) -> None:
        self.counts.bytes_received += size

    def _pack(self) -> tuple[DensePart, bytes, bytes]:
        part = self.part.read()
        data = self.form.to_bytes(part.tensors, part.age)
        return part, data, hashlib.sha256(data).digest()

    def _open(self, mine: DensePart, incoming: Incoming) -> Theirs:
        header, data = incoming.whole()
        tensors = self.form.from_bytes(data, header.update_count)
        difference = require_near(mine.tensors, tensors)
        return Theirs(tensors, min(header.update_count, MAX_AGE), difference)
