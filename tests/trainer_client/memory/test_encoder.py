"""Static encoders: which text gets which vector, and files that strangers invented."""

import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

from peer.arrays import decode_arrays, encode_arrays
from peer.errors import WireError
from trainer_client.memory.encoder import (
    DUAL,
    STATIC,
    DualEncoder,
    StaticEncoder,
    load_encoder,
    to_vectors,
    words_of,
)

WORDS = ("oak", "elm", "straße", "3")


def make_encoder(dimensions: int = 8, words: tuple[str, ...] = WORDS) -> StaticEncoder:
    rng = np.random.default_rng(0)
    vectors = rng.integers(-127, 128, (len(words), dimensions)).astype(np.int8)
    scales = rng.uniform(0.1, 1, len(words)).astype(np.float32)
    return StaticEncoder(words, vectors, scales, np.arange(len(words), dtype=np.float32))


def changed(**arrays: object) -> bytes:
    kept = decode_arrays(make_encoder().to_bytes())
    new = {name: np.asarray(array) for name, array in arrays.items() if array is not None}
    return encode_arrays({name: array for name, array in kept.items() if name not in arrays} | new)


def make_dual(dimensions: int = 8) -> DualEncoder:
    passages = make_encoder(dimensions)
    reversed_VD = passages.vectors["vectors"][::-1]
    questions = StaticEncoder(WORDS, reversed_VD, passages.vectors["scales"], passages.vocabulary["rarities"])
    return DualEncoder(questions, passages, 0.5)


def changed_dual(**arrays: object) -> bytes:
    """A dot in an array's name is given as two underscores."""
    new = {name.replace("__", "."): np.asarray(array) for name, array in arrays.items()}
    return encode_arrays(decode_arrays(make_dual().to_bytes()) | new)


def text(words: bytes) -> object:
    return np.frombuffer(words, np.uint8)


def test_words_are_runs_of_letters_and_digits() -> None:
    assert words_of("The 3rd oak-tree's STRASSE_x: Straße") == [
        "the",
        "3rd",
        "oak",
        "tree",
        "s",
        "strasse",
        "x",
        "straße",
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("東京都に行く。", ["東京", "京都", "都に", "に行", "行く"]),
        ("水 Wasser水", ["水", "wasser", "水"]),
        ("サウナは90度・熱い", ["サウ", "ウナ", "ナは", "90", "度", "熱い"]),
        ("น้ำร้อน", ["น้", "้ำ", "ำร", "ร้", "้อ", "อน"]),
        ("한국어 사우나", ["한국어", "사우나"]),
    ],
)
def test_languages_without_spaces_are_cut_into_pairs_of_characters(text: str, words: list[str]) -> None:
    assert words_of(text) == words
    assert all(words_of(word) == [word] for word in words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("हिन्दी की किताब", ["हिन्दी", "की", "किताब"]),
        ("தமிழ் நூல்", ["தமிழ்", "நூல்"]),
        ("কিতাব_কিতাব", ["কিতাব", "কিতাব"]),
        ("كِتَاب", ["كِتَاب"]),
        ("\u0301 é\u0323 ", ["ẹ\u0301"]),
    ],
)
def test_letters_keep_their_combining_marks(text: str, words: list[str]) -> None:
    assert words_of(text) == words
    assert all(words_of(word) == [word] for word in words)


@given(st.text(st.characters(max_codepoint=0x2000), max_size=20))
def test_a_text_has_the_same_words_however_it_is_encoded(text: str) -> None:
    composed, decomposed = unicodedata.normalize("NFC", text), unicodedata.normalize("NFD", text)
    assert words_of(composed) == words_of(decomposed)


def test_a_texts_vector_is_the_direction_of_the_sum_over_its_words() -> None:
    rng = np.random.default_rng(1)
    vectors = rng.integers(-127, 128, (4, 8)).astype(np.int8)
    scales = np.array([1, 0.5, 2, 1], np.float32)
    encoder = StaticEncoder(WORDS, vectors, scales, np.zeros(4, np.float32))
    total = vectors[0] * 2.0 + vectors[2] * 2.0
    np.testing.assert_array_equal(
        encoder.encode(["Oak, unknown oak straße"])[0], np.rint(127 * total / np.linalg.norm(total))
    )


def test_a_text_without_a_known_word_has_zeros() -> None:
    assert not make_encoder().encode(["", "nothing known"]).any()
    assert make_encoder().encode([]).shape == (0, 8)


@given(st.lists(st.text("oakelm 3ß", max_size=30), max_size=12))
def test_each_text_is_encoded_as_if_alone(texts: list[str]) -> None:
    encoder = make_encoder()
    together = encoder.encode(texts)
    for row, each in zip(together, texts, strict=True):
        np.testing.assert_array_equal(row, encoder.encode([each])[0])


@given(arrays_of.arrays(np.float32, (3, 256), elements=st.floats(-1, 1, width=32)))
def test_vectors_in_bytes_point_where_the_floats_do(numbers: np.ndarray) -> None:
    for row, vector in zip(numbers, to_vectors(numbers).astype(np.float64), strict=True):
        assert np.abs(vector).max() <= 127
        if np.linalg.norm(row) == 0:
            assert not vector.any()
        elif np.abs(row).max() <= 0.2 * np.linalg.norm(row):
            assert row @ vector >= 0.99 * np.linalg.norm(row) * np.linalg.norm(vector)


def test_a_word_that_is_not_known_counts_as_the_rarest() -> None:
    assert make_encoder().rarity(["elm", "3", "yew"]) == [1, 3, 3]


def test_a_file_gives_the_same_encoder() -> None:
    encoder = make_encoder()
    again = load_encoder(STATIC, memoryview(encoder.to_bytes()), 8)
    np.testing.assert_array_equal(again.encode(["oak elm"]), encoder.encode(["oak elm"]))
    assert isinstance(again, StaticEncoder)
    assert again.to_bytes() == encoder.to_bytes()


@pytest.mark.parametrize(
    "data",
    [
        b"no file",
        changed(words=text(b"oak\nelm\nyew")),
        changed(words=text(b"oak\nelm\nyew\noak")),
        changed(words=text(b"oak\nelm\nyew\nOAK")),
        changed(words=text(b"oak\nelm\nyew\nx y")),
        changed(words=text(b"oak\nelm\nyew\n")),
        changed(words=text(b"oak\nelm\nyew\n" + b"x" * 41)),
        changed(words=text(b"oak\nelm\nyew\n\xff")),
        changed(scales=np.array([1, np.nan, 1, 1], np.float32)),
        changed(scales=np.array([1, np.inf, 1, 1], np.float32)),
        changed(scales=np.array([1, -1, 1, 1], np.float32)),
        changed(rarities=np.ones(3, np.float32)),
        changed(vectors=np.ones((4, 8), np.float32)),
        changed(vectors=np.ones((4, 0), np.int8)),
        changed(vectors=np.ones((4, 2000), np.int8)),
        changed(vectors=np.ones((0, 8), np.int8), words=text(b"")),
        changed(vectors=None),
        changed(more=np.ones(1, np.int8)),
    ],
)
def test_a_file_that_is_no_encoder_is_refused(data: bytes) -> None:
    with pytest.raises(WireError):
        load_encoder(STATIC, data, 8)


def test_an_encoder_of_another_kind_or_size_is_refused() -> None:
    data = make_encoder().to_bytes()
    with pytest.raises(WireError, match="dpr"):
        load_encoder("dpr", data, 8)
    with pytest.raises(WireError, match="numbers instead of 16"):
        load_encoder(STATIC, data, 16)


def test_questions_and_passages_have_vectors_of_their_own() -> None:
    encoder = make_dual()
    again = load_encoder(DUAL, memoryview(encoder.to_bytes()), 8)
    assert isinstance(again, DualEncoder)
    assert again.to_bytes() == encoder.to_bytes()
    assert again.word_weight == 0.5
    np.testing.assert_array_equal(again.encode(WORDS), make_encoder().encode(WORDS))
    assert (again.encode_questions(WORDS) != again.encode(WORDS)).any()
    static = make_encoder()
    np.testing.assert_array_equal(static.encode_questions(WORDS), static.encode(WORDS))


@pytest.mark.parametrize(
    "data",
    [
        make_encoder().to_bytes(),
        changed_dual(word_weight=np.array([np.nan], np.float32)),
        changed_dual(word_weight=np.array([-1], np.float32)),
        changed_dual(word_weight=np.array([5], np.float32)),
        changed_dual(word_weight=np.array([1, 1], np.float32)),
        changed_dual(word_weight=np.array([], np.float32)),
        changed_dual(question__vectors=np.ones((4, 16), np.int8)),
        changed_dual(question__vectors=np.ones((3, 8), np.int8)),
        changed_dual(passage__vectors=np.ones((5, 8), np.int8)),
        changed_dual(question__scales=np.ones(5, np.float32)),
        changed_dual(question__scales=np.full(4, np.inf, np.float32)),
        changed_dual(rarities=np.ones(3, np.float32)),
        changed_dual(words=text(b"oak\nelm\nyew\noak")),
        changed_dual(more=np.ones(1, np.int8)),
    ],
)
def test_a_file_that_is_no_dual_encoder_is_refused(data: bytes) -> None:
    with pytest.raises(WireError):
        load_encoder(DUAL, data, 8)
