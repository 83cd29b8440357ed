"""Monte-Carlo Kademlia look-ups in networks too large to simulate: the same search over tables that are drawn as
needed.

Nodes have random IDs; the first 64 bits stand for all 160. A node knows up to 20 others at each distance (one half of
all nodes, one quarter, ...), and answers with those 20 of them that are nearest to a key. The five nearest nodes of all
hold the value. Nodes are asked in rounds; those of a round answer at the same time.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from peer.kademlia.search import IterativeSearch

BUCKET = 20
HOLDERS = 5
_BITS = 64

Answer = Callable[[int], Sequence[int]]
"""Returns the nodes that a node names in its answer."""


def walk(
    key: int, start: Sequence[int], holders: set[int], answer: Answer, reach: int
) -> tuple[IterativeSearch, int]:
    """Does one look-up. Returns the search, and how many questions it asked, apart from those to witnesses. `reach`:
    see `IterativeSearch`.
    """
    search = IterativeSearch(key, start, reach=reach)
    questions = 0
    while wanted := search.ask():
        questions += len(wanted)
        for node in wanted:
            search.answered(node, answer(node), node in holders)
    return search, questions


class DrawnNetwork:
    """Nodes with random IDs. What a node knows is drawn when it is first asked."""

    def __init__(self, nodes: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.ids: NDArray[np.uint64] = np.unique(rng.integers(0, 2**_BITS, nodes, dtype=np.uint64))
        self._seed = seed
        self._tables: dict[int, NDArray[np.uint64]] = {}

    def named(self, node: int, key: int) -> list[int]:
        """A node's answer: the nearest nodes to the key that it knows."""
        table = self._table(node)
        return nearest(table, key, BUCKET)

    def holders(self, key: int) -> set[int]:
        return set(nearest(self.ids, key, HOLDERS))

    def _table(self, node: int) -> NDArray[np.uint64]:
        if node not in self._tables:
            rng = random.Random(f"{self._seed} {node}")
            known: list[int] = []
            for bits in range(_BITS):
                size = 1 << (_BITS - 1 - bits)
                low = (node ^ size) & ~(size - 1)
                first, last = np.searchsorted(self.ids, [np.uint64(low), np.uint64(low + size - 1)])
                known += rng.sample(range(first, last), min(BUCKET, last - first))
                own = node & ~(size - 1)
                inside = np.searchsorted(self.ids, [np.uint64(own), np.uint64(own + size - 1)])
                if inside[1] - inside[0] <= 1:
                    break
            self._tables[node] = self.ids[known]
        return self._tables[node]


def nearest(ids: NDArray[np.uint64], key: int, count: int) -> list[int]:
    """The nodes nearest to the key by XOR, in no order."""
    distances = ids ^ np.uint64(key)
    if count < len(ids):
        ids = ids[np.argpartition(distances, count)[:count]]
    return [int(node) for node in ids]


def measure(nodes: int, lookups: int, seed: int) -> Mapping[str, float]:
    """Measures hops and questions of look-ups of random keys from random nodes."""
    network = DrawnNetwork(nodes, seed)
    rng, reach = random.Random(seed), 2**_BITS * HOLDERS // nodes
    hops, rounds, questions = [], [], []
    for _ in range(lookups):
        key = rng.getrandbits(_BITS)
        start = network.named(int(rng.choice(network.ids)), key)
        search, asked = walk(key, start, network.holders(key), partial(network.named, key=key), reach)
        assert search.found_after is not None, "the search missed the holders"
        hops.append(search.found_after)
        rounds.append(search.rounds)
        questions.append(asked)
    return {
        "nodes": nodes,
        "lookups": lookups,
        "hops_mean": float(np.mean(hops)),
        "hops_max": max(hops),
        "rounds_mean": float(np.mean(rounds)),
        "calls_mean": float(np.mean(questions)),
    }
