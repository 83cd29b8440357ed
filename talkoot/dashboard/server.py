"""`talkoot dashboard`: watches a swarm, and shows it on a page and to programs."""

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any

import platformdirs
import uvicorn
import uvloop
from prometheus_client import CollectorRegistry, ProcessCollector

from dht.invites import Invite
from peer.errors import PortError
from peer.processes import StateFolder
from talkoot.terminal import Terminal, quiet_hivemind
from talkoot.dashboard.app import Streams, make_app
from talkoot.dashboard.history import History
from talkoot.dashboard.keeper import Keeper
from talkoot.dashboard.metrics import DashboardCollector, DashboardCounts
from talkoot.dashboard.settings import DashboardSettings
from talkoot.dashboard.watcher import Watcher
from talkoot.joining import invite_of
from talkoot.signals import Stopped, run_until_stopped

logger = logging.getLogger(__name__)

_BACKLOG = 128
_KEEP_S = 5.0
"""Longest that a stopping dashboard writes its last picture down."""


def run_dashboard(
    terminal: Terminal, join: str | None, config: Path | None, flags: Mapping[str, Any]
) -> None:
    """Watches until a signal comes, which is no error. Raises UserError when it can't start."""
    quiet_hivemind()
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    settings = DashboardSettings.load(config, **flags)
    invite = invite_of(join)
    listener = listen(settings.host, settings.port)
    folder = StateFolder(settings.state or platformdirs.user_state_path("talkoot") / "dashboard")
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
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
    invite: Invite, settings: DashboardSettings, folder: Path, listener: socket.socket
) -> AsyncIterator[set["asyncio.Task[None]"]]:
    """A dashboard that runs inside; gives its tasks, none of which should end."""
    history = await asyncio.to_thread(
        History,
        folder / f"history-{invite.keys.swarm_id}.sqlite",
        settings.history_series,
        2 * settings.history_experts,
    )
    keeper = Keeper(history)
    watcher = Watcher(invite, settings, folder, keeper, await keeper.kept_picture())
    streams = Streams(settings.max_streams)
    app = make_app(watcher, keeper, settings, _registry(watcher, keeper, streams), streams)
    server = _Server(
        uvicorn.Config(
            app,
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=settings.max_connections,
            timeout_keep_alive=10,
        )
    )
    serving = asyncio.create_task(server.serve([listener]), name="serve the page")
    watching = asyncio.create_task(watcher.run(), name="watch the swarm")
    try:
        yield {serving, watching}
    finally:
        watching.cancel()
        server.should_exit = server.force_exit = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_KEEP_S):
                await watcher.keep()
        await asyncio.gather(serving, watching, return_exceptions=True)
        await keeper.close()


class _Server(uvicorn.Server):
    """Leaves the signals to the command."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises PortError when the port is taken or the address is not this machine's."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=_BACKLOG)
    except OSError as error:
        # create_server adds the address to the message of whatever it could not bind
        why = error.strerror if isinstance(error, socket.gaierror) else os.strerror(error.errno or 0)
        raise PortError(
            f"can't listen on {host} port {port}: {why}; pass another --port or --host"
        ) from error


def address_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/"


def _registry(watcher: Watcher, keeper: Keeper, streams: Streams) -> CollectorRegistry:
    def counts() -> DashboardCounts:
        return DashboardCounts(
            watcher.picture,
            watcher.unreachable_since is None,
            watcher.readings,
            watcher.failures,
            keeper.failures,
            streams.open,
        )

    registry = CollectorRegistry()
    registry.register(DashboardCollector(counts))
    ProcessCollector(registry=registry)
    return registry
