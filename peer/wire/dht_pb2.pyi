from peer.wire import contact_pb2 as _contact_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ResultType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RESULT_TYPE_NOT_FOUND: _ClassVar[ResultType]
    RESULT_TYPE_PLAIN: _ClassVar[ResultType]
    RESULT_TYPE_DICTIONARY: _ClassVar[ResultType]
RESULT_TYPE_NOT_FOUND: ResultType
RESULT_TYPE_PLAIN: ResultType
RESULT_TYPE_DICTIONARY: ResultType

class NodeInfo(_message.Message):
    __slots__ = ("node_id", "contact")
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    CONTACT_FIELD_NUMBER: _ClassVar[int]
    node_id: bytes
    contact: _contact_pb2.Contact
    def __init__(self, node_id: _Optional[bytes] = ..., contact: _Optional[_Union[_contact_pb2.Contact, _Mapping]] = ...) -> None: ...

class PingRequest(_message.Message):
    __slots__ = ("peer", "validate")
    PEER_FIELD_NUMBER: _ClassVar[int]
    VALIDATE_FIELD_NUMBER: _ClassVar[int]
    peer: NodeInfo
    validate: bool
    def __init__(self, peer: _Optional[_Union[NodeInfo, _Mapping]] = ..., validate: _Optional[bool] = ...) -> None: ...

class PingResponse(_message.Message):
    __slots__ = ("peer", "dht_time", "available")
    PEER_FIELD_NUMBER: _ClassVar[int]
    DHT_TIME_FIELD_NUMBER: _ClassVar[int]
    AVAILABLE_FIELD_NUMBER: _ClassVar[int]
    peer: NodeInfo
    dht_time: float
    available: bool
    def __init__(self, peer: _Optional[_Union[NodeInfo, _Mapping]] = ..., dht_time: _Optional[float] = ..., available: _Optional[bool] = ...) -> None: ...

class StoreRequest(_message.Message):
    __slots__ = ("keys", "subkeys", "values", "expiration_time", "in_cache", "peer")
    KEYS_FIELD_NUMBER: _ClassVar[int]
    SUBKEYS_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    EXPIRATION_TIME_FIELD_NUMBER: _ClassVar[int]
    IN_CACHE_FIELD_NUMBER: _ClassVar[int]
    PEER_FIELD_NUMBER: _ClassVar[int]
    keys: _containers.RepeatedScalarFieldContainer[bytes]
    subkeys: _containers.RepeatedScalarFieldContainer[bytes]
    values: _containers.RepeatedScalarFieldContainer[bytes]
    expiration_time: _containers.RepeatedScalarFieldContainer[float]
    in_cache: _containers.RepeatedScalarFieldContainer[bool]
    peer: NodeInfo
    def __init__(self, keys: _Optional[_Iterable[bytes]] = ..., subkeys: _Optional[_Iterable[bytes]] = ..., values: _Optional[_Iterable[bytes]] = ..., expiration_time: _Optional[_Iterable[float]] = ..., in_cache: _Optional[_Iterable[bool]] = ..., peer: _Optional[_Union[NodeInfo, _Mapping]] = ...) -> None: ...

class StoreResponse(_message.Message):
    __slots__ = ("store_ok", "peer")
    STORE_OK_FIELD_NUMBER: _ClassVar[int]
    PEER_FIELD_NUMBER: _ClassVar[int]
    store_ok: _containers.RepeatedScalarFieldContainer[bool]
    peer: NodeInfo
    def __init__(self, store_ok: _Optional[_Iterable[bool]] = ..., peer: _Optional[_Union[NodeInfo, _Mapping]] = ...) -> None: ...

class FindRequest(_message.Message):
    __slots__ = ("keys", "peer", "known", "have", "room", "contacts")
    KEYS_FIELD_NUMBER: _ClassVar[int]
    PEER_FIELD_NUMBER: _ClassVar[int]
    KNOWN_FIELD_NUMBER: _ClassVar[int]
    HAVE_FIELD_NUMBER: _ClassVar[int]
    ROOM_FIELD_NUMBER: _ClassVar[int]
    CONTACTS_FIELD_NUMBER: _ClassVar[int]
    keys: _containers.RepeatedScalarFieldContainer[bytes]
    peer: NodeInfo
    known: _containers.RepeatedScalarFieldContainer[int]
    have: _containers.RepeatedScalarFieldContainer[int]
    room: int
    contacts: int
    def __init__(self, keys: _Optional[_Iterable[bytes]] = ..., peer: _Optional[_Union[NodeInfo, _Mapping]] = ..., known: _Optional[_Iterable[int]] = ..., have: _Optional[_Iterable[int]] = ..., room: _Optional[int] = ..., contacts: _Optional[int] = ...) -> None: ...

class FindResult(_message.Message):
    __slots__ = ("type", "value", "expiration_time", "nearest_node_ids", "nearest_peer_ids", "nearest_known", "entries")
    TYPE_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    EXPIRATION_TIME_FIELD_NUMBER: _ClassVar[int]
    NEAREST_NODE_IDS_FIELD_NUMBER: _ClassVar[int]
    NEAREST_PEER_IDS_FIELD_NUMBER: _ClassVar[int]
    NEAREST_KNOWN_FIELD_NUMBER: _ClassVar[int]
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    type: ResultType
    value: bytes
    expiration_time: float
    nearest_node_ids: _containers.RepeatedScalarFieldContainer[bytes]
    nearest_peer_ids: _containers.RepeatedScalarFieldContainer[bytes]
    nearest_known: _containers.RepeatedScalarFieldContainer[int]
    entries: int
    def __init__(self, type: _Optional[_Union[ResultType, str]] = ..., value: _Optional[bytes] = ..., expiration_time: _Optional[float] = ..., nearest_node_ids: _Optional[_Iterable[bytes]] = ..., nearest_peer_ids: _Optional[_Iterable[bytes]] = ..., nearest_known: _Optional[_Iterable[int]] = ..., entries: _Optional[int] = ...) -> None: ...

class FindResponse(_message.Message):
    __slots__ = ("results", "peer", "contacts")
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    PEER_FIELD_NUMBER: _ClassVar[int]
    CONTACTS_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[FindResult]
    peer: NodeInfo
    contacts: _containers.RepeatedCompositeFieldContainer[_contact_pb2.Contact]
    def __init__(self, results: _Optional[_Iterable[_Union[FindResult, _Mapping]]] = ..., peer: _Optional[_Union[NodeInfo, _Mapping]] = ..., contacts: _Optional[_Iterable[_Union[_contact_pb2.Contact, _Mapping]]] = ...) -> None: ...
