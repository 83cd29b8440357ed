"""A machine on which something is broken: `talkoot doctor` names each fault, and still checks everything else."""

import ctypes
import os
import platform
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from commands import HOST, run_here

from dht.invites import Invite
from dht.manifest import Manifest
from dht.records import SwarmKeys
from expert_server.settings import NodeSettings
from peer.clock import SwarmClock
from peer.errors import RevokedInviteError, UserError
from peer.files import StateFolder
from peer.identity import Identity
from peer.loop import LoopThread
from peer.platform import p2pd as p2pd_here
from peer.transport.addresses import Multiaddress
from peer.transport.endpoints import Endpoint
from talkoot.doctor import checks, examination
from talkoot.doctor.checks import Finding, Verdict
from talkoot.doctor.examination import Check, Report, show
from talkoot.terminal import LogFormat, Terminal

SMALL = Manifest.model_validate(
    {"name": "sauna", "model": {"hidden": 8, "heads": 2, "context": 8, "feed_forward": 8}}
)
ALL = {
    *("state folder", "software", "device", "ports", "p2pd", "swarm", "clock", "bandwidth", "reachability"),
    *("traffic", "speed", "memory", "cores", "disk"),
}

Doctor = Callable[..., dict[str, Finding]]


@pytest.fixture
def doctor(loop: LoopThread, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Doctor:
    """Checks this machine with these settings. Returns the findings by name."""
    monkeypatch.setattr(checks, "_MEASURE_S", 0.01)
    monkeypatch.setattr(checks, "_SLOW_ROWS_PER_S", 0.0)

    def check(
        state: Path = tmp_path / "state", invite: Invite | None = None, **settings: object
    ) -> dict[str, Finding]:
        chosen = NodeSettings.model_validate({"threads": 1, **settings})
        report = loop.run(Check(invite or SMALL, chosen, HOST, state).run(lambda stage: None), 120)
        assert len(report.findings) == len(ALL)
        return {finding.name: finding for finding in report.findings}

    return check


def problems(found: dict[str, Finding]) -> set[str]:
    assert set(found) == ALL
    return {name for name, finding in found.items() if finding.verdict is Verdict.PROBLEM}


@pytest.fixture
def invite(tmp_path: Path) -> Invite:
    author = Identity.load_or_create(tmp_path / "author").peer_id
    return Invite(SwarmKeys("sauna", author), (Multiaddress.of(Endpoint.of(HOST, 1), author),))


def test_sound_machine_has_no_problem(doctor: Doctor, tmp_path: Path) -> None:
    found = doctor()
    assert problems(found) == set()
    assert f"Python {sys.version.split()[0]}, torch" in found["software"].says
    assert "cpu" in found["device"].says or "cuda" in found["device"].says
    assert "any free one" in found["ports"].says
    assert "--join" in found["reachability"].says
    assert "Mbit/s up" in found["traffic"].says
    assert Report.load(tmp_path / "state").can_serve
    assert not (tmp_path / "state" / "identity.key").exists(), "only a node needs one"


def test_a_machine_whose_first_address_is_loopback_has_no_network(capsys: pytest.CaptureFixture[str]) -> None:
    found = checks.check_ports(NodeSettings(), HOST)
    assert (found.verdict, found.fix) == (
        Verdict.WEAK,
        "this machine has no network: nobody else could reach a node",
    )
    by_choice = checks.check_ports(NodeSettings(host=HOST), HOST)
    assert by_choice.verdict is Verdict.OK
    for finding, said in ((found, " for others as soon as it has a network\n"), (by_choice, "\n")):
        show(Terminal(LogFormat.TEXT), Report(checked_at=0.0, swarm=None, findings=(finding,)), cached=False)
        assert capsys.readouterr().out.endswith(f"this machine can host experts{said}")


@pytest.mark.parametrize("option", ["port", "metrics_port"])
def test_port_that_is_taken_is_named_with_its_option(doctor: Doctor, option: str) -> None:
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
        found = doctor(**{option: port})
    assert problems(found) == {"ports"}
    flag = option.replace("_", "-")
    assert found["ports"].fix.startswith(f"--{flag}: can't listen on {HOST} port {port}")


def test_one_port_for_two_purposes_is_a_problem() -> None:
    with socket.create_server((HOST, 0)) as free:
        port = free.getsockname()[1]
    found = checks.check_ports(NodeSettings(host=HOST, port=port, metrics_port=port), HOST)
    assert found.verdict is Verdict.PROBLEM
    assert found.fix.startswith(f"--metrics-port: can't listen on {HOST} port {port}")
    elsewhere = checks.check_ports(
        NodeSettings(host=HOST, port=port, metrics_port=port, metrics_host="127.0.0.2"), HOST
    )
    assert elsewhere.verdict is Verdict.OK


def test_folder_that_can_not_be_written_is_named(doctor: Doctor, tmp_path: Path) -> None:
    folder = tmp_path / "read-only"
    folder.mkdir(mode=0o500)
    if os.access(folder, os.W_OK):  # root may write everywhere, but not into a file
        folder.rmdir()
        folder.touch()
    found = doctor(state=folder / "state")
    assert problems(found) == {"state folder", "disk"}
    assert f"can't use the state folder {folder}" in found["state folder"].fix
    assert "pass another --state" in found["state folder"].fix


def test_folder_of_another_process_is_named(doctor: Doctor, tmp_path: Path) -> None:
    held = StateFolder(tmp_path / "state")
    try:
        assert problems(found := doctor()) == {"state folder"}
    finally:
        held.close()
    assert "another process uses the state folder" in found["state folder"].fix


def test_missing_p2pd_is_a_remark(doctor: Doctor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(p2pd_here, "_installed", lambda: tmp_path / "no-such-p2pd")
    found = doctor()
    assert problems(found) == set()
    assert found["p2pd"].verdict is Verdict.WEAK
    assert "libp2p daemon is missing" in found["p2pd"].fix
    assert "pip install --force-reinstall" in found["p2pd"].fix


def test_p2pd_that_is_not_wanted_or_not_to_be_had_is_not_checked(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert doctor(p2pd="off")["p2pd"].verdict is Verdict.SKIPPED
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    found = doctor()["p2pd"]
    assert (found.verdict, "riscv64" in found.says) == (Verdict.SKIPPED, True)


def test_port_of_p2pd_that_is_taken_is_named(doctor: Doctor) -> None:
    with socket.create_server((HOST, 0)) as taken:
        found = doctor(p2pd_port=taken.getsockname()[1])
    assert problems(found) == set()
    assert "the libp2p daemon can't listen on" in found["p2pd"].fix


def test_clock_that_is_off_is_named(doctor: Doctor, invite: Invite, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SwarmClock(lambda: 1000.0, lambda: 0.0)
    clock.note("a peer", 1060.0)
    monkeypatch.setattr(checks, "CLOCK", clock)
    found = doctor(invite=invite)
    assert problems(found) == {"clock", "swarm"}
    assert "60 s behind" in found["clock"].fix


def test_swarm_that_does_not_answer_is_named(doctor: Doctor, invite: Invite) -> None:
    found = doctor(invite=invite)
    assert problems(found) == {"swarm"}
    assert "none of the bootstrap addresses answers" in found["swarm"].fix


def test_manifest_that_expires_soon_is_named(
    doctor: Doctor, invite: Invite, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def nothing(*_: object) -> None:
        pass

    async def join(*_: object, **__: object) -> object:
        record = SimpleNamespace(warning="nobody can join")
        return SimpleNamespace(manifest=Manifest(name="sauna"), manifest_record=record, stop=nothing)

    monkeypatch.setattr(examination, "join_swarm", join)
    monkeypatch.setattr(
        examination.Check,
        "_ask",
        lambda check, *_: nothing(check._skip("a test", "clock", "bandwidth", "reachability")),
    )
    found = doctor(invite=invite)
    assert found["swarm"].verdict is Verdict.WEAK
    assert "nobody can join" in found["swarm"].says
    assert "the swarm's founder" in found["swarm"].fix


def test_device_that_is_not_there_is_named(doctor: Doctor) -> None:
    found = doctor(device="cuda:99")
    assert problems(found) == {"device"}
    assert "device cuda:99: torch finds" in found["device"].fix


@pytest.mark.parametrize(
    ("system", "python", "verdict"),
    [
        ("Linux", (3, 11), Verdict.OK),
        ("Linux", (3, 14), Verdict.OK),
        ("Linux", (3, 15), Verdict.WEAK),
        ("Darwin", (3, 11), Verdict.WEAK),
    ],
)
def test_platforms_and_pythons_that_were_not_tried_are_named(
    system: str, python: tuple[int, int], verdict: Verdict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(checks, "sys", SimpleNamespace(version_info=(*python, 0)))
    found = checks.check_software()
    assert (found.verdict, bool(found.fix)) == (verdict, verdict is not Verdict.OK)


@pytest.mark.parametrize(("answer", "verdict"), [(0, Verdict.OK), (5, Verdict.WEAK), (-1, Verdict.SKIPPED)])
def test_kernel_says_what_keeps_the_clock(
    answer: int, verdict: Verdict, monkeypatch: pytest.MonkeyPatch
) -> None:
    libc = SimpleNamespace(adjtimex=lambda buffer: answer)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: libc)
    assert checks.check_clock_keeping().verdict is verdict


def test_doctor_takes_the_options_of_a_node(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    finding = Finding(name="disk", verdict=Verdict.PROBLEM, says="full", fix="make room")
    Report(checked_at=0.0, swarm=None, findings=(finding,)).save(tmp_path / "state")
    checked = run_here("doctor", "--cached", "--state", str(tmp_path / "state"))
    assert (checked.returncode, "make room" in checked.stdout) == (1, True)
    wrong = run_here("doctor", "--colour", "3")
    assert (wrong.returncode, "--colour" in wrong.stderr) == (2, True)


# Error codes


def user_errors(base: type[UserError] = UserError) -> list[type[UserError]]:
    return [base, *(each for child in base.__subclasses__() for each in user_errors(child))]


def test_every_error_has_a_code_of_its_own_that_the_documentation_explains() -> None:
    codes = {error.__name__: error.code for error in user_errors() if "code" in vars(error)}
    assert set(codes) == {error.__name__ for error in user_errors() if error.__module__ == "peer.errors"}
    assert len(set(codes.values())) == len(codes)
    page = (Path(__file__).parents[3] / "docs" / "troubleshooting.md").read_text()
    assert re.findall(r"^### (T\d+)$", page, re.MULTILINE) == sorted(codes.values())


def test_error_line_ends_with_the_code() -> None:
    ended = run_here("node", "--join", "hello")
    assert ended.stderr.endswith(" [T102]\n")


def test_a_revoked_invite_has_an_exit_status_of_its_own(
    invite: Invite, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_node(*_: object) -> None:
        raise RevokedInviteError("revoked")

    monkeypatch.setattr("talkoot.node.launch.run_node", run_node)
    ended = run_here("node", "--join", str(invite))
    assert (ended.returncode, ended.stderr) == (3, "error: revoked [T116]\n")


def test_broken_installation_is_an_error_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "talkoot.node.launch", None)
    with pytest.raises(ModuleNotFoundError):  # a fault of ours, whose traceback is wanted
        run_here("doctor")
    monkeypatch.undo()
    monkeypatch.delitem(sys.modules, "talkoot.node.launch")
    monkeypatch.setitem(sys.modules, "rich.live", None)
    ended = run_here("doctor")
    assert ended.returncode == 2
    assert "error: can't import rich.live" in ended.stderr
    assert ended.stderr.endswith(" [T112]\n")


def test_talkoot_alone_says_what_one_can_do() -> None:
    ended = run_here()
    assert ended.returncode == 0
    for said in ("talkoot node --join", "talkoot train --join", "talkoot dashboard --join", "talkoot doctor"):
        assert said in ended.stdout


def test_shell_completes_commands_and_options() -> None:
    for typed, completed in (("talkoot doc", "doctor"), ("talkoot train --k-", "--k-min")):
        completing = {"_TALKOOT_COMPLETE": "complete_bash", "COMP_WORDS": typed}
        ended = subprocess.run(
            [sys.executable, "-c", "import sys; sys.argv = ['talkoot']; from talkoot import cli; cli.main()"],
            env=os.environ | completing | {"COMP_CWORD": str(typed.count(" "))},
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert ended.stdout.split() == [completed], ended.stderr


STOPPED_AMID = """
import signal, sys, time

from talkoot.cli import main
from talkoot.doctor import examination

def slow(*arguments):
    signal.raise_signal(signal.SIGINT)
    time.sleep(600)

examination.{check} = slow
sys.argv = ["talkoot", "doctor", "--state", {state!r}, "--p2pd", "off"]
main()
"""


@pytest.mark.parametrize("check", ["check_device", "check_speed", "check_disk"])
def test_ctrl_c_does_not_wait_for_a_slow_machine(tmp_path: Path, check: str) -> None:
    script = STOPPED_AMID.format(check=check, state=str(tmp_path))
    ended = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, timeout=60)
    assert (ended.returncode, b"Traceback" in ended.stderr) == (130, False)


def test_a_check_of_the_disk_that_is_killed_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look(descriptor: int) -> None:
        left.extend(tmp_path.iterdir())

    left: list[Path] = []
    monkeypatch.setattr(os, "fsync", look)
    checks.check_disk(tmp_path, NodeSettings(), SMALL, experts=1)
    assert not left
