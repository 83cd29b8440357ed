"""How often callers may call: neighbourhoods have a rate, which their callers share, and those that go on lose their
connections.
"""

import asyncio
import contextlib
import time
from collections import Counter
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import pytest
from callers import numbered_identities
from relayed import LOCAL, closing, serve, until

from peer.errors import ExpertError
from peer.loop import LoopThread
from peer.metrics import total
from peer.rpc.connections import Connection
from peer.rpc.gate import CallRates, Slot, Slots
from peer.rpc.sessions import SESSION_KEY


def slot(origin: str, caller: str) -> Slot:
    return Slot(origin, caller, cast("asyncio.Task[Any]", None))


def test_many_keys_in_one_neighbourhood_call_as_often_as_one_caller() -> None:
    rates = CallRates(500.0, 500.0, 2.0, 100.0)
    came, admitted = Counter[str](), Counter[str]()
    seconds = 10.0
    floods = {f"key {number}": ("there", 450) for number in range(8)}
    callers = {**floods, "neighbour": ("there", 20), "honest": ("here", 450)}
    for tick in range(int(seconds * 1000)):
        for caller, (origin, per_s) in callers.items():
            if tick * per_s // 1000 < (tick + 1) * per_s // 1000:
                came[caller] += 1
                admitted[caller] += rates.admits(slot(origin, caller), tick / 1000)
    of_flood = sum(admitted[caller] for caller in floods)
    assert 0.9 * 500 * seconds < of_flood + admitted["neighbour"] <= 500 * (seconds + 2) + 1
    assert admitted["honest"] == came["honest"]
    assert admitted["neighbour"] == came["neighbour"], "who takes less than its share is never refused"


def test_new_connections_give_nobody_more_calls_without_a_session() -> None:
    rates = CallRates(200.0, 5.0, 8.0, 10.0)
    admitted = sum(rates.admits(slot("there", f"connection {number // 40}"), 0.0) for number in range(40_000))
    assert admitted <= 200 * 8 + 1000, "once the rate is used up, each connection gets one call"
    assert rates.admits(slot("here", "newcomer"), 0.0)


def test_a_neighbourhood_whose_connections_were_abused_can_open_none_for_a_moment(
    loop: LoopThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peer.rpc.connections._ABUSES_PER_S", 1.0)
    monkeypatch.setattr("peer.rpc.connections._ABUSES_AT_ONCE", 1.0)

    async def scenario() -> None:
        served = await serve(numbered_identities(1)[0])
        connections = served.server.connections

        async def opened(source: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
            return await asyncio.open_connection(LOCAL, served.endpoint.port, local_addr=(source, 0))

        async with closing(served):
            for _ in range(2):
                _, first = await opened("127.66.0.1")
                await until(lambda: len(connections._table) == 1)
                connections.punish(connections._table.all()[0])
                first.close()
            reader, second = await opened("127.66.0.1")
            with contextlib.suppress(ConnectionResetError):
                assert not await asyncio.wait_for(reader.read(1), 20)
            _, other = await opened("127.0.0.1")
            await until(lambda: len(connections._table) == 1)
            await asyncio.sleep(1.0)
            _, third = await opened("127.66.0.1")
            await until(lambda: len(connections._table) == 2)
            for writer in (second, other, third):
                writer.close()

    loop.run(scenario(), 60)


def test_a_neighbourhood_is_barred_for_a_minute_at_most(loop: LoopThread) -> None:
    """However many connections it had. Others may live there, too."""

    async def scenario() -> None:
        served = await serve(numbered_identities(1)[0])
        connections = served.server.connections
        async with closing(served):
            for number in range(100):
                made = Connection(str(number), "there", lambda: None, 0.0)
                connections._table.add(made)
                connections.punish(made)
            assert connections.is_barred("there")
            assert 50.0 < connections._abuses.wait_s("there", time.monotonic()) <= 60.0

    loop.run(scenario(), 60)


def test_a_call_whose_connection_is_closed_is_not_answered(loop: LoopThread) -> None:
    """A flood may leave thousands of them when it is cut off."""

    async def scenario() -> None:
        served = await serve(numbered_identities(1)[0])
        context: Any = SimpleNamespace(
            peer=lambda: "unix:gone", invocation_metadata=lambda: ((SESSION_KEY, b""),)
        )
        async with closing(served):
            await served.server.gate._serve("/test/Echo", cast(Any, None), cast(Any, None), context)
            assert total(served.server.gate.refused) == 0

    loop.run(scenario(), 60)


def test_a_neighbourhood_of_which_many_calls_are_refused_loses_each_connection_that_goes_on(
    loop: LoopThread,
) -> None:
    """Also the one that it opens next."""

    async def scenario() -> None:
        served = await serve(numbered_identities(1)[0])
        gate, closed = served.server.gate, list[str]()
        async with closing(served):
            for name in ("first", "second"):
                made = Connection(name, "there", partial(closed.append, name), 0.0)
                served.server.connections._table.add(made)
                while not closed or closed[-1] != name:
                    with contextlib.suppress(ExpertError):
                        gate._admit(made, slot("there", name), gate._strange_slots, gate._strange_rates)
                    gate._strange_slots = Slots(32)
            assert total(gate.refused, reason="hasty") == 12

    loop.run(scenario(), 60)
