"""Rates: token buckets, pauses after failures and after costly work, fair budgets and turns for many callers, bandwidth
limits, and the least rate of a sender.
"""

import asyncio
import math
import time
from collections import Counter as Multiset
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable
from contextlib import asynccontextmanager
from typing import Generic, TypeVar

from prometheus_client import CollectorRegistry, Counter

from peer.bounded import BoundedDict, Owner
from peer.metrics import total

K = TypeVar("K")
T = TypeVar("T")

BURST_S = 0.2
"""The burst of a bandwidth limit, in seconds of its rate."""
_PIECE_S = 0.05
"""Callers take turns after this much of the rate, so that a short message need not wait for long ones."""
_STOOD_STILL_S, _READS_AFTER_S = 0.2, 1.0
"""A timer that fires later than this shows that the process stood still. How long it then takes, at most, to read what
has arrived.
"""
_LEAST_BURST = 1 / 64
"""What each caller may take at once if the common budget is used up, as a share of its usual burst."""


class TokenBucket:
    """Lets at most rate × t + burst bytes pass in any t seconds, plus the excess of a single take over the burst.

    Pure: `now` is an argument, and never decreases.
    """

    def __init__(self, rate: float, burst: float, now: float) -> None:
        """`rate` in bytes per second, `burst` in bytes. Other units work too."""
        assert rate > 0, "a bucket that never fills lets nothing pass"
        self._rate = rate
        self._burst = burst
        self._level = burst
        self._at = now

    def take(self, size: float, now: float) -> float:
        """Takes `size` bytes and returns how many seconds to wait until they may pass.

        With size 0, returns the wait for the bytes already taken.
        """
        self._level = min(self._burst, self._level + (now - self._at) * self._rate) - size
        self._at = now
        return max(0.0, -self._level / self._rate)

    def give_back(self, size: float) -> None:
        """Undoes the last take, for bytes that did not pass."""
        self._level += size

    def left(self, now: float) -> float:
        """The share of the burst that is left: 1 when the bucket is full, below 0 while takers wait."""
        self.take(0.0, now)
        return self._level / self._burst


class Pace:
    """Waits for the messages of a sender or receiver that may be slow, but must not stall. It falls behind while its
    bytes arrive slower than `rate`, and catches up while they arrive faster. Once it is `grace_s` behind, it is given
    up. So `size` bytes take at most `grace_s` + size / `rate` seconds.
    """

    def __init__(self, rate: float, grace_s: float, what: str = "it") -> None:
        """`rate`: in bytes per second. `what`: what is waited for, for the error."""
        self.late: str = f"{what} stalled, or came slower than {rate:.0f} bytes a second"
        """The text of the TimeoutError."""
        self._rate = rate
        self._grace_s = grace_s
        self._left_s = grace_s

    def limit_s(self, size: int) -> float:
        """How many seconds the next message, of about `size` bytes, may take."""
        return self._left_s + size / self._rate

    def note(self, size: int, took_s: float) -> None:
        """Records a message that has arrived."""
        self._left_s = min(self._grace_s, self.limit_s(size) - took_s)

    async def wait(self, message: Awaitable[T], expected: int, size_of: Callable[[T], int]) -> T:
        """Waits until a message of about `expected` bytes was received or sent. Raises TimeoutError."""
        began, limit_s = time.monotonic(), self.limit_s(expected)
        try:
            async with _awake_for(limit_s):
                result = await message
        except TimeoutError:
            raise TimeoutError(self.late) from None
        took_s = time.monotonic() - began
        self.note(size_of(result), took_s if took_s <= limit_s else 0.0)  # else this process stood still
        return result


@asynccontextmanager
async def _awake_for(seconds: float) -> AsyncIterator[None]:
    """Like `asyncio.timeout`. But if this process stood still meanwhile, because the machine slept or was busy, it
    waits a little longer: what it waits for may have arrived.
    """
    loop, has_stood_still = asyncio.get_running_loop(), False
    ends = loop.time() + seconds
    timer: asyncio.TimerHandle

    def look(due: float) -> None:
        nonlocal timer, has_stood_still
        now = loop.time()
        has_stood_still |= now > due + _STOOD_STILL_S
        if now < ends:
            timer = look_again(now)
        else:
            limit.reschedule(now + _READS_AFTER_S if has_stood_still else now)

    def look_again(now: float) -> asyncio.TimerHandle:
        due = min(now + min(1.0, seconds / 4), ends)
        return loop.call_at(due, look, due)

    async with asyncio.timeout(None) as limit:
        timer = look_again(loop.time())
        try:
            yield
        finally:
            timer.cancel()


class TokenBuckets(Generic[K]):
    """A token bucket for each key. If there are too many keys, the one used longest ago is forgotten, and later starts
    with a full bucket.

    Pure: `now` is an argument, and never decreases.
    """

    def __init__(self, rate: float | None, burst: float, most: int = 65_536) -> None:
        """`rate`: per second and key; None: no limit. `most`: keys remembered."""
        self._rate = rate
        self._burst = burst
        self._buckets: BoundedDict[K, TokenBucket] = BoundedDict(most)

    def __len__(self) -> int:
        return len(self._buckets)

    def wait_s(self, key: K, now: float) -> float:
        """How many seconds to wait for what was already taken."""
        bucket = self._buckets.get(key)
        return 0.0 if bucket is None else bucket.take(0.0, now)

    def take(self, key: K, amount: float, now: float) -> None:
        """Takes `amount`, however large. The next taker waits."""
        if self._rate is None:
            return
        bucket = self._buckets.get(key) or TokenBucket(self._rate, self._burst, now)
        bucket.take(amount, now)
        self._buckets[key] = bucket

    def give_back(self, key: K, amount: float) -> None:
        """Undoes a take."""
        if bucket := self._buckets.get(key):
            bucket.give_back(amount)


class FairLine(Generic[T]):
    """Things that wait in line. Groups take turns, and so do the owners in each. Pure."""

    def __init__(self) -> None:
        self._groups: OrderedDict[Hashable, OrderedDict[Hashable, deque[T]]] = OrderedDict()
        """Those whose turn was longest ago come first. Groups and owners with nothing in line have no entry."""
        self._counts = Multiset[Hashable]()
        """How much of each group is in line."""

    def __len__(self) -> int:
        return self._counts.total()

    def of_group(self, group: Hashable) -> int:
        """How much of a group is in line."""
        return self._counts[group]

    def of(self, owner: Owner) -> int:
        """How much of one owner is in line."""
        owners = self._groups.get(owner.group, OrderedDict())
        return len(owners.get(owner.name, ()))

    def put(self, owner: Owner, item: T) -> None:
        self._groups.setdefault(owner.group, OrderedDict()).setdefault(owner.name, deque()).append(item)
        self._counts[owner.group] += 1

    def pop(self) -> T:
        """The next in line. There must be one."""
        group, owners = self._groups.popitem(last=False)
        name, items = owners.popitem(last=False)
        item = items.popleft()
        if items:
            owners[name] = items
        if owners:
            self._groups[group] = owners
        self._count_one_less(group)
        return item

    def discard(self, owner: Owner, item: T) -> None:
        """Takes something out of the line. Harmless if it is not in line any more."""
        owners = self._groups.get(owner.group, OrderedDict())
        items = owners.get(owner.name, deque())
        if item not in items:
            return
        items.remove(item)
        if not items:
            del owners[owner.name]
        if not owners:
            del self._groups[owner.group]
        self._count_one_less(owner.group)

    def _count_one_less(self, group: Hashable) -> None:
        self._counts[group] -= 1
        if not self._counts[group]:
            del self._counts[group]


class Backoff(Generic[K]):
    """What failed is not tried again for a while, which doubles with each failure in a row. If there are too many keys,
    the one that failed longest ago is forgotten. Pure: `now` is an argument.
    """

    def __init__(
        self,
        first_s: float,
        longest_s: float,
        most: int = 4096,
        jitter: Callable[[], float] = lambda: 1.0,
    ) -> None:
        """`most`: keys remembered. `jitter`: draws the share of a pause after which the next try may begin."""
        self._first_s = first_s
        self._longest_s = longest_s
        self._jitter = jitter
        self._failed: BoundedDict[K, tuple[float, float]] = BoundedDict(most)
        """The length of each pause, and when it ends."""

    def failed(self, key: K, now: float) -> None:
        """Records a failure. Several tries that fail during one pause count once."""
        pause_s, until = self._failed.get(key, (0.0, now))
        if now >= until:
            pause_s = min(max(self._first_s, 2 * pause_s), self._longest_s)
            self._failed[key] = pause_s, now + pause_s * self._jitter()

    def succeeded(self, key: K) -> None:
        self._failed.pop(key, None)

    def holds_back(self, key: K, now: float) -> bool:
        """Whether the key should not be tried now."""
        return now < self._failed.get(key, (0.0, now))[1]

    def pause_s(self, key: K) -> float:
        """The length of the key's last pause; 0 if it has not failed since it last succeeded."""
        return self._failed.get(key, (0.0, 0.0))[0]

    def held_back(self, now: float) -> set[K]:
        """The keys that should not be tried now."""
        return {key for key, (_, until) in self._failed.items() if now < until}


def pause_at_rate(cost: float, rate: float, least_s: float, most_s: float) -> float:
    """The pause after work that cost this many bytes, so that it takes `rate` bytes per second on average; between
    `least_s` and `most_s`.
    """
    return max(least_s, min(cost / rate, most_s))


def decayed(amount: float, age_s: float, half_s: float) -> float:
    """What is left of an amount that counts half after each `half_s` seconds. A negative age, as after a clock was set
    back, counts as none.
    """
    return amount * math.exp2(-max(0.0, age_s) / half_s)


class RecentUse(Generic[K]):
    """How much each key has used lately: older use counts less and less. Pure: `now` is an argument."""

    def __init__(self, half_s: float, most: int = 4096) -> None:
        """`half_s`: after so many seconds, use counts half. `most`: keys remembered, those that used something last."""
        self._half_s = half_s
        self._used: BoundedDict[K, tuple[float, float]] = BoundedDict(most)
        """How much each key had used when it used something last, and when that was."""

    def of(self, key: K, now: float) -> float:
        used, at = self._used.get(key, (0.0, now))
        return decayed(used, now - at, self._half_s)

    def add(self, key: K, amount: float, now: float) -> None:
        self._used[key] = self.of(key, now) + amount, now


class FairTurns:
    """Gives out turns at a rate. Callers that must wait are served in a fair order. For one event loop.

    Neighbourhoods take turns, and so do the sources in each. So a source that floods a server only delays itself.
    """

    def __init__(
        self, rate: float, burst: float, *, most: int = 1024, near: int = 256, same: int = 2
    ) -> None:
        """`rate`: turns per second. `burst`: turns given at once after a pause.

        `most`, `near`, `same`: how many may wait, in all, in one neighbourhood and from one source.
        """
        self._bucket = TokenBucket(rate, burst, time.monotonic())
        self._most, self._most_near, self._most_same = most, near, same
        self._line = FairLine[asyncio.Future[None]]()
        self._timer: asyncio.TimerHandle | None = None

    async def turn(self, near: str, source: str) -> bool:
        """Waits for a turn of this source in this neighbourhood. False at once if too many wait."""
        if not self._line and not self._bucket.take(0, time.monotonic()):
            self._bucket.take(1, time.monotonic())
            return True
        owner = Owner(near, source)
        is_full = len(self._line) >= self._most or self._line.of_group(near) >= self._most_near
        if is_full or self._line.of(owner) >= self._most_same:
            return False
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        self._line.put(owner, future)
        if self._timer is None:
            self._timer = loop.call_later(self._bucket.take(0, time.monotonic()), self._serve)
        try:
            await future
        finally:
            self._line.discard(owner, future)  # its caller may have been cancelled
        return True

    def _serve(self) -> None:
        self._timer = None
        while self._line:
            future = self._line.pop()
            if future.done():  # its caller may be cancelled in this turn of the loop
                continue
            future.set_result(None)
            if wait_s := self._bucket.take(1, time.monotonic()):
                self._timer = asyncio.get_running_loop().call_later(wait_s, self._serve)
                return


class FairLock:
    """A lock for which groups take turns, and so do the owners in each. For one event loop."""

    def __init__(self) -> None:
        self._line = FairLine[asyncio.Future[None]]()
        self._is_held = False

    @asynccontextmanager
    async def held_by(self, owner: Owner) -> AsyncIterator[None]:
        if self._is_held:
            await self._wait(owner)
        self._is_held = True
        try:
            yield
        finally:
            self._pass_on()

    async def _wait(self, owner: Owner) -> None:
        future = asyncio.get_running_loop().create_future()
        self._line.put(owner, future)
        try:
            await future
        except asyncio.CancelledError:
            self._line.discard(owner, future)
            if not future.cancelled():  # it was given the lock at that moment
                self._pass_on()
            raise

    def _pass_on(self) -> None:
        while self._line:
            if not (future := self._line.pop()).done():  # its owner may be cancelled in this turn of the loop
                future.set_result(None)
                return
        self._is_held = False


class SharedBudget(Generic[K]):
    """Limits what each caller takes, and what all take together. When all want too much, they get equal shares.

    Virtual time, as in fair queueing (Demers, Keshav & Shenker 1989), is the total that a caller would have got if it
    had always taken its share. So a caller that takes little is always allowed, whatever others do. Pure: `now` is an
    argument, and never decreases.
    """

    def __init__(self, rate: float, rate_of_each: float, burst_s: float = 16.0) -> None:
        """Rates per second. `burst_s`: how many seconds' worth each caller and all together may take at once after a
        pause.
        """
        self._rate, self._rate_of_each = rate, rate_of_each
        self._burst_of_each = burst_s * rate_of_each
        self._all = TokenBucket(rate, burst_s * rate, 0.0)
        self._virtual = self._at = self._counted_at = 0.0
        self._taken: dict[K, float] = {}
        """For callers that have taken more than their share so far: the virtual time at which it becomes their share.
        """

    def allows(self, key: K, now: float, bursts: float = 1.0) -> bool:
        """Whether a caller may take something now, of any size. `bursts`: how many bursts it may be ahead."""
        self._advance(now)
        left = self._all.left(now)
        ahead = self._taken.get(key, self._virtual) - self._virtual
        return left > -bursts and ahead < bursts * self._burst_of_each * max(left, _LEAST_BURST)

    def take(self, key: K, amount: float, now: float) -> None:
        self._advance(now)
        self._all.take(amount, now)
        self._taken[key] = max(self._taken.get(key, 0.0), self._virtual) + amount

    def _advance(self, now: float) -> None:
        share = self._rate / max(1, len(self._taken))
        self._virtual += (now - self._at) * min(self._rate_of_each, share)
        self._at = now
        if now - self._counted_at > 1.0:
            self._counted_at = now
            self._taken = {key: taken for key, taken in self._taken.items() if taken > self._virtual}


class RateLimit:
    """Limits and counts bytes from all senders: first come, first served, in small pieces. For one event loop."""

    def __init__(
        self,
        limit: float | None,
        clock: Callable[[], float] = time.monotonic,
        counter: Counter | None = None,
    ) -> None:
        """`limit`: bytes per second; None: no limit. `counter`: counts the bytes that have passed."""
        self.limit = limit
        self._passed = counter or Counter("passed_bytes", "Bytes that have passed.", registry=None)
        self._clock = clock
        self._turn = asyncio.Lock()  # first come, first served
        self._bucket = None if limit is None else TokenBucket(limit, max(1.0, limit * BURST_S), clock())
        self._piece = None if limit is None else max(1, int(limit * _PIECE_S))

    @property
    def bytes(self) -> int:
        """Bytes that have passed since the start."""
        return int(total(self._passed))

    async def take(self, size: int) -> None:
        """Waits until `size` bytes may pass."""
        if self._bucket is None or self._piece is None:
            self._passed.inc(size)
            return
        left = size
        while left:
            piece = min(left, self._piece)
            async with self._turn:
                await self._wait(self._bucket, piece)
            self._passed.inc(piece)
            left -= piece

    def spend(self, size: int) -> None:
        """Lets `size` bytes pass at once. Bytes that wait in `take` are delayed instead."""
        if self._bucket is not None:
            self._bucket.take(size, self._clock())
        self._passed.inc(size)

    async def _wait(self, bucket: TokenBucket, size: int) -> None:
        if not (delay_s := bucket.take(size, self._clock())):
            return
        try:
            await asyncio.sleep(delay_s)
        except asyncio.CancelledError:
            bucket.give_back(size)
            raise


class Bandwidth:
    """Upload and download of all calls together."""

    def __init__(self, up: RateLimit | None = None, down: RateLimit | None = None) -> None:
        self.up: RateLimit = up or RateLimit(None)
        self.down: RateLimit = down or RateLimit(None)


def upload_limit(mbit: float | None, metrics: CollectorRegistry | None = None) -> RateLimit:
    """In Mbit/s; None: no limit."""
    sent = Counter("talkoot_uploaded_bytes", "Payload of answers, in bytes.", registry=metrics)
    return RateLimit(_bytes_per_s(mbit), counter=sent)


def download_limit(mbit: float | None, metrics: CollectorRegistry | None = None) -> RateLimit:
    """In Mbit/s; None: no limit."""
    received = Counter("talkoot_downloaded_bytes", "Payload of calls, in bytes.", registry=metrics)
    return RateLimit(_bytes_per_s(mbit), counter=received)


def _bytes_per_s(mbit: float | None) -> float | None:
    return None if mbit is None else mbit * 1e6 / 8
