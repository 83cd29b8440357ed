"""Folders appear complete or not at all, and what a killed writer left is continued."""

import os
from pathlib import Path

import pytest

from talkoot import partial
from talkoot.partial import PartialFolder


def write(path: Path) -> None:
    with PartialFolder(path) as folder:
        (folder.partial / "weights").write_text("whole")
        (folder.partial / "source").write_text("for the next writer")
        folder.finish("source")


@pytest.mark.parametrize("step", ["replace", "sync_folder"])
def test_what_a_writer_left_just_before_its_end_is_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Each step stands for a kill -9 in it."""

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    path = tmp_path / "model"
    with monkeypatch.context() as patch:
        patch.setattr(os if step == "replace" else partial, step, killed)
        with pytest.raises(KeyboardInterrupt):
            write(path)
    with PartialFolder(path) as folder:
        assert {file.name for file in folder.partial.iterdir()} == {"lock", "source", "weights"}
    write(path)
    assert {file.name for file in path.iterdir()} == {"weights"}
    assert os.listdir(tmp_path) == ["model"]
