"""Spot checks: the trainer recomputes some answered rows itself, with the node's own parameters.

With each answer, a node names the version of its parameters. After some answers, the trainer asks for the parameters of
that version, and computes the same rows. The node learns which answer is checked only after it has given it. Checks
need no other replica. An answer is right if the codec can have made it from numbers that are close to the trainer's
own. The tolerance covers other orders of additions, and the precision that the node says it computes with. A single
wrong row makes a check fail. After two failed checks of different answers, the node is banned.

Shapes: n rows of the batch, m of an answer, c of those checked, K slots of each row, W width of the experts.
"""

import asyncio
import logging
import random
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol, Self, TypeVar, TypeVarTuple, Unpack

import numpy as np
import torch

from dht.announcements import NodeInfo
from dht.uid import UID
from peer.bounded import BoundedDict
from peer.codec import Booleans, CodecName, Floats, Integers, codec_of, encoded_bytes
from peer.encoding import decode, encode, unexplained
from peer.errors import StateError, TransferError, VersionGoneError
from peer.identity import PeerID
from peer.loop import TaskSet
from peer.parsing import ParseGuard
from peer.wire import expert_pb2
from trainer_client.dispatch.batches import AnsweredRows, ExpertPart, SentBatch, shares
from trainer_client.dispatch.calls import CallTracker
from trainer_client.dispatch.snapshots import FetchedBlock, Precision

logger: logging.Logger = logging.getLogger(__name__)

SLACK: Mapping[Precision, float] = {"fp32": 2e-4, "tf32": 5e-3, "bf16": 1e-2}
"""How far a number may be from the trainer's own, relative to the root mean square of its experts' updates of the row.

Measured on CPUs: fp32 with other threads, in another order, and against float64, up to 1e-5; bf16 against bf16 in
another order, up to 8e-3, and 3e-5 on average. tf32 rounds an eighth as much as bf16, which differs from fp32 by 5e-3
on average.
"""
SPARED: Mapping[Precision, float] = {"fp32": 0.0, "tf32": 0.0, "bf16": 1 / 16}
"""The share of a row's numbers that may be further off: in bf16, rounding one number differently can change others.
"""
TOLERATED: Mapping[Precision, float] = {"fp32": 0.0, "tf32": 0.0, "bf16": 1e-3}
"""The share of a node's rows that may be wrong: in bf16, sharp attention may depend on one rounding. Measured on CPUs,
with and without oneDNN's kernels: up to 3e-4 of the rows.
"""
OF_INPUTS = 2e-6
"""How much further off a number may be, relative to the row's inputs: an update is what remains when they are
subtracted.
"""
WITNESSES = 2
"""After this many failed checks, a node is banned."""
_CHECKED_AFTER_FAILURE = 32
"""After a failed check, this many of the node's next answers are all checked."""
_FORGIVEN_AFTER_ROWS = 100_000
"""After this many right rows in a row, a node's failed checks no longer count: an honest node may fail once in so many
rows.
"""
_REMEMBERED_ROWS = 20_000
"""The most checked rows that count for a node. Otherwise a long good record would excuse many lies."""
_MOST_ROWS = 512
"""A check computes whole segments: at least one, and at most this many rows."""
_MOST_AT_ONCE = 4
_DEADLINE_S = 20.0
"""The deadline for fetching the parameters."""
_TRAFFIC_SHARE = 0.1
"""The most bytes of parameters fetched, relative to the bytes of forward answers: about a fortieth of all traffic with
nodes.
"""
_KEPT_EXPERTS = 4
"""How many experts' parameters are kept for further answers of the same version."""
_NODES = 1024
_LATELY = 32
"""If none of a node's last checks (this many) succeeded, the node can't be checked."""
_NAMED = 4
"""The most experts that a warning names."""
_VERDICTS = {"passed", "failed"}
_LARGEST = 1e30
_LARGEST_UPDATES = 4.0
"""The limit for a row's updates relative to its answer. Otherwise, updates that cancel out would widen the slack.
"""

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class LoadedExpert(Protocol):
    """An expert with a node's parameters."""

    def updates(self, inputs: Floats, lengths: Integers, positions: Integers, precision: Precision) -> Floats:
        """The expert's updates of rows [R, W] with these segments [S] and positions [R], as a node of that precision
        computes them.
        """
        ...


class ExpertLoader(Protocol):
    """Builds experts from parameters. This package does not know the kinds of experts."""

    @property
    def max_bytes(self) -> int:
        """The limit for an expert's encoded parameters."""
        ...

    def load(self, uid: UID, data: bytes) -> LoadedExpert:
        """Raises StateError if the data is not that expert's parameters."""
        ...


class BlockSource(Protocol):
    """Where parameters are fetched from."""

    async def fetch(self, node: NodeInfo, uid: UID, version: int, deadline_s: float) -> FetchedBlock:
        """Raises TransferError, or its subclass VersionGoneError, if the parameters did not arrive, and StateError if
        what arrived can't be right.
        """
        ...


@dataclass(frozen=True)
class Checking:
    """What spot checks need."""

    share: float
    """The share of answers that are checked."""
    source: BlockSource
    loader: ExpertLoader
    guard: ParseGuard = field(default_factory=ParseGuard)
    """Guards the parsing of parameters."""


@dataclass(frozen=True, eq=False)
class Sample:
    """Some rows of one answer, and all inputs that are needed to compute them again."""

    node: NodeInfo
    versions: Mapping[UID, int]
    """The versions of the experts in the answers."""
    parts: Sequence[ExpertPart]
    """Each expert's part; its places refer to `inputs`."""
    segments: Sequence[tuple[Integers, Integers]]
    """For each part, the number of rows of each segment, and the positions."""
    inputs: Floats  # before the codec
    places: Integers  # [c], rows of `inputs`
    shares: Floats  # [c, K], of each expert in the answer
    answers: Floats  # [c, W], after the codec

    @classmethod
    def draw(cls, sent: SentBatch, reply: AnsweredRows, inputs: Floats, rng: random.Random) -> Self:
        """Draws a random row, and adds rows of its segment and of the next ones that need no other experts.

        `inputs` [n, W]: those of the batch.
        """
        batch = sent.batch
        drawn = rng.randrange(len(reply.places))
        experts = np.where(reply.answered, batch.experts[reply.places], -1)  # [m, K]
        wanted = experts[drawn][reply.answered[drawn]]
        segments = batch.segment_of_row
        first = segments[reply.places[drawn]]
        ahead = np.cumsum(np.roll(batch.lengths, -first)) <= _MOST_ROWS
        ahead[0] = True
        chosen = np.roll(ahead, first)[segments]  # [n]
        checked = (np.isin(experts, wanted) | (experts < 0)).all(axis=1) & chosen[reply.places]
        slots = np.zeros_like(batch.asked)
        slots[reply.places] = reply.answered
        only, of_batch = batch.only(np.isin(batch.experts, wanted) & chosen[:, None])
        places = reply.places[checked]
        parts = list(only.parts())
        return cls(
            sent.node,
            {uid: sent.versions.get(uid, 0) for uid in only.uids},
            parts,
            [only.segments(part.places) for part in parts],
            inputs[of_batch],
            np.searchsorted(of_batch, places),
            shares(sent.weights[places], slots[places]),
            reply.tensor[checked],
        )

    def wrong_rows(
        self, experts: Mapping[UID, LoadedExpert], precision: Precision, codec: "expert_pb2.Codec"
    ) -> tuple[int, float]:
        """How many of its rows are wrong, and how far off the worst one is, relative to its size."""
        inputs = decode(encode(self.inputs, codec), self.inputs.shape[1], codec)
        own, sizes = np.zeros_like(self.answers), np.zeros(len(self.answers), np.float32)
        for part, (lengths, positions) in zip(self.parts, self.segments, strict=True):
            updates = experts[part.uid].updates(inputs[part.places], lengths, positions, precision)
            rows = np.flatnonzero(np.isin(self.places, part.places))
            at = np.searchsorted(part.places, self.places[rows])
            share = self.shares[rows, part.slots[at]]
            own[rows] += share[:, None] * updates[at]
            sizes[rows] += share * _sizes(updates[at])
        wrong = are_wrong(self.answers, own, sizes, _sizes(inputs[self.places]), precision, codec)
        apart = np.linalg.norm(self.answers - own, axis=1) / np.maximum(np.linalg.norm(own, axis=1), 1e-30)
        return int(wrong.sum()), float(apart.max(where=wrong, initial=0.0))


def are_wrong(
    answers: Floats,
    own: Floats,
    sizes: Floats,
    of_inputs: Floats,
    precision: Precision,
    codec: "expert_pb2.Codec",
) -> Booleans:
    """Marks the rows of the answers that no honest node of this precision gives: [c].

    `answers`, `own` [c, W]: what arrived, and what the trainer computed. `sizes`, `of_inputs` [c]: root mean squares of
    the experts' updates and of the inputs.
    """
    # an honest node refuses to answer with such numbers
    is_sane = np.abs(own).max(axis=1, initial=0.0) < _LARGEST
    own = np.where(is_sane[:, None], own, np.float32(0))
    slack = SLACK[precision] * np.minimum(sizes, _LARGEST_UPDATES * _sizes(answers)) + OF_INPUTS * of_inputs
    outside = unexplained(answers, own, slack, codec).sum(axis=1)
    wrong: Booleans = ~is_sane | (outside > SPARED[precision] * own.shape[1])
    return wrong


def _sizes(tensor: Floats) -> Floats:
    """The root mean square of each row."""
    sizes: Floats = np.sqrt(np.square(tensor, dtype=np.float64).mean(axis=1)).astype(np.float32)
    return sizes


@dataclass
class _Record:
    """The results of one node's checks."""

    failed: int = 0
    rows: float = 0.0
    wrong_rows: float = 0.0
    """How many of the checked rows were wrong. Both counts are halved now and then."""
    right_rows: int = 0
    """Right rows since the last failure."""
    owed: int = 0
    """How many more of the node's answers are all checked."""
    decided: deque[bool] = field(default_factory=lambda: deque(maxlen=_LATELY))
    """For each of the last checks, whether it had a result."""

    def note_rows(self, rows: int, wrong: int) -> None:
        self.rows, self.wrong_rows = self.rows + rows, self.wrong_rows + wrong
        if self.rows > _REMEMBERED_ROWS:
            self.rows, self.wrong_rows = self.rows / 2, self.wrong_rows / 2

    @property
    def is_evasive(self) -> bool:
        return len(self.decided) == _LATELY and not any(self.decided)


class SpotChecks:
    """The checks of one trainer. Call its methods on the loop's thread.

    A node sees when its parameters are fetched. So earlier checks must not influence which answers are checked later:
    each answer is drawn independently, and a node that delays the checks of its own answers does not delay others'.
    """

    def __init__(
        self, calls: CallTracker, checking: Checking | None, codec: CodecName, rng: random.Random
    ) -> None:
        """`checking`: None for no checks. `codec`: its name in the manifest."""
        self._calls = calls
        self._checking = checking
        self._codec = codec_of(codec)
        self._rng = rng
        self._tasks = TaskSet()
        self._pool = ThreadPoolExecutor(1, "spot check", initializer=torch.set_num_threads, initargs=(1,))
        self._records = BoundedDict[PeerID, _Record](_NODES)
        self._experts = BoundedDict[tuple[PeerID, UID, int], tuple[LoadedExpert, Precision]](_KEPT_EXPERTS)
        self._fetching: dict[asyncio.Task[None], NodeInfo] = {}
        """The checks whose parameters have not arrived yet, oldest first."""
        calls.metrics.evasive.set_function(self.evasive)

    def evasive(self) -> int:
        """For how many nodes none of the recent answers could be checked."""
        return sum(record.is_evasive for record in list(self._records.values()))

    def note(self, sent: SentBatch, reply: AnsweredRows, inputs: Floats) -> None:
        """Draws whether an answer that has just arrived is checked, and starts the check, which does not delay the
        pass.

        `inputs` [R, W]: those of all rows of the step.
        """
        if self._checking is None or not len(reply.places):
            return
        record = self._records.get(sent.node.peer_id)
        is_full = len(self._tasks) >= _MOST_AT_ONCE
        is_owed = record is not None and record.owed > 0 and not is_full
        if not is_owed and self._rng.random() >= self._checking.share:
            return
        sample = Sample.draw(sent, reply, inputs[sent.batch.rows], self._rng)
        if not is_owed and self._rng.random() >= self._affordable(sample, reply):
            return
        if is_full and not self._make_room():
            return
        task = self._tasks.spawn(self._check(sample), "check an answer")
        self._fetching[task] = sample.node
        task.add_done_callback(lambda ended: self._fetching.pop(ended, None))

    def _affordable(self, sample: Sample, reply: AnsweredRows) -> float:
        """The share of such checks for which the budget of traffic suffices."""
        assert self._checking is not None, "no check begins without"
        node = sample.node.peer_id
        missing = sum((node, *each) not in self._experts for each in sample.versions.items())
        most = _TRAFFIC_SHARE * encoded_bytes(len(reply.tensor), reply.tensor.shape[1], self._codec)
        expected = self._checking.share * missing * self._checking.loader.max_bytes
        return 1.0 if expected <= most else most / expected

    def _make_room(self) -> bool:
        """Ends a check of the node with the most checks that wait for parameters. Returns whether there was one."""
        waiting = Counter(node.peer_id for node in self._fetching.values())
        if not waiting:
            return False
        most = max(waiting, key=waiting.__getitem__)
        task, node = next((t, node) for t, node in self._fetching.items() if node.peer_id == most)
        del self._fetching[task]
        task.cancel()
        self._note(node, "not_given")
        return True

    async def close(self) -> None:
        await self._tasks.aclose()
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _check(self, sample: Sample) -> None:
        peer_id = sample.node.peer_id
        try:
            async with asyncio.timeout(_DEADLINE_S):
                loaded = await self._load_all(sample)
                if (task := asyncio.current_task()) is not None:
                    self._fetching.pop(task, None)
                experts = {uid: expert for uid, (expert, _) in zip(sample.versions, loaded, strict=True)}
                # they all run on one device, or each has the precision that the node says
                precision = max((precision for _, precision in loaded), key=SLACK.__getitem__)
                wrong, apart = await self._run(sample.wrong_rows, experts, precision, self._codec)
        except VersionGoneError:
            self._note(sample.node, "moved_on")
            return
        except (TransferError, TimeoutError) as error:
            logger.debug("node %s gave no parameters to check an answer with: %s", peer_id, error)
            self._note(sample.node, "not_given")
            return
        except StateError as error:
            self._fail(sample, f"its parameters can't be used: {error}", len(sample.places), "fp32")
            return
        self._calls.metrics.checked_rows.inc(len(sample.places))
        if wrong:
            rows = f"{wrong} of {len(sample.places)} rows {'is' if wrong == 1 else 'are'} wrong, by up to {apart:.2%}"
            self._fail(sample, f"{rows}, for a node that computes in {precision}", wrong, precision)
        else:
            self._pass(sample)

    async def _load_all(self, sample: Sample) -> list[tuple[LoadedExpert, Precision]]:
        """Loads all experts at once, because their versions don't last. Raises TransferError and StateError."""
        loads = [self._load(sample.node, *each) for each in sample.versions.items()]
        found = await asyncio.gather(*loads, return_exceptions=True)
        for error in found:
            if isinstance(error, BaseException):
                raise error
        return [each for each in found if not isinstance(each, BaseException)]

    async def _load(self, node: NodeInfo, uid: UID, version: int) -> tuple[LoadedExpert, Precision]:
        """Raises TransferError and StateError."""
        assert self._checking is not None, "no check begins without"
        if not version:
            raise TransferError("its answer names no version")
        key = node.peer_id, uid, version
        found = self._experts.get(key)
        if found is None:
            block = await self._checking.source.fetch(node, uid, version, _DEADLINE_S)
            with self._checking.guard.guarding("state", node.peer_id, TransferError):
                expert = await self._run(self._checking.loader.load, uid, block.data)
            found = self._experts[key] = expert, block.precision
        return found

    async def _run(self, function: Callable[[Unpack[Ts]], T], *arguments: *Ts) -> T:
        """Runs a function on the single thread for checks, which uses one core."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)

    def _note(self, node: NodeInfo, outcome: str) -> _Record:
        peer_id = node.peer_id
        self._calls.metrics.spot_checks.labels(outcome).inc()
        self._calls.credit.note(
            node, checks_passed=int(outcome == "passed"), checks_failed=int(outcome == "failed")
        )
        record = self._records[peer_id] = self._records.get(peer_id) or _Record()
        was_evasive = record.is_evasive
        record.decided.append(outcome in _VERDICTS)
        if record.is_evasive and not was_evasive:
            logger.warning("none of the last %d answers of node %s could be checked", _LATELY, peer_id)
        return record

    def _pass(self, sample: Sample) -> None:
        record = self._note(sample.node, "passed")
        record.owed = max(0, record.owed - 1)
        record.note_rows(len(sample.places), 0)
        record.right_rows += len(sample.places)
        if record.right_rows >= _FORGIVEN_AFTER_ROWS:
            record.failed = 0

    def _fail(self, sample: Sample, said: str, wrong: int, precision: Precision) -> None:
        """`wrong`: how many of its rows are wrong."""
        peer_id = sample.node.peer_id
        record = self._note(sample.node, "failed")
        record.note_rows(len(sample.places), wrong)
        record.failed, record.right_rows = record.failed + 1, 0
        tolerated = TOLERATED[precision] * record.rows
        if record.wrong_rows <= tolerated:
            return
        record.owed = _CHECKED_AFTER_FAILURE
        names = ", ".join(map(str, list(sample.versions)[:_NAMED]))
        logger.debug("node %s failed a spot check of experts %s: %s", peer_id, names, said)
        if record.failed >= WITNESSES and (not tolerated or record.wrong_rows >= WITNESSES + tolerated):
            record.owed = 0
            self._calls.breakers.distrust(peer_id, self._calls.now())
            logger.warning(
                "node %s: failed %d spot checks, the last one of experts %s: %s: banned for a while",
                peer_id, record.failed, names, said,
            )  # fmt: skip
