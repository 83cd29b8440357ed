"""The peers that were met, kept on disk: a peer comes back to its swarm by them when its bootstrap is dead."""

import json
import logging
import math
from collections.abc import Collection, Iterable
from pathlib import Path

from peer.files import write_whole
from peer.transport.addresses import is_multiaddress

logger = logging.getLogger(__name__)

_MAX_PEERS = 64
_MAX_ADDRESSES = 4
"""Of one peer."""
_MAX_CHARACTERS = 256
"""Of one address."""
_MAX_FILE_BYTES = 1 << 20


class Acquaintances:
    """Addresses of the peers that were met last, newest first."""

    def __init__(self, path: Path | None) -> None:
        """`path`: the file that keeps them; None: memory alone. A file that can't be read is as good as none."""
        self._path = path
        self._met: dict[str, tuple[tuple[str, ...], float]] = {}
        self._saved: frozenset[str] = frozenset()
        if path is not None:
            self._met = _read(path)
            self._saved = frozenset(self.addresses())

    def meet(self, addresses: Iterable[str], now: float) -> None:
        """Notes addresses at which peers were alive at this Unix time. What is no multiaddress is left out."""
        by_peer: dict[str, list[str]] = {}
        for address in addresses:
            if len(address) <= _MAX_CHARACTERS and is_multiaddress(address):
                by_peer.setdefault(_peer_of(address), []).append(address)
        for peer, listed in by_peer.items():
            self._met.pop(peer, None)
            self._met[peer] = tuple(dict.fromkeys(listed))[:_MAX_ADDRESSES], now
        while len(self._met) > _MAX_PEERS:
            del self._met[next(iter(self._met))]

    def addresses(self) -> list[str]:
        """All of them, those of the peer that was met last first."""
        return [address for listed, _ in reversed(self._met.values()) for address in listed]

    def met_at(self, peer: str) -> float:
        """When the peer (PeerID in base58) was met last; minus infinity for a stranger."""
        return self._met[peer][1] if peer in self._met else -math.inf

    def strangers(self, known: Collection[str]) -> list[list[str]]:
        """The addresses of each peer that was met once and is not among the `known` (PeerIDs in base58) now."""
        return [list(listed) for peer, (listed, _) in self._met.items() if peer not in known]

    def save(self) -> None:
        """Writes them to disk, whole or not at all, if there are others than there. A full disk is a warning."""
        if self._path is None or (addresses := frozenset(self.addresses())) == self._saved:
            return
        peers = [
            {"addresses": list(listed), "met_at": met_at} for listed, met_at in reversed(self._met.values())
        ]
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self._path, json.dumps({"peers": peers}, indent=1).encode())
        except OSError as error:
            logger.warning("can't keep the peers that were met in %s: %s", self._path, error.strerror)
            return
        self._saved = addresses


def _read(path: Path) -> dict[str, tuple[tuple[str, ...], float]]:
    """Whoever edits the file can only make this peer dial others, and those are checked as any."""
    acquaintances = Acquaintances(None)
    try:
        with path.open("rb") as file:
            peers = json.loads(file.read(_MAX_FILE_BYTES))["peers"]
        for peer in reversed(peers[:_MAX_PEERS]):
            acquaintances.meet(map(str, peer["addresses"]), float(peer["met_at"]))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, LookupError) as error:
        logger.warning("can't read the peers that were met from %s: %s", path, error)
        return {}
    return acquaintances._met


def _peer_of(address: str) -> str:
    """The PeerID in base58 of the peer whom the address leads to."""
    return address.rsplit("/p2p/", 1)[1]
