"""The computed traffic of a trainer, compared with bytes counted on real connections."""

from dataclasses import astuple, replace

import numpy as np
import pytest
from callers import a_caller
from expert_fakes import collect
from hypothesis import given, settings
from hypothesis import strategies as st
from real_node import UIDS, a_node

from dht.manifest import Manifest
from peer.codec import CodecName, codec_of, encoded_bytes
from peer.loop import LoopThread
from peer.metrics import totals
from peer.rpc.channels import ChannelPool
from peer.transport.endpoints import Endpoint
from talkoot.demo.links import Link, Proxy, Wire
from talkoot.doctor.traffic import nodes_of_token, row_traffic, trainer_traffic
from trainer_client.dispatch.batches import NodeBatch, NodeCall, relative_weights
from trainer_client.dispatch.grpc_caller import GrpcCaller
from trainer_client.settings import PRESETS

CONTEXT = 256
SEQUENCES, OF_EACH = 32, 8
ROWS = SEQUENCES * OF_EACH
ROUNDS = 3


def make_manifest(
    width: int, codec: CodecName, *, hidden: int | None = None, layers: int = 2, top_k: int = 4
) -> Manifest:
    return Manifest.model_validate(
        {
            "name": "kept",
            "model": {"layers": layers, "hidden": hidden or width, "heads": 2, "context": CONTEXT},
            "experts": {"grid": [2, 2], "kind": "ffn", "width": width, "feed_forward": 16},
            "routing": {"top_k": top_k},
            "wire": {"codec": codec},
        }
    )


async def counted(manifest: Manifest, experts: float) -> tuple[float, float]:
    """Bytes carried to the node and back for each row, forward and backward.

    On average, a row is for `experts` of the node's two experts.
    """
    pool, wire, rng = ChannelPool(), Wire(Link()), np.random.default_rng(0)
    codec = codec_of(manifest.wire.codec)
    caller = GrpcCaller(pool, "kept-swarm", manifest.width, codec, a_caller("kept-swarm"))

    def batch() -> NodeBatch:
        positions = [sorted(rng.choice(CONTEXT, OF_EACH, replace=False)) for _ in range(SEQUENCES)]
        which = np.argsort(rng.random((ROWS, 2)), axis=1)
        which[rng.permutation(ROWS)[round((experts - 1) * ROWS) :], 1] = -1
        lengths = np.full(SEQUENCES, OF_EACH)
        return NodeBatch(np.arange(ROWS), lengths, np.concatenate(positions), tuple(UIDS), which)

    async with a_node(2**24, manifest) as (node, _):
        port = int(str(node.addresses[0]).rsplit(":", 1)[1])
        proxy = await Proxy.start(wire, ("127.0.0.1", port))
        behind = replace(node, addresses=(Endpoint(f"127.0.0.1:{proxy.port}"),))

        async def train() -> tuple[int, int]:
            rows = rng.standard_normal((ROWS, manifest.width), dtype=np.float32)
            weights = relative_weights(
                rng.standard_normal((ROWS, 2), dtype=np.float32), (new := batch()).asked, codec
            )
            call = NodeCall(behind, "forward", new, 20.0, rows, weights, keep=True)
            forward = await collect(caller, call)
            assert forward.kept is not None, forward
            call = replace(call, direction="backward", gradients=rows, keep=False, kept=forward.kept)
            backward = await collect(caller, call)
            assert forward.answered == backward.answered == UIDS
            return wire.there.bytes_carried, wire.back.bytes_carried

        try:
            began = await train()  # which also connects and opens a session
            for _ in range(ROUNDS):
                ended = await train()
        finally:
            await pool.close()
            await proxy.close()
    payload = 2 * (ROUNDS + 1) * ROWS * encoded_bytes(1, manifest.width, codec)
    assert totals(caller.metrics.bytes, "direction") == {"sent": payload, "received": payload}
    there, back = ((end - start) / (ROUNDS * ROWS) for start, end in zip(began, ended, strict=True))
    return there, back


@pytest.mark.parametrize("experts", [1, 1.25, 1.5])
@pytest.mark.parametrize(("width", "codec"), [(448, "int4"), (64, "int4"), (64, "fp32")])
def test_it_is_what_real_calls_move(loop: LoopThread, width: int, codec: CodecName, experts: float) -> None:
    manifest = make_manifest(width, codec)
    there, back = loop.run(counted(manifest, experts), 60)
    # There are 52 bytes of headers in each packet, and an acknowledgement for every second packet.
    upload = there * 1500 / 1448 + back * 52 / 2 / 1448
    download = back * 1500 / 1448 + there * 52 / 2 / 1448
    expected = row_traffic(manifest, 1e6 / 8, experts)
    assert (expected.upload_mbit, expected.download_mbit) == pytest.approx((upload, download), rel=0.02)


@given(
    st.sampled_from([16, 64, 256]),
    st.sampled_from(["fp32", "bf16", "int8", "int4"]),
    st.integers(1, 4),
    st.integers(1, 4),
    st.floats(1, 1e6),
    st.integers(1, 20),
)
def test_it_grows_with_tokens_mixtures_and_nodes_and_is_little_more_than_the_tensors(
    width: int, codec: CodecName, layers: int, top_k: int, tokens_per_s: float, nodes: int
) -> None:
    manifest = make_manifest(width, codec, layers=layers, top_k=top_k)
    each = nodes_of_token(top_k, nodes)
    rows = tokens_per_s * layers * each
    found = trainer_traffic(manifest, tokens_per_s, nodes)
    assert found == row_traffic(manifest, rows, top_k / each)
    per_row = astuple(row_traffic(manifest, 1.0, top_k / each))
    assert astuple(found) == pytest.approx([rows * one for one in per_row])
    assert trainer_traffic(manifest, tokens_per_s, nodes, 2).upload_mbit <= found.upload_mbit
    tensors = 8e-6 * rows * 2 * encoded_bytes(1, width, codec_of(codec))
    beside = 8e-6 * (rows * 4 + tokens_per_s * layers * top_k * 6)
    assert tensors < min(astuple(found))
    assert max(astuple(found)) < 1.1 * (tensors + beside)


@settings(max_examples=30)
@given(st.integers(1, 6), st.integers(1, 12), st.integers(2, 4))
def test_the_nodes_of_a_token_are_those_of_experts_that_are_anywhere(k: int, nodes: int, most: int) -> None:
    drawn = np.sort(np.random.default_rng(0).integers(0, nodes, (20_000, k)))
    found = 1 + np.diff(drawn).astype(bool).sum(axis=1)
    assert nodes_of_token(k, nodes) == pytest.approx(np.mean(found), rel=0.02)
    assert nodes_of_token(k, nodes, most) == pytest.approx(np.minimum(found, most).mean(), rel=0.02)


@pytest.mark.parametrize(
    ("hidden", "width", "codec", "nodes", "most", "mbit"),
    [
        (1024, 1024, "fp32", 10, None, 480),
        (1024, 448, "int4", 10, 2, 16.4),
        (1024, 256, "int4", 10, None, 16.2),
        (1024, 256, "int4", 10, 2, 9.5),
        (1024, 128, "int4", 10, 2, 4.9),
        (128, 128, "fp32", 3, None, 42),
    ],
)
def test_the_uploads_in_the_documentation(
    hidden: int, width: int, codec: CodecName, nodes: int, most: int | None, mbit: float
) -> None:
    """For 1,000 tokens/s, two mixtures, and top-4."""
    manifest = make_manifest(width, codec, hidden=hidden)
    upload = trainer_traffic(manifest, nodes=nodes, nodes_per_token=most).upload_mbit
    assert upload == pytest.approx(mbit, rel=0.01)


def test_the_default_moves_a_32nd_of_whole_rows_to_each_expert() -> None:
    """Payload, framing and packet headers, forward and backward, compared with the numbers of such rows in float32."""
    manifest = Manifest.founded({"name": "kept", "model": {"hidden": 1024}})
    most = PRESETS["transformer"]["nodes_per_token"]
    traffic = trainer_traffic(manifest, 1000.0, 10, most)
    mbit = (traffic.upload_mbit + traffic.download_mbit) / manifest.model.layers
    whole = 8e-3 * 2 * 2 * 4 * manifest.routing.top_k * manifest.model.hidden
    assert 32 <= whole / mbit < 32.5
