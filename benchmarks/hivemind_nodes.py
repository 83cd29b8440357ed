"""hivemind's `DHTNode` and our own nodes in the simulated network: memory per node, and the time to join.

    python -m benchmarks.hivemind_nodes [--nodes 10000]

Each node knows up to 20 others at each distance, as in `benchmarks.simulated_swarm`, and stores nothing. Each table has
PeerID objects of its own, as in a process that reads them from answers. Our nodes also keep the others' contacts,
signed and with certificates. A `DHTNode` leaves those to its p2pd, a process that each of its peers runs. The memory of
a p2pd is measured with a real one, which some peers call and then leave.

A newcomer has joined when it has greeted one node and has looked up its own neighbours. Calls take 100 ms, and all
nodes know all addresses.
"""

import argparse
import asyncio
import gc
import random
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import psutil
from hivemind.dht.node import DHTNode
from hivemind.dht.routing import DHTID
from hivemind.p2p import P2P, P2PContext
from hivemind.p2p import PeerID as TheirPeerID

from benchmarks.simulated_p2p import Link, Network, SimulatedIdentity, SimulatedTransport, simulated_world
from benchmarks.simulated_swarm import known_to
from peer import clock
from peer.identity import CERTIFICATE_BYTES, SIGNATURE_BYTES, PeerID
from peer.kademlia.bootstrap import meet_neighbours
from peer.kademlia.contacts import ContactBook
from peer.kademlia.node import KademliaNode
from peer.kademlia.routing import node_id_of
from peer.kademlia.server import DHTServer
from peer.kademlia.storage import StoreMetrics
from peer.parsing import ParseGuard
from peer.rates import RateLimit
from peer.transport.contacts import LIFETIME_S
from peer.transport.endpoints import Endpoint
from peer.wire import contact_pb2

_NAMED = "DHTProtocol.rpc_"
_ID_BYTES = 34
_SIDES = ("tables", "talkoot", "hivemind", "p2pd")
"""`tables`: Talkoot's without the contacts."""
_JOINS = 20
_MEASURED = 300
"""The largest number of nodes that are created. The others are only known to them."""
_CALLERS, _TOGETHER = 60, 20
"""The number of peers that call a p2pd, and how many do so at the same time."""
_METRICS, _GUARD, _UPLOAD = StoreMetrics(), ParseGuard(), RateLimit(None)
"""The metrics, the parse guard and the upload limit that all nodes of this process share."""


class TheirTransport(SimulatedTransport):
    """The parts of hivemind's `P2P` that its `DHTNode` uses, over the simulated network."""

    def __init__(self, network: Network, peer_id: PeerID) -> None:
        super().__init__(network, peer_id)
        self.their_id = TheirPeerID(peer_id.to_bytes())

    async def add_protobuf_handler(self, name: str, handler: Any, request_type: Any, **options: Any) -> None:
        async def handle(sender: PeerID, data: bytes) -> bytes:
            context = P2PContext(name, self.their_id, TheirPeerID(sender.to_bytes()))
            answer: bytes = (await handler(request_type.FromString(data), context)).SerializeToString()
            return answer

        self.handlers[name.removeprefix(_NAMED)] = handle

    async def call_protobuf_handler(self, peer_id: Any, name: str, request: Any, reply_type: Any) -> Any:
        called = PeerID(peer_id.to_bytes())
        return reply_type.FromString(
            await self._network.call(
                self.peer_id, called, name.removeprefix(_NAMED), request.SerializeToString()
            )
        )


class _TheirP2P:
    """The transport, with a `peer_id` of hivemind's type."""

    def __init__(self, transport: TheirTransport) -> None:
        self.peer_id = transport.their_id
        self.add_protobuf_handler = transport.add_protobuf_handler
        self.call_protobuf_handler = transport.call_protobuf_handler


async def their_node(network: Network, peer_id: PeerID, **options: Any) -> Any:
    """A `DHTNode` whose ID is the hash of its PeerID, as our nodes expect. `options`: see `DHTNode.create`."""
    p2p = _TheirP2P(TheirTransport(network, peer_id))
    return await DHTNode.create(p2p=p2p, node_id=DHTID(node_id_of(peer_id.to_bytes())), **options)


async def our_node(network: Network, peer_id: PeerID) -> KademliaNode:
    """A node that serves others and accepts whatever they store."""
    node = KademliaNode(SimulatedTransport(network, peer_id), metrics=_METRICS, upload=_UPLOAD)
    await DHTServer(node, _GUARD).start()
    return node


def memory_per_node(side: str, nodes: int) -> float:
    """Bytes of memory for each node, measured in this process."""

    async def run() -> float:
        network = Network(Link(), 1)
        names = [*map(_name, range(nodes))]
        places = {node_id_of(name): name for name in names}
        order, rng, made = sorted(places), random.Random(1), []
        names = names[:_MEASURED]
        await _make(side, network, names[0])
        gc.collect()
        before = psutil.Process().memory_info().rss
        for name in names:
            node, add = await _make(side, network, name)
            for place in known_to(node_id_of(name), order, rng):
                add(bytes(bytearray(places[place])))
            made.append((node, add))
        gc.collect()
        return (psutil.Process().memory_info().rss - before) / len(made)

    with (
        patch(
            "peer.transport.contacts.certificate_owner", lambda certificate: PeerID(certificate[:_ID_BYTES])
        ),
        patch("peer.transport.contacts.verify", lambda *_: None),
    ):
        return asyncio.run(run())


async def p2pd_memory() -> tuple[float, float]:
    """Bytes of hivemind's p2pd when it has started, and when it has met `_CALLERS` others."""
    called = await P2P.create()
    addresses = await called.get_visible_maddrs()
    daemon = psutil.Process(called._child.pid)
    before = daemon.memory_info().rss
    for _ in range(_CALLERS // _TOGETHER):
        callers = await asyncio.gather(
            *(P2P.create(initial_peers=addresses, startup_timeout=120) for _ in range(_TOGETHER))
        )
        await asyncio.gather(*(caller.shutdown() for caller in callers))
    after = daemon.memory_info().rss
    await called.shutdown()
    return before, after


class _WholeNetwork(Network):
    """A network with all nodes of one side. A node is created when it is first called."""

    def __init__(self, side: str, nodes: int) -> None:
        super().__init__(Link(), 1)
        self._side = side
        self._names = {node_id_of(name): name for name in map(_name, range(nodes))}
        self._order = sorted(self._names)

    async def call(self, sender: PeerID, receiver: PeerID, method: str, request: bytes) -> bytes:
        name = receiver.to_bytes()
        if name not in self.peers:
            _, add = await _make(self._side, self, name)
            for place in known_to(node_id_of(name), self._order, self.rng):
                add(self._names[place])
        return await super().call(sender, receiver, method, request)


def join_ms(side: str, nodes: int) -> list[float]:
    """Milliseconds that newcomers take to join, one after another. `side`: `tables` or `hivemind`."""
    with simulated_world() as loop:

        async def join(network: Network, number: int) -> float:
            newcomer, known = (PeerID(_name(n)) for n in (nodes + number, number))
            began = loop.time()
            if side == "hivemind":
                await their_node(network, newcomer, initial_peers=[f"/p2p/{known}"])
            else:
                node = await our_node(network, newcomer)
                assert await node.ping(known, dials_back=True)
                await meet_neighbours(node)
            return 1000 * (loop.time() - began)

        async def run() -> list[float]:
            network = _WholeNetwork(side, nodes)
            return [await join(network, number) for number in range(_JOINS)]

        return loop.run_until_complete(run())


def _name(number: int) -> bytes:
    return SimulatedIdentity(number).peer_id.to_bytes()


def _place_of(peer_id: PeerID) -> Endpoint:
    """Each peer is on a machine of its own."""
    return Endpoint.of(".".join(map(str, peer_id.to_bytes()[-4:])), 4711)


def _contact(peer_id: PeerID) -> contact_pb2.Contact:
    """A contact as large as a real one, with invented contents."""
    statement = contact_pb2.ContactStatement(
        certificate=peer_id.to_bytes().ljust(CERTIFICATE_BYTES, b"\0"),
        sequence=1,
        expires_at=clock.now() + LIFETIME_S,
        addresses=[contact_pb2.ContactAddress(direct=_place_of(peer_id))],
    ).SerializeToString()
    return contact_pb2.Contact(statement=statement, signature=bytes(SIGNATURE_BYTES))


async def _make(side: str, network: Network, name: bytes) -> tuple[Any, Callable[[bytes], Any]]:
    """A node, and a function that tells it of another node."""
    if side == "hivemind":
        node = await their_node(network, PeerID(name))
        table = node.protocol.routing_table
        return node, lambda other: table.add_or_update_node(DHTID(node_id_of(other)), TheirPeerID(other))
    ours, book = (
        await our_node(network, PeerID(name)),
        None if side == "tables" else ContactBook(guard=_GUARD),
    )

    def add(other: bytes) -> None:
        peer_id = PeerID(other)
        if book is not None:
            book.learn(_contact(peer_id), (peer_id,))
            book.reached(peer_id, _place_of(peer_id))
        ours.table.add(node_id_of(other), peer_id, "" if book is None else book.neighbourhood_of(peer_id))

    return ours, add


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--nodes", type=int, default=10_000)
    parser.add_argument("--side", choices=_SIDES, help="measure one, in this process")
    options = parser.parse_args()
    if options.side == "p2pd":
        before, after = (size / 1024 for size in asyncio.run(p2pd_memory()))
        print(f"p2pd: {before:.0f} KiB, and {after:.0f} once it has met {_CALLERS} peers")
    elif options.side:
        print(f"{options.side}: {memory_per_node(options.side, options.nodes) / 1024:.1f} KiB a node")
        if options.side != "talkoot":
            print(
                f"{options.side}: {statistics.median(join_ms(options.side, options.nodes)):.0f} ms to join (median)"
            )
    else:
        for side in _SIDES:
            command = [sys.executable, "-W", "ignore", "-m", __spec__.name]
            subprocess.run([*command, "--side", side, "--nodes", str(options.nodes)], check=True)


if __name__ == "__main__":
    main()
