"""What trainers and experts compute alike: the Transformer layer and its parts, and the learning-rate schedule.

The manifest chooses norm and activation; GLaM (Du et al., arXiv 2112.06905) uses RMSNorm and GEGLU.

Shape suffixes: R = rows, S = segments, D = hidden, H = heads, C = columns of one head, L = longest segment, P = rows of
a segment and those before it.
"""

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peer.choices import Activation, Norm, check_heads

M = TypeVar("M", bound=nn.Module)

_NORM_EPSILON = 1e-5
"""torch's default for LayerNorm. Its default for RMSNorm lets gradients of rows near zero grow 3000-fold."""
_ROTARY_BASE = 10_000.0
_LARGEST_PADDING = 1.5
"""The largest ratio of rows with padding to rows without, in one group of segments."""
CACHE_GROWTH = 1.25
"""When a cache grows, it gets room for this many times its rows."""
_FINAL_SHARE = 0.1
"""The learning rate at the end of the cosine, as a share of its peak."""


def seeded(seed: int, build: Callable[[], M]) -> M:
    """Builds a module whose parameters depend on the seed alone, and restores the global generator.

    The parameters are drawn on the CPU. Don't call it while another thread draws from torch's global generator.
    """
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would seed the accelerators too
        torch.default_generator.manual_seed(seed)
        return build()


def make_norm(norm: Norm, hidden: int) -> nn.Module:
    """LayerNorm, or RMSNorm (Zhang and Sennrich, arXiv 1910.07467). Weights start at one and biases at zero."""
    return (nn.LayerNorm if norm == "layer" else nn.RMSNorm)(hidden, eps=_NORM_EPSILON)


def make_feed_forward(hidden: int, inner: int, activation: Activation) -> nn.Sequential:
    """Maps [R, D] to [R, D] through `inner` columns, without norm or residual connection.

    GELU: 2 matrices of D × inner, and biases. SwiGLU and GEGLU (Shazeer, arXiv 2002.05202): 3 matrices of D × inner,
    no biases, as in the paper and in PaLM. With two thirds of GELU's `inner` they have as many parameters.
    """
    if activation == "gelu":
        return nn.Sequential(nn.Linear(hidden, inner), nn.GELU(), nn.Linear(inner, hidden))
    gate = Gate(nn.SiLU() if activation == "swiglu" else nn.GELU())
    return nn.Sequential(nn.Linear(hidden, 2 * inner, bias=False), gate, nn.Linear(inner, hidden, bias=False))


class Gate(nn.Module):
    """Multiplies the second half of the columns by a function of the first half."""

    def __init__(self, function: nn.Module) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        gate, values = x.chunk(2, dim=-1)
        output: Tensor = self.function(gate) * values
        return output


class KeyValueCache:
    """Keys and values that an attention has computed for the rows of one sequence, so that it can continue the
    sequence.
    """

    def __init__(self) -> None:
        self.length: int = 0
        """Rows."""
        self.version = 0
        """The version of the parameters that computed them, for owners that change the parameters; 0 if there are no
        versions.
        """
        self._kv_P2HC: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return 0 if self._kv_P2HC is None else self._kv_P2HC.nbytes

    def extend(self, kv_L2HC: Tensor) -> Tensor:
        """Adds rows, and returns all: [P, 2, H, C]."""
        begin, self.length = self.length, self.length + len(kv_L2HC)
        if self._kv_P2HC is None:
            self._kv_P2HC = kv_L2HC.clone()
        elif self.length > len(self._kv_P2HC):
            grown = kv_L2HC.new_empty(int(CACHE_GROWTH * self.length), *kv_L2HC.shape[1:])
            grown[:begin] = self._kv_P2HC[:begin]
            self._kv_P2HC = grown
        self._kv_P2HC[begin : self.length] = kv_L2HC
        return self._kv_P2HC[: self.length]

    def truncate(self, length: int) -> None:
        """Forgets the rows after the first `length`."""
        self.length = min(self.length, length)


class Attention(nn.Module):
    """Attention with rotary positions (Su et al., arXiv 2104.09864). It normalises its input, and adds its output to
    it.

    Rows are packed, segment after segment, so that no linear layer computes padding. A row attends to itself and to the
    earlier rows of its own segment, and to the later ones too if the attention is not causal.
    """

    frequencies_C: Tensor

    def __init__(
        self,
        hidden: int,
        heads: int,
        norm: Norm = "layer",
        head_size: int | None = None,
        *,
        causal: bool = True,
    ) -> None:
        """`head_size`: columns of one head, hidden / heads by default."""
        super().__init__()
        check_heads(hidden, heads, head_size)
        size = head_size or hidden // heads
        self.heads = heads
        self.causal = causal
        self.attention_norm: nn.Module = make_norm(norm, hidden)
        self.attention_input: nn.Linear = nn.Linear(hidden, 3 * heads * size, bias=False)
        self.attention_output: nn.Linear = nn.Linear(heads * size, hidden, bias=False)
        self.register_buffer("frequencies_C", rotary_frequencies(size), persistent=False)

    def forward(
        self,
        x_RD: Tensor,
        lengths_S: Tensor,
        positions_R: Tensor,
        caches: Sequence[KeyValueCache | None] = (),
    ) -> Tensor:
        """Returns [R, D]. `lengths_S`: int64, on the CPU, each at least 1, with sum R. `positions_R`: int64.

        `caches`: empty, or for each segment a cache or None. A segment's rows follow those in its cache, and are added
        to it. Only without gradients, and only in causal attention.
        """
        output_RD: Tensor = x_RD + self.attention_output(
            self._attention(self.attention_norm(x_RD), lengths_S.tolist(), positions_R, caches)
        )
        return output_RD

    def _attention(
        self,
        x_RD: Tensor,
        lengths: list[int],
        positions_R: Tensor,
        caches: Sequence[KeyValueCache | None],
    ) -> Tensor:
        """The attention's output for each row, all heads side by side: [R, H * C]."""
        rows = len(x_RD)
        assert sum(lengths) == rows, f"the segments have {sum(lengths)} rows, but there are {rows}"
        qkv_R3HC = self.attention_input(x_RD).view(rows, 3, self.heads, -1)
        angles_R11C = (positions_R[:, None] * self.frequencies_C)[:, None, None]
        qk_R2HC = rotate(qkv_R3HC[:, :2], angles_R11C.cos(), angles_R11C.sin())
        qkv_R3HC = torch.cat((qk_R2HC, qkv_R3HC[:, 2:]), dim=1)
        if caches:
            assert self.causal, "rows that are computed already can't attend to later ones"
            return _attend_cached(qkv_R3HC, lengths, caches).flatten(1)
        return _attend_segments(qkv_R3HC, lengths, self.causal).flatten(1)


class TransformerLayer(Attention):
    """Attention, then a feed-forward block, which also normalises its input and adds its output to it."""

    def __init__(
        self,
        hidden: int,
        heads: int,
        feed_forward: int,
        norm: Norm = "layer",
        activation: Activation = "gelu",
        head_size: int | None = None,
        *,
        causal: bool = True,
    ) -> None:
        super().__init__(hidden, heads, norm, head_size, causal=causal)
        self.feed_forward_norm: nn.Module = make_norm(norm, hidden)
        self.feed_forward: nn.Sequential = make_feed_forward(hidden, feed_forward, activation)

    def forward(
        self,
        x_RD: Tensor,
        lengths_S: Tensor,
        positions_R: Tensor,
        caches: Sequence[KeyValueCache | None] = (),
    ) -> Tensor:
        x_RD = super().forward(x_RD, lengths_S, positions_R, caches)
        output_RD: Tensor = x_RD + self.feed_forward(self.feed_forward_norm(x_RD))
        return output_RD


def rotary_frequencies(size: int) -> Tensor:
    """The frequencies by which positions turn the pairs of a head's columns: float32 [size / 2]."""
    # computed on the CPU: on the device "meta" a division imports torch's compiler, which takes a second
    exponents_C = torch.arange(0, size, 2, dtype=torch.float32, device="cpu") / size
    return torch.tensor((_ROTARY_BASE**-exponents_C).tolist(), dtype=torch.float32)


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotates each pair (column c, column c + C/2) of the last dimension by its angle, in float32; keeps x's dtype."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cosines - second * sines, first * sines + second * cosines), dim=-1).type_as(x)


def _attend_segments(qkv_R3HC: Tensor, lengths: list[int], causal: bool) -> Tensor:
    """Attention within each segment; returns [R, H, C]."""
    if len(set(lengths)) == 1:
        return _attend(qkv_R3HC, len(lengths), causal)
    lengths_S = torch.tensor(lengths)
    starts_S = lengths_S.cumsum(0) - lengths_S
    order, outputs = [], []
    for group in group_by_length(lengths):
        members_S = torch.tensor(group)
        steps_L = torch.arange(lengths[group[0]])
        inside_SL = steps_L < lengths_S[members_S, None]
        rows = (starts_S[members_S, None] + steps_L)[inside_SL]
        slots = inside_SL.flatten().nonzero().squeeze(1).to(qkv_R3HC.device)
        order.append(rows)
        # padding is zero and follows the rows of its segment, so a causal mask hides it
        padded = qkv_R3HC.new_zeros(inside_SL.numel(), *qkv_R3HC.shape[1:])
        padded = padded.index_copy(0, slots, qkv_R3HC.index_select(0, rows.to(qkv_R3HC.device)))
        present_SL = None if causal else inside_SL.to(qkv_R3HC.device)
        outputs.append(_attend(padded, len(group), causal, present_SL).index_select(0, slots))
    return torch.cat(outputs).index_select(0, torch.cat(order).argsort().to(qkv_R3HC.device))


def _attend(qkv_R3HC: Tensor, segments: int, causal: bool, present_SL: Tensor | None = None) -> Tensor:
    """Attention within segments of equal length; returns [R, H, C]. `present_SL`: False for padding."""
    qkv_SL3HC = qkv_R3HC.view(segments, -1, *qkv_R3HC.shape[1:])
    q_SHLC, k_SHLC, v_SHLC = qkv_SL3HC.permute(2, 0, 3, 1, 4).unbind(0)
    mask_S11L = None if present_SL is None else present_SL[:, None, None]
    output_SHLC = F.scaled_dot_product_attention(
        q_SHLC, k_SHLC, v_SHLC, attn_mask=mask_S11L, is_causal=causal
    )
    return output_SHLC.transpose(1, 2).flatten(0, 1)


def _attend_cached(qkv_R3HC: Tensor, lengths: list[int], caches: Sequence[KeyValueCache | None]) -> Tensor:
    """Like `_attend_segments`, for segments that continue the rows in their caches."""
    outputs = []
    for qkv_L3HC, cache in zip(torch.split(qkv_R3HC, lengths), caches, strict=True):
        if cache is None or (not cache.length and len(qkv_L3HC) > 1):
            outputs.append(_attend(qkv_L3HC, 1, causal=True))
            if cache is not None:
                cache.extend(qkv_L3HC[:, 1:])
            continue
        k_HPC, v_HPC = cache.extend(qkv_L3HC[:, 1:]).permute(1, 2, 0, 3)
        q_HLC = qkv_L3HC[:, 0].transpose(0, 1)
        rows, seen = q_HLC.shape[1], k_HPC.shape[1]
        mask = (
            None
            if rows == 1
            else torch.ones(rows, seen, dtype=torch.bool, device=q_HLC.device).tril(seen - rows)
        )
        output_SHLC = F.scaled_dot_product_attention(q_HLC[None], k_HPC[None], v_HPC[None], attn_mask=mask)
        outputs.append(output_SHLC[0].transpose(0, 1))
    return torch.cat(outputs)


def group_by_length(lengths: list[int]) -> list[list[int]]:
    """Indices of segments, longest first, in groups that grow by at most half when padded to their longest segment."""
    groups: list[list[int]] = []
    rows = longest = 0
    for segment in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        rows += lengths[segment]
        if groups and (len(groups[-1]) + 1) * longest <= _LARGEST_PADDING * rows:
            groups[-1].append(segment)
        else:
            groups.append([segment])
            rows = longest = lengths[segment]
    return groups


def step_size(step: int, highest: float, warmup: int, last: int) -> float:
    """The learning rate at a step, counted from 0.

    It rises linearly for `warmup` steps, then falls along a cosine to a tenth at step `last`, and stays there. With
    `last` 0 it does not fall.
    """
    if step < warmup:
        return highest * (step + 1) / warmup
    if not last:
        return highest
    done = (step - warmup) / max(1, last - warmup)
    share = (1 + math.cos(math.pi * min(1.0, done))) / 2
    return highest * (_FINAL_SHARE + (1 - _FINAL_SHARE) * share)
