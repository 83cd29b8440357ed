"""Checkpoints: their format, and a folder that keeps the newest few.

A checkpoint is a safetensors file with a header, and with a checksum over the header and the tensors. The same bytes
are stored on disk and sent to other peers, so a stranger may have written them. They are parsed only here: a file that
does not match the grammar, or what its reader expects, is refused before any tensor is made.
"""

import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import inf, prod
from pathlib import Path
from typing import Any, ClassVar, NoReturn, TypeAlias, TypeVar

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import from_json
from torch import Tensor

from peer.codec import joined
from peer.errors import StateError
from peer.files import sweep, write_atomically
from peer.formatting import bytes_in_words, counted, printable
from peer.platform.files import sync_folder

FORMAT_VERSION = 1
MAX_OUTLINE_BYTES = 2**24
"""The limit for the JSON before the tensors, which contains their names and the header."""
_HEADER_KEY = "talkoot"
"""Key of the safetensors metadata that holds the header as JSON."""
_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_TYPE_NAMES = {dtype: name for name, dtype in _TYPES.items()}
_ALIGNMENT = 8
_MAX_DIMENSIONS, _MAX_NUMBERS, _MAX_NAME = 8, 2**48, 500
_FILE_NAME = re.compile(r"(0|[1-9][0-9]{0,17})\.safetensors")

Form: TypeAlias = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype of a tensor."""
Outline: TypeAlias = Mapping[str, Form]
"""The tensors that a file claims to hold, by name."""


class CheckpointHeader(BaseModel):
    """Describes the tensors of a file. Subclasses add the fields of one kind of state.

    A later release may add keys with defaults at the end of a subclass; this release ignores them. Any other change
    needs another `FORMAT_VERSION`.
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="allow", frozen=True, strict=True)

    format_version: int = FORMAT_VERSION
    sha256: str = ""
    """The checksum of the rest of the header and all tensors."""


H = TypeVar("H", bound=CheckpointHeader)


def encode_checkpoint(header: H, tensors: dict[str, Tensor]) -> bytes:
    """Packs contiguous tensors on the CPU with the header, and adds their checksum to it."""
    parts = ((name, form_of(tensor), _bytes_of(tensor)) for name, tensor in tensors.items())
    digest = _digest(header.model_dump_json(exclude={"sha256"}), parts)
    header = header.model_copy(update={"sha256": digest})
    return _safetensors_file(tensors, {_HEADER_KEY: header.model_dump_json()})


def _safetensors_file(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """What the library's `save` returns, but that holds all other threads while it copies the tensors."""
    outline: dict[str, Any] = {"__metadata__": metadata}
    parts, end = list[memoryview](), 0
    # the largest numbers first, so that all are aligned
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        part = _bytes_of(tensor)
        begin, end = end, end + len(part)
        shape, dtype = form_of(tensor)
        outline[name] = {"dtype": _TYPE_NAMES[dtype], "shape": shape, "data_offsets": [begin, end]}
        parts.append(part)
    text = json.dumps(outline, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return joined([len(text).to_bytes(8, "little"), text, *parts])


def decode_checkpoint(
    data: bytes,
    kind: type[H],
    check: Callable[[H, Outline], None],
    max_outline_bytes: int = MAX_OUTLINE_BYTES,
) -> tuple[H, dict[str, Tensor]]:
    """Unpacks and verifies a checkpoint. Raises StateError if it is malformed or was changed.

    `check` raises StateError if the header or the outline is not the expected one. It is called before the checksum is
    computed and any tensor is made. `max_outline_bytes`: the limit for the JSON that is parsed before that.
    """
    metadata, places = read_outline(data, max_outline_bytes)
    header = _read_header(metadata, kind)
    try:
        # only the keys that were written: another release may have written fewer than this software knows
        written = header.model_dump_json(exclude={"sha256"}, exclude_unset=True)
    except ValueError as error:
        raise StateError(f"its header was changed: {printable(str(error))}") from error
    check(header, {place.name: place.form for place in places})
    content = memoryview(data)
    parts = ((place.name, place.form, content[place.start : place.end]) for place in places)
    if _digest(written, parts) != header.sha256:
        raise StateError("its checksum does not match: something changed it after it was written")
    return header, _tensors(data, places)


def read_checkpoint(path: Path, most: int) -> bytes:
    """A file's content. Raises StateError if it can't be read, or has more than `most` bytes."""
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):
            raise StateError("it can't be read: it is not a file")
        if about.st_size > most:
            raise StateError(
                f"it has {bytes_in_words(about.st_size)}; at most {bytes_in_words(most)} can be read"
            )
        return path.read_bytes()
    except OSError as error:
        raise StateError(f"it can't be read: {error.strerror}") from error


@dataclass(frozen=True)
class Place:
    """Where a tensor is in a file, in bytes."""

    name: str
    form: Form
    start: int
    end: int


def read_outline(data: bytes | memoryview, most: int) -> tuple[Any, list[Place]]:
    """A safetensors file's metadata, None if it has none, and the places of the tensors, which fill the file.

    The file starts with the length of the JSON, in 8 bytes, and then the JSON. Raises StateError if the JSON has more
    than `most` bytes, or if anything is malformed.
    """
    begin = 8 + int.from_bytes(data[:8], "little")
    if not 8 < begin <= len(data) or begin % _ALIGNMENT:
        raise StateError("it can't be read: it is not a safetensors file")
    if begin - 8 > most:
        raise StateError(f"it can't be read: its outline has {begin - 8} bytes, more than {most}")
    try:
        outline = json.loads(
            str(data[8:begin], "utf-8"), object_pairs_hook=_without_repeats, parse_constant=_refuse_constant
        )
    except (ValueError, RecursionError) as error:
        raise StateError(f"it can't be read: {printable(str(error))}") from error
    if not isinstance(outline, dict):
        raise StateError("it can't be read: its outline is not an object")
    metadata = outline.pop("__metadata__", None)
    places = sorted(
        (_read_place(name, entry, begin) for name, entry in outline.items()), key=lambda p: (p.start, p.end)
    )
    end = begin
    for place in places:
        if place.start != end:
            raise StateError("it can't be read: its tensors overlap, or leave gaps")
        end = place.end
    if end != len(data):
        raise StateError("it can't be read: its tensors do not fill the file")
    return metadata, places


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _read_place(name: str, entry: Any, begin: int) -> Place:
    """`begin`: the offset at which the tensors begin. Raises StateError."""
    if len(name) > _MAX_NAME or not name.isprintable():
        raise StateError(f"it can't be read: the name {printable(name)!r}")
    match entry:
        case {"dtype": str(type_name), "shape": list(shape), "data_offsets": [start, end]} if len(
            entry
        ) == 3 and all(type(number) is int and number >= 0 for number in (*shape, start, end)):
            pass
        case _:
            raise StateError(f"it can't be read: {name!r} is not described as a tensor")
    dtype = _TYPES.get(type_name)
    if dtype is None:
        raise StateError(f"it has tensors of type {printable(type_name, 40)}")
    # also limits tensors with a dimension of 0: torch computes with the sizes of the other dimensions
    if len(shape) > _MAX_DIMENSIONS or prod(max(1, size) for size in shape) > _MAX_NUMBERS:
        raise StateError(f"it can't be read: {name!r} has too large a shape")
    if end - start != prod(shape) * dtype.itemsize or start % dtype.itemsize:
        raise StateError(
            f"it can't be read: {name!r} has a length that does not match its shape, or begins at the wrong place"
        )
    return Place(name, (tuple(shape), dtype), begin + start, begin + end)


def _read_header(metadata: Any, kind: type[H]) -> H:
    """Raises StateError."""
    if not isinstance(metadata, dict) or metadata.keys() != {_HEADER_KEY}:
        raise StateError("it lacks the header of a checkpoint")
    text = metadata[_HEADER_KEY]
    if not isinstance(text, str):
        raise StateError("it lacks the header of a checkpoint")
    try:
        values = from_json(text, allow_inf_nan=False)
        version = values["format_version"]
    except (KeyError, TypeError, ValueError) as error:
        raise StateError("it lacks the header of a checkpoint") from error
    if version != FORMAT_VERSION:
        later = isinstance(version, int) and version > FORMAT_VERSION
        raise StateError(
            f"it has format version {version!r:.40}, this software reads {FORMAT_VERSION}"
            + (": update Talkoot" if later else "")
        )
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise StateError(f"its header is not valid: {counted(error.error_count(), 'error')}") from error


def _tensors(data: bytes, places: Iterable[Place]) -> dict[str, Tensor]:
    """The tensors as views of one writable copy of the data. Raises StateError."""
    # numpy lets other threads run while it copies
    buffer, tensors = np.frombuffer(data, np.uint8).copy(), {}
    for place in places:
        shape, dtype = place.form
        if place.start == place.end:
            tensors[place.name] = torch.empty(shape, dtype=dtype)
            continue
        if dtype is torch.bool and max(data[place.start : place.end]) > 1:
            raise StateError(f"{place.name!r} has numbers instead of booleans")
        flat = torch.frombuffer(buffer, dtype=dtype, count=prod(shape), offset=place.start)
        tensors[place.name] = flat.reshape(shape)
    return tensors


def form_of(tensor: Tensor) -> Form:
    return tuple(tensor.shape), tensor.dtype


def nbytes_of(forms: Iterable[Form]) -> int:
    """The size of such tensors together."""
    return sum(prod(shape) * dtype.itemsize for shape, dtype in forms)


def extremes(tensor: Tensor) -> tuple[float, float]:
    """The lowest and the highest number: NaN if any is, and 0 if there are none."""
    if not tensor.numel():
        return 0.0, 0.0
    low, high = tensor.aminmax()
    return float(low), float(high)


def is_finite(tensor: Tensor) -> bool:
    """Whether all numbers are finite. It reads them once: torch's `isfinite` makes several tensors of their size, and
    takes five to forty times as long.
    """
    low, high = extremes(tensor)
    return -inf < low and high < inf


def _bytes_of(tensor: Tensor) -> memoryview:
    data: memoryview = tensor.reshape(-1).view(torch.uint8).numpy().data
    return data


def _digest(header: str, parts: Iterable[tuple[str, Form, memoryview]]) -> str:
    digest = hashlib.sha256(header.encode())
    for name, (shape, dtype), content in sorted(parts, key=lambda part: part[0]):
        digest.update(f"\n{name} {dtype} {shape}\n".encode())
        digest.update(content)
    return digest.hexdigest()


class RotatingFiles:
    """A folder with the newest few `<number>.safetensors`, all complete. It leaves other files alone."""

    def __init__(self, folder: Path, keep: int) -> None:
        """`keep`: how many files to keep."""
        assert keep >= 1, "at least one file must be kept"
        self.folder = folder
        self._keep = keep

    def numbers(self) -> list[int]:
        """The numbers in the file names, newest first."""
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
        """Returns when the file is safely on disk. If it raises OSError, the older files are still there."""
        self._make_folder()
        write_atomically(self.path(number), data)
        self._prune(number)

    def remove(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            with suppress(OSError):  # one file too many does no harm
                self.path(number).unlink()

    def sweep(self) -> None:
        """Removes the temporary files of writers that were killed."""
        sweep(self.folder)

    def _make_folder(self) -> None:
        missing = [folder for folder in (self.folder, *self.folder.parents) if not folder.is_dir()]
        if missing:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            for folder in missing:
                sync_folder(folder.parent)  # which holds the entry of the new folder

    def _prune(self, written: int) -> None:
        """Keeps the newest files up to the one just written.

        A file with a higher number was rejected at start-up, and must not displace good ones.
        """
        self.remove([number for number in self.numbers() if number <= written][self._keep :])
