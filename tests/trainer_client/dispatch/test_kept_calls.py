"""Inputs that the node has kept since the forward call are not sent again, over real sockets."""

from pathlib import Path

import numpy as np
import pytest
from callers import a_caller
from real_node import GENEROUS, HIDDEN, ROWS, UIDS, a_node, ask, request, rows

from peer.codec import Floats
from peer.loop import LoopThread
from peer.metrics import total
from peer.rpc.channels import ChannelPool
from trainer_client.dispatch.grpc_caller import GrpcCaller


async def forward_and_backward(path: Path, keep: bool, max_kept_bytes: int) -> tuple[list[Floats], float]:
    """The gradients of the inputs of both experts, and the payload bytes of the backward call."""
    channels = ChannelPool()
    async with a_node(path, max_kept_bytes) as (node, _):
        caller = GrpcCaller(channels, "kept-swarm", HIDDEN, sessions=a_caller("kept-swarm"))
        answers = await ask(caller, node, "forward", *(request(uid, keep=keep) for uid in UIDS))
        sent = total(caller.metrics.bytes, direction="sent")
        requests = [request(uid, rows(2 + i), answer=answers[i]) for i, uid in enumerate(UIDS)]
        gradients = await ask(caller, node, "backward", *requests)
        tensors = [gradients[i].tensor for i in range(2)]
        await channels.close()
    assert all(tensor is not None for tensor in tensors), gradients
    return [tensor for tensor in tensors if tensor is not None], total(
        caller.metrics.bytes, direction="sent"
    ) - sent


ONE_TENSOR = ROWS * HIDDEN * 4


@pytest.mark.parametrize(
    ("keep", "max_kept_bytes", "tensors_sent"),
    [(False, GENEROUS, 4), (True, GENEROUS, 2), (True, 0, 4)],
    ids=["not asked to keep", "kept", "no memory to keep"],
)
def test_kept_inputs_do_not_travel_twice(
    loop: LoopThread, tmp_path: Path, keep: bool, max_kept_bytes: int, tensors_sent: int
) -> None:
    _, sent = loop.run(forward_and_backward(tmp_path, keep, max_kept_bytes), 120)
    assert sent == tensors_sent * ONE_TENSOR


def test_kept_or_sent_again_the_gradients_are_the_same(loop: LoopThread, tmp_path: Path) -> None:
    kept, _ = loop.run(forward_and_backward(tmp_path / "kept", True, GENEROUS), 120)
    sent, _ = loop.run(forward_and_backward(tmp_path / "sent", False, GENEROUS), 120)
    for one, other in zip(kept, sent, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_a_node_that_gave_up_what_it_kept_is_sent_the_inputs(loop: LoopThread, tmp_path: Path) -> None:
    """The memory is enough for one of the two experts' inputs, without a graph."""
    enough_for_one = ONE_TENSOR + ROWS * 8 + 2 * 8
    kept, sent = loop.run(forward_and_backward(tmp_path / "kept", True, enough_for_one), 120)
    assert sent == (2 + 2) * ONE_TENSOR  # a gradient each, and then one expert's inputs and gradients
    plain, _ = loop.run(forward_and_backward(tmp_path / "sent", False, GENEROUS), 120)
    for one, other in zip(kept, plain, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_what_is_kept_is_handed_over_once(loop: LoopThread, tmp_path: Path) -> None:
    async def scenario() -> tuple[float, float]:
        channels = ChannelPool()
        async with a_node(tmp_path, GENEROUS) as (node, runtime):
            caller = GrpcCaller(channels, "kept-swarm", HIDDEN, sessions=a_caller("kept-swarm"))
            answers = await ask(caller, node, "forward", request(UIDS[0], keep=True))
            sent = []
            for _ in range(2):
                before = total(caller.metrics.bytes, direction="sent")
                await ask(caller, node, "backward", request(UIDS[0], rows(2), answer=answers[0]))
                sent.append(total(caller.metrics.bytes, direction="sent") - before)
            (again,) = (await ask(caller, node, "forward", request(UIDS[0]))).values()
            assert (answers[0].update_count, again.update_count) == (0, 2)
            await channels.close()
            assert total(runtime.metrics.updates) == 2
        return sent[0], sent[1]

    assert loop.run(scenario(), 120) == (ONE_TENSOR, 3 * ONE_TENSOR)


def test_another_experts_kept_inputs_are_refused(loop: LoopThread, tmp_path: Path) -> None:
    async def scenario() -> None:
        channels = ChannelPool()
        async with a_node(tmp_path, GENEROUS) as (node, _):
            caller = GrpcCaller(channels, "kept-swarm", HIDDEN, sessions=a_caller("kept-swarm"))
            answers = await ask(caller, node, "forward", request(UIDS[0], keep=True))
            try:
                await ask(caller, node, "backward", request(UIDS[1], rows(2), answer=answers[0]))
            finally:
                await channels.close()

    with pytest.raises(Exception, match=r"of 6 rows for expert 0\.0\.0"):
        loop.run(scenario(), 120)
