"""Which passages a model may get for a chunk: none that contain what it is to predict."""

from hypothesis import given
from hypothesis import strategies as st

from dht.memory import Passage
from trainer_client.retrieval.neighbours import Chunk, Runs, chosen, chunks_of, document_of, own_documents

WORDS = st.lists(st.sampled_from(["birch", "oven", "steam", "ladle", "bench"]), max_size=40)


def passage(text: str, title: str = "t", source: str = "s") -> Passage:
    return Passage(text, title, source, 0, "CC0-1.0")


def numbered(first: int, count: int) -> str:
    return " ".join(f"w{number}" for number in range(first, first + count))


def naive_overlap(text: str, other: str) -> float:
    words, others = text.split(), other.split()
    words = words[1:-1] if len(words) > 2 else words
    length = min(8, len(words))
    runs = {" ".join(words[at : at + length]) for at in range(len(words) - length + 1)} - {""}
    padded = f" {' '.join(others)} "
    return sum(f" {run} " in padded for run in runs) / len(runs) if runs else 0.0


@given(WORDS, WORDS)
def test_overlap_is_the_share_of_runs_of_eight_whole_words(text: list[str], other: list[str]) -> None:
    words, others = " ".join(text), " ".join(other)
    assert Runs(words).overlap(others) == naive_overlap(words, others)


def test_a_passage_that_holds_the_target_is_left_out_by_how_much_of_it_there_is() -> None:
    chunk = Chunk(numbered(0, 19), numbered(19, 19))
    quarter = passage(numbered(20, 17)[: len(numbered(20, 9))] + " " + numbered(900, 20), "quarter")
    whole, other = passage(numbered(10, 60), "whole"), passage(numbered(500, 60), "other")
    assert Runs(chunk.target).overlap(quarter.text) == 0.2
    for most, expected in ((0.0, ["other"]), (0.2, ["quarter", "other"]), (1.0, ["whole", "quarter"])):
        found = chosen(chunk, [whole, quarter, other], 2, (), most)
        assert [each.title for each in found] == expected


def test_a_chunk_that_begins_and_ends_within_words_is_found_in_its_document() -> None:
    page, other = passage(numbered(1000, 60), "page"), passage(numbered(2000, 60), "other")
    for length in (20, 40, 60, 80):
        chunk = Chunk(page.text[8 : 8 + length], page.text[8 + length : 8 + 2 * length])
        assert own_documents([chunk], [[page, other]]) == {document_of(page)}
        assert chosen(chunk, [page, other], 2, (), 0.5) == [other]


def test_all_passages_of_the_documents_that_hold_a_text_are_its_own() -> None:
    chunks = [Chunk(numbered(0, 20)), Chunk(numbered(20, 20))]
    holding, beside = (
        passage(numbered(0, 40), "page", "a.jsonl:7"),
        passage(numbered(700, 40), "page", "a.jsonl:7"),
    )
    namesake = passage(numbered(800, 40), "page", "a.jsonl:8")
    own = own_documents(chunks, [[beside, namesake], [holding]])
    assert own == {document_of(holding)}
    assert chosen(chunks[0], [holding, beside, namesake], 3, own, 1.0) == [namesake]


@given(st.lists(st.integers(97, 122), max_size=40), st.integers(1, 9))
def test_each_chunk_comes_with_the_one_that_reads_its_neighbours(tokens: list[int], size: int) -> None:
    text = bytes(tokens).decode()
    chunks = chunks_of(tokens, size, lambda some: bytes(some).decode())
    assert len(chunks) == len(tokens) // size
    for number, chunk in enumerate(chunks):
        assert chunk.text == text[number * size :][:size]
        assert chunk.target == text[(number + 1) * size :][:size]
