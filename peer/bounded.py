"""A dictionary with a bound, and who has the most: strangers must not be able to make a peer remember more and more."""

from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from heapq import heapify, heappop, heappush, heapreplace
from typing import NamedTuple, TypeVar

K = TypeVar("K")
V = TypeVar("V")

_SPARE = 1024


class BoundedDict(OrderedDict[K, V]):
    """Holds at most `most` entries and evicts those that were set longest ago. `move_to_end` makes an entry the
    newest.

    Many are small, and a node has dozens. `BoundedDict(most)`, without types, makes one in a third of the memory.
    """

    __slots__ = ("most",)

    def __init__(self, most: int) -> None:
        assert most > 0, "nothing could be remembered"
        super().__init__()
        self.most = most

    def __setitem__(self, key: K, value: V) -> None:
        self.put(key, value)

    def put(self, key: K, value: V) -> list[V]:
        """Sets the entry as the newest. Returns the evicted values, for owners that must close them."""
        super().__setitem__(key, value)
        self.move_to_end(key)
        evicted = []
        while len(self) > self.most:
            evicted.append(self.popitem(last=False)[1])
        return evicted


@contextmanager
def counting(counts: Counter[K], key: K) -> Iterator[None]:
    """Counts one more of the key while inside. A key that has none left has no entry."""
    counts[key] += 1
    try:
        yield
    finally:
        counts[key] -= 1
        if not counts[key]:
            del counts[key]


class Totals:
    """How much each owner has. Finding the owner with the most hardly takes longer if there are many owners."""

    def __init__(self) -> None:
        self.of: dict[str, int] = {}
        """Owners without anything have no entry."""
        self._heap: list[tuple[int, int, str]] = []
        """For each owner, minus its total when it last grew, and a number that rises. Perhaps also older entries."""
        self._added = 0

    def add(self, owner: str, amount: int) -> None:
        """`amount`: negative for what the owner no longer has."""
        total = self.of[owner] = self.of.get(owner, 0) + amount
        if not total:
            del self.of[owner]
        elif amount > 0:
            self._added += 1
            heappush(self._heap, (-total, self._added, owner))
            if len(self._heap) > 2 * len(self.of) + _SPARE:
                self._heap = [(-size, number, name) for number, (name, size) in enumerate(self.of.items())]
                heapify(self._heap)

    def richest(self) -> str:
        """The owner with the most; of several, one that has had it for longer. There must be one."""
        while True:
            noted, number, owner = self._heap[0]
            total = self.of.get(owner, 0)
            if total == -noted:
                return owner
            if total:
                heapreplace(self._heap, (-total, number, owner))
            else:
                heappop(self._heap)


class GroupedTotals:
    """How much each owner has, and each group of owners. An owner is in one group as long as it has anything."""

    def __init__(self) -> None:
        self._groups = Totals()
        self._members: dict[str, Totals] = {}

    def add(self, group: str, owner: str, amount: int) -> None:
        members = self._members.setdefault(group, Totals())
        self._groups.add(group, amount)
        members.add(owner, amount)
        if not members.of:
            del self._members[group]

    def richest(self) -> str:
        """The owner with the most in the group with the most. There must be one."""
        return self._members[self._groups.richest()].richest()


class Owner(NamedTuple):
    """Who holds or wants something, and with whom it shares. Groups have equal shares, and so have the owners in each.
    So one person with many keys, which are all in one group, gets one share.
    """

    group: Hashable
    name: Hashable

    @classmethod
    def alone(cls, name: Hashable) -> "Owner":
        """An owner that is a group by itself."""
        return cls(name, name)


class Displacement:
    """Whose things make room for a newcomer's: the owner with the most in the group with the most, unless the
    newcomer's group would then be the one with the most. If so, the owner with the most in that group, unless it would
    be the newcomer. So nobody within its share is refused, or loses anything.
    """

    def __init__(self, held: Mapping[Owner, int], newcomer: Owner, size: int) -> None:
        """`held`: how much each owner has. `size`: how much more the newcomer wants."""
        self._newcomer = newcomer
        self._wanted = held.get(newcomer, 0) + size
        self._others = {owner: amount for owner, amount in held.items() if owner != newcomer}
        self._groups = Counter[Hashable]({newcomer.group: self._wanted})
        for owner, amount in self._others.items():
            self._groups[owner.group] += amount

    def richest(self) -> Owner | None:
        """The owner that must make room next; None if none must, because it would be unfair."""
        own = self._newcomer.group
        group = max(self._groups, key=self._groups.__getitem__)
        if self._groups[group] <= self._groups[own]:
            group = own
        others = [owner for owner in self._others if owner.group == group]
        found = max(others, key=self._others.__getitem__, default=None)
        if found is None or (group == own and self._others[found] <= self._wanted):
            return None
        return found

    def take(self, owner: Owner, amount: int) -> None:
        """Records what the owner has given up."""
        self._others[owner] -= amount
        self._groups[owner.group] -= amount
