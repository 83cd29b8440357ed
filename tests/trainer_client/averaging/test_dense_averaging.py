"""Trainers average their dense parts over real sockets."""

import pytest
import torch
from dense_trainers import Play, Square, are_one, ended, identities, play
from test_dense_part import make_model, take_step, trained

from peer.errors import ExpertError, TransferError
from peer.metrics import total
from trainer_client.averaging.dense_part import DenseMerge

__all__ = ["identities", "play"]


def test_one_call_brings_both_together(play: Play) -> None:
    """By the steps since they last met: 30 against 10 at first, half of which counts at most; then 20 against 20."""

    async def scenario(square: Square) -> None:
        one = await square.trainer(trained(make_model(), 1), 30)
        other = await square.trainer(trained(make_model(), 2), 10, reachable=False)
        merge = await square.stepping(other.average_with(square.info(one)), one.part, other.part)
        await square.until(lambda: ended(one, "averaged") == 1, one.part)
        (theirs,) = one.part.take_merges()
        assert merge.share == 0.5
        assert theirs.share == pytest.approx(0.25, rel=0.2), "a few steps more while they waited"
        assert (merge.peer, theirs.peer) == (one.peer_id.to_base58(), other.peer_id.to_base58())
        assert theirs.difference > 0.05
        # now the two have as many behind them, whoever stepped more while they waited
        for part in (one.part, other.part):
            part.replace(part.read().tensors, 50)
        again = await square.stepping(other.average_with(square.info(one)), one.part, other.part)
        assert again.share == pytest.approx(0.5, rel=0.1)
        assert again.difference < 0.5 * merge.difference
        assert total(one.metrics.bytes, direction="sent") == total(other.metrics.bytes, direction="received")

    play(scenario)


def test_who_nobody_reaches_calls_others(play: Play) -> None:
    async def scenario(square: Square) -> None:
        hidden = await square.trainer(trained(make_model(), 1), 10, every=2, reachable=False)
        public = await square.trainer(trained(make_model(), 2), 10, every=2)
        for averaging in (hidden, public):
            square.meeting(averaging)
        # each meeting brings them nearer, the more the fewer steps they take while it goes on
        await square.until(
            lambda: (
                min(ended(hidden, "averaged"), ended(public, "averaged")) >= 3
                and are_one(hidden.part, public.part)
            ),
            hidden.part,
            public.part,
        )
        assert ended(public, "failed") == 0

    play(scenario)


def test_a_search_that_fails_again_and_again_breaks_off_no_meeting(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(square: Square) -> None:
        one = await square.trainer(trained(make_model(), 1), 10, every=1)
        other = await square.trainer(trained(make_model(), 2), 10)
        one.partners = (square.info(other),)

        async def find_partners() -> None:
            raise ValueError("nobody foresaw this")

        monkeypatch.setattr(one, "find_partners", find_partners)
        restarts = square.meeting(one)
        await square.until(lambda: ended(one, "averaged") >= 2 and restarts.total >= 5, one.part, other.part)
        assert restarts.unsteady == ("look for other trainers",)
        assert ended(other, "failed") == 0

    play(scenario)


def test_one_meeting_at_a_time(play: Play) -> None:
    async def scenario(square: Square) -> None:
        one = await square.trainer(make_model(), 10)
        other = await square.trainer(make_model(), 10)
        one.exchange.begin()
        with pytest.raises(ExpertError, match="averages with another"):
            await other.average_with(square.info(one))
        one.exchange.end()
        other.exchange.begin()
        with pytest.raises(ExpertError, match="averages with another"):
            await other.average_with(square.info(one))
        other.exchange.end()
        await square.stepping(other.average_with(square.info(one)), one.part, other.part)

    play(scenario)


def test_who_joins_takes_the_oldest_that_it_reaches(play: Play) -> None:
    async def scenario(square: Square) -> None:
        young = await square.trainer(trained(make_model(), 1), 30)
        old = await square.trainer(trained(make_model(), 2), 70)
        joiner = await square.trainer(make_model(), 0)
        assert await joiner.take_freshest() == 70
        assert joiner.part.age == 70
        for name, tensor in joiner.part.read().tensors.items():
            assert torch.equal(tensor, old.part.read().tensors[name]), "to the bit"
        assert (ended(old, "given"), ended(young, "given")) == (1, 0)
        # nobody is older now
        assert await joiner.take_freshest() is None

    play(scenario)


def test_who_joins_believes_no_age_beyond_what_most_have(play: Play) -> None:
    """Of two it can't tell who lies; of three it can."""

    async def scenario(square: Square) -> None:
        for number, age in enumerate((30, 70, 10**11)):
            await square.trainer(trained(make_model(), number), age)
        joiner = await square.trainer(make_model(), 0)
        taken = await joiner.take_freshest()
        assert taken is not None
        assert 70 <= taken <= 70 + 30_000
        assert joiner.part.age == taken

    play(scenario)


def test_a_claim_of_many_steps_makes_no_trainer_older_than_it_can_be(play: Play) -> None:
    async def scenario(square: Square) -> None:
        liar = await square.trainer(trained(make_model(), 1), 10**11)
        one = await square.trainer(trained(make_model(), 2), 10)
        merge = await square.stepping(one.average_with(square.info(liar)), one.part, liar.part)
        assert merge.share == 0.5
        assert one.part.age < 100_000

    play(scenario)


def test_who_joins_takes_the_next_when_the_oldest_is_gone_or_useless(play: Play) -> None:
    async def scenario(square: Square) -> None:
        gone = await square.trainer(trained(make_model(), 1), 90)
        await gone.close()
        young = await square.trainer(trained(make_model(), 2), 30)
        joiner = await square.trainer(make_model(), 0)
        assert await joiner.take_freshest() == 30
        assert (ended(joiner, "failed"), ended(young, "given")) == (1, 1)
        joiner.part.replace(joiner.part.read().tensors, 0)
        next(young.part.model.parameters()).data.fill_(torch.nan)
        take_step(young.part)
        assert await joiner.take_freshest() is None
        assert joiner.part.read().tensors["0.weight"].isfinite().all()

    play(scenario)


def test_a_trainer_never_meets_itself_nor_one_of_another_form(play: Play) -> None:
    async def scenario(square: Square) -> None:
        one = await square.trainer(make_model(), 10)
        other = await square.trainer(make_model(width=6), 10)
        await one.find_partners()
        assert one.partners == ()
        snapshot = await one.exchange.snapshot()
        with pytest.raises(
            TransferError, match="FAILED_PRECONDITION: this trainer can't average with itself"
        ):
            await one._swap(square.info(one), snapshot)
        with pytest.raises(
            TransferError, match="FAILED_PRECONDITION: this trainer trains another dense part"
        ):
            await one.average_with(square.info(other))

    play(scenario)


def test_merges_are_told_once(play: Play) -> None:
    async def scenario(square: Square) -> None:
        one = await square.trainer(trained(make_model(), 1), 10)
        other = await square.trainer(trained(make_model(), 2), 10)
        await square.stepping(other.average_with(square.info(one)), one.part, other.part)
        told: list[DenseMerge] = other.part.take_merges()
        assert [merge.peer for merge in told] == [one.peer_id.to_base58()]
        assert other.part.take_merges() == []

    play(scenario)
