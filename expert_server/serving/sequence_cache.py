"""What experts keep of sequences, for the calls that continue them. Pure and bounded.

A caller numbers its sequences. Other callers can't use them.
"""

from collections import OrderedDict
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from grpc import StatusCode

from dht.uid import UID
from peer.bounded import GroupedTotals
from peer.errors import ExpertError
from peer.layers import KeyValueCache

IDLE_S = 60.0
"""How long rows are kept if no call continues their sequence."""
ENTRY_BYTES = 1024
"""The memory of a sequence's entry, besides its numbers."""

_Key: TypeAlias = tuple[UID, int]


@dataclass(frozen=True, slots=True, eq=False)
class _Entry:
    rows: KeyValueCache
    bytes: int
    expires_at: float


class SequenceCache:
    """Keeps rows of sequences as long as there is room. When it is full, the caller that takes the most memory loses
    the sequence that it used longest ago: the one with the most in the group that takes the most, because one person
    can be many callers. While a call continues a sequence, the sequence is not in the cache, so that
    no other call can continue it.
    """

    def __init__(self, room: Callable[[], int]) -> None:
        """`room`: returns how many bytes it may keep now."""
        self._room = room
        self._callers: dict[str, OrderedDict[_Key, _Entry]] = {}
        """The entries of each caller, the one used longest ago first. Callers without entries are dropped."""
        self._group_of: dict[str, str] = {}
        """The group of each caller that has entries."""
        self._bytes = GroupedTotals()
        self.bytes: int = 0

    def __len__(self) -> int:
        return sum(map(len, self._callers.values()))

    def take(
        self, caller: str, uid: UID, numbers: Sequence[int], counts: Sequence[int]
    ) -> list[KeyValueCache]:
        """Removes and returns one expert's rows in these sequences. Each must have as many rows as `counts` says; for
        0, returns a new cache.

        Raises ExpertError (FAILED_PRECONDITION), and then removes nothing.
        """
        entries = self._callers.get(caller, OrderedDict())
        found = [
            entries.get((uid, number)) if count else None
            for number, count in zip(numbers, counts, strict=True)
        ]
        for entry, count in zip(found, counts, strict=True):
            if count and (entry is None or entry.rows.length != count):
                message = f"expert {uid} does not have those {count} rows of a sequence (any more): send all of them"
                raise ExpertError(StatusCode.FAILED_PRECONDITION, message)
        for number in numbers:
            self._remove(caller, (uid, number))
        return [KeyValueCache() if entry is None else entry.rows for entry in found]

    def put(
        self,
        caller: str,
        group: str,
        uid: UID,
        numbers: Sequence[int],
        rows: Sequence[KeyValueCache],
        now: float,
    ) -> bool:
        """Returns whether all of them are kept. `group`: see `Session.group`."""
        for number, each in zip(numbers, rows, strict=True):
            self._remove(caller, (uid, number))
            entry = _Entry(each, each.nbytes + ENTRY_BYTES, now + IDLE_S)
            self._callers.setdefault(caller, OrderedDict())[uid, number] = entry
            self._bytes.add(self._group_of.setdefault(caller, group), caller, entry.bytes)
            self.bytes += entry.bytes
        self.keep_to_room()
        return all((uid, number) in self._callers.get(caller, ()) for number in numbers)

    def keep_to_room(self) -> None:
        """Evicts entries until they fit. Call it also when others need the room."""
        excess = self.bytes - self._room() if self._callers else 0
        while excess > 0 and self._callers:
            richest = self._bytes.richest()
            excess -= self._remove(richest, next(iter(self._callers[richest])))

    def drop_idle(self, now: float, callers: Container[str]) -> None:
        """Drops sequences that were not used for `IDLE_S`, and those of callers other than `callers`."""
        for caller, entries in list(self._callers.items()):
            is_gone = caller not in callers
            while entries and (is_gone or next(iter(entries.values())).expires_at <= now):
                self._remove(caller, next(iter(entries)))

    def clear(self) -> None:
        self._callers.clear()
        self._group_of.clear()
        self._bytes = GroupedTotals()
        self.bytes = 0

    def _remove(self, caller: str, key: _Key) -> int:
        """Returns the bytes that this frees."""
        entries = self._callers.get(caller)
        entry = entries.pop(key, None) if entries is not None else None
        if entries is None or entry is None:
            return 0
        self._bytes.add(self._group_of[caller], caller, -entry.bytes)
        self.bytes -= entry.bytes
        if not entries:
            del self._callers[caller], self._group_of[caller]
        return entry.bytes
