"""Models that read a memory of their swarm: trained, resumed, evaluated and used with commands."""

import json
import logging
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from memory_samples import SampleMemory
from training_swarm import Founder, founded, talkoot

from peer.loop import LoopThread
from talkoot.model.opened import open_model
from trainer_client.training.checkpoints import load_checkpoint

WORDS = SampleMemory.with_words()
NAME = WORDS.manifest.name
READS = ("--memory", NAME, "--memory-chunk", 8, "--memory-length", 16)


@pytest.fixture(scope="module")
def founder(loop: LoopThread, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Founder]:
    """A node that hosts all experts and all of the memory."""
    with founded(loop, tmp_path_factory.mktemp("founder"), experts=8, memories=[WORDS]) as running:
        yield running


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(f"word{rng.randrange(60)}" for _ in range(300)))
    return path


def train(founder: Founder, state: Path, *options: object) -> list[object]:
    quick = ("--batch-size", 2, "--threads", 1, "--call-deadline-s", 60, "--validation-batches", 1)
    return ["train", "--join", founder.invite, "--state", state, *quick, *options]


@pytest.fixture(scope="module")
def trained(founder: Founder, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    state = tmp_path_factory.mktemp("state")
    result = state / "first.json"
    ended = talkoot(*train(founder, state, "--data", text, "--steps", 3, *READS, "--json", result))
    assert ended.status == 0, ended.err
    return state


def test_a_run_reads_and_says_what_it_read(trained: Path) -> None:
    first = json.loads((trained / "first.json").read_text())
    # Two batches of validation and three of training, each with two sequences of two chunks, and some looked up ahead.
    assert first["memory_chunks"] >= 5 * 4
    assert first["memory_failed_lookups"] == first["memory_late_batches"] == 0
    checkpoint = load_checkpoint(Path(first["checkpoint"]), Path(first["checkpoint"]).parent.name)
    assert checkpoint.header.settings["memory"] == NAME
    assert any(name.startswith("model.retrieval.attention.1.") for name in checkpoint.tensors)


def test_without_a_size_a_chunk_is_a_quarter_of_a_short_context(
    founder: Founder, text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    new = train(founder, tmp_path, "--data", text, "--steps", 1, "--json", tmp_path / "new.json")
    ended = talkoot(*new, "--memory", NAME)
    assert ended.status == 0, ended.err
    assert "passages are looked up for each 4 tokens (--memory-chunk)" in caplog.text
    checkpoint = Path(json.loads((tmp_path / "new.json").read_text())["checkpoint"])
    assert load_checkpoint(checkpoint, checkpoint.parent.name).header.settings["memory_chunk"] == 4


def test_a_resumed_run_finds_on_disk_what_was_looked_up(
    founder: Founder, text: Path, trained: Path, tmp_path: Path
) -> None:
    result = tmp_path / "again.json"
    ended = talkoot(*train(founder, trained, "--resume", "--steps", 5, "--json", result))
    assert ended.status == 0, ended.err
    again = json.loads(result.read_text())
    assert (again["resumed_at"], again["steps"]) == (3, 5)
    assert again["memory_chunks_cached"] > 0


def test_what_a_model_reads_while_it_writes_is_named(
    founder: Founder, text: Path, trained: Path, tmp_path: Path
) -> None:
    used = ("--join", founder.invite, "--state", trained)
    said = talkoot("generate", *used, "--prompt", "word7 word8 word9", "--max-tokens", 4)
    assert said.status == 0, said.err
    read = [line for line in said.err.splitlines() if line.startswith("read: title ")]
    assert read
    assert all(line.endswith("(words.txt, CC0-1.0)") for line in read)
    short = tmp_path / "short.txt"
    short.write_text(text.read_text()[:400])
    evaluated = talkoot("evaluate", short, *used, "--json")
    assert evaluated.status == 0, evaluated.err


def test_without_its_memory_a_model_writes_on_and_says_so(
    founder: Founder, trained: Path, caplog: pytest.LogCaptureFixture
) -> None:
    used = ("--join", founder.invite, "--state", trained)
    said = talkoot("generate", *used, "--prompt", "word7 word8", "--max-tokens", 2, "--memory", "away")
    assert said.status == 0, said.err
    assert "the model reads nothing: " in caplog.text
    assert "read: " not in said.err


def test_what_can_not_be_is_one_clear_line(
    founder: Founder, text: Path, trained: Path, tmp_path: Path
) -> None:
    new = train(founder, tmp_path / "state", "--data", text)
    talkoot(*new, *READS, "--memory", "away").is_one_clear_line("away")
    talkoot(*new, "--memory", NAME, "--memory-chunk", 16).is_one_clear_line(
        "memory_chunk: 16 tokens", "see only 16", "--memory-chunk 4"
    )
    talkoot(*new, *READS, "--memory-layers", 2).is_one_clear_line("memory_layers: there is no layer 2")


def test_a_model_that_reads_can_be_kept(founder: Founder, trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    export = ("export", "--join", founder.invite, "--state", trained, "--out", out, "--wait-for-experts", 0)
    ended = talkoot(*export, "--resume")
    assert ended.status == 0, ended.err
    assert ended.out.endswith(f"\nnext: talkoot serve --model {out}\n")
    assert f"the memory `{NAME}` of its swarm" in (out / "README.md").read_text()
    opened = open_model(out)
    assert opened.memory is not None
    assert (opened.memory.memory, opened.answering) == (NAME, None)
    run = max(trained.glob("runs/*/*"))
    kept = load_checkpoint(run, run.parent.name).tensors
    for name, tensor in opened.model.state_dict().items():
        assert torch.equal(tensor, kept[f"model.{name}"]), name
