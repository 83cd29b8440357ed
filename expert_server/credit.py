"""What trainers have signed for this node: the newest receipt of each, kept on disk, and the service that accepts and
returns receipts.
"""

import asyncio
import logging
import time
from collections import Counter as Multiset
from collections.abc import Collection, Hashable, Iterable
from itertools import islice
from pathlib import Path

import grpc
from google.protobuf.message import DecodeError
from grpc import StatusCode
from prometheus_client import CollectorRegistry, Counter

from dht.receipts import (
    MAX_RECEIPT_BYTES,
    PAGE,
    Receipt,
    SignedWork,
    SignerOf,
    Work,
    check_receipt,
    in_turns,
    largest_crowd,
    total_of,
)
from dht.records import parse_peer_id
from peer.bounded import BoundedDict
from peer.errors import ExpertError, RecordError, WireError
from peer.files import read_state_file, write_state_file
from peer.formatting import counted
from peer.identity import PeerID
from peer.loop import to_thread_whole
from peer.metrics import start_at_zero
from peer.rates import FairTurns, RateLimit, TokenBuckets
from peer.rpc.calls import abort_on_error, require_same_swarm
from peer.rpc.connections import origin_of
from peer.rpc.sessions import Sessions
from peer.wire import credit_pb2, credit_pb2_grpc, session_pb2

logger: logging.Logger = logging.getLogger(__name__)

MAX_TRAINERS = 512
"""Trainers whose receipts a node keeps. Beyond that, the token or neighbourhood with the most trainers loses the
receipt for the least work.
"""
SLACK = 65_536
"""This node accepts receipts for at most twice the work that it remembers. All trainers together may exceed that by
this many pairs or queries, because a node that was killed has forgotten what it did since its last save.
"""
_CALLERS = 4096
"""Callers whose work is remembered."""
_CALLERS_SAVED = 1024
"""Of these, the callers whose work is remembered after a crash: those who called last."""
_MAX_FILE_BYTES = MAX_TRAINERS * (MAX_RECEIPT_BYTES + 8) + _CALLERS_SAVED * 128
_GIVEN_EVERY_S, _GIVEN_AT_ONCE = 30.0, 4
"""How often a trainer may hand in a receipt, and how many at once after a pause."""
_LISTS_PER_S, _LISTS_AT_ONCE = 4.0, 16
_MAX_CALL_S = 10.0
_NOTHING = Work()


class ReceiptBook:
    """The newest receipt of each trainer, as one node keeps them. Does no I/O."""

    def __init__(
        self,
        swarm_id: str,
        node: PeerID,
        signer_of: SignerOf = lambda receipt: None,
        most: int = MAX_TRAINERS,
    ) -> None:
        """`signer_of`: returns whose token lets a trainer sign; None: anybody may."""
        self.has_changed: bool = False
        """Whether the book has changed since it was saved."""
        self.swarm_id = swarm_id
        self._signer_of = signer_of
        self._node = node
        self._most = most
        self._receipts: dict[PeerID, Receipt] = {}
        self._crowds: dict[PeerID, Hashable] = {}
        """The token or the neighbourhood of each receipt's trainer. For receipts of an earlier run without tokens, the
        trainer itself.
        """
        self._left_out: set[PeerID] = set()
        """Trainers whose receipts don't count, because their token was revoked. The receipts are kept: if a trainer
        continues with another token, its next one covers its earlier work too.
        """
        self.forgotten: Work = Work()
        """The work that the node had done when it lost its receipts. A trainer's first receipt may include that much.
        """
        self._slack = Multiset(pairs=SLACK, queries=SLACK)
        """How much of the slack is left in this run."""
        self._served = BoundedDict[PeerID, Work](_CALLERS)
        """The work done for each caller since its last receipt."""
        self._ordered: list[Receipt] | None = None
        self._signed: SignedWork | None = SignedWork()
        """None: to be summed again when it is asked for."""

    @property
    def signed(self) -> SignedWork:
        """The sum of all receipts that count."""
        if self._signed is None:
            self._signed = total_of(self._counting)
        return self._signed

    def note_revoked(self, serials: Collection[Hashable]) -> None:
        """Receipts of these tokens no longer count, here as for others who read them."""
        self._leave_out(trainer for trainer, crowd in self._crowds.items() if crowd in serials)

    def _leave_out(self, trainers: Iterable[PeerID]) -> None:
        """Tells the owner what no longer counts."""
        gone = set(trainers) - self._left_out
        if gone:
            self._left_out |= gone
            self._signed = self._ordered = None
            logger.warning(
                "the founder has revoked the invites of %s that had signed for %s, which no longer counts as signed "
                "for. What this node counted itself stays",
                counted(len(gone), "caller", ","),
                total_of(self._receipts[trainer] for trainer in gone).in_words,
            )

    @property
    def _counting(self) -> list[Receipt]:
        return [each for trainer, each in self._receipts.items() if trainer not in self._left_out]

    def note_served(self, caller: PeerID, work: Work) -> None:
        """Records work done for a caller, which may sign for it from now on."""
        self._served[caller] = self._served.get(caller, Work()) + work
        self.has_changed = True

    def take(self, receipt: Receipt, near: str = "") -> bool:
        """Keeps a receipt if it is newer than its trainer's last one. Returns whether it was kept.

        `near`: the neighbourhood that it came from. Raises ExpertError (FAILED_PRECONDITION) if this node can't have
        done that work, and RecordError if the trainer may not sign.
        """
        signer = self._signer_of(receipt)
        held = self._receipts.get(receipt.trainer)
        before = Work() if held is None else held.work
        if receipt.work <= before:
            return False
        self.require_served(receipt.trainer)
        answered = self._served.get(receipt.trainer, Work())
        over = dict[str, int]()
        for name in ("pairs", "queries"):
            # twice, to cover what the node forgot when it was killed
            expected = 2 * getattr(answered, name) + (getattr(self.forgotten, name) if held is None else 0)
            over[name] = max(0, getattr(receipt.work, name) - getattr(before, name) - expected)
            if over[name] > self._slack[name]:
                raise ExpertError(
                    StatusCode.FAILED_PRECONDITION,
                    f"the receipt is for more {name} than this node has answered to you",
                )
        self._keep(receipt, signer, near)
        if receipt.trainer not in self._receipts:
            return False
        self._slack.subtract(over)
        self._served[receipt.trainer] = Work()
        return True

    def require_served(self, trainer: PeerID) -> None:
        """Raises ExpertError (FAILED_PRECONDITION) if this node has done no work for the trainer."""
        if trainer not in self._receipts and trainer not in self._served:
            raise ExpertError(
                StatusCode.FAILED_PRECONDITION, "you have not called this node since it started"
            )

    def check(self, signed: credit_pb2.SignedReceipt) -> Receipt:
        """Raises RecordError if this is not a receipt for this node that its trainer has signed."""
        return check_receipt(signed, self.swarm_id, self._node)

    def page(self, offset: int) -> credit_pb2.ListReply:
        """A page of the receipts that count, from this offset on. Tokens or neighbourhoods take turns, each with its
        largest receipts first.
        """
        if self._ordered is None:
            by_work = [receipt.trainer for receipt in sorted(self._counting, key=_most_first)]
            self._ordered = [self._receipts[trainer] for trainer in in_turns(by_work, self._crowds)]
        some = self._ordered[offset : offset + PAGE]
        return credit_pb2.ListReply(receipts=(receipt.signed for receipt in some), total=len(self._ordered))

    def serialize(self) -> bytes:
        """All receipts, and the work for which there is none yet, for `restore`."""
        last = islice(reversed(self._served.items()), _CALLERS_SAVED)
        return credit_pb2.SavedReceipts(
            receipts=(receipt.signed for receipt in self._receipts.values()),
            unsigned=(
                credit_pb2.UnsignedWork(caller=caller.to_bytes(), work=work.capped().message())
                for caller, work in [*last][::-1]
                if work != _NOTHING
            ),
        ).SerializeToString()

    def restore(self, data: bytes) -> int:
        """Restores what was saved, and returns how many receipts there are. Raises RecordError if anything is wrong."""
        try:
            saved = credit_pb2.SavedReceipts.FromString(data)
            unsigned = {
                parse_peer_id(each.caller): Work.of(each.work) for each in saved.unsigned[:_CALLERS_SAVED]
            }
        except (DecodeError, WireError) as error:
            raise RecordError("it can't be parsed") from error
        revoked = []
        for signed in saved.receipts[: self._most]:
            receipt = self.check(signed)
            try:
                signer = self._signer_of(receipt)
            except RecordError:  # its token has been revoked since
                revoked.append(receipt.trainer)
                signer = None
            self._keep(receipt, signer)
        self._leave_out(trainer for trainer in revoked if trainer in self._receipts)
        self._served.update(unsigned)
        self.has_changed = False
        return len(self._receipts)

    def _keep(self, receipt: Receipt, signer: int | None, near: str = "") -> None:
        self._left_out.discard(receipt.trainer)
        self._receipts[receipt.trainer] = receipt
        self._crowds[receipt.trainer] = (near or receipt.trainer) if signer is None else signer
        if len(self._receipts) > self._most:
            crowded = largest_crowd(self._crowds)
            least = max(crowded, key=lambda trainer: _most_first(self._receipts[trainer]))
            del self._receipts[least], self._crowds[least]
            self._left_out.discard(least)
        self._signed, self._ordered, self.has_changed = None, None, True


def _most_first(receipt: Receipt) -> tuple[int, int, bytes]:
    return -receipt.work.pairs, -receipt.work.queries, receipt.trainer.to_bytes()


class ReceiptFile:
    """A node's receipts on disk."""

    def __init__(self, path: Path, book: ReceiptBook) -> None:
        self._path = path
        self._book = book

    async def open(self, done: Work = _NOTHING) -> None:
        """Reads the file. If it is missing or broken, there are no receipts: trainers that are still active sign again.

        `done`: the node's own count of its work.
        """
        saved = await asyncio.to_thread(
            read_state_file, self._path, _MAX_FILE_BYTES, self._book.restore, "trainers must sign again"
        )
        if saved is None:
            self._book.forgotten = done

    async def save(self) -> None:
        """Writes the file if there are changes."""
        if not self._book.has_changed:
            return
        data, self._book.has_changed, is_saved = self._book.serialize(), False, False
        try:
            is_saved = await to_thread_whole(
                write_state_file, self._path, data, "after a restart, the newest receipts are missing"
            )
        finally:  # also if it is cancelled
            self._book.has_changed |= not is_saved

    async def save_every(self, seconds: float) -> None:
        """Saves until cancelled."""
        while True:
            await asyncio.sleep(seconds)
            await self.save()


Context = grpc.aio.ServicerContext[credit_pb2.SignedReceipt, credit_pb2.GiveReply]
ListContext = grpc.aio.ServicerContext[credit_pb2.ListRequest, credit_pb2.ListReply]


class CreditServicer(credit_pb2_grpc.CreditServiceServicer):
    """Accepts receipts from trainers, and returns them to anybody who asks."""

    def __init__(
        self,
        book: ReceiptBook,
        sessions: Sessions,
        up: RateLimit,
        metrics: CollectorRegistry | None = None,
    ) -> None:
        """`up`: limits the upload of answers."""
        outcomes = Counter(
            "talkoot_receipts", "Receipts that trainers gave, by outcome.", ["outcome"], registry=metrics
        )
        self.outcomes: Counter = start_at_zero(outcomes, "kept", "old", "refused")
        self._book = book
        self._sessions = sessions
        self._up = up
        self._given = TokenBuckets[PeerID](1 / _GIVEN_EVERY_S, _GIVEN_AT_ONCE, _CALLERS)
        self._lists = FairTurns(_LISTS_PER_S, _LISTS_AT_ONCE)

    async def Give(self, request: credit_pb2.SignedReceipt, context: Context) -> credit_pb2.GiveReply:
        outcome = "refused"
        try:
            async with abort_on_error(context):
                rights = session_pb2.RIGHT_FORWARD, session_pb2.RIGHT_MEMORY
                caller = self._sessions.require(context, *rights).caller
                kept = self._take(request, caller, origin_of(context.peer()))
                outcome = "kept" if kept else "old"
                return credit_pb2.GiveReply(kept=kept)
        finally:
            self.outcomes.labels(outcome).inc()
        raise AssertionError("abort raises")

    async def List(self, request: credit_pb2.ListRequest, context: ListContext) -> credit_pb2.ListReply:
        async with abort_on_error(
            context, _MAX_CALL_S, "too many callers are asking for receipts: try again later"
        ):
            require_same_swarm(self._book.swarm_id, request.protocol_version, request.swarm_id)
            if not await self._lists.turn(origin_of(context.peer()), context.peer()):
                raise ExpertError(
                    StatusCode.RESOURCE_EXHAUSTED,
                    "too many callers are asking for receipts: try again later",
                    1.0,
                )
            reply = self._book.page(request.offset)
            await self._up.take(reply.ByteSize())
            return reply
        raise AssertionError("abort raises")

    def _take(self, signed: credit_pb2.SignedReceipt, caller: PeerID, near: str) -> bool:
        """Raises ExpertError and WireError."""
        now = time.monotonic()
        if wait_s := self._given.wait_s(caller, now):
            raise ExpertError(StatusCode.RESOURCE_EXHAUSTED, "receipts come too often", wait_s)
        self._given.take(caller, 1, now)
        self._book.require_served(caller)  # checked before signatures, which take longer
        try:
            receipt = self._book.check(signed)
            if receipt.trainer != caller:
                raise RecordError("the receipt is from another trainer")
            return self._book.take(receipt, near)
        except RecordError as error:
            raise WireError(str(error)) from error
