"""Inputs that the node has kept from the forward call are not sent again, over real sockets."""

import numpy as np
import pytest
import torch
from callers import a_caller
from expert_fakes import Request, ask
from grpc import StatusCode
from real_node import GENEROUS, HIDDEN, MANIFEST, ROWS, UIDS, a_node, request, rows

from expert_server.experts.expert import Expert
from expert_server.experts.graphs import Rows
from peer.codec import Floats
from peer.errors import ExpertError
from peer.loop import LoopThread
from peer.metrics import total
from peer.rpc.channels import ChannelPool
from trainer_client.dispatch.grpc_caller import GrpcCaller


async def forward_and_backward(keep: bool, max_kept_bytes: int) -> tuple[list[Floats], float]:
    """The gradients of the inputs of both experts, and the payload bytes of the backward call."""
    channels = ChannelPool()
    async with a_node(max_kept_bytes) as (node, _):
        caller = GrpcCaller(channels, "kept-swarm", HIDDEN, sessions=a_caller("kept-swarm"))
        forward = await ask(caller, node, "forward", *(request(uid) for uid in UIDS), keep=keep)
        sent = total(caller.metrics.bytes, direction="sent")
        requests = [request(uid, rows(2 + i)) for i, uid in enumerate(UIDS)]
        backward = await ask(caller, node, "backward", *requests, kept=forward.kept)
        await channels.close()
    return [backward.tensor(uid) for uid in UIDS], total(caller.metrics.bytes, direction="sent") - sent


ONE_TENSOR = ROWS * HIDDEN * 4
ENOUGH_FOR_ONE = 3 * ONE_TENSOR + 3072
"""Bytes for the inputs and answers of one call and its overhead, but not for another tensor."""


@pytest.mark.parametrize(
    ("keep", "max_kept_bytes", "tensors_sent"),
    [(False, GENEROUS, 4), (True, GENEROUS, 2), (True, 0, 4)],
    ids=["not asked to keep", "kept", "no memory to keep"],
)
def test_kept_inputs_do_not_travel_twice(
    loop: LoopThread, keep: bool, max_kept_bytes: int, tensors_sent: int
) -> None:
    _, sent = loop.run(forward_and_backward(keep, max_kept_bytes), 120)
    assert sent == tensors_sent * ONE_TENSOR


def test_kept_or_sent_again_the_gradients_are_the_same(loop: LoopThread) -> None:
    kept, _ = loop.run(forward_and_backward(True, GENEROUS), 120)
    sent, _ = loop.run(forward_and_backward(False, GENEROUS), 120)
    for one, other in zip(kept, sent, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_what_goes_in_one_message_or_in_several_is_answered_alike(
    loop: LoopThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once, _ = loop.run(forward_and_backward(False, GENEROUS), 120)
    monkeypatch.setattr("peer.codec.CHUNK_BYTES", 100)
    in_pieces, sent = loop.run(forward_and_backward(False, GENEROUS), 120)
    assert sent == 4 * ONE_TENSOR
    for one, other in zip(at_once, in_pieces, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_node_that_gave_up_what_it_kept_is_sent_the_inputs(loop: LoopThread) -> None:
    """The memory is enough for only one of two calls."""

    async def scenario() -> None:
        channels = ChannelPool()
        async with a_node(ENOUGH_FOR_ONE) as (node, runtime):
            caller = GrpcCaller(channels, "kept-swarm", HIDDEN, sessions=a_caller("kept-swarm"))
            kept = [(await ask(caller, node, "forward", request(uid), keep=True)).kept for uid in UIDS]
            assert all(kept)
            for i, (uid, tensors) in enumerate(zip(UIDS, (1 + 2, 1), strict=True)):
                before = total(caller.metrics.bytes, direction="sent")
                gradients = rows(2 + i)
                found = await ask(caller, node, "backward", request(uid, gradients), kept=kept[i])
                assert total(caller.metrics.bytes, direction="sent") - before == tensors * ONE_TENSOR
                (expected,), _ = Expert(uid, MANIFEST).backward([as_rows(request(uid, gradients))])
                np.testing.assert_allclose(found.tensor(uid), expected.numpy(), rtol=1e-5, atol=1e-6)
            await channels.close()
            assert total(runtime.metrics.updates) == 2

    loop.run(scenario(), 120)


def as_rows(asked: Request) -> Rows:
    assert asked.gradients is not None
    lengths, positions = torch.tensor(asked.lengths), torch.tensor(asked.positions)
    return Rows(torch.from_numpy(asked.inputs), lengths, positions, torch.from_numpy(asked.gradients))


def test_what_is_kept_is_handed_over_once(loop: LoopThread) -> None:
    async def scenario() -> tuple[float, float]:
        channels = ChannelPool()
        async with a_node(GENEROUS) as (node, runtime):
            caller = GrpcCaller(channels, "kept-swarm", HIDDEN, sessions=a_caller("kept-swarm"))
            forward = await ask(caller, node, "forward", request(UIDS[0]), keep=True)
            sent = []
            for _ in range(2):
                before = total(caller.metrics.bytes, direction="sent")
                await ask(caller, node, "backward", request(UIDS[0], rows(2)), kept=forward.kept)
                sent.append(total(caller.metrics.bytes, direction="sent") - before)
            again = await ask(caller, node, "forward", request(UIDS[0]))
            assert (forward.update_counts[UIDS[0]], again.update_counts[UIDS[0]]) == (0, 2)
            await channels.close()
            assert total(runtime.metrics.updates) == 2
        return sent[0], sent[1]

    assert loop.run(scenario(), 120) == (ONE_TENSOR, 3 * ONE_TENSOR)


def test_gradients_of_other_rows_than_were_kept_are_refused(loop: LoopThread) -> None:
    async def scenario() -> None:
        channels = ChannelPool()
        async with a_node(GENEROUS) as (node, runtime):
            caller = GrpcCaller(channels, "kept-swarm", HIDDEN, sessions=a_caller("kept-swarm"))
            forward = await ask(caller, node, "forward", request(UIDS[0]), keep=True)
            twice = [request(uid, rows(2)) for uid in UIDS]
            try:
                await ask(caller, node, "backward", *twice, kept=forward.kept)
            finally:
                await channels.close()
                assert total(runtime.metrics.updates) == 0

    with pytest.raises(ExpertError, match="rows") as caught:
        loop.run(scenario(), 120)
    assert caught.value.status is StatusCode.INVALID_ARGUMENT
