from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class ProbeRequest(_message.Message):
    __slots__ = ("protocol_version", "swarm_id", "payload", "reply_bytes")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    SWARM_ID_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    REPLY_BYTES_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    swarm_id: str
    payload: bytes
    reply_bytes: int
    def __init__(self, protocol_version: _Optional[int] = ..., swarm_id: _Optional[str] = ..., payload: _Optional[bytes] = ..., reply_bytes: _Optional[int] = ...) -> None: ...

class ProbeReply(_message.Message):
    __slots__ = ("time", "payload")
    TIME_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    time: float
    payload: bytes
    def __init__(self, time: _Optional[float] = ..., payload: _Optional[bytes] = ...) -> None: ...

class DialBackRequest(_message.Message):
    __slots__ = ("protocol_version", "swarm_id", "port")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    SWARM_ID_FIELD_NUMBER: _ClassVar[int]
    PORT_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    swarm_id: str
    port: int
    def __init__(self, protocol_version: _Optional[int] = ..., swarm_id: _Optional[str] = ..., port: _Optional[int] = ...) -> None: ...

class DialBackReply(_message.Message):
    __slots__ = ("connected", "address", "message")
    CONNECTED_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    connected: bool
    address: str
    message: str
    def __init__(self, connected: _Optional[bool] = ..., address: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...
