"""Exact search: the inner products of queries with all vectors of some shards, and the best over all of them.

Shapes: Q queries, N passages of a shard, D numbers in a vector.
"""

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray

from dht.memory import Vectors
from expert_server.memory.shard import Shard
from peer.wire import memory_pb2

MOST_PRODUCTS = 2**22
"""Inner products computed at once: 16 MiB."""
NO_SCORE = -(2**31)
"""The score of revoked passages."""
_CACHE_BYTES = 2**26
_FEWEST_DIMENSIONS = 16
"""The fewest dimensions for which torch's product of bytes is used: with a single one, its result is wrong."""
_ROWS = 4096
"""Vectors that are multiplied at a time, if they must be converted to floats first."""


class VectorCache:
    """The vectors of recently searched shards, in memory. For any thread.

    Reading them from files that the system has in memory takes longer than searching them.
    """

    def __init__(self, most_bytes: int = _CACHE_BYTES) -> None:
        self._most_bytes = most_bytes
        self._kept: OrderedDict[weakref.ref[Shard], torch.Tensor] = OrderedDict()
        """The one used last comes last. If passages are revoked, another shard takes this one's place, and its vectors
        go with it.
        """
        self.nbytes: int = 0
        # the collector may forget a shard while the lock is held
        self._lock = threading.RLock()

    def columns_of(self, shard: Shard) -> torch.Tensor:
        """The vectors as columns, (D, N). Raises OSError if they are not cached and can't be read."""
        key = weakref.ref(shard)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        columns = columns_of(shard)
        with self._lock:
            self._forget(key)  # another thread may have read them too
            self._kept[weakref.ref(shard, self._forget)] = columns
            self.nbytes += columns.nbytes
            while self.nbytes > self._most_bytes:
                self._forget(next(iter(self._kept)))
        return columns

    def _forget(self, key: weakref.ref[Shard]) -> None:
        with self._lock:
            if (columns := self._kept.pop(key, None)) is not None:
                self.nbytes -= columns.nbytes


@dataclass(frozen=True)
class ShardGroup:
    """Shards of a call that are searched for the same queries."""

    queries: NDArray[np.intp]
    """The numbers of the queries."""
    numbers: list[int] = field(default_factory=list)
    """The numbers of the shards in the request."""
    shards: list[Shard] = field(default_factory=list)

    def parts(self) -> Iterator["ShardGroup"]:
        """The same in groups of some shards each."""
        part, rows = ShardGroup(self.queries), 0
        for number, shard in zip(self.numbers, self.shards, strict=True):
            size = len(shard)
            if part.shards and (rows + size) * len(self.queries) > MOST_PRODUCTS:
                yield part
                part, rows = ShardGroup(self.queries), 0
            part.numbers.append(number)
            part.shards.append(shard)
            rows += size
        yield part


class Best:
    """The best passages found for each query so far, over some shards."""

    def __init__(self, queries: int, k: int) -> None:
        self.scores: NDArray[np.int64] = np.full((queries, k), NO_SCORE, np.int64)
        self.shards: NDArray[np.int64] = np.zeros((queries, k), np.int64)
        self.positions: NDArray[np.int64] = np.zeros((queries, k), np.int64)

    def add(
        self,
        queries: NDArray[np.intp],
        numbers: NDArray[np.int64],
        positions: NDArray[np.int64],
        scores: NDArray[np.int32],
    ) -> None:
        """Adds the best passages of some shards for these queries. Of equal scores, those added first stay first.

        `numbers`: the numbers of their shards in the request.
        """
        k = self.scores.shape[1]
        joined = np.concatenate((self.scores[queries], scores), axis=1)
        best = np.argsort(np.negative(joined), axis=1, kind="stable")[:, :k]
        for kept, new in ((self.scores, scores), (self.positions, positions), (self.shards, numbers)):
            kept[queries] = np.take_along_axis(np.concatenate((kept[queries], new), axis=1), best, axis=1)

    def reply(self, shards: Sequence[Shard | None]) -> memory_pb2.SearchReply:
        """The reply to the call. `shards`: those of the request."""
        text_roots: dict[bytes, int] = {}
        reply = memory_pb2.SearchReply()
        for row, scores in enumerate(self.scores):
            found = reply.found.add()
            count = int((scores > NO_SCORE).sum())
            found.scores.extend(scores[:count].tolist())
            found.shards.extend(self.shards[row, :count].tolist())
            found.positions.extend(self.positions[row, :count].tolist())
            for number, position in zip(found.shards, found.positions, strict=True):
                shard = shards[number]
                assert shard is not None, "what was found was searched"
                text = shard.text_at(position)
                is_elsewhere = text.root != shard.root
                found.texts.append(
                    text_roots.setdefault(text.root, len(text_roots)) + 1 if is_elsewhere else 0
                )
                found.text_positions.append(text.position if is_elsewhere else 0)
        reply.text_roots.extend(text_roots)
        return reply


def columns_of(shard: Shard) -> torch.Tensor:
    """The vectors of a shard as columns, (D, N). Raises OSError if they can't be read."""
    rows = shard.vectors()
    # torch warns about read-only arrays, and takes the strides of an axis of one row as numpy gives them
    own = rows.flags.writeable and rows.strides == (rows.shape[1], 1)
    return torch.from_numpy(rows if own else rows.copy()).T


def search_together(
    shards: Sequence[Shard],
    queries: Vectors,
    k: int,
    columns_of: Callable[[Shard], torch.Tensor] = columns_of,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int32]]:
    """The best passages over some shards: the shards' indices, the positions there, and the scores, all (Q, k).

    Fewer than k if fewer are not revoked. Of equal scores, those of the first shards and positions. Raises OSError if a
    shard can't be read.
    """
    ends = np.cumsum([len(shard) for shard in shards])
    starts = np.insert(ends[:-1], 0, 0)
    k = min(k, sum(shard.live for shard in shards))
    places, scores = np.empty((len(queries), k), np.int64), np.empty((len(queries), k), np.int32)
    step = max(1, MOST_PRODUCTS // int(ends[-1]))
    for start in range(0, len(queries), step) if k else ():
        some = torch.from_numpy(queries[start : start + step].copy())
        products = [_inner_products(some, columns_of(shard)) for shard in shards]
        for shard, part in zip(shards, products, strict=True):
            if shard.live < part.shape[1]:
                part[:, shard.revoked()] = NO_SCORE
        for row, found in enumerate(np.concatenate(products, axis=1), start):
            places[row] = best = _largest(found, k)
            scores[row] = found[best]
    numbers = np.searchsorted(ends, places, side="right")
    return numbers, places - starts[numbers], scores


def _inner_products(queries: torch.Tensor, columns: torch.Tensor) -> NDArray[np.int32]:
    """The inner products of all pairs: (Q, N)."""
    if queries.shape[1] >= _FEWEST_DIMENSIONS and _multiplies_bytes_exactly():
        whole: NDArray[np.int32] = torch._int_mm(queries, columns).numpy()
        return whole
    # sums of up to 1024 products of signed bytes are whole numbers up to 2^24, which float32 holds exactly
    left, count = queries.float(), columns.shape[1]
    parts = [left @ columns[:, at : at + _ROWS].float() for at in range(0, count, _ROWS)]
    return torch.cat(parts, 1).to(torch.int32).numpy()


@cache
def _multiplies_bytes_exactly() -> bool:
    """Whether torch's product of bytes is exact here, which is several times as fast. On some processors, sums
    saturate.
    """
    rng = np.random.default_rng(0)
    for queries, dimensions in ((1, 256), (5, 1024), (64, 250)):
        rows = rng.integers(-128, 128, (queries + 66, dimensions), np.int8)
        # the last vector is the only query of the first round, and the one most likely to saturate
        rows[-4:] = np.array([[0], [-128], [-127], [127]], np.int8)
        left, right = torch.from_numpy(rows[-queries:]), torch.from_numpy(rows)
        try:
            found = torch._int_mm(left, right.T)
        except (AttributeError, RuntimeError):
            return False
        if not torch.equal(found.long(), left.long() @ right.long().T):
            return False
    return True


def _largest(scores: NDArray[np.int32], k: int) -> NDArray[np.int64]:
    """The positions of the k largest, in descending order; of equal ones, the first."""
    least = np.partition(scores, len(scores) - k)[len(scores) - k]
    above, equal = np.flatnonzero(scores > least), np.flatnonzero(scores == least)
    best = np.concatenate((above, equal[: k - len(above)]))
    return best[np.argsort(-scores[best], kind="stable")]
