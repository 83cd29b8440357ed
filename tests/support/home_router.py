"""A router on the loopback interface that speaks as much UPnP as miniupnpc needs, as wrongly as a test wants."""

import asyncio
import contextlib
import re
import socket
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from peer.loop import TaskSet

GROUP = "239.255.255.250"
_SERVICE = "urn:schemas-upnp-org:service:WANIPConnection:1"
_DEVICE = "urn:schemas-upnp-org:device:InternetGatewayDevice:1"
_DESCRIPTION = (
    '<?xml version="1.0"?><root xmlns="urn:schemas-upnp-org:device-1-0"><device>'
    f"<deviceType>{_DEVICE}</deviceType><serviceList><service><serviceType>{_SERVICE}</serviceType>"
    "<serviceId>urn:upnp-org:serviceId:WANIPConn1</serviceId><controlURL>/control</controlURL>"
    "<eventSubURL>/event</eventSubURL><SCPDURL>/scpd</SCPDURL></service></serviceList></device></root>"
)
_ENVELOPE = '<?xml version="1.0"?><s:Envelope xmlns:s="http://schemas.xmlsoap.org/soap/envelope/"><s:Body>{}</s:Body></s:Envelope>'

_GONE = (OSError, asyncio.IncompleteReadError)


class Fault(Exception):
    """A UPnP error, by its number."""


@dataclass
class HomeRouter:
    """A router. `entries`: external port → (client, port, lease in seconds)."""

    entries: dict[int, tuple[str, int, int]] = field(default_factory=dict)
    address: str = "44.1.2.3"
    only_permanent: bool = False
    conflicts: frozenset[int] = frozenset()
    answers: Iterable[tuple[bytes, float]] | None = None
    """Sent instead of all other answers, each with the seconds to wait after it."""
    calls: TaskSet = field(default_factory=TaskSet)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answers one HTTP request."""
        with self.calls.including_current(), contextlib.closing(writer), contextlib.suppress(*_GONE):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            length = re.search(r"(?i)content-length: *([0-9]+)", head)
            body = (await reader.readexactly(int(length[1]) if length else 0)).decode()
            if self.answers is None:
                status, text = self._answer(head, body)
                writer.write(f"HTTP/1.1 {status}\r\nContent-Length: {len(text)}\r\n\r\n{text}".encode())
            else:
                writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
                for part, wait_s in self.answers:
                    writer.write(part)
                    await writer.drain()
                    await asyncio.sleep(wait_s)

    def _answer(self, head: str, body: str) -> tuple[str, str]:
        called = re.search(r'(?i)soapaction: *"[^#]*#(\w+)"', head)
        if called is None:
            return "200 OK", _DESCRIPTION
        try:
            said = self.act(called[1], dict(re.findall(r"<(New\w+)>([^<]*)</", body)))
        except Fault as fault:
            error = f"<detail><UPnPError><errorCode>{fault}</errorCode></UPnPError></detail>"
            return "500 Internal Server Error", _ENVELOPE.format(f"<s:Fault>{error}</s:Fault>")
        return "200 OK", _ENVELOPE.format(
            f'<u:{called[1]}Response xmlns:u="{_SERVICE}">{said}</u:{called[1]}Response>'
        )

    def act(self, action: str, asked: dict[str, str]) -> str:
        """Does an action. Returns the elements of the answer. Raises Fault."""
        if action == "GetStatusInfo":
            return "<NewConnectionStatus>Connected</NewConnectionStatus><NewUptime>1</NewUptime>"
        if action == "GetExternalIPAddress":
            return f"<NewExternalIPAddress>{self.address}</NewExternalIPAddress>"
        external = int(asked["NewExternalPort"])
        if action == "DeletePortMapping":
            if self.entries.pop(external, None) is None:
                raise Fault("714")
            return ""
        if action == "GetSpecificPortMappingEntry":
            if external not in self.entries:
                raise Fault("714")
            client, port, lease_s = self.entries[external]
            return (
                f"<NewInternalPort>{port}</NewInternalPort><NewInternalClient>{client}</NewInternalClient>"
                f"<NewEnabled>1</NewEnabled><NewPortMappingDescription>x</NewPortMappingDescription>"
                f"<NewLeaseDuration>{lease_s}</NewLeaseDuration>"
            )
        assert action == "AddPortMapping"
        if external in self.conflicts:
            raise Fault("718")
        lease_s = int(asked["NewLeaseDuration"])
        if self.only_permanent and lease_s:
            raise Fault("725")
        self.entries[external] = (asked["NewInternalClient"], int(asked["NewInternalPort"]), lease_s)
        return ""


@asynccontextmanager
async def serving(router: HomeRouter, host: str) -> AsyncIterator[None]:
    """Answers searches that come from this loopback address, and no others."""
    web = await asyncio.start_server(router.serve, host)
    location = f"http://{host}:{web.sockets[0].getsockname()[1]}/description.xml"
    search = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    search.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    search.bind((GROUP, 1900))
    membership = socket.inet_aton(GROUP) + socket.inet_aton("127.0.0.1")
    search.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, membership)
    search.setblocking(False)

    def answer() -> None:
        asked, sender = search.recvfrom(2048)
        if sender[0] == host and _DEVICE.encode() in asked:
            lines = ["HTTP/1.1 200 OK", f"ST: {_DEVICE}", "USN: uuid:1", f"LOCATION: {location}", "", ""]
            search.sendto("\r\n".join(lines).encode(), sender)

    loop = asyncio.get_running_loop()
    loop.add_reader(search, answer)
    try:
        yield
    finally:
        loop.remove_reader(search)
        search.close()
        web.close()
        await router.calls.aclose()
