"""Word vectors learned from passages: related words come close to each other, with the same result each time."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peer.errors import DataError
from talkoot.memory.training import PassageWords, WordCounter, train_static_encoder
from trainer_client.memory.encoder import StaticEncoder, words_of

TOPICS = [[f"word{6 * topic + n}" for n in range(6)] for topic in range(30)]


def counted(texts: list[str]) -> PassageWords:
    counter = WordCounter()
    for text in texts:
        counter.add(text)
    return counter.finish()


def topical_texts(count: int, seed: int = 0) -> list[str]:
    """Texts in which some words occur together, and some are everywhere."""
    rng = np.random.default_rng(seed)
    return [
        " ".join([*rng.choice(TOPICS[n % 30], 8), *rng.choice(["the", "a", "of"], 4)]) for n in range(count)
    ]


@given(st.lists(st.text("ab C9ß", max_size=12), min_size=1, max_size=12))
def test_words_are_counted_as_the_encoder_will_see_them(texts: list[str]) -> None:
    if not any(words_of(text) for text in texts):
        with pytest.raises(DataError):
            counted(texts)
        return
    words = counted(texts)
    for text, begin, end in zip(texts, words.offsets, words.offsets[1:], strict=False):
        assert [words.vocabulary[n] for n in words.numbers[begin:end]] == words_of(text)
    passages = [sum(word in words_of(text) for text in texts) for word in words.vocabulary]
    assert passages == sorted(passages, reverse=True)
    np.testing.assert_allclose(
        words.rarities_V, np.log((1 + len(texts)) / (1 + np.array(passages))), rtol=1e-6
    )


def test_only_the_words_of_most_passages_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("talkoot.memory.training._VOCABULARY", 2)
    monkeypatch.setattr("talkoot.memory.training._PASSAGES_AT_ONCE", 2)
    words = counted(["oak oak elm", "x", "yew elm", "elm yew y", ""])
    assert words.vocabulary == ("elm", "yew")
    assert words.numbers.tolist() == [0, 1, 0, 0, 1]
    assert words.offsets.tolist() == [0, 1, 1, 3, 5, 5]


def test_words_of_one_topic_come_together() -> None:
    losses: list[float] = []
    encoder = train_static_encoder(
        counted(topical_texts(300)), 32, watch=lambda step, steps, loss: losses.append(loss)
    )
    assert np.mean(losses[-10:]) < np.mean(losses[:10])
    assert encoder.dimensions == 32
    vectors = encoder.encode([word for topic in TOPICS for word in topic]).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = (vectors @ vectors.T).reshape(30, 6, 30, 6).mean(axis=(1, 3))
    assert cosines.diagonal().min() > cosines[~np.eye(30, dtype=bool)].max() + 0.1


def test_the_same_passages_and_seed_give_the_same_encoder() -> None:
    words = counted(topical_texts(40))
    once, again, other = (train_static_encoder(words, 16, seed).to_bytes() for seed in (1, 1, 2))
    assert once == again != other
    StaticEncoder.from_bytes(once)


@pytest.mark.parametrize(
    "texts", [["oak"], ["oak elm", "oak"], ["a b c d e f g h i"], ["x " * 20, "x " * 20]]
)
def test_hardly_any_text_gives_an_encoder_too(texts: list[str]) -> None:
    encoder = StaticEncoder.from_bytes(train_static_encoder(counted(texts), 16).to_bytes())
    assert encoder.encode(texts).any(axis=1).all() or len(texts) > 1
