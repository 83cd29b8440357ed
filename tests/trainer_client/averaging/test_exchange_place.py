"""A trainer exchanges its dense part with one other at a time. Who holds that place in vain makes way for others."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from callers import numbered_identity
from dense_trainers import SWARM, Play, Square, identities, play
from hypothesis import given
from hypothesis import strategies as st
from test_dense_part import make_model, trained

from peer import PROTOCOL_VERSION
from peer.errors import ExpertError
from peer.identity import certificate_pem
from peer.rpc.channels import ChannelPool
from peer.rpc.sessions import SessionClient
from peer.transport.pipes import Pipe
from peer.transport.tunnel import Tunnels
from peer.wire import dense_pb2, dense_pb2_grpc, session_pb2, state_pb2
from trainer_client.averaging.averager import Averaging
from trainer_client.averaging.exchange import OWN, ExchangePlace, Holder

__all__ = ["identities", "play"]
GROUPS = [OWN, "here", "there"]
FAIR_S = 18.0
"""10 s, and a megabyte at 1 Mbit/s."""


class Visits:
    """A place, and who had to leave it."""

    def __init__(self) -> None:
        self.place = ExchangePlace(1_000_000)
        self.now = 0.0
        self.left: list[str] = []

    def take(self, group: str) -> Holder | None:
        try:
            return self.place.take(group, lambda: self.left.append(group), self.now)
        except ExpertError:
            return None

    def waste(self, group: str, seconds: float) -> None:
        holder = self.take(group)
        assert holder is not None
        self.now += seconds
        self.place.leave(holder, self.now, in_vain=True)


def test_who_has_wasted_time_makes_way_at_once() -> None:
    visits = Visits()
    visits.waste("here", 0.1)
    assert visits.take("here"), "a place that is free is given to anybody"
    assert visits.take("here") is None
    assert visits.take("there")
    assert visits.left == ["here"]
    assert visits.take("here") is None
    assert visits.take(OWN) is None, "nobody has wasted more"


@pytest.mark.parametrize("newcomer", ["here", "there", OWN])
def test_a_slow_exchange_makes_way(newcomer: str) -> None:
    visits = Visits()
    assert visits.take("here")
    visits.now += FAIR_S
    assert visits.take(newcomer) is None
    visits.now += 0.1
    assert visits.take(newcomer)
    assert visits.left == ["here"]


def test_a_slow_exchange_does_not_make_way_for_those_who_waste_time() -> None:
    visits = Visits()
    visits.waste("there", 30.0)
    assert visits.take("here")
    visits.now += 2 * FAIR_S
    assert visits.take("there") is None
    visits.now += 10 * 300.0
    assert visits.take("there"), "it was long ago"


def test_an_exchange_that_is_cut_off_before_it_is_slow_has_wasted_nothing() -> None:
    """A stranger comes for a moment whenever it may cut off a trainer of which an exchange has failed."""
    visits, cut_off = Visits(), 0
    visits.waste("here", 4.0)
    for _ in range(20):
        honest = visits.take("here")
        assert honest is not None
        visits.now += 2.0
        if stranger := visits.take("there"):
            cut_off += 1
            visits.place.leave(stranger, visits.now, in_vain=True)
        visits.place.leave(honest, visits.now, in_vain=honest.is_cut_off)
    assert cut_off == 4, "each costs the stranger a second"


def test_an_exchange_whose_transfer_has_ended_makes_way_for_nobody() -> None:
    visits = Visits()
    visits.waste("here", 1.0)
    holder = visits.take("here")
    assert holder is not None
    holder.interrupt = None
    visits.now += 2 * FAIR_S
    assert visits.take("there") is None
    visits.place.leave(holder, visits.now, in_vain=False)
    assert visits.take("there")


def test_keys_without_end_hold_the_place_for_a_small_part_of_the_time() -> None:
    """Each leaves just before its exchange counts as slow, and another one comes at the same moment."""
    visits, waited = Visits(), 0.0
    for _ in range(100):
        stranger = visits.take("there")
        assert stranger is not None
        came = visits.now
        while (honest := visits.take("here")) is None:
            visits.now += 1.0
            if visits.now - came >= FAIR_S - 1:
                visits.place.leave(stranger, visits.now, in_vain=True)
                stranger, came = visits.take("there"), visits.now
                assert stranger is not None
            waited += 1.0
        visits.place.leave(stranger, visits.now, in_vain=True)
        visits.now += 5.0
        visits.place.leave(honest, visits.now, in_vain=False)
    assert waited <= FAIR_S


@given(st.lists(st.tuples(st.sampled_from(GROUPS), st.floats(0, 100), st.booleans()), max_size=40))
def test_the_place_has_one_holder(visits_of: list[tuple[str, float, bool]]) -> None:
    visits, holder = Visits(), None
    for group, seconds, leaves in visits_of:
        is_free = visits.place.is_free_for(group, visits.now)
        taken = visits.take(group)
        assert (taken is not None) is is_free
        assert is_free or holder is not None
        assert holder is None or holder.is_cut_off is is_free
        holder = taken or holder
        visits.now += seconds
        if leaves and holder is not None:
            visits.place.leave(holder, visits.now, in_vain=holder.group != OWN)
            assert visits.place.holder is None
            holder = None


@contextlib.asynccontextmanager
async def trickling(one: Averaging, number: int) -> AsyncIterator[Holder]:
    """A stranger with a new key, always on the same line, who begins an exchange and sends a few bytes now and then."""
    identity = numbered_identity(50 + number)

    async def open_stream(*arguments: Any) -> Pipe:
        return await one.open_for(identity.peer_id, "192.0.2.1")

    tunnels, pool = Tunnels(open_stream), ChannelPool()
    sessions = SessionClient(identity, SWARM, [session_pb2.RIGHT_AVERAGE])
    try:
        certificate = certificate_pem(one.certificate, one.peer_id)
        channel = await pool.get(await tunnels.open_to(one.peer_id, ()), certificate)
        session = await sessions.metadata(one.peer_id, channel, 20.0)
        stub: Any = dense_pb2_grpc.DenseServiceStub(channel)
        call = stub.Exchange(timeout=60, metadata=session)
        offer = dense_pb2.DenseOffer(
            protocol_version=PROTOCOL_VERSION, swarm_id=SWARM, fingerprint=one.form.fingerprint,
            header=state_pb2.StateHeader(update_count=10, total_bytes=1000, sha256=bytes(32)),
        )  # fmt: skip
        await call.write(dense_pb2.ExchangeRequest(offer=offer))
        assert (await call.read()).WhichOneof("part") == "header"

        async def trickle() -> None:
            with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                while True:
                    await call.write(dense_pb2.ExchangeRequest(chunk=b"\0"))
                    await asyncio.sleep(0.05)

        writing = asyncio.create_task(trickle())
        try:
            holder = one.exchange.place.holder
            assert holder is not None
            yield holder
        finally:
            call.cancel()
            await asyncio.gather(writing, return_exceptions=True)
    finally:
        await sessions.close()
        await pool.close()
        await tunnels.close()


def test_strangers_with_ever_new_keys_keep_no_trainer_elsewhere_from_averaging(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peer.rpc.transfer.GRACE_S", 1000.0)  # one that trickles is not given up meanwhile

    async def scenario(square: Square) -> None:
        one = await square.trainer(trained(make_model(), 1), 10)
        other = await square.trainer(trained(make_model(), 2), 10)
        async with trickling(one, 1):
            with pytest.raises(ExpertError, match="is averaging with another"):
                await other.average_with(square.info(one))
        await square.until(
            lambda: one.exchange.place.holder is None and not one.exchange.is_resting("192.0.2.1")
        )
        async with trickling(one, 2) as holder:
            await square.stepping(other.average_with(square.info(one)), one.part, other.part)
            assert holder.is_cut_off
            stranger = numbered_identity(52).peer_id
            assert stranger not in one.exchange.refused.open_at(time.monotonic()), "it was not slow"

    play(scenario)


def test_after_an_exchange_broke_off_only_those_on_its_line_wait(play: Play) -> None:
    async def scenario(square: Square) -> None:
        one = await square.trainer(trained(make_model(), 1), 10)
        other = await square.trainer(trained(make_model(), 2), 10)
        async with trickling(one, 1):
            pass
        await square.until(lambda: one.exchange.place.holder is None)
        one.exchange._fresh_until = time.monotonic() + 60
        with pytest.raises(grpc.aio.AioRpcError, match="has just broken off"):
            async with trickling(one, 2):
                pass
        await square.stepping(other.average_with(square.info(one)), one.part, other.part)

    play(scenario)


def test_an_exchange_keeps_its_place_until_both_have_merged(play: Play) -> None:
    async def scenario(square: Square) -> None:
        one, other, third = [await square.trainer(trained(make_model(), n), 10) for n in range(3)]
        await square.stepping(other.average_with(square.info(one)), other.part)
        with pytest.raises(ExpertError, match="is averaging with another"):
            await third.average_with(square.info(one))
        await square.until(lambda: one.exchange.place.holder is None, one.part)
        assert len(one.part.take_merges()) == 1
        assert one.exchange.place.wasted_s("127.0.0.1", time.monotonic()) == 0

    play(scenario)


def test_a_stranger_that_trickles_does_not_keep_a_trainer_from_calling_others(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peer.rpc.transfer.GRACE_S", 1000.0)
    monkeypatch.setattr("peer.rpc.transfer._FAIR_S", 0.5)

    async def scenario(square: Square) -> None:
        one = await square.trainer(trained(make_model(), 1), 10, every=2)
        other = await square.trainer(trained(make_model(), 2), 10)
        async with trickling(one, 1) as holder:
            square.meeting(one)
            await square.until(lambda: bool(one.part.take_merges()), one.part, other.part)
            assert holder.is_cut_off

    play(scenario)
