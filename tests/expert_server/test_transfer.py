"""States on real sockets: whatever the other side says, only that expert's whole state is taken."""

import asyncio
import contextlib
import hashlib
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from callers import InSession, a_caller
from checkpoint_samples import AN_UID, MANIFEST, OTHER_UID, assert_same, make_expert, step
from grpc import StatusCode

from dht.registry import NodeInfo
from dht.uid import UID
from expert_server.expert import Expert
from expert_server.hints import Hint
from expert_server.runtime import Runtime
from expert_server.state_format import Checkpoint, to_bytes
from expert_server.state_servicer import StateServicer
from expert_server.transfer import SnapshotTaker, StateClient, largest_state_bytes
from peer import PROTOCOL_VERSION, snapshots
from peer.channels import SERVER_OPTIONS, server_credentials
from peer.errors import StateError, TransferError
from peer.identity import Identity, certificate_pem
from peer.loop import LoopThread
from peer.meetings import Meetings
from peer.rates import BURST_S, Rate
from peer.sessions import Sessions, SessionServicer
from peer.snapshots import Snapshots
from peer.wire import session_pb2_grpc, state_pb2, state_pb2_grpc

SWARM = "sauna-QmFounder"
CHUNK = 1000

Replies = AsyncIterator[state_pb2.FetchReply]


@pytest.fixture(scope="module")
def identity(tmp_path_factory: pytest.TempPathFactory) -> Identity:
    return Identity.load_or_create(tmp_path_factory.mktemp("identity") / "a.key")


@dataclass
class Street:
    """Two houses: servers come and go at one address, and a client fetches from there."""

    identity: Identity
    stack: contextlib.AsyncExitStack
    certificate: bytes
    client: StateClient
    down: Rate
    sessions: Sessions
    port: int = 0
    hints: list[Hint] = field(default_factory=list)

    async def serve(self, servicer: Any) -> grpc.aio.Server:
        server = grpc.aio.server(options=SERVER_OPTIONS)
        session_pb2_grpc.add_SessionServiceServicer_to_server(SessionServicer(self.sessions), server)
        state_pb2_grpc.add_StateServiceServicer_to_server(servicer, server)
        credentials = server_credentials(self.identity, self.certificate)
        self.port = server.add_secure_port(f"127.0.0.1:{self.port}", credentials)
        await server.start()
        self.stack.push_async_callback(server.stop, None)
        return server

    async def host(
        self, *experts: Expert, max_transfers: int = 4, limit: int = 4, up: Rate | None = None, **met: int
    ) -> Runtime:
        """A server of these experts as a node has it."""
        runtime = Runtime(
            {expert.uid: expert for expert in experts}, max_queued_rows=9, max_batch_rows=9, threads=1
        )
        await runtime.start()
        self.stack.push_async_callback(runtime.stop)
        meetings: Meetings[UID] = Meetings()
        for update_count in met.values():
            meetings.note(AN_UID, self.identity.peer_id, update_count)
        taker = SnapshotTaker(runtime, Snapshots(limit, 60), SWARM, meetings.of)
        servicer = StateServicer(
            taker, MANIFEST, SWARM, self.client.counts, self.follow, up or Rate(None), self.sessions,
            max_transfers=max_transfers, max_transfer_s=30,
        )  # fmt: skip
        await self.serve(servicer)
        return runtime

    async def stub(self) -> InSession:
        return InSession(*await self.client._stub(self.node))

    def follow(self, hint: Hint) -> int:
        self.hints.append(hint)
        return 1

    @property
    def node(self) -> NodeInfo:
        pem = certificate_pem(self.certificate, self.identity.peer_id)
        address = f"127.0.0.1:{self.port}"
        return NodeInfo(
            self.identity.peer_id, (address,), pem, PROTOCOL_VERSION, "1", 0, 0, 0, 0, 0.0, (), 1e12
        )


Scenario = Callable[[Street], Coroutine[Any, Any, None]]


@pytest.fixture
def play(loop: LoopThread, identity: Identity, monkeypatch: pytest.MonkeyPatch) -> Callable[[Scenario], None]:
    monkeypatch.setattr("peer.snapshots.CHUNK_BYTES", CHUNK)
    monkeypatch.setattr("peer.snapshots._BACKOFF_S", 0.01)

    def run(scenario: Scenario) -> None:
        async def with_street() -> None:
            async with contextlib.AsyncExitStack() as stack:
                down = Rate(None)
                client = StateClient(SWARM, MANIFEST, a_caller(SWARM, identity), down, max_transfer_s=20)
                stack.push_async_callback(client.close)
                sessions = Sessions(SWARM, identity.peer_id)
                await scenario(Street(identity, stack, identity.make_certificate(), client, down, sessions))

        loop.run(with_street(), 60)

    return run


class Liar(state_pb2_grpc.StateServiceServicer):  # type: ignore[misc]  # grpc's plugin writes no types
    """Answers as it is told, and counts."""

    def __init__(self, *answers: Callable[[state_pb2.FetchRequest], Replies]) -> None:
        self.requests: list[state_pb2.FetchRequest] = []
        self._answers = answers

    async def Fetch(self, request: state_pb2.FetchRequest, context: Any) -> Replies:
        answer = self._answers[min(len(self.requests), len(self._answers) - 1)]
        self.requests.append(request)
        async for reply in answer(request):
            yield reply


def packed(expert: Expert, swarm: str = SWARM) -> bytes:
    return to_bytes(Checkpoint(expert.export_state(), expert.update_count), swarm, expert.uid, 1000.0)


def header_of(data: bytes, **changes: Any) -> state_pb2.FetchReply:
    header = state_pb2.StateHeader(
        update_count=3, total_bytes=len(data), sha256=hashlib.sha256(data).digest()
    )
    for name, value in changes.items():
        setattr(header, name, value)
    return state_pb2.FetchReply(header=header)


def sends(
    data: bytes, stop_at: int | None = None, error: bool = False, **changes: Any
) -> Callable[[state_pb2.FetchRequest], Replies]:
    """Sends the bytes from the offset on, up to `stop_at`, with a header that is changed."""

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


def test_a_state_goes_no_faster_than_its_node_may_send(play: Callable[[Scenario], None]) -> None:
    async def scenario(street: Street) -> None:
        expert = make_expert(1)
        size = len(packed(expert))
        up = Rate(size / 0.5)
        await street.host(expert, up=up)
        began = time.monotonic()
        await street.client.fetch(street.node, expert.uid)
        assert time.monotonic() - began >= (0.5 - BURST_S) * 0.9
        assert size == pytest.approx(up.bytes, rel=0.05)  # the time in it has more digits or fewer
        assert up.bytes == street.down.bytes

    play(scenario)


@pytest.mark.parametrize("steps", [0, 3])
def test_a_state_comes_as_it_is(play: Callable[[Scenario], None], steps: int) -> None:
    async def scenario(street: Street) -> None:
        expert = make_expert(steps)
        await street.host(expert, met=2)
        fetched = await street.client.fetch(street.node, AN_UID)
        assert (fetched.checkpoint.update_count, fetched.met_update_count) == (steps, 2)
        assert_same(fetched.checkpoint.state, expert.export_state())
        counts = street.client.counts
        assert (counts.fetched, counts.failed, counts.broken) == (1, 0, 0)
        assert counts.bytes_sent == counts.bytes_received > 2 * CHUNK

    play(scenario)


def test_a_snapshot_can_be_fetched_though_the_expert_goes_on(play: Callable[[Scenario], None]) -> None:
    async def scenario(street: Street) -> None:
        expert = make_expert(1)
        runtime = await street.host(expert, limit=2)
        first = await street.client.fetch(street.node, AN_UID)
        await runtime.run(lambda: step(expert))
        second = await street.client.fetch(street.node, AN_UID)
        again = await street.client.fetch(street.node, AN_UID, first.sha256)
        assert (first.checkpoint.update_count, second.checkpoint.update_count) == (1, 2)
        assert_same(again.checkpoint.state, first.checkpoint.state)
        await runtime.run(lambda: step(expert))
        await street.client.fetch(street.node, AN_UID)
        with pytest.raises(TransferError, match="FAILED_PRECONDITION: that snapshot is kept no more"):
            await street.client.fetch(street.node, AN_UID, first.sha256)

    play(scenario)


def test_what_is_not_hosted_is_not_found(play: Callable[[Scenario], None]) -> None:
    async def scenario(street: Street) -> None:
        await street.host(make_expert(1))
        with pytest.raises(TransferError, match=r"NOT_FOUND: expert 0\.1\.1 is not hosted here"):
            await street.client.fetch(street.node, OTHER_UID)

    play(scenario)


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
        assert street.client.counts.bytes_received == len(data)

    play(scenario)


def test_after_a_restart_of_the_server_a_fetch_begins_anew(
    play: Callable[[Scenario], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(street: Street) -> None:
        before, after = make_expert(2), make_expert(3)
        liar = Liar(sends(packed(before), 2500, error=True, update_count=2))
        server = await street.serve(liar)
        receive = snapshots.receive

        async def receive_and_restart(*arguments: Any) -> None:
            try:
                await receive(*arguments)
            except grpc.aio.AioRpcError:
                if len(street.hints) == 0:
                    street.hints.append(Hint(street.identity.peer_id, ()))
                    await server.stop(None)
                    await street.host(after)
                raise

        monkeypatch.setattr(snapshots, "receive", receive_and_restart)  # cuts a real call
        fetched = await street.client.fetch(street.node, AN_UID)
        assert len(liar.requests) == 1
        assert fetched.checkpoint.update_count == 3
        assert_same(fetched.checkpoint.state, after.export_state())

    play(scenario)


DATA = packed(make_expert(3))
WRONG: dict[str, tuple[Callable[[state_pb2.FetchRequest], Replies], str]] = {
    "claims 1 GB": (sends(DATA, total_bytes=2**30), "a state of 1073741824 bytes; in this swarm at most"),
    "a wrong checksum": (sends(DATA, sha256=bytes(32)), "checksum does not match"),
    "a flipped bit": (sends(DATA[:-1] + bytes([DATA[-1] ^ 1]), sha256=hashlib.sha256(DATA).digest()), "checksum"),
    "longer": (sends(DATA, total_bytes=len(DATA) - 700), "longer than its header says"),
    "another swarm's": (sends(packed(make_expert(3), "banya-QmOther")), "it is of swarm banya-QmOther"),
    "another expert's": (sends(packed(make_expert(3, OTHER_UID))), r"it is of expert 0\.1\.1, not 1\.0\.1"),
    "another count": (sends(DATA, update_count=4), "of update count 3, not 4"),
    "too many updates": (sends(DATA, update_count=10**18), "nobody takes so many"),
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
        counts = street.client.counts
        assert (counts.fetched, counts.failed, counts.broken) == (0, 0, 1)

    play(scenario)


def test_a_stream_that_always_ends_early_is_given_up(play: Callable[[Scenario], None]) -> None:
    async def scenario(street: Street) -> None:
        liar = Liar(sends(DATA, 1500))
        await street.serve(liar)
        with pytest.raises(TransferError, match="the stream ended early"):
            await street.client.fetch(street.node, AN_UID)
        assert 1 < len(liar.requests) < 10
        assert street.client.counts.failed == 1

    play(scenario)


def test_a_fetch_that_stalls_ends_in_time(
    play: Callable[[Scenario], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(street: Street) -> None:
        async def stall(_: state_pb2.FetchRequest) -> Replies:
            yield header_of(DATA)
            await asyncio.Event().wait()

        await street.serve(Liar(stall))
        street.client._max_transfer_s = 0.5
        with pytest.raises(TransferError, match="within"):
            await street.client.fetch(street.node, AN_UID)
        monkeypatch.setattr("peer.snapshots._STALL_S", 0.3)
        street.client._max_transfer_s = 20
        with pytest.raises(TransferError, match="stalled"):
            await street.client.fetch(street.node, AN_UID)

    play(scenario)


def test_only_so_many_fetch_at_once(play: Callable[[Scenario], None]) -> None:
    async def scenario(street: Street) -> None:
        await street.host(make_expert(3), max_transfers=1)
        fetches = [street.client.fetch(street.node, AN_UID) for _ in range(3)]
        assert {f.checkpoint.update_count for f in await asyncio.gather(*fetches)} == {3}
        stub = await street.stub()
        request = state_pb2.FetchRequest(protocol_version=PROTOCOL_VERSION, swarm_id=SWARM, uid=str(AN_UID))
        holding = stub.Fetch(request)
        await holding.read()  # the server is in the middle of it as long as this one reads no further
        calls = [stub.Fetch(request) for _ in range(4)]
        results = await asyncio.gather(*(read_all(call) for call in calls), return_exceptions=True)
        codes = {r.code() for r in results if isinstance(r, grpc.aio.AioRpcError)}
        assert codes <= {StatusCode.RESOURCE_EXHAUSTED}
        assert codes, "five at once, of which one may go on"
        holding.cancel()

    play(scenario)


async def read_all(call: Any) -> int:
    return len([reply async for reply in call])


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


def test_a_hint_is_passed_on_once_it_is_well_formed(play: Callable[[Scenario], None]) -> None:
    async def scenario(street: Street) -> None:
        await street.host(make_expert(1))
        ask = street.client.ask
        me = street.identity.peer_id
        assert await ask(street.node, state_pb2.ASK_REASON_ADOPT, [AN_UID, OTHER_UID]) == 1
        assert await ask(street.node, state_pb2.ASK_REASON_AVERAGE, [AN_UID], b"a" * 32, b"b" * 32) == 1
        right = [Hint(me, (AN_UID, OTHER_UID)), Hint(me, (AN_UID,), b"a" * 32, b"b" * 32)]
        assert street.hints == right
        assert await ask(street.node, state_pb2.ASK_REASON_AVERAGE, [AN_UID], b"short", b"b" * 32) == 0
        assert await ask(street.node, state_pb2.ASK_REASON_UNSPECIFIED, [AN_UID]) == 0
        assert await ask(street.node, state_pb2.ASK_REASON_ADOPT, []) == 0
        assert await ask(street.node, state_pb2.ASK_REASON_ADOPT, [AN_UID] * 257) == 0
        assert street.hints == right

    play(scenario)


def test_a_node_with_another_certificate_gives_nothing(
    play: Callable[[Scenario], None], tmp_path: Path
) -> None:
    async def scenario(street: Street) -> None:
        await street.host(make_expert(1))
        other = Identity.load_or_create(tmp_path / "b.key")
        street.identity, street.certificate = other, other.make_certificate()
        with pytest.raises(TransferError, match="UNAVAILABLE"):
            await street.client.fetch(street.node, AN_UID)

    play(scenario)


def test_the_largest_state_is_not_much_more_than_a_real_one() -> None:
    size = len(packed(make_expert(3)))
    assert size < largest_state_bytes(MANIFEST) < size + 100_000
