from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class ReserveRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ReserveReply(_message.Message):
    __slots__ = ("circuit", "caller")
    CIRCUIT_FIELD_NUMBER: _ClassVar[int]
    CALLER_FIELD_NUMBER: _ClassVar[int]
    circuit: bytes
    caller: bytes
    def __init__(self, circuit: _Optional[bytes] = ..., caller: _Optional[bytes] = ...) -> None: ...

class CircuitPiece(_message.Message):
    __slots__ = ("data", "peer_id", "circuit")
    DATA_FIELD_NUMBER: _ClassVar[int]
    PEER_ID_FIELD_NUMBER: _ClassVar[int]
    CIRCUIT_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    peer_id: bytes
    circuit: bytes
    def __init__(self, data: _Optional[bytes] = ..., peer_id: _Optional[bytes] = ..., circuit: _Optional[bytes] = ...) -> None: ...
