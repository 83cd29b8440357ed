"""gRPC over TLS with pinned certificates: the server's credentials, and a pool of client channels."""

import contextlib
from collections import OrderedDict

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from peer.codec import MAX_MESSAGE_BYTES
from peer.identity import TLS_NAME, Identity

_COMMON_OPTIONS: list[tuple[str, int | str]] = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_timeout_ms", 10_000),
]
SERVER_OPTIONS: list[tuple[str, int | str]] = [
    *_COMMON_OPTIONS,
    ("grpc.so_reuseport", 0),  # else a second server silently shares the port
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
]
CLIENT_OPTIONS: list[tuple[str, int | str]] = [
    *_COMMON_OPTIONS,
    ("grpc.ssl_target_name_override", TLS_NAME),
    ("grpc.use_local_subchannel_pool", 1),  # channels to one address may pin different certificates
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 5_000),
]
_SILENT = {grpc.ChannelConnectivity.CONNECTING, grpc.ChannelConnectivity.TRANSIENT_FAILURE}


def server_credentials(identity: Identity, certificate: bytes) -> grpc.ServerCredentials:
    """TLS with this peer's key and its DER certificate."""
    pem = x509.load_der_x509_certificate(certificate).public_bytes(serialization.Encoding.PEM)
    return grpc.ssl_server_credentials([(identity.private_key_pem(), pem)])


class ChannelPool:
    """Open channels, one per address and pinned certificate; the least recently used is closed when full."""

    def __init__(self, limit: int = 256) -> None:
        self._limit = limit
        self._channels: OrderedDict[tuple[str, bytes], grpc.aio.Channel] = OrderedDict()

    async def get(self, address: str, certificate_pem: bytes) -> grpc.aio.Channel:
        """A channel to `host:port` that accepts exactly this certificate. Opening one does no I/O yet."""
        key = (address, certificate_pem)
        channel = self._channels.get(key)
        if channel is None:
            credentials = grpc.ssl_channel_credentials(root_certificates=certificate_pem)
            channel = self._channels[key] = grpc.aio.secure_channel(address, credentials, CLIENT_OPTIONS)
        self._channels.move_to_end(key)
        while len(self._channels) > self._limit:
            _, oldest = self._channels.popitem(last=False)
            await oldest.close()
        return channel

    def is_silent(self, address: str, certificate_pem: bytes) -> bool:
        """Whether a channel tries to connect, or failed to."""
        channel = self._channels.get((address, certificate_pem))
        return channel is not None and channel.get_state() in _SILENT

    async def close(self) -> None:
        while self._channels:
            _, channel = self._channels.popitem()
            with contextlib.suppress(grpc.aio.AioRpcError):
                await channel.close()
