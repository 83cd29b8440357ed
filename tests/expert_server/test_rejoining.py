"""A peer comes back to its swarm: through remembered peers, after an outage, and from a separated half of it."""

import asyncio
import contextlib
import logging
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from unittest.mock import AsyncMock

import pytest
from callers import numbered_identities
from dht_peers import forget_all
from real_swarm import (
    LOCAL,
    MANIFEST,
    ONCE_EACH,
    UIDS,
    Play,
    Village,
    end,
    eventually,
    playing,
    serving,
)

from dht.announcements import NodeInfo
from dht.experts import ExpertRegistry
from dht.membership import Membership, PeerStore
from dht.records import RecordValidator, SwarmKeys
from dht.registry import Registry
from dht.swarm import Swarm, found_swarm, join_swarm
from expert_server.node import Node
from expert_server.status import NodeState
from peer.errors import SwarmError, UnreachableError
from peer.host import Host, NetworkConfig
from peer.identity import Identity
from peer.kademlia.lookups import Lookups
from peer.loop import LoopThread
from peer.metrics import new_registry
from peer.transport.addresses import Multiaddress


@pytest.fixture(scope="module")
def identities() -> list[Identity]:
    return numbered_identities(4)


@pytest.fixture
def play(loop: LoopThread, identities: list[Identity], tmp_path: Path) -> Play:
    return playing(loop, identities, tmp_path)


async def knows(node: Node, other: Node) -> bool:
    """Whether the node would find the other one after a restart."""
    saved = PeerStore(node.swarm.peer_store._path).addresses()
    return any(address.peer_id == other.swarm.host.peer_id for address in saved)


async def at_least_once(swarm: Swarm) -> bool:
    return set(await serving(swarm)) == set(UIDS)


def test_a_dead_founder_keeps_nobody_out_and_comes_back_with_the_same_command(
    play: Play, long_lives: None
) -> None:
    async def scenario(village: Village) -> None:
        async def found() -> Node:
            state = village.folder / "founder"
            swarm = await found_swarm(village.identities[0], MANIFEST, NetworkConfig(LOCAL), state=state)
            return await village.start(swarm, {"experts": 4, "announce_every_s": 0.5})

        async def join(number: int) -> Node:
            state = village.folder / str(number)
            swarm = await join_swarm(village.identities[number], invite, NetworkConfig(LOCAL), state=state)
            return await village.start(swarm, {"experts": 4, "spare": 4, "announce_every_s": 0.5})

        founder = await found()
        invite = await founder.swarm.invite()
        others = [await join(n) for n in (1, 2)]
        running = [await village.run(node) for node in (founder, *others)]
        for node, other in ((founder, others[0]), (others[1], others[0])):
            await eventually(lambda node=node, other=other: knows(node, other))  # type: ignore[misc]
        record = founder.swarm.manifest_record.newest.data
        assert len((await others[0].swarm.invite()).bootstrap) > len(invite.bootstrap)

        await end(running[0])
        await founder.swarm.host.stop()  # no farewell
        await end(running[2])
        await others[1].stop()
        late = await join(2)  # by an invite that names only the dead founder
        await village.run(late)
        assert late.swarm.host.peers() == {others[0].swarm.host.peer_id}

        back = await found()
        await village.run(back)
        all_of_them = {n.swarm.host.peer_id for n in (back, others[0], late)}

        async def lists_all(swarm: Swarm) -> bool:
            return await swarm.registry.node_ids() == all_of_them

        assert back.swarm.manifest_record.newest.data == record
        assert back.swarm.manifest_record.expires_at == founder.swarm.manifest_record.expires_at
        await eventually(lambda: at_least_once(back.swarm))
        for node in (others[0], late):
            await eventually(lambda node=node: at_least_once(node.swarm))  # type: ignore[misc]
            await eventually(lambda node=node: lists_all(node.swarm))  # type: ignore[misc]

        await back.stop()
        changed = MANIFEST.model_copy(update={"routing": MANIFEST.routing.model_copy(update={"top_k": 1})})
        with pytest.raises(SwarmError, match="was founded with another manifest"):
            await found_swarm(
                village.identities[0], changed, NetworkConfig(LOCAL), state=village.folder / "founder"
            )

    play(scenario)


async def other_half(village: Village, swarm: Swarm) -> Swarm:
    """Another peer of the same swarm, which knows nobody but remembers where this one is."""
    identity = village.identities[1]
    host = await Host.start(
        identity, NetworkConfig(LOCAL), swarm_id=swarm.keys.swarm_id, validator=RecordValidator()
    )
    registry = Registry(host.dht, swarm.keys, identity)
    peer_store = PeerStore(None)
    peer_store.add(swarm.host.bootstrap_addresses(), time.time())
    membership = Membership(host, registry, peer_store, dial_every_s=0.0)
    return replace(
        swarm,
        host=host,
        registry=registry,
        experts=ExpertRegistry(registry, swarm.manifest),
        membership=membership,
        peer_store=peer_store,
        metrics=new_registry(),
    )


def test_two_halves_of_a_swarm_find_each_other(play: Play, long_lives: None) -> None:
    async def scenario(village: Village) -> None:
        first = await village.found(experts=4, spare=0, announce_every_s=0.5)
        apart = await other_half(village, first.swarm)
        second = await village.start(apart, {"experts": 8, "announce_every_s": 0.5})
        await village.run(first)
        assert first.swarm.host.peers() == second.swarm.host.peers() == frozenset()
        assert set(second.runtime.experts) == set(UIDS), "nothing is known of the other half"

        with pytest.raises(UnreachableError, match=r"rejoining through 1 known peer$"):
            await apart.membership.check(announced=True)
        await village.run(second)
        both = Counter([*first.runtime.experts, *second.runtime.experts])

        async def are_one() -> bool:
            return await serving(first.swarm) == await serving(second.swarm) == both

        await eventually(are_one)
        assert second.status().state is NodeState.SERVING

    play(scenario)


def test_a_remembered_peer_is_dialled_now_and_then_even_when_all_looks_well(play: Play) -> None:
    async def scenario(village: Village) -> None:
        halves = [await village.found(experts=1, spare=0)]
        apart = await other_half(village, halves[0].swarm)
        village.stack.push_async_callback(apart.stop)
        third = await join_swarm(village.identities[2], await apart.invite(), NetworkConfig(LOCAL))
        village.stack.push_async_callback(third.stop)
        assert apart.host.peers() == {third.host.peer_id}
        await apart.membership.check(announced=False)

        async def are_one() -> bool:
            return halves[0].swarm.host.peer_id in apart.host.peers()

        await eventually(are_one)

    play(scenario)


def test_a_peer_sees_through_others_that_its_announcement_is_gone_and_joins_again(
    play: Play, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    async def scenario(village: Village) -> None:
        first = await village.found(experts=2, spare=0)
        second = await village.join(1, await first.swarm.invite(), experts=2, spare=0)
        swarm = second.swarm
        assert await swarm.registry.is_seen_by_others()
        forget_all(first.swarm.host.dht.storage)
        now = asyncio.get_running_loop().time
        swarm.host.dht.backoff.failed(first.swarm.host.peer_id, now())  # as after a call
        assert await swarm.registry.nodes([swarm.host.peer_id]), "its own store answers"
        assert not await swarm.registry.is_seen_by_others()
        with pytest.raises(UnreachableError, match=r"no other peer returned .* rejoining through"):
            await swarm.membership.check(announced=True)
        assert not swarm.host.dht.backoff.holds_back(first.swarm.host.peer_id, now())
        await second._publish_record()
        assert "see this one again" not in caplog.text
        for _ in range(2):
            await swarm.membership.check(announced=True)
        assert caplog.text.count("other peers see this one again") == 1

    play(scenario)


def test_a_peer_that_announces_nothing_looks_each_time_for_those_that_were_lost(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trainer waits for experts only a minute, and the nodes may be back before that."""

    async def scenario(village: Village) -> None:
        first = await village.found(experts=2, spare=0)
        second = await village.join(1, await first.swarm.invite(), experts=2, spare=0)
        host, check = first.swarm.host, first.swarm.membership.check
        await check(announced=True)
        await second.swarm.host.stop()  # no farewell
        tried = 0
        join = host.join

        async def counted(addresses: Sequence[Multiaddress]) -> list[Multiaddress]:
            nonlocal tried
            tried += 1
            return await join(addresses)

        for _ in range(3):  # so that it finds out that it is alone
            with contextlib.suppress(UnreachableError):
                await check(announced=True)
        assert not host.peers()
        monkeypatch.setattr(host, "join", counted)
        for _ in range(3):
            await check(announced=True)
        assert tried == 0
        for _ in range(3):
            await check(announced=False)
        assert tried == 3

    play(scenario)


def test_the_last_peer_says_that_nobody_answers_and_goes_on_alone(
    play: Play, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(village: Village) -> None:
        first = await village.found(experts=2, spare=0)
        second = await village.join(1, await first.swarm.invite(), experts=2, spare=0)
        check = first.swarm.membership.check
        await check(announced=True)
        await second.swarm.host.stop()  # no farewell
        for _ in range(2):
            with pytest.raises(UnreachableError, match="no other node of the swarm answers"):
                await check(announced=True)
        for _ in range(3):
            await check(announced=True)
        assert caplog.text.count("no other node of the swarm answers: this one continues to serve") == 1
        await village.join(1, await first.swarm.invite(), experts=2, spare=0)
        await first._publish_record()
        await check(announced=True)

    play(scenario)


def test_the_last_peer_does_not_warn_if_the_others_said_goodbye(
    play: Play, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    async def scenario(village: Village) -> None:
        first = await village.found(experts=2, spare=0)
        second = await village.join(1, await first.swarm.invite(), experts=2, spare=0)
        check = first.swarm.membership.check
        await check(announced=True)
        await second.stop()
        for _ in range(5):
            await check(announced=True)
        assert caplog.text.count("all other nodes have left: this one continues to serve") == 1
        assert "no other node" not in caplog.text

    play(scenario)


def test_a_trainer_that_forgot_everybody_in_an_outage_finds_them_again(
    play: Play, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(village: Village) -> None:
        node = await village.found(experts=8)
        trainer = await village.observe(1, await node.swarm.invite())
        assert await serving(trainer) == ONCE_EACH
        table = trainer.host.dht.table

        async def has_forgotten() -> bool:
            for node, _ in list(table):
                table.remove(node)
            trainer.registry.lookups = Lookups(trainer.host.dht)
            with contextlib.suppress(UnreachableError):
                await serving(trainer)
            return not trainer.host.peers()

        await eventually(has_forgotten)  # answers on their way bring peers back
        keeping = asyncio.create_task(trainer.membership.keep(0.1))
        try:
            await eventually(lambda: sees_all(trainer))
        finally:
            await end(keeping)
        assert "no DHT peer was left: rejoining through 1 known peer" in caplog.text
        assert "announced" not in caplog.text

    play(scenario)


async def sees_all(swarm: Swarm) -> bool:
    return await serving(swarm) == ONCE_EACH


def test_two_nodes_with_one_identity_warn_their_owners(
    play: Play, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, long_lives: None
) -> None:
    monkeypatch.setattr("dht.membership._ROUNDS_APART", 1)

    async def scenario(village: Village) -> None:
        first = await village.found(announce_every_s=0.5)
        invite = await first.swarm.invite()
        running = [first, await village.join(1, invite, experts=1, announce_every_s=0.5)]
        await running[1].swarm.host.stop()  # no farewell
        running[1] = await village.join(1, invite, experts=1, announce_every_s=0.5)
        for node in running:
            await village.run(node)
        me = running[1].swarm.host.peer_id

        async def expires_at() -> float:
            return (await first.swarm.registry.nodes([me]))[me].expires_at

        began = await expires_at()

        async def is_renewed() -> bool:
            return await expires_at() > began + 2.0

        await eventually(is_renewed)
        assert not duplicates(caplog), "only an earlier run had this identity"

        copy = await village.join(1, invite, experts=1, announce_every_s=0.5)
        await village.run(copy)

        async def both_warn() -> bool:
            return duplicates(caplog) == {f" at {node.address}" for node in (running[1], copy)}

        await eventually(both_warn)

    play(scenario)


def duplicates(caplog: pytest.LogCaptureFixture) -> set[str]:
    """Where other nodes with the same identity are, according to warnings."""
    found = [re.search(r"with this node's identity(.*), and", each.getMessage()) for each in caplog.records]
    return {each[1] for each in found if each}


def test_only_a_record_that_is_renewed_is_a_duplicates(
    loop: LoopThread,
    identities: list[Identity],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario() -> None:
        identity, now = identities[0], [0.0]
        host = await Host.start(identity, NetworkConfig(LOCAL), swarm_id="sauna", validator=RecordValidator())
        try:
            registry = Registry(host.dht, SwarmKeys("sauna", identity.peer_id), identity)
            membership = Membership(host, registry, PeerStore(None), steady=lambda: now[0])

            async def warnings_of(expires_at: float) -> int:
                record = NodeInfo(peer_id=identity.peer_id, expires_at=expires_at)
                monkeypatch.setattr(registry, "duplicate", AsyncMock(return_value=record))
                await membership.look_for_duplicate()
                return sum("identity" in each.getMessage() for each in caplog.records)

            assert [await warnings_of(each) for each in (100.0, 100.0, 90.0, 100.0)] == [0, 0, 0, 0]
            assert [await warnings_of(each) for each in (110.0, 120.0)] == [1, 1]
            now[0] = 3600.0
            assert [await warnings_of(each) for each in (120.0, 3700.0, 3710.0)] == [1, 2, 2]
        finally:
            await host.stop()

    loop.run(scenario())
