"""Trainers that send real rows: the product's gate, balance, beam search, choice of replicas and dispatcher.

Shapes: R rows, D columns.
"""

import asyncio
from collections.abc import Sequence
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import torch

from benchmarks.internet.calls import ModelCaller
from benchmarks.internet.window import Pacing, ReadDirectory, RecordedPass, SharedWindow
from dht.beam_search import Selection
from dht.directory import LiveExperts, prefix_tables
from dht.manifest import Manifest
from peer.codec import Floats
from trainer_client.balancing import Load, LoadBias
from trainer_client.dispatch.batches import ForwardPass, RoutedRows, Segments
from trainer_client.dispatch.dispatcher import Dispatcher
from trainer_client.routers import Gate, NodeLimit, Routing

_HIDDEN = 32
"""Columns of the rows in the simulation. Bytes are counted for the manifest's width."""
_BYTES_IN_ROW = 4
_BALANCED_STEPS = 40
"""Steps that balancing takes before the window, since trainers start with what others have learned."""


class Texts:
    """Rows of a text: each is the embedding of a byte and of those before it."""

    def __init__(self, seed: int) -> None:
        text = "\n".join(topics[name] for name in sorted(topics)).encode()
        self._bytes = np.frombuffer(text, np.uint8)
        rng = np.random.default_rng(seed)
        embedding = rng.standard_normal((256, _HIDDEN))
        turns = rng.standard_normal((_BYTES_IN_ROW, _HIDDEN, _HIDDEN)) / (_BYTES_IN_ROW * _HIDDEN) ** 0.5
        self._tables: Floats = (embedding @ turns).astype(np.float32)  # [bytes in a row, 256, D]

    def rows(self, sequences: int, length: int, rng: np.random.Generator) -> Floats:
        """[R, D]"""
        starts = rng.integers(0, len(self._bytes) - length - _BYTES_IN_ROW, sequences)
        places = (starts[:, None] + np.arange(length)).ravel()
        rows: Floats = self._tables[0][self._bytes[places]]
        for number in range(1, _BYTES_IN_ROW):
            rows += self._tables[number][self._bytes[places + number]]
        return rows


class Mixture:
    """A trainer's part of one layer: the gate, and the load balancing of its experts."""

    def __init__(self, gate: Gate, routing: Routing, manifest: Manifest, bias: LoadBias | None) -> None:
        self.gate = gate
        self.routing = routing
        self.manifest = manifest
        self.balance = LoadBias(manifest.experts.grid) if routing.has_bias else None
        if self.balance is not None and bias is not None:
            self.balance.load_state_dict(bias.state_dict())

    @classmethod
    def balanced(cls, manifest: Manifest, routing: Routing, layer: int, seed: int) -> "Mixture":
        """The gate with the bias that it settles on when all experts are available."""
        torch.manual_seed(seed * 1000 + layer)
        gate = Gate(_HIDDEN, manifest.score_sizes, has_noise=routing.router.has_noise)
        mixture, texts = cls(gate, routing, manifest, None), Texts(seed)
        alive, rng = prefix_tables(np.ones(manifest.experts.grid, bool)), np.random.default_rng((seed, layer))
        for _ in range(_BALANCED_STEPS if mixture.balance is not None else 0):
            scores = mixture.scores(texts.rows(8, 128, rng))
            selection = routing.router.choose(scores, alive, routing.k, rng, mixture.bias())
            mixture.correct(mixture.measure(scores, selection, alive))
        return mixture

    def copy(self) -> "Mixture":
        return Mixture(self.gate, self.routing, self.manifest, self.balance)

    def scores(self, rows: Floats) -> list[Floats]:
        with torch.no_grad():
            found: list[Floats] = [table.numpy() for table in self.gate(torch.from_numpy(rows))]
            return found

    def bias(self) -> Floats | None:
        return None if self.balance is None else self.balance.table()

    def measure(self, scores: Sequence[Floats], selection: Selection, alive: Any) -> Load | None:
        if self.balance is None or not selection.valid.any():
            return None
        return self.balance.measure([torch.from_numpy(table) for table in scores], selection, alive)

    def correct(self, load: Load | None) -> None:
        if self.balance is not None and load is not None:
            self.balance.correct(load)


class RealTrainer:
    """The product's dispatcher, driven by steps that compute nothing but the gate."""

    def __init__(self, play: SharedWindow, number: int, mixtures: Sequence[Mixture]) -> None:
        self._play = play
        self._number = number
        self._peer = play.nodes + number
        self._rng = np.random.default_rng((play.seed, 2, number))
        self._texts = Texts(play.seed)
        self._mixtures = [mixture.copy() for mixture in mixtures]
        self._directory = ReadDirectory(play.announced)
        self.pacing = Pacing(play.in_flight(number))
        loop = asyncio.get_running_loop()
        caller = ModelCaller(play.calls, self._peer, play.numbers)
        self.dispatcher = Dispatcher(
            self._directory, caller, play.policy, seed=number, clock=loop.time, is_silent=caller.is_silent
        )

    async def run(self) -> None:
        """Trains until it is cancelled."""
        steps = 0
        if self._number:
            await asyncio.sleep(self._play.window.start_s * self._rng.random())
        running: set[asyncio.Task[None]] = set()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._keep_reading())
            while True:
                while self.pacing.lacks > 0:
                    steps += 1
                    self.pacing.begin(steps, asyncio.get_running_loop().time())
                    running.add(group.create_task(self._step(steps)))
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()

    async def _keep_reading(self) -> None:
        every_s = self._play.window.refresh_every_s
        await asyncio.sleep(self._rng.random() * every_s)
        while True:
            self._directory.read()
            await asyncio.sleep(every_s)

    async def _step(self, number: int) -> None:
        play, window = self._play, self._play.window
        loop = asyncio.get_running_loop()
        part = window.dense_rows * window.tokens / 3 / len(self._mixtures)
        passes = []
        for layer, mixture in enumerate(self._mixtures):
            await self._compute(part)
            inputs = self._texts.rows(window.sequences, window.length, self._rng)
            scores, bias, routing = mixture.scores(inputs), mixture.bias(), play.routing
            live = await self.dispatcher.find(layer, scores, routing.k, bias)
            most = routing.nodes_per_token
            limit = None if most is None else NodeLimit.of(live, most)
            selection = routing.router.choose(scores, live.tables, routing.k, self._rng, bias, limit)
            load = mixture.measure(scores, selection, live.tables)
            segments = Segments.whole(window.sequences, window.length)
            rows = RoutedRows(layer, live.tables[-1].shape, inputs, scores, routing.k, segments, True, bias)
            recorded = self._record(layer, selection, live)
            result = await self.dispatcher.send(rows, selection, live)
            self._count(layer, result, recorded)
            passes.append((result, load))
        for layer in reversed(range(len(passes))):
            await self._compute(2 * part)
            result, load = passes[layer]
            gradients = self._rng.standard_normal(result.updates.shape, dtype=np.float32)
            await self.dispatcher.send_back(result, gradients)
            self._mixtures[layer].correct(load)
        took_s = self.pacing.end(number, loop.time())
        if play.counts.is_on:
            play.counts.tokens[self._number] += window.tokens
            play.counts.step_s[self._number].append(took_s)

    async def _compute(self, work: float) -> None:
        calls = self._play.calls
        await calls.answer(calls.compute(self._peer, work, asyncio.get_running_loop().time(), -1))

    def _record(self, layer: int, selection: Selection, live: LiveExperts) -> RecordedPass:
        play = self._play
        recorded = RecordedPass.of(selection, live, play.numbers, play.swarm.manifest.experts.grid)
        play.recorded.passes[layer].append(recorded)
        return recorded

    def _count(self, layer: int, result: ForwardPass, recorded: RecordedPass) -> None:
        play, answered = self._play, result.answered
        counts, grid = play.counts, play.swarm.manifest.experts.grid
        numbers = np.ravel_multi_index(tuple(result.coordinates[answered].T), grid)
        play.rows[layer] += np.bincount(numbers, minlength=play.rows.shape[1])
        if counts.is_on:
            counts.sent_rows += int(recorded.sent.rows.sum())
            counts.sent_slots += int(recorded.sent.slots.sum())
            counts.rows += len(answered)
            counts.answered_rows += int(answered.any(axis=1).sum())
            counts.answered_slots += int(answered.sum())
