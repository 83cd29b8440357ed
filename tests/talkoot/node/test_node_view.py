"""What `talkoot node` shows: readable at a glance, in few lines, with correct numbers; and what its flags do."""

import asyncio
import io
import json
import os
import subprocess
import sys
from dataclasses import asdict, fields, replace
from datetime import datetime, timedelta
from itertools import accumulate, takewhile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from commands import run_here, wait_until
from expert_fakes import now, virtual_time
from hypothesis import given, settings
from hypothesis import strategies as st
from other_processes import name_of
from preloaded import Preloaded
from rich.console import Console
from rich.live import Live

from dht.receipts import SignedWork, Work
from expert_server.settings import NodeSettings
from expert_server.status import NodeState, NodeStatus
from talkoot.node.launch import _watch, line_pauses
from talkoot.node.view import (
    NodeRates,
    RateMeter,
    hours_in_words,
    line,
    live_panel,
    panel,
    state_in_words,
    summary,
)
from talkoot.terminal import LOG_FILE_BYTES, to_json

WIDTH = 80
STATUS = NodeStatus(
    state=NodeState.SERVING,
    experts=12,
    capacity=18,
    adopted=2,
    updates=1234,
    rows=50_000,
    queued_rows=512,
    peers=9,
    pause_reason="",
    calls=100,
    uploaded_bytes=10_000_000,
    downloaded_bytes=20_000_000,
    upload_mbit=8.0,
    download_mbit=None,
    memory_bytes=600_000_000,
    memory_limit_bytes=2_000_000_000,
    busy_s=12.0,
    threads=2,
    contributed_rows=7_000_000,
    contributed_updates=34_567,
    contributed_hours=12.3,
    replicated=3,
    reachability="relayed by 2 relays",
    reachability_advice="forward TCP ports 1 and 2 on your router to 192.168.1.2",
    handed_over=0,
    trained=11,
    trainers=3,
    trainers_now=2,
    swarm_trainers=4,
    swarm_experts=32,
    loss=3.2145,
    loss_at_first=4.1,
    signed=SignedWork(Work(pairs=6_900_000, updates=34_000), 5),
)
LATER = replace(
    STATUS, calls=131, rows=54_120, uploaded_bytes=11_500_000, downloaded_bytes=21_000_000, busy_s=15.4
)
numbers = st.integers(0, 2**62)
statuses = st.builds(
    NodeStatus,
    **{field.name: numbers for field in fields(NodeStatus)}
    | {
        "state": st.sampled_from(NodeState),
        "pause_reason": st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=200),
        "reachability": st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=200),
        "reachability_advice": st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=200),
        "clock_warning": st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=200),
        "loss_age": st.sampled_from(["", "12 min"]),
        "unsteady": st.lists(st.text("abc ", max_size=40), max_size=5).map(tuple),
        "upload_mbit": st.none() | st.floats(0.01, 1e6),
        "download_mbit": st.none() | st.floats(0.01, 1e6),
        "busy_s": st.floats(0, 1e9),
        "contributed_hours": st.floats(0, 1e6),
        "swarm_trainers": st.none() | numbers,
        "loss": st.none() | st.floats(0, 1e6),
        "loss_at_first": st.none() | st.floats(0, 1e6),
        "alone": st.just(()),
        "signed": st.builds(SignedWork, st.builds(Work, numbers, numbers, numbers), numbers),
    },
)


def terminal(file: io.StringIO, width: int = WIDTH) -> Console:
    """A console like the command's that records its output."""
    return Console(
        file=file,
        width=width,
        height=25,
        force_terminal=True,
        soft_wrap=True,
        highlight=False,
        markup=False,
        record=True,
    )


def shown(status: NodeStatus, rates: NodeRates, width: int = WIDTH) -> list[str]:
    console = terminal(io.StringIO(), width)
    with Live(console=console, auto_refresh=False) as live:
        live.update(panel("sauna", status, rates), refresh=True)
    return console.export_text().rstrip("\n").splitlines()


def test_a_glance_tells_what_a_node_does_and_gave() -> None:
    meter = RateMeter()
    meter.note(STATUS, 100.0)
    text = "\n".join(shown(LATER, meter.note(LATER, 110.0), 100))
    for said in (
        "talkoot node in sauna",
        "state     serving ",
        "trained   11 experts with 1,234 updates",
        "computed  54,120 rows for 3 trainers; 412 rows/s now, 512 rows waiting",
        "model     validation loss 3.215; 4.100 when this node first looked",
        "experts   12 of the swarm's 32 (38%), and may adopt 6 more",
        "up 1.2 of 8 Mbit/s   down 0.8 Mbit/s",
        "34% busy, 2 threads",
        "600 MB of 2 GB",
        "reached   relayed by 2 relays; forward TCP ports 1 and 2 on your router to 192.168.1.2 ",
        "all runs  computed 7,000,000 rows, 34,567 updates, 12 h 18 min served",
        "          of that, 5 callers have signed for 6,900,000 rows so far",
    ):
        assert said in text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "serving "),
        ({"trainers_now": 0, "swarm_trainers": None}, "serving "),
        ({"trainers_now": 0, "swarm_trainers": 0}, "serving; idle: nobody trains"),
        ({"trainers_now": 0}, "serving; idle: no trainer needs this node now"),
        ({"trainers_now": 0, "swarm_trainers": 0, "state": NodeState.JOINING}, "joining "),
    ],
)
def test_idleness_is_told(changes: dict[str, Any], said: str) -> None:
    assert any(f"state     {said}" in row for row in shown(replace(STATUS, **changes), NodeRates()))


def test_a_node_that_computes_for_a_trainer_that_only_validates_is_not_idle() -> None:
    status = replace(STATUS, trainers=0, trainers_now=0)
    rows = shown(status, NodeRates(rows=347.0))
    assert any("state     serving  " in row for row in rows)
    assert any("computed  50,000 rows; 347 rows/s now" in row for row in rows)


def test_an_old_loss_is_shown_with_its_age() -> None:
    said = "\n".join(shown(replace(STATUS, loss_age="12 min"), NodeRates(), 100))
    assert "model     validation loss 3.215 (12 min ago); 4.100 when this node first looked" in said


def test_a_node_without_experts_says_nothing_of_training() -> None:
    status = replace(
        STATUS, experts=0, capacity=0, rows=0, trainers_now=0, swarm_trainers=0, memory_disk_bytes=7
    )
    text = "\n".join(shown(status, NodeRates()))
    assert "experts   0 of the swarm's 32 (0%): it takes none " in text
    for silent in ("idle", "trained   ", "model     ", "computed  "):
        assert silent not in text
    assert "memories  " in text


def test_a_full_node_has_no_room() -> None:
    assert any(
        "experts   18 of the swarm's 32 (56%) " in row
        for row in shown(replace(STATUS, experts=18), NodeRates())
    )


def test_no_part_of_the_panel_stays_when_the_terminal_shows_a_ctrl_c() -> None:
    """The terminal writes ^C where the cursor is. In the last column, that would move the cursor to the next line."""
    file = io.StringIO()
    with Live(console=terminal(file), auto_refresh=False, transient=True) as live:
        live.update(live_panel("sauna", STATUS, NodeRates()), refresh=True)
        assert file.getvalue().endswith("\n"), "the cursor is in the first column of an empty line"


@pytest.mark.parametrize("state", NodeState)
@pytest.mark.parametrize("busy", [0.0, 0.3, 1.0])
def test_nothing_is_red_in_normal_service(state: NodeState, busy: float) -> None:
    status = replace(STATUS, state=state, memory_bytes=STATUS.memory_limit_bytes)
    console = Console(width=100, force_terminal=True, color_system="truecolor")
    drawn = console.render(panel("sauna", status, NodeRates(busy=busy)), console.options)
    colours = {
        s.style.color.get_truecolor() for s in drawn if s.style is not None and s.style.color is not None
    }
    reds = [c for c in colours if c.red > 120 and c.red > 2 * max(c.green, c.blue)]
    assert bool(reds) is (state is NodeState.UNREACHABLE)


def test_the_summary_says_what_was_achieved_and_thanks() -> None:
    said = summary(LATER)
    assert said.startswith(
        "in this run: 11 experts trained with 1,234 updates, 54,120 rows for 3 trainers; in all runs"
    )
    assert said.endswith("Thank you for taking part!")


def test_the_summary_of_a_node_without_experts_says_what_it_did_for_memories() -> None:
    status = replace(STATUS, capacity=0, rows=0, contributed_rows=0, contributed_hours=3.2, memory_queries=1)
    said = summary(status)
    assert said.startswith("in this run: 1 query of memories answered; in all runs 3 h 12 min served; ")
    assert "updates" not in said
    both = replace(LATER, memory_disk_bytes=7, memory_queries=1028)
    assert "54,120 rows for 3 trainers, 1,028 queries of memories answered; in all runs" in summary(both)


@given(st.floats(0, 1e6))
def test_hours_are_told_to_the_minute(hours: float) -> None:
    *whole, minutes, _ = hours_in_words(hours).replace(",", "").removesuffix("").split()
    told = (int(whole[0]) if whole else 0) + int(minutes) / 60
    assert 0 <= hours - told + 1e-6 < 1 / 60 + 1e-5


def test_memories_have_a_line_where_there_are_any() -> None:
    meter = RateMeter()
    meter.note(replace(STATUS, memory_queries=3), 100.0)
    status = replace(STATUS, memory_shards=1200, memory_disk_bytes=5 * 10**9, memory_queries=28)
    rates = meter.note(status, 110.0)
    words = "1,200 shards served, 5 GB on disk, 28 queries, 2.5/s now"
    assert any(f"memories  {words}" in text for text in shown(status, rates))
    assert f"memories: {words}" in line(status, rates)
    assert "memories" not in line(STATUS, rates)


def test_nothing_is_cut_off_for_a_node_of_a_hundred_experts() -> None:
    status = replace(
        STATUS,
        experts=128,
        capacity=192,
        adopted=64,
        handed_over=128,
        reachability_advice="pass --port, and forward that TCP port on your router to 192.168.178.123",
    )
    text = "\n".join(shown(status, NodeRates()))
    assert "128 of the swarm's 32" in text
    assert "on your router to 192.168.178.123" in " ".join(text.replace("│", "").split())
    assert "…" not in text


@settings(max_examples=25)
@given(statuses, st.sampled_from([WIDTH, 100, 200]))
def test_it_is_as_wide_as_the_terminal_whatever_the_numbers(status: NodeStatus, width: int) -> None:
    rates = RateMeter().note(status, 0.0)
    console = terminal(io.StringIO(), width)
    lines = console.render_lines(panel("sauna", status, rates), console.options)
    assert len(lines) <= 24
    assert {sum(segment.cell_length for segment in row) for row in lines} == {width}


def test_no_word_is_broken() -> None:
    for width in range(60, 130):
        rows = [row.strip("│ ") for row in shown(STATUS, NodeRates(), width)]
        words = {word for row in rows for word in row.split()}
        assert {"router", "192.168.1.2", "validation", "trainers;", "34,567"} <= words, width


def test_the_panel_stays_in_its_place_between_looks() -> None:
    """Each refresh moves the cursor up and overwrites. Nothing is cleared first, so nothing flickers."""
    file = io.StringIO()
    with Live(console=terminal(file), auto_refresh=False) as live:
        for _ in range(3):
            before = file.tell()
            live.update(panel("sauna", STATUS, NodeRates()), refresh=True)
            written = file.getvalue()[before:]
            assert "\x1b[2J" not in written
            assert written.count("\n") <= 14
    assert file.getvalue().count("\x1b[1A") >= 2 * 9


@pytest.mark.parametrize(
    ("state", "pause_reason", "words"),
    [
        (NodeState.JOINING, "", "joining"),
        (NodeState.PAUSED, "paused until 22:00", "paused until 22:00"),
        (
            NodeState.SERVING,
            "resumed by hand, else paused: on battery",
            "serving (resumed by hand, else paused: on battery)",
        ),
        (NodeState.UNREACHABLE, "", "no other node answers"),
    ],
)
def test_the_state_comes_with_its_reason(state: NodeState, pause_reason: str, words: str) -> None:
    status = replace(STATUS, state=state, pause_reason=pause_reason)
    assert state_in_words(status) == words
    assert words in "\n".join(shown(status, NodeRates()))
    assert line(status, NodeRates()).startswith(f"{words}: 12 of at most 18 experts")


def test_a_log_file_holds_the_state_lines_of_a_month() -> None:
    month_s = timedelta(days=30).total_seconds()
    lines = sum(1 for _ in takewhile(lambda at: at < month_s, accumulate(line_pauses())))
    assert lines * 1000 < LOG_FILE_BYTES


def test_the_log_says_a_new_state_soon() -> None:
    """Even after hours, when lines have become rare."""
    said = list[tuple[float, NodeState]]()
    node: Any = SimpleNamespace(state=NodeState.SERVING, status=lambda: replace(STATUS, state=node.state))

    async def scenario() -> float:
        shows = asyncio.create_task(
            _watch(node, line_pauses(), lambda status, _: said.append((now(), status.state)))
        )
        await asyncio.sleep(10_000.0)
        node.state, began = NodeState.PAUSED, now()
        await asyncio.sleep(15.0)
        shows.cancel()
        return began

    with virtual_time() as runner:
        began = runner.run(scenario())
    assert said[-1][1] is NodeState.PAUSED
    assert said[-1][0] <= began + 10.0


def test_a_line_for_the_log_says_the_same() -> None:
    meter = RateMeter()
    meter.note(STATUS, 100.0)
    assert line(LATER, meter.note(LATER, 110.0)) == (
        "serving: 12 of at most 18 experts, 2 adopted, 3 also on other nodes, 11 experts trained with 1,234 updates, "
        "54,120 rows for 3 trainers, 3.1 calls/s, 412 rows/s, "
        "512 rows queued, "
        "up 1.2 and down 0.8 Mbit/s, 34% busy, memory 600 MB of 2 GB, 9 DHT peers, "
        "reached: relayed by 2 relays; forward TCP ports 1 and 2 on your router to 192.168.1.2, "
        "in all runs computed 7,000,000 rows, 34,567 updates, 12 h 18 min served, "
        "of that, 5 callers have signed for 6,900,000 rows so far"
    )


@pytest.mark.parametrize(
    ("signed", "said"),
    [
        (SignedWork(), "so far, no receipt counts for that"),
        (SignedWork(Work(pairs=1), 1), "of that, 1 caller has signed for 1 row so far"),
        (SignedWork(Work(queries=1), 1), "of that, 1 caller has signed for 0 rows and 1 query so far"),
        (
            SignedWork(Work(pairs=5, queries=70), 2),
            "of that, 2 callers have signed for 5 rows and 70 queries so far",
        ),
    ],
)
def test_what_trainers_signed_stands_beside_what_the_node_computed(signed: SignedWork, said: str) -> None:
    status = replace(STATUS, signed=signed)
    assert said in "\n".join(shown(status, NodeRates(), 100))
    assert said in line(status, NodeRates())
    assert f"; {said}" in summary(status)


def test_the_first_look_and_one_in_the_same_moment_measure_nothing() -> None:
    meter = RateMeter()
    assert meter.note(STATUS, 1.0) == NodeRates()
    assert meter.note(LATER, 1.0) == NodeRates()


def test_a_program_reads_every_field() -> None:
    assert '"pause_reason": ""' in to_json(asdict(STATUS) | {"state": STATUS.state.value})


# The flags


def test_every_flag_is_shown_with_its_unit_and_default() -> None:
    said = " ".join(run_here("node", "--help", COLUMNS="200").stdout.split())
    for flag, words in {
        "--threads": "[default: one per core]",
        "--memory": "if needed. [default: no limit]",
        "--upload-mbit": "in Mbit/s. [default: no limit]",
        "--download-mbit": "in Mbit/s. [default: no limit]",
        "--schedule": "[default: always]",
        "--only-when-idle": "[default: no]",
        "--not-on-battery": "[default: no]",
        "--niceness": f"[default: {NodeSettings().niceness}]",
    }.items():
        assert flag in said
        assert words in said[said.index(flag) :]
    assert "such as 2GB" in said[said.index("--memory") :]


def test_a_wrong_flag_is_one_clear_line() -> None:
    ended = run_here("node", "--join", "talkoot2", "--memory", "much", "--schedule", "mon-fry 1:00-2:00")
    assert ended.returncode == 2
    (error,) = [row for row in ended.stderr.splitlines() if row]
    assert error.startswith("error: ")
    assert "memory: 'much' is not a size" in error
    assert "schedule: 'mon-fry' names no days" in error


def test_a_node_lets_other_programs_go_first_and_keeps_to_its_hours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TALKOOT_NODE_NICENESS")  # as other tests have it
    manifest, begins = tmp_path / "swarm.toml", datetime.now() + timedelta(hours=10)
    manifest.write_text('name = "sauna"\n')
    hours = f"{begins:%H}:00-{begins + timedelta(hours=1):%H}:00"
    found = ["node", "--new", str(manifest), "--host", "127.0.0.1", "--state", str(tmp_path / "state")]
    options = ["--schedule", hours, "--log-format", "json", "--p2pd", "auto"]
    with Preloaded(
        *("-m", "talkoot", *found, *options), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        try:
            assert process.stdout is not None
            events = map(json.loads, process.stdout)  # ends when the process does
            event = next(event for event in events if event["event"] == "state")
            assert (event["state"], event["pause_reason"]) == ("paused", f"paused until {begins:%H}:00")
            assert event["experts"] == 0
            node = psutil.Process(process.pid)
            wait_until(lambda: "p2pd" in map(name_of, node.children()), "p2pd")
            family = [node, *node.children()]
            assert {member.nice() for member in family} == {max(10, os.nice(0))}
        finally:
            process.terminate()
            process.wait(60)


@pytest.mark.parametrize("name", ["node", "train", "dashboard"])
def test_help_imports_nothing_heavy(name: str) -> None:
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom talkoot.cli import app\n"
        f"assert CliRunner().invoke(app, ['{name}', '--help']).exit_code == 0\n"
        "print(sorted({'torch', 'hivemind.utils', 'grpc', 'psutil', 'numpy'} & set(sys.modules)))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert ended.stdout == "[]\n", ended.stderr
