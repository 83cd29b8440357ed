"""Which volunteer hosts which expert: which experts need a host or a replica most, and what a node reads to know that.

The choices are pure functions of what nodes announce. All nodes use the same rules, so that nodes which choose at the
same time mostly choose different experts, and agree who gets an expert that several want.
"""

import hashlib
import math
import random
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, chain, islice
from statistics import median_low
from types import MappingProxyType

import numpy as np

from dht.announcements import Replica, ReplicaState
from dht.experts import ExpertRegistry
from dht.manifest import Manifest
from dht.regions import Prefix, bits_of, numbers_in
from dht.uid import UID, coordinate_of, number_of
from peer.averaging import MAX_UPDATE_COUNT, drawn_stale_last, is_behind, max_plausible_updates
from peer.clock import earliest
from peer.identity import PeerID

_OUTLIER = 10
"""The most updates that an expert can have taken, as a multiple of the updates of a median node's experts."""
BUSY_ROWS = 512
"""An expert is overloaded when at least this many rows wait at each of its hosts."""
BUSIER = 4
"""An expert is only exchanged for one with at least this many times as many waiting rows at its hosts."""
MOST_REPLICAS = 64
"""An idle peer adds no replica to an expert that has this many, because more could not stay similar."""
MOST_PREFIXES = 1024
"""How many grid rows one look reads, of layers that have not split into regions."""
_ROWS_FOR = 12
"""How many looks in a row read the same rows of the grid. To read a row for the first time takes three times the bytes.
"""
MOST_VACANT = 1024
"""How many vacant experts in these grid rows one look reads."""
_RANKED = 16
"""How many vacant experts a look ranks for each one that it reads. Ranking all those of a huge grid would hold the
loop.
"""
SAMPLED = 1024
"""How many active experts in these grid rows one look reads, to see which have few replicas. Each node draws its own
sample.
"""
FEW = 4
"""In layers that have split, a look reads at most this many vacant experts, and as many others."""
MOST_REGIONS = 32
"""The most regions that a look reads to see what is active. A layer that has just split has many."""
_FIRST_ROWS, _FIRST_LOOKS = 8, 6
"""How many rows of such layers a node reads in each of its first looks, and in how many, if it hosts nothing yet."""
_LOOKERS = 16
"""In layers that have split, how many of the nodes that host experts read a grid row in the same period. If there are
many more nodes than rows, nodes take turns, so that not all of them read the same few keys.
"""
CROWDED = 2
"""An expert is crowded if it has more than this many times the replicas of another, which then gets one more."""
_NO_COUNTS: Mapping[UID, int] = MappingProxyType({})


def preference(uid: UID, peer_id: PeerID) -> bytes:
    """How much a peer prefers an expert, as a number that grows with preference (rendezvous hashing)."""
    return hashlib.sha256(f"{uid}@{peer_id.to_base58()}".encode()).digest()


def vacant(replicas: Mapping[UID, Collection[Replica]], besides: PeerID | None = None) -> list[UID]:
    """The experts that nobody hosts or has claimed. With `besides`, that peer does not count."""
    return [uid for uid, hosts in replicas.items() if all(replica.peer_id == besides for replica in hosts)]


def regressed(
    replicas: Mapping[UID, Collection[Replica]], checkpoints: Mapping[UID, int], peer_id: PeerID
) -> dict[UID, int]:
    """The experts whose replicas all have far fewer updates than this peer's checkpoint, with the checkpoint's update
    count. Their hosts died, and others restarted them. An expert that somebody claims is left out, because it may
    already be restored.
    """
    found = {}
    for uid, saved in checkpoints.items():
        others = [replica for replica in replicas.get(uid, ()) if replica.peer_id != peer_id]
        if others and all(
            r.state is not ReplicaState.CLAIMED and is_behind(r.update_count, saved) for r in others
        ):
            found[uid] = saved - max(replica.update_count for replica in others)
    return found


def rank_vacancies(
    vacancies: Collection[UID],
    room: int,
    peer_id: PeerID,
    checkpoints: Mapping[UID, int] = _NO_COUNTS,
) -> list[UID]:
    """At most `room` of the vacancies: first those with the most updates in this peer's checkpoints, then those that it
    prefers.
    """

    def rank(uid: UID) -> tuple[int, bytes]:
        return checkpoints.get(uid, 0), preference(uid, peer_id)

    return sorted(vacancies, key=rank, reverse=True)[: max(room, 0)]


def under_replicated(
    replicas: Mapping[UID, Collection[Replica]],
    room: int,
    peer_id: PeerID,
    enough: int,
    checkpoints: Mapping[UID, int] = _NO_COUNTS,
) -> list[UID]:
    """At most `room` of the experts with fewer than `enough` replicas, those with the fewest first. Among these, the
    ones come first of which this peer's checkpoint has the most updates that all hosts lack: while it was away, others
    continued them from older states.

    Leaves out experts that this peer hosts, and those whose state nobody can give. A leaving peer can still give the
    state, but its replica does not count.
    """

    def rank(uid: UID) -> tuple[int, int, bytes]:
        hosts = replicas[uid]
        lacking = checkpoints.get(uid, 0) - max(replica.update_count for replica in hosts)
        return -lasting_replicas(hosts), max(0, lacking), preference(uid, peer_id)

    wanting = [
        uid
        for uid, hosts in replicas.items()
        if lasting_replicas(hosts) < enough
        and peer_id not in {replica.peer_id for replica in hosts}
        and any(replica.state is not ReplicaState.CLAIMED for replica in hosts)
    ]
    return sorted(wanting, key=rank, reverse=True)[: max(room, 0)]


def further_replica(
    replicas: Mapping[UID, Collection[Replica]],
    mine: Collection[UID],
    peer_id: PeerID,
    unread: Mapping[UID, int] = _NO_COUNTS,
    most: int = MOST_REPLICAS,
) -> UID | None:
    """An expert that already has enough replicas, and that a peer with room should host too; None if there is nothing
    to gain.

    It is an expert whose hosts are all overloaded. For a peer that hosts nothing, or only crowded experts, it may also
    be one with the fewest replicas, so that no volunteer is idle. No expert gets more than `most` replicas, or more
    claims than hosts that give its state. `unread`: how many further replicas of each expert exist.
    """
    counts = _counts(replicas, unread)
    able = [
        uid
        for uid, hosts in replicas.items()
        if uid not in mine
        and len(hosts) < 2 * len(_serving(hosts))
        and counts[uid] < most
        and peer_id not in {replica.peer_id for replica in hosts}
    ]
    busy = [uid for uid in able if _queue(replicas[uid]) >= BUSY_ROWS]
    if busy:
        return max(busy, key=lambda uid: preference(uid, peer_id))
    fewest = min((counts.get(own, 0) for own in mine), default=math.inf)
    few = [uid for uid in able if fewest > CROWDED * counts[uid]]
    return min(few, key=lambda uid: (counts[uid], preference(uid, peer_id)), default=None)


def single_hosted(
    replicas: Mapping[UID, Collection[Replica]], peer_id: PeerID, experts: int
) -> dict[UID, Replica]:
    """The experts that only one other peer hosts and of which this peer should keep a copy, with that peer's replica.

    `replicas`: those of the experts that this peer has read. `experts`: how many the swarm has. Of all other peers that
    host anything, as far as this peer knows, the one that prefers an expert most keeps a copy; in a swarm of which each
    peer reads only a part, there are several such.
    """
    single = {}
    for uid, found in replicas.items():
        serving = [replica for replica in found if replica.state is not ReplicaState.CLAIMED]
        if len(serving) == 1 and serving[0].peer_id != peer_id:
            single[uid] = serving[0]
    if not single:  # usually, and there may be thousands of hosts
        return {}
    known = [r.peer_id for found in replicas.values() for r in _serving(found)]
    hosts = {*known}
    keepers = 1 if len(replicas) >= experts else _keepers(known.count(peer_id), len(known), len(hosts))
    wanted = {}
    for uid, only in single.items():
        own, others = preference(uid, peer_id), hosts - {only.peer_id, peer_id}
        before_it = (host for host in others if preference(uid, host) > own)
        if len([*islice(before_it, keepers)]) < keepers:
            wanted[uid] = only
    return wanted


def _keepers(own: int, replicas: int, hosts: int) -> int:
    """How many of the hosts that a peer knows keep a copy of an expert, so that one does on average in a swarm of which
    each peer reads another part.

    `own`: how many experts this peer hosts. `replicas`: how many it knows, of `hosts` peers.

    If all peers are like this one, about `replicas` / `own` of them have read an expert, and each is the first of those
    that it knows with a chance of one in `hosts`. So if only the first kept a copy, there would be `replicas` / (`own`
    · `hosts`) copies on average.
    """
    return max(1, round(own * hosts / max(1, replicas)))


def releasable(
    replicas: Mapping[UID, Collection[Replica]], mine: Collection[UID], peer_id: PeerID, count: int
) -> list[UID]:
    """At most `count` of this peer's experts that it can give up, those with the most replicas first.

    The host that prefers an expert most keeps it, so that not all hosts give it up at the same time.
    """
    if count <= 0:
        return []

    def others(uid: UID) -> list[Replica]:
        return serving_elsewhere(replicas.get(uid, ()), peer_id)

    able = [uid for uid in mine if keener(replicas.get(uid, ()), uid, peer_id)]
    return sorted(able, key=lambda uid: (-len(others(uid)), preference(uid, peer_id)))[:count]


def keener(hosts: Collection[Replica], uid: UID, peer_id: PeerID) -> list[Replica]:
    """The serving replicas of peers that prefer the expert more strongly than this peer does."""
    others = serving_elsewhere(hosts, peer_id)
    if not others:
        return []
    own = preference(uid, peer_id)
    return [replica for replica in others if preference(uid, replica.peer_id) > own]


def serving_elsewhere(hosts: Collection[Replica], me: PeerID) -> list[Replica]:
    """Other peers' replicas that answer calls."""
    return [r for r in hosts if r.state is ReplicaState.SERVING and r.peer_id != me]


def answering(
    replicas: Mapping[UID, Collection[Replica]], has_failed: Callable[[PeerID], bool]
) -> dict[UID, list[Replica]]:
    """The replicas without those whose hosts did not answer the last call: hosts that died a short time ago are still
    announced.
    """
    return {uid: [r for r in found if not has_failed(r.peer_id)] for uid, found in replicas.items()}


def lasting_replicas(hosts: Collection[Replica]) -> int:
    """How many of these replicas belong to peers that are not leaving."""
    return sum(replica.state is not ReplicaState.LEAVING for replica in hosts)


def _counts(replicas: Mapping[UID, Collection[Replica]], unread: Mapping[UID, int]) -> Mapping[UID, int]:
    """How many replicas each expert has, not counting those that leave."""
    return {uid: lasting_replicas(hosts) + unread.get(uid, 0) for uid, hosts in replicas.items()}


def state_sources(hosts: Collection[Replica], besides: PeerID, rng: random.Random) -> list[Replica]:
    """Other peers' replicas whose state can be fetched, in random order, so that a claim of many updates gives no
    advantage.
    """
    able = [r for r in hosts if r.state is not ReplicaState.CLAIMED and r.peer_id != besides]
    return drawn_stale_last(able, lambda replica: replica.update_count, rng)


def ahead_of(update_count: int, others: Sequence[Replica]) -> list[Replica]:
    """The replicas with more updates than this; empty if at least half of all replicas have no more. A few claims are
    no reason to take over a state.
    """
    if not others or median_low(replica.update_count for replica in others) <= update_count:
        return []
    return [replica for replica in others if replica.update_count > update_count]


def usual_updates(replicas: Mapping[UID, Collection[Replica]]) -> int | None:
    """The most updates of a median node's experts, according to the announcements of all nodes. Half of the nodes
    together can't raise it. None if nobody serves anything.
    """
    most: dict[PeerID, int] = {}
    for replica in chain.from_iterable(replicas.values()):
        if replica.state is not ReplicaState.CLAIMED:
            most[replica.peer_id] = max(replica.update_count, most.get(replica.peer_id, 0))
    return median_low(most.values()) if most else None


def plausible_updates(usual: int | None) -> int:
    """The most updates that any expert can have taken. `usual`: those of a median node's experts."""
    return MAX_UPDATE_COUNT if usual is None else max_plausible_updates([_OUTLIER * usual])


def assign_orphans(uids: Collection[UID], rooms: Mapping[PeerID, int]) -> dict[UID, PeerID]:
    """Which peer adopts which expert: peers with room get one each in turn, and the expert goes to the peer that
    prefers it most.

    Claiming more room gains a peer nothing. Experts for which no peer has room are left out.
    """
    given_to = Counter[PeerID]()
    found = {}
    for uid in uids:
        able = [peer_id for peer_id, room in rooms.items() if given_to[peer_id] < room]
        if not able:
            break
        fewest = min(given_to[peer_id] for peer_id in able)
        heir = max((peer_id for peer_id in able if given_to[peer_id] == fewest), key=partial(preference, uid))
        given_to[heir] += 1
        found[uid] = heir
    return found


def lost_claims(
    claims: Collection[UID],
    replicas: Mapping[UID, Sequence[Replica]],
    peer_id: PeerID,
    checkpoints: Mapping[UID, int] = _NO_COUNTS,
    enough: int = 1,
) -> list[UID]:
    """The claims of this peer that it must give up, because `enough` others come first.

    Another peer comes first if it serves the expert and is not far behind this peer's checkpoint. It also comes first
    if it claims the expert and has a checkpoint with more updates. If both have equally many, the one that prefers the
    expert more comes first.
    """
    return [
        uid
        for uid in claims
        if sum(
            _outranks(replica, checkpoints.get(uid, 0), peer_id)
            for replica in replicas.get(uid, ())
            if replica.peer_id != peer_id
        )
        >= enough
    ]


def _outranks(other: Replica, update_count: int, peer_id: PeerID) -> bool:
    if other.state is not ReplicaState.CLAIMED:
        return other.state is ReplicaState.SERVING and not is_behind(other.update_count, update_count)
    theirs = other.update_count, preference(other.uid, other.peer_id)
    return theirs > (update_count, preference(other.uid, peer_id))


@dataclass(frozen=True)
class Exchange:
    """What a node gives up, and what it hosts in its place."""

    gives: UID
    takes: UID


def exchange(
    replicas: Mapping[UID, Collection[Replica]],
    mine: Collection[UID],
    peer_id: PeerID,
    enough: int,
    unread: Mapping[UID, int] = _NO_COUNTS,
) -> Exchange | None:
    """The exchange that helps most, or None if none is worth it.

    An expert is only given up if it has more than `enough` serving replicas, and never by the `enough` hosts that
    prefer it most: they keep it even if all others exchange it at the same moment. It is exchanged for an expert that
    has fewer than `enough` replicas, or far fewer than the given one. Otherwise, it may be exchanged for one whose
    hosts are all overloaded while those of the given one are not. Some host must be able to give the new expert's
    state. `unread`: as in `further_replica`.
    """
    given = [uid for uid in mine if len(keener(replicas.get(uid, ()), uid, peer_id)) >= max(1, enough)]
    if not given:
        return None
    counts = _counts(replicas, unread)
    gives = min(
        given,
        key=lambda uid: (_queue(replicas[uid]), -counts[uid], preference(uid, peer_id)),
    )
    others = [uid for uid, hosts in replicas.items() if uid not in mine and _serving(hosts)]
    thin = [uid for uid in others if counts[uid] < enough or CROWDED * counts[uid] < counts[gives]]
    if thin:
        takes = min(thin, key=lambda uid: (counts[uid], preference(uid, peer_id)))
        return Exchange(gives, takes)
    least = max(BUSY_ROWS, BUSIER * _queue(replicas[gives]))
    busy = [uid for uid in others if _queue(replicas[uid]) >= least]
    if not busy:
        return None
    return Exchange(gives, max(busy, key=lambda uid: (_queue(replicas[uid]), preference(uid, peer_id))))


class ExchangeHysteresis:
    """Delays an exchange until several looks in a row have wanted it, and the last exchange is long ago."""

    def __init__(self, looks: int, pause_s: float) -> None:
        """`looks`: how many looks in a row must want to give up the same expert. They must take longer than
        announcements live, so that a dead host does not count. `pause_s`: the shortest time between two exchanges.
        """
        self._looks = looks
        self._pause_s = pause_s
        self.gives: UID | None = None
        """The expert that the last look wanted to give up."""
        self._seen = 0
        self._last: float | None = None

    def is_due(self, wish: Exchange | None, now: float) -> bool:
        """Records what a look wants. Returns whether the exchange may be made now."""
        gives = wish.gives if wish is not None else None
        self._seen = self._seen + 1 if gives == self.gives else 1
        self.gives = gives
        if gives is None or self._seen < self._looks:
            return False
        return self._last is None or now >= self._last + self._pause_s

    def done(self, now: float) -> None:
        """Records that an exchange was made."""
        self._last, self._seen = now, 0

    def failed(self) -> None:
        """Records that the exchange failed. Another may follow soon, because strangers may have made it fail."""
        self._seen = 0


def _serving(hosts: Collection[Replica]) -> list[Replica]:
    return [replica for replica in hosts if replica.state is ReplicaState.SERVING]


def _queue(hosts: Collection[Replica]) -> int:
    """How many rows wait at the least loaded host."""
    return min((replica.queued_rows for replica in _serving(hosts)), default=0)


def _row(uid: UID) -> Prefix:
    return uid.layer, uid.coordinate[:-1]


class HostingSurvey:
    """What one node reads of its swarm in each look.

    A layer that has not split into regions is read completely, which costs one key. Of other layers, a look reads a few
    rows of the grid, a few of this node's experts in turn, and some others. A row that had vacant experts is read again
    in the next look. Results of earlier looks count until they expire.
    """

    def __init__(
        self, experts: ExpertRegistry, manifest: Manifest, peer_id: PeerID, rng: random.Random | None = None
    ) -> None:
        self._experts = experts
        self._manifest = manifest
        self._peer_id = peer_id
        self._rng = rng or random.SystemRandom()
        self._had_host: dict[int, int] = {}
        """For each row of the grid in which an expert has had a host, by its number, the last coordinates of these
        experts, as bits. A node reads only some rows of a large grid, which may have millions of experts.
        """
        self._row_grid = (manifest.model.layers, *manifest.experts.grid[:-1])
        """The grid of all rows: layers, and the experts' grid without the last dimension."""
        self._looks = 0
        self._own: list[UID] = []
        """This node's experts. Those that were read longest ago come first."""
        self._split: set[int] = set()
        """Layers that had split into regions when they were last read. Reading any row shows whether they still have.
        """
        self._again: list[Prefix] = []
        """Rows of split layers that had vacant experts at the last look."""
        self._seen: Mapping[UID, tuple[Replica, ...]] = {}
        self.just_read: Set[UID] = frozenset()
        """The experts that the last look read. Replicas of others were read earlier, and some have expired since."""

    async def read(
        self, hosted: Collection[UID], saved: Collection[UID] = (), again: Collection[UID] = ()
    ) -> Mapping[UID, tuple[Replica, ...]]:
        """The replicas of experts that may need this node, and of others. Raises UnreachableError.

        `hosted`: the experts that this node hosts. `saved`: other experts of which it has checkpoints. `again`: some
        that the last look has read, and that count only if several looks in a row find the same.
        """
        split = self._split | self._known_split()
        own = self._in_turn({*hosted, *saved}, split)
        rows = [*self._rows(split), *self._rows_of_split(split, own, takes_turns=bool(hosted))]
        active = await self._experts.prefixes(rows, self._manifest.experts.grid[-1], most=MOST_REGIONS)
        self._split = self._known_split() | (split - {layer for layer, _ in active})
        split |= self._split
        wanted = {*own, *again}
        self._again = []
        for is_split, most_vacant, most_others in ((False, MOST_VACANT, SAMPLED), (True, FEW, FEW // 2)):
            some = {prefix: known for prefix, known in active.items() if (prefix[0] in split) is is_split}
            if not some:
                continue
            vacant = self._vacant(some, most_vacant)
            if is_split:
                self._again = list(dict.fromkeys(map(_row, vacant)))
            wanted.update(vacant, self._others(some, most_others))
        self._looks += 1
        found = await self._experts.replicas(wanted, just_read=True)
        self._experts.regions.forget_recent()  # a node looks once in a period, and would keep them until then
        self.just_read = found.keys()
        return self._merged(found)

    async def read_again(self, uids: Collection[UID]) -> Mapping[UID, tuple[Replica, ...]]:
        """What `read` returned, after reading those of these experts again that an earlier look had read. Raises
        UnreachableError.
        """
        earlier = [uid for uid in uids if uid not in self.just_read]
        return self._merged(await self._experts.replicas(earlier)) if earlier else self._seen

    def _known_split(self) -> set[int]:
        layers = range(self._manifest.model.layers)
        return {layer for layer in layers if self._experts.regions.has_split(layer)}

    def had_host(self, uid: UID) -> bool:
        """Whether anybody has ever been seen to host or claim the expert."""
        return bool(self._had_host.get(self._number_of(_row(uid)), 0) >> uid.coordinate[-1] & 1)

    def _number_of(self, row: Prefix) -> int:
        layer, coordinate = row
        return number_of((layer, *coordinate), self._row_grid)

    def _row_of(self, number: int) -> Prefix:
        layer, *coordinate = coordinate_of(number, self._row_grid)
        return layer, tuple(coordinate)

    def _in_turn(self, mine: Collection[UID], split: Collection[int]) -> list[UID]:
        """Which of this node's experts to read now: a few in one row of a split layer, and all in other layers."""
        held = {uid for uid in mine if self._manifest.holds(uid)}
        known = [uid for uid in self._own if uid in held]
        self._own = [*held.difference(known), *known]
        waiting = [uid for uid in self._own if uid.layer in split]
        some = [uid for uid in waiting if _row(uid) == _row(waiting[0])][:FEW]
        for uid in some:
            self._own.remove(uid)
            self._own.append(uid)
        return [*some, *(uid for uid in held if uid.layer not in split)]

    def _merged(self, found: dict[UID, tuple[Replica, ...]]) -> Mapping[UID, tuple[Replica, ...]]:
        """The replicas, together with those from earlier looks that have not expired."""
        now = earliest(self._experts.registry.now())
        for uid, hosts in found.items():
            if hosts:
                self._note_hosts(_row(uid), 1 << uid.coordinate[-1])
        lasting = {}
        for uid, hosts in self._seen.items():
            if live := tuple([host for host in hosts if host.expires_at > now]):
                lasting[uid] = hosts if len(live) == len(hosts) else live
        self._seen = lasting | found
        return self._seen

    def _rows(self, split: Collection[int]) -> list[Prefix]:
        """The rows to read in layers that have not split, as prefixes without the last coordinate: all, or a part.

        They are in random order: if a layer turns out to have split, only the first few are read. If those were the
        same for all newcomers, they would replicate experts there, and leave others without a host.
        """
        layers = self._manifest.model.layers
        if len(split) == layers:
            return []
        count = math.prod(self._row_grid)
        rng = np.random.default_rng(self._turn().getrandbits(64))
        if count <= MOST_PREFIXES:
            numbers = rng.permutation(count)
        else:
            # first the rows that had hosts: if those died, their prefixes may be gone
            used = rng.permutation(np.array(sorted(self._had_host), dtype=int))[: MOST_PREFIXES // 2]
            # drawn without listing all rows, which may be millions
            drawn = rng.choice(count, MOST_PREFIXES, replace=False)
            numbers = np.concatenate([used, np.setdiff1d(drawn, used, assume_unique=True)])[:MOST_PREFIXES]
        rows = map(self._row_of, numbers.tolist())
        return [row for row in rows if row[0] not in split]

    def _rows_of_split(self, split: Collection[int], own: Collection[UID], takes_turns: bool) -> list[Prefix]:
        """The rows to read in layers that have split: some where experts were vacant, one of this node's, and another
        one. The last one changes from look to look; on a huge grid it is random. Instead of it, a new node reads
        several. If there are many more nodes than rows, only some nodes read the last two at a time. `takes_turns`:
        whether this node may have to wait for its turn.
        """
        rows = self._rng.sample(self._again, min(FEW, len(self._again)))
        if not split:
            return rows
        mine = [_row(uid) for uid in own if uid.layer in split]
        count = math.prod(self._row_grid[1:])
        peers_per_looker = self._experts.registry.lookups.estimated_nodes / (_LOOKERS * len(split) * count)
        # a power of two, because the estimate changes a little all the time, and bounded, because it may be wrong
        pause = 1 << min(6, max(0, round(math.log2(peers_per_looker))))
        first = int.from_bytes(self._peer_id.to_bytes()[-8:])
        turn, waiting = divmod(first + self._looks // _ROWS_FOR, pause)
        if takes_turns and waiting:
            return rows
        rows += mine[:1]
        layers, rng = sorted(split), self._turn() if len(split) * count > MOST_PREFIXES else None
        for other in range(_FIRST_ROWS if not takes_turns and self._looks < _FIRST_LOOKS else 1):
            if rng is None:
                number, layer = divmod(turn + other, len(layers))
                layer, number = layers[layer], number % count
            else:
                layer, number = rng.choice(layers), rng.randrange(count)
                used = sorted(row for row in self._had_host if row // count == layer)
                if used and rng.random() < 0.5:
                    number = rng.choice(used) % count
            rows.append(self._row_of(layer * count + number))
        return list(dict.fromkeys(rows))

    def _turn(self) -> random.Random:
        """A generator that draws the same in several looks, but differently on other nodes. An expert must be found
        vacant twice in a row before it is adopted, so the same rows must be read again.
        """
        return random.Random(f"{self._peer_id} {self._looks // _ROWS_FOR}")  # noqa: S311  # no secret

    def _others(self, active: Mapping[Prefix, Collection[int]], most: int) -> list[UID]:
        """Some of the active experts of these rows."""
        rows = [(prefix, sorted(some)) for prefix, some in sorted(active.items()) if some]
        ends = list(accumulate(len(some) for _, some in rows))
        count = ends[-1] if ends else 0
        drawn = []
        for number in self._turn().sample(range(count), min(most, count)):
            place = bisect_right(ends, number)
            (layer, row), some = rows[place]
            drawn.append(UID(layer, (*row, some[number - ends[place]])))
        return drawn

    def _vacant(self, active: Mapping[Prefix, Collection[int]], most: int) -> list[UID]:
        """The vacant experts of these rows to read: those that once had a host, then others; of each kind, first those
        that this peer prefers, which are the same in each look.
        """
        hosted = {row: bits_of(some) for row, some in active.items()}
        for row, lasts in hosted.items():
            self._note_hosts(row, lasts)
        had_host = {row: self._had_host.get(self._number_of(row), 0) for row in hosted}
        every = (1 << self._manifest.experts.grid[-1]) - 1
        found: list[UID] = []
        for kind in (had_host, {row: every & ~had for row, had in had_host.items()}):
            vacant = (
                UID(row[0], (*row[1], last))
                for row, some in kind.items()
                for last in numbers_in(some & ~hosted[row])
            )
            room = most - len(found)
            found += rank_vacancies(list(islice(vacant, _RANKED * room)), room, self._peer_id)
        return found

    def _note_hosts(self, row: Prefix, lasts: int) -> None:
        """Records that experts of this row have hosts. `lasts`: their last coordinates, as bits."""
        if lasts:
            number = self._number_of(row)
            self._had_host[number] = self._had_host.get(number, 0) | lasts
