"""Averaging the dense part with other trainers that the DHT names, pairwise, and taking the freshest one to begin with.

Now and then a trainer calls another that it can reach, and both become their average; a trainer that nobody can reach
calls others all the same. Two by two is enough (NoLoCo, arXiv 2506.10911).
"""

import asyncio
import contextlib
import logging
import random
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

import grpc
from grpc import StatusCode

from dht.announcements import TrainerInfo
from dht.registry import Registry
from dht.relays import RelayKeeper
from peer import PROTOCOL_VERSION
from peer.averaging import freshest_first, max_plausible_updates
from peer.errors import ExpertError, PortError, StateError, TransferError, UnreachableError
from peer.identity import Identity, PeerID
from peer.rates import RateLimit
from peer.rpc.calls import make_server, server_credentials
from peer.rpc.channels import ChannelPool
from peer.rpc.sessions import SessionClient, Sessions, SessionServicer
from peer.rpc.transfer import SnapshotClient, SnapshotReceiver, chunked, receive
from peer.transport.addresses import require_free_port
from peer.transport.tunnel import Tunnels
from peer.wire import dense_pb2, dense_pb2_grpc, session_pb2_grpc
from trainer_client.averaging.dense_part import DenseForm, DenseMerge, SharedParameters
from trainer_client.averaging.exchange import AveragingCounts, DenseExchange, DenseServicer, Snapshot

logger = logging.getLogger(__name__)

_LOOKED_AT = 256
"""Most trainers whose records are read in one look around; of more, some are drawn."""
_FIRST_PAUSE_S = 1.0
"""Between the first two looks; it doubles up to the usual one."""
_TAKE_ATTEMPTS = 4
"""Trainers that one which joins asks, the freshest first."""
_REST = 3.0
"""Times as long as an exchange took, the link is left to the experts' calls."""
_OPEN_S = 10.0
"""Longest that opening a session may take."""
_MAX_CALLS = 8


class Averaging:
    """One trainer's averaging with others. `start` it and `run` it as a task of the loop; `close` it at the end."""

    def __init__(
        self,
        part: SharedParameters,
        form: DenseForm,
        identity: Identity,
        registry: Registry,
        sessions: Sessions,
        own_sessions: SessionClient,
        *,
        every: int,
        look_every_s: float,
        deadline_s: float,
        tunnels: Tunnels | None = None,
        rng: random.Random | None = None,
    ) -> None:
        """`sessions`: who may call this trainer; `own_sessions`: what shows others who calls.

        `every`: steps from one averaging to the next. `look_every_s`: seconds between looks at who is there.
        `deadline_s`: longest that an exchange may take. `tunnels`: by which it calls others behind routers.
        """
        self.meeting = DenseExchange(form, part)
        self.partners: tuple[TrainerInfo, ...] = ()
        """Trainers that train the same, as the DHT named them last."""
        self.certificate = b""
        self.addresses: tuple[str, ...] = ()
        self.relayed: RelayKeeper | None = None
        """None: it is reached at its addresses, or not at all."""
        self.part = part
        self.form = form
        self._identity = identity
        self._registry = registry
        self._every = every
        self._look_every_s = look_every_s
        self._deadline_s = deadline_s
        self._rng = rng or random.SystemRandom()
        self._service = SnapshotClient(
            dense_pb2_grpc.DenseServiceStub,
            ChannelPool(_MAX_CALLS, tunnels),
            own_sessions,
            self.meeting.incoming,
            open_s=min(deadline_s, _OPEN_S),
            limit_s=deadline_s,
        )
        self._servicer = DenseServicer(self.meeting, identity.peer_id, sessions, deadline_s)
        self.sessions = sessions
        self._server: grpc.aio.Server | None = None
        self._stepped = asyncio.Event()
        self._rested_at = 0.0

    @property
    def peer_id(self) -> PeerID:
        return self._identity.peer_id

    @property
    def counts(self) -> AveragingCounts:
        return self.meeting.counts

    async def start(
        self, host: str, port: int, loop: asyncio.AbstractEventLoop, exit_path: Path | None = None
    ) -> None:
        """Serves on `host`, and at the unix socket to which this peer's tunnel leads. Raises PortError."""
        require_free_port(host, port)
        self.certificate = self._identity.make_certificate()
        self._server = make_server(_MAX_CALLS)
        dense_pb2_grpc.add_DenseServiceServicer_to_server(self._servicer, self._server)
        session_pb2_grpc.add_SessionServiceServicer_to_server(SessionServicer(self.sessions), self._server)
        credentials = server_credentials(self._identity, self.certificate)
        shown = f"[{host}]" if ":" in host else host
        try:
            port = self._server.add_secure_port(f"{shown}:{port}", credentials)
            if exit_path is not None:
                self._server.add_secure_port(f"unix:{exit_path}", credentials)
        except RuntimeError as error:
            raise PortError(f"can't listen on {host} port {port}: pass another --average-port") from error
        await self._server.start()
        self.addresses = (f"{shown}:{port}",)
        self.part.on_step = partial(_wake, loop, self._stepped)

    async def run(self) -> None:
        """For ever."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._look_around())
            group.create_task(self._meet_now_and_then())

    async def close(self) -> None:
        """Nobody is served any more."""
        self.part.on_step = lambda: None
        await self._servicer.close()
        if self._server is not None:
            await self._server.stop(None)
        await self._service.close()

    async def look(self) -> None:
        """Finds those that train the same. Raises UnreachableError."""
        ids = await self._registry.trainer_ids()
        ids -= {self.peer_id}
        some = self._rng.sample(sorted(ids, key=PeerID.to_bytes), min(len(ids), _LOOKED_AT))
        found = await self._registry.trainers(some)
        self.partners = tuple(
            trainer for trainer in found.values() if trainer.dense_fingerprint == self.form.fingerprint
        )

    async def meet(self, partner: TrainerInfo) -> DenseMerge:
        """Exchanges dense parts, and waits until this one is the average.

        Raises ExpertError, when one of the two averages with another, TransferError and StateError; then it stays.
        """
        self.meeting.begin()
        try:
            mine = await self.meeting.snapshot()
            incoming = await self._exchange(partner, mine)
            theirs = await self.meeting.look_through(mine.part, incoming)
            assert incoming.header is not None, "it is whole"
            return await self.meeting.merge(mine, theirs, incoming.header.met_update_count, partner.peer_id)
        finally:
            self.meeting.end()

    async def take_freshest(self) -> int | None:
        """The dense part becomes that of the trainer whose one is the oldest, of those that can be reached; of three or
        more, none is taken for claiming most.

        Gives its age; None when nobody has one to give. Raises UnreachableError when the DHT does not answer.
        """
        await self.look()
        reachable = [p for p in self.partners if _is_reachable(p) and p.dense_age > self.part.age]
        most = max_plausible_updates([p.dense_age for p in self.partners])
        for partner in freshest_first(reachable, lambda p: p.dense_age, self._rng)[:_TAKE_ATTEMPTS]:
            try:
                return await self._take(partner, most)
            except (TransferError, StateError) as error:
                self._note_failure(partner.peer_id, error)
        return None

    async def _take(self, partner: TrainerInfo, most: int) -> int:
        """Gives its age, `most` at most."""
        request = dense_pb2.TakeRequest(
            protocol_version=PROTOCOL_VERSION, swarm_id=self.form.swarm_id, fingerprint=self.form.fingerprint
        )
        what = f"the dense part of {partner.peer_id}"
        incoming = await self._service.download(partner, "Take", request, what, RateLimit(None))
        mine = await asyncio.to_thread(self.part.read)
        theirs = await self.meeting.look_through(mine, incoming)
        age = min(theirs.age, most)
        self.part.replace(theirs.tensors, age)
        return age

    async def _exchange(self, partner: TrainerInfo, mine: Snapshot) -> SnapshotReceiver:
        """What came, not yet looked through."""
        began = self.meeting.clock()
        try:
            stub, session = await self._service.stub(partner)
        except ExpertError as error:
            raise TransferError(f"{partner.peer_id} opens no session: {error}") from error
        call = stub.Exchange(timeout=self._deadline_s, metadata=session)
        accepted = asyncio.Event()
        sending = asyncio.create_task(self._send(call, mine, partner.peer_id, accepted))
        incoming = self.meeting.incoming()
        try:
            async with asyncio.timeout(self._deadline_s):
                await receive(call, incoming, RateLimit(None), begun=accepted.set)
        except grpc.aio.AioRpcError as error:
            if error.code() is StatusCode.UNAUTHENTICATED:
                self._service.sessions.ended(partner.peer_id, session)  # the next time opens another
            if error.code() is StatusCode.RESOURCE_EXHAUSTED:
                raise ExpertError(error.code(), f"{partner.peer_id} averages with another") from error
            reason = f"{error.code().name}: {error.details()}"[:500]
            raise TransferError(f"{partner.peer_id} did not exchange: {reason}") from error
        except TimeoutError:
            raise TransferError(f"{partner.peer_id} did not exchange in {self._deadline_s:.0f} s") from None
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
            call.cancel()
            self._rested_at = self.meeting.clock() + _REST * (self.meeting.clock() - began)
        return incoming

    async def _send(self, call: Any, mine: Snapshot, to: PeerID, accepted: asyncio.Event) -> None:
        """What is refused is not sent: writing into a call that ends would also hide why."""
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
            self.counts.bytes_sent += len(chunk)
        await call.done_writing()

    async def _look_around(self) -> None:
        """Soon again at first, when others may be about to come."""
        pause_s = min(_FIRST_PAUSE_S, self._look_every_s)
        while True:
            try:
                await self.look()
            except UnreachableError as error:
                logger.debug("could not look for other trainers: %s", error)
            await asyncio.sleep(pause_s * self._rng.uniform(0.5, 1.5))
            pause_s = min(2 * pause_s, self._look_every_s)

    async def _meet_now_and_then(self) -> None:
        meeting, after = self.meeting, self._pause()
        while True:
            self._stepped.clear()
            await self._stepped.wait()
            now = meeting.clock()
            is_due = self.part.steps >= meeting.ended_at_step + after and now >= self._rested_at
            partner = choose_partner(self.partners, meeting.breakers.open_at(now), self._rng)
            if not is_due or meeting.is_on or partner is None:
                continue
            after = self._pause()
            try:
                await self.meet(partner)
            except ExpertError as error:
                logger.debug("%s", error)
                after = self._rng.randint(1, max(1, self._every // 2))
            except (TransferError, StateError) as error:
                self._note_failure(partner.peer_id, error)

    def _pause(self) -> int:
        """Steps to the next meeting that this trainer begins: not always as many, or two that began together would call
        each other at the same time, again and again.
        """
        return max(1, round(self._every * self._rng.uniform(0.5, 1.5)))

    def _note_failure(self, peer_id: PeerID, error: Exception) -> None:
        if isinstance(error, StateError):
            self.meeting.refuse(peer_id, error)
            return
        self.meeting.leave_alone(peer_id)
        self.counts.failed += 1
        logger.debug("no exchange with %s: %s", peer_id, error)


def _wake(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
    """From another thread. A loop that has ended needs no waking."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(event.set)


def choose_partner(
    partners: Collection[TrainerInfo], avoided: Collection[PeerID], rng: random.Random
) -> TrainerInfo | None:
    """One of those that can be called, whoever; None when there is none."""
    able = [p for p in partners if _is_reachable(p) and p.peer_id not in avoided]
    return rng.choice(able) if able else None


def _is_reachable(trainer: TrainerInfo) -> bool:
    return bool(trainer.addresses or trainer.tunnel_addresses)
