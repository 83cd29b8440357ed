"""Answers of the dashboard's API, for swarms of any size and for any request."""

import contextlib
import gc
import json
import math
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from loop_lags import least_cpu_s
from simulated_readings import (
    INVITE,
    NOW,
    Asked,
    large_swarm,
    manifest,
    memory,
    node,
    peer,
    picture_of,
    replica,
    trainer,
)

from dht.announcements import Activity, Reachability, ReplicaState
from dht.manifest import AdmissionSpec
from dht.receipts import SignedWork, Work
from talkoot.credit import Credit
from talkoot.dashboard import api
from talkoot.dashboard.api import ApiError, DashboardState
from talkoot.dashboard.picture import Picture, _unevenness
from talkoot.dashboard.watcher import samples_of

API_S = 0.1
PICTURE_S = 0.2
"""The longest time for one page and for a new picture, in a swarm of 10,000 nodes."""
_SLOW = 10
"""A busy machine may be this many times slower."""


@pytest.fixture(scope="module")
def large() -> Picture:
    return large_swarm(10_000)


def state_of(
    picture: Picture | None, unreachable_since: float | None = None, now: float = NOW + 1
) -> DashboardState:
    return DashboardState(
        picture, "sauna-x", "sauna", str(INVITE), unreachable_since, 2.0, now, 0.25, ("keep",)
    )


def healthy(**changes: Any) -> Picture:
    """Two nodes that serve all experts, and a trainer."""
    model = manifest((2, 2))
    replicas = [replica(uid, number % 2) for number, uid in enumerate(model.uids())]
    values: dict[str, Any] = {"swarm": model, "replicas": replicas} | changes
    return picture_of([node(0), node(1)], [trainer(0)], **values)


# The state in words


def test_a_swarm_in_which_all_experts_have_a_host_is_healthy() -> None:
    shown = api.swarm(state_of(healthy()))
    assert shown["state"] == {"level": "ok", "words": "healthy"}
    assert shown["nodes"] == {"live": 2, "gone": 0, "unsteady": 0}
    assert (shown["experts"], shown["replicas"], shown["trainers"]) == ({"live": 8, "total": 8}, 8, 1)
    assert (shown["tokens_per_s"], shown["validation_loss"], shown["bits_per_byte"]) == (100.0, 2.25, 3.25)
    assert shown["join"]["node"] == f"talkoot node --join {INVITE}"


def test_nodes_that_are_unsteady_are_counted_and_found_as_long_as_they_are_there() -> None:
    unsteady = [node(1, unsteady=True), node(2, unsteady=True)]
    picture = picture_of([node(0), *unsteady], gone=[node(3, unsteady=True)])
    assert api.swarm(state_of(picture))["nodes"] == {"live": 3, "gone": 1, "unsteady": 2}
    rows = api.nodes(picture, {"sort": "unsteady", "order": "desc"})["nodes"]
    assert [row["unsteady"] for row in rows] == [True, True, False, False]
    restarted = picture_of([node(0)]).with_earlier(picture.nodes, [])
    assert not any(row["unsteady"] for row in restarted.nodes if row["state"] == "gone")


def test_the_dashboard_says_how_it_does_itself() -> None:
    assert api.swarm(state_of(None))["dashboard"] == {"longest_lag_s": 0.25, "unsteady": ["keep"]}


def test_a_warning_stands_beside_the_state() -> None:
    shown = api.swarm(state_of(healthy(warning="nobody can join this swarm in 3.0 days")))
    assert shown["warning"] == "nobody can join this swarm in 3.0 days"
    assert shown["state"]["level"] == "ok"
    assert api.swarm(state_of(healthy()))["warning"] is api.swarm(state_of(None))["warning"] is None


@pytest.mark.parametrize(
    ("hosted", "level", "words"),
    [
        (7, "warn", "1 expert has no host"),
        (5, "warn", "3 experts have no host"),
        (3, "bad", "5 experts have no host"),
        (0, "bad", "no expert has a host"),
    ],
)
def test_missing_hosts_are_counted(hosted: int, level: str, words: str) -> None:
    model = manifest((2, 2))
    replicas = [replica(uid, 0) for uid in model.uids()[:hosted]]
    assert api.health(state_of(healthy(replicas=replicas))) == {"level": level, "words": words}


@pytest.mark.parametrize(
    ("replicas", "level", "words"),
    [
        ((2, 1), "ok", "healthy"),
        ((2,), "warn", "1 shard of a memory has no host"),
        ((), "warn", "2 shards of memories have no host"),
    ],
)
def test_shards_without_a_host_are_counted(replicas: tuple[int, ...], level: str, words: str) -> None:
    picture = healthy(memories=[memory(replicas=replicas)])
    assert api.health(state_of(picture)) == {"level": level, "words": words}


@pytest.mark.parametrize(
    ("capacity", "replicas", "level", "words"),
    [
        (0, (2, 1), "ok", "healthy, with memories alone"),
        (0, (2,), "warn", "1 shard of a memory has no host"),
        (4, (2, 1), "bad", "no expert has a host"),
    ],
)
def test_a_swarm_for_memories_alone_needs_no_experts(
    capacity: int, replicas: tuple[int, ...], level: str, words: str
) -> None:
    hosts = [node(0, expert_count=0, expert_capacity=0), node(1, expert_count=0, expert_capacity=capacity)]
    picture = picture_of(hosts, [], swarm=manifest((2, 2)), replicas=[], memories=[memory(replicas=replicas)])
    assert api.health(state_of(picture)) == {"level": level, "words": words}


def test_it_says_how_to_search_where_a_memory_is_published() -> None:
    assert api.swarm(state_of(healthy()))["join"]["search"] is None
    shown = api.swarm(state_of(healthy(memories=[memory(replicas=(2,))])))
    assert shown["join"]["search"] == f'talkoot search --join {INVITE} "question"'


def test_where_the_founder_invites_each_person_no_command_is_shown() -> None:
    by_token = manifest((2, 2)).model_copy(update={"admission": AdmissionSpec(mode="token")})
    shown = api.swarm(state_of(healthy(swarm=by_token, memories=[memory(replicas=(2,))])))
    assert shown["join"] == {"node": None, "train": None, "search": None}


def test_memories_are_listed_and_those_that_need_hosts_most_come_first() -> None:
    memories = [memory("safe"), memory("alone", (1, 3)), memory("lost", (2,)), memory("many", (3, 3, 3))]
    picture = healthy(memories=memories)
    page = api.memories(picture, {})
    shown = {
        row["name"]: (row["below_two"], row["replicas_min"], row["replicas_mean"]) for row in page["memories"]
    }
    # Anybody may announce a third shard of a memory that has two.
    assert shown == {
        "lost": (1, 0, 1.0),
        "alone": (1, 1, 2.0),
        "safe": (0, 2, 2.0),
        "many": (0, 3, 3.0),
    }
    assert [row["name"] for row in page["memories"]][:2] == ["lost", "alone"]
    assert api.swarm(state_of(picture))["memories"] == {
        "count": 4, "shards": 8, "served": 7, "below_two": 2, "queries_per_s": 1.0
    }  # fmt: skip
    assert api.memories(None, {})["total"] == 0


def test_replicas_of_memories_have_a_history() -> None:
    picture = healthy(memories=[memory(replicas=(1, 3))])
    samples = {(sample.metric, sample.name.split(", ")[0]): sample.value for sample in samples_of(picture)}
    assert samples["memory_replicas", "fewest"] == 1
    assert samples["memory_replicas", "mean"] == 2.0
    assert samples["memory_queries_per_s", "all nodes"] == 1.0
    without = {sample.metric for sample in samples_of(healthy())}
    assert not without & {"memory_replicas", "memory_queries_per_s"}


def test_a_swarm_of_zero_nodes_is_shown_as_none_and_not_as_unseen() -> None:
    shown = api.swarm(state_of(picture_of([])))
    assert shown["state"] == {"level": "bad", "words": "no node is there"}
    assert shown["nodes"] == {"live": 0, "gone": 0, "unsteady": 0}
    assert (shown["tokens_per_s"], shown["validation_loss"], shown["trainers"]) == (None, None, 0)


def test_what_was_not_seen_is_null_and_not_zero() -> None:
    shown = api.swarm(state_of(None))
    assert shown["state"] == {"level": "unknown", "words": "looking for the swarm"}
    assert (shown["nodes"]["live"], shown["experts"]["live"], shown["read_at"]) == (None, None, None)
    assert (shown["name"], shown["age_s"], shown["layers"]) == ("sauna", None, [])


def test_an_unreachable_swarm_keeps_its_last_state_and_its_age() -> None:
    shown = api.swarm(state_of(healthy(), unreachable_since=NOW + 50, now=NOW + 100))
    assert shown["state"] == {"level": "unknown", "words": "cannot reach the swarm"}
    assert (shown["nodes"]["live"], shown["age_s"], shown["unreachable_since"]) == (2, 100.0, NOW + 50)


def test_a_clock_set_back_makes_no_age_negative() -> None:
    picture = picture_of([node(0, started_at=NOW + 9999)], [trainer(0, started_at=NOW + 9999)])
    assert api.swarm(state_of(picture, now=NOW - 500))["age_s"] == 0.0
    assert (picture.nodes[0]["up_s"], picture.trainers[0]["up_s"]) == (0.0, 0.0)


def test_an_unknown_start_is_null_and_not_zero() -> None:
    picture = picture_of([node(0, started_at=0.0)], [trainer(0, started_at=0.0)])
    assert (picture.nodes[0]["up_s"], picture.trainers[0]["up_s"]) == (None, None)


# Nodes


def test_nodes_are_sorted_filtered_and_paged(large: Picture) -> None:
    first = api.nodes(large, {"sort": "updates", "order": "desc", "per_page": "3"})
    assert [row["updates"] for row in first["nodes"]] == [19998, 19996, 19994]
    second = api.nodes(large, {"sort": "updates", "order": "desc", "per_page": "3", "page": "2"})
    assert second["nodes"][0]["updates"] == 19992
    found = api.nodes(large, {"filter": "VOLUNTEER 7777"})
    assert (found["total"], found["nodes"][0]["name"]) == (1, "volunteer 7777")
    assert api.nodes(large, {"filter": "nobody"})["nodes"] == []
    assert api.nodes(large, {"page": "9999"})["nodes"] == []


def test_all_pages_together_show_each_node_once(large: Picture) -> None:
    seen: list[str] = []
    for page in range(1, 51):
        shown = api.nodes(large, {"sort": "experts", "per_page": "200", "page": str(page)})
        seen += [row["peer_id"] for row in shown["nodes"]]
    assert len(seen) == len(set(seen)) == 10_000


@pytest.mark.parametrize("order", ["asc", "desc"])
def test_what_was_not_measured_comes_last(order: str) -> None:
    picture = picture_of([node(0, rows_per_s=None), node(1, name=""), node(2, name="a"), node(3, name="B")])
    by_speed = api.nodes(picture, {"sort": "rows_per_s", "order": order})["nodes"]
    assert by_speed[-1]["rows_per_s"] is None
    by_name = [row["name"] for row in api.nodes(picture, {"sort": "name", "order": order})["nodes"]]
    assert by_name[-1] is None
    assert set(by_name[:3]) == {"a", "B", "volunteer 0"}


@pytest.mark.parametrize(
    ("query", "wrong"),
    [
        ({"sort": "certificate_pem"}, "sort"), ({"order": "up"}, "order"), ({"page": "0"}, "page"),
        ({"per_page": "201"}, "per_page"), ({"page": "-1"}, "page"), ({"page": "1e3"}, "page"),
        ({"page": "٣"}, "page"), ({"page": "9" * 5000}, "page"), ({"filter": "x" * 201}, "filter"),
        ({"filter": "a b c d e f g h i"}, "filter"),
    ],
)  # fmt: skip
def test_a_bad_parameter_is_named(query: dict[str, str], wrong: str) -> None:
    with pytest.raises(ApiError, match=wrong) as caught:
        api.nodes(healthy(), query)
    assert caught.value.status == 400
    assert len(str(caught.value)) < 400


class _Name(str):
    """Counts how often it is read."""

    reads = 0

    def __str__(self) -> str:
        _Name.reads += 1
        return self[:]


def test_however_many_words_a_filter_has_each_node_is_read_once_for_each_picture() -> None:
    picture = picture_of([node(number, name=_Name(f"volunteer {number}")) for number in range(50)])
    _Name.reads = 0
    for text in ("o " * 100, "volunteer o v l u n t 1", "nobody"):
        api.nodes(picture, {"filter": text})
    assert _Name.reads == 50


def test_a_word_that_is_repeated_counts_once() -> None:
    picture = picture_of([node(0, name="Aino"), node(1, name="Veikko")])
    words = ["a", "b", "c", "d", "e", "f", "g", "h"]
    assert api.nodes(picture, {"filter": " ".join(["Veikko", "veikko"] * 14)})["total"] == 1
    api.nodes(picture, {"filter": " ".join([*words, *words])})  # is not refused


def test_a_filter_finds_no_word_across_two_fields() -> None:
    picture = picture_of([node(0, name="a")])
    assert api.nodes(picture, {"filter": "a serving"})["total"] == 1
    assert api.nodes(picture, {"filter": "aserving"})["total"] == 0


@given(st.dictionaries(st.sampled_from(["sort", "order", "page", "per_page", "filter", "layer"]), st.text()))
def test_no_question_is_too_strange(query: dict[str, str]) -> None:
    for ask in (api.nodes, api.leaderboard, api.trainers, api.experts):
        with contextlib.suppress(ApiError):
            json.dumps(ask(_SMALL, query), allow_nan=False)


_SMALL = healthy()


def test_a_nodes_own_page_lists_what_it_hosts(large: Picture) -> None:
    host = large.replicas["0.3.4"][0]["peer_id"]
    shown = api.node(large, host)
    assert "0.3.4" in shown["uids"]
    assert shown["uids_total"] == len(shown["uids"])
    with pytest.raises(ApiError, match="no node"):
        api.node(large, peer(123456).to_base58())


def test_nodes_say_what_they_do_and_how_they_are_reached() -> None:
    picture = picture_of(
        [
            node(0, activity=Activity.PAUSED), node(1, activity=Activity.LEAVING),
            node(2, activity=Activity.UNKNOWN, addresses=()), node(3, reachability=Reachability.RELAYED),
        ]
    )  # fmt: skip
    shown = {row["name"]: (row["state"], row["reach"]) for row in picture.nodes}
    assert shown == {
        "volunteer 0": ("paused", "unknown"), "volunteer 1": ("leaving", "unknown"),
        "volunteer 2": ("serving", "unknown"), "volunteer 3": ("serving", "relayed"),
    }  # fmt: skip


def test_a_node_that_has_gone_serves_nothing_any_more() -> None:
    model = manifest((2, 2))
    replicas = [replica(uid, number % 2) for number, uid in enumerate(model.uids())]
    picture = picture_of([node(0)], swarm=model, replicas=replicas, gone=[node(1)])
    shown = api.swarm(state_of(picture))
    assert (shown["nodes"], shown["experts"], shown["replicas"]) == (
        {"live": 1, "gone": 1, "unsteady": 0},
        {"live": 4, "total": 8},
        4,
    )
    assert shown["state"]["words"] == "4 experts have no host"
    assert [row["state"] for row in api.nodes(picture, {"sort": "name"})["nodes"]] == ["serving", "gone"]
    assert api.expert(picture, "0.0.1", NOW)["replicas"] == []
    assert api.node(picture, peer(1).to_base58())["uids"] == []


def test_a_node_that_left_in_order_has_not_gone() -> None:
    model = manifest((2, 2))
    replicas = [replica(uid, number % 2) for number, uid in enumerate(model.uids())]
    picture = picture_of([node(0)], swarm=model, replicas=replicas, left=[node(1)], gone=[node(2)])
    assert api.swarm(state_of(picture))["nodes"] == {"live": 1, "gone": 1, "unsteady": 0}
    rows = {row["name"]: row for row in picture.nodes}
    assert {name: row["state"] for name, row in rows.items()} == {
        "volunteer 0": "serving", "volunteer 1": "left", "volunteer 2": "gone",
    }  # fmt: skip
    assert (rows["volunteer 1"]["rows_per_s"], rows["volunteer 1"]["hours"]) == (None, 1.0)
    restarted = picture_of([node(0)]).with_earlier(picture.nodes, [])
    assert {row["name"]: row["state"] for row in restarted.nodes}["volunteer 1"] == "left"
    assert restarted.figures["nodes"]["gone"] == 1


def test_latency_of_a_node_is_what_trainers_measured() -> None:
    measured = [trainer(n, node_latency_s={peer(0): seconds}) for n, seconds in enumerate((0.1, 0.3))]
    picture = picture_of([node(0), node(1)], measured)
    assert [row["latency_ms"] for row in picture.nodes] == [pytest.approx(200.0), None]


def test_in_an_open_swarm_volunteers_are_listed_by_name_and_not_ranked(large: Picture) -> None:
    shown = api.leaderboard(large, {"page": "2", "per_page": "10"})
    assert shown["ranked"] is False
    assert "open swarm" in shown["note"]
    names = sorted(f"volunteer {number}" for number in range(10_000))
    assert [(row["rank"], row["name"]) for row in shown["nodes"]] == [(None, name) for name in names[10:20]]


def test_where_the_founder_gives_tokens_volunteers_are_ranked_by_their_share_of_votes() -> None:
    swarm = manifest().model_copy(update={"admission": AdmissionSpec(mode="token")})
    said = SignedWork(Work(pairs=5), 1)
    credit = {
        peer(number): Credit(Work(pairs=pairs), 1, (), share)
        for number, (pairs, share) in enumerate([(10**9, 0.1), (5, 0.6), (7, 0.3)])
    }
    nodes = [node(number, signed=said, contributed_rows=10**6 - number) for number in range(4)]
    shown = api.leaderboard(picture_of(nodes, swarm=swarm, credit=credit), {})
    assert shown["ranked"] is True
    assert [(row["rank"], row["short"], row["signed_pairs"], row["rows"]) for row in shown["nodes"]] == [
        (rank, peer(number).to_base58()[-8:], pairs, 10**6 - number)
        for rank, (number, pairs) in enumerate([(1, 5), (2, 7), (0, 10**9), (3, None)], 1)
    ]


def test_ranks_continue_from_page_to_page() -> None:
    swarm = manifest().model_copy(update={"admission": AdmissionSpec(mode="token")})
    picture = picture_of([node(number) for number in range(5)], swarm=swarm)
    pages = [api.leaderboard(picture, {"per_page": "2", "page": str(page)})["nodes"] for page in (1, 2, 3)]
    assert [[row["rank"] for row in page] for page in pages] == [[1, 2], [3, 4], [5]]


@pytest.mark.parametrize(
    ("ask", "query"),
    [
        (api.nodes, {"sort": "name", "filter": "volunteer o v l u n t e"}),
        (api.nodes, {"sort": "latency_ms", "order": "desc"}),
        (api.leaderboard, {}),
    ],
)
@pytest.mark.parametrize("mode", ["open", "token"])
def test_a_page_allocates_no_object_for_each_node(ask: Any, query: dict[str, str], mode: Any) -> None:
    """Otherwise requests would cause full collections, which stop all threads for half a second."""
    swarm = manifest().model_copy(update={"admission": AdmissionSpec(mode=mode)})
    picture = picture_of([node(number) for number in range(2000)], swarm=swarm)
    ask(picture, query)  # prepares the picture
    allocated: list[int] = []
    gc.collect()
    gc.callbacks.append(lambda phase, _: allocated.append(1))
    thresholds = gc.get_threshold()
    gc.set_threshold(1000, 1000, 1000)
    try:
        ask(picture, query)
    finally:
        gc.set_threshold(*thresholds)
        gc.callbacks.pop()
    assert not allocated


def test_what_was_signed_is_not_known_before_the_receipts_were_read() -> None:
    said = SignedWork(Work(pairs=5), 2)
    nodes = [node(0, signed=said), node(1), node(2, signed=said)]
    picture = picture_of(nodes, credit={peer(2): Credit(Work(pairs=4), 1, (), None)})
    rows = {row["peer_id"]: row for row in picture.nodes}
    for number, pairs, trainers in ((0, None, None), (1, 0, 0), (2, 4, 1)):
        row = rows[peer(number).to_base58()]
        assert (row["signed_pairs"], row["signed_trainers"]) == (pairs, trainers)


def test_a_node_has_the_names_of_those_who_signed_for_it_if_they_have_one() -> None:
    named = trainer(1)
    signers = ((named.peer_id, Work(pairs=3)), (peer(77), Work(pairs=1, queries=2)))
    credit = {peer(0): Credit(Work(pairs=4, queries=2), 2, signers, None)}
    picture = picture_of([node(0)], [named], credit=credit)
    found = api.node(picture, peer(0).to_base58(), credit)
    assert [(each["name"], each["pairs"], each["queries"]) for each in found["signers"]] == [
        ("trainer 1", 3, 0), (None, 1, 2)
    ]  # fmt: skip
    assert api.node(picture, peer(0).to_base58(), {})["signers"] == []


# Experts


def test_experts_of_a_layer_stand_in_row_major_order() -> None:
    model = manifest((2, 3))
    uid = model.uids()[4]
    assert str(uid) == "0.1.1"
    picture = healthy(swarm=model, replicas=[replica(uid, 0, update_count=9), replica(uid, 1)])
    shown = api.experts(picture, {"layer": "0"})
    assert shown["grid"] == [2, 3]
    assert shown["replicas"] == [0, 0, 0, 0, 2, 0]
    assert shown["updates"] == [0, 0, 0, 0, 9, 0]
    assert shown["recent_rows"] == [0, 0, 0, 0, 200, 0]


def test_freshness_is_the_time_of_the_last_update_that_any_replica_announces() -> None:
    learns, rests, ahead, _ = manifest((2, 2), layers=1).uids()
    times = [(learns, 0, NOW - 15), (learns, 1, NOW - 40), (rests, 0, None), (ahead, 1, NOW + 99)]
    replicas = [replica(uid, number, updated_at=at) for uid, number, at in times]
    picture = healthy(swarm=manifest((2, 2), layers=1), replicas=replicas)
    assert api.experts(picture, {})["updated_ago_s"] == [15, None, 0, None]
    assert [row["updated_ago_s"] for row in api.expert(picture, str(learns), NOW)["replicas"]] == [15, 40]


def test_load_is_the_share_of_rows_and_tells_who_starves() -> None:
    model = manifest((2, 2), layers=1)
    rows = dict(zip(model.uids(), (900, 290, 10, 0), strict=True))
    replicas = [replica(uid, 0, recent_rows=count) for uid, count in rows.items()]
    shown = api.experts(healthy(swarm=model, replicas=replicas), {})
    assert shown["recent_rows"] == [900, 290, 10, 0]
    assert (shown["busiest_over_mean"], shown["starving"]) == (3.0, 2)
    idle = [replica(uid, 0, recent_rows=0) for uid in model.uids()]
    shown = api.experts(healthy(swarm=model, replicas=idle), {})
    assert (shown["busiest_over_mean"], shown["starving"]) == (None, None)


@given(st.lists(st.integers(0, 2**53), min_size=1, max_size=64))
def test_unevenness_of_any_rows_is_at_least_one_and_the_busiest_never_starves(rows: list[int]) -> None:
    found = _unevenness(rows)
    if any(rows):
        assert 1.0 <= found["busiest_over_mean"] <= len(rows)
        assert 0 <= found["starving"] < len(rows)
    else:
        assert found == {"busiest_over_mean": None, "starving": None}


def test_replicas_that_do_not_serve_or_whose_host_is_unknown_carry_nobody() -> None:
    model = manifest((2, 2))
    claimed, elsewhere = (
        replica(model.uids()[0], 0, state=ReplicaState.CLAIMED),
        replica(model.uids()[1], 99),
    )
    picture = healthy(swarm=model, replicas=[claimed, elsewhere])
    assert api.experts(picture, {})["replicas"] == [0, 0, 0, 0]
    assert [row["state"] for row in api.expert(picture, "0.0.0", NOW)["replicas"]] == ["claimed"]
    assert api.expert(picture, "0.0.1", NOW)["replicas"] == []


@pytest.mark.parametrize(
    "uid", ["", "0", "0.0", "0.0.0.0", "0.2.0", "2.0.0", "0.-1.0", "0.00.0", "0.x.0", "0.٣.0", "9" * 99]
)
def test_what_is_no_expert_is_not_found(uid: str) -> None:
    with pytest.raises(ApiError) as caught:
        api.expert(_SMALL, uid, NOW)
    assert caught.value.status == 404


def test_a_layer_that_is_too_large_is_refused() -> None:
    layers = [{"layer": 0, "grid": [4096, 4096]}]
    picture = Picture(NOW, _SMALL.figures, layers, [], [], {}, [])
    with pytest.raises(ApiError) as caught:
        api.experts(picture, {})
    assert caught.value.status == 413


# Trainers and history


def test_a_run_that_ended_in_order_is_finished_and_keeps_its_result() -> None:
    ended = [
        trainer(0, step=100, validation_loss=1.5, bits_per_byte=2.0),
        trainer(1, step=60),
        trainer(2, steps=0),
    ]
    picture = picture_of([node(0)], ended=ended)
    shown = {row["name"]: row for row in api.trainers(picture, {})["trainers"]}
    assert {name: row["state"] for name, row in shown.items()} == {
        "trainer 0": "finished", "trainer 1": "stopped", "trainer 2": "finished",
    }  # fmt: skip
    assert (shown["trainer 0"]["step"], shown["trainer 0"]["validation_loss"]) == (100, 1.5)
    assert (shown["trainer 0"]["tokens_per_s"], shown["trainer 2"]["steps"]) == (None, None)
    figures = api.swarm(state_of(picture))
    assert (figures["trainers"], figures["validation_loss"], figures["bits_per_byte"]) == (0, 1.5, 2.0)


def losses_in_the_history(picture: Picture) -> list[float | None]:
    """None: an interruption."""
    losses = [sample.value for sample in samples_of(picture) if sample.metric == "loss"]
    return [None if math.isnan(loss) else loss for loss in losses]


def test_the_history_has_the_last_figures_of_a_run_once_and_then_interrupts_its_lines() -> None:
    picture = picture_of([node(0)], ended=[trainer(0, validation_loss=1.5)])
    assert losses_in_the_history(picture) == [2.5, None, 1.5, None]
    later = replace(picture, read_at=NOW + 2)
    assert losses_in_the_history(later) == [None, None]


def test_a_run_that_knows_no_loss_yet_interrupts_the_line_of_the_last_one() -> None:
    first, second = trainer(0, loss=None, validation_loss=None), trainer(1, loss=2.0, validation_loss=1.9)
    assert losses_in_the_history(picture_of([node(0)], [first, second])) == [None, None, 2.0, 1.9]


def test_validation_loss_is_that_of_live_trainers_while_there_is_one() -> None:
    picture = picture_of(
        [node(0)], [trainer(1), trainer(2, validation_loss=None)], ended=[trainer(0, validation_loss=1.5)]
    )
    assert api.swarm(state_of(picture))["validation_loss"] == 2.25


def test_a_loop_of_ones_own_is_called_so() -> None:
    (row,) = picture_of([node(0)], [trainer(0, steps=0)]).trainers
    assert (row["state"], row["step"], row["steps"]) == ("own loop", 7, None)


def test_a_loop_of_ones_own_that_reports_nothing_has_unknown_steps_not_none() -> None:
    silent = trainer(0, steps=0, step=0, loss=None)
    waiting = trainer(1, steps=9, step=0, loss=None)
    assert [row["step"] for row in picture_of([node(0)], [silent, waiting]).trainers] == [None, 0]


def test_trainers_that_are_live_come_first() -> None:
    rows = [{"state": "gone", "seen_at": 1.0, "peer_id": "a"}, {"state": "training", "seen_at": 1.0, "peer_id": "b"},
            {"state": "gone", "seen_at": 2.0, "peer_id": "c"}]  # fmt: skip
    picture = Picture(NOW, _SMALL.figures, [], [], rows, {}, [])
    assert [row["peer_id"] for row in api.trainers(picture, {})["trainers"]] == ["b", "c", "a"]


@pytest.mark.parametrize(
    "query",
    [
        {}, {"metric": "x"}, {"metric": "loss", "since": "soon"}, {"metric": "loss", "since": "nan"},
        {"metric": "loss", "since": "1_0"}, {"metric": "loss", "since": " 1"}, {"metric": "loss", "since": "-1"},
        {"metric": "loss", "since": "1e13"}, {"metric": "loss", "since": "1" * 5000},
        {"metric": "loss", "points": "1"}, {"metric": "loss", "points": "9999"},
    ],
)  # fmt: skip
def test_a_bad_question_to_the_history_is_refused(query: dict[str, str]) -> None:
    with pytest.raises(ApiError) as caught:
        api.history_query(query, NOW)
    assert caught.value.status == 400


def test_a_trainers_lines_are_labelled_with_its_name_and_its_key() -> None:
    picture = picture_of([], [trainer(0, name="Aino"), trainer(1, name="")])
    named, unnamed = (row["short"] for row in picture.trainers)
    lines = [named, f"{named} validation", f"{named} else", unnamed, "forward p50"]
    labels = [line["label"] for line in api.series([(line, []) for line in lines], picture)]
    assert labels == [
        f"Aino · {named}",
        f"Aino · {named} validation",
        f"{named} else",
        unnamed,
        "forward p50",
    ]


def test_nodes_of_an_earlier_run_are_listed_as_gone() -> None:
    now_there = picture_of([node(1)], now=NOW + 100).with_earlier(_SMALL.nodes, [])
    assert {row["name"]: row["state"] for row in now_there.nodes} == {
        "volunteer 1": "serving", "volunteer 0": "gone",
    }  # fmt: skip
    assert now_there.figures["nodes"] == {"live": 1, "gone": 1, "unsteady": 0}
    assert len(picture_of([node(1)], now=NOW + 90_000).with_earlier(_SMALL.nodes, []).nodes) == 1


def test_trainers_of_an_earlier_run_are_listed_with_their_results() -> None:
    finished = trainer(0, step=100, validation_loss=1.5, bits_per_byte=2.0)
    ended = [finished, trainer(1, step=60, validation_loss=1.9)]
    earlier = picture_of([node(0)], [trainer(2), trainer(3)], ended=ended)
    restarted = picture_of([node(0)], [trainer(3, validation_loss=None)], now=NOW + 100)
    now_there = restarted.with_earlier(earlier.nodes, earlier.trainers)
    assert {row["name"]: row["state"] for row in now_there.trainers} == {
        "trainer 0": "finished", "trainer 1": "stopped", "trainer 2": "gone", "trainer 3": "training",
    }  # fmt: skip
    figures = api.swarm(state_of(now_there))
    assert (figures["trainers"], figures["validation_loss"], figures["bits_per_byte"]) == (1, 1.5, 2.0)
    live = picture_of([node(0)], [trainer(3, validation_loss=2.5)], now=NOW + 100)
    assert live.with_earlier([], earlier.trainers).figures["validation_loss"] == 2.5
    assert not [sample for sample in samples_of(now_there) if sample.name == "trainer 0" and sample.value > 0]
    much_later = picture_of([node(0)], now=NOW + 90_000)
    assert not much_later.with_earlier(earlier.nodes, earlier.trainers).trainers


# Size


def test_pages_of_ten_thousand_nodes_are_answered_in_time(large: Picture, tmp_path: Path) -> None:
    asked = Asked(tmp_path, large)
    host = peer(9999).to_base58()
    paths = (
        "/api/v1/swarm", "/api/v1/nodes?sort=name&per_page=200", "/api/v1/nodes?sort=hours&filter=volunteer%209",
        f"/api/v1/nodes/{host}", "/api/v1/leaderboard?page=50", "/api/v1/experts?layer=0", "/api/v1/experts/0.9.9",
        "/api/v1/trainers", "/api/v1/history?metric=loss", "/sd",
    )  # fmt: skip
    for path in paths:
        assert asked.get(path).status == 200
        took = least_cpu_s(partial(asked.get, path), time.process_time)
        print(f"{path}: {1000 * took:.1f} ms")
        assert took < _SLOW * API_S, path
    asked.history.close()


def test_a_picture_of_ten_thousand_nodes_is_made_in_time() -> None:
    nodes = [node(number, signed=SignedWork(Work(pairs=9), 1)) for number in range(10_000)]
    signed = Credit(Work(pairs=9), 1, ((peer(1), Work(pairs=9)),), 0.1)
    credit = {each.peer_id: signed for each in nodes}
    took = least_cpu_s(lambda: picture_of(nodes, credit=credit), time.process_time)
    print(f"a picture: {1000 * took:.0f} ms")
    assert took < _SLOW * PICTURE_S
