"""A swarm of volunteers who come and go, and what is observed of it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.internet.nodes import InternetSwarm, SimulatedNode, SwarmPlan
from benchmarks.internet.population import GIB, Ending, Session, Volunteer, sessions
from benchmarks.internet.world import World
from benchmarks.simulated_swarm import grid_of
from dht.manifest import Manifest
from dht.uid import UID

EXPERTS_PER_NODE = 0.7
"""Experts in the swarm for each volunteer, so that two replicas of each fill about three quarters of the room."""
MOST_TRAINED = 128
"""The largest number of experts in a layer, in a swarm that is trained."""
START_S = 120.0
"""The time within which the first volunteers join."""
LOOK_EVERY_S = 10.0
_ROOM = {4: 1, 8: 2, 16: 3, 32: 6}
"""How many experts a machine hosts, by its GiB of memory."""


def plan_for(nodes: int) -> SwarmPlan:
    """The plan of a swarm with one layer."""
    experts = max(4, round(EXPERTS_PER_NODE * nodes))
    manifest = {"name": "simulated", "model": {"layers": 1}, "experts": {"grid": grid_of(experts)}}
    return SwarmPlan(Manifest.model_validate(manifest))


def plan_to_train(nodes: int) -> SwarmPlan:
    """The plan of a swarm that is trained: two layers. A large swarm has more replicas instead of more experts, since
    trainers read all experts.
    """
    experts = max(4, min(MOST_TRAINED, round(EXPERTS_PER_NODE * nodes / 2)))
    manifest = {"name": "simulated", "model": {"layers": 2}, "experts": {"grid": grid_of(experts)}}
    return SwarmPlan(Manifest.model_validate(manifest))


def room_of(volunteer: Volunteer) -> int:
    return _ROOM[round(volunteer.memory / GIB)]


@dataclass(frozen=True, slots=True)
class Look:
    """The state of the swarm at one moment."""

    at_s: float
    living: int
    served: float
    """The share of the experts that some node serves."""
    replicas: float
    """The mean number of replicas of an expert."""


class VolunteerSwarm:
    """Volunteers, their nodes, and what was lost with nodes that disappeared without notice."""

    def __init__(self, world: World, volunteers: Sequence[Volunteer], plan: SwarmPlan) -> None:
        self.world = world
        self.volunteers = volunteers
        self.swarm = InternetSwarm(world, plan)
        self.nodes: list[SimulatedNode | None] = [None] * len(volunteers)
        """The latest node of each volunteer, whether or not it still runs."""
        self.looks: list[Look] = []
        self.updates = 0.0
        """Updates that all replicas have taken."""
        self.updates_lost = 0.0
        self._orphans: dict[UID, int] = {}
        """Experts whose last replica died, and its update count. The count with which such an expert continues shows
        what was lost.
        """

    @property
    def experts(self) -> int:
        return self.swarm.plan.manifest.experts_total

    def begin(self, numbers: Sequence[int] | None = None, within_s: float = START_S) -> None:
        """The volunteers with these numbers, or all of them, join and stay."""
        rng = self.world.rng("begin")
        for number in range(len(self.volunteers)) if numbers is None else numbers:
            self.world.loop.call_later(rng.uniform(0.0, within_s), self.join, number)

    def come_and_go(self, hours: float) -> None:
        """Volunteers join and end as their sessions say."""
        rng = self.world.rng("sessions")
        for number, volunteer in enumerate(self.volunteers):
            self._follow(number, iter([*sessions(rng, volunteer, hours)]))

    def join(self, number: int) -> SimulatedNode:
        volunteer, before = self.volunteers[number], self.nodes[number]
        node = self.swarm.join(volunteer, room_of(volunteer), before)
        self.nodes[number] = node
        return node

    def end(self, number: int, ending: Ending) -> None:
        node = self.nodes[number]
        assert node is not None
        if ending is Ending.LEAVE:
            self.swarm.leave(node)
        elif ending is Ending.SLEEP:
            self.swarm.sleep(node)
        else:
            self.crash([node])

    def crash(self, nodes: Sequence[SimulatedNode]) -> int:
        """Ends nodes without notice, all at once. Returns how many replicas are gone."""
        gone = [(uid, node.runtime.experts[uid]) for node in nodes for uid in node.runtime.experts]
        for node in nodes:
            self.swarm.crash(node)
        served = self.served()
        for uid, expert in gone:
            if uid in served:
                self.updates_lost += max(0, expert.update_count - expert.shared_count)
            else:
                self._orphans[uid] = max(expert.update_count, self._orphans.get(uid, 0))
        return len(gone)

    def serving(self) -> Iterator[SimulatedNode]:
        """The nodes that answer calls."""
        return (
            node for node in self.swarm.nodes.values() if node.peer.is_alive and not node.replicas.leaving
        )

    def served(self) -> set[UID]:
        found: set[UID] = set()
        for node in self.serving():
            found.update(node.runtime.experts)
        return found

    def look(self) -> Look:
        """Records the state of the swarm."""
        served: set[UID] = set()
        replicas = 0
        for node in self.serving():
            replicas += len(node.runtime.experts)
            served.update(node.runtime.experts)
        self._settle_orphans(served)
        now = self.world.time()
        if self.looks:
            self.updates += replicas * self.swarm.plan.updates_per_s * (now - self.looks[-1].at_s)
        look = Look(now, self.world.living, len(served) / self.experts, replicas / self.experts)
        self.looks.append(look)
        return look

    def run(self, seconds: float, look_every_s: float = LOOK_EVERY_S) -> list[Look]:
        """Lets time pass, and returns the states of the swarm meanwhile."""
        first, ends = len(self.looks), self.world.time() + seconds
        while self.world.time() < ends:
            self.world.run(min(look_every_s, ends - self.world.time()))
            self.look()
        return self.looks[first:]

    def _settle_orphans(self, served: set[UID]) -> None:
        again = self._orphans.keys() & served
        if not again:
            return
        counts: dict[UID, int] = dict.fromkeys(again, 0)
        for node in self.serving():
            for uid in again & node.runtime.experts.keys():
                counts[uid] = max(counts[uid], node.runtime.experts[uid].update_count)
        for uid in sorted(again):
            self.updates_lost += max(0, self._orphans.pop(uid) - counts[uid])

    def _follow(self, number: int, left: Iterator[Session]) -> None:
        session = next(left, None)
        if session is None:
            return
        loop, now = self.world.loop, self.world.time()
        start_s = (
            session.start_s if session.start_s > now else now + self.world.rng("begin").uniform(0, START_S)
        )
        if session.end_s <= start_s:
            self._follow(number, left)
            return
        loop.call_at(start_s, self._start, number)
        loop.call_at(session.end_s, self._end, number, session.ending, left)

    def _start(self, number: int) -> None:
        node = self.nodes[number]
        if node is not None and node.peer.awake is not None:
            self.swarm.resume(node)
        else:
            self.join(number)

    def _end(self, number: int, ending: Ending, left: Iterator[Session]) -> None:
        self.end(number, ending)
        self._follow(number, left)


class UpkeepMeter:
    """Measures each peer's bytes of upkeep between two moments."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._since = world.time()
        self._before = self._now()

    def read(self) -> dict[str, float]:
        """kbit/s sent and received since this meter was made: the mean of all living peers, and of the busiest one."""
        seconds = self._world.time() - self._since
        spent = self._now()
        spent[: len(self._before)] -= self._before
        living = np.array([peer.is_alive for peer in self._world.peers], dtype=bool)
        kbit_per_s = 8e-3 * spent[living] / max(seconds, 1e-9)
        return {"mean_kbit_per_s": float(kbit_per_s.mean()), "most_kbit_per_s": float(kbit_per_s.max())}

    def _now(self) -> NDArray[np.float64]:
        return np.array(self._world.accounts.upkeep())
