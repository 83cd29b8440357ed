"""A run resumes from the checkpoints of every recorded release, and from those that it writes now."""

import logging
import shutil
from pathlib import Path

import pytest
import run_samples
from make_release import recorded_samples, write_run_sample

from dht.manifest import Manifest
from trainer_client.settings import TrainerSettings


@pytest.fixture(
    params=[*recorded_samples("run"), None], ids=lambda path: path.parent.name if path else "this"
)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param is not None:
        return Path(request.param)
    write_run_sample(tmp_path / "release")
    return tmp_path / "release"


def test_a_run_of_a_release_goes_on(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    copy = shutil.copytree(folder, tmp_path / "run")
    settings = TrainerSettings.load(checkpoint=copy, steps=6, data=str(run_samples.write_text(tmp_path)))
    began = run_samples.start(tmp_path, settings, resume=True)
    assert began.checkpoint is not None
    began.checkpoint.check_manifest(Manifest.from_json((folder / "manifest.json").read_bytes()))
    with caplog.at_level(logging.WARNING):
        ran = run_samples.train_dense(began)
    assert ran.summary.steps == 6
    assert len(ran.losses) == 2
    assert ran.losses[-1] < 5.5, "it has learned something in the first four steps"
    assert (copy / "6.safetensors").exists()
    assert "differs from the text that the checkpoint was trained on" not in caplog.text
