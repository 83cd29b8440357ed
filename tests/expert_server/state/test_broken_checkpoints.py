"""Checkpoints that are broken or foreign are skipped for an earlier one, and do not push out good ones."""

import json
import os
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from checkpoint_samples import (
    AN_UID,
    MOMENT,
    OTHER_UID,
    SWARM,
    WEIGHT,
    assert_same,
    changed,
    make_expert,
    make_store,
    save,
    step,
    update_counts,
    warnings_in,
    without,
)

from dht.uid import UID
from expert_server.experts.expert import Expert
from expert_server.experts.format import Checkpoint, State
from expert_server.serving.runtime import Runtime
from expert_server.state.checkpoints import Checkpoints, CheckpointStore
from peer.loop import LoopThread


def rewrite(path: Path, **changes: Any) -> None:
    """Changes fields of the header, and nothing else."""
    with safetensors.safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["talkoot"]) | changes
    state = safetensors.torch.load_file(path)
    path.write_bytes(safetensors.torch.save(state, {"talkoot": json.dumps(header)}))


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def replace_state(path: Path, change: Callable[[State], State]) -> None:
    """Writes a checkpoint with wrong tensors but a correct checksum."""
    store = make_store(path.parent.parent.parent)
    store.save(AN_UID, Checkpoint(change(make_expert(3).export_state()), 3))


def link_from(path: Path, swarm_id: str, uid: UID) -> None:
    """Replaces the file by a good checkpoint of another swarm or expert."""
    path.write_bytes(
        save(make_store(path.parents[2] / "elsewhere", 2, swarm_id), make_expert(3, uid)).read_bytes()
    )


def put_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def put_dead_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


BREAK: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (lambda path: path.write_bytes(b""), "can't be read"),
    "garbage": (lambda path: path.write_bytes(os.urandom(4096)), "can't be read"),
    "a pickle": (lambda path: torch.save({"a": 1}, path), "can't be read"),
    "a folder": (put_folder, "can't be read"),
    "a dead link": (put_dead_link, "can't be read"),
    "longer": (lambda path: path.write_bytes(path.read_bytes() + b"more"), "can't be read"),
    "no header": (lambda path: safetensors.torch.save_file({}, path), "lacks the header of a checkpoint"),
    "header of another kind": (lambda path: rewrite(path, uid=None), "header is not valid"),
    "another key": (lambda path: rewrite(path, more=1), "checksum"),
    "later format version": (
        lambda path: rewrite(path, format_version=2),
        "has format version 2, this software reads 1: update Talkoot",
    ),
    "no format version": (lambda path: rewrite(path, format_version="x"), "has format version 'x', .* reads 1$"),
    "time": (lambda path: rewrite(path, saved_at=7.0), "checksum"),
    "update count": (lambda path: rewrite(path, update_count=9), "its update count is 9, not 3"),
    "foreign swarm": (lambda path: link_from(path, "banya-QmOther", AN_UID), "its swarm is banya-QmOther, not sauna"),
    "foreign expert": (lambda path: link_from(path, SWARM, OTHER_UID), r"its expert is 0\.1\.1, not 1\.0\.1"),
    "last byte": (lambda path: flip(path, -1), "checksum"),
    "wrong shape": (lambda path: replace_state(path, changed(WEIGHT, lambda t: t[:5])), r"is \(\(5, 8\)"),
    "not finite": (lambda path: replace_state(path, changed(MOMENT, lambda t: t / 0)), "not finite"),
    "no moments": (lambda path: replace_state(path, without(MOMENT)), "lacks"),
}  # fmt: skip


@pytest.fixture
def restore(loop: LoopThread) -> Callable[[CheckpointStore], Expert]:
    """Loads the newest valid checkpoint into a new expert, as a node does."""

    def run(store: CheckpointStore) -> Expert:
        async def restored() -> Expert:
            runtime = Runtime({}, max_queued_rows=100, max_batch_rows=100, threads=1)
            expert = make_expert()
            try:
                checkpoints = Checkpoints(store, runtime)
                assert await checkpoints.restore(expert) == (expert.update_count > 0)
            finally:
                await runtime.stop()
            return expert

        return loop.run(restored(), 120)

    return run


@pytest.mark.parametrize(("break_file", "reason"), BREAK.values(), ids=BREAK)
def test_a_broken_or_foreign_checkpoint_is_passed_over_for_the_one_before(
    tmp_path: Path,
    restore: Callable[[CheckpointStore], Expert],
    caplog: pytest.LogCaptureFixture,
    break_file: Callable[[Path], Any],
    reason: str,
) -> None:
    store, expert = make_store(tmp_path), make_expert(2)
    save(store, expert)
    before = expert.export_state()
    path = save(store, step(expert))
    break_file(path)
    restored = restore(store)
    assert restored.update_count == 2
    assert_same(restored.export_state(), before)
    (line,) = warnings_in(caplog)
    assert line.startswith(f"skipping the checkpoint {path}: ")
    assert re.search(reason, line)


def test_a_truncated_checkpoint_is_passed_over_wherever_it_ends(tmp_path: Path) -> None:
    store, expert = make_store(tmp_path), make_expert(2)
    save(store, expert)
    path = save(store, step(expert))
    data = path.read_bytes()
    rng = random.Random(0)
    for length in [0, 1, 7, 8, 9, 100, len(data) - 1, *rng.sample(range(len(data)), 40)]:
        path.write_bytes(data[:length])
        checkpoint = store.load_newest(AN_UID)
        assert checkpoint is not None
        assert checkpoint.update_count == 2, length


def test_a_flipped_bit_is_never_loaded_as_another_state(tmp_path: Path) -> None:
    store, expert = make_store(tmp_path), make_expert(2)
    save(store, expert)
    states = {2: expert.export_state(), 3: step(expert).export_state()}
    path = save(store, expert)
    data = path.read_bytes()
    rng = random.Random(1)
    for offset in [*range(0, 600, 7), *rng.sample(range(len(data)), 100)]:
        flipped = bytearray(data)
        flipped[offset] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        checkpoint = store.load_newest(AN_UID)
        assert checkpoint is not None
        assert_same(checkpoint.state, states[checkpoint.update_count])


def test_without_a_valid_checkpoint_an_expert_starts_anew(
    tmp_path: Path, restore: Callable[[CheckpointStore], Expert]
) -> None:
    store = make_store(tmp_path)
    save(store, make_expert(2)).write_bytes(b"broken")
    restored = restore(store)
    assert restored.update_count == 0
    assert_same(restored.export_state(), make_expert().export_state())


@pytest.mark.parametrize("keep", [1, 2])
def test_a_broken_newer_file_never_pushes_out_a_good_one(tmp_path: Path, keep: int) -> None:
    store, expert = make_store(tmp_path, keep), make_expert()
    for count in (90, 91, 92):
        path = store.path(AN_UID, count)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"broken")
    for _ in range(4):
        save(store, step(expert))
        checkpoint = store.load_newest(AN_UID)
        assert checkpoint is not None
        assert checkpoint.update_count == expert.update_count
    assert len(update_counts(store, AN_UID)) == 3 + keep
