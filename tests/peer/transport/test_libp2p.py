"""p2pd opens streams, is started again when it dies, and leaves nothing behind however it ends."""

import asyncio
import gc
import logging
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
from callers import numbered_identities
from other_processes import runs

from peer.errors import DaemonError, StartError, UnreachableError
from peer.identity import Identity, PeerID
from peer.loop import LoopThread
from peer.metrics import total
from peer.platform import p2pd as p2pd_here
from peer.platform.processes import die_with_parent
from peer.platform.sockets import _is_unbound
from peer.transport import libp2p, p2pd
from peer.transport.addresses import Multiaddress, RemoteEnd
from peer.transport.dialling import Dialling
from peer.transport.endpoints import AddressScope, Endpoint
from peer.transport.libp2p import Libp2p
from peer.transport.p2pd_setup import Libp2pConfig
from peer.transport.pipes import Pipe

LOCAL = "127.0.0.1"
ECHO = "/test/echo/1"
DEADLINE_S = 60.0

OWNER = """
import asyncio, multiprocessing, sys
from pathlib import Path
import psutil
from peer.identity import Identity
from peer.transport.dialling import Dialling
from peer.transport.endpoints import AddressScope
from peer.transport.libp2p import Libp2p
from peer.transport.p2pd_setup import Libp2pConfig

multiprocessing.set_start_method("spawn")  # then locks between processes start one more, as always from 3.14 on

async def main():
    identity = Identity.load_or_create(Path(sys.argv[1]))
    peer = Libp2p(identity, Libp2pConfig("127.0.0.1"), Dialling(AddressScope.LOOPBACK))
    await peer.start()
    (daemon,) = psutil.Process().children()
    assert multiprocessing.get_start_method() == "spawn"
    print(daemon.pid, peer._daemon.daemon_listen_maddr["unix"], flush=True)
    await asyncio.sleep(300)

asyncio.run(main())
"""

WITHOUT_HIVEMIND = """
import sys

class Refusing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hivemind":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.modules["hivemind"] = None  # the same to whoever only looks whether it is there
sys.meta_path.insert(0, Refusing())
import expert_server.node, peer.host, trainer_client.client
from peer.platform import p2pd
print(p2pd.why_unavailable(), flush=True)
sys.argv = ["talkoot", "--help"]
from talkoot import cli
cli.main()
"""


@pytest.fixture(scope="module")
def identities() -> list[Identity]:
    return numbered_identities(2)


@pytest.fixture(autouse=True)
def leaves_nothing(loop: LoopThread, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Checks that no process, socket folder or task is left, and that asyncio has reported no error."""
    folders: list[Path] = []
    complaints: list[dict[str, Any]] = []

    def note_socket(arguments: Sequence[str]) -> list[str]:
        (listen,) = [a for a in arguments if a.startswith("-listen=/unix")]
        folders.append(Path(listen.removeprefix("-listen=/unix")).parent)
        return die_with_parent(arguments)

    async def hear(handler: Any) -> set["asyncio.Task[Any]"]:
        asyncio.get_running_loop().set_exception_handler(handler)
        return asyncio.all_tasks() - {asyncio.current_task()}

    monkeypatch.setattr(p2pd, "die_with_parent", note_socket)
    usual = loop.loop.get_exception_handler()
    before = daemons(), loop.run(hear(lambda loop, context: complaints.append(context)))
    yield
    gc.collect()
    wait_until(lambda: daemons() <= before[0] and not [path for path in folders if path.exists()])
    wait_until(lambda: loop.run(hear(usual)) <= before[1])
    assert complaints == []


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end, "the condition did not come true in time"
        time.sleep(0.01)


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not is_so():  # noqa: ASYNC110  # another process decides
            await asyncio.sleep(0.01)


def daemons() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


def make(identity: Identity, **config: Any) -> Libp2p:
    return Libp2p(identity, Libp2pConfig(LOCAL, **config), Dialling(AddressScope.LOOPBACK))


@asynccontextmanager
async def running(peer: Libp2p) -> Any:
    await peer.start()
    try:
        yield peer
    finally:
        await peer.stop()


def kill(peer: Libp2p) -> None:
    os.kill(child(peer).pid, signal.SIGKILL)


def child(peer: Libp2p) -> psutil.Process:
    assert peer._daemon is not None
    return psutil.Process(peer._daemon._child.pid)


async def echo(caller: PeerID, end: RemoteEnd, pipe: Pipe) -> None:
    reader, writer = pipe
    writer.write(caller.to_bytes() + await reader.read(100))
    writer.close()


async def ask(caller: Libp2p, callee: Libp2p, text: bytes) -> bytes:
    """Sends the text to the peer's echo service, wherever the peer is by now."""
    address = (await callee.addresses())[0]
    reader, writer = await caller.open_stream(address.peer_id, [address], ECHO, 10.0)
    try:
        writer.write(text)
        async with asyncio.timeout(DEADLINE_S):
            return await reader.read()
    finally:
        writer.close()


def play(loop: LoopThread, scenario: Coroutine[Any, Any, None]) -> None:
    loop.run(scenario, 120)


@pytest.mark.slow
def test_a_stream_tells_who_opened_it_also_after_p2pd_was_killed(
    loop: LoopThread, identities: list[Identity], caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        public, hidden = make(identities[0]), make(identities[1], public=False)
        await public.serve_streams(ECHO, echo)  # before there is a p2pd
        async with running(public), running(hidden):
            answer = identities[1].peer_id.to_bytes() + b"hello"
            assert await ask(hidden, public, b"hello") == answer
            before = await public.addresses()
            kill(public)
            await until(lambda: total(public.restarts) == 1)
            assert public.alive
            assert await public.addresses() == before, "it has another port"
            assert await ask(hidden, public, b"hello") == answer

    caplog.set_level(logging.WARNING)
    play(loop, scenario())
    assert caplog.text.count("the libp2p daemon ended with status -9; starting it again") == 1


@pytest.mark.slow
def test_a_p2pd_that_dies_as_a_protocol_is_added_serves_it_when_it_runs_again(
    loop: LoopThread,
    identities: list[Identity],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def fails(*arguments: Any) -> None:
        raise ConnectionResetError("p2pd has gone")

    async def scenario() -> None:
        async with (
            running(make(identities[0])) as public,
            running(make(identities[1], public=False)) as hidden,
        ):
            with monkeypatch.context() as patch:
                patch.setattr(p2pd.Daemon, "add_binary_stream_handler", fails)
                await public.serve_streams(ECHO, echo)
            kill(public)
            await until(lambda: total(public.restarts) == 1)
            assert await ask(hidden, public, b"hello") == identities[1].peer_id.to_bytes() + b"hello"

    play(loop, scenario())
    assert f"{ECHO} will be served when the libp2p daemon runs again: p2pd has gone" in caplog.text


def test_one_behind_a_router_listens_nowhere_on_loopback(
    loop: LoopThread, identities: list[Identity]
) -> None:
    async def scenario() -> None:
        async with running(make(identities[0], public=False)) as peer:
            assert await peer.addresses() == []
            listening = [c for c in child(peer).net_connections(kind="tcp") if c.status == psutil.CONN_LISTEN]
            assert not listening

    play(loop, scenario())


def test_it_can_be_hidden_and_public_again_on_its_port(loop: LoopThread, identities: list[Identity]) -> None:
    async def scenario() -> None:
        async with running(make(identities[0])) as peer:
            (before,) = await peer.addresses()
            await peer.restart_as(public=False, relays=[before])
            assert peer.alive
            assert not peer.config.public
            assert await peer.addresses() == []
            await peer.restart_as(public=True)
            assert await peer.addresses() == [before]
            assert total(peer.restarts) == 0, "it did not die"

    play(loop, scenario())


def test_a_p2pd_that_takes_too_much_memory_is_started_again(
    loop: LoopThread,
    identities: list[Identity],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def scenario() -> None:
        async with running(make(identities[0])) as peer:
            with monkeypatch.context() as patch:
                patch.setattr(libp2p, "_MOST_DAEMON_BYTES", 0)
                await until(lambda: not peer.alive)
            await until(lambda: total(peer.restarts) == 1)

    monkeypatch.setattr(libp2p, "_WATCH_EVERY_S", 0.01)
    play(loop, scenario())
    assert "MiB of memory, which is too much; starting it again" in caplog.text


def test_a_p2pd_that_does_not_start_again_is_tried_for_ever_with_bounded_pauses(
    loop: LoopThread,
    identities: list[Identity],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tries: list[float] = []
    faults = [StartError("no p2pd for this test")] * 7 + [RuntimeError("nobody foresaw this")]
    start_daemon = p2pd.start_daemon

    async def fails(*arguments: Any) -> Any:
        tries.append(time.monotonic())
        if faults:
            raise faults.pop(0)
        return await start_daemon(*arguments)

    async def scenario() -> None:
        async with running(make(identities[0])) as peer:
            monkeypatch.setattr(p2pd, "start_daemon", fails)
            kill(peer)
            await until(lambda: total(peer.restarts) == 1)

    monkeypatch.setattr(libp2p, "_RESTART_PAUSES_S", (0.0, 0.05, 0.1, 0.2))
    play(loop, scenario())
    waits = [after - before for before, after in pairwise(tries)]
    assert len(tries) == 9
    assert all(wait >= 0.9 * pause for wait, pause in zip(waits, (0.05, 0.1, *[0.2] * 5), strict=False))
    assert caplog.text.count("can't be restarted: no p2pd for this test") == 1, "said once"
    assert "could not supervise the libp2p daemon" in caplog.text


def test_a_failed_change_is_reported_and_tried_again(
    loop: LoopThread, identities: list[Identity], monkeypatch: pytest.MonkeyPatch
) -> None:
    start_daemon = p2pd.start_daemon

    async def fails(*arguments: Any) -> Any:
        monkeypatch.setattr(p2pd, "start_daemon", start_daemon)
        raise DaemonError("not at once")

    async def scenario() -> None:
        async with running(make(identities[0])) as peer:
            monkeypatch.setattr(p2pd, "start_daemon", fails)
            with pytest.raises(DaemonError, match="not at once"):
                await peer.restart_as(public=False)
            await until(lambda: peer.alive)
            assert not peer.config.public

    play(loop, scenario())


def test_a_start_that_fails_leaves_nothing_and_can_be_repeated(
    loop: LoopThread, identities: list[Identity], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fails(*arguments: Any) -> None:
        raise UnreachableError("it has just died")

    async def scenario() -> None:
        peer = make(identities[0])
        await peer.serve_streams(ECHO, echo)
        with monkeypatch.context() as patch:
            patch.setattr(p2pd.Daemon, "serve_streams", fails)
            with pytest.raises(DaemonError, match="does not answer"):
                await peer.start()
        assert not peer.alive
        with pytest.raises(UnreachableError):
            await peer.addresses()
        async with running(peer):
            assert peer.alive

    play(loop, scenario())


def test_a_cancelled_start_leaves_nothing(loop: LoopThread, identities: list[Identity]) -> None:
    async def scenario() -> None:
        before = daemons()
        for delay_s in (0.0, 0.05, 0.1):
            peer = make(identities[0])
            task = asyncio.create_task(peer.start())
            await until(lambda: daemons() != before)
            await asyncio.sleep(delay_s)  # somewhere within the start, or soon after
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            if not task.cancelled():
                await peer.stop()
            await until(lambda: daemons() == before)
            assert not peer.alive

    play(loop, scenario())


def test_a_start_that_is_cancelled_as_p2pd_gets_ready_is_cancelled(
    loop: LoopThread, identities: list[Identity], monkeypatch: pytest.MonkeyPatch
) -> None:
    read_outputs = p2pd.Daemon._read_outputs

    async def scenario() -> None:
        async def cancel_when_ready(self: p2pd.Daemon, ready: "asyncio.Future[None]") -> None:
            ready.add_done_callback(lambda _: task.cancel())
            await read_outputs(self, ready)

        monkeypatch.setattr(p2pd.Daemon, "_read_outputs", cancel_when_ready)
        task = asyncio.create_task(make(identities[0]).start())
        await asyncio.wait([task])
        assert task.cancelled()

    play(loop, scenario())


def test_stop_ends_a_start_under_way(loop: LoopThread, identities: list[Identity]) -> None:
    async def scenario() -> None:
        before = daemons()
        peer = make(identities[0])
        task = asyncio.create_task(peer.start())
        await until(lambda: daemons() != before)
        await peer.stop()
        await until(lambda: daemons() == before)
        with pytest.raises(DaemonError, match="stopped before it had started"):
            await task

    play(loop, scenario())


def test_stopping_twice_while_p2pd_is_dead_or_starts_again_is_harmless(
    loop: LoopThread, identities: list[Identity]
) -> None:
    async def scenario() -> None:
        before = daemons()
        for delay_s in (0.0, 0.05, 0.15):
            peer = make(identities[0])
            await peer.start()
            kill(peer)
            await asyncio.sleep(delay_s)  # somewhere within the restart
            await peer.stop()
            await peer.stop()
            # A p2pd that was just being started is ended, without waiting for it.
            await until(lambda: daemons() == before)

    play(loop, scenario())


def test_after_stop_no_descriptor_is_left(loop: LoopThread, identities: list[Identity]) -> None:
    async def start_and_stop() -> None:
        async with running(make(identities[0])):
            pass

    loop.run(start_and_stop(), 120)  # what is opened once for all is open now
    open_before = psutil.Process().num_fds()
    for _ in range(2):
        loop.run(start_and_stop(), 120)
        wait_until(lambda: psutil.Process().num_fds() <= open_before)


def test_p2pd_dies_with_a_killed_process_and_the_next_start_sweeps_its_sockets(
    loop: LoopThread, identities: list[Identity], tmp_path: Path
) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", OWNER, str(tmp_path / "owner.key")],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert owner.stdout is not None
    with owner.stdout:
        pid, left = owner.stdout.readline().split()
    daemon = psutil.Process(int(pid))
    assert daemon.name() == "p2pd"
    assert Path(left).exists()
    owner.kill()
    owner.wait()
    wait_until(lambda: not runs(daemon))
    # its last thread ends, and closes it, a moment later; a p2pd of another test may then sweep it at once
    wait_until(lambda: _is_unbound(Path(left)) or not Path(left).exists())

    async def scenario() -> None:
        async with running(make(identities[0])):
            assert not Path(left).parent.exists()

    play(loop, scenario())


def test_no_other_user_can_enter_the_folder_of_the_sockets(
    loop: LoopThread, identities: list[Identity]
) -> None:
    async def scenario() -> None:
        before = os.umask(0)
        peer = make(identities[0])
        try:
            await peer.start()
        finally:
            os.umask(before)
        async with asyncio.timeout(DEADLINE_S):
            daemon = peer._daemon
            assert daemon is not None
            sockets = [Path(daemon.daemon_listen_maddr["unix"]), Path(daemon._client_listen_maddr["unix"])]
            assert all(stat.S_IMODE(path.parent.stat().st_mode) == 0o700 for path in sockets)
            assert sockets[0].is_socket()
            await peer.stop()

    play(loop, scenario())


def test_a_busy_port_is_named(loop: LoopThread, identities: list[Identity]) -> None:
    with socket.create_server((LOCAL, 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(
            DaemonError, match=f"daemon can't listen on 127.0.0.1 port {port}.*pass another port"
        ):
            loop.run(make(identities[0], port=port).start(), 120)


def test_without_p2pd_every_question_has_an_answer(loop: LoopThread, identities: list[Identity]) -> None:
    async def scenario() -> None:
        peer = make(identities[0])
        address = Multiaddress.of(Endpoint.of(LOCAL, 1), identities[1].peer_id)
        questions: list[Awaitable[Any]] = [
            peer.addresses(),
            peer.open_stream(identities[1].peer_id, [address], ECHO, 1.0),
        ]
        for question in questions:
            with pytest.raises(UnreachableError, match="does not run now"):
                await question
        await peer.stop()

    play(loop, scenario())


def header(system: str, number: int) -> bytes:
    if system == "Linux":
        return b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x02\x00" + number.to_bytes(2, "little")
    return b"\xcf\xfa\xed\xfe" + number.to_bytes(4, "little") + bytes(12)


X86_LINUX, ARM_LINUX = header("Linux", 62), header("Linux", 183)
X86_MAC, ARM_MAC = header("Darwin", 0x0100_0007), header("Darwin", 0x0100_000C)


@pytest.mark.parametrize(
    ("system", "machine", "program", "said"),
    [
        ("Linux", "x86_64", X86_LINUX, ""),
        ("Linux", "aarch64", ARM_LINUX, ""),  # built from source
        ("Darwin", "arm64", ARM_MAC, ""),
        ("Darwin", "x86_64", X86_MAC, ""),
        (
            "Linux",
            "aarch64",
            X86_LINUX,
            "is for Linux on x86_64, but this is Linux on aarch64; nothing needs",
        ),
        (
            "Darwin",
            "arm64",
            X86_LINUX,
            "is for Linux on x86_64, but this is Darwin on arm64; reinstall it: `py",
        ),
        ("Darwin", "arm64", X86_MAC, "is for Darwin on x86_64, but this is Darwin on arm64; reinstall it"),
        ("Linux", "x86_64", header("Linux", 40), "is for Linux on machine 40, but"),
        ("Windows", "AMD64", X86_LINUX, "but this is Windows on AMD64; nothing needs to be done"),
        ("Linux", "x86_64", b"", "is no program, but"),
        ("Linux", "x86_64", b"\x7fELF\x02\x01", "is no program, but"),
        ("Linux", "x86_64", b"#!/bin/sh\nexit 0\n\n\n\n", "is no program, but"),
        ("Linux", "x86_64", None, "hivemind's libp2p daemon is missing; reinstall it: `python -m pip"),
        ("Linux", "aarch64", None, "hivemind has no libp2p daemon for Linux on aarch64; nothing needs"),
    ],
)
def test_why_a_machine_has_no_p2pd(
    tmp_path: Path, system: str, machine: str, program: bytes | None, said: str
) -> None:
    path = tmp_path / "p2pd"
    if program is not None:
        path.write_bytes(program + bytes(100) if len(program) == 20 else program)
    answer = p2pd_here._why_unavailable(system, machine, path)
    assert said in answer
    assert bool(answer) == bool(said)


@pytest.mark.parametrize(
    ("system", "machine", "said"),
    [
        ("Linux", "x86_64", "is not installed: `python -m pip install hivemind=="),
        ("Windows", "AMD64", "hivemind has no libp2p daemon for Windows on AMD64"),
    ],
)
def test_why_a_machine_without_hivemind_has_no_p2pd(system: str, machine: str, said: str) -> None:
    assert said in p2pd_here._why_unavailable(system, machine, None)


def test_this_machine_has_a_p2pd() -> None:
    assert p2pd_here.why_unavailable() == ""


def test_a_start_says_why_there_is_no_p2pd(
    loop: LoopThread, identities: list[Identity], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(libp2p, "why_unavailable", lambda: "there is none on the moon")
    with pytest.raises(DaemonError, match="there is none on the moon"):
        loop.run(make(identities[0]).start(), 120)


@pytest.mark.slow
def test_everything_else_works_without_hivemind() -> None:
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WITHOUT_HIVEMIND], capture_output=True, text=True, timeout=240
    )
    assert "hivemind, which brings the libp2p daemon, is not installed: `python -m pip" in ended.stdout
    assert "Usage: talkoot" in ended.stdout
    assert (ended.returncode, ended.stderr) == (0, "")


def test_a_broken_hivemind_is_said_to_be_so(
    loop: LoopThread, identities: list[Identity], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("peer.transport.p2pd")
    monkeypatch.setitem(sys.modules, "peer.transport.p2pd", None)
    with pytest.raises(DaemonError, match=r"can't import hivemind: .*; reinstall it: `python -m pip"):
        loop.run(make(identities[0]).start(), 120)
