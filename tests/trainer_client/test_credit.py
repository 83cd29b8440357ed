"""A trainer signs for what nodes have done: all of it, once a period, across all its runs."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from callers import numbered_identity
from cancelled_saves import cancel_while_it_writes
from credit_node import NODE, SERVED, SWARM, CreditNode, credit_node
from expert_fakes import make_node
from hypothesis import given
from hypothesis import strategies as st
from receipts import peer, works

from dht.admission import SwarmAdmission
from dht.receipts import SignedWork, Work
from dht.records import SwarmKeys
from peer.loop import LoopThread
from peer.metrics import totals
from trainer_client import credit
from trainer_client.credit import CreditAccounts, ReceiptSender

TRAINER = numbered_identity(5)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def sender(node: CreditNode, accounts: CreditAccounts, clock: Clock) -> ReceiptSender:
    admission = SwarmAdmission(SwarmKeys("sauna", numbered_identity(0).peer_id))
    return ReceiptSender(
        accounts, TRAINER, SWARM, admission, node.channels, node.sessions(TRAINER), every_s=60.0, clock=clock
    )


def in_node(loop: LoopThread, scenario: Any, **options: bool) -> None:
    async def run() -> None:
        async with credit_node(**options) as node:
            node.book.note_served(TRAINER.peer_id, SERVED)
            await scenario(node)

    loop.run(run(), 120)


def test_what_is_new_is_signed_once_a_period(loop: LoopThread) -> None:
    async def scenario(node: CreditNode) -> None:
        accounts, clock = CreditAccounts(), Clock()
        signs = sender(node, accounts, clock)
        assert await signs.give(clock.now - 60.0, 60.0) == 0
        accounts.note(node.info, pairs=10, updates=2)
        assert await signs.give(clock.now - 60.0, 60.0) == 1
        assert node.book.signed == SignedWork(Work(10, 2), 1)
        accounts.note(node.info, pairs=5, queries=1, checks_passed=1)
        assert await signs.give(clock.now - 60.0, 60.0) == 0
        clock.now += 60.0
        assert await signs.give(clock.now - 60.0, 60.0) == 1
        assert node.book.signed == SignedWork(Work(15, 2, 1, 1), 1)
        clock.now += 60.0
        assert await signs.give(clock.now - 60.0, 60.0) == 0  # nothing is new
        accounts.note(node.info, checks_failed=1)
        await signs.close()
        assert node.book.signed == SignedWork(Work(15, 2, 1, 1, 1), 1)
        assert totals(signs.outcomes, "outcome") == {"given": 3, "failed": 0}

    in_node(loop, scenario)


def test_a_node_that_lost_its_receipts_gets_all_back_with_the_next(loop: LoopThread) -> None:
    async def scenario(node: CreditNode) -> None:
        accounts, clock = CreditAccounts(), Clock()
        signs = sender(node, accounts, clock)
        accounts.note(node.info, pairs=1000)
        await signs.give(clock.now, 60.0)
        node.book.__init__(SWARM, NODE.peer_id)  # type: ignore[misc]  # as after a start without the file
        node.book.note_served(TRAINER.peer_id, SERVED)
        accounts.note(node.info, pairs=1)
        await signs.give(clock.now, 60.0)
        assert node.book.signed.work.pairs == 1001

    in_node(loop, scenario)


def test_a_node_of_an_older_release_is_asked_once(loop: LoopThread) -> None:
    async def scenario(node: CreditNode) -> None:
        accounts, clock = CreditAccounts(), Clock()
        signs = sender(node, accounts, clock)
        accounts.note(node.info, pairs=10)
        assert await signs.give(clock.now, 60.0) == 1
        assert await signs.give(clock.now, 60.0) == 0
        assert totals(signs.outcomes, "outcome") == {"given": 0, "failed": 1}

    in_node(loop, scenario, knows_receipts=False)


def test_a_node_that_refuses_or_is_gone_is_asked_again_a_period_later(loop: LoopThread) -> None:
    async def scenario(node: CreditNode) -> None:
        accounts, clock = CreditAccounts(), Clock()
        signs = sender(node, accounts, clock)
        accounts.note(node.info, pairs=10**6)
        accounts.note(make_node(peer(9)), pairs=1)
        assert await signs.give(clock.now - 60.0, 0.5) == 2
        assert await signs.give(clock.now - 60.0, 0.5) == 0
        clock.now += 60.0
        node.book.note_served(TRAINER.peer_id, Work(pairs=10**6))
        assert await signs.give(clock.now - 60.0, 60.0) == 2
        assert node.book.signed.work.pairs == 10**6

    in_node(loop, scenario)


@given(st.lists(st.tuples(st.integers(0, 5), works()), max_size=20))
def test_totals_only_grow_and_all_pairs_are_those_of_all_nodes(done: list[tuple[int, Work]]) -> None:
    accounts, expected = CreditAccounts(), dict[int, Work]()
    for number, work in done:
        accounts.note(
            make_node(peer(number)), pairs=work.pairs, updates=work.updates, queries=work.queries,
            checks_passed=work.checks_passed, checks_failed=work.checks_failed,
        )  # fmt: skip
        expected[number] = expected.get(number, Work()) + work
    asyncio.run(accounts.save())
    due = {node.peer_id: account.saved for node, account in accounts.due(1e9)}
    assert due == {peer(number): work for number, work in expected.items()}
    assert accounts.all_pairs == sum(work.pairs for work in expected.values())


def test_accounts_outlive_the_run(loop: LoopThread, tmp_path: Path) -> None:
    path = tmp_path / "credit" / "sauna.json"

    async def scenario() -> None:
        before = CreditAccounts(path)
        await before.open()
        before.note(make_node(peer(1)), pairs=10, updates=2, queries=3, checks_passed=1, checks_failed=1)
        before.note(make_node(peer(2)), pairs=5)
        await before.save()
        after = CreditAccounts(path)
        await after.open()
        assert after.all_pairs == 15
        assert not list(after.due(1e9))  # it was signed, or will be when it works again
        after.note(make_node(peer(1)), pairs=1)
        assert not list(after.due(1e9))  # a receipt says no more than the file
        await after.save()
        after.note(make_node(peer(1)), pairs=100)
        assert [account.saved for _, account in after.due(1e9)] == [Work(11, 2, 3, 1, 1)]

    loop.run(scenario(), 120)


def test_what_could_not_be_saved_is_not_signed(loop: LoopThread, tmp_path: Path) -> None:
    """Otherwise a trainer that is killed would continue below what it has signed, and its receipts would be out of
    date.
    """
    folder = tmp_path / "credit"
    folder.write_text("in the way")

    async def scenario() -> None:
        accounts = CreditAccounts(folder / "sauna.json")
        accounts.note(make_node(peer(1)), pairs=10)
        await accounts.save()
        assert not list(accounts.due(1e9))
        folder.unlink()
        await accounts.save()
        assert [account.saved.pairs for _, account in accounts.due(1e9)] == [10]

    loop.run(scenario(), 120)


def test_what_a_cancelled_save_may_not_have_written_is_saved_before_it_is_signed(
    loop: LoopThread, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trainer that leaves cancels the task that saves, and then signs for the rest."""

    async def scenario() -> None:
        accounts = CreditAccounts(tmp_path / "sauna.json")
        accounts.note(make_node(peer(1)), pairs=10)
        await cancel_while_it_writes(accounts.save, credit, monkeypatch)
        with monkeypatch.context() as patch:
            patch.setattr(credit, "write_state_file", lambda *_: False)
            await accounts.save()
            assert not list(accounts.due(1e9))
        await accounts.save()
        assert [account.saved.pairs for _, account in accounts.due(1e9)] == [10]

    loop.run(scenario(), 120)


@pytest.mark.parametrize(
    "broken",
    [b"", b"{", b'{"all_pairs": -1, "nodes": {}}', b'{"all_pairs": 1, "nodes": {"Qm": [1]}}', b"\xff" * 9,
     b'{"all_pairs": 1, "nodes": {"0OIl": [1,1,1,1,1]}}', b'{"all_pairs": 1e400, "nodes": {}}'],
)  # fmt: skip
def test_a_broken_file_is_counted_anew(
    loop: LoopThread, tmp_path: Path, broken: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "credit.json").write_bytes(broken)
    accounts = CreditAccounts(tmp_path / "credit.json")
    loop.run(accounts.open(), 120)
    assert accounts.all_pairs == 0
    assert "counted from 0 again" in caplog.text


def test_so_many_nodes_are_remembered(
    loop: LoopThread, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(credit, "MAX_NODES", 3)
    accounts = CreditAccounts()
    for number in range(5):
        accounts.note(make_node(peer(number)), pairs=1)
    loop.run(accounts.save(), 120)
    assert {node.peer_id for node, _ in accounts.due(1e9)} == {peer(number) for number in range(2, 5)}
    assert accounts.all_pairs == 5


def test_a_leaving_trainer_waits_for_nobody_long(loop: LoopThread, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(credit, "_FAREWELL_S", 0.2)

    async def scenario(node: CreditNode) -> None:
        accounts, clock = CreditAccounts(), Clock()
        for number in range(100):
            accounts.note(make_node(peer(number)), pairs=1)
        async with asyncio.timeout(60):
            await sender(node, accounts, clock).close()

    in_node(loop, scenario)
