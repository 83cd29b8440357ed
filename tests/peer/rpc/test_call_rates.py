"""How often callers may call: those in one neighbourhood share a rate, and whoever goes on loses the connection."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, cast

import pytest
from callers import numbered_identities
from relayed import closing, serve

from peer.errors import ExpertError
from peer.loop import LoopThread
from peer.metrics import total
from peer.rpc.connections import Connection
from peer.rpc.gate import CallGate, Slot, Slots
from peer.rpc.sessions import SESSION_KEY


class Callers:
    """Callers with sessions that call at the same gate, at times that the test chooses."""

    def __init__(self, gate: CallGate, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.admitted, self.closed = Counter[str](), Counter[str]()
        self._gate = gate
        clock = SimpleNamespace(monotonic=lambda: self.now)
        monkeypatch.setattr("peer.rpc.gate.time", clock)
        monkeypatch.setattr(gate._connections, "punish", lambda found: self.closed.update([found.peer]))

    def call(self, origin: str, caller: str) -> None:
        slot = Slot(origin, caller, cast("asyncio.Task[Any]", None))
        slots = Slots(1)
        try:
            self._gate._admit(Connection(caller, origin, lambda: None, 0.0), slot, slots, self._gate._rates)
            self.admitted[caller] += 1
        except ExpertError:
            pass

    def call_for(self, seconds: int, rates: dict[str, tuple[str, int]]) -> None:
        """`rates`: each caller's neighbourhood, and its calls per second."""
        for tick in range(seconds * 1000):
            self.now += 0.001
            for caller, (origin, per_s) in rates.items():
                if tick * per_s // 1000 < (tick + 1) * per_s // 1000:
                    self.call(origin, caller)


@asynccontextmanager
async def calling(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Callers]:
    served = await serve(numbered_identities(1)[0])
    async with closing(served):
        yield Callers(served.server.gate, monkeypatch)


def test_many_keys_in_one_neighbourhood_call_as_often_as_two_callers(
    loop: LoopThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with calling(monkeypatch) as callers:
            flood = {f"key {number}": ("there", 450) for number in range(8)}
            callers.call_for(10, {**flood, "neighbour": ("there", 20), "honest": ("here", 450)})
            of_flood = sum(callers.admitted[caller] for caller in flood)
            assert of_flood + callers.admitted["neighbour"] <= 1000 * (10 + 2) + 1
            assert callers.admitted["honest"] == 4500
            assert callers.admitted["neighbour"] == 200, "who takes less than its share is never refused"
            assert callers.closed.keys() == flood.keys()

    loop.run(scenario(), 60)


def test_neighbours_that_call_a_little_too_often_keep_their_connections(
    loop: LoopThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with calling(monkeypatch) as callers:
            callers.call_for(20, {f"pc {number}": ("home", 60) for number in range(20)})
            assert 0.9 * 1000 * 20 <= callers.admitted.total() < 1200 * 20
            assert min(callers.admitted.values()) > 0.9 * 50 * 20
            assert not callers.closed

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
