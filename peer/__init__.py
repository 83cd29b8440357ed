"""What every participant is: identity, host, wire, codec, channels, metrics."""

from typing import Final

SOFTWARE_VERSION: Final = "0.2.0.dev0"
PROTOCOL_VERSION: Final = 1
"""Peers of another protocol version are refused, with both versions named."""
