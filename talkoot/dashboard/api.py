"""The JSON API's answers: pure functions of a picture and a query."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from peer import PROTOCOL_VERSION, SOFTWARE_VERSION
from peer.identity import PeerID
from talkoot.credit import Credit
from talkoot.dashboard.picture import ENDED, MAX_CELLS, Json, Picture

MAX_PER_PAGE = 200
MAX_UIDS = 1000
MAX_SERIES = 8
MAX_POINTS = 2000
_MAX_FILTER_CHARACTERS = 200
_MAX_FILTER_WORDS = 8
_MAX_LAYER = 10**6
_MAX_PAGE = 10**9
_LATEST = 1e12
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]{0,20})(?:\.[0-9]{1,20})?(?:[eE][+-]?[0-9]{1,3})?")
"""A number as JSON writes it."""

NODE_KEYS = (
    "peer_id", "short", "name", "state", "unsteady", "experts", "capacity", "rows_per_s", "latency_ms",
    "software_version", "protocol_version", "reach", "up_s", "started_at", "seen_at", "updates", "rows", "hours",
    "memory_shards", "memory_bytes", "memory_queries", "memory_queries_per_s",
    "signed_pairs", "signed_updates", "signed_queries", "signed_trainers", "signed_share", "checks_passed",
    "checks_failed",
)  # fmt: skip
"""The keys that nodes can be sorted by."""
UNRANKED = "In an open swarm, one person can be any number of trainers, so volunteers are not ranked."
RANKED = (
    "By what trainers have signed: each of the founder's tokens is one vote, however much its holders sign."
)
SIGNED_KEYS = ("signed_pairs", "signed_updates", "signed_queries", "signed_trainers", "signed_share")
_MEMORY_FIGURES = ("count", "shards", "served", "below_two", "queries_per_s")

UNITS = {
    "loss": "nats per token",
    "validation_loss": "nats per token",
    "bits_per_byte": "bits per byte",
    "tokens_per_s": "tokens/s",
    "live_experts": "experts",
    "live_nodes": "nodes",
    "latency_ms": "ms",
    "failures": "failures/min",
    "bytes_per_s": "bytes/s",
    "memory_replicas": "replicas",
    "memory_queries_per_s": "queries/s",
}
"""The units of the metrics that have a history."""


class ApiError(Exception):
    """A query that can't be answered: the HTTP status, and what was expected."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class DashboardState:
    """The last picture, and how well the dashboard sees the swarm at present."""

    picture: Picture | None
    swarm_id: str
    name: str
    invite: str
    unreachable_since: float | None
    refresh_s: float
    now: float
    longest_lag_s: float
    """The longest lag of the dashboard's own loop in the last two minutes."""
    unsteady: tuple[str, ...]
    """The dashboard's own tasks that fail again and again."""


def swarm(seen: DashboardState) -> Json:
    """The values at the top of the page."""
    figures = {} if seen.picture is None else seen.picture.figures
    read_at = None if seen.picture is None else seen.picture.read_at
    layers = [] if seen.picture is None else seen.picture.layers
    listed = figures.get("memories", {}).get("count")
    return {
        "name": figures.get("name", seen.name),
        "swarm_id": seen.swarm_id,
        "read_at": read_at,
        "age_s": None if read_at is None else max(0.0, seen.now - read_at),
        "unreachable_since": seen.unreachable_since,
        "state": health(seen),
        "warning": figures.get("warning"),
        "nodes": figures.get("nodes", {"live": None, "gone": None, "unsteady": None}),
        "experts": figures.get("experts", {"live": None, "total": None}),
        "replicas": figures.get("replicas"),
        "trainers": figures.get("trainers"),
        "memories": figures.get("memories", dict.fromkeys(_MEMORY_FIGURES)),
        **{
            key: figures.get(key)
            for key in (
                "tokens_per_s", "validation_loss", "bits_per_byte", "requests_per_s", "bytes_per_s"
            )
        },
        "layers": [{"layer": layer["layer"], "grid": layer["grid"]} for layer in layers],
        "join": {
            # in a swarm that admits by token, this invite only lets people look
            key: None if figures.get("admits_by_token") else command
            for key, command in (
                ("node", f"talkoot node --join {seen.invite}"),
                ("train", f"talkoot train --join {seen.invite}"),
                ("search", f'talkoot search --join {seen.invite} "question"' if listed else None),
            )
        },
        "refresh_s": seen.refresh_s,
        "announce_s": figures.get("announce_s") or 10.0,
        "dashboard": {"longest_lag_s": seen.longest_lag_s, "unsteady": list(seen.unsteady)},
        "software_version": SOFTWARE_VERSION,
        "protocol_version": PROTOCOL_VERSION,
    }  # fmt: skip


def health(seen: DashboardState) -> Json:
    """The swarm's health, as one word for programs and a phrase for people."""
    if seen.unreachable_since is not None:
        return {"level": "unknown", "words": "cannot reach the swarm"}
    if seen.picture is None:
        return {"level": "unknown", "words": "looking for the swarm"}
    figures = seen.picture.figures
    live, total = figures["experts"]["live"], figures["experts"]["total"]
    if not figures["nodes"]["live"]:
        return {"level": "bad", "words": "no node is there"}
    memories = figures["memories"]
    # a swarm only for memories: no node hosts experts, now or recently
    has_experts = not memories["count"] or any(row["capacity"] for row in seen.picture.nodes)
    if not live and has_experts:
        return {"level": "bad", "words": "no expert has a host"}
    if has_experts and (missing := total - live):
        words = f"{missing} expert{' has' if missing == 1 else 's have'} no host"
        return {"level": "warn" if 2 * live >= total else "bad", "words": words}
    if missing := memories["shards"] - memories["served"]:
        words = f"{missing} shard{' of a memory has' if missing == 1 else 's of memories have'} no host"
        return {"level": "warn", "words": words}
    return {"level": "ok", "words": "healthy" if has_experts else "healthy, with memories alone"}


def nodes(picture: Picture | None, query: Mapping[str, str]) -> Json:
    """A page of nodes, sorted and filtered. Raises ApiError."""
    words = _filter_words(query.get("filter", ""))
    key = query.get("sort", "seen_at")
    if key not in NODE_KEYS:
        raise ApiError(400, f"sort: {key[:40]!r} is not one of {', '.join(NODE_KEYS)}")
    order = query.get("order", "asc")
    if order not in {"asc", "desc"}:
        raise ApiError(400, f"order: {order[:40]!r} is neither asc nor desc")
    found = [] if picture is None else _matching(picture, words)
    return _page(_sorted(found, key, order == "desc"), query, "nodes", _public)


def _filter_words(text: str) -> list[str]:
    """The different words of a filter, case-folded. Raises ApiError."""
    if len(text) > _MAX_FILTER_CHARACTERS:
        raise ApiError(400, f"filter: at most {_MAX_FILTER_CHARACTERS} characters")
    words = list(dict.fromkeys(text.casefold().split()))
    if len(words) > _MAX_FILTER_WORDS:
        raise ApiError(400, f"filter: at most {_MAX_FILTER_WORDS} different words")
    return words


def _matching(picture: Picture, words: Sequence[str]) -> list[Json]:
    """The nodes in which each word occurs."""
    if not words:
        return picture.nodes
    found = picture.searched
    for word in words:
        # the same pairs, because new ones would be work for the garbage collector
        found = [pair for pair in found if word in pair[1]]
    return [row for row, _ in found]


def node(
    picture: Picture | None, peer_id: str, credit: Mapping[PeerID, Credit] = MappingProxyType({})
) -> Json:
    """One node. `credit`: the credit of all nodes."""
    row = _find(picture, peer_id)
    hosted = [] if picture is None else picture.hosted.get(peer_id, [])
    found = credit.get(PeerID.from_base58(peer_id))
    names = {} if picture is None else {each["peer_id"]: each["name"] for each in picture.trainers}
    signers = [
        {
            "peer_id": trainer.to_base58(),
            "short": trainer.short,
            "name": names.get(trainer.to_base58()),
            "pairs": work.pairs,
            "queries": work.queries,
        }
        for trainer, work in (found.signers if found else ())
    ]
    return _public(row) | {"uids": hosted[:MAX_UIDS], "uids_total": len(hosted), "signers": signers}


def leaderboard(picture: Picture | None, query: Mapping[str, str]) -> Json:
    """Nodes with the work that they report, and the work that trainers have signed for.

    Ranked by their share of all tokens' votes; in an open swarm, by name.
    """
    found = [] if picture is None else picture.nodes
    admits_by_token = picture is not None and picture.figures["admits_by_token"]
    # one sort for each key: tuples as keys would be work for the garbage collector
    if admits_by_token:
        ordered = sorted(found, key=lambda row: row["peer_id"])
        ordered.sort(key=lambda row: row["signed_pairs"] or 0, reverse=True)
        ordered.sort(key=lambda row: row["signed_share"] or 0.0, reverse=True)
    else:
        ordered = _sorted(found, "name", False)
    keys = ("short", "peer_id", "name", "updates", "rows", "hours", *SIGNED_KEYS)
    page = _page(ordered, query, "nodes", lambda row: {"rank": None} | {k: row[k] for k in keys})
    if admits_by_token:
        first = (page["page"] - 1) * page["per_page"] + 1
        for rank, row in enumerate(page["nodes"], first):
            row["rank"] = rank
    return page | {"ranked": admits_by_token, "note": RANKED if admits_by_token else UNRANKED}


def trainers(picture: Picture | None, query: Mapping[str, str]) -> Json:
    found = [] if picture is None else picture.trainers
    ordered = sorted(
        found,
        key=lambda row: (
            row["state"] in ENDED,
            -row["seen_at"] if row["state"] in ENDED else 0,
            row["peer_id"],
        ),
    )
    return _page(ordered, query, "trainers", _public)


def memories(picture: Picture | None, query: Mapping[str, str]) -> Json:
    """The memories. Those with the fewest replicas come first, because they need hosts most."""
    found = [] if picture is None else picture.memories
    ordered = sorted(found, key=lambda row: (row["replicas_mean"] or 0.0, row["memory"]))
    return _page(ordered, query, "memories", dict)


def experts(picture: Picture | None, query: Mapping[str, str]) -> Json:
    """One layer, as flat arrays in row-major order of its grid. Raises ApiError."""
    layer = integer(query, "layer", 0, 0, _MAX_LAYER)
    if picture is None:
        raise ApiError(503, "the swarm has not been read yet")
    if layer >= len(picture.layers):
        raise ApiError(404, f"layer: this swarm has layers 0 to {len(picture.layers) - 1}")
    shown = picture.layers[layer]
    if "replicas" not in shown:
        raise ApiError(413, f"this layer has more than the {MAX_CELLS} experts that are shown")
    ages = [None if at is None else max(0, round(picture.read_at - at)) for at in shown["updated_at"]]
    arrays = {key: value for key, value in shown.items() if key != "updated_at"}
    return arrays | {"updated_ago_s": ages, "read_at": picture.read_at}


def expert(picture: Picture | None, uid: str, now: float) -> Json:
    """Who hosts an expert. The caller adds its history. Raises ApiError."""
    if picture is None:
        raise ApiError(503, "the swarm has not been read yet")
    if not _is_uid(picture, uid):
        raise ApiError(404, f"{uid[:40]!r} is not an expert of this swarm: write layer.i.j, such as 0.1.3")
    replicas = []
    for row in picture.replicas.get(uid, []):
        shown = {key: value for key, value in row.items() if key not in {"expires_at", "updated_at"}}
        ago = None if row["updated_at"] is None else max(0, round(now - row["updated_at"]))
        replicas.append(shown | {"expires_in_s": max(0.0, row["expires_at"] - now), "updated_ago_s": ago})
    return {"uid": uid, "replicas": replicas}


@dataclass(frozen=True)
class HistoryQuery:
    """A parsed query of the history."""

    metric: str
    since: float
    points: int


def history_query(query: Mapping[str, str], now: float) -> HistoryQuery:
    """Raises ApiError if the query is not valid."""
    metric = query.get("metric", "")
    if metric not in UNITS:
        raise ApiError(400, f"metric: {metric[:40]!r} is not one of {', '.join(UNITS)}")
    points = integer(query, "points", 300, 2, MAX_POINTS)
    text = query.get("since", str(now - 3600))
    if not _NUMBER.fullmatch(text) or not 0 <= float(text) <= _LATEST:
        raise ApiError(400, f"since: {text[:40]!r} is not a Unix time in seconds")
    return HistoryQuery(metric, float(text), points)


def series(
    found: Sequence[tuple[str, Sequence[tuple[float, float | None]]]], picture: Picture | None = None
) -> list[Json]:
    """Each line with its name and a label. A trainer's label includes the name that its owner chose."""
    trainers = [] if picture is None else picture.trainers
    called = {row["short"]: row["name"] for row in trainers if row["name"]}
    return [
        {"name": name, "label": _label(name, called), "points": [list(point) for point in points]}
        for name, points in found
    ]


def _label(name: str, called: Mapping[str, str]) -> str:
    key, _, rest = name.partition(" ")
    return f"{called[key]} · {name}" if key in called and rest in {"", "validation"} else name


def integer(query: Mapping[str, str], key: str, default: int, least: int, most: int) -> int:
    """Raises ApiError."""
    text = query.get(key, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 12 and least <= int(text) <= most):
        raise ApiError(400, f"{key}: {text[:40]!r} is not a whole number from {least} to {most}")
    return int(text)


def _page(rows: Sequence[Any], query: Mapping[str, str], name: str, show: Callable[[Any], Json]) -> Json:
    per_page = integer(query, "per_page", 50, 1, MAX_PER_PAGE)
    page = integer(query, "page", 1, 1, _MAX_PAGE)
    shown = rows[(page - 1) * per_page : page * per_page]
    return {"total": len(rows), "page": page, "per_page": per_page, name: [show(row) for row in shown]}


def _sorted(rows: Sequence[Json], key: str, descending: bool) -> list[Json]:
    """Rows without the value come last in either order. Equal rows are sorted by PeerID, so that pages are stable."""
    known = [row for row in rows if row[key] is not None]
    unknown = [row for row in rows if row[key] is None]
    by_text = known and isinstance(known[0][key], str)
    known.sort(key=lambda row: row["peer_id"])
    known.sort(
        key=(lambda row: row[key].casefold()) if by_text else (lambda row: row[key]), reverse=descending
    )
    return known + sorted(unknown, key=lambda row: row["peer_id"])


def _find(picture: Picture | None, peer_id: str) -> Json:
    for row in [] if picture is None else picture.nodes:
        if row["peer_id"] == peer_id:
            return row
    raise ApiError(404, f"no node {peer_id[:60]!r} was seen in the last day")


def _public(row: Json) -> Json:
    """The row without the values that only service discovery uses."""
    return {key: value for key, value in row.items() if key != "metrics_address"}


def _is_uid(picture: Picture, uid: str) -> bool:
    parts = uid.split(".")
    if not all(part.isascii() and part.isdigit() and len(part) < 8 for part in parts):
        return False
    layer, *coordinate = map(int, parts)
    if uid != ".".join(map(str, (layer, *coordinate))) or layer >= len(picture.layers):
        return False
    grid = picture.layers[layer]["grid"]
    return len(coordinate) == len(grid) and all(i < size for i, size in zip(coordinate, grid, strict=True))
