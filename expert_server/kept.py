"""Forward passes kept until their backward call comes, within a memory budget. Pure: `now` is passed in.

With them inputs need not travel twice, and outputs need not be computed twice while the parameters stay the same.
"""

from collections import OrderedDict
from dataclasses import dataclass, replace

from torch import Tensor

from dht.uid import UID
from expert_server.expert import Graph

KeptKey = tuple[str, bytes, int]
"""Who made the forward call, its request id, and which part of the call this was."""


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """What one expert was given in a forward call, and its graph if there is room for it."""

    uid: UID
    inputs: Tensor
    lengths: Tensor
    positions: Tensor
    graph: Graph | None
    expires_at: float

    @property
    def bytes(self) -> int:
        without_graph = self.inputs.nbytes + self.lengths.nbytes + self.positions.nbytes
        return without_graph + (0 if self.graph is None else self.graph.bytes)


class KeptForwards:
    """When full, gives up the oldest graphs first, then the oldest inputs."""

    def __init__(self, budget_bytes: int) -> None:
        self._budget_bytes = budget_bytes
        self._kept: OrderedDict[KeptKey, Kept] = OrderedDict()  # oldest first
        self._graphs: OrderedDict[KeptKey, None] = OrderedDict()  # keys whose graph is kept, oldest first
        self.bytes = 0

    def put(self, key: KeptKey, kept: Kept, now: float) -> bool:
        """Keeps it, unless it alone is over the budget even without its graph. Says whether it is kept."""
        self._drop_expired(now)
        if kept.bytes > self._budget_bytes:
            kept = replace(kept, graph=None)
        if kept.bytes > self._budget_bytes:
            return False
        self.take(key)
        self._kept[key] = kept
        if kept.graph is not None:
            self._graphs[key] = None
        self.bytes += kept.bytes
        while self.bytes > self._budget_bytes:
            self._give_up_oldest()
        return key in self._kept

    def take(self, key: KeptKey) -> Kept | None:
        """Hands it over: it is kept no more."""
        kept = self._kept.pop(key, None)
        if kept is not None:
            self._graphs.pop(key, None)
            self.bytes -= kept.bytes
        return kept

    def clear(self) -> None:
        self._kept.clear()
        self._graphs.clear()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def _give_up_oldest(self) -> None:
        if self._graphs:
            key, _ = self._graphs.popitem(last=False)
            kept = self._kept[key]
            self._kept[key] = bare = replace(kept, graph=None)
            self.bytes += bare.bytes - kept.bytes
        else:
            self.take(next(iter(self._kept)))

    def _drop_expired(self, now: float) -> None:
        """Entries come with equal lifetimes, so the oldest expire first."""
        while self._kept and next(iter(self._kept.values())).expires_at <= now:
            self.take(next(iter(self._kept)))
