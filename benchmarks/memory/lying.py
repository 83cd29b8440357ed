"""How searches cope with hosts that lie: the real retriever in simulated time, with a quarter of eight hosts lying.

Every shard has replicas at two random hosts. Calls take a round trip of 100 ms. The results are compared with what
honest hosts answer, and a passage counts as true only if it is in the memory with the score that its vector gives.
"""

import asyncio
import math
import random
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from grpc import StatusCode

from benchmarks.memory.built import BuiltMemory, open_shards
from benchmarks.memory.recall import K, exact_scores, ranks_of_cells
from benchmarks.simulated_p2p import SimulatedIdentity, VirtualLoop
from dht.announcements import NodeInfo
from dht.memory import Cell, MemoryID, MemoryManifest, Place, ShardInfo, Vectors
from dht.uid import coordinate_of
from expert_server.memory.search import search_together
from expert_server.memory.shard import Shard
from peer.codec import Floats
from peer.errors import ExpertError
from peer.identity import PeerID
from peer.loop import LoopThread
from peer.wire import memory_pb2
from trainer_client.memory.calls import HostCalls, MemoryCaller, Method
from trainer_client.memory.memories import Memory
from trainer_client.memory.retriever import Located, Retriever, SearchResult, Turn

HOSTS, REPLICAS = 8, 2
LIARS = 2
RTT_S = 0.1
ASKED = 8
_PAUSE_S = 1.0
"""The pause between two queries."""
SWARM = "benchmark"


class Candidate(NamedTuple):
    """A passage that a host found."""

    score: int
    number: int
    """The number of the passage's shard in the request."""
    position: int
    text: Place


class ShardHost:
    """Answers from its shards, as an honest host does."""

    def __init__(self, peer_id: PeerID, manifest: MemoryManifest, shards: Mapping[bytes, Shard]) -> None:
        self.peer_id = peer_id
        self.shards = shards
        self._manifest = manifest

    async def search(self, request: memory_pb2.SearchRequest) -> memory_pb2.SearchReply:
        queries = np.frombuffer(request.vectors, np.int8).reshape(-1, self._manifest.dimensions)
        candidates: list[list[Candidate]] = [[] for _ in queries]
        missing = []
        for number, asked in enumerate(request.shards):
            shard = self.shards.get(asked.root)
            if shard is None:
                missing.append(number)
                continue
            rows = list(asked.queries) or list(range(len(queries)))
            _, positions_QK, scores_QK = search_together([shard], queries[rows], request.k)
            for row, positions, scores in zip(rows, positions_QK, scores_QK, strict=True):
                candidates[row] += [
                    Candidate(score, number, position, shard.text_at(position))
                    for score, position in zip(scores.tolist(), positions.tolist(), strict=True)
                ]
        reply, text_roots = memory_pb2.SearchReply(missing=missing), dict[bytes, int]()
        for some in candidates:
            message = reply.found.add()
            for each in self._best(some, request.k):
                message.scores.append(each.score)
                message.shards.append(each.number)
                message.positions.append(each.position)
                is_there = each.text.root == request.shards[each.number].root
                text = 0 if is_there else text_roots.setdefault(each.text.root, len(text_roots)) + 1
                message.texts.append(text)
                message.text_positions.append(0 if is_there else each.text.position)
        reply.text_roots.extend(text_roots)
        return reply

    async def read(self, request: memory_pb2.ReadRequest) -> memory_pb2.ReadReply:
        passages = []
        for number, asked in enumerate(request.shards):
            if (shard := self.shards.get(asked.root)) is not None:
                passages += [entry.message(number) for entry in shard.read(asked.positions)]
        return memory_pb2.ReadReply(passages=passages)

    async def answer(self, method: Method, request: Any) -> Any:
        """The reply to a call."""
        return await (self.search if method == "Search" else self.read)(request)

    def _best(self, found: list[Candidate], k: int) -> list[Candidate]:
        return sorted(found, key=lambda each: -each.score)[:k]


class Forger(ShardHost):
    """Answers with false texts."""

    async def read(self, request: memory_pb2.ReadRequest) -> memory_pb2.ReadReply:
        reply = await super().read(request)
        for passage in reply.passages:
            passage.passage.text += " Buy tulips."
        return reply


class Promoter(ShardHost):
    """Claims that its worst passages are the best, with vectors to match."""

    async def search(self, request: memory_pb2.SearchRequest) -> memory_pb2.SearchReply:
        reply = await super().search(request)
        for found in reply.found:
            found.scores[:] = [score + 2**18 for score in found.scores]
        return reply

    async def read(self, request: memory_pb2.ReadRequest) -> memory_pb2.ReadReply:
        reply = await super().read(request)
        for passage in reply.passages:
            passage.vector = bytes(127 if number < 128 else 129 for number in passage.vector)
        return reply


class Censor(ShardHost):
    """Leaves out the best passage of every answer."""

    def _best(self, found: list[Candidate], k: int) -> list[Candidate]:
        best = max(found, key=lambda each: each.score, default=None)
        return super()._best([each for each in found if best is None or each.text != best.text], k)


class SelectiveCensor(ShardHost):
    """Leaves out every tenth passage of the memory."""

    def _best(self, found: list[Candidate], k: int) -> list[Candidate]:
        return super()._best([each for each in found if (each.text.root[0] + each.text.position) % 10], k)


class Staller(ShardHost):
    """Never answers."""

    async def search(self, request: memory_pb2.SearchRequest) -> memory_pb2.SearchReply:
        await asyncio.Event().wait()
        raise AssertionError("nothing sets it")


class Babbler(ShardHost):
    """Answers with malformed replies."""

    async def search(self, request: memory_pb2.SearchRequest) -> memory_pb2.SearchReply:
        reply = await super().search(request)
        for found in reply.found:
            found.positions[:] = [2**32 - 1] * len(found.positions)
        return reply


KINDS: dict[str, type[ShardHost]] = {
    "honest": ShardHost,
    "forged text": Forger,
    "wrong vectors and scores": Promoter,
    "omits the best": Censor,
    "omits a tenth": SelectiveCensor,
    "stalls": Staller,
    "malformed answers": Babbler,
}
OMITTERS = ("omits the best", "omits a tenth")


class KnownDirectory:
    """A directory that knows the hosts, as if it had read them from the DHT."""

    def __init__(
        self,
        memory: BuiltMemory,
        manifest: MemoryManifest,
        hosts: Sequence[ShardHost],
        nodes: Iterable[NodeInfo] | None = None,
    ) -> None:
        """`nodes`: the hosts' addresses and certificates, if they are called over the network."""
        self.memory = MemoryID.of(manifest.name, hosts[0].peer_id)
        self._built = memory
        self.manifest = manifest
        self._hosts = hosts
        known = (_node(host.peer_id) for host in hosts) if nodes is None else nodes
        self._nodes = {node.peer_id: node for node in known}

    @property
    def nodes(self) -> Collection[NodeInfo]:
        return self._nodes.values()

    def encode(self, texts: Sequence[str], turn: Turn | None = None) -> tuple[Vectors, Floats]:
        vectors_QD = self._built.encoder.encode_questions(texts)
        vectors_QD = vectors_QD if turn is None else turn(vectors_QD)
        return vectors_QD, self._built.codebook.scores(vectors_QD)

    @property
    def word_weight(self) -> float:
        return self._built.encoder.word_weight

    def rarity(self, words: Iterable[str]) -> list[float]:
        return self._built.encoder.rarity(words)

    async def locate(self, scores_QC: Floats, count: int, avoided: frozenset[PeerID]) -> Located:
        manifest = self.manifest
        cells = [
            [coordinate_of(int(number), manifest.grid) for number in order_C[:count]]
            for order_C in np.argsort(-scores_QC, axis=1, kind="stable")
        ]
        hosts = self._having({cell for some in cells for cell in some})
        return Located(manifest, cells, [()] * len(cells), hosts, self._nodes)

    async def hosts_of(
        self, shards: Collection[ShardInfo], located: Located, avoided: frozenset[PeerID]
    ) -> Located:
        return replace(located, hosts={**located.hosts, **self._having({shard.cell for shard in shards})})

    def _having(self, cells: Iterable[Cell]) -> dict[Cell, dict[PeerID, frozenset[bytes]]]:
        return {
            cell: {
                host.peer_id: frozenset(
                    shard.root for shard in self.manifest.by_cell.get(cell, ()) if shard.root in host.shards
                )
                for host in self._hosts
            }
            for cell in cells
        }

    async def follow(self) -> MemoryManifest:
        return self.manifest

    def note(self, searched: Collection[Cell], missing: Collection[Cell]) -> None:
        pass


@contextmanager
def opened(
    directory: KnownDirectory, caller: MemoryCaller, loop: LoopThread, limit_s: float
) -> Iterator[Memory]:
    """Opens the directory's memory, for searches as a trainer does them in wall-clock time. `limit_s`: the time limit
    of a search.
    """

    async def make() -> Retriever:
        calls = HostCalls(caller, str(directory.memory), rng=random.Random(0))
        return Retriever(directory, calls, SWARM, rng=random.Random(0))

    retriever = loop.run(make())
    yield Memory(retriever, partial(loop.run, timeout_s=limit_s))
    loop.run(retriever.close())


class LocalCaller:
    """Makes calls to hosts in this process, some of which may have died."""

    def __init__(self, hosts: Sequence[ShardHost]) -> None:
        self._hosts = {host.peer_id: host for host in hosts}
        self.dead: set[PeerID] = set()

    async def call(self, node: NodeInfo, method: Method, request: Any, deadline_s: float) -> Any:
        if node.peer_id in self.dead:
            raise ExpertError(StatusCode.UNAVAILABLE, "it has died")
        return await self._hosts[node.peer_id].answer(method, request)


class SlowCaller(LocalCaller):
    """Makes calls that take a round trip of simulated time."""

    async def call(self, node: NodeInfo, method: Method, request: Any, deadline_s: float) -> Any:
        try:
            async with asyncio.timeout(deadline_s):
                await asyncio.sleep(RTT_S)
                return await super().call(node, method, request, deadline_s)
        except TimeoutError:
            raise ExpertError(StatusCode.DEADLINE_EXCEEDED, "no answer in time") from None


def measure(memory: BuiltMemory, folder: Path, texts: Sequence[str], kinds: Sequence[str]) -> dict[str, Any]:
    """Measures each kind of liar, with one query for each text. `folder`: where the memory is."""
    manifest = MemoryManifest.parse((folder / "manifest").read_bytes())
    shards = {info.root: shard for info, shard in open_shards(folder, manifest)}
    vectors_QD = memory.encoder.encode(texts)
    vectors_QD = vectors_QD[vectors_QD.any(axis=1)]
    scores_QC = memory.codebook.scores(vectors_QD)
    wanted = _wanted_scores(memory, vectors_QD, scores_QC)
    found = {}
    for kind in kinds:
        loop = VirtualLoop()
        try:
            trial = _Trial(memory, manifest, shards, KINDS[kind])
            found[kind] = loop.run_until_complete(trial.run(vectors_QD, scores_QC, wanted))
        finally:
            loop.close()
    return found


class _Trial:
    """A trial of one kind of liar among honest hosts."""

    def __init__(
        self,
        memory: BuiltMemory,
        manifest: MemoryManifest,
        shards: Mapping[bytes, Shard],
        kind: type[ShardHost],
    ) -> None:
        rng = random.Random(0)
        placed: list[dict[bytes, Shard]] = [{} for _ in range(HOSTS)]
        for root, shard in shards.items():
            honest = rng.randrange(LIARS, HOSTS)  # liars with all replicas can't be exposed
            for number in (honest, rng.choice([number for number in range(HOSTS) if number != honest])):
                placed[number][root] = shard
        self._manifest = manifest
        self._hosts = [
            (kind if number < LIARS else ShardHost)(SimulatedIdentity(number + 1).peer_id, manifest, some)
            for number, some in enumerate(placed)
        ]
        self._liars = frozenset(host.peer_id for host in self._hosts[:LIARS])
        self._memory = memory
        self._truth = {
            passage.leaf(vector_D.tobytes()): (passage, vector_D)
            for passage, vector_D in zip(memory.passages, memory.vectors_ND, strict=True)
        }
        self._believed = 0

    async def run(self, vectors_QD: Vectors, scores_QC: Floats, wanted: Sequence[float]) -> dict[str, Any]:
        """Does the searches, and returns the figures. `wanted`: for each query, the score of the tenth passage that
        honest hosts give.
        """
        directory = KnownDirectory(self._memory, self._manifest, self._hosts)
        calls = HostCalls(SlowCaller(self._hosts), str(directory.memory), rng=random.Random(0))
        retriever = Retriever(directory, calls, SWARM, rng=random.Random(0))
        loop = asyncio.get_running_loop()
        failed, recalls, times_s = 0, list[float](), list[float]()
        noticed: dict[PeerID, int] = {}
        for number in range(len(vectors_QD)):
            row = slice(number, number + 1)
            began = loop.time()
            (result,) = await retriever.search_vectors(vectors_QD[row], scores_QC[row], K, ASKED)
            times_s.append(loop.time() - began)
            failed += not result.hits or bool(result.missing)
            recalls.append(self._check(result, vectors_QD[number], wanted[number]))
            await asyncio.sleep(_PAUSE_S)
            for liar in self._liars & retriever.calls.avoided():
                noticed.setdefault(liar, number + 1)
        await retriever.close()
        everybody = len(noticed) == LIARS
        after = max(noticed.values()) if everybody else len(recalls)
        return {
            "queries": len(recalls),
            "believed": self._believed,
            "failed": failed,
            "noticed": len(noticed),
            "noticed_after": after if everybody else None,
            "recall": float(np.mean(recalls)),
            "recall_since": float(np.mean(recalls[after:])) if after < len(recalls) else None,
            "median_ms": 1000 * float(np.median(times_s)),
            "longest_ms": 1000 * max(times_s),
        }

    def _check(self, result: SearchResult, vector_D: Vectors, wanted: float) -> float:
        """Counts the hits that are false. Returns the share of the ten best passages that was found."""
        whole = float(vector_D.astype(np.int64) @ vector_D.astype(np.int64))
        for hit in result.hits:
            passage, stored_D = self._truth.get(hit.leaf, (None, np.zeros_like(vector_D)))
            score = int(stored_D.astype(np.int64) @ vector_D.astype(np.int64))
            if passage != hit.passage or not math.isclose(hit.similarity * whole, score):
                self._believed += 1
        return sum(round(hit.similarity * whole) >= wanted for hit in result.hits[:K]) / K


def _wanted_scores(memory: BuiltMemory, vectors_QD: Vectors, scores_QC: Floats) -> list[float]:
    """For each query, the score of the tenth best passage in the cells that a search asks."""
    nearest_QC = ranks_of_cells(scores_QC) < ASKED
    wanted = []
    for row, scores_N in enumerate(exact_scores(vectors_QD, memory.vectors_ND)):
        inside = scores_N[nearest_QC[row][memory.cells_NT].any(axis=1)]
        wanted.append(float(np.partition(inside, -K)[-K]) if len(inside) >= K else -math.inf)
    return wanted


def _node(peer_id: PeerID) -> NodeInfo:
    return NodeInfo(peer_id=peer_id, expires_at=math.inf)
