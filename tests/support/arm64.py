"""Linux on arm64, emulated by qemu-user: Debian's Python, and the wheels of all that Talkoot needs."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TORCH = "torch==2.10.0"
"""The last release on PyPI whose wheel for arm64 does not contain CUDA."""
_DEBS = ("python3", "libstdc++6", "libgomp1")
_INSTALL_DEADLINE_S = 900.0


@dataclass(frozen=True)
class EmulatedMachine:
    """A root file system, packages for its Python, and a place for compiled code, in one folder."""

    folder: Path

    @classmethod
    def set_up(cls, folder: Path) -> "EmulatedMachine":
        """Downloads and unpacks everything. Skips the test if a tool is missing or no package index answers."""
        for program in ("qemu-aarch64", "apt-get", "dpkg-deb"):
            if shutil.which(program) is None:
                pytest.skip(f"no {program} here")
        machine = cls(folder)
        machine._unpack(machine._download())
        version = subprocess.check_output(
            machine.python("-c", "import sys; print(*sys.version_info[:2], sep='.')"), text=True
        )
        wheels = ["--python-platform", "aarch64-manylinux_2_28", "--python-version", version.strip()]
        wheels += ["--only-binary", ":all:", "--target", str(folder / "packages")]
        uv = str(Path(sys.executable).with_name("uv"))
        _run_or_skip(
            [uv, "pip", "install", "--quiet", *wheels, TORCH, "--requirement", str(ROOT / "pyproject.toml")]
        )
        return machine

    def python(self, *arguments: str) -> list[str]:
        """The command line of Python. qemu itself finds the programs of this root, so no root rights are needed."""
        root = self.folder / "root"
        return ["qemu-aarch64", "-L", str(root), str(root / "usr" / "bin" / "python3"), *arguments]

    def talkoot(self, *arguments: str) -> list[str]:
        return self.python("-W", "ignore", "-m", "talkoot", *arguments)

    @property
    def variables(self) -> dict[str, str]:
        path = os.pathsep.join([str(ROOT), str(self.folder / "packages")])
        return {**os.environ, "PYTHONPATH": path, "PYTHONPYCACHEPREFIX": str(self.folder / "compiled")}

    def _download(self) -> list[Path]:
        """Downloads Debian's packages, with an apt configuration that ignores this machine's."""
        apt = self.folder / "apt"
        for name in ("lists/partial", "archives/partial"):
            (apt / name).mkdir(parents=True)
        (apt / "status").touch()
        settings = {
            "APT::Architecture": "arm64",
            "APT::Architectures": "arm64",
            "Dir::State::Lists": apt / "lists",
            "Dir::State::Status": apt / "status",
            "Dir::Cache": apt,
        }
        options = [word for name, value in settings.items() for word in ("-o", f"{name}={value}")]
        _run_or_skip(["apt-get", *options, "update"])
        quietly = ["--yes", "--no-install-recommends", "--download-only"]
        _run_or_skip(["apt-get", *options, "install", *quietly, *_DEBS])
        return sorted((apt / "archives").glob("*.deb"))

    def _unpack(self, debs: Sequence[Path]) -> None:
        root = self.folder / "root"
        for deb in debs:
            subprocess.run(["dpkg-deb", "--extract", str(deb), str(root)], check=True)
        if not (root / "lib").exists():
            (root / "lib").symlink_to("usr/lib")


def _run_or_skip(command: Sequence[str]) -> None:
    ended = subprocess.run(command, capture_output=True, text=True, timeout=_INSTALL_DEADLINE_S)
    if ended.returncode:
        pytest.skip(f"can't set up an arm64 machine: {(ended.stderr or ended.stdout).strip()[-300:]}")
