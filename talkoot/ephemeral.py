"""A peer with a temporary identity, for commands that only read a swarm: they can run while a node or a trainer
does.
"""

import asyncio
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TypeVar

from dht.admission import Role
from dht.invites import Invite, invite_of
from dht.swarm import Swarm, join_swarm
from peer.host import NetworkConfig
from peer.identity import Identity
from peer.loop import new_loop
from talkoot.signals import run_until_stopped
from talkoot.terminal import Terminal

T = TypeVar("T")


def run_in_swarm(
    terminal: Terminal,
    join: str | None,
    look: Callable[[Swarm], Awaitable[T]],
    roles: Sequence[Role] = (),
    first: str = "making ready",
) -> T:
    """Runs `look` while the peer is in the swarm, and returns its result.

    `join`: the invite, as it was given. `roles`: as for `join_swarm`. `first`: the first stage, in words. Raises
    UserError, and Stopped after a signal.
    """
    invite = invite_of(join)
    with (
        tempfile.TemporaryDirectory(prefix="talkoot-") as folder,
        asyncio.Runner(loop_factory=new_loop) as runner,
    ):
        identity = Identity.load_or_create(Path(folder) / "identity.key")
        return runner.run(run_until_stopped(_look(terminal, invite, identity, look, roles, first)))


async def _look(
    terminal: Terminal,
    invite: Invite,
    identity: Identity,
    look: Callable[[Swarm], Awaitable[T]],
    roles: Sequence[Role],
    first: str,
) -> T:
    with terminal.stages(first) as stage:
        config = NetworkConfig("127.0.0.1", serves_dht=False)
        swarm = await join_swarm(identity, invite, config, roles=roles, stage=stage)
    try:
        return await look(swarm)
    finally:
        await swarm.stop()
