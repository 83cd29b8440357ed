"""The benchmark of memories, on a memory of random words that is built quickly."""

import gzip
import random
from pathlib import Path

import numpy as np
import pytest

from benchmarks.memory import corpora, hops, hosting, large, lying, recall, relevance
from benchmarks.memory.__main__ import PARTS, missing
from benchmarks.memory.built import BuiltMemory, open_shards, write_memory
from benchmarks.memory.goals import verdicts
from dht.memory import MemoryManifest, Passage, Place
from talkoot.memory.clustering import build_codebook, two_cells
from trainer_client.memory.encoder import StaticEncoder

WORDS, DIMENSIONS, PASSAGES = 300, 32, 600


@pytest.fixture(scope="module")
def memory() -> BuiltMemory:
    rng = np.random.default_rng(0)
    words = [f"word{number}" for number in range(WORDS)]
    passages = [Passage(" ".join(rng.choice(words, 30)), f"t{n}", "a", n, "CC0-1.0") for n in range(PASSAGES)]
    word_vectors = rng.integers(-127, 128, (WORDS, DIMENSIONS), np.int8)
    ones = np.ones(WORDS, np.float32)
    encoder = StaticEncoder(words, word_vectors, ones, ones)
    vectors_ND = encoder.encode([passage.text for passage in passages])
    codebook = build_codebook(vectors_ND, (4, 4))
    return BuiltMemory(passages, vectors_ND, two_cells(codebook, vectors_ND), encoder, codebook, (4, 4))


@pytest.fixture(scope="module")
def folder(memory: BuiltMemory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("memory") / "written"
    write_memory(folder, memory, memory.vectors_ND, memory.cells_NT, lambda n: memory.passages[n])
    return folder


def questions(memory: BuiltMemory, count: int) -> list[str]:
    rng = random.Random(0)
    return [recall.span(rng.choice(memory.passages).text, rng) for _ in range(count)]


def test_what_was_written_has_every_passage_in_its_cells(memory: BuiltMemory, folder: Path) -> None:
    manifest = MemoryManifest.parse((folder / "manifest").read_bytes())
    found: dict[Place, list[tuple[int, ...]]] = {}
    texts: dict[Place, str] = {}
    for info, shard in open_shards(folder, manifest):
        for entry in shard.read(range(len(shard))):
            found.setdefault(entry.text, []).append(info.cell)
            if entry.passage is not None:
                texts[entry.place] = entry.passage.text
    cells = {
        passage.text: [divmod(int(cell), 4) for cell in some]
        for passage, some in zip(memory.passages, memory.cells_NT, strict=True)
    }
    assert {texts[place]: some for place, some in found.items()} == cells


def test_recall_is_what_the_asked_cells_have_of_the_ten_best(memory: BuiltMemory) -> None:
    texts = questions(memory, 20)
    found = recall.measure_recall(memory, {"questions": texts})
    recalls = [found["questions"]["recall"][str(asked)] for asked in recall.ASKED]
    assert recalls == sorted(recalls)
    assert recalls[-2:] == [1.0, 1.0]  # 16 cells are all
    assert found["questions"]["searched"]["16"] == 2 * PASSAGES
    vectors_QD = memory.encoder.encode(texts)
    nearest_Q2 = memory.codebook.assign(vectors_QD, 2)
    exact = memory.vectors_ND.astype(int) @ vectors_QD.T.astype(int)
    expected = []
    for query, cells in enumerate(nearest_Q2):
        inside = np.isin(memory.cells_NT, cells).any(axis=1)
        tenth = np.sort(exact[:, query])[-recall.K]
        expected.append(min(recall.K, int((exact[inside, query] >= tenth).sum())) / recall.K)
    assert recalls[recall.ASKED.index(2)] == pytest.approx(np.mean(expected))


def test_more_cells_take_more_bytes(memory: BuiltMemory) -> None:
    assert recall.wire_bytes(memory, 8) == recall.wire_bytes(memory, 1) + 7 * 36


@pytest.mark.slow
def test_every_lie_is_found_out_and_none_believed(memory: BuiltMemory, folder: Path) -> None:
    found = lying.measure(memory, folder, questions(memory, 24), list(lying.KINDS))
    for kind, figures in found.items():
        assert (figures["believed"], figures["failed"]) == (0, 0), kind
    assert found["honest"]["recall"] == 1.0
    assert found["honest"]["noticed"] == 0
    assert found["forged text"]["noticed"] == found["malformed answers"]["noticed"] == lying.LIARS


@pytest.mark.slow
def test_what_one_host_leaves_out_the_host_of_the_other_cell_mostly_finds(
    memory: BuiltMemory, folder: Path
) -> None:
    omitting = lying.measure(memory, folder, questions(memory, 200), ["omits the best"])["omits the best"]
    assert omitting["recall"] < 1.0
    assert omitting["noticed"] == lying.LIARS


@pytest.mark.slow
def test_later_searches_take_two_round_trips(memory: BuiltMemory, folder: Path) -> None:
    found = hops.measure(memory, folder, questions(memory, 4), [20], 1)["20"]
    assert found["warm_ms_max"] == pytest.approx(2000 * lying.RTT_S)
    assert found["cold_ms_mean"] > found["warm_ms_mean"]


@pytest.mark.slow
def test_simulated_hosts_take_shards_until_each_has_two_replicas_also_after_some_died() -> None:
    (found,) = hosting.measure([hosting.SwarmSize(16, 4, 32, 2)]).values()
    assert 8 <= found["regions_of_host"] <= 16
    assert 0 < found["hosted_s"] < 600
    # before a shard is taken again, the dead hosts' announcements must have expired
    assert 1 < found["hosted_again_periods"] <= hosting.PERIODS
    assert 0 < found["kbit_per_s"] < hosting.KBIT_PER_S


@pytest.mark.slow
def test_a_large_memory_is_found_in_a_process_of_its_own(memory: BuiltMemory, tmp_path: Path) -> None:
    found = large.measure(memory, 2 * PASSAGES, 10, tmp_path / "large")
    assert found["passages"] == 2 * PASSAGES
    assert 0 < found["recall"] <= 1
    assert found["disk_bytes"] > 2 * 2 * PASSAGES * DIMENSIONS  # of two copies


def test_a_definition_finds_the_entry_of_another_dictionary(memory: BuiltMemory) -> None:
    rng = np.random.default_rng(1)
    entries = [
        Passage(passage.text, f"Title{n}", f"gcide.jsonl:{n}", n, "x")
        for n, passage in enumerate(memory.passages)
    ]
    known = BuiltMemory(entries, memory.vectors_ND, memory.cells_NT, memory.encoder, memory.codebook, (4, 4))
    definitions = (
        corpora.Definition(f"title{n}", " ".join(rng.permutation(entries[n].text.split()))) for n in range(9)
    )
    asked = relevance.questions_of(definitions, entries, 5, random.Random(0))
    assert len(asked) == 5
    assert all(len(question.answers) == 1 for question in asked)
    assert relevance.measure(known, asked)["inner_product"] == {"hit_at_1": 1.0, "hit_at_10": 1.0}


def test_dictionaries_are_read_as_dictd_writes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["about the dictionary", "Sauna\n  a hot  room", "Löyly\n  steam"]
    data = [text.encode() for text in texts]
    begins = [0, len(data[0]), len(data[0]) + len(data[1])]
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"

    def number(value: int) -> str:
        return digits[value // 64] + digits[value % 64]

    titles = [("00-database", 0), ("sauna", 1), ("Sauna", 1), ("löyly", 2)]
    index = "".join(f"{title}\t{number(begins[n])}\t{number(len(data[n]))}\n" for title, n in titles)
    (tmp_path / "works.index").write_text(index)
    with gzip.open(tmp_path / "works.dict.dz", "wb") as file:
        file.write(b"".join(data))
    monkeypatch.setattr(corpora, "_DICTIONARIES", tmp_path)
    assert list(corpora.dictionary("works")) == [
        corpora.Entry("sauna", "Sauna a hot room"),
        corpora.Entry("löyly", "Löyly steam"),
    ]


def test_help_is_there_where_no_work_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_DICTIONARIES", "_WORDNET", "_DOCUMENTATION"):
        monkeypatch.setattr(corpora, name, tmp_path / "nothing")
    monkeypatch.setattr(corpora, "find_spec", lambda name: None)
    assert corpora.installed() == [corpora.HELP]
    (file,) = corpora.write(corpora.installed(), tmp_path)
    assert len(file.read_text().splitlines()) > 50
    assert list(corpora.definitions()) == []
    assert "apt-get install dict-gcide" in missing()


def test_goals_are_judged_by_their_figures() -> None:
    recalls = {str(asked): 0.76 for asked in recall.ASKED}
    kind = {"recall": recalls, "searched": {str(asked): 1.0 for asked in recall.ASKED}}
    found = {"passages": 10, "cells": 256, "largest_vs_mean": 2.0, "texts": kind, "questions": kind}
    judged = [verdict.words for verdict in verdicts({"recall": found}) if verdict.is_reached is not None]
    assert judged == ["missed", "reached"]
    liars = {
        "queries": 9,
        "believed": 0,
        "failed": 0,
        "noticed_after": None,
        "recall_since": None,
    }
    judged = [verdict.words for verdict in verdicts({"lying": {lying.OMITTERS[0]: liars}})]
    assert judged == ["reached", "missed"]
    assert set(PARTS) >= {"recall", "relevance", "large", "throughput", "killed", "lying", "hops", "hosting"}
