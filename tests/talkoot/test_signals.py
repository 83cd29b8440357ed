"""The first signal stops a command politely, the second makes it hurry, and the clean-up always runs.

While a command imports its modules there is nothing to clean up, and it ends at once.
"""

import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

SCRIPT = """
import asyncio
from talkoot.signals import Stopped, run_until_stopped

hurried = asyncio.Event()

async def work():
    print("works", flush=True)
    try:
        await asyncio.Event().wait()
    finally:
        print("leaves", flush=True)
        await hurried.wait()
        print("cleaned up", flush=True)

try:
    asyncio.run(run_until_stopped(work(), hurried.set))
except Stopped as stopped:
    print(stopped.exit_status, flush=True)
"""


def test_the_second_signal_hurries_what_the_first_one_stopped() -> None:
    with subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "works\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "leaves\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readlines() == ["cleaned up\n", f"{128 + signal.SIGTERM}\n"]
        assert process.wait(60) == 0


IMPORT_SCRIPT = """
import signal
from talkoot.signals import Stopped, StopSignals

signals = StopSignals()
if {importing}:
    with signals.importing():
        try:
            signal.raise_signal({number})
        except BaseException:
            pass  # as in torch, while numpy is imported
else:
    with signals.importing():
        pass
    try:
        signal.raise_signal({number})
    except Stopped as stopped:
        print("stopped", stopped.exit_status)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_amid_an_import_ends_the_process_at_once(number: signal.Signals) -> None:
    script = IMPORT_SCRIPT.format(importing=True, number=int(number))
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 128 + number


def test_a_signal_after_the_imports_is_raised() -> None:
    script = IMPORT_SCRIPT.format(importing=False, number=int(signal.SIGINT))
    result = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert result.stdout == f"stopped {128 + signal.SIGINT}\n"


ENTRY_SCRIPT = """
import signal
import sys
from importlib.metadata import EntryPoint

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "typer":
            signal.raise_signal(signal.SIGINT)

sys.meta_path.insert(0, Finder())
EntryPoint("talkoot", {entry!r}, "console_scripts").load()()
"""


def test_a_program_whose_commands_are_not_imported_yet_ends_without_a_traceback() -> None:
    settings = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    script = ENTRY_SCRIPT.format(entry=settings["project"]["scripts"]["talkoot"])
    result = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (-signal.SIGINT, "")


LOST_SCRIPT = """
import signal
import typer
from talkoot.options import command

try:
    with command():
        try:
            signal.raise_signal(signal.SIGINT)
        {caught}
        raise ValueError("in the place of it")
except typer.Exit as end:
    print("exit status", end.exit_code)
except ValueError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("caught", "said"),
    [
        (
            "except BaseException: pass  # as in torch, when it reads the length of a sequence",
            "exit status 130",
        ),
        ("finally: raise ValueError('while it leaves')", "while it leaves"),
    ],
)
def test_a_signal_counts_when_another_error_takes_its_place_but_hides_none_of_the_clean_up(
    caught: str, said: str
) -> None:
    script = LOST_SCRIPT.format(caught=caught)
    result = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert result.stdout == f"{said}\n"
