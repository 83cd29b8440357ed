"""Trainers on real sockets, and a board with their records in place of a DHT. For tests."""

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pytest
import torch
from callers import numbered_identities
from test_dense_part import led_from_the_beginning, take_step
from torch import nn

from dht.announcements import TrainerInfo, read_trainer
from dht.relays import RelayKeeper
from peer.identity import Identity, PeerID
from peer.loop import LoopThread, Restarts, TaskSet
from peer.metrics import total
from peer.rpc.channels import ChannelPool
from peer.wire import records_pb2
from trainer_client.announcer import TrainingMetrics, set_dense, trainer_record
from trainer_client.averaging.averager import Averaging, AveragingSchedule
from trainer_client.averaging.dense_part import DenseForm, SharedParameters
from trainer_client.averaging.exchange import DenseExchange
from trainer_client.dispatch.calls import DispatchMetrics
from trainer_client.dispatch.policy import Latencies
from trainer_client.settings import TrainerSettings

SWARM = "sauna-QmFounder"
LOCAL = "127.0.0.1"
LIMIT_S = 60.0

T = TypeVar("T")


class Board:
    """The trainers' records that the DHT would hold."""

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
        self,
        model: nn.Module,
        age: int,
        *,
        every: int = 10,
        reachable: bool = True,
        deadline_s: float = 10,
        channels: ChannelPool | None = None,
        relays: RelayKeeper | None = None,
    ) -> Averaging:
        identity = self.identities[len(self.made)]
        registry: Any = self.board
        part = SharedParameters(model, age)
        led_from_the_beginning(part)
        averaging = Averaging(
            DenseExchange(DenseForm.of(model, SWARM), part), identity, registry,
            AveragingSchedule(every, 0.05, deadline_s), channels=channels, relays=relays,
            rng=random.Random(len(self.made)),
        )  # fmt: skip
        await averaging.start(LOCAL, 0)
        self.stack.push_async_callback(averaging.close)
        self.made.append(averaging)
        self.announce(averaging, reachable)
        return averaging

    def meeting(self, averaging: Averaging) -> Restarts:
        """Lets a trainer search for others and average with them until the scenario ends. Returns what failed
        unexpectedly.
        """
        restarts = Restarts()
        tasks = TaskSet(restarts, first_pause_s=0.01)
        self.stack.push_async_callback(tasks.aclose)
        averaging.keep_meeting(tasks)
        return restarts

    def announce(self, averaging: Averaging, reachable: bool = True) -> None:
        record = trainer_record(
            TrainerSettings.load(), 0.0, "", TrainingMetrics(), DispatchMetrics(), Latencies(), steps=200
        )
        set_dense(record, averaging)
        if not reachable:
            del record.addresses[:]
        self.board.records[averaging.peer_id] = record

    def info(self, averaging: Averaging) -> TrainerInfo:
        return self.board.info(averaging.peer_id)

    async def stepping(self, done: Awaitable[T], *parts: SharedParameters) -> T:
        """Waits for `done` while the trainers take steps. Returns its result."""
        task = asyncio.ensure_future(done)
        async with asyncio.timeout(LIMIT_S):
            while not task.done():
                for part in parts:
                    take_step(part)
                await asyncio.sleep(0.005)
        return await task

    async def until(self, condition: Callable[[], bool], *parts: SharedParameters) -> None:
        async with asyncio.timeout(LIMIT_S):
            while not condition():
                await self.stepping(asyncio.sleep(0.005), *parts)


Scenario = Callable[[Square], Coroutine[Any, Any, None]]
Play = Callable[[Scenario], None]


@pytest.fixture(scope="module")
def identities() -> list[Identity]:
    return numbered_identities(4)


@pytest.fixture
def play(loop: LoopThread, identities: list[Identity], monkeypatch: pytest.MonkeyPatch) -> Play:
    monkeypatch.setattr("peer.rpc.transfer._BACKOFF_S", 0.01)

    def run(scenario: Scenario) -> None:
        async def on_a_square() -> None:
            async with contextlib.AsyncExitStack() as stack:
                await scenario(Square(identities, stack))

        loop.run(on_a_square(), 120)

    return run


def ended(averaging: Averaging, how: str) -> float:
    """How many of its exchanges had this outcome."""
    return total(averaging.metrics.ends, end=how)


def are_one(part: SharedParameters, other: SharedParameters) -> bool:
    tensors = other.read().tensors
    return all(
        torch.allclose(tensor, tensors[name], rtol=1.3e-6, atol=1e-5)
        for name, tensor in part.read().tensors.items()
    )
