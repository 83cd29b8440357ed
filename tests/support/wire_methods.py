"""The methods of all services that Talkoot's servers offer, for tests that try each of them."""

import importlib
import pkgutil

from google.protobuf.descriptor import MethodDescriptor
from grpc_health.v1 import health_pb2

import peer.wire


def all_methods() -> list[MethodDescriptor]:
    names = [
        module.name for module in pkgutil.iter_modules(peer.wire.__path__) if module.name.endswith("_pb2")
    ]
    modules = [importlib.import_module(f"peer.wire.{name}") for name in names]
    services = [
        service
        for module in (health_pb2, *modules)
        for service in module.DESCRIPTOR.services_by_name.values()
    ]
    return [method for service in services for method in service.methods]


def name_of(method: MethodDescriptor) -> str:
    return f"{method.containing_service.full_name}/{method.name}"
