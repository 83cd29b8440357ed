"""A model that a Talkoot swarm trained, for the library `transformers`: a dense part and all experts in one process.

This file is part of Talkoot and imports only torch and `transformers`: a model folder has a copy, and loads without
Talkoot. It computes what a trainer and its swarm compute in evaluation, where nothing is random: each layer is a local
part and a mixture of experts (Ryabinin & Gusev, arXiv 2002.04013, section 3.1). Experts of kind "transformer" attend to
the earlier rows of a sequence that went to the same expert.

Shapes: B sequences, T new positions, S positions including earlier ones, R = B * T rows, D hidden, W width of the
experts, H heads, C columns of a head, K experts of a row, U rows or sequences that are routed, G size of a grid
dimension, E live experts in a layer, n new rows of one expert, m rows that these may see, V vocabulary.
"""

from dataclasses import fields
from itertools import product
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_talkoot import TalkootConfig

_NORM_EPSILON = 1e-5
_ROTARY_BASE = 10_000.0
_LIMIT = 1e30
"""The limit for the magnitude of a score."""
_CHOSEN_AT_ONCE = 2**24
"""Scores of experts in memory at once."""
_CACHE = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"
"""The name of the cache in this release of the library."""


def make_norm(norm: str, hidden: int) -> nn.Module:
    return (nn.LayerNorm if norm == "layer" else nn.RMSNorm)(hidden, eps=_NORM_EPSILON)


def make_feed_forward(hidden: int, inner: int, activation: str) -> list[nn.Module]:
    """GELU with biases; SwiGLU and GEGLU (Shazeer, arXiv 2002.05202) without."""
    if activation == "gelu":
        return [nn.Linear(hidden, inner), nn.GELU(), nn.Linear(inner, hidden)]
    gate = Gated(nn.SiLU() if activation == "swiglu" else nn.GELU())
    return [nn.Linear(hidden, 2 * inner, bias=False), gate, nn.Linear(inner, hidden, bias=False)]


class Gated(nn.Module):
    """Multiplies the second half of the columns by a function of the first half."""

    def __init__(self, function: nn.Module) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        gate, values = x.chunk(2, dim=-1)
        return self.function(gate) * values


def rotated(x_NHC: Tensor, positions_N: Tensor) -> Tensor:
    """Rotary positions (Su et al., arXiv 2104.09864), computed in float32; keeps the dtype."""
    size = x_NHC.shape[-1]
    exponents = torch.arange(0, size, 2, dtype=torch.float32, device=x_NHC.device) / size
    angles = (positions_N[:, None] * _ROTARY_BASE**-exponents)[:, None]
    first, second = x_NHC.chunk(2, dim=-1)
    cosines, sines = angles.cos(), angles.sin()
    parts = (first * cosines - second * sines, first * sines + second * cosines)
    return torch.cat(parts, dim=-1).type_as(x_NHC)


class Rows:
    """The new positions of a batch, and which earlier ones each may see."""

    def __init__(self, mask_BS: Tensor, positions_BT: Tensor) -> None:
        """`mask_BS`: False for padding. Positions count from the first token that is not padding."""
        self.sequences: int
        self.new: int
        self.sequences, self.new = positions_BT.shape
        self.past: int = mask_BS.shape[1] - self.new
        self.positions_BT = positions_BT
        self.real_BT: Tensor = mask_BS[:, self.past :]
        self.is_plain: bool = bool(mask_BS.all()) and (not self.past or self.new == 1)
        """Whether nothing is masked but later positions."""
        self.allowed_B1TS: Tensor | None = None
        if not self.is_plain:
            places_S = torch.arange(mask_BS.shape[1], device=mask_BS.device)
            places_T1 = places_S[self.past :, None]
            # padding sees itself, so that its softmax is defined
            self.allowed_B1TS = (
                (mask_BS[:, None] & (places_S <= places_T1)) | (places_S == places_T1)
            ).unsqueeze(1)


class Attention(nn.Module):
    """Causal attention. Normalises its input, and adds its output to it."""

    def __init__(self, hidden: int, heads: int, norm: str, head_size: int | None) -> None:
        super().__init__()
        size = head_size or hidden // heads
        self.heads = heads
        self.attention_norm: nn.Module = make_norm(norm, hidden)
        self.attention_input: nn.Linear = nn.Linear(hidden, 3 * heads * size, bias=False)
        self.attention_output: nn.Linear = nn.Linear(heads * size, hidden, bias=False)

    def qkv(self, x_ND: Tensor, positions_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys, rotated, and values: [N, H, C]."""
        q, k, v = self.attention_input(self.attention_norm(x_ND)).view(len(x_ND), 3, self.heads, -1).unbind(1)
        return rotated(q, positions_N), rotated(k, positions_N), v

    def after(self, x_ND: Tensor, seen_NHC: Tensor) -> Tensor:
        """The layer's output, given what its heads saw."""
        return x_ND + self.attention_output(seen_NHC.flatten(1))

    def forward(self, x_RD: Tensor, rows: Rows, cache: Cache | None, layer: int) -> Tensor:
        """`layer`: of the cache."""
        shape = (rows.sequences, rows.new, self.heads, -1)
        q, k, v = (part.view(shape).transpose(1, 2) for part in self.qkv(x_RD, rows.positions_BT.flatten()))
        if cache is not None:
            k, v = cache.update(k, v, layer)
        is_causal = rows.is_plain and rows.new > 1
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=rows.allowed_B1TS, is_causal=is_causal)
        return self.after(x_RD, seen.transpose(1, 2).flatten(0, 1))


class TransformerLayer(Attention):
    """Attention, then a feed-forward block, which also normalises its input and adds its output to it."""

    def __init__(
        self, hidden: int, heads: int, feed_forward: int, norm: str, activation: str, head_size: int | None
    ) -> None:
        super().__init__(hidden, heads, norm, head_size)
        self.feed_forward_norm: nn.Module = make_norm(norm, hidden)
        self.feed_forward: nn.Sequential = nn.Sequential(*make_feed_forward(hidden, feed_forward, activation))

    def after(self, x_ND: Tensor, seen_NHC: Tensor) -> Tensor:
        x_ND = super().after(x_ND, seen_NHC)
        return x_ND + self.feed_forward(self.feed_forward_norm(x_ND))


class FeedForward(nn.Module):
    """An expert of kind "ffn". Each row is computed by itself."""

    def __init__(self, hidden: int, feed_forward: int, norm: str, activation: str) -> None:
        super().__init__()
        layers = make_feed_forward(hidden, feed_forward, activation)
        self.layers: nn.Sequential = nn.Sequential(make_norm(norm, hidden), *layers)

    def forward(self, x_nW: Tensor) -> Tensor:
        """The update of its rows."""
        return self.layers(x_nW)


class LocalPart(nn.Module):
    """The layers before a mixture."""

    def __init__(self, config: TalkootConfig) -> None:
        super().__init__()
        model = config.manifest["model"]
        sizes = (model["hidden"], model["heads"])
        rest = (model["norm"], model["activation"], model["head_size"])
        self.layers: nn.ModuleList = nn.ModuleList(
            TransformerLayer(*sizes, model["feed_forward"], *rest) for _ in range(model["local_layers"])
        )
        if model["local"] == "attention":
            self.layers.append(Attention(*sizes, model["norm"], model["head_size"]))

    def forward(self, x_RD: Tensor, rows: Rows, cache: Cache | None, first: int) -> Tensor:
        """`first`: the first of its layers in the cache."""
        for number, layer in enumerate(self.layers):
            x_RD = layer(x_RD, rows, cache, first + number)
        return x_RD


class Gate(nn.Module):
    """Scores from a row's first columns: one per grid dimension and coordinate, whose sum is an expert's logit, or one
    per expert. Computes in float32.
    """

    def __init__(self, width: int, sizes: list[int], has_noise: bool) -> None:
        super().__init__()
        self.sizes = sizes
        self.linear: nn.Linear = nn.Linear(width, sum(sizes))
        if has_noise:
            # only for training
            self.noise: nn.Linear = nn.Linear(width, sum(sizes), bias=False)

    def forward(self, x_UD: Tensor) -> tuple[Tensor, ...]:
        """One float32 [U, G] for each score table."""
        weight = self.linear.weight.float()
        scores = F.linear(x_UD[:, : weight.shape[1]].float(), weight, self.linear.bias.float())
        return torch.split(scores, self.sizes, dim=-1)


class LoadBias(nn.Module):
    """A bias that is added to the scores of experts when they are chosen, and does not count in any weight."""

    bias: Tensor

    def __init__(self, experts: int) -> None:
        super().__init__()
        # more than 4096 experts share entries
        size = experts if experts <= 4096 else 4093
        for name in ("bias", "average_bias", "average_load"):
            self.register_buffer(name, torch.zeros(size))


class Projections(nn.Module):
    """Projections from the model to the experts' width and back."""

    def __init__(self, norm: str, hidden: int, width: int) -> None:
        super().__init__()
        self.norm: nn.Module = make_norm(norm, hidden)
        self.down: nn.Linear = nn.Linear(hidden, width, bias=False)
        self.up: nn.Linear = nn.Linear(width, hidden, bias=False)


def through(module: nn.Module, x: Tensor) -> Tensor:
    """Computes in the precision of the module's parameters. Returns float32."""
    return module(x.to(next(module.parameters()).dtype)).float()


class Mixture(nn.Module):
    """Sends each row to the experts that its router chooses, and adds the weighted sum of their updates.

    During generation, a mixture has its own layers in the cache. The last one holds the experts of each row (-1 for
    none) as keys [B, K, S, 1], and their weights as values. With a prefix, all later rows use the same ones. If experts
    attend, the layer before it holds their keys and values [B, K * H, S, C].
    """

    def __init__(self, config: TalkootConfig, layer: int) -> None:
        super().__init__()
        manifest, routing = config.manifest, config.routing
        model, self.grid = manifest["model"], manifest["experts"]["grid"]
        self.router, self.k, self.prefix = routing["router"], routing["top_k"], config.prefix
        if self.router not in ("product-key", "noisy-top-k", "switch", "base", "glam"):
            raise ValueError(f"the router {self.router!r} is not known to this version of the model's code")
        self.attends: bool = config.experts_attend
        self.expert_heads: int = config.expert_heads
        self.expert_head_size: int = (
            manifest["experts"]["head_size"] or config.expert_width // self.expert_heads
        )
        self.count = 1
        for size in self.grid:
            self.count *= size
        sizes = self.grid if config.has_product_keys else [self.count]
        self.gate: Gate = Gate(config.gate_width, sizes, self.router == "noisy-top-k")
        self.projections: Projections | None = None
        if config.expert_width < config.hidden_size:
            self.projections = Projections(model["norm"], config.hidden_size, config.expert_width)
        self.shared: nn.Module | None = None
        if model["shared_feed_forward"]:
            inner = make_feed_forward(config.hidden_size, model["shared_feed_forward"], model["activation"])
            self.shared = nn.Sequential(make_norm(model["norm"], config.hidden_size), *inner)
        self.balance: LoadBias | None = (
            LoadBias(self.count) if routing["balance"] in ("bias", "both") else None
        )
        coordinates = product(*map(range, self.grid))
        self.names: list[str] = ["_".join(map(str, coordinate)) for coordinate in coordinates]
        missing = {uid.replace(".", "_") for uid in config.missing_experts}
        live = [number for number, name in enumerate(self.names) if f"{layer}_{name}" not in missing]
        # neither a parameter nor a buffer: it follows from the configuration
        self.live: Tensor = torch.tensor(live, dtype=torch.int64, device="cpu")

    def forward(
        self, x_RD: Tensor, rows: Rows, experts: nn.ModuleDict, cache: Cache | None, first: int
    ) -> Tensor:
        """`first`: the first of its layers in the cache."""
        dtype, x_RD = x_RD.dtype, x_RD.float()
        h_RD = x_RD if self.projections is None else through(self.projections.norm, x_RD)
        routed = first + self.attends
        numbers_RK, weights_RK = self._route(h_RD, rows, cache, routed)
        z_RW = h_RD if self.projections is None else through(self.projections.down, h_RD)
        sum_RW = self._mix(z_RW, numbers_RK, weights_RK, rows, experts, cache, first)
        if cache is not None:
            shape = (rows.sequences, rows.new, self.k)
            parts = (part.view(shape).transpose(1, 2).unsqueeze(3) for part in (numbers_RK, weights_RK))
            cache.update(*parts, routed)
        y_RD = x_RD + (sum_RW if self.projections is None else through(self.projections.up, sum_RW))
        if self.shared is not None:
            y_RD = y_RD + through(self.shared, x_RD)
        return y_RD.to(dtype)

    def _route(self, h_RD: Tensor, rows: Rows, cache: Cache | None, routed: int) -> tuple[Tensor, Tensor]:
        """The experts of each row, -1 for none, and their weights: [R, K]. Padding goes to no expert."""
        if not self.prefix:
            numbers_RK, weights_RK = self._choose(h_RD)
        else:
            if cache is not None and rows.past:
                kept = cache.layers[routed]
                numbers_BK, weights_BK = kept.keys[:, :, -1, 0], kept.values[:, :, -1, 0]
            else:
                counts_BT1 = (rows.real_BT & (rows.positions_BT < self.prefix)).unsqueeze(2)
                h_BTD = h_RD.view(rows.sequences, rows.new, -1)
                mean_BD = (h_BTD * counts_BT1).sum(dim=1) / counts_BT1.sum(dim=1).clamp_min(1)
                numbers_BK, weights_BK = self._choose(mean_BD)
            numbers_RK = numbers_BK.repeat_interleave(rows.new, dim=0)
            weights_RK = weights_BK.repeat_interleave(rows.new, dim=0)
        return numbers_RK.masked_fill(~rows.real_BT.reshape(-1, 1), -1), weights_RK

    def _choose(self, x_UD: Tensor) -> tuple[Tensor, Tensor]:
        """The k live experts with the highest scores, including the bias, and their weights: [U, K]."""
        step = max(1, _CHOSEN_AT_ONCE // max(1, len(self.live)))
        parts = [self._choose_some(some_UD) for some_UD in torch.split(x_UD, step)]
        return torch.cat([numbers for numbers, _ in parts]), torch.cat([weights for _, weights in parts])

    def _choose_some(self, x_UD: Tensor) -> tuple[Tensor, Tensor]:
        live_E = self.live.to(x_UD.device)
        columns = torch.unravel_index(live_E, self.gate.sizes)
        scores = self.gate(x_UD)
        logits_UE = scores[0][:, columns[0]]
        for scores_UG, column_E in zip(scores[1:], columns[1:], strict=True):
            logits_UE = logits_UE + scores_UG[:, column_E]
        ranks_UE = logits_UE.nan_to_num(nan=-_LIMIT).clamp(-_LIMIT, _LIMIT)
        if self.balance is not None:
            bias = self.balance.bias.float()
            ranks_UE = ranks_UE + bias[live_E % len(bias)]
        # stable: the first of equal ones wins
        best_UK = ranks_UE.sort(dim=1, descending=True, stable=True).indices[:, : self.k]
        logits_UK = logits_UE.gather(1, best_UK)
        if self.router == "switch":
            weights_UK = (logits_UK - logits_UE.double().logsumexp(dim=1, keepdim=True)).exp().clamp(max=1)
        elif self.router == "base":
            weights_UK = logits_UK.sigmoid()
        else:
            weights_UK = logits_UK.softmax(dim=1)
        lacking = self.k - best_UK.shape[1]
        return F.pad(live_E[best_UK], (0, lacking), value=-1), F.pad(weights_UK.float(), (0, lacking))

    def _mix(
        self,
        z_RW: Tensor,
        numbers_RK: Tensor,
        weights_RK: Tensor,
        rows: Rows,
        experts: nn.ModuleDict,
        cache: Cache | None,
        kept: int,
    ) -> Tensor:
        """The weighted sum of the experts' updates. `kept`: the layer of the cache for keys and values."""
        own = None if cache is None or not self.attends else _Kept(self, cache, kept, rows)
        sum_RW = torch.zeros_like(z_RW)
        order = numbers_RK.flatten().argsort(stable=True)
        counts = torch.bincount(numbers_RK.flatten() + 1)
        for number, slots_n in enumerate(torch.split(order, counts.tolist()), start=-1):
            if number < 0 or not len(slots_n):
                continue
            rows_n = slots_n // self.k
            weights_n1 = weights_RK.flatten()[slots_n, None]
            expert = experts[self.names[number]]
            x_nW = z_RW[rows_n].to(next(expert.parameters()).dtype)
            if self.attends:
                update_nW = self._attended(expert, x_nW, number, slots_n, rows, own) - x_nW
            else:
                update_nW = expert(x_nW)
            sum_RW = sum_RW.index_add(0, rows_n, weights_n1 * update_nW.float())
        if own is not None:
            own.store()
        return sum_RW

    def _attended(
        self,
        expert: Any,
        x_nW: Tensor,
        number: int,
        slots_n: Tensor,
        rows: Rows,
        own: "_Kept | None",
    ) -> Tensor:
        """The expert's output. A row sees itself and the earlier rows of its sequence that went to this expert."""
        rows_n = slots_n // self.k
        q, k, v = expert.qkv(x_nW, rows.positions_BT.flatten()[rows_n])
        sequence_n = sequence_m = rows_n // rows.new
        if own is not None:
            own.note(slots_n, k, v)
            before, k_before, v_before = own.before(number)
            sequence_m = torch.cat((before, sequence_n))
            k, v = torch.cat((k_before, k)), torch.cat((v_before, v))
        # each sequence apart, padded: a mask over all rows would grow with the square of the batch
        queries_B, place_n = _places(sequence_n, rows.sequences)
        keys_B, place_m = _places(sequence_m, rows.sequences)
        q = _padded(q, sequence_n, place_n, queries_B)
        k, v = (_padded(part, sequence_m, place_m, keys_B) for part in (k, v))
        last_BT = (keys_B - queries_B)[:, None] + torch.arange(q.shape[2], device=q.device)
        seen_BTM = torch.arange(k.shape[2], device=q.device) <= last_BT[:, :, None]
        seen_BHTC = F.scaled_dot_product_attention(q, k, v, attn_mask=seen_BTM[:, None])
        return expert.after(x_nW, seen_BHTC[sequence_n, :, place_n])


def _places(sequence_n: Tensor, sequences: int) -> tuple[Tensor, Tensor]:
    """How many rows each sequence has, and the place of each row among those of its sequence, in the order given."""
    count_B = torch.bincount(sequence_n, minlength=sequences)
    order_n = sequence_n.argsort(stable=True)
    first_B = count_B.cumsum(0) - count_B
    place_n = torch.empty_like(order_n)
    place_n[order_n] = torch.arange(len(order_n), device=order_n.device) - first_B[sequence_n[order_n]]
    return count_B, place_n


def _padded(x_nHC: Tensor, sequence_n: Tensor, place_n: Tensor, count_B: Tensor) -> Tensor:
    """These rows by sequence, with zeros where a sequence has fewer rows than another: [B, H, T, C]."""
    padded_BTHC = x_nHC.new_zeros(len(count_B), int(count_B.max()), *x_nHC.shape[1:])
    padded_BTHC[sequence_n, place_n] = x_nHC
    return padded_BTHC.transpose(1, 2)


class _Kept:
    """The keys and values of a mixture's experts: those in the cache, and the new ones."""

    def __init__(self, mixture: Mixture, cache: Cache, layer: int, rows: Rows) -> None:
        self._cache, self._layer, self._rows = cache, layer, rows
        self._shape = (mixture.k, mixture.expert_heads, mixture.expert_head_size)
        weight = mixture.gate.linear.weight
        size = (rows.sequences * rows.new * mixture.k, *self._shape[1:])
        self._new = [torch.zeros(size, dtype=weight.dtype, device=weight.device) for _ in range(2)]
        self._old = [new[:0].view(0, mixture.k, self._shape[1], 0, self._shape[2]) for new in self._new]
        self._numbers_BKS = torch.zeros(0, mixture.k, 0, dtype=torch.int64, device=weight.device)
        if rows.past:
            kept, (experts, heads, columns) = cache.layers[layer], self._shape
            shape = (rows.sequences, experts, heads, rows.past, columns)
            self._old = [kept.keys.view(shape), kept.values.view(shape)]
            self._numbers_BKS = cache.layers[layer + 1].keys[..., 0]

    def before(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """The earlier rows that went to this expert: their sequences [m], keys and values [m, H, C]."""
        sequences, slots, places = (self._numbers_BKS == number).nonzero(as_tuple=True)
        keys, values = (old[sequences, slots, :, places] for old in self._old)
        return sequences, keys, values

    def note(self, slots_n: Tensor, k_nHC: Tensor, v_nHC: Tensor) -> None:
        for all_new, new in zip(self._new, (k_nHC, v_nHC), strict=True):
            all_new[slots_n] = new

    def store(self) -> None:
        """Puts the new ones into the cache."""
        shape = (self._rows.sequences, self._rows.new, *self._shape)
        parts = (new.view(shape).permute(0, 2, 3, 1, 4).flatten(1, 2) for new in self._new)
        self._cache.update(*parts, self._layer)


class TalkootForCausalLM(PreTrainedModel, GenerationMixin):
    """The language model: `layers` times (a local part, then a mixture of experts)."""

    config_class = TalkootConfig
    base_model_prefix = "model"
    _no_split_modules: ClassVar[list[str]] = ["LocalPart", "Mixture", "FeedForward", "TransformerLayer"]
    _supports_sdpa = True

    def __init__(self, config: TalkootConfig) -> None:
        super().__init__(config)
        manifest = config.manifest
        model, kind = manifest["model"], manifest["experts"]["kind"]
        if kind not in ("transformer", "ffn"):
            raise ValueError(
                f"the experts are of kind {kind!r}, which is in another package: train or serve this model with "
                "Talkoot and that package"
            )
        layers = range(config.mixture_layers)
        self.embedding: nn.Module = nn.Embedding(config.vocab_size, config.hidden_size)
        self.local: nn.ModuleList = nn.ModuleList(LocalPart(config) for _ in layers)
        self.norm: nn.Module = make_norm(model["norm"], config.hidden_size)
        self.head: nn.Module = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        mixtures = [Mixture(config, layer) for layer in layers]
        self.mixtures: nn.ModuleList = nn.ModuleList(mixtures)
        self.experts: nn.ModuleList = nn.ModuleList(
            nn.ModuleDict({mixture.names[number]: self._expert() for number in mixture.live.tolist()})
            for mixture in mixtures
        )
        for name, shape in getattr(config, "beside", {}).items():
            self._keep(name, shape)
        self.post_init()

    def _keep(self, name: str, shape: list[int]) -> None:
        """Adds a parameter that `forward` does not use. Talkoot uses it to read passages of a memory."""
        *path, last = name.split(".")
        module: nn.Module = self
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            module = getattr(module, part)
        module.register_parameter(last, nn.Parameter(torch.zeros(shape)))

    def _expert(self) -> nn.Module:
        config = self.config
        model, width, inner = config.manifest["model"], config.expert_width, config.expert_feed_forward
        if not config.experts_attend:
            return FeedForward(width, inner, model["norm"], model["activation"])
        size = config.manifest["experts"]["head_size"]
        return TransformerLayer(width, config.expert_heads, inner, model["norm"], model["activation"], size)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embedding = value

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.head = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Cache | None = None,
        return_dict: bool | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """int64 [B, T] -> logits [B, T, V] of the token after each, and the loss if there are labels.

        `attention_mask` [B, S] is 0 for padding, which may precede a text, or follow it if nothing is cached. Positions
        are derived from it. `cache` (`past_key_values` in older releases): of the S - T earlier tokens. Labels of
        padding, of a text's first token, and of tokens that decide the routing of their sequence are left out of the
        loss.
        """
        x_BTD = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        sequences, new = x_BTD.shape[:2]
        cache = past_key_values if cache is None else cache
        if cache is None and use_cache:
            cache = DynamicCache()
        past = 0 if cache is None else cache.get_seq_length()
        rows = self._rows(attention_mask, sequences, past, new, x_BTD.device)
        if cache is not None and not past and int(rows.real_BT.sum(dim=1).min()) < self.config.prefix:
            raise ValueError(f"this model continues texts of {self.config.prefix} tokens or more")
        x_RD = x_BTD.flatten(0, 1)
        parts = zip(self.local, self.mixtures, self.experts, strict=True)
        for layer, (local, mixture, experts) in enumerate(parts):
            first = layer * self.config.cached_layers
            x_RD = local(x_RD, rows, cache, first)
            x_RD = mixture(x_RD, rows, experts, cache, first + self.config.attention_layers)
        x_BTD = x_RD.view(x_BTD.shape)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.head(self.norm(x_BTD[:, kept]))
        loss = None
        if labels is not None:
            unscored = ~rows.real_BT | (rows.positions_BT < max(1, self.config.prefix))
            labels = labels.masked_fill(unscored, -100)
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **others)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, **{_CACHE: cache})
        return output.to_tuple() if return_dict is False else output

    def _rows(
        self, mask_BS: Tensor | None, sequences: int, past: int, new: int, device: torch.device
    ) -> Rows:
        if mask_BS is None:
            mask_BS = torch.ones(sequences, past + new, device=device)
        if mask_BS.dim() != 2 or mask_BS.shape[1] != past + new:
            raise ValueError(
                f"the attention mask is {tuple(mask_BS.shape)}; expected {sequences} × {past + new}"
            )
        mask_BS = mask_BS.to(device=device, dtype=torch.bool)
        positions_BS = (mask_BS.long().cumsum(dim=1) - 1).clamp_min(0)
        context = self.config.max_position_embeddings
        if int(positions_BS[:, -1].max()) >= context:
            raise ValueError(f"a text of {int(positions_BS[:, -1].max()) + 1} tokens; at most {context}")
        return Rows(mask_BS, positions_BS[:, past:])
