"""Which tokens hold no more: a small record that the founder signs, and that every node keeps alive."""

import time
from collections.abc import Callable, Collection

from dht.admission import MAX_REVOKED, SwarmAdmission
from dht.registry import Registry

LIFETIME_S = 30 * 86400.0
"""Of the record: it outlives a founder that is away."""
_RENEW_AFTER_S = LIFETIME_S / 2


class Revocations:
    """A peer's knowledge of them. Does nothing in an open swarm."""

    def __init__(
        self, registry: Registry, admission: SwarmAdmission, now: Callable[[], float] = time.time
    ) -> None:
        self._registry = registry
        self._admission = admission
        self._now = now
        self._record: tuple[bytes, float] | None = None
        """As it is stored, and its expiry."""
        self._published: frozenset[int] = frozenset()

    async def read(self) -> None:
        """What the founder says now. Raises UnreachableError."""
        if self._admission.mode == "open":
            return
        found = await self._registry.find_revocations()
        if found is None:
            return
        serials, record, expires_at = found
        self._admission.revoke(serials)
        if self._record is None or expires_at > self._record[1]:
            self._record = record, expires_at
            self._published = frozenset(serials)

    async def keep(self) -> None:
        """Stores the founder's record again, so that it outlives the peers that held it. Raises UnreachableError."""
        if self._record is not None:
            await self._registry.republish(self._registry.keys.revocations, *self._record)

    async def publish(self, serials: Collection[int]) -> None:
        """By the founder: writes them, when that is news or the record is half-way to its end.

        Raises UnreachableError.
        """
        self._admission.revoke(serials)
        wanted = frozenset(sorted(serials)[:MAX_REVOKED])
        fresh = self._record is not None and self._record[1] > self._now() + _RENEW_AFTER_S
        if self._admission.mode == "open" or (wanted <= self._published and (fresh or not wanted)):
            return
        expires_at = self._now() + LIFETIME_S
        self._record = await self._registry.publish_revocations(wanted, expires_at), expires_at
        self._published = wanted
