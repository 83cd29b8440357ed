"""Windows: a task of the user, started at log-on (Task Scheduler's XML, schtasks). Nobody has tried it there yet."""

import getpass
import os
import shutil
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import platformdirs

from peer.errors import StartError
from peer.platform.services import INSTEAD, Program, run

NAME = "Talkoot node"
WAITS_FOR_THE_END = False
ENCODING = "utf-16"
"""The encoding that schtasks expects."""
_SCHEMA = "http://schemas.microsoft.com/windows/2004/02/mit/task"
_WITHOUT_WINDOW = "pythonw.exe"
_TASK = {
    "RegistrationInfo": {"Description": "Hosts experts of a Talkoot swarm"},
    "Triggers": {"LogonTrigger": {"Enabled": "true", "UserId": "{user}"}},
    "Principals": {
        "Principal": {"UserId": "{user}", "LogonType": "InteractiveToken", "RunLevel": "LeastPrivilege"}
    },
    "Settings": {
        "MultipleInstancesPolicy": "IgnoreNew",
        "DisallowStartIfOnBatteries": "false",
        "StopIfGoingOnBatteries": "false",
        "StartWhenAvailable": "true",
        "RestartOnFailure": {"Interval": "PT1M", "Count": "255"},
        "ExecutionTimeLimit": "PT0S",
        "Priority": "7",
    },
    "Actions": {"Exec": {"Command": "{program}", "Arguments": "{arguments}", "WorkingDirectory": "{folder}"}},
}
"""PT0S: no limit. Priority 7 is below normal."""


def path() -> Path:
    return platformdirs.user_config_path("talkoot", appauthor=False) / "talkoot-node.xml"


def definition(program: Program, *, sandboxed: bool) -> str:
    executable, *arguments = program.command
    quiet = Path(executable).with_name(_WITHOUT_WINDOW)
    values = {
        "user": _user(),
        "program": str(quiet if quiet.exists() else executable),
        "arguments": subprocess.list2cmdline(arguments),
        "folder": str(program.folder),
    }
    task = ElementTree.Element("Task", {"version": "1.2", "xmlns": _SCHEMA})
    _fill(task, _TASK, values)
    task.find("Principals/Principal").set("id", "Author")  # type: ignore[union-attr]  # it is in _TASK
    task.find("Actions").set("Context", "Author")  # type: ignore[union-attr]  # the same
    ElementTree.indent(task)
    return '<?xml version="1.0" encoding="UTF-16"?>\n' + ElementTree.tostring(task, encoding="unicode") + "\n"


def folder_in(definition: str) -> Path:
    try:
        task = ElementTree.fromstring(definition.partition("?>")[2])  # noqa: S314  # this user's own file
    except ElementTree.ParseError as error:
        raise ValueError("no task of this command") from error
    folder = task.findtext(f"{{{_SCHEMA}}}Actions/{{{_SCHEMA}}}Exec/{{{_SCHEMA}}}WorkingDirectory")
    if not folder:
        raise ValueError("the task names no folder")
    return Path(folder)


def require() -> None:
    if shutil.which("schtasks") is None:
        raise StartError(f"this machine has no schtasks: {INSTEAD}")


def can_sandbox() -> bool:
    return False


def start(*, again: bool) -> None:
    run("schtasks", "/Create", "/TN", NAME, "/XML", str(path()), "/F")
    run("schtasks", "/Run", "/TN", NAME)


def stop() -> None:
    run("schtasks", "/Delete", "/TN", NAME, "/F")


def forget() -> None:
    """The scheduler keeps its own copy of the file."""


def describe() -> tuple[bool | None, str]:
    run("schtasks", "/Query", "/TN", NAME)
    return None, f"{NAME}: a task that starts when you log on"


def advice() -> str:
    return "it runs while you are logged on, and does not keep the machine awake"


def _fill(parent: ElementTree.Element, described: object, values: dict[str, str]) -> None:
    if isinstance(described, dict):
        for name, inner in described.items():
            _fill(ElementTree.SubElement(parent, name), inner, values)
    else:
        parent.text = str(described).format_map(values)


def _user() -> str:
    domain = os.environ.get("USERDOMAIN", "")
    return f"{domain}\\{getpass.getuser()}" if domain else getpass.getuser()
