"""Receipts over real connections, from trainers that sign nothing, nonsense, old totals, too much or too often."""

import asyncio
from typing import Any
from unittest.mock import Mock

import grpc
import pytest
from callers import numbered_identity
from credit_node import NODE, SERVED, SWARM, CreditNode, credit_node
from grpc import StatusCode

from dht.receipts import PAGE, SignedWork, Work, check_receipt, sign_receipt
from expert_server import credit
from peer import PROTOCOL_VERSION
from peer.identity import RECORD_DOMAIN, PeerID, verify
from peer.loop import LoopThread
from peer.metrics import totals
from peer.wire import credit_pb2, session_pb2

TRAINER, OTHER = numbered_identity(5), numbered_identity(6)
WORK = Work(pairs=100, updates=20)


def signed(
    work: Work = WORK, swarm: str = SWARM, node: PeerID = NODE.peer_id, identity: Any = TRAINER
) -> credit_pb2.SignedReceipt:
    return sign_receipt(identity, swarm, node, work, work.pairs)


async def refusal(stub: Any, receipt: credit_pb2.SignedReceipt) -> tuple[StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Give(receipt, timeout=60)
    return caught.value.code(), caught.value.details() or ""


def in_node(loop: LoopThread, scenario: Any, **options: bool) -> None:
    async def run() -> None:
        async with credit_node(**options) as node:
            await scenario(node)

    loop.run(run(), 120)


def test_the_newest_receipt_is_kept_and_given_to_anybody(loop: LoopThread) -> None:
    async def scenario(node: CreditNode) -> None:
        node.book.note_served(TRAINER.peer_id, SERVED)
        stub = await node.stub(TRAINER)
        assert (await stub.Give(signed())).kept
        assert (await stub.Give(signed(WORK + WORK))).kept
        assert not (await stub.Give(signed())).kept
        stranger = await node.stub()
        reply = await stranger.List(
            credit_pb2.ListRequest(protocol_version=PROTOCOL_VERSION, swarm_id=SWARM), timeout=60
        )
        assert reply.total == 1
        (receipt,) = reply.receipts
        assert check_receipt(receipt, SWARM, NODE.peer_id).work == WORK + WORK
        assert node.book.signed == SignedWork(WORK + WORK, 1)
        assert node.servicer is not None
        assert totals(node.servicer.outcomes, "outcome") == {"kept": 2, "old": 1, "refused": 0}

    in_node(loop, scenario)


def test_what_no_honest_trainer_gives_is_refused_and_leaves_nothing(
    loop: LoopThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(credit, "_GIVEN_AT_ONCE", 64)
    unsigned = signed()
    unsigned.signature = b""
    for_a_record = signed()
    for_a_record.signature = TRAINER.sign(for_a_record.receipt, RECORD_DOMAIN)
    wrong = [
        credit_pb2.SignedReceipt(),
        credit_pb2.SignedReceipt(receipt=b"\xff\xff"),
        credit_pb2.SignedReceipt(receipt=bytes(100_000)),
        unsigned,
        for_a_record,
        signed(Work()),
        signed(Work(pairs=2**63)),
        signed(Work(pairs=1, updates=2)),
        signed(swarm="other-QmFounder"),
        signed(node=OTHER.peer_id),
        signed(identity=OTHER),
    ]

    async def scenario(node: CreditNode) -> None:
        stub = await node.stub(TRAINER)
        code, said = await refusal(stub, signed())
        assert code is StatusCode.FAILED_PRECONDITION
        assert "not called" in said
        node.book.note_served(TRAINER.peer_id, SERVED)
        node.book.note_served(OTHER.peer_id, SERVED)
        for receipt in wrong:
            assert (await refusal(stub, receipt))[0] is StatusCode.INVALID_ARGUMENT
        code, said = await refusal(stub, signed(Work(pairs=10**6)))
        assert code is StatusCode.FAILED_PRECONDITION
        assert "more pairs than this node" in said
        assert node.book.signed == SignedWork()
        assert (await stub.Give(signed())).kept  # it is as good as any

    in_node(loop, scenario)


def test_no_signature_is_checked_for_who_has_not_called(
    loop: LoopThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = Mock(wraps=verify)
    monkeypatch.setattr("dht.receipts.verify", checked)

    async def scenario(node: CreditNode) -> None:
        stub = await node.stub(TRAINER)
        assert (await refusal(stub, signed()))[0] is StatusCode.FAILED_PRECONDITION
        assert not checked.called
        node.book.note_served(TRAINER.peer_id, SERVED)
        assert (await stub.Give(signed())).kept
        assert checked.call_count == 1

    in_node(loop, scenario)


def test_who_gives_receipts_too_often_must_wait(loop: LoopThread) -> None:
    async def scenario(node: CreditNode) -> None:
        for trainer in (TRAINER, OTHER):
            node.book.note_served(trainer.peer_id, SERVED)
        stub = await node.stub(TRAINER)
        receipts = [signed(Work(pairs=number)) for number in range(1, 9)]
        given = await asyncio.gather(
            *(stub.Give(receipt, timeout=60) for receipt in receipts), return_exceptions=True
        )
        refused = [error for error in given if isinstance(error, grpc.aio.AioRpcError)]
        assert refused
        assert {error.code() for error in refused} == {StatusCode.RESOURCE_EXHAUSTED}
        # Another trainer's turn is independent of that.
        assert (await (await node.stub(OTHER)).Give(signed(identity=OTHER))).kept

    in_node(loop, scenario)


def test_without_the_right_session_nothing_is_taken(loop: LoopThread) -> None:
    async def scenario(node: CreditNode) -> None:
        node.book.note_served(TRAINER.peer_id, SERVED)
        assert (await refusal(await node.stub(), signed()))[0] is StatusCode.UNAUTHENTICATED
        stub = await node.stub(TRAINER, [session_pb2.RIGHT_DHT])
        assert (await refusal(stub, signed()))[0] is StatusCode.PERMISSION_DENIED
        searcher = await node.stub(TRAINER, [session_pb2.RIGHT_MEMORY])
        assert (await searcher.Give(signed(Work(queries=5)))).kept

    in_node(loop, scenario)


def test_lists_are_paged_and_of_this_swarm(loop: LoopThread) -> None:
    async def scenario(node: CreditNode) -> None:
        for number in range(PAGE + 3):
            trainer = numbered_identity(10 + number % 4)
            node.book.note_served(trainer.peer_id, SERVED)
            node.book.take(
                check_receipt(signed(Work(pairs=number + 1), identity=trainer), SWARM, NODE.peer_id)
            )
        stub = await node.stub()

        async def page(offset: int, swarm: str = SWARM) -> credit_pb2.ListReply:
            reply: credit_pb2.ListReply = await stub.List(
                credit_pb2.ListRequest(protocol_version=PROTOCOL_VERSION, swarm_id=swarm, offset=offset),
                timeout=60,
            )
            return reply

        assert [len((await page(offset)).receipts) for offset in (0, 3, 4, 2**32 - 1)] == [4, 1, 0, 0]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await page(0, "other-QmFounder")
        assert caught.value.code() is StatusCode.FAILED_PRECONDITION

    in_node(loop, scenario)
