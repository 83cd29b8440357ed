"""Presets: weaker than whatever a person sets, and fitting to the manifests that go with them."""

from pathlib import Path
from typing import get_args

import pytest

from benchmarks.recipe_configurations import CONFIGURATIONS, Size
from dht.manifest import Manifest
from peer.errors import SettingsError
from trainer_client.routers import experts_for_each_row
from trainer_client.settings import PRESETS, PresetName, TrainerSettings

MANIFESTS = Path(__file__).parents[2] / "deploy" / "presets"


def test_each_kind_has_a_preset_and_a_manifest() -> None:
    assert set(PRESETS) == set(get_args(PresetName))
    assert {path.stem for path in MANIFESTS.glob("*.toml")} == set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_fits_its_manifest(name: PresetName) -> None:
    manifest = Manifest.from_toml(MANIFESTS / f"{name}.toml")
    settings = TrainerSettings(preset=name)
    assert manifest.experts.kind == name
    k = experts_for_each_row(settings.router, settings.top_k, manifest)
    assert k == manifest.routing.top_k
    assert manifest.optimizer.learning_rate == settings.learning_rate


@pytest.mark.parametrize(
    ("name", "configuration"), [("ffn", "ffn top-1"), ("transformer", "transformer top-1, thin")]
)
def test_a_preset_is_what_the_benchmark_trains(name: PresetName, configuration: str) -> None:
    """So the figures that recommend it are its own."""
    trained = next(c for c in CONFIGURATIONS if c.name == configuration)
    manifest, size = Manifest.from_toml(MANIFESTS / f"{name}.toml"), Size()
    assert manifest.model_copy(update={"name": "recipe"}) == trained.manifest(size)
    settings = TrainerSettings(preset=name)
    assert {key: getattr(settings, key) for key in trained.settings} == trained.settings


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_sets_what_it_says(name: PresetName) -> None:
    settings = TrainerSettings.load(preset=name).model_dump()
    assert {key: settings[key] for key in PRESETS[name]} == PRESETS[name]


def test_flags_environment_and_file_are_stronger_than_a_preset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "train.toml"
    file.write_text('preset = "ffn"\ngate_scale = 0.7\n')
    monkeypatch.setenv("TALKOOT_TRAIN_BALANCE_WEIGHT", "0.3")
    settings = TrainerSettings.load(file, expert_dropout=0.2, steps=None)
    assert (settings.gate_scale, settings.balance_weight, settings.expert_dropout) == (0.7, 0.3, 0.2)
    assert settings.router == PRESETS["ffn"]["router"]


def test_a_resumed_run_keeps_what_was_set_beside_its_preset() -> None:
    first = TrainerSettings(preset="ffn", gate_scale=0.7)
    resumed = TrainerSettings(steps=900).resumed(first.saved(seed=1))
    assert (resumed.gate_scale, resumed.router, resumed.steps) == (0.7, first.router, 900)


def test_an_unknown_preset_is_named() -> None:
    with pytest.raises(SettingsError, match="preset: must be 'transformer' or 'ffn'"):
        TrainerSettings.load(preset="dense")
