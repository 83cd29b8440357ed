"""The model card says what is known, and nothing that a stranger put into it."""

import errno
import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from training_swarm import MANIFEST

from peer.errors import StartError
from talkoot.model.card import REPLICAS, CardFacts, ExpertSource, SourcesFile, model_card
from talkoot.model.dense import ExportedDense
from trainer_client.data.tokenizer import ByteTokenizer
from trainer_client.model import LanguageModel
from trainer_client.routers import Routing

UIDS = MANIFEST.uids()


def a_source(updates: int, *replicas: int) -> ExpertSource:
    return ExpertSource(updates=updates, node="Qm0", replicas={f"Qm{n}": c for n, c in enumerate(replicas)})


FACTS = CardFacts(
    "village-Qm",
    MANIFEST,
    # A card does not depend on the tensors.
    ExportedDense(
        cast(LanguageModel, None), ByteTokenizer(), Routing(), "a trainer's run of 7 steps", 9, 1.5
    ),
    {uid: a_source(number, number, 2 * number) for number, uid in enumerate(UIDS)},
    is_pruned=False,
    figures={"loss before leaving experts out": 1.25},
    names=["Ada", ""],
    data_note="",
    exported_at=1e9,
)


def test_a_card_has_the_figures_and_the_update_counts_of_each_layer() -> None:
    card = model_card(FACTS)
    assert "`village-Qm`" in card
    assert "| dense part | from a trainer's run of 7 steps |" in card
    assert "| training steps in the dense part, with those averaged in from other trainers | 9 |" in card
    assert "1.5000 nats per token (perplexity 4.48)" in card
    assert "| loss before leaving experts out | 1.2500 nats per token |" in card
    assert "| 0 | 4 | 0 / 1 / 3 | 8 | 0 / 2 / 6 |" in card
    assert "| 1 | 4 | 4 / 5 / 7 | 8 | 4 / 7 / 14 |" in card
    assert "on its trainer's text |" in card
    later = model_card(replace(FACTS, dense=replace(FACTS.dense, validated_after=5)))
    assert "on its trainer's text, measured after step 5 |" in later
    assert "Not recorded." in card
    assert "2001-09-09" in card
    assert "announce a name: Ada." in card
    assert "masked" not in card


@pytest.mark.parametrize("loss", [1e308, -1e308, None])
def test_a_loss_that_no_model_has_is_left_out(loss: float | None) -> None:
    card = model_card(replace(FACTS, dense=replace(FACTS.dense, validation_loss=loss)))
    assert "validation loss" not in card


def test_missing_experts_are_counted_and_named() -> None:
    card = model_card(replace(FACTS, experts={UIDS[0]: a_source(1, 1)}))
    named = ", ".join(map(str, UIDS[1:]))
    assert (
        f"7 of 8 experts had no host that gave them** and are masked; tokens go to others: {named}." in card
    )
    assert "| 1 | 0 | – | 0 | – |" in card


@pytest.mark.parametrize(
    ("license", "front", "said"),
    [
        ("Apache-2.0", ["license: apache-2.0"], "Apache-2.0, as the swarm's manifest says"),
        (None, [], "names none"),
    ],
)
def test_the_licence_is_the_manifests(license: str | None, front: list[str], said: str) -> None:
    card = model_card(replace(FACTS, manifest=MANIFEST.model_copy(update={"license": license})))
    assert [line for line in card.split("---")[1].splitlines() if line.startswith("license")] == front
    assert said in card


@given(st.text())
def test_names_and_notes_are_text_whatever_they_look_like(text: str) -> None:
    headings = [line for line in model_card(FACTS).splitlines() if line.startswith("#")]
    card = model_card(
        replace(FACTS, names=[text, "<script>alert(1)</script>", "[x](y)"], data_note=f"{text}\n# {text}")
    )
    lines = [line for line in card.splitlines() if line.startswith("#")]
    assert lines == headings
    assert card.split("\n---\n")[0] == model_card(FACTS).split("\n---\n")[0]
    assert "<script" not in card
    assert "[x](y)" not in card


def test_the_manifest_is_whole() -> None:
    *_, written = re.findall(r"```json\n(.*?)```", model_card(FACTS), re.DOTALL)
    assert json.loads(written) == MANIFEST.model_dump(mode="json")


def test_on_a_full_disk_the_error_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(
        StartError, match=r"No space left on device.* fix this, and run the same command again"
    ):
        SourcesFile(tmp_path).replace_layer(0, {UIDS[0]: a_source(1, 1)})
    assert not list(tmp_path.iterdir())


def test_sources_of_an_earlier_export_are_read_again_unless_they_are_broken(tmp_path: Path) -> None:
    layers = [{uid: FACTS.experts[uid] for uid in UIDS if uid.layer == layer} for layer in range(2)]
    file = SourcesFile(tmp_path)
    file.replace_layer(1, layers[1])
    file.replace_layer(0, {UIDS[0]: a_source(99, 99)})
    file.replace_layer(0, layers[0])
    again = SourcesFile(tmp_path)
    assert (again.of_layer(0), again.of_layer(1)) == (layers[0], layers[1])
    assert list(json.loads((tmp_path / REPLICAS).read_text())) == [str(uid) for uid in UIDS]
    for broken in (
        b"",
        b"[]",
        b'{"x": {}}',
        b'{"0.x": {"updates": 1, "node": "Qm", "replicas": {}}}',
        b'{"0.1.1": {}}',
    ):
        (tmp_path / REPLICAS).write_bytes(broken)
        assert SourcesFile(tmp_path).experts == {}
