"""The folder of another trainer's run: a reader who may not train asks for one, and passes it as `--checkpoint`."""

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from peer.checkpoints import encode_checkpoint
from peer.errors import CheckpointError
from trainer_client.settings import TrainerSettings
from trainer_client.training.checkpoints import Header, load_checkpoint, prepare_run

SWARM = "sauna-2f4k7q"
OF_THIS_MACHINE: dict[str, object] = {
    "log": "/etc/profile",
    "plot": "/etc/profile",
    "tensorboard": "/etc",
    "metrics_host": "0.0.0.0",
    "metrics_port": 8080,
    "average_host": "192.0.2.1",
    "denylist": "/dev/zero",
    "state": "/etc",
    "checkpoint": "/etc",
    "threads": 1024,
}


def write_checkpoint(path: Path, **settings: object) -> None:
    values = TrainerSettings(data=("/nowhere",), router="switch").saved(7) | settings
    header = Header(
        swarm_id=SWARM,
        manifest_sha256="",
        step=5,
        saved_at=time.time(),
        tokenizer="",
        data_sha256="",
        settings=values,
    )
    path.write_bytes(encode_checkpoint(header, {"model.x": torch.ones(2)}))


def test_a_checkpoint_sets_nothing_of_the_machine_that_reads_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_checkpoint(tmp_path / "5.safetensors", **OF_THIS_MACHINE)
    header = load_checkpoint(tmp_path, SWARM).header
    own = TrainerSettings(metrics_port=4711)
    settings = own.resumed(header.settings)
    assert settings.router == "switch"
    assert {name: getattr(settings, name) for name in OF_THIS_MACHINE} == {
        name: getattr(own, name) for name in OF_THIS_MACHINE
    }
    (tmp_path / "text").write_text("In the sauna one must behave as in church. " * 20)
    given = TrainerSettings(data=(str(tmp_path / "text"),), steps=9, checkpoint=tmp_path)
    with caplog.at_level(logging.WARNING):
        start = prepare_run(given, True, SWARM, tmp_path / "state", lambda text: None)
    assert start.settings.log is None
    assert not [record for record in caplog.records if "metrics" in record.message]


def pipe(path: Path) -> None:
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def huge(path: Path) -> None:
    """Takes no disk, and more memory than there is."""
    write_checkpoint(path)
    os.truncate(path, 2**42)


@pytest.mark.parametrize("make", [pipe, endless, huge])
def test_what_is_no_file_or_larger_than_the_memory_is_not_read(
    make: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "6.safetensors")
    read: list[Path] = []

    def noted(path: Path, *_: Any) -> bytes:
        read.append(path)
        raise OSError("not read in this test")

    monkeypatch.setattr(Path, "read_bytes", noted)
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be read"):
        load_checkpoint(tmp_path, SWARM)
    assert not read
    assert psutil.virtual_memory().total < 2**42
