"""MemoryService over real connections: answers are exact and proven, too large requests are refused, callers take
turns.
"""

import asyncio
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import grpc
import numpy as np
import pytest
from callers import InSession, numbered_identity
from grpc import StatusCode
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_folders import DIMENSIONS, SampleMemory
from memory_peers import SWARM, Library, in_library, read_request, search_request, until

from dht.memory import MAX_READ, MAX_SCORES, Passage, Vectors
from expert_server.memory import search
from expert_server.memory.servicer import ComputeTurns, MemoryServicer
from expert_server.memory.shard import PrimaryShard
from peer import PROTOCOL_VERSION
from peer.bounded import Owner
from peer.errors import ExpertError, TransferError, WireError
from peer.identity import PeerID
from peer.loop import LoopThread
from peer.merkle import HASH_BYTES, proves
from peer.metrics import total
from peer.rpc.parts import check_sha256
from peer.wire import memory_pb2

MEMORY = SampleMemory.make(each=100)
QUERIES = np.random.default_rng(5).integers(-127, 128, (3, DIMENSIONS), np.int8)


def exact(query: Vectors, roots: list[bytes], k: int) -> list[tuple[int, int, int]]:
    """The score, shard and position of the best passages, by exhaustive search."""
    found = []
    for number, root in enumerate(roots):
        _, vectors = MEMORY.passages[root]
        scores = vectors.astype(int) @ query.astype(int)
        found += [(-int(score), number, position) for position, score in enumerate(scores)]
    return [(-score, number, position) for score, number, position in sorted(found)[:k]]


def test_a_search_finds_the_best_of_all_shards_and_a_read_proves_them(
    loop: LoopThread, tmp_path: Path
) -> None:
    async def scenario(library: Library) -> None:
        servicer = await library.host(1, MEMORY)
        stub, memory, roots = await library.stub(1), library.memory_id(MEMORY), MEMORY.roots
        absent = b"\7" * 32
        reply = await stub.Search(search_request(memory, 7, QUERIES.tobytes(), *roots[:3], absent))
        assert list(reply.missing) == [3]
        for query, found in zip(QUERIES, reply.found, strict=True):
            hits = list(zip(found.scores, found.shards, found.positions, strict=True))
            assert hits == exact(query, roots[:3], 7)
            assert not any(found.texts)
        assert total(servicer.metrics.queries) == 3

        read = await stub.Read(read_request(memory, (roots[1], [99, 4, 4]), (absent, [1]), (roots[0], [0])))
        assert [(p.shard, p.position) for p in read.passages] == [(0, 99), (0, 4), (0, 4), (2, 0)]
        for proven in read.passages:
            root = (roots[1], absent, roots[0])[proven.shard]
            leaf = Passage.parse(proven.passage).leaf(proven.vector)
            path = [proven.path[i : i + HASH_BYTES] for i in range(0, len(proven.path), HASH_BYTES)]
            assert proves(root, leaf, proven.position, 100, path)

    in_library(loop, tmp_path, scenario)


def test_each_query_is_looked_up_in_its_own_shards(loop: LoopThread, tmp_path: Path) -> None:
    async def scenario(library: Library) -> None:
        await library.host(1, MEMORY)
        request = search_request(library.memory_id(MEMORY), 200, QUERIES.tobytes())
        request.k = 128
        request.shards.add(root=MEMORY.roots[0], queries=[2, 0])
        request.shards.add(root=MEMORY.roots[1], queries=[0])
        reply = await (await library.stub(1)).Search(request)
        assert [len(found.shards) for found in reply.found] == [128, 0, 100]
        assert set(reply.found[2].shards) == {0}

    in_library(loop, tmp_path, scenario)


def test_revoked_passages_are_neither_found_nor_read(loop: LoopThread, tmp_path: Path) -> None:
    async def scenario(library: Library) -> None:
        root, memory = MEMORY.roots[0], library.memory_id(MEMORY)
        store = MEMORY.write(tmp_path / "m")
        await library.serve(numbered_identity(1), {str(memory): store})
        stub = await library.stub(1)
        (_, _, best), *_ = exact(QUERIES[0], [root], 1)
        await asyncio.to_thread(store.follow, MEMORY.revoking((root, best)).manifest.serialize())
        reply = await stub.Search(search_request(memory, 100, QUERIES[0].tobytes(), root))
        assert len(reply.found[0].positions) == 99
        assert best not in reply.found[0].positions
        (proven,) = (await stub.Read(read_request(memory, (root, [best])))).passages
        assert not proven.HasField("passage")
        assert not proven.vector

    in_library(loop, tmp_path, scenario)


def test_what_was_found_in_a_second_cell_says_where_its_text_is(loop: LoopThread, tmp_path: Path) -> None:
    twofold = SampleMemory.make(each=100, is_twofold=True)

    async def scenario(library: Library) -> None:
        await library.host(1, twofold)
        stub, memory = await library.stub(1), library.memory_id(twofold)
        first, second = twofold.roots[0], twofold.roots[4]
        reply = await stub.Search(search_request(memory, 9, QUERIES.tobytes(), second, twofold.roots[1]))
        assert list(reply.text_roots) == [first]
        for query, found in zip(QUERIES, reply.found, strict=True):
            assert list(zip(found.scores, found.shards, found.positions, strict=True)) == exact(
                query, [first, twofold.roots[1]], 9
            )
            for number, position, text, there in zip(
                found.shards, found.positions, found.texts, found.text_positions, strict=True
            ):
                assert (text, there) == ((1, position) if number == 0 else (0, 0))
        (proven,) = (await stub.Read(read_request(memory, (second, [7])))).passages
        assert (proven.text_root, proven.text_position) == (first, 7)
        assert not proven.HasField("passage")

    in_library(loop, tmp_path, scenario)


def test_a_shard_that_the_disk_does_not_give_is_no_longer_served(loop: LoopThread, tmp_path: Path) -> None:
    async def scenario(library: Library) -> None:
        memory, (first, second, *_) = library.memory_id(MEMORY), MEMORY.roots
        store = MEMORY.write(tmp_path / "m")
        await library.serve(numbered_identity(1), {str(memory): store})
        stub = await library.stub(1)
        path = tmp_path / "m" / "shards" / first.hex()
        data = path.read_bytes()
        path.write_bytes(data[:-9])
        # As if something in the shard had been revoked at this moment.
        with pytest.raises(grpc.aio.AioRpcError) as changed:
            await stub.Search(search_request(memory, 9, QUERIES.tobytes(), first))
        assert changed.value.code() is StatusCode.UNAVAILABLE
        path.unlink()
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await stub.Search(search_request(memory, 9, QUERIES.tobytes(), first, second))
        assert failed.value.code() is StatusCode.DATA_LOSS
        reply = await stub.Search(search_request(memory, 9, QUERIES.tobytes(), first, second))
        assert list(reply.missing) == [0]
        assert len(reply.found[0].scores) == 9

    in_library(loop, tmp_path, scenario)


def with_shards(count: int) -> Callable[[memory_pb2.SearchRequest], None]:
    return lambda r: r.shards.extend(
        memory_pb2.ShardQueries(root=bytes([i // 256, i % 256]) * 16) for i in range(count)
    )


@pytest.mark.parametrize(
    ("change", "status"),
    [
        (lambda r: setattr(r, "swarm_id", "other"), StatusCode.FAILED_PRECONDITION),
        (lambda r: setattr(r, "protocol_version", 99), StatusCode.FAILED_PRECONDITION),
        (lambda r: setattr(r, "memory", "x" * 10**6), StatusCode.NOT_FOUND),
        (lambda r: setattr(r, "k", 0), StatusCode.INVALID_ARGUMENT),
        (lambda r: setattr(r, "k", 129), StatusCode.INVALID_ARGUMENT),
        (lambda r: setattr(r, "k", 2**32 - 1), StatusCode.INVALID_ARGUMENT),
        (lambda r: setattr(r, "vectors", b""), StatusCode.INVALID_ARGUMENT),
        (lambda r: setattr(r, "vectors", b"1234567"), StatusCode.INVALID_ARGUMENT),
        (lambda r: setattr(r, "vectors", bytes(257 * DIMENSIONS)), StatusCode.INVALID_ARGUMENT),
        (lambda r: r.shards.pop(), StatusCode.INVALID_ARGUMENT),
        (with_shards(256), StatusCode.INVALID_ARGUMENT),
        (lambda r: r.shards.add(root=b"short"), StatusCode.INVALID_ARGUMENT),
        (lambda r: r.shards.add(root=r.shards[0].root), StatusCode.INVALID_ARGUMENT),
        (lambda r: r.shards[0].queries.append(3), StatusCode.INVALID_ARGUMENT),
        (lambda r: r.shards[0].queries.append(2**32 - 1), StatusCode.INVALID_ARGUMENT),
        (lambda r: r.shards[0].queries.extend([1, 1]), StatusCode.INVALID_ARGUMENT),
        (lambda r: r.shards[0].queries.extend([0] * 100_000), StatusCode.INVALID_ARGUMENT),
    ],
)
def test_a_search_that_asks_for_too_much_or_nonsense_is_refused(
    loop: LoopThread, tmp_path: Path, change: Callable[[Any], None], status: StatusCode
) -> None:
    async def scenario(library: Library) -> None:
        servicer = await library.host(1, MEMORY)
        request = search_request(library.memory_id(MEMORY), 5, QUERIES.tobytes(), MEMORY.roots[0])
        change(request)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await (await library.stub(1)).Search(request)
        assert raised.value.code() is status
        await until(lambda: total(servicer.metrics.calls, outcome="refused") == 1)

    in_library(loop, tmp_path, scenario)


@pytest.mark.parametrize(
    "wanted",
    [
        [(MEMORY.roots[0], [100])],
        [(MEMORY.roots[0], [0] * (MAX_READ + 1))],
        [(b"x", [0])],
        [(MEMORY.roots[0], [])] * 65,
    ],
)
def test_a_read_that_asks_for_too_much_or_nonsense_is_refused(
    loop: LoopThread, tmp_path: Path, wanted: list[tuple[bytes, list[int]]]
) -> None:
    async def scenario(library: Library) -> None:
        await library.host(1, MEMORY)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await (await library.stub(1)).Read(read_request(library.memory_id(MEMORY), *wanted))
        assert raised.value.code() is StatusCode.INVALID_ARGUMENT

    in_library(loop, tmp_path, scenario)


def test_all_parts_are_fetched_and_wrong_ones_come_from_another_host(
    loop: LoopThread, tmp_path: Path
) -> None:
    async def scenario(library: Library) -> None:
        memory = library.memory_id(MEMORY)
        await library.host(1, MEMORY)
        liar = SampleMemory.make(each=100)
        root = MEMORY.roots[0]
        store = liar.write(tmp_path / "liar")
        (tmp_path / "liar" / "shards" / root.hex()).write_bytes(MEMORY.files[MEMORY.roots[1]])
        (tmp_path / "liar" / "parts" / MEMORY.manifest.codebook.sha256.hex()).unlink()
        await library.serve(numbered_identity(2), {str(memory): store})
        client, receiver = library.client(), MEMORY.write(tmp_path / "new", lambda root: False)
        blamed: list[PeerID] = []
        data = await client.fetch_any(
            [library.node(2), library.node(1)],
            str(memory),
            root,
            2**23,
            lambda data: receiver.verified(root, data),
            blamed.append,
        )
        assert data == MEMORY.files[root]
        assert blamed == [numbered_identity(2).peer_id]
        for part, content in (
            (MEMORY.manifest.encoder, MEMORY.encoder),
            (MEMORY.manifest.codebook, MEMORY.codebook),
        ):
            nodes = [library.node(2), library.node(1)]
            check = lambda data, name=part.sha256: check_sha256(name, data)  # noqa: E731  # one for each part
            assert await client.fetch_any(nodes, str(memory), part.sha256, part.size, check) == content
        manifest = MEMORY.manifest.serialize()
        assert await client.fetch(library.node(1), str(memory), store.part.sha256, len(manifest)) == manifest
        with pytest.raises(TransferError, match="NOT_FOUND"):
            await client.fetch(library.node(1), str(memory), b"\1" * 32, 10**6)
        with pytest.raises(TransferError, match="did not arrive"):
            await client.fetch_any([], str(memory), root, 10**6, bytes)

    in_library(loop, tmp_path, scenario)


def test_a_fetch_goes_on_where_it_was_cut_off(
    loop: LoopThread, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peer.rpc.transfer.CHUNK_BYTES", 1000)
    monkeypatch.setattr("peer.rpc.transfer._BACKOFF_S", 0.01)

    async def scenario(library: Library) -> None:
        cut: list[int] = []
        sent: list[int] = []
        give = MemoryServicer.FetchPart

        async def cut_off_once(servicer: MemoryServicer, request: Any, context: Any) -> None:
            class Cutting:
                def __getattr__(self, name: str) -> Any:
                    return getattr(context, name)

                async def write(self, reply: Any) -> None:
                    sent.append(len(reply.chunk))
                    if len(sent) == 4 and not cut:
                        cut.append(request.offset)
                        await context.abort(StatusCode.UNAVAILABLE, "a broken line")
                    await context.write(reply)

            await give(servicer, request, cast(Any, Cutting()))

        monkeypatch.setattr(MemoryServicer, "FetchPart", cut_off_once)
        root = MEMORY.roots[0]
        await library.host(1, MEMORY)
        data = await library.client().fetch(library.node(1), str(library.memory_id(MEMORY)), root, 2**20)
        assert data == MEMORY.files[root]
        assert cut == [0]
        # What had arrived before was not sent again.
        assert sum(sent) < len(data) + 2000

    in_library(loop, tmp_path, scenario)


def test_a_reader_that_stalls_is_not_taken_for_a_disk_that_fails(
    loop: LoopThread, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peer.rpc.transfer.GRACE_S", 0.1)

    async def scenario(library: Library) -> None:
        give = MemoryServicer.FetchPart

        async def stall(servicer: MemoryServicer, request: Any, context: Any) -> None:
            class Stalling:
                def __getattr__(self, name: str) -> Any:
                    return getattr(context, name)

                async def write(self, reply: Any) -> None:
                    await asyncio.Event().wait()

            await give(servicer, request, cast(Any, Stalling()))

        monkeypatch.setattr(MemoryServicer, "FetchPart", stall)
        await library.host(1, MEMORY)
        stub, memory, root = await library.stub(1), library.memory_id(MEMORY), MEMORY.roots[0]
        request = memory_pb2.FetchPartRequest(
            protocol_version=PROTOCOL_VERSION, swarm_id=SWARM, memory=str(memory), name=root
        )
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            _ = [reply async for reply in stub.FetchPart(request)]
        assert raised.value.code() is StatusCode.DEADLINE_EXCEEDED

    in_library(loop, tmp_path, scenario)


def test_a_caller_with_many_calls_waits_for_itself(loop: LoopThread) -> None:
    async def scenario() -> None:
        turns, order = ComputeTurns(1, 100), []
        greedy, other = Owner.alone("greedy"), Owner.alone("other")
        begun, go = asyncio.Event(), asyncio.Event()

        async def call(caller: Owner, name: str) -> None:
            with turns.place(caller):
                async with turns.turn(caller, 1):
                    begun.set()
                    await go.wait()
                    order.append(name)

        async with asyncio.TaskGroup() as group:
            for i in range(20):
                group.create_task(call(greedy, f"greedy {i}"))
            await begun.wait()
            await until(lambda: len(turns) >= 19)
            group.create_task(call(other, "other"))
            await until(lambda: len(turns) >= 20)
            go.set()
        assert order.index("other") <= 2
        assert order[0] == "greedy 0"
        assert len(turns) == 0

    loop.run(scenario(), 60)


async def order_of(turns: ComputeTurns, calls: Iterable[tuple[str, int]]) -> list[str]:
    """In which order calls with these groups and costs get their turns, all of which wait when the first one ends."""
    order, go = list[str](), asyncio.Event()

    async def call(group: str, number: int, cost: int) -> None:
        with turns.place(Owner(group, number)):
            async with turns.turn(Owner(group, number), cost):
                await go.wait()
                order.append(group)

    tasks = [asyncio.create_task(call(group, number, cost)) for number, (group, cost) in enumerate(calls)]
    await until(lambda: len(turns) >= len(tasks) - 1)
    go.set()
    await asyncio.gather(*tasks)
    return order


def test_a_cheap_search_does_not_wait_for_costly_ones_from_many_neighbourhoods(loop: LoopThread) -> None:
    turns = ComputeTurns(1, 100, clock=lambda: 0.0)
    costly = [(f"stranger {n % 8}", MAX_SCORES) for n in range(32)]
    for _ in range(3):
        order = loop.run(order_of(turns, [*costly, ("honest", 1000)]), 60)
        assert order.index("honest") == 1, "after the call that computes"


@pytest.mark.parametrize("cost", [1, 3, 10])
def test_groups_that_always_have_calls_waiting_get_equal_sums(loop: LoopThread, cost: int) -> None:
    turns = ComputeTurns(1, 1000, clock=lambda: 0.0)
    calls = [("costly", 10)] * 20 + [("cheap", cost)] * (200 // cost)
    order = loop.run(order_of(turns, calls), 60)
    costs = {"costly": 10, "cheap": cost}
    for end in range(1, len(order) + 1):
        sums = Counter[str]()
        for group in order[:end]:
            sums[group] += costs[group]
        assert abs(sums["costly"] - sums["cheap"]) <= 10


def test_what_a_group_used_long_ago_counts_less(loop: LoopThread) -> None:
    time_s = 0.0
    turns = ComputeTurns(1, 100, clock=lambda: time_s)
    loop.run(order_of(turns, [("one", 100)] * 3), 60)
    assert loop.run(order_of(turns, [("other", 1), ("one", 10), ("other", 50)]), 60) == [
        "other",
        "other",
        "one",
    ]
    time_s = 600.0
    assert loop.run(order_of(turns, [("other", 1), ("one", 10), ("other", 50)]), 60) == [
        "other",
        "one",
        "other",
    ]


def test_when_all_places_are_taken_the_greediest_gives_one_up(loop: LoopThread) -> None:
    async def scenario() -> None:
        turns = ComputeTurns(1, 10)
        greedy, other = Owner.alone("greedy"), Owner.alone("other")
        go = asyncio.Event()

        async def call(caller: Owner) -> str:
            try:
                with turns.place(caller):
                    async with turns.turn(caller, 1):
                        await go.wait()
            except ExpertError as error:
                return error.status.name
            return "answered"

        calls = [asyncio.create_task(call(greedy)) for _ in range(11)]
        await until(lambda: len(turns) >= 9)
        others = [asyncio.create_task(call(other)) for _ in range(3)]
        await until(lambda: sum(task.done() for task in calls) >= 4)
        go.set()
        assert await asyncio.gather(*others) == ["answered"] * 3
        outcomes = await asyncio.gather(*calls)
        assert outcomes.count("RESOURCE_EXHAUSTED") == 4
        assert len(turns) == 0

    loop.run(scenario(), 60)


def test_replies_that_nobody_reads_keep_their_places_until_others_need_them(loop: LoopThread) -> None:
    async def scenario() -> None:
        turns, read = ComputeTurns(1, 3), asyncio.Event()
        greedy, other = Owner.alone("greedy"), Owner.alone("other")

        async def call(caller: Owner) -> None:
            with turns.place(caller):
                async with turns.turn(caller, 1):
                    pass
            await read.wait()

        unread = [asyncio.create_task(call(greedy)) for _ in range(3)]
        with pytest.raises(ExpertError):
            await asyncio.create_task(call(greedy))
        honest = asyncio.create_task(call(other))
        await until(lambda: unread[-1].done())
        assert unread[-1].cancelled()
        read.set()
        await asyncio.gather(honest, *unread[:-1])

    loop.run(scenario(), 120)


def test_an_answer_that_waits_for_the_upload_is_refused_at_once_if_others_need_its_place(
    loop: LoopThread, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("expert_server.memory.servicer._MAX_WAITING", 3)

    async def scenario(library: Library) -> None:
        servicer, may_go = await library.host(1, MEMORY), asyncio.Event()

        async def take(size: int) -> None:
            await may_go.wait()

        monkeypatch.setattr(servicer._up, "take", take)
        request = search_request(library.memory_id(MEMORY), 10, QUERIES.tobytes(), *MEMORY.roots[:3])
        greedy, other = [await library.stub(1) for _ in range(2)]

        async def search(stub: InSession) -> str:
            try:
                await stub.Search(request, timeout=60)
            except grpc.aio.AioRpcError as error:
                return error.code().name
            return "answered"

        calls = [asyncio.create_task(search(greedy)) for _ in range(3)]
        await until(lambda: total(servicer.metrics.queries) == 3 * len(QUERIES))
        last = asyncio.create_task(search(other))
        await until(lambda: any(task.done() for task in calls))
        may_go.set()
        outcomes = await asyncio.gather(*calls, last)
        assert sorted(outcomes) == ["RESOURCE_EXHAUSTED", *3 * ["answered"]]
        assert outcomes[-1] == "answered"

    in_library(loop, tmp_path, scenario)


def test_a_turn_does_not_go_to_a_call_that_was_ended_at_the_same_moment(loop: LoopThread) -> None:
    async def scenario() -> None:
        turns, go, caller = ComputeTurns(1, 10), asyncio.Event(), Owner.alone("a reader")

        async def call() -> None:
            with turns.place(caller):
                async with turns.turn(caller, 1):
                    await go.wait()

        first, second = asyncio.create_task(call()), asyncio.create_task(call())
        await until(lambda: len(turns) == 1)
        go.set()
        second.cancel()
        await asyncio.wait([first, second])
        assert (first.exception(), second.cancelled()) == (None, True)
        async with asyncio.timeout(60):
            await call()

    loop.run(scenario(), 60)


@given(st.lists(st.sampled_from(["wait", "cancel", "go", "look"]), max_size=40), st.integers(1, 3))
@settings(deadline=None)
def test_no_turn_is_lost_whatever_is_cancelled(loop: LoopThread, steps: list[str], at_once: int) -> None:
    async def scenario() -> None:
        turns, running = ComputeTurns(at_once, 100), 0
        callers = [Owner.alone(name) for name in "ab"]
        gates: list[tuple[asyncio.Task[None], asyncio.Event]] = []

        async def call(n: int, go: asyncio.Event) -> None:
            nonlocal running
            with turns.place(callers[n % 2]):
                async with turns.turn(callers[n % 2], 1):
                    running += 1
                    assert running <= at_once
                    try:
                        await go.wait()
                    finally:
                        running -= 1

        for n, step in enumerate(steps):
            if step == "wait":
                go = asyncio.Event()
                gates.append((asyncio.create_task(call(n, go)), go))
            elif step == "look":
                await asyncio.sleep(0)
            elif gates and step == "cancel":
                gates.pop(n % len(gates))[0].cancel()
            elif gates and step == "go":
                gates[n % len(gates)][1].set()
        for _, go in gates:
            go.set()
        async with asyncio.timeout(60):
            await asyncio.gather(*(task for task, _ in gates))
            async with asyncio.TaskGroup() as group:
                gate = asyncio.Event()
                for n in range(at_once):
                    group.create_task(call(n, gate))
                await until(lambda: running >= at_once)
                gate.set()

    loop.run(scenario(), 60)


def test_a_search_that_nobody_waits_for_stops(
    loop: LoopThread, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched, go = [], threading.Event()
    vectors = PrimaryShard.vectors

    def slow(shard: PrimaryShard) -> Vectors:
        searched.append(shard)
        assert go.wait(60)
        return vectors(shard)

    monkeypatch.setattr(PrimaryShard, "vectors", slow)
    monkeypatch.setattr(search, "MOST_PRODUCTS", 1)

    async def scenario(library: Library) -> None:
        servicer = await library.host(1, MEMORY, threads=1)
        stub = await library.stub(1)
        call = stub.Search(search_request(library.memory_id(MEMORY), 1, QUERIES.tobytes(), *MEMORY.roots))
        await until(lambda: bool(searched))
        call.cancel()
        await until(lambda: total(servicer.metrics.calls, outcome="refused") >= 1)
        go.set()
        # The thread is free for the next call.
        await stub.Read(read_request(library.memory_id(MEMORY), (MEMORY.roots[0], [0])))
        assert len(searched) == 1

    try:
        in_library(loop, tmp_path, scenario)
    finally:
        go.set()


def test_an_offset_without_a_checksum_is_refused(loop: LoopThread, tmp_path: Path) -> None:
    async def scenario(library: Library) -> None:
        await library.host(1, MEMORY)
        stub = await library.stub(1)
        request = memory_pb2.FetchPartRequest(
            protocol_version=PROTOCOL_VERSION,
            swarm_id=SWARM,
            memory=str(library.memory_id(MEMORY)),
            name=MEMORY.roots[0],
        )
        request.offset = 2**63
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            _ = [reply async for reply in stub.FetchPart(request)]
        assert raised.value.code() is StatusCode.INVALID_ARGUMENT
        request.sha256 = b"x" * 32
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            _ = [reply async for reply in stub.FetchPart(request)]
        assert raised.value.code() is StatusCode.FAILED_PRECONDITION

    in_library(loop, tmp_path, scenario)


def test_check_sha256_says_what_is_wrong() -> None:
    with pytest.raises(WireError, match="SHA-256"):
        check_sha256(b"0" * 32, b"data")
