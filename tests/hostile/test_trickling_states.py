"""A peer that sends states very slowly delays neither other states nor itself for ever."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from callers import numbered_identities
from checkpoint_samples import AN_UID
from real_swarm import UIDS, Play, Village, end, eventually, train
from real_swarm import playing as playing_village
from state_peers import Scenario, Street, playing
from stranger import Stranger

from dht.announcements import ReplicaAnnouncement, ReplicaState
from dht.invites import Invite
from dht.uid import UID
from expert_server.state.servicer import FetchHint
from peer.errors import TransferError
from peer.identity import Identity
from peer.loop import LoopThread
from peer.metrics import total
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


@contextlib.asynccontextmanager
async def trickling(invite: Invite) -> AsyncIterator[tuple[Stranger, list[Any]]]:
    """A stranger that says it is a node, whose states trickle, and the calls for them so far."""
    calls: list[Any] = []

    async def fetch(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        calls.append(context)
        async for reply in trickle():
            yield reply.SerializeToString()

    async with Stranger.joined(invite) as stranger:
        await stranger.serve({"talkoot.v1.StateService/Fetch": fetch})
        await stranger.publish_node()
        yield stranger, calls


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
        async with trickling(await honest.swarm.invite()) as (stranger, asked):
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

            async def is_asked() -> bool:
                return bool(asked)

            await eventually(is_asked)

    play(scenario)


@pytest.mark.parametrize("initiator", ["stranger", "node"])
def test_a_node_averages_with_others_while_a_replica_trickles(
    play: Play, monkeypatch: pytest.MonkeyPatch, initiator: str
) -> None:
    """The stranger claims to host all experts. It asks the node to average each, or waits until the node asks."""
    monkeypatch.setattr("peer.rpc.transfer.GRACE_S", 1000.0)
    monkeypatch.setattr("peer.rpc.transfer._FAIR_S", 0.5)

    async def scenario(village: Village) -> None:
        every_s = 60.0 if initiator == "stranger" else 0.5
        node = await village.found(experts=8, replicas=2, average_every_s=every_s)
        honest = await village.join(1, await node.swarm.invite(), experts=8, replicas=2, average_every_s=60.0)
        await honest.hosting.replicate()
        (node_info,) = (await honest.swarm.registry.nodes([node.swarm.host.peer_id])).values()
        async with trickling(await node.swarm.invite()) as (stranger, asked):
            theirs = [ReplicaAnnouncement(uid, ReplicaState.SERVING, 9) for uid in UIDS]
            await stranger.swarm.experts.announce(theirs, 300.0)
            await node.hosting.look()
            running = asyncio.create_task(node.averaging.run())

            async def is_occupied() -> bool:
                if initiator == "stranger":
                    for uid in UIDS:
                        base = (await node.averaging._snapshots.take(uid)).sha256
                        hint = FetchHint(stranger.peer_id, (uid,), bytes(32), base, group="elsewhere")
                        node.averaging.accept_hint(hint)
                return len(asked) >= 4

            await eventually(is_occupied)
            before = total(node.averaging.averagings)

            async def averaged_all() -> bool:
                for each in (node, honest):
                    await train(each, dict.fromkeys(UIDS, 1))
                for uid in UIDS if initiator == "stranger" else ():
                    await honest.averaging.meet(uid, node_info)
                return total(node.averaging.averagings) - before >= len(UIDS)

            await eventually(averaged_all)
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running

    play(scenario)


def test_a_node_adopts_experts_of_others_while_those_of_a_stranger_trickle(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stranger offers four experts, and asks the node to adopt each of them as soon as it has begun with another.
    Nothing is left of the adoption that makes way, and the node still leaves in order.
    """
    monkeypatch.setattr("peer.rpc.transfer.GRACE_S", 1000.0)
    monkeypatch.setattr("peer.rpc.transfer._FAIR_S", 0.5)

    async def scenario(village: Village) -> None:
        node = await village.found(experts=0, spare=8)
        leaver = await village.join(1, await node.swarm.invite(), experts=4)
        good = {*leaver.runtime.experts}
        offered = [uid for uid in UIDS if uid not in good]
        async with trickling(await node.swarm.invite()) as (stranger, asked):
            theirs = [ReplicaAnnouncement(uid, ReplicaState.LEAVING, 9) for uid in offered]
            await stranger.swarm.experts.announce(theirs, 300.0)
            running = asyncio.create_task(node.averaging.run())
            await asyncio.sleep(0)
            for number, uid in enumerate(offered, 1):
                node.averaging.accept_hint(FetchHint(stranger.peer_id, (uid,), group="elsewhere"))

                async def is_asked_again(number: int = number) -> bool:
                    return len(asked) >= number

                await eventually(is_asked_again)
            await leaver.replicas.offer(good)
            leaver_id = leaver.swarm.host.peer_id
            assert node.averaging.accept_hint(FetchHint(leaver_id, tuple(good), group="home")) == len(good)

            async def has_adopted() -> bool:
                return node.runtime.experts.keys() >= good

            await eventually(has_adopted)
            assert len(good) == len(offered) == 4

            def claimed() -> set[UID]:
                return {*node.replicas.held} - good

            async def is_withdrawn() -> bool:
                found = await leaver.swarm.experts.replicas(offered)
                claims = {uid for uid, hosts in found.items() for r in hosts if r.peer_id != stranger.peer_id}
                return len(claimed()) == 3 and claims == claimed()

            await eventually(is_withdrawn)
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running
            assert not claimed()

    play(scenario)


def test_a_node_copies_experts_of_others_while_those_of_a_stranger_trickle(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stranger claims that each of its experts has by far the most updates."""
    monkeypatch.setattr("peer.rpc.transfer.GRACE_S", 1000.0)

    async def scenario(village: Village) -> None:
        keeper = await village.found(experts=0, spare=8)
        honest = await village.join(1, await keeper.swarm.invite(), experts=4)
        good = {*honest.runtime.experts}
        await train(honest, dict.fromkeys(good, 3))
        await honest.hosting.announce()
        async with trickling(await keeper.swarm.invite()) as (stranger, asked):
            theirs = [ReplicaAnnouncement(uid, ReplicaState.SERVING, 20) for uid in UIDS if uid not in good]
            await stranger.swarm.experts.announce(theirs, 300.0)
            me = keeper.swarm.host.peer_id
            # so that it is this node that copies whatever has one host
            monkeypatch.setattr(
                "expert_server.hosting.placement.preference", lambda _, peer: bytes([peer == me])
            )
            await keeper.hosting.look()
            copying = asyncio.create_task(keeper._standby.copy())

            async def has_copied() -> bool:
                return total(keeper._standby.copied) == len(good)

            await eventually(has_copied)
            assert len(asked) == 1 < len(theirs) == 4
            assert not copying.done()
            await end(copying)

    play(scenario)
