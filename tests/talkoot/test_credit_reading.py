"""Receipts are read from nodes over real connections: each once, however wrong or slow other nodes are."""

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

import grpc
import pytest
from callers import numbered_identity
from credit_node import KEYS, NODE, SWARM, CreditNode, credit_node
from expert_fakes import make_node
from receipts import peer

from dht.admission import Mode, SwarmAdmission
from dht.announcements import NodeInfo
from dht.receipts import SignedWork, Work, check_receipt, sign_receipt
from peer.identity import certificate_pem
from peer.loop import LoopThread
from peer.parsing import ParseGuard
from peer.rpc.channels import SERVER_OPTIONS, ChannelPool
from peer.rpc.server import server_credentials
from peer.wire import credit_pb2, credit_pb2_grpc
from talkoot import credit
from talkoot.credit import CreditReader, signed_figures

LIAR = numbered_identity(3)


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def reader(clock: Clock | None = None, mode: Mode = "open") -> CreditReader:
    admission = SwarmAdmission(KEYS)
    admission.learn(numbered_identity(0).public_key, mode)
    return CreditReader(SWARM, admission, ChannelPool(16), ParseGuard(), clock or Clock())


def sign(node: CreditNode, number: int, pairs: int) -> None:
    trainer = numbered_identity(number)
    node.book.note_served(trainer.peer_id, Work(pairs=pairs))
    receipt = sign_receipt(trainer, SWARM, NODE.peer_id, Work(pairs), pairs)
    node.book.take(check_receipt(receipt, SWARM, NODE.peer_id))


def announced(node: CreditNode) -> NodeInfo:
    return replace(node.info, signed=node.book.signed)


def run(loop: LoopThread, scenario: Callable[[CreditNode, CreditReader, Clock], Any]) -> None:
    async def play() -> None:
        clock = Clock()
        reads = reader(clock)
        async with AsyncExitStack() as stack:
            stack.push_async_callback(reads.close)
            await scenario(await stack.enter_async_context(credit_node()), reads, clock)

    loop.run(play(), 120)


def test_what_nodes_have_is_read_and_counted_and_not_read_again(loop: LoopThread) -> None:
    async def scenario(node: CreditNode, reads: CreditReader, clock: Clock) -> None:
        sign(node, 5, 10)
        sign(node, 6, 20)
        asked = []
        whole_page = node.book.page
        node.book.page = lambda offset: asked.append(offset) or whole_page(offset)  # type: ignore[method-assign, func-returns-value]
        for _ in range(3):
            await reads.read([announced(node)], 8, 60.0)
        assert (reads.credit[NODE.peer_id].work, reads.credit[NODE.peer_id].trainers) == (Work(30), 2)
        assert asked == [0]
        sign(node, 5, 15)
        await reads.read([announced(node)], 8, 60.0)  # too soon
        assert asked == [0]
        clock.now += 60.0
        await reads.read([announced(node)], 8, 60.0)
        assert reads.credit[NODE.peer_id].work == Work(35)
        assert asked == [0, 0]

    run(loop, scenario)


def test_a_node_whose_receipts_do_not_count_has_nothing_signed_rather_than_something_unknown(
    loop: LoopThread,
) -> None:
    async def scenario(node: CreditNode, _: CreditReader, clock: Clock) -> None:
        sign(node, 5, 10)
        reads = reader(clock, "token")  # the trainer has no badge, as if its token had been revoked
        await reads.read([announced(node)], 8, 60.0)
        await reads.close()
        figures = signed_figures(announced(node), reads.credit.get(NODE.peer_id))
        assert (figures["signed_pairs"], figures["signed_trainers"]) == (0, 0)

    run(loop, scenario)


def test_all_pages_are_read_up_to_a_bound(loop: LoopThread, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("expert_server.credit.PAGE", 2)
    monkeypatch.setattr(credit, "PAGE", 2)
    monkeypatch.setattr(credit, "MAX_OF_NODE", 4)

    async def scenario(node: CreditNode, reads: CreditReader, clock: Clock) -> None:
        for number in range(5, 10):
            sign(node, number, number)
        await reads.read([announced(node)], 8, 60.0)
        assert reads.credit[NODE.peer_id].work == Work(6 + 7 + 8 + 9)

    run(loop, scenario)


def test_nodes_without_receipts_are_not_asked_and_of_many_some(loop: LoopThread) -> None:
    reads = reader()
    said = SignedWork(Work(1), 1)
    silent = [make_node(peer(number)) for number in range(5)]
    signed = [replace(make_node(peer(10 + number)), signed=said) for number in range(9)]
    due = reads._due([*silent, *signed], 4)
    assert len(due) == 4
    assert {node.peer_id for node in due} <= {node.peer_id for node in signed}
    loop.run(reads.close(), 60)


class Liar(credit_pb2_grpc.CreditServiceServicer):
    """A node that answers as it likes."""

    def __init__(self, answer: Callable[[], Any]) -> None:
        self._answer = answer

    async def List(self, request: Any, context: Any) -> Any:
        answer = self._answer()
        return await answer if asyncio.iscoroutine(answer) else answer


def genuine(number: int, node: Any = NODE.peer_id, pairs: int = 7) -> credit_pb2.SignedReceipt:
    return sign_receipt(numbered_identity(number), SWARM, node, Work(pairs), pairs)


def tampered() -> credit_pb2.SignedReceipt:
    signed = genuine(5, LIAR.peer_id)
    signed.receipt = genuine(5, LIAR.peer_id, 10**9).receipt
    return signed


async def never() -> None:
    await asyncio.sleep(600)


@pytest.mark.parametrize(
    "answer",
    [
        lambda: credit_pb2.ListReply(receipts=[genuine(5)], total=1),  # another node's
        lambda: credit_pb2.ListReply(receipts=[tampered()], total=1),
        lambda: credit_pb2.ListReply(receipts=[sign_receipt(LIAR, SWARM, LIAR.peer_id, Work(9), 9)], total=1),
        lambda: credit_pb2.ListReply(receipts=[credit_pb2.SignedReceipt(receipt=bytes(10**6))], total=1),
        lambda: credit_pb2.ListReply(receipts=[credit_pb2.SignedReceipt()] * 1000, total=2**32 - 1),
        never,
    ],
    ids=["another node's", "changed", "its own", "too large", "too many", "never"],
)
def test_a_node_that_lies_gains_nothing_and_holds_up_nobody(
    loop: LoopThread, answer: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if answer is never:
        monkeypatch.setattr(credit, "_DEADLINE_S", 0.5)

    async def scenario(node: CreditNode, reads: CreditReader, clock: Clock) -> None:
        server = grpc.aio.server(options=SERVER_OPTIONS)
        credit_pb2_grpc.add_CreditServiceServicer_to_server(Liar(answer), server)
        certificate = LIAR.make_certificate()
        port = server.add_secure_port("127.0.0.1:0", server_credentials(LIAR, certificate))
        await server.start()
        lying = replace(
            node.info,
            peer_id=LIAR.peer_id,
            addresses=(type(node.info.addresses[0])(f"127.0.0.1:{port}"),),
            certificate_pem=certificate_pem(certificate, LIAR.peer_id),
            signed=SignedWork(Work(10**12), 500),
        )
        sign(node, 5, 10)
        await reads.read([lying, announced(node)], 8, 60.0)
        while NODE.peer_id not in reads.credit:  # the deadline of a call is short where one hangs
            clock.now += 60.0
            await reads.read([announced(node)], 8, 60.0)
        assert {peer_id for peer_id, found in reads.credit.items() if found.work != Work()} == {NODE.peer_id}
        await server.stop(None)

    run(loop, scenario)
