"""The goals for memories, and whether they were reached."""

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.memory import hosting, killed, lying, recall
from benchmarks.verdicts import Verdict

ASKED = 8
"""How many of 256 cells a search asks."""
LEAST_RECALL = {"texts": 0.90, "questions": 0.75}
_KINDS = {"texts": "other passages", "questions": "10 words of them"}
MOST_OF_PLAIN = 1.2
LEAST_OF_FAISS = 0.5
MOST_OF_EXPERTS = 1.1
MOST_BESIDE_MS = 20
_NEARLY_ALL = 0.999
_SERVED = 100_000
"""The number of passages on a host for which the throughput goal holds. With few passages, most of a call's cost is not
the search.
"""
NOTICED_WITHIN = 1000
"""The number of queries after which searches should avoid a host that leaves out passages."""


def verdicts(results: Mapping[str, Any]) -> Iterator[Verdict]:
    """Verdicts on all parts in the results."""
    for part, judge in _JUDGES.items():
        if results.get(part):
            yield from judge(results[part])


def _recall(found: Mapping[str, Any]) -> Iterator[Verdict]:
    for kind, least in LEAST_RECALL.items():
        by_asked = found[kind]["recall"]
        for asked in recall.ASKED:
            value, is_judged = by_asked[str(asked)], asked == ASKED
            yield Verdict(
                f"recall@10 of {_KINDS[kind]}, asking {asked} of {found['cells']} cells",
                f"{least:.2f}" if is_judged else "",
                f"{value:.3f}",
                value >= least if is_judged else None,
            )
    searched = found["questions"]["searched"][str(ASKED)] / (2 * found["passages"])
    yield Verdict(f"part of the memory that {ASKED} cells are", "", f"{searched:.3f}")
    yield Verdict("passages in the largest cell, of the mean", "", f"{found['largest_vs_mean']:.2f}")


def _relevance(found: Mapping[str, Any]) -> Iterator[Verdict]:
    for name in ("inner_product", "bm25", "fusion"):
        if name in found:
            hit = found[name]
            yield Verdict(
                f"definitions that find the word's entry by {name.replace('_', ' ')}: first, in the first ten",
                "",
                f"{hit['hit_at_1']:.3f}, {hit['hit_at_10']:.3f}",
            )


def _large(found: Mapping[str, Any]) -> Iterator[Verdict]:
    passages = f"{found['passages']:,} passages"
    for what in ("disk", "memory"):
        value = found[f"{what}_vs_plain"]
        yield Verdict(
            f"{what} of {passages}, in two cells each, of text and vectors",
            f"{MOST_OF_PLAIN}",
            f"{value:.2f}",
            value <= MOST_OF_PLAIN,
        )
    yield Verdict(f"recall@10 of {passages}", "", f"{found['recall']:.3f}")


def _throughput(found: Mapping[str, Any]) -> Iterator[Verdict]:
    for name, words in (("one", "one at a time"), ("batch", "64 at a time")):
        ratio = found.get(f"{name}_vs_faiss")
        is_judged = found["passages"] >= _SERVED
        yield Verdict(
            f"queries/s of one host of {found['passages']:,} passages, {words}, of FAISS flat",
            f"{LEAST_OF_FAISS}" if is_judged else "",
            f"{found[f'{name}_per_s']:,.0f}" + (f", {ratio:.2f}" if ratio else ""),
            ratio >= LEAST_OF_FAISS if is_judged and ratio is not None else None,
        )
    yield Verdict("the same, one at a time in 8 of 256 cells", "", f"{found['one_of_8_cells_per_s']:,.0f}")


def _killed(found: Mapping[str, Any]) -> Iterator[Verdict]:
    yield Verdict(
        f"one of two hosts killed: failed of {found['searches']} searches; recall against before",
        "0; 1",
        f"{found['failed']}; {found['recall']:.3f}",
        found["failed"] == 0 and found["recall"] > _NEARLY_ALL,
    )
    periods = found["hosted_again_periods"]
    yield Verdict(
        f"… until all {found['shards']} shards have two replicas again, in announcement periods",
        f"{killed.PERIODS}",
        "never" if periods is None else f"{periods:.1f}",
        periods is not None and periods <= killed.PERIODS,
    )


def _hops(found: Mapping[str, Any]) -> Iterator[Verdict]:
    for nodes, figures in found.items():
        two_trips_ms = 2000 * lying.RTT_S
        cold_ms, experts_ms = figures["cold_ms_mean"] - two_trips_ms, figures["experts_cold_ms_mean"]
        yield Verdict(
            f"first search at {int(nodes):,} nodes: until its hosts are known, of a first choice of experts",
            f"{MOST_OF_EXPERTS}",
            f"{cold_ms:.0f} ms, {cold_ms / experts_ms:.2f}",
            cold_ms <= MOST_OF_EXPERTS * experts_ms,
        )
        warm_ms, cpu_ms = figures["warm_ms_mean"], figures["warm_cpu_ms"]
        yield Verdict(
            "… later ones, besides two round trips: waiting, computing",
            f"{MOST_BESIDE_MS} ms",
            f"{warm_ms - two_trips_ms:.0f} ms, {cpu_ms:.1f} ms",
            warm_ms - two_trips_ms + cpu_ms <= MOST_BESIDE_MS,
        )


def _hosting(found: Mapping[str, Any]) -> Iterator[Verdict]:
    for hosts, figures in found.items():
        yield Verdict(
            f"{hosts} hosts of {figures['shards']} shards among {figures['nodes']} nodes: upkeep of a host",
            f"{hosting.KBIT_PER_S} kbit/s",
            f"{figures['kbit_per_s']:.1f} kbit/s, {figures['regions_of_host']:.1f} regions",
            figures["kbit_per_s"] <= hosting.KBIT_PER_S,
        )
        hosted_s = figures["hosted_s"]
        yield Verdict(
            "… until all shards have two replicas; upkeep of a host until then",
            "",
            "never" if hosted_s is None else f"{hosted_s:.0f} s; {figures['mb_until_hosted']:.1f} MB",
        )
        periods = figures["hosted_again_periods"]
        yield Verdict(
            f"… the same, in periods, after {hosting.DYING_SHARE:.0%} of the hosts died",
            f"{hosting.PERIODS}",
            "never" if periods is None else f"{periods:.1f} of {figures['period_s']:.0f} s",
            periods is not None and periods <= hosting.PERIODS,
        )


def _lying(found: Mapping[str, Any]) -> Iterator[Verdict]:
    for kind, figures in found.items():
        believed, failed = figures["believed"], figures["failed"]
        yield Verdict(
            f"a fourth of the hosts: {kind}; believed, failed of {figures['queries']} searches",
            "0, 0",
            f"{believed}, {failed}",
            believed == failed == 0,
        )
        if kind != "honest":
            after, must = figures["noticed_after"], kind in lying.OMITTERS
            yield Verdict(
                "… searches until all of them were avoided; recall from then on",
                f"{NOTICED_WITHIN:,}" if must else "",
                f"{after}, {figures['recall_since'] or 0:.3f}" if after else "not all",
                (after is not None and after <= NOTICED_WITHIN) if must else None,
            )


_JUDGES = {
    "recall": _recall,
    "relevance": _relevance,
    "large": _large,
    "throughput": _throughput,
    "killed": _killed,
    "lying": _lying,
    "hops": _hops,
    "hosting": _hosting,
}
