from peer.wire import admission_pb2 as _admission_pb2
from peer.wire import credit_pb2 as _credit_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ReplicaState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REPLICA_STATE_UNSPECIFIED: _ClassVar[ReplicaState]
    REPLICA_STATE_CLAIMED: _ClassVar[ReplicaState]
    REPLICA_STATE_SERVING: _ClassVar[ReplicaState]
    REPLICA_STATE_WITHDRAWN: _ClassVar[ReplicaState]
    REPLICA_STATE_LEAVING: _ClassVar[ReplicaState]

class Reachability(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REACHABILITY_UNSPECIFIED: _ClassVar[Reachability]
    REACHABILITY_DIRECT: _ClassVar[Reachability]
    REACHABILITY_PUNCHED: _ClassVar[Reachability]
    REACHABILITY_RELAYED: _ClassVar[Reachability]

class NodeActivity(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    NODE_ACTIVITY_UNSPECIFIED: _ClassVar[NodeActivity]
    NODE_ACTIVITY_SERVING: _ClassVar[NodeActivity]
    NODE_ACTIVITY_PAUSED: _ClassVar[NodeActivity]
    NODE_ACTIVITY_LEAVING: _ClassVar[NodeActivity]
REPLICA_STATE_UNSPECIFIED: ReplicaState
REPLICA_STATE_CLAIMED: ReplicaState
REPLICA_STATE_SERVING: ReplicaState
REPLICA_STATE_WITHDRAWN: ReplicaState
REPLICA_STATE_LEAVING: ReplicaState
REACHABILITY_UNSPECIFIED: Reachability
REACHABILITY_DIRECT: Reachability
REACHABILITY_PUNCHED: Reachability
REACHABILITY_RELAYED: Reachability
NODE_ACTIVITY_UNSPECIFIED: NodeActivity
NODE_ACTIVITY_SERVING: NodeActivity
NODE_ACTIVITY_PAUSED: NodeActivity
NODE_ACTIVITY_LEAVING: NodeActivity

class SignedRecord(_message.Message):
    __slots__ = ("payload", "public_key", "signature")
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    payload: bytes
    public_key: bytes
    signature: bytes
    def __init__(self, payload: _Optional[bytes] = ..., public_key: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class RecordPayload(_message.Message):
    __slots__ = ("key", "expires_at", "announcement", "hosting", "node", "manifest_json", "trainer", "revocations", "library", "region", "badge")
    KEY_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_AT_FIELD_NUMBER: _ClassVar[int]
    ANNOUNCEMENT_FIELD_NUMBER: _ClassVar[int]
    HOSTING_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_JSON_FIELD_NUMBER: _ClassVar[int]
    TRAINER_FIELD_NUMBER: _ClassVar[int]
    REVOCATIONS_FIELD_NUMBER: _ClassVar[int]
    LIBRARY_FIELD_NUMBER: _ClassVar[int]
    REGION_FIELD_NUMBER: _ClassVar[int]
    BADGE_FIELD_NUMBER: _ClassVar[int]
    key: str
    expires_at: float
    announcement: Announcement
    hosting: Hosting
    node: NodeRecord
    manifest_json: bytes
    trainer: TrainerRecord
    revocations: _admission_pb2.Revocations
    library: Library
    region: RegionRecord
    badge: _admission_pb2.Badge
    def __init__(self, key: _Optional[str] = ..., expires_at: _Optional[float] = ..., announcement: _Optional[_Union[Announcement, _Mapping]] = ..., hosting: _Optional[_Union[Hosting, _Mapping]] = ..., node: _Optional[_Union[NodeRecord, _Mapping]] = ..., manifest_json: _Optional[bytes] = ..., trainer: _Optional[_Union[TrainerRecord, _Mapping]] = ..., revocations: _Optional[_Union[_admission_pb2.Revocations, _Mapping]] = ..., library: _Optional[_Union[Library, _Mapping]] = ..., region: _Optional[_Union[RegionRecord, _Mapping]] = ..., badge: _Optional[_Union[_admission_pb2.Badge, _Mapping]] = ...) -> None: ...

class Hosting(_message.Message):
    __slots__ = ("replicas", "queued_rows")
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    QUEUED_ROWS_FIELD_NUMBER: _ClassVar[int]
    replicas: _containers.RepeatedCompositeFieldContainer[Announcement]
    queued_rows: int
    def __init__(self, replicas: _Optional[_Iterable[_Union[Announcement, _Mapping]]] = ..., queued_rows: _Optional[int] = ...) -> None: ...

class Announcement(_message.Message):
    __slots__ = ("state", "update_count", "queued_rows", "claimed_at", "following", "updated_at", "recent_rows")
    STATE_FIELD_NUMBER: _ClassVar[int]
    UPDATE_COUNT_FIELD_NUMBER: _ClassVar[int]
    QUEUED_ROWS_FIELD_NUMBER: _ClassVar[int]
    CLAIMED_AT_FIELD_NUMBER: _ClassVar[int]
    FOLLOWING_FIELD_NUMBER: _ClassVar[int]
    UPDATED_AT_FIELD_NUMBER: _ClassVar[int]
    RECENT_ROWS_FIELD_NUMBER: _ClassVar[int]
    state: ReplicaState
    update_count: int
    queued_rows: int
    claimed_at: float
    following: _containers.RepeatedScalarFieldContainer[int]
    updated_at: int
    recent_rows: int
    def __init__(self, state: _Optional[_Union[ReplicaState, str]] = ..., update_count: _Optional[int] = ..., queued_rows: _Optional[int] = ..., claimed_at: _Optional[float] = ..., following: _Optional[_Iterable[int]] = ..., updated_at: _Optional[int] = ..., recent_rows: _Optional[int] = ...) -> None: ...

class NodeRecord(_message.Message):
    __slots__ = ("addresses", "certificate", "protocol_version", "software_version", "expert_count", "expert_capacity", "rows_processed", "updates", "started_at", "left", "name", "activity", "metrics_address", "rows_per_s", "renew_every_s", "contributed_rows", "contributed_updates", "contributed_s", "reachability", "tunnel_addresses", "unsteady", "relay_addresses", "memory_shards", "memory_bytes", "memory_queries", "memory_queries_per_s", "signed")
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    SOFTWARE_VERSION_FIELD_NUMBER: _ClassVar[int]
    EXPERT_COUNT_FIELD_NUMBER: _ClassVar[int]
    EXPERT_CAPACITY_FIELD_NUMBER: _ClassVar[int]
    ROWS_PROCESSED_FIELD_NUMBER: _ClassVar[int]
    UPDATES_FIELD_NUMBER: _ClassVar[int]
    STARTED_AT_FIELD_NUMBER: _ClassVar[int]
    LEFT_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    ACTIVITY_FIELD_NUMBER: _ClassVar[int]
    METRICS_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    ROWS_PER_S_FIELD_NUMBER: _ClassVar[int]
    RENEW_EVERY_S_FIELD_NUMBER: _ClassVar[int]
    CONTRIBUTED_ROWS_FIELD_NUMBER: _ClassVar[int]
    CONTRIBUTED_UPDATES_FIELD_NUMBER: _ClassVar[int]
    CONTRIBUTED_S_FIELD_NUMBER: _ClassVar[int]
    REACHABILITY_FIELD_NUMBER: _ClassVar[int]
    TUNNEL_ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    UNSTEADY_FIELD_NUMBER: _ClassVar[int]
    RELAY_ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    MEMORY_SHARDS_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    MEMORY_QUERIES_FIELD_NUMBER: _ClassVar[int]
    MEMORY_QUERIES_PER_S_FIELD_NUMBER: _ClassVar[int]
    SIGNED_FIELD_NUMBER: _ClassVar[int]
    addresses: _containers.RepeatedScalarFieldContainer[str]
    certificate: bytes
    protocol_version: int
    software_version: str
    expert_count: int
    expert_capacity: int
    rows_processed: int
    updates: int
    started_at: float
    left: bool
    name: str
    activity: NodeActivity
    metrics_address: str
    rows_per_s: float
    renew_every_s: float
    contributed_rows: int
    contributed_updates: int
    contributed_s: float
    reachability: Reachability
    tunnel_addresses: _containers.RepeatedScalarFieldContainer[str]
    unsteady: bool
    relay_addresses: _containers.RepeatedScalarFieldContainer[str]
    memory_shards: int
    memory_bytes: int
    memory_queries: int
    memory_queries_per_s: float
    signed: _credit_pb2.SignedWork
    def __init__(self, addresses: _Optional[_Iterable[str]] = ..., certificate: _Optional[bytes] = ..., protocol_version: _Optional[int] = ..., software_version: _Optional[str] = ..., expert_count: _Optional[int] = ..., expert_capacity: _Optional[int] = ..., rows_processed: _Optional[int] = ..., updates: _Optional[int] = ..., started_at: _Optional[float] = ..., left: _Optional[bool] = ..., name: _Optional[str] = ..., activity: _Optional[_Union[NodeActivity, str]] = ..., metrics_address: _Optional[str] = ..., rows_per_s: _Optional[float] = ..., renew_every_s: _Optional[float] = ..., contributed_rows: _Optional[int] = ..., contributed_updates: _Optional[int] = ..., contributed_s: _Optional[float] = ..., reachability: _Optional[_Union[Reachability, str]] = ..., tunnel_addresses: _Optional[_Iterable[str]] = ..., unsteady: _Optional[bool] = ..., relay_addresses: _Optional[_Iterable[str]] = ..., memory_shards: _Optional[int] = ..., memory_bytes: _Optional[int] = ..., memory_queries: _Optional[int] = ..., memory_queries_per_s: _Optional[float] = ..., signed: _Optional[_Union[_credit_pb2.SignedWork, _Mapping]] = ...) -> None: ...

class TrainerRecord(_message.Message):
    __slots__ = ("name", "protocol_version", "software_version", "started_at", "renew_every_s", "metrics_address", "step", "steps", "loss", "validation_loss", "bits_per_byte", "tokens_per_s", "forward", "backward", "calls", "failures", "bytes_sent", "bytes_received", "nodes", "left", "addresses", "certificate", "dense_fingerprint", "dense_age", "tunnel_addresses", "relay_addresses")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    SOFTWARE_VERSION_FIELD_NUMBER: _ClassVar[int]
    STARTED_AT_FIELD_NUMBER: _ClassVar[int]
    RENEW_EVERY_S_FIELD_NUMBER: _ClassVar[int]
    METRICS_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    VALIDATION_LOSS_FIELD_NUMBER: _ClassVar[int]
    BITS_PER_BYTE_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    FORWARD_FIELD_NUMBER: _ClassVar[int]
    BACKWARD_FIELD_NUMBER: _ClassVar[int]
    CALLS_FIELD_NUMBER: _ClassVar[int]
    FAILURES_FIELD_NUMBER: _ClassVar[int]
    BYTES_SENT_FIELD_NUMBER: _ClassVar[int]
    BYTES_RECEIVED_FIELD_NUMBER: _ClassVar[int]
    NODES_FIELD_NUMBER: _ClassVar[int]
    LEFT_FIELD_NUMBER: _ClassVar[int]
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    DENSE_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    DENSE_AGE_FIELD_NUMBER: _ClassVar[int]
    TUNNEL_ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    RELAY_ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    name: str
    protocol_version: int
    software_version: str
    started_at: float
    renew_every_s: float
    metrics_address: str
    step: int
    steps: int
    loss: float
    validation_loss: float
    bits_per_byte: float
    tokens_per_s: float
    forward: Latency
    backward: Latency
    calls: int
    failures: _containers.RepeatedCompositeFieldContainer[Failures]
    bytes_sent: int
    bytes_received: int
    nodes: _containers.RepeatedCompositeFieldContainer[NodeLatency]
    left: bool
    addresses: _containers.RepeatedScalarFieldContainer[str]
    certificate: bytes
    dense_fingerprint: bytes
    dense_age: int
    tunnel_addresses: _containers.RepeatedScalarFieldContainer[str]
    relay_addresses: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, name: _Optional[str] = ..., protocol_version: _Optional[int] = ..., software_version: _Optional[str] = ..., started_at: _Optional[float] = ..., renew_every_s: _Optional[float] = ..., metrics_address: _Optional[str] = ..., step: _Optional[int] = ..., steps: _Optional[int] = ..., loss: _Optional[float] = ..., validation_loss: _Optional[float] = ..., bits_per_byte: _Optional[float] = ..., tokens_per_s: _Optional[float] = ..., forward: _Optional[_Union[Latency, _Mapping]] = ..., backward: _Optional[_Union[Latency, _Mapping]] = ..., calls: _Optional[int] = ..., failures: _Optional[_Iterable[_Union[Failures, _Mapping]]] = ..., bytes_sent: _Optional[int] = ..., bytes_received: _Optional[int] = ..., nodes: _Optional[_Iterable[_Union[NodeLatency, _Mapping]]] = ..., left: _Optional[bool] = ..., addresses: _Optional[_Iterable[str]] = ..., certificate: _Optional[bytes] = ..., dense_fingerprint: _Optional[bytes] = ..., dense_age: _Optional[int] = ..., tunnel_addresses: _Optional[_Iterable[str]] = ..., relay_addresses: _Optional[_Iterable[str]] = ...) -> None: ...

class Library(_message.Message):
    __slots__ = ("memories",)
    MEMORIES_FIELD_NUMBER: _ClassVar[int]
    memories: _containers.RepeatedCompositeFieldContainer[LibraryEntry]
    def __init__(self, memories: _Optional[_Iterable[_Union[LibraryEntry, _Mapping]]] = ...) -> None: ...

class LibraryEntry(_message.Message):
    __slots__ = ("name", "manifest_sha256", "manifest_bytes", "revision", "passages", "total_bytes", "licenses", "about", "shards", "grid")
    NAME_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_SHA256_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_BYTES_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    PASSAGES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    LICENSES_FIELD_NUMBER: _ClassVar[int]
    ABOUT_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    GRID_FIELD_NUMBER: _ClassVar[int]
    name: str
    manifest_sha256: bytes
    manifest_bytes: int
    revision: int
    passages: int
    total_bytes: int
    licenses: _containers.RepeatedScalarFieldContainer[str]
    about: str
    shards: int
    grid: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, name: _Optional[str] = ..., manifest_sha256: _Optional[bytes] = ..., manifest_bytes: _Optional[int] = ..., revision: _Optional[int] = ..., passages: _Optional[int] = ..., total_bytes: _Optional[int] = ..., licenses: _Optional[_Iterable[str]] = ..., about: _Optional[str] = ..., shards: _Optional[int] = ..., grid: _Optional[_Iterable[int]] = ...) -> None: ...

class RegionRecord(_message.Message):
    __slots__ = ("state", "shards", "node")
    STATE_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    state: ReplicaState
    shards: bytes
    node: NodeRecord
    def __init__(self, state: _Optional[_Union[ReplicaState, str]] = ..., shards: _Optional[bytes] = ..., node: _Optional[_Union[NodeRecord, _Mapping]] = ...) -> None: ...

class Failures(_message.Message):
    __slots__ = ("cause", "count")
    CAUSE_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    cause: str
    count: int
    def __init__(self, cause: _Optional[str] = ..., count: _Optional[int] = ...) -> None: ...

class Latency(_message.Message):
    __slots__ = ("p50_s", "p99_s")
    P50_S_FIELD_NUMBER: _ClassVar[int]
    P99_S_FIELD_NUMBER: _ClassVar[int]
    p50_s: float
    p99_s: float
    def __init__(self, p50_s: _Optional[float] = ..., p99_s: _Optional[float] = ...) -> None: ...

class NodeLatency(_message.Message):
    __slots__ = ("peer_id", "mean_s")
    PEER_ID_FIELD_NUMBER: _ClassVar[int]
    MEAN_S_FIELD_NUMBER: _ClassVar[int]
    peer_id: bytes
    mean_s: float
    def __init__(self, peer_id: _Optional[bytes] = ..., mean_s: _Optional[float] = ...) -> None: ...

class InviteMessage(_message.Message):
    __slots__ = ("name", "author", "bootstrap_addresses", "token")
    NAME_FIELD_NUMBER: _ClassVar[int]
    AUTHOR_FIELD_NUMBER: _ClassVar[int]
    BOOTSTRAP_ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    name: str
    author: bytes
    bootstrap_addresses: _containers.RepeatedScalarFieldContainer[str]
    token: _admission_pb2.Token
    def __init__(self, name: _Optional[str] = ..., author: _Optional[bytes] = ..., bootstrap_addresses: _Optional[_Iterable[str]] = ..., token: _Optional[_Union[_admission_pb2.Token, _Mapping]] = ...) -> None: ...
