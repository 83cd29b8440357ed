"""Trainers that break off, hang or lie do no harm to others, over real sockets."""

import asyncio
import hashlib
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import grpc
import pytest
import torch
from dense_trainers import LOCAL, SWARM, Play, Square, ended, identities, play
from garbage_server import garbage_server
from grpc import StatusCode
from test_dense_part import make_model, take_step, trained
from torch import nn

from dht.announcements import TrainerInfo
from peer import PROTOCOL_VERSION
from peer.errors import ExpertError, StateError, TransferError
from peer.rpc.server import server_credentials
from peer.rpc.sessions import Metadata, SessionServicer
from peer.rpc.transfer import receive
from peer.transport.endpoints import Endpoint
from peer.wire import dense_pb2, dense_pb2_grpc, session_pb2_grpc, state_pb2
from trainer_client.averaging.averager import choose_partner
from trainer_client.averaging.dense_part import PeerDensePart

__all__ = ["identities", "play"]


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
        villain.exchange._open = lambda mine, *_: PeerDensePart(mine.tensors, 0, 0.0, {})  # type: ignore[method-assign]  # takes all
        before = victim.part.read().tensors
        with pytest.raises(StateError) as refused:
            await square.stepping(victim.average_with(square.info(villain)), victim.part)
        victim._note_failure(villain.peer_id, refused.value)
        assert ended(victim, "refused") == 1
        avoided = victim.exchange.avoided()
        assert choose_partner([square.info(villain)], avoided, random.Random(0)) is None
        await square.until(lambda: villain.exchange.place.holder is None, villain.part)
        with pytest.raises(TransferError, match="PERMISSION_DENIED"):
            await villain.average_with(square.info(victim))
        victim.exchange.refused.succeeded(villain.peer_id)
        with pytest.raises(TransferError, match="INVALID_ARGUMENT"):
            await villain.average_with(square.info(victim))
        assert ended(victim, "refused") == 2
        assert victim.exchange.place.holder is None
        take_step(victim.part)
        assert all(torch.equal(tensor, before[name]) for name, tensor in victim.part.read().tensors.items())

    play(scenario)


def test_a_dense_part_out_of_reach_of_own_steps_is_refused_and_its_trainer_left_alone(play: Play) -> None:
    """The dense part has the same magnitude, and a direction that training might take."""

    async def scenario(square: Square) -> None:
        victim = await square.trainer(trained(make_model(), 2, scale=0.01), 10)
        villain = await square.trainer(hostile(lambda model: [p.mul_(2) for p in model.parameters()]), 10)
        before = victim.part.read().tensors
        with pytest.raises(StateError, match="further from this trainer's dense part than") as refused:
            await square.stepping(victim.average_with(square.info(villain)), victim.part)
        victim._note_failure(villain.peer_id, refused.value)
        assert villain.peer_id in victim.exchange.avoided()
        assert all(torch.equal(tensor, before[name]) for name, tensor in victim.part.read().tensors.items())

    play(scenario)


def shape_that_overflows() -> bytes:
    """A message of 80 bytes, with a shape of no numbers."""
    text = b'{"x":{"dtype":"F32","shape":[9223372036854775808,0],"data_offsets":[0,0]}}'
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize("data", [shape_that_overflows(), b"{}" * 40], ids=["overflows", "no safetensors"])
def test_bytes_that_are_no_dense_part_are_refused_whoever_calls(
    play: Play, caplog: pytest.LogCaptureFixture, data: bytes
) -> None:
    async def scenario(square: Square) -> None:
        victim = await square.trainer(trained(make_model(), 2), 10)
        villain = await square.trainer(make_model(), 10**9)
        packed = villain.part.read(), data, hashlib.sha256(data).digest()
        villain.exchange._pack = lambda: packed  # type: ignore[method-assign]  # whatever it has
        before = victim.part.read().tensors
        assert await victim.take_whole() is None
        with pytest.raises(StateError):
            await square.stepping(victim.average_with(square.info(villain)), victim.part)
        await square.until(lambda: villain.exchange.place.holder is None, villain.part)
        victim.exchange.refused.succeeded(villain.peer_id)
        with pytest.raises(TransferError, match="INVALID_ARGUMENT"):
            await villain.average_with(square.info(victim))
        assert ended(victim, "averaged") == 0
        assert victim.part.age == 10 + victim.part.steps
        take_step(victim.part)
        assert all(tensor.shape == before[name].shape for name, tensor in victim.part.read().tensors.items())

    play(scenario)
    assert not [record for record in caplog.records if record.exc_info]


class Liar(dense_pb2_grpc.DenseServiceServicer):
    """Answers an offer with what it was given, and then receives everything from a caller that continues."""

    def __init__(self, replies: list[state_pb2.FetchReply], hangs: bool = False) -> None:
        self.replies = replies
        self.hangs = hangs

    async def Exchange(self, requests: Any, context: Any) -> Any:
        await anext(aiter(requests))
        for reply in self.replies:
            yield reply
        if self.replies:
            async for _ in requests:
                pass
        if self.hangs:
            await asyncio.Event().wait()


HEADER = state_pb2.StateHeader(update_count=3, total_bytes=500, sha256=bytes(32))
LIES: dict[str, tuple[list[state_pb2.FetchReply], str]] = {
    "nothing": ([], "must begin with its header"),
    "no header": ([state_pb2.FetchReply(chunk=b"1")], "must begin with its header"),
    "1 GB": ([state_pb2.FetchReply(header=state_pb2.StateHeader(total_bytes=2**30, sha256=bytes(32)))], "more than"),
    "too short": ([state_pb2.FetchReply(header=HEADER), state_pb2.FetchReply(chunk=b"1")], "is incomplete"),
    "too long": ([state_pb2.FetchReply(header=HEADER), state_pb2.FetchReply(chunk=b"1" * 501)], "longer"),
    "garbage": ([state_pb2.FetchReply(header=HEADER), state_pb2.FetchReply(chunk=b"1" * 500)], "checksum"),
}  # fmt: skip


async def lying(square: Square, liar: Liar) -> TrainerInfo:
    """A trainer record with the liar's address."""
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
    return replace(square.info(honest), addresses=(Endpoint.of(LOCAL, port),))


@pytest.mark.parametrize(("replies", "reason"), LIES.values(), ids=LIES)
def test_what_is_no_dense_part_is_refused(
    play: Play, replies: list[state_pb2.FetchReply], reason: str
) -> None:
    async def scenario(square: Square) -> None:
        info = await lying(square, Liar(replies))
        victim = await square.trainer(make_model(), 10)
        with pytest.raises(StateError, match=reason):
            await victim.average_with(info)
        assert victim.exchange.place.holder is None

    play(scenario)


def test_a_trainer_that_answers_with_no_messages_is_refused(
    play: Play, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(square: Square) -> None:
        liar = await square.trainer(make_model(), 10)
        victim = await square.trainer(make_model(), 3)
        async with garbage_server(square.identities[0], liar.certificate) as port:
            liar.addresses = (Endpoint.of(LOCAL, port),)
            square.announce(liar)
            with pytest.raises(StateError, match="must begin with its header"):
                await victim.average_with(square.info(liar))
            assert await victim.take_whole() is None
        assert victim.exchange.place.holder is None

    play(scenario)
    assert not [record for record in caplog.records if record.exc_info]


def test_who_hangs_is_waited_for_so_long_and_no_longer(play: Play) -> None:
    async def scenario(square: Square) -> None:
        info = await lying(square, Liar([state_pb2.FetchReply(header=HEADER)], hangs=True))
        victim = await square.trainer(make_model(), 10, deadline_s=1.0)
        with pytest.raises(TransferError):
            await victim.average_with(info)
        assert victim.exchange.place.holder is None

    play(scenario)


def test_a_caller_that_dies_in_the_middle_costs_nothing(play: Play) -> None:
    """The other trainer is free for the next caller."""

    async def scenario(square: Square) -> None:
        one = await square.trainer(trained(make_model(), 1), 10)
        before = one.part.read().tensors
        dying = await square.trainer(trained(make_model(), 2), 10)
        stub, session = await dying._service.stub(square.info(one))
        call = stub.Exchange(timeout=60, metadata=session)
        snapshot = await dying.exchange.snapshot()
        offer = dense_pb2.DenseOffer(
            protocol_version=PROTOCOL_VERSION, swarm_id=SWARM,
            fingerprint=dying.form.fingerprint, header=snapshot.header(),
        )  # fmt: skip
        await call.write(dense_pb2.ExchangeRequest(offer=offer))
        await call.write(dense_pb2.ExchangeRequest(chunk=snapshot.data[:100]))
        assert (await call.read()).header.update_count == 10
        assert one.exchange.place.holder is not None
        call.cancel()
        await square.until(lambda: one.exchange.place.holder is None, one.part)
        one.exchange.refused.succeeded(dying.peer_id)
        await square.until(lambda: not one.exchange.is_resting("127.0.0.1"))
        assert all(torch.equal(tensor, before[name]) for name, tensor in one.part.read().tensors.items())
        await square.stepping(dying.average_with(square.info(one)), one.part, dying.part)

    play(scenario)


def test_a_caller_that_stalls_is_let_go_and_left_alone(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise it would keep others from meeting this trainer."""
    monkeypatch.setattr("peer.rpc.transfer.GRACE_S", 0.2)
    monkeypatch.setattr("peer.rpc.transfer.LEAST_BYTES_PER_S", 10**8)

    async def scenario(square: Square) -> None:
        one = await square.trainer(make_model(), 10)
        slow = await square.trainer(make_model(), 10)
        stub, session = await slow._service.stub(square.info(one))
        call = stub.Exchange(timeout=60, metadata=session)
        offer = dense_pb2.DenseOffer(
            protocol_version=PROTOCOL_VERSION, swarm_id=SWARM, fingerprint=slow.form.fingerprint,
            header=(await slow.exchange.snapshot()).header(),
        )  # fmt: skip
        await call.write(dense_pb2.ExchangeRequest(offer=offer))
        with pytest.raises(grpc.aio.AioRpcError, match="it stalled, or came slower"):
            await read_all(call)
        assert one.exchange.place.holder is None
        assert slow.peer_id in one.exchange.avoided()

    play(scenario)


def test_who_begins_exchanges_and_breaks_them_off_does_not_put_off_those_of_others(play: Play) -> None:
    """Keys cost nothing, so a stranger may come again and again."""

    async def scenario(square: Square) -> None:
        one = await square.trainer(make_model(), 10)
        await square.until(lambda: one.part.steps >= 5, one.part)
        for _ in range(2):
            stranger = await square.trainer(make_model(), 10)
            stub, session = await stranger._service.stub(square.info(one))
            offer = dense_pb2.DenseOffer(
                protocol_version=PROTOCOL_VERSION, swarm_id=SWARM, fingerprint=stranger.form.fingerprint,
                header=(await stranger.exchange.snapshot()).header(),
            )  # fmt: skip
            call = stub.Exchange(timeout=60, metadata=session)
            await call.write(dense_pb2.ExchangeRequest(offer=offer))
            assert (await call.read()).WhichOneof("part") == "header"
            call.cancel()
            await square.until(
                lambda: one.exchange.place.holder is None and not one.exchange.is_resting("127.0.0.1")
            )
            assert stranger.peer_id in one.exchange.avoided()
        assert one.exchange.ended_at_step == 0

    play(scenario)


def test_two_that_each_called_the_other_in_vain_still_meet(play: Play) -> None:
    """Behind routers, both may call before their relays are known. Afterwards they must not refuse each other
    for ever.
    """

    async def scenario(square: Square) -> None:
        one, other = [await square.trainer(make_model(), 10) for _ in range(2)]
        for caller, called in ((one, other), (other, one)):
            caller._note_failure(
                called.peer_id, TransferError("it gives no address that is called from here")
            )
            assert called.peer_id in caller.exchange.avoided()
        await square.stepping(other.average_with(square.info(one)), one.part, other.part)
        await square.until(lambda: ended(one, "averaged") == 1, one.part)
        assert not one.exchange.avoided() | other.exchange.avoided()

    play(scenario)


def test_an_answerer_that_dies_in_the_middle_is_passed_over(play: Play) -> None:
    async def scenario(square: Square) -> None:
        one = await square.trainer(trained(make_model(), 1), 10, every=1)
        await one.close()
        other = await square.trainer(trained(make_model(), 2), 10, every=1)
        square.meeting(other)
        await square.until(lambda: ended(other, "failed") == 1, other.part)
        third = await square.trainer(trained(make_model(), 3), 10, reachable=True)
        await square.until(lambda: ended(other, "averaged") == 1, other.part, third.part)
        assert ended(other, "failed") == 1

    play(scenario)


def test_others_calls_are_checked_before_they_cost_anything(play: Play) -> None:
    async def scenario(square: Square) -> None:
        one = await square.trainer(make_model(), 10)
        other = await square.trainer(make_model(), 10)
        stub, session = await other._service.stub(square.info(one))
        header = (await other.exchange.snapshot()).header()
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
        assert one.exchange.place.holder is None

    play(scenario)


def test_a_channel_that_the_pool_closes_fails_the_exchange_and_ends_no_task(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    """grpc cancels a channel's calls when it is closed, and a task that is cancelled would end without a word."""

    async def scenario(square: Square) -> None:
        one = await square.trainer(trained(make_model(), 1), 10)
        other = await square.trainer(trained(make_model(), 2), 10, reachable=False)

        async def close_and_receive(*args: Any, **more: Any) -> None:
            await other._service.channels.close()
            await receive(*args, **more)

        monkeypatch.setattr("trainer_client.averaging.averager.receive", close_and_receive)
        with pytest.raises(ExpertError, match="the channel was closed"):
            await other.average_with(square.info(one))

    play(scenario)


async def read_all(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


async def refused(stub: Any, session: Metadata, request: dense_pb2.ExchangeRequest | None) -> StatusCode:
    call = stub.Exchange(timeout=60, metadata=session)
    if request is not None:
        await call.write(request)
    await call.done_writing()
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await read_all(call)
    code: StatusCode = error.value.code()
    return code


def test_no_caller_averages_more_often_than_own_steps_allow(play: Play) -> None:
    """Otherwise many small meetings would lead further than a few, and leave no reach for others."""

    async def scenario(square: Square) -> None:
        victim = await square.trainer(trained(make_model(), 1), 10, every=400)
        villain = await square.trainer(trained(make_model(), 2), 10)
        await square.stepping(villain.average_with(square.info(victim)), victim.part, villain.part)
        await square.until(lambda: ended(victim, "averaged") == 1, victim.part)
        with pytest.raises(ExpertError, match="a moment ago"):
            await square.stepping(villain.average_with(square.info(victim)), villain.part)
        for _ in range(100):
            take_step(victim.part)
        await square.stepping(villain.average_with(square.info(victim)), victim.part, villain.part)

    play(scenario)


def test_callers_do_not_keep_a_trainer_from_beginning_exchanges(play: Play) -> None:
    async def scenario(square: Square) -> None:
        victim = await square.trainer(trained(make_model(), 1), 10, every=20)
        honest = await square.trainer(trained(make_model(), 2), 10)
        square.meeting(victim)
        steps = 0
        while not ended(victim, "averaged"):
            victim.exchange.ended_at_step = victim.part.steps  # as if another had just averaged with it
            await square.stepping(asyncio.sleep(0.005), victim.part, honest.part)
            steps += 1
            assert steps < 400

    play(scenario)
