"""An upper bound: how many tokens a second a swarm could train if every row went to the replica where it costs least.

Each token sends rows to experts in proportion to their popularity, and a replica's node computes only so many rows a
second, or carries only so many over its link. The largest throughput for which some split of each expert's rows over
its replicas overloads no node is a concurrent flow. By Hall's theorem it is the smallest ratio of capacity to demand
over all sets of experts, which the minimum cut names (Dinkelbach 1967; Cunningham 1985). A few maximum flows find it
exactly.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, maximum_flow

Numbers = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

_UNIT = 2**30
"""The whole number that represents all demand, since scipy's flow works on integers. Larger capacities are as good as
no limit.
"""
_MOST_ROUNDS = 64


@dataclass(frozen=True)
class Ideal:
    """Bounds in tokens a second."""

    as_placed: float
    """The bound with the present replicas."""
    free: float
    """The bound if every node could compute rows of any expert: no placement is better."""


def ideal_throughput(
    demand: Numbers, hosts: Sequence[Sequence[int]], capacity: Numbers, wanted: float = float("inf")
) -> Ideal:
    """`demand` [E]: rows that one token sends to each expert. `hosts` [E]: the nodes that have each expert. `capacity`
    [N]: rows that each node computes in a second. `wanted`: the largest number of tokens a second that all trainers
    could send.
    """
    total = float(demand.sum())
    free = min(wanted, float(capacity.sum()) / total) if total else wanted
    return Ideal(_as_placed(demand, hosts, capacity, free), free)


def _as_placed(demand: Numbers, hosts: Sequence[Sequence[int]], capacity: Numbers, most: float) -> float:
    """The bound with the present replicas, at most `most`. By Newton's method: each cut gives a lower throughput, until
    one can be carried.
    """
    throughput = most
    for _ in range(_MOST_ROUNDS):
        cut = _tightest(demand * throughput, hosts, capacity)
        if cut is None:
            break
        reached = np.unique([node for expert in cut for node in hosts[expert]]).astype(np.int64)
        lower = float(capacity[reached].sum()) / float(demand[cut].sum())
        if lower >= throughput * (1 - 1e-6):
            return min(lower, throughput)
        throughput = lower
        if not throughput:
            break
    return throughput


def _tightest(rows: Numbers, hosts: Sequence[Sequence[int]], capacity: Numbers) -> Integers | None:
    """The experts whose hosts together can't compute their `rows` a second; None if all can."""
    if not rows.sum():
        return None
    experts, nodes, unit = len(rows), len(capacity), _UNIT / float(rows.sum())
    source, sink = experts + nodes, experts + nodes + 1
    asked = np.floor(rows * unit).astype(np.int64)
    counts = [len(some) for some in hosts]
    placed = np.fromiter((node for some in hosts for node in some), np.int64, sum(counts))
    begins = np.concatenate(
        [np.full(experts, source), np.repeat(np.arange(experts), counts), experts + np.arange(nodes)]
    )
    ends = np.concatenate([np.arange(experts), experts + placed, np.full(nodes, sink)])
    room = np.ceil(np.minimum(capacity * unit, _UNIT)).astype(np.int64)
    limits = np.concatenate([asked, np.full(len(placed), _UNIT), room]).astype(np.int32)
    graph = csr_array((limits, (begins, ends)), shape=(sink + 1, sink + 1))
    flow = maximum_flow(graph, source, sink)
    if flow.flow_value >= asked.sum():
        return None
    left = csr_array(graph - flow.flow)
    left.data = np.where(left.data > 0, 1, 0)
    left.eliminate_zeros()
    reached = breadth_first_order(left, source, return_predecessors=False)
    found: Integers = np.sort(reached[reached < experts]).astype(np.int64)
    return found
