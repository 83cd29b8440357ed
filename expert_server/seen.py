"""Which backward calls were seen before, so that none is applied twice. Pure and bounded."""

from collections import OrderedDict


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
