"""The manifest: what is refused, and with which message."""

import json
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from dht.manifest import MOST_KNOWN_EXPERTS, ExpertSpec, Manifest, ModelSpec, WireSpec
from dht.uid import UID
from peer import PROTOCOL_VERSION
from peer.choices import Activation, Norm
from peer.errors import SettingsError, SwarmError


@pytest.mark.parametrize("text", ["Apache-2.0", "CC-BY-SA-4.0", "MIT"])
def test_a_licence_is_an_spdx_identifier(text: str) -> None:
    assert Manifest(name="sauna", license=text).license == text


@pytest.mark.parametrize("text", ["", "MIT\nlicense: none", "<b>", "../MIT", "x" * 64, "MIT OR GPL"])
def test_anything_else_is_no_licence(text: str) -> None:
    with pytest.raises(ValidationError, match="SPDX"):
        Manifest(name="sauna", license=text)


def write(folder: Path, text: str) -> Path:
    path = folder / "swarm.toml"
    path.write_text(text, encoding="utf-8")
    return path


def manifests() -> st.SearchStrategy[Manifest]:
    grids = st.lists(st.integers(1, 32), min_size=1, max_size=4).map(tuple)
    heads = st.integers(1, 8)
    models = st.builds(
        lambda layers, heads, pairs, seed, norm, activation: ModelSpec(
            layers=sum(layers),
            causal=(False,) * layers[0] + (True,) * layers[1] if layers[0] else (),
            heads=heads,
            hidden=2 * heads * pairs,
            seed=seed,
            norm=norm,
            activation=activation,
        ),
        layers=st.tuples(st.integers(0, 32), st.integers(1, 32)),
        heads=heads,
        pairs=st.integers(4, 16),
        seed=st.integers(0, 2**63 - 1),
        norm=st.sampled_from(get_args(Norm)),
        activation=st.sampled_from(get_args(Activation)),
    )
    return st.builds(
        lambda name, model, grid: Manifest.model_validate(
            {"name": name, "model": model, "experts": {"grid": grid}, "routing": {"top_k": 1}}
        ),
        name=st.from_regex(r"[a-z0-9][a-z0-9-]{0,30}[a-z0-9]", fullmatch=True),
        model=models,
        grid=grids,
    )


@given(manifests())
def test_json_gives_back_the_same_manifest(manifest: Manifest) -> None:
    assert Manifest.from_json(manifest.to_json()) == manifest
    assert Manifest.from_json(manifest.to_json()).to_json() == manifest.to_json()


@given(
    manifests(),
    st.none() | st.integers(4, 128).map(lambda pairs: 2 * pairs),
    st.none() | st.integers(1, 16),
    st.none() | st.integers(1, 16).map(lambda pairs: 2 * pairs),
    st.none() | st.integers(8, 64),
)
def test_experts_are_built_from_a_model_of_their_own_sizes(
    manifest: Manifest, width: int | None, heads: int | None, head_size: int | None, feed_forward: int | None
) -> None:
    """Whatever a manifest accepts gives a valid model, for other packages' expert kinds too."""
    sizes = {"width": width, "heads": heads, "head_size": head_size, "feed_forward": feed_forward}
    values = manifest.model_dump()
    try:
        narrow = Manifest.model_validate(values | {"experts": values["experts"] | sizes})
    except ValidationError:
        columns = width or manifest.model.hidden
        wide = columns > manifest.model.hidden
        assert wide or (heads and not head_size and columns % (2 * heads))
        return
    model = narrow.expert_model
    assert ModelSpec.model_validate(model.model_dump()) == model
    assert (model.hidden, narrow.width) == (width or manifest.model.hidden,) * 2
    assert model.feed_forward == (feed_forward or manifest.model.feed_forward)
    assert model.head_size == head_size
    assert model.heads == heads or (heads is None and model.heads <= manifest.model.heads)
    assert model.seed == manifest.model.seed
    assert Manifest.from_json(narrow.to_json()) == narrow


@given(manifests())
def test_json_names_what_differs_from_the_defaults(manifest: Manifest) -> None:
    """A release that knows more keys must publish manifests that earlier ones can read, and recognize their checkpoints
    by it.
    """
    values = json.loads(manifest.to_json())
    assert {"name", "protocol_version"} <= set(values)
    kinds: tuple[tuple[str, BaseModel], ...] = (("model", ModelSpec()), ("experts", ExpertSpec()))
    for part, defaults in kinds:
        for key, value in values.get(part, {}).items():
            assert json.loads(defaults.model_dump_json())[key] != value


def test_a_manifest_without_an_encoder_has_the_bytes_that_it_had_before_there_were_encoders() -> None:
    text = f'{{"name": "sauna", "protocol_version": {PROTOCOL_VERSION}, "model": {{"layers": 3}}}}'
    assert Manifest(name="sauna", model=ModelSpec(layers=3)).to_json() == text.encode()


def test_each_layer_says_whether_it_is_causal(tmp_path: Path) -> None:
    text = 'name = "sauna"\n[model]\nlayers = 3\ncausal = [false, true, true]\n'
    model = Manifest.from_toml(write(tmp_path, text)).model
    assert model.encoder_layers == 1
    assert [model.is_causal(layer) for layer in range(3)] == [False, True, True]
    for causal in ((), (True, True, True)):
        plain = ModelSpec(layers=3, causal=causal)
        assert plain.encoder_layers == 0
        assert all(map(plain.is_causal, range(3)))


def test_toml_gives_what_it_says_and_defaults_for_the_rest(tmp_path: Path) -> None:
    text = 'name = "sauna"\npreset = "none"\n[model]\nlayers = 3\n[experts]\ngrid = [8, 16]\n[routing]\ntop_k = 2\n'
    manifest = Manifest.from_toml(write(tmp_path, text))
    assert manifest.name == "sauna"
    assert manifest.model.layers == 3
    assert manifest.experts.grid == (8, 16)
    assert manifest.routing.top_k == 2
    assert manifest.protocol_version == PROTOCOL_VERSION
    assert manifest.model.hidden == ModelSpec.model_fields["hidden"].default
    assert manifest.wire == WireSpec()


def test_toml_without_a_preset_is_completed_by_that_of_its_experts(tmp_path: Path) -> None:
    manifest = Manifest.from_toml(write(tmp_path, 'name = "sauna"\n[model]\nhidden = 1024\nheads = 16\n'))
    assert (manifest.preset, manifest.experts.grid, manifest.routing.top_k) == ("transformer", (8, 8), 4)
    assert (manifest.width, manifest.experts.heads, manifest.wire.codec) == (448, 1, "int4")
    kind = Manifest.from_toml(write(tmp_path, 'name = "sauna"\n[experts]\nkind = "ffn"\n'))
    assert (kind.preset, kind.width, kind.model.feed_forward) == ("ffn", 128, 128)
    assert Manifest.from_json(kind.to_json()) == kind


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "name"),
        ('name = "A"', "name"),
        ('name = "sauna\\n"', "name"),
        ('name = "sauna"\ncolour = 1', "unknown setting 'colour'"),
        (
            'name = "sauna"\n[model]\nlayer = 2',
            "unknown setting 'model.layer' (did you mean model.layers?)",
        ),
        ('name = "Sauna!"', "name: small letters, digits and '-'"),
        ('name = "sauna"\n[model]\nlayers = 0', "model.layers"),
        ('name = "sauna"\n[model]\nlayers = "two"', "model.layers"),
        ('name = "sauna"\n[model]\ncausal = [true]', "causal has 1 value for 2 layers"),
        ('name = "sauna"\n[model]\ncausal = [true, false]', "the encoder, which comes first"),
        ('name = "sauna"\n[model]\ncausal = [false, false]', "no layer is left for the decoder"),
        ('name = "sauna"\n[model]\ncausal = false', "model.causal"),
        ('name = "sauna"\n[model]\ncausal = [false, "so"]', "model.causal.1"),
        (
            'name = "sauna"\n[model]\ncausal = [false, true]\ncontext = 15',
            "context must be 16 or more, not 15",
        ),
        (
            'name = "sauna"\n[model]\ncausal = [false, true]\n[routing]\nprefix = 2',
            "prefix must be 0 where the model has an encoder",
        ),
        (
            'name = "sauna"\n[routing]\nprefix = 128',
            "prefix (128) must be less than the model's context (128)",
        ),
        (
            'name = "sauna"\n[routing]\ngate_width = 129',
            "gate_width (129) is more than the model's hidden size (128)",
        ),
        ('name = "sauna"\n[routing]\ngate_width = 0', "routing.gate_width"),
        (
            'name = "sauna"\n[routing]\nproduct_keys = false\n[experts]\ngrid = [64, 33]',
            "product_keys = false allows at most 4096 experts in all layers; the grid and the layers make 4224",
        ),
        ('name = "sauna"\n[model]\nhidden = 100\nheads = 3', "hidden (100)"),
        ('name = "sauna"\n[model]\nhead_size = 15', "head_size (15) must be even"),
        (
            'name = "sauna"\n[experts]\nwidth = 256',
            "the experts' width (256) is more than the model's hidden size (128)",
        ),
        ('name = "sauna"\n[experts]\nwidth = 33', "the experts' width (33) must be even"),
        ('name = "sauna"\n[experts]\nwidth = 4', "experts.width must be"),
        (
            'name = "sauna"\npreset = "none"\n[experts]\nwidth = 32\nheads = 3',
            "the experts' width (32) must be an even multiple of heads (3), unless head_size is set",
        ),
        (
            'name = "sauna"\n[experts]\nheads = 128',
            "the experts' width (128) must be an even multiple of heads",
        ),
        ('name = "sauna"\n[experts]\nhead_size = 9', "head_size (9) must be even"),
        ('name = "sauna"\n[experts]\nfeed_forward = 0', "experts.feed_forward"),
        ('name = "sauna"\n[model]\nlocal = "ffn"', "model.local must be 'layer' or 'attention'"),
        ('name = "sauna"\n[model]\nnorm = "batch"', "model.norm must be 'layer' or 'rms'"),
        ('name = "sauna"\n[model]\nactivation = "relu"', "model.activation must be 'gelu', "),
        ('name = "sauna"\n[wire]\ncodec = "int2"', "wire.codec must be 'fp32', "),
        (
            'name = "sauna"\n[model]\nhidden = 72\n[wire]\ncodec = "int4"',
            "int4 needs a width that is a multiple of 16, but it is 72",
        ),
        ('name = "sauna"\npreset = "best"', "preset must be 'transformer', 'ffn', 'paper' or 'none'"),
        ('name = "sauna"\npreset = ["ffn"]', "preset must be 'transformer', 'ffn', 'paper' or 'none'"),
        ('name = "sauna"\nexperts = "ffn"', "experts must be a table"),
        ('name = "sauna"\n[experts]\ngrid = []', "experts.grid"),
        ('name = "sauna"\n[experts]\ngrid = [4, 0]', "experts.grid.1"),
        ('name = "sauna"\n[experts]\ngrid = [4096, 4096]', "at most 1048576"),
        ('name = "sauna"\n[experts]\nkind = "no kind"', "experts.kind"),
        ('name = "sauna"\n[optimizer]\nlearning_rate = nan', "optimizer.learning_rate"),
        ('name = "sauna"\n[optimizer]\nclip_norm = inf', "optimizer.clip_norm"),
        ('name = "sauna"\n[optimizer]\nname = "lion"', "optimizer.name"),
        ('name = "sauna"\n[optimizer]\nname = "sgd"\nmomentum = 1', "optimizer.momentum"),
        ('name = "sauna"\n[optimizer]\nmomentum = 0.5', "momentum is for sgd, and the optimizer is adamw"),
        ('name = "sauna"\n[optimizer]\nguard_factor = 1', "optimizer.guard_factor"),
    ],
)
def test_a_wrong_file_is_refused_with_its_key_named(tmp_path: Path, text: str, named: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(SettingsError) as caught:
        Manifest.from_toml(path)
    message = str(caught.value)
    assert named in message
    assert str(path) in message
    assert "\n" not in message


def test_as_many_experts_as_trainers_know_may_have_scores_of_their_own(tmp_path: Path) -> None:
    text = 'name = "sauna"\n[experts]\ngrid = [64, 32]\n[routing]\nproduct_keys = false'
    manifest = Manifest.from_toml(write(tmp_path, text))
    assert manifest.experts_total == MOST_KNOWN_EXPERTS
    assert manifest.score_sizes == (2048,)


@pytest.mark.parametrize("content", [b"name = ", b'name = "\xff"'])
def test_a_file_that_does_not_parse_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "swarm.toml"
    path.write_bytes(content)
    with pytest.raises(SettingsError, match=r"swarm\.toml is not a TOML file"):
        Manifest.from_toml(path)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"no file .*absent\.toml"):
        Manifest.from_toml(tmp_path / "absent.toml")
    with pytest.raises(SettingsError, match="can't read"):
        Manifest.from_toml(tmp_path)


@pytest.mark.parametrize(("version", "remedy"), [(7, "update Talkoot"), (0, "founder to update")])
def test_another_protocol_version_is_refused_naming_both(version: int, remedy: str) -> None:
    later = json.dumps({"name": "sauna", "protocol_version": version, "invented_later": True}).encode()
    with pytest.raises(SwarmError, match=remedy) as caught:
        Manifest.from_json(later)
    assert f"version {version}" in str(caught.value)
    assert str(PROTOCOL_VERSION) in str(caught.value)


def test_a_file_of_another_protocol_version_is_refused_naming_both(tmp_path: Path) -> None:
    path = write(tmp_path, 'name = "sauna"\nprotocol_version = 7\ninvented_later = true\n')
    with pytest.raises(SwarmError, match=f"version 7.*{PROTOCOL_VERSION}"):
        Manifest.from_toml(path)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"{}",
        b'{"protocol_version": "x"}',
        b'{"protocol_version": %d}' % PROTOCOL_VERSION,
        b"\xff",
    ],
)
def test_json_that_is_no_manifest_is_refused(text: bytes) -> None:
    with pytest.raises(SwarmError, match="not valid"):
        Manifest.from_json(text)


@given(st.binary(max_size=200))
def test_hostile_json_raises_nothing_but_swarm_error(text: bytes) -> None:
    with pytest.raises(SwarmError):
        Manifest.from_json(text)


@given(manifests().filter(lambda manifest: manifest.experts_total <= 2000))
def test_uids_are_every_expert_once_and_all_lie_on_the_grid(manifest: Manifest) -> None:
    uids = manifest.uids()
    assert len(uids) == len(set(uids)) == manifest.experts_total
    assert uids == sorted(uids)
    assert all(manifest.holds(uid) for uid in uids)


@pytest.mark.parametrize(
    "uid", [UID(2, (0, 0)), UID(0, (4, 0)), UID(0, (0, 5)), UID(0, (0,)), UID(0, (0, 0, 0)), UID(-1, (0, 0))]
)
def test_a_uid_off_the_grid_is_not_held(uid: UID) -> None:
    manifest = Manifest.model_validate(
        {"name": "sauna", "model": {"layers": 2}, "experts": ExpertSpec.model_validate({"grid": (4, 5)})}
    )
    assert not manifest.holds(uid)
    assert manifest.holds(UID(1, (3, 4)))


def test_more_experts_per_token_than_a_layer_has_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "swarm.toml"
    path.write_text('name = "few"\n[experts]\ngrid = [3, 1]\n[routing]\ntop_k = 4\n', encoding="utf-8")
    with pytest.raises(SettingsError, match=r"top_k \(4\) is more than a layer's 3 experts"):
        Manifest.from_toml(path)


def test_a_key_that_this_release_does_not_know_is_refused_with_what_to_do() -> None:
    values = json.loads(Manifest(name="sauna").to_json()) | {"colour": "red"}
    with pytest.raises(SwarmError, match=r"unknown setting 'colour'.*a later Talkoot.*update"):
        Manifest.from_json(json.dumps(values).encode())


def test_a_manifest_of_the_old_kind_means_the_same_model() -> None:
    """Such a manifest is from before norms, local parts and the experts' own sizes could be chosen."""
    values = Manifest(name="sauna").model_dump(mode="json")
    for key in ("norm", "activation", "local", "head_size", "shared_feed_forward"):
        del values["model"][key]
    for key in ("width", "heads", "head_size", "feed_forward"):
        del values["experts"][key]
    manifest = Manifest.from_json(json.dumps(values).encode())
    assert manifest == Manifest(name="sauna")
    assert (manifest.model.norm, manifest.model.activation, manifest.model.local) == (
        "layer",
        "gelu",
        "layer",
    )
    assert manifest.width == manifest.model.hidden
    assert manifest.expert_model == manifest.model


def test_the_example_manifest_says_the_defaults() -> None:
    path = Path(__file__).parents[2] / "deploy" / "swarm.toml"
    assert Manifest.from_toml(path) == Manifest.founded({"name": "demo"})
    named = path.read_text(encoding="utf-8")
    assert all(f"{key} = " in named for key in ModelSpec.model_fields)
