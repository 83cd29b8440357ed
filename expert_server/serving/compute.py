"""One batch on one expert: what the compute threads do.

Shape suffixes: R = rows, D = hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf, sqrt
from operator import itemgetter

import torch
from torch import Tensor

from expert_server.experts.expert import BackwardPart, Expert
from expert_server.experts.graphs import ForwardGraph
from expert_server.serving.batching import WorkItem
from peer.errors import ExpertError

MOST_APART = 10.0
"""By how much callers' gradients may differ in size, row by row, that they share an optimizer step."""


@dataclass(slots=True)
class Result:
    """`tensor` [R, D]: outputs in forward, gradients of the inputs in backward; on the CPU, float32."""

    tensor: Tensor
    update_count: int
    graph: ForwardGraph | None = None
    """Of a forward pass that was to be kept, unless it was merged with others."""
    skipped_update: bool = False
    """In backward: the guard refused the step."""
    rolled_back: bool = False
    """In backward: the expert went back to its last good state."""


def compute(expert: Expert, batch: Sequence[WorkItem]) -> list[Result | ExpertError]:
    """Computes work of one expert and direction as one batch, in backward with one optimizer step.

    When the batch fails each work is computed by itself, so that one caller's numbers spoil no other's. For the same
    reason callers whose gradients differ grossly in size take a step each, and each step is clipped by itself. The last
    step may be left for `Expert.settle`.
    """
    if batch[0].direction == "backward" and len(groups := by_size(batch)) > 1:
        results = {
            work: result
            for group in groups
            for work, result in zip(group, _computed(expert, group), strict=True)
        }
        return [results[work] for work in batch]
    return _computed(expert, batch)


def by_size(batch: Sequence[WorkItem]) -> list[list[WorkItem]]:
    """Groups of works whose callers' gradients are alike in size: root mean squares within a factor of MOST_APART."""
    callers: dict[str, list[WorkItem]] = {}
    for work in batch:
        callers.setdefault(work.caller, []).append(work)
    if len(callers) == 1:
        return [list(batch)]
    groups: list[list[WorkItem]] = []
    least = -inf
    for size, works in sorted(((_size_of(works), works) for works in callers.values()), key=itemgetter(0)):
        if not groups or not size <= MOST_APART * least:  # NaN stands alone, too
            groups.append([])
            least = size
        groups[-1] += works
    return groups


def _size_of(works: Sequence[WorkItem]) -> float:
    """Root mean square of the gradients, over all rows of one caller."""
    gradients = [work.gradients for work in works if work.gradients is not None]
    squares = sum(float(gradient.square().sum()) for gradient in gradients)
    return sqrt(squares / max(1, sum(gradient.numel() for gradient in gradients)))


def _computed(expert: Expert, batch: Sequence[WorkItem]) -> list[Result | ExpertError]:
    step = _forward if batch[0].direction == "forward" else _backward
    skipped = expert.skipped_updates
    try:
        results: list[Result | ExpertError] = list(step(expert, batch))
        if len(batch) == 1 or expert.skipped_updates == skipped:
            return results
        expert.skipped_updates = skipped  # whose gradients they were, the works tell one by one
    except ExpertError as error:
        if len(batch) == 1:
            return [error]
    alone = [replace(work, graph=None) for work in batch]  # graphs are used up
    return [result for work in alone for result in _computed(expert, [work])]


def _forward(expert: Expert, batch: Sequence[WorkItem]) -> list[Result]:
    if len(batch) == 1 and batch[0].keep:
        work = batch[0]
        output_RD, graph = expert.forward_with_graph(work.inputs, work.lengths, work.positions)
        return [Result(output_RD, expert.update_count, graph)]
    output_RD = expert.forward(
        _joined([work.inputs for work in batch]),
        _joined([work.lengths for work in batch]),
        _joined([work.positions for work in batch]),
    )
    parts = torch.split(output_RD, [work.rows for work in batch])
    return [Result(part, expert.update_count) for part in parts]


def _backward(expert: Expert, batch: Sequence[WorkItem]) -> list[Result]:
    """Works with a good graph go by themselves, the others as one; all of them before one optimizer step."""
    ready = [work for work in batch if expert.is_good(work.graph)]
    others = [work for work in batch if not expert.is_good(work.graph)]
    parts = [_part([work], work.graph) for work in ready]
    if others:
        parts.append(_part(others, None))
    skipped, rollbacks = expert.skipped_updates, expert.guard.rollbacks
    gradients = expert.backward(parts, may_defer=True)
    guard = expert.skipped_updates > skipped, expert.guard.rollbacks > rollbacks
    by_work = dict(zip(ready, gradients, strict=False))
    if others:
        split = torch.split(gradients[-1], [work.rows for work in others])
        by_work |= dict(zip(others, split, strict=True))
    return [Result(by_work[work], expert.update_count, None, *guard) for work in batch]


def _part(works: Sequence[WorkItem], graph: ForwardGraph | None) -> BackwardPart:
    return BackwardPart(
        _joined([work.inputs for work in works]),
        _joined([work.gradients for work in works if work.gradients is not None]),
        _joined([work.lengths for work in works]),
        _joined([work.positions for work in works]),
        graph,
    )


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))
