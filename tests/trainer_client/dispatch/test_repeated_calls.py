"""A backward call that broke off is repeated with the same id, and takes effect only once. Over real sockets."""

from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest
from callers import a_caller
from expert_fakes import ask
from grpc import StatusCode
from real_node import GENEROUS, HIDDEN, UIDS, a_node, request, rows

from dht.announcements import NodeInfo
from expert_server.serving.runtime import Runtime
from peer.errors import ExpertError
from peer.loop import LoopThread
from peer.metrics import total
from peer.rpc.channels import ChannelPool
from trainer_client.dispatch.batches import Direction
from trainer_client.dispatch.grpc_caller import GrpcCaller

UNAVAILABLE = ExpertError(StatusCode.UNAVAILABLE, "cut off")


class FaultyLine(GrpcCaller):
    """Loses its first `lost` calls: before the node receives them, or after it has answered."""

    def __init__(self, channels: ChannelPool, lost: int, *, arrives: bool) -> None:
        super().__init__(channels, "kept-swarm", HIDDEN, sessions=a_caller("kept-swarm"))
        self.ids: list[bytes] = []
        self._lost = lost
        self._arrives = arrives

    async def _call_in(self, *arguments: Any) -> Any:
        self.ids.append(arguments[3])
        loses = len(self.ids) <= self._lost
        if loses and not self._arrives:
            raise UNAVAILABLE
        async for answer in super()._call_in(*arguments):
            if not loses:
                yield answer
        if loses:
            raise UNAVAILABLE


@asynccontextmanager
async def a_line(lost: int, *, arrives: bool) -> AsyncIterator[tuple[FaultyLine, NodeInfo, Runtime]]:
    channels = ChannelPool()
    async with a_node(GENEROUS) as (node, runtime):
        try:
            yield FaultyLine(channels, lost, arrives=arrives), node, runtime
        finally:
            await channels.close()


def updates(runtime: Runtime) -> list[int]:
    return [runtime.experts[uid].update_count for uid in UIDS]


@pytest.fixture
def run(loop: LoopThread, monkeypatch: pytest.MonkeyPatch) -> Callable[[Coroutine[Any, Any, None]], None]:
    monkeypatch.setattr("trainer_client.dispatch.grpc_caller._REPEAT_AFTER_S", 0.01)
    return lambda scenario: loop.run(scenario, 60)


def test_a_call_that_never_arrived_is_made_again(run: Callable[[Coroutine[Any, Any, None]], None]) -> None:
    async def scenario() -> None:
        async with a_line(1, arrives=False) as (line, node, runtime):
            answers = await ask(line, node, "backward", *(request(uid, rows(2)) for uid in UIDS))
            assert sorted(answers.answered) == UIDS
            assert updates(runtime) == [1, 1]
            assert total(line.metrics.repeated_calls) == 1
            assert line.ids[0] == line.ids[1]

    run(scenario())


def test_what_was_applied_is_not_applied_again_when_its_answer_is_lost(
    run: Callable[[Coroutine[Any, Any, None]], None],
) -> None:
    """The node remembers the id over a new connection too. The caller learns that the call broke off."""

    async def scenario() -> None:
        async with a_line(1, arrives=True) as (line, node, runtime):
            once, pools = line._call_once, list[ChannelPool]()

            async def over_a_new_connection(*arguments: Any) -> Any:
                before, line._channels = line._channels, ChannelPool()
                pools.append(line._channels)
                await before.close()
                async for answer in once(*arguments):
                    yield answer

            line._call_once = over_a_new_connection  # type: ignore[method-assign, assignment]  # as after a cut
            with pytest.raises(ExpertError) as error:
                await ask(line, node, "backward", *(request(uid, rows(2)) for uid in UIDS))
            assert error.value.status is StatusCode.UNAVAILABLE
            assert (total(line.metrics.repeated_calls), updates(runtime)) == (1, [1, 1])
            await pools[-1].close()

    run(scenario())


@pytest.mark.parametrize(("direction", "lost", "calls"), [("forward", 1, 1), ("backward", 2, 2)])
def test_a_forward_call_is_not_repeated_and_a_backward_call_once(
    run: Callable[[Coroutine[Any, Any, None]], None],
    direction: Direction,
    lost: int,
    calls: int,
) -> None:
    async def scenario() -> None:
        async with a_line(lost, arrives=False) as (line, node, runtime):
            gradients = None if direction == "forward" else rows(2)
            with pytest.raises(ExpertError, match="cut off"):
                await ask(line, node, direction, request(UIDS[0], gradients))
            assert len(line.ids) == calls
            assert updates(runtime) == [0, 0]

    run(scenario())


def test_without_time_nothing_is_repeated(
    run: Callable[[Coroutine[Any, Any, None]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "trainer_client.dispatch.grpc_caller._REPEAT_AFTER_S", 11.0
    )  # of 20 s, more than half must be left

    async def scenario() -> None:
        async with a_line(1, arrives=False) as (line, node, _):
            with pytest.raises(ExpertError, match="cut off"):
                await ask(line, node, "backward", request(UIDS[0], rows(2)))
            assert total(line.metrics.repeated_calls) == 0

    run(scenario())
