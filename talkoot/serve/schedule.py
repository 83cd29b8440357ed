"""Which streams are computed together, if there are more streams than places. A pure core.

Places are shared between clients as evenly as their demand allows (max-min fairness). A stream that gives up its place
must later be computed again from its tokens, so places change rarely: at once if one client has two places more than
another, and after a slice of tokens if it has one more.
"""

from collections import deque
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

S = TypeVar("S", bound=Hashable)

SLICE = 64
"""For how many rounds a stream keeps its place before another client's gets it. In each, it gets one token or none."""


class FairSchedule(Generic[S]):
    """The streams of clients, some of which have a place. Streams of one client begin in the order of their arrival."""

    def __init__(self, places: int) -> None:
        self._places = places
        self._client_of: dict[S, str] = {}
        self._waiting: dict[str, deque[S]] = {}
        """Waiting streams by client. Among clients with equally many places, the first one is served first."""
        self._served: dict[S, int] = {}
        """For each stream with a place, the rounds since it got it; in the order in which they got their places."""

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
        """Assigns places for the next token. Returns the streams that have lost theirs."""
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
        """The stream that gives up its place for a client that has `fewest`; None if that would not be fairer."""
        most = max(counts.values())
        rich = [stream for stream in self._served if counts[self._client_of[stream]] == most]
        if most - fewest >= 2:
            return min(rich, key=self._served.__getitem__)
        longest = max(rich, key=self._served.__getitem__)
        return longest if most > fewest and self._served[longest] >= SLICE else None

    def _take_out(self, client: str, stream: S) -> None:
        """Takes a waiting stream out. Its client is then served after the other waiting ones."""
        queue = self._waiting.pop(client)
        queue.remove(stream)
        if queue:
            self._waiting[client] = queue
