"""Train one model on many home computers: what programs import.

with talkoot.SwarmClient.join(invite) as swarm:
    layer = swarm.mixture(layer=0)  # an nn.Module from [..., D] to [..., D]

`talkoot.errors` has what may be raised. On the command line it is the program `talkoot`.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING

__all__ = ["RemoteMixtureOfExperts", "SwarmClient", "errors", "rebalance"]

if TYPE_CHECKING:
    from peer import errors
    from trainer_client.client import SwarmClient
    from trainer_client.moe import RemoteMixtureOfExperts, rebalance
else:
    _HOMES = {
        "RemoteMixtureOfExperts": "trainer_client.moe",
        "SwarmClient": "trainer_client.client",
        "rebalance": "trainer_client.moe",
    }

    def __getattr__(name: str) -> object:
        """Imports a name when it is first used, because torch takes seconds to import."""
        if name == "errors":
            return import_module("peer.errors")
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        # gRPC reads this when it is imported; otherwise it writes messages to standard error that don't matter
        os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
        return getattr(import_module(_HOMES[name]), name)

    def __dir__() -> list[str]:
        """For completion in shells and notebooks, which otherwise don't see names that are not imported yet."""
        return sorted({*globals(), *__all__})
