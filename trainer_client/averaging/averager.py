"""Averages the dense part with other trainers, in pairs. Now and then a trainer calls another one that it can reach,
and both adopt the average. A trainer that others can't reach still calls them. Pairs are enough (NoLoCo, arXiv
2506.10911). A new trainer starts from another's dense part: of three, the one nearest to the other two.
"""

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median_low
from typing import Any

import grpc
from grpc import StatusCode

from dht.admission import SwarmAdmission
from dht.announcements import TrainerInfo
from dht.registry import Registry
from dht.relays import RelayKeeper
from peer import PROTOCOL_VERSION
from peer.averaging import drawn_stale_last, is_behind, max_plausible_updates
from peer.budget import interruptible
from peer.clipping import Tensors
from peer.errors import ExpertError, StateError, TransferError, UnreachableError
from peer.formatting import printable
from peer.identity import Identity, PeerID
from peer.loop import TaskSet, cancel_all, first_few
from peer.medoid import COMPARED, elementwise_median, medoid
from peer.rates import RateLimit
from peer.rpc.calls import while_open
from peer.rpc.channels import ChannelPool
from peer.rpc.server import RpcServer, server_credentials
from peer.rpc.sessions import Right, SessionClient, Sessions
from peer.rpc.transfer import SnapshotClient, SnapshotReceiver, chunked, receive
from peer.transport.addresses import Multiaddress
from peer.transport.dialling import resolved
from peer.transport.endpoints import Endpoint
from peer.transport.pipes import Pipe
from peer.wire import dense_pb2, dense_pb2_grpc, session_pb2
from trainer_client.averaging.dense_part import (
    DenseForm,
    DenseMerge,
    DensePart,
    PeerDensePart,
    SharedParameters,
)
from trainer_client.averaging.exchange import (
    CUT_OFF,
    OWN,
    AveragingMetrics,
    DenseExchange,
    DenseServicer,
    Snapshot,
)

logger: logging.Logger = logging.getLogger(__name__)

_DEADLINE_S = 120.0
"""The longest time for two trainers to exchange their dense parts."""
_MAX_RECORDS = 256
"""The most trainers whose records one search reads, drawn at random if there are more."""
_FIRST_PAUSE_S = 1.0
"""The pause between the first two searches. It doubles up to the usual pause."""
_TAKE_ATTEMPTS = 6
"""The most trainers that a new one asks for their dense part."""
_PATIENCE_S = 60.0
"""How much longer to wait for other trainers once one has given its dense part."""
_REST = 3.0
"""The pause after an exchange, as a multiple of its duration, so that calls to experts get the line."""
_CALLS_IN_TURN = 4
"""How many exchanges another trainer may begin for each that this one begins: a faster trainer calls more often.
"""
_OPEN_S = 10.0
"""The longest time for opening a session."""
MAX_CALLS = 8


@dataclass(frozen=True)
class AveragingSchedule:
    """How often a trainer averages with others."""

    every: int
    """Steps from one averaging to the next."""
    search_every_s: float
    """Seconds between two searches for other trainers."""
    deadline_s: float = _DEADLINE_S
    """The longest time for an exchange."""


class Averaging:
    """Averages one model with other trainers. `start` it, call `keep_meeting`, and `close` it at the end."""

    def __init__(
        self,
        exchange: DenseExchange,
        identity: Identity,
        registry: Registry,
        schedule: AveragingSchedule,
        *,
        admission: SwarmAdmission | None = None,
        channels: ChannelPool | None = None,
        relays: RelayKeeper | None = None,
        rights: Sequence[Right] = (session_pb2.RIGHT_AVERAGE,),
        rng: random.Random | None = None,
    ) -> None:
        """`admission`: the swarm's rules and this peer's badge; None admits everybody. `rights`: for calls to other
        trainers.

        `channels`: to other trainers, used only here. `relays`: the relays through which others reach this one; None:
        it uses no relays.
        """
        self.exchange = exchange
        self.part: SharedParameters = exchange.part
        self.form: DenseForm = exchange.form
        self.relays = relays
        self.partners: tuple[TrainerInfo, ...] = ()
        """Trainers of the same model, according to the last search."""
        self.certificate: bytes = b""
        self.addresses: tuple[Endpoint, ...] = ()
        swarm_id, deadline_s = self.form.swarm_id, schedule.deadline_s
        self.sessions: Sessions = Sessions(swarm_id, identity.peer_id, admission)
        self._identity = identity
        self._registry = registry
        self._schedule = schedule
        self._rng = rng or random.SystemRandom()
        self._service = SnapshotClient(
            dense_pb2_grpc.DenseServiceStub,
            channels or ChannelPool(MAX_CALLS),
            SessionClient(identity, swarm_id, rights, admission),
            exchange.receiver,
            open_s=min(deadline_s, _OPEN_S),
            limit_s=deadline_s,
        )
        least_steps = schedule.every // _CALLS_IN_TURN
        self._servicer = DenseServicer(exchange, identity.peer_id, self.sessions, deadline_s, least_steps)
        self._server = RpcServer(self.sessions, MAX_CALLS)
        self._stepped = asyncio.Event()
        self._unsubscribe: Callable[[], None] = lambda: None
        self._rested_at = 0.0

    @property
    def peer_id(self) -> PeerID:
        return self._identity.peer_id

    @property
    def metrics(self) -> AveragingMetrics:
        return self.exchange.metrics

    @property
    def tunnel_addresses(self) -> tuple[Multiaddress, ...]:
        """Multiaddresses by which others open libp2p streams to this one."""
        return () if self.relays is None else self.relays.tunnel_addresses

    @property
    def relay_addresses(self) -> tuple[Multiaddress, ...]:
        """Multiaddresses by which others reach this one through relays over gRPC."""
        return () if self.relays is None else self.relays.relay_addresses

    async def start(self, host: str, port: int) -> None:
        """Serves on `host`. Raises PortError."""
        self.certificate = self._identity.make_certificate()
        dense_pb2_grpc.add_DenseServiceServicer_to_server(self._servicer, self._server.services)
        credentials = server_credentials(self._identity, self.certificate)
        served = Endpoint.of(host, await self._server.start(credentials, host, port))
        self.addresses = tuple(await resolved([served]))
        self._unsubscribe = self.part.subscribe(partial(_wake, asyncio.get_running_loop(), self._stepped))

    async def open_for(self, caller: PeerID, origin: str) -> Pipe:
        """See `Connections.open_for`."""
        return await self._server.open_for(caller, origin)

    def keep_meeting(self, tasks: TaskSet) -> None:
        """Searches for other trainers and averages with them, until `tasks` are closed."""
        tasks.supervise("look for other trainers", self._keep_searching)
        tasks.supervise("average with other trainers", self._keep_averaging)

    async def close(self) -> None:
        self._unsubscribe()
        await self._servicer.close()
        await self._server.stop(None)
        await self.exchange.close()
        await self._service.close()

    async def find_partners(self) -> None:
        """Searches the DHT for trainers of the same model. Raises UnreachableError."""
        ids = await self._registry.trainer_ids()
        ids -= {self.peer_id}
        some = self._rng.sample(sorted(ids, key=PeerID.to_bytes), min(len(ids), _MAX_RECORDS))
        found = await self._registry.trainers(some)
        self.partners = tuple(
            trainer for trainer in found.values() if trainer.dense_fingerprint == self.form.fingerprint
        )

    async def average_with(self, partner: TrainerInfo) -> DenseMerge:
        """Exchanges dense parts with the partner, and waits until this trainer's own has been merged. Raises
        ExpertError if one of the two is already averaging, TransferError or StateError; then nothing changes.
        """
        exchange = self.exchange
        with interruptible(CUT_OFF) as interrupt:
            holder = exchange.place.take(OWN, interrupt, time.monotonic())
            try:
                mine = await exchange.snapshot()
                incoming = await self._swap(partner, mine)
                theirs = await exchange.check(mine.part, incoming, partner.peer_id)
                holder.interrupt = None
                assert incoming.header is not None, "it is whole"
                return await exchange.merge(mine, theirs, incoming.header.met_update_count, partner.peer_id)
            finally:
                exchange.end(holder)
                if holder.is_cut_off:
                    self._note_failure(partner.peer_id, TransferError(CUT_OFF))

    async def take_whole(self) -> int | None:
        """Adopts another trainer's dense part, if this one has taken far fewer steps than most of the trained ones. Of
        up to three dense parts, it takes the medoid's parameters; of two, those nearer to its own. Buffers are the
        elementwise median, and the age is the lower median of the claims. Returns the age; None if no trainer gave an
        older dense part. Raises UnreachableError if the DHT does not answer.
        """
        await self.find_partners()
        # trainers without steps are still joining, and their records say so until they are renewed
        ages = [partner.dense_age for partner in self.partners if partner.dense_age]
        if not ages or not is_behind(self.part.age, median_low(ages)):
            return None
        most = max_plausible_updates(ages)
        older = [p for p in self.partners if _is_reachable(p) and p.dense_age > self.part.age]
        asked = drawn_stale_last(older, lambda partner: partner.dense_age, self._rng)[:_TAKE_ATTEMPTS]
        mine = await asyncio.to_thread(self.part.read)
        given = await first_few((self._take(partner, mine) for partner in asked), COMPARED, _PATIENCE_S)
        if not given:
            return None
        tensors = await asyncio.to_thread(self._choose, mine, [theirs.tensors for theirs in given])
        age = median_low(min(theirs.age, most) for theirs in given)
        await asyncio.to_thread(self.part.replace, tensors, age)
        return age

    async def _take(self, partner: TrainerInfo, mine: DensePart) -> PeerDensePart | None:
        """None if that trainer gives no dense part, or one that can't be used."""
        request = dense_pb2.TakeRequest(
            protocol_version=PROTOCOL_VERSION, swarm_id=self.form.swarm_id, fingerprint=self.form.fingerprint
        )
        what = f"the dense part of {partner.peer_id}"
        try:
            incoming = await self._service.download(partner, "Take", request, what, RateLimit(None))
            return await self.exchange.check(mine, incoming, partner.peer_id)
        except (TransferError, StateError) as error:
            self._note_failure(partner.peer_id, error)
            return None

    def _choose(self, mine: DensePart, given: Sequence[Tensors]) -> Tensors:
        if len(given) == 1:
            return given[0]
        trained = self.form.trained
        taken = given[medoid([trained(tensors) for tensors in given], trained(mine.tensors), self._rng)]
        voices = given if len(given) == COMPARED else [*given, mine.tensors]
        return {**trained(taken), **elementwise_median(voices, self.form.buffers)}

    async def _swap(self, partner: TrainerInfo, mine: Snapshot) -> SnapshotReceiver:
        """Sends this trainer's dense part and returns the partner's, unchecked."""
        deadline_s, began = self._schedule.deadline_s, time.monotonic()
        try:
            stub, session = await self._service.stub(partner)
        except ExpertError as error:
            raise TransferError(f"{partner.peer_id} refused a session: {error}") from error
        call = stub.Exchange(timeout=deadline_s, metadata=session)
        accepted = asyncio.Event()
        sending = asyncio.create_task(self._send(call, mine, partner.peer_id, accepted))
        incoming = self.exchange.receiver()
        try:
            with while_open():
                async with asyncio.timeout(deadline_s):
                    await receive(call, incoming, RateLimit(None), begun=accepted.set)
        except grpc.aio.AioRpcError as error:
            if error.code() is StatusCode.UNAUTHENTICATED:
                self._service.sessions.ended(partner.peer_id, session)  # the next exchange opens another
            if error.code() is StatusCode.RESOURCE_EXHAUSTED:
                said = f"{partner.peer_id} is averaging with another trainer, or averaged with this one a moment ago"
                raise ExpertError(error.code(), said) from error
            reason = f"{error.code().name}: {printable(error.details() or '')}"
            raise TransferError(f"{partner.peer_id} did not exchange dense parts: {reason}") from error
        except TimeoutError:
            raise TransferError(
                f"{partner.peer_id} did not exchange dense parts within {deadline_s:.0f} s"
            ) from None
        finally:
            await cancel_all([sending])
            call.cancel()
            self._rested_at = time.monotonic() + _REST * (time.monotonic() - began)
        return incoming

    async def _send(self, call: Any, mine: Snapshot, to: PeerID, accepted: asyncio.Event) -> None:
        """Sends once the offer is accepted, because writing to a refused call would hide the reason."""
        offer = dense_pb2.DenseOffer(
            protocol_version=PROTOCOL_VERSION,
            swarm_id=self.form.swarm_id,
            fingerprint=self.form.fingerprint,
            header=mine.header(to),
        )
        await call.write(dense_pb2.ExchangeRequest(offer=offer))
        await accepted.wait()
        for chunk in chunked(mine.data):
            await call.write(dense_pb2.ExchangeRequest(chunk=chunk))
            self.metrics.bytes.labels("sent").inc(len(chunk))
        await call.done_writing()

    async def _keep_searching(self) -> None:
        """Searches until cancelled, with short pauses at first, because others may be about to join."""
        pause_s = min(_FIRST_PAUSE_S, self._schedule.search_every_s)
        while True:
            try:
                await self.find_partners()
            except UnreachableError as error:
                logger.debug("could not look for other trainers: %s", error)
            await asyncio.sleep(pause_s * self._rng.uniform(0.5, 1.5))
            pause_s = min(2 * pause_s, self._schedule.search_every_s)

    async def _keep_averaging(self) -> None:
        """Averages until cancelled. Averages that others begin postpone the next one, but by at most `every` steps, so
        that nobody can monopolise this trainer.
        """
        exchange, after, ended_at_step = self.exchange, self._steps_to_next(), 0
        while True:
            self._stepped.clear()
            await self._stepped.wait()
            now = time.monotonic()
            last = min(exchange.ended_at_step, ended_at_step + self._schedule.every)
            is_due = self.part.steps >= last + after and now >= self._rested_at
            partner = choose_partner(self.partners, exchange.avoided(), self._rng)
            if not is_due or partner is None or not exchange.place.is_free_for(OWN, now):
                continue
            after = self._steps_to_next()
            try:
                await self.average_with(partner)
            except ExpertError as error:
                logger.debug("%s", error)
                after = self._rng.randint(1, max(1, self._schedule.every // 2))
            except (TransferError, StateError) as error:
                self._note_failure(partner.peer_id, error)
            ended_at_step = self.part.steps

    def _steps_to_next(self) -> int:
        """Steps to the next exchange that this trainer begins. The number is random, so that two trainers don't always
        call each other at the same moment.
        """
        return max(1, round(self._schedule.every * self._rng.uniform(0.5, 1.5)))

    def _note_failure(self, peer_id: PeerID, error: Exception) -> None:
        if isinstance(error, StateError):
            self.exchange.refuse(peer_id, error)
            return
        self.exchange.breakers.failed(peer_id, time.monotonic())
        self.metrics.ends.labels("failed").inc()
        logger.debug("could not average with %s: %s", peer_id, error)


def _wake(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
    """Called on another thread. Does nothing once the loop is closed."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(event.set)


def choose_partner(
    partners: Collection[TrainerInfo], avoided: Collection[PeerID], rng: random.Random
) -> TrainerInfo | None:
    """A random one of those that can be called; None if there is none."""
    able = [p for p in partners if _is_reachable(p) and p.peer_id not in avoided]
    return rng.choice(able) if able else None


def _is_reachable(trainer: TrainerInfo) -> bool:
    return bool(trainer.addresses or trainer.tunnel_addresses or trainer.relay_addresses)
