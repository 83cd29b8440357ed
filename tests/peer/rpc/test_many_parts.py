"""Messages with so many parts that parsing would block the loop are treated as empty. Honest ones are parsed."""

from typing import Any

import grpc
import pytest
from google.protobuf.message import DecodeError, Message
from hypothesis import example, given
from hypothesis import strategies as st

from peer.loop import LoopThread
from peer.parsing import has_few_parts
from peer.rpc.calls import or_empty
from peer.rpc.channels import CLIENT_OPTIONS, SERVER_OPTIONS
from peer.wire import expert_pb2, state_pb2
from peer.wire.expert_pb2 import AnsweredRows, CallHeader, CallReply, CallRequest, ExpertReply, ExpertRows

MANY, PADDING = 20_000, bytes(2**16)
HEADER = CallHeader(experts=[ExpertRows()] * MANY).SerializeToString()


def expert(number: int) -> ExpertRows:
    return ExpertRows(uid=f"0.{number}", rows=range(number % 300), weights=bytes(4 * (number % 300)))


@pytest.mark.parametrize(
    "message",
    [
        CallRequest(
            header=CallHeader(
                positions=range(20_000),
                sequences=range(9000),
                experts=map(expert, range(4096)),
                request_id=bytes(16),
            ),
            chunk=bytes(2**20),
        ),
        CallReply(
            experts=[ExpertReply(index=n, message="busy", version=n) for n in range(4096)],
            rows=[
                AnsweredRows(rows=[n], masks=[2**63], products=bytes(4), payload_bytes=99)
                for n in range(4096)
            ],
            chunk=bytes(2**17),
        ),
        state_pb2.AskRequest(uids=["0." + "9" * 300] * 256),
    ],
)
def test_the_largest_honest_messages_are_parsed(message: Message) -> None:
    data = message.SerializeToString()
    assert len(data) > 2**16
    assert or_empty(type(message).FromString)(data) == message


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        (state_pb2.AskRequest, state_pb2.AskRequest(uids=[""] * MANY, sha256=PADDING).SerializeToString()),
        (CallRequest, CallRequest(header=CallHeader.FromString(HEADER), chunk=PADDING).SerializeToString()),
        (CallRequest, CallRequest(header=CallHeader(experts=[expert(1)])).SerializeToString() * MANY),
        (CallReply, CallReply(rows=[AnsweredRows()] * MANY, chunk=PADDING).SerializeToString()),
        (expert_pb2.InfoRequest, b"\x78\x00" * 2**16),
        (CallRequest, b"\x13" * 2**17),
        (CallRequest, b"\xff" * 2**17),
    ],
    ids=[
        "strings",
        "experts",
        "headers",
        "blocks of rows",
        "unknown fields",
        "groups",
        "numbers without end",
    ],
)
def test_a_message_of_very_many_parts_counts_as_empty(kind: type[Message], data: bytes) -> None:
    assert len(data) > 2**16
    assert or_empty(kind.FromString)(data) == kind()
    assert or_empty(kind.FromString, len(data))(data) == kind()


@given(st.binary(max_size=200))
@example(b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01")
def test_whatever_the_bytes_are_counting_their_parts_ends(data: bytes) -> None:
    """If the bytes can be parsed and are short, they have few parts."""
    try:
        is_message = CallRequest.FromString(data).ByteSize() >= 0
    except DecodeError:
        is_message = False
    has_groups = any(byte & 7 in {3, 4} for byte in data)
    assert has_few_parts(data, CallRequest.DESCRIPTOR, 10_000) >= (is_message and not has_groups)


def test_compressed_messages_are_not_inflated(loop: LoopThread) -> None:
    """Neither a caller's nor a server's: 2 MB of zeros are 2 KB when they are compressed."""

    async def answer(request: bytes, context: Any) -> bytes:
        received.append(len(request))
        return bytes(2_000_000)

    async def scenario() -> int:
        handlers: Any = {"Call": grpc.unary_unary_rpc_method_handler(answer)}
        server = grpc.aio.server(options=SERVER_OPTIONS, compression=grpc.Compression.Gzip)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test", handlers),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", CLIENT_OPTIONS) as channel:
                call: Any = channel.unary_unary("/test/Call")
                reply = await call(bytes(2_000_000), timeout=60, compression=grpc.Compression.Gzip)
                return len(reply)
        finally:
            await server.stop(None)

    received: list[int] = []
    assert loop.run(scenario(), 60) < 10_000
    assert len(received) == 1
    assert received[0] < 10_000
