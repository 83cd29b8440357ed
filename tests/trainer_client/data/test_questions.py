"""Questions: read strictly, and drawn so that each comes once in an epoch."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from json_lines import write_lines

from peer.errors import DataError
from trainer_client.data.questions import Question, QuestionBatches, digest_of, read_questions

GOOD = {"question": "what burns wood?", "answers": ["a kiuas", "stove"]}


def test_questions_are_read_from_lines(tmp_path: Path) -> None:
    first = write_lines(tmp_path / "a.jsonl", GOOD, GOOD | {"answers": [], "title": "more"})
    second = write_lines(tmp_path / "b.jsonl", GOOD)
    known = Question("what burns wood?", ("a kiuas", "stove"))
    found = read_questions([first, second])
    assert found == [known, Question("what burns wood?"), known]
    assert [each.answer for each in found] == ["a kiuas", "", "a kiuas"]
    assert digest_of(found) == digest_of(read_questions([first, second])) != digest_of(found[:2])


@pytest.mark.parametrize(
    "line",
    [
        "no JSON",
        "[]",
        json.dumps({"question": "what?"}),
        json.dumps(GOOD | {"question": " "}),
        json.dumps(GOOD | {"question": 3}),
        json.dumps(GOOD | {"question": "a" * 10_001}),
        json.dumps(GOOD | {"answers": "stove"}),
        json.dumps(GOOD | {"answers": [" "]}),
        json.dumps(GOOD | {"answers": ["a"] * 65}),
        json.dumps(GOOD | {"more": "a" * 200_000}),
    ],
)
def test_a_line_that_is_no_question_is_named(line: str, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "questions.jsonl", GOOD)
    file.write_text(f"{file.read_text()}{line}\n{json.dumps(GOOD)}")
    with pytest.raises(DataError, match=r"line 2 of .*questions\.jsonl"):
        read_questions([file])


def test_halves_of_surrogate_pairs_become_text(tmp_path: Path) -> None:
    """They are valid JSON, but no tokenizer can encode them."""
    row = {"question": "what \ud800?", "answers": ["a\udfff"]}
    (found,) = read_questions([write_lines(tmp_path / "questions.jsonl", row)])
    assert found == Question("what ??", ("a?",))


def test_what_has_no_questions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no questions to learn from: pass --data"):
        read_questions([])
    with pytest.raises(DataError, match="no questions to learn from"):
        read_questions([write_lines(tmp_path / "empty.jsonl")])
    with pytest.raises(DataError, match=r"notes\.txt: questions are \.jsonl files"):
        read_questions([write_lines(tmp_path / "notes.txt")])
    with pytest.raises(DataError, match="there is one question"):
        batches_of(1, 0.5)


def batches_of(count: int, share: float) -> QuestionBatches:
    questions = [Question(f"what is {n}?", (str(n),)) for n in range(count)]
    return QuestionBatches(questions, 0, share, lambda each: list(each.answer.encode()), [b"x"] * 256)


@given(st.integers(2, 60), st.floats(0.01, 0.99), st.integers(1, 9))
def test_each_question_comes_once_in_an_epoch_and_none_is_validated_too(
    count: int, share: float, size: int
) -> None:
    batches = batches_of(count, share)
    steps = -(-batches.sequences // size)
    drawn = [each for step in range(steps) for each in batches.batch(step, size)][: batches.sequences]
    assert sorted(drawn, key=repr) == sorted(batches.train, key=repr)
    assert batches.batch(steps, size) == batches.batch(steps, size)
    sizes = [len(batch) for batch in batches.validation_batches(size, 3)]
    assert max(sizes) <= min(size, min(sizes) + 1)
    validated = [each for batch in batches.validation_batches(size, 3) for each in batch]
    assert len(set(validated)) == len(validated) == min(3 * size, count - batches.sequences)
    assert not set(validated) & set(drawn)
    assert batches.bytes_per_token(batches.validation_batches(size, 3)) == 1.0
