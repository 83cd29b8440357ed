"""A real node whose disk is full, whose folder cannot be written, that is killed or frozen, or whose DHT holds foreign
records.
"""

import asyncio
import contextlib
import random
import resource
import signal
import time
import tomllib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from callers import a_caller, numbered_identities
from expert_fakes import Collected, Request, ask
from node_process import found_by_a_trainer, started
from raw_dht import store_raw
from real_swarm import LOCAL, MANIFEST, UIDS, Village, eventually
from victim import NodeVictim

from dht.announcements import NodeInfo
from dht.manifest import Manifest
from dht.records import SwarmKeys, sign_record
from dht.swarm import join_swarm
from dht.uid import UID
from expert_server.state.checkpoints import CheckpointStore
from peer.host import NetworkConfig
from peer.identity import Identity
from peer.loop import LoopThread
from peer.rpc.channels import ChannelPool
from peer.wire import records_pb2
from trainer_client.dispatch.batches import Direction
from trainer_client.dispatch.grpc_caller import GrpcCaller

HIDDEN, ROWS = 64, 5
AN_EXPERT = UID(0, (0,))
MANIFEST_TOML = f"""
name = "hardship"
preset = "none"
[model]
layers = 1
hidden = {HIDDEN}
heads = 2
context = 16
feed_forward = 64
[experts]
grid = [1]
[routing]
top_k = 1
"""
WELL_S, FROZEN_S = 60.0, 0.5
FULL_AT_BYTES = 50_000  # more than the log has, less than a checkpoint


@dataclass
class Trainer:
    """Calls the only expert of a node."""

    node: NodeInfo
    caller: GrpcCaller

    async def call(self, direction: Direction) -> Collected:
        rows = np.random.default_rng(0).standard_normal((ROWS, HIDDEN), dtype=np.float32)
        answer = await ask(
            self.caller, self.node, direction, Request(AN_EXPERT, [ROWS], range(ROWS), rows, rows)
        )
        assert not answer.errors, answer.errors
        assert np.isfinite(answer.tensor(AN_EXPERT)).all()
        return answer


@contextlib.asynccontextmanager
async def training(node: NodeVictim, folder: Path) -> AsyncIterator[Trainer]:
    async with found_by_a_trainer(node, folder) as (info, _, swarm_id):
        channels = ChannelPool()
        try:
            yield Trainer(info, GrpcCaller(channels, swarm_id, HIDDEN, sessions=a_caller(swarm_id)))
        finally:
            await channels.close()


async def reaches(node: NodeVictim, name: str, least: float) -> None:
    async def reached() -> bool:
        return await asyncio.to_thread(node.metric, name) >= least

    await eventually(reached)


def saved(node: NodeVictim, folder: Path) -> int:
    """The update count of the newest valid checkpoint, which the next start would load."""
    (path,) = (folder / "state" / "checkpoints").iterdir()
    manifest = Manifest.model_validate(tomllib.loads(MANIFEST_TOML))
    checkpoint = CheckpointStore(path.parent, path.name, manifest, 2).load_newest(AN_EXPERT)
    return checkpoint.update_count if checkpoint else 0


def test_a_disk_that_is_full_and_a_kill_lose_nothing_that_was_saved(loop: LoopThread, tmp_path: Path) -> None:
    async def until_the_disk_is_full(node: NodeVictim) -> int:
        async with training(node, tmp_path) as trainer:
            await trainer.call("backward")
            await reaches(node, "talkoot_checkpoints_saved_total", 1)
            pid = node.process.pid
            limits = resource.prlimit(pid, resource.RLIMIT_FSIZE, (FULL_AT_BYTES, resource.RLIM_INFINITY))
            await trainer.call("backward")
            await reaches(node, "talkoot_checkpoint_failures_total", 2)
            await trainer.call("forward")
            assert saved(node, tmp_path) == 1
            resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)
            await reaches(node, "talkoot_checkpoints_saved_total", 2)
            assert saved(node, tmp_path) == 2
            answer = await trainer.call("backward")
            node.process.send_signal(signal.SIGKILL)  # the third may be on its way to the disk
            return 2 if answer.answered else 0

    async def what_is_left(node: NodeVictim) -> None:
        assert "continue from this node's checkpoints" in node.log.read_text()
        async with training(node, tmp_path) as trainer:
            await trainer.call("backward")
            await reaches(node, "talkoot_updates_total", 1)

    with started(tmp_path, MANIFEST_TOML, experts=1, threads=1, checkpoint_every_s=0.2) as node:
        least = loop.run(until_the_disk_is_full(node), 120)
        node.process.wait(60)
        kept = saved(node, tmp_path)
        assert kept in (least, least + 1)
    with started(tmp_path, MANIFEST_TOML, experts=1, threads=1, checkpoint_every_s=0) as node:
        loop.run(what_is_left(node), 120)
        node.process.terminate()
        node.process.wait(60)
        assert saved(node, tmp_path) == kept + 1  # saved when it stopped politely


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_node_that_is_killed_at_any_moment_goes_on_from_its_newest_whole_checkpoint(
    loop: LoopThread, tmp_path: Path
) -> None:
    """The test of the checkpoint store kills 20 writers each time it runs. Here, whole nodes are killed."""
    rng = random.Random(4)

    async def train_on(node: NodeVictim, newest: int) -> None:
        async with training(node, tmp_path) as trainer:
            await trainer.call("backward")
            await reaches(node, "talkoot_checkpoints_saved_total", 1)
            assert saved(node, tmp_path) == newest + 1
            ends = time.monotonic() + rng.uniform(0, 0.5)  # the random moment
            while time.monotonic() < ends:
                await trainer.call("backward")
            node.process.send_signal(signal.SIGKILL)

    newest = 0
    for _ in range(20):
        with started(tmp_path, MANIFEST_TOML, experts=1, threads=1, checkpoint_every_s=0.01) as node:
            loop.run(train_on(node, newest), 120)
            node.process.wait(60)
        newest = saved(node, tmp_path)
    assert newest > 20


def test_a_node_starts_and_serves_where_the_disk_is_full_and_keeps_its_checkpoints(
    loop: LoopThread, tmp_path: Path
) -> None:
    full = tmp_path / "full"

    async def train(node: NodeVictim) -> None:
        async with training(node, tmp_path) as trainer:
            await trainer.call("backward")

    async def scenario(node: NodeVictim) -> None:
        async with training(node, tmp_path) as trainer:
            await trainer.call("backward")
            await reaches(node, "talkoot_checkpoint_failures_total", 2)
            await trainer.call("forward")
            assert saved(node, tmp_path) == 1
            full.unlink()
            await reaches(node, "talkoot_checkpoints_saved_total", 1)
            assert saved(node, tmp_path) == 2

    with started(tmp_path, MANIFEST_TOML, experts=1, threads=1, checkpoint_every_s=0) as node:
        loop.run(train(node), 120)
    assert saved(node, tmp_path) == 1
    full.touch()
    with started(tmp_path, MANIFEST_TOML, experts=1, threads=1, checkpoint_every_s=0.2) as node:
        assert "continue from this node's checkpoints" in node.log.read_text()
        assert "checkpoints of 1 expert may take" in node.log.read_text()
        loop.run(scenario(node), 120)
        assert "could not save 1 expert, such as 0.0: No space left on device" in node.log.read_text()


def test_a_frozen_node_answers_no_health_check_until_it_thaws(loop: LoopThread, tmp_path: Path) -> None:
    async def scenario(node: NodeVictim) -> None:
        async with training(node, tmp_path) as trainer:
            await trainer.call("backward")
            assert await trainer.caller.responds(trainer.node, WELL_S)
            node.process.send_signal(signal.SIGSTOP)
            try:
                assert not await trainer.caller.responds(trainer.node, FROZEN_S)
            finally:
                node.process.send_signal(signal.SIGCONT)
            assert await trainer.caller.responds(trainer.node, WELL_S)
            await trainer.call("backward")

    with started(tmp_path, MANIFEST_TOML, experts=1, threads=1) as node:
        loop.run(scenario(node), 120)


def test_a_state_folder_that_cannot_be_written_costs_no_call(loop: LoopThread, tmp_path: Path) -> None:
    """There is a file in the folder's place, since permissions do not stop root."""
    (tmp_path / "state").mkdir(mode=0o700)
    (tmp_path / "state" / "checkpoints").write_text("in the way")

    async def scenario(node: NodeVictim) -> None:
        async with training(node, tmp_path) as trainer:
            await trainer.call("backward")
            await reaches(node, "talkoot_checkpoint_failures_total", 2)
            await trainer.call("backward")
            await trainer.call("forward")
            assert await asyncio.to_thread(node.metric, "talkoot_updates_total") == 2

    with started(tmp_path, MANIFEST_TOML, experts=1, threads=1, checkpoint_every_s=0.2) as node:
        loop.run(scenario(node), 120)
        assert "could not save 1 expert, such as 0.0: " in node.log.read_text()


@pytest.fixture(scope="module")
def identities() -> list[Identity]:
    return numbered_identities(2)


def test_another_swarms_records_are_not_taken_for_this_swarms(
    loop: LoopThread, identities: list[Identity], tmp_path: Path
) -> None:
    async def scenario() -> None:
        async with contextlib.AsyncExitStack() as stack:
            village = Village(identities, stack, tmp_path)
            node = await village.found(experts=len(UIDS))
            stranger = await join_swarm(identities[1], await node.swarm.invite(), NetworkConfig(LOCAL))
            stack.push_async_callback(stranger.stop)
            here = node.swarm.keys.prefix(UIDS[0].layer)
            there = SwarmKeys(MANIFEST.name, identities[1].peer_id).prefix(UIDS[0].layer)
            until = time.time() + 60
            announced = records_pb2.Announcement(
                state=records_pb2.REPLICA_STATE_SERVING, update_count=99, following=UIDS[0].coordinate
            )
            foreign = sign_record(
                identities[1],
                records_pb2.RecordPayload(key=there, expires_at=until, hosting={"replicas": [announced]}),
            )
            subkey = identities[1].peer_id.to_bytes()
            for key in (there, here):
                assert not await store_raw(stranger.host, key, subkey, foreign, until)
            (replicas,) = (await node.swarm.experts.replicas([UIDS[0]])).values()
            assert [(r.peer_id, r.update_count) for r in replicas] == [(node.swarm.host.peer_id, 0)]

    loop.run(scenario(), 120)
