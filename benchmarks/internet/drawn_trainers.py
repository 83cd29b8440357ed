"""Trainers that repeat the passes of real ones without any rows, so that simulating a thousand of them costs little.

Each takes a recorded pass, chooses for each expert another replica among those that the real policy would choose from,
and waits as the wait policy says.

Shapes: R rows, K slots of each row, G groups (the part of a pass that goes to one node).
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from benchmarks.internet.calls import Sent, Told
from benchmarks.internet.fluid import Integers, Numbers
from benchmarks.internet.window import Announced, Pacing, RecordedPass, SharedWindow
from trainer_client.dispatch.policy import _TIMES_HOLD_S, _WEIGHT, CallTimes
from trainer_client.dispatch.replicas import _AS_QUICK, _BUSIER_ROWS, _QUICK, _SLOWER, _TRIED

_LEAST_TIME_S = 1e-3
"""The shortest time of a call."""
_USUAL_EVERY_S = 0.5
"""How often a drawn trainer computes how long nodes usually took lately."""
_MOST_QUEUED = np.iinfo(np.int64).max // 2
_NOTED_TIMES = 8
"""The number of calls of one pass whose times a drawn trainer remembers."""


class KnownTimes:
    """How long each node lately took for each drawn trainer, and the choice of replicas that follows from it.

    It has the policy of `trainer_client.dispatch.replicas`, for all experts of a pass at once.
    """

    def __init__(self, trainers: int, nodes: int, announced: Announced, rng: np.random.Generator) -> None:
        self._seconds = np.zeros((trainers, nodes), np.float32)
        """Moving averages of the times."""
        self._at = np.full((trainers, nodes), -math.inf, np.float32)
        """When each node answered last."""
        self._usual = np.zeros(trainers)
        """What nodes usually took, as each trainer last computed it."""
        self._usual_at = np.full(trainers, -math.inf)
        """When each trainer last computed that."""
        self._announced = announced
        self._rng = rng

    def note(self, trainer: int, nodes: Integers, seconds: Numbers, now: float) -> None:
        seconds_N, at_N = self._seconds[trainer], self._at[trainer]
        before = seconds_N[nodes]
        is_known = at_N[nodes] > now - _TIMES_HOLD_S
        seconds_N[nodes] = np.where(is_known, before + _WEIGHT * (seconds - before), seconds)
        at_N[nodes] = now

    def choose(self, trainer: int, hosts: Integers, now: float) -> Integers:
        """Chooses one of the `hosts` [G, replicas] for each group; -1 where there is none."""
        rng, is_host = self._rng, hosts >= 0
        known = is_host & (self._at[trainer][hosts] > now - _TIMES_HOLD_S)
        seconds = np.where(known, self._seconds[trainer][hosts], np.inf)
        usual_s = self._usual_s(trainer, now)
        least_s = np.maximum(seconds.min(axis=1), usual_s)[:, None]
        quick = known & (seconds <= _AS_QUICK * least_s)
        others = is_host & ~known
        few = quick.sum(axis=1) < _QUICK
        tried = ~few & others.any(axis=1) & (rng.random(len(hosts)) < _TRIED)
        fit = np.where(tried[:, None], others, quick)
        fit = np.where(few[:, None], others | known & (seconds <= _SLOWER * least_s), fit)
        queued = np.where(fit, self._announced.queued[hosts], _MOST_QUEUED)
        fit &= queued <= queued.min(axis=1, keepdims=True) + _BUSIER_ROWS
        place = np.where(fit, rng.random(hosts.shape), np.inf).argmin(axis=1)
        return np.where(fit.any(axis=1), np.take_along_axis(hosts, place[:, None], axis=1)[:, 0], -1)

    def _usual_s(self, trainer: int, now: float) -> float:
        if now >= self._usual_at[trainer] + _USUAL_EVERY_S:
            lately = self._seconds[trainer][self._at[trainer] > now - _TIMES_HOLD_S]
            self._usual[trainer] = np.quantile(lately, 0.5, method="lower") if len(lately) else 0.0
            self._usual_at[trainer] = now
        return float(self._usual[trainer])


class _Pass:
    """A pass that is under way. Each group may be called twice: the places from G on are those of the second calls."""

    __slots__ = (
        "answered", "began", "called_at", "ends", "forward", "grace_ends", "is_over", "last_at", "left", "nodes",
        "recorded", "sent_to", "step", "times",
    )  # fmt: skip

    def __init__(
        self, step: "_Step", recorded: RecordedPass, nodes: Integers, forward: bool, began: float, ends: float
    ) -> None:
        self.step = step
        self.recorded = recorded
        self.sent_to = nodes.copy()
        """The node that answered each group, or the last one that was asked."""
        self.nodes = np.concatenate([nodes, np.full(len(nodes), -1)])
        """The nodes of all calls, first and second."""
        self.called_at = np.full(2 * len(nodes), began)
        """When each call was made."""
        self.forward = forward
        self.began = began
        self.ends = ends
        self.answered = nodes < 0
        self.left = int((nodes >= 0).sum())
        self.last_at = began
        self.grace_ends: float | None = None
        """When the pass stops waiting for other answers; None while a row has too few."""
        self.is_over = False
        """Nobody waits for the pass any more. Answers that still arrive only show how slow a node is."""
        self.times: list[Numbers] = []

    @property
    def groups(self) -> int:
        return len(self.answered)


class _Step:
    """One step of a drawn trainer, and which stage of it comes next."""

    __slots__ = ("number", "passes", "stage", "trainer")

    def __init__(self, trainer: int, number: int) -> None:
        self.trainer = trainer
        self.number = number
        self.stage = 0
        self.passes: list[_Pass] = []


class DrawnTrainers:
    """All drawn trainers. Each thing that they wait for has an owner number."""

    def __init__(self, play: SharedWindow, numbers: Sequence[int]) -> None:
        self._play = play
        self.pacing = {number: Pacing(play.in_flight(number)) for number in numbers}
        self._layers = play.swarm.manifest.model.layers
        self._times = {number: {True: CallTimes(), False: CallTimes()} for number in numbers}
        self._calls_made = dict.fromkeys(numbers, 0)
        self._hedged = dict.fromkeys(numbers, 0)
        self._owners: dict[int, _Pass | _Step] = {}
        self._next = 0
        self._steps = 0
        self._looks: dict[int, list[int]] = {}
        """The passes that are due for a look, by slot."""
        self._started = False
        self._rng = np.random.default_rng((play.seed, 3))
        self._first = numbers[0] if len(numbers) else 0
        self._known = KnownTimes(
            len(numbers), play.nodes, play.announced, np.random.default_rng((play.seed, 1))
        )

    def step(self, now: float, told: Sequence[Told]) -> None:
        if not self._started:
            if not all(self._play.recorded.passes):
                return
            self._started = True
            spread = self._play.window.start_s * self._rng.random(len(self.pacing))
            for number, offset in zip(self.pacing, spread.tolist(), strict=True):
                self._begin_step(number, now + offset)
        for some in told:
            self._take(some)
        for owner in self._looks.pop(round(now / self._play.window.slot_s), ()):
            found = self._owners.get(owner)
            if isinstance(found, _Pass):
                self._look(owner, found, now)

    def _own(self, thing: "_Pass | _Step") -> int:
        self._next += 1
        self._owners[self._next] = thing
        return self._next

    def _begin_step(self, trainer: int, at: float) -> None:
        self._steps += 1
        self.pacing[trainer].begin(self._steps, at)
        self._go_on(_Step(trainer, self._steps), at)

    def _go_on(self, step: _Step, at: float) -> None:
        """Starts a step's next stage: computing and a forward pass for each layer, then the same backward, from the
        last layer.
        """
        play, window = self._play, self._play.window
        layers, stage = self._layers, step.stage
        if stage == 4 * layers:
            self._end_step(step, at)
            return
        step.stage += 1
        forward, is_pass = stage < 2 * layers, stage % 2
        if not is_pass:
            part = window.dense_rows * window.tokens / 3 / layers
            play.calls.compute(play.nodes + step.trainer, part * (1 if forward else 2), at, self._own(step))
        elif forward:
            recorded, nodes = self._draw(step.trainer, stage // 2, at)
            self._send(step, recorded, nodes, True, at)
        else:
            first = step.passes[2 * layers - 1 - stage // 2]
            nodes = np.where(first.answered, first.sent_to, -1)
            self._send(step, first.recorded, nodes, False, at)

    def _draw(self, trainer: int, layer: int, at: float) -> tuple[RecordedPass, Integers]:
        """Draws a recorded pass, and the nodes [G] that its groups go to."""
        passes = self._play.recorded.passes[layer]
        drawn = passes[int(self._rng.integers(len(passes)))]
        return drawn, np.where(
            drawn.alone >= 0, self._replicas(trainer, layer, drawn.alone, at), drawn.sent.nodes
        )

    def _replicas(
        self, trainer: int, layer: int, experts: Integers, at: float, besides: Integers | None = None
    ) -> Integers:
        """A replica of each expert; -1 if there is none. `besides`: for each expert, the node that is not to be asked
        again.
        """
        hosts = self._play.recorded.hosts[layer][experts]
        if besides is not None:
            hosts = np.where(hosts == besides[:, None], -1, hosts)
        return self._known.choose(trainer - self._first, hosts, at)

    def _end_step(self, step: _Step, at: float) -> None:
        play, pacing = self._play, self.pacing[step.trainer]
        took_s = pacing.end(step.number, at)
        if play.counts.is_on:
            play.counts.tokens[step.trainer] += play.window.tokens
            play.counts.step_s[step.trainer].append(took_s)
        while pacing.lacks > 0:
            self._begin_step(step.trainer, at)

    def _send(self, step: _Step, recorded: RecordedPass, nodes: Integers, forward: bool, at: float) -> None:
        play, times = self._play, self._times[step.trainer][forward]
        deadline_s = play.policy.deadline_s(times)
        making = _Pass(step, recorded, nodes, forward, at, at + deadline_s)
        if forward:
            step.passes.append(making)
        if not making.left:
            self._go_on(step, at)
            return
        owner = self._own(making)
        groups = np.flatnonzero(nodes >= 0)
        self._call(owner, making, groups, nodes[groups], at)
        self._look_at(owner, at + (play.policy.hedge_after_s(times) if forward else deadline_s))
        if forward:
            self._look_at(owner, at + deadline_s / 2)
            self._look_at(owner, making.ends)

    def _call(self, owner: int, making: _Pass, places: Integers, nodes: Integers, at: float) -> None:
        sent, play, groups = making.recorded.sent, self._play, places % making.groups
        making.nodes[places], making.called_at[places] = nodes, at
        some = Sent(nodes, sent.rows[groups], sent.slots[groups], sent.experts[groups])
        trainer = making.step.trainer
        self._calls_made[trainer] += len(groups)
        play.calls.begin(play.nodes + trainer, some, making.forward, at, making.ends, owner, places)

    def _look_at(self, owner: int, at: float) -> None:
        slot = math.ceil(at / self._play.window.slot_s)
        self._looks.setdefault(
            max(slot, round(self._play.calls.now / self._play.window.slot_s) + 1), []
        ).append(owner)

    def _take(self, told: Told) -> None:
        order = np.argsort(told.owners, kind="stable")
        owners, places, at, well = (
            told.owners[order],
            told.places[order],
            told.at[order],
            ~told.refused[order],
        )
        bounds = [*np.flatnonzero(np.diff(owners, prepend=-1)).tolist(), len(owners)]
        for first, last in pairwise(bounds):
            owner = int(owners[first])
            found = self._owners.get(owner)
            if isinstance(found, _Step):
                del self._owners[owner]
                self._go_on(found, float(at[first]))
            elif found is not None:
                taken = well[first:last]
                self._answer(owner, found, places[first:last][taken], at[first:last][taken])

    def _answer(self, owner: int, found: _Pass, places: Integers, at: Numbers) -> None:
        nodes = found.nodes[places]
        if len(places):
            took_s = np.maximum(at - found.called_at[places], _LEAST_TIME_S)
            self._known.note(found.step.trainer - self._first, nodes, took_s, float(at.max()))
            found.nodes[places] = -1
        if found.is_over:
            self._forget_if_answered(owner, found)
            return
        fresh = ~found.answered[places % found.groups]
        groups, at = (places % found.groups)[fresh], at[fresh]
        if not len(groups):
            return
        found.sent_to[groups] = nodes[fresh]
        found.answered[groups] = True
        found.left = int((~found.answered).sum())
        found.last_at = max(found.last_at, float(at.max()))
        found.times.append(at - found.began)
        if not found.left:
            self._end(owner, found, found.last_at)
        elif found.grace_ends is None and found.left <= max(2, len(found.answered) // 8):
            self._see_if_enough(owner, found)

    def _forget_if_answered(self, owner: int, found: _Pass) -> None:
        if (found.nodes < 0).all():
            del self._owners[owner]

    def _see_if_enough(self, owner: int, found: _Pass) -> None:
        """Begins the grace time if every row has as many answers as the wait policy asks for."""
        recorded = found.recorded
        asked = (found.sent_to >= 0)[recorded.group_of] & (recorded.group_of >= 0)
        got = (found.answered[recorded.group_of] & asked).sum(axis=1)
        if (got >= np.minimum(self._play.policy.k_min, asked.sum(axis=1))).all():
            policy, took_s = self._play.policy, found.last_at - found.began
            grace_s = policy.grace_s if found.forward else policy.backward_grace_s(took_s)
            found.grace_ends = found.last_at + grace_s
            self._look_at(owner, found.grace_ends)

    def _look(self, owner: int, found: _Pass, now: float) -> None:
        slot_s = self._play.window.slot_s
        if found.is_over:
            if now >= found.ends - slot_s:
                late = found.nodes >= 0
                trainer, took_s = found.step.trainer - self._first, now - found.called_at[late]
                self._known.note(trainer, found.nodes[late], took_s, now)
                del self._owners[owner]
        elif found.grace_ends is not None and now >= found.grace_ends - slot_s:
            self._end(owner, found, found.grace_ends)
        elif now >= found.ends - slot_s:
            self._end(owner, found, found.ends)
        elif found.forward and found.grace_ends is None:
            self._hedge(owner, found, now)

    def _hedge(self, owner: int, found: _Pass, now: float) -> None:
        """Asks another replica of each expert that is late: at first only of some, after half of the time of all."""
        trainer = found.step.trainer
        alone = found.recorded.alone
        late = np.flatnonzero(~found.answered & (alone >= 0))
        if now < found.began + (found.ends - found.began) / 2:
            room = int(self._play.policy.most_hedged * self._calls_made[trainer]) - self._hedged[trainer]
            late = late[: max(0, room)]
            self._hedged[trainer] += len(late)
        layer = found.step.passes.index(found)
        others = self._replicas(trainer, layer, alone[late], now, found.sent_to[late])
        late, others = late[others >= 0], others[others >= 0]
        if len(late):
            found.sent_to[late] = others
            self._call(owner, found, late + found.groups, others, now)

    def _end(self, owner: int, found: _Pass, at: float) -> None:
        found.is_over = True
        self._forget_if_answered(owner, found)
        times = self._times[found.step.trainer][found.forward]
        all_s = np.concatenate([*found.times, np.zeros(0)])
        for seconds in self._rng.choice(all_s, min(_NOTED_TIMES, len(all_s)), replace=False).tolist():
            times.add(seconds)
        if found.left:
            times.add_unfinished(at - found.began)
        self._go_on(found.step, at)
