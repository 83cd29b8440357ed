"""Child processes die with their parent; a state folder has only one user at a time."""

import contextlib
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from other_processes import name_of, runs

from peer.errors import StartError
from peer.files import StateFolder, require_folder
from peer.platform.files import wait_for_lock
from peer.platform.processes import die_with_parent
from peer.platform.sockets import private_socket_folder, sweep_socket_folders

SLEEP = shutil.which("sleep") or "/bin/sleep"

PARENT = f"""
import subprocess, time
from peer.platform.processes import die_with_parent
child = subprocess.Popen(die_with_parent([{SLEEP!r}, "300"]))
print(child.pid, flush=True)
time.sleep(300)
"""

WATCHED = f"""
import os, subprocess, sys, time
from peer.platform import processes

QUEUE = '''
import os, sys, time, types

def lives(process):
    try:
        return open("/proc/%d/stat" % process).read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False

class Queue:
    def __init__(self):
        self.watched = []
    def control(self, changes, most):
        for ident in changes or ():
            if not lives(ident):
                raise ProcessLookupError
            self.watched.append(ident)
        while changes is None:
            for ident in self.watched:
                if not lives(ident):
                    return [types.SimpleNamespace(ident=ident)]
            time.sleep(0.01)

found = types.ModuleType("select")
found.kqueue, found.kevent = Queue, lambda ident, *_: ident
found.KQ_FILTER_PROC = found.KQ_EV_ADD = found.KQ_NOTE_EXIT = 0
sys.modules["select"] = found
'''
code = QUEUE + processes._BECOME_CHILD.format(die_with_parent=processes._WATCH_PARENT)
child = subprocess.Popen([sys.executable, "-I", "-S", "-c", code, str(os.getpid()), "0", {SLEEP!r}, "300"])
print(child.pid, flush=True)
sys.stdin.readline()
child.terminate()
print(child.wait(), flush=True)
sys.stdin.readline()
"""
"""The way that macOS uses, with a stand-in for its kernel queue."""

HOLDER = """
import sys, time
from pathlib import Path
from peer.errors import StartError
from peer.files import StateFolder
try:
    folder = StateFolder(Path(sys.argv[1]))
except StartError as error:
    print(error, flush=True)
else:
    print("held", flush=True)
    time.sleep(300)
"""


def wait_until(condition: Callable[[], bool], deadline_s: float = 60.0) -> None:
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, "the condition did not come true in time"
        time.sleep(0.01)


def start_python(script: str, *arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen([sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE, text=True)


def first_line(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def kill(process: "subprocess.Popen[str]") -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


def test_a_child_is_gone_after_its_parent_was_killed() -> None:
    parent = start_python(PARENT)
    child = psutil.Process(int(first_line(parent)))
    wait_until(lambda: name_of(child) == "sleep")
    os.kill(parent.pid, signal.SIGSTOP)  # a parent that hangs is still a parent
    assert runs(child)
    kill(parent)
    wait_until(lambda: not runs(child))


def watched() -> tuple["subprocess.Popen[str]", psutil.Process, psutil.Process]:
    """The parent, the child, and the process that watches both."""
    parent = subprocess.Popen(
        [sys.executable, "-c", WATCHED], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    child = psutil.Process(int(first_line(parent)))
    wait_until(lambda: name_of(child) == "sleep" and len(child.children()) == 1)
    return parent, child, child.children()[0]


def test_where_the_kernel_does_not_kill_it_a_watcher_does() -> None:
    parent, child, watcher = watched()
    kill(parent)
    wait_until(lambda: not runs(child) and not runs(watcher))


def test_the_watcher_ends_with_the_child() -> None:
    parent, _, watcher = watched()
    assert parent.stdin is not None
    parent.stdin.write("\n")
    parent.stdin.flush()
    assert first_line(parent) == str(-signal.SIGTERM)
    wait_until(lambda: not runs(watcher))
    assert runs(psutil.Process(parent.pid))
    kill(parent)


def test_the_command_takes_the_place_of_the_child() -> None:
    child = subprocess.Popen(die_with_parent([SLEEP, "300"]))
    wait_until(lambda: psutil.Process(child.pid).name() == "sleep")
    child.terminate()
    assert child.wait() == -signal.SIGTERM


@pytest.mark.parametrize("status", [0, 3])
def test_exit_status_and_output_are_those_of_the_command(status: int) -> None:
    arguments = die_with_parent(["/bin/sh", "-c", f"echo $0 $1; exit {status}", "first", "with space"])
    result = subprocess.run(arguments, capture_output=True, text=True)
    assert result.returncode == status
    assert result.stdout == "first with space\n"


def test_a_child_whose_parent_is_gone_already_never_starts_the_command(tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    arguments = die_with_parent(["/bin/sh", "-c", f"touch {touched}"])
    # The shell is in between, so the child's parent is not the process that made the arguments.
    result = subprocess.run(["/bin/sh", "-c", '"$@"; exit $?', "sh", *arguments])
    assert result.returncode == 1
    assert not touched.exists()
    assert subprocess.run(arguments).returncode == 0
    assert touched.exists()


def test_a_state_folder_is_made_private_and_opens_once(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "state"
    folder = StateFolder(path)
    assert path.stat().st_mode & 0o077 == 0
    with pytest.raises(StartError, match="another process uses the state folder") as caught:
        StateFolder(path)
    assert str(path) in str(caught.value)
    assert "--state" in str(caught.value)
    folder.close()
    StateFolder(path).close()


def test_a_refused_state_folder_leaves_no_descriptor_open(tmp_path: Path) -> None:
    def opened() -> list[str]:
        paths = [file.path for file in psutil.Process().open_files()]
        return [path for path in paths if path.startswith(str(tmp_path))]

    folder = StateFolder(tmp_path)
    assert len(before := opened()) == 1
    for _ in range(3):
        with pytest.raises(StartError):
            StateFolder(tmp_path)
    assert opened() == before
    folder.close()
    assert opened() == []


def test_a_state_folder_is_held_against_other_processes_and_freed_by_a_kill(tmp_path: Path) -> None:
    holder = start_python(HOLDER, str(tmp_path))
    assert first_line(holder) == "held"
    with pytest.raises(StartError, match="another process uses the state folder"):
        StateFolder(tmp_path)
    rival = start_python(HOLDER, str(tmp_path))
    assert "another process uses the state folder" in first_line(rival)
    kill(rival)
    kill(holder)
    StateFolder(tmp_path).close()


def test_a_child_process_does_not_keep_the_folder(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path)
    child = subprocess.Popen(die_with_parent([SLEEP, "300"]))
    folder.close()
    StateFolder(tmp_path).close()
    child.kill()
    child.wait()


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for path in (tmp_path / "file", tmp_path / "file" / "state"):
        with pytest.raises(StartError, match="can't use the state folder") as caught:
            StateFolder(path)
        assert str(path) in str(caught.value)
    with pytest.raises(StartError, match=r"it is not a folder; pass another --state$"):
        require_folder(tmp_path / "file")
    require_folder(tmp_path)
    require_folder(tmp_path / "new")


def test_a_state_folder_that_others_can_write_to_is_taken_from_them(tmp_path: Path) -> None:
    state = tmp_path / "state"
    (state / "peers").mkdir(parents=True)
    (state / "peers" / "sauna.json").write_text("{}")
    (state / "peers").chmod(0o777)
    state.chmod(0o777)
    StateFolder(state).close()
    assert [stat.S_IMODE(path.stat().st_mode) for path in (state, state / "peers")] == [0o755, 0o755]


@pytest.mark.parametrize("at", [".", "peers"])
def test_what_others_may_have_planted_in_a_state_folder_is_refused(tmp_path: Path, at: str) -> None:
    state, kept = tmp_path / "state", tmp_path / "kept"
    (state / "peers").mkdir(parents=True)
    kept.write_text("kept")
    (state / at).chmod(0o777)
    (state / at / "lock").symlink_to(kept)
    with pytest.raises(StartError, match="'lock' there may be theirs"):
        StateFolder(state)
    assert kept.read_text() == "kept"


def test_a_lock_that_leads_elsewhere_is_not_followed(tmp_path: Path) -> None:
    state, kept = tmp_path / "state", tmp_path / "kept"
    state.mkdir(mode=0o700)
    kept.write_text("kept")
    (state / "lock").symlink_to(kept)
    with pytest.raises(StartError, match="can't use the state folder"):
        StateFolder(state)
    assert kept.read_text() == "kept"


def test_a_folder_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o700)
    with monkeypatch.context() as patched:
        me = os.geteuid()
        patched.setattr(os, "geteuid", lambda: me + 1)
        if me:  # root may hand a folder to a user
            with pytest.raises(StartError, match="belongs to another user"):
                StateFolder(tmp_path)
        else:
            tmp_path.chmod(0o1777)
            with pytest.raises(StartError, match="every user can write to"):
                StateFolder(tmp_path)
            os.chown(tmp_path, me + 2, -1)
            with pytest.raises(StartError, match="belongs to another user"):
                StateFolder(tmp_path)


@pytest.mark.parametrize("length", [20, 40, 41, 200])
def test_unix_sockets_have_room_for_their_paths(
    length: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given = Path(f"/tmp/{uuid.uuid4().hex}".ljust(length, "x")[:length])
    given.mkdir()
    try:
        monkeypatch.setattr(tempfile, "tempdir", str(given))
        with private_socket_folder() as folder, socket.socket(socket.AF_UNIX) as bound:
            assert Path(folder).parent == (given if length <= 40 else Path("/tmp"))
            bound.bind(f"{folder}/{'x' * 27}")
    finally:
        shutil.rmtree(given)


@pytest.fixture
def dead_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder as a process with this process id, which has ended, would have left it."""
    with subprocess.Popen(["true"]) as ended:
        ended.wait()
    with monkeypatch.context() as patched:
        patched.setattr(os, "getpid", lambda: ended.pid)
        folder = private_socket_folder()
    yield Path(folder.name)
    with contextlib.suppress(FileNotFoundError):
        folder.cleanup()


def test_folders_of_ended_processes_are_swept_with_their_sockets(dead_folder: Path) -> None:
    with private_socket_folder() as own, socket.socket(socket.AF_UNIX) as ended:
        ended.bind(str(dead_folder / "socket"))
        ended.close()
        sweep_socket_folders()
        assert not dead_folder.exists()
        assert Path(own).exists()


def test_sockets_of_living_programs_are_not_touched(dead_folder: Path) -> None:
    """The process id may be that of a process in another container."""
    with socket.socket(socket.AF_UNIX) as living:
        living.bind(str(dead_folder / "socket"))  # not listening yet: a connection is refused
        sweep_socket_folders()
        assert dead_folder.exists()
        living.listen()
        living.setblocking(False)
        sweep_socket_folders()
        assert dead_folder.exists()
        with pytest.raises(BlockingIOError):  # and nobody called there
            living.accept()


def test_a_folder_of_no_possible_process_is_passed_over(dead_folder: Path) -> None:
    strange = dead_folder.with_name(f"talkoot-sockets-{'9' * 40}-x")
    strange.mkdir()
    try:
        sweep_socket_folders()
        assert strange.exists()
    finally:
        strange.rmdir()


@pytest.mark.parametrize("kind", ["file", "link", "folder"])
def test_nothing_but_folders_of_dead_sockets_is_swept(dead_folder: Path, kind: str, tmp_path: Path) -> None:
    """Any user can make a folder with such a name."""
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").write_text("kept")
    if kind == "file":
        (dead_folder / "file").write_text("kept")
    elif kind == "link":
        dead_folder.rmdir()
        dead_folder.symlink_to(kept)
    else:
        (dead_folder / "folder").mkdir()
    sweep_socket_folders()
    assert dead_folder.exists()
    assert (kept / "file").exists()
    if kind == "link":
        dead_folder.unlink()


def test_a_lock_is_waited_for_and_given_up_in_time(tmp_path: Path) -> None:
    with (tmp_path / "lock").open("wb") as first, (tmp_path / "lock").open("wb") as second:
        wait_for_lock(first.fileno(), 0.0)
        with pytest.raises(BlockingIOError):
            wait_for_lock(second.fileno(), 0.1)
        threading.Timer(0.2, first.close).start()
        wait_for_lock(second.fileno(), 60.0)
