"""Memories built from text: nothing is lost, everything is named by its hash, and a folder is either complete or
absent.
"""

import errno
import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from commands import run_here
from json_lines import write_lines

from dht.memory import MAX_SHARD_BYTES, MemoryManifest, Passage, Place
from dht.uid import number_of
from expert_server.memory.shard import PrimaryShard
from expert_server.memory.store import MANIFEST, PARTS, SHARDS, MemoryStore
from peer.errors import DataError, LibraryError, SettingsError, StartError, UserError
from talkoot.memory import shards
from talkoot.memory.build import UNPUBLISHED, BuildPlan, build_memory, run_build, text_of
from talkoot.memory.clustering import two_cells
from talkoot.memory.inspection import inspect_memory, open_memory
from talkoot.terminal import LogFormat, Terminal
from trainer_client.memory.codebook import Codebook
from trainer_client.memory.encoder import load_encoder

WORDS = [
    "oak",
    "elm",
    "yew",
    "leaf",
    "root",
    "bark",
    "bread",
    "rye",
    "yeast",
    "oven",
    "crust",
    "flour",
    "rain",
]


def write_texts(path: Path, count: int, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    lines = [
        {"text": " ".join(rng.choice(WORDS, 40)), "title": f"Text {n}", "license": ("MIT", "CC0-1.0")[n % 2]}
        for n in range(count)
    ]
    return write_lines(path, *lines)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the texts and a memory built from them. Tests must not change it."""
    folder = tmp_path_factory.mktemp("memory")
    write_texts(folder / "texts.jsonl", 150)
    build_memory(BuildPlan((str(folder / "texts.jsonl"),), folder / "trees", about="Of trees\n and bread"))
    return folder


def opened(path: Path) -> MemoryStore:
    store = MemoryStore.open(path)
    for root in store.roots():
        store.load(root)
    assert not store.missing_parts()
    assert len(store.shards) == len(store.manifest.shards)
    return store


def places(store: MemoryStore) -> dict[Passage, list[int]]:
    """The cells of each passage. The cell that has its text comes first."""
    found: dict[Place, list[int]] = {}
    for is_secondary in (False, True):
        for info in store.manifest.shards:
            if info.is_secondary == is_secondary:
                for text in map(store.shards[info.root].text_at, range(info.leaves)):
                    found.setdefault(text, []).append(number_of(info.cell, store.manifest.grid))
    by_passage = {}
    for text, cells in found.items():
        (entry,) = store.shards[text.root].read([text.position])
        assert entry.passage is not None
        by_passage[entry.passage] = cells
    return by_passage


def test_a_missing_text_is_named_before_a_wrong_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere"):
        build_memory(BuildPlan((str(tmp_path / "nowhere"),), tmp_path / "x"))


def test_a_folder_whose_name_is_no_name_for_a_memory_is_not_taken_for_the_option(folder: Path) -> None:
    texts = (str(folder / "texts.jsonl"),)
    with pytest.raises(SettingsError, match=r"named after its folder, but 'x' is not a name .*: pass --name"):
        build_memory(BuildPlan(texts, folder / "x"))
    with pytest.raises(SettingsError, match=r"^--name: 'Y' is not a name"):
        build_memory(BuildPlan(texts, folder / "new", "Y"))


def test_files_that_are_not_read_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_texts(tmp_path / "texts.jsonl", 150)
    (tmp_path / "x.md").write_text("a note")
    run_build(Terminal(LogFormat.TEXT), BuildPlan((str(tmp_path),), tmp_path / "trees"))
    assert f"1 file not read, such as {tmp_path / 'x.md'}: name" in capsys.readouterr().out


@pytest.mark.parametrize(("license", "is_said"), [("", True), ("MIT", False)])
def test_a_licence_that_is_not_stated_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], license: str, is_said: bool
) -> None:
    (tmp_path / "oak.txt").write_text("An oak is a tree.")
    plan = BuildPlan((str(tmp_path / "oak.txt"),), tmp_path / "oaks", license=license)
    run_build(Terminal(LogFormat.TEXT), plan)
    out = capsys.readouterr().out
    assert ('marked "unknown"' in out, "--license CC-BY-4.0" in out) == (is_said, is_said)


def test_each_passage_is_in_its_two_cells(folder: Path) -> None:
    store = opened(folder / "trees")
    manifest, found = store.manifest, places(store)
    assert len(found) == 150
    assert sorted(passage.title for passage in found) == sorted(f"Text {n}" for n in range(150))
    data = (folder / "trees" / PARTS / manifest.encoder.sha256.hex()).read_bytes()
    encoder = load_encoder(manifest.encoder_kind, data, manifest.dimensions)
    codebook = Codebook.from_bytes(
        (folder / "trees" / PARTS / manifest.codebook.sha256.hex()).read_bytes(),
        manifest.grid,
        manifest.dimensions,
    )
    for passage, cells in found.items():
        (expected,) = two_cells(codebook, encoder.encode([text_of(passage)]))
        assert cells == expected.tolist()


def test_the_manifest_says_what_the_folder_holds(folder: Path) -> None:
    manifest = MemoryManifest.parse((folder / "trees" / MANIFEST).read_bytes())
    assert (manifest.name, manifest.revision, manifest.grid) == ("trees", 1, (4, 4))
    assert manifest.about == "Of trees and bread"
    assert set(manifest.licenses) == {"MIT", "CC0-1.0"}
    for part in (manifest.encoder, manifest.codebook):
        data = (folder / "trees" / PARTS / part.sha256.hex()).read_bytes()
        assert (hashlib.sha256(data).digest(), len(data)) == (part.sha256, part.size)
    there = {path.name for path in (folder / "trees").iterdir()}
    assert there == {MANIFEST, PARTS, SHARDS, UNPUBLISHED}
    names = {path.name for path in (folder / "trees" / SHARDS).iterdir()}
    assert names == {shard.root.hex() for shard in manifest.shards}


def test_the_same_text_gives_the_same_memory(folder: Path, tmp_path: Path) -> None:
    build_memory(BuildPlan((str(folder / "texts.jsonl"),), tmp_path / "trees", about="Of trees\n and bread"))
    once, again = (MemoryStore.open(path / "trees").manifest for path in (folder, tmp_path))
    assert replace(again, created_at=once.created_at) == once


def test_equal_passages_are_kept_once(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "texts.jsonl", 20)
    copy = tmp_path / "copy.jsonl"
    copy.write_text(texts.read_text())
    report = build_memory(BuildPlan((str(texts), str(copy)), tmp_path / "trees"))
    assert (report.passages, report.duplicates) == (20, 20)
    assert {p.source.split(":")[0] for p in places(opened(tmp_path / "trees"))} == {"texts.jsonl"}


def test_a_large_cell_has_several_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_MOST_BYTES", 4000)
    texts = write_texts(tmp_path / "texts.jsonl", 150)
    build_memory(BuildPlan((str(texts),), tmp_path / "trees"))
    store = opened(tmp_path / "trees")
    assert max(map(len, store.manifest.by_cell.values())) > 2
    assert all(shard.leaves <= 13 and shard.size < MAX_SHARD_BYTES for shard in store.manifest.shards)
    assert len(places(store)) == 150


def test_of_a_base_only_what_its_manifest_names_is_taken_over(folder: Path, tmp_path: Path) -> None:
    """The base may be a stranger's, and the next revision is given to others."""
    base, secret, more = (
        tmp_path / "trees",
        tmp_path / "secret",
        write_texts(tmp_path / "more.txt", 20, seed=9),
    )
    shutil.copytree(folder / "trees", base)
    secret.write_text("secret")
    for kind in (PARTS, SHARDS):
        (base / kind / ("a" * 64)).symlink_to(secret)
        (base / kind / ("b" * 64)).write_text("another file")
    build_memory(BuildPlan((str(more),), tmp_path / "second", base=base))
    manifest = opened(tmp_path / "second").manifest
    named = {root.hex() for root in manifest.by_root}
    assert {path.name for path in (tmp_path / "second" / SHARDS).iterdir()} == named
    assert len(list((tmp_path / "second" / PARTS).iterdir())) == 2


def test_a_revision_shares_all_shards_of_its_base(folder: Path, tmp_path: Path) -> None:
    more = write_texts(tmp_path / "more.jsonl", 30, seed=1)
    plan = BuildPlan((str(folder / "texts.jsonl"), str(more)), tmp_path / "second", base=folder / "trees")
    report = build_memory(plan)
    assert (report.name, report.revision, report.passages, report.duplicates) == ("trees", 2, 30, 150)
    assert report.unknown == 0
    first, second = MemoryStore.open(folder / "trees").manifest, opened(tmp_path / "second")
    assert second.manifest.shards[: len(first.shards)] == first.shards
    assert (second.manifest.encoder, second.manifest.codebook) == (first.encoder, first.codebook)
    assert second.manifest.about == first.about
    found = places(second)
    assert len(found) == 180
    assert {len(set(cells)) for cells in found.values()} == {2}
    with pytest.raises(DataError, match="already"):
        build_memory(replace(plan, paths=(str(more),), out=tmp_path / "third", base=tmp_path / "second"))


def test_new_text_in_words_that_the_base_does_not_know_is_a_warning(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "oak.txt").write_text("crust gluon meson quark")
    ended = run_here(
        "memory",
        "build",
        str(tmp_path / "oak.txt"),
        "-o",
        str(tmp_path / "new"),
        "--base",
        str(folder / "trees"),
    )
    assert ended.returncode == 0, ended.stderr
    assert "60% of the words in the new text are unknown in trees" in caplog.text, "its title is known"


def test_what_was_revoked_does_not_come_back(folder: Path, tmp_path: Path) -> None:
    base, texts = tmp_path / "trees", str(folder / "texts.jsonl")
    shutil.copytree(folder / "trees", base)
    store = opened(base)
    place = Place(store.manifest.shards[0].root, 0)
    (gone,) = (entry.passage for entry in store.shards[place.root].read([0]))
    assert gone is not None
    store.follow(replace(store.manifest, revision=2, revoked=frozenset([place])).serialize())
    more = write_texts(tmp_path / "more.jsonl", 10, seed=1)
    report = build_memory(BuildPlan((texts, str(more)), tmp_path / "third", base=base))
    assert (report.revision, report.passages, report.duplicates, report.revoked) == (3, 10, 149, 1)
    third = opened(tmp_path / "third")
    assert third.manifest.revoked == {place}
    found = {
        passage.text
        for shard in third.shards.values()
        if isinstance(shard, PrimaryShard)
        for passage in shard.passages()
        if passage is not None
    }
    live = sum(shard.live for shard in third.shards.values() if not isinstance(shard, PrimaryShard))
    assert live == 159
    assert len(found) == 159
    assert gone.text not in found


def cases(folder: Path, tmp_path: Path) -> Iterator[tuple[str, BuildPlan, type[UserError], str]]:
    texts = str(folder / "texts.jsonl")
    (tmp_path / "photo.txt").write_bytes(b"\xff\xd8\xff\xe0\0\x10JFIF")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    out = tmp_path / "new"
    yield "binary", BuildPlan((texts, str(tmp_path / "photo.txt")), out), DataError, r"photo\.txt is not text"
    yield "empty", BuildPlan((str(tmp_path / "empty.txt"),), out), DataError, r"empty\.txt is empty"
    yield "missing", BuildPlan((str(tmp_path / "none"),), out), DataError, "no file or folder"
    yield "no field", BuildPlan((texts,), out, field="body"), DataError, "no field 'body'"
    yield "name", BuildPlan((texts,), out, name="My Trees"), SettingsError, "small letters"
    yield "in use", BuildPlan((texts,), tmp_path / "full"), SettingsError, "exists"
    yield "other name", BuildPlan((texts,), out, name="elms", base=folder / "trees"), SettingsError, "trees"
    yield "no base", BuildPlan((texts,), out, base=tmp_path / "none"), LibraryError, "give the folder of a"
    yield "nothing new", BuildPlan((texts,), out, base=folder / "trees"), DataError, "already"


NAMES = ("binary", "empty", "missing", "no field", "name", "in use", "other name", "no base", "nothing new")


@pytest.mark.parametrize("case", NAMES)
def test_a_failure_says_what_to_do_and_leaves_nothing_behind(case: str, folder: Path, tmp_path: Path) -> None:
    ((plan, kind, reason),) = [found[1:] for found in cases(folder, tmp_path) if found[0] == case]
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(kind, match=reason):
        build_memory(plan)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_full_disk_leaves_nothing_behind(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> None:
        if path.parent.name == SHARDS:
            raise OSError(errno.ENOSPC, "No space left on device")
        path.write_bytes(data)

    monkeypatch.setattr(shards, "write_atomically", full)
    with pytest.raises(StartError, match="No space left"):
        build_memory(BuildPlan((str(folder / "texts.jsonl"),), tmp_path / "trees"))
    assert not list(tmp_path.iterdir())


def test_what_a_killed_run_left_is_no_part_of_the_memory(folder: Path, tmp_path: Path) -> None:
    partial = tmp_path / "trees.partial"
    (partial / SHARDS).mkdir(parents=True)
    for name in ("lock", ".passages", f"{SHARDS}/old"):
        (partial / name).write_text("old")
    build_memory(BuildPlan((str(folder / "texts.jsonl"),), tmp_path / "trees"))
    assert not (tmp_path / "trees" / SHARDS / "old").exists()
    opened(tmp_path / "trees")


def test_build_and_inspect_are_commands(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "oak.txt").write_text("An oak is a tree.\n\n" * 2 + " ".join(WORDS * 6))
    arguments = (
        "memory",
        "build",
        str(tmp_path / "oak.txt"),
        "-o",
        str(tmp_path / "oaks"),
        "--license",
        "MIT",
    )
    ended = run_here(*arguments, "--json")
    assert ended.returncode == 0, ended.stderr
    report = json.loads(ended.stdout)
    assert (report["name"], report["revision"], report["passages"]) == ("oaks", 1, 1)
    assert report["licenses"] == ["MIT"]
    ended = run_here("memory", "inspect", str(tmp_path / "oaks"))
    assert ended.returncode == 0, ended.stderr
    assert "An oak is a tree." in ended.stdout
    assert "MIT" in ended.stdout
    ended = run_here("memory", "inspect", str(folder))
    assert ended.returncode == 2
    assert "talkoot memory build" in ended.stderr


def test_inspect_of_a_name_asks_for_a_folder_or_an_invite() -> None:
    ended = run_here("memory", "inspect", "trees-of-others")
    assert ended.returncode
    assert "build` wrote, or a memory's name with --join INVITE" in ended.stderr


def test_inspect_counts_and_verifies(folder: Path, tmp_path: Path) -> None:
    found = inspect_memory(folder / "trees")
    assert (found.passages, found.revoked, found.grid, found.cells) == (150, 0, (4, 4), 16)
    assert len(found.samples) == 3
    build_memory(BuildPlan((str(folder / "texts.jsonl"),), tmp_path / "trees"))
    path, *others = (tmp_path / "trees" / SHARDS).iterdir()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(LibraryError, match="damaged"):
        inspect_memory(tmp_path / "trees")
    path.unlink()
    with pytest.raises(LibraryError, match="lacks 1 shard"):
        open_memory(tmp_path / "trees")
    others[0].unlink()
    found = inspect_memory(tmp_path / "trees")  # as at a node that hosts some shards
    assert (found.shards, found.shards_total) == (len(others) - 1, len(others) + 1)
    assert 0 < found.passages <= 150


def test_a_single_passage_is_in_two_cells(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "texts.jsonl", 1)
    report = build_memory(BuildPlan((str(texts),), tmp_path / "trees"))
    assert (report.passages, report.shards, report.cells) == (1, 2, 2)
    ((_, cells),) = places(opened(tmp_path / "trees")).items()
    assert len(set(cells)) == 2
    assert inspect_memory(tmp_path / "trees").passages == 1
