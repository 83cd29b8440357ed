"""A network of many peers in one process: hivemind's `DHTNode` over calls in memory, on a clock that jumps.

What runs is real: `DHTNode`, its protocol, routing table and storage, and all of `dht/`. Stand-ins are the transport,
the clock, and the keys: 10,000 RSA keys take a quarter of an hour, so a peer signs with a hash here. Sizes are those of
RSA keys, so that counted bytes are right.
"""

import asyncio
import hashlib
import random
import selectors
from collections import Counter
from collections.abc import Callable, Collection, Coroutine, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar
from unittest.mock import patch

from peer.errors import RecordError
from peer.identity import PeerID
from peer.kademlia.hivemind import P2PContext

T = TypeVar("T")

EPOCH = 1_800_000_000.0
"""Unix time at which a simulation begins."""
CALL_OVERHEAD_BYTES = 100
"""Of frames, headers and acknowledgements, about, for each message."""
_PUBLIC_KEY_BYTES = 294
_SIGNATURE_BYTES = 256
_CERTIFICATE_BYTES = 700


class _JumpingSelector(selectors.SelectSelector):
    """Waits for nothing: when the loop would sleep, the clock jumps to the end of that sleep."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise RuntimeError("everything in the simulation waits, and nothing will happen any more")
        self.now += max(timeout, 0.0)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop in simulated time. What it runs must use no sockets and no threads."""

    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now

    def unix_time(self) -> float:
        return EPOCH + self._jumping.now


@dataclass(frozen=True)
class Link:
    """How the network between any two peers is."""

    rtt_s: float = 0.1
    jitter: float = 0.1
    """Part of the round trip by which a call may be faster or slower, evenly distributed."""
    loss: float = 0.0
    """Part of the calls that get no answer."""


@dataclass
class Traffic:
    """What was sent."""

    calls: int = 0
    sent: int = 0
    """Bytes, requests and answers together."""
    largest: int = 0
    """Bytes of the largest value in any answer."""
    by_method: Counter[str] = field(default_factory=Counter)
    """Calls."""


class Network:
    """All peers that can be reached. A dead one is silent: the hardest case, for a caller must wait."""

    def __init__(self, link: Link, seed: int) -> None:
        self.link = link
        self.rng = random.Random(seed)
        self.traffic = Traffic()
        self.peers: dict[bytes, SimulatedP2P] = {}

    def kill(self, peer_ids: Collection[PeerID]) -> None:
        for peer_id in peer_ids:
            del self.peers[peer_id.to_bytes()]

    async def call(self, sender: PeerID, receiver: PeerID, name: str, message: Any) -> Any:
        self._count(message)
        self.traffic.calls += 1
        self.traffic.by_method[name.rsplit("rpc_", 1)[-1]] += 1
        link = self.link
        one_way_s = link.rtt_s / 2 * (1 + link.jitter * self.rng.uniform(-1, 1))
        is_lost = self.rng.random() < link.loss
        await asyncio.sleep(one_way_s)
        peer = self.peers.get(receiver.to_bytes())
        if is_lost or peer is None:
            await asyncio.get_running_loop().create_future()  # until the caller gives up
        assert peer is not None
        answer = await peer.handlers[name](message, P2PContext(name, receiver, sender))
        self._count(answer)
        for result in getattr(answer, "results", ()):
            self.traffic.largest = max(self.traffic.largest, len(result.value))
        await asyncio.sleep(one_way_s)
        return answer

    def _count(self, message: Any) -> None:
        self.traffic.sent += message.ByteSize() + CALL_OVERHEAD_BYTES


class SimulatedP2P:
    """What a `DHTNode` uses of hivemind's `P2P`."""

    def __init__(self, network: Network, peer_id: PeerID) -> None:
        self.peer_id = peer_id
        self.handlers: dict[str, Callable[[Any, P2PContext], Coroutine[Any, Any, Any]]] = {}
        self._network = network
        network.peers[peer_id.to_bytes()] = self

    async def add_protobuf_handler(self, name: str, handler: Any, input_type: type, **options: Any) -> None:
        self.handlers[name] = handler

    async def remove_protobuf_handler(self, name: str, **options: Any) -> None:
        del self.handlers[name]

    async def call_protobuf_handler(self, peer_id: PeerID, name: str, message: Any, output_type: type) -> Any:
        return await self._network.call(self.peer_id, peer_id, name, message)


class SimulatedIdentity:
    """Stands for `peer.identity.Identity`: anybody can sign for anybody, which nobody here does."""

    def __init__(self, number: int) -> None:
        self.public_key = number.to_bytes(8, "big") * (_PUBLIC_KEY_BYTES // 8)
        self.peer_id = _peer_id_of(self.public_key)

    def sign(self, data: bytes) -> bytes:
        return _signature(self.public_key, data)

    def make_certificate(self) -> bytes:
        return self.public_key.ljust(_CERTIFICATE_BYTES, b"\0")


class PeerIds:
    """One object for each PeerID: hivemind's own encodes it in base 58 every time one is made, which takes 20 µs."""

    def __init__(self) -> None:
        self._made: dict[bytes, PeerID] = {}

    def __call__(self, data: bytes) -> PeerID:
        peer_id = self._made.get(data)
        if peer_id is None:
            peer_id = self._made[data] = PeerID(data)
        return peer_id


@contextmanager
def simulated_world() -> Iterator[VirtualLoop]:
    """A loop in whose time all DHT code lives, as long as the block lasts."""
    loop = VirtualLoop()
    stand_ins: Mapping[str, object] = {
        "hivemind.dht.protocol.PeerID": PeerIds(),
        "dht.records.peer_id_of": _peer_id_of,
        "dht.records.verify": _verify,
        "dht.announcements.certificate_pem": lambda certificate, peer_id: certificate,
    }
    clocks = (
        "hivemind.dht.node.get_dht_time",
        "hivemind.dht.protocol.get_dht_time",
        "hivemind.dht.routing.get_dht_time",
        "hivemind.utils.timed_storage.get_dht_time",
    )
    with ExitStack() as stack:
        for target, stand_in in stand_ins.items():
            stack.enter_context(patch(target, stand_in))
        for target in clocks:
            stack.enter_context(patch(target, loop.unix_time))
        try:
            yield loop
        finally:
            for task in asyncio.all_tasks(loop):
                task.cancel()
            loop.run_until_complete(asyncio.sleep(0))
            loop.close()


def _peer_id_of(public_key: bytes) -> PeerID:
    return PeerID(b"\x12\x20" + hashlib.sha256(public_key).digest())


def _signature(public_key: bytes, data: bytes) -> bytes:
    return hashlib.sha256(public_key + data).digest() * (_SIGNATURE_BYTES // 32)


def _verify(public_key: bytes, data: bytes, signature: bytes) -> None:
    if signature != _signature(public_key, data):
        raise RecordError("the record's signature is wrong")
