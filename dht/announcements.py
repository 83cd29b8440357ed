"""What peers say of themselves, once it is known to be of a form and size that does no harm.

A signed record proves who wrote it, not that it is true. So texts are short and printable, numbers finite and in their
range, and whatever is not so counts as not said.

How long experts have been claimed: who claims one for ever, and never serves it, keeps nobody from serving it.

What nodes say of their replicas.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Self

from grpc import StatusCode

from dht.uid import UID
from peer.bounded import BoundedDict
from peer.errors import RecordError
from peer.identity import PeerID, certificate_pem
from peer.transport.addresses import ip_address, tunnel_addresses_of
from peer.wire import records_pb2

MAX_NAME_CHARACTERS = 32
MAX_LATENCIES = 64
"""Most nodes of which one trainer's record tells how fast they answered."""
DEFAULT_RENEW_S = 10.0
_LONGEST_RENEW_S = 600.0
_LONGEST_CALL_S = 3600.0
_LATEST = 2.0**40
"""Of times in seconds, and of numbers that are no count."""
_MAX_COUNT = 2**53
"""Beyond it a double, as JSON has it, is not exact."""
_MAX_VERSION_CHARACTERS = 32
_MAX_ADDRESSES = 8
_ADDRESS = re.compile(r"([A-Za-z0-9.-]{1,253}|\[[0-9a-f:]{2,39}\]):[0-9]{1,5}")
"""host:port. gRPC would also take other schemes, such as unix sockets of the caller's own machine."""

FAILURE_CAUSES = frozenset(status.name.lower() for status in StatusCode if status is not StatusCode.OK)


class _WireEnum(Enum):
    """What a record says by a number."""

    @classmethod
    def of(cls, value: int) -> Self:
        """UNKNOWN for what a newer version may say."""
        try:
            return cls(value)
        except ValueError:
            return cls["UNKNOWN"]


class Reachability(_WireEnum):
    """How others reach a node, as it says."""

    UNKNOWN = records_pb2.REACHABILITY_UNSPECIFIED
    DIRECT = records_pb2.REACHABILITY_DIRECT
    PUNCHED = records_pb2.REACHABILITY_PUNCHED
    RELAYED = records_pb2.REACHABILITY_RELAYED


class Activity(_WireEnum):
    """What a node says it does now."""

    UNKNOWN = records_pb2.NODE_ACTIVITY_UNSPECIFIED
    SERVING = records_pb2.NODE_ACTIVITY_SERVING
    PAUSED = records_pb2.NODE_ACTIVITY_PAUSED
    LEAVING = records_pb2.NODE_ACTIVITY_LEAVING


@dataclass(frozen=True)
class NodeInfo:
    """Who and where a node is, as it said itself."""

    peer_id: PeerID
    addresses: tuple[str, ...]
    certificate_pem: bytes
    protocol_version: int
    software_version: str
    expert_count: int
    expert_capacity: int
    rows_processed: int
    updates: int
    started_at: float
    bootstrap_addresses: tuple[str, ...]
    expires_at: float
    name: str = ""
    """What its owner calls it; empty: no name."""
    activity: Activity = Activity.UNKNOWN
    metrics_address: str = ""
    """Where it serves metrics to others, if it does."""
    rows_per_s: float | None = None
    renew_every_s: float = DEFAULT_RENEW_S
    """Its record is renewed within so many seconds, as far as it can tell."""
    contributed_rows: int = 0
    """In all its runs, as are the following."""
    contributed_updates: int = 0
    contributed_s: float = 0.0
    reachability: Reachability = Reachability.UNKNOWN
    tunnel_addresses: tuple[str, ...] = ()


@dataclass(frozen=True)
class Latency:
    """Quantiles of how long calls took, in seconds."""

    p50_s: float
    p99_s: float


@dataclass(frozen=True)
class TrainerInfo:
    """What a trainer says of itself. Losses in nats per token; None: not measured."""

    peer_id: PeerID
    name: str
    protocol_version: int
    software_version: str
    started_at: float
    renew_every_s: float
    metrics_address: str
    step: int
    steps: int
    loss: float | None
    validation_loss: float | None
    bits_per_byte: float | None
    tokens_per_s: float | None
    forward: Latency | None
    backward: Latency | None
    calls: int
    bytes_sent: int
    bytes_received: int
    expires_at: float
    failures: Mapping[str, int] = field(default_factory=dict)
    node_latency_s: Mapping[PeerID, float] = field(default_factory=dict)
    addresses: tuple[str, ...] = ()
    """Where others reach it to average dense parts; none of them and no tunnel: only it can call others."""
    certificate_pem: bytes = b""
    dense_fingerprint: bytes = b""
    """Of the form of its dense part; empty: it averages with nobody."""
    dense_age: int = 0
    """Steps that its dense part has behind it."""
    tunnel_addresses: tuple[str, ...] = ()
    """By which it is reached when its router lets nobody in."""


def read_node(payload: records_pb2.RecordPayload, peer_id: PeerID) -> NodeInfo | None:
    """What a node's checked record says; None when the node has left. Raises RecordError for a wrong certificate."""
    node = payload.node
    if node.left:
        return None
    return NodeInfo(
        peer_id,
        tuple(filter(_ADDRESS.fullmatch, node.addresses[:_MAX_ADDRESSES])),
        certificate_pem(node.certificate, peer_id),
        node.protocol_version,
        short_text(node.software_version, _MAX_VERSION_CHARACTERS),
        node.expert_count,
        node.expert_capacity,
        count(node.rows_processed),
        count(node.updates),
        number(node.started_at) or 0.0,
        tuple(node.bootstrap_addresses[:_MAX_ADDRESSES]),
        payload.expires_at,
        short_text(node.name, MAX_NAME_CHARACTERS),
        Activity.of(node.activity),
        metrics_endpoint(node.metrics_address),
        number(node.rows_per_s),
        renewal(node.renew_every_s),
        count(node.contributed_rows),
        count(node.contributed_updates),
        number(node.contributed_s) or 0.0,
        Reachability.of(node.reachability),
        tunnel_addresses_of(peer_id, node.tunnel_addresses),
    )


def read_trainer(payload: records_pb2.RecordPayload, peer_id: PeerID) -> TrainerInfo | None:
    """What a trainer's checked record says; None when it has left. Raises RecordError for a wrong certificate."""
    trainer = payload.trainer
    if payload.WhichOneof("body") != "trainer" or trainer.left:
        return None
    serves = bool(trainer.certificate)
    return TrainerInfo(
        peer_id,
        short_text(trainer.name, MAX_NAME_CHARACTERS),
        trainer.protocol_version,
        short_text(trainer.software_version, _MAX_VERSION_CHARACTERS),
        number(trainer.started_at) or 0.0,
        renewal(trainer.renew_every_s),
        metrics_endpoint(trainer.metrics_address),
        count(trainer.step),
        count(trainer.steps),
        number(trainer.loss) if trainer.HasField("loss") else None,
        number(trainer.validation_loss) if trainer.HasField("validation_loss") else None,
        number(trainer.bits_per_byte) if trainer.HasField("bits_per_byte") else None,
        number(trainer.tokens_per_s) if trainer.HasField("tokens_per_s") else None,
        _latency(trainer.forward) if trainer.HasField("forward") else None,
        _latency(trainer.backward) if trainer.HasField("backward") else None,
        count(trainer.calls),
        count(trainer.bytes_sent),
        count(trainer.bytes_received),
        payload.expires_at,
        {f.cause: count(f.count) for f in trainer.failures[:32] if f.cause in FAILURE_CAUSES},
        _node_latencies(trainer.nodes[:MAX_LATENCIES]),
        tuple(filter(_ADDRESS.fullmatch, trainer.addresses[:_MAX_ADDRESSES])) if serves else (),
        certificate_pem(trainer.certificate, peer_id) if serves else b"",
        trainer.dense_fingerprint if len(trainer.dense_fingerprint) == 32 else b"",
        count(trainer.dense_age),
        tunnel_addresses_of(peer_id, trainer.tunnel_addresses) if serves else (),
    )


def short_text(text: str, most: int) -> str:
    """At most so many characters, the printable ones; no two blanks in a row."""
    printable = "".join(c for c in text[: 4 * most] if c.isprintable())
    return " ".join(printable.split())[:most]


def number(value: float, most: float = _LATEST) -> float | None:
    """None when it is not finite, negative or absurd."""
    return value if math.isfinite(value) and 0 <= value <= most else None


def count(value: int) -> int:
    """At most as large as others can show exactly."""
    return min(value, _MAX_COUNT)


def renewal(value: float) -> float:
    """Seconds until a record is renewed; the usual ones when it says nothing sensible."""
    return value if math.isfinite(value) and 0 < value <= _LONGEST_RENEW_S else DEFAULT_RENEW_S


_ENDPOINT = re.compile(r"(?:\[([0-9a-f:.]{2,45})\]|([0-9.]{7,15})):([0-9]{1,5})")


def metrics_endpoint(text: str) -> str:
    """`IP address:port` as it stands, or empty: names would be looked up by whoever scrapes."""
    match = _ENDPOINT.fullmatch(text)
    if match is None or not 0 < int(match[3]) < 65536:
        return ""
    try:
        address = ip_address(match[1] or match[2])
    except ValueError:
        return ""
    return "" if address.is_unspecified or address.is_multicast or address.is_link_local else text


def _latency(latency: records_pb2.Latency) -> Latency | None:
    p50_s, p99_s = number(latency.p50_s, _LONGEST_CALL_S), number(latency.p99_s, _LONGEST_CALL_S)
    return None if p50_s is None or p99_s is None else Latency(p50_s, p99_s)


def _node_latencies(nodes: "list[records_pb2.NodeLatency]") -> dict[PeerID, float]:
    return {
        PeerID(node.peer_id): mean_s
        for node in nodes
        if len(node.peer_id) == 34 and (mean_s := number(node.mean_s, _LONGEST_CALL_S)) is not None
    }


MAX_CLAIM_S = 1800.0
"""A claim that lasts longer is ignored, unless told otherwise. Building many large experts from their checkpoints
takes minutes.
"""
_MAX_CLAIMS = 65536
"""Claims remembered; beyond that those are forgotten that were seen longest ago."""


class ClaimAges:
    """Since when this peer has seen each claim. The claims themselves say it too, and may lie."""

    def __init__(self, longest_s: float = MAX_CLAIM_S) -> None:
        self._longest_s = longest_s
        self._seen = BoundedDict[tuple[UID, PeerID], tuple[float, float]](_MAX_CLAIMS)
        """First and last time that a claim was seen, the one seen last at the end."""

    def is_stale(self, uid: UID, peer_id: PeerID, claimed_at: float, now: float) -> bool:
        """Notes the claim. A pause in it shorter than the longest claim does not make it a new one."""
        first, last = self._seen.get((uid, peer_id), (now, now))
        if now > last + self._longest_s:
            first = now
        self._seen[uid, peer_id] = first, now
        since = claimed_at if 0 < claimed_at < first else first  # 0: it does not say; also right for NaN
        return now > since + self._longest_s

    def forget(self, uid: UID, peer_id: PeerID) -> None:
        """The claim was made good: the peer serves the expert."""
        self._seen.pop((uid, peer_id), None)


class ReplicaState(Enum):
    """How far a replica has got."""

    CLAIMED = records_pb2.REPLICA_STATE_CLAIMED
    SERVING = records_pb2.REPLICA_STATE_SERVING
    WITHDRAWN = records_pb2.REPLICA_STATE_WITHDRAWN
    LEAVING = records_pb2.REPLICA_STATE_LEAVING


@dataclass(frozen=True)
class Replica:
    """One node's copy of an expert, as the node announced it."""

    uid: UID
    peer_id: PeerID
    state: ReplicaState
    update_count: int
    queued_rows: int
    claimed_at: float
    expires_at: float


@dataclass(frozen=True)
class ReplicaAnnouncement:
    """What a node says of one of its replicas."""

    uid: UID
    state: ReplicaState
    update_count: int = 0
    claimed_at: float = 0.0

    def message(self, queued_rows: int) -> records_pb2.Announcement:
        """`queued_rows`: that wait at the node, for all its experts."""
        return records_pb2.Announcement(
            state=self.state.value,
            update_count=self.update_count,
            queued_rows=queued_rows,
            claimed_at=self.claimed_at,
        )


def read_replica(payload: records_pb2.RecordPayload, uid: UID, peer_id: PeerID) -> Replica:
    """What a node's checked announcement says. Raises RecordError for a state that is not known."""
    announcement = payload.announcement
    try:
        state = ReplicaState(announcement.state)
    except ValueError as error:
        raise RecordError(f"a replica in state {announcement.state}") from error
    return Replica(
        uid,
        peer_id,
        state,
        announcement.update_count,
        announcement.queued_rows,
        announcement.claimed_at,
        payload.expires_at,
    )
