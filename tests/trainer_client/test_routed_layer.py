"""The mixture layer with each router: formulas, randomness, failures, causality. Real blocks, no network."""

from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from expert_fakes import FakeSwarm, fails, make_manifest, make_peer_id, send_to_best, virtual_time
from grpc import StatusCode
from hypothesis import given, settings
from hypothesis import strategies as st
from router_fakes import BALANCE_STATE, every_kind, every_router, k_of, mixtures
from torch import Tensor, nn
from torch.nn import functional as F

from dht.beam_search import Selection
from dht.uid import UID
from peer.identity import PeerID
from peer.metrics import total
from trainer_client.dispatch.batches import CallReply, ExpertReply, NodeCall, RoutedRows, Segments
from trainer_client.dispatch.dispatcher import Dispatcher
from trainer_client.dispatch.policy import WaitPolicy
from trainer_client.model import LanguageModel
from trainer_client.moe import RemoteMixtureOfExperts
from trainer_client.routers import Routing
from trainer_client.settings import RouterName

HIDDEN = 8

grids = st.sampled_from([(5,), (2, 3), (2, 2, 2)])


def random_rows(sequences: int, length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sequences, length, HIDDEN, generator=generator).requires_grad_()


def sharpen(mixture: RemoteMixtureOfExperts) -> RemoteMixtureOfExperts:
    """Makes tokens go to different experts, by a wide margin."""
    nn.init.normal_(mixture.gate.linear.weight, std=1.0)
    return mixture


def outputs_of_all(swarm: FakeSwarm, x_D: Tensor) -> Tensor:
    """The outputs of all experts of a one-dimensional grid for a sequence of one token. (experts, D)"""
    one = torch.ones(1, dtype=torch.int64)
    return torch.cat(
        [swarm.block(uid)(x_D[None], one, torch.zeros_like(one)) for uid in swarm.manifest.uids()]
    )


# Formulas


def one_token(name: RouterName, training: bool, **routing: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For 12 sequences of one token: the layer's outputs [12, D], the gate's logits [12, 5], all experts' outputs, and
    the inputs.
    """
    swarm = FakeSwarm(make_manifest((5,)))
    x_BTD = random_rows(12, 1)
    with mixtures(swarm, name, **routing) as make_mixture:
        mixture = sharpen(make_mixture(0)).train(training)
        y_BTD = mixture(x_BTD)
        (logits,) = mixture.gate(x_BTD[:, 0])
    outputs = torch.stack([outputs_of_all(swarm, x_D) for x_D in x_BTD[:, 0]])
    return y_BTD[:, 0], logits, outputs, x_BTD[:, 0]


def test_switch_adds_the_best_experts_part_weighed_by_its_probability() -> None:
    """y = x + p_i(x) (E_i(x) - x): experts include the residual connection. In evaluation no row is dropped."""
    y, logits, outputs, x = one_token("switch", training=False)
    p, best = logits.softmax(dim=1).max(dim=1)
    expected = x + p[:, None] * (outputs[torch.arange(12), best] - x)
    torch.testing.assert_close(y, expected)


def test_base_adds_the_best_experts_part_weighed_by_a_sigmoid_in_evaluation() -> None:
    y, logits, outputs, x = one_token("base", training=False)
    highest, best = logits.max(dim=1)
    expected = x + highest.sigmoid()[:, None] * (outputs[torch.arange(12), best] - x)
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("name", ["glam", "noisy-top-k"])
def test_top_2_routers_mix_two_experts_by_their_renormalised_softmax_in_evaluation(name: RouterName) -> None:
    y, logits, outputs, _ = one_token(name, training=False)
    top = logits.topk(2, dim=1)
    chosen = outputs[torch.arange(12)[:, None], top.indices]
    torch.testing.assert_close(y, (top.values.softmax(dim=1)[:, :, None] * chosen).sum(dim=1))


def test_switch_drops_some_of_what_experts_add_and_scales_the_rest() -> None:
    y, logits, outputs, x = one_token("switch", training=True, expert_dropout=0.5)
    p, best = logits.softmax(dim=1).max(dim=1)
    added = p[:, None] * (outputs[torch.arange(12), best] - x)
    dropped = torch.isclose(y, x, rtol=1e-4, atol=1e-6)
    doubled = torch.isclose(y - x, 2 * added, rtol=1e-3, atol=1e-5)
    assert (dropped | doubled).all()
    assert 0.3 < dropped.float().mean() < 0.7


# Randomness


@every_router
def test_evaluation_has_no_chance_in_it(name: RouterName) -> None:
    swarm = FakeSwarm(make_manifest((2, 3)))
    x_BTD = random_rows(2, 6)
    with mixtures(swarm, name) as make_mixture:
        mixture = sharpen(make_mixture(0)).eval()
        torch.testing.assert_close(mixture(x_BTD), mixture(x_BTD), rtol=0, atol=0)
        assert mixture.routed is None


@every_router
def test_training_follows_from_the_seed(name: RouterName) -> None:
    swarm = FakeSwarm(make_manifest((2, 3)))
    x_BTD = random_rows(4, 8)

    def outputs(seed: int) -> Tensor:
        torch.default_generator.manual_seed(0)
        with mixtures(swarm, name, seed=seed) as make_mixture:
            mixture = sharpen(make_mixture(0))
            return torch.stack([mixture(x_BTD), mixture(x_BTD)])

    first = outputs(1)
    torch.testing.assert_close(outputs(1), first, rtol=0, atol=0)
    has_chance = name in {"noisy-top-k", "switch"}
    assert torch.equal(outputs(2), first) != has_chance
    assert torch.equal(first[0], first[1]) != has_chance


def test_noise_weighs_the_experts_by_the_scores_that_chose_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The noise overrules the gate here: expert 4 gets nearly all of the weight, not only a place among the two."""
    monkeypatch.setattr(
        "trainer_client.moe.noisy_scores",
        lambda scores, spreads, rng: (scores[0] + 50 * F.one_hot(torch.tensor(4), 5),),
    )
    y, _, outputs, _ = one_token("noisy-top-k", training=True)
    torch.testing.assert_close(y, outputs[:, 4])


def test_a_sequence_that_is_routed_as_one_stays_together_under_noise_and_chance() -> None:
    swarm = FakeSwarm(make_manifest((9,)))
    with mixtures(swarm, "noisy-top-k", choose_by="sequence") as make_mixture:
        make_mixture(0)(random_rows(6, 4))
    assert {n for call in swarm.called("forward") for n in call.batch.lengths.tolist()} == {4}


def test_base_balances_whole_sequences_when_they_are_routed_as_one() -> None:
    swarm = FakeSwarm(make_manifest((3,)))
    with mixtures(swarm, "base", choose_by="sequence") as make_mixture:
        make_mixture(0)(random_rows(6, 4))
    assert [swarm.rows_sent("forward", uid) for uid in swarm.manifest.uids()] == [8, 8, 8]


# The gate


def test_gate_of_switch_starts_smaller() -> None:
    hidden = 4096
    with mixtures(FakeSwarm(make_manifest((4, 4), hidden=hidden)), "switch", gate_scale=0.1) as make_mixture:
        weight, bias = (p.detach() for p in make_mixture(0).gate.linear.parameters())
    # A normal distribution that is cut off at two standard deviations has 0.88 of the spread.
    assert weight.std().item() == pytest.approx(0.88 * (0.1 / hidden) ** 0.5, rel=0.02)
    assert weight.abs().max() <= 2 * (0.1 / hidden) ** 0.5
    assert not bias.any()


@every_router
def test_gate_and_weights_compute_in_float32_in_a_bfloat16_model(name: RouterName) -> None:
    swarm = FakeSwarm(make_manifest((5,)))
    x_BTD = random_rows(2, 6).detach().bfloat16()
    with mixtures(swarm, name) as make_mixture:
        mixture = make_mixture(0).bfloat16()
        (scores,) = mixture.gate(x_BTD.flatten(0, 1))
        y_BTD = mixture(x_BTD)
        torch.autograd.backward(y_BTD.float().square().sum())
    weight = mixture.gate.linear.weight
    assert weight.dtype == y_BTD.dtype == torch.bfloat16
    exact = x_BTD.flatten(0, 1).double() @ weight.double().T + mixture.gate.linear.bias.double()
    torch.testing.assert_close(scores.double(), exact, rtol=1e-5, atol=1e-5)
    assert weight.grad is not None
    assert weight.grad.isfinite().all()


@every_router
def test_the_state_is_the_gates_and_the_biases(name: RouterName) -> None:
    expected = ["gate.linear.bias", "gate.linear.weight"]
    if name == "product-key":
        expected = [*BALANCE_STATE, *expected]
    if name == "noisy-top-k":
        expected.append("gate.noise.weight")
    with mixtures(FakeSwarm(make_manifest((2, 3))), name) as make_mixture:
        assert sorted(make_mixture(0).state_dict()) == expected


@every_router
def test_narrow_experts_leave_the_gate_as_it_starts(name: RouterName) -> None:
    """All trainers' projections start with equal parameters, too."""
    states = []
    for width in (None, 8, 8):
        swarm = FakeSwarm(make_manifest((2, 3), hidden=16, width=width))
        with mixtures(swarm, name) as make_mixture:
            states.append(LanguageModel(swarm.manifest, make_mixture).state_dict())
    wide, narrow, again = states
    more = {f"mixtures.0.projections.{part}.weight" for part in ("norm", "down", "up")}
    assert set(narrow) == set(wide) | more | {"mixtures.0.projections.norm.bias"}
    assert all(torch.equal(narrow[key], wide[key]) for key in wide)
    assert all(torch.equal(narrow[key], again[key]) for key in narrow)


def test_narrow_experts_receive_and_answer_rows_of_their_width() -> None:
    swarm = FakeSwarm(make_manifest((2, 3), hidden=16, width=8))
    x_BTD = torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(0))
    with mixtures(swarm, "product-key") as make_mixture:
        y_BTD = make_mixture(0)(x_BTD)
        torch.autograd.backward(y_BTD.square().sum())
    assert y_BTD.shape == x_BTD.shape
    assert {call.made.inputs.shape[1] for call in swarm.calls} == {8}


@every_router
def test_narrow_experts_work_in_a_bfloat16_model_and_under_autocast(name: RouterName) -> None:
    swarm = FakeSwarm(make_manifest((5,), hidden=16, width=8, shared_feed_forward=8))
    x_BTD = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0))
    with mixtures(swarm, name) as make_mixture:
        mixture = make_mixture(0).eval()
        exact = mixture(x_BTD)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(mixture(x_BTD), exact, rtol=1e-6, atol=1e-6)
        rounded = mixture.bfloat16()(x_BTD.bfloat16())
        torch.autograd.backward(rounded.float().square().sum())
    assert rounded.dtype == torch.bfloat16
    gradients = [
        parameter.grad for name, parameter in mixture.named_parameters() if not name.startswith("gate.")
    ]
    assert len(gradients) == 10
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


# Failures


@every_router
def test_rows_of_an_expert_that_fails_go_to_their_next_best(name: RouterName) -> None:
    swarm = FakeSwarm(make_manifest((5,)))
    dead = UID(0, (2,))
    swarm.behaviours[dead] = fails(StatusCode.NOT_FOUND)
    x_BTD = random_rows(4, 8)
    with mixtures(swarm, name, expert_dropout=0.0) as make_mixture:
        mixture = sharpen(make_mixture(0))
        y_BTD = mixture(x_BTD)
        torch.autograd.backward(y_BTD.square().sum())
    assert swarm.rows_sent("forward", dead)
    assert not torch.isclose(y_BTD, x_BTD).all(dim=-1).any()
    assert mixture.gate.linear.weight.grad is not None
    assert mixture.gate.linear.weight.grad.isfinite().all()


def test_where_a_chosen_expert_has_gone_since_its_rows_alone_choose_again() -> None:
    swarm = FakeSwarm(make_manifest((4,)))
    scores = [np.tile(np.array([[0.0, 1.0, 2.0, 3.0]], np.float32), (6, 1))]
    chosen = np.array([0, 2, 1, 2, 0, 1]).reshape(6, 1, 1)  # not one row's best
    selection = Selection(chosen, np.zeros((6, 1), np.float32), np.ones((6, 1), np.bool_))
    rows = RoutedRows(0, (4,), np.ones((6, HIDDEN), np.float32), scores, 1, Segments.whole(2, 3), keep=False)
    with virtual_time() as runner:
        directory = swarm.directory()
        dispatcher = Dispatcher(directory, swarm, WaitPolicy(10.0, 0.0, 1), clock=runner.get_loop().time)
        live = runner.run(dispatcher.find(0, scores, 1))
        there = runner.run(dispatcher.send(rows, selection, live))
        directory.view = swarm.directory([UID(0, (number,)) for number in (0, 1, 3)]).view
        gone = runner.run(dispatcher.send(rows, selection, live))
        assert runner.run(dispatcher.find(0, scores, 1)).tables[-1].tolist() == [True, True, False, True]
    assert there.coordinates.flatten().tolist() == [0, 2, 1, 2, 0, 1]
    assert gone.coordinates.flatten().tolist() == [0, 3, 1, 3, 0, 1]
    assert there.answered.all()
    assert gone.answered.all()
    assert total(dispatcher.metrics.reselected_rows) == 2


# Causality


@every_router
@every_kind
@settings(max_examples=9, deadline=None)
@given(
    data=st.data(),
    prefix=st.sampled_from([0, 1, 5]),
    grid=grids,
    seed=st.integers(0, 2**31 - 1),
    width=st.sampled_from([16, 8]),
    local=st.sampled_from(["layer", "attention"]),
    local_layers=st.integers(0, 1),
)
def test_a_changed_token_changes_no_logit_that_is_scored_before_it(
    name: RouterName,
    kind: str,
    data: st.DataObject,
    prefix: int,
    grid: tuple[int, ...],
    seed: int,
    width: int,
    local: str,
    local_layers: int,
) -> None:
    """Tested per token, and per sequence by a prefix, with wide and narrow experts, and after every kind of local part.

    It holds in evaluation, where losses are scored. In training `base` is not causal: the expert of a row depends on
    all rows' scores, including later ones, since that is what balancing them together means.
    """
    length = 12
    sizes: dict[str, Any] = {"hidden": 16, "layers": 2, "local": local, "local_layers": local_layers}
    sizes["shared_feed_forward"] = 16 - width
    swarm = FakeSwarm(make_manifest(grid, kind=kind, prefix=prefix, width=width, **sizes), peers=3)
    if k_of(name) > 1:
        swarm.behaviours[swarm.manifest.uids()[seed % 4]] = fails(StatusCode.NOT_FOUND)
    at = data.draw(st.integers(0, length - 1))
    tokens_BT = torch.randint(256, (2, length), generator=torch.Generator().manual_seed(seed))
    changed_BT = tokens_BT.clone()
    changed_BT[0, at] = (changed_BT[0, at] + data.draw(st.integers(1, 255))) % 256
    torch.default_generator.manual_seed(seed)
    choose_by: Literal["token", "sequence"] = "sequence" if prefix else "token"
    with mixtures(swarm, name, choose_by, routing_prefix=prefix) as make_mixture, torch.no_grad():
        model = LanguageModel(swarm.manifest, lambda layer: sharpen(make_mixture(layer))).eval()
        before_BTV, after_BTV = model(tokens_BT), model(changed_BT)
    # The logit of a position predicts the next token.
    scored = slice(model.first_scored - 1, at)
    torch.testing.assert_close(after_BTV[0, scored], before_BTV[0, scored], rtol=0, atol=1e-5)
    torch.testing.assert_close(after_BTV[1], before_BTV[1], rtol=0, atol=1e-5)
    assert not torch.allclose(after_BTV[0, at], before_BTV[0, at], atol=1e-3)


@every_router
def test_within_its_prefix_and_by_the_whole_a_sequence_does_tell_of_later_tokens(name: RouterName) -> None:
    """The exceptions of the test above are real."""
    swarm = FakeSwarm(make_manifest((5,)))
    x_BTD = random_rows(1, 8).detach()
    for prefix, seen in ((4, 3), (0, 7)):
        changed_BTD = x_BTD.clone()
        changed_BTD[0, seen] += 5
        with mixtures(swarm, name, "sequence", routing_prefix=prefix) as make_mixture, torch.no_grad():
            mixture = sharpen(make_mixture(0)).eval()
            assert not torch.allclose(mixture(changed_BTD)[0, 0], mixture(x_BTD)[0, 0], atol=1e-3)


@pytest.mark.parametrize("name", ["product-key", "switch", "glam"])
def test_choices_in_training_are_causal_too(name: RouterName) -> None:
    """noisy-top-k is causal as well, but its noise differs between two passes."""
    swarm = FakeSwarm(make_manifest((2, 3)))
    x_BTD = random_rows(1, 8).detach()
    changed_BTD = x_BTD.clone()
    changed_BTD[0, 5:] += 1
    with mixtures(swarm, name, expert_dropout=0.0) as make_mixture:
        mixture = sharpen(make_mixture(0))
        torch.testing.assert_close(mixture(changed_BTD)[0, :5], mixture(x_BTD)[0, :5], rtol=0, atol=1e-6)


def test_base_does_see_other_rows_in_training() -> None:
    """The exception of the test above is real: the rows of one batch compete."""
    swarm = FakeSwarm(make_manifest((3,)))
    x_BTD = random_rows(1, 9).detach()
    torch.default_generator.manual_seed(0)
    with mixtures(swarm, "base") as make_mixture:
        mixture = sharpen(make_mixture(0))
        together = mixture(x_BTD)
        alone = torch.cat([mixture(x_BTD[:, :3]), mixture(x_BTD[:, :6])[:, 3:]], dim=1)
    assert not torch.allclose(together[:, :6], alone)


# Few nodes


@settings(max_examples=15, deadline=None)
@given(grids, st.integers(1, 6), st.integers(0, 2**31 - 1), st.integers(0, 11), st.booleans())
def test_under_a_limit_tokens_go_to_few_nodes_and_the_model_stays_causal(
    grid: tuple[int, ...], peers: int, seed: int, at: int, replicated: bool
) -> None:
    """This holds for any replicas, since the replica to be called is chosen before the experts are."""
    swarm = FakeSwarm(make_manifest(grid, hidden=16, layers=2), peers)
    tokens_BT = torch.randint(256, (2, 12), generator=torch.Generator().manual_seed(seed))
    changed_BT = tokens_BT.clone()
    changed_BT[0, at] = (changed_BT[0, at] + 1) % 256
    more_hosts = [make_peer_id(9)] * replicated
    outputs = []
    for tokens in (tokens_BT, changed_BT):
        swarm.calls.clear()
        with limited_mixtures(swarm, more_hosts) as make_mixture, torch.no_grad():
            torch.default_generator.manual_seed(seed)
            model = LanguageModel(swarm.manifest, lambda layer: sharpen(make_mixture(layer))).eval()
            outputs.append(model(tokens))
        for layer in range(2):
            calls = [call for call in swarm.calls if call.uids[0].layer == layer]
            nodes = np.bincount(np.concatenate([call.batch.rows for call in calls]), minlength=24)
            counts = Counter(peer for uid, peer in swarm.peer_of.items() if uid.layer == layer)
            have_three = sum(sorted(counts.values())[:2]) >= 3 and not replicated
            assert 1 <= nodes.min() <= nodes.max() <= (2 if have_three or peers <= 2 - replicated else 3)
    before_BTV, after_BTV = outputs
    torch.testing.assert_close(after_BTV[0, :at], before_BTV[0, :at], rtol=0, atol=1e-5)
    torch.testing.assert_close(after_BTV[1], before_BTV[1], rtol=0, atol=1e-5)


@contextmanager
def limited_mixtures(
    swarm: FakeSwarm, more_hosts: list[PeerID]
) -> Iterator[Callable[[int], RemoteMixtureOfExperts]]:
    routing = Routing(k=3, nodes_per_token=2)
    with virtual_time() as runner:
        directory, clock = swarm.directory(more_hosts=more_hosts), runner.get_loop().time
        dispatcher = Dispatcher(directory, swarm, WaitPolicy(10.0, 0.0, 1), clock=clock)
        yield lambda layer: RemoteMixtureOfExperts(layer, swarm.manifest, dispatcher, runner.run, routing)
        runner.run(dispatcher.close())


# The guard


class GuardedSwarm(FakeSwarm):
    """A swarm whose second expert skips its update, and whose third also returns to its last good state."""

    async def call(self, call: NodeCall) -> AsyncGenerator[CallReply, None]:
        async for reply in super().call(call):
            if call.direction == "backward" and isinstance(reply, ExpertReply):
                (number,) = reply.uid.coordinate
                reply = replace(reply, skipped_update=number > 0, rolled_back=number > 1)
            yield reply


def test_what_experts_guards_did_is_counted() -> None:
    swarm = GuardedSwarm(make_manifest((3,)))
    with virtual_time() as runner:
        clock = runner.get_loop().time
        dispatcher = Dispatcher(swarm.directory(), swarm, WaitPolicy(10.0, 0.0, 1), clock=clock)
        scores = [np.zeros((4, 3), np.float32)]
        result = runner.run(send_to_best(dispatcher, np.ones((4, HIDDEN), np.float32), scores, 3, 4))
        runner.run(dispatcher.send_back(result, np.ones_like(result.updates)))
    assert (total(dispatcher.metrics.skipped_updates), total(dispatcher.metrics.rollbacks)) == (2, 1)
