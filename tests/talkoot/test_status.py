"""How a swarm is read again and again, at a cost that strangers can't raise; and what `talkoot status` shows."""

import asyncio
import io
import json
from collections.abc import Collection
from types import SimpleNamespace
from typing import Any, cast

import pytest
from rich.console import Console, RenderableType
from simulated_readings import NOW, manifest, node, peer, replica, trainer

from dht.announcements import NodeInfo, Reachability, TrainerInfo
from dht.directory import View
from dht.founder_records import LIFETIME_S, ManifestRecord
from dht.receipts import SignedWork, Work
from dht.records import FounderRecord, SwarmKeys
from dht.swarm import Swarm
from dht.uid import UID
from peer import clock
from peer.errors import SettingsError, UnreachableError
from peer.identity import PeerID
from peer.wire import records_pb2
from talkoot.credit import Credit
from talkoot.status import SwarmReader, SwarmReading, _renderables, _show_live
from talkoot.terminal import FittingScreen, Terminal
from trainer_client.settings import TrainerSettings

MODEL = manifest((2, 2), layers=1)


def manifest_record(expires_at: float) -> FounderRecord:
    return FounderRecord(b"", records_pb2.RecordPayload(expires_at=expires_at))


class FakeRegistry:
    """A registry that knows some nodes and counts requests."""

    def __init__(self, nodes: Collection[NodeInfo], listed: Collection[PeerID]) -> None:
        self.registry = self
        self.known = {info.peer_id: info for info in nodes}
        self.listed = set(listed)
        self.asked: list[int] = []
        self.lists = 0
        self.expires_at = NOW + LIFETIME_S
        """When the manifest's record expires."""

    keys = SwarmKeys("sauna", peer(-1))

    async def find_founder_record(self, key: str) -> FounderRecord:
        return manifest_record(self.expires_at)

    async def prefixes(self, prefixes: Collection[Any], size: int, **_: Any) -> dict[Any, frozenset[int]]:
        return {prefix: frozenset({0, 1}) for prefix in prefixes}

    async def replicas(self, uids: Collection[UID], **_: Any) -> dict[UID, Any]:
        return {uid: (replica(uid, 0),) for uid in uids}

    async def nodes(self, peers: Collection[PeerID], *, with_left: bool = False) -> dict[PeerID, NodeInfo]:
        self.asked.append(len(peers))
        return {peer_id: self.known[peer_id] for peer_id in peers if peer_id in self.known}

    async def node_ids(self, most: int) -> frozenset[PeerID]:
        self.lists += 1
        return frozenset(self.listed)

    async def trainer_ids(self) -> frozenset[PeerID]:
        return frozenset({peer(1_000_000)})

    async def trainers(
        self, peers: Collection[PeerID], *, with_left: bool = False
    ) -> dict[PeerID, TrainerInfo]:
        return {peer_id: trainer(0) for peer_id in peers}


def swarm_of(registry: FakeRegistry, clock: list[float]) -> Swarm:
    found: Any = registry
    swarm: Any = SimpleNamespace(
        registry=registry,
        experts=registry,
        manifest=MODEL,
        manifest_record=ManifestRecord(found, manifest_record(registry.expires_at), now=lambda: clock[0]),
        keys=SimpleNamespace(swarm_id="sauna-x"),
    )
    return cast(Swarm, swarm)


def reader_of(registry: FakeRegistry, clock: list[float]) -> SwarmReader:
    return SwarmReader(swarm_of(registry, clock), list_every_s=30.0, now=lambda: clock[0])


def test_nodes_that_host_nothing_are_read_too() -> None:
    registry = FakeRegistry([node(0), node(1)], [peer(0), peer(1)])
    reading = asyncio.run(reader_of(registry, [NOW]).read())
    assert reading.nodes.keys() == {peer(0), peer(1)}
    assert reading.trainers.keys() == {peer(1_000_000)}
    assert reading.view.live_experts() == 4


def test_thousands_of_dead_entries_are_looked_up_once_in_a_while() -> None:
    registry = FakeRegistry([node(0), node(1)], [peer(n) for n in range(5000)])
    clock = [NOW]
    reader = reader_of(registry, clock)

    async def read(times: int) -> int:
        registry.asked.clear()
        for _ in range(times):
            await reader.read()
            clock[0] += 2
        return sum(registry.asked)

    assert asyncio.run(read(1)) >= 4999
    assert max(registry.asked) <= 512
    assert asyncio.run(read(50)) <= 4 * 50  # the host and the idle node of each reading
    assert registry.lists == 4
    clock[0] = NOW + 1000
    assert asyncio.run(read(1)) >= 4999


def test_nodes_are_listed_again_although_the_clock_was_set_back(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = FakeRegistry([node(0)], [peer(0)])
    reader = SwarmReader(swarm_of(registry, [NOW]))
    asyncio.run(reader.read())
    monkeypatch.setattr(clock.CLOCK, "_offset", clock.CLOCK._offset - 3600)
    asyncio.run(reader.read())
    assert registry.lists == 2


def test_a_manifest_that_expires_within_a_week_is_told_until_its_founder_signs_it_anew() -> None:
    registry, clock = FakeRegistry([node(0)], [peer(0)]), [NOW]
    reader = reader_of(registry, clock)

    def warning_at(day: float) -> str:
        clock[0] = NOW + 86400 * day
        return asyncio.run(reader.read()).warning

    assert warning_at(22) == ""
    assert warning_at(26).startswith("nobody can join this swarm in 4.0 days, unless its founder")
    registry.expires_at += 20 * 86400
    assert warning_at(26.1) == ""


def test_status_warns_of_a_manifest_that_expires_soon() -> None:
    shown = reading(warning="nobody can join")
    assert "warning: nobody can join" in status_text(shown)
    assert shown.to_dict()["warning"] == "nobody can join"
    assert "warning" not in status_text(reading())
    assert reading().to_dict()["warning"] is None


def status_text(reading: SwarmReading, width: int = 200) -> str:
    console = Console(file=io.StringIO(), width=width, markup=False, highlight=False)
    for part in _renderables(reading):
        console.print(part)
    return cast(io.StringIO, console.file).getvalue()


def reading(**changes: Any) -> SwarmReading:
    view = View(MODEL, {MODEL.uids()[0]: (replica(MODEL.uids()[0], 0),)}, {peer(0): node(0)}, NOW)
    values: dict[str, Any] = {"nodes": {peer(0): node(0, name="[red]kuusi[/red]")}, "trainers": {}} | changes
    return SwarmReading("sauna-x", view, **values)


def test_status_shows_nodes_trainers_and_experts() -> None:
    shown = status_text(reading(trainers={peer(5): trainer(5, tokens_per_s=None)}))
    assert "swarm sauna-x: 1 node, 1 of 4 experts alive, 1 trainer" in shown
    assert "[red]kuusi[/red]" in shown
    assert "trainer 5" in shown
    assert "7/100" in shown
    assert "?" in shown  # of tokens/s, which were not measured


def test_status_tells_the_age_of_its_reading_by_the_clock_that_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """That clock goes on evenly when somebody sets the machine's."""
    monkeypatch.setattr(clock, "now", lambda: NOW + 2.0)
    assert "read 2.0 s ago" in status_text(reading())


def test_status_shows_no_speed_of_a_trainer_that_has_ended() -> None:
    ended = reading(left_trainers={peer(5): trainer(5, tokens_per_s=4321.0, left=True)})
    assert "4321" not in status_text(ended)
    assert ended.to_dict()["trainers"][0]["tokens_per_s"] is None


def test_status_shows_what_was_computed_and_what_was_signed_beside_each_other() -> None:
    said = SignedWork(Work(pairs=1234), 3)
    nodes = {
        peer(number): node(
            number, name=name, updates=77, contributed_updates=5_432, contributed_rows=98_765, signed=said
        )
        for number, name in enumerate(("read", "unread"))
    }
    credit = Credit(Work(pairs=1200, updates=30, checks_passed=7), 2, (), None)
    seen = reading(nodes=nodes, credit={peer(0): credit})
    shown = status_text(seen)
    assert "98,765" in shown
    assert "5,432" in shown  # of all runs, like the rows
    assert "1,200 by 2" in shown
    assert "1,234" not in shown  # its own word
    read, unread = seen.to_dict()["nodes"]
    assert (read["signed_pairs"], read["signed_updates"], read["signed_trainers"]) == (1200, 30, 2)
    assert (read["checks_passed"], read["checks_failed"], read["signed_share"]) == (7, 0, None)
    assert unread["signed_pairs"] is unread["signed_trainers"] is None
    assert read["contributed_rows"] == unread["contributed_rows"] == 98_765


def test_status_leaves_out_columns_that_do_not_fit_and_breaks_no_word() -> None:
    wide, narrow = (status_text(reading(trainers={peer(5): trainer(5)}), width) for width in (200, 80))
    assert "too narrow" not in wide
    assert "too narrow for: shards, expires, version" in narrow
    assert "widen the terminal, or pass --json)" in " ".join(narrow.split())
    for word in ("experts", "serving", "trainer 5", "7/100", "validation loss", "[red]kuusi[/red]"):
        assert word in narrow


@pytest.mark.parametrize(("shards", "first"), [(0, "shards, expires"), (1, "expires, version")])
def test_the_first_column_to_go_is_one_that_says_nothing(shards: int, first: str) -> None:
    nodes = {peer(number): node(number, memory_shards=number * shards) for number in range(2)}
    assert f"too narrow for: {first}" in status_text(reading(nodes=nodes), 110)


def test_a_low_terminal_shows_first_that_the_swarm_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("talkoot.status._WATCH_EVERY_S", 0.0)
    file = io.StringIO()
    terminal = SimpleNamespace(out=Console(file=file, width=80, height=10, force_terminal=True))
    outcomes: list[SwarmReading | Exception] = [
        reading(),
        UnreachableError("no DHT peer answered"),
        EOFError(),
    ]

    async def read() -> SwarmReading:
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    with pytest.raises(EOFError):
        asyncio.run(_show_live(cast(Terminal, terminal), read))
    first, second = file.getvalue().split("cannot reach the swarm: no DHT peer answered")
    assert "swarm sauna" in first
    assert "swarm sauna" in second


@pytest.mark.parametrize(("height", "fits"), [(10, False), (24, False), (60, True)])
def test_a_low_terminal_says_how_many_lines_do_not_fit(height: int, fits: bool) -> None:
    parts = _renderables(reading(nodes={peer(number): node(number) for number in range(20)}))

    def lines(*renderables: RenderableType) -> list[str]:
        console = Console(file=io.StringIO(), width=80, height=height)
        with console.capture() as captured:
            console.print(*renderables, sep="\n")
        return [line.rstrip() for line in captured.get().splitlines()]

    whole, seen = lines(*parts), lines(FittingScreen(*parts))
    if fits:
        assert seen == whole
    else:
        assert seen[:-1] == whole[: height - 1]
        assert seen[-1] == f"… {len(whole) - height + 1} more lines: enlarge the window"


def test_a_narrow_terminal_shows_the_whole_first_line_while_it_watches() -> None:
    console = Console(file=io.StringIO(), width=60, height=100, soft_wrap=True)  # as `Terminal.out`
    with console.capture() as captured:
        console.print(FittingScreen(*_renderables(reading())))
    head, _, _ = captured.get().partition("nodes")
    assert " s ago" in head
    assert max(map(len, head.splitlines())) <= 60


def test_status_without_trainers_has_no_table_of_them() -> None:
    assert "tokens/s" not in status_text(reading())


def test_status_shows_runs_that_have_just_ended_but_counts_those_that_train() -> None:
    left = {peer(n): trainer(n, left=True, step=step) for n, step in ((6, 100), (7, 40))}
    ended = reading(trainers={peer(5): trainer(5)}, left_trainers=left)
    shown = status_text(ended)
    assert "1 trainer," in shown
    rows = [line.split() for line in shown.splitlines() if "/100" in line]
    assert [row[row.index("trainer") + 3] for row in rows] == ["training", "finished", "stopped"], shown
    assert [row["state"] for row in ended.to_dict()["trainers"]] == ["training", "finished", "stopped"]


def test_status_shows_what_is_unknown_in_one_way() -> None:
    shown = status_text(reading(nodes={peer(0): node(0, reachability=Reachability.UNKNOWN)}))
    assert "unknown" not in shown
    assert "?" in shown


@pytest.mark.parametrize(
    ("started_at", "seconds", "shown"),
    [(0.0, None, "?"), (NOW + 9999, 0.0, "0 s"), (NOW - 7200, 7200.0, "2 h")],
)
def test_status_does_not_guess_when_a_peer_started(
    started_at: float, seconds: float | None, shown: str
) -> None:
    """A record need not say it, and a clock may be ahead."""
    of_node, of_trainer = node(0, started_at=started_at), trainer(5, started_at=started_at)
    read = reading(nodes={of_node.peer_id: of_node}, trainers={of_trainer.peer_id: of_trainer})
    lines = status_text(read).splitlines()
    for rows, who in (("nodes", of_node), ("trainers", of_trainer)):
        (line,) = [line for line in lines if who.peer_id.short in line]
        assert [row["up_s"] for row in read.to_dict()[rows]] == [seconds]
        assert shown in [cell.strip() for cell in line.split("│")]


def test_status_for_programs_has_trainers() -> None:
    shown = json.loads(json.dumps(reading(trainers={peer(5): trainer(5)}).to_dict()))
    assert shown["trainers"][0]["name"] == "trainer 5"
    assert shown["nodes"][0]["activity"] == "serving"
    assert shown["experts"]["alive"] == 1


@pytest.mark.parametrize("name", ["", "x" * 33, "two\nlines", "\x1b[31m"])
def test_a_name_is_one_short_printable_line(name: str) -> None:
    with pytest.raises(SettingsError, match="name"):
        TrainerSettings.load(name=name)


def test_of_a_manifest_with_millions_of_experts_those_are_shown_that_have_a_replica() -> None:
    seen = UID(1, (2, 3))
    view = View(manifest((4096, 256), layers=64), {seen: (replica(seen, 0),)}, {peer(0): node(0)}, NOW)
    reading = SwarmReading("sauna", view, {peer(0): node(0)})
    experts = reading.to_dict()["experts"]
    assert (experts["total"], experts["alive"]) == (2**26, 1)
    assert [expert["uid"] for expert in experts["list"]] == ["1.2.3"]
    assert len(_renderables(reading)) == 2
