"""The TLS certificate of a peer of which only the PeerID and an endpoint are known."""

import asyncio
import ssl

from peer.errors import RecordError, UnreachableError
from peer.identity import TLS_NAME, PeerID, certificate_pem
from peer.transport.endpoints import Endpoint

MAX_CERTIFICATE_BYTES = 4096
"""Of a certificate, DER. One for a key of 4096 bits takes 1,400."""


async def fetch_certificate(endpoint: Endpoint, peer_id: PeerID, deadline_s: float) -> bytes:
    """Makes one TLS connection and returns the certificate of who answers, PEM, if its key is the peer's.

    TLS proves that it has the key. Ask `Dialling` before, if a stranger wrote the endpoint. Raises UnreachableError.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # the PeerID says which key it must be
    context.set_alpn_protocols(["h2"])
    try:
        async with asyncio.timeout(deadline_s):
            _, writer = await asyncio.open_connection(
                endpoint.host, endpoint.port, ssl=context, server_hostname=TLS_NAME
            )
    except OSError as error:  # also TimeoutError and ssl.SSLError
        raise UnreachableError(
            f"no TLS server answers at {endpoint}: {str(error) or 'it took too long'}"
        ) from error
    try:
        shown = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    finally:
        writer.transport.abort()  # a silent peer would never end TLS
    if not shown or len(shown) > MAX_CERTIFICATE_BYTES:
        raise UnreachableError(f"the server at {endpoint} shows no certificate of a peer")
    try:
        return certificate_pem(shown, peer_id)
    except RecordError as error:
        raise UnreachableError(f"peer {peer_id} is not at {endpoint}: {error}") from error
