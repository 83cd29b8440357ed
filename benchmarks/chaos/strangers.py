"""Strangers in a process of their own that attack the swarm of a chaos run: tests/hostile/siege.py."""

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

from dht.invites import Invite
from peer.platform.processes import die_with_parent

_ROOT = Path(__file__).parents[2]
_SIEGE = _ROOT / "tests" / "hostile" / "siege.py"


@contextlib.asynccontextmanager
async def besieging(invite: Invite, seconds: float, seed: int) -> AsyncIterator[dict[str, int]]:
    """Strangers attack for `seconds` from when they have joined. When they have ended, the dictionary that was yielded
    says how often each misdeed was done.
    """
    done: dict[str, int] = {}
    arguments = [sys.executable, str(_SIEGE), str(invite), str(seconds), str(seed)]
    process = await asyncio.create_subprocess_exec(
        *die_with_parent(arguments),
        stdout=asyncio.subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(_ROOT), "PYTHONWARNINGS": "ignore"},
    )
    assert process.stdout is not None
    try:
        await process.stdout.readline()  # they have joined, or ended
        yield done
        done |= json.loads(await process.stdout.read())
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
