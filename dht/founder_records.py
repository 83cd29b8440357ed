"""The founder's signed record of the manifest: every peer keeps it alive, and the founder signs it anew half-way."""

import logging
import time
from collections.abc import Callable

from dht.registry import Registry

logger = logging.getLogger(__name__)

MANIFEST_LIFETIME_S = 30 * 86400.0
_RENEW_AFTER_S = MANIFEST_LIFETIME_S / 2
_LOOK_EVERY_S = 3600.0
"""How often the others look for a later record than theirs, in its second half."""
EXPIRES_SOON_S = 7 * 86400.0
"""The founder must come by before: then nobody can join."""


class ManifestRecord:
    """As a peer of the swarm has it."""

    def __init__(
        self, registry: Registry, data: bytes, expires_at: float, now: Callable[[], float] = time.time
    ) -> None:
        self.data = data
        """As it is stored."""
        self.expires_at = expires_at
        self._registry = registry
        self._now = now
        self._manifest_json = registry.manifest_json(data)
        self._looked_at = 0.0

    @property
    def warning(self) -> str:
        """In words, when the founder should have signed it anew long since; else empty."""
        left_s = self.expires_at - self._now()
        if left_s >= EXPIRES_SOON_S:
            return ""
        return (
            f"nobody can join this swarm in {max(left_s, 0.0) / 86400:.1f} days, "
            "unless its founder runs a node with its key before"
        )

    async def keep(self) -> None:
        """Stores it again, so that it outlives the peers that held it. Raises UnreachableError."""
        keys, now = self._registry.keys, self._now()
        if self._registry.peer_id == keys.author and now >= self.expires_at - _RENEW_AFTER_S:
            expires_at = now + MANIFEST_LIFETIME_S
            self.data = await self._registry.publish_manifest(self._manifest_json, expires_at)
            self.expires_at = expires_at
            return
        if await self.look() and (warning := self.warning):
            logger.warning("%s", warning)
        await self._registry.republish(keys.manifest, self.data, self.expires_at)

    async def look(self) -> bool:
        """Takes a later record when there is one. Says whether it looked: once in a while, in this one's second half.

        Raises UnreachableError.
        """
        now = self._now()
        if now < max(self.expires_at - _RENEW_AFTER_S, self._looked_at + _LOOK_EVERY_S):
            return False
        self._looked_at = now
        found = (await self._registry.find_manifests()).get(self._registry.keys.author)
        if found is not None and found[1] > self.expires_at:
            self.data, self.expires_at = found
        return True
