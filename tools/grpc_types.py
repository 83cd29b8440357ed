"""Writes type stubs for the generated gRPC modules in peer/wire/, since grpc's plugin writes none.

python tools/grpc_types.py FOLDER
"""

import sys
from importlib import import_module
from pathlib import Path

from google.protobuf.descriptor import Descriptor, FileDescriptor, MethodDescriptor, ServiceDescriptor

_HEAD = "# Written by tools/grpc_types.py: `make proto`.\n"


def types_of(file: FileDescriptor) -> str:
    """The stub file of the module that grpc's plugin writes for a .proto file."""
    messages = [
        message
        for service in file.services_by_name.values()
        for method in service.methods
        for message in (method.input_type, method.output_type)
    ]
    modules = sorted({_module(message) for message in messages})
    imports = f"from typing import Any\n\nimport grpc\n\nfrom peer.wire import {', '.join(modules)}\n"
    return "\n".join([_HEAD + imports, *map(_service, file.services_by_name.values())])


def _service(service: ServiceDescriptor) -> str:
    stub = "".join(f"    {method.name}: {_multi_callable(method)}\n" for method in service.methods)
    servicer = "".join(map(_handler, service.methods))
    return (
        f"class {service.name}Stub:\n"
        f"    def __init__(self, channel: grpc.aio.Channel) -> None: ...\n{stub}\n"
        f"class {service.name}Servicer:\n{servicer}\n"
        f"def add_{service.name}Servicer_to_server(\n"
        f"    servicer: {service.name}Servicer, server: grpc.aio.Server\n) -> None: ...\n"
    )


def _multi_callable(method: MethodDescriptor) -> str:
    kinds = ("Unary", "Stream")
    kind = kinds[method.client_streaming] + kinds[method.server_streaming]
    return f"grpc.aio.{kind}MultiCallable[{_name(method.input_type)}, {_name(method.output_type)}]"


def _handler(method: MethodDescriptor) -> str:
    argument = "request_iterator" if method.client_streaming else "request"
    return f"    def {method.name}(self, {argument}: Any, context: Any) -> Any: ...\n"


def _module(message: Descriptor) -> str:
    return Path(message.file.name).stem + "_pb2"


def _name(message: Descriptor) -> str:
    return f"{_module(message)}.{message.name}"


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for path in sorted(folder.glob("*_pb2_grpc.py")):
        name = path.stem.removesuffix("_grpc")
        descriptor = import_module(f"peer.wire.{name}").DESCRIPTOR
        path.with_suffix(".pyi").write_text(types_of(descriptor), encoding="utf-8")
