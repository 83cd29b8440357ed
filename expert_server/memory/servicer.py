"""MemoryService: retrievers search and read the shards of memories here, and other hosts fetch them.

Search and Read compute on separate threads, a few calls at a time. Callers share the time and the waiting places.
The cost of a call is bounded before any of it is computed.
"""

import asyncio
import errno
import logging
import time
from collections.abc import AsyncIterator, Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TypeVar

import grpc
import numpy as np
import torch
from grpc import StatusCode
from prometheus_client import CollectorRegistry, Counter, Histogram

from dht.memory import MAX_K, MAX_QUERIES, MAX_READ, MAX_SCORES, MAX_SEARCHED, MAX_SHARD_BYTES, Vectors
from dht.receipts import Work
from expert_server.memory.search import Best, ShardGroup, VectorCache, search_together
from expert_server.memory.shard import Shard
from expert_server.memory.store import MemoryStore
from peer.bounded import Owner
from peer.budget import FairBudget, interruptible
from peer.errors import ExpertError, WireError
from peer.identity import PeerID
from peer.merkle import HASH_BYTES
from peer.metrics import SECONDS, start_at_zero
from peer.rates import RateLimit, RecentUse
from peer.rpc.calls import abort_on_error, require_same_swarm
from peer.rpc.sessions import Sessions
from peer.rpc.transfer import TransferSlots, send
from peer.wire import memory_pb2, memory_pb2_grpc, session_pb2, state_pb2

logger: logging.Logger = logging.getLogger(__name__)

M = TypeVar("M")
T = TypeVar("T")

_MAX_WAITING = 128
"""Calls that wait or compute, or whose replies were not read yet, over all callers."""
_HALF_S = 10.0
"""After this time, what a caller has used counts half."""
_READ_COST = 2**13
"""Reading a passage takes about as long as this many inner products."""
_MAX_CALL_S = 30.0
_MAX_TRANSFERS, _MAX_TRANSFER_S = 8, 600.0
_TOO_MANY = "others wait to search too, and more than your share of the places were yours: try again soon"


class MemoryMetrics:
    """What a host of memories counts."""

    def __init__(self, metrics: CollectorRegistry | None = None) -> None:
        self.queries: Counter = Counter(
            "talkoot_memory_queries",
            "Queries of memories answered, each once for each call.",
            registry=metrics,
        )
        calls = Counter(
            "talkoot_memory_calls",
            "Calls to search or read memories, by outcome.",
            ["outcome"],
            registry=metrics,
        )
        self.calls: Counter = start_at_zero(calls, "answered", "refused")
        self.seconds: Histogram = Histogram(
            "talkoot_memory_search_seconds",
            "Time to compute the answer to a search, which may be for many queries.",
            buckets=SECONDS,
            registry=metrics,
        )
        size = Counter(
            "talkoot_memory_transferred_bytes",
            "Bytes of shards and other parts of memories, to and from others.",
            ["direction"],
            registry=metrics,
        )
        self.bytes: Counter = start_at_zero(size, "sent", "received")


class ComputeTurns:
    """Lets a few calls compute at a time. For one event loop.

    Of the waiting calls, the next one is that with the least cost, to which is added what its group of callers has used
    lately; within the group, what its caller has used. So a cheap call hardly waits for costly ones, from however many
    neighbourhoods they come, and groups that always have calls waiting get about the same in sum.

    A call keeps its place until its task ends, because unread replies take memory, too. If all places are taken, a new
    call may get a place from the caller with the most (`FairBudget`). The displaced call is refused.
    """

    def __init__(self, at_once: int, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        """`most`: calls that wait, compute, or have an unread reply."""
        self._free = at_once
        self._places = FairBudget(most)
        self._clock = clock
        self._used = RecentUse[Hashable](_HALF_S)
        """By groups and by callers."""
        self._waiting: dict[asyncio.Future[None], tuple[Owner, int]] = {}
        """The caller and the cost of each waiting call, the oldest first."""

    def __len__(self) -> int:
        """The number of waiting calls."""
        return len(self._waiting)

    @contextmanager
    def place(self, caller: Owner) -> Iterator[None]:
        """Takes a place until the current task ends. Raises ExpertError (RESOURCE_EXHAUSTED), also if others need the
        place before the end of the block. If they need it later, the task is cancelled.
        """
        task = asyncio.current_task()
        assert task is not None, "calls are answered in tasks"
        with interruptible(_TOO_MANY) as interrupt:
            place = self._places.reserve(caller, 1, interrupt)
            task.add_done_callback(lambda _: place.release())
            yield

    @asynccontextmanager
    async def turn(self, caller: Owner, cost: int) -> AsyncIterator[None]:
        """Waits for a turn. `cost`: in inner products. The caller must have a place."""
        await self._wait(caller, cost)
        try:
            yield
        finally:
            self._free += 1
            self._next()

    async def _wait(self, caller: Owner, cost: int) -> None:
        turn = asyncio.get_running_loop().create_future()
        self._waiting[turn] = caller, cost
        self._next()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._waiting.pop(turn, None)
            else:  # its turn came at the same moment
                self._free += 1
                self._next()
            raise

    def _next(self) -> None:
        while self._free and self._waiting:
            turn = min(self._waiting, key=self._rank)
            caller, cost = self._waiting.pop(turn)
            if not turn.cancelled():
                self._free -= 1
                for key in (caller.group, caller):
                    self._used.add(key, cost, self._clock())
                turn.set_result(None)

    def _rank(self, turn: asyncio.Future[None]) -> tuple[float, float]:
        (caller, cost), now = self._waiting[turn], self._clock()
        return cost + self._used.of(caller.group, now), cost + self._used.of(caller, now)


SearchContext = grpc.aio.ServicerContext[memory_pb2.SearchRequest, memory_pb2.SearchReply]
ReadContext = grpc.aio.ServicerContext[memory_pb2.ReadRequest, memory_pb2.ReadReply]
FetchContext = grpc.aio.ServicerContext[memory_pb2.FetchPartRequest, state_pb2.FetchReply]


class MemoryServicer(memory_pb2_grpc.MemoryServiceServicer):
    """Serves the memories that one peer hosts to one swarm. Close it when done."""

    def __init__(
        self,
        stores: Mapping[str, MemoryStore],
        swarm_id: str,
        sessions: Sessions,
        up: RateLimit,
        metrics: MemoryMetrics,
        threads: int,
        note_served: Callable[[PeerID, Work], None] = lambda caller, work: None,
        hear: Callable[[PeerID, str, bytes], None] = lambda caller, memory, record: None,
    ) -> None:
        """`stores`: by memory; the host may change it. `sessions`: who may call. `up`: limits the upload of answers.

        `threads`: calls that compute at the same time. `note_served` is called for callers whose searches are answered.

        `hear`: called with the publishers' records that callers show, and for which memory.
        """
        self.metrics = metrics
        self._stores = stores
        self._swarm_id = swarm_id
        self._sessions = sessions
        self._up = up
        self._note_served = note_served
        self._hear = hear
        self._turns = ComputeTurns(threads, _MAX_WAITING)
        self._vectors = VectorCache()
        self._slots = TransferSlots(_MAX_TRANSFERS)
        # one core for each call: on a busy machine, torch's threads would wait for one another
        self._pool = ThreadPoolExecutor(threads, "memory", initializer=partial(torch.set_num_threads, 1))

    async def close(self) -> None:
        await asyncio.to_thread(self._pool.shutdown)

    async def Search(
        self, request: memory_pb2.SearchRequest, context: SearchContext
    ) -> memory_pb2.SearchReply:
        async with self._answering(context):
            session = self._sessions.require(context, session_pb2.RIGHT_MEMORY)
            store = self._store(request)
            queries = _vectors(request, store.manifest.dimensions)
            served = store.shards
            shards = [served.get(root) for root in _roots(request)]
            groups, cost = _groups(request, shards, len(queries))
            work = partial(self._search, queries, request.k, shards, groups)
            with self._turns.place(session.owner):
                reply = await self._compute(session.owner, cost, store, work)
                reply.missing.extend(number for number, shard in enumerate(shards) if shard is None)
                self.metrics.queries.inc(len(queries))
                self._note_served(session.caller, Work(queries=len(queries)))
                await self._up.take(reply.ByteSize())
            return reply
        raise AssertionError("abort raises")

    async def Read(self, request: memory_pb2.ReadRequest, context: ReadContext) -> memory_pb2.ReadReply:
        async with self._answering(context):
            caller = self._sessions.require(context, session_pb2.RIGHT_MEMORY).owner
            store = self._store(request)
            if len(request.shards) > MAX_READ or sum(len(s.positions) for s in request.shards) > MAX_READ:
                raise WireError(f"more than {MAX_READ} passages: read fewer at once")
            reads = []
            for number, wanted in enumerate(request.shards):
                shard = store.shards.get(_root(wanted.root))
                if shard is None:
                    continue
                if max(wanted.positions, default=0) >= len(shard):
                    raise WireError(f"there is no such passage: the shard has {len(shard)}")
                reads.append((number, shard, list(wanted.positions)))
            cost = _READ_COST * sum(len(positions) for _, _, positions in reads)
            with self._turns.place(caller):
                reply = await self._compute(caller, cost, store, partial(_read, reads))
                await self._up.take(reply.ByteSize())
            return reply
        raise AssertionError("abort raises")

    async def FetchPart(self, request: memory_pb2.FetchPartRequest, context: FetchContext) -> None:
        async with abort_on_error(context, _MAX_TRANSFER_S, "the part was not read in time"):
            session = self._sessions.require(context, session_pb2.RIGHT_MEMORY)
            store, name = self._store(request), _root(request.name)
            if request.library:
                self._hear(session.caller, request.memory, request.library)
            if request.offset and not request.sha256:
                raise WireError("an offset needs the checksum of its file")
            with self._slots.taken(session.owner, MAX_SHARD_BYTES):
                try:
                    data, sha256 = await asyncio.to_thread(store.file, name)
                except OSError as error:
                    raise ExpertError(StatusCode.NOT_FOUND, "this node does not have that part") from error
                if request.sha256 not in (b"", sha256):
                    raise ExpertError(
                        StatusCode.FAILED_PRECONDITION, "that file is no longer kept: start again without one"
                    )
                header = state_pb2.StateHeader(total_bytes=len(data), sha256=sha256)
                count = self.metrics.bytes.labels("sent").inc
                try:
                    await send(context, header, data, request.offset, self._up, count)
                except TimeoutError:  # caught first, because it is an OSError too
                    raise
                except OSError as error:
                    raise _unreadable(store, error) from error

    @asynccontextmanager
    async def _answering(self, context: grpc.aio.ServicerContext[T, M]) -> AsyncIterator[None]:
        remaining_s = context.time_remaining()
        longest_s = _MAX_CALL_S if remaining_s is None else min(_MAX_CALL_S, remaining_s)
        outcome = "refused"
        try:
            async with abort_on_error(context, longest_s, f"the call lasted longer than {longest_s:.1f} s"):
                yield
                outcome = "answered"
        finally:
            self.metrics.calls.labels(outcome).inc()

    def _store(
        self, request: memory_pb2.SearchRequest | memory_pb2.ReadRequest | memory_pb2.FetchPartRequest
    ) -> MemoryStore:
        """Raises ExpertError."""
        require_same_swarm(self._swarm_id, request.protocol_version, request.swarm_id)
        store = self._stores.get(request.memory)
        if store is None:
            raise ExpertError(StatusCode.NOT_FOUND, f"memory {request.memory[:64]!r} is not hosted here")
        return store

    async def _compute(
        self, caller: Owner, cost: int, store: MemoryStore, work: Callable[[Callable[[], bool]], T]
    ) -> T:
        """Runs `work` on a thread and returns its result. `work` itself checks whether the call has been given up, and
        then ends.
        """
        is_given_up = False
        async with self._turns.turn(caller, cost):
            try:
                return await asyncio.get_running_loop().run_in_executor(self._pool, work, lambda: is_given_up)
            except OSError as error:
                raise _unreadable(store, error) from error
            finally:
                is_given_up = True

    def _search(
        self,
        queries: Vectors,
        k: int,
        shards: Sequence[Shard | None],
        groups: Sequence[ShardGroup],
        is_given_up: Callable[[], bool],
    ) -> memory_pb2.SearchReply:
        began = time.monotonic()
        best = Best(len(queries), k)
        for some in chain.from_iterable(group.parts() for group in groups):
            if is_given_up():
                break
            numbers, positions, scores = search_together(some.shards, queries[some.queries], k, self._vectors)
            best.add(some.queries, np.array(some.numbers)[numbers], positions, scores)
        reply = best.reply(shards)
        self.metrics.seconds.observe(time.monotonic() - began)
        return reply


def _unreadable(store: MemoryStore, error: OSError) -> ExpertError:
    """The error for a caller if a file can't be read. Its shard is no longer served, so that it is fetched again."""
    if error.errno == errno.ESTALE:  # a passage in it was revoked at this moment
        return ExpertError(StatusCode.UNAVAILABLE, "the shard has changed: ask again")
    logger.warning("can't read %s: %s", error.filename, error.strerror)
    for root in [root for root in store.shards if root.hex() == Path(str(error.filename)).name]:
        store.stop_serving(root)
    return ExpertError(StatusCode.DATA_LOSS, "this copy can't be read")


def _root(data: bytes) -> bytes:
    """Raises WireError."""
    if len(data) != HASH_BYTES:
        raise WireError(f"a part is named by {HASH_BYTES} bytes, not by {len(data)}")
    return data


def _roots(request: memory_pb2.SearchRequest) -> list[bytes]:
    """The shards of a request. Raises WireError."""
    roots = [wanted.root for wanted in request.shards]
    if len(set(roots)) < len(roots):
        raise WireError("a shard is named twice")
    return [_root(root) for root in roots]


def _vectors(request: memory_pb2.SearchRequest, dimensions: int) -> Vectors:
    """The queries of a request, (Q, D). Raises WireError if it asks for too much."""
    count, rest = divmod(len(request.vectors), dimensions)
    if rest or not 1 <= count <= MAX_QUERIES:
        raise WireError(
            f"the queries have {len(request.vectors)} bytes: ask 1 to {MAX_QUERIES} at once, of {dimensions} bytes each"
        )
    if not 1 <= request.k <= MAX_K:
        raise WireError(f"{request.k} passages were asked for: ask for 1 to {MAX_K} for each query")
    if not 1 <= len(request.shards) <= MAX_SEARCHED:
        raise WireError(f"{len(request.shards)} shards were asked for: search 1 to {MAX_SEARCHED} at once")
    return np.frombuffer(request.vectors, np.int8).reshape(count, dimensions)


def _groups(
    request: memory_pb2.SearchRequest, shards: Sequence[Shard | None], queries: int
) -> tuple[list[ShardGroup], int]:
    """The groups, and what searching all of them costs. Raises WireError if the request is invalid, or asks for too
    much.
    """
    groups: dict[tuple[int, ...], ShardGroup] = {(): ShardGroup(np.arange(queries))}
    for number, (wanted, shard) in enumerate(zip(request.shards, shards, strict=True)):
        asked = wanted.queries
        if len(asked) > queries:  # checked before arrays are made from them
            raise WireError("a query is named twice")
        named = tuple(asked)
        group = groups.get(named)
        if group is None:
            if max(named) >= queries or len(set(named)) < len(named):
                raise WireError("a query is named twice, or is not in the request")
            group = groups[named] = ShardGroup(np.array(named, np.intp))
        if shard is not None:
            group.numbers.append(number)
            group.shards.append(shard)
    cost = sum(group.cost for group in groups.values())
    if cost > MAX_SCORES:
        raise WireError(f"this search compares {cost} passages, more than {MAX_SCORES}: ask for less at once")
    return [group for group in groups.values() if group.shards], cost


def _read(
    reads: Sequence[tuple[int, Shard, list[int]]], is_given_up: Callable[[], bool]
) -> memory_pb2.ReadReply:
    reply = memory_pb2.ReadReply()
    for number, shard, positions in reads:
        if is_given_up():
            break
        try:
            entries = shard.read(positions)
        except WireError as error:  # the shard was whole when it was loaded
            raise ExpertError(StatusCode.DATA_LOSS, f"this copy was damaged: {error}") from error
        reply.passages.extend(entry.message(number) for entry in entries)
    return reply
