"""Shared by all tests: one event loop for everything that uses the network, and one torch thread."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from peer.loop import LoopThread

settings.register_profile("talkoot", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("talkoot")
torch.set_num_threads(1)  # on a busy machine several pools wait for each other


@pytest.fixture(scope="session")
def loop() -> Iterator[LoopThread]:
    """The process's one loop: gRPC and the DHT run here, on a thread beside the tests."""
    thread = LoopThread()
    yield thread
    thread.close()
