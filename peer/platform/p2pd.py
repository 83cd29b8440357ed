"""Whether this machine can run p2pd, the libp2p daemon that comes with hivemind. Nothing of hivemind is
imported here.
"""

import platform
from importlib.util import find_spec
from pathlib import Path

REINSTALL = "reinstall it: `python -m pip install --force-reinstall --no-deps hivemind==1.1.12`"
_INSTALL = "python -m pip install hivemind==1.1.12"
_OFFERED = {("Linux", "x86_64"), ("Darwin", "x86_64"), ("Darwin", "arm64")}
"""Systems and machines for which hivemind has wheels that contain p2pd."""
_ELF, _MACH_O = b"\x7fELF", b"\xcf\xfa\xed\xfe"
_ELF_MACHINES = {62: "x86_64", 183: "aarch64"}
"""e_machine → what platform.machine() says."""
_MACH_O_MACHINES = {0x0100_0007: "x86_64", 0x0100_000C: "arm64"}
"""cputype → what platform.machine() says."""


def why_unavailable() -> str:
    """Why this machine can't run p2pd and what to do, or "" if it can."""
    return _why_unavailable(platform.system(), platform.machine(), _installed())


def is_offered() -> bool:
    """Whether hivemind has a p2pd for this platform, so that a missing one can be installed."""
    return (platform.system(), platform.machine()) in _OFFERED


def _why_unavailable(system: str, machine: str, path: Path | None) -> str:
    """`path`: where hivemind's p2pd is or should be; None: hivemind is not installed."""
    is_offered = (system, machine) in _OFFERED
    none_here = f"hivemind has no libp2p daemon for {system} on {machine}; nothing needs to be done"
    if path is None:
        return (
            f"hivemind, which brings the libp2p daemon, is not installed: `{_INSTALL}`"
            if is_offered
            else none_here
        )
    try:
        with path.open("rb") as file:
            built_for = _built_for(file.read(20))
    except FileNotFoundError:
        return f"hivemind's libp2p daemon is missing; {REINSTALL}" if is_offered else none_here
    except OSError as error:
        return f"can't read {path}: {error.strerror}; {REINSTALL}"
    if built_for == (system, machine):
        return ""
    found = "for {} on {}".format(*built_for) if built_for else "no program"
    advice = REINSTALL if is_offered else "nothing needs to be done, there is none for it"
    return f"the libp2p daemon that hivemind brought is {found}, but this is {system} on {machine}; {advice}"


def _built_for(header: bytes) -> tuple[str, str] | None:
    """The system and the machine that a program was built for, from its first 20 bytes: ELF on Linux, Mach-O on
    macOS.
    """
    if len(header) == 20 and header.startswith(_ELF):
        number = int.from_bytes(header[18:20], "little" if header[5] == 1 else "big")
        return "Linux", _ELF_MACHINES.get(number, f"machine {number}")
    if len(header) == 20 and header.startswith(_MACH_O):
        number = int.from_bytes(header[4:8], "little")
        return "Darwin", _MACH_O_MACHINES.get(number, f"machine {number}")
    return None


def _installed() -> Path | None:
    spec = find_spec("hivemind")
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / "hivemind_cli" / "p2pd"
