"""`talkoot memory build`: makes a memory from text, in a folder that can be published as it is."""

import hashlib
import logging
import math
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from dht.memory import (
    MAX_ENCODER_BYTES,
    MAX_LABEL_CHARACTERS,
    MAX_LICENSE_CHARACTERS,
    MAX_LICENSES,
    MemoryManifest,
    Part,
    Passage,
    ShardInfo,
    Vectors,
    check_name,
)
from expert_server.memory.shard import PrimaryShard
from expert_server.memory.store import MANIFEST, PARTS, SHARDS, MemoryStore
from peer.codec import Booleans, Integers
from peer.errors import DataError, LibraryError, SettingsError, WireError
from peer.files import write_atomically
from peer.formatting import bytes_in_words, counted, printable
from peer.platform.files import open_plainly, sync_folder
from talkoot.memory.clustering import build_codebook, grid_for, two_cells
from talkoot.memory.passages import UNKNOWN_LICENSE, PassageFile, read_passages
from talkoot.memory.replication import sizes_in_words
from talkoot.memory.shards import write_shards
from talkoot.memory.training import WordCounter, train_static_encoder
from talkoot.partial import LOCK, PartialFolder, naming_failures
from talkoot.progress import Progress, Rate, Show
from talkoot.terminal import Terminal
from trainer_client.data.sources import find_files, unread_files
from trainer_client.memory.codebook import Codebook
from trainer_client.memory.encoder import (
    DUAL,
    STATIC,
    DualEncoder,
    Encoder,
    StaticEncoder,
    load_encoder,
    words_of,
)

logger: logging.Logger = logging.getLogger(__name__)

UNPUBLISHED = "unpublished"
"""A file in the folder until the memory is published from it, or another revision is built on it."""
_PASSAGES = ".passages"
"""A temporary file in the folder."""
_AT_ONCE = 1024
"""Passages that are encoded together."""
_SHOWN_CHARACTERS = 200
_MUCH_UNKNOWN = 0.1
"""If the base's encoder does not know this share of the new text's words, the command warns the publisher."""


@dataclass(frozen=True)
class BuildPlan:
    """What a memory is made from, and where it is written."""

    paths: tuple[str, ...]
    out: Path
    name: str | None = None
    """None: the name of the folder, or of the base."""
    about: str | None = None
    license: str = ""
    field: str = "text"
    title_field: str = "title"
    base: Path | None = None
    """The memory of which this becomes the next revision."""
    encoder: Path | None = None
    """A file from `talkoot memory train-encoder`; None: word vectors are learned from the text."""
    seed: int = 0


@dataclass(frozen=True)
class BuildReport:
    """The result of building a memory."""

    folder: str
    name: str
    revision: int
    passages: int
    """Passages that are new in this revision."""
    duplicates: int
    """Passages that were left out as duplicates."""
    revoked: int
    """Passages that were left out because they were revoked from the base."""
    unknown: float
    """The share of the new text's words that the encoder of --base or --encoder does not know; 0 without these."""
    shards: int
    cells: int
    skew: float
    """The number of passages in the fullest cell, as a multiple of the mean."""
    bytes: int
    """The size of the whole folder."""
    shard_bytes: int
    encoder_bytes: int
    licenses: tuple[str, ...]
    """Of all passages, including those of the base."""
    seconds: float


def run_build(terminal: Terminal, plan: BuildPlan) -> None:
    """Raises UserError."""
    with terminal.stages("looking for text") as stage:
        # looked for first, as the new folder may be in one of those that are read
        others = unread_files(plan.paths)
        report = build_memory(plan, Progress(stage, terminal.live).show)
    if terminal.json:
        terminal.event("memory", asdict(report))
        return
    terminal.line(
        f"{report.folder} has revision {report.revision} of the memory {report.name}: "
        f"{counted(report.passages, 'new passage', ',')} in {counted(report.shards, 'shard')}, "
        f"{sizes_in_words(report.shard_bytes, report.encoder_bytes)}, made in {report.seconds:.0f} s"
    )
    if report.duplicates:
        terminal.line(
            f"{counted(report.duplicates, 'passage', ',')} left out: the same text is there already"
        )
    if report.revoked:
        terminal.line(f"{counted(report.revoked, 'passage', ',')} left out: revoked from the base")
    if others:
        terminal.line(
            f"{counted(len(others), 'file', ',')} not read, such as {printable(str(others[0]), _SHOWN_CHARACTERS)}: "
            "name text files that don't end in .txt by a glob in quotes"
        )
    if UNKNOWN_LICENSE in report.licenses:
        terminal.line(
            f'passages without a stated licence are marked "{UNKNOWN_LICENSE}", and careful volunteers refuse a memory '
            "that has any. To state it, build the memory again with --license, such as --license CC-BY-4.0, or with a "
            "field `license` in each line or row"
        )
    if report.unknown > _MUCH_UNKNOWN:
        logger.warning(
            "%.0f%% of the words in the new text are unknown in %s, and no question finds passages by them. If the new "
            "text is about something else, build a separate memory: leave out --base and --encoder",
            100 * report.unknown,
            report.name,
        )
    terminal.line(f"Publish it: talkoot memory publish {report.folder} --join INVITE")


def build_memory(plan: BuildPlan, show: Show = lambda what, detail: None) -> BuildReport:
    """Raises UserError. Then nothing is left behind."""
    began = time.monotonic()
    plan = replace(
        plan,
        about=None if plan.about is None else printable(plan.about, MAX_LABEL_CHARACTERS),
        license=printable(plan.license, MAX_LICENSE_CHARACTERS),
    )
    base = None if plan.base is None else _Base.open(plan.base)
    given = None if plan.encoder is None else _given_encoder(plan.encoder, base)
    files, name = find_files(plan.paths), _name(plan, base)
    with PartialFolder(plan.out) as folder, naming_failures(plan.out):
        try:
            _clear(folder.partial)
            with closing(_Building(folder.partial, base, given, plan.seed, show)) as building:
                building.read(files, plan)
                manifest = building.write(name, plan.about)
            size = sum(path.stat().st_size for path in folder.partial.rglob("*") if path.is_file())
            if plan.base is not None:
                with suppress(OSError):  # nothing can be revoked in a folder that can't be written
                    note_published(plan.base)  # its passages may be, with the new revision
            folder.finish()
        except BaseException:
            with suppress(OSError):
                _clear(folder.partial)
                (folder.partial / LOCK).unlink()
                folder.partial.rmdir()
            raise
    return BuildReport(
        str(plan.out),
        manifest.name,
        manifest.revision,
        building.passages,
        building.duplicates,
        building.revoked,
        building.unknown,
        len(manifest.shards),
        len(manifest.by_cell),
        skew(manifest),
        size,
        manifest.shard_bytes,
        manifest.encoder.size,
        manifest.licenses,
        time.monotonic() - began,
    )


def was_never_published(folder: Path) -> bool:
    """Whether the passages of this memory are in this folder alone. Not known of a folder without the note."""
    return (folder / UNPUBLISHED).exists()


def note_published(folder: Path) -> None:
    """Notes that others may get the passages of this memory. Raises OSError."""
    with suppress(FileNotFoundError):
        (folder / UNPUBLISHED).unlink()
        sync_folder(folder)


def skew(manifest: MemoryManifest) -> float:
    """The number of passages in a memory's fullest cell, as a multiple of the mean of all cells."""
    loads = [sum(shard.leaves for shard in shards) for shards in manifest.by_cell.values()]
    return max(loads) * math.prod(manifest.grid) / sum(loads) if loads else 1.0


class _Base:
    """The previous revision: its shards are kept, and its encoder and cells are used again."""

    def __init__(self, store: MemoryStore, encoder: Encoder, codebook: Codebook) -> None:
        """See `open`."""
        self.manifest = store.manifest
        self.encoder, self.codebook = encoder, codebook
        self._store = store

    @classmethod
    def open(cls, folder: Path) -> "_Base":
        """Raises LibraryError if it is not a complete memory."""
        try:
            store = MemoryStore.open(folder)
            manifest = store.manifest
            encoder = load_encoder(
                manifest.encoder_kind, store.read_part(manifest.encoder), manifest.dimensions
            )
            codebook = Codebook.from_bytes(
                store.read_part(manifest.codebook), manifest.grid, manifest.dimensions
            )
        except OSError as error:
            raise LibraryError(
                f"--base {folder}: can't read {error.filename} ({error.strerror or error}): give the folder of a "
                "memory that `talkoot memory build` wrote"
            ) from error
        except WireError as error:
            raise LibraryError(f"--base {folder} is not a memory that can be built on: {error}") from error
        if missing := len(manifest.by_root.keys() - set(store.roots())):
            raise LibraryError(
                f"--base {folder} lacks {counted(missing, 'shard')}: give the folder with all of them"
            )
        return cls(store, encoder, codebook)

    def texts(self) -> Iterator[str]:
        """The texts of its passages. Raises LibraryError if a shard is not what it should be."""
        for number, shard in enumerate(self.manifest.shards):
            try:
                self._store.load(shard.root)
            except (WireError, OSError) as error:
                raise LibraryError(f"--base {self._store.folder}, shard {number}: {error}") from error
            loaded = self._store.shards[shard.root]
            for passage in loaded.passages() if isinstance(loaded, PrimaryShard) else ():
                if passage is not None:
                    yield passage.text

    def revoked_leaves(self) -> frozenset[bytes]:
        """Call it after `texts`."""
        shards = self._store.shards
        return frozenset(shards[place.root].leaf(place.position) for place in self.manifest.revoked)

    def copy_to(self, folder: Path) -> None:
        """Copies the parts that its manifest names, as links if possible: they are never changed in place. Raises
        OSError.
        """
        parts = [part.sha256 for part in (self.manifest.encoder, self.manifest.codebook)]
        for kind, names in ((PARTS, parts), (SHARDS, self.manifest.by_root)):
            for name in names:
                _link(self._store.folder / kind / name.hex(), folder / kind / name.hex())


class _Building:
    """One run of the command, in the folder that becomes the memory."""

    def __init__(
        self, folder: Path, base: _Base | None, given: DualEncoder | None, seed: int, show: Show
    ) -> None:
        """`given`: the encoder of a first revision; None: an encoder is learned."""
        self._folder, self._base, self._given, self._seed, self._show = folder, base, given, seed, show
        self._known: Encoder | None = given if base is None else base.encoder
        self._licenses: dict[str, None] = {}
        known = iter(()) if base is None else base.texts()
        self._file = PassageFile(folder / _PASSAGES, known)
        self._counter = WordCounter()
        self._words = self._unknown_words = 0
        self.revoked: int = 0
        """Passages that `write` left out."""

    @property
    def unknown(self) -> float:
        return self._unknown_words / max(1, self._words)

    @property
    def passages(self) -> int:
        return len(self._file) - self.revoked

    @property
    def duplicates(self) -> int:
        return self._file.duplicates

    def close(self) -> None:
        self._file.close()

    def read(self, files: Sequence[Path], plan: BuildPlan) -> None:
        """Raises UserError, and OSError if the disk is full."""
        rate = Rate(self._show, "reading", None)
        for passage in read_passages(files, plan.field, plan.title_field, plan.license):
            if self._file.add(passage):
                self._licenses[passage.license] = None
                if self._known is None:
                    self._counter.add(text_of(passage))
                else:
                    words = words_of(text_of(passage))
                    self._words += len(words)
                    self._unknown_words += sum(not self._known.knows(word) for word in words)
            rate.at(len(self._file))
        if not len(self._file):
            named = ", ".join(map(str, files[:3]))
            if self.duplicates:
                raise DataError(f"all of {named} is already in {plan.base}: give new text")
            raise DataError(f"{named} is empty: give a file or folder with text in it")
        self._file.finish()

    def write(self, name: str, about: str | None) -> MemoryManifest:
        """Raises UserError, and OSError if the disk is full."""
        base = self._base
        licenses = tuple(dict.fromkeys([*(base.manifest.licenses if base else ()), *self._licenses]))
        if len(licenses) > MAX_LICENSES:
            raise SettingsError(
                f"the field 'license' has {len(licenses)} different values; a memory has at most {MAX_LICENSES}"
            )
        encoder = base.encoder if base else self._given or self._train()
        vectors_ND = self._encode(encoder)
        codebook = base.codebook if base else self._cluster(vectors_ND)
        grid = base.manifest.grid if base else grid_for(len(vectors_ND))
        for folder in (PARTS, SHARDS):
            (self._folder / folder).mkdir()
        if base:
            base.copy_to(self._folder)
            parts = base.manifest.encoder, base.manifest.codebook
        else:
            assert isinstance(encoder, StaticEncoder | DualEncoder), "what was trained"
            parts = self._write_part(encoder.to_bytes()), self._write_part(codebook.to_bytes())
        shards = self._write_shards(vectors_ND, two_cells(codebook, vectors_ND), grid)
        manifest = MemoryManifest(
            name,
            base.manifest.revision + 1 if base else 1,
            about if about is not None else base.manifest.about if base else "",
            time.time(),
            base.manifest.encoder_kind if base else STATIC if self._given is None else DUAL,
            parts[0],
            encoder.dimensions,
            parts[1],
            grid,
            licenses,
            (*(base.manifest.shards if base else ()), *shards),
            base.manifest.revoked if base else frozenset(),
        )
        (self._folder / _PASSAGES).unlink()
        if not base:  # the base may have been published
            (self._folder / UNPUBLISHED).touch()
        write_atomically(self._folder / MANIFEST, _checked(manifest))
        return manifest

    def _train(self) -> StaticEncoder:
        words = self._counter.finish()
        rate = Rate(self._show, "learning word vectors", None, "steps")
        return train_static_encoder(
            words,
            seed=self._seed,
            watch=rate.step,
        )

    def _encode(self, encoder: Encoder) -> Vectors:
        vectors_ND = np.empty((len(self._file), encoder.dimensions), np.int8)
        rate = Rate(self._show, "encoding", len(vectors_ND))
        for begin in range(0, len(vectors_ND), _AT_ONCE):
            end = min(begin + _AT_ONCE, len(vectors_ND))
            vectors_ND[begin:end] = encoder.encode([text_of(self._file[n]) for n in range(begin, end)])
            rate.at(end)
        return vectors_ND

    def _cluster(self, vectors_ND: Vectors) -> Codebook:
        def watch(done: int, rounds: int) -> None:
            self._show("finding cells", f"{done} of {rounds} rounds")

        return build_codebook(vectors_ND, grid_for(len(vectors_ND)), self._seed, watch)

    def _write_part(self, data: bytes) -> Part:
        part = Part(hashlib.sha256(data).digest(), len(data))
        write_atomically(self._folder / PARTS / part.sha256.hex(), data)
        return part

    def _write_shards(
        self, vectors_ND: Vectors, cells_N2: Integers, grid: tuple[int, ...]
    ) -> list[ShardInfo]:
        numbers = np.flatnonzero(self._not_revoked(vectors_ND))
        self.revoked = len(vectors_ND) - len(numbers)
        rate = Rate(self._show, "writing shards", cells_N2.shape[1] * len(numbers))
        return write_shards(self._folder / SHARDS, self._file, vectors_ND, cells_N2, grid, numbers, rate.at)

    def _not_revoked(self, vectors_ND: Vectors) -> Booleans:
        revoked = self._base.revoked_leaves() if self._base else frozenset()
        if not revoked:
            return np.ones(len(vectors_ND), np.bool_)
        leaves = (self._file[n].leaf(vector.tobytes()) for n, vector in enumerate(vectors_ND))
        return np.array([leaf not in revoked for leaf in leaves])


def text_of(passage: Passage) -> str:
    """The text that is encoded. The title says what the passages of one text have in common."""
    return f"{passage.title}\n{passage.text}"


def _given_encoder(file: Path, base: _Base | None) -> DualEncoder:
    """Raises UserError."""
    if base is not None:
        raise SettingsError(
            "--encoder and --base: a revision has the encoder of its base, so leave one of them out"
        )
    try:
        with os.fdopen(open_plainly(file, os.O_RDONLY), "rb") as opened:
            data = opened.read(MAX_ENCODER_BYTES + 1)
        if len(data) > MAX_ENCODER_BYTES:
            raise WireError(f"the encoder has more than {bytes_in_words(MAX_ENCODER_BYTES)}")
        return DualEncoder.from_bytes(data)
    except OSError as error:
        raise DataError(
            f"--encoder: can't read {file}: {error.strerror or error}; pass a file that `talkoot memory train-encoder` "
            "wrote"
        ) from error
    except WireError as error:
        raise DataError(
            f"--encoder {file} is not a file that `talkoot memory train-encoder` wrote: {error}"
        ) from error


def _name(plan: BuildPlan, base: _Base | None) -> str:
    """Raises SettingsError."""
    name = plan.name or (base.manifest.name if base else plan.out.name)
    if base and name != base.manifest.name:
        raise SettingsError(f"--name {name}: a revision must have the name of its base, {base.manifest.name}")
    try:
        return check_name(name)
    except WireError as error:
        if plan.name:
            raise SettingsError(f"--name: {error}") from error
        raise SettingsError(
            f"the memory would be named after its folder, but {error}: pass --name"
        ) from error


def _checked(manifest: MemoryManifest) -> bytes:
    """The manifest's file. Raises SettingsError if the memory is too large."""
    data = manifest.serialize()
    try:
        MemoryManifest.parse(data)
    except WireError as error:
        raise SettingsError(f"this is too much for one memory: {error}; build several memories") from error
    return data


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target, follow_symlinks=False)


def _clear(folder: Path) -> None:
    """Removes everything but the lock."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()
