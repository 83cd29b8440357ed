"""The processes of the demo, which are read line by line."""

import asyncio
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
from commands import wait_until

from peer.errors import StartError
from talkoot.demo.processes import DemoProcesses

FAILS = """
import sys
print('{"message": "error: the text has 9 bytes [T204]"}', file=sys.stderr)
sys.exit(2)
"""
HAS_A_CHILD = """
import asyncio, pathlib, sys
from talkoot.demo.processes import DemoProcesses

async def main():
    processes = DemoProcesses(pathlib.Path(sys.argv[1]), lambda process, event: print(process.pid, flush=True))
    await processes.start("child", (), ("-c", "import time; print('{}', flush=True); time.sleep(120)"))
    await asyncio.sleep(600)

asyncio.run(main())
"""


def test_a_line_as_long_as_the_status_of_a_large_swarm_is_read(tmp_path: Path) -> None:
    heard: list[Mapping[str, Any]] = []

    async def scenario() -> None:
        processes = DemoProcesses(tmp_path, lambda process, event: heard.append(event))
        await processes.start("status", (), ("-c", "print('{\"peers\": \"' + 10**6 * 'x' + '\"}')"))
        try:
            await processes.until(lambda: bool(heard), 60, "the status")
        finally:
            await processes.stop()

    asyncio.run(scenario())
    assert heard == [{"peers": 10**6 * "x"}]


def test_a_process_that_fails_is_named_with_its_reason(tmp_path: Path) -> None:
    async def scenario() -> None:
        processes = DemoProcesses(tmp_path, lambda process, event: None)
        await processes.start("trainer", (), ("-c", FAILS))
        try:
            with pytest.raises(StartError) as raised:
                await processes.until(lambda: False, 60, "its end")
        finally:
            await processes.stop()
        assert str(raised.value) == "trainer ended early with exit status 2: the text has 9 bytes"

    asyncio.run(scenario())


def test_processes_end_when_the_one_that_started_them_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HAS_A_CHILD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as parent:
        try:
            assert parent.stdout is not None
            child = psutil.Process(int(parent.stdout.readline()))
        finally:
            parent.kill()
    wait_until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, "the child's end")
