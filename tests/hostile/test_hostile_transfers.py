"""Peers that fetch states slowly, or break off, leave slots, memory and time for others."""

import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest
from checkpoint_samples import AN_UID, make_expert, step
from state_peers import SWARM, Scenario, Street, playing
from stranger import HostileCaller, new_identities

from dht.manifest import Manifest
from expert_server.experts.expert import Expert
from expert_server.state import transfer
from peer import PROTOCOL_VERSION
from peer.identity import Identity
from peer.loop import LoopThread
from peer.rpc.channels import CLIENT_OPTIONS
from peer.wire import state_pb2

FETCH = "talkoot.v1.StateService/Fetch"
REQUEST = state_pb2.FetchRequest(protocol_version=PROTOCOL_VERSION, swarm_id=SWARM, uid=str(AN_UID))
LARGE = Manifest.model_validate(
    {
        "name": "sauna",
        "model": {"layers": 2, "hidden": 256, "heads": 2, "context": 8, "feed_forward": 256},
        "experts": {"grid": [2, 2]},
        "routing": {"top_k": 2},
    }
)
"""A state of its experts is larger than what gRPC buffers for a peer that does not read."""


@pytest.fixture
def play(loop: LoopThread, identity: Identity, monkeypatch: pytest.MonkeyPatch) -> Callable[[Scenario], None]:
    return playing(loop, identity, monkeypatch)


@contextlib.asynccontextmanager
async def strangers(street: Street, count: int) -> AsyncIterator[list[HostileCaller]]:
    async with contextlib.AsyncExitStack() as stack:
        callers = [HostileCaller(street.node, SWARM, identity) for identity in new_identities(count)]
        for caller in callers:
            stack.push_async_callback(caller.close)
            await caller.open_session()
        yield callers


async def begin(caller: HostileCaller) -> Any:
    """Begins to fetch a state, and reads only the first message."""
    stream = caller.stream(FETCH)
    await stream.write(REQUEST.SerializeToString())
    await stream.done_writing()
    with contextlib.suppress(grpc.aio.AioRpcError):
        await stream.read()
    return stream


@pytest.mark.parametrize(("peers", "each"), [(1, 9), (3, 3)])
def test_slow_readers_do_not_keep_an_honest_peer_from_a_state(
    play: Callable[[Scenario], None], monkeypatch: pytest.MonkeyPatch, peers: int, each: int
) -> None:
    monkeypatch.setattr("state_peers.MANIFEST", LARGE)
    monkeypatch.setattr("peer.rpc.transfer.CHUNK_BYTES", 2**16)
    narrow = [(name, 2**16 if "lookahead" in name else value) for name, value in CLIENT_OPTIONS]
    monkeypatch.setattr("stranger.CLIENT_OPTIONS", narrow)

    async def scenario(street: Street) -> None:
        await street.host(Expert(AN_UID, LARGE), max_transfers=4)
        async with strangers(street, peers) as callers:
            streams = [await begin(caller) for caller in callers for _ in range(each)]
            for _ in range(3):
                await street.client.fetch(street.node, AN_UID)
            for stream in streams:
                stream.cancel()

    play(scenario)


def test_fetches_begun_and_broken_off_make_few_snapshots(
    play: Callable[[Scenario], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "_PEER_BURST_S", 1e-6)  # the first one is one too many
    made, encode = list[int](), transfer._encode

    def counted(checkpoint: Any, *arguments: Any) -> tuple[bytes, bytes]:
        made.append(checkpoint.update_count)
        return encode(checkpoint, *arguments)

    monkeypatch.setattr(transfer, "_encode", counted)

    async def scenario(street: Street) -> None:
        expert = make_expert(1)
        runtime = await street.host(expert)
        async with strangers(street, 1) as (caller,):
            for _ in range(40):
                (await begin(caller)).cancel()
                await runtime.run(lambda: step(expert))
            assert len(made) < 10
            fetched = await street.client.fetch(street.node, AN_UID)
            assert fetched.checkpoint.update_count == 41, "others get the state as it is"

    play(scenario)
