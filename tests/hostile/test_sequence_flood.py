"""A stranger that has a node keep as many sequences as it can: memory stays bounded, and others keep theirs."""

from collections.abc import Iterator

import pytest
from grpc import StatusCode
from tls_expert_server import CONTEXT, FIRST, SECOND, Call, Edge, Runner, answers, make, refused, running

from expert_server.serving.headers import MAX_SEQUENCES_IN_CALL
from peer.identity import Identity
from peer.loop import LoopThread

BUDGET = 2**18


@pytest.fixture
def run(loop: LoopThread, identity: Identity, caplog: pytest.LogCaptureFixture) -> Iterator[Runner]:
    with running(loop, identity, caplog) as runner:
        yield runner


def test_a_flood_of_sequences_evicts_its_senders_own(run: Runner) -> None:
    async def scenario(edge: Edge) -> None:
        honest = Call(uids=[FIRST], lengths=[3], positions=[0, 1, 2]).holding(1)
        assert answers(honest, await make(edge, honest)).is_kept
        stranger = edge.as_another()
        most = 0
        for first in range(1, 20 * 16, 16):
            flood = Call(
                uids=[FIRST], lengths=[CONTEXT] * 16, positions=list(range(CONTEXT)) * 16, seed=first
            )
            flood.holding(*range(first, first + 16))
            await make(stranger, flood)
            most = max(most, edge.sequences.bytes)
            assert edge.memory.used == 0
        assert BUDGET / 2 < most <= BUDGET
        following = Call(uids=[FIRST], lengths=[1], positions=[3]).holding(1, held=[[3]])
        assert answers(following, await make(edge, following)).is_kept

    run(scenario, max_kept_bytes=BUDGET)


def test_a_stranger_that_guesses_numbers_and_counts_gets_nothing(run: Runner) -> None:
    async def scenario(edge: Edge) -> None:
        honest = Call(uids=[FIRST], lengths=[3], positions=[0, 1, 2]).holding(2**64 - 1)
        assert answers(honest, await make(edge, honest)).is_kept
        stranger = edge.as_another()
        for count in range(1, CONTEXT):
            guess = Call(uids=[FIRST], lengths=[1], positions=[CONTEXT - 1]).holding(
                2**64 - 1, held=[[count]]
            )
            found = answers(guess, await make(stranger, guess))
            assert found.experts[0].status == 9
            assert not found.rows
        following = Call(uids=[FIRST], lengths=[1], positions=[3]).holding(2**64 - 1, held=[[3]])
        assert answers(following, await make(edge, following)).is_kept

    run(scenario, max_kept_bytes=BUDGET)


def test_more_tiny_sequences_than_a_call_may_have_are_not_computed(run: Runner) -> None:
    count = MAX_SEQUENCES_IN_CALL // 2 + 1

    async def scenario(edge: Edge) -> None:
        flood = Call(uids=[FIRST, SECOND], lengths=[1] * count, positions=[0] * count).holding(*range(count))
        refused(await make(edge, flood), StatusCode.RESOURCE_EXHAUSTED, "send fewer at once")
        assert (len(edge.sequences), edge.memory.used) == (0, 0)

    run(scenario, max_kept_bytes=2**28)
