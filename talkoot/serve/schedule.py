"""Which streams are computed together, when there are more than there are places: a pure core.

Places are shared as evenly between clients as their demand lets (max-min fairness). A stream that gives its place up is
computed again from its tokens when it gets one back, so streams change places seldom: at once where one client has two
more than another, and after a slice of tokens where it has one more.
"""

from collections import deque
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

S = TypeVar("S", bound=Hashable)

SLICE = 64
"""Tokens that a stream gets before it gives its place to another client's."""


class FairSchedule(Generic[S]):
    """Streams of clients, some of which have a place. Those of one client begin in the order in which they came."""

    def __init__(self, places: int) -> None:
        self._places = places
        self._client_of: dict[S, str] = {}
        self._waiting: dict[str, deque[S]] = {}
        """Waiting streams by client, in the order in which clients are served if they have equally many places."""
        self._served: dict[S, int] = {}
        """The rounds of each stream that has a place since it got it, in the order in which they did."""

    def __len__(self) -> int:
        return len(self._client_of)

    def __iter__(self) -> Iterator[S]:
        """All streams: those that have a place, in a stable order, and then those that wait."""
        yield from self._served
        for queue in self._waiting.values():
            yield from queue

    @property
    def running(self) -> list[S]:
        return list(self._served)

    @property
    def waiting(self) -> int:
        """How many streams have no place."""
        return len(self._client_of) - len(self._served)

    def add(self, client: str, stream: S) -> None:
        self._client_of[stream] = client
        self._waiting.setdefault(client, deque()).append(stream)

    def remove(self, stream: S) -> None:
        """Removes a stream that has ended, whether it had a place or not."""
        client = self._client_of.pop(stream)
        if stream in self._served:
            del self._served[stream]
        else:
            self._take_out(client, stream)

    def next_round(self) -> list[S]:
        """Gives out places for the next token. Returns the streams that have lost theirs."""
        lost = []
        for stream in self._served:
            self._served[stream] += 1
        while self._waiting:
            counts = self._counts()
            poorest = min(self._waiting, key=lambda client: counts.get(client, 0))
            if len(self._served) == self._places:
                loser = self._loser(counts, counts.get(poorest, 0))
                if loser is None:
                    break
                lost.append(loser)
                del self._served[loser]
                self._waiting.setdefault(self._client_of[loser], deque()).append(loser)
            stream = self._waiting[poorest][0]
            self._take_out(poorest, stream)
            self._served[stream] = 0
        return lost

    def _counts(self) -> dict[str, int]:
        counts: dict[str, int] = {}
        for stream in self._served:
            client = self._client_of[stream]
            counts[client] = counts.get(client, 0) + 1
        return counts

    def _loser(self, counts: dict[str, int], fewest: int) -> S | None:
        """The stream that gives its place to one of a client that has `fewest`; None if that would be no fairer."""
        most = max(counts.values())
        rich = [stream for stream in self._served if counts[self._client_of[stream]] == most]
        if most - fewest >= 2:
            return min(rich, key=self._served.__getitem__)
        longest = max(rich, key=self._served.__getitem__)
        return longest if most > fewest and self._served[longest] >= SLICE else None

    def _take_out(self, client: str, stream: S) -> None:
        """Takes a waiting stream out. Its client is then served after the others that wait."""
        queue = self._waiting.pop(client)
        queue.remove(stream)
        if queue:
            self._waiting[client] = queue
