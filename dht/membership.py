"""Staying in a swarm: known peers on disk, and a watchdog that rejoins through them if this peer is isolated."""

import asyncio
import contextlib
import logging
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path

from pydantic import BaseModel

from dht.registry import Registry
from peer import clock
from peer.errors import AddressError, UnreachableError
from peer.files import read_state_file, write_state_file
from peer.formatting import counted, printable
from peer.host import Host
from peer.identity import PeerID
from peer.transport.addresses import Multiaddress

logger: logging.Logger = logging.getLogger(__name__)

_MAX_PEERS = 64
_MAX_ADDRESSES = 4
"""The most addresses stored for one peer."""
_MAX_FILE_BYTES = 1 << 20
_MEETINGS = 8
"""The most peers whose addresses are recorded in one round."""
_MEET_AGAIN_S = 600.0
_DIAL_EVERY_S = 120.0
"""Seconds between two dials of known peers that the DHT does not return. This way, two halves of a split swarm find
each other.
"""
_ROUNDS_APART = 4
"""In how many calls one look is made for another process with this peer's identity, which takes a look-up."""
_WARN_AGAIN_S = 3600.0
"""Seconds between two warnings that another process runs with this peer's identity."""
_LONELY_ROUNDS = 3
"""After this many rounds without an answer, this peer considers itself alone in its swarm."""


class PeerStore:
    """Addresses of the peers that were met last. If there are too many, the neighbourhood with the most forgets the one
    that was met longest ago: one person may run many peers, and this peer rejoins through those that it knows.
    """

    def __init__(self, path: Path | None) -> None:
        """`path`: where they are saved; None: only in memory. An unreadable file counts as empty."""
        self._path = path
        self._met: dict[PeerID, tuple[tuple[Multiaddress, ...], float]] = {}
        """The peer that was met last comes last."""
        if path is not None:
            read = read_state_file(
                path, _MAX_FILE_BYTES, _File.model_validate_json, "earlier peers are forgotten"
            )
            for met in reversed((read or _File()).peers[:_MAX_PEERS]):
                self.add(_usable(path, met.addresses), met.met_at)
        self._saved: frozenset[Multiaddress] | None = None  # the file's content may be wrong or incomplete

    def add(self, addresses: Iterable[Multiaddress], now: float) -> None:
        """Adds addresses at which peers were alive at this Unix time."""
        by_peer: dict[PeerID, list[Multiaddress]] = {}
        for address in addresses:
            by_peer.setdefault(address.peer_id, []).append(address)
        for peer, listed in by_peer.items():
            self._met.pop(peer, None)
            self._met[peer] = tuple(dict.fromkeys(listed))[:_MAX_ADDRESSES], now
            if len(self._met) > _MAX_PEERS:
                near = {each: addresses[0].endpoint.near for each, (addresses, _) in self._met.items()}
                ((crowd, _),) = Counter(near.values()).most_common(1)
                del self._met[next(each for each in near if near[each] == crowd)]

    def addresses(self) -> list[Multiaddress]:
        """All addresses. Those of the peer that was met last come first."""
        return [address for listed, _ in reversed(self._met.values()) for address in listed]

    def met_at(self, peer: PeerID) -> float:
        """When the peer was last met; minus infinity if it never was."""
        return self._met.get(peer, ((), -math.inf))[1]

    def absent(self, known: Collection[PeerID]) -> list[list[Multiaddress]]:
        """The addresses of each peer that was met and is not in `known`."""
        return [list(listed) for peer, (listed, _) in self._met.items() if peer not in known]

    def save(self) -> None:
        """Writes the addresses to disk atomically if they have changed. A full disk only causes a warning."""
        if self._path is None or (addresses := frozenset(self.addresses())) == self._saved:
            return
        met = [_Met(addresses=list(listed), met_at=met_at) for listed, met_at in reversed(self._met.values())]
        if write_state_file(
            self._path,
            _File(peers=met).model_dump_json(indent=1).encode(),
            "after a restart, peers met lately are forgotten",
        ):
            self._saved = addresses


class Membership:
    """Whether this peer is still in its swarm. `check` it in every announcement period, or `keep` it as a task."""

    def __init__(
        self,
        host: Host,
        registry: Registry,
        peer_store: PeerStore,
        *,
        dial_every_s: float = _DIAL_EVERY_S,
        now: Callable[[], float] = clock.now,
        steady: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
    ) -> None:
        """`now`: Unix time in seconds. `steady`: a clock for pauses, which must not become hours when the machine's
        clock is set back.
        """
        self._host = host
        self._registry = registry
        self._peer_store = peer_store
        self._dial_every_s = dial_every_s
        self._now = now
        self._steady = steady
        self._rng = rng or random.SystemRandom()
        self._dialled_at = steady()
        self._lonely = 0
        """Consecutive rounds in which nobody answered."""
        self._in_vain = 0
        """Consecutive rejoins after which nobody returned this peer's announcement."""
        self._duplicate_until = -math.inf
        """When the last record of another process with this identity expires; minus infinity: none was seen."""
        self._warned_at = -math.inf
        self._rounds_left = 0
        """Until the next look for such a process."""

    async def check(self, announced: bool) -> None:
        """Checks whether other peers see this one, and rejoins through known peers if they don't.

        `announced`: whether its node record should be in the DHT. A trainer has none and only needs peers that answer.
        Raises UnreachableError if nobody answers. It also does so after a rejoin, because everything must then be
        announced again.
        """
        if await self._is_cut_off(announced):
            await self._join_again(announced)
            return
        if self._lonely or self._in_vain:
            logger.info("other peers see this one again")
        self._lonely = self._in_vain = 0
        await self._meet()
        if self._is_time_to_dial():
            await self._dial_one()

    async def look_for_duplicate(self) -> None:
        """Warns if another process runs with this peer's identity. Call it in every announcement period. Raises
        UnreachableError.

        One record of another process may be from before a restart. Only a process that still runs renews it.
        """
        if self._rounds_left:
            self._rounds_left -= 1
            return
        found = await self._registry.duplicate()
        if found is None:
            self._rounds_left = _ROUNDS_APART - 1
            return
        is_renewed = -math.inf < self._duplicate_until < found.expires_at
        self._duplicate_until = max(self._duplicate_until, found.expires_at)
        if is_renewed and self._steady() >= self._warned_at + _WARN_AGAIN_S:
            self._warned_at = self._steady()
            logger.warning(
                "another node runs with this node's identity%s, and each hides the other from the swarm: stop one of "
                "them; for a second node, begin with an empty --state",
                "".join(f" at {address}" for address in found.addresses[:1]),
            )

    async def keep(self, every_s: float) -> None:
        """Checks for ever, for a peer that announces nothing."""
        while True:
            try:
                await asyncio.sleep(every_s)
                await self.check(announced=False)
            except UnreachableError as error:
                logger.warning("%s", error)

    async def _is_cut_off(self, announced: bool) -> bool:
        """A peer that has never met another is not cut off."""
        if not self._host.peers():
            return bool(self._peer_store.addresses())
        return announced and await self._registry.is_seen_by_others() is False

    async def _join_again(self, announced: bool) -> None:
        """Rejoins the swarm. Raises UnreachableError for the first few rounds without success. After that, a node
        continues alone, and tries now and then: it may be the last peer of its swarm, or all others may lie and say
        that they don't know it. If all others have said goodbye, it continues alone at once. A peer that announces
        nothing tries every time, because it is of no use alone.
        """
        gave_up = max(self._lonely, self._in_vain) >= _LONELY_ROUNDS
        if announced and gave_up and not self._is_time_to_dial():
            return
        joined = await self._host.join(self._peer_store.addresses())
        if joined:
            self._lonely = 0
            self._in_vain += announced
            if self._in_vain < _LONELY_ROUNDS:
                why = (
                    "no other peer returned what this one announced" if announced else "no DHT peer was left"
                )
                raise UnreachableError(f"{why}: rejoining through {counted(len(joined), 'known peer')}")
            if self._in_vain == _LONELY_ROUNDS:
                logger.warning(
                    "others answer, but none returns what this peer announced: it continues, and rejoins every %.0f s",
                    self._dial_every_s,
                )
            return
        if announced and not self._lonely and await self._have_all_left():
            self._lonely = _LONELY_ROUNDS
            logger.info(
                "all other nodes have left: this one continues to serve, and looks for others every %.0f s",
                self._dial_every_s,
            )
            return
        self._lonely += 1
        nobody = "no other node" if announced else "no node"
        if self._lonely < _LONELY_ROUNDS:
            raise UnreachableError(f"{nobody} of the swarm answers")
        if self._lonely == _LONELY_ROUNDS:
            logger.warning(
                "%s of the swarm answers: this one continues to %s",
                nobody,
                f"serve, and looks for others every {self._dial_every_s:.0f} s"
                if announced
                else "look for one",
            )

    async def _have_all_left(self) -> bool:
        """Whether all known peers were nodes that said goodbye, according to the records that this peer stores, or that
        the swarm no longer admits.
        """
        known = {address.peer_id for address in self._peer_store.addresses()}
        with contextlib.suppress(UnreachableError):
            nodes = await self._registry.nodes(known, with_left=True)
            left = {
                peer for peer in known if (peer in nodes and nodes[peer].left) or self._registry.why_out(peer)
            }
            return bool(known) and left == known
        return False

    def _is_time_to_dial(self) -> bool:
        if self._steady() < self._dialled_at + self._dial_every_s:
            return False
        self._dialled_at = self._steady()
        return True

    async def _meet(self) -> None:
        """Records the addresses of some DHT peers that were not met recently."""
        now = self._now()
        # one that was met later than now was met before the clock was set back
        due = [p for p in self._host.peers() if not now - _MEET_AGAIN_S <= self._peer_store.met_at(p) <= now]
        for peer in self._rng.sample(due, min(_MEETINGS, len(due))):
            # anybody can list a victim's address, and recorded addresses are dialled and passed on in invites
            self._peer_store.add(self._host.reached_at(peer), now)
        await asyncio.to_thread(self._peer_store.save)

    async def _dial_one(self) -> None:
        """Dials a known peer that the DHT does not return: it may be in the other half of a split swarm."""
        known = self._host.peers() | {self._host.peer_id}
        absent = self._peer_store.absent(known)
        if absent and (joined := await self._host.join(self._rng.choice(absent))):
            logger.info("found a known peer again: %s", joined[0])


class _Met(BaseModel):
    """A peer in the file. Whoever edits it only makes this peer dial others, whose answers are checked as usual."""

    addresses: list[object]
    met_at: float


class _File(BaseModel):
    """The peers that were met, newest first."""

    peers: list[_Met] = []


def _usable(path: Path, listed: list[object]) -> Iterator[Multiaddress]:
    """Drops addresses that an earlier version stored after less strict checks."""
    for text in listed[:_MAX_ADDRESSES]:
        try:
            yield Multiaddress(str(text))
        except AddressError as error:
            logger.warning("dropped %s from %s: %s", printable(str(text)), path, error)
