"""Fixtures and settings for all tests: one event loop, one torch thread, the keys of two peers, and a
release's wheel.

Whatever takes long to import is imported where it is needed, because the process that hands out the tests reads this
file too, and the others wait for it.
"""

import gc
import os
import socket
import sys
import zlib
from collections.abc import Generator, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

# This must come before numpy is imported: on a busy machine its threads wait for each other, and take twenty times the
# processor time.
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from peer.identity import Identity
    from peer.loop import LoopThread

_COMMON: Any = {
    "deadline": None,
    "print_blob": True,
    "suppress_health_check": [HealthCheck.too_slow],  # on a busy machine, everything is
}
settings.register_profile("talkoot", max_examples=50, derandomize=True, **_COMMON)
settings.register_profile("thorough", max_examples=500, **_COMMON)  # `--hypothesis-profile thorough`
settings.load_profile("talkoot")
sys.dont_write_bytecode = False  # else every process that a test starts compiles all modules again
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# On a busy machine, nodes with a lower priority than the tests that wait for them would starve.
os.environ["TALKOOT_NODE_NICENESS"] = "0"
# To start p2pd takes 0.4 s of processor time. Tests that are about it have it, and those that run what users run.
os.environ |= {"TALKOOT_NODE_P2PD": "off", "TALKOOT_TRAIN_P2PD": "off"}

LONGEST = (
    "test_demo.py",
    "test_handover.py",
    "test_transformers.py",
    "test_memory_hosting.py",
    "test_examples.py",
    "test_train_command.py",
    "test_page.py",
    "test_publish.py",
    "test_crowds.py",
    "test_installation.py",
    "test_upgrades.py",
    "test_cli.py",
    "test_replica_averaging.py",
    "test_rejoining.py",
    "test_readme.py",
    "test_node.py",
    "test_founding.py",
    "test_page_states.py",
    "test_export.py",
    "test_page_judged.py",
    "test_local.py",
    "test_nat.py",
    "test_engine.py",
    "test_upnp.py",
    "test_ask.py",
    "test_standby.py",
    "test_libp2p.py",
    "test_memory_commands.py",
    "test_watched_swarm.py",
)
"""The slowest files. Those that mostly wait alternate with those that keep the processor busy."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Runs the slowest files first, so that no worker is left alone with one of them at the end."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is imported and collected stays. The garbage collector never looks through it: not meanwhile, which took a
    quarter of the time, and not afterwards, which took 0.2 s each time. It looks for garbage a tenth as often as
    usual, because it took 6 % of the tests' time.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.set_threshold(7000)
        gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Gives each test the same random weights in each run, whichever tests ran before it in its process."""
    import torch

    torch.default_generator.manual_seed(zlib.crc32(item.nodeid.encode()))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """On a busy machine, several pools of torch's threads wait for each other."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def loop() -> "Iterator[LoopThread]":
    """The event loop of the process: gRPC and the DHT run on it, in another thread than the tests."""
    from limited_loop import LimitedLoop

    thread = LimitedLoop()
    yield thread
    thread.close()


@pytest.fixture(scope="module", autouse=True)
def experts_attend(request: pytest.FixtureRequest) -> Iterator[None]:
    """Used by the tests of computing experts: experts have attention, so a row's result depends on other rows of its
    segment.
    """
    from attending import attending_experts

    folders = {"expert_server/experts", "expert_server/serving"}
    attends = "/".join(request.path.parts[-3:-1]) in folders
    with attending_experts() if attends else nullcontext():
        yield


@pytest.fixture
def long_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Announcements live for at least 15 s, however often they are renewed, since a busy machine may stall
    for seconds.
    """
    from dht.records import MAX_LIFETIME_S

    monkeypatch.setattr("dht.upkeep.lifetime_s", lambda period_s: min(30 * period_s, MAX_LIFETIME_S))


@pytest.fixture
def p2pd(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes and trainers start p2pd, as they do unless a setting forbids it."""
    for role in ("NODE", "TRAIN"):
        monkeypatch.delenv(f"TALKOOT_{role}_P2PD")


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port of 127.0.0.1 that refuses connections. It is reserved, so that no other process listens on it
    meanwhile.
    """
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield int(bound.getsockname()[1])


@pytest.fixture(scope="session")
def identity(tmp_path_factory: pytest.TempPathFactory) -> "Identity":
    from peer.identity import Identity

    return Identity.load_or_create(tmp_path_factory.mktemp("identity") / "peer.key")


@pytest.fixture(scope="session")
def other(tmp_path_factory: pytest.TempPathFactory) -> "Identity":
    from peer.identity import Identity

    return Identity.load_or_create(tmp_path_factory.mktemp("other") / "peer.key")


@pytest.fixture(scope="session")
def release_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the recorded release. Before any release is recorded: the present code, packed as another
    version.
    """
    from make_release import build_wheel, recorded_wheels

    recorded = recorded_wheels()
    return recorded[-1] if recorded else build_wheel("0.0.1", tmp_path_factory.mktemp("wheel"))
