"""The checks of `talkoot doctor`. Each returns a finding.

They come in three groups: the set-up (state folder, software, device, ports, clock), the machine's resources (speed,
memory, cores, disk), and what other nodes measure (clock, bandwidth, reachability).
"""

import asyncio
import contextlib
import errno
import os
import random
import shutil
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import ClassVar

import psutil
import torch
from pydantic import BaseModel, ConfigDict

from dht.announcements import NodeInfo
from dht.manifest import Manifest
from dht.swarm import Swarm
from dht.uid import UID
from expert_server.experts.devices import ComputeDevice, open_devices
from expert_server.experts.expert import Expert, expert_bytes, experts_by_default
from expert_server.experts.graphs import Rows
from expert_server.probe import DialledBack, Link, call_dial_back, call_probe
from expert_server.resources import checkpoint_bytes, disk_shortage, within_memory
from expert_server.settings import NodeSettings
from peer import PROTOCOL_VERSION, SOFTWARE_VERSION
from peer.clock import CLOCK
from peer.errors import PortError, SettingsError, UnreachableError, UserError
from peer.formatting import age_in_words, bytes_in_words, counted, is_loopback
from peer.identity import PeerID
from peer.platform import machine
from peer.platform.processes import usable_cores
from peer.rpc.channels import ChannelPool
from peer.transport.addresses import family_of, require_free_port
from peer.transport.port_mapping import PortMapping
from talkoot.doctor.traffic import TYPICAL_NODES, row_traffic, trainer_traffic
from trainer_client.settings import PRESETS

_PEERS_ASKED = 3
_SLOW_LINE_ROWS_PER_S = 500.0
"""Rows per second, forward and backward. At this speed, a call of 1,000 rows takes a second."""
_CLOCK_OFF_S = 1.0
_CLOCK_BROKEN_S = 3.0
"""A clock that is off by more than this makes other peers mistake fresh records for expired or not yet valid ones."""
_SLOW_ROWS_PER_S = 200.0
"""Below this speed, a sequence of a few hundred tokens takes longer than trainers are willing to wait."""
_TOKENS_PER_S = 1000.0
"""The speed of the trainer whose traffic is reported."""
_MEASURE_S = 1.5
_ROWS = 512
_DISK_TEST_BYTES = 16 * 2**20
_SLOW_DISK_BYTES_PER_S = 5e6
_PYTHONS = ((3, 11), (3, 15))
"""The oldest version of Python with which Talkoot is tested, and the first one with which it is not."""


OFFLINE = "offline"
"""The value of a finding that says that this machine has no network."""


class Verdict(StrEnum):
    """Whether one aspect of the machine is good enough for a node."""

    OK = "ok"
    WEAK = "weak"
    """A node can serve, but not well."""
    PROBLEM = "problem"
    """A node can't serve."""
    SKIPPED = "not checked"


class Finding(BaseModel):
    """The result of one check."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", frozen=True)

    name: str
    verdict: Verdict
    says: str
    fix: str = ""
    """What to do if something is wrong."""
    values: Mapping[str, bool | int | float | str] = {}
    """The measured figures, by names that include the units."""


@dataclass(frozen=True)
class NodeHere:
    """The node that runs on this machine with the checked state folder, if any."""

    runs: bool = False
    memory_bytes: int = 0
    """What it and its child processes take."""
    ports: frozenset[int] = frozenset()
    """The TCP ports that they listen on."""

    @classmethod
    def of_process(cls, pid: int) -> "NodeHere":
        memory_bytes, ports = 0, set[int]()
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid)
            for each in (process, *process.children(recursive=True)):
                memory_bytes += each.memory_info().rss
                ports.update(c.laddr.port for c in each.net_connections("tcp") if c.status == "LISTEN")
        return cls(True, memory_bytes, frozenset(ports))


NO_NODE = NodeHere()


def check_state(folder: Path, error: UserError | None, here: NodeHere = NO_NODE) -> Finding:
    """`error`: what is wrong with the state folder, if anything."""
    name, says = "state folder", str(folder)
    if here.runs:
        return Finding(name=name, verdict=Verdict.OK, says=f"{says}; a node runs here with it")
    if error is not None:
        return Finding(name=name, verdict=Verdict.PROBLEM, says=f"{says} can't be used", fix=str(error))
    return Finding(name=name, verdict=Verdict.OK, says=says)


def check_software() -> Finding:
    """The versions, and whether Talkoot was tested on this platform."""
    versions = {name: _version(name) for name in ("torch", "hivemind", "grpcio")}
    shown = ", ".join(f"{name} {number}" for name, number in versions.items())
    python, system = ".".join(map(str, sys.version_info[:3])), machine.system()
    verdict, fix = Verdict.OK, ""
    if not _PYTHONS[0] <= sys.version_info[:2] < _PYTHONS[1]:
        verdict, fix = Verdict.WEAK, "not tested with this Python: use 3.11, 3.12, 3.13 or 3.14"
    elif experimental := machine.why_experimental():
        verdict, fix = Verdict.WEAK, experimental
    return Finding(
        name="software",
        verdict=verdict,
        says=f"talkoot {SOFTWARE_VERSION}, protocol version {PROTOCOL_VERSION}, Python {python}, {shown}, {system}",
        fix=fix,
        values={"python": python, "system": system, **versions},
    )


def check_device(settings: NodeSettings) -> Finding:
    """The devices that experts would run on. Blocks: finding GPUs takes time."""
    try:
        devices = open_devices(settings.device, settings.precision)
    except UserError as error:
        return Finding(name="device", verdict=Verdict.PROBLEM, says="it can't be used", fix=str(error))
    names = ",".join(str(device.torch_device) for device in devices)
    return Finding(
        name="device", verdict=Verdict.OK, says=", ".join(map(str, devices)), values={"devices": names}
    )


def check_ports(settings: NodeSettings, host: str, here: NodeHere = NO_NODE) -> Finding:
    """Whether a node could listen on its port and on that of /metrics, or does. `host`: the address it would listen
    on.
    """
    wanted = {
        "--port": (host, settings.port),
        "--metrics-port": (settings.metrics_host, settings.metrics_port),
    }
    taken = []
    with contextlib.ExitStack() as held:  # both at once, as a node would
        for option, (address, port) in wanted.items():
            if port in here.ports:
                continue
            try:
                require_free_port(address, port)
                held.enter_context(socket.create_server((address, port), family=family_of(address)))
            except PortError as error:
                taken.append(f"{option}: {error}")
    shown = ", ".join(f"{option} {port or 'any free one'}" for option, (_, port) in wanted.items())
    verdict, fix = Verdict.PROBLEM if taken else Verdict.OK, "; ".join(taken)
    values: dict[str, bool | int | float | str] = {}
    if not taken and settings.host is None and host.startswith("127."):
        verdict, fix = Verdict.WEAK, "this machine has no network: nobody else could reach a node"
        values[OFFLINE] = True
    return Finding(name="ports", verdict=verdict, says=f"on {host}: {shown}", fix=fix, values=values)


def check_clock_keeping() -> Finding:
    """Whether the clock is synchronised, on systems that report it."""
    kept = machine.clock_is_synchronised()
    if kept is None:
        return _skipped(
            "clock", "the system does not say whether it is synchronised; with --join, peers are asked"
        )
    return Finding(
        name="clock",
        verdict=Verdict.OK if kept else Verdict.WEAK,
        says="synchronised with the network's time" if kept else "not synchronised",
        fix=f"{machine.how_to_set_the_clock()}, unless this machine's host sets it; with --join, peers are asked",
    )


def check_speed(settings: NodeSettings, manifest: Manifest, here: NodeHere = NO_NODE) -> Finding:
    """Trains one expert of the manifest for a moment. Blocks, so don't call it on an event loop."""
    device = _devices(settings)[0]
    if expert_bytes(manifest) > device.memory_bytes:
        return Finding(name="speed", verdict=Verdict.SKIPPED, says="not one expert fits into memory")
    cores = usable_cores()
    threads = min(settings.threads or cores, cores)
    rows_per_s = _rows_per_s(manifest, threads, device)
    kind, width = manifest.experts.kind, manifest.width
    says = f"{rows_per_s:,.0f} rows/s, forward and backward, through a {kind} expert of width {width} on {device}"
    if here.runs:
        says += ", beside the node that runs here"
    slow = rows_per_s < _SLOW_ROWS_PER_S
    others = (
        "pause the node (`talkoot pause`) and close other programs" if here.runs else "close other programs"
    )
    return Finding(
        name="speed",
        verdict=Verdict.WEAK if slow else Verdict.OK,
        says=says,
        fix=f"{others}; if that does not help, this swarm's experts are too large for this machine"
        if slow
        else "",
        values={"rows_per_s": rows_per_s, "threads": threads},
    )


def check_memory(settings: NodeSettings, manifest: Manifest, here: NodeHere = NO_NODE) -> Finding:
    """How many experts fit into memory. What a running node takes counts as free."""
    free = sum(device.memory_bytes for device in _devices(settings)) + here.memory_bytes
    each = expert_bytes(manifest)
    values = {"free_bytes": free, "expert_bytes": each, "experts_that_fit": free // each}
    free_in_words = f"{bytes_in_words(free)} free{' or used by the node that runs here' if here.runs else ''}"
    name, says = "memory", f"{free_in_words}; an expert takes {bytes_in_words(each)}"
    try:
        wanted = within_memory(settings, manifest).experts
    except SettingsError as error:
        return Finding(name=name, verdict=Verdict.PROBLEM, says=says, fix=str(error), values=values)
    if each > free and settings.may_host_experts:
        fix = "not one expert fits: close other programs, or pass --experts 0 --spare 0 to host none"
        return Finding(name=name, verdict=Verdict.PROBLEM, says=says, fix=fix, values=values)
    if wanted is not None and wanted * each > free:
        fix = f"no room for {counted(wanted, 'expert')}: pass --experts {free // each} or fewer"
        return Finding(name=name, verdict=Verdict.WEAK, says=says, fix=fix, values=values)
    hosts = experts_by_default([free], manifest) if wanted is None else wanted
    if hosts >= manifest.experts_total:
        says += f"; it would host all {counted(manifest.experts_total, 'expert', ',')} of the model"
    else:
        says += f"; it would host {hosts:,}, and {free // each:,} would fit"
    return Finding(name=name, verdict=Verdict.OK, says=says, values=values | {"experts": hosts})


def check_cores(here: NodeHere = NO_NODE) -> Finding:
    cores, load = usable_cores(), machine.load()
    says = f"{counted(cores, 'core')}, {load:.1f} busy in the last minute"
    if here.runs:
        says += ", with the node that runs here"
    busy = load > (1.5 if here.runs else 0.75) * cores  # the node may use most of them itself
    return Finding(
        name="cores",
        verdict=Verdict.WEAK if busy else Verdict.OK,
        says=says,
        fix="other programs need the machine: --only-when-idle lets a node wait for them" if busy else "",
        values={"cores": cores, "load": load},
    )


def check_disk(state: Path, settings: NodeSettings, manifest: Manifest, experts: int) -> Finding:
    """Free space and write speed of the state folder, measured with 16 MiB. Blocks like check_speed."""
    try:
        speed, free = _write_speed(state), shutil.disk_usage(state).free
        fix = disk_shortage(state, settings, manifest, experts)
    except OSError as error:
        return Finding(
            name="disk",
            verdict=Verdict.PROBLEM,
            says=f"can't write to {state}: {error.strerror}",
            fix=("free some space, or " if error.errno == errno.ENOSPC else "") + "pass another --state",
        )
    needed = checkpoint_bytes(settings, manifest, experts)
    says = f"{bytes_in_words(free)} free in {state}, {bytes_in_words(speed)}/s"
    values = {"free_bytes": free, "needed_bytes": needed, "write_bytes_per_s": speed}
    verdict = Verdict.WEAK if fix else Verdict.OK
    if not fix and speed < _SLOW_DISK_BYTES_PER_S:
        verdict, fix = Verdict.WEAK, "saving checkpoints would be slow: pass a --state on a faster disk"
    return Finding(name="disk", verdict=verdict, says=says, fix=fix, values=values)


async def ask_peers(
    swarm: Swarm,
    host: str,
    port: int,
    rng: random.Random,
    *,
    upnp: bool = False,
    own: PeerID | None = None,
    here: NodeHere = NO_NODE,
) -> list[Finding]:
    """Asks some nodes of the swarm. `host`, `port`: where a node would serve here; port 0: any free one.

    `upnp`: asks the router to forward the port during the checks, as a node would. `own`: this machine's node, which is
    not asked. Raises PortError if the port can't be used, and UnreachableError if the DHT does not answer.
    """
    others = await _others(swarm, own)
    listens = port in here.ports
    links: list[Link] = []
    dials: list[DialledBack] = []
    failures: list[str] = []
    pool = ChannelPool(dialling=swarm.host.dialling)
    try:
        async with (
            contextlib.nullcontext(port) if listens else _listening(host, port) as listening,
            # the node has asked the router itself, and goes on needing the forwarded port
            _forwarding(host, listening if upnp and others and not listens else 0) as router,
        ):
            own_port = router.external.port if router.external else listening
            router_says = router.in_words
            for node in rng.sample(others, min(_PEERS_ASKED, len(others))):
                try:
                    channel = await pool.reach(replace(node, tunnel_addresses=(), relay_addresses=()))
                    links.append(await call_probe(channel, swarm.keys.swarm_id))
                    dials.append(await call_dial_back(channel, swarm.keys.swarm_id, own_port))
                except UnreachableError as error:
                    failures.append(f"{node.addresses[0]}: {error}")
    finally:
        await pool.close()
    nobody = "; ".join(failures) or "there is no other node to ask"
    return [
        judge_clock(links, nobody),
        judge_bandwidth(links, swarm.manifest, nobody),
        judge_reachability(dials, host, own_port, nobody, router_says),
    ]


def judge_clock(links: Sequence[Link], nobody: str) -> Finding:
    """Judges by the median of the peers' answers, so that a single lie has no effect.

    If no node answered, it judges by what DHT peers said when this peer joined, because a machine with a wrong clock
    may find no nodes.
    """
    if not links and CLOCK.warning:
        return Finding(name="clock", verdict=Verdict.PROBLEM, says="it is wrong", fix=CLOCK.warning)
    if not links:
        return _skipped("clock", nobody)
    offset_s = statistics.median(link.clock_offset_s for link in links)
    give_or_take_s = statistics.median(link.round_trip_s for link in links) / 2
    off_s = max(0.0, abs(offset_s) - give_or_take_s)
    verdict = Verdict.OK
    if off_s > _CLOCK_OFF_S:
        verdict = Verdict.PROBLEM if off_s > _CLOCK_BROKEN_S else Verdict.WEAK
    way = "behind" if offset_s > 0 else "ahead of"
    off = age_in_words(abs(offset_s)) if verdict is Verdict.PROBLEM else f"{abs(offset_s):.2f} s"
    return Finding(
        name="clock",
        verdict=verdict,
        says=f"{off} {way} that of {counted(len(links), 'peer')}, give or take {give_or_take_s:.2f} s",
        fix="set the clock, for example with `timedatectl set-ntp true`: records are only valid for correct clocks",
        values={"clock_offset_s": offset_s, "give_or_take_s": give_or_take_s},
    )


def check_traffic(manifest: Manifest, line: Finding | None = None) -> Finding:
    """Whether this line can carry the swarm's traffic: a trainer's with the preset's settings, or one node's part of
    it.

    `line`: the finding about bandwidth, if there is one.
    """
    most = PRESETS[manifest.preset].get("nodes_per_token")
    traffic = trainer_traffic(manifest, _TOKENS_PER_S, nodes_per_token=most)
    up, down = traffic.upload_mbit, traffic.download_mbit
    takes = (
        f"for each {_TOKENS_PER_S:,.0f} tokens/s, a trainer needs {up:.1f} Mbit/s up and {down:.1f} down in "
        f"{manifest.wire.codec}; {TYPICAL_NODES} nodes share that"
    )
    values: dict[str, bool | int | float | str] = {
        "tokens_per_s": _TOKENS_PER_S,
        "trainer_upload_mbit": up,
        "trainer_download_mbit": down,
    }
    measured = {} if line is None else line.values
    if "upload_mbit" not in measured:
        return Finding(name="traffic", verdict=Verdict.OK, says=takes, values=values)
    own_up, own_down = float(measured["upload_mbit"]), float(measured["download_mbit"])
    trainer = _TOKENS_PER_S * min(own_up / up, own_down / down)
    node = _TOKENS_PER_S * TYPICAL_NODES * min(own_up / down, own_down / up)
    carries = node >= _TOKENS_PER_S
    return Finding(
        name="traffic",
        verdict=Verdict.OK if carries else Verdict.WEAK,
        says=f"this line carries {trainer:,.0f} tokens/s of a trainer, or a node's part of {node:,.0f} tokens/s: "
        f"{takes}",
        fix=""
        if carries
        else "a cable may be faster than Wi-Fi; --experts with a small number makes less traffic",
        values=values | {"carries_tokens_per_s": trainer, "node_carries_tokens_per_s": node},
    )


def judge_bandwidth(links: Sequence[Link], manifest: Manifest, nobody: str) -> Finding:
    """Judges by the fastest peer: a slow one says nothing about this machine."""
    if not links:
        return _skipped("bandwidth", nobody)
    up = max(link.upload_mbit for link in links)
    down = max(link.download_mbit for link in links)
    round_trip_s = min(link.round_trip_s for link in links)
    row = row_traffic(manifest, 1.0)  # for a trainer: what a trainer downloads, a node uploads
    rows_per_s = min(up / row.download_mbit, down / row.upload_mbit)
    return Finding(
        name="bandwidth",
        verdict=Verdict.OK if rows_per_s >= _SLOW_LINE_ROWS_PER_S else Verdict.WEAK,
        says=f"{up:.1f} Mbit/s up, {down:.1f} Mbit/s down, {1000 * round_trip_s:.0f} ms to a peer and back; enough for "
        f"{rows_per_s:,.0f} rows/s, forward and backward",
        fix="answers to trainers will often be late; a cable may be faster than Wi-Fi",
        values={
            "upload_mbit": up,
            "download_mbit": down,
            "round_trip_s": round_trip_s,
            "rows_per_s": rows_per_s,
        },
    )


def judge_reachability(
    dials: Sequence[DialledBack], host: str, port: int, nobody: str, router: str = ""
) -> Finding:
    """Judges by the best answer. `port`: the port that peers dialled. `router`: what the router did about it, if it was
    asked. A node that others can't reach serves through relays, which is slower and uses the relays' bandwidth.
    """
    if not dials:
        return _skipped("reachability", nobody)
    dials = [dial for dial in dials if is_loopback(host) or not is_loopback(dial.address)]
    if not dials:
        return _skipped("reachability", "the nodes that answered are on this machine")
    best = min(dials, key=lambda dial: (not dial.connected, dial.address != host))
    values: dict[str, str | int] = {
        "announced": host,
        "seen_as": best.address,
        "port": port,
        "connected": best.connected,
    }
    says = f"a peer connected to {best.address} port {port}"
    if best.connected:
        says = f"{says}: {router}" if router else says
        return Finding(name="reachability", verdict=Verdict.OK, says=says, values=values)
    hidden = best.address != host
    fix = (
        f"forward TCP port {port} on your router to {host}"
        if hidden
        else f"open TCP port {port} in the firewall"
    )
    return Finding(
        name="reachability",
        verdict=Verdict.WEAK,
        says=f"peers can't connect to {best.address} port {port}: {best.message}; a node would serve through relays",
        fix=(f"{router}: " if router and hidden else "")
        + f"{fix}, and pass it as --port: then others reach the node directly",
        values=values,
    )


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "(not installed)"


def _devices(settings: NodeSettings) -> Sequence[ComputeDevice]:
    """The devices that experts would run on: the CPU if one of them can't be used, which `check_device` reports."""
    try:
        return open_devices(settings.device, settings.precision)
    except UserError:
        return open_devices("cpu", "fp32")


def _rows_per_s(manifest: Manifest, threads: int, device: ComputeDevice) -> float:
    torch.set_num_threads(threads)
    expert = Expert(UID(0, (0,) * len(manifest.experts.grid)), manifest, device)
    length = min(manifest.model.context, _ROWS)
    segments = max(1, _ROWS // length)
    rows, width = segments * length, manifest.width
    lengths, positions = torch.full((segments,), length), torch.arange(length).repeat(segments)
    inputs, gradients = torch.randn(rows, width), torch.randn(rows, width)
    done, began = 0, 0.0
    while not done or time.perf_counter() - began < _MEASURE_S:
        if not began:  # the first round is a warm-up
            _train(expert, inputs, gradients, lengths, positions)
            began = time.perf_counter()
        _train(expert, inputs, gradients, lengths, positions)
        done += rows
    return done / (time.perf_counter() - began)


def _train(expert: Expert, *tensors: torch.Tensor) -> None:
    inputs, gradients, lengths, positions = tensors
    _, graph = expert.forward_with_graph(Rows(inputs, lengths, positions))
    expert.backward([Rows(inputs, lengths, positions, gradients, graph)])


def _write_speed(folder: Path) -> float:
    """Bytes per second that reach the disk, with fsync."""
    data = os.urandom(_DISK_TEST_BYTES)
    began = time.perf_counter()
    with tempfile.TemporaryFile(dir=folder) as file:  # which is gone even if this process is killed
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        return len(data) / max(time.perf_counter() - began, 1e-6)


def _skipped(name: str, why: str) -> Finding:
    return Finding(name=name, verdict=Verdict.SKIPPED, says=why)


async def _others(swarm: Swarm, own: PeerID | None) -> list[NodeInfo]:
    """The nodes of the swarm without this machine's own."""
    listed: frozenset[PeerID] = await swarm.registry.node_ids()
    nodes = await swarm.registry.nodes({each for each in listed if each != own})
    return [node for node in nodes.values() if node.addresses]


@asynccontextmanager
async def _forwarding(host: str, port: int) -> AsyncIterator[PortMapping]:
    """Makes the router forward the port while the block runs. The port is 0 if the router is not asked."""
    mapping = PortMapping(host, port)
    if port and PortMapping.helps(host):
        await mapping.ask()
    try:
        yield mapping
    finally:
        await mapping.end()


@asynccontextmanager
async def _listening(host: str, port: int) -> AsyncIterator[int]:
    """Accepts connections while the block runs; yields the port. Raises PortError."""

    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    try:
        server = await asyncio.start_server(hang_up, host, port, backlog=8)
    except OSError as error:
        raise PortError(f"can't listen on {host} port {port}: {error.strerror}; pass another port") from error
    async with server:
        chosen: int = server.sockets[0].getsockname()[1]
        yield chosen
