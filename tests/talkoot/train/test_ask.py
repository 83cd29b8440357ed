"""Models that answer questions from a memory of their swarm: trained, resumed and asked with commands."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from json_lines import write_lines
from memory_samples import MEMORY, SampleMemory
from served_model import served
from training_swarm import MANIFEST, TEXT, Founder, founded, signals_restored, talkoot

from peer.errors import DataError, LibraryError
from peer.loop import LoopThread
from talkoot.memory.search import check_found
from talkoot.options import command
from talkoot.serve.model import model_of_swarm
from talkoot.terminal import LogFormat
from trainer_client.memory.retriever import SearchResult
from trainer_client.settings import TrainerSettings
from trainer_client.training.checkpoints import load_checkpoint

WORDS = SampleMemory.with_words()


def named(name: str, memory: SampleMemory) -> SampleMemory:
    return replace(memory, manifest=replace(memory.manifest, name=name))


OTHER = named("other", SampleMemory.with_words(1))
EMPTY = named("empty", WORDS.revoking(*range(len(WORDS.passages))))
MEMORIES = (WORDS, OTHER, EMPTY)
NAME = WORDS.manifest.name
MODEL = MANIFEST.model.model_copy(update={"context": 64})
QUICK = ("--batch-size", 2, "--threads", 1, "--call-deadline-s", 60, "--validation-batches", 1)


@pytest.fixture(scope="module")
def founder(loop: LoopThread, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Founder]:
    """A node that hosts all experts and three memories. One memory has only revoked passages."""
    folder, parts = tmp_path_factory.mktemp("founder"), {"model": MODEL}
    with founded(loop, folder, experts=8, parts=parts, memories=MEMORIES) as running:
        yield running


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    rows = [
        {"question": f"what is word{n}?", "answers": [f"word{n + 1}"] if n % 3 else []} for n in range(20)
    ]
    return write_lines(path, *rows)


def train(founder: Founder, state: Path, *options: object) -> list[object]:
    return ["train", "--join", founder.invite, "--state", state, *QUICK, *options]


def learning(questions: Path) -> tuple[object, ...]:
    return ("--data", questions, "--objective", "rag-token", "--memory", NAME, "--memory-length", 16)


@pytest.fixture(scope="module")
def trained(founder: Founder, questions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    state = tmp_path_factory.mktemp("state")
    ended = talkoot(
        *train(founder, state, *learning(questions), "--steps", 3, "--json", state / "first.json")
    )
    assert ended.status == 0, ended.err
    return state


def test_a_run_learns_from_questions_and_is_resumed(founder: Founder, trained: Path, questions: Path) -> None:
    first = json.loads((trained / "first.json").read_text())
    assert first["memory_chunks"] >= 4 * 2
    assert (
        first["memory_failed_lookups"] == first["memory_late_batches"] == first["memory_chunks_without"] == 0
    )
    checkpoint = load_checkpoint(Path(first["checkpoint"]), Path(first["checkpoint"]).parent.name)
    assert checkpoint.header.encoder == WORDS.manifest.encoder.sha256.hex()
    assert any(name.startswith("model.questions.") for name in checkpoint.tensors)
    again = train(founder, trained, "--resume", "--steps", 5, "--json", trained / "again.json")
    ended = talkoot(*again)
    assert ended.status == 0, ended.err
    assert json.loads((trained / "again.json").read_text())["resumed_at"] == 3
    assert f"next: talkoot ask --join INVITE --state {trained} 'YOUR QUESTION'" in ended.out
    talkoot(*train(founder, trained, "--resume", "--objective", "causal")).is_one_clear_line("objective: ")
    talkoot(*train(founder, trained, "--resume", "--steps", 9, "--memory", "other")).is_one_clear_line(
        "with the encoder of another memory"
    )


def test_an_answer_has_its_sources(founder: Founder, trained: Path) -> None:
    asked = ("ask", "what is word7?", "--join", founder.invite, "--state", trained)
    for options in ((), ("--objective", "rag-sequence", "--memory-passages", 3)):
        found = talkoot(*asked, "--json", *options)
        assert found.status == 0, found.err
        values = json.loads(found.out)
        assert values["memory"].startswith(NAME)
        assert 0 < values["probability"] <= 1
        assert values["answer"] is None or values["answer"].strip()
        assert len(values["sources"]) == (3 if options else 2)
        for answer in (values, *values["other_answers"]):
            assert sum(source["share"] for source in answer["sources"]) == pytest.approx(1)
        assert values["sources"][0]["license"] == "CC0-1.0"
        assert (values["missing_cells"], values["unanswered_rows"]) == ([], 0)
    used = ("--join", founder.invite, "--state", trained)
    for typed in (
        ("ask", "what is word7\udcff?", *used),
        ("generate", "--prompt", "what is word7\udcff?", "--memory", NAME, *used),
    ):
        told = talkoot(*typed)
        assert told.status == 0, told.err
        assert "from title " in told.out
        assert "(words.txt, CC0-1.0)" in told.out


def test_a_model_that_answers_can_be_kept_and_asked_without_the_swarms_experts(
    founder: Founder, trained: Path, tmp_path: Path
) -> None:
    invite, out = tmp_path / "invite", tmp_path / "model"
    invite.write_text(founder.invite)
    used = ("--join", f"@{invite}", "--state", trained)
    ended = talkoot("export", "-o", out, "--resume", "--wait-for-experts", 0, *used)
    assert ended.status == 0, ended.err
    assert ended.out.endswith(f"\nnext: talkoot ask --join @{invite} --model {out} 'YOUR QUESTION'\n")
    card = (out / "README.md").read_text()
    assert f"the memory `{NAME}` of its swarm" in card
    asked = ("ask", "what is word7?", "--json")
    there, here = (json.loads(talkoot(*asked, *used, *more).out) for more in ((), ("--model", out)))
    assert here["answer"] == there["answer"]
    assert here["probability"] == pytest.approx(there["probability"], rel=0.05)
    assert [source["text"] for source in here["sources"]] == [source["text"] for source in there["sources"]]
    more = json.loads(talkoot(*asked, *used, "--model", out, "--memory-passages", 3).out)
    assert len(more["sources"]) == 3
    talkoot(*asked, *used, "--model", out, "--memory", "other").is_one_clear_line(
        "with the encoder of another memory"
    )
    talkoot("serve", "--model", out, "--port", 0).is_one_clear_line("talkoot ask --model")
    importing = ("import", out, "--state", tmp_path / "node", "--trainer-state", tmp_path / "trainer")
    talkoot(*importing, "--out", tmp_path / "swarm.toml").is_one_clear_line("reads the memory")


def test_questions_to_a_server_are_answered_with_their_sources(
    loop: LoopThread, founder: Founder, trained: Path
) -> None:
    settings = TrainerSettings.load(state=trained)
    with (
        signals_restored(),
        command(LogFormat.TEXT) as (terminal, signals),
        model_of_swarm(terminal, signals, founder.invite, settings) as model,
        served(loop, model) as address,
        httpx.Client(base_url=f"{address}v1/", timeout=120) as http,
    ):
        asked = {"model": "village", "messages": [{"role": "user", "content": "what is word7?"}]}
        told = http.post("chat/completions", json=asked)
        assert told.status_code == 200, told.text
        answer = told.json()
        text = answer["choices"][0]["message"]["content"]
        assert text.endswith(" does not say it in the 2 passages that fit best.") or (
            answer["talkoot"]["sources"][0]["source"] == "words.txt"
        )
        assert answer["talkoot"]["nodes"]
        asked["messages"] = [{"role": "user", "content": "mikä on kiuas?"}]
        text = http.post("chat/completions", json=asked).json()["choices"][0]["message"]["content"]
        assert text.startswith("Nothing found: memory ")
        assert "knows no word of this question" in text


@pytest.mark.slow
def test_an_encoder_decoder_reads_and_answers(loop: LoopThread, questions: Path, tmp_path: Path) -> None:
    parts = {"model": MODEL.model_copy(update={"causal": (False, True)})}
    with founded(loop, tmp_path, experts=8, parts=parts, memories=[WORDS]) as founder:
        state, result = tmp_path / "trainer", tmp_path / "result.json"
        learned = (*learning(questions), "--steps", 2, "--json", result)
        ended = talkoot(*train(founder, state, *learned))
        assert ended.status == 0, ended.err
        assert json.loads(result.read_text())["memory_chunks_without"] == 0
        counts = {uid: expert.update_count for uid, expert in founder.node.runtime.experts.items()}
        assert {uid.layer for uid, count in counts.items() if count} == {0, 1}, "the encoder's learn, too"
        asked = ("ask", "what is word7?", "--join", founder.invite, "--state", state, "--json")
        for options in ((), ("--objective", "rag-sequence")):
            found = talkoot(*asked, *options)
            assert found.status == 0, found.err
            values = json.loads(found.out)
            assert values["answer"] is None or values["answer"].strip()
            assert sum(source["share"] for source in values["sources"]) == pytest.approx(1)
            assert values["unanswered_rows"] == 0


def test_what_can_not_be_answered_is_one_clear_line(
    founder: Founder, trained: Path, questions: Path, tmp_path: Path
) -> None:
    used = ("--join", founder.invite, "--state", trained)
    talkoot("ask", "mikä on kiuas?", *used).is_one_clear_line("knows no word of this question")
    talkoot("ask", " ", *used).is_one_clear_line("ask something")
    talkoot("ask", "what?", "--join", founder.invite, "--state", tmp_path / "new").is_one_clear_line(
        "no checkpoint of this swarm", "Without a model, `talkoot search` finds passages"
    )
    talkoot("ask", "what? " * 2000, *used).is_one_clear_line("shorten it to 10000")
    talkoot("ask", f"word1 {'and more ' * 20}?", *used).is_one_clear_line("tokens", "shorten the question")
    talkoot("ask", "what?", *used, "--memory", "other").is_one_clear_line(
        "with the encoder of another memory"
    )
    talkoot("ask", "what?", *used, "--memory", "away").is_one_clear_line("away")
    talkoot("ask", "what is word1?", *used, "--memory", "empty").is_one_clear_line(
        "nothing found: memory empty"
    )
    talkoot("generate", *used).is_one_clear_line("ask something")
    talkoot("evaluate", questions, *used).is_one_clear_line("talkoot ask")
    new = tmp_path / "new"
    talkoot(*train(founder, new, *learning(questions)[:4])).is_one_clear_line("pass --memory NAME")
    talkoot(*train(founder, new, *learning(questions), "--data", __file__)).is_one_clear_line(".jsonl files")
    long = tmp_path / "long.jsonl"
    long.write_text(questions.read_text() + json.dumps({"question": "why? " * 20, "answers": []}) + "\n")
    talkoot(*train(founder, new, *learning(questions), "--data", long)).is_one_clear_line(
        "question 41, 'why? why? ", "tokens", "shorten the question"
    )


def test_a_model_of_text_answers_no_questions(founder: Founder, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    ended = talkoot(*train(founder, tmp_path, "--data", text, "--steps", 1))
    assert ended.status == 0, ended.err
    asked = talkoot("ask", "why?", "--join", founder.invite, "--state", tmp_path)
    asked.is_one_clear_line("has not learned to answer questions", "--objective rag-sequence")


def test_nothing_found_is_said_as_such() -> None:
    with pytest.raises(DataError, match="knows no word of this question"):
        check_found(MEMORY, SearchResult((), is_understood=False))
    with pytest.raises(LibraryError, match="no live host"):
        check_found(MEMORY, SearchResult((), missing=((0, 1),)))
    with pytest.raises(DataError, match="nothing found: memory docs-abcdefghijkl has no passages near"):
        check_found(MEMORY, SearchResult(()))
