"""A trainer's membership in a swarm: loop, host, directory and dispatcher, started and stopped as one."""

import asyncio
import contextlib
import random
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import platformdirs

from dht.admission import RIGHTS, Denylist, Role
from dht.directory import Directory
from dht.invites import Invite
from dht.manifest import Manifest
from dht.relays import RelayKeeper, is_hidden
from dht.swarm import Stage, Swarm, join_swarm
from peer.codec import codec_of
from peer.errors import SwarmError, UnreachableError
from peer.files import StateFolder
from peer.identity import Identity
from peer.loop import BackgroundTasks, LoopThread
from peer.rpc.channels import ChannelPool
from peer.rpc.sessions import SessionClient, Sessions
from peer.settings import DENYLIST
from peer.transport.addresses import NetworkConfig, default_listen_address, tcp_endpoint
from peer.wire import session_pb2
from trainer_client.announcer import TrainerAnnouncer, reached_at
from trainer_client.averaging.averager import Averaging
from trainer_client.averaging.dense_part import DenseForm, SharedParameters
from trainer_client.dispatch.batches import ExpertCaller
from trainer_client.dispatch.dispatcher import Dispatcher
from trainer_client.dispatch.grpc_caller import GrpcCaller, SessionWarmer
from trainer_client.dispatch.policy import CircuitBreakers, WaitPolicy
from trainer_client.moe import Mixtures, RemoteMixtureOfExperts
from trainer_client.settings import TrainerSettings
from trainer_client.training.record import Progress

_LOOK_AGAIN_S = 0.5
_CHECK_EVERY_S = 10.0
"""Time between two looks whether this trainer still knows anybody in its swarm."""


class SwarmClient:
    """Joins a swarm as trainer. A context manager: leaving it stops everything it started."""

    def __init__(
        self,
        invite: Invite,
        settings: TrainerSettings,
        state: Path,
        *,
        stage: Stage = lambda text: None,
        through: Callable[[ExpertCaller], ExpertCaller] = lambda caller: caller,
        reads_only: bool = False,
    ) -> None:
        """`stage` is told what happens while joining. `through` may put something between dispatch and the network,
        such as faults. `reads_only`: it uses experts and changes none. Raises UserError when joining fails.
        """
        self._reads_only = reads_only
        self._folder = StateFolder(state)
        self._loop = LoopThread()
        self._swarm: Swarm | None = None
        self._channels: ChannelPool | None = None
        self._sessions: SessionClient | None = None
        self._chores = BackgroundTasks()
        self._presence: TrainerAnnouncer | None = None
        self._averagings: list[Averaging] = []
        self._invite = invite
        self._settings = settings
        self._stage = stage
        try:
            self._loop.run(self._start(invite, settings, stage, through))
            self._mixtures = Mixtures(self.manifest, settings, self.own_seed, self.dispatcher, self._loop.run)
        except BaseException:
            self.close()
            raise

    @classmethod
    def join(cls, invite: str, *, wait_s: float = 60.0, **settings: Any) -> Self:
        """Joins and waits until an expert is live, at most `wait_s` seconds.

        `invite` is the line, or `@FILE` with the file that holds it. Settings are those of `talkoot train`,
        such as `router`, `top_k`, `grace_s`, and `state`: a folder that one process at a time uses, by default
        `talkoot/trainer` where programs keep their state. Raises UserError.
        """
        values = TrainerSettings.load(**settings)
        state = values.state or platformdirs.user_state_path("talkoot") / "trainer"
        client = cls(Invite.read(invite), values, state)
        try:
            client.wait_for_experts(wait_s, lambda text: None, share=1 / client.manifest.experts_total)
        except BaseException:
            client.close()
            raise
        return client

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def manifest(self) -> Manifest:
        """What all peers of the swarm share: sizes of the model and the grid, and more."""
        assert self._swarm is not None
        return self._swarm.manifest

    def note(self, progress: Progress) -> None:
        """How training goes, for the swarm to see. May be called on any thread."""
        assert self._presence is not None
        self._presence.note(progress)

    def average(self, part: SharedParameters, *meanings: str) -> Averaging:
        """From now on the parameters of a model are averaged with those of other trainers that have one of the same
        form, after steps that are taken inside `part.stepping()`.

        `meanings`: what shapes don't tell, such as the tokenizer. Raises PortError.
        """
        assert self._swarm is not None
        form = DenseForm.of(part.model, self._swarm.keys.swarm_id, *meanings)
        return self._loop.run(self._average(part, form))

    def take_freshest(self, averaging: Averaging) -> int | None:
        """The model's parameters become those of the trainer in the swarm that has most steps behind it.

        Gives how many; None when nobody has any to give.
        """
        return self._loop.run(averaging.take_freshest())

    @property
    def own_seed(self) -> int:
        """A seed that no other trainer has, from this one's key: 63 bits."""
        assert self._swarm is not None
        return int.from_bytes(self._swarm.host.peer_id.to_bytes()[-8:], "big") >> 1

    def mixture(
        self,
        layer: int,
        choose_by: Literal["token", "sequence"] | None = None,
        gradient_scale: Callable[[], float] | None = None,
        routing_prefix: int = 0,
    ) -> RemoteMixtureOfExperts:
        """The mixture of the swarm's experts in one layer of the model, from 0. Raises SettingsError.

        Unless `choose_by` is given it routes as the manifest says: with a `prefix` there, by the first tokens of each
        sequence, of which then none may be predicted in the loss.
        """
        return self._mixtures.make(layer, choose_by, gradient_scale, routing_prefix)

    def wait_for_experts(self, limit_s: float, report: Callable[[str], None], share: float = 1.0) -> None:
        """Waits until `share` of all experts are live, at most `limit_s` seconds; then one live expert is enough.

        Raises SwarmError when there is none.
        """
        deadline = time.monotonic() + limit_s
        total = self.manifest.experts_total
        while (live := self.dispatcher.live_experts()) < share * total:
            if time.monotonic() > deadline:
                if live:
                    return
                raise SwarmError(
                    f"no expert of this swarm answered in {limit_s:.0f} s: is a node running? "
                    "`talkoot status` shows who is there"
                )
            report(f"waiting for experts, at most {limit_s:.0f} s: {live} of {total} live")
            self._loop.run(self._look_again())

    def close(self) -> None:
        """Leaves the swarm. Closing twice is harmless."""
        if not self._loop.loop.is_closed():
            self._loop.run(self._stop())
        self._loop.close()
        self._folder.close()

    async def _start(
        self,
        invite: Invite,
        settings: TrainerSettings,
        stage: Stage,
        through: Callable[[ExpertCaller], ExpertCaller],
    ) -> None:
        identity = Identity.load_or_create(self._folder.path / "identity.key")
        self._swarm = await join_swarm(
            identity,
            invite,
            NetworkConfig(_listen_address(invite), serves_dht=False),
            state=self._folder.path,
            roles=(Role.TRAINER, Role.READER) if self._reads_only else (Role.TRAINER,),
            denylist=Denylist(settings.denylist or self._folder.path / DENYLIST, settings.deny),
            stage=stage,
        )
        stage("reading who hosts what")
        self._directory = Directory(
            self._swarm.registry, self._swarm.manifest, refresh_every_s=settings.refresh_every_s
        )
        await self._directory.refresh()
        swarm, manifest = self._swarm, self._swarm.manifest
        self._chores.begin("keep the view of the swarm fresh", self._directory.keep_fresh)
        self._chores.begin("stay in the swarm", lambda: swarm.membership.keep(_CHECK_EVERY_S))
        self._chores.begin(
            "know who is admitted", lambda: swarm.keep_admission(_CHECK_EVERY_S, self._recheck)
        )
        self._channels = ChannelPool(tunnels=self._swarm.host.tunnels)
        rights = RIGHTS[Role.READER if self._reads_only else Role.TRAINER]
        badge = self._swarm.admission.badge
        self._sessions = SessionClient(identity, invite.keys.swarm_id, sorted(rights), badge)
        caller = GrpcCaller(
            self._channels,
            invite.keys.swarm_id,
            manifest.model.hidden,
            codec_of(manifest.wire.codec),
            self._sessions,
        )
        policy = WaitPolicy(
            settings.call_deadline_s,
            settings.grace_s,
            settings.k_min,
            settings.least_deadline_s,
            settings.most_hedged,
        )
        self.dispatcher = Dispatcher(
            self._directory,
            through(caller),
            policy,
            breakers=CircuitBreakers(settings.backoff_first_s, settings.backoff_longest_s),
            spot_checks=settings.spot_checks,
            seed=random.SystemRandom().getrandbits(32),
            is_silent=caller.is_silent,
        )
        self._presence = TrainerAnnouncer(
            self._swarm, invite, settings, self.dispatcher, caller, self._chores, self._loop
        )
        introductions = SessionWarmer(self._sessions, self._channels, self._directory, time.monotonic)
        self._chores.begin("announce this trainer", self._presence.run)
        self._chores.begin("be introduced to nodes", introductions.run)

    async def _average(self, part: SharedParameters, form: DenseForm) -> Averaging:
        assert self._swarm is not None
        assert self._presence is not None
        settings = self._settings
        averaging = Averaging(
            part,
            form,
            self._swarm.host.identity,
            self._swarm.registry,
            Sessions(form.swarm_id, self._swarm.host.peer_id, self._swarm.admission),
            SessionClient(
                self._swarm.host.identity,
                form.swarm_id,
                (session_pb2.RIGHT_AVERAGE,),
                self._swarm.admission.badge,
            ),
            every=settings.average_every,
            look_every_s=settings.announce_every_s,
            deadline_s=settings.average_deadline_s,
            tunnels=self._swarm.host.tunnels,
        )
        host = settings.average_host or reached_at(self._invite)
        # one tunnel leads to one of them
        is_relayed = is_hidden(host) and settings.average_relays > 0 and not self._averagings
        exit_path = self._swarm.host.tunnels.exit_path() if is_relayed else None
        self._averagings.append(averaging)
        await averaging.start(host, settings.average_port, self._loop.loop, exit_path)
        if is_relayed:
            self._stage("looking for a relay")
            averaging.relayed = RelayKeeper(self._swarm, settings.average_relays, random.SystemRandom())
            await averaging.relayed.begin(settings.average_tunnel_streams)
        self._chores.begin("average with other trainers", averaging.run)
        self._presence.averages(averaging)
        return averaging

    def _recheck(self) -> None:
        for averaging in self._averagings:
            averaging.sessions.recheck()

    async def _look_again(self) -> None:
        await asyncio.sleep(_LOOK_AGAIN_S)
        with contextlib.suppress(UnreachableError):  # the directory's own task says so
            await self._directory.refresh()

    async def _stop(self) -> None:
        await self._chores.end()
        for averaging in self._averagings:
            await averaging.close()
        if self._presence is not None:
            await self.dispatcher.close()
            await self._presence.close()
        if self._sessions is not None:
            await self._sessions.close()
        if self._channels is not None:
            await self._channels.close()
        if self._swarm is not None:
            await self._swarm.stop()


def _listen_address(invite: Invite) -> str:
    """A trainer listens for nodes behind routers, which connect to it where a way through can be found."""
    endpoints = map(tcp_endpoint, invite.bootstrap)
    on_loopback = all(endpoint is not None and endpoint[0].startswith("127.") for endpoint in endpoints)
    return "127.0.0.1" if on_loopback else default_listen_address()
