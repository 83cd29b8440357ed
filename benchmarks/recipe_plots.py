"""Plots of the results of `benchmarks.recipe`: curves, and what experts specialise in."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

_DPI = 80


def draw(results: Mapping[str, Any], rivals: Mapping[str, str], folder: Path) -> list[Path]:
    """Writes `recipe-curves.png` and `recipe-NAME.png` for each mixture.

    `rivals`: the dense model of each mixture.
    """
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = {name: run | {"unfinished": True} for name, run in results.get("unfinished", {}).items()}
    written = [_save(_curves(unfinished | results["runs"], rivals), folder / "recipe-curves.png")]
    for name in rivals:
        run = results["runs"].get(name)
        if run is not None:
            file = folder / f"recipe-{name.replace(',', '').replace(' ', '-')}.png"
            written.append(_save(_heat_maps(name, run["chosen"], results), file))
    return written


def _curves(runs: Mapping[str, Any], rivals: Mapping[str, str]) -> Figure:
    """Draws one panel for each dense model."""
    compared = {rival for name, rival in rivals.items() if name in runs}
    dense = [name for name in dict.fromkeys(rivals.values()) if name in runs and name in compared]
    figure = Figure(figsize=(5 * max(1, len(dense)), 4), layout="constrained")
    for number, rival in enumerate(dense):
        panel = figure.add_subplot(1, len(dense), number + 1)
        _add_curve(panel, rival, runs[rival], "--")
        for name in (name for name, its in rivals.items() if its == rival and name in runs):
            _add_curve(panel, name, runs[name], "-")
        last = runs[rival]["validation_loss"]
        panel.set(xlabel="step", ylabel="held-out loss, nats per byte", title=f"as much compute as {rival}")
        panel.set_ylim(last * 0.92, last * 1.45)
        panel.legend()
        panel.grid(alpha=0.3)
    return figure


def _add_curve(panel: Axes, name: str, run: Mapping[str, Any], style: str) -> None:
    steps = [int(step) for step in run["curve"] if int(step)]
    losses = [run["curve"][str(step)] for step in steps]
    end = f" (stopped at {run['steps']})" if run.get("unfinished") else ""
    panel.plot(steps, losses, style, label=f"{name}{end}: {run['validation_loss']:.3f}")


def _heat_maps(name: str, chosen: Mapping[str, Any], results: Mapping[str, Any]) -> Figure:
    """Draws a row for each layer: experts by domain, and by kind of byte."""
    layers = len(chosen["domains"])
    figure = Figure(figsize=(9, 0.9 + 2.6 * layers), layout="constrained")
    figure.suptitle(f"{name}: where the bytes of each domain and of each kind go")
    for layer in range(layers):
        for column, (which, labels) in enumerate(
            (("domains", results["domains"]), ("kinds", results["kinds"]))
        ):
            panel = figure.add_subplot(layers, 2, 2 * layer + column + 1)
            shares = ordered(np.array(chosen[which][layer], dtype=np.float64))
            panel.imshow(shares, aspect="auto", cmap="viridis", vmin=0)
            panel.set_yticks(range(len(labels)), labels)
            panel.set_xticks([])
            panel.set_xlabel(f"experts of layer {layer}")
    return figure


def ordered(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Each row as shares of its sum, with the experts ordered by the row in which they have the most. [classes,
    experts]
    """
    shares = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    leading = shares.argmax(axis=0)
    most: Sequence[NDArray[np.float64]] = [-shares.max(axis=0), leading.astype(np.float64)]
    result: NDArray[np.float64] = shares[:, np.lexsort(most)]
    return result


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=_DPI)
    return path
