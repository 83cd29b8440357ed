"""Replicas of an expert that train and average: what hostile ones do to an honest one, and what clipping costs."""

from collections.abc import Callable
from contextlib import suppress
from functools import cache

import pytest
import torch
from checkpoint_samples import AN_UID, MANIFEST, SWARM
from torch import Tensor

from benchmarks.chaos.attacks import LIES, altered
from expert_server.experts.expert import Expert
from expert_server.experts.format import BLOCK, Checkpoint, State, moving_tensors, to_bytes
from expert_server.experts.graphs import Rows
from expert_server.hosting.averaging import average_into
from expert_server.state.transfer import Snapshot
from peer.clipping import distance
from peer.errors import OutOfReachError, StateError

HIDDEN, ROWS, UPDATES, MEETINGS = 8, 16, 6, 30
FAST = MANIFEST.model_copy(
    update={
        "optimizer": MANIFEST.optimizer.model_copy(update={"learning_rate": 3e-3, "warmup_updates": 0}),
    }
)


class Task:
    """A linear map that replicas learn, each from its own batches."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._map = torch.randn(HIDDEN, HIDDEN, generator=self._generator) / HIDDEN**0.5

    def _batch(self) -> tuple[Rows, Tensor]:
        inputs = torch.randn(ROWS, HIDDEN, generator=self._generator)
        rows = Rows(inputs, torch.tensor([ROWS]), torch.arange(ROWS))
        return rows, inputs @ self._map + 0.5 * torch.randn(ROWS, HIDDEN, generator=self._generator)

    def train(self, expert: Expert, updates: int = UPDATES) -> None:
        for _ in range(updates):
            rows, wanted = self._batch()
            gradients = (expert.forward(rows) - wanted) / ROWS
            expert.backward([Rows(rows.inputs, rows.lengths, rows.positions, gradients)])

    def loss(self, expert: Expert) -> float:
        generator = torch.Generator().manual_seed(7)
        inputs = torch.randn(512, HIDDEN, generator=generator)
        rows = Rows(inputs, torch.tensor([ROWS] * 32), torch.arange(ROWS).repeat(32))
        return float((expert.forward(rows) - inputs @ self._map).square().mean())


def snapshot(expert: Expert) -> Snapshot:
    data = to_bytes(expert.checkpoint(), SWARM, AN_UID, 0.0)
    return Snapshot(AN_UID, expert.update_count, 0, expert.generation, {}, data, b"", 0.0)


def clipped(expert: Expert, theirs: Checkpoint) -> None:
    average_into(expert, snapshot(expert), theirs, SWARM, 0.5)


def plain(expert: Expert, theirs: Checkpoint) -> None:
    state = expert.export_state()
    other = {name: torch.lerp(t, theirs.state[name], 0.5) for name, t in moving_tensors(state).items()}
    expert.import_state(state | other, expert.update_count)


def trained_alone(seed: int, meetings: int) -> tuple[Task, Expert]:
    task, expert = Task(seed), Expert(AN_UID, FAST)
    for _ in range(meetings):
        task.train(expert)
    return task, expert


def loss_of_replicas(seed: int, replicas: int, meet: Callable[[Expert, Checkpoint], None]) -> float:
    """The mean loss at the end. After each round of updates two replicas meet, in turns."""
    task = Task(seed)
    experts = [Expert(AN_UID, FAST) for _ in range(replicas)]
    for meeting in range(MEETINGS):
        for expert in experts:
            task.train(expert)
        one, other = experts[meeting % replicas], experts[(meeting + 1) % replicas]
        mine, theirs = one.checkpoint(), other.checkpoint()
        meet(one, theirs)
        meet(other, mine)
    return sum(map(task.loss, experts)) / replicas


@pytest.mark.slow
@pytest.mark.parametrize("replicas", [2, 3])
def test_without_hostile_replicas_clipping_costs_nothing(replicas: int) -> None:
    assert loss_of_replicas(0, replicas, clipped) <= 1.005 * loss_of_replicas(0, replicas, plain)


@cache
def loss_beside_a_liar(lie: str | None, meet: Callable[[Expert, Checkpoint], None]) -> float:
    """The mean final loss of two honest replicas that meet each other and a third one, which lies. None: the third is
    honest.
    """
    task, (*honest, liar) = Task(3), [Expert(AN_UID, FAST) for _ in range(3)]
    for meeting in range(24):
        for expert in (*honest, liar):
            task.train(expert, UPDATES // 2)
        one, other = honest[meeting % 2], [liar, honest[1 - meeting % 2]][meeting // 2 % 2]
        mine, theirs = one.checkpoint(), other.checkpoint()
        if lie is not None and other is liar:
            told = {
                name: altered(lie, tensor, name, 0, meeting) if name.startswith(BLOCK) else tensor
                for name, tensor in theirs.state.items()
            }
            theirs = Checkpoint(told, theirs.update_count + 10_000)
        with suppress(StateError):
            one.require_good(theirs.state, theirs.update_count)
            meet(one, theirs)
        meet(other, mine)
    return sum(map(task.loss, honest)) / len(honest)


@pytest.mark.parametrize(
    "lie",
    [lie if lie == "sign-flipped" else pytest.param(lie, marks=pytest.mark.slow) for lie in LIES],
)
def test_one_liar_of_three_costs_two_honest_replicas_next_to_nothing(lie: str) -> None:
    calm = loss_beside_a_liar(None, clipped)
    assert loss_beside_a_liar(lie, clipped) <= 1.05 * calm
    if lie not in ("1e30", "nan"):  # which no parser lets through
        assert loss_beside_a_liar(lie, plain) >= 1.1 * calm, "the rule would be worth nothing"


def random_like(state: State) -> State:
    generator = torch.Generator().manual_seed(1)
    noise = {n: torch.randn(t.shape, generator=generator) for n, t in state.items() if n.startswith(BLOCK)}
    return state | {name: t * state[name].norm() / t.norm() for name, t in noise.items()}


def changed(factor: float) -> Callable[[State], State]:
    return lambda state: state | {n: factor * t for n, t in state.items() if n.startswith(BLOCK)}


@pytest.mark.parametrize(
    "spoil", [changed(-1.0), changed(2.0), changed(1e30), changed(float("nan")), random_like]
)
def test_a_state_that_own_updates_do_not_explain_is_refused(spoil: Callable[[State], State]) -> None:
    _, expert = trained_alone(0, 1)
    mine = expert.checkpoint()
    for _ in range(3):
        with pytest.raises(StateError):
            clipped(expert, Checkpoint(spoil(mine.state), mine.update_count + 1000))
    torch.testing.assert_close(expert.export_state(), mine.state, rtol=0, atol=0)
    assert expert.update_count == mine.update_count


def test_a_replica_that_drifts_slowly_moves_an_honest_one_by_half_a_radius_each_time() -> None:
    task, expert = trained_alone(0, 1)
    direction = {n: torch.ones_like(t) for n, t in expert.export_state().items() if n.startswith(BLOCK)}
    size = distance({n: torch.zeros_like(t) for n, t in direction.items()}, direction)
    for _ in range(20):
        before = expert.export_state()
        moves = expert.own_moves
        present = moves.present(moving_tensors(before))
        radii, reach = moves.radii(present), moves.reach(present, direction)
        hostile = before | {n: before[n] + 0.99 * reach / size * t for n, t in direction.items()}
        clipped(expert, Checkpoint(hostile, expert.update_count + 1000))
        after = expert.export_state()
        for name in direction:
            assert float((after[name] - before[name]).norm()) <= radii[name] / 2 + 1e-5
        task.train(expert)
    assert expert.update_count <= 21 * UPDATES + 20 * 500, "no claim is believed by more than a half"


def test_a_replica_that_has_no_update_of_its_own_believes_nothing() -> None:
    _, other = trained_alone(0, 1)
    fresh = Expert(AN_UID, FAST)
    before = fresh.export_state()
    with pytest.raises(OutOfReachError, match=r"was not averaged: .* updates explain") as found:
        clipped(fresh, other.checkpoint())
    assert found.value.is_untrained
    torch.testing.assert_close(fresh.export_state(), before, rtol=0, atol=0)


def test_updates_that_are_taken_while_a_state_travels_belong_to_the_next_move() -> None:
    (task, expert), (_, other) = (trained_alone(seed, 1) for seed in (0, 1))
    base = snapshot(expert)
    before = expert.export_state()
    task.train(expert)
    since = expert.export_state()
    average_into(expert, base, other.checkpoint(), SWARM, 0.5)
    present = expert.own_moves.present(moving_tensors(expert.export_state()))
    for name in (name for name in before if name.startswith(BLOCK)):
        assert present[name] == pytest.approx(float((since[name] - before[name]).norm()), rel=0.1), name
