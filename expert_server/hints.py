"""What others ask this node to fetch, until it does: a bounded queue that no asker can fill with much. Pure."""

from collections import OrderedDict
from dataclasses import dataclass, replace

from hivemind.p2p import PeerID

from dht.uid import UID

_REMEMBERED = 4096
_ADOPT_EVERY_S = 1.0


@dataclass(frozen=True)
class Hint:
    """Peer `peer_id` would like this node to fetch these experts from it. Not to be believed."""

    peer_id: PeerID
    uids: tuple[UID, ...]
    sha256: bytes = b""
    """For an average: of that peer's snapshot; empty when it asks for adoption."""
    base_sha256: bytes = b""
    """For an average: of this node's snapshot."""

    @property
    def is_average(self) -> bool:
        return bool(self.sha256)


class HintQueue:
    """At most `limit` experts wait, and none of them comes again too soon."""

    def __init__(self, limit: int, average_every_s: float) -> None:
        self._limit = limit
        self._average_every_s = average_every_s
        self._waiting: list[Hint] = []
        self._taken_at: OrderedDict[tuple[UID, bool], float] = OrderedDict()

    def put(self, hint: Hint, now: float) -> int:
        """How many of its experts were taken, from the first on."""
        taken: list[UID] = []
        every_s = self._average_every_s if hint.is_average else _ADOPT_EVERY_S
        room = self._limit - sum(len(waiting.uids) for waiting in self._waiting)
        for uid in hint.uids[: max(room, 0)]:
            key = uid, hint.is_average
            if now < self._taken_at.get(key, float("-inf")) + every_s:
                break
            self._taken_at[key] = now
            self._taken_at.move_to_end(key)
            taken.append(uid)
        while len(self._taken_at) > _REMEMBERED:
            self._taken_at.popitem(last=False)
        if taken:
            self._waiting.append(replace(hint, uids=tuple(taken)))
        return len(taken)

    def pop(self) -> Hint | None:
        """The oldest; adoptions go first, because their askers are leaving."""
        if not self._waiting:
            return None
        first = min(range(len(self._waiting)), key=lambda n: self._waiting[n].is_average)
        return self._waiting.pop(first)
