"""The formulas of the swarm, compared with brute force and random trials."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.internet.flow import ideal_throughput
from benchmarks.internet.formulas import (
    DAY_S,
    Token,
    adoption_time,
    all_die,
    chain_probabilities,
    failure_rate,
    losses_per_day,
    most_loaded,
    most_tokens_per_s,
    replicas_needed,
    stretched_period,
    updates_lost,
    upkeep_bit_per_s,
    vacant_share,
)
from benchmarks.internet.on_paper import comparisons

rates = st.floats(1e-3, 1e3)


@given(st.floats(1, 1e7), st.floats(1e3, 1e5))
def test_a_period_stretches_until_upkeep_is_within_the_budget(size: float, budget: float) -> None:
    period_s = stretched_period(size, budget, 10.0, 120.0)
    assert 10.0 <= period_s <= 120.0
    spent = upkeep_bit_per_s(size, period_s)
    if period_s < 120.0:
        assert spent <= 2 * budget * (1 + 1e-9)
    if period_s > 10.0:
        assert spent >= 2 * budget * (1 - 1e-9)


@given(st.integers(1, 6), st.integers(1, 5), st.data())
def test_throughput_is_what_the_maximum_flow_says(experts: int, nodes: int, data: st.DataObject) -> None:
    """For one layer in which every node hosts every expert."""
    share = np.array(data.draw(st.lists(st.floats(0.1, 1), min_size=experts, max_size=experts)))
    share /= share.sum()
    capacity = np.array(data.draw(st.lists(st.floats(1, 100), min_size=nodes, max_size=nodes)))
    token = Token(layers=1, top_k=2, nodes=2, row_bytes=100.0)
    everywhere = ideal_throughput(2 * share, [range(nodes)] * experts, capacity)
    assert most_tokens_per_s(token, capacity.sum(), 1e12) == pytest.approx(everywhere.as_placed, rel=1e-5)


def test_lines_limit_what_is_trained() -> None:
    """With two layers and two nodes each, a token takes four rows of activations and four of gradients."""
    token = Token(layers=2, top_k=4, nodes=2, row_bytes=125.0)
    assert token.bytes == 8 * 125
    assert most_tokens_per_s(token, 1e9, 8000.0) == 1.0


@given(st.lists(st.tuples(rates, rates), min_size=1, max_size=6))
def test_a_chain_is_in_balance(pairs: list[tuple[float, float]]) -> None:
    deaths, repairs = zip(*pairs, strict=True)
    chances = chain_probabilities(deaths, repairs)
    assert sum(chances) == pytest.approx(1)
    for state, (down, up) in enumerate(pairs):
        assert chances[state] * up == pytest.approx(chances[state + 1] * down)


def test_a_chain_is_as_often_in_each_state_as_one_that_is_played() -> None:
    deaths, repairs, rng = [1.0, 2.0], [3.0, 1.5], random.Random(1)
    spent, state = [0.0, 0.0, 0.0], 0
    for _ in range(100_000):
        down = deaths[state - 1] if state else 0.0
        up = repairs[state] if state < 2 else 0.0
        spent[state] += rng.expovariate(down + up)
        state += 1 if rng.random() < up / (down + up) else -1
    assert [each / sum(spent) for each in spent] == pytest.approx(
        chain_probabilities(deaths, repairs), rel=0.03
    )


def test_as_many_die_in_a_day_as_was_said() -> None:
    rng, rate = random.Random(1), failure_rate(0.2)
    dead = sum(rng.expovariate(rate) < DAY_S for _ in range(100_000))
    assert dead / 100_000 == pytest.approx(0.2, rel=0.02)


@given(st.integers(1, 5), st.floats(0.01, 0.5), st.floats(1, 3600), st.floats(1, 3600))
def test_another_replica_never_harms(replicas: int, daily: float, repair_s: float, adopt_s: float) -> None:
    rate = failure_rate(daily)
    fewer, more = (vacant_share(count, rate, repair_s, adopt_s) for count in (replicas, replicas + 1))
    assert 0 < more < fewer < 1
    assert losses_per_day(replicas, rate, repair_s, adopt_s) == pytest.approx(fewer * DAY_S / adopt_s)
    assert replicas_needed(fewer, rate, repair_s, adopt_s) == replicas


def test_what_no_number_of_replicas_can_give_is_refused() -> None:
    with pytest.raises(ValueError, match="not even 2 replicas"):
        replicas_needed(1e-15, failure_rate(0.9), 3600, 3600, most=2)


@given(st.integers(1, 6), st.data())
def test_hosts_die_together_as_often_as_when_the_dead_are_drawn(replicas: int, data: st.DataObject) -> None:
    nodes = data.draw(st.integers(replicas, 40))
    dying = data.draw(st.integers(0, nodes))
    chance = 1.0
    for number in range(replicas):
        chance *= max(0, dying - number) / (nodes - number)
    assert all_die(nodes, dying, replicas) == pytest.approx(chance)


def test_updates_since_the_last_average_are_lost() -> None:
    rng, rate, every_s = random.Random(1), failure_rate(0.2), 600.0
    lives = [rng.expovariate(rate) for _ in range(50_000)]
    lost = sum(life % every_s for life in lives) / sum(lives)
    assert updates_lost(rate, every_s) == pytest.approx(lost, rel=0.03)


@pytest.mark.slow
@given(st.integers(1, 4), st.integers(1, 20))
def test_adoption_takes_as_long_as_when_it_is_played(sights: int, lookers: int) -> None:
    rng, period_s, again_s = random.Random(sights * 100 + lookers), 10.0, 5.0
    times = []
    for _ in range(4000):
        expires = 3 * period_s - rng.uniform(0, period_s)
        firsts = [rng.uniform(0, period_s) for _ in range(lookers)]
        times.append(expires + min(firsts) + (sights - 1) * again_s + 1.0)
    found = adoption_time(period_s, 3, sights, again_s, 1.0, lookers)
    assert found.mean_s == pytest.approx(sum(times) / len(times), rel=0.03)
    assert max(times) <= found.longest_s


@pytest.mark.slow
def test_the_most_loaded_peer_is_as_in_a_drawn_swarm() -> None:
    nodes, keys, holders, rng = 400, 800, 5, random.Random(1)
    found = []
    for _ in range(8):
        places = [rng.getrandbits(64) for _ in range(nodes)]
        held = dict.fromkeys(places, 0)
        for _ in range(keys):
            key = rng.getrandbits(64)
            for place in sorted(places, key=key.__xor__)[:holders]:
                held[place] += 1
        found.append(max(held.values()) / (keys * holders / nodes))
    assert most_loaded(nodes, keys, holders) == pytest.approx(sum(found) / len(found), rel=0.2)


def test_more_keys_are_spread_more_evenly() -> None:
    few, many = most_loaded(1000, 200, 5), most_loaded(1000, 200_000, 5)
    assert 1 < many < few


def test_the_formulas_stand_beside_what_was_simulated() -> None:
    """A tenth of 1,000 nodes dies, with a tenth of 1,750 replicas: half of the experts have two, and half three."""
    days = {
        "served": 0.999,
        "updates_lost_share": 0.001,
        "period_s": 150.0,
        "round_bytes": 150_000.0,
        "upkeep": {"mean_kbit_per_s": 19.0, "most_kbit_per_s": 70.0},
        "servers": 400,
        "keys": 3000,
    }
    died = {
        "experts": 700,
        "died": 100,
        "replicas_lost": 175,
        "vacant": 4,
        "period_s": 100.0,
        "served_again_periods": 4.6,
    }
    trained = {
        "trainers": 100,
        "layers": 2,
        "experts_per_token": 4.0,
        "rows_per_token": 3.0,
        "row_bytes": 1000.0,
        "rows_per_s": 8e5,
        "bit_per_s": 1e9,
        "ideal_free": 9e3,
    }
    results = {
        "days": {"1000": days},
        "events": {"1000": {"tenth_dies": died}},
        "train": {"1000": trained},
    }
    found = {each.what: each for each in comparisons(results)}
    vacant = next(each for what, each in found.items() if "without a host" in what)
    assert float(vacant.on_paper) == pytest.approx(350 * 0.1**2 + 350 * 0.1**3, rel=0.05)
    assert vacant.simulated == "4"
    assert [each.simulated for what, each in found.items() if "volunteers" in what or "lost" in what] == [
        "1.0e-03",
        "1.0e-03",
    ]
    (again,) = (each for each in found.values() if each.simulated == "4.6")
    # records live for 1.7 periods of 100 s; two or five looks, a quarter of a period apart
    assert again.on_paper == "1.6 to 3.0, 2.3 to 3.7"
    period = next(each for what, each in found.items() if "period" in what and "announcements" in what)
    assert (period.on_paper, period.simulated) == ("167", "150")
    (most,) = (each for what, each in found.items() if "trainers" in what)
    # 1e9 bit/s divided by 2 × 2 × 3 rows of 8,000 bits.
    assert (most.on_paper, most.simulated) == ("10,417", "9,000")
