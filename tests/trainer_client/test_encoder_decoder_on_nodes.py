"""An encoder-decoder is trained on nodes, over real sockets, while one of them dies."""

import statistics
import threading
from contextlib import AsyncExitStack

import numpy as np
import pytest
from callers import a_caller
from expert_fakes import FakeDirectory, make_manifest, make_replica
from real_node import a_node

from dht.announcements import NodeInfo
from dht.directory import View
from expert_server.serving.runtime import Runtime
from peer.loop import LoopThread
from peer.rpc.channels import ChannelPool
from trainer_client.data.pairs import PairDataset
from trainer_client.data.tokenizer import ByteTokenizer
from trainer_client.dispatch.dispatcher import Dispatcher
from trainer_client.dispatch.grpc_caller import GrpcCaller
from trainer_client.dispatch.policy import WaitPolicy
from trainer_client.encoder_decoder import EncoderDecoder
from trainer_client.inference import generate
from trainer_client.moe import RemoteMixtureOfExperts
from trainer_client.routers import Routing
from trainer_client.settings import Sampling, TrainerSettings
from trainer_client.training.loop import Training
from trainer_client.training.record import Progress

STEPS = 40
MANIFEST = make_manifest((2, 2), k=2, layers=2, causal=(False, True), hidden=16, context=24, feed_forward=32)
TEXT = np.frombuffer(b"In the sauna one must behave as in church. " * 60, np.uint8)


@pytest.mark.slow
def test_the_loss_falls_also_after_one_of_two_nodes_has_died(loop: LoopThread) -> None:
    stacks, channels = [AsyncExitStack() for _ in range(2)], ChannelPool()

    async def start(number: int) -> tuple[NodeInfo, Runtime]:
        node = a_node(2**24, MANIFEST, MANIFEST.uids())
        return await stacks[number].enter_async_context(node)

    def die(number: int) -> None:
        loop.run(stacks[number].aclose())

    try:
        (one, first), (other, second) = (loop.run(start(number)) for number in range(2))
        replicas = {
            uid: tuple(make_replica(uid, node.peer_id) for node in (one, other)) for uid in MANIFEST.uids()
        }
        directory = FakeDirectory(View(MANIFEST, replicas, {one.peer_id: one, other.peer_id: other}, 1.0))
        caller = GrpcCaller(channels, "kept-swarm", MANIFEST.width, sessions=a_caller("kept-swarm"))
        dispatcher = Dispatcher(directory, caller, WaitPolicy(60.0, 60.0, 1))
        model = EncoderDecoder(
            MANIFEST,
            lambda layer: RemoteMixtureOfExperts(layer, MANIFEST, dispatcher, loop.run, Routing(k=2)),
            256,
        )
        data = PairDataset(TEXT, MANIFEST.model.context, "span-corruption", ByteTokenizer().token_bytes)
        settings = TrainerSettings(steps=STEPS, batch_size=4, warmup_steps=4, learning_rate=1e-2)
        training = Training(model, data, settings)

        def observe(progress: Progress) -> None:
            if progress.step == STEPS // 2:
                die(1)

        training.run(observe, threading.Event())
        losses = training.history.losses
        middle = statistics.fmean(losses[STEPS // 2 - 5 : STEPS // 2])
        assert middle < losses[0] - 0.5
        assert statistics.fmean(losses[-5:]) < middle
        # The encoder's experts get their gradients through the decoder's attention.
        experts = [*first.experts.items(), *second.experts.items()]
        assert {uid.layer for uid, expert in experts if expert.update_count} == {0, 1}
        written = list(generate(model, list(b"In the sauna"), Sampling(temperature=0, max_tokens=4)))
        assert all(token < model.special.vocabulary for token in written)
        loop.run(dispatcher.close())
    finally:
        die(0)
        die(1)
        loop.run(channels.close())
