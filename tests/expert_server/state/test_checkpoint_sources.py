"""States from other peers do not push what this node trained off the disk, nor states from yet another peer."""

import errno
import os
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_samples import (
    AN_UID,
    assert_same,
    explode,
    make_expert,
    make_store,
    save,
    step,
    update_counts,
    warnings_in,
)

from expert_server.experts.format import AVERAGED, Checkpoint
from expert_server.experts.guard import CHECK_EVERY_UPDATES, PROBATION_UPDATES
from expert_server.serving.runtime import Runtime
from expert_server.state.checkpoints import MAX_SOURCES, Checkpoints, CheckpointStore
from peer.errors import StateError
from peer.loop import LoopThread
from peer.metrics import total

HOST, OTHER = "QmHost", "QmStranger"
PEERS = ["QmA", "QmB", "QmC", "QmD", "QmE"]


def given(source: str, update_count: int, steps: int = 3) -> Checkpoint:
    """A state from another peer with this update count, after which the expert took `steps` steps."""
    return replace(make_expert(steps).checkpoint(), update_count=update_count, source=source)


def test_the_last_state_of_each_source_is_kept_whatever_others_claim(tmp_path: Path) -> None:
    store, expert = make_store(tmp_path, keep=2), make_expert()
    for _ in range(3):
        save(store, step(expert))
    for update_count in (100, 5000, 900_000):
        store.save(AN_UID, given(HOST, update_count))
    store.save(AN_UID, given(OTHER, 10**14))
    store.save(AN_UID, given(AVERAGED, 7))
    assert store.newest() == {AN_UID: {"": 3, HOST: 900_000, OTHER: 10**14, AVERAGED: 7}}
    assert update_counts(store, AN_UID) == [10**14, 900_000, 7, 3, 2]
    newest = make_store(tmp_path).load_newest(AN_UID)
    assert newest is not None
    assert (newest.source, newest.update_count) == (OTHER, 10**14)


@pytest.mark.parametrize(("own", "stays"), [(None, False), ("", True), (AVERAGED, True)])
def test_copies_are_dropped_unless_this_node_has_a_state_of_its_own(
    tmp_path: Path, own: str | None, stays: bool
) -> None:
    store = make_store(tmp_path)
    for source in (HOST, OTHER, *(() if own is None else (own,))):
        store.save(AN_UID, given(source, 5))
    before = store.newest()
    store.drop(AN_UID)
    assert store.newest() == (before if stays else {})
    store.drop(AN_UID)  # twice does no harm


def test_a_source_whose_claims_fall_has_one_state_too(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    for update_count in (50, 40, 30):
        store.save(AN_UID, given(HOST, update_count))
    assert update_counts(store, AN_UID) == [30]


def test_a_flood_of_sources_costs_none_that_may_be_needed(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    for number, peer in enumerate(PEERS[:MAX_SOURCES]):
        store.save(AN_UID, given(peer, 10 + number))
    before = store.newest()
    with pytest.raises(StateError, match="and may be needed"):
        store.save(AN_UID, given(PEERS[-1], 10**9))
    assert store.newest() == before
    store.save(AN_UID, given(PEERS[0], 500))  # one that is known may go on
    save(store, step(make_expert(), 12))
    store.save(AN_UID, given(PEERS[-1], 600))
    assert store.newest()[AN_UID].keys() == {"", *PEERS} - {PEERS[1]}, (
        "what was trained here is newer than that"
    )


def test_old_states_of_others_give_way(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    for number, peer in enumerate(PEERS[:MAX_SOURCES]):
        store.save(AN_UID, given(peer, 10 + number))
    os.utime(store.path(AN_UID, 12, PEERS[2]), (0, 1000.5 - 8 * 86400))
    store.save(AN_UID, given(PEERS[-1], 1))
    assert store.newest()[AN_UID].keys() == {*PEERS} - {PEERS[2]}
    assert not store.path(AN_UID, 12, PEERS[2]).parent.exists()


def test_states_of_others_do_not_give_way_to_one_that_the_disk_has_no_room_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(tmp_path)
    for number, peer in enumerate(PEERS[:MAX_SOURCES]):
        store.save(AN_UID, given(peer, 10 + number))
    save(store, step(make_expert(), 12))
    before = store.newest()

    def no_room(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("peer.checkpoints.write_atomically", no_room)
    with pytest.raises(OSError, match="No space left"):
        store.save(AN_UID, given(PEERS[-1], 600))
    assert store.newest() == before


def test_what_killed_writers_left_of_other_sources_is_swept(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    store.save(AN_UID, given(HOST, 5))
    folder = store.path(AN_UID, 5, HOST).parent
    (folder / ".6.safetensors.new").write_bytes(b"half")
    store.sweep()
    assert os.listdir(folder) == ["5.safetensors"]


Scenario = Callable[[Checkpoints, CheckpointStore, Runtime], Coroutine[Any, Any, None]]


@pytest.fixture
def play(loop: LoopThread, tmp_path: Path) -> Callable[[Scenario], None]:
    def run(scenario: Scenario) -> None:
        async def with_runtime() -> None:
            runtime = Runtime({}, max_queued_rows=100, max_batch_rows=100, threads=1)
            try:
                store = make_store(tmp_path)
                await scenario(Checkpoints(store, runtime), store, runtime)
            finally:
                await runtime.stop()

        loop.run(with_runtime(), 120)

    return run


Play = Callable[[Scenario], None]


def test_an_expert_is_saved_under_its_source_until_it_is_proven(play: Play) -> None:
    async def scenario(checkpoints: Checkpoints, store: CheckpointStore, runtime: Runtime) -> None:
        expert = make_expert(5)
        runtime.add(expert)
        await checkpoints.save_changed()
        expert.import_state(make_expert(3).export_state(), 1000, OTHER)
        await checkpoints.save_changed()
        assert store.newest() == {AN_UID: {"": 5, OTHER: 1000}}
        step(expert, PROBATION_UPDATES + CHECK_EVERY_UPDATES)
        await checkpoints.save_changed()
        assert store.newest() == {AN_UID: {"": 1108, OTHER: 1000}}

    play(scenario)


def test_what_another_gave_returns_to_the_own_checkpoint_if_it_turns_bad_after_a_restart(play: Play) -> None:
    async def scenario(checkpoints: Checkpoints, store: CheckpointStore, runtime: Runtime) -> None:
        own = make_expert(5)
        save(store, own)
        store.save(AN_UID, given(OTHER, 1000))
        expert = make_expert()
        assert await checkpoints.restore(expert)
        assert (expert.update_count, expert.source) == (1000, OTHER)
        explode(expert)
        assert expert.update_count == 5
        torch.testing.assert_close(expert.export_state(), own.export_state(), rtol=2**-8, atol=0)

    play(scenario)


def test_the_true_copy_takes_the_place_of_one_that_turned_bad(
    play: Play, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(checkpoints: Checkpoints, store: CheckpointStore, runtime: Runtime) -> None:
        true = make_expert(9)
        store.save(AN_UID, replace(true.checkpoint(), update_count=800, source=HOST))
        store.save(AN_UID, given(OTHER, 1000))
        expert = make_expert()
        assert await checkpoints.restore(expert)
        runtime.add(expert)
        explode(expert)
        assert expert.update_count == 0
        await checkpoints.save_changed()
        assert (expert.update_count, expert.source) == (800, HOST)
        assert total(checkpoints.refuted) == 1
        assert_same(expert.export_state(), true.export_state())
        assert store.newest() == {AN_UID: {HOST: 800, OTHER: 1000}}, "nothing is lost"
        again = make_expert()
        assert await checkpoints.restore(again)
        assert again.source == HOST, "the other one is not believed again"

    play(scenario)
    assert any(f"turned bad with the state of {OTHER}" in line for line in warnings_in(caplog))


def test_what_was_trained_here_is_saved_before_another_copy_takes_its_place(play: Play) -> None:
    async def scenario(checkpoints: Checkpoints, store: CheckpointStore, runtime: Runtime) -> None:
        store.save(AN_UID, given(HOST, 800))
        expert = make_expert(8)
        own = expert.export_state()
        runtime.add(expert)
        expert.import_state(make_expert(3).export_state(), 1000, OTHER)
        explode(expert)
        assert expert.update_count == 8
        await checkpoints.save_changed()
        assert (expert.update_count, expert.source) == (800, HOST)
        assert store.newest() == {AN_UID: {"": 8, HOST: 800}}
        saved = store.load_newest(AN_UID, (entry for entry in store.entries(AN_UID) if not entry.source))
        assert saved is not None
        torch.testing.assert_close(saved.state, own, rtol=2**-8, atol=0)

    play(scenario)


def test_garbage_on_disk_is_passed_over_for_the_true_copy(
    play: Play, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(checkpoints: Checkpoints, store: CheckpointStore, runtime: Runtime) -> None:
        true = make_expert(9)
        store.save(AN_UID, replace(true.checkpoint(), update_count=800, source=HOST))
        garbage = given(OTHER, 10**9)
        huge = {name: torch.full_like(tensor, 1e30) for name, tensor in garbage.state.items()}
        store.save(AN_UID, replace(garbage, state=huge))
        expert = make_expert()
        assert await checkpoints.restore(expert)
        assert (expert.update_count, expert.source) == (800, HOST)
        assert_same(expert.export_state(), true.export_state())

    play(scenario)
    (line,) = warnings_in(caplog)
    assert "far larger than training can make it" in line


def test_an_average_that_turned_bad_leaves_nothing_that_a_restart_would_take(play: Play) -> None:
    async def scenario(checkpoints: Checkpoints, store: CheckpointStore, runtime: Runtime) -> None:
        expert = make_expert(5)
        runtime.add(expert)
        expert.import_state(make_expert(3).export_state(), 1000, AVERAGED)
        await checkpoints.save_changed()
        assert store.newest() == {AN_UID: {AVERAGED: 1000}}
        explode(expert)
        await checkpoints.save_changed()
        assert store.newest() == {AN_UID: {"": 5}}

    play(scenario)
