"""What a trainer moves, computed, against bytes counted on real connections."""

from dataclasses import astuple, replace
from pathlib import Path

import numpy as np
import pytest
from callers import a_caller
from expert_fakes import make_request
from hypothesis import given
from hypothesis import strategies as st
from real_node import UIDS, a_node, ask

from dht.manifest import Manifest
from dht.uid import UID
from peer.codec import CodecName, codec_of, encoded_bytes
from peer.loop import LoopThread
from peer.metrics import totals
from peer.rpc.channels import ChannelPool
from peer.transport.endpoints import Endpoint
from talkoot.demo.links import Link, Proxy, Wire
from talkoot.doctor.traffic import row_traffic, trainer_traffic
from trainer_client.dispatch.batches import Answer, Request
from trainer_client.dispatch.grpc_caller import GrpcCaller

CONTEXT = 256
SEQUENCES, OF_EACH = 16, 8
ROWS = SEQUENCES * OF_EACH
"""For each expert."""
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


async def counted(path: Path, manifest: Manifest) -> tuple[float, float]:
    """Bytes that connections carried to the node and back for a row, forward and backward."""
    pool, wire, rng = ChannelPool(), Wire(Link()), np.random.default_rng(0)
    codec = codec_of(manifest.wire.codec)
    caller = GrpcCaller(pool, "kept-swarm", manifest.width, codec, a_caller("kept-swarm"))

    def request(uid: UID, forward: Answer | None = None) -> Request:
        places = [sorted(rng.choice(CONTEXT, OF_EACH, replace=False)) for _ in range(SEQUENCES)]
        tensor = rng.standard_normal((ROWS, manifest.width), dtype=np.float32)
        positions, lengths = np.concatenate(places).tolist(), [OF_EACH] * SEQUENCES
        if forward is None:
            return make_request(uid, lengths, positions, tensor, keep=True)
        return make_request(uid, lengths, positions, tensor, tensor, kept=forward.kept)

    async with a_node(path, 2**24, manifest) as (node, _):
        port = int(str(node.addresses[0]).rsplit(":", 1)[1])
        proxy = await Proxy.start(wire, ("127.0.0.1", port))
        behind = replace(node, addresses=(Endpoint(f"127.0.0.1:{proxy.port}"),))

        async def train() -> tuple[int, int]:
            forward = await ask(caller, behind, "forward", *map(request, UIDS))
            backward = await ask(
                caller, behind, "backward", *(request(uid, forward[i]) for i, uid in enumerate(UIDS))
            )
            assert all(answer.tensor is not None for answer in (*forward.values(), *backward.values()))
            return wire.there.bytes_carried, wire.back.bytes_carried

        try:
            began = await train()  # which also connects and opens a session
            for _ in range(ROUNDS):
                ended = await train()
        finally:
            await pool.close()
            await proxy.close()
    rows = len(UIDS) * ROWS
    payload = 2 * (ROUNDS + 1) * rows * encoded_bytes(1, manifest.width, codec)
    assert totals(caller.metrics.bytes, "direction") == {"sent": payload, "received": payload}
    there, back = ((end - start) / (ROUNDS * rows) for start, end in zip(began, ended, strict=True))
    return there, back


@pytest.mark.parametrize(("width", "codec"), [(256, "int4"), (64, "int4"), (64, "fp32")])
def test_it_is_what_real_calls_move(loop: LoopThread, tmp_path: Path, width: int, codec: CodecName) -> None:
    manifest = make_manifest(width, codec)
    there, back = loop.run(counted(tmp_path, manifest), 60)
    # 52 bytes of headers in each packet, and an acknowledgement for every second one
    upload = there * 1500 / 1448 + back * 52 / 2 / 1448
    download = back * 1500 / 1448 + there * 52 / 2 / 1448
    expected = row_traffic(manifest, 1e6 / 8)
    assert (expected.upload_mbit, expected.download_mbit) == pytest.approx((upload, download), rel=0.02)


@given(
    st.sampled_from([16, 64, 256]),
    st.sampled_from(["fp32", "bf16", "int8", "int4"]),
    st.integers(1, 4),
    st.integers(1, 4),
    st.floats(1, 1e6),
)
def test_it_grows_with_tokens_mixtures_and_rows_and_is_little_more_than_the_tensors(
    width: int, codec: CodecName, layers: int, top_k: int, tokens_per_s: float
) -> None:
    manifest = make_manifest(width, codec, layers=layers, top_k=top_k)
    rows = tokens_per_s * layers * top_k
    found = trainer_traffic(manifest, tokens_per_s)
    assert found == row_traffic(manifest, rows)
    assert astuple(found) == pytest.approx([rows * one for one in astuple(row_traffic(manifest, 1.0))])
    assert trainer_traffic(manifest, tokens_per_s, rows_per_token=top_k) == found
    tensors = 8e-6 * rows * 2 * encoded_bytes(1, width, codec_of(codec))
    beside = 8e-6 * rows * 4
    assert tensors < found.download_mbit < found.upload_mbit < 1.1 * (tensors + beside)


@pytest.mark.parametrize(
    ("hidden", "width", "codec", "mbit"),
    [(1024, 1024, "fp32", 554), (1024, 256, "int4", 18.6), (128, 128, "fp32", 70)],
)
def test_the_uploads_in_the_documentation(hidden: int, width: int, codec: CodecName, mbit: float) -> None:
    """For 1,000 tokens/s, two mixtures, and top-4."""
    upload = trainer_traffic(make_manifest(width, codec, hidden=hidden)).upload_mbit
    assert upload == pytest.approx(mbit, rel=0.01)
