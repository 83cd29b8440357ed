"""Exact search: the inner products of queries with all vectors of some shards, and the best over all of them.

Shapes: Q queries, N passages of a shard, D numbers in a vector.
"""

import threading
import timeit
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from dht.memory import Vectors
from expert_server.memory.shard import Shard
from peer.wire import memory_pb2

Stretch: TypeAlias = tuple[Vectors, list[int]]
"""Vectors that are next to each other in memory, (N, D), and the numbers of their shards."""

MOST_PRODUCTS = 2**22
"""Inner products computed at once: 16 MiB."""
NO_SCORE = -(2**31)
"""The score of revoked passages."""
_CACHE_BYTES, _BLOCK_BYTES = 2**26, 2**23
_FEWEST_DIMENSIONS = 16
"""The fewest dimensions for which torch's product of bytes is used: with a single one, its result is wrong."""
_ROWS = 2048
"""Vectors that are multiplied at a time, if they must be converted to floats first."""
_AT_ONCE = 16
"""The bytes that torch's product of floats and bytes reads at once."""
_ROUNDING = 256
"""A product rounded to bfloat16 differs from the exact one by at most this part of it."""
_SET = 16
"""At most this many products are compared with one another when the best ones are looked for."""
_MANY = 64
"""Which way is the quickest is measured for up to this many queries."""


@dataclass(eq=False)
class _Block:
    """Memory for the vectors of some shards, one shard after another."""

    rows_ND: Vectors
    used: int = 0
    """How many rows are taken, from the first on."""
    shards: dict[weakref.ref[Shard], slice] = field(default_factory=dict)


class VectorCache:
    """The vectors of the shards that were searched last, in memory. For any thread.

    Reading them from files that the system has in memory takes longer than searching them. Shards that were first
    searched one after the other are next to each other, so that one matrix product covers all of them. This is faster
    than one product for each.
    """

    def __init__(self, most_bytes: int = _CACHE_BYTES, block_bytes: int = _BLOCK_BYTES) -> None:
        self._most_bytes = most_bytes
        self._block_bytes = block_bytes
        self._blocks: OrderedDict[_Block, None] = OrderedDict()
        """The blocks; the one used last is at the end."""
        self._block_of: dict[weakref.ref[Shard], _Block] = {}
        self._open: dict[int, _Block] = {}
        """The block that has room, for each number of dimensions."""
        self.nbytes: int = 0
        self._gone = deque[weakref.ref[Shard]]()
        """Shards that no longer exist, whose vectors are still here."""
        self._lock = threading.Lock()

    def stretches(self, shards: Sequence[Shard]) -> Iterator[Stretch]:
        """The shards' vectors. Shards whose vectors are next to each other are returned together. Raises OSError if a
        shard must be read and can't be.
        """
        missing, here = list[int](), list[tuple[int, int, int, _Block]]()
        with self._locked():
            for number, shard in enumerate(shards):
                block = self._block_of.get(key := weakref.ref(shard))
                if block is None:
                    missing.append(number)
                else:
                    here.append((id(block), block.shards[key].start, number, block))
            for block in {each[-1] for each in here}:
                self._blocks.move_to_end(block)
        runs, end = list[tuple[_Block, int, list[int]]](), 0
        for _, begin, number, block in sorted(here):
            if not runs or runs[-1][0] is not block or begin != end:
                runs.append((block, begin, []))
            runs[-1][2].append(number)
            end = begin + len(shards[number])
        for block, begin, together in runs:
            end = begin + sum(len(shards[number]) for number in together)
            yield block.rows_ND[begin:end], together
        for number in missing:
            rows_ND = shards[number].vectors()
            self._keep(shards[number], rows_ND)
            yield rows_ND, [number]

    def _keep(self, shard: Shard, rows_ND: Vectors) -> None:
        count, dimensions = rows_ND.shape
        with self._locked():
            if weakref.ref(shard) in self._block_of:  # another thread has read it, too
                return
            block = self._open.get(dimensions)
            if block is None or block.used + count > len(block.rows_ND):
                size = max(count, self._block_bytes // dimensions)
                block = self._open[dimensions] = _Block(np.empty((size, dimensions), np.int8))
                self._blocks[block] = None
                self.nbytes += block.rows_ND.nbytes
            rows = slice(block.used, block.used + count)
            block.rows_ND[rows] = rows_ND
            block.used = rows.stop
            key = weakref.ref(shard, self._forget)
            block.shards[key], self._block_of[key] = rows, block
            while self.nbytes > self._most_bytes:
                self._drop(next(iter(self._blocks)))

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with self._lock:
            yield
        self._clear_gone()

    def _forget(self, key: weakref.ref[Shard]) -> None:
        """Drops the shard's vectors. After a revocation, another object replaces the shard, without the revoked
        vectors.
        """
        # Python may call this at any moment, even in a thread that holds the lock
        self._gone.append(key)
        self._clear_gone()

    def _clear_gone(self) -> None:
        """Does nothing if the lock is held. Its holder then does this afterwards."""
        while self._gone and self._lock.acquire(blocking=False):
            try:
                while self._gone:
                    key = self._gone.popleft()
                    if (block := self._block_of.pop(key, None)) is not None:
                        block.rows_ND[block.shards.pop(key)] = 0
                        if not block.shards:
                            self._drop(block)
            finally:
                self._lock.release()

    def _drop(self, block: _Block) -> None:
        del self._blocks[block]
        self.nbytes -= block.rows_ND.nbytes
        for key in block.shards:
            del self._block_of[key]
        dimensions = block.rows_ND.shape[1]
        if self._open.get(dimensions) is block:
            del self._open[dimensions]


@dataclass(frozen=True)
class ShardGroup:
    """Shards of a call that are searched for the same queries."""

    queries: NDArray[np.intp]
    """The numbers of the queries."""
    numbers: list[int] = field(default_factory=list)
    """The numbers of the shards in the request."""
    shards: list[Shard] = field(default_factory=list)

    @property
    def cost(self) -> int:
        """How many inner products are computed."""
        return len(self.queries) * sum(map(len, self.shards))

    def parts(self) -> Iterator["ShardGroup"]:
        """Splits the group into smaller ones."""
        sizes = [len(shard) for shard in self.shards]
        if sum(sizes) * len(self.queries) <= MOST_PRODUCTS:
            yield self
            return
        part, rows = ShardGroup(self.queries), 0
        for number, shard, size in zip(self.numbers, self.shards, sizes, strict=True):
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
        """Adds the best passages of some shards for these queries. If scores are equal, those added first come first.

        `numbers`: the numbers of their shards in the request.
        """
        k = self.scores.shape[1]
        joined = np.concatenate((self.scores[queries], scores), axis=1)
        best = np.argsort(np.negative(joined), axis=1, kind="stable")[:, :k]
        for kept, new in ((self.scores, scores), (self.positions, positions), (self.shards, numbers)):
            kept[queries] = np.take_along_axis(np.concatenate((kept[queries], new), axis=1), best, axis=1)

    def reply(self, shards: Sequence[Shard | None]) -> memory_pb2.SearchReply:
        """The reply to the call. `shards`: the shards that the request names; None for one that is not hosted."""
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


def search_together(
    shards: Sequence[Shard], queries: Vectors, k: int, vectors: VectorCache | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int32]]:
    """The best passages over some shards: the numbers of the shards, the positions there, and the scores. All (Q, k),
    or fewer than k if there are not enough passages. If scores are equal, lower shard numbers and positions come first.
    Raises OSError if a shard can't be read.
    """
    sizes = [len(shard) for shard in shards]
    count, live = sum(sizes), sum(shard.live for shard in shards)
    k = min(k, live)
    numbers, places = np.empty((len(queries), k), np.int64), np.empty((len(queries), k), np.int64)
    scores = np.empty((len(queries), k), np.int32)
    step = max(1, MOST_PRODUCTS // count)
    for start in range(0, len(queries), step) if k else ():
        some = queries[start : start + step]
        multiply = _quickest_way(len(some), queries.shape[1])
        left = torch.from_numpy(some.copy())
        products, order, end = np.empty((len(some), count), np.int32), list[int](), 0
        for rows_ND, together in _one_by_one(shards) if vectors is None else vectors.stretches(shards):
            begin, end = end, end + len(rows_ND)
            found_QN = products[:, begin:end]
            multiply(left, _tensor(rows_ND), torch.from_numpy(found_QN))
            order += together
            if live < count:
                found_QN[:, np.concatenate([shards[number].revoked() for number in together])] = NO_SCORE
            if multiply is _rounded_products:
                _correct_best(some, rows_ND, found_QN, k)
        begins = np.cumsum([0, *(sizes[number] for number in order[:-1])])
        for row, found in enumerate(products, start):
            candidates = np.flatnonzero(found >= _bound_of_best(found, k))
            which = np.searchsorted(begins, candidates, side="right") - 1
            places_C, numbers_C = candidates - begins[which], np.take(order, which)
            best = np.lexsort((places_C, numbers_C, -found[candidates]))[:k]
            numbers[row], places[row], scores[row] = numbers_C[best], places_C[best], found[candidates[best]]
    return numbers, places, scores


def _one_by_one(shards: Sequence[Shard]) -> Iterator[Stretch]:
    return ((shard.vectors(), [number]) for number, shard in enumerate(shards))


def _tensor(rows_ND: Vectors) -> torch.Tensor:
    # torch warns of arrays that are not writable, and takes an axis of one row for what numpy says of it
    own = rows_ND.flags.writeable and rows_ND.strides == (rows_ND.shape[1], 1)
    return torch.from_numpy(rows_ND if own else rows_ND.copy())


def _byte_products(queries: torch.Tensor, rows: torch.Tensor, found: torch.Tensor) -> None:
    """Writes the products of all pairs to `found`, as the other ways do.

    On some processors, the sums saturate. On those that have no instruction for it, this takes up to 20 times as long
    as with floats.
    """
    found.copy_(torch._int_mm(queries, rows.T))


def _float_products(queries: torch.Tensor, rows: torch.Tensor, found: torch.Tensor) -> None:
    """Sums of up to 1024 products of signed bytes are whole numbers up to 2^24, which float32 holds exactly."""
    left, floats = queries.float(), torch.empty(min(len(rows), _ROWS), rows.shape[1])
    for at in range(0, len(rows), _ROWS):
        some = rows[at : at + _ROWS]
        floats[: len(some)] = some
        found[:, at : at + len(some)] = left @ floats[: len(some)].T


def _rounded_products(queries: torch.Tensor, rows: torch.Tensor, found: torch.Tensor) -> None:
    """Converts the vectors to floats in registers, which is quicker for a few queries, and rounds the sums to bfloat16.

    The best passages still have to be found among those with the best of these: see `_correct_best`.
    """
    if rows.shape[1] % _AT_ONCE or rows.data_ptr() % _AT_ONCE:
        _float_products(queries, rows, found)
    else:
        ones = torch.ones(len(rows), dtype=torch.bfloat16)
        found.copy_(torch._weight_int8pack_mm(queries.bfloat16(), rows, ones))


def _correct_best(queries: Vectors, rows_ND: Vectors, products_QN: NDArray[np.int32], k: int) -> None:
    """Replaces rounded products by exact ones if they may be among the k best. All others are less than these."""
    for query, products in zip(queries.astype(np.float32), products_QN, strict=True):
        least = _bound_of_best(products, k)
        # it is rounded, and so is a better one that seems worse
        near = np.flatnonzero(products >= max(least - 4 * abs(least) // _ROUNDING, NO_SCORE + 1))
        products[near] = rows_ND[near].astype(np.float32) @ query


def _bound_of_best(products_N: NDArray[np.int32], k: int) -> int:
    """A score that the k best products reach, and few others. It is above that of revoked passages.

    Of the largest in each of some sets of products, k are at least as large as the kth largest of these. Finding it is
    ten times as fast as finding the kth largest product.
    """
    size = max(1, min(_SET, len(products_N) // (4 * k)))
    sets = len(products_N) // size
    largest = products_N[: size * sets].reshape(size, sets).max(axis=0)
    least = int(np.partition(largest, -k)[-k]) if k <= sets else NO_SCORE
    return max(least, NO_SCORE + 1)


Way: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]


def _quickest_way(queries: int, dimensions: int) -> Way:
    """Of the ways that are right on this processor, the quickest for about this many queries."""
    if dimensions < _FEWEST_DIMENSIONS:
        return _float_products
    return _quickest(min(1 << (queries - 1).bit_length(), _MANY))


@cache
def _quickest(queries: int) -> Way:
    left, rows = torch.ones(queries, 256, dtype=torch.int8), torch.ones(_ROWS, 256, dtype=torch.int8)
    found = torch.empty(queries, _ROWS, dtype=torch.int32)
    # floats are right on all processors
    ways = (_float_products, *filter(_is_right, (_byte_products, _rounded_products)))
    return min(ways, key=lambda way: min(timeit.repeat(partial(way, left, rows, found), number=1, repeat=5)))


@cache
def _is_right(way: Way) -> bool:
    rng = np.random.default_rng(0)
    for queries, dimensions in ((1, 256), (5, 1024), (64, 250)):
        rows = rng.integers(-128, 128, (queries + 66, dimensions), np.int8)
        # the last vector is the only query of the first round, and the one most likely to saturate
        rows[-4:] = np.array([[0], [-128], [-127], [127]], np.int8)
        left, right = torch.from_numpy(rows[-queries:]), torch.from_numpy(rows)
        found, exact = torch.empty(queries, len(rows), dtype=torch.int32), left.long() @ right.long().T
        try:
            way(left, right, found)
        except (AttributeError, RuntimeError):
            return False
        most = exact.abs() // (_ROUNDING if way is _rounded_products else 2**31)
        if ((found - exact).abs() > most).any():
            return False
    return True
