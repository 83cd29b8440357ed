"""Tensors on disk and on the wire: a safetensors file with a header and a checksum over both. Pure.

Checkpoints as files: the newest few `<number>.safetensors` of a folder, each whole or not there.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as from_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor

from peer.errors import StateError
from peer.files import sync_folder, write_atomically

FORMAT_VERSION = 1

_HEADER_KEY = "talkoot"
"""Of the safetensors metadata, under which the header stands as JSON."""
_KNOWN_TYPES = {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
}


class CheckpointHeader(BaseModel):
    """What a file of tensors says of itself. A subclass adds what it is of.

    A later release may add keys with defaults at the end of a subclass, and this software then ignores them; what it
    could not ignore needs another `FORMAT_VERSION`.
    """

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    format_version: int = FORMAT_VERSION
    sha256: str = ""
    """Over the rest of the header and all tensors."""


H = TypeVar("H", bound=CheckpointHeader)


def encode_checkpoint(header: H, tensors: dict[str, Tensor]) -> bytes:
    """Tensors on the CPU, contiguous, and the header with their checksum."""
    digest = _digest(header.model_dump_json(exclude={"sha256"}), tensors)
    header = header.model_copy(update={"sha256": digest})
    return to_safetensors(tensors, {_HEADER_KEY: header.model_dump_json()})


def decode_checkpoint(data: bytes, kind: type[H], check: Callable[[H], None]) -> tuple[H, dict[str, Tensor]]:
    """`check` looks at the header before the checksum is computed, and raises StateError where it is another one.

    Raises StateError when the bytes are not such a file, or not as they were written.
    """
    try:
        tensors: dict[str, Tensor] = from_safetensors(data)
    except (SafetensorError, KeyError, ValueError, RuntimeError, AssertionError) as error:
        raise StateError(f"it can't be read: {error}") from error
    if unknown := {tensor.dtype for tensor in tensors.values()} - _KNOWN_TYPES:
        raise StateError(f"it has tensors of type {unknown.pop()}")
    header = _read_header(_metadata(data), kind)
    try:
        # the keys that were written, which are not all that this software knows when another release wrote them
        written = header.model_dump_json(exclude={"sha256"}, exclude_unset=True)
    except ValueError as error:  # halves of characters, or too many lists within lists
        raise StateError(f"its header is not as it was written: {error}") from error
    check(header)
    if _digest(written, tensors) != header.sha256:
        raise StateError("its checksum does not match: something changed it after it was written")
    return header, tensors


def _metadata(data: bytes) -> Mapping[str, str]:
    """Of bytes that safetensors has read: 8 bytes of length, then JSON."""
    outline = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    metadata: Mapping[str, str] = outline.get("__metadata__") or {}
    return metadata


def _read_header(metadata: Mapping[str, str], kind: type[H]) -> H:
    """Raises StateError."""
    try:
        values = json.loads(metadata[_HEADER_KEY])
        version = values["format_version"]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise StateError("it has no header of a checkpoint") from error
    if version != FORMAT_VERSION:
        later = isinstance(version, int) and version > FORMAT_VERSION
        raise StateError(
            f"it has format version {version!r:.40}, this software reads {FORMAT_VERSION}"
            + (": update Talkoot" if later else "")
        )
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise StateError(f"its header is not valid: {error.error_count()} errors") from error


def _digest(header: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(header.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


_FILE_NAME = re.compile(r"(0|[1-9][0-9]{0,17})\.safetensors")
_TEMPORARY = ".*.new"


class RotatingFiles:
    """One folder of them. Other files in it are left alone."""

    def __init__(self, folder: Path, keep: int) -> None:
        """`keep`: how many stay."""
        assert keep >= 1, "a folder that keeps nothing is none"
        self.folder = folder
        self._keep = keep

    def numbers(self) -> list[int]:
        """Newest first, by the file names alone."""
        try:
            names = os.listdir(self.folder)
        except OSError:
            return []
        return sorted(
            (int(match[1]) for name in names if (match := _FILE_NAME.fullmatch(name))), reverse=True
        )

    def path(self, number: int) -> Path:
        return self.folder / f"{number}.safetensors"

    def write(self, number: int, data: bytes) -> None:
        """Returns when the file is safely on disk. Raises OSError; the files before it stay then."""
        self._make_folder()
        write_atomically(self.path(number), data)
        self._prune(number)

    def sweep(self) -> None:
        """Removes what writers that were killed have left."""
        for path in self.folder.glob(_TEMPORARY):
            with suppress(OSError):
                path.unlink()

    def _make_folder(self) -> None:
        missing = [folder for folder in (self.folder, *self.folder.parents) if not folder.is_dir()]
        if missing:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            for folder in missing:
                sync_folder(folder.parent)  # where it is entered

    def _prune(self, written: int) -> None:
        """Keeps the newest of those up to the one just written.

        What claims to be newer was passed over when the newest was loaded, and must not push out what is good.
        """
        numbers = [number for number in self.numbers() if number <= written]
        for number in numbers[self._keep :]:
            with suppress(OSError):  # one file too many does no harm
                self.path(number).unlink()
