"""A peer's host starts, joins and stops, and leaves nothing behind, however it ends."""

import asyncio
import os
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest
from callers import numbered_identities

from peer.errors import StartError, UnreachableError, UserError
from peer.host import Host
from peer.identity import Identity
from peer.loop import LoopThread
from peer.processes import _is_unbound, die_with_parent
from peer.transport.addresses import Multiaddress, NetworkConfig, default_listen_address, require_free_port
from peer.transport.endpoints import Endpoint
from peer.transport.p2pd import Daemon

pytestmark = pytest.mark.filterwarnings("ignore:path is deprecated:DeprecationWarning")  # hivemind's, on 3.11

LOCAL = "127.0.0.1"

OWNER = """
import asyncio, sys
from pathlib import Path
import psutil
from peer.host import Host
from peer.identity import Identity
from peer.transport.addresses import NetworkConfig

async def main():
    host = await Host.start(Identity.load_or_create(Path(sys.argv[1])), NetworkConfig("127.0.0.1"))
    print(psutil.Process().children()[0].pid, host.p2p.daemon_listen_maddr["unix"], flush=True)
    await asyncio.sleep(300)

asyncio.run(main())
"""


@pytest.fixture(scope="module")
def identities() -> list[Identity]:
    return numbered_identities(3)


@pytest.fixture(scope="module")
def first(loop: LoopThread, identities: list[Identity]) -> Iterator[Host]:
    host = loop.run(Host.start(identities[0], NetworkConfig(LOCAL)))
    yield host
    loop.run(host.stop())


@pytest.fixture
def sockets(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[Path]]:
    """Lists the socket files that hosts of this test have made and not removed."""
    used: list[Path] = []

    def note_socket(arguments: Sequence[str]) -> list[str]:
        (listen,) = [a for a in arguments if a.startswith("-listen=/unix")]
        used.append(Path(listen.removeprefix("-listen=/unix")).parent)
        return die_with_parent(arguments)

    monkeypatch.setattr("peer.transport.p2pd.die_with_parent", note_socket)

    def left() -> list[Path]:
        assert used, "no host was started"
        return [path for folder in used for path in (folder, *folder.glob("*")) if path.exists()]

    return left


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """Accepts connections, and never says a word."""
    with socket.create_server((LOCAL, 0)) as server:
        yield server


def wait_until(condition: Callable[[], bool], deadline_s: float = 60.0) -> None:
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, "the condition did not come true in time"
        time.sleep(0.01)


def daemons() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


def descriptors() -> int:
    return int(psutil.Process().num_fds())


def tcp_address(port: int, identity: Identity, host: str = LOCAL) -> Multiaddress:
    return Multiaddress.of(Endpoint.of(host, port), identity.peer_id)


def free_port() -> int:
    with socket.create_server((LOCAL, 0)) as server:
        return int(server.getsockname()[1])


async def start_and_stop(identity: Identity, bootstrap: list[Multiaddress]) -> None:
    host = await Host.start(identity, NetworkConfig(LOCAL), bootstrap=bootstrap)
    await host.stop()


def test_two_hosts_find_each_others_values(loop: LoopThread, identities: list[Identity], first: Host) -> None:
    async def scenario() -> None:
        bootstrap = await first.bootstrap_addresses()
        assert bootstrap
        host = await Host.start(identities[1], NetworkConfig(LOCAL), bootstrap=bootstrap)
        try:
            assert host.peer_id == host.p2p.peer_id == identities[1].peer_id
            assert await host.dht.store("key", "value", time.time() + 60, subkey="subkey")
            found = await first.dht.get("key", latest=True)
            assert found.value["subkey"].value == "value"
        finally:
            await host.stop()

    loop.run(scenario(), 120)


def test_a_client_joins_but_listens_nowhere(
    loop: LoopThread, identities: list[Identity], first: Host
) -> None:
    async def scenario() -> None:
        host = await Host.start(
            identities[2], NetworkConfig(LOCAL, serves_dht=False), bootstrap=await first.bootstrap_addresses()
        )
        try:
            assert await host.dht.store("client's", 1, time.time() + 60)
            assert (await first.dht.get("client's")).value == 1
            assert host.peer_id not in first.dht.protocol.routing_table.peer_id_to_uid
            (daemon,) = [psutil.Process(pid) for pid in daemons() if pid == host.p2p._child.pid]
            assert not [c for c in daemon.net_connections(kind="tcp") if c.status == psutil.CONN_LISTEN]
        finally:
            await host.stop()

    loop.run(scenario(), 120)


def test_joining_works_when_only_one_of_several_addresses_answers(
    loop: LoopThread, identities: list[Identity], first: Host, closed_port: int
) -> None:
    async def scenario() -> None:
        good = await first.bootstrap_addresses()
        dead = [tcp_address(closed_port, identities[2])]
        host = await Host.start(identities[1], NetworkConfig(LOCAL), bootstrap=dead + good)
        await host.stop()

    loop.run(scenario(), 120)


def test_after_stop_no_daemon_socket_file_or_descriptor_is_left(
    loop: LoopThread, identities: list[Identity], first: Host, sockets: Callable[[], list[Path]]
) -> None:
    bootstrap = loop.run(first.bootstrap_addresses())
    loop.run(start_and_stop(identities[1], bootstrap), 120)  # what is opened once for all is open now
    wait_until(lambda: len(daemons()) == 1)
    open_before = descriptors()
    for _ in range(2):
        loop.run(start_and_stop(identities[1], bootstrap), 120)
        assert len(daemons()) == 1
        assert sockets() == []
        wait_until(lambda: descriptors() <= open_before)


def test_stopping_twice_and_after_the_daemon_died_is_harmless(
    loop: LoopThread, identities: list[Identity], sockets: Callable[[], list[Path]]
) -> None:
    host = loop.run(Host.start(identities[1], NetworkConfig(LOCAL)), 120)
    assert sockets()
    (pid,) = [pid for pid in daemons() if pid == host.p2p._child.pid]
    psutil.Process(pid).kill()
    wait_until(lambda: pid not in daemons())
    loop.run(host.stop(), 120)
    loop.run(host.stop(), 120)
    wait_until(lambda: sockets() == [])


def test_p2pd_dies_with_a_killed_process_and_the_next_start_sweeps_its_sockets(
    loop: LoopThread, identities: list[Identity], first: Host, tmp_path: Path
) -> None:
    live = Path(first.p2p.daemon_listen_maddr["unix"])
    owner = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", OWNER, str(tmp_path / "owner.key")],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert owner.stdout is not None
    with owner.stdout:
        pid, left = owner.stdout.readline().split()
    daemon = psutil.Process(int(pid))
    assert daemon.name() == "p2pd"
    assert Path(left).exists()
    owner.kill()
    owner.wait()
    wait_until(lambda: not daemon.is_running() or daemon.status() == psutil.STATUS_ZOMBIE)
    wait_until(lambda: _is_unbound(Path(left)))  # its last thread ends, and closes it, a moment later
    loop.run(start_and_stop(identities[1], []), 120)
    assert not Path(left).parent.exists()
    assert live.exists(), "the socket of a living host was swept"
    assert loop.run(first.bootstrap_addresses(), 120)


def test_no_other_user_can_enter_the_folder_of_the_sockets(
    loop: LoopThread, identities: list[Identity]
) -> None:
    before = os.umask(0)
    try:
        host = loop.run(Host.start(identities[1], NetworkConfig(LOCAL)), 120)
    finally:
        os.umask(before)
    try:
        sockets = [Path(host.p2p.daemon_listen_maddr["unix"]), Path(host.p2p._client_listen_maddr["unix"])]
        sockets.append(Path(host.tunnels.address_of(host.peer_id).removeprefix("unix:")))
        assert all(stat.S_IMODE(path.parent.stat().st_mode) == 0o700 for path in sockets)
        assert sockets[0].is_socket()
    finally:
        loop.run(host.stop(), 120)


def test_an_unreachable_bootstrap_is_said_at_once(
    loop: LoopThread, identities: list[Identity], closed_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peer.host.DIAL_DEADLINE_S", 600.0)  # which is not waited for
    addresses = [tcp_address(closed_port, identities[n]) for n in (0, 2)]
    with pytest.raises(UnreachableError, match="no bootstrap address answers") as caught:
        loop.run(start_and_stop(identities[1], addresses), 120)
    assert all(address in str(caught.value) for address in addresses)


def test_a_host_name_that_leads_nowhere_is_unreachable(loop: LoopThread, identities: list[Identity]) -> None:
    nowhere = tcp_address(80, identities[0], "no-such-host.invalid")
    with pytest.raises(UnreachableError):
        loop.run(start_and_stop(identities[1], [nowhere]), 120)


def test_a_host_name_in_an_invite_is_looked_up(
    loop: LoopThread, identities: list[Identity], first: Host
) -> None:
    async def scenario() -> None:
        (here,) = await first.bootstrap_addresses()
        named = tcp_address(here.endpoint.port, identities[0], "localhost")
        host = await Host.start(identities[1], NetworkConfig(LOCAL), bootstrap=[named])
        try:
            assert host.bootstrapped_from == (here,)
        finally:
            await host.stop()

    loop.run(scenario(), 120)


def test_a_bootstrap_that_is_no_peer_is_refused_in_bounded_time(
    loop: LoopThread,
    identities: list[Identity],
    listener: socket.socket,
    sockets: Callable[[], list[Path]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("peer.host.DIAL_DEADLINE_S", 0.5)
    before = daemons()
    address = tcp_address(listener.getsockname()[1], identities[0])
    with pytest.raises(UserError, match="no DHT peer answered there") as caught:
        loop.run(start_and_stop(identities[1], [address]), 120)
    assert "\n" not in str(caught.value)
    wait_until(lambda: daemons() == before and sockets() == [])


def test_a_bootstrap_with_another_key_is_refused(
    loop: LoopThread, identities: list[Identity], first: Host, sockets: Callable[[], list[Path]]
) -> None:
    before = daemons()
    port = int(loop.run(first.bootstrap_addresses())[0].split("/")[4])
    with pytest.raises(UserError, match="no DHT peer answered there"):
        loop.run(start_and_stop(identities[1], [tcp_address(port, identities[2])]), 120)
    wait_until(lambda: daemons() == before and sockets() == [])


def test_a_busy_port_is_named(loop: LoopThread, identities: list[Identity], listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    before = daemons()
    with pytest.raises(StartError, match=f"can't listen on 127.0.0.1 port {port}.*pass another port"):
        loop.run(Host.start(identities[1], NetworkConfig(LOCAL, port)), 120)
    assert daemons() == before


def test_an_address_of_another_machine_is_named() -> None:
    with pytest.raises(StartError, match=r"can't listen on 192\.0\.2\.1, .*`ip address` shows"):
        require_free_port("192.0.2.1", 0)


def test_a_free_port_is_used(loop: LoopThread, identities: list[Identity]) -> None:
    port = free_port()

    async def scenario() -> list[Multiaddress]:
        host = await Host.start(identities[1], NetworkConfig(LOCAL, port))
        try:
            return await host.bootstrap_addresses()
        finally:
            await host.stop()

    assert loop.run(scenario(), 120) == [tcp_address(port, identities[1])]


def test_a_cancelled_start_leaves_no_daemon(
    loop: LoopThread, identities: list[Identity], sockets: Callable[[], list[Path]]
) -> None:
    before = daemons()

    async def scenario() -> None:
        task = asyncio.create_task(Host.start(identities[1], NetworkConfig(LOCAL)))
        await asyncio.to_thread(wait_until, lambda: daemons() != before)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert task.cancelled()

    loop.run(scenario(), 120)
    wait_until(lambda: daemons() == before and sockets() == [])


def test_a_start_that_is_cancelled_as_the_daemon_gets_ready_is_cancelled(
    loop: LoopThread, identities: list[Identity], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = daemons()
    read_outputs = Daemon._read_outputs

    async def scenario() -> None:
        async def cancel_when_ready(self: Daemon, ready: "asyncio.Future[None]") -> None:
            ready.add_done_callback(lambda _: task.cancel())
            await read_outputs(self, ready)

        monkeypatch.setattr(Daemon, "_read_outputs", cancel_when_ready)
        task = asyncio.create_task(Host.start(identities[1], NetworkConfig(LOCAL)))
        await asyncio.wait([task])
        assert task.cancelled()

    loop.run(scenario(), 120)
    wait_until(lambda: daemons() == before)


def test_the_default_address_is_of_this_machine() -> None:
    require_free_port(default_listen_address(), 0)
