"""What `benchmarks.recipe` compares: models that compute as much for each token, and their settings.

Shapes: D hidden, A columns of all heads, F inner size of feed-forward blocks, L rows that attend to each other, V
vocabulary.
"""

import hashlib
import json
from dataclasses import dataclass, field, replace
from typing import Any

from dht.manifest import Manifest, ModelSpec
from peer.choices import Activation
from trainer_client.settings import TrainerSettings

EXPERT_RATE = 2e-3
"""The experts' highest learning rate, which is that of the dense part."""

GATES_NOT_COUNTED = "gates not counted"
"""Ends the name of a mixture that computes as much as its rival up to the gates. With 256 experts scored one by one,
they take a sixth of its computing, but only 2% at a hidden size of 1,024.
"""

_ONLY_MEASURED = {"validate_every", "validation_batches", "threads"}
"""Settings that have no effect on what is learned."""


@dataclass(frozen=True)
class Size:
    """What all models of a comparison have in common."""

    hidden: int = 96
    heads: int = 4
    context: int = 128
    batch: int = 16
    grid: tuple[int, int] = (4, 4)
    steps: int = 3000
    validate_every: int = 250
    validation_batches: int = 16
    seed: int = 0
    """The seed of initial parameters and the order of batches."""


QUICK_SIZE = Size(
    hidden=32, heads=2, context=64, batch=8, grid=(2, 4), steps=40, validate_every=20, validation_batches=4
)


@dataclass(frozen=True)
class Configuration:
    """A model and how it is trained. `expert_kind` None: a dense Transformer of `layers` layers."""

    name: str
    layers: int
    feed_forward: float = 4.0
    """The inner size, as a multiple of hidden."""
    expert_kind: str | None = None
    top_k: int = 1
    grid: tuple[int, ...] | None = None
    """The grid of the experts. None: that of the size."""
    takes_feed_forward: bool = False
    """Whether each mixture replaces a feed-forward block, so that an attention comes before it. Otherwise it replaces a
    whole layer.
    """
    width: float = 1.0
    """The width of experts, as a multiple of hidden."""
    head_size: int | None = None
    """The size of an expert's only head. None: heads are as large as the trainer's, and there are as many as fit into
    the width.
    """
    gate_width: int | None = None
    """How many columns the gate reads; None: all."""
    shared: float = 0.0
    """The inner size of each mixture's shared expert, as a multiple of hidden; 0: there is none."""
    activation: Activation = "gelu"
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings of the trainer in addition to those that all have."""
    optimizer: dict[str, Any] = field(default_factory=dict)
    """Settings of the experts in addition to those that all have."""
    rival: str | None = None
    """The configuration that it is compared with: the dense model that computes as much for each token, or, for a
    variant, the mixture that it varies.
    """
    steps: float = 1.0
    """Steps as a share of the size's steps."""

    def steps_of(self, size: Size) -> int:
        return max(1, round(self.steps * size.steps))

    def manifest(self, size: Size) -> Manifest:
        dense = self.expert_kind is None
        model = {
            "layers": 1 if dense else self.layers,
            "local": "attention" if self.takes_feed_forward else "layer",
            "local_layers": self.layers if dense else int(not self.takes_feed_forward),
            "hidden": size.hidden,
            "heads": size.heads,
            "context": size.context,
            "feed_forward": round(self.feed_forward * size.hidden),
            "shared_feed_forward": round(self.shared * size.hidden),
            "activation": self.activation,
            "seed": size.seed,
        }
        experts: dict[str, Any] = {
            "grid": self.grid or size.grid,
            "kind": self.expert_kind or "transformer",
        }
        if self.width != 1.0:
            experts |= {
                "width": 2 * round(self.width * size.hidden / 2),
                "heads": max(1, round(self.width * size.heads)),
            }
        if self.head_size is not None:
            experts |= {"heads": 1, "head_size": self.head_size}
        optimizer = {
            "learning_rate": EXPERT_RATE,
            "warmup_updates": 20,
            "decay_updates": self.steps_of(size),
        } | self.optimizer
        return Manifest.model_validate(
            {"name": "recipe", "model": model, "experts": experts, "optimizer": optimizer}
            | {"routing": {"top_k": self.top_k, "gate_width": self.gate_width}}
        )

    def trainer_settings(self, size: Size) -> TrainerSettings:
        common = {
            "steps": self.steps_of(size),
            "batch_size": size.batch,
            "learning_rate": EXPERT_RATE,
            "validate_every": max(1, min(size.validate_every, self.steps_of(size))),
            "validation_batches": size.validation_batches,
            "seed": size.seed,
            "threads": 1,
        }
        return TrainerSettings.model_validate(common | self.settings)

    def cache_name(self, size: Size, data_sha256: str) -> str:
        """A file name that changes exactly when something else would be learned. Keys left at their defaults are not
        part of it, so new keys in manifests and settings change no name.
        """
        settings = self.trainer_settings(size).model_dump(mode="json", exclude_defaults=True)
        learned = {name: value for name, value in settings.items() if name not in _ONLY_MEASURED}
        manifest = self.manifest(size).model_dump(mode="json", exclude_defaults=True)
        what = json.dumps([manifest, self.expert_kind is None, learned, data_sha256], sort_keys=True)
        return hashlib.sha256(what.encode()).hexdigest()[:16]

    def flops(self, size: Size) -> dict[str, float]:
        """FLOPs of the forward pass for each token, by part; a backward pass takes twice as many."""
        return model_flops(self.manifest(size), has_experts=self.expert_kind is not None)


def model_flops(manifest: Manifest, *, has_experts: bool = True) -> dict[str, float]:
    """FLOPs of a forward pass for each token, by part; a backward pass takes twice as many."""
    model, experts, expert = manifest.model, manifest.experts, manifest.expert_model
    local = model.local_layers * layer_flops(model, model.context)
    if model.local == "attention":
        local += attention_flops(model, model.context)
    parts = {"dense layers": model.layers * local}
    if has_experts:
        # The rows of a sequence that reach one expert if they are spread evenly.
        reached = max(1.0, model.context * manifest.routing.top_k / experts.count)
        one = layer_flops(expert, reached) if experts.kind == "transformer" else feed_forward_flops(expert)
        parts["experts"] = model.layers * manifest.routing.top_k * one
        parts["gates"] = model.layers * 2.0 * manifest.gate_width * sum(manifest.score_sizes)
        if manifest.width < model.hidden:
            parts["projections"] = model.layers * 2.0 * 2 * model.hidden * manifest.width
        if model.shared_feed_forward:
            shared = model.model_copy(update={"feed_forward": model.shared_feed_forward})
            parts["shared experts"] = model.layers * feed_forward_flops(shared)
    return parts | {"head": 2.0 * model.hidden * 256}


def layer_flops(model: ModelSpec, attended: float) -> float:
    """FLOPs of one Transformer layer for each token, without norms and activations."""
    return attention_flops(model, attended) + feed_forward_flops(model)


def attention_flops(model: ModelSpec, attended: float) -> float:
    """FLOPs of one attention for each token.

    Its matrices take 2 · 4 D A. Scores and their sum take 2 · 2 A for each of the (L + 1) / 2 rows that a row sees on
    average.
    """
    columns = model.heads * (model.head_size or model.hidden // model.heads)
    return 8.0 * model.hidden * columns + 4.0 * columns * (attended + 1) / 2


def feed_forward_flops(model: ModelSpec) -> float:
    """FLOPs of one feed-forward block for each token: 2 D F for each of its matrices."""
    matrices = 2 if model.activation == "gelu" else 3
    return 2.0 * matrices * model.hidden * model.feed_forward


_SHORT = 1 / 3

_SWITCH = {"router": "switch", "expert_dropout": 0.0}
_GLAM = {"router": "glam"}
_PRODUCT_KEY = {"router": "product-key"}

_TRANSFORMER = Configuration("transformer top-1", 1, 4.0, "transformer", settings=_SWITCH, rival="dense-2")
_FFN = Configuration("ffn top-1", 2, 2.0, "ffn", settings=_SWITCH, rival="dense-2")

_THIN = replace(_TRANSFORMER, name="transformer top-1, thin", layers=2, feed_forward=1.0)

_FINE = Configuration(
    "ffn top-4, fine",
    4,
    1.0,
    "ffn",
    4,
    (8, 8),
    takes_feed_forward=True,
    settings=_PRODUCT_KEY,
    rival="dense-4",
)
_MANY = replace(
    _FINE,
    name="ffn top-4, fine, 256 experts",
    feed_forward=23 / 24,
    grid=(16, 16),
    optimizer={"warmup_updates": 1000},
)
"""Each expert gets few rows, so larger first steps would be too noisy."""
_MANY_AND_SHARED = replace(
    _MANY, name="ffn top-4, fine, 256 experts and a shared one", feed_forward=3 / 4, shared=5 / 6
)
_MANY_SCORED = replace(
    _MANY_AND_SHARED,
    name="ffn top-4, fine, 256 experts scored one by one, and a shared one",
    grid=(256,),
    gate_width=48,
    feed_forward=2 / 3,
    shared=2 / 3,
)
"""An expert has a score of its own instead of two that it shares with others. The gate reads half the columns, so that
it does not compute much more.
"""
_MANY_WITH_WIDE_GATES = replace(
    _MANY_SCORED,
    name=f"{_MANY_SCORED.name}, {GATES_NOT_COUNTED}",
    gate_width=None,
    feed_forward=3 / 4,
    shared=1.0,
)
"""The gate reads all columns. Up to the gates, it computes as much as its rival."""
_NARROW = replace(
    _FINE, name="transformer top-4, narrow", expert_kind="transformer", width=1 / 4, feed_forward=13 / 4
)
"""The expert's projections take a sixteenth of what a feed-forward block of the usual size takes."""
_HALF = replace(
    _NARROW, name="transformer top-4, half as wide", width=1 / 2, head_size=8, feed_forward=19 / 12
)
"""One thin head: attention takes a tenth of what the expert computes."""
_THIRD = replace(_HALF, name="transformer top-4, a third as wide", width=1 / 3, feed_forward=31 / 12)

CONFIGURATIONS = (
    Configuration("dense-4", 4),
    _FINE,
    _MANY,
    _MANY_AND_SHARED,
    _MANY_SCORED,
    Configuration("dense-4, wider", 4, 16 / 3),
    _MANY_WITH_WIDE_GATES,
    replace(_FINE, name="ffn top-4, narrow", width=1 / 4, feed_forward=15 / 4),
    _NARROW,
    _HALF,
    replace(
        _HALF, name="transformer top-4, half as wide, wide attention", head_size=None, feed_forward=11 / 16
    ),
    replace(_HALF, name="transformer top-4, half as wide, 16 experts", grid=(4, 4), rival=_HALF.name),
    replace(_HALF, name="transformer top-4, half as wide, 256 experts", grid=(16, 16), rival=_HALF.name),
    Configuration("dense-2", 2),
    _TRANSFORMER,
    _FFN,
    _THIN,
    Configuration("dense-3", 3),
    replace(_THIN, name="transformer top-2, thin", top_k=2, settings=_GLAM, rival="dense-3"),
    Configuration("dense-5", 5),
    replace(_THIN, name="transformer top-4, thin", top_k=4, settings=_PRODUCT_KEY, rival="dense-5"),
)
"""The feed-forward blocks of each are sized so that it computes as much for each token as its rival. "dense-4, wider"
computes as much as the mixture with wide gates.
"""


def _short(configuration: Configuration, rival: str | None = None, **changes: Any) -> Configuration:
    name = f"short, {configuration.name}"
    return replace(configuration, name=name, rival=rival, steps=_SHORT, **changes)


def _variant(change: str, **changes: Any) -> Configuration:
    """A variant of the mixture of Transformer layers."""
    settings = _SWITCH | changes.pop("settings", {})
    changed = replace(_TRANSFORMER, name=change, settings=settings, **changes)
    return _short(changed, "short, transformer top-1")


def _fine_variant(change: str, **changes: Any) -> Configuration:
    """A variant of the mixture of small feed-forward experts."""
    return _short(replace(_FINE, name=f"ffn top-4, {change}", **changes), f"short, {_FINE.name}")


VARIANTS = (
    _short(Configuration("dense-2", 2)),
    _short(_TRANSFORMER, "short, dense-2"),
    _variant("two thin layers", layers=2, feed_forward=1.0),
    _variant("one dimension of 16", grid=(16,)),
    _variant("balance weight 0.1", settings={"balance_weight": 0.1}),
    _variant("base", settings={"router": "base", "expert_dropout": 0.1}),
    _variant("experts' rate constant", optimizer={"decay_updates": 0}),
    _short(_FFN, "short, dense-2"),
    _short(Configuration("dense-3", 3)),
    _short(Configuration("transformer top-2", 1, 4.0, "transformer", 2, settings=_GLAM), "short, dense-3"),
    _short(
        Configuration("transformer top-2, product-key", 1, 4.0, "transformer", 2, settings=_PRODUCT_KEY),
        "short, dense-3",
    ),
    _short(Configuration("dense-5", 5)),
    _short(
        Configuration("transformer top-4", 1, 4.0, "transformer", 4, settings=_PRODUCT_KEY), "short, dense-5"
    ),
    _variant("expert dropout 0.1", settings={"expert_dropout": 0.1}),
    _variant("gate scale 1", settings={"gate_scale": 1.0}),
    _variant("experts' rate 0.001", optimizer={"learning_rate": 1e-3}),
    _variant("experts' rate 0.004", optimizer={"learning_rate": 4e-3}),
    _variant("balance weight 0.001", settings={"balance_weight": 0.001}),
    _short(Configuration("dense-4", 4)),
    _short(_FINE, "short, dense-4"),
    _short(_NARROW, "short, dense-4"),
    _short(_HALF, "short, dense-4"),
    _short(_THIRD, "short, dense-4"),
    *(
        _short(
            replace(_HALF, name=f"{_HALF.name}, {rows} rows for a step"),
            f"short, {_HALF.name}",
            optimizer={"rows_per_update": rows},
        )
        for rows in (128, 256)
    ),
    _short(Configuration("dense-4, swiglu", 4, 8 / 3, activation="swiglu")),
    _fine_variant("swiglu", feed_forward=2 / 3, activation="swiglu"),
    _fine_variant("one dimension of 64", grid=(64,), feed_forward=11 / 12),
    _fine_variant("16 experts", grid=(4, 4)),
    _fine_variant("256 experts", grid=(16, 16)),
    _fine_variant("three and a shared one", top_k=3, shared=1.0),
    _fine_variant("experts' rate 0.001", optimizer={"learning_rate": 1e-3}),
    _fine_variant("experts' rate 0.004", optimizer={"learning_rate": 4e-3}),
)
"""These train for a third of the steps, with the learning rate falling as far. They are mixtures with other numbers of
experts for each token, compared with dense models that compute as much, and one mixture with one thing changed at a
time.
"""

ALL = CONFIGURATIONS + VARIANTS
