"""The chaos benchmark: its schedule follows from a seed, and its accounts are right."""

from collections import Counter
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from benchmarks.chaos.accounts import Death, Loss, Observation, losses
from benchmarks.chaos.plan import Plan
from benchmarks.chaos.report import losses_at_same_step, verdicts
from benchmarks.chaos.schedule import DEATHS, FOUNDER, Deed, make_schedule
from benchmarks.chaos.swarm import ChaosSwarm, Node

ENDS = {Deed.KILL: Deed.RESTART, Deed.STOP: Deed.RESTART, Deed.FREEZE: Deed.THAW, Deed.CUT: Deed.MEND}
BEGINS = {
    **dict.fromkeys(DEATHS, "down"),
    Deed.FREEZE: "frozen",
    Deed.CUT: "cut",
}


@given(st.integers(0, 2**32), st.integers(2, 80), st.integers(3, 12), st.floats(1, 60))
def test_a_schedule_follows_from_its_seed_and_ails_only_what_is_well(
    seed: int, deaths: int, nodes: int, every_s: float
) -> None:
    seconds = deaths * every_s
    events = make_schedule(seed, seconds, nodes, every_s)
    assert events == make_schedule(seed, seconds, nodes, every_s)
    ailing: dict[int, Deed] = {}
    for event in events:
        assert 0 <= event.at_s <= seconds
        assert event.nodes
        for node in event.nodes:
            if event.deed in BEGINS:
                assert node not in ailing
                ailing[node] = event.deed
            else:
                assert ENDS[ailing.pop(node)] is event.deed
        assert len(ailing) <= nodes - round(nodes / 4) + 1  # the founder dies whatever else does
    assert not ailing
    founders = [event for event in events if FOUNDER in event.nodes]
    assert founders[0].deed is Deed.KILL
    assert seconds / 4 <= founders[0].at_s <= 3 * seconds / 4


def test_ten_minutes_have_a_death_every_twenty_seconds_and_all_kinds_of_trouble() -> None:
    events = make_schedule(0, 600.0)
    deaths = [event.at_s for event in events if event.deed in DEATHS]
    assert deaths == [20.0 * n for n in range(1, len(deaths) + 1)]
    assert len(deaths) >= 28
    assert set(Counter(event.deed for event in events)) == set(Deed)
    assert make_schedule(0, 600.0) != make_schedule(1, 600.0)


def death(*, survivor: int | None, saved: int = 0) -> Death:
    replicas = {"node-1": 100} | ({} if survivor is None else {"node-2": survivor})
    return Death(50.0, "node-1", {"e": replicas, "other": {"node-2": 7}}, {"e": saved})


def loss_of(one: Death, *after: tuple[float, int]) -> Loss:
    """The loss by one death. From an update count of 50 on, the expert took one update a second before it."""
    seen = [Observation(float(t), {"e": {"node-1": 50 + t}}) for t in range(0, 50, 2)]
    seen += [Observation(at_s, {"e": {"node-3": count}} if count >= 0 else {}) for at_s, count in after]
    (loss,) = losses([one], seen, checkpoint_every_s=10.0, rescue_s=20.0)
    return loss


def test_with_a_survivor_what_it_lacks_is_lost() -> None:
    loss = loss_of(death(survivor=93), (51.0, 94))
    assert (loss.had_survivor, loss.updates, loss.is_lost, loss.is_beyond_interval) == (True, 6, False, False)


def test_without_one_a_checkpoint_interval_may_be_lost_and_no_more() -> None:
    loss = loss_of(death(survivor=None, saved=92), (52.0, -1), (60.0, 92))
    assert (loss.updates, loss.interval, loss.is_lost, loss.is_beyond_interval) == (8, 10, False, False)
    assert loss.away_s == 10
    stale = loss_of(death(survivor=None, saved=60), (60.0, 60))
    assert (stale.updates, stale.is_lost, stale.is_beyond_interval) == (40, False, True)


def test_what_was_begun_anew_and_is_brought_back_by_a_death_is_no_loss() -> None:
    anew = Death(50.0, "node-1", {"e": {"node-1": 31}}, {"e": 92})
    loss = loss_of(anew, (60.0, 92))
    assert (loss.updates, loss.interval, loss.is_lost, loss.is_beyond_interval) == (0, 0, False, False)


def test_what_the_victims_disk_alone_had_may_be_lost() -> None:
    copied = loss_of(death(survivor=None, saved=100), (60.0, 91))
    assert (copied.updates, copied.is_lost, copied.is_beyond_interval) == (9, False, False)


def test_a_state_that_is_not_used_is_lost_unless_it_comes_back_soon() -> None:
    begun_anew = loss_of(death(survivor=None, saved=92), (60.0, 0), (62.0, 3))
    assert (begun_anew.after, begun_anew.is_beyond_interval) == (0, True)
    brought_back = loss_of(death(survivor=None, saved=92), (60.0, 0), (70.0, 95))
    assert (brought_back.after, brought_back.is_beyond_interval) == (95, False)
    too_late = loss_of(death(survivor=None, saved=92), (60.0, 0), (82.0, 5), (84.0, 95))
    assert too_late.is_beyond_interval
    ignored = loss_of(death(survivor=93), (60.0, 80), (62.0, 82))
    assert ignored.is_lost, "a replica lived"
    never = loss_of(death(survivor=93))
    assert (never.after, never.is_lost, never.updates, never.away_s) == (None, True, 100, None)


def test_averages_and_copies_of_others_experts_count_as_checkpoints(tmp_path: Path) -> None:
    node = Node("node-1", tmp_path / "node-1", (1, 2))
    for saved in ("0.0.1/20", "0.0.1/averaged/25", "0.0.2/30", "0.0.2/QmPeer/28"):
        file = node.folder / "checkpoints" / "a-swarm" / f"{saved}.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    assert ChaosSwarm(Plan(), tmp_path).checkpoints(node) == {"0.0.1": 25, "0.0.2": 30}


def test_losses_are_compared_at_the_last_step_that_all_trainers_reached() -> None:
    calm = {"validation_losses": {"a": [(50, 3.0), (100, 2.0), (150, 1.0)], "b": [(50, 3.0), (100, 4.0)]}}
    chaos = {"validation_losses": {"a": [(50, 3.5), (100, 5.0)], "b": [(50, 2.5), (100, 6.0)]}}
    assert losses_at_same_step([calm, chaos]) == (100, [3.0, 5.5])
    nobody = {"validation_losses": {"a": [], "b": [(50, 1.0)]}}
    assert losses_at_same_step([calm, nobody]) == (0, [])


def test_the_report_judges_each_target() -> None:
    def part(steps: int, loss: float, **changes: Any) -> dict[str, Any]:
        return {
            "steps": steps,
            "final_loss": {"trainer-0": loss},
            "longest_stall_s": 3.0,
            "losses": [],
            "experts": 32,
            "experts_served_at_the_end": 32,
            "wrong_answers": [],
            "faults": [],
            "leaked": {"processes": 0, "sockets": 0},
        } | changes

    plan = {"call_deadline_s": 10.0}
    good = verdicts({"plan": plan, "calm": part(1000, 2.0), "chaos": part(800, 2.05)})
    assert all(verdict["reached"] for verdict in good.values())
    lost = {"had_survivor": True, "is_lost": True, "is_beyond_interval": False}
    bad = part(600, 2.07, longest_stall_s=21.0, losses=[lost, lost | {"had_survivor": False}])
    bad |= {"experts_served_at_the_end": 31, "faults": ["x"], "leaked": {"processes": 1, "sockets": 0}}
    judged = verdicts({"plan": plan, "calm": part(1000, 2.0), "chaos": bad})
    assert not any(verdict["reached"] for verdict in judged.values())
