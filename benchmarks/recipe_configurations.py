"""What `benchmarks.recipe` compares: models that compute as much for each token, and what each of them is given.

Shapes: D hidden, F inner size of feed-forward blocks, L rows that attend to each other, V vocabulary.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from dht.manifest import Manifest, ModelSpec
from trainer_client.settings import TrainerSettings

EXPERT_RATE = 2e-3
"""The experts' highest step size: that of the dense part."""


@dataclass(frozen=True)
class Size:
    """What all models of a comparison share."""

    hidden: int = 96
    heads: int = 4
    context: int = 128
    batch: int = 16
    grid: tuple[int, int] = (4, 4)
    steps: int = 3000
    validate_every: int = 250
    validation_batches: int = 16


QUICK_SIZE = Size(
    hidden=32, heads=2, context=64, batch=8, grid=(2, 4), steps=40, validate_every=20, validation_batches=4
)


@dataclass(frozen=True)
class Configuration:
    """A model and how it is trained. `expert_kind` None: a dense Transformer of `layers` layers."""

    name: str
    layers: int
    feed_forward: float = 4.0
    """As a multiple of hidden."""
    expert_kind: str | None = None
    top_k: int = 1
    settings: dict[str, Any] = field(default_factory=dict)
    """Of the trainer, beside those that all have."""
    optimizer: dict[str, Any] = field(default_factory=dict)
    """Of the experts, beside those that all have."""
    rival: str | None = None
    """What it is compared with: the dense model that computes as much for each token, or what a variant varies."""
    steps: float = 1.0
    """As a part of the size's steps."""

    def steps_of(self, size: Size) -> int:
        return max(1, round(self.steps * size.steps))

    def manifest(self, size: Size) -> Manifest:
        dense = self.expert_kind is None
        model = {
            "layers": 1 if dense else self.layers,
            "local_layers": self.layers if dense else 1,
            "hidden": size.hidden,
            "heads": size.heads,
            "context": size.context,
            "feed_forward": round(self.feed_forward * size.hidden),
        }
        experts = {"grid": size.grid, "kind": self.expert_kind or "transformer"}
        optimizer = {
            "learning_rate": EXPERT_RATE,
            "warmup_updates": 20,
            "decay_updates": self.steps_of(size),
        } | self.optimizer
        return Manifest.model_validate(
            {"name": "recipe", "model": model, "experts": experts, "routing": {"top_k": self.top_k}}
            | {"optimizer": optimizer}
        )

    def trainer_settings(self, size: Size) -> TrainerSettings:
        common = {
            "steps": self.steps_of(size),
            "batch_size": size.batch,
            "learning_rate": EXPERT_RATE,
            "validate_every": max(1, min(size.validate_every, self.steps_of(size))),
            "validation_batches": size.validation_batches,
            "seed": 0,
            "threads": 1,
        }
        return TrainerSettings.model_validate(common | self.settings)

    def file_name(self, size: Size, domains: dict[str, int]) -> str:
        """Another one for whatever would learn something else. `domains`: bytes of each."""
        what = json.dumps([asdict(self), asdict(size), domains], sort_keys=True)
        words = "".join(letter if letter.isalnum() else "-" for letter in self.name)
        return f"{words}-{hashlib.sha256(what.encode()).hexdigest()[:8]}"

    def flops(self, size: Size) -> dict[str, float]:
        """Forward, for each token, by part; a backward pass takes twice as many."""
        manifest = self.manifest(size)
        model, experts = manifest.model, manifest.experts
        parts = {"dense layers": model.layers * model.local_layers * layer_flops(model, model.context)}
        if self.expert_kind is not None:
            # rows of a sequence that reach one expert, when it gets its part of them
            reached = max(1.0, model.context * self.top_k / experts.count)
            one = layer_flops(model, reached) if experts.kind == "transformer" else feed_forward_flops(model)
            parts["experts"] = model.layers * self.top_k * one
            parts["gates"] = model.layers * 2.0 * model.hidden * sum(experts.grid)
        return parts | {"head": 2.0 * model.hidden * 256}


def layer_flops(model: ModelSpec, attended: float) -> float:
    """Of one Transformer layer for each token, norms and activations not counted.

    Projections take 2 · 4 D²; scores and their sum 2 · 2 D for each of the (L + 1) / 2 rows that a row sees on average.
    """
    return 8.0 * model.hidden**2 + 4.0 * model.hidden * (attended + 1) / 2 + feed_forward_flops(model)


def feed_forward_flops(model: ModelSpec) -> float:
    """Of one feed-forward block for each token: 2 D F for each of its matrices."""
    matrices = 2 if model.activation == "gelu" else 3
    return 2.0 * matrices * model.hidden * model.feed_forward


_SWITCH = {"router": "switch", "expert_dropout": 0.0}

_FFN = Configuration("ffn top-1", 2, 2.0, "ffn", 1, _SWITCH, rival="dense-2")
_TRANSFORMER = Configuration("transformer top-1", 1, 4.0, "transformer", 1, _SWITCH, rival="dense-2")

CONFIGURATIONS = (
    Configuration("dense-2", 2),
    _TRANSFORMER,
    _FFN,
    Configuration("dense-3", 3),
    Configuration("transformer top-2", 1, 4.0, "transformer", 2, {"router": "glam"}, rival="dense-3"),
    Configuration("dense-5", 5),
    Configuration("transformer top-4", 1, 4.0, "transformer", 4, {"router": "product-key"}, rival="dense-5"),
    Configuration("ffn top-2", 2, 4 / 3, "ffn", 2, {"router": "glam"}, rival="dense-2"),
)
"""In the order of their worth. All but ffn top-2 have feed-forward blocks of such a size that they compute as much as
whole Transformer layers do."""


def _variant(change: str, settings: dict[str, Any], optimizer: dict[str, Any] | None = None) -> Configuration:
    return replace(
        _TRANSFORMER,
        name=f"short, {change}",
        settings=_SWITCH | settings,
        optimizer=optimizer or {},
        rival="short, transformer top-1",
        steps=1 / 3,
    )


VARIANTS = (
    replace(_TRANSFORMER, name="short, transformer top-1", rival=None, steps=1 / 3),
    _variant("experts' rate constant", {}, {"decay_updates": 0}),
    _variant("experts' rate 0.001", {}, {"learning_rate": 1e-3}),
    _variant("experts' rate 0.004", {}, {"learning_rate": 4e-3}),
    _variant("expert dropout 0.1", {"expert_dropout": 0.1}),
    _variant("balance weight 0.1", {"balance_weight": 0.1}),
    _variant("balance weight 0.001", {"balance_weight": 0.001}),
    _variant("gate scale 1", {"gate_scale": 1.0}),
    replace(_variant("glam top-2", {}), top_k=2, settings={"router": "glam"}),
    replace(_variant("product-key top-2", {}), top_k=2, settings={"router": "product-key"}),
)
"""Of one mixture, each with one thing changed, and a third of the steps. Those with top-2 compute more."""

ALL = CONFIGURATIONS + VARIANTS
