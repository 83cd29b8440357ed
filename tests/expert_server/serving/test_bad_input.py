"""Whatever a node is given, it lives, applies nothing wrong and loses nothing good.

Where each kind of bad input is tested:

- wrong shape, dtype (which is the codec here), rank (rows that are not whole), row count 0: test_servicer_headers.py
  (`WRONG_HEADERS`) and test_servicer_streams.py (`WRONG_STREAMS`); too many rows: `test_a_call_of_too_many_bytes…`
- non-finite: test_servicer_streams.py; unknown expert: test_servicer.py
- lying headers: test_servicer_headers.py, test_servicer_streams.py, and of kept calls here; weights: in both
- oversized streams: test_servicer_streams.py, and without an end here
- slow-loris streams: test_servicer_slow.py, and as many as the node takes here
- replayed backward: test_servicer_slow.py; another swarm's call: test_servicer_headers.py
- garbage bytes on the port: test_servicer_garbage.py; the decoder: fuzzed here
- disk full, state folder that cannot be written, SIGKILL during a checkpoint, another swarm's record:
  test_bad_surroundings.py, test_checkpoints.py and test_restart.py
"""

import asyncio
import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isfinite
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
    MANIFEST,
    ROWS,
    SECOND,
    THIRD,
    Call,
    Edge,
    Runner,
    answers,
    check_it_goes_on,
    dense_answer,
    exchange,
    header_of,
    make,
    open_blocking_channel,
    piece,
    refused,
    run,
    serving,
    wait_until,
)

from expert_server.experts.expert import Expert
from expert_server.serving.batching import Direction
from peer.codec import CHUNK_BYTES
from peer.identity import Identity
from peer.loop import LoopThread
from peer.metrics import total

__all__ = ["run"]


# Claims, floods and trickles


def claim_kept(rows: int) -> Call:
    """A backward call that names a forward call which was never made."""
    call = Call(lengths=[1] * ROWS, positions=[0] * ROWS).kept()
    call.header.kept_rows = rows
    return call


def test_a_claim_of_1_gb_of_kept_rows_with_1_kb_behind_it_is_refused_at_once(run: Runner) -> None:
    call = claim_kept(2**30 // (4 * HIDDEN))

    async def scenario(edge: Edge) -> None:
        outcome = await exchange(edge, "backward", [header_of(call), piece(bytes(1024))], ends=False)
        refused(outcome, StatusCode.RESOURCE_EXHAUSTED, f"the call has {2**30} bytes")
        assert edge.updates() == total(edge.runtime.metrics.rows) == 0
        await check_it_goes_on(edge)

    run(scenario)


def test_a_call_that_was_never_kept_is_said_to_be_lost_and_nothing_is_applied(run: Runner) -> None:
    async def scenario(edge: Edge) -> None:
        refused(await make(edge, claim_kept(ROWS)), StatusCode.FAILED_PRECONDITION, "send its inputs")
        assert edge.updates() == total(edge.runtime.metrics.rows) == 0
        await check_it_goes_on(edge)

    run(scenario)


def test_only_the_caller_of_a_kept_call_may_name_it_and_only_once(run: Runner) -> None:
    call = Call(uids=[FIRST, SECOND]).keeping()

    async def scenario(edge: Edge) -> None:
        assert answers(call, await make(edge, call)).is_kept
        refused(await make(edge.as_another(), call.kept()), StatusCode.FAILED_PRECONDITION, "send its inputs")
        assert edge.updates() == 0
        backward = call.kept()
        answers(backward, await make(edge, backward))
        refused(await make(edge, backward), StatusCode.ALREADY_EXISTS)
        refused(await make(edge, call.kept(seed=2)), StatusCode.FAILED_PRECONDITION, "send its inputs")
        assert edge.updates() == 2

    run(scenario, max_kept_bytes=2**20)


@pytest.mark.parametrize("rows", [1, ROWS - 1, ROWS + 1, 0])
def test_gradients_of_another_number_of_rows_than_were_kept_are_refused(run: Runner, rows: int) -> None:
    call = Call().keeping()

    async def scenario(edge: Edge) -> None:
        assert answers(call, await make(edge, call)).is_kept
        backward = call.kept()
        backward.header.kept_rows = rows
        said = f"the kept forward call has {ROWS} rows, not {rows}" if rows else "must have rows"
        refused(await make(edge, backward), StatusCode.INVALID_ARGUMENT, said)
        assert edge.updates() == 0
        await check_it_goes_on(edge)

    run(scenario, max_kept_bytes=2**20)


@pytest.mark.parametrize("name", ["segment_lengths", "positions", "experts"])
def test_a_kept_call_is_named_by_nothing_else(run: Runner, name: str) -> None:
    call = Call().keeping()

    async def scenario(edge: Edge) -> None:
        assert answers(call, await make(edge, call)).is_kept
        backward = call.kept()
        getattr(backward.header, name).MergeFrom(getattr(call.header, name))
        refused(await make(edge, backward), StatusCode.INVALID_ARGUMENT, "without segments, positions")
        forward = call.kept(seed=5)
        refused(await exchange(edge, "forward", forward.requests), StatusCode.INVALID_ARGUMENT)
        assert edge.updates() == 0

    run(scenario, max_kept_bytes=2**20)


def test_a_call_that_is_under_way_is_not_kept_yet_and_is_forgotten_if_it_fails(
    run: Runner,
) -> None:
    call = Call().keeping()

    async def scenario(edge: Edge) -> None:
        release = threading.Event()
        blocked = asyncio.create_task(edge.runtime.run(release.wait))
        calling = asyncio.create_task(make(edge, call, timeout_s=2.0))
        await wait_until(lambda: len(edge.cache) == 1)
        refused(await make(edge, call.kept()), StatusCode.FAILED_PRECONDITION, "send its inputs")
        assert (await calling).code is StatusCode.DEADLINE_EXCEEDED
        await wait_until(lambda: len(edge.cache) == edge.cache.bytes == 0)
        release.set()
        await blocked

    run(scenario, max_kept_bytes=2**20)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_weights_at_both_ends_of_float32_give_finite_sums(run: Runner, direction: Direction) -> None:
    weights = [
        [1e38, 1e-38, 1e-45, 3e38, 1.0],
        [1e-38, 1e38, 1e-45, 3e38, 1e-45],
        [1.0, 1e38, 3e38, 3e38, 1e-45],
    ]
    call = Call(direction, uids=[FIRST, SECOND, THIRD], weights_of=weights)

    async def scenario(edge: Edge) -> None:
        found = answers(call, await make(edge, call))
        expected, products = dense_answer(call, [Expert(uid, MANIFEST) for uid in call.uids])
        torch.testing.assert_close(found.tensor, expected)
        for row, own in products.items():
            assert found.products[row] == pytest.approx(own, rel=1e-4, abs=1e-5)

    run(scenario)


def test_products_that_overflow_stay_finite(run: Runner) -> None:
    """The sum of two experts' gradients stays finite as well."""
    call = Call(uids=[FIRST, SECOND]).keeping()
    backward = call.kept()
    backward.tensors[0].fill_(3e38)

    async def scenario(edge: Edge) -> None:
        assert answers(call, await make(edge, call)).is_kept
        (forward,) = edge.cache._cached.values()
        forward.updates.fill_(1e30)
        outcome = await make(edge, backward)
        found = answers(backward, outcome)
        assert all(isfinite(product) for own in found.products.values() for product in own)
        assert all(tensor.isfinite().all() for tensor in found.rows.values())
        for expert in edge.runtime.experts.values():
            assert all(parameter.isfinite().all() for parameter in expert.block.parameters())
        await check_it_goes_on(edge)

    run(scenario, max_kept_bytes=2**20)


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
    """The server handles 64 calls at the same time. Each caller sends one byte and then stops."""

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
        # grpc.aio reports INTERNAL if a status arrives while it writes.
        assert await stream.code() in (StatusCode.DEADLINE_EXCEEDED, StatusCode.INTERNAL)
        assert total(edge.runtime.metrics.rows) == 0
        await check_it_goes_on(edge)

    run(scenario, max_call_s=0.5)


# Arbitrary bytes as messages


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


# Mostly in the header, since the payload may be any bytes.
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
    """The number of tasks on the loop while nobody calls."""

    async def quiet(self) -> None:
        """Waits until no call is running: gRPC answers malformed bytes before the call's handler has ended."""
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


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
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
        found = answers(call, loop.run(make(edge, call), 120))
        torch.testing.assert_close(found.tensor, call.expected(edge.runtime.experts[uid]))
        assert all(parameter.isfinite().all() for parameter in edge.runtime.experts[uid].block.parameters())
