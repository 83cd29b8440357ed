"""Whatever the other side of a transfer sends, only the whole state of that expert is accepted."""

import asyncio
import hashlib
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from checkpoint_samples import AN_UID, OTHER_UID, assert_same, make_expert
from garbage_server import garbage_server
from grpc import StatusCode
from state_peers import CHUNK, SWARM, Replies, Scenario, Street, header_of, packed, playing, read_all

from expert_server.probe import call_dial_back, call_probe
from expert_server.state.servicer import FetchHint
from peer import PROTOCOL_VERSION
from peer.errors import StateError, TransferError, UnreachableError
from peer.identity import Identity
from peer.loop import LoopThread
from peer.metrics import total
from peer.rpc import transfer
from peer.rpc.channels import Contact
from peer.rpc.transfer import SnapshotReceiver
from peer.wire import state_pb2, state_pb2_grpc


@pytest.fixture
def play(loop: LoopThread, identity: Identity, monkeypatch: pytest.MonkeyPatch) -> Callable[[Scenario], None]:
    return playing(loop, identity, monkeypatch)


def test_a_state_that_ends_before_its_header_or_its_end_is_refused() -> None:
    incoming = SnapshotReceiver(1000, lambda size: None)
    with pytest.raises(StateError, match="is incomplete"):
        incoming.whole()
    incoming.begin(state_pb2.StateHeader(total_bytes=2, sha256=hashlib.sha256(b"x").digest()))
    incoming.take(b"x")
    with pytest.raises(StateError, match="is incomplete"):
        incoming.whole()


class Liar(state_pb2_grpc.StateServiceServicer):
    """A server that answers as it is told, and counts."""

    def __init__(self, *answers: Callable[[state_pb2.FetchRequest], Replies]) -> None:
        self.requests: list[state_pb2.FetchRequest] = []
        self._answers = answers

    async def Fetch(self, request: state_pb2.FetchRequest, context: Any) -> Replies:
        answer = self._answers[min(len(self.requests), len(self._answers) - 1)]
        self.requests.append(request)
        async for reply in answer(request):
            yield reply


def sends(
    data: bytes, stop_at: int | None = None, error: bool = False, **changes: Any
) -> Callable[[state_pb2.FetchRequest], Replies]:
    """Sends the bytes from the offset on, up to `stop_at`, with a changed header."""

    async def answer(request: state_pb2.FetchRequest) -> Replies:
        yield header_of(data, **changes)
        end = len(data) if stop_at is None else stop_at
        for start in range(request.offset, end, CHUNK):
            yield state_pb2.FetchReply(chunk=data[start : min(start + CHUNK, end)])
        if error:
            raise ConnectionError("cut off")

    return answer


async def says(*replies: state_pb2.FetchReply) -> Replies:
    for reply in replies:
        yield reply


def test_a_fetch_that_is_cut_off_goes_on_where_it_was(play: Callable[[Scenario], None]) -> None:
    async def scenario(street: Street) -> None:
        expert = make_expert(3)
        data = packed(expert)
        liar = Liar(sends(data, 2500, error=True), sends(data, 4700), sends(data))
        await street.serve(liar)
        fetched = await street.client.fetch(street.node, AN_UID)
        assert_same(fetched.checkpoint.state, expert.export_state())
        assert [request.offset for request in liar.requests] == [0, 2500, 4700]
        assert [request.sha256 for request in liar.requests[1:]] == [hashlib.sha256(data).digest()] * 2
        assert total(street.client.metrics.bytes, direction="received") == len(data)

    play(scenario)


DATA = packed(make_expert(3))


WRONG: dict[str, tuple[Callable[[state_pb2.FetchRequest], Replies], str]] = {
    "claims 1 GB": (sends(DATA, total_bytes=2**30), "the state has 1073741824 bytes, more than"),
    "a wrong checksum": (sends(DATA, sha256=bytes(32)), "checksum does not match"),
    "a flipped bit": (sends(DATA[:-1] + bytes([DATA[-1] ^ 1]), sha256=hashlib.sha256(DATA).digest()), "checksum"),
    "longer": (sends(DATA, total_bytes=len(DATA) - 700), "longer than its header says"),
    "another swarm's": (sends(packed(make_expert(3), "banya-QmOther")), "its swarm is banya-QmOther"),
    "another expert's": (sends(packed(make_expert(3, OTHER_UID))), r"its expert is 0\.1\.1, not 1\.0\.1"),
    "another count": (sends(DATA, update_count=4), "its update count is 3, not 4"),
    "too many updates": (sends(DATA, update_count=10**18), "more than are possible"),
    "garbage": (sends(b"garbage" * 100), "can't be read"),
    "no header": (lambda _: says(state_pb2.FetchReply(chunk=b"1")), "must begin with its header"),
    "two headers": (lambda _: says(header_of(DATA), header_of(DATA)), "after the header come chunks"),
    "an empty chunk": (lambda _: says(header_of(DATA), state_pb2.FetchReply(chunk=b"")), "after the header"),
    "nothing in it": (lambda _: says(state_pb2.FetchReply()), "must begin with its header"),
}  # fmt: skip


@pytest.mark.parametrize(("answer", "reason"), WRONG.values(), ids=WRONG)
def test_what_is_not_that_experts_state_is_refused(
    play: Callable[[Scenario], None], answer: Callable[[state_pb2.FetchRequest], Replies], reason: str
) -> None:
    async def scenario(street: Street) -> None:
        liar = Liar(answer)
        await street.serve(liar)
        with pytest.raises(StateError, match=reason):
            await street.client.fetch(street.node, AN_UID)
        assert len(liar.requests) == 1, "a liar is not asked again"
        fetches = street.client.metrics.fetches
        outcomes = [total(fetches, outcome=outcome) for outcome in ("fetched", "failed", "broken")]
        assert outcomes == [0, 0, 1]

    play(scenario)


def test_a_peer_that_answers_with_no_messages_is_refused_and_leaves_no_trace_in_the_log(
    play: Callable[[Scenario], None], caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(street: Street) -> None:
        async with garbage_server(street.identity, street.certificate) as street.port:
            with pytest.raises(StateError, match="must begin with its header"):
                await street.client.fetch(street.node, AN_UID)
            assert not await street.client.ask(street.node, state_pb2.ASK_REASON_ADOPT, [AN_UID])
            channel = await street.client._service.channels.reach(street.node)
            with pytest.raises(UnreachableError):
                await call_probe(channel, SWARM)
            with pytest.raises(UnreachableError, match="no IP address"):
                await call_dial_back(channel, SWARM, 4711)

    play(scenario)
    assert caplog.messages == []


def test_a_stream_that_always_ends_early_is_given_up(play: Callable[[Scenario], None]) -> None:
    async def scenario(street: Street) -> None:
        liar = Liar(sends(DATA, 1500))
        await street.serve(liar)
        with pytest.raises(TransferError, match="the stream ended early"):
            await street.client.fetch(street.node, AN_UID)
        assert 1 < len(liar.requests) < 10
        assert total(street.client.metrics.fetches, outcome="failed") == 1

    play(scenario)


def test_a_fetch_that_stalls_ends_in_time(
    play: Callable[[Scenario], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(street: Street) -> None:
        async def stall(_: state_pb2.FetchRequest) -> Replies:
            yield header_of(DATA)
            await asyncio.Event().wait()

        await street.serve(Liar(stall))
        service = street.client._service
        street.client._service = replace(service, limit_s=0.5)
        with pytest.raises(TransferError, match="within"):
            await street.client.fetch(street.node, AN_UID)
        monkeypatch.setattr("peer.rpc.transfer.GRACE_S", 0.3)
        street.client._service = service
        with pytest.raises(TransferError, match="stalled"):
            await street.client.fetch(street.node, AN_UID)

    play(scenario)


def test_a_node_that_says_nothing_is_asked_once(
    play: Callable[[Scenario], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(street: Street) -> None:
        service = street.client._service
        reach, asked = service.channels.reach, 0

        async def count(peer: Contact) -> grpc.aio.Channel:
            nonlocal asked
            asked += 1
            return await reach(peer)

        monkeypatch.setattr(service.channels, "reach", count)
        street.client._service = replace(service, open_s=0.5)
        with socket.create_server(("127.0.0.1", 0)) as silent:
            street.port = silent.getsockname()[1]
            with pytest.raises(TransferError, match="no connection to"):
                await street.client.fetch(street.node, AN_UID)
        assert asked == 1

    play(scenario)


REFUSED: dict[str, tuple[dict[str, Any], StatusCode]] = {
    "version": ({"protocol_version": 99}, StatusCode.FAILED_PRECONDITION),
    "swarm": ({"swarm_id": "banya"}, StatusCode.FAILED_PRECONDITION),
    "uid": ({"uid": "../etc/passwd"}, StatusCode.INVALID_ARGUMENT),
    "off the grid": ({"uid": "7.0.0"}, StatusCode.INVALID_ARGUMENT),
    "offset without a snapshot": ({"offset": 5}, StatusCode.INVALID_ARGUMENT),
    "unknown snapshot": ({"sha256": bytes(32)}, StatusCode.FAILED_PRECONDITION),
}


@pytest.mark.parametrize(("changes", "status"), REFUSED.values(), ids=REFUSED)
def test_a_wrong_request_is_refused(
    play: Callable[[Scenario], None], changes: dict[str, Any], status: StatusCode
) -> None:
    async def scenario(street: Street) -> None:
        await street.host(make_expert(1))
        stub = await street.stub()
        right: dict[str, Any] = {
            "protocol_version": PROTOCOL_VERSION, "swarm_id": SWARM, "uid": str(AN_UID)
        }  # fmt: skip
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await read_all(stub.Fetch(state_pb2.FetchRequest(**right | changes)))
        assert caught.value.code() is status

    play(scenario)


def test_a_node_with_another_certificate_gives_nothing(
    play: Callable[[Scenario], None], tmp_path: Path
) -> None:
    async def scenario(street: Street) -> None:
        await street.host(make_expert(1))
        other = Identity.load_or_create(tmp_path / "b.key")
        street.identity, street.certificate = other, other.make_certificate()
        with pytest.raises(TransferError, match="does not answer at"):
            await street.client.fetch(street.node, AN_UID)

    play(scenario)


def test_after_a_restart_of_the_server_a_fetch_begins_anew(
    play: Callable[[Scenario], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(street: Street) -> None:
        before, after = make_expert(2), make_expert(3)
        liar = Liar(sends(packed(before), 2500, error=True, update_count=2))
        server = await street.serve(liar)
        receive = transfer.receive

        async def receive_and_restart(*arguments: Any) -> None:
            try:
                await receive(*arguments)
            except grpc.aio.AioRpcError:
                if len(street.hints) == 0:
                    street.hints.append(FetchHint(street.identity.peer_id, (), group=""))
                    await server.stop(None)
                    await street.host(after)
                raise

        monkeypatch.setattr(transfer, "receive", receive_and_restart)  # cuts a real call
        fetched = await street.client.fetch(street.node, AN_UID)
        assert len(liar.requests) == 1
        assert fetched.checkpoint.update_count == 3
        assert_same(fetched.checkpoint.state, after.export_state())

    play(scenario)
