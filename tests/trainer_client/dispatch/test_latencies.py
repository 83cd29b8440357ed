"""Quantiles are of the last calls, and nothing grows with their number."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peer.identity import PeerID
from peer.metrics import SECONDS, Distribution
from trainer_client.dispatch.policy import Durations, Latencies, Quantiles


def peer(number: int) -> PeerID:
    return PeerID(b"\x12\x20" + number.to_bytes(32, "big"))


def test_quantiles_are_of_values_that_were_seen() -> None:
    durations = Durations()
    assert durations.quantiles() is None
    for hundredths in range(1, 101):
        durations.note(hundredths / 100)
    assert durations.quantiles() == Quantiles(0.5, 0.99)


def test_old_calls_are_forgotten_in_quantiles_and_counted_in_the_histogram() -> None:
    durations = Durations()
    for _ in range(600):
        durations.note(9.0)
    for _ in range(600):
        durations.note(0.001)
    assert durations.quantiles() == Quantiles(0.001, 0.001)
    assert durations.all.count == 1200


@given(st.lists(st.floats(0, 100)))
def test_buckets_count_what_is_no_larger(values: list[float]) -> None:
    distribution = Distribution(SECONDS)
    for value in values:
        distribution.note(value)
    found = distribution.buckets()
    assert [bound for bound, _ in found] == [*map(str, SECONDS), "+Inf"]
    for bound, count in found:
        assert count == sum(value <= float(bound) for value in values)
    assert distribution.total == pytest.approx(sum(values))


def test_a_nodes_mean_moves_towards_its_calls() -> None:
    latencies = Latencies()
    latencies.note_node(peer(1), 1.0)
    latencies.note_node(peer(1), 2.0)
    assert latencies.nodes == {peer(1): pytest.approx(1.25)}


def test_the_nodes_called_longest_ago_are_forgotten() -> None:
    latencies = Latencies()
    for number in range(5000):
        latencies.note_node(peer(number), 1.0)
    assert list(latencies.nodes) == [peer(number) for number in range(904, 5000)]
