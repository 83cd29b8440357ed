"""Several nodes of a real swarm on one loop, for tests."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from dht.announcements import ReplicaState
from dht.invites import Invite
from dht.manifest import Manifest
from dht.swarm import Swarm, found_swarm, join_swarm
from dht.uid import UID
from expert_server.experts.expert import Expert
from expert_server.experts.format import State
from expert_server.experts.graphs import Rows
from expert_server.node import Node, NodeTiming
from expert_server.settings import NodeSettings
from peer.errors import UnreachableError
from peer.host import NetworkConfig
from peer.identity import Identity
from peer.loop import LoopThread

LOCAL = "127.0.0.1"
DEADLINE_S = 120.0
"""The deadline for things that happen soon, on a machine that may be busy."""
_PLAY_S = 240.0
MANIFEST = Manifest.model_validate(
    {
        "name": "sauna",
        "model": {"layers": 2, "hidden": 8, "heads": 2, "context": 8, "feed_forward": 8},
        "experts": {"grid": [2, 2]},
        "routing": {"top_k": 2},
    }
)
UIDS = MANIFEST.uids()
QUICK = NodeTiming(claim_wait_s=0.1)

Scenario = Callable[["Village"], Coroutine[Any, Any, None]]
Play = Callable[[Scenario], None]


@dataclass
class Village:
    """Creates peers, and stops those that a test leaves running."""

    identities: list[Identity]
    stack: contextlib.AsyncExitStack
    folder: Path

    async def found(
        self, *, manifest: Manifest = MANIFEST, timing: NodeTiming = QUICK, **settings: Any
    ) -> Node:
        config = NetworkConfig(LOCAL, port=settings.get("port", 0), upload_mbit=settings.get("upload_mbit"))
        swarm = await found_swarm(self.identities[0], manifest, config)
        return await self.start(swarm, settings, timing)

    async def join(self, number: int, invite: Invite, **settings: Any) -> Node:
        return await self.start(
            await join_swarm(self.identities[number], invite, NetworkConfig(LOCAL)), settings
        )

    async def observe(self, number: int, invite: Invite) -> Swarm:
        """Adds a peer that hosts nothing, and sees what trainers see."""
        swarm = await join_swarm(self.identities[number], invite, NetworkConfig(LOCAL, serves_dht=False))
        self.stack.push_async_callback(swarm.stop)
        return swarm

    async def run(self, node: Node) -> "asyncio.Task[None]":
        """Lets the node announce and adopt, until the test ends or the task is cancelled."""
        task = asyncio.create_task(node.run())
        self.stack.push_async_callback(end, task)
        return task

    def state(self, swarm: Swarm) -> Path:
        """The state folder of a peer, which is the same when the peer comes back."""
        name: str = swarm.host.peer_id.to_base58()
        return self.folder / name

    async def start(self, swarm: Swarm, settings: dict[str, Any], timing: NodeTiming = QUICK) -> Node:
        node = await Node.start(
            node_settings(**settings), swarm, host=LOCAL, state=self.state(swarm), timing=timing
        )
        self.stack.push_async_callback(node.stop)
        return node


def playing(loop: LoopThread, identities: list[Identity], folder: Path) -> Play:
    """Yields a function that runs a scenario in a village of its own, which is stopped afterwards."""

    def play(scenario: Scenario) -> None:
        async def with_village() -> None:
            async with contextlib.AsyncExitStack() as stack:
                await scenario(Village(identities, stack, folder))

        loop.run(with_village(), _PLAY_S)

    return play


async def end(task: "asyncio.Task[None]") -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def node_settings(**changes: Any) -> NodeSettings:
    """Settings with one replica of each expert and no handing over, unless a test asks for them."""
    alone = {"replicas": 1, "average_every_s": 0, "drain_timeout_s": 0}
    return NodeSettings.load(**{"threads": 1, **alone, **changes})


async def eventually(check: Callable[[], Awaitable[bool]]) -> None:
    """Waits until the check succeeds. On a busy machine no peer may answer in time, so that is not a failure."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            with contextlib.suppress(UnreachableError):
                if await check():
                    return
            await asyncio.sleep(0.1)


async def serving(swarm: Swarm) -> Counter[UID]:
    """How many nodes serve each expert, as read from the DHT."""
    found = await swarm.experts.replicas(UIDS)
    return Counter(
        {
            uid: sum(replica.state is ReplicaState.SERVING for replica in hosts)
            for uid, hosts in found.items()
            if hosts
        }
    )


async def hosts_of(swarm: Swarm) -> set[Any]:
    return {replica.peer_id for hosts in (await swarm.experts.replicas(UIDS)).values() for replica in hosts}


ONCE_EACH = Counter(UIDS)


def children() -> set[int]:
    """The process ids of all processes that this one has started."""
    return {child.pid for child in psutil.Process().children(recursive=True)}


def step(expert: Expert) -> None:
    """Takes an optimizer step that depends only on the expert and its update count."""
    generator = torch.Generator().manual_seed(expert.update_count)
    inputs, gradients = torch.randn(2, 5, 8, generator=generator).unbind()
    expert.backward([Rows(inputs, torch.tensor([5]), torch.arange(5), gradients)])


async def train(node: Node, updates: Mapping[UID, int]) -> dict[UID, State]:
    """Takes this many updates with each expert. Returns their states."""
    states = {}
    for uid, count in updates.items():
        expert = node.runtime.experts[uid]
        for _ in range(count):
            await node.runtime.run(lambda expert=expert: step(expert))  # type: ignore[misc]  # a default binds now
        states[uid] = await node.runtime.run(expert.export_state)
    return states
