"""Relays that answer slowly are replaced, unless no other is faster."""

import asyncio
import contextlib
import itertools
import socket
from collections.abc import AsyncIterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from callers import numbered_identities
from hypothesis import given
from hypothesis import strategies as st
from relayed import (
    CALLER,
    FAST_MBIT,
    HIDDEN,
    OTHER,
    RELAY,
    Caller,
    Hidden,
    Served,
    closing,
    hide,
    serve,
    until,
)

from peer.identity import Identity, PeerID
from peer.loop import LoopThread, cancel_all
from peer.metrics import total
from peer.relays.reservations import Answers, Reservations, SlowRelays
from peer.rpc.channels import KnownPeer
from peer.transport.endpoints import Endpoint

_IDENTITIES = numbered_identities(6)
_ID = _IDENTITIES[RELAY].peer_id
SLOW_MBIT = 0.25
"""A piece of what a relay with this limit carries takes two seconds."""


@pytest.fixture
def keys() -> list[Identity]:
    return _IDENTITIES


@given(st.lists(st.floats(0.0, 5.0), max_size=8))
def test_the_fastest_of_the_last_three_answers_counts(delays: list[float]) -> None:
    answers, now = Answers(), 0.0
    for delay in delays:
        answers.answer(now)  # nobody has asked for this one
        answers.ask(now)
        answers.answer(now + delay)
        now += 6.0
    expected = min(delays[-3:]) if len(delays) >= 3 else 0.0
    assert answers.fastest_s == pytest.approx(expected)


def test_late_answers_belong_to_the_first_questions() -> None:
    answers = Answers()
    for now in (0.0, 6.0, 12.0):
        answers.ask(now)
    for now in (10.0, 16.0, 22.0):
        answers.answer(now)
    assert answers.fastest_s == 10.0


def test_a_relay_is_replaced_only_after_it_was_slow_for_a_while() -> None:
    slow = SlowRelays(lambda: 1.0)
    times = [now for now in range(0, 120, 6) if slow.should_replace(_ID, 2.0, now)]
    assert times == [*range(60, 120, 6)]


def test_an_answer_in_time_ends_the_wait() -> None:
    slow = SlowRelays(lambda: 1.0)
    assert not slow.should_replace(_ID, 2.0, 0.0)
    assert not slow.should_replace(_ID, 0.5, 30.0)
    assert not slow.should_replace(_ID, 2.0, 66.0)
    assert slow.should_replace(_ID, 2.0, 126.0)


def test_searches_in_vain_become_rare() -> None:
    slow, searched = SlowRelays(lambda: 1.0), []
    for now in range(0, 7200, 6):
        if slow.should_replace(_ID, 2.0, now):
            searched.append(now)
            slow.searched(_ID, False, now)
    pauses = [after - before for before, after in itertools.pairwise(searched)]
    assert pauses == [120, 240, 480, *[960] * (len(pauses) - 3)]
    assert len(pauses) > 5


def test_after_a_change_all_relays_are_kept_for_a_while() -> None:
    slow, other = SlowRelays(lambda: 1.0), _IDENTITIES[OTHER].peer_id
    for relay in (_ID, other):
        slow.should_replace(relay, 2.0, 0.0)
    assert slow.should_replace(_ID, 2.0, 60.0)
    slow.searched(_ID, True, 60.0)
    assert not slow.should_replace(other, 2.0, 359.0)
    assert slow.should_replace(other, 2.0, 360.0)


def test_a_peer_never_leaves_both_relays_at_once(
    monkeypatch: pytest.MonkeyPatch, keys: list[Identity]
) -> None:
    monkeypatch.setattr("peer.relays.reservations.BEAT_S", 0.01)
    monkeypatch.setattr("peer.relays.reservations._SEARCH_S", 0.05)
    relays = [KnownPeer(key.peer_id, (Endpoint("192.0.2.1:1"),), b"") for key in keys]

    async def reserve(relay: KnownPeer) -> Any:
        await asyncio.sleep(0.05)
        return SimpleNamespace(cancel=lambda: None)

    async def candidates() -> list[KnownPeer]:
        return relays[2:]

    async def scenario() -> None:
        client: Any = SimpleNamespace(peer_id=keys[HIDDEN].peer_id, reserve=reserve)
        reservations, slow = Reservations(client), Answers()
        for now in range(3):
            slow.ask(now)
            slow.answer(now + 2.0)
        searches = [reservations._find_faster(relay.peer_id, slow, candidates) for relay in relays[:2]]
        tasks = [asyncio.create_task(search) for search in searches]
        await asyncio.wait(tasks, timeout=1.0)
        assert [task.done() for task in tasks].count(True) == 1
        await cancel_all(tasks)

    asyncio.run(scenario())


@pytest.fixture
def in_haste(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "BEAT_S": 1.0,
        "_SLOW_S": 0.3,
        "_SEARCH_S": 0.2,
        "_SETTLED_S": 0.0,
        "WANTED": 1,
    }.items():
        monkeypatch.setattr(f"peer.relays.reservations.{name}", value)
    monkeypatch.setattr("peer.relays.service._REQUESTS_PER_S", 100.0)


def relays_of(hidden: Hidden) -> set[PeerID]:
    return {address.dialled for address in hidden.reservations.addresses}


@contextlib.asynccontextmanager
async def overloaded(key: Identity, relay: Served, contact: KnownPeer) -> AsyncIterator[None]:
    """A caller with this key sends a peer more than the relay may carry."""
    caller = Caller(key)

    async def ask() -> None:
        while True:  # the server ends calls whose messages take too long
            with contextlib.suppress(grpc.aio.AioRpcError):
                await caller.ask(contact, bytes(3_000_000))

    async with closing(caller):
        before = total(relay.relaying.bytes)
        asking = asyncio.create_task(ask())
        await until(lambda: total(relay.relaying.bytes) > before)
        yield
        await cancel_all([asking])


@pytest.mark.usefixtures("in_haste")
def test_an_overloaded_relay_is_replaced_by_a_faster_one(loop: LoopThread, keys: list[Identity]) -> None:
    async def scenario() -> None:
        slow, fast = await serve(keys[RELAY], SLOW_MBIT), await serve(keys[OTHER], FAST_MBIT)
        hidden, caller = await hide(keys[HIDDEN], [slow]), Caller(keys[CALLER])
        async with closing(slow, fast, hidden, caller), overloaded(keys[4], slow, hidden.contact):
            await asyncio.sleep(5.0)
            assert relays_of(hidden) == {slow.peer_id}, "there is no other"
            hidden.relays.append(fast.as_relay)
            await until(lambda: relays_of(hidden) == {fast.peer_id})
            assert await caller.ask(hidden.contact) == b"ping"
            await asyncio.sleep(4.0)
            assert relays_of(hidden) == {fast.peer_id}

    loop.run(scenario(), 60)


@pytest.mark.usefixtures("in_haste")
def test_a_slow_relay_is_kept_if_the_other_one_does_not_answer(
    loop: LoopThread, keys: list[Identity]
) -> None:
    async def scenario() -> None:
        relay = await serve(keys[RELAY], SLOW_MBIT)
        hidden = await hide(keys[HIDDEN], [relay])
        with socket.create_server(("127.0.0.1", 0)) as silent:
            endpoint = Endpoint.of("127.0.0.1", silent.getsockname()[1])
            other = KnownPeer(keys[OTHER].peer_id, (endpoint,), relay.pem)
            async with closing(relay, hidden), overloaded(keys[CALLER], relay, hidden.contact):
                hidden.relays.append(other)
                await until(lambda: hidden.reservations._pauses.pause_s(other.peer_id))
                assert relays_of(hidden) == {relay.peer_id}

    loop.run(scenario(), 60)


def test_an_overloaded_relay_still_gives_reservations(
    loop: LoopThread, keys: list[Identity], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peer.relays.service._LONGEST_TURN_S", 0.5)

    async def scenario() -> None:
        relay = await serve(keys[RELAY], SLOW_MBIT / 10)
        hidden = await hide(keys[HIDDEN], [relay])
        async with closing(relay, hidden), overloaded(keys[CALLER], relay, hidden.contact):
            await asyncio.sleep(2.0)  # a piece of the payload has its turn, and takes twenty seconds
            async with asyncio.timeout(8.0):
                other = await hide(keys[4], [relay])
            await other.close()

    loop.run(scenario(), 60)


def test_a_caller_takes_the_other_relay_if_the_first_is_overloaded(
    loop: LoopThread, keys: list[Identity]
) -> None:
    async def scenario() -> None:
        slow, fast = await serve(keys[RELAY], SLOW_MBIT / 10), await serve(keys[OTHER], FAST_MBIT)
        hidden, caller = await hide(keys[HIDDEN], [slow, fast], reservations=2), Caller(keys[CALLER])
        addresses = sorted(hidden.reservations.addresses, key=lambda each: each.dialled != slow.peer_id)
        through_slow = replace(hidden.contact, relay_addresses=addresses[:1])
        async with closing(slow, fast, hidden, caller), overloaded(keys[4], slow, through_slow):
            await asyncio.sleep(2.0)  # a piece of the payload has its turn, and takes twenty seconds
            chosen = []
            for some in (addresses, addresses[:1]):
                circuit = await caller.dialler.dial(hidden.served.peer_id, some)
                chosen.append(circuit.relay)
                circuit.close()
            assert chosen == [fast.peer_id, slow.peer_id], "a slow relay is better than none"

    loop.run(scenario(), 60)
