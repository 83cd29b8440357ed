"""Talkoot's requirements can be installed on the systems and Python versions that it supports, as package indexes are
today.
"""

import ast
import itertools
import os
import site
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = Path(__file__).parents[1] / "pyproject.toml"
FLOORS = ("peer", "dht", "expert_server", "trainer_client", "talkoot")
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
PLATFORMS = (
    "x86_64-pc-windows-msvc",
    "aarch64-apple-darwin",
    "aarch64-manylinux_2_28",
    "x86_64-manylinux_2_28",
)
SOURCE_ONLY = ("prefetch-generator", "python-baseconv", "varint")
"""Requirements of hivemind that are pure Python without requirements of their own, so that they need no compiler."""
OF_TORCH = ("nvidia-", "cuda-", "triton==")
_AT_ONCE = 4
_DEADLINE_S = 240.0


@pytest.fixture(scope="module")
def uv_settings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Settings that declare that the source-only packages need nothing, which saves building them."""
    path = tmp_path_factory.mktemp("uv") / "uv.toml"
    path.write_text(
        "".join(f'[[dependency-metadata]]\nname = "{name}"\nrequires-dist = []\n' for name in SOURCE_ONLY)
    )
    return path


def uv(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [Path(sys.executable).with_name("uv"), *arguments],
        env=os.environ | {"UV_PYTHON_DOWNLOADS": "never"},
        capture_output=True,
        text=True,
        timeout=_DEADLINE_S,
    )


def resolve(settings: Path, platform: str, python: str) -> subprocess.CompletedProcess[str]:
    """Resolves the requirements. uv evaluates environment markers for the other machine; pip would do so for
    this one.
    """
    command: list[str | Path] = ["pip", "compile", "--config-file", settings]
    command += ["--quiet", "--no-header", "--no-annotate", "--only-binary", ":all:", PROJECT]
    command += ["--python-platform", platform, "--python-version", python]
    for name in SOURCE_ONLY:
        command += ["--no-binary", name]
    return uv(*command)


def skip_without_an_index(ended: subprocess.CompletedProcess[str]) -> None:
    if "Failed to fetch" in ended.stderr:
        pytest.skip("no package index answers")


def packages(ended: subprocess.CompletedProcess[str]) -> set[str]:
    return {line.partition("==")[0] for line in ended.stdout.splitlines() if "==" in line}


def imported(path: Path) -> Iterator[str]:
    """The names of all modules that a file imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module or ""


def test_every_package_that_is_imported_is_a_requirement() -> None:
    project = tomllib.loads(PROJECT.read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    required = {canonicalize_name(Requirement(each).name) for group in groups for each in group}
    distributions = packages_distributions()
    missing = {
        f"{module} in {path.relative_to(PROJECT.parent)}"
        for floor in FLOORS
        for path in (PROJECT.parent / floor).rglob("*.py")
        for module in {name.partition(".")[0] for name in imported(path)} - sys.stdlib_module_names
        if module not in FLOORS and required.isdisjoint(map(canonicalize_name, distributions.get(module, ())))
    }
    assert missing == set()


@pytest.mark.parametrize(
    "cells",
    [
        # the oldest and the newest Python, on the systems that the tests do not run on
        pytest.param([(PLATFORMS[0], PYTHONS[-1]), (PLATFORMS[1], PYTHONS[0])], id="two"),
        pytest.param([*itertools.product(PLATFORMS, PYTHONS)], id="all", marks=pytest.mark.slow),
    ],
)
def test_all_requirements_have_wheels_for_other_systems_and_pythons(
    uv_settings: Path, cells: list[tuple[str, str]]
) -> None:
    first, *others = cells
    found = {first: resolve(uv_settings, *first)}
    skip_without_an_index(found[first])
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        found |= zip(others, pool.map(lambda cell: resolve(uv_settings, *cell), others), strict=True)
    for cell, ended in found.items():
        skip_without_an_index(ended)
        assert ended.returncode == 0, f"{cell}: {ended.stderr}"
    for (platform, python), ended in found.items():
        needed = packages(ended)
        assert {"torch", "grpcio", "numpy", "cryptography"} <= needed
        # p2pd is needed only where hivemind has a wheel with it.
        assert ("hivemind" in needed) == (platform in {"aarch64-apple-darwin", "x86_64-manylinux_2_28"})
        assert ("uvloop" in needed) == ("windows" not in platform)
        assert ("miniupnpc" in needed) == (python != "3.14")


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_oldest_versions_that_are_allowed_work(tmp_path: Path) -> None:
    """All but that of torch, which is large: it is the one in the environment of the tests."""
    requirements = map(Requirement, tomllib.loads(PROJECT.read_text())["project"]["dependencies"])
    names = {requirement.name for requirement in requirements}
    environment, oldest = tmp_path / "old", tmp_path / "oldest.txt"
    resolving = ("pip", "compile", "--quiet", "--no-header", "--no-annotate", PROJECT)
    lowest = uv(*resolving, "--resolution", "lowest-direct")
    skip_without_an_index(lowest)
    oldest.write_text("\n".join(line for line in lowest.stdout.split() if line.partition("==")[0] in names))
    listed = uv(*resolving, "--constraints", oldest, "--extra", "test")
    needed = [line for line in listed.stdout.splitlines() if not line.startswith(("torch==", *OF_TORCH))]
    made = uv("venv", "--seed", "--python", sys.executable, environment)
    python = environment / "bin" / "python"
    installed = uv("pip", "install", "--python", python, "--no-deps", *needed)
    for ended in (lowest, listed, made, installed):
        assert ended.returncode == 0, ended.stderr
    (folder,) = environment.glob("lib/python*/site-packages")
    for path in Path(site.getsitepackages()[0]).glob("*torch*"):
        (folder / path.name).symlink_to(path)
    (folder / "talkoot.pth").write_text(str(PROJECT.parent))
    tests = ("tests/talkoot", "tests/benchmarks/test_internet_flow.py")
    command = [str(python), "-m", "pytest", "-q", "--numprocesses", "2", *tests]
    ended = subprocess.run(command, cwd=PROJECT.parent, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout[-5000:]
