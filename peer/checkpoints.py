"""Checkpoints: their format, and a folder that keeps the newest few.

A checkpoint is a safetensors file with a header, and with a checksum over the header and the tensors. The same bytes
are stored on disk and sent to other peers.
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
"""Key of the safetensors metadata that holds the header as JSON."""
_KNOWN_TYPES = {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
}
_FILE_NAME = re.compile(r"(0|[1-9][0-9]{0,17})\.safetensors")
_TEMPORARY = ".*.new"


class CheckpointHeader(BaseModel):
    """Describes the tensors of a file. Subclasses add what kind of state it is.

    A later release may add keys with defaults at the end of a subclass; this software ignores them. A change that it
    could not ignore needs another `FORMAT_VERSION`.
    """

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    format_version: int = FORMAT_VERSION
    sha256: str = ""
    """Over the rest of the header and all tensors."""


H = TypeVar("H", bound=CheckpointHeader)


def encode_checkpoint(header: H, tensors: dict[str, Tensor]) -> bytes:
    """Packs contiguous tensors on the CPU, and the header with their checksum."""
    digest = _digest(header.model_dump_json(exclude={"sha256"}), tensors)
    header = header.model_copy(update={"sha256": digest})
    return to_safetensors(tensors, {_HEADER_KEY: header.model_dump_json()})


def decode_checkpoint(data: bytes, kind: type[H], check: Callable[[H], None]) -> tuple[H, dict[str, Tensor]]:
    """Unpacks and verifies a checkpoint. Raises StateError if it is malformed or was changed.

    `check` gets the header before the checksum is computed, and raises StateError if it is not the expected one.
    """
    try:
        tensors: dict[str, Tensor] = from_safetensors(data)
    except (SafetensorError, KeyError, ValueError, RuntimeError, AssertionError) as error:
        raise StateError(f"it can't be read: {error}") from error
    if unknown := {tensor.dtype for tensor in tensors.values()} - _KNOWN_TYPES:
        raise StateError(f"it has tensors of type {unknown.pop()}")
    header = _read_header(_metadata(data), kind)
    try:
        # only the keys that were written: another release may have written fewer than this software knows
        written = header.model_dump_json(exclude={"sha256"}, exclude_unset=True)
    except ValueError as error:  # lone surrogates, or lists nested too deeply
        raise StateError(f"its header is not as it was written: {error}") from error
    check(header)
    if _digest(written, tensors) != header.sha256:
        raise StateError("its checksum does not match: something changed it after it was written")
    return header, tensors


def _metadata(data: bytes) -> Mapping[str, str]:
    """The metadata of a valid safetensors file, which starts with 8 bytes of length and then JSON."""
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


class RotatingFiles:
    """A folder with the newest few `<number>.safetensors`, each complete. It leaves other files alone."""

    def __init__(self, folder: Path, keep: int) -> None:
        """`keep`: how many files to keep."""
        assert keep >= 1, "at least one file must be kept"
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
        """Returns when the file is safely on disk. Raises OSError, and then leaves the older files."""
        self._make_folder()
        write_atomically(self.path(number), data)
        self._prune(number)

    def sweep(self) -> None:
        """Removes the temporary files of writers that were killed."""
        for path in self.folder.glob(_TEMPORARY):
            with suppress(OSError):
                path.unlink()

    def _make_folder(self) -> None:
        missing = [folder for folder in (self.folder, *self.folder.parents) if not folder.is_dir()]
        if missing:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            for folder in missing:
                sync_folder(folder.parent)  # which holds the entry of the new folder

    def _prune(self, written: int) -> None:
        """Keeps the newest files up to the one just written.

        A file with a higher number was rejected when the newest was loaded, and must not displace good ones.
        """
        numbers = [number for number in self.numbers() if number <= written]
        for number in numbers[self._keep :]:
            with suppress(OSError):  # one file too many does no harm
                self.path(number).unlink()
