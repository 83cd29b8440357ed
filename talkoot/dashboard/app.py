"""The dashboard's web application: routes, streams of news, and what keeps a browser safe.

Where Prometheus finds what to scrape: its HTTP service discovery, of every live peer that offers metrics.

An address comes from a record that anybody may write, and whoever runs Prometheus asks there. So only IP addresses
count, and only of the kind that the swarm itself uses: nobody who joins a public swarm can point at this machine or at
the network behind it.
"""

import asyncio
import contextlib
import ipaddress
import json
from collections.abc import Awaitable, Callable, Iterable, Mapping
from enum import IntEnum
from pathlib import Path
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from peer.transport.addresses import ip_address
from talkoot.dashboard import api
from talkoot.dashboard.history import HistoryStore
from talkoot.dashboard.picture import Json, Picture
from talkoot.dashboard.settings import DashboardSettings
from talkoot.dashboard.watcher import Watcher


class Reach(IntEnum):
    """From where an address can be reached; a swarm reaches as far as its nearest address."""

    LOOPBACK = 0
    PRIVATE = 1
    GLOBAL = 2


def targets(picture: Picture | None, bootstrap: Iterable[str]) -> list[Json]:
    """`bootstrap`: multiaddresses of the swarm's peers."""
    if picture is None:
        return []
    nearest = min(map(_reach_of_multiaddress, bootstrap), default=Reach.GLOBAL)
    groups = []
    for role, rows in (("node", picture.nodes), ("trainer", picture.trainers)):
        found = sorted(
            {
                row["metrics_address"]
                for row in rows
                if row["metrics_address"]
                and row["state"] != "gone"
                and _reach_of(row["metrics_address"].rpartition(":")[0]) >= nearest
            }
        )
        if found:
            groups.append({"targets": found, "labels": {"role": role, "swarm": picture.figures["name"]}})
    return groups


def _reach_of_multiaddress(address: str) -> Reach:
    kind, _, rest = address.strip("/").partition("/")
    if kind not in {"ip4", "ip6"}:
        return Reach.GLOBAL
    return Reach(max(Reach.LOOPBACK, _reach_of(rest.partition("/")[0])))


def _reach_of(host: str) -> int:
    """-1 for what is no address."""
    try:
        address = ip_address(host.strip("[]"))
    except ValueError:
        return -1
    if address.is_link_local or address.is_unspecified or address.is_multicast:
        return -1
    if address.is_loopback:
        return Reach.LOOPBACK
    return Reach.GLOBAL if address.is_global else Reach.PRIVATE


FOLDER = Path(__file__).parent
STATIC = FOLDER / "static"
OPENAPI = FOLDER / "openapi.json"

_NEWS_AT_LEAST_EVERY_S = 5.0
_EXPERT_S = 2 * 86400.0
"""How far back the history of an expert goes."""
_EXPERT_POINTS = 12_000  # so that each tier shows as fine as it is
_SEND_DEADLINE_S = 15.0
"""A page that takes nothing for so long is let go."""

_HEADERS = [
    (b"content-security-policy", b"default-src 'self'; base-uri 'none'; form-action 'self'; "
     b"frame-ancestors 'none'; object-src 'none'"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-cache"),
]  # fmt: skip


class Streams:
    """Counts the pages that are kept up to date."""

    def __init__(self, most: int) -> None:
        self.open = 0
        self.most = most


def make_app(
    watcher: Watcher,
    keeper: HistoryStore,
    settings: DashboardSettings,
    registry: CollectorRegistry,
    streams: Streams,
) -> Starlette:
    """`registry`: of the dashboard's own metrics."""
    endpoints = _Endpoints(watcher, keeper, registry)
    routes = [
        Route("/", endpoints.page),
        Mount("/static", StaticFiles(directory=STATIC, check_dir=False)),
        Route("/healthz", endpoints.healthz),
        Route("/metrics", endpoints.metrics),
        Route("/sd", endpoints.discovery),
        Route("/events", News(watcher, streams)),
        Route("/api/v1/openapi.json", endpoints.openapi),
        Route("/api/v1/swarm", endpoints.swarm),
        Route("/api/v1/nodes", endpoints.nodes),
        Route("/api/v1/nodes/{peer_id}", endpoints.node),
        Route("/api/v1/leaderboard", endpoints.leaderboard),
        Route("/api/v1/experts", endpoints.experts),
        Route("/api/v1/experts/{uid}", endpoints.expert),
        Route("/api/v1/trainers", endpoints.trainers),
        Route("/api/v1/history", endpoints.history),
    ]
    handlers: Mapping[Any, Any] = {api.ApiError: _api_error, HTTPException: _http_error}
    return Starlette(
        routes=routes, middleware=[Middleware(Guard, host=settings.host)], exception_handlers=handlers
    )


class _Endpoints:
    def __init__(self, watcher: Watcher, keeper: HistoryStore, registry: CollectorRegistry) -> None:
        self._watcher = watcher
        self._keeper = keeper
        self._registry = registry

    async def page(self, request: Request) -> Response:
        return FileResponse(STATIC / "index.html")

    async def openapi(self, request: Request) -> Response:
        return FileResponse(OPENAPI, media_type="application/json")

    async def healthz(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def metrics(self, request: Request) -> Response:
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)

    async def discovery(self, request: Request) -> Response:
        return JSONResponse(targets(self._watcher.picture, self._watcher.bootstrap))

    async def swarm(self, request: Request) -> Response:
        return JSONResponse(api.swarm(self._watcher.sight()))

    async def nodes(self, request: Request) -> Response:
        return JSONResponse(api.nodes(self._watcher.picture, request.query_params))

    async def node(self, request: Request) -> Response:
        return JSONResponse(api.node(self._watcher.picture, request.path_params["peer_id"]))

    async def leaderboard(self, request: Request) -> Response:
        return JSONResponse(api.leaderboard(self._watcher.picture, request.query_params))

    async def trainers(self, request: Request) -> Response:
        return JSONResponse(api.trainers(self._watcher.picture, request.query_params))

    async def experts(self, request: Request) -> Response:
        return JSONResponse(api.experts(self._watcher.picture, request.query_params))

    async def expert(self, request: Request) -> Response:
        sight, uid = self._watcher.sight(), request.path_params["uid"]
        shown = api.expert(sight.picture, uid, sight.now)
        series = []
        for name in ("updates", "replicas"):
            metric = f"expert_{name}"
            found = await self._keeper.read(
                metric, sight.now - _EXPERT_S, sight.now, _EXPERT_POINTS, 1, only=uid
            )
            series += api.series([(name, points) for _, points in found])
        return JSONResponse(shown | {"series": series})

    async def history(self, request: Request) -> Response:
        sight = self._watcher.sight()
        query = api.history_query(request.query_params, sight.now)
        found = await self._keeper.read(query.metric, query.since, sight.now, query.points, api.MAX_SERIES)
        series = api.series(found, sight.picture)
        return JSONResponse({"metric": query.metric, "unit": api.UNITS[query.metric], "series": series})


class News:
    """Tells a page how the swarm does, after each reading and every few seconds (server-sent events).

    A page that is slow misses what was in between, and one that takes nothing is let go: nothing piles up here.
    """

    def __init__(self, watcher: Watcher, streams: Streams) -> None:
        self._watcher = watcher
        self._streams = streams

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._streams.open >= self._streams.most:
            refusal = JSONResponse({"error": "too many pages are open; try again later"}, 503)
            await refusal(scope, receive, send)
            return
        self._streams.open += 1
        telling = asyncio.create_task(self._tell(send), name="tell news")
        leaving = asyncio.create_task(_disconnected(receive), name="wait for the page to close")
        try:
            await asyncio.wait({telling, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._streams.open -= 1
            telling.cancel()
            leaving.cancel()
            await asyncio.gather(telling, leaving, return_exceptions=True)

    async def _tell(self, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        while True:
            values = json.dumps(api.swarm(self._watcher.sight()), allow_nan=False)
            event = f"event: swarm\ndata: {values}\n\n".encode()
            try:
                async with asyncio.timeout(_SEND_DEADLINE_S):
                    await send({"type": "http.response.body", "body": event, "more_body": True})
            except TimeoutError:
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_NEWS_AT_LEAST_EVERY_S):
                    await self._watcher.news()


class Guard:
    """Sets the headers that keep a browser safe, and answers on loopback only to those who ask for loopback.

    Else a page anywhere could read the dashboard of whoever looks at it, under a name that it points to 127.0.0.1.
    """

    def __init__(self, app: ASGIApp, host: str) -> None:
        self._app = app
        self._local = is_loopback(host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *_HEADERS]
            await send(message)

        if self._local and not is_loopback(_host_of(scope)):
            refusal = JSONResponse({"error": "this dashboard answers at 127.0.0.1 and localhost alone"}, 421)
            await refusal(scope, receive, send_safely)
            return
        await self._app(scope, receive, send_safely)


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _host_of(scope: Scope) -> str:
    """The host that was asked for, without its port."""
    host: str = next((v.decode("latin-1") for k, v in scope["headers"] if k == b"host"), "")
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]


async def _disconnected(receive: Callable[[], Awaitable[Message]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _api_error(request: Request, error: api.ApiError) -> Response:
    return JSONResponse({"error": str(error)}, error.status)


async def _http_error(request: Request, error: HTTPException) -> Response:
    return JSONResponse({"error": f"{request.url.path[:200]}: {error.detail}"}, error.status_code)
