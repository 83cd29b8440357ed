# Written by tools/grpc_types.py: `make proto`.
from typing import Any

import grpc

from peer.wire import relay_pb2

class RelayServiceStub:
    def __init__(self, channel: grpc.aio.Channel) -> None: ...
    Reserve: grpc.aio.StreamStreamMultiCallable[relay_pb2.ReserveRequest, relay_pb2.ReserveReply]
    Dial: grpc.aio.UnaryStreamMultiCallable[relay_pb2.DialRequest, relay_pb2.DialReply]

class RelayServiceServicer:
    def Reserve(self, request_iterator: Any, context: Any) -> Any: ...
    def Dial(self, request: Any, context: Any) -> Any: ...

def add_RelayServiceServicer_to_server(
    servicer: RelayServiceServicer, server: grpc.aio.Server
) -> None: ...
