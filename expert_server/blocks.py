"""The trainable block inside an expert, by the manifest's kind."""

import hashlib
from collections.abc import Callable, Mapping
from types import MappingProxyType

from torch import nn

from dht.manifest import Manifest, ModelSpec
from dht.uid import UID
from peer.layers import TransformerLayer, seeded


def _transformer(model: ModelSpec) -> nn.Module:
    return TransformerLayer(model.hidden, model.heads, model.feed_forward)


KINDS: Mapping[str, Callable[[ModelSpec], nn.Module]] = MappingProxyType({"transformer": _transformer})
"""Builders of blocks. A block maps (rows [R, D], lengths [S], positions [R]) to [R, D]."""


def build_block(manifest: Manifest, uid: UID) -> nn.Module:
    """The block with its first parameters, which follow from the manifest's seed and the UID alone."""
    return seeded(first_seed(manifest, uid), lambda: KINDS[manifest.experts.kind](manifest.model))


def first_seed(manifest: Manifest, uid: UID) -> int:
    """The seed of one expert's first parameters, 63 bits."""
    digest = hashlib.sha256(f"talkoot expert {manifest.model.seed} {uid}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
