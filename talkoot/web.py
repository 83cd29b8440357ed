"""What the web servers have in common: how they listen, which connections they keep, and how they protect browsers."""

import asyncio
import contextlib
import logging
import os
import socket
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import uvicorn
from h11 import LocalProtocolError
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from peer.errors import PortError
from peer.formatting import endpoint, host_in, is_loopback
from peer.rpc.connections import most_connections
from peer.transport import endpoints

_MAX_CONNECTIONS = 1000
"""The most connections, if there are descriptors for so many."""
_PATIENCE_S, _LOOK_EVERY_S = 20.0, 5.0
"""How long a connection may last without a complete request, or with an answer that the client does not read."""
_LEAST_TAKEN = 2**16
"""An answer counts as stalled if its client takes less than about this many bytes in that time."""
_PARSED_AT_ONCE = 2**12
"""How many bytes of requests are parsed in one turn of the loop. A body in chunks of one byte takes a microsecond a
byte.
"""
_MOST_AHEAD = 2**16
"""How many bytes behind a request are read while it is answered."""
_CLOSE_S = 2.0
"""The longest wait for answers to end after their connections are closed."""
_BACKLOG = 128
_HEADERS = [
    (b"content-security-policy", b"default-src 'self'; base-uri 'none'; form-action 'self'; "
     b"frame-ancestors 'none'; object-src 'none'"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-cache"),
]  # fmt: skip
_ENDS_BY_ITSELF = "talkoot.ends_by_itself"


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises PortError if the port is taken or the address does not belong to this machine."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=_BACKLOG)
    except UnicodeError as error:  # such as an address with two dots side by side
        raise PortError(f"can't listen on {host}, which is no host name: pass another --host") from error
    except OSError as error:
        # create_server adds the address to its own messages
        why = error.strerror if isinstance(error, socket.gaierror) else os.strerror(error.errno or 0)
        raise PortError(
            f"can't listen on {host} port {port}: {why}; pass another --port or --host"
        ) from error


def address_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://{endpoint(host, port)}/"


@contextlib.asynccontextmanager
async def serving(app: ASGIApp, listener: socket.socket) -> AsyncIterator["asyncio.Task[None]"]:
    """Serves an application until the block ends, and yields the task that does. At the end it stops at once."""
    server = _Server(
        uvicorn.Config(
            app,
            http=Connection,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level=logging.ERROR,  # strangers can trigger its warnings as often as they like
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=min(_MAX_CONNECTIONS, most_connections()),
            timeout_keep_alive=10,
        )
    )
    task = asyncio.create_task(server.serve([listener]), name="serve HTTP")
    try:
        yield task
    finally:
        server.should_exit = server.force_exit = True
        # otherwise unfinished answers would be cancelled, and uvicorn would log a traceback for each
        for connection in list(server.server_state.connections):
            connection.transport.abort()
        await asyncio.gather(task, return_exceptions=True)
        if answers := server.server_state.tasks:
            await asyncio.wait(answers, timeout=_CLOSE_S)


def ends_by_itself(scope: Scope) -> None:
    """Marks the answer to this request as one that may take long. Its connection lasts as long as the client takes what
    is sent.
    """
    scope.setdefault("state", {})[_ENDS_BY_ITSELF] = True


class Connection(H11Protocol):
    """A connection that ends if its client neither sends a request nor takes its answer. uvicorn alone waits
    for ever, and if there are too many connections, it answers nobody.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's own
        super().connection_made(transport)
        self.near: str = near(self.client)
        """The neighbourhood of the client."""
        self.since: float = self.loop.time()
        self._resumed = 0
        """How often the client has taken so much that more could be sent."""
        self._unparsed = b""
        self._parsing: asyncio.Handle | None = None
        """Parses the next part soon."""
        self._make_room()
        self._look(None, self.since)

    def data_received(self, data: bytes) -> None:
        """Parses it in parts, so that other tasks run meanwhile. What follows a request waits for its answer."""
        self._unparsed += data
        self.transport.pause_reading()
        if self._parsing is None:
            self._parse()

    def _parse(self) -> None:
        self._parsing = None
        if self.transport.is_closing():
            return
        if self.is_answering and not self.cycle.more_body:
            if len(self._unparsed) <= _MOST_AHEAD:
                self.transport.resume_reading()  # otherwise, nobody would notice that the client leaves
            return
        part, self._unparsed = self._unparsed[:_PARSED_AT_ONCE], self._unparsed[_PARSED_AT_ONCE:]
        super().data_received(part)
        if self._unparsed:
            self._parsing = self.loop.call_soon(self._parse)
        elif not self.flow.read_paused:
            self.transport.resume_reading()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._resumed += 1

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._unparsed and self._parsing is None:
            self._parsing = self.loop.call_soon(self._parse)

    def send_400_response(self, msg: str) -> None:
        try:
            super().send_400_response(msg)
        except LocalProtocolError:  # an answer to the request has begun
            self.transport.abort()

    @property
    def is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _make_room(self) -> None:
        """If there are too many connections, ends one of the neighbourhood with the most: the oldest on which nothing
        is being answered, or else the oldest. For a client of that neighbourhood, it ends none that is being answered.
        """
        open_ones = [
            each
            for each in self.connections
            if isinstance(each, Connection) and not each.transport.is_closing()
        ]
        if self.limit_concurrency is None or len(open_ones) < self.limit_concurrency:
            return
        ((crowd, _),) = Counter(each.near for each in open_ones).most_common(1)
        own = (each for each in open_ones if each.near == crowd)
        oldest = min(own, key=lambda each: (each.is_answering, each.since))
        (self if oldest.is_answering and crowd == self.near else oldest).transport.abort()

    def _look(self, before: object, since: float) -> None:
        """Looks at the connection. `before`: its state at the last look. `since`: when that state was first seen."""
        if self not in self.connections:  # a closed transport still holds data that was not taken
            return
        now, cycle, answering = self.loop.time(), self.cycle, self.is_answering
        unsent = self.transport.get_write_buffer_size() // _LEAST_TAKEN
        doing = cycle, answering, unsent, self._resumed
        may_last = answering and cycle.scope["state"].get(_ENDS_BY_ITSELF)
        waits_for_client = self.flow.write_paused or self.transport.is_closing()
        if doing != before:
            since = now
        elif now - since > _PATIENCE_S and (waits_for_client or not may_last):
            self.transport.abort()
            return
        self.loop.call_later(_LOOK_EVERY_S, self._look, doing, since)


def near(client: tuple[str, int] | None) -> str:
    """The neighbourhood of a client, as in ASGI's scope; empty if it has no address."""
    return "" if client is None else endpoints.near(client[0])


class _Server(uvicorn.Server):
    """A uvicorn server that leaves signals to the command."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def disconnected(receive: Callable[[], Awaitable[Message]]) -> None:
    """Returns when the client has disconnected. The request must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


class BrowserProtection:
    """Sends security headers, and refuses what other sites' pages request. On loopback, it answers only requests for a
    loopback host: otherwise any web page could read a visitor's page here, through a name that resolves to 127.0.0.1
    (DNS rebinding).
    """

    def __init__(self, app: ASGIApp, host: str, refusal: ASGIApp) -> None:
        """`host`: the address it listens on. `refusal`: answers what is refused, with status 421."""
        self._app = app
        self._local = is_loopback(host)
        self._refusal = refusal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *_HEADERS]
            await send(message)

        refused = (self._local and not is_loopback(_host_of(scope))) or _is_of_another_site(scope)
        await (self._refusal if refused else self._app)(scope, receive, send_safely)


def _is_of_another_site(scope: Scope) -> bool:
    """Whether a browser says that another site's page made this request, and not by a link. Such a page can't read the
    answer, but it could take all event streams.
    """
    headers = dict(scope["headers"])
    is_link = headers.get(b"sec-fetch-dest") == b"document" and scope["method"] in {"GET", "HEAD"}
    return headers.get(b"sec-fetch-site") == b"cross-site" and not is_link


def _host_of(scope: Scope) -> str:
    """The requested host, without its port; empty unless exactly one is named."""
    named = [value.decode("latin-1") for key, value in scope["headers"] if key == b"host"]
    return host_in(named[0]) if len(named) == 1 else ""
