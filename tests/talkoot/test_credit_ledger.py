"""How receipts are counted: nobody gains by forging, repeating, splitting, reordering or rolling back."""

import asyncio
import random
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
from callers import numbered_identity
from hypothesis import given, settings
from hypothesis import strategies as st
from loop_holds import holds
from receipts import histories, peer

from dht.receipts import MOST, Receipt, Work, sign_receipt
from peer.errors import RecordError
from peer.identity import PeerID
from peer.wire import credit_pb2
from talkoot import credit
from talkoot.credit import MAX_OF_NODE, Credit, CreditLedger

SWARM = "sauna-QmFounder"


class Signed:
    """Receipts of trainers, each with some token. Their signatures are valid if nobody has changed them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, is_open: bool = False) -> None:
        self.ledger = CreditLedger(SWARM, lambda receipt: None if is_open else receipt.signed.badge.grant[0])
        monkeypatch.setattr(credit, "check_receipt", self._check)

    @staticmethod
    def of(
        trainer: int, node: int, work: Work, token: int = 0, all_pairs: int | None = None
    ) -> credit_pb2.SignedReceipt:
        pairs = work.pairs if all_pairs is None else all_pairs
        receipt = credit_pb2.Receipt(
            trainer=peer(trainer).to_bytes(), node=peer(node).to_bytes(), work=work.message(), all_pairs=pairs
        )
        signed = credit_pb2.SignedReceipt(receipt=receipt.SerializeToString())
        signed.badge.grant = bytes([token])
        return signed

    def take(self, node: PeerID, given: Iterable[credit_pb2.SignedReceipt]) -> None:
        asyncio.run(self.ledger.take(node, given))

    @staticmethod
    def _check(signed: credit_pb2.SignedReceipt, swarm_id: str, node: PeerID) -> Receipt:
        receipt = credit_pb2.Receipt.FromString(signed.receipt)
        if receipt.node != node.to_bytes():
            raise RecordError("the receipt is for another node")
        return Receipt(PeerID(receipt.trainer), Work.of(receipt.work), receipt.all_pairs, None, signed)


def share(counted: Mapping[PeerID, Credit], *nodes: int) -> float:
    found = [counted[peer(node)].share for node in nodes if peer(node) in counted]
    return sum(each for each in found if each is not None)


@pytest.fixture(scope="module")
def patch() -> object:
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield monkeypatch


def test_receipts_of_many_signatures_do_not_hold_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    signed = Signed(monkeypatch)

    def check(*given: Any) -> Receipt:
        until = time.thread_time() + 0.0005
        while time.thread_time() < until:
            pass
        return Signed._check(*given)

    monkeypatch.setattr(credit, "check_receipt", check)
    receipts = [Signed.of(number, 0, Work(1)) for number in range(1, MAX_OF_NODE + 1)]
    longest_s, whole_s = asyncio.run(holds(signed.ledger.take(peer(0), receipts)))
    assert len(signed.ledger) == MAX_OF_NODE
    assert longest_s < whole_s / 3


def test_real_signatures_are_verified_and_forged_ones_do_not_count() -> None:
    trainer, node, other = (numbered_identity(number) for number in (1, 2, 3))
    ledger = CreditLedger(SWARM, lambda receipt: None)
    good = sign_receipt(trainer, SWARM, node.peer_id, Work(10, 2), 10)
    forged = credit_pb2.SignedReceipt.FromString(good.SerializeToString())
    forged.receipt = sign_receipt(trainer, SWARM, node.peer_id, Work(1000, 2), 1000).receipt
    for peer_id, receipts in ((node.peer_id, [forged, good, good]), (other.peer_id, [good])):
        asyncio.run(ledger.take(peer_id, receipts))
    counted = ledger.count()
    assert counted == {node.peer_id: Credit(Work(10, 2), 1, ((trainer.peer_id, Work(10, 2)),), None)}


@given(st.lists(histories(3), min_size=1, max_size=4), st.data())
def test_repeating_reordering_and_rolling_back_change_nothing(
    patch: pytest.MonkeyPatch, trainers: Sequence[Sequence[Work]], data: st.DataObject
) -> None:
    signed = Signed(patch, is_open=True)
    offers = [Signed.of(number, 9, work) for number, history in enumerate(trainers) for work in history]
    for offer in data.draw(st.lists(st.sampled_from(offers))) + data.draw(st.permutations(offers)):
        signed.take(peer(9), [offer])
    expected = Work()
    for history in trainers:
        expected += history[-1]
    before = signed.ledger.count()[peer(9)]
    assert (before.work, before.trainers) == (expected, len(trainers))
    signed.take(peer(9), offers[:1])  # all that is left to a node that lost the newer ones
    assert signed.ledger.count()[peer(9)] == before


@given(st.integers(1, 8), st.integers(1, 8), st.data())
def test_a_coalition_moves_no_more_votes_than_it_has(
    patch: pytest.MonkeyPatch, honest: int, colluding: int, data: st.DataObject
) -> None:
    """This holds whatever the colluding tokens sign, with however many keys, for however many nodes."""
    signed = Signed(patch)
    for token in range(honest):
        pairs = data.draw(st.lists(st.integers(1, 1000), min_size=3, max_size=3))
        for node, some in enumerate(pairs):
            receipt = Signed.of(token, node, Work(some), token, all_pairs=sum(pairs))
            signed.take(peer(node), [receipt])
    accomplices = range(10, 14)
    for number in range(data.draw(st.integers(1, 12))):
        token = honest + data.draw(st.integers(0, colluding - 1))
        node = data.draw(st.sampled_from(accomplices))
        work = data.draw(st.integers(1, MOST))
        claimed = data.draw(st.integers(work, MOST))
        signed.take(peer(node), [Signed.of(100 + number, node, Work(work), token, all_pairs=claimed)])
    counted = signed.ledger.count()
    assert share(counted, *accomplices) <= colluding / (honest + colluding) + 1e-9
    assert share(counted, *accomplices, *range(3)) <= 1 + 1e-9
    # Once the founder has revoked their tokens, they move nothing.
    honest_alone = signed.ledger.count(range(honest, honest + colluding))
    assert not honest_alone.keys() & {peer(node) for node in accomplices}
    assert share(honest_alone, *range(3)) == pytest.approx(1.0)


@given(st.integers(1, 10**6), st.integers(2, 20), st.booleans())
def test_splitting_into_keys_gains_nothing(
    patch: pytest.MonkeyPatch, pairs: int, parts: int, splits_node: bool
) -> None:
    """A trainer with one token works for one node, next to an honest pair."""

    def total(parts: int) -> float:
        signed = Signed(patch)
        signed.take(peer(0), [Signed.of(1, 0, Work(500), 1)])
        for part in range(parts):
            node = 10 + part if splits_node else 10
            trainer = 2 if splits_node else 100 + part
            receipt = Signed.of(
                trainer, node, Work(pairs), 2, all_pairs=parts * pairs if splits_node else pairs
            )
            signed.take(peer(node), [receipt])
        return share(signed.ledger.count(), *range(10, 10 + parts))

    assert total(1) == pytest.approx(0.5)
    assert total(parts) <= 0.5 + 1e-9


def test_a_share_is_of_all_work_of_a_token_read_or_not(patch: pytest.MonkeyPatch) -> None:
    signed = Signed(patch)
    signed.take(peer(0), [Signed.of(1, 0, Work(100), 1, all_pairs=400)])
    assert signed.ledger.count()[peer(0)].share == 0.25


def test_in_an_open_swarm_there_is_no_share(patch: pytest.MonkeyPatch) -> None:
    signed = Signed(patch, is_open=True)
    signed.take(peer(0), [Signed.of(1, 0, Work(100))])
    assert signed.ledger.count()[peer(0)].share is None


def test_what_a_node_lost_stays_counted_and_goes_on(patch: pytest.MonkeyPatch) -> None:
    signed = Signed(patch, is_open=True)
    signed.take(peer(0), [Signed.of(1, 0, Work(100)), Signed.of(2, 0, Work(50))])
    signed.take(peer(0), [])
    assert signed.ledger.count()[peer(0)].work.pairs == 150
    signed.take(peer(0), [Signed.of(1, 0, Work(120))])
    assert signed.ledger.count()[peer(0)].work.pairs == 170


def test_memory_is_bounded_whatever_nodes_give(patch: pytest.MonkeyPatch) -> None:
    signed = Signed(patch, is_open=True)
    signed.ledger = CreditLedger(SWARM, lambda receipt: None, most=2 * MAX_OF_NODE)
    for node in range(4):
        receipts = [Signed.of(trainer, node, Work(1 + trainer)) for trainer in range(200)]
        random.Random(node).shuffle(receipts)
        signed.take(peer(node), receipts)
        assert len(signed.ledger) <= 2 * MAX_OF_NODE
    counted = signed.ledger.count()
    assert counted.keys() == {peer(2), peer(3)}  # those read longest ago have gone
    assert counted[peer(3)].work.pairs == sum(range(201 - MAX_OF_NODE, 201))
    # A node that was forgotten is counted again when it is read again.
    signed.take(peer(0), [Signed.of(1, 0, Work(5))])
    assert signed.ledger.count()[peer(0)].work.pairs == 5


def test_a_node_of_which_no_receipt_counts_takes_no_memory(patch: pytest.MonkeyPatch) -> None:
    """A stranger may come with new nodes again and again."""
    signed = Signed(patch)
    for node in range(100):
        signed.take(peer(node), [Signed.of(1, node + 1, Work(5))] if node % 2 else [])
    assert not signed.ledger._nodes


def test_many_keys_of_one_token_push_out_no_other_tokens_votes(patch: pytest.MonkeyPatch) -> None:
    signed = Signed(patch)
    honest = [Signed.of(token, 0, Work(100), token) for token in range(3)]
    flood = [Signed.of(100 + key, 0, Work(10**6 + key), 9) for key in range(2 * MAX_OF_NODE)]
    signed.take(peer(0), [*honest, *flood])
    assert len(signed.ledger) == MAX_OF_NODE
    assert share(signed.ledger.count([9]), 0) == pytest.approx(1.0)
    assert signed.ledger.count([9])[peer(0)].work == Work(300)


def test_new_keys_again_and_again_push_out_nobody_whom_the_node_still_lists(
    patch: pytest.MonkeyPatch,
) -> None:
    signed = Signed(patch, is_open=True)
    honest = [Signed.of(trainer, 0, Work(100)) for trainer in range(3)]
    for turn in range(1, 4):
        flood = [Signed.of(1000 * turn + key, 0, Work(10**6)) for key in range(MAX_OF_NODE - len(honest))]
        signed.take(peer(0), [*honest, *flood])
    assert signed.ledger.count()[peer(0)].work == Work(300 + 10**6 * (MAX_OF_NODE - 3))


@settings(max_examples=20)
@given(st.permutations(list(range(6))))
def test_the_order_in_which_nodes_are_read_changes_nothing(
    patch: pytest.MonkeyPatch, order: list[int]
) -> None:
    signed = Signed(patch)
    for node in order:
        signed.take(
            peer(node),
            [Signed.of(trainer, node, Work(1 + node + trainer), trainer % 2) for trainer in range(4)],
        )
    counted = signed.ledger.count()
    assert share(counted, *range(6)) == pytest.approx(1.0)
    assert {node: replace(each, share=None) for node, each in counted.items()} == {
        peer(node): Credit(
            Work(sum(1 + node + trainer for trainer in range(4))),
            4,
            tuple((peer(trainer), Work(1 + node + trainer)) for trainer in reversed(range(4))),
            None,
        )
        for node in range(6)
    }
