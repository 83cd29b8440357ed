from peer.wire import state_pb2 as _state_pb2
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ExchangeRequest(_message.Message):
    __slots__ = ("offer", "chunk")
    OFFER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    offer: DenseOffer
    chunk: bytes
    def __init__(self, offer: _Optional[_Union[DenseOffer, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class DenseOffer(_message.Message):
    __slots__ = ("protocol_version", "swarm_id", "fingerprint", "header")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    SWARM_ID_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    HEADER_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    swarm_id: str
    fingerprint: bytes
    header: _state_pb2.StateHeader
    def __init__(self, protocol_version: _Optional[int] = ..., swarm_id: _Optional[str] = ..., fingerprint: _Optional[bytes] = ..., header: _Optional[_Union[_state_pb2.StateHeader, _Mapping]] = ...) -> None: ...

class TakeRequest(_message.Message):
    __slots__ = ("protocol_version", "swarm_id", "fingerprint", "sha256", "offset")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    SWARM_ID_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    swarm_id: str
    fingerprint: bytes
    sha256: bytes
    offset: int
    def __init__(self, protocol_version: _Optional[int] = ..., swarm_id: _Optional[str] = ..., fingerprint: _Optional[bytes] = ..., sha256: _Optional[bytes] = ..., offset: _Optional[int] = ...) -> None: ...
