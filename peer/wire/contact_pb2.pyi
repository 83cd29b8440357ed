from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Contact(_message.Message):
    __slots__ = ("statement", "signature")
    STATEMENT_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    statement: bytes
    signature: bytes
    def __init__(self, statement: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class ContactStatement(_message.Message):
    __slots__ = ("certificate", "sequence", "expires_at", "addresses")
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_AT_FIELD_NUMBER: _ClassVar[int]
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    certificate: bytes
    sequence: int
    expires_at: float
    addresses: _containers.RepeatedCompositeFieldContainer[ContactAddress]
    def __init__(self, certificate: _Optional[bytes] = ..., sequence: _Optional[int] = ..., expires_at: _Optional[float] = ..., addresses: _Optional[_Iterable[_Union[ContactAddress, _Mapping]]] = ...) -> None: ...

class ContactAddress(_message.Message):
    __slots__ = ("direct", "relayed", "libp2p")
    DIRECT_FIELD_NUMBER: _ClassVar[int]
    RELAYED_FIELD_NUMBER: _ClassVar[int]
    LIBP2P_FIELD_NUMBER: _ClassVar[int]
    direct: str
    relayed: str
    libp2p: str
    def __init__(self, direct: _Optional[str] = ..., relayed: _Optional[str] = ..., libp2p: _Optional[str] = ...) -> None: ...
