"""The gRPC server, over real TLS: valid calls get correct answers."""

import asyncio
import threading
from collections.abc import Callable
from typing import Any

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
    Answers,
    Call,
    Edge,
    Runner,
    answers,
    both_directions,
    chunked,
    dense_answer,
    exchange,
    header_of,
    make,
    run,
    wait_until,
    with_payload,
)

from dht.uid import UID
from expert_server.experts.expert import Expert
from expert_server.experts.graphs import Rows
from expert_server.serving.batching import Direction
from peer import PROTOCOL_VERSION, SOFTWARE_VERSION
from peer.codec import CHUNK_BYTES
from peer.wire import expert_pb2

__all__ = ["run"]


def fresh(*uids: UID) -> list[Expert | None]:
    """Experts like those of the server before any call."""
    return [None if uid == ABSENT else Expert(uid, MANIFEST) for uid in uids]


def check_products(found: Answers, products: dict[int, list[float]]) -> None:
    assert found.products.keys() == products.keys()
    for row, expected in products.items():
        assert found.products[row] == pytest.approx(expected, rel=1e-4, abs=1e-5)


SPREAD: dict[str, Any] = {
    "uids": [SECOND, ABSENT, FIRST, THIRD],
    "rows_of": [[0, 1, 3], [2, 3], [1, 2, 4], [3, 4]],
    "weights_of": [[1.0, 0.25, 1e-6], [3.0, 0.5], [2.0, 1.0, 1e-30], [1.0, 0.5]],
}
"""A call for several experts, each with its own rows. The second is not hosted."""


@both_directions
def test_a_right_call_gets_the_experts_answer(run: Runner, direction: Direction) -> None:
    call = Call(direction)

    async def scenario(edge: Edge) -> None:
        found = answers(call, await make(edge, call))
        alone = Expert(FIRST, MANIFEST)
        torch.testing.assert_close(found.tensor, call.expected(alone))
        (reply,) = found.experts.values()
        assert reply.update_count == alone.update_count == edge.updates() == (direction == "backward")

    run(scenario)


@both_directions
def test_a_row_gets_the_weighted_mean_of_its_experts_and_backward_the_sum(
    run: Runner, direction: Direction
) -> None:
    call = Call(
        direction, uids=[SECOND, FIRST, THIRD], weights_of=[[1.0] * ROWS, [0.3] * ROWS, [1e-6] * ROWS]
    )

    async def scenario(edge: Edge) -> None:
        found = answers(call, await make(edge, call))
        expected, products = dense_answer(call, fresh(*call.uids))
        torch.testing.assert_close(found.tensor, expected)
        check_products(found, products)
        assert set(found.masks.values()) == {0b111}

    run(scenario)


@both_directions
def test_every_expert_of_a_call_gets_its_own_rows_and_one_that_fails_is_left_out(
    run: Runner, direction: Direction
) -> None:
    call = Call(direction, **SPREAD)

    async def scenario(edge: Edge) -> None:
        found = answers(call, await make(edge, call))
        if direction == "forward":
            expected, products = dense_answer(call, fresh(*call.uids))
        else:  # the gradients of the others stay as they are
            every = [Expert(uid, MANIFEST) for uid in call.uids]
            expected, products = dense_answer(call, every, failing_in_backward=[1])
        assert found.failed == {1: StatusCode.NOT_FOUND}
        assert found.experts[1].message == "expert 0.1.1 is not hosted here"
        assert found.masks == {0: 0b1, 1: 0b11, 2: 0b10, 3: 0b101, 4: 0b11}
        torch.testing.assert_close(found.tensor, expected)
        check_products(found, products)

    run(scenario)


def test_a_row_whose_experts_all_fail_is_not_answered(run: Runner) -> None:
    call = Call(uids=[FIRST, ABSENT], rows_of=[[0, 2, 3], [1, 2, 4]])

    async def scenario(edge: Edge) -> None:
        found = answers(call, await make(edge, call))
        assert found.masks == {0: 0b1, 2: 0b1, 3: 0b1}
        expected = call.expected(*fresh(*call.uids))
        torch.testing.assert_close(found.rows[2], expected[2])

    run(scenario)


@pytest.mark.parametrize("with_graphs", [True, False])
def test_a_kept_call_is_run_backwards_from_gradients_alone(run: Runner, with_graphs: bool) -> None:
    call = Call(**SPREAD).keeping()
    backward = call.kept()

    async def scenario(edge: Edge) -> None:
        first = answers(call, await make(edge, call))
        assert first.is_kept
        if not with_graphs:
            (forward,) = edge.cache._cached.values()
            for expert in list(forward.graphs):
                edge.cache._drop_graph((edge.caller, call.header.request_id), forward, expert)
        found = answers(backward, await make(edge, backward))
        expected, products = dense_answer(backward, fresh(*call.uids))
        assert found.failed == {1: StatusCode.FAILED_PRECONDITION}
        assert found.masks == first.masks
        torch.testing.assert_close(found.tensor, expected)
        check_products(found, products)
        assert edge.updates() == 3
        assert len(edge.cache) == edge.cache.bytes == 0

    run(scenario, max_kept_bytes=2**20)


def test_products_are_of_the_updates_that_were_answered_even_if_the_expert_has_stepped(run: Runner) -> None:
    call, other = Call(uids=[FIRST, SECOND]).keeping(), Call("backward", seed=7)
    backward = call.kept()

    async def scenario(edge: Edge) -> None:
        assert answers(call, await make(edge, call)).is_kept
        (forward,) = edge.cache._cached.values()
        before = forward.updates.clone()
        await make(edge, other)
        found = answers(backward, await make(edge, backward))
        for row in range(ROWS):
            own = [float(backward.tensors[0][row] @ before[row + ROWS * k]) for k in range(2)]
            assert found.products[row] == pytest.approx(own, rel=1e-4, abs=1e-5)

    run(scenario, max_kept_bytes=2**20)


def test_rows_come_with_what_is_there_when_most_of_the_time_is_over(
    run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = Call(uids=[FIRST, SECOND], rows_of=[[0, 1, 2], [1, 2, 3, 4]]).keeping()
    monkeypatch.setattr("expert_server.serving.call._FLUSH_AFTER", 0.2)

    async def scenario(edge: Edge) -> None:
        let_go = hold(edge, SECOND, monkeypatch)
        calling = asyncio.create_task(make(edge, call, timeout_s=12.0))
        await wait_until(lambda: any(forward.answered.sum() == 3 for forward in edge.cache._cached.values()))
        assert not calling.done()
        let_go.set()
        found = answers(call, await calling)
        assert found.masks == {0: 0b1, 1: 0b01, 2: 0b01, 3: 0b1, 4: 0b1}
        alone, both = call.expected(*fresh(FIRST), None), call.expected(*fresh(FIRST, SECOND))
        for row in range(ROWS):
            torch.testing.assert_close(found.rows[row], (alone if row < 3 else both)[row])
        backward = call.kept()
        assert answers(backward, await make(edge, backward)).masks == found.masks
        assert edge.updates() == 2

    run(scenario, max_kept_bytes=2**20, threads=2)


def test_an_expert_that_is_late_for_all_of_its_rows_is_given_up(
    run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = Call(uids=[FIRST, SECOND], rows_of=[[0, 1, 2, 3, 4], [1, 2]])
    monkeypatch.setattr("expert_server.serving.call._FLUSH_AFTER", 0.2)

    async def scenario(edge: Edge) -> None:
        let_go = hold(edge, SECOND, monkeypatch)
        outcome = await make(edge, call, timeout_s=12.0)
        let_go.set()
        found = answers(call, outcome)
        assert outcome.seconds < 12
        assert found.failed == {1: StatusCode.DEADLINE_EXCEEDED}
        assert set(found.masks.values()) == {0b1}
        torch.testing.assert_close(found.tensor, call.expected(*fresh(FIRST), None))
        await edge.runtime.run(lambda: None)

    run(scenario, threads=2)


def hold(edge: Edge, uid: UID, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Makes an expert's forward passes wait for the returned event, and keeps experts from being computed together."""
    let_go, held = threading.Event(), edge.runtime.experts[uid]
    for expert in edge.runtime.experts.values():
        monkeypatch.setattr(expert, "grouped_block", None)

    def waiting(compute: Callable[[Rows], Any]) -> Callable[[Rows], Any]:
        def computed(rows: Rows) -> Any:
            assert let_go.wait(60)
            return compute(rows)

        return computed

    for name in ("forward", "forward_with_graph"):
        monkeypatch.setattr(held, name, waiting(getattr(held, name)))
    return let_go


def test_a_full_queue_is_said_in_the_reply_with_a_time_to_come_back(run: Runner) -> None:
    call = Call()

    async def scenario(edge: Edge) -> None:
        found = answers(call, await make(edge, call))
        assert found.failed == {0: StatusCode.RESOURCE_EXHAUSTED}
        assert found.experts[0].retry_after_s > 0
        assert found.rows == {}

    run(scenario, max_queued_rows=ROWS - 1)


@pytest.mark.parametrize("beside", [False, True], ids=["after the header", "beside the header"])
@pytest.mark.parametrize("size", [1, 7, 64, 10**6])
def test_it_does_not_matter_how_the_payload_is_cut(run: Runner, size: int, beside: bool) -> None:
    call = Call("backward", uids=[FIRST, SECOND])

    async def scenario(edge: Edge) -> None:
        first, *others = chunked(call.payload, size)
        requests = [with_payload(call, first.chunk), *others] if beside else [header_of(call), first, *others]
        found = answers(call, await exchange(edge, "backward", requests))
        torch.testing.assert_close(found.tensor, call.expected(*fresh(*call.uids)))

    run(scenario)


def test_a_large_answer_comes_in_chunks(run: Runner) -> None:
    segments = 2 * CHUNK_BYTES // (4 * HIDDEN * CONTEXT)
    call = Call(lengths=[CONTEXT] * segments, positions=list(range(CONTEXT)) * segments)

    async def scenario(edge: Edge) -> None:
        outcome = await make(edge, call)
        assert [len(reply.chunk) for reply in outcome.replies] == [CHUNK_BYTES] * 2
        torch.testing.assert_close(answers(call, outcome).tensor, call.expected(*fresh(FIRST)))

    run(scenario)


def test_many_callers_at_once_get_their_own_answers(run: Runner) -> None:
    calls = [Call(uids=[(FIRST, SECOND, THIRD)[n % 3]], seed=n) for n in range(24)]

    async def scenario(edge: Edge) -> None:
        outcomes = await asyncio.gather(*(make(edge, call) for call in calls))
        for call, outcome in zip(calls, outcomes, strict=True):
            torch.testing.assert_close(answers(call, outcome).tensor, call.expected(*fresh(*call.uids)))

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
