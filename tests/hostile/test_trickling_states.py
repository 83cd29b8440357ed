"""A peer that sends states very slowly delays neither other states nor itself for ever."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from callers import numbered_identities
from checkpoint_samples import AN_UID
from real_swarm import UIDS, Play, Village, eventually
from real_swarm import playing as playing_village
from state_peers import Scenario, Street, playing
from stranger import Stranger

from dht.announcements import ReplicaAnnouncement, ReplicaState
from peer.errors import TransferError
from peer.identity import Identity
from peer.loop import LoopThread
from peer.wire import state_pb2, state_pb2_grpc

SIZE = 10_000
HEADER = state_pb2.FetchReply(
    header=state_pb2.StateHeader(update_count=9, total_bytes=SIZE, sha256=bytes(32))
)


async def trickle() -> AsyncIterator[state_pb2.FetchReply]:
    yield HEADER
    for _ in range(SIZE):
        yield state_pb2.FetchReply(chunk=b"1")
        await asyncio.sleep(0.05)


class Trickler(state_pb2_grpc.StateServiceServicer):
    async def Fetch(self, request: Any, context: Any) -> AsyncIterator[state_pb2.FetchReply]:
        async for reply in trickle():
            yield reply


@pytest.fixture
def play(loop: LoopThread, tmp_path: Path) -> Play:
    return playing_village(loop, numbered_identities(2), tmp_path)


@pytest.fixture
def play_in_street(
    loop: LoopThread, identity: Identity, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Scenario], None]:
    return playing(loop, identity, monkeypatch)


def test_a_state_that_trickles_is_given_up(
    play_in_street: Callable[[Scenario], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peer.rpc.transfer.GRACE_S", 0.3)

    async def scenario(street: Street) -> None:
        await street.serve(Trickler())
        async with asyncio.timeout(60):
            with pytest.raises(TransferError, match="it stalled, or came slower"):
                await street.client.fetch(street.node, AN_UID)

    play_in_street(scenario)


def test_a_node_takes_other_experts_while_some_trickle(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peer.rpc.transfer.GRACE_S", 1000.0)  # one that trickles is not given up meanwhile

    async def scenario(village: Village) -> None:
        honest = await village.found(experts=6, spare=0, replicas=2)
        await village.run(honest)
        async with Stranger.joined(await honest.swarm.invite()) as stranger:
            asked = asyncio.Event()

            async def fetch(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
                asked.set()
                async for reply in trickle():
                    yield reply.SerializeToString()

            await stranger.serve({"talkoot.v1.StateService/Fetch": fetch})
            await stranger.publish_node()
            theirs = [
                ReplicaAnnouncement(uid, ReplicaState.SERVING, 9)
                for uid in UIDS
                if uid not in honest.runtime.experts
            ]
            await stranger.swarm.experts.announce(theirs, 60.0)
            newcomer = await village.join(1, await honest.swarm.invite(), experts=8, replicas=2)
            await village.run(newcomer)

            async def has_the_others() -> bool:
                return set(newcomer.runtime.experts) >= set(honest.runtime.experts)

            await eventually(has_the_others)
            assert len(theirs) == 2
            await asyncio.wait_for(asked.wait(), 60)

    play(scenario)
