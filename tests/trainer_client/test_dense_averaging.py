"""Trainers average their dense parts over real sockets, and whoever does not play by the rules is passed over."""

import asyncio
import contextlib
import random
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import grpc
import pytest
import torch
from grpc import StatusCode
from hivemind.p2p import PeerID
from test_announcing import counts as trainer_counts
from test_dense import make_model, take_step, trained
from torch import nn

from dht.participants import TrainerInfo, read_trainer
from peer import PROTOCOL_VERSION
from peer.channels import server_credentials
from peer.errors import ExpertError, StateError, TransferError
from peer.identity import Identity
from peer.loop import LoopThread
from peer.own_sessions import OwnSessions
from peer.sessions import Metadata, Sessions, SessionServicer
from peer.wire import dense_pb2, dense_pb2_grpc, records_pb2, session_pb2, session_pb2_grpc, state_pb2
from trainer_client.announcing import set_dense, trainer_record
from trainer_client.averaging import Averaging, choose_partner
from trainer_client.dense import DenseForm
from trainer_client.meeting import Theirs
from trainer_client.settings import TrainerSettings
from trainer_client.shared import Merge, SharedPart

SWARM = "sauna-QmFounder"
LOCAL = "127.0.0.1"
LIMIT_S = 30.0

T = TypeVar("T")


@pytest.fixture(scope="module")
def identities(tmp_path_factory: pytest.TempPathFactory) -> list[Identity]:
    folder = tmp_path_factory.mktemp("identities")
    return [Identity.load_or_create(folder / f"{n}.key") for n in range(3)]


class Board:
    """What the DHT would hold of the trainers."""

    def __init__(self) -> None:
        self.records: dict[PeerID, records_pb2.TrainerRecord] = {}

    async def trainer_ids(self) -> frozenset[PeerID]:
        return frozenset(self.records)

    async def trainers(self, peer_ids: Any) -> dict[PeerID, TrainerInfo]:
        return {peer_id: self.info(peer_id) for peer_id in peer_ids}

    def info(self, peer_id: PeerID) -> TrainerInfo:
        payload = records_pb2.RecordPayload(trainer=self.records[peer_id], expires_at=1e12)
        info = read_trainer(payload, peer_id)
        assert info is not None
        return info


@dataclass
class Square:
    """Trainers on one loop."""

    identities: list[Identity]
    stack: contextlib.AsyncExitStack
    board: Board = field(default_factory=Board)
    made: list[Averaging] = field(default_factory=list)

    async def trainer(
        self, model: nn.Module, age: int, *, every: int = 10, reachable: bool = True, deadline_s: float = 10
    ) -> Averaging:
        identity = self.identities[len(self.made)]
        part = SharedPart(model)
        part.age = age
        registry: Any = self.board
        averaging = Averaging(
            part, DenseForm.of(model, SWARM), identity, registry, Sessions(SWARM, identity.peer_id),
            OwnSessions(identity, SWARM, (session_pb2.RIGHT_AVERAGE,)), every=every, look_every_s=0.05,
            deadline_s=deadline_s, rng=random.Random(len(self.made)),
        )  # fmt: skip
        await averaging.start(LOCAL, 0, asyncio.get_running_loop())
        self.stack.push_async_callback(averaging.close)
        self.made.append(averaging)
        self.announce(averaging, reachable)
        return averaging

    def announce(self, averaging: Averaging, reachable: bool = True) -> None:
        record = trainer_record(trainer_counts(), TrainerSettings.load(), 0.0, "")
        set_dense(record, averaging)
        if not reachable:
            del record.addresses[:]
        self.board.records[averaging.peer_id] = record

    def info(self, averaging: Averaging) -> TrainerInfo:
        return self.board.info(averaging.peer_id)

    async def stepping(self, done: Awaitable[T], *parts: SharedPart) -> T:
        """The result of what waits for steps of these."""
        task = asyncio.ensure_future(done)
        async with asyncio.timeout(LIMIT_S):
            while not task.done():
                for part in parts:
                    take_step(part)
                await asyncio.sleep(0.005)
        return await task

    async def until(self, condition: Callable[[], bool], *parts: SharedPart) -> None:
        async with asyncio.timeout(LIMIT_S):
            while not condition():
                await self.stepping(asyncio.sleep(0.005), *parts)


Scenario = Callable[[Square], Coroutine[Any, Any, None]]
Play = Callable[[Scenario], None]


@pytest.fixture
def play(loop: LoopThread, identities: list[Identity], monkeypatch: pytest.MonkeyPatch) -> Play:
    monkeypatch.setattr("peer.snapshots._BACKOFF_S", 0.01)

    def run(scenario: Scenario) -> None:
        async def on_a_square() -> None:
            async with contextlib.AsyncExitStack() as stack:
                await scenario(Square(identities, stack))

        loop.run(on_a_square(), 60)

    return run


def assert_one(*parts: SharedPart) -> None:
    first = parts[0].read().tensors
    for part in parts[1:]:
        for name, tensor in part.read().tensors.items():
            torch.testing.assert_close(tensor, first[name])


def test_one_call_makes_both_the_average(play: Play) -> None:
    """By the steps since they last met: 30 against 10 at first, then 20 against 20."""

    async def scenario(square: Square) -> None:
        one = await square.trainer(trained(make_model(), 1), 30)
        other = await square.trainer(trained(make_model(), 2), 10, reachable=False)
        merge = await square.stepping(other.meet(square.info(one)), one.part, other.part)
        await square.until(lambda: one.counts.averaged == 1, one.part)
        (theirs,) = one.part.take_merges()
        assert merge.share == pytest.approx(0.75, rel=0.1), "a few steps more while they waited"
        assert merge.share + theirs.share == pytest.approx(1)
        assert (merge.peer, theirs.peer) == (one.peer_id.to_base58(), other.peer_id.to_base58())
        assert_one(one.part, other.part)
        assert theirs.difference > 0.05
        # now the two have as many behind them, whoever stepped more while they waited
        one.part.age = other.part.age = 50
        again = await square.stepping(other.meet(square.info(one)), one.part, other.part)
        assert again.share == pytest.approx(0.5, rel=0.1)
        assert again.difference < 1e-3
        assert one.counts.bytes_sent == other.counts.bytes_received

    play(scenario)


def test_who_nobody_reaches_calls_others(play: Play) -> None:
    async def scenario(square: Square) -> None:
        hidden = await square.trainer(trained(make_model(), 1), 10, every=2, reachable=False)
        public = await square.trainer(trained(make_model(), 2), 10, every=2)
        for averaging in (hidden, public):
            running = asyncio.create_task(averaging.run())
            square.stack.callback(running.cancel)
        await square.until(
            lambda: hidden.counts.averaged >= 3 and public.counts.averaged >= 3, hidden.part, public.part
        )
        assert public.counts.failed == 0
        assert_one(hidden.part, public.part)

    play(scenario)


def test_one_meeting_at_a_time(play: Play) -> None:
    async def scenario(square: Square) -> None:
        one = await square.trainer(make_model(), 10)
        other = await square.trainer(make_model(), 10)
        one.meeting.begin()
        with pytest.raises(ExpertError, match="averages with another"):
            await other.meet(square.info(one))
        one.meeting.end()
        other.meeting.begin()
        with pytest.raises(ExpertError, match="averages with another"):
            await other.meet(square.info(one))
        other.meeting.end()
        await square.stepping(other.meet(square.info(one)), one.part, other.part)

    play(scenario)


def test_who_joins_takes_the_oldest_that_it_reaches(play: Play) -> None:
    async def scenario(square: Square) -> None:
        young = await square.trainer(trained(make_model(), 1), 30)
        old = await square.trainer(trained(make_model(), 2), 70)
        joiner = await square.trainer(make_model(), 0)
        assert await joiner.take_freshest() == 70
        assert joiner.part.age == 70
        for name, tensor in joiner.part.read().tensors.items():
            assert torch.equal(tensor, old.part.read().tensors[name]), "to the bit"
        assert (old.counts.given, young.counts.given) == (1, 0)
        # nobody is older now
        assert await joiner.take_freshest() is None

    play(scenario)


def test_who_joins_takes_the_next_when_the_oldest_is_gone_or_useless(play: Play) -> None:
    async def scenario(square: Square) -> None:
        gone = await square.trainer(trained(make_model(), 1), 90)
        await gone.close()
        young = await square.trainer(trained(make_model(), 2), 30)
        joiner = await square.trainer(make_model(), 0)
        assert await joiner.take_freshest() == 30
        assert (joiner.counts.failed, young.counts.given) == (1, 1)
        joiner.part.age = 0
        next(young.part.model.parameters()).data.fill_(torch.nan)
        take_step(young.part)
        assert await joiner.take_freshest() is None
        assert joiner.part.read().tensors["0.weight"].isfinite().all()

    play(scenario)


def test_a_trainer_never_meets_itself_nor_one_of_another_form(play: Play) -> None:
    async def scenario(square: Square) -> None:
        one = await square.trainer(make_model(), 10)
        other = await square.trainer(make_model(width=6), 10)
        await one.look()
        assert one.partners == ()
        snapshot = await one.meeting.snapshot()
        with pytest.raises(TransferError, match="FAILED_PRECONDITION: that is this trainer itself"):
            await one._exchange(square.info(one), snapshot)
        with pytest.raises(
            TransferError, match="FAILED_PRECONDITION: this trainer trains another dense part"
        ):
            await one.meet(square.info(other))

    play(scenario)


def hostile(change: Callable[[nn.Module], object]) -> nn.Module:
    model = trained(make_model(), 1)
    with torch.no_grad():
        change(model)
    return model


HOSTILE: dict[str, Callable[[nn.Module], object]] = {
    "NaN": lambda model: next(model.parameters()).fill_(torch.nan),
    "blown up": lambda model: next(model.parameters()).mul_(1e6),
    "the sign turned": lambda model: [parameter.neg_() for parameter in model.parameters()],
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_dense_part_is_refused_whoever_calls(
    play: Play, change: Callable[[nn.Module], object]
) -> None:
    async def scenario(square: Square) -> None:
        victim = await square.trainer(trained(make_model(), 2), 10)
        villain = await square.trainer(hostile(change), 10**9)
        villain.meeting._open = lambda mine, _: Theirs(mine.tensors, 0, 0.0)  # type: ignore[method-assign, assignment]  # takes all
        before = victim.part.read().tensors
        with pytest.raises(StateError) as refused:
            await square.stepping(victim.meet(square.info(villain)), victim.part)
        victim._note_failure(villain.peer_id, refused.value)
        assert victim.counts.refused == 1
        avoided = victim.meeting.breakers.open_at(time.monotonic())
        assert choose_partner([square.info(villain)], avoided, random.Random(0)) is None
        await square.until(lambda: not villain.meeting.is_on, villain.part)
        with pytest.raises(TransferError, match="PERMISSION_DENIED"):
            await villain.meet(square.info(victim))
        victim.meeting.breakers.succeeded(villain.peer_id)
        with pytest.raises(TransferError, match="INVALID_ARGUMENT"):
            await villain.meet(square.info(victim))
        assert victim.counts.refused == 2
        assert not victim.meeting.is_on
        take_step(victim.part)
        assert all(torch.equal(tensor, before[name]) for name, tensor in victim.part.read().tensors.items())

    play(scenario)


class Liar(dense_pb2_grpc.DenseServiceServicer):  # type: ignore[misc]  # grpc's plugin writes no types
    """Answers with what it was given."""

    def __init__(self, replies: list[state_pb2.FetchReply], hangs: bool = False) -> None:
        self.replies = replies
        self.hangs = hangs

    async def Exchange(self, requests: Any, context: Any) -> Any:
        for reply in self.replies:
            yield reply
        if self.hangs:
            await asyncio.Event().wait()


HEADER = state_pb2.StateHeader(update_count=3, total_bytes=500, sha256=bytes(32))
LIES: dict[str, tuple[list[state_pb2.FetchReply], str]] = {
    "nothing": ([], "must begin with its header"),
    "no header": ([state_pb2.FetchReply(chunk=b"1")], "must begin with its header"),
    "1 GB": ([state_pb2.FetchReply(header=state_pb2.StateHeader(total_bytes=2**30, sha256=bytes(32)))], "at most"),
    "too short": ([state_pb2.FetchReply(header=HEADER), state_pb2.FetchReply(chunk=b"1")], "before it was whole"),
    "too long": ([state_pb2.FetchReply(header=HEADER), state_pb2.FetchReply(chunk=b"1" * 501)], "longer"),
    "garbage": ([state_pb2.FetchReply(header=HEADER), state_pb2.FetchReply(chunk=b"1" * 500)], "checksum"),
}  # fmt: skip


async def lying(square: Square, liar: Liar) -> TrainerInfo:
    """A trainer's record that leads to the liar."""
    honest = await square.trainer(make_model(), 10)
    assert honest._server is not None
    await honest._server.stop(None)
    server = grpc.aio.server()
    opener = SessionServicer(honest.sessions)
    session_pb2_grpc.add_SessionServiceServicer_to_server(opener, server)
    dense_pb2_grpc.add_DenseServiceServicer_to_server(liar, server)
    port = server.add_secure_port(f"{LOCAL}:0", server_credentials(square.identities[0], honest.certificate))
    await server.start()
    square.stack.push_async_callback(server.stop, None)
    return replace(square.info(honest), addresses=(f"{LOCAL}:{port}",))


@pytest.mark.parametrize(("replies", "reason"), LIES.values(), ids=LIES)
def test_what_is_no_dense_part_is_refused(
    play: Play, replies: list[state_pb2.FetchReply], reason: str
) -> None:
    async def scenario(square: Square) -> None:
        info = await lying(square, Liar(replies))
        victim = await square.trainer(make_model(), 10)
        with pytest.raises(StateError, match=reason):
            await victim.meet(info)
        assert not victim.meeting.is_on

    play(scenario)


def test_who_hangs_is_waited_for_so_long_and_no_longer(play: Play) -> None:
    async def scenario(square: Square) -> None:
        info = await lying(square, Liar([state_pb2.FetchReply(header=HEADER)], hangs=True))
        victim = await square.trainer(make_model(), 10, deadline_s=0.3)
        with pytest.raises(TransferError):
            await victim.meet(info)
        assert not victim.meeting.is_on

    play(scenario)


def test_a_caller_that_dies_in_the_middle_costs_nothing(play: Play) -> None:
    """And the other is free for the next."""

    async def scenario(square: Square) -> None:
        one = await square.trainer(trained(make_model(), 1), 10)
        before = one.part.read().tensors
        dying = await square.trainer(trained(make_model(), 2), 10)
        stub, session = await dying._stub(square.info(one))
        call = stub.Exchange(timeout=10, metadata=session)
        snapshot = await dying.meeting.snapshot()
        offer = dense_pb2.DenseOffer(
            protocol_version=PROTOCOL_VERSION, swarm_id=SWARM,
            fingerprint=dying.form.fingerprint, header=snapshot.header(),
        )  # fmt: skip
        await call.write(dense_pb2.ExchangeRequest(offer=offer))
        await call.write(dense_pb2.ExchangeRequest(chunk=snapshot.data[:100]))
        assert (await call.read()).header.update_count == 10
        assert one.meeting.is_on
        call.cancel()
        await square.until(lambda: not one.meeting.is_on, one.part)
        one.meeting.breakers.succeeded(dying.peer_id)
        assert all(torch.equal(tensor, before[name]) for name, tensor in one.part.read().tensors.items())
        await square.stepping(dying.meet(square.info(one)), one.part, dying.part)

    play(scenario)


def test_a_caller_that_stalls_is_let_go_and_left_alone(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or it would keep others from meeting this trainer."""
    monkeypatch.setattr("peer.snapshots._STALL_S", 0.2)

    async def scenario(square: Square) -> None:
        one = await square.trainer(make_model(), 10)
        slow = await square.trainer(make_model(), 10)
        stub, session = await slow._stub(square.info(one))
        call = stub.Exchange(timeout=10, metadata=session)
        offer = dense_pb2.DenseOffer(
            protocol_version=PROTOCOL_VERSION, swarm_id=SWARM, fingerprint=slow.form.fingerprint,
            header=(await slow.meeting.snapshot()).header(),
        )  # fmt: skip
        await call.write(dense_pb2.ExchangeRequest(offer=offer))
        with pytest.raises(grpc.aio.AioRpcError, match="did not come over in time"):
            await read_all(call)
        assert not one.meeting.is_on
        assert slow.peer_id in one.meeting.breakers.open_at(time.monotonic())

    play(scenario)


def test_an_answerer_that_dies_in_the_middle_is_passed_over(play: Play) -> None:
    async def scenario(square: Square) -> None:
        one = await square.trainer(trained(make_model(), 1), 10, every=1)
        await one.close()
        other = await square.trainer(trained(make_model(), 2), 10, every=1)
        running = asyncio.create_task(other.run())
        square.stack.callback(running.cancel)
        await square.until(lambda: other.counts.failed == 1, other.part)
        third = await square.trainer(trained(make_model(), 3), 10, reachable=True)
        await square.until(lambda: other.counts.averaged == 1, other.part, third.part)
        assert other.counts.failed == 1

    play(scenario)


def test_others_calls_are_checked_before_they_cost_anything(play: Play) -> None:
    async def scenario(square: Square) -> None:
        one = await square.trainer(make_model(), 10)
        other = await square.trainer(make_model(), 10)
        stub, session = await other._stub(square.info(one))
        header = (await other.meeting.snapshot()).header()
        right = dense_pb2.DenseOffer(
            protocol_version=PROTOCOL_VERSION, swarm_id=SWARM,
            fingerprint=other.form.fingerprint, header=header,
        )  # fmt: skip
        wrong: dict[StatusCode, list[dict[str, Any]]] = {
            StatusCode.FAILED_PRECONDITION: [
                {"protocol_version": 99},
                {"swarm_id": "banya"},
                {"fingerprint": b""},
            ],
            StatusCode.INVALID_ARGUMENT: [{"header": state_pb2.StateHeader()}],
        }
        for status, changes in wrong.items():
            for change in changes:
                offer = dense_pb2.DenseOffer.FromString(right.SerializeToString())
                for name, value in change.items():
                    offer.ClearField(name)
                    offer.MergeFrom(dense_pb2.DenseOffer(**{name: value}))
                assert await refused(stub, session, dense_pb2.ExchangeRequest(offer=offer)) is status, change
        assert (
            await refused(stub, session, dense_pb2.ExchangeRequest(chunk=b"1")) is StatusCode.INVALID_ARGUMENT
        )
        assert await refused(stub, session, None) is StatusCode.INVALID_ARGUMENT
        assert await refused(stub, (), None) is StatusCode.UNAUTHENTICATED
        assert not one.meeting.is_on

    play(scenario)


async def read_all(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


async def refused(stub: Any, session: Metadata, request: dense_pb2.ExchangeRequest | None) -> StatusCode:
    call = stub.Exchange(timeout=10, metadata=session)
    if request is not None:
        await call.write(request)
    await call.done_writing()
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await read_all(call)
    code: StatusCode = error.value.code()
    return code


def test_merges_are_told_once(play: Play) -> None:
    async def scenario(square: Square) -> None:
        one = await square.trainer(trained(make_model(), 1), 10)
        other = await square.trainer(trained(make_model(), 2), 10)
        await square.stepping(other.meet(square.info(one)), one.part, other.part)
        told: list[Merge] = other.part.take_merges()
        assert [merge.peer for merge in told] == [one.peer_id.to_base58()]
        assert other.part.take_merges() == []

    play(scenario)
