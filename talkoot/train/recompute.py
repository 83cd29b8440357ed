"""Experts with parameters from nodes, for a trainer's spot checks."""

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dht.manifest import Manifest
from dht.uid import UID
from expert_server.blocks import OWN_KINDS, build_block
from expert_server.experts.devices import ComputeDevice
from expert_server.experts.format import BLOCK, StateForm, block_from_bytes
from peer.codec import Floats, Integers
from trainer_client.dispatch.snapshots import Precision


class BlockLoader:
    """Makes experts of a swarm's kind from parameters. Any thread may use it and its experts, one at a time."""

    def __init__(self, manifest: Manifest, swarm_id: str) -> None:
        self._swarm_id = swarm_id
        self._form = StateForm.of(manifest)
        first, model = (0,) * len(manifest.experts.grid), manifest.model
        layers = {model.is_causal(layer): layer for layer in range(model.layers)}
        # done once here, because it draws from torch's global generator
        self._blocks = {
            causal: build_block(manifest, UID(layer, first)).requires_grad_(False)
            for causal, layer in layers.items()
        }
        self._is_causal = model.is_causal

    @classmethod
    def of(cls, manifest: Manifest, swarm_id: str) -> Self | None:
        """The loader for a manifest; None for kinds of experts from other packages, in which equal rows may give
        different updates.
        """
        return cls(manifest, swarm_id) if manifest.experts.kind in OWN_KINDS else None

    @property
    def max_bytes(self) -> int:
        """The limit for an expert's encoded parameters."""
        return self._form.max_block_bytes

    def load(self, uid: UID, data: bytes) -> "RecomputedExpert":
        """Raises StateError if the data is not that expert's parameters."""
        state = block_from_bytes(data, self._swarm_id, uid, self._form)
        block = self._blocks[self._is_causal(uid.layer)]
        return RecomputedExpert(block, {name.removeprefix(BLOCK): tensor for name, tensor in state.items()})


class RecomputedExpert:
    """Computes on the CPU, on the calling thread."""

    def __init__(self, block: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """`tensors`: replace the block's parameters."""
        self._block = block
        self._tensors = dict(tensors)

    def updates(self, inputs: Floats, lengths: Integers, positions: Integers, precision: Precision) -> Floats:
        """The updates of rows [R, W] in segments [S] at positions [R], as from `Expert.forward`.

        A CPU has no tf32, so fp32 is used for it.
        """
        device = ComputeDevice("cpu", "bf16" if precision == "bf16" else "fp32")
        x_RD = torch.from_numpy(inputs)
        arguments = x_RD, torch.from_numpy(lengths), torch.from_numpy(positions)
        with torch.no_grad(), device.autocast():
            y_RD: Tensor = functional_call(self._block, self._tensors, arguments)
        updates: Floats = (y_RD.float() - x_RD).numpy()
        return updates
