from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Codec(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CODEC_UNSPECIFIED: _ClassVar[Codec]
    CODEC_FP32: _ClassVar[Codec]
    CODEC_BF16: _ClassVar[Codec]
    CODEC_FP16: _ClassVar[Codec]
    CODEC_INT8: _ClassVar[Codec]
    CODEC_INT4: _ClassVar[Codec]
CODEC_UNSPECIFIED: Codec
CODEC_FP32: Codec
CODEC_BF16: Codec
CODEC_FP16: Codec
CODEC_INT8: Codec
CODEC_INT4: Codec

class CallRequest(_message.Message):
    __slots__ = ("header", "chunk")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    header: CallHeader
    chunk: bytes
    def __init__(self, header: _Optional[_Union[CallHeader, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class CallHeader(_message.Message):
    __slots__ = ("protocol_version", "swarm_id", "request_id", "width", "codec", "segment_lengths", "positions", "experts", "keep", "kept_request_id", "kept_rows", "sequences")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    SWARM_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_LENGTHS_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    KEEP_FIELD_NUMBER: _ClassVar[int]
    KEPT_REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    KEPT_ROWS_FIELD_NUMBER: _ClassVar[int]
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    swarm_id: str
    request_id: bytes
    width: int
    codec: Codec
    segment_lengths: _containers.RepeatedScalarFieldContainer[int]
    positions: _containers.RepeatedScalarFieldContainer[int]
    experts: _containers.RepeatedCompositeFieldContainer[ExpertRows]
    keep: bool
    kept_request_id: bytes
    kept_rows: int
    sequences: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, protocol_version: _Optional[int] = ..., swarm_id: _Optional[str] = ..., request_id: _Optional[bytes] = ..., width: _Optional[int] = ..., codec: _Optional[_Union[Codec, str]] = ..., segment_lengths: _Optional[_Iterable[int]] = ..., positions: _Optional[_Iterable[int]] = ..., experts: _Optional[_Iterable[_Union[ExpertRows, _Mapping]]] = ..., keep: _Optional[bool] = ..., kept_request_id: _Optional[bytes] = ..., kept_rows: _Optional[int] = ..., sequences: _Optional[_Iterable[int]] = ...) -> None: ...

class ExpertRows(_message.Message):
    __slots__ = ("uid", "rows", "weights", "held", "updates")
    UID_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    UPDATES_FIELD_NUMBER: _ClassVar[int]
    uid: str
    rows: _containers.RepeatedScalarFieldContainer[int]
    weights: bytes
    held: _containers.RepeatedScalarFieldContainer[int]
    updates: int
    def __init__(self, uid: _Optional[str] = ..., rows: _Optional[_Iterable[int]] = ..., weights: _Optional[bytes] = ..., held: _Optional[_Iterable[int]] = ..., updates: _Optional[int] = ...) -> None: ...

class CallReply(_message.Message):
    __slots__ = ("experts", "rows", "chunk", "kept")
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    KEPT_FIELD_NUMBER: _ClassVar[int]
    experts: _containers.RepeatedCompositeFieldContainer[ExpertReply]
    rows: _containers.RepeatedCompositeFieldContainer[AnsweredRows]
    chunk: bytes
    kept: bool
    def __init__(self, experts: _Optional[_Iterable[_Union[ExpertReply, _Mapping]]] = ..., rows: _Optional[_Iterable[_Union[AnsweredRows, _Mapping]]] = ..., chunk: _Optional[bytes] = ..., kept: _Optional[bool] = ...) -> None: ...

class AnsweredRows(_message.Message):
    __slots__ = ("rows", "masks", "products", "payload_bytes")
    ROWS_FIELD_NUMBER: _ClassVar[int]
    MASKS_FIELD_NUMBER: _ClassVar[int]
    PRODUCTS_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    rows: _containers.RepeatedScalarFieldContainer[int]
    masks: _containers.RepeatedScalarFieldContainer[int]
    products: bytes
    payload_bytes: int
    def __init__(self, rows: _Optional[_Iterable[int]] = ..., masks: _Optional[_Iterable[int]] = ..., products: _Optional[bytes] = ..., payload_bytes: _Optional[int] = ...) -> None: ...

class ExpertReply(_message.Message):
    __slots__ = ("index", "status", "message", "update_count", "skipped_update", "rolled_back", "retry_after_s", "version")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    UPDATE_COUNT_FIELD_NUMBER: _ClassVar[int]
    SKIPPED_UPDATE_FIELD_NUMBER: _ClassVar[int]
    ROLLED_BACK_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_S_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    index: int
    status: int
    message: str
    update_count: int
    skipped_update: bool
    rolled_back: bool
    retry_after_s: float
    version: int
    def __init__(self, index: _Optional[int] = ..., status: _Optional[int] = ..., message: _Optional[str] = ..., update_count: _Optional[int] = ..., skipped_update: _Optional[bool] = ..., rolled_back: _Optional[bool] = ..., retry_after_s: _Optional[float] = ..., version: _Optional[int] = ...) -> None: ...

class InfoRequest(_message.Message):
    __slots__ = ("protocol_version", "swarm_id")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    SWARM_ID_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    swarm_id: str
    def __init__(self, protocol_version: _Optional[int] = ..., swarm_id: _Optional[str] = ...) -> None: ...

class InfoReply(_message.Message):
    __slots__ = ("protocol_version", "software_version", "experts")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    SOFTWARE_VERSION_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    software_version: str
    experts: _containers.RepeatedCompositeFieldContainer[HostedExpert]
    def __init__(self, protocol_version: _Optional[int] = ..., software_version: _Optional[str] = ..., experts: _Optional[_Iterable[_Union[HostedExpert, _Mapping]]] = ...) -> None: ...

class HostedExpert(_message.Message):
    __slots__ = ("uid", "update_count")
    UID_FIELD_NUMBER: _ClassVar[int]
    UPDATE_COUNT_FIELD_NUMBER: _ClassVar[int]
    uid: str
    update_count: int
    def __init__(self, uid: _Optional[str] = ..., update_count: _Optional[int] = ...) -> None: ...
