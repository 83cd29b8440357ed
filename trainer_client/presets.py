"""Presets: what a trainer sets for each kind of experts, as `benchmarks.recipe` found it (docs/recipe.md).

The manifests that go with them are in deploy/presets/. What a person sets is stronger than a preset.
"""

from collections.abc import Mapping
from typing import Any, Literal

PresetName = Literal["transformer", "ffn"]

_ONE_EXPERT: dict[str, Any] = {
    "router": "switch",
    "balance_weight": 0.01,
    "gate_scale": 0.1,
    # no text was seen twice, so nothing was learned by heart
    "expert_dropout": 0.0,
    "learning_rate": 2e-3,
    "warmup_steps": 20,
}

PRESETS: dict[PresetName, dict[str, Any]] = {"transformer": _ONE_EXPERT, "ffn": _ONE_EXPERT}


def with_preset(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values, and those of the preset that they name where they have none. An unknown name is left as it is."""
    preset = PRESETS.get(values.get("preset"))  # type: ignore[arg-type]  # whatever was given
    return dict(values) if preset is None else {**preset, **values}
