"""An expert on each device and with each precision: its results are close to the CPU's in float32, from the
same state.
"""

import gc
from collections.abc import Callable, Iterable, Iterator
from typing import get_args

import pytest
import torch
from expert_samples import (
    AN_UID,
    HIDDEN,
    LENGTHS,
    POSITIONS,
    ROWS,
    backward,
    gradients_that_overflow_when_summed,
    make_manifest,
    parameters_of,
    random_rows,
)
from torch import Tensor

from dht.manifest import ExpertSpec, Manifest, ModelSpec, OptimizerSpec
from expert_server.experts.devices import ComputeDevice
from expert_server.experts.expert import Expert, expert_bytes
from expert_server.experts.graphs import NODES_BYTES, Rows
from expert_server.experts.guard import StepOutcome
from peer.choices import Activation, Norm
from peer.clipping import OwnMoves
from peer.errors import ExpertError
from peer.layers import KeyValueCache

needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA GPU, and torch finds none"
)
needs_mps = pytest.mark.skipif(
    not torch.backends.mps.is_available(), reason="needs a Metal GPU, and torch finds none"
)

on_each_device = pytest.mark.parametrize(
    "make_device",
    [
        pytest.param(lambda: ComputeDevice("cpu", "fp32"), id="cpu in fp32"),
        pytest.param(lambda: ComputeDevice("cpu", "bf16"), id="cpu in bf16"),
        pytest.param(lambda: ComputeDevice("cuda:0", "fp32"), id="cuda in fp32", marks=needs_cuda),
        pytest.param(lambda: ComputeDevice("cuda:0", "bf16"), id="cuda in bf16", marks=needs_cuda),
        pytest.param(lambda: ComputeDevice("mps", "fp32"), id="mps in fp32", marks=needs_mps),
    ],
)
MakeDevice = Callable[[], ComputeDevice]


def train(expert: Expert, steps: int) -> list[float]:
    """Trains on fixed targets. Returns the loss before each step."""
    losses = []
    for _ in range(steps):
        error = expert.forward(Rows(random_rows(0), LENGTHS, POSITIONS)) - random_rows(1)
        losses.append(error.square().mean().item())
        backward(expert, random_rows(0), 2 * error / error.numel())
    return losses


def assert_near(found: Tensor, expected: Tensor) -> None:
    """Checks that the difference is within the rounding of bfloat16 (8 bits) for sums of 16 numbers."""
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0.05)


@on_each_device
def test_outputs_and_gradients_are_near_the_cpus_in_float32(make_device: MakeDevice) -> None:
    expert, reference = Expert(AN_UID, make_manifest(), make_device()), Expert(AN_UID, make_manifest())
    outputs = expert.forward(Rows(random_rows(0), LENGTHS, POSITIONS))
    gradients = backward(expert, random_rows(0), random_rows(1))
    assert outputs.device == gradients.device == torch.device("cpu")
    assert outputs.dtype == gradients.dtype == torch.float32
    assert_near(outputs, reference.forward(Rows(random_rows(0), LENGTHS, POSITIONS)))
    assert_near(gradients, backward(reference, random_rows(0), random_rows(1)))


@on_each_device
def test_an_expert_learns_and_keeps_its_parameters_in_float32(make_device: MakeDevice) -> None:
    expert = Expert(AN_UID, make_manifest(), make_device())
    losses = train(expert, 30)
    assert losses[-1] < 0.3 * losses[0]
    moments = [t for state in expert.optimizer.state.values() for t in state.values()]
    for tensor in (*expert.block.parameters(), *moments):
        assert tensor.dtype == torch.float32
        assert tensor.device.type == expert.device.torch_device.type


def test_bfloat16_is_really_used() -> None:
    rounded = Expert(AN_UID, make_manifest(), ComputeDevice(precision="bf16"))
    plain = Expert(AN_UID, make_manifest())
    rows = Rows(random_rows(0), LENGTHS, POSITIONS)
    differences = rounded.forward(rows) - plain.forward(rows)
    assert differences.abs().max() > 1e-4


@on_each_device
def test_a_state_travels_between_devices(make_device: MakeDevice) -> None:
    there, here = Expert(AN_UID, make_manifest(), make_device()), Expert(AN_UID, make_manifest())
    train(there, 3)
    state = there.export_state()
    assert all(tensor.device.type == "cpu" for tensor in state.values())
    here.import_state(state, there.update_count)
    torch.testing.assert_close(here.export_state(), state, atol=0, rtol=0)
    back = Expert(AN_UID, make_manifest(), make_device())
    back.import_state(here.export_state(), here.update_count)
    torch.testing.assert_close(back.export_state(), state, atol=0, rtol=0)
    assert train(back, 5) == pytest.approx(train(there, 5), rel=1e-4)


@on_each_device
def test_a_kept_graph_gives_what_computing_again_gives(make_device: MakeDevice) -> None:
    kept, plain = (Expert(AN_UID, make_manifest(), make_device()) for _ in range(2))
    output, graph = kept.forward_with_graph(Rows(random_rows(0), LENGTHS, POSITIONS))
    torch.testing.assert_close(output, plain.forward(Rows(random_rows(0), LENGTHS, POSITIONS)))
    torch.testing.assert_close(
        backward(kept, random_rows(0), random_rows(1), graph), backward(plain, random_rows(0), random_rows(1))
    )


@on_each_device
def test_rows_that_follow_those_in_a_cache_see_them(make_device: MakeDevice) -> None:
    expert, cache, x = Expert(AN_UID, make_manifest(), make_device()), KeyValueCache(), random_rows(0)[:5]
    places = torch.arange(5)
    parts = [
        expert.forward(Rows(x[some], torch.tensor([len(x[some])]), places[some], caches=[cache]))
        for some in (slice(0, 2), slice(2, 3), slice(3, 5))
    ]
    assert_near(torch.cat(parts), expert.forward(Rows(x, torch.tensor([5]), places)))
    assert cache.length == 5


@on_each_device
def test_bad_numbers_change_nothing(make_device: MakeDevice) -> None:
    expert = Expert(AN_UID, make_manifest(), make_device())
    before = parameters_of(expert)
    with pytest.raises(ExpertError, match="are not finite"):
        expert.forward(Rows(torch.full((ROWS, HIDDEN), 3e38), LENGTHS, POSITIONS))
    rows = Rows(random_rows(0), LENGTHS, POSITIONS, gradients_that_overflow_when_summed())
    _, outcome = expert.backward([rows])
    assert (expert.update_count, outcome) == (0, StepOutcome.SKIPPED)
    torch.testing.assert_close(parameters_of(expert), before, atol=0, rtol=0)


@on_each_device
def test_the_guard_rolls_back(make_device: MakeDevice) -> None:
    expert = Expert(AN_UID, make_manifest(), make_device())
    train(expert, 3)
    with torch.no_grad():
        next(expert.block.parameters()).fill_(torch.nan)
    assert not expert.guard.check()
    losses = train(expert, 30)
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("rows", [1, 64, 1000])
def test_the_memory_of_a_graph_is_what_autograd_keeps(precision: str, rows: int) -> None:
    expert = Expert(
        AN_UID, make_manifest(), ComputeDevice(precision="bf16" if precision == "bf16" else "fp32")
    )
    expert.forward_with_graph(Rows(random_rows(0), torch.tensor([ROWS]), torch.arange(ROWS)))
    x = torch.randn(rows, HIDDEN, requires_grad=True)
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), expert.device.autocast():
        expert.block(x, torch.tensor([rows]), torch.arange(rows))
    for parameter in expert.block.parameters():
        kept.pop(parameter.data_ptr(), None)
    _, graph = expert.forward_with_graph(Rows(x, torch.tensor([rows]), torch.arange(rows)))
    assert graph.bytes - NODES_BYTES == pytest.approx(storage_bytes(kept.values()), rel=0.2)


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


@pytest.fixture
def live_bytes() -> Iterator[Callable[[], int]]:
    """A function that returns the memory of all tensors, and of their gradients, that were made since the test
    began.
    """

    def measure() -> int:
        tensors = [found for found in gc.get_objects(generation=0) if issubclass(type(found), Tensor)]
        return storage_bytes([*tensors, *(t.grad for t in tensors if t.is_leaf and t.grad is not None)])

    OwnMoves({"x": torch.ones(2**12)})  # makes the signs that all sketches of this process share
    gc.freeze()  # what was there before is in no generation
    gc.disable()  # and what is new stays in the youngest
    yield measure
    gc.enable()
    gc.unfreeze()


@pytest.mark.parametrize("kind", ["transformer", "ffn"])
@pytest.mark.parametrize("norm", get_args(Norm))
@pytest.mark.parametrize("activation", get_args(Activation))
@pytest.mark.parametrize(
    "optimizer",
    [
        OptimizerSpec(),
        OptimizerSpec(name="adam"),
        OptimizerSpec(name="sgd"),
        OptimizerSpec(name="sgd", momentum=0),
    ],
    ids=["adamw", "adam", "sgd", "sgd without momentum"],
)
def test_the_memory_of_an_expert_is_as_estimated(
    kind: str,
    norm: Norm,
    activation: Activation,
    optimizer: OptimizerSpec,
    live_bytes: Callable[[], int],
) -> None:
    model = ModelSpec(hidden=64, heads=2, feed_forward=128, norm=norm, activation=activation)
    manifest = Manifest(name="sauna", model=model, experts=ExpertSpec(kind=kind), optimizer=optimizer)
    peaks: list[int] = []
    expert = Expert(AN_UID, manifest)
    take_step = expert.optimizer.step

    def step() -> None:
        peaks.append(live_bytes())
        take_step()

    expert.optimizer.step = step  # type: ignore[method-assign]
    x = torch.randn(1, 64)
    rows = Rows(x, torch.tensor([1]), torch.tensor([0]), x)
    expert.backward([rows])
    expert.import_state(expert.export_state(), expert.update_count)  # as an average does
    for _ in range(2):
        expert.backward([rows])
        expert.guard.keep()
    assert peaks[-1] == pytest.approx(expert_bytes(manifest), rel=0.03)
