"""A home folder with a fake uv, for testing the installers and what they installed."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import fake_uv

DEPLOY = fake_uv.ROOT / "deploy" / "install"
DEADLINE_S = 120.0


@dataclass(frozen=True)
class UvHome:
    """The folder `programs` comes first in PATH; tests may put other programs there."""

    home: Path
    programs: Path
    calls_file: Path

    @classmethod
    def make(cls, folder: Path) -> "UvHome":
        home = cls(folder / "home", folder / "programs", folder / "calls")
        home.home.mkdir()
        home.programs.mkdir()
        home.program("curl", "exit 0")  # every address answers
        return home

    def program(self, name: str, script: str, folder: Path | None = None) -> Path:
        """Writes a shell script to that folder, or to another one."""
        path = (folder or self.programs) / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return path

    def add_uv(self, folder: Path | None = None) -> Path:
        return self.program("uv", f'exec "{sys.executable}" "{fake_uv.__file__}" "$@"', folder)

    def run(self, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Runs a command without a terminal, and without variables of the tests' environment that would affect it."""
        environment = {
            "HOME": str(self.home),
            "PATH": f"{self.programs}:{os.defpath}",
            "FAKE_UV_CALLS": str(self.calls_file),
        }
        return subprocess.run(
            command,
            env=environment | variables,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            start_new_session=True,
        )

    def install(self, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return self.run("sh", str(DEPLOY / "install.sh"), *options, **variables)

    def talkoot(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return self.run(str(self.home / ".local" / "bin" / "talkoot"), *arguments, **variables)

    def calls(self) -> list[list[str]]:
        return [json.loads(line) for line in self.calls_file.read_text().splitlines()]

    def files(self) -> set[str]:
        """All files in the home folder."""
        found = (path for path in self.home.rglob("*") if path.is_symlink() or not path.is_dir())
        return {str(path.relative_to(self.home)) for path in found}
