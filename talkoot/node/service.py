"""`talkoot service`: installs a node as a systemd service of its user, and removes it."""

import configparser
import getpass
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peer.errors import SettingsError, StartError
from peer.files import write_atomically
from peer.formatting import counted
from peer.platform.files import user_id
from talkoot.node.control import ControlClient, is_running, node_folder
from talkoot.node.remote import words
from talkoot.terminal import Terminal

UNIT = "talkoot-node.service"
INVITE_FILE = "invite"

_DEADLINE_S = 30.0
_BY_HAND = ("--new", "--check", "--cached", "--json", "--invite-file")
_SANDBOX = ("PrivateUsers=yes", "ProtectSystem=full", "ProtectHome=read-only")
"""Needs user namespaces, which some distributions deny to a user's services."""
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
"""KillMode: only the node gets SIGTERM. It ends p2pd once it has left: callers may come through it until then."""


@dataclass(frozen=True)
class Service:
    """A service to install: the node's options, its invite and its state folder."""

    options: tuple[str, ...]
    """Of `talkoot node`, without --join and --state."""
    invite: str
    state: Path

    @property
    def invite_file(self) -> Path:
        return self.state / INVITE_FILE

    def unit(self, *, sandboxed: bool) -> str:
        """The systemd unit. The invite is in a file, because everybody on the machine can read a command line."""
        command = [sys.executable, "-P", "-m", "talkoot.cli", "node", "--join", f"@{self.invite_file}"]
        command += ["--state", str(self.state), *self.options]
        sandbox = [*_SANDBOX, f"ReadWritePaths={_quoted(str(self.state))}"] if sandboxed else []
        return _TEMPLATE.format(
            command=" ".join(map(_quoted, command)),
            folder=_without_specifiers(str(self.state)),
            sandbox="".join(f"{line}\n" for line in sandbox),
            state=self.state,
        )


def run_install(
    terminal: Terminal, service: Service, *, as_root: bool = False, print_only: bool = False
) -> None:
    """Installs, enables and starts the service. If a step fails, the others are undone. Raises UserError."""
    if print_only:
        terminal.line(service.unit(sandboxed=False).rstrip("\n"))
        return
    if user_id() == 0 and not as_root:
        raise SettingsError(
            "this would install a node that runs as root: use your own account, or pass --as-root"
        )
    _require_systemd()
    path = _unit_path()
    replaces = path.exists()
    if replaces:
        _installed_state()  # raises when something else made the unit
    elif is_running(service.state):
        raise StartError(f"a node already runs with {service.state}: `talkoot stop` it first")
    _make_folder(service.state, 0o700)
    _make_folder(path.parent, 0o777)
    before = {file: _text(file) for file in (path, service.invite_file)}
    try:
        _write(service.invite_file, service.invite + "\n", 0o600)
        _write(path, service.unit(sandboxed=_can_sandbox()), 0o600)
        _systemctl("daemon-reload")
        _systemctl("enable", "--now", UNIT)
        if replaces:
            _systemctl("restart", UNIT)
    except StartError:
        _undo(before, replaces=replaces)
        raise
    _say_installed(terminal, service)


def run_remove(terminal: Terminal) -> None:
    """Stops the service and removes it; the node's state stays. Raises UserError when there is none."""
    state = _installed_state()
    _require_systemd()
    _systemctl("disable", "--now", UNIT)
    _unit_path().unlink(missing_ok=True)
    _systemctl("daemon-reload")
    (state / INVITE_FILE).unlink(missing_ok=True)
    terminal.line(f"removed {UNIT}; the node's identity and checkpoints stay in {state}")


def is_installed() -> bool:
    return _unit_path().exists()


def restart() -> None:
    """Raises StartError."""
    _systemctl("restart", UNIT)


def run_status(terminal: Terminal) -> bool:
    """Prints what systemd and the node say; returns whether the service is active. Raises UserError."""
    state = _installed_state()
    _require_systemd()
    shown = _systemctl("show", UNIT, "--property=ActiveState,SubState,UnitFileState,MainPID,NRestarts,Result")
    values = dict(line.split("=", 1) for line in shown.splitlines() if "=" in line)
    terminal.line(_service_words(values))
    terminal.line(f"state folder {state}; `talkoot logs --state {state}` shows what the node logs")
    if is_running(state):
        with ControlClient(state) as control:
            terminal.line(f"node: {words(control.ask('status'))}")
    return values.get("ActiveState") == "active"


def make_service(options: Mapping[str, Any], join: str | None, state: Path | None) -> Service:
    """`options`: of `talkoot node`, by flag; True for a switch. Raises UserError for one that a service can't have."""
    from dht.invites import invite_of

    invite = str(invite_of(join))
    given: list[str] = []
    for flag, value in options.items():
        if flag in _BY_HAND:
            raise SettingsError(f"{flag} is not for a service: run `talkoot node {flag}` by hand")
        if value is True:
            given.append(flag)
            continue
        for each in value if isinstance(value, list | tuple) else [value]:
            given += [flag, str(each.absolute() if isinstance(each, Path) else each)]
    folder = node_folder(state).absolute()
    for text in (*given, str(folder), sys.executable):
        if not text.isprintable():
            raise SettingsError(f"{text!r} can't be written into a service: it is not printable")
    return Service(tuple(given), invite, folder)


def _say_installed(terminal: Terminal, service: Service) -> None:
    terminal.line(f"installed and started {UNIT}")
    terminal.line(
        f"`talkoot logs --state {service.state}` shows what it does; `talkoot service status` whether it runs"
    )
    user = getpass.getuser()
    if not Path("/var/lib/systemd/linger", user).exists():
        terminal.line(
            f"it ends when you log out: after `loginctl enable-linger {user}` it keeps running, also after a reboot"
        )


def _service_words(values: Mapping[str, str]) -> str:
    text = f"{UNIT}: {values.get('ActiveState', 'unknown')} ({values.get('SubState', 'unknown')})"
    text += f", {values.get('UnitFileState') or 'unknown'}"
    if values.get("MainPID", "0") != "0":
        text += f", process {values['MainPID']}"
    if values.get("NRestarts", "0") != "0":
        text += f", restarted {counted(int(values['NRestarts']), 'time')}"
    if values.get("Result", "success") != "success":
        text += f", last result: {values['Result']}"
    return text


def _installed_state() -> Path:
    """The state folder of the installed service."""
    path = _unit_path()
    # a unit may repeat a key, and has no interpolation
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    try:
        unit.read_string(path.read_text(encoding="utf-8"))
        return Path(unit["X-Talkoot"]["State"])
    except FileNotFoundError:
        raise StartError(
            "no service is installed: `talkoot service install --join INVITE` installs one"
        ) from None
    except (OSError, UnicodeDecodeError, configparser.Error, KeyError) as error:
        raise StartError(f"{path} was not made by this command: remove it by hand") from error


def _undo(before: Mapping[Path, str | None], *, replaces: bool) -> None:
    """Restores what was there before, as far as systemd allows."""
    if not replaces:
        _try_systemctl("disable", "--now", UNIT)
    for path, text in before.items():
        if text is None:
            path.unlink(missing_ok=True)
        else:
            _write(path, text, 0o600)
    _try_systemctl("daemon-reload")


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.exists() else None


def _require_systemd() -> None:
    """Raises StartError, with an alternative, when systemd is missing or does not answer this user."""
    instead = (
        "start `talkoot node --join INVITE` from your own start-up scripts, tmux or cron's @reboot instead"
    )
    if shutil.which("systemctl") is None:
        raise StartError(f"this machine has no systemd: {instead}")
    ended = _try_systemctl("show-environment")
    if ended.returncode:
        raise StartError(
            f"systemd does not answer this user ({_reason(ended)}): log in as this user, not through su or sudo; "
            f"or {instead}"
        )


def _can_sandbox() -> bool:
    """Whether this user's systemd can sandbox a service; tries it with `true`."""
    properties = [f"--property={line}" for line in _SANDBOX]
    command = ["systemd-run", "--user", "--wait", "--collect", "--quiet", *properties, "true"]
    return _run(command).returncode == 0


def _systemctl(*arguments: str) -> str:
    """Raises StartError with what it said."""
    ended = _try_systemctl(*arguments)
    if ended.returncode:
        raise StartError(f"`systemctl --user {' '.join(arguments)}` failed: {_reason(ended)}")
    return ended.stdout


def _try_systemctl(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return _run(["systemctl", "--user", *arguments])


def _run(command: Sequence[str]) -> "subprocess.CompletedProcess[str]":
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_DEADLINE_S, errors="replace")
    except FileNotFoundError:
        return subprocess.CompletedProcess(command, 127, "", f"no {command[0]} here")
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", f"no answer within {_DEADLINE_S:.0f} s")


def _reason(ended: "subprocess.CompletedProcess[str]") -> str:
    lines = (ended.stderr.strip() or ended.stdout.strip()).splitlines()
    return lines[-1] if lines else f"exit status {ended.returncode}"


def _unit_path() -> Path:
    config = os.environ.get("XDG_CONFIG_HOME", "")
    folder = Path(config) if os.path.isabs(config) else Path.home() / ".config"
    return folder / "systemd" / "user" / UNIT


def _quoted(argument: str) -> str:
    """An argument quoted for a unit's command line (systemd.service(5), "Command lines")."""
    escaped = argument.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{_without_specifiers(escaped).replace("$", "$$")}"'


def _without_specifiers(text: str) -> str:
    return text.replace("%", "%%")


def _make_folder(path: Path, mode: int) -> None:
    """Raises StartError."""
    try:
        path.mkdir(parents=True, exist_ok=True, mode=mode)
    except OSError as error:
        raise StartError(f"can't make the folder {path}: {error.strerror}") from error


def _write(path: Path, text: str, mode: int) -> None:
    """Writes atomically, never readable by more users than `mode` allows. Raises StartError."""
    try:
        write_atomically(path, text.encode(), mode)
    except OSError as error:
        raise StartError(f"can't write {path}: {error.strerror}") from error
