"""Checkpoints on disk: what was saved can be loaded, even if a writer is killed or the disk is full."""

import asyncio
import errno
import itertools
import json
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from checkpoint_samples import (
    AN_UID,
    LARGER,
    MANIFEST,
    OTHER_UID,
    SWARM,
    WEIGHT,
    assert_same,
    changed,
    filled_with,
    make_expert,
    make_store,
    save,
    step,
    update_counts,
    warnings_in,
)
from preloaded import Preloaded

from dht.manifest import ExpertSpec
from dht.uid import UID
from expert_server.experts.expert import Expert
from expert_server.experts.format import AVERAGED
from expert_server.experts.graphs import Rows
from expert_server.serving.runtime import Runtime
from expert_server.state.checkpoints import Checkpoints, CheckpointStore
from peer.errors import ExpertError
from peer.loop import LoopThread
from peer.metrics import total

# The store


@pytest.mark.parametrize("steps", [0, 3])
def test_what_was_saved_is_loaded(tmp_path: Path, steps: int) -> None:
    expert, store = make_expert(steps), make_store(tmp_path)
    path = save(store, expert)
    assert path == tmp_path / SWARM / "1.0.1" / f"{steps}.safetensors"
    checkpoint = make_store(tmp_path).load_newest(AN_UID)
    assert checkpoint is not None
    assert checkpoint.update_count == steps
    assert_same(checkpoint.state, expert.export_state())


def test_what_was_never_saved_is_none(tmp_path: Path) -> None:
    store = make_store(tmp_path / "not there")
    store.sweep()
    assert store.load_newest(AN_UID) is None
    assert store.newest() == {}


def test_any_tool_can_read_a_checkpoint_and_its_header(tmp_path: Path) -> None:
    path = save(make_store(tmp_path), make_expert(3))
    with safetensors.safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["talkoot"])
    sha256 = header.pop("sha256")
    assert len(sha256) == 64
    assert header == {
        "format_version": 1, "swarm_id": SWARM, "uid": "1.0.1", "update_count": 3, "saved_at": 1000.5,
    }  # fmt: skip


def test_the_newest_are_kept(tmp_path: Path) -> None:
    store, expert = make_store(tmp_path, keep=3), make_expert()
    for _ in range(12):  # 9 and 10: by number, not by name
        save(store, step(expert))
    save(store, make_expert(1, OTHER_UID))
    assert update_counts(store, AN_UID) == [12, 11, 10]
    assert store.newest() == {AN_UID: {"": 12}, OTHER_UID: {"": 1}}


def test_checkpoints_off_the_grid_are_passed_over_and_said_so_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    smaller = MANIFEST.model_copy(update={"experts": ExpertSpec(grid=(1, 2))})
    store = make_store(tmp_path, manifest=smaller)
    save(store, make_expert())
    save(store, make_expert(1, OTHER_UID))
    for _ in range(2):
        assert store.newest() == {AN_UID: {"": 0}}
    (warning,) = warnings_in(caplog)
    assert f"{tmp_path / SWARM / str(OTHER_UID)}: the swarm's grid has no such expert" in warning
    assert update_counts(store, OTHER_UID) == [1], "it is left where it is"


def test_other_files_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    store, expert = make_store(tmp_path, keep=1), make_expert()
    path = save(store, step(expert))
    for name in ("notes.txt", "07.safetensors", "9.safetensors.bak"):
        (path.parent / name).write_text("mine")
        (path.parent.parent / name).write_text("mine")
    save(store, step(expert))
    assert sorted(os.listdir(path.parent)) == [
        "07.safetensors", "2.safetensors", "9.safetensors.bak", "notes.txt",
    ]  # fmt: skip
    assert store.newest() == {AN_UID: {"": 2}}


def test_of_experts_that_were_given_up_only_the_last_few_are_kept(tmp_path: Path) -> None:
    """Experts that are hosted, or that nobody else proved to have, stay."""
    store, uids = (
        make_store(tmp_path),
        [UID(layer, (a, b)) for layer in (0, 1) for a in (0, 1) for b in (0, 1)],
    )
    for uid in uids:
        for count, source in ((1, ""), (2, ""), (3, "QmSomebody"), (4, AVERAGED)):
            checkpoint = step(Expert(uid, MANIFEST), count).checkpoint()
            store.save(uid, replace(checkpoint, source=source))
    lost, hosted, *given_up = uids
    (tmp_path / SWARM / str(lost) / "notes").write_text("mine")
    store.give_up([hosted], set())
    for uid in given_up:
        store.give_up([uid], {hosted}, keep=2)
    assert set(store.newest()) == {lost, hosted, *given_up[-2:]}
    assert sorted(path.name for path in (tmp_path / SWARM).iterdir()) == sorted(map(str, store.newest()))
    copy = replace(step(Expert(given_up[-1], MANIFEST), 5).checkpoint(), source="QmSomebody")
    store.save(given_up[-1], copy)  # does not make it needed
    store.save(given_up[-2], step(Expert(given_up[-2], MANIFEST), 5).checkpoint())
    store.give_up([lost], {hosted}, keep=0)
    assert set(store.newest()) == {hosted, given_up[-2]}, "what was saved again is needed again"
    assert (tmp_path / SWARM / str(lost) / "notes").read_text() == "mine"


def test_a_checkpoint_from_which_an_expert_continues_is_no_longer_given_up(
    tmp_path: Path, loop: LoopThread
) -> None:
    """The node may be stopped before it saves the expert again, and then have the only state."""
    store = make_store(tmp_path)
    save(store, make_expert(1))
    store.give_up([AN_UID], {AN_UID})

    async def scenario() -> None:
        runtime = Runtime({}, max_queued_rows=100, max_batch_rows=100, threads=1)
        try:
            assert await Checkpoints(store, runtime).restore(make_expert())
        finally:
            await runtime.stop()

    loop.run(scenario(), 120)
    store.give_up([], set(), keep=0)
    assert update_counts(store, AN_UID) == [1]


def test_what_killed_writers_left_is_swept(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    path = save(store, make_expert(1))
    (path.parent / ".2.safetensors.new").write_bytes(b"half")
    store.sweep()
    assert os.listdir(path.parent) == ["1.safetensors"]


# Writers that die and disks that are full


_WRITERS = """
import os, sys
from pathlib import Path
import torch
from checkpoint_samples import AN_UID, LARGER, filled_with, make_store

torch.set_num_threads(1)  # so that this process has one thread, and can fork
while sys.stdin.readline():
    if writer := os.fork():
        os.waitpid(writer, 0)
        print("dead", flush=True)
        continue
    store = make_store(Path(sys.argv[1]), manifest=LARGER)
    newest = store.load_newest(AN_UID)
    update_count = newest.update_count if newest else 0
    print(os.getpid(), flush=True)
    while True:
        update_count += 1
        store.save(AN_UID, filled_with(update_count))
        os.write(1, b"%d\\n" % update_count)  # in one piece, unlike print
"""
"""Starts a writer process for each line that it reads, one after another."""


@pytest.mark.slow
def test_a_writer_killed_at_any_moment_loses_nothing_that_was_saved(tmp_path: Path) -> None:
    root = Path(__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "tests" / "support")])}
    store, rng, last_saved = make_store(tmp_path / "state", manifest=LARGER), random.Random(2), 0
    with Preloaded(
        *("-c", _WRITERS, str(tmp_path / "state")),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as writers:
        assert writers.stdin is not None
        assert writers.stdout is not None
        for writer in itertools.count():
            if writer >= 20 and last_saved > 20:  # a slow disk takes more writers
                break
            print(file=writers.stdin, flush=True)
            pid = int(writers.stdout.readline())
            time.sleep(rng.uniform(0, 0.1))  # the random moment: nothing is waited for
            os.kill(pid, signal.SIGKILL)
            while (line := writers.stdout.readline()) != "dead\n":
                last_saved = int(line)
            checkpoint = store.load_newest(AN_UID)
            update_count = checkpoint.update_count if checkpoint else 0
            assert update_count in (last_saved, last_saved + 1)  # it may be saved and not said yet
            if checkpoint is not None:
                assert_same(checkpoint.state, filled_with(update_count).state)
            last_saved = update_count
        writers.stdin.close()
    store.sweep()
    assert not list(tmp_path.rglob("*.new"))


class Killed(BaseException):
    """Stands for SIGKILL: no code of the program runs after it."""


def test_a_save_that_ends_before_any_of_its_system_calls_leaves_a_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls_left = 0

    def mortal(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            nonlocal calls_left
            calls_left -= 1
            if calls_left < 0:
                raise Killed
            return call(*arguments)

        return run

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, mortal(getattr(os, name)))
    monkeypatch.setattr(Path, "unlink", mortal(Path.unlink))
    for ends_after in range(10):
        calls_left = 100
        store, expert = make_store(tmp_path / str(ends_after), keep=1), make_expert(2)
        save(store, expert)
        step(expert)
        calls_left = ends_after
        try:
            save(store, expert)
        except Killed:
            is_whole = False
        else:
            is_whole = True
        checkpoint = store.load_newest(AN_UID)
        assert checkpoint is not None
        assert checkpoint.update_count == 3 if is_whole else checkpoint.update_count in (2, 3)
        if is_whole:
            break
    assert ends_after == 4, "file, rename, folder, and the one before removed"


Scenario = Callable[[Checkpoints, Expert], Coroutine[Any, Any, None]]


@pytest.fixture
def play(loop: LoopThread, tmp_path: Path) -> Callable[[Scenario], None]:
    """Runs a scenario with one expert in service, which was saved once and has taken another update since."""

    def run(scenario: Scenario) -> None:
        async def with_runtime() -> None:
            runtime = Runtime({}, max_queued_rows=100, max_batch_rows=100, threads=1)
            try:
                checkpoints, expert = Checkpoints(make_store(tmp_path), runtime), make_expert(1)
                runtime.add(expert)
                await checkpoints.save_changed()
                assert (total(checkpoints.saved), total(checkpoints.failed)) == (1, 0)
                await runtime.run(lambda: step(expert))
                await scenario(checkpoints, expert)
            finally:
                await runtime.stop()

        loop.run(with_runtime(), 120)

    return run


Play = Callable[[Scenario], None]


def test_an_expert_is_saved_again_only_when_it_has_changed(play: Play, tmp_path: Path) -> None:
    async def scenario(checkpoints: Checkpoints, expert: Expert) -> None:
        for _ in range(3):
            await checkpoints.save_changed()
        assert total(checkpoints.saved) == 2
        assert update_counts(make_store(tmp_path), AN_UID) == [2, 1]

    play(scenario)


def test_a_state_that_is_replaced_while_the_last_one_is_written_is_saved_too(
    play: Play, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(tmp_path)

    async def scenario(checkpoints: Checkpoints, expert: Expert) -> None:
        begun, released, save_now = threading.Event(), threading.Event(), CheckpointStore.save

        def save_later(*arguments: Any) -> None:
            begun.set()
            assert released.wait(60)
            save_now(*arguments)

        state = expert.export_state()
        expert.import_state(state, 2, AVERAGED)
        monkeypatch.setattr(CheckpointStore, "save", save_later)
        saving = asyncio.create_task(checkpoints.save_changed())
        await asyncio.to_thread(begun.wait, 60)
        expert.import_state(changed(WEIGHT, lambda weight: 1.01 * weight)(state), 2, AVERAGED)
        released.set()
        await saving
        await checkpoints.save_changed()
        checkpoint = store.load_newest(AN_UID)
        assert checkpoint is not None
        assert_same(checkpoint.state, expert.export_state())

    play(scenario)


def test_a_rollback_that_changes_no_update_count_replaces_the_checkpoint_of_the_bad_state(
    play: Play, tmp_path: Path
) -> None:
    store = make_store(tmp_path)

    async def scenario(checkpoints: Checkpoints, expert: Expert) -> None:
        with torch.no_grad():
            next(expert.block.parameters()).mul_(1e6)
        await checkpoints.save_changed()
        with pytest.raises(ExpertError, match="are not finite"):
            expert.forward(Rows(torch.full((1, 8), torch.nan), torch.tensor([1]), torch.tensor([0])))
        assert (expert.guard.rollbacks, expert.update_count) == (1, 2)
        await checkpoints.save_changed()
        checkpoint = store.load_newest(AN_UID)
        assert checkpoint is not None
        assert_same(checkpoint.state, expert.export_state())

    play(scenario)


def full_disk(*arguments: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_costs_no_checkpoint_and_is_tried_again(
    play: Play, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, call: str
) -> None:
    store = make_store(tmp_path)

    async def scenario(checkpoints: Checkpoints, expert: Expert) -> None:
        with monkeypatch.context() as full:
            full.setattr(os, call, full_disk)
            await checkpoints.save_changed()
        assert (total(checkpoints.saved), total(checkpoints.failed)) == (1, 1)
        (line,) = warnings_in(caplog)
        assert "could not save 1 expert, such as 1.0.1" in line
        assert "No space left on device" in line
        assert os.listdir(store.path(AN_UID, 1).parent) == ["1.safetensors"]
        await checkpoints.save_changed()
        assert (total(checkpoints.saved), total(checkpoints.failed)) == (2, 1)

    play(scenario)
    assert store.newest() == {AN_UID: {"": 2}}


def test_a_folder_that_cannot_be_written_is_a_warning(
    play: Play, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(checkpoints: Checkpoints, expert: Expert) -> None:
        (tmp_path / SWARM).rename(tmp_path / "moved")
        (tmp_path / SWARM).write_text("a file in the folder's place")
        await checkpoints.open()
        assert await checkpoints.newest() == {}
        assert not await checkpoints.restore(make_expert())
        await checkpoints.save_changed()
        assert (total(checkpoints.saved), total(checkpoints.failed)) == (1, 1)

    play(scenario)
    assert "could not save 1 expert" in warnings_in(caplog)[0]


def test_an_expert_that_is_not_finite_never_takes_the_place_of_a_good_checkpoint(
    play: Play, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(checkpoints: Checkpoints, expert: Expert) -> None:
        with torch.no_grad():
            next(expert.block.parameters()).fill_(float("inf"))
        await checkpoints.save_changed()
        assert (total(checkpoints.saved), total(checkpoints.failed)) == (1, 1)

    play(scenario)
    assert make_store(tmp_path).newest() == {AN_UID: {"": 1}}
    assert "is not finite" in warnings_in(caplog)[0]


def test_experts_are_saved_although_the_gpu_of_another_has_failed(
    play: Play, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise torch.AcceleratorError(
            "CUDA error: an illegal memory access\nSearch for `cudaErrorIllegalAddress'"
        )

    async def scenario(checkpoints: Checkpoints, expert: Expert) -> None:
        lost = make_expert(1, OTHER_UID)
        monkeypatch.setattr(lost, "checkpoint", fail)
        await checkpoints.save_changed([lost, expert])
        assert (total(checkpoints.saved), total(checkpoints.failed)) == (2, 1)

    play(scenario)
    assert f"such as {OTHER_UID}: CUDA error: an illegal memory access; earlier" in warnings_in(caplog)[0]


def test_the_last_save_includes_the_update_that_is_being_computed(play: Play, tmp_path: Path) -> None:
    async def scenario(checkpoints: Checkpoints, expert: Expert) -> None:
        await checkpoints.save_changed()
        begun, released = threading.Event(), threading.Event()

        def work() -> None:
            begun.set()
            assert released.wait(60)
            step(expert)

        working = asyncio.create_task(checkpoints._runtime.run(work))
        await asyncio.to_thread(begun.wait, 60)
        saving = asyncio.create_task(checkpoints.save_all_within(60, [expert]))
        await asyncio.wait([saving], timeout=0.1)
        released.set()
        await asyncio.gather(working, saving)
        assert update_counts(make_store(tmp_path), AN_UID) == [3, 2]

    play(scenario)


def test_the_last_save_is_bounded_in_time(
    play: Play, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(checkpoints: Checkpoints, expert: Expert) -> None:
        released = threading.Event()
        monkeypatch.setattr(CheckpointStore, "save", lambda *_: released.wait(600))
        await checkpoints.save_all_within(0.1, [expert])
        released.set()

    play(scenario)
    assert "no time to save 1 expert" in warnings_in(caplog)[0]
