"""Which node takes which expert: all nodes must independently come to the same answer."""

import random
from collections import Counter
from dataclasses import replace
from statistics import median_high

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dht.announcements import Replica, ReplicaState
from dht.uid import UID, grid_coordinates
from expert_server.hosting.placement import (
    BUSY_ROWS,
    CROWDED,
    ahead_of,
    assign_orphans,
    further_replica,
    lost_claims,
    plausible_updates,
    preference,
    rank_vacancies,
    regressed,
    releasable,
    single_hosted,
    state_sources,
    under_replicated,
    usual_updates,
    vacant,
)
from peer.averaging import MAX_UPDATE_COUNT
from peer.identity import PeerID

CLAIMED, SERVING, LEAVING = ReplicaState.CLAIMED, ReplicaState.SERVING, ReplicaState.LEAVING

peer_ids = st.binary(min_size=32, max_size=32).map(lambda digest: PeerID(b"\x12\x20" + digest))
uids = st.builds(UID, st.integers(0, 3), st.tuples(st.integers(0, 15), st.integers(0, 15)))
GRID = [UID(layer, coordinate) for layer in range(2) for coordinate in grid_coordinates((16, 16))]


def seeded_peers(count: int) -> list[PeerID]:
    rng = random.Random(0)
    return [PeerID(b"\x12\x20" + rng.randbytes(32)) for _ in range(count)]


def replica(uid: UID, peer_id: PeerID, state: ReplicaState, update_count: int = 0) -> Replica:
    return Replica(uid, peer_id, state, update_count, 0, claimed_at=0.0, expires_at=1.0)


def test_vacant_is_what_nobody_hosts_or_claims() -> None:
    first, second, third = GRID[:3]
    peer_id = seeded_peers(1)[0]
    replicas = {
        first: (replica(first, peer_id, SERVING),),
        second: (),
        third: (replica(third, peer_id, CLAIMED),),
    }
    assert vacant(replicas) == [second]
    assert vacant(replicas, besides=peer_id) == [first, second, third]
    assert vacant(replicas, besides=seeded_peers(2)[1]) == [second]


@given(st.integers(2, 8), st.sets(uids, min_size=1, max_size=20), st.randoms(use_true_random=False))
def test_each_expert_with_one_host_is_copied_by_one_other_peer(
    count: int, experts: set[UID], rng: random.Random
) -> None:
    peers = seeded_peers(count)
    hosts = {uid: rng.sample(peers, rng.randint(1, 2)) for uid in sorted(experts)}
    hosts |= {UID(9, (number,)): peers for number in range(2)}  # each peer hosts something
    replicas = {uid: tuple(replica(uid, peer, SERVING, 7) for peer in some) for uid, some in hosts.items()}
    copies = {peer: single_hosted(replicas, peer, len(replicas)) for peer in peers}
    for uid, some in hosts.items():
        keepers = [peer for peer in peers if uid in copies[peer]]
        assert len(keepers) == (1 if len(some) == 1 else 0)
        assert not set(keepers) & set(some)
        assert all(copies[peer][uid].peer_id == some[0] for peer in keepers)


@pytest.mark.parametrize("most", [1, 8], ids=["one expert each", "up to eight experts each"])
def test_experts_with_one_host_have_one_copy_on_average_though_each_peer_has_read_few(most: int) -> None:
    rng, peers = random.Random(0), seeded_peers(200)
    hosted = {
        peer: [UID(n, (place,)) for place in range(rng.randint(1, most))] for n, peer in enumerate(peers)
    }
    host_of = {uid: peer for peer, own in hosted.items() for uid in own}
    copies = Counter[UID]()
    for peer, own in hosted.items():
        read = [*own, *rng.sample([*host_of], 20)]
        kept = single_hosted(
            {uid: (replica(uid, host_of[uid], SERVING),) for uid in read}, peer, len(host_of)
        )
        assert not kept.keys() & {*own}
        copies.update([*kept])
    assert 0.7 <= copies.total() / len(host_of) <= 1.4
    assert len(copies) / len(host_of) >= 0.5


def test_what_is_only_claimed_or_has_an_heir_is_not_copied() -> None:
    (uid,), (first, second, third) = GRID[:1], seeded_peers(3)
    assert not single_hosted({uid: (replica(uid, first, CLAIMED),)}, second, 1)
    assert not single_hosted({uid: (replica(uid, first, LEAVING), replica(uid, second, SERVING))}, third, 1)
    assert single_hosted({uid: (replica(uid, first, LEAVING),)}, third, 1), (
        "who leaves may not come to hand it over"
    )


@given(st.sets(uids, max_size=30), st.integers(-3, 40), peer_ids)
def test_a_choice_is_bounded_and_of_the_most_preferred(
    vacancies: set[UID], room: int, peer_id: PeerID
) -> None:
    chosen = rank_vacancies(vacancies, room, peer_id)
    assert len(chosen) == len(set(chosen)) == min(max(room, 0), len(vacancies))
    assert set(chosen) <= vacancies
    left = vacancies - set(chosen)
    if chosen and left:
        least = min(preference(uid, peer_id) for uid in chosen)
        assert least > max(preference(uid, peer_id) for uid in left)


@given(
    st.lists(uids, unique=True, max_size=30), st.integers(0, 40), peer_ids, st.randoms(use_true_random=False)
)
def test_a_choice_depends_on_nothing_but_the_vacancies_and_the_peer(
    vacancies: list[UID], room: int, peer_id: PeerID, rng: random.Random
) -> None:
    chosen = rank_vacancies(vacancies, room, peer_id)
    shuffled = list(vacancies)
    rng.shuffle(shuffled)
    assert rank_vacancies(shuffled, room, PeerID(peer_id.to_bytes())) == chosen


def test_preference_is_the_same_on_every_machine() -> None:
    """Peers of different versions and machines must agree on it: it is part of the protocol."""
    peer_id = PeerID(b"\x12\x20" + bytes(32))
    assert preference(UID(0, (1, 2)), peer_id).hex().startswith("7405f72ff5975e0d")


def test_peers_that_choose_at_once_mostly_choose_differently() -> None:
    peers = seeded_peers(16)
    choices = [rank_vacancies(GRID, 8, peer_id) for peer_id in peers]
    distinct = {uid for chosen in choices for uid in chosen}
    # 128 random draws from 512 experts give 113 different ones on average.
    assert len(distinct) > 100


def test_every_peer_wins_its_share() -> None:
    peers = seeded_peers(4)
    wins = [sum(max(peers, key=lambda p: preference(uid, p)) == peer_id for uid in GRID) for peer_id in peers]
    assert sum(wins) == len(GRID)
    assert min(wins) > len(GRID) / 8


@given(uids, st.sets(peer_ids, min_size=1, max_size=8))
def test_of_simultaneous_claimants_exactly_one_keeps_the_expert(uid: UID, claimants: set[PeerID]) -> None:
    seen = {uid: [replica(uid, peer_id, CLAIMED) for peer_id in claimants]}
    keeping = [peer_id for peer_id in claimants if not lost_claims([uid], seen, peer_id)]
    assert keeping == [max(claimants, key=lambda peer_id: preference(uid, peer_id))]


@given(uids, st.sets(peer_ids, min_size=2, max_size=8), st.integers(1, 8))
def test_who_serves_already_beats_every_claim(uid: UID, peers: set[PeerID], serving: int) -> None:
    ordered = sorted(peers, key=lambda peer_id: preference(uid, peer_id))
    split = min(serving, len(ordered) - 1)  # those that serve are the least preferred
    seen = {uid: [replica(uid, p, SERVING if n < split else CLAIMED) for n, p in enumerate(ordered)]}
    assert all(lost_claims([uid], seen, claimant) == [uid] for claimant in ordered[split:])


@given(st.sets(uids, min_size=1, max_size=8), st.sets(peer_ids, min_size=1, max_size=4), st.data())
def test_claims_of_many_experts_end_with_one_host_for_each(
    wanted: set[UID], claimants: set[PeerID], data: st.DataObject
) -> None:
    claims = {peer_id: data.draw(st.sets(st.sampled_from(sorted(wanted)))) for peer_id in sorted(claimants)}
    seen = {uid: [replica(uid, p, CLAIMED) for p, uids in claims.items() if uid in uids] for uid in wanted}
    kept = [uid for p, mine in claims.items() for uid in mine - set(lost_claims(sorted(mine), seen, p))]
    assert sorted(kept) == sorted(set().union(*claims.values()))


@given(st.lists(uids, unique=True, max_size=5), peer_ids)
def test_a_claim_that_no_other_contests_is_kept(claims: list[UID], peer_id: PeerID) -> None:
    own = {uid: [replica(uid, peer_id, CLAIMED)] for uid in claims}
    assert lost_claims(claims, own, peer_id) == []
    assert lost_claims(claims, {}, peer_id) == []


def test_a_choice_begins_with_the_checkpoints_of_most_updates() -> None:
    (peer_id,) = seeded_peers(1)
    plain = rank_vacancies(GRID[:20], 20, peer_id)
    checkpoints = {plain[7]: 3, plain[15]: 40, plain[19]: 3, GRID[30]: 9}
    assert rank_vacancies(GRID[:20], 5, peer_id, checkpoints) == [plain[n] for n in (15, 7, 19, 0, 1)]


@given(uids, st.dictionaries(peer_ids, st.integers(0, 3), min_size=1, max_size=8))
def test_of_simultaneous_claimants_the_one_with_most_updates_keeps_the_expert(
    uid: UID, update_counts: dict[PeerID, int]
) -> None:
    seen = {uid: [replica(uid, peer_id, CLAIMED, count) for peer_id, count in update_counts.items()]}
    keeping = [p for p, count in update_counts.items() if not lost_claims([uid], seen, p, {uid: count})]
    assert keeping == [max(update_counts, key=lambda p: (update_counts[p], preference(uid, p)))]


# Replicas

states = st.sampled_from([CLAIMED, SERVING, LEAVING])
hosts = st.dictionaries(peer_ids, states, max_size=5)


def swarm_of(hosted: dict[UID, dict[PeerID, ReplicaState]]) -> dict[UID, list[Replica]]:
    return {uid: [replica(uid, p, state) for p, state in peers.items()] for uid, peers in hosted.items()}


def count_staying(found: list[Replica]) -> int:
    return len([r for r in found if r.state in {CLAIMED, SERVING}])


@given(st.lists(st.integers(0, 2000), min_size=1, max_size=4), st.integers(0, 2000))
def test_what_all_others_began_anew_is_behind_and_its_checkpoint_beats_them(
    counts: list[int], saved: int
) -> None:
    uid, (me, *others) = GRID[0], seeded_peers(len(counts) + 1)
    hosts = [replica(uid, p, SERVING, count) for p, count in zip(others, counts, strict=True)]
    found = regressed({uid: hosts}, {uid: saved}, me)
    is_behind = max(counts) < 0.9 * saved
    assert found == ({uid: saved - max(counts)} if is_behind else {})
    assert lost_claims([uid], {uid: hosts}, me, {uid: saved}) == ([] if is_behind else [uid])
    assert regressed({uid: [*hosts, replica(uid, me, SERVING, saved)]}, {uid: saved}, me) == found
    assert regressed({uid: [*hosts, replica(uid, me, CLAIMED)]}, {uid: saved}, others[0]) == {}
    assert regressed({uid: []}, {uid: saved}, me) == regressed({}, {uid: saved}, me) == {}


def test_an_expert_whose_only_host_leaves_is_not_vacant() -> None:
    (peer_id,) = seeded_peers(1)
    assert vacant({GRID[0]: (replica(GRID[0], peer_id, LEAVING),)}) == []


@given(st.dictionaries(uids, hosts, max_size=12), st.integers(-1, 15), peer_ids, st.integers(1, 4))
def test_replicas_are_taken_of_the_experts_with_the_fewest(
    hosted: dict[UID, dict[PeerID, ReplicaState]], room: int, peer_id: PeerID, enough: int
) -> None:
    seen = swarm_of(hosted)
    chosen = under_replicated(seen, room, peer_id, enough)
    counts = [count_staying(seen[uid]) for uid in chosen]
    assert len(set(chosen)) == len(chosen) <= max(room, 0)
    assert counts == sorted(counts)
    assert all(count < enough for count in counts)
    for uid in chosen:
        assert peer_id not in hosted[uid]
        assert {SERVING, LEAVING} & set(hosted[uid].values()), "nobody could give it"
    everything = under_replicated(seen, len(seen), peer_id, enough)
    assert everything[: max(room, 0)] == chosen


def test_of_experts_with_as_many_replicas_a_peer_takes_those_it_prefers() -> None:
    me, other = seeded_peers(2)
    seen = {uid: [replica(uid, other, SERVING)] for uid in GRID[:50]}
    assert under_replicated(seen, 10, me, 2) == rank_vacancies(GRID[:50], 10, me)


def test_of_experts_with_as_many_replicas_a_peer_first_takes_those_that_continue_from_older_states() -> None:
    me, other = seeded_peers(2)
    seen = {uid: [replica(uid, other, SERVING, 100)] for uid in GRID[:50]}
    preferred = under_replicated(seen, 50, me, 2)
    behind, far_behind, ahead = preferred[30], preferred[40], preferred[49]
    saved = {behind: 101, far_behind: 105, ahead: 99}
    rest = [uid for uid in preferred if uid not in (behind, far_behind)]
    assert under_replicated(seen, 50, me, 2, saved) == [far_behind, behind, *rest]

    third = seeded_peers(3)[2]
    seen[far_behind] = [*seen[far_behind], replica(far_behind, third, SERVING, 100)]
    assert under_replicated(seen, 50, me, 3, saved)[-1] == far_behind, "it has more replicas than the others"
    seen[behind] = [replica(behind, other, SERVING, 100), replica(behind, third, LEAVING, 101)]
    assert under_replicated(seen, 49, me, 3, saved) == [u for u in preferred if u != far_behind], "one has it"


def test_with_enough_replicas_of_all_nothing_is_taken() -> None:
    me, *others = seeded_peers(3)
    seen = {uid: [replica(uid, p, SERVING) for p in others] for uid in GRID[:5]}
    assert under_replicated(seen, 5, me, 2) == []
    assert len(under_replicated(seen, 5, me, 3)) == 5


def test_an_idle_peer_hosts_one_of_the_experts_with_the_fewest_replicas() -> None:
    me, *others = seeded_peers(6)
    seen = {uid: [replica(uid, p, SERVING) for p in others[: 2 + n % 3]] for n, uid in enumerate(GRID[:60])}
    wanted = further_replica(seen, [], me)
    assert wanted is not None
    assert len(seen[wanted]) == 2
    assert further_replica(seen, GRID[:1], me) is None
    assert further_replica(seen, [], me, most=2) is None
    assert further_replica({uid: [replica(uid, me, SERVING)] for uid in GRID[:5]}, [], me) is None


def test_an_idle_peer_leaves_alone_what_as_many_claim_as_serve() -> None:
    me, first, second, third = seeded_peers(4)
    seen = {GRID[0]: [replica(GRID[0], first, SERVING), replica(GRID[0], second, SERVING)]}
    seen[GRID[0]].append(replica(GRID[0], third, CLAIMED))
    assert further_replica(seen, [], me) == GRID[0]
    seen[GRID[0]][1] = replica(GRID[0], second, CLAIMED)
    assert further_replica(seen, [], me) is None


def test_idle_peers_spread_over_the_experts() -> None:
    host, *idle = seeded_peers(257)
    seen = {uid: [replica(uid, host, SERVING)] for uid in GRID[:64]}
    chosen = Counter(further_replica(seen, [], peer_id) for peer_id in idle)
    assert len(chosen) > 55
    assert max(chosen.values()) < 4 * 256 / 64


def test_a_peer_with_room_helps_an_expert_whose_hosts_are_all_overloaded() -> None:
    me, *hosts = seeded_peers(4)
    seen = {uid: [replica(uid, p, SERVING) for p in hosts] for uid in GRID[:9]}
    seen[GRID[3]] = [replace(r, queued_rows=BUSY_ROWS) for r in seen[GRID[3]]]
    seen[GRID[4]][0] = replace(seen[GRID[4]][0], queued_rows=9 * BUSY_ROWS)
    assert further_replica(seen, GRID[:1], me) == GRID[3]
    assert further_replica(seen, GRID[:9], hosts[0]) is None


@given(st.integers(1, 40), st.integers(0, 60), st.integers(1, 40), st.integers(0, 60))
def test_a_peer_with_room_that_hosts_a_crowded_expert_helps_one_with_less_than_half_as_many(
    own: int, own_unread: int, others: int, others_unread: int
) -> None:
    me, *hosts = seeded_peers(41)
    seen = {GRID[0]: [replica(GRID[0], p, SERVING) for p in [me, *hosts[: own - 1]]]}
    seen[GRID[1]] = [replica(GRID[1], p, SERVING) for p in hosts[:others]]
    unread = {GRID[0]: own_unread, GRID[1]: others_unread}
    helps = own + own_unread > CROWDED * (others + others_unread)
    assert further_replica(seen, [GRID[0]], me, unread, most=200) == (GRID[1] if helps else None)


def test_joiners_that_see_two_experts_each_and_some_of_their_hosts_spread_evenly() -> None:
    rng, hosts = random.Random(1), {uid: [p] for uid, p in zip(GRID[:32], seeded_peers(32), strict=True)}
    for me in seeded_peers(32 + 20 * 32)[32:]:
        drawn = rng.sample(sorted(hosts), 2)
        seen = {u: [replica(u, p, SERVING) for p in hosts[u][:12]] for u in drawn}
        unread = {u: len(hosts[u]) - len(seen[u]) for u in drawn}
        wanted = further_replica(seen, [], me, unread)
        assert wanted is not None
        hosts[wanted].append(me)
    counts = sorted(map(len, hosts.values()))
    assert counts[0] >= 21 - 4
    assert counts[-1] <= 21 + 4


@given(uids, st.sets(peer_ids, min_size=1, max_size=8), st.integers(0, 4), st.integers(1, 4))
def test_claims_never_lead_to_more_replicas_than_enough(
    uid: UID, peers: set[PeerID], serving: int, enough: int
) -> None:
    ordered = sorted(peers)
    seen = {uid: [replica(uid, p, SERVING if n < serving else CLAIMED) for n, p in enumerate(ordered)]}
    claimants = ordered[serving:]
    kept = [p for p in claimants if not lost_claims([uid], seen, p, enough=enough)]
    assert len(kept) == min(len(claimants), max(0, enough - min(serving, len(ordered))))


@given(uids, peer_ids, st.sets(peer_ids, max_size=4))
def test_who_leaves_takes_no_claim_away(uid: UID, peer_id: PeerID, leaving: set[PeerID]) -> None:
    seen = {uid: [replica(uid, p, LEAVING, 9) for p in leaving - {peer_id}]}
    assert lost_claims([uid], seen, peer_id) == []


@given(uids, st.dictionaries(peer_ids, st.tuples(states, st.integers(0, 9)), max_size=6), peer_ids)
def test_replicas_far_behind_are_fetched_last(
    uid: UID, hosted: dict[PeerID, tuple[ReplicaState, int]], me: PeerID
) -> None:
    found = state_sources([replica(uid, p, *what) for p, what in hosted.items()], me, random.Random(1))
    behind = [r.update_count < 0.9 * median_high(other.update_count for other in found) for r in found]
    assert behind == sorted(behind), "those that were restarted come last"
    able = {p for p, (state, _) in hosted.items() if state is not CLAIMED and p != me}
    assert {r.peer_id for r in found} == able


@given(uids, st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(-1, 9))
def test_a_state_is_fresher_only_if_most_are(uid: UID, counts: list[int], own: int) -> None:
    """A minority that claims more updates has no influence."""
    peers = seeded_peers(len(counts))
    hosts = [replica(uid, peer, SERVING, count) for peer, count in zip(peers, counts, strict=True)]
    more = [r for r in hosts if r.update_count > own]
    assert ahead_of(own, hosts) == (more if len(more) > len(hosts) / 2 else [])


@given(st.lists(uids, unique=True, max_size=20), st.dictionaries(peer_ids, st.integers(-1, 6), max_size=5))
def test_heirs_get_no_more_than_they_have_room_for_and_share_evenly(
    wanted: list[UID], rooms: dict[PeerID, int]
) -> None:
    found = assign_orphans(wanted, rooms)
    given_to = Counter(found.values())
    total = sum(max(room, 0) for room in rooms.values())
    assert set(found) <= set(wanted)
    assert len(found) == min(len(wanted), total)
    assert all(given_to[p] <= max(room, 0) for p, room in rooms.items())
    for p in given_to:  # nobody that had room was passed over when this one got its last
        assert all(given_to[p] <= given_to[other] + 1 for other in rooms if given_to[other] < rooms[other])


@given(st.integers(1, 40), st.integers(1, 5))
def test_who_says_that_it_has_room_for_all_gets_no_more_than_others(wanted: int, honest: int) -> None:
    liar, *others = seeded_peers(honest + 1)
    found = assign_orphans(GRID[:wanted], {liar: 2**32 - 1, **dict.fromkeys(others, wanted)})
    assert list(found.values()).count(liar) <= -(-wanted // (honest + 1))


@given(st.integers(2, 5), st.integers(0, 40), st.randoms(use_true_random=False))
def test_no_expert_loses_its_last_host_when_all_give_up_their_surplus_at_once(
    count: int, most: int, rng: random.Random
) -> None:
    peers = seeded_peers(count)
    hosts = {uid: rng.sample(peers, rng.randint(1, count)) for uid in GRID[:20]}
    replicas = {uid: [replica(uid, p, SERVING) for p in those] for uid, those in hosts.items()}
    left = {uid: set(those) for uid, those in hosts.items()}
    for peer_id in peers:
        mine = [uid for uid, those in hosts.items() if peer_id in those]
        given_up = releasable(replicas, mine, peer_id, most)
        assert len(given_up) <= most
        for uid in given_up:
            left[uid].remove(peer_id)
    assert all(left.values())


def test_replicas_that_are_claimed_or_leave_take_nothing_off_a_host() -> None:
    uid = GRID[0]
    me, other = sorted(seeded_peers(2), key=lambda peer_id: preference(uid, peer_id))
    for state, given_up in ((SERVING, [uid]), (LEAVING, []), (CLAIMED, [])):
        replicas = {uid: [replica(uid, me, SERVING), replica(uid, other, state)]}
        assert releasable(replicas, [uid], me, 5) == given_up
        assert releasable(replicas, [uid], other, 5) == []


@given(
    st.lists(st.lists(st.integers(0, 10**6), min_size=1, max_size=4), min_size=1, max_size=6),
    st.data(),
)
def test_half_of_the_nodes_cant_make_more_updates_plausible(
    honest: list[list[int]], data: st.DataObject
) -> None:
    lies = data.draw(st.lists(st.lists(st.integers(0, 10**15), max_size=4), max_size=len(honest)))
    counts = [*honest, *lies]
    peers = seeded_peers(len(counts))
    announced = [(peer_id, count) for peer_id, some in zip(peers, counts, strict=True) for count in some]
    seen = {
        uid: [replica(uid, peer_id, SERVING, count)]
        for uid, (peer_id, count) in zip(GRID, announced, strict=False)
    }
    assert plausible_updates(usual_updates(seen)) <= 10 * max(map(max, honest)) + 30_000


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=8), st.integers(1, 10))
def test_an_expert_with_ten_times_the_updates_of_most_nodes_experts_is_plausible(
    counts: list[int], popularity: int
) -> None:
    peers = seeded_peers(len(counts) + 1)
    seen = {
        uid: [replica(uid, peer_id, SERVING, count)]
        for uid, peer_id, count in zip(GRID, peers, [popularity * min(counts), *counts], strict=False)
    }
    assert plausible_updates(usual_updates(seen)) >= popularity * min(counts)


def test_where_nobody_serves_anything_any_count_is_plausible() -> None:
    (peer_id,) = seeded_peers(1)
    usual = usual_updates({GRID[0]: [replica(GRID[0], peer_id, CLAIMED, 5)], GRID[1]: []})
    assert usual is None
    assert plausible_updates(usual) == MAX_UPDATE_COUNT
