"""Parses the headers of calls. Every number is checked, and memory is reserved before arrays are made from them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from grpc import StatusCode

from dht.manifest import Manifest, parse_uid
from expert_server.serving.assignment import Assignment
from expert_server.serving.batching import Direction
from expert_server.serving.forward_cache import CachedForward, ForwardCache
from expert_server.serving.sequence_cache import ENTRY_BYTES
from peer.codec import Integers, decode_scalars, encoded_bytes
from peer.errors import ExpertError, WireError
from peer.formatting import counted
from peer.layers import CACHE_GROWTH
from peer.rpc.calls import require_same_swarm
from peer.wire import expert_pb2

MAX_EXPERTS_IN_CALL = 4096
MAX_SEQUENCES_IN_CALL = 2**14
"""The most sequences of all experts of a call together, if they are kept: each costs as much as many rows."""
_NO_SEQUENCES = "sequences are kept of forward calls alone, which are not kept themselves"
_SEGMENT_BYTES, _ROW_BYTES, _PAIR_BYTES, _EXPERT_BYTES = 24, 40, 64, 1024
"""Memory for each segment, each row, each pair of a row and an expert, and each expert of a call: parsed numbers,
arrays and indices.
"""


@dataclass(frozen=True, slots=True)
class CallSize:
    """How much a call brings."""

    rows: int
    pairs: int
    """Rows over all of its experts."""
    segments: int
    experts: int
    width: int
    direction: Direction

    @property
    def bytes(self) -> int:
        """Memory that the call needs in addition to the fixed part.

        In float32, for each row: the inputs, the answer, and in backward the gradient; for each pair: what its expert
        receives and returns, and in backward also the pair's input and update.
        """
        per_row, per_pair = (2, 2) if self.direction == "forward" else (3, 4)
        numbers = self.width * (per_row * self.rows + per_pair * self.pairs)
        described = _SEGMENT_BYTES * self.segments + _EXPERT_BYTES * self.experts
        return 4 * numbers + _ROW_BYTES * self.rows + _PAIR_BYTES * self.pairs + described


@dataclass(frozen=True, slots=True)
class HeldSegments:
    """The segments that one expert keeps for the next call, and how many of their earlier rows it should have."""

    numbers: Sequence[int]
    """The numbers under which they are kept."""
    counts: Sequence[int]
    """How many earlier rows each has; 0 if it starts over."""


@dataclass(frozen=True, slots=True)
class ParsedHeader:
    """The content of a header, after all checks."""

    rows: int
    assignment: Assignment | None
    """None if the call refers to a forward call that is no longer kept."""
    cached: CachedForward | None = None
    """In backward: the forward call that was kept here."""
    held: Sequence[HeldSegments] = ()
    """The held segments of each expert, in a call whose rows are kept for the next; empty if there is no memory for
    that.
    """


class HeaderParser:
    """Parses the headers of calls to one node."""

    def __init__(self, swarm_id: str, manifest: Manifest, max_call_bytes: int, cache: ForwardCache) -> None:
        """`max_call_bytes`: the limit for the payload as float32."""
        self._swarm_id = swarm_id
        self._manifest = manifest
        self._max_call_bytes = max_call_bytes
        self._cache = cache

    def parse(
        self,
        header: expert_pb2.CallHeader,
        direction: Direction,
        caller: str,
        reserve: Callable[[int], object],
    ) -> ParsedHeader:
        """Claims the forward call that the header names. Take it out of the cache once the payload has arrived.

        `reserve` is called with the bytes of memory that the call needs, and raises ExpertError if there is no room.
        Raises WireError or ExpertError.
        """
        require_same_swarm(self._swarm_id, header.protocol_version, header.swarm_id)
        if len(header.request_id) != 16:
            raise WireError(f"the request id has {len(header.request_id)} bytes instead of 16")
        if header.width != self._manifest.width:
            raise WireError(
                f"the rows have width {header.width}, but this swarm's experts have {self._manifest.width}"
            )
        encoded_bytes(1, header.width, header.codec)  # refuses an unknown codec
        if header.kept_request_id:
            return self._parse_kept(header, direction, caller, reserve)
        rows, pairs = self._counted(header)
        self._require_size(rows * (2 if direction == "backward" else 1))
        counts = rows, pairs, len(header.segment_lengths), len(header.experts)
        reserve(CallSize(*counts, header.width, direction).bytes)
        assignment = parse_assignment(header, self._manifest)
        held = parse_held(header, assignment, self._manifest, direction)
        try:
            reserve(_cache_bytes(self._manifest, pairs, held))
        except ExpertError:
            if any(any(each.counts) for each in held):
                raise
            held = []
        return ParsedHeader(rows, assignment, held=held)

    def _parse_kept(
        self,
        header: expert_pb2.CallHeader,
        direction: Direction,
        caller: str,
        reserve: Callable[[int], object],
    ) -> ParsedHeader:
        if direction == "forward" or header.segment_lengths or header.positions or header.experts:
            raise WireError(
                "only backward calls name a kept forward call, and without segments, positions and experts"
            )
        if header.sequences:
            raise WireError(_NO_SEQUENCES)
        rows = header.kept_rows
        if not rows:
            raise WireError("a kept forward call must have rows")
        self._require_size(rows)
        cached = self._cache.find((caller, header.kept_request_id))
        if cached is None:
            return ParsedHeader(rows, None)
        assignment = cached.assignment
        if len(assignment) != rows:
            raise WireError(f"the kept forward call has {counted(len(assignment), 'row')}, not {rows}")
        counts = rows, len(assignment.rows), len(assignment.lengths), len(assignment.uids)
        reserve(CallSize(*counts, header.width, direction).bytes)
        cached.is_claimed = True
        return ParsedHeader(rows, assignment, cached)

    def _counted(self, header: expert_pb2.CallHeader) -> tuple[int, int]:
        """The numbers of rows and pairs, before any of them is looked at."""
        rows = len(header.positions)
        if not rows:
            raise WireError("a call must have rows")
        if not 1 <= len(header.experts) <= MAX_EXPERTS_IN_CALL:
            raise WireError(f"the call names {len(header.experts)} experts: name 1 to {MAX_EXPERTS_IN_CALL}")
        pairs = sum(len(expert.rows) or rows for expert in header.experts)
        top_k = self._manifest.routing.top_k
        if not rows <= pairs <= rows * top_k:
            raise WireError(
                f"{counted(pairs, 'row')} of experts for the {counted(rows, 'row')} of the call; each is for 1 to "
                f"{top_k} experts"
            )
        return rows, pairs

    def _require_size(self, rows: int) -> None:
        """`rows`: the number of rows in the payload."""
        size = 4 * rows * self._manifest.width
        if size > self._max_call_bytes:
            raise ExpertError(
                StatusCode.RESOURCE_EXHAUSTED,
                f"the call has {size} bytes, more than {self._max_call_bytes}: send fewer rows at once",
            )


def parse_assignment(header: expert_pb2.CallHeader, manifest: Manifest) -> Assignment:
    """Checks segments, positions, and the experts' rows and weights. Raises WireError."""
    lengths = np.array(header.segment_lengths, dtype=np.int64)
    positions = np.array(header.positions, dtype=np.int64)
    _check_positions(lengths, positions, manifest.model.context)
    uids = [parse_uid(expert.uid, manifest) for expert in header.experts]
    if len(set(uids)) < len(uids):
        raise WireError("an expert is named twice in one call")
    every_row = np.arange(len(positions))
    rows_of = [np.array(e.rows, np.int64) if e.rows else every_row for e in header.experts]
    weights_of = [
        decode_scalars(e.weights, header.codec) if e.weights else np.ones(len(its_rows), np.float32)
        for e, its_rows in zip(header.experts, rows_of, strict=True)
    ]
    counts = np.array([len(its_rows) for its_rows in rows_of])
    for uid, count, weights in zip(uids, counts, weights_of, strict=True):
        if len(weights) != count:
            raise WireError(
                f"expert {uid} has {counted(count, 'row')}, but {counted(len(weights), 'weight')}"
            )
    assignment = Assignment(
        uids, lengths, positions, np.cumsum(counts), np.concatenate(rows_of), np.concatenate(weights_of)
    )
    _check_pairs(assignment, manifest.routing.top_k)
    return assignment


def parse_held(
    header: expert_pb2.CallHeader, assignment: Assignment, manifest: Manifest, direction: Direction
) -> list[HeldSegments]:
    """Empty for a call that keeps nothing. Raises WireError, and ExpertError if there are too many."""
    numbers, segments = header.sequences, len(assignment.lengths)
    if not numbers:
        if any(expert.held for expert in header.experts):
            raise WireError("held rows need numbered sequences")
        return []
    if direction == "backward" or header.keep:
        raise WireError(_NO_SEQUENCES)
    if manifest.experts.kind != "transformer":
        raise WireError(f"experts of kind {manifest.experts.kind} keep no rows of sequences")
    if not all(manifest.model.is_causal(uid.layer) for uid in assignment.uids):
        raise WireError("experts of an encoder keep no rows of sequences: they see a sequence as a whole")
    if (count := sum(map(len, assignment.first_pairs))) > MAX_SEQUENCES_IN_CALL:
        raise ExpertError(
            StatusCode.RESOURCE_EXHAUSTED,
            f"the call has {count} sequences of experts, more than {MAX_SEQUENCES_IN_CALL}: send fewer at once",
        )
    if len(numbers) != segments:
        raise WireError(f"the call has {segments} segments, but {len(numbers)} sequence numbers")
    if len(set(numbers)) < segments:
        raise WireError("a sequence number occurs twice")
    held = []
    for expert, pairs in zip(header.experts, assignment.first_pairs, strict=True):
        first_rows = assignment.rows[pairs]
        counts = np.array(expert.held, np.int64) if expert.held else np.zeros(len(first_rows), np.int64)
        if len(counts) != len(first_rows):
            raise WireError(
                f"expert {expert.uid} has {len(first_rows)} segments, but {len(counts)} counts of held rows"
            )
        if (counts > assignment.positions[first_rows]).any():
            raise WireError(f"expert {expert.uid} can't hold more earlier rows of a sequence than there are")
        its_numbers = [numbers[segment] for segment in assignment.segment_of_row[first_rows].tolist()]
        held.append(HeldSegments(its_numbers, counts.tolist()))
    return held


def _cache_bytes(manifest: Manifest, pairs: int, held: Sequence[HeldSegments]) -> int:
    """Bytes of the keys and values of these rows and of earlier ones, counted twice where they grow."""
    if not held:
        return 0
    model = manifest.expert_model
    columns = model.heads * (model.head_size or model.hidden // model.heads)
    counts = sum(sum(each.counts) for each in held)
    grown = math.ceil(CACHE_GROWTH * (counts + pairs)) if counts else pairs
    return 2 * 4 * columns * (counts + grown) + ENTRY_BYTES * sum(len(each.numbers) for each in held)


def _check_positions(lengths: Integers, positions: Integers, context: int) -> None:
    if not len(lengths) or lengths.min() < 1 or lengths.sum() != len(positions):
        raise WireError(
            f"the segments have {counted(int(lengths.sum()), 'row')}, but the call has {len(positions)}"
        )
    if positions.max() >= context:
        raise WireError(f"position {positions.max()} is beyond this swarm's context of {context} tokens")
    starts = np.cumsum(lengths)[:-1]
    rising = np.diff(positions) > 0
    rising[starts - 1] = True  # positions may fall from one segment to the next
    if not rising.all():
        raise WireError("positions must rise within a segment")


def _check_pairs(assignment: Assignment, top_k: int) -> None:
    rows, weights, count = assignment.rows, assignment.weights, len(assignment)
    if rows.max() >= count:
        raise WireError(f"an expert gets row {rows.max()}, but the call has {counted(count, 'row')}")
    rising = np.diff(rows) > 0
    rising[assignment.ends[:-1] - 1] = True
    if not rising.all():
        raise WireError("the rows of an expert must rise")
    if not ((weights > 0) & np.isfinite(weights)).all():
        raise WireError("a weight must be finite and above 0")
    experts_of_row = np.bincount(rows, minlength=count)
    if not experts_of_row.min():
        raise WireError(f"row {experts_of_row.argmin()} is for no expert")
    if experts_of_row.max() > top_k:
        raise WireError(
            f"row {experts_of_row.argmax()} is for {experts_of_row.max()} experts, more than {top_k}"
        )
