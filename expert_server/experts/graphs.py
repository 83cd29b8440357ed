"""What autograd kept of an expert's forward passes, and the parameters that it needs for the way back.

A step changes the parameters in place. Graphs of forward passes before it keep theirs where the step took place on a
copy (weight stashing: Narayanan et al. 2019, PipeDream, section 3.3): the gradient is then that of the outputs which
the caller was given.
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
        self.bytes = 0
        """Memory that is held for the graphs alone, after a step that spared it."""
        self.is_whole = True
        """Whether no step has overwritten it."""
        self._graphs: set[ref[ForwardGraph]] = set()

    def add(self, graph: "ForwardGraph") -> None:
        self._graphs.add(ref(graph, self._graphs.discard))

    def discard(self, graph: "ForwardGraph") -> None:
        """Of a graph that was used up."""
        self._graphs.discard(ref(graph))

    @property
    def rows(self) -> int:
        """Of all graphs that may still be used."""
        graphs = (found() for found in list(self._graphs))
        return sum(len(graph.inputs) for graph in graphs if graph is not None)


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class ForwardGraph:
    """What autograd kept of one forward pass. Good for one backward pass."""

    inputs: Tensor
    outputs: Tensor
    version: WeightVersion
    bytes: int
    """Memory it holds, about; parameters not counted."""


class ParameterSlots:
    """Where a block's parameters are, to put a version's there for one pass. torch's functional_call takes 0.1 ms."""

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
