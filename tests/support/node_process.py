"""A real `talkoot node` in a process of its own, for tests."""

import contextlib
import os
import re
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from preloaded import Preloaded
from real_swarm import LOCAL
from victim import NodeVictim

from dht.announcements import NodeInfo
from dht.invites import Invite
from dht.manifest import Manifest
from dht.swarm import join_swarm
from expert_server.node import NodeTiming
from peer.host import NetworkConfig
from peer.identity import Identity

_MAIN = """
import errno, os, shutil
from functools import partial
from types import SimpleNamespace
from peer import files
from talkoot import options
from talkoot.cli import main
set_up_logging = options.set_up_logging
def set_up_and_patch(*arguments):
    set_up_logging(*arguments)  # first: it says how loud gRPC is, which gRPC reads when it is imported
    from expert_server.node import Node, NodeTiming
    Node.start = partial(Node.start, timing={timing})
    open_new = files._open_new
    def open_unless_full(*arguments):
        if os.path.exists({full!r}):
            raise OSError(errno.ENOSPC, "No space left on device")
        return open_new(*arguments)
    files._open_new = open_unless_full
    usage = shutil.disk_usage
    shutil.disk_usage = lambda path: SimpleNamespace(free=0) if os.path.exists({full!r}) else usage(path)
options.set_up_logging = set_up_and_patch
main()
"""


@contextlib.contextmanager
def started(
    folder: Path, manifest: str, timing: NodeTiming | None = None, **settings: object
) -> Iterator[NodeVictim]:
    """Founds a swarm; with the same folder the node comes back. Afterwards, checks that its log has no faults.

    While there is a file `full` in the folder, no file can be written, as on a full disk.
    """
    toml, invite, log = folder / "swarm.toml", folder / "invite", folder / "log"
    toml.write_text(manifest)
    invite.unlink(missing_ok=True)
    arguments = ["--new", toml, "--host", LOCAL, "--state", folder / "state", "--invite-file", invite]
    environment = {f"TALKOOT_NODE_{name.upper()}": str(value) for name, value in settings.items()}
    main = _MAIN.format(timing=timing or NodeTiming(), full=str(folder / "full"))
    with log.open("wb") as output:
        process = Preloaded(
            *("-c", main, "node", *map(str, arguments)),
            stdout=output,
            stderr=output,
            env=os.environ | environment,
        )
    try:
        deadline = time.monotonic() + 120
        while "metrics at" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        metrics = re.search(r"metrics at (http://\S+)", log.read_text())
        made = re.search(r"invite: (talkoot\S+)", log.read_text())
        assert metrics is not None
        assert made is not None
        yield NodeVictim(process, log, folder / "state", metrics[1], invite=Invite.parse(made[1]))
    finally:
        process.terminate()
        process.wait(60)
    _, fault, what = log.read_text().partition("Traceback")
    assert not fault, what[:5000]


@contextlib.asynccontextmanager
async def found_by_a_trainer(node: NodeVictim, folder: Path) -> AsyncIterator[tuple[NodeInfo, Manifest, str]]:
    """The node, the manifest and the swarm's id, as read from the DHT."""
    swarm = await join_swarm(
        Identity.load_or_create(folder / "trainer.key"), node.invite, NetworkConfig(LOCAL, serves_dht=False)
    )
    try:
        (info,) = (await swarm.registry.nodes([node.invite.keys.author])).values()
        yield info, swarm.manifest, swarm.keys.swarm_id
    finally:
        await swarm.stop()
