"""The dashboard's history, in a SQLite file: means over time steps. Finer steps are kept for a shorter time.

Every figure is added to one step of each tier when it arrives, so nothing has to be condensed later. `History` is the
file; `HistoryStore` uses it from the event loop.
"""

import asyncio
import json
import logging
import math
import os
import sqlite3
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from prometheus_client import CollectorRegistry, Counter

from peer.errors import StartError
from peer.loop import to_thread_whole
from talkoot.dashboard.picture import Picture

logger: logging.Logger = logging.getLogger(__name__)

T = TypeVar("T")
Point = tuple[float, float | None]
MAX_SERIES = 256
"""The most series that are kept: figures of the whole swarm, and the newest of trainers and memories."""
MAX_EXPERTS = 1024
"""A swarm with more experts than this has no history of each expert."""
_FORM = 1
_MAX_PICTURE_BYTES = 64 * 2**20
_BROKEN = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
_GAP_STEPS = 3
"""After this many steps without a figure, a line is interrupted."""
_PICTURE = "picture"
_SAY_EVERY_S = 600.0
"""How often a failure is logged: on a full disk every write fails."""
_TABLES = """
create table if not exists series (id integer primary key, metric text not null, name text not null,
    seen_at real not null, unique (metric, name));
create table if not exists samples (series integer not null, step integer not null, at integer not null,
    total real not null, count integer not null, primary key (series, step, at)) without rowid;
create index if not exists samples_by_age on samples (step, at);
create table if not exists kept (name text primary key, value text not null);
"""


@dataclass(frozen=True)
class Tier:
    """Means over `step_s` seconds, kept for `kept_s`."""

    step_s: int
    kept_s: int


TIERS = (Tier(5, 3600), Tier(60, 86400), Tier(900, 30 * 86400))
EXPERT_TIERS = (Tier(15, 1800), Tier(900, 2 * 86400))
"""Coarser, because there are many experts."""
_EXPERT = "expert_"
"""The prefix of the names of experts' metrics."""
_BREAKS = Tier(0, TIERS[-1].kept_s)
"""Times at which a figure was no longer known: no line is drawn across them."""
_MOST_BREAKS = 64
"""The most that are kept of one series, the newest ones. A trainer could report figures and none in turns."""


@dataclass(frozen=True)
class Sample:
    """One figure at one moment."""

    metric: str
    name: str
    value: float
    """NaN if there is none at present: it interrupts the line, if there is one."""


class History:
    """The file. For one thread at a time."""

    def __init__(
        self, path: Path, most_series: int = MAX_SERIES, most_expert_series: int = 2 * MAX_EXPERTS
    ) -> None:
        """Opens the file, or sets it aside if it is broken. Raises StartError if it can't be written."""
        self._path = path
        self._most = {False: most_series, True: most_expert_series}
        self._ids: dict[tuple[str, str], int] = {}
        self._interrupted: set[tuple[str, str]] = set()
        self._pruned_at = -math.inf
        self._connection = self._opened()

    def close(self) -> None:
        self._connection.close()

    def add(self, samples: Sequence[Sample], now: float) -> None:
        """Adds figures to their steps."""
        unknown = {(sample.metric, sample.name) for sample in samples if math.isnan(sample.value)}
        rows = [
            (self._series(sample), tier.step_s, int(now // tier.step_s) * tier.step_s, float(sample.value))
            for sample in samples
            if math.isfinite(sample.value)
            for tier in _tiers(sample.metric)
        ]
        with self._transaction() as connection:
            connection.executemany(
                "insert into samples values (?, ?, ?, ?, 1) on conflict do update "
                "set total = total + excluded.total, count = count + 1",
                rows,
            )
            connection.executemany(
                "update series set seen_at = ? where id = ?",
                [(now, series) for series in {r[0] for r in rows}],
            )
            connection.executemany(
                "insert or ignore into samples select id, ?, ?, 0, 0 from series where metric = ? and name = ?",
                [(_BREAKS.step_s, int(now), *key) for key in unknown - self._interrupted],
            )
        self._interrupted = unknown
        if not 0 <= now - self._pruned_at < 60:  # also if the clock was set back
            self._prune(now)

    def read(
        self,
        metric: str,
        since: float,
        now: float,
        most_points: int,
        most_series: int,
        only: str | None = None,
    ) -> list[tuple[str, list[Point]]]:
        """The newest series of a metric, or only the named one. Each has at most about `most_points`, oldest first."""
        spans = _spans(_tiers(metric), since, now, most_points)
        with self._transaction() as connection:
            found = connection.execute(
                "select id, name from series where metric = :metric and (:only is null or name = :only) "
                "order by seen_at desc, name limit :most",
                {"metric": metric, "only": only, "most": most_series},
            ).fetchall()
            return [
                (name, list(_with_gaps(self._points(series, spans), self._breaks(series, since))))
                for series, name in found
            ]

    def keep(self, name: str, value: Any) -> None:
        """Stores a JSON value under a name, and replaces the previous one."""
        text = json.dumps(value, allow_nan=False)
        if len(text) <= _MAX_PICTURE_BYTES:
            with self._transaction() as connection:
                connection.execute("insert or replace into kept values (?, ?)", (name, text))

    def kept(self, name: str) -> Any:
        """None if nothing is stored under the name."""
        with self._transaction() as connection:
            row = connection.execute("select value from kept where name = ?", (name,)).fetchone()
        try:
            return None if row is None else json.loads(row[0])
        except ValueError:
            return None

    def _points(self, series: int, spans: "Sequence[_Span]") -> Iterator[tuple[float, float, int]]:
        """(time, mean, step) of each step, oldest first."""
        for span in spans:
            yield from self._connection.execute(
                "select at / :shown * :shown as t, sum(total) / sum(count), :shown from samples "
                "where series = :series and step = :step and at >= :begin and at < :end group by t order by t",
                {
                    "shown": span.shown_s,
                    "series": series,
                    "step": span.step_s,
                    "begin": span.begin,
                    "end": span.end,
                },
            )

    def _breaks(self, series: int, since: float) -> list[float]:
        """Oldest first."""
        found = self._connection.execute(
            "select at from samples where series = ? and step = ? and at >= ? order by at",
            (series, _BREAKS.step_s, since),
        )
        return [float(at) for (at,) in found]

    def _series(self, sample: Sample) -> int:
        key = sample.metric, sample.name
        if key not in self._ids:
            with self._transaction() as connection:
                connection.execute(
                    "insert or ignore into series (metric, name, seen_at) values (?, ?, 0)", key
                )
                row = connection.execute(
                    "select id from series where metric = ? and name = ?", key
                ).fetchone()
            self._ids[key] = row[0]
        return self._ids[key]

    def _prune(self, now: float) -> None:
        """Deletes rows that are too old, the oldest of too many series, and rows that a wrong clock put far into the
        future.
        """
        self._pruned_at = now
        self._ids.clear()
        with self._transaction() as connection:
            for tier in {tier.step_s: tier for tier in (*EXPERT_TIERS, *TIERS, _BREAKS)}.values():
                connection.execute(
                    "delete from samples where step = ? and (at < ? or at > ?)",
                    (tier.step_s, now - tier.kept_s, now + 86400),
                )
            connection.execute(
                "delete from samples where step = :step and (series, at) in (select series, at from ("
                "select series, at, row_number() over (partition by series order by at desc) as number "
                "from samples where step = :step) where number > :most)",
                {"step": _BREAKS.step_s, "most": _MOST_BREAKS},
            )
            # there may be any number of trainers and memories, so the figures of the whole swarm go first
            for experts, most in self._most.items():
                connection.execute(
                    "delete from series where id in (select id from series where "
                    "(substr(metric, 1, 7) = 'expert_') = ? "
                    "order by metric in ('loss', 'bits_per_byte', 'memory_replicas'), seen_at desc "
                    "limit -1 offset ?)",
                    (experts, most),
                )
            connection.execute("delete from samples where series not in (select id from series)")
            connection.execute(
                "delete from series where id not in (select series from samples) "
                "and (seen_at < ? or seen_at > ?)",
                (now - 3600, now + 86400),
            )

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """If the file turns out to be broken, it is set aside and a new one started. The current write is lost."""
        try:
            with self._connection:
                yield self._connection
        except sqlite3.DatabaseError as error:
            if not _is_broken(error):
                raise
            self._connection.close()
            self._set_aside(error)
            self._connection = self._opened()
            raise HistoryLostError from error

    def _opened(self) -> sqlite3.Connection:
        try:
            return _open(self._path)
        except sqlite3.DatabaseError as error:
            if not _is_broken(error):
                raise StartError(f"can't write {self._path}: {error}; pass another --state") from error
            self._set_aside(error)
        except OSError as error:
            raise StartError(f"can't write {self._path}: {error.strerror}; pass another --state") from error
        try:
            return _open(self._path)
        except (sqlite3.DatabaseError, OSError) as error:
            raise StartError(f"can't write {self._path}: {error}; pass another --state") from error

    def _set_aside(self, error: sqlite3.DatabaseError) -> None:
        aside = self._path.with_suffix(".broken")
        os.replace(self._path, aside)
        for companion in ("-wal", "-shm"):
            Path(f"{self._path}{companion}").unlink(missing_ok=True)
        self._ids.clear()
        logger.warning(
            "the history %s is broken (%s). It was moved to %s, and a new one was started",
            self._path,
            error,
            aside,
        )


class HistoryStore:
    """Reads and writes the history on other threads, one call at a time. It owns the history: close the store when
    done.
    """

    def __init__(self, history: History, metrics: CollectorRegistry | None = None) -> None:
        self.failures: Counter = Counter(
            "talkoot_dashboard_history_failures",
            "Reads and writes of the history that failed.",
            registry=metrics,
        )
        self._history = history
        self._lock = asyncio.Lock()
        self._say_at = 0.0

    async def add(self, samples: Sequence[Sample], now: float) -> None:
        await self._run(partial(self._history.add, samples, now), None)

    async def read(
        self,
        metric: str,
        since: float,
        now: float,
        most_points: int,
        most_series: int,
        only: str | None = None,
    ) -> list[tuple[str, list[Point]]]:
        """Empty if the file can't be read."""
        return await self._run(
            partial(self._history.read, metric, since, now, most_points, most_series, only), []
        )

    async def keep_picture(self, picture: Picture) -> None:
        await self._run(lambda: self._history.keep(_PICTURE, picture.to_json()), None)

    async def kept_picture(self) -> Picture | None:
        kept = await self._run(partial(self._history.kept, _PICTURE), None)
        try:
            return Picture.from_json(kept)
        except ValueError:
            return None

    async def close(self) -> None:
        async with self._lock:
            await asyncio.to_thread(self._history.close)

    async def _run(self, call: Callable[[], T], otherwise: T) -> T:
        async with self._lock:
            try:
                return await to_thread_whole(call)
            except HistoryLostError:
                self.failures.inc()  # the history has logged it
            except (sqlite3.Error, StartError, OSError) as error:
                self.failures.inc()  # the last two: a broken file can't be replaced
                if time.monotonic() >= self._say_at:
                    self._say_at = time.monotonic() + _SAY_EVERY_S
                    logger.warning("the history can't be used: %s", error)
        return otherwise


class HistoryLostError(Exception):
    """The file was broken and has been replaced."""


def _open(path: Path) -> sqlite3.Connection:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    connection = sqlite3.connect(path, timeout=5.0, check_same_thread=False)
    try:
        connection.execute("pragma journal_mode = wal")
        connection.execute("pragma synchronous = normal")
        connection.execute("pragma journal_size_limit = 16777216")
        (verdict,) = connection.execute("pragma quick_check(1)").fetchone()
        (form,) = connection.execute("pragma user_version").fetchone()
        if verdict != "ok" or form not in {0, _FORM}:
            raise _broken(verdict if verdict != "ok" else f"form {form}, expected {_FORM}")
        connection.executescript(_TABLES)
        connection.execute(f"pragma user_version = {_FORM}")
    except BaseException:
        connection.close()
        raise
    return connection


def _broken(why: str) -> sqlite3.DatabaseError:
    error = sqlite3.DatabaseError(why)
    error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
    return error


def _is_broken(error: sqlite3.DatabaseError) -> bool:
    return (getattr(error, "sqlite_errorcode", 0) & 0xFF) in _BROKEN


def _tiers(metric: str) -> Sequence[Tier]:
    return EXPERT_TIERS if metric.startswith(_EXPERT) else TIERS


@dataclass(frozen=True)
class _Span:
    """A time span, and the tier that it is read from."""

    begin: int
    end: int
    step_s: int
    shown_s: int
    """Means over intervals of this many seconds, a multiple of the tier's step."""


def _spans(tiers: Sequence[Tier], since: float, now: float, most_points: int) -> list[_Span]:
    """Oldest first. Each span is read from the finest tier that still has it."""
    since = max(since, now - tiers[-1].kept_s)
    wanted_s = (now - since) / most_points
    spans, end = [], int(now) + tiers[0].step_s
    for tier in tiers:
        shown_s = tier.step_s * max(1, math.ceil(wanted_s / tier.step_s))
        oldest = max(int(since), int(now) - tier.kept_s)
        begin = oldest - oldest % shown_s
        if begin < end:
            spans.append(_Span(begin, end, tier.step_s, shown_s))
            end = begin
        if oldest <= since:
            break
    return spans[::-1]


def _with_gaps(points: Iterable[tuple[float, float, int]], breaks: Sequence[float]) -> Iterator[Point]:
    """Adds a point without a value in each long gap and at each break, so that no line is drawn across it."""
    last: tuple[float, int] | None = None
    for at, value, step in points:
        if last is not None:
            is_long = at - last[0] > _GAP_STEPS * max(step, last[1])
            if is_long or bisect_left(breaks, last[0]) < bisect_left(breaks, at):
                yield last[0] + min(last[1], (at - last[0]) / 2), None
        yield float(at), value
        last = at, step
