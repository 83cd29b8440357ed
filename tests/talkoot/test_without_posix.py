"""A node, a trainer and the commands for a running node, without what only POSIX has: see `without_posix`."""

import json
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import NamedTuple

import pytest
import without_posix
from commands import DEADLINE_S, HOST, run_here, wait_until

from peer.errors import StartError
from peer.files import StateFolder
from peer.platform.control import TOKEN_FILE
from peer.platform.loop import result_of
from talkoot.node.control import ControlClient, is_running

_MANIFEST = 'name = "bare"\n[model]\nlayers = 1\nhidden = 16\n[experts]\ngrid = [2, 2]\n'


class BareNode(NamedTuple):
    process: "subprocess.Popen[bytes]"
    state: Path
    invite: Path
    log: Path


def bare(*arguments: object) -> list[str]:
    return [sys.executable, without_posix.__file__, *map(str, arguments)]


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BareNode]:
    folder = tmp_path_factory.mktemp("bare")
    manifest, invite, state, log = (folder / name for name in ("swarm.toml", "invite", "state", "log"))
    manifest.write_text(_MANIFEST)
    settings = ("--state", state, "--threads", 1, "--experts", 4, "--invite-file", invite)
    with log.open("wb") as output:
        process = subprocess.Popen(
            bare("node", "--new", manifest, "--host", HOST, *settings), stdout=output, stderr=output
        )
    try:
        wait_until(lambda: "metrics at" in log.read_text() or process.poll() is not None, "the node")
        assert process.poll() is None, log.read_text()
        yield BareNode(process, state, invite, log)
    finally:
        process.kill()
        process.wait()


def answer_to(state: Path, sent: bytes) -> bytes:
    """Sends bytes to the node's control port, and returns the answer."""
    port = json.loads((state / TOKEN_FILE).read_bytes())["port"]
    with socket.create_connection((HOST, port), DEADLINE_S) as client:
        client.sendall(sent)
        return client.makefile("rb").readline()


# The order matters: all tests use one node


def test_a_trainer_trains(node: BareNode, tmp_path: Path) -> None:
    (tmp_path / "text").write_text(" ".join(map(str, range(3000))))
    result = tmp_path / "result.json"
    data = ("--data", tmp_path / "text", "--steps", 3, "--batch-size", 2, "--threads", 1)
    command = bare(
        "train", "--join", f"@{node.invite}", *data, "--state", tmp_path / "state", "--json", result
    )
    ended = subprocess.run(command, capture_output=True, text=True, timeout=2 * DEADLINE_S)
    assert ended.returncode == 0, ended.stderr
    trained = json.loads(result.read_text())
    assert (trained["steps"], trained["failures"], trained["experts_live"]) == (3, {}, 4)
    with ControlClient(node.state) as control:
        assert control.ask("status").updates > 0


def test_the_token_is_private(node: BareNode) -> None:
    assert stat.S_IMODE((node.state / TOKEN_FILE).stat().st_mode) == 0o600
    assert not list(node.state.glob("*.sock"))


@pytest.mark.parametrize("token", [b"", b"0" * 64, b"\xff" * 64, b"stop"])
def test_a_wrong_token_is_refused(node: BareNode, token: bytes) -> None:
    said = answer_to(node.state, token + b'\n{"version": 2, "command": "stop"}\n')
    assert b"belongs to another user" in said
    with ControlClient(node.state) as control:
        assert control.ask("status").state == "serving"


def test_a_token_without_an_end_is_refused(node: BareNode) -> None:
    assert b"at most" in answer_to(node.state, b"0" * 9000)


def test_the_state_folder_is_locked(node: BareNode) -> None:
    with pytest.raises(StartError, match="another process uses the state folder"):
        StateFolder(node.state)


def test_a_running_node_is_paused_resumed_and_stopped(node: BareNode) -> None:
    with ControlClient(node.state) as control:
        assert control.pid == node.process.pid
    paused = run_here("pause", "--state", str(node.state))
    warned, answer, offline = paused.stdout.splitlines()
    assert warned.startswith("as far as it has seen, no other node serves 4 of its 4 experts"), paused.stderr
    assert answer.startswith("paused: by its owner"), paused.stderr
    assert offline == "other nodes serve 0 of the 4 experts that it gave up; 4 are offline until it resumes"
    resumed = run_here("resume", "--state", str(node.state))
    assert resumed.stdout.startswith("serving"), resumed.stderr
    stopped = run_here("stop", "--state", str(node.state))
    assert stopped.returncode == 0, stopped.stderr
    assert node.process.wait(DEADLINE_S) == 0
    log = node.log.read_text()
    assert "left the swarm" in log
    assert "Traceback" not in log, log
    assert not (node.state / TOKEN_FILE).exists()
    assert not is_running(node.state)
    StateFolder(node.state).close()


# Tests that need no node


def test_names_of_files_are_good_on_windows(node: BareNode) -> None:
    """Windows refuses some characters in file names, and ignores dots and spaces at the end."""
    names = [path.name for path in node.state.parent.rglob("*")]
    assert len(names) > 10
    assert [name for name in names if set(name) & set('<>:"|?*\\') or name[-1] in ". "] == []


@pytest.mark.slow
def test_doctor_looks_at_the_machine(tmp_path: Path) -> None:
    checked = subprocess.run(
        bare("doctor", "--json", "--state", tmp_path / "state"),
        capture_output=True,
        text=True,
        timeout=2 * DEADLINE_S,
    )
    assert checked.stderr.count("Traceback") == 0, checked.stderr
    found = {finding["name"]: finding for finding in json.loads(checked.stdout)["checks"]}
    assert found["clock"]["verdict"] == "not checked"
    assert found["state folder"]["verdict"] == "ok"
    assert {"cores", "disk", "memory", "speed", "software", "p2pd"} <= {*found}


def run_bare(script: str) -> "subprocess.Popen[str]":
    path = f"{Path(without_posix.__file__).parent}{os.pathsep}{Path(__file__).parents[2]}"
    return subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import without_posix\nwithout_posix.pretend(('psutil', 'pydantic'))\n{script}",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )


_NAMES = """
import os, signal
from peer.platform import files, loop
print(hasattr(os, "geteuid"), hasattr(signal, "SIGHUP"), files.user_id(), type(loop.new_event_loop()).__name__)
"""


def test_names_are_absent_in_the_process() -> None:
    """So the other tests can't pass merely because nothing was removed."""
    with run_bare(_NAMES) as process:
        assert process.communicate(timeout=DEADLINE_S)[0] == "False False None Loop\n"


_STOPPED = """
import asyncio
from talkoot.signals import Stopped, run_until_stopped

async def work():
    print("works", flush=True)
    try:
        await asyncio.Event().wait()
    finally:
        print("leaves", flush=True)

try:
    asyncio.run(run_until_stopped(work()))
except Stopped as stopped:
    print(stopped.exit_status, flush=True)
"""

_GENTLE = """
import threading, time
from talkoot.signals import Stopped, StopSignals

signals, event = StopSignals(), threading.Event()
with signals.gently(event):
    try:
        print("works", flush=True)
        while True:
            time.sleep(0.01)
    except Stopped as stopped:
        print(event.is_set(), stopped.exit_status, flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_loop(number: signal.Signals) -> None:
    with run_bare(_STOPPED) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "works\n"
        process.send_signal(number)
        assert process.stdout.readlines() == ["leaves\n", f"{128 + number}\n"]
        assert process.wait(DEADLINE_S) == 0


def test_a_signal_without_effect_is_raised_after_a_second() -> None:
    with run_bare(_GENTLE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "works\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readlines() == [f"True {128 + signal.SIGINT}\n"]
        assert process.wait(DEADLINE_S) == 0


_LISTENS = """
import asyncio, socket, sys
from peer.platform.sockets import ServerSocket, SocketFolder, attach, bind_within, serve_within, streams_of

async def main():
    async def greet(reader, writer):
        writer.write(b"hello")
        writer.close()

    bound, address = bind_within(SocketFolder(), "x")
    port = int(address.rpartition(":")[2])
    server = await serve_within(greet, bound, 1024)
    within = ServerSocket()
    within.bound(port)
    made, name = await within.dial()
    reader, writer = await streams_of(made)
    print(port, name.startswith("ipv4:127.0.0.1:"), await reader.read(), flush=True)
    writer.close()
    await asyncio.to_thread(sys.stdin.readline)

asyncio.run(main())
"""


def test_a_way_to_another_peer_is_for_this_process_alone() -> None:
    with run_bare(_LISTENS) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        port, *said = process.stdout.readline().split()
        assert said == ["True", "b'hello'"]
        with socket.create_connection((HOST, int(port)), DEADLINE_S) as stranger:
            assert stranger.recv(100) == b""
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.wait(DEADLINE_S) == 0


class _DoneTooLate(Future[int]):
    def result(self, timeout: float | None = None) -> int:
        if self.done():
            return super().result()
        self.set_result(7)
        raise TimeoutError


def test_a_result_that_comes_just_after_a_wait_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    assert result_of(_DoneTooLate(), DEADLINE_S) == 7
