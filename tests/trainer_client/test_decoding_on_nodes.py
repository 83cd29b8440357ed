"""Continuing sequences with experts on nodes, over real sockets: nodes keep rows, forget them, change and die."""

import math
from collections.abc import AsyncGenerator, Iterator
from contextlib import AsyncExitStack, aclosing, contextmanager
from dataclasses import dataclass

import pytest
import torch
from callers import a_caller
from expert_fakes import FakeDirectory, make_replica
from grpc import StatusCode
from real_node import a_node
from torch import Tensor

from dht.announcements import NodeInfo
from dht.directory import View
from dht.manifest import Manifest
from expert_server.serving.runtime import Runtime
from peer.errors import ExpertError
from peer.loop import LoopThread
from peer.metrics import total
from peer.rpc.channels import ChannelPool
from trainer_client.decoding import Decoding, TextDecoder
from trainer_client.dispatch.batches import CallReply, ExpertReply, Kept, NodeCall
from trainer_client.dispatch.dispatcher import Dispatcher
from trainer_client.dispatch.grpc_caller import GrpcCaller
from trainer_client.dispatch.policy import WaitPolicy
from trainer_client.model import LanguageModel
from trainer_client.moe import RemoteMixtureOfExperts
from trainer_client.routers import Routing

SWARM = "kept-swarm"
PROMPTS = [[1, 2, 3, 4, 5, 6], [7, 8, 9], [10, 11, 12, 13]]


def make_manifest(kind: str = "transformer", prefix: int = 0) -> Manifest:
    return Manifest.model_validate(
        {
            "name": "kept",
            "model": {
                "layers": 2,
                "hidden": 16,
                "heads": 2,
                "context": 16,
                "feed_forward": 32,
                "local": "attention",
            },
            "experts": {"grid": [2, 2], "kind": kind},
            "routing": {"top_k": 2, "prefix": prefix},
        }
    )


@dataclass
class OnNodes:
    """A trainer's model whose experts are on nodes."""

    loop: LoopThread
    model: LanguageModel
    dispatcher: Dispatcher
    directory: FakeDirectory
    nodes: list[NodeInfo]
    runtimes: list[Runtime]

    def rows_of_nodes(self) -> list[int]:
        """Rows that each node has computed so far, over all its experts."""
        return [int(total(runtime.metrics.rows)) for runtime in self.runtimes]

    def rows(self) -> int:
        return sum(self.rows_of_nodes())

    def change_experts(self) -> None:
        """Changes the first node's experts, as an optimizer step does."""

        def change() -> None:
            for expert in self.runtimes[0].experts.values():
                with torch.no_grad():
                    for parameter in expert.parameters:
                        parameter.add_(0.01)
                expert._changes += 1

        self.loop.run(self.runtimes[0].run(change))

    def uncached(self, sequence: Decoding) -> Tensor:
        with torch.no_grad():
            logits_V: Tensor = self.model(torch.tensor([sequence.tokens]))[0, -1]
            return logits_V

    def check(self, decoder: TextDecoder, sequences: list[Decoding], token: int) -> int:
        """Checks that one more token of each sequence is as without caching. Returns the rows that the
        nodes computed.
        """
        before = self.rows()
        logits_SV = decoder.logits(sequences)
        computed = self.rows() - before
        for logits_V, sequence in zip(logits_SV, sequences, strict=True):
            torch.testing.assert_close(logits_V, self.uncached(sequence), atol=2e-5, rtol=2e-4)
            sequence.append(token)
        return computed


@contextmanager
def on_nodes(
    loop: LoopThread, manifest: Manifest, count: int = 2, max_kept_bytes: int = 2**24
) -> Iterator[OnNodes]:
    """With two nodes, each has every second expert; with four, there are two of each kind."""
    stack, channels = AsyncExitStack(), ChannelPool()

    async def start() -> tuple[list[NodeInfo], list[Runtime]]:
        stack.push_async_callback(channels.close)
        nodes, runtimes = [], []
        for number in range(count):
            uids = manifest.uids()[number % 2 :: 2]
            node, runtime = await stack.enter_async_context(a_node(max_kept_bytes, manifest, uids))
            nodes.append(node)
            runtimes.append(runtime)
        return nodes, runtimes

    nodes, runtimes = loop.run(start())
    try:
        replicas = {
            uid: tuple(make_replica(uid, node.peer_id) for node in nodes[number % 2 :: 2])
            for number, uid in enumerate(manifest.uids())
        }
        directory = FakeDirectory(View(manifest, replicas, {node.peer_id: node for node in nodes}, 1.0))
        caller = GrpcCaller(channels, SWARM, manifest.width, sessions=a_caller(SWARM))
        # A call that a busy machine answers late must not go to another node, too: that would change the counts.
        dispatcher = Dispatcher(directory, caller, WaitPolicy(60.0, 60.0, 1, most_hedged=0.0))
        routing = Routing(
            k=2, choose_by="sequence" if manifest.routing.prefix else "token", prefix=manifest.routing.prefix
        )
        torch.default_generator.manual_seed(0)  # texts must not all go to the nodes of one kind
        model = LanguageModel(
            manifest, lambda layer: RemoteMixtureOfExperts(layer, manifest, dispatcher, loop.run, routing)
        )
        yield OnNodes(loop, model.requires_grad_(False), dispatcher, directory, nodes, runtimes)
        loop.run(dispatcher.close())
    finally:
        loop.run(stack.aclose())


@pytest.mark.parametrize(
    ("kind", "prefix"),
    [
        pytest.param("transformer", 0, marks=pytest.mark.slow),
        ("ffn", 2),
        pytest.param("transformer", 2, marks=pytest.mark.slow),
        pytest.param("ffn", 0, marks=pytest.mark.slow),
    ],
)
def test_nodes_compute_each_row_once(loop: LoopThread, kind: str, prefix: int) -> None:
    with on_nodes(loop, make_manifest(kind, prefix)) as swarm:
        decoder = TextDecoder(swarm.model)
        sequences = [decoder.begin(prompt) for prompt in PROMPTS]
        counts = [swarm.check(decoder, sequences, token) for token in range(9)]
        rows = 2 * 2  # layers and experts of each
        assert counts[0] == rows * 13
        assert counts[1:] == [rows * 3] * 8
        # The first has 15 tokens now. After two more, half of the context is dropped.
        assert [swarm.check(decoder, sequences, token) for token in range(3)] == [
            rows * 3,
            rows * 3,
            rows * (8 + 2),
        ]


def test_what_nodes_keep_is_known_with_the_last_rows_also_on_a_busy_loop(
    loop: LoopThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peer.loop._SLICE_S", 0.0)  # other tasks get a turn after each reply
    with on_nodes(loop, make_manifest()) as swarm:
        decoder = TextDecoder(swarm.model)
        sequences = [decoder.begin(prompt) for prompt in PROMPTS]
        assert [swarm.check(decoder, sequences, token) for token in range(3)] == [
            2 * 2 * n for n in (13, 3, 3)
        ]


def test_an_expert_that_has_changed_is_given_the_prompt_again(loop: LoopThread) -> None:
    with on_nodes(loop, make_manifest()) as swarm:
        decoder = TextDecoder(swarm.model)
        sequences = [decoder.begin(prompt) for prompt in PROMPTS]
        swarm.check(decoder, sequences, 0)
        swarm.change_experts()
        assert swarm.check(decoder, sequences, 1) >= 2 * 2 * 16
        assert swarm.check(decoder, sequences, 2) == 2 * 2 * 3
        assert total(swarm.dispatcher.metrics.forgotten_sequences) > 0
        assert total(swarm.dispatcher.metrics.unanswered_rows) == 0
        assert swarm.dispatcher.open_breakers() == 0


def test_experts_that_change_all_the_time_are_seldom_asked_to_go_on(loop: LoopThread) -> None:
    with on_nodes(loop, make_manifest()) as swarm:
        decoder, attempts = TextDecoder(swarm.model), []
        sequence = decoder.begin(PROMPTS[0])
        for token in range(40):
            before = total(swarm.dispatcher.metrics.forgotten_sequences)
            decoder.logits([sequence])
            attempts.append(total(swarm.dispatcher.metrics.forgotten_sequences) > before)
            sequence.append(token)
            swarm.change_experts()
        assert 2 <= sum(attempts) <= 7


@pytest.mark.parametrize("how", ["says so", "keeps nothing"])
def test_a_node_that_forgets_again_and_again_is_avoided_where_others_have_its_experts(
    loop: LoopThread, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with on_nodes(loop, make_manifest(), count=4) as swarm:
        forgetful = swarm.nodes[0].peer_id

        async def forget(caller: GrpcCaller, call: NodeCall) -> AsyncGenerator[CallReply, None]:
            is_so = call.node.peer_id == forgetful
            asked.append(is_so)
            async with aclosing(honest(caller, call)) as replies:
                async for reply in replies:
                    if is_so and call.held is not None and how == "says so":
                        error = ExpertError(StatusCode.FAILED_PRECONDITION, "send all of them")
                        reply = ExpertReply(call.batch, call.batch.uids[0], error)
                    if not (is_so and isinstance(reply, Kept) and how == "keeps nothing"):
                        yield reply

        honest, asked = GrpcCaller.call, list[bool]()
        monkeypatch.setattr(GrpcCaller, "call", forget)
        decoder = TextDecoder(swarm.model)
        sequence = decoder.begin(PROMPTS[0])
        for token in range(9):
            asked.clear()
            computed = swarm.rows()
            decoder.logits([sequence])
            computed = swarm.rows() - computed
            sequence.append(token)
        assert asked
        assert not any(asked)
        assert computed == 2 * 2
        swarm.dispatcher.latencies.nodes_lately(now=math.inf)  # nor is it passed over for having been slow
        for _ in range(50):  # other texts may be sent there
            if not any(asked):
                decoder.logits([decoder.begin(PROMPTS[1])])
        assert any(asked)


def test_nodes_without_room_are_given_whole_sequences(loop: LoopThread) -> None:
    with on_nodes(loop, make_manifest(), max_kept_bytes=0) as swarm:
        decoder = TextDecoder(swarm.model)
        sequences = [decoder.begin(prompt) for prompt in PROMPTS]
        assert [swarm.check(decoder, sequences, token) for token in range(3)] == [
            2 * 2 * n for n in (13, 16, 19)
        ]
        assert total(swarm.dispatcher.metrics.forgotten_sequences) == 0


def test_a_sequence_stays_with_its_replicas_and_moves_when_they_leave(loop: LoopThread) -> None:
    with on_nodes(loop, make_manifest(), count=4) as swarm:
        decoder = TextDecoder(swarm.model)
        sequences = [decoder.begin(prompt) for prompt in PROMPTS]
        counts = [swarm.check(decoder, sequences, token) for token in range(3)]
        assert counts[1:] == [2 * 2 * 3] * 2
        before = swarm.rows_of_nodes()
        decoder.logits(sequences)
        holding = [rows > earlier for rows, earlier in zip(swarm.rows_of_nodes(), before, strict=True)]
        for sequence in sequences:
            sequence.append(3)
        gone = {swarm.nodes[kind if holding[kind] else kind + 2].peer_id for kind in range(2)}
        view = swarm.directory.view
        swarm.directory.view = View(
            view.manifest,
            {
                uid: tuple(replica for replica in replicas if replica.peer_id not in gone)
                for uid, replicas in view.replicas.items()
            },
            {peer_id: node for peer_id, node in view.nodes.items() if peer_id not in gone},
            2.0,
        )
        later = [swarm.check(decoder, sequences, token) for token in range(4, 9)]
        moves = [rows for rows in later if rows != 2 * 2 * 3]
        assert moves
        assert len(moves) <= len(sequences), "each moves once, when it needs an expert of those that left"
