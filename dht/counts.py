"""What a peer asked of the DHT since it started."""

from dataclasses import dataclass, field

from peer.distribution import SECONDS, Distribution

_HOPS = (0, 1, 2, 3, 4, 5, 6, 8, 12)


@dataclass
class DhtCounts:
    """One look-up or store may be for many keys. Those that failed took as long as their deadline."""

    keys_read: int = 0
    records_stored: int = 0
    gets: Distribution = field(default_factory=lambda: Distribution(SECONDS))
    """Seconds that look-ups took."""
    hops: Distribution = field(default_factory=lambda: Distribution(_HOPS))
    """Of each key that was looked up: the longest chain of questions."""
    stores: Distribution = field(default_factory=lambda: Distribution(SECONDS))
