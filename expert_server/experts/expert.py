"""An expert: one trainable block with its optimizer, and the guard that keeps its numbers finite.

An expert answers its update: what its block adds to its input.

Shape suffixes: R = rows, S = segments, D = width.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from itertools import chain
from math import isfinite

import torch
from grpc import StatusCode
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from dht.manifest import Manifest
from dht.uid import UID
from expert_server.blocks import build_block, weightless_block
from expert_server.experts.accumulation import AccumulatedGradients
from expert_server.experts.devices import ComputeDevice
from expert_server.experts.format import (
    ACCUMULATED_ROWS,
    ACCUMULATED_SIZES,
    BLOCK,
    Checkpoint,
    State,
    StateForm,
    accumulated_rows,
    block_tensors,
    check_numbers,
    check_state,
    gradient_name,
    moment_name,
)
from expert_server.experts.graphs import ForwardGraph, ParameterSlots, Rows, WeightVersion
from expert_server.experts.optimizer import Guard, Optimizer, StepOutcome
from expert_server.experts.plausibility import Scale, require_plausible
from peer.averaging import MAX_UPDATE_COUNT
from peer.errors import ExpertError, StateError
from peer.layers import step_size

_ROWS_WORTH_A_COPY = 64
"""Rows whose updates take longer to compute again than the parameters take to copy."""


class Expert:
    """One replica of an expert. Not thread-safe: only the compute thread calls it.

    `update_count` is the number of optimizer steps taken. Tensors come and go on the CPU, in float32, whatever the
    device.
    """

    def __init__(self, uid: UID, manifest: Manifest, device: ComputeDevice | None = None) -> None:
        """`device`: the CPU in float32 by default."""
        self.uid = uid
        self.device = device or ComputeDevice()
        self.update_count = 0
        self._imported = object()
        self._graph_bytes_per_row: float | None = None
        self.block = build_block(manifest, uid).to(self.device.torch_device)
        self._settings = manifest.optimizer
        self._parameters = list(self.block.parameters())  # to walk through a block takes long
        self._places = ParameterSlots(self.block)
        self.optimizer = Optimizer(self._parameters, self._settings)
        self.guard = Guard(f"expert {uid}", self.block, self.optimizer, self._settings)
        self.form = StateForm.of(manifest)
        self.refuted = ""
        """Who gave the last state that turned bad on probation, until somebody has taken note and cleared it."""
        self._first_scale = Scale.of(dict(self.block.named_parameters()))
        self._source = ""
        self._own_count = 0
        """Update count of the state that returns if the present one turns bad on probation."""
        self._step_is_due = False
        self._accumulated: AccumulatedGradients | None = None
        self._version: WeightVersion | None = None
        """The present parameters, once a graph was made with them."""

    @property
    def step_is_due(self) -> bool:
        """Whether the last backward pass left its optimizer step for later. Whatever reads the state takes it first."""
        return self._step_is_due

    @property
    def accumulated_rows(self) -> int:
        """Rows whose gradients have not led to a step yet: fewer than `rows_per_update`."""
        return self._accumulated.rows if self._accumulated is not None else 0

    def end_accumulation(self) -> StepOutcome:
        """Makes a step due for what is accumulated, of however few rows. `settle` takes it."""
        if self._accumulated is None:
            return StepOutcome.NONE
        self._accumulated.give_to(self._parameters)
        self._accumulated = None
        outcome = self._prepare_step()
        if not self._step_is_due:
            self.optimizer.zero_grad()
        return outcome

    def settle(self) -> bool:
        """Takes the optimizer step that is due, if there is one. Returns False when the guard rolled it back."""
        if not self._step_is_due:
            return True
        self._step_is_due = False
        self._leave_version()
        try:
            self.optimizer.step()
        finally:
            self.optimizer.zero_grad()
        return self._is_sound(self.guard.note_update)

    def forward(self, rows: Rows) -> Tensor:
        """Returns the updates [R, D]. Raises ExpertError (INTERNAL) when one of them is not finite."""
        self.settle()
        with torch.no_grad():
            u_RD = self._updates(self.device.load(rows.inputs), rows.lengths, rows.positions)
        updates_RD = self._fetched(u_RD, "updates")
        self.device.wait()
        return updates_RD

    def forward_with_graph(self, rows: Rows) -> tuple[Tensor, ForwardGraph]:
        """As `forward`, and also returns the graph, which spares `backward` computing the updates again."""
        self.settle()
        x_RD = self.device.load(rows.inputs.detach()).requires_grad_()
        if self._version is None or self._version.generation != self.generation:
            self._version = WeightVersion(self._parameters, self.generation)
        if self._graph_bytes_per_row is None:
            u_RD = self._measure_graph(x_RD, rows.lengths, rows.positions, self._version)
        else:
            u_RD = self._updates(x_RD, rows.lengths, rows.positions, self._version)
        size = self._cast_bytes() + int(len(x_RD) * (self._graph_bytes_per_row or 0))
        graph = ForwardGraph(x_RD, u_RD, self._version, size)
        self._version.add(graph)
        updates_RD = self._fetched(u_RD.detach(), "updates")
        self.device.wait()
        return updates_RD, graph

    def _updates(
        self, x_RD: Tensor, lengths_S: Tensor, positions_R: Tensor, version: WeightVersion | None = None
    ) -> Tensor:
        with self.device.autocast(), nullcontext() if version is None else self._places.hold(version):
            y_RD: Tensor = self.block(x_RD, lengths_S, self.device.load(positions_R))
        return y_RD.float() - x_RD

    def _measure_graph(
        self, x_RD: Tensor, lengths_S: Tensor, positions_R: Tensor, version: WeightVersion
    ) -> Tensor:
        """Runs the block and counts what autograd keeps. Only once: counting takes as long as a small forward pass."""
        sizes: dict[int, int] = {}
        with torch.autograd.graph.saved_tensors_hooks(_count_into(sizes), _unchanged):
            u_RD = self._updates(x_RD, lengths_S, positions_R, version)
        for parameter in self._parameters:
            sizes.pop(parameter.untyped_storage().data_ptr(), None)
        self._graph_bytes_per_row = max(0, sum(sizes.values()) - self._cast_bytes()) / len(x_RD)
        return u_RD

    def _cast_bytes(self) -> int:
        """Bytes of the bfloat16 matrices that autocast makes for each forward pass and a graph keeps."""
        if self.device.precision != "bf16":
            return 0
        return sum(p.nbytes // 2 for p in self._parameters if p.dim() > 1)

    def is_good(self, graph: ForwardGraph | None) -> bool:
        """Whether the parameters with which the graph was computed still exist."""
        return graph is not None and graph.version.is_whole and graph.version.generation == self.generation

    @property
    def generation(self) -> object:
        """Differs whenever the state was replaced by anything but an optimizer step."""
        return self._imported, self.guard.rollbacks

    def backward(self, parts: Sequence[Rows], *, may_defer: bool = False) -> tuple[list[Tensor], StepOutcome]:
        """Returns the gradient of each part's inputs [R, D], and takes one optimizer step for all parts together.

        If they are of fewer rows than `rows_per_update`, their gradients accumulate, and the step is that of all
        accumulated rows once there are so many. What is accumulated takes a step of its own before gradients of
        another size (`AccumulatedGradients.are_like`).

        The step is skipped when the gradient of a parameter is not finite, and what was accumulated stays. Raises
        ExpertError (INTERNAL), and takes no step, when the gradient of an input is not finite.

        `may_defer`: the caller ensures that `settle` takes the step soon; it already counts as taken.
        """
        self.settle()
        try:
            grad_inputs = [self._gradient_of_inputs(part) for part in parts]
            outcome = self._step_or_accumulate(parts)
        finally:
            if not self._step_is_due:
                self.optimizer.zero_grad()
        # a step that the guard checks is taken at once, because the answer says what the guard did
        if (not may_defer or self.guard.checks_next) and not self.settle():
            outcome |= StepOutcome.ROLLED_BACK
        self.device.wait()
        return grad_inputs, outcome

    def _step_or_accumulate(self, parts: Sequence[Rows]) -> StepOutcome:
        """Called with the gradients of these parts in the parameters."""
        enough = self._settings.rows_per_update
        if self._accumulated is None and sum(map(len, parts)) >= enough:
            return self._prepare_step()
        batch = AccumulatedGradients.take_from(self._parameters, parts)
        if not batch.are_finite:
            return self._skip_step()
        outcome = StepOutcome.NONE
        if self._accumulated is not None and not self._accumulated.are_like(batch):
            # if that step is skipped, it is not this batch's
            outcome = self.end_accumulation() & ~StepOutcome.SKIPPED
            if not self.settle():
                return outcome | StepOutcome.ROLLED_BACK
        if self._accumulated is None:
            self._accumulated = batch
        else:
            self._accumulated.add(batch)
        return outcome | self.end_accumulation() if self._accumulated.rows >= enough else outcome

    def _gradient_of_inputs(self, part: Rows) -> Tensor:
        """Adds to the gradients of the parameters. A graph can be used only once."""
        assert part.gradients is not None, "a backward pass starts from the gradients of the updates"
        graph = part.graph if self.is_good(part.graph) else None
        if graph is not None:
            x_RD, u_RD = graph.inputs, graph.updates
        else:
            x_RD = self.device.load(part.inputs.detach()).requires_grad_()
            u_RD = self._updates(x_RD, part.lengths, part.positions)
        try:
            # loaded only now: the gradients travel while the updates are computed
            _run_backward(u_RD, self.device.load(part.gradients))
        finally:
            if graph is not None:
                graph.version.discard(graph)
                self._take_gradients(graph.version)
        assert x_RD.grad is not None, "the input is part of the update"
        return self._fetched(x_RD.grad, "gradients of the inputs")

    def _take_gradients(self, version: WeightVersion) -> None:
        for parameter, its in zip(self._parameters, version.parameters, strict=True):
            if parameter.grad is None:
                parameter.grad = its.grad
            elif its.grad is not None:
                parameter.grad += its.grad
            its.grad = None

    def _leave_version(self) -> None:
        """Called before a step, which takes place on a copy of the parameters if the graphs are worth one."""
        version, self._version = self._version, None
        if version is None:
            return
        if version.generation != self.generation or version.rows < _ROWS_WORTH_A_COPY:
            version.overwrite()
            return
        for parameter in self._parameters:
            parameter.data = parameter.data.clone()
        version.stash()

    @property
    def state_bytes(self) -> int:
        """Bytes of weights, optimizer state and accumulated gradients, without the guard's copy.

        Moments come with the first step.
        """
        moments = (value for state in self.optimizer.state.values() for value in state.values())
        accumulated = self._accumulated.bytes if self._accumulated is not None else 0
        return sum(tensor.nbytes for tensor in chain(self._parameters, moments)) + accumulated

    def export_state(self) -> State:
        """Copies the block's parameters and persistent buffers, the optimizer's moments of each parameter, and the
        accumulated gradients.

        A parameter that has never had a gradient has no moments. Raises StateError when a number is not finite.
        """
        self.settle()
        state = {BLOCK + name: tensor for name, tensor in block_tensors(self.block).items()}
        for name, parameter in self.block.named_parameters():
            for moment, tensor in self.optimizer.state.get(parameter, {}).items():
                state[moment_name(name, moment)] = tensor
        if self._accumulated is not None:
            state[ACCUMULATED_ROWS] = torch.tensor(self._accumulated.rows)
            state[ACCUMULATED_SIZES] = torch.tensor(self._accumulated.sizes, dtype=torch.float64)
            for (name, _), gradient in zip(
                self.block.named_parameters(), self._accumulated.gradients, strict=True
            ):
                if gradient is not None:
                    state[gradient_name(name)] = gradient
        copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()}
        check_numbers(self.uid, copies)
        return copies

    def checkpoint(self) -> Checkpoint:
        """A copy of its state and its update count. Raises StateError when a number is not finite."""
        state = self.export_state()
        return Checkpoint(state, self.update_count, self.source)

    @property
    def source(self) -> str:
        """Who gave the present state, while it is on probation; empty if it is this node's own."""
        return self._source if self.guard.is_on_probation else ""

    def check_state(self, state: Mapping[str, Tensor], update_count: int) -> list[str]:
        """Returns the names of the parameters that have moments.

        Raises StateError when a name, shape or dtype is not this expert's or a number is not finite.
        """
        return check_state(self.uid, state, update_count, self.form)

    def require_plausible(self, state: Mapping[str, Tensor], update_count: int) -> None:
        """For a state of another peer that `check_state` accepts. Raises StateError if no training can have made it."""
        known = [self._first_scale, Scale.of(dict(self.block.named_parameters()))]
        require_plausible(self.uid, state, update_count, known, self._settings)

    def import_state(self, state: Mapping[str, Tensor], update_count: int, source: str = "") -> None:
        """Goes on from an exported state as if it had never stopped.

        `source`: who gave it, if not this node: it must be plausible, and is on probation. Raises StateError as
        `check_state` and `require_plausible` do; then nothing has changed.
        """
        self.settle()
        stepped = self.check_state(state, update_count)
        if source:
            self.require_plausible(state, update_count)
            self._keep_own_state()
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
        self._accumulated = self._accumulated_in(state)
        self.update_count = update_count
        self._imported = object()
        self._source = source
        if source:
            self.guard.doubt()
        else:
            self.guard.keep()

    def _accumulated_in(self, state: Mapping[str, Tensor]) -> AccumulatedGradients | None:
        rows = accumulated_rows(state)
        if not rows:
            return None
        gradients = [
            state[gradient_name(name)].to(self.device.torch_device, copy=True)
            if gradient_name(name) in state
            else None
            for name, _ in self.block.named_parameters()
        ]
        least, most = state[ACCUMULATED_SIZES].tolist()
        return AccumulatedGradients(gradients, rows, (least, most))

    def _keep_own_state(self) -> None:
        """Makes the present state the one that returns, unless it is on probation itself."""
        if self.guard.is_on_probation:
            return
        if not self.guard.check():
            raise StateError(f"expert {self.uid} was rolled back before its state was replaced")
        self.guard.keep()
        self._own_count = self.update_count

    def _is_sound(self, check: Callable[[], bool]) -> bool:
        """What the guard's `check` returns. After a rollback on probation, goes back to the update count too.

        A rollback drops what is accumulated: the gradients are those of parameters that were bad.
        """
        source = self.source
        if check():
            return True
        self._accumulated = None
        if source:
            self.update_count, self.refuted = self._own_count, source
        return False

    def _prepare_step(self) -> StepOutcome:
        """Makes the step due, or skips it when the gradients are not finite."""
        norm = get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        size = float(norm)
        if not isfinite(size):
            return self._skip_step()
        if size > self._settings.clip_norm:
            clip_grads_with_norm_(self._parameters, self._settings.clip_norm, norm)
        self.optimizer.learning_rate = self._learning_rate()
        self.update_count = min(self.update_count + 1, MAX_UPDATE_COUNT)
        self._step_is_due = True
        return StepOutcome.TAKEN

    def _skip_step(self) -> StepOutcome:
        is_good = self._is_sound(self.guard.check)
        return StepOutcome.SKIPPED if is_good else StepOutcome.SKIPPED | StepOutcome.ROLLED_BACK

    def _learning_rate(self) -> float:
        spec = self._settings
        return step_size(self.update_count, spec.learning_rate, spec.warmup_updates, spec.decay_updates)

    def _fetched(self, tensor_RD: Tensor, name: str) -> Tensor:
        """Starts the copy to the CPU, complete after `device.wait`. Raises ExpertError when it is not finite."""
        fetched_RD = self.device.fetch(tensor_RD)
        if not self.device.is_finite(tensor_RD):
            self._is_sound(self.guard.check)
            raise ExpertError(StatusCode.INTERNAL, f"the {name} of expert {self.uid} are not finite")
        return fetched_RD


def _run_backward(updates: Tensor, gradients: Tensor) -> None:
    """Calls what torch.autograd.backward calls, without its check of shapes: 0.65 s and 38 MB at the first call."""
    torch.autograd.Variable._execution_engine.run_backward(
        (updates,), (gradients,), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


def _count_into(sizes: dict[int, int]) -> Callable[[Tensor], Tensor]:
    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()  # all of it is kept, even if the tensor is only a part
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    return count


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


def expert_bytes(manifest: Manifest) -> int:
    """Estimates the memory of one expert: weights, gradients, moments and the guard's half. Allocates nothing.

    It holds for every precision: parameters are always float32, and bfloat16 matrices live for one batch.
    """
    block = weightless_block(manifest)
    weights = sum(parameter.nbytes for parameter in block.parameters())
    state = (1 + manifest.optimizer.moments) * weights
    gradients = weights if manifest.optimizer.rows_per_update == 1 else 2 * weights
    return state + gradients + state // 2 + sum(buffer.nbytes for buffer in block.buffers())
