"""A peer that announces experts, and says again and again that it is too busy to give a state, holds nobody up."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest
from checkpoint_samples import AN_UID
from real_swarm import UIDS, Play, Village, train
from state_peers import Scenario, Street, header_of
from stranger import Stranger
from test_trickling_states import play, play_in_street

from dht.announcements import NodeInfo, ReplicaAnnouncement, ReplicaState
from dht.invites import Invite
from dht.uid import UID
from expert_server.state.servicer import FetchHint
from expert_server.state.transfer import Fetched, Withholding
from peer.errors import StateError, TransferError
from peer.identity import PeerID
from peer.metrics import total
from peer.wire import state_pb2, state_pb2_grpc

__all__ = ["play", "play_in_street"]


@pytest.fixture
def impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits long for a peer that is busy."""
    monkeypatch.setattr("peer.rpc.transfer._PATIENCE_S", 0.1)
    monkeypatch.setattr("expert_server.state.transfer._SOON_S", 0.2)


@contextlib.asynccontextmanager
async def withholding(invite: Invite) -> AsyncIterator[tuple[PeerID, list[float]]]:
    """A stranger that announces all experts, and refuses to give any after 0.3 s. Yields its PeerID, and an entry for
    each call.
    """
    asked = list[float]()

    async def fetch(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        asked.append(time.monotonic())
        await asyncio.sleep(0.3)
        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "busy")
        yield b""

    async with Stranger.joined(invite) as stranger:
        await stranger.serve({"talkoot.v1.StateService/Fetch": fetch})
        await stranger.publish_node()
        said = [ReplicaAnnouncement(uid, ReplicaState.SERVING, 9) for uid in UIDS]
        await stranger.swarm.experts.announce(said, 60.0)
        yield stranger.swarm.host.peer_id, asked


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
    assert 1 <= asked < 20


@pytest.mark.usefixtures("impatience")
def test_a_peer_that_sends_nonsense_slowly_is_left_alone_but_not_one_that_sends_it_soon(
    play_in_street: Callable[[Scenario], None],
) -> None:
    delays_s = iter((0.0, 0.3))

    class Nonsense(state_pb2_grpc.StateServiceServicer):
        async def Fetch(self, request: Any, context: Any) -> Any:
            await asyncio.sleep(next(delays_s))
            for reply in (header_of(b"nonsense"), state_pb2.FetchReply(chunk=b"nonsense")):
                yield reply

    async def scenario(street: Street) -> None:
        await street.serve(Nonsense())
        for _ in range(2):
            assert not street.client.is_withholding(street.node.peer_id)
            with pytest.raises(StateError, match="can't be read"):
                await street.client.fetch(street.node, AN_UID)
        assert street.client.is_withholding(street.node.peer_id)

    play_in_street(scenario)


def test_a_peer_that_gives_one_state_is_not_blamed_for_another_that_comes_late() -> None:
    withholding, peer_id = Withholding(), PeerID(b"\x12\x20" + bytes(32))
    withholding.gave(peer_id, now=9.0)
    withholding.failed(peer_id, began=0.0, now=40.0)
    assert not withholding.includes(peer_id, now=40.0)
    withholding.failed(peer_id, began=40.0, now=41.0)
    assert not withholding.includes(peer_id, now=41.0), "it failed soon"
    withholding.failed(peer_id, began=40.0, now=80.0)
    assert withholding.includes(peer_id, now=139.0)
    assert not withholding.includes(peer_id, now=141.0)
    withholding.failed(peer_id, began=141.0, now=180.0)
    withholding.gave(peer_id, now=181.0)
    assert not withholding.includes(peer_id, now=182.0)


@pytest.mark.usefixtures("impatience")
def test_replicas_go_on_averaging_beside_a_stranger_that_withholds_its_states(play: Play) -> None:
    async def scenario(village: Village) -> None:
        victim = await village.found(experts=8, replicas=2, average_every_s=60.0)
        honest = await village.join(1, await victim.swarm.invite(), experts=8, replicas=2)
        await honest.hosting.replicate()
        async with withholding(await victim.swarm.invite()) as (stranger, asked):

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
            before = len(asked)
            assert all([await averaged() for _ in range(3)])
            hint = FetchHint(stranger, (UIDS[0],), bytes(32), bytes(32), group="a line")
            await victim.averaging._follow_average(hint)
            assert len(asked) == before, "it is left alone"

    play(scenario)


@pytest.mark.usefixtures("impatience")
def test_a_newcomer_does_not_wait_for_a_stranger_again_and_again_if_others_give_their_states(
    play: Play,
) -> None:
    async def scenario(village: Village) -> None:
        honest = await village.found(experts=8, replicas=2)
        await train(honest, dict.fromkeys(UIDS, 3))
        await honest.hosting.announce()
        async with withholding(await honest.swarm.invite()) as (_, asked):
            newcomer = await village.join(1, await honest.swarm.invite(), experts=8, replicas=3)
            await newcomer.hosting.replicate()
            assert {expert.update_count for expert in newcomer.runtime.experts.values()} == {3}
            assert len(newcomer.runtime.experts) == len(UIDS)
            assert 0 < len(asked) <= 3, "three experts are fetched at a time"

    play(scenario)


@pytest.mark.usefixtures("impatience")
def test_a_stranger_that_withholds_its_states_keeps_nobody_from_copying_those_of_others(play: Play) -> None:
    async def scenario(village: Village) -> None:
        keeper = await village.found(experts=0, spare=8)
        async with withholding(await keeper.swarm.invite()) as (_, asked):
            for _ in range(2):
                await keeper.hosting.look()
                await keeper._standby.copy()
            assert 0 < len(asked) <= 3, "of eight experts, three are fetched at a time"

    play(scenario)


def test_an_only_host_that_is_busy_at_first_is_asked_for_its_other_experts_too(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("expert_server.state.transfer._SOON_S", 0.0)

    async def scenario(village: Village) -> None:
        honest = await village.found(experts=8)
        await train(honest, dict.fromkeys(UIDS, 3))
        await honest.hosting.announce()
        newcomer = await village.join(1, await honest.swarm.invite(), experts=8, replicas=2)
        fetch, refused = newcomer.replicas.states.fetch, list[UID]()

        async def fetch_later(node: NodeInfo, uid: UID) -> Fetched:
            if len(refused) < 2:
                refused.append(uid)
                raise TransferError("RESOURCE_EXHAUSTED: busy", answered=True)
            return await fetch(node, uid)

        monkeypatch.setattr(newcomer.replicas.states, "fetch", fetch_later)
        await newcomer.hosting.replicate()
        assert {*newcomer.runtime.experts} == {*UIDS} - {*refused}

    play(scenario)
