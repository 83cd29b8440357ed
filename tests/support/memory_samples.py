"""A small memory, its hosts, and hosts that lie, for tests of searches."""

import asyncio
import hashlib
import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from grpc import StatusCode

from dht.announcements import NodeInfo
from dht.memory import (
    MAX_K,
    MAX_READ,
    Cell,
    MemoryID,
    MemoryManifest,
    Part,
    Passage,
    Place,
    ShardInfo,
    Vectors,
)
from dht.uid import coordinate_of
from expert_server.memory.search import search_together
from expert_server.memory.shard import PrimaryShard, SecondaryShard, Shard
from expert_server.memory.store import MemoryStore
from peer.codec import MAX_MESSAGE_BYTES, Floats
from peer.errors import ExpertError
from peer.identity import PeerID
from peer.transport.endpoints import Endpoint
from peer.wire import memory_pb2
from trainer_client.memory.calls import Method
from trainer_client.memory.codebook import Codebook
from trainer_client.memory.encoder import DUAL, STATIC, WORD_WEIGHT, DualEncoder, StaticEncoder
from trainer_client.memory.retriever import Located, Turn

SWARM = "sauna-abcdefghijkl"
MEMORY = MemoryID("docs", "abcdefghijkl")
DIMENSIONS = 8

Lie = Literal[
    "forged text", "wrong vectors", "inflated scores", "deflated scores", "wrong texts", "wrong positions", "omits",
    "omits best", "says missing", "reads nothing", "all revoked", "junk", "stalls", "stalls at reading", "fails",
    "busy", "too many", "other order", "oversized", "long lists", "tiny fields", "denies the memory",
]  # fmt: skip
HONEST = None


@dataclass(frozen=True)
class SampleMemory:
    """A whole memory."""

    manifest: MemoryManifest
    files: Mapping[bytes, bytes]
    """The file of each shard, by root."""
    shards: Mapping[bytes, Shard]
    """The shards, by root."""
    encoder: bytes
    codebook: Codebook
    passages: Sequence[Passage]
    vectors_ND: Vectors
    places: Mapping[int, Place]
    """Where the text of each passage is, by the passage's number."""

    @classmethod
    def make(
        cls,
        seed: int,
        passages: int = 40,
        grid: tuple[int, ...] = (2, 2),
        in_shard: int = 8,
        *,
        revoked: int = 0,
    ) -> "SampleMemory":
        """A memory with random vectors and no encoder. `in_shard`: the largest number of passages in a shard.

        `revoked`: how many passages are revoked, only in the manifest.
        """
        rng = np.random.default_rng(seed)
        vectors_ND = rng.integers(-127, 128, (passages, DIMENSIONS)).astype(np.int8)
        texts = [Passage(f"text {n}", f"title {n}", "file.txt", n, "CC0-1.0") for n in range(passages)]
        return cls._of(rng, texts, vectors_ND, grid, in_shard, revoked, b"none")

    @classmethod
    def with_words(
        cls,
        seed: int = 0,
        passages: int = 120,
        grid: tuple[int, ...] = (3, 2),
        *,
        passage: Passage | None = None,
        is_dual: bool = False,
    ) -> "SampleMemory":
        """A memory of texts with twenty random words, and an encoder that knows the words. `passage`: used instead of
        each of these.

        `is_dual`: word number n in a question means the same as word number 59 - n in a passage.
        """
        rng = np.random.default_rng(seed)
        words = [f"word{n}" for n in range(60)]
        encoder = StaticEncoder(
            words,
            rng.integers(-127, 128, (len(words), DIMENSIONS)).astype(np.int8),
            np.ones(len(words), np.float32),
            np.ones(len(words), np.float32),
        )
        texts = [
            Passage(" ".join(rng.choice(words, 20)), f"title {n}", "words.txt", n, "CC0-1.0")
            for n in range(passages)
        ]
        texts = texts if passage is None else [passage]
        vectors_ND = encoder.encode([text.text for text in texts])
        if not is_dual:
            return cls._of(rng, texts, vectors_ND, grid, 16, 0, encoder.to_bytes())
        ones = np.ones(len(words), np.float32)
        questions = StaticEncoder(words, encoder.vectors["vectors"][::-1], ones, ones)
        dual = DualEncoder(questions, encoder, WORD_WEIGHT).to_bytes()
        return cls._of(rng, texts, vectors_ND, grid, 16, 0, dual, DUAL)

    @classmethod
    def _of(
        cls,
        rng: np.random.Generator,
        passages: Sequence[Passage],
        vectors_ND: Vectors,
        grid: tuple[int, ...],
        in_shard: int,
        revoked: int,
        encoder: bytes,
        kind: str = STATIC,
    ) -> "SampleMemory":
        codebook = Codebook(rng.normal(size=(int(np.prod(grid)), DIMENSIONS)).astype(np.float16))
        infos, files, places = [], {}, dict[int, Place]()
        for column, cells_N in enumerate(codebook.assign(vectors_ND).T):
            for cell in np.unique(cells_N).tolist():
                numbers = np.flatnonzero(cells_N == cell).tolist()
                for at in range(0, len(numbers), in_shard):
                    part = numbers[at : at + in_shard]
                    if column:
                        data = SecondaryShard.build([places[n] for n in part], vectors_ND[part])
                        root = SecondaryShard.root_of(data)
                    else:
                        data = PrimaryShard.build([passages[n] for n in part], vectors_ND[part])
                        root = PrimaryShard.root_of(data)
                        places |= {n: Place(root, position) for position, n in enumerate(part)}
                    infos.append(ShardInfo(coordinate_of(cell, grid), root, len(part), len(data), column > 0))
                    files[root] = data
        parts = [Part(hashlib.sha256(data).digest(), len(data)) for data in (encoder, codebook.to_bytes())]
        manifest = MemoryManifest(
            "docs", 1, "samples", 1.0, kind, parts[0], DIMENSIONS, parts[1], grid, ("CC0-1.0",), tuple(infos),
            frozenset(places[n] for n in range(revoked)),
        )  # fmt: skip
        shards = {info.root: Shard.parse(files[info.root], info, DIMENSIONS) for info in infos}
        return cls(manifest, files, shards, encoder, codebook, passages, vectors_ND, places)

    def revoking(self, *numbers: int) -> "SampleMemory":
        """The next revision, without these passages."""
        revoked = self.manifest.revoked | {self.places[n] for n in numbers}
        return replace(
            self, manifest=replace(self.manifest, revision=self.manifest.revision + 1, revoked=revoked)
        )

    def write(self, folder: Path, roots: Collection[bytes] | None = None) -> MemoryStore:
        """Writes a folder as a host has it. `roots`: the shards that the host has; None: all."""
        store = MemoryStore.create(folder, self.manifest.serialize())
        store.save_part(self.manifest.encoder, self.encoder)
        store.save_part(self.manifest.codebook, self.codebook.to_bytes())
        for root, data in self.files.items():
            if roots is None or root in roots:
                store.save(root, data)
        return store

    def best(self, query_D: Vectors, cells: Iterable[Cell], k: int) -> list[tuple[int, str]]:
        """Scores and texts of the passages that a search of these cells should find."""
        inside: dict[str, int] = {}
        number_of = {place: number for number, place in self.places.items()}
        for cell in cells:
            for info in self.manifest.by_cell.get(cell, ()):
                for text in map(self.shards[info.root].text_at, range(info.leaves)):
                    if text not in self.manifest.revoked:
                        n = number_of[text]
                        score = int(query_D.astype(int) @ self.vectors_ND[n].astype(int))
                        inside[self.passages[n].text] = score
        return sorted(((score, text) for text, score in inside.items()), reverse=True)[:k]


class _Candidate(NamedTuple):
    score: int
    number: int
    """The number of the passage's shard in the request."""
    position: int
    text: Place


@dataclass
class SampleHost:
    """Answers as a host does, or lies in one way."""

    memory: SampleMemory
    roots: Collection[bytes]
    lie: Lie | None = HONEST
    after_s: float = 0.01
    rng: random.Random = field(default_factory=lambda: random.Random(0))
    calls: list[str] = field(default_factory=list)

    async def answer(self, method: Method, request: Any, deadline_s: float) -> Any:
        self.calls.append(method)
        stalls = self.lie == "stalls" or (self.lie == "stalls at reading" and method == "Read")
        await asyncio.sleep(deadline_s if stalls else min(self.after_s, deadline_s))
        if stalls or self.after_s > deadline_s:
            raise ExpertError(StatusCode.DEADLINE_EXCEEDED, "too late")
        if self.lie == "fails":
            raise ExpertError(StatusCode.UNAVAILABLE, "nobody there")
        if self.lie == "denies the memory":
            raise ExpertError(StatusCode.NOT_FOUND, "no such memory here")
        if self.lie == "busy" and len(self.calls) % 2:
            raise ExpertError(StatusCode.RESOURCE_EXHAUSTED, "busy", 0.1)
        return self.search(request) if method == "Search" else self.read(request)

    def search(self, request: memory_pb2.SearchRequest) -> memory_pb2.SearchReply:
        if request.k > MAX_K:
            raise ExpertError(StatusCode.INVALID_ARGUMENT, "too many passages for a query")
        if self.lie == "oversized":
            return memory_pb2.SearchReply(text_roots=[bytes(2 * MAX_MESSAGE_BYTES)])
        if self.lie == "tiny fields":
            return memory_pb2.SearchReply(found=[memory_pb2.Found()] * (MAX_MESSAGE_BYTES // 4))
        if self.lie == "long lists":
            count = MAX_MESSAGE_BYTES // 4
            return memory_pb2.SearchReply(found=[memory_pb2.Found(scores=[1] * count, shards=[0] * count)])
        queries_QD = np.frombuffer(request.vectors, np.int8).reshape(-1, DIMENSIONS)
        missing = [n for n, shard in enumerate(request.shards) if shard.root not in self.roots]
        if self.lie == "says missing":
            missing = list(range(len(request.shards)))
        found: list[list[_Candidate]] = [[] for _ in queries_QD]
        for number, asked in enumerate(request.shards):
            if number in missing:
                continue
            shard = self.memory.shards[asked.root]
            queries = list(asked.queries or range(len(queries_QD)))
            _, positions_QK, scores_QK = search_together([shard], queries_QD[queries], request.k)
            for query, positions_K, scores_K in zip(queries, positions_QK, scores_QK, strict=True):
                for position, score in zip(positions_K.tolist(), scores_K.tolist(), strict=True):
                    found[query].append(_Candidate(score, number, position, shard.text_at(position)))
        lengths = [len(self.memory.shards[asked.root]) for asked in request.shards]
        best = [sorted(some, key=lambda f: (-f[0], *f[1:]))[: request.k] for some in found]
        answers = [self._spoilt(some, lengths) for some in best]
        if self.lie == "junk":
            answers = answers[1:]
        reply, text_roots = memory_pb2.SearchReply(missing=missing), dict[bytes, int]()
        for some in answers:
            message = reply.found.add()
            for f in some:
                message.shards.append(f.number)
                message.positions.append(f.position)
                message.scores.append(f.score)
                is_elsewhere = self.memory.manifest.by_root[request.shards[f.number].root].is_secondary
                text = text_roots.setdefault(f.text.root, len(text_roots)) + 1 if is_elsewhere else 0
                message.texts.append(text)
                message.text_positions.append(f.text.position if is_elsewhere else 0)
        reply.text_roots.extend(text_roots)
        return reply

    def read(self, request: memory_pb2.ReadRequest) -> memory_pb2.ReadReply:
        if sum(len(asked.positions) for asked in request.shards) > MAX_READ:
            raise ExpertError(StatusCode.INVALID_ARGUMENT, "too many passages at once")
        if self.lie == "reads nothing":
            return memory_pb2.ReadReply()
        reply = memory_pb2.ReadReply()
        for number, asked in enumerate(request.shards):
            if asked.root not in self.roots:
                continue
            shard = self.memory.shards[asked.root]
            for entry in shard.read(list(asked.positions)):
                message = entry.message(number)
                if self.lie == "all revoked":
                    message.ClearField("passage")
                    message.ClearField("vector")
                if self.lie == "forged text" and entry.passage is not None:
                    message.passage.text += " and buy my pills"
                if self.lie == "wrong vectors":
                    message.vector = bytes(reversed(message.vector))[:-1] + b"\1"
                reply.passages.append(message)
        return reply

    def _spoilt(self, found: list["_Candidate"], lengths: Sequence[int]) -> list["_Candidate"]:
        if self.lie == "inflated scores":
            return [f._replace(score=f.score + 1000) for f in found]
        if self.lie == "deflated scores":
            return [f._replace(score=f.score - 1000) for f in found]
        if self.lie == "wrong texts":
            return [
                f._replace(text=self.memory.places[self.rng.randrange(len(self.memory.places))])
                for f in found
            ]
        if self.lie == "wrong positions":
            return [f._replace(position=(f.position + 1) % lengths[f.number]) for f in found]
        if self.lie == "omits":
            return [f for f in found if self.rng.random() < 0.5]
        if self.lie == "omits best":
            return [f for f in found if f.text != found[0].text]
        if self.lie == "too many":
            return found * 3
        if self.lie == "other order":
            return found[::-1]
        return found


def node_info(peer_id: PeerID, port: int = 1, pem: bytes = b"") -> NodeInfo:
    endpoint = Endpoint(f"127.0.0.1:{port}")
    return NodeInfo(peer_id=peer_id, addresses=(endpoint,), certificate_pem=pem, expires_at=1e12)


def peer_ids(count: int) -> list[PeerID]:
    """PeerIDs that have no keys."""
    return [PeerID(b"\x12\x20" + number.to_bytes(32, "big")) for number in range(count)]


@dataclass
class SampleSwarm:
    """Hosts of one memory, the searcher's knowledge of them, and the calls to them."""

    memory_here: SampleMemory
    hosts: dict[PeerID, SampleHost]
    newest: MemoryManifest | None = None
    """The manifest that `follow` finds; None: the memory's own."""

    @property
    def memory(self) -> MemoryID:
        return MEMORY

    @property
    def manifest(self) -> MemoryManifest:
        return self.memory_here.manifest

    @property
    def nodes(self) -> list[NodeInfo]:
        return [node_info(host) for host in self.hosts]

    def encode(self, texts: Sequence[str], turn: Turn | None = None) -> tuple[Vectors, Floats]:
        vectors_QD = np.array([self.memory_here.vectors_ND[int(text)] for text in texts], np.int8)
        vectors_QD = vectors_QD if turn is None else turn(vectors_QD)
        return vectors_QD, self.memory_here.codebook.scores(vectors_QD)

    @property
    def word_weight(self) -> float:
        return WORD_WEIGHT

    def rarity(self, words: Iterable[str]) -> list[float]:
        return [1.0 for _ in words]

    def note(self, searched: Collection[Cell], missing: Collection[Cell]) -> None:
        pass

    async def locate(self, scores_QC: Floats, count: int, avoided: frozenset[PeerID]) -> Located:
        manifest = self.memory_here.manifest
        hosts = {cell: self._having(cell, avoided) for cell in manifest.by_cell}
        filled = [cell for cell, having in hosts.items() if any(having.values())]
        cells = [
            sorted(filled, key=lambda cell: -row[np.ravel_multi_index(cell, manifest.grid)])[:count]
            for row in scores_QC
        ]
        nodes = {host: node_info(host) for host in self.hosts}
        near = {cell: hosts[cell] for some in cells for cell in some}
        return Located(manifest, cells, [()] * len(scores_QC), near, nodes)

    async def hosts_of(
        self, shards: Collection[ShardInfo], located: Located, avoided: frozenset[PeerID]
    ) -> Located:
        more = {shard.cell: self._having(shard.cell, avoided) for shard in shards}
        return replace(located, hosts={**located.hosts, **more})

    def _having(self, cell: Cell, avoided: Collection[PeerID]) -> dict[PeerID, frozenset[bytes]]:
        roots = {shard.root for shard in self.memory_here.manifest.by_cell[cell]}
        return {
            host: frozenset(roots.intersection(sample.roots))
            for host, sample in self.hosts.items()
            if host not in avoided
        }

    async def follow(self) -> MemoryManifest:
        return self.newest or self.memory_here.manifest

    async def call(self, node: NodeInfo, method: Method, request: Any, deadline_s: float) -> Any:
        assert (request.swarm_id, request.memory) == (SWARM, str(MEMORY))
        return await self.hosts[node.peer_id].answer(method, request, deadline_s)
