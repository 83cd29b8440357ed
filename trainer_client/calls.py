"""What one expert is asked and answers, and the network as dispatch sees it: tests put a function in its place."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

from dht.registry import NodeInfo
from dht.uid import UID
from peer.codec import Floats
from peer.errors import ExpertError

Direction: TypeAlias = Literal["forward", "backward"]


@dataclass(frozen=True)
class Request:
    """What one expert is asked: its rows in segments, inputs and, backward, the gradients of its outputs."""

    uid: UID
    lengths: Sequence[int]
    """Rows of each segment."""
    positions: Sequence[int]
    """Of each row in its sequence."""
    inputs: Floats
    """[R, D]"""
    gradients: Floats | None
    """[R, D], or None in forward."""
    keep: bool = False
    """In forward: whether a backward call is meant to follow."""
    kept: "KeptAt | None" = None
    """In backward: where the node keeps the inputs, so that they need not be sent again."""


@dataclass(frozen=True)
class KeptAt:
    """How to name a forward pass that the node that answered it has kept."""

    request_id: bytes
    index: int


@dataclass(frozen=True)
class Answer:
    """What one expert answered: a tensor [R, D], or why it did not."""

    index: int
    """Which of the requests this answers."""
    tensor: Floats | None
    error: ExpertError | None = None
    update_count: int = 0
    """Optimizer steps the replica has taken."""
    kept: KeptAt | None = None
    """In forward: set when the node has kept what it was sent."""
    skipped_update: bool = False
    """In backward: the expert's guard refused the step."""
    rolled_back: bool = False
    """In backward: the expert went back to its last good state."""


class ExpertCaller(Protocol):
    """The network, as dispatch sees it."""

    def call(
        self, node: NodeInfo, direction: Direction, requests: Sequence[Request], deadline_s: float
    ) -> AsyncIterator[Answer]:
        """Yields answers in any order. Raises ExpertError when the call as a whole failed; then no more come."""
        ...
