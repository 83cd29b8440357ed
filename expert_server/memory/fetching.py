"""Fetches parts of memories for a node that hosts them. Remembers which hosts gave wrong bytes, and which memories
could not be fetched.
"""

import math
import random
import time
from collections.abc import Callable, Iterable
from typing import TypeVar

from dht.announcements import NodeInfo
from dht.memory import MemoryID
from dht.swarm import Swarm
from dht.upkeep import UpkeepPeriod
from peer.bounded import BoundedDict
from peer.identity import PeerID
from peer.rpc.parts import PartClient

T = TypeVar("T")

_PUT_OFF_S = 600.0
"""The longest pause after the parts of a memory could not be fetched."""
_REMEMBERED = 4096


class PartFetcher:
    """Fetches parts from any of their hosts."""

    def __init__(self, swarm: Swarm, parts: PartClient, period: UpkeepPeriod) -> None:
        self._swarm = swarm
        self._parts = parts
        self._period = period
        self._rng = random.SystemRandom()
        self._wrong = BoundedDict[tuple[PeerID, bytes], None](_REMEMBERED)
        """Which host gave wrong bytes for which part."""
        self._put_off = BoundedDict[MemoryID, tuple[float, float]](_REMEMBERED)
        """For each memory whose parts could not be fetched, until when it is not tried again, and how long that pause
        is.
        """

    async def fetch(
        self,
        memory: MemoryID,
        hosts: Iterable[PeerID],
        name: bytes,
        most_bytes: int,
        check: Callable[[bytes], T],
        wrong: Callable[[], None] = lambda: None,
    ) -> T:
        """The result of `check` for the part: see `PartClient.fetch_any`. `wrong` is called if a host gave another
        file.

        Raises TransferError if no host gives the part, and UnreachableError.
        """

        def note_wrong(peer_id: PeerID) -> None:
            self._wrong[peer_id, name] = None
            wrong()

        nodes = await self._contacts(hosts, name)
        return await self._parts.fetch_any(nodes, str(memory), name, most_bytes, check, note_wrong)

    def is_put_off(self, memory: MemoryID) -> bool:
        """Whether the memory's parts are not to be fetched now."""
        until, _ = self._put_off.get(memory, (-math.inf, 0.0))
        return time.monotonic() < until

    def put_off(self, memory: MemoryID) -> bool:
        """Pauses fetching for one announcement period, because the memory's first hosts may not be known yet, and for
        twice as long each further time. Returns whether this is the first time.
        """
        is_first = memory not in self._put_off
        _, pause_s = self._put_off.get(memory, (0.0, self._period.seconds / 2))
        pause_s = min(2 * pause_s, _PUT_OFF_S)
        self._put_off[memory] = time.monotonic() + pause_s, pause_s
        return is_first

    def was_complete(self, memory: MemoryID) -> None:
        """Records that the memory's parts have been fetched, and ends the pause."""
        self._put_off.pop(memory, None)

    async def _contacts(self, hosts: Iterable[PeerID], name: bytes) -> list[NodeInfo]:
        """The hosts' contacts, in random order. Those that gave wrong bytes for this part before come last."""
        nodes = list((await self._swarm.registry.nodes(set(hosts) - {self._swarm.host.peer_id})).values())
        self._rng.shuffle(nodes)
        return sorted(nodes, key=lambda node: (node.peer_id, name) in self._wrong)
