"""Wrong streams of requests, over real TLS: each is refused, and none of it is computed."""

import math
import struct
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from grpc import StatusCode
from tls_expert_server import (
    CONTEXT,
    DIRECTIONS,
    FIRST,
    HIDDEN,
    MANIFEST,
    ROWS,
    Call,
    Edge,
    Runner,
    answers,
    both_directions,
    check_it_goes_on,
    exchange,
    header_of,
    make,
    piece,
    refused,
    run,
    with_payload,
)

from expert_server.experts.expert import Expert
from expert_server.serving import call as call_module
from expert_server.serving.batching import Direction
from peer.codec import MAX_CHUNK_BYTES, MAX_MESSAGE_BYTES
from peer.metrics import total
from peer.wire import expert_pb2

__all__ = ["run"]


TOO_LONG = "the payload is longer than the header says"
NOT_A_CHUNK = "after the header come chunks of 1 to 1048576 bytes"
NO_HEADER = "a call must begin with its header"

WRONG_STREAMS: dict[str, tuple[Callable[[Call], list[expert_pb2.CallRequest]], str]] = {
    "no message at all": (lambda call: [], NO_HEADER),
    "an empty message": (lambda call: [expert_pb2.CallRequest()], NO_HEADER),
    "a chunk before the header": (lambda call: [piece(call.payload), header_of(call)], NO_HEADER),
    "a header with a part of the payload, then too much": (
        lambda call: [with_payload(call, call.payload[:8]), piece(call.payload)],
        "longer than the header says",
    ),
    "an oversized chunk beside the header": (
        lambda call: [with_payload(call, bytes(MAX_CHUNK_BYTES + 1))],
        NOT_A_CHUNK,
    ),
    "a second header": (lambda call: [header_of(call), header_of(call)], NOT_A_CHUNK),
    "an empty chunk": (lambda call: [header_of(call), piece(b""), piece(call.payload)], NOT_A_CHUNK),
    "a message with nothing in it": (lambda call: [header_of(call), expert_pb2.CallRequest()], NOT_A_CHUNK),
    "an oversized chunk": (lambda call: [header_of(call), piece(bytes(MAX_CHUNK_BYTES + 1))], NOT_A_CHUNK),
    "no payload": (lambda call: [header_of(call)], "the payload is 320 bytes shorter than"),
    "a byte too few": (
        lambda call: [header_of(call), piece(call.payload[:-1])],
        "the payload is 1 bytes shorter",
    ),
}


@pytest.mark.parametrize("name", WRONG_STREAMS)
def test_a_wrong_stream_is_refused_saying_what_is_wrong(run: Runner, name: str) -> None:
    spoil, said = WRONG_STREAMS[name]

    async def scenario(edge: Edge) -> None:
        for direction in DIRECTIONS:
            outcome = await exchange(edge, direction, spoil(Call(direction)))
            refused(outcome, StatusCode.INVALID_ARGUMENT, said)
            assert edge.updates() == total(edge.runtime.metrics.rows) == 0
        await check_it_goes_on(edge)

    run(scenario)


@both_directions
@pytest.mark.parametrize("more", [b"x", bytes(1000), b""])
def test_a_payload_longer_than_the_header_says_is_refused(
    run: Runner, direction: Direction, more: bytes
) -> None:
    call = Call(direction)

    async def scenario(edge: Edge) -> None:
        for requests in ([header_of(call), piece(call.payload + more)], [*call.requests, piece(more)]):
            call.header.request_id = bytes([len(requests)]) * 16
            requests[0] = header_of(call)
            if more or len(requests) == 3:
                outcome = await exchange(edge, direction, requests)
                assert outcome.code is StatusCode.INVALID_ARGUMENT
                assert outcome.details == TOO_LONG
        await check_it_goes_on(edge)

    run(scenario)


def test_a_message_over_the_limit_is_refused_by_grpc(run: Runner) -> None:
    call = Call()

    async def scenario(edge: Edge) -> None:
        outcome = await exchange(edge, "forward", [header_of(call), piece(bytes(2 * MAX_MESSAGE_BYTES))])
        refused(outcome, StatusCode.RESOURCE_EXHAUSTED)
        await check_it_goes_on(edge)

    run(scenario)


def test_a_claim_of_megabytes_with_a_kilobyte_behind_it_is_refused(run: Runner) -> None:
    segments = 4 * 2**20 // (4 * HIDDEN * CONTEXT)
    call = Call(lengths=[CONTEXT] * segments, positions=list(range(CONTEXT)) * segments)

    async def scenario(edge: Edge) -> None:
        outcome = await exchange(edge, "forward", [header_of(call), piece(bytes(1024))])
        refused(outcome, StatusCode.INVALID_ARGUMENT, f"the payload is {4 * 2**20 - 1024} bytes shorter than")
        await check_it_goes_on(edge)

    run(scenario)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("direction", "which"), [("forward", 0), ("backward", 0), ("backward", 1)])
def test_numbers_that_are_not_finite_are_refused(
    run: Runner, direction: Direction, which: int, bad: float
) -> None:
    call = Call(direction)
    call.tensors[which][2, 3] = bad

    async def scenario(edge: Edge) -> None:
        refused(await make(edge, call), StatusCode.INVALID_ARGUMENT, "numbers that are not finite")
        assert edge.updates() == total(edge.runtime.metrics.rows) == 0
        await check_it_goes_on(edge)

    run(scenario)


@pytest.mark.parametrize(
    ("scale", "said"),
    [
        (0x7FC0, "numbers that are not finite"),
        (0xFF80, "numbers that are not finite"),
        (0xBF80, "scales that are not between"),
        (0x7201, "scales that are not between"),
        (0x8000, ""),
        (0x0001, ""),
    ],
)
def test_scales_of_int4_are_in_bounds_or_refused(run: Runner, scale: int, said: str) -> None:
    """The last two are minus zero and the smallest subnormal number."""
    call = Call("backward")
    call.header.codec = expert_pb2.CODEC_INT4
    right, wrong = (struct.pack("<H", number) + bytes(range(HIDDEN // 2)) for number in (0x3F80, scale))
    payload = right * ROWS + right * (ROWS - 1) + wrong

    async def scenario(edge: Edge) -> None:
        outcome = await exchange(edge, "backward", [header_of(call), piece(payload)])
        if said:
            refused(outcome, StatusCode.INVALID_ARGUMENT, said)
            assert edge.updates() == 0
        else:
            assert outcome.code is StatusCode.OK
            (block,) = (rows for message in outcome.replies for rows in message.rows)
            assert block.payload_bytes == len(payload) // 2
        await check_it_goes_on(edge)

    run(scenario)


@both_directions
def test_large_tensors_are_converted_off_the_loop(
    run: Runner, direction: Direction, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Converting 64 MiB takes int4 a quarter of a second, in which the loop would serve nobody."""
    threads: list[int] = []

    def noting(convert: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*given: Any) -> Any:
            threads.append(threading.get_ident())
            return convert(*given)

        return noted

    for name in ("decode", "encode"):
        monkeypatch.setattr(call_module, name, noting(getattr(call_module, name)))
    monkeypatch.setattr(call_module, "_LOOP_NUMBERS", ROWS * HIDDEN - 1)

    async def scenario(edge: Edge) -> None:
        call, own = Call(direction), Expert(FIRST, MANIFEST)
        found = answers(call, await make(edge, call))
        torch.testing.assert_close(found.tensor, call.expected(own))
        assert len(threads) == (2 if direction == "forward" else 3)
        assert threading.get_ident() not in threads

    run(scenario)


def test_finite_numbers_too_large_for_the_expert_spoil_nothing(run: Runner) -> None:
    call = Call("backward")
    call.tensors[1].fill_(3e38)

    async def scenario(edge: Edge) -> None:
        outcome = await make(edge, call)
        assert outcome.code is StatusCode.OK, outcome.details
        found = answers(call, outcome)
        assert all(tensor.isfinite().all() for tensor in found.rows.values())
        assert all(math.isfinite(product) for products in found.products.values() for product in products)
        expert = edge.runtime.experts[FIRST]
        assert all(parameter.isfinite().all() for parameter in expert.block.parameters())
        await check_it_goes_on(edge)

    run(scenario)
