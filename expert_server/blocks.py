"""The trainable block inside an expert, by the manifest's kind.

A block maps (rows [R, D], lengths [S] of the segments, positions [R] in their sequences) to [R, D], and includes its
own residual connection; D is the width of the experts. Kinds other than the two here come from other packages, through
the entry point group `talkoot.expert_kinds`: a name, and a function from the experts' `ModelSpec` to such a block
(docs/expert-kinds.md).
"""

import hashlib
from functools import cache, partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from dht.manifest import Manifest, ModelSpec
from dht.uid import UID
from peer.choices import Activation, Norm
from peer.errors import InstallationError, SettingsError
from peer.layers import TransformerLayer, make_feed_forward, make_norm, seeded

ENTRY_POINT_GROUP = "talkoot.expert_kinds"


class BlockBuilder(Protocol):
    """Builds a block. Only Talkoot's own kinds can build one that is not causal."""

    def __call__(self, model: ModelSpec, *, causal: bool = True) -> nn.Module:
        """`causal`: whether a row attends only to earlier rows of its segment."""
        ...


class FeedForward(nn.Module):
    """A pre-norm feed-forward block with its residual connection. Each row is computed by itself."""

    def __init__(
        self, hidden: int, feed_forward: int, norm: Norm = "layer", activation: Activation = "gelu"
    ) -> None:
        super().__init__()
        self.layers: nn.Sequential = nn.Sequential(
            make_norm(norm, hidden), *make_feed_forward(hidden, feed_forward, activation)
        )

    def forward(self, x_RD: Tensor, lengths_S: Tensor, positions_R: Tensor) -> Tensor:
        output_RD: Tensor = x_RD + self.layers(x_RD)
        return output_RD


def _transformer(model: ModelSpec, *, causal: bool = True) -> nn.Module:
    """At first, its attention adds nothing, because an untrained gate puts rows into segments at random."""
    layer = TransformerLayer(
        model.hidden,
        model.heads,
        model.feed_forward,
        model.norm,
        model.activation,
        model.head_size,
        causal=causal,
    )
    nn.init.zeros_(layer.attention_output.weight)
    return layer


def _ffn(model: ModelSpec, *, causal: bool = True) -> nn.Module:
    """Each row is computed by itself, so `causal` makes no difference."""
    return FeedForward(model.hidden, model.feed_forward, model.norm, model.activation)


OWN_KINDS: dict[str, BlockBuilder] = {"transformer": _transformer, "ffn": _ffn}


def read_manifest(file: Path) -> Manifest:
    """The manifest that a founder's file describes. Raises SettingsError, which names the file and the wrong key, also
    if no installed package has its kind of experts.
    """
    manifest = Manifest.from_toml(file)
    try:
        require_kind(manifest)
    except InstallationError as error:
        raise SettingsError(
            f"{file}: experts.kind must be {' or '.join(_installed_kinds())}, not {manifest.experts.kind!r}, unless "
            "you install the package that has this kind"
        ) from error
    return manifest


def require_kind(manifest: Manifest) -> None:
    """Raises InstallationError if no installed package has the manifest's kind of experts, and SettingsError if the
    package can't build it for all layers.
    """
    kind = manifest.experts.kind
    builder_of(kind)
    if manifest.model.encoder_layers and kind not in OWN_KINDS:
        raise SettingsError(
            f"an encoder's experts must be of kind {' or '.join(OWN_KINDS)}, but this swarm's are of kind {kind!r}, "
            "which works only in causal layers: start a swarm without `causal` in its manifest"
        )


def builder_of(kind: str) -> BlockBuilder:
    """The builder of a kind's blocks. Raises InstallationError if no installed package has that kind."""
    return OWN_KINDS.get(kind) or _others_builder(kind)


def _installed_kinds() -> list[str]:
    return sorted({*OWN_KINDS, *entry_points(group=ENTRY_POINT_GROUP).names})


@cache  # the search reads the metadata of every installed package, and is needed for each expert
def _others_builder(kind: str) -> BlockBuilder:
    found = entry_points(group=ENTRY_POINT_GROUP)
    if kind not in found.names:
        raise InstallationError(
            f"this swarm's experts are of kind {kind!r}, which is not installed here (installed: "
            f"{', '.join(_installed_kinds())}): install the package that its founder names"
        )
    return cast(BlockBuilder, found[kind].load())


def build_block(manifest: Manifest, uid: UID) -> nn.Module:
    """The block with its initial parameters, which depend only on the manifest and the UID."""
    build = builder_of(manifest.experts.kind)
    if not manifest.model.is_causal(uid.layer):
        build = partial(build, causal=False)
    return seeded(first_seed(manifest, uid), lambda: build(manifest.expert_model))


def weightless_block(manifest: Manifest) -> nn.Module:
    """A block of the manifest's kind whose tensors have shapes, but take no memory."""
    with torch.device("meta"):
        return builder_of(manifest.experts.kind)(manifest.expert_model)


def first_seed(manifest: Manifest, uid: UID) -> int:
    """The seed of one expert's initial parameters, 63 bits."""
    digest = hashlib.sha256(f"talkoot expert {manifest.model.seed} {uid}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
