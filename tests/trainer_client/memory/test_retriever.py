"""Searches among hosts that fail, stall and lie, in virtual time."""

import asyncio
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
from expert_fakes import VirtualRunner, virtual_time
from hypothesis import given
from hypothesis import strategies as st
from loop_holds import pauses
from memory_samples import DIMENSIONS, MEMORY, SWARM, Lie, SampleHost, SampleMemory, SampleSwarm, peer_ids

from dht.memory import MAX_SCORES, MAX_SEARCHED, Passage
from expert_server.memory.shard import Shard
from peer.errors import DataError
from peer.identity import PeerID
from peer.loop import TimeSlices
from peer.metrics import total
from trainer_client.memory.calls import HostCalls, choose_hosts, quick_offers
from trainer_client.memory.retriever import (
    MOST_CHARACTERS,
    MOST_WANTED,
    Hit,
    Retriever,
    SearchResult,
    _affordable,
    check_query,
    ranked_by_words,
)

K, CELLS = 5, 3
MOST = 3
"""The largest number of queries at once: more results would be parsed on a thread, for which virtual time does not
wait.
"""
MEMORIES = [SampleMemory.make(seed, revoked=3) for seed in range(4)]
FOUND_OUT: tuple[Lie, ...] = (
    "forged text", "wrong vectors", "inflated scores", "wrong texts", "wrong positions", "says missing",
    "reads nothing", "all revoked", "junk", "stalls", "stalls at reading", "fails", "busy", "too many", "other order",
)  # fmt: skip
"""Lies and failures despite which the right passages are found."""
OMISSIONS: tuple[Lie, ...] = ("omits", "omits best", "deflated scores")
DISHONEST: tuple[Lie, ...] = (
    "forged text", "wrong vectors", "inflated scores", "wrong texts", "wrong positions", "junk", "too many",
    "other order",
)  # fmt: skip


def retriever_of(swarm: SampleSwarm, checked_share: float = 0.0, seed: int = 0) -> Retriever:
    rng = random.Random(seed)
    return Retriever(
        swarm, HostCalls(swarm, str(MEMORY), rng=rng), SWARM, rng=rng, checked_share=checked_share
    )


def swarm_of(memory: SampleMemory, *lies: Lie | None, after_s: float = 0.01) -> SampleSwarm:
    """For each lie, a host of all shards."""
    hosts = [SampleHost(memory, memory.manifest.by_root, lie, after_s) for lie in lies]
    return SampleSwarm(memory, dict(zip(peer_ids(len(lies)), hosts, strict=True)))


def searched(
    runner: VirtualRunner | asyncio.Runner, retriever: Retriever, numbers: list[int], k: int = K
) -> list[SearchResult]:
    """The results for queries that are passages of the memory. Also waits for the checks that follow."""
    vectors_QD, scores_QC = retriever.directory.encode([str(number) for number in numbers])

    async def search() -> list[SearchResult]:
        results = await retriever.search_vectors(vectors_QD, scores_QC, k, CELLS)
        await retriever.checked()
        return results

    return runner.run(search())


def check_sound(memory: SampleMemory, numbers: list[int], results: list[SearchResult]) -> None:
    """Checks that all results are in the memory, are not revoked, and have their own scores and places."""
    for number, result in zip(numbers, results, strict=True):
        query_D = memory.vectors_ND[number].astype(int)
        scores = []
        for hit in result.hits:
            assert hit.passage in memory.passages
            assert memory.places[hit.passage.offset] not in memory.manifest.revoked
            vector_D = memory.vectors_ND[hit.passage.offset].astype(int)
            assert hit.leaf == hit.passage.leaf(memory.vectors_ND[hit.passage.offset].tobytes())
            assert hit.memory == MEMORY
            scores.append(int(query_D @ vector_D))
            assert hit.score == hit.similarity == pytest.approx(scores[-1] / int(query_D @ query_D))
        assert scores == sorted(scores, reverse=True)
        assert len({hit.leaf for hit in result.hits}) == len(result.hits) <= K


def best_texts(memory: SampleMemory, swarm: SampleSwarm, number: int, k: int = K) -> list[str]:
    _, scores_QC = swarm.encode([str(number)])
    order = np.argsort(-scores_QC[0], kind="stable")
    filled = [tuple(int(c) for c in np.unravel_index(c, memory.manifest.grid)) for c in order]
    cells = [cell for cell in filled if cell in memory.manifest.by_cell][:CELLS]
    return [text for _, text in memory.best(memory.vectors_ND[number], cells, k)]


def texts_of(result: SearchResult) -> list[str]:
    return [hit.passage.text for hit in result.hits]


@given(
    seed_of_memory=st.sampled_from(range(len(MEMORIES))),
    lies=st.lists(st.sampled_from(FOUND_OUT), max_size=3),
    numbers=st.lists(st.integers(0, 39), min_size=1, max_size=MOST),
    seed=st.integers(0, 2**16),
)
def test_passages_of_honest_replicas_are_found_beside_any_liars(
    seed_of_memory: int, lies: list[Lie], numbers: list[int], seed: int
) -> None:
    """Each shard has all the liars and one random honest host."""
    memory = MEMORIES[seed_of_memory]
    rng = random.Random(seed)
    swarm = swarm_of(memory, None, None, *lies)
    honest = [list[bytes](), list[bytes]()]
    for root in memory.manifest.by_root:
        rng.choice(honest).append(root)
    for host, roots in zip(swarm.hosts.values(), honest, strict=False):
        host.roots = roots
    with virtual_time() as runner:
        retriever = retriever_of(swarm, checked_share=1.0, seed=seed)
        for _ in range(2):  # the second time with what was learnt
            results = searched(runner, retriever, numbers)
            check_sound(memory, numbers, results)
            for number, result in zip(numbers, results, strict=True):
                assert texts_of(result) == best_texts(memory, swarm, number)
                assert not result.missing
        banned = retriever.calls.breakers.banned(runner.get_loop().time())
    assert banned <= sum(lie in DISHONEST for lie in lies)


@given(
    seed_of_memory=st.sampled_from(range(len(MEMORIES))),
    lies=st.lists(st.sampled_from((*FOUND_OUT, *OMISSIONS, None)), min_size=1, max_size=4),
    numbers=st.lists(st.integers(0, 39), min_size=1, max_size=MOST),
    seed=st.integers(0, 2**16),
)
def test_whatever_hosts_answer_all_that_is_found_is_proven(
    seed_of_memory: int, lies: list[Lie | None], numbers: list[int], seed: int
) -> None:
    memory = MEMORIES[seed_of_memory]
    swarm = swarm_of(memory, *lies)
    with virtual_time() as runner:
        retriever = retriever_of(swarm, checked_share=1.0, seed=seed)
        for _ in range(2):
            check_sound(memory, numbers, searched(runner, retriever, numbers))
        avoided = runner.run(avoided_by(retriever))
    honest = {host for host, sample in swarm.hosts.items() if sample.lie is None}
    assert not avoided & honest


async def avoided_by(retriever: Retriever) -> frozenset[object]:
    return frozenset(retriever.calls.avoided())


@pytest.mark.parametrize("lie", ["fails", "says missing", "inflated scores", "forged text"])
def test_one_honest_host_is_found_among_sixty_others(lie: Lie) -> None:
    memory = MEMORIES[0]
    swarm = swarm_of(memory, *[lie] * 60, None)
    with virtual_time() as runner:
        retriever = retriever_of(swarm)
        (result,) = searched(runner, retriever, [7])
        assert texts_of(result) == best_texts(memory, swarm, 7)
        assert not result.missing


def test_strangers_that_announce_everything_do_not_hold_a_searchers_loop() -> None:
    """A search of 32 cells of 64 shards. Each shard has two honest hosts of 16, and 62 strangers say they have all."""
    peers, rng = peer_ids(78), random.Random(0)
    items = list(range(32 * 64))
    offers: dict[PeerID, set[int]] = {peer: set(items) for peer in peers[16:]}
    for item in items:
        for host in rng.sample(peers[:16], 2):
            offers.setdefault(host, set()).add(item)
    swarm = swarm_of(MEMORIES[0], None)
    got = list[int]()

    async def call(host: PeerID, some: list[int]) -> list[int]:
        got.extend(some)
        return some

    async def work() -> None:
        got.clear()
        calls, ends = HostCalls(swarm, "docs", rng=rng), asyncio.get_running_loop().time() + 60
        missing = await calls.spread(items, [offers], call, ("Search", True), lambda some: [some], ends)
        assert not missing
        assert sorted(got) == items

    assert pauses(work, 1 / 3)


@pytest.mark.parametrize("lie", DISHONEST)
def test_a_liar_is_asked_once_and_then_avoided(lie: Lie) -> None:
    memory = MEMORIES[0]
    swarm = swarm_of(memory, None, lie)
    _, liar = swarm.hosts
    with virtual_time() as runner:
        retriever = retriever_of(swarm)
        while not swarm.hosts[liar].calls:
            assert texts_of(searched(runner, retriever, [7])[0]) == best_texts(memory, swarm, 7)
        calls = len(swarm.hosts[liar].calls)
        for number in range(20):
            assert texts_of(searched(runner, retriever, [number])[0]) == best_texts(memory, swarm, number)
        assert runner.run(avoided_by(retriever)) == {liar}
    assert len(swarm.hosts[liar].calls) == calls <= 2
    assert total(retriever.calls.metrics.lies) == 1


@pytest.mark.parametrize("lie", OMISSIONS)
def test_whoever_leaves_passages_out_is_noticed_within_a_thousand_queries(lie: Lie) -> None:
    memory = MEMORIES[1]
    swarm = swarm_of(memory, None, lie, None)
    omitter = list(swarm.hosts)[1]
    rng = random.Random(1)
    with virtual_time() as runner:
        retriever = retriever_of(swarm, checked_share=1 / 50)
        for _ in range(1000):
            check_sound(memory, [n := rng.randrange(40)], searched(runner, retriever, [n]))
            if runner.run(avoided_by(retriever)):
                break
        assert runner.run(avoided_by(retriever)) == {omitter}
    assert total(retriever.calls.metrics.lies) == 1


def test_leaving_out_what_the_newest_revision_revokes_is_no_omission() -> None:
    memory, newest = MEMORIES[2], MEMORIES[2].manifest
    revoking = replace(newest, revision=2, revoked=frozenset(memory.places.values()))
    swarm = swarm_of(memory, None, "omits")
    with virtual_time() as runner:
        retriever = retriever_of(swarm, checked_share=1.0)
        swarm.newest = revoking
        for number in range(20):
            searched(runner, retriever, [number])
        assert not runner.run(avoided_by(retriever))
        swarm.newest = None
        for number in range(20):
            searched(runner, retriever, [number])
        assert runner.run(avoided_by(retriever)) == {list(swarm.hosts)[1]}


def test_whoever_says_that_a_later_revision_revokes_what_it_left_out_is_believed_for_a_while() -> None:
    memory = MEMORIES[2]
    later = memory.revoking(*range(40))
    files = {root: shard.without(later.manifest.revoked_in) for root, shard in memory.shards.items()}
    shards = {
        root: Shard.parse(file, replace(memory.manifest.by_root[root], size=len(file)), DIMENSIONS)
        for root, file in files.items()
        if file is not None
    }
    swarm = swarm_of(memory, None, None)
    ahead = list(swarm.hosts)[1]
    swarm.hosts[ahead].memory = replace(later, shards={**memory.shards, **shards})
    with virtual_time() as runner:
        retriever = retriever_of(swarm, checked_share=1.0)
        for number in range(20):
            searched(runner, retriever, [number])
        assert not runner.run(avoided_by(retriever))
        assert not retriever.calls.faulty
        runner.run(asyncio.sleep(1000.0))
        for number in range(20):
            searched(runner, retriever, [number])
        assert dict(retriever.calls.faulty) == {ahead: "omission"}


def test_a_query_takes_one_call_for_scores_and_one_for_text() -> None:
    memory = MEMORIES[0]
    swarm = swarm_of(memory, None, after_s=0.1)
    with virtual_time() as runner:
        retriever = retriever_of(swarm)
        searched(runner, retriever, [7])
        assert runner.get_loop().time() == pytest.approx(0.2)
        assert next(iter(swarm.hosts.values())).calls == ["Search", "Read"]
        # What was read recently is not read again.
        searched(runner, retriever, [7])
        assert runner.get_loop().time() == pytest.approx(0.3)


def test_texts_are_read_from_hosts_of_cells_that_were_not_asked() -> None:
    """One host has the secondary shards of the cells that are asked, and another has all primary shards."""
    memory = MEMORIES[0]
    swarm = swarm_of(memory, None, None)
    for host, is_secondary in zip(swarm.hosts.values(), (True, False), strict=True):
        host.roots = {info.root for info in memory.manifest.shards if info.is_secondary == is_secondary}
    _, having = swarm.hosts
    elsewhere = 0
    with virtual_time() as runner:
        retriever = retriever_of(swarm)
        for number in range(40):
            (result,) = searched(runner, retriever, [number])
            assert texts_of(result) == best_texts(memory, swarm, number)
            assert not result.missing
            assert {hit.served_by for hit in result.hits} == {having}
            _, scores_QC = swarm.encode([str(number)])
            located = runner.run(swarm.locate(scores_QC, CELLS, frozenset()))
            asked = set(located.cells[0])
            for hit in result.hits:
                text = memory.places[hit.passage.offset]
                elsewhere += memory.manifest.by_root[text.root].cell not in asked
    assert elsewhere


def test_texts_that_nobody_gives_are_missing_and_nobody_is_banned_for_them() -> None:
    memory = MEMORIES[0]
    swarm = swarm_of(memory, None)
    (host,) = swarm.hosts.values()
    host.roots = {info.root for info in memory.manifest.shards if info.is_secondary}
    with virtual_time() as runner:
        retriever = retriever_of(swarm)
        for number in range(10):
            (result,) = searched(runner, retriever, [number])
            assert not result.hits
            assert result.missing
        assert not runner.run(avoided_by(retriever))


def test_as_many_as_wanted_are_found_if_hosts_do_not_know_yet_that_the_best_are_revoked() -> None:
    memory = SampleMemory.make(0)
    for number in range(40):
        best = memory.best(memory.vectors_ND[number], memory.manifest.by_cell, 3)
        revoking = memory.revoking(*(int(text.removeprefix("text ")) for _, text in best))
        swarm = swarm_of(revoking, None)
        with virtual_time() as runner:
            (result,) = searched(runner, retriever_of(swarm), [number])
            assert texts_of(result) == best_texts(revoking, swarm, number)


def test_the_largest_search_asks_hosts_for_no_more_than_they_answer() -> None:
    numbers, whole = [3, 14, 15], SampleMemory.make(0, passages=120)
    scores_QN = whole.vectors_ND[numbers].astype(int) @ whole.vectors_ND.T.astype(int)
    memory = whole.revoking(int(scores_QN.max(axis=0).argmin()))
    swarm = swarm_of(memory, None)
    with asyncio.Runner() as runner:  # so many passages are parsed on a thread
        results = searched(runner, retriever_of(swarm), numbers, MOST_WANTED)
        for number, result in zip(numbers, results, strict=True):
            assert texts_of(result) == best_texts(memory, swarm, number, MOST_WANTED)
            assert len(result.hits) == MOST_WANTED


def test_a_batch_costs_one_call_to_each_host() -> None:
    memory = MEMORIES[0]
    swarm = swarm_of(memory, None, None, after_s=0.1)
    roots = sorted(memory.manifest.by_root)
    for host, part in zip(swarm.hosts.values(), (roots[::2], roots[1::2]), strict=True):
        host.roots = part
    with virtual_time() as runner:
        retriever = retriever_of(swarm)
        numbers = [3, 14, 15]
        for number, result in zip(numbers, searched(runner, retriever, numbers), strict=True):
            assert texts_of(result) == best_texts(memory, swarm, number)
        assert runner.get_loop().time() == pytest.approx(0.2)
    assert [host.calls for host in swarm.hosts.values()] == [["Search", "Read"], ["Search", "Read"]]


@pytest.mark.parametrize("lie", ["stalls", "fails", "stalls at reading"])
def test_a_host_that_dies_costs_one_hedge_and_no_passage(lie: Lie) -> None:
    memory = MEMORIES[0]
    swarm = swarm_of(memory, None, None)
    with virtual_time() as runner:
        retriever = retriever_of(swarm)
        for number in range(40):
            retriever._kept.clear()
            searched(runner, retriever, [number])
        victim = max(swarm.hosts.values(), key=lambda host: len(host.calls))
        victim.lie = lie
        slow = 0
        for number in range(40):
            retriever._kept.clear()
            began = runner.get_loop().time()
            assert texts_of(searched(runner, retriever, [number])[0]) == best_texts(memory, swarm, number)
            took_s = runner.get_loop().time() - began
            assert took_s < 0.2
            slow += took_s > 0.03
        assert slow <= 4


def test_a_host_that_a_liar_outran_is_asked_again() -> None:
    memory = MEMORIES[0]
    swarm = swarm_of(memory, None, None)
    (_, honest), (liars_id, liar) = swarm.hosts.items()
    with virtual_time() as runner:
        retriever = retriever_of(swarm)
        for number in range(40):
            retriever._kept.clear()
            searched(runner, retriever, [number])
        # So late that the other host is asked too, but still earlier than that one's answer.
        liar.lie, liar.after_s, honest.after_s = "inflated scores", 0.1, 0.5
        for number in range(40):
            retriever._kept.clear()
            (result,) = searched(runner, retriever, [number])
            assert not result.missing
            assert texts_of(result) == best_texts(memory, swarm, number)
            if runner.run(avoided_by(retriever)):
                break
        assert runner.run(avoided_by(retriever)) == {liars_id}


def test_shards_without_a_live_host_are_reported_as_missing_cells() -> None:
    memory = MEMORIES[0]
    swarm = swarm_of(memory, "fails", None)
    roots = sorted(memory.manifest.by_root)
    for host, part in zip(swarm.hosts.values(), (roots[:3], roots[3:]), strict=True):
        host.roots = part
    lost = {memory.manifest.by_root[root].cell for root in roots[:3]}
    with virtual_time() as runner:
        retriever = retriever_of(swarm)
        results = searched(runner, retriever, [3, 14, 15])
    assert any(result.missing for result in results)
    for result in results:
        assert set(result.missing) <= lost
        assert result.missing or len(result.hits) == K


def test_when_all_hosts_stall_a_search_ends_in_time_with_nothing() -> None:
    swarm = swarm_of(MEMORIES[0], "stalls", "stalls")
    with virtual_time() as runner:
        retriever = retriever_of(swarm)
        (result,) = searched(runner, retriever, [7])
        assert result == SearchResult((), missing=result.missing)
        assert result.missing
        assert runner.get_loop().time() <= 10.0


def test_closing_ends_a_search() -> None:
    """Otherwise a trainer that leaves would warn of hosts that it no longer calls."""

    async def close() -> None:
        retriever = retriever_of(swarm_of(MEMORIES[0], "stalls", "stalls"))
        searching = asyncio.create_task(retriever.search(["1"], K, CELLS))
        async with asyncio.timeout(60):
            while not total(retriever.calls.metrics.queries):  # noqa: ASYNC110  # a count sets no event
                await asyncio.sleep(0.01)
            await retriever.close()
        assert searching.cancelled()

    asyncio.run(close())


def test_a_query_without_a_known_word_finds_nothing_and_asks_nobody() -> None:
    memory = MEMORIES[0]
    swarm = swarm_of(memory, None)
    with virtual_time() as runner:
        retriever = retriever_of(swarm)
        vectors_QD = np.stack([memory.vectors_ND[0], np.zeros_like(memory.vectors_ND[0])])
        scores_QC = memory.codebook.scores(vectors_QD)
        known, unknown = runner.run(retriever.search_vectors(vectors_QD, scores_QC, K, CELLS))
        assert len(known.hits) == K
        assert unknown == SearchResult((), is_understood=False)


@pytest.mark.parametrize(
    ("texts", "k", "cells", "said"),
    [
        (["a" * (MOST_CHARACTERS + 1)], 1, 1, "shorten it"),
        (["a"], 0, 1, "0 passages"),
        (["a"], MOST_WANTED + 1, 1, "ask for 1 to"),
        (["a"], 1, 0, "0 cells"),
    ],
)
def test_a_search_that_cannot_be_made_is_refused(texts: list[str], k: int, cells: int, said: str) -> None:
    with pytest.raises(DataError, match=said):
        check_query(texts, k, cells)


def chosen_of(offers: Mapping[PeerID, set[int]], rng: random.Random) -> list[tuple[PeerID, set[int]]]:
    async def choose() -> list[tuple[PeerID, set[int]]]:
        return [(host, set(items)) async for host, items in choose_hosts(offers, rng, TimeSlices())]

    return asyncio.run(choose())


@given(
    offered=st.dictionaries(st.integers(0, 7), st.sets(st.integers(0, 20)), max_size=8),
    seed=st.integers(0, 99),
)
def test_chosen_hosts_cover_all_that_anybody_has(offered: dict[int, set[int]], seed: int) -> None:
    peers = peer_ids(8)
    offers = {peers[n]: items for n, items in offered.items()}
    chosen = chosen_of(offers, random.Random(seed))
    given_to = [item for _, items in chosen for item in items]
    assert sorted(given_to) == sorted(set().union(*offers.values()))
    left = set(given_to)
    for host, items in chosen:
        assert items == offers[host] & left
        assert len(items) == max(len(some & left) for some in offers.values()), "another host has more"
        left -= items


@given(st.lists(st.integers(1, 2**24), min_size=1, max_size=600))
def test_searches_are_split_into_calls_that_hosts_answer(costs: list[int]) -> None:
    parts = list(_affordable(costs, lambda cost: cost))
    assert [cost for part in parts for cost in part] == costs
    assert all(sum(part) <= MAX_SCORES and 1 <= len(part) <= MAX_SEARCHED for part in parts)


def test_few_hosts_are_chosen() -> None:
    a, b, c = peer_ids(3)
    offers = {b: {1}, a: {1, 2, 3}, c: {2}}
    assert chosen_of(offers, random.Random(0)) == [(a, {1, 2, 3})]


def test_hosts_that_have_the_same_are_chosen_equally_often() -> None:
    offers, rng = {host: {1, 2} for host in peer_ids(4)}, random.Random(0)
    first = Counter(chosen_of(offers, rng)[0][0] for _ in range(400))
    assert min(first[host] for host in offers) > 70


def quick(
    offers: Sequence[Mapping[PeerID, set[int]]], times_s: Mapping[PeerID, float]
) -> dict[PeerID, set[int]]:
    """What each host is asked for, without hosts that are asked for nothing."""
    found = asyncio.run(quick_offers(offers, times_s, TimeSlices()))
    return {host: set(items) for host, items in found.items() if items}


def test_a_host_that_is_much_slower_than_another_is_passed_over() -> None:
    a, b, c = peer_ids(3)
    all_have_it = [{host: {1} for host in (a, b, c)}]
    assert quick(all_have_it, {a: 2.0, b: 0.1}).keys() == {b, c}
    assert quick(all_have_it, {a: 0.14, b: 0.1}).keys() == {a, b, c}
    assert quick([{a: {1, 2}, b: {1}}], {a: 2.0, b: 0.1}) == {a: {2}, b: {1}}
    assert quick([{a: {1}}, {b: {1}}], {a: 2.0, b: 0.1}) == {b: {1}}
    assert quick([{a: {1}}], {a: 2.0}) == {a: {1}}
    assert quick([], {}) == {}


@given(
    tiers=st.lists(
        st.dictionaries(st.integers(0, 5), st.sets(st.integers(0, 4), min_size=1)), min_size=1, max_size=3
    ),
    times=st.dictionaries(st.integers(0, 5), st.sampled_from([0.01, 0.05, 0.1, 0.3, 0.4, 2.0])),
)
def test_an_item_is_asked_from_the_quick_hosts_of_the_first_group_that_has_any(
    tiers: list[dict[int, set[int]]], times: dict[int, float]
) -> None:
    peers = peer_ids(6)
    offers = [{peers[n]: items for n, items in some.items()} for some in tiers]
    times_s = {peers[n]: s for n, s in times.items() if any(n in some for some in tiers)}
    expected: dict[PeerID, set[int]] = {}
    for item in range(5):
        groups = [[host for host, items in some.items() if item in items] for some in offers]
        quickest = min((times_s[host] for some in groups for host in some if host in times_s), default=0.0)
        fit = [[host for host in some if times_s.get(host, 0.0) <= 3 * quickest + 0.05] for some in groups]
        for host in next((some for some in fit if some), []):
            expected.setdefault(host, set()).add(item)
    assert quick(offers, times_s) == expected


def a_hit(text: str, similarity: float) -> Hit:
    passage = Passage(text, "", "", 0, "")
    return Hit(passage, similarity, similarity, MEMORY, b"", peer_ids(1)[0], np.zeros(8, np.int8))


def rarities(words: Iterable[str]) -> list[float]:
    return [{"the": 0.1, "sauna": 5.0}.get(word, 1.0) for word in words]


def test_rare_words_that_a_passage_shares_with_the_query_raise_its_rank() -> None:
    hits = [a_hit("the the the", 0.5), a_hit("a SAUNA.", 0.45), a_hit("nothing", 0.48)]
    ranked = ranked_by_words("The sauna", hits, rarities)
    assert [hit.passage.text for hit in ranked] == ["a SAUNA.", "the the the", "nothing"]
    assert ranked[2].score == ranked[2].similarity == 0.48


@given(
    text=st.text("ab sauna", max_size=20),
    passages=st.lists(st.tuples(st.text("ab sauna", max_size=20), st.floats(-1, 1)), max_size=5),
)
def test_ranking_by_words_keeps_all_hits_and_adds_a_bounded_part(
    text: str, passages: list[tuple[str, float]]
) -> None:
    hits = [a_hit(*passage) for passage in sorted(passages, key=lambda passage: -passage[1])]
    ranked = ranked_by_words(text, hits, rarities)
    assert sorted(hit.passage.text for hit in ranked) == sorted(hit.passage.text for hit in hits)
    assert [hit.score for hit in ranked] == sorted((hit.score for hit in ranked), reverse=True)
    assert all(0 <= hit.score - hit.similarity <= 0.25 * 2.2 for hit in ranked)
