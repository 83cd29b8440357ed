"""`talkoot dashboard`: watches a swarm, and serves a web page, a JSON API and metrics about it."""

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import platformdirs
import uvicorn
import uvloop
from prometheus_client import ProcessCollector
from uvicorn.protocols.http.h11_impl import H11Protocol

from dht.invites import Invite, invite_of
from peer.errors import PortError
from peer.files import StateFolder
from peer.formatting import endpoint
from peer.metrics import new_registry
from talkoot.dashboard.app import Streams, make_app
from talkoot.dashboard.history import History, HistoryStore
from talkoot.dashboard.settings import DashboardSettings
from talkoot.dashboard.watcher import Watcher, WatchIntervals
from talkoot.signals import Stopped, run_until_stopped
from talkoot.terminal import Terminal

logger = logging.getLogger(__name__)


_MAX_CONNECTIONS = 1000
_PATIENCE_S, _LOOK_EVERY_S = 20.0, 5.0
"""For so long a connection may go on without a whole request, or with an answer that is not taken."""
_BACKLOG = 128
_KEEP_S = 5.0
"""Deadline for saving the last picture when the dashboard stops."""


def run_dashboard(terminal: Terminal, join: str | None, settings: DashboardSettings) -> None:
    """Watches until a signal arrives, which is not an error. Raises UserError when it can't start."""
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
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
    invite: Invite,
    settings: DashboardSettings,
    folder: Path,
    listener: socket.socket,
    intervals: WatchIntervals | None = None,
) -> AsyncIterator[set["asyncio.Task[None]"]]:
    """A dashboard that runs inside. Yields its tasks, none of which should end."""
    metrics = new_registry()
    ProcessCollector(registry=metrics)
    history = await asyncio.to_thread(History, folder / f"history-{invite.keys.swarm_id}.sqlite")
    store = HistoryStore(history, metrics)
    intervals = intervals or WatchIntervals(settings.refresh_s)
    watcher = Watcher(invite, intervals, folder, store, await store.kept_picture(), metrics=metrics)
    app = make_app(watcher, store, settings.host, metrics, Streams(metrics))
    server = _Server(
        uvicorn.Config(
            app,
            http=Page,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=_MAX_CONNECTIONS,
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
        await store.close()


class Page(H11Protocol):
    """A connection that ends if its page neither asks nor takes what it asked for. uvicorn alone waits for ever.

    Event streams end by themselves.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's own
        super().connection_made(transport)
        self._look(None, self.loop.time())

    def _look(self, before: object, since: float) -> None:
        """`before`: what it did when last looked at; `since`: when it was first seen to do so."""
        if self.transport.is_closing():
            return
        now, cycle = self.loop.time(), self.cycle
        answering = cycle is not None and not cycle.response_complete
        if (cycle, answering) != before:
            since = now
        elif now - since > _PATIENCE_S and not (answering and cycle.scope["path"] == "/events"):
            self.transport.abort()
            return
        self.loop.call_later(_LOOK_EVERY_S, self._look, (cycle, answering), since)


class _Server(uvicorn.Server):
    """Leaves signals to the command."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises PortError when the port is taken or the address is not this machine's."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=_BACKLOG)
    except OSError as error:
        # create_server adds the address to its own messages
        why = error.strerror if isinstance(error, socket.gaierror) else os.strerror(error.errno or 0)
        raise PortError(
            f"can't listen on {host} port {port}: {why}; pass another --port or --host"
        ) from error


def address_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://{endpoint(host, port)}/"
