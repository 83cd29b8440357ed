"""Three real hosts, and swarms on them."""

import time
import zlib
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from callers import numbered_identity
from raw_dht import store_raw

from dht.announcements import ReplicaState
from dht.experts import ExpertRegistry
from dht.manifest import Manifest
from dht.records import RecordValidator, SwarmKeys
from dht.registry import Registry
from dht.uid import UID
from peer import PROTOCOL_VERSION, SOFTWARE_VERSION
from peer.host import Host, NetworkConfig
from peer.loop import LoopThread
from peer.transport.addresses import Multiaddress
from peer.wire import records_pb2

MANIFEST = Manifest.model_validate(
    {"name": "swarm", "model": {"layers": 2}, "experts": {"grid": (3, 4)}, "routing": {"top_k": 2}}
)
FIRST, SECOND, THIRD = UID(0, (0, 1)), UID(0, (2, 3)), UID(1, (1, 0))
SERVING, CLAIMED = ReplicaState.SERVING, ReplicaState.CLAIMED
LIFETIME_S = 60.0


@contextmanager
def three_hosts(loop: LoopThread) -> Iterator[list[Host]]:
    """Three real hosts, which know each other."""
    started: list[Host] = []

    async def start() -> None:
        bootstrap: list[Multiaddress] = []
        for n in range(3):
            started.append(
                await Host.start(
                    numbered_identity(n),
                    NetworkConfig("127.0.0.1"),
                    bootstrap=bootstrap,
                    validator=RecordValidator(),
                )
            )
            bootstrap = bootstrap or started[0].bootstrap_addresses()

    try:
        loop.run(start(), 120)
        yield started
    finally:
        for host in reversed(started):
            loop.run(host.stop(), 120)


@dataclass
class Swarm:
    """A swarm of its own, as seen by three peers."""

    hosts: list[Host]
    keys: SwarmKeys
    run: Callable[[Coroutine[Any, Any, None]], None]
    _registries: dict[int, Registry] = field(default_factory=dict)
    _experts: dict[int, ExpertRegistry] = field(default_factory=dict)

    def registry(self, n: int, now: Callable[[], float] | None = None) -> Registry:
        """A peer's registry; with another clock, a new one."""
        if now is None and n in self._registries:
            return self._registries[n]
        made = Registry(self.hosts[n].dht, self.keys, self.hosts[n].identity, now=now or time.time)
        return self._registries.setdefault(n, made) if now is None else made

    def experts(self, n: int, now: Callable[[], float] | None = None) -> ExpertRegistry:
        """What a peer knows of the experts; with another clock, a new one that knows nothing."""
        if now is not None or n not in self._experts:
            made = ExpertRegistry(self.registry(n, now), MANIFEST)
            return self._experts.setdefault(n, made) if now is None else made
        return self._experts[n]

    async def store(self, n: int, key: str, subkey: object, value: object, expires_at: float) -> bool:
        """Stores an entry without the registry."""
        return await store_raw(self.hosts[n], key, subkey, value, expires_at)


def swarm_for(loop: LoopThread, hosts: list[Host], request: pytest.FixtureRequest) -> Swarm:
    """A swarm for one test."""
    name = f"swarm-{zlib.crc32(request.node.name.encode()):x}"
    return Swarm(hosts, SwarmKeys(name, hosts[0].peer_id), lambda coroutine: loop.run(coroutine, 60))


def node_record(host: Host, **changes: Any) -> records_pb2.NodeRecord:
    fields = {
        "addresses": ["127.0.0.1:50051"],
        "certificate": host.identity.make_certificate(),
        "protocol_version": PROTOCOL_VERSION,
        "software_version": SOFTWARE_VERSION,
        "expert_count": 2,
        "expert_capacity": 5,
        "rows_processed": 2**40,
        "updates": 7,
        "started_at": 1.5,
        **changes,
    }
    return records_pb2.NodeRecord(**fields)
