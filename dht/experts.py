"""Who hosts which expert, according to the DHT: a peer's announcements of its replicas, and those of others.

Announcements are in regions (see `dht.regions`), which a reader walks from the layer down, or in a large swarm from the
rows of the grid down.
"""

import asyncio
from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from functools import partial
from itertools import islice

from dht.announcements import (
    ClaimAges,
    Replica,
    ReplicaAnnouncement,
    ReplicaState,
    announced,
    read_replicas,
)
from dht.manifest import Manifest
from dht.records import INDEX_PIECE, MAX_INDEX_LIFETIME_S, parse_peer_id
from dht.regions import Prefix, Region, RegionMap, pieces_of, prefix_of
from dht.registry import Entries, Registry, active_under
from dht.uid import UID
from peer.bounded import BoundedDict
from peer.errors import UnreachableError
from peer.identity import PeerID
from peer.kademlia.lookups import FRUGAL, Item
from peer.kademlia.search import DEFAULT_LIMITS, SearchLimits
from peer.kademlia.validation import MAX_KEY_BYTES
from peer.loop import TimeSlices

_MOST_CROWDED = 65536
_ROOM, _EXPERT_ROOM = 32 * 1024, 4 * 1024
"""Bytes of announcements, drawn at random, that one holder returns for a region and for a single expert. Several
holders together return more: about a dozen hosts of an expert that has many.
"""
_CLAIMED_S = 90.0
"""How long an index entry lives that leads to claims only: until all who claim at the same time have seen each other.
Many claims fail, and an entry can't be withdrawn, so an expert that nobody hosts would look active.
"""


class ExpertRegistry:
    """One peer's access to the announcements of experts in its swarm. Invalid ones are left out."""

    def __init__(self, registry: Registry, manifest: Manifest) -> None:
        self.registry = registry
        self._keys = registry.keys
        self.claims: ClaimAges = ClaimAges()
        """Since when others have claimed experts."""
        grid, layers = manifest.experts.grid, manifest.model.layers
        self.regions: RegionMap = RegionMap(
            registry.now, registry.rng, grid, lambda: registry.lookups.estimated_nodes / layers
        )
        self._announced: dict[UID, tuple[ReplicaAnnouncement, float]] = {}
        """What this peer announces about its replicas, and until when."""
        self._announcing = asyncio.Lock()
        self.home_of: dict[UID, Prefix] = {}
        """The region in which this peer has announced each of its replicas."""
        self._begun: dict[Prefix, tuple[frozenset[int], asyncio.Task[dict[Prefix, Region]]]] = {}
        """Regions that are being read ahead of need, with the pieces of their indices."""
        self.unread: BoundedDict[UID, int] = BoundedDict(_MOST_CROWDED)
        """About how many hosts of an expert the last `replicas` left out, because there are too many."""

    async def announce(
        self, replicas: Collection[ReplicaAnnouncement], lifetime_s: float, queued_rows: int = 0
    ) -> None:
        """Announces replicas in their regions, together with this peer's other replicas there. Marks the coordinates on
        the way as active.
        """
        # one at a time: two announcements in one region would overwrite each other
        async with self._announcing:
            await self._announce(replicas, lifetime_s, queued_rows)

    async def _announce(
        self, replicas: Collection[ReplicaAnnouncement], lifetime_s: float, queued_rows: int
    ) -> None:
        if unread := self.regions.unread([replica.uid for replica in replicas], self._announced):
            await self._walk(dict.fromkeys(unread, 0))
        now = self.registry.now()
        expires_at = now + lifetime_s
        for replica in replicas:
            self._announced[replica.uid] = replica, expires_at
        self._announced = {uid: said for uid, said in self._announced.items() if said[1] > now}
        homes = self.regions.homes(self._announced)
        before = dict(self.home_of)
        changed = {replica.uid for replica in replicas}
        changed |= {uid for uid, home in homes.items() if before.get(uid, home) != home}
        written: dict[Prefix, list[ReplicaAnnouncement]] = {homes[uid]: [] for uid in changed}
        written |= {before[uid]: [] for uid in changed & before.keys()}
        for uid, home in homes.items():
            if home in written:
                written[home].append(self._announced[uid][0])
        items: dict[tuple[str, int | bytes], Item] = {}
        for home, some in written.items():
            items |= self._region_items(home, some, expires_at, queued_rows)
            await asyncio.sleep(0)  # there may be hundreds: let other tasks run
        try:
            await self.registry.store(list(items.values()))
        except UnreachableError:
            self.regions.not_written(written)
            raise
        for replica in replicas:
            if replica.state is ReplicaState.WITHDRAWN:
                self._announced.pop(replica.uid, None)
        self.home_of |= {uid: homes[uid] for uid in changed}
        self.home_of = {uid: home for uid, home in self.home_of.items() if uid in self._announced}

    def _region_items(
        self, home: Prefix, replicas: Collection[ReplicaAnnouncement], expires_at: float, queued_rows: int
    ) -> dict[tuple[str, int | bytes], Item]:
        """This peer's record of what it hosts in a region, and the index entries that lead there. As long as it only
        claims experts that others serve, it leaves the entries to these: if they die, the entries must not live on.
        """
        (layer, coordinate), me = home, self.registry.peer_id.to_bytes()
        key = self._keys.prefix(layer, coordinate)
        hosted = [replica for replica in replicas if replica.state is not ReplicaState.WITHDRAWN]
        payload = announced(hosted, len(coordinate), queued_rows)
        expires_at = self.registry.later(key, expires_at)
        payload.key, payload.expires_at = key, expires_at
        items: dict[tuple[str, int | bytes], Item] = {
            (key, me): Item(key, me, self.registry.seal(payload), expires_at)
        }
        if not all(replica.has_hosts for replica in hosted):
            now = self.registry.now()
            claims = all(replica.state is ReplicaState.CLAIMED for replica in hosted)
            for depth, following in enumerate(coordinate):
                if lives := self.regions.index_lives(home, depth):
                    index = self._keys.index(layer, coordinate[:depth], following)
                    lifetime_s = _CLAIMED_S if claims else MAX_INDEX_LIFETIME_S
                    until = now + min(lives * (expires_at - now), lifetime_s)
                    items[index, following] = Item(index, following, index, until)
        return items

    async def withdraw(self, uids: Iterable[UID], lifetime_s: float) -> None:
        """Announces that this peer no longer hosts these experts."""
        await self.announce([ReplicaAnnouncement(uid, ReplicaState.WITHDRAWN) for uid in uids], lifetime_s)

    async def prefixes(
        self,
        prefixes: Collection[Prefix],
        size: int,
        *,
        limits: SearchLimits = FRUGAL,
        at_once: bool = False,
        most: int | None = None,
    ) -> dict[Prefix, frozenset[int]]:
        """The active next coordinates after each prefix, in a grid dimension of this size.

        `limits`: see `Lookups.find`. `at_once`: reads a prefix in parallel with those above it, and waits for it only
        if these have split. `most`: the most regions read on each level; prefixes beyond that are left out.
        """
        read, known = await self._walk(
            dict.fromkeys(prefixes, size), limits=limits, at_once=at_once, most=most
        )
        active = {prefix: set(read[prefix].active) if prefix in read else set() for prefix in known}
        depths = {len(coordinate) for _, coordinate in known}
        for (layer, above), region in read.items():
            for depth in depths:
                if depth <= len(above):  # all are below the same prefix
                    if (below := active.get((layer, above[:depth]))) is not None:
                        below.update([c[depth] for _, c in region.replicas if depth < len(c)])
                    continue
                for _, coordinate in region.replicas:
                    below = active.get((layer, coordinate[:depth]))
                    if below is not None and depth < len(coordinate):
                        below.add(coordinate[depth])
        return {prefix: frozenset([c for c in some if c < size]) for prefix, some in active.items()}

    async def replicas(
        self,
        uids: Collection[UID],
        *,
        limits: SearchLimits = FRUGAL,
        only_active: bool = False,
        just_read: bool = False,
        at_once: bool = False,
    ) -> dict[UID, tuple[Replica, ...]]:
        """The live announcements of each expert, without withdrawn ones.

        `limits`: see `Lookups.find`. `only_active`: skips regions that no index entry leads to; for many experts.
        `just_read`: accepts what was read a moment ago. `at_once`: reads all regions on the way in parallel,
        and returns as soon as a region has not split or has a host of the expert. For few experts, when time matters.
        """
        found: dict[UID, dict[PeerID, Replica]] = {uid: {} for uid in uids}
        unread = dict.fromkeys(found, 0.0)
        read, _ = await self._walk(
            dict.fromkeys(found, 0),
            limits=limits,
            only_active=only_active,
            just_read=just_read,
            at_once=at_once,
        )
        for region in read.values():
            for uid in found.keys() & region.replicas.keys():  # a region may have many more experts
                unread[uid] += len(region.replicas[uid]) * region.unread / region.hosts
                for replica in region.replicas[uid]:
                    other = found[uid].get(replica.peer_id)
                    if other is None or other.expires_at < replica.expires_at:  # it may have moved
                        found[uid][replica.peer_id] = replica
        for uid, count in unread.items():
            self.unread.pop(uid, None)
            if count >= 1:
                self.unread[uid] = int(count)
        return {uid: tuple(filter(self._is_live, hosts.values())) for uid, hosts in found.items()}

    def read_ahead(self, uids: Iterable[UID]) -> None:
        """Begins to read each of these experts' own regions, because some of them will be asked for soon."""
        for uid in uids:
            self._begin({uid: ()}, {uid}, DEFAULT_LIMITS)

    def _is_live(self, replica: Replica) -> bool:
        if replica.state is ReplicaState.CLAIMED:
            since = replica.claimed_at
            return not self.claims.is_stale(replica.uid, replica.peer_id, since, self.registry.now())
        self.claims.forget(replica.uid, replica.peer_id)
        return replica.state is not ReplicaState.WITHDRAWN

    async def _walk(
        self,
        targets: Mapping[Prefix, int],
        *,
        limits: SearchLimits = FRUGAL,
        only_active: bool = False,
        just_read: bool = False,
        at_once: bool = False,
        most: int | None = None,
    ) -> tuple[dict[Prefix, Region], Collection[Prefix]]:
        """Reads the regions in which hosts of these experts, or of experts below these prefixes, may announce.

        `targets`: each with the size of the next grid dimension; 0 for an expert. The walk begins at the layer, at the
        rows of the grid in a large swarm, or below regions that are known to have split. It continues where regions
        have split, and above the rows if they show nothing. Also returns the targets that were read completely.
        """
        read: dict[Prefix, Region] = {}
        known = dict.fromkeys(targets)
        experts = {target for target, size in targets.items() if not size}
        depths = {target: [0] if only_active else self.regions.depths(target) for target in targets}
        if at_once:
            depths = {target: levels[:1] for target, levels in depths.items()}
            for depth in range(1, max((len(coordinate) for _, coordinate in targets), default=0) + 1):
                below = {
                    target: [depth]
                    for target, levels in depths.items()
                    if levels[0] < depth <= len(target[1]) and self._is_unread(target, levels[0])
                }
                self._begin(_pieces(targets, below), experts, limits)
        while depths:
            pieces = _pieces(targets, depths)
            unread = dict(islice(((p, some) for p, some in pieces.items() if p not in read), most))
            read |= await self._read_regions(unread, experts, limits, just_read)
            further: dict[Prefix, list[int]] = {}
            for (layer, coordinate), levels in depths.items():
                if any((layer, coordinate[:level]) not in read for level in levels):
                    del known[layer, coordinate]
                    continue
                following = []
                if levels[0] == 1 and self._may_be_above(layer, coordinate, read):
                    following.append(0)
                if (last := levels[-1]) < len(coordinate):
                    region = read[layer, coordinate[:last]]
                    is_found = at_once and region.serves((layer, coordinate))
                    if not is_found and region.leads_to(coordinate[last], only_active):
                        following.append(last + 1)
                if following:
                    further[layer, coordinate] = following
            depths = further
        return read, known.keys()

    def _may_be_above(self, layer: int, coordinate: tuple[int, ...], read: Mapping[Prefix, Region]) -> bool:
        """Whether hosts may announce at the layer's own key, which this walk has passed over: nothing was found below
        it, and it is not known to have split.
        """
        region = read[layer, coordinate[:1]]
        return not (
            region.hosts
            or region.active
            or (layer, ()) in read
            or self.regions.leads_below((layer, ()), coordinate[0])
        )

    async def _read_regions(
        self,
        pieces: Mapping[Prefix, Collection[int]],
        experts_only: Container[Prefix],
        limits: SearchLimits,
        just_read: bool,
    ) -> dict[Prefix, Region]:
        """`pieces`: the wanted pieces of each prefix's index. `experts_only`: the prefixes that are experts."""
        found: dict[Prefix, Region] = {}
        # an urgent search goes level by level, and usually ends at the first
        if just_read or not limits.is_frugal:
            for prefix, some in pieces.items():
                if (region := self.regions.recent(prefix, some)) is not None:
                    found[prefix] = region
        unread = {prefix: some for prefix, some in pieces.items() if prefix not in found}
        if limits.is_frugal:
            return found | await self._read(unread, experts_only, limits)
        for reading in self._begin(unread, experts_only, limits):
            regions = await asyncio.shield(reading)
            found |= {prefix: region for prefix, region in regions.items() if prefix in unread}
        return found

    def _begin(
        self, pieces: Mapping[Prefix, Collection[int]], experts_only: Container[Prefix], limits: SearchLimits
    ) -> "Collection[asyncio.Task[dict[Prefix, Region]]]":
        """Reads these regions, except those that are already being read. Returns the tasks that read all of them."""
        tasks, new = set[asyncio.Task[dict[Prefix, Region]]](), dict[Prefix, Collection[int]]()
        for prefix, some in pieces.items():
            begun, reading = self._begun.get(prefix, (frozenset[int](), None))
            if reading is not None and begun.issuperset(some):
                tasks.add(reading)
            else:
                new[prefix] = some
        if new:
            task = self.registry.lookups.spawn(self._read(new, experts_only, limits))
            self._begun.update((prefix, (frozenset(some), task)) for prefix, some in new.items())
            task.add_done_callback(partial(self._note_end, new))
            tasks.add(task)
        return tasks

    def _note_end(self, prefixes: Iterable[Prefix], task: "asyncio.Task[dict[Prefix, Region]]") -> None:
        for prefix in prefixes:
            _, reading = self._begun.get(prefix, (frozenset(), None))
            if reading is task:
                del self._begun[prefix]

    async def _read(
        self, unread: Mapping[Prefix, Collection[int]], experts_only: Container[Prefix], limits: SearchLimits
    ) -> dict[Prefix, Region]:
        found: dict[Prefix, Region] = {}
        keys = {
            prefix: [
                self._keys.prefix(*prefix),
                *(self._keys.index(*prefix, p * INDEX_PIECE) for p in some if p),
            ]
            for prefix, some in unread.items()
        }
        experts = [key for prefix, some in keys.items() if prefix in experts_only for key in some]
        others = [key for prefix, some in keys.items() if prefix not in experts_only for key in some]
        if experts and others:
            of_experts, of_others = await asyncio.gather(
                self.registry.get(experts, limits, _EXPERT_ROOM), self.registry.get(others, limits, _ROOM)
            )
            answers = of_experts | of_others
        else:  # usually; two tasks would cost as much as parsing the answers
            room = _EXPERT_ROOM if experts else _ROOM
            answers = await self.registry.get(experts or others, limits, room)
        slices = TimeSlices()
        for prefix, own in keys.items():
            found[prefix] = await self._region(prefix, own, answers, slices)
            self.regions.note(prefix, unread[prefix], found[prefix])
        return found

    def _is_unread(self, target: Prefix, depth: int) -> bool:
        """Whether the target's region at that depth was not read a moment ago."""
        return self.regions.recent(prefix_of(target, depth), ()) is None

    async def _region(
        self, prefix: Prefix, keys: Sequence[str], answers: Mapping[str, Entries], slices: TimeSlices
    ) -> Region:
        """The region that these keys describe. The first key is the prefix's own."""
        replicas: dict[UID, list[Replica]] = {}
        hosts = count = size = 0
        key = keys[0]
        records = [(subkey, value) for subkey, (value, _) in answers[key].items() if isinstance(value, bytes)]
        # in a flood, holders together have more than each has room for
        if sum([len(value) for _, value in records]) > MAX_KEY_BYTES:
            self.registry.rng.shuffle(records)
            me = self.registry.peer_id.to_bytes()
            # its own record comes first: a node checks whether the DHT returns it
            records.sort(key=lambda record: record[0] != me)
        for subkey, value in records:
            if size + len(value) > MAX_KEY_BYTES:
                continue
            await slices.pause()
            record = self._replicas_in(prefix, key, subkey, value)
            hosts += bool(record)
            count += 1
            size += len(value)
            for uid, replica in record.items():
                replicas.setdefault(uid, []).append(replica)
        active = set[int]().union(*(active_under(each, answers[each]) for each in keys))
        # the records that were not read are assumed to be like these, some of which announce nothing any more
        unread = answers[key].unread * hosts // max(1, count)
        return Region(replicas, frozenset(active), hosts, size, unread)

    def _replicas_in(self, prefix: Prefix, key: str, subkey: object, value: object) -> Mapping[UID, Replica]:
        """The replicas in a record; none if it is not valid."""

        def read() -> Mapping[UID, Replica]:
            peer_id = parse_peer_id(subkey)
            return read_replicas(self.registry.unseal(value, key, peer_id), *prefix, peer_id)

        return self.registry.guard.read("replica", subkey, read) or {}


def _pieces(
    targets: Mapping[Prefix, int], depths: Mapping[Prefix, Collection[int]]
) -> dict[Prefix, set[int]]:
    """The regions above these targets at these depths, with the pieces of their indices. `targets`: see `_walk`."""
    pieces: dict[Prefix, set[int]] = {}
    for (layer, coordinate), levels in depths.items():
        for level in levels:
            some = pieces.setdefault((layer, coordinate[:level]), set())
            if level < len(coordinate):
                some.add(coordinate[level] // INDEX_PIECE)
            else:
                some.update(pieces_of(targets[layer, coordinate]))
    return pieces
