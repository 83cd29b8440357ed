"""Fetches the TLS certificate of a peer whose PeerID and endpoint are known."""

import asyncio
import ssl
from typing import cast

from peer.errors import RecordError, UnreachableError
from peer.identity import TLS_NAME, PeerID, certificate_in, certificate_pem
from peer.transport.endpoints import Endpoint


async def fetch_certificate(endpoint: Endpoint, peer_id: PeerID, deadline_s: float) -> bytes:
    """Makes one TLS connection and returns the other side's certificate, PEM, if its key is the peer's.

    TLS proves that the other side has the key. If a stranger wrote the endpoint, ask `Dialling` first. Raises
    UnreachableError.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # the PeerID says which key to expect
    context.set_alpn_protocols(["h2"])
    connection = _Connection()
    try:
        async with asyncio.timeout(deadline_s):
            await asyncio.get_running_loop().create_connection(
                lambda: connection, endpoint.host, endpoint.port, ssl=context, server_hostname=TLS_NAME
            )
        shown = connection.certificate
    except OSError as error:  # includes TimeoutError and ssl.SSLError
        raise UnreachableError(
            f"no TLS server answers at {endpoint}: {str(error) or 'it took too long'}"
        ) from error
    finally:
        connection.abort()
    if not shown:
        raise UnreachableError(f"the server at {endpoint} shows no certificate of a peer")
    try:
        return certificate_pem(certificate_in(shown), peer_id)
    except RecordError as error:
        raise UnreachableError(f"peer {peer_id} is not at {endpoint}: {error}") from error


class _Connection(asyncio.Protocol):
    """Keeps the transport once TLS is established, even if the waiting task was cancelled at that moment.

    Otherwise the connection would be closed in order, which waits for ever if the peer never ends TLS.
    """

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's transports are of another class

    @property
    def certificate(self) -> bytes | None:
        """The peer's certificate, DER."""
        assert self._transport is not None, "it is connected"
        found: bytes | None = self._transport.get_extra_info("ssl_object").getpeercert(binary_form=True)
        return found

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()
