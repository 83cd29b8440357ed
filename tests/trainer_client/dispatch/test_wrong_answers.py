"""GrpcCaller against a real TLS server that answers wrongly or refuses: it gives answers or an ExpertError."""

import asyncio
import math
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import replace

import numpy as np
import pytest
from expert_fakes import Collected, collect, make_call, make_node, make_peer_id, random_rows
from grpc import StatusCode
from misbehaving_node import (
    ANSWERED_0,
    BYTES,
    LONG,
    WIDTH,
    Context,
    Server,
    answer,
    ask_in_vain,
    both,
    caller,
    chunk,
    identities,
    pool,
    requests_for,
    running_server,
    sends,
    server,
    until,
)
from scalars import scalars

from dht.uid import UID
from peer.codec import MAX_CHUNK_BYTES
from peer.errors import WireError
from peer.loop import LoopThread
from peer.rpc.channels import ChannelPool
from peer.wire import expert_pb2
from peer.wire.expert_pb2 import AnsweredRows, CallReply, ExpertReply
from trainer_client.dispatch import batches
from trainer_client.dispatch.batches import NodeBatch, NodeCall
from trainer_client.dispatch.grpc_caller import GrpcCaller, ReplyAssembler

__all__ = ["caller", "identities", "pool", "running_server", "server"]


# Wrong answers


def refusal(index: int, status: int, message: str = "", retry_after_s: float = 0.0) -> CallReply:
    return CallReply(
        experts=[ExpertReply(index=index, status=status, message=message, retry_after_s=retry_after_s)]
    )


FIRST = [UID(0, (0,))]
BOTH = [*FIRST, UID(0, (1,))]


def block(
    rows: Sequence[int], size: int = BYTES, masks: Sequence[int] = (), products: Sequence[float] = ()
) -> CallReply:
    return CallReply(
        rows=[AnsweredRows(rows=rows, masks=masks, products=scalars(products), payload_bytes=size)]
    )


def computed(*indices: int) -> CallReply:
    return CallReply(experts=[ExpertReply(index=index) for index in indices])


WRONG = {
    "an unknown index": ((computed(2),), []),
    "a huge index": ((computed(2**32 - 1),), []),
    "the same index twice": ((*ANSWERED_0, computed(0)), FIRST),
    "a repeated index in one message": ((computed(0, 0),), []),
    "a row twice": ((*ANSWERED_0, block([2]), chunk(BYTES // 3)), FIRST),
    "a row twice in one message": ((computed(0, 1), CallReply(rows=[*block([1, 4]).rows] * 2)), []),
    "rows that fall": ((computed(0), block([1, 0, 2]), chunk()), []),
    "a row twice in one block": ((computed(0), block([0, 1, 1]), chunk()), []),
    "a row beyond the call": ((computed(0, 1), block([0, 1, 6]), chunk()), []),
    "more rows than the call has": ((computed(0, 1), block(range(100), 2 * BYTES), chunk(2 * BYTES)), []),
    "a row of an expert that has not answered": ((*ANSWERED_0, block([3]), chunk(BYTES // 3)), FIRST),
    "a row of an expert that has failed": (
        (*ANSWERED_0, refusal(1, 13), block([3]), chunk(BYTES // 3)),
        FIRST,
    ),
    "all rows, and one expert has not answered": ((computed(0), block([], 2 * BYTES), chunk(2 * BYTES)), []),
    "a mask too few": ((computed(0), block([0, 1, 2], masks=[1, 1]), chunk()), []),
    "a mask too many": ((computed(0), block([0, 1, 2], masks=[1] * 4), chunk()), []),
    "an answer names no expert": ((computed(0), block([0, 1, 2], masks=[1, 0, 1]), chunk()), []),
    "an answer of an expert not asked": ((computed(0, 1), block([0, 1, 2], masks=[1, 2, 1]), chunk()), []),
    "an answer of a 64th expert": ((computed(0), block([0, 1, 2], masks=[1, 1, 2**63]), chunk()), []),
    "products in a forward call": ((computed(0), block([0, 1, 2], products=[1, 1, 1]), chunk()), []),
    "more bytes announced than the tensor has": (
        (*ANSWERED_0, answer(1, BYTES + 4), chunk(BYTES + 4)),
        FIRST,
    ),
    "fewer bytes announced than the tensor has": (
        (*ANSWERED_0, answer(1, BYTES - 4), chunk(BYTES - 4)),
        FIRST,
    ),
    "a tensor of twice the width": ((*ANSWERED_0, answer(1, 2 * BYTES), chunk(2 * BYTES)), FIRST),
    "a size beyond all memory": ((answer(0, 2**63), chunk()), []),
    "no bytes announced": ((answer(0, 0),), []),
    "a chunk longer than announced": ((*ANSWERED_0, answer(1), chunk(BYTES + 4)), BOTH),
    "chunks longer than announced": ((*ANSWERED_0, answer(1), chunk(BYTES - 4), chunk(8)), BOTH),
    "one chunk too many at the end": ((*ANSWERED_0, answer(1), chunk(), chunk(4)), BOTH),
    "an empty chunk": ((*ANSWERED_0, answer(1), CallReply(chunk=b""), chunk()), FIRST),
    "rows announced before the tensor of others has come": ((answer(0), answer(1), chunk(), chunk()), []),
    "rows announced within the tensor of others": ((answer(0), chunk(4), answer(1), chunk(BYTES - 4)), []),
    "a tensor of both short": ((both(), chunk(), chunk(BYTES - 4)), []),
    "a message of too many bytes": (
        (CallReply(experts=both().experts, rows=both().rows, chunk=bytes(MAX_CHUNK_BYTES + 1)),),
        [],
    ),
    "a chunk before any answer": ((chunk(), answer(0), chunk()), []),
    "an empty message": ((CallReply(),), []),
    "bytes that are no message": ((*ANSWERED_0, b"\xff\xff\xff"), FIRST),
    "NaN": ((*ANSWERED_0, answer(1), chunk(number=math.nan)), FIRST),
    "infinity": ((*ANSWERED_0, answer(1), chunk(number=math.inf)), FIRST),
    "kept, and not all has come": ((*ANSWERED_0, CallReply(kept=True), answer(1), chunk()), FIRST),
    "kept twice": ((*ANSWERED_0, answer(1), chunk(), CallReply(kept=True), CallReply(kept=True)), BOTH),
    "more after it was kept": ((*ANSWERED_0, computed(1), CallReply(kept=True), block([3]), chunk()), FIRST),
    "an early end between answers": (ANSWERED_0, FIRST),
    "an early end within a payload": ((*ANSWERED_0, answer(1), chunk(BYTES - 4)), FIRST),
    "nothing at all": ((), []),
    "no row of an expert that has computed": ((*ANSWERED_0, computed(1)), FIRST),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_answer_is_data_loss_and_earlier_answers_count(
    loop: LoopThread, server: Server, caller: GrpcCaller, case: str
) -> None:
    messages, answered = WRONG[case]
    server.behave = sends(*messages)
    collected = loop.run(ask_in_vain(caller, server.info, requests_for(0, 1)))
    assert collected.status is StatusCode.DATA_LOSS
    assert collected.answered == answered
    assert collected.seconds < LONG / 3


def test_rows_of_several_experts_are_answered_in_blocks_with_masks_and_products() -> None:
    """A row's bits stand for its own experts in the order of the header, whatever slots they are in."""
    uids = (UID(0, (0,)), UID(0, (1,)), UID(0, (2,)))
    experts = np.array([[1, 0, 2], [2, -1, -1], [0, 2, -1]])
    batch = NodeBatch(np.arange(3), np.array([3]), np.arange(3), uids, experts)
    weights = np.where(experts >= 0, np.float32(1), np.float32(0))
    node = make_node(make_peer_id(0))
    call = NodeCall(node, "backward", batch, LONG, random_rows(3), weights, random_rows(3))
    assembler = ReplyAssembler(call, bytes(16), WIDTH, expert_pb2.CODEC_FP32)
    tensors = random_rows(3, seed=3)
    assert len(list(assembler.take(computed(2, 0)))) == 2
    message = block([0, 2], 2 * BYTES // 3, masks=[0b101, 0b10], products=[1, 2, 3])
    message.chunk = tensors[:2].tobytes()
    (first,) = assembler.take(message)
    assert isinstance(first, batches.AnsweredRows)
    assert first.products is not None
    assert first.places.tolist() == [0, 2]
    assert first.answered.tolist() == [[False, True, True], [False, True, False]]
    assert first.products.tolist() == [[0, 1, 2], [0, 3, 0]]
    np.testing.assert_array_equal(first.tensor, tensors[:2])
    assert not assembler.complete
    list(assembler.take(refusal(1, 13)))
    assert assembler.complete


def test_a_node_answers_in_backward_for_no_slot_that_does_not_count() -> None:
    """Otherwise the node would seem to have given wrong products, when in fact another node answered that slot."""
    uids = (UID(0, (0,)), UID(0, (1,)))
    batch = NodeBatch(np.arange(2), np.array([2]), np.arange(2), uids, np.array([[0, 1], [0, 1]]))
    counts = np.array([[True, False], [False, False]])
    ones = np.ones((2, 2), np.float32)
    node = make_node(make_peer_id(0))
    call = NodeCall(node, "backward", batch, LONG, random_rows(2), ones, random_rows(2), counts=counts)
    assembler = ReplyAssembler(call, bytes(16), WIDTH, expert_pb2.CODEC_FP32)
    message = block([], 2 * BYTES // 3, products=[1, 2, 3, 4])
    message.chunk = random_rows(2).tobytes()
    *_, found = [*assembler.take(computed(0, 1)), *assembler.take(message)]
    assert isinstance(found, batches.AnsweredRows)
    assert found.products is not None
    np.testing.assert_array_equal(found.answered, counts)
    np.testing.assert_array_equal(found.products, [[1, 0], [0, 0]])
    np.testing.assert_array_equal(found.tensor, random_rows(2))


def test_a_node_that_has_kept_the_call_need_not_answer_rows_that_do_not_count() -> None:
    requests = requests_for(0, 1, gradients=random_rows(3))
    call = make_call(make_node(make_peer_id(0)), "backward", requests, LONG)
    counts = np.ones((6, 1), np.bool_)
    counts[3:] = False
    assembler = ReplyAssembler(replace(call, counts=counts), bytes(16), WIDTH, expert_pb2.CODEC_FP32)
    list(assembler.take(computed(0, 1)))
    with pytest.raises(WireError, match="did not answer 3 rows"):
        assembler.end()
    message = block([0, 1, 2], BYTES, products=[1] * 3)
    message.chunk = random_rows(3).tobytes()
    list(assembler.take(message))
    assembler.end()


@pytest.mark.parametrize("products", [[], [1.0] * 5, [1.0] * 7, [math.nan] * 6, [math.inf] * 6])
def test_products_that_are_too_few_too_many_or_not_finite_are_refused(products: list[float]) -> None:
    requests = requests_for(0, 1, gradients=random_rows(3))
    call = make_call(make_node(make_peer_id(0)), "backward", requests, LONG)
    assembler = ReplyAssembler(call, bytes(16), WIDTH, expert_pb2.CODEC_FP32)
    list(assembler.take(computed(0, 1)))
    with pytest.raises(WireError, match="products"):
        list(assembler.take(block([], 2 * BYTES, products=products)))


def test_a_node_that_answers_row_by_row_leaves_the_loop_to_others(
    loop: LoopThread, server: Server, caller: GrpcCaller
) -> None:
    """A message of a few KB may have thousands of answers, which take a while to read."""
    rows = 2000
    blocks = [AnsweredRows(rows=[row], payload_bytes=BYTES // 3) for row in range(rows)]
    tensor = random_rows(rows).tobytes()
    server.behave = sends(CallReply(experts=computed(0).experts, rows=blocks, chunk=tensor))
    turns, seen = 0, list[int]()

    async def scenario() -> None:
        others = asyncio.create_task(take_turns())
        async with aclosing(
            caller.call(make_call(server.info, "forward", requests_for(0, rows=rows), LONG))
        ) as replies:
            async for reply in replies:
                if isinstance(reply, batches.AnsweredRows):
                    seen.append(turns)
        others.cancel()

    async def take_turns() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    loop.run(scenario(), 120)
    assert len(seen) == rows
    assert len(set(seen)) >= 5, "the loop was held"


def test_what_is_kept_has_the_id_of_the_call(loop: LoopThread, server: Server, caller: GrpcCaller) -> None:
    last = CallReply(kept=True, chunk=chunk().chunk)
    server.behave = sends(*ANSWERED_0, answer(1), last)
    call = make_call(server.info, "forward", requests_for(0, 1), LONG, keep=True)
    collected = loop.run(collect(caller, call))
    assert collected.error is None
    assert server.header is not None
    assert collected.kept == server.header.request_id


def test_message_over_the_limit_is_refused_unread(
    loop: LoopThread, server: Server, caller: GrpcCaller
) -> None:
    server.behave = sends(answer(0), bytes(4 * 2**20))
    collected = loop.run(ask_in_vain(caller, server.info, requests_for(0)))
    assert collected.status is StatusCode.RESOURCE_EXHAUSTED
    assert not collected.answered


def test_wrong_answer_cuts_the_call_off_at_the_server(
    loop: LoopThread, server: Server, caller: GrpcCaller
) -> None:
    async def behave(server: Server, context: Context) -> None:
        await sends(answer(99))(server, context)
        await asyncio.sleep(LONG)

    server.behave = behave
    collected = loop.run(ask_in_vain(caller, server.info, requests_for(0)))
    assert collected.status is StatusCode.DATA_LOSS
    loop.run(until(lambda: server.running == 0))


# Errors, of an expert and of the whole call


def test_error_of_one_expert_leaves_the_others(loop: LoopThread, server: Server, caller: GrpcCaller) -> None:
    status: int = StatusCode.RESOURCE_EXHAUSTED.value[0]
    server.behave = sends(refusal(1, status, "queue full", 2.5), answer(0), chunk())
    collected = loop.run(ask_in_vain(caller, server.info, requests_for(0, 1)))
    assert collected.error is None
    assert collected.answered == FIRST
    ((uid, refused),) = collected.errors.items()
    assert [uid] == BOTH[1:]
    assert (refused.status, str(refused)) == (StatusCode.RESOURCE_EXHAUSTED, "queue full")
    assert refused.retry_after_s == 2.5


def test_all_experts_refusing_is_no_error_of_the_call(
    loop: LoopThread, server: Server, caller: GrpcCaller
) -> None:
    server.behave = sends(refusal(0, 5), refusal(1, 13))
    collected = loop.run(ask_in_vain(caller, server.info, requests_for(0, 1)))
    assert collected.error is None
    assert [error.status for error in collected.errors.values()] == [
        StatusCode.NOT_FOUND,
        StatusCode.INTERNAL,
    ]


@pytest.mark.parametrize(
    ("retry_after_s", "expected"), [(math.nan, 0.0), (-5.0, 0.0), (math.inf, math.inf), (1.5, 1.5)]
)
def test_retry_hint_is_never_negative_or_nan_and_unknown_statuses_are_unknown(
    loop: LoopThread, server: Server, caller: GrpcCaller, retry_after_s: float, expected: float
) -> None:
    server.behave = sends(refusal(0, 4711, "x" * 100_000, retry_after_s))
    collected = loop.run(ask_in_vain(caller, server.info, requests_for(0)))
    (error,) = collected.errors.values()
    assert error.status is StatusCode.UNKNOWN
    assert error.retry_after_s == expected
    assert len(str(error)) <= 500


STATUSES = [StatusCode.FAILED_PRECONDITION, StatusCode.INVALID_ARGUMENT, StatusCode.UNAUTHENTICATED]


@pytest.mark.parametrize("status", STATUSES)
def test_refusal_of_the_whole_call_has_the_nodes_status_and_message(
    loop: LoopThread, server: Server, caller: GrpcCaller, status: StatusCode
) -> None:
    async def behave(server: Server, context: Context) -> None:
        await sends(*ANSWERED_0)(server, context)
        await context.abort(status, "not with me")

    server.behave = behave
    collected = loop.run(ask_in_vain(caller, server.info, requests_for(0, 1)))
    assert collected.status is status
    assert str(collected.error) == "not with me"
    assert collected.answered == FIRST


def test_busy_node_that_refuses_the_whole_call_is_left_alone_for_a_while(
    loop: LoopThread, server: Server, caller: GrpcCaller
) -> None:
    async def behave(server: Server, context: Context) -> None:
        await server.read(context)
        await context.abort(StatusCode.RESOURCE_EXHAUSTED, "too many calls")

    server.behave = behave
    collected = loop.run(ask_in_vain(caller, server.info, requests_for(0)))
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
    assert loop.run(ask_in_vain(caller, server.info, requests_for(0))).status is StatusCode.UNAVAILABLE


@pytest.mark.parametrize("ends_with", [StatusCode.FAILED_PRECONDITION, StatusCode.OK])
@pytest.mark.parametrize("messages_read", [0, pytest.param(1, marks=pytest.mark.slow), 3])
def test_call_that_ends_while_we_still_send_is_an_error_at_once(
    loop: LoopThread, server: Server, pool: ChannelPool, messages_read: int, ends_with: StatusCode
) -> None:
    """grpc.aio then raises one of several errors, and mostly hides the node's status, so the test is repeated."""

    async def behave(server: Server, context: Context) -> None:
        await server.read(context, messages_read)
        if ends_with is not StatusCode.OK:
            await context.abort(ends_with, "no more")

    server.behave = behave
    caller = GrpcCaller(pool, "s", 512)
    requests = requests_for(0, 1, rows=2000, width=512)

    async def scenario() -> list[Collected]:
        return [await ask_in_vain(caller, server.info, requests) for _ in range(20)]

    plain = StatusCode.DATA_LOSS if ends_with is StatusCode.OK else ends_with
    for collected in loop.run(scenario()):
        assert collected.status in (plain, StatusCode.UNAVAILABLE)
        assert collected.seconds < LONG / 3
    assert server.calls == 20
