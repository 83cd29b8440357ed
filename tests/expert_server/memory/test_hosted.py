"""What a node finds of memories on its disk when it starts."""

import asyncio
import errno
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, cast

import pytest
from memory_folders import SampleMemory

from dht.library import MemoryRegistry
from dht.memory import MemoryID
from dht.upkeep import UpkeepPeriod
from expert_server.memory.hosted import HostedMemories
from expert_server.memory.store import MemoryStore
from peer.identity import Identity
from peer.loop import LoopThread

MEMORY = SampleMemory.make()


class NoRegistry:
    """Stands for the memories in the DHT."""

    def restore(self, data: bytes) -> None:
        pass


Scenario = Callable[[HostedMemories, MemoryStore], Coroutine[Any, Any, None]]


@pytest.fixture
def play(loop: LoopThread, identity: Identity, tmp_path: Path) -> Callable[[Scenario], None]:
    """Runs a scenario on a node that has just started, with a memory on its disk."""

    def run(scenario: Scenario) -> None:
        async def started() -> None:
            memory = MemoryID.of(MEMORY.manifest.name, identity.peer_id)
            MEMORY.write(tmp_path / str(memory))
            registry = cast(MemoryRegistry, NoRegistry())
            hosted = HostedMemories(
                tmp_path, 10**9, registry, UpkeepPeriod(60.0, lambda: 0.0), lambda memory: None
            )
            await hosted.open()
            await scenario(hosted, hosted.stores[memory])

        loop.run(started(), 60)

    return run


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EMFILE])
def test_a_shard_that_can_not_be_loaded_now_stays_on_disk(
    play: Callable[[Scenario], None], monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def fail(*_: object) -> None:
        raise OSError(code, "not now")

    async def scenario(hosted: HostedMemories, store: MemoryStore) -> None:
        root = MEMORY.roots[2]
        if code == errno.ENOSPC:  # the node was killed before it removed a revoked passage
            (store.folder / "manifest").write_bytes(MEMORY.revoking((root, 7)).manifest.serialize())
            await hosted.open()
            (store,) = hosted.stores.values()
            monkeypatch.setattr("expert_server.memory.store.write_atomically", fail)
        else:
            monkeypatch.setattr("expert_server.memory.store._read", fail)
        await hosted.verify()
        assert store.shards.keys() == ({*MEMORY.roots} - {root} if code == errno.ENOSPC else set())
        assert store.roots() == MEMORY.roots
        monkeypatch.undo()
        await hosted.open()  # as at the next start
        await hosted.verify()
        assert [store.shards.keys() for store in hosted.stores.values()] == [{*MEMORY.roots}]

    play(scenario)


def test_a_verification_that_is_cut_off_leaves_out_no_shard(play: Callable[[Scenario], None]) -> None:
    async def scenario(hosted: HostedMemories, store: MemoryStore) -> None:
        async with hosted._writing:
            verifying = asyncio.create_task(hosted.verify())
            await asyncio.sleep(0)
            verifying.cancel()
            await asyncio.wait([verifying])
        await hosted.verify()
        assert store.shards.keys() == {*MEMORY.roots}
        assert not hosted.unverified

    play(scenario)
