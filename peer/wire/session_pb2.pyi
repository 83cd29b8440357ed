from peer.wire import admission_pb2 as _admission_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Right(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RIGHT_UNSPECIFIED: _ClassVar[Right]
    RIGHT_FORWARD: _ClassVar[Right]
    RIGHT_BACKWARD: _ClassVar[Right]
    RIGHT_FETCH: _ClassVar[Right]
    RIGHT_AVERAGE: _ClassVar[Right]
    RIGHT_DHT: _ClassVar[Right]
    RIGHT_RELAY: _ClassVar[Right]
    RIGHT_EXPORT: _ClassVar[Right]
    RIGHT_MEMORY: _ClassVar[Right]
RIGHT_UNSPECIFIED: Right
RIGHT_FORWARD: Right
RIGHT_BACKWARD: Right
RIGHT_FETCH: Right
RIGHT_AVERAGE: Right
RIGHT_DHT: Right
RIGHT_RELAY: Right
RIGHT_EXPORT: Right
RIGHT_MEMORY: Right

class ChallengeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ChallengeReply(_message.Message):
    __slots__ = ("challenge",)
    CHALLENGE_FIELD_NUMBER: _ClassVar[int]
    challenge: bytes
    def __init__(self, challenge: _Optional[bytes] = ...) -> None: ...

class OpenRequest(_message.Message):
    __slots__ = ("statement", "public_key", "signature")
    STATEMENT_FIELD_NUMBER: _ClassVar[int]
    PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    statement: bytes
    public_key: bytes
    signature: bytes
    def __init__(self, statement: _Optional[bytes] = ..., public_key: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class OpenStatement(_message.Message):
    __slots__ = ("protocol_version", "swarm_id", "server", "caller", "challenge", "rights", "badge")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    SWARM_ID_FIELD_NUMBER: _ClassVar[int]
    SERVER_FIELD_NUMBER: _ClassVar[int]
    CALLER_FIELD_NUMBER: _ClassVar[int]
    CHALLENGE_FIELD_NUMBER: _ClassVar[int]
    RIGHTS_FIELD_NUMBER: _ClassVar[int]
    BADGE_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    swarm_id: str
    server: bytes
    caller: bytes
    challenge: bytes
    rights: _containers.RepeatedScalarFieldContainer[Right]
    badge: _admission_pb2.Badge
    def __init__(self, protocol_version: _Optional[int] = ..., swarm_id: _Optional[str] = ..., server: _Optional[bytes] = ..., caller: _Optional[bytes] = ..., challenge: _Optional[bytes] = ..., rights: _Optional[_Iterable[_Union[Right, str]]] = ..., badge: _Optional[_Union[_admission_pb2.Badge, _Mapping]] = ...) -> None: ...

class OpenReply(_message.Message):
    __slots__ = ("session", "lifetime_s")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    LIFETIME_S_FIELD_NUMBER: _ClassVar[int]
    session: bytes
    lifetime_s: float
    def __init__(self, session: _Optional[bytes] = ..., lifetime_s: _Optional[float] = ...) -> None: ...
