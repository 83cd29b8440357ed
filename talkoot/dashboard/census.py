"""Who is there, who has gone, and how fast things happen, from one reading to the next. Pure: times are passed in."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from hivemind.p2p import PeerID

from dht.announcements import TrainerInfo


class Renewed(Protocol):
    """A record that its peer renews."""

    @property
    def peer_id(self) -> PeerID: ...
    @property
    def expires_at(self) -> float: ...
    @property
    def renew_every_s(self) -> float: ...


T = TypeVar("T", bound=Renewed)


@dataclass
class Seen(Generic[T]):
    """A peer's last record."""

    info: T
    name: str
    """The PeerID, in base58."""
    seen_at: float
    """When the record was seen first, by this machine's clock: clocks of others may be wrong."""
    gone: bool = False


class Census(Generic[T]):
    """Notes readings, and tells who is live. A peer has gone when its record was not renewed when it was due."""

    def __init__(self, silence_factor: float, most: int, most_gone: int, gone_kept_s: float) -> None:
        self.seen: dict[PeerID, Seen[T]] = {}
        self._silence_factor = silence_factor
        self._most = most
        self._most_gone = most_gone
        self._gone_kept_s = gone_kept_s

    def note(self, found: Mapping[PeerID, T], now: float) -> None:
        """`found`: all valid records of a reading."""
        for peer_id, info in found.items():
            seen = self.seen.get(peer_id)
            if seen is None:
                if len(self.seen) < self._most + self._most_gone:
                    self.seen[peer_id] = Seen(info, peer_id.to_base58(), now)
            elif info.expires_at != seen.info.expires_at:
                seen.info, seen.seen_at = info, now
        for seen in self.seen.values():
            seen.gone = now - seen.seen_at > self._silence_factor * seen.info.renew_every_s
        self._forget(now)

    def live(self) -> dict[PeerID, T]:
        return {peer_id: seen.info for peer_id, seen in self.seen.items() if not seen.gone}

    def _forget(self, now: float) -> None:
        gone = sorted((seen.seen_at, peer_id) for peer_id, seen in self.seen.items() if seen.gone)
        too_many = max(0, len(gone) - self._most_gone)
        for number, (seen_at, peer_id) in enumerate(gone):
            if number < too_many or now - seen_at > self._gone_kept_s:
                del self.seen[peer_id]


@dataclass(frozen=True)
class Pace:
    """What all live trainers do together; None: cannot be told yet."""

    calls_per_s: float | None = None
    bytes_per_s: float | None = None
    failures_per_min: Mapping[str, float] = field(default_factory=dict)


@dataclass
class _Counted:
    """One trainer's counters when its record was seen, and how fast they grew before."""

    trainer: TrainerInfo
    at: float
    pace: Pace | None = None


class Paces:
    """How fast trainers' counters grow, from each of their records to the next."""

    def __init__(self) -> None:
        self._counted: dict[PeerID, _Counted] = {}

    def note(self, trainers: Census[TrainerInfo]) -> Pace:
        """The pace of all live trainers."""
        live = {peer_id: seen for peer_id, seen in trainers.seen.items() if not seen.gone}
        for gone in self._counted.keys() - live.keys():
            del self._counted[gone]
        for peer_id, seen in live.items():
            before = self._counted.get(peer_id)
            if before is None or before.trainer.started_at != seen.info.started_at:
                self._counted[peer_id] = _Counted(seen.info, seen.seen_at)
            elif seen.seen_at > before.at:
                pace = _pace(before.trainer, seen.info, seen.seen_at - before.at)
                self._counted[peer_id] = _Counted(seen.info, seen.seen_at, pace)
        return _together([counted.pace for counted in self._counted.values() if counted.pace is not None])


def _pace(before: TrainerInfo, now: TrainerInfo, seconds: float) -> Pace:
    def grown(later: int, earlier: int) -> float:
        return max(0, later - earlier) / seconds

    moved = now.bytes_sent + now.bytes_received, before.bytes_sent + before.bytes_received
    return Pace(
        grown(now.calls, before.calls),
        grown(*moved),
        {cause: 60 * grown(n, before.failures.get(cause, 0)) for cause, n in now.failures.items()},
    )


def _together(paces: list[Pace]) -> Pace:
    if not paces:
        return Pace()
    failures: Counter[str] = Counter()
    for pace in paces:
        for cause, rate in pace.failures_per_min.items():
            failures[cause] += rate  # type: ignore[assignment]  # a Counter adds floats as well
    return Pace(
        sum(pace.calls_per_s or 0.0 for pace in paces),
        sum(pace.bytes_per_s or 0.0 for pace in paces),
        dict(failures),
    )
