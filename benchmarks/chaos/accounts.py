"""What the deaths in a chaos run have cost, computed from observations of it. All functions are pure."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

Counts = Mapping[str, Mapping[str, int]]
"""Expert → node → update count of the replica that it serves."""


@dataclass(frozen=True)
class Observation:
    """The replicas that answered a call at one moment."""

    at_s: float
    counts: Counts


@dataclass(frozen=True)
class Death:
    """The death of a node, and the state of the swarm just before it."""

    at_s: float
    node: str
    counts: Counts
    """The update counts of all replicas, including the victim's."""
    saved: Mapping[str, int]
    """The newest checkpoint of each expert on any disk."""
    deed: str = "kill"


@dataclass(frozen=True)
class Loss:
    """What the death of a node cost one expert that the node hosted."""

    at_s: float
    node: str
    expert: str
    deed: str
    had_survivor: bool
    before: int
    """Updates that the freshest replica had before the death."""
    kept: int
    """Updates that the freshest surviving replica had. If none survived: those in the freshest checkpoint on any disk,
    including the victim's, which may never come back.
    """
    after: int | None
    """Updates that the expert had when it was served next; None: it was never served again."""
    interval: int
    """Updates that the expert took in the checkpoint interval before the death."""
    away_s: float | None
    """How long no replica was seen to serve it; None: it was never served again."""

    @property
    def updates(self) -> int:
        """The number of updates that were lost."""
        return max(0, self.before - (self.after or 0))

    @property
    def is_lost(self) -> bool:
        """Whether the expert was never served again, or came back without the state of a replica that survived."""
        return self.after is None or (self.had_survivor and self.after < self.kept)

    @property
    def is_beyond_interval(self) -> bool:
        """Whether more was lost than the expert had taken since the last checkpoint was due."""
        return not self.had_survivor and self.updates > self.interval


def losses(
    deaths: Iterable[Death],
    observations: Sequence[Observation],
    *,
    checkpoint_every_s: float,
    rescue_s: float,
) -> list[Loss]:
    """The losses by every death, for every expert that the victim served.

    `checkpoint_every_s`: including the time that saving takes. `rescue_s`: if an expert is first served again without
    the newest state that was kept, a node that has this state on its disk has this long to bring it back.
    """
    found = []
    for death in deaths:
        for expert, replicas in death.counts.items():
            if death.node not in replicas:
                continue
            survivors = [count for node, count in replicas.items() if node != death.node]
            before = max(replicas.values())
            kept = max(survivors) if survivors else death.saved.get(expert, 0)
            interval = max(0, before - _count_at(expert, death.at_s - checkpoint_every_s, observations))
            wanted = kept if survivors else before - interval
            found.append(
                Loss(
                    death.at_s,
                    death.node,
                    expert,
                    death.deed,
                    bool(survivors),
                    before,
                    kept,
                    _after(death, expert, wanted, observations, rescue_s),
                    interval,
                    _away_s(death, expert, observations),
                )
            )
    return found


def _after(
    death: Death, expert: str, wanted: int, observations: Sequence[Observation], rescue_s: float
) -> int | None:
    """Updates of an expert's freshest replica when it is served next. If they are fewer than `wanted` at first, those
    within `rescue_s` afterwards count. None: it was never served again.
    """
    first: tuple[float, int] | None = None
    for seen in _served_after(death, expert, observations):
        count = max(seen.counts[expert].values())
        first = first or (seen.at_s, count)
        if count >= wanted:
            return count
        if seen.at_s > first[0] + rescue_s:
            break
    return None if first is None else first[1]


def _away_s(death: Death, expert: str, observations: Sequence[Observation]) -> float | None:
    return next((seen.at_s - death.at_s for seen in _served_after(death, expert, observations)), None)


def _served_after(death: Death, expert: str, observations: Sequence[Observation]) -> Iterator[Observation]:
    """The observations after a death in which a replica of the expert answered."""
    return (seen for seen in observations if seen.at_s > death.at_s and seen.counts.get(expert))


def _count_at(expert: str, at_s: float, observations: Sequence[Observation]) -> int:
    """Updates of an expert's freshest replica when it was last seen, at `at_s` or before."""
    counts = [0]
    for seen in observations:
        if seen.at_s > at_s:
            break
        counts.append(max(seen.counts.get(expert, {}).values(), default=counts[-1]))
    return counts[-1]
