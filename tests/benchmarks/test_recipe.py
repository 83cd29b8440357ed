"""The parts of `benchmarks.recipe`, and that a run that was stopped continues as if it had not been."""

import json
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from benchmarks.recipe import out_of_domain, overtakes, show
from benchmarks.recipe_configurations import (
    ALL,
    GATES_NOT_COUNTED,
    QUICK_SIZE,
    VARIANTS,
    Configuration,
    Size,
    model_flops,
)
from benchmarks.recipe_plots import draw, ordered
from benchmarks.recipe_runs import Run, shared_information
from benchmarks.recipe_texts import BYTE_KINDS, Mixed, byte_kinds, shares
from dht.beam_search import Selection
from dht.directory import LiveExperts
from dht.manifest import Manifest
from talkoot.train.local import LocalExperts
from trainer_client.dispatch.batches import ForwardPass, RoutedRows

NAMED = {configuration.name: configuration for configuration in ALL}
SMALL = replace(
    QUICK_SIZE, hidden=16, context=16, batch=4, grid=(2, 2), steps=6, validate_every=2, validation_batches=2
)
TEXTS = {"sauna": b"In the sauna one must behave as in church. " * 40, "digits": b"3.14159 26535 " * 120}
ALSO_HELD_OUT = TEXTS | {"Finnish": b"Saunassa ollaan kuin kirkossa. " * 60}


def flops(name: str, size: Size | None = None) -> float:
    return sum(NAMED[name].flops(size or Size()).values())


def test_a_dense_layer_takes_12_multiplications_of_hidden_squared_and_its_attention() -> None:
    size = Size(hidden=96, context=128)
    layers = NAMED["dense-2"].flops(size)["dense layers"]
    assert layers == 2 * (2 * 12 * 96**2 + 2 * 2 * 96 * 129 / 2)


def test_narrow_experts_take_their_own_sizes_and_two_projections() -> None:
    """One attention, then 64 experts of a quarter of the width, top-4, with equal compute."""
    model = {"layers": 4, "hidden": 96, "context": 128, "local": "attention", "local_layers": 0}
    experts = {"grid": [8, 8], "width": 24, "heads": 1, "head_size": 16, "feed_forward": 312}
    manifest = Manifest.model_validate({"name": "lab", "model": model, "experts": experts})
    parts = model_flops(manifest)
    assert parts["dense layers"] == 4 * (2 * 4 * 96**2 + 2 * 2 * 96 * 129 / 2)
    assert parts["experts"] == 4 * 4 * (2 * 4 * 24 * 16 + 2 * 2 * 16 * 9 / 2 + 2 * 2 * 24 * 312)
    assert parts["projections"] == 4 * 2 * 2 * 96 * 24


def test_top_k_takes_k_times_the_experts() -> None:
    of_ffn = [
        Configuration("", 2, 2.0, "ffn", k, settings={"router": "glam"}).flops(Size())["experts"]
        for k in (1, 2)
    ]
    assert of_ffn == [2 * 4 * 96 * 192, 4 * 4 * 96 * 192]


@pytest.mark.parametrize("name", [c.name for c in ALL if c.rival and NAMED[c.rival].expert_kind is None])
def test_a_mixture_computes_as_much_as_its_dense_rival(name: str) -> None:
    rival = NAMED[name].rival
    assert rival is not None
    gates = NAMED[name].flops(Size())["gates"] if name.endswith(GATES_NOT_COUNTED) else 0.0
    assert 0.9 * flops(rival) < flops(name) - gates < 1.02 * flops(rival)


def test_the_wider_dense_model_computes_as_much_as_the_mixture_with_wide_gates() -> None:
    (name,) = [name for name in NAMED if name.endswith(GATES_NOT_COUNTED)]
    assert flops("dense-4, wider") == flops(name)


def test_every_comparison_is_with_something_that_is_trained_before() -> None:
    names = [configuration.name for configuration in ALL]
    assert len(set(names)) == len(names)
    for configuration in ALL:
        if configuration.rival is not None:
            assert names.index(configuration.rival) < names.index(configuration.name)
    assert all(variant.steps < 1 for variant in VARIANTS)


@given(st.integers(0, 1000), st.integers(1, 20))
def test_shares_are_equal_but_for_one(total: int, parts: int) -> None:
    found = shares(total, parts)
    assert (len(found), sum(found)) == (parts, total)
    assert max(found) - min(found) <= 1


def test_batches_have_an_equal_part_of_each_domain_and_follow_from_the_step() -> None:
    data = Mixed(TEXTS, 16)
    batch = data.batch(3, 8)
    torch.testing.assert_close(batch, data.batch(3, 8))
    is_digits = [bytes(row.tolist()).strip(b" .0123456789") == b"" for row in batch]
    assert is_digits == [False] * 4 + [True] * 4
    assert sum(map(len, data.validation_batches(8, 2))) == 16


def test_a_domain_that_is_held_out_is_in_no_batch() -> None:
    data, without = Mixed(ALSO_HELD_OUT, 16, held_out="Finnish"), Mixed(TEXTS, 16)
    assert (list(data.domains), list(data.held_out)) == (["sauna", "digits"], ["Finnish"])
    for step in range(5):
        torch.testing.assert_close(data.batch(step, 8), without.batch(step, 8))
    torch.testing.assert_close(data.validation_batches(8, 2), without.validation_batches(8, 2))
    assert data.sha256 == without.sha256
    assert data.sha256 != Mixed(ALSO_HELD_OUT, 16, held_out="sauna").sha256


def test_a_cache_name_changes_with_what_is_learned_alone() -> None:
    configuration = NAMED["ffn top-1"]

    def name(size: Size = SMALL, data: str = "data", **changes: Any) -> str:
        return replace(configuration, **changes).cache_name(size, data)

    assert name() == name(name="another", rival="dense-5")
    assert name() == name(replace(SMALL, validate_every=1, validation_batches=7))
    assert name() == name(grid=SMALL.grid), "what the size has anyhow"
    learned = [
        name(data="other"),
        name(replace(SMALL, steps=7)),
        name(replace(SMALL, batch=5)),
        name(replace(SMALL, hidden=32)),
        name(replace(SMALL, seed=1)),
        name(feed_forward=1.0),
        name(shared=1.0),
        name(activation="geglu"),
        name(expert_kind="transformer"),
        name(settings={"router": "base"}),
        name(optimizer={"learning_rate": 0.1}),
        name(top_k=2),
        name(layers=1),
    ]
    assert len({name(), *learned}) == 1 + len(learned)
    named = {each.cache_name(Size(), "data") for each in ALL}
    assert len(named) == len(ALL), "no two of them are the same"


def test_kinds_of_bytes_have_names() -> None:
    text = torch.tensor(list("a b\nC7.é".encode()))
    kinds = [BYTE_KINDS[kind] for kind in byte_kinds(text)]
    expected = ["vowel", "space", "consonant", "line end", "capital", "digit", "punctuation", "other"]
    assert kinds == [*expected, "other"]


def test_a_mixture_overtakes_where_it_stays_ahead() -> None:
    dense = {"0": 5.0, "10": 3.0, "20": 2.0, "30": 1.5}
    assert overtakes({"0": 5.0, "10": 2.9, "20": 2.1, "30": 1.4}, dense) == 30
    assert overtakes({"0": 4.0, "10": 2.9, "20": 1.9, "30": 1.4}, dense) == 10
    assert overtakes({"0": 4.0, "10": 2.9, "20": 1.9, "30": 1.6}, dense) is None


def test_shared_information_is_all_where_experts_are_domains_and_none_where_all_get_alike() -> None:
    assert shared_information([[7, 0], [0, 7]]) == pytest.approx(1)
    assert shared_information([[4, 4], [4, 4]]) == pytest.approx(0)
    assert 0 < shared_information([[6, 2], [2, 6]]) < 1


def test_experts_are_ordered_by_the_class_that_needs_them_most() -> None:
    found = ordered(np.array([[1.0, 6.0, 3.0], [8.0, 1.0, 1.0]]))
    np.testing.assert_allclose(found, [[0.6, 0.3, 0.1], [0.1, 0.1, 0.8]])


class AfterThreeSteps(threading.Event):
    """An event that counts how often it is checked, and is set from the fourth time on."""

    looks = 0

    def is_set(self) -> bool:
        self.looks += 1
        return self.looks > 3


def test_a_stopped_run_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    data, configuration = Mixed(TEXTS, SMALL.context), NAMED["transformer top-1"]
    whole = Run.begin(configuration, SMALL, data)
    assert whole.train(tmp_path / "whole.safetensors", threading.Event())
    first = Run.begin(configuration, SMALL, data)
    assert not first.train(tmp_path / "part.safetensors", AfterThreeSteps())
    assert first.training.step == 3
    rest = Run.begin(configuration, SMALL, data)
    assert rest.train(tmp_path / "part.safetensors", threading.Event())
    assert rest.training.history == whole.training.history
    assert rest.results(data)["chosen"] == whole.results(data)["chosen"]


@pytest.mark.slow
def test_the_experts_of_rows_are_those_that_they_are_sent_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """This holds for narrow experts too, whose gate reads normalized rows."""
    data, sent = Mixed(TEXTS, SMALL.context), np.zeros((4, 64), np.int64)
    run = Run.begin(NAMED["transformer top-4, narrow"], replace(SMALL, hidden=32), data)
    send = LocalExperts.send

    async def count(self: LocalExperts, rows: RoutedRows, found: Selection, live: LiveExperts) -> ForwardPass:
        experts = np.ravel_multi_index(tuple(found.coordinates[found.valid].T), rows.grid)
        np.add.at(sent[rows.layer], experts, 1)
        return await send(self, rows, found, live)

    monkeypatch.setattr(LocalExperts, "send", count)
    told = np.array(run._chosen(data, 1)["domains"]).sum(axis=1)
    np.testing.assert_array_equal(told, sent)


def test_the_table_and_the_pictures_are_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = Mixed(ALSO_HELD_OUT, SMALL.context, held_out="Finnish")
    runs = {}
    for name in ("dense-2", "ffn top-1"):
        run = Run.begin(NAMED[name], SMALL, data)
        run.train(tmp_path / "state.safetensors", threading.Event())
        (tmp_path / "state.safetensors").unlink()
        runs[name] = json.loads(json.dumps(run.results(data)))
    counts = np.array(runs["ffn top-1"]["chosen"]["domains"])
    assert counts.shape == (2, 2, 4)
    assert counts.sum(axis=2).min() == counts.sum(axis=2).max() > 0
    assert runs["dense-2"]["out_of_domain"].keys() == {"Finnish"}
    assert runs["dense-2"]["loss_of_domain"].keys() == TEXTS.keys()
    stopped = {"steps": 5, "curve": {"0": 5.0, "2": 4.5, "4": 4.0}, "validation_loss": 4.0}
    results = {
        "runs": runs,
        "unfinished": {"transformer top-1": stopped},
        "domains": list(TEXTS),
        "held_out": ["Finnish"],
        "kinds": BYTE_KINDS,
    }
    files = draw(results, {"ffn top-1": "dense-2", "transformer top-1": "dense-2"}, tmp_path / "pictures")
    assert [file.name for file in files] == ["recipe-curves.png", "recipe-ffn-top-1.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)
    chosen = [NAMED["dense-2"], NAMED["ffn top-1"]]
    show(results, chosen, Console(width=170))
    shown = capsys.readouterr().out
    assert "out of domain: Finnish" in shown
    ratio = out_of_domain(runs["ffn top-1"]) / out_of_domain(runs["dense-2"])
    assert f"{ratio:.4f}" in shown


@pytest.mark.slow
def test_the_quick_recipe_runs(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.recipe", "--quick"]
    subprocess.run([*command, "--json", str(tmp_path / "found.json")], check=True, timeout=60)
    assert len(json.loads((tmp_path / "found.json").read_text())["runs"]) == 3
