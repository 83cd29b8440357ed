"""GrpcCaller against a real TLS server: what is sent, correct answers, and the server's identity."""

import asyncio
import socket
from dataclasses import replace

import numpy as np
from expert_fakes import Request, collect, make_call, random_rows
from grpc import StatusCode
from misbehaving_node import (
    BYTES,
    LONG,
    WIDTH,
    Context,
    Server,
    answer_all,
    ask_in_vain,
    caller,
    identities,
    pool,
    requests_for,
    running_server,
    sends,
    server,
)
from scalars import numbers_of

from dht.uid import UID
from peer import PROTOCOL_VERSION
from peer.identity import Identity, certificate_pem
from peer.loop import LoopThread
from peer.metrics import total, totals
from peer.rpc.channels import ChannelPool
from peer.transport.endpoints import Endpoint
from peer.wire import expert_pb2
from peer.wire.expert_pb2 import CallReply, ExpertReply
from trainer_client.dispatch.batches import NodeBatch, NodeCall
from trainer_client.dispatch.grpc_caller import GrpcCaller

__all__ = ["caller", "identities", "pool", "running_server", "server"]


# What is sent, and correct answers


def test_every_expert_is_answered_with_its_own_tensor(
    loop: LoopThread, server: Server, caller: GrpcCaller
) -> None:
    requests = requests_for(4, 7, 9)
    collected = loop.run(ask_in_vain(caller, server.info, requests))
    assert collected.error is None
    assert collected.answered == [requests[i].uid for i in (2, 1, 0)]
    assert not collected.errors
    for request in requests:
        np.testing.assert_array_equal(collected.tensor(request.uid), 2 * request.inputs)
    assert totals(caller.metrics.bytes, "direction") == {"sent": 3 * BYTES, "received": 3 * BYTES}


def test_the_header_says_what_follows_and_each_call_has_an_id_of_its_own(
    loop: LoopThread, server: Server, caller: GrpcCaller
) -> None:
    ids = set()
    requests = [
        Request(UID(2, (1, 3)), [1, 2], [5, 0, 7], random_rows(3), random_rows(3, seed=1)),
        Request(UID(2, (0, 0)), [1], [3], random_rows(1, seed=2), random_rows(1, seed=3)),
    ]
    call = make_call(server.info, "backward", requests, LONG)
    assert call.gradients is not None
    for _ in range(3):
        assert loop.run(collect(caller, call)).error is None
        header = server.header
        assert header is not None
        ids.add(header.request_id)
        assert len(header.request_id) == 16
        assert (header.protocol_version, header.swarm_id) == (PROTOCOL_VERSION, "sauna-1234")
        assert (header.width, header.codec) == (WIDTH, expert_pb2.CODEC_FP32)
        assert (list(header.segment_lengths), list(header.positions)) == ([1, 2, 1], [5, 0, 7, 3])
        assert [(e.uid, list(e.rows), numbers_of(e.weights)) for e in header.experts] == [
            ("2.1.3", [0, 1, 2], []),
            ("2.0.0", [3], []),
        ]
        assert bytes(server.payload) == call.inputs.tobytes() + call.gradients.tobytes()
    assert len(ids) == 3


def test_a_row_travels_once_whatever_number_of_experts_it_is_for(
    loop: LoopThread, server: Server, caller: GrpcCaller
) -> None:
    """The row is sent with the weights that its experts have relative to each other. For an expert that has all rows,
    their numbers are left out, and so are weights that are all 1.
    """
    uids = (UID(0, (0,)), UID(0, (1,)), UID(0, (2,)))
    experts = np.array([[1, 0, 2], [2, -1, -1], [0, 2, -1]])
    batch = NodeBatch(np.arange(3), np.array([3]), np.arange(3), uids, experts)
    weights = np.array([[0.5, 1, 0.25], [1, 0, 0], [1, 0.125, 0]], np.float32)
    call = NodeCall(server.info, "forward", batch, LONG, random_rows(3), weights, keep=True)
    loop.run(collect(caller, call))
    header = server.header
    assert header is not None
    assert header.keep
    assert [(e.uid, list(e.rows), numbers_of(e.weights)) for e in header.experts] == [
        ("0.0", [0, 2], []),
        ("0.1", [0], [0.5]),
        ("0.2", [], [0.25, 1, 0.125]),
    ]
    assert bytes(server.payload) == call.inputs.tobytes()
    assert total(caller.metrics.bytes, direction="sent") == BYTES


def test_of_a_kept_call_only_the_gradients_are_sent(
    loop: LoopThread, server: Server, caller: GrpcCaller
) -> None:
    server.behave = sends(CallReply(experts=[ExpertReply(index=0, status=13)]))
    request = requests_for(0, gradients=random_rows(3, seed=7))[0]
    loop.run(collect(caller, make_call(server.info, "backward", [request], LONG, kept=b"k" * 16)))
    header = server.header
    assert header is not None
    assert (header.kept_request_id, header.kept_rows) == (b"k" * 16, 3)
    assert not header.experts
    assert not header.positions
    assert request.gradients is not None
    assert bytes(server.payload) == request.gradients.tobytes()


def test_tensors_of_many_chunks_go_both_ways(loop: LoopThread, server: Server, pool: ChannelPool) -> None:
    requests = requests_for(0, 1, rows=2000, width=512)  # 4 MB each
    collected = loop.run(ask_in_vain(GrpcCaller(pool, "s", 512), server.info, requests))
    assert collected.error is None
    for request in requests:
        np.testing.assert_array_equal(collected.tensor(request.uid), 2 * request.inputs)


def test_a_call_that_went_well_is_not_cancelled_at_the_server(
    loop: LoopThread, server: Server, caller: GrpcCaller
) -> None:
    """Cancelled calls leak memory (grpc issue 43360), so no call is cancelled after its last answer."""
    ended: list[str] = []

    async def behave(server: Server, context: Context) -> None:
        try:
            await answer_all(server, context)
            for _ in range(50):  # a cancellation would come meanwhile
                await asyncio.sleep(0.001)
            ended.append("well")
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise

    server.behave = behave
    assert loop.run(ask_in_vain(caller, server.info, requests_for(0))).error is None
    assert ended == ["well"]


# The server's identity


def test_node_with_another_certificate_than_the_pinned_is_unavailable_and_sent_nothing(
    loop: LoopThread, server: Server, caller: GrpcCaller, identities: list[Identity]
) -> None:
    other = identities[1]
    pem = certificate_pem(other.make_certificate(), other.peer_id)
    node = replace(server.info, certificate_pem=pem)
    collected = loop.run(ask_in_vain(caller, node, requests_for(0)))
    assert collected.status is StatusCode.UNAVAILABLE
    assert not collected.replies
    assert server.calls == 0
    assert total(caller.metrics.bytes, direction="sent") == 0
    assert collected.seconds < LONG / 3


def test_right_and_wrong_certificate_for_one_address_do_not_share_a_channel(
    loop: LoopThread, server: Server, caller: GrpcCaller, identities: list[Identity]
) -> None:
    pem = certificate_pem(identities[1].make_certificate(), identities[1].peer_id)
    wrong = replace(server.info, certificate_pem=pem)
    statuses = [
        loop.run(ask_in_vain(caller, node, requests_for(0))).status for node in (server.info, wrong) * 2
    ]
    assert statuses == [None, StatusCode.UNAVAILABLE] * 2


def test_nobody_listening_is_unavailable(loop: LoopThread, server: Server, caller: GrpcCaller) -> None:
    with socket.socket() as taken:  # bound and not listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        node = replace(server.info, addresses=(Endpoint.of("127.0.0.1", taken.getsockname()[1]),))
        collected = loop.run(ask_in_vain(caller, node, requests_for(0)))
    assert collected.status is StatusCode.UNAVAILABLE
    assert collected.seconds < LONG / 3


def test_node_without_address_is_unavailable(loop: LoopThread, server: Server, caller: GrpcCaller) -> None:
    collected = loop.run(ask_in_vain(caller, replace(server.info, addresses=()), requests_for(0)))
    assert collected.status is StatusCode.UNAVAILABLE
