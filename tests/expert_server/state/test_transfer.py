"""States of experts are transferred over real sockets, whole and at the permitted rate."""

import asyncio
import threading
import time
from collections.abc import Callable

import grpc
import pytest
from checkpoint_samples import AN_UID, MANIFEST, OTHER_UID, assert_same, make_expert, step
from grpc import StatusCode
from state_peers import CHUNK, SWARM, Scenario, Street, packed, playing, read_all
from tls_expert_server import wait_until

from dht.uid import UID
from expert_server.experts.format import AVERAGED
from expert_server.serving.runtime import Runtime
from expert_server.state.servicer import FetchHint
from expert_server.state.transfer import SnapshotTaker, largest_state_bytes
from peer import PROTOCOL_VERSION
from peer.averaging import AveragingHistory, Meeting
from peer.errors import TransferError
from peer.identity import Identity
from peer.loop import LoopThread
from peer.metrics import total
from peer.rates import BURST_S, RateLimit
from peer.wire import state_pb2


@pytest.fixture
def play(loop: LoopThread, identity: Identity, monkeypatch: pytest.MonkeyPatch) -> Callable[[Scenario], None]:
    return playing(loop, identity, monkeypatch)


def test_a_state_goes_no_faster_than_its_node_may_send(play: Callable[[Scenario], None]) -> None:
    async def scenario(street: Street) -> None:
        expert = make_expert(1)
        size = len(packed(expert))
        up = RateLimit(size / 0.5)
        await street.host(expert, up=up)
        began = time.monotonic()
        await street.client.fetch(street.node, expert.uid)
        assert time.monotonic() - began >= (0.5 - BURST_S) * 0.9
        assert size == pytest.approx(up.bytes, rel=0.05)  # the time in it has more digits or fewer
        assert up.bytes == street.down.bytes

    play(scenario)


@pytest.mark.parametrize("steps", [0, 3])
def test_a_state_comes_as_it_is(play: Callable[[Scenario], None], steps: int) -> None:
    async def scenario(street: Street) -> None:
        expert = make_expert(steps)
        await street.host(expert, met=2)
        fetched = await street.client.fetch(street.node, AN_UID)
        assert (fetched.checkpoint.update_count, fetched.met_update_count) == (steps, 2)
        assert_same(fetched.checkpoint.state, expert.export_state())
        metrics = street.client.metrics
        outcomes = [total(metrics.fetches, outcome=outcome) for outcome in ("fetched", "failed", "broken")]
        assert outcomes == [1, 0, 0]
        sent, received = (total(metrics.bytes, direction=way) for way in ("sent", "received"))
        assert sent == received > 2 * CHUNK

    play(scenario)


def test_a_snapshot_can_be_fetched_though_the_expert_goes_on(play: Callable[[Scenario], None]) -> None:
    async def scenario(street: Street) -> None:
        expert = make_expert(1)
        runtime = await street.host(expert, limit=2)
        first = await street.client.fetch(street.node, AN_UID)
        await runtime.run(lambda: step(expert))
        second = await street.client.fetch(street.node, AN_UID)
        again = await street.client.fetch(street.node, AN_UID, first.sha256)
        assert (first.checkpoint.update_count, second.checkpoint.update_count) == (1, 2)
        assert_same(again.checkpoint.state, first.checkpoint.state)
        await runtime.run(lambda: step(expert))
        await street.client.fetch(street.node, AN_UID)
        with pytest.raises(TransferError, match="FAILED_PRECONDITION: that snapshot is no longer kept"):
            await street.client.fetch(street.node, AN_UID, first.sha256)

    play(scenario)


def test_a_snapshot_names_the_meetings_of_the_state_that_it_has(loop: LoopThread, identity: Identity) -> None:
    """An average that is computed between the request for a snapshot and its copy is in both or in neither."""

    async def scenario() -> None:
        expert, met, released = make_expert(3), AveragingHistory[UID](), threading.Event()
        runtime = Runtime({AN_UID: expert}, max_queued_rows=9, max_batch_rows=9, threads=1)
        await runtime.start()
        taker, state = SnapshotTaker(runtime, SWARM, met.of), expert.export_state()

        async def average() -> None:
            await runtime.run(lambda: expert.import_state(state, 5, AVERAGED))
            met.record(AN_UID, identity.peer_id, 5, 4)

        try:
            works = [asyncio.create_task(each) for each in (runtime.run(released.wait), average())]
            await asyncio.sleep(0)
            taking = asyncio.create_task(taker.take(AN_UID))
            await wait_until(lambda: len(runtime._tasks) == 2)
            released.set()
            await asyncio.gather(*works)
            snapshot = await taking
            assert (snapshot.update_count, snapshot.met) == (5, {identity.peer_id: Meeting(5, 4)})
        finally:
            released.set()
            await runtime.stop()

    loop.run(scenario(), 120)


def test_what_is_not_hosted_is_not_found(play: Callable[[Scenario], None]) -> None:
    async def scenario(street: Street) -> None:
        await street.host(make_expert(1))
        with pytest.raises(TransferError, match=r"NOT_FOUND: expert 0\.1\.1 is not hosted here"):
            await street.client.fetch(street.node, OTHER_UID)

    play(scenario)


def test_only_so_many_fetch_at_once(play: Callable[[Scenario], None]) -> None:
    async def scenario(street: Street) -> None:
        await street.host(make_expert(3), max_transfers=1)
        fetches = [street.client.fetch(street.node, AN_UID) for _ in range(3)]
        assert {f.checkpoint.update_count for f in await asyncio.gather(*fetches)} == {3}
        stub = await street.stub()
        request = state_pb2.FetchRequest(protocol_version=PROTOCOL_VERSION, swarm_id=SWARM, uid=str(AN_UID))
        holding = stub.Fetch(request)
        await holding.read()  # the server is in the middle of it as long as this one reads no further
        calls = [stub.Fetch(request) for _ in range(4)]
        results = await asyncio.gather(*(read_all(call) for call in calls), return_exceptions=True)
        codes = {r.code() for r in results if isinstance(r, grpc.aio.AioRpcError)}
        assert codes <= {StatusCode.RESOURCE_EXHAUSTED}
        assert codes, "five at once, of which one may go on"
        holding.cancel()

    play(scenario)


def test_a_hint_is_passed_on_once_it_is_well_formed(play: Callable[[Scenario], None]) -> None:
    async def scenario(street: Street) -> None:
        await street.host(make_expert(1))
        ask = street.client.ask
        me = street.identity.peer_id
        assert await ask(street.node, state_pb2.ASK_REASON_ADOPT, [AN_UID, OTHER_UID]) == 1
        assert await ask(street.node, state_pb2.ASK_REASON_AVERAGE, [AN_UID], b"a" * 32, b"b" * 32) == 1
        right = [((AN_UID, OTHER_UID), b"", b""), ((AN_UID,), b"a" * 32, b"b" * 32)]
        expected = [FetchHint(me, *each, group=street.hints[0].group) for each in right]
        assert street.hints == expected
        assert await ask(street.node, state_pb2.ASK_REASON_AVERAGE, [AN_UID], b"short", b"b" * 32) == 0
        assert await ask(street.node, state_pb2.ASK_REASON_UNSPECIFIED, [AN_UID]) == 0
        assert await ask(street.node, state_pb2.ASK_REASON_ADOPT, []) == 0
        assert await ask(street.node, state_pb2.ASK_REASON_ADOPT, [AN_UID] * 257) == 0
        assert street.hints == expected

    play(scenario)


def test_the_largest_state_is_not_much_more_than_a_real_one() -> None:
    size = len(packed(make_expert(3)))
    assert size < largest_state_bytes(MANIFEST) < size + 100_000
