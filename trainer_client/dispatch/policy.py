"""How a trainer treats peers, and how long it waits: circuit breakers, answer screening, latencies and the wait policy.
- `CircuitBreakers`: peers that failed are avoided for a while, longer each time.
- `AnswerScreening`: finds answers that no honest node gives, by the answer alone. Experts have a residual connection,
  so an answer has about the size of its input, and depends on it. Wrong shapes and numbers that are not finite are
  refused earlier, where a call is read.
- `products_fit`: whether the products that a node returns in backward match its forward answer.
- `Latencies`: how long recent calls to nodes took.
- `WaitPolicy`: deadlines and hedging that follow from that.

Everything is bounded, and pure: `now` is passed in.

Shapes: R rows, K experts of each row, D columns: the width of the experts.
"""

import math
import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from dht.announcements import Latency
from peer.bounded import BoundedDict
from peer.codec import Booleans, Floats
from peer.identity import PeerID
from trainer_client.dispatch.batches import AnsweredRows, Direction, NodeCall

_LONGEST_BAN_S = 86400.0
_FORGIVEN = 3
"""How many quick failures in a row are forgiven. If every tenth call is lost, four in a row fail once in 10,000 calls.
"""

_NODES = 4096
"""Means are kept for this many nodes, those that answered last."""
_WEIGHT = 0.25
"""The weight of a new call in its node's moving mean."""
_TIMES_HOLD_S = 60.0
"""If a node has not answered for this long, its mean is forgotten, so that a node that was slow once is tried again."""

MOST_GROWTH = 1000.0
"""An answer's largest number may be this many times as large as the largest number of its input, or as 1 if that is
larger.
"""
MOST_GRADIENT_GROWTH = 1e6
"""The same for gradients. For a row whose numbers are nearly equal, the norm makes gradients larger, by at most 1/√ε.
"""
_LEAST_PRODUCT = 1e-9
"""Smaller products are not checked, because they make no difference."""
_SUMMED = 1e-5
"""How far off a sum of products in float32 may be, relative to the product of both rows' norms."""
_APART = 0.5
"""If the directions of two rows differ by more than this, no expert and no codec gives both the same answer. (Sizes
don't matter, because experts normalise rows first.)
"""
_COMPARED = 64
"""How many columns of a row are kept for comparison."""
_REMEMBERED_ROWS = 8
_REMEMBERED_PEERS = 256

LEAST_KNOWN = 32
"""How many calls are needed before their durations are used."""

_WINDOW = 256
_USUAL, _SLOW = 0.9, 0.95
_DEADLINE_FACTOR = 4.0
_LEAST_HEDGE_S = 0.05
"""Faster answers are not worth a second call."""


@dataclass
class _Streak:
    """Failures in a row."""

    counted: int = 0
    forgiven: int = 0


@dataclass
class _Breaker:
    streaks: dict[str, _Streak] = field(default_factory=dict)
    """For each kind of call whose last one failed."""
    failed_until: float = 0.0
    busy_until: float = 0.0
    distrusted_until: float = 0.0
    offences: int = 0
    """Wrong answers so far, not counting those given while it was already banned."""


class CircuitBreakers:
    """One breaker for each peer that has failed recently.

    After a failure a peer is avoided for `first_s`, after each further one twice as long, up to `longest_s`. Once the
    time is over it may be tried again (half-open), and a success closes the breaker. The first three failures in a row
    are forgiven if they came quickly: another try costs little, and on a bad line most peers are fine.

    Each kind of call has its own failures in a row. Otherwise, a peer that answers forward calls and no backward calls
    would make each backward call wait, because every forward call closes its breaker.
    """

    def __init__(self, first_s: float = 2.0, longest_s: float = 120.0, limit: int = 4096) -> None:
        """`limit`: the most peers remembered. Beyond that, the peer whose last failure is longest ago is forgotten."""
        self._first_s = first_s
        self._longest_s = longest_s
        self._breakers = BoundedDict[PeerID, _Breaker](limit)
        self._lock = threading.Lock()  # metrics read the breakers on other threads

    def failed(self, peer_id: PeerID, now: float, kind: str = "", *, quickly: bool = False) -> None:
        """Records a failure. While the peer's breaker is open, it changes nothing. `kind`: of the call."""
        breaker = self._breaker(peer_id)
        if now < breaker.failed_until:
            return
        streak = breaker.streaks.setdefault(kind, _Streak())
        if quickly and not streak.counted and streak.forgiven < _FORGIVEN:
            streak.forgiven += 1
            return
        streak.counted += 1
        wait = min(self._first_s * 2 ** min(streak.counted - 1, 30), self._longest_s)
        breaker.failed_until = now + wait

    def busy(self, peer_id: PeerID, now: float, retry_after_s: float) -> None:
        """Records that the peer asked not to be called for a while. This is not a failure."""
        breaker = self._breaker(peer_id)
        breaker.busy_until = max(breaker.busy_until, now + min(retry_after_s, self._longest_s))

    def distrust(self, peer_id: PeerID, now: float) -> None:
        """Bans the peer for a wrong answer: for the longest time, and for twice as long each further time. Good answers
        in the meantime don't shorten a ban.
        """
        breaker = self._breaker(peer_id)
        if now < breaker.distrusted_until:
            return
        ban_s = min(self._longest_s * 2 ** min(breaker.offences, 30), _LONGEST_BAN_S)
        breaker.offences += 1
        breaker.distrusted_until = now + ban_s

    def banned(self, now: float) -> int:
        """How many peers are banned now for wrong answers."""
        with self._lock:
            return sum(now < breaker.distrusted_until for breaker in self._breakers.values())

    def succeeded(self, peer_id: PeerID, kind: str = "") -> None:
        """Ends the failures in a row of this kind. If no kind has any left, the breaker closes."""
        with self._lock:
            if (breaker := self._breakers.get(peer_id)) is None:
                return
            breaker.streaks.pop(kind, None)
            if breaker.streaks:
                return
            breaker.failed_until = breaker.busy_until = 0.0
            if not breaker.offences:
                del self._breakers[peer_id]

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


class Latencies:
    """How long one trainer's calls took lately. Bounded, however many calls and nodes there are."""

    def __init__(self) -> None:
        self.calls: dict[Direction, CallTimes] = {"forward": CallTimes(), "backward": CallTimes()}
        self.nodes: BoundedDict[PeerID, float] = BoundedDict[PeerID, float](_NODES)
        """A moving mean of the seconds until each node has answered all rows of a call. The node that answered last
        comes last.
        """
        self._answered_at = BoundedDict[PeerID, float](_NODES)

    def note_node(self, peer_id: PeerID, seconds: float, now: float) -> None:
        """Adds the time until a node has answered all rows of a call."""
        mean = self.nodes.get(peer_id, seconds)
        self.nodes[peer_id] = mean + _WEIGHT * (seconds - mean)
        self._answered_at[peer_id] = now

    def nodes_lately(self, now: float) -> Mapping[PeerID, float]:
        """`nodes`, after forgetting those that have not answered for a minute."""
        while self._answered_at and next(iter(self._answered_at.values())) <= now - _TIMES_HOLD_S:
            peer_id, _ = self._answered_at.popitem(last=False)
            self.nodes.pop(peer_id, None)
        return self.nodes


@dataclass(frozen=True)
class _RememberedAnswer:
    """The first row of an answer, and of the inputs it was computed from."""

    answer: bytes
    inputs: Floats


class AnswerScreening:
    """Finds faults in an answer: in itself, or compared with recent ones of the same peer."""

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
        """The fault in the rows that an expert answered alone, or None."""
        alone = reply.answered.sum(axis=1) == 1
        experts = reply.batch.experts[reply.places].max(axis=1, where=reply.answered, initial=-1)
        for expert in np.unique(experts[alone]).tolist():
            rows = alone & (experts == expert)
            if is_constant(inputs_RD[rows], reply.tensor[rows]):
                return "constant"
        return None

    def fault_of_gradient(self, gradients_RD: Floats, answer_RD: Floats) -> str | None:
        """The fault in a word, or None. Small gradients may become zeros when encoded, and so equal."""
        return "huge" if is_huge(gradients_RD, answer_RD, MOST_GRADIENT_GROWTH) else None

    def fault_of_answer(self, peer_id: PeerID, inputs_RD: Floats, answer_RD: Floats) -> str | None:
        """The fault in a word, or None."""
        if is_huge(inputs_RD, answer_RD):
            return "huge"
        if is_constant(inputs_RD, answer_RD):
            return "constant"
        return "replayed" if self._is_replayed(peer_id, inputs_RD[0], answer_RD[0]) else None

    def _is_replayed(self, peer_id: PeerID, inputs_D: Floats, answer_D: Floats) -> bool:
        """Whether the answer's first row was given recently for other inputs. Also remembers it, unless it is zero."""
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
    """Whether very different rows all got the same answer. Zeros don't count, because some blocks start that way."""
    if len(answer_RD) < 2 or not answer_RD[0].any() or not np.array_equal(answer_RD[0], answer_RD[-1]):
        return False
    return are_apart(inputs_RD[0], inputs_RD[-1]) and bool((answer_RD == answer_RD[0]).all())


def are_bounded(products_RK: Floats, gradients_RD: Floats, inputs_RD: Floats) -> Booleans:
    """Whether each row's products of the gradient and the updates have a possible size, because updates are not huge:
    [R].
    """
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
    """Whether each row's products <G, f_k> can belong to the experts whose answer was S = sum of p_k f_k: [R].

    Their mean weighted by the shares p is <G, S>, up to rounding. Because of rounding on the wire, the node has G' in
    place of our G, and we have S' in place of its S. So the two results differ by at most |G' - G| |S| + |G| |S' - S|.
    `error`: the largest distance between a row and what is received for it, relative to its norm and absolute. The
    products' own sums, in float32, may be off by a thousandth of their size, and a little more for rows that are nearly
    orthogonal. With every codec but fp32, they are also rounded to bfloat16.
    """
    part, beside = error
    g, s = gradients_RD.astype(np.float64), answers_RD.astype(np.float64)
    lengths = np.linalg.norm(g, axis=1)
    # the node's own S is at most this long
    sizes = (np.linalg.norm(s, axis=1) + beside) / max(1 - part, 0.1)
    rounding = (part * lengths + beside) * sizes + lengths * (part * sizes + beside)
    weighed = shares_RK * products_RK.astype(np.float64)
    of_products = 3e-3 if part else 1e-3
    slack = of_products * np.abs(weighed).sum(axis=1) + _SUMMED * lengths * sizes + _LEAST_PRODUCT
    fits: Booleans = np.abs(weighed.sum(axis=1) - (g * s).sum(axis=1)) <= rounding + slack
    return fits


def are_apart(one_D: Floats, other_D: Floats) -> bool:
    sizes = float(np.linalg.norm(one_D)), float(np.linalg.norm(other_D))
    return min(sizes) > 0 and float(np.linalg.norm(one_D / sizes[0] - other_D / sizes[1])) > _APART


def _largest(numbers_RD: Floats) -> float:
    return max(float(numbers_RD.max(initial=0.0)), -float(numbers_RD.min(initial=0.0)))


class CallTimes:
    """The durations of the last 256 calls in one direction, in seconds."""

    def __init__(self) -> None:
        self._last: deque[float] = deque(maxlen=_WINDOW)

    def add(self, seconds: float) -> None:
        self._last.append(seconds)

    def add_unfinished(self, seconds: float) -> None:
        """Adds a call that was given up after this long. It counts as slower than most, so that a deadline that is too
        short grows.
        """
        self.add(max(seconds, self.quantile(_USUAL) or 0.0))

    def quantile(self, part: float, least_known: int = LEAST_KNOWN) -> float | None:
        """The duration that `part` of the calls did not exceed; None while fewer calls are known."""
        if len(self._last) < least_known:
            return None
        return sorted(self._last)[max(0, math.ceil(part * len(self._last)) - 1)]

    def quantiles(self) -> Latency | None:
        """For the trainer's record; None before the first call."""
        median, slow = self.quantile(0.5, 1), self.quantile(0.99, 1)
        return None if median is None or slow is None else Latency(median, slow)


@dataclass(frozen=True)
class WaitPolicy:
    """How long to wait for experts. Times in seconds."""

    call_deadline_s: float
    """The longest duration of a call."""
    grace_s: float
    """How long to wait for the rest once every row has `k_min` answers. See also `backward_grace_s`."""
    k_min: int
    """Experts are chosen again for a row with fewer answers."""
    least_deadline_s: float = 3.0
    """The shortest deadline."""
    most_hedged: float = 0.1
    """The largest share of calls that are also sent to a second replica."""

    def deadline_s(self, call_times: CallTimes) -> float:
        """The deadline of the next call: four times the duration that nine in ten recent calls did not exceed, within
        bounds.
        """
        usual = call_times.quantile(_USUAL)
        if usual is None:
            return self.call_deadline_s
        return min(self.call_deadline_s, max(self.least_deadline_s, _DEADLINE_FACTOR * usual))

    def backward_grace_s(self, took_s: float) -> float:
        """How long a backward pass waits for the other gradients after it took `took_s` until every row had enough. A
        late gradient can't be asked for elsewhere, so on a slow line it gets more than the grace time.
        """
        return max(self.grace_s, took_s)

    def hedge_after_s(self, call_times: CallTimes) -> float:
        """After how long a forward call is slow, so that another replica is also asked: the 95th percentile of recent
        calls, as in "The Tail at Scale" (Dean and Barroso, 2013), but at most a third of the deadline.
        """
        latest = self.deadline_s(call_times) / 3
        slow = call_times.quantile(_SLOW)
        return latest if slow is None else min(max(slow, _LEAST_HEDGE_S), latest)

    def check_deadline_s(self, call_times: CallTimes, usual_s: float | None) -> float | None:
        """How long a node may take to answer a health check: a quarter of the deadline, so about as long as whole calls
        take, or twice as long as its own calls usually take. `usual_s`: None if that is not known. Returns None while
        it is not known how long calls take: if this peer's line is slow, a check waits behind the rows on their way.
        """
        if call_times.quantile(_USUAL) is None:
            return None
        deadline_s = self.deadline_s(call_times)
        return deadline_s / 2 if usual_s is None else min(max(deadline_s / 4, 2 * usual_s), deadline_s)

    def may_hedge(self, hedged: float, calls: float) -> bool:
        """Whether one more of `calls` may be sent twice, after `hedged` have been."""
        return hedged < self.most_hedged * calls
