"""Calls that continue sequences, over real TLS: the same answers as for all rows at once, and wrong calls
are refused.
"""

import math
import tracemalloc
from collections.abc import Callable, Sequence

import pytest
import torch
from grpc import StatusCode
from tls_expert_server import (
    FIRST,
    HIDDEN,
    LENGTHS,
    MANIFEST,
    POSITIONS,
    SECOND,
    SWARM,
    Call,
    Edge,
    Runner,
    answers,
    check_it_goes_on,
    make,
    refused,
    run,
    wait_until,
)

from dht.manifest import ExpertSpec
from expert_server.experts.expert import Expert
from expert_server.experts.graphs import Rows
from expert_server.serving.call import OPEN_CALL_BYTES
from expert_server.serving.forward_cache import ForwardCache
from expert_server.serving.headers import CallSize, HeaderParser
from expert_server.serving.sequence_cache import ENTRY_BYTES
from peer.errors import ExpertError, WireError
from peer.layers import KeyValueCache

__all__ = ["run"]

KEPT = 2**20
WHOLE = Call(
    uids=[FIRST, SECOND],
    lengths=[4, 3],
    positions=[0, 1, 3, 8, 2, 5, 6],
    rows_of=[[0, 2, 3, 4, 5, 6], [0, 1, 3, 5]],
)
"""All rows of two sequences at once."""


def part(
    rows: Sequence[int],
    lengths: Sequence[int],
    rows_of: Sequence[Sequence[int]],
    held: Sequence[Sequence[int]] = (),
) -> Call:
    """Some rows of `WHOLE`, as a separate call."""
    call = Call(
        uids=[FIRST, SECOND],
        lengths=lengths,
        positions=[WHOLE.positions[row] for row in rows],
        rows_of=rows_of,
    )
    call.tensors = [WHOLE.tensors[0][list(rows)]]
    return call.holding(11, 22, held=held)


def first_part() -> Call:
    return part([0, 1, 4, 5], [2, 2], [[0, 2, 3], [0, 1, 3]])


def second_part() -> Call:
    return part([2, 3, 6], [2, 1], [[0, 1, 2], [1]], [[1, 2], [2]])


def test_rows_that_follow_see_those_before_them(run: Runner) -> None:
    async def scenario(edge: Edge) -> None:
        expected = WHOLE.expected(Expert(FIRST, MANIFEST), Expert(SECOND, MANIFEST))
        first, second = first_part(), second_part()
        answered = answers(first, await make(edge, first))
        assert answered.is_kept
        torch.testing.assert_close(answered.tensor, expected[[0, 1, 4, 5]], atol=1e-5, rtol=1e-4)
        answered = answers(second, await make(edge, second))
        assert answered.is_kept
        torch.testing.assert_close(answered.tensor, expected[[2, 3, 6]], atol=1e-5, rtol=1e-4)
        assert len(edge.sequences) == 4
        assert edge.memory.used == 0

    run(scenario, max_kept_bytes=KEPT)


def test_rows_are_gone_on_with_once_and_by_nobody_else(run: Runner) -> None:
    async def scenario(edge: Edge) -> None:
        await make(edge, first_part())
        call = second_part()
        outcome = await make(edge.as_another(), call)
        assert {r.status for reply in outcome.replies for r in reply.experts} == {
            StatusCode.FAILED_PRECONDITION.value[0]
        }
        assert not outcome.replies[-1].kept
        assert answers(call, await make(edge, call)).is_kept
        again = answers(call, await make(edge, call))
        assert [reply.status for reply in again.experts.values()] == [9, 9]
        assert "does not have those" in again.experts[0].message
        await check_it_goes_on(edge)

    run(scenario, max_kept_bytes=KEPT)


def test_an_expert_that_has_changed_does_not_go_on(run: Runner) -> None:
    async def scenario(edge: Edge) -> None:
        await make(edge, first_part())
        step = Call("backward", uids=[FIRST])
        answers(step, await make(edge, step))
        call = second_part()
        replies = answers(call, await make(edge, call)).experts
        assert [replies[0].status, replies[1].status] == [9, 0]
        assert "has changed since" in replies[0].message

    run(scenario, max_kept_bytes=KEPT)


def test_without_room_nothing_is_kept_and_all_is_answered(run: Runner) -> None:
    async def scenario(edge: Edge) -> None:
        call = first_part()
        answered = answers(call, await make(edge, call))
        assert not answered.is_kept
        assert len(edge.sequences) == 0
        assert [reply.status for reply in answered.experts.values()] == [0, 0]

    run(scenario, max_kept_bytes=ENTRY_BYTES)


def test_calls_that_are_kept_for_their_backward_call_come_first(run: Runner) -> None:
    async def scenario(edge: Edge) -> None:
        await make(edge, first_part())
        assert edge.sequences.bytes > 0
        kept = Call(uids=[FIRST], lengths=[16] * 14, positions=list(range(16)) * 14).keeping()
        assert answers(kept, await make(edge, kept)).is_kept
        await wait_until(lambda: edge.cache.bytes + edge.sequences.bytes <= 2**18)
        assert edge.cache.bytes > 0

    run(scenario, max_kept_bytes=2**18)


def test_numbers_that_are_not_finite_spoil_no_rows() -> None:
    expert = Expert(FIRST, MANIFEST)
    cache = KeyValueCache()
    x = torch.randn(3, HIDDEN)
    expert.forward(Rows(x[:2], torch.tensor([2]), torch.tensor([0, 1]), caches=[cache]))
    with pytest.raises(ExpertError):
        expert.forward(Rows(x[2:] * torch.inf, torch.tensor([1]), torch.tensor([2]), caches=[cache]))
    assert cache.length == 2
    last = expert.forward(Rows(x[2:], torch.tensor([1]), torch.tensor([2]), caches=[cache]))
    whole = expert.forward(Rows(x, torch.tensor([3]), torch.tensor([0, 1, 2])))
    torch.testing.assert_close(last, whole[2:], atol=1e-5, rtol=1e-4)


def holding(*numbers: int, held: Sequence[Sequence[int]] = ()) -> Callable[[Call], object]:
    return lambda call: call.holding(*numbers, held=held)


WRONG: dict[str, tuple[Callable[[Call], object], str]] = {
    "too few numbers": (holding(1), "2 segments, but 1 sequence numbers"),
    "too many numbers": (holding(1, 2, 3), "2 segments, but 3 sequence numbers"),
    "a number twice": (holding(1, 1), "a sequence number occurs twice"),
    "no numbers": (holding(held=[[0, 1]]), "held rows need numbered sequences"),
    "too few counts": (holding(1, 2, held=[[1]]), "expert 0.0.0 has 2 segments, but 1 counts of held rows"),
    "too many counts": (holding(1, 2, held=[[0, 0, 0]]), "has 2 segments, but 3 counts of held rows"),
    "more than there can be": (
        holding(1, 2, held=[[0, 2]]),
        "can't hold more earlier rows of a sequence than there are",
    ),
    "a huge count": (
        holding(1, 2, held=[[0, 2**32 - 1]]),
        "can't hold more earlier rows of a sequence than there are",
    ),
    "kept": (lambda call: call.holding(1, 2).keeping(), "sequences are kept of forward calls alone"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_sequences_are_refused_saying_what_is_wrong(run: Runner, name: str) -> None:
    spoil, said = WRONG[name]
    call = Call(lengths=LENGTHS, positions=POSITIONS)
    spoil(call)

    async def scenario(edge: Edge) -> None:
        refused(await make(edge, call), StatusCode.INVALID_ARGUMENT, said)
        await check_it_goes_on(edge)

    run(scenario, max_kept_bytes=KEPT)


def test_backward_calls_and_experts_that_see_one_row_at_a_time_keep_no_sequences(run: Runner) -> None:
    async def scenario(edge: Edge) -> None:
        wrong = [Call("backward").holding(1, 2), Call().kept().holding(1, 2)]
        for call in wrong:
            refused(
                await make(edge, call), StatusCode.INVALID_ARGUMENT, "sequences are kept of forward calls"
            )

    run(scenario, max_kept_bytes=KEPT)
    manifest = MANIFEST.model_copy(update={"experts": ExpertSpec(grid=(2, 2), kind="ffn")})
    parser = HeaderParser(SWARM, manifest, max_call_bytes=2**20, cache=ForwardCache(0))
    with pytest.raises(WireError, match="experts of kind ffn keep no rows of sequences"):
        parser.parse(Call().holding(1, 2).header, "forward", "QmA", lambda size: None)
    model = MANIFEST.model.model_copy(update={"layers": 2, "causal": (False, True)})
    manifest = MANIFEST.model_copy(update={"model": model})
    parser = HeaderParser(SWARM, manifest, max_call_bytes=2**20, cache=ForwardCache(0))
    with pytest.raises(WireError, match="experts of an encoder keep no rows of sequences"):
        parser.parse(Call().holding(1, 2).header, "forward", "QmA", lambda size: None)


def test_memory_for_held_rows_is_reserved_before_they_are_looked_for() -> None:
    parser = HeaderParser(SWARM, MANIFEST, max_call_bytes=2**20, cache=ForwardCache(0))
    reserved: list[int] = []
    parser.parse(second_part().header, "forward", "QmA", reserved.append)
    rows = 5 + 1.25 * (5 + 4)  # that are held, and with those of the call
    assert reserved[1:] == [2 * 4 * HIDDEN * math.ceil(rows) + 3 * ENTRY_BYTES]


def test_numbers_for_far_too_many_sequences_are_refused_before_they_are_looked_at() -> None:
    """A header has room for 390,000, which take 40 ms and 33 MB as a set."""
    parser = HeaderParser(SWARM, MANIFEST, max_call_bytes=2**20, cache=ForwardCache(0))
    header = Call().holding(1, 2).header
    header.sequences.extend(range(300_000))
    tracemalloc.start()
    try:
        with pytest.raises(WireError, match="2 segments, but 300002 sequence numbers"):
            parser.parse(header, "forward", "QmA", lambda size: None)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_without_memory_for_it_a_call_is_answered_and_not_kept(run: Runner) -> None:
    async def scenario(edge: Edge) -> None:
        call = first_part()
        answered = answers(call, await make(edge, call))
        assert not answered.is_kept
        assert [reply.status for reply in answered.experts.values()] == [0, 0]

    bytes_of_call = first_part().header.ByteSize() + CallSize(4, 6, 2, 2, HIDDEN, "forward").bytes
    run(scenario, max_kept_bytes=KEPT, max_memory_bytes=OPEN_CALL_BYTES + bytes_of_call + 100)
