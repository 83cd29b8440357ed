"""Simulates a window of training on a swarm's placement at one moment, call by call.

Some trainers are real: the product's gate, balancing, beam search, choice of replicas and dispatcher send real rows,
over the links and processors that `benchmarks.internet.calls` models. All others repeat what these sent lately: a drawn
trainer takes a pass of a real one, chooses for each expert another replica among those that the real policy would
choose from, and waits as the wait policy says. It carries no rows, so a thousand of them cost little.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from benchmarks.internet.calls import Machine
from benchmarks.internet.drawn_trainers import DrawnTrainers
from benchmarks.internet.flow import Ideal, ideal_throughput
from benchmarks.internet.real_trainers import Mixture, RealTrainer
from benchmarks.internet.window import PlacedSwarm, SharedWindow, Window
from benchmarks.internet.world import quantile
from benchmarks.simulated_p2p import VirtualLoop
from dht.uid import UID

Booleans = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class TrainingFigures:
    """The results of a window of training."""

    trainers: int
    tokens_per_s: float
    ideal_as_placed: float
    ideal_free: float
    of_placed: float
    of_free: float
    layers: int
    row_bytes: float
    rows_per_s: float
    """Rows per second that all living nodes compute together."""
    bit_per_s: float
    """bit/s that the lines of all living nodes carry together, in the slower direction."""
    step_s: float
    """The median time of a step; 0 if none ended."""
    overhead_s: float
    """The median time of a lone step less what it takes on the trainer's own machine and line; 0 if none ended."""
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
        slot = 0
        while self.calls.now < ends - 1e-9:
            slot += 1
            await asyncio.sleep(max(0.0, slot * window.slot_s - loop.time()))
            told = self.calls.step()
            now = self.calls.now
            self.announced.step(now)
            drawn.step(now, told)
            self.counts.is_on = now >= window.warm_up_s
            for task in tasks:
                if task.done():
                    task.result()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for trainer in real:
            await trainer.dispatcher.close()
        in_flight = [trainer.pacing.wanted for trainer in real] + [p.wanted for p in drawn.pacing.values()]
        return self._figures(float(np.mean(in_flight)))

    def _figures(self, in_flight: float) -> TrainingFigures:
        machines, counts = self.swarm.machines, self.counts
        ideal = self._ideal()
        throughput = float(counts.tokens.sum()) / self.window.seconds
        return TrainingFigures(
            trainers=len(counts.tokens),
            tokens_per_s=throughput,
            ideal_as_placed=ideal.as_placed,
            ideal_free=ideal.free,
            of_placed=throughput / ideal.as_placed if ideal.as_placed else 0.0,
            of_free=throughput / ideal.free if ideal.free else 0.0,
            layers=self.swarm.manifest.model.layers,
            row_bytes=self.calls.row_bytes,
            rows_per_s=sum(machine.rows_per_s for machine in machines),
            bit_per_s=sum(min(machine.up_bps, machine.down_bps) for machine in machines),
            step_s=quantile([seconds for some in counts.step_s for seconds in some], 0.5),
            overhead_s=self._overhead_s(),
            answered_rows=counts.answered_rows / max(1, counts.rows),
            answered_slots=counts.answered_slots / max(1, counts.sent_slots),
            experts_per_token=counts.sent_slots / max(1, counts.rows),
            rows_per_token=self._rows_per_token(),
            in_flight=in_flight,
            others_tokens_per_s=float(counts.tokens[:-1].mean()) / self.window.seconds
            if len(counts.tokens) > 1
            else 0.0,
        )

    def _overhead_s(self) -> float:
        carried, machines = self._bytes_per_token(), self.machines[self.nodes :]
        rest = [
            quantile(some, 0.5) - self.own_s(machines[number], carried)
            for number, some in enumerate(self.counts.step_s)
            if some and self.in_flight(number) == 1
        ]
        return max(0.0, quantile(rest, 0.5))

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
            [min(m.rows_per_s, m.up_bps / 8 / carried, m.down_bps / 8 / carried) for m in swarm.machines]
        )
        uids = [
            UID(layer, tuple(map(int, place)))
            for layer in range(manifest.model.layers)
            for place in np.ndindex(*manifest.experts.grid)
        ]
        return ideal_throughput(demand, [swarm.hosts.get(uid, ()) for uid in uids], capacity, self._wanted())
