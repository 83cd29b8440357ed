"""`talkoot dashboard`: watches a swarm, and serves a web page, a JSON API and metrics about it."""

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import platformdirs
from prometheus_client import ProcessCollector

from dht.invites import Invite, invite_of
from peer.files import StateFolder
from peer.metrics import new_registry
from peer.platform.loop import new_event_loop
from talkoot.dashboard.app import Streams, make_app
from talkoot.dashboard.history import History, HistoryStore
from talkoot.dashboard.settings import DashboardSettings
from talkoot.dashboard.watcher import Watcher, WatchIntervals
from talkoot.signals import Stopped, run_until_stopped
from talkoot.terminal import Terminal
from talkoot.web import address_of, listen, serving

logger: logging.Logger = logging.getLogger(__name__)

_KEEP_S = 5.0
"""Deadline for saving the last picture when the dashboard stops."""


def run_dashboard(terminal: Terminal, join: str | None, settings: DashboardSettings) -> None:
    """Watches until a signal arrives, which is not an error. Raises UserError if it can't start."""
    invite = invite_of(join)
    listener = listen(settings.host, settings.port)
    folder = StateFolder(settings.state or platformdirs.user_state_path("talkoot") / "dashboard")
    try:
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            runner.run(run_until_stopped(_serve(terminal, invite, settings, folder.path, listener)))
    except Stopped:
        logger.info("stopped")
    finally:
        folder.close()
        listener.close()


async def _serve(
    terminal: Terminal, invite: Invite, settings: DashboardSettings, folder: Path, listener: socket.socket
) -> None:
    async with dashboard(invite, settings, folder, listener) as running:
        if terminal.json:
            terminal.event("dashboard", {"url": address_of(listener)})
        else:
            terminal.line(f"dashboard: {address_of(listener)}")
        done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()


@contextlib.asynccontextmanager
async def dashboard(
    invite: Invite,
    settings: DashboardSettings,
    folder: Path,
    listener: socket.socket,
    intervals: WatchIntervals | None = None,
) -> AsyncIterator[set["asyncio.Task[None]"]]:
    """A dashboard that runs until the block ends. Yields its tasks, none of which should end."""
    metrics = new_registry()
    ProcessCollector(registry=metrics)
    history = await asyncio.to_thread(History, folder / f"history-{invite.keys.swarm_id}.sqlite")
    store = HistoryStore(history, metrics)
    intervals = intervals or WatchIntervals(settings.refresh_s)
    watcher = Watcher(invite, intervals, folder, store, await store.kept_picture(), metrics=metrics)
    thread = ThreadPoolExecutor(1, "talkoot-answers")
    app = make_app(watcher, store, settings.host, metrics, Streams(metrics), thread)
    watching = asyncio.create_task(watcher.run(), name="watch the swarm")
    try:
        async with serving(app, listener) as answering:
            yield {answering, watching}
    finally:
        thread.shutdown(wait=False, cancel_futures=True)
        watching.cancel()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_KEEP_S):
                await watcher.keep()
        await asyncio.gather(watching, return_exceptions=True)
        await store.close()
