"""GrpcCaller against a real TLS server that answers wrongly or refuses: answers or an ExpertError."""

import asyncio
import math
from collections.abc import Iterator

import pytest
from callers import numbered_identities
from grpc import StatusCode
from misbehaving_node import (
    ANSWERED_0,
    BYTES,
    LONG,
    WIDTH,
    Collected,
    Context,
    Server,
    both,
    chunk,
    collect,
    left_as_it_was,
    open_pool,
    reply,
    requests_for,
    running_server,
    sends,
    until,
)

from peer.codec import MAX_CHUNK_BYTES
from peer.identity import Identity
from peer.loop import LoopThread
from peer.rpc.channels import ChannelPool
from peer.wire.expert_pb2 import CallReply, ExpertReply
from trainer_client.dispatch.grpc_caller import GrpcCaller


@pytest.fixture(scope="module")
def identities() -> list[Identity]:
    return numbered_identities(2)


@pytest.fixture(scope="module")
def running(loop: LoopThread, identities: list[Identity]) -> Iterator[Server]:
    with running_server(loop, identities[0]) as server:
        yield server


@pytest.fixture
def server(running: Server, loop: LoopThread) -> Iterator[Server]:
    with left_as_it_was(loop, running) as server:
        yield server


@pytest.fixture
def pool(loop: LoopThread) -> Iterator[ChannelPool]:
    with open_pool(loop) as pool:
        yield pool


@pytest.fixture
def caller(server: Server, pool: ChannelPool) -> GrpcCaller:
    """Its channels are closed before the server looks at what is left."""
    return GrpcCaller(pool, "sauna-1234", WIDTH)


# Wrong answers

WRONG = {
    "an unknown index": ((reply(2), chunk()), []),
    "a huge index": ((reply(2**32 - 1), chunk()), []),
    "the same index twice": ((*ANSWERED_0, *ANSWERED_0), [0]),
    "the last index twice": ((*ANSWERED_0, reply(1), chunk(), reply(1), chunk()), [0, 1]),
    "more bytes announced than the tensor has": ((*ANSWERED_0, reply(1, BYTES + 4), chunk(BYTES + 4)), [0]),
    "fewer bytes announced than the tensor has": ((*ANSWERED_0, reply(1, BYTES - 4), chunk(BYTES - 4)), [0]),
    "a tensor of twice the width": ((*ANSWERED_0, reply(1, 2 * BYTES), chunk(2 * BYTES)), [0]),
    "a size beyond all memory": ((reply(0, 2**63), chunk()), []),
    "no bytes announced": ((reply(0, 0),), []),
    "a chunk longer than announced": ((*ANSWERED_0, reply(1), chunk(BYTES + 4)), [0]),
    "chunks longer than announced": ((*ANSWERED_0, reply(1), chunk(BYTES - 4), chunk(8)), [0]),
    "one chunk too many at the end": ((*ANSWERED_0, reply(1), chunk(), chunk(4)), [0, 1]),
    "an empty chunk": ((*ANSWERED_0, reply(1), CallReply(chunk=b""), chunk()), [0]),
    "no room for the second of two tensors": ((reply(0), reply(1), chunk(), chunk(BYTES + 4)), [0]),
    "both tensors short": ((both(), chunk(), chunk(BYTES - 4)), [0]),
    "a repeated index in one message": (
        (CallReply(experts=[*reply(0).experts] * 2, chunk=bytes(2 * BYTES)),),
        [],
    ),
    "a message of too many bytes": (
        (CallReply(experts=both().experts, chunk=bytes(MAX_CHUNK_BYTES + 1)),),
        [],
    ),
    "a chunk before any answer": ((chunk(), reply(0), chunk()), []),
    "an empty message": ((CallReply(),), []),
    "bytes that are no message": ((*ANSWERED_0, b"\xff\xff\xff"), [0]),
    "NaN": ((*ANSWERED_0, reply(1), chunk(number=math.nan)), [0]),
    "infinity": ((*ANSWERED_0, reply(1), chunk(number=math.inf)), [0]),
    "an early end between answers": (ANSWERED_0, [0]),
    "an early end within a payload": ((*ANSWERED_0, reply(1), chunk(BYTES - 4)), [0]),
    "nothing at all": ((), []),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_answer_is_data_loss_and_earlier_answers_count(
    loop: LoopThread, server: Server, caller: GrpcCaller, case: str
) -> None:
    messages, answered = WRONG[case]
    server.behave = sends(*messages)
    collected = loop.run(collect(caller, server.info, requests_for(0, 1)))
    assert collected.status is StatusCode.DATA_LOSS
    assert collected.answered == answered
    assert collected.seconds < LONG / 3


def test_message_over_the_limit_is_refused_unread(
    loop: LoopThread, server: Server, caller: GrpcCaller
) -> None:
    server.behave = sends(reply(0), bytes(4 * 2**20))
    collected = loop.run(collect(caller, server.info, requests_for(0)))
    assert collected.status is StatusCode.RESOURCE_EXHAUSTED
    assert not collected.answers


def test_wrong_answer_cuts_the_call_off_at_the_server(
    loop: LoopThread, server: Server, caller: GrpcCaller
) -> None:
    async def behave(server: Server, context: Context) -> None:
        await sends(reply(99))(server, context)
        await asyncio.sleep(LONG)

    server.behave = behave
    collected = loop.run(collect(caller, server.info, requests_for(0)))
    assert collected.status is StatusCode.DATA_LOSS
    loop.run(until(lambda: server.running == 0))


# Errors, of an expert and of the whole call


def refusal(index: int, status: int, message: str = "", retry_after_s: float = 0.0) -> CallReply:
    return CallReply(
        experts=[ExpertReply(index=index, status=status, message=message, retry_after_s=retry_after_s)]
    )


def test_error_of_one_expert_leaves_the_others(loop: LoopThread, server: Server, caller: GrpcCaller) -> None:
    status: int = StatusCode.RESOURCE_EXHAUSTED.value[0]
    server.behave = sends(refusal(1, status, "queue full", 2.5), reply(0), chunk())
    collected = loop.run(collect(caller, server.info, requests_for(0, 1)))
    assert collected.error is None
    refused, answered = collected.answers
    assert collected.answered == [1, 0]
    assert refused.tensor is None
    assert refused.error is not None
    assert (refused.error.status, str(refused.error)) == (StatusCode.RESOURCE_EXHAUSTED, "queue full")
    assert refused.error.retry_after_s == 2.5
    assert answered.tensor is not None


def test_all_experts_refusing_is_no_error_of_the_call(
    loop: LoopThread, server: Server, caller: GrpcCaller
) -> None:
    server.behave = sends(refusal(0, 5), refusal(1, 13))
    collected = loop.run(collect(caller, server.info, requests_for(0, 1)))
    assert collected.error is None
    statuses = [answer.error.status for answer in collected.answers if answer.error]
    assert statuses == [StatusCode.NOT_FOUND, StatusCode.INTERNAL]


@pytest.mark.parametrize(
    ("retry_after_s", "expected"), [(math.nan, 0.0), (-5.0, 0.0), (math.inf, math.inf), (1.5, 1.5)]
)
def test_retry_hint_is_never_negative_or_nan_and_unknown_statuses_are_unknown(
    loop: LoopThread, server: Server, caller: GrpcCaller, retry_after_s: float, expected: float
) -> None:
    server.behave = sends(refusal(0, 4711, "x" * 100_000, retry_after_s))
    collected = loop.run(collect(caller, server.info, requests_for(0)))
    (answer,) = collected.answers
    assert answer.error is not None
    assert answer.error.status is StatusCode.UNKNOWN
    assert answer.error.retry_after_s == expected
    assert len(str(answer.error)) <= 500


STATUSES = [StatusCode.FAILED_PRECONDITION, StatusCode.INVALID_ARGUMENT, StatusCode.UNAUTHENTICATED]


@pytest.mark.parametrize("status", STATUSES)
def test_refusal_of_the_whole_call_has_the_nodes_status_and_message(
    loop: LoopThread, server: Server, caller: GrpcCaller, status: StatusCode
) -> None:
    async def behave(server: Server, context: Context) -> None:
        await sends(*ANSWERED_0)(server, context)
        await context.abort(status, "not with me")

    server.behave = behave
    collected = loop.run(collect(caller, server.info, requests_for(0, 1)))
    assert collected.status is status
    assert str(collected.error) == "not with me"
    assert collected.answered == [0]


def test_busy_node_that_refuses_the_whole_call_is_left_alone_for_a_while(
    loop: LoopThread, server: Server, caller: GrpcCaller
) -> None:
    async def behave(server: Server, context: Context) -> None:
        await server.read(context)
        await context.abort(StatusCode.RESOURCE_EXHAUSTED, "too many calls")

    server.behave = behave
    collected = loop.run(collect(caller, server.info, requests_for(0)))
    assert collected.error is not None
    assert collected.error.status is StatusCode.RESOURCE_EXHAUSTED
    assert collected.error.retry_after_s == 1.0


def test_node_that_breaks_down_is_no_error_of_ours(
    loop: LoopThread, server: Server, caller: GrpcCaller
) -> None:
    async def behave(server: Server, context: Context) -> None:
        await server.read(context)
        await context.abort(StatusCode.INTERNAL, "bug")

    server.behave = behave
    assert loop.run(collect(caller, server.info, requests_for(0))).status is StatusCode.UNAVAILABLE


@pytest.mark.parametrize("ends_with", [StatusCode.FAILED_PRECONDITION, StatusCode.OK])
@pytest.mark.parametrize("messages_read", [0, 1, 3])
def test_call_that_ends_while_we_still_send_is_an_error_at_once(
    loop: LoopThread, server: Server, pool: ChannelPool, messages_read: int, ends_with: StatusCode
) -> None:
    """grpc.aio then raises one of several errors, and mostly hides the node's status: hence the repetitions."""

    async def behave(server: Server, context: Context) -> None:
        await server.read(context, messages_read)
        if ends_with is not StatusCode.OK:
            await context.abort(ends_with, "no more")

    server.behave = behave
    caller = GrpcCaller(pool, "s", 512)
    requests = requests_for(0, 1, rows=2000, width=512)

    async def scenario() -> list[Collected]:
        return [await collect(caller, server.info, requests) for _ in range(20)]

    plain = StatusCode.DATA_LOSS if ends_with is StatusCode.OK else ends_with
    for collected in loop.run(scenario()):
        assert collected.status in (plain, StatusCode.UNAVAILABLE)
        assert collected.seconds < LONG / 3
    assert server.calls == 20
