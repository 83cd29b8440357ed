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
    """Whether others connect to it, and it relays for others. If not, they reach it by hole punching or through its
    relays.
    """
    relays: tuple[Multiaddress, ...] = ()
    """Peers through which others reach this one, if they can't connect to it."""
    announce: Endpoint | None = None
    """Where others reach this peer, if that is not where it listens."""
    maps_port: bool = False
    """Asks the router to forward the port (UPnP, NAT-PMP)."""
    relays_others: bool = True
    """Whether a public peer relays for peers behind routers. If not, p2pd still relays 128 KiB of each connection. That
    is enough for two peers to punch a hole, and it can't be turned off.
    """

    @property
    def listening(self) -> str:
        """The multiaddress to listen on, without a peer. Raises ValueError if `listen` is not an IP address."""
        return f"/ip{ipaddress.ip_address(self.listen).version}/{self.listen}/tcp/{self.port}"

    @property
    def listens(self) -> bool:
        """A peer behind a router listens too, unless it is on loopback: others may find a way through."""
        return self.public or bool(self.relays) or not self.listen.startswith("127.")
