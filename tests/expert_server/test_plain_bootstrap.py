"""A plain `hivemind-dht` process, which knows nothing of us and checks nothing, as way into a swarm."""

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from callers import numbered_identities
from real_swarm import LOCAL, MANIFEST, ONCE_EACH, UIDS, Village, eventually, serving

from dht.directory import Directory
from dht.swarm import Swarm, found_swarm, join_swarm
from expert_server.node import Node
from peer.host import Host
from peer.identity import Identity
from peer.loop import LoopThread
from peer.transport.addresses import Multiaddress, NetworkConfig

pytestmark = pytest.mark.filterwarnings("ignore:path is deprecated:DeprecationWarning")  # hivemind's, on 3.11


@pytest.fixture(scope="module")
def identities() -> list[Identity]:
    return numbered_identities(4)


@pytest.fixture(scope="module")
def plain() -> Iterator[str]:
    """The address of the real program."""
    program = str(Path(sys.executable).with_name("hivemind-dht"))
    process = subprocess.Popen(
        [program, "--host_maddrs", f"/ip4/{LOCAL}/tcp/0", "--no_relay"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # it logs its address, and a command run earlier in this process may have asked hivemind for errors only
        env=os.environ | {"HIVEMIND_LOGLEVEL": "INFO"},
    )
    family = [psutil.Process(process.pid)]
    assert process.stdout is not None
    try:
        with process.stdout:
            for line in process.stdout:
                if address := re.search(r"--initial_peers (\S+)", line):
                    break
            family += family[0].children(recursive=True)
            assert address
            yield address[1]
    finally:
        for member in reversed(family):
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        process.wait()


async def sees_all(swarm: Swarm) -> bool:
    return await serving(swarm) == ONCE_EACH


def test_a_swarm_is_founded_and_joined_through_it_and_forgers_spoil_nothing(
    loop: LoopThread, identities: list[Identity], tmp_path: Path, plain: str
) -> None:
    async def scenario(village: Village) -> None:
        founder = await found_swarm(
            village.identities[0], MANIFEST, NetworkConfig(LOCAL), bootstrap=[Multiaddress(plain)]
        )
        first = await village.start(founder, {"experts": 5})
        alone = [a for a in (await founder.invite()).bootstrap if a == plain]
        assert alone == [plain], "an invite names others beside its writer"
        second = await village.join(1, await founder.invite(), experts=3)
        assert await sees_all(founder)
        await spoil(village.identities[3], plain, first)
        trainer = await join_swarm(
            village.identities[2], await founder.invite(), NetworkConfig(LOCAL, serves_dht=False)
        )
        village.stack.push_async_callback(trainer.stop)
        await eventually(lambda: sees_all(trainer))
        view = await Directory(trainer.registry, MANIFEST, refresh_every_s=60).refresh()
        assert set(view.nodes) == {first.swarm.host.peer_id, second.swarm.host.peer_id}
        assert view.live_experts() == len(UIDS)

        # with all nodes gone, what they stored at the plain peer is all that there is
        for node in (first, second):
            await node.swarm.host.stop()
        assert set(await serving(trainer)) == set(UIDS)

    async def play() -> None:
        async with contextlib.AsyncExitStack() as stack:
            await scenario(Village(identities, stack, tmp_path))

    loop.run(play(), 120)


async def spoil(identity: Identity, plain: str, node: Node) -> None:
    """Stores a bad entry in each dictionary, at the plain peer, with no validator of its own."""
    forger = await Host.start(identity, NetworkConfig(LOCAL), bootstrap=[Multiaddress(plain)])
    try:
        keys = node.swarm.keys
        spoilt = [keys.expert(uid) for uid in UIDS] + [keys.prefix(layer) for layer in range(2)]
        for key in (*spoilt, keys.manifest, keys.node(node.swarm.host.peer_id)):
            for subkey, value in ((b"nobody", b"x" * 1000), ("text", "text"), (77, {"a": 1})):
                await forger.dht.store(key, value, time.time() + 10**6, subkey=subkey)
    finally:
        await forger.stop()
