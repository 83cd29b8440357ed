"""What a peer asked of the DHT since it started."""

from dataclasses import dataclass, field

from peer.distribution import SECONDS, Distribution


@dataclass
class DhtCounts:
    """One look-up or store may be for many keys. Those that failed took as long as their deadline."""

    keys_read: int = 0
    records_stored: int = 0
    gets: Distribution = field(default_factory=lambda: Distribution(SECONDS))
    """Seconds that look-ups took."""
    stores: Distribution = field(default_factory=lambda: Distribution(SECONDS))
