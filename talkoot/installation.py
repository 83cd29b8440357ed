"""`talkoot update` and `talkoot uninstall`, for an environment that `uv tool` created, as deploy/install/ does."""

import os
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Mapping, Set
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs
import typer

from peer.errors import InstallationError, SettingsError, StartError
from peer.files import StateFolder
from peer.platform.files import CAN_UNLINK_OPEN_FILES
from talkoot.node import service
from talkoot.node.control import is_running, node_folder
from talkoot.terminal import Terminal

_PACKAGE = "talkoot"
_IDENTITY = "identity.key"


@dataclass(frozen=True)
class Installation:
    """An environment of `uv tool`, and the uv that manages it."""

    environment: Path
    requirements: tuple[str, ...]
    """The requirements that were asked for, Talkoot first (PEP 508)."""
    uv: Path
    own_folder: Path | None
    """The folder where the installer put uv, if it installed uv. It also contains everything that uv downloads."""

    @classmethod
    def find(cls, environment: Path) -> "Installation":
        """Raises InstallationError, which says what to do, if uv did not create the environment."""
        try:
            receipt = tomllib.loads((environment / "uv-receipt.toml").read_text(encoding="utf-8"))
            requirements = receipt["tool"]["requirements"]
            (own,) = (each for each in requirements if each["name"] == _PACKAGE)
            asked = (_requirement(own), *(_requirement(each) for each in requirements if each is not own))
        except FileNotFoundError:
            raise InstallationError(_by_other_means(environment)) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InstallationError(
                f"uv's notes on this installation in {environment} are broken: run the installer again"
            ) from error
        folder = environment.parent.parent
        uv = shutil.which("uv", path=str(folder / "uv"))
        # all of it is removed with Talkoot, so it must be the installer's
        if uv is not None and folder.name == _PACKAGE and not folder.is_symlink():
            return cls(environment, asked, Path(uv), folder)
        uv = shutil.which("uv")
        if uv is None:
            raise InstallationError(
                "uv installed Talkoot, but uv is no longer there: install it, or add it to PATH"
            )
        return cls(environment, asked, Path(uv), None)

    def update_command(self, source: str | None) -> list[str]:
        """The command that updates. It is not `uv tool upgrade`, which can't choose torch's build and would take the
        one with CUDA.
        """
        first, *others = self.requirements
        python = f"{sys.version_info.major}.{sys.version_info.minor}"
        command = [str(self.uv), "tool", "install", "--torch-backend", "auto", "--python", python]
        command += ["--upgrade", "--reinstall-package", _PACKAGE]
        for other in others:
            command += ["--with", other]
        if source is not None and Path(source).exists():
            # uv would take the name of a folder for that of a package, and download it
            source = str(Path(source).absolute())
        return [*command, source or first]

    def removal_command(self) -> list[str]:
        return [str(self.uv), "tool", "uninstall", _PACKAGE]

    def variables(self) -> dict[str, str]:
        """uv's environment variables."""
        found = {"UV_TOOL_DIR": str(self.environment.parent)}
        if self.own_folder is not None:
            found["UV_PYTHON_INSTALL_DIR"] = str(self.own_folder / "python")
            found["UV_CACHE_DIR"] = str(self.own_folder / "cache")
        return found

    def in_powershell(self, command: list[str]) -> str:
        """The command in PowerShell, which also removes the installer's folder after `uv tool uninstall`."""
        lines = [f"$env:{name} = {_quoted(value)}" for name, value in self.variables().items()]
        lines.append("& " + " ".join(map(_quoted, command)))
        if command == self.removal_command() and self.own_folder is not None:
            lines.append(f"Remove-Item -Recurse -Force {_quoted(str(self.own_folder))}")
        return "; ".join(lines)

    def run(self, command: list[str]) -> None:
        """Runs uv without a deadline, because downloads may take hours. Ctrl-C ends both. Raises InstallationError.
        Afterwards nothing can be imported, not even by rich, so later output is written without rich.
        """
        try:
            ended = subprocess.run(command, env=os.environ | self.variables(), check=False)
        except OSError as error:
            raise InstallationError(f"can't run {self.uv}: {error.strerror}") from error
        if ended.returncode:
            raise InstallationError(
                f"`{shlex.join(command)}` failed, and its message above says why. Fix that, and run this command or "
                "the installer again"
            )


def run_update(terminal: Terminal, source: str | None) -> None:
    """Updates Talkoot, and restarts the service if there is one. Raises UserError."""
    installation = Installation.find(Path(sys.prefix))
    command = installation.update_command(source)
    if not CAN_UNLINK_OPEN_FILES:
        terminal.line(
            "This system can't replace a running program. Stop nodes and trainers, and run this in PowerShell:"
        )
        terminal.line(installation.in_powershell(command))
        return
    installation.run(command)
    if service.is_installed():
        service.restart(terminal)
        typer.echo("updated, and restarted the service")
    elif is_running(node_folder(None)):
        typer.echo("updated; the running node has the old version until you restart it")
    else:
        typer.echo("updated")


def run_uninstall(terminal: Terminal, *, yes: bool, state: bool, identity: bool) -> None:
    """Removes Talkoot and its service, and everything else that was asked for. Raises UserError, and Abort after
    a no.
    """
    installation = Installation.find(Path(sys.prefix))
    states = platformdirs.user_state_path(_PACKAGE)
    if identity and not (state and sys.stdin.isatty()):
        raise SettingsError("--identity needs --state, and a terminal in which it can ask twice")
    if state:
        _require_no_links([states, *states.glob("*")])
    if not yes:
        typer.confirm(f"Remove Talkoot{' and all checkpoints on this machine' if state else ''}?", abort=True)
    if identity:
        typer.confirm("Also delete who you are in your swarms? Nobody can restore an identity.", abort=True)
        typer.confirm("A swarm that you founded ends without yours. Really delete it?", abort=True)
    if service.is_installed():
        service.run_remove(terminal)
    folders = [path for path in states.glob("*") if path.is_dir()]
    for folder in folders:
        StateFolder(folder).close()  # raises if a process uses it
    if state:
        shutil.rmtree(platformdirs.user_cache_path(_PACKAGE), ignore_errors=True)
        for folder in folders:
            _empty(folder, keeps=set() if identity else {_IDENTITY})
        for folder in (*folders, states):
            with suppress(OSError):  # not empty
                folder.rmdir()
    kept = ""
    if states.exists():
        kept = f"; identities stay in {states}" if state else f"; {states} stays"
    if not CAN_UNLINK_OPEN_FILES:
        terminal.line(f"This system can't remove a running program. Run this in PowerShell{kept}:")
        terminal.line(installation.in_powershell(installation.removal_command()))
        return
    installation.run(installation.removal_command())
    if installation.own_folder is not None:
        shutil.rmtree(installation.own_folder, ignore_errors=True)
    typer.echo(f"removed Talkoot{kept}")


def _require_no_links(paths: Iterable[Path]) -> None:
    """Raises StartError if a folder is a link: only Talkoot's own folders may be emptied."""
    for path in paths:
        if path.is_symlink():
            raise StartError(
                f"{path} is a link to {path.resolve()}: delete the link, and its target if you like. Nothing was "
                "removed"
            )


def _empty(folder: Path, keeps: Set[str]) -> None:
    """Raises StartError."""
    try:
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name not in keeps:
                path.unlink()
    except OSError as error:
        raise StartError(
            f"can't remove {error.filename}: {error.strerror}; nothing more was removed"
        ) from error


def _quoted(word: str) -> str:
    """A word quoted for PowerShell, so that it is taken literally."""
    return "'" + word.replace("'", "''") + "'"


def _requirement(noted: Mapping[str, Any]) -> str:
    """One of the requirements in uv's receipt, in PEP 508 notation. Raises KeyError and TypeError."""
    name = str(noted["name"])
    if noted.get("extras"):
        name += f"[{','.join(noted['extras'])}]"
    for kind in ("directory", "editable", "path"):
        if kind in noted:
            return f"{name} @ {Path(noted[kind]).as_uri()}"
    if "url" in noted:
        return f"{name} @ {noted['url']}"
    if "git" in noted:
        return f"{name} @ git+{noted['git'].replace('?rev=', '@')}"
    return f"{name}{noted.get('specifier', '')}"


def _by_other_means(environment: Path) -> str:
    """How to update or remove an installation that uv did not make."""
    source = Path(__file__).parents[1]
    if (source / "pyproject.toml").exists():
        return f"Talkoot runs from its source in {source}: `git pull` there updates it; to remove it, delete the folder"
    if (environment / "pipx_metadata.json").exists():
        return (
            "pipx installed Talkoot: `pipx upgrade talkoot` updates it, `pipx uninstall talkoot` removes it"
        )
    pip = f"`{sys.executable} -m pip"
    return f"pip installed Talkoot: {pip} install --upgrade SOURCE` updates it, {pip} uninstall {_PACKAGE}` removes it"
