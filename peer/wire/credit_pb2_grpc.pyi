# Written by tools/grpc_types.py: `make proto`.
from typing import Any

import grpc

from peer.wire import credit_pb2

class CreditServiceStub:
    def __init__(self, channel: grpc.aio.Channel) -> None: ...
    Give: grpc.aio.UnaryUnaryMultiCallable[credit_pb2.SignedReceipt, credit_pb2.GiveReply]
    List: grpc.aio.UnaryUnaryMultiCallable[credit_pb2.ListRequest, credit_pb2.ListReply]

class CreditServiceServicer:
    def Give(self, request: Any, context: Any) -> Any: ...
    def List(self, request: Any, context: Any) -> Any: ...

def add_CreditServiceServicer_to_server(
    servicer: CreditServiceServicer, server: grpc.aio.Server
) -> None: ...
