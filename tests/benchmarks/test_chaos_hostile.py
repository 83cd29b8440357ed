"""Chaos with hostile peers: which peers are hostile, what they do, and what the report concludes."""

import math
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from expert_fakes import make_node
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.chaos import attacks
from benchmarks.chaos.attacks import (
    ATTACKS,
    LIES,
    RULES,
    SPENT,
    Start,
    altered,
    altered_rows,
    patches_of,
    tiny_calls,
)
from benchmarks.chaos.hostile import (
    MOST_LOSS,
    HostilePlan,
    counts,
    hosts_of,
    lost_experts,
    rows,
    scraped,
    tracebacks,
)
from benchmarks.chaos.overhead import Window, ratios, steps_in
from dht.announcements import Replica, ReplicaState
from dht.manifest import Manifest
from dht.uid import UID
from peer.errors import StartError
from peer.identity import PeerID
from peer.loop import LoopThread
from talkoot.demo.processes import DemoProcesses
from trainer_client.dispatch.batches import NodeBatch, NodeCall

PEERS = [PeerID(bytes([18, 32, number]) + bytes(31)) for number in range(5)]
UIDS = [UID(0, (0, number)) for number in range(3)]


@pytest.fixture
def unpatched() -> Iterator[None]:
    yield
    patch.stopall()


@given(st.floats(0.01, 0.99), st.integers(0, 100))
def test_hostile_nodes_are_the_share_that_was_asked_for_and_never_the_founder(
    share: float, seed: int
) -> None:
    plan = HostilePlan.of(share, "random", quick=False)
    hostile = plan.hostile_nodes(seed)
    assert hostile == plan.hostile_nodes(seed)
    assert len(set(hostile)) == min(max(1, round(share * plan.nodes)), plan.nodes - 1)
    assert set(hostile) <= set(range(1, plan.nodes))


def test_a_fifth_is_one_of_five_nodes_that_host_each_expert_three_times(tmp_path: Path) -> None:
    plan = HostilePlan.of(0.2, "minority", quick=True)
    assert (len(plan.hostile_nodes(0)), plan.nodes) == (1, 5)
    assert plan.nodes * plan.room == plan.hosts * plan.experts
    (tmp_path / "swarm.toml").write_text(plan.manifest)
    assert Manifest.from_toml(tmp_path / "swarm.toml").experts_total == plan.experts


def test_an_expert_is_lost_when_half_of_its_hosts_are_hostile() -> None:
    def replicas(uid: UID, *numbers: int) -> list[Replica]:
        return [Replica(uid, PEERS[n], ReplicaState.SERVING, 0, 0, 0.0, 0.0) for n in numbers]

    claimed = Replica(UIDS[0], PEERS[4], ReplicaState.CLAIMED, 0, 0, 0.0, 0.0)
    hosts = hosts_of(
        {
            UIDS[0]: [*replicas(UIDS[0], 0, 1, 2), claimed],
            UIDS[1]: replicas(UIDS[1], 0, 1),
            UIDS[2]: replicas(UIDS[2], 1, 2, 3),
        }
    )
    assert lost_experts(hosts, {PEERS[0]}) == [UIDS[1]]
    assert lost_experts(hosts, {PEERS[0], PEERS[4]}) == [UIDS[1]], "a claim has no say"
    assert lost_experts(hosts, {PEERS[0], PEERS[1]}) == [UIDS[0], UIDS[1]]


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_has_its_tensors_form_and_is_no_accident(lie: str) -> None:
    tensor = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
    told = altered(lie, tensor, "weight", 7, 1)
    assert (told.shape, told.dtype) == (tensor.shape, tensor.dtype)
    assert not told.equal(tensor)
    torch.testing.assert_close(told, altered(lie, tensor, "weight", 7, 1), equal_nan=True)
    if lie in ("random", "sign-flipped"):
        torch.testing.assert_close(told.norm(), tensor.norm())
    if lie == "drifting":
        apart = [
            (altered(lie, tensor, "weight", 7, times) - tensor).norm() / tensor.norm() for times in (1, 50)
        ]
        torch.testing.assert_close(torch.stack(apart), torch.tensor([0.02, 1.0]))


def test_altered_rows_are_the_share_that_was_asked_for_and_off_by_as_much() -> None:
    rng = np.random.default_rng(0)
    tensor = rng.standard_normal((5000, 16)).astype(np.float32)
    apart = np.linalg.norm(altered_rows(tensor, 0.01, 0.01, rng) - tensor, axis=1)
    wrong = apart > 0
    assert 20 < wrong.sum() < 90
    np.testing.assert_allclose(apart[wrong] / np.linalg.norm(tensor[wrong], axis=1), 0.01, rtol=0.01)


def test_tiny_calls_have_one_row_each_and_the_gradients_sign_flipped() -> None:
    batch = NodeBatch.apart(UIDS[:2], [3], range(3))
    asked = batch.asked
    inputs = np.arange(24, dtype=np.float32).reshape(6, 4)
    call = NodeCall(
        make_node(PEERS[0]),
        "backward",
        batch,
        1.0,
        inputs,
        asked.astype(np.float32),
        inputs + 1,
        counts=asked,
    )
    tiny = list(tiny_calls(call, 4, np.random.default_rng(0)))
    assert len(tiny) == 4
    for each in tiny:
        (row,) = each.batch.rows
        np.testing.assert_array_equal(each.inputs, inputs[[row]])
        assert each.gradients is not None
        assert (each.gradients < 0).all()
        assert len(each.batch.uids) == 1


@pytest.mark.parametrize("attack", ATTACKS)
def test_what_an_attack_patches_is_there(attack: str, tmp_path: Path, unpatched: None) -> None:
    """If the patch failed, the peer would be honest, and the run would show nothing."""
    patches_of(attack, 0, Start(tmp_path / "attack"))()


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_is_left_out_for_as_long_as_the_file_exists(
    rule: str, tmp_path: Path, unpatched: None
) -> None:
    start = Start(tmp_path / "begins")
    patches_of(rule, 0, start)()
    (spent,) = tmp_path.glob(f"{SPENT}-*")

    def is_kept() -> bool:
        """The import comes after the patch, as in a peer."""
        from expert_server.experts.callers import Callers
        from peer.clipping import OwnMoves
        from trainer_client.dispatch.spot_checks import SpotChecks

        if rule == "checks":
            with pytest.raises(AttributeError) if not start.is_on else nullcontext() as raised:
                SpotChecks.note(None, None, None, None)  # type: ignore[arg-type]  # it looks at none of them
            return raised is not None
        if rule == "averages":
            return OwnMoves({"a": torch.zeros(3)}).present({"a": torch.ones(3)}) != {}
        callers = Callers()
        callers.note_step({"a": 1})
        return len(callers._steps) > 0

    assert is_kept()
    start.file.touch()
    assert not is_kept()
    start.end()
    assert is_kept()
    spent_s = dict(zip(RULES, np.fromfile(spent), strict=True))
    assert spent_s.pop(rule) > 0
    assert not any(spent_s.values()), "rules that are never left out are not counted"


def test_part_of_a_step_counts_as_that_part() -> None:
    ended_at = [1.0, 2.0, 4.0, 8.0]
    assert steps_in(ended_at, 1.0, 8.0) == 3
    assert steps_in(ended_at, 2.0, 3.0) == 0.5
    assert steps_in(ended_at, 6.0, 7.0) == 0.25
    assert steps_in([], 0.0, 9.0) == 0.0


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=8), st.floats(0.5, 1.5), st.floats(0, 0.1))
def test_the_load_of_the_machine_cancels_out(loads: list[float], speed: float, cost: float) -> None:
    """In each pair of windows, the swarm is slowed by the machine's load at that time."""
    windows = []
    for number, load in enumerate(loads):
        # The processor is busy all the time in either case.
        ruled = Window(True, 0.0, 10.0, 7.0, (0.0, 7.0 * (cost + 0.01), 0.0)), 100 * speed / load
        plain = Window(False, 10.0, 20.0, 7.0, (0.0, 7.0 * 0.01, 0.0)), 100 / load
        windows += [ruled, plain] if number % 2 == 0 else [plain, ruled]
    found = ratios(windows)
    assert found["speed"][0] == pytest.approx(speed)
    assert found["speed_by_cpu"][0] == pytest.approx(speed)
    assert found["cost"][0] == pytest.approx(cost)
    assert found["costs"]["averages"] == pytest.approx(found["cost"])
    assert found["costs"]["checks"][0] == found["costs"]["steps"][0] == 0


def test_a_fault_names_the_exception_of_a_bare_traceback() -> None:
    lines = [
        '{"event": "fine"}',
        '{"exception": "Traceback ... ValueError: one"}',
        '{"event": "other"}',
        "Traceback (most recent call last):",
        '  File "a.py", line 1',
        "ValueError: two",
    ]
    one, two = tracebacks(lines)
    assert one.endswith('ValueError: one"}')
    assert two.endswith("ValueError: two")


def test_counts_are_of_all_pages() -> None:
    page = """
# TYPE talkoot_averagings_total counter
talkoot_averagings_total 3.0
talkoot_averagings_created 1.7e9
# TYPE talkoot_state_fetches_total counter
talkoot_state_fetches_total{outcome="fetched"} 9.0
talkoot_state_fetches_total{outcome="broken"} 2.0
"""
    found = counts([scraped(page), scraped(page)])
    assert (found["averaged"], found["refused"]) == (6, 4)


def test_the_report_compares_each_attack_with_the_calm_run_of_its_seed() -> None:
    def ran(*losses: float | None, lost: float = 0.0) -> dict[str, object]:
        return {
            "losses": losses,
            "steps_per_s": 4.0,
            "experts_lost": lost,
            "deeds": 5,
            "hostile_banned": ["node-1"],
            "honest_banned": [],
            "counts": {"averaged": 10, "refused": 1},
            "faults": [],
        }

    runs = {
        "0": {"calm": ran(2.0, 2.0), "dense-nan": ran(2.0, 2.1), "replicas-nan": ran(2.0, None)},
        "1": {"calm": ran(3.0, 3.0), "dense-nan": ran(3.3, 3.3)},
    }
    runs["1"]["replicas-nan"] = ran(3.0, 3.0)
    found = rows(runs)
    assert found["dense-nan"]["of_calm"] == pytest.approx((1.025 + 1.1) / 2)
    assert found["dense-nan"]["reached"] is (found["dense-nan"]["of_calm"] <= MOST_LOSS)
    assert found["dense-nan"]["counts"] == {"averaged": 20, "refused": 2}
    assert found["replicas-nan"]["of_calm"] == math.inf, "a trainer that failed has no loss"
    assert not found["replicas-nan"]["reached"]


@pytest.mark.slow
def test_a_hostile_peer_is_a_process_of_its_own_that_says_why_it_ended(
    loop: LoopThread, tmp_path: Path
) -> None:
    async def scenario() -> None:
        processes = DemoProcesses(tmp_path, lambda child, event: None)
        arguments = ("node", "--join", "nonsense", "--state", str(tmp_path / "state"))
        attack = (attacks.__file__, "replicas-random", "0", str(tmp_path / "attack"))
        await processes.start("peer", arguments, attack)
        try:
            with pytest.raises(StartError, match=r"exit status 2: .*invite"):
                await processes.until(lambda: False, 120, "its end")
        finally:
            await processes.stop()

    loop.run(scenario(), 240)
