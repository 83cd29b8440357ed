"""A call's requests, message by message, and the payload in them, tensor by tensor."""

from collections.abc import AsyncIterator

from peer.codec import MAX_CHUNK_BYTES
from peer.errors import WireError
from peer.messages import Messages
from peer.rates import Rate
from peer.wire import expert_pb2

Requests = AsyncIterator[expert_pb2.CallRequest]


class Reader:
    """Reads the messages of one call."""

    def __init__(self, requests: Requests, downloads: Rate) -> None:
        self._messages = Messages(requests)
        self._downloads = downloads

    async def header(self) -> tuple[expert_pb2.CallHeader, bytes]:
        """The header, and the payload's first bytes."""
        request = await self.next()
        if request is None or not request.HasField("header"):
            raise WireError("a call must begin with its header")
        return request.header, _checked(request.chunk, least=0)

    async def next(self) -> expert_pb2.CallRequest | None:
        """None at the end."""
        request = await self._messages.next()
        if request is not None:
            await self._downloads.take(len(request.chunk))  # gRPC reads on only then: the sender slows down
        return request


def _checked(chunk: bytes, least: int) -> bytes:
    if not least <= len(chunk) <= MAX_CHUNK_BYTES:
        raise WireError(f"after the header come chunks of 1 to {MAX_CHUNK_BYTES} bytes")
    return chunk


class Payload:
    """Reads exact numbers of bytes from a stream of chunks. Never holds more than was asked for and one chunk."""

    def __init__(self, reader: Reader, first: bytes) -> None:
        self._reader = reader
        self._chunk = memoryview(first)

    async def read(self, size: int) -> bytearray:
        """The next `size` bytes. Raises WireError when the stream ends before."""
        data = bytearray()
        while len(data) < size:
            if not self._chunk:
                self._chunk = memoryview(await self._next_chunk(size - len(data)))
            missing = size - len(data)
            data += self._chunk[:missing]
            self._chunk = self._chunk[missing:]
        return data

    async def expect_end(self) -> None:
        """Raises WireError when there is more than the header said."""
        if self._chunk or await self._reader.next() is not None:
            raise WireError("the payload is longer than the header says")

    async def _next_chunk(self, missing: int) -> bytes:
        request = await self._reader.next()
        if request is None:
            raise WireError(f"the payload ended {missing} bytes before what the header says")
        return _checked(b"" if request.HasField("header") else request.chunk, least=1)
