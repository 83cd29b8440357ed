"""A peer's host starts, joins and stops, and leaves nothing behind however it ends."""

import asyncio
import socket
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from callers import numbered_identities
from grpc import StatusCode
from other_processes import children_with
from raw_dht import read_raw, store_raw
from real_swarm import eventually

from peer import PROTOCOL_VERSION, clock
from peer.errors import DaemonError, ExpertError, StartError, UnreachableError, UserError
from peer.host import Host, NetworkConfig
from peer.identity import Identity
from peer.kademlia.validation import unpack
from peer.loop import LoopThread
from peer.rpc.sessions import Admitted, AllowAll
from peer.transport import port_mapping
from peer.transport.addresses import Multiaddress, default_listen_address, require_free_port
from peer.transport.endpoints import Endpoint
from peer.transport.libp2p import Libp2p
from talkoot.demo.links import free_ports

LOCAL = "127.0.0.1"


@pytest.fixture(scope="module")
def identities() -> list[Identity]:
    return numbered_identities(4)


@pytest.fixture(scope="module")
def first(loop: LoopThread, identities: list[Identity]) -> Iterator[Host]:
    host = loop.run(Host.start(identities[0], NetworkConfig(LOCAL)))
    yield host
    loop.run(host.stop())


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """A server that accepts connections but sends nothing."""
    with socket.create_server((LOCAL, 0)) as server:
        yield server


def tcp_address(port: int, identity: Identity, host: str = LOCAL) -> Multiaddress:
    return Multiaddress.of(Endpoint.of(host, port), identity.peer_id)


def test_on_a_machine_without_the_time_a_peer_says_so_and_does_not_start(
    loop: LoopThread, identities: list[Identity], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some small machines have no clock of their own, and begin at 1970 until they are told the time."""
    monkeypatch.setattr(clock, "now", lambda: 60.0)
    with pytest.raises(StartError, match="clock says that it is 1970-01-01: set it right"):
        loop.run(start_and_stop(identities[1], []), 60)


async def start_and_stop(identity: Identity, bootstrap: list[Multiaddress]) -> None:
    host = await Host.start(identity, NetworkConfig(LOCAL), bootstrap=bootstrap)
    await host.stop()


def test_two_hosts_find_each_others_values(loop: LoopThread, identities: list[Identity], first: Host) -> None:
    async def scenario() -> None:
        bootstrap = first.bootstrap_addresses()
        assert bootstrap
        host = await Host.start(identities[1], NetworkConfig(LOCAL), bootstrap=bootstrap)
        try:
            assert host.peer_id == identities[1].peer_id
            assert await store_raw(host, "key", b"subkey", "value", time.time() + 60)
            assert unpack((await read_raw(first, "key"))[b"subkey"].value) == "value"
        finally:
            await host.stop()

    loop.run(scenario(), 120)


def test_a_client_joins_but_listens_nowhere(
    loop: LoopThread, identities: list[Identity], first: Host
) -> None:
    async def scenario() -> None:
        host = await Host.start(
            identities[2], NetworkConfig(LOCAL, serves_dht=False), bootstrap=first.bootstrap_addresses()
        )
        try:
            assert await store_raw(host, "client's", 1, b"value", time.time() + 60)
            assert unpack((await read_raw(first, "client's"))[1].value) == b"value"
            assert host.peer_id not in first.peers()
            assert host.server is None
            assert host.bootstrap_addresses() == []
        finally:
            await host.stop()

    loop.run(scenario(), 120)


def test_joining_works_when_only_one_of_several_addresses_answers(
    loop: LoopThread, identities: list[Identity], first: Host, closed_port: int
) -> None:
    async def scenario() -> None:
        good = first.bootstrap_addresses()
        dead = [tcp_address(closed_port, identities[2])]
        host = await Host.start(identities[1], NetworkConfig(LOCAL), bootstrap=dead + good)
        await host.stop()

    loop.run(scenario(), 120)


def test_a_peer_that_has_gone_has_failed_to_answer(
    loop: LoopThread, identities: list[Identity], first: Host
) -> None:
    async def scenario() -> None:
        # not the identity of a host that another test has stopped
        host = await Host.start(identities[3], NetworkConfig(LOCAL), bootstrap=first.bootstrap_addresses())
        failed_at_first = first.has_failed(host.peer_id)
        await host.stop()
        assert not failed_at_first

        async def failed() -> bool:
            await read_raw(first, "key")
            return first.has_failed(host.peer_id)

        await eventually(failed)

    loop.run(scenario(), 120)


def held() -> tuple[int, int]:
    """The numbers of open file descriptors and tasks."""
    return psutil.Process().num_fds(), len(asyncio.all_tasks())


async def holds_no_more_than(before: tuple[int, int]) -> bool:
    return all(now <= then for now, then in zip(held(), before, strict=True))


def test_after_stop_nothing_is_left(loop: LoopThread, identities: list[Identity], first: Host) -> None:
    async def scenario() -> None:
        bootstrap = first.bootstrap_addresses()
        await start_and_stop(identities[1], bootstrap)  # what is opened once for all is open now
        before = held()
        for _ in range(2):
            await start_and_stop(identities[1], bootstrap)
            await eventually(lambda: holds_no_more_than(before))

    loop.run(scenario(), 120)


def test_stopping_twice_is_harmless(loop: LoopThread, identities: list[Identity]) -> None:
    host = loop.run(Host.start(identities[1], NetworkConfig(LOCAL)), 120)
    loop.run(host.stop(), 120)
    loop.run(host.stop(), 120)


@pytest.mark.parametrize("delay_s", [0.0, 0.01, 0.05])
def test_a_cancelled_start_leaves_nothing(
    loop: LoopThread, identities: list[Identity], closed_port: int, delay_s: float
) -> None:
    """The host joins nobody: for a peer that it had met, it would keep what it needs to call that peer again."""

    async def scenario() -> None:
        before = held()
        remembered = [tcp_address(closed_port, identities[2])]
        task = asyncio.create_task(Host.start(identities[1], NetworkConfig(LOCAL), remembered=remembered))
        await asyncio.sleep(delay_s)
        task.cancel()
        (ended,) = await asyncio.gather(task, return_exceptions=True)
        if isinstance(ended, Host):  # it was quicker
            await ended.stop()
        await eventually(lambda: holds_no_more_than(before))

    loop.run(scenario(), 120)


def test_a_host_that_nobody_reaches_is_a_client_until_somebody_does(
    loop: LoopThread, identities: list[Identity], first: Host
) -> None:
    async def scenario() -> None:
        host = await Host.start(identities[1], NetworkConfig(LOCAL), bootstrap=first.bootstrap_addresses())
        try:
            host.serve_dht(False)
            assert host.bootstrap_addresses() == []
            with pytest.raises(UnreachableError):
                await start_and_stop(identities[2], [tcp_address(host.port, identities[1])])
            host.serve_dht(True)
            await start_and_stop(identities[2], host.bootstrap_addresses())
        finally:
            await host.stop()

    loop.run(scenario(), 120)


def test_others_hear_where_a_host_is_announced(
    loop: LoopThread, identities: list[Identity], first: Host
) -> None:
    async def scenario() -> None:
        host = await Host.start(identities[1], NetworkConfig(LOCAL), bootstrap=first.bootstrap_addresses())
        try:
            elsewhere = Endpoint.of("127.0.0.9", host.port)
            await host.announce_at([elsewhere, Endpoint.of("localhost", host.port)])
            assert host.bootstrap_addresses()[-1] == tcp_address(host.port, identities[1], "localhost")
            await host.join(first.bootstrap_addresses())
            contact = first.contacts.get(host.peer_id)
            assert contact is not None
            assert contact.addresses[0] == elsewhere
        finally:
            await host.stop()

    loop.run(scenario(), 120)


def test_a_name_that_no_server_knows_for_a_while_leads_where_it_led(
    loop: LoopThread, identities: list[Identity], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        host = await Host.start(identities[1], NetworkConfig(LOCAL))
        try:
            name, number = Endpoint.of("localhost", host.port), Endpoint.of("127.0.0.9", host.port)
            led = await host.look_up([name])
            assert led

            async def fails(endpoints: Iterable[Endpoint]) -> list[Endpoint]:
                return [endpoint for endpoint in endpoints if endpoint.ip is not None]

            monkeypatch.setattr("peer.host.resolved", fails)
            assert await host.look_up([number, name]) == [number, *led]
            await host.announce_at([name])
            assert host._transport.own_contact() is not None, "or nobody would be told where it is"
        finally:
            await host.stop()

    loop.run(scenario(), 120)


def test_an_unreachable_bootstrap_is_said_at_once(
    loop: LoopThread, identities: list[Identity], closed_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peer.host.DIAL_DEADLINE_S", 600.0)  # which is not waited for
    addresses = [tcp_address(closed_port, identities[n]) for n in (0, 2)]
    with pytest.raises(UnreachableError, match="none of the bootstrap addresses answers") as caught:
        loop.run(start_and_stop(identities[1], addresses), 120)
    assert all(address in str(caught.value) for address in addresses)


def test_a_founder_that_joins_by_its_own_invite_is_told_how_to_start_again(
    loop: LoopThread, identities: list[Identity], closed_port: int
) -> None:
    with pytest.raises(UnreachableError, match=r"leads to this node itself.* --new again"):
        loop.run(start_and_stop(identities[1], [tcp_address(closed_port, identities[1])]), 120)


def test_a_host_name_that_leads_nowhere_is_unreachable(loop: LoopThread, identities: list[Identity]) -> None:
    nowhere = tcp_address(80, identities[0], "no-such-host.invalid")
    with pytest.raises(UnreachableError):
        loop.run(start_and_stop(identities[1], [nowhere]), 120)


def test_a_host_name_in_an_invite_is_looked_up(
    loop: LoopThread, identities: list[Identity], first: Host
) -> None:
    async def scenario() -> None:
        (here,) = first.bootstrap_addresses()
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
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("peer.host.DIAL_DEADLINE_S", 0.5)
    monkeypatch.setattr("peer.host._PATIENCE_S", (0.1, 0.5))
    address = tcp_address(listener.getsockname()[1], identities[0])
    with pytest.raises(UserError, match="no DHT peer answered there") as caught:
        loop.run(start_and_stop(identities[1], [address]), 120)
    assert "\n" not in str(caught.value)


def test_a_bootstrap_with_another_key_is_refused(
    loop: LoopThread, identities: list[Identity], first: Host
) -> None:
    port = first.port
    with pytest.raises(UserError, match="no DHT peer answered there"):
        loop.run(start_and_stop(identities[1], [tcp_address(port, identities[2])]), 120)


def test_peers_of_another_swarm_are_named(loop: LoopThread, identities: list[Identity], first: Host) -> None:
    bootstrap = first.bootstrap_addresses()
    with pytest.raises(UnreachableError, match=r"belongs to swarm .*, the call is for 'sauna'"):
        loop.run(Host.start(identities[1], NetworkConfig(LOCAL), bootstrap=bootstrap, swarm_id="sauna"), 120)


def test_peers_of_another_protocol_version_are_named(
    loop: LoopThread, identities: list[Identity], first: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peer.rpc.sessions.PROTOCOL_VERSION", 3)
    with pytest.raises(UnreachableError, match=f"speaks protocol version {PROTOCOL_VERSION}, the caller 3"):
        loop.run(start_and_stop(identities[1], first.bootstrap_addresses()), 120)


def test_peers_that_deny_this_one_are_named(loop: LoopThread, identities: list[Identity]) -> None:
    class DenyAll(AllowAll):
        def admit(self, *arguments: Any) -> Admitted:
            raise ExpertError(StatusCode.PERMISSION_DENIED, "this peer is denied here")

    async def scenario() -> None:
        host = await Host.start(identities[0], NetworkConfig(LOCAL), admission=DenyAll())
        try:
            with pytest.raises(UnreachableError, match="this peer is denied here"):
                await start_and_stop(identities[1], host.bootstrap_addresses())
        finally:
            await host.stop()

    loop.run(scenario(), 120)


def test_a_busy_port_is_named(loop: LoopThread, identities: list[Identity], listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    with pytest.raises(StartError, match=f"can't listen on 127.0.0.1 port {port}.*pass another port"):
        loop.run(Host.start(identities[1], NetworkConfig(LOCAL, port)), 120)


def test_an_address_of_another_machine_is_named() -> None:
    with pytest.raises(StartError, match=r"can't listen on 192\.0\.2\.1, .*`ip address` shows"):
        require_free_port("192.0.2.1", 0)


def test_a_free_port_is_used(loop: LoopThread, identities: list[Identity]) -> None:
    (port,) = free_ports(LOCAL, 1)

    async def scenario() -> list[Multiaddress]:
        host = await Host.start(identities[1], NetworkConfig(LOCAL, port))
        try:
            return host.bootstrap_addresses()
        finally:
            await host.stop()

    assert loop.run(scenario(), 120) == [tcp_address(port, identities[1])]


def test_a_router_that_says_nothing_is_not_waited_for(
    loop: LoopThread, identities: list[Identity], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "upnp.py"
    program.write_text("import time; time.sleep(1000)")
    monkeypatch.setattr(port_mapping, "_PROGRAM", program)
    monkeypatch.setattr(port_mapping.PortMapping, "helps", lambda host: True)

    async def scenario() -> None:
        host = await Host.start(identities[1], NetworkConfig(LOCAL, maps_port=True))
        assert host.port_mapping is not None
        assert host.port_mapping.in_words == ""
        await host.stop()

    monkeypatch.setitem(port_mapping._DEADLINE_S, "map", 600.0)
    loop.run(scenario(), 120)
    assert not children_with(str(program))


def test_p2pd_is_announced_where_the_server_is_on_a_port_that_the_owner_chose() -> None:
    announced = Endpoint.of("192.0.2.7", 443)
    config = NetworkConfig(LOCAL, 31337, announced, p2pd_port=31338)
    assert config.libp2p.announce == Endpoint.of("192.0.2.7", 31338)
    assert replace(config, p2pd_port=0).libp2p.announce is None, "nobody knows the port yet"
    assert replace(config, announce=None).libp2p.announce is None, "it is where it listens"


def test_a_p2pd_that_does_not_start_at_first_is_tried_again(
    loop: LoopThread, identities: list[Identity], monkeypatch: pytest.MonkeyPatch
) -> None:
    start, tries = Libp2p.start, []

    async def fails_at_first(self: Libp2p) -> None:
        tries.append(self)
        if len(tries) < 3:
            raise DaemonError("the libp2p daemon does not answer")
        await start(self)

    monkeypatch.setattr(Libp2p, "start", fails_at_first)
    monkeypatch.setattr("peer.host._P2PD_PAUSES_S", (0.0,))

    async def scenario() -> None:
        host = await Host.start(identities[1], NetworkConfig(LOCAL, p2pd=True))

        async def has_tunnel() -> bool:
            return bool(await host.tunnel_addresses())

        try:
            assert host.runs_p2pd
            await eventually(has_tunnel)
        finally:
            await host.stop()

    loop.run(scenario())
    assert len(tries) == 3


def test_the_default_address_is_of_this_machine() -> None:
    require_free_port(default_listen_address(), 0)


def test_a_peer_of_a_swarm_on_loopback_listens_there_too(identities: list[Identity]) -> None:
    here, elsewhere = tcp_address(31337, identities[0]), tcp_address(31337, identities[1], "192.0.2.7")
    assert default_listen_address([here]) == "127.0.0.1"
    assert default_listen_address([here, elsewhere]) == default_listen_address()
