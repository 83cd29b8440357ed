"""The work of nodes that trainers have signed for: receipts are read from nodes, verified, and counted. Receipts that
were read once stay counted, as long as there is room, so a node that loses its receipts keeps its credit.

In a swarm that admits by token, each token that has signed is one vote. A vote is split between nodes in proportion to
the work that the token's trainers have signed for, however large the numbers. So if k of N tokens collude, they direct
at most k / N of all credit. In an open swarm anybody can be as many trainers as they like, so there are only counts and
no shares.
"""

import asyncio
import hashlib
import logging
import random
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Self

import grpc

from dht.admission import SwarmAdmission
from dht.announcements import NodeInfo
from dht.receipts import MAX_RECEIPT_BYTES, PAGE, SignedWork, SignerOf, Work, check_receipt, largest_crowd
from dht.swarm import Swarm
from peer import PROTOCOL_VERSION
from peer.bounded import BoundedDict
from peer.errors import ExpertError, RecordError, UnreachableError
from peer.formatting import printable
from peer.identity import PeerID
from peer.loop import TimeSlices
from peer.parsing import ParseGuard
from peer.rpc.calls import make_stub, while_open
from peer.rpc.channels import ChannelPool
from peer.wire import credit_pb2, credit_pb2_grpc

logger: logging.Logger = logging.getLogger(__name__)

MAX_RECEIPTS = 131_072
"""The most receipts kept over all nodes, about 0.4 KB each. Those that were read longest ago are dropped first."""
MAX_OF_NODE = 64
"""The most receipts kept for one node. If there are more, the token with the most trainers loses its smallest receipt.
"""
MAX_SIGNERS = 16
"""The most signers that are named for one node."""
_NODES = 20_000
_AT_ONCE = 8
_DEADLINE_S = 5.0
"""The deadline for reading the receipts of one node."""
_AGAIN_S = 60.0
"""The pause before a node is asked again."""
_CHANNELS = 64


@dataclass(frozen=True)
class Credit:
    """The work that others have signed for one node."""

    work: Work
    trainers: int
    signers: tuple[tuple[PeerID, Work], ...]
    """The trainers who signed for the most work, with how much each."""
    share: float | None
    """The node's share of what all tokens give to nodes, each in proportion to signed work; None in an open swarm."""


_NOTHING = Credit(Work(), 0, (), None)


def signed_figures(node: NodeInfo, credit: Credit | None) -> dict[str, int | float | None]:
    """The work that others have signed for a node, for programs. None if the node's receipts were not read."""
    if credit is None:
        work, trainers = (Work(), 0) if not node.signed.trainers else (None, None)
    else:
        work, trainers = credit.work, credit.trainers
    return {
        "signed_pairs": None if work is None else work.pairs,
        "signed_updates": None if work is None else work.updates,
        "signed_queries": None if work is None else work.queries,
        "checks_passed": None if work is None else work.checks_passed,
        "checks_failed": None if work is None else work.checks_failed,
        "signed_trainers": trainers,
        "signed_share": None if credit is None else credit.share,
    }


@dataclass(frozen=True, slots=True)
class _Counted:
    """The part of a receipt that is stored."""

    work: Work
    all_pairs: int
    signer: int | None
    digest: bytes
    """The digest of the whole receipt, so that it is not verified twice."""


class CreditLedger:
    """The newest receipt of each trainer for each node, verified. Does no I/O."""

    def __init__(self, swarm_id: str, signer_of: SignerOf, most: int = MAX_RECEIPTS) -> None:
        """`most`: how many receipts to keep."""
        self.has_changed: bool = False
        """Whether the ledger has changed since the last count."""
        self._swarm_id = swarm_id
        self._signer_of = signer_of
        self._most = most
        self._nodes: OrderedDict[PeerID, dict[PeerID, _Counted]] = OrderedDict()
        """Counted receipts of each node; the nodes that were read longest ago come first."""
        self._count = 0

    def __len__(self) -> int:
        return self._count

    async def take(self, node: PeerID, given: Iterable[credit_pb2.SignedReceipt]) -> None:
        """Verifies a node's receipts, and keeps those that are newer than the known ones."""
        known = {counted.digest: trainer for trainer, counted in self._nodes.get(node, {}).items()}
        listed, new, slices = set[PeerID](), list[tuple[PeerID, _Counted]](), TimeSlices()
        for signed in given:
            await slices.pause()
            digest = hashlib.blake2b(signed.SerializeToString(), digest_size=16).digest()
            if digest in known:
                listed.add(known[digest])
                continue
            try:
                receipt = check_receipt(signed, self._swarm_id, node)
                counted = _Counted(receipt.work, receipt.all_pairs, self._signer_of(receipt), digest)
            except RecordError as error:
                logger.debug("a receipt of node %s does not count: %s", node, error)
                continue
            listed.add(receipt.trainer)
            new.append((receipt.trainer, counted))
        kept = self._nodes.setdefault(node, {})
        self._nodes.move_to_end(node)
        for trainer, counted in new:
            self._keep(kept, trainer, counted)
        self._trim(kept, listed)
        if not kept:
            del self._nodes[node]
        while self._count > self._most and len(self._nodes) > 1:
            self._count -= len(self._nodes.popitem(last=False)[1])

    def _keep(self, kept: dict[PeerID, _Counted], trainer: PeerID, counted: _Counted) -> None:
        before = kept.get(trainer)
        if before is not None and counted.work <= before.work:
            return
        self.has_changed = True
        self._count += before is None
        kept[trainer] = counted

    def _trim(self, kept: dict[PeerID, _Counted], listed: Collection[PeerID]) -> None:
        """Removes receipts if there are too many. `listed`: the trainers in the node's present list, which starts with
        trainers that don't share a neighbourhood with many others.
        """
        while len(kept) > MAX_OF_NODE:
            crowded = largest_crowd({each: counted.signer for each, counted in kept.items()})
            del kept[min(crowded, key=lambda each: (each in listed, kept[each].work, each.to_bytes()))]
            self._count -= 1

    def count(self, revoked: Collection[int] = ()) -> dict[PeerID, Credit]:
        """The credit of each node. Work that was signed with a `revoked` token does not count."""
        self.has_changed = False
        valid = {
            node: [(trainer, each) for trainer, each in kept.items() if each.signer not in revoked]
            for node, kept in self._nodes.items()
        }
        votes = _pairs_of_votes(valid.values())
        return {node: _credit(found, votes) for node, found in valid.items() if found}


Signed = Collection[tuple[PeerID, _Counted]]
"""Receipts for one node, with their trainers."""


def _pairs_of_votes(of_nodes: Iterable[Signed]) -> dict[int, int]:
    """For each token, the pairs that all nodes have answered according to its trainers, but at least the pairs in the
    known receipts.
    """
    claimed: dict[tuple[int, PeerID], int] = {}
    found: dict[tuple[int, PeerID], int] = {}
    for signed in of_nodes:
        for trainer, each in signed:
            if each.signer is not None and each.work.pairs:
                key = each.signer, trainer
                claimed[key] = max(claimed.get(key, 0), each.all_pairs)
                found[key] = found.get(key, 0) + each.work.pairs
    votes: dict[int, int] = {}
    for key, pairs in found.items():
        votes[key[0]] = votes.get(key[0], 0) + max(pairs, claimed[key])
    return votes


def _credit(signed: Signed, votes: Mapping[int, int]) -> Credit:
    work, share, is_weighted = Work(), 0.0, False
    for _, each in signed:
        work += each.work
        if each.signer is not None:
            is_weighted = True
            share += each.work.pairs / votes[each.signer] / len(votes) if each.work.pairs else 0.0
    most = sorted(signed, key=lambda each: (-each[1].work.pairs, -each[1].work.queries))[:MAX_SIGNERS]
    signers = tuple((trainer, each.work) for trainer, each in most)
    return Credit(work.capped(), len(signed), signers, share if is_weighted else None)


class CreditReader:
    """Reads the receipts of a swarm's nodes, some at a time, and counts them."""

    def __init__(
        self,
        swarm_id: str,
        admission: SwarmAdmission,
        channels: ChannelPool,
        guard: ParseGuard,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`channels`: closed together with it."""
        self.credit: Mapping[PeerID, Credit] = {}
        """The credit according to the last count, of all nodes that answered."""
        self._counted: Mapping[PeerID, Credit] = {}
        """The same, of nodes with receipts that count."""
        self._swarm_id = swarm_id
        self._admission = admission
        self._channels = channels
        self._guard = guard
        self._clock = clock
        self._rng = random.SystemRandom()
        self._ledger = CreditLedger(
            swarm_id, lambda receipt: admission.signer_of(receipt.trainer, receipt.badge)
        )
        self._tried = BoundedDict[PeerID, tuple[float, SignedWork | None]](_NODES)
        """When each node was asked last, and what it announced about itself then; None: it did not answer."""
        self._taking = asyncio.Lock()
        self._revoked: frozenset[int] = frozenset()

    @classmethod
    def of(cls, swarm: Swarm) -> Self:
        return cls(swarm.keys.swarm_id, swarm.admission, swarm.host.channels(_CHANNELS), swarm.guard)

    async def read(self, nodes: Collection[NodeInfo], most: int, deadline_s: float) -> None:
        """Reads the receipts of at most this many nodes, and counts again if any are new."""
        due = self._due(nodes, most)
        at_once = asyncio.Semaphore(_AT_ONCE)
        try:
            async with asyncio.timeout(deadline_s):
                await asyncio.gather(*(self._read(node, at_once) for node in due))
        except TimeoutError:
            logger.debug("some nodes have not sent their receipts within %.0f s", deadline_s)
        revoked = self._admission.revoked
        if self._ledger.has_changed or revoked != self._revoked:
            self._revoked = revoked
            self._counted = await asyncio.to_thread(self._ledger.count, revoked)
        answered = [peer_id for peer_id, (_, said) in self._tried.items() if said is not None]
        self.credit = {**dict.fromkeys(answered, _NOTHING), **self._counted}

    async def close(self) -> None:
        await self._channels.close()

    def _due(self, nodes: Collection[NodeInfo], most: int) -> list[NodeInfo]:
        """Nodes that announce receipts which are not known yet, those asked longest ago first."""
        found, now = list[tuple[float, float, NodeInfo]](), self._clock()
        for node in nodes:
            tried_at, said = self._tried.get(node.peer_id, (float("-inf"), None))
            if node.signed.trainers and node.signed != said and now - tried_at >= _AGAIN_S:
                found.append((tried_at, self._rng.random(), node))
        return [node for _, _, node in sorted(found, key=lambda each: each[:2])[:most]]

    async def _read(self, node: NodeInfo, at_once: asyncio.Semaphore) -> None:
        async with at_once:
            self._tried[node.peer_id] = self._clock(), None
            receipts = list[credit_pb2.SignedReceipt]()
            try:
                async with asyncio.timeout(_DEADLINE_S):
                    with while_open():
                        stub = make_stub(
                            credit_pb2_grpc.CreditServiceStub,
                            await self._channels.reach(node),
                            most_bytes=PAGE * (MAX_RECEIPT_BYTES + 8) + 16,
                        )
                        for offset in range(0, MAX_OF_NODE, PAGE):
                            reply = await stub.List(
                                credit_pb2.ListRequest(
                                    protocol_version=PROTOCOL_VERSION,
                                    swarm_id=self._swarm_id,
                                    offset=offset,
                                ),
                                timeout=_DEADLINE_S,
                            )
                            receipts.extend(reply.receipts[:PAGE])
                            if offset + PAGE >= reply.total:
                                break
            except grpc.aio.AioRpcError as error:
                said = printable(error.details() or "")
                logger.debug(
                    "could not get the receipts of node %s: %s: %s", node.peer_id, error.code().name, said
                )
                return
            except (ExpertError, UnreachableError, TimeoutError) as error:
                logger.debug("could not get the receipts of node %s: %s", node.peer_id, error)
                return
            # one node's at a time, so that other tasks wait for no more than one slice of this
            async with self._taking:
                with suppress(RecordError), self._guard.guarding("receipt", node.peer_id, RecordError):
                    await self._ledger.take(node.peer_id, receipts)
            self._tried[node.peer_id] = self._clock(), node.signed
