"""The mixture layer in a user's own model: shapes, precision, threads, and what it refuses."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from expert_fakes import FakeSwarm, make_manifest
from hypothesis import given, settings
from hypothesis import strategies as st
from router_fakes import every_router, mixtures
from torch import Tensor

from peer.loop import LoopThread
from trainer_client.dispatch.dispatcher import Dispatcher
from trainer_client.dispatch.policy import WaitPolicy
from trainer_client.moe import RemoteMixtureOfExperts
from trainer_client.routers import Routing
from trainer_client.settings import RouterName

HIDDEN = 8
both_halves = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def make_swarm() -> FakeSwarm:
    return FakeSwarm(make_manifest((2, 3)))


def random_input(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, HIDDEN, generator=torch.Generator().manual_seed(seed)).requires_grad_()


# Shapes


@settings(max_examples=15)
@given(st.lists(st.integers(1, 3), max_size=4), st.integers(0, 99))
def test_dimensions_before_the_positions_are_sequences(shape: list[int], seed: int) -> None:
    x = random_input(*shape, seed=seed)
    with mixtures(make_swarm(), "product-key") as make_mixture:
        mixture = make_mixture(0)
        y = mixture(x)
        sequences = x.reshape(-1, shape[-1] if shape else 1, HIDDEN)
        one_by_one = torch.stack([mixture(x_TD) for x_TD in sequences]).view(x.shape)
        torch.autograd.backward(y.square().sum())
    assert y.shape == x.shape
    torch.testing.assert_close(y, one_by_one, rtol=1e-5, atol=1e-5)
    assert x.grad is not None
    assert x.grad.shape == x.shape


def test_rows_know_their_positions_and_their_sequences() -> None:
    """Four sequences of two rows each, whatever dimensions they are in."""
    swarm = FakeSwarm(make_manifest((1,)))
    with mixtures(swarm, "switch") as make_mixture:
        make_mixture(0)(random_input(2, 2, 2))
    (call,) = swarm.called("forward")
    assert call.batch.lengths.tolist() == [2, 2, 2, 2]
    assert call.batch.positions.tolist() == [0, 1] * 4


@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0)])
def test_nothing_in_is_nothing_out(shape: tuple[int, ...]) -> None:
    swarm = make_swarm()
    with mixtures(swarm, "product-key") as make_mixture:
        assert make_mixture(0)(random_input(*shape)).shape == (*shape, HIDDEN)
    assert not swarm.calls


def test_a_view_that_is_not_contiguous_is_as_good_as_a_copy() -> None:
    x = random_input(4, 3).transpose(0, 1)
    with mixtures(make_swarm(), "product-key") as make_mixture:
        mixture = make_mixture(0)
        torch.testing.assert_close(mixture(x), mixture(x.contiguous()))


def test_a_model_of_another_width_is_told_so() -> None:
    with (
        mixtures(make_swarm(), "product-key") as make_mixture,
        pytest.raises(AssertionError, match=r"9 columns.*has 8"),
    ):
        make_mixture(0)(torch.zeros(2, 9))


def test_a_sequence_longer_than_the_context_is_told_so() -> None:
    with (
        mixtures(make_swarm(), "product-key") as make_mixture,
        pytest.raises(AssertionError, match=r"17 rows.*context is 16"),
    ):
        make_mixture(0)(random_input(17))


# Precision


@both_halves
@every_router
def test_under_autocast_the_layer_gives_what_it_gives_without(name: RouterName, dtype: torch.dtype) -> None:
    """Gate and mixture compute in float32; only inputs and outputs may be rounded."""
    torch.default_generator.manual_seed(0)  # with another gate, rounding might change which expert is best
    x = random_input(2, 4).detach()
    with mixtures(make_swarm(), name) as make_mixture:
        mixture = make_mixture(0).eval()
        expected = mixture(x)
        with torch.autocast("cpu", dtype=dtype):
            whole, half = mixture(x), mixture(x.to(dtype))
    assert whole.dtype == torch.float32
    assert half.dtype == dtype
    torch.testing.assert_close(whole, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(half.float(), expected, rtol=0.02, atol=0.02)


@both_halves
def test_gradients_flow_through_a_model_under_autocast(dtype: torch.dtype) -> None:
    x = random_input(2, 4)
    before = torch.nn.Linear(HIDDEN, HIDDEN)
    with mixtures(make_swarm(), "product-key") as make_mixture:
        mixture = make_mixture(0)

        def gradients(enabled: bool) -> tuple[Tensor, ...]:
            with torch.autocast("cpu", dtype=dtype, enabled=enabled):
                loss = mixture(before(x)).float().square().mean()
            return torch.autograd.grad(loss, [x, before.weight, mixture.gate.linear.weight])

        for found, expected in zip(gradients(True), gradients(False), strict=True):
            torch.testing.assert_close(found, expected, rtol=0.05, atol=0.02)


def test_experts_get_gradients_without_the_scalers_factor() -> None:
    def train(scale: float) -> tuple[Tensor, float]:
        """The gradient of the input, and the sum of all gradients that experts received."""
        swarm, x = make_swarm(), random_input(2, 4)
        with mixtures(swarm, "product-key", gradient_scale=lambda: scale) as make_mixture:
            torch.default_generator.manual_seed(0)
            (gradient,) = torch.autograd.grad(scale * make_mixture(0)(x).square().sum(), x)
        sent = [call.made.gradients for call in swarm.called("backward") if call.made.gradients is not None]
        return gradient / scale, sum(float(abs(gradients).sum()) for gradients in sent)

    (plain, plain_sent), (scaled, scaled_sent) = train(1.0), train(1024.0)
    torch.testing.assert_close(scaled, plain, rtol=1e-5, atol=1e-5)
    assert scaled_sent == pytest.approx(plain_sent, rel=1e-5)


def test_gradients_that_are_not_finite_go_to_no_expert_and_come_back_as_nan() -> None:
    swarm = make_swarm()
    x = random_input(2, 4)
    with mixtures(swarm, "product-key") as make_mixture:
        mixture = make_mixture(0)
        gradient = torch.zeros_like(x)
        gradient[0, 0, 0] = torch.inf
        (found,) = torch.autograd.grad(mixture(x), x, gradient)
    assert not swarm.called("backward")
    assert found.isnan().all()


def test_a_second_derivative_is_refused() -> None:
    x = random_input(2, 4)
    with mixtures(make_swarm(), "product-key") as make_mixture:
        (gradient,) = torch.autograd.grad(make_mixture(0)(x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            torch.autograd.backward(gradient.sum())


# Threads


def test_several_threads_train_one_layer_at_once(loop: LoopThread) -> None:
    swarm = make_swarm()
    dispatcher = Dispatcher(swarm.directory(), swarm, WaitPolicy(60.0, 60.0, 1))
    mixture = RemoteMixtureOfExperts(0, swarm.manifest, dispatcher, loop.run, Routing(k=2))
    together = threading.Barrier(4)

    def gradient(seed: int, alone: bool) -> Tensor:
        x = random_input(3, 4, seed=seed)
        if not alone:
            together.wait(60)
        (found,) = torch.autograd.grad(mixture(x).square().sum(), x)
        return found

    expected = [gradient(seed, alone=True) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda seed: gradient(seed, alone=False), range(4)))
    torch.testing.assert_close(found, expected)
    loop.run(dispatcher.close())
