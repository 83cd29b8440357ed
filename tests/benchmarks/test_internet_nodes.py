"""The engine of the simulated swarm: nodes join, die, part and sleep, and items of the DHT are lost with
their holders.
"""

import asyncio
import gc
import hashlib
import json
import random
import weakref
from collections.abc import Callable, Collection, Sequence
from functools import partial
from statistics import fmean
from typing import Any

import pytest
from collector import without_collector
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.internet.dht_model import (
    ModelDHT,
    ModelLookups,
    Owed,
    StoredRecord,
    _size,
    without_owing,
)
from benchmarks.internet.large_pages import use_large_pages
from benchmarks.internet.nodes import InternetSwarm, SimulatedNode, SwarmPlan
from benchmarks.internet.stand_ins import SharedExperts, UnsignedRecord, simulated
from benchmarks.internet.world import HomeLine, World
from benchmarks.simulated_p2p import SimulatedIdentity, VirtualLoop
from benchmarks.simulated_swarm import grid_of
from dht.announcements import ReplicaAnnouncement, ReplicaState
from dht.experts import ExpertRegistry
from dht.manifest import Manifest
from dht.records import INDEX_PIECE, SwarmKeys, sign_record
from dht.regions import Prefix, Region
from peer.kademlia.lookups import Item
from peer.kademlia.routing import key_id_of
from peer.kademlia.validation import Entry, pack, pack_entries
from peer.wire import records_pb2


def plan_of(*grid: int) -> SwarmPlan:
    values = {"name": "simulated", "model": {"layers": 1}, "experts": {"grid": grid}}
    return SwarmPlan(Manifest.model_validate(values))


def grown(world: World, nodes: int, experts: int, room: int = 1) -> InternetSwarm:
    swarm = InternetSwarm(world, plan_of(*grid_of(experts)))
    for number in range(nodes):
        world.loop.call_later(0.5 * number, swarm.join, HomeLine(nat=number % 2 == 1), room)
    world.run(nodes / 2 + 60)
    return swarm


def until(world: World, condition: Callable[[], bool], seconds: float) -> None:
    ends = world.time() + seconds
    while not condition():
        assert world.time() < ends, "it takes too long"
        world.run(1)


def test_two_runs_of_a_seed_are_alike() -> None:
    def run(seed: int) -> str:
        with simulated(seed) as world:
            swarm = grown(world, 12, 6)
            swarm.crash(next(iter(swarm.nodes.values())))
            world.run(60)
            assert not swarm.faults
            return json.dumps([swarm.takings, world.accounts.totals(), world.accounts.upkeep()])

    assert run(1) == run(1) != run(2)


def test_a_node_leaves_a_relay_whose_line_is_overloaded() -> None:
    with simulated(1) as world:
        swarm = grown(world, 12, 6)
        hidden = next(node for node in swarm.nodes.values() if len(node.relays) == 2)
        kept = hidden.relays[1]
        hidden.relays[0].occupy("up", 3600.0, world.time())
        overloaded = hidden.relays[0]
        until(world, lambda: overloaded not in hidden.relays, 300)
        assert len(hidden.relays) == 2
        assert kept in hidden.relays
        kept.occupy("up", 3600.0, world.time())
        world.run(200)
        assert kept in hidden.relays, "others must first learn of the change"


def test_callers_take_the_second_relay_if_the_first_is_overloaded() -> None:
    with simulated(1) as world:
        swarm = grown(world, 12, 6)
        hidden = next(node for node in swarm.nodes.values() if len(node.relays) == 2)
        caller = next(node for node in swarm.nodes.values() if not node.peer.link.nat)
        hidden.relays[0].occupy("up", 3600.0, world.time())
        before = world.accounts.up["relayed"][hidden.relays[1].number]
        assert world.loop.run_until_complete(swarm.transfer(hidden, caller))
        assert world.accounts.up["relayed"][hidden.relays[1].number] > before


def test_records_that_were_renewed_are_forgotten() -> None:
    with simulated(1) as world:
        swarm = grown(world, 12, 6)
        world.run(600)
        stored = [entry.value for key in swarm.dht._keys.values() for entry in key.entries.values()]
        newest = sum(isinstance(value, StoredRecord) for value in stored)
        gc.collect()
        kept = sum(issubclass(type(each), StoredRecord) for each in gc.get_objects())
        assert 12 < newest <= kept < 2 * newest


@pytest.mark.slow
@pytest.mark.parametrize("grid", [(3, 4), (3, 2 * INDEX_PIECE)], ids=str)
def test_a_region_made_from_an_earlier_one_is_as_one_that_is_read_anew(
    monkeypatch: pytest.MonkeyPatch, grid: tuple[int, ...]
) -> None:
    shared, renewed, made, several = SharedExperts._region, SharedExperts._renewed, list[bool](), 0

    def counted(self: SharedExperts, *args: Any) -> Region | None:
        found = renewed(self, *args)
        made.append(found is not None)
        return found

    async def compared(self: SharedExperts, prefix: Prefix, keys: Sequence[str], *args: Any) -> Region:
        nonlocal several
        found = await shared(self, prefix, keys, *args)
        anew = await ExpertRegistry._region(self, prefix, keys, *args)
        assert (found, [*found.replicas]) == (anew, [*anew.replicas])
        several += len(keys) > 1 and bool(found.active)
        return found

    monkeypatch.setattr(SharedExperts, "_renewed", counted)
    monkeypatch.setattr(SharedExperts, "_region", compared)
    if grid[-1] > INDEX_PIECE:
        monkeypatch.setattr("dht.regions.CROWDED_BYTES", 1000)
        monkeypatch.setattr("dht.regions.ROW_CROWDED_BYTES", 1000)
    with simulated(1) as world:
        swarm = InternetSwarm(world, plan_of(*grid))
        for number in range(24):
            world.loop.call_later(0.5 * number, swarm.join, HomeLine(nat=number % 2 == 1), 2)
        world.run(600)
        for node in [*swarm.nodes.values()][:6]:
            swarm.crash(node)
        world.run(600)
        assert not swarm.faults
    assert sum(made) > len(made) / 2
    assert (several > 100) == (grid[-1] > INDEX_PIECE), "rows have split, and their indices have two pieces"


def test_a_cancelled_timer_does_not_move_the_clock() -> None:
    loop, ran = VirtualLoop(), list[str]()
    try:
        loop.call_later(3.0, ran.append, "second")
        loop.call_later(1.0, ran.append, "first")
        loop.call_later(2.0, ran.append, "cancelled").cancel()
        loop.run_until_complete(asyncio.sleep(4.0))
        assert (ran, loop.time()) == (["first", "second"], 4.0)
        loop.call_later(5.0, ran.append, "cancelled").cancel()
        with pytest.raises(RuntimeError, match="nothing will happen"):
            loop.run_until_complete(loop.create_future())
        assert loop.time() == 4.0
    finally:
        loop.close()


@pytest.mark.parametrize("fails", [False, True], ids=["cancelled", "failed"])
def test_a_task_that_ended_in_or_after_a_sleep_is_freed_without_the_garbage_collector(fails: bool) -> None:
    async def sleeper() -> None:
        await asyncio.sleep(2.0)
        raise ValueError

    with simulated(1) as world, without_collector():
        task = world.loop.create_task(sleeper())
        world.run(1.0)
        if not fails:
            task.cancel()
        world.run(2.0)
        assert task.cancelled() if not fails else isinstance(task.exception(), ValueError)
        freed = weakref.ref(task)
        del task
        assert freed() is None


def test_a_task_that_owes_the_time_of_its_look_ups_waits_in_its_next_pause() -> None:
    with simulated(1) as world:
        lookups = ModelLookups(ModelDHT(world), world.add(HomeLine()))

        async def rounds() -> None:
            owed = Owed()
            await lookups.find([1])
            assert world.time() == 0 < (first := owed.seconds)
            await owed.sleep(1.0)
            assert (world.time(), owed.seconds) == (1.0 + first, 0.0)
            await lookups.find([2])
            second = owed.seconds
            await owed.sleep()
            assert world.time() == pytest.approx(1.0 + first + second)

        world.loop.run_until_complete(rounds())


def test_work_that_takes_its_time_at_once_begins_when_nothing_is_owed() -> None:
    with simulated(1) as world:
        lookups = ModelLookups(ModelDHT(world), world.add(HomeLine()))

        async def rounds() -> None:
            owed = Owed()
            await lookups.find([1])
            earlier = owed.seconds
            await without_owing(partial(lookups.find, [2]))
            assert world.time() > earlier
            assert owed.seconds == 0
            await lookups.find([3])
            assert owed.seconds > 0, "the task owes again"

        world.loop.run_until_complete(rounds())


@pytest.mark.slow
def test_memory_on_large_pages_keeps_its_content() -> None:
    content = random.Random(1).randbytes(8 << 20)
    digest = hashlib.sha256(content).digest()
    use_large_pages()
    assert hashlib.sha256(content).digest() == digest


def test_a_dead_host_is_replaced() -> None:
    with simulated(1) as world:
        swarm = grown(world, 24, 8)
        assert swarm.share_served() == 1
        uid, hosts = next((uid, hosts) for uid, hosts in swarm.hosts().items() if hosts)
        for node in hosts:
            swarm.crash(node)
        assert not swarm.hosts()[uid]
        until(world, lambda: bool(swarm.hosts()[uid]), 600)
        assert not swarm.faults


def test_a_claim_is_not_announced_again_while_it_is_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    with simulated(1) as world:
        swarm = grown(world, 1, 4, room=4)
        node = swarm.join(HomeLine(), 1)
        announce, announced = node.experts.announce, list[ReplicaState]()

        async def note(replicas: Collection[ReplicaAnnouncement], *args: Any) -> None:
            announced.extend(replica.state for replica in replicas)
            await announce(replicas, *args)

        monkeypatch.setattr(node.experts, "announce", note)
        until(world, lambda: bool(node.runtime.experts), 60)
        assert world.time() > 60 + 2.8, (
            "its state took longer than a node waits before it looks for ready ones"
        )
        assert announced.count(ReplicaState.CLAIMED) == 1


@pytest.mark.slow
def test_an_expert_that_lost_most_of_its_hosts_gets_half_as_many_as_another() -> None:
    with simulated(1) as world:
        swarm = grown(world, 40, 4, room=2)
        until(world, lambda: min(map(len, swarm.hosts().values())) >= 6, 1200)
        uid, thin = min(swarm.hosts().items(), key=lambda item: len(item[1]))
        for node in thin[1:]:
            swarm.crash(node)

        def has_enough() -> bool:
            hosts = swarm.hosts()
            return 2 * len(hosts[uid]) >= min(len(some) for other, some in hosts.items() if other != uid)

        assert not has_enough()
        until(world, has_enough, 3600)

        def rests() -> bool:
            taken = swarm.takings
            world.run(1200)
            return swarm.takings == taken

        assert any(rests() for _ in range(6)), "it comes to rest"
        assert not swarm.faults


def test_a_claim_is_renewed_now_and_then_while_a_state_comes_over_a_slow_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with simulated(1) as world:
        swarm = grown(world, 4, 4)
        node = swarm.join(HomeLine(down_bps=8 * swarm.plan.state_bytes / 120), 1)
        announce, times = node.experts.announce, list[float]()

        async def counted(replicas: Collection[ReplicaAnnouncement], *arguments: Any) -> None:
            times.extend([world.time()] * bool(replicas))
            await announce(replicas, *arguments)

        monkeypatch.setattr(node.experts, "announce", counted)
        reader = next(iter(swarm.nodes.values())).experts
        until(world, lambda: bool(times), 60)
        while not node.runtime.experts:
            world.run(5)
            found = world.loop.run_until_complete(reader.replicas(swarm.hosts()))
            assert any(replica.peer_id == node.peer.peer_id for hosts in found.values() for replica in hosts)
        took_s = world.time() - times[0]
        assert took_s > 110
        assert len(times) <= 4 + took_s / node.settings.announce_every_s


def test_a_node_that_leaves_hands_over(caplog: pytest.LogCaptureFixture) -> None:
    with simulated(1) as world:
        swarm = grown(world, 8, 8)
        (uid, (node, *_)), *_ = swarm.hosts().items()
        spare: list[SimulatedNode] = [swarm.join(HomeLine(), 1) for _ in range(4)]
        world.run(40)
        swarm.leave(node)
        until(world, lambda: node.peer.peer_id not in swarm.nodes, 60)
        until(world, lambda: swarm.share_served() == 1, 60)
        assert spare
        assert uid in swarm.hosts()
        assert not swarm.faults
        assert not [each for each in caplog.records if each.exc_info]


def test_a_claim_says_whether_others_serve_the_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    claims: list[tuple[bool, bool]] = []
    announce = ExpertRegistry.announce

    async def noted(self: Any, replicas: Collection[ReplicaAnnouncement], *args: Any) -> None:
        for replica in replicas:
            if replica.state is ReplicaState.CLAIMED:
                serving = [node for node in swarm.nodes.values() if replica.uid in node.runtime.experts]
                claims.append((replica.has_hosts, bool(serving)))
        await announce(self, replicas, *args)

    monkeypatch.setattr(ExpertRegistry, "announce", noted)
    with simulated(0) as world:
        swarm = InternetSwarm(world, plan_of(*grid_of(8)))
        for number in range(12):
            world.loop.call_later(10.0 * number, swarm.join, HomeLine(), 3)
        world.run(300)
    assert {has_hosts for has_hosts, _ in claims} == {False, True}
    assert sum(said is true for said, true in claims) > 0.9 * len(claims)


def test_looks_do_not_fail_if_some_of_a_nodes_own_experts_were_read_long_ago(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where layers have split, a look reads some of them, and what it knows of the others expires meanwhile."""
    monkeypatch.setattr("dht.regions.CROWDED_BYTES", 1024)
    monkeypatch.setattr("dht.regions.ROW_CROWDED_BYTES", 512)
    with simulated(0) as world:
        swarm = grown(world, 24, 64, room=6)
        world.run(900)
        split = [node for node in swarm.nodes.values() if node.hosting._survey._known_split()]
        assert len(split) > 20
    assert not [record for record in caplog.records if "own announcements" in record.message]


def test_a_sleeping_node_goes_on_with_what_it_had() -> None:
    with simulated(1) as world:
        swarm = grown(world, 8, 4)
        node = next(node for node in swarm.nodes.values() if node.runtime.experts)
        before = dict(node.runtime.experts)
        swarm.sleep(node)
        world.run(5)
        assert all(node not in hosts for hosts in swarm.hosts().values())
        swarm.resume(node)
        world.run(30)
        assert node.runtime.experts.keys() == before.keys()


def test_halves_part_and_meet_again() -> None:
    with simulated(1) as world:
        swarm = grown(world, 24, 4)
        world.partition(0.4)
        halves = [[n for n in swarm.nodes.values() if n.peer.half == half] for half in (0, 1)]
        assert len(halves[1]) == round(0.4 * 24)
        assert not world.reachable(halves[0][0].peer, halves[1][0].peer)

        def all_in(half: int) -> bool:
            return all(any(n.peer.half == half for n in hosts) for hosts in swarm.hosts().values())

        until(world, lambda: all_in(0) and all_in(1), 300)
        world.heal()
        world.run(60)
        assert swarm.share_served() == 1
        assert not swarm.faults


@given(st.sets(st.integers(0, 200), min_size=1, max_size=40), st.integers(0, 2**64 - 1), st.integers(1, 8))
def test_the_nearest_servers_are_found(numbers: set[int], place: int, most: int) -> None:
    world = World(1, VirtualLoop())
    try:
        peers = [world.add(HomeLine()) for _ in range(max(numbers) + 1)]
        for peer in peers:
            if peer.number not in numbers:
                world.kill(peer)
        wanted = sorted(numbers, key=lambda n: peers[n].place ^ place)[:most]
        nearest, _ = world.nearest(place, 0, most)
        assert [peer.number for peer in nearest] == wanted
    finally:
        world.loop.close()


@pytest.mark.slow
@given(
    st.lists(st.tuples(st.sampled_from(["kill", "revive", "read"]), st.integers(0, 59)), max_size=60),
    st.integers(0, 2**64 - 1),
)
def test_servers_near_a_key_and_its_entries_are_known_after_every_change(
    changes: list[tuple[str, int]], place: int
) -> None:
    world = World(1, VirtualLoop())
    try:
        model = ModelDHT(world)
        peers = [world.add(HomeLine()) for _ in range(60)]
        key = model.key(place << 96)
        holders = model.near(key, 0)
        model.put(Item("key", b"writer", b"value", world.now() + 1000), key, holders)
        is_lost = False
        for change, number in changes:
            if change == "kill":
                world.kill(peers[number])
            elif change == "revive" and not peers[number].is_alive:
                world.revive(peers[number])
            else:
                living = [peer for peer in peers if peer.is_alive]
                wanted = sorted(living, key=lambda peer: peer.place ^ place)[:5]
                assert list(model.near(key, 0)) == wanted
                is_lost |= not any(holder.is_alive for holder in holders)
                assert bool(model.get(key, peers[0])) == (not is_lost)
    finally:
        world.loop.close()


@pytest.mark.parametrize("nat", [True, False])
def test_bytes_count_at_both_ends(nat: bool) -> None:
    with simulated(1) as world:
        sender, receiver = world.add(HomeLine(nat=nat, up_bps=8e6)), world.add(HomeLine())
        arrived: Any = world.loop.run_until_complete(world.transfer(sender, receiver, 1e6))
        assert arrived
        assert world.time() == pytest.approx(1 + 0.04)
        assert world.accounts.up["transfer"][sender.number] == 1e6
        assert world.accounts.down["transfer"][receiver.number] == 1e6


def test_what_one_peer_sends_another_receives() -> None:
    with simulated(1) as world:
        grown(world, 16, 8)
        world.accounts.totals()
        sent = sum(sum(column) for column in world.accounts.up.values())
        received = sum(sum(column) for column in world.accounts.down.values())
        assert sent == pytest.approx(received, rel=0.01)
        assert sent > 0


def test_writers_store_at_five_servers_or_at_some_more_as_those_of_the_real_dht() -> None:
    with simulated(1) as world:
        model = ModelDHT(world)
        writers = [ModelLookups(model, world.add(HomeLine())) for _ in range(100)]
        keys = [f"key {number}" for number in range(300)]
        for number, key in enumerate(keys):
            item = Item(key, b"writer", b"value", world.now() + 1000)
            world.loop.run_until_complete(writers[number % len(writers)].store([item]))
        counts = [len(model.key(key_id_of(key)).holders[b"writer"]) for key in keys]
        assert min(counts) == 5
        assert 5.5 < fmean(counts) < 7
        assert 8 < max(counts) <= 15


def test_records_are_lost_with_their_last_holder() -> None:
    with simulated(1) as world:
        model = ModelDHT(world)
        peers = [world.add(HomeLine()) for _ in range(12)]
        writer, reader = (ModelLookups(model, peer) for peer in peers[:2])
        item, key = Item("key", b"writer", b"value", world.now() + 1000), key_id_of("key")

        def found() -> bool:
            return bool(world.loop.run_until_complete(reader.find([key]))[key].entries)

        assert world.loop.run_until_complete(writer.store([item]))
        holders = model.key(key).holders[b"writer"]
        assert len(holders) >= 5
        for holder in holders:
            assert found()
            if holder is not peers[1]:
                world.kill(holder)
        assert found() == (peers[1] in holders)


def test_records_expire() -> None:
    with simulated(1) as world:
        model = ModelDHT(world)
        first, second = (ModelLookups(model, world.add(HomeLine())) for _ in range(2))
        key = key_id_of("key")
        run = world.loop.run_until_complete
        run(first.store([Item("key", b"writer", b"value", world.now() + 5)]))
        assert run(second.find([key]))[key].entries
        world.run(5)
        assert not run(second.find([key]))[key].entries


@pytest.mark.parametrize("characters", [1, 40, 200])
def test_an_unsigned_record_is_as_long_as_a_signed_one(characters: int) -> None:
    payload = records_pb2.RecordPayload(key="k" * characters, expires_at=1.0)
    identity: Any = SimulatedIdentity(1)
    assert len(UnsignedRecord(payload)) == len(sign_record(identity, payload))


def test_entries_count_as_many_bytes_as_they_take_in_an_answer() -> None:
    marked = SwarmKeys("simulated", SimulatedIdentity(1).peer_id).index(0, (12,), 130)
    writers = [SimulatedIdentity(n).peer_id.to_bytes() for n in range(100)]
    records = {writer: bytes([number]) * 700 for number, writer in enumerate(writers)}
    for values in (
        dict.fromkeys(range(130, 132), marked),
        dict.fromkeys(range(120, 136), marked),
        dict.fromkeys(range(100, 228), marked),
        dict.fromkeys(writers, marked),
        dict.fromkeys(range(120, 136), marked) | records,
        records,
    ):
        packed = pack_entries({subkey: Entry(pack(value), 1.7e9) for subkey, value in values.items()})
        entries: Any = {subkey: Entry(value, 1.7e9) for subkey, value in values.items()}  # type: ignore[arg-type]  # not packed
        assert _size(entries) == pytest.approx(len(packed), rel=0.03)


def test_the_size_of_a_key_is_that_of_its_entries_whatever_comes_and_goes() -> None:
    with simulated(1) as world:
        model, rng = ModelDHT(world), random.Random(1)
        peers = [world.add(HomeLine()) for _ in range(20)]
        lookups = [ModelLookups(model, peer) for peer in peers]
        key, sizes = model.key(key_id_of("key")), set()
        for _ in range(300):
            n = rng.randrange(20)
            value = "key" if n % 2 else bytes(rng.randrange(100))
            item = Item("key", n if n % 2 else bytes([n]), value, world.now() + rng.uniform(1, 20))
            world.loop.run_until_complete(lookups[n].store([item]))
            world.run(rng.choice([0.1, 5]))
            model.get(key, peers[0])
            assert key.bytes == _size(key.entries)
            sizes.add(key.bytes)
        assert len(sizes) > 100
