"""Strangers that ask a trainer for its dense part and break off don't keep it busy with copies, over real sockets."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from dense_trainers import SWARM, Play, Square, identities, play
from test_dense_part import make_model, take_step

from peer import PROTOCOL_VERSION
from peer.wire import dense_pb2
from trainer_client.averaging.averager import Averaging
from trainer_client.averaging.dense_part import DensePart
from trainer_client.averaging.exchange import DenseExchange

__all__ = ["identities", "play"]

COPY_S, EVERY_S = 0.05, 0.01


class Copies:
    """Makes a trainer's copies as slow as those of a large model, and counts them."""

    def __init__(self, exchange: DenseExchange) -> None:
        self._pack, self._running = exchange._pack, 0
        self.most, self.busy_s = 0, 0.0
        """The most copies at the same time, and the time of all together."""
        exchange._pack = self._slowly  # type: ignore[method-assign]

    def _slowly(self) -> tuple[DensePart, bytes, bytes]:
        began = time.monotonic()
        self._running += 1
        self.most = max(self.most, self._running)
        time.sleep(COPY_S)
        self._running -= 1
        self.busy_s += time.monotonic() - began
        return self._pack()


async def check(square: Square, victim: Averaging, begin: Callable[[], Any]) -> None:
    """`begin` begins a call, which is then broken off."""
    copies, began, number = Copies(victim.exchange), time.monotonic(), 0
    while number < 100 or not copies.most:
        call = begin()
        take_step(victim.part)
        number += 1
        await asyncio.sleep(EVERY_S * max(1, number // 50))  # on a busy machine, a call arrives later
        call.cancel()
    assert copies.most == 1
    assert copies.busy_s < 0.2 * (time.monotonic() - began) + 2 * COPY_S


def test_a_trainer_copies_its_dense_part_seldom_though_strangers_break_off_again_and_again(
    play: Play,
) -> None:
    async def scenario(square: Square) -> None:
        victim, stranger = [await square.trainer(make_model(), 10) for _ in range(2)]
        stub, session = await stranger._service.stub(square.info(victim))
        request = dense_pb2.TakeRequest(
            protocol_version=PROTOCOL_VERSION, swarm_id=SWARM, fingerprint=victim.form.fingerprint
        )
        await check(square, victim, lambda: stub.Take(request, timeout=60, metadata=session))

    play(scenario)


def test_nor_do_strangers_that_begin_exchanges_under_ever_new_keys(play: Play) -> None:
    async def scenario(square: Square) -> None:
        victim, stranger = [await square.trainer(make_model(), 10) for _ in range(2)]
        victim.exchange.refused.failed = lambda *_: None  # type: ignore[method-assign]  # as if each key were new
        stub, session = await stranger._service.stub(square.info(victim))
        offer = dense_pb2.DenseOffer(
            protocol_version=PROTOCOL_VERSION, swarm_id=SWARM, fingerprint=victim.form.fingerprint,
            header=(await stranger.exchange.snapshot()).header(),
        )  # fmt: skip

        def begin() -> Any:
            async def requests() -> AsyncIterator[dense_pb2.ExchangeRequest]:
                yield dense_pb2.ExchangeRequest(offer=offer)
                await asyncio.sleep(60)

            return stub.Exchange(requests(), timeout=60, metadata=session)

        await check(square, victim, begin)

    play(scenario)
