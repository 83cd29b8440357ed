"""A node in a home whose router forwards ports by UPnP: miniupnpd on nftables, in network namespaces of the kernel."""

import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from home_swarm import manifest_in, village_in

from benchmarks.homes import Program, Village
from benchmarks.namespaces import why_not
from dht.invites import Invite

NOT_HERE = why_not() or ("" if shutil.which("miniupnpd") else "miniupnpd missing: install it")
if sys.version_info >= (3, 14):
    NOT_HERE = "miniupnpc has no wheels for 3.14"
pytestmark = [pytest.mark.skipif(bool(NOT_HERE), reason=NOT_HERE), pytest.mark.timeout(400)]
PORT = 31337


@pytest.fixture
def village(tmp_path: Path) -> Iterator[Village]:
    with village_in(tmp_path) as made:
        yield made


def ended(node: Program, with_signal: signal.Signals) -> None:
    node.process.send_signal(with_signal)
    node.process.wait(60)


def test_a_node_is_public_as_long_as_its_router_forwards_the_port(village: Village, tmp_path: Path) -> None:
    founder = village.node(village.net.public(), "--new", manifest_in(tmp_path), "--experts", 0, "--spare", 0)
    founder.wait_for("an invite", lambda: founder.events("invite"))
    joining = ("--join", founder.events("invite")[0]["invite"], "--spare", 0, "--p2pd", "off",
               "--drain-timeout-s", 0)  # fmt: skip
    home = village.net.home()
    with village.net.upnp(home):
        state = tmp_path / "state"
        start = (home, *joining, "--port", PORT, "--experts", 4, "--state", state)
        first = village.node(*start)
        first.wait_until_reached(f"direct: the router at 192.168.2.1 forwards port {PORT}")
        assert f"dport {PORT}" in village.net.forwarded(home)
        ended(first, signal.SIGKILL)
        assert f"dport {PORT}" in village.net.forwarded(home)

        again = village.node(*start)
        again.wait_until_reached("direct: the router")
        # In another home, where only the founder and this node can be asked for a way to others.
        text = tmp_path / "text.txt"
        text.write_text("the quick brown fox jumps over the lazy dog. " * 200)
        trainer = village.run(
            village.net.home(), "train", "--join", joining[1], "--data", text, "--steps", 3, "--batch-size", 2,
            "--threads", 1, "--p2pd", "off",
        )  # fmt: skip
        again.wait_until_updated()
        ended(trainer, signal.SIGTERM)

        ended(again, signal.SIGTERM)
        assert f"dport {PORT}" not in village.net.forwarded(home)


def test_people_elsewhere_join_a_founder_at_home_by_the_port_that_its_router_forwards(
    village: Village, tmp_path: Path
) -> None:
    home = village.net.home()
    with village.net.upnp(home):
        founder = village.node(
            home,
            "--new",
            manifest_in(tmp_path),
            "--experts",
            4,
            "--spare",
            0,
            "--p2pd",
            "off",
            "--port",
            PORT,
        )
        founder.wait_for("a wider invite", lambda: len(founder.events("invite")) == 2)
        invite = founder.events("invite")[1]["invite"]
        assert Invite.parse(invite).bootstrap[0].endpoint == f"44.1.2.1:{PORT}"
        other = village.node(
            village.net.public(), "--join", invite, "--experts", 0, "--spare", 0, "--p2pd", "off"
        )
        other.wait_until_reached("direct")
        founder.wait_until_reached("direct: the router")
