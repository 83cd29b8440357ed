"""What training moves over a trainer's line.

Shapes: R rows. A row is what one token sends to one expert; a trainer sends it forward, and later its gradient.
"""

from dataclasses import dataclass

from dht.manifest import Manifest
from peer.codec import codec_of, encoded_bytes

_FRAMES = 1.003
"""Bytes on a connection for each byte in gRPC's messages: HTTP/2 and TLS. Counted in a proxy, like those below."""
_SENT_BESIDE, _RECEIVED_BESIDE = 3.5, 1.5
"""Bytes beside a row's tensors, forward and backward together: its position, and its share of the headers in calls of
128 rows for each expert. With 32 rows it is 9 and 5.
"""
_PACKET, _PACKET_HEADERS = 1500, 52
"""Of TCP over IPv4 with timestamps. Every second packet is acknowledged, which costs headers in the other direction."""


@dataclass(frozen=True)
class Traffic:
    """Of a trainer. Its download is the upload of the nodes that it calls."""

    upload_mbit: float
    download_mbit: float


def trainer_traffic(
    manifest: Manifest, tokens_per_s: float = 1000.0, rows_per_token: float | None = None
) -> Traffic:
    """What a trainer moves to and from nodes for so many tokens a second, all mixtures together.

    Retries, hedges, and the averaging of dense parts are not included.

    `rows_per_token`: rows that a token sends in one mixture, by default one for each of its `top_k` experts.
    """
    rows = manifest.routing.top_k if rows_per_token is None else rows_per_token
    return row_traffic(manifest, tokens_per_s * manifest.model.layers * rows)


def row_traffic(manifest: Manifest, rows_per_s: float) -> Traffic:
    """What a trainer moves for so many rows a second, each forward and backward."""
    # inputs and gradients of updates one way, updates and gradients of inputs the other
    tensors = 2 * encoded_bytes(1, manifest.width, codec_of(manifest.wire.codec))
    sent = rows_per_s * (_FRAMES * tensors + _SENT_BESIDE)
    received = rows_per_s * (_FRAMES * tensors + _RECEIVED_BESIDE)
    return Traffic(_mbit_per_s(sent, received), _mbit_per_s(received, sent))


def _mbit_per_s(carried: float, opposite: float) -> float:
    """`carried`, `opposite`: bytes per second that connections carry one way and the other."""
    filled = _PACKET - _PACKET_HEADERS
    return 8e-6 * (carried * _PACKET / filled + opposite * _PACKET_HEADERS / (2 * filled))
