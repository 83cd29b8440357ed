"""A memory on disk, complete or in part: what `talkoot memory build` writes, and what a node keeps of each memory it
hosts.

The folder contains the `manifest`; in `parts/` the encoder and the codebook, named by their SHA-256; and in `shards/`
the shards, named by their roots. Everything read from it is verified: the owner or the disk may have changed it.
"""

import hashlib
import logging
import os
import re
import shutil
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType

from dht.memory import MAX_MANIFEST_BYTES, MemoryManifest, Part, ShardInfo, by_root
from expert_server.memory.shard import Shard, most_bytes
from peer.errors import WireError
from peer.files import PlainFile, sweep, write_atomically
from peer.platform.files import sync_folder
from peer.rpc.parts import check_sha256

logger: logging.Logger = logging.getLogger(__name__)

MANIFEST, PARTS, SHARDS = "manifest", "parts", "shards"
GONE = ".gone"
"""The end of the name of a folder that is being removed."""
_SHARD = re.compile("[0-9a-f]{64}")
"""The name of a shard's file."""


class MemoryStore:
    """The parts of one memory in a folder. Its methods read and write files, so call them off the event loop, one at a
    time.

    The properties may be read at any time.
    """

    def __init__(self, folder: Path, manifest: bytes) -> None:
        """`manifest`: the file's bytes. Raises WireError."""
        self.folder = folder
        self._shards: dict[bytes, Shard] = {}
        self._sizes: dict[bytes, int] = {}
        self._hashes: dict[bytes, tuple[tuple[int, int, int], bytes]] = {}
        """The SHA-256 of each shard's file, with the file's identity."""
        self._set_manifest(manifest)

    @classmethod
    def open(cls, folder: Path) -> "MemoryStore":
        """Reads only the manifest. Raises WireError, and OSError if there is none."""
        return cls(folder, PlainFile(folder / MANIFEST)[: MAX_MANIFEST_BYTES + 1])

    @classmethod
    def create(cls, folder: Path, manifest: bytes) -> "MemoryStore":
        """A new folder, without shards. Raises WireError, and OSError if it can't be written."""
        store = cls(folder, manifest)
        for path in (folder / PARTS, folder / SHARDS):
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_atomically(folder / MANIFEST, manifest)
        sync_folder(folder)
        return store

    @property
    def shards(self) -> Mapping[bytes, Shard]:
        """The verified shards that are served, by root."""
        return MappingProxyType(self._shards)

    def served(self) -> list[ShardInfo]:
        """The manifest's entries for these. Can be read while a revision removes some."""
        infos = self.manifest.by_root
        return [infos[root] for root in list(self._shards) if root in infos]

    @property
    def shard_bytes(self) -> int:
        """The size of the served shards on disk."""
        return sum(self._sizes.values())

    @property
    def nbytes(self) -> int:
        """The size of everything that a host keeps: the manifest, the shards and, from the first shard on, the encoder
        and the codebook.
        """
        return self.part.size + self.shard_bytes + (parts_bytes(self.manifest) if self._shards else 0)

    def roots(self) -> list[bytes]:
        """The shards of the manifest that are on disk."""
        names = set(os.listdir(self.folder / SHARDS))
        return [shard.root for shard in self.manifest.shards if shard.root.hex() in names]

    def sweep(self) -> None:
        """Removes what a killed process left: half-written files, and shards that a revision no longer has. What can't
        be removed stays. Raises OSError if there is no folder of shards.
        """
        for folder in (self.folder, self.folder / PARTS, self.folder / SHARDS):
            sweep(folder)
        kept = {root.hex() for root in self.manifest.by_root}
        for path in (self.folder / SHARDS).iterdir():
            if _SHARD.fullmatch(path.name) and path.name not in kept:
                try:
                    path.unlink()
                except OSError as error:
                    logger.warning("an old shard could not be removed: %s", error)

    def load(self, root: bytes) -> None:
        """Serves a shard that is on disk, without its revoked passages. If the file is not that shard, raises WireError
        and does not serve it. Raises OSError.
        """
        info, revoked, path = self.manifest.by_root[root], self.manifest.revoked_in, self._shard_path(root)
        try:
            file, data = _read(path, info)
            shard = Shard.parse(data, info, self.manifest.dimensions)
            without = shard.without(revoked)
            if without is not None:
                data, shard = without, Shard.parse(without, info, self.manifest.dimensions)
            shard.check(revoked)
            if without is not None:
                # served from memory while another file replaces the old one
                self._shards[root] = shard
                write_atomically(path, data)
                file = PlainFile(path)
        except (WireError, OSError):
            self.stop_serving(root)
            raise
        self._shards[root], self._sizes[root] = shard.on_disk(file, data), file.size

    def verified(self, root: bytes, data: bytes) -> bytes:
        """The file to store for a shard that another peer gave. Raises WireError if it is not that shard."""
        info = self._info(root)
        shard = Shard.parse(data, info, self.manifest.dimensions)
        shard.check(self.manifest.revoked_in)
        kept = shard.without(self.manifest.revoked_in) or data
        if len(kept) > most_bytes(info):
            raise WireError(
                f"the shard has {len(kept)} bytes without its revoked passages, more than {most_bytes(info)}"
            )
        return kept

    def save(self, root: bytes, data: bytes) -> None:
        """Stores and serves a verified shard. If it raises OSError, nothing is stored.

        Raises WireError if a later revision no longer has the shard.
        """
        self._info(root)
        path = self._shard_path(root)
        write_atomically(path, data)
        try:
            self.load(root)
        except WireError as error:  # the disk does not return what was written
            self.drop(root)
            raise OSError(f"{path} has changed since it was written: {error}") from error

    def stop_serving(self, root: bytes) -> None:
        """Stops serving a shard. Its file stays."""
        for kept in (self._shards, self._sizes, self._hashes):
            kept.pop(root, None)

    def drop(self, root: bytes) -> None:
        """Stops serving a shard, and removes its file."""
        self.stop_serving(root)
        with suppress(FileNotFoundError):
            self._shard_path(root).unlink()

    def save_part(self, part: Part, data: bytes) -> None:
        """`data` must be verified. Raises OSError."""
        write_atomically(self._part_path(part.sha256), data)

    def read_part(self, part: Part) -> bytes:
        """The encoder or the codebook. Raises WireError if the file is not that part, and OSError."""
        path = self._part_path(part.sha256)
        if path.stat().st_size != part.size:
            raise WireError(f"{path} does not have {part.size} bytes")
        return check_sha256(part.sha256, path.read_bytes())

    def missing_parts(self) -> list[Part]:
        """The encoder and the codebook, unless they are on disk and intact. Raises OSError."""
        return [part for part in (self.manifest.encoder, self.manifest.codebook) if not self._has_part(part)]

    def follow(self, manifest: bytes) -> None:
        """Updates to a later revision of this memory: removes revoked passages, and shards that it no longer has.

        A shard that can't be updated is no longer served. Raises WireError if the manifest is not a later revision, and
        OSError if a file can't be written.
        """
        new, old = MemoryManifest.parse(manifest), self.manifest
        if new.name != old.name or new.revision <= old.revision:
            raise WireError(
                f"revision {new.revision} of {new.name!r} can't follow revision {old.revision} of {old.name!r}"
            )
        if new.index != old.index:
            raise WireError(
                "the revision has another encoder or other cells, so that shards could no longer be found"
            )
        write_atomically(self.folder / MANIFEST, manifest)
        self._set_manifest(manifest)
        gone, failure = by_root(new.revoked - old.revoked), None
        for root in old.by_root:
            shard = self._shards.get(root)
            # whatever can't be written or removed, nothing revoked stays in other shards
            try:
                if root not in new.by_root:
                    self.drop(root)
                elif shard is not None and shard.has_any(gone):
                    self._revoke(root)
            except OSError as error:
                failure = error
        if failure is not None:
            raise failure

    def _revoke(self, root: bytes) -> None:
        """Removes revoked passages from a served shard, which is no longer served if that fails. Raises OSError."""
        try:
            self.load(root)
        except WireError as error:
            self.drop(root)
            logger.warning("a shard of memory %s is no longer served: %s", self.manifest.name, error)

    def file(self, name: bytes) -> tuple[PlainFile, bytes]:
        """The file that others fetch by that name, and its SHA-256. Raises FileNotFoundError if it is not
        served here.
        """
        if name in self._shards:
            path = self._shard_path(name)
        elif name == self.part.sha256:
            path = self.folder / MANIFEST
        elif name in (self.manifest.encoder.sha256, self.manifest.codebook.sha256):
            path = self._part_path(name)
        else:
            raise FileNotFoundError(name.hex())
        file = PlainFile(path)
        if path.parent.name != SHARDS:
            return file, name
        known, sha256 = self._hashes.get(name, (None, b""))
        if known != file.identity:  # the file has changed, because a passage in it was revoked
            sha256 = hashlib.sha256(file[:]).digest()
            self._hashes[name] = file.identity, sha256
        return file, sha256

    def remove(self) -> None:
        """Removes the whole folder. Raises OSError."""
        self._shards.clear()
        self._sizes.clear()
        # renamed first, so that the rest can be told from a memory if this process is killed
        gone = self.folder.with_name(f".{self.folder.name}{GONE}")
        with suppress(FileNotFoundError):
            shutil.rmtree(gone)
        self.folder.rename(gone)
        shutil.rmtree(gone)

    def _set_manifest(self, data: bytes) -> None:
        self.manifest: MemoryManifest = MemoryManifest.parse(data)
        self.part: Part = Part(hashlib.sha256(data).digest(), len(data))
        """The manifest itself, as a part."""

    def _info(self, root: bytes) -> ShardInfo:
        """Raises WireError."""
        info = self.manifest.by_root.get(root)
        if info is None:
            raise WireError("this revision of the memory has no such shard")
        return info

    def _has_part(self, part: Part) -> bool:
        try:
            self.read_part(part)
        except (FileNotFoundError, WireError):
            return False
        return True

    def _shard_path(self, root: bytes) -> Path:
        return self.folder / SHARDS / root.hex()

    def _part_path(self, sha256: bytes) -> Path:
        return self.folder / PARTS / sha256.hex()


def parts_bytes(manifest: MemoryManifest) -> int:
    """The size of the encoder and the codebook."""
    return manifest.encoder.size + manifest.codebook.size


def _read(path: Path, info: ShardInfo) -> tuple[PlainFile, bytes]:
    """A shard's file and its content. Raises WireError and OSError."""
    about = path.lstat()
    if not stat.S_ISREG(about.st_mode):
        raise WireError("the shard is not a file")
    if not 0 < about.st_size <= most_bytes(info):
        raise WireError(f"the shard has {about.st_size} bytes, more than {most_bytes(info)}")
    file = PlainFile(path)
    return file, file[: most_bytes(info)]
