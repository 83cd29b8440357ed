"""Linux: a service of the user's own systemd instance."""

import configparser
import getpass
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from peer.errors import RevokedInviteError, StartError
from peer.formatting import counted
from peer.platform.services import Program, attempt, reason, run

NAME = "talkoot-node.service"
WAITS_FOR_THE_END = True
ENCODING = "utf-8"
_INSTEAD = "start `talkoot node --join INVITE` from your own start-up scripts, tmux or cron's @reboot instead"
_SANDBOX = ("PrivateUsers=yes", "ProtectSystem=full", "ProtectHome=read-only")
"""Sandbox options that need user namespaces, which some distributions deny to user services."""
_TEMPLATE = """\
[Unit]
Description=Talkoot node: hosts experts of a swarm
Documentation=https://arxiv.org/abs/2002.04013
StartLimitIntervalSec=0

[Service]
ExecStart={command}
WorkingDirectory={folder}
Restart=on-failure
RestartSec=5
RestartSteps=8
RestartMaxDelaySec=300
SuccessExitStatus=130 143
RestartPreventExitStatus={no_restart}
KillSignal=SIGTERM
KillMode=mixed
TimeoutStopSec=120
IOSchedulingClass=best-effort
IOSchedulingPriority=7
OOMScoreAdjust=500
UMask=0077
NoNewPrivileges=yes
LockPersonality=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
SystemCallArchitectures=native
{sandbox}
[Install]
WantedBy=default.target

[X-Talkoot]
State={state}
"""
"""KillMode: only the node gets SIGTERM. The node stops p2pd after it has left, because callers may come through p2pd
until then.
"""


def path() -> Path:
    config = os.environ.get("XDG_CONFIG_HOME", "")
    folder = Path(config) if os.path.isabs(config) else Path.home() / ".config"
    return folder / "systemd" / "user" / NAME


def definition(program: Program, *, sandboxed: bool) -> str:
    sandbox = [*_SANDBOX, f"ReadWritePaths={_quoted(str(program.folder))}"] if sandboxed else []
    return _TEMPLATE.format(
        command=" ".join(map(_quoted, program.command)),
        folder=_without_specifiers(str(program.folder)),
        sandbox="".join(f"{line}\n" for line in sandbox),
        state=program.folder,
        no_restart=RevokedInviteError.exit_status,
    )


def folder_in(definition: str) -> Path:
    # a unit may contain a key twice, and has no interpolation
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    try:
        unit.read_string(definition)
        return Path(unit["X-Talkoot"]["State"])
    except (configparser.Error, KeyError) as error:
        raise ValueError("the unit names no state folder") from error


def require() -> None:
    if shutil.which("systemctl") is None:
        raise StartError(f"this machine has no systemd: {_INSTEAD}")
    ended = attempt("systemctl", "--user", "show-environment")
    if ended.returncode:
        raise StartError(
            f"systemd does not answer this user ({reason(ended)}): log in as this user, not through su or sudo; "
            f"or {_INSTEAD}"
        )


def can_sandbox() -> bool:
    """Tries to run `true` in the sandbox."""
    properties = (f"--property={line}" for line in _SANDBOX)
    return (
        attempt("systemd-run", "--user", "--wait", "--collect", "--quiet", *properties, "true").returncode
        == 0
    )


def start(*, again: bool) -> None:
    _run("daemon-reload")
    _run("enable", "--now", NAME)
    if again:
        _run("restart", NAME)


def stop() -> None:
    _run("disable", "--now", NAME)


def forget() -> None:
    _run("daemon-reload")


def describe() -> tuple[bool | None, str]:
    shown = _run("show", NAME, "--property=ActiveState,SubState,UnitFileState,MainPID,NRestarts,Result")
    values = dict(line.split("=", 1) for line in shown.splitlines() if "=" in line)
    return values.get("ActiveState") == "active", _words(values)


def advice() -> str:
    user = getpass.getuser()
    if Path("/var/lib/systemd/linger", user).exists():
        return ""
    return f"it ends when you log out: after `loginctl enable-linger {user}` it keeps running, also after a reboot"


def _words(values: Mapping[str, str]) -> str:
    text = f"{NAME}: {values.get('ActiveState', 'unknown')} ({values.get('SubState', 'unknown')})"
    text += f", {values.get('UnitFileState') or 'unknown'}"
    if values.get("MainPID", "0") != "0":
        text += f", process {values['MainPID']}"
    if values.get("NRestarts", "0") != "0":
        text += f", restarted {counted(int(values['NRestarts']), 'time')}"
    if values.get("Result", "success") != "success":
        text += f", last result: {values['Result']}"
    return text


def _run(*arguments: str) -> str:
    return run("systemctl", "--user", *arguments)


def _quoted(argument: str) -> str:
    """Quotes an argument for a unit's command line (systemd.service(5), "Command lines")."""
    escaped = argument.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{_without_specifiers(escaped).replace("$", "$$")}"'


def _without_specifiers(text: str) -> str:
    return text.replace("%", "%%")
