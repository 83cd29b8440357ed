"""Presets: they complete a founder's file, match what was measured, and are overridden by what a user sets."""

from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.paper import Plan
from benchmarks.recipe_configurations import CONFIGURATIONS, Size, model_flops
from dht.manifest import Manifest
from dht.presets import PRESETS as MODELS
from dht.presets import PresetName
from peer.codec import codec_of, encoded_bytes
from peer.errors import SettingsError
from trainer_client.routers import experts_for_each_row
from trainer_client.settings import PRESETS, TrainerSettings

MANIFESTS = Path(__file__).parents[2] / "deploy" / "presets"
NAMES: tuple[PresetName, ...] = ("transformer", "ffn", "paper")
MEASURED = {"ffn": "ffn top-4, fine", "transformer": "transformer top-4, half as wide"}


def founded(**values: Any) -> Manifest:
    return Manifest.founded({"name": "sauna"} | values)


def test_each_preset_has_a_model_settings_and_a_file() -> None:
    assert set(MODELS) == set(NAMES) == {path.stem for path in MANIFESTS.glob("*.toml")}
    assert set(PRESETS) == set(get_args(PresetName)) == {*NAMES, "none"}


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_fits_its_manifest(name: PresetName) -> None:
    manifest = Manifest.from_toml(MANIFESTS / f"{name}.toml")
    settings = TrainerSettings().in_swarm(manifest)
    assert settings == TrainerSettings(preset=name)
    assert experts_for_each_row(settings.router, settings.top_k, manifest) == manifest.routing.top_k == 4
    assert manifest.experts.count >= 64
    assert manifest.optimizer.learning_rate == settings.learning_rate


@pytest.mark.parametrize("name", MEASURED)
def test_a_preset_is_what_the_benchmark_trains(name: PresetName) -> None:
    """So the figures that recommend a preset are its own. Only the hidden size differs in the benchmark, and it uses no
    network.
    """
    trained = next(c for c in CONFIGURATIONS if c.name == MEASURED[name])
    model = {"layers": trained.layers, "hidden": Size().hidden}
    optimizer = {"decay_updates": Size().steps}
    manifest = founded(name="recipe", preset=name, model=model, optimizer=optimizer, wire={"codec": "fp32"})
    assert manifest.model_copy(update={"preset": "none"}) == trained.manifest(Size())
    settings = TrainerSettings(preset=name)
    assert {key: getattr(settings, key) for key in trained.settings} == trained.settings


def test_the_paper_preset_is_what_its_benchmark_trains() -> None:
    plan = Plan()
    optimizer = {"decay_updates": plan.size.steps}
    manifest = founded(name="recipe", preset="paper", optimizer=optimizer)
    assert manifest.model_copy(update={"preset": "none"}) == plan.mixture.manifest(plan.size)
    assert manifest.experts_total == 256
    assert TrainerSettings(preset="paper").router == plan.mixture.settings["router"]


def test_a_file_that_names_no_preset_has_that_of_its_experts() -> None:
    assert founded().preset == "transformer"
    assert founded(experts={"kind": "sheep"}).preset == "transformer"
    assert founded(experts={"kind": "ffn"}) == founded(preset="ffn")
    assert founded(preset="none") == Manifest(name="sauna")


def test_what_a_file_says_is_stronger_than_its_preset() -> None:
    sizes = {"hidden": 256, "heads": 8, "feed_forward": 100}
    manifest = founded(model=sizes, experts={"width": 32, "heads": 2}, wire={"codec": "bf16"})
    assert (manifest.model.feed_forward, manifest.wire.codec) == (100, "bf16")
    assert (manifest.width, manifest.experts.heads, manifest.experts.head_size) == (32, 2, 24)
    assert founded(experts={"head_size": 16}).expert_model.heads == 1


@given(
    st.sampled_from(NAMES),
    st.sampled_from([2, 3, 4, 8, 16]),
    st.integers(1, 64),
    st.none() | st.integers(4, 64).map(lambda half: 2 * half),
)
def test_sizes_follow_hidden_and_are_valid(
    name: PresetName, heads: int, half_head: int, width: int | None
) -> None:
    hidden = 2 * heads * half_head
    if hidden < 8 or (width is not None and width > hidden):
        return
    experts = {} if width is None else {"width": width}
    manifest = founded(preset=name, model={"hidden": hidden, "heads": heads}, experts=experts)
    if width is not None:
        assert manifest.width == width
        assert manifest.model.feed_forward == pytest.approx(MODELS[name].feed_forward * hidden, abs=8)
    elif MODELS[name].is_narrow:
        assert manifest.width in (hidden, *range(16, hidden, 16))
        assert manifest.width == pytest.approx(7 / 16 * hidden, abs=8 if 32 <= hidden < 256 else 32)
    else:
        assert manifest.width == hidden
    if name == "transformer":
        head_size = manifest.experts.head_size
        assert head_size == pytest.approx(hidden / 12, abs=8)
        assert manifest.experts.heads == 1
    if name != "paper":
        assert manifest.wire.codec == ("int8" if manifest.width % 16 else "int4")
    assert encoded_bytes(1, manifest.width, codec_of(manifest.wire.codec))
    assert Manifest.from_json(manifest.to_json()) == manifest


@pytest.mark.parametrize("hidden", [64, 96, 128, 192, 256, 768, 1024, 4096])
def test_experts_of_any_width_compute_as_much_as_half_as_wide_ones(hidden: int) -> None:
    model = {"hidden": hidden, "heads": 4}
    half = founded(model=model | {"feed_forward": round(19 / 12 * hidden)}, experts={"width": hidden // 2})
    most = sum(model_flops(half).values())
    assert sum(model_flops(founded(model=model)).values()) == pytest.approx(most, rel=0.02)


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_sets_what_it_says(name: PresetName) -> None:
    settings = TrainerSettings.load(preset=name).model_dump()
    assert {key: settings[key] for key in PRESETS[name]} == PRESETS[name]


def test_flags_environment_and_file_are_stronger_than_a_preset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "train.toml"
    file.write_text('preset = "ffn"\nlearning_rate = 0.7\n')
    monkeypatch.setenv("TALKOOT_TRAIN_BALANCE", "both")
    settings = TrainerSettings.load(file, warmup_steps=7, steps=None)
    assert (settings.learning_rate, settings.balance, settings.warmup_steps) == (0.7, "both", 7)
    assert settings.router == PRESETS["ffn"]["router"]


def swarm(preset: PresetName, kind: str = "ffn") -> Manifest:
    return founded(preset=preset, experts={"kind": kind, "grid": [8, 8]})


FFN = swarm("ffn")


def test_a_trainer_takes_the_swarms_preset_for_what_it_does_not_set() -> None:
    took = TrainerSettings(balance="none", threads=2).in_swarm(FFN)
    assert (took.preset, took.balance, took.threads) == ("ffn", "none", 2)
    assert took.learning_rate == PRESETS["ffn"]["learning_rate"]
    assert took.in_swarm(FFN) == took, "it has one"
    own = TrainerSettings(preset="none")
    assert own.in_swarm(FFN) == own
    assert TrainerSettings().in_swarm(swarm("none")) == TrainerSettings()


@pytest.mark.parametrize(
    ("preset", "manifest", "fits"),
    [
        ("paper", swarm("transformer", "transformer"), True),
        ("transformer", FFN, False),
        ("paper", FFN, False),
        ("ffn", swarm("transformer", "transformer"), False),
        ("ffn", swarm("none"), True),
        ("none", FFN, True),
    ],
)
def test_a_preset_for_other_experts_is_refused_with_the_one_that_fits(
    preset: PresetName, manifest: Manifest, fits: bool
) -> None:
    settings = TrainerSettings(preset=preset)
    if fits:
        assert settings.in_swarm(manifest) == settings
        return
    with pytest.raises(
        SettingsError, match=f"--preset {preset} is for .* pass --preset {manifest.preset}, or"
    ):
        settings.in_swarm(manifest)


def test_a_resumed_run_keeps_what_was_set_beside_its_preset() -> None:
    first = TrainerSettings(warmup_steps=7).in_swarm(FFN)
    resumed = TrainerSettings(steps=900).resumed(first.saved(seed=1)).in_swarm(FFN)
    assert (resumed.warmup_steps, resumed.router, resumed.steps) == (7, first.router, 900)


def test_a_run_from_before_its_swarm_had_a_preset_keeps_its_settings() -> None:
    first = TrainerSettings(learning_rate=0.5)
    resumed = TrainerSettings().resumed(first.saved(seed=1)).in_swarm(FFN)
    assert resumed.model_copy(update={"preset": None}) == first.model_copy(update={"seed": 1, "data": ()})


def validations(settings: TrainerSettings) -> list[int]:
    return [step for step in range(1, settings.steps) if settings.validates_after(step)]


@pytest.mark.parametrize(
    ("steps", "after"),
    [
        (1, []),
        (25, [10, 20]),
        (200, [19, 38, 57, 76, 95, 114, 133, 152, 171, 190]),
        (1_100, [10, *range(100, 1_100, 100)]),
        (100_000, [10, 100, 1_000, *range(9_091, 100_000, 9_091)]),
    ],
)
def test_a_run_is_validated_about_ten_times_between_and_early_if_it_is_long(
    steps: int, after: list[int]
) -> None:
    assert validations(TrainerSettings(steps=steps)) == after


def test_validations_come_as_often_as_the_trainer_says() -> None:
    assert validations(TrainerSettings(steps=5_000, validate_every=2_000)) == [2_000, 4_000]
    assert validations(TrainerSettings(steps=5_000, validate_every=0)) == []


@pytest.mark.parametrize("name", ["dense", ["ffn"]])
def test_an_unknown_preset_is_named(name: Any) -> None:
    with pytest.raises(SettingsError, match="preset must be 'transformer', 'ffn', 'paper' or 'none'"):
        TrainerSettings.load(preset=name)
