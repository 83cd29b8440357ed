"""Forward passes cached until their backward call comes, and the backward calls already seen. Pure and bounded.

A cached pass spares sending the inputs again and computing the updates again. Remembering the request ids of backward
calls ensures that none is applied twice.
"""

from collections import Counter, OrderedDict
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from dht.uid import UID
from expert_server.experts.graphs import Rows, SharedPass, WeightVersion

CacheKey: TypeAlias = tuple[str, bytes, int]
"""The caller of the forward pass, its request id, and the index of the part within the call."""
Version: TypeAlias = WeightVersion | SharedPass
"""What several graphs share."""


@dataclass(frozen=True, slots=True, eq=False)
class CachedForward:
    """The rows that one expert was given in a forward call, with their graph if there is room for it."""

    uid: UID
    rows: Rows
    expires_at: float

    @property
    def bytes(self) -> int:
        rows = self.rows
        without_graph = rows.inputs.nbytes + rows.lengths.nbytes + rows.positions.nbytes
        return without_graph + (0 if rows.graph is None else rows.graph.bytes)

    def without_graph(self) -> "CachedForward":
        return replace(self, rows=replace(self.rows, graph=None))


class ForwardCache:
    """Keeps within a memory budget. When full, it evicts passes of the caller that takes the most memory.

    Of that caller, it evicts the oldest graphs first, then the oldest inputs. So a stranger evicts only its own passes
    as long as the others take less than it does.
    """

    def __init__(self, budget_bytes: int) -> None:
        self._budget_bytes = budget_bytes
        self._cached: OrderedDict[CacheKey, CachedForward] = OrderedDict()
        """Oldest first."""
        self._callers: dict[str, _Kept] = {}
        """None is empty."""
        self._versions: Counter[Version] = Counter()
        """How many graphs each version has."""
        self._own_bytes = 0

    @property
    def bytes(self) -> int:
        """Includes what graphs share, such as older parameters of experts. Safe from any thread."""
        return self._own_bytes + sum(version.bytes for version in list(self._versions))

    def put(self, key: CacheKey, forward: CachedForward, now: float) -> bool:
        """Returns whether the pass is cached: not if it is over the budget by itself, even without its graph."""
        self._drop_expired(now)
        if forward.bytes > self._budget_bytes:
            forward = forward.without_graph()
        if forward.bytes > self._budget_bytes:
            return False
        self._remove(key)
        self._add(key, forward)
        self._keep_to_budget()
        return key in self._cached

    def take(self, key: CacheKey) -> CachedForward | None:
        """Removes a pass and returns it."""
        forward = self._remove(key)
        self._keep_to_budget()
        return forward

    def clear(self) -> None:
        self._cached.clear()
        self._callers.clear()
        self._versions.clear()
        self._own_bytes = 0

    def __len__(self) -> int:
        return len(self._cached)

    def _add(self, key: CacheKey, forward: CachedForward) -> None:
        self._cached[key] = forward
        kept = self._callers.setdefault(key[0], _Kept())
        kept.passes[key] = None
        kept.own_bytes += forward.bytes
        self._own_bytes += forward.bytes
        if forward.rows.graph is not None:
            version = kept.graphs[key] = forward.rows.graph.version
            for versions in (kept.versions, self._versions):
                versions[version] += 1

    def _remove(self, key: CacheKey) -> CachedForward | None:
        forward = self._cached.pop(key, None)
        if forward is not None:
            kept = self._callers[key[0]]
            del kept.passes[key]
            self._shrink(key, forward.bytes)
            if not kept.passes:
                del self._callers[key[0]]
        return forward

    def _keep_to_budget(self) -> None:
        """Called even when nothing was added, because versions grow whenever an expert steps."""
        while self.bytes > self._budget_bytes:
            largest = max(self._callers.values(), key=lambda kept: kept.bytes)
            if largest.graphs:
                key = next(iter(largest.graphs))
                forward = self._cached[key]
                self._cached[key] = bare = forward.without_graph()
                self._shrink(key, forward.bytes - bare.bytes)
            else:
                self._remove(next(iter(largest.passes)))

    def _shrink(self, key: CacheKey, size: int) -> None:
        """Notes that a pass has gone, or its graph."""
        kept = self._callers[key[0]]
        kept.own_bytes -= size
        self._own_bytes -= size
        version = kept.graphs.pop(key, None)
        if version is None:
            return
        for versions in (kept.versions, self._versions):
            versions[version] -= 1
            if not versions[version]:
                del versions[version]

    def _drop_expired(self, now: float) -> None:
        """All passes have the same lifetime, so the oldest expire first."""
        while self._cached and next(iter(self._cached.values())).expires_at <= now:
            self._remove(next(iter(self._cached)))


@dataclass(slots=True)
class _Kept:
    """What is cached for one caller, oldest first."""

    passes: dict[CacheKey, None] = field(default_factory=dict)
    graphs: dict[CacheKey, Version] = field(default_factory=dict)
    """What each pass that has its graph shares with others."""
    versions: Counter[Version] = field(default_factory=Counter)
    own_bytes: int = 0

    @property
    def bytes(self) -> int:
        """With what its graphs hold, be it alone or with others."""
        return self.own_bytes + sum(version.bytes for version in self.versions)


class SeenRequests:
    """The request ids of each caller's last backward calls.

    When there are too many, the caller with the most loses its oldest: a caller that invents ids evicts only its own.
    """

    def __init__(self, limit: int) -> None:
        """`limit`: the number of ids, of all callers together."""
        self._limit = limit
        self._count = 0
        self._by_caller: dict[str, OrderedDict[bytes, None]] = {}

    def is_new(self, caller: str, request_id: bytes) -> bool:
        """Whether the caller has not used this id before. Remembers it."""
        ids = self._by_caller.setdefault(caller, OrderedDict())
        if request_id in ids:
            return False
        ids[request_id] = None
        self._count += 1
        if self._count > self._limit:
            self._forget_one(caller)
        return True

    def __len__(self) -> int:
        return self._count

    def _forget_one(self, caller: str) -> None:
        share = self._limit // len(self._by_caller)
        if len(self._by_caller[caller]) <= share:  # otherwise the search for the largest can be spared
            caller = max(self._by_caller, key=lambda name: len(self._by_caller[name]))
        self._by_caller[caller].popitem(last=False)
        self._count -= 1
        if not self._by_caller[caller]:
            del self._by_caller[caller]
