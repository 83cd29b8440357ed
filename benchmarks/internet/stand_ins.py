"""A world in which the product's code runs, and stand-ins for the parts that a simulation replaces.

Experts are only counted: `CountedExpert` takes updates but computes nothing. When one node has parsed a record, the
others reuse the result.
"""

import asyncio
import functools
import gc
import operator
import random
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, TypeVar
from unittest.mock import patch

from benchmarks.internet.dht_model import StoredRecord
from benchmarks.internet.world import World
from benchmarks.simulated_p2p import EPOCH, simulated_world
from dht import announcements
from dht.announcements import Replica
from dht.experts import ExpertRegistry
from dht.manifest import Manifest
from dht.records import parse_peer_id
from dht.regions import Prefix, Region
from dht.registry import Entries, Registry, active_under
from dht.uid import UID
from expert_server.experts.format import Checkpoint
from expert_server.experts.reports import UpdateReports
from expert_server.hosting.manager import Handover
from expert_server.hosting.replicas import LocalReplicas
from expert_server.state.checkpoints import MAX_GIVEN_UP
from peer.averaging import AveragingHistory
from peer.errors import UnreachableError
from peer.identity import PeerID
from peer.kademlia.routing import key_id_of
from peer.kademlia.search import DEFAULT_LIMITS, SearchLimits
from peer.kademlia.validation import MAX_KEY_BYTES
from peer.loop import TimeSlices
from peer.wire import records_pb2

T = TypeVar("T")

_key_id_of = functools.lru_cache(maxsize=1 << 18)(key_id_of)
SIGNED_BYTES = 103
"""What a short payload grows by when it is signed."""
_GC_THRESHOLDS = 1_000_000, 20, 100
"""The garbage collector's thresholds. A full collection visits the objects of all nodes and frees little, so it is
rare.
"""


class Tally:
    """Stands for a Prometheus metric: 100,000 nodes would have millions of those."""

    __slots__ = ("count",)

    def __init__(self, *args: object, **kwargs: object) -> None:
        self.count = 0.0

    def labels(self, *values: str) -> "Tally":
        return self

    def inc(self, amount: float = 1) -> None:
        self.count += amount

    def observe(self, amount: float) -> None:
        self.count += 1

    def set_function(self, function: Callable[[], float]) -> None: ...


async def _at_once(work: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Stands for `asyncio.to_thread`: does the work at once."""
    return work(*args, **kwargs)


class CountedExpert:
    """Stands for `Expert`: takes updates at an even rate while it serves."""

    def __init__(self, uid: UID, manifest: Manifest, device: object) -> None:
        self.uid = uid
        self.device = device
        self.generation: object = object()
        self.source = ""
        self.reports = UpdateReports()
        self.rate = 0.0
        """Updates per second, set by the runtime that serves the expert."""
        self.clock: Any = None
        self._count = 0.0
        self._counted_at = 0.0
        self.shared_count = 0
        """The latest update count of which another node has a copy."""

    @property
    def update_count(self) -> int:
        if self.clock is None:
            return int(self._count)
        return int(self._count + self.rate * (self.clock() - self._counted_at))

    @property
    def rows(self) -> int:
        """Rows computed so far: one for each update."""
        return self.update_count

    @property
    def updated_at(self) -> float:
        """The Unix time of the last update."""
        return 0.0 if self.clock is None or not self.rate else EPOCH + float(self.clock())

    def serve(self, rate: float, clock: Any) -> None:
        self._count, self.rate, self.clock, self._counted_at = self.update_count, rate, clock, clock()

    def stop(self) -> None:
        self._count, self.clock = self.update_count, None

    def checkpoint(self) -> Checkpoint:
        return Checkpoint({}, self.update_count, self.source)

    def require_good(self, state: object, update_count: int) -> None: ...

    def import_state(self, state: object, update_count: int, source: str = "") -> None:
        self._count = update_count
        if self.clock is not None:
            self._counted_at = self.clock()
        self.generation = object()
        self.source = ""


class CountingRuntime:
    """Stands for `Runtime`."""

    def __init__(self, rate: float, clock: Any) -> None:
        self.experts: dict[UID, CountedExpert] = {}
        self.queued_rows = 0
        """Rows queued by training, which is simulated elsewhere."""
        self.takings = 0
        self._rate = rate
        self._clock = clock

    async def run(self, work: Any) -> Any:
        return work()

    def refuse(self, refuses: bool = True) -> None: ...

    async def settle(self) -> None: ...

    def add(self, expert: CountedExpert) -> None:
        self.takings += 1
        expert.serve(self._rate, self._clock)
        self.experts[expert.uid] = expert

    def remove(self, uid: UID) -> None:
        expert = self.experts.pop(uid, None)
        if expert is not None:
            expert.stop()


class CountedCheckpoints:
    """Stands for `Checkpoints`: what is on a machine's disk, even after its node has ended."""

    def __init__(self, disk: dict[UID, dict[str, int]]) -> None:
        self.restored = Tally()
        self._disk = disk
        self._given_up: dict[UID, None] = {}
        """Experts that others have proved to have, in the order in which this node gave them up."""

    async def newest(self) -> dict[UID, int]:
        return {uid: max(counts.values()) for uid, counts in self._disk.items()}

    async def newest_by_source(self) -> dict[UID, dict[str, int]]:
        return {uid: dict(counts) for uid, counts in self._disk.items()}

    async def restore(self, expert: CountedExpert) -> bool:
        counts = self._disk.get(expert.uid)
        if not counts:
            return False
        expert.import_state({}, max(counts.values()))
        return True

    async def keep(self, uid: UID, checkpoint: Checkpoint) -> None:
        self._disk.setdefault(uid, {})[checkpoint.source] = checkpoint.update_count

    def note_replaced(self, uid: UID) -> None: ...

    async def drop(self, uid: UID) -> None:
        self._disk.pop(uid, None)

    async def give_up(self, uids: Collection[UID], needed: Collection[UID]) -> None:
        for uid in uids:
            self._given_up.pop(uid, None)
            self._given_up[uid] = None
        for uid in [*self._given_up][:-MAX_GIVEN_UP]:
            if uid not in needed:
                del self._given_up[uid]
                self._disk.pop(uid, None)

    async def save_all_within(self, seconds: float, experts: Collection[CountedExpert]) -> None:
        self.save(experts)

    def save(self, experts: Collection[CountedExpert]) -> None:
        for expert in experts:
            self._given_up.pop(expert.uid, None)
            if expert.update_count:
                self._disk.setdefault(expert.uid, {})[""] = expert.update_count


class UnsignedRecord(StoredRecord):
    """Stands for a signed record, and is as long as that one. Nobody forges any here, so readers take its payload."""

    def __new__(cls, payload: records_pb2.RecordPayload) -> "UnsignedRecord":
        size = payload.ByteSize()
        record = super().__new__(cls, size + SIGNED_BYTES + (size >= 128))  # longer sizes take two bytes
        record.payload = payload
        return record

    payload: records_pb2.RecordPayload


class SharedRegistry(Registry):
    """A registry that does not parse a record again which another node has parsed: nodes share the results."""

    async def get(
        self, keys: Collection[str], limits: SearchLimits = DEFAULT_LIMITS, room: int | None = None
    ) -> dict[str, Entries]:
        """Like `Registry.get`, but all readers of a key get the same dictionary."""
        if not keys:
            return {}
        ids = {key: _key_id_of(key) for key in keys}
        found: Any = await self.lookups.find(list(ids.values()), limits, room=room)
        if not next(iter(found.values())).someone_answered:  # nor to the others
            raise UnreachableError("no DHT peer answered")
        return {key: found[key_id].answer for key, key_id in ids.items()}

    async def _in_time(self, call: Awaitable[T], operation: str = "") -> T:
        """Waits without a deadline, and without its timer: modelled look-ups always end, or pause with a machine that
        sleeps.
        """
        return await call

    def seal(self, payload: records_pb2.RecordPayload) -> "UnsignedRecord":
        return UnsignedRecord(payload)

    def unseal(self, value: Any, key: str, peer_id: PeerID) -> records_pb2.RecordPayload:
        payload: records_pb2.RecordPayload = value.payload
        return payload

    def _info(self, kind: Any, value: Any, key: str, peer_id: PeerID) -> Any:
        if value.parsed is None:
            value.parsed = super()._info(kind, value, key, peer_id)
        return value.parsed


class SharedExperts(ExpertRegistry):
    """Like `SharedRegistry`, for what nodes announce of their experts."""

    def _replicas_in(self, prefix: Prefix, key: str, subkey: object, value: Any) -> Mapping[UID, Replica]:
        if value.parsed is None:
            value.parsed = super()._replicas_in(prefix, key, subkey, value)
        replicas: Mapping[UID, Replica] = value.parsed
        return replicas

    async def _region(
        self, prefix: Prefix, keys: Sequence[str], answers: Mapping[str, Entries], slices: TimeSlices
    ) -> Region:
        answer: Any = answers[keys[0]]
        if answer.region is None:
            answer.region = self._renewed(prefix, keys[0], answer)
            if answer.region is None:
                answer.region = await super()._region(prefix, keys[:1], answers, slices)
            answer.before = None
        region: Region = answer.region
        return region if len(keys) == 1 else self._with_pieces(answer, keys[1:], answers)

    def _with_pieces(self, answer: Any, keys: Sequence[str], answers: Mapping[str, Entries]) -> Region:
        """The region of an answer, with the further pieces of its index that are under these keys."""
        pieces = [answers[key] for key in keys]
        read, region = answer.with_pieces
        if len(read) != len(pieces) or not all(map(operator.is_, read, pieces)):
            active = answer.region.active.union(*map(active_under, keys, pieces))
            region = replace(answer.region, active=active)
            answer.with_pieces = pieces, region
        found: Region = region
        return found

    def _renewed(self, prefix: Prefix, key: str, entries: Any) -> Region | None:
        """The region that `_region` would make, from an earlier one in which some replicas were announced with other
        counts. None if there is none: usually, hosts or experts have then come or gone.
        """
        before = entries.before
        if before is None or [*before] != [*entries]:
            return None
        region: Region = before.region
        replicas, size = dict(region.replicas), region.size
        for (subkey, (old, _)), (value, _) in zip(before.items(), entries.values(), strict=True):
            if value is old or value == old == key:  # an index entry
                continue
            records = [self._replicas_in(prefix, key, subkey, each) for each in (old, value)]
            if [*records[0]] != [*records[1]]:
                return None
            size += len(value) - len(old)
            for uid, replica in records[1].items():
                replicas[uid] = [replica if each is records[0][uid] else each for each in replicas[uid]]
        return None if size > MAX_KEY_BYTES else replace(region, replicas=replicas, size=size)


async def _end_all() -> None:
    """Cancels all tasks, repeatedly: tasks that end may start others, or wait once more."""
    while tasks := asyncio.all_tasks() - {asyncio.current_task()}:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _no_scale(replicas: LocalReplicas) -> None:
    """Stands for a function that needs tensors."""


def _middle(states: Sequence[Checkpoint], known: Checkpoint, rng: random.Random) -> tuple[int, Checkpoint]:
    """Stands for `choose`: states of honest nodes differ only in their updates."""
    index = sorted(range(len(states)), key=lambda n: states[n].update_count)[(len(states) - 1) // 2]
    return index, states[index]


def _parsed_once(parse: Callable[..., T]) -> Callable[..., T]:
    """Stands for a parser of lists of addresses, the last argument: all records of a node have the same ones."""
    parsed = functools.lru_cache(maxsize=1 << 18)(lambda texts, *others: parse(*others, texts))
    return lambda *arguments: parsed(tuple(arguments[-1]), *arguments[:-1])


def _same_peer_id(world: World, subkey: object) -> PeerID:
    """Stands for `parse_peer_id`: returns the object that all nodes share, whose text is made only once."""
    found = parse_peer_id(subkey)
    peer = world.by_id.get(found)
    return found if peer is None else peer.peer_id


@contextmanager
def simulated(seed: int) -> Iterator[World]:
    """A world in which the product's code runs, until the block ends."""
    with simulated_world() as loop, ExitStack() as stack:
        world = World(seed, loop)
        tallies = (
            "dht.registry.Counter", "dht.registry.Histogram", "peer.loop.Counter", "peer.parsing.Counter",
            "expert_server.hosting.manager.Counter", "expert_server.hosting.standby.Counter",
        )  # fmt: skip
        stand_ins: dict[str, object] = {
            **dict.fromkeys(tallies, Tally),
            "asyncio.to_thread": _at_once,
            "dht.registry.Lookups": lambda lookups, **kwargs: lookups,
            "dht.registry.unpack": lambda value: value,
            "dht.registry.key_id_of": _key_id_of,
            "dht.announcements._endpoints": _parsed_once(announcements._endpoints),
            "dht.announcements._own": _parsed_once(announcements._own),
            "dht.experts.parse_peer_id": functools.partial(_same_peer_id, world),
            "benchmarks.internet.dht_model.key_id_of": _key_id_of,
            "expert_server.hosting.manager.Handover": functools.partial(Handover, clock=world.time),
            "expert_server.hosting.replicas.AveragingHistory": functools.partial(
                AveragingHistory, world.time
            ),
            "expert_server.hosting.replicas.Expert": CountedExpert,
            "expert_server.hosting.standby.StandbyCopies._check": lambda *args: None,
            "expert_server.hosting.replicas.LocalReplicas.first_scale": _no_scale,
            "expert_server.hosting.replicas.roomiest": lambda devices, hosted: None,
            "expert_server.hosting.replicas.total": lambda tally: tally.count,
            "expert_server.hosting.whole_states.choose": _middle,
            "random.SystemRandom": functools.partial(world.rng, "system"),
        }
        for target, stand_in in stand_ins.items():
            stack.enter_context(patch(target, stand_in))
        thresholds = gc.get_threshold()
        gc.set_threshold(*_GC_THRESHOLDS)
        try:
            yield world
        finally:
            gc.set_threshold(*thresholds)
            world.loop.run_until_complete(_end_all())
