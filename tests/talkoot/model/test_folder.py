"""The standard model folder: what was written can be read again, and nothing else is accepted."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from expert_fakes import make_manifest
from model_folders import RandomModel, change_json, change_weights, reads
from safetensors.torch import load_file, save_file
from torch import Tensor

from dht.uid import UID
from expert_server.experts.format import block_tensors
from peer.errors import ModelError, SettingsError, StartError, UserError
from talkoot.model.folder import (
    CONFIG,
    INDEX,
    PYTHON_FILES,
    FolderWriter,
    ModelFolder,
    python_file,
)
from talkoot.model.opened import open_model
from talkoot.partial import PARTIAL
from trainer_client.data.tokenizer import BytePairTokenizer, ByteTokenizer

MANIFEST = make_manifest((2, 3), k=3, layers=2, hidden=16, feed_forward=32, width=8, shared_feed_forward=16)


@pytest.fixture(scope="module")
def model() -> RandomModel:
    return RandomModel(MANIFEST, balance="both")


@pytest.fixture(scope="module")
def written(model: RandomModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model.write(tmp_path_factory.mktemp("folders") / "model")


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """A copy that tests may change."""
    return Path(shutil.copytree(written, tmp_path / "model"))


def test_what_was_written_is_read(model: RandomModel, written: Path) -> None:
    found = ModelFolder.open(written)
    assert (found.manifest, found.routing) == (MANIFEST, model.routing)
    assert isinstance(found.tokenizer, ByteTokenizer)
    assert found.live == set(MANIFEST.uids())
    expected = model.model.state_dict()
    assert list(found.dense()) == list(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.dense().items())
    for uid, expert in model.swarm.dispatcher.experts.items():
        own = block_tensors(expert.block)
        assert all(torch.equal(tensor, own[name]) for name, tensor in found.expert(uid).items())
        assert found.expert(uid).keys() == own.keys()


def test_folder_has_one_file_of_weights_for_each_layer_and_the_code_of_this_release(written: Path) -> None:
    weights = sorted(path.name for path in written.glob("*.safetensors"))
    assert weights == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    assert set(os.listdir(written)) == {
        *weights, *PYTHON_FILES, CONFIG, INDEX, "README.md", "generation_config.json", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    places = json.loads((written / INDEX).read_text())["weight_map"]
    assert {name: file for file in weights for name in load_file(written / file)} == places
    assert places["experts.1.0_2.attention_input.weight"] == weights[2]
    for name in PYTHON_FILES:
        assert (written / name).read_text() == python_file(name)


def test_opened_model_predicts_what_the_swarm_does(model: RandomModel, written: Path) -> None:
    opened = open_model(str(written))  # as in docs/export.md
    tokens = torch.randint(256, (4, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(opened.model(tokens), model.model(tokens), rtol=1e-5, atol=1e-5)


def test_missing_experts_are_named_and_get_no_tokens(tmp_path: Path) -> None:
    # Only three experts of layer 1 are left, so that each token goes to these.
    missing = ["0.0.1", "1.0.0", "1.0.1", "1.1.2"]
    model = RandomModel(MANIFEST, missing=missing)
    folder = model.write(tmp_path / "model")
    assert json.loads((folder / CONFIG).read_text())["missing_experts"] == missing
    assert ModelFolder.open(folder).live == set(MANIFEST.uids()) - model.missing
    opened = open_model(folder)
    assert opened.experts.blocks.keys() == set(MANIFEST.uids()) - model.missing
    assert opened.model(torch.arange(16)[None]).isfinite().all()


def test_folder_of_a_layer_without_experts_opens(tmp_path: Path) -> None:
    missing = [str(uid) for uid in MANIFEST.uids() if uid.layer == 1]
    folder = RandomModel(MANIFEST, missing=missing).write(tmp_path / "model")
    assert open_model(folder).model(torch.arange(16)[None]).isfinite().all()


def test_tokenizer_of_byte_pairs_is_kept(tmp_path: Path) -> None:
    tokenizer = BytePairTokenizer.learn(["In the sauna one must behave as in church. "] * 9, 400, 280)
    found = ModelFolder.open(RandomModel(MANIFEST, tokenizer).write(tmp_path / "model")).tokenizer
    assert found.to_json() == tokenizer.to_json()


def test_weights_that_transformers_saved_in_one_file_in_half_precision_are_read(
    model: RandomModel, folder: Path
) -> None:
    tensors: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
        path.unlink()
    (folder / INDEX).unlink()
    save_file({name: t.bfloat16() for name, t in tensors.items()}, folder / "model.safetensors")
    found = ModelFolder.open(folder).dense()["head.weight"]
    assert found.dtype is torch.float32
    torch.testing.assert_close(found, model.model.head.weight.data, rtol=0.01, atol=0)


def test_folder_of_another_protocol_version_is_read(folder: Path) -> None:
    manifest = json.loads((folder / CONFIG).read_text())["manifest"]
    change_json(folder / CONFIG, manifest=manifest | {"protocol_version": 1})
    assert ModelFolder.open(folder).manifest == MANIFEST


def test_an_interrupted_writing_goes_on(model: RandomModel, tmp_path: Path) -> None:
    path = tmp_path / "model"

    def breaks_off() -> Iterator[tuple[UID, Mapping[str, Tensor]]]:
        yield (uid := UID(1, (0, 0))), block_tensors(model.swarm.dispatcher.experts[uid].block)
        raise TimeoutError("a node died")

    with FolderWriter(path, MANIFEST, model.routing, model.tokenizer) as writer:
        model.write_layer(writer, 0)
        with pytest.raises(TimeoutError, match="a node died"):
            writer.write_layer(1, breaks_off())
        (writer.partial / "note.json").write_text("mine")
    assert not path.exists()
    with FolderWriter(path, MANIFEST, model.routing, model.tokenizer) as writer:
        assert [writer.has_layer(0), writer.has_layer(1)] == [True, False]
        model.write_layer(writer, 1)
        writer.write_dense(model.model.state_dict())
        writer.finish("")
    assert ModelFolder.open(path).live == set(MANIFEST.uids())
    assert (path / "note.json").read_text() == "mine"
    assert os.listdir(tmp_path) == ["model"]


def test_what_another_model_left_is_not_gone_on_with(model: RandomModel, tmp_path: Path) -> None:
    with FolderWriter(tmp_path / "model", MANIFEST, model.routing, model.tokenizer) as writer:
        model.write_layer(writer, 0)
    other = model.routing.model_copy(update={"top_k": 2})
    with FolderWriter(tmp_path / "model", MANIFEST, other, model.tokenizer) as writer:
        assert not writer.has_layer(0)


def test_only_one_process_writes_a_folder(model: RandomModel, tmp_path: Path) -> None:
    given = tmp_path / "model", MANIFEST, model.routing, model.tokenizer
    with FolderWriter(*given), pytest.raises(StartError, match="another process is writing"):
        FolderWriter(*given)


def test_a_full_disk_says_what_to_do_and_leaves_no_folder(
    model: RandomModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StartError, match=r"No space left on device.*run the same command again"):
        model.write(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_folder_in_use_is_not_overwritten(model: RandomModel, folder: Path) -> None:
    with pytest.raises(SettingsError, match="exists"):
        model.write(folder)
    assert ModelFolder.open(folder).live


def test_tensors_of_another_model_are_not_written(model: RandomModel, tmp_path: Path) -> None:
    with FolderWriter(tmp_path / "model", MANIFEST, model.routing, model.tokenizer) as writer:
        with pytest.raises(ModelError, match="the dense part lacks"):
            writer.write_dense({})
        expert = block_tensors(model.swarm.dispatcher.experts[UID(0, (0, 0))].block)
        with pytest.raises(ModelError, match=r"expert 0\.0\.0 has the unknown tensor x"):
            writer.write_layer(0, [(UID(0, (0, 0)), expert | {"x": torch.zeros(1)})])
        assert not writer.has_layer(0)


def test_experts_of_other_packages_are_refused(tmp_path: Path) -> None:
    manifest = MANIFEST.model_copy(update={"experts": MANIFEST.experts.model_copy(update={"kind": "conv"})})
    with pytest.raises(SettingsError, match="'conv' need code of another package"):
        FolderWriter(tmp_path / "model", manifest, RandomModel(MANIFEST).routing, ByteTokenizer())


def _first_weights(folder: Path) -> Path:
    return folder / "model-00001-of-00003.safetensors"


def _cut(folder: Path) -> None:
    path = _first_weights(folder)
    path.write_bytes(path.read_bytes()[:-100])


def _with(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        tensors = load_file(path := _first_weights(folder))
        change(tensors)
        change_weights(path, tensors)

    return changed


def _set(name: str, value: float) -> Callable[[Path], None]:
    return _with(lambda tensors: tensors[name].view(-1)[:1].fill_(value))


def _reading(objective: str, **changes: Any) -> Callable[[Path], None]:
    memory = reads(objective).model_dump(mode="json") | changes
    return lambda folder: change_json(folder / CONFIG, memory=memory)


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (lambda folder: shutil.rmtree(folder), "no model folder"),
    "no config": (lambda folder: (folder / CONFIG).unlink(), "has no config.json: pass a folder"),
    "no json": (lambda folder: (folder / CONFIG).write_text("{"), "not the configuration of a Talkoot model"),
    "another model": (lambda f: change_json(f / CONFIG, model_type="llama"), "model_type"),
    "a later format": (lambda f: change_json(f / CONFIG, format_version=2), "update Talkoot"),
    "unknown manifest": (lambda f: change_json(f / CONFIG, manifest={"name": "x-y", "z": 1}), "z"),
    "another manifest": (lambda f: change_json(f / CONFIG, manifest={"name": "x-y"}), "lacks|unknown|expected"),
    "top_k": (
        lambda f: change_json(f / CONFIG, routing={"router": "switch", "top_k": 3, "balance": "loss"}),
        "switch can't send each token to 3 experts",
    ),
    "missing off the grid": (lambda f: change_json(f / CONFIG, missing_experts=["9.9.9"]), "missing_experts"),
    "missing are there": (lambda f: change_json(f / CONFIG, missing_experts=["0.0.0"]), "unknown tensor experts.0.0_0"),
    "another vocabulary": (lambda f: change_json(f / CONFIG, vocab_size=300), "tokenizer of 256 tokens"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").write_text("[]"), "not a tokenizer"),
    "index leads out": (lambda f: change_json(f / INDEX, weight_map={"x": "../x.safetensors"}), "names the file"),
    "index misplaces": (
        lambda f: change_json(f / INDEX, weight_map={"x": "model-00001-of-00003.safetensors"}),
        "where it is not",
    ),
    "no weights": (lambda f: _first_weights(f).unlink(), "can't be read: No such file"),
    "truncated": (_cut, "can't be read"),
    "unknown tensor": (_with(lambda tensors: tensors.update(x=torch.zeros(1))), "unknown tensor x"),
    "lost tensor": (_with(lambda tensors: tensors.pop("norm.weight")), "norm.weight"),
    "another shape": (_with(lambda tensors: tensors.update({"norm.weight": torch.zeros(3)})), "norm.weight"),
    "integers": (_with(lambda t: t.update({"norm.weight": torch.zeros(16, dtype=torch.int64)})), "norm.weight"),
    "not finite": (_set("norm.weight", float("nan")), "norm.weight"),
    "a memory that it does not read": (_reading("causal"), "lacks retrieval"),
    "questions that it does not answer": (_reading("rag-token"), "lacks questions.change.weight"),
    "a layer that reads and is not there": (_reading("causal", memory_layers=[2]), "there is no layer 2"),
    "passages of no length": (_reading("causal", memory_length=0), "memory.*memory_length"),
    "questions without an encoder": (_reading("rag-token", encoder=None), "encoder and dimensions say"),
    "a long name": (_reading("causal", memory="x" * 201), "memory.*200 characters"),
    "a bias beyond bounds": (_set("mixtures.0.balance.bias", 1e30), "balance.bias"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_is_refused_with_the_reason(case: str, folder: Path) -> None:
    break_it, reason = BROKEN[case]
    break_it(folder)
    with pytest.raises(UserError, match=reason):
        open_model(folder)


def test_one_flipped_bit_of_the_weights_is_noticed(folder: Path) -> None:
    path = folder / "model-00002-of-00003.safetensors"
    data = bytearray(path.read_bytes())
    data[-4] ^= 1  # of the mantissa: the number stays plausible
    path.write_bytes(data)
    with pytest.raises(
        ModelError, match=r"model-00002-of-00003\.safetensors is damaged: .* Copy the folder again"
    ):
        open_model(folder)
    change_json(folder / INDEX, sha256={})  # changed on purpose
    assert open_model(folder)


def test_index_has_the_checksum_of_each_file_of_weights(written: Path) -> None:
    digests = json.loads((written / INDEX).read_text())["sha256"]
    files = written.glob("*.safetensors")
    assert digests == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_of_a_stopped_export_the_way_on_is_said(tmp_path: Path) -> None:
    stopped = tmp_path / f"model{PARTIAL}"
    stopped.mkdir()
    with pytest.raises(ModelError, match="run the same `talkoot export` again"):
        ModelFolder.open(stopped)


def test_no_python_of_a_folder_is_run(folder: Path) -> None:
    for name in PYTHON_FILES:
        (folder / name).write_text("raise SystemExit('it ran')")
    assert open_model(folder).model
