"""Shards of a memory as files: vectors to search, texts to read, and the hashes that prove both.

They are safetensors files. A primary shard has `vectors` (N, D), `revoked` (N,), and `blocks`, each with the texts of
256 passages in zlib's format, with their `offsets`. Reading a passage inflates one block. The leaves of the Merkle tree
follow from these. They are computed when the file is opened. When a passage is proven, those near it are computed
again.

A secondary shard also has `vectors` and `revoked`, and says where the texts are: `roots` (T, 32) of primary shards, and
for each vector two numbers in `references` (N, 4), of two bytes each, little-endian: the index of one of these roots,
and the position in that shard. Its leaves follow from these.

A revoked passage keeps its place, so that the root stays the same; its text and vector are removed. `hashes` (R, 32)
replaces each of them: in a primary shard by its leaf, in a secondary one by the SHA-256 of its vector.
"""

import hashlib
import zlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Self, TypeAlias

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from dht.memory import (
    MAX_LABEL_CHARACTERS,
    MAX_LEAVES,
    MAX_LICENSE_CHARACTERS,
    MAX_TEXT_CHARACTERS,
    Passage,
    Place,
    ShardInfo,
    Vectors,
    reference_leaf,
)
from peer.arrays import Rows, arrays_in, decode_arrays, encode_arrays
from peer.errors import WireError
from peer.files import PlainFile
from peer.merkle import HASH_BYTES, MerkleTree
from peer.wire import memory_pb2

Revoked: TypeAlias = Mapping[bytes, Collection[int]]
"""Positions in primary shards, by the shards' roots."""
Arrays: TypeAlias = Mapping[str, NDArray[np.generic]]
"""The arrays of a shard's file."""
Forms: TypeAlias = dict[str, tuple[tuple[int, ...], type[np.generic]]]
"""The shape and dtype of each array."""

BLOCK = 256
"""Passages whose texts are compressed together."""
_PART = 16
"""When a leaf is proven, the subtree over this many leaves is computed. A power of two that divides `BLOCK`.
"""
_LENGTH_BYTES = 4
"""The size of the length before each passage in an inflated block."""
_MOST_PASSAGE_BYTES = 4 * (MAX_TEXT_CHARACTERS + 2 * MAX_LABEL_CHARACTERS + MAX_LICENSE_CHARACTERS) + 64
"""The limit for a serialized passage: its fields in UTF-8, and protobuf's overhead."""


@dataclass(frozen=True)
class ProvenEntry:
    """One passage's entry in a shard, and the proof that it is there."""

    place: Place
    text: Place
    """Where the text is; in a primary shard, the same place."""
    passage: Passage | None
    """None if it was revoked, or its text is elsewhere."""
    vector: bytes
    """Empty if it was revoked."""
    path: list[bytes]
    hash: bytes
    """The hash that replaces a revoked passage; else empty."""

    def message(self, shard: int) -> memory_pb2.ProvenPassage:
        """`shard`: the shard's number in a request."""
        is_elsewhere = self.text != self.place
        return memory_pb2.ProvenPassage(
            shard=shard,
            position=self.place.position,
            passage=None if self.passage is None else self.passage.message(),
            vector=self.vector,
            path=b"".join(self.path),
            hash=self.hash,
            text_root=self.text.root if is_elsewhere else b"",
            text_position=self.text.position if is_elsewhere else 0,
        )


class Shard(ABC):
    """An immutable view of a shard's file. Its methods may be called from several threads.

    If the file is on disk, they raise OSError when it can't be read.
    """

    def __init__(self, arrays: Arrays) -> None:
        """See `parse`. Raises WireError, also if a text can't be read."""
        revoked, hashes = arrays["revoked"].view(np.uint8), arrays["hashes"].view(np.uint8)
        if (revoked > 1).any() or revoked.sum() != len(hashes):
            raise WireError("the shard's hashes are not those of its revoked passages")
        self._vectors: Rows = arrays["vectors"]
        self._revoked, self._hashes = revoked.view(np.bool_), hashes
        self._ends = np.cumsum(revoked, dtype=np.int32) if len(hashes) else None
        """For each passage, how many passages up to it were revoked."""
        self.live: int = len(revoked) - len(hashes)
        """Passages that were not revoked."""
        # the roots of whole, aligned parts of a tree form one level of that tree
        leaves = list(self.leaves())
        parts = (leaves[begin : begin + _PART] for begin in range(0, len(leaves), _PART))
        self._top = MerkleTree([MerkleTree(part).root for part in parts])

    @staticmethod
    def parse(data: bytes | memoryview, info: ShardInfo, dimensions: int) -> "Shard":
        """Raises WireError if this is not a file of that shard. Its content still has to be checked: see `check`."""
        if len(data) > most_bytes(info):
            raise WireError(f"the shard has {len(data)} bytes, more than {most_bytes(info)}")
        kind = SecondaryShard if info.is_secondary else PrimaryShard
        shard = kind._of_arrays(decode_arrays(data), info.leaves, dimensions)
        if shard.root != info.root:
            raise WireError("the shard's passages don't match its root")
        return shard

    @classmethod
    def root_of(cls, data: bytes) -> bytes:
        """The root of a file that `build` made."""
        arrays = decode_arrays(data)
        return cls._of_arrays(arrays, *arrays["vectors"].shape).root

    @classmethod
    def _of_arrays(cls, arrays: Arrays, leaves: int, dimensions: int) -> Self:
        """Raises WireError."""
        forms: Forms = {
            "vectors": ((leaves, dimensions), np.int8),
            "revoked": ((leaves,), np.uint8),
            "hashes": ((_count(arrays, "hashes"), HASH_BYTES), np.uint8),
            **cls._own_forms(arrays, leaves),
        }
        if {name: (array.shape, array.dtype.type) for name, array in arrays.items()} != forms:
            raise WireError(
                "this is not the file of such a shard: if an older version built the memory, build it again"
            )
        return cls(arrays)

    @staticmethod
    @abstractmethod
    def _own_forms(arrays: Arrays, leaves: int) -> Forms:
        """The arrays that only shards of this kind have."""

    @abstractmethod
    def on_disk(self, file: PlainFile, data: bytes) -> Self:
        """The same shard, but large parts are read from the file when they are needed. `data`: the file's content."""

    @property
    def root(self) -> bytes:
        """The root of the Merkle tree, which names the shard."""
        return self._top.root

    def __len__(self) -> int:
        return len(self._revoked)

    @abstractmethod
    def check(self, revoked: Revoked) -> None:
        """Raises WireError unless each passage matches its leaf, or was removed and is among `revoked`."""

    @abstractmethod
    def text_at(self, position: int) -> Place:
        """Where the text of a passage is."""

    def has_any(self, revoked: Revoked) -> bool:
        """Whether any of these passages is in the shard and not yet revoked."""
        return bool((self._named(revoked) & ~self._revoked).any())

    def without(self, revoked: Revoked) -> bytes | None:
        """The file without the texts and vectors of these passages. None if it has none of them.

        Raises WireError if a text can't be read.
        """
        if not self.has_any(revoked):
            return None
        gone = self._named(revoked) | self._revoked
        vectors = self._vectors[:].copy()
        vectors[gone] = 0
        return self._file(vectors, gone)

    @abstractmethod
    def _named(self, revoked: Revoked) -> NDArray[np.bool_]:
        """A mask of these passages."""

    @abstractmethod
    def _file(self, vectors: Vectors, revoked: NDArray[np.bool_]) -> bytes: ...

    @abstractmethod
    def _texts(self, block: int) -> list[bytes]:
        """The serialized passages of a block; empty for those that were revoked, or whose text is elsewhere."""

    @abstractmethod
    def _leaf(self, position: int, text: bytes, vector: Vectors) -> bytes: ...

    def vectors(self) -> Vectors:
        """All vectors, (N, D); zeros for revoked passages."""
        return self._vectors[:]

    def revoked(self) -> NDArray[np.bool_]:
        """Which passages were revoked, (N,)."""
        return self._revoked

    def leaf(self, position: int) -> bytes:
        """The passage's leaf in the tree."""
        block, inside = divmod(position, BLOCK)
        text = b"" if self._revoked[position] else self._texts(block)[inside]
        return self._leaf(position, text, self._vectors_in(block)[inside])

    def leaves(self) -> Iterator[bytes]:
        """All leaves, in order. Raises WireError if a text can't be read."""
        for begin in range(0, len(self), BLOCK):
            block, positions = begin // BLOCK, range(begin, min(begin + BLOCK, len(self)))
            yield from self._leaves_of(positions, self._texts(block), self._vectors_in(block))

    def read(self, positions: Sequence[int]) -> list[ProvenEntry]:
        """The entries at these positions, in that order. Raises WireError if a text can't be read."""
        found: dict[int, ProvenEntry] = {}
        by_block: dict[int, list[int]] = {}
        for position in positions:
            by_block.setdefault(position // BLOCK, []).append(position)
        for block, inside in by_block.items():
            texts, vectors, trees = self._texts(block), self._vectors_in(block), dict[int, MerkleTree]()
            for position in inside:
                part, text, is_gone = (
                    position // _PART,
                    texts[position % BLOCK],
                    bool(self._revoked[position]),
                )
                if part not in trees:
                    near = range(part * _PART, min((part + 1) * _PART, len(self)))
                    trees[part] = MerkleTree(self._leaves_of(near, texts, vectors))
                found[position] = ProvenEntry(
                    Place(self.root, position),
                    self.text_at(position),
                    _parsed(text) if text else None,
                    b"" if is_gone else vectors[position % BLOCK].tobytes(),
                    trees[part].path(position % _PART) + self._top.path(part),
                    self._revoked_hash(position) if is_gone else b"",
                )
        return [found[position] for position in positions]

    def _leaves_of(self, positions: Iterable[int], texts: Sequence[bytes], vectors: Vectors) -> list[bytes]:
        """The leaves of passages in one block, from its texts and vectors."""
        return [self._leaf(at, texts[at % BLOCK], vectors[at % BLOCK]) for at in positions]

    def _vectors_in(self, block: int) -> Vectors:
        return self._vectors[_block_rows(block)]

    def _revoked_hash(self, position: int) -> bytes:
        assert self._ends is not None, "none was revoked"
        hashed: bytes = self._hashes[int(self._ends[position]) - 1].tobytes()
        return hashed

    def _on_disk(self, arrays: Mapping[str, Rows]) -> Self:
        here = copy(self)
        here._vectors = arrays["vectors"]
        # copies, because views would keep the whole file in memory
        here._revoked, here._hashes = self._revoked.copy(), self._hashes.copy()
        return here


class PrimaryShard(Shard):
    """Passages of the cell that is nearest to them."""

    def __init__(self, arrays: Arrays) -> None:
        """See `parse`."""
        offsets = arrays["offsets"].view(np.int64)
        # compared rather than subtracted: differences of a stranger's numbers may overflow
        if offsets[0] != 0 or offsets[-1] != arrays["blocks"].size or (offsets[1:] <= offsets[:-1]).any():
            raise WireError("the shard's blocks are not where they should be")
        self._offsets = offsets
        self._blocks: Rows = arrays["blocks"]
        super().__init__(arrays)

    @classmethod
    def build(cls, passages: Sequence[Passage], vectors: Vectors) -> bytes:
        """Encodes a shard with these passages, in this order; `vectors[i]` belongs to `passages[i]`."""
        assert 1 <= len(passages) == len(vectors) <= MAX_LEAVES, f"a shard of {len(passages)} passages"
        texts = [serialized(passage) for passage in passages]
        blocks = [_deflated(texts[start : start + BLOCK]) for start in range(0, len(texts), BLOCK)]
        return _encoded(vectors, np.zeros(len(texts), np.bool_), [], _packed(blocks))

    @staticmethod
    def _own_forms(arrays: Arrays, leaves: int) -> Forms:
        return {
            "offsets": ((-(-leaves // BLOCK) + 1,), np.int64),
            "blocks": ((_count(arrays, "blocks"),), np.uint8),
        }

    def on_disk(self, file: PlainFile, data: bytes) -> Self:
        arrays = arrays_in(file, data)
        here = self._on_disk(arrays)
        here._blocks, here._offsets = arrays["blocks"], self._offsets.copy()
        return here

    def check(self, revoked: Revoked) -> None:
        gone = revoked.get(self.root, ())
        for block in np.unique(np.flatnonzero(self._revoked) // BLOCK).tolist():
            texts, vectors = self._texts(block), self._vectors_in(block)
            for number in np.flatnonzero(self._revoked[_block_rows(block)]).tolist():
                if texts[number] or vectors[number].any() or block * BLOCK + number not in gone:
                    raise WireError("the shard has no passage that is still valid")

    def text_at(self, position: int) -> Place:
        return Place(self.root, position)

    def passages(self) -> Iterator[Passage | None]:
        """All passages, in order; None for revoked ones. Raises WireError if a text can't be read."""
        for block in range(len(self._offsets) - 1):
            for text in self._texts(block):
                yield _parsed(text) if text else None

    def _named(self, revoked: Revoked) -> NDArray[np.bool_]:
        named = np.zeros(len(self), np.bool_)
        named[list(revoked.get(self.root, ()))] = True
        return named

    def _file(self, vectors: Vectors, revoked: NDArray[np.bool_]) -> bytes:
        blocks, hashes = [], list[bytes]()
        for block in range(len(self._offsets) - 1):
            inside = np.flatnonzero(revoked[_block_rows(block)]).tolist()
            if inside:
                texts = self._texts(block)
                gone = (block * BLOCK + number for number in inside)
                hashes += self._leaves_of(gone, texts, self._vectors_in(block))
                for number in inside:
                    texts[number] = b""
                blocks.append(_deflated(texts))
            else:
                blocks.append(self._block(block))
        return _encoded(vectors, revoked, hashes, _packed(blocks))

    def _leaf(self, position: int, text: bytes, vector: Vectors) -> bytes:
        return (
            self._revoked_hash(position) if self._revoked[position] else _parsed(text).leaf(vector.tobytes())
        )

    def _block(self, block: int) -> bytes:
        data: bytes = self._blocks[int(self._offsets[block]) : int(self._offsets[block + 1])].tobytes()
        return data

    def _texts(self, block: int) -> list[bytes]:
        count = min(BLOCK, len(self) - block * BLOCK)
        inflating = zlib.decompressobj()
        try:
            data = inflating.decompress(self._block(block), count * (_LENGTH_BYTES + _MOST_PASSAGE_BYTES))
        except zlib.error as error:
            raise WireError("a block of the shard can't be inflated") from error
        if not inflating.eof or inflating.unused_data:
            raise WireError("a block of the shard is cut off or too large")
        passages, place = [], 0
        for _ in range(count):
            begin = place + _LENGTH_BYTES
            place = begin + int.from_bytes(data[place:begin], "little")
            passages.append(data[begin:place])
        if place != len(data):
            raise WireError("the passages of a block don't match those of the shard")
        return passages


class SecondaryShard(Shard):
    """Vectors of passages whose texts are in other cells."""

    def __init__(self, arrays: Arrays) -> None:
        """See `parse`."""
        roots, references = arrays["roots"], arrays["references"].view("<u2").astype(np.uint16)
        if not 1 <= len(roots) <= len(references) or references[:, 0].max() >= len(roots):
            raise WireError("the secondary shard's texts are not where they should be")
        self._references = references
        self._roots = [root.tobytes() for root in roots]
        if len(set(self._roots)) < len(self._roots):
            raise WireError("the secondary shard names a shard of texts twice")
        super().__init__(arrays)

    @classmethod
    def build(cls, texts: Sequence[Place], vectors: Vectors) -> bytes:
        """Encodes a shard with these vectors, in this order. `texts`: where the text of each is."""
        assert 1 <= len(texts) == len(vectors) <= MAX_LEAVES, f"a shard of {len(texts)} vectors"
        number_of: dict[bytes, int] = {}
        references = [(number_of.setdefault(text.root, len(number_of)), text.position) for text in texts]
        own = _referring(list(number_of), np.array(references, np.uint16))
        return _encoded(vectors, np.zeros(len(texts), np.bool_), [], own)

    @staticmethod
    def _own_forms(arrays: Arrays, leaves: int) -> Forms:
        return {
            "roots": ((_count(arrays, "roots"), HASH_BYTES), np.uint8),
            "references": ((leaves, 4), np.uint8),
        }

    def on_disk(self, file: PlainFile, data: bytes) -> Self:
        return self._on_disk(arrays_in(file, data))

    def check(self, revoked: Revoked) -> None:
        vectors = self._vectors[:]
        for position in np.flatnonzero(self._revoked):
            text = self.text_at(int(position))
            if vectors[position].any() or text.position not in revoked.get(text.root, ()):
                raise WireError("the shard has no passage that is still valid")

    def text_at(self, position: int) -> Place:
        number, there = self._references[position].tolist()
        return Place(self._roots[number], there)

    def _named(self, revoked: Revoked) -> NDArray[np.bool_]:
        # each pair of numbers is compared as one, because texts may be in thousands of shards
        named = [(n, there) for n, root in enumerate(self._roots) for there in revoked.get(root, ())]
        pairs = np.array(named, np.uint16).reshape(-1, 2)
        return np.isin(self._references.view(np.uint32), pairs.view(np.uint32))[:, 0]

    def _file(self, vectors: Vectors, revoked: NDArray[np.bool_]) -> bytes:
        before = self._vectors[:]
        hashes = [
            self._vector_hash(position, before[position]) for position in np.flatnonzero(revoked).tolist()
        ]
        return _encoded(vectors, revoked, hashes, _referring(self._roots, self._references))

    def _texts(self, block: int) -> list[bytes]:
        return [b""] * min(BLOCK, len(self) - block * BLOCK)

    def _leaf(self, position: int, text: bytes, vector: Vectors) -> bytes:
        return reference_leaf(self.text_at(position), self._vector_hash(position, vector))

    def _vector_hash(self, position: int, vector: Vectors) -> bytes:
        return (
            self._revoked_hash(position)
            if self._revoked[position]
            else hashlib.sha256(vector.tobytes()).digest()
        )


def most_bytes(info: ShardInfo) -> int:
    """The limit for a shard's file after a revocation: it gains hashes, and texts may compress a little less well."""
    return info.size + HASH_BYTES * info.leaves + 64 + (0 if info.is_secondary else info.size // 8)


def _block_rows(block: int) -> slice:
    return slice(block * BLOCK, (block + 1) * BLOCK)


def _count(arrays: Arrays, name: str) -> int:
    """The number of rows of an array that may be missing."""
    array = arrays.get(name)
    return len(array) if array is not None and array.ndim else 0


def _encoded(vectors: Vectors, revoked: NDArray[np.bool_], hashes: Sequence[bytes], own: Arrays) -> bytes:
    """The file. `own`: the arrays that only shards of its kind have."""
    common = {"vectors": vectors, "revoked": revoked.view(np.uint8), "hashes": _joined(hashes)}
    return encode_arrays({**common, **own})


def _packed(blocks: Sequence[bytes]) -> Arrays:
    offsets = np.cumsum([0, *map(len, blocks)], dtype=np.int64)
    return {"offsets": offsets, "blocks": np.frombuffer(b"".join(blocks), np.uint8)}


def _referring(roots: Sequence[bytes], references: NDArray[np.uint16]) -> Arrays:
    return {"roots": _joined(roots), "references": references.astype("<u2").view(np.uint8)}


def _joined(hashes: Sequence[bytes]) -> NDArray[np.uint8]:
    return np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, HASH_BYTES)


def _deflated(passages: Sequence[bytes]) -> bytes:
    return zlib.compress(b"".join(len(data).to_bytes(_LENGTH_BYTES, "little") + data for data in passages), 9)


def serialized(passage: Passage) -> bytes:
    """The passage as it is stored before compression."""
    data: bytes = passage.message().SerializeToString(deterministic=True)
    assert data, "a passage without anything in it"
    return data


def _parsed(data: bytes) -> Passage:
    """Raises WireError, also if the data has more in it than a passage."""
    message = memory_pb2.Passage()
    try:
        message.ParseFromString(data)
    except DecodeError as error:
        raise WireError("a passage of the shard can't be parsed") from error
    passage = Passage.parse(message)
    if not data or passage.message().SerializeToString(deterministic=True) != data:
        raise WireError("a passage in the shard is not in canonical form")
    return passage
