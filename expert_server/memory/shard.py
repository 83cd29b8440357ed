"""One shard of a memory as a file: vectors to search, texts to read, and the leaf hashes that prove both.

The file is a safetensors file: `vectors` (N, D), `leaves` (N, 32), `revoked` (N,), and `blocks`, the texts of 64
passages each in zlib's format, with their `offsets`. Reading a passage inflates one block.

A revoked passage keeps its place and its leaf hash, so that the root stays; its text and vector are gone.
"""

import zlib
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import cache
from typing import Self, TypeAlias

import numpy as np
import torch
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from dht.memory import (
    MAX_LABEL_CHARACTERS,
    MAX_LEAVES,
    MAX_LICENSE_CHARACTERS,
    MAX_TEXT_CHARACTERS,
    Passage,
    ShardInfo,
)
from peer.arrays import decode_arrays, encode_arrays
from peer.errors import WireError
from peer.merkle import HASH_BYTES, MerkleTree
from peer.wire import memory_pb2

Vectors: TypeAlias = NDArray[np.int8]
"""One in each row. (N, D)"""

BLOCK = 64
"""Passages whose texts are compressed together, and leaves whose part of the tree is computed when one is proven."""
_LENGTH_BYTES = 4
"""Before each passage in an inflated block."""
_MOST_PASSAGE_BYTES = 4 * (MAX_TEXT_CHARACTERS + 2 * MAX_LABEL_CHARACTERS + MAX_LICENSE_CHARACTERS) + 64
"""Of a serialized passage: its fields in UTF-8, and what protobuf adds."""
MOST_PRODUCTS = 2**22
"""Computed at once: 16 MiB."""
NO_SCORE = -(2**31)
"""Of revoked passages."""
_FEWEST_DIMENSIONS = 16
"""That torch's product of bytes is used for: with one, its answer is wrong."""
_ROWS = 1024
"""Vectors at a time, which stay in the processor's cache until they are multiplied."""


@dataclass(frozen=True)
class ProvenPassage:
    """A passage, and what shows that it is in its shard."""

    passage: Passage | None
    """None: it was revoked."""
    vector: bytes
    path: list[bytes]


class Shard:
    """An immutable view of a shard's file. Its methods may be called from several threads."""

    def __init__(
        self,
        vectors: Vectors,
        leaves: NDArray[np.uint8],
        revoked: NDArray[np.bool_],
        offsets: NDArray[np.int64],
        blocks: NDArray[np.uint8],
    ) -> None:
        """See `parse`."""
        self._vectors, self._leaves, self._revoked = vectors, leaves, revoked
        self._offsets, self._blocks = offsets, blocks
        self.live = len(leaves) - int(revoked.sum())
        """Passages that were not revoked."""
        # the roots of whole, aligned parts of a tree are a level of that tree
        self._top = MerkleTree([self._tree(block).root for block in range(len(offsets) - 1)])

    @classmethod
    def build(cls, passages: Sequence[Passage], vectors: Vectors) -> bytes:
        """The file of a shard with these passages, in their order; `vectors[i]` is that of `passages[i]`."""
        assert 1 <= len(passages) == len(vectors) <= MAX_LEAVES, f"a shard of {len(passages)} passages"
        texts = [_serialized(passage) for passage in passages]
        leaves = [passage.leaf(vector.tobytes()) for passage, vector in zip(passages, vectors, strict=True)]
        blocks = [_deflated(texts[start : start + BLOCK]) for start in range(0, len(texts), BLOCK)]
        return _file(vectors, leaves, np.zeros(len(leaves), np.bool_), blocks)

    @staticmethod
    def root_of(data: bytes) -> bytes:
        """The Merkle root of a file that `build` made, which names the shard."""
        return MerkleTree([leaf.tobytes() for leaf in decode_arrays(data)["leaves"]]).root

    @classmethod
    def parse(cls, data: bytes | memoryview, info: ShardInfo, dimensions: int) -> Self:
        """Raises WireError if this is no file of that shard. Texts and vectors are not checked: see `check`."""
        if len(data) > most_bytes(info):
            raise WireError(f"a shard of {len(data)} bytes; at most {most_bytes(info)}")
        arrays = decode_arrays(data)
        blocks = -(-info.leaves // BLOCK)
        forms = {
            "vectors": ((info.leaves, dimensions), np.int8),
            "leaves": ((info.leaves, HASH_BYTES), np.uint8),
            "revoked": ((info.leaves,), np.uint8),
            "offsets": ((blocks + 1,), np.int64),
            "blocks": ((arrays["blocks"].size if "blocks" in arrays else 0,), np.uint8),
        }
        if {name: (array.shape, array.dtype.type) for name, array in arrays.items()} != forms:
            raise WireError("not the file of such a shard")
        offsets, revoked = arrays["offsets"], arrays["revoked"]
        # by comparison: differences of a stranger's numbers may overflow
        if (
            offsets[0] != 0
            or offsets[-1] != arrays["blocks"].size
            or (offsets[1:] <= offsets[:-1]).any()
            or (revoked > 1).any()
        ):
            raise WireError("a shard whose blocks are not where they should be")
        shard = cls(arrays["vectors"], arrays["leaves"], revoked.view(np.bool_), offsets, arrays["blocks"])
        if shard._top.root != info.root:
            raise WireError("a shard of other passages than its root says")
        return shard

    def __len__(self) -> int:
        return len(self._leaves)

    def check(self, revoked: AbstractSet[bytes]) -> None:
        """Raises WireError unless each text and vector gives its leaf, or is gone and its leaf is among `revoked`."""
        position = 0
        for block in range(len(self._offsets) - 1):
            for data in self._inflated(block):
                vector = self._vectors[position].tobytes()
                if self._revoked[position]:
                    if data or any(vector) or self.leaf(position) not in revoked:
                        raise WireError("a shard without a passage that was not revoked")
                elif _parsed(data).leaf(vector) != self.leaf(position):
                    raise WireError("a shard with another passage than its leaf says")
                position += 1

    def search(self, queries: Vectors, k: int) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """The positions and scores of the `k` passages with the largest inner products, best first. Both (Q, k).

        Fewer than k if there are fewer that were not revoked. Of equal scores, the first positions.
        """
        _, positions, scores = search_together([self], queries, k)
        return positions, scores

    def products(self, queries: Vectors) -> NDArray[np.int32]:
        """The inner products with all passages, and the least number of all with revoked ones. (Q, N)"""
        products = np.empty((len(queries), len(self)), np.int32)
        for start in range(0, len(self), _ROWS):
            rows = self._vectors[start : start + _ROWS]
            products[:, start : start + _ROWS] = _inner_products(queries, rows)
        if self.live < len(self):
            products[:, self._revoked] = NO_SCORE
        return products

    def leaf(self, position: int) -> bytes:
        """A passage's leaf hash."""
        leaf: bytes = self._leaves[position].tobytes()
        return leaf

    def read(self, positions: Sequence[int]) -> list[ProvenPassage]:
        """The passages there, in that order. Raises WireError if a text can't be read."""
        found: dict[int, ProvenPassage] = {}
        by_block: dict[int, list[int]] = {}
        for position in positions:
            by_block.setdefault(position // BLOCK, []).append(position)
        for block, inside in by_block.items():
            texts, tree, above = self._inflated(block), self._tree(block), self._top.path(block)
            for position in inside:
                found[position] = ProvenPassage(
                    None if self._revoked[position] else _parsed(texts[position % BLOCK]),
                    self._vectors[position].tobytes(),
                    tree.path(position % BLOCK) + above,
                )
        return [found[position] for position in positions]

    def passages(self) -> Iterator[Passage | None]:
        """All, in order; None for those that were revoked. Raises WireError if a text can't be read."""
        for start in range(0, len(self), BLOCK):
            for proven in self.read(range(start, min(start + BLOCK, len(self)))):
                yield proven.passage

    def without(self, revoked: AbstractSet[bytes]) -> bytes | None:
        """The file without the texts and vectors of these leaves. None: it is so already.

        Raises WireError if a text can't be read.
        """
        gone = np.array([self.leaf(position) in revoked for position in range(len(self))])
        if not (gone & ~self._revoked).any():
            return None
        vectors, blocks = self._vectors.copy(), []
        vectors[gone] = 0
        for block in range(len(self._offsets) - 1):
            inside = gone[block * BLOCK : (block + 1) * BLOCK]
            if inside.any():
                texts = [
                    b"" if is_gone else data
                    for data, is_gone in zip(self._inflated(block), inside, strict=True)
                ]
                blocks.append(_deflated(texts))
            else:
                blocks.append(self._block(block))
        leaves = [self.leaf(position) for position in range(len(self))]
        return _file(vectors, leaves, gone | self._revoked, blocks)

    def _tree(self, block: int) -> MerkleTree:
        """Over the leaves of one block."""
        hashes = self._leaves[block * BLOCK : (block + 1) * BLOCK].tobytes()
        return MerkleTree([hashes[i : i + HASH_BYTES] for i in range(0, len(hashes), HASH_BYTES)])

    def _block(self, block: int) -> bytes:
        data: bytes = self._blocks[self._offsets[block] : self._offsets[block + 1]].tobytes()
        return data

    def _inflated(self, block: int) -> list[bytes]:
        """The serialized passages of a block. Raises WireError."""
        count = min(BLOCK, len(self) - block * BLOCK)
        inflating = zlib.decompressobj()
        try:
            data = inflating.decompress(self._block(block), count * (_LENGTH_BYTES + _MOST_PASSAGE_BYTES))
        except zlib.error as error:
            raise WireError("a shard with a block that can't be inflated") from error
        if not inflating.eof or inflating.unused_data:
            raise WireError("a shard with a block that is not whole, or too large")
        passages, place = [], 0
        for _ in range(count):
            begin = place + _LENGTH_BYTES
            place = begin + int.from_bytes(data[place:begin], "little")
            passages.append(data[begin:place])
        if place != len(data):
            raise WireError("a shard with a block of other passages than it has")
        return passages


def most_bytes(info: ShardInfo) -> int:
    """Of a shard's file: texts may be compressed a little less well where some were revoked."""
    return info.size + info.size // 8


def _file(
    vectors: Vectors, leaves: Sequence[bytes], revoked: NDArray[np.bool_], blocks: Sequence[bytes]
) -> bytes:
    return encode_arrays(
        {
            "vectors": vectors,
            "leaves": np.frombuffer(b"".join(leaves), np.uint8).reshape(-1, HASH_BYTES),
            "revoked": revoked.view(np.uint8),
            "offsets": np.cumsum([0, *map(len, blocks)], dtype=np.int64),
            "blocks": np.frombuffer(b"".join(blocks), np.uint8),
        }
    )


def _deflated(passages: Sequence[bytes]) -> bytes:
    return zlib.compress(b"".join(len(data).to_bytes(_LENGTH_BYTES, "little") + data for data in passages), 9)


def _serialized(passage: Passage) -> bytes:
    data: bytes = passage.message().SerializeToString(deterministic=True)
    assert data, "a passage without anything in it"
    return data


def _parsed(data: bytes) -> Passage:
    """Raises WireError, also if there is more in it than a passage."""
    message = memory_pb2.Passage()
    try:
        message.ParseFromString(data)
    except DecodeError as error:
        raise WireError("a shard with a passage that can't be parsed") from error
    passage = Passage.parse(message)
    if not data or passage.message().SerializeToString(deterministic=True) != data:
        raise WireError("a shard with a passage in another form than it is written in")
    return passage


def search_together(
    shards: Sequence[Shard], queries: Vectors, k: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int32]]:
    """The best passages over some shards: which of these, the positions there, and the scores. All (Q, k).

    Fewer than k if there are fewer that were not revoked. Of equal scores, those of the first shards and positions.
    """
    ends = np.cumsum([len(shard) for shard in shards])
    k = min(k, sum(shard.live for shard in shards))
    places, scores = np.empty((len(queries), k), np.int64), np.empty((len(queries), k), np.int32)
    step = max(1, MOST_PRODUCTS // int(ends[-1]))
    for start in range(0, len(queries), step) if k else ():
        some = queries[start : start + step]
        for row, found in enumerate(
            np.concatenate([shard.products(some) for shard in shards], axis=1), start
        ):
            places[row] = best = _largest(found, k)
            scores[row] = found[best]
    numbers = np.searchsorted(ends, places, side="right")
    begins = ends - [len(shard) for shard in shards]
    return numbers, places - begins[numbers], scores


def _inner_products(queries: Vectors, rows: Vectors) -> NDArray[np.int32]:
    """All pairs. (Q, N)"""
    # copies, for torch warns of arrays that are not writable, as those in a file are
    left, right = torch.from_numpy(queries.copy()), torch.from_numpy(rows.copy()).T
    if queries.shape[1] >= _FEWEST_DIMENSIONS and _multiplies_bytes_exactly():
        whole: NDArray[np.int32] = torch._int_mm(left, right).numpy()
        return whole
    # sums of up to 1024 products of signed bytes are whole numbers up to 2^24, which float32 holds exactly
    return (left.float() @ right.float()).to(torch.int32).numpy()


@cache
def _multiplies_bytes_exactly() -> bool:
    """Whether torch does here, which is several times as fast: without instructions for it, sums may saturate."""
    rng = np.random.default_rng(0)
    for queries, dimensions in ((1, 256), (5, 1024), (64, 250)):
        rows = rng.integers(-128, 128, (queries + 66, dimensions), np.int8)
        # the last is the only query of the first round, and the one most likely to saturate
        rows[-4:] = np.array([[0], [-128], [-127], [127]], np.int8)
        left, right = torch.from_numpy(rows[-queries:]), torch.from_numpy(rows)
        try:
            found = torch._int_mm(left, right.T)
        except (AttributeError, RuntimeError):
            return False
        if not torch.equal(found.long(), left.long() @ right.long().T):
            return False
    return True


def _largest(scores: NDArray[np.int32], k: int) -> NDArray[np.int64]:
    """The positions of the k largest, in falling order; of equal ones, the first."""
    least = np.partition(scores, len(scores) - k)[len(scores) - k]
    above, equal = np.flatnonzero(scores > least), np.flatnonzero(scores == least)
    best = np.concatenate((above, equal[: k - len(above)]))
    return best[np.argsort(-scores[best], kind="stable")]
