"""Local mode compared with a swarm of the same experts, and what it does without any swarm."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import get_args

import numpy as np
import pytest
import torch
from byte_texts import byte_dataset
from expert_fakes import make_manifest
from hypothesis import given
from hypothesis import strategies as st
from router_fakes import LearningSwarm, k_of, mixtures
from torch import Tensor, nn

from dht.manifest import Manifest, WireSpec
from dht.uid import UID
from expert_server.experts.graphs import Rows, SharedGraph, SharedPass
from expert_server.experts.grouped import MOST_EXPERTS, MOST_ROWS
from expert_server.serving.batching import WorkItem
from peer.codec import CodecName
from peer.errors import SettingsError
from peer.metrics import total
from talkoot.train.local import LocalSwarm, groups_of
from trainer_client.model import LanguageModel
from trainer_client.settings import RouterName, TrainerSettings
from trainer_client.training.loop import Training
from trainer_client.training.record import Validation

TEXT = b"In the sauna one must behave as in church. " * 60
MANIFEST = make_manifest((2, 3), k=3, layers=2, hidden=16, feed_forward=32)
NARROW = make_manifest((2, 3), k=3, layers=2, hidden=16, feed_forward=32, width=8, local="attention")


def losses(make_mixture: Callable[[int], nn.Module], manifest: Manifest = MANIFEST) -> list[float]:
    model = LanguageModel(manifest, make_mixture)
    data = byte_dataset(TEXT, 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    found = []
    for step in range(8):
        loss = model.loss(data.batch(step, 4))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        found.append(loss.item())
    return found


def local(name: RouterName = "product-key", seed: int = 0, manifest: Manifest = MANIFEST) -> LocalSwarm:
    return LocalSwarm(manifest, TrainerSettings(router=name, top_k=k_of(name), seed=seed))


QUICK = {"product-key-wide", "product-key-narrow", "noisy-top-k-wide", "base-wide"}
"""The other routers choose as product keys do, and how wide experts are is nothing to a router."""
WIDE_AND_NARROW = [
    pytest.param(name, manifest, id=case, marks=() if case in QUICK else pytest.mark.slow)
    for width, manifest in (("wide", MANIFEST), ("narrow", NARROW))
    for name in get_args(RouterName)
    for case in [f"{name}-{width}"]
]


@pytest.mark.parametrize(("name", "manifest"), WIDE_AND_NARROW)
def test_a_model_learns_the_same_locally_and_in_a_swarm(name: RouterName, manifest: Manifest) -> None:
    swarm, here = LearningSwarm(manifest), local(name, manifest=manifest)
    with mixtures(swarm, name) as make_mixture:
        expected = losses(make_mixture, manifest)
    found = losses(here.mixture, manifest)
    assert found == pytest.approx(expected, rel=1e-4)
    assert found[-1] < found[0] - 0.5
    updates = {uid: expert.update_count for uid, expert in here.dispatcher.experts.items()}
    assert updates == {uid: expert.update_count for uid, expert in swarm.experts.items()}
    assert sum(updates.values()) >= 8
    for uid, expert in here.dispatcher.experts.items():
        for one, other in zip(expert.block.parameters(), swarm.experts[uid].block.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_a_manifest_with_a_prefix_routes_whole_sequences_by_it() -> None:
    manifest = make_manifest((2, 3), k=3, layers=2, hidden=16, feed_forward=32, prefix=6)
    swarm, here = LearningSwarm(manifest), LocalSwarm(manifest, TrainerSettings())
    with mixtures(swarm, "product-key", "sequence", routing_prefix=6) as make_mixture:
        expected = losses(make_mixture, manifest)
    found = losses(here.mixture, manifest)
    assert found == pytest.approx(expected, rel=1e-4)
    assert found[-1] < found[0] - 0.5
    # All 16 tokens of a sequence go to the same experts.
    assert {n for call in swarm.called("forward") for n in call.batch.lengths.tolist()} == {16}


@pytest.mark.parametrize("codec", ["bf16", "int8", "int4"])
def test_what_would_travel_is_rounded_by_the_codec_of_the_manifest(codec: CodecName) -> None:
    manifest = MANIFEST.model_copy(update={"wire": WireSpec(codec=codec)})
    here, fp32 = (LocalSwarm(one, TrainerSettings()) for one in (manifest, MANIFEST))
    coded, uncoded = here.mixture(0), fp32.mixture(0)
    uncoded.load_state_dict(coded.state_dict())
    x = torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    exact = x.detach().clone().requires_grad_()
    found, expected = coded(x), uncoded(exact)
    torch.autograd.backward([found.square().sum(), expected.square().sum()])
    assert x.grad is not None
    assert exact.grad is not None
    # A row and its gradient also flow around the experts, where nothing is rounded.
    updates = (found - x, expected - exact)
    gradients = (x.grad - 2 * found, exact.grad - 2 * expected)
    for one, other in (updates, gradients):
        off = ((one - other).norm() / other.norm()).item()
        assert 1e-3 < off / {"bf16": 1, "int8": 3, "int4": 50}[codec] < 1e-2
    assert losses(here.mixture, manifest)[-1] < 5


def test_numbers_that_the_codec_refuses_are_counted_as_a_nodes_refusal() -> None:
    manifest = MANIFEST.model_copy(update={"wire": WireSpec(codec="int8")})
    here = LocalSwarm(manifest, TrainerSettings())
    x = torch.ones(1, 2, 16)
    x[0, 1, 3] = torch.inf
    here.mixture(0)(x)
    assert set(here.dispatcher.metrics.failures_by_cause()) == {"invalid_argument"}


def test_it_is_a_function_of_its_seed() -> None:
    first = losses(local("noisy-top-k", seed=1).mixture)
    assert losses(local("noisy-top-k", seed=1).mixture) == first
    assert losses(local("noisy-top-k", seed=2).mixture) != first


def test_autocast_at_the_trainer_leaves_experts_in_float32() -> None:
    x = torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(0))
    mixture = local().mixture(0)
    with torch.no_grad():
        expected = mixture(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = mixture(x)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_without_gradients_no_expert_steps() -> None:
    here = local()
    with torch.no_grad():
        here.mixture(0)(torch.ones(2, 4, 16))
    assert not any(expert.update_count for expert in here.dispatcher.experts.values())


def test_an_expert_that_is_not_finite_leaves_its_rows_to_the_others_and_is_counted() -> None:
    here = local("switch")
    for expert in here.dispatcher.experts.values():
        expert.guard.check = lambda: True  # type: ignore[method-assign]  # which would heal it
    with torch.no_grad():
        next(here.dispatcher.experts[UID(0, (0, 0))].block.parameters()).fill_(torch.nan)
    x = torch.randn(4, 8, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    mixture = here.mixture(0)
    nn.init.normal_(mixture.gate.linear.weight, std=1.0, generator=torch.Generator().manual_seed(0))
    y = mixture(x)
    torch.autograd.backward(y.square().sum())
    unchanged = (y == x).all(dim=-1)
    assert 0 < unchanged.sum() < unchanged.numel()
    assert here.dispatcher.metrics.failures_by_cause() == {"internal": 1}
    assert total(here.dispatcher.metrics.unanswered_rows) == unchanged.sum()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_a_validation_counts_its_own_rows_that_no_expert_answered() -> None:
    here, found = local("switch"), list[Validation]()
    settings = TrainerSettings(router="switch", steps=2, validate_every=1, batch_size=2, validation_batches=1)
    training = Training(LanguageModel(MANIFEST, here.mixture), byte_dataset(TEXT, 16), settings)

    def fail() -> None:
        for expert in here.dispatcher.experts.values():
            expert.guard.check = lambda: True  # type: ignore[method-assign]  # which would heal it
            with torch.no_grad():
                next(expert.block.parameters()).fill_(torch.nan)

    training.run(lambda progress: fail(), threading.Event(), validated=found.append)
    rows = 2 * 16 * MANIFEST.model.layers
    assert [validation.unanswered_rows for validation in found] == [0, 0, rows]


def test_several_threads_may_train_at_once() -> None:
    here = local()
    mixture = here.mixture(0)
    together = threading.Barrier(3)

    def step(seed: int) -> Tensor:
        x = torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(seed)).requires_grad_()
        together.wait(60)
        for _ in range(4):
            torch.autograd.backward(mixture(x).square().sum())
        assert x.grad is not None
        return x.grad

    with ThreadPoolExecutor(3) as pool:
        assert all(gradient.isfinite().all() for gradient in pool.map(step, range(3)))
    updates = np.array([e.update_count for uid, e in here.dispatcher.experts.items() if uid.layer == 0])
    assert (updates <= 12).all()
    assert updates.max() >= 4


def test_a_layer_that_is_not_there_is_named() -> None:
    with pytest.raises(SettingsError, match="layer 2: this swarm has layers 0 to 1"):
        local().mixture(2)


def a_work(rows: int, graph: SharedGraph | None = None) -> WorkItem:
    inputs = torch.empty(rows, 1)
    part = Rows(inputs, torch.tensor([rows]), torch.arange(rows), inputs, graph)
    return WorkItem(UID(0, (0, 0)), "backward", part, float("inf"), "", "")


@given(st.lists(st.integers(1, MOST_ROWS + 5), max_size=60))
def test_what_is_computed_at_once_is_bounded_and_nothing_is_left_out(sizes: list[int]) -> None:
    works = [a_work(rows) for rows in sizes]
    groups = groups_of(works)
    assert [work for group in groups for work in group] == works
    for group in groups:
        assert 0 < len(group) <= MOST_EXPERTS
        assert len(group) == 1 or sum(len(work.rows) for work in group) <= MOST_ROWS


def test_what_shares_a_pass_is_computed_at_once() -> None:
    inputs = torch.empty(40, 1)
    passes = [SharedPass(inputs, inputs, [], [20, 20], 0) for _ in range(2)]
    works = [a_work(20, SharedGraph(shared, index, None)) for shared in passes for index in (0, 1)]
    works += [a_work(20), a_work(20)]
    assert groups_of(works) == [works[:2], works[2:4], works[4:]]
