"""What a chaos run has cost, from what was seen of it. Pure functions of observations."""

from collections.abc import Iterable, Mapping, Sequence
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
    """A node's, and what was there just before."""

    at_s: float
    node: str
    counts: Counts
    """The counts of all replicas, including the victim's."""
    saved: Mapping[str, int]
    """The newest checkpoint of each expert on any disk."""
    deed: str = "kill"


@dataclass(frozen=True)
class Loss:
    """What one death cost one expert that the victim hosted."""

    at_s: float
    node: str
    expert: str
    deed: str
    had_survivor: bool
    before: int
    """Updates that the freshest replica had."""
    kept: int
    """Updates that the freshest surviving replica had; without one, the freshest checkpoint on any disk, the victim's
    included, which may never come back.
    """
    after: int | None
    """Updates when it was served next; None: it never was."""
    interval: int
    """Updates that it took in the checkpoint interval before."""

    @property
    def updates(self) -> int:
        """How many were lost."""
        return max(0, self.before - (self.after or 0))

    @property
    def is_lost(self) -> bool:
        """Whether it was never served again, or a replica that lived was not used."""
        return self.after is None or (self.had_survivor and self.after < self.kept)

    @property
    def is_beyond_interval(self) -> bool:
        """Whether more went than what was taken since the last checkpoint should have been made."""
        return not self.had_survivor and self.updates > self.interval


def losses(
    deaths: Iterable[Death],
    observations: Sequence[Observation],
    *,
    checkpoint_every_s: float,
    rescue_s: float,
) -> list[Loss]:
    """The losses by every death, for every expert that the victim served.

    `checkpoint_every_s`: with the time that saving takes. An expert that is served without the state that was kept has
    `rescue_s` for it to come back, with a node that has it on its disk.
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
                )
            )
    return found


def _after(
    death: Death, expert: str, wanted: int, observations: Sequence[Observation], rescue_s: float
) -> int | None:
    """Its freshest replica when it is served next; or soon after, when it had less than `wanted` at first."""
    first: tuple[float, int] | None = None
    for seen in observations:
        if seen.at_s <= death.at_s or not seen.counts.get(expert):
            continue
        count = max(seen.counts[expert].values())
        first = first or (seen.at_s, count)
        if count >= wanted:
            return count
        if seen.at_s > first[0] + rescue_s:
            break
    return None if first is None else first[1]


def _count_at(expert: str, at_s: float, observations: Sequence[Observation]) -> int:
    """Its freshest replica's updates when it was last seen up to then."""
    counts = [0]
    for seen in observations:
        if seen.at_s > at_s:
            break
        counts.append(max(seen.counts.get(expert, {}).values(), default=counts[-1]))
    return counts[-1]
