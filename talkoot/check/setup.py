"""What of this machine's set-up can be checked without a swarm: software, device, ports and what keeps the clock."""

import ctypes
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from expert_server.experts.devices import check_devices
from expert_server.settings import NodeSettings
from peer import PROTOCOL_VERSION, SOFTWARE_VERSION
from peer.errors import PortError, UserError
from peer.host import require_free_port
from talkoot.check.report import Finding, Verdict

_PYTHONS = ((3, 11), (3, 14))
"""From, and up to without, as in pyproject.toml."""
_TIMEX_BYTES = 256
"""More than `struct timex` of any architecture."""
_TIME_ERROR = 5


def check_software() -> Finding:
    """The versions, and whether p2pd runs on this platform."""
    versions = {name: _version(name) for name in ("torch", "hivemind", "grpcio")}
    shown = ", ".join(f"{name} {number}" for name, number in versions.items())
    python, system = platform.python_version(), f"{platform.system()} {platform.machine()}"
    verdict, fix = Verdict.OK, ""
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        verdict, fix = Verdict.PROBLEM, "p2pd is for Linux on x86-64 only: use such a machine, or a container"
    elif not _PYTHONS[0] <= sys.version_info[:2] < _PYTHONS[1]:
        verdict, fix = Verdict.WEAK, "not tried with this Python: take 3.11, 3.12 or 3.13"
    return Finding(
        name="software",
        verdict=verdict,
        says=f"talkoot {SOFTWARE_VERSION}, protocol version {PROTOCOL_VERSION}, Python {python}, {shown}, {system}",
        fix=fix,
        values={"python": python, "system": system, **versions},
    )


def check_device(settings: NodeSettings) -> Finding:
    """What experts would be computed on. It blocks: finding GPUs takes time."""
    try:
        devices = check_devices(settings.device, settings.precision)
    except UserError as error:
        return Finding(name="device", verdict=Verdict.PROBLEM, says="it can't be used", fix=str(error))
    says = ", ".join(f"{name} in {precision}" for name, precision in devices.items())
    return Finding(name="device", verdict=Verdict.OK, says=says, values={"devices": ",".join(devices)})


def check_ports(settings: NodeSettings, host: str) -> Finding:
    """Whether a node could listen at its three ports. `host`: the address of the first two."""
    wanted = {
        "--dht-port": (host, settings.dht_port),
        "--grpc-port": (host, settings.grpc_port),
        "--metrics-port": (settings.metrics_host, settings.metrics_port),
    }
    taken = []
    for option, (address, port) in wanted.items():
        try:
            require_free_port(address, port)
        except PortError as error:
            taken.append(f"{option}: {error}")
    shown = ", ".join(f"{option} {port or 'any free one'}" for option, (_, port) in wanted.items())
    verdict, fix = Verdict.PROBLEM if taken else Verdict.OK, "; ".join(taken)
    if not taken and settings.host is None and host.startswith("127."):
        verdict, fix = Verdict.WEAK, "no network is up here: nobody else could reach a node"
    return Finding(name="ports", verdict=verdict, says=f"on {host}: {shown}", fix=fix)


def check_clock_keeping() -> Finding:
    """Whether something keeps the clock right, as the kernel knows it (adjtimex(2))."""
    kept = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(_TIMEX_BYTES))
    if kept < 0:
        return Finding(name="clock", verdict=Verdict.SKIPPED, says="the kernel does not say what keeps it")
    return Finding(
        name="clock",
        verdict=Verdict.WEAK if kept == _TIME_ERROR else Verdict.OK,
        says="nothing keeps it right" if kept == _TIME_ERROR else "kept right by the network's time",
        fix="`timedatectl set-ntp true`, unless this machine's host keeps it; with --join, peers are asked",
    )


def check_state(folder: Path, error: UserError | None) -> Finding:
    """`error`: what was wrong with the state folder."""
    if error is not None:
        return Finding(
            name="state folder", verdict=Verdict.PROBLEM, says=f"{folder} can't be used", fix=str(error)
        )
    return Finding(name="state folder", verdict=Verdict.OK, says=str(folder))


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "of no known version"
