"""Streams of p2pd to a peer behind a router, through another peer that relays, in network namespaces of the kernel."""

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

import pytest
from preloaded import Preloaded

from benchmarks.namespaces import Machine, internet, why_not

NOT_HERE = why_not()
pytestmark = pytest.mark.skipif(bool(NOT_HERE), reason=NOT_HERE)

PEER = """
import asyncio, sys
from pathlib import Path

from peer.identity import Identity
from peer.loop import new_loop
from peer.transport.addresses import Multiaddress
from peer.transport.dialling import Dialling
from peer.transport.endpoints import AddressScope
from peer.transport.libp2p import Libp2p
from peer.transport.p2pd_setup import Libp2pConfig

key, listen, kind, *given = sys.argv[1:]
SIZE = 2**20

async def echo(caller, end, pipe):
    reader, writer = pipe
    received = len(await reader.readexactly(SIZE))
    writer.write(f"{received} bytes from {end.neighbourhood}\\n".encode())
    await reader.read(1)  # the caller ends the stream: otherwise, what it has not read may be lost
    writer.close()

async def main():
    relays = tuple(map(Multiaddress, given)) if kind == "home" else ()
    config = Libp2pConfig(listen, public=kind == "public", relays=relays)
    libp2p = Libp2p(Identity.load_or_create(Path(key)), config, Dialling(AddressScope.LOOPBACK))
    await libp2p.serve_streams("/test/echo/1", echo)
    await libp2p.start()
    try:
        if kind == "caller":
            address = Multiaddress(given[0])
            reader, writer = await libp2p.open_stream(address.peer_id, [address], "/test/echo/1", 60.0)
            writer.write(bytes(SIZE))
            print((await reader.readline()).decode(), end="", flush=True)
            writer.close()
            return
        while not (found := await libp2p.addresses()) or (relays and not found[0].is_relayed):
            await asyncio.sleep(0.1)
        print(found[0], flush=True)
        await asyncio.sleep(300)
    finally:
        await libp2p.stop()

asyncio.Runner(loop_factory=new_loop).run(main())
"""


@contextmanager
def peer(machine: Machine, folder: Path, kind: str, *given: str) -> Iterator[IO[str]]:
    """Runs a peer on the machine, and yields its output."""
    arguments = [str(folder / f"{machine.namespace}.key"), machine.address, kind, *given]
    words = ("-W", "ignore", "-c", PEER, *arguments)
    process = Preloaded(*words, stdout=subprocess.PIPE, text=True, network=machine.namespace)
    assert process.stdout is not None
    try:
        yield process.stdout
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


def test_a_peer_behind_a_router_is_reached_through_a_relay_and_others_directly(tmp_path: Path) -> None:
    """None of the p2pds runs a DHT that would know where another is."""
    with internet() as net, ExitStack() as stack:
        public, visitor = net.public(), net.public()
        relay = stack.enter_context(peer(public, tmp_path, "public")).readline().strip()
        caller = stack.enter_context(peer(visitor, tmp_path, "caller", relay))
        assert caller.readline() == f"1048576 bytes from {visitor.address}\n"
        home = stack.enter_context(peer(net.home(), tmp_path, "home", relay)).readline().strip()
        assert home.startswith(relay)
        assert "/p2p-circuit/" in home
        caller = stack.enter_context(peer(net.home(), tmp_path, "caller", home))
        assert caller.readline() == f"1048576 bytes from relay {relay.rpartition('/')[2]}\n"
