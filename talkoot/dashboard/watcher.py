"""Keeps a picture of a swarm: joins it, reads it again and again, and goes on with the last picture when it can't."""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from dht.announcements import TrainerInfo
from dht.invites import Invite
from dht.registry import NodeInfo
from dht.swarm import Swarm, join_swarm
from peer.errors import StartError, SwarmError, UnreachableError
from peer.identity import Identity
from peer.transport.addresses import NetworkConfig
from talkoot.dashboard.api import DashboardState
from talkoot.dashboard.history import HistoryStore, Sample
from talkoot.dashboard.picture import Census, Paces, Picture, paint
from talkoot.dashboard.settings import DashboardSettings
from talkoot.status import SwarmReader, SwarmReading

logger = logging.getLogger(__name__)

_JOIN_AGAIN_S = 5.0
_CHECK_EVERY_S = 10.0
_KEEP_EVERY_S = 60.0
_FAILURES_TO_SAY_SO = 2
"""After so many readings in a row that failed the swarm is called unreachable."""


class Watcher:
    """One dashboard's sight of its swarm. `run` it as a task."""

    def __init__(
        self,
        invite: Invite,
        settings: DashboardSettings,
        folder: Path,
        keeper: HistoryStore,
        kept: Picture | None,
        now: Callable[[], float] = time.time,
    ) -> None:
        """`kept`: the last picture of an earlier run."""
        self.picture = kept
        self.unreachable_since: float | None = None
        self.bootstrap = invite.bootstrap
        self.readings = self.failures = 0
        self._invite = invite
        self._shown_invite = str(replace(invite, token=b""))
        """Whoever sees the page may not get in by the token of whoever runs it."""
        self._settings = settings
        self._folder = folder
        self._keeper = keeper
        self._now = now
        self._failed_in_a_row = 0
        self._news = asyncio.Event()
        self._nodes: Census[NodeInfo] = Census(
            settings.silence_factor, settings.most_nodes, settings.most_gone, settings.gone_kept_s
        )
        self._trainers: Census[TrainerInfo] = Census(
            settings.silence_factor, settings.most_trainers, settings.most_trainers, settings.gone_kept_s
        )
        self._paces = Paces()
        self._earlier = [] if kept is None else kept.nodes
        self._experts_at = self._kept_at = float("-inf")

    def sight(self) -> DashboardState:
        return DashboardState(
            self.picture,
            self._invite.keys.swarm_id,
            self._invite.keys.name,
            self._shown_invite,
            self.unreachable_since,
            self._settings.refresh_s,
            self._now(),
        )

    async def news(self) -> None:
        """Waits for the next reading, or for the news that there is none."""
        await self._news.wait()

    async def run(self) -> None:
        """Joins and watches, for ever. Raises UserError when the invite is of no swarm that was ever seen here."""
        while True:
            try:
                swarm = await self._join()
            except UnreachableError as error:
                self._failed(error)
            except SwarmError as error:
                if self.picture is None:
                    raise
                self._failed(error)
            else:
                try:
                    await self._watch(swarm)
                except StartError as error:  # p2pd can't be started again; a new join may do better
                    self._failed(error)
                finally:
                    await swarm.stop()
            await asyncio.sleep(_JOIN_AGAIN_S)

    async def keep(self) -> None:
        """Writes the picture down, for the next run."""
        if self.picture is not None:
            self._kept_at = self._now()
            await self._keeper.keep_picture(self.picture)

    async def _join(self) -> Swarm:
        identity = await asyncio.to_thread(Identity.load_or_create, self._folder / "identity.key")
        return await join_swarm(
            identity, self._invite, NetworkConfig("127.0.0.1", serves_dht=False), state=self._folder
        )

    async def _watch(self, swarm: Swarm) -> None:
        settings = self._settings
        reader = SwarmReader(swarm, list_every_s=settings.list_every_s, most_nodes=settings.most_nodes)
        member = asyncio.create_task(swarm.membership.keep(_CHECK_EVERY_S), name="stay in the swarm")
        try:
            while not member.done():
                try:
                    reading = await reader.read()
                    if not await swarm.registry.is_manifest_held():
                        raise UnreachableError("no peer of the swarm answers")
                    await self._note(reading)
                except UnreachableError as error:
                    self._failed(error)
                await asyncio.sleep(settings.refresh_s)
        finally:
            member.cancel()
            await asyncio.gather(member, return_exceptions=True)

    async def _note(self, reading: SwarmReading) -> None:
        if self.unreachable_since is not None:
            logger.info("the swarm can be reached again")
        self.unreachable_since, self._failed_in_a_row = None, 0
        self.readings += 1
        now = reading.view.read_at
        self._nodes.note(reading.nodes, now)
        self._trainers.note(reading.trainers, now)
        pace = self._paces.note(self._trainers)
        cells = self._settings.most_cells
        picture = paint(reading.view, self._nodes, self._trainers, pace, cells, self.picture, reading.warning)
        self.picture = picture.with_earlier(
            self._earlier, self._settings.most_gone, self._settings.gone_kept_s
        )
        await self._remember(self.picture, now)
        self.tell()

    async def _remember(self, picture: Picture, now: float) -> None:
        samples = list(samples_of(picture))
        total = picture.figures["experts"]["total"]
        if (
            now >= self._experts_at + self._settings.experts_every_s
            and total <= self._settings.history_experts
        ):
            self._experts_at = now
            samples += expert_samples_of(picture)
        await self._keeper.add(samples, now)
        if now >= self._kept_at + _KEEP_EVERY_S:
            await self.keep()

    def _failed(self, error: Exception) -> None:
        self.failures += 1
        self._failed_in_a_row += 1
        if self.unreachable_since is None and (
            self._failed_in_a_row >= _FAILURES_TO_SAY_SO or not self.readings
        ):
            self.unreachable_since = self._now()
            logger.warning("cannot reach the swarm: %s; the page shows what was seen last", error)
        self.tell()

    def tell(self) -> None:
        """Wakes all who wait for news."""
        self._news.set()
        self._news = asyncio.Event()


def samples_of(picture: Picture) -> Iterator[Sample]:
    """What has a history; what can't be told now leaves a gap."""
    figures = picture.figures
    yield Sample("live_experts", "live experts", figures["experts"]["live"])
    yield Sample("live_nodes", "live nodes", figures["nodes"]["live"])
    for metric, name in (("tokens_per_s", "all trainers"), ("bytes_per_s", "all trainers")):
        if figures[metric] is not None:
            yield Sample(metric, name, figures[metric])
    for name, value in figures["latency_ms"].items():
        if value is not None:
            yield Sample("latency_ms", name, value)
    for cause, rate in figures["failures_per_min"].items():
        yield Sample("failures", cause, rate)
    for row in picture.trainers:
        if row["state"] != "gone":
            for metric, name, value in (
                ("loss", row["short"], row["loss"]),
                ("loss", f"{row['short']} validation", row["validation_loss"]),
                ("bits_per_byte", row["short"], row["bits_per_byte"]),
            ):
                if value is not None:
                    yield Sample(metric, name, value)


def expert_samples_of(picture: Picture) -> Iterator[Sample]:
    for uid, replicas in picture.replicas.items():
        serving = [row for row in replicas if row["state"] == "serving"]
        yield Sample("expert_replicas", uid, len(serving))
        if serving:
            yield Sample("expert_updates", uid, max(row["updates"] for row in serving))
