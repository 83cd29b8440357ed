"""The processes of the demo, which are read line by line."""

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from talkoot.demo.processes import DemoProcesses


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
