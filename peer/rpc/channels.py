"""Client channels of gRPC, over TLS with pinned certificates, and the options that servers and clients share."""

import asyncio
import contextlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol, TypeAlias, get_args

import grpc

from peer.bounded import BoundedDict
from peer.codec import MAX_MESSAGE_BYTES
from peer.errors import UnreachableError
from peer.identity import TLS_NAME, PeerID
from peer.loop import cancel_all, first_success
from peer.transport.addresses import Multiaddress
from peer.transport.dialling import Dialling
from peer.transport.endpoints import AddressScope, Endpoint

WINDOW_BYTES = 16 * 2**20
"""Bytes in flight to a client: enough for 100 Mbit/s at a round-trip time of over a second."""
SERVER_WINDOW_BYTES = 2**20
"""Bytes of each call that a server buffers before anybody reads them. Every stranger's call may take as much.
"""
Options: TypeAlias = Sequence[tuple[str, int | str]]
_COMMON_OPTIONS: Options = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.per_message_decompression", 0),  # otherwise 3 KB from a stranger become 3 MB
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.bdp_probe", 0),  # its estimates are far too low on busy machines with a second of delay
]
SERVER_OPTIONS: Options = [
    *_COMMON_OPTIONS,
    ("grpc.http2.lookahead_bytes", SERVER_WINDOW_BYTES),
    ("grpc.so_reuseport", 0),  # otherwise a second server would silently share the port
    (
        "grpc.max_concurrent_streams",
        128,
    ),  # beyond this, gRPC refuses streams before they cost anything
    ("grpc.max_metadata_size", 8192),
    ("grpc.absolute_max_metadata_size", 16384),
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.http2.settings_timeout", 10_000),
    ("grpc.max_connection_idle_ms", 600_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
]
CLIENT_OPTIONS: Options = [
    *_COMMON_OPTIONS,
    ("grpc.http2.lookahead_bytes", WINDOW_BYTES),
    ("grpc.ssl_target_name_override", TLS_NAME),
    ("grpc.use_local_subchannel_pool", 1),  # channels to one address may pin different certificates
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 5_000),
]


def small_messages(most_bytes: int) -> Options:
    """Options for clients of services whose messages have at most `most_bytes`, so that a server that sends more costs
    no memory.
    """
    bounds = {"grpc.max_receive_message_length": most_bytes, "grpc.http2.lookahead_bytes": 2 * most_bytes}
    return [*(option for option in CLIENT_OPTIONS if option[0] not in bounds), *bounds.items()]


_TUNNEL: Literal["tunnel"] = "tunnel"
_RELAY: Literal["relay"] = "relay"
"""`_TUNNEL` and `_RELAY` stand for the tunnel and the relays among a peer's addresses. No real address looks
like them.
"""
_HEAD_START_S = 1.0
"""How long one way is tried alone before the next is tried in parallel."""
_TRY_S = 20.0
_SILENT_S = 5.0
"""How long a peer counts as silent after a failed connection."""
_STEADY_S = 60.0
"""A detour whose connection ends sooner is tried after all other ways. A libp2p relay may limit each connection."""
_BROKEN = (grpc.ChannelConnectivity.TRANSIENT_FAILURE, grpc.ChannelConnectivity.SHUTDOWN)
_SILENT = {grpc.ChannelConnectivity.CONNECTING, grpc.ChannelConnectivity.TRANSIENT_FAILURE}


Way: TypeAlias = Literal["direct", "tunnel", "relay"]
WAYS: tuple[Way, ...] = get_args(Way)


class Detour(Protocol):
    """A way to peers other than dialling their addresses. gRPC dials a socket within this process for it."""

    async def open_to(self, peer_id: PeerID, addresses: Sequence[Multiaddress]) -> str:
        """The address at which gRPC reaches that peer; nothing is dialled yet. Raises UnreachableError."""

    def address_of(self, peer_id: PeerID) -> str:
        """The address that `open_to` returned for the peer."""


class Contact(Protocol):
    """What is needed to call a peer."""

    @property
    def peer_id(self) -> PeerID: ...

    @property
    def addresses(self) -> Sequence[Endpoint]:
        """The endpoints to dial, the best first."""

    @property
    def tunnel_addresses(self) -> Sequence[Multiaddress]:
        """The addresses of the peer's tunnel; empty if it has none."""

    @property
    def relay_addresses(self) -> Sequence[Multiaddress]:
        """The addresses of the peer's server through gRPC relays."""

    @property
    def certificate_pem(self) -> bytes: ...


@dataclass(frozen=True)
class KnownPeer:
    """A contact of a peer that is not known from its record. By default it is called directly only."""

    peer_id: PeerID
    addresses: Sequence[Endpoint]
    certificate_pem: bytes
    tunnel_addresses: Sequence[Multiaddress] = ()
    relay_addresses: Sequence[Multiaddress] = ()


class ChannelPool:
    """Open channels, one per address and pinned certificate. If there are too many, the least recently used is closed.

    A peer with several addresses is called at the one that worked last. If that fails, all are tried again, its tunnel
    and its relays last. gRPC redials a broken channel again and again, so only channels that once connected are kept.
    """

    def __init__(
        self,
        limit: int = 256,
        tunnels: Detour | None = None,
        dialling: Dialling | None = None,
        relays: Detour | None = None,
        *,
        options: Options = CLIENT_OPTIONS,
        try_s: float = _TRY_S,
    ) -> None:
        """`dialling`: the rules for addresses that others wrote; None: any address on this machine may be dialled.

        `try_s`: how long all addresses of a peer are tried, at most.
        """
        self._options = options
        self._try_s = try_s
        self._detours: dict[str, Detour] = {}
        if tunnels is not None:
            self._detours[_TUNNEL] = tunnels
        if relays is not None:
            self._detours[_RELAY] = relays
        self._dialling = dialling or Dialling(AddressScope.LOOPBACK)
        self._channels = BoundedDict[tuple[str, bytes], grpc.aio.Channel](limit)
        self._worked = BoundedDict[PeerID, str](limit)
        self._direct = BoundedDict[PeerID, tuple[str, bytes]](limit)
        """The key in `_channels` of the channel to each peer that was found without a detour."""
        self._called = BoundedDict[PeerID, Way](limit)
        """For each peer, the way of the channel that was given out last."""
        self._tries: dict[tuple[PeerID, tuple[str, ...]], asyncio.Task[grpc.aio.Channel | None]] = {}
        self._failed = BoundedDict[PeerID, float](limit)
        """When a connection to each peer failed last."""
        self._found_at = BoundedDict[PeerID, float](limit)
        self._unsteady = BoundedDict[PeerID, str](limit)
        """The detour to each peer that broke soon after it was found."""
        self._is_closed = False

    def called_by(self, way: Way) -> int:
        """How many peers were last called by this way, of those called recently. For any thread."""
        return list(self._called.values()).count(way)

    def endpoint_of(self, peer_id: PeerID) -> Endpoint | None:
        """The endpoint where the peer was reached last; None if that was by a detour, or too long ago."""
        way = self._worked.get(peer_id)
        return None if way is None or way in self._detours else Endpoint(way)

    async def get(self, address: str, certificate_pem: bytes) -> grpc.aio.Channel:
        """A channel to `host:port` that accepts exactly this certificate. Opening it does no I/O yet.

        Only for addresses that no stranger wrote: it is not checked whether they may be dialled.
        """
        key = (address, certificate_pem)
        channel = self._channels.get(key)
        if channel is None:
            credentials = grpc.ssl_channel_credentials(root_certificates=certificate_pem)
            channel = grpc.aio.secure_channel(address, credentials, self._options)
        for oldest in self._channels.put(key, channel):
            await oldest.close()
        return channel

    def is_silent(self, peer: Contact) -> bool:
        """Whether a connection to the peer is being tried or has failed. False if nobody has called it."""
        ways = self._ways(peer)
        if not ways:
            return False
        if (peer.peer_id, tuple(ways)) in self._tries:
            return True
        way = self._worked.get(peer.peer_id, ways[0])
        address = self._detours[way].address_of(peer.peer_id) if way in self._detours else way
        channel = self._channels.get((address, peer.certificate_pem))
        if channel is None:
            return time.monotonic() - self._failed.get(peer.peer_id, -math.inf) < _SILENT_S
        return channel.get_state() in _SILENT

    async def reach(self, peer: Contact) -> grpc.aio.Channel:
        """A channel to a peer. Waits for a connection if there was none before, or if the peer has several addresses.
        The channel may still fail later; a call then says why. Raises UnreachableError if no address of the peer can be
        called from here, or none answers.
        """
        if self._is_closed:  # late calls would open channels that nobody closes
            raise UnreachableError("this peer is stopping, and makes no more calls")
        ways = self._ways(peer)
        if not ways:
            raise UnreachableError(f"node {peer.peer_id} has no address that can be called from here")
        is_detour = len(ways) == 1 and ways[0] in self._detours
        worked = ways[0] if is_detour else self._worked.get(peer.peer_id)
        if worked in ways:
            channel = await self._open(peer, worked)
            if len(ways) == 1 or not self._has_broken(peer.peer_id, worked, channel.get_state()):
                self._called[peer.peer_id] = _kind(worked)
                return channel
        key = peer.peer_id, tuple(ways)
        trying = self._tries.get(key)
        if trying is None:
            trying = self._tries[key] = asyncio.create_task(self._try(peer, ways))
            trying.add_done_callback(lambda _: self._tries.pop(key, None))
        channel_or_none = await asyncio.shield(trying)  # the other callers still wait for it
        if channel_or_none is None:
            raise UnreachableError(f"node {peer.peer_id} does not answer at {', '.join(ways)}")
        return channel_or_none

    async def forget_broken(self, peer_id: PeerID) -> None:
        """Closes the channel to a peer if its connection has failed, so that the next call dials at once.

        gRPC itself would wait, for up to 5 s after several attempts in vain, and fail all calls meanwhile.
        """
        key = self._direct.get(peer_id)
        channel = None if key is None else self._channels.get(key)
        if key is not None and channel is not None and channel.get_state() in _BROKEN:
            self._worked.pop(peer_id, None)
            del self._channels[key]
            await channel.close()

    async def close(self) -> None:
        """Ends calls in progress. No peer can be called any more."""
        self._is_closed = True
        await cancel_all(list(self._tries.values()))
        while self._channels:
            _, channel = self._channels.popitem()
            with contextlib.suppress(grpc.aio.AioRpcError):
                await channel.close()

    def _ways(self, peer: Contact) -> list[str]:
        detours = [way for way in self._detours if _detour_addresses(peer, way)]
        return [*filter(self._dialling.allows, peer.addresses), *detours]

    async def _open(self, peer: Contact, way: str) -> grpc.aio.Channel:
        if way in self._detours:
            way = await self._detours[way].open_to(peer.peer_id, _detour_addresses(peer, way))
        return await self.get(way, peer.certificate_pem)

    async def _try(self, peer: Contact, ways: Sequence[str]) -> grpc.aio.Channel | None:
        """Tries one way after another; a slow one continues beside the next. Returns None if none connects."""
        opened: list[str] = []

        async def connect(way: str) -> tuple[str, grpc.aio.Channel] | None:
            channel = await self._open(peer, way)
            opened.append(way)
            return (way, channel) if await _connects(channel) else None

        unsteady, found = self._unsteady.get(peer.peer_id), None
        ways = sorted(ways, key=lambda way: way == unsteady)
        # UnreachableError: no sockets are left for a detour
        with contextlib.suppress(TimeoutError, UnreachableError):
            async with asyncio.timeout(self._try_s):
                found = await first_success(
                    map(connect, filter(partial(self._may_dial, peer), ways)), _HEAD_START_S
                )
        if found is None:
            self._failed[peer.peer_id] = time.monotonic()
        else:
            self._failed.pop(peer.peer_id, None)
            self._worked[peer.peer_id] = found[0]
            self._found_at[peer.peer_id] = time.monotonic()
            self._called[peer.peer_id] = _kind(found[0])
            if found[0] in self._detours:
                self._direct.pop(peer.peer_id, None)
            else:
                self._direct[peer.peer_id] = found[0], peer.certificate_pem
                self._dialling.reached(Endpoint(found[0]), peer.peer_id)
        await self._close_unknown(peer, opened)
        return None if found is None else found[1]

    def _has_broken(self, peer_id: PeerID, way: str, state: grpc.ChannelConnectivity) -> bool:
        """Whether the channel has failed, so that other ways should be tried. Records a detour whose connection ended
        soon.
        """
        age_s = time.monotonic() - self._found_at.get(peer_id, -math.inf)
        if way in self._detours and state is not grpc.ChannelConnectivity.READY and age_s < _STEADY_S:
            self._unsteady[peer_id] = way
            return True
        return state in _BROKEN

    def _may_dial(self, peer: Contact, way: str) -> bool:
        return way in self._detours or self._dialling.begin(Endpoint(way), peer.peer_id)

    async def _close_unknown(self, peer: Contact, ways: Sequence[str]) -> None:
        """Closes the channels to endpoints where the peer was never found."""
        for way in ways:
            if way not in self._detours and not self._dialling.is_known(Endpoint(way), peer.peer_id):
                channel = self._channels.pop((way, peer.certificate_pem), None)
                if channel is not None:
                    await channel.close()


def _detour_addresses(peer: Contact, way: str) -> Sequence[Multiaddress]:
    return peer.tunnel_addresses if way == _TUNNEL else peer.relay_addresses


def _kind(way: str) -> Way:
    if way == _TUNNEL:
        return _TUNNEL
    return _RELAY if way == _RELAY else "direct"


async def _connects(channel: grpc.aio.Channel) -> bool:
    """Waits until the channel is connected or its first attempt has failed."""
    state = channel.get_state(try_to_connect=True)
    while state is not grpc.ChannelConnectivity.READY:
        await channel.wait_for_state_change(state)
        last, state = state, channel.get_state(try_to_connect=True)
        if state in _BROKEN and last is not state:
            return False
    return True
