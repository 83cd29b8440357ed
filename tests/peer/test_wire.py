"""The generated code matches proto/, and every field there has a comment that says what it means."""

import re
import runpy
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2
from google.protobuf.descriptor import FileDescriptor
from packaging.requirements import Requirement
from packaging.version import Version

from peer.wire import (
    admission_pb2,
    contact_pb2,
    credit_pb2,
    dense_pb2,
    dht_pb2,
    expert_pb2,
    memory_pb2,
    probe_pb2,
    records_pb2,
    relay_pb2,
    session_pb2,
    state_pb2,
)

ROOT = Path(__file__).parents[2]
COMMITTED = {
    "admission": admission_pb2.DESCRIPTOR,
    "contact": contact_pb2.DESCRIPTOR,
    "credit": credit_pb2.DESCRIPTOR,
    "dense": dense_pb2.DESCRIPTOR,
    "dht": dht_pb2.DESCRIPTOR,
    "expert": expert_pb2.DESCRIPTOR,
    "memory": memory_pb2.DESCRIPTOR,
    "probe": probe_pb2.DESCRIPTOR,
    "records": records_pb2.DESCRIPTOR,
    "relay": relay_pb2.DESCRIPTOR,
    "session": session_pb2.DESCRIPTOR,
    "state": state_pb2.DESCRIPTOR,
}


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make proto` would generate now, and the compiler's own description of it."""
    folder = tmp_path_factory.mktemp("generated")
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-Ipeer/wire={ROOT / 'proto'}"]
    command += [f"--{kind}_out={folder}" for kind in ("python", "pyi", "grpc_python")]
    command += [f"--descriptor_set_out={folder / 'set'}", "--include_source_info"]
    subprocess.run([*command, *(f"peer/wire/{name}.proto" for name in COMMITTED)], check=True)
    return folder


@pytest.fixture(scope="module")
def described(generated: Path) -> dict[str, descriptor_pb2.FileDescriptorProto]:
    found = descriptor_pb2.FileDescriptorSet.FromString((generated / "set").read_bytes())
    return {Path(file.name).stem: file for file in found.file}


def test_every_proto_file_has_generated_code() -> None:
    assert {path.stem for path in (ROOT / "proto").glob("*.proto")} == set(COMMITTED)
    assert {path.stem.removesuffix("_pb2") for path in (ROOT / "peer/wire").glob("*_pb2.py")} == set(
        COMMITTED
    )


def test_the_oldest_grpcio_that_is_allowed_takes_the_generated_code() -> None:
    code = "\n".join(path.read_text() for path in (ROOT / "peer/wire").glob("*_pb2_grpc.py"))
    needed = max(map(Version, re.findall(r"GRPC_GENERATED_VERSION = '(.+)'", code)))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (grpcio,) = (r for r in map(Requirement, project["dependencies"]) if r.name == "grpcio")
    assert min(Version(each.version) for each in grpcio.specifier) >= needed


@pytest.mark.parametrize("name", COMMITTED)
def test_committed_descriptors_are_those_of_proto(
    name: str, described: dict[str, descriptor_pb2.FileDescriptorProto]
) -> None:
    fresh = descriptor_pb2.FileDescriptorProto()
    fresh.CopyFrom(described[name])
    fresh.ClearField("source_code_info")
    for message in fresh.message_type:
        for field in message.field:
            field.ClearField("json_name")  # protoc fills it in here only
    assert fresh.SerializeToString(deterministic=True) == serialized(COMMITTED[name])


def serialized(file: FileDescriptor) -> bytes:
    proto = descriptor_pb2.FileDescriptorProto()
    file.CopyToProto(proto)
    return proto.SerializeToString(deterministic=True)


def significant(path: Path, pattern: str) -> list[str]:
    return re.findall(pattern, path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "name", ["credit", "dense", "expert", "memory", "probe", "relay", "session", "state"]
)
def test_committed_stubs_call_what_the_service_has(generated: Path, name: str) -> None:
    pattern = r"'/talkoot[^']*'|\w+__pb2\.\w+\.(?:FromString|SerializeToString)|stream_\w+|unary_\w+"
    fresh = significant(generated / f"peer/wire/{name}_pb2_grpc.py", pattern)
    assert any(f"/talkoot.v1.{name.title()}Service/" in path for path in fresh)
    assert significant(ROOT / f"peer/wire/{name}_pb2_grpc.py", pattern) == fresh


@pytest.mark.parametrize("name", COMMITTED)
def test_committed_types_are_those_of_proto(name: str, generated: Path) -> None:
    pattern = r"class \w+|    \w+: [^\n]+"
    fresh = significant(generated / f"peer/wire/{name}_pb2.pyi", pattern)
    assert len(fresh) > 10
    assert significant(ROOT / f"peer/wire/{name}_pb2.pyi", pattern) == fresh


@pytest.mark.parametrize(
    "name", [name for name, file in COMMITTED.items() if file.services_by_name and name != "dht"]
)
def test_committed_types_of_calls_are_those_of_proto(name: str) -> None:
    types_of = runpy.run_path(str(ROOT / "tools" / "grpc_types.py"))["types_of"]
    assert (ROOT / f"peer/wire/{name}_pb2_grpc.pyi").read_text(encoding="utf-8") == types_of(COMMITTED[name])


def paths(file: descriptor_pb2.FileDescriptorProto) -> Iterator[tuple[str, Sequence[int]]]:
    """Everything that needs a comment: its name, and its path in the source code info (descriptor.proto)."""
    for m, message in enumerate(file.message_type):
        for f, field in enumerate(message.field):
            yield f"{message.name}.{field.name}", [4, m, 2, f]
        assert not message.nested_type, "nested messages are not looked at here"
    for e, enum in enumerate(file.enum_type):
        yield enum.name, [5, e]
        for v, value in enumerate(enum.value):
            yield f"{enum.name}.{value.name}", [5, e, 2, v]
    for s, service in enumerate(file.service):
        for r, method in enumerate(service.method):
            yield f"{service.name}.{method.name}", [6, s, 2, r]


@pytest.mark.parametrize("name", COMMITTED)
def test_every_field_value_and_call_has_a_comment(
    name: str, described: dict[str, descriptor_pb2.FileDescriptorProto]
) -> None:
    file = described[name]
    commented = {
        tuple(location.path)
        for location in file.source_code_info.location
        if location.leading_comments.strip()
    }
    named = dict(paths(file))
    assert len(named) > 5
    assert [what for what, path in named.items() if tuple(path) not in commented] == []
