"""Searches a memory: which cells and which hosts to ask, and which of their answers are true.

A search makes two rounds of calls. The first asks a few hosts of the cells that are nearest to each query for their
best passages, each once for all queries. The second reads the best passages of all answers, whose texts may be in other
cells, and proves them (`checks`). If a host fails, is late or lies, another replica is called.

Now and then, a second replica gets the same queries in the background. A host that left out a passage is avoided from
then on.

Shapes: Q queries, C cells in row-major order, D numbers in a vector.
"""

import asyncio
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol, TypeAlias, TypeVar

import numpy as np

from dht.announcements import NodeInfo
from dht.memory import (
    MAX_K,
    MAX_QUERIES,
    MAX_READ,
    MAX_SCORES,
    MAX_SEARCHED,
    Cell,
    MemoryID,
    MemoryManifest,
    Passage,
    Place,
    ShardInfo,
    Vectors,
)
from peer import PROTOCOL_VERSION
from peer.bounded import BoundedDict
from peer.codec import Floats
from peer.errors import DataError, ExpertError, UnreachableError
from peer.identity import PeerID
from peer.loop import TaskSet, TimeSlices
from peer.wire import memory_pb2
from trainer_client.memory.calls import MANY, HostCalls, Kind, loop_time
from trainer_client.memory.checks import (
    Answer,
    Ask,
    Claim,
    Findings,
    Proven,
    agrees,
    omitted,
    parse_passages,
    parse_revoked,
)
from trainer_client.memory.encoder import WORD_WEIGHT, words_of

T = TypeVar("T")

Turn: TypeAlias = Callable[[Vectors], Vectors]
"""Replaces the vectors of questions by others: [Q, D] -> [Q, D]."""

MOST_CHARACTERS = 10_000
"""The longest query."""
MOST_WANTED = MAX_K // 2
"""The most passages for a query. A host is asked for twice as many, because a passage may be in two of its cells."""
CHECKED_SHARE = 1 / 50
"""The share of queries that a second replica is also asked for."""
_SPARE = 4
"""How many more passages a host is asked for if some passages of the memory are revoked."""
_CANDIDATES = 3
"""How many passages are read for each one wanted, if words count too."""
_SATURATION, _LENGTH = 1.2, 0.75
"""k1 and b of BM25 (Robertson and Zaragoza, 2009)."""
_DEADLINE_S = 10.0
_FIRST_PART = 0.6
"""The share of a search's deadline that the first round may take."""
_KEPT = 2048
"""Proven passages that are remembered."""
_CHECKS_AT_ONCE = 2
_READ_TO_CHECK = 16
"""The most passages that are read to find hosts that omitted them."""


@dataclass(frozen=True)
class Hit:
    """A passage that was found."""

    passage: Passage
    score: float
    """The score that ranks it: the similarity and, if words count too, a bonus for the words that it shares with the
    query.
    """
    similarity: float
    """The inner product of the two vectors, relative to that of the query's with itself."""
    memory: MemoryID
    leaf: bytes
    """The hash that identifies it, by which it can be revoked."""
    served_by: PeerID
    vector_D: Vectors = field(repr=False, compare=False)
    """The passage's own vector, as stored in the memory."""


@dataclass(frozen=True)
class SearchResult:
    """The result for one query."""

    hits: tuple[Hit, ...]
    """The best first."""
    is_understood: bool = True
    """Whether the encoder knows any word of the query. If not, nothing is found."""
    missing: tuple[Cell, ...] = ()
    """Cells that could not be searched, or whose texts no host gave: there may be better passages."""


@dataclass(frozen=True)
class Located:
    """Where to look for some queries, at one moment."""

    manifest: MemoryManifest
    cells: Sequence[Sequence[Cell]]
    """Live cells for each query, the nearest first."""
    missing: Sequence[Sequence[Cell]]
    """For each query, cells that are nearer than these but have no host."""
    hosts: Mapping[Cell, Mapping[PeerID, Set[bytes]]]
    """What each host has of these cells, and perhaps of others: the roots of its shards."""
    nodes: Mapping[PeerID, NodeInfo]


class Directory(Protocol):
    """What is known of one memory."""

    @property
    def memory(self) -> MemoryID: ...

    @property
    def manifest(self) -> MemoryManifest:
        """The newest open revision's manifest."""

    @property
    def nodes(self) -> Collection[NodeInfo]:
        """The nodes that host the cells of recent searches."""

    def encode(self, texts: Sequence[str], turn: Turn | None = None) -> tuple[Vectors, Floats]:
        """The texts' vectors, [Q, D], and their scores for each cell, [Q, C]. For any thread.

        `turn`: see `Retriever.search`.
        """

    @property
    def word_weight(self) -> float:
        """The weight of the words that a passage shares with a query, relative to that of the vectors."""

    def rarity(self, words: Iterable[str]) -> list[float]:
        """How rare each word is in the memory."""

    async def locate(self, scores_QC: Floats, count: int, avoided: frozenset[PeerID]) -> Located:
        """The `count` cells nearest to each query that have hosts outside `avoided`. Raises UnreachableError."""

    async def hosts_of(
        self, shards: Collection[ShardInfo], located: Located, avoided: frozenset[PeerID]
    ) -> Located:
        """`located`, with the hosts of these shards' cells outside `avoided` added. Raises UnreachableError."""

    def note(self, searched: Collection[Cell], missing: Collection[Cell]) -> None:
        """Records which cells were searched, and of which ones the hosts did not give everything. Their hosts are read
        again in the background: at once, and then more and more rarely.
        """

    async def follow(self) -> MemoryManifest:
        """Looks for the newest manifest that the publisher has signed, and returns it. Raises UnreachableError."""


class Retriever:
    """Searches one memory. For one event loop; close it when done."""

    def __init__(
        self,
        directory: Directory,
        calls: HostCalls,
        swarm_id: str,
        *,
        rng: random.Random | None = None,
        checked_share: float = CHECKED_SHARE,
    ) -> None:
        """`checked_share`: the share of queries that a second replica is also asked for."""
        self.directory = directory
        self.calls = calls
        self._swarm_id = swarm_id
        self._rng = rng or random.SystemRandom()
        self._checked_share = checked_share
        self._kept = BoundedDict[Place, Proven](_KEPT)
        self._searches, self._checks = TaskSet(), TaskSet()

    async def close(self) -> None:
        """Ends searches and checks in progress."""
        await self._searches.aclose()
        await self._checks.aclose()

    async def checked(self) -> None:
        """Waits for checks in progress."""
        await self._checks.join()

    async def search(
        self,
        texts: Sequence[str],
        k: int = 10,
        cells: int = 8,
        *,
        by_words: bool = True,
        turn: Turn | None = None,
        deadline_s: float = _DEADLINE_S,
    ) -> list[SearchResult]:
        """The k best passages for each text, among those in the cells nearest to it.

        `by_words`: words that a passage shares with the text count, too; this reads three times as many passages.
        `turn`: replaces the vectors that the memory's encoder gives the texts, before the search. `deadline_s`: the
        time for each 256 texts. Passages that are not found by then are left out. Raises DataError for a text that is
        too long, and UnreachableError if the DHT does not answer.
        """
        check_query(texts, k, cells)
        results: list[SearchResult] = []
        wanted = min(_CANDIDATES * k, MOST_WANTED) if by_words else k
        with self._searches.including_current():
            for at in range(0, len(texts), MAX_QUERIES):
                some = texts[at : at + MAX_QUERIES]
                vectors_QD, scores_QC = await asyncio.to_thread(self.directory.encode, some, turn)
                found = await self.search_vectors(vectors_QD, scores_QC, wanted, cells, deadline_s)
                if by_words:
                    found = await asyncio.to_thread(self._by_words, some, found, k)
                results += found
        return results

    async def search_vectors(
        self, vectors_QD: Vectors, scores_QC: Floats, k: int, cells: int, deadline_s: float = _DEADLINE_S
    ) -> list[SearchResult]:
        """The k best passages for each of at most 256 vectors. `scores_QC`: the vectors' scores for each cell."""
        began = loop_time()
        self.calls.metrics.queries.inc(len(vectors_QD))
        results = [SearchResult((), is_understood=False)] * len(vectors_QD)
        rows = np.flatnonzero(vectors_QD.any(axis=1))
        if len(rows):
            search = _Search(self, vectors_QD[rows], k, began, deadline_s)
            found = await search.run(scores_QC[rows], cells)
            for row, result in zip(rows.tolist(), found, strict=True):
                results[row] = result
        self.calls.metrics.seconds.observe(loop_time() - began)
        return results

    async def ask(self, ask: Ask, vectors_QD: Vectors, node: NodeInfo, ends: float) -> Answer:
        """Raises ExpertError."""
        request = ask.request(self._swarm_id, PROTOCOL_VERSION, str(self.directory.memory), vectors_QD)
        is_large = len(ask.sent) > MANY
        parse = partial(ask.parse, host=node.peer_id)
        answer = await self.calls.call(
            node, "Search", request, is_large, parse, lambda answer: bool(answer.present), ends
        )
        if answer.present:
            self.calls.credit.note(node, queries=len(ask.sent))
        return answer

    async def read(
        self, places: Collection[Place], manifest: MemoryManifest, node: NodeInfo, ends: float
    ) -> dict[Place, Proven]:
        """The passages that the host has. Raises ExpertError."""
        request, asked = self._read_request(places)
        is_large = len(places) > MANY
        parse = partial(parse_passages, asked=asked, manifest=manifest, host=node.peer_id)
        found = await self.calls.call(node, "Read", request, is_large, parse, bool, ends)
        for place, proven in found.items():
            self._kept[place] = proven
        return found

    async def revoked(
        self, places: Collection[Place], manifest: MemoryManifest, node: NodeInfo, ends: float
    ) -> Collection[Place]:
        """Which of the passages were revoked, according to the host. Raises ExpertError."""
        request, asked = self._read_request(places)
        parse = partial(parse_revoked, asked=asked, manifest=manifest)
        return await self.calls.call(node, "Read", request, False, parse, lambda _: True, ends)

    def _read_request(
        self, places: Iterable[Place]
    ) -> tuple[memory_pb2.ReadRequest, Mapping[bytes, Sequence[int]]]:
        """The request, and the positions by root in its order."""
        asked: dict[bytes, list[int]] = {}
        for root, position in places:
            asked.setdefault(root, []).append(position)
        shards = [
            memory_pb2.ShardPositions(root=root, positions=positions) for root, positions in asked.items()
        ]
        request = memory_pb2.ReadRequest(
            protocol_version=PROTOCOL_VERSION,
            swarm_id=self._swarm_id,
            memory=str(self.directory.memory),
            shards=shards,
        )
        return request, asked

    def kept(self, places: Iterable[Place]) -> dict[Place, Proven]:
        """The passages that were read recently."""
        found = ((place, self._kept.get(place)) for place in places)
        return {place: proven for place, proven in found if proven is not None}

    def check_later(self, search: "_Search") -> None:
        """Draws some queries of a search, and sends them to second replicas in the background."""
        drawn = [query for query in range(search.count) if self._rng.random() < self._checked_share]
        if drawn and search.answers and len(self._checks) < _CHECKS_AT_ONCE:
            self._checks.spawn(self._check(search, drawn), "check what hosts of a memory answered")

    def _by_words(self, texts: Sequence[str], results: Sequence[SearchResult], k: int) -> list[SearchResult]:
        rarity, weight = self.directory.rarity, self.directory.word_weight
        return [
            replace(result, hits=ranked_by_words(text, result.hits, rarity, weight)[:k])
            for text, result in zip(texts, results, strict=True)
        ]

    async def _check(self, search: "_Search", drawn: Sequence[int]) -> None:
        with suppress(UnreachableError):
            await search.check(drawn)


class _Search:
    """One search of at most 256 queries."""

    def __init__(
        self, retriever: Retriever, vectors_QD: Vectors, k: int, began: float, deadline_s: float
    ) -> None:
        self.count: int = len(vectors_QD)
        self.answers: list[Answer] = []
        self._retriever = retriever
        self._vectors_QD = vectors_QD
        self._k = k
        self._began = began
        self._deadline_s = deadline_s
        self._is_large = len(vectors_QD) > MANY
        self._located: Located
        self._asked: dict[PeerID, set[bytes]] = defaultdict(set)
        """The shards that each host was asked for, by root."""
        self._wanted: dict[bytes, tuple[ShardInfo, list[int]]] = {}
        """By root, the shard to search, and the queries to search it for."""

    async def run(self, scores_QC: Floats, cells: int) -> list[SearchResult]:
        retriever, ends = self._retriever, self._began + self._deadline_s
        try:
            async with asyncio.timeout_at(ends):
                located = await retriever.directory.locate(scores_QC, cells, retriever.calls.avoided())
        except TimeoutError:
            raise UnreachableError(f"the DHT did not answer within {self._deadline_s:.0f} s") from None
        self._located = located
        for query, chosen in enumerate(located.cells):
            for cell in chosen:
                for shard in located.manifest.by_cell.get(cell, ()):
                    _, queries = self._wanted.setdefault(shard.root, (shard, []))
                    # two cells with the same passages have the same shard
                    if not queries or queries[-1] != query:
                        queries.append(query)
        findings = Findings(located.manifest, self._vectors_QD, self._k)
        unasked, doubtful = set(self._wanted), set[PeerID]()
        while True:
            if unasked:
                # the first answers must leave time for reading
                part = 1.0 if doubtful else _FIRST_PART
                await self._ask(unasked, findings, self._began + part * self._deadline_s)
            unproven = await self._off_loop(findings.unproven)
            new = findings.liars - doubtful
            for liar in new:
                retriever.calls.distrust(
                    liar, "false", "claimed passages that are not there, or wrong scores"
                )
            if not new:
                if not unproven or loop_time() >= ends:
                    break
                new = await self._read(unproven, findings, ends) - doubtful
            doubtful |= new
            unasked = self._without_answer(doubtful) if new else set()
        self.answers = [answer for answer in self.answers if answer.host not in findings.liars]
        results = await self._off_loop(partial(self._results, findings))
        retriever.directory.note(
            set().union(*located.cells), {cell for result in results for cell in result.missing}
        )
        retriever.check_later(self)
        return results

    async def check(self, drawn: Sequence[int]) -> None:
        """Sends these queries to second replicas, and finds hosts that left something out. Raises UnreachableError."""
        ends = loop_time() + self._deadline_s
        wanted = [
            (root, answer.host)
            for answer in self.answers
            for root in answer.present
            if not set(drawn).isdisjoint(self._wanted[root][1])
        ]
        offers = await self._offers(wanted, lambda item: item[0])
        for item in wanted:
            offers.get(item[1], set()).discard(item)
        second: list[Answer] = []

        async def call(host: PeerID, items: list[tuple[bytes, PeerID]]) -> Collection[tuple[bytes, PeerID]]:
            answer = await self._ask_host(host, {root for root, _ in items}, ends, frozenset(drawn))
            second.append(answer)
            return [item for item in items if item[0] in answer.present]

        def split(items: list[tuple[bytes, PeerID]]) -> Iterable[list[tuple[bytes, PeerID]]]:
            return _affordable(items, lambda item: self._wanted[item[0]][0].leaves * len(drawn))

        await self._retriever.calls.spread(wanted, [offers], call, ("Search", False), split, ends)
        if second:
            self._retriever.calls.note_checks(len(drawn))
        suspects: dict[tuple[int, Claim], set[PeerID]] = {}
        for query in drawn:
            for one in self.answers:
                for other in second:
                    if one.host == other.host:
                        continue
                    for claimant, silent in ((one, other), (other, one)):
                        for claim in omitted(query, claimant, silent):
                            suspects.setdefault((query, claim), set()).add(silent.host)
        if suspects:
            await self._convict(suspects, ends)

    async def _convict(self, suspects: Mapping[tuple[int, Claim], Collection[PeerID]], ends: float) -> None:
        """Tries to prove the passages that other hosts should have returned, too."""
        retriever = self._retriever
        # the newest revision may have revoked some, which hosts that know it rightly leave out
        manifest = await retriever.directory.follow()
        by_claim = sorted(suspects.items(), key=lambda item: -item[0][1].score)[:_READ_TO_CHECK]
        findings = Findings(manifest, self._vectors_QD, self._k)
        places: dict[Place, None] = {}
        claimants: dict[PeerID, set[Place]] = defaultdict(set)
        for (_, claim), _ in by_claim:
            if claim.found.root in manifest.by_root and manifest.has_text_at(claim.text):
                places[claim.found] = None
                claimants[claim.host].add(claim.found)
        offers = [claimants, await self._offers(places, lambda place: place.root)]

        async def call(host: PeerID, items: list[Place]) -> Collection[Place]:
            found = await retriever.read(items, manifest, self._located.nodes[host], ends)
            findings.prove(found)
            return found.keys()

        await retriever.calls.spread(places, offers, call, ("Read", False), _readable, ends)
        left_out: dict[PeerID, dict[Place, Proven]] = {}
        for (query, claim), silent in by_claim:
            proven = findings.proven.get(claim.found)
            if proven is None or proven.text in manifest.revoked:
                continue
            if not agrees(claim, proven, self._vectors_QD[query]):
                retriever.calls.distrust(
                    claim.host, "false", "claimed a passage that is not there, or a wrong score"
                )
                continue
            for host in silent:
                left_out.setdefault(host, {})[claim.found] = proven
        for host, omitted_there in left_out.items():
            if not await self._may_be_ahead(host, omitted_there, manifest, ends):
                leaf = next(iter(omitted_there.values())).leaf
                retriever.calls.distrust(host, "omission", f"left out the passage {leaf.hex()[:16]}")

    async def _may_be_ahead(
        self, host: PeerID, omitted_there: Collection[Place], manifest: MemoryManifest, ends: float
    ) -> bool:
        """Whether the host may know a later revision, which revokes all that it left out. Soon after, the publisher's
        list must show that revision.
        """
        retriever = self._retriever
        try:
            revoked = await retriever.revoked(omitted_there, manifest, self._located.nodes[host], ends)
        except ExpertError:
            return False
        return set(omitted_there) <= set(revoked) and retriever.calls.may_be_ahead(host, manifest.revision)

    async def _ask(self, roots: Collection[bytes], findings: Findings, ends: float) -> None:
        """Asks for the best passages in these shards, each from a host that was not asked before."""
        offers = await self._offers(roots, lambda root: root)
        for host, asked in self._asked.items():
            offers.get(host, set()).difference_update(asked)

        async def call(host: PeerID, roots: list[bytes]) -> Collection[bytes]:
            answer = None
            with suppress(ExpertError):
                answer = await self._ask_host(host, roots, ends)
            # a host whose call was cancelled because another was faster does not count: the other may turn out to lie
            self._asked[host].update(roots)
            if answer is None:
                return ()
            self.answers.append(answer)
            findings.add(answer)
            places = (claim.text for claims in answer.claims.values() for claim in claims)
            findings.prove(self._retriever.kept(places))
            return answer.present

        kind: Kind = ("Search", self._is_large)
        await self._retriever.calls.spread(roots, [offers], call, kind, self._split, ends)

    async def _offers(self, items: Iterable[T], root_of: Callable[[T], bytes]) -> dict[PeerID, set[T]]:
        """What each host may have of these. `root_of`: the shard that an item is in."""
        by_root: dict[bytes, list[T]] = defaultdict(list)
        for item in items:
            by_root[root_of(item)].append(item)
        roots, offers, slices = frozenset(by_root), dict[PeerID, set[T]](), TimeSlices()
        for hosts in self._located.hosts.values():
            for host, having in hosts.items():
                if some := having & roots:
                    offers.setdefault(host, set()).update(*map(by_root.__getitem__, some))
                await slices.pause()
        return offers

    def _split(self, roots: list[bytes]) -> Iterable[list[bytes]]:
        def scores(root: bytes) -> int:
            shard, queries = self._wanted[root]
            return shard.leaves * len(queries)

        return _affordable(roots, scores)

    def _without_answer(self, doubtful: Collection[PeerID]) -> set[bytes]:
        """The shards that only these hosts have searched."""
        answered = {root for answer in self.answers if answer.host not in doubtful for root in answer.present}
        return self._wanted.keys() - answered

    async def _ask_host(
        self, host: PeerID, roots: Collection[bytes], ends: float, only: frozenset[int] | None = None
    ) -> Answer:
        """`only`: just these queries; None: all."""
        shards, queries = [], []
        for root in roots:
            shard, numbers = self._wanted[root]
            shards.append(shard)
            queries.append(tuple(numbers if only is None else (n for n in numbers if n in only)))
        # a passage may be in two cells, and hosts may not know the latest revocations yet
        spare = min(len(self._located.manifest.revoked), _SPARE)
        ask = Ask(tuple(shards), tuple(queries), min(2 * (self._k + spare), MAX_K))
        return await self._retriever.ask(ask, self._vectors_QD, self._located.nodes[host], ends)

    async def _read(
        self, unproven: Mapping[Place, Sequence[Claim]], findings: Findings, ends: float
    ) -> set[PeerID]:
        """Reads these texts. Returns the hosts that claim to have a text, if no host gives it."""
        await self._locate_texts(unproven, ends)
        located = self._located

        async def call(host: PeerID, places: list[Place]) -> Collection[Place]:
            found = await self._retriever.read(places, located.manifest, located.nodes[host], ends)
            findings.prove(found)
            return found.keys()

        # a host that found it in a secondary shard need not have the text
        having: dict[PeerID, set[Place]] = defaultdict(set)
        for text, claims in unproven.items():
            for claim in claims:
                if claim.found == text:
                    having[claim.host].add(text)
        offers = [having, await self._offers(unproven, lambda text: text.root)]
        kind: Kind = ("Read", len(unproven) > MANY)
        given_up = await self._retriever.calls.spread(unproven, offers, call, kind, _readable, ends)
        findings.give_up(given_up)
        return {host for host, texts in having.items() if not texts.isdisjoint(given_up)}

    async def _locate_texts(self, texts: Iterable[Place], ends: float) -> None:
        """Looks for the hosts of texts that are in cells which were not asked."""
        by_root = self._located.manifest.by_root
        shards = [by_root[root] for root in dict.fromkeys(text.root for text in texts)]
        shards = [shard for shard in shards if shard.cell not in self._located.hosts]
        if shards:
            with suppress(TimeoutError, UnreachableError):  # what is not found is missing in the results
                async with asyncio.timeout_at(ends):
                    retriever = self._retriever
                    self._located = await retriever.directory.hosts_of(
                        shards, self._located, retriever.calls.avoided()
                    )

    def _results(self, findings: Findings) -> list[SearchResult]:
        memory = self._retriever.directory.memory
        answered = {root for answer in self.answers for root in answer.present}
        manifest = self._located.manifest
        results = []
        for query, vector_D in enumerate(self._vectors_QD):
            whole = float(vector_D.astype(np.int64) @ vector_D.astype(np.int64))
            hits = tuple(
                Hit(
                    passage, score / whole, score / whole, memory, proven.leaf, proven.reader, proven.vector_D
                )
                for score, passage, proven in findings.results(query)
            )
            missing = dict.fromkeys(self._located.missing[query])
            missing |= dict.fromkeys(
                cell
                for cell in self._located.cells[query]
                if any(shard.root not in answered for shard in manifest.by_cell.get(cell, ()))
            )
            missing |= dict.fromkeys(manifest.by_root[text.root].cell for text in findings.unread(query))
            results.append(SearchResult(hits, missing=tuple(missing)))
        return results

    async def _off_loop(self, function: Callable[[], T]) -> T:
        return await asyncio.to_thread(function) if self._is_large else function()


def _affordable(items: list[T], scores: Callable[[T], int]) -> Iterator[list[T]]:
    """The shards to search, divided into calls of a size that hosts accept. `scores`: the number of inner products for
    one shard.
    """
    part, cost = list[T](), 0
    for item in items:
        if part and (len(part) == MAX_SEARCHED or cost + scores(item) > MAX_SCORES):
            yield part
            part, cost = [], 0
        part.append(item)
        cost += scores(item)
    yield part


def _readable(places: list[Place]) -> Iterator[list[Place]]:
    """The passages to read, divided into calls of a size that hosts accept."""
    return (places[at : at + MAX_READ] for at in range(0, len(places), MAX_READ))


def ranked_by_words(
    text: str,
    hits: Sequence[Hit],
    rarity: Callable[[Iterable[str]], list[float]],
    weight: float = WORD_WEIGHT,
) -> tuple[Hit, ...]:
    """The hits ranked by similarity and by the words that they share with the text, where rare words count most.

    A hit of the mean length that has each word once gets a bonus of `weight`. A bonus is always less than 2.2 times
    that: see `shared_words`.
    """
    shares = shared_words(text, [f"{hit.passage.title} {hit.passage.text}" for hit in hits], rarity)
    scored = [
        replace(hit, score=hit.similarity + weight * share) for hit, share in zip(hits, shares, strict=True)
    ]
    return tuple(sorted(scored, key=lambda hit: -hit.score))


def shared_words(
    text: str, passages: Sequence[str], rarity: Callable[[Iterable[str]], list[float]]
) -> list[float]:
    """The share of the text's words that each passage has, where rare words count most. Words that a passage repeats
    count more, so it may be above 1.

    It is BM25, divided by the sum of the words' rarities. The mean length of these passages stands for that of all.
    """
    words = sorted(set(words_of(text)))
    rarities = dict(zip(words, rarity(words), strict=True))
    whole = sum(rarities.values())
    if not whole:
        return [0.0] * len(passages)
    counts = [Counter(words_of(passage)) for passage in passages]
    mean = sum(count.total() for count in counts) / max(1, len(counts)) or 1.0
    shares = []
    for count in counts:
        length = _SATURATION * (1 - _LENGTH + _LENGTH * count.total() / mean)
        shared = sum(
            rare * times * (_SATURATION + 1) / (times + length)
            for word, rare in rarities.items()
            if (times := count[word])
        )
        shares.append(shared / whole)
    return shares


def check_query(texts: Sequence[str], k: int, cells: int) -> None:
    """Raises DataError if such a search is not possible."""
    if not 1 <= k <= MOST_WANTED:
        raise DataError(f"{k} passages were asked for: ask for 1 to {MOST_WANTED}")
    if cells < 1:
        raise DataError(f"{cells} cells were asked for: ask for at least 1")
    longest = max(map(len, texts), default=0)
    if longest > MOST_CHARACTERS:
        raise DataError(f"a question has {longest} characters: shorten it to {MOST_CHARACTERS}")
