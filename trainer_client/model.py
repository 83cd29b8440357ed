"""The trainer's language model: tokens in, logits of the next token out, with a mixture of experts in each layer.

Shapes: B sequences, T positions, R = B * T rows, D hidden, V vocabulary.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from dht.manifest import Manifest, ModelSpec
from peer.errors import SettingsError
from peer.identity import PeerID
from peer.layers import Attention, KeyValueCache, TransformerLayer, make_norm, seeded
from peer.platform.machine import require_free_memory
from trainer_client.balancing import LoadSpread
from trainer_client.data.corpus import VOCABULARY
from trainer_client.data.special_tokens import SpecialTokens
from trainer_client.dispatch.batches import HeldSequence, Segments
from trainer_client.moe import RemoteMixtureOfExperts, Routed, RoutedSequence
from trainer_client.retrieval.attention import ReadChunks, Retrieval, RetrievalSpec

# validation loss of 2 dense layers after 200 steps: 1.90 at 0.02, 1.84 at 0.1, 1.78 here, 1.85 at 1
EMBEDDING_SCALE = 0.3


class MixtureModel(nn.Module):
    """A model with mixtures of experts, as training sees it."""

    first_scored: int
    """The first token of a sequence, from 0, that counts in the loss."""

    loss: Callable[..., Tensor]
    """The mean over those tokens of a batch that count, in nats: []. A model that reads a memory also gets what is read
    for the batch.
    """

    def balancing_loss(self) -> Tensor | None:
        """The sum of the routers' losses in this thread's last training forward pass; None if there are none. []"""
        losses = [routed.balancing_loss for routed in self._routed() if routed.balancing_loss is not None]
        return torch.stack(losses).sum() if losses else None

    def load_spread(self) -> LoadSpread | None:
        """The mean over the mixtures in this thread's last training forward pass; None if no expert was live."""
        return LoadSpread.mean([routed.spread for routed in self._routed() if routed.spread is not None])

    @property
    def unanswered_rows(self) -> int:
        """The rows of all evaluations so far, in all mixtures, that no expert answered."""
        return sum(mixture.unanswered_rows for mixture in self._remote())

    def begin_step(self, number: int) -> None:
        """Makes the mixtures draw this training step's random numbers from now on."""
        for mixture in self._remote():
            mixture.begin_step(number)

    def _routed(self) -> list[Routed]:
        return [mixture.routed for mixture in self._remote() if mixture.routed is not None]

    def _remote(self) -> list[RemoteMixtureOfExperts]:
        return [module for module in self.modules() if isinstance(module, RemoteMixtureOfExperts)]


class LanguageModel(MixtureModel):
    """`layers` times a local part, each followed by a mixture of experts.

    `make_mixture(layer)` returns a module from [B, T, D] to [B, T, D] with its own residual connection: if no expert
    answers, it returns its input. All parameters, including the mixtures', follow from `manifest.model.seed`, so all
    trainers of a swarm with the same vocabulary start equal.
    """

    def __init__(
        self,
        manifest: Manifest,
        make_mixture: Callable[[int], nn.Module],
        vocabulary: int = VOCABULARY,
        retrieval: RetrievalSpec | None = None,
    ) -> None:
        """`vocabulary`: the number of tokens. `retrieval`: how it reads a memory; None: it reads none.

        Raises SettingsError if the manifest's model has an encoder.
        """
        super().__init__()
        require_no_encoder(manifest)
        spec = manifest.model
        self.context: int = spec.context
        self.first_scored = max(1, manifest.routing.prefix)
        """The first token of a sequence, from 0, that counts in the loss. Earlier ones may decide the routing."""
        seeded(spec.seed, partial(self._add_dense_part, spec, vocabulary))
        # a seed for each mixture, so that its gate does not depend on other contents of the mixtures
        self.mixtures: nn.ModuleList = nn.ModuleList(
            seeded(spec.seed + 1 + layer, partial(make_mixture, layer)) for layer in range(spec.layers)
        )
        self.retrieval: Retrieval | None = None if retrieval is None else Retrieval(spec, retrieval)

    def _add_dense_part(self, spec: ModelSpec, vocabulary: int) -> Self:
        self.embedding: nn.Embedding = nn.Embedding(vocabulary, spec.hidden)
        nn.init.normal_(self.embedding.weight, std=EMBEDDING_SCALE)
        self.local: nn.ModuleList = nn.ModuleList(LocalPart(spec) for _ in range(spec.layers))
        self.norm: nn.Module = make_norm(spec.norm, spec.hidden)
        self.head: nn.Linear = nn.Linear(spec.hidden, vocabulary, bias=False)
        return self

    def forward(self, tokens_BT: Tensor, neighbours_BUNL: Tensor | None = None) -> Tensor:
        """Logits of the token after each position. int64 [B, T] -> [B, T, V]

        `neighbours_BUNL`: the neighbours of each whole chunk, int64 and -1 where there is none; None: no chunk has any.
        """
        logits_BTV: Tensor = self.head(self.norm(self.states(tokens_BT, neighbours_BUNL)))
        return logits_BTV

    def states(self, tokens_BT: Tensor, neighbours_BUNL: Tensor | None) -> Tensor:
        """The input of `norm` and `head`: [B, T, D]. Arguments as in `forward`."""
        assert tokens_BT.shape[1] <= self.context, f"at most {self.context} tokens in a sequence"
        x_BTD = self.embedding(tokens_BT)
        read = None
        if self.retrieval is not None and neighbours_BUNL is not None:
            chunks = self.retrieval.spec.chunks(tokens_BT.shape[1])
            read = self.retrieval.read(neighbours_BUNL[:, :chunks].flatten(0, 1), self.embedding)
        for layer, (local, mixture) in enumerate(zip(self.local, self.mixtures, strict=True)):
            x_BTD = local(x_BTD)
            if read is not None and self.retrieval is not None and layer in read:
                x_BTD = self.retrieval.attention[str(layer)](x_BTD, read[layer])
            x_BTD = mixture(x_BTD)
        states_BTD: Tensor = x_BTD
        return states_BTD

    @property
    def can_extend(self) -> bool:
        """Whether each mixture can compute rows without the earlier ones."""
        return len(self._remote()) == len(self.mixtures) and all(each.can_extend for each in self._remote())

    def begin(self, avoided: frozenset[PeerID] = frozenset()) -> "SequenceState":
        """The state of a sequence before anything has been computed. `avoided`: as in `HeldSequence`."""
        return SequenceState(self._parts, avoided)

    @torch.no_grad()
    def extend(
        self,
        tokens: Sequence[Sequence[int]],
        states: Sequence["SequenceState"],
        neighbours: Sequence[Tensor] = (),
    ) -> Tensor:
        """Logits of the token after each sequence, given its next `tokens` and the state left by the earlier ones.
        Float32 [S, V]

        The result is that of `forward` for the whole sequences in evaluation. Adds the tokens to the states.
        `neighbours`: for each sequence, those of the chunks that end in its next tokens, [U, N, L].
        """
        for state, its_neighbours in zip(states, neighbours, strict=bool(neighbours)):
            self._read(state, its_neighbours)
        segments = following(tokens, states)
        new_R = torch.tensor(
            [token for each in tokens for token in each], device=self.embedding.weight.device
        )
        x_RD = self.embedding(new_R)
        for layer, (local, mixture) in enumerate(zip(self._parts, self._remote(), strict=True)):
            x_RD = local.extend(x_RD, segments, caches_of(layer, states))
            if self.retrieval is not None:
                x_RD = self.retrieval.extend(layer, x_RD, segments, [state.read for state in states])
            x_RD = mixture.extend(x_RD, segments, [state.routed[layer] for state in states])
        for state, each in zip(states, tokens, strict=True):
            state.length += len(each)
        last_S = torch.from_numpy(segments.lengths.cumsum() - 1)
        logits_SV: Tensor = self.head(self.norm(x_RD[last_S]))
        return logits_SV.float()

    @property
    def _parts(self) -> list["LocalPart"]:
        return [each for each in self.local if isinstance(each, LocalPart)]

    def _read(self, state: "SequenceState", neighbours_UNL: Tensor) -> None:
        """Reads the neighbours of the chunks that end next. Of earlier chunks, only the last one's are still needed."""
        if self.retrieval is None:
            return
        first = self.retrieval.spec.chunks(state.length)
        read = self.retrieval.read_chunks(neighbours_UNL, first, self.embedding)
        state.read = {n: each for n, each in state.read.items() if n == first - 1} | read

    def loss(self, tokens_BT: Tensor, neighbours_BUNL: Tensor | None = None) -> Tensor:
        """Mean cross-entropy of the tokens from `first_scored` on, in nats. int64 [B, T + 1] -> []

        `neighbours_BUNL`: as in `forward`.
        """
        first = self.first_scored
        logits_BTV = self(tokens_BT[:, :-1], neighbours_BUNL)[:, first - 1 :].float()
        return F.cross_entropy(logits_BTV.flatten(0, 1), tokens_BT[:, first:].flatten())

    def log_likelihood(self, sources: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]) -> Tensor:
        """log p(y_i | x, y_<i) of each target's tokens, when the target follows its source: float32 [N, L].

        0 after the end of a target that is shorter than the longest. Sequences of all lengths are packed: padding would
        be sent to experts, and count in their load.
        """
        read, places, wanted = list[int](), list[int](), list[int]()
        for source, target in zip(sources, targets, strict=True):
            places += range(len(read) + len(source) - 1, len(read) + len(source) + len(target) - 1)
            read += [*source, *target][:-1]
            wanted += target
        lengths = [len(s) + len(t) - 1 for s, t in zip(sources, targets, strict=True)]
        assert max(lengths) <= self.context, f"at most {self.context} tokens in a sequence"
        segments = Segments.after(np.zeros(len(lengths), np.int64), np.array(lengths))
        x_RD = self.embedding(torch.tensor(read, device=self.embedding.weight.device))
        for local, mixture in zip(self._parts, self.mixtures, strict=True):
            x_RD = mixture(local.packed(x_RD, segments), segments)
        logits_RV = self.head(self.norm(x_RD[places])).float()
        values_R = logits_RV.log_softmax(-1)[range(len(wanted)), wanted]
        return pad_sequence(list(torch.split(values_R, list(map(len, targets)))), batch_first=True)


def require_no_encoder(manifest: Manifest) -> None:
    """Raises SettingsError if the model has an encoder: the caller needs a model that continues a text."""
    if manifest.model.encoder_layers:
        raise SettingsError(
            "this swarm's model is an encoder-decoder, which this command can't use: `talkoot train` and "
            "`talkoot generate` can"
        )


def require_memory(
    manifest: Manifest,
    make_mixture: Callable[[int], nn.Module],
    tokens: int,
    copies: int,
    retrieval: RetrievalSpec | None = None,
) -> None:
    """Raises SettingsError if this many copies of the model's parameters don't fit into the free memory.

    A manifest's author chooses the size of everybody's model. Allocates nothing. `tokens`: the tokenizer's number of
    tokens.
    """
    spec = manifest.model
    vocabulary = SpecialTokens(tokens).vocabulary if spec.encoder_layers else tokens
    # without embedding and head, where normal_ would import torch's compiler, which takes a second
    with torch.device("meta"):
        modules = [
            LocalPart(spec) if local else make_mixture(n)
            for n in range(spec.layers)
            for local in (True, False)
        ]
        if retrieval is not None:
            modules.append(Retrieval(spec, retrieval))
        # stands for the decoder's attention to its source, which has as many parameters
        decoder = range(spec.encoder_layers, spec.layers) if spec.encoder_layers else ()
        modules += [Attention(spec.hidden, spec.heads, spec.norm, spec.head_size) for _ in decoder]
    size = 4 * 2 * vocabulary * spec.hidden + sum(p.nbytes for module in modules for p in module.parameters())
    require_free_memory(copies * size, "the trainer's part of this swarm's model", SettingsError)


class LocalPart(nn.Module):
    """What the trainer computes before a mixture: Transformer layers, which attend over all positions of a sequence.

    With local = "attention" the mixture replaces a feed-forward block, as in the Switch Transformer (arXiv 2101.03961,
    figure 2), and an attention comes before it.
    """

    def __init__(self, spec: ModelSpec, *, causal: bool = True) -> None:
        super().__init__()
        self.layers: nn.ModuleList = nn.ModuleList(
            TransformerLayer(
                spec.hidden,
                spec.heads,
                spec.feed_forward,
                spec.norm,
                spec.activation,
                spec.head_size,
                causal=causal,
            )
            for _ in range(spec.local_layers)
        )
        if spec.local == "attention":
            attention = Attention(spec.hidden, spec.heads, spec.norm, spec.head_size, causal=causal)
            self.layers.append(attention)

    def forward(self, x_BTD: Tensor) -> Tensor:
        sequences, length, _ = x_BTD.shape
        return self.packed(x_BTD.flatten(0, 1), Segments.whole(sequences, length)).reshape(x_BTD.shape)

    def packed(self, x_RD: Tensor, segments: Segments) -> Tensor:
        """Computes whole sequences of any lengths: [R, D] -> [R, D]."""
        return self.extend(x_RD, segments, [[] for _ in self.layers])

    def extend(self, x_RD: Tensor, segments: Segments, caches: Sequence[Sequence[KeyValueCache]]) -> Tensor:
        """Computes the next rows of sequences [R, D]. `caches`: for each layer, those of the segments, to which the
        rows are added.
        """
        lengths_S = torch.from_numpy(segments.lengths)
        positions_R = torch.from_numpy(segments.positions).to(x_RD.device)
        for layer, its_caches in zip(self.layers, caches, strict=True):
            x_RD = layer(x_RD, lengths_S, positions_R, its_caches)
        return x_RD


def caches_of(layer: int, states: Sequence["SequenceState"]) -> list[tuple[KeyValueCache, ...]]:
    """For each layer of a local part, the cache of each sequence."""
    return list(zip(*(state.caches[layer] for state in states), strict=True))


def following(tokens: Sequence[Sequence[int]], states: Sequence["SequenceState"]) -> Segments:
    """The segments of the next `tokens` of sequences, whose earlier rows have been computed."""
    return Segments.after(np.array([state.length for state in states]), np.array(list(map(len, tokens))))


class SequenceState:
    """What is kept of one sequence's rows in each layer, to compute the next ones without them."""

    def __init__(
        self, parts: Sequence[LocalPart], avoided: frozenset[PeerID], source: Sequence[Tensor] = ()
    ) -> None:
        """`parts`: the local part before each mixture. `avoided`: nodes that are asked only for experts that no other
        node has. `source`: for a decoder, what each of its layers attends to.
        """
        self.length = 0
        """The number of tokens so far."""
        self.caches: list[list[KeyValueCache]] = [[KeyValueCache() for _ in local.layers] for local in parts]
        self.routed: list[RoutedSequence] = [
            RoutedSequence(held=HeldSequence(avoided=avoided)) for _ in parts
        ]
        self.read: ReadChunks = {}
        """The neighbours of the last whole chunk, for a model that reads a memory."""
        self.source: Sequence[Tensor] = source

    @property
    def is_answered(self) -> bool:
        """Whether all experts to which the last tokens were sent have answered."""
        return all(each.held.is_answered for each in self.routed)

    @property
    def can_go_on(self) -> bool:
        """Whether the sequence can be continued from this state."""
        return all(each.held.can_go_on for each in self.routed)

    @property
    def forgetful(self) -> set[PeerID]:
        """Nodes that did not keep rows, or no longer had them."""
        return set().union(*(each.held.forgetful for each in self.routed))
