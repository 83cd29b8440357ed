"""The benchmark of retrievers that learn, on dictionaries of a few invented words."""

import gzip
import random
from pathlib import Path

import numpy as np
import pytest

from benchmarks.memory import corpora
from benchmarks.rag import answers, facts, questions, recall
from benchmarks.rag.__main__ import verdicts
from talkoot.memory import dual_training
from talkoot.memory.pairs import hard_negatives

PAGE = """<html><body><nav><h3>Next topic</h3>never read</nav><div class="body" role="main">
<h1>{name} — a module<a>¶</a></h1><p>What {name} is.</p>
<section><h2>Sorting {name} by <code>key</code><a>¶</a></h2><p>The longest of {name} comes first.</p>
<h3>Examples</h3><p>None of {name}.</p></section></div><div class="clearer"></div>never read</body></html>"""


def words_about(topic: int, rng: np.random.Generator, kind: str, count: int) -> str:
    return " ".join(f"{kind}{topic}x{n}" for n in rng.integers(0, 5, count))


@pytest.fixture
def works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dictionary with entries on 40 topics, another work's definitions of the same words, and some documentation."""
    rng = np.random.default_rng(0)
    data, index, senses = b"", [], []
    for number in range(400):
        entry = f"Word{number}\n {words_about(number % 40, rng, 'entry', 14)}."
        index.append(f"Word{number}\t{_digits(len(data))}\t{_digits(len(entry))}\n")
        data += entry.encode()
        gloss = words_about(number % 40, rng, "gloss", 6)
        senses.append(f'0000000{number} 03 n 01 word{number} 0 000 | {gloss}; "as used"\n')
    for name in ("gcide", "foldoc"):
        with gzip.open(tmp_path / f"{name}.dict.dz", "wb") as file:
            file.write(data if name == "gcide" else b"")
        (tmp_path / f"{name}.index").write_text("".join(index) if name == "gcide" else "")
    for kind in ("noun", "verb", "adj", "adv"):
        (tmp_path / f"data.{kind}").write_text("".join(senses) if kind == "noun" else "")
    pages = tmp_path / "python3.0" / "html"
    pages.mkdir(parents=True)
    for name in ("heaps", "queues"):
        (pages / f"{name}.html").write_text(PAGE.format(name=name))
    for constant in ("_DICTIONARIES", "_WORDNET", "_DOCUMENTATION"):
        monkeypatch.setattr(corpora, constant, tmp_path)


def _digits(number: int) -> str:
    digits = ""
    while number or not digits:
        number, digit = divmod(number, 64)
        digits = corpora._DIGITS[digit] + digits
    return digits


def test_sections_have_their_headings_apart(works: None) -> None:
    found = list(corpora.sections())
    assert [heading for heading, _ in found] == [
        "heaps — a module", "Sorting heaps by key", "Examples",
        "queues — a module", "Sorting queues by key", "Examples",
    ]  # fmt: skip
    assert found[1][1] == corpora.Entry("heaps — a module", "The longest of heaps comes first.")


def test_no_word_and_no_heading_is_on_both_sides(works: None) -> None:
    asked = questions.ask(random.Random(0), 1, 100)
    learned, tested = ({q.about.lower() for q in side} for side in (asked.learned, asked.tested))
    assert learned
    assert tested
    assert not learned & tested
    headings = {q.about for q in (*asked.learned, *asked.tested) if q.kind == "headings"}
    # Two sections are called Examples, so this heading is not a question.
    assert headings == {f"{name} — a module" for name in ("heaps", "queues")} | {
        f"Sorting {name} by key" for name in ("heaps", "queues")
    }
    for question in (*asked.learned, *asked.tested):
        for at in question.answers:
            passage = asked.passages[at]
            if question.kind == "definitions":
                assert passage.title.lower() == question.about
            else:
                assert question.about.split()[1 if "Sorting" in question.about else 0] in passage.text


def test_all_rankings_are_measured(works: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recall, "_UNITED", 30)
    monkeypatch.setattr(recall, "CUTS", (5, dual_training.K))
    found = recall.measure(questions.ask(random.Random(0), 1, 100))
    by_all = {name: kinds["all"][str(dual_training.K)] for name, kinds in found["recall"].items()}
    # The definitions share no word with the entries, so only training pairs can teach what they mean.
    assert by_all["dpr"] > by_all["word_vectors"] + 0.3
    assert by_all["dpr"] > by_all["bm25"] + 0.3
    assert by_all["fused"] >= by_all["dpr"] - 0.1
    shown = list(verdicts({"recall": found}))
    assert [verdict.is_reached for verdict in shown if verdict.goal] == [True]


def test_fusing_weighs_both_rankings() -> None:
    sparse = [(np.array([1, 2, 3]), np.array([3.0, 2.0, 1.0], np.float32))]
    dense = [(np.array([3, 4, 1]), np.array([30.0, 20.0, 10.0], np.float32))]
    assert recall.fused(sparse, dense, 0.0)[0][:2].tolist() == [1, 2]
    assert recall.fused(sparse, dense, 100.0)[0][:2].tolist() == [3, 4]
    assert set(recall.fused(sparse, dense, 1.0)[0].tolist()) == {1, 2, 3, 4}


def test_negatives_of_a_definition_are_not_its_words_entry(works: None) -> None:
    asked = questions.ask(random.Random(0), 1, 100)
    pairs = asked.pairs()[:50]
    texts = [f"{passage.title}\n{passage.text}" for passage in asked.passages]
    negatives = hard_negatives(pairs, [passage.title for passage in asked.passages], texts)
    for pair, negative in zip(pairs, negatives, strict=True):
        if negative is not None:
            assert negative.partition("\n")[0].lower() != pair.title.lower()


def test_the_tests_things_and_ways_are_none_that_are_learned() -> None:
    rng, taken = random.Random(0), set[str]()
    learned = facts.things(rng, 50, taken, tested=False)
    tested = facts.things(rng, 50, taken, tested=True)
    assert len({thing.name for thing in (*learned, *tested)}) == 100
    assert not set(facts._ASKS) & set(facts._ASKS_TESTED)
    assert not set(facts._SAYS) & set(facts._SAYS_TESTED)
    for thing in tested:
        asked = thing.ask(rng, tested=True)
        assert asked.answer in asked.passage.text
        assert asked.negative(rng) in set(thing.passages.values()) - {asked.passage}
        assert asked.answer not in asked.text
        changed = thing.changed(rng)
        assert changed.name == thing.name
        assert changed.facts.keys() == thing.facts.keys()
        assert all(value in changed.passages[what].text for what, value in changed.facts.items())


@pytest.mark.slow
@pytest.mark.parametrize("encoder_layers", [0, 1])
def test_all_ways_of_answering_are_measured_and_judged(encoder_layers: int) -> None:
    size = answers.Size(20, 2, 3, 2, 4, 300, 16, 1, encoder_layers)
    found = answers.measure(size)
    assert set(found["exact"]) == {"closed_book", "dpr_reader", "rag_token", "rag_sequence", "gold"}
    # An untrained model may say anything, but another replica answers in place of the host that died.
    assert found["same_with_a_host_killed"] == 1
    reached = {each.what: each.is_reached for each in verdicts({"answers": found})}
    assert reached["the same answers with one of four hosts killed half-way"]
    assert reached["closed-book"]
    assert not reached["the better RAG"]
