"""An expert: one trainable block with its optimizer, and the guard that keeps its numbers finite.

Shape suffixes: R = rows, S = segments, D = hidden.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain
from math import isfinite

import torch
from grpc import StatusCode
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from dht.manifest import Manifest
from dht.uid import UID
from expert_server.blocks import build_block, weightless_block
from expert_server.experts.devices import ComputeDevice
from expert_server.experts.format import BLOCK, State, block_tensors, check_numbers, check_state, moment_name
from expert_server.experts.graphs import ForwardGraph, ParameterSlots, WeightVersion
from expert_server.experts.optimizer import Guard, Optimizer
from peer.averaging import MAX_UPDATE_COUNT
from peer.errors import ExpertError
from peer.layers import step_size

_ROWS_WORTH_A_COPY = 64
"""Rows whose outputs take longer to compute again than the parameters take to copy."""


@dataclass(frozen=True, slots=True, eq=False)
class BackwardPart:
    """Rows that go backwards together: inputs and gradients of the outputs [R, D], and the graph if it was kept."""

    inputs: Tensor
    gradients: Tensor
    lengths: Tensor
    positions: Tensor
    graph: ForwardGraph | None = None


class Expert:
    """One replica of an expert. Not safe for several threads: the compute thread alone calls it.

    `update_count` is the number of optimizer steps taken, `skipped_updates` of those that the guard refused.
    Tensors come and go on the CPU, in float32, whatever the device.
    """

    def __init__(self, uid: UID, manifest: Manifest, device: ComputeDevice | None = None) -> None:
        """`device`: the CPU in float32 unless given."""
        self.uid = uid
        self.device = device or ComputeDevice()
        self.update_count = 0
        self.skipped_updates = 0
        self._imported = object()
        self._graph_bytes_per_row: float | None = None
        self.block = build_block(manifest, uid).to(self.device.torch_device)
        self._settings = manifest.optimizer
        self._parameters = list(self.block.parameters())  # to walk through a block takes long
        self._places = ParameterSlots(self.block)
        self.optimizer = Optimizer(self._parameters, self._settings)
        self.guard = Guard(f"expert {uid}", self.block, self.optimizer, self._settings)
        self._step_is_due = False
        self._version: WeightVersion | None = None
        """Of the parameters as they are now, once a graph was made with them."""

    @property
    def step_is_due(self) -> bool:
        """Whether the last backward pass left its optimizer step for later. Whatever reads the state takes it first."""
        return self._step_is_due

    def settle(self) -> None:
        """Takes the optimizer step that is due, if one is."""
        if not self._step_is_due:
            return
        self._step_is_due = False
        self._leave_version()
        try:
            self.optimizer.step()
        finally:
            self.optimizer.zero_grad()
        self.guard.note_update()

    def forward(self, x_RD: Tensor, lengths_S: Tensor, positions_R: Tensor) -> Tensor:
        """Gives the outputs [R, D]. Raises ExpertError (INTERNAL) when one of them is not finite."""
        self.settle()
        with torch.no_grad():
            y_RD = self._outputs(self.device.load(x_RD), lengths_S, positions_R)
        outputs_RD = self._fetched(y_RD, "outputs")
        self.device.wait()
        return outputs_RD

    def forward_with_graph(
        self, x_RD: Tensor, lengths_S: Tensor, positions_R: Tensor
    ) -> tuple[Tensor, "ForwardGraph"]:
        """As `forward`, and what `backward` needs so that it must not compute the outputs again."""
        self.settle()
        x_RD = self.device.load(x_RD.detach()).requires_grad_()
        if self._version is None or self._version.generation != self.generation:
            self._version = WeightVersion(self._parameters, self.generation)
        if self._graph_bytes_per_row is None:
            y_RD = self._measure_graph(x_RD, lengths_S, positions_R, self._version)
        else:
            y_RD = self._outputs(x_RD, lengths_S, positions_R, self._version)
        size = self._cast_bytes() + int(len(x_RD) * (self._graph_bytes_per_row or 0))
        graph = ForwardGraph(x_RD, y_RD, self._version, size)
        self._version.add(graph)
        outputs_RD = self._fetched(y_RD.detach(), "outputs")
        self.device.wait()
        return outputs_RD, graph

    def _outputs(
        self, x_RD: Tensor, lengths_S: Tensor, positions_R: Tensor, version: WeightVersion | None = None
    ) -> Tensor:
        with self.device.autocast(), nullcontext() if version is None else self._places.hold(version):
            y_RD: Tensor = self.block(x_RD, lengths_S, self.device.load(positions_R))
        return y_RD.float()

    def _measure_graph(
        self, x_RD: Tensor, lengths_S: Tensor, positions_R: Tensor, version: WeightVersion
    ) -> Tensor:
        """Runs the block, and counts what autograd keeps of it. Once: counting takes as long as a small forward."""
        sizes: dict[int, int] = {}
        with torch.autograd.graph.saved_tensors_hooks(_count_into(sizes), _unchanged):
            y_RD = self._outputs(x_RD, lengths_S, positions_R, version)
        for parameter in self._parameters:
            sizes.pop(parameter.untyped_storage().data_ptr(), None)
        self._graph_bytes_per_row = max(0, sum(sizes.values()) - self._cast_bytes()) / len(x_RD)
        return y_RD

    def _cast_bytes(self) -> int:
        """Of the matrices in bfloat16, which autocast makes for each forward pass and a graph keeps."""
        if self.device.precision != "bf16":
            return 0
        return sum(p.nbytes // 2 for p in self._parameters if p.dim() > 1)

    def is_good(self, graph: ForwardGraph | None) -> bool:
        """Whether the parameters that the graph was computed with are still there."""
        return graph is not None and graph.version.is_whole and graph.version.generation == self.generation

    @property
    def generation(self) -> object:
        """Another one whenever the state was replaced by anything but an optimizer step."""
        return self._imported, self.guard.rollbacks

    def backward(self, parts: Sequence["BackwardPart"], *, may_defer: bool = False) -> list[Tensor]:
        """Gives each part's gradient of the inputs [R, D], before the one optimizer step for all parts together.

        The step is skipped when the gradient of a parameter is not finite. Raises ExpertError (INTERNAL), and takes
        no step, when the gradient of an input is not finite.

        `may_defer`: whoever calls sees to it that `settle` takes the step soon; it counts as taken already.
        """
        self.settle()
        try:
            grad_inputs = [self._gradient_of_inputs(part) for part in parts]
            self._prepare_step()
        finally:
            if not self._step_is_due:
                self.optimizer.zero_grad()
        if not may_defer or self.guard.looks_next:  # what the guard then does belongs into the answer
            self.settle()
        self.device.wait()
        return grad_inputs

    def _gradient_of_inputs(self, part: "BackwardPart") -> Tensor:
        """Adds to the gradients of the parameters. A graph can be used once."""
        graph = part.graph if self.is_good(part.graph) else None
        if graph is not None:
            x_RD, y_RD = graph.inputs, graph.outputs
        else:
            x_RD = self.device.load(part.inputs.detach()).requires_grad_()
            y_RD = self._outputs(x_RD, part.lengths, part.positions)
        try:
            # loaded only now: the gradients travel while the outputs are computed
            _run_backward(y_RD, self.device.load(part.gradients))
        finally:
            if graph is not None:
                graph.version.discard(graph)
                self._take_gradients(graph.version)
        assert x_RD.grad is not None, "a block must use its input"
        return self._fetched(x_RD.grad, "gradients of the inputs")

    def _take_gradients(self, version: WeightVersion) -> None:
        for parameter, its in zip(self._parameters, version.parameters, strict=True):
            if parameter.grad is None:
                parameter.grad = its.grad
            elif its.grad is not None:
                parameter.grad += its.grad
            its.grad = None

    def _leave_version(self) -> None:
        """Before a step: it takes place on a copy of the parameters, where graphs are worth that."""
        version, self._version = self._version, None
        if version is None:
            return
        if version.generation != self.generation or version.rows < _ROWS_WORTH_A_COPY:
            version.is_whole = False
            return
        for parameter in self._parameters:
            parameter.data = parameter.data.clone()
        version.bytes = sum(parameter.nbytes for parameter in version.parameters)

    @property
    def state_bytes(self) -> int:
        """Bytes of weights and optimizer state now, the guard's copy not counted; no moments before the first step."""
        moments = (value for state in self.optimizer.state.values() for value in state.values())
        return sum(tensor.nbytes for tensor in chain(self._parameters, moments))

    def export_state(self) -> State:
        """Copies of the block's parameters and persistent buffers, and of what the optimizer remembers of each.

        A parameter that has never had a gradient has no moments. Raises StateError when a number is not finite.
        """
        self.settle()
        state = {BLOCK + name: tensor for name, tensor in block_tensors(self.block).items()}
        for name, parameter in self.block.named_parameters():
            for moment, tensor in self.optimizer.state.get(parameter, {}).items():
                state[moment_name(name, moment)] = tensor
        copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()}
        check_numbers(self.uid, copies)
        return copies

    def check_state(self, state: Mapping[str, Tensor], update_count: int) -> list[str]:
        """Gives the names of the parameters that have moments.

        Raises StateError when a name, shape or dtype is not this expert's or a number is not finite.
        """
        return check_state(self.uid, state, update_count, self.block, self.optimizer.moments)

    def import_state(self, state: Mapping[str, Tensor], update_count: int) -> None:
        """Goes on from an exported state as if it had never stopped.

        Raises StateError as `check_state` does, and changes nothing then.
        """
        self.settle()
        stepped = self.check_state(state, update_count)
        parameters = dict(self.block.named_parameters())
        with torch.no_grad():
            for name, tensor in block_tensors(self.block).items():
                tensor.copy_(state[BLOCK + name])
        self.optimizer.state.clear()
        for name in stepped:
            self.optimizer.state[parameters[name]] = {
                m: state[moment_name(name, m)].to(self.device.torch_device, copy=True)
                for m in self.optimizer.moments
            }
        self.update_count = update_count
        self._imported = object()
        self.guard.keep()

    def _prepare_step(self) -> None:
        """Makes the step due, unless the guard refuses it."""
        norm = get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        size = float(norm)
        if not isfinite(size):
            self.skipped_updates += 1
            self.guard.check()
            return
        if size > self._settings.clip_norm:
            clip_grads_with_norm_(self._parameters, self._settings.clip_norm, norm)
        self.optimizer.learning_rate = self._learning_rate()
        self.update_count = min(self.update_count + 1, MAX_UPDATE_COUNT)
        self._step_is_due = True

    def _learning_rate(self) -> float:
        spec = self._settings
        return step_size(self.update_count, spec.learning_rate, spec.warmup_updates, spec.decay_updates)

    def _fetched(self, tensor_RD: Tensor, name: str) -> Tensor:
        """On its way to the CPU: whole once the device was waited for. Raises ExpertError when it is not finite."""
        fetched_RD = self.device.fetch(tensor_RD)
        if not self.device.is_finite(tensor_RD):
            self.guard.check()
            raise ExpertError(StatusCode.INTERNAL, f"the {name} of expert {self.uid} are not finite")
        return fetched_RD


def _run_backward(outputs: Tensor, gradients: Tensor) -> None:
    """What is below torch.autograd.backward, whose check of shapes costs 0.65 s and 38 MB at the first call."""
    torch.autograd.Variable._execution_engine.run_backward(
        (outputs,), (gradients,), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


def _count_into(sizes: dict[int, int]) -> Callable[[Tensor], Tensor]:
    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()  # all of it is kept, also when the tensor is a part of it
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    return count


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


def expert_bytes(manifest: Manifest) -> int:
    """Estimates the memory of one expert: weights, gradients, moments, and the guard's half. Allocates nothing.

    Good for each precision: the parameters are float32 in all, and matrices in bfloat16 live for one batch.
    """
    block = weightless_block(manifest)
    weights = sum(parameter.nbytes for parameter in block.parameters())
    state = (1 + manifest.optimizer.moments) * weights
    return state + weights + state // 2 + sum(buffer.nbytes for buffer in block.buffers())
