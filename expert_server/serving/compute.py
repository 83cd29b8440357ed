"""Computes one batch on one expert, or work of several narrow experts at once. This is what the compute threads run.

Shape suffixes: R = rows, D = width.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import inf
from operator import itemgetter

import torch
from torch import Tensor

from expert_server.experts.accumulation import MOST_APART, size_of
from expert_server.experts.direction import direction_of
from expert_server.experts.expert import Expert
from expert_server.experts.graphs import Rows, SharedGraph, SharedPass
from expert_server.experts.grouped import LEAST_EXPERTS, backward
from expert_server.serving.batching import Result, WorkItem
from peer.errors import ExpertError

_LARGEST = torch.finfo(torch.float32).max
_BRIEF = 2**22
"""A forward pass whose number of rows times parameters is at most this takes about half a millisecond."""


def compute(expert: Expert, batch: Sequence[WorkItem]) -> list[Result | ExpertError]:
    """Computes work of one expert and direction as one batch, in backward with one optimizer step.

    If the batch fails, each work item is computed by itself, so that one caller's numbers can't spoil another's. For
    the same reason, callers whose gradients differ greatly in size take separate steps, each clipped by itself, and
    those that are held back take none (`Callers`). The last step may be left for `Expert.settle`.
    """
    if batch[0].direction == "forward":
        return _computed(expert, batch)
    clipped = [_clipped(expert, work) for work in batch]
    held = {work: expert.callers.is_held_back(work.caller) for work, _ in clipped}
    results: dict[WorkItem, Result | ExpertError] = {}
    for group in by_size([work for work, is_held in held.items() if not is_held]):
        # the steps of earlier groups may have been those of the same person's other keys
        held |= {work: expert.callers.is_held_back(work.caller) for work in group}
        if on_time := [work for work in group if not held[work]]:
            results |= zip(on_time, _computed(expert, on_time), strict=True)
    for group in by_size([work for work in held if work not in results]):
        results |= zip(group, _computed(expert, group, withhold=True), strict=True)
    return [_unclipped(results[work], factor) for work, factor in clipped]


def can_join(expert: Expert, work: WorkItem) -> bool:
    """Whether the work can be computed in one batch with other experts'. Either it has no graph of its own and is
    computed in one pass with theirs, or it follows theirs one by one, because it is short and changes no expert.
    """
    is_brief = work.direction == "forward" and len(work.rows) * expert.size <= _BRIEF
    return is_brief or (expert.grouped_block is not None and not expert.is_good(work.rows.graph))


def compute_together(experts: Sequence[Expert], works: Sequence[WorkItem]) -> list[Result | ExpertError]:
    """Computes one work item of each expert at once, all in one direction; in backward each expert takes its own step.

    In backward, the items belong to one shared forward pass, or to none. Items that can't join are computed one by one.
    """
    is_small = len(works) < LEAST_EXPERTS and works[0].shared is None
    if is_small or not _are_alike(experts) or not all(map(can_join, experts, works)):
        return [compute(expert, [work])[0] for expert, work in zip(experts, works, strict=True)]
    for expert in experts:
        expert.settle()
    if works[0].direction == "forward":
        pairs = list(zip(experts, works, strict=True))
        if not all(expert.can_extend(work.rows.caches) for expert, work in pairs):
            return [compute(expert, [work])[0] for expert, work in pairs]
        return _forward_together(experts, works)
    return _backward_together(experts, works)


def _are_alike(experts: Sequence[Expert]) -> bool:
    """Whether one pass can compute all of these experts."""
    return len({each.is_causal for each in experts}) == 1 and all(each.grouped_block for each in experts)


def _pass_together(experts: Sequence[Expert], works: Sequence[WorkItem], keep: bool) -> SharedPass:
    block = experts[0].grouped_block
    assert block is not None, "each of them can join"
    return block.forward([expert.parameters for expert in experts], [work.rows for work in works], keep)


def _forward_together(experts: Sequence[Expert], works: Sequence[WorkItem]) -> list[Result | ExpertError]:
    keep = works[0].keep
    cached = [work.rows.cached() for work in works]
    shared = _pass_together(experts, works, keep)
    results: list[Result | ExpertError] = []
    for index, (expert, work) in enumerate(zip(experts, works, strict=True)):
        graph = SharedGraph(shared, index, expert.generation) if keep else None
        try:
            results.append(
                Result(expert.updates_in(shared, index), expert.update_count, graph, version=expert.version)
            )
            work.rows.note_version(expert.version)
        except ExpertError as error:
            work.rows.take_back(cached[index])
            results.append(error.with_traceback(None))  # it would keep this frame, and so all rows, in memory
    return results


def _backward_together(experts: Sequence[Expert], works: Sequence[WorkItem]) -> list[Result | ExpertError]:
    clipped = [_clipped(expert, work) for expert, work in zip(experts, works, strict=True)]
    works = [work for work, _ in clipped]
    ordered, shared, is_new = list(zip(experts, works, strict=True)), works[0].shared, False
    if shared is not None and _are_whole(shared, experts, works):
        ordered.sort(key=lambda pair: _graph_of(pair[1]).index)
    else:
        shared, is_new = _pass_together(experts, works, keep=True), True
    gradients = [work.rows.gradients for _, work in ordered if work.rows.gradients is not None]
    of_inputs, of_parameters = backward(shared, gradients)
    results: dict[WorkItem, Result | ExpertError] = {}
    for index, ((expert, work), own, others) in enumerate(
        zip(ordered, of_inputs, of_parameters, strict=True)
    ):
        try:
            updates = expert.updates_in(shared, index) if is_new else None
            gradient, outcome = expert.backward_by(
                work.rows,
                own,
                others,
                callers=rows_by_caller([work]),
                withhold=expert.callers.is_held_back(work.caller),
            )
            results[work] = Result(gradient, expert.update_count, step=outcome, updates=updates)
        except ExpertError as error:
            results[work] = error.with_traceback(None)  # as above
    return [_unclipped(results[work], factor) for work, factor in clipped]


def _are_whole(shared: SharedPass, experts: Sequence[Expert], works: Sequence[WorkItem]) -> bool:
    """Whether these are all experts of the pass, and none has been replaced or rolled back since."""
    return len(works) == len(shared.counts) and all(
        _graph_of(work).generation == expert.generation for expert, work in zip(experts, works, strict=True)
    )


def _graph_of(work: WorkItem) -> SharedGraph:
    assert isinstance(work.rows.graph, SharedGraph), "it shares a pass"
    return work.rows.graph


def _clipped(expert: Expert, work: WorkItem) -> tuple[WorkItem, float]:
    """Records the work's rows and their direction, and scales gradients down if they are much larger than other
    callers'. Also returns the factor, at most 1.
    """
    factor = expert.callers.note_rows(work.caller, work.group, len(work.rows), size_of([work.rows]))
    if factor != 1.0:
        assert work.rows.gradients is not None, "only backward has gradients"
        work = replace(work, rows=replace(work.rows, gradients=work.rows.gradients * factor))
    if expert.callers.compares_directions:
        expert.callers.note_direction(work.caller, len(work.rows), direction_of(work.rows))
    return work, factor


def _unclipped(result: Result | ExpertError, factor: float) -> Result | ExpertError:
    """The answer for the gradients as they were sent. A backward pass is linear in them."""
    if isinstance(result, ExpertError) or factor == 1.0:
        return result
    tensor = (result.tensor / factor).clamp(-_LARGEST, _LARGEST)
    return replace(result, tensor=tensor, is_clipped=True)


def rows_by_caller(works: Sequence[WorkItem]) -> dict[str, int]:
    rows: dict[str, int] = {}
    for work in works:
        rows[work.caller] = rows.get(work.caller, 0) + len(work.rows)
    return rows


def by_size(batch: Sequence[WorkItem]) -> list[list[WorkItem]]:
    """Groups work whose callers' gradients have similar sizes: root mean squares within a factor of MOST_APART."""
    callers: dict[str, list[WorkItem]] = {}
    for work in batch:
        callers.setdefault(work.caller, []).append(work)
    if len(callers) == 1:
        return [list(batch)]
    groups: list[list[WorkItem]] = []
    least = -inf
    for size, works in sorted(
        ((size_of([work.rows for work in works]), works) for works in callers.values()), key=itemgetter(0)
    ):
        if not groups or not size <= MOST_APART * least:  # NaN gets a group of its own too
            groups.append([])
            least = size
        groups[-1] += works
    return groups


def _computed(
    expert: Expert, batch: Sequence[WorkItem], withhold: bool = False
) -> list[Result | ExpertError]:
    is_forward = batch[0].direction == "forward"
    try:
        results = _forward(expert, batch) if is_forward else _backward(expert, batch, withhold)
        if len(batch) == 1 or not results[0].skipped_update:
            return list(results)
    except ExpertError as error:
        if len(batch) == 1:
            return [error]
    # one by one, to find whose numbers were at fault; the graphs can't be used again
    alone = [replace(work, rows=replace(work.rows, graph=None)) for work in batch]
    return [
        result
        for work in alone
        for result in _computed(expert, [work], not is_forward and expert.callers.is_held_back(work.caller))
    ]


def _forward(expert: Expert, batch: Sequence[WorkItem]) -> list[Result]:
    if len(batch) == 1 and batch[0].keep:
        output_RD, graph = expert.forward_with_graph(batch[0].rows)
        return [Result(output_RD, expert.update_count, graph, version=expert.version)]
    output_RD = expert.forward(_joined(batch))
    parts = torch.split(output_RD, [len(work.rows) for work in batch])
    return [Result(part, expert.update_count, version=expert.version) for part in parts]


def _backward(expert: Expert, batch: Sequence[WorkItem], withhold: bool) -> list[Result]:
    """Each work item with a usable graph is a part by itself, and all others are one part. All parts share one
    optimizer step.
    """
    ready = [work for work in batch if expert.is_good(work.rows.graph)]
    others = [work for work in batch if not expert.is_good(work.rows.graph)]
    parts = [work.rows for work in ready]
    updates: dict[WorkItem, Tensor] = {}
    if others:
        joined = _joined(others)
        updates_RD, graph = expert.forward_with_graph(joined)
        parts.append(replace(joined, graph=graph))
        updates = _of_works(others, updates_RD)
    gradients, outcome = expert.backward(
        parts, may_defer=True, callers=rows_by_caller(batch), withhold=withhold
    )
    by_work = dict(zip(ready, gradients, strict=False))
    if others:
        by_work |= _of_works(others, gradients[-1])
    return [
        Result(by_work[work], expert.update_count, step=outcome, updates=updates.get(work)) for work in batch
    ]


def _of_works(works: Sequence[WorkItem], joined_RD: Tensor) -> dict[WorkItem, Tensor]:
    split = torch.split(joined_RD, [len(work.rows) for work in works])
    return dict(zip(works, split, strict=True))


def _joined(works: Sequence[WorkItem]) -> Rows:
    """All rows as one part."""
    if len(works) == 1:
        return works[0].rows
    parts = [work.rows for work in works]
    gradients = [part.gradients for part in parts if part.gradients is not None]
    return Rows(
        torch.cat([part.inputs for part in parts]),
        torch.cat([part.lengths for part in parts]),
        torch.cat([part.positions for part in parts]),
        torch.cat(gradients) if gradients else None,
        caches=Rows.joined_caches(parts),
    )
