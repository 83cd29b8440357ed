"""Circuit breakers: peers that failed are left alone for a while, each time longer. Pure: `now` is passed in."""

from collections import OrderedDict
from dataclasses import dataclass

from hivemind.p2p import PeerID

_LONGEST_BAN_S = 86400.0
_FORGIVEN = 3
"""Quick failures in a row. On a line that loses every tenth call four in a row are one in 10,000."""


@dataclass
class _Breaker:
    failures: int = 0
    """In a row, those forgiven not counted."""
    forgiven: int = 0
    failed_until: float = 0.0
    busy_until: float = 0.0
    distrusted_until: float = 0.0
    offences: int = 0
    """Wrong answers so far, those while it was avoided for one not counted."""


class CircuitBreakers:
    """One breaker for each peer that failed lately.

    After a failure a peer is avoided for `first_s`, after each further one twice as long, up to `longest_s`; once the
    time is over it may be tried again (half-open), and a success closes the breaker. The first three failures in a row
    are forgiven when they came quickly: more tries cost no time, and on a line that loses calls most peers are well.
    """

    def __init__(self, first_s: float = 2.0, longest_s: float = 120.0, limit: int = 4096) -> None:
        """`limit`: peers remembered at most; beyond it the one is forgotten whose last failure is longest ago."""
        self._first_s = first_s
        self._longest_s = longest_s
        self._limit = limit
        self._breakers: OrderedDict[PeerID, _Breaker] = OrderedDict()

    def failed(self, peer_id: PeerID, now: float, *, quickly: bool = False) -> None:
        """The peer did not do what it was asked. A failure while the breaker is open changes nothing."""
        breaker = self._breaker(peer_id)
        if now < breaker.failed_until:
            return
        if quickly and not breaker.failures and breaker.forgiven < _FORGIVEN:
            breaker.forgiven += 1
            return
        breaker.failures += 1
        wait = min(self._first_s * 2 ** min(breaker.failures - 1, 30), self._longest_s)
        breaker.failed_until = now + wait

    def busy(self, peer_id: PeerID, now: float, retry_after_s: float) -> None:
        """The peer asked to be left alone for a while; that is no failure."""
        breaker = self._breaker(peer_id)
        breaker.busy_until = max(breaker.busy_until, now + min(retry_after_s, self._longest_s))

    def distrust(self, peer_id: PeerID, now: float) -> None:
        """The peer answered wrongly: it is banned for the longest time, after each further time for twice as long.

        Whatever else it does well meanwhile does not shorten that.
        """
        breaker = self._breaker(peer_id)
        if now < breaker.distrusted_until:
            return
        ban_s = min(self._longest_s * 2 ** min(breaker.offences, 30), _LONGEST_BAN_S)
        breaker.offences += 1
        breaker.distrusted_until = now + ban_s

    def banned(self, now: float) -> int:
        """How many peers are avoided now for wrong answers."""
        return sum(now < breaker.distrusted_until for breaker in self._breakers.values())

    def succeeded(self, peer_id: PeerID) -> None:
        breaker = self._breakers.pop(peer_id, None)
        if breaker is not None and breaker.offences:
            kept = _Breaker(distrusted_until=breaker.distrusted_until, offences=breaker.offences)
            self._breakers[peer_id] = kept

    def open_at(self, now: float) -> frozenset[PeerID]:
        """The peers to avoid now."""
        return frozenset(
            peer_id
            for peer_id, b in self._breakers.items()
            if now < max(b.failed_until, b.busy_until, b.distrusted_until)
        )

    def _breaker(self, peer_id: PeerID) -> _Breaker:
        breaker = self._breakers.setdefault(peer_id, _Breaker())
        self._breakers.move_to_end(peer_id)
        if len(self._breakers) > self._limit:
            self._breakers.popitem(last=False)
        return breaker
