"""What every participant is: identity, host, wire, codec, channels, metrics."""

import os
from typing import Final

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")
"""Else gRPC stops and starts its threads around every fork, and crashes when one is at work: on a busy machine about
every tenth node that starts p2pd while it is called. No process of ours goes on with gRPC after a fork."""

SOFTWARE_VERSION: Final = "0.2.0.dev0"
PROTOCOL_VERSION: Final = 1
"""Peers of another protocol version are refused, with both versions named."""
