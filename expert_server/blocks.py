"""The trainable block inside an expert, by the manifest's kind.

A block maps (rows [R, D], lengths [S] of the segments, positions [R] in their sequences) to [R, D], and carries its own
residual connection; D is the width of the experts. Kinds beside the two here come from other packages, through the
entry point group `talkoot.expert_kinds`: a name, and a function from the experts' `ModelSpec` to such a block
(docs/expert-kinds.md).
"""

import hashlib
from collections.abc import Callable
from functools import cache
from importlib.metadata import entry_points
from typing import TypeAlias, cast

import torch
from torch import Tensor, nn

from dht.manifest import Manifest, ModelSpec
from dht.uid import UID
from peer.errors import SwarmError
from peer.layers import Activation, Norm, TransformerLayer, make_feed_forward, make_norm, seeded

ENTRY_POINT_GROUP = "talkoot.expert_kinds"

BlockBuilder: TypeAlias = Callable[[ModelSpec], nn.Module]


class FeedForward(nn.Module):
    """A pre-norm feed-forward block with its residual; every row by itself."""

    def __init__(
        self, hidden: int, feed_forward: int, norm: Norm = "layer", activation: Activation = "gelu"
    ) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            make_norm(norm, hidden), *make_feed_forward(hidden, feed_forward, activation)
        )

    def forward(self, x_RD: Tensor, lengths_S: Tensor, positions_R: Tensor) -> Tensor:
        output_RD: Tensor = x_RD + self.layers(x_RD)
        return output_RD


def _transformer(model: ModelSpec) -> nn.Module:
    """It starts as a feed-forward block: at first a row's segment is whatever the untrained gate sent along with it."""
    layer = TransformerLayer(
        model.hidden, model.heads, model.feed_forward, model.norm, model.activation, model.head_size
    )
    nn.init.zeros_(layer.attention_output.weight)
    return layer


def _ffn(model: ModelSpec) -> nn.Module:
    return FeedForward(model.hidden, model.feed_forward, model.norm, model.activation)


OWN_KINDS: dict[str, BlockBuilder] = {"transformer": _transformer, "ffn": _ffn}


def builder_of(kind: str) -> BlockBuilder:
    """The builder of a kind's blocks. Raises SwarmError when no installed package has it."""
    return OWN_KINDS.get(kind) or _others_builder(kind)


@cache  # the search reads the metadata of every installed package, and comes for each expert
def _others_builder(kind: str) -> BlockBuilder:
    found = entry_points(group=ENTRY_POINT_GROUP)
    if kind not in found.names:
        known = sorted({*OWN_KINDS, *found.names})
        raise SwarmError(
            f"this swarm's experts are of kind {kind!r}, which is not installed here (installed: {', '.join(known)}): "
            "install the package that its founder names"
        )
    return cast(BlockBuilder, found[kind].load())


def build_block(manifest: Manifest, uid: UID) -> nn.Module:
    """The block with its first parameters, which follow from the manifest's seed and the UID alone."""
    build = builder_of(manifest.experts.kind)
    return seeded(first_seed(manifest, uid), lambda: build(manifest.expert_model))


def weightless_block(manifest: Manifest) -> nn.Module:
    """A block of the manifest's kind with no memory behind its tensors: to look at shapes and sizes."""
    with torch.device("meta"):
        return builder_of(manifest.experts.kind)(manifest.expert_model)


def first_seed(manifest: Manifest, uid: UID) -> int:
    """The seed of one expert's first parameters, 63 bits."""
    digest = hashlib.sha256(f"talkoot expert {manifest.model.seed} {uid}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
