"""Cancelled calls through p2pd, with a stand-in for p2pd on its own thread."""

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any, cast
from uuid import uuid4

import pytest
from google.protobuf.message import Message
from google.protobuf.proto import parse_length_prefixed, serialize_length_prefixed
from hivemind.p2p.p2p_daemon_bindings.control import ControlClient, DaemonConnector
from hivemind.proto import p2pd_pb2
from hivemind.utils.multiaddr import Multiaddr

from peer.identity import PeerID
from peer.loop import LoopThread
from peer.transport.p2pd import patch_control_client

OTHER = PeerID.from_base58("QmNLei78zWmzUdbeRB3CiUfAizWUrbeeZh5K1rhAQKCh51")


class StandIn:
    """Accepts one connection, and queues what it receives."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.calls: SimpleQueue[Any] = SimpleQueue()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def send(self, call_id: bytes, **what: Message) -> None:
        serialize_length_prefixed(p2pd_pb2.PersistentConnectionResponse(callId=call_id, **what), self._stream)
        self._stream.flush()

    def answer(self, call_id: bytes, response: bytes) -> None:
        self.send(call_id, callUnaryResponse=p2pd_pb2.CallUnaryResponse(response=response))

    def close(self) -> None:
        self._listener.close()
        with contextlib.suppress(OSError):  # the other side has closed it
            self._connection.shutdown(socket.SHUT_RDWR)
        self._thread.join()

    def _serve(self) -> None:
        self._connection, _ = self._listener.accept()
        with self._connection, cast("Any", self._connection.makefile("rwb")) as self._stream:
            parse_length_prefixed(p2pd_pb2.Request, self._stream)
            serialize_length_prefixed(p2pd_pb2.Response(type=p2pd_pb2.Response.OK), self._stream)
            self._stream.flush()
            while (
                message := parse_length_prefixed(p2pd_pb2.PersistentConnectionRequest, self._stream)
            ) is not None:
                self.calls.put(message)


@pytest.fixture
def p2pd(tmp_path: Path) -> Iterator[StandIn]:
    with contextlib.closing(StandIn(tmp_path / "p2pd.sock")) as stand_in:
        yield stand_in


async def connected(p2pd: StandIn) -> Any:
    control = await ControlClient.create(DaemonConnector(Multiaddr(f"/unix{p2pd.path}")))
    patch_control_client(control)
    return control


async def disconnect(control: Any) -> None:
    control.close()
    await asyncio.wait([control._read_task, control._write_task])


def test_an_answer_at_the_moment_of_the_deadline_breaks_no_other_call(
    loop: LoopThread, p2pd: StandIn
) -> None:
    async def call(control: Any, deadline_s: float) -> bytes:
        async with asyncio.timeout(deadline_s):
            answer: bytes = await control.call_unary_handler(OTHER, "DHTProtocol.rpc_ping", b"?")
        return answer

    async def scenario() -> None:
        control = await connected(p2pd)
        began = time.monotonic()
        late = asyncio.create_task(call(control, 1.0))
        request = await asyncio.to_thread(p2pd.calls.get)
        p2pd.answer(request.callId, b"late")
        # a busy loop: in its next turn there are both
        time.sleep(max(0.0, began + 1.1 - time.monotonic()))  # noqa: ASYNC251
        with contextlib.suppress(TimeoutError):
            await late
        next_one = asyncio.create_task(call(control, 60))
        while not (request := await asyncio.to_thread(p2pd.calls.get)).HasField("callUnary"):
            pass
        p2pd.answer(request.callId, b"in time")
        assert await next_one == b"in time"
        await disconnect(control)

    loop.run(scenario(), 120)


def test_cancelled_calls_of_others_are_forgotten(loop: LoopThread, p2pd: StandIn) -> None:
    async def scenario() -> None:
        control = await connected(p2pd)
        begun, cancelled = asyncio.Event(), asyncio.Event()

        async def handler(request: bytes, caller: PeerID) -> bytes:
            begun.set()
            await asyncio.Event().wait()
            return b""

        control.unary_handlers["wait"] = handler
        call_id = uuid4().bytes
        request = p2pd_pb2.CallUnaryRequest(peer=OTHER.to_bytes(), proto="wait", data=b"")
        await asyncio.to_thread(p2pd.send, call_id, requestHandling=request)
        await begun.wait()
        (task,) = control._handler_tasks.values()
        task.add_done_callback(lambda _: cancelled.set())
        await asyncio.to_thread(p2pd.send, call_id, cancel=p2pd_pb2.Cancel())
        async with asyncio.timeout(60):
            await cancelled.wait()
        await asyncio.sleep(0)  # what is to be done at its end
        assert not control._handler_tasks
        await disconnect(control)

    loop.run(scenario(), 120)
