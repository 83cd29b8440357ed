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

class DialRequest(_message.Message):
    __slots__ = ("peer_id",)
    PEER_ID_FIELD_NUMBER: _ClassVar[int]
    peer_id: bytes
    def __init__(self, peer_id: _Optional[bytes] = ...) -> None: ...

class DialReply(_message.Message):
    __slots__ = ("circuit",)
    CIRCUIT_FIELD_NUMBER: _ClassVar[int]
    circuit: bytes
    def __init__(self, circuit: _Optional[bytes] = ...) -> None: ...
