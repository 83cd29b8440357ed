"""One budget for all strangers: never exceeded, always released, and no peer within its share loses because
of others.
"""

import asyncio
from dataclasses import dataclass, field

import pytest
from grpc import StatusCode
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from peer.bounded import Owner
from peer.budget import FairBudget, MemoryBudget, Reservation
from peer.errors import ExpertError
from peer.loop import LoopThread

LIMIT = 100
OWNERS = [Owner.alone("QmA"), *(Owner("a line", name) for name in ("QmB", "QmC")), Owner.alone("QmD")]


@dataclass(eq=False)
class Use:
    """One use of the budget, such as by a call."""

    owner: Owner
    lost: bool = False
    reservation: Reservation = field(init=False)

    def lose(self) -> None:
        self.lost = True


class Budgeting(RuleBasedStateMachine):
    uses = Bundle("uses")

    def __init__(self) -> None:
        super().__init__()
        self.budget = FairBudget(LIMIT)
        self.live: list[Use] = []

    @rule(target=uses, owner=st.sampled_from(OWNERS), size=st.integers(0, 60))
    def reserve(self, owner: Owner, size: int) -> Use:
        use = Use(owner)
        with self.judging(owner, size):
            use.reservation = self.budget.reserve(owner, size, use.lose)
            self.live.append(use)
        return use

    @rule(use=uses, size=st.integers(0, 60))
    def grow(self, use: Use, size: int) -> None:
        if use in self.live:
            with self.judging(use.owner, size, use.reservation.size):
                use.reservation.grow(size)

    @rule(use=consumes(uses))
    def release(self, use: Use) -> None:
        if use in self.live:
            use.reservation.release()
            use.reservation.release()
            self.live.remove(use)

    def judging(self, owner: Owner, size: int, had: int = 0) -> "Judge":
        return Judge(self, owner, size, had)

    @invariant()
    def is_within_its_limit_and_adds_up(self) -> None:
        assert self.budget.used == sum(use.reservation.size for use in self.live) <= LIMIT
        for owner in OWNERS:
            assert self.budget.held(owner) == sum(u.reservation.size for u in self.live if u.owner == owner)
        assert len(self.budget._held) == len({use.owner for use in self.live})

    def teardown(self) -> None:
        for use in self.live:
            use.reservation.release()
        assert (self.budget.used, len(self.budget._held)) == (0, 0)


class Judge:
    """Checks that a request was treated fairly."""

    def __init__(self, machine: Budgeting, owner: Owner, size: int, had: int) -> None:
        self.machine, self.owner, self.size, self.had = machine, owner, size, had
        self.owners = {owner, *(use.owner for use in machine.live)}
        self.held = {each: machine.budget.held(each) for each in self.owners}
        self.wanted = self.held[owner] + size
        self.fits = machine.budget.used + size <= LIMIT

    def share(self, owner: Owner) -> float:
        groups = {each.group for each in self.owners}
        return LIMIT / len(groups) / sum(each.group == owner.group for each in self.owners)

    def of_group(self, owner: Owner) -> int:
        return sum(amount for each, amount in self.held.items() if each.group == owner.group)

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> bool:
        lost = [use for use in self.machine.live if use.lost]
        self.machine.live = [use for use in self.machine.live if not use.lost]
        if kind is None:
            for use in lost:
                assert self.held[use.owner] > self.share(use.owner)
                if use.owner.group == self.owner.group:
                    assert self.held[use.owner] > self.wanted
                else:  # some of its own group may have made room before
                    own = sum(u.reservation.size for u in lost if u.owner.group == self.owner.group)
                    assert self.of_group(use.owner) > self.of_group(self.owner) + self.size - own
            assert not (self.fits and lost)
            return False
        assert isinstance(error, ExpertError)
        assert error.status is StatusCode.RESOURCE_EXHAUSTED
        assert not lost, "whoever is refused takes nothing from others"
        assert not self.fits or self.had + self.size > LIMIT
        assert self.wanted > self.share(self.owner), "nobody is refused its share"
        return True


TestBudgeting = Budgeting.TestCase


@given(st.integers(1, 20), st.integers(1, 9))
def test_a_newcomer_has_its_share_however_many_keys_of_strangers_took_everything_before(
    strangers: int, size: int
) -> None:
    budget = FairBudget(1000)
    uses = []
    for number in range(1000):
        use = Use(Owner(f"line {number % strangers}", f"key {number % 97}"))
        try:
            use.reservation = budget.reserve(use.owner, size, use.lose)
        except ExpertError:
            break
        uses.append(use)
    share = 1000 // (strangers + 1)
    honest = Use(Owner.alone("honest"))
    for _ in range(share // size):
        budget.reserve(honest.owner, size, honest.lose)
    assert not honest.lost
    assert budget.held(honest.owner) == share // size * size


def test_what_never_fits_is_refused_without_a_time_to_come_back() -> None:
    with pytest.raises(ExpertError, match="at most 10 can be had: send less at once") as refused:
        FairBudget(10).reserve(OWNERS[0], 11, lambda: None)
    assert refused.value.retry_after_s == 0


def test_a_task_whose_memory_others_need_ends_with_an_error_and_not_as_cancelled(loop: LoopThread) -> None:
    async def scenario() -> None:
        budget = MemoryBudget(10)
        begun = asyncio.Event()

        async def call() -> None:
            with budget.holding(Owner.alone("greedy"), 10):
                begun.set()
                await asyncio.sleep(60)

        greedy = asyncio.create_task(call())
        await begun.wait()
        with budget.holding(Owner.alone("honest"), 4):
            (error,) = await asyncio.gather(greedy, return_exceptions=True)
            assert isinstance(error, ExpertError)
            assert error.status is StatusCode.RESOURCE_EXHAUSTED
            assert error.retry_after_s > 0
            assert budget.used == 4
        assert budget.used == 0

    loop.run(scenario(), 60)


def test_a_task_that_is_cancelled_from_outside_stays_cancelled(loop: LoopThread) -> None:
    async def scenario() -> None:
        budget = MemoryBudget(10)
        begun = asyncio.Event()

        async def call() -> None:
            with budget.holding(Owner.alone("greedy"), 10):
                begun.set()
                await asyncio.sleep(60)

        greedy = asyncio.create_task(call())
        await begun.wait()
        greedy.cancel()
        with budget.holding(Owner.alone("honest"), 4):  # and the memory is taken from it, too
            await asyncio.wait([greedy])
        assert greedy.cancelled()
        assert budget.used == 0

    loop.run(scenario(), 60)
