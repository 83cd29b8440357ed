"""Emulated links for benchmarks, in a process of their own, so that they don't take processor time from a trainer."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import uvloop

from benchmarks.namespaces import Machine
from peer.platform.processes import die_with_parent
from talkoot.demo.links import Link, Proxy, Wire

_HOST = "127.0.0.1"


@dataclass
class EmulatedLinks:
    """Emulated links that run in another process."""

    ports: list[list[int]]
    """The proxies' ports for each peer, in the order of the target ports."""
    _process: "subprocess.Popen[str]"

    def change(self, link: str) -> tuple[int, int]:
        """Replaces all links from now on. Returns the bytes carried there and back so far."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(link + "\n")
        self._process.stdin.flush()
        there, back = json.loads(self._process.stdout.readline())
        return there, back

    def carried(self) -> tuple[int, int]:
        """Bytes carried there and back since the start."""
        return self.change("")


@contextmanager
def emulated_links(
    link: str, peers: Sequence[Sequence[int]], machine: Machine | None = None
) -> Iterator[EmulatedLinks]:
    """Puts one link in front of the ports of each peer. The peers are on this computer's loopback interface, or on an
    emulated machine.
    """
    host = _HOST if machine is None else machine.address
    targets = [",".join(map(str, ports)) for ports in peers]
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.emulated", host, link, *targets]
    command = die_with_parent(command if machine is None else machine.command(command))
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield EmulatedLinks(json.loads(process.stdout.readline()), process)
    finally:
        process.kill()
        process.communicate()


async def run(host: str, link: str, targets: Sequence[str]) -> None:
    wires = [Wire(Link.parse(link), seed) for seed in range(len(targets))]
    proxies = [
        [await Proxy.start(wire, (host, int(port)), host) for port in ports.split(",")]
        for wire, ports in zip(wires, targets, strict=True)
    ]
    print(json.dumps([[proxy.port for proxy in group] for group in proxies]), flush=True)
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    while line := await reader.readline():
        if text := line.decode().strip():
            for wire in wires:
                wire.change(Link.parse(text))
        print(
            [sum(w.there.bytes_carried for w in wires), sum(w.back.bytes_carried for w in wires)], flush=True
        )
    for proxy in (proxy for group in proxies for proxy in group):
        await proxy.close()


if __name__ == "__main__":
    uvloop.run(run(sys.argv[1], sys.argv[2], sys.argv[3:]))
