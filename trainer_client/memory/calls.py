"""Calls to the hosts of a memory: which host to call, when to try another one, and what happens to hosts that fail.

If a host fails or is late, another one is called. Hosts that fail several times, and hosts that lie, are avoided for a
while.
"""

import asyncio
import logging
import random
from collections import defaultdict
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Hashable,
    Iterable,
    Mapping,
    Sequence,
    Set,
)
from dataclasses import dataclass
from heapq import heapify, heappop, heapreplace
from typing import Any, Literal, Protocol, TypeVar

import grpc
from grpc import StatusCode
from prometheus_client import CollectorRegistry, Counter, Histogram

from dht.announcements import NodeInfo
from dht.memory import MAX_QUERIES, MAX_TEXT_CHARACTERS
from peer.bounded import BoundedDict
from peer.errors import ExpertError, UnreachableError, WireError
from peer.formatting import printable
from peer.identity import PeerID
from peer.loop import TimeSlices, cancel_all
from peer.metrics import SECONDS, start_at_zero
from peer.parsing import ParseGuard
from peer.rpc.calls import MOST_PARTS, make_stub, retry_after_s, while_open
from peer.rpc.channels import ChannelPool
from peer.rpc.sessions import SessionClient
from peer.wire import memory_pb2, memory_pb2_grpc
from trainer_client.credit import CreditAccounts
from trainer_client.dispatch.policy import CallTimes, CircuitBreakers, WaitPolicy

logger: logging.Logger = logging.getLogger(__name__)

T = TypeVar("T")
H = TypeVar("H", bound=Hashable)
Method = Literal["Search", "Read"]
Kind = tuple[Method, bool]
"""A kind of call: a method, and whether it is for many queries or passages. Calls of one kind take about equally long.
"""
Fault = Literal["malformed", "false", "omission"]

_CALL_DEADLINE_S = 5.0
_LEAST_DEADLINE_S = 1.0
MANY = 16
"""Answers with more queries or passages than this are parsed and merged on a thread."""
_SLOWER, _SLOWER_BY_S = 3.0, 0.05
"""A host is skipped if it takes this many times as long as the fastest replica, and this much longer."""
_HANGING = 4.0
"""The duration of a call that was given up is multiplied by this."""
_SLOW_FOR_S = 60.0
"""How long the speed of a host is remembered."""
_HOSTS = 4096
_AHEAD_S = 900.0
"""How long to believe a host that says passages were revoked, if the publisher's list does not say so. Everybody reads
the list at least every few minutes.
"""
_QUICK = {StatusCode.UNAVAILABLE, StatusCode.NOT_FOUND}
"""Failures that cost little time. A few of these are forgiven."""
_BUSY_TRIES = 3
_FOUND_BYTES = 64
"""The limit for one found passage, and for the overhead of one query."""
_PASSAGE_BYTES = 4 * MAX_TEXT_CHARACTERS + 8192
"""The limit for a passage with its title, source, licence, vector and proof."""


class MemoryCaller(Protocol):
    """Calls hosts."""

    async def call(self, node: NodeInfo, method: Method, request: Any, deadline_s: float) -> Any:
        """The reply. Raises ExpertError."""


class GrpcMemoryCaller:
    """Calls hosts over pinned TLS channels."""

    def __init__(self, channels: ChannelPool, sessions: SessionClient) -> None:
        """`sessions`: with RIGHT_MEMORY."""
        self._channels = channels
        self._sessions = sessions

    async def call(self, node: NodeInfo, method: Method, request: Any, deadline_s: float) -> Any:
        ends = loop_time() + deadline_s
        try:
            async with asyncio.timeout(deadline_s):
                with while_open():
                    channel = await self._channels.reach(node)
                    for may_repeat in (True, False):
                        session = await self._sessions.metadata(
                            node.peer_id, channel, max(ends - loop_time(), 0.001)
                        )
                        stub = make_stub(
                            memory_pb2_grpc.MemoryServiceStub,
                            channel,
                            most_bytes=most_bytes(request),
                            most_parts=most_parts(request),
                        )
                        try:
                            return await getattr(stub, method)(
                                request, timeout=max(ends - loop_time(), 0.001), metadata=session
                            )
                        except grpc.aio.AioRpcError as error:
                            if error.code() is not StatusCode.UNAUTHENTICATED or not may_repeat:
                                raise
                        self._sessions.ended(node.peer_id, session)
        except UnreachableError as error:
            raise ExpertError(StatusCode.UNAVAILABLE, str(error)) from error
        except TimeoutError as error:
            raise ExpertError(StatusCode.DEADLINE_EXCEEDED, f"no answer within {deadline_s:.1f} s") from error
        except grpc.aio.AioRpcError as error:
            retry_s = retry_after_s(error.trailing_metadata(), 0.0)
            raise ExpertError(error.code(), printable(error.details() or ""), retry_s) from error
        raise AssertionError("the second try returns or raises")


def most_bytes(request: memory_pb2.SearchRequest | memory_pb2.ReadRequest) -> int:
    """The limit for the size of an honest answer."""
    if isinstance(request, memory_pb2.ReadRequest):
        return sum(_PASSAGE_BYTES * len(shard.positions) for shard in request.shards)
    return _most_queries(request) * (_FOUND_BYTES * request.k + _FOUND_BYTES) + 8 * len(request.shards)


def most_parts(request: memory_pb2.SearchRequest | memory_pb2.ReadRequest) -> int:
    """The limit for the parts of an honest answer. Each query has an answer, and each passage that was found may have
    its text in another shard, which is named.
    """
    if isinstance(request, memory_pb2.ReadRequest):
        return MOST_PARTS
    return _most_queries(request) * (1 + request.k) + len(request.shards)


def _most_queries(request: memory_pb2.SearchRequest) -> int:
    return min(MAX_QUERIES, len(request.vectors))  # assuming one dimension, the fewest


class RetrieverMetrics:
    """What one peer counts about its searches."""

    def __init__(self, metrics: CollectorRegistry | None = None) -> None:
        def counter(name: str, description: str, *labels: str) -> Counter:
            return Counter(f"talkoot_retriever_{name}", description, labels, registry=metrics)

        self.queries: Counter = counter("queries", "Queries to memories.")
        self.seconds: Histogram = Histogram(
            "talkoot_retriever_seconds",
            "Duration of a search, which may be of many queries.",
            buckets=SECONDS,
            registry=metrics,
        )
        self.calls: Counter = counter("calls", "Calls to hosts of memories, by method.", "method")
        start_at_zero(self.calls, "Search", "Read")
        self.failures: Counter = counter("failures", "Calls to hosts that failed, by gRPC status.", "cause")
        self.hedged_calls: Counter = counter(
            "hedged_calls", "Calls whose shards were asked from another replica, too."
        )
        self.lies: Counter = counter("lies", "Answers of hosts that were not true.", "kind")
        start_at_zero(self.lies, "malformed", "false", "omission")
        self.checks: Counter = counter("checks", "Queries of which a second replica was asked.")


async def choose_hosts(
    offers: Mapping[PeerID, Set[H]], rng: random.Random, slices: TimeSlices
) -> AsyncIterator[tuple[PeerID, Set[H]]]:
    """A few hosts that together have all that is offered, and what to ask each for. The host with the most of what is
    left comes first; among equals, the order is random.
    """
    left, given = dict(offers), set[H]()
    most = [(-len(items), rng.random(), number, host) for number, (host, items) in enumerate(offers.items())]
    heapify(most)
    while most:
        await slices.pause()
        count, draw, number, host = most[0]
        items = left[host] = left[host] - given
        # counts only fall, so only the host that seemed to have the most is counted again
        if items and len(items) < -count:
            heapreplace(most, (-len(items), draw, number, host))
            continue
        heappop(most)
        if items:
            given |= items
            yield host, items


async def quick_offers(
    offers: Sequence[Mapping[PeerID, Set[H]]], times_s: Mapping[PeerID, float], slices: TimeSlices
) -> dict[PeerID, Set[H]]:
    """What each host may be asked for: nothing that a much quicker host has too. An item that several mappings offer is
    only asked from hosts of the first. `times_s`: the hosts' recent durations, if known.
    """
    left, by_time = [dict(some) for some in offers], sorted(times_s, key=times_s.__getitem__)
    much_quicker, theirs = 0, set[H]()
    for host in by_time:
        while times_s[host] > _SLOWER * times_s[by_time[much_quicker]] + _SLOWER_BY_S:
            theirs.update(*(some.get(by_time[much_quicker], ()) for some in offers))
            much_quicker += 1
        for some in left if theirs else ():
            if host in some:
                some[host] = some[host] - theirs
        await slices.pause()
    quick, before = dict[PeerID, Set[H]](), set[H]()
    for some in left:
        here = set[H]()
        for host, items in some.items():
            quick[host] = quick.get(host, frozenset()) | items - before
            here |= items
            await slices.pause()
        before |= here
    return quick


class _Pace:
    """The recent durations of calls of one kind."""

    def __init__(self) -> None:
        self.calls = CallTimes()
        self._hosts = BoundedDict[PeerID, tuple[float, float]](_HOSTS)
        """For each host, a duration in seconds, and when it was measured."""

    def note(self, host: PeerID, seconds: float, now: float, *, is_finished: bool) -> None:
        if is_finished:
            self.calls.add(seconds)
        else:
            self.calls.add_unfinished(seconds)
        before = self.of({host}, now).get(host, seconds)
        # a single call that hangs is enough for the host to be skipped for a while
        self._hosts[host] = (before + seconds) / 2 if is_finished else max(before, _HANGING * seconds), now

    def of(self, hosts: Collection[PeerID], now: float) -> dict[PeerID, float]:
        """The recent durations of these hosts, in seconds, if known."""
        known = {host: self._hosts[host] for host in hosts if host in self._hosts}
        return {host: seconds for host, (seconds, at) in known.items() if now - at < _SLOW_FOR_S}


class RevisionClaims:
    """Remembers which hosts claim that a later revision, which is not known here, revokes a passage."""

    def __init__(self) -> None:
        self._first = BoundedDict[tuple[str, PeerID], tuple[int, float]](_HOSTS)
        """For each memory and host, the revision known here when the host first claimed this, and the time."""

    def may_be_true(self, memory: str, host: PeerID, revision: int, now: float) -> bool:
        """Records such a claim. Returns False if the publisher's list would have shown the revision by now."""
        known, since = self._first.get((memory, host), (0, 0.0))
        if known != revision:
            self._first[memory, host] = revision, now
        return known != revision or now - since < _AHEAD_S


@dataclass
class _Sent:
    """A call in progress."""

    items: list[Any]
    late_at: float
    is_late: bool = False


class HostCalls:
    """The calls of searches in one memory."""

    def __init__(
        self,
        caller: MemoryCaller,
        memory: str,
        *,
        guard: ParseGuard | None = None,
        metrics: RetrieverMetrics | None = None,
        rng: random.Random | None = None,
        credit: CreditAccounts | None = None,
        claims: RevisionClaims | None = None,
    ) -> None:
        """`memory`: its id. `guard`: the process's. `credit`: records the hosts' work. `claims`: earlier claims of
        later revisions.
        """
        self.metrics: RetrieverMetrics = metrics or RetrieverMetrics()
        self.credit: CreditAccounts = credit or CreditAccounts()
        self.breakers: CircuitBreakers = CircuitBreakers()
        self.checks: int = 0
        """The number of queries that a second replica has also answered."""
        self.faulty: BoundedDict[PeerID, Fault] = BoundedDict(_HOSTS)
        """Each host's last fault, of those that no honest host commits."""
        self._claims = claims or RevisionClaims()
        self._caller = caller
        self._memory = memory
        self._guard = guard or ParseGuard()
        self._rng = rng or random.SystemRandom()
        self._policy = WaitPolicy(_CALL_DEADLINE_S, 0.0, 1, _LEAST_DEADLINE_S)
        self._paces: dict[Kind, _Pace] = {}

    def avoided(self) -> frozenset[PeerID]:
        """The hosts not to call now."""
        return self.breakers.open_at(loop_time())

    def distrust(self, host: PeerID, fault: Fault, said: str) -> None:
        """Avoids the host for a while, because it gave an answer that no honest host gives."""
        self.faulty[host] = fault
        if host not in self.avoided():
            self.metrics.lies.labels(fault).inc()
            logger.warning("host %s of memory %s: %s: banned for a while", host, self._memory, said)
        self.breakers.distrust(host, loop_time())

    def may_be_ahead(self, host: PeerID, revision: int) -> bool:
        """Records that the host claims to know a later revision than this one. Returns whether that may be true."""
        return self._claims.may_be_true(self._memory, host, revision, loop_time())

    def note_checks(self, queries: int) -> None:
        """Counts queries that a second replica has also answered."""
        self.checks += queries
        self.metrics.checks.inc(queries)

    async def call(
        self,
        node: NodeInfo,
        method: Method,
        request: Any,
        is_large: bool,
        parse: Callable[[Any], T],
        has_any: Callable[[T], bool],
        ends: float,
    ) -> T:
        """Calls a host, and records how long that took and whether it was answered.

        `is_large`: whether to parse on a thread, and which calls its time is compared with: see `Kind`. `parse`: reads
        the reply, and raises WireError if no honest host gives it; the host is then distrusted. `has_any`: whether the
        host gave anything; if not, that counts as a failure. `ends`: when to give up, by the loop's clock. Raises
        ExpertError.
        """
        host, pace, began = node.peer_id, self._pace((method, is_large)), loop_time()
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
            quickly = error.status in _QUICK and loop_time() - began < deadline_s / 2
            self.breakers.failed(host, loop_time(), quickly=quickly)
            if error.status is StatusCode.DEADLINE_EXCEEDED:
                pace.note(host, loop_time() - began, loop_time(), is_finished=False)
            logger.debug("host %s of memory %s: %s: %s", host, self._memory, error.status.name, error)
            raise
        except asyncio.CancelledError:
            pace.note(host, loop_time() - began, loop_time(), is_finished=False)
            raise
        pace.note(host, loop_time() - began, loop_time(), is_finished=True)
        if has_any(parsed):
            self.breakers.succeeded(host)
        else:  # it announced something that it does not have
            self.breakers.failed(host, loop_time(), quickly=True)
        return parsed

    async def _call_patiently(self, node: NodeInfo, method: Method, request: Any, ends: float) -> Any:
        """Repeats the call, while there is time, if the host is busy. Raises ExpertError."""
        for tries_left in reversed(range(_BUSY_TRIES)):
            try:
                return await self._caller.call(node, method, request, max(ends - loop_time(), 0.001))
            except ExpertError as error:
                pause_s = error.retry_after_s * self._rng.uniform(1.0, 1.5)
                # without a time to retry, its answer may be too large
                if error.status is not StatusCode.RESOURCE_EXHAUSTED or not pause_s or not tries_left:
                    raise
                if loop_time() + pause_s > ends:
                    raise
            await asyncio.sleep(pause_s)
        raise AssertionError("the last try returns or raises")

    def _pace(self, kind: Kind) -> _Pace:
        return self._paces.setdefault(kind, _Pace())

    async def spread(
        self,
        wanted: Collection[H],
        offers: Sequence[Mapping[PeerID, Set[H]]],
        call: Callable[[PeerID, list[H]], Awaitable[Collection[H]]],
        kind: Kind,
        split: Callable[[list[H]], Iterable[list[H]]],
        ends: float,
    ) -> set[H]:
        """Gets each item from one of its hosts. If that host fails, asks another one; if it is late, asks both.

        `offers`: what each host has. An item's hosts in the first mapping are asked first. `call` returns the items
        that it got. `split`: divides what goes to one host into calls. Returns the items that no host gave.
        """
        pace, slices = self._pace(kind), TimeSlices()
        place = {item: number for number, item in enumerate(wanted)}
        tried = defaultdict[PeerID, set[H]](set)
        left = set(wanted)
        sent: dict[asyncio.Task[Collection[H]], _Sent] = {}

        async def send(items: Set[H]) -> None:
            """Strangers may say that they have everything. So whatever looks at all hosts works with sets of items, and
            lets other tasks run in between.
            """
            avoided, able = self.avoided(), list[dict[PeerID, Set[H]]]()
            for some in offers:
                able.append({})
                for host, having in some.items():
                    if host not in avoided and (free := (having & items) - tried[host]):
                        able[-1][host] = free
                    await slices.pause()
            times_s = pace.of({host for some in able for host in some}, loop_time())
            hedge_after_s = self._policy.hedge_after_s(pace.calls)
            quick = await quick_offers(able, times_s, slices)
            async for host, group in choose_hosts(quick, self._rng, slices):
                parts = list(split(sorted(group, key=place.__getitem__)))
                # the host may compute them one after another
                late_at = loop_time() + len(parts) * hedge_after_s
                tried[host] |= group
                for part in parts:
                    sent[asyncio.create_task(_tolerate(call, host, part))] = _Sent(part, late_at)

        try:
            await send(left)
            while left and sent and (time := loop_time()) < ends:
                due = min((s.late_at for s in sent.values() if not s.is_late), default=ends)
                done, _ = await asyncio.wait(
                    sent, timeout=max(0.0, min(due, ends) - time), return_when=asyncio.FIRST_COMPLETED
                )
                again = set[H]()
                for task in done:
                    again.update(sent.pop(task).items)
                    left.difference_update(task.result())
                await send(again & left)
                late = [s for s in sent.values() if not s.is_late and s.late_at <= loop_time()]
                under_way = len(sent)
                await send(left.intersection(item for s in late for item in s.items))
                self.metrics.hedged_calls.inc(len(sent) - under_way)
                for s in late:
                    s.is_late = True
        finally:
            await cancel_all(sent)
        return left


async def _tolerate(
    call: Callable[[PeerID, list[H]], Awaitable[Collection[H]]], host: PeerID, items: list[H]
) -> Collection[H]:
    """The result of a call; empty if it fails."""
    try:
        return await call(host, items)
    except ExpertError:
        return ()


def loop_time() -> float:
    """The time by the loop's clock."""
    return asyncio.get_running_loop().time()
