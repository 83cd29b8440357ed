"""Watches a swarm: joins it, reads it every few seconds, and keeps the last picture if it can't be reached."""

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from prometheus_client import CollectorRegistry, Counter, Gauge

from dht.announcements import NodeInfo, TrainerInfo
from dht.invites import Invite
from dht.library import MemoryRegistry
from dht.memory import MemoryID
from dht.swarm import Swarm, join_swarm
from peer import clock
from peer.errors import StartError, SwarmError, UnreachableError, UserError
from peer.host import NetworkConfig
from peer.identity import Identity, PeerID
from peer.kademlia.node import Spending
from peer.loop import LoopLag, Restarts, TaskSet, keep_running
from peer.rates import pause_at_rate
from peer.transport.addresses import Multiaddress
from talkoot.credit import Credit, CreditReader
from talkoot.dashboard.api import DashboardState
from talkoot.dashboard.history import MAX_EXPERTS, HistoryStore, Sample
from talkoot.dashboard.picture import (
    MAX_MEMORIES,
    MAX_NODES,
    MAX_TRAINERS,
    CallRateMeter,
    Census,
    HostChecks,
    Json,
    Picture,
    paint,
)
from talkoot.memory.replication import Survey, survey
from talkoot.status import SwarmReader, SwarmReading
from trainer_client.memory.audits import Auditor
from trainer_client.memory.calls import RetrieverMetrics

logger: logging.Logger = logging.getLogger(__name__)

_JOIN_AGAIN_S = 5.0
_CHECK_EVERY_S = 10.0
_KEEP_EVERY_S = 60.0
_CREDITED_AT_ONCE, _CREDIT_S = 32, 15.0
"""Nodes whose receipts are read at a time, and the longest time for that."""
_CHECKED_CHANNELS = 16
_SURVEY_BYTES_PER_S, _SURVEYED_WITHIN_S = 10_000, 600.0
"""How many bytes surveys of memories take on average, and the longest pause between two."""
_FAILURES_TO_SAY_SO = 2
"""After this many failed readings in a row, the swarm counts as unreachable."""

_FIGURES = (
    ("nodes", "Live nodes.", "nodes", "live"),
    ("experts", "Experts of the model.", "experts", "total"),
    ("live_experts", "Experts that some node serves.", "experts", "live"),
    ("replicas", "Replicas that are served.", "replicas"),
    ("trainers", "Live trainers.", "trainers"),
    ("tokens_per_second", "Tokens trained on, by all trainers.", "tokens_per_s"),
    ("calls_per_second", "Calls to nodes, by all trainers.", "requests_per_s"),
    ("bytes_per_second", "Payload between trainers and nodes.", "bytes_per_s"),
    ("validation_loss_nats", "Lowest of all trainers, for each token.", "validation_loss"),
    ("memories", "Memories that are published.", "memories", "count"),
    ("memory_shards", "Shards of all memories.", "memories", "shards"),
    ("memory_shards_below_two", "Shards that fewer than two nodes serve.", "memories", "below_two"),
    ("memory_queries_per_second", "Queries answered, by all nodes.", "memories", "queries_per_s"),
    ("bpb", "Bits per byte, of the trainer with the lowest validation loss.", "bits_per_byte"),
)
"""Metrics of the whole swarm: name, description, and keys of the picture's figures. No label names a peer."""


@dataclass(frozen=True)
class WatchIntervals:
    """How often a watcher looks, in seconds."""

    refresh_s: float
    list_every_s: float = 30.0
    """How often it lists all nodes. In between, it only discovers nodes that begin to host experts."""
    experts_every_s: float = 15.0
    """How often each expert's figures are added to the history."""
    memories_every_s: float = 15.0
    """How often it looks up who hosts the shards of memories; less often if there are many."""
    credit_every_s: float = 15.0
    """How often it reads the receipts of some nodes."""
    checks_every_s: float = 15.0
    """How often it checks two hosts of a memory."""


class Watcher:
    """One dashboard's view of its swarm. `run` it as a task."""

    def __init__(
        self,
        invite: Invite,
        intervals: WatchIntervals,
        folder: Path,
        store: HistoryStore,
        kept: Picture | None,
        *,
        metrics: CollectorRegistry | None = None,
        now: Callable[[], float] = clock.now,
    ) -> None:
        """`kept`: the last picture of an earlier run."""
        self.picture = kept
        self.unreachable_since: float | None = None
        self.bootstrap: tuple[Multiaddress, ...] = invite.bootstrap
        self.readings: Counter = Counter(
            "talkoot_dashboard_readings", "Readings of the swarm that succeeded.", registry=metrics
        )
        self.failures: Counter = Counter(
            "talkoot_dashboard_failed_readings", "Readings of the swarm that failed.", registry=metrics
        )
        self.restarts: Restarts = Restarts(metrics)
        self._lag = LoopLag(metrics)
        self._expose(metrics)
        self._was_read = False
        self._invite = invite
        self._shown_invite = str(replace(invite, token=b""))
        """The invite without the token, because people who see the page must not join with the owner's token."""
        self._intervals = intervals
        self._folder = folder
        self._store = store
        self._now = now
        self._failed_in_a_row = 0
        self._news = asyncio.Event()
        self._nodes: Census[NodeInfo] = Census(MAX_NODES)
        self._trainers: Census[TrainerInfo] = Census(MAX_TRAINERS)
        self._call_rates = CallRateMeter()
        self._earlier: tuple[list[Json], list[Json]] = (
            ([], []) if kept is None else (kept.nodes, kept.trainers)
        )
        self._surveys: tuple[Survey, ...] = ()
        self.credit: Mapping[PeerID, Credit] = {}
        """The work that trainers have signed, for nodes whose receipts were read."""
        self._checks: dict[MemoryID, HostChecks] = {}
        self._check_metrics = RetrieverMetrics(metrics)
        self._experts_at = self._kept_at = float("-inf")

    def state(self) -> DashboardState:
        return DashboardState(
            self.picture,
            self._invite.keys.swarm_id,
            self._invite.keys.name,
            self._shown_invite,
            self.unreachable_since,
            self._intervals.refresh_s,
            self._now(),
            self._lag.longest_s,
            self.restarts.unsteady,
        )

    async def news(self) -> None:
        """Waits until the next reading has succeeded or failed."""
        await self._news.wait()

    async def run(self) -> None:
        """Joins and watches forever. Raises UserError if the invite is for a swarm that was never seen here."""
        self._lag.start()
        try:
            await keep_running("watch the swarm", self._join_and_watch, self.restarts, fatal=UserError)
        finally:
            self._lag.stop()

    async def _join_and_watch(self) -> None:
        while True:
            try:
                swarm = await self._join()
            except UnreachableError as error:
                self._failed(error)
            except (SwarmError, StartError) as error:
                if self.picture is None:
                    raise
                self._failed(error)
            else:
                try:
                    await self._watch(swarm)
                finally:
                    await swarm.stop()
            await asyncio.sleep(_JOIN_AGAIN_S)

    async def keep(self) -> None:
        """Saves the picture for the next run."""
        if self.picture is not None:
            self._kept_at = time.monotonic()
            await self._store.keep_picture(self.picture)

    def _expose(self, metrics: CollectorRegistry | None) -> None:
        """Creates the gauges of the swarm. Unknown figures are NaN."""

        def gauge(name: str, words: str, value: Callable[[], float | None]) -> None:
            def read() -> float:
                number = value()
                return math.nan if number is None else number

            Gauge(name, words, registry=metrics).set_function(read)

        def figure(*keys: str) -> float | None:
            if self.picture is None or self.unreachable_since is not None:
                return None
            found: Any = self.picture.figures
            for key in keys:
                found = found[key]
            return cast(float | None, found)

        gauge(
            "talkoot_swarm_reachable",
            "1 while the dashboard can read the swarm.",
            lambda: self.unreachable_since is None,
        )
        gauge(
            "talkoot_swarm_read_timestamp_seconds",
            "When the figures of the swarm were read.",
            lambda: None if self.picture is None else self.picture.read_at,
        )
        for name, words, *keys in _FIGURES:
            gauge(f"talkoot_swarm_{name}", words, partial(figure, *keys))

    async def _join(self) -> Swarm:
        identity = await asyncio.to_thread(Identity.load_or_create, self._folder / "identity.key")
        # told once, and not again every few seconds while nobody answers
        stage = logger.info if self.unreachable_since is None else logger.debug
        return await join_swarm(
            identity,
            self._invite,
            NetworkConfig("127.0.0.1", serves_dht=False),
            state=self._folder,
            stage=stage,
        )

    async def _watch(self, swarm: Swarm) -> None:
        reader = SwarmReader(swarm, list_every_s=self._intervals.list_every_s, most_nodes=MAX_NODES)
        tasks = TaskSet(self.restarts)
        tasks.supervise("stay in the swarm", lambda: swarm.membership.keep(_CHECK_EVERY_S))
        tasks.supervise("know who is admitted", lambda: swarm.keep_admission(_CHECK_EVERY_S, lambda: None))
        tasks.supervise("survey the memories", lambda: self._survey_memories(MemoryRegistry(swarm.registry)))
        credit = CreditReader.of(swarm)
        tasks.supervise("read receipts", lambda: self._read_receipts(credit))
        auditor = Auditor(
            swarm, swarm.host.channels(_CHECKED_CHANNELS), self._folder / "memories", self._check_metrics
        )
        tasks.supervise("check the hosts of memories", lambda: self._check_hosts(auditor))
        try:
            while tasks:
                try:
                    reading = await reader.read()
                    if not await swarm.registry.is_manifest_held():
                        raise UnreachableError("no peer of the swarm answers")
                    await self._note(reading, swarm.admission.revoked)
                except UnreachableError as error:
                    self._failed(error)
                await asyncio.sleep(self._intervals.refresh_s)
        finally:
            await tasks.aclose()
            await credit.close()
            await auditor.close()

    async def _survey_memories(self, memories: MemoryRegistry) -> None:
        """Surveys memories until cancelled. If the DHT does not answer, the last surveys stay."""
        while True:
            spending = Spending()
            with spending.counted(), contextlib.suppress(UnreachableError):
                libraries = await memories.libraries()
                entries = [entry for listed in libraries.values() for entry in listed][:MAX_MEMORIES]
                self._surveys = tuple([await survey(memories, entry) for entry in entries])
            cost, every_s = spending.bytes, self._intervals.memories_every_s
            await asyncio.sleep(pause_at_rate(cost, _SURVEY_BYTES_PER_S, every_s, _SURVEYED_WITHIN_S))

    async def _check_hosts(self, auditor: Auditor) -> None:
        """Checks hosts until cancelled, of one memory at a time, so that many memories cost no more than one."""
        while True:
            if self._surveys:
                audit = await auditor.check([found.entry for found in self._surveys])
                watched = {found.entry.memory for found in self._surveys} | {audit.memory}
                self._checks = {memory: kept for memory, kept in self._checks.items() if memory in watched}
                self._checks.setdefault(audit.memory, HostChecks()).note(audit)
            await asyncio.sleep(self._intervals.checks_every_s)

    async def _read_receipts(self, credit: CreditReader) -> None:
        """Reads receipts until cancelled, of a few nodes at a time, so that a large swarm costs no more than a small
        one.
        """
        while True:
            await credit.read(self._nodes.live().values(), _CREDITED_AT_ONCE, _CREDIT_S)
            self.credit = credit.credit
            await asyncio.sleep(self._intervals.credit_every_s)

    async def _note(self, reading: SwarmReading, revoked: Collection[int]) -> None:
        if self.unreachable_since is not None:
            logger.info("the swarm can be reached again")
        self.unreachable_since, self._failed_in_a_row = None, 0
        self.readings.inc()
        self._was_read = True
        now = reading.view.read_at
        self._nodes.note(reading.nodes, now, reading.left_nodes, revoked)
        self._trainers.note(reading.trainers, now, reading.left_trainers, revoked)
        rates = self._call_rates.note(self._trainers)
        surveys, credit = self._surveys, self.credit
        checks = {memory: replace(kept, caught=dict(kept.caught)) for memory, kept in self._checks.items()}

        def painted() -> Picture:
            picture = paint(
                reading.view,
                self._nodes,
                self._trainers,
                rates,
                reading.warning,
                surveys,
                credit,
                checks,
            )
            return picture.with_earlier(*self._earlier)

        # of 20,000 nodes, it takes most of a second
        self.picture = await asyncio.to_thread(painted)
        await self._remember(self.picture, now)
        self.tell()

    async def _remember(self, picture: Picture, now: float) -> None:
        steady, samples = time.monotonic(), list(samples_of(picture))
        few = picture.figures["experts"]["total"] <= MAX_EXPERTS
        if few and steady >= self._experts_at + self._intervals.experts_every_s:
            self._experts_at = steady
            samples += expert_samples_of(picture)
        await self._store.add(samples, now)
        if steady >= self._kept_at + _KEEP_EVERY_S:
            await self.keep()

    def _failed(self, error: Exception) -> None:
        self.failures.inc()
        self._failed_in_a_row += 1
        if self.unreachable_since is None and (
            self._failed_in_a_row >= _FAILURES_TO_SAY_SO or not self._was_read
        ):
            self.unreachable_since = self._now()
            logger.warning("cannot reach the swarm: %s; the page shows the last state", error)
        self.tell()

    def tell(self) -> None:
        """Wakes everybody who waits for news."""
        self._news.set()
        self._news = asyncio.Event()


def samples_of(picture: Picture) -> Iterator[Sample]:
    """The figures that have a history. An unknown figure leaves a gap, and so does the end of a run, because the
    trainer's next run is another line.
    """
    figures = picture.figures
    yield Sample("live_experts", "live experts", figures["experts"]["live"])
    yield Sample("live_nodes", "live nodes", figures["nodes"]["live"])
    for metric, name in (
        ("tokens_per_s", "all trainers"),
        ("bytes_per_s", "all trainers"),
        ("validation_loss", "lowest of all trainers"),
    ):
        if figures[metric] is not None:
            yield Sample(metric, name, figures[metric])
    for name, value in figures["latency_ms"].items():
        if value is not None:
            yield Sample("latency_ms", name, value)
    for cause, rate in figures["failures_per_min"].items():
        yield Sample("failures", cause, rate)
    if figures["memories"]["count"]:
        yield Sample("memory_queries_per_s", "all nodes", figures["memories"]["queries_per_s"])
    for row in picture.memories:
        yield Sample("memory_replicas", f"fewest, {row['memory']}", row["replicas_min"])
        yield Sample("memory_replicas", f"mean, {row['memory']}", row["replicas_mean"])
    for row in picture.trainers:
        is_live = row["state"] in {"training", "own loop"}
        has_just_ended = row["state"] in {"finished", "stopped"} and row["seen_at"] == picture.read_at
        for metric, name, value in (
            ("loss", row["short"], row["loss"]),
            ("loss", f"{row['short']} validation", row["validation_loss"]),
            ("bits_per_byte", row["short"], row["bits_per_byte"]),
        ):
            if value is not None and (is_live or has_just_ended):
                yield Sample(metric, name, value)
            if value is None or not is_live:
                yield Sample(metric, name, math.nan)


def expert_samples_of(picture: Picture) -> Iterator[Sample]:
    for uid, replicas in picture.replicas.items():
        serving = [row for row in replicas if row["state"] == "serving"]
        yield Sample("expert_replicas", uid, len(serving))
        if serving:
            yield Sample("expert_updates", uid, max(row["updates"] for row in serving))
