"""Founding and joining: from an identity and an invite to a running host, a registry and a checked manifest."""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dht.invite import Invite
from dht.manifest import Manifest
from dht.records import RecordValidator, SwarmKeys
from dht.registry import Registry
from peer.errors import SwarmError
from peer.host import Host
from peer.identity import Identity

logger = logging.getLogger(__name__)

MANIFEST_LIFETIME_S = 30 * 86400.0
_MANIFEST_DEADLINE_S = 20.0
_RETRY_S = 0.5

Stage = Callable[[str], None]
"""Called with what a starting peer does now, in words."""


@dataclass(frozen=True)
class Swarm:
    """A peer's membership in a swarm. `stop` it when done."""

    host: Host
    registry: Registry
    manifest: Manifest
    manifest_record: bytes
    manifest_expires_at: float

    @property
    def keys(self) -> SwarmKeys:
        return self.registry.keys

    async def invite(self) -> Invite:
        """An invite by which others join through this peer."""
        return Invite(self.keys, tuple(await self.host.bootstrap_addresses()))

    async def keep_manifest(self) -> None:
        """Stores the signed manifest again, so that it outlives the peers that held it."""
        await self.registry.republish_manifest(self.manifest_record, self.manifest_expires_at)

    async def stop(self) -> None:
        await self.host.stop()


async def found_swarm(
    identity: Identity,
    manifest: Manifest,
    *,
    listen: str,
    port: int,
    bootstrap: Sequence[str] = (),
    stage: Stage = logger.info,
) -> Swarm:
    """Starts a peer and writes its manifest to the DHT. Raises SwarmError when the name is somebody else's there."""
    stage("starting the DHT")
    host = await Host.start(
        identity, listen=listen, port=port, bootstrap=bootstrap, validator=RecordValidator()
    )
    try:
        registry = Registry(lambda: host.dht, SwarmKeys(manifest.name, identity.peer_id), identity)
        stage("publishing the manifest")
        others = set(await registry.find_manifests()) - {identity.peer_id}
        if others:
            raise SwarmError(
                f"a swarm named {manifest.name!r} exists here already, founded by {others.pop()}: "
                "choose another name in the manifest, or join that swarm with its invite"
            )
        expires_at = time.time() + MANIFEST_LIFETIME_S
        record = await registry.publish_manifest(manifest.to_json(), expires_at)
        return Swarm(host, registry, manifest, record, expires_at)
    except BaseException:
        await host.stop()
        raise


async def join_swarm(
    identity: Identity,
    invite: Invite,
    *,
    listen: str,
    port: int = 0,
    serves_dht: bool = True,
    stage: Stage = logger.info,
) -> Swarm:
    """Starts a peer, joins by the invite and reads the manifest that its author signed.

    Raises UnreachableError when nobody answers, and SwarmError when the manifest is missing or not for this software.
    """
    stage("joining the DHT")
    host = await Host.start(
        identity,
        listen=listen,
        port=port,
        bootstrap=invite.bootstrap,
        validator=RecordValidator(),
        serves_dht=serves_dht,
    )
    try:
        registry = Registry(lambda: host.dht, invite.keys, identity)
        stage("reading the manifest")
        record, expires_at = await _find_manifest(registry, invite)
        manifest = Manifest.from_json(registry.manifest_json(record))
        if manifest.name != invite.keys.name:
            raise SwarmError(f"the manifest is of a swarm named {manifest.name!r}, not {invite.keys.name!r}")
        return Swarm(host, registry, manifest, record, expires_at)
    except BaseException:
        await host.stop()
        raise


async def _find_manifest(registry: Registry, invite: Invite) -> tuple[bytes, float]:
    """A newcomer's first look-ups can miss: its routing table is still filling."""
    deadline = time.monotonic() + _MANIFEST_DEADLINE_S
    while True:
        found = (await registry.find_manifests()).get(invite.keys.author)
        if found is not None:
            return found
        if time.monotonic() > deadline:
            raise SwarmError(
                f"the peers at the invite's addresses know no manifest of swarm {invite.keys.name!r}: "
                "is the invite of a swarm that still runs?"
            )
        await asyncio.sleep(_RETRY_S)
