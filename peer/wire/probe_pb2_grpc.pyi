# Written by tools/grpc_types.py: `make proto`.
from typing import Any

import grpc

from peer.wire import probe_pb2

class ProbeServiceStub:
    def __init__(self, channel: grpc.aio.Channel) -> None: ...
    Probe: grpc.aio.StreamStreamMultiCallable[probe_pb2.ProbeRequest, probe_pb2.ProbeReply]
    DialBack: grpc.aio.UnaryUnaryMultiCallable[probe_pb2.DialBackRequest, probe_pb2.DialBackReply]

class ProbeServiceServicer:
    def Probe(self, request_iterator: Any, context: Any) -> Any: ...
    def DialBack(self, request: Any, context: Any) -> Any: ...

def add_ProbeServiceServicer_to_server(
    servicer: ProbeServiceServicer, server: grpc.aio.Server
) -> None: ...
