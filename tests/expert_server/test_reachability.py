"""What a node concludes when others try to dial it back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dht.announcements import Reachability
from expert_server.probe import DialledBack
from expert_server.reachability import ReachabilityStatus, advice, judge

HOME, OUTSIDE = "192.168.1.5", "198.51.100.1"


def dial(reached: bool, address: str = OUTSIDE) -> DialledBack:
    return DialledBack(reached, address, "")


def test_a_node_that_most_reach_is_reached_at_the_address_they_see() -> None:
    judgement = judge([dial(True), dial(True), dial(False)])
    assert (judgement.reached, judgement.reached_at) == (True, (OUTSIDE,))


def test_a_neighbour_at_home_does_not_make_a_node_reachable() -> None:
    judgement = judge([dial(False), dial(True, HOME), dial(False)])
    assert not judgement.reached
    assert judgement.reached_at == (HOME,), "the neighbour may still call it there"


def test_nobody_asked_is_nothing_known() -> None:
    judgement = judge([])
    assert judgement.asked == 0
    assert not judgement.reached


@given(st.lists(st.booleans(), min_size=3, max_size=3))
def test_one_liar_among_three_changes_nothing(truth: list[bool]) -> None:
    if len(set(truth)) == 1:
        for liar in range(3):
            said = [not told if i == liar else told for i, told in enumerate(truth)]
            assert judge([dial(reached) for reached in said]).reached is truth[0]


@pytest.mark.parametrize(
    ("kind", "host", "port", "said"),
    [
        (Reachability.DIRECT, HOME, 1, ""),
        (Reachability.UNKNOWN, HOME, 1, ""),
        (Reachability.RELAYED, HOME, 50051, "forward TCP port 50051 on your router to " + HOME),
        (Reachability.RELAYED, HOME, 0, "pass --port"),
        (Reachability.PUNCHED, "44.1.1.1", 50051, "firewall"),
    ],
)
def test_advice_names_the_port_to_forward(kind: Reachability, host: str, port: int, said: str) -> None:
    told = advice(ReachabilityStatus(kind), host, port)
    assert told.startswith(said) if said != "firewall" else said in told
    assert bool(told) is bool(said)


def test_a_reach_is_told_in_words() -> None:
    assert ReachabilityStatus(Reachability.RELAYED, relays=1).in_words == "relayed by 1 relay"
    assert ReachabilityStatus(Reachability.RELAYED, looking=True).in_words == "looking for a relay"
    refused = ReachabilityStatus(Reachability.RELAYED, looking=True, refusal="it is full")
    assert refused.in_words == "looking for a relay: it is full"
    assert "no other node to ask" in ReachabilityStatus().in_words
    assert ReachabilityStatus(Reachability.DIRECT, asked=3).in_words == "direct"
