"""Text as tokens in a file that is mapped into memory, so that it may be larger than the memory."""

import hashlib
import json
import os
import platform
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from peer.errors import DataError, StartError
from trainer_client.data.sources import read_text
from trainer_client.data.tokenizer import BYTES, Tokenizer, Tokens, digest

_AT_ONCE = 32
"""Pieces that are encoded together, so that all cores have some."""


@dataclass(frozen=True, eq=False)
class Corpus:
    """All text to learn from."""

    tokens: Tokens
    """Read from disk where they are used."""
    sha256: str
    """Of the tokens, the first half: two corpora with the same give the same batches."""


def prepare(files: Sequence[Path], field: str, tokenizer: Tokenizer, folder: Path) -> Corpus:
    """Encodes the text of the files into `folder`, where the last text stays, and is taken when nothing has changed.
    One process at a time may do so.

    Raises DataError when it is no text, and StartError when the folder can't be written.
    """
    name = _fingerprint(files, field, tokenizer)
    kind = np.uint8 if len(tokenizer.token_bytes) <= BYTES else np.uint16
    path = next(folder.glob(f"{name}-*.tokens"), None)
    if path is None:
        try:
            folder.mkdir(exist_ok=True)
            path = _write(files, field, tokenizer, folder, name)
        except OSError as error:
            raise StartError(f"can't write in {folder}: {error.strerror}; pass another --state") from error
    if not path.stat().st_size:
        path.unlink()
        named = ", ".join(map(str, files[:3]))
        raise DataError(f"{named} is empty: give a file or folder with text in it")
    tokens: Tokens = np.memmap(path, dtype=kind, mode="r")
    return Corpus(tokens, path.stem.removeprefix(f"{name}-"))


def _write(files: Sequence[Path], field: str, tokenizer: Tokenizer, folder: Path, name: str) -> Path:
    for old in (*folder.glob("*.tokens"), *folder.glob("*.new")):
        with suppress(OSError):
            old.unlink()
    temporary, sha256 = folder / f"{name}.new", hashlib.sha256()
    try:
        with temporary.open("wb") as file:
            pieces = read_text(files, field)
            while several := list(islice(pieces, _AT_ONCE)):
                data = tokenizer.encode(*several).tobytes()
                file.write(data)
                sha256.update(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    return temporary.rename(folder / f"{name}-{sha256.hexdigest()[:32]}.tokens")


def _fingerprint(files: Sequence[Path], field: str, tokenizer: Tokenizer) -> str:
    """Changes when a file does."""
    try:
        stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    except OSError as error:
        raise DataError(f"can't read {error.filename}: {error.strerror}; check who may read it") from error
    described = [stats, field, digest(tokenizer), "" if files else platform.python_version()]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:32]
