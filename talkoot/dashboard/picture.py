"""What the dashboard shows: plain JSON, made once for each reading of the swarm and served many times.

A reading shows only the present. `Census` and `CallRateMeter` remember earlier readings, and derive who has gone and
how fast counts grow. Everything is pure: times are arguments.
"""

import math
import statistics
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any, Generic, Protocol, TypeVar

from dht.admission import Grant
from dht.announcements import Activity, Latency, NodeInfo, Replica, ReplicaState, TrainerInfo
from dht.directory import View
from dht.library import WANTED_REPLICAS
from dht.manifest import Manifest
from dht.memory import MemoryID
from dht.uid import number_of
from peer.bounded import BoundedDict
from peer.identity import PeerID
from talkoot.credit import Credit, signed_figures
from talkoot.memory.replication import Survey
from talkoot.status import trainer_state, up_s
from trainer_client.memory.audits import Audit

SILENCE_FACTOR = 1.5
"""A peer counts as gone if it has not renewed its record for this many of its own periods."""
MAX_NODES = 20_000
"""The most nodes that are shown, drawn at random if there are more."""
MAX_TRAINERS = 1000
MAX_MEMORIES = 64
"""The most memories that are watched."""
MAX_CAUGHT = 16
"""The most hosts of one memory that are named for leaving out passages or lying."""
MAX_GONE = 1000
"""The most peers that are still listed after they have gone."""
GONE_KEPT_S = 86400.0
ENDED = frozenset({"left", "finished", "stopped", "gone"})
"""States of peers that are no longer there. Those that are gone left without notice."""
STARVING_SHARE = 0.1
"""An expert with less than this share of the mean expert's rows is starving."""
MAX_CELLS = 65536
"""The grid of a layer with more experts than this is not shown."""


class Renewed(Protocol):
    """A record that its peer renews."""

    @property
    def peer_id(self) -> PeerID: ...
    @property
    def expires_at(self) -> float: ...
    @property
    def renew_every_s(self) -> float: ...
    @property
    def started_at(self) -> float: ...
    @property
    def grant(self) -> Grant | None: ...


T = TypeVar("T", bound=Renewed)
_NOBODY: Mapping[PeerID, Any] = MappingProxyType({})


@dataclass
class Seen(Generic[T]):
    """A peer's last record."""

    info: T
    name: str
    """The PeerID, in base58."""
    seen_at: float
    """When the record was first seen, by this machine's clock, because others may be wrong."""
    gone: bool = False
    """Whether the peer is no longer there."""
    left: bool = False
    """Whether it has left in an orderly way, and announced that; or the swarm no longer admits it."""


class Census(Generic[T]):
    """Records readings, and decides who is live. A peer has gone if it no longer renews its record."""

    def __init__(self, most: int, most_gone: int = MAX_GONE, gone_kept_s: float = GONE_KEPT_S) -> None:
        self.seen: dict[PeerID, Seen[T]] = {}
        self._most = most
        self._most_gone = most_gone
        self._gone_kept_s = gone_kept_s

    def note(
        self,
        found: Mapping[PeerID, T],
        now: float,
        left: Mapping[PeerID, T] = _NOBODY,
        revoked: Collection[int] = (),
    ) -> None:
        """`found`: all valid records of a reading. `left`: records of peers that have left in an orderly way.
        `revoked`: the serials of revoked grants.
        """
        for peer_id, info in found.items():
            seen = self.seen.get(peer_id)
            if seen is None:
                if len(self.seen) < self._most + self._most_gone:
                    self.seen[peer_id] = Seen(info, peer_id.to_base58(), now)
            elif info.expires_at != seen.info.expires_at:
                seen.info, seen.seen_at, seen.left = info, now, False
        for peer_id, info in left.items():
            seen = self.seen.get(peer_id)
            if seen is not None and not seen.left:
                seen.left, seen.seen_at = True, now
                if info.started_at:  # otherwise the record says only that it has left
                    seen.info = info
        for seen in self.seen.values():
            seen.seen_at = min(seen.seen_at, now)  # it was later if the clock was set back meanwhile
            grant = seen.info.grant
            # others no longer accept its records, so it can't say that it leaves
            if grant is not None and not seen.left and (grant.serial in revoked or grant.expires_at <= now):
                seen.left, seen.seen_at = True, now
            seen.gone = seen.left or now - seen.seen_at > SILENCE_FACTOR * seen.info.renew_every_s
        self._forget(now)

    def live(self) -> dict[PeerID, T]:
        return {peer_id: seen.info for peer_id, seen in self.seen.items() if not seen.gone}

    def _forget(self, now: float) -> None:
        gone = sorted((seen.seen_at, peer_id) for peer_id, seen in self.seen.items() if seen.gone)
        too_many = max(0, len(gone) - self._most_gone)
        for number, (seen_at, peer_id) in enumerate(gone):
            if number < too_many or now - seen_at > self._gone_kept_s:
                del self.seen[peer_id]


@dataclass(frozen=True)
class CallRates:
    """The rates at which all live trainers together call nodes; None: not known yet."""

    calls_per_s: float | None = None
    bytes_per_s: float | None = None
    failures_per_min: Mapping[str, float] = field(default_factory=dict)


@dataclass
class _Counted:
    """One trainer's counters in its last record, and their rates of growth then."""

    trainer: TrainerInfo
    at: float
    rates: CallRates | None = None


class CallRateMeter:
    """Measures how fast trainers' counters grow from one record to the next."""

    def __init__(self) -> None:
        self._counted: dict[PeerID, _Counted] = {}

    def note(self, trainers: Census[TrainerInfo]) -> CallRates:
        """The call rates of all live trainers together."""
        live = {peer_id: seen for peer_id, seen in trainers.seen.items() if not seen.gone}
        for gone in self._counted.keys() - live.keys():
            del self._counted[gone]
        for peer_id, seen in live.items():
            before = self._counted.get(peer_id)
            if before is None or before.trainer.started_at != seen.info.started_at:
                self._counted[peer_id] = _Counted(seen.info, seen.seen_at)
            elif seen.info is not before.trainer:
                seconds, rates = seen.seen_at - before.at, before.rates
                if seconds > 0:  # unless the clock was set back
                    rates = _rates(before.trainer, seen.info, seconds)
                self._counted[peer_id] = _Counted(seen.info, seen.seen_at, rates)
        return _together([counted.rates for counted in self._counted.values() if counted.rates is not None])


def _rates(before: TrainerInfo, now: TrainerInfo, seconds: float) -> CallRates:
    def grown(later: int, earlier: int) -> float:
        return max(0, later - earlier) / seconds

    moved = now.bytes_sent + now.bytes_received, before.bytes_sent + before.bytes_received
    return CallRates(
        grown(now.calls, before.calls),
        grown(*moved),
        {cause: 60 * grown(n, before.failures.get(cause, 0)) for cause, n in now.failures.items()},
    )


def _together(each: list[CallRates]) -> CallRates:
    if not each:
        return CallRates()
    failures: Counter[str] = Counter()
    for rates in each:
        for cause, rate in rates.failures_per_min.items():
            failures[cause] += rate  # type: ignore[assignment]  # a Counter adds floats as well
    return CallRates(
        sum(rates.calls_per_s or 0.0 for rates in each),
        sum(rates.bytes_per_s or 0.0 for rates in each),
        dict(failures),
    )


_SEARCHED = ("peer_id", "name", "state", "software_version", "reach")
FORM = 6
"""The format of a saved picture. Other formats are not read."""

Json = dict[str, Any]


@dataclass
class HostChecks:
    """The results of checking one memory's hosts."""

    checks: int = 0
    omissions: int = 0
    lies: int = 0
    caught: dict[PeerID, None] = field(default_factory=lambda: BoundedDict[PeerID, None](MAX_CAUGHT))
    """The hosts that were caught last."""

    def note(self, audit: Audit) -> None:
        self.checks += audit.compared
        for host, fault in audit.faulty.items():
            self.caught[host] = None
            if fault == "omission":
                self.omissions += 1
            else:
                self.lies += 1


@dataclass(frozen=True)
class Picture:
    """A swarm at one moment. Times are Unix times in seconds; None: not known."""

    read_at: float
    figures: Json
    """The figures at the top of the page."""
    layers: list[Json]
    """Each layer's grid and, for each coordinate in row-major order: replicas, recent rows, updates, and when the last
    one was (`updated_at`; None: not known). Also how uneven the rows are.
    """
    nodes: list[Json]
    trainers: list[Json]
    replicas: dict[str, list[Json]]
    """Replicas by UID."""
    memories: list[Json]
    form: int = FORM

    @cached_property
    def hosted(self) -> dict[str, list[str]]:
        """The UIDs of the replicas of each PeerID."""
        hosted: dict[str, list[str]] = {}
        for uid, replicas in self.replicas.items():
            for replica in replicas:
                hosted.setdefault(replica["peer_id"], []).append(uid)
        return hosted

    @cached_property
    def searched(self) -> list[tuple[Json, str]]:
        """Each node with the text that filters search: the fields of `_SEARCHED`, case-folded, a line each."""
        return [(row, "\n".join(str(row[key] or "") for key in _SEARCHED).casefold()) for row in self.nodes]

    def to_json(self) -> Json:
        """The picture as JSON. Its parts are not copied."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def with_earlier(self, nodes: Sequence[Json], trainers: Sequence[Json]) -> "Picture":
        """Adds nodes and trainers that an earlier run of the dashboard saw, but this one did not."""
        counts = self.figures["nodes"]
        off = {"unsteady": False} | dict.fromkeys(("rows_per_s", "latency_ms", "memory_queries_per_s"))
        gone = [row | off for row in self._gone(nodes, self.nodes)][: max(0, MAX_GONE - counts["gone"])]
        ended = [row | {"tokens_per_s": None} for row in self._gone(trainers, self.trainers)][:MAX_GONE]
        if not (gone or ended):
            return self
        lost = sum(row["state"] == "gone" for row in gone)
        figures = self.figures | {"nodes": counts | {"gone": counts["gone"] + lost}}
        if figures["validation_loss"] is None:
            measured = [row for row in ended if row["validation_loss"] is not None]
            best = min(measured, key=lambda row: float(row["validation_loss"]), default={})
            figures |= {key: best.get(key) for key in ("validation_loss", "bits_per_byte")}
        all_nodes, all_trainers = [*self.nodes, *gone], [*self.trainers, *ended]
        return replace(self, figures=figures, nodes=all_nodes, trainers=all_trainers)

    def _gone(self, earlier: Sequence[Json], present: Sequence[Json]) -> Iterator[Json]:
        here = {row["peer_id"] for row in present}
        for row in earlier:
            if row["peer_id"] not in here and self.read_at - row["seen_at"] < GONE_KEPT_S:
                yield row | {"state": row["state"] if row["state"] in ENDED else "gone"}

    @classmethod
    def from_json(cls, values: Json) -> "Picture":
        """Raises ValueError if the values are not a picture of this format."""
        if not isinstance(values, dict) or values.get("form") != FORM:
            raise ValueError("a picture in another format")
        try:
            picture = cls(**values)
            _ = picture.hosted  # reads every replica
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError("not a picture") from error
        return picture


def paint(
    view: View,
    nodes: Census[NodeInfo],
    trainers: Census[TrainerInfo],
    rates: CallRates,
    warning: str,
    memories: Sequence[Survey],
    credit: Mapping[PeerID, Credit],
    checks: Mapping[MemoryID, HostChecks],
) -> Picture:
    """The picture of the last reading. `credit`: the work that trainers have signed, for nodes whose receipts were
    read. `checks`: the results of checking the hosts of memories.
    """
    live_nodes, live_trainers = nodes.live(), trainers.live()
    replicas = {
        str(uid): [_replica_row(r, nodes.seen[r.peer_id]) for r in found if r.peer_id in live_nodes]
        for uid, found in view.replicas.items()
    }
    latencies = _node_latencies(live_trainers.values())
    layers = [_layer(view, live_nodes.keys(), layer) for layer in range(view.manifest.model.layers)]
    figures = _figures(view.manifest, list(live_nodes.values()), list(live_trainers.values()), rates)
    figures |= _validation_figures(trainers.seen.values())
    figures["nodes"]["gone"] = sum(seen.gone and not seen.left for seen in nodes.seen.values())
    figures["experts"] = {
        "live": sum(any(r["state"] == "serving" for r in rows) for rows in replicas.values()),
        "total": view.manifest.experts_total,
    }
    figures["memories"] = _memory_figures(memories, live_nodes.values())
    figures["warning"] = warning or None
    figures["admits_by_token"] = view.manifest.admission.mode == "token"
    figures["replicas"] = sum(r["state"] == "serving" for rows in replicas.values() for r in rows)
    return Picture(
        view.read_at,
        figures,
        layers,
        [
            _node_row(seen, view.read_at, latencies.get(peer_id))
            | signed_figures(seen.info, credit.get(peer_id))
            for peer_id, seen in nodes.seen.items()
        ],
        [_trainer_row(seen, view.read_at) for seen in trainers.seen.values()],
        {uid: rows for uid, rows in replicas.items() if rows},
        [_memory_row(found, checks.get(found.entry.memory, HostChecks())) for found in memories],
    )


def _figures(
    manifest: Manifest, nodes: Sequence[NodeInfo], live: Sequence[TrainerInfo], rates: CallRates
) -> Json:
    """`live`: live trainers."""
    speeds = [t.tokens_per_s for t in live if t.tokens_per_s is not None]
    periods = [node.renew_every_s for node in nodes]
    return {
        "name": manifest.name,
        "nodes": {"live": len(nodes), "unsteady": sum(node.unsteady for node in nodes)},
        "trainers": len(live),
        "tokens_per_s": sum(speeds) if speeds else None,
        "requests_per_s": rates.calls_per_s,
        "bytes_per_s": rates.bytes_per_s,
        "failures_per_min": dict(rates.failures_per_min),
        "latency_ms": _latency_figures(live),
        "announce_s": statistics.median(periods) if periods else None,
    }


def _validation_figures(trainers: Iterable[Seen[TrainerInfo]]) -> Json:
    """The lowest validation loss of the live trainers. If there is none, that of trainers that have finished or
    gone.
    """
    measured = [seen for seen in trainers if seen.info.validation_loss is not None]
    found = [seen.info for seen in measured if not seen.gone] or [seen.info for seen in measured]
    best = min(found, key=lambda info: info.validation_loss or 0.0, default=None)
    return {
        "validation_loss": None if best is None else best.validation_loss,
        "bits_per_byte": None if best is None else best.bits_per_byte,
    }


def _memory_figures(memories: Sequence[Survey], nodes: Iterable[NodeInfo]) -> Json:
    return {
        "count": len(memories),
        "shards": sum(found.entry.shards for found in memories),
        "served": sum(found.served for found in memories),
        "below_two": sum(found.below() for found in memories),
        "queries_per_s": sum(node.memory_queries_per_s for node in nodes),
    }


def _latency_figures(trainers: Iterable[TrainerInfo]) -> Json:
    """Over all trainers: the median of their medians, and the largest p99."""
    found: dict[str, list[Latency]] = {"forward": [], "backward": []}
    for trainer in trainers:
        for direction, latency in (("forward", trainer.forward), ("backward", trainer.backward)):
            if latency is not None:
                found[direction].append(latency)
    figures: Json = {}
    for direction, latencies in found.items():
        figures[f"{direction} p50"] = (
            _ms(statistics.median(x.p50_s for x in latencies)) if latencies else None
        )
        figures[f"{direction} p99"] = _ms(max(x.p99_s for x in latencies)) if latencies else None
    return figures


def _node_latencies(trainers: Iterable[TrainerInfo]) -> dict[PeerID, float]:
    """Milliseconds: the mean of the trainers' measurements."""
    found: dict[PeerID, list[float]] = {}
    for trainer in trainers:
        for peer_id, seconds in trainer.node_latency_s.items():
            found.setdefault(peer_id, []).append(seconds)
    return {peer_id: 1000 * statistics.fmean(measured) for peer_id, measured in found.items()}


def _layer(view: View, live: Iterable[PeerID], layer: int) -> Json:
    grid = list(view.manifest.experts.grid)
    cells = math.prod(grid)
    shown: Json = {"layer": layer, "grid": grid}
    if cells > MAX_CELLS:
        return shown
    counts, rows, updates = [0] * cells, [0] * cells, [0] * cells
    updated_at: list[float | None] = [None] * cells
    present = set(live)
    for uid, replicas in view.replicas.items():
        if uid.layer != layer:
            continue
        place = number_of(uid.coordinate, grid)
        for replica in replicas:
            if replica.state is ReplicaState.SERVING and replica.peer_id in present:
                counts[place] += 1
                rows[place] += replica.recent_rows
                updates[place] = max(updates[place], replica.update_count)
                if replica.updated_at is not None:
                    updated_at[place] = max(updated_at[place] or 0.0, min(replica.updated_at, view.read_at))
    shown |= {"replicas": counts, "recent_rows": rows, "updates": updates, "updated_at": updated_at}
    return shown | _unevenness([n for n, hosts in zip(rows, counts, strict=True) if hosts])


def _unevenness(rows: Sequence[int]) -> Json:
    """The busiest expert's rows divided by the mean, and how many experts get hardly any rows. Only experts with a host
    count.
    """
    mean = statistics.fmean(rows) if rows else 0.0
    if not mean:
        return {"busiest_over_mean": None, "starving": None}
    return {
        "busiest_over_mean": round(max(rows) / mean, 3),
        "starving": sum(n < STARVING_SHARE * mean for n in rows),
    }


def _replica_row(replica: Replica, host: Seen[NodeInfo]) -> Json:
    return {
        "peer_id": host.name,
        "short": host.info.peer_id.short,
        "name": host.info.name or None,
        "state": replica.state.name.lower(),
        "updates": replica.update_count,
        "recent_rows": replica.recent_rows,
        "updated_at": replica.updated_at,
        "expires_at": replica.expires_at,
    }


def _node_row(seen: Seen[NodeInfo], read_at: float, latency_ms: float | None) -> Json:
    node = seen.info
    return {
        "peer_id": seen.name,
        "short": seen.info.peer_id.short,
        "name": node.name or None,
        "state": "left" if seen.left else "gone" if seen.gone else _STATES[node.activity],
        "unsteady": node.unsteady and not seen.gone,
        "experts": node.expert_count,
        "capacity": node.expert_capacity,
        "rows_per_s": None if seen.gone else node.rows_per_s,
        "latency_ms": None if seen.gone else latency_ms,
        "software_version": node.software_version,
        "protocol_version": node.protocol_version,
        "reach": _reach(node),
        "up_s": _up_s(seen, read_at),
        "started_at": node.started_at,
        "seen_at": seen.seen_at,
        "updates": max(node.contributed_updates, node.updates),
        "rows": max(node.contributed_rows, node.rows_processed),
        "hours": round(node.contributed_s / 3600, 2),
        "addresses": list(node.addresses),
        "memory_shards": node.memory_shards,
        "memory_bytes": node.memory_bytes,
        "memory_queries": node.memory_queries,
        "memory_queries_per_s": None if seen.gone else node.memory_queries_per_s,
        "metrics_address": node.metrics_address,
    }


_STATES = {
    Activity.UNKNOWN: "serving",
    Activity.SERVING: "serving",
    Activity.PAUSED: "paused",
    Activity.LEAVING: "leaving",
}


def _reach(node: NodeInfo) -> str:
    """How others reach it, according to the node."""
    return node.reachability.name.lower()


def _trainer_row(seen: Seen[TrainerInfo], read_at: float) -> Json:
    trainer = seen.info
    return {
        "peer_id": seen.name,
        "short": seen.info.peer_id.short,
        "name": trainer.name or None,
        "step": trainer.reported_step,
        "steps": trainer.steps or None,
        "loss": trainer.loss,
        "validation_loss": trainer.validation_loss,
        "bits_per_byte": trainer.bits_per_byte,
        "tokens_per_s": None if seen.gone else trainer.tokens_per_s,
        **_quantiles("forward", trainer.forward),
        **_quantiles("backward", trainer.backward),
        "failures": dict(trainer.failures),
        "up_s": _up_s(seen, read_at),
        "seen_at": seen.seen_at,
        "software_version": trainer.software_version,
        "protocol_version": trainer.protocol_version,
        "state": _trainer_state(seen),
        "metrics_address": trainer.metrics_address,
    }


def _trainer_state(seen: Seen[TrainerInfo]) -> str:
    return "gone" if seen.gone and not seen.left else trainer_state(seen.info, seen.left)


def _memory_row(found: Survey, checked: HostChecks) -> Json:
    entry = found.entry
    return {
        "memory": str(entry.memory),
        "name": entry.memory.name,
        "publisher": entry.publisher.to_base58(),
        "short": entry.publisher.short,
        "about": entry.about,
        "revision": entry.revision,
        "passages": entry.passages,
        "bytes": entry.total_bytes,
        "licenses": list(entry.licenses),
        "shards": entry.shards,
        "served": found.served,
        "below_two": found.below(),
        "replicas_min": found.fewest,
        "replicas_mean": round(found.mean, 2),
        "replicas_wanted": WANTED_REPLICAS,
        "hosts": len(found.hosts),
        "checks": checked.checks,
        "omissions": checked.omissions,
        "lies": checked.lies,
        "caught": [host.to_base58() for host in checked.caught],
    }


def _quantiles(direction: str, latency: Latency | None) -> Mapping[str, float | None]:
    return {
        f"{direction}_p50_ms": None if latency is None else _ms(latency.p50_s),
        f"{direction}_p99_ms": None if latency is None else _ms(latency.p99_s),
    }


def _up_s(seen: Seen[Any], read_at: float) -> float | None:
    """As for `up_s`; of a peer that has gone, until it was last seen."""
    return up_s(seen.info, seen.seen_at if seen.gone else read_at)


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 3)
