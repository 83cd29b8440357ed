"""What Prometheus sees of each role: the names, types and labels that dashboards and alerts depend on."""

import socket
import time
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from byte_texts import byte_dataset
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from served_model import served, small_model
from training_swarm import HOST, TEXT, Founder, founded

from dht.invites import Invite
from peer.loop import LoopThread
from talkoot.dashboard.server import dashboard
from talkoot.dashboard.settings import DashboardSettings
from talkoot.dashboard.watcher import WatchIntervals
from talkoot.web import address_of, listen
from trainer_client.client import SwarmClient
from trainer_client.model import LanguageModel
from trainer_client.settings import TrainerSettings
from trainer_client.training.loop import Training

GOLDEN = Path(__file__).parent / "golden"
LIMIT_S = 120.0


def described(text: str) -> list[str]:
    """Each of Talkoot's metrics as `name type label=value,value`, sorted; histograms with their bounds."""
    ours = (family for family in text_string_to_metric_families(text) if family.name.startswith("talkoot_"))
    return sorted(f"{family.name} {family.type}{_labels(family)}" for family in ours)


def _labels(family: Metric) -> str:
    values: dict[str, set[str]] = {}
    for sample in family.samples:
        assert not sample.name.endswith("_created"), "nobody reads when a metric was made"
        for label, value in sample.labels.items():
            values.setdefault(label, set()).add(f"{float(value):g}" if label == "le" else value)
    return "".join(f" {label}={','.join(_in_order(label, seen))}" for label, seen in sorted(values.items()))


def _in_order(label: str, values: set[str]) -> list[str]:
    return sorted(values, key=float) if label == "le" else sorted(values)


def check(role: str, scrape: Callable[[], str]) -> None:
    """Waits until the exposed metrics match the golden file; some figures are known only after a while."""
    path = GOLDEN / f"metrics_{role}.txt"
    golden, deadline = path.read_text().splitlines(), time.monotonic() + LIMIT_S
    while (seen := described(scrape())) != golden and time.monotonic() < deadline:
        time.sleep(0.1)
    assert seen == golden, "if this is meant, change the golden file, docs/ and deploy/ as well"


def fetch(url: str) -> str:
    with urllib.request.urlopen(url, timeout=60) as answer:
        return str(answer.read().decode())


@pytest.fixture(scope="module")
def founder(loop: LoopThread, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Founder]:
    with founded(loop, tmp_path_factory.mktemp("founder"), experts=8) as running:
        yield running


@pytest.fixture(scope="module")
def trainer_metrics(founder: Founder, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The metrics address of a trainer that has validated, and that averages with others."""
    settings = TrainerSettings.load(seed=0, announce_every_s=0.5, average_every=2)
    with SwarmClient(Invite.parse(founder.invite), settings, tmp_path_factory.mktemp("trainer")) as client:
        client.wait_for_experts(LIMIT_S, lambda text: None)
        dataset = byte_dataset(TEXT.encode(), client.manifest.model.context, 0)
        make = partial(LanguageModel, client.manifest, client.mixture)
        client.average(Training(make(), dataset, settings, make).part, "bytes")
        client.report(1, 2.5, tokens_per_s=100.0, validation_loss=2.0, bits_per_byte=2.9)
        registry = founder.node.swarm.registry

        async def announced() -> str | None:
            found = await registry.trainers(await registry.trainer_ids())
            return next((trainer.metrics_address for trainer in found.values() if trainer.step), None)

        deadline = time.monotonic() + LIMIT_S
        while (address := founder.loop.run(announced(), 120)) is None:
            assert time.monotonic() < deadline, "no trainer in the swarm"
            time.sleep(0.1)
        yield f"http://{address}/metrics"


def test_metrics_of_a_node(founder: Founder) -> None:
    check("node", lambda: fetch(founder.node.metrics_address))


def test_metrics_of_a_trainer(trainer_metrics: str) -> None:
    check("trainer", lambda: fetch(trainer_metrics))


@pytest.mark.usefixtures("trainer_metrics")
def test_metrics_of_a_dashboard(founder: Founder, tmp_path: Path) -> None:
    settings = DashboardSettings.load(refresh_s=0.5)
    listener: socket.socket = listen(HOST, 0)
    intervals = WatchIntervals(0.5, list_every_s=1.0)
    running = dashboard(Invite.parse(founder.invite), settings, tmp_path, listener, intervals)
    founder.loop.run(running.__aenter__(), 120)
    try:
        check("dashboard", lambda: fetch(address_of(listener) + "metrics"))
    finally:
        founder.loop.run(running.__aexit__(None, None, None), 120)
        listener.close()


def test_metrics_of_a_server(loop: LoopThread) -> None:
    with served(loop, small_model()) as address:
        check("serve", lambda: fetch(f"{address}metrics"))
