"""Every codec between a trainer and a real node, over real sockets."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
from callers import a_caller
from expert_fakes import ask
from real_node import GENEROUS, HIDDEN, ROWS, UIDS, a_node, request, rows

from dht.manifest import Manifest, WireSpec
from dht.uid import UID
from peer.codec import CodecName, Floats, codec_of, encoded_bytes
from peer.errors import ExpertError
from peer.loop import LoopThread
from peer.metrics import total, totals
from peer.rpc.channels import ChannelPool
from trainer_client.dispatch.grpc_caller import GrpcCaller

CODECS: tuple[CodecName, ...] = get_args(CodecName)
CLOSE = {"fp32": 0.0, "bf16": 0.02, "fp16": 0.003, "int8": 0.04, "int4": 0.5}
"""The permitted error as a share of the largest number: rounding both ways, as it passes through a network of one
layer.
"""


async def out_and_back(codec: CodecName, uids: Sequence[UID] = tuple(UIDS)) -> tuple[list[Floats], float]:
    """What experts answer, forward and backward, and the bytes sent both ways."""
    channels = ChannelPool()
    async with a_node(GENEROUS) as (node, runtime):
        caller = GrpcCaller(channels, "kept-swarm", HIDDEN, codec_of(codec), a_caller("kept-swarm"))
        forward = await ask(caller, node, "forward", *(request(uid) for uid in uids), keep=True)
        requests = [request(uid, rows(2 + i)) for i, uid in enumerate(uids)]
        backward = await ask(caller, node, "backward", *requests, kept=forward.kept)
        await channels.close()
        assert total(runtime.metrics.updates) == len(uids)
    tensors = [answers.tensor(uid) for answers in (forward, backward) for uid in uids]
    assert total(caller.metrics.bytes, direction="sent") == total(caller.metrics.bytes, direction="received")
    exact = 2 * len(uids) * encoded_bytes(ROWS, HIDDEN, codec_of("fp32"))
    assert totals(caller.metrics.fp32_bytes, "direction") == {"sent": exact, "received": exact}
    return tensors, total(caller.metrics.bytes, direction="sent")


@pytest.mark.parametrize("codec", CODECS)
def test_answers_are_close_to_those_of_fp32_and_as_small_as_the_codec_makes_them(
    loop: LoopThread, codec: CodecName
) -> None:
    exact, _ = loop.run(out_and_back("fp32"), 120)
    found, sent = loop.run(out_and_back(codec), 120)
    assert sent == 4 * encoded_bytes(ROWS, HIDDEN, codec_of(codec))
    assert len(found) == len(exact) == 4
    for one, other in zip(found, exact, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=CLOSE[codec] * np.abs(other).max())


def test_int4_rounds_gradients_at_random_and_alike_for_the_same_request(
    loop: LoopThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This concerns gradients, which decide a node's step and its answer, and the answer itself.

    Tested with one expert: rows of several experts are rounded in the blocks in which they become ready.
    """

    def answers(name: str, first_id: int) -> list[bytes]:
        ids = (bytes([first_id + call]) * 16 for call in range(2))
        source = SimpleNamespace(token_bytes=lambda size: next(ids))
        monkeypatch.setattr("trainer_client.dispatch.grpc_caller.secrets", source)
        tensors, _ = loop.run(out_and_back("int4", UIDS[:1]), 120)
        return [tensor.tobytes() for tensor in tensors]

    one, again, other = answers("one", 0), answers("again", 0), answers("other", 2)
    assert one == again
    assert one[0] == other[0], "forward is rounded to the nearest"
    assert one[1] != other[1]


@pytest.mark.parametrize("codec", CODECS)
def test_a_gradient_that_is_not_finite_is_refused_by_the_node_in_every_codec(
    loop: LoopThread, codec: CodecName
) -> None:
    gradients = rows(1)
    gradients[2, 3] = np.nan

    async def scenario() -> None:
        channels = ChannelPool()
        async with a_node(GENEROUS) as (node, runtime):
            try:
                caller = GrpcCaller(channels, "kept-swarm", HIDDEN, codec_of(codec), a_caller("kept-swarm"))
                await ask(caller, node, "backward", request(UIDS[0], gradients))
            finally:
                await channels.close()
                assert total(runtime.metrics.updates) == 0

    with pytest.raises(ExpertError, match="numbers that are not finite"):
        loop.run(scenario(), 120)


def test_a_manifest_names_the_codec_and_without_one_it_is_fp32() -> None:
    assert Manifest(name="sauna").wire.codec == "fp32"
    text = Manifest(name="sauna", wire=WireSpec(codec="int8")).to_json()
    assert Manifest.from_json(text).wire.codec == "int8"
