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
REPLICA_STATE_UNSPECIFIED: ReplicaState
REPLICA_STATE_CLAIMED: ReplicaState
REPLICA_STATE_SERVING: ReplicaState
REPLICA_STATE_WITHDRAWN: ReplicaState
REPLICA_STATE_LEAVING: ReplicaState

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
    __slots__ = ("key", "peer_id", "expires_at", "announcement", "node", "manifest_json")
    KEY_FIELD_NUMBER: _ClassVar[int]
    PEER_ID_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_AT_FIELD_NUMBER: _ClassVar[int]
    ANNOUNCEMENT_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_JSON_FIELD_NUMBER: _ClassVar[int]
    key: str
    peer_id: bytes
    expires_at: float
    announcement: Announcement
    node: NodeRecord
    manifest_json: bytes
    def __init__(self, key: _Optional[str] = ..., peer_id: _Optional[bytes] = ..., expires_at: _Optional[float] = ..., announcement: _Optional[_Union[Announcement, _Mapping]] = ..., node: _Optional[_Union[NodeRecord, _Mapping]] = ..., manifest_json: _Optional[bytes] = ...) -> None: ...

class Announcement(_message.Message):
    __slots__ = ("state", "update_count", "queued_rows", "claimed_at")
    STATE_FIELD_NUMBER: _ClassVar[int]
    UPDATE_COUNT_FIELD_NUMBER: _ClassVar[int]
    QUEUED_ROWS_FIELD_NUMBER: _ClassVar[int]
    CLAIMED_AT_FIELD_NUMBER: _ClassVar[int]
    state: ReplicaState
    update_count: int
    queued_rows: int
    claimed_at: float
    def __init__(self, state: _Optional[_Union[ReplicaState, str]] = ..., update_count: _Optional[int] = ..., queued_rows: _Optional[int] = ..., claimed_at: _Optional[float] = ...) -> None: ...

class NodeRecord(_message.Message):
    __slots__ = ("addresses", "certificate", "protocol_version", "software_version", "expert_count", "expert_capacity", "rows_processed", "updates", "started_at", "bootstrap_addresses", "left")
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    SOFTWARE_VERSION_FIELD_NUMBER: _ClassVar[int]
    EXPERT_COUNT_FIELD_NUMBER: _ClassVar[int]
    EXPERT_CAPACITY_FIELD_NUMBER: _ClassVar[int]
    ROWS_PROCESSED_FIELD_NUMBER: _ClassVar[int]
    UPDATES_FIELD_NUMBER: _ClassVar[int]
    STARTED_AT_FIELD_NUMBER: _ClassVar[int]
    BOOTSTRAP_ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    LEFT_FIELD_NUMBER: _ClassVar[int]
    addresses: _containers.RepeatedScalarFieldContainer[str]
    certificate: bytes
    protocol_version: int
    software_version: str
    expert_count: int
    expert_capacity: int
    rows_processed: int
    updates: int
    started_at: float
    bootstrap_addresses: _containers.RepeatedScalarFieldContainer[str]
    left: bool
    def __init__(self, addresses: _Optional[_Iterable[str]] = ..., certificate: _Optional[bytes] = ..., protocol_version: _Optional[int] = ..., software_version: _Optional[str] = ..., expert_count: _Optional[int] = ..., expert_capacity: _Optional[int] = ..., rows_processed: _Optional[int] = ..., updates: _Optional[int] = ..., started_at: _Optional[float] = ..., bootstrap_addresses: _Optional[_Iterable[str]] = ..., left: _Optional[bool] = ...) -> None: ...

class InviteMessage(_message.Message):
    __slots__ = ("name", "author", "bootstrap_addresses")
    NAME_FIELD_NUMBER: _ClassVar[int]
    AUTHOR_FIELD_NUMBER: _ClassVar[int]
    BOOTSTRAP_ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    name: str
    author: bytes
    bootstrap_addresses: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, name: _Optional[str] = ..., author: _Optional[bytes] = ..., bootstrap_addresses: _Optional[_Iterable[str]] = ...) -> None: ...
