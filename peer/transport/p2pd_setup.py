"""Where p2pd, libp2p's daemon, listens. Nothing of hivemind is imported here."""

import ipaddress
from dataclasses import dataclass

from peer.transport.addresses import Multiaddress
from peer.transport.endpoints import Endpoint

START_DEADLINE_S = 60.0


@dataclass(frozen=True)
class Libp2pConfig:
    """Where p2pd listens, and how others reach it."""

    listen: str
    """The IP address to listen on."""
    port: int = 0
    """The TCP port to listen on; 0: any free one, and the same after a restart."""
    public: bool = True
    """Others connect to it, and it relays for others; without, they reach it by hole punching or its relays."""
    relays: tuple[Multiaddress, ...] = ()
    """Peers by which others reach this one, when they can't connect to it."""
    announce: Endpoint | None = None
    """Where others reach this peer, when it is not where it listens."""
    maps_port: bool = False
    """Asks the router to forward the port (UPnP, NAT-PMP)."""
    relays_others: bool = True
    """Whether a public one relays for peers behind routers. Without, p2pd still relays 128 KiB of each connection: that
    suffices for two peers to punch a hole, and p2pd can't be kept from it.
    """

    @property
    def listening(self) -> str:
        """The multiaddress to listen on, of no peer. Raises ValueError if `listen` is no IP address."""
        return f"/ip{ipaddress.ip_address(self.listen).version}/{self.listen}/tcp/{self.port}"

    @property
    def listens(self) -> bool:
        """One behind a router listens too, unless it is on loopback: others may find a way through."""
        return self.public or bool(self.relays) or not self.listen.startswith("127.")
