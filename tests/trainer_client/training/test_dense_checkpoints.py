"""Checkpoints of the dense part on disk: those that are complete and this swarm's are loaded, others are skipped."""

import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from run_samples import MANIFEST, SWARM, make_settings, start
from torch import Tensor, nn

from peer.checkpoints import CheckpointHeader, encode_checkpoint
from peer.errors import CheckpointError
from trainer_client.training.checkpoints import (
    Checkpoint,
    CheckpointWriter,
    Header,
    load_checkpoint,
    manifest_sha256,
    newest_run_folder,
)

TENSORS = {"model.a": torch.arange(6.0).view(2, 3), "optimizer.a.step": torch.tensor(3.0)}


def header(step: int, swarm_id: str = SWARM) -> Header:
    return Header(
        swarm_id=swarm_id,
        manifest_sha256=manifest_sha256(MANIFEST),
        step=step,
        saved_at=1000.5,
        tokenizer="",
        data_sha256="d" * 32,
        settings={"steps": 10, "learning_rate": 1e-3, "data": ["/ä.txt"], "top_k": None},
    )


def write(folder: Path, *steps: int, keep: int = 3, swarm_id: str = SWARM) -> CheckpointWriter:
    writer = CheckpointWriter(folder, keep)
    for step in steps:
        assert writer.save(header(step, swarm_id), TENSORS | {"model.step": torch.tensor(step)})
    return writer


def assert_is(checkpoint: Checkpoint, step: int) -> None:
    assert checkpoint.header.step == step
    assert checkpoint.tensors["model.step"].item() == step


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    write(tmp_path / "new" / "folder", 3)
    checkpoint = load_checkpoint(tmp_path / "new" / "folder", SWARM)
    assert checkpoint.header.model_copy(update={"sha256": ""}) == header(3)
    assert torch.equal(checkpoint.tensors["model.a"], TENSORS["model.a"])
    assert checkpoint.tensors["optimizer.a.step"].shape == ()


class Balanced(nn.Module):
    """A module with a parameter and a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2, bias=False)
        self.register_buffer("bias", torch.zeros(3))


def saved(folder: Path, **tensors: Tensor) -> Checkpoint:
    model = {f"model.{name}": tensor for name, tensor in (Balanced().state_dict() | tensors).items()}
    assert CheckpointWriter(folder, 1).save(header(2), model | {"optimizer.a.step": torch.tensor(1.0)})
    return load_checkpoint(folder, SWARM)


def test_the_model_alone_is_loaded(tmp_path: Path) -> None:
    model = Balanced()
    saved(tmp_path, bias=torch.arange(3.0)).load_into(model)
    assert model.get_buffer("bias").tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"bias": torch.tensor([0, 3e38, 0])}, r"its bias has numbers that are not finite or beyond"),
        ({"linear.weight": torch.zeros(3, 3)}, "size mismatch"),
        ({"gift": torch.zeros(1)}, "gift"),
    ],
)
def test_one_of_another_model_or_with_a_bias_that_would_overflow_is_refused(
    tmp_path: Path, wrong: dict[str, Tensor], reason: str
) -> None:
    with pytest.raises(
        CheckpointError, match=f"(?s)the checkpoint of step 2 does not fit the swarm.*{reason}"
    ):
        saved(tmp_path, **wrong).load_into(Balanced())


def test_the_loss_of_a_skipped_step_may_be_not_finite(tmp_path: Path) -> None:
    losses = {"history.losses": torch.tensor([5.5, torch.nan])}
    assert CheckpointWriter(tmp_path, 1).save(header(2), TENSORS | losses)
    assert load_checkpoint(tmp_path, SWARM).tensors["history.losses"].isnan().tolist() == [False, True]


def test_any_tool_can_read_it(tmp_path: Path) -> None:
    write(tmp_path, 3)
    with safetensors.safe_open(tmp_path / "3.safetensors", framework="pt") as file:
        values = json.loads(file.metadata()["talkoot"])
    assert (values["format_version"], values["step"], values["swarm_id"]) == (1, 3, SWARM)


def test_the_newest_are_kept_and_loaded(tmp_path: Path) -> None:
    write(tmp_path, 8, 9, 10, 11, keep=2)
    (tmp_path / "notes.txt").touch()
    assert sorted(os.listdir(tmp_path)) == ["10.safetensors", "11.safetensors", "notes.txt"]
    assert_is(load_checkpoint(tmp_path, SWARM), 11)
    assert_is(load_checkpoint(tmp_path / "10.safetensors", SWARM), 10)


def put_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


BREAK: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-5]), "can't be read"),
    "truncated in the header": (lambda path: path.write_bytes(path.read_bytes()[:60]), "can't be read"),
    "empty": (lambda path: path.write_bytes(b""), "can't be read"),
    "a changed weight": (
        lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x55"),
        "checksum does not match",
    ),
    "of another step": (
        lambda path: write(path.parent, 5) and (path.parent / "5.safetensors").rename(path),
        "its step is 5",
    ),
    "a weight that is not finite": (
        lambda path: path.write_bytes(
            encode_checkpoint(header(4), TENSORS | {"model.a": torch.full((2, 3), torch.nan)})
        ),
        "numbers that are not finite",
    ),
    "an expert's": (
        lambda path: path.write_bytes(encode_checkpoint(CheckpointHeader(), TENSORS)),
        "header is not valid",
    ),
    "a folder": (put_folder, "can't be read"),
    "a pickle": (lambda path: torch.save({"a": 1}, path), "can't be read"),
}


@pytest.mark.parametrize("name", BREAK)
def test_what_is_not_whole_is_passed_over_for_the_one_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    change, reason = BREAK[name]
    write(tmp_path, 3, 4)
    change(tmp_path / "4.safetensors")
    assert_is(load_checkpoint(tmp_path, SWARM), 3)
    (warning,) = warnings_in(caplog)
    assert warning.startswith(f"skipping the checkpoint {tmp_path / '4.safetensors'}: ")
    assert reason in warning


def test_when_none_is_whole_that_is_said(tmp_path: Path) -> None:
    write(tmp_path, 3, 4)
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(
        CheckpointError, match=r"no checkpoint in .* can be read, .* in another folder and without --res"
    ):
        load_checkpoint(tmp_path, SWARM)
    with pytest.raises(
        CheckpointError, match=r"3\.safetensors is not a complete checkpoint: it can't be read"
    ):
        load_checkpoint(tmp_path / "3.safetensors", SWARM)


def test_where_there_is_none_that_is_said(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(CheckpointError, match=r"no checkpoint in .*: give the folder"):
            load_checkpoint(folder, SWARM)


def test_one_of_another_swarm_is_refused_and_not_passed_over(tmp_path: Path) -> None:
    write(tmp_path, 3)
    write(tmp_path, 4, swarm_id="sauna-QmOther")
    with pytest.raises(
        CheckpointError,
        match=r"4\.safetensors belongs to the swarm sauna-QmOther, but you are joining sauna-",
    ):
        load_checkpoint(tmp_path, SWARM)


def test_one_of_another_manifest_is_refused(tmp_path: Path) -> None:
    write(tmp_path, 3)
    checkpoint = load_checkpoint(tmp_path, SWARM)
    checkpoint.check_manifest(MANIFEST)
    model = MANIFEST.model.model_copy(update={"hidden": 32})
    with pytest.raises(CheckpointError, match="step 3 belongs to another manifest"):
        checkpoint.check_manifest(MANIFEST.model_copy(update={"model": model}))


def test_a_full_disk_costs_no_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = write(tmp_path, 3, keep=1)

    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert not writer.save(header(4), TENSORS)
    (warning,) = warnings_in(caplog)
    assert "could not save step 4" in warning
    assert "No space left on device; the checkpoint of step 3 stays" in warning
    assert os.listdir(tmp_path) == ["3.safetensors"]
    assert_is(load_checkpoint(tmp_path, SWARM), 3)


def test_what_a_killed_writer_left_is_swept(tmp_path: Path) -> None:
    writer = write(tmp_path, 3)
    (tmp_path / ".4.safetensors.new").write_bytes(b"half")
    writer.open(resumes=True)
    assert sorted(os.listdir(tmp_path)) == ["3.safetensors", "lock"]


def test_a_checkpoint_that_is_removed_while_it_is_read_gives_way_to_the_newer_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 10, keep=1)
    read_bytes = Path.read_bytes

    def written_meanwhile(path: Path) -> bytes:
        if path.name == "10.safetensors":
            write(tmp_path, 11, keep=1)
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", written_meanwhile)
    assert_is(load_checkpoint(tmp_path, SWARM), 11)


def test_a_run_whose_checkpoint_is_removed_while_runs_are_compared_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for run in ("old", "new"):
        write(tmp_path / run, 10)
    stat = Path.stat

    def removed_meanwhile(path: Path, **options: Any) -> Any:
        if path == tmp_path / "new" / "10.safetensors":
            raise FileNotFoundError(path)
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", removed_meanwhile)
    assert newest_run_folder(tmp_path) == tmp_path / "old"


def test_the_run_in_use_is_named_and_an_older_one_that_has_taken_more_steps(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    runs = tmp_path / "my runs"
    write(runs / "good", 1000, 1230)
    assert newest_run_folder(runs) == runs / "good"
    assert caplog.messages[-1] == "using the newest run good, of 1,230 steps"
    write(runs / "short", 2)
    later = time.time() + 60
    os.utime(runs / "short" / "2.safetensors", (later, later))
    assert newest_run_folder(runs) == runs / "short"
    assert caplog.messages[-1] == (
        f"using the newest run short, of 2 steps; an older one has 1,230 steps: --checkpoint '{runs / 'good'}' uses "
        "that"
    )


def test_without_any_run_the_way_on_is_said(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError,
        match=r"no checkpoint of this swarm in .*: train first \(`talkoot train` without --resume\), or",
    ):
        newest_run_folder(tmp_path / "runs")


def test_without_a_run_to_resume_no_state_folder_is_made(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint of this swarm"):
        start(tmp_path / "mistyped", make_settings(), resume=True)
    assert not (tmp_path / "mistyped").exists()
