"""Texts cut into passages: whole, in order, without overlap, and no longer than passages are."""

import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from json_lines import write_lines

from dht.memory import MAX_TEXT_CHARACTERS, Passage
from peer.errors import DataError
from talkoot.memory.passages import PassageFile, read_passages, split

WORD = st.text("abcö1.!?”\u2028東京。", min_size=1, max_size=12)
SPACE = st.sampled_from([" ", "  ", "\n", "\n\n", "\t"])
TEXTS = st.lists(st.tuples(WORD, SPACE), max_size=400).map(lambda words: "".join(w + s for w, s in words))


def in_pieces(text: str, sizes: list[int]) -> list[str]:
    pieces, at = [], 0
    for size in sizes:
        pieces.append(text[at : at + size])
        at += size
    return [*pieces, text[at:]]


@given(TEXTS, st.lists(st.integers(0, 3000), max_size=5))
def test_all_words_are_in_passages_and_none_twice(text: str, sizes: list[int]) -> None:
    found = list(split(in_pieces(text, sizes)))
    assert found == list(split([text]))
    end = 0
    for offset, passage in found:
        assert offset >= end
        end = offset + len(passage)
        assert text[offset:end] == passage == passage.strip()
    covered = {place for offset, passage in found for place in range(offset, offset + len(passage))}
    left_out = "".join(c for place, c in enumerate(text) if place not in covered)
    assert not any(c.isalnum() for c in left_out)


@given(TEXTS)
def test_no_passage_is_longer_than_passages_are(text: str) -> None:
    assert all(len(passage.split()) <= 130 and len(passage) <= 2000 for _, passage in split([text]))


@given(st.integers(0, 1000), st.sampled_from(["w", "w.", "word", "w\n"]))
def test_only_the_last_passage_has_few_words(count: int, word: str) -> None:
    *counts, last = [0, *(len(passage.split()) for _, passage in split([f"{word} " * count]))]
    assert all(70 <= found <= 130 for found in counts[1:])
    assert last <= 130
    assert sum(counts) + last == count


def test_a_passage_ends_with_the_sentence_that_ends_next_to_100_words() -> None:
    text = " ".join(["word"] * 79 + ["early."] + ["word"] * 13 + ['near."'] + ["word"] * 200)
    (_, first), *_ = split([text])
    assert first.split()[-1] == 'near."'
    assert len(first.split()) == 94


def test_a_passage_ends_with_a_paragraph() -> None:
    text = " ".join(["word"] * 104) + "\n\n" + " ".join(["next"] * 100)
    assert [len(passage.split()) for _, passage in split([text])] == [104, 100]


def test_text_in_a_language_without_spaces_is_cut_where_sentences_end() -> None:
    found = [passage for _, passage in split(["東京は大きい。" * 200])]
    assert "".join(found) == "東京は大きい。" * 200
    assert all(passage.endswith("。") for passage in found)
    assert all(150 <= len(passage) <= 250 for passage in found[:-1])


def test_a_text_without_spaces_is_cut() -> None:
    found = list(split(["x" * 1500, "x" * 3600]))
    assert [(offset, len(passage)) for offset, passage in found] == [(0, 2000), (2000, 2000), (4000, 1100)]


def test_passages_have_title_source_and_licence(tmp_path: Path) -> None:
    plain = tmp_path / "oak.txt"
    plain.write_text("\n An oak is a tree.")
    lines = write_lines(
        tmp_path / "trees.jsonl",
        {"text": "An elm.", "title": "Elm\u001b[1m", "license": "CC0-1.0"},
        {"text": ""},
        {"text": "A yew.", "title": 3, "license": "x" * 100, "name": "yew"},
    )
    assert list(read_passages([plain, lines], license="MIT")) == [
        Passage("An oak is a tree.", "oak", "oak.txt", 2, "MIT"),
        Passage("An elm.", "Elm [1m", "trees.jsonl:1", 0, "CC0-1.0"),
        Passage("A yew.", "trees", "trees.jsonl:3", 0, "x" * 64),
    ]
    (_, last) = read_passages([lines], title_field="name")
    assert (last.title, last.license) == ("yew", "x" * 64)


def test_titles_come_from_parquet_too(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(
        pyarrow.table({"text": ["An oak.", None, "A yew."], "title": ["Oak", "Elm", None]}),
        tmp_path / "t.parquet",
    )
    found = [(p.title, p.source, p.license) for p in read_passages([tmp_path / "t.parquet"])]
    assert found == [("Oak", "t.parquet:1", "unknown"), ("t", "t.parquet:3", "unknown")]


def test_binary_files_are_refused_with_their_name(tmp_path: Path) -> None:
    (tmp_path / "photo.txt").write_bytes(b"\xff\xd8\xff\xe0\0\x10JFIF")
    with pytest.raises(DataError, match=r"photo\.txt"):
        list(read_passages([tmp_path / "photo.txt"]))


@given(st.lists(st.text(min_size=1, max_size=5), max_size=20))
def test_a_file_gives_each_text_once(texts: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = PassageFile(Path(folder) / "passages", known=["known"])
        passages = [Passage(text, "t", "s", n, "MIT") for n, text in enumerate([*texts, "known"])]
        kept = [passage for passage in passages if file.add(passage)]
        file.finish()
        assert [file[n] for n in range(len(file))] == kept
        assert [passage.text for passage in kept] == [
            text for text in dict.fromkeys(texts) if text != "known"
        ]
        assert file.duplicates == len(passages) - len(kept)
        assert all(len(passage.text) <= MAX_TEXT_CHARACTERS for passage in kept)
        file.close()
