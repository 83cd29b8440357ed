"""What nodes have done for this trainer, and the receipts that it signs for their work.

Code that uses an answer in time records it in the `CreditAccounts`. `ReceiptSender` signs for new work, at most once a
minute for each node, and sends the receipt in the session that the trainer has with the node anyway.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Annotated

import grpc
from grpc import StatusCode
from prometheus_client import CollectorRegistry, Counter
from pydantic import BaseModel, ConfigDict, Field

from dht.announcements import NodeInfo
from dht.receipts import MOST, Work, sign_receipt
from peer.bounded import BoundedDict
from peer.errors import ExpertError, UnreachableError
from peer.files import read_state_file, write_state_file
from peer.formatting import printable
from peer.identity import Identity, PeerID
from peer.loop import to_thread_whole
from peer.metrics import start_at_zero
from peer.rpc.calls import make_stub, while_open
from peer.rpc.channels import ChannelPool
from peer.rpc.sessions import Admission, SessionClient
from peer.wire import credit_pb2_grpc

logger: logging.Logger = logging.getLogger(__name__)

MAX_NODES = 1024
"""How many accounts are kept: those of the nodes that worked last."""
EVERY_S = 60.0
"""The pause between two receipts for one node."""
_LOOK_EVERY_S = 10.0
_AT_ONCE = 16
_DEADLINE_S = 10.0
_FAREWELL_S = 2.0
"""How long a leaving trainer hands out receipts."""
_MAX_FILE_BYTES = 512 * 1024
_Total = Annotated[int, Field(ge=0, le=MOST)]


class _Saved(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    all_pairs: _Total
    nodes: Annotated[dict[str, tuple[_Total, _Total, _Total, _Total, _Total]], Field(max_length=MAX_NODES)]
    """For each node's PeerID, its totals in the order of `Work`."""


@dataclass
class _Account:
    work: Work
    signed: Work
    """The work in the last receipt, or the work at the trainer's start."""
    saved: Work = field(default_factory=Work)
    """The work as it was last saved. A receipt never states more. Otherwise, a trainer that was killed could later
    count less than it has signed.
    """
    node: NodeInfo | None = None
    """The node's record when it was last called in this run."""
    tried_at: float = float("-inf")
    takes_none: bool = False
    """Whether the node is of a release without receipts."""


class CreditAccounts:
    """The work of each node for this trainer, over all its runs. For the loop's thread."""

    def __init__(self, path: Path | None = None) -> None:
        """`path`: the file for the accounts; None: no file."""
        self._path = path
        self._accounts = BoundedDict[PeerID, _Account](MAX_NODES)
        self.all_pairs: int = 0
        """Pairs that all nodes have answered, including nodes that have been forgotten."""
        self._has_changed = False

    def note(
        self,
        node: NodeInfo,
        *,
        pairs: int = 0,
        updates: int = 0,
        queries: int = 0,
        checks_passed: int = 0,
        checks_failed: int = 0,
    ) -> None:
        """Adds new work of a node, with the fields of `Work`."""
        work = Work(pairs, updates, queries, checks_passed, checks_failed)
        if work == Work():
            return
        account = self._accounts.get(node.peer_id) or _Account(Work(), Work())
        account.work, account.node = (account.work + work).capped(), node
        self._accounts[node.peer_id] = account
        self.all_pairs = min(self.all_pairs + pairs, MOST)
        self._has_changed = True

    def due(self, before: float) -> Iterable[tuple[NodeInfo, _Account]]:
        """Nodes with saved but unsigned work that have had no receipt since that time, the longest ago first."""
        found = [
            (account.node, account)
            for account in self._accounts.values()
            if account.node is not None
            and account.tried_at <= before
            and account.saved.is_sane
            and account.saved > account.signed
            and not account.takes_none
        ]
        return sorted(found, key=lambda each: each[1].tried_at)

    async def open(self) -> None:
        """Reads the file. If it is missing or broken, counting starts over."""
        if self._path is None:
            return
        saved = await asyncio.to_thread(
            read_state_file, self._path, _MAX_FILE_BYTES, _parsed, "credit is counted from 0 again"
        )
        if saved is not None:
            self.all_pairs, works = saved
            for peer_id, work in works.items():
                self._accounts[peer_id] = _Account(work, work)

    async def save(self) -> None:
        """Writes the file. If that fails, nothing new is signed."""
        works = {peer_id: account.work for peer_id, account in self._accounts.items()}
        if self._path is not None and self._has_changed:
            nodes = {peer_id.to_base58(): astuple(work) for peer_id, work in works.items()}
            data = _Saved(all_pairs=self.all_pairs, nodes=nodes).model_dump_json().encode()
            self._has_changed, is_saved = False, False
            try:
                is_saved = await to_thread_whole(
                    write_state_file, self._path, data, "nothing new is signed for nodes until that works"
                )
            finally:  # also if it is cancelled
                self._has_changed |= not is_saved
            if not is_saved:
                return
        for peer_id, account in self._accounts.items():
            account.saved = works.get(peer_id, account.saved)


def _parsed(data: bytes) -> tuple[int, dict[PeerID, Work]]:
    """The pairs of all nodes, and the work of each. Raises ValueError."""
    saved = _Saved.model_validate_json(data)
    return saved.all_pairs, {PeerID.from_base58(name): Work(*totals) for name, totals in saved.nodes.items()}


class ReceiptSender:
    """Signs receipts for nodes. `run` it as a task of the loop, and `close` it while calls can still be made."""

    def __init__(
        self,
        accounts: CreditAccounts,
        identity: Identity,
        swarm_id: str,
        admission: Admission,
        channels: ChannelPool,
        sessions: SessionClient,
        *,
        every_s: float = EVERY_S,
        clock: Callable[[], float] = time.monotonic,
        metrics: CollectorRegistry | None = None,
    ) -> None:
        """`admission`: provides this trainer's badge. `sessions`: with RIGHT_FORWARD."""
        outcomes = Counter(
            "talkoot_trainer_receipts",
            "Receipts signed for nodes, by outcome.",
            ["outcome"],
            registry=metrics,
        )
        self.outcomes: Counter = start_at_zero(outcomes, "given", "failed")
        self._accounts = accounts
        self._identity = identity
        self._swarm_id = swarm_id
        self._admission = admission
        self._channels = channels
        self._sessions = sessions
        self._every_s = every_s
        self._clock = clock

    async def run(self) -> None:
        """Hands out receipts until cancelled."""
        while True:
            await asyncio.sleep(min(_LOOK_EVERY_S, self._every_s))
            await self.give(self._clock() - self._every_s, _DEADLINE_S)

    async def close(self) -> None:
        """Signs for the remaining work as long as time allows, and saves the accounts."""
        try:
            async with asyncio.timeout(_FAREWELL_S):
                await self.give(self._clock(), _FAREWELL_S, MAX_NODES)
        except TimeoutError:
            logger.debug("some nodes did not get a last receipt")
        await self._accounts.save()

    async def give(self, before: float, deadline_s: float, most: int = _AT_ONCE) -> int:
        """Signs for some nodes that have had no receipt since that time. Returns how many it tried."""
        await self._accounts.save()
        due, turns = list(islice(self._accounts.due(before), most)), asyncio.Semaphore(_AT_ONCE)

        async def give(node: NodeInfo, account: _Account) -> None:
            async with turns:
                await self._give(node, account, deadline_s)

        await asyncio.gather(*(give(*each) for each in due))
        return len(due)

    async def _give(self, node: NodeInfo, account: _Account, deadline_s: float) -> None:
        account.tried_at, work = self._clock(), account.saved
        receipt = sign_receipt(
            self._identity,
            self._swarm_id,
            node.peer_id,
            work,
            max(self._accounts.all_pairs, work.pairs),
            self._admission.badge,
        )
        outcome = "failed"
        try:
            async with asyncio.timeout(deadline_s):
                with while_open():
                    channel = await self._channels.reach(node)
                    session = await self._sessions.metadata(node.peer_id, channel, deadline_s)
                    stub = make_stub(credit_pb2_grpc.CreditServiceStub, channel)
                    await stub.Give(receipt, timeout=deadline_s, metadata=session)
            account.signed, outcome = work, "given"
        except grpc.aio.AioRpcError as error:
            if error.code() is StatusCode.UNAUTHENTICATED:
                self._sessions.ended(node.peer_id, session)
            account.takes_none = error.code() is StatusCode.UNIMPLEMENTED
            said = printable(error.details() or "")
            logger.debug("node %s took no receipt: %s: %s", node.peer_id, error.code().name, said)
        except (ExpertError, UnreachableError, TimeoutError) as error:
            logger.debug("node %s took no receipt: %s", node.peer_id, error)
        finally:
            self.outcomes.labels(outcome).inc()
