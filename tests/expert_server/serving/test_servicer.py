"""The gRPC edge, over real TLS: right calls get right answers."""

import asyncio
from collections.abc import Iterator

import grpc
import pytest
import torch
from grpc import StatusCode
from tls_expert_server import (
    ABSENT,
    CONTEXT,
    FIRST,
    HIDDEN,
    MANIFEST,
    ROWS,
    SECOND,
    SWARM,
    THIRD,
    Call,
    Edge,
    Runner,
    answers,
    both_directions,
    chunked,
    exchange,
    header_of,
    make,
    running,
    with_payload,
)

from expert_server.experts.expert import Expert
from expert_server.serving.batching import Direction
from peer import PROTOCOL_VERSION, SOFTWARE_VERSION
from peer.codec import CHUNK_BYTES
from peer.identity import Identity
from peer.loop import LoopThread
from peer.wire import expert_pb2


@pytest.fixture
def run(loop: LoopThread, identity: Identity, caplog: pytest.LogCaptureFixture) -> Iterator[Runner]:
    with running(loop, identity, caplog) as runner:
        yield runner


@both_directions
def test_a_right_call_gets_the_experts_answer(run: Runner, direction: Direction) -> None:
    call = Call(direction)

    async def scenario(edge: Edge) -> None:
        outcome = await make(edge, call)
        assert outcome.code is StatusCode.OK, outcome.details
        alone = Expert(FIRST, MANIFEST)
        (reply, tensor), *rest = answers(outcome).values()
        assert rest == []
        torch.testing.assert_close(tensor, call.expected(alone))
        assert reply.update_count == alone.update_count == edge.updates() == (direction == "backward")
        assert reply.status == 0

    run(scenario)


@both_directions
def test_every_expert_of_a_call_gets_its_own_rows(run: Runner, direction: Direction) -> None:
    call = Call(direction, uids=[SECOND, ABSENT, FIRST, THIRD])

    async def scenario(edge: Edge) -> None:
        outcome = await make(edge, call)
        assert outcome.code is StatusCode.OK, outcome.details
        found = answers(outcome)
        assert set(found) == {0, 1, 2, 3}
        for index in (0, 2, 3):
            torch.testing.assert_close(
                found[index][1], call.expected(Expert(call.uids[index], MANIFEST), index)
            )

    run(scenario)


@both_directions
def test_an_expert_with_two_parts_answers_both(run: Runner, direction: Direction) -> None:
    call = Call(direction, uids=[FIRST, SECOND, FIRST])

    async def scenario(edge: Edge) -> None:
        outcome = await make(edge, call)
        assert outcome.code is StatusCode.OK, outcome.details
        found = answers(outcome)
        assert set(found) == {0, 1, 2}
        # backward, the second part may come after the step of the first
        for index in (0, 1, 2) if direction == "forward" else (0, 1):
            expected = call.expected(Expert(call.uids[index], MANIFEST), index)
            torch.testing.assert_close(found[index][1], expected)
        assert found[2][1] is not None

    run(scenario)


@both_directions
def test_an_unknown_expert_is_said_in_its_reply_and_the_others_answer(
    run: Runner, direction: Direction
) -> None:
    call = Call(direction, uids=[ABSENT, FIRST])

    async def scenario(edge: Edge) -> None:
        outcome = await make(edge, call)
        assert outcome.code is StatusCode.OK
        (reply, nothing), (_, tensor) = (answers(outcome)[index] for index in (0, 1))
        assert reply.status == StatusCode.NOT_FOUND.value[0]
        assert reply.message == "expert 0.1.1 is not hosted here"
        assert nothing is None
        assert tensor is not None

    run(scenario)


def test_a_full_queue_is_said_in_the_reply_with_a_time_to_come_back(run: Runner) -> None:
    async def scenario(edge: Edge) -> None:
        outcome = await make(edge, Call())
        ((reply, nothing),) = answers(outcome).values()
        assert reply.status == StatusCode.RESOURCE_EXHAUSTED.value[0]
        assert reply.retry_after_s > 0
        assert nothing is None

    run(scenario, max_queued_rows=ROWS - 1)


@pytest.mark.parametrize("beside", [False, True], ids=["after the header", "beside the header"])
@pytest.mark.parametrize("size", [1, 7, 64, 10**6])
def test_it_does_not_matter_how_the_payload_is_cut(run: Runner, size: int, beside: bool) -> None:
    call = Call("backward", uids=[FIRST, SECOND])

    async def scenario(edge: Edge) -> None:
        first, *others = chunked(call.payload, size)
        requests = [with_payload(call, first.chunk), *others] if beside else [header_of(call), first, *others]
        outcome = await exchange(edge, "backward", requests)
        assert outcome.code is StatusCode.OK, outcome.details
        for index, (_, tensor) in answers(outcome).items():
            torch.testing.assert_close(tensor, call.expected(Expert(call.uids[index], MANIFEST), index))

    run(scenario)


def test_a_large_answer_comes_in_chunks(run: Runner) -> None:
    segments = 2 * CHUNK_BYTES // (4 * HIDDEN * CONTEXT)
    call = Call(lengths=[CONTEXT] * segments, positions=list(range(CONTEXT)) * segments)

    async def scenario(edge: Edge) -> None:
        outcome = await make(edge, call)
        assert outcome.code is StatusCode.OK, outcome.details
        assert [len(reply.chunk) for reply in outcome.replies] == [CHUNK_BYTES] * 2
        ((_, tensor),) = answers(outcome, segments * CONTEXT).values()
        torch.testing.assert_close(tensor, call.expected(Expert(FIRST, MANIFEST)))

    run(scenario)


def test_many_callers_at_once_get_their_own_answers(run: Runner) -> None:
    calls = [Call(uids=[(FIRST, SECOND, THIRD)[n % 3]], seed=n) for n in range(24)]

    async def scenario(edge: Edge) -> None:
        outcomes = await asyncio.gather(*(make(edge, call) for call in calls))
        for call, outcome in zip(calls, outcomes, strict=True):
            ((_, tensor),) = answers(outcome).values()
            torch.testing.assert_close(tensor, call.expected(Expert(call.uids[0], MANIFEST)))

    run(scenario)


def test_info_says_what_is_hosted(run: Runner) -> None:
    async def scenario(edge: Edge) -> None:
        await make(edge, Call("backward"))
        request = expert_pb2.InfoRequest(protocol_version=PROTOCOL_VERSION, swarm_id=SWARM)
        reply = await edge.stub.Info(request)
        assert (reply.protocol_version, reply.software_version) == (PROTOCOL_VERSION, SOFTWARE_VERSION)
        hosted = {expert.uid: expert.update_count for expert in reply.experts}
        assert hosted == {"0.0.0": 1, "0.0.1": 0, "0.1.0": 0}
        for wrong in (
            expert_pb2.InfoRequest(protocol_version=PROTOCOL_VERSION, swarm_id="other"),
            expert_pb2.InfoRequest(protocol_version=7, swarm_id=SWARM),
            expert_pb2.InfoRequest(),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await edge.stub.Info(wrong)
            assert caught.value.code() is StatusCode.FAILED_PRECONDITION

    run(scenario)
