from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Precision(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PRECISION_UNSPECIFIED: _ClassVar[Precision]
    PRECISION_FP32: _ClassVar[Precision]
    PRECISION_TF32: _ClassVar[Precision]
    PRECISION_BF16: _ClassVar[Precision]

class AskReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ASK_REASON_UNSPECIFIED: _ClassVar[AskReason]
    ASK_REASON_AVERAGE: _ClassVar[AskReason]
    ASK_REASON_ADOPT: _ClassVar[AskReason]
PRECISION_UNSPECIFIED: Precision
PRECISION_FP32: Precision
PRECISION_TF32: Precision
PRECISION_BF16: Precision
ASK_REASON_UNSPECIFIED: AskReason
ASK_REASON_AVERAGE: AskReason
ASK_REASON_ADOPT: AskReason

class FetchRequest(_message.Message):
    __slots__ = ("protocol_version", "swarm_id", "uid", "sha256", "offset", "version", "parameters")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    SWARM_ID_FIELD_NUMBER: _ClassVar[int]
    UID_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    swarm_id: str
    uid: str
    sha256: bytes
    offset: int
    version: int
    parameters: bool
    def __init__(self, protocol_version: _Optional[int] = ..., swarm_id: _Optional[str] = ..., uid: _Optional[str] = ..., sha256: _Optional[bytes] = ..., offset: _Optional[int] = ..., version: _Optional[int] = ..., parameters: _Optional[bool] = ...) -> None: ...

class FetchReply(_message.Message):
    __slots__ = ("header", "chunk")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    header: StateHeader
    chunk: bytes
    def __init__(self, header: _Optional[_Union[StateHeader, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class StateHeader(_message.Message):
    __slots__ = ("update_count", "total_bytes", "sha256", "met_update_count", "precision")
    UPDATE_COUNT_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    MET_UPDATE_COUNT_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    update_count: int
    total_bytes: int
    sha256: bytes
    met_update_count: int
    precision: Precision
    def __init__(self, update_count: _Optional[int] = ..., total_bytes: _Optional[int] = ..., sha256: _Optional[bytes] = ..., met_update_count: _Optional[int] = ..., precision: _Optional[_Union[Precision, str]] = ...) -> None: ...

class AskRequest(_message.Message):
    __slots__ = ("protocol_version", "swarm_id", "reason", "uids", "sha256", "base_sha256")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    SWARM_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    UIDS_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    BASE_SHA256_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    swarm_id: str
    reason: AskReason
    uids: _containers.RepeatedScalarFieldContainer[str]
    sha256: bytes
    base_sha256: bytes
    def __init__(self, protocol_version: _Optional[int] = ..., swarm_id: _Optional[str] = ..., reason: _Optional[_Union[AskReason, str]] = ..., uids: _Optional[_Iterable[str]] = ..., sha256: _Optional[bytes] = ..., base_sha256: _Optional[bytes] = ...) -> None: ...

class AskReply(_message.Message):
    __slots__ = ("accepted",)
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    accepted: int
    def __init__(self, accepted: _Optional[int] = ...) -> None: ...
