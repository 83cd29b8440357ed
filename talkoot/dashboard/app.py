"""The dashboard's web application: its routes, the event stream, service discovery, and what protects browsers."""

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

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
from peer.rates import FairLock
from peer.transport.addresses import Multiaddress
from peer.transport.dialling import nearest_scope
from peer.transport.endpoints import AddressScope, Endpoint
from talkoot.dashboard import api
from talkoot.dashboard.history import HistoryStore
from talkoot.dashboard.picture import ENDED, Json, Picture
from talkoot.dashboard.watcher import Watcher
from talkoot.web import BrowserProtection, disconnected, ends_by_itself, near

T = TypeVar("T")
RequestHandler: TypeAlias = Callable[[Request], Awaitable[Response]]

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
_ENCODED_AT_ONCE = 1000
"""Items of a list that are encoded at once."""
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
        self.open: Gauge = Gauge(
            "talkoot_dashboard_streams", "Pages that are kept up to date now.", registry=metrics
        )
        self.open.set_function(lambda: self._budget.used)

    def add(self, near: str, end: Callable[[], None]) -> Reservation:
        """Adds a stream of a client in this neighbourhood. `end`: ends it if others need its place. Raises ExpertError
        if there is no place for it.
        """
        return self._budget.reserve(Owner.alone(near), 1, end)


def make_app(
    watcher: Watcher,
    store: HistoryStore,
    host: str,
    metrics: CollectorRegistry,
    streams: Streams,
    thread: ThreadPoolExecutor,
) -> Starlette:
    """`host`: the address it listens on. `metrics`: the dashboard's own. `thread`: computes what takes long. It should
    have one thread, so that no work begins before the last has ended, even if nobody waits for that any more.
    """
    endpoints, turns = _Endpoints(watcher, store, metrics, thread), RequestTurns()
    routes = [
        Route("/", endpoints.page),
        Mount("/static", StaticFiles(directory=STATIC, check_dir=False)),
        Route("/healthz", endpoints.healthz),
        Route("/metrics", endpoints.metrics),
        Route("/sd", turns.taken_by(endpoints.discovery)),
        Route("/events", EventStream(watcher, streams), methods=["GET"]),
        Route("/api/v1/openapi.json", endpoints.openapi),
        Route("/api/v1/swarm", endpoints.swarm),
        Route("/api/v1/nodes", turns.taken_by(endpoints.nodes)),
        Route("/api/v1/nodes/{peer_id}", turns.taken_by(endpoints.node)),
        Route("/api/v1/leaderboard", turns.taken_by(endpoints.leaderboard)),
        Route("/api/v1/experts", turns.taken_by(endpoints.experts)),
        Route("/api/v1/experts/{uid}", turns.taken_by(endpoints.expert)),
        Route("/api/v1/trainers", turns.taken_by(endpoints.trainers)),
        Route("/api/v1/memories", turns.taken_by(endpoints.memories)),
        Route("/api/v1/history", turns.taken_by(endpoints.history)),
    ]
    handlers: Mapping[Any, Any] = {api.ApiError: _api_error, HTTPException: _http_error}
    return Starlette(
        routes=routes,
        middleware=[Middleware(BrowserProtection, host=host, refusal=_REFUSAL)],
        exception_handlers=handlers,
    )


class RequestTurns:
    """Lets one request at a time be answered, of those whose answers take long to make. Neighbourhoods of clients take
    turns, and a request whose client has gone no longer waits.
    """

    def __init__(self) -> None:
        self._turn = FairLock()

    def taken_by(self, endpoint: RequestHandler) -> RequestHandler:
        """The endpoint, for requests that take turns."""

        async def answer(request: Request) -> Response:
            return await first_of(self._in_turn(endpoint, request), _unread(request))

        return answer

    async def _in_turn(self, endpoint: RequestHandler, request: Request) -> Response:
        async with self._turn.held_by(Owner.alone(near(request.scope.get("client")))):
            return await endpoint(request)


async def _unread(request: Request) -> Response:
    """Waits until the client has disconnected. Returns an answer that nobody reads."""
    await disconnected(request.receive)
    return Response()


class _Answer(JSONResponse):
    """A JSON object. It is encoded in parts, because no other thread can run while the encoder does."""

    def render(self, content: Json) -> bytes:
        encode = super().render

        def parts(value: Any) -> bytes:
            if not isinstance(value, list):
                return encode(value)
            slices = (value[i : i + _ENCODED_AT_ONCE] for i in range(0, len(value), _ENCODED_AT_ONCE))
            return b"[%b]" % b",".join(encode(each)[1:-1] for each in slices)

        return b"{%b}" % b",".join(b"%b:%b" % (encode(key), parts(value)) for key, value in content.items())


class _Endpoints:
    """What takes long is computed on another thread, so that no request holds the loop."""

    def __init__(
        self, watcher: Watcher, store: HistoryStore, metrics: CollectorRegistry, thread: ThreadPoolExecutor
    ) -> None:
        self._watcher = watcher
        self._store = store
        self._metrics = metrics
        self._thread = thread
        self._discovered: tuple[Picture | None, list[Json]] = (None, [])
        """The last picture that service discovery saw, and its answer."""

    async def page(self, request: Request) -> Response:
        return FileResponse(STATIC / "index.html")

    async def openapi(self, request: Request) -> Response:
        return FileResponse(OPENAPI, media_type="application/json")

    async def healthz(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def metrics(self, request: Request) -> Response:
        return Response(generate_latest(self._metrics), media_type=CONTENT_TYPE_LATEST)

    async def discovery(self, request: Request) -> Response:
        return await self._compute(lambda: JSONResponse(self._targets()))

    async def swarm(self, request: Request) -> Response:
        return JSONResponse(api.swarm(self._watcher.state()))

    async def nodes(self, request: Request) -> Response:
        return await self._answer(api.nodes, request)

    async def node(self, request: Request) -> Response:
        picture, credit, peer_id = self._watcher.picture, self._watcher.credit, request.path_params["peer_id"]
        return await self._compute(lambda: _Answer(api.node(picture, peer_id, credit)))

    async def leaderboard(self, request: Request) -> Response:
        return await self._answer(api.leaderboard, request)

    async def trainers(self, request: Request) -> Response:
        return await self._answer(api.trainers, request)

    async def memories(self, request: Request) -> Response:
        return await self._answer(api.memories, request)

    async def experts(self, request: Request) -> Response:
        return await self._answer(api.experts, request)

    async def expert(self, request: Request) -> Response:
        state, uid = self._watcher.state(), request.path_params["uid"]
        shown = await self._compute(lambda: api.expert(state.picture, uid, state.now))
        series = []
        for name in ("updates", "replicas"):
            metric = f"expert_{name}"
            found = await self._store.read(
                metric, state.now - _EXPERT_S, state.now, _EXPERT_POINTS, 1, only=uid
            )
            series += api.series([(name, points) for _, points in found])
        return await self._compute(lambda: _Answer(shown | {"series": series}))

    async def history(self, request: Request) -> Response:
        state = self._watcher.state()
        query = await self._compute(lambda: api.history_query(request.query_params, state.now))
        found = await self._store.read(query.metric, query.since, state.now, query.points, api.MAX_SERIES)
        named = {"metric": query.metric, "unit": api.UNITS[query.metric]}
        return await self._compute(lambda: _Answer(named | {"series": api.series(found, state.picture)}))

    async def _answer(
        self, answer: Callable[[Picture | None, Mapping[str, str]], Json], request: Request
    ) -> Response:
        picture = self._watcher.picture
        return await self._compute(lambda: _Answer(answer(picture, request.query_params)))

    async def _compute(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _targets(self) -> list[Json]:
        """On the other thread."""
        picture = self._watcher.picture
        if self._discovered[0] is not picture:
            self._discovered = picture, targets(picture, self._watcher.bootstrap)
        return self._discovered[1]


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
            await send({"type": "http.response.body", "body": event, "more_body": True})
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
                and row["state"] not in ENDED
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
