"""Kinds of experts: Talkoot's own, and those of other packages."""

from pathlib import Path
from typing import get_args

import pytest
import torch
from attending import attend
from torch import nn

from dht.manifest import ExpertSpec, Manifest, ModelSpec
from dht.uid import UID
from expert_server.blocks import build_block, builder_of, read_manifest, require_kind
from peer.choices import Activation, Norm
from peer.errors import InstallationError, SettingsError
from peer.layers import TransformerLayer


class Doubling(nn.Module):
    """The kind that the test's package offers."""

    def __init__(self, model: ModelSpec) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((model.hidden,), 2.0))

    def forward(self, x_RD: torch.Tensor, lengths_S: torch.Tensor, positions_R: torch.Tensor) -> torch.Tensor:
        return x_RD * self.scale


@pytest.mark.parametrize("norm", get_args(Norm))
@pytest.mark.parametrize("activation", get_args(Activation))
def test_an_ffn_expert_treats_every_row_by_itself(norm: Norm, activation: Activation) -> None:
    block = builder_of("ffn")(ModelSpec(hidden=8, heads=1, feed_forward=16, norm=norm, activation=activation))
    x_RD = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    whole = block(x_RD, torch.tensor([5]), torch.arange(5))
    alone = torch.cat([block(row, torch.tensor([1]), torch.tensor([0])) for row in torch.split(x_RD, 1)])
    torch.testing.assert_close(whole, alone)


def test_a_transformer_expert_starts_as_one_and_learns_to_attend() -> None:
    block = builder_of("transformer")(ModelSpec(hidden=8, heads=1, feed_forward=16))
    x_RD = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    together, alone = torch.tensor([5]), torch.ones(5, dtype=torch.int64)
    whole = block(x_RD, together, torch.arange(5))
    torch.testing.assert_close(whole, block(x_RD, alone, torch.arange(5)))
    torch.autograd.backward(whole.square().sum())
    torch.optim.SGD(block.parameters(), 0.1).step()
    whole = block(x_RD, together, torch.arange(5))
    assert not torch.allclose(whole, block(x_RD, alone, torch.arange(5)))


def test_in_an_encoders_layers_a_transformer_expert_sees_later_rows_too() -> None:
    model = ModelSpec(layers=2, causal=(False, True), hidden=8, heads=1, feed_forward=16)
    manifest = Manifest(name="sauna", model=model)
    x_RD = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    changed_RD = x_RD.clone()
    changed_RD[4] += 1
    changes = []
    for layer in range(2):
        block = attend(build_block(manifest, UID(layer, (0, 0))))
        before, after = (block(x, torch.tensor([5]), torch.arange(5)) for x in (x_RD, changed_RD))
        changes.append((before != after).any(dim=1).tolist())
    assert changes == [[True] * 5, [False] * 4 + [True]]


@pytest.mark.parametrize("kind", ["transformer", "ffn"])
def test_the_manifest_chooses_norm_and_activation(kind: str) -> None:
    block = builder_of(kind)(ModelSpec(hidden=8, heads=1, feed_forward=16, norm="rms", activation="swiglu"))
    modules = [type(module) for module in block.modules()]
    assert modules.count(nn.RMSNorm) == (2 if kind == "transformer" else 1)
    assert nn.SiLU in modules
    assert not {nn.LayerNorm, nn.GELU} & set(modules)
    if isinstance(block, TransformerLayer):
        assert block.state_dict()["feed_forward.0.weight"].shape == (32, 8)


@pytest.mark.parametrize("kind", ["transformer", "ffn"])
def test_an_expert_has_the_manifests_sizes(kind: str) -> None:
    sizes = {"width": 16, "heads": 1, "head_size": 6, "feed_forward": 24}
    manifest = Manifest.model_validate({"name": "sauna", "experts": {"kind": kind, **sizes}})
    shapes = {tuple(tensor.shape) for tensor in build_block(manifest, UID(0, (0, 0))).state_dict().values()}
    feed_forward = {(16,), (24, 16), (24,), (16, 24)}
    assert shapes == feed_forward | ({(18, 16), (16, 6)} if kind == "transformer" else set())


def test_a_kind_comes_from_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "doubling-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: doubling\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text(
        f"[talkoot.expert_kinds]\ndoubling = {Doubling.__module__}:Doubling\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    block = builder_of("doubling")(ModelSpec(hidden=8, heads=1))
    assert isinstance(block, Doubling)
    experts = ExpertSpec(kind="doubling")
    require_kind(Manifest(name="sauna", experts=experts))
    encoder = ModelSpec(causal=(False, True))
    with pytest.raises(SettingsError, match=r"kind 'doubling', which works only in causal layers"):
        require_kind(Manifest(name="sauna", experts=experts, model=encoder))
    require_kind(Manifest(name="sauna", model=encoder))


def test_a_kind_that_is_not_installed_is_named() -> None:
    with pytest.raises(
        InstallationError, match=r"kind 'lstm', which is not installed here \(installed: ffn, "
    ):
        builder_of("lstm")


def test_a_founder_who_misspells_a_kind_is_told_the_file_and_the_key(tmp_path: Path) -> None:
    file = tmp_path / "swarm.toml"
    file.write_text('name = "sauna"\n[experts]\nkind = "fnn"\n')
    with pytest.raises(
        SettingsError, match=r"swarm\.toml: experts\.kind must be ffn or .* not 'fnn', unless"
    ):
        read_manifest(file)
