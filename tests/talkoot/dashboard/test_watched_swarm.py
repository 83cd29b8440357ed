"""The dashboard of a real swarm: two nodes and a trainer in this process, watched over HTTP and by Prometheus."""

import asyncio
import contextlib
import json
import re
import shutil
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from byte_texts import byte_dataset
from grpc_health.v1 import health_pb2, health_pb2_grpc
from simulated_readings import memory

from dht.announcements import ReplicaState
from dht.invites import Invite
from dht.library import MemoryRegistry
from dht.manifest import Manifest
from dht.memory import MemoryID
from dht.swarm import found_swarm, join_swarm
from expert_server.node import Node, NodeTiming
from expert_server.settings import NodeSettings
from peer.host import NetworkConfig
from peer.identity import Identity
from peer.loop import LoopThread
from peer.rpc.channels import ChannelPool
from talkoot.dashboard.server import dashboard
from talkoot.dashboard.settings import DashboardSettings
from talkoot.dashboard.watcher import WatchIntervals
from talkoot.web import address_of, listen
from trainer_client.client import SwarmClient, TrainerTiming
from trainer_client.model import LanguageModel
from trainer_client.settings import TrainerSettings
from trainer_client.training.loop import Training
from trainer_client.training.record import Progress

LOCAL = "127.0.0.1"
LIMIT_S = 120.0
PERIOD_S = 1.0
STEP_S = 0.2
"""A pause after each of the trainer's steps. Otherwise it would use the whole machine."""
DEPLOY = Path(__file__).parents[3] / "deploy"
HOSTILE = "<script>alert(1)</script>"
MANIFEST = Manifest.model_validate(
    {
        "name": "sauna",
        "model": {"layers": 2, "hidden": 8, "heads": 2, "context": 8, "feed_forward": 8},
        "experts": {"grid": [2, 2]},
        "routing": {"top_k": 2},
    }
)


@dataclass
class Watched:
    """A running swarm and its dashboard."""

    loop: LoopThread
    folder: Path
    stack: contextlib.AsyncExitStack = field(default_factory=contextlib.AsyncExitStack)
    nodes: list[Node] = field(default_factory=list)
    running: list["asyncio.Task[None]"] = field(default_factory=list)
    invite: Invite | None = None
    url: str = ""

    async def start(self) -> None:
        names = ("kuusi", HOSTILE)
        for number, name in enumerate(names):
            folder = self.folder / f"node{number}"
            identity = Identity.load_or_create(folder / "identity.key")
            if self.invite is None:
                swarm = await found_swarm(identity, MANIFEST, NetworkConfig(LOCAL))
                self.invite = await swarm.invite()
            else:
                swarm = await join_swarm(identity, self.invite, NetworkConfig(LOCAL))
            settings = NodeSettings.load(
                experts=4, spare=0, replicas=1, threads=1, average_every_s=0, drain_timeout_s=0,
                announce_every_s=PERIOD_S, name=name,
            )  # fmt: skip
            node = await Node.start(
                settings, swarm, host=LOCAL, state=folder, timing=NodeTiming(claim_wait_s=0.1)
            )
            self.stack.push_async_callback(node.stop)
            self.nodes.append(node)
            self.running.append(asyncio.create_task(node.run()))
            self.stack.push_async_callback(end, self.running[-1])
        self.url = await self.watch(self.stack, self.folder / "dashboard")

    async def watch(self, stack: contextlib.AsyncExitStack, folder: Path) -> str:
        """Starts a dashboard. Returns its address."""
        assert self.invite is not None
        await asyncio.to_thread(folder.mkdir, exist_ok=True)
        settings = DashboardSettings.load(refresh_s=0.3)
        listener = listen(LOCAL, 0)
        stack.callback(listener.close)
        await stack.enter_async_context(
            dashboard(self.invite, settings, folder, listener, WatchIntervals(0.3, 1.0, 1.0, 0.5, 0.5))
        )
        return address_of(listener)

    def get(self, path: str) -> Any:
        return json.loads(fetch(self.url + path))

    def until(self, condition: Callable[[Any], bool], path: str = "api/v1/swarm") -> Any:
        """Returns the first answer for which the condition is true."""
        deadline = time.monotonic() + LIMIT_S
        while True:
            with contextlib.suppress(urllib.error.HTTPError):
                if condition(answer := self.get(path)):
                    return answer
            assert time.monotonic() < deadline, f"in vain: {self.get('api/v1/swarm')}"
            threading.Event().wait(0.1)


async def end(task: "asyncio.Task[None]") -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def fetch(url: str) -> str:
    with urllib.request.urlopen(url, timeout=60) as answer:
        return str(answer.read().decode())


@contextlib.contextmanager
def training(invite: Invite, folder: Path) -> Iterator[None]:
    """Runs a trainer on a thread of its own."""
    settings = TrainerSettings.load(
        batch_size=2,
        validate_every=5,
        validation_batches=1,
        steps=10**6,
        announce_every_s=PERIOD_S,
        name="Aino",
    )
    stop, timing = threading.Event(), TrainerTiming(receipts_every_s=1.0)
    with SwarmClient(invite, settings, folder, timing=timing) as client:
        client.wait_for_experts(LIMIT_S, lambda text: None)
        model = LanguageModel(client.manifest, client.mixture)
        data = byte_dataset(b"In the sauna one must behave as in church. " * 60, MANIFEST.model.context)

        def note(progress: Progress) -> None:
            client.note(progress)
            stop.wait(STEP_S)

        def work() -> None:
            Training(model, data, settings).run(note, stop, validated=client.note_validation)

        thread = threading.Thread(target=work)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


@pytest.fixture(scope="module")
def watched(loop: LoopThread, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    swarm = Watched(loop, tmp_path_factory.mktemp("swarm"))
    try:
        loop.run(swarm.start(), LIMIT_S)
        assert swarm.invite is not None
        with training(swarm.invite, swarm.folder / "trainer"):
            yield swarm
    finally:
        loop.run(swarm.stack.aclose(), LIMIT_S)


def test_the_head_has_the_right_counts(watched: Watched) -> None:
    def complete(shown: Any) -> bool:
        measured = ("bits_per_byte", "requests_per_s", "tokens_per_s", "bytes_per_s")
        is_steady = shown["trainers"] == 1 and not shown["nodes"]["unsteady"] and shown["nodes"]["live"] == 2
        is_healthy = shown["state"] == {"level": "ok", "words": "healthy"}
        is_whole = (shown["experts"], shown["replicas"]) == ({"live": 8, "total": 8}, 8)
        return is_steady and is_healthy and is_whole and all(shown[figure] for figure in measured)

    shown = watched.until(complete)
    assert shown["nodes"] == {"live": 2, "gone": 0, "unsteady": 0}
    assert shown["layers"] == [{"layer": 0, "grid": [2, 2]}, {"layer": 1, "grid": [2, 2]}]
    assert shown["join"]["train"] == f"talkoot train --join {watched.invite}"
    assert shown["tokens_per_s"] > 0
    assert shown["bytes_per_s"] > 0
    watched.until(lambda layer: layer["replicas"] == [1, 1, 1, 1], "api/v1/experts?layer=1")


def test_nodes_and_trainers_say_what_they_do(watched: Watched) -> None:
    def all_worked(page: Any) -> bool:
        return len(page["nodes"]) == 2 and all(
            row["state"] == "serving" and row["latency_ms"] and row["updates"] and row["rows"]
            for row in page["nodes"]
        )

    def of_the_trainer(condition: Callable[[Any], bool]) -> Callable[[Any], bool]:
        """On a busy machine its record may expire before it is renewed."""
        return lambda page: len(page["trainers"]) == 1 and condition(page["trainers"][0])

    nodes = watched.until(all_worked, "api/v1/nodes?sort=name")
    assert [row["name"] for row in nodes["nodes"]] == [HOSTILE, "kuusi"]
    (trainer,) = watched.until(of_the_trainer(lambda row: row["backward_p99_ms"]), "api/v1/trainers")[
        "trainers"
    ]
    assert (trainer["name"], trainer["state"], trainer["steps"]) == ("Aino", "training", 10**6)
    watched.until(of_the_trainer(lambda row: row["step"] > trainer["step"]), "api/v1/trainers")
    watched.until(of_the_trainer(lambda row: row["validation_loss"]), "api/v1/trainers")


def test_what_trainers_sign_is_shown_beside_what_nodes_say_they_computed(watched: Watched) -> None:
    def all_signed(page: Any) -> bool:
        signed = [row["signed_pairs"] and row["signed_updates"] for row in page["nodes"]]
        return len(signed) == 2 and all(signed)

    page = watched.until(all_signed, "api/v1/leaderboard")
    assert (page["ranked"], [row["rank"] for row in page["nodes"]]) == (False, [None, None])
    assert {row["signed_trainers"] for row in page["nodes"]} == {1}
    for row in page["nodes"]:
        node = watched.get(f"api/v1/nodes/{row['peer_id']}")
        assert [signer["name"] for signer in node["signers"]] == ["Aino"]
        assert node["signers"][0]["pairs"] >= row["signed_pairs"]  # it goes on


def test_memories_are_watched(watched: Watched) -> None:
    registries = [MemoryRegistry(node.swarm.registry) for node in watched.nodes]
    publisher = watched.nodes[0].swarm.registry.peer_id
    entry = replace(memory().entry, memory=MemoryID.of("python-docs", publisher), publisher=publisher)

    async def publish() -> None:
        await registries[0].publish_library([entry])
        for registry, roots in zip(registries, ([b"a" * 32, b"b" * 32], [b"a" * 32]), strict=True):
            await registry.announce(entry.memory, {1: (ReplicaState.SERVING, roots)}, 300.0)

    watched.loop.run(publish(), LIMIT_S)
    page = watched.until(
        lambda page: page["memories"] and page["memories"][0]["hosts"] == 2, "api/v1/memories"
    )
    (row,) = page["memories"]
    assert (row["memory"], row["below_two"], row["replicas_min"], row["replicas_mean"]) == (
        str(entry.memory),
        1,
        1,
        1.5,
    )
    assert "talkoot_swarm_memory_shards_below_two 1.0" in fetch(watched.url + "metrics")


def test_an_expert_tells_who_hosts_it_and_its_history(watched: Watched) -> None:
    shown = watched.until(
        lambda e: e["replicas"] and e["series"] and e["series"][0]["points"], "api/v1/experts/0.1.0"
    )
    (replica,) = shown["replicas"]
    assert replica["state"] == "serving"
    assert replica["peer_id"] in {row["peer_id"] for row in watched.get("api/v1/nodes")["nodes"]}
    assert {one["name"] for one in shown["series"]} == {"updates", "replicas"}
    history = watched.until(lambda h: len(h["series"]) == 2, "api/v1/history?metric=loss")
    assert history["unit"] == "nats per token"


def test_a_page_is_told_of_each_reading(watched: Watched) -> None:
    seen: list[float] = []
    with urllib.request.urlopen(watched.url + "events", timeout=60) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        for line in stream:
            if line.startswith(b"data: "):
                seen.append(json.loads(line.removeprefix(b"data: "))["read_at"])
            if len(set(seen)) == 3:
                break
    assert seen == sorted(seen)


def test_the_dashboard_hosts_no_keys(watched: Watched) -> None:
    watcher = Identity.load_or_create(watched.folder / "dashboard" / "identity.key").peer_id
    for node in watched.nodes:
        assert watcher not in node.swarm.host.peers()
        assert len(node.swarm.host.peers()) == 1


def test_nodes_answer_health_checks(watched: Watched) -> None:
    async def ask(service: str) -> Any:
        pool, node = ChannelPool(), watched.nodes[0]
        record = (await node.swarm.registry.nodes([node.swarm.host.peer_id]))[node.swarm.host.peer_id]
        try:
            stub = health_pb2_grpc.HealthStub(await pool.get(node.address, record.certificate_pem))
            return await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=60)
        finally:
            await pool.close()

    for service in ("", "talkoot.v1.ExpertService"):
        assert watched.loop.run(ask(service)).status == health_pb2.HealthCheckResponse.SERVING


# Prometheus

needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None or shutil.which("promtool") is None,
    reason="needs prometheus and promtool, as Debian's package prometheus has them",
)


@needs_prometheus
def test_metrics_of_all_roles_are_as_promtool_wants_them(watched: Watched) -> None:
    groups = watched.until(lambda groups: sum(len(g["targets"]) for g in groups) == 3, "sd")
    assert [group["labels"] for group in groups] == [
        {"role": "node", "swarm": "sauna"}, {"role": "trainer", "swarm": "sauna"},
    ]  # fmt: skip
    urls = [f"http://{target}/metrics" for group in groups for target in group["targets"]]
    for url in (watched.url + "metrics", *urls):
        checked = subprocess.run(
            ["promtool", "check", "metrics"],
            input=fetch(url),
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
        )
        assert (checked.returncode, checked.stdout + checked.stderr) == (0, ""), url


@needs_prometheus
def test_rules_are_as_promtool_wants_them() -> None:
    for arguments in (["rules", "--lint=all"], ["config"]):
        file = "rules.yml" if arguments[0] == "rules" else "prometheus.yml"
        checked = subprocess.run(
            ["promtool", "check", *arguments, "--lint-fatal", str(DEPLOY / "prometheus" / file)],
            capture_output=True, text=True, timeout=LIMIT_S,
        )  # fmt: skip
        assert checked.returncode == 0, checked.stdout + checked.stderr


@contextlib.contextmanager
def prometheus(watched: Watched, folder: Path) -> Iterator[str]:
    """Starts Prometheus with the configuration of deploy/, but faster and for this dashboard. Yields its address."""
    config = (DEPLOY / "prometheus" / "prometheus.yml").read_text()
    config = config.replace("127.0.0.1:8080", urllib.parse.urlsplit(watched.url).netloc).replace(
        ": 15s", ": 1s"
    )
    (folder / "prometheus.yml").write_text(config)
    shutil.copy(DEPLOY / "prometheus" / "rules.yml", folder)
    command = [
        "prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}",
        "--web.listen-address=127.0.0.1:0",
    ]  # fmt: skip
    with (folder / "log").open("w+") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            deadline = time.monotonic() + LIMIT_S
            while "ready to receive web requests" not in (said := (folder / "log").read_text()):
                assert process.poll() is None, said
                assert time.monotonic() < deadline
                threading.Event().wait(0.05)
            found = re.search(r"address=(127\.0\.0\.1:[1-9]\d*)", said)
            assert found, said
            yield f"http://{found[1]}/api/v1/"
        finally:
            process.kill()


@needs_prometheus
def test_prometheus_finds_all_and_its_rules_evaluate(watched: Watched, tmp_path: Path) -> None:
    recorded = re.findall(r"record: (\S+)", (DEPLOY / "prometheus" / "rules.yml").read_text())
    with prometheus(watched, tmp_path) as api:

        def ask(path: str) -> Any:
            return json.loads(fetch(api + path))["data"]

        def value(query: str) -> list[str]:
            return [row["value"][1] for row in ask(f"query?query={urllib.parse.quote(query)}")["result"]]

        def health() -> list[tuple[str, str]]:
            targets = ask("targets")["activeTargets"]
            return sorted((t["labels"].get("role", t["labels"]["job"]), t["health"]) for t in targets)

        all_are_up = [("node", "up"), ("node", "up"), ("talkoot-dashboard", "up"), ("trainer", "up")]
        deadline, missing = time.monotonic() + LIMIT_S, recorded
        while missing:
            assert time.monotonic() < deadline, missing
            threading.Event().wait(0.2)
            # No call has failed here, so failures have no values to sum.
            missing = [name for name in recorded if not value(name) and "failures" not in name]
            updates = value("talkoot:updates:rate5m")
            if not updates or float(updates[0]) <= 0:  # no step between the first two looks
                missing.append("a step of the trainer")
            if health() != all_are_up:
                missing.append(f"all targets: {health()}")
        rules = [rule for group in ask("rules")["groups"] for rule in group["rules"]]
        assert {rule["health"] for rule in rules} == {"ok"}, [rule.get("lastError") for rule in rules]
        assert [float(n) for n in value("talkoot:experts_without_host")] == [0.0]
        assert missing_metrics(value) == []


class ForgedMetrics(BaseHTTPRequestHandler):
    """What a stranger's node may serve as its metrics: the figures of a swarm that has lost all its experts."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; version=0.0.4")
        self.end_headers()
        figures = ("rows_total", "swarm_experts")
        zeros = ("swarm_reachable", "swarm_live_experts")
        lines = [*(f"talkoot_{name} 7" for name in figures), *(f"talkoot_{name} 0" for name in zeros)]
        self.wfile.write("\n".join([*lines, "talkoot:experts_without_host 7", ""]).encode())

    def log_message(self, *_: Any) -> None:
        pass


@needs_prometheus
def test_no_node_speaks_for_the_swarm_in_prometheus(watched: Watched, tmp_path: Path) -> None:
    (tmp_path / "prometheus").mkdir()
    (tmp_path / "prometheus-targets").mkdir()
    with ThreadingHTTPServer((LOCAL, 0), ForgedMetrics) as stranger, contextlib.ExitStack() as stack:
        threading.Thread(target=stranger.serve_forever).start()
        stack.callback(stranger.shutdown)
        target = f"{LOCAL}:{stranger.server_port}"
        listed = json.dumps([{"targets": [target], "labels": {"role": "node", "swarm": "sauna"}}])
        (tmp_path / "prometheus-targets" / "stranger.yml").write_text(listed)
        with prometheus(watched, tmp_path / "prometheus") as api:

            def jobs(metric: str) -> list[str]:
                found = json.loads(fetch(f"{api}query?query={urllib.parse.quote(metric)}"))["data"]["result"]
                return [row["metric"]["job"] for row in found]

            deadline = time.monotonic() + LIMIT_S
            from_stranger, from_rule = (
                f'talkoot_rows_total{{instance="{target}"}}',
                "talkoot:experts_without_host",
            )
            while not (jobs(from_stranger) and "talkoot-dashboard" in jobs(from_rule)):
                assert time.monotonic() < deadline
                threading.Event().wait(0.2)
            for metric in ("talkoot_swarm_reachable", "talkoot_swarm_experts", from_rule):
                assert jobs(metric) == ["talkoot-dashboard"], metric


def missing_metrics(value: Callable[[str], list[str]]) -> list[str]:
    """The metrics that the Grafana dashboard or an alert uses but nobody serves."""
    text = (DEPLOY / "grafana" / "swarm.json").read_text() + (DEPLOY / "prometheus" / "rules.yml").read_text()
    named = set(re.findall(r"\b(?:talkoot_\w+|process_\w+)\b", text)) - {"talkoot_trainer_failures_total"}
    assert len(named) > 25
    return sorted(name for name in named if not value(name))


def test_a_run_that_has_ended_is_shown_with_its_result(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Here it may take longer than the two seconds that a leaving node has.
    monkeypatch.setattr("trainer_client.announcer._WITHDRAW_S", 60.0)

    def row_of(page: Any) -> Any:
        return next((row for row in page["trainers"] if row["name"] == "once"), None)

    state = watched.folder / "once"
    with SwarmClient.join(str(watched.invite), name="once", state=state, announce_every_s=PERIOD_S) as client:
        client.report(1, 2.5)
        watched.until(lambda page: (row := row_of(page)) and row["state"] == "own loop", "api/v1/trainers")
        client.report(2, 2.25, validation_loss=2.0)
    page = watched.until(lambda page: (row := row_of(page)) and row["state"] == "finished", "api/v1/trainers")
    assert (row_of(page)["step"], row_of(page)["loss"], row_of(page)["validation_loss"]) == (2, 2.25, 2.0)


# How things end. These tests take the swarm apart, in this order.


def test_a_node_that_falls_silent_is_shown_as_gone(watched: Watched) -> None:
    watched.loop.run(end(watched.running[1]))
    states = {"kuusi": "serving", HOSTILE: "gone"}
    watched.until(lambda page: {r["name"]: r["state"] for r in page["nodes"]} == states, "api/v1/nodes")
    watched.until(lambda shown: shown["state"]["words"] == "4 experts have no host")


def test_a_node_that_leaves_in_order_is_shown_as_left(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("expert_server.node._FAREWELL_S", 60.0)
    watched.loop.run(end(watched.running[0]))
    watched.loop.run(watched.nodes[0].stop(), LIMIT_S)
    states = {"kuusi": "left", HOSTILE: "gone"}
    watched.until(lambda page: {r["name"]: r["state"] for r in page["nodes"]} == states, "api/v1/nodes")


def test_an_unreachable_swarm_is_said_to_be_so_and_its_last_state_stays(watched: Watched) -> None:
    for node in watched.nodes:
        watched.loop.run(node.swarm.host.stop(), LIMIT_S)
    shown = watched.until(lambda s: s["unreachable_since"] is not None)
    assert shown["state"] == {"level": "unknown", "words": "cannot reach the swarm"}
    assert shown["experts"]["total"] == 8
    later = watched.until(lambda s: s["age_s"] > shown["age_s"])
    assert later["read_at"] == shown["read_at"]


def test_a_restart_loses_nothing(watched: Watched) -> None:
    shutil.copytree(watched.folder / "dashboard", watched.folder / "again")

    async def look() -> Any:
        async with contextlib.AsyncExitStack() as stack:
            url = await watched.watch(stack, watched.folder / "again")
            swarm = json.loads(await asyncio.to_thread(fetch, url + "api/v1/swarm"))
            history = json.loads(await asyncio.to_thread(fetch, url + "api/v1/history?metric=loss"))
            return swarm, history

    swarm, history = watched.loop.run(look(), LIMIT_S)
    assert swarm["name"] == "sauna"
    assert swarm["read_at"] is not None
    assert swarm["experts"]["total"] == 8
    assert len(history["series"]) == 4
