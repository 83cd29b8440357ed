"""The curve of losses that the demo draws."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peer.errors import UserError
from talkoot.demo.scenario import DemoResult, LossCurve, judge, summary


def lines(curve: LossCurve) -> list[str]:
    return curve.picture().plain.splitlines()


def columns(curve: LossCurve) -> list[str]:
    """The columns of the curve, each from the bottom up."""
    return [
        "".join(column)
        for column in zip(*(line[6:66].ljust(60) for line in reversed(lines(curve)[:6])), strict=True)
    ]


def test_there_is_no_curve_before_the_first_loss() -> None:
    curve = LossCurve(10)
    curve.add(1, None)
    assert lines(curve) == []


def test_a_falling_loss_is_drawn_from_zero_up() -> None:
    curve = LossCurve(60)
    for step in range(1, 61):
        curve.add(step, 6.0 / step)
    first, *_, last = columns(curve)
    assert first == "█" * 6, "the highest loss fills the height"
    assert last == "▁     ", "a sixtieth of it"
    assert lines(curve)[0].startswith(" 6.00 ")


def test_a_mark_stands_below_the_step_at_which_it_was_made() -> None:
    curve = LossCurve(120)
    curve.add(60, 1.0)
    curve.mark("node 3 killed")
    curve.add(61, 1.0)
    *_, mark = lines(curve)
    assert mark == " " * (6 + 29) + "▲ node 3 killed"


@given(
    st.lists(st.none() | st.floats(min_value=0.01, max_value=1e6) | st.just(math.nan), max_size=200),
    st.integers(1, 300),
)
def test_any_losses_are_drawn_within_the_width(losses: list[float | None], steps: int) -> None:
    curve = LossCurve(steps)
    for step, loss in enumerate(losses[:steps], 1):
        curve.add(step, loss)
    drawn = lines(curve)
    assert len(drawn) in (0, 6)
    assert all(len(line) == len(drawn[0]) for line in drawn)


@pytest.mark.parametrize("killed", [0, 1])
def test_the_summary_says_what_happened(killed: int) -> None:
    said = summary(DemoResult(180, 5.6, 1.8, 5.6, 1.7, 3, killed, 128, 128, 3501.4, 0.8, 72.0))
    assert "180 steps in 72 s, at 3,501 tokens/s" in said
    assert ("1 of 3 nodes was killed" in said) == bool(killed)


@pytest.mark.parametrize("on_path", [True, False])
def test_the_command_that_it_names_next_can_be_run(on_path: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}" if on_path else None)
    monkeypatch.setattr("sys.argv", [".venv/bin/talkoot", "demo"])
    said = summary(DemoResult(180, 5.6, 1.8, 5.6, 1.7, 3, 0, 128, 128, 3501.4, 0.8, 72.0))
    assert f"Next: `{'talkoot' if on_path else '.venv/bin/talkoot'}` says" in said


def test_a_demo_on_a_busy_machine_fails_only_if_it_did_not_learn_or_lost_experts() -> None:
    judge(DemoResult(180, 5.6, 1.8, 5.6, 1.7, 3, 1, 128, 128, 35.4, 31.2, 337.0))
    with pytest.raises(UserError, match="the validation loss fell by 2%"):
        judge(DemoResult(180, 5.6, 5.5, 5.6, 5.5, 3, 1, 128, 128, 35.4, 0.8, 337.0))
    with pytest.raises(UserError, match="only 85 of 128 experts are alive"):
        judge(DemoResult(180, 5.6, 1.8, 5.6, 1.7, 3, 1, 128, 85, 35.4, 0.8, 337.0))
