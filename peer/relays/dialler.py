"""The caller's side: gRPC's connections to peers behind routers, through the relays at which they have reservations."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter

from peer.bounded import BoundedDict
from peer.errors import UnreachableError
from peer.identity import PeerID
from peer.loop import TaskSet, first_success, tolerating
from peer.metrics import start_at_zero
from peer.relays.client import Circuit, RelayClient
from peer.transport.addresses import Multiaddress
from peer.transport.pipes import Listeners, Pipe

logger: logging.Logger = logging.getLogger(__name__)

_PEERS = 256
"""Peers that can be dialled without opening another socket."""
_CIRCUITS = 256
"""The most open circuits."""
_TRIED = 4
"""How many relays of one peer are tried."""
HEAD_START_S = 1.0
"""How long one relay is tried alone before the next is tried in parallel."""
_DIAL_S = 15.0
_ANSWER_S = 10.0
"""How long a circuit may bring no answer: a relay may have connected it to nobody."""
_STEADY_S = 60.0
"""If a circuit ends sooner, the peer's other relays are tried first the next time. Its relay may have ended it, or may
have connected it to somebody else.
"""


class RelayDialler:
    """Opens circuits to peers. For one event loop; close it when done."""

    def __init__(self, client: RelayClient, metrics: CollectorRegistry | None = None) -> None:
        dials = Counter(
            "talkoot_relay_dials", "Connections that this peer wanted through relays.", ["outcome"],
            registry=metrics,
        )  # fmt: skip
        self.dials: Counter = start_at_zero(dials, "opened", "failed")
        self._client = client
        self._listeners = Listeners(_PEERS, self._forward)
        self._tasks = TaskSet()
        """One task for each circuit."""
        self._unsteady = BoundedDict[PeerID, PeerID](_PEERS)
        """For some peers, the relay whose circuit ended soon."""

    async def open_to(self, peer_id: PeerID, addresses: Sequence[Multiaddress]) -> str:
        """See `Listeners.open_to`."""
        return await self._listeners.open_to(peer_id, addresses)

    def address_of(self, peer_id: PeerID) -> str:
        """The address that `open_to` returned for the peer."""
        return self._listeners.address_of(peer_id)

    async def close(self) -> None:
        """Ends all circuits. Closing twice is harmless."""
        self._listeners.close()
        await self._tasks.aclose()

    async def _forward(self, peer_id: PeerID, addresses: Sequence[Multiaddress], accepted: Pipe) -> None:
        """Handles a connection from this process's own gRPC."""
        with contextlib.closing(accepted[1]):
            if len(self._tasks) >= _CIRCUITS:
                return
            with self._tasks.including_current():
                try:
                    circuit = await self.dial(peer_id, addresses)
                except UnreachableError as error:
                    self.dials.labels("failed").inc()
                    logger.debug("%s", error)
                    return
                self.dials.labels("opened").inc()
                began = time.monotonic()
                try:
                    with contextlib.closing(circuit):
                        await self._client.carry(accepted, circuit.pipe, _ANSWER_S)
                except OSError as error:
                    logger.debug("a circuit ended: %s", error)
                if time.monotonic() - began < _STEADY_S:
                    self._unsteady[peer_id] = circuit.relay

    async def dial(self, peer_id: PeerID, addresses: Sequence[Multiaddress]) -> Circuit:
        """A circuit through the first relay that opens one. Close it when done. Raises UnreachableError."""
        relayed = [a for a in addresses if a.is_relayed and a.peer_id == peer_id and a.dialled != peer_id]
        relayed.sort(key=lambda address: address.dialled == self._unsteady.get(peer_id))
        dials = (self._dial(peer_id, address) for address in relayed[:_TRIED])
        found = None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_DIAL_S):
                found = await first_success(dials, HEAD_START_S, drop=Circuit.close)
        if found is None:
            raise UnreachableError(f"no relay opens a circuit to {peer_id}")
        return found

    async def _dial(self, peer_id: PeerID, address: Multiaddress) -> Circuit | None:
        try:
            with tolerating("open a circuit through a relay"):
                relay = await self._client.relay(address.dialled, address.endpoint)
                return await self._client.dial(relay, peer_id)
        except UnreachableError as error:
            logger.debug("%s", error)
        return None
