"""Inputs that the node has kept since the forward call are not sent again, over real sockets."""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest

from dht.manifest import ExpertSpec, Manifest, ModelSpec
from dht.registry import NodeInfo
from dht.uid import UID
from expert_server.expert import Expert
from expert_server.runtime import Runtime
from expert_server.servicer import EdgeLimits, ExpertServicer
from peer.channels import SERVER_OPTIONS, ChannelPool, server_credentials
from peer.codec import Floats
from peer.identity import Identity, certificate_pem
from peer.loop import LoopThread
from peer.wire import expert_pb2_grpc
from trainer_client.calls import Answer, Direction, GrpcCaller, Request

HIDDEN, ROWS = 16, 6
MANIFEST = Manifest(
    name="kept", model=ModelSpec(hidden=HIDDEN, heads=2, context=16), experts=ExpertSpec(grid=(2, 2))
)
UIDS = [UID(0, (0, 0)), UID(0, (1, 1))]
GENEROUS = 2**20


def rows(seed: int) -> Floats:
    return np.random.default_rng(seed).standard_normal((ROWS, HIDDEN), dtype=np.float32)


def request(
    uid: UID, gradients: Floats | None = None, keep: bool = False, answer: Answer | None = None
) -> Request:
    kept = None if answer is None else answer.kept
    return Request(uid, [4, 2], [0, 1, 2, 5, 3, 4], rows(1), gradients, keep, kept)


@asynccontextmanager
async def a_node(path: Path, max_kept_bytes: int) -> AsyncIterator[tuple[NodeInfo, Runtime]]:
    identity = Identity.load_or_create(path / "identity.key")
    certificate = identity.make_certificate()
    runtime = Runtime(
        {uid: Expert(uid, MANIFEST) for uid in UIDS}, max_queued_rows=999, max_batch_rows=99, threads=1
    )
    await runtime.start()
    server = grpc.aio.server(options=SERVER_OPTIONS)
    limits = EdgeLimits(max_call_bytes=2**20, max_call_s=30.0, max_kept_bytes=max_kept_bytes)
    expert_pb2_grpc.add_ExpertServiceServicer_to_server(
        ExpertServicer(runtime, MANIFEST, "kept-swarm", limits), server
    )
    port = server.add_secure_port("127.0.0.1:0", server_credentials(identity, certificate))
    await server.start()
    pem = certificate_pem(certificate, identity.peer_id)
    address = (f"127.0.0.1:{port}",)
    try:
        yield (
            NodeInfo(identity.peer_id, address, pem, 1, "0", 2, 2, 0, 0, 0.0, (), time.time() + 60),
            runtime,
        )
    finally:
        await server.stop(None)
        await runtime.stop()


async def ask(
    caller: GrpcCaller, node: NodeInfo, direction: Direction, *requests: Request
) -> dict[int, Answer]:
    return {answer.index: answer async for answer in caller.call(node, direction, requests, 20.0)}


async def forward_and_backward(path: Path, keep: bool, max_kept_bytes: int) -> tuple[list[Floats], int]:
    """The gradients of the inputs of both experts, and the payload bytes of the backward call."""
    channels = ChannelPool()
    async with a_node(path, max_kept_bytes) as (node, _):
        caller = GrpcCaller(channels, "kept-swarm", HIDDEN)
        answers = await ask(caller, node, "forward", *(request(uid, keep=keep) for uid in UIDS))
        sent = caller.bytes_sent
        requests = [request(uid, rows(2 + i), answer=answers[i]) for i, uid in enumerate(UIDS)]
        gradients = await ask(caller, node, "backward", *requests)
        tensors = [gradients[i].tensor for i in range(2)]
        await channels.close()
    assert all(tensor is not None for tensor in tensors), gradients
    return [tensor for tensor in tensors if tensor is not None], caller.bytes_sent - sent


ONE_TENSOR = ROWS * HIDDEN * 4


@pytest.mark.parametrize(
    ("keep", "max_kept_bytes", "tensors_sent"),
    [(False, GENEROUS, 4), (True, GENEROUS, 2), (True, 0, 4)],
    ids=["not asked to keep", "kept", "no memory to keep"],
)
def test_kept_inputs_do_not_travel_twice(
    loop: LoopThread, tmp_path: Path, keep: bool, max_kept_bytes: int, tensors_sent: int
) -> None:
    _, sent = loop.run(forward_and_backward(tmp_path, keep, max_kept_bytes), 30)
    assert sent == tensors_sent * ONE_TENSOR


def test_kept_or_sent_again_the_gradients_are_the_same(loop: LoopThread, tmp_path: Path) -> None:
    kept, _ = loop.run(forward_and_backward(tmp_path / "kept", True, GENEROUS), 30)
    sent, _ = loop.run(forward_and_backward(tmp_path / "sent", False, GENEROUS), 30)
    for one, other in zip(kept, sent, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_a_node_that_gave_up_what_it_kept_is_sent_the_inputs(loop: LoopThread, tmp_path: Path) -> None:
    """The memory is enough for one of the two experts' inputs, without a graph."""
    enough_for_one = ONE_TENSOR + ROWS * 8 + 2 * 8
    kept, sent = loop.run(forward_and_backward(tmp_path / "kept", True, enough_for_one), 30)
    assert sent == (2 + 2) * ONE_TENSOR  # a gradient each, and then one expert's inputs and gradients
    plain, _ = loop.run(forward_and_backward(tmp_path / "sent", False, GENEROUS), 30)
    for one, other in zip(kept, plain, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_what_is_kept_is_handed_over_once(loop: LoopThread, tmp_path: Path) -> None:
    async def scenario() -> tuple[int, int]:
        channels = ChannelPool()
        async with a_node(tmp_path, GENEROUS) as (node, runtime):
            caller = GrpcCaller(channels, "kept-swarm", HIDDEN)
            answers = await ask(caller, node, "forward", request(UIDS[0], keep=True))
            sent = []
            for _ in range(2):
                before = caller.bytes_sent
                await ask(caller, node, "backward", request(UIDS[0], rows(2), answer=answers[0]))
                sent.append(caller.bytes_sent - before)
            (again,) = (await ask(caller, node, "forward", request(UIDS[0]))).values()
            assert (answers[0].update_count, again.update_count) == (0, 2)
            await channels.close()
            assert runtime.stats.updates == 2
        return sent[0], sent[1]

    assert loop.run(scenario(), 30) == (ONE_TENSOR, 3 * ONE_TENSOR)


def test_another_experts_kept_inputs_are_refused(loop: LoopThread, tmp_path: Path) -> None:
    async def scenario() -> None:
        channels = ChannelPool()
        async with a_node(tmp_path, GENEROUS) as (node, _):
            caller = GrpcCaller(channels, "kept-swarm", HIDDEN)
            answers = await ask(caller, node, "forward", request(UIDS[0], keep=True))
            try:
                await ask(caller, node, "backward", request(UIDS[1], rows(2), answer=answers[0]))
            finally:
                await channels.close()

    with pytest.raises(Exception, match=r"of 6 rows for expert 0\.0\.0"):
        loop.run(scenario(), 30)
