"""Invented swarms of any size, as a dashboard would read them; and a way to ask the dashboard without a socket."""

import asyncio
import functools
import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from prometheus_client import CollectorRegistry
from starlette.applications import Starlette

from dht.announcements import Activity, Latency, NodeInfo, Replica, ReplicaState, TrainerInfo
from dht.directory import View
from dht.invites import Invite
from dht.library import LibraryEntry
from dht.manifest import Manifest
from dht.memory import MemoryID, Part
from dht.records import SwarmKeys
from peer.identity import PeerID
from peer.transport.addresses import Multiaddress
from peer.transport.endpoints import Endpoint
from talkoot.credit import Credit
from talkoot.dashboard.app import MAX_STREAMS, Streams, make_app
from talkoot.dashboard.history import History, HistoryStore
from talkoot.dashboard.picture import CallRateMeter, Census, HostChecks, Picture, paint
from talkoot.dashboard.watcher import Watcher, WatchIntervals
from talkoot.memory.replication import Survey

NOW = 1_700_000_000.0


@functools.cache
def peer(number: int) -> PeerID:
    return PeerID(b"\x12\x20" + hashlib.sha256(str(number).encode()).digest())


INVITE = Invite(SwarmKeys("sauna", peer(-1)), (Multiaddress.of(Endpoint("127.0.0.1:1"), peer(-1)),))


def manifest(grid: Sequence[int] = (4, 4), layers: int = 2) -> Manifest:
    model = {"layers": layers, "hidden": 8, "heads": 2, "context": 8, "feed_forward": 8}
    return Manifest.model_validate({"name": "sauna", "model": model, "experts": {"grid": list(grid)}})


def node(number: int, **changes: Any) -> NodeInfo:
    values: dict[str, Any] = {
        "peer_id": peer(number), "addresses": (f"127.0.0.1:{1 + number % 60000}",), "certificate_pem": b"",
        "protocol_version": 1, "software_version": "0.1.0", "expert_count": number % 5, "expert_capacity": 8,
        "rows_processed": number, "updates": number, "started_at": NOW - 1000.0,
        "expires_at": NOW + 30, "name": f"volunteer {number}", "activity": Activity.SERVING,
        "rows_per_s": float(number), "contributed_rows": 2 * number, "contributed_updates": 2 * number,
        "contributed_s": 3600.0 * number, "memory_shards": number % 3, "memory_bytes": 1000 * (number % 3),
        "memory_queries": number, "memory_queries_per_s": float(number % 3),
    }  # fmt: skip
    return NodeInfo(**values | changes)


def trainer(number: int, **changes: Any) -> TrainerInfo:
    values: dict[str, Any] = {
        "peer_id": peer(1_000_000 + number), "name": f"trainer {number}", "protocol_version": 1,
        "software_version": "0.1.0", "started_at": NOW - 500.0, "renew_every_s": 10.0, "metrics_address": "",
        "step": 7, "steps": 100, "loss": 2.5, "validation_loss": 2.25, "bits_per_byte": 3.25, "tokens_per_s": 100.0,
        "forward": Latency(0.1, 0.5), "backward": Latency(0.2, 0.6), "calls": 10, "bytes_sent": 1000,
        "bytes_received": 2000, "expires_at": NOW + 30, "failures": {"unavailable": 1},
    }  # fmt: skip
    return TrainerInfo(**values | changes)


def replica(uid: Any, number: int, **changes: Any) -> Replica:
    values: dict[str, Any] = {
        "uid": uid, "peer_id": peer(number), "state": ReplicaState.SERVING, "update_count": number,
        "queued_rows": 3, "claimed_at": NOW - 100, "expires_at": NOW + 30,
        "updated_at": NOW - 10, "recent_rows": 100,
    }  # fmt: skip
    return Replica(**values | changes)


def memory(
    name: str = "python-docs", replicas: Sequence[int] = (2, 2), shards: int = 2, **changes: Any
) -> Survey:
    """The survey of a memory. Its first shards have `replicas` replicas each. `changes`: changes to its entry."""
    values: dict[str, Any] = {
        "memory": MemoryID.of(name, peer(-1)), "publisher": peer(-1), "manifest": Part(bytes(32), 1),
        "revision": 3, "passages": 295_000, "total_bytes": 2**28, "licenses": ("PSF-2.0",),
        "about": "Python's documentation", "shards": shards, "grid": (16, 16),
    }  # fmt: skip
    found = {bytes([number]) * 8: count for number, count in enumerate(replicas)}
    return Survey(
        LibraryEntry(**values | changes), found, frozenset(map(peer, range(max(replicas, default=0))))
    )


def picture_of(
    nodes: Sequence[NodeInfo],
    trainers: Sequence[TrainerInfo] = (),
    *,
    swarm: Manifest | None = None,
    replicas: Sequence[Replica] = (),
    gone: Sequence[NodeInfo] = (),
    left: Sequence[NodeInfo] = (),
    ended: Sequence[TrainerInfo] = (),
    now: float = NOW,
    warning: str = "",
    memories: Sequence[Survey] = (),
    credit: Mapping[PeerID, Credit] = MappingProxyType({}),
    checks: Mapping[MemoryID, HostChecks] = MappingProxyType({}),
) -> Picture:
    """What the dashboard shows after one reading. Peers in `gone` were last seen long before.

    `left` and `ended`: nodes and trainers that were there and have just left in an orderly way.
    """
    seen: Census[NodeInfo] = Census(20_000)
    training: Census[TrainerInfo] = Census(1000)
    seen.note({info.peer_id: info for info in gone}, now - 100)
    seen.note({info.peer_id: info for info in left}, now - 1)
    goodbyes = {info.peer_id: replace(info, started_at=0.0, left=True) for info in left}
    seen.note({info.peer_id: info for info in nodes}, now, goodbyes)
    training.note({info.peer_id: info for info in ended}, now - 1)
    results = {info.peer_id: replace(info, left=True) for info in ended}
    training.note({info.peer_id: info for info in trainers}, now, results)
    by_uid: dict[Any, tuple[Replica, ...]] = {}
    for one in replicas:
        by_uid[one.uid] = (*by_uid.get(one.uid, ()), one)
    view = View(swarm or manifest(), by_uid, {info.peer_id: info for info in nodes}, now)
    return paint(view, seen, training, CallRateMeter().note(training), warning, memories, credit, checks)


def large_swarm(nodes: int, trainers: int = 20, grid: Sequence[int] = (64, 64)) -> Picture:
    """A swarm in which every expert has two replicas, at random hosts."""
    rng = random.Random(0)
    model = manifest(grid, layers=1)
    replicas = [replica(uid, rng.randrange(nodes)) for uid in model.uids() for _ in range(2)]
    return picture_of(
        [node(number) for number in range(nodes)],
        [trainer(number) for number in range(trainers)],
        swarm=model,
        replicas=replicas,
    )


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class Asked:
    """A dashboard's application with a picture, which is called directly."""

    def __init__(
        self, folder: Path, picture: Picture | None, host: str = "127.0.0.1", max_streams: int = MAX_STREAMS
    ) -> None:
        self.history = History(folder / "history.sqlite", 64, 64)
        self.store = HistoryStore(self.history)
        self.watcher = Watcher(INVITE, WatchIntervals(2.0), folder, self.store, picture, now=lambda: NOW + 1)
        self.streams = Streams(most=max_streams)
        self.app: Starlette = make_app(
            self.watcher, self.store, host, CollectorRegistry(), self.streams, ThreadPoolExecutor(1)
        )

    def get(self, path: str, host: str = "127.0.0.1:8080", method: str = "GET") -> Answer:
        return asyncio.run(self.ask(path, host, method))

    async def ask(
        self,
        path: str,
        host: str = "127.0.0.1:8080",
        method: str = "GET",
        client: str = "127.0.0.1",
        leaves: asyncio.Event | None = None,
    ) -> Answer:
        """`leaves`: set when the client disconnects."""
        where, _, query = path.partition("?")
        scope = {
            "type": "http", "method": method, "path": where, "raw_path": where.encode(), "root_path": "",
            "query_string": query.encode(), "headers": [(b"host", host.encode())], "http_version": "1.1",
            "scheme": "http", "server": ("127.0.0.1", 8080), "client": (client, 1),
        }  # fmt: skip
        messages: list[dict[str, Any]] = []
        requests = [{"type": "http.request", "body": b"", "more_body": False}]

        async def receive() -> dict[str, Any]:
            if requests:
                return requests.pop()
            await (leaves or asyncio.Event()).wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            messages.append(message)

        async with asyncio.timeout(60):
            await self.app(scope, receive, send)
        headers = {k.decode().lower(): v.decode() for k, v in messages[0]["headers"]}
        return Answer(messages[0]["status"], headers, b"".join(m.get("body", b"") for m in messages[1:]))
