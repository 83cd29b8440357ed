"""The founder's two signed records: the manifest, and the list of revoked tokens.

Every peer stores them again and again, so that they outlive the peers that held them. The founder signs each of them
again when half of its lifetime has passed. A peer with a state folder saves both there too. So it can restart when
nobody sends it the manifest, and knows from the start which tokens are revoked.
"""

import logging
import random
from collections.abc import Callable, Collection
from pathlib import Path

from dht.admission import MAX_REVOKED, SwarmAdmission
from dht.records import MAX_RECORD_BYTES, FounderRecord
from dht.registry import Registry
from peer import clock
from peer.files import read_state_file, write_state_file

logger: logging.Logger = logging.getLogger(__name__)

LIFETIME_S = 30 * 86400.0
"""The lifetime of both records, in seconds. They stay valid while the founder is away."""
EXPIRES_SOON_S = 7 * 86400.0
"""If the founder does not renew the manifest within this time, nobody can join any more."""
_KEPT_BY = 8
"""How many peers store each of the records again in each round, on average."""
_READ_BY = 500
"""In a large swarm, how many of the DHT's nodes read the list of revoked tokens near its key in each round, on average.
The others ask a random node.
"""
_TOLD = 8
"""How many nodes a peer tells when it learns of a new list."""
_RENEW_AFTER_S = LIFETIME_S / 2
_LOOK_EVERY_S = 3600.0
"""How often other peers look for a newer manifest record, in the second half of its lifetime."""


class ManifestRecord:
    """One peer's copy of the manifest's record."""

    def __init__(
        self,
        registry: Registry,
        newest: FounderRecord,
        file: "RecordFile | None" = None,
        now: Callable[[], float] = clock.now,
    ) -> None:
        """`file`: where the newest record is saved."""
        self.newest = newest
        self._registry = registry
        self._now = now
        self._file = file or RecordFile(None)
        self._file.save(newest.data)
        self._looked_at = 0.0
        self._rng = random.SystemRandom()

    @property
    def expires_at(self) -> float:
        return self.newest.expires_at

    @property
    def warning(self) -> str:
        """A warning in words if the founder should have renewed the manifest long ago; else empty."""
        left_s = self.expires_at - self._now()
        if left_s >= EXPIRES_SOON_S:
            return ""
        return (
            f"nobody can join this swarm in {max(left_s, 0.0) / 86400:.1f} days, "
            "unless its founder runs a node with its key before"
        )

    async def republish(self) -> None:
        """Stores the record again. The founder first renews it when that is due. Raises UnreachableError."""
        now = self._now()
        is_founder = self._registry.peer_id == self._registry.keys.author
        is_due = is_founder and now >= self.expires_at - _RENEW_AFTER_S
        if is_due:
            self._take(self._registry.sign_manifest(self.newest.payload.manifest_json, now + LIFETIME_S))
        elif await self.look() and (warning := self.warning):
            logger.warning("%s", warning)
        if is_due or _is_drawn(_KEPT_BY, self._registry, self._rng):
            await self._registry.republish(self.newest)

    async def look(self) -> bool:
        """Adopts a newer record if there is one. It looks once an hour, in the second half of the lifetime, and returns
        whether it did. Raises UnreachableError.
        """
        now = self._now()
        if now < max(self.expires_at - _RENEW_AFTER_S, self._looked_at + _LOOK_EVERY_S):
            return False
        self._looked_at = now
        found = await self._registry.find_founder_record(self._registry.keys.manifest)
        if found is not None and found.expires_at > self.expires_at:
            self._take(found)
        return True

    def _take(self, record: FounderRecord) -> None:
        self.newest = record
        self._file.save(record.data)


def _is_drawn(number: int, registry: Registry, rng: random.Random) -> bool:
    """Whether this peer is among so many that are drawn at random. If all peers read or stored a founder's record in
    each round, they would flood its few holders.
    """
    return rng.random() * registry.lookups.estimated_nodes < number


class RecordFile:
    """A founder's signed record on disk."""

    def __init__(self, path: Path | None) -> None:
        """`path`: None if nothing is to be saved."""
        self.path = path
        self._saved: bytes | None = None

    def read(self) -> bytes | None:
        """The record saved last, which may no longer be valid; None if there is none, or if it can't be read."""
        if self.path is not None:
            lost = "the DHT is asked for that record"
            self._saved = read_state_file(self.path, MAX_RECORD_BYTES + 1, bytes, lost)
        return self._saved

    def save(self, data: bytes) -> None:
        """Writes the record if it has changed. A full disk only causes a warning."""
        if (
            self.path is not None
            and data != self._saved
            and write_state_file(self.path, data, "after a restart, the DHT is asked for that record")
        ):
            self._saved = data


class Revocations:
    """One peer's copy of the list of revoked tokens. Does nothing in an open swarm.

    Whoever learns of a new list tells some others, so the nodes of the DHT know it within seconds. Other peers, and
    those that nobody has told, ask now and then.
    """

    def __init__(
        self,
        registry: Registry,
        admission: SwarmAdmission,
        file: "RecordFile | None" = None,
        rng: random.Random | None = None,
    ) -> None:
        """Applies the record on disk at once. `file`: where the newest record is saved."""
        self._registry = registry
        self._admission = admission
        self._file = file or RecordFile(None)
        self._rng = rng or random.SystemRandom()
        self._newest: FounderRecord | None = None
        self._has_read = False
        """Whether it has looked since it started. What it finds later is new to others too."""
        if (saved := registry.read_founder_record(registry.keys.revocations, self._file.read())) is not None:
            self._take(saved)

    async def read(self) -> None:
        """Reads the founder's current list. Raises UnreachableError."""
        if self._admission.mode == "open":
            return
        if (found := await self._registry.find_founder_record(self._registry.keys.revocations)) is not None:
            self._take(found)
        self._has_read = True

    async def refresh(self) -> None:
        """Looks whether there is a newer list. Call it in every round. Raises UnreachableError."""
        if self._admission.mode == "open":
            return
        key = self._registry.keys.revocations
        if _is_drawn(_READ_BY, self._registry, self._rng) or not await self._registry.ask_one(key):
            await self.read()
        else:
            self.hear()
            self._has_read = True

    def hear(self) -> None:
        """Applies the list that this peer stores as a node of the DHT, if it is newer: others may have told it."""
        if (found := self._registry.stored_founder_record(self._registry.keys.revocations)) is not None:
            self._take(found)

    async def keep(self) -> None:
        """Stores the founder's record again, but not in every round. Raises UnreachableError."""
        if self._newest is not None and _is_drawn(_KEPT_BY, self._registry, self._rng):
            await self._registry.republish(self._newest)

    async def publish(self, serials: Collection[int], expired: Collection[int] = ()) -> None:
        """For the founder: signs and stores the list if it is new, or if half of the record's lifetime has passed.

        `serials`: those that the founder's ledger says are revoked. What was published before stays in the list, unless
        it is in `expired`: the ledger may be from an older backup, or lost. Raises UnreachableError.
        """
        self._admission.revoke(serials)
        if self._admission.mode == "open":
            return
        if not self._has_read:
            await self.read()
        now, published, until = clock.now(), frozenset[int](), 0.0
        if self._newest is not None:
            published = frozenset(self._newest.payload.revocations.serials)
            until = self._newest.expires_at
        others = published.difference(serials, expired)
        wanted = frozenset([*sorted(serials), *sorted(others)][:MAX_REVOKED])
        is_fresh = until > now + _RENEW_AFTER_S
        if wanted <= published and (is_fresh or not wanted):
            return
        # later than the last one, even if the clock was set back: of two records, peers keep the one that expires last
        record = self._registry.sign_revocations(wanted, max(now + LIFETIME_S, until + 1.0))
        await self._registry.republish(record)
        self._has_read = True
        self._take(record)

    def _take(self, record: FounderRecord) -> None:
        """Applies a record, unless this peer has it or a later one."""
        known = frozenset[int]()
        if self._newest is not None:
            if record.expires_at <= self._newest.expires_at:
                return
            known = frozenset(self._newest.payload.revocations.serials)
        self._newest = record
        self._admission.revoke(record.payload.revocations.serials)
        self._file.save(record.data)
        if self._has_read and not known.issuperset(record.payload.revocations.serials):
            self._registry.tell(record, _TOLD)
