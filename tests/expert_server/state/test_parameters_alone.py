"""Parameters without the rest of a state, as peers fetch them that check answers or export the model."""

import asyncio
import itertools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import grpc
import pytest
import torch
from callers import InSession, a_caller
from checkpoint_samples import AN_UID, MANIFEST, OTHER_UID, make_expert
from grpc import StatusCode
from state_peers import CHUNK, SWARM, Scenario, Street, playing, read_all

from dht.admission import EXPORT, RIGHTS, Role
from expert_server.experts.format import StateForm, block_from_bytes
from expert_server.state.transfer import MAX_SNAPSHOTS, SnapshotTaker
from peer import PROTOCOL_VERSION
from peer.bounded import Owner
from peer.errors import ExpertError, StateError, TransferError, VersionGoneError
from peer.identity import Identity
from peer.loop import LoopThread
from peer.rpc.calls import make_stub
from peer.rpc.channels import ChannelPool
from peer.rpc.sessions import Right
from peer.wire import state_pb2, state_pb2_grpc
from trainer_client.dispatch.snapshots import BlockClient


@pytest.fixture
def play(loop: LoopThread, identity: Identity, monkeypatch: pytest.MonkeyPatch) -> Callable[[Scenario], None]:
    return playing(loop, identity, monkeypatch)


def a_client(street: Street, max_bytes: int = 2**20) -> BlockClient:
    channels, sessions = ChannelPool(), a_caller(SWARM)
    street.stack.push_async_callback(channels.close)
    street.stack.push_async_callback(sessions.close)
    return BlockClient(channels, sessions, SWARM, max_bytes)


def test_they_come_at_their_version_and_without_moments(play: Callable[[Scenario], None]) -> None:
    async def scenario(street: Street) -> None:
        expert = make_expert(3)
        await street.host(expert)
        form = StateForm.of(MANIFEST)
        client = a_client(street, form.max_block_bytes)
        block = await client.fetch(street.node, AN_UID, expert.version, 9.0)
        assert block.precision == "fp32"
        assert block_from_bytes(block.data, SWARM, AN_UID, form).keys() == form.block.keys()

    play(scenario)


@pytest.mark.parametrize(
    ("uid", "step", "most", "error"),
    [
        (AN_UID, 1, 2**20, VersionGoneError),
        (OTHER_UID, 0, 2**20, TransferError),
        (AN_UID, 0, 99, StateError),
    ],
)
def test_of_another_version_or_expert_or_too_large_they_do_not_come(
    play: Callable[[Scenario], None], uid: object, step: int, most: int, error: type[Exception]
) -> None:
    async def scenario(street: Street) -> None:
        expert = make_expert(3)
        await street.host(expert)
        client = a_client(street, most)
        with pytest.raises(error):
            await client.fetch(
                street.node, OTHER_UID if uid == OTHER_UID else AN_UID, expert.version + step, 9.0
            )

    play(scenario)


def test_who_asks_for_too_many_is_told_to_wait(
    play: Callable[[Scenario], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(street: Street) -> None:
        expert = make_expert(3)
        await street.host(expert)
        client = a_client(street)
        monkeypatch.setattr(SnapshotTaker, "_wait_s", lambda *_: 1.0)
        with pytest.raises(TransferError, match="RESOURCE_EXHAUSTED"):
            await client.fetch(street.node, AN_UID, expert.version, 9.0)

    play(scenario)


def a_peer(number: int) -> Owner:
    return Owner.alone(f"peer {number}")


async def asked_too_often(street: Street, who: Callable[[int], Owner]) -> tuple[SnapshotTaker, int]:
    """A node that these were asking for an expert's parameters until it refused, and the expert's version. Every copy
    takes seconds to make.
    """
    expert, ticks = make_expert(3), itertools.count()
    runtime = await street.host(expert)
    taker = SnapshotTaker(runtime, SWARM, lambda uid: {}, clock=lambda: float(next(ticks)))

    async def ask_all() -> None:
        for number in range(100):
            await taker.block_for(who(number), AN_UID, expert.version)

    with pytest.raises(ExpertError, match="too many"):
        await ask_all()
    return taker, expert.version


def test_many_that_check_answers_keep_no_node_from_a_state(play: Callable[[Scenario], None]) -> None:
    """Keys cost nothing, so one person may send many requests."""

    async def scenario(street: Street) -> None:
        taker, _ = await asked_too_often(street, a_peer)
        assert (await taker.take_for(a_peer(200), AN_UID)).update_count == 3

    play(scenario)


def test_many_keys_of_one_line_that_check_answers_leave_others_half_of_the_time(
    play: Callable[[Scenario], None],
) -> None:
    async def scenario(street: Street) -> None:
        taker, version = await asked_too_often(street, lambda number: Owner("one line", f"key {number}"))
        assert (await taker.block_for(a_peer(200), AN_UID, version)).update_count == 3

    play(scenario)


def test_who_asks_and_breaks_off_makes_a_node_copy_no_more_at_once(play: Callable[[Scenario], None]) -> None:
    async def scenario(street: Street) -> None:
        expert = make_expert(3)
        runtime = await street.host(expert)
        taker, let_go = SnapshotTaker(runtime, SWARM, lambda uid: {}), threading.Event()
        busy = asyncio.ensure_future(runtime.run(lambda: let_go.wait(60)))  # no copy is made meanwhile
        for _ in range(8):
            asking = asyncio.ensure_future(taker.block_for(a_peer(1), AN_UID, expert.version))
            await asyncio.sleep(0)
            asking.cancel()
        with pytest.raises(ExpertError, match="is copying other experts"):
            await taker.block_for(a_peer(2), AN_UID, expert.version)
        let_go.set()
        assert await busy

    play(scenario)


def test_a_version_goes_with_no_snapshot(play: Callable[[Scenario], None]) -> None:
    async def scenario(street: Street) -> None:
        expert = make_expert(3)
        await street.host(expert)
        request = state_pb2.FetchRequest(
            protocol_version=PROTOCOL_VERSION, swarm_id=SWARM, uid=str(AN_UID), sha256=bytes(32), version=1
        )
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await read_all((await street.stub()).Fetch(request))
        assert caught.value.code() is StatusCode.INVALID_ARGUMENT

    play(scenario)


def test_an_export_gets_the_present_parameters_without_moments(play: Callable[[Scenario], None]) -> None:
    async def scenario(street: Street) -> None:
        expert = make_expert(3)
        await street.host(expert)
        checkpoint = (await street.client.fetch(street.node, AN_UID, parameters=True)).checkpoint
        assert checkpoint.update_count == 3
        now = expert.export_state()
        assert checkpoint.state.keys() == StateForm.of(MANIFEST).block.keys()
        assert all(torch.equal(tensor, now[name]) for name, tensor in checkpoint.state.items())

    play(scenario)


def test_an_export_that_is_cut_off_goes_on_where_it_was(play: Callable[[Scenario], None]) -> None:
    async def scenario(street: Street) -> None:
        expert = make_expert(3)
        await street.host(expert, limit=MAX_SNAPSHOTS)
        fetch = (await street.stub()).Fetch
        wanted: dict[str, Any] = {"protocol_version": PROTOCOL_VERSION, "swarm_id": SWARM, "uid": str(AN_UID)}
        whole = [reply async for reply in fetch(state_pb2.FetchRequest(**wanted, parameters=True))]
        sha256, data = whole[0].header.sha256, b"".join(reply.chunk for reply in whole[1:])
        rest = state_pb2.FetchRequest(**wanted, parameters=True, sha256=sha256, offset=CHUNK)
        assert b"".join([reply.chunk async for reply in fetch(rest)]) == data[CHUNK:]
        gone = fetch(state_pb2.FetchRequest(**wanted, parameters=True, sha256=bytes(32), offset=CHUNK))
        assert await gone.code() is StatusCode.FAILED_PRECONDITION
        both = fetch(state_pb2.FetchRequest(**wanted, parameters=True, version=expert.version))
        assert await both.code() is StatusCode.INVALID_ARGUMENT

    play(scenario)


def test_who_may_export_may_take_no_state_and_call_no_expert(play: Callable[[Scenario], None]) -> None:
    async def scenario(street: Street) -> None:
        expert = make_expert(3)
        await street.host(expert)
        wanted: dict[str, Any] = {"protocol_version": PROTOCOL_VERSION, "swarm_id": SWARM, "uid": str(AN_UID)}
        stub = await stub_of(street, [EXPORT])
        assert await read_all(stub.Fetch(state_pb2.FetchRequest(**wanted, parameters=True))) > 1
        for version in (0, expert.version):
            call = stub.Fetch(state_pb2.FetchRequest(**wanted, version=version))
            assert await call.code() is StatusCode.PERMISSION_DENIED
        stub = await stub_of(street, sorted(RIGHTS[Role.TRAINER]))
        call = stub.Fetch(state_pb2.FetchRequest(**wanted, parameters=True))
        assert await call.code() is StatusCode.PERMISSION_DENIED

    play(scenario)


def test_many_that_export_keep_no_node_from_a_state_and_nobody_from_checks(
    play: Callable[[Scenario], None],
) -> None:
    async def scenario(street: Street) -> None:
        expert, ticks = make_expert(3), itertools.count()
        runtime = await street.host(expert)
        taker = SnapshotTaker(runtime, SWARM, lambda uid: {}, limit=1, clock=lambda: float(next(ticks)))

        async def ask_all() -> None:
            for number in range(100):
                await taker.parameters_for(a_peer(number), AN_UID)

        with pytest.raises(ExpertError, match="too many"):
            await ask_all()
        assert (await taker.take_for(a_peer(200), AN_UID)).update_count == 3
        assert (await taker.block_for(a_peer(201), AN_UID, expert.version)).update_count == 3

    play(scenario)


def test_an_export_is_not_charged_for_the_time_that_a_busy_node_lets_it_wait(
    play: Callable[[Scenario], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(street: Street) -> None:
        expert, now = make_expert(3), [0.0]
        runtime = await street.host(expert)
        taker = SnapshotTaker(runtime, SWARM, lambda uid: {}, limit=1, clock=lambda: now[0])
        run = runtime.run

        async def run_later(function: Callable[[], Any]) -> Any:
            now[0] += 100.0
            return await run(function)

        monkeypatch.setattr(runtime, "run", run_later)
        for _ in range(20):
            assert (await taker.parameters_for(a_peer(1), AN_UID)).update_count == 3

    play(scenario)


@pytest.mark.parametrize("role", [Role.TRAINER, Role.READER])
def test_who_may_check_answers_may_take_no_state_and_ask_for_nothing(
    play: Callable[[Scenario], None], role: Role
) -> None:
    async def scenario(street: Street) -> None:
        expert = make_expert(3)
        await street.host(expert)
        wanted: dict[str, Any] = {"protocol_version": PROTOCOL_VERSION, "swarm_id": SWARM}
        one = state_pb2.FetchRequest(**wanted, uid=str(AN_UID), version=expert.version)
        whole = state_pb2.FetchRequest(**wanted, uid=str(AN_UID))
        adopt = state_pb2.AskRequest(**wanted, reason=state_pb2.ASK_REASON_ADOPT, uids=[str(AN_UID)])
        stub = await stub_of(street, sorted(RIGHTS[role]))
        assert await read_all(stub.Fetch(one)) > 1
        for call in (stub.Fetch(whole), stub.Ask(adopt)):
            assert await call.code() is StatusCode.PERMISSION_DENIED

    play(scenario)


async def stub_of(street: Street, rights: Sequence[Right]) -> InSession:
    channels, sessions = ChannelPool(), a_caller(SWARM, rights=rights)
    street.stack.push_async_callback(channels.close)
    street.stack.push_async_callback(sessions.close)
    channel = await channels.reach(street.node)
    session = await sessions.metadata(street.node.peer_id, channel, 9.0)
    return InSession(make_stub(state_pb2_grpc.StateServiceStub, channel), session)
