# Written by tools/grpc_types.py: `make proto`.
from typing import Any

import grpc

from peer.wire import dense_pb2, state_pb2

class DenseServiceStub:
    def __init__(self, channel: grpc.aio.Channel) -> None: ...
    Exchange: grpc.aio.StreamStreamMultiCallable[dense_pb2.ExchangeRequest, state_pb2.FetchReply]
    Take: grpc.aio.UnaryStreamMultiCallable[dense_pb2.TakeRequest, state_pb2.FetchReply]

class DenseServiceServicer:
    def Exchange(self, request_iterator: Any, context: Any) -> Any: ...
    def Take(self, request: Any, context: Any) -> Any: ...

def add_DenseServiceServicer_to_server(
    servicer: DenseServiceServicer, server: grpc.aio.Server
) -> None: ...
