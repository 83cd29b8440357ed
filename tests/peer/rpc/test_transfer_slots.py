"""Concurrent transfers: peers share the slots fairly, and slow transfers make way for waiting ones."""

import asyncio
from collections import Counter

import pytest
from grpc import StatusCode
from hypothesis import given, settings
from hypothesis import strategies as st

from peer.bounded import Owner
from peer.errors import ExpertError
from peer.loop import LoopThread
from peer.rpc.transfer import GRACE_S, LEAST_BYTES_PER_S, TransferPace, TransferSlots

PEERS = [Owner.alone(f"peer {n}") for n in range(6)]
ENOUGH_S = 20.0
"""Longer than a transfer without any bytes may take while others wait."""


class Hall:
    """Transfers that last until they are ended."""

    def __init__(self, most: int, *, can_resume: bool = True) -> None:
        self.now = 0.0
        self.slots = TransferSlots(most, lambda: self.now, can_resume=can_resume)
        self.transfers: list[tuple[Owner, asyncio.Task[None]]] = []

    async def come(self, owner: Owner) -> "asyncio.Task[None]":
        async def transfer() -> None:
            with self.slots.taken(owner, 0):
                await asyncio.Event().wait()

        had_room = self.slots.has_room_for(owner)
        task = asyncio.create_task(transfer())
        self.transfers.append((owner, task))
        await self.settle()
        assert task.done() is not had_room
        return task

    async def settle(self) -> None:
        for _ in range(4):
            await asyncio.sleep(0)

    def going_on(self) -> Counter[Owner]:
        return Counter(owner for owner, task in self.transfers if not task.done())

    async def end(self) -> None:
        for _, task in self.transfers:
            task.cancel()
        outcomes = await asyncio.gather(*(task for _, task in self.transfers), return_exceptions=True)
        for error in outcomes:
            assert isinstance(error, ExpertError | asyncio.CancelledError), error
            assert not isinstance(error, ExpertError) or error.status is StatusCode.RESOURCE_EXHAUSTED
        assert len(self.slots) == 0


def test_one_slow_peer_does_not_take_the_slots_of_others(loop: LoopThread) -> None:
    async def scenario() -> None:
        hall = Hall(4)
        for _ in range(9):
            await hall.come(PEERS[0])
        assert hall.going_on() == {PEERS[0]: 4}, "all, while nobody else wants one"
        for _ in range(2):
            await hall.come(PEERS[1])
        assert hall.going_on() == {PEERS[0]: 2, PEERS[1]: 2}
        await hall.come(PEERS[1])
        assert hall.going_on() == {PEERS[0]: 2, PEERS[1]: 2}
        await hall.end()

    loop.run(scenario(), 60)


def test_a_newcomer_waits_no_longer_than_a_fair_transfer_takes(loop: LoopThread) -> None:
    async def scenario() -> None:
        hall = Hall(2)
        first, second = [await hall.come(peer) for peer in PEERS[:2]]
        with pytest.raises(ExpertError, match="try again soon"):
            await (await hall.come(PEERS[2]))
        hall.now = ENOUGH_S
        third = await hall.come(PEERS[2])
        assert (first.done(), second.done(), third.done()) == (True, False, False)
        with pytest.raises(ExpertError, match="others wait"):
            await first
        await hall.end()

    loop.run(scenario(), 60)


def test_what_cannot_resume_keeps_its_slot_until_it_has_had_enough_time(loop: LoopThread) -> None:
    async def scenario() -> None:
        hall = Hall(2, can_resume=False)
        first, second = [await hall.come(PEERS[0]) for _ in range(2)]
        assert not hall.slots.has_room_for(PEERS[1])
        hall.now = ENOUGH_S
        await hall.come(PEERS[1])
        assert (first.done(), second.done()) == (True, False)
        assert hall.going_on() == {PEERS[0]: 1, PEERS[1]: 1}
        await hall.end()

    loop.run(scenario(), 60)


def test_many_keys_of_one_line_have_the_slots_of_one_peer_and_share_them(loop: LoopThread) -> None:
    async def scenario() -> None:
        hall = Hall(4)
        keys = [Owner("one line", f"key {n}") for n in range(9)]
        for key in keys[:4]:
            await hall.come(key)
        for _ in range(3):
            await hall.come(PEERS[0])
        assert hall.going_on()[PEERS[0]] == 2
        for key in keys[4:]:
            await hall.come(key)
        assert hall.going_on()[PEERS[0]] == 2, "new keys take nothing from other lines"
        await hall.come(PEERS[1])
        assert hall.going_on()[PEERS[1]] == 1
        assert hall.going_on().total() == 4
        hall.now = ENOUGH_S
        newcomer = keys[8]
        await hall.come(newcomer)
        assert hall.going_on()[newcomer] == 1, "in its own line, a slow transfer makes way"
        await hall.end()

    loop.run(scenario(), 60)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5), st.lists(st.tuples(st.integers(0, 5), st.floats(0.0, ENOUGH_S)), max_size=30))
def test_never_more_than_the_slots_and_everybody_gets_one_in_time(
    most: int, arrivals: list[tuple[int, float]]
) -> None:
    async def scenario() -> None:
        hall = Hall(most)
        for number, pause_s in arrivals:
            hall.now += pause_s
            await hall.come(PEERS[number])
            assert hall.going_on().total() == len(hall.slots) <= most
        hall.now += ENOUGH_S
        newcomer = Owner.alone("a newcomer")
        await hall.come(newcomer)
        assert hall.going_on()[newcomer] == 1
        await hall.end()

    asyncio.run(scenario())


def test_a_transfer_that_trickles_is_given_up(loop: LoopThread, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peer.rpc.transfer.GRACE_S", 0.1)
    monkeypatch.setattr("peer.rpc.transfer.CHUNK_BYTES", 1000)

    async def trickle() -> bytes:
        await asyncio.sleep(0.06)  # a hundred bytes may take 0.003 s
        return bytes(100)

    async def scenario() -> None:
        pace, came = TransferPace(), list[bytes]()

        async def receive() -> None:
            while True:
                came.append(await pace.read(trickle(), len))

        with pytest.raises(TimeoutError, match="it stalled, or came slower than 32768 bytes a second"):
            await receive()
        assert len(came) <= 3

    loop.run(scenario(), 60)
    assert GRACE_S + 10**7 / LEAST_BYTES_PER_S < 330, "10 MB never hold a transfer for longer"
