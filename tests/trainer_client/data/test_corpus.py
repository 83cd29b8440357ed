"""Text as tokens: bytes and byte pairs, on disk."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peer import settings
from peer.errors import DataError, SettingsError, StartError
from trainer_client.data.corpus import Corpus, encode_corpus
from trainer_client.data.tokenizer import (
    BytePairTokenizer,
    ByteTokenizer,
    Tokenizer,
    load_tokenizer,
    read_tokenizer,
)

TEXT = "In the sauna one must behave as in church. Saunassa on lämmin. " * 20


def learn(vocabulary: int = 300) -> BytePairTokenizer:
    return BytePairTokenizer.learn([TEXT], len(TEXT), vocabulary)


PAIRS = learn()
tokenizers = pytest.mark.parametrize("tokenizer", [ByteTokenizer(), PAIRS], ids=["bytes", "pairs"])


def prepared(folder: Path, text: str = TEXT, tokenizer: Tokenizer = PAIRS) -> Corpus:
    path = folder / "text.txt"
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
    return encode_corpus([path], "text", tokenizer, folder / "text")


def files_in(folder: Path) -> list[str]:
    return sorted(os.listdir(folder / "text"))


@tokenizers
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_every_text_can_be_encoded_and_comes_back(tokenizer: Tokenizer, text: str) -> None:
    tokens = tokenizer.encode(text)
    assert b"".join(tokenizer.token_bytes[token] for token in tokens) == text.encode()


def test_byte_pairs_make_text_shorter() -> None:
    assert 256 < len(PAIRS.token_bytes) <= 300
    assert len(PAIRS.encode(TEXT)) < len(TEXT) / 2
    assert b"sauna" in [token.lower().strip() for token in PAIRS.token_bytes]


def test_equal_texts_teach_equal_byte_pairs() -> None:
    assert learn().to_json() == PAIRS.to_json()


@pytest.mark.parametrize("text", [TEXT, "a\n" * 300], ids=["some", "none"])
def test_a_text_on_disk_is_what_was_encoded_even_if_no_pairs_were_learned(tmp_path: Path, text: str) -> None:
    tokenizer = BytePairTokenizer.learn([text], len(text), 300)
    tokens = prepared(tmp_path, text, tokenizer).tokens
    assert b"".join(tokenizer.token_bytes[token] for token in tokens) == text.encode()


@tokenizers
def test_a_tokenizer_is_saved_whole(tokenizer: Tokenizer) -> None:
    again = load_tokenizer(tokenizer.to_json())
    assert again.token_bytes == tokenizer.token_bytes
    assert again.encode(TEXT).tolist() == tokenizer.encode(TEXT).tolist()


MARK, MARK_ID = "<|mark|>", len(PAIRS.token_bytes)


def marking(before: int, after: int) -> Tokenizer:
    """A tokenizer that adds so many marks before each text, and after it."""
    json_form = json.loads(PAIRS.to_json())
    json_form["added_tokens"] = [
        {"id": MARK_ID, "content": MARK, "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    ]
    mark, text = {"SpecialToken": {"id": MARK, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    json_form["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [*before * [mark], text, *after * [mark]],
        "pair": [text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {MARK: {"id": MARK, "ids": [MARK_ID], "tokens": [MARK]}},
    }
    return BytePairTokenizer(json.dumps(json_form))


@pytest.mark.parametrize(("before", "after"), [(1, 0), (0, 1), (2, 2)])
def test_a_mark_that_a_tokenizer_adds_to_each_text_stands_for_none_of_its_bytes(
    before: int, after: int
) -> None:
    tokenizer = marking(before, after)
    tokens = tokenizer.encode(TEXT, TEXT).tolist()
    assert tokens == 2 * [*before * [MARK_ID], *PAIRS.encode(TEXT).tolist(), *after * [MARK_ID]]
    assert b"".join(tokenizer.token_bytes[token] for token in tokens) == 2 * TEXT.encode()


@pytest.mark.parametrize("prompt", ["", "a", "Sauna on a", f"a {MARK}"])
@pytest.mark.parametrize(("before", "after"), [(0, 0), (1, 0), (0, 1), (2, 2)])
def test_a_prompt_is_not_ended(prompt: str, before: int, after: int) -> None:
    whole = marking(before, after).encode(prompt).tolist()
    begun = marking(before, after).encode_prompt(prompt).tolist()
    assert begun + after * [MARK_ID] == whole


@pytest.mark.parametrize("text", ["", "nonsense", "{}", json.dumps({"model": {"type": "BPE"}})])
def test_a_file_that_is_no_tokenizer_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(text)
    with pytest.raises(DataError, match=rf"{path}.*this is not a tokenizer"):
        read_tokenizer(str(path))
    absent = tmp_path / "absent"
    with pytest.raises(DataError, match=rf"no tokenizer {absent}: give .* the path of"):
        read_tokenizer(str(absent))


def test_a_tokenizer_of_words_is_refused() -> None:
    of_words = json.loads(PAIRS.to_json())
    vocabulary = of_words["model"]["vocab"]
    (some,) = [
        token for token, number in vocabulary.items() if number == 299 or number == len(vocabulary) - 1
    ]
    vocabulary["日"] = vocabulary.pop(some)
    of_words["model"]["merges"] = []
    with pytest.raises(DataError, match="not a tokenizer of byte pairs"):
        BytePairTokenizer(json.dumps(of_words))


def test_byte_pairs_without_their_package_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "find_spec", lambda name: None)
    with pytest.raises(SettingsError, match="tokenizers: install Talkoot with the extra bpe"):
        load_tokenizer("{}")


@tokenizers
def test_tokens_lie_on_disk(tmp_path: Path, tokenizer: Tokenizer) -> None:
    tokens = prepared(tmp_path, tokenizer=tokenizer).tokens
    assert isinstance(tokens, np.memmap)
    assert tokens.tolist() == tokenizer.encode(TEXT).tolist()
    assert tokens.itemsize == (1 if isinstance(tokenizer, ByteTokenizer) else 2)


def test_the_same_text_is_encoded_once(tmp_path: Path) -> None:
    first = prepared(tmp_path)
    (name,) = files_in(tmp_path)
    before = (tmp_path / "text" / name).stat()
    again = prepared(tmp_path)
    after = (tmp_path / "text" / name).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert again.sha256 == first.sha256


def test_what_changed_is_encoded_again_and_takes_the_place_of_the_old(tmp_path: Path) -> None:
    first = prepared(tmp_path)
    second = prepared(tmp_path, TEXT + "more")
    assert len(files_in(tmp_path)) == 1
    assert second.sha256 != first.sha256
    assert len(second.tokens) > len(first.tokens)
    assert first.tokens.tolist() == PAIRS.encode(TEXT).tolist(), "who uses the old one keeps it"
    as_bytes = prepared(tmp_path, TEXT + "more", ByteTokenizer())
    assert len(as_bytes.tokens) == len((TEXT + "more").encode())
    assert len(files_in(tmp_path)) == 1


@pytest.mark.parametrize(("text", "said"), [("", "text.txt is empty"), ("a\0b", "byte 1 is 0")])
def test_text_that_is_none_leaves_nothing(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "left-by-a-killed-one.new").touch()
    with pytest.raises(DataError, match=said):
        prepared(tmp_path, text)
    assert files_in(tmp_path) == []


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StartError, match=r"can't write in .*: No space left on device; pass another --state"):
        prepared(tmp_path)
    assert files_in(tmp_path) == []


def test_the_help_in_python_is_a_corpus_too(tmp_path: Path) -> None:
    assert len(encode_corpus([], "text", ByteTokenizer(), tmp_path).tokens) > 200_000
