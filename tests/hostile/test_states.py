"""Strangers offer states that nobody trained: no process ends, no trained state is lost, and no such state
is believed.
"""

import hashlib
import json
import struct
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from callers import numbered_identities
from checkpoint_samples import explode, step
from real_swarm import UIDS, Play, Village, playing
from stranger import Stranger
from torch import Tensor

from dht.announcements import ReplicaAnnouncement, ReplicaState
from dht.uid import UID
from expert_server.experts.format import BLOCK, Checkpoint, State, to_bytes
from expert_server.node import Node
from peer.loop import LoopThread
from peer.metrics import total
from peer.wire import state_pb2

OWN_UPDATES, CLAIMED = 3, 20_000
CHUNK = 2**18


@pytest.fixture
def play(loop: LoopThread, tmp_path: Path) -> Play:
    return playing(loop, numbered_identities(3), tmp_path)


def eighty_bytes() -> bytes:
    """A state with a shape of no numbers, for which torch's arithmetic overflows."""
    text = json.dumps({"x": {"dtype": "F32", "shape": [2**63, 0], "data_offsets": [0, 0]}}).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def changed(state: State, change: Callable[[Tensor], Tensor]) -> State:
    """Changes only the weights; the moments stay as they are."""
    return {name: change(tensor) if name.startswith(BLOCK) else tensor for name, tensor in state.items()}


def huge(state: State) -> State:
    return changed(state, lambda tensor: torch.full_like(tensor, 1e30))


def exploding(state: State) -> State:
    """Weights of ordinary size, with moments that make the next step huge."""
    return {
        name: torch.zeros_like(tensor) if name.endswith(".exp_avg_sq") else tensor
        for name, tensor in state.items()
    }


def noise(state: State) -> State:
    """Random weights of ordinary size, so that only training reveals them."""
    generator = torch.Generator().manual_seed(1)
    return changed(state, lambda t: 0.1 * torch.randn(t.shape, generator=generator))


def flipped(state: State) -> State:
    return changed(state, torch.neg)


def doubled(state: State) -> State:
    return changed(state, lambda tensor: 2 * tensor)


def drifted(state: State) -> State:
    return changed(state, lambda tensor: tensor + 0.05)


LIES = (noise, flipped, doubled)
"""Lies of ordinary size."""


class HostileHost:
    """A stranger that announces experts, and sends any bytes that a test wants as their states."""

    def __init__(self, stranger: Stranger) -> None:
        self.given: list[UID] = []
        self._stranger = stranger
        self._states: Mapping[UID, bytes] = {}

    async def offer(self, states: Mapping[UID, bytes]) -> None:
        """Announces these experts with more updates than any peer has."""
        self._states, self.given = states, []
        if not self._stranger.address:
            await self._stranger.serve({"talkoot.v1.StateService/Fetch": self._fetch})
            await self._stranger.publish_node()
        await self._announce(ReplicaState.SERVING, states)

    async def withdraw(self) -> None:
        await self._announce(ReplicaState.WITHDRAWN, self._states)

    def packed(self, states: Mapping[UID, State]) -> dict[UID, bytes]:
        swarm_id = self._stranger.keys.swarm_id
        return {
            uid: to_bytes(Checkpoint(state, CLAIMED), swarm_id, uid, time.time())
            for uid, state in states.items()
        }

    async def _announce(self, state: ReplicaState, uids: Mapping[UID, bytes]) -> None:
        replicas = [ReplicaAnnouncement(uid, state, CLAIMED, time.time()) for uid in uids]
        await self._stranger.swarm.experts.announce(replicas, 60)

    async def _fetch(self, frames: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        uid = UID.parse(state_pb2.FetchRequest.FromString(await anext(frames)).uid)
        self.given.append(uid)
        data = self._states[uid]
        header = state_pb2.StateHeader(
            update_count=CLAIMED, total_bytes=len(data), sha256=hashlib.sha256(data).digest()
        )
        yield state_pb2.FetchReply(header=header).SerializeToString()
        for start in range(0, len(data), CHUNK):
            yield state_pb2.FetchReply(chunk=data[start : start + CHUNK]).SerializeToString()


async def trained(node: Node, updates: int) -> dict[UID, State]:
    """Takes this many more updates with each of the node's experts. Returns their states."""
    for expert in node.runtime.experts.values():
        await node.runtime.run(partial(step, expert, updates))
    return {uid: await node.runtime.run(expert.export_state) for uid, expert in node.runtime.experts.items()}


def test_a_hostile_replica_is_averaged_with_by_nobody(play: Play, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(village: Village) -> None:
        node = await village.found(experts=8, average_every_s=60, replicas=2)
        own = await trained(node, OWN_UPDATES)
        await node.hosting.announce()
        async with Stranger.joined(await node.swarm.invite()) as stranger:
            host = HostileHost(stranger)
            for states in (
                dict.fromkeys(UIDS, eighty_bytes()),
                host.packed({uid: huge(state) for uid, state in own.items()}),
                host.packed({uid: exploding(state) for uid, state in own.items()}),
            ):
                await host.offer(states)
                while set(host.given) != set(UIDS):
                    await node.averaging.average_some()
            plausible = {uid: LIES[n % len(LIES)](state) for n, (uid, state) in enumerate(own.items())}
            await host.offer(host.packed(plausible))
            while set(host.given) != set(UIDS):
                await node.averaging.average_some()
            assert total(node.averaging.refused) >= len(UIDS), "own updates explain none of these"
            assert total(node.averaging.averagings) == 0
        torch.testing.assert_close(await trained(node, 0), own, rtol=0, atol=0)
        assert not any(expert.source for expert in node.runtime.experts.values())

    play(scenario)
    assert not [record for record in caplog.records if record.exc_info]


def test_states_that_outlived_their_host_are_not_lost_to_a_stranger_that_claims_more(play: Play) -> None:
    """The stranger comes when the host has died, and is then the only host of its experts."""

    async def scenario(village: Village) -> None:
        keeper = await village.found(experts=0, spare=8)
        host = await village.join(1, await keeper.swarm.invite(), experts=8)
        own = await trained(host, OWN_UPDATES)
        await host.hosting.announce()
        await keeper.hosting.look()
        await keeper._standby.copy()
        checkpoints = keeper.replicas.checkpoints
        true = await checkpoints.newest_by_source()
        assert true.keys() == set(UIDS)
        await host.swarm.experts.withdraw(UIDS, 60)

        async with Stranger.joined(await keeper.swarm.invite()) as stranger:
            hostile, source = HostileHost(stranger), stranger.peer_id.to_base58()
            for spoil in (huge, exploding, noise):
                await hostile.offer(hostile.packed({uid: spoil(state) for uid, state in own.items()}))
                await keeper.hosting.look()
                await keeper._standby.copy()
                assert set(hostile.given) == set(UIDS)
                taken = {source: CLAIMED} if spoil is noise else {}
                assert await checkpoints.newest_by_source() == {uid: true[uid] | taken for uid in UIDS}
            await hostile.withdraw()

        for _ in range(2):
            await keeper.hosting.look()
        assert keeper.runtime.experts.keys() == set(UIDS)
        for expert in keeper.runtime.experts.values():
            assert expert.source == source
            await keeper.runtime.run(partial(explode, expert))
        await checkpoints.save_changed()
        torch.testing.assert_close(await trained(keeper, 0), own, rtol=0, atol=0)

    play(scenario)


def rushing(state: State) -> State:
    """The parameters of an honest state, with first moments that move them far away in the next steps."""
    return {
        name: 10 * state[f"{name}_sq"].sqrt() if name.endswith(".exp_avg") else tensor
        for name, tensor in state.items()
    }


HARMFUL = (*LIES, drifted, rushing)


async def assert_honest(node: Node, honest: Sequence[Mapping[UID, State]]) -> None:
    """Checks that the node has the parameters of an honest state for each expert, and moments between theirs."""
    for uid, state in (await trained(node, 0)).items():
        of_weights = [
            all(torch.equal(state[name], one[uid][name]) for name in state if name.startswith(BLOCK))
            for one in honest
        ]
        assert any(of_weights), uid
        for name in state.keys() - {name for name in state if name.startswith(BLOCK)}:
            all_of_it = torch.stack([one[uid][name] for one in honest])
            assert (all_of_it.amin(0) <= state[name]).all(), name
            assert (state[name] <= all_of_it.amax(0)).all(), name


def test_of_three_hosts_none_that_is_hostile_gives_its_state_to_who_adopts_or_is_idle(play: Play) -> None:
    """The hostile host claims the most updates, and its state is as large as others."""

    async def scenario(village: Village) -> None:
        one = await village.found(experts=8)
        invite = await one.swarm.invite()
        other = await village.join(1, invite, experts=8, replicas=2)
        await other.hosting.replicate()
        adopter = await village.join(2, invite, experts=0, replicas=1)
        states = [await trained(node, 2 + 3 * n) for n, node in enumerate((one, other))]
        async with Stranger.joined(invite) as stranger:
            host = HostileHost(stranger)

            async def offer(number: int) -> None:
                spoiled = {
                    uid: HARMFUL[(n + number) % len(HARMFUL)](state)
                    for n, (uid, state) in enumerate(states[0].items())
                }
                await host.offer(host.packed(spoiled))
                for node in (one, other):
                    await node.hosting.announce()

            await offer(0)
            assert set(await adopter.replicas.take(UIDS, CLAIMED, enough=4)) == set(UIDS)
            assert set(host.given) == set(UIDS)
            await assert_honest(adopter, states)
            assert {expert.update_count for expert in adopter.runtime.experts.values()} == {5}

            states[:] = [await trained(node, 4) for node in (one, other)]
            await offer(1)
            found = await adopter.swarm.experts.replicas(UIDS)
            for uid in UIDS:
                assert await adopter.replicas.take_whole(uid, found[uid])
            assert set(host.given) == set(UIDS)
            await assert_honest(adopter, states)

    play(scenario)
