"""The trainer's language model: tokens in, logits of the next token out, a mixture of experts in each layer.

Shapes: B sequences, T positions, R = B * T rows, D hidden, V vocabulary.
"""

from collections.abc import Callable
from functools import partial
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dht.manifest import Manifest, ModelSpec
from peer.layers import TransformerLayer, make_norm, seeded
from trainer_client.balancing import LoadSpread
from trainer_client.data.corpus import VOCABULARY
from trainer_client.moe import RemoteMixtureOfExperts, Routed

# validation loss of 2 dense layers after 200 steps: 1.90 at 0.02, 1.84 at 0.1, 1.78 here, 1.85 at 1
_EMBEDDING_SCALE = 0.3


class LanguageModel(nn.Module):
    """`layers` times (local Transformer layers, then a mixture of experts).

    `make_mixture(layer)` gives a module from [B, T, D] to [B, T, D] that carries its own residual connection:
    where no expert answers it gives its input back. All parameters, the mixtures' too, follow from
    `manifest.model.seed`, so that every trainer of a swarm with an equal vocabulary starts equal.
    """

    def __init__(
        self, manifest: Manifest, make_mixture: Callable[[int], nn.Module], vocabulary: int = VOCABULARY
    ) -> None:
        """`vocabulary`: how many tokens there are."""
        super().__init__()
        spec = manifest.model
        self.context = spec.context
        self.first_scored = max(1, manifest.routing.prefix)
        """The first token of a sequence, from 0, that the loss counts: those before it may say how it is routed."""
        seeded(spec.seed, partial(self._add_dense_part, spec, vocabulary))
        # a seed for each mixture: its gate doesn't depend on what else a mixture holds
        self.mixtures = nn.ModuleList(
            seeded(spec.seed + 1 + layer, partial(make_mixture, layer)) for layer in range(spec.layers)
        )

    def _add_dense_part(self, spec: ModelSpec, vocabulary: int) -> Self:
        self.embedding = nn.Embedding(vocabulary, spec.hidden)
        nn.init.normal_(self.embedding.weight, std=_EMBEDDING_SCALE)
        self.local = nn.ModuleList(LocalLayers(spec) for _ in range(spec.layers))
        self.norm = make_norm(spec.norm, spec.hidden)
        self.head = nn.Linear(spec.hidden, vocabulary, bias=False)
        return self

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Logits of the token after each position. int64 [B, T] -> [B, T, V]"""
        assert tokens_BT.shape[1] <= self.context, f"at most {self.context} tokens in a sequence"
        x_BTD = self.embedding(tokens_BT)
        for local, mixture in zip(self.local, self.mixtures, strict=True):
            x_BTD = mixture(local(x_BTD))
        logits_BTV: Tensor = self.head(self.norm(x_BTD))
        return logits_BTV

    def loss(self, tokens_BT: Tensor) -> Tensor:
        """Cross-entropy of every token from `first_scored` on, in nats per token. int64 [B, T + 1] -> []"""
        first = self.first_scored
        logits_BTV = self(tokens_BT[:, :-1])[:, first - 1 :].float()
        return F.cross_entropy(logits_BTV.flatten(0, 1), tokens_BT[:, first:].flatten())

    def balancing_loss(self) -> Tensor | None:
        """What the routers add to the loss of this thread's last forward pass in training; None if nothing. []"""
        losses = [routed.balancing_loss for routed in self._routed() if routed.balancing_loss is not None]
        return torch.stack(losses).sum() if losses else None

    def load_spread(self) -> LoadSpread | None:
        """The mean over the mixtures, in this thread's last forward pass in training; None where no expert was live."""
        return LoadSpread.mean([routed.spread for routed in self._routed() if routed.spread is not None])

    def begin_step(self, number: int) -> None:
        """What the mixtures draw is that of this training step from now on."""
        for mixture in self._remote():
            mixture.begin_step(number)

    def _routed(self) -> list[Routed]:
        return [mixture.routed for mixture in self._remote() if mixture.routed is not None]

    def _remote(self) -> list[RemoteMixtureOfExperts]:
        return [mixture for mixture in self.mixtures if isinstance(mixture, RemoteMixtureOfExperts)]


class LocalLayers(nn.Module):
    """The trainer's own Transformer layers before a mixture: they mix all positions of a sequence."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            TransformerLayer(spec.hidden, spec.heads, spec.feed_forward, spec.norm, spec.activation)
            for _ in range(spec.local_layers)
        )

    def forward(self, x_BTD: Tensor) -> Tensor:
        sequences, length, _ = x_BTD.shape
        lengths_B = torch.full((sequences,), length)
        positions_R = torch.arange(length, device=x_BTD.device).repeat(sequences)
        x_RD = x_BTD.flatten(0, 1)
        for layer in self.layers:
            x_RD = layer(x_RD, lengths_B, positions_R)
        return x_RD.reshape(x_BTD.shape)
