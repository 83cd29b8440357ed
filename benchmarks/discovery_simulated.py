"""What discovery costs and finds in a simulated swarm of one size. `benchmarks.simulated_swarm` describes the swarm."""

import asyncio
import random
import resource
import statistics
import time
from collections.abc import AsyncGenerator, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from grpc import StatusCode

from benchmarks.simulated_p2p import Link, VirtualLoop, simulated_world
from benchmarks.simulated_swarm import LIFETIME_S, SimulatedPeer, SimulatedSwarm
from dht.announcements import NodeInfo
from dht.beam_search import Selection, select_experts
from dht.directory import Directory, prefix_tables
from dht.uid import UID
from dht.upkeep import UpkeepPeriod
from expert_server.hosting.placement import HostingSurvey
from peer.codec import Floats
from peer.errors import ExpertError
from peer.identity import PeerID
from peer.kademlia.routing import key_id_of
from trainer_client.dispatch.batches import (
    AnsweredRows,
    CallReply,
    ExpertReply,
    NodeCall,
    RoutedRows,
    Segments,
)
from trainer_client.dispatch.dispatcher import Dispatcher
from trainer_client.dispatch.policy import WaitPolicy
from trainer_client.routers import best

TOP_K = 4
BATCH = 64
CALL_DEADLINE_S = 5.0
_BATCH_TRAINERS = 3
_WARM_TRIES = 7
_MANY = 256
"""The number of experts in a small swarm, and on a node that hosts many."""
_PERIOD_S = 10.0
"""How often nodes announce as long as that costs little."""
_WARM_ROUNDS, _ROUNDS = 12, 6
"""The first rounds cost more, and the announcement period follows the cost slowly. In a large swarm, six rounds
suffice.
"""
_BETWEEN_ROUNDS_S = 30.0
_CRAWLED = 2000
"""The number of nodes up to which a swarm is crawled here."""


@dataclass(frozen=True)
class Effort:
    """How many measurements of each kind are made."""

    lookups: int = 100
    trainers: int = 8
    """The number of trainers that choose experts for one row. Fewer choose for a batch, which takes six times as long
    to compute.
    """
    upkeep_nodes: int = 10


BRIEF = Effort(lookups=60, trainers=_BATCH_TRAINERS)


def measure(nodes: int, link: Link, seed: int, effort: Effort) -> dict[str, Any]:
    """Takes all measurements of one size. The swarm has 256 experts on up to 100 nodes, and one for each node in larger
    swarms.
    """
    with simulated_world() as loop:
        result: dict[str, Any] = loop.run_until_complete(_measure(loop, nodes, link, seed, effort))
        return result


async def _measure(loop: VirtualLoop, nodes: int, link: Link, seed: int, effort: Effort) -> dict[str, Any]:
    began = time.monotonic()
    experts = _MANY if nodes <= 100 else nodes
    swarm = await SimulatedSwarm.start(loop, nodes, experts, link, seed, with_contacts=True)
    result: dict[str, Any] = {"nodes": nodes, "experts": experts, "built_in_s": time.monotonic() - began}
    result |= await measure_lookups(loop, swarm, effort.lookups)
    for rows, trainers in ((1, effort.trainers), (BATCH, _BATCH_TRAINERS)):
        result[f"cold_{rows}"] = await measure_choices(loop, swarm, rows, trainers)
    result["upkeep"] = await measure_upkeep(swarm, effort.upkeep_nodes)
    if experts == _MANY:
        result["upkeep_of_all"] = await measure_upkeep(swarm, effort.upkeep_nodes, hosts_all=True)
    await swarm.announce_all(LIFETIME_S, in_place=True)
    if nodes <= _CRAWLED:
        result["crawl"] = await measure_crawl(loop, swarm)
    result["recall"] = {"0": await measure_recall(loop, swarm)}
    for percent, share in ((10, 0.1), (30, 0.3)):  # The share of those that are left.
        swarm.kill(share)
        if percent == 30:
            result["replaced_30"] = await measure_replacing(loop, swarm)
            result["lookups_30_dead"] = await measure_lookups(loop, swarm, effort.lookups // 2)
        await _let_the_dead_expire(swarm)
        result["recall"][str(percent)] = await measure_recall(loop, swarm)
    result["memory_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return result


async def measure_lookups(loop: VirtualLoop, swarm: SimulatedSwarm, count: int) -> dict[str, Any]:
    """Measures look-ups of node records by peers that don't hold them: rounds until the value was found, and until
    enough of its holders were.
    """
    hops, rounds, calls, times_ms = [], [], [], []
    for _ in range(count):
        peer, other = swarm.rng.sample(swarm.peers, 2)
        key = key_id_of(swarm.keys.node(other.peer_id))
        await peer.lookups.sample()  # A real peer does this when it has just joined, and now and then later.
        began, before = loop.time(), swarm.network.traffic.by_method["find"]
        found = (await peer.lookups.find([key], besides_self=True))[key]
        times_ms.append(1000 * (loop.time() - began))
        calls.append(swarm.network.traffic.by_method["find"] - before)
        if found.search.found_after is not None:
            hops.append(found.search.found_after)
            rounds.append(found.search.rounds)
    return {
        "lookups_found": len(hops) / count,
        "hops_mean": statistics.mean(hops),
        "hops_max": max(hops),
        "rounds_mean": statistics.mean(rounds),
        "calls_mean": statistics.mean(calls),
        "lookup_ms_mean": statistics.mean(times_ms),
        "lookup_ms_max": max(times_ms),
    }


async def make_trainer(loop: VirtualLoop, swarm: SimulatedSwarm) -> Directory:
    """A trainer's directory that has just joined and knows nothing about the experts."""
    trainer = await swarm.make_peer(serves_dht=False)
    await swarm.join(trainer)
    return Directory(
        trainer.experts,
        swarm.manifest,
        refresh_every_s=3.0,
        now=loop.unix_time,
        rng=random.Random(swarm.rng.random()),
    )


async def measure_choices(
    loop: VirtualLoop, swarm: SimulatedSwarm, rows: int, trainers: int
) -> dict[str, Any]:
    """Measures the first choice of trainers that have just joined, and later choices with other scores.

    Times of first choices are simulated: until the chosen experts' announcements are known (and so their hosts), and
    until the hosts' addresses and certificates are known, too. Later choices make no call, so the time is the processor
    time of this machine.
    """
    chosen_ms, callable_ms, calls, warm_ms = [], [], [], []
    for _ in range(trainers):
        directory = await make_trainer(loop, swarm)
        scores = random_scores(swarm, rows)
        announced_at = _note_node_reads(loop, directory)
        began, before = loop.time(), swarm.network.traffic.calls
        await directory.search(0, scores, TOP_K)
        callable_ms.append(1000 * (loop.time() - began))
        chosen_ms.append(1000 * (announced_at[0] - began))
        calls.append(swarm.network.traffic.calls - before)
        for _ in range(_WARM_TRIES):
            before, cpu = swarm.network.traffic.calls, time.process_time()
            await directory.search(0, scores, TOP_K)
            warm_ms.append(1000 * (time.process_time() - cpu))
            assert swarm.network.traffic.calls == before, "a warm choice asked somebody"
    return {
        "chosen_ms_mean": statistics.mean(chosen_ms),
        "chosen_ms_max": max(chosen_ms),
        "callable_ms_mean": statistics.mean(callable_ms),
        "callable_ms_max": max(callable_ms),
        "calls_mean": statistics.mean(calls),
        "warm_cpu_ms": statistics.median(warm_ms),
    }


def _note_node_reads(loop: VirtualLoop, directory: Directory) -> list[float]:
    """The list that is returned gets the times at which node records are asked for. At the first of them the
    announcements of the chosen experts are known.
    """
    registry, times = directory.experts.registry, []
    read = registry.nodes

    async def noted(peer_ids: Collection[PeerID], **options: Any) -> dict[PeerID, NodeInfo]:
        times.append(loop.time())
        return await read(peer_ids, **options)

    registry.nodes = noted  # type: ignore[method-assign]  # this object's alone
    return times


async def measure_upkeep(swarm: SimulatedSwarm, count: int, hosts_all: bool = False) -> dict[str, float]:
    """Measures the traffic by which nodes stay announced and look around: announcements, checks and look-ups, with all
    answers.

    `kbit_per_s`: bytes sent and received for a node's own calls, and as much again for the calls of others, in the
    announcement period that follows from the cost of a round. `hosts_all`: whether the measured nodes host all experts,
    instead of those they have in the swarm.
    """
    hosted: dict[int, list[UID]] = {}
    for uid, host in swarm.hosts.items():
        hosted.setdefault(id(host), []).append(uid)
    some = swarm.rng.sample(swarm.peers, min(count, len(swarm.peers)))
    mine = {id(peer): swarm.manifest.uids() if hosts_all else hosted.get(id(peer), []) for peer in some}
    surveys = {
        id(peer): HostingSurvey(peer.experts, swarm.manifest, peer.peer_id, swarm.rng) for peer in some
    }
    periods = {id(peer): UpkeepPeriod(_PERIOD_S, partial(_spent, peer)) for peer in some}
    spent = 0
    for number in range(_WARM_ROUNDS + _ROUNDS):
        if number == _WARM_ROUNDS:
            spent = sum(map(_spent, some))
        await asyncio.sleep(_BETWEEN_ROUNDS_S)
        for peer in some:
            await swarm.announce(peer, mine[id(peer)], LIFETIME_S)
            await peer.registry.is_seen_by_others()
            await surveys[id(peer)].read(mine[id(peer)])
            periods[id(peer)].note_round()
    spent = sum(map(_spent, some)) - spent
    round_bytes = spent / len(some) / _ROUNDS
    period_s = statistics.mean(period.seconds for period in periods.values())
    return {
        "round_bytes": round_bytes,
        "period_s": period_s,
        "kbit_per_s": 2 * 8 * round_bytes / period_s / 1000,
    }


def _spent(peer: SimulatedPeer) -> int:
    return peer.dht.spent_bytes


async def measure_crawl(loop: VirtualLoop, swarm: SimulatedSwarm) -> dict[str, float]:
    """Reads all nodes' records, as a dashboard does."""
    observer = await swarm.make_peer(serves_dht=False)
    await swarm.join(observer)
    swarm.network.traffic.largest = 0
    began, before = loop.time(), swarm.network.traffic.calls
    nodes = await observer.registry.nodes(await observer.registry.node_ids())
    return {
        "seconds": loop.time() - began,
        "calls": swarm.network.traffic.calls - before,
        "found": len(nodes) / len(swarm.peers),
        "largest_value_bytes": swarm.network.traffic.largest,
    }


async def measure_recall(loop: VirtualLoop, swarm: SimulatedSwarm) -> float:
    """The share of a batch's best live experts that a trainer finds when it has just joined."""
    directory, scores = await make_trainer(loop, swarm), random_scores(swarm, BATCH)
    view = await directory.search(0, scores, TOP_K)
    alive = np.zeros(swarm.manifest.experts.grid, dtype=bool)
    for uid in swarm.hosts:
        alive[uid.coordinate] = True
    best = best_experts(scores, alive)
    chosen = select_experts(scores, view.tables(0), TOP_K)
    hits = (best.coordinates[:, :, None] == chosen.coordinates[:, None]).all(axis=-1)
    return float((hits.any(axis=2) & best.valid).sum() / best.valid.sum())


async def measure_replacing(loop: VirtualLoop, swarm: SimulatedSwarm) -> dict[str, Any]:
    """Measures what becomes of a batch when some of its chosen experts have just died but are still announced.

    The figures are shares of the batch's rows, within one call deadline. `all_refused`: four live experts answered,
    where the dead experts' machines refuse calls. `all_silent`: four answered, where the machines don't respond at all.
    `enough_silent`: two answered in that case, which is what a trainer waits for by default.
    """
    directory, scores = await make_trainer(loop, swarm), random_scores(swarm, BATCH)
    living = frozenset(host.peer_id for host in swarm.hosts.values())
    view = await directory.search(0, scores, 2 * TOP_K)
    first = select_experts(scores, view.tables(0), TOP_K)
    dead = sum(
        all(replica.peer_id not in living for replica in view.hosts(UID(0, tuple(c))))
        for c in first.coordinates.reshape(-1, first.coordinates.shape[-1]).tolist()
    )
    result: dict[str, Any] = {"dead_choices": dead / int(first.valid.sum())}
    for name, k_min, refuses in (
        ("all_refused", TOP_K, True),
        ("all_silent", TOP_K, False),
        ("enough_silent", TOP_K // 2, False),
    ):
        directory = await make_trainer(loop, swarm)  # does not know yet who is dead
        await directory.search(0, scores, 2 * TOP_K)
        caller = _SimulatedCaller(living, swarm.network.link.rtt_s, refuses)
        policy = WaitPolicy(CALL_DEADLINE_S, grace_s=1.0, k_min=k_min)
        dispatcher = Dispatcher(
            directory, caller, policy, seed=1, clock=loop.time, is_silent=caller.is_silent
        )
        inputs, began = np.zeros((BATCH, 8), dtype=np.float32), loop.time()
        live = await dispatcher.find(0, scores, TOP_K)
        rows = RoutedRows(
            0, live.tables[-1].shape, inputs, scores, TOP_K, Segments.whole(len(inputs), 1), keep=False
        )
        answered = (await dispatcher.send(rows, best(scores, live.tables, TOP_K), live)).answered
        assert loop.time() - began < CALL_DEADLINE_S + 0.01
        await dispatcher.close()
        result[name] = float((answered.sum(axis=1) >= k_min).mean())
        result[f"{name}_s"] = loop.time() - began
    return result


class _SimulatedCaller:
    """Living nodes answer after one round trip. The machines of dead nodes refuse calls as quickly, or don't respond at
    all.
    """

    def __init__(self, living: Collection[PeerID], rtt_s: float, refuses: bool) -> None:
        self._living = living
        self._rtt_s = rtt_s
        self._refuses = refuses

    def is_silent(self, node: NodeInfo) -> bool:
        return node.peer_id not in self._living

    async def call(self, call: NodeCall) -> AsyncGenerator[CallReply, None]:
        peer_id = call.node.peer_id
        if peer_id not in self._living and not self._refuses:
            await asyncio.sleep(call.deadline_s)
            raise ExpertError(StatusCode.DEADLINE_EXCEEDED, "silent")
        await asyncio.sleep(self._rtt_s)
        if peer_id not in self._living:
            raise ExpertError(StatusCode.UNAVAILABLE, "connection refused")
        batch = call.batch
        for uid in batch.uids:
            yield ExpertReply(batch, uid)
        yield AnsweredRows(batch, np.arange(len(batch.rows)), batch.asked, np.zeros_like(call.inputs))


async def _let_the_dead_expire(swarm: SimulatedSwarm) -> None:
    """Waits until the dead nodes' announcements have expired. The living nodes renew theirs shortly before."""
    await asyncio.sleep(LIFETIME_S - 10)
    await swarm.announce_all(LIFETIME_S, in_place=True)
    await asyncio.sleep(20)


def random_scores(swarm: SimulatedSwarm, rows: int) -> list[Floats]:
    rng = np.random.default_rng(swarm.rng.getrandbits(32))
    return [rng.standard_normal((rows, size)).astype(np.float32) for size in swarm.manifest.experts.grid]


def best_experts(scores: Sequence[Floats], alive: np.ndarray) -> Selection:
    """The best experts by brute force: a beam over all prefixes."""
    return select_experts(scores, prefix_tables(alive), TOP_K, beam_size=alive.shape[0])
