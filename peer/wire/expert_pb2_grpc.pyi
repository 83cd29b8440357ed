# Written by tools/grpc_types.py: `make proto`.
from typing import Any

import grpc

from peer.wire import expert_pb2

class ExpertServiceStub:
    def __init__(self, channel: grpc.aio.Channel) -> None: ...
    Forward: grpc.aio.StreamStreamMultiCallable[expert_pb2.CallRequest, expert_pb2.CallReply]
    Backward: grpc.aio.StreamStreamMultiCallable[expert_pb2.CallRequest, expert_pb2.CallReply]
    Info: grpc.aio.UnaryUnaryMultiCallable[expert_pb2.InfoRequest, expert_pb2.InfoReply]

class ExpertServiceServicer:
    def Forward(self, request_iterator: Any, context: Any) -> Any: ...
    def Backward(self, request_iterator: Any, context: Any) -> Any: ...
    def Info(self, request: Any, context: Any) -> Any: ...

def add_ExpertServiceServicer_to_server(
    servicer: ExpertServiceServicer, server: grpc.aio.Server
) -> None: ...
