"""Which receipts a node keeps: the newest of each trainer, within bounds, and across restarts."""

import contextlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from callers import numbered_identity
from cancelled_saves import cancel_while_it_writes
from grpc import StatusCode
from hypothesis import given
from hypothesis import strategies as st
from receipts import histories, peer, receipt

from dht.receipts import PAGE, Receipt, SignedWork, SignerOf, Work, sign_receipt, total_of
from expert_server import credit
from expert_server.credit import SLACK, ReceiptBook, ReceiptFile
from peer.errors import ExpertError, RecordError
from peer.loop import LoopThread
from peer.wire import credit_pb2

SWARM = "sauna-QmFounder"
MUCH = Work(pairs=10**9, queries=10**9)
NODE = numbered_identity(2)


def book(*callers: int, most: int = 512, signer_of: SignerOf = lambda receipt: None) -> ReceiptBook:
    made = ReceiptBook(SWARM, NODE.peer_id, signer_of, most)
    for caller in callers:
        made.note_served(peer(caller), MUCH)
    return made


@given(st.lists(histories(), min_size=1, max_size=4), st.data())
def test_repeated_reordered_and_old_receipts_add_nothing(
    trainers: Sequence[Sequence[Work]], data: st.DataObject
) -> None:
    kept = book(*range(len(trainers)))
    offers = [receipt(number, work) for number, history in enumerate(trainers) for work in history]
    for offer in data.draw(st.lists(st.sampled_from(offers))) + data.draw(st.permutations(offers)):
        kept.take(offer)
        kept.note_served(offer.trainer, MUCH)
    newest = [receipt(number, history[-1]) for number, history in enumerate(trainers)]
    assert kept.signed == total_of(newest)
    assert all(not kept.take(offer) for offer in offers)
    assert kept.signed == total_of(newest)


def without_slack() -> ReceiptBook:
    """A receipt book whose slack is used up."""
    made = book()
    made.note_served(peer(99), Work())
    made.take(receipt(99, Work(pairs=SLACK, queries=SLACK)))
    return made


def test_what_a_node_can_have_done_is_kept_and_more_is_refused() -> None:
    kept, before = without_slack(), SLACK
    kept.note_served(peer(1), Work(pairs=500))
    assert kept.take(receipt(1, Work(pairs=1000)))
    kept.note_served(peer(1), Work(pairs=300, queries=5))
    kept.note_served(peer(2), Work(pairs=10**9, queries=10**9))
    kept.note_served(peer(1), Work(pairs=200))
    for work in (Work(pairs=2001), Work(pairs=2000, queries=11), Work(pairs=10**9)):
        with pytest.raises(ExpertError, match=r"more .* than this node") as caught:
            kept.take(receipt(1, work))
        assert caught.value.status is StatusCode.FAILED_PRECONDITION
    assert kept.signed.work.pairs == before + 1000
    assert kept.take(receipt(1, Work(pairs=2000, queries=10)))


def test_a_node_that_was_killed_takes_what_it_forgot_to_have_done() -> None:
    kept = book()
    for caller in (1, 2):
        kept.note_served(peer(caller), Work(pairs=1000))
    with pytest.raises(ExpertError, match="more pairs"):
        kept.take(receipt(1, Work(pairs=2001 + SLACK)))
    assert kept.take(receipt(1, Work(pairs=1990 + SLACK)))
    # But only once, for all of them together.
    for trainer, pairs in ((1, 2001 + SLACK), (2, 2011)):
        with pytest.raises(ExpertError, match="more pairs"):
            kept.take(receipt(trainer, Work(pairs=pairs)))
    assert kept.take(receipt(2, Work(pairs=2010)))


def test_a_node_that_lost_its_receipts_takes_all_that_it_had_done_anew(
    loop: LoopThread, tmp_path: Path
) -> None:
    kept = without_slack()
    loop.run(ReceiptFile(tmp_path / "receipts", kept).open(Work(pairs=10**9)), 120)
    kept.note_served(peer(1), Work(pairs=1))
    assert kept.take(receipt(1, Work(pairs=10**9)))
    with pytest.raises(ExpertError, match="more pairs"):
        kept.take(receipt(1, Work(pairs=10**9 + 1)))


def test_a_node_that_was_killed_remembers_what_it_had_done_when_it_last_saved(
    loop: LoopThread, tmp_path: Path
) -> None:
    path, before = tmp_path / "receipts", book()
    before.note_served(peer(1), Work(pairs=1000))
    loop.run(ReceiptFile(path, before).save(), 120)
    after = book()
    loop.run(ReceiptFile(path, after).open(), 120)
    after.note_served(peer(99), Work())
    after.take(receipt(99, Work(pairs=SLACK)))  # uses up the slack of this run
    with pytest.raises(ExpertError, match="more pairs"):
        after.take(receipt(1, Work(pairs=2001)))
    assert after.take(receipt(1, Work(pairs=2000)))


def test_what_is_not_signed_yet_fits_into_the_file(loop: LoopThread, tmp_path: Path) -> None:
    path, before = tmp_path / "receipts", book()
    for number in range(2000):
        before.note_served(peer(number), MUCH)
    loop.run(ReceiptFile(path, before).save(), 120)
    after = book()
    loop.run(ReceiptFile(path, after).open(), 120)
    after.require_served(peer(1999))
    with pytest.raises(ExpertError, match="have not called"):
        after.require_served(peer(0))


@pytest.mark.parametrize("caller", [b"", b"nobody", bytes(34)])
def test_a_file_that_names_somebody_who_cannot_be_is_broken(caller: bytes) -> None:
    with pytest.raises(RecordError, match="parsed"):
        book().restore(
            credit_pb2.SavedReceipts(unsigned=[credit_pb2.UnsignedWork(caller=caller)]).SerializeToString()
        )


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 1000), st.integers(0, 10**6)), max_size=20))
def test_nobody_signs_for_more_than_twice_what_was_done(steps: list[tuple[int, int, int]]) -> None:
    """This holds whatever they claim, however often, and with however many keys."""
    kept, done, claimed = book(), 0, Counter[int]()
    for trainer, worked, claims in steps:
        kept.note_served(peer(trainer), Work(pairs=worked))
        done += worked
        claimed[trainer] += claims
        for offer in (claimed[trainer], claimed[trainer] // 2, 2 * worked + 1):
            with contextlib.suppress(ExpertError):
                kept.take(receipt(trainer, Work(pairs=max(1, offer))))
    assert kept.signed.work.pairs <= 2 * done + SLACK


def test_a_trainer_that_never_called_signs_nothing() -> None:
    kept = book(1)
    with pytest.raises(ExpertError, match="not called this node"):
        kept.take(receipt(2, Work(pairs=1)))
    assert kept.signed == SignedWork()


def test_of_too_many_the_one_for_the_least_work_goes() -> None:
    kept = book(*range(5), most=3)
    assert [kept.take(receipt(number, Work(pairs=10 + number))) for number in range(4)] == [True] * 4
    assert not kept.take(receipt(4, Work(pairs=1)))
    assert kept.signed == SignedWork(Work(pairs=11 + 12 + 13), 3)


@pytest.mark.parametrize("is_by_token", [True, False])
def test_many_keys_of_one_token_or_neighbourhood_push_out_their_own(is_by_token: bool) -> None:
    kept = book(*range(50), most=8, signer_of=lambda r: min(r.work.pairs, 4) if is_by_token else None)
    for honest in range(3):  # tokens 1 to 3, and places of their own
        kept.take(receipt(honest, Work(pairs=1 + honest)), near=f"10.0.0.{honest}")
    for number in range(10, 50):
        kept.take(receipt(number, Work(pairs=1000 + number)), near="10.9.9.9")
    assert kept.signed.trainers == 8
    assert kept.signed.work.pairs == (1 + 2 + 3) + sum(1000 + number for number in range(45, 50))


@given(st.integers(0, 100), st.integers(0, 120))
def test_pages_give_every_receipt_once_the_most_work_first(count: int, beyond: int) -> None:
    kept = book(*range(count))
    for number in range(count):
        kept.take(receipt(number, Work(pairs=1 + number)))
    found = [page for offset in range(0, count, PAGE) for page in kept.page(offset).receipts]
    assert [page.receipt for page in found] == [bytes([number]) for number in reversed(range(count))]
    assert kept.page(beyond).total == count
    assert len(kept.page(beyond).receipts) == min(PAGE, max(0, count - beyond))


def test_many_keys_of_one_neighbourhood_do_not_fill_the_first_page() -> None:
    """Dashboards read only the first pages of a node."""
    kept = book(*range(100))
    for number in range(100):
        near = "crowd" if number >= 5 else f"home {number}"
        kept.take(receipt(number, Work(pairs=1 + 1000 * number)), near)
    first = [page.receipt[0] for page in kept.page(0).receipts]
    assert first[:6] == [99, 4, 3, 2, 1, 0]
    assert first[6:] == list(range(98, 98 - PAGE + 6, -1))


def test_what_was_signed_with_a_revoked_token_counts_again_with_another_token(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tokens, revoked = {peer(1): 7, peer(2): 8}, set[int]()

    def signer_of(signed: Receipt) -> int:
        if tokens[signed.trainer] in revoked:
            raise RecordError("the token was revoked")
        return tokens[signed.trainer]

    kept, much = book(signer_of=signer_of), 10 * SLACK
    for trainer in tokens:
        kept.note_served(trainer, Work(pairs=much, queries=2))
    kept.take(receipt(1, Work(pairs=much, queries=2)))
    kept.take(receipt(2, Work(pairs=5)))
    revoked.add(7)
    for _ in range(2):  # a node reads the list of revoked tokens again and again
        kept.note_revoked(revoked)
    assert kept.signed == SignedWork(Work(pairs=5), 1)
    assert list(kept.page(0).receipts) == [receipt(2, Work(pairs=5)).signed]
    (told,) = caplog.messages
    assert "the invites of 1 caller that had signed for 655,360 rows and 2 queries" in told
    tokens[peer(1)] = 9
    kept.note_served(peer(1), Work(pairs=10))
    kept.take(receipt(1, Work(pairs=much + 10, queries=2)))
    kept.note_revoked(revoked)
    assert kept.signed == SignedWork(Work(pairs=much + 15, queries=2), 2)


def test_receipts_outlive_the_node(loop: LoopThread, tmp_path: Path) -> None:
    path, before = tmp_path / "receipts" / SWARM, book()
    for number in (1, 3):
        trainer = numbered_identity(number)
        before.note_served(trainer.peer_id, MUCH)
        signed = sign_receipt(trainer, SWARM, NODE.peer_id, Work(pairs=number, updates=1), 50)
        before.restore(saved(signed))
    before.has_changed = True
    loop.run(ReceiptFile(path, before).save(), 120)
    assert not before.has_changed
    after = book()
    loop.run(ReceiptFile(path, after).open(), 120)
    assert after.signed == before.signed == SignedWork(Work(pairs=4, updates=2), 2)
    assert after.page(0) == before.page(0)


def saved(*signed: credit_pb2.SignedReceipt) -> bytes:
    return credit_pb2.ListReply(receipts=signed).SerializeToString()


@pytest.mark.parametrize("how", ["absent", "nonsense", "another node's", "a folder"])
def test_a_broken_file_counts_as_no_receipts(
    loop: LoopThread, tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "receipts"
    if how == "nonsense":
        path.write_bytes(b"\xff" * 100)
    elif how == "another node's":
        signed = sign_receipt(numbered_identity(1), SWARM, numbered_identity(3).peer_id, Work(pairs=1), 1)
        path.write_bytes(saved(signed))
    elif how == "a folder":
        path.mkdir()
    opened = book()
    loop.run(ReceiptFile(path, opened).open(), 120)
    assert opened.signed == SignedWork()
    assert ("must sign again" in caplog.text) is (how != "absent")


def test_a_disk_that_cannot_be_written_is_a_warning(
    loop: LoopThread, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("a file in the folder's place")
    kept = book(1)
    kept.take(receipt(1, Work(pairs=1)))
    loop.run(ReceiptFile(tmp_path / "file" / "receipts", kept).save(), 120)
    assert "could not write" in caplog.text
    assert kept.has_changed


def test_receipts_that_a_cancelled_save_may_not_have_written_are_saved_by_the_next_one(
    loop: LoopThread, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node that leaves cancels the task that saves, and then saves once more."""
    path, kept = tmp_path / "receipts", book(1)
    kept.take(receipt(1, Work(pairs=1)))

    async def scenario() -> None:
        file = ReceiptFile(path, kept)
        await cancel_while_it_writes(file.save, credit, monkeypatch)
        await file.save()

    loop.run(scenario(), 120)
    assert path.read_bytes() == kept.serialize()
