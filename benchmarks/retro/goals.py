"""The goals for models that read a memory, and whether they were reached."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from benchmarks.retro.hosted import ms_per_1000_tokens, tokens_per_s
from benchmarks.retro.hosts import RTT_S
from benchmarks.retro.runs import OVERLAPS, SHARES
from benchmarks.retro.translations import ADDED
from benchmarks.verdicts import Verdict

LEAST_GAIN = 0.05
"""The smallest gain over a deeper model, at an overlap of at most 50%."""
ERRORS = 2.0


LEAST_PACE = 0.9
MOST_LOSS = 1.01
"""The largest loss of training while hosts fail, relative to that with honest hosts."""


def verdicts(results: Mapping[str, Any], *, is_quick: bool = False) -> Iterator[Verdict]:
    """Verdicts on all parts in the results. A quick run is too short for goals, so it has none."""
    for part, judge in _JUDGES.items():
        for verdict in judge(results[part]) if results.get(part) else ():
            yield replace(verdict, goal="", is_reached=None) if is_quick else verdict


class Compared:
    """The bits per byte of all runs, as means over sequences."""

    def __init__(self, runs: Mapping[str, Any]) -> None:
        seeds = sorted({name.split()[1] for name in runs})
        self.pairs = [
            (runs[f"reads {seed}"]["bits_per_byte"], runs[f"deeper {seed}"]["bits_per_byte"])
            for seed in seeds
            if f"reads {seed}" in runs and f"deeper {seed}" in runs
        ]
        self.names = [name for name in (self.pairs[0][0] if self.pairs else ()) if name != ADDED]

    def of(self, variant: str, names: Sequence[str] | None = None) -> list[float]:
        """The mean over texts for each model that reads, one figure for each seed."""
        wanted = self.names if names is None else names
        return [
            statistics.fmean(statistics.fmean(reads[name][variant]) for name in wanted)
            for reads, _ in self.pairs
        ]

    def deeper(self, names: Sequence[str] | None = None) -> list[float]:
        wanted = self.names if names is None else names
        return [
            statistics.fmean(statistics.fmean(deeper[name]["nothing"]) for name in wanted)
            for _, deeper in self.pairs
        ]

    def gain_and_error(self, variant: str, other: str) -> tuple[float, float]:
        """How much lower the figures of `variant` are than those of `other`, and the standard error, over pairs of
        sequences.

        A sequence's gains with several seeds are not independent, so their mean counts once.
        """
        gains = [
            statistics.fmean(
                reads[name][other][place] - reads[name][variant][place] for reads, _ in self.pairs
            )
            for name in self.names
            for place in range(len(self.pairs[0][0][name][variant]))
        ]
        over_texts = statistics.stdev(gains) / len(gains) ** 0.5
        seeds = [b - a for a, b in zip(self.of(variant), self.of(other), strict=True)]
        over_seeds = statistics.stdev(seeds) / len(seeds) ** 0.5 if len(seeds) > 1 else 0.0
        return statistics.fmean(seeds), max(over_texts, over_seeds)


def _learning(runs: Mapping[str, Any]) -> Iterator[Verdict]:
    compared = Compared(runs)
    if not compared.pairs:
        return
    deeper = statistics.fmean(compared.deeper())
    random = statistics.fmean(compared.of("random"))
    yield Verdict(
        f"bits per byte of held-out text, {len(compared.pairs)} seeds: a deeper model of equal FLOPs",
        "",
        f"{deeper:.3f}",
    )
    yield Verdict("… the model that reads, given random passages", "", f"{random:.3f}")
    yield Verdict("… given nothing", "", f"{statistics.fmean(compared.of('nothing')):.3f}")
    for overlap in OVERLAPS:
        value = statistics.fmean(compared.of(f"real {overlap}"))
        gain, error = compared.gain_and_error(f"real {overlap}", "random")
        yield Verdict(f"… given its neighbours, overlap of {overlap} at most", "", f"{value:.3f}")
        is_judged = overlap == "12.5%"
        yield Verdict(
            "    less than with random ones, and twice the standard error",
            "more than the error" if is_judged else "",
            f"{gain:.4f}, {ERRORS * error:.4f}",
            gain > ERRORS * error if is_judged else None,
        )
        of_deeper, is_judged = 1 - value / deeper, overlap == "50%"
        yield Verdict(
            "    less than the deeper model",
            f"{LEAST_GAIN:.0%}" if is_judged else "",
            f"{of_deeper:.1%}",
            of_deeper >= LEAST_GAIN if is_judged else None,
        )
    gains = [
        random - statistics.fmean(compared.of("real 50%" if share == 1 else f"share {share}"))
        for share in SHARES
    ]
    yield Verdict(
        "gain over random passages with a quarter, half and the whole of the store",
        "grows",
        ", ".join(f"{gain:.4f}" for gain in gains),
        gains == sorted(gains),
    )
    if all(ADDED in reads for reads, _ in compared.pairs):
        before, added = (statistics.fmean(compared.of(each, [ADDED])) for each in ("before", "added"))
        yield Verdict(
            "a domain that no model learned, before and after its passages are added to the store",
            "falls",
            f"{before:.3f}, {added:.3f}",
            added < before,
        )
        real = statistics.fmean(compared.of("real 50%"))
        yield Verdict("    … of in-domain bits per byte", "", f"{before / real:.2f}, {added / real:.2f}")


def _pace(found: Mapping[str, Any]) -> Iterator[Verdict]:
    rates = {name: [tokens_per_s(each) for each in some] for name, some in found.items()}
    of_none = {
        name: statistics.median(a / b for a, b in zip(some, rates["none"], strict=True))
        for name, some in rates.items()
    }
    medians = {name: statistics.median(some) for name, some in rates.items()}
    yield Verdict(
        f"tokens/s at round trips of {1000 * RTT_S:.0f} ms: with retrieval, of a model that reads nothing",
        f"{LEAST_PACE}",
        f"{of_none['looked_up']:.2f} ({medians['looked_up']:.0f}, {medians['none']:.0f})",
        of_none["looked_up"] >= LEAST_PACE,
    )
    yield Verdict(
        "    with passages that are there already", "", f"{of_none['ready']:.2f} ({medians['ready']:.0f})"
    )
    looked_up = found["looked_up"]
    steps, seconds, waits, waited_s = (
        sum(each[name] for each in looked_up) for name in ("steps", "s", "memory_waits", "memory_waited_s")
    )
    yield Verdict(
        "    steps that waited for passages, and of the time",
        "",
        f"{waits:.0f} of {steps:.0f}, {waited_s / seconds:.1%}",
    )
    cpu_ms = {name: statistics.median(map(ms_per_1000_tokens, some)) for name, some in found.items()}
    hosts_ms = statistics.median(ms_per_1000_tokens(each, "hosts_cpu_s") for each in looked_up)
    yield Verdict(
        "    CPU time for 1,000 tokens: to train without, to read, to look up; of all hosts",
        "",
        f"{cpu_ms['none']:.0f}, {cpu_ms['ready'] - cpu_ms['none']:.0f}, "
        f"{cpu_ms['looked_up'] - cpu_ms['ready']:.0f}; {hosts_ms:.0f} ms",
    )
    yield Verdict("    by the trainer's CPU time alone", "", f"{cpu_ms['none'] / cpu_ms['looked_up']:.2f}")


def _faults(found: Mapping[str, Any]) -> Iterator[Verdict]:
    honest = found["honest"]
    for kind, figures in found.items():
        ratio = figures["validation_loss"] / honest["validation_loss"]
        is_whole = figures["steps"] == honest["steps"]
        yield Verdict(
            f"hosts: {kind}; held-out loss of that with honest ones, chunks with the same passages",
            f"{MOST_LOSS}",
            f"{ratio:.4f}, {figures['same_neighbours']:.0%}",
            is_whole and ratio <= MOST_LOSS,
        )


_JUDGES = {"learning": _learning, "pace": _pace, "faults": _faults}
