"""What a volunteer types while a node runs: one real node in a process of its own, controlled and checked
from outside.
"""

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from commands import DEADLINE_S, HOST, assert_one_clear_line, run, run_here, wait_until
from hypothesis import given
from hypothesis import strategies as st
from preloaded import Preloaded

from peer.errors import SettingsError, StartError
from talkoot import terminal
from talkoot.doctor.checks import Finding, Verdict
from talkoot.doctor.examination import Report
from talkoot.node.control import ControlClient, ControlStatus
from talkoot.node.remote import (
    Follower,
    _wait_until_gone,
    given_up,
    parse_duration_s,
    run_logs,
    taken_offline,
)
from talkoot.terminal import LogFormat, Terminal, log_file


@dataclass(frozen=True)
class RunningNode:
    process: "subprocess.Popen[bytes]"
    state: Path
    invite: str

    def say(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return run(*arguments, "--state", str(self.state))


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningNode]:
    folder = tmp_path_factory.mktemp("node")
    manifest, invite, state = folder / "swarm.toml", folder / "invite", folder / "state"
    manifest.write_text('name = "steered"\n[model]\nlayers = 1\nhidden = 16\n[experts]\ngrid = [2, 2]\n')
    with (folder / "errors").open("wb") as errors:
        process = Preloaded(
            *("-m", "talkoot", "node", "--new", str(manifest), "--host", HOST, "--state", str(state)),
            *("--threads", "1", "--experts", "4", "--invite-file", str(invite)),
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )
    try:
        wait_until(lambda: invite.exists() or process.poll() is not None, "the invite")
        yield RunningNode(process, state, invite.read_text().strip())
    finally:
        process.kill()
        process.wait()


# The order matters: all tests use one node


def test_running_node_is_paused_and_resumed(node: RunningNode) -> None:
    paused = node.say("pause", "--for", "2h")
    assert (paused.returncode, paused.stderr) == (0, "")
    before, after, offline = paused.stdout.splitlines()
    assert before.startswith("as far as it has seen, no other node serves 4 of its 4 experts: 0.0.0, 0.0.1, ")
    assert after.startswith("paused: by its owner until ")
    assert "0 of at most 6 experts" in after
    assert offline == "other nodes serve 0 of the 4 experts that it gave up; 4 are offline until it resumes"
    with ControlClient(node.state) as control:
        assert control.pid == node.process.pid
    resumed = node.say("resume")
    assert resumed.returncode == 0, resumed.stderr
    assert "; 4 of at most 6 experts" in resumed.stdout


def test_machine_is_checked_against_a_running_swarm(node: RunningNode, tmp_path: Path) -> None:
    options = ["--threads", "1", "--p2pd", "auto", "--state", str(tmp_path)]
    check = ["node", "--check", "--join", node.invite, "--host", HOST, *options]
    checked = run(*check, "--json")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    found = json.loads(checked.stdout)
    verdicts = {finding["name"]: finding["verdict"] for finding in found["checks"]}
    assert [verdicts[name] for name in ("p2pd", "swarm", "clock", "reachability")] == ["ok"] * 4, verdicts
    assert set(verdicts) >= {"bandwidth", "speed", "memory", "cores", "disk"}
    assert Report.load(tmp_path).to_dict(0.0)["checks"] == found["checks"]
    assert not (tmp_path / "identity.key").exists(), "only a node needs one"


def test_machine_is_checked_while_its_node_runs(node: RunningNode) -> None:
    port = (node.state / "port").read_text().strip()
    options = ["--host", HOST, "--port", port, "--threads", "1", "--p2pd", "off"]
    checked = node.say("doctor", "--join", node.invite, *options)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert checked.stdout.endswith("\nthis machine can host experts\n")
    report = Report.load(node.state)
    found = {finding.name: finding for finding in report.findings}
    assert not [each for each in found.values() if each.verdict is Verdict.PROBLEM]
    assert found["state folder"].says == f"{node.state}; a node runs here with it"
    assert "; an expert takes" in found["memory"].says
    assert "beside the node that runs here" in found["speed"].says
    assert found["reachability"].says == "there is no other node to ask"
    cached = node.say("doctor", "--cached")
    # its lines are broken to fit
    assert (cached.returncode, "a node runs here" in " ".join(cached.stdout.split())) == (0, True), cached


def test_machine_that_can_not_serve_is_an_exit_status(tmp_path: Path) -> None:
    finding = Finding(name="disk", verdict=Verdict.PROBLEM, says="full", fix="make room")
    Report(checked_at=0.0, swarm=None, findings=(finding,)).save(tmp_path)
    checked = run_here("node", "--check", "--cached", "--state", str(tmp_path))
    assert checked.returncode == 1, checked.stderr
    assert "make room" in checked.stdout
    wrong = run_here("node", "--cached", "--state", str(tmp_path))
    assert (wrong.returncode, "are for --check" in wrong.stderr) == (2, True)


def test_logs_are_followed_while_the_node_leaves_in_order(node: RunningNode) -> None:
    follow = ("-m", "talkoot", "logs", "--follow", "-n", "1", "--state", str(node.state))
    with Preloaded(*follow, stdout=subprocess.PIPE, text=True) as following:
        try:
            assert following.stdout is not None
            assert following.stdout.readline()  # now it has begun
            stopped = node.say("stop")
            assert stopped.returncode == 0, stopped.stderr
            assert "is offline until this one starts again\n" in stopped.stdout
            lost = (
                "other nodes serve 0 of the 4 experts that it gave up; 4 are offline until it starts again\n"
            )
            assert lost in stopped.stdout
            assert f"stopped; its identity and checkpoints stay in {node.state}" in stopped.stdout
            assert node.process.wait(60) == 0  # its threads may end a moment after it counts as ended
            heard = ""
            while "left the swarm" not in heard:
                heard += (line := following.stdout.readline())
                assert line, heard
        finally:
            following.send_signal(signal.SIGINT)
    assert following.returncode == 128 + signal.SIGINT
    assert not (node.state / "control.sock").exists()


def test_log_stays_when_the_node_is_gone(node: RunningNode) -> None:
    assert node.process.wait(DEADLINE_S) == 0
    last = node.say("logs", "-n", "1")
    assert last.returncode == 0, last.stderr
    assert last.stdout.endswith(" left the swarm\n")
    assert "asked to stop" in node.say("logs").stdout


@pytest.mark.parametrize("name", ["pause", "resume", "stop", "logs"])
def test_without_a_node_it_says_what_to_do(tmp_path: Path, name: str) -> None:
    ended = run_here(name, "--state", str(tmp_path / "none"))
    assert (ended.returncode, ended.stdout) == (2, "")
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: no ")
    assert "--state" in line


def test_what_a_pause_takes_offline_is_told() -> None:
    status = ControlStatus(state="serving", pid=1, experts=3)
    assert taken_offline(status, "resumes") == (
        "as far as it has seen, other nodes serve all of its 3 experts too: nothing goes offline"
    )
    alone = status.model_copy(update={"alone": 3, "alone_uids": ("0.0.1", "0.1.1")})
    assert taken_offline(alone, "starts again") == (
        "as far as it has seen, no other node serves 3 of its 3 experts: 0.0.1, 0.1.1 and 1 more. Nodes with room are "
        "asked to take them over first; what none takes is offline until this one starts again"
    )
    assert "nothing goes offline" in taken_offline(status.model_copy(update={"experts": 0}), "resumes")
    assert given_up(16, 8, "resumes") == (
        "other nodes serve 8 of the 16 experts that it gave up; 8 are offline until it resumes"
    )
    assert given_up(3, 0, "resumes") == "other nodes serve 3 of the 3 experts that it gave up"


def test_each_line_of_a_leaving_nodes_log_is_shown_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    log, gone = tmp_path / "node.log", given_up(4, 1, "starts again")
    log.write_text(f"2026-11-29 03:30:35 {gone}\n2026-11-29 03:30:35 in this run: 4 experts trained\n")
    ending = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1)"])
    with closing(Follower(log)) as lines:
        said = _wait_until_gone(Terminal(LogFormat.TEXT), psutil.Process(ending.pid), lines, tmp_path)
    ending.wait()
    assert said == gone
    assert caplog.messages == ["leaving the swarm", "in this run: 4 experts trained"]


# Durations


@given(st.integers(0, 29), st.integers(0, 23), st.integers(0, 59), st.integers(1, 59))
def test_durations_are_read(days: int, hours: int, minutes: int, seconds: int) -> None:
    text = f"{days}d{hours}h{minutes}m{seconds}s"
    assert parse_duration_s(text) == ((days * 24 + hours) * 60 + minutes) * 60 + seconds


@pytest.mark.parametrize(
    "text", ["", "2", "h", "0m", "-1h", "1h 30", "2w", "1.5h", "31d", "9" * 99 + "s", "٣h"]
)
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="such as 30m, 2h or 1d"):
        parse_duration_s(text)


# The log file


def lines_in(path: Path) -> list[str]:
    return [line.split(" ", 2)[-1] for line in path.read_text().splitlines()]


def log(text: str) -> None:
    terminal.logger.warning(text)


def test_log_file_is_rotated_and_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "LOG_FILE_BYTES", 400)
    path = tmp_path / "node.log"
    follower = Follower(path)
    assert follower.lines() == []
    heard: list[str] = []
    with log_file(path):
        for number in range(50):
            log(f"line {number}")
            heard += follower.lines()
    follower.close()
    assert [line.split()[-1] for line in heard] == [str(number) for number in range(50)]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["node.log", "node.log.1"]
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 800
    log("after the end")
    assert lines_in(path)[-1] == "warning: line 49"


def test_last_lines_come_from_both_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "node.log.1").write_text("one\ntwo\n")
    (tmp_path / "node.log").write_bytes(b"three\n\x1b[31mfour\xff\nunfinished")
    run_logs(Terminal(LogFormat.TEXT), tmp_path, 3, follow=False)
    assert capsys.readouterr().out == "two\nthree\n\\x1b[31mfour\\xff\n"


def test_a_log_that_can_not_be_read_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "node.log").mkdir()
    ended = run_here("logs", "--state", str(tmp_path))
    assert_one_clear_line(ended, "can't read", "Is a directory", "as the user who runs the node")


def test_half_a_line_waits_for_its_other_half(tmp_path: Path) -> None:
    path = tmp_path / "node.log"
    path.write_text("ha")
    follower = Follower(path)
    assert follower.lines() == []
    with path.open("a") as file:
        file.write("lf\nnext")
    assert follower.lines() == ["half"]
    follower.close()


def test_what_ended_a_node_is_in_its_log(tmp_path: Path) -> None:
    path = tmp_path / "node.log"
    with pytest.raises(SettingsError), log_file(path):
        raise SettingsError("no such thing")
    with pytest.raises(ZeroDivisionError), log_file(path):
        raise ZeroDivisionError("one by none")
    said = lines_in(path)
    assert said[:2] == ["error: no such thing", "error: ended by a ZeroDivisionError"]
    assert "ZeroDivisionError: one by none" in path.read_text()


def test_the_log_is_not_written_where_a_link_leads(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_text("kept")
    (tmp_path / "node.log").symlink_to(kept)
    with (
        pytest.raises(StartError, match=r"node\.log: Too many levels of symbolic links"),
        log_file(tmp_path / "node.log"),
    ):
        log("lost")
    assert kept.read_text() == "kept"


def test_full_disk_costs_lines_and_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    monkeypatch.setattr(terminal, "open_plainly", lambda path, flags: os.open("/dev/full", os.O_WRONLY))
    with log_file(tmp_path / "node.log"):
        log("lost")
    assert "Traceback" not in capsys.readouterr().err
