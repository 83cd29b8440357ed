# Written by tools/grpc_types.py: `make proto`.
from typing import Any

import grpc

from peer.wire import state_pb2

class StateServiceStub:
    def __init__(self, channel: grpc.aio.Channel) -> None: ...
    Fetch: grpc.aio.UnaryStreamMultiCallable[state_pb2.FetchRequest, state_pb2.FetchReply]
    Ask: grpc.aio.UnaryUnaryMultiCallable[state_pb2.AskRequest, state_pb2.AskReply]

class StateServiceServicer:
    def Fetch(self, request: Any, context: Any) -> Any: ...
    def Ask(self, request: Any, context: Any) -> Any: ...

def add_StateServiceServicer_to_server(
    servicer: StateServiceServicer, server: grpc.aio.Server
) -> None: ...
