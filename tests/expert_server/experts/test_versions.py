"""The version of an expert's parameters, which each answer names."""

import pytest
import torch
from expert_samples import AN_UID, LENGTHS, POSITIONS, make_manifest, random_rows

from expert_server.experts.expert import Expert
from expert_server.experts.format import BLOCK
from expert_server.experts.graphs import Rows
from expert_server.experts.guard import StepOutcome
from expert_server.serving.batching import Result, WorkItem
from expert_server.serving.compute import compute, compute_together
from peer.errors import ExpertError


def train(expert: Expert, may_defer: bool = False) -> StepOutcome:
    part = Rows(random_rows(1), LENGTHS, POSITIONS, random_rows(2))
    return expert.backward([part], may_defer=may_defer)[1]


def asked(keep: bool) -> WorkItem:
    return WorkItem(
        AN_UID, "forward", Rows(random_rows(3), LENGTHS, POSITIONS), 1e9, "somebody", "a line", keep
    )


def test_it_rises_with_the_parameters_and_with_nothing_else() -> None:
    expert = Expert(AN_UID, make_manifest())
    first = expert.version
    assert 0 < first < 2**63
    expert.forward(asked(False).rows)
    expert.export_state()
    assert expert.version == first
    train(expert, may_defer=True)
    assert expert.version == first, "the step is due"
    expert.settle()
    stepped = expert.version
    assert stepped > first
    expert.import_state(expert.export_state(), expert.update_count)
    assert expert.version > stepped
    assert Expert(AN_UID, make_manifest()).version != first


def test_it_rises_when_the_guard_rolls_back() -> None:
    expert = Expert(AN_UID, make_manifest())
    before = expert.version
    with torch.no_grad():
        next(iter(expert.parameters)).fill_(float("inf"))
    with pytest.raises(ExpertError, match="not finite"):
        expert.forward(asked(False).rows)
    assert expert.guard.rollbacks == 1
    assert expert.version > before


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("works", [1, 2])
def test_answers_name_the_version_that_computed_them(keep: bool, works: int) -> None:
    expert = Expert(AN_UID, make_manifest())
    for _ in range(3):
        results = compute(expert, [asked(keep) for _ in range(works)])
        for result in results:
            assert isinstance(result, Result)
            assert result.version == expert.version
            state = expert.export_block(result.version)
            assert state is not None
            own = Expert(AN_UID, make_manifest())
            own.block.load_state_dict({name.removeprefix(BLOCK): tensor for name, tensor in state.items()})
            expected = own.forward(asked(False).rows)
            torch.testing.assert_close(result.tensor, expected, rtol=1e-5, atol=1e-6)
        train(expert, may_defer=True)


def test_answers_of_experts_that_compute_together_name_each_ones_version() -> None:
    experts = [Expert(AN_UID, make_manifest()) for _ in range(4)]
    results = compute_together(experts, [asked(True) for _ in experts])
    assert [r.version for r in results if isinstance(r, Result)] == [expert.version for expert in experts]


def test_parameters_are_given_at_their_version_alone_even_if_a_step_is_due() -> None:
    expert = Expert(AN_UID, make_manifest())
    version = expert.version
    before = {name: tensor.clone() for name, tensor in expert.block.state_dict().items()}
    train(expert, may_defer=True)
    state = expert.export_block(version)
    assert state is not None
    assert {BLOCK + name for name in before} == state.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(state[BLOCK + name], tensor, rtol=0, atol=0)
    assert expert.export_block(version + 1) is None
    expert.settle()
    assert expert.export_block(version) is None


def test_parameters_that_a_graph_still_needs_are_given_after_the_step() -> None:
    expert = Expert(AN_UID, make_manifest())
    version, wide = expert.version, 64 // len(POSITIONS) + 1
    many = Rows(random_rows(3).repeat(wide, 1), LENGTHS.repeat(wide), POSITIONS.repeat(wide))
    _, graph = expert.forward_with_graph(many)
    before = {name: tensor.clone() for name, tensor in expert.block.state_dict().items()}
    train(expert)
    assert expert.version > version
    state = expert.export_block(version)
    assert state is not None
    for name, tensor in before.items():
        torch.testing.assert_close(state[BLOCK + name], tensor, rtol=0, atol=0)
    expert.import_state(expert.export_state(), expert.update_count)
    assert expert.export_block(version) is None, "that may have overwritten it"
    del graph
    train(expert)
    assert not expert._kept_versions.get(version)
