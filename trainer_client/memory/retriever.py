"""Searches a memory: which cells, which hosts, and what of their answers is true.

A search takes two calls one after another. The first asks the hosts of the cells that are nearest to each query for
their best passages; few hosts are asked, each once for all queries. The second reads the passages that are best over
all answers, and proves them (`checks`). A host that fails, is late or lies costs a call to another replica.

Every now and then a second replica is asked for what a first one answered, in the background: a host that left a
passage out is avoided from then on.

Shapes: Q queries, C cells in row-major order, D numbers in a vector.
"""

import asyncio
import logging
import random
from collections import Counter as Counts
from collections import defaultdict
from collections.abc import Awaitable, Callable, Collection, Hashable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
from grpc import StatusCode
from prometheus_client import CollectorRegistry, Counter, Histogram

from dht.announcements import NodeInfo
from dht.memory import Cell, MemoryID, MemoryManifest, Passage, ShardInfo
from peer import PROTOCOL_VERSION
from peer.bounded import BoundedDict
from peer.codec import Floats
from peer.errors import DataError, ExpertError, UnreachableError, WireError
from peer.identity import PeerID
from peer.loop import TaskSet
from peer.metrics import SECONDS, start_at_zero
from peer.parsing import ParseGuard
from peer.wire import memory_pb2
from trainer_client.dispatch.policy import CallTimes, CircuitBreakers, WaitPolicy
from trainer_client.memory.checks import (
    MOST_K,
    MOST_QUERIES,
    MOST_SHARDS,
    Answer,
    Ask,
    Claim,
    Findings,
    Place,
    Proven,
    Vectors,
    agrees,
    omitted,
    parse_passages,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")
H = TypeVar("H", bound=Hashable)
Method = Literal["Search", "Read"]

MOST_CHARACTERS = 10_000
"""Of a query."""
MOST_WANTED = MOST_K // 2
"""Passages for a query. A host is asked for twice as many, because a passage may lie in two of its cells."""
_SPARE = 4
"""Passages more that a host is asked for where some of the memory were revoked."""
CHECKED_SHARE = 1 / 50
"""Queries that a second replica is asked for, too."""
_DEADLINE_S = 10.0
_CALL_DEADLINE_S = 5.0
_LEAST_DEADLINE_S = 1.0
_FIRST_PART = 0.6
"""Of the time that a search has, what the first answers may take."""
_READ_AT_ONCE = 64
"""Passages in one call: the longest that there may be fit into a message."""
_MANY = 16
"""Queries from which on answers are parsed and merged on a thread."""
_SLOWER, _SLOWER_BY_S = 3.0, 0.05
"""A host that takes so many times as long as the quickest replica, and so much longer, is passed over."""
_HANGING = 4.0
"""A call that was given up counts as so many times longer."""
_SLOW_FOR_S = 60.0
"""How long it is remembered how slow a host was."""
_HOSTS = 4096
_KEPT = 2048
"""Proven passages that are remembered."""
_CHECKS_AT_ONCE = 2
_READ_TO_CHECK = 16
"""Passages that are read to see who omitted them, at most."""
_QUICK = {StatusCode.UNAVAILABLE, StatusCode.NOT_FOUND}
"""Failures that cost little time, of which a few are forgiven."""
_BUSY_TRIES = 3
_BUSY_S = 0.5


@dataclass(frozen=True)
class Hit:
    """A passage that was found."""

    passage: Passage
    score: float
    """How near it is to the query; a text that is the query itself has about 1."""
    memory: MemoryID
    leaf: bytes
    """The hash that names it, by which it may be revoked."""
    served_by: PeerID


@dataclass(frozen=True)
class SearchResult:
    """What was found for one query."""

    hits: tuple[Hit, ...]
    """The best first."""
    is_understood: bool = True
    """Whether the encoder knows any word of the query. If not, nothing is found."""
    missing: tuple[Cell, ...] = ()
    """Cells near the query in which nobody looked: there may be better passages."""


@dataclass(frozen=True)
class Located:
    """Where to look for some queries, at one moment."""

    manifest: MemoryManifest
    cells: Sequence[Sequence[Cell]]
    """Of each query, live ones, the nearest first."""
    missing: Sequence[Sequence[Cell]]
    """Of each query: nearer than these, and nobody hosts them."""
    hosts: Mapping[bytes, Collection[PeerID]]
    """Of each shard in these cells, by its root."""
    nodes: Mapping[PeerID, NodeInfo]


class Directory(Protocol):
    """What is known of one memory."""

    @property
    def memory(self) -> MemoryID: ...

    def encode(self, texts: Sequence[str]) -> tuple[Vectors, Floats]:
        """The texts' vectors, [Q, D], and how near they are to each cell, [Q, C]. For any thread."""

    async def locate(self, scores_QC: Floats, count: int, avoided: frozenset[PeerID]) -> Located:
        """The `count` cells nearest to each query that others than `avoided` host. Raises UnreachableError."""

    async def follow(self) -> MemoryManifest:
        """The newest manifest that its publisher signed, after a look. Raises UnreachableError."""


class MemoryCaller(Protocol):
    """Calls hosts."""

    async def call(self, node: NodeInfo, method: Method, request: Any, deadline_s: float) -> Any:
        """The reply. Raises ExpertError."""


class RetrieverMetrics:
    """What one peer counts of its searches."""

    def __init__(self, metrics: CollectorRegistry | None = None) -> None:
        def counter(name: str, description: str, *labels: str) -> Counter:
            return Counter(f"talkoot_retriever_{name}", description, labels, registry=metrics)

        self.queries = counter("queries", "Queries to memories.")
        self.seconds = Histogram(
            "talkoot_retriever_seconds",
            "Duration of a search, which may be of many queries.",
            buckets=SECONDS,
            registry=metrics,
        )
        self.calls = counter("calls", "Calls to hosts of memories, by method.", "method")
        start_at_zero(self.calls, "Search", "Read")
        self.failures = counter("failures", "Calls to hosts that failed, by gRPC status.", "cause")
        self.hedged_calls = counter(
            "hedged_calls", "Calls whose shards were asked from another replica, too."
        )
        self.lies = counter("lies", "Answers of hosts that were not true.", "kind")
        start_at_zero(self.lies, "malformed", "false", "omission")
        self.checks = counter("checks", "Queries of which a second replica was asked.")


def choose_hosts(wanted: Mapping[H, Collection[PeerID]], rng: random.Random) -> dict[PeerID, list[H]]:
    """Few hosts that have all that is wanted, as far as anybody has it: the host of most goes first, of several any."""
    left = {item: hosts for item, hosts in wanted.items() if hosts}
    chosen: dict[PeerID, list[H]] = {}
    while left:
        count = Counts(host for hosts in left.values() for host in hosts)
        most = max(count.values())
        host = rng.choice(sorted(host for host, number in count.items() if number == most))
        chosen[host] = [item for item, hosts in left.items() if host in hosts]
        for item in chosen[host]:
            del left[item]
    return chosen


def quick_hosts(hosts: Collection[PeerID], times_s: Mapping[PeerID, float]) -> list[PeerID]:
    """Those that are not much slower than another one. `times_s`: how long they took lately, as far as it is known."""
    quickest = min((times_s[host] for host in hosts if host in times_s), default=0.0)
    return [host for host in hosts if times_s.get(host, 0.0) <= _SLOWER * quickest + _SLOWER_BY_S]


class _Pace:
    """How long calls of one kind took lately."""

    def __init__(self) -> None:
        self.calls = CallTimes()
        self._hosts = BoundedDict[PeerID, tuple[float, float]](_HOSTS)
        """Seconds, and when that was."""

    def note(self, host: PeerID, seconds: float, now: float, *, is_finished: bool) -> None:
        if is_finished:
            self.calls.add(seconds)
        else:
            self.calls.add_unfinished(seconds)
        before = self.of_hosts(now).get(host, seconds)
        # one call that hangs is enough to be passed over for a while
        self._hosts[host] = (before + seconds) / 2 if is_finished else max(before, _HANGING * seconds), now

    def of_hosts(self, now: float) -> dict[PeerID, float]:
        return {host: seconds for host, (seconds, at) in self._hosts.items() if now - at < _SLOW_FOR_S}


@dataclass
class _Sent:
    """A call under way."""

    items: list[Any]
    late_at: float
    is_late: bool = False


class Retriever:
    """Searches one memory. For one event loop; close it when done."""

    def __init__(
        self,
        directory: Directory,
        caller: MemoryCaller,
        swarm_id: str,
        *,
        guard: ParseGuard | None = None,
        metrics: RetrieverMetrics | None = None,
        rng: random.Random | None = None,
        checked_share: float = CHECKED_SHARE,
    ) -> None:
        """`checked_share`: of the queries, asked from a second replica, too."""
        self.directory = directory
        self.breakers = CircuitBreakers()
        self.metrics = metrics or RetrieverMetrics()
        self._caller = caller
        self._swarm_id = swarm_id
        self._guard = guard or ParseGuard()
        self._rng = rng or random.SystemRandom()
        self._checked_share = checked_share
        self._policy = WaitPolicy(_CALL_DEADLINE_S, 0.0, 1, _LEAST_DEADLINE_S)
        self._paces: dict[tuple[Method, bool], _Pace] = {}
        self._kept = BoundedDict[Place, Proven](_KEPT)
        self._checks = TaskSet()

    async def close(self) -> None:
        await self._checks.aclose()

    async def search(
        self, texts: Sequence[str], k: int = 10, cells: int = 8, deadline_s: float = _DEADLINE_S
    ) -> list[SearchResult]:
        """The k best passages for each text, among those in the cells nearest to it.

        `deadline_s`: for each 256 texts; what is not found by then is left out. Raises DataError for a text that is
        too long, and UnreachableError if the DHT does not answer.
        """
        check_query(texts, k, cells)
        results: list[SearchResult] = []
        for at in range(0, len(texts), MOST_QUERIES):
            some = texts[at : at + MOST_QUERIES]
            vectors_QD, scores_QC = await asyncio.to_thread(self.directory.encode, some)
            results += await self.search_vectors(vectors_QD, scores_QC, k, cells, deadline_s)
        return results

    async def search_vectors(
        self, vectors_QD: Vectors, scores_QC: Floats, k: int, cells: int, deadline_s: float = _DEADLINE_S
    ) -> list[SearchResult]:
        """The same for at most 256 vectors, and how near they are to each cell."""
        began = _now()
        self.metrics.queries.inc(len(vectors_QD))
        results = [SearchResult((), is_understood=False)] * len(vectors_QD)
        rows = np.flatnonzero(vectors_QD.any(axis=1))
        if len(rows):
            search = _Search(self, vectors_QD[rows], k, began, deadline_s)
            found = await search.run(scores_QC[rows], cells)
            for row, result in zip(rows.tolist(), found, strict=True):
                results[row] = result
        self.metrics.seconds.observe(_now() - began)
        return results

    def avoided(self) -> frozenset[PeerID]:
        """The hosts to leave alone now."""
        return self.breakers.open_at(_now())

    def distrust(self, host: PeerID, kind: Literal["malformed", "false", "omission"], said: str) -> None:
        """The host answered what no honest one does: it is not asked for a while."""
        if host not in self.avoided():
            self.metrics.lies.labels(kind).inc()
            logger.warning("host %s of memory %s: %s: banned for a while", host, self.directory.memory, said)
        self.breakers.distrust(host, _now())

    async def ask(self, ask: Ask, vectors_QD: Vectors, node: NodeInfo, ends: float) -> Answer:
        """Raises ExpertError."""
        request = ask.request(self._swarm_id, PROTOCOL_VERSION, str(self.directory.memory), vectors_QD)
        is_large = len(ask.sent) > _MANY
        parse = partial(ask.parse, host=node.peer_id)
        return await self._call(
            node, "Search", request, is_large, parse, lambda answer: bool(answer.present), ends
        )

    async def read(
        self, places: Collection[Place], manifest: MemoryManifest, node: NodeInfo, ends: float
    ) -> dict[Place, Proven]:
        """Those passages that the host has. Raises ExpertError."""
        asked: dict[bytes, list[int]] = {}
        for root, position in places:
            asked.setdefault(root, []).append(position)
        request = memory_pb2.ReadRequest(
            protocol_version=PROTOCOL_VERSION,
            swarm_id=self._swarm_id,
            memory=str(self.directory.memory),
            shards=[
                memory_pb2.ShardPositions(root=root, positions=positions) for root, positions in asked.items()
            ],
        )
        is_large = len(places) > _MANY
        parse = partial(parse_passages, asked=asked, manifest=manifest, host=node.peer_id)
        found = await self._call(node, "Read", request, is_large, parse, bool, ends)
        for place, proven in found.items():
            self._kept[place] = proven
        return found

    def kept(self, places: Iterable[Place]) -> dict[Place, Proven]:
        """Those of the passages that were read lately."""
        found = ((place, self._kept.get(place)) for place in places)
        return {place: proven for place, proven in found if proven is not None}

    async def spread(
        self,
        wanted: Mapping[H, Sequence[Collection[PeerID]]],
        call: Callable[[PeerID, list[H]], Awaitable[Collection[H]]],
        kind: tuple[Method, bool],
        most: int,
        ends: float,
    ) -> set[H]:
        """Gets each item from one of its hosts, from another one if that fails, and from both if it is late.

        `wanted`: hosts, those that are asked first in front. `call` returns those of the items that it got. `most`:
        items in one call. Returns the items that nobody gave.
        """
        pace = self._pace(kind)
        tried: dict[H, set[PeerID]] = {item: set() for item in wanted}
        left = set(wanted)
        sent: dict[asyncio.Task[Collection[H]], _Sent] = {}

        def send(items: Iterable[H]) -> None:
            avoided, times_s, fit = self.avoided(), pace.of_hosts(_now()), dict[H, list[PeerID]]()
            for item in items:
                free = [
                    [host for host in hosts if host not in avoided and host not in tried[item]]
                    for hosts in wanted[item]
                ]
                quick = quick_hosts({host for hosts in free for host in hosts}, times_s)
                fit[item] = next((some for hosts in free if (some := [h for h in hosts if h in quick])), [])
            late_at = _now() + self._policy.hedge_after_s(pace.calls)
            for host, group in choose_hosts(fit, self._rng).items():
                for at in range(0, len(group), most):
                    part = group[at : at + most]
                    for item in part:
                        tried[item].add(host)
                    sent[asyncio.create_task(_tolerate(call(host, part)))] = _Sent(part, late_at)

        try:
            send(left)
            while left and sent and (now := _now()) < ends:
                due = min((s.late_at for s in sent.values() if not s.is_late), default=ends)
                done, _ = await asyncio.wait(
                    sent, timeout=max(0.0, min(due, ends) - now), return_when=asyncio.FIRST_COMPLETED
                )
                again: dict[H, None] = {}
                for task in done:
                    items = sent.pop(task).items
                    left.difference_update(task.result())
                    again |= dict.fromkeys(items)
                for late in sent.values():
                    if not late.is_late and late.late_at <= _now():
                        late.is_late = True
                        self.metrics.hedged_calls.inc()
                        again |= dict.fromkeys(late.items)
                send(item for item in again if item in left)
        finally:
            for task in sent:
                task.cancel()
            await asyncio.gather(*sent, return_exceptions=True)
        return left

    def check_later(self, search: "_Search") -> None:
        """Draws queries of a search, and asks second replicas for them in the background."""
        drawn = [query for query in range(search.count) if self._rng.random() < self._checked_share]
        if drawn and search.answers and len(self._checks) < _CHECKS_AT_ONCE:
            self.metrics.checks.inc(len(drawn))
            self._checks.spawn(self._check(search, drawn), "check what hosts of a memory answered")

    async def _check(self, search: "_Search", drawn: Sequence[int]) -> None:
        with suppress(UnreachableError):
            await search.check(drawn)

    async def _call(
        self,
        node: NodeInfo,
        method: Method,
        request: Any,
        is_large: bool,
        parse: Callable[[Any], T],
        has_any: Callable[[T], bool],
        ends: float,
    ) -> T:
        host, pace, began = node.peer_id, self._pace((method, is_large)), _now()
        self.metrics.calls.labels(method).inc()
        deadline_s = min(self._policy.deadline_s(pace.calls), ends - began)
        try:
            reply = await self._call_patiently(node, method, request, began + deadline_s)
            with self._guard.guarding("memory", host, WireError):
                parsed = await asyncio.to_thread(parse, reply) if is_large else parse(reply)
        except WireError as error:
            self.metrics.failures.labels("data_loss").inc()
            self.distrust(host, "malformed", str(error))
            raise ExpertError(StatusCode.DATA_LOSS, str(error)) from error
        except ExpertError as error:
            self.metrics.failures.labels(error.status.name.lower()).inc()
            quickly = error.status in _QUICK and _now() - began < deadline_s / 2
            self.breakers.failed(host, _now(), quickly=quickly)
            if error.status is StatusCode.DEADLINE_EXCEEDED:
                pace.note(host, _now() - began, _now(), is_finished=False)
            logger.debug(
                "host %s of memory %s: %s: %s", host, self.directory.memory, error.status.name, error
            )
            raise
        except asyncio.CancelledError:
            pace.note(host, _now() - began, _now(), is_finished=False)
            raise
        pace.note(host, _now() - began, _now(), is_finished=True)
        if has_any(parsed):
            self.breakers.succeeded(host)
        else:  # it announced something that it does not have
            self.breakers.failed(host, _now(), quickly=True)
        return parsed

    async def _call_patiently(self, node: NodeInfo, method: Method, request: Any, ends: float) -> Any:
        """Tries again, while there is time, if the host is busy. Raises ExpertError."""
        for tries_left in reversed(range(_BUSY_TRIES)):
            try:
                return await self._caller.call(node, method, request, max(ends - _now(), 0.001))
            except ExpertError as error:
                pause_s = (error.retry_after_s or _BUSY_S) * self._rng.uniform(1.0, 1.5)
                if error.status is not StatusCode.RESOURCE_EXHAUSTED or not tries_left:
                    raise
                if _now() + pause_s > ends:
                    raise
            await asyncio.sleep(pause_s)
        raise AssertionError("the last try returns or raises")

    def _pace(self, kind: tuple[Method, bool]) -> _Pace:
        return self._paces.setdefault(kind, _Pace())


class _Search:
    """One search of at most 256 queries."""

    def __init__(
        self, retriever: Retriever, vectors_QD: Vectors, k: int, began: float, deadline_s: float
    ) -> None:
        self.count = len(vectors_QD)
        self.answers: list[Answer] = []
        self._retriever = retriever
        self._vectors_QD = vectors_QD
        self._k = k
        self._began = began
        self._deadline_s = deadline_s
        self._is_large = len(vectors_QD) > _MANY
        self._located: Located
        self._asked: dict[bytes, set[PeerID]] = defaultdict(set)
        """By root, the hosts that were asked."""
        self._wanted: dict[bytes, tuple[ShardInfo, list[int]]] = {}
        """By root, the shards to be searched, and for which queries."""

    async def run(self, scores_QC: Floats, cells: int) -> list[SearchResult]:
        retriever, ends = self._retriever, self._began + self._deadline_s
        self._located = located = await retriever.directory.locate(scores_QC, cells, retriever.avoided())
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
                # the first answers leave time for reading
                part = 1.0 if doubtful else _FIRST_PART
                await self._ask(unasked, findings, self._began + part * self._deadline_s)
            unproven = await self._off_loop(findings.unproven)
            new = findings.liars - doubtful
            for liar in new:
                retriever.distrust(liar, "false", "claimed passages that are not there, or wrong scores")
            if not new:
                if not unproven or _now() >= ends:
                    break
                new = await self._read(unproven, findings, ends) - doubtful
            doubtful |= new
            unasked = self._without_answer(doubtful) if new else set()
        self.answers = [answer for answer in self.answers if answer.host not in findings.liars]
        results = await self._off_loop(partial(self._results, findings))
        retriever.check_later(self)
        return results

    async def check(self, drawn: Sequence[int]) -> None:
        """Asks second replicas for these queries, and finds who left something out. Raises UnreachableError."""
        ends = _now() + self._deadline_s
        wanted: dict[tuple[bytes, PeerID], list[Collection[PeerID]]] = {}
        for answer in self.answers:
            for root in answer.present:
                if set(self._wanted[root][1]) & set(drawn):
                    others = [host for host in self._located.hosts[root] if host != answer.host]
                    wanted[root, answer.host] = [others]
        second: list[Answer] = []

        async def call(host: PeerID, items: list[tuple[bytes, PeerID]]) -> Collection[tuple[bytes, PeerID]]:
            answer = await self._ask_host(host, {root for root, _ in items}, ends, frozenset(drawn))
            second.append(answer)
            return [item for item in items if item[0] in answer.present]

        await self._retriever.spread(wanted, call, ("Search", False), MOST_SHARDS, ends)
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
        """Proves the passages that others should have returned, too."""
        retriever = self._retriever
        # the newest revision may have revoked some: hosts that know it are right to leave them out
        manifest = await retriever.directory.follow()
        by_claim = sorted(suspects.items(), key=lambda item: -item[0][1].score)[:_READ_TO_CHECK]
        findings = Findings(manifest, self._vectors_QD, self._k)
        hosts = self._located.hosts
        places = {
            claim.place: [[claim.host], hosts.get(claim.place.root, ())]
            for (_, claim), _ in by_claim
            if claim.place.root in manifest.by_root
        }

        async def call(host: PeerID, items: list[Place]) -> Collection[Place]:
            found = await retriever.read(items, manifest, self._located.nodes[host], ends)
            findings.prove(found)
            return found.keys()

        await retriever.spread(places, call, ("Read", False), _READ_AT_ONCE, ends)
        for (query, claim), silent in by_claim:
            proven = findings.proven.get(claim.place)
            if proven is None or proven.leaf in manifest.revoked:
                continue
            if not agrees(claim, proven, self._vectors_QD[query]):
                retriever.distrust(
                    claim.host, "false", "claimed a passage that is not there, or a wrong score"
                )
                continue
            for host in silent:
                retriever.distrust(host, "omission", f"left out the passage {proven.leaf.hex()[:16]}")

    async def _ask(self, roots: Collection[bytes], findings: Findings, ends: float) -> None:
        """Asks for the best passages in these shards, each of a host that was not asked before."""
        hosts = {
            root: [[host for host in self._located.hosts.get(root, ()) if host not in self._asked[root]]]
            for root in roots
        }

        async def call(host: PeerID, roots: list[bytes]) -> Collection[bytes]:
            for root in roots:
                self._asked[root].add(host)
            answer = await self._ask_host(host, roots, ends)
            self.answers.append(answer)
            findings.add(answer)
            places = (claim.place for claims in answer.claims.values() for claim in claims)
            findings.prove(self._retriever.kept(places))
            return answer.present

        await self._retriever.spread(hosts, call, ("Search", self._is_large), MOST_SHARDS, ends)

    def _without_answer(self, doubtful: Collection[PeerID]) -> set[bytes]:
        """The shards in which none but these hosts has looked."""
        answered = {root for answer in self.answers if answer.host not in doubtful for root in answer.present}
        return self._wanted.keys() - answered

    async def _ask_host(
        self, host: PeerID, roots: Collection[bytes], ends: float, only: frozenset[int] | None = None
    ) -> Answer:
        """`only`: these queries; None: all."""
        shards, queries = [], []
        for root in roots:
            shard, numbers = self._wanted[root]
            shards.append(shard)
            queries.append(tuple(numbers if only is None else (n for n in numbers if n in only)))
        # a passage may be there twice, in two cells, and hosts may not have heard yet of the last revocations
        spare = min(len(self._located.manifest.revoked), _SPARE)
        ask = Ask(tuple(shards), tuple(queries), min(2 * (self._k + spare), MOST_K))
        return await self._retriever.ask(ask, self._vectors_QD, self._located.nodes[host], ends)

    async def _read(
        self, unproven: Mapping[Place, Collection[PeerID]], findings: Findings, ends: float
    ) -> set[PeerID]:
        """Reads these places. Returns the hosts that claimed something there which nobody gives."""
        located = self._located

        async def call(host: PeerID, places: list[Place]) -> Collection[Place]:
            found = await self._retriever.read(places, located.manifest, located.nodes[host], ends)
            findings.prove(found)
            return found.keys()

        hosts = {
            place: [claimants, located.hosts.get(place.root, ())] for place, claimants in unproven.items()
        }
        kind: tuple[Method, bool] = ("Read", len(hosts) > _MANY)
        given_up = await self._retriever.spread(hosts, call, kind, _READ_AT_ONCE, ends)
        findings.give_up(given_up)
        return set[PeerID]().union(*(unproven[place] for place in given_up))

    def _results(self, findings: Findings) -> list[SearchResult]:
        memory = self._retriever.directory.memory
        answered = {root for answer in self.answers for root in answer.present}
        by_cell = self._located.manifest.by_cell
        results = []
        for query, vector_D in enumerate(self._vectors_QD):
            whole = float(vector_D.astype(np.int64) @ vector_D.astype(np.int64))
            hits = tuple(
                Hit(proven.passage, score / whole, memory, proven.leaf, proven.reader)
                for score, proven in findings.results(query)
            )
            missing = [
                cell
                for cell in self._located.cells[query]
                if any(shard.root not in answered for shard in by_cell.get(cell, ()))
            ]
            results.append(SearchResult(hits, missing=(*self._located.missing[query], *missing)))
        return results

    async def _off_loop(self, function: Callable[[], T]) -> T:
        return await asyncio.to_thread(function) if self._is_large else function()


async def _tolerate(call: Awaitable[Collection[H]]) -> Collection[H]:
    """Nothing, if the call fails."""
    try:
        return await call
    except ExpertError:
        return ()


def check_query(texts: Sequence[str], k: int, cells: int) -> None:
    """Raises DataError unless such a search can be made."""
    if not 1 <= k <= MOST_WANTED:
        raise DataError(f"{k} passages were asked for: ask for 1 to {MOST_WANTED}")
    if cells < 1:
        raise DataError(f"{cells} cells were asked for: at least 1 is searched")
    longest = max(map(len, texts), default=0)
    if longest > MOST_CHARACTERS:
        raise DataError(f"a question of {longest} characters: shorten it to {MOST_CHARACTERS}")


def _now() -> float:
    return asyncio.get_running_loop().time()
