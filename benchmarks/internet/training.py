"""Simulates a window of training on a swarm's placement at one moment, call by call.

Some trainers are real: the product's gate, balancing, beam search, choice of replicas and dispatcher send real rows,
over the links and processors that `benchmarks.internet.calls` models. All others repeat what these sent lately: a drawn
trainer takes a pass of a real one, chooses for each expert another replica among those that the real policy would
choose from, and waits as the wait policy says. It carries no rows, so a thousand of them cost little.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from benchmarks.internet.calls import Machine
from benchmarks.internet.drawn_trainers import DrawnTrainers
from benchmarks.internet.flow import Ideal, ideal_throughput
from benchmarks.internet.fluid import Numbers
from benchmarks.internet.real_trainers import Mixture, RealTrainer
from benchmarks.internet.window import PlacedSwarm, SharedWindow, Window
from benchmarks.simulated_p2p import VirtualLoop
from dht.uid import UID
from peer.metrics import total

Booleans = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class TrainingFigures:
    """The results of a window of training."""

    nodes: int
    serving: int
    trainers: int
    tokens_per_s: float
    ideal_as_placed: float
    ideal_free: float
    wanted: float
    """Tokens a second that the trainers could train as far as their own machines and lines allow."""
    of_placed: float
    of_free: float
    layers: int
    row_bytes: float
    rows_per_s: float
    """Rows per second that all living nodes compute together."""
    bit_per_s: float
    """bit/s that the lines of all living nodes carry together, in the slower direction."""
    step_s: dict[str, float]
    call_s: dict[str, float]
    """How many seconds the calls of drawn trainers took."""
    forward_s: dict[str, float]
    """How many seconds the forward passes of all trainers through one layer took."""
    backward_s: dict[str, float]
    """How many seconds the backward passes of all trainers through one layer took."""
    answered_rows: float
    """The share of real trainers' rows that any expert answered."""
    answered_slots: float
    """The share of answers that came, of those that real trainers asked for: one from each expert for each row sent to
    it.
    """
    experts_per_token: float
    """The number of experts that a row of a real trainer was sent to, in one layer."""
    rows_per_token: float
    """Rows sent for each token in the forward pass of one layer: one to each node that hosts a chosen expert."""
    hedged: float
    failed: float
    reselected: float
    load_cv: float
    """The coefficient of variation of the shares of time in which the serving nodes computed."""
    busiest: float
    """The share of the time in which the busiest node computed."""
    busiest_expert: float
    """The rows of the busiest expert, relative to the mean."""
    in_flight: float
    others_tokens_per_s: float
    """The mean throughput of all trainers but the last."""


def play(
    swarm: PlacedSwarm, trainers: Sequence[Machine], window: Window | None = None, seed: int = 0
) -> TrainingFigures:
    """Simulates training on the swarm for the length of the window. The same seed gives the same figures."""
    loop = VirtualLoop()
    try:
        asyncio.set_event_loop(loop)
        return loop.run_until_complete(_Play(swarm, trainers, window or Window(), seed).run())
    finally:
        asyncio.set_event_loop(None)
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


class _Play(SharedWindow):
    """The simulation of one window."""

    async def run(self) -> TrainingFigures:
        window, loop = self.window, asyncio.get_running_loop()
        manifest, trainers = self.swarm.manifest, range(len(self.counts.tokens))
        mixtures = [
            Mixture.balanced(manifest, self.routing, layer, self.seed)
            for layer in range(manifest.model.layers)
        ]
        real = [RealTrainer(self, number, mixtures) for number in trainers[: window.real]]
        drawn = DrawnTrainers(self, trainers[window.real :])
        tasks = [asyncio.create_task(trainer.run()) for trainer in real]
        ends = window.warm_up_s + window.seconds
        slot, computed, before = 0, self.calls.computed, dict[str, float]()
        while self.calls.now < ends - 1e-9:
            slot += 1
            await asyncio.sleep(max(0.0, slot * window.slot_s - loop.time()))
            told = self.calls.step()
            now = self.calls.now
            self.announced.step(now)
            drawn.step(now, told)
            if not self.counts.is_on and now >= window.warm_up_s:
                self.counts.is_on = True
                computed = self.calls.computed.copy()
                before = _totals(real)
            for task in tasks:
                if task.done():
                    task.result()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for trainer in real:
            await trainer.dispatcher.close()
        after = _totals(real)
        more = {name: after[name] - before.get(name, 0) for name in after}
        in_flight = [trainer.pacing.wanted for trainer in real] + [p.wanted for p in drawn.pacing.values()]
        return self._figures(self.calls.computed - computed, more, float(np.mean(in_flight)))

    def _figures(self, computed: Numbers, more: Mapping[str, float], in_flight: float) -> TrainingFigures:
        swarm, window, counts = self.swarm, self.window, self.counts
        serving = sorted({n for hosts in swarm.hosts.values() for n in hosts} - swarm.dead)
        living = [m for number, m in enumerate(swarm.machines) if number not in swarm.dead]
        busy = computed[serving] / self.calls.rates[serving] / window.seconds
        ideal = self._ideal()
        throughput = float(counts.tokens.sum()) / window.seconds
        real_calls = max(1.0, more["calls"])
        popular = self.rows / np.maximum(self.rows.mean(axis=1, keepdims=True), 1e-9)
        return TrainingFigures(
            nodes=self.nodes,
            serving=len(serving),
            trainers=len(counts.tokens),
            tokens_per_s=throughput,
            ideal_as_placed=ideal.as_placed,
            ideal_free=ideal.free,
            wanted=self._wanted(),
            of_placed=throughput / ideal.as_placed if ideal.as_placed else 0.0,
            of_free=throughput / ideal.free if ideal.free else 0.0,
            layers=swarm.manifest.model.layers,
            row_bytes=self.calls.row_bytes,
            rows_per_s=sum(machine.rows_per_s for machine in living),
            bit_per_s=sum(min(machine.up_bps, machine.down_bps) for machine in living),
            step_s=_quantiles(counts.step_s),
            call_s=_quantiles(counts.call_s),
            forward_s=_quantiles(counts.pass_s[True]),
            backward_s=_quantiles(counts.pass_s[False]),
            answered_rows=counts.answered_rows / max(1, counts.rows),
            answered_slots=counts.answered_slots / max(1, counts.sent_slots),
            experts_per_token=counts.sent_slots / max(1, counts.rows),
            rows_per_token=self._rows_per_token(),
            hedged=more["hedged_calls"] / real_calls,
            failed=more["failures"] / real_calls,
            reselected=more["reselected_rows"] / max(1, counts.rows),
            load_cv=float(busy.std() / busy.mean()) if busy.any() else 0.0,
            busiest=float(busy.max(initial=0.0)),
            busiest_expert=float(popular.max()),
            in_flight=in_flight,
            others_tokens_per_s=float(counts.tokens[:-1].mean()) / window.seconds
            if len(counts.tokens) > 1
            else 0.0,
        )

    def _rows_per_token(self) -> float:
        return self.counts.sent_rows / max(1, self.counts.rows)

    def _bytes_per_token(self) -> float:
        """Bytes that a trainer sends for one token, and bytes that it receives."""
        layers = self.swarm.manifest.model.layers
        return 2 * layers * self._rows_per_token() * self.calls.row_bytes

    def _wanted(self) -> float:
        carried = self._bytes_per_token()
        return sum(self.limit(machine, carried) for machine in self.machines[self.nodes :])

    def _ideal(self) -> Ideal:
        """The upper bound, for the share of answers that real trainers received and the bytes they took.

        Trainers do without answers from experts whose hosts are overloaded, which a flow cannot represent.
        """
        swarm, manifest = self.swarm, self.swarm.manifest
        counts = self.counts
        sent, answered = (slots / max(1, counts.rows) for slots in (counts.sent_slots, counts.answered_slots))
        demand = (self.rows / np.maximum(self.rows.sum(axis=1, keepdims=True), 1e-9)).ravel() * answered
        # Bytes for one answer. Experts on the same node share a row's bytes.
        carried = 2 * self._rows_per_token() / max(sent, 1e-9) * self.calls.row_bytes
        capacity = np.array(
            [
                0.0
                if number in swarm.dead
                else min(m.rows_per_s, m.up_bps / 8 / carried, m.down_bps / 8 / carried)
                for number, m in enumerate(self.machines[: self.nodes])
            ]
        )
        uids = [
            UID(layer, tuple(map(int, place)))
            for layer in range(manifest.model.layers)
            for place in np.ndindex(*manifest.experts.grid)
        ]
        return ideal_throughput(demand, [swarm.hosts.get(uid, ()) for uid in uids], capacity, self._wanted())


def _totals(real: "Sequence[RealTrainer]") -> dict[str, float]:
    names = ("calls", "hedged_calls", "reselected_rows", "failures")
    return {name: sum(total(getattr(t.dispatcher.metrics, name)) for t in real) for name in names}


def _quantiles(values: Sequence[float]) -> dict[str, float]:
    if not len(values):
        return {}
    return {f"p{round(100 * q)}": float(np.quantile(values, q)) for q in (0.5, 0.9, 0.99)}
