"""The results of a chaos run in figures, each with its target."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

_LEAST_STEPS = 0.70
"""The smallest number of steps, relative to the calm run's."""
_MOST_STALL = 2.0
"""The longest stall, in multiples of the call deadline."""
_MOST_LOSS = 1.03
"""The largest final loss relative to the calm run's: of the trainers' final models, on text not trained on, with all
experts available.
"""


def verdicts(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """For each name: what was measured, the target in words, and whether it was reached."""
    calm, chaos, plan = results["calm"], results["chaos"], results["plan"]
    replicated = [loss for loss in chaos["losses"] if loss["had_survivor"]]
    alone = [loss for loss in chaos["losses"] if not loss["had_survivor"]]
    lost = sum(loss["is_lost"] for loss in replicated)
    beyond = sum(loss["is_beyond_interval"] or loss["is_lost"] for loss in alone)
    most_stall_s = _MOST_STALL * plan["call_deadline_s"]
    steps, loss = chaos["steps"] / max(calm["steps"], 1), final_loss(chaos) / final_loss(calm)
    leaked = chaos["leaked"]["processes"] + calm["leaked"]["processes"]
    wrong = len(chaos["wrong_answers"]) + len(chaos["faults"])
    unserved = chaos["experts"] - chaos["experts_served_at_the_end"]
    return {
        "lost, of those with a surviving replica": _verdict(lost, "0", lost == 0),
        "beyond a checkpoint interval, of the others": _verdict(beyond, "0", beyond == 0),
        "not served at the end": _verdict(unserved, "0", unserved == 0),
        "longest stall, s": _verdict(
            chaos["longest_stall_s"], f"at most {most_stall_s:g}", chaos["longest_stall_s"] <= most_stall_s
        ),
        "steps, of the calm run's": _verdict(steps, f"at least {_LEAST_STEPS}", steps >= _LEAST_STEPS),
        "final loss, of the calm run's": _verdict(loss, f"at most {_MOST_LOSS}", loss <= _MOST_LOSS),
        "wrong answers and faults": _verdict(wrong, "0", wrong == 0),
        "leaked processes": _verdict(leaked, "0", leaked == 0),
    }


def final_loss(part: Mapping[str, Any]) -> float:
    """The mean final loss of the trainers."""
    last = part["final_loss"].values()
    return statistics.fmean(last) if last else float("nan")


def losses_at_same_step(parts: Sequence[Mapping[str, Any]]) -> tuple[int, list[float]]:
    """The last step at which all trainers of these parts were validated, and each part's mean loss there.

    The step is 0 and the list is empty if there is no such step.
    """
    losses = [[dict(one) for one in part["validation_losses"].values()] for part in parts]
    common = set.intersection(*(set(one) for part in losses for one in part))
    if not common:
        return 0, []
    step = max(common)
    return step, [statistics.fmean(one[step] for one in part) for part in losses]


def show(results: Mapping[str, Any], console: Console) -> None:
    table = Table("", *(part for part in ("calm", "chaos") if part in results), title="chaos beside calm")
    parts = [results[part] for part in ("calm", "chaos") if part in results]
    table.add_row("steps", *(str(p["steps"]) for p in parts))
    table.add_row("longest stall, s", *(f"{p['longest_stall_s']:.2f}" for p in parts))
    table.add_row("final loss", *(f"{final_loss(p):.3f}" for p in parts))
    step, losses = losses_at_same_step(parts)
    if step:  # the final loss is lower after more steps
        table.add_row(f"loss after {step} steps", *(f"{loss:.3f}" for loss in losses))
    table.add_row("deaths", *(str(p["deaths"]) for p in parts))
    if any(p.get("misdeeds") for p in parts):
        table.add_row("misdeeds of strangers", *(str(sum(p.get("misdeeds", {}).values())) for p in parts))
    table.add_row(
        "experts served at the end", *(f"{p['experts_served_at_the_end']} of {p['experts']}" for p in parts)
    )
    table.add_row("probes, differing replicas", *(f"{p['probes']}, {p['differing_replicas']}" for p in parts))
    table.add_row(
        "left: processes, sockets", *(f"{p['leaked']['processes']}, {p['leaked']['sockets']}" for p in parts)
    )
    console.print(table)
    if "chaos" in results:
        show_losses(results["chaos"], console)
    for part in parts:
        for line in [*part["wrong_answers"], *part["faults"]]:
            console.print(line, style="red", markup=False)
    for name, verdict in results.get("verdicts", {}).items():
        reached = "reached" if verdict["reached"] else "missed"
        console.print(f"{name}: {verdict['value']:.4g} ({verdict['target']}) {reached}")


def show_losses(chaos: Mapping[str, Any], console: Console) -> None:
    columns = ("hosted experts of the dead", "number", "updates lost, mean", "most", "lost", "away, mean s")
    table = Table(*columns, title="what deaths cost")
    for name, had_survivor in (("with another replica", True), ("without", False)):
        rows = [loss for loss in chaos["losses"] if loss["had_survivor"] == had_survivor]
        table.add_row(
            name,
            str(len(rows)),
            _mean(r["updates"] for r in rows),
            str(max((r["updates"] for r in rows), default=0)),
            str(sum(r["is_lost"] for r in rows)),
            _mean(away_s for r in rows if (away_s := r.get("away_s")) is not None),
        )
    console.print(table)
    for loss in chaos["losses"]:
        if loss["is_lost"] or loss["is_beyond_interval"]:
            console.print(
                f"{loss['at_s']:.0f} s {loss['deed']} {loss['node']}: {loss['expert']} had {loss['before']} updates, "
                f"kept {loss['kept']}, served next with {loss['after']}"
                + (", a replica lived" if loss["had_survivor"] else ""),
                style="red",
            )


def _verdict(value: float, target: str, reached: bool) -> dict[str, Any]:
    return {"value": value, "target": target, "reached": bool(reached)}


def _mean(values: Iterable[float]) -> str:
    listed = list(values)
    return f"{statistics.fmean(listed):.1f}" if listed else "-"
