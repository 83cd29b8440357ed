"""A forger in the swarm: a peer that checks nothing, stores anything and answers with it.

No honest expert disappears, and nobody is mistaken for another.
"""

import asyncio
import math
import random
import time
from collections.abc import Collection, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from raw_dht import Gullible, read_raw, store_raw

from dht.announcements import NodeInfo, Replica, ReplicaAnnouncement, ReplicaState
from dht.directory import Directory
from dht.experts import ExpertRegistry
from dht.manifest import Manifest
from dht.records import RecordValidator, SwarmKeys, sign_record
from dht.regions import Prefix
from dht.registry import Registry
from dht.uid import UID
from peer import PROTOCOL_VERSION, SOFTWARE_VERSION
from peer.host import Host, NetworkConfig
from peer.identity import Identity, PeerID, peer_id_of
from peer.kademlia.validation import Validator
from peer.loop import LoopThread
from peer.transport.addresses import Multiaddress
from peer.wire import records_pb2

MANIFEST = Manifest.model_validate(
    {"name": "swarm", "model": {"layers": 2}, "experts": {"grid": (3, 4)}, "routing": {"top_k": 2}}
)
UIDS = MANIFEST.uids()
LIFETIME_S = 60.0


@dataclass
class Swarm:
    """Two honest peers, the first of which hosts all experts, and a forger."""

    hosts: list[Host]
    keys: SwarmKeys

    def registry(self, n: int) -> Registry:
        return Registry(self.hosts[n].dht, self.keys, self.hosts[n].identity)

    def experts(self, n: int) -> ExpertRegistry:
        return ExpertRegistry(self.registry(n), MANIFEST)

    async def forge(self, key: str, subkey: object, value: object, expires_at: float) -> None:
        """Offers an entry to all peers, and puts it into the forger's own store, which answers everybody with it."""
        await store_raw(self.hosts[2], key, subkey, value, expires_at)


@pytest.fixture(scope="module")
def swarm(loop: LoopThread, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swarm]:
    folder = tmp_path_factory.mktemp("identities")
    hosts: list[Host] = []

    async def start() -> Swarm:
        bootstrap: list[Multiaddress] = []
        validators: tuple[Validator, ...] = RecordValidator(), RecordValidator(), Gullible()
        for n, validator in enumerate(validators):
            identity = Identity.load_or_create(folder / f"{n}.key")
            hosts.append(
                await Host.start(
                    identity, NetworkConfig("127.0.0.1"), bootstrap=bootstrap, validator=validator
                )
            )
            bootstrap = bootstrap or hosts[0].bootstrap_addresses()
        return Swarm(hosts, SwarmKeys("swarm", hosts[0].peer_id))

    try:
        yield loop.run(start(), 120)
    finally:
        for host in reversed(hosts):
            loop.run(host.stop(), 120)


@pytest.fixture
def run(loop: LoopThread, swarm: Swarm) -> Any:
    def run(scenario: Coroutine[Any, Any, None]) -> None:
        loop.run(scenario, 60)

    async def announce() -> None:
        honest = swarm.experts(0)
        await honest.announce([ReplicaAnnouncement(uid, ReplicaState.SERVING, 7) for uid in UIDS], LIFETIME_S)
        await honest.registry.publish_node(node_record(swarm.hosts[0].identity), LIFETIME_S)

    run(announce())
    return run


def node_record(identity: Identity, **changes: Any) -> records_pb2.NodeRecord:
    fields: dict[str, Any] = {
        "addresses": ["127.0.0.1:50051"],
        "certificate": identity.make_certificate(),
        "protocol_version": PROTOCOL_VERSION,
        "software_version": SOFTWARE_VERSION,
        **changes,
    }
    return records_pb2.NodeRecord(**fields)


def announcement(key: str, expires_at: float, state: int) -> records_pb2.RecordPayload:
    body = records_pb2.Announcement(state=state)  # type: ignore[arg-type]  # any number fits
    return records_pb2.RecordPayload(key=key, expires_at=expires_at, announcement=body)


async def see_only_honest(swarm: Swarm) -> None:
    """Checks what another honest peer sees: each expert at the peer that announced it, and each node with its
    own key.
    """
    directory, honest = Directory(swarm.experts(1), MANIFEST, refresh_every_s=60), swarm.hosts[0].peer_id
    await directory.refresh()
    view = await directory.refresh()  # The first reading of a small grid uses no prefixes.
    assert {uid for uid in UIDS if honest in {r.peer_id for r in view.hosts(uid)}} == set(UIDS)
    assert view.nodes.keys() <= {honest, swarm.hosts[2].peer_id}
    for peer_id, node in view.nodes.items():
        key = x509.load_pem_x509_certificate(node.certificate_pem).public_key()
        data = key.public_bytes(serialization.Encoding.X962, serialization.PublicFormat.CompressedPoint)
        assert peer_id_of(data) == peer_id
    assert (await swarm.registry(1).nodes([honest]))[honest].addresses == ("127.0.0.1:50051",)


@pytest.mark.parametrize(
    "expires_in_s",
    [50.0, *(pytest.param(far, marks=pytest.mark.slow) for far in (500.0, 10**6)), math.inf],
)
def test_bad_entries_hide_no_good_ones(swarm: Swarm, run: Any, expires_in_s: float) -> None:
    async def scenario() -> None:
        until = time.time() + expires_in_s
        me = swarm.hosts[0].peer_id
        keys = [swarm.keys.expert(uid) for uid in UIDS[:6]]
        keys += [swarm.keys.prefix(0), swarm.keys.prefix(0, (1,)), swarm.keys.node(me)]
        for turn, key in enumerate(keys):
            bad: list[tuple[object, object]] = [
                (me.to_bytes(), b"junk"),
                (b"nobody", b"x" * 60_000),
                ("text", "text"),
                (1, key + "x"),
            ]
            for n, (subkey, value) in enumerate(bad[turn % 4 :] + bad[: turn % 4]):
                await swarm.forge(key, subkey, value, until + n / 1000)
        await see_only_honest(swarm)

    run(scenario())


def test_a_record_that_expires_with_the_entries_of_a_prefix_does_not_hide_them(
    swarm: Swarm, run: Any
) -> None:
    """A record's subkey is bytes, but that of an index entry is a number: hivemind cannot compare the two."""

    async def scenario() -> None:
        forger = swarm.hosts[2].identity
        for key in (swarm.keys.prefix(0), swarm.keys.prefix(0, (0,)), swarm.keys.prefix(0, (1,))):
            for _, expires_at in (await read_raw(swarm.hosts[2], key)).values():
                record = sign_record(forger, announcement(key, expires_at, 2))
                await swarm.forge(key, forger.peer_id.to_bytes(), record, expires_at)
        await see_only_honest(swarm)

    run(scenario())


@pytest.mark.parametrize("expires_in_s", [500.0, 10**6, math.inf])
def test_a_forged_or_exchanged_announcement_is_believed_by_nobody(
    swarm: Swarm, run: Any, expires_in_s: float
) -> None:
    async def scenario() -> None:
        victim, forger = swarm.hosts[0], swarm.hosts[2]
        until = time.time() + expires_in_s
        key, other = swarm.keys.prefix(UIDS[0].layer), swarm.keys.prefix(UIDS[-1].layer)
        own = await read_raw(swarm.hosts[1], other)
        genuine = own[victim.peer_id.to_bytes()].value
        withdrawn = announcement(key, until, records_pb2.REPLICA_STATE_WITHDRAWN)
        for value in (sign_record(forger.identity, withdrawn), genuine, genuine[:-1] + b"\0"):
            await swarm.forge(key, victim.peer_id.to_bytes(), value, until)
        left = records_pb2.RecordPayload(
            key=swarm.keys.node(victim.peer_id), expires_at=until, node=records_pb2.NodeRecord(left=True)
        )
        await swarm.forge(left.key, victim.peer_id.to_bytes(), sign_record(forger.identity, left), until)
        await see_only_honest(swarm)

    run(scenario())


def test_a_forger_with_the_victims_address_or_certificate_is_not_taken_for_it(swarm: Swarm, run: Any) -> None:
    async def scenario() -> None:
        victim, forger = swarm.hosts[0], swarm.hosts[2]
        experts = swarm.experts(2)
        await experts.announce(
            [ReplicaAnnouncement(uid, ReplicaState.SERVING, 10**6) for uid in UIDS[:2]], LIFETIME_S
        )
        for certificate in (victim.identity.make_certificate(), forger.identity.make_certificate()):
            await experts.registry.publish_node(
                node_record(forger.identity, certificate=certificate), LIFETIME_S
            )
            await see_only_honest(swarm)
        await experts.withdraw(UIDS[:2], LIFETIME_S)

    run(scenario())


def test_all_coordinates_said_to_be_active_cost_a_bounded_number_of_reads(swarm: Swarm, run: Any) -> None:
    async def scenario() -> None:
        until = time.time() + 500
        for prefix in ((), (0,), (77,)):
            key = swarm.keys.prefix(0, prefix)
            await asyncio.gather(*(swarm.forge(key, c, key, until) for c in range(0, 4096, 128)))
        assert all(c < 4096 for c in (await swarm.experts(1).prefixes([(0, ())], 4096))[0, ()])
        await see_only_honest(swarm)

    run(scenario())


def test_peers_that_are_not_there_fill_no_list(swarm: Swarm, run: Any) -> None:
    async def scenario() -> None:
        until, shard = time.time() + 500, swarm.hosts[0].peer_id.to_bytes()[-1]
        key = swarm.keys.node_shard(f"{shard:02x}")
        rng = random.Random(1)
        made_up = [b"\x12\x20" + rng.randbytes(31) + bytes([shard]) for _ in range(50)]
        await asyncio.gather(*(swarm.forge(key, peer, key, until) for peer in made_up))
        listed = await swarm.registry(1).node_ids()
        assert len(listed) >= 50
        found = await swarm.registry(1).nodes(listed)
        assert swarm.hosts[0].peer_id in found
        assert len(found) <= 2
        assert len(await swarm.registry(1).node_ids(most=20)) == 20

    run(scenario())


class CountingRegistry:
    """A swarm in which a forger marks every expert as active, but only four are."""

    alive = frozenset(UID(0, (n, n)) for n in range(4))

    def __init__(self) -> None:
        self.largest = 0
        self.registry = self

    async def prefixes(
        self, prefixes: Collection[Prefix], size: int, **_: Any
    ) -> dict[Prefix, frozenset[int]]:
        self.largest = max(self.largest, len(prefixes))
        return dict.fromkeys(prefixes, frozenset(range(size)))

    async def replicas(self, uids: Collection[UID], **_: Any) -> dict[UID, tuple[Replica, ...]]:
        self.largest = max(self.largest, len(uids))
        host = PeerID(b"\x12\x20" + bytes(32))
        return {
            uid: (Replica(uid, host, ReplicaState.SERVING, 0, 0, 0.0, 1e12),) if uid in self.alive else ()
            for uid in uids
        }

    async def nodes(self, peer_ids: Collection[PeerID], **limits: object) -> dict[PeerID, NodeInfo]:
        return {}


def test_a_flooded_directory_reads_a_bounded_number_and_keeps_what_lives(
    loop: LoopThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dht.directory._MAX_READ", 100)
    manifest = MANIFEST.model_copy(update={"experts": MANIFEST.experts.model_copy(update={"grid": (16, 16)})})

    async def scenario() -> None:
        registry: Any = CountingRegistry()
        directory = Directory(registry, manifest, refresh_every_s=60, rng=random.Random(3))
        seen: set[UID] = set()
        for _ in range(30):
            view = await directory.refresh()
            alive = {uid for uid, hosts in view.replicas.items() if hosts}
            assert alive >= seen, "an expert that is known to live is always read again"
            seen = alive
        assert seen == set(CountingRegistry.alive), "the others are found in time"
        assert 64 < registry.largest <= 100

    loop.run(scenario(), 120)


def test_a_claim_renewed_for_ever_leaves_the_expert_vacant(swarm: Swarm, run: Any) -> None:
    async def scenario() -> None:
        reader, claimant = swarm.experts(1), swarm.experts(2)
        uid = UID(5, (0, 0))  # nobody's
        seen = []
        for _ in range(3):
            await claimant.announce(
                [ReplicaAnnouncement(uid, ReplicaState.CLAIMED, claimed_at=time.time())], LIFETIME_S
            )
            seen.append(len((await reader.replicas([uid]))[uid]))
            for claim, (first, last) in list(reader.claims._seen.items()):
                reader.claims._seen[claim] = first - 1000.0, last  # as if seen for the first time long ago
        assert seen == [1, 1, 0]

    run(scenario())
