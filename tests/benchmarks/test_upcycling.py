"""`benchmarks.upcycling` starts both models where the first one stopped, and reports which is ahead."""

from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.recipe_texts import Mixed
from benchmarks.upcycling import AS_IT_WAS, FROM_NOTHING, GROWN, QUICK_PLAN, compare, show

PLAN = replace(
    QUICK_PLAN,
    hidden=16,
    context=16,
    batch=4,
    steps=6,
    more=6,
    validate_every=3,
    validation_batches=2,
    final_batches=2,
)
TEXTS = {"sauna": b"In the sauna one must behave as in church. " * 40, "digits": b"3.14159 26535 " * 120}


@pytest.mark.slow
def test_all_go_on_from_one_model_for_as_many_steps(tmp_path: Path) -> None:
    said: list[str] = []
    results = compare(PLAN, Mixed(TEXTS, PLAN.context), tmp_path / "model", said.append)
    runs = results["runs"]
    assert list(results["before"]) == ["0", "3", "6"]
    assert list(runs[AS_IT_WAS]["curve"]) == list(runs[GROWN]["curve"]) == ["6", "9", "12"]
    assert list(runs[FROM_NOTHING]["curve"])[-1] == "12"
    assert runs[GROWN]["at_first"] == pytest.approx(runs[AS_IT_WAS]["at_first"], rel=1e-4)
    assert runs[GROWN]["loss"] != runs[AS_IT_WAS]["loss"]
    assert runs[FROM_NOTHING]["at_first"] > runs[GROWN]["at_first"]
    assert len(said) == 4

    console = Console(width=120, record=True)
    show(PLAN, results, console)
    assert "2×2 to 4×4 experts after 6 of 12 steps" in console.export_text()
