"""Relays over gRPC die, in network namespaces of the kernel: the nodes behind them stay reachable, without p2pd."""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from home_swarm import manifest_in, village_in
from preloaded import Preloaded

from benchmarks.homes import START_S, Program, Village
from benchmarks.namespaces import Machine, why_not
from peer.identity import Identity

PUBLIC = 4
REPLACED_S = 60.0
STEPS = 4
WATCHER = """
import asyncio, sys
from pathlib import Path

from dht.invites import Invite
from dht.swarm import join_swarm
from peer.host import NetworkConfig
from peer.identity import Identity, PeerID
from peer.loop import new_loop

folder, invite, listen, name = sys.argv[1:]

async def main():
    network = NetworkConfig(listen, serves_dht=False)
    key = Identity.load_or_create(Path(folder) / "watcher.key")
    swarm = await join_swarm(key, Invite.parse(invite), network)
    peer_id = PeerID.from_base58(name)
    while True:
        node = (await swarm.registry.nodes([peer_id])).get(peer_id)
        relays = () if node is None else node.relay_addresses
        with (Path(folder) / "relays.new").open("w") as file:
            file.write(" ".join(address.endpoint.host for address in relays))
        (Path(folder) / "relays.new").rename(Path(folder) / "relays")
        await asyncio.sleep(0.5)

asyncio.Runner(loop_factory=new_loop).run(main())
"""
"""Writes down again and again the hosts at which a node says its relays are."""

NOT_HERE = why_not()
pytestmark = [
    pytest.mark.skipif(bool(NOT_HERE), reason=NOT_HERE),
    pytest.mark.timeout(400),
    pytest.mark.slow,  # tests/peer/relays has the same in one process
    pytest.mark.usefixtures("p2pd"),
]


@pytest.fixture
def village(tmp_path: Path) -> Iterator[Village]:
    with village_in(tmp_path) as made:
        yield made


@contextlib.contextmanager
def watching(machine: Machine, folder: Path, invite: str, node: Program) -> Iterator[Callable[[], set[str]]]:
    """Yields a function that returns the hosts of the relays that the node announces now."""
    name = Identity.load_or_create(node.folder / "state" / "identity.key").peer_id.to_base58()
    arguments = ["-W", "ignore", "-c", WATCHER, str(folder), invite, machine.address, name]
    process = Preloaded(*arguments, network=machine.namespace)

    def relays() -> set[str]:
        assert process.poll() is None
        written = folder / "relays"
        return set(written.read_text().split()) if written.exists() else set()

    try:
        yield relays
    finally:
        process.kill()
        process.wait()


def until(condition: Callable[[], object], within_s: float) -> float:
    """Waits for the condition. Returns how long it took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() < began + within_s
        time.sleep(0.1)
    return time.monotonic() - began


def test_training_goes_on_when_the_relays_of_a_home_die_one_after_the_other(
    village: Village, tmp_path: Path
) -> None:
    """The home with all experts has no p2pd. The trainer, in another home, has one."""
    machines = [village.net.public() for _ in range(PUBLIC)]
    founder = village.node(machines[0], "--new", manifest_in(tmp_path), "--experts", 0, "--spare", 0)
    founder.wait_for("an invite", lambda: founder.events("invite"))
    invite = str(founder.events("invite")[0]["invite"])
    joining = ("--join", invite, "--spare", 0, "--p2pd", "off")
    others = [village.node(machine, *joining, "--experts", 0) for machine in machines[1:]]
    public = dict(zip((machine.address for machine in machines), (founder, *others), strict=True))
    for node in others:
        node.wait_until_reached("direct")
    # Its upload is limited, since it would otherwise use the whole machine while others wait.
    home = village.node(village.net.home(), *joining, "--experts", 4, "--upload-mbit", 1)
    home.wait_until_reached("relayed by 2 relays")
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 200)
    training = village.run(
        village.net.home(), "train", "--join", invite, "--data", text, "--steps", 100_000,
        "--batch-size", 2, "--threads", 1,
    )  # fmt: skip

    def trains_on() -> None:
        steps = len(training.events("step"))
        training.wait_for("steps", lambda: len(training.events("step")) >= steps + STEPS)

    trains_on()
    with watching(village.net.public(), tmp_path, invite, home) as relays:
        until(lambda: len(relays()) == 2, START_S)
        first = relays()

        def kill(host: str) -> None:
            public[host].process.kill()
            took_s = until(lambda: len(relays()) == 2 and host not in relays(), REPLACED_S)
            print(f"replaced after {took_s:.1f} s")

        for host in first:
            kill(host)
            trains_on()
        assert not relays() & first
    home.wait_until_updated()
