"""Plots of the results of `benchmarks.internet`. They need matplotlib, from the extra `plot`."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.internet.report import LEAST_SERVED, MOST_LOADED_KBIT, MOST_UPKEEP_KBIT

_DPI = 80
_TITLES = {
    "tenth_dies": "a tenth dies",
    "flash_crowd": "a flash crowd",
    "partition": "two fifths cut off",
    "founder_gone": "founder and bootstraps gone",
    "bad_release": "a fifth restarts",
}


def draw(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """Writes `internet-days.png`, `internet-upkeep.png`, `internet-events.png` and `internet-training.png`, for the
    parts that are in the results.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawings: list[tuple[str, str, Callable[[Mapping[str, Any]], Figure]]] = [
        ("days", "days", _served),
        ("days", "upkeep", _upkeep),
        ("events", "events", _events),
        ("train", "training", _training),
    ]
    written = []
    for part, name, make in drawings:
        if results.get(part):
            written.append(folder / f"internet-{name}.png")
            make(results[part]).savefig(written[-1], dpi=_DPI)
    return written


def _served(days: Mapping[str, Any]) -> Figure:
    """The shares of experts served and of volunteers online, by the hour."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    served, living = figure.subplots(1, 2)
    for nodes, figures in days.items():
        series = figures["series"]
        served.plot(series["hour"], series["served"], label=f"{int(nodes):,} volunteers")
        living.plot(series["hour"], [n / int(nodes) for n in series["living"]], label=f"{int(nodes):,}")
    served.axhline(LEAST_SERVED, linestyle="--", color="gray", label="goal, on average")
    served.set(xlabel="hours since Friday midnight UTC", ylabel="share of experts served")
    served.set_ylim(min(0.99, *(min(figures["series"]["served"]) for figures in days.values())), 1.0005)
    living.set(xlabel="hours since Friday midnight UTC", ylabel="share of volunteers there", ylim=(0, 1))
    for panel in (served, living):
        panel.grid(alpha=0.3)
    served.legend(loc="lower right")
    return figure


def _upkeep(days: Mapping[str, Any]) -> Figure:
    """kbit/s against the number of nodes."""
    figure = Figure(figsize=(5, 4), layout="constrained")
    panel = figure.add_subplot()
    sizes = sorted(days, key=int)
    for key, label, goal, colour in (
        ("mean_kbit_per_s", "mean", MOST_UPKEEP_KBIT, "tab:blue"),
        ("most_kbit_per_s", "most loaded", MOST_LOADED_KBIT, "tab:orange"),
    ):
        values = [days[nodes]["upkeep"][key] for nodes in sizes]
        panel.plot([int(nodes) for nodes in sizes], values, "o-", label=label, color=colour)
        panel.axhline(goal, linestyle="--", alpha=0.5, label=f"goal, {label}", color=colour)
    panel.set(xscale="log", yscale="log", xlabel="volunteers", ylabel="upkeep of a node, kbit/s both ways")
    panel.grid(alpha=0.3)
    panel.legend()
    return figure


def _events(events: Mapping[str, Any]) -> Figure:
    """The share of experts served, and the replicas of an expert, since each event."""
    figure = Figure(figsize=(14, 5), layout="constrained")
    rows = figure.subplots(2, len(_TITLES), squeeze=False)
    for nodes, played in events.items():
        for column, (name, title) in enumerate(_TITLES.items()):
            if name in played:
                minutes = [at / 60 for at in played[name]["at_s"]]
                rows[0][column].plot(minutes, played[name]["served"], label=f"{int(nodes):,} nodes")
                rows[1][column].plot(minutes, played[name]["replicas"], label=f"{int(nodes):,} nodes")
                rows[0][column].set_title(title)
    for panel in rows.flat:
        panel.grid(alpha=0.3)
    for upper, lower in zip(*rows, strict=True):
        upper.set_ylim(min(0.95, upper.get_ylim()[0]), 1.002)
        lower.set_ylim(0)
        lower.set_xlabel("minutes")
    rows[0][0].set_ylabel("share of experts served")
    rows[1][0].set_ylabel("replicas of an expert")
    rows[0][0].legend()
    return figure


def _training(training: Mapping[str, Any]) -> Figure:
    """Tokens per second against the number of nodes, compared with what would be possible."""
    figure = Figure(figsize=(5, 4), layout="constrained")
    panel = figure.add_subplot()
    sizes = sorted(training, key=int)
    for key, label, style in (
        ("ideal_free", "the most, placed freely", "k:"),
        ("ideal_as_placed", "the most, as placed", "k--"),
        ("tokens_per_s", "reached", "o-"),
    ):
        panel.plot([int(nodes) for nodes in sizes], [training[n][key] for n in sizes], style, label=label)
    panel.set(xscale="log", yscale="log", xlabel="nodes", ylabel="tokens/s of all trainers")
    panel.grid(alpha=0.3)
    panel.legend()
    return figure
