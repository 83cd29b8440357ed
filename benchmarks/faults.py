"""Faults between a trainer and the network: calls that take longer and calls that fail, drawn from a seed."""

import asyncio
import random
from collections.abc import AsyncGenerator

from grpc import StatusCode

from peer.errors import ExpertError
from trainer_client.dispatch.batches import CallReply, ExpertCaller, NodeCall


class FaultyCaller:
    """Makes real calls, each delayed by `delay_s`, half of it on the way there and half on the way back. Some fail.

    Half of the failing calls never reach the node. The other half are computed there (including a backward call's
    optimizer step), and the answer is lost. In both cases the trainer learns of the failure after the delay.
    """

    def __init__(self, caller: ExpertCaller, delay_s: float, failing: float, seed: int) -> None:
        """`failing`: the share of the calls that fail."""
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
