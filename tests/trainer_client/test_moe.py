"""The mixture layer compared with a plain local one, with real blocks (the paper, section 3.1); whole models are
causal.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from io import BytesIO

import numpy as np
import pytest
import torch
from expert_fakes import (
    SILENT,
    Behaviour,
    FakeSwarm,
    fails,
    make_manifest,
    virtual_time,
)
from grpc import StatusCode
from hypothesis import given, settings
from hypothesis import strategies as st
from router_fakes import BALANCE_STATE
from torch import Tensor, nn

from dht.beam_search import default_beam_size, select_experts
from dht.uid import UID
from peer.errors import SettingsError
from peer.loop import LoopThread
from trainer_client.dispatch.dispatcher import Dispatcher
from trainer_client.dispatch.policy import WaitPolicy
from trainer_client.model import LanguageModel
from trainer_client.moe import RemoteMixtureOfExperts, rebalance
from trainer_client.routers import Gate, Routing

HIDDEN = 8
SENT_LATE = Behaviour(after_s=2.0)

grids = st.sampled_from([(5,), (2, 3), (3, 3), (2, 2, 2)])
seeds = st.integers(0, 2**32 - 1)


@contextmanager
def mixtures(
    swarm: FakeSwarm, k: int, *, k_min: int = 1, grace_s: float = 0.0, live: Sequence[UID] | None = None
) -> Iterator[Callable[[int], RemoteMixtureOfExperts]]:
    """A function that makes the layers of a trainer, which calls this swarm in virtual time."""
    with virtual_time() as runner:
        dispatcher = Dispatcher(
            swarm.directory(live), swarm, WaitPolicy(10.0, grace_s, k_min), clock=runner.get_loop().time
        )
        yield lambda layer: RemoteMixtureOfExperts(
            layer, swarm.manifest, dispatcher, runner.run, Routing(k=k)
        )
        runner.run(dispatcher.close())


def local_mixture(
    swarm: FakeSwarm, gate: Gate, x_BTD: Tensor, k: int, answers: Callable[[UID], bool] = lambda uid: True
) -> Tensor:
    """What the layer should compute, by loops over rows and experts, under autograd."""
    length = x_BTD.shape[1]
    x_RD = x_BTD.reshape(-1, x_BTD.shape[2])
    scores = gate(x_RD)
    tables = swarm.directory().view.tables(0)
    selection = select_experts([table.detach().numpy() for table in scores], tables, k, default_beam_size(k))
    chosen = [
        [UID(0, tuple(c)) for c, valid in zip(row, row_valid, strict=True) if valid]
        for row, row_valid in zip(selection.coordinates.tolist(), selection.valid, strict=True)
    ]
    outputs: dict[tuple[int, UID], Tensor] = {}
    for uid in swarm.manifest.uids():
        rows = [row for row, experts in enumerate(chosen) if uid in experts]
        if rows and answers(uid):
            sequences = [row // length for row in rows]
            lengths = torch.tensor([sequences.count(b) for b in sorted(set(sequences))])
            positions = torch.tensor([row % length for row in rows])
            for row, output in zip(rows, swarm.block(uid)(x_RD[rows], lengths, positions), strict=True):
                outputs[row, uid] = output
    mixed = []
    for row, experts in enumerate(chosen):
        there = [uid for uid in experts if (row, uid) in outputs]
        if not there:
            mixed.append(x_RD[row])
            continue
        logits = torch.stack(
            [sum((scores[d][row, c] for d, c in enumerate(uid.coordinate)), torch.zeros(())) for uid in there]
        )
        weights = logits.softmax(dim=0)
        mixed.append(
            sum((w * outputs[row, uid] for w, uid in zip(weights, there, strict=True)), torch.zeros(()))
        )
    return torch.stack(mixed).view_as(x_BTD)


def random_tensors(seed: int, sequences: int, length: int) -> tuple[Tensor, Tensor]:
    """An input that requires grad, and the gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    x_BTD, gradient_BTD = torch.randn(2, sequences, length, HIDDEN, generator=generator).unbind()
    return x_BTD.requires_grad_(), gradient_BTD


def gradients(y_BTD: Tensor, gradient_BTD: Tensor, x_BTD: Tensor, gate: Gate) -> tuple[Tensor, ...]:
    inputs = [x_BTD, gate.linear.weight, gate.linear.bias]
    return torch.autograd.grad(y_BTD, inputs, gradient_BTD, materialize_grads=True)


def assert_equals_local(
    swarm: FakeSwarm,
    mixture: RemoteMixtureOfExperts,
    x_BTD: Tensor,
    gradient_BTD: Tensor,
    answers: Callable[[UID], bool] = lambda uid: True,
) -> None:
    y_BTD = mixture(x_BTD)
    found = gradients(y_BTD, gradient_BTD, x_BTD, mixture.gate)
    expected_BTD = local_mixture(swarm, mixture.gate, x_BTD, mixture.k, answers)
    expected = gradients(expected_BTD, gradient_BTD, x_BTD, mixture.gate)
    torch.testing.assert_close(y_BTD, expected_BTD, rtol=1e-5, atol=1e-5)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@settings(max_examples=25)
@given(grids, st.integers(1, 5), st.integers(1, 9), st.integers(1, 3), st.integers(1, 6), seeds)
def test_output_and_gradients_are_those_of_a_local_mixture(
    grid: tuple[int, ...], k: int, peers: int, sequences: int, length: int, seed: int
) -> None:
    k = min(k, int(np.prod(grid)))
    swarm = FakeSwarm(make_manifest(grid), peers)
    torch.default_generator.manual_seed(seed % 2**31)
    with mixtures(swarm, k) as make_mixture:
        assert_equals_local(swarm, make_mixture(0), *random_tensors(seed, sequences, length))


@pytest.mark.slow
@settings(max_examples=40)
@given(st.data(), grids, st.integers(1, 9), seeds)
def test_with_any_subset_answering_the_weights_of_the_rest_are_renormalised(
    data: st.DataObject, grid: tuple[int, ...], peers: int, seed: int
) -> None:
    """If all experts are asked, any of them may fail; otherwise fewer than k, so that no row is sent elsewhere.

    Some are late, if none shares its node with another: a node answers a row only when all of the row's experts have
    ended.
    """
    swarm = FakeSwarm(make_manifest(grid), peers)
    uids = swarm.manifest.uids()
    k = data.draw(st.sampled_from([2, 3, len(uids)]))
    most = len(uids) if k == len(uids) else k - 1
    missing = data.draw(st.sets(st.sampled_from(uids), max_size=most))
    late = {uid for uid in missing if peers >= len(uids) and data.draw(st.booleans())}
    for uid in missing:
        swarm.behaviours[uid] = SENT_LATE if uid in late else fails(StatusCode.NOT_FOUND)
    answering = set(uids) - missing or late  # late ones are waited for where nobody else answers
    torch.default_generator.manual_seed(seed % 2**31)
    with mixtures(swarm, k) as make_mixture:
        assert_equals_local(swarm, make_mixture(0), *random_tensors(seed, 2, 4), lambda uid: uid in answering)


def test_row_without_answers_passes_unchanged_and_so_does_its_gradient() -> None:
    swarm = FakeSwarm(make_manifest((4,)))
    for uid in swarm.manifest.uids():
        swarm.behaviours[uid] = fails(StatusCode.NOT_FOUND)
    x_BTD, gradient_BTD = random_tensors(0, 2, 4)
    with mixtures(swarm, k=2) as make_mixture:
        mixture = make_mixture(0)
        y_BTD = mixture(x_BTD)
        x_gradient, *gate_gradients = gradients(y_BTD, gradient_BTD, x_BTD, mixture.gate)
    assert torch.equal(y_BTD, x_BTD)
    assert torch.equal(x_gradient, gradient_BTD)
    assert not any(gradient.any() for gradient in gate_gradients)


def test_expert_that_fails_only_in_backward_leaves_the_rest_of_the_gradient() -> None:
    swarm = FakeSwarm(make_manifest((3,)))
    x_BTD, gradient_BTD = random_tensors(0, 2, 4)
    with mixtures(swarm, k=3) as make_mixture:
        mixture = make_mixture(0)
        y_BTD = mixture(x_BTD)
        swarm.behaviours |= dict.fromkeys(swarm.manifest.uids(), SILENT)
        x_gradient, *gate_gradients = gradients(y_BTD, gradient_BTD, x_BTD, mixture.gate)
        expected_BTD = local_mixture(swarm, mixture.gate, x_BTD, 3)
        whole_gradient, *expected = gradients(expected_BTD, gradient_BTD, x_BTD, mixture.gate)
    for one, other in zip(gate_gradients, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert x_gradient.any()  # through the gate
    assert not torch.allclose(x_gradient, whole_gradient)


def test_row_by_row_some_answered_and_some_did_not() -> None:
    """Top-1 of two experts, one of which is dead, with no second choice: only the other's rows are changed."""
    swarm = FakeSwarm(make_manifest((2,)))
    swarm.behaviours[UID(0, (0,))] = fails(StatusCode.NOT_FOUND)
    swarm.behaviours[UID(0, (1,))] = Behaviour(after_s=1.0)
    x_BTD, gradient_BTD = random_tensors(3, 2, 8)
    with mixtures(swarm, k=1) as make_mixture:
        mixture = make_mixture(0)
        best_BT = mixture.gate.linear(x_BTD).argmax(dim=-1)
        assert 0 < best_BT.sum() < best_BT.numel()
        y_BTD = mixture(x_BTD)
        torch.autograd.backward(y_BTD, gradient_BTD)
    # Rows of the dead expert were sent to the live one instead, in a separate call.
    assert [call.uids[0].coordinate for call in swarm.called("forward")] == [(0,), (1,), (1,)]
    assert not torch.isclose(y_BTD, x_BTD).all(dim=-1).any()
    assert x_BTD.grad is not None
    assert x_BTD.grad.isfinite().all()


def test_k_larger_than_the_live_experts_uses_those_there_are() -> None:
    swarm = FakeSwarm(make_manifest((3, 3)))
    live = [UID(0, (0, 2)), UID(0, (2, 1))]
    x_BTD, gradient_BTD = random_tensors(0, 2, 4)
    with mixtures(swarm, k=4, k_min=3, live=live) as make_mixture:
        mixture = make_mixture(0)
        y_BTD = mixture(x_BTD)
        torch.autograd.backward(y_BTD, gradient_BTD)
        expected_BTD = local_mixture(swarm, mixture.gate, x_BTD, 9, lambda uid: uid in live)
    torch.testing.assert_close(y_BTD, expected_BTD, rtol=1e-5, atol=1e-5)
    assert sorted(call.uids[0] for call in swarm.called("backward")) == live


def test_no_live_expert_leaves_the_input() -> None:
    swarm = FakeSwarm(make_manifest((3, 3)))
    x_BTD, _ = random_tensors(0, 2, 4)
    with mixtures(swarm, k=4, live=[]) as make_mixture:
        assert torch.equal(make_mixture(0)(x_BTD), x_BTD)
    assert not swarm.calls


def test_without_grad_there_is_the_same_output_and_no_backward() -> None:
    swarm = FakeSwarm(make_manifest((2, 3)))
    x_BTD, _ = random_tensors(0, 2, 4)
    with mixtures(swarm, k=2) as make_mixture:
        mixture = make_mixture(0)
        with torch.no_grad():
            y_BTD = mixture(x_BTD)
        assert not y_BTD.requires_grad
        torch.testing.assert_close(y_BTD, mixture(x_BTD))


def test_experts_and_gate_learn_also_from_an_input_that_needs_no_gradient() -> None:
    swarm = FakeSwarm(make_manifest((2, 3)))
    x_BTD, gradient_BTD = random_tensors(0, 2, 4)
    x_BTD.requires_grad_(False)
    with mixtures(swarm, k=2) as make_mixture:
        mixture = make_mixture(0)
        torch.autograd.backward(mixture(x_BTD), gradient_BTD)
    assert swarm.called("backward")
    forward_rows = {uid: swarm.rows_sent("forward", uid) for uid in swarm.manifest.uids()}
    assert {uid: swarm.rows_sent("backward", uid) for uid in swarm.manifest.uids()} == forward_rows
    assert mixture.gate.linear.weight.grad is not None
    assert mixture.gate.linear.weight.grad.any()


def test_frozen_gate_still_sends_gradients_to_the_experts() -> None:
    swarm = FakeSwarm(make_manifest((4,)))
    x_BTD, gradient_BTD = random_tensors(0, 2, 4)
    with mixtures(swarm, k=2) as make_mixture:
        mixture = make_mixture(0)
        mixture.requires_grad_(False)
        torch.autograd.backward(mixture(x_BTD), gradient_BTD)
    assert swarm.called("backward")
    assert x_BTD.grad is not None
    assert x_BTD.grad.any()


def test_bfloat16_goes_in_and_comes_out() -> None:
    swarm = FakeSwarm(make_manifest((4,)))
    x_BTD, gradient_BTD = random_tensors(0, 2, 4)
    half_BTD = x_BTD.detach().bfloat16().requires_grad_()
    with mixtures(swarm, k=2) as make_mixture:
        mixture = make_mixture(0)
        y_BTD = mixture(half_BTD)
        torch.autograd.backward(y_BTD, gradient_BTD.bfloat16())
        expected_BTD = mixture(half_BTD.detach().float())
    assert y_BTD.dtype == torch.bfloat16
    assert half_BTD.grad is not None
    assert half_BTD.grad.dtype == torch.bfloat16
    torch.testing.assert_close(y_BTD.float(), expected_BTD, rtol=0.02, atol=0.02)


def test_who_copies_or_pickles_a_mixture_is_told_what_to_save() -> None:
    swarm = FakeSwarm(make_manifest((3,)))
    with mixtures(swarm, k=2) as make_mixture:
        model = nn.Sequential(make_mixture(0))
        for keep in (deepcopy, lambda model: torch.save(model, BytesIO())):
            with pytest.raises(TypeError, match=r"save `state_dict\(\)`"):
                keep(model)


def test_the_state_holds_only_the_gate_and_the_biases() -> None:
    swarm = FakeSwarm(make_manifest((2, 3)))
    with mixtures(swarm, k=2) as make_mixture:
        state = sorted(make_mixture(0).state_dict())
        assert state == [*BALANCE_STATE, "gate.linear.bias", "gate.linear.weight"]


def test_it_works_from_this_thread_with_the_loop_on_its_own(loop: LoopThread) -> None:
    swarm = FakeSwarm(make_manifest((2, 3)))
    dispatcher = Dispatcher(swarm.directory(), swarm, WaitPolicy(60.0, 60.0, 1))
    mixture = RemoteMixtureOfExperts(0, swarm.manifest, dispatcher, loop.run, Routing(k=2))
    assert_equals_local(swarm, mixture, *random_tensors(0, 2, 4))
    loop.run(dispatcher.close())


# Causality


def make_model(swarm: FakeSwarm, make_mixture: Callable[[int], nn.Module]) -> LanguageModel:
    model = LanguageModel(swarm.manifest, make_mixture)
    for mixture in model.mixtures:
        assert isinstance(mixture, RemoteMixtureOfExperts)
        nn.init.normal_(mixture.gate.linear.weight, std=1.0)  # sharp choices: tokens go to different experts
    return model


@pytest.mark.slow
@settings(max_examples=40)
@given(st.data(), grids, st.integers(1, 9), seeds)
def test_a_changed_token_changes_no_logit_before_it(
    data: st.DataObject, grid: tuple[int, ...], peers: int, seed: int
) -> None:
    """This holds even if experts fail, here fewer than k: each row keeps k_min of its own experts.

    If rows were sent elsewhere, the choice would depend on which experts are known to be dead, and a later token may
    have revealed that.
    """
    length, k = 12, 3
    swarm = FakeSwarm(make_manifest(grid, layers=2), peers)
    missing = data.draw(st.sets(st.sampled_from(swarm.manifest.uids()), max_size=k - 1))
    for uid in missing:
        swarm.behaviours[uid] = data.draw(st.sampled_from([fails(StatusCode.NOT_FOUND), SENT_LATE]))
    at = data.draw(st.integers(0, length - 1))
    generator = torch.Generator().manual_seed(seed)
    tokens_BT = torch.randint(256, (2, length), generator=generator)
    changed_BT = tokens_BT.clone()
    changed_BT[0, at] = (changed_BT[0, at] + data.draw(st.integers(1, 255))) % 256
    torch.default_generator.manual_seed(seed % 2**31)
    with mixtures(swarm, k) as make_mixture, torch.no_grad():
        model = make_model(swarm, make_mixture)
        before_BTV, after_BTV = model(tokens_BT), model(changed_BT)
    torch.testing.assert_close(after_BTV[0, :at], before_BTV[0, :at], rtol=0, atol=5e-6)
    torch.testing.assert_close(after_BTV[1], before_BTV[1], rtol=0, atol=5e-6)
    assert not torch.allclose(after_BTV[0, at], before_BTV[0, at], atol=1e-3)


@settings(max_examples=10)
@given(grids, st.integers(1, 11), seeds)
def test_no_logit_before_a_token_has_a_gradient_to_its_embedding(
    grid: tuple[int, ...], at: int, seed: int
) -> None:
    """The same, seen in the backward pass: gradients from experts do not reach later positions either."""
    swarm = FakeSwarm(make_manifest(grid, layers=2))
    tokens_BT = torch.arange(12).view(1, 12)  # each position has an embedding of its own
    torch.default_generator.manual_seed(seed % 2**31)
    with mixtures(swarm, 3) as make_mixture:
        model = make_model(swarm, make_mixture)
        torch.autograd.backward(model(tokens_BT)[0, at - 1].square().sum())
    gradient = model.embedding.weight.grad
    assert gradient is not None
    assert not gradient[at:12].any()
    assert gradient[at - 1].any()


def test_a_later_position_sees_an_earlier_token_through_an_expert() -> None:
    """The blocks do attend: without a local layer, only an expert can carry information from a token to a later
    position.
    """
    swarm = FakeSwarm(make_manifest((2,), layers=1, local_layers=0))
    tokens_BT = torch.zeros(1, 8, dtype=torch.int64)
    changed_BT = tokens_BT.clone()
    changed_BT[0, 2] = 7
    with mixtures(swarm, 2) as make_mixture, torch.no_grad():
        model = make_model(swarm, make_mixture)
        before_BTV, after_BTV = model(tokens_BT), model(changed_BT)
    torch.testing.assert_close(after_BTV[0, :2], before_BTV[0, :2], rtol=0, atol=1e-6)
    assert not torch.isclose(after_BTV[0, 3:], before_BTV[0, 3:], atol=1e-4).all(dim=-1).any()


@pytest.mark.parametrize("layer", ["0", None, 0.0])
def test_a_layer_that_is_no_whole_number_is_refused_with_the_numbers_to_pass(layer: object) -> None:
    swarm = FakeSwarm(make_manifest((4,)))
    with mixtures(swarm, 1) as make_mixture:
        with pytest.raises(TypeError, match=f"a whole number from 0 to 0, and not {layer!r}"):
            make_mixture(layer)  # type: ignore[arg-type]  # what a beginner may pass
        with pytest.raises(SettingsError, match="layer 1: this swarm has layers 0 to 0"):
            make_mixture(1)
        assert make_mixture(np.int64(0)).layer == 0  # type: ignore[arg-type]  # as a loop over an array has it


def test_rebalance_of_something_else_says_what_to_pass() -> None:
    with pytest.raises(TypeError, match=r"pass the model .*, and not None"):
        rebalance(None)  # type: ignore[arg-type]  # what a beginner may pass


@pytest.mark.parametrize(("steps", "steps_between", "warned"), [(12, 1, 0), (24, 11, 2)])
def test_a_loop_that_forgets_to_rebalance_is_warned(steps: int, steps_between: int, warned: int) -> None:
    swarm = FakeSwarm(make_manifest((2, 3)))
    x_BTD, _ = random_tensors(0, 2, 4)
    with mixtures(swarm, 2) as make_mixture:
        mixture = make_mixture(0)
        optimizer = torch.optim.AdamW(mixture.parameters())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for step in range(steps):
                for _ in range(2):  # passes of one step, whose gradients accumulate
                    torch.autograd.backward(mixture(x_BTD).sum())
                optimizer.step()
                if (step + 1) % steps_between == 0:
                    rebalance(mixture)
    said = [str(each.message) for each in caught if "rebalance(model)" in str(each.message)]
    assert len(said) == warned


def test_a_compiled_model_computes_the_mixture_as_it_is() -> None:
    swarm = FakeSwarm(make_manifest((2, 3)))
    x_BTD, gradient_BTD = random_tensors(0, 2, 4)
    torch.default_generator.manual_seed(0)
    with mixtures(swarm, 2) as make_mixture:
        mixture = make_mixture(0)
        mixture.disable_compiling()
        model = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), mixture, nn.Linear(HIDDEN, HIDDEN))
        compiled = torch.compile(model, backend="aot_eager")
        inputs = [x_BTD, *model[0].parameters(), *mixture.gate.parameters()]
        found, expected = (torch.autograd.grad(one(x_BTD), inputs, gradient_BTD) for one in (compiled, model))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
