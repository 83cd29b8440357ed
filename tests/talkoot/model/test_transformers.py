"""A model folder in the library `transformers`, in a process where Talkoot can't be imported."""

import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from expert_fakes import make_manifest
from model_folders import RandomModel, reads
from safetensors.torch import load_file, save_file
from torch import Tensor

from dht.beam_search import Selection
from dht.directory import LiveExperts
from dht.manifest import ExpertSpec, Manifest
from peer.codec import Integers
from talkoot.model.opened import OpenedModel, open_model
from trainer_client.data.tokenizer import BytePairTokenizer
from trainer_client.dispatch.batches import ForwardPass, RoutedRows
from trainer_client.inference import generate
from trainer_client.settings import Sampling

PROGRAM = Path(__file__).parents[2] / "support" / "loads_with_transformers.py"
SENTENCE = "In the sauna one must behave as in church: ääkköset,  and\n\tso on! 🧖"


def with_experts(manifest: Manifest, **changes: Any) -> Manifest:
    experts = manifest.experts.model_dump() | changes
    return manifest.model_copy(update={"experts": ExpertSpec.model_validate(experts)})


LARGE = make_manifest((4, 4), k=4, layers=2, hidden=32, feed_forward=64, context=128)
MODELS: dict[str, tuple[Manifest, dict[str, Any]]] = {
    # a thousand tokens
    "large": (LARGE, {}),
    "narrow": (
        make_manifest(
            (2, 3), k=3, layers=2, hidden=16, width=12, gate_width=5, shared_feed_forward=16, activation="swiglu"
        ), {},
    ),
    "ffn": (make_manifest((2, 2, 3), k=2, layers=3, kind="ffn", norm="rms", activation="geglu"), {"balance": "loss"}),
    "no-attention": (make_manifest((5,), k=2, kind="ffn", local_layers=0), {"router": "glam"}),
    "only-experts-attend": (
        make_manifest((5,), k=2, layers=2, local_layers=0, gate_width=3), {"router": "noisy-top-k"},
    ),
    "switch": (make_manifest((3, 3), layers=2, local="attention", local_layers=0), {"router": "switch"}),
    "base": (make_manifest((3, 3), k=2, layers=2, local="attention", head_size=6), {"router": "base"}),
    "prefix": (make_manifest((3, 3), k=2, layers=2, prefix=3), {}),
    "prefix-ffn": (make_manifest((3, 3), k=2, layers=2, kind="ffn", prefix=3, local_layers=0), {}),
    "heads-missing": (
        with_experts(make_manifest((2, 3), k=3, layers=2), heads=3, head_size=4, feed_forward=24),
        {"missing": ["0.0.1", "1.0.0", "1.0.1", "1.1.0", "1.1.2"]},
    ),
    "own-scores": (make_manifest((2, 3, 2), k=3, layers=2, kind="ffn", product_keys=False, gate_width=3), {}),
    "own-scores-prefix": (make_manifest((2, 3), k=2, layers=2, prefix=3, product_keys=False), {"balance": "loss"}),
    "own-scores-missing": (
        make_manifest((2, 2), layers=2, product_keys=False), {"router": "switch", "missing": ["0.0.1", "1.1.0"]},
    ),
    "reads": (make_manifest((3, 3), k=2, layers=3), {"memory": reads("causal", memory_layers=(0, 2))}),
    "answers": (make_manifest((3, 3), k=2, layers=2), {"memory": reads("rag-token")}),
    "empty-layer": (make_manifest((3,), layers=2), {"router": "switch", "missing": ["0.1", "1.0", "1.1", "1.2"]}),
}  # fmt: skip


class Recorded:
    """A model of Talkoot's that records which experts it chooses."""

    def __init__(self, opened: OpenedModel, tokens: Tensor) -> None:
        self.choices: list[Integers] = []
        send = opened.experts.send
        grid = opened.manifest.experts.grid

        async def recording(rows: RoutedRows, selection: Selection, live: LiveExperts) -> ForwardPass:
            numbers = np.ravel_multi_index(tuple(np.moveaxis(selection.coordinates, -1, 0)), grid)
            self.choices.append(np.where(selection.valid, numbers, -1))
            return await send(rows, selection, live)

        opened.experts.send = recording  # type: ignore[method-assign]
        with torch.no_grad():
            self.logits = opened.model(tokens)
        opened.experts.send = send  # type: ignore[method-assign]


def tokens_of(manifest: Manifest, vocabulary: int, sequences: int) -> Tensor:
    seed = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (sequences, manifest.model.context), generator=seed)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return computed(tmp_path_factory.mktemp("work"), MODELS, 8)


def computed(work: Path, models: dict[str, tuple[Manifest, dict[str, Any]]], large: int) -> Path:
    """Writes to a folder, for each NAME: a model folder, its tokens NAME.in.safetensors, and the results of
    `transformers`, NAME.out.safetensors. The large model has `large` sequences.
    """
    pairs = BytePairTokenizer.learn([SENTENCE] * 9, 9 * len(SENTENCE), 290)
    for name, (manifest, given) in models.items():
        tokenizer = pairs if name == "narrow" else None
        model = RandomModel(manifest, tokenizer, **given)
        model.write(work / name)
        tokens = tokens_of(manifest, len(model.tokenizer.token_bytes), large if manifest is LARGE else 4)
        save_file({"tokens": tokens}, work / f"{name}.in.safetensors")
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ended = subprocess.run(
        [sys.executable, str(PROGRAM), str(work), SENTENCE],
        env=kept
        | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(work / "home"), "HF_MODULES_CACHE": str(work / "home")},
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return work


opened_once = cache(open_model)
"""For what is not changed."""

every_model = pytest.mark.parametrize("name", MODELS)


@every_model
def test_same_experts_and_the_same_logits_as_ours(name: str, work: Path) -> None:
    tokens = load_file(work / f"{name}.in.safetensors")["tokens"]
    found = load_file(work / f"{name}.out.safetensors")
    opened = open_model(work / name)
    expected = Recorded(opened, tokens)
    ours = np.sort(np.stack(expected.choices), axis=-1)
    theirs = np.sort(found["choices"].numpy(), axis=-1)
    same_R = (ours == theirs).all(axis=(0, 2))
    assert same_R.mean() >= 0.9999
    # A token attends to those before it, so a sequence counts up to the first token with another choice.
    same_BT = np.logical_and.accumulate(same_R.reshape(tokens.shape), axis=1)
    difference = (found["logits"] - expected.logits).abs()[same_BT]
    assert (difference <= 1e-4 * (1 + expected.logits[same_BT].abs())).all()


@pytest.mark.slow
def test_same_experts_and_the_same_logits_for_ten_thousand_tokens(tmp_path: Path) -> None:
    work = computed(tmp_path, {"large": MODELS["large"]}, 79)
    assert load_file(work / "large.in.safetensors")["tokens"].numel() >= 10_000
    test_same_experts_and_the_same_logits_as_ours("large", work)


@every_model
def test_same_greedy_text_and_loss_as_ours(name: str, work: Path) -> None:
    tokens = load_file(work / f"{name}.in.safetensors")["tokens"]
    found = load_file(work / f"{name}.out.safetensors")
    opened = opened_once(work / name)
    least = opened.model.first_scored
    sampling = Sampling(temperature=0, max_tokens=found["generated"].shape[1])
    for sequence in range(2):
        prompt = tokens[sequence, : least + 2].tolist()
        assert list(generate(opened.model, prompt, sampling)) == found["generated"][sequence].tolist()
    few = tokens[:4, : min(tokens.shape[1], least + 9)]
    torch.testing.assert_close(found["loss"], opened.model.loss(few), rtol=1e-4, atol=1e-4)


@every_model
def test_tokenizer_encodes_as_ours(name: str, work: Path) -> None:
    ids = load_file(work / f"{name}.out.safetensors")["ids"].tolist()
    assert ids == opened_once(work / name).tokenizer.encode(SENTENCE).tolist()


@every_model
def test_what_transformers_saved_is_the_same_model(name: str, work: Path) -> None:
    tokens = load_file(work / f"{name}.in.safetensors")["tokens"][:2]
    found, expected = open_model(work / f"{name}-saved"), opened_once(work / name)
    torch.testing.assert_close(found.model(tokens), expected.model(tokens))
    assert found.tokenizer.token_bytes == expected.tokenizer.token_bytes
    assert found.manifest == expected.manifest
    assert found.memory == expected.memory
    for mine, its in ((found.answering, expected.answering), (found.model, expected.model)):
        if mine is not None and its is not None:
            torch.testing.assert_close(mine.state_dict(), its.state_dict())
