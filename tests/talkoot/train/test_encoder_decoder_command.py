"""An encoder-decoder with commands: trained on a node's experts, resumed, and asked to fill gaps."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from training_swarm import MANIFEST, TEXT, Founder, founded, talkoot

from dht.invites import Invite
from peer.loop import LoopThread
from trainer_client.training.checkpoints import checkpoint_folder, load_checkpoint

MODEL = MANIFEST.model.model_copy(update={"causal": (False, True), "context": 24})


@pytest.fixture(scope="module")
def founder(loop: LoopThread, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Founder]:
    with founded(loop, tmp_path_factory.mktemp("founder"), experts=8, parts={"model": MODEL}) as running:
        yield running


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "sauna.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def state(founder: Founder, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The state folder of a run with three steps."""
    state = tmp_path_factory.mktemp("state")
    quick = ("--batch-size", 2, "--threads", 1, "--call-deadline-s", 60, "--data", text, "--steps", 3)
    ended = talkoot(
        *("train", "--join", founder.invite, "--state", state, "--objective", "span-corruption", *quick)
    )
    assert ended.status == 0, ended.err
    assert ended.out.startswith("trained 3 steps in ")
    return state


def test_a_run_is_resumed_with_its_objective(founder: Founder, state: Path, tmp_path: Path) -> None:
    used, result = ("train", "--join", founder.invite, "--state", state, "--resume"), tmp_path / "result.json"
    talkoot(*used, "--objective", "infilling", "--steps", 4).is_one_clear_line(
        "objective: the checkpoint's model has span-corruption, and can't change to infilling"
    )
    ended = talkoot(*used, "--steps", 4, "--json", result)
    assert ended.status == 0, ended.err
    summary = json.loads(result.read_text())
    assert (summary["steps"], summary["resumed_at"]) == (4, 3)
    swarm_id = Invite.parse(founder.invite).keys.swarm_id
    checkpoint = load_checkpoint(checkpoint_folder(None, state, swarm_id, newest=True), swarm_id)
    assert checkpoint.header.settings["objective"] == "span-corruption"


@pytest.mark.parametrize("prompt", ["In the <extra_id_0>na one", "In the sauna", ""])
def test_a_prompt_goes_to_the_encoder_with_its_marks(founder: Founder, state: Path, prompt: str) -> None:
    used = ("generate", "--join", founder.invite, "--state", state, "--max-tokens", 3, "--seed", 1)
    said = talkoot(*used, "--prompt", prompt)
    assert said.status == 0, said.err
    assert said.out.endswith("\n")


def test_commands_that_can_only_go_on_with_a_text_say_so(
    founder: Founder, state: Path, text: Path, tmp_path: Path
) -> None:
    used = ("--join", founder.invite, "--state", state, "--p2pd", "off")
    for command in (
        ("evaluate", text, *used),
        ("serve", *used, "--port", 0),
        ("export", "--resume", *used, "-o", tmp_path / "model"),
    ):
        talkoot(*command).is_one_clear_line("this swarm's model is an encoder-decoder")
    talkoot("generate", *used, "--memory", "docs", "--prompt", "In").is_one_clear_line("memory: ")


def test_objectives_of_encoder_decoders_are_for_models_with_an_encoder(tmp_path: Path, text: Path) -> None:
    plain, pairs = tmp_path / "plain.toml", tmp_path / "pairs.toml"
    sizes = "[model]\nhidden = 16\nheads = 2\ncontext = 24\n{}[experts]\ngrid = [2, 2]\nwidth = 8\n"
    plain.write_text('name = "plain"\n' + sizes.format(""))
    pairs.write_text('name = "pairs"\n' + sizes.format("causal = [false, true]\n"))
    few = ("--steps", 1, "--batch-size", 2, "--threads", 1, "--state", tmp_path / "state")
    quick = (*few, "--data", text)
    talkoot("train", "--local", plain, "--objective", "infilling", *quick).is_one_clear_line(
        "objective: infilling is for models with an encoder, but this swarm's model has none"
    )
    ended = talkoot("train", "--local", pairs, "--objective", "permutation", *quick)
    assert ended.status == 0, ended.err
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"question": "Where?", "answers": ["There"]}\n' * 20)
    asked = ("--objective", "rag-token", "--memory", "docs", *few, "--data", questions)
    talkoot("train", "--local", pairs, *asked).is_one_clear_line("with --local there are no nodes")
    talkoot("train", "--local", pairs, "--memory", "docs", *quick).is_one_clear_line(
        "memory: an encoder-decoder can't read a memory while it writes"
    )
