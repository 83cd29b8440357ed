"""Log files of training for other tools."""

import errno
import io
import json
import logging
import math
import resource
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from peer import settings
from peer.errors import SettingsError, StartError
from talkoot.terminal import LogFormat, Terminal, check_writable, write_json
from talkoot.train.display import (
    check_plot,
    describe,
    describe_validation,
    logs_written,
    plot_losses,
    progress_shown,
    summary_lines,
)
from talkoot.train.session import next_commands
from trainer_client.settings import TrainerSettings
from trainer_client.training.record import History, Validation

VALUES: dict[str, Any] = {
    "step": 1, "steps": 4, "loss": 2.0, "validation_loss": None, "tokens_per_s": 10.0, "in_flight": 1, "averagings": 0,
    "experts_live": 3, "experts_total": 4, "failures": {"DEADLINE_EXCEEDED": 2},
}  # fmt: skip


def make_history(*losses: float) -> History:
    history = History()
    history.losses.extend(losses)
    history.validated.append(0)
    history.validation_losses.append(5.5)
    return history


def test_each_step_is_a_line_of_json_and_a_resumed_run_adds_to_them(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    for step in (1, 2):
        with logs_written(path, None) as writers:
            for write in writers:
                write(VALUES | {"step": step, "loss": math.nan})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[0]["loss"] is None
    assert lines[0]["failures"] == {"DEADLINE_EXCEEDED": 2}
    assert lines[0]["time"] > 1e9


def test_a_resumed_run_begins_a_new_line_after_one_that_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"ste')
    for step in (2, 3):
        with logs_written(path, None) as writers:
            for write in writers:
                write(VALUES | {"step": step})
    whole, cut_off, *lines = path.read_text().splitlines()
    assert (whole, cut_off) == ('{"step": 1}', '{"ste')
    assert [json.loads(line)["step"] for line in lines] == [2, 3]


def test_lines_are_there_while_training_goes_on(tmp_path: Path) -> None:
    with logs_written(tmp_path / "log", None) as (write,):
        write(VALUES)
        assert json.loads((tmp_path / "log").read_text())["step"] == 1


def test_a_full_disk_ends_the_log_and_not_the_training(caplog: pytest.LogCaptureFixture) -> None:
    with logs_written(Path("/dev/full"), None) as (write,):
        write(VALUES)
        write(VALUES)
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert warnings == ["no more lines in /dev/full: No space left on device"]


@contextmanager
def full_disk() -> Iterator[None]:
    """Files in which only a few bytes have room."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_results_that_have_no_room_leave_those_of_the_last_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    result, plot, new = tmp_path / "result.json", tmp_path / "plot.png", tmp_path / "new.json"
    write_json(result, {"steps": 1})
    plot_losses(make_history(1.0), plot)
    before = plot.read_bytes()
    check_writable(new, "--json")
    with full_disk():
        for path in (result, new):
            with pytest.raises(StartError, match=r"can't write .*json: .*; pass another --json FILE"):
                write_json(path, {"steps": 2})
        plot_losses(make_history(2.0), plot)
    assert "could not write the plot" in caplog.text
    assert json.loads(result.read_text()) == {"steps": 1}
    assert plot.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"result.json", "plot.png"}


def test_results_may_go_to_a_pipe_or_a_file_in_a_folder_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_json(Path("/dev/null"), {"steps": 1})
    assert not Path("/dev/null").is_file()
    result = tmp_path / "result.json"
    result.touch()

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("talkoot.terminal.write_atomically", refuse)
    write_json(result, {"steps": 1})
    assert json.loads(result.read_text()) == {"steps": 1}


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnhandledThreadExceptionWarning"
)  # of TensorBoard's own thread
def test_a_full_disk_ends_the_values_for_tensorboard_and_not_the_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = threading.enumerate()
    with logs_written(None, tmp_path / "board") as (write,), full_disk():
        for step in range(20_000):
            write(VALUES | {"step": step})
    for thread in threading.enumerate():
        if thread not in before:
            thread.join(60)  # else it may fail during the next test
    (warning,) = (record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING)
    assert warning == f"no more values in {tmp_path / 'board'}: File too large"


def test_tensorboard_reads_what_is_written(tmp_path: Path) -> None:
    with logs_written(None, tmp_path / "board") as (write,):
        write(VALUES)
        write(VALUES | {"step": 2, "loss": 1.5, "validation_loss": 1.75})
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 2.0), (2, 1.5)]
    assert [event.step for event in events.Scalars("validation_loss")] == [2]
    assert [event.value for event in events.Scalars("failures/DEADLINE_EXCEEDED")] == [2, 2]
    assert "step" not in events.Tags()["scalars"]


@pytest.mark.parametrize("losses", [(), (math.nan,) * 3, (2.0, math.nan, 1.5), tuple(range(5000))])
def test_the_plot_is_a_picture_whatever_was_measured(tmp_path: Path, losses: tuple[float, ...]) -> None:
    path = tmp_path / "loss.png"
    check_plot(path)
    plot_losses(make_history(*losses), path)
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.width > 500


def test_matplotlib_logs_nothing_while_it_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class LoggingFinder(MetaPathFinder):
        def find_spec(self, name: str, *_: object) -> None:
            if name == "matplotlib.figure":
                logging.getLogger("matplotlib.font_manager").info("generated new fontManager")

    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    monkeypatch.setattr(sys, "meta_path", [LoggingFinder(), *sys.meta_path])
    caplog.set_level(logging.INFO, "matplotlib")
    plot_losses(make_history(1.0), tmp_path / "loss.png")
    assert "matplotlib.figure" in sys.modules
    assert caplog.messages == []


def test_a_plot_that_can_not_be_written_is_known_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(StartError, match="can't write"):
        check_plot(tmp_path / "no" / "such.png")
    with pytest.raises(SettingsError, match=r"--plot .*loss\.svg: .* pass a file whose name ends in \.png"):
        check_plot(tmp_path / "loss.svg")
    plot_losses(make_history(1.0), tmp_path / "no" / "such.png")
    assert "could not write the plot" in caplog.text
    monkeypatch.setattr(settings, "find_spec", lambda name: None)
    with pytest.raises(
        SettingsError, match="--plot needs the package matplotlib: install Talkoot with the extra plot"
    ):
        check_plot(tmp_path / "loss.png")
    with (
        pytest.raises(SettingsError, match=r"--tensorboard needs the package tensorboard"),
        logs_written(None, tmp_path),
    ):
        pass


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_watched_step_is_told_whole_on_a_narrow_terminal(width: int) -> None:
    terminal = Terminal(LogFormat.TEXT)
    terminal.live = True
    terminal.err = Console(
        file=io.StringIO(),
        width=width,
        height=25,
        force_terminal=True,
        soft_wrap=True,
        markup=False,
        record=True,
    )
    values = VALUES | {"in_flight": 3, "staleness": 2, "averagings": 5, "failures": {"deadline_exceeded": 3}}
    with progress_shown(terminal, 4000, 0) as show:
        show(values | {"step": 1234})
    bar, *words = terminal.err.export_text().rpartition("first step")[2].splitlines()
    assert all(len(line.rstrip()) <= width for line in (bar, *words))
    assert "1234/4000" in bar
    assert " ".join(" ".join(words).split()) == describe(values)


def test_a_step_is_told_in_one_line() -> None:
    assert (
        describe(VALUES) == "loss 2.000, 10 tokens/s, 3 of 4 experts live, failed calls: 2 DEADLINE_EXCEEDED"
    )
    busy = VALUES | {"in_flight": 4, "staleness": 3, "averagings": 2, "failures": {}}
    assert describe(busy) == (
        "loss 2.000, 10 tokens/s, 4 steps in flight, gradient 3 updates old, averaged 2 times, "
        "3 of 4 experts live, no failed calls"
    )


SUMMARY: dict[str, Any] = {
    "steps": 200, "resumed_at": 0, "loss_first": 5.5, "loss_last": 2.25, "validation_loss_first": 5.25,
    "validation_loss_last": 2.5, "perplexity": 12.18, "bits_per_byte": 3.607, "tokens_per_s": 4096.4,
    "longest_stall_s": 0.25, "seconds": 90.0, "skipped_steps": 0, "in_flight": 1.0, "staleness": 0.0, "load_cv": 0.5,
    "load_max_over_mean": 2.5, "failures": {"unavailable": 3}, "hedged_calls": 0, "averagings": 4, "stopped": False,
    "checkpoint": "/runs/1",
}  # fmt: skip


def test_the_summary_is_in_words() -> None:
    assert list(summary_lines(SUMMARY)) == [
        "trained 200 steps in 90 s at 4,096 tokens/s",
        "validation loss 5.250 at first, 2.500 at last: 3.607 bits per byte, perplexity 12.18",
        "training loss 5.500 in the first step, 2.250 in the last",
        "the busiest expert got 2.5 times the tokens of the mean one (load_cv 0.50; 0 is even)",
        "calls that failed: 3 unavailable; longest stall 0.2 s",
        "also: 4 averagings with other trainers",
    ]
    once = SUMMARY | {"hedged_calls": 1, "checked_rows": 48, "averagings": 1}
    *_, also = summary_lines(once)
    assert also == "also: 1 call made twice, 48 rows checked, 1 averaging with other trainers"
    stopped = SUMMARY | {"stopped": True, "resumed_at": 150, "steps": 151, "failures": {}}
    lines = list(summary_lines(stopped))
    assert lines[0] == "stopped after 1 step (151 in all) in 90 s at 4,096 tokens/s"
    assert lines[4].startswith("calls that failed: none")
    for seconds, said in ((184.4, "3 min 04 s"), (7259.0, "2 h 00 min")):
        assert f" in {said} at " in next(iter(summary_lines(SUMMARY | {"seconds": seconds})))
    for without, said in (
        (200, "1,000 of 1,200 look-ups"),
        (1200, "0 of 1,200 look-ups: a model gets none of the"),
    ):
        reading = SUMMARY | {"memory_chunks": 1200, "memory_chunks_without": without}
        assert list(summary_lines(reading))[4].startswith(f"the memory gave passages for {said}")
    nothing = dict.fromkeys(("loss_first", "validation_loss_last", "load_max_over_mean"))
    assert len(list(summary_lines(stopped | nothing))) == 3


def test_the_next_command_is_told(tmp_path: Path) -> None:
    settings = TrainerSettings.load(state=tmp_path / "my trainer")
    assert next_commands(SUMMARY, "--join @invite.txt", settings) == [
        f"next: talkoot generate --join @invite.txt --state '{tmp_path}/my trainer' --prompt 'Once upon a time'",
        f"  or: talkoot train --join @invite.txt --state '{tmp_path}/my trainer' --resume --steps 400",
    ]
    stopped = next_commands(SUMMARY | {"stopped": True}, "--join INVITE", TrainerSettings())
    assert stopped[1] == "  or: talkoot train --join INVITE --resume"
    files = TrainerSettings.load(log=Path("log.jsonl"), plot=Path("my loss.png"))
    _, resume = next_commands(SUMMARY | {"stopped": True}, "--join INVITE", files, Path("run.json"))
    assert resume.endswith(" --resume --log log.jsonl --plot 'my loss.png' --json run.json")
    assert next_commands(SUMMARY | {"checkpoint": None}, "--join INVITE", TrainerSettings()) == []
    ask, _ = next_commands(SUMMARY, "--join INVITE", TrainerSettings(), answers=True)
    assert ask == "next: talkoot ask --join INVITE 'YOUR QUESTION'"


def test_a_validation_is_a_line() -> None:
    first = Validation(step=0, loss=5.545, perplexity=256.0, bits_per_byte=8.0)
    assert describe_validation(first) == (
        "validation loss before the first step: 5.545 (8.000 bits per byte, perplexity 256)"
    )
    assert describe_validation(replace(first, step=100)).startswith("validation loss after step 100: ")
    assert describe_validation(replace(first, unanswered_rows=12)) == (
        f"{describe_validation(first)}; no expert answered for 12 rows, so it may be higher than usual"
    )
