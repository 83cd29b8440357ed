"""Forward passes kept until their backward call comes, within a memory budget. Pure: `now` is passed in.

With them inputs need not travel twice, and outputs need not be computed twice.

Which backward calls were seen before, so that none is applied twice. Pure and bounded.
"""

from collections import Counter, OrderedDict
from dataclasses import dataclass, replace

from torch import Tensor

from dht.uid import UID
from expert_server.experts.graphs import ForwardGraph, WeightVersion

KeptKey = tuple[str, bytes, int]
"""Who made the forward call, its request id, and which part of the call this was."""


@dataclass(frozen=True, slots=True, eq=False)
class CachedForward:
    """What one expert was given in a forward call, and its graph if there is room for it."""

    uid: UID
    inputs: Tensor
    lengths: Tensor
    positions: Tensor
    graph: ForwardGraph | None
    expires_at: float

    @property
    def bytes(self) -> int:
        without_graph = self.inputs.nbytes + self.lengths.nbytes + self.positions.nbytes
        return without_graph + (0 if self.graph is None else self.graph.bytes)


class ForwardCache:
    """When full, gives up the oldest graphs first, then the oldest inputs."""

    def __init__(self, budget_bytes: int) -> None:
        self._budget_bytes = budget_bytes
        self._kept: OrderedDict[KeptKey, CachedForward] = OrderedDict()  # oldest first
        self._graphs: dict[
            KeptKey, WeightVersion
        ] = {}  # keys whose graph is kept, oldest first, with its version
        self._versions: Counter[WeightVersion] = Counter()  # how many of those graphs each has
        self._own_bytes = 0

    @property
    def bytes(self) -> int:
        """With older parameters of experts that are there for kept graphs alone. Any thread may ask."""
        return self._own_bytes + sum(version.bytes for version in list(self._versions))

    def put(self, key: KeptKey, kept: CachedForward, now: float) -> bool:
        """Keeps it, unless it alone is over the budget even without its graph. Says whether it is kept."""
        self._drop_expired(now)
        if kept.bytes > self._budget_bytes:
            kept = replace(kept, graph=None)
        if kept.bytes > self._budget_bytes:
            return False
        self._remove(key)
        self._kept[key] = kept
        self._own_bytes += kept.bytes
        if kept.graph is not None:
            self._graphs[key] = kept.graph.version
            self._versions[kept.graph.version] += 1
        self._keep_to_budget()
        return key in self._kept

    def take(self, key: KeptKey) -> CachedForward | None:
        """Hands it over: it is kept no more."""
        kept = self._remove(key)
        self._keep_to_budget()
        return kept

    def clear(self) -> None:
        self._kept.clear()
        self._graphs.clear()
        self._versions.clear()
        self._own_bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def _remove(self, key: KeptKey) -> CachedForward | None:
        kept = self._kept.pop(key, None)
        if kept is not None:
            self._own_bytes -= kept.bytes
            self._forget_graph(key)
        return kept

    def _keep_to_budget(self) -> None:
        """Versions grow when experts step, at any time."""
        while self.bytes > self._budget_bytes:
            self._give_up_oldest()

    def _give_up_oldest(self) -> None:
        if self._graphs:
            key = next(iter(self._graphs))
            kept = self._kept[key]
            self._kept[key] = bare = replace(kept, graph=None)
            self._own_bytes += bare.bytes - kept.bytes
            self._forget_graph(key)
        else:
            self._remove(next(iter(self._kept)))

    def _forget_graph(self, key: KeptKey) -> None:
        """Nothing, when none is kept."""
        version = self._graphs.pop(key, None)
        if version is None:
            return
        self._versions[version] -= 1
        if not self._versions[version]:
            del self._versions[version]

    def _drop_expired(self, now: float) -> None:
        """Entries come with equal lifetimes, so the oldest expire first."""
        while self._kept and next(iter(self._kept.values())).expires_at <= now:
            self._remove(next(iter(self._kept)))


class SeenRequests:
    """The ids of the last backward calls of each caller.

    When there are too many, whoever has most loses the oldest: a caller that makes up ids pushes out only its own.
    """

    def __init__(self, limit: int) -> None:
        """`limit`: ids of all callers together."""
        self._limit = limit
        self._count = 0
        self._by_caller: dict[str, OrderedDict[bytes, None]] = {}

    def is_new(self, caller: str, request_id: bytes) -> bool:
        """Whether this caller's id was not seen before; from now on it was."""
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
        if (
            len(self._by_caller[caller]) <= share
        ):  # else it is beyond its share itself, and nobody need be looked for
            caller = max(self._by_caller, key=lambda name: len(self._by_caller[name]))
        self._by_caller[caller].popitem(last=False)
        self._count -= 1
        if not self._by_caller[caller]:
            del self._by_caller[caller]
