"""What peers announce about themselves and their replicas, parsed into safe values of bounded size.

A signature proves who wrote a record, not that it is true. So texts must be short and printable, and numbers finite and
in range. Anything else is ignored.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Self

from grpc import StatusCode

from dht.admission import Grant, read_grant
from dht.receipts import SignedWork
from dht.uid import UID
from peer import PROTOCOL_VERSION
from peer.bounded import BoundedDict
from peer.errors import RecordError
from peer.formatting import printable
from peer.identity import PeerID, certificate_pem, is_peer_id
from peer.transport.addresses import Multiaddress, known
from peer.transport.contacts import MAX_ADDRESSES
from peer.transport.endpoints import AddressScope, Endpoint
from peer.wire import records_pb2

MAX_NAME_CHARACTERS = 32
MAX_LATENCIES = 64
"""A trainer's record gives the mean latency of at most this many nodes."""
MAX_CLAIM_S = 1800.0
"""A claim is ignored after this long. Building many large experts from checkpoints takes minutes."""
DEFAULT_RENEW_S = 10.0
FAILURE_CAUSES = frozenset(status.name.lower() for status in StatusCode if status is not StatusCode.OK)
_LONGEST_RENEW_S = 600.0
_LONGEST_CALL_S = 3600.0
_LATEST = 2.0**40
"""The largest time in seconds, and the largest of any other number that is not a count."""
_MAX_COUNT = 2**53
"""Above this, doubles, and so JSON numbers, are not exact."""
_MAX_VERSION_CHARACTERS = 32
_MAX_CLAIMS = 65536
"""How many claims are remembered: those seen last."""


class _WireEnum(Enum):
    """An enumeration in a record."""

    @classmethod
    def of(cls, value: int) -> Self:
        """UNKNOWN for a value that a newer version has added."""
        try:
            return cls(value)
        except ValueError:
            return cls["UNKNOWN"]


class Reachability(_WireEnum):
    """How others reach a node, according to the node."""

    UNKNOWN = records_pb2.REACHABILITY_UNSPECIFIED
    DIRECT = records_pb2.REACHABILITY_DIRECT
    PUNCHED = records_pb2.REACHABILITY_PUNCHED
    RELAYED = records_pb2.REACHABILITY_RELAYED


class Activity(_WireEnum):
    """What a node is doing, according to the node."""

    UNKNOWN = records_pb2.NODE_ACTIVITY_UNSPECIFIED
    SERVING = records_pb2.NODE_ACTIVITY_SERVING
    PAUSED = records_pb2.NODE_ACTIVITY_PAUSED
    LEAVING = records_pb2.NODE_ACTIVITY_LEAVING


@dataclass(frozen=True, kw_only=True)
class PeerInfo:
    """What the records of nodes and of trainers have in common: who and where the peer is."""

    peer_id: PeerID
    expires_at: float
    name: str = ""
    """The name that its owner gave it; empty: none."""
    protocol_version: int = PROTOCOL_VERSION
    software_version: str = ""
    started_at: float = 0.0
    renew_every_s: float = DEFAULT_RENEW_S
    """The longest time in seconds between two renewals of the record, according to the peer."""
    metrics_address: str = ""
    """Where it serves metrics to others; empty: nowhere."""
    addresses: tuple[Endpoint, ...] = ()
    """IP addresses of its server. Other peers can use those of a node to join the DHT, too."""
    certificate_pem: bytes = b""
    """Empty if it serves nothing."""
    tunnel_addresses: tuple[Multiaddress, ...] = ()
    """How others reach it if its router accepts no connections."""
    relay_addresses: tuple[Multiaddress, ...] = ()
    """Addresses of its gRPC server through relays over gRPC."""
    grant: Grant | None = None
    """The founder's grant that admits it; None: it shows none."""
    left: bool = False
    """Whether it has left in an orderly way. A trainer's record then has its last figures; a node's says nothing else.
    """


@dataclass(frozen=True, kw_only=True)
class NodeInfo(PeerInfo):
    """A node's record, and what the node does."""

    expert_count: int = 0
    expert_capacity: int = 0
    rows_processed: int = 0
    updates: int = 0
    activity: Activity = Activity.UNKNOWN
    rows_per_s: float | None = None
    contributed_rows: int = 0
    """Over all runs of the node, like the next two."""
    contributed_updates: int = 0
    contributed_s: float = 0.0
    reachability: Reachability = Reachability.UNKNOWN
    unsteady: bool = False
    """Whether some of its tasks fail and restart too often."""
    memory_shards: int = 0
    """How many shards of memories it hosts."""
    memory_bytes: int = 0
    """The size of its memory shards on its disk."""
    memory_queries: int = 0
    """Queries answered since it started."""
    memory_queries_per_s: float = 0.0
    signed: SignedWork = field(default_factory=SignedWork)
    """The work that trainers have signed for it, according to the node."""


@dataclass(frozen=True)
class Latency:
    """Quantiles of call times, in seconds."""

    p50_s: float
    p99_s: float


@dataclass(frozen=True, kw_only=True)
class TrainerInfo(PeerInfo):
    """A trainer's record. Losses are in nats per token; None: not measured. If it has no certificate, nobody can call
    it.
    """

    step: int
    steps: int
    """The run's length; 0: an own loop."""
    loss: float | None
    validation_loss: float | None
    bits_per_byte: float | None
    tokens_per_s: float | None
    forward: Latency | None
    backward: Latency | None
    calls: int
    bytes_sent: int
    bytes_received: int
    failures: Mapping[str, int] = field(default_factory=dict)
    node_latency_s: Mapping[PeerID, float] = field(default_factory=dict)
    dense_fingerprint: bytes = b""
    """The fingerprint of its dense part's form: names, shapes and everything else that must agree. Empty: it averages
    with nobody.
    """
    dense_age: int = 0
    """How many steps its dense part has taken."""

    @property
    def is_own_loop(self) -> bool:
        """Whether its owner runs a training loop of their own, which has no known end."""
        return self.steps == 0

    @property
    def reported_step(self) -> int | None:
        """How many steps it has taken; None: its owner's loop reports none."""
        return None if self.is_own_loop and not self.step and self.loss is None else self.step


class ReplicaState(Enum):
    """The stages of a replica's life."""

    CLAIMED = records_pb2.REPLICA_STATE_CLAIMED
    SERVING = records_pb2.REPLICA_STATE_SERVING
    WITHDRAWN = records_pb2.REPLICA_STATE_WITHDRAWN
    LEAVING = records_pb2.REPLICA_STATE_LEAVING


@dataclass(frozen=True, slots=True)
class Replica:
    """One node's copy of an expert, as the node announced it."""

    uid: UID
    peer_id: PeerID
    state: ReplicaState
    update_count: int
    queued_rows: int
    claimed_at: float
    expires_at: float
    updated_at: float | None = None
    """When it took its last optimizer step, by its node's clock; None if it has taken none there."""
    recent_rows: int = 0
    """Rows computed lately; older rows count less."""


def hosts_of(replicas: Mapping[UID, Iterable[Replica]]) -> set[PeerID]:
    """The peers that have announced any of these replicas."""
    return {replica.peer_id for some in replicas.values() for replica in some}


@dataclass(frozen=True)
class ReplicaAnnouncement:
    """What a node announces about one of its replicas."""

    uid: UID
    state: ReplicaState
    update_count: int = 0
    claimed_at: float = 0.0
    updated_at: float = 0.0
    """When it took its last optimizer step; 0 if it has taken none."""
    recent_rows: int = 0
    has_hosts: bool = False
    """Of a claim, and not in the message: whether others serve the expert, as far as the claimant knows."""

    def message(self, depth: int) -> records_pb2.Announcement:
        """The message for a record under the first `depth` coordinates."""
        is_claim = self.state is ReplicaState.CLAIMED
        return records_pb2.Announcement(
            state=self.state.value,
            update_count=self.update_count,
            claimed_at=self.claimed_at if is_claim else 0.0,
            updated_at=int(self.updated_at),
            recent_rows=self.recent_rows,
            following=self.uid.coordinate[depth:],
        )


class ClaimAges:
    """When this peer first saw each claim: a time in the claim itself could be a lie. So a node that claims an expert
    for ever and never serves it does not keep others from serving it.
    """

    def __init__(self, longest_s: float = MAX_CLAIM_S) -> None:
        self._longest_s = longest_s
        self._seen: BoundedDict[tuple[UID, PeerID], tuple[float, float]] = BoundedDict(_MAX_CLAIMS)
        """When each claim was seen first and last."""

    def is_stale(self, uid: UID, peer_id: PeerID, claimed_at: float, now: float) -> bool:
        """Records that the claim was seen, and returns whether it is stale. After a gap longer than the longest claim,
        it counts as new.
        """
        first, last = self._seen.get((uid, peer_id), (now, now))
        if now > last + self._longest_s:
            first = now
        self._seen[uid, peer_id] = first, now
        since = claimed_at if 0 < claimed_at < first else first  # 0: it gives no time; also right for NaN
        return now > since + self._longest_s

    def forget(self, uid: UID, peer_id: PeerID) -> None:
        """Forgets the claim, because the peer now serves the expert."""
        if self._seen:
            self._seen.pop((uid, peer_id), None)


def read_node(payload: records_pb2.RecordPayload, peer_id: PeerID) -> NodeInfo:
    """Parses a node's checked record. Raises RecordError for a wrong certificate or grant."""
    return parse_node(payload.node, payload.expires_at, peer_id, _grant(payload))


def parse_node(
    node: records_pb2.NodeRecord, expires_at: float, peer_id: PeerID, grant: Grant | None = None
) -> NodeInfo:
    """Parses what a node says in one of its checked records. Raises RecordError for a wrong certificate."""
    return NodeInfo(
        **_common(node, expires_at, peer_id, serves=not node.left),
        grant=grant,
        expert_count=node.expert_count,
        expert_capacity=node.expert_capacity,
        rows_processed=count(node.rows_processed),
        updates=count(node.updates),
        activity=Activity.of(node.activity),
        rows_per_s=number(node.rows_per_s),
        contributed_rows=count(node.contributed_rows),
        contributed_updates=count(node.contributed_updates),
        contributed_s=number(node.contributed_s) or 0.0,
        reachability=Reachability.of(node.reachability),
        unsteady=node.unsteady,
        memory_shards=node.memory_shards,
        memory_bytes=count(node.memory_bytes),
        memory_queries=count(node.memory_queries),
        memory_queries_per_s=number(node.memory_queries_per_s) or 0.0,
        signed=SignedWork.of(node.signed),
    )


def _grant(payload: records_pb2.RecordPayload) -> Grant | None:
    return read_grant(payload.badge.grant) if payload.HasField("badge") else None


def contact_in(node: records_pb2.NodeRecord) -> records_pb2.NodeRecord:
    """The part of a node's record that others need to call the node."""
    return records_pb2.NodeRecord(
        addresses=node.addresses,
        certificate=node.certificate,
        protocol_version=node.protocol_version,
        name=node.name,
        tunnel_addresses=node.tunnel_addresses,
        relay_addresses=node.relay_addresses,
    )


def read_trainer(payload: records_pb2.RecordPayload, peer_id: PeerID) -> TrainerInfo | None:
    """Parses a trainer's checked record; None if it is not one. Raises RecordError for a wrong certificate or grant."""
    trainer = payload.trainer
    if payload.WhichOneof("body") != "trainer":
        return None
    return TrainerInfo(
        **_common(trainer, payload.expires_at, peer_id, serves=bool(trainer.certificate)),
        grant=_grant(payload),
        step=count(trainer.step),
        steps=count(trainer.steps),
        loss=number(trainer.loss) if trainer.HasField("loss") else None,
        validation_loss=number(trainer.validation_loss) if trainer.HasField("validation_loss") else None,
        bits_per_byte=number(trainer.bits_per_byte) if trainer.HasField("bits_per_byte") else None,
        tokens_per_s=number(trainer.tokens_per_s) if trainer.HasField("tokens_per_s") else None,
        forward=_latency(trainer.forward) if trainer.HasField("forward") else None,
        backward=_latency(trainer.backward) if trainer.HasField("backward") else None,
        calls=count(trainer.calls),
        bytes_sent=count(trainer.bytes_sent),
        bytes_received=count(trainer.bytes_received),
        failures={f.cause: count(f.count) for f in trainer.failures[:32] if f.cause in FAILURE_CAUSES},
        node_latency_s=_node_latencies(trainer.nodes[:MAX_LATENCIES]),
        dense_fingerprint=trainer.dense_fingerprint if len(trainer.dense_fingerprint) == 32 else b"",
        dense_age=count(trainer.dense_age),
    )


def _common(
    said: "records_pb2.NodeRecord | records_pb2.TrainerRecord",
    expires_at: float,
    peer_id: PeerID,
    serves: bool,
) -> dict[str, Any]:
    """The fields of a `PeerInfo`. `serves`: whether others call the peer, so that it must show its certificate."""
    return {
        "peer_id": peer_id,
        "expires_at": expires_at,
        "name": printable(said.name, MAX_NAME_CHARACTERS),
        "protocol_version": said.protocol_version,
        "software_version": printable(said.software_version, _MAX_VERSION_CHARACTERS),
        "started_at": number(said.started_at) or 0.0,
        "renew_every_s": renewal(said.renew_every_s),
        "metrics_address": metrics_endpoint(said.metrics_address),
        "addresses": _endpoints(said.addresses) if serves else (),
        "certificate_pem": certificate_pem(said.certificate, peer_id) if serves else b"",
        "tunnel_addresses": _own(peer_id, said.tunnel_addresses) if serves else (),
        "relay_addresses": _relayed(peer_id, said.relay_addresses) if serves else (),
        "left": said.left,
    }


def announced(
    replicas: Collection[ReplicaAnnouncement], depth: int, queued_rows: int
) -> records_pb2.RecordPayload:
    """The body of a record that announces a node's replicas, which share their first `depth` coordinates.
    `queued_rows`: rows that wait at the node, over all its experts.
    """
    messages = [replica.message(depth) for replica in replicas]
    if len(messages) == 1 and not messages[0].following:
        messages[0].queued_rows = queued_rows
        return records_pb2.RecordPayload(announcement=messages[0])
    return records_pb2.RecordPayload(hosting=records_pb2.Hosting(replicas=messages, queued_rows=queued_rows))


def read_replicas(
    payload: records_pb2.RecordPayload, layer: int, coordinate: tuple[int, ...], peer_id: PeerID
) -> dict[UID, Replica]:
    """Parses a node's checked record of the experts it hosts below these coordinates. Raises RecordError if any is
    wrong.
    """
    hosting, found = payload.hosting, {}
    is_alone = payload.HasField("announcement")
    for message in [payload.announcement] if is_alone else hosting.replicas:
        uid = UID(layer, (*coordinate, *message.following))
        if is_alone is bool(message.following) or uid in found:
            raise RecordError("the record lists replicas that belong under another key, or lists one twice")
        try:
            state = ReplicaState(message.state)
        except ValueError as error:
            raise RecordError(f"the replica has the unknown state {message.state}") from error
        found[uid] = Replica(
            uid,
            peer_id,
            state,
            message.update_count,
            message.queued_rows if is_alone else hosting.queued_rows,
            message.claimed_at,
            payload.expires_at,
            number(message.updated_at) or None,
            count(message.recent_rows),
        )
    return found


def number(value: float, most: float = _LATEST) -> float | None:
    """The number; None if it is not finite, negative or too large."""
    return value if math.isfinite(value) and 0 <= value <= most else None


def count(value: int) -> int:
    """The count, capped at what JSON can hold exactly."""
    return min(value, _MAX_COUNT)


def renewal(value: float) -> float:
    """Seconds between two renewals; the default if the record gives no sensible number."""
    return value if math.isfinite(value) and 0 < value <= _LONGEST_RENEW_S else DEFAULT_RENEW_S


def metrics_endpoint(text: str) -> str:
    """The text as `IP address:port`, or empty. Host names are dropped, because the scraper would look them up."""
    return next(iter(_endpoints([text])), "")


def _endpoints(texts: Iterable[str]) -> tuple[Endpoint, ...]:
    return tuple(e for e in known(Endpoint, texts, MAX_ADDRESSES) if _is_numeric(e))


def _own(peer_id: PeerID, texts: Iterable[str]) -> tuple[Multiaddress, ...]:
    addresses = known(Multiaddress, texts, MAX_ADDRESSES)
    return tuple(a for a in addresses if a.peer_id == peer_id and _is_numeric(a.endpoint))


def _relayed(peer_id: PeerID, texts: Iterable[str]) -> tuple[Multiaddress, ...]:
    return tuple(address for address in _own(peer_id, texts) if address.is_relayed)


def _is_numeric(endpoint: Endpoint) -> bool:
    """Whether the endpoint is an IP address. A name would be looked up, and its owner could let it lead anywhere."""
    return endpoint.scope not in {None, AddressScope.NONE}


def _latency(latency: records_pb2.Latency) -> Latency | None:
    p50_s, p99_s = number(latency.p50_s, _LONGEST_CALL_S), number(latency.p99_s, _LONGEST_CALL_S)
    return None if p50_s is None or p99_s is None else Latency(p50_s, p99_s)


def _node_latencies(nodes: "list[records_pb2.NodeLatency]") -> dict[PeerID, float]:
    return {
        PeerID(node.peer_id): mean_s
        for node in nodes
        if is_peer_id(node.peer_id) and (mean_s := number(node.mean_s, _LONGEST_CALL_S)) is not None
    }
