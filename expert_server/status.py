"""What a node says about itself: its status, its contribution over all runs, and its record in the DHT."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field

from dht.announcements import Activity, Reachability
from dht.receipts import SignedWork
from expert_server.settings import NodeSettings
from peer import PROTOCOL_VERSION, SOFTWARE_VERSION
from peer.files import read_state_file, write_state_file
from peer.wire import records_pb2

_MAX_FILE_BYTES = 4096
_RATE_OVER_S = 5.0
"""The shortest time over which a rate is measured."""


class NodeState(Enum):
    """What a node is doing."""

    JOINING = "joining"
    SERVING = "serving"
    PAUSED = "paused"
    UNREACHABLE = "no other node answers"
    DRAINING = "draining"
    STOPPING = "stopping"


@dataclass(frozen=True)
class NodeStatus:
    """A summary of a node for its owner."""

    state: NodeState
    experts: int
    capacity: int
    """The most experts that it would host, including those it would adopt."""
    adopted: int
    updates: int
    rows: int
    queued_rows: int
    peers: int
    """Known DHT peers."""
    pause_reason: str
    """Why it is paused, such as `paused until 22:00`; while it serves, why it would be paused if its owner had not
    resumed it; else empty.
    """
    calls: int
    uploaded_bytes: int
    """The payload of answers. `downloaded_bytes`: the payload of calls."""
    downloaded_bytes: int
    upload_mbit: float | None
    """The limit, if there is one."""
    download_mbit: float | None
    memory_bytes: int
    """About how many bytes experts, kept forward passes and waiting rows take."""
    memory_limit_bytes: int
    """The most that they may take."""
    busy_s: float
    """Time spent computing since the start."""
    threads: int
    contributed_rows: int
    """Over all runs, like the next ones."""
    contributed_updates: int
    contributed_hours: float
    replicated: int
    """How many of the experts other nodes serve too."""
    handed_over: int
    """Experts that others took over when this node left."""
    reachability: str = ""
    """How others reach it, in words, such as `direct` or `relayed by 3 relays`."""
    reachability_advice: str = ""
    """What the owner can do so that others connect directly; empty if they already do."""
    unsteady: tuple[str, ...] = ()
    """Its tasks that failed and restarted too often recently, such as `announce`."""
    memory_shards: int = 0
    """Served shards of memories."""
    memory_disk_bytes: int = 0
    """Bytes of memories on disk."""
    memory_queries: int = 0
    """Answered queries to memories."""
    clock_warning: str = ""
    """A warning in words, if most peers say that this machine's clock is wrong."""
    signed: SignedWork = field(default_factory=SignedWork)
    """The work that trainers have signed for, over all runs."""
    trained: int = 0
    """Experts that were trained here in this run."""
    trainers: int = 0
    """Trainers that have trained its experts in this run."""
    trainers_now: int = 0
    """Trainers that have done so in the last minute."""
    swarm_trainers: int | None = None
    """Active trainers in the whole swarm; None: not known yet."""
    swarm_experts: int = 0
    """Experts in the model."""
    loss: float | None = None
    """The lowest validation loss of the swarm's trainers, in nats per token; None: not known."""
    loss_at_first: float | None = None
    """The first such loss that this node heard of."""
    loss_age: str = ""
    """How long ago this node last heard of the loss, such as `12 min`; empty if that was just now, or never."""
    alone: tuple[str, ...] = ()
    """Experts that nobody else serves, as far as the node knows."""
    offline: int | None = None
    """How many of the experts that it gave up last nobody took over; None: not known."""


class Contribution(BaseModel):
    """Rows computed, optimizer steps taken, and seconds served."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", frozen=True)

    rows: int = Field(default=0, ge=0, lt=2**63)
    updates: int = Field(default=0, ge=0, lt=2**63)
    served_s: float = Field(default=0.0, ge=0, allow_inf_nan=False)


class ContributionAccount:
    """A node's contribution over all its runs, kept in a small file. Only one process at a time may use it."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        parse, lost = Contribution.model_validate_json, "the contribution is counted from 0 again"
        self._before = read_state_file(path, _MAX_FILE_BYTES, parse, lost) or Contribution()
        self._served_s = 0.0
        self._serves_since: float | None = None

    def note(self, *, serves: bool) -> None:
        """`serves`: whether the node serves from now on."""
        now = self._clock()
        if self._serves_since is not None:
            self._served_s += now - self._serves_since
        self._serves_since = now if serves else None

    def total(self, rows: int, updates: int, signed_rows: int = 0) -> Contribution:
        """The contribution of all runs. `rows`, `updates`: how many there were in this run.

        `signed_rows`: the rows that callers have signed for. A node that was killed has lost its own count of its last
        seconds, for which callers sign later.
        """
        before = self._before
        return Contribution(
            rows=max(before.rows + rows, signed_rows),
            updates=before.updates + updates,
            served_s=before.served_s + self._served_s,
        )

    async def save(self, total: Contribution) -> None:
        await asyncio.to_thread(
            write_state_file,
            self._path,
            total.model_dump_json().encode(),
            "after a restart, the totals are older",
        )

    async def save_every(self, seconds: float, total: Callable[[], Contribution]) -> None:
        """Saves until cancelled."""
        while True:
            await asyncio.sleep(seconds)
            await self.save(total())


class _Rate:
    """How fast a count grows between two records."""

    def __init__(self, started_at: float) -> None:
        self.per_s = 0.0
        self._before = started_at, 0

    def note(self, count: int, now: float) -> None:
        then, before = self._before
        if now - then >= _RATE_OVER_S:
            self.per_s = (count - before) / (now - then)
            self._before = now, count


class NodeRecordBuilder:
    """Makes a node's records, one after another. Rates in a record come from the difference to the previous one."""

    def __init__(self, settings: NodeSettings, certificate: bytes, started_at: float) -> None:
        self._settings = settings
        self._certificate = certificate
        self._started_at = started_at
        self._said_at: float | None = None
        self._rows, self._queries = _Rate(started_at), _Rate(started_at)

    def record(
        self,
        status: NodeStatus,
        activity: Activity,
        now: float,
        *,
        addresses: Sequence[str],
        metrics_address: str,
        reachability: Reachability = Reachability.UNKNOWN,
        tunnel_addresses: Sequence[str] = (),
        relay_addresses: Sequence[str] = (),
        period_s: float = 0.0,
    ) -> records_pb2.NodeRecord:
        """The node's present record. A node that pauses or leaves offers no room.

        `period_s`: the time between two records, if it is longer than the settings say.
        """
        self._rows.note(status.rows, now)
        self._queries.note(status.memory_queries, now)
        return records_pb2.NodeRecord(
            addresses=addresses,
            certificate=self._certificate,
            protocol_version=PROTOCOL_VERSION,
            software_version=SOFTWARE_VERSION,
            expert_count=status.experts,
            expert_capacity=status.capacity if activity is Activity.SERVING else 0,
            rows_processed=status.rows,
            updates=status.updates,
            started_at=self._started_at,
            name=self._settings.name or "",
            activity=activity.value,
            metrics_address=metrics_address,
            rows_per_s=self._rows.per_s,
            renew_every_s=self._renewal(now, period_s),
            contributed_rows=status.contributed_rows,
            contributed_updates=status.contributed_updates,
            contributed_s=status.contributed_hours * 3600,
            reachability=reachability.value,
            tunnel_addresses=tunnel_addresses,
            relay_addresses=relay_addresses,
            unsteady=bool(status.unsteady),
            memory_shards=status.memory_shards,
            memory_bytes=status.memory_disk_bytes,
            memory_queries=status.memory_queries,
            memory_queries_per_s=self._queries.per_s,
            signed=status.signed.message() if status.signed.trainers else None,
        )

    def _renewal(self, now: float, period_s: float) -> float:
        """The time until the next record, estimated by the last period, because a round of announcements takes time
        too.
        """
        period_s = max(period_s, self._settings.announce_every_s)
        last, self._said_at = self._said_at, now
        took_s = 0.0 if last is None else now - last
        return min(max(period_s, took_s), 3 * period_s)
