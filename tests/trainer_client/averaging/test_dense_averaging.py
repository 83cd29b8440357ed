"""Trainers average their dense parts over real sockets."""

import contextlib
import threading
import time
from collections.abc import Callable

import pytest
import torch
from dense_trainers import Play, Square, are_one, ended, identities, play
from test_dense_part import make_model, take_step, trained
from torch import Tensor, nn

from peer.clipping import Tensors
from peer.errors import ExpertError, StateError, TransferError
from peer.metrics import total
from trainer_client.averaging.averager import Averaging
from trainer_client.averaging.dense_part import DenseMerge, PeerDensePart, SharedParameters
from trainer_client.averaging.exchange import OWN

__all__ = ["identities", "play"]


HOSTILE: dict[str, Callable[[nn.Module], nn.Module]] = {
    "random": lambda model: trained(model, 9, scale=0.5),
    "the first parameters flipped": lambda model: changed(model, Tensor.neg),
    "scaled": lambda model: changed(model, lambda tensor: 2 * tensor),
    "drifted": lambda model: changed(model, lambda tensor: tensor + 0.5),
}


def changed(model: nn.Module, change: Callable[[Tensor], Tensor]) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(change(parameter))
    return model


def test_one_call_brings_both_together(play: Play) -> None:
    """Weights follow the steps since the last meeting: 30 and 10 at first, of which at most half counts."""

    async def scenario(square: Square) -> None:
        one = await square.trainer(trained(make_model(), 1), 30, every=1)
        other = await square.trainer(trained(make_model(), 2), 10, reachable=False)
        merge = await square.stepping(other.average_with(square.info(one)), one.part, other.part)
        await square.until(lambda: ended(one, "averaged") == 1, one.part)
        (theirs,) = one.part.take_merges()
        assert merge.share == 0.5
        mine, others = one.part.steps, other.part.steps  # while they waited
        assert 10 / (40 + mine) <= theirs.share <= (10 + others) / (40 + others)
        assert (merge.peer, theirs.peer) == (one.peer_id.to_base58(), other.peer_id.to_base58())
        assert theirs.difference > 0.05
        again = await square.stepping(other.average_with(square.info(one)), one.part, other.part)
        assert again.difference < 0.5 * merge.difference
        assert total(one.metrics.bytes, direction="sent") == total(other.metrics.bytes, direction="received")

    play(scenario)


def test_who_nobody_reaches_calls_others(play: Play) -> None:
    async def scenario(square: Square) -> None:
        hidden = await square.trainer(trained(make_model(), 1), 10, every=2, reachable=False)
        public = await square.trainer(trained(make_model(), 2), 10, every=2)
        for averaging in (hidden, public):
            square.meeting(averaging)
        # Each meeting brings them nearer, more so if they take fewer steps meanwhile.
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
        await square.until(
            lambda: ended(one, "averaged") >= 2 and total(restarts.count) >= 5, one.part, other.part
        )
        assert restarts.unsteady == ("look for other trainers",)
        assert ended(other, "failed") == 0

    play(scenario)


def test_one_meeting_at_a_time(play: Play) -> None:
    async def scenario(square: Square) -> None:
        one = await square.trainer(make_model(), 10)
        other = await square.trainer(make_model(), 10)
        for busy in (one, other):
            holder = busy.exchange.place.take(OWN, pytest.fail, time.monotonic())
            with pytest.raises(ExpertError, match="is averaging with another"):
                await other.average_with(square.info(one))
            busy.exchange.end(holder)
        await square.stepping(other.average_with(square.info(one)), one.part, other.part)

    play(scenario)


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_partner_moves_no_tensor_further_than_own_steps_did(
    play: Play, change: Callable[[nn.Module], nn.Module]
) -> None:
    """Or the partner is refused. Either way its claim of many steps makes nobody's age grow that much."""

    async def scenario(square: Square) -> None:
        victim = await square.trainer(trained(make_model(), 1), 10)
        villain = await square.trainer(change(make_model()), 10**9)
        villain.exchange._open = lambda mine, *_: PeerDensePart(mine.tensors, 0, 0.0, {})  # type: ignore[method-assign]  # takes all
        start, before = make_model().state_dict(), victim.part.read().tensors
        with contextlib.suppress(StateError):
            await square.stepping(victim.average_with(square.info(villain)), victim.part)
        for name, tensor in victim.part.read().tensors.items():
            own = float((before[name] - start[name]).norm())
            assert float((tensor - before[name]).norm()) <= 1.001 * own
        assert victim.part.age < 10 + victim.part.steps + 1000

    play(scenario)


def test_one_that_is_behind_learns_from_one_that_it_is_too_far_away_for(play: Play) -> None:
    async def scenario(square: Square) -> None:
        ahead = await square.trainer(trained(make_model(), 1, scale=0.001), 50)
        behind = await square.trainer(trained(make_model(), 2), 10, reachable=False)
        before = ahead.part.read().tensors
        merge = await square.stepping(behind.average_with(square.info(ahead)), behind.part)
        assert merge.belief > 0.5
        await square.until(lambda: ended(ahead, "refused") == 1)
        assert all(torch.equal(t, before[name]) for name, t in ahead.part.read().tensors.items())

    play(scenario)


def test_who_joins_takes_what_the_only_other_gives(play: Play) -> None:
    async def scenario(square: Square) -> None:
        old = await square.trainer(trained(make_model(), 2), 70)
        joiner = await square.trainer(make_model(), 0)
        assert await joiner.take_whole() == 70
        assert joiner.part.age == 70
        assert are_same(joiner, old)
        assert ended(old, "given") == 1
        # Nobody's age has grown.
        assert await joiner.take_whole() is None

    play(scenario)


def test_who_joins_adopts_parameters_beside_the_event_loop(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a large model, copying and measuring them takes a second."""
    threads = list[threading.Thread]()
    replace = SharedParameters.replace

    def noted(part: SharedParameters, tensors: Tensors, age: int) -> None:
        threads.append(threading.current_thread())
        replace(part, tensors, age)

    monkeypatch.setattr(SharedParameters, "replace", noted)

    async def scenario(square: Square) -> None:
        await square.trainer(trained(make_model(), 2), 70)
        joiner = await square.trainer(make_model(), 0)
        assert await joiner.take_whole() == 70
        assert len(threads) == 1
        assert threads[0] is not threading.current_thread()

    play(scenario)


@pytest.mark.parametrize("honest", [1, 2])
@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_who_joins_takes_no_hostile_dense_part_whatever_age_it_claims(
    play: Play, change: Callable[[nn.Module], nn.Module], honest: int
) -> None:
    """Of three dense parts, two are nearer to each other; of two, one is nearer to the common initial parameters."""

    async def scenario(square: Square) -> None:
        others = [await square.trainer(trained(make_model(), n), 70 + n) for n in range(honest)]
        await square.trainer(change(make_model()), 10**11)
        joiner = await square.trainer(make_model(), 0)
        assert await joiner.take_whole() in range(70, 70 + honest), "the middle claim, of two the lower"
        assert sum(are_same(joiner, other) for other in others) == 1

    play(scenario)


def test_those_who_join_at_the_same_time_take_what_an_old_trainer_gives(play: Play) -> None:
    async def scenario(square: Square) -> None:
        old = await square.trainer(trained(make_model(), 2), 70)
        joiners = [await square.trainer(make_model(), 0) for _ in range(3)]
        for joiner in joiners:
            assert await joiner.take_whole() == 70
            assert are_same(joiner, old)

    play(scenario)


def test_who_resumes_keeps_its_own_if_only_one_of_three_is_older(play: Play) -> None:
    async def scenario(square: Square) -> None:
        for number, age in enumerate((30, 70, 10**11)):
            await square.trainer(trained(make_model(), number), age)
        joiner = await square.trainer(trained(make_model(), 4), 80)
        assert await joiner.take_whole() is None
        assert joiner.part.age == 80

    play(scenario)


@pytest.mark.parametrize(("age", "taken"), [(500, 1000), (950, None)])
def test_who_resumes_takes_anothers_only_if_it_is_far_behind(play: Play, age: int, taken: int | None) -> None:
    async def scenario(square: Square) -> None:
        await square.trainer(trained(make_model(), 1), 1000)
        joiner = await square.trainer(trained(make_model(), 2), age)
        assert await joiner.take_whole() == taken

    play(scenario)


def are_same(one: Averaging, other: Averaging) -> bool:
    """Whether all bits are the same."""
    theirs = other.part.read().tensors
    return all(torch.equal(tensor, theirs[name]) for name, tensor in one.part.read().tensors.items())


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
        assert await joiner.take_whole() == 30
        assert (ended(joiner, "failed"), ended(young, "given")) == (1, 1)
        joiner.part.replace(joiner.part.read().tensors, 0)
        next(young.part.model.parameters()).data.fill_(torch.nan)
        take_step(young.part)
        kept = young.exchange._snapshots.in_memory
        await square.until(lambda: all(each.fresh_until <= time.monotonic() for each in kept))
        assert await joiner.take_whole() is None
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
