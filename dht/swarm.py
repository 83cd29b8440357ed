"""Founding and joining a swarm: from an identity and an invite to a running host, a registry and a checked manifest."""

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

from prometheus_client import CollectorRegistry

from dht.admission import Denylist, Role, SwarmAdmission, no_longer_admitted
from dht.announcements import NodeInfo
from dht.experts import ExpertRegistry
from dht.founder_records import LIFETIME_S, ManifestRecord, RecordFile, Revocations
from dht.invites import Invite
from dht.manifest import Manifest
from dht.membership import Membership, PeerStore
from dht.records import FounderRecord, RecordValidator, SwarmKeys, open_old_record, writers_key
from dht.registry import Registry, some_of
from peer import clock
from peer.errors import InviteError, RecordError, SwarmError, UnreachableError
from peer.host import Host, NetworkConfig
from peer.identity import Identity, PeerID
from peer.metrics import new_registry
from peer.parsing import ParseGuard
from peer.rpc.sessions import Right, SessionClient
from peer.transport.addresses import Multiaddress
from peer.transport.dialling import Dialling, nearest_scope
from peer.wire import admission_pb2

logger: logging.Logger = logging.getLogger(__name__)

_MANIFEST_DEADLINE_S = 20.0
_RETRY_S = 0.5
_LOOKS = 3
"""How often a peer looks for the manifest before it uses its own copy, or a founder founds a new swarm."""
_REMEMBERED_TRIED = 64
"""The most addresses from earlier runs that are tried at the start."""
SMALL_SWARM = 512
"""In a DHT with this many nodes or fewer, all lists of nodes are read at once."""
OTHERS_IN_INVITE = 4
"""The most addresses of other peers in an invite."""

_MANIFESTS = "manifests"
"""The folder with the manifests of the swarms that a peer has been in."""
_MOST_DIFFERENCES = 4
"""How many keys are named that differ in a founder's manifest."""

_EXPIRES_AT = attrgetter("expires_at")

Stage = Callable[[str], None]
"""Called with the next stage of a peer's start, in words."""


@dataclass(frozen=True)
class Swarm:
    """A peer's membership in a swarm. `stop` it when done."""

    host: Host
    registry: Registry
    experts: ExpertRegistry
    manifest: Manifest
    manifest_record: ManifestRecord
    membership: Membership
    peer_store: PeerStore
    admission: SwarmAdmission
    revocations: Revocations
    guard: ParseGuard
    """Guards all parsers of strangers' messages."""
    metrics: CollectorRegistry
    """The metrics of this peer in this swarm."""

    @property
    def keys(self) -> SwarmKeys:
        return self.registry.keys

    def session_client(self, *rights: Right) -> SessionClient:
        """Opens sessions with these rights, and shows this peer's badge."""
        return SessionClient(self.host.identity, self.keys.swarm_id, rights, self.admission)

    async def invite(self) -> Invite:
        """An invite by which others join through this peer or, if it is gone, through peers that it has met. Those that
        are online now come first.
        """
        own, online = Invite(self.keys, tuple(self.host.bootstrap_addresses())), self.host.peers()
        met = _allowed(self.peer_store, self.host.dialling)
        met.sort(key=lambda address: address.peer_id not in online)
        return own.through(after=met[:OTHERS_IN_INVITE])

    async def keep_manifest(self) -> None:
        """Stores the founder's records again, so that they outlive their holders. The founder also renews them."""
        await self.manifest_record.republish()
        await self.revocations.keep()

    async def refresh_admission(self) -> None:
        """Reads the denylist and, in a swarm that admits by token, looks for newly revoked tokens. Warns the owner if
        this peer's own token expires soon. Raises UnreachableError.
        """
        self.admission.warn_of_expiry()
        self.admission.denylist.reread()
        await self.revocations.refresh()

    async def keep_admission(self, every_s: float, then: Callable[[], None]) -> None:
        """Refreshes admission for ever, and calls `then` each time. If the DHT does not answer, the old state stays."""
        while True:
            await asyncio.sleep(every_s)
            with contextlib.suppress(UnreachableError):
                await self.refresh_admission()
            then()

    async def stop(self) -> None:
        await self.host.stop()


async def found_swarm(
    identity: Identity,
    manifest: Manifest,
    config: NetworkConfig,
    *,
    given: Collection[str] | None = None,
    bootstrap: Sequence[Multiaddress] = (),
    state: Path | None = None,
    denylist: Denylist | None = None,
    stage: Stage = logger.info,
) -> Swarm:
    """Starts a peer and publishes its manifest. A founder that returns finds its swarm's manifest in the DHT or on
    disk.

    `given`: the keys that the founder's file sets. The others keep the values with which the swarm was founded, because
    another release may complete the file with other ones. None: all keys were given. `state`: the folder for the
    manifest and the addresses of known peers. Raises SwarmError if the manifest is not the one that the swarm was
    founded with.
    """
    peer = _Peer(identity, SwarmKeys(manifest.name, identity.peer_id), state, denylist)
    if (founded_with := _founded_with(peer.manifest_file, peer.keys)) is not None:
        manifest = _continued(founded_with, manifest, given)
    stage("starting the DHT")
    host = await peer.start(config, bootstrap)
    try:
        registry = peer.registry(host)
        stage("publishing the manifest")
        joined = bool(host.bootstrapped_from)
        manifest, record = await _own_manifest(registry, manifest, given, peer.manifest_file, joined)
        return peer.member(host, registry, manifest, record)
    except BaseException:
        await host.stop()
        raise


async def join_swarm(
    identity: Identity,
    invite: Invite,
    config: NetworkConfig,
    *,
    state: Path | None = None,
    roles: Sequence[Role] = (),
    exports: bool = False,
    denylist: Denylist | None = None,
    stage: Stage = logger.info,
) -> Swarm:
    """Starts a peer, joins by the invite or by known peers, and reads the manifest that its author signed.

    `state`: the folder for the manifest and the addresses of known peers. `roles`: the roles in which it takes part; if
    empty, it only reads. `exports`: it is to export the model, so only those of the roles count that may. Raises
    UnreachableError if nobody answers, SwarmError if the manifest is missing or not for this software, and InviteError
    if the invite's token gives none of the roles.
    """
    stage("joining the DHT")
    peer = _Peer(identity, invite.keys, state, denylist)
    host = await peer.start(config, invite.bootstrap)
    try:
        registry = peer.registry(host)
        stage("reading the manifest")
        record = await _find_manifest(registry, peer.manifest_file)
        manifest = _manifest_in(record)
        if manifest.name != invite.keys.name:
            raise SwarmError(
                f"the manifest is of a swarm named {manifest.name!r}, not {invite.keys.name!r}: ask for a new invite"
            )
        swarm = peer.member(host, registry, manifest, record)
        await _present_token(swarm, invite, roles, exports)
        return swarm
    except BaseException:
        await host.stop()
        raise


def known_peers(invite: Invite, state: Path) -> list[Multiaddress]:
    """Addresses of peers that a peer with this folder has met, the last one first, without those that people who join
    by the invite can't reach.
    """
    nearest = nearest_scope(address.endpoint for address in invite.bootstrap)
    return _allowed(_peer_store(state, invite.keys), Dialling(nearest))


def with_known_peers(invite: Invite, state: Path) -> Invite:
    """The invite with some of the `known_peers`: it is of use even if nobody answers at its own addresses."""
    return invite.through(after=known_peers(invite, state)[:OTHERS_IN_INVITE])


def _allowed(store: PeerStore, dialling: Dialling) -> list[Multiaddress]:
    return [address for address in store.addresses() if dialling.allows(address.endpoint)]


def was_member(state: Path, keys: SwarmKeys) -> bool:
    """Whether a peer with this folder has met other peers of the swarm."""
    return bool(_peer_store(state, keys).addresses())


def other_swarms(state: Path, keys: SwarmKeys) -> list[str]:
    """The ids of the other swarms that a peer with this folder has been in."""
    try:
        names = os.listdir(state / _MANIFESTS)
    except OSError:
        return []
    # those that begin with a dot are half-written
    return sorted(name for name in names if name != keys.swarm_id and not name.startswith("."))


async def some_nodes(swarm: Swarm, most: int) -> dict[PeerID, NodeInfo]:
    """At most so many other nodes of the swarm: up to half of them from the routing table, and the others drawn from
    the lists in the DHT. Raises UnreachableError.
    """
    # the lists are not signed: thousands of names may be made up, but nodes in the routing table have answered
    me, registry = swarm.host.peer_id, swarm.registry
    known = {*some_of(swarm.host.peers() - {me}, most // 2)}
    is_small = registry.lookups.estimated_nodes <= SMALL_SWARM
    listed = await (registry.node_ids(SMALL_SWARM) if is_small else registry.some_node_ids(most))
    return await registry.nodes(known.union(some_of(listed - known - {me}, most - len(known))))


def _peer_store(state: Path | None, keys: SwarmKeys) -> PeerStore:
    return PeerStore(None if state is None else state / "peers" / f"{keys.swarm_id}.json")


class _Peer:
    """The parts of a peer that exist before it knows the manifest."""

    def __init__(
        self, identity: Identity, keys: SwarmKeys, state: Path | None, denylist: Denylist | None
    ) -> None:
        self._identity = identity
        self.keys = keys
        self._store = _peer_store(state, keys)
        self._folder = state
        self.manifest_file = self._record_file(_MANIFESTS)
        self._admission = SwarmAdmission(keys, denylist)
        self._metrics = new_registry()
        self._guard = ParseGuard(self._metrics)

    async def start(self, config: NetworkConfig, bootstrap: Sequence[Multiaddress]) -> Host:
        return await Host.start(
            self._identity,
            config,
            bootstrap=bootstrap,
            remembered=self._store.addresses()[:_REMEMBERED_TRIED],
            swarm_id=self.keys.swarm_id,
            admission=self._admission,
            validator=RecordValidator(rule=self._admission.check_record, swarm_id=self.keys.swarm_id),
            metrics=self._metrics,
            guard=self._guard,
        )

    def registry(self, host: Host) -> Registry:
        return Registry(
            host.dht,
            self.keys,
            self._identity,
            self._admission,
            guard=self._guard,
            metrics=self._metrics,
        )

    def _record_file(self, kind: str) -> RecordFile:
        return RecordFile(None if self._folder is None else self._folder / kind / self.keys.swarm_id)

    def member(self, host: Host, registry: Registry, manifest: Manifest, record: FounderRecord) -> Swarm:
        """`record`: the manifest's."""
        self._store.add(host.bootstrapped_from, clock.now())
        self._store.save()  # a short run may end before it meets others
        rules = manifest.admission
        exporters = (Role[word.upper()] for word in rules.export)
        self._admission.learn(writers_key(record.data), rules.mode, exporters)
        return Swarm(
            host,
            registry,
            ExpertRegistry(registry, manifest),
            manifest,
            ManifestRecord(registry, record, self.manifest_file),
            Membership(host, registry, self._store),
            self._store,
            self._admission,
            Revocations(registry, self._admission, self._record_file("revocations")),
            self._guard,
            self._metrics,
        )


async def _present_token(swarm: Swarm, invite: Invite, roles: Sequence[Role], exports: bool) -> None:
    """Makes this peer's badge from the invite's token, if it needs one. Raises InviteError.

    A peer that only reads needs none, but its owner is warned if the token has expired.
    """
    if swarm.admission.mode == "open" or swarm.host.peer_id == swarm.keys.author:
        return
    with contextlib.suppress(UnreachableError):  # in that case, the revocation is seen later
        await swarm.revocations.read()
    if not roles:
        try:
            invite.check_expiry()
        except InviteError as error:
            logger.warning("%s", error)
        return
    purpose = ""
    if exports:
        purpose = "to export its model, "
        roles = [role for role in roles if role.word in swarm.manifest.admission.export]
        if not roles:
            raise InviteError(
                "this swarm's manifest lets nobody export the model: ask its founder for a copy"
            )
    *others, last = (role.word for role in roles)
    wanted = f"{', '.join(others)} or {last}" if others else last
    if not invite.token:
        raise InviteError(
            f"this swarm admits by token: {purpose}ask its founder for an invite of your own, for a {wanted}. If you "
            "have one, pass it as --join, and this one as --bootstrap"
        )
    token = admission_pb2.Token.FromString(invite.token)
    try:
        role = swarm.admission.present(token, swarm.host.peer_id).role
    except RecordError as error:
        raise no_longer_admitted(error) from error
    if role not in roles:
        raise InviteError(
            f"this invite is for a {role.word}, not for a {wanted}: {purpose}ask the swarm's founder for another"
        )


def _founded_with(file: RecordFile, keys: SwarmKeys) -> Manifest | None:
    """The manifest that the founder with this file published last, even if it has expired since; None if there is none.

    Raises SwarmError if a later release has published it, and this one can't read it.
    """
    data = file.read()
    if data is None:
        return None
    try:
        payload = open_old_record(data, keys.manifest, keys.author)
    except RecordError:
        return None
    return Manifest.from_own_json(payload.manifest_json)


def _continued(founded_with: Manifest, manifest: Manifest, given: Collection[str] | None) -> Manifest:
    """The manifest that the swarm was founded with. `given`: see `found_swarm`. Raises SwarmError if a given key
    differs.
    """
    differences = founded_with.differences(manifest)
    given = differences if given is None else given
    if changed := [f"{key} {how}" for key, how in differences.items() if key in given]:
        more = len(changed) - _MOST_DIFFERENCES
        raise SwarmError(
            f"your swarm {manifest.name!r} was founded with another manifest: in that one, "
            f"{', '.join(changed[:_MOST_DIFFERENCES])}{f', and {more} more differ' if more > 0 else ''}. A swarm's "
            "manifest can't change: pass the original file, or choose another name in this one and pass another --state"
        )
    if differences:
        kept = ", ".join(f"{key} {how}" for key, how in differences.items())
        logger.warning(
            "the swarm keeps the values that it was founded with, which your file leaves out: %s", kept
        )
    return founded_with


async def _own_manifest(
    registry: Registry, manifest: Manifest, given: Collection[str] | None, file: RecordFile, joined: bool
) -> tuple[Manifest, FounderRecord]:
    """The founder's manifest and its record: the newest in the DHT or on disk, or a new one.

    `given`: see `found_swarm`. `joined`: whether other peers answered. Raises SwarmError if another manifest was
    published.
    """
    found, saved = await _look_for_manifest(registry, _LOOKS if joined else 1), _saved(registry, file)
    record = max(filter(None, (found, saved)), key=_EXPIRES_AT, default=None)
    if record is None:
        record = registry.sign_manifest(manifest.to_json(), clock.now() + LIFETIME_S)
    else:
        manifest = _continued(_manifest_in(record), manifest, given)
    try:
        await registry.republish(record)
    except UnreachableError as error:
        logger.warning("the manifest is not published yet: %s", error)  # `keep_manifest` publishes it again
    return manifest, record


async def _find_manifest(registry: Registry, file: RecordFile) -> FounderRecord:
    """The newest record of the manifest, in the DHT or on disk. Without one on disk, it looks for longer."""
    saved = _saved(registry, file)
    if saved is not None:
        found = await _look_for_manifest(registry, _LOOKS)
        return max(filter(None, (found, saved)), key=_EXPIRES_AT)
    deadline = time.monotonic() + _MANIFEST_DEADLINE_S
    while (found := await _look_for_manifest(registry, 1)) is None:
        if time.monotonic() > deadline:
            raise SwarmError(
                f"the peers at the invite's addresses know no manifest of swarm {registry.keys.name!r}: "
                f"it has ended, or was founded again; ask its founder for a new invite{clock.CLOCK.doubt}"
            )
        await asyncio.sleep(_RETRY_S)
    return found


async def _look_for_manifest(registry: Registry, looks: int) -> FounderRecord | None:
    """Looks several times: a new peer's first look-ups may fail, because its routing table is still filling."""
    for look in range(looks):
        if look:
            await asyncio.sleep(_RETRY_S)
        with contextlib.suppress(UnreachableError):
            if (found := await registry.find_founder_record(registry.keys.manifest)) is not None:
                return found
    return None


def _saved(registry: Registry, file: RecordFile) -> FounderRecord | None:
    """The record on disk, unless it has expired or is from a release with another protocol version."""
    record = registry.read_founder_record(registry.keys.manifest, file.read())
    try:
        if record is not None:
            _manifest_in(record)
    except SwarmError as error:
        logger.warning("%s is not used: %s", file.path, error)
        return None
    return record


def _manifest_in(record: FounderRecord) -> Manifest:
    """Raises SwarmError if the manifest is not for this software."""
    return Manifest.from_json(record.payload.manifest_json)
