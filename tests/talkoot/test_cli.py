"""The command as users run it: in processes of its own, judged by what it prints and how it ends."""

import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import psutil
import pytest
from commands import DEADLINE_S, HOST, assert_one_clear_line, command, run, run_here, sockets_of, wait_until
from locked_folder import locked
from other_processes import gone
from preloaded import Preloaded
from typer.main import get_command

from dht.invites import Invite
from dht.manifest import Manifest
from peer import PROTOCOL_VERSION, SOFTWARE_VERSION
from peer.transport.addresses import Multiaddress
from peer.transport.endpoints import Endpoint
from talkoot.cli import app


@dataclass(frozen=True)
class Founder:
    process: subprocess.Popen[str]
    invite: str
    state: Path
    metrics_port: int


@contextmanager
def founding(folder: Path, *options: str) -> Iterator[Founder]:
    """Starts a founder's node, and yields once it serves. Options are added to its command line."""
    manifest, invite, state = folder / "swarm.toml", folder / "invite", folder / "state"
    manifest.write_text('name = "taken"\n[model]\nlayers = 1\nhidden = 16\n[experts]\ngrid = [2, 2]\n')
    log = (folder / "log").open("w+")
    process = Preloaded(
        *("-m", "talkoot", "node", "--new", str(manifest), "--host", HOST, "--state", str(state)),
        *("--threads", "1", "--invite-file", str(invite), *options),
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        start_new_session=True,
    )
    try:
        wait_until(lambda: invite.exists() or process.poll() is not None, "the invite")
        wait_until(lambda: "metrics at" in (folder / "log").read_text(), "the node")
        port = re.search(r"metrics at http://127\.0\.0\.1:(\d+)/", (folder / "log").read_text())
        assert port is not None
        yield Founder(process, invite.read_text().strip(), state, int(port[1]))
    finally:
        process.kill()
        process.communicate()
        log.close()


@pytest.fixture(scope="module")
def founder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Founder]:
    with founding(tmp_path_factory.mktemp("founder"), "--experts", "4") as running:
        yield running


@contextmanager
def listening() -> Iterator[int]:
    """A port at which something else listens and sends nothing."""
    with socket.create_server((HOST, 0)) as server:
        yield server.getsockname()[1]


def silent_invite(founder: Founder, port: int) -> str:
    """The founder's invite, with a port at which nobody answers."""
    invite = Invite.parse(founder.invite)
    return str(Invite(invite.keys, (Multiaddress.of(Endpoint.of(HOST, port), invite.keys.author),)))


# The commands that everybody types first

COMMANDS = ("node", "train", "generate", "evaluate", "status", "dashboard", "doctor", "demo", "invite")


def processor_s() -> float:
    """Processor seconds of the child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_help_is_instant() -> None:
    took_s = []
    for _ in range(3):  # the first start compiles
        before = processor_s()
        ended = subprocess.run(command("--help"), capture_output=True, text=True, timeout=DEADLINE_S)
        took_s.append(processor_s() - before)  # others may use the machine, so not the clock's
    assert min(took_s) < 0.5
    assert ended.returncode == 0
    for name in COMMANDS:
        assert name in ended.stdout


def test_help_lists_every_command_once_with_its_whole_summary() -> None:
    shown = run_here("--help").stdout
    commands = shown[shown.index("Take part:") :]
    listed = re.findall(r"^  ([a-z]+) ", commands, re.MULTILINE)
    assert len(re.findall(r"^\S", commands, re.MULTILINE)) >= 4, "headings"
    assert sorted(listed) == sorted(get_command(app).commands)  # type: ignore[attr-defined]  # of a group
    assert max(map(len, shown.splitlines())) <= 80
    assert "..." not in shown.replace("[ARGS]...", ""), "no summary is cut"


def every_command(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield path
    for name, below in getattr(command, "commands", {}).items():
        yield from every_command(below, (*path, name))


@pytest.mark.parametrize("path", tuple(every_command(get_command(app))), ids=" ".join)
def test_help_shows_no_types_of_python(path: tuple[str, ...]) -> None:
    shown = run_here(*path, "--help").stdout
    assert "Usage:" in shown
    assert not re.search(r"<(str|int|float|path|list|bool)|<=|>=|[{}]", shown), shown


MISTAKES = (
    *("node --colour", "train --steps many", "dashboard --port -1", "node --memory lots"),
    *("train --join hello", "status --join hello", "serve --max-tokens 0", "nod"),
)
TELLS_WHAT_IT_IMPORTS = """
import sys
from talkoot.cli import app

for line in sys.argv[1:]:
    sys.argv[1:] = line.split()
    try:
        app()
    except SystemExit as ended:
        print(line, ended.code, sorted({"torch", "scipy", "starlette"} & set(sys.modules)))
"""


def test_a_mistake_is_told_before_torch_is_imported() -> None:
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", TELLS_WHAT_IT_IMPORTS, *MISTAKES],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.stdout.splitlines() == [f"{line} 2 []" for line in MISTAKES], ended.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "--jion", "x"], "No such option: --jion"),
        (["train", "--steps"], "Option '--steps' requires an argument"),
        (["nod"], "No such command 'nod'. Did you mean 'node'? See `"),
        (["--jion"], "No such option: --jion"),
        (["memory", "nod"], "No such command 'nod'"),
    ],
)
def test_a_mistyped_command_line_is_told_in_one_line_with_a_code(arguments: list[str], said: str) -> None:
    assert_one_clear_line(run_here(*arguments), said, "--help` [T101]")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str) -> None:
    ended = run_here(name, "--help")
    assert ended.returncode == 0
    assert "Usage:" in ended.stdout


def test_version_names_software_and_protocol() -> None:
    assert run("--version").stdout == f"talkoot {SOFTWARE_VERSION}, protocol version {PROTOCOL_VERSION}\n"


@pytest.mark.parametrize(
    "arguments", ["", "--version", "--help", "memory --help", "pause --help", "node --help"]
)
def test_help_that_a_full_disk_has_no_room_for_fails_in_one_line(arguments: str) -> None:
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(
            [sys.executable, "-m", "talkoot", *arguments.split()],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=240,
            check=False,
        )
    assert_one_clear_line(ended, "can't write the results to standard output: No space left on device")


def test_a_command_ends_without_the_interpreters_own_end() -> None:
    """During the interpreter's own shutdown, threads of gRPC would still run."""
    start = "import atexit, sys; from talkoot.cli import main; atexit.register(print, 'too late'); main()"
    ended = subprocess.run(
        [sys.executable, "-c", start, "--version"], capture_output=True, text=True, timeout=240, check=True
    )
    assert ended.stdout.startswith("talkoot ")
    assert "too late" not in ended.stdout


def test_example_manifest_is_the_demos() -> None:
    example = Path(__file__).parents[2] / "deploy" / "swarm.toml"
    assert Manifest.from_toml(example) == Manifest.founded({"name": "demo"})


# What can be wrong


def test_wrong_invite_is_refused() -> None:
    assert_one_clear_line(run_here("node", "--join", "hello"), "an invite starts with 'talkoot2'")


@pytest.mark.parametrize("name", ["train", "status", "dashboard"])
def test_truncated_invite_is_refused(founder: Founder, name: str) -> None:
    assert_one_clear_line(run_here(name, "--join", founder.invite[:-5]), "copy the whole line again")


@pytest.mark.parametrize(
    "arguments",
    [
        *(["node"], ["train"], ["generate"], ["evaluate", __file__], ["status"], ["dashboard"], ["doctor"]),
        ["service", "install"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_invite_is_looked_for_in_the_file_that_is_named(arguments: list[str]) -> None:
    ended = run_here(*arguments, "--join", "@no-such-file")
    assert_one_clear_line(ended, "can't read the invite from no-such-file: No such file or directory")
    assert ended.stderr.rstrip().endswith("[T102]")


def test_a_result_that_is_there_outlives_a_command_that_can_not_begin(
    founder: Founder, tmp_path: Path
) -> None:
    (tmp_path / "result.json").write_text("{}")
    ended = run_here("train", "--join", "hello", "--json", str(tmp_path / "result.json"))
    assert_one_clear_line(ended, "an invite starts with 'talkoot2'")
    assert (tmp_path / "result.json").read_text() == "{}"
    ended = run_here("train", "--join", founder.invite, "--json", str(tmp_path / "no" / "such.json"))
    assert_one_clear_line(ended, "can't write", "pass another --json FILE")


def test_a_state_folder_that_is_a_file_is_told_before_it_joins(founder: Founder, tmp_path: Path) -> None:
    (tmp_path / "swarm.toml").touch()
    options = ["--join", founder.invite, "--state", str(tmp_path / "swarm.toml")]
    assert_one_clear_line(
        run_here("generate", *options, "--prompt", "a"),
        "swarm.toml: it is not a folder; pass another --state",
    )


def test_missing_invite_is_asked_for() -> None:
    assert_one_clear_line(run_here("train"), "--join")


def test_a_demo_of_no_text_does_not_begin(tmp_path: Path) -> None:
    ended = run_here("demo", "--data", str(tmp_path))
    assert_one_clear_line(ended, "no .txt, .jsonl or .parquet file in", f"'{tmp_path / '*'}'", "[T111]")
    assert "starts" not in ended.stderr


def test_a_founder_with_too_little_memory_publishes_nothing(tmp_path: Path) -> None:
    (tmp_path / "swarm.toml").write_text('name = "sauna"')
    state = tmp_path / "state"
    ended = run_here("node", "--new", str(tmp_path / "swarm.toml"), "--memory", "1MB", "--state", str(state))
    assert_one_clear_line(
        ended, "1 MB is too little for one expert of this swarm: the smallest that works is"
    )
    assert not state.exists()


def test_a_link_that_is_none_is_told_with_an_example() -> None:
    assert_one_clear_line(run_here("demo", "--link", "fast"), "'fast' is not part of a link", "100mbit,80ms")


@pytest.mark.parametrize("arguments", [[], ["--new", "swarm.toml", "--join", "talkoot2"]])
def test_node_is_told_to_found_or_to_join(arguments: list[str]) -> None:
    assert_one_clear_line(run_here("node", *arguments), "either --new swarm.toml", "or --join INVITE")


@pytest.mark.parametrize("name", ["node", "train"])
def test_unreachable_bootstrap_is_named(founder: Founder, tmp_path: Path, name: str) -> None:
    with listening() as port:
        pass  # nobody listens there any more
    host = ["--host", HOST] if name == "node" else []
    ended = run(name, "--join", silent_invite(founder, port), "--state", str(tmp_path / "state"), *host)
    assert_one_clear_line(ended, f"/ip4/{HOST}/tcp/{port}")


def test_a_nodes_log_names_the_address_to_join_through(founder: Founder) -> None:
    log = (founder.state / "node.log").read_text()
    assert f"--bootstrap {Invite.parse(founder.invite).bootstrap[0]}\n" in log


@pytest.mark.parametrize("option", ["--port", "--metrics-port"])
def test_busy_port_is_named(tmp_path: Path, option: str) -> None:
    manifest = tmp_path / "swarm.toml"
    manifest.write_text('name = "busy"\n')
    with listening() as port:
        ended = run_here(
            *("node", "--new", str(manifest), "--host", HOST, "--state", str(tmp_path / "state")),
            *("--experts", "0", option, str(port)),
        )
    assert_one_clear_line(ended, f"{HOST} port {port}", "pass another")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--device", "cuda:99"], "device cuda:99: torch finds"),
        (["--device", "cpu", "--precision", "tf32"], "precision tf32"),
    ],
)
def test_a_device_that_is_not_there_is_named(tmp_path: Path, options: list[str], said: str) -> None:
    manifest = tmp_path / "swarm.toml"
    manifest.write_text('name = "fast"\n')
    assert_one_clear_line(run_here("node", "--new", str(manifest), "--host", HOST, *options), said)


def test_address_that_nobody_can_reach_is_refused(tmp_path: Path) -> None:
    manifest = tmp_path / "swarm.toml"
    manifest.write_text('name = "everywhere"\n')
    assert_one_clear_line(run_here("node", "--new", str(manifest), "--host", "0.0.0.0"), "--host")
    assert_one_clear_line(
        run_here("node", "--new", str(manifest), "--host", "my-machine"), "is not an IP address"
    )


def test_missing_and_empty_data_are_named(founder: Founder, tmp_path: Path) -> None:
    missing, empty = tmp_path / "missing.txt", tmp_path / "empty.txt"
    empty.touch()
    train = ["train", "--join", founder.invite, "--state", str(tmp_path / "state"), "--data"]
    assert_one_clear_line(run_here(*train, str(missing)), f"no file or folder {missing}")
    assert_one_clear_line(run_here(*train, str(empty)), f"{empty} is empty")
    assert_one_clear_line(run_here("demo", "--data", str(missing)), f"no file or folder {missing}")


def test_unknown_setting_is_named(founder: Founder, tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text("colour = 3\n")
    assert_one_clear_line(run_here("node", "--join", founder.invite, "--config", str(config)), "colour")
    ended = run_here("train", "--join", founder.invite, TALKOOT_TRAIN_COLOUR="3")
    assert_one_clear_line(ended, "TALKOOT_TRAIN_COLOUR")


def test_missing_settings_file_is_named(founder: Founder, tmp_path: Path) -> None:
    join = ["node", "--join", founder.invite, "--config", str(tmp_path / "none.toml")]
    assert_one_clear_line(run_here(*join), "none.toml")


def test_setting_out_of_bounds_is_named(founder: Founder) -> None:
    assert_one_clear_line(run_here("train", "--join", founder.invite, "--steps", "0"), "steps")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("train --steps ten", "--steps must be a whole number, not 'ten'"),
        ("train --learning-rate fast", "--learning-rate must be a number, not 'fast'"),
        ("demo --nodes 99", "--nodes must be at most 16, not '99'"),
        ("node --log-format xml", "--log-format: 'xml' is not one of 'text', 'json'"),
        ("dashboard --port 99999", "port must be at most 65535, not 99999"),
    ],
)
def test_a_wrong_value_is_told_in_plain_words(arguments: str, said: str) -> None:
    assert_one_clear_line(run_here(*arguments.split()), said)


def test_router_that_does_not_exist_is_named_with_those_that_do(founder: Founder) -> None:
    ended = run_here("train", "--join", founder.invite, "--router", "best")
    assert_one_clear_line(ended, "router", "'product-key', 'noisy-top-k', 'switch', 'base' or 'glam'")


def test_number_of_experts_that_a_router_can_not_have_is_named(founder: Founder, tmp_path: Path) -> None:
    state = str(tmp_path / "state")
    ended = run_here(
        "train", "--join", founder.invite, "--state", state, "--router", "switch", "--top-k", "2"
    )
    assert_one_clear_line(ended, "top_k: switch sends each token to 1 expert")


def test_option_that_does_not_exist_is_named() -> None:
    ended = run_here("train", "--colour", "3")
    assert ended.returncode == 2
    assert "--colour" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('name = "x-y"\n[model]\ncolour = 3\n', "colour"),
        ('name = "X Y"\n', "name"),
        ('name = "x-y"\n[experts]\nkind = "sheep"\n', "sheep"),
        (f'name = "x-y"\nprotocol_version = {PROTOCOL_VERSION + 1}\n', f"version {PROTOCOL_VERSION + 1}"),
    ],
)
def test_manifest_that_is_not_valid_is_refused(tmp_path: Path, text: str, said: str) -> None:
    manifest = tmp_path / "swarm.toml"
    manifest.write_text(text)
    assert_one_clear_line(run_here("node", "--new", str(manifest), "--host", HOST), said)


def test_missing_manifest_is_named(tmp_path: Path) -> None:
    assert_one_clear_line(run_here("node", "--new", str(tmp_path / "none.toml")), "none.toml")


@pytest.mark.parametrize("name", ["node", "train"])
def test_state_folder_in_use_is_named(founder: Founder, name: str) -> None:
    host = ["--host", HOST] if name == "node" else []
    ended = run_here(name, "--join", founder.invite, "--state", str(founder.state), *host)
    assert_one_clear_line(ended, f"another process uses the state folder {founder.state}", "--state")


def test_a_bootstrap_address_that_is_none_is_named(tmp_path: Path) -> None:
    manifest = tmp_path / "swarm.toml"
    manifest.write_text('name = "taken"\n')
    state = str(tmp_path / "state")
    found = ["node", "--new", str(manifest), "--host", HOST, "--state", state, "--bootstrap", "there"]
    assert_one_clear_line(run_here(*found), "--bootstrap there")


def test_demo_of_one_node_has_none_to_lose() -> None:
    assert_one_clear_line(run_here("demo", "--nodes", "1"), "--no-kill")


def test_result_that_can_not_be_written_is_known_before_the_work(founder: Founder, tmp_path: Path) -> None:
    nowhere = tmp_path / "no" / "such.json"
    state = str(tmp_path / "state")
    assert_one_clear_line(run_here("demo", "--json", str(nowhere)), str(nowhere))
    train = run_here("train", "--join", founder.invite, "--state", state, "--json", str(nowhere))
    assert_one_clear_line(train, str(nowhere))


# What a running swarm shows


def test_status_lists_nodes_and_experts(founder: Founder) -> None:
    ended = run("status", "--join", founder.invite)
    assert ended.returncode == 0, ended.stderr
    assert "1 node, 4 of 4 experts alive" in ended.stdout
    assert "layer 0" in ended.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="a program's streams are closed in another way there")
def test_commands_work_without_standard_streams(founder: Founder, tmp_path: Path) -> None:
    closed = ["sh", "-c", 'exec "$@" <&- >&-', "sh"]
    status = [*closed, *command("status", "--join", founder.invite)]
    shown = subprocess.run(status, stderr=subprocess.PIPE, text=True, timeout=DEADLINE_S)
    assert shown.returncode == 0, shown.stderr
    generate = [*closed, *command("generate", "--join", "none", "--prompt", "-")]
    ended = subprocess.run(generate, stderr=subprocess.PIPE, text=True, timeout=DEADLINE_S)
    assert_one_clear_line(ended, "invite")
    doctor = ["sh", "-c", 'exec "$@" 2>&-', "sh", *command("doctor", "--state", str(tmp_path / "state"))]
    checked = subprocess.run(doctor, stdout=subprocess.PIPE, text=True, timeout=DEADLINE_S)
    assert "p2pd" in checked.stdout


def test_status_without_an_invite_is_that_of_the_node_that_runs_here(
    founder: Founder, tmp_path: Path
) -> None:
    shown = run("status", "--json", "--state", str(founder.state))
    assert shown.returncode == 0, shown.stderr
    assert json.loads(shown.stdout)["swarm"].startswith("taken-")
    assert_one_clear_line(
        run("status", "--state", str(tmp_path / "none")), "pass --join INVITE", "or the --state"
    )


def test_trainer_with_too_short_a_text_is_told_what_it_needs(founder: Founder, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("too short")
    ended = run_here("train", "--join", founder.invite, "--state", str(tmp_path / "s"), "--data", str(text))
    assert_one_clear_line(ended, "9 bytes")


# How it stops


def kin(process: subprocess.Popen[str]) -> list[psutil.Process]:
    parent = psutil.Process(process.pid)
    return [parent, *parent.children(recursive=True)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serving_node_leaves_at_once_and_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    options = ("--experts", "1", "--drain-timeout", "600", "--p2pd", "auto")
    with founding(tmp_path, *options) as node:
        wait_until(lambda: bool(sockets_of(kin(node.process))), "p2pd's socket")
        processes = kin(node.process)
        sockets = sockets_of(processes)
        os.killpg(node.process.pid, number)  # as a terminal does it
        wait_until(lambda: gone(processes[1:]), "p2pd's end")
        node.process.send_signal(number)  # impatience changes nothing
        output, _ = node.process.communicate(timeout=DEADLINE_S)
        assert node.process.returncode == 0, (tmp_path / "log").read_text()
        assert f"invite: {node.invite}\n" in output
    assert gone(processes)
    said = (tmp_path / "log").read_text()
    assert "left the swarm" in said
    assert "error" not in said
    assert "Traceback" not in said
    assert not any(path.exists() for path in sockets)


def test_a_founders_invite_holds_when_it_comes_back(tmp_path: Path) -> None:
    with founding(tmp_path, "--experts", "1") as first:
        first.process.send_signal(signal.SIGTERM)
        first.process.communicate(timeout=DEADLINE_S)
    (tmp_path / "invite").unlink()
    assert "this state folder was used in" not in (tmp_path / "log").read_text()
    (tmp_path / "state" / "manifests" / "sauna-pMaMF1XMTXsX").touch()  # that of a swarm that it joined
    with founding(tmp_path, "--experts", "1") as second:
        assert second.invite == first.invite
        assert (
            "this state folder was used in sauna-pMaMF1XMTXsX before: all" in (tmp_path / "log").read_text()
        )
        assert run_here("invite", "--state", str(second.state)).stdout == f"invite: {second.invite}\n"


def test_a_founder_that_comes_back_with_another_manifest_changes_nothing(tmp_path: Path) -> None:
    def files() -> dict[Path, bytes]:
        """All but the log."""
        paths = (path for path in (tmp_path / "state").rglob("*") if not path.name.startswith("node.log"))
        return {path: path.read_bytes() for path in paths if path.is_file()}

    with founding(tmp_path, "--experts", "1") as first:
        first.process.send_signal(signal.SIGTERM)
        first.process.communicate(timeout=DEADLINE_S)
    before = files()
    other = tmp_path / "other.toml"
    other.write_text('name = "taken"\n[model]\nlayers = 1\nhidden = 32\n')
    ended = run("node", "--new", str(other), "--host", HOST, "--state", str(tmp_path / "state"))
    assert_one_clear_line(ended, "model.hidden is 16, not 32. A swarm's", "pass the original file", "[T110]")
    assert files() == before
    with founding(tmp_path, "--experts", "1") as second:
        assert second.invite == first.invite
        assert "skipping" not in (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    ("name", "number"), [("node", signal.SIGINT), ("train", signal.SIGTERM), ("status", signal.SIGINT)]
)
def test_joining_can_be_stopped(founder: Founder, tmp_path: Path, name: str, number: signal.Signals) -> None:
    host = ["--host", HOST] if name == "node" else []
    state = ["--state", str(tmp_path / "state"), "--p2pd", "auto"] if name != "status" else []
    with listening() as port, (tmp_path / "log").open("w+") as log:
        begin = partial(
            Preloaded,
            *("-m", "talkoot", name, "--join", silent_invite(founder, port), *host, *state),
            stderr=log,
            text=True,
            env=os.environ | {"TMPDIR": str(tmp_path)},
        )
        process = begin()

        def joins() -> bool:
            nonlocal process
            if process.poll() is not None:  # it gave up before p2pd had started: the machine is busy
                process = begin()
            if name == "status":  # it needs no p2pd
                return "joining" in (tmp_path / "log").read_text()
            return bool(sockets_of(kin(process)))

        try:
            wait_until(joins, "a join, with p2pd's socket")
            processes = kin(process)
            sockets = sockets_of(processes)
            process.send_signal(number)
            process.wait(DEADLINE_S)
        finally:
            process.kill()
            process.wait()
    said = (tmp_path / "log").read_text()
    assert process.returncode == 128 + number, said
    assert "Traceback" not in said
    wait_until(lambda: gone(processes), "p2pd's end")  # the kernel may be killing it still
    assert not any(path.exists() for path in sockets)
    assert not list(tmp_path.glob("talkoot-*"))


# What becomes of it when nobody reads its output


@contextmanager
def piped(*arguments: object) -> Iterator[tuple[Preloaded, IO[str]]]:
    """A command whose outputs both go to a pipe, and the end from which the test reads."""
    words = ("-m", "talkoot", *map(str, arguments))
    with Preloaded(*words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        try:
            yield process, process.stdout
        finally:
            process.kill()


def test_a_node_goes_on_without_its_terminal(founder: Founder, tmp_path: Path) -> None:
    """For example if the `tee` that it was piped into has ended."""
    log = tmp_path / "node.log"
    options = ("--host", HOST, "--state", tmp_path, "--threads", 1, "--experts", 1)
    with piped("node", "--join", founder.invite, *options) as (node, output):
        output.readline()
        output.close()
        wait_until(lambda: "serving: " in log.read_text(), "the node's state")
        node.terminate()
        assert node.wait(DEADLINE_S) == 0
    said = log.read_text()
    assert said.count("nobody reads standard output and standard error any more") == 1
    assert "left the swarm" in said


@pytest.mark.parametrize(("last", "is_saved"), [("joining the DHT", False), ("step 1 of", True)])
def test_a_trainer_leaves_and_saves_when_nobody_reads_its_output(
    founder: Founder, tmp_path: Path, last: str, is_saved: bool
) -> None:
    """While it joins, it writes on the thread of its loop, which must live on to leave the swarm."""
    text, state = tmp_path / "sauna.txt", tmp_path / "state"
    text.write_text("In the sauna one must behave as in church. " * 60)
    options = ("--data", text, "--state", state, "--steps", 10**6, "--batch-size", 1)
    with piped("train", "--join", founder.invite, *options) as (trainer, output):
        assert any(last in line for line in output)
        output.close()
        assert trainer.wait(DEADLINE_S) == 128 + signal.SIGPIPE
    if is_saved:  # otherwise it may have taken a step, too, before it noticed
        assert any(state.glob("runs/*/*/*.safetensors"))


def test_characters_that_a_terminal_lacks_are_written_in_another_way(
    tmp_path: Path, founder: Founder
) -> None:
    shown = run(
        "service",
        "install",
        "--print",
        "--join",
        founder.invite,
        "--state",
        str(tmp_path / "é"),
        PYTHONIOENCODING="ascii",
    )
    assert (shown.returncode, "\\xe9" in shown.stdout) == (0, True), shown.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such permissions")
@pytest.mark.parametrize(
    "arguments",
    [
        "logs --state locked/node",
        "memory inspect locked/memory",
        "memory build text.txt -o locked/memory --name books --license CC0-1.0",
        "memory train-encoder pairs.jsonl --text text.txt --out locked/encoder",
        "serve --model locked/model",
        "import locked/model",
        "node --new locked/swarm.toml",
        "train --join @locked/invite",
        "demo --json locked/demo.json",
    ],
)
def test_a_folder_that_is_closed_to_the_user_is_named(
    arguments: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "closed"
    for each in (tmp_path, folder):
        each.mkdir(exist_ok=True)
        each.chmod(0o755)
    (tmp_path / "text.txt").write_text("text")
    monkeypatch.chdir(tmp_path)  # the folders above may be closed, too
    run_here(*arguments.replace("locked", "open").split())  # imports what is to be imported
    with locked(folder):
        refused = run_here(*arguments.replace("locked", "closed").split())
    assert_one_clear_line(refused, "closed", "Permission denied")
