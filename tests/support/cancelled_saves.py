"""Saves that are cancelled while their thread writes."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from types import ModuleType
from typing import Any

import pytest


async def cancel_while_it_writes(
    save: Callable[[], Coroutine[Any, Any, None]], module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cancels a save whose module uses `write_state_file`. It then waits for the write, which fails."""
    writing, may_end = threading.Event(), threading.Event()

    def write(*_: object) -> bool:
        writing.set()
        assert may_end.wait(60)
        return False

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_state_file", write)
        saving = asyncio.create_task(save())
        assert await asyncio.to_thread(writing.wait, 60)
        saving.cancel()
        await asyncio.sleep(0)
        assert not saving.done()  # two writes at once could leave the older one
        may_end.set()
        await asyncio.wait([saving])
        assert saving.cancelled()
