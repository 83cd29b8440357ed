"""The form of an expert's state on disk and on the wire: a safetensors file with a header and a checksum. Pure."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as from_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor

from dht.uid import UID
from expert_server.expert import State
from peer.errors import StateError

FORMAT_VERSION = 1

_HEADER_KEY = "talkoot"
"""Of the safetensors metadata, under which the header stands as JSON."""
_KNOWN_TYPES = {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
}


class Header(BaseModel):
    """What a state says of itself."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    format_version: int = FORMAT_VERSION
    swarm_id: str
    uid: str
    update_count: int = Field(ge=0)
    saved_at: float = Field(ge=0, allow_inf_nan=False)
    """Unix time, in seconds."""
    sha256: str = ""
    """Over the rest of the header and all tensors."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """One expert's state, as it was after `update_count` updates."""

    state: State
    update_count: int


def to_bytes(checkpoint: Checkpoint, swarm_id: str, uid: UID, saved_at: float) -> bytes:
    """`saved_at`: Unix time in seconds."""
    header = Header(swarm_id=swarm_id, uid=str(uid), update_count=checkpoint.update_count, saved_at=saved_at)
    header = header.model_copy(update={"sha256": _digest(header, checkpoint.state)})
    return to_safetensors(checkpoint.state, {_HEADER_KEY: header.model_dump_json()})


def from_bytes(data: bytes, swarm_id: str, uid: UID, update_count: int) -> Checkpoint:
    """Raises StateError when the bytes are not that state, or not as they were written."""
    try:
        state = from_safetensors(data)
    except (SafetensorError, KeyError, ValueError, RuntimeError, AssertionError) as error:
        raise StateError(f"it can't be read: {error}") from error
    if unknown := {tensor.dtype for tensor in state.values()} - _KNOWN_TYPES:
        raise StateError(f"it has tensors of type {unknown.pop()}")
    header = _read_header(_metadata(data))
    for name, found, expected in (
        ("swarm", header.swarm_id, swarm_id),
        ("expert", header.uid, str(uid)),
        ("update count", header.update_count, update_count),
    ):
        if found != expected:
            raise StateError(f"it is of {name} {found}, not {expected}")
    if _digest(header, state) != header.sha256:
        raise StateError("its checksum does not match: something changed it after it was written")
    return Checkpoint(state, update_count)


def _metadata(data: bytes) -> Mapping[str, str]:
    """Of bytes that safetensors has read: 8 bytes of length, then JSON."""
    outline = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    metadata: Mapping[str, str] = outline.get("__metadata__") or {}
    return metadata


def _read_header(metadata: Mapping[str, str]) -> Header:
    """Raises StateError."""
    try:
        values = json.loads(metadata[_HEADER_KEY])
        version = values["format_version"]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise StateError("it has no header of a checkpoint") from error
    if version != FORMAT_VERSION:
        raise StateError(f"it has format version {version!r:.40}, this software reads {FORMAT_VERSION}")
    try:
        return Header.model_validate(values)
    except ValidationError as error:
        raise StateError(f"its header is not valid: {error.error_count()} errors") from error


def _digest(header: Header, state: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(header.model_dump_json(exclude={"sha256"}).encode())
    for name, tensor in sorted(state.items()):
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
