"""A node that was in a swarm before waits until one of its peers answers; a newcomer is told at once if none does."""

import asyncio
import signal
import subprocess
import time
from pathlib import Path

import pytest
from commands import DEADLINE_S, HOST, assert_one_clear_line, run, wait_until
from preloaded import Preloaded

from dht.invites import Invite
from dht.manifest import Manifest
from dht.membership import PeerStore
from dht.records import SwarmKeys
from dht.swarm import found_swarm
from expert_server.settings import NodeSettings
from peer.host import NetworkConfig
from peer.identity import Identity
from peer.loop import LoopThread
from peer.transport.addresses import Multiaddress
from talkoot.demo.links import free_ports
from talkoot.node import launch
from talkoot.node.launch import Origin, _NodeRun
from talkoot.terminal import LogFormat, Terminal

MANIFEST = 'name = "patient"\n[model]\nlayers = 1\nhidden = 16\n[experts]\ngrid = [2, 2]\n'
STATED = ("--host", HOST, "--threads", "1", "--state")


@pytest.fixture(scope="module")
def founder(tmp_path_factory: pytest.TempPathFactory) -> Identity:
    return Identity.load_or_create(tmp_path_factory.mktemp("founder") / "identity.key")


def invite_of(founder: Identity, port: int) -> Invite:
    address = f"/ip4/{HOST}/tcp/{port}/p2p/{founder.peer_id.to_base58()}"
    return Invite(SwarmKeys("patient", founder.peer_id), (Multiaddress(address),))


def remember(invite: Invite, state: Path) -> None:
    peer_store = PeerStore(state / "peers" / f"{invite.keys.swarm_id}.json")
    peer_store.add(invite.bootstrap, time.time())
    peer_store.save()


def test_a_newcomer_is_told_at_once(founder: Identity, tmp_path: Path) -> None:
    (port,) = free_ports(HOST, 1)
    invite = invite_of(founder, port)
    other = Invite(SwarmKeys("another", founder.peer_id), invite.bootstrap)
    remember(other, tmp_path)
    ended = run("node", "--join", str(invite), *STATED, str(tmp_path))
    assert_one_clear_line(ended, "none of the bootstrap addresses answers", "network")


def test_who_was_there_waits_and_leaves_at_once_when_told(founder: Identity, tmp_path: Path) -> None:
    (port,) = free_ports(HOST, 1)
    invite = invite_of(founder, port)
    remember(invite, tmp_path)
    log = tmp_path / "node.log"
    with Preloaded(
        *("-m", "talkoot", "node", "--join", str(invite), *STATED, str(tmp_path)), stderr=subprocess.PIPE
    ) as process:
        try:
            wait_until(lambda: log.exists() and "Trying again in 4 s" in log.read_text(), "the second try")
            process.send_signal(signal.SIGINT)
            assert process.wait(DEADLINE_S) == 128 + signal.SIGINT
        finally:
            process.kill()


def test_it_comes_back_when_others_do(
    loop: LoopThread, founder: Identity, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "_FIRST_WAIT_S", 0.05)
    (port,) = free_ports(HOST, 1)
    invite = invite_of(founder, port)
    remember(invite, tmp_path)
    origin = Origin(None, str(invite), ())
    terminal = Terminal(LogFormat.TEXT)
    node = _NodeRun(terminal, origin.read(), origin, NodeSettings(), HOST, tmp_path, None)
    (tmp_path / "swarm.toml").write_text(MANIFEST)
    joining = Identity.load_or_create(tmp_path / "identity.key")
    manifest = Origin(tmp_path / "swarm.toml", None, ()).read()
    assert isinstance(manifest, Manifest)

    async def scenario() -> None:
        tries = 0

        def stage(text: str) -> None:
            nonlocal tries
            tries += text == "joining the DHT"

        coming = asyncio.create_task(node._start_swarm(joining, stage))
        async with asyncio.timeout(DEADLINE_S):
            while tries < 3:  # noqa: ASYNC110  # a stage is told to a function
                await asyncio.sleep(0.01)
        assert not coming.done()
        other = await found_swarm(founder, manifest, NetworkConfig(HOST, port))
        try:
            swarm = await asyncio.wait_for(coming, DEADLINE_S)
            await swarm.stop()
        finally:
            await other.stop()

    loop.run(scenario())
