"""What `make demo` and `make test` install."""

import re
import runpy
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tool() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "tools" / "install.py"))


def installed_for(target: str, folder: Path) -> list[str]:
    """What a target installs into a new environment if make runs it."""
    said = subprocess.run(
        ["make", "--dry-run", f"VENV={folder / 'venv'}", target],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
        check=True,
    )
    return re.findall(r"tools/install\.py (\S+)", said.stdout)


def test_the_demo_installs_no_tools_of_the_tests(tmp_path: Path) -> None:
    assert installed_for("demo", tmp_path) == ["."]
    assert installed_for("test", tmp_path)[-1] == "'.[test]'"


def test_sizes_are_told_of_the_largest_packages_and_of_all_others(tool: dict[str, Any]) -> None:
    added = {"torch": 700_000_000, **{f"small-{n}": n * 1_000_000 for n in range(20)}}
    said = tool["table"](added).splitlines()
    assert said[0] == "installed 21 packages, 890.0 MB on disk:"
    assert said[1] == "   700.0 MB  torch"
    assert len(said) == 10
    assert said[-1] == "    78.0 MB  13 others"
    assert tool["table"]({}) == "everything was there already"


def test_sizes_are_those_of_files(tool: dict[str, Any]) -> None:
    assert 100_000_000 < tool["sizes"]()["torch"] < 10_000_000_000
