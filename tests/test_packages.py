"""The results of `python -m build`: a source distribution from which the wheel can be built, and the wheel."""

import email
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from email.message import Message
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import talkoot
from peer import PROTOCOL_VERSION, SOFTWARE_VERSION

ROOT = Path(__file__).parents[1]
FLOORS = ("peer", "dht", "expert_server", "trainer_client", "talkoot")
_MADE = (".git", *(line.rstrip("/") for line in (ROOT / ".gitignore").read_text().splitlines()))
"""Files and folders that are in no commit."""


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both packages. The wheel is built from the source distribution, as `build` does by default."""
    folder = tmp_path_factory.mktemp("packages")
    source = folder / "source"
    # In a copy, since building leaves a folder `build` behind, whose old files would get into the next wheel.
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*_MADE))
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(source)]
    ended = subprocess.run(build, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return folder


@pytest.fixture(scope="session")
def wheel(packages: Path) -> Path:
    (path,) = packages.glob("*.whl")
    return path


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        return email.message_from_bytes(archive.read(f"{info_folder()}/METADATA"))


def info_folder() -> str:
    return f"talkoot-{SOFTWARE_VERSION}.dist-info"


def sources() -> set[str]:
    """All files of the packages."""
    found = (path for floor in FLOORS for path in (ROOT / floor).rglob("*"))
    return {str(path.relative_to(ROOT)) for path in found if path.is_file() and path.suffix != ".pyc"}


def test_wheel_holds_all_files_of_the_packages_and_nothing_else_at_the_top(wheel: Path) -> None:
    found = names(wheel)
    assert sources() - found == set()
    assert {name.split("/")[0] for name in found} == {*FLOORS, info_folder()}


def test_wheel_holds_the_wire_code_and_tells_that_it_is_typed(wheel: Path) -> None:
    found = names(wheel)
    assert {f"{floor}/py.typed" for floor in FLOORS} <= found
    for contract in (ROOT / "proto").glob("*.proto"):
        assert {f"peer/wire/{contract.stem}_pb2.py", f"peer/wire/{contract.stem}_pb2.pyi"} <= found


def test_version_is_the_one_that_peers_tell(wheel: Path) -> None:
    assert metadata(wheel)["Version"] == SOFTWARE_VERSION
    assert SOFTWARE_VERSION not in (ROOT / "pyproject.toml").read_text()


def test_metadata_says_what_an_installer_needs(wheel: Path) -> None:
    found = metadata(wheel)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (found["Name"], found["License-Expression"], found["License-File"]) == (
        "talkoot",
        "MIT",
        "LICENSE",
    )
    assert {*found["Requires-Python"].split(",")} == {*project["requires-python"].split(",")}
    assert found["Description-Content-Type"] == "text/markdown"
    assert {*project["optional-dependencies"]} == {*found.get_all("Provides-Extra", [])}
    needed = [line for line in found.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert {*map(Requirement, needed)} == {*map(Requirement, project["dependencies"])}
    with zipfile.ZipFile(wheel) as archive:
        assert "talkoot = talkoot.__main__:main" in archive.read(f"{info_folder()}/entry_points.txt").decode()


def test_source_distribution_is_complete(packages: Path) -> None:
    (path,) = packages.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        found = {name.partition("/")[2] for name in archive.getnames()}
    source = packages / "source"
    kept = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
    assert kept - {name for name in kept if name.startswith(("build/", "talkoot.egg-info/"))} <= found
    assert {"LICENSE", ".ci/run", "proto/expert.proto", "tests/conftest.py", "deploy/swarm.toml"} <= found


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_wheel_works_in_a_clean_environment(wheel: Path, tmp_path: Path) -> None:
    """Installed from the package index, together with proto-plus, whose import name is `proto`."""
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=True)
    clean = {
        name: value
        for name, value in os.environ.items()
        if name != "PYTHONPATH" and not name.endswith("_P2PD")
    }

    def run(program: str, *arguments: str) -> str:
        ended = subprocess.run(
            [str(environment / "bin" / program), *arguments],
            capture_output=True,
            text=True,
            timeout=1500,
            cwd=tmp_path,
            env=clean,
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout

    run("pip", "install", "--quiet", str(wheel), "proto-plus")
    run("pip", "check")
    assert run("talkoot", "--version") == f"talkoot {SOFTWARE_VERSION}, protocol version {PROTOCOL_VERSION}\n"
    both = "import proto, peer.wire.expert_pb2 as wire; print(proto.Message.__module__, wire.CallRequest())"
    assert run("python", "-W", "ignore", "-c", both).startswith("proto.")
    run("talkoot", "demo", "--steps", "10")


def test_shells_and_notebooks_complete_what_is_not_imported_yet() -> None:
    assert set(talkoot.__all__) <= set(dir(talkoot))
