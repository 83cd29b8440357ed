"""Large states are packed, received and unpacked on a thread beside the event loop, which must run meanwhile."""

import hashlib
import threading
import time
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load

from peer.checkpoints import CheckpointHeader, decode_checkpoint, encode_checkpoint
from peer.codec import CHUNK_BYTES
from peer.rpc.transfer import SnapshotReceiver
from peer.wire import state_pb2


def packed() -> bytes:
    """64 MB."""
    tensors = {name: torch.arange(2**22, dtype=torch.float32) for name in ("a", "b", "c", "d")}
    return encode_checkpoint(CheckpointHeader(), tensors)


@pytest.fixture(scope="module")
def data() -> bytes:
    return packed()


def held(work: Callable[[], object]) -> float:
    """The longest time for which this thread could not run while another did the work, as a share of the whole."""
    thread, longest_s = threading.Thread(target=work), 0.0
    began = last = time.monotonic()
    thread.start()
    while thread.is_alive():
        time.sleep(0.001)
        now = time.monotonic()
        longest_s, last = max(longest_s, now - last), now
    return longest_s / (last - began)


def test_packing_a_large_state_lets_other_threads_run() -> None:
    assert min(held(packed) for _ in range(3)) < 0.25


def test_unpacking_a_large_state_lets_other_threads_run(data: bytes) -> None:
    def unpack() -> None:
        decode_checkpoint(data, CheckpointHeader, lambda header, outline: None)

    assert min(held(unpack) for _ in range(3)) < 0.25


def test_taking_what_was_received_lets_other_threads_run(data: bytes) -> None:
    incoming = SnapshotReceiver(len(data), lambda size: None)
    sha256 = hashlib.sha256(data).digest()
    incoming.begin(state_pb2.StateHeader(total_bytes=len(data), sha256=sha256))
    for begin in range(0, len(data), CHUNK_BYTES):
        incoming.take(data[begin : begin + CHUNK_BYTES])
    assert min(held(incoming.whole) for _ in range(3)) < 0.25
    assert incoming.whole()[1] == data


def test_the_file_is_one_that_the_library_can_read() -> None:
    tensors = {
        "a": torch.tensor([True, False, True]),
        "b": torch.arange(3),
        "c": torch.tensor(2.0, dtype=torch.float64),
        "é": torch.zeros(0, 5),
        "h": torch.randn(5).bfloat16(),
        "w": torch.randn(3, 4),
    }
    found = load(encode_checkpoint(CheckpointHeader(), tensors))
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
