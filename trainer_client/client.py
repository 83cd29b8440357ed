"""A trainer's membership in a swarm: loop, host, directory and dispatcher, started and stopped together."""

import asyncio
import contextlib
import logging
import math
import random
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from operator import index
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

from prometheus_client import Gauge
from torch import Tensor

from dht.admission import RIGHTS, Denylist, Role, invite_error
from dht.directory import Directory
from dht.invites import Invite, read_bootstrap
from dht.manifest import Manifest
from dht.relays import RelayKeeper, is_hidden
from dht.swarm import Stage, Swarm, join_swarm
from peer import clock
from peer.codec import codec_of
from peer.errors import RecordError, StateFolderError, UnavailableError, UnreachableError
from peer.files import StateFolder
from peer.formatting import in_brief
from peer.host import NetworkConfig
from peer.identity import Identity
from peer.loop import LoopLag, LoopThread, TaskSet
from peer.metrics import total
from peer.rpc.channels import WAYS, ChannelPool
from peer.rpc.sessions import SessionClient
from peer.settings import DENYLIST
from peer.transport.addresses import default_listen_address
from trainer_client.announcer import TrainerAnnouncer
from trainer_client.averaging.averager import MAX_CALLS, Averaging, AveragingSchedule
from trainer_client.averaging.dense_part import DenseForm, SharedParameters
from trainer_client.averaging.exchange import AveragingMetrics, DenseExchange
from trainer_client.credit import EVERY_S, CreditAccounts, ReceiptSender
from trainer_client.dispatch.batches import ExpertCaller
from trainer_client.dispatch.calls import DispatchMetrics
from trainer_client.dispatch.dispatcher import Dispatcher
from trainer_client.dispatch.grpc_caller import GrpcCaller, SessionWarmer
from trainer_client.dispatch.policy import WaitPolicy
from trainer_client.dispatch.snapshots import BlockClient
from trainer_client.dispatch.spot_checks import Checking, ExpertLoader
from trainer_client.memory.memories import Memories, Memory
from trainer_client.moe import RemoteMixtureOfExperts
from trainer_client.routers import Routing
from trainer_client.settings import TrainerSettings
from trainer_client.training.record import Progress, Validation

logger: logging.Logger = logging.getLogger(__name__)

T = TypeVar("T")

_RETRY_S = 0.5
"""The pause between two looks while waiting for live experts."""
_MOMENT_S = 5.0
"""How long no expert may answer before the user is warned. Nodes that failed a call once or twice are back by then."""
_MOST_WAITS = 8
"""How many times in a row it may wait for experts that are announced, but then don't answer."""
_CHECK_EVERY_S = 10.0
"""How often this trainer checks whether it still knows other peers of its swarm, and who is admitted."""
_MAX_TUNNEL_RELAYS = 4
"""The most relays through which other trainers reach this one, if its router accepts no connections."""
_MAX_TUNNEL_STREAMS = 32
"""Streams that they may have open to this trainer through relays."""
_MAX_CHANNELS = 256
"""The most channels to nodes."""


@dataclass(frozen=True)
class TrainerTiming:
    """Times of a trainer that tests and benchmarks change, in seconds."""

    least_deadline_s: float = 3.0
    """The shortest deadline of a call to experts, however fast they answered lately."""
    refresh_every_s: float = 3.0
    """The pause between two refreshes of the directory."""
    receipts_every_s: float = EVERY_S
    """The pause between two receipts for one node."""


@dataclass(frozen=True)
class _Joined:
    """The parts of a trainer that has joined its swarm."""

    swarm: Swarm
    directory: Directory
    dispatcher: Dispatcher
    routing: Routing
    announcer: TrainerAnnouncer
    averaging_metrics: AveragingMetrics
    averagings: list[Averaging]
    memories: Memories
    tasks: TaskSet

    def recheck(self) -> None:
        """Ends the sessions of other trainers that are no longer admitted."""
        for averaging in self.averagings:
            averaging.sessions.recheck()

    async def close_averagings(self) -> None:
        for averaging in self.averagings:
            await averaging.close()


class SwarmClient:
    """Joins a swarm as a trainer. A context manager: leaving it stops everything it started."""

    def __init__(
        self,
        invite: Invite,
        settings: TrainerSettings,
        state: Path,
        *,
        stage: Stage = lambda text: None,
        through: Callable[[ExpertCaller], ExpertCaller] = lambda caller: caller,
        reads_only: bool = False,
        exports: bool = False,
        make_loader: Callable[[Manifest, str], ExpertLoader | None] = lambda manifest, swarm_id: None,
        timing: TrainerTiming = TrainerTiming(),
        is_own_loop: bool = False,
    ) -> None:
        """`stage` is called with each step of joining, in words. `through` wraps the network, for example to inject
        faults. `reads_only`: it uses experts without changing them, and announces nothing. `exports`: the invite must
        allow exporting the model. `make_loader`: makes the `ExpertLoader` for spot checks, from the manifest and the
        swarm's id; None: no spot checks. `is_own_loop`: the caller trains with its own loop instead of `Training`, so
        the number of steps is not known. Raises UserError if joining fails.
        """
        self._invite = invite
        self._listens_at = default_listen_address(invite.bootstrap)
        self._settings = settings
        self._stage = stage
        self._through = through
        self._reads_only, self._exports = reads_only, exports
        self._make_loader = make_loader
        self._timing = timing
        self._is_own_loop = is_own_loop
        self._waits = 0
        """Consecutive waits of `has_experts`."""
        self._refused = 0.0
        """Calls that nodes had refused when it last read which tokens are revoked."""
        self._folder = StateFolder(state)
        self._loop = LoopThread()
        self._exits = contextlib.AsyncExitStack()
        try:
            self._joined = self._loop.run(self._join())
        except BaseException:
            self.close()
            raise

    @classmethod
    def join(
        cls, invite: str, *, wait_s: float = 60.0, bootstrap: Sequence[str] = (), **settings: Any
    ) -> Self:
        """Joins and waits until an expert is live, for at most `wait_s` seconds.

        `invite`: the invite's line, or `@FILE` for the file that contains it. `bootstrap`: other nodes to join through,
        each by its address or its invite, in case nobody answers at the addresses in the invite. Settings are those of
        `talkoot train`, such as `router`, `top_k`, `grace_s`, and `state`: a folder that only one client at a time can
        use, by default `talkoot/trainer` in the user's folder for program state. Raises UserError, and TypeError if the
        invite is not text.
        """
        if not isinstance(invite, str):
            raise TypeError(
                f"pass the invite as text, either its line or '@FILE', and not {in_brief(invite)}"
            )
        values = TrainerSettings.load(**settings)
        state = values.state_folder
        try:
            through = Invite.read(invite).through(read_bootstrap(bootstrap))
            client = cls(through, values, state, is_own_loop=True)
        except StateFolderError as error:
            if not error.is_in_use:
                raise
            raise StateFolderError(
                f"the state folder {state} is in use. If this program has joined before, close that SwarmClient first "
                "(`swarm.close()`). If another program uses the folder, stop it. Or join with state='another-folder'"
            ) from error
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
        """What all peers of the swarm share: the sizes of the model and the grid, and more."""
        return self._joined.swarm.manifest

    @property
    def swarm(self) -> Swarm:
        """Its membership in the swarm. Run the swarm's coroutines on this client's loop: see `run`."""
        return self._joined.swarm

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine on this client's loop, and waits for it. Don't call it on the loop's own thread.

        Raises RuntimeError once this client is closed.
        """
        if self._loop.loop.is_closed():
            coroutine.close()
            raise RuntimeError(
                "this SwarmClient is closed: use its mixtures and memories before you close it, or inside its `with`"
            )
        return self._loop.run(coroutine)

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> "Future[T]":
        """Starts a coroutine on this client's loop."""
        return self._loop.submit(coroutine)

    @property
    def settings(self) -> TrainerSettings:
        """The given settings, completed by those of the manifest's preset."""
        return self._settings

    @property
    def dispatcher(self) -> Dispatcher:
        """Calls the swarm's experts, and counts the results."""
        return self._joined.dispatcher

    @property
    def own_seed(self) -> int:
        """A seed that no other trainer has, derived from this trainer's key: 63 bits."""
        return _seed_of(self._joined.swarm)

    def mixture(
        self,
        layer: int,
        choose_by: Literal["token", "sequence"] | None = None,
        gradient_scale: Callable[[], float] | None = None,
        routing_prefix: int = 0,
    ) -> RemoteMixtureOfExperts:
        """The mixture of the swarm's experts in one layer of the model, counted from 0. Raises SettingsError.

        Unless `choose_by` is given, it routes as the manifest says. If the manifest has a `prefix`, it routes by the
        first tokens of each sequence, and none of these may be predicted in the loss. `torch.compile` leaves it as it
        is, and compiles the rest of the model. In a loop of your own, calling it raises InviteError once this trainer's
        token is revoked or has expired.
        """
        routing = self._joined.routing
        if choose_by is not None:
            routing = replace(routing, choose_by=choose_by, prefix=routing_prefix)
        check = self.require_admitted if self._is_own_loop else None
        mixture = RemoteMixtureOfExperts(
            layer, self.manifest, self.dispatcher, self.run, routing, gradient_scale, check
        )
        if self._is_own_loop:
            mixture.disable_compiling()
        return mixture

    def wait_for_experts(self, limit_s: float, report: Callable[[str], None], share: float = 1.0) -> None:
        """Waits until `share` of all experts are live, for at most `limit_s` seconds; after that, one is enough.

        Raises UnavailableError if none is live then, and InviteError once this trainer's token is revoked or has
        expired.
        """
        deadline = time.monotonic() + limit_s
        total = self.manifest.experts_total
        enough = math.ceil(share * total)
        while (live := self.dispatcher.live_experts()) < enough:
            self.require_admitted()
            if time.monotonic() > deadline:
                if live:
                    logger.warning(
                        "starting with %d of %d experts: after %.0f s, no more are live", live, total, limit_s
                    )
                    return
                raise UnavailableError(
                    f"no expert of this swarm answered in {limit_s:.0f} s: is a node running? "
                    "`talkoot status --join INVITE` shows who is there"
                )
            report(
                f"waiting for experts, at most {limit_s:.0f} s: {live} of {total} live, {enough} are enough"
            )
            self.run(self._refresh_soon())

    def wait_for_any(
        self, limit_s: float, consequence: str, warns: Callable[[], None] = lambda: None
    ) -> bool:
        """Waits until any expert is live, for at most `limit_s` seconds. Returns whether that took so long that it has
        warned. `consequence`: what happens until then. `warns` is called before it warns. Raises as `wait_for_experts`.
        """
        warns_at = time.monotonic() + (_MOMENT_S if limit_s > _MOMENT_S else 0)
        has_warned = False

        def report(text: str) -> None:
            nonlocal has_warned
            if has_warned or time.monotonic() < warns_at:
                return
            has_warned = True
            refusal = self.dispatcher.refusal()
            why = f"nodes refuse your calls ({refusal})" if refusal else "no expert answers"
            warns()
            logger.warning("%s: %s until one answers, at most %.0f s", why, consequence, limit_s)

        self.wait_for_experts(limit_s, report, share=1 / self.manifest.experts_total)
        return has_warned

    def require_admitted(self, *, reads: bool = False) -> None:
        """Raises InviteError once this trainer's token is revoked or has expired. If nodes have refused calls since the
        last time, or if `reads`, reads first which tokens are revoked.
        """
        refused = total(self.dispatcher.metrics.failures, cause="permission_denied")
        if reads or refused > self._refused:
            self._refused = refused
            with contextlib.suppress(UnreachableError):
                self.run(self._joined.swarm.revocations.read())
        try:
            self._joined.swarm.admission.check_own()
        except RecordError as error:
            again = "start again with `--join NEW_INVITE`"
            if self._is_own_loop:
                again = "join again with it"
            elif not self._reads_only:
                again += ". What is saved stays: to train on from there, also pass --resume"
            raise invite_error(
                error,
                f"nodes no longer answer you, because of your invite: {error}. Ask the swarm's founder for a new one, "
                f"and {again}{clock.CLOCK.doubt}",
            ) from error

    def has_experts(self, limit_s: float | None = None, warns: Callable[[], None] = lambda: None) -> bool:
        """Returns whether any expert is live, so that the last result is valid. If none is, waits for one first.
        `limit_s`: the longest wait; None: that of the settings. `warns` is called before it warns. Raises
        UnavailableError if none is announced in time, or if those announced never answered, and InviteError once this
        trainer's token is revoked or has expired.
        """
        self.require_admitted()
        if self.dispatcher.live_experts():
            self._waits = 0
            return True
        if self._waits >= _MOST_WAITS:  # several threads may be waiting
            self._waits = 0
            raise UnavailableError(
                f"experts are announced, but {_MOST_WAITS} times in a row none of them answered: "
                "`talkoot status --join INVITE` shows who announces them; wait for other nodes, or host the experts "
                "yourself"
            )
        self._waits += 1
        limit_s = self.settings.wait_for_experts_s if limit_s is None else limit_s
        self.wait_for_any(limit_s, "waiting", warns)
        return False

    def report(
        self,
        step: int,
        loss: float,
        *,
        tokens_per_s: float | None = None,
        validation_loss: float | None = None,
        bits_per_byte: float | None = None,
    ) -> None:
        """Reports the training's progress to the swarm's dashboards, after `step` steps of a loop of your own.

        Losses are in nats per token: numbers, or tensors with one element. `bits_per_byte`: of the validation. May be
        called on any thread, after each step. Raises ValueError for a step below 0, and TypeError for other types.
        """
        try:
            number = index(step)
        except TypeError:
            raise TypeError(f"pass the step as a whole number, and not {in_brief(step)}") from None
        if not 0 <= number < 2**63:
            raise ValueError(f"step {number}: the number of steps so far, from 0")
        speed = None if tokens_per_s is None else _float(tokens_per_s, "tokens_per_s")
        self._joined.announcer.note_step(number, _float(loss, "the loss"), speed)
        if validation_loss is not None:
            bits = None if bits_per_byte is None else _float(bits_per_byte, "bits_per_byte")
            self._joined.announcer.note_validation(_float(validation_loss, "validation_loss"), bits)

    def note(self, progress: Progress) -> None:
        """Announces a step of `Training`. May be called on any thread."""
        self._joined.announcer.note_step(progress.step, progress.loss, progress.tokens_per_s)

    def note_validation(self, validation: Validation) -> None:
        """Announces a validation of `Training`. May be called on any thread."""
        self._joined.announcer.note_validation(validation.loss, validation.bits_per_byte)

    def average(self, part: SharedParameters, *meanings: str) -> Averaging:
        """Averages a model's parameters with those of other trainers of the same form, from now on.

        This happens after steps that are taken inside `part.stepping()`. `meanings`: what the shapes do not show, such
        as the tokenizer. Raises PortError.
        """
        form = DenseForm.of(part.model, self._joined.swarm.keys.swarm_id, *meanings)
        exchange = DenseExchange(form, part, self._joined.averaging_metrics, guard=self._joined.swarm.guard)
        return self.run(self._average(exchange))

    def take_whole(self, averaging: Averaging) -> int | None:
        """Adopts another trainer's dense part: see `Averaging.take_whole`. Returns its age in steps; None if no trainer
        gave an older one.
        """
        return self.run(averaging.take_whole())

    def memory(self, name: str | None = None) -> Memory:
        """The memory of that name or id, for searching; None: the swarm's only one.

        The first time, its index is fetched: some MB, which are kept on disk. Raises LibraryError if there is no such
        memory or its index can't be fetched, and UnreachableError if the DHT does not answer.
        """
        return Memory(self.run(self._joined.memories.open(name)), self.run)

    def close(self) -> None:
        """Leaves the swarm. Closing twice is harmless."""
        if not self._loop.loop.is_closed():
            self._loop.run(self._exits.aclose())
        self._loop.close()
        self._folder.close()

    async def _join(self) -> _Joined:
        """Builds all parts. `self._exits` stops those that were started, the last one first."""
        exits, timing = self._exits, self._timing
        role = Role.READER if self._reads_only else Role.TRAINER
        swarm = await self._join_swarm(role)
        self._settings = settings = self._settings.in_swarm(swarm.manifest)
        self._stage("reading who hosts what")
        routing = Routing.of(settings, swarm.manifest, _seed_of(swarm))
        directory = Directory(swarm.experts, swarm.manifest, refresh_every_s=timing.refresh_every_s)
        await directory.refresh()

        channels = _channels_to_nodes(swarm)
        exits.push_async_callback(channels.close)
        sessions = swarm.session_client(*sorted(RIGHTS[role]))
        exits.push_async_callback(sessions.close)
        swarm_id = swarm.keys.swarm_id
        credit = CreditAccounts(self._folder.path / "credit" / f"{swarm_id}.json")
        await credit.open()
        receipts = ReceiptSender(
            credit,
            swarm.host.identity,
            swarm_id,
            swarm.admission,
            channels,
            sessions,
            every_s=timing.receipts_every_s,
            metrics=swarm.metrics,
        )
        exits.push_async_callback(receipts.close)
        dispatcher = self._make_dispatcher(swarm, directory, channels, sessions, credit)
        memories = Memories(swarm, channels, self._folder.path / "memories", credit)
        exits.push_async_callback(memories.close)
        takes_steps = not (self._is_own_loop or self._reads_only)
        announcer = TrainerAnnouncer(swarm, self._invite, settings, dispatcher, takes_steps)
        exits.push_async_callback(announcer.close)
        exits.push_async_callback(dispatcher.close)
        tasks, averaging_metrics = TaskSet(swarm.host.restarts), AveragingMetrics(swarm.metrics)
        joined = _Joined(
            swarm, directory, dispatcher, routing, announcer, averaging_metrics, [], memories, tasks
        )
        exits.push_async_callback(joined.close_averagings)
        exits.push_async_callback(tasks.aclose)

        warmer = SessionWarmer(sessions, channels, lambda: directory.view.nodes.values())
        tasks.supervise("keep the view of the swarm fresh", directory.keep_fresh)
        tasks.supervise("stay in the swarm", lambda: swarm.membership.keep(_CHECK_EVERY_S))
        tasks.supervise("know who is admitted", lambda: swarm.keep_admission(_CHECK_EVERY_S, joined.recheck))
        if not self._reads_only:
            tasks.supervise("announce this trainer", announcer.run)
        tasks.supervise("open sessions with nodes", warmer.run)
        tasks.supervise("sign for nodes", receipts.run)
        return joined

    async def _join_swarm(self, role: Role) -> Swarm:
        """A trainer's invite also admits a reader."""
        settings = self._settings
        swarm = await join_swarm(
            Identity.load_or_create(self._folder.path / "identity.key"),
            self._invite,
            NetworkConfig(self._listens_at, serves_dht=False, p2pd=settings.p2pd == "auto"),
            state=self._folder.path,
            roles=tuple(dict.fromkeys((Role.TRAINER, role))),
            exports=self._exports,
            denylist=Denylist(settings.denylist or self._folder.path / DENYLIST, settings.deny),
            stage=self._stage,
        )
        self._exits.push_async_callback(swarm.stop)
        lag = LoopLag(swarm.metrics)
        lag.start()
        self._exits.callback(lag.stop)
        return swarm

    def _make_dispatcher(
        self,
        swarm: Swarm,
        directory: Directory,
        channels: ChannelPool,
        sessions: SessionClient,
        credit: CreditAccounts,
    ) -> Dispatcher:
        settings, manifest, swarm_id = self._settings, swarm.manifest, swarm.keys.swarm_id
        metrics, codec = DispatchMetrics(swarm.metrics), codec_of(manifest.wire.codec)
        caller = GrpcCaller(channels, swarm_id, manifest.width, codec, sessions, metrics)
        checking, loader = None, self._make_loader(manifest, swarm_id)
        if loader is not None and settings.check_share:
            source = BlockClient(channels, sessions, swarm_id, loader.max_bytes)
            checking = Checking(settings.check_share, source, loader, swarm.guard)
        least_s = self._timing.least_deadline_s
        return Dispatcher(
            directory,
            self._through(caller),
            WaitPolicy(settings.call_deadline_s, settings.grace_s, settings.k_min, least_s),
            checking=checking,
            seed=random.SystemRandom().getrandbits(32),
            is_silent=caller.is_silent,
            responds=caller.responds,
            metrics=metrics,
            credit=credit,
        )

    async def _average(self, exchange: DenseExchange) -> Averaging:
        joined, settings = self._joined, self._settings
        swarm = joined.swarm
        host = settings.average_host or self._listens_at
        # a peer has one tunnel, which leads to the first of them
        relays = None
        if is_hidden(host) and not joined.averagings:
            relays = RelayKeeper(swarm, _MAX_TUNNEL_RELAYS, random.SystemRandom())
        averaging = Averaging(
            exchange,
            swarm.host.identity,
            swarm.registry,
            AveragingSchedule(settings.average_every, settings.announce_every_s),
            admission=swarm.admission,
            channels=swarm.host.channels(MAX_CALLS),
            relays=relays,
        )
        joined.averagings.append(averaging)
        await averaging.start(host, settings.average_port)
        if relays is not None:
            self._stage("looking for a relay")
            await swarm.host.serve_tunnel(averaging.open_for, _MAX_TUNNEL_STREAMS)
            await relays.begin()
        averaging.keep_meeting(joined.tasks)
        joined.announcer.announce_averaging(averaging)
        return averaging

    async def _refresh_soon(self) -> None:
        await asyncio.sleep(_RETRY_S)
        with contextlib.suppress(UnreachableError):  # the directory's own task logs it
            await self._joined.directory.refresh()


def _channels_to_nodes(swarm: Swarm) -> ChannelPool:
    channels = swarm.host.channels(_MAX_CHANNELS)
    called = Gauge(
        "talkoot_trainer_nodes",
        "Nodes that this trainer called lately, by the way that it took last.",
        ["way"],
        registry=swarm.metrics,
    )
    for way in WAYS:
        called.labels(way).set_function(partial(channels.called_by, way))
    return channels


def _seed_of(swarm: Swarm) -> int:
    return int.from_bytes(swarm.host.peer_id.to_bytes()[-8:], "big") >> 1


def _float(value: float, name: str) -> float:
    """Also of a number of numpy or torch. torch warns if a tensor with a graph is passed to `float`.

    Raises TypeError.
    """
    try:
        if isinstance(value, str):
            raise TypeError
        return float(value.detach() if isinstance(value, Tensor) else value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"pass {name} as a number or as a tensor with one element, and not {in_brief(value)}"
        ) from None
