"""The server's web application: its routes, and what happens between a request and the end of its answer."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

from peer.errors import DataError
from peer.formatting import counted
from peer.metrics import start_at_zero
from talkoot.dashboard.app import STATIC as DASHBOARD_STATIC
from talkoot.serve import api
from talkoot.serve.access import RETRY_S, ApiKeys, Places
from talkoot.serve.api import Json, RequestError
from talkoot.serve.engine import Engine, EngineError, Job, Piece, Stream
from talkoot.serve.model import ServedModel
from talkoot.serve.settings import ServeSettings
from talkoot.web import BrowserProtection, disconnected, ends_by_itself

STATIC = Path(__file__).parent / "static"
MAX_BODY = 2**20
"""The limit for a request, in bytes."""
_MOST_DRAINED, _DRAIN_S = 2**25, 5.0
"""How many bytes of a body that is too large are read and dropped, and for how long, because most clients read the
refusal only after they have sent the body.
"""
_REFUSAL = JSONResponse(
    api.error_json(
        421, "this server answers no other site's page, and on loopback only as 127.0.0.1 or localhost"
    ),
    421,
)


def make_app(
    served: ServedModel, engine: Engine, keys: ApiKeys, settings: ServeSettings, metrics: CollectorRegistry
) -> Starlette:
    """`metrics`: the server's own."""
    places = Places(settings.max_streams + settings.max_waiting, settings.max_per_client)
    requests = Counter(
        "talkoot_serve_requests",
        "Requests for text, by what became of them.",
        ["outcome"],
        registry=metrics,
    )
    start_at_zero(requests, *_OUTCOMES)
    shared = _Shared(served, engine, keys, places, settings.max_tokens, requests)
    endpoints = _Endpoints(shared, metrics)
    routes = [
        Route("/", endpoints.page),
        Mount("/static/shared", StaticFiles(directory=DASHBOARD_STATIC, check_dir=False)),
        Mount("/static", StaticFiles(directory=STATIC, check_dir=False)),
        Route("/healthz", endpoints.healthz),
        Route("/metrics", endpoints.metrics),
        Route("/status", endpoints.status),
        Route("/v1/models", endpoints.models),
        Route("/v1/models/{model:path}", endpoints.model),
        Route("/v1/completions", Answers(shared, _completion), methods=["POST"]),
        Route("/v1/chat/completions", Answers(shared, _chat), methods=["POST"]),
    ]
    handlers: Mapping[Any, Any] = {
        RequestError: _request_error,
        HTTPException: _http_error,
        Exception: _server_error,
    }
    protection = Middleware(BrowserProtection, host=settings.host, refusal=_REFUSAL)
    return Starlette(routes=routes, middleware=[protection], exception_handlers=handlers)


_OUTCOMES = ("answered", "left", "refused", "failed")
"""Answered completely; the client left; refused with a status; aborted by the server."""


@dataclass(frozen=True)
class _Shared:
    """What the endpoints have in common."""

    served: ServedModel
    engine: Engine
    keys: ApiKeys
    places: Places
    max_tokens: int
    requests: Counter


class _Endpoints:
    def __init__(self, shared: _Shared, metrics: CollectorRegistry) -> None:
        self._shared = shared
        self._served = shared.served
        self._metrics = metrics
        self._since = int(time.time())

    async def page(self, request: Request) -> Response:
        return FileResponse(STATIC / "index.html")

    async def healthz(self, request: Request) -> Response:
        if not self._shared.engine.is_alive():
            return JSONResponse({"status": "nothing is computed any more"}, 503)
        if not self._served.live_experts():
            return JSONResponse({"status": "no expert is live"}, 503)
        return JSONResponse({"status": "ok"})

    async def metrics(self, request: Request) -> Response:
        return Response(generate_latest(self._metrics), media_type=CONTENT_TYPE_LATEST)

    async def status(self, request: Request) -> Response:
        """The values that the page shows."""
        served = self._served
        return JSONResponse(
            {
                "model": served.name,
                "from": served.source,
                "context": served.model.context,
                "max_tokens": self._shared.max_tokens,
                "experts": {"live": served.live_experts(), "total": served.experts_total},
                "needs_key": self._shared.keys.are_needed,
                "answers_questions": served.questions is not None,
            }
        )

    async def models(self, request: Request) -> Response:
        self._shared.keys.client(request.scope)
        return JSONResponse({"object": "list", "data": [self._described()]})

    async def model(self, request: Request) -> Response:
        self._shared.keys.client(request.scope)
        _check_model(request.path_params["model"], self._served)
        return JSONResponse(self._described())

    def _described(self) -> Json:
        return {"id": self._served.name, "object": "model", "created": self._since, "owned_by": "talkoot"}


@dataclass(frozen=True)
class _Asked:
    """A valid request: what to compute, and how to answer."""

    job: Job
    reply: api.Reply
    streams: bool


def _completion(body: bytes, shared: _Shared) -> _Asked:
    """Run it on a separate thread, because a long text takes a while. Raises RequestError."""
    request = api.CompletionRequest.parse(body)
    _check_model(request.model, shared.served)
    given = request.text_or_tokens()
    if shared.served.questions is not None:
        job = _question_job(request, given, "prompt", shared)
    else:
        prompt = _prompt(given, shared.served)
        job = Job(prompt, request.sampling(shared.max_tokens), request.stops(), request.alternatives())
    return _asked(request, job, api.CompletionReply, shared)


def _chat(body: bytes, shared: _Shared) -> _Asked:
    request = api.ChatRequest.parse(body)
    _check_model(request.model, shared.served)
    if shared.served.questions is not None:
        job = _question_job(request, request.question(), "messages", shared)
    else:
        chat = shared.served.chat
        stops = (*request.stops(), *chat.stop)
        prompt = _prompt(request.text(chat), shared.served)
        job = Job(prompt, request.sampling(shared.max_tokens), stops, request.alternatives())
    return _asked(request, job, api.ChatReply, shared)


def _asked(request: api.Request, job: Job, make: type[api.Reply], shared: _Shared) -> _Asked:
    names = api.TokenNames(shared.served.token_bytes)
    reply = make(shared.served.name, len(job.prompt), names, request.wants_usage)
    return _Asked(job, reply, bool(request.stream))


def _question_job(
    request: api.Request, question: str | Sequence[int], parameter: str, shared: _Shared
) -> Job:
    """A job for a model that answers questions. Raises RequestError."""
    assert shared.served.questions is not None
    if not isinstance(question, str):
        raise api.invalid("prompt", "this model answers questions; send one as text")
    if request.alternatives() is not None:
        raise api.invalid("logprobs", "an answer has none, because it is a sum over passages")
    try:
        shared.served.questions.check(question)
    except DataError as error:
        raise api.invalid(parameter, str(error)) from error
    prompt = shared.served.tokenizer.encode(question).tolist()
    return Job(prompt, request.sampling(shared.max_tokens), question=question)


def _prompt(given: str | Sequence[int], served: ServedModel) -> Sequence[int]:
    """The prompt as tokens. Raises RequestError if it does not fit into the model's context."""
    context, fewest = served.model.context, served.model.first_scored
    if isinstance(given, str):
        size = len(given.encode())
        # such a long text is not worth encoding
        too_long = size > context * served.longest_token
        tokens = [] if too_long else served.tokenizer.encode_prompt(given).tolist()
        count = len(tokens) if tokens or not size else size // served.longest_token
    else:
        tokens, count = given, len(given)
        if max(tokens) >= len(served.token_bytes):
            raise api.invalid("prompt", f"tokens go from 0 to {len(served.token_bytes) - 1}")
    if count > context:
        raise RequestError(
            400,
            f"the prompt has {'at least ' if not tokens else ''}{count} tokens, but the model's context is {context}: "
            "give a shorter prompt",
            "context_length_exceeded",
            parameter="prompt",
        )
    if count < fewest:
        raise RequestError(
            400, f"the prompt has {counted(count, 'token')}, but this model needs {fewest} or more", "invalid_value",
            parameter="prompt",
        )  # fmt: skip
    return tokens


def _check_model(name: str, served: ServedModel) -> None:
    if name != served.name:
        raise RequestError(
            404,
            f"no model {name[:200]!r} here; there is {served.name!r}",
            "model_not_found",
            parameter="model",
        )


class Answers:
    """An endpoint that answers with text. If the client disconnects, its answer ends before the next token."""

    def __init__(self, shared: _Shared, read: Callable[[bytes, _Shared], _Asked]) -> None:
        self._shared = shared
        self._read = read

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        outcome = "failed"
        try:
            client = self._shared.keys.client(scope)
            with self._shared.places.taken(client):
                body = await _body(scope, receive)
                if not self._shared.served.live_experts():
                    raise RequestError(
                        503, "no expert of the swarm is live; try again later", retry_after_s=RETRY_S
                    )
                asked = await asyncio.to_thread(self._read, body, self._shared)
                del body
                ends_by_itself(scope)
                outcome = await self._answer(asked, client, receive, send)
        except RequestError as error:
            outcome = "failed" if error.status >= 500 else "refused"
            await _refuse(error)(scope, receive, send)
        except ClientGone:
            outcome = "left"
        finally:
            self._shared.requests.labels(outcome).inc()

    async def _answer(self, asked: _Asked, client: str, receive: Receive, send: Send) -> str:
        try:
            stream = self._shared.engine.begin(asked.job, client)
        except EngineError as error:
            raise RequestError(503, str(error)) from error
        answer = _send_chunks if asked.streams else _send_whole
        answering = asyncio.create_task(answer(asked.reply, stream, send), name="answer")
        leaving = asyncio.create_task(disconnected(receive), name="wait for the client to leave")
        try:
            done, _ = await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
            return answering.result() if answering in done else "left"
        finally:
            self._shared.engine.cancel(stream)
            answering.cancel()
            leaving.cancel()
            await asyncio.gather(answering, leaving, return_exceptions=True)


class ClientGone(Exception):
    """The client no longer waits for its answer."""


async def _send_whole(reply: api.Reply, stream: Stream, send: Send) -> str:
    try:
        pieces = [piece async for piece in stream]
    except EngineError as error:
        raise RequestError(503, str(error), retry_after_s=RETRY_S) from error
    # with log probabilities, it may be several megabytes
    body = await asyncio.to_thread(lambda: _to_json(reply.whole(Piece.joined(pieces))))
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})
    return "answered"


async def _send_chunks(reply: api.Reply, stream: Stream, send: Send) -> str:
    async def write(*events: bytes, more: bool = True) -> None:
        body = b"".join(b"data: %s\n\n" % event for event in events)
        await send({"type": "http.response.body", "body": body, "more_body": more})

    def events(piece: Piece) -> list[bytes]:
        return [_to_json(chunk) for chunk in reply.chunks(piece)]

    headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await write(*map(_to_json, reply.first()))
    try:
        async for piece in stream:
            # of a client that reads slowly, several megabytes may have accumulated
            await write(*(await asyncio.to_thread(events, piece) if piece.scored else events(piece)))
    except EngineError as error:
        await write(_to_json(api.error_json(503, str(error))), more=False)
        return "failed"
    await write(b"[DONE]", more=False)
    return "answered"


async def _body(scope: Scope, receive: Receive) -> bytes:
    """Raises RequestError, and ClientGone."""
    headers = dict(scope["headers"])
    kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    if kind != b"application/json":
        # any web page that this machine's user visits can send requests of other content types
        raise RequestError(415, "send JSON, with the header Content-Type: application/json")
    size = int(length) if (length := headers.get(b"content-length", b"")).isdigit() else 0
    is_too_large = size > MAX_BODY
    body = bytearray()
    drained = 0
    if not is_too_large or (size <= _MOST_DRAINED and b"expect" not in headers):
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_DRAIN_S if is_too_large else None):
                async for part in _parts(receive):
                    drained += len(part)
                    is_too_large = is_too_large or drained > MAX_BODY
                    if drained > _MOST_DRAINED:
                        break
                    if is_too_large:
                        body.clear()
                    else:
                        body += part
    if is_too_large:
        raise RequestError(413, f"a request has at most {MAX_BODY >> 20} MiB", "request_too_large")
    return bytes(body)


async def _parts(receive: Receive) -> AsyncIterator[bytes]:
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        more = message.get("more_body", False)
        yield message.get("body", b"")


def _to_json(value: Json) -> bytes:
    """JSON in ASCII, because many clients take U+2028 or U+0085 in a stream for the end of a line."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()


def _refuse(error: RequestError) -> Response:
    headers = {} if error.retry_after_s is None else {"Retry-After": str(error.retry_after_s)}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.json, error.status, headers)


async def _request_error(request: Request, error: RequestError) -> Response:
    return _refuse(error)


async def _http_error(request: Request, error: HTTPException) -> Response:
    message = f"{request.method} {request.url.path[:200]}: {error.detail}"
    return JSONResponse(api.error_json(error.status_code, message), error.status_code, error.headers)


async def _server_error(request: Request, error: Exception) -> Response:
    """The answer to the client after an unexpected error, which is logged as usual."""
    return JSONResponse(api.error_json(500, "an internal error; the server's log says more"), 500)
