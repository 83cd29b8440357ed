"""Chunked cross-attention over the neighbours of a text (RETRO: Borgeaud et al. 2022, section 2.4 and algorithm 1).

A text is cut into chunks. The neighbours of a chunk are passages of a memory that are found by its tokens, so no token
before the chunk's last one may see them. They are read by this last token, and by the next chunk except for its own
last token.

Three things differ from the paper. A whole passage, of about two chunks, is the neighbour and its continuation; it is
not aligned with the chunk, so queries have no positions. The encoder does not see the chunk, so its results can be kept
while text is generated. And a token's key is mostly that of the token before it (Olsson et al. 2022, arXiv 2209.11895),
so that a row attends to what followed its own token in a neighbour.

Shapes: B sequences, T positions, D hidden, H heads, C columns of one head; U chunks of a sequence, N neighbours of a
chunk, L tokens of a neighbour, K = N * L tokens of all of them; P chunks or neighbours of all sequences.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Self, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dht.manifest import ModelSpec
from peer.choices import check_heads
from peer.errors import SettingsError
from peer.layers import make_norm, rotary_frequencies, rotate, seeded
from trainer_client.dispatch.batches import Segments
from trainer_client.settings import TrainerSettings

NOTHING = -1
"""The absence of a token."""
_SMEAR = 3.0
"""The initial logit of the share of a key that comes from the previous token."""
_SHARPNESS = 2.0
"""Initially, queries are this many times as long as usual."""
_SEED = 2**20
"""An offset that separates its seeds from those of the rest of the model, which has fewer layers."""


@dataclass(frozen=True)
class RetrievalSpec:
    """How a model reads a memory."""

    chunk: int = 64
    """The number of tokens by which neighbours are found."""
    neighbours: int = 1
    """Neighbours of each chunk."""
    length: int = 128
    """How many tokens of a neighbour are read."""
    layers: tuple[int, ...] = (0,)
    """After which local parts of the model it reads, from 0."""

    @classmethod
    def of(cls, settings: TrainerSettings, model: ModelSpec) -> Self | None:
        """The spec for a trainer's settings; None if its model reads no memory, or reads one only for questions.

        Raises SettingsError if it does not fit the model.
        """
        if settings.memory is None or settings.answers_questions:
            return None
        if model.encoder_layers:
            raise SettingsError(
                "memory: an encoder-decoder can't read a memory while it writes: leave --memory out"
            )
        chunk = settings.chunk_in(model.context)
        if chunk >= model.context:
            raise SettingsError(
                f"memory_chunk: {chunk} tokens, but this swarm's models see only {model.context}: pass "
                f"a smaller number, such as --memory-chunk {max(4, model.context // 4)}"
            )
        layers = tuple(sorted(set(settings.memory_layers))) or (model.layers // 2,)
        if layers[-1] >= model.layers:
            raise SettingsError(
                f"memory_layers: there is no layer {layers[-1]}; this swarm's models have 0 to {model.layers - 1}"
            )
        return cls(chunk, settings.passages_read, settings.memory_length, layers)

    @property
    def meaning(self) -> str:
        """A text that distinguishes dense parts with the same shapes."""
        return f"reads a memory by chunks of {self.chunk}"

    def chunks(self, tokens: int) -> int:
        """How many chunks are complete after this many tokens."""
        return tokens // self.chunk

    def nothing(self, *shape: int) -> Tensor:
        """Chunks without a neighbour: int64 [*shape, N, L]."""
        return torch.full((*shape, self.neighbours, self.length), NOTHING)


@dataclass(frozen=True)
class KeysValues:
    """What a layer attends to, for each of some chunks. A chunk's last entry is an empty one, so that a row may attend
    to nothing.
    """

    keys_PHKC: Tensor
    values_PHKC: Tensor
    mask_P11K: Tensor
    """True for tokens and for the empty entry."""

    def __getitem__(self, chunk: int) -> "KeysValues":
        """The entries of one chunk."""
        one = slice(chunk, chunk + 1)
        return KeysValues(self.keys_PHKC[one], self.values_PHKC[one], self.mask_P11K[one])


ReadChunks: TypeAlias = dict[int, list[KeysValues]]
"""What each layer of one sequence attends to, by chunk number."""


class Retrieval(nn.Module):
    """What a model that reads a memory has in addition to its layers: the encoder of neighbours, and the attention to
    them.

    Its parameters depend only on the manifest's seed. At first, it adds nothing.
    """

    def __init__(self, model: ModelSpec, spec: RetrievalSpec) -> None:
        super().__init__()
        self.spec = spec
        seeded(model.seed + _SEED, partial(self._add_layers, model))

    def _add_layers(self, model: ModelSpec) -> "Retrieval":
        self.encoder: NeighbourEncoder = NeighbourEncoder(model)
        self.attention: nn.ModuleDict = nn.ModuleDict(
            {str(layer): ChunkedCrossAttention(model, self.spec.chunk) for layer in self.spec.layers}
        )
        return self

    def at(self, layer: int) -> "ChunkedCrossAttention | None":
        """The attention after a local part, if there is one."""
        found = self.attention[str(layer)] if layer in self.spec.layers else None
        assert found is None or isinstance(found, ChunkedCrossAttention)
        return found

    def read(self, neighbours_PNL: Tensor, embedding: nn.Module) -> dict[int, KeysValues] | None:
        """What each of the layers attends to, by layer number; None if no chunk has a neighbour."""
        present_PNL = neighbours_PNL != NOTHING
        there_PN = present_PNL.any(dim=2)
        if not there_PN.any():
            return None
        tokens_PL, present_PL = neighbours_PNL[there_PN], present_PNL[there_PN]
        encoded_PLD = self.encoder(embedding(tokens_PL.clamp_min(0)), present_PL)
        every_PNLD = encoded_PLD.new_zeros(*neighbours_PNL.shape, encoded_PLD.shape[-1])
        every_PNLD = every_PNLD.index_put((there_PN,), encoded_PLD)
        return {
            layer: attention.keys_values(every_PNLD, present_PNL)
            for layer in self.spec.layers
            if (attention := self.at(layer)) is not None
        }

    def read_chunks(self, neighbours_UNL: Tensor, first: int, embedding: nn.Module) -> ReadChunks:
        """Like `read`, for chunks of one sequence, the first of which is number `first`. Chunks without neighbours are
        left out.
        """
        found = self.read(neighbours_UNL, embedding)
        if found is None:
            return {}
        there_U = (neighbours_UNL != NOTHING).flatten(1).any(dim=1).tolist()
        return {
            first + chunk: [found[layer][chunk] for layer in self.spec.layers]
            for chunk, is_there in enumerate(there_U)
            if is_there
        }

    def extend(
        self, layer: int, x_RD: Tensor, segments: Segments, chunks: Sequence[Mapping[int, list[KeysValues]]]
    ) -> Tensor:
        """The attention after a local part, for the next rows of sequences. `chunks`: for each sequence, what has been
        read.
        """
        attention = self.at(layer)
        if attention is None:
            return x_RD
        place = self.spec.layers.index(layer)
        return attention.extend(x_RD, segments, [{n: each[place] for n, each in of.items()} for of in chunks])


class NeighbourEncoder(nn.Module):
    """Attention in both directions over a neighbour, with rotary positions.

    It has a quarter of the model's heads and no feed-forward block, because the passages have at least twice as many
    tokens as the text.
    """

    frequencies_C: Tensor

    def __init__(self, model: ModelSpec) -> None:
        super().__init__()
        check_heads(model.hidden, model.heads, model.head_size)
        size = model.head_size or model.hidden // model.heads
        self.heads: int = max(1, model.heads // 4)
        self.norm = make_norm(model.norm, model.hidden)
        self.input: nn.Linear = nn.Linear(model.hidden, 3 * self.heads * size, bias=False)
        self.output = nn.Linear(self.heads * size, model.hidden, bias=False)
        self.register_buffer("frequencies_C", rotary_frequencies(size), persistent=False)

    def forward(self, x_PLD: Tensor, present_PL: Tensor) -> Tensor:
        """[P, L, D] -> [P, L, D]. `present_PL`: where there are tokens, at least one in each row."""
        qkv_PL3HC = self.input(self.norm(x_PLD)).unflatten(-1, (3, self.heads, -1))
        positions_L = torch.arange(x_PLD.shape[1], device=x_PLD.device)
        angles_L11C = (positions_L[:, None] * self.frequencies_C)[:, None, None]
        qk_PL2HC = rotate(qkv_PL3HC[:, :, :2], angles_L11C.cos(), angles_L11C.sin())
        q_PHLC, k_PHLC = qk_PL2HC.permute(2, 0, 3, 1, 4).unbind(0)
        v_PHLC = qkv_PL3HC[:, :, 2].transpose(1, 2)
        seen_PHLC = F.scaled_dot_product_attention(
            q_PHLC, k_PHLC, v_PHLC, attn_mask=present_PL[:, None, None]
        )
        output_PLD: Tensor = x_PLD + self.output(seen_PHLC.transpose(1, 2).flatten(2))
        return output_PLD


class ChunkedCrossAttention(nn.Module):
    """Each row attends to the neighbours of the last chunk that ended at or before it, and the output is added to the
    row. Rows before the end of the first chunk stay as they are, and so do rows whose chunk has no neighbour.
    """

    def __init__(self, model: ModelSpec, chunk: int) -> None:
        super().__init__()
        size = model.head_size or model.hidden // model.heads
        self.heads, self.chunk = model.heads, chunk
        self.norm = make_norm(model.norm, model.hidden)
        self.neighbour_norm: nn.Module = make_norm(model.norm, model.hidden)
        self.query: nn.Linear = nn.Linear(model.hidden, model.heads * size, bias=False)
        self.key_value: nn.Linear = nn.Linear(model.hidden, 2 * model.heads * size, bias=False)
        self.output = nn.Linear(model.heads * size, model.hidden, bias=False)
        self.smear_H = nn.Parameter(torch.full((model.heads,), _SMEAR))
        with torch.no_grad():
            # a row can find its own token from the start, which small models take long to learn
            self.key_value.weight[: self.query.out_features] = self.query.weight
            self.query.weight *= _SHARPNESS
        nn.init.zeros_(self.output.weight)

    def keys_values(self, encoded_PNLD: Tensor, present_PNL: Tensor) -> KeysValues:
        """`encoded_PNLD`: the tokens of each chunk's neighbours."""
        kv_PNL2HC = self.key_value(self.neighbour_norm(encoded_PNLD)).unflatten(-1, (2, self.heads, -1))
        k_PNLHC, v_PNLHC = kv_PNL2HC.unbind(3)
        before_PNLHC = F.pad(k_PNLHC[:, :, :-1], (0, 0, 0, 0, 1, 0))
        k_PNLHC = torch.lerp(k_PNLHC, before_PNLHC, self.smear_H.sigmoid()[:, None])
        # the empty entry comes last: a key of zeros, and a value that adds nothing
        k_PHKC, v_PHKC = (
            F.pad(each.flatten(1, 2), (0, 0, 0, 0, 0, 1)).transpose(1, 2) for each in (k_PNLHC, v_PNLHC)
        )
        return KeysValues(k_PHKC, v_PHKC, F.pad(present_PNL.flatten(1), (0, 1), value=True)[:, None, None])

    def forward(self, x_BTD: Tensor, read: KeysValues) -> Tensor:
        """[B, T, D] -> [B, T, D]. `read`: for the T // chunk whole chunks of each sequence, sequence after sequence."""
        sequences, length, _ = x_BTD.shape
        first, chunks = self.chunk - 1, length // self.chunk
        if not chunks:
            return x_BTD
        q_BTX = self.query(self.norm(x_BTD[:, first:]))
        rows = q_BTX.shape[1]
        q_BTX = F.pad(q_BTX, (0, 0, 0, chunks * self.chunk - rows))
        q_PHTC = q_BTX.reshape(sequences * chunks, self.chunk, self.heads, -1).transpose(1, 2)
        seen_PTX = _attend(q_PHTC, read)
        added_BTD = self.output(seen_PTX.reshape(sequences, chunks * self.chunk, -1)[:, :rows])
        return torch.cat((x_BTD[:, :first], x_BTD[:, first:] + added_BTD), dim=1)

    def extend(self, x_RD: Tensor, segments: Segments, read: Sequence[Mapping[int, KeysValues]]) -> Tensor:
        """Computes the next rows of sequences. `read`: for each sequence, by chunk number."""
        chunks_R = (segments.positions + 1) // self.chunk - 1
        chunks = np.split(chunks_R, segments.lengths.cumsum()[:-1])
        outputs = []
        for x_LD, chunks_L, its_read in zip(
            torch.split(x_RD, segments.lengths.tolist()), chunks, read, strict=True
        ):
            numbers, counts = np.unique(chunks_L, return_counts=True)
            for some_LD, number in zip(torch.split(x_LD, counts.tolist()), numbers.tolist(), strict=True):
                if (found := its_read.get(number)) is None:
                    outputs.append(some_LD)
                    continue
                q_1HTC = self.query(self.norm(some_LD)).unflatten(-1, (self.heads, -1)).transpose(0, 1)[None]
                outputs.append(some_LD + self.output(_attend(q_1HTC, found)[0]))
        return torch.cat(outputs)


def _attend(q_PHTC: Tensor, read: KeysValues) -> Tensor:
    """[P, T, H * C]"""
    seen_PHTC = F.scaled_dot_product_attention(
        q_PHTC, read.keys_PHKC, read.values_PHKC, attn_mask=read.mask_P11K
    )
    return seen_PHTC.transpose(1, 2).flatten(2)
