"""The folders of benchmarks: gone with them, also with those that were killed."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from benchmarks.scratch import scratch_folder

HELD = (
    "import sys; from benchmarks.scratch import scratch_folder\n"
    "with scratch_folder() as folder: print(folder, flush=True); sys.stdin.readline()"
)


def test_folders_of_killed_benchmarks_go_and_those_of_live_ones_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "talkoot-benchmark-somebody-else").mkdir()
    others = [
        subprocess.Popen(
            [sys.executable, "-c", HELD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ,
        )
        for _ in range(2)
    ]
    try:
        live, dead = (Path(other.stdout.readline().strip()) for other in others if other.stdout)
        (dead / "file").touch()
        assert live.is_dir()
        others[1].kill()
        others[1].wait()
        with scratch_folder() as own:
            assert {path.name for path in tmp_path.iterdir()} == {
                "talkoot-benchmark-somebody-else", live.name, own.name
            }  # fmt: skip
        others[0].communicate("\n", timeout=60)
    finally:
        for other in others:
            other.kill()
            other.communicate()
    assert [path.name for path in tmp_path.iterdir()] == ["talkoot-benchmark-somebody-else"]
