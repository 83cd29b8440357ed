"""The demo as users run it: a swarm of real processes on the loopback interface, with just enough steps to learn.

The slow tests run it from the wheel, installed in an environment of its own.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
import venv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from commands import sockets_of

from peer import SOFTWARE_VERSION
from talkoot.demo.scenario import experts_in_words

MARK = "TEST_OF_THE_DEMO"
LIMIT_S = 200
ROOT = Path(__file__).parents[3]
FLOORS = ("peer", "dht", "expert_server", "trainer_client", "talkoot")
SMALLEST = ("--nodes", "1", "--no-kill")
"""Two of its processes have a p2pd: the node and the trainer."""
ENVIRONMENT = {
    name: value for name, value in os.environ.items() if name != "PYTHONPATH" and not name.endswith("_P2PD")
}
"""Without the tests' own PYTHONPATH, which would come before the wheel. With p2pd, as users have it."""


pytestmark = pytest.mark.timeout(LIMIT_S + 60)


@dataclass(frozen=True)
class Running:
    """A demo and all processes that it started, which have a mark in their environment."""

    process: subprocess.Popen[bytes]
    mark: str
    temporary: Path
    log: Path

    def processes(self) -> list[str]:
        return [process.info["name"] for process in self._marked()]

    def command_lines(self) -> list[str]:
        return [" ".join(process.cmdline()) for process in self._marked()]

    def sockets(self) -> set[Path]:
        return sockets_of(self._marked())

    def _marked(self) -> list[psutil.Process]:
        return [process for process in psutil.process_iter(["name"]) if is_marked(process, self.mark)]


def is_marked(process: psutil.Process, mark: str) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == mark
    except psutil.Error:
        return False


@contextmanager
def running_demo(tmp_path: Path, *options: str, python: str | Path = sys.executable) -> Iterator[Running]:
    temporary, log, mark = tmp_path / "tmp", tmp_path / "log", uuid.uuid4().hex
    temporary.mkdir()
    with log.open("wb") as file:
        process = subprocess.Popen(
            [str(python), "-m", "talkoot", "demo", *options],
            stdout=file,
            stderr=file,
            cwd=tmp_path,
            env=ENVIRONMENT | {"TMPDIR": str(temporary), MARK: mark},
        )
    try:
        yield Running(process, mark, temporary, log)
    finally:
        process.kill()
        process.wait()


def wait_until(condition: Callable[[], bool], log: Path) -> None:
    """Looks rarely, since looking at every process of the machine would slow the demo down."""
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.5)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with this wheel; everything else comes from the tests' own environment."""
    folder = tmp_path_factory.mktemp("installed")
    source, environment = folder / "source", folder / "environment"
    for name in FLOORS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    run("-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(source))
    venv.create(environment, symlinks=True)
    python = environment / "bin" / "python"
    (wheel,) = folder.glob("*.whl")
    run("-m", "pip", "--python", str(python), "install", "--quiet", "--no-index", "--no-deps", str(wheel))
    (packages,) = environment.glob("lib/python*/site-packages")
    there = [path for path in sys.path if path.endswith("-packages")]
    # Path files for sources, such as those of editable installs, are not followed here.
    (packages / "others.pth").write_text("".join(f"{path}\n" for path in there))
    return python


def run(*arguments: str) -> None:
    ended = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.slow
def test_environment_has_the_wheel_alone(installed: Path, tmp_path: Path) -> None:
    look = "import peer, talkoot.cli, trainer_client; print(peer.__file__, peer.SOFTWARE_VERSION)"
    ended = subprocess.run(
        [str(installed), "-W", "ignore", "-c", look],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=ENVIRONMENT,
    )
    file, version = ended.stdout.split()
    assert Path(file).is_relative_to(installed.parents[1])
    assert version == SOFTWARE_VERSION
    talkoot = subprocess.run(
        [str(installed.with_name("talkoot")), "--version"],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )
    assert talkoot.stdout.startswith(f"talkoot {SOFTWARE_VERSION}, ")


def test_demo_over_links_learns_loses_a_node_and_serves_its_experts_again(tmp_path: Path) -> None:
    assert_learns(tmp_path, sys.executable, 2, "--link", "100mbit,5ms")


@pytest.mark.slow
def test_demo_of_the_wheel_learns_with_as_many_nodes_as_users_have(installed: Path, tmp_path: Path) -> None:
    assert_learns(tmp_path, installed, 3)


def assert_learns(tmp_path: Path, python: str | Path, nodes: int, *options: str) -> None:
    result = tmp_path / "result.json"
    sockets: set[Path] = set()

    def has_ended() -> bool:
        sockets.update(demo.sockets())
        return demo.process.poll() is not None

    common = ("--steps", "10", "--nodes", str(nodes), "--json", str(result))
    with running_demo(tmp_path, *common, *options, python=python) as demo:
        wait_until(has_ended, demo.log)
        assert demo.process.returncode == 0, demo.log.read_text()
        assert not demo.processes()
    values = json.loads(result.read_text())
    assert list(values) == [
        "steps",
        "loss_first",
        "loss_last",
        "validation_loss_first",
        "validation_loss_last",
        "nodes_started",
        "nodes_killed",
        "experts_total",
        "experts_alive_end",
        "tokens_per_s",
        "longest_stall_s",
        "seconds",
    ]
    assert values["steps"] == 10
    assert values["validation_loss_last"] < 0.75 * values["validation_loss_first"]
    assert (values["nodes_started"], values["nodes_killed"]) == (nodes, 1)
    assert values["experts_alive_end"] == values["experts_total"] == 128
    assert values["longest_stall_s"] < 60
    assert "is killed with SIGKILL" in demo.log.read_text()
    assert not list(demo.temporary.iterdir())
    assert len(sockets) >= nodes + 1  # of the p2pds of the nodes and the trainer
    assert not any(path.exists() for path in sockets)


def test_news_of_a_node_end_with_as_many_experts_as_the_table_shows() -> None:
    states = [
        {"experts": experts, "adopted": adopted} for experts, adopted in [(42, 0), (43, 0), (43, 0), (85, 42)]
    ]
    news = [experts_in_words(before, state) for before, state in zip([None, *states], states, strict=False)]
    assert news == ["serves 42 experts", "now serves 43 experts", "", "adopts 42 experts"]
    assert experts_in_words(states[-1], states[0]) == "", "it is leaving"


@pytest.mark.parametrize(
    "seen",
    [
        pytest.param("trainer starts, process ", id="starting"),
        pytest.param("step 1 of 180: ", id="training", marks=pytest.mark.slow),
    ],
)
def test_interrupted_demo_over_links_and_without_p2pd_ends_at_once_and_leaves_nothing(
    tmp_path: Path, seen: str
) -> None:
    with running_demo(tmp_path, *SMALLEST, "--link", "100mbit,5ms", "--no-p2pd") as demo:
        wait_until(lambda: seen in demo.log.read_text(), demo.log)
        assert sum("--p2pd off" in words for words in demo.command_lines()) == 2, "the node and the trainer"
        demo.process.send_signal(signal.SIGINT)
        demo.process.wait(LIMIT_S)
        assert demo.process.returncode == 128 + signal.SIGINT, demo.log.read_text()
        assert not demo.processes()
    assert "Traceback" not in demo.log.read_text()
    assert demo.log.read_text().endswith(
        "stopped: all processes of the demo have ended, and its files are removed\n"
    )
    assert not list(demo.temporary.iterdir())


@pytest.mark.slow
def test_killed_demo_leaves_no_process(tmp_path: Path) -> None:
    with running_demo(tmp_path, *SMALLEST) as demo:
        wait_until(lambda: demo.processes().count("p2pd") >= 2, demo.log)
        demo.process.kill()
        demo.process.wait()
        wait_until(lambda: not demo.processes(), demo.log)


@pytest.mark.slow
def test_child_that_fails_is_named_with_its_reason(tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("too short")
    with running_demo(tmp_path, *SMALLEST, "--data", str(text)) as demo:
        demo.process.wait(LIMIT_S)
        said = demo.log.read_text()
        assert demo.process.returncode == 2, said
        assert "error: trainer ended early with exit status 2: the text has 9 bytes" in said
        assert said.count("[T") == 1
        assert not demo.processes()
    assert not list(demo.temporary.iterdir())
