"""What autograd kept of an expert's forward passes, and the parameters that it needs for the way back.

A step changes the parameters in place. Graphs of forward passes before it keep theirs where the step took place on a
copy (weight stashing: Narayanan et al. 2019, PipeDream, section 3.3): the gradient is then that of the outputs which
the caller was given.
"""

from dataclasses import dataclass
from weakref import ref

from torch import Tensor, nn


class Version:
    """The parameters as they are between two optimizer steps, for the graphs of forward passes that used them."""

    def __init__(self, block: nn.Module, generation: object) -> None:
        self.generation = generation
        self.tensors = {name: p.data.requires_grad_(p.requires_grad) for name, p in block.named_parameters()}
        """By name: the parameters' memory, as leaves of their own."""
        self.bytes = 0
        """Memory that is held for the graphs alone, after a step that spared it."""
        self.is_whole = True
        """Whether no step has overwritten it."""
        self._graphs: set[ref[Graph]] = set()

    def add(self, graph: "Graph") -> None:
        self._graphs.add(ref(graph, self._graphs.discard))

    def discard(self, graph: "Graph") -> None:
        """Of a graph that was used up."""
        self._graphs.discard(ref(graph))

    @property
    def rows(self) -> int:
        """Of all graphs that may still be used."""
        graphs = (found() for found in list(self._graphs))
        return sum(len(graph.inputs) for graph in graphs if graph is not None)


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Graph:
    """What autograd kept of one forward pass. Good for one backward pass."""

    inputs: Tensor
    outputs: Tensor
    version: Version
    bytes: int
    """Memory it holds, about; parameters not counted."""
