"""One person with many keys, who tries to get most of a node's turns, memory and steps; and one who tries to cause most
of an expert's steps with many tiny batches.

The gradients of the tiny batches have their signs flipped. All goes over real sockets.
"""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
from grpc import StatusCode
from tls_expert_server import (
    FIRST,
    Call,
    Edge,
    Runner,
    chunked,
    exchange,
    exchange_now,
    make,
    run,
    wait_until,
)

from expert_server.serving.servicer import BudgetLimits
from peer.errors import ExpertError
from peer.metrics import total
from peer.wire import session_pb2

__all__ = ["run"]

KEYS, TURNS, ROWS = 8, 12, 16
CALLS = 3
"""The calls of each key that wait at the same time."""
TINY = 8
"""The number of batches of one row for each honest batch."""


def test_many_keys_of_one_line_cause_hardly_more_steps_than_one_caller_may(run: Runner) -> None:
    async def scenario(edge: Edge) -> None:
        honest = [edge.as_another(200 + n, f"192.0.2.{n}") for n in range(3)]
        keys = [edge.as_another(300 + n, "198.51.100.1") for n in range(KEYS)]
        expert = edge.runtime.experts[FIRST]
        for turn in range(TURNS):
            for caller in [*keys, *honest]:
                rows = 1 if caller in keys else ROWS
                call = Call("backward", [FIRST], [rows], range(rows), seed=turn)
                outcome = await make(caller, call)
                assert outcome.code is StatusCode.OK, outcome.details
        caused = expert.callers._caused
        hostile = sum(caused.get(caller.caller, 0.0) for caller in keys)
        # A quarter, as one of four groups, or twice their share of the rows; and one more step.
        share = max(1 / 4, 2 * KEYS / (KEYS + 3 * ROWS))
        assert hostile <= share * sum(caused.values()) + 1
        assert all(caused[caller.caller] >= TURNS - 1 for caller in honest)

    run(scenario)


def test_a_caller_of_many_tiny_batches_with_flipped_signs_causes_no_more_than_its_share(run: Runner) -> None:
    """Its gradients are a hundred times as large, and all other callers send the same rows."""

    async def scenario(edge: Edge) -> None:
        honest = [edge.as_another(200 + n, f"192.0.2.{n}") for n in range(3)]
        flipping = edge.as_another(300, "198.51.100.1")
        true = Call("backward", [FIRST], [ROWS], range(ROWS))
        calls = 0
        for caller in TURNS // 4 * honest:
            for row in (None, *range(TINY)):
                calls += 1
                call = true if row is None else Call("backward", [FIRST], [1], [row])
                call.header.request_id = calls.to_bytes(16)
                if row is not None:
                    inputs, gradients = true.tensors
                    call.tensors = [inputs[[row]], -100 * gradients[[row]]]
                outcome = await make(caller if row is None else flipping, call)
                assert outcome.code is StatusCode.OK, outcome.details
        caused = edge.runtime.experts[FIRST].callers._caused
        share = max(1 / 4, 2 * TINY / (TINY + ROWS))
        assert caused[flipping.caller] <= share * sum(caused.values()) + 1
        assert total(edge.runtime.metrics.withheld_updates) > 0
        assert all(caused[caller.caller] >= TURNS // 4 - 1 for caller in honest)

    run(scenario)


def test_many_keys_of_one_line_get_the_turns_of_one_caller(
    run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(edge: Edge) -> None:
        honest = edge.as_another(200, "192.0.2.1")
        keys = [edge.as_another(300 + n, "198.51.100.1") for n in range(KEYS)]
        served: list[str] = []
        compute = edge.runtime._compute

        def noting(experts: Any, batch: Any) -> Any:
            served.extend(entry.work.caller for entry in batch)
            return compute(experts, batch)

        monkeypatch.setattr(edge.runtime, "_compute", noting)
        release = threading.Event()
        blocked = asyncio.create_task(edge.runtime.run(release.wait))
        threads, loop = ThreadPoolExecutor(CALLS * (KEYS + 1)), asyncio.get_running_loop()
        try:
            calls = [
                loop.run_in_executor(
                    threads, exchange_now, caller, "forward", Call(seed=number).requests, True, 60.0, []
                )
                for caller in (*keys, honest)
                for number in range(CALLS)
            ]
            rows = len(Call().positions)
            await wait_until(lambda: edge.runtime.queued_rows == rows * len(calls), 20)
            release.set()
            outcomes = await asyncio.gather(*calls)
        finally:
            release.set()
            await blocked
            threads.shutdown(wait=False)
        assert {outcome.code for outcome in outcomes} == {StatusCode.OK}
        last = max(place for place, caller in enumerate(served) if caller == honest.caller)
        assert last + 1 <= 2 * CALLS + 1, (
            "at least half of what was computed meanwhile was the honest caller's"
        )

    run(scenario, max_batch_rows=len(Call().positions))


def test_many_keys_of_one_line_take_no_memory_from_an_honest_caller(run: Runner) -> None:
    """Each of them holds less than the honest caller does."""
    call_bytes = 2**20

    async def scenario(edge: Edge) -> None:
        honest = edge.as_another(200, "192.0.2.1")
        keys = [edge.as_another(300 + n, "198.51.100.1") for n in range(KEYS)]
        lost: list[str] = []

        def reserve(caller: Edge, size: int) -> None:
            owner = edge.sessions.find(caller.session[0][1], session_pb2.RIGHT_FORWARD).owner
            edge.memory.reserve(owner, size, lambda: lost.append(caller.caller))

        for _ in range(4):
            reserve(honest, call_bytes)
        for key in keys:
            for _ in range(3):
                with suppress(ExpertError):
                    reserve(key, call_bytes)
        assert honest.caller not in lost
        assert edge.memory.used <= 8 * call_bytes

    run(scenario, max_memory_bytes=8 * call_bytes)


def test_many_keys_of_one_line_have_one_budget_of_rows(run: Runner) -> None:
    async def scenario(edge: Edge) -> None:
        honest = edge.as_another(200, "192.0.2.1")
        keys = [edge.as_another(300 + n, "198.51.100.1") for n in range(2)]
        outcomes = [await make(caller, Call(seed=n)) for n, caller in enumerate([keys[0], *keys, honest])]
        codes = [outcome.code for outcome in outcomes]
        assert codes == [StatusCode.OK, *2 * [StatusCode.RESOURCE_EXHAUSTED], StatusCode.OK]

    run(scenario, budget=BudgetLimits(rows_per_s=0.01))


def test_a_caller_that_breaks_off_before_its_payload_has_no_vote_on_who_was_left_behind(run: Runner) -> None:
    async def scenario(edge: Edge) -> None:
        reports = edge.runtime.experts[FIRST].reports
        call = Call(seed=1).keeping()
        call.header.experts[0].updates = 10**6
        for requests in (call.requests[:1], [call.requests[0], *chunked(call.payload[:-1])]):
            outcome = await exchange(edge, "forward", requests)
            assert outcome.code is StatusCode.INVALID_ARGUMENT
            assert not reports._trainers
        assert (await make(edge, call)).code is StatusCode.OK
        assert list(reports._trainers) == [edge.caller]

    run(scenario)
