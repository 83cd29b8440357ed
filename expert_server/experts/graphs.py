"""The rows that an expert computes, the autograd graphs of its forward passes, and the weights those graphs need.

An optimizer step changes the parameters in place. A graph from before the step stays usable if the step took place on a
copy of the parameters (weight stashing: Narayanan et al. 2019, PipeDream, section 3.3). Its gradient then belongs to
the updates that the caller received.

Shape suffixes: R = rows, S = segments, D = width.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import ref

import numpy as np
import torch
from torch import Tensor, nn

from peer.layers import KeyValueCache

NODES_BYTES = 32 * 1024
"""The memory of autograd's nodes and of the tensor objects, however few the rows. Measured: 38 KB for a Transformer
block, 66 KB for a pass of four together.
"""


class WeightVersion:
    """The parameters between two optimizer steps, for the graphs of forward passes that used them."""

    def __init__(self, parameters: Sequence[nn.Parameter], generation: object) -> None:
        self.generation = generation
        self.parameters: list[nn.Parameter] = [
            nn.Parameter(each.data, each.requires_grad) for each in parameters
        ]
        """Separate leaf tensors that share the same memory."""
        self._is_whole = True
        self._stashed_bytes = 0
        self._graphs: set[ref[ForwardGraph]] = set()

    @property
    def is_whole(self) -> bool:
        """Whether no step has overwritten it."""
        return self._is_whole

    @property
    def bytes(self) -> int:
        """Memory held only for the graphs: none until the expert's parameters have moved to a copy."""
        return self._stashed_bytes

    @property
    def rows(self) -> int:
        """Rows of all graphs that may still be used."""
        graphs = (found() for found in list(self._graphs))
        return sum(len(graph.inputs) for graph in graphs if graph is not None)

    def add(self, graph: "ForwardGraph") -> None:
        self._graphs.add(ref(graph, self._graphs.discard))

    def discard(self, graph: "ForwardGraph") -> None:
        """Forgets a graph that has been used."""
        self._graphs.discard(ref(graph))

    def stash(self) -> None:
        """Records that the expert's parameters have moved to a copy, so that the next step doesn't overwrite this
        version.
        """
        self._stashed_bytes = sum(parameter.nbytes for parameter in self.parameters)

    def overwrite(self) -> None:
        """Records that the next step overwrites this version."""
        self._is_whole = False


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class ForwardGraph:
    """The graph that autograd kept of one forward pass. It can be used for one backward pass."""

    inputs: Tensor
    updates: Tensor
    version: WeightVersion
    bytes: int
    """Roughly how much memory it holds, without the parameters."""


class SharedPass:
    """A forward pass of several experts together, on copies of their parameters, which no step overwrites."""

    def __init__(
        self, inputs: Tensor, updates: Tensor, stacks: Sequence[Tensor], counts: Sequence[int], size: int
    ) -> None:
        """Inputs and updates [R, D], expert after expert. `counts`: the rows of each expert. `stacks`: their
        parameters.
        """
        self.updates: tuple[Tensor, ...] = torch.split(updates.detach(), list(counts))
        """The updates of each expert."""
        self.are_finite: bool = bool(np.isfinite(updates.detach().numpy()).all())
        """Whether all updates are finite."""
        self.counts: list[int] = list(counts)
        self._kept: tuple[Tensor, Tensor, Sequence[Tensor]] | None = (inputs, updates, stacks)
        self._bytes = size

    @property
    def bytes(self) -> int:
        """Memory held while one of its experts may still use it."""
        return self._bytes if self._kept is not None else 0

    @property
    def is_whole(self) -> bool:
        """Whether no backward pass has used it yet."""
        return self._kept is not None

    def take(self) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
        """Inputs, updates and stacks. Can be taken only once."""
        assert self._kept is not None, "it was used"
        kept, self._kept = self._kept, None
        return kept


@dataclass(frozen=True, slots=True, eq=False)
class ParameterGradients:
    """The gradients of one expert's parameters, from a backward pass of several experts."""

    tensors: Sequence[Tensor]
    """Gradients in the block's order."""
    norm: Tensor
    """The norm of all of them together: one number."""
    inputs_are_finite: bool
    """Whether the gradients of all experts' inputs in that pass are finite."""


@dataclass(frozen=True, slots=True, eq=False)
class SharedGraph:
    """One expert's part of a shared pass. It can be used for one backward pass of all its experts together."""

    version: SharedPass
    index: int
    """The expert's place in the pass."""
    generation: object
    """The expert's generation at the time of the pass."""

    @property
    def bytes(self) -> int:
        """Zero, because the shared pass holds the memory."""
        return 0


class GraphMeter:
    """Estimates the memory of one block's graphs. It measures only once, because measuring takes as long as a small
    forward pass.
    """

    def __init__(self) -> None:
        self._bytes_per_row: float | None = None

    @contextmanager
    def measuring(self, inputs: Tensor, others: Sequence[Tensor], extra: int = 0) -> Iterator[None]:
        """Counts what autograd keeps for the rows of `inputs`, without `others` and without `extra` bytes."""
        if self._bytes_per_row is not None or not torch.is_grad_enabled():
            yield
            return
        sizes: dict[int, int] = {}
        with torch.autograd.graph.saved_tensors_hooks(_count_into(sizes), _unchanged):
            yield
        for other in others:
            sizes.pop(other.untyped_storage().data_ptr(), None)
        self._bytes_per_row = max(0, sum(sizes.values()) - extra) / len(inputs)

    def bytes_of(self, rows: int) -> int:
        return NODES_BYTES + int(rows * (self._bytes_per_row or 0))


def run_backward(updates: Tensor, gradients: Tensor) -> None:
    """Calls what torch.autograd.backward calls, without its check of shapes, which would cost 0.65 s and 38 MB at the
    first call.
    """
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


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Rows that one expert computes together. Floats are float32, integers int64."""

    inputs: Tensor
    """[R, D]"""
    lengths: Tensor
    """[S], each at least 1, summing to R."""
    positions: Tensor
    """[R]"""
    gradients: Tensor | None = None
    """[R, D], of the updates; only in backward."""
    graph: ForwardGraph | SharedGraph | None = None
    """The graph that their forward pass kept, if any."""
    caches: Sequence[KeyValueCache | None] = ()
    """In forward: empty, or for each segment the cache of the rows before it, or None. These rows are added to the
    caches.
    """

    def __len__(self) -> int:
        return self.inputs.shape[0]

    def cached(self) -> list[int]:
        """How many rows each cache has."""
        return [cache.length for cache in self.caches if cache is not None]

    def note_version(self, version: int) -> None:
        """Records in the caches the version of the parameters that computed these rows."""
        for cache in self.caches:
            if cache is not None:
                cache.version = version

    def take_back(self, cached: Sequence[int]) -> None:
        """Truncates the caches to the earlier numbers of rows."""
        caches = (cache for cache in self.caches if cache is not None)
        for cache, length in zip(caches, cached, strict=True):
            cache.truncate(length)

    @staticmethod
    def joined_caches(parts: "Sequence[Rows]") -> Sequence[KeyValueCache | None]:
        """The caches of all segments of these parts, as `caches` for one."""
        if not any(part.caches for part in parts):
            return ()
        return [cache for part in parts for cache in part.caches or [None] * len(part.lengths)]


class ParameterSlots:
    """Replaces a block's parameters by those of another version for one pass. torch's functional_call does the same,
    but takes 0.1 ms.
    """

    def __init__(self, block: nn.Module) -> None:
        self._own = list(block.parameters())
        index = {parameter: number for number, parameter in enumerate(self._own)}
        self._places = [
            (module._parameters, name, index[parameter])
            for module in block.modules()
            for name, parameter in module._parameters.items()
            if parameter is not None
        ]

    @contextmanager
    def hold(self, version: WeightVersion) -> Iterator[None]:
        self._put(version.parameters)
        try:
            yield
        finally:
            self._put(self._own)

    def _put(self, parameters: Sequence[nn.Parameter]) -> None:
        for parameters_of_module, name, number in self._places:
            parameters_of_module[name] = parameters[number]
