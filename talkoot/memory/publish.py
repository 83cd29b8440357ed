"""`talkoot memory publish`: serves a memory from its folder until enough others host it."""

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path

from dht import upkeep
from dht.announcements import Activity, ReplicaState
from dht.library import WANTED_REPLICAS, LibraryEntry, MemoryRegistry, with_entry
from dht.memory import MemoryManifest
from dht.swarm import Stage, Swarm
from expert_server.memory.placement import SeenShard, ShardKey
from expert_server.memory.proofs import ReplicaProofs, believed
from expert_server.memory.servicer import MemoryMetrics, MemoryServicer
from expert_server.memory.store import MemoryStore
from expert_server.reachability import ReachabilityMonitor
from expert_server.settings import NodeSettings
from peer import PROTOCOL_VERSION, SOFTWARE_VERSION, clock
from peer.errors import LibraryError, UnreachableError
from peer.formatting import bytes_in_words, counted
from peer.identity import PeerID
from peer.loop import RetryingRounds, TaskSet, new_loop, tolerating
from peer.metrics import total
from peer.rates import RateLimit
from peer.rpc.parts import PartClient
from peer.wire import memory_pb2_grpc, records_pb2, session_pb2
from talkoot.memory.build import note_published
from talkoot.memory.inspection import open_memory
from talkoot.memory.publishers import Publisher, publisher_of
from talkoot.memory.replication import Replication, entry_values, replication, sizes_in_words
from talkoot.node.launch import listen_address
from talkoot.signals import run_until_stopped
from talkoot.terminal import Terminal

logger: logging.Logger = logging.getLogger(__name__)

_LOOK_EVERY_S = 2.0
_LOOKING = 0.2
"""The share of the time that looks may take: in a memory with many regions, one look is many look-ups."""
_SHOW_EVERY_S = 10.0
_PATIENCE_S = 60.0
"""After this many seconds without progress, the publisher is told possible reasons."""
_FAREWELL_S = 2.0
_KEEP_EVERY_S = 3600.0
_CHANNELS = 16
_CHECKED = 64
"""Claims of other hosts that are checked in one look."""
_THREADS = 2
"""Searches at the same time. Few, because others should fetch the memory here, and search it elsewhere."""


class Publication:
    """A memory that one peer serves from its folder, and lists in the DHT."""

    def __init__(
        self,
        swarm: Swarm,
        store: MemoryStore,
        publisher: Publisher,
        settings: NodeSettings,
        host: str,
    ) -> None:
        """`host`: the address that the peer listens on."""
        self.swarm = swarm
        self.memories: MemoryRegistry = MemoryRegistry(swarm.registry)
        self.entry: LibraryEntry = LibraryEntry.of(store.manifest, store.part, publisher.signer.peer_id)
        self.manifest: MemoryManifest = store.manifest
        self._store = store
        self._publisher = publisher
        self._settings = settings
        self._lifetime_s = upkeep.lifetime_s(settings.announce_every_s)
        self._host = host
        self._metrics = MemoryMetrics(swarm.metrics)
        self._servicer = MemoryServicer(
            {str(self.entry.memory): store},
            swarm.keys.swarm_id,
            swarm.host.sessions,
            swarm.host.upload,
            self._metrics,
            _THREADS,
        )
        rng = random.Random(swarm.host.peer_id.to_bytes())  # noqa: S311  # no secret
        self._reachability = ReachabilityMonitor(settings, swarm, rng, metrics=swarm.metrics)
        self._rounds = RetryingRounds(settings.announce_every_s, swarm.metrics, swarm.host.restarts)
        self._tasks = TaskSet(swarm.host.restarts)
        sessions = swarm.session_client(session_pb2.RIGHT_MEMORY)
        self.parts: PartClient = PartClient(
            swarm.keys.swarm_id, sessions, swarm.host.channels(_CHANNELS), RateLimit(None)
        )
        """Fetches parts from other hosts."""
        self._proofs = ReplicaProofs(swarm, self.parts, lambda memory: self.manifest.revoked)
        self._proven: set[tuple[PeerID, ShardKey]] = set()
        self._started_at = clock.now()

    @property
    def advice(self) -> str:
        """What the owner can do so that others connect to this peer; empty if they already do."""
        return self._reachability.advice

    @property
    def uploaded_bytes(self) -> float:
        """Uploaded bytes of the memory's parts."""
        return total(self._metrics.bytes, direction="sent")

    @property
    def library(self) -> bytes:
        """The signed record in which the memory is listed."""
        return self.memories.record_of(self._publisher.signer.peer_id)

    @asynccontextmanager
    async def published(self, stage: Stage) -> AsyncIterator[None]:
        """Serves, announces and lists the memory while inside. Raises LibraryError and UnreachableError.

        It ends at once, even if the DHT does not answer. The list stays.
        """
        library = with_entry(await self._listed(), self.entry)
        try:
            await asyncio.to_thread(note_published, self._store.folder)
        except OSError as error:
            raise LibraryError(
                f"can't note in {self._store.folder} that the memory is published ({error.strerror or error}): publish "
                "it from a folder that this user can change"
            ) from error
        try:
            await self._serve(stage)
            stage("announcing the memory")
            await self._publish_record()
            await self._announce()
            await self.memories.publish_library(library, self._publisher.signer_beside(self.swarm))
            for name, run in (
                ("announce the memory", self._stay_announced),
                ("keep the list of memories", self._keep_library),
                ("look who may call", self._keep_admission),
            ):
                self._tasks.supervise(name, run)
            yield
        finally:
            await self._tasks.aclose()
            await self._leave()

    async def check_listed(self) -> None:
        """Raises LibraryError if the memory, or this revision of it, is no longer listed, and UnreachableError."""
        memory, listed = self.entry.memory, await self._listed()
        if self.entry in listed:
            return
        self._publisher.check_may_publish(self.swarm)
        other = next((entry for entry in listed if entry.memory == memory), None)
        if other is None:
            raise LibraryError(
                f"{memory} is no longer published, because `talkoot memory unlist` was run with your key"
            )
        raise LibraryError(
            f"revision {other.revision} of {memory} has meanwhile been published with your key, from another folder or "
            "machine: build the next revision on it (`talkoot memory build --base DIR`), and publish that"
        )

    async def _listed(self) -> tuple[LibraryEntry, ...]:
        return (await self.memories.libraries()).get(self._publisher.signer.peer_id, ())

    async def _serve(self, stage: Stage) -> None:
        server = self.swarm.host.server
        assert server is not None, "a publisher's host has a server"
        memory_pb2_grpc.add_MemoryServiceServicer_to_server(self._servicer, server.services)
        await self.swarm.host.serve_tunnel(server.open_for)
        with (
            contextlib.suppress(UnreachableError),
            tolerating("see who reaches this peer", self.swarm.host.restarts),
        ):
            await self._reachability.begin(self._host, self.swarm.host.port, stage)

    async def announced(self) -> Replication:
        """The replicas that others announce. Raises UnreachableError."""
        return await replication(self.memories, self.entry, self.manifest, self.swarm.host.peer_id)

    async def replication(self) -> Replication:
        """The replicas that others have proven. Raises UnreachableError.

        Each look checks only a few claims, so that it does not take long.
        """
        announced, doubted = await self.announced(), self._proofs.doubted()
        seen, unproven = await asyncio.to_thread(self._look, announced, doubted)
        self._proven |= await self._proofs.proven(unproven, seen)
        return await asyncio.to_thread(self._counted, seen)

    def _look(
        self, announced: Replication, doubted: Collection[PeerID]
    ) -> tuple[Mapping[ShardKey, SeenShard], list[tuple[PeerID, ShardKey]]]:
        """What hosts claim that are not in doubt, and some claims to check. Slow: strangers may claim all shards."""
        said = {
            ShardKey(self.entry.memory, shard.root): SeenShard(
                shard, region, announced.by_root[shard.root], frozenset()
            )
            for region, shards in self.manifest.by_region.items()
            for shard in shards
        }
        seen = believed(said, doubted)
        claims = {(peer_id, key) for key, shard in seen.items() for peer_id in shard.serving}
        self._proven &= claims
        return seen, list(claims - self._proven)[:_CHECKED]

    def _counted(self, seen: Mapping[ShardKey, SeenShard]) -> Replication:
        """The proven replicas. Slow, too."""
        return Replication(
            {
                key.root: frozenset(peer_id for peer_id in shard.serving if (peer_id, key) in self._proven)
                for key, shard in seen.items()
            }
        )

    async def _leave(self) -> None:
        """Withdraws its announcements. If the DHT does not answer, it does not wait."""
        with contextlib.suppress(UnreachableError, TimeoutError):
            async with asyncio.timeout(_FAREWELL_S):
                gone = dict.fromkeys(self.manifest.by_region, (ReplicaState.WITHDRAWN, ()))
                await self.swarm.registry.leave(self._lifetime_s)
                await self.memories.announce(self.entry.memory, gone, self._lifetime_s)
        if self.swarm.host.server is not None:
            await self.swarm.host.server.stop(0.0)
        await self._servicer.close()
        await self.parts.close()

    async def _stay_announced(self) -> None:
        stay_member = partial(self.swarm.membership.check, announced=True)
        while True:
            await asyncio.sleep(self._settings.announce_every_s)
            await self._rounds.run(
                "announce", self._reachability.check, self._announce, self._publish_record, stay_member
            )

    async def _keep_library(self) -> None:
        while True:
            await asyncio.sleep(_KEEP_EVERY_S)
            await self._rounds.run("keep the list", self.memories.keep_libraries)

    async def _keep_admission(self) -> None:
        await self.swarm.keep_admission(self._settings.announce_every_s, self.swarm.host.sessions.recheck)

    async def _announce(self) -> None:
        """Announces like a leaving node: others fetch from this peer, but don't count it as one of the
        wanted replicas.
        """
        regions = {
            region: (ReplicaState.LEAVING, [shard.root for shard in shards])
            for region, shards in self.manifest.by_region.items()
        }
        await self.memories.announce(self.entry.memory, regions, self._lifetime_s)

    async def _publish_record(self) -> None:
        """Says how to call this peer. It is not listed as a node, because it leaves once others host the memory."""
        record = records_pb2.NodeRecord(
            addresses=await self.swarm.host.look_up(self._reachability.addresses),
            certificate=self.swarm.host.certificate,
            protocol_version=PROTOCOL_VERSION,
            software_version=SOFTWARE_VERSION,
            started_at=self._started_at,
            name=self._settings.name or "",
            activity=Activity.SERVING.value,
            renew_every_s=self._settings.announce_every_s,
            reachability=self._reachability.status.kind.value,
            tunnel_addresses=self._reachability.tunnel_addresses,
            relay_addresses=self._reachability.relay_addresses,
            memory_shards=len(self.manifest.shards),
            memory_bytes=self.entry.total_bytes,
        )
        await self.swarm.registry.publish_node(record, self._lifetime_s, is_listed=False)


def run_publish(
    terminal: Terminal, folder: Path, join: str | None, state: Path | None, settings: NodeSettings
) -> None:
    """Returns once each shard has two replicas on other peers. Raises UserError, and Stopped if it was
    stopped before.
    """
    with (
        publisher_of(join, state) as publisher,
        asyncio.Runner(loop_factory=new_loop) as runner,
    ):
        host = listen_address(settings, publisher.invite.bootstrap)
        with terminal.stages("reading the memory") as stage:
            store = open_memory(folder, stage if terminal.live else lambda text: None)
        manifest = store.manifest
        logger.info(
            "%s, revision %d: %s in %s, %s; licences: %s", manifest.name, manifest.revision,
            counted(manifest.passages, "passage", ","), counted(len(manifest.shards), "shard"),
            sizes_in_words(manifest.shard_bytes, manifest.encoder.size), ", ".join(manifest.licenses) or "none given",
        )  # fmt: skip
        runner.run(run_until_stopped(_publish(terminal, publisher, store, settings, host)))


async def _publish(
    terminal: Terminal,
    publisher: Publisher,
    store: MemoryStore,
    settings: NodeSettings,
    host: str,
) -> None:
    async with AsyncExitStack() as stack:
        with terminal.stages("making ready") as stage:
            swarm = await stack.enter_async_context(publisher.joined(settings, host, stage))
            publication = Publication(swarm, store, publisher, settings, host)
            await stack.enter_async_context(publication.published(stage))
        logger.info(
            "%s is listed. Others now fetch it from here: keep this running until it says that it is done",
            publication.entry.memory,
        )
        watch = ReplicationWatch(terminal, publication)
        try:
            await watch.until_replicated()
        except asyncio.CancelledError:
            logger.warning("%s", watch.missing)
            raise


class ReplicationWatch:
    """Shows how much of a memory other hosts have, and what may be wrong if they don't take it."""

    def __init__(self, terminal: Terminal, publication: Publication) -> None:
        self._terminal = terminal
        self._publication = publication
        self._latest: Replication | None = None
        self._changed_at = time.monotonic()
        self._sent = (time.monotonic(), publication.uploaded_bytes)

    @property
    def missing(self) -> str:
        """What is still missing, in words, for a command that is stopped early."""
        latest = self._latest
        so_far = "nothing is known of replicas yet" if latest is None else latest.in_words
        return (
            f"stopped before each shard had two replicas elsewhere: {so_far}. What others have taken stays; the same "
            "command goes on with the rest"
        )

    async def until_replicated(self) -> None:
        """Returns once each shard has two replicas on other peers."""
        with self._shown() as show:
            await look_until_done(self._publication, self._look, self._text, self._terminal.live, show)
        entry, latest = self._publication.entry, self._latest
        assert latest is not None, "the last look was complete"
        if self._terminal.json:
            self._terminal.event("published", {**entry_values(entry), "replicas": latest.fewest})
        else:
            self._terminal.line(
                f"done: each shard of {entry.memory} has {counted(latest.fewest, 'replica')} or more, on "
                f"{counted(len(latest.hosts), 'node')}. They keep it without you"
            )

    async def _look(self) -> bool:
        found = await self._publication.replication()
        if self._latest is None or found.by_root != self._latest.by_root:
            self._changed_at = time.monotonic()
        self._latest = found
        return not found.below(WANTED_REPLICAS)

    @contextmanager
    def _shown(self) -> Iterator[Callable[[str], None]]:
        if self._terminal.json:
            yield self._event
        else:
            with self._terminal.stages("waiting for others to take it") as show:
                yield show

    def _event(self, text: str) -> None:
        latest = self._latest
        assert latest is not None, "it is shown once it is known"
        self._terminal.event(
            "replication",
            {
                "shards": len(latest.by_root),
                "with_0": latest.below(1),
                "with_1": latest.below(2) - latest.below(1),
                "hosts": len(latest.hosts),
                "uploaded_bytes": self._publication.uploaded_bytes,
            },
        )

    def _rate(self) -> str:
        then, before = self._sent
        now, sent = time.monotonic(), self._publication.uploaded_bytes
        self._sent = now, sent
        return f"; {bytes_in_words((sent - before) / max(now - then, 1e-3))}/s up" if now > then else ""

    def _text(self) -> str:
        """What others have, and what may be wrong unless they take shards; empty if nothing is known."""
        if self._latest is None:
            return ""
        text = self._latest.in_words + self._rate()
        if time.monotonic() - self._changed_at < _PATIENCE_S:
            return text
        return f"{text}. {advice(len(self._latest.hosts), self._publication.advice)}"


async def look_until_done(
    publication: Publication,
    look: Callable[[], Awaitable[bool]],
    in_words: Callable[[], str],
    is_live: bool,
    show: Callable[[str], None],
) -> None:
    """Looks what the memory's hosts have until `look` returns True. Shows what was found, `in_words`, but not often
    unless on a live terminal. Raises LibraryError if the memory, or this revision of it, is no longer listed.
    """
    shown, shown_at = "", 0.0
    while True:
        began = time.monotonic()
        with contextlib.suppress(UnreachableError):
            await publication.check_listed()
            if await look():
                return
        text = in_words()
        if text != shown and (is_live or not shown or time.monotonic() - shown_at >= _SHOW_EVERY_S):
            show(text)
            shown, shown_at = text, time.monotonic()
        look_s = time.monotonic() - began
        await asyncio.sleep(max(_LOOK_EVERY_S, look_s / _LOOKING))


def advice(hosts: int, reachability: str) -> str:
    """Why others don't take a memory, as far as its publisher can tell."""
    if reachability and hosts:
        return f"Others may not reach this machine: {reachability}"
    if reachability:
        return f"{advice(hosts, '')}. Or others can't reach this machine: {reachability}"
    if not hosts:
        return (
            "No node takes it: those of volunteers host memories if they were started with --memory-disk, such as "
            "`talkoot node --memory-disk 5GB`, and don't refuse its name or licences"
        )
    if hosts < WANTED_REPLICAS:
        return "Only one node takes it: two replicas need another with --memory-disk"
    return "The nodes that host it may have no room left: more of them need --memory-disk, or more of it"
