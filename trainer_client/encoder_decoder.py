"""An encoder-decoder: source tokens in, logits of the target's tokens out, with a mixture of experts in each layer.

The manifest's first layers are the encoder (`causal` false), the others the decoder. As in T5 (Raffel et al. 2020,
arXiv 1910.10683), both read one embedding, and the decoder's attention to the source has no positions. That attention
belongs to the trainer. Experts see the rows of one sequence, source or target, never both.

Sequences of all lengths are packed, so that nothing is computed or sent for padding.

Shapes: N pairs of a source and a target, R rows of all sources or of all targets, D hidden, H heads, C columns of one
head, L tokens of one sequence, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Self, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from dht.manifest import Manifest, ModelSpec
from peer.identity import PeerID
from peer.layers import make_norm, seeded
from trainer_client.data.pairs import Pairs
from trainer_client.data.special_tokens import SpecialTokens
from trainer_client.dispatch.batches import Segments
from trainer_client.model import (
    EMBEDDING_SCALE,
    LanguageModel,
    LocalPart,
    MixtureModel,
    SequenceState,
    caches_of,
    following,
)
from trainer_client.moe import RemoteMixtureOfExperts
from trainer_client.retrieval.attention import RetrievalSpec

Tokens: TypeAlias = Sequence[int]
EncodedSource: TypeAlias = Sequence[Tensor]
"""What each of the decoder's layers attends to: its keys and values [2, H, L, C]."""


class EncoderDecoder(MixtureModel):
    """Each layer of the encoder and the decoder is a local part, followed by a mixture of experts.

    `make_mixture(layer)` returns a module from rows [R, D] and their segments to [R, D], with its own residual
    connection. All parameters follow from `manifest.model.seed`, as those of a `LanguageModel`.
    """

    def __init__(self, manifest: Manifest, make_mixture: Callable[[int], nn.Module], tokens: int) -> None:
        """`tokens`: the tokenizer's number of tokens."""
        super().__init__()
        spec = manifest.model
        self.context: int = spec.context
        self.special: SpecialTokens = SpecialTokens(tokens)
        self.first_scored = 0
        self.encoder_layers: int = spec.encoder_layers
        seeded(spec.seed, partial(self._add_dense_part, spec, self.special.vocabulary))
        self.mixtures: nn.ModuleList = nn.ModuleList(
            seeded(spec.seed + 1 + layer, partial(make_mixture, layer)) for layer in range(spec.layers)
        )

    def _add_dense_part(self, spec: ModelSpec, vocabulary: int) -> Self:
        self.embedding: nn.Embedding = nn.Embedding(vocabulary, spec.hidden)
        nn.init.normal_(self.embedding.weight, std=EMBEDDING_SCALE)
        self.local: nn.ModuleList = nn.ModuleList(
            LocalPart(spec, causal=spec.is_causal(layer)) for layer in range(spec.layers)
        )
        self.encoder_norm: nn.Module = make_norm(spec.norm, spec.hidden)
        self.cross: nn.ModuleList = nn.ModuleList(
            CrossAttention(spec) for _ in range(spec.encoder_layers, spec.layers)
        )
        self.norm: nn.Module = make_norm(spec.norm, spec.hidden)
        self.head: nn.Linear = nn.Linear(spec.hidden, vocabulary, bias=False)
        return self

    @property
    def end(self) -> int:
        """The token that ends a target."""
        return self.special.end

    def forward(self, sources: Sequence[Tokens], targets: Sequence[Tokens]) -> Tensor:
        """Logits of each token of each target, target after target: [R, V]. Neither may be empty."""
        return self.decode(self.encode(sources), targets)

    def decode(self, encoded: Sequence[EncodedSource], targets: Sequence[Tokens]) -> Tensor:
        """Like `forward`, for sources that `encode` has encoded."""
        segments = _segments(targets)
        inputs_R = self._tensor([token for target in targets for token in (self.end, *target[:-1])])
        x_RD = self.embedding(inputs_R)
        for number, (local, cross, mixture) in enumerate(self._decoder()):
            x_RD = local.packed(x_RD, segments)
            x_RD = cross(x_RD, segments, [each[number] for each in encoded])
            x_RD = mixture(x_RD, segments)
        logits_RV: Tensor = self.head(self.norm(x_RD))
        return logits_RV

    def encode(self, sources: Sequence[Tokens]) -> list[EncodedSource]:
        """What the decoder attends to, for each source. Equal sources are encoded once."""
        different = list(dict.fromkeys(map(tuple, sources)))
        segments = _segments(different)
        assert segments.lengths.max() <= self.context, f"at most {self.context} tokens in a source"
        x_RD = self.embedding(self._tensor([token for source in different for token in source]))
        for local, mixture in zip(
            self._parts[: self.encoder_layers], self.mixtures[: self.encoder_layers], strict=True
        ):
            x_RD = mixture(local.packed(x_RD, segments), segments)
        x_RD = self.encoder_norm(x_RD)
        lengths = segments.lengths.tolist()
        of_layers = [cross.keys_values(x_RD, lengths) for _, cross, _ in self._decoder()]
        found = dict(zip(different, zip(*of_layers, strict=True), strict=True))
        return [found[tuple(source)] for source in sources]

    def loss(self, pairs: Pairs) -> Tensor:
        """The mean cross-entropy of all the targets' tokens, in nats. []"""
        wanted_R = self._tensor([token for target in pairs.targets for token in target])
        return F.cross_entropy(self(pairs.sources, pairs.targets).float(), wanted_R)

    def log_likelihood(self, sources: Sequence[Tokens], targets: Sequence[Tokens]) -> Tensor:
        """log p(y_i | x, y_<i) of each target's tokens, including its end token: float32 [N, L].

        0 after the end of a target that is shorter than the longest.
        """
        wanted_R = self._tensor([token for target in targets for token in target])
        of_rows = self(sources, targets).float().log_softmax(-1).gather(1, wanted_R[:, None])[:, 0]
        return pad_sequence(list(torch.split(of_rows, list(map(len, targets)))), batch_first=True)

    @torch.no_grad()
    def next_token_logits(self, encoded: Sequence[EncodedSource], prefixes: Sequence[Tokens]) -> Tensor:
        """Logits of the token that follows each prefix, which may be empty: float32 [N, V]."""
        logits_RV = self.decode(encoded, [(*prefix, self.end) for prefix in prefixes])
        last_N = np.cumsum([len(prefix) + 1 for prefix in prefixes]) - 1
        logits_NV: Tensor = logits_RV[torch.from_numpy(last_N)].float()
        return logits_NV

    @property
    def can_extend(self) -> bool:
        """Whether each of the decoder's mixtures can compute rows without the earlier ones."""
        mixtures = self.mixtures[self.encoder_layers :]
        return all(isinstance(each, RemoteMixtureOfExperts) and each.can_extend for each in mixtures)

    def begin(self, source: EncodedSource, avoided: frozenset[PeerID] = frozenset()) -> SequenceState:
        """The state of a target before anything has been computed. `avoided`: as in `HeldSequence`."""
        return SequenceState(self._parts[self.encoder_layers :], avoided, source)

    @torch.no_grad()
    def extend(self, tokens: Sequence[Tokens], states: Sequence[SequenceState]) -> Tensor:
        """Logits of the token after each target, like `LanguageModel.extend`. A target's first token is `end`."""
        segments = following(tokens, states)
        x_RD = self.embedding(self._tensor([token for each in tokens for token in each]))
        for number, (local, cross, mixture) in enumerate(self._decoder()):
            assert isinstance(mixture, RemoteMixtureOfExperts), "others can't extend"
            x_RD = local.extend(x_RD, segments, caches_of(number, states))
            x_RD = cross(x_RD, segments, [state.source[number] for state in states])
            x_RD = mixture.extend(x_RD, segments, [state.routed[number] for state in states])
        for state, each in zip(states, tokens, strict=True):
            state.length += len(each)
        last_N = torch.from_numpy(segments.lengths.cumsum() - 1)
        logits_NV: Tensor = self.head(self.norm(x_RD[last_N]))
        return logits_NV.float()

    @property
    def _parts(self) -> list[LocalPart]:
        return [each for each in self.local if isinstance(each, LocalPart)]

    def _decoder(self) -> Iterator[tuple[LocalPart, "CrossAttention", nn.Module]]:
        """The parts of each of its layers."""
        crosses = [each for each in self.cross if isinstance(each, CrossAttention)]
        first = self.encoder_layers
        yield from zip(self._parts[first:], crosses, self.mixtures[first:], strict=True)

    def _tensor(self, tokens: Tokens) -> Tensor:
        return torch.tensor(tokens, device=self.embedding.weight.device)


class CrossAttention(nn.Module):
    """Rows of targets attend to all rows of their sources. Normalises its input, and adds its output to it."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        size = spec.head_size or spec.hidden // spec.heads
        self.heads: int = spec.heads
        self.norm: nn.Module = make_norm(spec.norm, spec.hidden)
        self.query: nn.Linear = nn.Linear(spec.hidden, spec.heads * size, bias=False)
        self.key_value: nn.Linear = nn.Linear(spec.hidden, 2 * spec.heads * size, bias=False)
        self.output: nn.Linear = nn.Linear(spec.heads * size, spec.hidden, bias=False)

    def keys_values(self, encoded_RD: Tensor, lengths: list[int]) -> list[Tensor]:
        """The keys and values of each source [2, H, L, C]."""
        kv_R2HC = self.key_value(encoded_RD).unflatten(-1, (2, self.heads, -1))
        return [kv_L2HC.permute(1, 2, 0, 3) for kv_L2HC in torch.split(kv_R2HC, lengths)]

    def forward(self, x_RD: Tensor, segments: Segments, sources: Sequence[Tensor]) -> Tensor:
        """[R, D] -> [R, D]. `sources`: the result of `keys_values` for each segment."""
        q_RHC = self.query(self.norm(x_RD)).unflatten(-1, (self.heads, -1))
        seen = []
        for q_LHC, (k_HLC, v_HLC) in zip(torch.split(q_RHC, segments.lengths.tolist()), sources, strict=True):
            q_1HLC = q_LHC.transpose(0, 1)[None]
            seen_1HLC = F.scaled_dot_product_attention(q_1HLC, k_HLC[None], v_HLC[None])
            seen.append(seen_1HLC[0].transpose(0, 1).flatten(1))
        output_RD: Tensor = x_RD + self.output(torch.cat(seen))
        return output_RD


def make_model(
    manifest: Manifest,
    make_mixture: Callable[[int], nn.Module],
    tokens: int,
    retrieval: RetrievalSpec | None = None,
) -> LanguageModel | EncoderDecoder:
    """The model that the manifest describes. `tokens`: the tokenizer's number of tokens."""
    if not manifest.model.encoder_layers:
        return LanguageModel(manifest, make_mixture, tokens, retrieval)
    assert retrieval is None, "`RetrievalSpec.of` refuses to make one"
    return EncoderDecoder(manifest, make_mixture, tokens)


def _segments(sequences: Sequence[Tokens]) -> Segments:
    """The segments of whole sequences."""
    lengths_N = np.array(list(map(len, sequences)))
    assert lengths_N.min() > 0, "a sequence without tokens"
    return Segments.after(np.zeros_like(lengths_N), lengths_N)
