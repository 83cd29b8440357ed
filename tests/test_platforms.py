"""Only `peer.platform` deals with operating systems: no other module names one, uvloop, or what only POSIX has."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import without_posix

ROOT = Path(__file__).parents[1]
FLOORS = ("peer", "dht", "expert_server", "trainer_client", "talkoot")
_ROOM = ROOT / "peer" / "platform"
_MODULES = {*without_posix.ABSENT_MODULES, "ctypes", "msvcrt", "winreg", "_winapi"} - {"hivemind"}
_NAMES = {name for names in without_posix.ABSENT.values() for name in names if name != "pause"} | {
    "statvfs", "AF_UNIX",
    "CREATE_NEW_PROCESS_GROUP", "SIGBREAK", "SO_PEERCRED", "create_unix_connection", "create_unix_server",
    "add_signal_handler", "remove_signal_handler", "num_fds", "num_handles", "sensors_battery", "sensors_temperatures",
}  # fmt: skip
_OF_MODULE = {
    "sys": {"platform", "getwindowsversion"},
    "os": {"name"},
    "platform": {
        "system",
        "machine",
        "release",
        "uname",
        "mac_ver",
        "win32_ver",
        "platform",
        "libc_ver",
        "node",
    },
}
_WORDS = re.compile(
    r"\b(linux|macos|darwin|windows|win32|posix|uvloop|systemd|systemctl|launchd|launchctl|schtasks)\b"
    r"|^/(proc|sys|dev|etc)/|\bunix:",
    re.IGNORECASE,
)


def found_in(source: str) -> Iterator[str]:
    """What a module should leave to `peer.platform`. Docstrings and comments may mention it."""
    tree = ast.parse(source)
    docs = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (name.name for name in names if name.name.split(".")[0] in _MODULES)
            case ast.ImportFrom(module=str(module), names=names):
                if module.split(".")[0] in _MODULES:
                    yield module
                banned = _NAMES | _OF_MODULE.get(module, set())
                yield from (f"{module}.{name.name}" for name in names if name.name in banned)
            case ast.Attribute(value=ast.Name(id=owner), attr=attribute) if attribute in _OF_MODULE.get(
                owner, ()
            ):
                yield f"{owner}.{attribute}"
            case ast.Attribute(attr=attribute) if attribute in _NAMES:
                yield attribute
            case ast.Constant(value=str(text)) if id(node) not in docs and (word := _WORDS.search(text)):
                yield f"{word[0]!r} in {text[:60]!r}"


def modules() -> list[Path]:
    paths = (path for floor in FLOORS for path in (ROOT / floor).rglob("*.py"))
    return [path for path in paths if _ROOM not in path.parents and "wire" not in path.parts]


def test_no_other_module_names_an_operating_system() -> None:
    found = {str(path.relative_to(ROOT)): [*found_in(path.read_text())] for path in modules()}
    assert {path: names for path, names in found.items() if names} == {}


def test_they_are_looked_for_where_they_are() -> None:
    """So the test above can't pass merely because it looks at nothing."""
    assert len(modules()) > 200
    found = [name for path in _ROOM.glob("*.py") for name in found_in(path.read_text())]
    assert {"fcntl", "uvloop", "sys.platform", "geteuid", "AF_UNIX"} <= {*found}


@pytest.mark.parametrize(
    "line",
    [
        "import fcntl",
        "from resource import getrlimit",
        "from os import geteuid",
        "os.nice(3)",
        "if sys.platform == 'x': pass",
        "os.name",
        "socket.socket(socket.AF_UNIX)",
        "open('/proc/self/stat')",
        "say('on Windows, do this')",
    ],
)
def test_each_kind_is_found(line: str) -> None:
    assert [*found_in(line)]


def test_docstrings_may_explain() -> None:
    assert not [*found_in('"""As on Linux."""\nx = 1\n"""Of systemd."""\n# uvloop\nos.path.join(x)')]
