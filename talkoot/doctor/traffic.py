"""How much data training moves over a trainer's line.

For each token, a trainer sends one row to each of the token's nodes in the forward pass, and later the row's gradient.
A row may be for several experts.
"""

from dataclasses import dataclass

from dht.manifest import Manifest
from peer.codec import codec_of, encoded_bytes, scalar_bytes

TYPICAL_NODES = 10
"""The number of nodes to assume if it is not known."""
_FRAMES = 1.003
"""Bytes on a connection for each byte in gRPC's messages, because of HTTP/2 and TLS. Measured with a proxy, like the
numbers below.
"""
_SENT_BESIDE, _RECEIVED_BESIDE = 3.0, 1.6
"""Bytes sent and received for each row in addition to its tensors, forward and backward together: its position or
number, and its share of the headers, for calls of 256 rows.
"""
_NUMBER = 1.5
"""Bytes for the row's number, for each expert of a row. The expert's weight and the product that is returned take
`scalar_bytes` each; the weight is left out if no row has several experts.
"""
_PACKET, _PACKET_HEADERS = 1500, 52
"""The size of a TCP packet over IPv4 with timestamps, and of its headers. Every second packet is acknowledged, which
costs headers in the other direction.
"""


@dataclass(frozen=True)
class Traffic:
    """The traffic of a trainer. Its download is the upload of the nodes that it calls."""

    upload_mbit: float
    download_mbit: float


def trainer_traffic(
    manifest: Manifest,
    tokens_per_s: float = 1000.0,
    nodes: int = TYPICAL_NODES,
    nodes_per_token: int | None = None,
) -> Traffic:
    """The traffic between a trainer and its nodes at this speed, over all mixtures.

    Each token goes to the manifest's top_k experts, which are on any nodes, but at most `nodes_per_token`. Retries,
    hedges, and the averaging of dense parts are not included.
    """
    k = manifest.routing.top_k
    rows = nodes_of_token(k, nodes, nodes_per_token)
    return row_traffic(manifest, tokens_per_s * manifest.model.layers * rows, k / rows)


def nodes_of_token(experts: int, nodes: int, most: int | None = None) -> float:
    """The mean number of nodes that host a token's experts, if each is at a random node, and a token goes to at most
    `most`.
    """
    chances = [1.0]  # of being at 0, 1, ... nodes
    for _ in range(experts):
        met = [chance * at / nodes for at, chance in enumerate(chances)]
        new = [chance * (1 - at / nodes) for at, chance in enumerate(chances)]
        chances = [one + other for one, other in zip([*met, 0.0], [0.0, *new], strict=True)]
    return sum(chance * min(at, most or at) for at, chance in enumerate(chances))


def row_traffic(manifest: Manifest, rows_per_s: float, experts: float = 1.0) -> Traffic:
    """A trainer's traffic for this many rows a second, forward and backward, each for this many experts of a node."""
    # inputs and gradients of answers in one direction, answers and gradients of inputs in the other
    codec = codec_of(manifest.wire.codec)
    tensors, scalar = 2 * encoded_bytes(1, manifest.width, codec), scalar_bytes(codec)
    with_each = _NUMBER + (scalar if experts > 1 else 0)
    sent = rows_per_s * (_FRAMES * tensors + _SENT_BESIDE + with_each * experts)
    received = rows_per_s * (_FRAMES * tensors + _RECEIVED_BESIDE + scalar * experts)
    return Traffic(_mbit_per_s(sent, received), _mbit_per_s(received, sent))


def _mbit_per_s(carried: float, opposite: float) -> float:
    """`carried`, `opposite`: bytes per second that connections carry in one direction and in the other."""
    filled = _PACKET - _PACKET_HEADERS
    return 8e-6 * (carried * _PACKET / filled + opposite * _PACKET_HEADERS / (2 * filled))
