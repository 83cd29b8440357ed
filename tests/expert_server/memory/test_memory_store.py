"""Memories on disk: what is read is verified, revoked passages are removed, and a full disk loses nothing."""

import errno
import hashlib
import os
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from memory_folders import DIMENSIONS, SampleMemory, passages_in, shard_info

from dht.memory import MemoryManifest, Passage, Place
from expert_server.memory.shard import PrimaryShard
from expert_server.memory.store import MemoryStore
from peer.errors import WireError
from peer.files import write_atomically

MEMORY = SampleMemory.make()


def test_a_folder_is_opened_again_with_all_its_shards(tmp_path: Path) -> None:
    MEMORY.write(tmp_path / "m")
    store = MemoryStore.open(tmp_path / "m")
    assert not store.shards
    assert store.manifest == MEMORY.manifest
    assert store.missing_parts() == []
    assert store.roots() == MEMORY.roots
    for root in store.roots():
        store.load(root)
    for root, (passages, _) in MEMORY.passages.items():
        assert passages_in(store, root) == passages
    assert store.shard_bytes == sum(len(data) for data in MEMORY.files.values())


def test_shards_keep_no_descriptors(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    store = MEMORY.write(tmp_path / "m")
    assert len(store.shards) == 4
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_shard_that_the_disk_changed_is_not_served(tmp_path: Path) -> None:
    MEMORY.write(tmp_path / "m")
    path = tmp_path / "m" / "shards" / MEMORY.roots[1].hex()
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    store = MemoryStore.open(tmp_path / "m")
    with pytest.raises(WireError):
        store.load(MEMORY.roots[1])
    assert MEMORY.roots[1] not in store.shards
    store.save(MEMORY.roots[1], MEMORY.files[MEMORY.roots[1]])
    assert MEMORY.roots[1] in store.shards


@pytest.mark.parametrize("data", [b"", b"x" * 100_000])
def test_a_shard_of_another_size_is_not_served(tmp_path: Path, data: bytes) -> None:
    MEMORY.write(tmp_path / "m")
    (tmp_path / "m" / "shards" / MEMORY.roots[0].hex()).write_bytes(data)
    with pytest.raises(WireError):
        MemoryStore.open(tmp_path / "m").load(MEMORY.roots[0])


def test_a_shard_that_somebody_gave_is_verified(tmp_path: Path) -> None:
    store = MEMORY.write(tmp_path / "m", lambda root: False)
    first, second = MEMORY.roots[:2]
    assert store.verified(first, MEMORY.files[first]) == MEMORY.files[first]
    with pytest.raises(WireError):
        store.verified(first, MEMORY.files[second])
    with pytest.raises(WireError):
        store.verified(b"\0" * 32, MEMORY.files[first])


def test_others_can_not_keep_a_passage_away_that_was_not_revoked(tmp_path: Path) -> None:
    root = MEMORY.roots[0]
    without = MEMORY.write(tmp_path / "a").shards[root].without({root: [3]})
    assert without is not None
    with pytest.raises(WireError, match="still valid"):
        MEMORY.write(tmp_path / "b", lambda root: False).verified(root, without)


def test_what_is_revoked_goes_from_memory_and_disk(tmp_path: Path) -> None:
    store = MEMORY.write(tmp_path / "m")
    root = MEMORY.roots[2]
    later = MEMORY.revoking((root, 7))
    store.follow(later.manifest.serialize())
    assert store.shards[root].read([7])[0].passage is None
    assert store.shards[root].read([6])[0].passage is not None
    again = MemoryStore.open(tmp_path / "m")
    assert again.manifest.revision == 2
    again.load(root)
    assert again.shards[root].read([7])[0].passage is None
    # Also from a host with a whole copy, which has not heard of the revocation yet.
    store.drop(root)
    store.save(root, store.verified(root, MEMORY.files[root]))
    assert store.shards[root].read([7])[0].passage is None


def test_a_crash_between_manifest_and_shards_revokes_all_the_same(tmp_path: Path) -> None:
    MEMORY.write(tmp_path / "m")
    root = MEMORY.roots[2]
    later = MEMORY.revoking((root, 7))
    (tmp_path / "m" / "manifest").write_bytes(later.manifest.serialize())
    store = MemoryStore.open(tmp_path / "m")
    store.load(root)
    assert store.shards[root].read([7])[0].passage is None


@pytest.mark.parametrize(
    "changes",
    [{"revision": 1}, {"name": "other"}, {"grid": (4, 1)}, {"dimensions": 9}, {"encoder_kind": "other"}],
)
def test_what_is_no_later_revision_is_refused(tmp_path: Path, changes: dict[str, object]) -> None:
    store = MEMORY.write(tmp_path / "m")
    values = {name: getattr(MEMORY.manifest, name) for name in MemoryManifest.__dataclass_fields__}
    other = MemoryManifest(**values | {"revision": 2} | changes)
    with pytest.raises(WireError):
        store.follow(other.serialize())
    assert store.manifest == MEMORY.manifest


def test_shards_of_an_older_revision_go(tmp_path: Path) -> None:
    store = MEMORY.write(tmp_path / "m")
    store.follow(_without_first_shard())
    assert list(store.shards) == MEMORY.roots[1:]
    assert not (tmp_path / "m" / "shards" / MEMORY.roots[0].hex()).exists()


def test_a_shard_that_left_the_manifest_while_it_came_leaves_no_file(tmp_path: Path) -> None:
    """Otherwise a publisher that changes its list again and again could fill disks with files that count towards no
    limit.
    """
    store = MEMORY.write(tmp_path / "m", lambda root: False)
    first = MEMORY.roots[0]
    data = store.verified(first, MEMORY.files[first])
    store.follow(_without_first_shard())
    with pytest.raises(WireError, match="this revision of the memory has no such shard"):
        store.save(first, data)
    assert list((tmp_path / "m" / "shards").iterdir()) == []


def test_shards_can_be_listed_while_a_revision_takes_them_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = MEMORY.write(tmp_path / "m")
    drop, seen = store.drop, list[list[bytes]]()

    def look(root: bytes) -> None:
        seen.append([info.root for info in store.served()])
        drop(root)

    monkeypatch.setattr(store, "drop", look)
    store.follow(_without_first_shard())
    assert seen == [MEMORY.roots[1:]]


def _without_first_shard() -> bytes:
    values = {name: getattr(MEMORY.manifest, name) for name in MemoryManifest.__dataclass_fields__}
    return MemoryManifest(**values | {"revision": 2, "shards": MEMORY.manifest.shards[1:]}).serialize()


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = MEMORY.write(tmp_path / "m", lambda root: root != MEMORY.roots[0])

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(OSError, match="No space"):
            store.save(MEMORY.roots[0], MEMORY.files[MEMORY.roots[0]])
    assert MEMORY.roots[0] not in store.shards
    assert len(os.listdir(tmp_path / "m" / "shards")) == 3
    assert len(store.shards) == 3


def test_one_damaged_shard_keeps_nothing_revoked_in_the_others(tmp_path: Path) -> None:
    store = MEMORY.write(tmp_path / "m")
    for root in MEMORY.roots[1:]:
        path = tmp_path / "m" / "shards" / root.hex()
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    store.follow(MEMORY.revoking(*((root, 7) for root in MEMORY.roots)).manifest.serialize())
    assert list(store.shards) == MEMORY.roots[:1]
    assert store.shards[MEMORY.roots[0]].read([7])[0].passage is None
    assert store.roots() == MEMORY.roots[:1]


def test_on_a_full_disk_what_was_revoked_is_not_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = MEMORY.write(tmp_path / "m")
    write = write_atomically

    def full(path: Path, data: bytes, *more: object) -> None:
        if path.parent.name == "shards":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, data)

    monkeypatch.setattr("expert_server.memory.store.write_atomically", full)
    with pytest.raises(OSError, match="No space"):
        store.follow(MEMORY.revoking((MEMORY.roots[2], 7)).manifest.serialize())
    assert set(store.shards) == set(MEMORY.roots) - {MEMORY.roots[2]}


def test_a_file_that_can_not_be_removed_keeps_nothing_revoked_in_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Windows, others may have it open."""
    store, unlink = MEMORY.write(tmp_path / "m"), Path.unlink

    def in_use(path: Path, *arguments: bool) -> None:
        if path.name == MEMORY.roots[0].hex():
            raise PermissionError(errno.EACCES, "The file is in use")
        unlink(path, *arguments)

    monkeypatch.setattr(Path, "unlink", in_use)
    revoking = MEMORY.revoking((MEMORY.roots[2], 7)).manifest
    with pytest.raises(PermissionError):
        store.follow(replace(revoking, shards=revoking.shards[1:]).serialize())
    assert list(store.shards) == MEMORY.roots[1:]
    assert passages_in(store, MEMORY.roots[2])[7] is None


def test_a_revision_reads_only_the_shards_of_which_something_is_revoked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, loaded, load = MEMORY.write(tmp_path / "m"), list[bytes](), MemoryStore.load

    def counted(store: MemoryStore, root: bytes) -> None:
        loaded.append(root)
        load(store, root)

    monkeypatch.setattr(MemoryStore, "load", counted)
    store.follow(MEMORY.revoking((MEMORY.roots[2], 7)).manifest.serialize())
    assert loaded == [MEMORY.roots[2]]


def test_the_checksum_is_that_of_the_file_that_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This holds even if something is revoked while the checksum is computed, since the two run on different
    threads.
    """
    store, root = MEMORY.write(tmp_path / "m"), MEMORY.roots[2]
    sha256, changes = hashlib.sha256, [MEMORY.revoking((root, 7)).manifest.serialize()]

    def meanwhile(data: bytes) -> object:
        if changes and len(data) > 10**3:
            store.follow(changes.pop())
        return sha256(data)

    monkeypatch.setattr("hashlib.sha256", meanwhile)
    data, _ = store.file(root)
    assert not changes
    with pytest.raises(OSError, match=root.hex()):  # it is another file by now
        data[:]
    data, checksum = store.file(root)
    assert sha256(data[:]).digest() == checksum


def test_a_shard_that_grows_beyond_its_size_when_something_is_revoked_is_refused(tmp_path: Path) -> None:
    """A repeated passage is stored once if the first one is near enough. So a shard may grow when something is revoked,
    and hosts would fetch it again and again if they accepted that.
    """
    rng = random.Random(1)
    repeated, *others = ("".join(rng.choices("0123456789abcdef", k=7800)) for _ in range(11))
    texts = [repeated, *others[:3], repeated, *others[3:6], repeated]
    passages = [Passage(text, str(n), "", n, "") for n, text in enumerate(texts)]
    vectors = np.ones((len(texts), DIMENSIONS), np.int8)
    data = PrimaryShard.build(passages, vectors)
    info = replace(shard_info(data, passages, vectors, (0, 0)), size=len(data) * 8 // 9 + 1)
    manifest = replace(MEMORY.manifest, shards=(info,), revoked=frozenset({Place(info.root, 4)}))
    store = MemoryStore.create(tmp_path / "m", manifest.serialize())
    with pytest.raises(WireError, match="without its revoked passages"):
        store.verified(info.root, data)


@pytest.mark.parametrize("kind", ["pipe", "link to a pipe", "link to the shard"])
def test_only_plain_files_are_read(tmp_path: Path, kind: str) -> None:
    MEMORY.write(tmp_path / "m")
    path, other = tmp_path / "m" / "shards" / MEMORY.roots[0].hex(), tmp_path / "other"
    path.rename(other)
    if kind != "link to the shard":
        other.unlink()
        os.mkfifo(path if kind == "pipe" else other)
    if kind != "pipe":
        path.symlink_to(other)
    store = MemoryStore.open(tmp_path / "m")
    with pytest.raises(WireError, match="not a file"):
        store.load(MEMORY.roots[0])
