"""A founder is told whether others can join with its invite."""

import pytest

from peer.transport.addresses import Multiaddress
from talkoot.node.invites import invite_advice

PEER = "/p2p/QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"
HOME, PUBLIC = f"/ip4/192.168.1.2/tcp/31337{PEER}", f"/ip4/44.1.1.1/tcp/31337{PEER}"


@pytest.mark.parametrize(
    ("bootstrap", "host"),
    [
        ([PUBLIC], "44.1.1.1"),
        ([HOME, PUBLIC], "192.168.1.2"),
        ([f"{PUBLIC}/p2p-circuit{PEER}"], "192.168.1.2"),
        ([f"/dns/home.example/tcp/31337{PEER}"], "192.168.1.2"),
        ([f"/ip4/127.0.0.1/tcp/31337{PEER}"], "127.0.0.1"),
    ],
    ids=["public", "another way in", "by a relay", "a name", "all on one machine"],
)
def test_an_invite_that_lets_people_in_needs_no_advice(bootstrap: list[str], host: str) -> None:
    assert invite_advice([*map(Multiaddress, bootstrap)], host, 31337) == ""


def test_an_invite_from_behind_a_router_comes_with_what_to_do() -> None:
    advice = invite_advice([Multiaddress(HOME)] * 2, "192.168.1.2", 31337)
    assert "nobody outside this network can join" in advice
    assert "(192.168.1.2)" in advice
    assert "forward TCP port 31337 on your router to 192.168.1.2" in advice
    assert "announce_host" in advice


@pytest.mark.parametrize("address", ["10.0.0.1", "100.64.0.9", "fd00::1", "169.254.3.4"])
def test_carriers_and_local_addresses_are_private_too(address: str) -> None:
    kind = "ip6" if ":" in address else "ip4"
    assert address in invite_advice([Multiaddress(f"/{kind}/{address}/tcp/1{PEER}")], address, 0)


def test_a_port_that_changes_with_each_run_is_to_be_fixed_first() -> None:
    assert "pass --port, forward that TCP port" in invite_advice([Multiaddress(HOME)], "192.168.1.2", 0)


def test_a_founder_without_a_network_learns_that_it_is_alone() -> None:
    loopback = f"/ip4/127.0.0.1/tcp/31337{PEER}"
    assert "this machine has no network" in invite_advice(
        [Multiaddress(loopback)], "127.0.0.1", 0, chosen=False
    )
    assert invite_advice([Multiaddress(loopback), Multiaddress(PUBLIC)], "127.0.0.1", 0, chosen=False) == ""


def test_an_invite_without_an_address_is_told() -> None:
    assert "it has no address" in invite_advice([], "192.168.1.2", 0)
