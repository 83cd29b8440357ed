"""Which passages are revoked: by hash, and by a phrase, however it is written in them."""

import json
import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from commands import run_here
from hypothesis import given
from hypothesis import strategies as st
from memory_folders import DIMENSIONS, SampleMemory, shard_info

from dht.memory import Passage
from expert_server.memory.shard import PrimaryShard
from expert_server.memory.store import MemoryStore
from peer.errors import LibraryError, SettingsError
from talkoot.memory.inspection import open_memory
from talkoot.memory.passages import split
from talkoot.memory.selection import Phrase, Selection, folded

MEMORY = SampleMemory.make()


@pytest.mark.parametrize("leaf", ["", "12345", "g" * 16, "0" * 65, "0x" + "0" * 14, "\x1b[31m" + "0" * 16])
def test_what_is_no_hash_is_refused(leaf: str) -> None:
    with pytest.raises(SettingsError, match="not a passage's hash"):
        Selection.parse([leaf], None)


def test_something_must_be_selected() -> None:
    for text in (None, "", "  "):
        with pytest.raises(SettingsError, match="say which passages"):
            Selection.parse([], text)


def test_passages_are_selected_by_hash_or_by_what_is_in_them(tmp_path: Path) -> None:
    store = MEMORY.write(tmp_path)
    place, leaf = (MEMORY.roots[1], 5), MEMORY.leaf(MEMORY.roots[1], 5)
    for digits in (leaf.hex(), leaf.hex()[:16], leaf.hex().upper()):
        assert list(Selection.parse([digits], None).find(store)) == [place]
    found = Selection.parse([leaf.hex()], "TITLE 19").find(store)
    assert set(found) == {place, *((root, 19) for root in MEMORY.roots)}
    assert {each.passage.title for each in found.values()} == {"title 5", "title 19"}
    with pytest.raises(LibraryError, match=r"no passage of .* contains that text, or it was revoked before"):
        Selection.parse([], "zebra").find(store)
    with pytest.raises(LibraryError, match="has no passage 0000000000000000"):
        Selection.parse(["0" * 16], "title 19").find(store)


def test_a_passage_is_not_revoked_twice(tmp_path: Path) -> None:
    leaf = MEMORY.leaf(MEMORY.roots[0], 0)
    MEMORY.revoking((MEMORY.roots[0], 0)).write(tmp_path)
    store = open_memory(tmp_path, lambda text: None)
    assert store.manifest.passages == 79
    with pytest.raises(LibraryError, match=r"or it was revoked before.*run `talkoot memory publish`"):
        Selection.parse([leaf.hex()], None).find(store)


def test_a_dry_run_changes_nothing(tmp_path: Path) -> None:
    MEMORY.write(tmp_path)
    before = (tmp_path / "manifest").read_bytes()
    ended = run_here(
        "memory", "revoke", str(tmp_path), "--match", "title 7", "--dry-run", "--log-format", "json"
    )
    assert ended.returncode == 0
    assert len(json.loads(ended.stdout)["passages"]) == 4
    assert (tmp_path / "manifest").read_bytes() == before


# Phrases


def memory_of(passages: Sequence[Passage], folder: Path) -> MemoryStore:
    """A memory with these passages, half of them in each of two shards."""
    sample = SampleMemory.make(grid=(2,), each=1)
    shards, files = [], {}
    for cell, some in enumerate((passages[::2], passages[1::2])):
        vectors = np.zeros((len(some), DIMENSIONS), np.int8)
        shards.append(shard_info(data := PrimaryShard.build(some, vectors), some, vectors, (cell,)))
        files[shards[-1].root] = data
    manifest = replace(sample.manifest, shards=tuple(shards))
    return replace(sample, manifest=manifest, files=files).write(folder)


def matches(phrase: str, text: str) -> bool:
    return Phrase(phrase).find(folded(text)) is not None


@pytest.mark.parametrize(
    ("phrase", "text"),
    [
        ("anna virtanen", "by Anna\nVirtanen, which"),
        (" Anna \n Virtanen ", "by anna virtanen, which"),
        ("anna virtanen", "by ANNA\u00a0\u2028 \r\n\tVIRTANEN, which"),
        ("anna\u202fvirtanen", "by Anna  Virtanen, which"),
        ("anna virtanen", "by Anna\u200bVirtanen and Anna\x07Virtanen"),
        ("anna virtanen", "by An\u00adna Virta\u200dnen"),
        ("anna virtanen", "by Anna Vir-\n    tanen, which"),
        ("anna virtanen", "by Anna Vir\u00ad\ntanen, which"),
        ("anna virtanen", "by Anna Vir\u2010 tanen, which"),
        ("anna vir-\ntanen", "by Anna Virtanen, which"),
        ("anna-maria virtanen", "by Anna-\nMaria Vir-\ntanen"),
        ("anna-maria", "by Anna\u2011Maria"),
        ("o\u2019brien", "by O'Brien"),
        ("o'brien", "by O\u2019Brien"),
        ("j\u00e4rvi", "by JA\u0308RVI"),
        ("ja\u0308rvi", "by J\u00c4RVI"),
        ("stra\u00dfe", "in der STRASSE"),
        ("finn", "by \ufb01nn"),
        ("\u03c3\u03af\u03c3\u03c5\u03c6\u03bf\u03c2", "\u03a3\u038a\u03a3\u03a5\u03a6\u039f\u03a3"),
        ("\u0130nci I\u015f\u0131k", "inci \u0131\u015fik"),
        ("anna", "by \uff21\uff4e\uff4e\uff41"),
        ("\u738b\u5c0f\u660e", "\u738b\u5c0f\n\u660e"),
        ("\U0001d400nna", "by Anna"),
    ],
    ids=ascii,
)
def test_a_phrase_is_found_however_it_is_written(phrase: str, text: str) -> None:
    assert matches(phrase, text)


@pytest.mark.parametrize(
    ("phrase", "text"),
    [
        ("anna virtanen", "by Virtanen, Anna"),
        ("anna virtanen", "by Anna and Virtanen"),
        ("anna virtanen", "by Annavirtanen"),
        ("annavirtanen", "by Anna Virtanen"),
        ("virtanen", "by Virt\u00e4nen"),
        ("anna - maria", "by Anna Maria"),
        ("annamaria", "by Anna-Maria"),
        ("a.c", "abc"),
    ],
    ids=ascii,
)
def test_another_phrase_is_not_found(phrase: str, text: str) -> None:
    assert not matches(phrase, text)


@pytest.mark.parametrize("text", ["\u200b", "\u00ad \n", "\u00a0"], ids=ascii)
def test_a_phrase_that_nobody_sees_selects_nothing(text: str) -> None:
    with pytest.raises(SettingsError, match="--match"):
        Selection.parse([], text)


TEXT = st.text("aB\u00e4\u0308\u0130\u00df\u00ad\u200b-\u2010 \n\u00a0.\u738b\u660e\ufb01", max_size=30)


@given(TEXT, TEXT, TEXT, st.sampled_from(["NFC", "NFD", "NFKC", "NFKD"]))
def test_what_stands_in_a_text_is_found_in_all_its_forms(
    before: str, text: str, after: str, form: str
) -> None:
    if not folded(text).strip(" \u00ad"):
        return
    form_of_text = unicodedata.normalize(form, f"{before} {text} {after}".replace(" ", "\n  "))  # type: ignore[arg-type]
    assert matches(text, form_of_text)


# Across two passages


def passages_of(text: str, title: str = "text", source: str = "text.txt") -> list[Passage]:
    return [Passage(passage, title, source, offset, "") for offset, passage in split([text])]


@pytest.mark.parametrize(
    ("text", "phrase"),
    [
        ("word " * 99 + "Anna\n\n\n   Virtanen " + "word " * 200, "anna virtanen"),
        ("word " * 98 + "by A.\nVirtanen " + "word " * 200, "a. virtanen"),
        ("word " * 99 + "Vir-\ntanen " + "word " * 200, "virtanen"),
        ("\u660e\u5c0f" * 99 + "\u660e\u738b\u5c0f\u660e" + "\u5c0f\u660e" * 200, "\u738b\u5c0f"),
        ("word " * 98 + "anna anna " + "anna anna " + "word " * 200, "anna anna anna"),
    ],
    ids=["white space", "an initial", "a hyphen", "no spaces", "a repetition"],
)
def test_a_phrase_that_the_border_of_two_passages_cuts_selects_both(
    tmp_path: Path, text: str, phrase: str
) -> None:
    passages = passages_of(text)
    assert not any(matches(phrase, passage.text) for passage in passages)
    found = Selection.parse([], phrase).find(memory_of(passages, tmp_path))
    assert {each.passage for each in found.values()} == set(passages[:2])
    for each in found.values():
        assert each.is_cut
        assert matches(phrase, each.excerpt)


def test_passages_that_do_not_follow_each_other_are_not_joined(tmp_path: Path) -> None:
    first = Passage("Written by Anna", "text", "text.txt", 0, "")
    others = [
        Passage("Virtanen, another one", "text", "text.txt", 1000, ""),
        Passage("Virtanen, a third one", "text", "other.txt", 16, ""),
        Passage("Virtanen, a fourth one", "other", "text.txt", 16, ""),
        Passage("Virtanen, a fifth one", "text", "text.txt", 10, ""),
    ]
    with pytest.raises(LibraryError, match="contains that text"):
        Selection.parse([], "anna virtanen").find(memory_of([first, *others], tmp_path))


def test_a_passage_is_not_joined_with_a_revoked_one(tmp_path: Path) -> None:
    store = memory_of(passages_of("word " * 99 + "Anna Virtanen " + "word " * 200), tmp_path)
    leaf = next(each.leaf for each in Selection.parse([], "virtanen").find(store).values())
    new = replace(
        store.manifest, revision=2, revoked=frozenset(Selection.parse([leaf.hex()], None).find(store))
    )
    store.follow(new.serialize())
    with pytest.raises(LibraryError, match="contains that text"):
        Selection.parse([], "anna virtanen").find(store)


# What is shown


def test_the_surroundings_of_the_phrase_are_shown(tmp_path: Path) -> None:
    before, after = "Stra\u00dfe  \n " * 40, "and a lake " * 40
    passage = Passage(f"{before}by Anna\n  Vir-\ntanen, {after}", "title", "a.txt", 0, "")
    other = Passage("The beginning. " + "word " * 80, "title", "b.txt", 0, "")
    store = memory_of([passage, other], tmp_path)
    (found,) = Selection.parse([], "anna virtanen").find(store).values()
    assert found.excerpt.startswith("\u2026")
    assert "Stra\u00dfe by Anna Vir- tanen, and a lake and" in found.excerpt
    assert found.excerpt.endswith("\u2026")
    assert len(found.excerpt) < 150
    (by_hash,) = (
        each for each in Selection.parse([], "beginning").find(store).values() if each.passage == other
    )
    selected = Selection.parse([by_hash.leaf.hex()], None).find(store)
    (shown,) = selected.values()
    assert shown.excerpt.startswith("The beginning. word")
