"""The discovery benchmark at a small scale: its measurements are right, and depend only on the seed."""

import asyncio
import itertools
import random
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
from dht_peers import forget_all
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.discovery import hop_limit, verdicts
from benchmarks.discovery_simulated import make_trainer, measure_crawl, measure_lookups, measure_recall
from benchmarks.kademlia_walk import DrawnNetwork, measure, walk
from benchmarks.simulated_p2p import Link, simulated_world
from benchmarks.simulated_swarm import LIFETIME_S, SimulatedSwarm, grid_of
from peer.kademlia.lookups import Lookups
from peer.kademlia.routing import key_id_of
from peer.loop import TimeSlices

NODES = 20


def simulate(seed: int, nodes: int) -> dict[str, Any]:
    with simulated_world() as loop:

        async def run() -> dict[str, Any]:
            swarm = await SimulatedSwarm.start(loop, nodes, 2 * nodes, Link(loss=0.01), seed)
            result: dict[str, Any] = {"lookups": await measure_lookups(loop, swarm, 20)}
            result["recall"] = await measure_recall(loop, swarm)
            result["crawl"] = await measure_crawl(loop, swarm)
            return result | {"traffic": asdict(swarm.network.traffic), "time": loop.time()}

        return loop.run_until_complete(run())


def test_tasks_run_in_an_order_that_does_not_depend_on_how_long_their_work_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seconds = itertools.count()
    monkeypatch.setattr("peer.loop.time.perf_counter", lambda: float(next(seconds)))
    ran = list[str]()

    async def work(name: str) -> None:
        slices = TimeSlices()
        for _ in range(3):
            await slices.pause()
            ran.append(name)

    async def both() -> None:
        await asyncio.gather(work("a"), work("b"))

    with simulated_world() as loop:
        loop.run_until_complete(both())
    assert "".join(ran) == "aaabbb"


def test_a_small_swarm_is_found_whole() -> None:
    result = simulate(3, NODES)
    assert result["recall"] == 1.0
    assert result["lookups"]["lookups_found"] == 1.0
    assert 1 <= result["lookups"]["hops_mean"] <= hop_limit(NODES)
    assert result["crawl"]["found"] == 1.0
    assert 0 < result["crawl"]["largest_value_bytes"] < 16_000


@pytest.mark.slow
def test_the_same_seed_gives_the_same_figures() -> None:
    few = simulate(3, 8)
    assert simulate(3, 8) == few
    assert simulate(4, 8) != few


@pytest.mark.slow
def test_a_swarm_put_in_place_is_like_one_that_joined_and_announced() -> None:
    with simulated_world() as loop:

        async def run() -> None:
            swarm = await SimulatedSwarm.start(loop, NODES, 40, Link(), seed=5)
            keys = [key_id_of(swarm.keys.node(peer.peer_id)) for peer in swarm.peers]
            really = holders(swarm, keys)
            for peer in swarm.peers:
                forget_all(peer.dht.storage)
            await swarm.announce_all(LIFETIME_S, in_place=True)
            placed = holders(swarm, keys)
            assert all(len(some) == 5 for some in placed)
            same = [len(a & b) for a, b in zip(placed, really, strict=True)]
            assert np.mean(same) > 4.5
            assert await measure_recall(loop, swarm) == 1.0

        loop.run_until_complete(run())


def holders(swarm: SimulatedSwarm, keys: list[int]) -> list[set[int]]:
    return [{n for n, peer in enumerate(swarm.peers) if peer.dht.storage.get(key)} for key in keys]


@pytest.mark.slow
@given(st.integers(0, 2**32), st.integers(20, 80))
@settings(max_examples=8)
def test_the_walk_takes_as_many_rounds_as_the_simulation(seed: int, nodes: int) -> None:
    """Both use the same routing tables, and links that all take equally long."""
    with simulated_world() as loop:

        async def run() -> None:
            swarm = SimulatedSwarm(loop, make_manifest(), Link(jitter=0.0), seed)
            swarm.peers = [await swarm.make_peer() for _ in range(nodes)]
            swarm.fill_tables(swarm.peers, swarm.peers)
            await swarm.announce_all(LIFETIME_S, in_place=True)
            tables = {int(p.dht.node_id): p.dht.table for p in swarm.peers}
            name = swarm.keys.node(random.Random(seed).choice(swarm.peers).peer_id)
            key = key_id_of(name)
            having = {int(p.dht.node_id) for p in swarm.peers if p.dht.storage.get(key)}
            asking = next(p for p in swarm.peers if int(p.dht.node_id) not in having)
            me = asking.dht.node_id

            def named(node: int) -> list[int]:
                return [int(n) for n, _ in tables[node].nearest(key, 20, exclude=me)]

            search, _ = walk(key, named(int(me)), having, named, reach=2**160 * 5 // nodes)
            before = loop.time()
            lookups = Lookups(asking.dht, rng=random.Random(seed))
            found = (await lookups.find([key], besides_self=True))[key]
            assert found.entries
            assert found.search.found_after == search.found_after
            assert abs(found.search.rounds - search.rounds) <= 1
            # Nodes within reach that were known at the start may be asked after the first answers.
            waves = round((loop.time() - before) / 0.1)
            assert found.search.rounds <= waves <= found.search.rounds + 1

        loop.run_until_complete(run())


def make_manifest() -> Any:
    from dht.manifest import Manifest

    return Manifest.model_validate({"name": "swarm", "model": {"layers": 1}, "experts": {"grid": (2, 2)}})


def test_the_walk_grows_with_the_logarithm_and_names_true_holders() -> None:
    network = DrawnNetwork(500, seed=1)
    key = 2**63 + 12345
    assert network.holders(key) == set(sorted((int(n) for n in network.ids), key=lambda n: n ^ key)[:5])
    hops = [measure(nodes, 30, seed=1)["hops_mean"] for nodes in (100, 2_000, 40_000)]
    assert hops == sorted(hops)
    assert all(h <= hop_limit(n) for h, n in zip(hops, (100, 2_000, 40_000), strict=True))


def test_grids_have_exactly_as_many_experts() -> None:
    assert [grid_of(n) for n in (256, 1000, 10_000, 7)] == [(16, 16), (25, 40), (100, 100), (1, 7)]


def test_a_target_that_was_missed_is_said_to_be() -> None:
    walked = [{"nodes": 1024, "hops_mean": 4.8}, {"nodes": 1024, "hops_mean": 4.9}]
    assert [reached for _, _, reached in verdicts({"simulated": [], "walked": walked})] == [True, False]


def test_a_trainer_that_joined_knows_no_expert_yet() -> None:
    with simulated_world() as loop:

        async def run() -> None:
            swarm = await SimulatedSwarm.start(loop, 10, 12, Link(), seed=1)
            directory = await make_trainer(loop, swarm)
            assert directory.view.live_experts() == 0
            assert (await directory.refresh()).live_experts() == 12

        loop.run_until_complete(run())
