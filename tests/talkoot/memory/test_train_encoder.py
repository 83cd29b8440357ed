"""Encoders of questions and passages: what they learn, and memories that are built with them."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import run_here
from json_lines import write_lines

from expert_server.memory.store import MemoryStore
from peer.errors import DataError, SettingsError, StartError
from talkoot.memory.build import BuildPlan, build_memory
from talkoot.memory.dual_training import NumberedTexts, tune
from talkoot.memory.train_encoder import TrainEncoderPlan, TrainEncoderReport, train_encoder
from talkoot.memory.training import Descent, Texts
from trainer_client.memory.encoder import DUAL, DualEncoder, StaticEncoder, load_encoder

TOPICS = 60


def write_samples(folder: Path) -> TrainEncoderPlan:
    """Passages about topics, each with its own words, and questions that ask about a topic in other words."""
    rng = np.random.default_rng(0)
    texts, pairs = [], []
    for number in range(600):
        topic = number % TOPICS
        words = [f"p{topic}x{n}" for n in rng.integers(0, 4, 12)]
        texts.append({"title": f"Title {number}", "text": " ".join([*words, *rng.choice(["the", "of"], 6)])})
        asked = [f"q{topic}x{n}" for n in rng.integers(0, 4, 3)]
        pairs.append({"question": " ".join(["the", *asked]), **texts[-1]})
    for name, rows in (("texts", texts), ("pairs", pairs)):
        write_lines(folder / f"{name}.jsonl", *rows)
    return TrainEncoderPlan(folder / "pairs.jsonl", (str(folder / "texts.jsonl"),), folder / "encoder")


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainEncoderPlan, TrainEncoderReport]:
    plan = write_samples(tmp_path_factory.mktemp("samples"))
    return plan, train_encoder(plan)


def test_questions_find_passages_that_share_no_word_with_them(
    learned: tuple[TrainEncoderPlan, TrainEncoderReport],
) -> None:
    plan, report = learned
    encoder = DualEncoder.from_bytes(plan.out.read_bytes())
    questions = [f"q{topic}x0 q{topic}x1" for topic in range(TOPICS)]
    passages = [f"p{topic}x2 p{topic}x3" for topic in range(TOPICS)]
    scores = encoder.encode_questions(questions).astype(np.float32) @ encoder.encode(passages).T
    assert (scores.argmax(axis=1) == np.arange(TOPICS)).mean() > 0.9
    # Training teaches the difference between the two: encoded as passages, questions would find nothing.
    assert report.pairs + (report.validation.questions if report.validation else 0) == 600
    assert report.bytes == plan.out.stat().st_size


def test_of_a_pair_without_a_title_only_passages_with_its_text_count_as_found(tmp_path: Path) -> None:
    """Here nothing can be found: questions have nothing to do with their passages."""
    rng = np.random.default_rng(0)
    texts = [{"text": " ".join(f"p{n}" for n in rng.integers(0, 200, 12))} for _ in range(600)]
    pairs = [each | {"question": " ".join(f"q{n}" for n in rng.integers(0, 200, 3))} for each in texts]
    write_lines(tmp_path / "texts.jsonl", *texts)
    write_lines(tmp_path / "pairs.jsonl", *pairs)
    report = train_encoder(
        TrainEncoderPlan(tmp_path / "pairs.jsonl", (str(tmp_path / "texts.jsonl"),), tmp_path / "encoder")
    )
    assert report.validation is not None
    assert report.pairs + report.validation.questions == 600
    assert report.validation.by_vectors < 0.5


def test_a_folder_that_takes_no_file_is_named_before_anything_is_read(tmp_path: Path) -> None:
    plan = TrainEncoderPlan(tmp_path / "no-pairs", (), Path("/proc/encoder"))
    with pytest.raises(StartError, match=r"can't write /proc/encoder: .*; pass another --out FILE"):
        train_encoder(plan)


def test_a_memory_is_built_with_a_trained_encoder(
    learned: tuple[TrainEncoderPlan, TrainEncoderReport], tmp_path: Path
) -> None:
    plan, _ = learned
    report = build_memory(BuildPlan(plan.text, tmp_path / "topics", encoder=plan.out))
    store = MemoryStore.open(tmp_path / "topics")
    assert report.unknown == 0
    assert store.manifest.encoder_kind == DUAL
    assert store.read_part(store.manifest.encoder) == plan.out.read_bytes()
    (tmp_path / "more.jsonl").write_text(json.dumps({"text": "p1x1 nobody knows these other words " * 3}))
    again = BuildPlan((str(tmp_path / "more.jsonl"),), tmp_path / "next", base=tmp_path / "topics")
    assert build_memory(again).unknown > 0.5
    manifest = MemoryStore.open(tmp_path / "next").manifest
    assert manifest.index == store.manifest.index
    load_encoder(manifest.encoder_kind, plan.out.read_bytes(), manifest.dimensions)
    with pytest.raises(SettingsError, match="--encoder"):
        build_memory(replace(again, out=tmp_path / "third", encoder=plan.out))


@pytest.mark.parametrize("data", [None, b"", b"no encoder", "static"])
def test_a_file_that_is_no_trained_encoder_is_refused(data: bytes | str | None, tmp_path: Path) -> None:
    file, texts = tmp_path / "encoder", tmp_path / "text.txt"
    texts.write_text("Some words.")
    if data == "static":
        one = np.ones(1, np.float32)
        data = StaticEncoder(["oak"], np.ones((1, 8), np.int8), one, one).to_bytes()
    if isinstance(data, bytes):
        file.write_bytes(data)
    with pytest.raises(DataError, match="--encoder"):
        build_memory(BuildPlan((str(texts),), tmp_path / "memory", encoder=file))
    assert not (tmp_path / "memory").exists()


def test_the_command_says_what_it_learned_gives_the_same_for_a_seed_and_refuses_too_few_pairs(
    learned: tuple[TrainEncoderPlan, TrainEncoderReport], tmp_path: Path
) -> None:
    plan = write_samples(tmp_path)
    arguments = ("memory", "train-encoder", str(plan.pairs), "--text", *plan.text, "-o", str(plan.out))
    ended = run_here(*arguments)
    assert ended.returncode == 0, ended.stderr
    assert plan.out.read_bytes() == learned[0].out.read_bytes()
    assert "has an encoder of" in ended.stdout
    assert f"talkoot memory build FILES --encoder {plan.out}" in ended.stdout
    assert "exists" in run_here(*arguments).stderr
    plan.out.unlink()
    plan.pairs.write_text("".join(plan.pairs.read_text().splitlines(keepends=True)[:20]))
    ended = run_here(*arguments)
    assert ended.returncode != 0
    assert "give at least 100" in ended.stderr


def test_the_weight_of_words_is_the_one_that_finds_most() -> None:
    """Here vectors carry no information, and words carry all of it."""
    rng = np.random.default_rng(0)
    words = [f"w{n}" for n in range(200)]
    ones = np.ones(200, np.float32)
    passages = StaticEncoder(words, rng.integers(-127, 128, (200, 64)).astype(np.int8), ones, ones)
    questions = StaticEncoder(words, rng.integers(-127, 128, (200, 64)).astype(np.int8), ones, ones)
    texts = [f"title {n}\nw{n}" for n in range(60)]
    answers = [np.array([n]) for n in range(60)]
    found = tune(DualEncoder(questions, passages, 0.25), [f"w{n}" for n in range(60)], texts, answers)
    assert found.by_words_too == 1 > found.by_vectors
    assert found.word_weight > 0
    same = tune(DualEncoder(passages, passages, 0.25), [f"w{n}" for n in range(60)], texts, answers)
    assert same.by_vectors == same.by_words_too == 1


def test_a_step_follows_the_gradient_with_negatives_too() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(12, 6)).astype(np.float32)
    q = NumberedTexts(np.array([0, 1, 2, 3], np.int32), np.array([0, 2, 4]))
    p = NumberedTexts(np.array([4, 5, 6, 7, 8, 9], np.int32), np.array([0, 2, 3, 5, 6]))
    some: tuple[Texts, Texts] = (q.some(np.arange(2)), p.some(np.arange(4)))
    table = torch.from_numpy(vectors.copy()).requires_grad_()
    q_BD, p_PD = (
        torch.nn.functional.normalize(
            torch.stack(
                [table[part].sum(0) for part in np.split(texts.numbers, np.cumsum(texts.lengths)[:-1])]
            )
        )
        for texts in some
    )
    scores = q_BD @ p_PD.T / 0.3
    right = torch.arange(2)
    cross_entropy = torch.nn.functional.cross_entropy
    loss = (cross_entropy(scores, right) + cross_entropy(scores[:, :2].T, right)) / 2
    loss.backward()
    before = vectors.copy()
    assert Descent(vectors, 0.3).step(*some, 0.1) == pytest.approx(loss.item(), abs=1e-5)
    assert table.grad is not None
    gradient = table.grad.numpy()
    used = np.linalg.norm(gradient, axis=1) > 0
    # Adagrad's first step has the same length for each word, against its gradient.
    step = (before - vectors)[used]
    lengths = np.linalg.norm(gradient[used], axis=1, keepdims=True)
    np.testing.assert_allclose(step, 0.1 * 6**0.5 * gradient[used] / lengths, rtol=2e-3, atol=1e-5)
    np.testing.assert_array_equal(vectors[~used], before[~used])


def test_what_is_missing_is_said_before_anything_is_learned(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plan = write_samples(tmp_path)
    shown: list[str] = []
    with pytest.raises(SettingsError, match="is not a folder"):
        train_encoder(replace(plan, out=tmp_path / "nowhere" / "encoder"), lambda what, _: shown.append(what))
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(SettingsError, match="the extra retrieval"):
        train_encoder(plan, lambda what, _: shown.append(what))
    assert not shown
