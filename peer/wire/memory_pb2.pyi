from peer.wire import state_pb2 as _state_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SearchRequest(_message.Message):
    __slots__ = ("protocol_version", "swarm_id", "memory", "k", "vectors", "shards")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    SWARM_ID_FIELD_NUMBER: _ClassVar[int]
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    K_FIELD_NUMBER: _ClassVar[int]
    VECTORS_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    swarm_id: str
    memory: str
    k: int
    vectors: bytes
    shards: _containers.RepeatedCompositeFieldContainer[ShardQueries]
    def __init__(self, protocol_version: _Optional[int] = ..., swarm_id: _Optional[str] = ..., memory: _Optional[str] = ..., k: _Optional[int] = ..., vectors: _Optional[bytes] = ..., shards: _Optional[_Iterable[_Union[ShardQueries, _Mapping]]] = ...) -> None: ...

class ShardQueries(_message.Message):
    __slots__ = ("root", "queries")
    ROOT_FIELD_NUMBER: _ClassVar[int]
    QUERIES_FIELD_NUMBER: _ClassVar[int]
    root: bytes
    queries: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, root: _Optional[bytes] = ..., queries: _Optional[_Iterable[int]] = ...) -> None: ...

class SearchReply(_message.Message):
    __slots__ = ("found", "missing", "text_roots")
    FOUND_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    TEXT_ROOTS_FIELD_NUMBER: _ClassVar[int]
    found: _containers.RepeatedCompositeFieldContainer[Found]
    missing: _containers.RepeatedScalarFieldContainer[int]
    text_roots: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, found: _Optional[_Iterable[_Union[Found, _Mapping]]] = ..., missing: _Optional[_Iterable[int]] = ..., text_roots: _Optional[_Iterable[bytes]] = ...) -> None: ...

class Found(_message.Message):
    __slots__ = ("shards", "positions", "scores", "texts", "text_positions")
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    TEXTS_FIELD_NUMBER: _ClassVar[int]
    TEXT_POSITIONS_FIELD_NUMBER: _ClassVar[int]
    shards: _containers.RepeatedScalarFieldContainer[int]
    positions: _containers.RepeatedScalarFieldContainer[int]
    scores: _containers.RepeatedScalarFieldContainer[int]
    texts: _containers.RepeatedScalarFieldContainer[int]
    text_positions: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, shards: _Optional[_Iterable[int]] = ..., positions: _Optional[_Iterable[int]] = ..., scores: _Optional[_Iterable[int]] = ..., texts: _Optional[_Iterable[int]] = ..., text_positions: _Optional[_Iterable[int]] = ...) -> None: ...

class ReadRequest(_message.Message):
    __slots__ = ("protocol_version", "swarm_id", "memory", "shards")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    SWARM_ID_FIELD_NUMBER: _ClassVar[int]
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    swarm_id: str
    memory: str
    shards: _containers.RepeatedCompositeFieldContainer[ShardPositions]
    def __init__(self, protocol_version: _Optional[int] = ..., swarm_id: _Optional[str] = ..., memory: _Optional[str] = ..., shards: _Optional[_Iterable[_Union[ShardPositions, _Mapping]]] = ...) -> None: ...

class ShardPositions(_message.Message):
    __slots__ = ("root", "positions")
    ROOT_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    root: bytes
    positions: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, root: _Optional[bytes] = ..., positions: _Optional[_Iterable[int]] = ...) -> None: ...

class ReadReply(_message.Message):
    __slots__ = ("passages",)
    PASSAGES_FIELD_NUMBER: _ClassVar[int]
    passages: _containers.RepeatedCompositeFieldContainer[ProvenPassage]
    def __init__(self, passages: _Optional[_Iterable[_Union[ProvenPassage, _Mapping]]] = ...) -> None: ...

class ProvenPassage(_message.Message):
    __slots__ = ("shard", "position", "passage", "vector", "path", "hash", "text_root", "text_position")
    SHARD_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    PASSAGE_FIELD_NUMBER: _ClassVar[int]
    VECTOR_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    HASH_FIELD_NUMBER: _ClassVar[int]
    TEXT_ROOT_FIELD_NUMBER: _ClassVar[int]
    TEXT_POSITION_FIELD_NUMBER: _ClassVar[int]
    shard: int
    position: int
    passage: Passage
    vector: bytes
    path: bytes
    hash: bytes
    text_root: bytes
    text_position: int
    def __init__(self, shard: _Optional[int] = ..., position: _Optional[int] = ..., passage: _Optional[_Union[Passage, _Mapping]] = ..., vector: _Optional[bytes] = ..., path: _Optional[bytes] = ..., hash: _Optional[bytes] = ..., text_root: _Optional[bytes] = ..., text_position: _Optional[int] = ...) -> None: ...

class Passage(_message.Message):
    __slots__ = ("text", "title", "source", "offset", "license")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TITLE_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    LICENSE_FIELD_NUMBER: _ClassVar[int]
    text: str
    title: str
    source: str
    offset: int
    license: str
    def __init__(self, text: _Optional[str] = ..., title: _Optional[str] = ..., source: _Optional[str] = ..., offset: _Optional[int] = ..., license: _Optional[str] = ...) -> None: ...

class FetchPartRequest(_message.Message):
    __slots__ = ("protocol_version", "swarm_id", "memory", "name", "offset", "sha256", "library")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    SWARM_ID_FIELD_NUMBER: _ClassVar[int]
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    LIBRARY_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    swarm_id: str
    memory: str
    name: bytes
    offset: int
    sha256: bytes
    library: bytes
    def __init__(self, protocol_version: _Optional[int] = ..., swarm_id: _Optional[str] = ..., memory: _Optional[str] = ..., name: _Optional[bytes] = ..., offset: _Optional[int] = ..., sha256: _Optional[bytes] = ..., library: _Optional[bytes] = ...) -> None: ...

class MemoryManifest(_message.Message):
    __slots__ = ("format", "name", "revision", "about", "created_at", "encoder_kind", "encoder_sha256", "encoder_bytes", "dimensions", "codebook_sha256", "codebook_bytes", "grid", "licenses", "shards", "revoked")
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    ABOUT_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    ENCODER_KIND_FIELD_NUMBER: _ClassVar[int]
    ENCODER_SHA256_FIELD_NUMBER: _ClassVar[int]
    ENCODER_BYTES_FIELD_NUMBER: _ClassVar[int]
    DIMENSIONS_FIELD_NUMBER: _ClassVar[int]
    CODEBOOK_SHA256_FIELD_NUMBER: _ClassVar[int]
    CODEBOOK_BYTES_FIELD_NUMBER: _ClassVar[int]
    GRID_FIELD_NUMBER: _ClassVar[int]
    LICENSES_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    REVOKED_FIELD_NUMBER: _ClassVar[int]
    format: int
    name: str
    revision: int
    about: str
    created_at: float
    encoder_kind: str
    encoder_sha256: bytes
    encoder_bytes: int
    dimensions: int
    codebook_sha256: bytes
    codebook_bytes: int
    grid: _containers.RepeatedScalarFieldContainer[int]
    licenses: _containers.RepeatedScalarFieldContainer[str]
    shards: _containers.RepeatedCompositeFieldContainer[ShardEntry]
    revoked: _containers.RepeatedCompositeFieldContainer[RevokedPassages]
    def __init__(self, format: _Optional[int] = ..., name: _Optional[str] = ..., revision: _Optional[int] = ..., about: _Optional[str] = ..., created_at: _Optional[float] = ..., encoder_kind: _Optional[str] = ..., encoder_sha256: _Optional[bytes] = ..., encoder_bytes: _Optional[int] = ..., dimensions: _Optional[int] = ..., codebook_sha256: _Optional[bytes] = ..., codebook_bytes: _Optional[int] = ..., grid: _Optional[_Iterable[int]] = ..., licenses: _Optional[_Iterable[str]] = ..., shards: _Optional[_Iterable[_Union[ShardEntry, _Mapping]]] = ..., revoked: _Optional[_Iterable[_Union[RevokedPassages, _Mapping]]] = ...) -> None: ...

class RevokedPassages(_message.Message):
    __slots__ = ("shard", "positions")
    SHARD_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    shard: int
    positions: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, shard: _Optional[int] = ..., positions: _Optional[_Iterable[int]] = ...) -> None: ...

class ShardEntry(_message.Message):
    __slots__ = ("cell", "root", "leaves", "size", "secondary")
    CELL_FIELD_NUMBER: _ClassVar[int]
    ROOT_FIELD_NUMBER: _ClassVar[int]
    LEAVES_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    SECONDARY_FIELD_NUMBER: _ClassVar[int]
    cell: int
    root: bytes
    leaves: int
    size: int
    secondary: bool
    def __init__(self, cell: _Optional[int] = ..., root: _Optional[bytes] = ..., leaves: _Optional[int] = ..., size: _Optional[int] = ..., secondary: _Optional[bool] = ...) -> None: ...
