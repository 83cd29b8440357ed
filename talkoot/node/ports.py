"""The port that a node's DHT had last, so that it comes back to where invites and other peers' memories lead."""

from pathlib import Path

from peer.errors import PortError
from peer.files import write_whole
from peer.host import require_free_port

_LAST_PORT = "dht-port"


def last_port(state: Path, host: str) -> int:
    """0 when there is none, or when it is taken."""
    try:
        port = int((state / _LAST_PORT).read_text())
        require_free_port(host, port)
    except (OSError, ValueError, OverflowError, PortError):
        return 0
    return port


def remember_port(state: Path, port: int) -> None:
    write_whole(state / _LAST_PORT, f"{port}\n".encode())
