"""The trainer: owns the dense part of a model, chooses experts and calls them.

with SwarmClient.join(invite) as swarm:
    layer = swarm.mixture(layer=0)  # an nn.Module from [..., D] to [..., D]
"""

from trainer_client.client import SwarmClient
from trainer_client.moe import RemoteMixtureOfExperts

__all__ = ["RemoteMixtureOfExperts", "SwarmClient"]
