"""Text to learn from, as bytes: the vocabulary is the 256 byte values."""

import pydoc_data.topics
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from peer.errors import DataError

VOCABULARY = 256


def load_text(path: Path | None) -> bytes:
    """A file, or all .txt files below a folder, by path. None stands for the 465 KB of help in Python itself.

    Raises DataError when there is nothing to read there.
    """
    if path is None:
        return "\n".join(pydoc_data.topics.topics.values()).encode()
    try:
        text = _read_folder(path) if path.is_dir() else path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"no file or folder {path}: give one with text in it") from None
    except OSError as error:
        at = error.filename or path
        raise DataError(f"can't read {at}: {error.strerror}; check who may read it") from error
    if not text:
        raise DataError(f"{path} is empty: give a file or folder with text in it")
    return text


def _read_folder(folder: Path) -> bytes:
    files = sorted(file for file in folder.rglob("*.txt") if file.is_file())
    if not files:
        raise DataError(f"no .txt file in {folder}: put some there, or give another folder")
    return b"\n".join(text for file in files if (text := file.read_bytes()))


class ByteDataset:
    """Sequences of context + 1 bytes: the first 90% of a text to train, its last 10% to validate."""

    def __init__(self, text: bytes, context: int, seed: int = 0) -> None:
        """Raises DataError when the text is too short for one sequence of each."""
        length = context + 1
        if len(text) < 2 * length:
            raise DataError(
                f"the text has {len(text)} bytes and needs {2 * length} or more, "
                f"twice the model's context of {context} and one: give a longer one"
            )
        data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        held_out = max(len(text) // 10, length)
        self.train, self.validation = data[:-held_out], data[-held_out:]
        self.context = context
        self._seed = seed

    def batch(self, step: int, batch_size: int) -> Tensor:
        """The int64 tokens of a step, the same whenever it is asked for. [B, T + 1]"""
        starts = np.random.default_rng([self._seed, step]).integers(
            0, len(self.train) - self.context, size=batch_size
        )
        return self._sequences(self.train, starts)

    def validation_batches(self, batch_size: int, count: int) -> list[Tensor]:
        """`count` batches [B, T + 1], evenly spread over the held-out text: the same for every seed."""
        starts = np.linspace(0, len(self.validation) - self.context - 1, batch_size * count).astype(np.int64)
        return [self._sequences(self.validation, part) for part in np.split(starts, count)]

    def _sequences(self, data: Tensor, starts: NDArray[np.int64]) -> Tensor:
        offsets = torch.from_numpy(starts)[:, None] + torch.arange(self.context + 1)
        return data[offsets].long()
