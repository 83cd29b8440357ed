from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Role(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROLE_UNSPECIFIED: _ClassVar[Role]
    ROLE_NODE: _ClassVar[Role]
    ROLE_TRAINER: _ClassVar[Role]
    ROLE_READER: _ClassVar[Role]
    ROLE_LIBRARIAN: _ClassVar[Role]
ROLE_UNSPECIFIED: Role
ROLE_NODE: Role
ROLE_TRAINER: Role
ROLE_READER: Role
ROLE_LIBRARIAN: Role

class Grant(_message.Message):
    __slots__ = ("swarm_id", "role", "expires_at", "serial", "key")
    SWARM_ID_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_AT_FIELD_NUMBER: _ClassVar[int]
    SERIAL_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    swarm_id: str
    role: Role
    expires_at: float
    serial: int
    key: bytes
    def __init__(self, swarm_id: _Optional[str] = ..., role: _Optional[_Union[Role, str]] = ..., expires_at: _Optional[float] = ..., serial: _Optional[int] = ..., key: _Optional[bytes] = ...) -> None: ...

class Token(_message.Message):
    __slots__ = ("grant", "signature", "secret")
    GRANT_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    SECRET_FIELD_NUMBER: _ClassVar[int]
    grant: bytes
    signature: bytes
    secret: bytes
    def __init__(self, grant: _Optional[bytes] = ..., signature: _Optional[bytes] = ..., secret: _Optional[bytes] = ...) -> None: ...

class Badge(_message.Message):
    __slots__ = ("grant", "signature", "holder_signature")
    GRANT_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    HOLDER_SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    grant: bytes
    signature: bytes
    holder_signature: bytes
    def __init__(self, grant: _Optional[bytes] = ..., signature: _Optional[bytes] = ..., holder_signature: _Optional[bytes] = ...) -> None: ...

class Revocations(_message.Message):
    __slots__ = ("serials",)
    SERIALS_FIELD_NUMBER: _ClassVar[int]
    serials: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, serials: _Optional[_Iterable[int]] = ...) -> None: ...
