"""Strangers that ask a trainer for its dense part and break off don't keep it busy with copies, over real sockets."""

import asyncio
import time

from dense_trainers import SWARM, Play, Square, identities, play
from test_dense_part import make_model, take_step

from peer import PROTOCOL_VERSION
from peer.wire import dense_pb2
from trainer_client.averaging.dense_part import DensePart

__all__ = ["identities", "play"]

COPY_S, EVERY_S = 0.05, 0.01


def test_a_trainer_copies_its_dense_part_seldom_though_strangers_break_off_again_and_again(
    play: Play,
) -> None:
    async def scenario(square: Square) -> None:
        victim, stranger = [await square.trainer(make_model(), 10) for _ in range(2)]
        pack, running, most, busy_s = victim.exchange._pack, 0, 0, 0.0

        def slow_pack() -> tuple[DensePart, bytes, bytes]:
            nonlocal running, most, busy_s
            running, began = running + 1, time.monotonic()
            most = max(most, running)
            time.sleep(COPY_S)
            running, busy_s = running - 1, busy_s + time.monotonic() - began
            return pack()

        victim.exchange._pack = slow_pack  # type: ignore[method-assign]  # as slow as with a large model
        request = dense_pb2.TakeRequest(
            protocol_version=PROTOCOL_VERSION, swarm_id=SWARM, fingerprint=victim.form.fingerprint
        )
        stub, session = await stranger._service.stub(square.info(victim))
        began = time.monotonic()
        for _ in range(100):
            call = stub.Take(request, timeout=60, metadata=session)
            take_step(victim.part)
            await asyncio.sleep(EVERY_S)
            call.cancel()
        assert most == 1
        assert busy_s < 0.2 * (time.monotonic() - began) + 2 * COPY_S

    play(scenario)
