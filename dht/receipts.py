"""Receipts: what a trainer signs for the work that one node has done for it, and how anybody checks that. A receipt has
totals that only grow, and names the swarm, the trainer and the node. So of two receipts, the greater one is the newer
one, whatever any clock says. A node gains nothing if it shows an older receipt again, a receipt twice, or another
node's. A receipt proves who signed it, not that the work was done: two peers that collude can sign anything. The
program that counts receipts decides how far to trust them: see `talkoot.credit`.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import asdict, dataclass
from operator import add

from google.protobuf.message import DecodeError

from peer.errors import RecordError
from peer.formatting import counted
from peer.identity import RECEIPT_DOMAIN, Identity, PeerID, peer_id_of, verify
from peer.wire import admission_pb2, credit_pb2

MAX_RECEIPT_BYTES = 1024
"""The limit for a signed receipt, with the largest badge. A usual one has 460 bytes, or 260 without a badge."""
PAGE = 32
"""How many receipts a node gives in one answer."""
MOST = 2**53
"""The limit for each total. Above it, doubles, and so JSON numbers, are not exact."""


@dataclass(frozen=True, order=True, slots=True)
class Work:
    """The work of a node, as trainers count it. Of the receipts of one trainer, the greatest is the newest."""

    pairs: int = 0
    """Pairs of a row and an expert that were answered in time, forward and backward."""
    updates: int = 0
    """Backward passes of experts that were answered in time."""
    queries: int = 0
    """Queries to memories that were answered."""
    checks_passed: int = 0
    checks_failed: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(*map(add, self._numbers, other._numbers))

    def capped(self) -> "Work":
        """The same work, with each number cut at the limit."""
        return Work(*(min(number, MOST) for number in self._numbers))

    @property
    def is_sane(self) -> bool:
        """Whether it can be an honest trainer's total, in which each update and each check covers some pairs."""
        numbers = self._numbers
        return (
            any(numbers)
            and all(0 <= number <= MOST for number in numbers)
            and max(self.updates, self.checks_passed + self.checks_failed) <= self.pairs
        )

    @property
    def _numbers(self) -> tuple[int, ...]:
        """As `dataclasses.astuple` gives them, which takes ten times as long. Each call of a trainer adds some work."""
        return self.pairs, self.updates, self.queries, self.checks_passed, self.checks_failed

    def message(self) -> credit_pb2.Work:
        return credit_pb2.Work(**asdict(self))

    @classmethod
    def of(cls, message: credit_pb2.Work) -> "Work":
        """The work in a message, unchecked."""
        return cls(
            message.pairs, message.updates, message.queries, message.checks_passed, message.checks_failed
        )


@dataclass(frozen=True)
class SignedWork:
    """The sums of a node's receipts."""

    work: Work = Work()
    trainers: int = 0

    @property
    def in_words(self) -> str:
        """The work, such as `1,234 rows and 5 queries`."""
        rows, queries = counted(self.work.pairs, "row", ","), self.work.queries
        return f"{rows} and {queries:,} {'query' if queries == 1 else 'queries'}" if queries else rows

    def message(self) -> credit_pb2.SignedWork:
        return credit_pb2.SignedWork(work=self.work.message(), trainers=self.trainers)

    @classmethod
    def of(cls, message: credit_pb2.SignedWork) -> "SignedWork":
        """What a node claims. Numbers that are too large are cut at the limit."""
        return cls(Work.of(message.work).capped(), message.trainers)


@dataclass(frozen=True)
class Receipt:
    """A receipt after all checks."""

    trainer: PeerID
    work: Work
    all_pairs: int
    """Pairs that all nodes together have answered for this trainer, according to the trainer."""
    badge: admission_pb2.Badge | None
    """The trainer's badge. Not checked here."""
    signed: credit_pb2.SignedReceipt
    """The signed receipt as it arrived."""


SignerOf = Callable[[Receipt], int | None]
"""Returns the serial of the token that let the trainer sign, as `SwarmAdmission.signer_of` does. Raises RecordError."""


def sign_receipt(
    identity: Identity,
    swarm_id: str,
    node: PeerID,
    work: Work,
    all_pairs: int,
    badge: admission_pb2.Badge | None = None,
) -> credit_pb2.SignedReceipt:
    """This trainer's receipt for a node."""
    receipt = credit_pb2.Receipt(
        swarm_id=swarm_id,
        trainer=identity.peer_id.to_bytes(),
        node=node.to_bytes(),
        work=work.message(),
        all_pairs=all_pairs,
    ).SerializeToString()
    return credit_pb2.SignedReceipt(
        receipt=receipt,
        public_key=identity.public_key,
        signature=identity.sign(receipt, RECEIPT_DOMAIN),
        badge=badge,
    )


def check_receipt(signed: credit_pb2.SignedReceipt, swarm_id: str, node: PeerID) -> Receipt:
    """Parses and verifies a receipt for a node of this swarm. Raises RecordError. The signature is checked last."""
    if signed.ByteSize() > MAX_RECEIPT_BYTES:
        raise RecordError(f"the receipt has {signed.ByteSize()} bytes, more than {MAX_RECEIPT_BYTES}")
    receipt = credit_pb2.Receipt()
    try:
        receipt.ParseFromString(signed.receipt)
    except DecodeError as error:
        raise RecordError("the receipt can't be parsed") from error
    if receipt.swarm_id != swarm_id:
        raise RecordError(f"the receipt is for swarm {receipt.swarm_id[:64]!r}")
    if receipt.node != node.to_bytes():
        raise RecordError("the receipt is for another node")
    trainer = peer_id_of(signed.public_key)
    if receipt.trainer != trainer.to_bytes():
        raise RecordError("the receipt's key is not its trainer's")
    if trainer == node:
        raise RecordError("a peer can't sign for its own work")
    work = Work.of(receipt.work)
    if not work.is_sane or not work.pairs <= receipt.all_pairs <= MOST:
        raise RecordError("the receipt's totals don't fit together, or are too large")
    verify(signed.public_key, signed.receipt, signed.signature, RECEIPT_DOMAIN)
    badge = signed.badge if signed.HasField("badge") else None
    return Receipt(trainer, work, receipt.all_pairs, badge, signed)


def total_of(receipts: Iterable[Receipt]) -> SignedWork:
    """The sum of the receipts, with each total cut at the limit."""
    work, trainers = Work(), 0
    for receipt in receipts:
        work += receipt.work
        trainers += 1
    return SignedWork(work.capped(), trainers)


def largest_crowd(crowds: Mapping[PeerID, Hashable]) -> list[PeerID]:
    """The trainers of the largest crowd, or of several if they are equally large. If there are too many trainers, one
    of these is removed, so somebody with many keys only displaces their own.
    """
    sizes = Counter(crowds.values())
    most = max(sizes.values())
    return [trainer for trainer, crowd in crowds.items() if sizes[crowd] == most]


def in_turns(trainers: Iterable[PeerID], crowds: Mapping[PeerID, Hashable]) -> list[PeerID]:
    """The first trainer of each crowd, then the second of each, and so on; in the given order within each turn."""
    turns, ordered = Counter[Hashable](), list[tuple[int, PeerID]]()
    for trainer in trainers:
        crowd = crowds[trainer]
        ordered.append((turns[crowd], trainer))
        turns[crowd] += 1
    return [trainer for _, trainer in sorted(ordered, key=lambda each: each[0])]
