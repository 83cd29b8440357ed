"""`talkoot import`: a new swarm starts from a model folder."""

import json
import re
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from commands import run_here
from expert_fakes import make_manifest
from model_folders import RandomModel, change_json, change_weights
from node_process import started
from safetensors.torch import load_file
from training_swarm import talkoot

from dht.invites import Invite
from dht.manifest import AdmissionSpec, Manifest, OptimizerSpec
from dht.records import SwarmKeys
from expert_server.state.checkpoints import CheckpointStore
from peer.errors import ModelError, StartError, UserError
from peer.files import StateFolder
from peer.identity import Identity
from peer.transport.addresses import Multiaddress
from peer.transport.endpoints import Endpoint
from talkoot.model.folder import ModelFolder
from talkoot.model.founding import ImportPlan, import_model
from talkoot.model.opened import open_model
from talkoot.model.upcycling import grown_gate
from talkoot.node.invites import FoundedSwarm
from talkoot.train.local import LocalSwarm
from trainer_client.data.tokenizer import BytePairTokenizer, Tokenizer, load_tokenizer
from trainer_client.inference import evaluate
from trainer_client.model import LanguageModel
from trainer_client.moe import RemoteMixtureOfExperts, rebalance
from trainer_client.settings import TrainerSettings
from trainer_client.training.checkpoints import load_checkpoint

MANIFEST = make_manifest((2, 2), k=2, layers=2, hidden=16, width=8, feed_forward=16)
TEXT = "In the sauna one must behave as in church. " * 10


def imported(folder: Path, work: Path, **given: Any) -> dict[str, Any]:
    given = {"manifest_file": work / "swarm.toml", **given}
    plan = ImportPlan(folder, node_state=work / "node", trainer_state=work / "trainer", **given)
    return import_model(ModelFolder.open(folder), plan, lambda text: None)


def as_started(values: dict[str, Any]) -> tuple[LanguageModel, Tokenizer]:
    """The model and tokenizer of a trainer and a node that start from what was written."""
    manifest = Manifest.from_toml(Path(values["manifest"]))
    state = Path(values["node_state"])
    keys = SwarmKeys(manifest.name, Identity.load_or_create(state / "identity.key").peer_id)
    checkpoint = load_checkpoint(Path(values["checkpoint"]), keys.swarm_id)
    checkpoint.check_manifest(manifest)
    swarm = LocalSwarm(manifest, TrainerSettings().resumed(checkpoint.header.settings))
    swarm.routing = replace(swarm.routing, nodes_per_token=None)  # as in a folder
    store = CheckpointStore(state / "checkpoints", keys.swarm_id, manifest, 1)
    for uid, expert in swarm.dispatcher.experts.items():
        saved = store.load_newest(uid)
        assert saved is not None
        # others take it too
        expert.import_state(saved.state, saved.update_count, source="QmOther")
    tokenizer = load_tokenizer(checkpoint.header.tokenizer)
    model = LanguageModel(manifest, swarm.mixture, len(tokenizer.token_bytes))
    checkpoint.load_into(model)
    return model, tokenizer


def loss_of(model: LanguageModel, tokenizer: Tokenizer) -> float:
    return evaluate(model, tokenizer.encode(TEXT), tokenizer.token_bytes, 4).loss


MODELS = {
    "narrow": MANIFEST,
    "ffn": make_manifest((3,), k=2, kind="ffn", norm="rms", shared_feed_forward=16),
    "prefix": make_manifest((2, 2), k=2, prefix=3),
    "token": make_manifest((2,)).model_copy(
        update={"admission": AdmissionSpec(mode="token", export=("trainer", "reader")), "license": "CC-BY-SA-4.0"}
    ),
    "sgd": make_manifest((2,)).model_copy(update={"optimizer": OptimizerSpec(name="sgd", momentum=0)}),
    "preset": Manifest.founded(
        {
            "name": "sauna", "preset": "transformer", "experts": {"grid": [2, 2]},
            "model": {"hidden": 32, "heads": 2, "context": 16}, "wire": {"codec": "fp32"},
        }
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_loss_after_an_import_is_that_of_the_folder(name: str, tmp_path: Path) -> None:
    folder = RandomModel(MODELS[name]).write(tmp_path / "model")
    values = imported(folder, tmp_path)
    opened = open_model(folder)
    expected = loss_of(opened.model, opened.tokenizer)
    assert loss_of(*as_started(values)) == pytest.approx(expected, rel=1e-6)
    assert Manifest.from_toml(tmp_path / "swarm.toml") == MODELS[name]


@pytest.mark.parametrize(
    ("name", "said"),
    [("token", "talkoot invite --role trainer --state"), ("ffn", "the invite that the node shows")],
)
def test_the_invite_that_it_names_lets_people_train(name: str, said: str, tmp_path: Path) -> None:
    folder = RandomModel(MODELS[name]).write(tmp_path / "model")
    out = ("-o", str(tmp_path / "swarm.toml"), "--state", str(tmp_path / "n"))
    made = run_here("import", str(folder), *out, "--trainer-state", str(tmp_path / "t"))
    assert made.returncode == 0, made.stderr
    assert said in " ".join(made.stdout.split())


def test_progress_takes_at_most_ten_lines_of_a_log(tmp_path: Path) -> None:
    manifest = make_manifest((4, 4), k=2, layers=2, hidden=16, width=8, feed_forward=16)
    folder = RandomModel(manifest).write(tmp_path / "model")
    said: list[str] = []
    plan = ImportPlan(
        folder, tmp_path / "swarm.toml", node_state=tmp_path / "n", trainer_state=tmp_path / "t"
    )
    import_model(ModelFolder.open(folder), plan, said.append)
    assert said == [
        *(f"writing experts: {percent}%" for percent in range(0, 100, 10)),
        "writing the dense part",
    ]


def test_tokenizer_router_and_balance_are_the_folders(tmp_path: Path) -> None:
    tokenizer = BytePairTokenizer.learn([TEXT], len(TEXT), 280)
    folder = RandomModel(MANIFEST, tokenizer, router="switch", balance="both").write(tmp_path / "model")
    values = imported(folder, tmp_path)
    model, found = as_started(values)
    assert found.to_json() == tokenizer.to_json()
    opened = open_model(folder)
    assert loss_of(model, found) == pytest.approx(loss_of(opened.model, tokenizer), rel=1e-6)


def test_rules_that_were_edited_in_the_folder_are_those_of_the_new_swarm(tmp_path: Path) -> None:
    folder = RandomModel(MANIFEST).write(tmp_path / "model")
    manifest = MANIFEST.model_dump(mode="json") | {"license": "MIT", "admission": {"mode": "token"}}
    manifest["optimizer"] |= {"learning_rate": 0.5}
    change_json(folder / "config.json", manifest=manifest)
    values = imported(folder, tmp_path)
    model, tokenizer = as_started(values)
    assert loss_of(model, tokenizer) == pytest.approx(loss_of(open_model(folder).model, tokenizer), rel=1e-5)
    founded = Manifest.from_toml(Path(values["manifest"]))
    assert (founded.license, founded.admission.mode, founded.optimizer.learning_rate) == ("MIT", "token", 0.5)


def test_a_manifest_that_its_preset_would_complete_otherwise_loses_the_preset(tmp_path: Path) -> None:
    manifest = MANIFEST.model_copy(update={"preset": "paper"})
    values = imported(RandomModel(manifest).write(tmp_path / "model"), tmp_path)
    found = Manifest.from_toml(tmp_path / "swarm.toml")
    assert found in (manifest, MANIFEST)
    assert as_started(values)


def test_parameters_larger_than_first_ones_are_taken_by_other_nodes(tmp_path: Path) -> None:
    folder = RandomModel(MANIFEST).write(tmp_path / "model")
    path = folder / "model-00002-of-00003.safetensors"
    tensors = {name: 20 * tensor for name, tensor in load_file(path).items()}
    change_weights(path, tensors)
    model, tokenizer = as_started(imported(folder, tmp_path))
    assert loss_of(model, tokenizer) == pytest.approx(loss_of(open_model(folder).model, tokenizer), rel=1e-6)


def test_missing_experts_a_file_in_the_way_and_a_founded_swarm_are_refused(tmp_path: Path) -> None:
    lacking = RandomModel(MANIFEST, missing=["1.0.1"]).write(tmp_path / "lacking")
    with pytest.raises(UserError, match=r"lacks 1 expert, such as 1\.0\.1"):
        imported(lacking, tmp_path)
    folder = RandomModel(MANIFEST).write(tmp_path / "model")
    with pytest.raises(UserError, match="--name: name: small letters"):
        imported(folder, tmp_path, name="Ä")
    values = imported(folder, tmp_path, name="kiuas")
    with pytest.raises(UserError, match=r"swarm\.toml exists"):
        imported(folder, tmp_path)
    (tmp_path / "swarm.toml").unlink()
    assert as_started(imported(folder, tmp_path, name="kiuas"))
    (tmp_path / "swarm.toml").unlink()
    keys = SwarmKeys("kiuas", Identity.load_or_create(Path(values["node_state"]) / "identity.key").peer_id)
    record = Path(values["node_state"]) / "manifests" / keys.swarm_id
    record.parent.mkdir()
    record.write_bytes(b"signed")
    with pytest.raises(UserError, match="has already founded a swarm kiuas"):
        imported(folder, tmp_path, name="kiuas")
    invite = Invite(keys, (Multiaddress.of(Endpoint.of("192.0.2.7", 31337), keys.author),))
    FoundedSwarm(invite=str(invite), admission="open").save(Path(values["node_state"]))
    with (
        closing(
            StateFolder(Path(values["node_state"]))
        ),  # its node may run, and stopping that would not help
        pytest.raises(UserError, match=r"you founded the swarm 'kiuas' with .* to found 'loyly'"),
    ):
        imported(folder, tmp_path, name="loyly")


def test_an_error_about_a_state_folder_names_its_option(tmp_path: Path) -> None:
    folder = RandomModel(MANIFEST).write(tmp_path / "model")
    with (
        closing(StateFolder(tmp_path / "trainer")),
        pytest.raises(UserError, match=r"another --trainer-state$"),
    ):
        imported(folder, tmp_path)
    with closing(StateFolder(tmp_path / "node")), pytest.raises(UserError, match=r"another --state$"):
        imported(folder, tmp_path)


def test_one_folder_for_the_node_and_the_trainer_is_refused_before_it_is_made(tmp_path: Path) -> None:
    """The lock's error would name another process, which does not exist."""
    folder = RandomModel(MANIFEST).write(tmp_path / "model")
    both = tmp_path / "both"
    plan = ImportPlan(
        folder, tmp_path / "swarm.toml", node_state=both, trainer_state=tmp_path / "x" / ".." / "both"
    )
    with pytest.raises(UserError, match="one as --state and one as --trainer-state"):
        import_model(ModelFolder.open(folder), plan, lambda text: None)
    assert not both.exists()


def test_the_manifests_folder_is_made_and_if_it_cannot_be_written_nothing_begins(tmp_path: Path) -> None:
    folder = RandomModel(MANIFEST).write(tmp_path / "model")
    (tmp_path / "file").write_text("in the way")
    out = tmp_path / "file" / "swarm.toml"
    with pytest.raises(StartError, match=re.escape(f"can't write {out}: ") + ".*; pass another --out FILE"):
        imported(folder, tmp_path, manifest_file=out)
    assert not (tmp_path / "node" / "checkpoints").exists()
    out = tmp_path / "new" / "folder" / "swarm.toml"
    imported(folder, tmp_path, manifest_file=out)
    assert Manifest.from_toml(out) == MANIFEST


def test_a_model_that_does_not_fit_into_memory_is_refused_before_any_of_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest's author chooses its size, and a file of zeros takes no disk."""
    folder = RandomModel(MANIFEST).write(tmp_path / "model")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=5000))
    with pytest.raises(ModelError, match="but only 5 kB of memory are free"):
        imported(folder, tmp_path)
    assert not (tmp_path / "node").exists()


def test_a_full_disk_leaves_no_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RandomModel(MANIFEST).write(tmp_path / "model")

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("peer.checkpoints.write_atomically", full)
    with pytest.raises(UserError, match="No space left on device"):
        imported(folder, tmp_path)
    assert not (tmp_path / "swarm.toml").exists()


def test_commands_found_the_swarm_evaluate_as_the_folder_and_train_on(tmp_path: Path) -> None:
    folder = RandomModel(MANIFEST).write(tmp_path / "model")
    opened = open_model(folder)
    expected = loss_of(opened.model, opened.tokenizer)
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    state, trainer = tmp_path / "node" / "state", tmp_path / "trainer"
    state.parent.mkdir()
    toml = tmp_path / "swarm.toml"
    made = run_here(
        "import", str(folder), "-o", str(toml), "--state", str(state), "--trainer-state", str(trainer)
    )
    assert made.returncode == 0, made.stderr
    assert f"talkoot node --new {toml}" in made.stdout.replace("\n", "")
    with started(state.parent, toml.read_text(), p2pd="off") as node:
        joined = ["--join", str(node.invite), "--state", str(trainer)]
        found = talkoot("evaluate", *joined, "--json", text)
        assert found.status == 0, found.err
        assert json.loads(found.out)["loss"] == pytest.approx(expected, rel=1e-4)
        trained = talkoot(
            "train", *joined, "--resume", "--data", text, "--steps", 3, "--batch-size", 2, "--p2pd", "off"
        )
        assert trained.status == 0, trained.err


GROWN: dict[str, tuple[Manifest, dict[str, Any], float]] = {
    "bias": (MANIFEST, {}, 1e-6),
    "ffn": (make_manifest((2, 3), k=2, kind="ffn", context=64), {"balance": "loss"}, 0.02),
    "prefix": (make_manifest((2, 2), k=2, prefix=3), {}, 1e-6),
    "base": (make_manifest((2, 2), kind="ffn"), {"router": "base"}, 1e-6),
    "own scores": (
        make_manifest((2, 3), k=2, kind="ffn", product_keys=False, context=64),
        {"balance": "loss"},
        0.02,
    ),
    "noise": (
        make_manifest((2, 2), k=2, kind="ffn", gate_width=5),
        {"router": "noisy-top-k", "balance": "both"},
        1e-6,
    ),
}


@pytest.mark.parametrize("name", GROWN)
def test_a_model_with_a_larger_grid_starts_as_it_was(name: str, tmp_path: Path) -> None:
    manifest, settings, tolerance = GROWN[name]
    folder = RandomModel(manifest, **settings).write(tmp_path / "model")
    before = open_model(folder)
    grid = tuple(2 * size for size in manifest.experts.grid)
    values = imported(folder, tmp_path, grid=grid)
    assert values["experts"] == 4 * manifest.experts_total
    assert Manifest.from_toml(tmp_path / "swarm.toml").experts.grid == grid
    after = loss_of(*as_started(values))
    assert after == pytest.approx(loss_of(before.model, before.tokenizer), rel=tolerance)


@pytest.mark.parametrize("times", [(2, 1), (1, 3), (2, 2)])
def test_a_gate_with_a_score_for_each_expert_grows_as_one_with_product_keys(times: tuple[int, int]) -> None:
    grid = 2, 3
    larger = (grid[0] * times[0], grid[1] * times[1])
    generator = torch.Generator().manual_seed(0)
    rows_and_columns = {
        "linear.weight": torch.randn(5, 8, generator=generator),
        "linear.bias": torch.randn(5, generator=generator),
    }
    read_ND = torch.randn(20, 8, generator=generator)

    def sums(tensor: torch.Tensor, grid: tuple[int, ...]) -> torch.Tensor:
        first, second = torch.split(tensor, list(grid))
        return (first[:, None] + second).flatten(0, 1)

    def grown(gate: dict[str, torch.Tensor], product_keys: bool) -> dict[str, torch.Tensor]:
        old, new = (make_manifest(g, kind="ffn", product_keys=product_keys) for g in (grid, larger))
        return grown_gate(gate, old, new, read_ND, 4.0, torch.Generator().manual_seed(1))

    own = grown({name: sums(tensor, grid) for name, tensor in rows_and_columns.items()}, product_keys=False)
    for name, tensor in grown(rows_and_columns, product_keys=True).items():
        torch.testing.assert_close(own[name], sums(tensor, larger), rtol=1e-4, atol=1e-4)


def test_new_experts_get_tokens_and_train(tmp_path: Path) -> None:
    manifest = make_manifest((2, 2), k=2, kind="ffn", layers=2, hidden=16, context=32)
    values = imported(RandomModel(manifest).write(tmp_path / "model"), tmp_path, grid=(4, 2))
    model, tokenizer = as_started(values)
    tokens = torch.from_numpy(tokenizer.encode(TEXT).astype(np.int64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    losses, chosen = [], set()
    mixture = model.mixtures[0]
    assert isinstance(mixture, RemoteMixtureOfExperts)
    for step in range(90):
        model.begin_step(step)
        starts = torch.randint(len(tokens) - 33, (8, 1), generator=torch.Generator().manual_seed(step))
        loss = model.loss(tokens[starts + torch.arange(33)])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        rebalance(model)
        losses.append(loss.item())
        assert mixture.routed is not None
        assert mixture.routed.spread is not None
        chosen.add(round(mixture.routed.spread.cv, 3))
    # At first half of the experts get no rows: then the coefficient of variation is at least 1.
    assert max(chosen) >= 1
    assert min(chosen) < 0.9
    assert losses[-1] < losses[0] - 1


def test_a_grid_with_too_many_experts_for_scores_of_their_own_is_refused(tmp_path: Path) -> None:
    folder = RandomModel(make_manifest((2, 3), kind="ffn", product_keys=False)).write(tmp_path / "model")
    with pytest.raises(UserError, match=r"--grid: .*product_keys = false allows at most 4096 experts"):
        imported(folder, tmp_path, grid=(64, 66))


@pytest.mark.parametrize("grid", [(2, 2), (3, 2), (2,), (4, 8192)])
def test_a_grid_that_is_no_copy_of_the_models_is_refused(grid: tuple[int, ...], tmp_path: Path) -> None:
    folder = RandomModel(MANIFEST).write(tmp_path / "model")
    with pytest.raises(UserError, match="--grid: "):
        imported(folder, tmp_path, grid=grid)
