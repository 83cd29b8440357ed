"""`talkoot service`: installs a node as a service of its user, and removes it."""

import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peer.errors import SettingsError, StartError
from peer.files import write_atomically
from peer.platform.autostart import service_manager
from peer.platform.files import user_id
from peer.platform.services import Program, ServiceManager
from talkoot.node.control import ControlClient, is_running, node_folder, state_option
from talkoot.node.remote import run_stop, words
from talkoot.terminal import Terminal

INVITE_FILE = "invite"

_BY_HAND = ("--new", "--check", "--cached", "--json", "--invite-file")


@dataclass(frozen=True)
class Service:
    """A service to install: the node's options, its invite and its state folder."""

    options: tuple[str, ...]
    """Options of `talkoot node`, without --join and --state."""
    invite: str
    state: Path

    @property
    def invite_file(self) -> Path:
        return self.state / INVITE_FILE

    @property
    def program(self) -> Program:
        """The invite is passed in a file, because everybody on the machine can read a command line."""
        command = (sys.executable, "-P", "-m", "talkoot", "node", "--join", f"@{self.invite_file}")
        return Program((*command, "--state", str(self.state), *self.options), self.state)


def run_install(
    terminal: Terminal, service: Service, *, as_root: bool = False, print_only: bool = False
) -> None:
    """Installs, enables and starts the service. If a step fails, the others are undone. Raises UserError."""
    manager = service_manager()
    if print_only:
        terminal.line(manager.definition(service.program, sandboxed=False).rstrip("\n"))
        return
    if user_id() == 0 and not as_root:
        raise SettingsError(
            "this would install a node that runs as root: use your own account, or pass --as-root"
        )
    manager.require()
    path = manager.path()
    replaced = _installed_state(manager) if path.exists() else None
    if replaced is None and is_running(service.state):
        raise StartError(
            f"a node already runs with {service.state}: `talkoot stop{state_option(service.state)}` it first"
        )
    _make_folder(service.state, 0o700)
    _make_folder(path.parent, 0o777)
    before = {file: _content(file) for file in (path, service.invite_file)}
    definition = manager.definition(service.program, sandboxed=manager.can_sandbox())
    if replaced is not None:
        _stop_in_order(terminal, manager, replaced)
    try:
        _write(service.invite_file, service.invite.encode() + b"\n")
        _write(path, definition.encode(manager.ENCODING))
        manager.start(again=replaced is not None)
    except StartError:
        _undo(manager, before, replaces=replaced is not None)
        raise
    terminal.line(f"installed and started {manager.NAME}")
    terminal.line(
        f"`talkoot logs{state_option(service.state)}` shows what it does; `talkoot service status` whether it runs"
    )
    if advice := manager.advice():
        terminal.line(advice)


def run_remove(terminal: Terminal) -> None:
    """Stops the service and removes it; the node's state stays. Raises UserError if there is none."""
    manager = service_manager()
    state = _installed_state(manager)
    manager.require()
    _stop_in_order(terminal, manager, state)
    manager.stop()
    manager.path().unlink(missing_ok=True)
    manager.forget()
    (state / INVITE_FILE).unlink(missing_ok=True)
    terminal.line(f"removed {manager.NAME}; the node's identity and checkpoints stay in {state}")


def is_installed() -> bool:
    return service_manager().path().exists()


def restart(terminal: Terminal) -> None:
    """Raises UserError."""
    manager = service_manager()
    _stop_in_order(terminal, manager, _installed_state(manager))
    manager.start(again=True)


def run_status(terminal: Terminal) -> bool:
    """Prints what the system and the node say. Returns whether the service is active. Raises UserError."""
    manager = service_manager()
    state = _installed_state(manager)
    manager.require()
    active, says = manager.describe()
    terminal.line(says)
    terminal.line(f"state folder {state}; `talkoot logs{state_option(state)}` shows what the node logs")
    runs = is_running(state)
    if runs:
        with ControlClient(state) as control:
            terminal.line(f"node: {words(control.ask('status'))}")
    return runs if active is None else active


def make_service(options: Mapping[str, Any], join: str | None, state: Path | None) -> Service:
    """`options`: of `talkoot node`, by flag; True for a switch. Raises UserError for one that a service can't have."""
    from dht.invites import invite_of

    invite = str(invite_of(join))
    given: list[str] = []
    for flag, value in options.items():
        if flag in _BY_HAND:
            raise SettingsError(f"{flag} does not work in a service: run `talkoot node {flag}` by hand")
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


def _installed_state(manager: ServiceManager) -> Path:
    """The state folder of the installed service."""
    path = manager.path()
    try:
        return manager.folder_in(path.read_bytes().decode(manager.ENCODING))
    except FileNotFoundError:
        raise StartError(
            "no service is installed: `talkoot service install --join INVITE` installs one"
        ) from None
    except (OSError, ValueError) as error:
        raise StartError(f"{path} was not made by this command: remove it by hand") from error


def _stop_in_order(terminal: Terminal, manager: ServiceManager, state: Path) -> None:
    """Stops the node first, on systems that don't wait until a program has ended."""
    if not manager.WAITS_FOR_THE_END and is_running(state):
        run_stop(terminal, state, wait=True)


def _undo(manager: ServiceManager, before: Mapping[Path, bytes | None], *, replaces: bool) -> None:
    """Restores the previous state, if the system allows it."""
    if not replaces:
        with suppress(StartError):
            manager.stop()
    for path, content in before.items():
        if content is None:
            path.unlink(missing_ok=True)
        else:
            _write(path, content)
    with suppress(StartError):
        manager.forget()
        if replaces and not manager.WAITS_FOR_THE_END:
            manager.start(again=True)


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def _make_folder(path: Path, mode: int) -> None:
    """Raises StartError."""
    try:
        path.mkdir(parents=True, exist_ok=True, mode=mode)
    except OSError as error:
        raise StartError(f"can't make the folder {path}: {error.strerror}") from error


def _write(path: Path, content: bytes) -> None:
    """Writes atomically, readable for this user alone. Raises StartError."""
    try:
        write_atomically(path, content, 0o600)
    except OSError as error:
        raise StartError(f"can't write {path}: {error.strerror}") from error
