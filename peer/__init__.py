"""How two peers talk, and the plain things that all other packages need."""

import os
from typing import Final

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")
"""Otherwise gRPC stops and restarts its threads around every fork, and crashes if one is busy. On a loaded machine that
hit one in ten nodes that started p2pd while they were called. No process of ours uses gRPC after a fork."""

SOFTWARE_VERSION: Final = "0.2.0.dev0"
PROTOCOL_VERSION: Final = 2
"""Peers of another protocol version are refused, with both versions named."""
