"""macOS: a launch agent of the user (launchd.plist(5), launchctl(1)). Nobody has tried it there yet."""

import os
import plistlib
import re
import shutil
import sys
from pathlib import Path
from typing import Any
from xml.parsers.expat import ExpatError

from peer.errors import StartError
from peer.platform.services import INSTEAD, Program, attempt, run

NAME = "org.talkoot.node"
WAITS_FOR_THE_END = False
ENCODING = "utf-8"
_LEAVES_WITHIN_S = 120
_RESTARTS_AFTER_S = 30
_PRIVATE = 0o077
_STATE, _PROCESS = (
    re.compile(r"^\s*state = (.+)$", re.MULTILINE),
    re.compile(r"^\s*pid = (\d+)$", re.MULTILINE),
)


def path() -> Path:
    return Path.home() / "Library" / "LaunchAgents" / f"{NAME}.plist"


def definition(program: Program, *, sandboxed: bool) -> str:
    agent: dict[str, Any] = {
        "Label": NAME,
        "ProgramArguments": list(program.command),
        "WorkingDirectory": str(program.folder),
        "RunAtLoad": True,
        "KeepAlive": {"SuccessfulExit": False},
        "ThrottleInterval": _RESTARTS_AFTER_S,
        "ExitTimeOut": _LEAVES_WITHIN_S,
        "ProcessType": "Background",
        "LowPriorityIO": True,
        "Umask": _PRIVATE,
    }
    return plistlib.dumps(agent, sort_keys=False).decode()


def folder_in(definition: str) -> Path:
    try:
        agent = plistlib.loads(definition.encode())
        if agent["Label"] != NAME:
            raise ValueError("of another program")
        return Path(agent["WorkingDirectory"])
    except (ExpatError, plistlib.InvalidFileException, KeyError, TypeError) as error:
        raise ValueError("no agent of this command") from error


def require() -> None:
    if shutil.which("launchctl") is None:
        raise StartError(f"this machine has no launchctl: {INSTEAD}")
    if attempt("launchctl", "print", _domain()).returncode:
        raise StartError(f"launchd has no session of this user: log in at the screen; or {INSTEAD}")


def can_sandbox() -> bool:
    return False


def start(*, again: bool) -> None:
    if again:
        attempt("launchctl", "bootout", f"{_domain()}/{NAME}")
    run("launchctl", "bootstrap", _domain(), str(path()))


def stop() -> None:
    run("launchctl", "bootout", f"{_domain()}/{NAME}")


def forget() -> None:
    """launchd does not read the folder again before the next login."""


def describe() -> tuple[bool | None, str]:
    shown = run("launchctl", "print", f"{_domain()}/{NAME}")
    state, process = _STATE.search(shown), _PROCESS.search(shown)
    words = f"{NAME}: {state[1] if state else 'unknown'}" + (f", process {process[1]}" if process else "")
    return state is not None and state[1] == "running", words


def advice() -> str:
    return "it runs while you are logged in, and does not keep the machine awake"


def _domain() -> str:
    if sys.platform == "win32":
        raise StartError("there is no launchd here")
    return f"gui/{os.getuid()}"
