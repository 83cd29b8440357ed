"""An expert: one trainable block with its optimizer, and the guard that keeps its numbers finite.

An expert returns its update: what its block adds to its input.

Shape suffixes: R = rows, S = segments, D = width.
"""

import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property
from math import isfinite
from types import MappingProxyType
from typing import TypeGuard
from weakref import WeakValueDictionary

import torch
from grpc import StatusCode
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from dht.manifest import Manifest
from dht.uid import UID
from expert_server.blocks import build_block, weightless_block
from expert_server.experts.accumulation import AccumulatedGradients
from expert_server.experts.callers import Callers
from expert_server.experts.devices import ComputeDevice
from expert_server.experts.format import (
    ACCUMULATED_ROWS,
    ACCUMULATED_SIZES,
    AVERAGED,
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
    moving_tensors,
)
from expert_server.experts.graphs import (
    ForwardGraph,
    GraphMeter,
    ParameterGradients,
    ParameterSlots,
    Rows,
    SharedGraph,
    SharedPass,
    WeightVersion,
    run_backward,
)
from expert_server.experts.grouped import GroupedBlock
from expert_server.experts.guard import Guard, StepOutcome
from expert_server.experts.plausibility import Scale, require_plausible
from expert_server.experts.reports import UpdateReports
from peer import clock
from peer.averaging import MAX_UPDATE_COUNT
from peer.clipping import OwnMoves, sketch_bytes
from peer.errors import ExpertError, StateError
from peer.layers import KeyValueCache, step_size
from peer.optimizer import Optimizer

_ROWS_WORTH_A_COPY = 64
"""From this many rows on, computing the rows' updates again takes longer than copying the parameters."""
_FREE_MEMORY_SHARE = 1 / 4
"""The share of each device's free memory that experts may take if their number is not set."""
_UNKNOWN: Mapping[str, int] = MappingProxyType({})


class Expert:
    """One replica of an expert. Not thread-safe: only the compute thread calls it.

    `update_count` is the number of optimizer steps taken. Arguments and results are float32 tensors on the CPU,
    whatever the device.
    """

    def __init__(self, uid: UID, manifest: Manifest, device: ComputeDevice | None = None) -> None:
        """`device`: the CPU in float32 by default."""
        self.uid = uid
        self.device: ComputeDevice = device or ComputeDevice()
        self.update_count: int = 0
        self.updated_at: float = 0.0
        """When it took its last step here; 0 if it has taken none."""
        self.rows = 0
        """Rows computed here, forward and backward, as counted by its runtime."""
        self._imported = object()
        self._meter = GraphMeter()
        self._manifest = manifest
        self.block: nn.Module = build_block(manifest, uid).to(self.device.torch_device)
        self._settings = manifest.optimizer
        self._parameters = list(self.block.parameters())  # walking through a block is slow
        self._places = ParameterSlots(self.block)
        spec = self._settings
        self.optimizer: Optimizer = Optimizer(
            self._parameters, spec.name, spec.learning_rate, spec.weight_decay, spec.sgd_momentum
        )
        self.guard: Guard = Guard(f"expert {uid}", self.block, self.optimizer, self._settings)
        self.form: StateForm = StateForm.of(manifest)
        self.refuted: str = ""
        """The peer that gave the last state which turned bad on probation. Whoever reads it clears it."""
        self.own_moves: OwnMoves = OwnMoves({BLOCK + name: p for name, p in self.block.named_parameters()})
        """How far its updates have moved it since its state was last replaced, which includes averages."""
        self._first_scale = Scale.of(dict(self.block.named_parameters()))
        self._source = ""
        self._own_count = 0
        """The update count of the state that is restored if the present one turns bad on probation."""
        self._step_is_due = False
        self._accumulated: AccumulatedGradients | None = None
        self.callers: Callers = Callers()
        self.reports: UpdateReports = UpdateReports()
        """Only for the loop's thread."""
        self._version: WeightVersion | None = None
        """The present parameters, if a graph was made with them."""
        self._kept_versions = WeakValueDictionary[int, WeightVersion]()
        """Versions that graphs still need, by number."""
        self._first_version = secrets.randbits(32) + 1 << 30
        self._changes = 0
        """The number of optimizer steps and imports so far."""

    @property
    def step_is_due(self) -> bool:
        """Whether the last backward pass deferred its optimizer step. Anything that reads the state takes the step
        first.
        """
        return self._step_is_due

    @property
    def version(self) -> int:
        """Increases whenever the parameters change. No other replica has the same one except by chance. From 1 to 2^63
        - 1.

        A deferred step has not changed the parameters yet.
        """
        return self._first_version + self._changes + self.guard.rollbacks

    @property
    def accumulated_rows(self) -> int:
        """Rows whose gradients have not led to a step yet: fewer than `rows_per_update`."""
        return self._accumulated.rows if self._accumulated is not None else 0

    def end_accumulation(self) -> StepOutcome:
        """Makes a step due for the accumulated gradients, however few rows they have. `settle` takes the step."""
        if self._accumulated is None:
            return StepOutcome.NONE
        callers = self._accumulated.callers
        self._accumulated.give_to(self._parameters)
        self._accumulated = None
        outcome = self._prepare_step(callers)
        if not self._step_is_due:
            self.optimizer.zero_grad()
        return outcome

    def settle(self) -> bool:
        """Takes the optimizer step that is due, if any. Returns False if the guard rolled it back."""
        if not self._step_is_due:
            return True
        self._step_is_due = False
        self._changes += 1
        try:
            self._leave_version()
            self.optimizer.step()
        finally:
            self.optimizer.zero_grad()
        return self._is_sound(self.guard.note_update)

    def forward(self, rows: Rows) -> Tensor:
        """Returns the updates [R, D].

        Raises ExpertError if one of them is not finite (INTERNAL), or if the rows in the caches were computed with
        other parameters (FAILED_PRECONDITION). The caches are then unchanged.
        """
        self.settle()
        if not self.can_extend(rows.caches):
            message = (
                f"expert {self.uid} has changed since it computed the rows before these: send all of them"
            )
            raise ExpertError(StatusCode.FAILED_PRECONDITION, message)
        cached = rows.cached()
        try:
            with torch.no_grad():
                u_RD = self._updates(
                    self.device.load(rows.inputs), rows.lengths, rows.positions, caches=rows.caches
                )
            updates_RD = self._fetched(u_RD, "updates")
        except ExpertError:
            rows.take_back(cached)
            raise
        rows.note_version(self.version)
        self.device.wait()
        return updates_RD

    def can_extend(self, caches: Sequence[KeyValueCache | None]) -> bool:
        """Whether all cached rows were computed with the present parameters."""
        return all(cache is None or cache.version in (0, self.version) for cache in caches)

    def forward_with_graph(self, rows: Rows) -> tuple[Tensor, ForwardGraph]:
        """Like `forward`, but also returns the graph, so that `backward` need not compute the updates again."""
        self.settle()
        x_RD = self.device.load(rows.inputs.detach()).requires_grad_()
        if self._version is None or self._version.generation != self.generation:
            self._version = WeightVersion(self._parameters, self.generation)
            self._kept_versions[self.version] = self._version
        with self._meter.measuring(x_RD, self._parameters, self._cast_bytes()):
            u_RD = self._updates(x_RD, rows.lengths, rows.positions, self._version)
        size = self._cast_bytes() + self._meter.bytes_of(len(x_RD))
        graph = ForwardGraph(x_RD, u_RD, self._version, size)
        self._version.add(graph)
        updates_RD = self._fetched(u_RD.detach(), "updates")
        self.device.wait()
        return updates_RD, graph

    def updates_in(self, shared: SharedPass, index: int) -> Tensor:
        """This expert's updates [R, D] in a pass of several experts. Raises ExpertError as `forward` does."""
        return self._fetched(shared.updates[index], "updates", shared.are_finite)

    @cached_property
    def grouped_block(self) -> GroupedBlock | None:
        """The block that computes this expert together with others of the same swarm. None if it is computed
        by itself.
        """
        return GroupedBlock.of(self.block, self._manifest, self.device)

    @property
    def is_causal(self) -> bool:
        """Whether each row attends only to earlier rows."""
        return self._manifest.model.is_causal(self.uid.layer)

    @property
    def parameters(self) -> Sequence[nn.Parameter]:
        """The present parameters, in the block's order."""
        return self._parameters

    @cached_property
    def size(self) -> int:
        """The number of elements in its parameters."""
        return sum(parameter.numel() for parameter in self._parameters)

    def _updates(
        self,
        x_RD: Tensor,
        lengths_S: Tensor,
        positions_R: Tensor,
        version: WeightVersion | None = None,
        caches: Sequence[KeyValueCache | None] = (),
    ) -> Tensor:
        # blocks of other packages don't know caches
        others = (caches,) if caches else ()
        with self.device.autocast(), nullcontext() if version is None else self._places.hold(version):
            y_RD: Tensor = self.block(x_RD, lengths_S, self.device.load(positions_R), *others)
        return y_RD.float() - x_RD

    def _cast_bytes(self) -> int:
        """Bytes of the bfloat16 matrices that autocast makes in each forward pass, and that a graph keeps."""
        if self.device.precision != "bf16":
            return 0
        return sum(p.nbytes // 2 for p in self._parameters if p.dim() > 1)

    def is_good(self, graph: ForwardGraph | SharedGraph | None) -> TypeGuard[ForwardGraph]:
        """Whether the graph belongs to this expert alone, and the parameters that it was computed with still exist."""
        if not isinstance(graph, ForwardGraph):
            return False
        return graph.version.is_whole and graph.version.generation == self.generation

    @property
    def generation(self) -> object:
        """Changes whenever the state is replaced by anything but an optimizer step."""
        return self._imported, self.guard.rollbacks

    def backward(
        self,
        parts: Sequence[Rows],
        *,
        may_defer: bool = False,
        callers: Mapping[str, int] = _UNKNOWN,
        withhold: bool = False,
    ) -> tuple[list[Tensor], StepOutcome]:
        """Returns the gradient of each part's inputs [R, D], and takes one optimizer step for all parts together.

        If the parts have fewer rows than `rows_per_update`, their gradients accumulate, and the step is taken for all
        accumulated rows once there are enough. If their size differs too much from that of the accumulated gradients
        (`AccumulatedGradients.are_like`), a step is first taken for the latter.

        The step is skipped if the gradient of a parameter is not finite; the accumulated gradients stay. Raises
        ExpertError (INTERNAL), and takes no step, if the gradient of an input is not finite.

        `may_defer`: the caller calls `settle` soon, which takes the step; it already counts as taken. `callers`: how
        many of the rows each of them sent. `withhold`: the gradients of the parameters are dropped.
        """
        self.settle()

        def compute() -> list[Tensor]:
            return [self._gradient_of_inputs(part) for part in parts]

        return self._backward(parts, compute, may_defer, callers, withhold)

    def backward_by(
        self,
        part: Rows,
        of_inputs: Tensor,
        of_parameters: ParameterGradients,
        *,
        callers: Mapping[str, int],
        withhold: bool,
    ) -> tuple[Tensor, StepOutcome]:
        """Like `backward`, for gradients that were computed together with other experts'. May defer the step."""
        assert not self._step_is_due, "the gradients are of parameters that are about to change"

        def take_gradients() -> list[Tensor]:
            accumulates = self._settings.rows_per_update > 1
            for parameter, gradient in zip(self._parameters, of_parameters.tensors, strict=True):
                # a gradient that is kept must not keep those of all other experts in memory
                parameter.grad = gradient.clone() if accumulates else gradient
            are_finite = of_parameters.inputs_are_finite
            return [self._fetched(of_inputs, "gradients of the inputs", are_finite)]

        (gradient,), outcome = self._backward(
            [part], take_gradients, True, callers, withhold, of_parameters.norm
        )
        return gradient, outcome

    def _backward(
        self,
        parts: Sequence[Rows],
        compute: Callable[[], list[Tensor]],
        may_defer: bool,
        callers: Mapping[str, int],
        withhold: bool,
        norm: Tensor | None = None,
    ) -> tuple[list[Tensor], StepOutcome]:
        """`compute` leaves gradients in the parameters, and returns those of the inputs. `norm`: of the parameters'
        gradients.
        """
        try:
            grad_inputs = compute()
            outcome = self._step_or_accumulate(parts, callers, withhold, norm)
        finally:
            if not self._step_is_due:
                self.optimizer.zero_grad()
        # a step that the guard checks is taken at once, because the answer reports the guard's result
        if (not may_defer or self.guard.checks_next) and not self.settle():
            outcome |= StepOutcome.ROLLED_BACK
        self.device.wait()
        return grad_inputs, outcome

    def _step_or_accumulate(
        self, parts: Sequence[Rows], callers: Mapping[str, int], withhold: bool, norm: Tensor | None
    ) -> StepOutcome:
        """Call it when the parameters have the gradients of these parts."""
        enough = self._settings.rows_per_update
        if withhold:
            return StepOutcome.WITHHELD
        if self._accumulated is None and sum(map(len, parts)) >= enough:
            return self._prepare_step(callers, norm)
        batch = AccumulatedGradients.take_from(self._parameters, parts, callers)
        if not batch.are_finite:
            return self._skip_step()
        outcome = StepOutcome.NONE
        if self._accumulated is not None and not self._accumulated.are_like(batch):
            # if that step is skipped, the skip is not reported as this batch's
            outcome = self.end_accumulation() & ~StepOutcome.SKIPPED
            if not self.settle():
                return outcome | StepOutcome.ROLLED_BACK
        if self._accumulated is None:
            self._accumulated = batch
        else:
            self._accumulated.add(batch)
        return outcome | self.end_accumulation() if self._accumulated.rows >= enough else outcome

    def _gradient_of_inputs(self, part: Rows) -> Tensor:
        """Also adds to the gradients of the parameters. A graph can be used only once."""
        assert part.gradients is not None, "a backward pass starts from the gradients of the updates"
        graph = part.graph if self.is_good(part.graph) else None
        if graph is not None:
            x_RD, u_RD = graph.inputs, graph.updates
        else:
            x_RD = self.device.load(part.inputs.detach()).requires_grad_()
            u_RD = self._updates(x_RD, part.lengths, part.positions)
        try:
            # loaded only now, so that the copy overlaps with computing the updates
            run_backward(u_RD, self.device.load(part.gradients))
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
        """Call it before a step. If enough graphs need the parameters, the step takes place on a copy of them."""
        version = self._version
        if version is None:
            return
        if version.generation != self.generation or version.rows < _ROWS_WORTH_A_COPY:
            version.overwrite()
        else:
            # all of them or, for want of memory, none
            copies = [parameter.data.clone() for parameter in self._parameters]
            for parameter, copied in zip(self._parameters, copies, strict=True):
                parameter.data = copied
            version.stash()
        self._version = None

    def export_state(self) -> State:
        """Copies the block's parameters and persistent buffers, the optimizer's moments of each parameter, and the
        accumulated gradients.

        A parameter that has never had a gradient has no moments. Raises StateError if a number is not finite.
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

    def export_block(self, version: int) -> State | None:
        """Copies the block's parameters and persistent buffers at this version. None if they have changed since, and no
        graph keeps that version.

        Raises StateError if a number is not finite.
        """
        tensors = block_tensors(self.block)
        if version != self.version:
            kept = self._kept_versions.get(version)
            if kept is None or not kept.is_whole or kept.generation != self.generation:
                return None
            names = [name for name, _ in self.block.named_parameters()]
            tensors |= dict(zip(names, kept.parameters, strict=True))
        copies = {
            BLOCK + name: tensor.detach().to("cpu", copy=True).contiguous()
            for name, tensor in tensors.items()
        }
        check_numbers(self.uid, copies)
        return copies

    def checkpoint(self) -> Checkpoint:
        """A copy of its state and its update count. Raises StateError if a number is not finite."""
        state = self.export_state()
        return Checkpoint(state, self.update_count, self.source)

    @property
    def source(self) -> str:
        """The peer that gave the present state, while it is on probation; empty if the state is this node's own."""
        return self._source if self.guard.is_on_probation else ""

    def check_state(self, state: Mapping[str, Tensor], update_count: int) -> list[str]:
        """Returns the names of the parameters that have moments.

        Raises StateError if a name, shape or dtype is not this expert's, or a number is not finite.
        """
        return check_state(self.uid, state, update_count, self.form)

    def require_good(self, state: Mapping[str, Tensor], update_count: int) -> list[str]:
        """Like `check_state`, for another peer's state. Also raises StateError if no training can have produced it."""
        stepped = self.check_state(state, update_count)
        known = [self._first_scale, Scale.of(dict(self.block.named_parameters()))]
        require_plausible(self.uid, state, update_count, known, self._settings)
        return stepped

    def import_state(self, state: Mapping[str, Tensor], update_count: int, source: str = "") -> None:
        """Continues from an exported state as if training had never stopped.

        `source`: the peer that gave the state, if not this node. Such a state must be plausible, and is on probation.
        Raises StateError as `check_state` does or, with a source, as `require_good` does, and then changes nothing.
        """
        self.settle()
        check = self.require_good if source else self.check_state
        stepped = check(state, update_count)
        if source:
            self._keep_own_state()
        parameters = dict(self.block.named_parameters())
        self._changes += 1
        with torch.no_grad():
            for name, tensor in block_tensors(self.block).items():
                tensor.copy_(state[BLOCK + name])
        device, moments = self.device.torch_device, self.optimizer.moments
        self.optimizer.replace_state(
            {
                parameters[name]: {m: state[moment_name(name, m)].to(device, copy=True) for m in moments}
                for name in stepped
            }
        )
        self._accumulated = self._accumulated_in(state)
        self.update_count = update_count
        if source != AVERAGED:  # what an average moved since its base is known to whoever made it
            self.own_moves.start(moving_tensors(state))
        self._imported = object()
        self._source = source
        if source:
            self.guard.doubt(is_average=source == AVERAGED)
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
        """Makes the present state the one to return to, unless it has to prove good first. Raises StateError if it
        is bad.
        """
        if not self.guard.may_keep:
            return
        if not self._is_sound(self.guard.check):
            raise StateError(f"expert {self.uid} was rolled back before its state was replaced")
        self.guard.keep()
        self._own_count = self.update_count

    def _is_sound(self, check: Callable[[], bool]) -> bool:
        """The result of the guard's `check`. After a rollback on probation, restores the update count too.

        A rollback drops the accumulated gradients, because they were computed with bad parameters.
        """
        source = self.source
        if check():
            return True
        self._accumulated = None
        self.own_moves.lose_start()
        if source:
            self.update_count, self.refuted = self._own_count, source
        if self.update_count and not self.optimizer.state:
            # it returned to its initial parameters; a state that counts updates has moments
            self.optimizer.replace_state({p: self.optimizer.no_moments(p) for p in self._parameters})
        return False

    def _prepare_step(self, callers: Mapping[str, int], norm: Tensor | None = None) -> StepOutcome:
        """Makes the step due, or skips it if the gradients are not finite. `norm`: the gradients' norm, if it is known.

        `callers`: the callers that sent the gradients, and their rows.
        """
        if norm is None:
            norm = get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        size = float(norm)
        if not isfinite(size):
            return self._skip_step()
        if size > self._settings.clip_norm:
            clip_grads_with_norm_(self._parameters, self._settings.clip_norm, norm)
        self.callers.note_step(callers)
        self.optimizer.learning_rate = self._learning_rate()
        self.update_count = min(self.update_count + 1, MAX_UPDATE_COUNT)
        self.updated_at = clock.now()
        self._step_is_due = True
        return StepOutcome.TAKEN

    def _skip_step(self) -> StepOutcome:
        is_good = self._is_sound(self.guard.check)
        return StepOutcome.SKIPPED if is_good else StepOutcome.SKIPPED | StepOutcome.ROLLED_BACK

    def _learning_rate(self) -> float:
        spec = self._settings
        return step_size(self.update_count, spec.learning_rate, spec.warmup_updates, spec.decay_updates)

    def _fetched(self, tensor_RD: Tensor, name: str, is_finite: bool = False) -> Tensor:
        """Starts the copy to the CPU, which is complete after `device.wait`. Raises ExpertError if a number is not
        finite.

        `is_finite`: whether all numbers are known to be finite.
        """
        fetched_RD = self.device.fetch(tensor_RD)
        if not (is_finite or self.device.is_finite(tensor_RD)):
            self._is_sound(self.guard.check)
            raise ExpertError(StatusCode.INTERNAL, f"the {name} of expert {self.uid} are not finite")
        return fetched_RD


def expert_bytes(manifest: Manifest) -> int:
    """Estimates the memory of one expert: weights, gradients, moments, the guard's half and the sketches of its moves.

    Gradients are counted twice: those of a batch, and those that accumulate. Allocates nothing. The same for every
    precision: parameters are always float32, and bfloat16 matrices last for one batch.
    """
    block = weightless_block(manifest)
    weights = sum(parameter.nbytes for parameter in block.parameters())
    copies = 1 + manifest.optimizer.moments
    state = copies * weights
    gradients = (1 if manifest.optimizer.rows_per_update == 1 else 2) * weights
    sketches = copies * sum(map(sketch_bytes, block.parameters()))
    return state + gradients + state // 2 + sketches + sum(buffer.nbytes for buffer in block.buffers())


def experts_by_default(free_bytes: Iterable[int], manifest: Manifest) -> int:
    """How many experts a node hosts if nobody says: as many as fit into a quarter of each device's free memory, but at
    least one, and at most all of the swarm.
    """
    size = expert_bytes(manifest)
    count = sum(int(_FREE_MEMORY_SHARE * free / size) for free in free_bytes)
    return min(max(1, count), manifest.experts_total)
