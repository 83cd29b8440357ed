"""Which failures happen when: a pure function of a seed, a length and the size of a swarm."""

import random
from dataclasses import dataclass
from enum import StrEnum

FOUNDER = 0
_LEAST_WELL = 0.5
"""The share of the nodes that stay healthy when others are frozen or cut off."""
_LEAST_ALIVE = 0.25
"""The share of the nodes that stay healthy when one dies, except when the founder does."""
_POLITE = 3
"""One death in this many is a polite stop, not a kill."""
_STAYS_AWAY = 1 / 3
"""The share of the dead nodes that return only after others have had time to adopt their experts."""
_SOON, _LATE = (0.3, 0.8), (1.5, 2.5)
"""How long dead nodes are away, in multiples of the time between deaths."""
_TROUBLE = (0.3, 0.7)
"""How long nodes are frozen or cut off, in multiples of the time between deaths."""


class Deed(StrEnum):
    """A kind of thing that is done to nodes."""

    KILL = "kill"
    STOP = "stop"
    RESTART = "restart"
    FREEZE = "freeze"
    THAW = "thaw"
    CUT = "cut"
    """Cuts all links between these nodes and all other peers."""
    MEND = "mend"


DEATHS = (Deed.KILL, Deed.STOP)


@dataclass(frozen=True)
class Event:
    """What is done to some nodes, `at_s` seconds after the beginning."""

    at_s: float
    deed: Deed
    nodes: tuple[int, ...]


def make_schedule(seed: int, seconds: float, nodes: int = 8, every_s: float = 20.0) -> tuple[Event, ...]:
    """Schedules a death every `every_s` seconds, except at the end; between deaths, nodes are in turn frozen or cut
    off.

    The founder is killed half-way. At the end all nodes are healthy again.
    """
    rng = random.Random(f"{seed} {seconds} {nodes} {every_s}")
    last_s = seconds - every_s / 2
    deaths = int((seconds - every_s * 0.9) / every_s)
    events: list[Event] = []
    busy_until = dict.fromkeys(range(nodes), 0.0)
    founder_dies = (deaths + 1) // 2
    busy_until[FOUNDER] = founder_dies * every_s  # nothing ails it before

    def draw(at_s: float, least: float, count: int = 1) -> tuple[int, ...]:
        """Draws up to `count` healthy nodes, so that a share `least` of all nodes stays healthy."""
        well = [n for n in range(nodes) if busy_until[n] <= at_s]
        most = min(count, len(well) - round(least * nodes))
        return tuple(sorted(rng.sample(well, max(0, most))))

    def ail(
        at_s: float, chosen: tuple[int, ...], deeds: tuple[Deed, Deed], lasts: tuple[float, float]
    ) -> None:
        until_s = min(at_s + rng.uniform(*lasts) * every_s, last_s)
        events.extend((Event(at_s, deeds[0], chosen), Event(until_s, deeds[1], chosen)))
        for node in chosen:
            busy_until[node] = until_s + every_s / 4  # it needs some time to be there again

    for number in range(1, deaths + 1):
        at_s = number * every_s
        is_founders = number == founder_dies
        chosen = (FOUNDER,) if is_founders else draw(at_s, _LEAST_ALIVE)
        polite = not is_founders and number % _POLITE == 0
        away = _LATE if rng.random() < _STAYS_AWAY else _SOON
        if chosen:
            ail(at_s, chosen, (Deed.STOP if polite else Deed.KILL, Deed.RESTART), away)
        between_s = at_s + every_s * rng.uniform(0.1, 0.3)
        if number % 3 == 1 and (frozen := draw(between_s, _LEAST_WELL)):
            ail(between_s, frozen, (Deed.FREEZE, Deed.THAW), _TROUBLE)
        if number % 3 == 2 and (cut := draw(between_s, _LEAST_WELL, 2)):
            ail(between_s, cut, (Deed.CUT, Deed.MEND), _TROUBLE)
    return tuple(sorted(events, key=lambda event: (event.at_s, event.deed, event.nodes)))
