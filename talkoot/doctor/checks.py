"""What other nodes say of this machine: whether they can reach it, how fast the way is, and whether clocks agree."""

import asyncio
import random
import statistics
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from hivemind.p2p import PeerID

from dht.registry import NodeInfo
from dht.swarm import Swarm
from expert_server.probing import DialledBack, Link, call_dial_back, call_probe
from peer.rpc.channels import ChannelPool
from peer.errors import PortError, UnreachableError
from peer.formatting import counted
from talkoot.check.report import Finding, Verdict

_PEERS_ASKED = 3
_SLOW_MBIT = 5.0
"""A call of 1,000 rows of hidden size 128 then takes about a second."""
_CLOCK_OFF_S = 1.0
_CLOCK_BROKEN_S = 3.0
"""Beyond that, others take fresh records for expired or not valid yet."""


async def ask_peers(swarm: Swarm, host: str, port: int, rng: random.Random) -> list[Finding]:
    """Asks some nodes of the swarm. `host`, `port`: where a node here would serve; port 0: any free one.

    Raises PortError when nobody can listen there, and UnreachableError when the DHT does not answer.
    """
    others = await _others(swarm)
    links: list[Link] = []
    dials: list[DialledBack] = []
    failures: list[str] = []
    pool = ChannelPool()
    try:
        async with _listening(host, port) as own_port:
            for node in rng.sample(others, min(_PEERS_ASKED, len(others))):
                try:
                    channel = await pool.get(node.addresses[0], node.certificate_pem)
                    links.append(await call_probe(channel, swarm.keys.swarm_id))
                    dials.append(await call_dial_back(channel, swarm.keys.swarm_id, own_port))
                except UnreachableError as error:
                    failures.append(f"{node.addresses[0]}: {error}")
    finally:
        await pool.close()
    nobody = "; ".join(failures) or "no other node is there to ask"
    return [
        judge_clock(links, nobody),
        judge_bandwidth(links, nobody),
        judge_reachability(dials, host, own_port, nobody),
    ]


def judge_clock(links: Sequence[Link], nobody: str) -> Finding:
    """By the median of what peers say: one that lies changes nothing."""
    if not links:
        return _skipped("clock", nobody)
    offset_s = statistics.median(link.clock_offset_s for link in links)
    give_or_take_s = statistics.median(link.round_trip_s for link in links) / 2
    off_s = max(0.0, abs(offset_s) - give_or_take_s)
    verdict = Verdict.OK
    if off_s > _CLOCK_OFF_S:
        verdict = Verdict.PROBLEM if off_s > _CLOCK_BROKEN_S else Verdict.WEAK
    way = "behind" if offset_s > 0 else "ahead of"
    return Finding(
        name="clock",
        verdict=verdict,
        says=f"{abs(offset_s):.2f} s {way} that of {counted(len(links), 'peer')}, give or take {give_or_take_s:.2f} s",
        fix="set the clock, such as by `timedatectl set-ntp true`: records are only good at the right time",
        values={"clock_offset_s": offset_s, "give_or_take_s": give_or_take_s},
    )


def judge_bandwidth(links: Sequence[Link], nobody: str) -> Finding:
    """By the fastest peer: a slow one says nothing of this machine."""
    if not links:
        return _skipped("bandwidth", nobody)
    up = max(link.upload_mbit for link in links)
    down = max(link.download_mbit for link in links)
    round_trip_s = min(link.round_trip_s for link in links)
    return Finding(
        name="bandwidth",
        verdict=Verdict.OK if min(up, down) >= _SLOW_MBIT else Verdict.WEAK,
        says=f"{up:.1f} Mbit/s up, {down:.1f} Mbit/s down, {1000 * round_trip_s:.0f} ms to a peer and back",
        fix="answers to trainers will often be late: a cable may be faster than a wireless network",
        values={"upload_mbit": up, "download_mbit": down, "round_trip_s": round_trip_s},
    )


def judge_reachability(dials: Sequence[DialledBack], host: str, port: int, nobody: str) -> Finding:
    """By the best of them: who lies can only say that it is not reachable, or say so of a port it could not reach.

    A node that nobody reaches serves through relays, which is slower and costs those who relay.
    """
    if not dials:
        return _skipped("reachability", nobody)
    best = min(dials, key=lambda dial: (not dial.connected, dial.address != host))
    values: dict[str, str | int] = {
        "announced": host,
        "seen_as": best.address,
        "port": port,
        "connected": best.connected,
    }
    says = f"a peer connected to {best.address} port {port}"
    if best.connected:
        return Finding(name="reachability", verdict=Verdict.OK, says=says, values=values)
    hidden = best.address != host
    fix = (
        f"forward two TCP ports on the router to {host}"
        if hidden
        else "let two TCP ports in through the firewall"
    )
    return Finding(
        name="reachability",
        verdict=Verdict.WEAK,
        says=f"peers can't connect to {best.address} port {port}: {best.message}; a node would serve through relays",
        fix=f"{fix}, and pass them as --grpc-port and --dht-port: then others reach it directly",
        values=values,
    )


def _skipped(name: str, why: str) -> Finding:
    return Finding(name=name, verdict=Verdict.SKIPPED, says=why)


async def _others(swarm: Swarm) -> list[NodeInfo]:
    """Nodes of the swarm, without the one that this machine was before."""
    listed: frozenset[PeerID] = await swarm.registry.node_ids()
    nodes = await swarm.registry.nodes(listed - {swarm.host.peer_id})
    return [node for node in nodes.values() if node.addresses]


@asynccontextmanager
async def _listening(host: str, port: int) -> AsyncIterator[int]:
    """Accepts connections for a moment, and gives the port. Raises PortError."""

    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    try:
        server = await asyncio.start_server(hang_up, host, port, backlog=8)
    except OSError as error:
        raise PortError(f"can't listen on {host} port {port}: {error.strerror}; pass another port") from error
    async with server:
        chosen: int = server.sockets[0].getsockname()[1]
        yield chosen
