"""Which of the addresses that strangers write this peer dials, and how often.

Anybody can write any address into a record, and all peers of a swarm read it. So no peer dials an address that is
nearer than its swarm (its own loopback, or the network behind it). And nobody can make a swarm attack a machine that is
not a peer: however many records name it, each peer dials it only a few times a minute.
"""

import asyncio
import socket
import time
from collections.abc import Callable, Collection, Iterable

from prometheus_client import CollectorRegistry, Counter

from peer.bounded import BoundedDict
from peer.identity import PeerID
from peer.loop import to_daemon_thread
from peer.metrics import start_at_zero
from peer.rates import TokenBuckets
from peer.transport.addresses import Address, known
from peer.transport.endpoints import AddressScope, Endpoint, IpAddress, neighbourhood

ENDPOINT_BURST = 4
"""How often one IP address and port may be dialled although the named peer was not found there."""
ENDPOINT_EVERY_S = 15.0
MACHINE_BURST = 16
"""How many failed dials of one IP address are allowed in a row, over all its ports. For IPv6, this counts all
addresses of a line.
"""
MACHINE_EVERY_S = 6.0
_REMEMBERED = 16_384
_RESOLVE_S = 5.0


class Dialling:
    """Which dials are allowed. Call `begin` before each, and `reached` if the peer was really there.

    One for the whole process: the limits apply to all records together.
    """

    def __init__(
        self,
        nearest: AddressScope,
        trusted: Collection[Endpoint] = (),
        metrics: CollectorRegistry | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`nearest`: the nearest scope that is dialled. `trusted`: the endpoints in the invite, which no stranger
        wrote. If a peer proves itself at one of them in a private network, this peer is in that network, too, and dials
        private addresses from then on.
        """
        refused = Counter(
            "talkoot_dials_refused",
            "Addresses in records that were not dialled, because they are nearer than the swarm, or tried too often.",
            ["reason"],
            registry=metrics,
        )
        self.refused: Counter = start_at_zero(refused, "near", "often")
        self._nearest = nearest
        self._trusted = frozenset(trusted)
        self._clock = clock
        # a bucket may be overdrawn by one dial, so its burst is one less
        self._endpoints = TokenBuckets[Endpoint](1 / ENDPOINT_EVERY_S, ENDPOINT_BURST - 1, _REMEMBERED)
        self._machines = TokenBuckets[str](1 / MACHINE_EVERY_S, MACHINE_BURST - 1, _REMEMBERED)
        self._peers = BoundedDict[tuple[Endpoint, PeerID], None](_REMEMBERED)
        """Which peer was found at which endpoint."""
        self._met = BoundedDict[tuple[IpAddress, PeerID], None](_REMEMBERED)
        """Which peer called from which IP address."""

    def allows(self, endpoint: Endpoint) -> bool:
        """Whether an endpoint may be dialled at all. A host name may not: its owner can let it lead anywhere at any
        time.
        """
        scope = endpoint.scope
        if endpoint in self._trusted or (scope is not None and scope >= self._nearest):
            return True
        self.refused.labels("near").inc()
        return False

    def begin(self, endpoint: Endpoint, peer_id: PeerID) -> bool:
        """Whether to dial an endpoint now, where a record says that this peer is."""
        if not self.allows(endpoint):
            return False
        if self.is_known(endpoint, peer_id):
            return True
        now, machine = self._clock(), _machine(endpoint)
        if self._endpoints.wait_s(endpoint, now) or (machine and self._machines.wait_s(machine, now)):
            self.refused.labels("often").inc()
            return False
        self._endpoints.take(endpoint, 1, now)
        if machine:
            self._machines.take(machine, 1, now)
        return True

    def reached(self, endpoint: Endpoint, peer_id: PeerID) -> None:
        """The peer proved that it is there. Dialling it again is not limited."""
        if endpoint in self._trusted and endpoint.scope is AddressScope.PRIVATE:
            self._nearest = min(self._nearest, AddressScope.PRIVATE)
        if self.is_known(endpoint, peer_id):
            return
        self._peers[endpoint, peer_id] = None
        self._endpoints.give_back(endpoint, 1)
        if machine := _machine(endpoint):
            self._machines.give_back(machine, 1)

    def met(self, peer_id: PeerID, address: IpAddress) -> None:
        """The peer called from this IP address, so it may be dialled there, at any port.

        Otherwise strangers who claim a node's endpoint as theirs would use up the dials to that node.
        """
        self._met[address, peer_id] = None

    def is_known(self, endpoint: Endpoint, peer_id: PeerID) -> bool:
        """Whether the peer was found on that machine, or the invite says that it is there."""
        if endpoint in self._trusted or (endpoint, peer_id) in self._peers:
            return True
        return endpoint.ip is not None and (endpoint.ip, peer_id) in self._met


def nearest_scope(endpoints: Iterable[Endpoint]) -> AddressScope:
    """The nearest scope that a swarm's peers dial, from the addresses in its invite: that of the one that is valid
    furthest.

    Many invites of public swarms also name a private address, that of a founder at home. It must not open the home
    networks of all others to strangers.
    """
    scopes = (endpoint.scope for endpoint in endpoints)
    return max((scope for scope in scopes if scope), default=AddressScope.GLOBAL)


async def accepts(endpoint: Endpoint, deadline_s: float) -> bool:
    """Whether something accepts connections there."""
    try:
        async with asyncio.timeout(deadline_s):
            _, writer = await asyncio.open_connection(endpoint.host, endpoint.port)
    except OSError:
        return False
    writer.close()
    return True


async def resolved(addresses: Iterable[Address]) -> list[Address]:
    """The same addresses, with host names replaced by the IP addresses they lead to now. For addresses of the owner or
    an invite.
    """
    looks = await asyncio.gather(*map(_resolve, addresses))
    return list(dict.fromkeys(address for found in looks for address in found))


async def _resolve(address: Address) -> Iterable[Address]:
    endpoint = address if isinstance(address, Endpoint) else address.endpoint
    if endpoint.ip is not None:
        return (address,)
    try:
        async with asyncio.timeout(_RESOLVE_S):
            found = await _look_up(endpoint.host)
    except TimeoutError:
        return ()
    hosts = (f"[{host}]" if ":" in host else host for host in found)
    return [address.at(each) for each in known(Endpoint, (f"{host}:{endpoint.port}" for host in hosts), 16)]


async def _look_up(name: str) -> list[str]:
    """The IP addresses to which a host name leads. The loop's own `getaddrinfo` can't be cancelled: a process that is
    stopped would wait until the name servers have been given up, which takes 10 to 30 seconds.
    """

    def look() -> list[str]:
        try:
            return [str(place[0]) for *_, place in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)]
        except OSError:
            return []

    return await to_daemon_thread(look)


def _machine(endpoint: Endpoint) -> str | None:
    """The part of the network whose dials are counted together: an IPv4 address, or the IPv6 addresses of one line.
    None for loopback, where the dialling peer is on the same machine, and for names.
    """
    return None if endpoint.ip is None or endpoint.ip.is_loopback else neighbourhood(endpoint.ip)
