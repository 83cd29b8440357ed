"""The simulated side of the validation: the product's hosting, directory and dispatcher in virtual time."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.internet.calls import Calls, Costs, ModelCaller, row_bytes
from benchmarks.internet.dht_model import ModelLookups
from benchmarks.internet.nodes import InternetSwarm, SimulatedNode, SwarmPlan
from benchmarks.internet.stand_ins import SharedRegistry, simulated
from benchmarks.internet.validation.measured import Adoption, Measured, Stretch
from benchmarks.internet.validation.scenario import Hosting, Scenario
from benchmarks.internet.validation.steady_trainers import Step, settings_of, train
from benchmarks.internet.world import World
from benchmarks.simulated_p2p import SimulatedIdentity
from dht.directory import Directory
from dht.experts import ExpertRegistry
from peer.identity import PeerID
from trainer_client.client import TrainerTiming
from trainer_client.dispatch.dispatcher import Dispatcher
from trainer_client.dispatch.policy import WaitPolicy

_JOIN_WITHIN_S = 7.5
"""The time over which nodes join one after another: about as long as processes take to start."""
_START_LIMIT_S = 300.0
_LOOK_EVERY_S = 0.25
_SETTLES_WITHIN_S = 15.0
_STATE_BYTES = 3e3
_SLOT_S = 0.005
_UNLIMITED_BPS = 1e12


@dataclass(frozen=True)
class EmulatedMachine:
    """A node behind an emulated link, or a trainer, which has no link."""

    up_bps: float = _UNLIMITED_BPS
    down_bps: float = _UNLIMITED_BPS
    rtt_s: float = 0.0
    nat: bool = True
    """Trainers accept no calls."""
    rows_per_s: float = 1.0
    is_hostile: bool = False


class SimulatedRun:
    """One run, in a world of its own."""

    def __init__(self, scenario: Scenario, world: World) -> None:
        self._scenario = scenario
        self._world = world
        link = scenario.emulated_link
        bps = _UNLIMITED_BPS if link.rate_mbit is None else 1e6 * link.rate_mbit
        self._machines = [
            EmulatedMachine(bps, bps, link.delay_s, nat=False, rows_per_s=speed)
            for speed in scenario.speeds()
        ]
        plan = SwarmPlan(scenario.manifest, _STATE_BYTES, settings=scenario.node_settings)
        self._swarm = InternetSwarm(world, plan)
        self._nodes: list[SimulatedNode] = []
        self._silent: set[int] = set()
        self._numbers: dict[PeerID, int] = {}
        self._steps: list[Step] = []
        self._begun = asyncio.Event()
        """Set when trainers begin to train."""
        self._tasks: list[asyncio.Task[Any]] = []
        self._calls = Calls(
            [*self._machines, *[EmulatedMachine()] * scenario.trainers],
            scenario.nodes,
            row_bytes(scenario.manifest),
            np.random.default_rng((world.seed, 0)),
            Costs(jitter=scenario.jitter),
            _SLOT_S,
        )

    def run(self) -> Measured:
        scenario, world = self._scenario, self._world
        joins = world.rng("joins")
        for number, machine in enumerate(self._machines):
            node = self._swarm.join(machine, scenario.room)
            self._nodes.append(node)
            self._numbers[node.peer.peer_id] = number
            world.run(joins.uniform(0, _JOIN_WITHIN_S))
        self._until(lambda: self._hosted() >= scenario.wanted_replicas, _START_LIMIT_S)
        world.run(scenario.at_rest_after_s)
        quiet = self._stretch(scenario.quiet_s)
        self._spawn(self._let_calls_pass())
        for trainer in range(scenario.trainers):
            self._spawn(self._train(trainer))
        world.run(_SETTLES_WITHIN_S)
        reading = self._stretch(scenario.reading_s)
        self._begun.set()
        world.run(_SETTLES_WITHIN_S)
        training = self._stretch(scenario.training_s)
        adoption = self._silence()
        world.run(_SETTLES_WITHIN_S)
        after = self._stretch(scenario.after_s)
        for task in self._tasks:
            task.cancel()
        world.run(0.0)
        for task in self._tasks:
            if task.done() and not task.cancelled() and (error := task.exception()):
                raise error
        return Measured(quiet, reading, training, adoption, after)

    def _spawn(self, work: Any) -> None:
        self._tasks.append(asyncio.ensure_future(work, loop=self._world.loop))

    def _until(self, condition: Callable[[], bool], limit_s: float) -> None:
        ends = self._world.time() + limit_s
        while not condition() and self._world.time() < ends:
            self._world.run(_LOOK_EVERY_S)

    def _hosted(self) -> int:
        return sum(len(node.runtime.experts) for node in self._nodes)

    async def _let_calls_pass(self) -> None:
        """From now on, advances the calls slot by slot."""
        calls, loop = self._calls, asyncio.get_running_loop()
        while calls.now < loop.time():
            calls.step()
        while True:
            await asyncio.sleep(max(0.0, calls.now + _SLOT_S - loop.time()))
            calls.step()
            for node, rows in zip(self._nodes, calls.queued_rows(), strict=True):
                node.runtime.queued_rows = int(rows)

    async def _train(self, trainer: int) -> None:
        """Trains with a trainer that is assembled like the one of `SwarmClient`."""
        scenario, world, timing = self._scenario, self._world, TrainerTiming()
        settings = settings_of(scenario)
        peer = world.add(EmulatedMachine(), SimulatedIdentity(10**6 + trainer))
        lookups: Any = ModelLookups(self._swarm.dht, peer)
        identity: Any = peer.identity
        registry = SharedRegistry(
            lookups,
            self._swarm.keys,
            identity,
            guard=self._swarm.guard,
            now=world.now,
            rng=world.rng("trainers"),
        )
        registry.lookups = lookups
        directory = Directory(
            ExpertRegistry(registry, scenario.manifest),
            scenario.manifest,
            refresh_every_s=timing.refresh_every_s,
            now=world.now,
            rng=world.rng("trainers"),
        )
        await directory.refresh()
        caller = ModelCaller(self._calls, scenario.nodes + trainer, self._numbers)
        policy = WaitPolicy(
            settings.call_deadline_s, settings.grace_s, settings.k_min, timing.least_deadline_s
        )
        dispatcher = Dispatcher(
            directory, caller, policy, seed=trainer, clock=world.time, is_silent=caller.is_silent
        )
        async with asyncio.TaskGroup() as group:
            group.create_task(directory.keep_fresh())
            await self._begun.wait()
            group.create_task(train(dispatcher, scenario, trainer, world.time, self._steps.append))

    def _silence(self) -> Adoption:
        """Makes nodes fall silent, as with the real processes."""
        scenario, world = self._scenario, self._world
        hosting = Hosting(
            {
                str(uid): [self._numbers[node.peer.peer_id] for node in hosts]
                for uid, hosts in self._swarm.hosts().items()
            }
        )
        victims = hosting.victims(scenario)
        vacant, lost = hosting.vacant(victims), hosting.replicas(victims)
        self._silent.update(victims)
        adopted, began = self._adopted, world.time()
        times: list[float] = []
        for number in victims:
            self._calls.kill(number)
            self._swarm.crash(self._nodes[number])

        def are_adopted() -> bool:
            times.extend([world.time() - began] * (self._adopted - adopted - len(times)))
            return len(times) >= vacant

        self._until(are_adopted, scenario.adoption_limit_s)
        return Adoption(lost, vacant, self._adopted - adopted, times)

    @property
    def _adopted(self) -> int:
        living = (node for number, node in enumerate(self._nodes) if number not in self._silent)
        return sum(int(getattr(node.hosting.adopted, "count")) for node in living)  # noqa: B009  # a stand-in's

    def _stretch(self, seconds: float) -> Stretch:
        world, steps, carried = self._world, len(self._steps), self._carried()
        world.run(seconds)
        return Stretch(
            seconds, len(self._nodes) - len(self._silent), self._carried() - carried, self._steps[steps:]
        )

    def _carried(self) -> float:
        """Bytes carried so far, each counted once."""
        return sum(self._world.accounts.totals().values()) / 2 + float(self._calls.sent_bytes.sum())


def simulate(scenario: Scenario, seed: int) -> Measured:
    """Simulates one run. Another seed changes the random events, but not the nodes and trainers."""
    with simulated(seed) as world:
        return SimulatedRun(scenario, world).run()
