"""One budget for the memory that strangers' messages take, shared fairly. Memory is reserved before anything is read.

Longest queue drop (Wei, Coyle & Hsiao 1991), with bytes in place of packets: an owner may hold whatever is free. If
nothing is free, the owner that holds the most, in the group that holds the most, gives up its latest reservation,
unless it is also the one that asks for more (`peer.bounded.Displacement`). So an owner that holds no more than its
share (the limit divided by the number of groups, and then by the number of owners in its group) is never refused and
never loses anything.
"""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from grpc import StatusCode
from prometheus_client import CollectorRegistry, Counter, Gauge

from peer.bounded import Displacement, Owner
from peer.errors import ExpertError
from peer.metrics import start_at_zero

_RETRY_S = 1.0
_REVOKED = "others need the memory, and more than your share of it was yours: try again soon"


class Reservation:
    """Part of a budget, until it is released."""

    __slots__ = ("_budget", "_revoke", "owner", "size")

    def __init__(self, budget: "FairBudget", owner: Owner, revoke: Callable[[], None]) -> None:
        self.owner: Owner = owner
        self.size: int = 0
        self._budget = budget
        self._revoke = revoke

    def grow(self, size: int) -> None:
        """Reserves more. Raises ExpertError (RESOURCE_EXHAUSTED), and then changes nothing."""
        self._budget._add(self, size)

    def release(self) -> None:
        """A second call does nothing."""
        self._budget._remove(self)

    def revoke(self) -> None:
        """Takes the reservation back from its owner."""
        self.release()
        self._revoke()


class FairBudget:
    """How much is reserved for each owner. Pure: it reads no clock, and calls `revoke` to take a reservation back."""

    def __init__(self, limit: int) -> None:
        """`limit`: in bytes, or in any other unit."""
        self.limit = limit
        self.used: int = 0
        self._held: dict[Owner, dict[Reservation, None]] = {}
        """Reservations by owner, the latest last. An owner without reservations has no entry."""
        self._sums: dict[Owner, int] = {}

    def reserve(self, owner: Owner, size: int, revoke: Callable[[], None]) -> Reservation:
        """Raises ExpertError (RESOURCE_EXHAUSTED) if there is no room for it.

        `revoke` is called if the reservation is taken back. It must free what was reserved, and must not raise.
        """
        reservation = Reservation(self, owner, revoke)
        self._add(reservation, size)
        return reservation

    def require_room(self, owner: Owner, size: int) -> None:
        """Raises ExpertError (RESOURCE_EXHAUSTED) if `reserve` would. Takes nothing from anybody."""
        self._to_revoke(owner, size, self.used + size - self.limit)

    def held(self, owner: Owner) -> int:
        return self._sums.get(owner, 0)

    def _add(self, reservation: Reservation, size: int) -> None:
        owner = reservation.owner
        wanted = self.held(owner) + size
        if reservation.size + size > self.limit:
            raise ExpertError(
                StatusCode.RESOURCE_EXHAUSTED,
                f"this needs {reservation.size + size} bytes; at most {self.limit} can be had: send less at once",
            )
        for richest in self._to_revoke(owner, size, self.used + size - self.limit):
            richest.revoke()
        self._held.setdefault(owner, {})[reservation] = None
        self._sums[owner] = wanted
        reservation.size += size
        self.used += size

    def _to_revoke(self, owner: Owner, size: int, missing: int) -> list[Reservation]:
        """The reservations to take from others to free `missing` bytes. Raises ExpertError if that would be unfair."""
        found: list[Reservation] = []
        if missing <= 0:
            return found
        displacement = Displacement(self._sums, owner, size)
        latest = {name: reversed(held) for name, held in self._held.items()}
        while missing > 0:
            richest = displacement.richest()
            if richest is None:
                raise ExpertError(
                    StatusCode.RESOURCE_EXHAUSTED,
                    f"no memory: {self.used} of {self.limit} bytes are in use, {self.held(owner)} of them by you",
                    retry_after_s=_RETRY_S,
                )
            found.append(next(latest[richest]))
            displacement.take(richest, found[-1].size)
            missing -= found[-1].size
        return found

    def _remove(self, reservation: Reservation) -> None:
        owned = self._held.get(reservation.owner, {})
        if reservation not in owned:
            return
        del owned[reservation]
        self.used -= reservation.size
        self._sums[reservation.owner] -= reservation.size
        if not owned:
            del self._held[reservation.owner], self._sums[reservation.owner]


class MemoryBudget(FairBudget):
    """The memory that one process may use for calls in progress. For one event loop."""

    def __init__(self, limit: int, metrics: CollectorRegistry | None = None) -> None:
        super().__init__(limit)
        events = Counter(
            "talkoot_call_memory_events",
            "Calls refused for want of memory, and calls broken off because others needed their memory.",
            ["event"],
            registry=metrics,
        )
        self.events: Counter = start_at_zero(events, "refused", "revoked")
        used = Gauge("talkoot_call_memory_bytes", "Memory reserved for calls under way.", registry=metrics)
        used.set_function(lambda: self.used)

    @contextmanager
    def holding(self, owner: Owner, size: int) -> Iterator[Reservation]:
        """Reserves memory for what the current task does inside.

        Raises ExpertError (RESOURCE_EXHAUSTED) if no memory is free, or if others need this memory before the end.
        """
        with interruptible(_REVOKED) as interrupt:

            def revoke() -> None:
                self.events.labels("revoked").inc()
                interrupt()

            reservation = self.reserve(owner, size, revoke)
            try:
                yield reservation
            finally:
                reservation.release()

    def _add(self, reservation: Reservation, size: int) -> None:
        try:
            super()._add(reservation, size)
        except ExpertError:
            self.events.labels("refused").inc()
            raise


@contextmanager
def interruptible(message: str) -> Iterator[Callable[[], None]]:
    """Yields a function that other tasks call to interrupt what the current task does inside.

    The current task then raises ExpertError (RESOURCE_EXHAUSTED).
    """
    task = asyncio.current_task()
    assert task is not None, "what is inside runs on the loop"
    cancelling, is_interrupted = task.cancelling(), False

    def interrupt() -> None:
        nonlocal is_interrupted
        if not is_interrupted:
            is_interrupted = True
            task.cancel()

    try:
        yield interrupt
    except BaseException as error:
        if is_interrupted and task.uncancel() <= cancelling and isinstance(error, asyncio.CancelledError):
            raise ExpertError(StatusCode.RESOURCE_EXHAUSTED, message, retry_after_s=_RETRY_S) from error
        raise
