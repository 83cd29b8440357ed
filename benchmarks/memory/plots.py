"""A plot of the results of `benchmarks.memory`. It needs matplotlib, from the extra `plot`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.memory.goals import ASKED, LEAST_RECALL


def draw(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """Writes `memory-recall.svg`, if that part was measured."""
    folder.mkdir(parents=True, exist_ok=True)
    return [_recall(results["recall"], folder / "memory-recall.svg")] if "recall" in results else []


def _recall(found: Mapping[str, Any], path: Path) -> Path:
    """Recall against the number of cells asked and against the bytes that a search takes, and the sizes of cells."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    mpl.rcParams["svg.hashsalt"] = "talkoot"
    figure, (by_cells, by_bytes, sizes) = plt.subplots(1, 3, figsize=(13, 4))
    for (kind, least), colour in zip(LEAST_RECALL.items(), ("tab:blue", "tab:orange"), strict=True):
        recalls = found[kind]["recall"]
        label = {"texts": "passages", "questions": "10 words of one"}[kind]
        by_cells.plot(
            [int(asked) for asked in recalls], list(recalls.values()), "o-", color=colour, label=label
        )
        by_cells.plot(ASKED, least, "_", color=colour, markersize=16)
        by_bytes.plot(
            [found["wire_bytes"][asked] / 1000 for asked in recalls],
            list(recalls.values()),
            "o-",
            color=colour,
        )
    by_cells.set(xscale="log", xlabel=f"cells asked, of {found['cells']}", ylabel="recall@10", ylim=(0, 1))
    by_cells.set_xticks([int(asked) for asked in found["wire_bytes"]], list(found["wire_bytes"]))
    by_cells.minorticks_off()
    by_cells.legend(loc="lower right")
    by_bytes.set(xlabel="KB that a search takes, with ten passages read", ylim=(0, 1))
    sizes.plot(found["loads"])
    sizes.axhline(sum(found["loads"]) / len(found["loads"]), linestyle="--", color="gray", label="mean")
    sizes.set(xlabel="cells, largest first", ylabel="passages", ylim=0)
    sizes.legend()
    for axes in (by_cells, by_bytes, sizes):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return path
