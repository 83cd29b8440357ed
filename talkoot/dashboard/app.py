"""The dashboard's web application: its routes, the event stream, service discovery, and what protects browsers."""

import asyncio
import contextlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Gauge, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

from peer.bounded import Owner
from peer.budget import FairBudget, Reservation
from peer.errors import AddressError, ExpertError
from peer.loop import first_of
from peer.transport.addresses import Multiaddress
from peer.transport.dialling import nearest_scope
from peer.transport.endpoints import AddressScope, Endpoint
from talkoot.dashboard import api
from talkoot.dashboard.history import HistoryStore
from talkoot.dashboard.picture import Json, Picture
from talkoot.dashboard.watcher import Watcher
from talkoot.web import SEND_DEADLINE_S, BrowserProtection, disconnected, ends_by_itself, near

FOLDER = Path(__file__).parent
STATIC = FOLDER / "static"
OPENAPI = FOLDER / "openapi.json"
MAX_STREAMS = 200
_NEWS_AT_LEAST_EVERY_S = 5.0
_RETRY_AFTER_S = "30"
_EXPERT_S = 2 * 86400.0
"""How far back the history of an expert goes."""
_EXPERT_POINTS = 12_000
"""Enough points to show each tier in full."""
_REFUSAL = JSONResponse(
    {
        "error": "refused: a dashboard answers no other site's page, and on loopback only as 127.0.0.1 or localhost"
    },
    421,
)


class Streams:
    """The pages that are kept up to date by event streams. Neighbourhoods of clients share them fairly."""

    def __init__(self, metrics: CollectorRegistry | None = None, most: int = MAX_STREAMS) -> None:
        self._budget = FairBudget(most)
        gauge = Gauge("talkoot_dashboard_streams", "Pages that are kept up to date now.", registry=metrics)
        gauge.set_function(lambda: self._budget.used)

    @property
    def open(self) -> int:
        return self._budget.used

    def add(self, near: str, end: Callable[[], None]) -> Reservation:
        """Adds a stream of a client in this neighbourhood. `end`: ends it if others need its place. Raises ExpertError
        if there is no place for it.
        """
        return self._budget.reserve(Owner.alone(near), 1, end)


def make_app(
    watcher: Watcher, store: HistoryStore, host: str, metrics: CollectorRegistry, streams: Streams
) -> Starlette:
    """`host`: the address it listens on. `metrics`: the dashboard's own."""
    endpoints = _Endpoints(watcher, store, metrics)
    routes = [
        Route("/", endpoints.page),
        Mount("/static", StaticFiles(directory=STATIC, check_dir=False)),
        Route("/healthz", endpoints.healthz),
        Route("/metrics", endpoints.metrics),
        Route("/sd", endpoints.discovery),
        Route("/events", EventStream(watcher, streams), methods=["GET"]),
        Route("/api/v1/openapi.json", endpoints.openapi),
        Route("/api/v1/swarm", endpoints.swarm),
        Route("/api/v1/nodes", endpoints.nodes),
        Route("/api/v1/nodes/{peer_id}", endpoints.node),
        Route("/api/v1/leaderboard", endpoints.leaderboard),
        Route("/api/v1/experts", endpoints.experts),
        Route("/api/v1/experts/{uid}", endpoints.expert),
        Route("/api/v1/trainers", endpoints.trainers),
        Route("/api/v1/memories", endpoints.memories),
        Route("/api/v1/history", endpoints.history),
    ]
    handlers: Mapping[Any, Any] = {api.ApiError: _api_error, HTTPException: _http_error}
    return Starlette(
        routes=routes,
        middleware=[Middleware(BrowserProtection, host=host, refusal=_REFUSAL)],
        exception_handlers=handlers,
    )


class _Endpoints:
    def __init__(self, watcher: Watcher, store: HistoryStore, metrics: CollectorRegistry) -> None:
        self._watcher = watcher
        self._store = store
        self._metrics = metrics

    async def page(self, request: Request) -> Response:
        return FileResponse(STATIC / "index.html")

    async def openapi(self, request: Request) -> Response:
        return FileResponse(OPENAPI, media_type="application/json")

    async def healthz(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def metrics(self, request: Request) -> Response:
        return Response(generate_latest(self._metrics), media_type=CONTENT_TYPE_LATEST)

    async def discovery(self, request: Request) -> Response:
        return JSONResponse(targets(self._watcher.picture, self._watcher.bootstrap))

    async def swarm(self, request: Request) -> Response:
        return JSONResponse(api.swarm(self._watcher.state()))

    async def nodes(self, request: Request) -> Response:
        return JSONResponse(api.nodes(self._watcher.picture, request.query_params))

    async def node(self, request: Request) -> Response:
        watcher = self._watcher
        return JSONResponse(api.node(watcher.picture, request.path_params["peer_id"], watcher.credit))

    async def leaderboard(self, request: Request) -> Response:
        return JSONResponse(api.leaderboard(self._watcher.picture, request.query_params))

    async def trainers(self, request: Request) -> Response:
        return JSONResponse(api.trainers(self._watcher.picture, request.query_params))

    async def memories(self, request: Request) -> Response:
        return JSONResponse(api.memories(self._watcher.picture, request.query_params))

    async def experts(self, request: Request) -> Response:
        return JSONResponse(api.experts(self._watcher.picture, request.query_params))

    async def expert(self, request: Request) -> Response:
        state, uid = self._watcher.state(), request.path_params["uid"]
        shown = api.expert(state.picture, uid, state.now)
        series = []
        for name in ("updates", "replicas"):
            metric = f"expert_{name}"
            found = await self._store.read(
                metric, state.now - _EXPERT_S, state.now, _EXPERT_POINTS, 1, only=uid
            )
            series += api.series([(name, points) for _, points in found])
        return JSONResponse(shown | {"series": series})

    async def history(self, request: Request) -> Response:
        state = self._watcher.state()
        query = api.history_query(request.query_params, state.now)
        found = await self._store.read(query.metric, query.since, state.now, query.points, api.MAX_SERIES)
        series = api.series(found, state.picture)
        return JSONResponse({"metric": query.metric, "unit": api.UNITS[query.metric], "series": series})


class EventStream:
    """Sends a page the swarm's state after each reading, and at least every few seconds (server-sent events).

    A slow page skips states, and the stream of a page that reads nothing is closed, so nothing accumulates. A page
    whose stream ends opens another.
    """

    def __init__(self, watcher: Watcher, streams: Streams) -> None:
        self._watcher = watcher
        self._streams = streams

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        needed_by_others = asyncio.Event()
        try:
            place = self._streams.add(near(scope.get("client")), needed_by_others.set)
        except ExpertError:
            refusal = JSONResponse(
                {"error": "too many pages are open; try again later"}, 503, {"Retry-After": _RETRY_AFTER_S}
            )
            await refusal(scope, receive, send)
            return
        ends_by_itself(scope)
        try:
            await first_of(self._tell(send), disconnected(receive), needed_by_others.wait())
        finally:
            place.release()

    async def _tell(self, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        while True:
            values = json.dumps(api.swarm(self._watcher.state()), allow_nan=False)
            event = f"event: swarm\ndata: {values}\n\n".encode()
            try:
                async with asyncio.timeout(SEND_DEADLINE_S):
                    await send({"type": "http.response.body", "body": event, "more_body": True})
            except TimeoutError:
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_NEWS_AT_LEAST_EVERY_S):
                    await self._watcher.news()


def targets(picture: Picture | None, bootstrap: Iterable[Multiaddress]) -> list[Json]:
    """The answer for Prometheus's HTTP service discovery: the metrics of every live peer that offers them.

    Anybody can write an address into a record, and Prometheus would scrape it. So only IP addresses count, and only
    those of the swarm's own scope: no peer of a public swarm can point Prometheus at this machine or at the network
    behind it. `bootstrap`: the addresses in the swarm's invite.
    """
    if picture is None:
        return []
    nearest = nearest_scope(address.endpoint for address in bootstrap)
    groups = []
    for role, rows in (("node", picture.nodes), ("trainer", picture.trainers)):
        found = sorted(
            {
                row["metrics_address"]
                for row in rows
                if row["metrics_address"]
                and row["state"] not in {"gone", "left", "finished", "stopped"}
                and _scope(row["metrics_address"]) >= nearest
            }
        )
        if found:
            groups.append({"targets": found, "labels": {"role": role, "swarm": picture.figures["name"]}})
    return groups


def _scope(endpoint: str) -> AddressScope:
    try:
        return Endpoint(endpoint).scope or AddressScope.NONE
    except AddressError:
        return AddressScope.NONE


async def _api_error(request: Request, error: api.ApiError) -> Response:
    return JSONResponse({"error": str(error)}, error.status)


async def _http_error(request: Request, error: HTTPException) -> Response:
    body = {"error": f"{request.url.path[:200]}: {error.detail}"}
    return JSONResponse(body, error.status_code, error.headers)
