"""Training, evaluating and generating with commands."""

import errno
import io
import json
import logging
import math
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from training_swarm import TEXT, Founder, founded, talkoot

from dht.invites import Invite
from dht.manifest import AdmissionSpec
from expert_server.status import NodeState
from peer import checkpoints
from peer.errors import CheckpointError, RevokedInviteError
from peer.loop import LoopThread
from peer.transport.addresses import Multiaddress
from peer.transport.endpoints import Endpoint
from talkoot import signals
from talkoot.train import session
from trainer_client.client import SwarmClient
from trainer_client.inference import Evaluation, evaluations
from trainer_client.model import LanguageModel, SequenceState
from trainer_client.settings import PRESETS
from trainer_client.training.checkpoints import CheckpointWriter, checkpoint_folder, load_checkpoint
from trainer_client.training.loop import Training
from trainer_client.training.record import Summary

SHORT = TEXT[: len(TEXT) // 6]
"""A short text, since it is evaluated again and again, one window at a time."""
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def founder(loop: LoopThread, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Founder]:
    with founded(loop, tmp_path_factory.mktemp("founder"), experts=8) as running:
        yield running


@pytest.fixture(autouse=True)
def _all_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "sauna.txt"
    path.write_text(SHORT)
    return path


def train(founder: Founder, state: Path, *options: object) -> list[object]:
    quick = ("--batch-size", 2, "--threads", 1, "--call-deadline-s", 60)
    return ["train", "--join", founder.invite, "--state", state, *quick, *options]


@pytest.fixture(scope="module")
def run_of_two_steps(founder: Founder, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    state = tmp_path_factory.mktemp("trained")
    assert talkoot(*train(founder, state, "--data", text, "--steps", 2)).status == 0
    return state


@pytest.fixture
def trained(run_of_two_steps: Path, tmp_path: Path) -> Path:
    """A state folder with a run of two steps."""
    return shutil.copytree(run_of_two_steps, tmp_path / "state")


def test_a_run_is_saved_resumed_evaluated_and_speaks(
    founder: Founder, text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state, checkpoint, log = tmp_path / "state", tmp_path / "mine", tmp_path / "log.jsonl"
    kept = ("--checkpoint", checkpoint, "--log", log)
    first = talkoot(
        *train(
            founder,
            state,
            "--data",
            text,
            "--tokenizer",
            "bpe",
            "--vocabulary",
            300,
            "--name",
            "Carla",
            "--steps",
            3,
            *kept,
        )
    )
    assert first.status == 0, first.err
    assert f"checkpoint of step 3 in {checkpoint}" in caplog.text
    assert "validation loss before the first step: " in caplog.text
    assert "the first calls take longest" in caplog.text
    assert first.out.startswith("trained 3 steps in ")
    assert f"next: talkoot generate --join INVITE --state {state} --checkpoint {checkpoint}" in first.out
    plot, result = tmp_path / "loss.png", tmp_path / "result.json"
    again = talkoot(*train(founder, state, "--resume", "--steps", 5, *kept, "--plot", plot, "--json", result))
    assert again.status == 0, again.err
    assert "resuming after step 3" in caplog.text
    assert "resuming with other settings" not in caplog.text
    assert caplog.text.count("validation loss after step 3: ") == 2
    assert "from the checkpoint: validation loss after step 3: " in caplog.text
    swarm_id = Invite.parse(founder.invite).keys.swarm_id
    assert load_checkpoint(checkpoint, swarm_id).header.settings["name"] == "Carla"
    summary = json.loads(result.read_text())
    assert (summary["steps"], summary["resumed_at"], summary["checkpoint"]) == (5, 3, str(checkpoint))
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert {line["experts_live"] for line in lines} == {8}
    assert plot.read_bytes().startswith(PNG)

    evaluated = talkoot("evaluate", text, "--join", founder.invite, "--checkpoint", checkpoint, "--json")
    assert re.search(r"evaluating: [\d,]+ of [\d,]+ tokens, [\d,]+ a second", caplog.text)
    values = json.loads(evaluated.out.splitlines()[-1])
    assert values["bytes"] == len(SHORT) - len("In"), "nothing predicts the first token"
    assert values["tokens"] < values["bytes"]
    assert values["step"] == 5
    assert values["loss"] == pytest.approx(summary["validation_loss_last"], abs=0.5)

    generate = (
        "generate",
        "--join",
        founder.invite,
        "--checkpoint",
        checkpoint,
        "--max-tokens",
        5,
        "--seed",
        1,
    )
    said = talkoot(*generate, "--prompt", "In the sauna")
    assert said.status == 0, said.err
    assert said.out.endswith("\n")
    assert said.out.strip()


def test_no_other_trainer_can_save_in_the_folder_of_a_run_while_it_trains(
    founder: Founder, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, run = CheckpointWriter(tmp_path / "mine", 1), Training.run

    def run_beside(training: Training, *arguments: Any, **options: Any) -> Summary:
        with pytest.raises(CheckpointError, match="another trainer saves its run"):
            other.open(resumes=True)
        return run(training, *arguments, **options)

    monkeypatch.setattr(Training, "run", run_beside)
    options = ("--data", text, "--steps", 1, "--checkpoint", other.folder)
    assert talkoot(*train(founder, tmp_path / "state", *options)).status == 0
    other.open(resumes=True)


def test_a_trainer_has_the_settings_that_go_with_the_swarms_preset(founder: Founder, trained: Path) -> None:
    swarm_id = Invite.parse(founder.invite).keys.swarm_id
    run = checkpoint_folder(None, trained, swarm_id, newest=True)
    settings = load_checkpoint(run, swarm_id).header.settings
    assert settings["preset"] == "transformer"
    assert settings.items() >= PRESETS["transformer"].items()


def test_the_newest_run_is_taken_by_default(
    founder: Founder, trained: Path, text: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ended = talkoot("evaluate", text, "--join", founder.invite, "--state", trained)
    assert ended.status == 0, ended.err
    assert "perplexity" in ended.out
    assert "using the newest run" in caplog.text
    assert talkoot(*train(founder, trained, "--data", text, "--steps", 1)).status == 0
    assert "starting a new run; --resume would continue run" in caplog.text


def test_an_evaluation_that_is_stopped_prints_the_figures_so_far(
    founder: Founder,
    trained: Path,
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def interrupted(*arguments: Any) -> Iterator[Evaluation]:
        for number, found in enumerate(evaluations(*arguments)):
            if number == 1:
                signal.raise_signal(signal.SIGINT)
            yield found

    monkeypatch.setattr("talkoot.train.trained.evaluations", interrupted)
    given = ("evaluate", text, "--join", founder.invite, "--state", trained, "--json")
    ended = talkoot(*given)
    assert ended.status == 130, ended.err
    done = 2 * founder.node.swarm.manifest.model.context  # one batch
    assert json.loads(ended.out.splitlines()[-1])["tokens"] == done
    assert f"stopped: these are the figures for the first {done} of " in caplog.text


@pytest.mark.parametrize("command", [("generate",), ("train", "--resume")])
def test_without_a_run_an_invite_that_only_lets_people_look_says_so(
    loop: LoopThread, tmp_path: Path, command: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    rules = AdmissionSpec(mode="token")
    with founded(loop, tmp_path, experts=8, name="club", parts={"admission": rules}) as club:
        ended = talkoot(*command, "--join", club.invite, "--state", tmp_path / "none")
    ended.is_one_clear_line("this swarm admits by token: ask its founder for an invite of your own")
    assert "no saved run: asking what the invite allows" in caplog.messages
    assert caplog.messages.count("making ready") == command.count("train")


def test_a_model_that_learned_to_read_no_memory_is_given_none(founder: Founder, trained: Path) -> None:
    used = ("--join", founder.invite, "--state", trained)
    talkoot("generate", *used, "--memory", "docs").is_one_clear_line(
        "memory: this model has not learned to read one"
    )


def test_several_texts_are_compared(founder: Founder, trained: Path, text: Path, tmp_path: Path) -> None:
    other = tmp_path / "digits.txt"
    other.write_text("3.14159 26535 " * 9)
    given = ("evaluate", text, other, "--join", founder.invite, "--state", trained)
    shown = talkoot(*given)
    assert shown.status == 0, shown.err
    values = json.loads(talkoot(*given, "--json").out.splitlines()[-1])
    sauna, digits = values["texts"]
    assert (sauna["name"], digits["name"]) == (str(text), str(other))
    assert (sauna["tokens"], digits["tokens"]) == (len(SHORT) - 1, 9 * 14 - 1)
    assert values["tokens"] == sauna["tokens"] + digits["tokens"]
    summed = sauna["loss"] * sauna["tokens"] + digits["loss"] * digits["tokens"]
    assert values["loss"] == pytest.approx(summed / values["tokens"], rel=1e-5)
    assert sauna["loss"] != pytest.approx(digits["loss"], rel=1e-5)
    for row in (sauna, digits, values):
        assert f"{row['tokens']} │ {row['loss']:.4f}" in shown.out
    alone = json.loads(talkoot("evaluate", other, *given[3:], "--json").out.splitlines()[-1])
    assert "texts" not in alone
    assert alone["loss"] == pytest.approx(digits["loss"])


def test_texts_that_can_not_be_scored_are_named_before_joining(
    founder: Founder, trained: Path, text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    empty, short = tmp_path / "empty.txt", tmp_path / "short.txt"
    empty.write_text("")
    short.write_text("I")
    for wrong, said in (
        (empty, f"{empty} is empty: give a file"),
        (
            short,
            f"{short} has 1 token, but the first one that this model predicts is number 2: give a longer text",
        ),
        (tmp_path / "none.txt", f"no file or folder {tmp_path / 'none.txt'}"),
        (text, f"{text} is given twice"),
    ):
        talkoot("evaluate", text, wrong, "--join", founder.invite, "--state", trained).is_one_clear_line(said)
    assert "making ready" not in caplog.text


def test_a_prompt_longer_than_the_context_is_cut_with_a_word(
    founder: Founder,
    trained: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"x" * 20)))
    join = ("--join", founder.invite, "--state", trained, "--max-tokens", 1)
    assert talkoot("generate", *join, "--prompt", "-").status == 0
    assert (
        "the prompt has 20 tokens, but the model's context is 16: the first 4 tokens are left out"
        in caplog.text
    )
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe")))
    talkoot("generate", *join, "--prompt", "-").is_one_clear_line("standard input is not text in UTF-8")


@pytest.mark.parametrize("in_flight", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_when_all_experts_are_lost_training_waits_and_loses_no_step(
    founder: Founder,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    in_flight: int,
) -> None:
    class ComesBack(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "training pauses" in record.getMessage():
                founder.resume()

    lose_experts_after(2, founder, monkeypatch)
    comes_back, log = ComesBack(), tmp_path / "log"
    waiting = logging.getLogger("trainer_client.client")
    waiting.addHandler(comes_back)
    monkeypatch.setattr("trainer_client.client._MOMENT_S", 0.5)
    try:
        options = ("--data", text, "--steps", 6, "--in-flight", in_flight, "--log", log)
        ended = talkoot(*train(founder, tmp_path / "state", *options))
    finally:
        waiting.removeHandler(comes_back)
        founder.resume()
    assert ended.status == 0, ended.err
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [1, 2, 3, 4, 5, 6]
    assert "training continues with" in caplog.text


def test_when_all_experts_stay_away_training_ends_with_what_it_has(
    founder: Founder,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    lose_experts_after(2, founder, monkeypatch)
    try:
        ended = talkoot(
            *train(founder, tmp_path / "state", "--data", text, "--steps", 9, "--wait-for-experts", 0.5)
        )
    finally:
        founder.resume()
    ended.is_one_clear_line("no expert of this swarm answered in 0 s", "[T118]")
    assert "training pauses until one answers, at most 0 s" in caplog.text
    assert "checkpoint of step 2 in" in caplog.text
    assert ": --resume continues from there" in caplog.text


def test_a_revoked_trainer_learns_that_it_needs_a_new_invite_to_resume(
    founder: Founder,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def revoked(client: SwarmClient, *, reads: bool = False) -> None:
        if founder.node.state is NodeState.PAUSED:
            raise RevokedInviteError("the token was revoked")

    monkeypatch.setattr(SwarmClient, "require_admitted", revoked)
    lose_experts_after(2, founder, monkeypatch)
    try:
        ended = talkoot(*train(founder, tmp_path / "state", "--data", text, "--steps", 9))
    finally:
        founder.resume()
    assert ended.status == RevokedInviteError.exit_status
    assert "step 2 of 9 is saved: --resume with a new invite continues from there" in caplog.text


def lose_experts_after(step: int, founder: Founder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes the experts away after a step. The trainer learns it at once."""
    steps = 0

    def swarm_now(client: SwarmClient) -> dict[str, Any]:
        nonlocal steps
        steps += 1
        if steps == step:
            founder.pause()
            while client.dispatcher.live_experts():
                client._loop.run(client._refresh_soon(), 60)
        return real(client)

    real = session._swarm_now
    monkeypatch.setattr(session, "_swarm_now", swarm_now)


def test_without_a_live_expert_nothing_begins(founder: Founder, trained: Path) -> None:
    said = "no expert of this swarm answered in 0 s: is a node running?"
    join = ("--join", founder.invite, "--state", trained, "--wait-for-experts", 0.2)
    founder.pause()
    try:
        talkoot(*train(founder, trained, "--wait-for-experts", 0.2)).is_one_clear_line(said)
        talkoot("generate", *join, "--prompt", "In").is_one_clear_line(said)
    finally:
        founder.resume()


def test_a_trained_model_joins_through_the_peers_that_its_trainer_met(
    founder: Founder, trained: Path
) -> None:
    invite = Invite.parse(founder.invite)
    silent = replace(invite, bootstrap=(Multiaddress.of(Endpoint("127.0.0.1:9"), invite.keys.author),))
    prompt = ("--prompt", "In", "--max-tokens", 1, "--join", silent)
    ended = talkoot("generate", *prompt, "--state", trained)
    assert ended.status == 0, ended.err


def test_experts_lost_while_text_comes_end_it_in_time(
    founder: Founder, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed = 0

    class Losing(LanguageModel):
        def extend(
            self,
            tokens: Sequence[Sequence[int]],
            states: Sequence[SequenceState],
            neighbours: Sequence[Tensor] = (),
        ) -> Tensor:
            nonlocal computed
            computed += 1
            if computed == 3:
                founder.pause()
            return super().extend(tokens, states)

    monkeypatch.setattr("trainer_client.encoder_decoder.LanguageModel", Losing)
    short = ("--wait-for-experts", 0.5, "--max-tokens", 10_000)
    try:
        ended = talkoot("generate", "--join", founder.invite, "--state", trained, "--prompt", "In", *short)
    finally:
        founder.resume()
    ended.is_one_clear_line("no expert of this swarm answered")
    assert computed < 10_000


# Ending


@pytest.mark.parametrize("stuck_s", [0.0, 20.0])
def test_ctrl_c_saves_the_last_whole_step(
    founder: Founder,
    text: Path,
    tmp_path: Path,
    stuck_s: float,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    steps = 0

    class Interrupted(LanguageModel):
        def loss(self, tokens_BT: Tensor, neighbours_BUNL: Tensor | None = None) -> Tensor:
            nonlocal steps
            steps += self.training
            if steps == 3 and self.training:
                signal.raise_signal(signal.SIGINT)
                time.sleep(stuck_s)  # longer than a command waits
            return super().loss(tokens_BT)

    monkeypatch.setattr(session, "LanguageModel", Interrupted)
    if not stuck_s:  # then a step ends in time on a busy machine too
        monkeypatch.setattr(signals, "_GENTLE_S", 30.0)
    ended = talkoot(*train(founder, tmp_path / "state", "--data", text, "--steps", 50))
    assert ended.status == 128 + signal.SIGINT
    saved = 2 if stuck_s else 3
    assert f"checkpoint of step {saved} in " in caplog.text
    assert f"stopped after {saved} steps in " in ended.out


def test_a_run_that_could_save_nothing_names_no_checkpoint(
    founder: Founder,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "write_atomically", full)
    result = tmp_path / "result.json"
    options = ("--data", text, "--steps", 2, "--checkpoint-every", 1, "--json", result)
    ended = talkoot(*train(founder, tmp_path / "state", *options))
    assert "trained 2 steps" in ended.out
    assert ended.status == 2
    assert "error: nothing of this run is saved: if the disk is full" in ended.err
    (told,) = [line for line in caplog.messages if "could not save step 2" in line]
    assert told.endswith("No space left on device; nothing of this run is saved yet")
    assert json.loads(result.read_text())["checkpoint"] is None


def test_a_run_whose_last_steps_are_not_saved_says_so(
    founder: Founder, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "write_atomically", full)
    ended = talkoot(*train(founder, trained, "--resume", "--steps", 3))
    assert "trained 1 step (3 in all)" in ended.out
    assert ended.status == 2
    assert "error: only 2 of the 3 steps are saved: if the disk is full, make room" in ended.err


def test_a_loss_that_stays_not_finite_is_one_clear_line(
    founder: Founder, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(LanguageModel):
        def loss(self, tokens_BT: Tensor, neighbours_BUNL: Tensor | None = None) -> Tensor:
            return super().loss(tokens_BT) * math.nan

    monkeypatch.setattr(session, "LanguageModel", Broken)
    ended = talkoot(*train(founder, tmp_path, "--data", text, "--steps", 50))
    ended.is_one_clear_line(
        "not finite in 10 steps in a row, up to step 10: train with a smaller learning_rate"
    )


# Bad input, which is noticed before any connection is opened


BAD_TEXT: dict[str, tuple[str, bytes, str]] = {
    "binary": ("x.bin", b"\x7fELF\0\0", "is not text: byte 4 is 0"),
    "empty": ("x.txt", b"", "x.txt is empty: give"),
    # The founder's model has a context of 16. The error comes before the manifest is read.
    "too short for any model": (
        "x.txt",
        b"Moi!",
        "the text has 4 bytes, but a model needs twice its context and 2 more: give a longer text",
    ),
    "a wrong field": (
        "x.jsonl",
        b'{"body": "a"}\n',
        "has no field 'text', its fields are 'body': pass --field",
    ),
    "latin 1": ("x.txt", b"s\xe4", "is not text in UTF-8"),
}


@pytest.mark.parametrize("name", BAD_TEXT)
def test_what_is_no_text_is_one_clear_line(founder: Founder, tmp_path: Path, name: str) -> None:
    file, data, said = BAD_TEXT[name]
    (tmp_path / file).write_bytes(data)
    talkoot(*train(founder, tmp_path / "state", "--data", tmp_path / file)).is_one_clear_line(said)


def test_one_line_is_too_short_to_learn_from(founder: Founder, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("just one line")
    ended = talkoot(*train(founder, tmp_path / "state", "--data", tmp_path / "x.txt"))
    ended.is_one_clear_line("the text has 13 bytes, but a model with a context of 16 needs 34 or more")


def test_broken_and_foreign_checkpoints_are_one_clear_line(
    founder: Founder, trained: Path, text: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (path,) = trained.glob("runs/*/*/2.safetensors")
    invite = Invite.parse(founder.invite)
    other = replace(invite, keys=replace(invite.keys, name="other"))
    given = ("--checkpoint", path.parent)
    talkoot("generate", "--join", other, *given).is_one_clear_line(
        "belongs to the swarm village-", "but you are joining other-"
    )
    talkoot("evaluate", text, "--join", other, *given).is_one_clear_line("belongs to the swarm village-")
    resume = train(founder, trained, "--resume", *given)
    talkoot(*resume, "--join", other).is_one_clear_line("belongs to the swarm village-")

    path.write_bytes(path.read_bytes()[:-100])
    talkoot(*resume).is_one_clear_line(
        "no checkpoint in", "can be read, as the warnings above say: pass another run's folder"
    )
    assert f"skipping the checkpoint {path}: it can't be read" in caplog.text
    talkoot("generate", "--join", founder.invite, "--checkpoint", path).is_one_clear_line(
        "is not a complete checkpoint"
    )
    path.unlink()
    talkoot(*resume).is_one_clear_line("no checkpoint in", "give the folder that `talkoot train` named")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--precision", "fp8"), "precision"),
        (("--tokenizer", "nowhere.json"), "no tokenizer nowhere.json: give bytes, bpe"),
        (("--vocabulary", 100), "vocabulary"),
        (
            ("--log", "/nowhere/log"),
            "can't write /nowhere/log: No such file or directory; pass another --log",
        ),
        (("--plot", "/nowhere/plot"), "can't write /nowhere/plot"),
        (("--tensorboard", "/dev/null/x"), "can't write /dev/null/x"),
    ],
)
def test_options_that_can_not_be_are_one_clear_line(
    founder: Founder, text: Path, tmp_path: Path, options: tuple[object, ...], said: str
) -> None:
    talkoot(*train(founder, tmp_path, "--data", text, *options)).is_one_clear_line(said)


def test_sampling_that_can_not_be_is_one_clear_line(founder: Founder) -> None:
    ended = talkoot("generate", "--join", founder.invite, "--top-p", 2, "--temperature", -1)
    ended.is_one_clear_line("top_p", "temperature")


@pytest.mark.parametrize("name", ["train", "generate", "evaluate"])
def test_an_invite_is_asked_for(name: str, text: Path) -> None:
    talkoot(name, *([text] if name == "evaluate" else [])).is_one_clear_line("--join INVITE")
