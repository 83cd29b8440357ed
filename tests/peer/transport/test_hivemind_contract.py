"""What Talkoot relies on in hivemind beyond its documentation.

The version of hivemind is pinned. Before the pin moves, these tests show what to look at: which private names are gone,
which methods that we replace have changed, and which calls no longer fit. The scans keep the lists complete.
"""

import ast
import hashlib
import importlib
import inspect
import pkgutil
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[3]
PRODUCT = ("peer", "dht", "expert_server", "trainer_client", "talkoot")
BESIDE = ("benchmarks", "deploy", "docs", "examples", "tests", "tools")
PINNED = "1.1.12"
FENCE = ("peer/transport/p2pd.py",)
"""The product's modules that import hivemind."""
ALSO_IMPORT = {
    # Benchmarks that measure hivemind.moe as well as Talkoot.
    "benchmarks/discovery_real.py",
    "benchmarks/moe_contenders.py",
    "benchmarks/node.py",
    "benchmarks/rival_blocks.py",
    "benchmarks/rival_search.py",
    "benchmarks/wan_contenders.py",
    # hivemind's DHT together with ours.
    "benchmarks/hivemind_nodes.py",
    "tests/peer/kademlia/test_beside_hivemind.py",
    # Files that p2pd reads.
    "tests/peer/test_identity.py",
    # compares our grammar with hivemind's
    "tests/peer/transport/test_addresses.py",
}

IMPORTED = {
    "hivemind.p2p": {"P2P"},
    "hivemind.p2p.p2p_daemon_bindings.utils": {
        "P2PDaemonError",
        "P2PHandlerError",
        "raise_if_failed",
        "read_pbmsg_safe",
        "write_pbmsg",
    },
    "hivemind.proto": {"p2pd_pb2"},
    "hivemind.utils.logging": {"use_hivemind_log_handler"},
}

PRIVATE = {
    # Attributes of p2pd's process, as hivemind starts it.
    "asyncio.subprocess.Process": {"_transport"},
    "hivemind.p2p.P2P": {
        "_UNIX_SOCKET_PREFIX",
        "_child",
        "_client",
        "_client_listen_maddr",
        "_daemon_listen_maddr",
        "_listen_task",
        "_make_process_args",
        "_reader_task",
        "_terminate",
    },
    "hivemind.p2p.p2p_daemon_bindings.control.ControlClient": {
        "_read_task",
        "_write_task",
    },
}

UNDOCUMENTED = {
    "hivemind.p2p.P2P": {"peer_id"},
    "hivemind.p2p.p2p_daemon_bindings.control.ControlClient": {"daemon_connector"},
    "hivemind.p2p.p2p_daemon_bindings.datastructures.StreamInfo": {"addr", "peer_id"},
    "hivemind.p2p.p2p_daemon_bindings.p2pclient.Client": {"control"},
}
"""Attributes that we read or set."""

SOURCES = {
    "hivemind.p2p.P2P.__init__": "a83eaaf45423",
    "hivemind.p2p.P2P._make_process_args": "def6fcf33d0d",
    "hivemind.p2p.P2P._terminate": "1d7bc5829e4d",
    "hivemind.p2p.P2P.create": "2e4720e954b7",
    "hivemind.p2p.P2P.shutdown": "c727c4c6e41e",
    "hivemind.p2p.p2p_daemon_bindings.control.ControlClient.connect": "0be03f1f1d91",
    "hivemind.p2p.p2p_daemon_bindings.control.ControlClient.stream_open": "002f5d5b8262",
}
"""Digests of the methods that we replace, extend or imitate, or whose inner workings we rely on."""

PARAMETERS = {
    "hivemind.p2p.P2P.add_binary_stream_handler": "name, handler, balanced=",
    "hivemind.p2p.p2p_daemon_bindings.control.DaemonConnector.open_connection": "",
    "hivemind.p2p.p2p_daemon_bindings.utils.raise_if_failed": "response",
    "hivemind.p2p.p2p_daemon_bindings.utils.read_pbmsg_safe": "stream, pbmsg",
    "hivemind.p2p.p2p_daemon_bindings.utils.write_pbmsg": "stream, pbmsg",
    "hivemind.utils.logging.use_hivemind_log_handler": "where",
}
"""The parameters of what we call; `=` marks those with a default."""

KEYWORDS = {
    "hivemind.p2p.P2P.create": {
        "announce_maddrs",
        "auto_nat",
        "check_if_identity_free",
        "dht_mode",
        "force_reachability",
        "host_maddrs",
        "identity_path",
        "nat_port_map",
        "no_listen",
        "startup_timeout",
        "trusted_relays",
        "use_auto_relay",
        "use_relay",
    },
}
"""The keywords that we pass to functions with many parameters."""

MESSAGES = {
    "hivemind.proto.p2pd_pb2.ConnectRequest": {"addrs", "peer", "timeout"},
    "hivemind.proto.p2pd_pb2.Request": {"connect", "streamOpen", "type"},
    "hivemind.proto.p2pd_pb2.StreamOpenRequest": {"peer", "proto", "timeout"},
}
"""Message fields that we set or read."""


def test_installed_hivemind_is_the_pinned_one() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    wanted = [line for lines in (project["dependencies"], *extras) for line in lines]
    pins = [line.partition(";")[0] for line in wanted if line.startswith("hivemind")]
    assert pins == [f"hivemind=={PINNED}"] * 2, "for p2pd, and for tests"
    assert version("hivemind") == PINNED
    advice = [*(ROOT / "docs").rglob("*.md"), *(ROOT / "peer").rglob("*.py")]
    named = [found for path in advice for found in re.findall(r"hivemind==([\d.]*\d)", path.read_text())]
    assert named == [PINNED] * len(named)
    assert len(named) >= 2  # how to reinstall p2pd: in an error, and in the troubleshooting page


def test_what_we_import_is_there() -> None:
    wanted = {f"{module}.{name}" for module, names in IMPORTED.items() for name in names}
    _expect_none("gone", [name for name in wanted if not _exists(*name.rsplit(".", 1))])


@pytest.mark.parametrize("names", [PRIVATE, UNDOCUMENTED], ids=["private", "undocumented"])
def test_attributes_that_we_use_are_there(names: Mapping[str, set[str]]) -> None:
    wanted = [(owner, name) for owner, found in names.items() for name in found]
    _expect_none("gone", [f"{owner}.{name}" for owner, name in wanted if not _exists(owner, name)])


def test_hivemind_has_what_it_defines_for_those_who_ask_for_it() -> None:
    """This holds although the package's own code is not run when its parts are imported."""
    assert pkgutil.resolve_name("hivemind:DHT") is pkgutil.resolve_name("hivemind.dht:DHT")
    with pytest.raises(AttributeError, match="nothing"):
        pkgutil.resolve_name("hivemind:nothing")


def test_a_class_attribute_says_where_sockets_are() -> None:
    assert pkgutil.resolve_name("hivemind.p2p.P2P")._UNIX_SOCKET_PREFIX == "/unix/tmp/hivemind-"


def test_messages_have_the_fields_that_we_use() -> None:
    fields = {name: set(pkgutil.resolve_name(name).DESCRIPTOR.fields_by_name) for name in MESSAGES}
    _expect_none("gone", [f"{name}.{f}" for name, used in MESSAGES.items() for f in used - fields[name]])


def test_methods_that_we_replace_have_not_changed() -> None:
    now = {name: _digest(name) for name in SOURCES}
    _expect_none("changed", [f"{name} (now {now[name]})" for name in SOURCES if now[name] != SOURCES[name]])


def test_what_we_call_takes_the_same_parameters() -> None:
    now = {name: _parameters(name) for name in PARAMETERS}
    changed = [name for name in PARAMETERS if now[name] != PARAMETERS[name]]
    _expect_none("changed", [f"{name}({PARAMETERS[name]}), now ({now[name]})" for name in changed])
    taken = {name: set(inspect.signature(pkgutil.resolve_name(name)).parameters) for name in KEYWORDS}
    _expect_none("gone", [f"{name}({p}=)" for name, used in KEYWORDS.items() for p in used - taken[name]])


def test_classes_override_only_what_is_listed() -> None:
    listed = {*SOURCES, *(f"{owner}.{name}" for owner, names in PRIVATE.items() for name in names)}
    listed |= {f"{owner}.{name}" for owner, names in UNDOCUMENTED.items() for name in names}
    found = {f"{_name(base)}.{name}" for base, name in _overridden()}
    assert found, "the scan finds nothing"
    _expect_none("not listed", found - {_canonical(name) for name in listed})


def test_hivemind_is_imported_where_it_is_listed_and_nowhere_else() -> None:
    imported: dict[str, set[str]] = {}
    importers = set()
    for path, tree in _files(*PRODUCT, *BESIDE, with_one_of=("hivemind",)):
        for module, names in _imports(tree):
            importers.add(path)
            if path in FENCE:
                imported.setdefault(module, set()).update(names)
    _expect_none("must not import hivemind", importers - {_here(), *FENCE, *ALSO_IMPORT})
    _expect_none("no longer imports hivemind", {*FENCE, *ALSO_IMPORT} - importers)
    assert imported == IMPORTED


def test_no_name_is_patched_in_tests() -> None:
    """Such as `patch("hivemind…")`, which no import reveals."""
    found = set()
    for path, tree in _files(*PRODUCT, *BESIDE, with_one_of=("hivemind",)):
        if path != _here():
            found |= {text for text in _texts(tree) if re.fullmatch(r"hivemind(\.\w+){2,}", text)}
    _expect_none("patched", found)


def test_private_names_are_used_where_they_are_listed_and_nowhere_else() -> None:
    listed = set().union(*PRIVATE.values())
    overridden = {name for _, name in _overridden()}
    used = set().union(*(_foreign(tree) for _, tree in _files("peer/transport")))
    elsewhere = [
        f"{path}: {name}"
        for path, tree in _files(*PRODUCT, with_one_of=sorted(listed))
        if not path.startswith("peer/transport/")
        for name in _foreign(tree) & listed
    ]
    _expect_none("not listed", used - listed)
    _expect_none("listed but not used", listed - used - overridden)
    _expect_none("used outside the fence", elsewhere)


def _expect_none(what: str, found: Iterable[str]) -> None:
    """Fails if anything was found. Shows all of it, where pytest would shorten the list."""
    lines = [f"{what}: {name}" for name in sorted(found)]
    assert not lines, "\n".join(["", *lines])


def _here() -> str:
    return str(Path(__file__).relative_to(ROOT))


def _exists(owner: str, name: str) -> bool:
    """Whether the attribute exists, including those that only instances have."""
    try:
        found = pkgutil.resolve_name(owner)
    except (ImportError, AttributeError):
        return False
    if hasattr(found, name) or not isinstance(found, type):
        return hasattr(found, name)
    if name in getattr(found, "__annotations__", {}):
        return True
    return re.search(rf"\bself\.{name}\b[^\n(]*=", inspect.getsource(found)) is not None


def _digest(name: str) -> str:
    try:
        source = inspect.getsource(pkgutil.resolve_name(name))
    except (ImportError, AttributeError):
        return "it is gone"
    return hashlib.sha256(source.encode()).hexdigest()[:12]


def _parameters(name: str) -> str:
    try:
        parameters = inspect.signature(pkgutil.resolve_name(name)).parameters
    except (ImportError, AttributeError):
        return "it is gone"
    written = [f"{p.name}=" if p.default is not p.empty else p.name for p in parameters.values()]
    return ", ".join(name for name in written if name != "self")


def _name(found: type) -> str:
    return f"{found.__module__}.{found.__qualname__}"


def _canonical(name: str) -> str:
    """The place of the definition: `hivemind.p2p.P2P` comes from a module below."""
    owner, _, last = name.rpartition(".")
    found = pkgutil.resolve_name(owner)
    return f"{_name(found)}.{last}" if isinstance(found, type) else name


def _overridden() -> Iterator[tuple[type, str]]:
    """The hivemind class and the attribute, for everything that our subclasses override."""
    for path, tree in _files("peer/transport"):
        module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                for base in _hivemind_bases(module, node):
                    for name in _defined(node):
                        if name not in {"__module__", "__doc__"} and (owner := _owner(base, name)):
                            yield owner, name


def _hivemind_bases(module: ModuleType, node: ast.ClassDef) -> Iterator[type]:
    for base in node.bases:
        found = getattr(module, base.id, None) if isinstance(base, ast.Name) else None
        if isinstance(found, type) and any(c.__module__.startswith("hivemind.") for c in found.__mro__):
            yield found


def _owner(found: type, name: str) -> type | None:
    for base in found.__mro__:
        if base.__module__.startswith("hivemind.") and (name in vars(base) or _is_set_by(base, name)):
            return base
    return None


def _is_set_by(found: type, name: str) -> bool:
    return re.search(rf"\bself\.{name}\b[^\n(]*=", inspect.getsource(found)) is not None


def _defined(node: ast.ClassDef) -> set[str]:
    names = {n.name for n in node.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)}
    names |= {
        n.target.id for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)
    }
    return names | {
        target.id
        for n in node.body
        if isinstance(n, ast.Assign)
        for target in n.targets
        if isinstance(target, ast.Name)
    }


def _files(*folders: str, with_one_of: Sequence[str] = ("",)) -> Iterator[tuple[str, ast.Module]]:
    """The files that contain one of these words. Parsing all files would take half a minute."""
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            text = path.read_text()
            if any(word in text for word in with_one_of):
                yield str(path.relative_to(ROOT)), ast.parse(text)


def _imports(tree: ast.Module) -> Iterator[tuple[str, set[str]]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and _is_hivemind(node.module):
            yield node.module, {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if _is_hivemind(alias.name):
                    yield alias.name, set()


def _is_hivemind(module: str) -> bool:
    return module.split(".")[0] == "hivemind"


def _texts(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def _foreign(tree: ast.Module) -> set[str]:
    """Attributes with a leading underscore that no class of the module defines, in its body or its `__init__`."""
    own: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            own |= _defined(node)
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and method.name == "__init__":
                    own.update(_set_on_self(method))
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return {name for name in used if re.match(r"_[a-z]", name)} - own


def _set_on_self(method: ast.FunctionDef) -> set[str]:
    return {
        node.attr
        for node in ast.walk(method)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }
