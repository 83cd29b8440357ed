"""The control socket, over a real unix socket: good clients, bad ones, and what killed ones leave."""

import asyncio
import json
import os
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from expert_server.node import NodeState, NodeStatus
from peer.errors import StartError, SwarmError, UnreachableError, UserError
from peer.loop import LoopThread
from talkoot import control
from talkoot.control import MAX_CLIENTS, MAX_LINE_BYTES, Control, ControlServer, is_running

DEADLINE_S = 10.0


class FakeNode:
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.error: Exception | None = None
        self.held: asyncio.Event | None = None

    async def pause(self, reason: str) -> None:
        self.told.append(f"pause: {reason}")
        if self.held is not None:
            await self.held.wait()
        if self.error is not None:
            raise self.error

    async def resume(self) -> None:
        self.told.append("resume")

    def status(self) -> NodeStatus:
        return NodeStatus(NodeState.SERVING, 3, 5, 0, updates=7, rows=9, queued_rows=0, peers=2)


class Running:
    """A server of the fake node on the tests' loop."""

    def __init__(self, loop: LoopThread, state: Path) -> None:
        self.loop, self.state, self.node = loop, state, FakeNode()
        self.stops = 0
        self.server = ControlServer(state, stop=self._stop)

    def _stop(self) -> None:
        self.stops += 1

    def start(self, *, serving: bool = True) -> None:
        self.loop.run(self.server.__aenter__(), DEADLINE_S)
        if serving:
            self.server.steer(self.node)

    def close(self) -> None:
        self.loop.run(self.server.__aexit__(), DEADLINE_S)

    def ask(self, *arguments: Any, **options: Any) -> control.Standing:
        with Control(self.state) as client:
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


def test_state_after_a_deed_is_told(running: Running) -> None:
    standing = running.ask("pause")
    assert running.node.told == ["pause: paused by hand"]
    assert (standing.state, standing.experts, standing.capacity, standing.rows) == ("serving", 3, 5, 9)
    assert (standing.pid, standing.paused_until) == (os.getpid(), None)
    running.ask("resume")
    assert running.node.told[1:] == ["resume"]


def test_client_knows_the_process_by_the_kernel(running: Running) -> None:
    with Control(running.state) as client:
        assert client.pid == os.getpid()


def test_stop_is_passed_on(running: Running) -> None:
    running.ask("stop")
    assert running.stops == 1
    assert running.node.told == []


def test_pause_for_a_time_ends_by_itself(running: Running) -> None:
    began = time.time()
    until = running.ask("pause", for_s=0.2).paused_until
    assert until is not None
    assert 0 <= until - began - 0.2 < 1
    wait_until(lambda: "resume" in running.node.told)
    wait_until(lambda: running.ask("status").paused_until is None)
    assert time.time() - began >= 0.2


def test_new_pause_takes_the_place_of_the_old_one(running: Running) -> None:
    running.ask("pause", for_s=0.1)
    assert running.ask("pause").paused_until is None
    running.ask("pause", for_s=0.2)
    assert running.ask("resume").paused_until is None
    running.ask("pause", for_s=0.3)
    wait_until(lambda: running.node.told.count("resume") == 2)
    assert running.node.told.count("pause: paused by hand") == 4


def test_what_the_node_can_not_do_is_told(running: Running) -> None:
    running.node.error = SwarmError("the moon is full")
    with pytest.raises(UserError, match="the node says: the moon is full"):
        running.ask("pause", for_s=60)
    assert running.ask("status").paused_until is None


def test_node_that_crashes_on_a_deed_is_an_error_for_the_client_alone(running: Running) -> None:
    running.node.error = ZeroDivisionError()
    with pytest.raises(UnreachableError, match="talkoot logs"):
        running.ask("pause")
    running.node.error = None
    assert running.ask("status").state == "serving"


def test_joining_node_can_be_stopped_but_not_paused(loop: LoopThread, tmp_path: Path) -> None:
    joining = Running(loop, tmp_path)
    joining.start(serving=False)
    try:
        with pytest.raises(UserError, match="still joining"):
            joining.ask("pause")
        assert joining.ask("stop").state == "joining"
    finally:
        joining.close()
    assert joining.stops == 1


def test_two_clients_at_once_are_served_one_after_the_other(running: Running, loop: LoopThread) -> None:
    running.node.held = asyncio.Event()
    with closing(connected(running.state)) as first, closing(connected(running.state)) as second:
        first.sendall(b'{"version": 1, "deed": "pause"}\n')
        wait_until(lambda: len(running.node.told) == 1)
        second.sendall(b'{"version": 1, "deed": "resume"}\n')
        assert running.ask("status").state == "serving"  # who only looks waits for nobody
        assert running.node.told == ["pause: paused by hand"]
        in_loop(loop, running.node.held.set)
        for client in (first, second):
            assert json.loads(client.makefile("rb").readline())["standing"]["state"] == "serving"
    assert running.node.told == ["pause: paused by hand", "resume"]


def test_slow_deed_is_not_broken_off(
    running: Running, loop: LoopThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "_ACT_DEADLINE_S", 0.1)
    running.node.held = asyncio.Event()
    with pytest.raises(UserError, match="still at it"):
        running.ask("pause", for_s=60)
    in_loop(loop, running.node.held.set)
    wait_until(lambda: running.ask("status").paused_until is not None)


def test_client_that_is_killed_leaves_no_trace(running: Running, loop: LoopThread) -> None:
    running.node.held = asyncio.Event()
    client = connected(running.state)
    client.sendall(b'{"version": 1, "deed": "pause"}\n')
    wait_until(lambda: bool(running.node.told))
    client.close()
    in_loop(loop, running.node.held.set)
    wait_until(lambda: not running.server._clients)
    assert running.ask("status").state == "serving"


# What bad clients get


@pytest.mark.parametrize(
    "sent",
    [
        b"\n",
        b"pause\n",
        b"\xff\x00\xfe\n",
        b"[" * 2000 + b"\n",
        b'{"version": 1}\n',
        b'{"version": 1, "deed": "explode"}\n',
        b'{"version": 1, "deed": "stop", "colour": 3}\n',
        b'{"version": 1, "deed": "pause", "for_s": -1}\n',
        b'{"version": 1, "deed": "pause", "for_s": 1e9}\n',
        b'{"version": 1, "deed": "pause", "for_s": NaN}\n',
    ],
)
def test_garbage_is_refused_in_words(running: Running, sent: bytes) -> None:
    assert answer_to(running.state, sent)["error"].startswith("no request: ")
    assert (running.node.told, running.stops) == ([], 0)


def test_another_version_is_told_which_one_is_spoken(running: Running) -> None:
    answer = answer_to(running.state, b'{"version": 2, "deed": "stop", "gently": true}\n')
    assert "control version 2, the node 1" in answer["error"]
    assert running.stops == 0


def test_line_without_an_end_is_refused(running: Running) -> None:
    answer = answer_to(running.state, b'{"version": 1, "deed": "stop", ' + b" " * 2 * MAX_LINE_BYTES)
    assert f"at most {MAX_LINE_BYTES} bytes" in answer["error"]
    assert running.stops == 0


def test_client_that_says_nothing_is_sent_away(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "_READ_DEADLINE_S", 0.1)
    assert "no request came" in answer_to(running.state, b'{"version": 1')["error"]
    wait_until(lambda: not running.server._clients)


def test_clients_are_bounded(running: Running) -> None:
    idle = [connected(running.state) for _ in range(MAX_CLIENTS)]
    try:
        wait_until(lambda: len(running.server._clients) == MAX_CLIENTS)
        with pytest.raises(UserError, match="8 others steer this node now: try again"):
            running.ask("status")
    finally:
        for client in idle:
            client.close()
    wait_until(lambda: not running.server._clients)
    assert running.ask("status").state == "serving"


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
    with pytest.raises(
        UnreachableError, match=f"no node runs with .*{folder}: start one with `talkoot node`"
    ):
        Control(tmp_path / folder)


def test_socket_of_a_killed_node_is_replaced(loop: LoopThread, tmp_path: Path) -> None:
    with closing(socket.socket(socket.AF_UNIX)) as dead:
        dead.bind(str(tmp_path / "control.sock"))
    with pytest.raises(UnreachableError, match="no node runs"):
        Control(tmp_path)
    server = Running(loop, tmp_path)
    server.start()
    try:
        assert server.ask("status").state == "serving"
    finally:
        server.close()


def test_path_may_be_longer_than_a_socket_address(loop: LoopThread, tmp_path: Path) -> None:
    state = tmp_path / ("long" * 40) / "ä b"
    state.mkdir(parents=True)
    server = Running(loop, state)
    server.start()
    try:
        assert server.ask("status").state == "serving"
        assert (state / "control.sock").is_socket()
    finally:
        server.close()


def test_folder_that_takes_no_socket_is_named(loop: LoopThread, tmp_path: Path) -> None:
    server = Running(loop, tmp_path / "missing")
    with pytest.raises(StartError, match=r"control\.sock"):
        server.start()


def test_server_that_closes_waits_for_nobody(loop: LoopThread, tmp_path: Path) -> None:
    server = Running(loop, tmp_path)
    server.start()
    server.ask("pause", for_s=3600)
    with closing(connected(tmp_path)):
        wait_until(lambda: len(server.server._clients) == 1)
        server.close()
    assert not server.server._clients
