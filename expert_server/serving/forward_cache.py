"""Forward calls cached until their backward call arrives, and the backward calls already seen. Pure and bounded.

For a cached call, the inputs need not be sent again and the updates need not be computed again. Remembering the request
ids of backward calls ensures that none is applied twice.

Shape suffixes: R = rows, P = pairs of a row and an expert (see assignment.py), D = width.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

from torch import Tensor

from expert_server.experts.graphs import ForwardGraph, SharedGraph, SharedPass, WeightVersion
from expert_server.serving.assignment import Assignment
from peer.bounded import Totals
from peer.codec import Booleans

_CALL_BYTES, _EXPERT_BYTES = 2048, 128
"""The memory of a call, and of each of its experts, besides its numbers."""

CacheKey: TypeAlias = tuple[str, bytes]
"""The caller of the forward call, and its request id."""
Graph: TypeAlias = ForwardGraph | SharedGraph
Version: TypeAlias = WeightVersion | SharedPass
"""A version of the parameters, which several graphs may share."""


@dataclass(slots=True, eq=False)
class CachedForward:
    """One forward call: its inputs, its experts' answers, and the graphs for which there is room."""

    assignment: Assignment
    inputs: Tensor
    """[R, D]"""
    updates: Tensor
    """[P, D], valid where `answered`."""
    answered: Booleans
    """[P]: which pairs are in the answers that were sent."""
    expires_at: float
    graphs: dict[int, Graph] = field(default_factory=dict)
    """Graphs by expert. The cache adds and evicts them."""
    is_complete: bool = False
    """Whether the call has been answered. Until then, no backward call may use it."""
    is_claimed: bool = False
    """Whether a backward call has named it. No other backward call may use it."""

    @property
    def bytes(self) -> int:
        """Its size, without graphs."""
        numbers = self.inputs.nbytes + self.updates.nbytes + self.answered.nbytes + self.assignment.nbytes
        return numbers + _CALL_BYTES + _EXPERT_BYTES * len(self.assignment.uids)


class ForwardCache:
    """Caches calls within a memory budget. When it is full, it evicts from the caller that takes the most memory: the
    one with the most in the group that takes the most, because one person can be many callers.

    It evicts that caller's oldest graphs first, then its oldest calls. So a stranger evicts only its own calls as long
    as the others take less memory.
    """

    def __init__(self, budget_bytes: int, make_room: Callable[[], object] = lambda: None) -> None:
        """`make_room` is called when the cache grows, because others may share its budget."""
        self._budget_bytes = budget_bytes
        self._make_room = make_room
        self._cached: OrderedDict[CacheKey, CachedForward] = OrderedDict()
        """Oldest first."""
        self._callers: dict[str, _Kept] = {}
        """Callers without cached calls have no entry."""
        self._versions: Counter[Version] = Counter()
        """How many graphs each version has."""
        self._own_bytes = 0

    @property
    def bytes(self) -> int:
        """Includes what graphs share, such as older parameters of experts. For any thread."""
        return self._own_bytes + sum(version.bytes for version in list(self._versions))

    def put(self, key: CacheKey, group: str, forward: CachedForward, now: float) -> bool:
        """Adds a call without graphs. Returns whether it is cached; it is not if it exceeds the budget by itself.

        `group`: see `Session.group`.
        """
        self.drop_expired(now)
        if forward.bytes > self._budget_bytes:
            return False
        self._remove(key)
        self._cached[key] = forward
        kept = self._callers.setdefault(key[0], _Kept(group))
        kept.calls[key] = None
        kept.own_bytes += forward.bytes
        self._own_bytes += forward.bytes
        self._keep_to_budget()
        return key in self._cached

    def add_graph(self, key: CacheKey, forward: CachedForward, expert: int, graph: Graph) -> None:
        """Adds the graph of one expert of a call, if the call is still cached and there is room."""
        if self._cached.get(key) is not forward or forward.bytes + graph.bytes > self._budget_bytes:
            return
        kept = self._callers[key[0]]
        forward.graphs[expert] = graph
        kept.graphs[key, expert] = graph.version
        kept.own_bytes += graph.bytes
        self._own_bytes += graph.bytes
        for versions in (kept.versions, self._versions):
            versions[graph.version] += 1
        self._keep_to_budget()

    def complete(self, key: CacheKey, forward: CachedForward) -> bool:
        """Records that the call has been answered. Returns whether it is still cached."""
        forward.is_complete = True
        return self._cached.get(key) is forward

    def find(self, key: CacheKey) -> CachedForward | None:
        """A call that is complete and not claimed. The backward call that claims it takes it only once its payload is
        here: until then, its graphs count, and may be evicted.
        """
        forward = self._cached.get(key)
        self._keep_to_budget()
        return forward if forward is not None and forward.is_complete and not forward.is_claimed else None

    def take(self, key: CacheKey, forward: CachedForward) -> None:
        """Removes a claimed call. It keeps the graphs that were not evicted."""
        if self._cached.get(key) is forward:
            graphs = dict(forward.graphs)
            self._remove(key)
            forward.graphs |= graphs
        self._keep_to_budget()

    def discard(self, key: CacheKey, forward: CachedForward) -> None:
        """Removes a call that failed, unless another has taken its place."""
        if self._cached.get(key) is forward:
            self._remove(key)

    def drop_expired(self, now: float) -> None:
        """All calls have the same lifetime, so the oldest expire first."""
        while self._cached and next(iter(self._cached.values())).expires_at <= now:
            self._remove(next(iter(self._cached)))

    def clear(self) -> None:
        self._cached.clear()
        self._callers.clear()
        self._versions.clear()
        self._own_bytes = 0

    def __len__(self) -> int:
        return len(self._cached)

    def _remove(self, key: CacheKey) -> None:
        forward = self._cached.pop(key, None)
        if forward is None:
            return
        for expert in list(forward.graphs):
            self._drop_graph(key, forward, expert)
        kept = self._callers[key[0]]
        del kept.calls[key]
        kept.own_bytes -= forward.bytes
        self._own_bytes -= forward.bytes
        if not kept.calls:
            del self._callers[key[0]]

    def _drop_graph(self, key: CacheKey, forward: CachedForward, expert: int) -> tuple[int, int]:
        """Returns the bytes that this frees, and the bytes that its caller's total loses."""
        kept, graph = self._callers[key[0]], forward.graphs.pop(expert)
        version = kept.graphs.pop((key, expert))
        kept.own_bytes -= graph.bytes
        self._own_bytes -= graph.bytes
        freed = []
        for versions in (self._versions, kept.versions):
            versions[version] -= 1
            freed.append(graph.bytes if versions[version] else graph.bytes + version.bytes)
            if not versions[version]:
                del versions[version]
        return freed[0], freed[1]

    def _keep_to_budget(self) -> None:
        """Call it even if nothing was added, because versions grow whenever an expert steps."""
        while (excess := self.bytes - self._budget_bytes) > 0:
            self._evict(excess)
        self._make_room()

    def _evict(self, excess: int) -> None:
        """Frees this much memory, or less if versions have grown meanwhile."""
        groups: dict[str, dict[str, int]] = {}
        for name, kept in self._callers.items():
            groups.setdefault(kept.group, {})[name] = kept.bytes
        totals = {group: sum(sizes.values()) for group, sizes in groups.items()}
        while excess > 0 and totals:
            group = max(totals, key=totals.__getitem__)
            sizes = groups[group]
            name = max(sizes, key=sizes.__getitem__)
            kept = self._callers[name]
            if kept.graphs:
                key, expert = next(iter(kept.graphs))
                freed, less = self._drop_graph(key, self._cached[key], expert)
            else:
                key = next(iter(kept.calls))
                freed = less = self._cached[key].bytes
                self._remove(key)
            excess -= freed
            sizes[name] -= less
            totals[group] -= less
            if not kept.calls:
                del sizes[name]
            if not sizes:
                del totals[group]


@dataclass(slots=True)
class _Kept:
    """What is cached for one caller, oldest first."""

    group: str
    calls: dict[CacheKey, None] = field(default_factory=dict)
    graphs: dict[tuple[CacheKey, int], Version] = field(default_factory=dict)
    """For each graph, what it shares with others."""
    versions: Counter[Version] = field(default_factory=Counter)
    own_bytes: int = 0

    @property
    def bytes(self) -> int:
        """Bytes, including all memory of its graphs, shared or not."""
        return self.own_bytes + sum(version.bytes for version in self.versions)


class SeenRequests:
    """The request ids of each caller's last backward calls.

    If there are too many, the caller with the most loses its oldest: a caller that makes up ids evicts only its own.
    """

    def __init__(self, limit: int) -> None:
        """`limit`: the number of ids over all callers."""
        self._limit = limit
        self._count = 0
        self._by_caller: dict[str, OrderedDict[bytes, None]] = {}
        self._counts = Totals()

    def is_new(self, caller: str, request_id: bytes) -> bool:
        """Whether the caller has not used this id before. Remembers it."""
        ids = self._by_caller.setdefault(caller, OrderedDict())
        if request_id in ids:
            return False
        ids[request_id] = None
        self._counts.add(caller, 1)
        self._count += 1
        if self._count > self._limit:
            richest = self._counts.richest()
            self._by_caller[richest].popitem(last=False)
            if not self._by_caller[richest]:
                del self._by_caller[richest]
            self._counts.add(richest, -1)
            self._count -= 1
        return True

    def __len__(self) -> int:
        return self._count
