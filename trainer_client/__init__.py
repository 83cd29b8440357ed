"""The trainer: owns the dense part of a model, chooses experts and calls them.

with SwarmClient.join(invite) as swarm:
    layer = swarm.mixture(layer=0)  # an nn.Module from [..., D] to [..., D]
"""

from importlib import import_module
from typing import TYPE_CHECKING

__all__ = ["RemoteMixtureOfExperts", "SwarmClient", "rebalance"]

if TYPE_CHECKING:
    from trainer_client.client import SwarmClient
    from trainer_client.moe import RemoteMixtureOfExperts, rebalance
else:
    _HOMES = {
        "SwarmClient": "trainer_client.client",
        "RemoteMixtureOfExperts": "trainer_client.moe",
        "rebalance": "trainer_client.moe",
    }

    def __getattr__(name: str) -> object:
        """Imports torch, which takes seconds, only when they are needed."""
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(_HOMES[name]), name)
