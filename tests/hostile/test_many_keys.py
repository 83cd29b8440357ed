"""One person calls a node under many keys, to cause most of an expert's steps. Over real sockets."""

from collections.abc import Iterator

import pytest
from grpc import StatusCode
from tls_expert_server import FIRST, Call, Edge, Runner, make, running

from peer.identity import Identity
from peer.loop import LoopThread

KEYS, TURNS, ROWS = 8, 12, 16


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
        # a fourth as one of four groups, or twice their part of the rows; and one step more
        share = max(1 / 4, 2 * KEYS / (KEYS + 3 * ROWS))
        assert hostile <= share * sum(caused.values()) + 1
        assert all(caused[caller.caller] >= TURNS - 1 for caller in honest)

    run(scenario)
