"""A swarm of node processes in which half of the hosts of a memory are killed, with two replicas of each shard.

Two nodes host all shards, and two more have room. One of the hosts is killed while searches go on.
"""

import asyncio
import itertools
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from benchmarks.memory.recall import K
from benchmarks.village import START_LIMIT_S, RunningNode, joining_node, running_node, wait_for
from dht.announcements import ReplicaState
from dht.library import WANTED_REPLICAS, LibraryEntry, MemoryRegistry
from dht.swarm import Swarm, join_swarm
from peer.errors import LibraryError, TalkootError
from peer.host import NetworkConfig
from peer.identity import Identity, PeerID
from peer.loop import LoopThread
from peer.platform.processes import die_with_parent
from trainer_client.client import SwarmClient
from trainer_client.memory.memories import Memory
from trainer_client.settings import TrainerSettings

PERIOD_S = 4.0
"""Seconds between two announcements of a node."""
PERIODS = 5
"""The number of announcement periods within which all shards should have two replicas again."""
ASKED = 8
_HOST = "127.0.0.1"
_MANIFEST = """
name = "benchmark"
preset = "none"
[model]
layers = 1
hidden = 8
heads = 2
context = 16
feed_forward = 16
[experts]
grid = [2, 2]
"""
_PUBLISH_LIMIT_S = 240.0
_LIMIT_S = 30 * PERIOD_S
_PAUSE_S = 0.1


def measure(folder: Path, texts: Sequence[str]) -> dict[str, Any]:
    """Runs the swarm, kills a host, and measures what follows. `folder`: where the memory is."""
    timing = ["--announce-every-s", f"{PERIOD_S:g}"]
    disk = [*timing, "--memory-disk", "2GB"]
    with ExitStack() as stack:
        founder = stack.enter_context(running_node(_MANIFEST, 4, timing))
        hosts = [stack.enter_context(joining_node(founder, number, 0, disk)) for number in (1, 2)]
        began = time.monotonic()
        _publish(folder, founder, timing)
        published_s = time.monotonic() - began
        invites = {number: founder.folder / f"invite-{number}" for number in (3, 4)}
        joined = {
            number: stack.enter_context(
                joining_node(founder, number, 0, [*disk, "--invite-file", str(invite)])
            )
            for number, invite in invites.items()
        }
        for number, invite in invites.items():  # a node writes it once it serves
            wait_for(invite, joined[number], founder.folder / f"node-{number}.log")
        client = stack.enter_context(
            SwarmClient(founder.invite, TrainerSettings(), founder.folder / "searcher")
        )
        watcher = stack.enter_context(_Watcher(founder))
        memory = _opened(client)
        before = [_leaves(memory, text) for text in texts]
        killed = Identity.load_or_create(founder.folder / "node-1" / "identity.key").peer_id
        assert watcher.below({killed}) == watcher.entry.shards, "a killed host was not one of two"
        hosts[0].kill()
        return {"shards": watcher.entry.shards, "published_in_s": published_s} | _search_on(
            memory, texts, before, watcher, killed
        )


def _search_on(
    memory: Memory,
    texts: Sequence[str],
    before: Sequence[frozenset[bytes]],
    watcher: "_Watcher",
    killed: PeerID,
) -> dict[str, Any]:
    """Searches again and again, until every shard has two live replicas or the time is up."""
    began = looked_at = time.monotonic()
    failed, recalls, slowest_s = 0, list[float](), 0.0
    hosted_again_s: float | None = None
    for text, wanted in itertools.cycle(zip(texts, before, strict=True)):
        asked_at = time.monotonic()
        found = _leaves(memory, text)
        slowest_s = max(slowest_s, time.monotonic() - asked_at)
        failed += not found
        recalls.append(len(found & wanted) / max(1, len(wanted)))
        now = time.monotonic()
        if now - looked_at > PERIOD_S / 4:
            looked_at = now
            if not watcher.below({killed}):
                hosted_again_s = now - began
        if hosted_again_s is not None or now - began > _LIMIT_S:
            break
        time.sleep(_PAUSE_S)
    return {
        "searches": len(recalls),
        "failed": failed,
        "recall": sum(recalls) / len(recalls),
        "slowest_s": slowest_s,
        "hosted_again_periods": None if hosted_again_s is None else hosted_again_s / PERIOD_S,
    }


def _opened(client: SwarmClient) -> Memory:
    """Opens the swarm's only memory, as soon as its hosts are known."""
    ends = time.monotonic() + START_LIMIT_S
    while True:
        try:
            return client.memory()
        except LibraryError:
            if time.monotonic() > ends:
                raise
        time.sleep(_PAUSE_S)


def _leaves(memory: Memory, text: str) -> frozenset[bytes]:
    """The leaves of the passages that a search found. None if it failed or did not reach all cells."""
    try:
        result = memory.search(text, k=K, cells=ASKED)
    except TalkootError:
        return frozenset()
    return frozenset() if result.missing else frozenset(hit.leaf for hit in result.hits)


def _publish(folder: Path, founder: RunningNode, timing: Sequence[str]) -> None:
    """Publishes the memory with the `talkoot` command. Raises SystemExit if that fails."""
    state = ["--state", str(founder.folder / "node")]
    command = [sys.executable, "-m", "talkoot", "memory", "publish", str(folder), "--host", _HOST]
    log = founder.folder / "publish.log"
    with log.open("w") as file, suppress(subprocess.TimeoutExpired):
        ended = subprocess.run(
            die_with_parent([*command, *state, *timing]),
            env=os.environ | {"PYTHONPATH": os.getcwd()},
            stdout=file,
            stderr=file,
            timeout=_PUBLISH_LIMIT_S,
        )
        if ended.returncode == 0:
            return
    raise SystemExit(f"the memory was not published:\n{log.read_text()}")


class _Watcher:
    """Joins the swarm as a peer that only watches, and counts replicas."""

    entry: LibraryEntry

    def __init__(self, founder: RunningNode) -> None:
        self._founder = founder
        self._loop = LoopThread()

    def __enter__(self) -> "_Watcher":
        self._swarm = self._loop.run(self._join(), START_LIMIT_S)
        self._memories = MemoryRegistry(self._swarm.registry)
        libraries = self._loop.run(self._memories.libraries(), START_LIMIT_S)
        ((self.entry,),) = libraries.values()
        return self

    def __exit__(self, *problem: object) -> None:
        self._loop.run(self._swarm.stop(), START_LIMIT_S)
        self._loop.close()

    def below(self, without: set[PeerID]) -> int:
        """The number of shards with fewer than two replicas. Replicas at the peers in `without` don't count."""
        return self._loop.run(self._below(without), START_LIMIT_S)

    async def _join(self) -> Swarm:
        identity = await asyncio.to_thread(Identity.load_or_create, self._founder.folder / "watcher.key")
        return await join_swarm(identity, self._founder.invite, NetworkConfig(_HOST, serves_dht=False))

    async def _below(self, without: set[PeerID]) -> int:
        active = await self._memories.active_regions(self.entry)
        replicas: Counter[bytes] = Counter()
        for hosts in (await self._memories.region_hosts(self.entry.memory, active)).values():
            for host in hosts:
                if host.peer_id not in without and host.state is ReplicaState.SERVING:
                    replicas.update(host.shards)
        return self.entry.shards - sum(count >= WANTED_REPLICAS for count in replicas.values())
