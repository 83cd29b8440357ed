from peer.wire import admission_pb2 as _admission_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Work(_message.Message):
    __slots__ = ("pairs", "updates", "queries", "checks_passed", "checks_failed")
    PAIRS_FIELD_NUMBER: _ClassVar[int]
    UPDATES_FIELD_NUMBER: _ClassVar[int]
    QUERIES_FIELD_NUMBER: _ClassVar[int]
    CHECKS_PASSED_FIELD_NUMBER: _ClassVar[int]
    CHECKS_FAILED_FIELD_NUMBER: _ClassVar[int]
    pairs: int
    updates: int
    queries: int
    checks_passed: int
    checks_failed: int
    def __init__(self, pairs: _Optional[int] = ..., updates: _Optional[int] = ..., queries: _Optional[int] = ..., checks_passed: _Optional[int] = ..., checks_failed: _Optional[int] = ...) -> None: ...

class Receipt(_message.Message):
    __slots__ = ("swarm_id", "trainer", "node", "work", "all_pairs")
    SWARM_ID_FIELD_NUMBER: _ClassVar[int]
    TRAINER_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    WORK_FIELD_NUMBER: _ClassVar[int]
    ALL_PAIRS_FIELD_NUMBER: _ClassVar[int]
    swarm_id: str
    trainer: bytes
    node: bytes
    work: Work
    all_pairs: int
    def __init__(self, swarm_id: _Optional[str] = ..., trainer: _Optional[bytes] = ..., node: _Optional[bytes] = ..., work: _Optional[_Union[Work, _Mapping]] = ..., all_pairs: _Optional[int] = ...) -> None: ...

class SignedReceipt(_message.Message):
    __slots__ = ("receipt", "public_key", "signature", "badge")
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    BADGE_FIELD_NUMBER: _ClassVar[int]
    receipt: bytes
    public_key: bytes
    signature: bytes
    badge: _admission_pb2.Badge
    def __init__(self, receipt: _Optional[bytes] = ..., public_key: _Optional[bytes] = ..., signature: _Optional[bytes] = ..., badge: _Optional[_Union[_admission_pb2.Badge, _Mapping]] = ...) -> None: ...

class GiveReply(_message.Message):
    __slots__ = ("kept",)
    KEPT_FIELD_NUMBER: _ClassVar[int]
    kept: bool
    def __init__(self, kept: _Optional[bool] = ...) -> None: ...

class ListRequest(_message.Message):
    __slots__ = ("protocol_version", "swarm_id", "offset")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    SWARM_ID_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    swarm_id: str
    offset: int
    def __init__(self, protocol_version: _Optional[int] = ..., swarm_id: _Optional[str] = ..., offset: _Optional[int] = ...) -> None: ...

class ListReply(_message.Message):
    __slots__ = ("receipts", "total")
    RECEIPTS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    receipts: _containers.RepeatedCompositeFieldContainer[SignedReceipt]
    total: int
    def __init__(self, receipts: _Optional[_Iterable[_Union[SignedReceipt, _Mapping]]] = ..., total: _Optional[int] = ...) -> None: ...

class SignedWork(_message.Message):
    __slots__ = ("work", "trainers")
    WORK_FIELD_NUMBER: _ClassVar[int]
    TRAINERS_FIELD_NUMBER: _ClassVar[int]
    work: Work
    trainers: int
    def __init__(self, work: _Optional[_Union[Work, _Mapping]] = ..., trainers: _Optional[int] = ...) -> None: ...

class SavedReceipts(_message.Message):
    __slots__ = ("receipts", "unsigned")
    RECEIPTS_FIELD_NUMBER: _ClassVar[int]
    UNSIGNED_FIELD_NUMBER: _ClassVar[int]
    receipts: _containers.RepeatedCompositeFieldContainer[SignedReceipt]
    unsigned: _containers.RepeatedCompositeFieldContainer[UnsignedWork]
    def __init__(self, receipts: _Optional[_Iterable[_Union[SignedReceipt, _Mapping]]] = ..., unsigned: _Optional[_Iterable[_Union[UnsignedWork, _Mapping]]] = ...) -> None: ...

class UnsignedWork(_message.Message):
    __slots__ = ("caller", "work")
    CALLER_FIELD_NUMBER: _ClassVar[int]
    WORK_FIELD_NUMBER: _ClassVar[int]
    caller: bytes
    work: Work
    def __init__(self, caller: _Optional[bytes] = ..., work: _Optional[_Union[Work, _Mapping]] = ...) -> None: ...
