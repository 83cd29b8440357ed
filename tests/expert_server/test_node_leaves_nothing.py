"""Nodes start and stop again and again, and leave nothing behind."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import pytest
from callers import numbered_identities
from real_swarm import (
    LOCAL,
    MANIFEST,
    children,
    eventually,
    node_settings,
)

from dht.swarm import found_swarm
from expert_server.node import Node
from expert_server.status import NodeState
from peer.host import NetworkConfig
from peer.identity import Identity
from peer.loop import LoopThread
from peer.platform.processes import die_with_parent
from peer.transport.libp2p import Libp2p


@pytest.fixture(scope="module")
def identities() -> list[Identity]:
    return numbered_identities(4)


@pytest.fixture
def sockets(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], list[Path]]]:
    """A function that lists the socket files that hosts of this test have made and not removed."""
    used: list[Path] = []

    def note_socket(arguments: Sequence[str]) -> list[str]:
        (listen,) = [a for a in arguments if a.startswith("-listen=/unix")]
        used.append(Path(listen.removeprefix("-listen=/unix")).parent)
        return die_with_parent(arguments)

    monkeypatch.setattr("peer.transport.p2pd.die_with_parent", note_socket)
    yield lambda: [path for folder in used for path in (folder, *folder.glob("*")) if path.exists()]
    assert used, "no host was started"


_WAKE_UPS = 2
"""File descriptors with which gRPC wakes its threads. It sometimes makes another one and keeps it. A leak in each boot
would be seven.
"""


@dataclass(frozen=True)
class Held:
    """The number of each thing that may leak, in this process."""

    children: int
    descriptors: int
    threads: int
    tasks: int


def held(loop: LoopThread, others: Set[int]) -> Held:
    """`others`: children that other tests have started."""
    return Held(
        len(children() - others),
        int(psutil.Process().num_fds()),
        threading.active_count(),
        len(asyncio.all_tasks(loop.loop)),
    )


async def start_all_of_the_pool() -> None:
    """Starts all threads of the loop's pool: it adds one whenever all are busy. They stay, and would be counted."""
    await asyncio.gather(*(asyncio.to_thread(time.sleep, 0.01) for _ in range(64)))


async def runs(p2pd: Libp2p) -> bool:
    return p2pd.alive


@pytest.mark.parametrize("boots", [7, pytest.param(50, marks=pytest.mark.slow)])
def test_boots_and_stops_leave_nothing(
    loop: LoopThread,
    identities: list[Identity],
    sockets: Callable[[], list[Path]],
    tmp_path: Path,
    boots: int,
) -> None:
    manifest = MANIFEST.model_copy(update={"model": MANIFEST.model.model_copy(update={"layers": 1})})

    async def boot_and_stop(waits_for_p2pd: bool) -> None:
        """`waits_for_p2pd`: otherwise p2pd is still starting when the node stops."""
        swarm = await found_swarm(identities[0], manifest, NetworkConfig(LOCAL, p2pd=True))
        node = await Node.start(node_settings(experts=2), swarm, host=LOCAL, state=tmp_path)
        try:
            assert len(node.runtime.experts) == 2
            if waits_for_p2pd:
                await eventually(partial(runs, swarm.host._libp2p))
            assert node.status().state is NodeState.SERVING
        finally:
            await node.stop()

    others = children()
    loop.run(start_all_of_the_pool(), 60)
    for boot in range(boots):
        loop.run(boot_and_stop(waits_for_p2pd=boot % 2 == 0), 120)
        assert sockets() == []
        if boot == 4:
            after_five = held(loop, others)
    assert after_five.children == 0
    deadline = time.monotonic() + 60
    while held(loop, others) != after_five and time.monotonic() < deadline:
        time.sleep(0.05)  # the last boot's descriptors and threads end a moment later
    now = held(loop, others)
    assert now.children == 0
    assert now.descriptors <= after_five.descriptors + _WAKE_UPS
    assert now.threads <= after_five.threads
    assert now.tasks <= after_five.tasks
