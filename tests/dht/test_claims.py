"""How long a claim may last, whatever the claim itself says."""

import asyncio
import math
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.simulated_p2p import Link, VirtualLoop, simulated_world
from benchmarks.simulated_swarm import SimulatedSwarm
from dht.announcements import MAX_CLAIM_S, ClaimAges, ReplicaAnnouncement, ReplicaState
from dht.uid import UID
from expert_server.hosting.placement import lost_claims, vacant
from peer.averaging import MAX_UPDATE_COUNT
from peer.identity import PeerID

HERE = UID(0, (1, 2))
CLAIMANT, OTHER = (PeerID(b"\x12\x20" + bytes([n]) * 32) for n in (1, 2))
START = 1_000_000.0


@pytest.mark.parametrize("claimed_at", ["now", START + 10**9, math.inf, math.nan, -1.0, 0.0, 1.0])
def test_a_claim_that_is_renewed_for_ever_becomes_stale(claimed_at: object) -> None:
    ages = ClaimAges()
    for second in range(0, 4 * int(MAX_CLAIM_S), 30):
        now = START + second
        says = now if claimed_at == "now" else claimed_at
        assert isinstance(says, float)
        stale = ages.is_stale(HERE, CLAIMANT, says, now)
        assert stale == (second > MAX_CLAIM_S or says == 1.0)
    assert not ages.is_stale(HERE, OTHER, START + 4 * MAX_CLAIM_S, START + 4 * MAX_CLAIM_S)


def test_how_long_a_claim_counts_can_be_set() -> None:
    ages = ClaimAges(60.0)
    assert not ages.is_stale(HERE, CLAIMANT, START, START + 59)
    assert ages.is_stale(HERE, CLAIMANT, START, START + 61)


@given(st.lists(st.floats(0, MAX_CLAIM_S / 4), min_size=1, max_size=30))
def test_a_fresh_and_honest_claim_is_never_stale(waits: list[float]) -> None:
    ages, now = ClaimAges(), START
    for wait_s in waits:
        now += wait_s
        assert ages.is_stale(HERE, CLAIMANT, START, now) == (now > START + MAX_CLAIM_S)


def test_a_claim_that_was_made_good_or_given_up_long_ago_starts_anew() -> None:
    ages = ClaimAges()
    ages.is_stale(HERE, CLAIMANT, START, START)
    ages.forget(HERE, CLAIMANT)
    later = START + MAX_CLAIM_S - 1
    ages.is_stale(HERE, CLAIMANT, later, later)
    assert not ages.is_stale(HERE, CLAIMANT, later, later + 5)
    long_after = later + 5 + 2 * MAX_CLAIM_S
    assert not ages.is_stale(HERE, CLAIMANT, long_after, long_after)


def test_the_claims_of_many_peers_take_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dht.announcements._MAX_CLAIMS", 10)
    ages = ClaimAges()
    for n in range(100):
        ages.is_stale(UID(0, (n,)), CLAIMANT, START, START)
    assert len(ages._seen) == 10


@pytest.fixture
def world() -> Iterator[VirtualLoop]:
    with simulated_world() as loop:
        yield loop


@pytest.mark.parametrize("update_count", [0, MAX_UPDATE_COUNT])
def test_a_claim_that_is_not_made_good_keeps_others_away_as_long_whatever_it_counts(
    world: VirtualLoop, update_count: int
) -> None:
    """A huge update count wins against claims made at the same time. A peer that claims first wins without one."""
    saved = {HERE: 5000}

    async def run() -> None:
        swarm = await SimulatedSwarm.start(world, 2, 4, Link(rtt_s=0.1), seed=1)
        honest, liar = swarm.peers
        began = world.unix_time()
        for minute in range(120):
            now = world.unix_time()
            claim = ReplicaAnnouncement(HERE, ReplicaState.CLAIMED, update_count, claimed_at=now)
            await liar.experts.announce([claim], 90.0)
            found = await honest.experts.replicas([HERE])
            counts = now <= began + MAX_CLAIM_S
            assert vacant(found) == ([] if counts else [HERE]), minute
            wins = counts and update_count > 0
            assert lost_claims([HERE], found, honest.peer_id, saved) == ([HERE] if wins else []), minute
            await asyncio.sleep(60)

    world.run_until_complete(run())
