"""Callers that do everything wrong, again and again, to a node in another process."""

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc
import torch
from callers import a_caller
from grpc import StatusCode
from stranger import new_identity

from dht.announcements import NodeInfo
from dht.manifest import Manifest
from dht.uid import UID
from peer import PROTOCOL_VERSION
from peer.codec import CHUNK_BYTES
from peer.rpc.channels import CLIENT_OPTIONS
from peer.rpc.sessions import Metadata
from peer.wire import expert_pb2, expert_pb2_grpc

WRONG = (StatusCode.INVALID_ARGUMENT, StatusCode.FAILED_PRECONDITION)
BROKEN_OFF = StatusCode.INTERNAL
"""What grpc.aio reports for any status that arrives while it writes."""


class Troublemakers:
    """Each method misbehaves once, in one way. They share only the node and its manifest."""

    def __init__(
        self, node: NodeInfo, manifest: Manifest, swarm_id: str, uids: Sequence[UID], seed: int = 0
    ) -> None:
        """`uids`: experts that may be spoilt. `seed`: use each only once with a node, which remembers ids."""
        self.made: Counter[str] = Counter()
        """Misdeeds by name."""
        self._address, self._pem = node.addresses[0], node.certificate_pem
        self._manifest, self._swarm_id, self._uids = manifest, swarm_id, uids
        self._rng = random.Random(seed)
        self._generator = torch.Generator().manual_seed(seed)
        self._channel = self._open()
        self._peer_id = node.peer_id
        self._sessions = a_caller(swarm_id, new_identity())
        self._session: Metadata = ()

    async def trouble(self, seconds: float, callers: int, misdeeds: Sequence[str] = ()) -> None:
        """Does all misdeeds, or those named, in turn, from `callers` callers at once."""
        ways: dict[str, Callable[[], Awaitable[None]]] = {
            "give too little time": self.give_too_little_time,
            "cancel while sending": self.cancel_while_sending,
            "cancel while receiving": self.cancel_while_receiving,
            "call wrongly": self.call_wrongly,
            "abandon what is kept": self.abandon_what_is_kept,
            "replay": self.replay,
            "hang up": self.hang_up,
            "send garbage": self.send_garbage,
        }
        ends = asyncio.get_running_loop().time() + seconds
        self._session = await self._sessions.metadata(self._peer_id, self._channel, 10.0)

        async def misbehave(first: int) -> None:
            names = list(misdeeds or ways)
            while asyncio.get_running_loop().time() < ends:
                name = names[(first + self.made.total()) % len(names)]
                await ways[name]()
                self.made[name] += 1

        try:
            async with asyncio.TaskGroup() as group:
                for number in range(callers):
                    group.create_task(misbehave(number))
        finally:
            await self._channel.close()

    async def give_too_little_time(self) -> None:
        stream = self._call("Forward", timeout=self._rng.uniform(0.001, 0.03))
        code = await self._exchange(stream, self._requests("forward", rows=512))
        assert code in (StatusCode.DEADLINE_EXCEEDED, StatusCode.OK, BROKEN_OFF), code

    async def cancel_while_sending(self) -> None:
        stream = self._call(self._rng.choice(["Forward", "Backward"]))
        header, chunk = self._requests("backward", rows=2 * CHUNK_BYTES // (4 * self._manifest.width))
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            await stream.write(header)
            await stream.write(expert_pb2.CallRequest(chunk=chunk.chunk[:CHUNK_BYTES]))
        stream.cancel()
        await stream.code()

    async def cancel_while_receiving(self) -> None:
        stream = self._call("Forward")
        for request in self._requests("forward", rows=2 * CHUNK_BYTES // (4 * self._manifest.width)):
            await stream.write(request)
        await stream.done_writing()
        if self._rng.random() < 0.5:
            await stream.read()  # the first of several messages
        stream.cancel()
        await stream.code()

    async def call_wrongly(self) -> None:
        header, chunk = self._requests("forward", rows=16)
        nan = torch.full((16, self._manifest.width), torch.nan).numpy().tobytes()
        narrow = expert_pb2.CallRequest()
        narrow.CopyFrom(header)
        narrow.header.width -= 1
        foreign = expert_pb2.CallRequest()
        foreign.CopyFrom(header)
        foreign.header.swarm_id = "another"
        wrong = self._rng.choice(
            [
                [chunk, header],
                [narrow, chunk],
                [foreign, chunk],
                [header, chunk, chunk],
                [header, expert_pb2.CallRequest(chunk=chunk.chunk[:-4])],
                [header, expert_pb2.CallRequest(chunk=nan)],
            ]
        )
        code = await self._exchange(self._call("Forward"), wrong)
        assert code in (*WRONG, BROKEN_OFF), code

    async def abandon_what_is_kept(self) -> None:
        requests = self._requests("forward", rows=64)
        requests[0].header.keep = True
        code = await self._exchange(self._call("Forward"), requests)
        assert code is StatusCode.OK, code

    async def replay(self) -> None:
        requests = self._requests("backward", rows=16)
        codes = [await self._exchange(self._call("Backward"), requests) for _ in range(2)]
        assert codes[0] is StatusCode.OK, codes
        assert codes[1] in (StatusCode.ALREADY_EXISTS, BROKEN_OFF), codes

    async def hang_up(self) -> None:
        channel = self._open()
        stream = self._call("Backward", channel=channel)
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            await stream.write(self._requests("backward", rows=16)[0])
        await channel.close()

    async def send_garbage(self) -> None:
        host, port = self._address.rsplit(":", 1)
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(self._rng.randbytes(500))
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    def _open(self) -> grpc.aio.Channel:
        credentials = grpc.ssl_channel_credentials(root_certificates=self._pem)
        return grpc.aio.secure_channel(self._address, credentials, CLIENT_OPTIONS)

    def _call(self, method: str, timeout: float = 30.0, channel: grpc.aio.Channel | None = None) -> Any:
        stub = expert_pb2_grpc.ExpertServiceStub(channel or self._channel)
        return getattr(stub, method)(timeout=timeout, metadata=self._session)  # grpc's plugin writes no types

    async def _exchange(self, stream: Any, requests: Sequence[expert_pb2.CallRequest]) -> StatusCode:
        """Sends all requests, reads all answers, and returns the status."""
        try:
            for request in requests:
                await stream.write(request)
            await stream.done_writing()
            while await stream.read() is not grpc.aio.EOF:
                pass
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError, grpc.aio.InternalError):
            pass  # its code is given back
        code: StatusCode = await stream.code()
        return code

    def _requests(self, direction: str, rows: int) -> list[expert_pb2.CallRequest]:
        """A valid call of one expert: its header, and its payload in one message unless it is too long."""
        width = self._manifest.width
        numbers = torch.randn(rows * (2 if direction == "backward" else 1), width, generator=self._generator)
        header = expert_pb2.CallHeader(
            protocol_version=PROTOCOL_VERSION,
            swarm_id=self._swarm_id,
            request_id=self._rng.randbytes(16),
            width=width,
            codec=expert_pb2.CODEC_FP32,
            segment_lengths=[1] * rows,
            positions=[0] * rows,
            experts=[expert_pb2.ExpertRows(uid=str(self._rng.choice(self._uids)))],
        )
        return [
            expert_pb2.CallRequest(header=header),
            expert_pb2.CallRequest(chunk=numbers.numpy().tobytes()),
        ]
