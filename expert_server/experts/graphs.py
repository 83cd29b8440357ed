"""The rows an expert computes, the autograd graphs of its forward passes, and the weights those graphs need.

An optimizer step changes the parameters in place. A graph from before the step stays usable if the step took place on
a copy of the parameters (weight stashing: Narayanan et al. 2019, PipeDream, section 3.3). Its gradient is then that of
the updates the caller received.

Shape suffixes: R = rows, S = segments, D = width.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import ref

from torch import Tensor, nn


class WeightVersion:
    """The parameters as they are between two optimizer steps, for the graphs of forward passes that used them."""

    def __init__(self, parameters: Sequence[nn.Parameter], generation: object) -> None:
        self.generation = generation
        self.parameters = [nn.Parameter(each.data, each.requires_grad) for each in parameters]
        """The same memory, as leaves of their own."""
        self._is_whole = True
        self._stashed_bytes = 0
        self._graphs: set[ref[ForwardGraph]] = set()

    @property
    def is_whole(self) -> bool:
        """Whether no step has overwritten it."""
        return self._is_whole

    @property
    def bytes(self) -> int:
        """Memory held for the graphs alone: none until the expert's parameters have moved to a copy."""
        return self._stashed_bytes

    @property
    def rows(self) -> int:
        """Rows of all graphs that may still be used."""
        graphs = (found() for found in list(self._graphs))
        return sum(len(graph.inputs) for graph in graphs if graph is not None)

    def add(self, graph: "ForwardGraph") -> None:
        self._graphs.add(ref(graph, self._graphs.discard))

    def discard(self, graph: "ForwardGraph") -> None:
        """Forgets a graph that was used up."""
        self._graphs.discard(ref(graph))

    def stash(self) -> None:
        """Notes that the expert's parameters have moved to a copy, so the next step leaves this version whole."""
        self._stashed_bytes = sum(parameter.nbytes for parameter in self.parameters)

    def overwrite(self) -> None:
        """Notes that the next step changes this version in place."""
        self._is_whole = False


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class ForwardGraph:
    """What autograd kept of one forward pass. Good for one backward pass."""

    inputs: Tensor
    updates: Tensor
    version: WeightVersion
    bytes: int
    """About how much memory it holds, without the parameters."""


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
    """[R, D], of the updates; in backward only."""
    graph: ForwardGraph | None = None
    """What their forward pass kept, if anything."""

    def __len__(self) -> int:
        return self.inputs.shape[0]


class ParameterSlots:
    """Where a block's parameters are, to put those of a version there for one pass.

    torch's functional_call does the same but takes 0.1 ms.
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
