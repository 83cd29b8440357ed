"""What a memory is: passages and their hashes, the manifest that lists its shards, and its name in the DHT.

A passage lies in two cells. Its text is in a primary shard of the first. A secondary shard of the second has its
vector, and says where the text is.

A memory's manifest is named by its SHA-256, which its publisher signs in the DHT. It names everything else by hash, so
every part may be fetched from any peer.
"""

import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError

from dht.uid import coordinate_of, number_of
from peer.errors import WireError
from peer.formatting import printable
from peer.identity import PeerID
from peer.merkle import HASH_BYTES, leaf_hash, proves
from peer.parsing import has_few_parts
from peer.wire import memory_pb2

Cell = tuple[int, ...]
"""A coordinate of a memory's grid."""
Vectors = npt.NDArray[np.int8]
"""One vector in each row: (N, D)."""

FORMAT = 1
MAX_MANIFEST_BYTES = 16 * 2**20
MAX_SHARD_BYTES = 8 * 2**20
MAX_SHARDS = 131_072
MAX_SHARDS_OF_REGION = 1024
"""The most shards of a region: as many as a host can announce in one record."""
SHORT_ROOT_BYTES = 8
"""The length of a shard's root in hosts' announcements."""
MAX_LEAVES = 65_536
"""The most passages in one shard."""
MAX_CELLS = 32_768
MAX_REVOKED = 65_536
MAX_LICENSES = 256
MAX_DIMENSIONS = 1024
MAX_ENCODER_BYTES = 128 * 2**20
MAX_CODEBOOK_BYTES = 64 * 2**20
MAX_TEXT_CHARACTERS = 8192
"""The most characters in one passage."""
MAX_LABEL_CHARACTERS = 256
"""The most characters in a title, in a source, or in a line about a memory."""
MAX_LICENSE_CHARACTERS = 64
MAX_LEVELS = 4
"""The most levels of a grid."""
MAX_QUERIES, MAX_SEARCHED, MAX_K = 256, 256, 128
"""Limits of one search: queries, shards, and passages for each query."""
MAX_SCORES = 2**26
"""The most inner products in one search: about a second on one core, with 256 dimensions."""
MAX_READ = 64
"""The most passages in one call: of any length, they fit into a message."""
_CELLS_OF_REGION, _FEWEST_REGIONS = 16, 16
"""How many cells a region has at most, and how many regions a memory has at least, if it has as many cells."""
_LARGEST_GRID = 4096
"""The most branches at one level."""
_NAME_PATTERN = re.compile(r"[a-z0-9][a-z0-9-]{0,22}[a-z0-9]")
_SUFFIX_CHARACTERS = 12
_KIND_PATTERN = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")
_LATEST = 2.0**37
"""The latest time of a manifest: in the year 6325. Python can't show a time after the year 9999 as a date."""
_MAX_FIELDS = MAX_SHARDS + MAX_REVOKED + MAX_LICENSES + 2**10
"""The most fields of a manifest that is parsed."""
_LEAF_DOMAIN, _REFERENCE_DOMAIN = b"talkoot passage v1\0", b"talkoot reference v1\0"


@dataclass(frozen=True)
class MemoryID:
    """A memory's name and its publisher's suffix. If two publishers use the same name, their memories have different
    ids.
    """

    name: str
    publisher: str
    """The last characters of the publisher's PeerID. It is infeasible to find a second key with the same 70 bits."""

    @classmethod
    def of(cls, name: str, publisher: PeerID) -> Self:
        """Raises WireError if the name is not valid for a memory."""
        return cls(check_name(name), publisher.to_base58()[-_SUFFIX_CHARACTERS:])

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises WireError."""
        name, _, publisher = text.rpartition("-")
        if len(publisher) != _SUFFIX_CHARACTERS or not publisher.isalnum() or not publisher.isascii():
            raise WireError(f"not a memory's id: {text[:80]!r}")
        return cls(check_name(name), publisher)

    def __str__(self) -> str:
        return f"{self.name}-{self.publisher}"


def check_name(name: str) -> str:
    """Returns the name. Raises WireError if it is not valid for a memory."""
    if not _NAME_PATTERN.fullmatch(name):
        raise WireError(
            f"{name[:80]!r} is not a name for a memory: 2 to 24 small letters, digits and hyphens, such as python-docs"
        )
    return name


@dataclass(frozen=True)
class Passage:
    """A stretch of text, about 100 words, and where it comes from."""

    text: str
    title: str
    source: str
    """The file name, without folders."""
    offset: int
    """Where it begins in the file, in characters."""
    license: str

    @classmethod
    def parse(cls, message: memory_pb2.Passage) -> Self:
        """Raises WireError if it is longer than allowed."""
        if (
            len(message.text) > MAX_TEXT_CHARACTERS
            or max(len(message.title), len(message.source)) > MAX_LABEL_CHARACTERS
            or len(message.license) > MAX_LICENSE_CHARACTERS
        ):
            raise WireError("the passage is too long")
        return cls(message.text, message.title, message.source, message.offset, message.license)

    def message(self) -> memory_pb2.Passage:
        return memory_pb2.Passage(
            text=self.text, title=self.title, source=self.source, offset=self.offset, license=self.license
        )

    def leaf(self, vector: bytes) -> bytes:
        """The hash of this passage with this vector: a leaf in its shard's Merkle tree."""
        hashed = hashlib.sha256(_LEAF_DOMAIN)
        for field in (self.title, self.source, str(self.offset), self.license, self.text):
            data = field.encode()
            hashed.update(len(data).to_bytes(4, "little") + data)
        return leaf_hash(hashed.digest(), vector)


class Place(NamedTuple):
    """A leaf of a shard."""

    root: bytes
    """The shard's root."""
    position: int


def reference_leaf(text: Place, vector_hash: bytes) -> bytes:
    """The leaf in a secondary shard for a passage whose text is at that place. `vector_hash`: SHA-256."""
    return leaf_hash(_REFERENCE_DOMAIN, text.root, text.position.to_bytes(4, "little"), vector_hash)


@dataclass(frozen=True)
class ShardInfo:
    """One shard, as a memory's manifest lists it."""

    cell: Cell
    root: bytes
    leaves: int
    size: int
    """The size of the file as its publisher wrote it, in bytes."""
    is_secondary: bool = False

    @property
    def short(self) -> bytes:
        """The short form in which hosts announce it."""
        return self.root[:SHORT_ROOT_BYTES]


@dataclass(frozen=True)
class Part:
    """A file of a memory, by its SHA-256."""

    sha256: bytes
    size: int
    """The size in bytes."""


@dataclass(frozen=True)
class MemoryManifest:
    """One revision of a memory."""

    name: str
    revision: int
    about: str
    created_at: float
    encoder_kind: str
    encoder: Part
    dimensions: int
    codebook: Part
    grid: tuple[int, ...]
    licenses: tuple[str, ...]
    shards: tuple[ShardInfo, ...]
    revoked: frozenset[Place]
    """Revoked places in primary shards."""

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Slow if there are many shards. Raises WireError."""
        if len(data) > MAX_MANIFEST_BYTES:
            raise WireError(f"the memory's manifest has {len(data)} bytes, more than {MAX_MANIFEST_BYTES}")
        # millions of empty fields would fit into it, and each takes thirty times its size once it is parsed
        if not has_few_parts(data, memory_pb2.MemoryManifest.DESCRIPTOR, _MAX_FIELDS):
            raise WireError(f"the memory's manifest is broken, or has more than {_MAX_FIELDS} fields")
        message = memory_pb2.MemoryManifest()
        try:
            message.ParseFromString(data)
        except DecodeError as error:
            raise WireError("the memory's manifest can't be parsed") from error
        if message.format != FORMAT:
            raise WireError(
                f"the memory has format {message.format}, but this Talkoot reads format {FORMAT}: update the older side"
            )
        grid = check_grid(message.grid)
        if not 1 <= message.dimensions <= MAX_DIMENSIONS:
            raise WireError(f"the memory's vectors can't have {message.dimensions} numbers")
        if not _KIND_PATTERN.fullmatch(message.encoder_kind):
            raise WireError("the memory's encoder has no kind")
        if len(message.licenses) > MAX_LICENSES or any(
            len(text) > MAX_LICENSE_CHARACTERS for text in message.licenses
        ):
            raise WireError("the memory has too many licences")
        if not message.shards:
            raise WireError("the memory has no shards")
        revoked = sum(len(some.positions) for some in message.revoked)
        if len(message.shards) > MAX_SHARDS or max(revoked, len(message.revoked)) > MAX_REVOKED:
            raise WireError("the memory has too many shards or revoked passages")
        if not 0 <= message.created_at <= _LATEST or message.revision < 1:
            raise WireError("the memory's manifest has no revision or no time")
        shards = tuple(_shard(entry, grid) for entry in message.shards)
        kinds = {(shard.root, shard.leaves, shard.size, shard.is_secondary) for shard in shards}
        # otherwise a reader would think that an honest host's positions are wrong
        if len(kinds) > len({shard.root for shard in shards}):
            raise WireError("the memory lists a shard with two sizes or kinds")
        manifest = cls(
            check_name(message.name),
            message.revision,
            printable(message.about, MAX_LABEL_CHARACTERS),
            message.created_at,
            message.encoder_kind,
            _part(message.encoder_sha256, message.encoder_bytes, MAX_ENCODER_BYTES),
            message.dimensions,
            _part(message.codebook_sha256, message.codebook_bytes, MAX_CODEBOOK_BYTES),
            grid,
            tuple(printable(text, MAX_LICENSE_CHARACTERS) for text in message.licenses),
            shards,
            frozenset(place for some in message.revoked for place in _revoked(some, shards)),
        )
        # now, in the caller's thread: it takes long if there are many shards
        _ = manifest.by_root, manifest.by_cell, manifest.region_of
        return manifest

    def serialize(self) -> bytes:
        """The same manifest always gives the same bytes."""
        message = memory_pb2.MemoryManifest(
            format=FORMAT,
            name=self.name,
            revision=self.revision,
            about=self.about,
            created_at=self.created_at,
            encoder_kind=self.encoder_kind,
            encoder_sha256=self.encoder.sha256,
            encoder_bytes=self.encoder.size,
            dimensions=self.dimensions,
            codebook_sha256=self.codebook.sha256,
            codebook_bytes=self.codebook.size,
            grid=self.grid,
            licenses=self.licenses,
            shards=[
                memory_pb2.ShardEntry(
                    cell=number_of(shard.cell, self.grid),
                    root=shard.root,
                    leaves=shard.leaves,
                    size=shard.size,
                    secondary=shard.is_secondary,
                )
                for shard in self.shards
            ],
            revoked=[
                memory_pb2.RevokedPassages(shard=number, positions=sorted(positions))
                for number, shard in enumerate(self.shards)
                if (positions := self.revoked_in.get(shard.root))
            ],
        )
        return message.SerializeToString(deterministic=True)

    @property
    def index(self) -> tuple[object, ...]:
        """What must be equal in all revisions of a memory. If it changed, older shards could no longer be found."""
        return self.encoder_kind, self.encoder, self.dimensions, self.codebook, self.grid

    @cached_property
    def by_root(self) -> Mapping[bytes, ShardInfo]:
        return {shard.root: shard for shard in self.shards}

    @cached_property
    def by_cell(self) -> Mapping[Cell, tuple[ShardInfo, ...]]:
        found: dict[Cell, list[ShardInfo]] = {}
        for shard in self.shards:
            found.setdefault(shard.cell, []).append(shard)
        return {cell: tuple(shards) for cell, shards in found.items()}

    @cached_property
    def by_region(self) -> Mapping[int, tuple[ShardInfo, ...]]:
        """The shards that hosts announce together, by the number of their region.

        A region is up to 16 cells, one after another in row-major order: cells near each other tend to be in the same
        one. When it is full, further shards of these cells are in another one, whose number is the next after all
        others. Later revisions add shards at the end, so the shards before stay in their regions.
        """
        cells, numbers = _cells_of_region(self.grid), count(region_count(self.grid))
        latest: dict[int, int] = {}
        found: dict[int, list[ShardInfo]] = {}
        for shard in self.shards:
            first = number_of(shard.cell, self.grid) // cells
            region = latest.setdefault(first, first)
            if len(found.get(region, ())) == MAX_SHARDS_OF_REGION:
                region = latest[first] = next(numbers)
            found.setdefault(region, []).append(shard)
        return {region: tuple(shards) for region, shards in found.items()}

    @cached_property
    def region_of(self) -> Mapping[ShardInfo, int]:
        """The number of each shard's region."""
        return {shard: region for region, shards in self.by_region.items() for shard in shards}

    @cached_property
    def revoked_in(self) -> Mapping[bytes, frozenset[int]]:
        """The revoked positions, by the roots of primary shards."""
        return by_root(self.revoked)

    @property
    def passages(self) -> int:
        """The number of passages that were not revoked."""
        return sum(shard.leaves for shard in self.shards if not shard.is_secondary) - len(self.revoked)

    @property
    def shard_bytes(self) -> int:
        """The size of all shards."""
        return sum(shard.size for shard in self.shards)

    def has_text_at(self, place: Place) -> bool:
        """Whether the place has, or had before it was revoked, a passage's text."""
        info = self.by_root.get(place.root)
        return info is not None and not info.is_secondary and place.position < info.leaves


def by_root(places: Iterable[Place]) -> dict[bytes, frozenset[int]]:
    """The positions in each shard, by its root."""
    found: dict[bytes, set[int]] = {}
    for place in places:
        found.setdefault(place.root, set()).add(place.position)
    return {root: frozenset(positions) for root, positions in found.items()}


@dataclass(frozen=True)
class Proof:
    """What has been proven about one leaf of a shard."""

    text: Place
    """Where the passage's text is: at this leaf, or in another shard if this one is secondary."""
    passage: Passage | None
    """None if it was revoked, or if the shard is a secondary one."""
    vector: bytes
    leaf: bytes
    is_revoked: bool


def prove(message: memory_pb2.ProvenPassage, info: ShardInfo) -> Proof:
    """Raises WireError unless the shard has that leaf at that position."""
    hashes = message.path  # once, because reading it copies it
    if len(hashes) > HASH_BYTES * info.leaves.bit_length():
        raise WireError("the passage's proof is too long for its shard")
    path = [hashes[at : at + HASH_BYTES] for at in range(0, len(hashes), HASH_BYTES)]
    passage = Passage.parse(message.passage) if message.HasField("passage") else None
    if info.is_secondary:
        passage, text = None, Place(_hash(message.text_root), message.text_position)
        is_revoked = not message.vector
        hashed = message.hash if is_revoked else hashlib.sha256(message.vector).digest()
        leaf = reference_leaf(text, hashed)
    else:
        text, is_revoked = Place(info.root, message.position), passage is None
        leaf = message.hash if passage is None else passage.leaf(message.vector)
    if not proves(info.root, leaf, message.position, info.leaves, path):
        raise WireError("the passage is not in its shard: its text, vector or proof is forged")
    return Proof(text, passage, message.vector, leaf, is_revoked)


def check_grid(sizes: Sequence[int]) -> tuple[int, ...]:
    """Returns the grid. Raises WireError if it is not valid for a memory."""
    grid = tuple(sizes[: MAX_LEVELS + 1])
    if not 1 <= len(grid) <= MAX_LEVELS or not all(1 <= size <= _LARGEST_GRID for size in grid):
        raise WireError(f"the memory's grid {grid} is not valid")
    if math.prod(grid) > MAX_CELLS:
        raise WireError(f"the memory's grid has {math.prod(grid)} cells, more than {MAX_CELLS}")
    return grid


def region_count(grid: Sequence[int], shards: int = 0) -> int:
    """The most regions that a memory with so many shards has; without any, how many it has if none is full."""
    return math.ceil(math.prod(grid) / _cells_of_region(grid)) + shards // MAX_SHARDS_OF_REGION


def _cells_of_region(grid: Sequence[int]) -> int:
    return max(1, min(_CELLS_OF_REGION, math.prod(grid) // _FEWEST_REGIONS))


def _part(sha256: bytes, size: int, most: int) -> Part:
    if not 0 < size <= most:
        raise WireError(f"a part of a memory has {size} bytes; at most {most} are allowed")
    return Part(_hash(sha256), size)


def _hash(data: bytes) -> bytes:
    if len(data) != HASH_BYTES:
        raise WireError(f"a hash has {len(data)} bytes")
    return data


def _shard(entry: memory_pb2.ShardEntry, grid: tuple[int, ...]) -> ShardInfo:
    if (
        entry.cell >= math.prod(grid)
        or not 1 <= entry.leaves <= MAX_LEAVES
        or not 0 < entry.size <= MAX_SHARD_BYTES
    ):
        raise WireError("the shard can't be in any memory")
    return ShardInfo(
        coordinate_of(entry.cell, grid), _hash(entry.root), entry.leaves, entry.size, entry.secondary
    )


def _revoked(message: memory_pb2.RevokedPassages, shards: Sequence[ShardInfo]) -> Iterator[Place]:
    if message.shard >= len(shards) or shards[message.shard].is_secondary:
        raise WireError("a shard without texts lists revoked passages")
    shard = shards[message.shard]
    for position in message.positions:
        if position >= shard.leaves:
            raise WireError(f"a revoked passage is beyond the last one, which is number {shard.leaves - 1}")
        yield Place(shard.root, position)
