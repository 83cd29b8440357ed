# Written by tools/grpc_types.py: `make proto`.
from typing import Any

import grpc

from peer.wire import session_pb2

class SessionServiceStub:
    def __init__(self, channel: grpc.aio.Channel) -> None: ...
    Challenge: grpc.aio.UnaryUnaryMultiCallable[session_pb2.ChallengeRequest, session_pb2.ChallengeReply]
    Open: grpc.aio.UnaryUnaryMultiCallable[session_pb2.OpenRequest, session_pb2.OpenReply]

class SessionServiceServicer:
    def Challenge(self, request: Any, context: Any) -> Any: ...
    def Open(self, request: Any, context: Any) -> Any: ...

def add_SessionServiceServicer_to_server(
    servicer: SessionServiceServicer, server: grpc.aio.Server
) -> None: ...
