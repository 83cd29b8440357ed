"""Founding and joining: from an identity and an invite to a running host, a registry and a checked manifest."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dht.acquaintances import Acquaintances
from dht.invite import Invite
from dht.manifest import Manifest
from dht.membership import Membership
from dht.records import RecordValidator, SwarmKeys
from dht.registry import Registry
from peer.errors import SwarmError, UnreachableError
from peer.host import Host
from peer.identity import Identity

logger = logging.getLogger(__name__)

MANIFEST_LIFETIME_S = 30 * 86400.0
_MANIFEST_DEADLINE_S = 20.0
_RETRY_S = 0.5
_FOUNDER_LOOKS = 3
"""How often a founder looks for its swarm before it founds it."""
_REMEMBERED_TRIED = 64
"""Most addresses from earlier runs that are tried at the start."""
_OTHERS_IN_INVITE = 4
"""Most addresses of others in an invite, beside this peer's own."""

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
    membership: Membership
    acquaintances: Acquaintances

    @property
    def keys(self) -> SwarmKeys:
        return self.registry.keys

    async def invite(self) -> Invite:
        """An invite by which others join through this peer, or through some that it met when it is gone."""
        own = await self.host.bootstrap_addresses()
        return Invite(self.keys, (*own, *self.acquaintances.addresses()[:_OTHERS_IN_INVITE]))

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
    announce: str | None = None,
    maps_port: bool = False,
    bootstrap: Sequence[str] = (),
    state: Path | None = None,
    stage: Stage = logger.info,
) -> Swarm:
    """Starts a peer and writes its manifest to the DHT, or finds it there: a founder comes back to its swarm.

    `announce`, `maps_port`: as in Host. `state`: folder in which the peers that were met are kept.
    Raises SwarmError when the name is somebody else's there, or the manifest is not the one that the swarm was founded
    with.
    """
    stage("starting the DHT")
    keys = SwarmKeys(manifest.name, identity.peer_id)
    acquaintances = _acquaintances(state, keys)
    host = await Host.start(
        identity,
        listen=listen,
        port=port,
        announce=announce,
        maps_port=maps_port,
        bootstrap=bootstrap,
        remembered=acquaintances.addresses()[:_REMEMBERED_TRIED],
        validator=RecordValidator(),
    )
    try:
        registry = Registry(lambda: host.dht, keys, identity)
        stage("publishing the manifest")
        record, expires_at = await _own_manifest(registry, manifest, _FOUNDER_LOOKS if host.joined_by else 1)
        return _member(host, registry, acquaintances, manifest, record, expires_at)
    except BaseException:
        await host.stop()
        raise


async def join_swarm(
    identity: Identity,
    invite: Invite,
    *,
    listen: str,
    port: int = 0,
    announce: str | None = None,
    maps_port: bool = False,
    serves_dht: bool = True,
    state: Path | None = None,
    stage: Stage = logger.info,
) -> Swarm:
    """Starts a peer, joins by the invite or by peers met before, and reads the manifest that its author signed.

    `announce`, `maps_port`: as in Host. `state`: folder in which the peers that were met are kept.
    Raises UnreachableError when nobody answers, and SwarmError when the manifest is missing or not for this software.
    """
    stage("joining the DHT")
    acquaintances = _acquaintances(state, invite.keys)
    host = await Host.start(
        identity,
        listen=listen,
        port=port,
        announce=announce,
        maps_port=maps_port,
        bootstrap=invite.bootstrap,
        remembered=acquaintances.addresses()[:_REMEMBERED_TRIED],
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
        return _member(host, registry, acquaintances, manifest, record, expires_at)
    except BaseException:
        await host.stop()
        raise


def _acquaintances(state: Path | None, keys: SwarmKeys) -> Acquaintances:
    return Acquaintances(None if state is None else state / "peers" / f"{keys.swarm_id}.json")


def _member(
    host: Host,
    registry: Registry,
    acquaintances: Acquaintances,
    manifest: Manifest,
    record: bytes,
    expires_at: float,
) -> Swarm:
    acquaintances.meet(host.joined_by, time.time())
    membership = Membership(host, registry, acquaintances)
    return Swarm(host, registry, manifest, record, expires_at, membership, acquaintances)


async def _own_manifest(registry: Registry, manifest: Manifest, looks: int) -> tuple[bytes, float]:
    """The founder's record of the manifest and its expiry: as it is in the DHT, else a new one."""
    me = registry.keys.author
    found = await registry.find_manifests()
    for _ in range(looks - 1):  # a newcomer's first look-ups can miss
        if me not in found:
            await asyncio.sleep(_RETRY_S)
            found = await registry.find_manifests()
    others = found.keys() - {me}
    if me in found:
        record, expires_at = found[me]
        if Manifest.from_json(registry.manifest_json(record)) != manifest:
            raise SwarmError(
                f"your swarm {manifest.name!r} still runs, with another manifest: pass the one that it was founded "
                "with, or choose another name in it"
            )
        if expires_at > time.time() + MANIFEST_LIFETIME_S / 2:
            return record, expires_at
    elif others:
        raise SwarmError(
            f"a swarm named {manifest.name!r} exists here already, founded by {others.pop()}: "
            "choose another name in the manifest, or join that swarm with its invite"
        )
    expires_at = time.time() + MANIFEST_LIFETIME_S
    return await registry.publish_manifest(manifest.to_json(), expires_at), expires_at


async def _find_manifest(registry: Registry, invite: Invite) -> tuple[bytes, float]:
    """A newcomer's first look-ups can miss: its routing table is still filling."""
    deadline = time.monotonic() + _MANIFEST_DEADLINE_S
    while True:
        with contextlib.suppress(UnreachableError):
            found = (await registry.find_manifests()).get(invite.keys.author)
            if found is not None:
                return found
        if time.monotonic() > deadline:
            raise SwarmError(
                f"the peers at the invite's addresses know no manifest of swarm {invite.keys.name!r}: "
                "is the invite of a swarm that still runs?"
            )
        await asyncio.sleep(_RETRY_S)
