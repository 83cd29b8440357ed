# Written by tools/grpc_types.py: `make proto`.
from typing import Any

import grpc

from peer.wire import memory_pb2, state_pb2

class MemoryServiceStub:
    def __init__(self, channel: grpc.aio.Channel) -> None: ...
    Search: grpc.aio.UnaryUnaryMultiCallable[memory_pb2.SearchRequest, memory_pb2.SearchReply]
    Read: grpc.aio.UnaryUnaryMultiCallable[memory_pb2.ReadRequest, memory_pb2.ReadReply]
    FetchPart: grpc.aio.UnaryStreamMultiCallable[memory_pb2.FetchPartRequest, state_pb2.FetchReply]

class MemoryServiceServicer:
    def Search(self, request: Any, context: Any) -> Any: ...
    def Read(self, request: Any, context: Any) -> Any: ...
    def FetchPart(self, request: Any, context: Any) -> Any: ...

def add_MemoryServiceServicer_to_server(
    servicer: MemoryServiceServicer, server: grpc.aio.Server
) -> None: ...
