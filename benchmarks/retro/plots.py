"""A plot of the results of `benchmarks.retro`. It needs matplotlib, from the extra `plot`."""

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.retro.goals import Compared
from benchmarks.retro.runs import OVERLAPS, SHARES


def draw(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """Writes `retro.svg`, if models were trained."""
    compared = Compared(results.get("learning", {}))
    if not compared.pairs:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    return [_curves(compared, folder / "retro.svg")]


def _curves(compared: Compared, path: Path) -> Path:
    """Bits per byte against the permitted overlap of passages with the text, and against the share of the memory."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    mpl.rcParams["svg.hashsalt"] = "talkoot"
    figure, (by_overlap, by_share) = plt.subplots(1, 2, figsize=(11, 4), sharey=True)

    def mean(variant: str) -> float:
        return statistics.fmean(compared.of(variant))

    by_overlap.plot(
        list(OVERLAPS), [mean(f"real {each}") for each in OVERLAPS], "o-", label="reads its neighbours"
    )
    by_overlap.set(
        xlabel="of what is to be predicted, a passage may have", ylabel="bits per byte of held-out text"
    )
    shares = [mean("real 50%" if share == 1 else f"share {share}") for share in SHARES]
    by_share.plot([f"{share:.0%}" for share in SHARES], shares, "o-")
    by_share.set(xlabel="of the memory")
    for axes in (by_overlap, by_share):
        axes.axhline(mean("random"), linestyle="--", color="tab:orange", label="the same, random passages")
        axes.axhline(
            statistics.fmean(compared.deeper()), linestyle=":", color="gray", label="deeper, reads nothing"
        )
        axes.grid(alpha=0.3)
    by_overlap.legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return path
