"""Callers that try to cause most of an expert's steps: one person with many keys, and one with many tiny batches.

The gradients of the tiny batches have their signs flipped. All goes over real sockets.
"""

from collections.abc import Iterator

import pytest
from grpc import StatusCode
from tls_expert_server import FIRST, Call, Edge, Runner, make, running

from peer.identity import Identity
from peer.loop import LoopThread
from peer.metrics import total

KEYS, TURNS, ROWS = 8, 12, 16
TINY = 8
"""The number of batches of one row for each honest batch."""


@pytest.fixture
def run(loop: LoopThread, identity: Identity, caplog: pytest.LogCaptureFixture) -> Iterator[Runner]:
    with running(loop, identity, caplog) as runner:
        yield runner


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
