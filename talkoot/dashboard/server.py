"""`talkoot dashboard`: watches a swarm, and shows it on a page and to programs.

The dashboard's Prometheus metrics: the swarm as a whole, and the dashboard itself. No label names a peer.
"""

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import platformdirs
import uvicorn
import uvloop
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from dht.invites import Invite, invite_of
from peer.errors import PortError
from peer.files import StateFolder
from peer.kademlia.hivemind import quiet_hivemind
from talkoot.dashboard.app import Streams, make_app
from talkoot.dashboard.history import History, HistoryStore
from talkoot.dashboard.picture import Json, Picture
from talkoot.dashboard.settings import DashboardSettings
from talkoot.dashboard.watcher import Watcher
from talkoot.signals import Stopped, run_until_stopped
from talkoot.terminal import Terminal

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DashboardCounts:
    """How the dashboard itself does."""

    picture: Picture | None
    reachable: bool
    readings: int
    failed_readings: int
    history_failures: int
    streams: int


class DashboardCollector(Collector):
    """Reads the last picture when it is scraped. What can't be told is left out."""

    def __init__(self, counts: Callable[[], DashboardCounts]) -> None:
        self._counts = counts

    def collect(self) -> Iterator[Metric]:
        counts = self._counts()
        yield GaugeMetricFamily(
            "talkoot_swarm_reachable", "1 while the dashboard can read the swarm.", counts.reachable
        )
        yield CounterMetricFamily(
            "talkoot_dashboard_readings", "Looks at the swarm that went well.", counts.readings
        )
        yield CounterMetricFamily(
            "talkoot_dashboard_failed_readings", "Looks at the swarm that failed.", counts.failed_readings
        )
        yield CounterMetricFamily(
            "talkoot_dashboard_history_failures",
            "Reads and writes of the history that failed.",
            counts.history_failures,
        )
        yield GaugeMetricFamily(
            "talkoot_dashboard_streams", "Pages that are kept up to date now.", counts.streams
        )
        if counts.picture is not None:
            yield GaugeMetricFamily(
                "talkoot_swarm_read_timestamp_seconds",
                "When the figures of the swarm were read.",
                counts.picture.read_at,
            )
            if counts.reachable:
                yield from _swarm(counts.picture.figures)


def _swarm(figures: Json) -> Iterator[Metric]:
    yield GaugeMetricFamily("talkoot_swarm_nodes", "Live nodes.", figures["nodes"]["live"])
    yield GaugeMetricFamily("talkoot_swarm_experts", "Experts of the model.", figures["experts"]["total"])
    yield GaugeMetricFamily(
        "talkoot_swarm_live_experts", "Experts that some node serves.", figures["experts"]["live"]
    )
    yield GaugeMetricFamily("talkoot_swarm_replicas", "Replicas that are served.", figures["replicas"])
    yield GaugeMetricFamily("talkoot_swarm_trainers", "Live trainers.", figures["trainers"])
    for key, name, words in (
        ("tokens_per_s", "talkoot_swarm_tokens_per_second", "Tokens trained on, by all trainers."),
        ("requests_per_s", "talkoot_swarm_calls_per_second", "Calls to nodes, by all trainers."),
        ("bytes_per_s", "talkoot_swarm_bytes_per_second", "Payload between trainers and nodes."),
        ("validation_loss", "talkoot_swarm_validation_loss_nats", "Lowest of all trainers, for each token."),
        (
            "bits_per_byte",
            "talkoot_swarm_bpb",
            "Bits per byte, of the trainer with the lowest validation loss.",
        ),
    ):
        if figures[key] is not None:
            yield GaugeMetricFamily(name, words, figures[key])


_BACKLOG = 128
_KEEP_S = 5.0
"""Longest that a stopping dashboard writes its last picture down."""


def run_dashboard(terminal: Terminal, join: str | None, settings: DashboardSettings) -> None:
    """Watches until a signal comes, which is no error. Raises UserError when it can't start."""
    quiet_hivemind()
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
    invite: Invite, settings: DashboardSettings, folder: Path, listener: socket.socket
) -> AsyncIterator[set["asyncio.Task[None]"]]:
    """A dashboard that runs inside; gives its tasks, none of which should end."""
    history = await asyncio.to_thread(
        History,
        folder / f"history-{invite.keys.swarm_id}.sqlite",
        settings.history_series,
        2 * settings.history_experts,
    )
    keeper = HistoryStore(history)
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


def _registry(watcher: Watcher, keeper: HistoryStore, streams: Streams) -> CollectorRegistry:
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
