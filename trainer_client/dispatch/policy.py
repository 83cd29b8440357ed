"""What a trainer decides by about peers and time: circuit breakers, answer screening, latencies and the wait policy.

- `CircuitBreakers`: peers that failed are left alone for a while, each time longer.
- `AnswerScreening`: answers that no honest node gives, seen by the answer alone. Experts carry their own residual
  connection, so what they answer, and any mean of it, stays near its input in size and follows it. Wrong shapes and
  numbers that are not finite are refused earlier, where a call is read.
- `products_fit`: whether the products that a node returns in backward are those of what it answered in forward.
- `Latencies`: how long calls to nodes took lately.
- `WaitPolicy`: deadlines and hedging that follow from that.

Everything is bounded, and pure: `now` is passed in.

Shapes: R rows, K experts of each row, D columns: the width of the experts.
"""

import math
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dht.announcements import Latency
from peer.bounded import BoundedDict
from peer.codec import Booleans, Floats
from peer.identity import PeerID
from trainer_client.dispatch.batches import AnsweredRows, NodeCall

_LONGEST_BAN_S = 86400.0
_FORGIVEN = 3
"""Quick failures in a row. On a line that loses every tenth call four in a row are one in 10,000."""

_RECENT = 512
"""Calls of each direction that quantiles are taken from."""
_NODES = 4096
"""Nodes whose mean is kept, those that answered last."""
_WEIGHT = 0.25
"""The weight of a new call in its node's mean."""
_TIMES_HOLD_S = 60.0
"""Without an answer for so long, a node's mean is forgotten: one that was slow once is asked again."""

MOST_GROWTH = 1000.0
"""An answer's largest number, against one and the largest that it was computed from."""
MOST_GRADIENT_GROWTH = 1e6
"""The same for gradients: the norm of a row whose numbers are nearly equal makes them large, by 1/√ε at most."""
_LEAST_PRODUCT = 1e-9
"""Products that are smaller may be anything: they make no difference."""
_SUMMED = 1e-5
"""How far a sum of products in float32 may be off, as a part of the product of both rows' norms."""
_APART = 0.5
"""How far the directions of two rows must be apart that no expert and no codec makes one of them. Experts normalize
rows first: a row and its double are the same to them.
"""
_COMPARED = 64
"""Columns of a row that are kept to compare it."""
_REMEMBERED_ROWS = 8
_REMEMBERED_PEERS = 256

LEAST_KNOWN = 32
"""Calls that are needed before anything is said about how long they take."""

_WINDOW = 256
_USUAL, _SLOW = 0.9, 0.95
_DEADLINE_FACTOR = 4.0
_LEAST_HEDGE_S = 0.05
"""Quicker answers are not worth a second call."""


@dataclass
class _Breaker:
    failures: int = 0
    """Failures in a row, without those forgiven."""
    forgiven: int = 0
    failed_until: float = 0.0
    busy_until: float = 0.0
    distrusted_until: float = 0.0
    offences: int = 0
    """Wrong answers so far, those while it was avoided for one not counted."""


class CircuitBreakers:
    """One breaker for each peer that failed lately.

    After a failure a peer is avoided for `first_s`, after each further one twice as long, up to `longest_s`; once the
    time is over it may be tried again (half-open), and a success closes the breaker. The first three failures in a row
    are forgiven when they came quickly: more tries cost no time, and on a line that loses calls most peers are well.
    """

    def __init__(self, first_s: float = 2.0, longest_s: float = 120.0, limit: int = 4096) -> None:
        """`limit`: peers remembered at most; beyond it the one is forgotten whose last failure is longest ago."""
        self._first_s = first_s
        self._longest_s = longest_s
        self._breakers = BoundedDict[PeerID, _Breaker](limit)
        self._lock = threading.Lock()  # metrics read the breakers on other threads

    def failed(self, peer_id: PeerID, now: float, *, quickly: bool = False) -> None:
        """The peer did not do what it was asked. A failure while the breaker is open changes nothing."""
        breaker = self._breaker(peer_id)
        if now < breaker.failed_until:
            return
        if quickly and not breaker.failures and breaker.forgiven < _FORGIVEN:
            breaker.forgiven += 1
            return
        breaker.failures += 1
        wait = min(self._first_s * 2 ** min(breaker.failures - 1, 30), self._longest_s)
        breaker.failed_until = now + wait

    def busy(self, peer_id: PeerID, now: float, retry_after_s: float) -> None:
        """The peer asked to be left alone for a while; that is no failure."""
        breaker = self._breaker(peer_id)
        breaker.busy_until = max(breaker.busy_until, now + min(retry_after_s, self._longest_s))

    def distrust(self, peer_id: PeerID, now: float) -> None:
        """The peer answered wrongly: it is banned for the longest time, after each further time for twice as long.

        Whatever else it does well meanwhile does not shorten that.
        """
        breaker = self._breaker(peer_id)
        if now < breaker.distrusted_until:
            return
        ban_s = min(self._longest_s * 2 ** min(breaker.offences, 30), _LONGEST_BAN_S)
        breaker.offences += 1
        breaker.distrusted_until = now + ban_s

    def banned(self, now: float) -> int:
        """How many peers are avoided now for wrong answers."""
        with self._lock:
            return sum(now < breaker.distrusted_until for breaker in self._breakers.values())

    def succeeded(self, peer_id: PeerID) -> None:
        with self._lock:
            breaker = self._breakers.pop(peer_id, None)
            if breaker is not None and breaker.offences:
                kept = _Breaker(distrusted_until=breaker.distrusted_until, offences=breaker.offences)
                self._breakers[peer_id] = kept

    def open_at(self, now: float) -> frozenset[PeerID]:
        """The peers to avoid now."""
        with self._lock:
            return frozenset(
                peer_id
                for peer_id, b in self._breakers.items()
                if now < max(b.failed_until, b.busy_until, b.distrusted_until)
            )

    def _breaker(self, peer_id: PeerID) -> _Breaker:
        with self._lock:
            breaker = self._breakers[peer_id] = self._breakers.get(peer_id) or _Breaker()
            return breaker


class Durations:
    """How long calls of one direction took."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=_RECENT)

    def note(self, seconds: float) -> None:
        self._recent.append(seconds)

    def quantiles(self) -> Latency | None:
        """Quantiles of the last calls; None before the first."""
        ordered = sorted(self._recent)
        return Latency(_nearest(ordered, 0.5), _nearest(ordered, 0.99)) if ordered else None


class Latencies:
    """How long one trainer's successful calls took. Bounded, however many calls and nodes there are."""

    def __init__(self) -> None:
        self.forward: Durations = Durations()
        self.backward: Durations = Durations()
        self.nodes: BoundedDict[PeerID, float] = BoundedDict[PeerID, float](_NODES)
        """Seconds until each node's first answer to a call, a moving mean; the node that answered last at the end."""
        self._answered_at = BoundedDict[PeerID, float](_NODES)

    def note(self, direction: str, seconds: float) -> None:
        """One call that a node answered in full."""
        (self.forward if direction == "forward" else self.backward).note(seconds)

    def note_node(self, peer_id: PeerID, seconds: float, now: float) -> None:
        """A node's first answer to a call."""
        mean = self.nodes.get(peer_id, seconds)
        self.nodes[peer_id] = mean + _WEIGHT * (seconds - mean)
        self._answered_at[peer_id] = now

    def nodes_lately(self, now: float) -> Mapping[PeerID, float]:
        """`nodes`, without those that have not answered for a minute. They are forgotten."""
        while self._answered_at and next(iter(self._answered_at.values())) <= now - _TIMES_HOLD_S:
            peer_id, _ = self._answered_at.popitem(last=False)
            self.nodes.pop(peer_id, None)
        return self.nodes


def _nearest(ordered: Sequence[float], share: float) -> float:
    """The nearest-rank quantile: at least `share` of all are no larger."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


@dataclass(frozen=True)
class _RememberedAnswer:
    """The first row of an answer, and of what it was computed from."""

    answer: bytes
    inputs: Floats


class AnswerScreening:
    """What is wrong with answers, by each one alone and by those that the same peer gave lately."""

    def __init__(self) -> None:
        self._lately = BoundedDict[PeerID, list[_RememberedAnswer]](_REMEMBERED_PEERS)

    def find_fault(self, call: NodeCall, reply: AnsweredRows) -> str | None:
        """The fault in a word, or None."""
        if call.gradients is not None:
            return self.fault_of_gradient(call.gradients, reply.tensor)
        inputs = call.inputs[reply.places]
        fault = self.fault_of_answer(call.node.peer_id, inputs, reply.tensor)
        return fault or self._fault_of_experts(inputs, reply)

    def _fault_of_experts(self, inputs_RD: Floats, reply: AnsweredRows) -> str | None:
        """What is wrong with the rows that an expert answered alone."""
        alone = reply.answered.sum(axis=1) == 1
        experts = reply.batch.experts[reply.places].max(axis=1, where=reply.answered, initial=-1)
        for expert in np.unique(experts[alone]).tolist():
            rows = alone & (experts == expert)
            if is_constant(inputs_RD[rows], reply.tensor[rows]):
                return "constant"
        return None

    def fault_of_gradient(self, gradients_RD: Floats, answer_RD: Floats) -> str | None:
        """The fault in a word, or None. Small gradients may well become zeros on their way, and so equal."""
        return "huge" if is_huge(gradients_RD, answer_RD, MOST_GRADIENT_GROWTH) else None

    def fault_of_answer(self, peer_id: PeerID, inputs_RD: Floats, answer_RD: Floats) -> str | None:
        """The fault in a word, or None."""
        if is_huge(inputs_RD, answer_RD):
            return "huge"
        if is_constant(inputs_RD, answer_RD):
            return "constant"
        return "replayed" if self._is_replayed(peer_id, inputs_RD[0], answer_RD[0]) else None

    def _is_replayed(self, peer_id: PeerID, inputs_D: Floats, answer_D: Floats) -> bool:
        """Whether the answer's first row came lately, for other inputs. Also remembers it, unless it is zero."""
        if not answer_D.any():
            return False
        lately = self._lately[peer_id] = self._lately.get(peer_id) or []
        row, compared = answer_D.tobytes(), inputs_D[:_COMPARED].copy()
        for kept in lately:
            if kept.answer == row:
                return are_apart(kept.inputs, compared)
        lately.append(_RememberedAnswer(row, compared))
        del lately[:-_REMEMBERED_ROWS]
        return False


def is_huge(inputs_RD: Floats, answer_RD: Floats, most_growth: float = MOST_GROWTH) -> bool:
    return _largest(answer_RD) > most_growth * (1.0 + _largest(inputs_RD))


def is_constant(inputs_RD: Floats, answer_RD: Floats) -> bool:
    """Whether rows that are far apart were all given the same answer. Zeros are an honest one: some blocks start so."""
    if len(answer_RD) < 2 or not answer_RD[0].any() or not np.array_equal(answer_RD[0], answer_RD[-1]):
        return False
    return are_apart(inputs_RD[0], inputs_RD[-1]) and bool((answer_RD == answer_RD[0]).all())


def are_bounded(products_RK: Floats, gradients_RD: Floats, inputs_RD: Floats) -> Booleans:
    """In which rows no product of the gradient and an update is larger than updates that are not huge allow. [R]"""
    lengths = np.linalg.norm(gradients_RD.astype(np.float64), axis=1)
    most = MOST_GROWTH * (1.0 + _largest(inputs_RD)) * gradients_RD.shape[1] ** 0.5 * lengths
    fits: Booleans = np.abs(products_RK).max(axis=1, initial=0.0) <= 2 * most + _LEAST_PRODUCT
    return fits


def products_fit(
    shares_RK: Floats,
    products_RK: Floats,
    gradients_RD: Floats,
    answers_RD: Floats,
    error: tuple[float, float],
) -> Booleans:
    """In which rows the products <G, f_k> are those of the experts in the answer S = sum of p_k f_k. [R]

    Their mean by the shares p is <G, S>, but for rounding: the node has G', what it got for our G, and we have S', what
    we got for its S. So they differ by at most |G' - G| |S| + |G| |S' - S|. `error`: how far a row and what is got for
    it are apart at most, as a part of its norm and beside it. The products' own sums, in float32, may be a thousandth
    of their size off, and a little more of rows that are nearly orthogonal.
    """
    part, beside = error
    g, s = gradients_RD.astype(np.float64), answers_RD.astype(np.float64)
    lengths = np.linalg.norm(g, axis=1)
    # the node's own S is at most this long
    sizes = (np.linalg.norm(s, axis=1) + beside) / max(1 - part, 0.1)
    rounding = (part * lengths + beside) * sizes + lengths * (part * sizes + beside)
    weighed = shares_RK * products_RK.astype(np.float64)
    slack = 1e-3 * np.abs(weighed).sum(axis=1) + _SUMMED * lengths * sizes + _LEAST_PRODUCT
    fits: Booleans = np.abs(weighed.sum(axis=1) - (g * s).sum(axis=1)) <= rounding + slack
    return fits


def are_apart(one_D: Floats, other_D: Floats) -> bool:
    sizes = float(np.linalg.norm(one_D)), float(np.linalg.norm(other_D))
    return min(sizes) > 0 and float(np.linalg.norm(one_D / sizes[0] - other_D / sizes[1])) > _APART


def _largest(numbers_RD: Floats) -> float:
    return max(float(numbers_RD.max(initial=0.0)), -float(numbers_RD.min(initial=0.0)))


class CallTimes:
    """How long the last 256 calls in one direction took, in seconds."""

    def __init__(self) -> None:
        self._last: deque[float] = deque(maxlen=_WINDOW)

    def add(self, seconds: float) -> None:
        self._last.append(seconds)

    def add_unfinished(self, seconds: float) -> None:
        """Counts a call that was given up after so long. It counts as at least as slow as most, so that a deadline that
        is too short for many calls gets longer.
        """
        self.add(max(seconds, self.quantile(_USUAL) or 0.0))

    def quantile(self, part: float) -> float | None:
        """What `part` of the calls did not exceed; None while too few are known."""
        if len(self._last) < LEAST_KNOWN:
            return None
        return sorted(self._last)[min(int(part * len(self._last)), len(self._last) - 1)]


@dataclass(frozen=True)
class WaitPolicy:
    """How long to wait for experts. Times in seconds."""

    call_deadline_s: float
    """No call lasts longer."""
    grace_s: float
    """How long to wait for the rest once every row has `k_min` answers."""
    k_min: int
    """A row with fewer answers has its experts chosen again."""
    least_deadline_s: float = 3.0
    """The deadline becomes no shorter than that."""
    most_hedged: float = 0.1
    """Calls sent to a second replica, as a part of all calls, at most."""

    def deadline_s(self, call_times: CallTimes) -> float:
        """The deadline of the next call: four times what nine in ten took lately, between the bounds."""
        usual = call_times.quantile(_USUAL)
        if usual is None:
            return self.call_deadline_s
        return min(self.call_deadline_s, max(self.least_deadline_s, _DEADLINE_FACTOR * usual))

    def hedge_after_s(self, call_times: CallTimes) -> float:
        """When a forward call is slow enough to ask another replica too: when 19 in 20 would have answered, and at
        the latest after a third of the deadline.

        "The Tail at Scale" (Dean and Barroso, 2013) asks after the 95th percentile.
        """
        latest = self.deadline_s(call_times) / 3
        slow = call_times.quantile(_SLOW)
        return latest if slow is None else min(max(slow, _LEAST_HEDGE_S), latest)

    def may_hedge(self, hedged: float, calls: float) -> bool:
        """Whether one call more of `calls` may be sent twice, after `hedged`."""
        return hedged < self.most_hedged * calls
