"""The control socket, over a real unix socket: good clients, bad ones, and sockets that killed processes leave."""

import asyncio
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import fields
from pathlib import Path
from typing import Any
from unittest.mock import Mock, call, patch

import pytest

from expert_server.status import NodeState, NodeStatus
from peer.errors import ControlError, StartError, SwarmError, UserError
from peer.loop import LoopThread
from peer.platform.control import TOKEN_FILE
from talkoot.node import control
from talkoot.node.control import (
    MAX_CLIENTS,
    MAX_LINE_BYTES,
    ControlClient,
    ControlServer,
    invite_of_running,
    is_running,
    node_folder,
)

DEADLINE_S = 60.0


class FakeNode:
    """A node that records the commands it gets."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.error: Exception | None = None
        self.held: asyncio.Event | None = None

    async def pause(self, reason: str, for_s: float | None) -> None:
        self.told.append(f"pause {reason}" + (f" for {for_s}" if for_s else ""))
        if self.held is not None:
            await self.held.wait()
            self.told.append("paused")
        if self.error is not None:
            raise self.error

    async def resume(self) -> None:
        self.told.append("resume")

    async def invite(self) -> str:
        return "talkoot2…"

    def status(self) -> NodeStatus:
        values: dict[str, Any] = {field.name: 0 for field in fields(NodeStatus)}
        return NodeStatus(
            **values
            | {"state": NodeState.PAUSED, "pause_reason": "paused", "experts": 3, "rows": 9, "alone": ()}
        )


class Running:
    """A server for the fake node, on the tests' loop."""

    def __init__(self, loop: LoopThread, state: Path) -> None:
        self.loop, self.state, self.node = loop, state, FakeNode()
        self.server = ControlServer(state)
        self.signals = Mock()
        self._patch = patch("talkoot.node.control.signal.raise_signal", self.signals)

    def start(self, *, serving: bool = True) -> None:
        self._patch.start()
        self.loop.run(self.server.__aenter__(), DEADLINE_S)
        if serving:
            self.server.attach(self.node, self.node.invite)

    def close(self) -> None:
        self.loop.run(self.server.__aexit__(), DEADLINE_S)
        self._patch.stop()

    def ask(self, *arguments: Any, **options: Any) -> control.ControlStatus:
        with ControlClient(self.state) as client:
            return client.ask(*arguments, **options)


@pytest.fixture
def running(loop: LoopThread, tmp_path: Path) -> Iterator[Running]:
    server = Running(loop, tmp_path)
    server.start()
    yield server
    server.close()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def connected(state: Path) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(DEADLINE_S)
    client.connect(str(state / "control.sock"))
    return client


def answer_to(state: Path, sent: bytes) -> dict[str, Any]:
    with closing(connected(state)) as client:
        client.sendall(sent)
        reply = client.makefile("rb").readline()
    answer: dict[str, Any] = json.loads(reply)
    return answer


def in_loop(loop: LoopThread, work: Callable[[], None]) -> None:
    async def do() -> None:
        work()

    loop.run(do(), DEADLINE_S)


# What good clients get


def test_the_state_folder_is_known_whatever_else_the_environment_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TALKOOT_NODE_ANNOUNCE_HOST", "203.0.113.7")  # which needs an option beside it
    assert node_folder(None).name == "node"
    monkeypatch.setenv("TALKOOT_NODE_STATE", str(tmp_path))
    assert node_folder(None) == tmp_path
    assert node_folder(tmp_path / "other") == tmp_path / "other"


def test_status_after_a_command_is_told(running: Running) -> None:
    status = running.ask("pause")
    assert running.node.told == ["pause by its owner"]
    assert (status.state, status.pause_reason, status.experts, status.rows) == ("paused", "paused", 3, 9)
    assert status.pid == os.getpid()
    running.ask("resume")
    assert running.node.told[1:] == ["resume"]


def test_an_invite_is_given_to_whom_asks_for_it(running: Running) -> None:
    assert running.ask("invite").invite == "talkoot2…"
    assert running.ask("status").invite == ""
    assert invite_of_running(running.state) == "talkoot2…"
    assert invite_of_running(running.state / "none") is None


def test_client_knows_the_process_by_the_kernel(running: Running) -> None:
    with ControlClient(running.state) as client:
        assert client.pid == os.getpid()


def test_stop_is_passed_on(running: Running) -> None:
    running.ask("stop")
    assert running.signals.mock_calls == [call(signal.SIGTERM)]
    assert running.node.told == []


def test_pause_for_a_time_is_passed_on(running: Running) -> None:
    running.ask("pause", for_s=7200)
    assert running.node.told == ["pause by its owner for 7200.0"]


def test_what_the_node_can_not_do_is_told(running: Running) -> None:
    running.node.error = SwarmError("the moon is full")
    with pytest.raises(UserError, match="the node says: the moon is full"):
        running.ask("pause")


def test_node_that_crashes_on_a_command_is_an_error_for_the_client_alone(running: Running) -> None:
    running.node.error = ZeroDivisionError()
    with pytest.raises(ControlError, match="talkoot logs"):
        running.ask("pause")
    running.node.error = None
    assert running.ask("status").state == "paused"


def test_joining_node_can_be_stopped_but_not_paused(loop: LoopThread, tmp_path: Path) -> None:
    joining = Running(loop, tmp_path)
    joining.start(serving=False)
    try:
        with pytest.raises(UserError, match="still joining"):
            joining.ask("pause")
        assert joining.ask("stop").state == "joining"
    finally:
        joining.close()
    assert joining.signals.mock_calls == [call(signal.SIGTERM)]


def test_two_clients_at_once_are_both_served(running: Running, loop: LoopThread) -> None:
    running.node.held = asyncio.Event()
    with closing(connected(running.state)) as first:
        first.sendall(b'{"version": 2, "command": "pause"}\n')
        wait_until(lambda: len(running.node.told) == 1)
        assert running.ask("resume").state == "paused"
        in_loop(loop, running.node.held.set)
        assert json.loads(first.makefile("rb").readline())["status"]["state"] == "paused"
    assert running.node.told == ["pause by its owner", "resume", "paused"]


def test_slow_command_is_not_broken_off(
    running: Running, loop: LoopThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "_ACT_DEADLINE_S", 0.1)
    running.node.held = asyncio.Event()
    with pytest.raises(UserError, match="still at it"):
        running.ask("pause")
    assert len(running.server._commands) == 1
    in_loop(loop, running.node.held.set)
    wait_until(lambda: running.node.told == ["pause by its owner", "paused"])


def test_client_that_is_killed_leaves_no_trace(running: Running, loop: LoopThread) -> None:
    running.node.held = asyncio.Event()
    client = connected(running.state)
    client.sendall(b'{"version": 2, "command": "pause"}\n')
    wait_until(lambda: bool(running.node.told))
    client.close()
    in_loop(loop, running.node.held.set)
    wait_until(lambda: not running.server._clients)
    assert running.ask("status").state == "paused"


# What bad clients get


@pytest.mark.parametrize(
    "sent",
    [
        b"\n",
        b"pause\n",
        b"\xff\x00\xfe\n",
        b"[" * 2000 + b"\n",
        b'{"version": 2}\n',
        b'{"version": 2, "command": "explode"}\n',
        b'{"version": 2, "command": "stop", "colour": 3}\n',
        b'{"version": 2, "command": "pause", "for_s": -1}\n',
        b'{"version": 2, "command": "pause", "for_s": 1e9}\n',
        b'{"version": 2, "command": "pause", "for_s": NaN}\n',
    ],
)
def test_garbage_is_refused_in_words(running: Running, sent: bytes) -> None:
    assert answer_to(running.state, sent)["error"].startswith("no request: ")
    assert (running.node.told, running.signals.mock_calls) == ([], [])


def test_another_version_is_told_which_one_is_spoken(running: Running) -> None:
    answer = answer_to(running.state, b'{"version": 1, "command": "stop", "gently": true}\n')
    assert "control version 1, but the node speaks 2" in answer["error"]
    assert not running.signals.mock_calls


def test_line_without_an_end_is_refused(running: Running) -> None:
    answer = answer_to(running.state, b'{"version": 2, "command": "stop", ' + b" " * 2 * MAX_LINE_BYTES)
    assert f"at most {MAX_LINE_BYTES} bytes" in answer["error"]
    assert not running.signals.mock_calls


def test_client_that_says_nothing_is_sent_away(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "_READ_DEADLINE_S", 0.1)
    assert "no request came" in answer_to(running.state, b'{"version": 2')["error"]
    wait_until(lambda: not running.server._clients)


def test_clients_are_bounded(running: Running) -> None:
    idle = [connected(running.state) for _ in range(MAX_CLIENTS)]
    try:
        wait_until(lambda: len(running.server._clients) == MAX_CLIENTS)
        with pytest.raises(UserError, match="8 other clients control this node now: try again"):
            running.ask("status")
    finally:
        for client in idle:
            client.close()
    wait_until(lambda: not running.server._clients)
    assert running.ask("status").state == "paused"


def test_another_user_is_refused(loop: LoopThread) -> None:
    if os.geteuid():
        pytest.skip("only root can be somebody else")
    ask = "import socket,sys; s=socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); print(s.recv(999))"
    with tempfile.TemporaryDirectory() as folder:
        state = Path(folder)
        state.chmod(0o755)
        server = Running(loop, state)
        server.start()
        path = state / "control.sock"
        command = ["/usr/bin/python3", "-c", ask, str(path)]
        if not Path(command[0]).exists():
            command[0] = sys.executable
        try:
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            refused = subprocess.run(command, user=65534, group=65534, capture_output=True, text=True)
            assert "PermissionError" in refused.stderr
            path.chmod(0o666)
            answered = subprocess.run(command, user=65534, group=65534, capture_output=True, text=True)
            assert "belongs to another user" in answered.stdout, answered.stderr
        finally:
            server.close()


# Where the socket is


def test_socket_is_gone_when_the_node_is(loop: LoopThread, tmp_path: Path) -> None:
    server = Running(loop, tmp_path)
    server.start()
    assert is_running(tmp_path)
    server.close()
    assert not (tmp_path / "control.sock").exists()
    assert not is_running(tmp_path)


@pytest.mark.parametrize("folder", ["empty", "missing"])
def test_without_a_node_the_client_says_what_to_do(tmp_path: Path, folder: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ControlError, match=f"no node runs with .*{folder}: start one with `talkoot node`"):
        ControlClient(tmp_path / folder)


def test_a_state_folder_that_is_a_file_is_told_with_advice(tmp_path: Path) -> None:
    (tmp_path / "swarm.toml").touch()
    with pytest.raises(ControlError, match="Not a directory; pass the --state that it was started with"):
        ControlClient(tmp_path / "swarm.toml")


def test_socket_of_a_killed_node_is_replaced(loop: LoopThread, tmp_path: Path) -> None:
    with closing(socket.socket(socket.AF_UNIX)) as dead:
        dead.bind(str(tmp_path / "control.sock"))
    with pytest.raises(ControlError, match="no node runs"):
        ControlClient(tmp_path)
    server = Running(loop, tmp_path)
    server.start()
    try:
        assert server.ask("status").state == "paused"
    finally:
        server.close()


def test_path_may_be_longer_than_a_socket_address(loop: LoopThread, tmp_path: Path) -> None:
    state = tmp_path / ("long" * 40) / "ä b"
    state.mkdir(parents=True)
    server = Running(loop, state)
    server.start()
    try:
        assert server.ask("status").state == "paused"
        assert (state / "control.sock").is_socket()
    finally:
        server.close()


def test_folder_that_takes_no_socket_is_named(loop: LoopThread, tmp_path: Path) -> None:
    server = Running(loop, tmp_path / "missing")
    with pytest.raises(StartError, match=r"can.t listen in .*missing for commands"):
        server.start()


def test_server_that_closes_waits_for_nobody(loop: LoopThread, tmp_path: Path) -> None:
    server = Running(loop, tmp_path)
    server.start()
    with closing(connected(tmp_path)):
        wait_until(lambda: len(server.server._clients) == 1)
        server.close()
    assert not server.server._clients


def test_a_token_that_a_killed_node_left_leads_nobody_to_its_port(tmp_path: Path) -> None:
    """By then, another user may have the port."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    with socket.create_server(("127.0.0.1", 0)) as other:
        door = {"port": other.getsockname()[1], "pid": ended.pid, "token": "0" * 64}
        (tmp_path / TOKEN_FILE).write_text(json.dumps(door))
        with pytest.raises(ControlError, match="no node runs"):
            ControlClient(tmp_path)
        other.settimeout(0)
        with pytest.raises(BlockingIOError):
            other.accept()
