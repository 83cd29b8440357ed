"""Calls that are slow, repeated or given up, over real TLS."""

import asyncio
import gc
import threading
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from typing import Any

import grpc
import pytest
import torch
from grpc import StatusCode
from hypothesis import given
from hypothesis import strategies as st
from loop_lags import least_cpu_s
from tls_expert_server import (
    FIRST,
    MANIFEST,
    OPTIONS,
    ROWS,
    SECOND,
    THIRD,
    Call,
    Edge,
    Runner,
    answers,
    both_directions,
    check_it_goes_on,
    chunked,
    exchange,
    header_of,
    make,
    open_channel,
    piece,
    refused,
    run,
    wait_until,
)

from expert_server.experts.expert import Expert
from expert_server.experts.graphs import ForwardGraph
from expert_server.serving.batching import Direction
from expert_server.serving.call import OPEN_CALL_BYTES
from expert_server.serving.forward_cache import SeenRequests
from peer.codec import CHUNK_BYTES
from peer.loop import LoopThread, cancel_all
from peer.metrics import total
from peer.wire import expert_pb2

__all__ = ["run"]


SLOW: dict[str, Callable[[Call], list[expert_pb2.CallRequest]]] = {
    "nothing": lambda call: [],
    "only a header": lambda call: call.requests[:1],
    "half the payload": lambda call: [header_of(call), piece(call.payload[:100])],
}


@pytest.mark.parametrize("name", SLOW)
def test_a_caller_that_stops_sending_is_let_go_after_the_longest_call(run: Runner, name: str) -> None:
    async def scenario(edge: Edge) -> None:
        outcome = await exchange(edge, "forward", SLOW[name](Call()), ends=False, timeout_s=None)
        refused(outcome, StatusCode.DEADLINE_EXCEEDED, "the call lasted longer than 0.3 s")
        assert outcome.seconds >= 0.3

    run(scenario, max_call_s=0.3)


@pytest.mark.parametrize("name", SLOW)
def test_a_caller_that_stops_sending_is_let_go_at_its_deadline(run: Runner, name: str) -> None:
    async def scenario(edge: Edge) -> None:
        tasks = len(asyncio.all_tasks())
        outcome = await exchange(edge, "forward", SLOW[name](Call()), ends=False, timeout_s=0.3)
        assert outcome.code is StatusCode.DEADLINE_EXCEEDED
        await wait_until(lambda: len(asyncio.all_tasks()) <= tasks)
        await check_it_goes_on(edge)

    run(scenario)


@pytest.mark.parametrize("name", SLOW)
def test_a_payload_that_stalls_is_given_up_long_before_the_longest_call(
    run: Runner, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("expert_server.serving.call._GRACE_S", 0.1)
    monkeypatch.setattr("expert_server.serving.call._LEAST_BYTES_PER_S", CHUNK_BYTES)  # a header takes 1 s

    async def scenario(edge: Edge) -> None:
        outcome = await exchange(edge, "forward", SLOW[name](Call()), ends=False, timeout_s=None)
        refused(outcome, StatusCode.DEADLINE_EXCEEDED, "the payload stalled")
        await wait_until(lambda: edge.memory.used == 0)
        monkeypatch.undo()  # a busy machine may be slower than that
        await check_it_goes_on(edge)

    run(scenario)


def test_a_call_takes_memory_back_from_the_caller_with_the_most(run: Runner) -> None:
    async def scenario(edge: Edge) -> None:
        stalled = [
            asyncio.create_task(exchange(edge, "forward", Call().requests[:1], ends=False)) for _ in range(3)
        ]
        await wait_until(lambda: edge.memory.used > 3 * OPEN_CALL_BYTES)
        assert (await make(edge.as_another(), Call())).code is StatusCode.OK
        (done,), others = await asyncio.wait(stalled, return_when=asyncio.FIRST_COMPLETED)
        refused(done.result(), StatusCode.RESOURCE_EXHAUSTED, "others need the memory")
        await cancel_all(others)
        await wait_until(lambda: edge.memory.used == 0)
        await check_it_goes_on(edge)

    run(scenario, max_memory_bytes=4 * OPEN_CALL_BYTES - 1)


@pytest.mark.parametrize("place", ["header", "message"])
def test_fields_that_nobody_knows_count_as_memory_of_their_call(run: Runner, place: str) -> None:
    call, size = Call(), 2**21
    unknown = b"\xfa\x01\x80\x80\x80\x01" + bytes(size)  # field 31, and its length
    if place == "header":
        call.header.MergeFromString(unknown)
    first = call.requests[0]
    if place == "message":
        first.MergeFromString(unknown)

    async def scenario(edge: Edge) -> None:
        stalled = asyncio.create_task(exchange(edge, "forward", [first], ends=False))
        await wait_until(lambda: edge.memory.used > OPEN_CALL_BYTES + size)
        stalled.cancel()
        await wait_until(lambda: edge.memory.used == 0)
        outcome = await exchange(edge.as_another(), "forward", [first] * 2, ends=False)
        refused(outcome, StatusCode.INVALID_ARGUMENT, "chunks of 1")
        await check_it_goes_on(edge)

    run(scenario)


def test_a_caller_that_never_closes_its_side_gets_its_answer_before_it_is_let_go(run: Runner) -> None:
    call = Call()

    async def scenario(edge: Edge) -> None:
        outcome = await make(edge, call, ends=False)
        assert outcome.code is StatusCode.DEADLINE_EXCEEDED
        answered = replace(outcome, code=StatusCode.OK)
        torch.testing.assert_close(answers(call, answered).tensor, call.expected(Expert(FIRST, MANIFEST)))

    run(scenario, max_call_s=2.5)


def test_graphs_of_a_caller_that_reads_no_answer_are_the_caches_and_count_there(run: Runner) -> None:
    uids, rows = [FIRST, SECOND, THIRD], 4096
    parts = [range(rows * index, rows * (index + 1)) for index in range(3)]
    count = 3 * rows
    call = Call(uids=uids, lengths=[1] * count, positions=[0] * count, rows_of=parts).keeping()
    options = [(name, 2**16 if name == "grpc.http2.lookahead_bytes" else of) for name, of in OPTIONS]

    async def scenario(edge: Edge) -> None:
        credentials = grpc.ssl_channel_credentials(edge.pem)
        async with grpc.aio.secure_channel(edge.address, credentials, options) as channel:
            stream = edge.stub_on(channel).Forward(timeout=60)
            for request in call.requests:
                await stream.write(request)
            await stream.done_writing()
            await wait_until(lambda: total(edge.runtime.metrics.rows) == count)
            await wait_until(lambda: [len(kept.graphs) for kept in edge.cache._cached.values()] == [3])
            stream.cancel()
        await wait_until(lambda: edge.memory.used == 0)
        # unless all three were computed before the answer began: then it counts as given
        assert edge.cache.bytes == 0 or all(kept.is_complete for kept in edge.cache._cached.values())

    run(scenario, max_kept_bytes=2**28)


def test_graphs_stay_in_the_budget_of_kept_calls_while_payloads_of_backward_calls_stall(run: Runner) -> None:
    rows, most = 512, 2**20

    async def stalled_after_forward(edge: Edge, seed: int) -> Any:
        call = Call(lengths=[1] * rows, positions=[0] * rows, seed=seed).keeping()
        assert answers(call, await make(edge, call)).is_kept
        stream = edge.stub.Backward(timeout=60)
        await stream.write(header_of(call.kept(seed + 9)))
        await wait_until(lambda: all(kept.is_claimed for kept in edge.cache._cached.values()))
        return stream

    def graphs_now() -> list[ForwardGraph]:
        gc.collect()
        return [each for each in gc.get_objects() if type(each) is ForwardGraph]

    async def scenario(edge: Edge) -> None:
        earlier = graphs_now()  # other tests' calls may still be kept
        # each forward call takes more than a third of the memory
        streams = [await stalled_after_forward(edge, seed) for seed in range(4)]
        graphs = [graph for graph in graphs_now() if not any(graph is other for other in earlier)]
        assert most / 3 < sum(graph.bytes for graph in graphs) <= edge.cache.bytes <= most
        for seed, stream in enumerate(streams):  # those without a graph are computed again
            call = Call(lengths=[1] * rows, positions=[0] * rows, seed=seed).kept(seed + 9)
            for request in chunked(call.payload):
                await stream.write(request)
            await stream.done_writing()
            replies = [reply async for reply in stream]
            assert sum(len(reply.chunk) for reply in replies) == len(call.payload)
        assert edge.updates() == 4
        await wait_until(lambda: (len(edge.cache), edge.cache.bytes, edge.memory.used) == (0, 0, 0))

    run(scenario, max_kept_bytes=most)


@pytest.mark.parametrize("way", ["cancelled", "malformed"])
def test_a_kept_call_is_dropped_if_its_backward_call_fails(run: Runner, way: str) -> None:
    call = Call().keeping()

    async def scenario(edge: Edge) -> None:
        assert answers(call, await make(edge, call)).is_kept
        stream = edge.stub.Backward(timeout=60)
        await stream.write(header_of(call.kept()))
        await wait_until(lambda: all(kept.is_claimed for kept in edge.cache._cached.values()))
        refused(await make(edge, call.kept(seed=2)), StatusCode.FAILED_PRECONDITION, "send its inputs")
        assert len(edge.cache) == 1
        if way == "cancelled":
            stream.cancel()
        else:
            await stream.done_writing()
        await wait_until(lambda: (len(edge.cache), edge.cache.bytes, edge.memory.used) == (0, 0, 0))
        assert edge.updates() == 0

    run(scenario, max_kept_bytes=2**20)


def test_an_expired_kept_call_is_dropped_though_nobody_calls_any_more(
    run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("expert_server.serving.servicer._IDLE_LOOK_S", 0.01)

    async def scenario(edge: Edge) -> None:
        assert (await make(edge, Call().keeping())).code is StatusCode.OK
        await asyncio.sleep(0.1)
        (kept,) = edge.cache._cached.values()
        kept.expires_at = 0.0
        await wait_until(lambda: len(edge.cache) == 0, 10.0)

    run(scenario, max_kept_bytes=2**20)


def test_a_repeated_backward_call_is_applied_once(run: Runner) -> None:
    call = Call("backward", uids=[FIRST, SECOND])

    async def scenario(edge: Edge) -> None:
        assert (await make(edge, call)).code is StatusCode.OK
        expert = edge.runtime.experts[FIRST]
        await edge.runtime.run(expert.settle)  # the optimizer step comes after the answer
        before = [p.clone() for p in expert.block.parameters()]
        refused(await make(edge, call), StatusCode.ALREADY_EXISTS, "this request id was seen before")
        await edge.runtime.run(expert.settle)
        assert edge.updates() == 2
        assert all(map(torch.equal, before, expert.block.parameters()))
        call.header.request_id = b"another".ljust(16)
        assert (await make(edge, call)).code is StatusCode.OK
        assert edge.updates() == 4

    run(scenario)


def test_of_two_equal_backward_calls_at_once_one_is_applied(run: Runner) -> None:
    call = Call("backward")

    async def scenario(edge: Edge) -> None:
        outcomes = await asyncio.gather(*(make(edge, call) for _ in range(4)))
        codes = sorted(outcome.code.name for outcome in outcomes)
        assert codes == ["ALREADY_EXISTS"] * 3 + ["OK"]
        assert edge.updates() == 1

    run(scenario)


def test_a_repeated_forward_call_is_answered_again(run: Runner) -> None:
    async def scenario(edge: Edge) -> None:
        for _ in range(2):
            assert (await make(edge, Call())).code is StatusCode.OK

    run(scenario)


@given(st.lists(st.integers(0, 9), max_size=40), st.integers(1, 5))
def test_the_memory_of_requests_is_bounded_and_forgets_the_oldest(ids: list[int], limit: int) -> None:
    seen, remembered = SeenRequests(limit), list[int]()
    for number in ids:
        assert seen.is_new("QmA", bytes([number])) is (number not in remembered)
        if number not in remembered:
            remembered = [*remembered, number][-limit:]


def test_a_caller_that_makes_up_ids_pushes_out_only_its_own() -> None:
    seen = SeenRequests(100)
    assert all(seen.is_new("honest", bytes([number])) for number in range(40))
    for number in range(1000):
        assert seen.is_new("flood", number.to_bytes(4, "big"))
        assert len(seen) <= 100
    assert not any(seen.is_new("honest", bytes([number])) for number in range(40))
    for number in range(200):  # and so do many callers with one each
        assert seen.is_new(f"sybil {number}", bytes(1))
    assert len(seen) == 100


def test_a_request_is_remembered_where_more_callers_than_ids_have_come() -> None:
    seen = SeenRequests(100)
    for number in range(150):
        assert seen.is_new(f"sybil {number}", bytes(1))
    assert seen.is_new("honest", bytes(1))
    assert not seen.is_new("honest", bytes(1))


def test_a_new_request_costs_as_little_however_many_callers_there_were() -> None:
    def cpu_s(callers: int) -> float:
        seen, numbers = SeenRequests(2 * callers), count()
        for number in range(2 * callers):
            seen.is_new(f"caller {number // 2}", bytes([number % 2]))

        def come() -> None:
            for _ in range(50):
                assert seen.is_new(f"newcomer {next(numbers)}", bytes(1))

        return least_cpu_s(come)

    assert cpu_s(20_000) < 20 * cpu_s(50)


@pytest.mark.parametrize("way", ["cancelled", "disconnected"])
def test_a_call_that_is_given_up_leaves_nothing_queued(run: Runner, way: str) -> None:
    release = threading.Event()

    async def scenario(edge: Edge) -> None:
        await check_it_goes_on(edge)
        tasks, rows = len(asyncio.all_tasks()), total(edge.runtime.metrics.rows)
        blocked = asyncio.create_task(edge.runtime.run(release.wait))
        try:
            async with open_channel(edge.address, edge.pem) as channel:
                stream = edge.stub_on(channel).Backward(timeout=60)
                for request in Call("backward", [FIRST, SECOND, THIRD]).requests:
                    await stream.write(request)
                # The first may be on its way to the compute thread; the others wait.
                await wait_until(lambda: edge.runtime.queued_rows >= 2 * ROWS)
                if way == "cancelled":
                    assert stream.cancel()
                    await wait_until(lambda: edge.runtime.queued_rows == 0)
            await wait_until(lambda: edge.runtime.queued_rows == 0)
        finally:
            release.set()
        await blocked
        await wait_until(lambda: len(asyncio.all_tasks()) <= tasks)
        assert total(edge.runtime.metrics.rows) - rows <= ROWS
        assert edge.updates() <= 1
        await make(edge, Call(seed=5))

    run(scenario)


class LateFuture(asyncio.Future[Any]):
    """A future that returns its result after a while."""

    def set_result(self, result: Any) -> None:
        self.get_loop().call_later(0.1, super().set_result, result)


@both_directions
@pytest.mark.parametrize("way", ["answered", "refused"])
def test_a_caller_who_goes_while_its_status_is_sent_is_no_error(
    run: Runner, loop: LoopThread, monkeypatch: pytest.MonkeyPatch, way: str, direction: Direction
) -> None:
    """gRPC may first report that the status could not be sent, and then that the call has ended."""
    make_future = loop.loop.create_future

    def create_future() -> asyncio.Future[Any]:
        task = asyncio.current_task()
        waits_for_the_end = task is not None and task.get_name() == "rpc_task"  # gRPC's
        return LateFuture() if waits_for_the_end else make_future()

    async def scenario(edge: Edge) -> None:
        monkeypatch.setattr(loop.loop, "create_future", create_future)
        tasks = len(asyncio.all_tasks())
        call = Call(direction)
        stream = getattr(edge.stub, call.direction.title())(timeout=60)
        if way == "answered":
            for request in call.requests:
                await stream.write(request)
            assert await stream.read() is not grpc.aio.EOF
        else:
            await stream.write(header_of(call))
            await stream.write(piece(b"1"))
        stream.cancel()
        await wait_until(lambda: len(asyncio.all_tasks()) <= tasks)

    run(scenario)
