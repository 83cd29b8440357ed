"""Pairs of questions and passages: read strictly, split by title, with negatives that don't answer the question."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from json_lines import write_lines

from peer.errors import DataError
from talkoot.memory.build import text_of
from talkoot.memory.pairs import Pair, hard_negatives, read_pairs, split_by_title
from talkoot.memory.passages import read_passages
from trainer_client.memory.encoder import words_of

GOOD = {"question": "what burns wood?", "title": "Kiuas", "text": "A stove that is heated with wood."}


def test_pairs_are_read_from_lines(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "pairs.jsonl", GOOD, GOOD | {"answers": ["stove", "the kiuas"]})
    file.write_text(file.read_text() + "\n" + json.dumps({"question": "who?", "text": "You."}))
    assert read_pairs(file) == [
        Pair("what burns wood?", "Kiuas", "A stove that is heated with wood."),
        Pair("what burns wood?", "Kiuas", "A stove that is heated with wood.", ("stove", "the kiuas")),
        Pair("who?", "", "You."),
    ]


def test_a_title_is_the_one_that_memories_have(tmp_path: Path) -> None:
    row = {"question": "what burns wood?", "title": "The\u00a0kiuas \n stove", "text": "A stove."}
    file = write_lines(tmp_path / "pairs.jsonl", row)
    (pair,), (passage,) = read_pairs(file), read_passages([file])
    assert pair.title == passage.title
    assert pair.passage == text_of(passage)


@pytest.mark.parametrize(
    "line",
    [
        "no JSON",
        "[" * 5000,
        "[]",
        json.dumps({"question": "what?"}),
        json.dumps(GOOD | {"question": " ?"}),
        json.dumps(GOOD | {"question": "a" * 10_001}),
        json.dumps(GOOD | {"text": None}),
        json.dumps(GOOD | {"title": 3}),
        json.dumps(GOOD | {"answers": "stove"}),
        json.dumps(GOOD | {"answers": ["?"]}),
        json.dumps(GOOD | {"answers": ["a"] * 65}),
        json.dumps(GOOD | {"more": "a" * 200_000}),
    ],
)
def test_a_line_that_is_no_pair_is_named(line: str, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "pairs.jsonl", GOOD)
    file.write_text(f"{file.read_text()}{line}\n{json.dumps(GOOD)}")
    with pytest.raises(DataError, match=r"line 2 of .*pairs\.jsonl"):
        read_pairs(file)


def test_a_file_without_pairs_says_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="fields question, title and text"):
        read_pairs(write_lines(tmp_path / "pairs.jsonl"))
    with pytest.raises(DataError, match="can't read"):
        read_pairs(tmp_path / "missing.jsonl")


@given(st.lists(st.tuples(st.text("ab", max_size=3), st.text("xyz", min_size=1, max_size=2)), max_size=60))
def test_a_title_has_pairs_on_one_side_only(drawn: list[tuple[str, str]]) -> None:
    pairs = [Pair(question, title, "text") for question, title in drawn]
    learned, validated = split_by_title(pairs)
    assert sorted(learned + validated, key=repr) == sorted(pairs, key=repr)
    assert not {pair.title.lower() for pair in learned} & {pair.title.lower() for pair in validated}


def test_a_twentieth_of_the_titles_is_for_validation() -> None:
    _, validated = split_by_title([Pair("q", f"title {n}", "text") for n in range(4000)])
    assert 120 < len(validated) < 280


def test_of_pairs_without_titles_too_a_twentieth_of_the_texts_is_for_validation() -> None:
    _, validated = split_by_title([Pair("q", "", f"text {n // 2}") for n in range(4000)])
    assert 120 < len(validated) < 280
    assert len({pair.text for pair in validated}) == len(validated) / 2


def test_the_passage_of_a_pair_without_a_title_is_no_negative_of_it() -> None:
    texts = ["notes\nThe stove, of oak.", "notes\nAn oak stove stands here."]
    pairs = [Pair("oak stove", "", text) for text in ("the stove of oak", "an oak stove stands here")]
    assert hard_negatives(pairs, ["notes", "notes"], texts) == [texts[1], texts[0]]


@pytest.mark.parametrize(
    ("question", "answer", "other"),
    [
        ("京都在哪里", "京都在日本", "京都动物园"),
        ("कुर्सी की लकड़ी", "लकड़ी से बनती है", "नीली कुर्सी"),
        ("the x axis", "it lies flat", "the x of y"),
    ],
)
def test_hard_negatives_are_found_by_the_words_of_memories(question: str, answer: str, other: str) -> None:
    assert hard_negatives([Pair(question, "one", answer)], ["one", "two"], [answer, other]) == [other]


def test_passages_of_frequent_words_alone_give_no_negatives() -> None:
    assert hard_negatives([Pair("the oak", "one", "oak")], ["two"], ["the"]) == [None]


WORDS = ("oak", "elm", "yew", "fir", "ash")


@given(st.data())
def test_hard_negatives_share_words_with_the_question_and_have_no_answer(data: st.DataObject) -> None:
    sentence = st.lists(st.sampled_from(WORDS), min_size=1, max_size=4).map(" ".join)
    titles = data.draw(st.lists(st.sampled_from(("One", "Two", "three")), min_size=1, max_size=8))
    texts = [f"{title}\n{data.draw(sentence)}" for title in titles]
    pair = Pair(data.draw(sentence), "one", "x", tuple(data.draw(st.lists(sentence, max_size=2))))
    (negative,) = hard_negatives([pair], titles, texts)
    wrong = [
        text
        for title, text in zip(titles, texts, strict=True)
        if title.lower() != "one"
        and set(words_of(text)) & set(words_of(pair.question))
        and not any(answer in " ".join(words_of(text)) for answer in pair.answers)
    ]
    assert negative in wrong if wrong else negative is None
