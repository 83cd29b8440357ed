"""The service of a node, in a separate home folder, with stand-ins for the systems' tools that record calls."""

import configparser
import os
import plistlib
import shlex
import shutil
import stat
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import pytest
from commands import run_here

from dht.invites import Invite
from dht.records import SwarmKeys
from peer.errors import InviteError, RevokedInviteError, SettingsError, StartError, UnreachableError
from peer.identity import Identity
from peer.loop import LoopThread
from peer.platform import launchd, systemd, task_scheduler
from peer.platform.services import Program, ServiceManager
from peer.platform.systemd import NAME as UNIT
from peer.transport.addresses import Multiaddress
from peer.transport.endpoints import Endpoint
from talkoot.node import service as service_module
from talkoot.node.control import ControlServer
from talkoot.node.launch import Origin
from talkoot.node.service import Service, make_service, restart, run_install, run_remove, run_status
from talkoot.terminal import LogFormat, Terminal

_STAND_IN = """#!/bin/sh
echo "$(basename "$0") $*" >> "{folder}/calls"
for word in "$@"; do
    if [ -e "{folder}/fail-$(echo "$word" | tr / %)" ]; then echo "$word went wrong" >&2; exit 1; fi
done
if [ -e "{folder}/says" ]; then cat "{folder}/says"; fi
"""


@dataclass(frozen=True)
class Machine:
    """A machine that seems to the command to have systemd."""

    folder: Path
    invite: str

    @property
    def unit_file(self) -> Path:
        return self.folder / "config" / "systemd" / "user" / UNIT

    @property
    def state(self) -> Path:
        return self.folder / "my state"

    def calls(self) -> list[str]:
        path = self.folder / "calls"
        calls = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return [call for call in calls if call != "systemctl --user show-environment"]

    def fails(self, word: str) -> None:
        (self.folder / f"fail-{word}").touch()

    def service(self, **options: object) -> Service:
        flags = {f"--{name.replace('_', '-')}": value for name, value in options.items()}
        return make_service(flags, self.invite, self.state)

    def install(self, **options: object) -> None:
        run_install(terminal(), self.service(**options), as_root=True)


def terminal() -> Terminal:
    return Terminal(LogFormat.TEXT)


@pytest.fixture(scope="module")
def invite(tmp_path_factory: pytest.TempPathFactory) -> str:
    peer_id = Identity.load_or_create(tmp_path_factory.mktemp("identity") / "key").peer_id
    return str(Invite(SwarmKeys("sauna", peer_id), (Multiaddress.of(Endpoint("127.0.0.1:1"), peer_id),)))


@pytest.fixture
def machine(tmp_path: Path, invite: str, monkeypatch: pytest.MonkeyPatch) -> Machine:
    commands = tmp_path / "bin"
    commands.mkdir()
    for name in ("systemctl", "systemd-run", "launchctl", "schtasks"):
        (commands / name).write_text(_STAND_IN.format(folder=tmp_path))
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return Machine(tmp_path, invite)


def parsed(text: str) -> configparser.ConfigParser:
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]  # as the documentation does it
    unit.read_string(text)
    return unit


def words_of(unit: configparser.ConfigParser) -> list[str]:
    """The words of the command line as systemd reads them, for a unit without $ and %."""
    return shlex.split(unit["Service"]["ExecStart"])


# What is installed


def test_installed_service_runs_the_node_with_this_interpreter(machine: Machine) -> None:
    machine.install(experts=4, bootstrap=["/ip4/1", "/ip4/2"], config=Path("a.toml"))
    command = words_of(parsed(machine.unit_file.read_text()))
    assert command[:5] == [sys.executable, "-P", "-m", "talkoot", "node"]
    options = command[5:]
    assert options[:4] == ["--join", f"@{machine.state}/invite", "--state", str(machine.state)]
    assert options[4:8] == ["--experts", "4", "--bootstrap", "/ip4/1"]
    assert options[8:] == ["--bootstrap", "/ip4/2", "--config", str(Path("a.toml").absolute())]
    ended = subprocess.run([*command[:5], "--help"], capture_output=True, text=True)
    assert "Host experts" in ended.stdout


def test_what_a_service_of_0_1_0_starts_is_still_there() -> None:
    command = [sys.executable, "-P", "-m", "talkoot.cli", "--version"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.startswith("talkoot")


def test_installing_loads_enables_and_starts(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    machine.install()
    tried, *calls = machine.calls()
    assert tried.startswith("systemd-run --user --wait")
    assert calls == ["systemctl --user daemon-reload", f"systemctl --user enable --now {UNIT}"]
    said = capsys.readouterr().out
    assert "installed and started" in said
    assert "loginctl enable-linger" in said
    machine.install(experts=2)
    assert machine.calls()[1:] == [*calls, f"systemctl --user restart {UNIT}"]
    assert '"--experts" "2"' in machine.unit_file.read_text()


def test_invite_is_for_its_owner_alone(machine: Machine) -> None:
    machine.install()
    path = machine.state / "invite"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(machine.state.stat().st_mode) == 0o700
    assert machine.invite not in machine.unit_file.read_text()
    assert Origin(None, f"@{path}", ()).read() == Invite.parse(machine.invite)


def test_invite_may_come_from_a_file(machine: Machine, tmp_path: Path) -> None:
    path = tmp_path / "from-a-friend"
    path.write_text(machine.invite)
    assert make_service({}, f"@{path}", machine.state).invite == machine.invite


def test_unit_lets_the_node_leave_in_order(machine: Machine) -> None:
    service = parsed(systemd.definition(machine.service().program, sandboxed=True))["Service"]
    assert (service["KillSignal"], service["KillMode"]) == ("SIGTERM", "mixed")
    assert (service["Restart"], service["NoNewPrivileges"]) == ("on-failure", "yes")
    assert int(service["TimeoutStopSec"]) > 90
    assert int(service["RestartPreventExitStatus"]) == RevokedInviteError.exit_status
    assert (service["ProtectSystem"], service["ProtectHome"]) == ("full", "read-only")
    assert shlex.split(service["ReadWritePaths"]) == [str(machine.state)]


def test_without_user_namespaces_the_unit_does_without_a_sandbox(machine: Machine) -> None:
    machine.fails("--wait")
    machine.install()
    text = machine.unit_file.read_text()
    assert "ProtectSystem" not in text
    assert "NoNewPrivileges=yes" in text


@pytest.mark.parametrize("sandboxed", [True, False])
def test_systemd_finds_nothing_wrong_with_the_unit(
    machine: Machine, sandboxed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze here")
    state = machine.folder / 'a "b" \\c %h $HOME é'
    state.mkdir()
    service = make_service({"--host": "a%b$c"}, machine.invite, state)
    path = machine.folder / UNIT
    path.write_text(systemd.definition(service.program, sandboxed=sandboxed))
    ended = subprocess.run(["systemd-analyze", "verify", str(path)], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert str(path) not in ended.stderr, ended.stderr


def test_print_installs_nothing(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    run_install(terminal(), machine.service(experts=3), print_only=True)
    unit = parsed(capsys.readouterr().out)
    assert words_of(unit)[-2:] == ["--experts", "3"]
    assert machine.calls() == []
    assert not machine.unit_file.exists()
    assert not machine.state.exists()


# What can go wrong


def test_nobody_becomes_root_by_accident(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with pytest.raises(SettingsError, match="--as-root"):
        run_install(terminal(), machine.service())
    assert machine.calls() == []
    assert not machine.state.exists()


@pytest.mark.parametrize("word", ["show-environment", "daemon-reload", "--now"])
def test_installing_that_fails_leaves_nothing_half_done(machine: Machine, word: str) -> None:
    machine.fails(word)
    with pytest.raises(StartError, match=f"{word} went wrong"):
        machine.install()
    assert not machine.unit_file.exists()
    assert not (machine.state / "invite").exists()


def test_failed_replacement_leaves_the_old_service(machine: Machine) -> None:
    machine.install()
    before = machine.unit_file.read_text()
    machine.fails("restart")
    with pytest.raises(StartError, match="restart went wrong"):
        run_install(terminal(), replace(machine.service(experts=1), invite="another"), as_root=True)
    assert machine.unit_file.read_text() == before
    assert (machine.state / "invite").read_text() == machine.invite + "\n"


def test_without_systemd_it_says_what_to_do_instead(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(machine.folder))
    with pytest.raises(StartError, match=r"no systemd: start `talkoot node --join INVITE` .* @reboot"):
        machine.install()
    assert not machine.unit_file.exists()


def test_state_folder_of_a_running_node_is_refused(machine: Machine, loop: LoopThread) -> None:
    machine.state.mkdir()
    server = ControlServer(machine.state)
    loop.run(server.__aenter__(), 120)
    try:
        with pytest.raises(StartError, match=f"`talkoot stop --state '{machine.state}'` it first"):
            machine.install()
    finally:
        loop.run(server.__aexit__(), 120)
    assert not machine.unit_file.exists()


def test_state_folder_that_can_not_be_made_is_told(machine: Machine) -> None:
    machine.state.write_text("a file")
    with pytest.raises(StartError, match=r"can't make the folder .*my state: File exists"):
        machine.install()
    assert not machine.unit_file.exists()


def test_an_invite_is_read_from_its_file(machine: Machine, tmp_path: Path) -> None:
    file = tmp_path / "invite.txt"
    file.write_text(machine.invite + "\n")
    assert make_service({}, f"@{file}", machine.state) == make_service({}, machine.invite, machine.state)
    with pytest.raises(InviteError, match="can't read the invite"):
        make_service({}, f"@{tmp_path / 'none'}", machine.state)


def test_options_that_need_somebody_there_are_refused(machine: Machine) -> None:
    with pytest.raises(SettingsError, match="--new does not work in a service"):
        machine.service(new=Path("swarm.toml"))
    with pytest.raises(SettingsError, match="--join INVITE"):
        make_service({}, None, machine.state)
    with pytest.raises(InviteError):
        make_service({}, machine.invite[:-3], machine.state)
    with pytest.raises(SettingsError, match="not printable"):
        machine.service(host="1.2.3.4\nExecStartPre=true")


def test_node_options_are_checked_before_anything_is_installed(machine: Machine) -> None:
    install = ["service", "install", "--join", machine.invite]
    wrong = run_here(*install, "--colour", "3")
    assert wrong.returncode == 2
    assert "No such option: --colour" in wrong.stderr
    assert "service install --help`" in wrong.stderr
    printed = run_here(*install, "--print", "--experts", "3")
    assert words_of(parsed(printed.stdout))[-2:] == ["--experts", "3"], printed.stderr
    assert machine.calls() == []


# Afterwards


def test_removing_leaves_the_checkpoints(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    machine.install()
    (machine.state / "checkpoints").mkdir()
    machine.calls()
    run_remove(terminal())
    assert machine.calls() == [f"systemctl --user disable --now {UNIT}", "systemctl --user daemon-reload"]
    assert not machine.unit_file.exists()
    assert not (machine.state / "invite").exists()
    assert (machine.state / "checkpoints").exists()
    assert f"checkpoints stay in {machine.state}" in capsys.readouterr().out
    with pytest.raises(StartError, match="no service is installed"):
        run_remove(terminal())


def test_status_says_what_systemd_says(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(StartError, match="no service is installed"):
        run_status(terminal())
    machine.install()
    says = machine.folder / "says"
    says.write_text("ActiveState=active\nSubState=running\nUnitFileState=enabled\nMainPID=42\nNRestarts=2\n")
    assert run_status(terminal())
    said = capsys.readouterr().out
    assert f"{UNIT}: active (running), enabled, process 42, restarted 2 times\n" in said
    says.write_text("ActiveState=failed\nSubState=failed\nResult=exit-code\nMainPID=0\n")
    assert not run_status(terminal())
    assert "last result: exit-code" in capsys.readouterr().out


def test_exit_status_says_whether_the_service_runs(machine: Machine) -> None:
    asked = partial(run_here, "service", "status")
    assert asked().returncode == 2
    machine.install()
    for state, status in (("active", 0), ("failed", 1)):
        (machine.folder / "says").write_text(f"ActiveState={state}\nSubState=any\nMainPID=0\n")
        assert asked().returncode == status


def test_unit_of_another_maker_is_left_alone(machine: Machine) -> None:
    machine.unit_file.parent.mkdir(parents=True)
    machine.unit_file.write_text("[Service]\nExecStart=/bin/true\n")
    with pytest.raises(StartError, match="not made by this command"):
        run_remove(terminal())
    with pytest.raises(StartError, match="not made by this command"):
        machine.install()
    assert machine.unit_file.exists()


# macOS and Windows, whose tools are stand-ins


@pytest.fixture(params=[launchd, task_scheduler], ids=["launchd", "task_scheduler"])
def other(
    request: pytest.FixtureRequest, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> ServiceManager:
    """The service manager of another operating system."""
    manager: ServiceManager = request.param
    monkeypatch.setattr(service_module, "service_manager", lambda: manager)
    return manager


_STRANGE = Program(
    ("/usr/bin/python", "-m", "x", 'a "b" \\', "<&>", "c d", "", "é%h$1"), Path("/state & <more>/é")
)


def test_launch_agent_is_what_launchd_reads() -> None:
    agent = plistlib.loads(launchd.definition(_STRANGE, sandboxed=False).encode())
    assert agent["Label"] == launchd.path().stem == launchd.NAME
    assert agent["ProgramArguments"] == list(_STRANGE.command)
    assert agent["WorkingDirectory"] == str(_STRANGE.folder)
    assert (agent["RunAtLoad"], agent["KeepAlive"]) == (True, {"SuccessfulExit": False})
    assert agent["ExitTimeOut"] > 90
    assert agent["Umask"] == 0o077
    known = {
        "Label",
        "ProgramArguments",
        "WorkingDirectory",
        "RunAtLoad",
        "KeepAlive",
        "ThrottleInterval",
        "ExitTimeOut",
    }
    assert {*agent} - known == {"ProcessType", "LowPriorityIO", "Umask"}, "of launchd.plist(5)"
    assert launchd.folder_in(launchd.definition(_STRANGE, sandboxed=False)) == _STRANGE.folder


def test_task_is_what_the_scheduler_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its schema requires these elements, in this order at the top level."""
    monkeypatch.setenv("USERDOMAIN", "HOME-PC")
    text = task_scheduler.definition(_STRANGE, sandboxed=False)
    assert text.startswith('<?xml version="1.0" encoding="UTF-16"?>')
    task = ElementTree.fromstring(text.encode(task_scheduler.ENCODING))
    names = {"": "http://schemas.microsoft.com/windows/2004/02/mit/task"}
    assert task.tag == f"{{{names['']}}}Task"
    assert task.get("version") == "1.2"
    tops = [child.tag.partition("}")[2] for child in task]
    assert tops == ["RegistrationInfo", "Triggers", "Principals", "Settings", "Actions"]

    def said(path: str) -> str:
        found = task.findtext(path, namespaces=names)
        assert found is not None, path
        return found

    principal, actions = task.find("Principals/Principal", names), task.find("Actions", names)
    assert principal is not None
    assert actions is not None
    assert principal.get("id") == actions.get("Context")
    assert said("Triggers/LogonTrigger/UserId") == said("Principals/Principal/UserId")
    assert said("Principals/Principal/UserId").startswith("HOME-PC\\")
    assert (said("Principals/Principal/LogonType"), said("Principals/Principal/RunLevel")) == (
        "InteractiveToken", "LeastPrivilege",
    )  # fmt: skip
    assert said("Settings/ExecutionTimeLimit") == "PT0S"
    assert said("Settings/DisallowStartIfOnBatteries") == said("Settings/StopIfGoingOnBatteries") == "false"
    assert said("Settings/RestartOnFailure/Interval") == "PT1M"
    assert 1 <= int(said("Settings/RestartOnFailure/Count")) <= 255
    assert said("Actions/Exec/Command") == _STRANGE.command[0]
    assert said("Actions/Exec/Arguments") == subprocess.list2cmdline(_STRANGE.command[1:])
    assert said("Actions/Exec/WorkingDirectory") == str(_STRANGE.folder)
    assert task_scheduler.folder_in(text) == _STRANGE.folder


def test_node_is_installed_asked_for_and_removed(
    machine: Machine, other: ServiceManager, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(StartError, match="no service is installed"):
        run_status(terminal())
    machine.install(experts=4)
    path = other.path()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    text = path.read_bytes().decode(other.ENCODING)
    assert machine.invite not in text
    assert "--experts" in text
    assert other.folder_in(text) == machine.state
    assert any(str(path) in call for call in machine.calls())
    assert f"installed and started {other.NAME}" in capsys.readouterr().out
    (machine.folder / "says").write_text("\tstate = running\n\tpid = 42\n")
    run_status(terminal())
    assert other.NAME in capsys.readouterr().out
    run_remove(terminal())
    assert other.NAME in machine.calls()[-1]
    assert not path.exists()
    assert not (machine.state / "invite").exists()


def test_a_node_that_runs_leaves_before_its_service_is_started_anew(
    machine: Machine, other: ServiceManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.install()
    order: list[str] = []
    monkeypatch.setattr(service_module, "is_running", lambda state: state == machine.state)
    monkeypatch.setattr(service_module, "run_stop", lambda *_, wait: order.extend([*machine.calls(), "left"]))

    def install() -> None:
        machine.install(experts=1)

    for change in (install, partial(restart, terminal()), partial(run_remove, terminal())):
        machine.calls()
        order.clear()
        change()
        assert order[-1] == "left"
        assert not any(word in " ".join(order) for word in ("bootout", "bootstrap", "/Create", "/Delete")), (
            order
        )
        assert machine.calls()


def test_a_node_that_does_not_leave_keeps_its_service(
    machine: Machine, other: ServiceManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.install()
    before = other.path().read_bytes()
    machine.calls()

    def never(*_: object, wait: bool) -> None:
        raise UnreachableError("it is still there")

    monkeypatch.setattr(service_module, "is_running", lambda state: True)
    monkeypatch.setattr(service_module, "run_stop", never)
    with pytest.raises(UnreachableError):
        machine.install(experts=1)
    assert other.path().read_bytes() == before
    assert (machine.state / "invite").read_text().strip() == machine.invite
    assert not any("bootout" in call or "/Create" in call for call in machine.calls())


def test_what_fails_is_undone(machine: Machine, other: ServiceManager) -> None:
    machine.fails("bootstrap" if other is launchd else "%Create")
    with pytest.raises(StartError, match="went wrong"):
        machine.install()
    assert not other.path().exists()


def test_file_of_another_maker_is_left_alone(machine: Machine, other: ServiceManager) -> None:
    other.path().parent.mkdir(parents=True)
    for text in ("", "<plist></plist>", "<?xml version='1.0'?><Task/>", "{", "\0"):
        other.path().write_bytes(text.encode(other.ENCODING))
        with pytest.raises(StartError, match="not made by this command"):
            run_remove(terminal())
    assert other.path().exists()
