"""Shared by all tests: one event loop for the network, one torch thread, two peers' keys, and a release's wheel."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from make_release import build_wheel, recorded_wheels

from peer.identity import Identity
from peer.loop import LoopThread

settings.register_profile("talkoot", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("talkoot")
torch.set_num_threads(1)  # on a busy machine several pools wait for each other

LONGEST = (
    "test_demo.py",
    "test_cli.py",
    "test_control_commands.py",
    "test_node.py",
    "test_node_leaves_nothing.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that no worker is left alone with one of them."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(scope="session")
def loop() -> Iterator[LoopThread]:
    """The process's one loop: gRPC and the DHT run here, on a thread beside the tests."""
    thread = LoopThread()
    yield thread
    thread.close()


@pytest.fixture(scope="session")
def identity(tmp_path_factory: pytest.TempPathFactory) -> Identity:
    return Identity.load_or_create(tmp_path_factory.mktemp("identity") / "peer.key")


@pytest.fixture(scope="session")
def other(tmp_path_factory: pytest.TempPathFactory) -> Identity:
    return Identity.load_or_create(tmp_path_factory.mktemp("other") / "peer.key")


@pytest.fixture(scope="session")
def release_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recorded release's wheel; before the first is recorded, the present code packed under another version."""
    recorded = recorded_wheels()
    return recorded[-1] if recorded else build_wheel("0.0.1", tmp_path_factory.mktemp("wheel"))
