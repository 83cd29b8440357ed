"""A stranger makes a node keep as many sequences as it can: memory stays bounded, and others keep their sequences."""

import asyncio

from grpc import StatusCode
from tls_expert_server import (
    CONTEXT,
    FIRST,
    SECOND,
    Call,
    Edge,
    Runner,
    answers,
    exchange,
    make,
    refused,
    run,
    wait_until,
)

from expert_server.serving.headers import MAX_SEQUENCES_IN_CALL

__all__ = ["run"]

BUDGET = 2**18


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


def test_of_calls_that_go_on_with_one_sequence_at_once_one_is_answered(run: Runner) -> None:
    async def scenario(edge: Edge) -> None:
        await make(edge, Call(uids=[FIRST], lengths=[3], positions=[0, 1, 2]).holding(1))
        calls = [
            Call(uids=[FIRST], lengths=[1], positions=[3], seed=seed).holding(1, held=[[3]])
            for seed in range(6)
        ]
        outcomes = await asyncio.gather(*(make(edge, call) for call in calls))
        found = [answers(*pair) for pair in zip(calls, outcomes, strict=True)]
        assert sorted(each.experts[0].status for each in found) == [0] + [9] * 5
        assert [each.is_kept for each in found].count(True) == 1

    run(scenario, max_kept_bytes=BUDGET)


def test_calls_that_break_off_leave_no_memory_taken(run: Runner) -> None:
    async def scenario(edge: Edge) -> None:
        call = Call(uids=[FIRST, SECOND], lengths=[CONTEXT] * 16, positions=list(range(CONTEXT)) * 16)
        call.holding(*range(16))
        for requests in (call.requests[:1], call.requests[:-1] or call.requests, call.requests):
            await exchange(edge, "forward", requests, ends=False, timeout_s=0.3)
        await wait_until(lambda: edge.memory.used == 0)
        assert edge.sequences.bytes <= BUDGET
        assert answers(call, await make(edge, call)).experts[0].status == 0

    run(scenario, max_kept_bytes=BUDGET)
