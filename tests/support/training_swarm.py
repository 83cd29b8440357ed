"""A founder's node and the trainer's commands in one process: what users type, without starting an interpreter."""

import asyncio
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from types import MappingProxyType
from typing import Any

from memory_samples import SampleMemory
from published_memories import list_memories, until_hosted
from typer.main import get_command

from dht.manifest import Manifest
from dht.memory import MemoryID
from dht.swarm import found_swarm
from expert_server.node import Node
from expert_server.settings import NodeSettings
from peer.host import NetworkConfig
from peer.identity import Identity
from peer.loop import LoopThread
from peer.platform.signals import stop_signals
from talkoot.cli import app

HOST = "127.0.0.1"
MANIFEST = Manifest.model_validate(
    {
        "name": "village",
        "preset": "transformer",
        "model": {
            "layers": 2,
            "hidden": 16,
            "heads": 2,
            "context": 16,
            "feed_forward": 8,
            "local": "attention",
        },
        "experts": {"grid": [2, 2], "width": 8},
        "routing": {"top_k": 2},
    }
)
TEXT = "In the sauna one must behave as in church. " * 60


@dataclass(frozen=True)
class Ended:
    """How a command ended, and what it printed."""

    status: int
    out: str
    err: str

    def is_one_clear_line(self, *said: str) -> None:
        errors = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert self.status == 2, self.err
        assert len(errors) == 1, self.err
        assert self.err.endswith(errors[0] + "\n")
        assert "Traceback" not in self.err
        for part in said:
            assert part in errors[0]


@contextmanager
def signals_restored() -> Iterator[None]:
    """A command changes the signal handlers of its process. This puts back pytest's."""
    numbers = [*stop_signals(), signal.SIGALRM]
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def talkoot(*arguments: object) -> Ended:
    """Runs a command in this process."""
    with signals_restored(), redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        status = get_command(app).main([str(argument) for argument in arguments], standalone_mode=False)
    return Ended(status or 0, out.getvalue(), err.getvalue())


@dataclass(frozen=True)
class Founder:
    node: Node
    invite: str
    loop: LoopThread

    def pause(self) -> None:
        """Takes all experts of the swarm away."""
        self.loop.run(self.node.pause(), 120)

    def resume(self) -> None:
        self.loop.run(self.node.resume(), 120)


def node_settings(experts: int, **changes: Any) -> NodeSettings:
    alone = {"replicas": 1, "average_every_s": 0, "drain_timeout_s": 0}
    return NodeSettings.load(**{"threads": 1, "experts": experts, "announce_every_s": 5, **alone, **changes})


@contextmanager
def founded(
    loop: LoopThread,
    folder: Path,
    experts: int,
    name: str = "village",
    parts: Mapping[str, Any] = MappingProxyType({}),
    memories: Sequence[SampleMemory] = (),
    **changes: Any,
) -> Iterator[Founder]:
    """`parts`: replace the usual ones in the manifest. `memories`: the node publishes these, and hosts them whole.
    `changes`: changes to the node's settings.
    """
    identity = Identity.load_or_create(folder / "founder.key")
    for memory in memories:
        memory.write(folder / "founder" / "memory" / str(MemoryID.of(memory.manifest.name, identity.peer_id)))
    if memories:
        changes = {"memory_disk": "100MB", **changes}

    async def start() -> tuple[Node, str]:
        manifest = MANIFEST.model_copy(update={"name": name, **parts})
        swarm = await found_swarm(identity, manifest, NetworkConfig(HOST))
        settings = node_settings(experts, **changes)
        node = await Node.start(settings, swarm, host=HOST, state=folder / "founder")
        if memories:
            await list_memories(node, *memories)
        return node, str(await node.swarm.invite())

    node, invite = loop.run(start(), 120)
    running = loop.submit(node.run())
    loop.run(asyncio.sleep(0), 120)  # it has begun; a coroutine that never begins is reported
    try:
        for memory in memories:
            memory_id = MemoryID.of(memory.manifest.name, identity.peer_id)
            loop.run(until_hosted(node.swarm, memory_id, 1, memory), 120)
        yield Founder(node, invite, loop)
    finally:
        running.cancel()
        loop.run(node.stop(), 120)
