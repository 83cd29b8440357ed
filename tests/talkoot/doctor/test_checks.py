"""What a check of the machine finds, and what it concludes."""

import random
import socket
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import grpc
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dht.announcements import NodeInfo
from dht.manifest import Manifest
from expert_server.experts.devices import ComputeDevice
from expert_server.experts.expert import expert_bytes
from expert_server.probe import DialledBack, Link, ProbeServicer
from expert_server.resources import require_room
from expert_server.settings import NodeSettings
from peer.errors import DataError, StartError
from peer.formatting import age_in_words
from peer.identity import Identity, certificate_pem
from peer.loop import LoopThread
from peer.platform.processes import usable_cores
from peer.rates import Bandwidth
from peer.rpc.channels import SERVER_OPTIONS
from peer.rpc.server import server_credentials
from peer.transport.dialling import Dialling
from peer.transport.endpoints import AddressScope, Endpoint
from peer.wire import probe_pb2_grpc
from talkoot.doctor import checks
from talkoot.doctor.checks import (
    Finding,
    NodeHere,
    Verdict,
    ask_peers,
    check_cores,
    check_disk,
    check_memory,
    check_speed,
    check_traffic,
    judge_bandwidth,
    judge_clock,
    judge_reachability,
)
from talkoot.doctor.examination import Report, show
from talkoot.doctor.traffic import trainer_traffic
from talkoot.terminal import LogFormat, Terminal
from trainer_client.settings import PRESETS

LOCAL = "127.0.0.1"
SWARM = "sauna-1"
SMALL = Manifest.model_validate(
    {"name": "sauna", "model": {"hidden": 8, "heads": 2, "context": 8, "feed_forward": 8}}
)


def link(offset_s: float = 0.0, *, trip_s: float = 0.1, up: float = 50.0, down: float = 50.0) -> Link:
    return Link(trip_s, offset_s, up, down)


# What peers say


@pytest.mark.parametrize(
    ("offset_s", "verdict"),
    [
        (0.0, Verdict.OK),
        (-0.9, Verdict.OK),
        (2.0, Verdict.WEAK),
        (-2.0, Verdict.WEAK),
        (3.2, Verdict.PROBLEM),
    ],
)
def test_clock_that_is_far_off_is_a_problem(offset_s: float, verdict: Verdict) -> None:
    found = judge_clock([link(offset_s)], "")
    assert found.verdict is verdict
    assert ("behind" if offset_s > 0 else "ahead of") in found.says
    assert "timedatectl" in found.fix


def test_a_clock_that_is_hours_off_is_told_in_hours() -> None:
    assert "3 h behind that of 1 peer" in judge_clock([link(10_834.0)], "").says


def test_clock_may_be_off_by_half_the_round_trip() -> None:
    assert judge_clock([link(3.5, trip_s=6.0)], "").verdict is Verdict.OK


@given(st.floats(-1e9, 1e9))
def test_one_peer_that_lies_about_the_time_changes_nothing(lie_s: float) -> None:
    assert judge_clock([link(0.1), link(lie_s), link(-0.1)], "").verdict is Verdict.OK


def test_bandwidth_is_that_of_the_best_peer() -> None:
    demo = Manifest(name="demo")
    slow, fast = link(up=1.0, down=2.0), link(up=20.0, down=90.0)
    assert judge_bandwidth([slow, fast], demo, "").verdict is Verdict.OK
    found = judge_bandwidth([link(up=1.0, down=90.0)], demo, "")
    assert found.verdict is Verdict.WEAK
    assert "1.0 Mbit/s up, 90.0 Mbit/s down, 100 ms" in found.says


def test_a_line_is_slow_or_not_for_the_width_and_codec_of_the_swarm() -> None:
    slow = [link(up=1.0, down=1.0)]
    narrow = Manifest.model_validate({"name": "demo", "wire": {"codec": "int4"}})
    one, other = (judge_bandwidth(slow, manifest, "") for manifest in (Manifest(name="demo"), narrow))
    assert (one.verdict, other.verdict) == (Verdict.WEAK, Verdict.OK)
    assert float(other.values["rows_per_s"]) > 6 * float(one.values["rows_per_s"])


def test_whether_the_line_carries_the_swarms_traffic_is_told() -> None:
    manifest = Manifest.model_validate({"name": "demo", "preset": "ffn", "model": {"hidden": 1024}})
    most = PRESETS["ffn"]["nodes_per_token"]
    traffic = trainer_traffic(manifest, 1000.0, nodes_per_token=most)
    line = judge_bandwidth([link(up=3 * traffic.upload_mbit, down=3 * traffic.download_mbit)], manifest, "")
    found = check_traffic(manifest, line)
    assert found.verdict is Verdict.OK
    assert found.says.startswith("this line carries 3,000 tokens/s of a trainer, or a node's part of ")
    assert (
        f"a trainer needs {traffic.upload_mbit:.1f} Mbit/s up and {traffic.download_mbit:.1f} down"
        in found.says
    )
    slow = check_traffic(manifest, judge_bandwidth([link(up=0.05, down=0.05)], manifest, ""))
    assert (slow.verdict, bool(slow.fix)) == (Verdict.WEAK, True)
    unknown = check_traffic(manifest, judge_bandwidth([], manifest, "nobody"))
    assert (unknown.verdict, "this line" in unknown.says) == (Verdict.OK, False)


def test_machine_that_peers_can_dial_is_reachable() -> None:
    refused = DialledBack(False, "192.0.2.7", "Connection refused")
    reached = DialledBack(True, "192.0.2.7", "")
    assert judge_reachability([refused, reached], "192.0.2.7", 4711, "").verdict is Verdict.OK
    found = judge_reachability([refused], "192.0.2.7", 4711, "")
    assert found.verdict is Verdict.WEAK, "it serves through relays"
    assert "192.0.2.7 port 4711: Connection refused" in found.says
    assert "--port" in found.fix


def test_machine_behind_a_router_is_told() -> None:
    found = judge_reachability([DialledBack(False, "198.51.100.1", "no answer")], "192.168.1.5", 4711, "")
    assert found.verdict is Verdict.WEAK
    assert "198.51.100.1 port 4711: no answer" in found.says
    assert "on your router to 192.168.1.5" in found.fix


def test_nodes_on_this_machine_can_not_tell_whether_others_reach_it() -> None:
    here = DialledBack(False, LOCAL, "Connection refused")
    found = judge_reachability([here], "192.168.1.5", 4711, "")
    assert (found.verdict, found.fix) == (Verdict.SKIPPED, "")
    assert judge_reachability([here], LOCAL, 4711, "").verdict is Verdict.WEAK
    elsewhere = DialledBack(False, "198.51.100.1", "no answer")
    assert "198.51.100.1" in judge_reachability([here, elsewhere], "192.168.1.5", 4711, "").says


def test_machine_whose_router_forwards_the_port_is_reachable() -> None:
    found = judge_reachability([DialledBack(True, "198.51.100.1", "")], "192.168.1.5", 4711, "")
    assert found.verdict is Verdict.OK


def test_what_the_router_does_about_the_port_is_told() -> None:
    dials = [DialledBack(True, "198.51.100.1", "")], [DialledBack(False, "198.51.100.1", "no answer")]
    reached, hidden = (
        judge_reachability(each, "192.168.1.5", 4711, "", "the router sleeps") for each in dials
    )
    assert reached.says == "a peer connected to 198.51.100.1 port 4711: the router sleeps"
    assert hidden.fix.startswith("the router sleeps: forward TCP port 4711 on your router")


def test_what_nobody_said_is_not_checked() -> None:
    found = [
        judge_clock([], "why"),
        judge_bandwidth([], SMALL, "why"),
        judge_reachability([], LOCAL, 1, "why"),
    ]
    assert {(finding.verdict, finding.says) for finding in found} == {(Verdict.SKIPPED, "why")}


class Swarm:
    """A node that answers probes, and a registry that lists it."""

    def __init__(self, folder: Path) -> None:
        self.identity = Identity.load_or_create(folder / "key")
        self.nodes: dict[Any, NodeInfo] = {}
        self.server: grpc.aio.Server | None = None

    async def start(self) -> None:
        self.server = grpc.aio.server(options=SERVER_OPTIONS)
        probe_pb2_grpc.add_ProbeServiceServicer_to_server(ProbeServicer(SWARM, Bandwidth()), self.server)
        certificate = self.identity.make_certificate()
        port = self.server.add_secure_port(f"{LOCAL}:0", server_credentials(self.identity, certificate))
        await self.server.start()
        self.list(f"{LOCAL}:{port}", certificate)

    def list(self, address: str, certificate: bytes) -> None:
        peer_id = self.identity.peer_id
        pem = certificate_pem(certificate, peer_id)
        self.nodes[peer_id] = NodeInfo(
            peer_id=peer_id, addresses=(Endpoint(address),), certificate_pem=pem, expires_at=0.0
        )

    async def ask(self, host: str = LOCAL, port: int = 0) -> dict[str, Finding]:
        async def node_ids() -> frozenset[Any]:
            return frozenset(self.nodes)

        async def nodes(peer_ids: Any) -> dict[Any, NodeInfo]:
            return {peer_id: self.nodes[peer_id] for peer_id in peer_ids}

        swarm: Any = SimpleNamespace(
            registry=SimpleNamespace(node_ids=node_ids, nodes=nodes),
            keys=SimpleNamespace(swarm_id=SWARM),
            manifest=SMALL,
            host=SimpleNamespace(peer_id=None, dialling=Dialling(AddressScope.LOOPBACK)),
        )
        found = await ask_peers(swarm, host, port, random.Random(0))
        return {finding.name: finding for finding in found}


Play = Callable[[Callable[[Swarm], Coroutine[Any, Any, None]]], None]


@pytest.fixture
def play(loop: LoopThread, tmp_path: Path) -> Play:
    def run(scenario: Callable[[Swarm], Coroutine[Any, Any, None]]) -> None:
        async def do() -> None:
            swarm = Swarm(tmp_path)
            await swarm.start()
            assert swarm.server is not None
            try:
                await scenario(swarm)
            finally:
                await swarm.server.stop(0)

        loop.run(do(), 120)

    return run


def test_peers_measure_the_way_and_dial_back(play: Play) -> None:
    async def scenario(swarm: Swarm) -> None:
        found = await swarm.ask()
        assert {finding.verdict for finding in found.values()} == {Verdict.OK}, found
        assert abs(float(found["clock"].values["clock_offset_s"])) < 1
        with socket.socket() as silent:  # no other test may listen there
            silent.bind((LOCAL, 0))
            port = silent.getsockname()[1]
            other = await swarm.ask("127.0.0.2", port)  # ours too, but calls go out from 127.0.0.1
        assert other["reachability"].verdict is Verdict.WEAK
        assert "can't connect to 127.0.0.1" in other["reachability"].says

    play(scenario)


def test_port_that_is_taken_is_named(play: Play) -> None:
    async def scenario(swarm: Swarm) -> None:
        with socket.create_server((LOCAL, 0)) as taken:
            port = taken.getsockname()[1]
            with pytest.raises(StartError, match=f"can't listen on {LOCAL} port {port}"):
                await swarm.ask(LOCAL, port)

    play(scenario)


def test_peers_that_do_not_answer_are_named(play: Play) -> None:
    async def scenario(swarm: Swarm) -> None:
        assert swarm.server is not None
        await swarm.server.stop(0)
        found = await swarm.ask()
        assert {finding.verdict for finding in found.values()} == {Verdict.SKIPPED}
        assert "does not answer" in found["clock"].says
        swarm.nodes.clear()
        assert "no other node" in (await swarm.ask())["clock"].says

    play(scenario)


# What the machine says


def test_speed_is_measured_with_one_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_MEASURE_S", 0.01)
    found = check_speed(NodeSettings(threads=1), SMALL)
    assert found.values["threads"] == 1
    assert float(found.values["rows_per_s"]) > 0
    monkeypatch.setattr(checks, "_SLOW_ROWS_PER_S", 1e12)
    assert check_speed(NodeSettings(threads=1), SMALL).verdict is Verdict.WEAK


def test_an_expert_that_does_not_fit_is_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """The manifest has 2^26 experts of 190 GB each."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2**36))
    huge = {"layers": 64, "hidden": 16384, "heads": 256, "feed_forward": 65536}
    experts = {"grid": [4096, 256], "heads": 256, "head_size": 512}
    manifest = Manifest.model_validate({"name": "huge", "model": huge, "experts": experts})
    assert check_speed(NodeSettings(threads=1), manifest).verdict is Verdict.SKIPPED


def test_memory_says_how_many_experts_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    each = expert_bytes(SMALL)
    free = SimpleNamespace(available=10 * each)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    found = check_memory(NodeSettings(), SMALL)
    assert (found.verdict, found.values["experts"], found.values["experts_that_fit"]) == (Verdict.OK, 2, 10)
    assert "it would host 2, and 10 would fit" in found.says
    free.available = 1000 * each
    assert (
        f"it would host all {SMALL.experts_total} experts of the model"
        in check_memory(NodeSettings(), SMALL).says
    )
    free.available = 10 * each
    assert check_memory(NodeSettings(experts=10), SMALL).verdict is Verdict.OK
    found = check_memory(NodeSettings(experts=11), SMALL)
    assert (found.verdict, "--experts 10" in found.fix) == (Verdict.WEAK, True)
    assert check_memory(NodeSettings(memory=1), SMALL).verdict is Verdict.PROBLEM
    free.available = each - 1
    found = check_memory(NodeSettings(), SMALL)
    assert (found.verdict, "--experts 0 --spare 0" in found.fix) == (Verdict.PROBLEM, True)
    none = NodeSettings(experts=0, spare=0)
    require_room(none, SMALL, each - 1)
    found = check_memory(none, SMALL)
    assert (found.verdict, found.values["experts"]) == (Verdict.OK, 0)


def test_speed_and_memory_are_those_of_the_device_that_a_node_would_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened = [ComputeDevice("cpu", "bf16", each * expert_bytes(SMALL)) for each in (7, 3)]
    autocast = mock.Mock(wraps=opened[0].autocast)
    monkeypatch.setattr(opened[0], "autocast", autocast)
    monkeypatch.setattr(checks, "open_devices", lambda device, precision: opened)
    monkeypatch.setattr(checks, "_MEASURE_S", 0.01)
    assert check_speed(NodeSettings(threads=1), SMALL).says.endswith(" on cpu in bf16")
    assert autocast.called
    assert check_memory(NodeSettings(), SMALL).values["experts_that_fit"] == 10


def test_cores_are_counted() -> None:
    assert int(check_cores().values["cores"]) >= 1


@pytest.mark.parametrize(
    ("load", "without_node", "beside_node"),
    [(0.5, Verdict.OK, Verdict.OK), (1.0, Verdict.WEAK, Verdict.OK), (4.0, Verdict.WEAK, Verdict.WEAK)],
)
def test_a_node_of_ones_own_explains_busy_cores_but_not_any_load(
    load: float, without_node: Verdict, beside_node: Verdict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`load`: of each core."""
    monkeypatch.setattr("talkoot.doctor.checks.machine.load", lambda: load * usable_cores())
    assert check_cores().verdict is without_node
    assert check_cores(NodeHere(runs=True)).verdict is beside_node


def test_disk_is_tried_and_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_SLOW_DISK_BYTES_PER_S", 0.0)
    found = check_disk(tmp_path, NodeSettings(), SMALL, experts=1)
    assert (found.verdict, list(tmp_path.iterdir())) == (Verdict.OK, [])
    assert found.values["needed_bytes"] == 3 * expert_bytes(SMALL)
    assert check_disk(tmp_path, NodeSettings(), SMALL, experts=10**15).verdict is Verdict.WEAK
    monkeypatch.setattr(checks, "_SLOW_DISK_BYTES_PER_S", 1e15)
    assert check_disk(tmp_path, NodeSettings(), SMALL, experts=1).verdict is Verdict.WEAK
    missing = check_disk(tmp_path / "missing", NodeSettings(), SMALL, experts=1)
    assert (missing.verdict, "another --state" in missing.fix) == (Verdict.PROBLEM, True)


# The report


def report(*verdicts: Verdict) -> Report:
    findings = (Finding(name="disk", verdict=verdict, says="so", fix="mend it") for verdict in verdicts)
    return Report(checked_at=1.0, swarm=None, findings=tuple(findings))


def test_only_problems_keep_a_machine_from_serving() -> None:
    assert report(Verdict.OK, Verdict.WEAK, Verdict.SKIPPED).can_serve
    assert not report(Verdict.OK, Verdict.PROBLEM).can_serve


def test_report_is_kept(tmp_path: Path) -> None:
    kept = report(Verdict.OK, Verdict.PROBLEM)
    kept.save(tmp_path)
    assert Report.load(tmp_path) == kept
    assert [path.name for path in tmp_path.iterdir()] == ["check.json"]


@pytest.mark.parametrize(
    "text", ["", "no json", "[]", '{"version": 9, "checked_at": 1, "swarm": null, "findings": []}']
)
def test_kept_report_that_is_broken_is_told(tmp_path: Path, text: str) -> None:
    with pytest.raises(DataError, match="no check was made yet"):
        Report.load(tmp_path)
    (tmp_path / "check.json").write_text(text)
    with pytest.raises(DataError, match="without --cached"):
        Report.load(tmp_path)


def test_fix_is_shown_where_something_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    show(Terminal(LogFormat.TEXT), report(Verdict.OK), cached=False)
    said = capsys.readouterr().out
    assert "mend it" not in said
    assert "this machine can host experts" in said
    show(Terminal(LogFormat.TEXT), report(Verdict.PROBLEM), cached=True)
    said = capsys.readouterr().out
    assert "→ mend it" in said
    assert "this machine can't host experts" in said
    assert "days ago" in said


def test_ages_are_told_in_words() -> None:
    assert [age_in_words(age_s) for age_s in (-3, 90, 1000, 9000, 300_000)] == [
        "0 s",
        "90 s",
        "17 min",
        "2 h",
        "3 days",
    ]
