"""What a node concludes from others' attempts to dial it back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dht.announcements import Reachability
from expert_server.probe import DialledBack
from expert_server.reachability import DialledPorts, ReachabilityStatus, advice, judge

HOME, OUTSIDE = "192.168.1.5", "198.51.100.1"


def dial(service: bool, dht: bool = True, address: str = OUTSIDE) -> DialledPorts:
    return DialledPorts(DialledBack(service, address, ""), DialledBack(dht, address, ""))


def test_a_node_that_most_reach_is_reached_at_the_address_they_see() -> None:
    judgement = judge([dial(True), dial(True), dial(False, dht=False)])
    assert (judgement.service, judgement.dht, judgement.reached_at) == (True, True, (OUTSIDE,))


def test_a_neighbour_at_home_does_not_make_a_node_reachable() -> None:
    judgement = judge([dial(False, False), dial(True, True, HOME), dial(False, False)])
    assert not judgement.service
    assert judgement.reached_at == (HOME,), "the neighbour may still call it there"


def test_the_ports_are_judged_apart() -> None:
    judgement = judge([dial(True, dht=False)])
    assert judgement.service
    assert not judgement.dht


def test_nobody_asked_is_nothing_known() -> None:
    judgement = judge([])
    assert judgement.asked == 0
    assert not judgement.service


@given(st.lists(st.booleans(), min_size=3, max_size=3))
def test_one_liar_among_three_changes_nothing(truth: list[bool]) -> None:
    if len(set(truth)) == 1:
        for liar in range(3):
            said = [not told if i == liar else told for i, told in enumerate(truth)]
            assert judge([dial(reached) for reached in said]).service is truth[0]


@pytest.mark.parametrize(
    ("kind", "host", "ports", "said"),
    [
        (Reachability.DIRECT, HOME, (1, 2), ""),
        (Reachability.UNKNOWN, HOME, (1, 2), ""),
        (
            Reachability.RELAYED,
            HOME,
            (31337, 50051),
            "forward TCP ports 31337 and 50051 on your router to " + HOME,
        ),
        (Reachability.RELAYED, HOME, (0, 50051), "pass --dht-port and --grpc-port"),
        (Reachability.PUNCHED, "44.1.1.1", (31337, 50051), "firewall"),
    ],
)
def test_advice_names_the_ports_to_forward(
    kind: Reachability, host: str, ports: tuple[int, int], said: str
) -> None:
    told = advice(ReachabilityStatus(kind), host, *ports)
    assert told.startswith(said) if said != "firewall" else said in told
    assert bool(told) is bool(said)


def test_a_reach_is_told_in_words() -> None:
    assert ReachabilityStatus(Reachability.RELAYED, relays=1).in_words == "relayed by 1 relay"
    assert ReachabilityStatus(Reachability.RELAYED, looking=True).in_words == "looking for a relay"
    assert "no other node to ask" in ReachabilityStatus().in_words
