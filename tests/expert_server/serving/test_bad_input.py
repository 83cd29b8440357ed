"""Whatever a node is given, it lives, applies nothing wrong and loses nothing good.

Where each kind of bad input is tested:

- wrong shape, dtype (which is the codec here), rank (rows that are not whole), row count 0: test_servicer_headers.py
  (`WRONG_HEADERS`) and test_servicer_streams.py (`WRONG_STREAMS`); too many rows: `test_a_call_of_too_many_bytes…`
- non-finite: test_servicer_streams.py; unknown expert: test_servicer.py
- lying headers: test_servicer_headers.py, test_servicer_streams.py, and of kept rows here
- oversized streams: test_servicer_streams.py, and without an end here
- slow-loris streams: test_servicer_slow.py, and as many as the node takes here
- replayed backward: test_servicer_slow.py; another swarm's call: test_servicer_headers.py
- garbage bytes on the port: test_servicer_garbage.py; the decoder: fuzzed here
- disk full, state folder that cannot be written, SIGKILL during a checkpoint, another swarm's record:
  test_bad_surroundings.py, test_checkpoints.py and test_restart.py
"""

import asyncio
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
import torch
from grpc import StatusCode
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tls_expert_server import (
    FIRST,
    HIDDEN,
    ROWS,
    SECOND,
    THIRD,
    Call,
    Edge,
    Runner,
    answers,
    check_it_goes_on,
    exchange,
    header_of,
    make,
    open_blocking_channel,
    piece,
    refused,
    running,
    serving,
    wait_until,
)

from expert_server.serving.batching import Direction
from peer.codec import CHUNK_BYTES
from peer.identity import Identity
from peer.loop import LoopThread
from peer.metrics import total
from peer.wire import expert_pb2

pytestmark = pytest.mark.filterwarnings("ignore:path is deprecated:DeprecationWarning")  # hivemind's, on 3.11


@pytest.fixture
def run(loop: LoopThread, identity: Identity, caplog: pytest.LogCaptureFixture) -> Iterator[Runner]:
    with running(loop, identity, caplog) as runner:
        yield runner


# Claims, floods and trickles


def claim_kept(call: Call, rows: int) -> None:
    kept = expert_pb2.ExpertRows(uid=str(FIRST), kept_request_id=bytes(16), kept_rows=rows)
    call.header.experts[0].CopyFrom(kept)


def test_a_claim_of_1_gb_of_kept_rows_with_1_kb_behind_it_is_refused_at_once(run: Runner) -> None:
    call = Call("backward")
    claim_kept(call, 2**30 // (4 * HIDDEN))

    async def scenario(edge: Edge) -> None:
        outcome = await exchange(edge, "backward", [header_of(call), piece(bytes(1024))], ends=False)
        refused(outcome, StatusCode.RESOURCE_EXHAUSTED, f"a call of {2**30} bytes")
        assert edge.updates() == total(edge.runtime.metrics.rows) == 0
        await check_it_goes_on(edge)

    run(scenario)


def test_rows_that_were_never_kept_are_said_to_be_lost_and_nothing_is_applied(run: Runner) -> None:
    call = Call("backward")
    claim_kept(call, ROWS)

    async def scenario(edge: Edge) -> None:
        outcome = await exchange(
            edge, "backward", [header_of(call), piece(call.payload[: 4 * ROWS * HIDDEN])]
        )
        assert outcome.code is StatusCode.OK, outcome.details
        ((reply, nothing),) = answers(outcome).values()
        assert (reply.status, nothing) == (StatusCode.FAILED_PRECONDITION.value[0], None)
        assert edge.updates() == total(edge.runtime.metrics.rows) == 0
        await check_it_goes_on(edge)

    run(scenario)


def test_a_stream_without_end_is_cut_off_where_the_payload_should_end(run: Runner) -> None:
    call = Call("backward", uids=[FIRST, SECOND])
    flood = [header_of(call), *[piece(bytes(CHUNK_BYTES))] * 100]

    async def scenario(edge: Edge) -> None:
        outcome = await exchange(edge, "backward", flood, ends=False)
        assert outcome.code is StatusCode.INVALID_ARGUMENT, outcome
        assert outcome.details == "the payload is longer than the header says"
        await check_it_goes_on(edge)

    run(scenario)


def test_slow_callers_in_every_place_are_let_go_and_the_node_serves(run: Runner) -> None:
    """The edge serves 64 calls at the same time. Each caller sends one byte, and then no more."""

    async def scenario(edge: Edge) -> None:
        async def send_one_byte(number: int) -> StatusCode:
            call, stream = Call("backward", seed=number), edge.stub.Backward()
            with contextlib.suppress(asyncio.InvalidStateError, grpc.aio.AioRpcError):  # let go already
                await stream.write(header_of(call))
                await stream.write(piece(call.payload[:1]))
            code: StatusCode = await stream.code()
            return code

        codes = await asyncio.gather(*map(send_one_byte, range(64)))
        assert set(codes) == {StatusCode.DEADLINE_EXCEEDED}
        assert edge.updates() == total(edge.runtime.metrics.rows) == 0
        await check_it_goes_on(edge)

    run(scenario, max_call_s=2.0)


def test_a_trickle_is_no_way_to_stay_longer(run: Runner) -> None:
    call = Call()

    async def scenario(edge: Edge) -> None:
        stream = edge.stub.Forward()
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            await stream.write(header_of(call))
            for at in range(len(call.payload)):
                await stream.write(piece(call.payload[at : at + 1]))
                await asyncio.sleep(0.01)
        # grpc.aio makes INTERNAL of a status that comes while it writes
        assert await stream.code() in (StatusCode.DEADLINE_EXCEEDED, StatusCode.INTERNAL)
        assert total(edge.runtime.metrics.rows) == 0
        await check_it_goes_on(edge)

    run(scenario, max_call_s=0.5)


# Whatever bytes come as messages


def messages(seed: int, direction: Direction) -> list[bytes]:
    call = Call(direction, uids=[FIRST, SECOND], seed=seed)
    half = len(call.payload) // 2
    parts = [header_of(call), piece(call.payload[:half]), piece(call.payload[half:])]
    return [part.SerializeToString() for part in parts]


def spoil(data: bytes, way: str, at: int, byte: int) -> bytes:
    at %= max(1, len(data))
    match way:
        case "change":
            return data[:at] + bytes([byte]) + data[at + 1 :]
        case "cut":
            return data[:at]
        case "insert":
            return data[:at] + bytes([byte]) + data[at:]
        case "double":
            return data + data[at:]
        case _:
            return bytes([byte]) * at


# mostly in the header: the payload's bytes are any bytes
changes = st.lists(
    st.tuples(
        st.sampled_from([0, 0, 0, 1, 2]),
        st.sampled_from(["change", "change", "cut", "insert", "double", "fill"]),
        st.integers(0, 200),
        st.integers(0, 255),
    ),
    min_size=1,
    max_size=3,
)
orders = st.one_of(st.just([0, 1, 2]), st.lists(st.integers(0, 2), max_size=5))


@dataclass(frozen=True)
class Fuzzed:
    edge: Edge
    channel: grpc.Channel
    tasks: int
    """On the loop, while nobody calls."""

    async def quiet(self) -> None:
        """Waits until no call goes on: grpc answers bytes that are no message before the call's handler is done."""
        await wait_until(lambda: len(asyncio.all_tasks()) <= self.tasks)
        await self.edge.runtime.settle()
        await self.edge.runtime.run(lambda: None)  # also what is computed for a caller that has gone


@pytest.fixture(scope="module")
def fuzzed(loop: LoopThread, identity: Identity) -> Iterator[Fuzzed]:
    async def tasks() -> int:
        return len(asyncio.all_tasks())

    context = serving(identity, max_call_s=5.0)
    edge = loop.run(context.__aenter__())
    with open_blocking_channel(edge.address, edge.pem) as channel:
        yield Fuzzed(edge, channel, loop.run(tasks()))
    loop.run(context.__aexit__(None, None, None))


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**31), st.sampled_from(["forward", "backward"]), changes, orders)
def test_no_bytes_as_messages_stop_the_node_or_spoil_an_expert(
    loop: LoopThread,
    fuzzed: Fuzzed,
    seed: int,
    direction: Direction,
    changes: list[tuple[int, str, int, int]],
    order: list[int],
) -> None:
    edge = fuzzed.edge
    sent = messages(seed, direction)
    for index, way, at, byte in changes:
        sent[index] = spoil(sent[index], way, at, byte)
    updates = edge.updates()
    code = call_with_bytes(fuzzed, direction, [sent[index] for index in order])
    assert code in FUZZED_CODES, code
    loop.run(fuzzed.quiet(), 120)
    assert edge.updates() - updates <= (2 if direction == "backward" else 0)
    for uid in (FIRST, SECOND):
        assert all(tensor.isfinite().all() for tensor in edge.runtime.experts[uid].block.parameters())


FUZZED_CODES = {
    StatusCode.OK,  # the change was in the payload's numbers, or made another right call
    StatusCode.INVALID_ARGUMENT,
    StatusCode.FAILED_PRECONDITION,  # another swarm or version
    StatusCode.RESOURCE_EXHAUSTED,
    StatusCode.ALREADY_EXISTS,  # the example was tried before
}


def call_with_bytes(fuzzed: Fuzzed, direction: Direction, sent: Sequence[bytes]) -> StatusCode:
    method: Any = fuzzed.channel.stream_stream(f"/talkoot.v1.ExpertService/{direction.capitalize()}")
    stream = method(iter(sent), timeout=20, metadata=fuzzed.edge.session)
    with contextlib.suppress(grpc.RpcError):
        list(stream)
    code: StatusCode = stream.code()
    return code


def test_after_all_that_the_fuzzed_node_answers_rightly(fuzzed: Fuzzed, loop: LoopThread) -> None:
    edge = fuzzed.edge
    for uid in (FIRST, SECOND, THIRD):
        call = Call(uids=[uid], seed=2**32)
        outcome = loop.run(make(edge, call), 120)
        assert outcome.code is StatusCode.OK, outcome.details
        ((_, tensor),) = answers(outcome).values()
        torch.testing.assert_close(tensor, call.expected(edge.runtime.experts[uid]))
        assert all(parameter.isfinite().all() for parameter in edge.runtime.experts[uid].block.parameters())
