"""Faults between a trainer and the network: calls that take longer and calls that fail, by a seed."""

import asyncio
import random
from collections.abc import AsyncGenerator

from grpc import StatusCode

from peer.errors import ExpertError
from trainer_client.dispatch.batches import CallReply, ExpertCaller, NodeCall


class FaultyCaller:
    """Makes real calls, each `delay_s` slower, half on the way there and half on the way back. Some fail.

    Of those that fail, half never reach the node, and half have been computed there, a backward call's optimizer step
    included, when the answer is lost. Either way the trainer learns it after the delay.
    """

    def __init__(self, caller: ExpertCaller, delay_s: float, failing: float, seed: int) -> None:
        """`failing`: part of the calls."""
        self.on = True
        self.failed = 0
        self._caller = caller
        self._delay_s = delay_s
        self._failing = failing
        self._rng = random.Random(seed)

    async def call(self, call: NodeCall) -> AsyncGenerator[CallReply, None]:
        if not self.on:
            async for reply in self._caller.call(call):
                yield reply
            return
        fails, arrives = self._rng.random() < self._failing, self._rng.random() < 0.5
        self.failed += fails
        await asyncio.sleep(self._delay_s / 2)
        replies = []
        if arrives or not fails:
            replies = [reply async for reply in self._caller.call(call)]
        await asyncio.sleep(self._delay_s / 2)
        if fails:
            raise ExpertError(StatusCode.UNAVAILABLE, "lost on the way, as told")
        for reply in replies:
            yield reply
