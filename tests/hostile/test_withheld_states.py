"""A peer that announces experts, and says again and again that it is too busy to give a state, holds nobody up."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from callers import numbered_identities, numbered_identity
from checkpoint_samples import AN_UID
from real_swarm import UIDS, Play, Village, train
from real_swarm import playing as playing_village
from state_peers import Scenario, Street, playing
from stranger import Stranger

from dht.announcements import NodeInfo, ReplicaAnnouncement, ReplicaState
from expert_server.experts.format import Checkpoint
from expert_server.hosting.whole_states import _given
from expert_server.state.servicer import FetchHint
from peer.errors import TransferError
from peer.identity import Identity, PeerID
from peer.loop import LoopThread
from peer.metrics import total
from peer.wire import state_pb2_grpc


@pytest.fixture
def play(loop: LoopThread, tmp_path: Path) -> Play:
    return playing_village(loop, numbered_identities(2), tmp_path)


@pytest.fixture
def play_in_street(
    loop: LoopThread, identity: Identity, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Scenario], None]:
    return playing(loop, identity, monkeypatch)


def test_a_download_ends_although_the_peer_goes_on_saying_that_it_is_busy(
    play_in_street: Callable[[Scenario], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peer.rpc.transfer._PATIENCE_S", 0.5)
    asked = 0

    class Busy(state_pb2_grpc.StateServiceServicer):
        async def Fetch(self, request: Any, context: Any) -> Any:
            nonlocal asked
            asked += 1
            await asyncio.sleep(0.3)
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "busy")

    async def scenario(street: Street) -> None:
        await street.serve(Busy())
        with pytest.raises(TransferError, match="did not arrive: RESOURCE_EXHAUSTED: busy"):
            await street.client.fetch(street.node, AN_UID)

    play_in_street(scenario)
    assert asked == 2


def test_replicas_go_on_averaging_beside_a_stranger_that_withholds_its_states(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peer.rpc.transfer._PATIENCE_S", 0.1)
    monkeypatch.setattr("expert_server.hosting.averaging._SOON_S", 0.2)

    async def scenario(village: Village) -> None:
        victim = await village.found(experts=8, replicas=2, average_every_s=60.0)
        honest = await village.join(1, await victim.swarm.invite(), experts=8, replicas=2)
        await honest.hosting.replicate()
        async with Stranger.joined(await victim.swarm.invite()) as stranger:
            asked = 0

            async def fetch(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
                nonlocal asked
                asked += 1
                await asyncio.sleep(0.3)
                await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "busy")
                yield b""

            await stranger.serve({"talkoot.v1.StateService/Fetch": fetch})
            await stranger.publish_node()
            said = [ReplicaAnnouncement(uid, ReplicaState.SERVING, 9) for uid in UIDS]
            await stranger.swarm.experts.announce(said, 60.0)

            async def averaged() -> float:
                """How often the victim averages in one round."""
                before = total(victim.averaging.averagings)
                for node in (victim, honest):
                    await train(node, dict.fromkeys(UIDS, 1))
                await honest.hosting.announce()
                await victim.hosting.announce()
                await victim.hosting.look()
                await victim.averaging.average_some()
                return total(victim.averaging.averagings) - before

            async with asyncio.timeout(60):
                while not asked:
                    await averaged()
            before = asked
            assert [await averaged() for _ in range(3)] == [4, 4, 4], "half of the experts each time"
            peer_id = stranger.swarm.host.peer_id
            hint = FetchHint(peer_id, (UIDS[0],), bytes(32), bytes(32), group="a line")
            await victim.averaging._follow_average(hint)
            assert asked == before, "it is left alone"

    play(scenario)


@pytest.mark.parametrize(("waits_s", "is_skipped"), [(0.0, False), (0.2, True)])
def test_a_host_that_is_slow_to_refuse_is_not_asked_for_the_next_expert(
    loop: LoopThread, monkeypatch: pytest.MonkeyPatch, waits_s: float, is_skipped: bool
) -> None:
    monkeypatch.setattr("expert_server.hosting.whole_states._SOON_S", 0.1)
    nodes = [
        NodeInfo(peer_id=numbered_identity(n).peer_id, addresses=(), certificate_pem=b"", expires_at=1e12)
        for n in (1, 2)
    ]
    honest, busy = nodes
    asked = list[PeerID]()

    async def fetch(node: NodeInfo) -> Checkpoint:
        asked.append(node.peer_id)
        if node is honest:
            return Checkpoint({}, 1)
        await asyncio.sleep(waits_s)
        raise TransferError("RESOURCE_EXHAUSTED: busy", answered=True)

    unreachable = set[PeerID]()
    for uid in UIDS[:2]:
        given = loop.run(_given(uid, nodes, fetch, unreachable), 60)
        assert [peer_id for peer_id, _ in given] == [honest.peer_id]
    assert unreachable == ({busy.peer_id} if is_skipped else set())
    assert asked.count(busy.peer_id) == (1 if is_skipped else 2)
