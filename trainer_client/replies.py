"""Puts the answers of one call together, message by message. Does no I/O."""

from collections import deque
from collections.abc import Iterator, Sequence

from grpc import StatusCode

from peer.codec import MAX_CHUNK_BYTES, decode, encoded_bytes
from peer.errors import ExpertError, WireError
from peer.wire import expert_pb2
from trainer_client.calls import Answer, KeptAt, Request

_STATUS = {status.value[0]: status for status in StatusCode}


class Replies:
    """Of one call, to which these requests were sent under that id."""

    def __init__(
        self, request_id: bytes, requests: Sequence[Request], width: int, codec: "expert_pb2.Codec"
    ) -> None:
        self._request_id = request_id
        self._requests = requests
        self._width = width
        self._codec = codec
        self._waiting = set(range(len(requests)))
        self._due: deque[expert_pb2.ExpertReply] = deque()
        """Answers whose tensors have not come in whole."""
        self._data = bytearray()
        """Of the first that is due."""
        self._missing = 0
        """Bytes that all answers still lack."""

    @property
    def complete(self) -> bool:
        """Whether every expert has answered."""
        return not (self._waiting or self._due)

    def take(self, reply: expert_pb2.CallReply) -> Iterator[Answer]:
        """The answers that are whole with this message. Raises WireError when it is not what must come next."""
        chunk = memoryview(reply.chunk)
        if not (reply.experts or chunk) or len(chunk) > MAX_CHUNK_BYTES:
            raise WireError(f"a message of {len(reply.experts)} answers and {len(chunk)} bytes")
        for expert in reply.experts:
            self._expect(expert)
        if len(chunk) > self._missing:
            raise WireError(f"{len(chunk) - self._missing} bytes more than the answers' tensors have")
        self._missing -= len(chunk)
        while self._due:
            expert = self._due[0]
            missing = expert.payload_bytes - len(self._data)
            self._data += chunk[:missing]
            chunk = chunk[missing:]
            if len(self._data) < expert.payload_bytes:
                return
            self._due.popleft()
            yield self._answer(expert, self._data)
            self._data = bytearray()

    def _expect(self, expert: expert_pb2.ExpertReply) -> None:
        if expert.index not in self._waiting:
            raise WireError(f"an answer for part {expert.index}, which is not waited for")
        size = 0
        if not expert.status:
            rows = len(self._requests[expert.index].inputs)
            size = encoded_bytes(rows, self._width, self._codec)
        if expert.payload_bytes != size:
            raise WireError(f"a tensor of {expert.payload_bytes} bytes; expected {size}")
        self._waiting.remove(expert.index)
        self._due.append(expert)
        self._missing += size

    def _answer(self, expert: expert_pb2.ExpertReply, data: bytearray) -> Answer:
        if expert.status:
            status = _STATUS.get(expert.status, StatusCode.UNKNOWN)
            return Answer(
                expert.index,
                None,
                ExpertError(status, expert.message[:500], max(0.0, expert.retry_after_s)),
            )
        kept = KeptAt(self._request_id, expert.index) if expert.kept else None
        return Answer(
            expert.index,
            decode(data, self._width, self._codec),
            update_count=expert.update_count,
            kept=kept,
            skipped_update=expert.skipped_update,
            rolled_back=expert.rolled_back,
        )
