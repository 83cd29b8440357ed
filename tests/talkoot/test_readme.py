"""The commands in the README and docs/by-hand.md, run as printed, with an invite for INVITE and a folder for /tmp.

Small numbers are set through environment variables, as any user could.
"""

import os
import re
import shlex
import signal
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from commands import wait_until
from preloaded import Preloaded, run_preloaded
from training_swarm import TEXT, Ended, talkoot

pytestmark = [
    pytest.mark.timeout(600),
]
ROOT = Path(__file__).parents[2]
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SMALL = {
    "TALKOOT_TRAIN_STEPS": "3",
    "TALKOOT_TRAIN_BATCH_SIZE": "2",
    "TALKOOT_TRAIN_VALIDATION_BATCHES": "1",
    "TALKOOT_GENERATE_MAX_TOKENS": "5",
    "TALKOOT_NODE_DRAIN_TIMEOUT_S": "0",
    "TALKOOT_NODE_HOST": "127.0.0.1",
    "TALKOOT_NODE_THREADS": "1",
    "TALKOOT_TRAIN_THREADS": "1",
}
PLAYED_ELSEWHERE = {
    "make demo": "test_demo.py",
    "make test": "this is it",
    "talkoot node --join INVITE": "terminal 2 does it",
    "talkoot node --new deploy/swarm.toml": "terminal 1 does it",
    "talkoot dashboard --join INVITE": "dashboard/test_page.py",
}


def shell_lines(text: str) -> list[str]:
    return [line for language, block in _BLOCK.findall(text) if not language for line in block.splitlines()]


README = (ROOT / "README.md").read_text()
FOUND, HOST, TRAIN, STATUS, TRAIN_TOO, *USE = shell_lines((ROOT / "docs" / "by-hand.md").read_text())
IN_SENTENCES = re.findall(r"`(talkoot \S[^`]*)`", README)
DOCTOR = "talkoot doctor --join INVITE"
TRAIN_ON_TEXT = "talkoot train --join INVITE --data 'books/*.txt'"


def test_every_command_of_the_readme_is_played_somewhere() -> None:
    assert set(shell_lines(README)) | set(IN_SENTENCES) == {TRAIN_ON_TEXT, *PLAYED_ELSEWHERE}
    assert DOCTOR in shell_lines((ROOT / "docs" / "volunteer.md").read_text())


def test_the_readme_is_a_page() -> None:
    assert len(README.splitlines()) <= 80
    for picture in re.findall(r'(?:!\[[^\]]+\]\(|src=")(docs/[^)"]+)', README):
        assert (ROOT / picture).stat().st_size < 1_000_000, picture
    requires = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert requires == ">=3.11,<3.15", "which a badge says"


@dataclass
class Reader:
    """A user who types what the README says, in a clone of the project."""

    folder: Path
    invite: str = ""

    home: str = "home"
    """The home folder of the user. Each home has its own state folders."""

    def line(self, written: str) -> str:
        return written.replace("INVITE", self.invite).replace("/tmp/", f"{self.folder}/tmp/")

    def types(self, written: str, limit_s: float = 240.0) -> str:
        """Types a command, waits until it ends, and returns its output."""
        ended = run_preloaded(*self._words(written), env=self._environment(), limit_s=limit_s)
        assert ended.returncode == 0, f"{written}: {ended.stderr}"
        return ended.stdout + ended.stderr

    def types_here(self, written: str, statuses: Sequence[int] = (0,)) -> Ended:
        """Does the same in this process, without the seconds that an interpreter takes to start."""
        ended = talkoot(*shlex.split(self.line(written))[1:])
        assert ended.status in statuses, f"{written}: {ended.err}"
        return ended

    @contextmanager
    def terminal(self, written: str, name: str) -> Iterator[Path]:
        """Runs a command in a terminal until the block ends. Yields the file with its output."""
        log = self.folder / name
        with log.open("wb") as output:
            process = Preloaded(*self._words(written), stdout=output, stderr=output, env=self._environment())
        try:
            yield log
            assert process.poll() is None, log.read_text()
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)
        assert "Traceback" not in log.read_text(), log.read_text()

    def _words(self, written: str) -> list[str]:
        command, *words = shlex.split(self.line(written))
        assert command == "talkoot"
        return ["-W", "ignore", "-m", "talkoot", *words]

    def _environment(self) -> dict[str, str]:
        as_users_have_it = {name: value for name, value in os.environ.items() if not name.endswith("_P2PD")}
        return as_users_have_it | {"XDG_STATE_HOME": str(self.folder / self.home)}


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Reader:
    (tmp_path / "deploy").symlink_to(ROOT / "deploy")
    (tmp_path / "tmp").mkdir()
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "sauna.txt").write_text(TEXT)
    (tmp_path / "README.md").write_text(TEXT)
    for name, value in SMALL.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return Reader(tmp_path)


@pytest.mark.timeout(900)
def test_a_swarm_by_hand_in_four_terminals(reader: Reader) -> None:
    with ExitStack() as terminals:
        first = terminals.enter_context(reader.terminal(FOUND, "terminal-1"))
        wait_until(lambda: "invite: " in first.read_text(), "the invite", 150)
        (reader.invite,) = re.findall(r"^invite: (\S+)$", first.read_text(), re.MULTILINE)
        second = terminals.enter_context(reader.terminal(HOST, "terminal-2"))
        wait_until(lambda: "metrics at " in second.read_text(), "the second node", 150)

        for written in (TRAIN, TRAIN_TOO):
            said = reader.types(written)
            assert "trained 3 steps" in said, said
            assert "128 of 128 experts live" in said, said
        assert "128 of 128" in (said := reader.types_here(STATUS).out), said

        # The README's commands for invited people.
        doctor = reader.types_here(DOCTOR, statuses=(0, 1))
        assert "swarm" in doctor.out
        for written in (TRAIN_ON_TEXT, *USE):
            assert reader.types_here(written).out


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_tutorial(reader: Reader) -> None:
    """It is run exactly as printed, by three users with separate home folders."""
    text = (ROOT / "docs" / "tutorial.md").read_text()
    (manifest,) = (block for language, block in _BLOCK.findall(text) if language == "toml")
    (reader.folder / "sauna.toml").write_text(manifest)
    doctor, found, host, status, train, dashboard, host_again, generate, resume = shell_lines(text)
    assert host_again == host
    aino, benno, carla = (replace(reader, home=home) for home in ("aino", "benno", "carla"))
    assert carla.types(doctor)
    with aino.terminal(found, "found") as log:
        wait_until(
            lambda: (reader.folder / "invite").exists() and "metrics at" in log.read_text(), "the invite"
        )
        with benno.terminal(host, "host") as log:
            wait_until(lambda: "metrics at " in log.read_text(), "Benno's node")
            assert "32 of 32 experts alive" in (said := carla.types(status)), said
            said = carla.types(train, limit_s=400)
            (loss,) = re.findall(r"at first, ([\d.]+) at last: ", said)
            assert float(loss) < 2.7, said
        with carla.terminal(dashboard, "dashboard") as log:
            wait_until(lambda: "http://127.0.0.1:8080/" in log.read_text(), "the dashboard")
        with benno.terminal(host_again, "host-again") as log:
            wait_until(lambda: "metrics at " in log.read_text(), "Benno's node again")
            assert len(carla.types(generate)) > 100
            assert "(500 in all)" in carla.types(resume.replace("2000", "500"), limit_s=200)
