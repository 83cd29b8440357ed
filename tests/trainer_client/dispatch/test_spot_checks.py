"""Nodes that alter a few of their answers a little are found by computing some rows again."""

import asyncio
import random
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from attending import attend
from callers import a_caller
from expert_fakes import FakeDirectory, make_manifest, make_node, make_peer_id, make_replica, random_rows
from expert_fakes import send_to_best as send
from grpc import StatusCode
from hypothesis import given, settings
from hypothesis import strategies as st
from real_node import HIDDEN, MANIFEST, UIDS, LyingRuntime, a_node

from dht.announcements import NodeInfo
from dht.directory import View
from dht.manifest import Manifest, WireSpec
from dht.uid import UID
from expert_server.blocks import build_block
from expert_server.experts.devices import ComputeDevice
from expert_server.experts.expert import Expert
from expert_server.experts.format import Checkpoint, to_bytes
from expert_server.experts.graphs import Rows, SharedGraph
from expert_server.serving.batching import Entry, Result, WorkItem
from expert_server.serving.compute import compute_together
from expert_server.serving.runtime import Runtime
from peer.codec import CodecName, Floats, Integers, codec_of
from peer.encoding import decode, encode
from peer.errors import ExpertError, StateError, TransferError
from peer.identity import PeerID
from peer.loop import LoopThread
from peer.metrics import total, totals
from peer.rpc.channels import ChannelPool
from peer.wire import session_pb2
from talkoot.train.recompute import BlockLoader, RecomputedExpert
from trainer_client.dispatch.batches import AnsweredRows, CallProgress, NodeBatch, Segments, SentBatch, shares
from trainer_client.dispatch.calls import CallTracker
from trainer_client.dispatch.dispatcher import Dispatcher
from trainer_client.dispatch.grpc_caller import GrpcCaller
from trainer_client.dispatch.policy import CircuitBreakers, WaitPolicy
from trainer_client.dispatch.snapshots import BlockClient, FetchedBlock, Precision
from trainer_client.dispatch.spot_checks import TOLERATED, Checking, Sample, SpotChecks, are_wrong

CODECS: list[CodecName] = ["fp32", "bf16", "fp16", "int8", "int4"]
LENGTH = 16
SWARM = "kept-swarm"


# The statistic


def arrived(tensor: Floats, codec: CodecName) -> Floats:
    return decode(encode(tensor.astype(np.float32), codec_of(codec)), tensor.shape[1], codec_of(codec))


def sizes(tensor: Floats) -> Floats:
    result: Floats = np.sqrt((tensor.astype(np.float64) ** 2).mean(axis=1)).astype(np.float32)
    return result


def wrong(answers: Floats, own: Floats, precision: Precision, codec: CodecName) -> int:
    ones = np.ones(len(own), np.float32)
    return int(are_wrong(answers, own, sizes(own), ones, precision, codec_of(codec)).sum())


def honest_errors(precision: Precision, own: Floats, rng: np.random.Generator) -> Floats:
    """Errors in every number as large as the largest that were measured. With bf16, every 200th number is rounded the
    other way, with its effects elsewhere.
    """
    scale = sizes(own)[:, None]
    errors = rng.uniform(-1, 1, own.shape) * 1e-5 * scale
    if precision == "tf32":
        errors += rng.standard_normal(own.shape) * 5.5e-4 * scale
    if precision == "bf16":
        flipped = rng.random(own.shape) < 1 / 200
        errors += rng.standard_normal(own.shape) * 1e-4 * scale + flipped * own * 2.0**-7
    return errors.astype(np.float32)


def check_honest(precision: Precision, codec: CodecName, rows: int) -> None:
    rng = np.random.default_rng(7)
    for width in (64, 256):
        for _ in range(rows // 2000):
            own: Floats = rng.standard_normal((1000, width), dtype=np.float32)
            own *= rng.uniform(0.1, 3, (1000, 1)).astype(np.float32)
            answers = arrived(own + honest_errors(precision, own, rng), codec)
            assert wrong(answers, own, precision, codec) == 0, (precision, codec, width)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_rows_of_honest_nodes_are_never_wrong(precision: Precision, codec: CodecName) -> None:
    check_honest(precision, codec, 2000)


@pytest.mark.slow
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_of_a_million_rows_of_honest_nodes_none_is_wrong(precision: Precision, codec: CodecName) -> None:
    check_honest(precision, codec, 1_000_000)


FOUND_OUT: dict[Precision, list[CodecName]] = {
    "fp32": CODECS,
    "tf32": CODECS,
    "bf16": [
        "fp32",
        "bf16",
        "fp16",
        "int8",
    ],  # int4 hides a hundredth from a node that says it rounds as much
}


@pytest.mark.parametrize("lie", ["larger", "noise"])
@pytest.mark.parametrize(
    ("precision", "codec"),
    [(precision, codec) for precision, codecs in FOUND_OUT.items() for codec in codecs],
)
def test_one_row_in_a_hundred_that_is_off_by_a_hundredth_is_found_in_2000(
    precision: Precision, codec: CodecName, lie: str
) -> None:
    rng = np.random.default_rng(8)
    own = rng.standard_normal((2000, 64)).astype(np.float32)
    lied = own * np.float32(1.01) if lie == "larger" else own + 0.01 * rng.standard_normal(own.shape)
    altered = rng.random((2000, 1)) < 0.01
    answers = arrived(np.where(altered, lied, own) + honest_errors(precision, own, rng), codec)
    checks = [slice(at, at + 32) for at in range(0, 2000, 32)]
    found = [wrong(answers[rows], own[rows], precision, codec) for rows in checks]
    assert sum(map(bool, found)) >= 2, "that many witnesses are needed"
    assert sum(found) >= 2 + 2000 * TOLERATED[precision]


def test_parameters_that_overflow_or_cancel_out_explain_nothing() -> None:
    answers = np.random.default_rng(9).standard_normal((4, 64)).astype(np.float32)
    for number in (np.nan, np.inf, 1e38):
        own = np.full_like(answers, number)
        assert are_wrong(answers, own, sizes(answers), sizes(answers), "bf16", codec_of("int4")).all()
    huge = np.full(4, 1e30, np.float32)  # sizes of updates whose sum is small
    assert are_wrong(1.01 * answers, answers, huge, sizes(answers), "fp32", codec_of("fp32")).all()


# Other devices, as far as a CPU can imitate them


def updates_of(block: torch.nn.Module, inputs: Floats, precision: Precision, dtype: torch.dtype) -> Floats:
    lengths, positions = torch.tensor([LENGTH] * 4), torch.arange(LENGTH).repeat(4)
    device = ComputeDevice("cpu", "bf16" if precision == "bf16" else "fp32")
    x_RD = torch.from_numpy(inputs).to(dtype)
    with torch.no_grad(), device.autocast():
        y_RD = block.to(dtype)(x_RD, lengths, positions)
    block.float()
    result: Floats = (y_RD.to(dtype) - x_RD).float().numpy()
    return result


def in_another_order(block: torch.nn.Module) -> torch.nn.Module:
    """The same block, except for the order in which the feed-forward part adds up."""
    linears = [module for module in block.modules() if isinstance(module, torch.nn.Linear)]
    up, down = linears[-2:]
    order = torch.randperm(up.out_features, generator=torch.Generator().manual_seed(1))
    for name, tensor in (("weight", up.weight[order]), ("bias", up.bias[order])):
        setattr(up, name, torch.nn.Parameter(tensor.clone()))
    down.weight = torch.nn.Parameter(down.weight[:, order].clone())
    return block


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("kind", ["ffn", "transformer"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_another_order_of_additions_is_no_lie(precision: Precision, kind: str, codec: CodecName) -> None:
    manifest = make_manifest((1,), kind=kind, hidden=64, feed_forward=256, heads=2)
    block = attend(build_block(manifest, UID(0, (0,)))).requires_grad_(False)
    inputs = arrived(3 * random_rows(4 * LENGTH, 64, seed=3), codec)
    own = updates_of(block, inputs, precision, torch.float32)
    others = [updates_of(in_another_order(block), inputs, precision, torch.float32)]
    if precision == "fp32":
        others.append(updates_of(block, inputs, precision, torch.float64))
    for other in others:
        ones = sizes(inputs)
        assert not are_wrong(arrived(other, codec), own, sizes(own), ones, precision, codec_of(codec)).any()
        lie = arrived(1.01 * other, codec)
        caught = are_wrong(lie, own, sizes(own), ones, precision, codec_of(codec)).mean()
        assert caught > (0.2 if codec == "int4" else 0.5) or (precision, codec) == ("bf16", "int4")


def test_attention_that_turns_on_one_rounding_bans_no_node_that_computes_in_bf16() -> None:
    """As many rows are wrong as were found for blocks with sharp attention on other kernels. A liar has more."""

    def banned(precision: Precision, share: float, rows: int, seed: int) -> bool:
        calls = CallTracker(None, CircuitBreakers())  # type: ignore[arg-type]  # nobody is called
        checks = SpotChecks(calls, None, "fp32", random.Random(0))
        sent, reply, of_batch = answered(0, 3, 0.0)
        sample = Sample.draw(sent, reply, of_batch, random.Random(0))
        rng = np.random.default_rng(seed)
        for _ in range(rows // len(sample.places)):
            found = rng.binomial(len(sample.places), share)
            if found:
                checks._fail(sample, "for a test", found, precision)
            else:
                checks._pass(sample)
            if calls.breakers.banned(calls.now()):
                return True
        return False

    assert not any(banned("bf16", 2.5e-4, 50_000, seed) for seed in range(4))
    assert all(banned("bf16", 1e-2, 2000, seed) for seed in range(4))
    assert banned("fp32", 2.5e-4, 100_000, 0)


def test_experts_that_compute_together_answer_as_each_alone() -> None:
    manifest = make_manifest((4,), hidden=64, feed_forward=128, heads=2)
    experts = [Expert(UID(0, (number,)), manifest) for number in range(4)]
    inputs, lengths, positions = (
        random_rows(2 * LENGTH, 64),
        np.array([LENGTH] * 2),
        np.tile(np.arange(LENGTH), 2),
    )
    rows = Rows(torch.from_numpy(inputs), torch.from_numpy(lengths), torch.from_numpy(positions))
    results = compute_together(
        experts, [WorkItem(e.uid, "forward", rows, 1e9, "", "", keep=True) for e in experts]
    )
    for expert, result in zip(experts, results, strict=True):
        assert isinstance(result, Result)
        assert isinstance(result.graph, SharedGraph), "they were computed together"
        state = expert.export_block(result.version)
        assert state is not None
        loader = BlockLoader(manifest, SWARM)
        own = loader.load(expert.uid, to_bytes(Checkpoint(state, 0), SWARM, expert.uid, 0.0)).updates(
            inputs, lengths, positions, "fp32"
        )
        for codec in CODECS:
            assert wrong(arrived(result.tensor.numpy(), codec), own, "fp32", codec) == 0


# Which answers are drawn


@dataclass(frozen=True)
class Scaled:
    """An expert whose update is a multiple of its inputs."""

    factor: float

    def updates(self, inputs: Floats, lengths: Integers, positions: Integers, precision: Precision) -> Floats:
        assert lengths.sum() == len(inputs) == len(positions)
        assert (lengths > 0).all()
        result: Floats = (self.factor * inputs * (1 + positions[:, None])).astype(np.float32)
        return result


def answered(seed: int, experts: int, missing: float) -> tuple[SentBatch, AnsweredRows, Floats]:
    """A node's answers to some rows, without those of the experts that are `missing`."""
    rng = np.random.default_rng(seed)
    rows, k = 5 * LENGTH, 3
    coordinates = rng.permuted(np.tile(np.arange(experts), (rows, 1)), axis=1)[:, :k, None]
    wanted = rng.random((rows, k)) < 0.7
    wanted[0, 0] = True
    whole = NodeBatch.of(0, coordinates, wanted, (experts,), Segments.whole(5, LENGTH))
    batch, _ = whole.only(whole.asked)
    weights = np.where(batch.asked, rng.uniform(0.1, 1, batch.asked.shape), 0).astype(np.float32)
    sent = SentBatch(batch, make_node(make_peer_id(1)), weights, CallProgress())
    sent.versions.update({uid: 1 + uid.coordinate[0] for uid in batch.uids})
    slots = batch.asked & (rng.random(batch.asked.shape) >= missing)
    slots[0] = batch.asked[0]
    places = np.flatnonzero(slots.any(axis=1))
    inputs = rng.standard_normal((len(batch.rows), 8)).astype(np.float32)
    factors = 1.0 + batch.experts  # of each slot's expert
    share = shares(weights[places], slots[places])
    sums = (share * factors[places]).sum(axis=1) * (1 + batch.positions[places])
    return sent, AnsweredRows(batch, places, slots[places], (sums[:, None] * inputs[places])), inputs


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), experts=st.integers(3, 6), missing=st.sampled_from([0.0, 0.3]))
def test_whatever_is_drawn_an_honest_answer_passes_and_a_lie_in_a_checked_row_fails(
    seed: int, experts: int, missing: float
) -> None:
    sent, reply, inputs = answered(seed, experts, missing)
    reply = replace(reply, tensor=reply.tensor.astype(np.float32))
    sample = Sample.draw(sent, reply, inputs, random.Random(seed))
    assert 1 <= len(sample.versions) <= 3
    assert len(sample.places)
    known = {uid: Scaled(1.0 + sent.batch.uids.index(uid)) for uid in sample.versions}
    assert sample.wrong_rows(known, "fp32", codec_of("fp32"))[0] == 0
    answers = sample.answers.copy()
    answers[-1] *= 1.01
    found, apart = replace(sample, answers=answers).wrong_rows(known, "fp32", codec_of("fp32"))
    assert (found, round(apart, 3)) == (1, 0.01)


# Over real sockets


@pytest.fixture
def any_traffic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every answer that is drawn is checked, however large the parameters are."""
    monkeypatch.setattr("trainer_client.dispatch.spot_checks._TRAFFIC_SHARE", 1e9)


class Reluctant:
    """Gives no parameters, and a reason."""

    def __init__(self, error: Exception) -> None:
        self.error = error
        self.asked = 0

    async def fetch(self, node: NodeInfo, uid: UID, version: int, deadline_s: float) -> FetchedBlock:
        self.asked += 1
        raise self.error


@dataclass
class Checked:
    """The results of the checks."""

    banned: set[object]
    outcomes: Mapping[str, float]
    rows: float
    left_alone_after: float = 0.0


async def check_nodes(
    *runtimes: type[Runtime],
    codec: CodecName = "fp32",
    steps: int = 33,
    trains: bool = False,
    source: Reluctant | None = None,
    rights: Sequence["session_pb2.Right"] = (session_pb2.RIGHT_FORWARD,),
) -> tuple[Checked, list[NodeInfo]]:
    """Forward passes, and backward passes if it `trains`, to one node of each kind with one expert each."""
    manifest = MANIFEST.model_copy(update={"wire": WireSpec(codec=codec)})
    loader, channels = BlockLoader(manifest, SWARM), ChannelPool()
    async with AsyncExitStack() as stack:
        nodes = []
        for number, kind in enumerate(runtimes):
            uids = [UIDS[number]]
            nodes.append((await stack.enter_async_context(a_node(2**24, manifest, uids, kind)))[0])
        stack.push_async_callback(channels.close)
        caller = GrpcCaller(channels, SWARM, HIDDEN, codec_of(codec), a_caller(SWARM))
        blocks = BlockClient(channels, a_caller(SWARM, rights=rights), SWARM, loader.max_bytes)
        replicas = {uid: (make_replica(uid, node.peer_id),) for uid, node in zip(UIDS, nodes, strict=False)}
        directory = FakeDirectory(View(manifest, replicas, {node.peer_id: node for node in nodes}, 1.0))
        checking = Checking(1.0, source or blocks, loader)
        dispatcher = Dispatcher(directory, caller, WaitPolicy(9.0, 1.0, 1), checking=checking)
        stack.push_async_callback(dispatcher.close)
        banned: set[object] = set()
        rng = np.random.default_rng(4)
        for _ in range(steps):
            scores = [rng.standard_normal((4 * LENGTH, 2), dtype=np.float32) for _ in range(2)]
            inputs = rng.standard_normal((4 * LENGTH, HIDDEN)).astype(np.float32)
            passed = await send(dispatcher, inputs, scores, 1, LENGTH, keep=trains)
            async with asyncio.timeout(60):
                while len(dispatcher._checks._tasks):  # noqa: ASYNC110  # checks set no event
                    await asyncio.sleep(0.001)
            if trains:
                await dispatcher.send_back(passed, np.full_like(passed.updates, 0.1))
            banned = set(dispatcher._calls.avoided())
            if banned:
                break
        metrics = dispatcher.metrics
        outcomes = totals(metrics.spot_checks, "outcome")
        return Checked(banned, outcomes, total(metrics.checked_rows)), nodes


@pytest.mark.parametrize("codec", ["fp32", "int8", "int4"])
def test_a_node_that_alters_one_row_in_a_hundred_is_banned_and_an_honest_one_is_not(
    loop: LoopThread,
    codec: CodecName,
    caplog: pytest.LogCaptureFixture,
    any_traffic: None,
) -> None:
    checked, (liar, honest) = loop.run(check_nodes(LyingRuntime, Runtime, codec=codec, steps=400), 60)
    assert checked.banned == {liar.peer_id}
    assert honest.peer_id not in checked.banned
    assert checked.outcomes["failed"] == 2
    assert checked.rows <= 2 * 2000, "of both nodes"
    (warning,) = [record.getMessage() for record in caplog.records if "banned" in record.getMessage()]
    assert str(liar.peer_id) in warning
    assert "1.00%" in warning or codec != "fp32"


def test_a_lone_host_is_checked_while_it_trains(loop: LoopThread, any_traffic: None) -> None:
    """Each step makes a new version, which is fetched to check the answers it has given."""
    checked, _ = loop.run(check_nodes(Runtime, steps=12, trains=True), 60)
    assert checked.outcomes["passed"] == 12
    assert checked.outcomes["failed"] == 0


def test_bytes_of_parameters_are_a_small_share_of_those_of_answers(loop: LoopThread) -> None:
    checked, _ = loop.run(check_nodes(Runtime, steps=12, trains=True), 60)
    assert checked.outcomes["passed"] <= 2, "one expert takes as many bytes as several answers"


def test_what_was_fetched_before_tells_a_node_nothing_of_when_it_is_asked_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The number of checks follows from their share of the traffic, and after each check the next answer is as likely
    to be checked.
    """

    async def scenario() -> None:
        calls = CallTracker(None, CircuitBreakers())  # type: ignore[arg-type]  # nobody is called
        source, loader = Reluctant(TransferError("busy")), BlockLoader(MANIFEST, SWARM)
        monkeypatch.setattr(BlockLoader, "max_bytes", 2000)
        checks = SpotChecks(calls, Checking(1.0, source, loader), "fp32", random.Random(0))
        sent, reply, _ = answered(0, 3, 0.0)
        inputs = np.zeros((5 * LENGTH, 8), np.float32)
        checked = []
        for _ in range(2000):
            checks.note(sent, reply, inputs)
            checked.append(len(checks._tasks) > 0)
            await checks._tasks.join()
        assert source.asked * loader.max_bytes == pytest.approx(2000 * 0.1 * 4 * reply.tensor.size, rel=0.3)
        twice = sum(one and other for one, other in pairwise(checked))
        assert twice == pytest.approx(sum(checked) ** 2 / 2000, rel=0.5), "as often as without memory"
        await checks.close()

    asyncio.run(scenario())


class Stalling:
    """Gives nothing until it is let go, and counts requests by node."""

    def __init__(self) -> None:
        self.asked: list[PeerID] = []

    async def fetch(self, node: NodeInfo, uid: UID, version: int, deadline_s: float) -> FetchedBlock:
        self.asked.append(node.peer_id)
        await asyncio.Event().wait()
        raise AssertionError("nothing is given")


def test_a_node_that_holds_up_the_checks_of_its_answers_holds_up_no_others(any_traffic: None) -> None:
    """It delays neither those of other nodes nor those of its own next answers."""

    async def scenario() -> None:
        calls = CallTracker(None, CircuitBreakers())  # type: ignore[arg-type]  # nobody is called
        source = Stalling()
        checks = SpotChecks(
            calls, Checking(1.0, source, BlockLoader(MANIFEST, SWARM)), "fp32", random.Random(0)
        )
        sent, reply, _ = answered(0, 3, 0.0)
        other = replace(sent, node=make_node(make_peer_id(2)))
        inputs = np.zeros((5 * LENGTH, 8), np.float32)
        for number in range(20):
            before = len(source.asked)
            checks.note(other if number == 10 else sent, reply, inputs)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert len(source.asked) > before, "each answer is checked"
            assert len(checks._tasks) <= 4 + 1
        assert other.node in checks._fetching.values(), "who holds up the most makes room"
        assert total(calls.metrics.spot_checks, outcome="not_given") == 16
        await checks.close()

    asyncio.run(scenario())


def test_a_node_that_gives_no_parameters_is_not_banned_but_counted(
    loop: LoopThread, caplog: pytest.LogCaptureFixture, any_traffic: None
) -> None:
    source = Reluctant(TransferError("busy"))
    checked, _ = loop.run(check_nodes(LyingRuntime, source=source), 60)
    assert checked.outcomes["not_given"] == 33
    assert checked.outcomes["passed"] == checked.outcomes["failed"] == 0
    assert not checked.banned
    assert len([r for r in caplog.records if "none of the last 32 answers" in r.getMessage()]) == 1


class Evading(LyingRuntime):
    """Says after each answer that its parameters have changed."""

    def _compute(self, experts: Sequence[Expert], batch: Sequence[Entry]) -> list[Result | ExpertError]:
        results = super()._compute(experts, batch)
        for expert in experts:
            expert._changes += 1
        return results


def test_a_node_whose_parameters_always_have_moved_on_is_noticed(
    loop: LoopThread, caplog: pytest.LogCaptureFixture, any_traffic: None
) -> None:
    checked, _ = loop.run(check_nodes(Evading), 60)
    assert checked.outcomes["moved_on"] == 33
    assert checked.outcomes["passed"] == checked.outcomes["failed"] == 0
    assert not checked.banned
    assert len([r for r in caplog.records if "none of the last 32 answers" in r.getMessage()]) == 1


def test_a_node_that_gives_parameters_which_cant_be_right_is_banned(
    loop: LoopThread, any_traffic: None
) -> None:
    checked, (node,) = loop.run(check_nodes(Runtime, source=Reluctant(StateError("garbage"))), 60)
    assert checked.banned == {node.peer_id}
    assert checked.outcomes["failed"] == 2


def test_parameters_that_break_their_parser_end_no_task(
    loop: LoopThread, any_traffic: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(self: BlockLoader, uid: UID, data: bytes) -> RecomputedExpert:
        raise ZeroDivisionError

    monkeypatch.setattr(BlockLoader, "load", load)
    checked, _ = loop.run(check_nodes(Runtime, steps=5), 60)
    assert checked.outcomes["not_given"] == 5


def test_whoever_may_not_fetch_checks_nothing(loop: LoopThread, any_traffic: None) -> None:
    checked, _ = loop.run(check_nodes(Runtime, rights=[session_pb2.RIGHT_BACKWARD], steps=5), 60)
    assert checked.outcomes["not_given"] == 5


def test_after_a_failure_a_node_is_checked_until_so_many_answers_were_right() -> None:
    """This does not depend on chance. The node can't avoid it by giving no parameters."""

    async def scenario() -> None:
        calls = CallTracker(None, CircuitBreakers())  # type: ignore[arg-type]  # nobody is called
        checking = Checking(1e-12, Reluctant(TransferError("")), BlockLoader(MANIFEST, SWARM))
        checks = SpotChecks(calls, checking, "fp32", random.Random(0))
        sent, reply, of_batch = answered(0, 3, 0.0)
        inputs = np.zeros((5 * LENGTH, 8), np.float32)
        for _ in range(9):
            checks.note(sent, reply, inputs)
        assert not checks._tasks
        checks._fail(Sample.draw(sent, reply, of_batch, random.Random(0)), "for a test", 1, "fp32")
        sample = Sample.draw(sent, reply, of_batch, random.Random(0))
        for right in range(33):
            for _ in range(2):
                checks.note(sent, reply, inputs)
                await checks._tasks.join()
            assert total(calls.metrics.spot_checks, outcome="not_given") == 2 * min(32, right + 1)
            checks._pass(sample)
        await checks.close()

    asyncio.run(scenario())


@pytest.mark.parametrize(("rows_between", "banned"), [(100_000, 0), (99_000, 1)])
def test_failures_with_very_many_right_rows_between_them_ban_nobody(rows_between: int, banned: int) -> None:
    """Otherwise a node that is honest for months would be banned for something that looks like one rounding in a
    million rows.
    """

    async def scenario() -> None:
        calls = CallTracker(None, CircuitBreakers())  # type: ignore[arg-type]  # nobody is called
        checking = Checking(0.01, Reluctant(TransferError("")), BlockLoader(MANIFEST, SWARM))
        checks = SpotChecks(calls, checking, "fp32", random.Random(0))
        sent, reply, of_batch = answered(0, 3, 0.0)
        sample = Sample.draw(sent, reply, of_batch, random.Random(0))
        checks._fail(sample, "for a test", 1, "fp32")
        for _ in range(-(-rows_between // len(sample.places))):
            checks._pass(sample)
        checks._fail(sample, "for a test", 1, "fp32")
        assert calls.breakers.banned(calls.now()) == banned
        await checks.close()

    asyncio.run(scenario())


def test_a_long_good_record_excuses_no_more_lies_than_a_short_one() -> None:
    calls = CallTracker(None, CircuitBreakers())  # type: ignore[arg-type]  # nobody is called
    checks = SpotChecks(calls, None, "fp32", random.Random(0))
    sent, reply, of_batch = answered(0, 3, 0.0)
    sample = Sample.draw(sent, reply, of_batch, random.Random(0))
    for _ in range(200_000 // len(sample.places)):
        checks._pass(sample)
    for _ in range(4):
        checks._fail(sample, "for a test", 10, "bf16")
    assert calls.breakers.banned(calls.now()) == 1


# Parameters from a stranger


def test_parameters_of_another_expert_or_swarm_or_form_are_refused() -> None:
    expert = Expert(UIDS[0], MANIFEST)
    loader = BlockLoader(MANIFEST, SWARM)
    state = expert.export_block(expert.version)
    assert state is not None
    good = to_bytes(Checkpoint(state, 0), SWARM, UIDS[0], 0.0)
    assert len(good) <= loader.max_bytes
    assert isinstance(loader.load(UIDS[0], good), RecomputedExpert)
    inputs = random_rows(4, HIDDEN)
    own = loader.load(UIDS[0], good).updates(inputs, np.array([4]), np.arange(4), "fp32")
    expected = (
        expert.block(torch.from_numpy(inputs), torch.tensor([4]), torch.arange(4)).detach().numpy() - inputs
    )
    np.testing.assert_array_equal(own, expected)
    less = dict(state)
    less.popitem()
    spoilt = {name: torch.full_like(tensor, float("nan")) for name, tensor in state.items()}
    for data in (
        to_bytes(Checkpoint(state, 0), "another", UIDS[0], 0.0),
        to_bytes(Checkpoint(state, 0), SWARM, UIDS[1], 0.0),
        to_bytes(Checkpoint(less, 0), SWARM, UIDS[0], 0.0),
        to_bytes(Checkpoint(spoilt, 0), SWARM, UIDS[0], 0.0),
        to_bytes(expert.checkpoint(), SWARM, UIDS[0], 0.0)[:-4],
        good[:-1],
        b"",
    ):
        with pytest.raises(StateError):
            loader.load(UIDS[0], data)


@pytest.mark.parametrize("layer", [0, 1])
def test_experts_of_an_encoder_and_of_its_decoder_are_recomputed_as_they_answer(layer: int) -> None:
    model = MANIFEST.model.model_copy(update={"layers": 2, "causal": (False, True)})
    manifest = MANIFEST.model_copy(update={"model": model})
    expert = Expert(UID(layer, (0,)), manifest)
    torch.nn.init.normal_(expert.block.get_parameter("attention_output.weight"))
    inputs, lengths, positions = random_rows(4, HIDDEN), np.array([4]), np.arange(4)
    arguments = (torch.from_numpy(each) for each in (inputs, lengths, positions))
    expected = expert.block(*arguments).detach().numpy() - inputs
    state = expert.export_block(expert.version)
    assert state is not None
    data = to_bytes(Checkpoint(state, 0), SWARM, expert.uid, 0.0)
    own = BlockLoader(manifest, SWARM).load(expert.uid, data).updates(inputs, lengths, positions, "fp32")
    np.testing.assert_array_equal(own, expected)


def test_kinds_of_other_packages_are_not_checked() -> None:
    other = Manifest.model_construct(**{**MANIFEST.__dict__, "experts": MANIFEST.experts.model_copy()})
    object.__setattr__(other.experts, "kind", "sauna")
    assert BlockLoader.of(other, SWARM) is None
    assert StatusCode.OK  # nothing was built
