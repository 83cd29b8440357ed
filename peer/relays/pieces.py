"""Constants and parsers that both ends of a circuit and its relay share."""

from typing import TypeAlias

from grpc import StatusCode

from peer.errors import ExpertError
from peer.identity import PeerID, is_peer_id
from peer.wire import relay_pb2

Piece: TypeAlias = "relay_pb2.CircuitPiece"
PIECE_BYTES = 64 * 2**10
"""The largest piece."""
SENT_BYTES = 32 * 2**10
"""The largest piece that an end sends. A relay forwards a piece only once it has all of it, so large pieces arrive
late; small ones cost more CPU time.
"""
CIRCUIT_BYTES = 16
"""The size of a circuit's name, which is random and known only to its two ends."""
BEAT_S = 6.0
"""An end that has sent nothing for this long sends an empty piece. The gate ends calls that are silent for 20 s."""
ACCEPT_S = 10.0
"""How long a circuit waits to be accepted."""


def read_piece(piece: Piece) -> bytes:
    """The data of any piece but the first. Raises ExpertError (INVALID_ARGUMENT)."""
    data = piece.data
    if len(data) > PIECE_BYTES:
        raise ExpertError(StatusCode.INVALID_ARGUMENT, f"a piece has at most {PIECE_BYTES} bytes")
    if piece.peer_id or piece.circuit:
        raise ExpertError(StatusCode.INVALID_ARGUMENT, "only the first piece names a peer or a circuit")
    return data


def read_peer(data: bytes) -> PeerID:
    """A PeerID that a stranger wrote. Raises ExpertError (INVALID_ARGUMENT)."""
    if not is_peer_id(data):
        raise ExpertError(StatusCode.INVALID_ARGUMENT, "this is not a PeerID")
    return PeerID(data)


def read_target(piece: Piece) -> PeerID:
    """The peer that the first piece of Dial names. Raises ExpertError (INVALID_ARGUMENT)."""
    if piece.data or piece.circuit:
        raise ExpertError(StatusCode.INVALID_ARGUMENT, "the first piece names a peer, and nothing else")
    return read_peer(piece.peer_id)


def read_circuit(piece: Piece) -> bytes:
    """The circuit that the first piece of Accept names. Raises ExpertError (INVALID_ARGUMENT)."""
    if piece.data or piece.peer_id or len(piece.circuit) != CIRCUIT_BYTES:
        raise ExpertError(StatusCode.INVALID_ARGUMENT, "the first piece names a circuit, and nothing else")
    return piece.circuit
