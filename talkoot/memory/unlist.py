"""`talkoot memory unlist NAME`: takes a memory off its publisher's list, so that its hosts remove it."""

import asyncio
from pathlib import Path

from dht.library import MemoryRegistry
from expert_server.settings import NodeSettings
from peer.errors import LibraryError
from peer.formatting import printable
from peer.loop import new_loop
from talkoot.memory.publishers import Publisher, publisher_of
from talkoot.node.launch import listen_address
from talkoot.signals import run_until_stopped
from talkoot.terminal import Terminal


def run_unlist(
    terminal: Terminal, name: str, join: str | None, state: Path | None, settings: NodeSettings
) -> None:
    """Raises UserError."""
    with publisher_of(join, state) as publisher, asyncio.Runner(loop_factory=new_loop) as runner:
        host = listen_address(settings, publisher.invite.bootstrap)
        runner.run(run_until_stopped(_unlist(terminal, publisher, name, settings, host)))


async def _unlist(
    terminal: Terminal, publisher: Publisher, name: str, settings: NodeSettings, host: str
) -> None:
    with terminal.stages("making ready") as stage:
        async with publisher.joined(settings, host, stage) as swarm:
            memories = MemoryRegistry(swarm.registry)
            listed = (await memories.libraries()).get(publisher.signer.peer_id, ())
            gone = next((each for each in listed if name in (each.memory.name, str(each.memory))), None)
            if gone is None:
                names = ", ".join(sorted(each.memory.name for each in listed)) or "none"
                raise LibraryError(
                    f"you publish no memory {printable(name, 40)!r} in swarm {swarm.keys.name!r}. The memories that "
                    "you publish: "
                    f"{names}"
                )
            stage("publishing the list without it")
            left = [each for each in listed if each != gone]
            await memories.publish_library(left, publisher.signer_beside(swarm))
    if terminal.json:
        terminal.event("unlisted", {"memory": str(gone.memory)})
    else:
        terminal.line(
            f"{gone.memory} is not listed any more. Nodes remove it in their next announcement period, and when they "
            "come back; `talkoot memory publish` lists it again"
        )
