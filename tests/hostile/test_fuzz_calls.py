"""Thousands of malformed frames to every service of a node, over a real socket: no crash, no growth, no wrong state."""

import asyncio
import contextlib
import random
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
import torch
from callers import a_caller
from grpc import StatusCode
from memory_in_use import memory_in_use
from stranger import new_identity
from tls_expert_server import (
    FIRST,
    SECOND,
    SWARM,
    Call,
    Edge,
    Runner,
    check_it_goes_on,
    open_blocking_channel,
    run,
    wait_until,
)

from peer import PROTOCOL_VERSION
from peer.wire import admission_pb2, expert_pb2, probe_pb2, session_pb2, state_pb2

__all__ = ["run"]

Frames = list[bytes]
GROWTH_BYTES = 48 * 2**20
"""The most that the process may grow, which holds caller and server: less than 5 KB for each of 10,000 calls."""


@dataclass
class Kind:
    """One way to call a node: valid frames that will be corrupted."""

    path: str
    frames: Frames
    streams: bool = True


def right_calls(edge: Edge, seed: int) -> list[Kind]:
    kinds = []
    calls = [
        ("forward", Call("forward", [FIRST, SECOND], seed=seed)),
        ("forward", Call("forward", [FIRST, SECOND], seed=seed).holding(1, 2, held=[[0, 1], [0, 0]])),
        ("backward", Call("backward", [FIRST, SECOND], seed=seed)),
    ]
    for direction, call in calls:
        half = len(call.payload) // 2
        parts = [
            expert_pb2.CallRequest(header=call.header),
            expert_pb2.CallRequest(chunk=call.payload[:half]),
            expert_pb2.CallRequest(chunk=call.payload[half:]),
        ]
        path = f"/talkoot.v1.ExpertService/{direction.title()}"
        kinds.append(Kind(path, [part.SerializeToString() for part in parts]))
    opening = ANYBODY.statement(edge.identity.peer_id, edge.sessions.challenges.new())
    fetch = state_pb2.FetchRequest(protocol_version=PROTOCOL_VERSION, swarm_id=SWARM, uid=str(FIRST))
    info = expert_pb2.InfoRequest(protocol_version=PROTOCOL_VERSION, swarm_id=SWARM)
    ask = state_pb2.AskRequest(
        protocol_version=PROTOCOL_VERSION,
        swarm_id=SWARM,
        reason=state_pb2.ASK_REASON_ADOPT,
        uids=[str(FIRST)],
    )
    probe = probe_pb2.ProbeRequest(
        protocol_version=PROTOCOL_VERSION, swarm_id=SWARM, payload=b"123", reply_bytes=9
    )
    dial = probe_pb2.DialBackRequest(protocol_version=PROTOCOL_VERSION, swarm_id=SWARM, port=1)
    kinds += [
        Kind("/talkoot.v1.StateService/Fetch", [fetch.SerializeToString()]),
        Kind("/talkoot.v1.StateService/Ask", [ask.SerializeToString()], False),
        Kind("/talkoot.v1.ProbeService/Probe", [probe.SerializeToString()] * 3),
        Kind("/talkoot.v1.ProbeService/DialBack", [dial.SerializeToString()], False),
        Kind("/talkoot.v1.SessionService/Challenge", [b""], False),
        Kind("/talkoot.v1.SessionService/Open", [opening.SerializeToString()], False),
        Kind("/talkoot.v1.SessionService/Open", [with_badge(opening, seed)], False),
        Kind("/talkoot.v1.ExpertService/Info", [info.SerializeToString()], False),
        Kind("/talkoot.v1.ExpertService/Forward", [fetch.SerializeToString()]),
    ]
    return kinds


ANYBODY = a_caller(SWARM, new_identity())


def with_badge(request: session_pb2.OpenRequest, seed: int) -> bytes:
    """A statement with garbage as its badge. Its signature is then wrong, which is checked first."""
    rng = random.Random(seed)
    statement = session_pb2.OpenStatement.FromString(request.statement)
    statement.badge.CopyFrom(
        admission_pb2.Badge(grant=rng.randbytes(99), signature=rng.randbytes(256), holder_signature=b"\0")
    )
    return session_pb2.OpenRequest(
        statement=statement.SerializeToString(), public_key=request.public_key, signature=request.signature
    ).SerializeToString()


def spoilt(frames: Frames, rng: random.Random) -> Frames:
    """Makes one to three changes, to bytes or to the order of frames."""
    frames = list(frames)
    for _ in range(rng.randint(1, 3)):
        n = rng.randrange(len(frames))
        data, at = frames[n], rng.randrange(len(frames[n]) + 1)
        match rng.randrange(8):
            case 0 | 1 | 2:
                frames[n] = data[:at] + rng.randbytes(1) + data[at + 1 :]
            case 3:
                frames[n] = data[:at]
            case 4:
                frames[n] = data[:at] + rng.randbytes(rng.randint(1, 40)) + data[at:]
            case 5:
                frames.insert(n, frames[rng.randrange(len(frames))])
            case 6:
                rng.shuffle(frames)
            case _:
                frames[n] = rng.randbytes(rng.randrange(200))
    return frames


def send(channel: grpc.Channel, edge: Edge, kind: Kind, frames: Frames) -> StatusCode:
    """The status with which the server ended the call."""
    if kind.streams:
        method: Any = channel.stream_stream(kind.path)
        stream = method(iter(frames), timeout=20, metadata=edge.session)
        with contextlib.suppress(grpc.RpcError):
            list(stream)
    else:
        method = channel.unary_unary(kind.path)
        stream = method.future(frames[0], timeout=20, metadata=edge.session)
        stream.exception()  # waits
    code: StatusCode = stream.code()
    return code


# UNAVAILABLE or DEADLINE_EXCEEDED would mean that the node crashed or hung.
NOT_ALLOWED = {StatusCode.UNAVAILABLE, StatusCode.DEADLINE_EXCEEDED, StatusCode.CANCELLED}


@pytest.mark.parametrize(
    "count", [300, pytest.param(9_900, marks=[pytest.mark.slow, pytest.mark.timeout(600)])]
)
def test_no_frames_stop_a_node_make_it_grow_or_spoil_its_experts(run: Runner, count: int) -> None:
    async def scenario(edge: Edge) -> None:
        await check_it_goes_on(edge)
        tasks, seen = len(asyncio.all_tasks()), await asyncio.to_thread(attack, edge, 200, 0)
        before, sessions = memory_in_use(), len(edge.sessions)
        seen = Counter[StatusCode]()
        for part in range(count // 300):
            seen += await asyncio.to_thread(attack, edge, 300, 1 + part)
        assert not NOT_ALLOWED & seen.keys(), seen
        assert sum(seen.values()) == count
        assert len({StatusCode.INVALID_ARGUMENT, StatusCode.UNAUTHENTICATED} & seen.keys()) == 2, seen
        await wait_until(lambda: len(asyncio.all_tasks()) <= tasks, 30)
        assert len(edge.sessions) <= sessions + 1  # of one caller, however often it is let in
        assert memory_in_use() - before < GROWTH_BYTES
        for expert in edge.runtime.experts.values():
            assert all(bool(torch.isfinite(p).all()) for p in expert.block.parameters())
            assert expert.guard.rollbacks == 0
        await check_it_goes_on(edge)

    def attack(edge: Edge, calls: int, seed: int) -> Counter[StatusCode]:
        rng, seen = random.Random(seed), Counter[StatusCode]()
        with open_blocking_channel(edge.address, edge.pem) as channel:
            for number in range(calls):
                kind = rng.choice(right_calls(edge, seed * 10**6 + number))
                seen[send(channel, edge, kind, spoilt(kind.frames, rng))] += 1
        return seen

    run(scenario, max_call_s=5.0, max_kept_bytes=2**20)


def test_a_flood_of_one_peer_over_many_connections_leaves_another_its_share(
    run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All connections of the flooder count as one caller, so the other caller has every second batch."""

    async def scenario(edge: Edge) -> None:
        quiet = edge.as_another()
        served: list[str] = []
        compute = edge.runtime._compute

        def noting(expert: Any, batch: Any) -> Any:
            served.extend(entry.work.caller for entry in batch)
            return compute(expert, batch)

        monkeypatch.setattr(edge.runtime, "_compute", noting)
        release = threading.Event()
        blocked = asyncio.create_task(edge.runtime.run(release.wait))
        threads = ThreadPoolExecutor(48)
        channels = [open_blocking_channel(edge.address, edge.pem) for _ in range(6)]
        try:
            loop = asyncio.get_running_loop()
            calls = [
                loop.run_in_executor(threads, one_call, channel, peer, number)
                for peer, own, each in ((edge, channels[:5], 8), (quiet, channels[5:], 8))
                for channel in own
                for number in range(each)
            ]
            under_way = asyncio.gather(*calls)
            await wait_until(lambda: edge.runtime.queued_rows == 48 * 5, 20)
            release.set()
            await under_way
        finally:
            release.set()
            await blocked
            threads.shutdown(wait=False)
            for channel in channels:
                channel.close()
        others = edge.sessions.find(quiet.session[0][1], session_pb2.RIGHT_FORWARD).name
        last = len(served) - 1 - served[::-1].index(others)
        assert served.count(others) == 8
        assert last + 1 <= 2 * 8 + 1, served  # at least half of what was done meanwhile

    def one_call(channel: grpc.Channel, edge: Edge, seed: int) -> None:
        list(edge.stub_on(channel).Forward(iter(Call(seed=seed).requests), timeout=30))

    run(scenario, max_batch_rows=5)
