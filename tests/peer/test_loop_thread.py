"""A loop ends and logs nothing, whatever was still open in it."""

import asyncio
import ctypes
import os
import sys
import threading
import traceback
from collections.abc import Callable

import pytest
from callers import numbered_identities

from peer.loop import LoopThread
from peer.platform.loop import new_event_loop
from peer.transport.dialling import Dialling
from peer.transport.endpoints import AddressScope
from peer.transport.libp2p import Libp2p
from peer.transport.p2pd_setup import Libp2pConfig


@pytest.fixture
def thread() -> LoopThread:
    return LoopThread()


def descriptor_of(pid: int, number: int) -> int:
    """Copies another process's file descriptor, by the kernel's pidfd_getfd."""
    process = os.pidfd_open(pid)
    try:
        found = ctypes.CDLL(None, use_errno=True).syscall(438, process, number, 0)
    finally:
        os.close(process)
    assert found >= 0, os.strerror(ctypes.get_errno())
    return int(found)


@pytest.mark.parametrize("make_loop", [new_event_loop, asyncio.new_event_loop])
def test_a_task_that_ends_the_program_stops_no_other(
    make_loop: Callable[[], asyncio.AbstractEventLoop], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A SystemExit stops asyncio's loop: who waits for a task on it, or closes it, would wait forever."""
    monkeypatch.setattr("peer.loop.new_event_loop", make_loop)
    thread = LoopThread()
    let_go, cleaned_up = asyncio.Event(), []

    async def wait() -> str:
        await let_go.wait()
        return "done"

    async def end(*, late: bool = False) -> None:
        try:
            if late:
                await asyncio.Event().wait()
        finally:
            cleaned_up.append(late)
            raise SystemExit(1)

    waiting = thread.submit(wait())
    with pytest.raises(SystemExit):
        thread.run(end(), 60)
    thread.loop.call_soon_threadsafe(sys.exit, 1)
    thread.loop.call_soon_threadsafe(let_go.set)
    assert waiting.result(60) == "done"
    thread.submit(end(late=True))
    thread.run(asyncio.sleep(0), 60)
    thread.close()
    assert thread.loop.is_closed()
    assert cleaned_up == [False, True]


def test_it_closes_while_another_process_has_p2pds_output(thread: LoopThread) -> None:
    config = Libp2pConfig("127.0.0.1")
    libp2p = Libp2p(numbered_identities(1)[0], config, Dialling(AddressScope.LOOPBACK))
    thread.run(libp2p.start(), 120)
    assert libp2p._daemon is not None
    held = descriptor_of(libp2p._daemon._child.pid, 1)
    try:
        thread.run(libp2p.stop(), 120)
        thread.close()
        assert thread.loop.is_closed()
    finally:
        os.close(held)


def test_a_streams_handler_that_is_cancelled_is_no_error(
    thread: LoopThread, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        handling: asyncio.Future[asyncio.Task[None] | None] = asyncio.get_running_loop().create_future()

        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            handling.set_result(asyncio.current_task())
            try:
                await reader.read()
            finally:
                writer.close()

        async with await asyncio.start_server(handle, "127.0.0.1", 0) as server:
            _, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            task = await handling
            assert task is not None
            task.cancel()
            await asyncio.wait({task})
            writer.close()
            await writer.wait_closed()

    try:
        thread.run(scenario(), 60)
    finally:
        thread.close()
    assert not caplog.records


@pytest.mark.parametrize(("inside_s", "whole_s"), [(0.01, 60.0), (60.0, 0.01)])
def test_a_timeout_names_the_line_that_waited(loop: LoopThread, inside_s: float, whole_s: float) -> None:
    """Also if the time of the whole call is over, on the loop that all tests share."""

    async def wait_in_vain() -> None:
        async with asyncio.timeout(inside_s):
            await asyncio.Event().wait()

    with pytest.raises(TimeoutError) as caught:
        loop.run(wait_in_vain(), whole_s)
    assert "in wait_in_vain" in "".join(traceback.format_exception(caught.value))


def test_nobody_waits_for_ever_for_what_is_submitted_while_it_closes(thread: LoopThread) -> None:
    """For example a training step on another thread, which calls its next layer."""
    let_go, is_cancelled = threading.Event(), threading.Event()

    async def work() -> None:
        try:
            await asyncio.to_thread(let_go.wait)
        finally:
            is_cancelled.set()

    thread.submit(work())
    closing = threading.Thread(target=thread.close)
    thread.run(asyncio.sleep(0), 60)
    closing.start()
    try:
        assert is_cancelled.wait(60)
        with pytest.raises(RuntimeError, match="the event loop is closed"):
            thread.run(asyncio.sleep(60), 5)
    finally:
        let_go.set()
        closing.join()


def test_what_was_cancelled_before_it_closes_cleans_up_whole(thread: LoopThread) -> None:
    """For example a join, with its p2pd and the folder of its sockets."""
    begun, said = threading.Event(), []

    async def work() -> None:
        inner = asyncio.create_task(asyncio.Event().wait())
        try:
            begun.set()
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.05)
            said.append("inner cancelled" if inner.done() else "inner runs")
            inner.cancel()
            await asyncio.wait({inner})
            said.append("cleaned up")

    future = thread.submit(work())
    assert begun.wait(60)
    future.cancel()
    thread.close()
    assert said == ["inner runs", "cleaned up"]
