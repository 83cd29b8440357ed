"""Starts and stops a peer's libp2p daemon (p2pd) and its DHT node."""

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Sequence
from typing import Any, Self

import psutil
from hivemind.dht.node import DHTNode
from hivemind.dht.routing import DHTID
from hivemind.dht.validation import RecordValidatorBase
from hivemind.p2p import P2P, PeerID
from hivemind.p2p.p2p_daemon_bindings.control import P2PDaemonError
from hivemind.p2p.p2p_daemon_bindings.utils import ControlFailure
from hivemind.utils.multiaddr import Multiaddr

from peer.errors import StartError, UnreachableError
from peer.identity import Identity
from peer.processes import die_with_parent, sweep_dead_sockets

logger = logging.getLogger(__name__)

DIAL_DEADLINE_S = 3.0
START_DEADLINE_S = 30.0


class _Daemon(P2P):  # type: ignore[misc]  # hivemind has no types
    """hivemind's P2P, whose p2pd dies with us even when we are killed with SIGKILL."""

    @staticmethod
    def _make_process_args(*arguments: Any, **options: Any) -> list[str]:
        return die_with_parent(P2P._make_process_args(*arguments, **options))

    async def _read_outputs(self, ready: "asyncio.Future[None]") -> None:
        """Ends when p2pd ended by itself; hivemind would leave its socket file behind."""
        await super()._read_outputs(ready)
        with contextlib.suppress(FileNotFoundError):
            os.remove(self._daemon_listen_maddr["unix"])


class Host:
    """A running p2pd and DHT node. Made by `start`; `stop` it when done."""

    def __init__(self, p2p: P2P, dht: DHTNode, identity: Identity) -> None:
        self.p2p = p2p
        self.dht = dht
        self.identity = identity

    @classmethod
    async def start(
        cls,
        identity: Identity,
        *,
        listen: str,
        port: int = 0,
        bootstrap: Sequence[str] = (),
        validator: RecordValidatorBase | None = None,
        serves_dht: bool = True,
    ) -> Self:
        """Joins the DHT by the addresses in `bootstrap`, or starts a new one when there are none.

        `serves_dht=False` makes a client that hosts no keys. Raises StartError when this machine can't start it, and
        UnreachableError when no bootstrap address answers.
        """
        sweep_dead_sockets()
        if serves_dht:
            require_free_port(listen, port)
        reachable = await _answering(bootstrap)
        if bootstrap and not reachable:
            raise UnreachableError(
                f"none of the {len(bootstrap)} bootstrap addresses answers: {', '.join(bootstrap)}; "
                "is that peer running, and does this machine have a network connection?"
            )
        p2p = await _start_daemon(identity, listen, port, reachable, serves_dht)
        try:
            dht = await _start_dht(p2p, reachable, validator, serves_dht)
        except BaseException:
            await p2p.shutdown()
            raise
        return cls(p2p, dht, identity)

    async def stop(self) -> None:
        """Leaves the DHT and ends p2pd. Stopping twice is harmless."""
        if self.dht.is_alive:
            # p2pd may be gone already, then there is nothing to unregister from
            with contextlib.suppress(
                ControlFailure, OSError, asyncio.IncompleteReadError, asyncio.TimeoutError
            ):
                await asyncio.wait_for(self.dht.shutdown(), DIAL_DEADLINE_S)
        refresh = self.dht.cache_refresh_task
        if refresh is not None:
            refresh.cancel()
        await self.p2p.shutdown()

    @property
    def peer_id(self) -> PeerID:
        return self.identity.peer_id

    async def bootstrap_addresses(self) -> list[str]:
        """Multiaddresses by which others can join, loopback ones last and only if there is nothing else.

        Raises UnreachableError when p2pd does not answer.
        """
        try:
            visible = await self.p2p.get_visible_maddrs(latest=True)
        except (ControlFailure, OSError, asyncio.IncompleteReadError) as error:
            raise UnreachableError("the libp2p daemon does not answer") from error
        addresses = [str(address) for address in visible]
        direct = [a for a in addresses if a.startswith(("/ip4/", "/ip6/", "/dns")) and "/tcp/" in a]
        public = [a for a in direct if not a.startswith(("/ip4/127.", "/ip6/::1/"))]
        return (public or direct or addresses)[:8]


def default_listen_address() -> str:
    """The first IPv4 address of a network interface that is up, loopback when there is none."""
    up = {name for name, stats in psutil.net_if_stats().items() if stats.isup}
    for name, addresses in sorted(psutil.net_if_addrs().items()):
        for address in addresses:
            if name in up and address.family == socket.AF_INET and not address.address.startswith("127."):
                return str(address.address)
    return "127.0.0.1"


def require_free_port(host: str, port: int) -> None:
    """Raises StartError when the port is taken or the address is not this machine's. Port 0 is always free."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise StartError(
                f"can't listen on {host} port {port}: {error.strerror}; pass another port"
            ) from error


async def _start_daemon(
    identity: Identity, listen: str, port: int, bootstrap: Sequence[str], serves_dht: bool
) -> P2P:
    family = "ip6" if ":" in listen else "ip4"
    started: list[_Daemon] = []

    class Daemon(_Daemon):
        """Can be ended when `create` is cancelled: hivemind would leave p2pd and its sockets behind."""

        def __init__(self) -> None:
            super().__init__()
            started.append(self)

    try:
        return await Daemon.create(
            initial_peers=list(bootstrap) or None,
            identity_path=str(identity.path),
            check_if_identity_free=False,  # the state folder's lock and the signed records stand for it
            host_maddrs=[f"/{family}/{listen}/tcp/{port}"],
            dht_mode="server" if serves_dht else "client",
            no_listen=not serves_dht,
            nat_port_map=False,
            auto_nat=False,
            use_relay=False,
            startup_timeout=START_DEADLINE_S,
        )
    except P2PDaemonError as error:
        if "failed to connect to bootstrap peers" in str(error):
            raise _no_peer_answered(bootstrap) from error
        raise StartError(f"the libp2p daemon did not start: {error}") from error
    except OSError as error:
        raise StartError(f"can't run the libp2p daemon: {error}") from error
    except asyncio.CancelledError:
        for daemon in started:
            await daemon.shutdown()
        raise


async def _start_dht(
    p2p: P2P, bootstrap: Sequence[str], validator: RecordValidatorBase | None, serves_dht: bool
) -> DHTNode:
    try:
        return await DHTNode.create(
            p2p=p2p,
            # from the PeerID, else a peer that restarts stands twice in the routing tables of the others
            node_id=DHTID.generate(source=p2p.peer_id.to_bytes()),
            initial_peers=list(bootstrap) or None,
            record_validator=validator,
            client_mode=not serves_dht,
            cache_locally=False,  # `directory` is the cache, with rules of its own
            cache_nearest=0,
            cache_on_store=False,
            cache_refresh_before_expiry=0,
        )
    except RuntimeError as error:
        raise _no_peer_answered(bootstrap) from error
    except Exception as error:
        if type(error).__name__ != "ValidationError":
            raise
        raise StartError(f"the bootstrap peer refused us: {error}") from error


def _no_peer_answered(bootstrap: Sequence[str]) -> UnreachableError:
    return UnreachableError(
        f"a bootstrap address accepts connections, but no DHT peer answered there: {', '.join(bootstrap)}; "
        "is the invite of a swarm that still runs?"
    )


async def _answering(bootstrap: Sequence[str]) -> list[str]:
    """Those of the addresses at which something accepts a connection, in the same order."""

    async def answers(address: str) -> bool:
        endpoint = _tcp_endpoint(address)
        if endpoint is None:
            return True  # not plain TCP: only libp2p can tell
        try:
            async with asyncio.timeout(DIAL_DEADLINE_S):
                _, writer = await asyncio.open_connection(*endpoint)
        except (OSError, UnicodeError):  # the latter for a host name that can't be one
            return False
        writer.close()
        return True

    results = await asyncio.gather(*map(answers, bootstrap))
    return [address for address, ok in zip(bootstrap, results, strict=True) if ok]


def _tcp_endpoint(address: str) -> tuple[str, int] | None:
    parts = address.strip("/").split("/")
    if len(parts) >= 4 and parts[0] in {"ip4", "ip6", "dns", "dns4", "dns6"} and parts[2] == "tcp":
        return parts[1], int(parts[3])
    return None


def is_multiaddress(text: str) -> bool:
    """Whether the text is a multiaddress that says who and where a peer is, such as /ip4/10.0.0.1/tcp/31337/p2p/Qm…"""
    try:
        return bool(Multiaddr(text)["p2p"]) and not text.startswith("/p2p/")
    except Exception:  # noqa: BLE001  # hivemind raises many types for text that is no multiaddress
        return False
