"""Outputs and gradients of the layer compared with plain torch: every router, both kinds, any subset answering.

The reference computes every expert on its rows with loops, under autograd, and weights their outputs by each router's
own formula. It does not use updates. Narrow experts are computed on the projected rows, and what they add is projected
back.
"""

from collections.abc import Set
from typing import Any, cast, get_args

import numpy as np
import pytest
import torch
from expert_fakes import FakeSwarm, fails, make_manifest
from grpc import StatusCode
from hypothesis import given, settings
from hypothesis import strategies as st
from router_fakes import every_router, k_of, mixtures
from torch import Tensor, nn
from torch.nn import functional as F

from dht.beam_search import Selection
from dht.uid import UID
from peer.choices import Norm
from peer.identity import PeerID
from trainer_client.moe import RemoteMixtureOfExperts
from trainer_client.routers import ROUTERS, Gate
from trainer_client.settings import RouterName

NARROW = {"hidden": 16, "width": 8}

grids = st.sampled_from([(5,), (2, 3), (2, 2, 2)])
seeds = st.integers(0, 2**31 - 1)
kinds = st.sampled_from(["ffn", "transformer"])


def scores_of(gate: Gate, x_RD: Tensor, noise: np.random.Generator | None) -> list[Tensor]:
    """The gate's scores. Noise is added as in Shazeer et al. 2017, equation 4."""
    tables = [x_RD @ w_GD.T + b_G for w_GD, b_G in _parts(gate)]
    if noise is None or gate.noise is None:
        return tables
    spreads = torch.split(x_RD @ gate.noise.weight.T, list(gate.sizes), dim=1)
    return [
        table + torch.from_numpy(noise.standard_normal(table.shape, dtype=np.float32)) * F.softplus(spread)
        for table, spread in zip(tables, spreads, strict=True)
    ]


def _parts(gate: Gate) -> list[tuple[Tensor, Tensor]]:
    sizes = list(gate.sizes)
    return list(
        zip(torch.split(gate.linear.weight, sizes), torch.split(gate.linear.bias, sizes), strict=True)
    )


def logit(swarm: FakeSwarm, scores: list[Tensor], row: int, uid: UID) -> Tensor:
    if not swarm.manifest.routing.product_keys:
        return scores[0][row, swarm.manifest.uids().index(uid)]
    return torch.stack([scores[d][row, x] for d, x in enumerate(uid.coordinate)]).sum()


def experts_of(
    name: RouterName, selection: Selection, missing: Set[UID], again: Selection
) -> list[list[UID]]:
    """The experts that answer each row: the chosen ones that are available; if none is, those chosen among
    the others.
    """
    answering = []
    for row in range(len(selection.valid)):
        chosen = _uids(selection, row)
        there = [uid for uid in chosen if uid not in missing]
        answering.append(there or _uids(again, row))
    return answering


def _uids(selection: Selection, row: int) -> list[UID]:
    return [UID(0, tuple(c)) for c in selection.coordinates[row, selection.valid[row]].tolist()]


def outputs_of(
    swarm: FakeSwarm, x_RD: Tensor, length: int, answering: list[list[UID]], first: list[list[UID]]
) -> dict[tuple[int, UID], Tensor]:
    """Rows that come to an expert later, because another failed, are a separate segment."""
    outputs: dict[tuple[int, UID], Tensor] = {}
    for uid in swarm.manifest.uids():
        for rows in (
            [row for row, uids in enumerate(answering) if uid in uids and uid in first[row]],
            [row for row, uids in enumerate(answering) if uid in uids and uid not in first[row]],
        ):
            if rows:
                sequences = [row // length for row in rows]
                lengths = torch.tensor([sequences.count(b) for b in sorted(set(sequences))])
                positions = torch.tensor([row % length for row in rows])
                found = swarm.block(uid)(x_RD[rows], lengths, positions)
                outputs |= {(row, uid): output for row, output in zip(rows, found, strict=True)}
    return outputs


def mixed(
    name: RouterName,
    swarm: FakeSwarm,
    scores: list[Tensor],
    row: int,
    x_D: Tensor,
    outputs: dict[UID, Tensor],
) -> Tensor:
    """The output for one row, by its router's formula."""
    if not outputs:
        return x_D
    logits = torch.stack([logit(swarm, scores, row, uid) for uid in outputs])
    stacked = torch.stack(list(outputs.values()))
    if name == "switch":
        everyone = torch.stack([logit(swarm, scores, row, uid) for uid in swarm.manifest.uids()])
        weights = logits.exp() / everyone.exp().sum()
    elif name == "base":
        weights = logits.sigmoid()
    else:
        return (logits.softmax(dim=0)[:, None] * stacked).sum(dim=0)
    return x_D + (weights[:, None] * (stacked - x_D)).sum(dim=0)


def reference(
    name: RouterName, swarm: FakeSwarm, mixture: RemoteMixtureOfExperts, x_BTD: Tensor, missing: Set[UID]
) -> Tensor:
    gate, length = mixture.gate, x_BTD.shape[1]
    x_RD = x_BTD.flatten(0, 1)
    rng = np.random.default_rng((0, 0)) if mixture.training else None
    read_RD, sent_RW = narrowed(mixture, x_RD)
    scores = scores_of(gate, read_RD, rng)
    arrays = [table.detach().numpy() for table in scores]
    choose = ROUTERS[name].choose
    selection = choose(arrays, swarm.directory().view.tables(0), mixture.k, rng, None)
    others = swarm.directory(uid for uid in swarm.manifest.uids() if uid not in missing)
    again = choose(arrays, others.view.tables(0), mixture.k, None, None)
    first = [_uids(selection, row) for row in range(len(x_RD))]
    answering = experts_of(name, selection, missing, again)
    outputs = outputs_of(swarm, sent_RW, length, answering, first)
    rows = [
        mixed(name, swarm, scores, row, sent_W, {uid: outputs[row, uid] for uid in answering[row]})
        for row, sent_W in enumerate(sent_RW)
    ]
    y_RD = torch.stack(rows)
    if mixture.projections is not None:
        y_RD = x_RD + (y_RD - sent_RW) @ mixture.projections.up.weight.T
    if mixture.shared is not None:
        norm, up, activation, down = cast(nn.Sequential, mixture.shared)
        y_RD = y_RD + down(activation(up(norm(x_RD))))
    return y_RD.view_as(x_BTD)


def narrowed(mixture: RemoteMixtureOfExperts, x_RD: Tensor) -> tuple[Tensor, Tensor]:
    """What the gate reads [R, D], and what is sent to experts [R, W]."""
    if mixture.projections is None:
        return x_RD, x_RD
    norm = mixture.projections.norm
    assert isinstance(norm, nn.LayerNorm | nn.RMSNorm)
    centred_RD = x_RD - x_RD.mean(dim=1, keepdim=True) if isinstance(norm, nn.LayerNorm) else x_RD
    h_RD = centred_RD / (centred_RD.square().mean(dim=1, keepdim=True) + 1e-5).sqrt() * norm.weight
    if isinstance(norm, nn.LayerNorm):
        h_RD = h_RD + norm.bias
    return h_RD, h_RD @ mixture.projections.down.weight.T


def check(name: RouterName, swarm: FakeSwarm, seed: int, missing: Set[UID], training: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden = swarm.manifest.model.hidden
    x_BTD, gradient_BTD = torch.randn(2, 2, 4, hidden, generator=generator).unbind()
    x_BTD.requires_grad_()
    with mixtures(swarm, name, expert_dropout=0.0) as make_mixture:
        torch.default_generator.manual_seed(seed)
        mixture = make_mixture(0).train(training)
        for parameter in mixture.parameters():
            nn.init.normal_(parameter, std=0.5)
        inputs = [x_BTD, *mixture.parameters()]
        y_BTD = mixture(x_BTD)
        found = torch.autograd.grad(y_BTD, inputs, gradient_BTD, materialize_grads=True)
        expected_BTD = reference(name, swarm, mixture, x_BTD, missing)
        expected = torch.autograd.grad(expected_BTD, inputs, gradient_BTD, materialize_grads=True)
    torch.testing.assert_close(y_BTD, expected_BTD, rtol=1e-5, atol=1e-5)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@every_router
@settings(max_examples=6)
@given(kind=kinds, grid=grids, seed=seeds, training=st.booleans(), product_keys=st.booleans())
def test_with_all_experts_answering_gradients_are_those_of_local_ones(
    name: RouterName, kind: str, grid: tuple[int, ...], seed: int, training: bool, product_keys: bool
) -> None:
    swarm = FakeSwarm(make_manifest(grid, kind=kind, product_keys=product_keys), peers=3)
    check(name, swarm, seed, frozenset(), training)


@every_router
@settings(max_examples=8)
@given(
    data=st.data(),
    kind=kinds,
    grid=grids,
    seed=seeds,
    peers=st.sampled_from([1, 2, 9]),
    product_keys=st.booleans(),
)
def test_with_any_subset_answering_gradients_are_those_of_the_rest(
    name: RouterName,
    kind: str,
    data: st.DataObject,
    grid: tuple[int, ...],
    seed: int,
    peers: int,
    product_keys: bool,
) -> None:
    """Fewer than k experts fail, so that no row is sent elsewhere. Or, where each row has one expert, one fails, and
    its rows go to their next best in one further call.
    """
    swarm = FakeSwarm(make_manifest(grid, kind=kind, product_keys=product_keys), peers)
    uids = swarm.manifest.uids()
    most = max(1, k_of(name) - 1)
    missing = data.draw(st.sets(st.sampled_from(uids), min_size=1, max_size=most))
    swarm.behaviours |= dict.fromkeys(missing, fails(StatusCode.NOT_FOUND))
    check(name, swarm, seed, missing, training=False)


@every_router
@settings(max_examples=6)
@given(
    data=st.data(),
    kind=kinds,
    grid=grids,
    seed=seeds,
    norm=st.sampled_from(get_args(Norm)),
    shared=st.sampled_from([0, 8]),
    fail=st.booleans(),
    training=st.booleans(),
)
def test_narrow_experts_are_projected_to_and_back(
    name: RouterName,
    kind: str,
    data: st.DataObject,
    grid: tuple[int, ...],
    seed: int,
    norm: Norm,
    shared: int,
    fail: bool,
    training: bool,
) -> None:
    """The gradients of norm, projections, gate and shared expert are compared too, with all or any subset answering."""
    sizes: dict[str, Any] = NARROW | {"norm": norm, "shared_feed_forward": shared}
    swarm = FakeSwarm(make_manifest(grid, kind=kind, **sizes), peers=data.draw(st.sampled_from([2, 9])))
    missing = frozenset[UID]()
    if fail:
        uids, most = swarm.manifest.uids(), max(1, k_of(name) - 1)
        missing = frozenset(data.draw(st.sets(st.sampled_from(uids), min_size=1, max_size=most)))
        swarm.behaviours |= dict.fromkeys(missing, fails(StatusCode.NOT_FOUND))
    check(name, swarm, seed, missing, training and not fail)


@settings(max_examples=40)
@given(data=st.data(), peers=st.integers(1, 6), seed=seeds, of_node=st.booleans())
def test_what_fails_in_backward_is_left_out_of_the_gradients_and_nothing_else(
    data: st.DataObject, peers: int, seed: int, of_node: bool
) -> None:
    """Single experts or whole nodes fail. A failed node's answer S and its weight are known, so the gate learns from
    them; how the node's experts share in S it learns only from those that answered.
    """
    swarm = FakeSwarm(make_manifest((6,), kind="ffn"), peers)
    uids = swarm.manifest.uids()
    choices: list[UID | PeerID] = [*swarm.peer_of.values()] if of_node else [*uids]
    failing = data.draw(st.sets(st.sampled_from(choices)))
    generator = torch.Generator().manual_seed(seed)
    x_RD, gradient_RD = torch.randn(2, 5, 8, generator=generator).unbind()
    x_RD.requires_grad_()
    with mixtures(swarm, "product-key") as make_mixture:
        mixture = make_mixture(0)
        nn.init.normal_(mixture.gate.linear.weight, generator=generator)
        y_RD = mixture(x_RD)
        swarm.behaviours |= dict.fromkeys(failing, fails(StatusCode.NOT_FOUND))
        inputs = [x_RD, *mixture.parameters()]
        found = torch.autograd.grad(y_RD, inputs, gradient_RD, materialize_grads=True)
        (logits_RE,) = mixture.gate(x_RD)
        rows = []
        for row, logits_E in enumerate(logits_RE):
            logits, chosen = logits_E.topk(mixture.k)
            weights = logits.softmax(dim=0)
            total = x_RD[row]
            for peer in set(swarm.peer_of.values()):
                here = [i for i, e in enumerate(chosen.tolist()) if swarm.peer_of[uids[e]] == peer]
                if not here:
                    continue
                f = {i: update_of(swarm, uids[int(chosen[i])], x_RD[row]) for i in here}
                shares = (weights[here] / weights[here].sum()).detach()
                s = sum((p * f[i] for p, i in zip(shares, here, strict=True)), torch.zeros(8)).detach()
                answer = s
                for p, i in zip(shares, here, strict=True):
                    if not {uids[int(chosen[i])], peer} & failing:
                        answer = answer + p * (f[i] - f[i].detach())
                        answer = answer + p * (f[i].detach() - s) * (logits[i] - logits[i].detach())
                total = total + weights[here].sum() * answer
            rows.append(total)
        expected_RD = torch.stack(rows)
        expected = torch.autograd.grad(expected_RD, inputs, gradient_RD, materialize_grads=True)
    torch.testing.assert_close(y_RD, expected_RD, rtol=1e-5, atol=1e-5)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def update_of(swarm: FakeSwarm, uid: UID, x_D: Tensor) -> Tensor:
    one = torch.ones(1, dtype=torch.int64)
    output: Tensor = swarm.block(uid)(x_D[None], one, one - 1)[0]
    return output - x_D
