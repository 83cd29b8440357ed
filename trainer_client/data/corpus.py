"""The encoded text and the batches drawn from it.

A `Corpus` holds the text as tokens in a memory-mapped file, so it may be larger than the memory. A `Dataset` cuts it
into sequences, in an order that depends only on a seed and a position.

Shapes: B sequences, T the model's context, N positions.
"""

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
import torch
from numpy.typing import NDArray
from torch import Tensor

from dht.manifest import LEAST_CONTEXT
from peer.errors import DataError, StartError
from trainer_client.data.sources import read_text
from trainer_client.data.tokenizer import BYTES, Tokenizer, Tokens, digest

VOCABULARY = BYTES
_PIECES = 32
"""How many pieces of text are encoded together, so that all cores have work."""
_ROUNDS = 4
"""Rounds of the Feistel cipher in `shuffled`."""


@dataclass(frozen=True, eq=False)
class Corpus:
    """All text to learn from, encoded."""

    tokens: Tokens
    """Memory-mapped: read from disk where they are used."""
    sha256: str
    """The first half of the tokens' SHA-256. Equal corpora give equal batches."""


def encode_corpus(files: Sequence[Path], field: str, tokenizer: Tokenizer, folder: Path) -> Corpus:
    """Encodes the text of the files into `folder`. The result stays there, and is used again if nothing has changed.

    For one process at a time. Raises DataError if a file is not text, and StartError if the folder is not writable.
    """
    name, kind = _fingerprint(files, field, tokenizer), _kind_of(tokenizer)
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
    temporary, sha256, kind = folder / f"{name}.new", hashlib.sha256(), _kind_of(tokenizer)
    try:
        with temporary.open("xb") as file:
            pieces = read_text(files, field)
            while several := list(islice(pieces, _PIECES)):
                data = tokenizer.encode(*several).astype(kind, copy=False).tobytes()
                file.write(data)
                sha256.update(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    return temporary.rename(folder / f"{name}-{sha256.hexdigest()[:32]}.tokens")


def _kind_of(tokenizer: Tokenizer) -> type[np.uint8] | type[np.uint16]:
    """The dtype of its tokens on disk."""
    return np.uint8 if len(tokenizer.token_bytes) <= BYTES else np.uint16


def _fingerprint(files: Sequence[Path], field: str, tokenizer: Tokenizer) -> str:
    """A name that changes when a file, the field or the tokenizer does."""
    try:
        stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    except OSError as error:
        raise DataError(f"can't read {error.filename}: {error.strerror}; check its permissions") from error
    described = [stats, field, digest(tokenizer), "" if files else platform.python_version()]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:32]


def require_length(tokens: Tokens, context: int | None, token_bytes: Sequence[bytes] | None = None) -> int:
    """The number of tokens in a sequence. Raises DataError if the text is too short for one training and one validation
    sequence. `context`: the swarm's; None: not known yet, so it is checked for the shortest.
    """
    length = (LEAST_CONTEXT if context is None else context) + 1
    if len(tokens) < 2 * length:
        unit = "bytes" if token_bytes is None or len(token_bytes) <= BYTES else "tokens"
        needs = (
            "a model needs twice its context and 2 more"
            if context is None
            else f"a model with a context of {context} needs {2 * length} or more"
        )
        raise DataError(f"the text has {len(tokens)} {unit}, but {needs}: give a longer text")
    return length


class Dataset:
    """Sequences of context + 1 tokens: the last part of a text for validation, and everything before it for training.

    Each sequence of the training text comes once per epoch. Each epoch has its own order, and cuts the text at
    different places. A batch depends only on the step, so training can be resumed anywhere.
    """

    def __init__(
        self,
        tokens: Tokens,
        context: int,
        seed: int = 0,
        validation_share: float = 0.1,
        token_bytes: Sequence[bytes] | None = None,
        align: int = 1,
    ) -> None:
        """`token_bytes`: the bytes that each token stands for; by default, one byte each. `align`: epochs cut the text
        at multiples of this, so that chunks of this size come again, for which passages are looked up.

        Raises DataError if the text is too short for one sequence of each part.
        """
        length = require_length(tokens, context, token_bytes)
        held_out = min(max(int(len(tokens) * validation_share), length), len(tokens) - length)
        self.train, self.validation = tokens[:-held_out], tokens[-held_out:]
        self.context = context
        self.sequences: int = max(1, len(self.train) // context - 1)
        """The number of sequences in an epoch."""
        self._align = align
        self._cuts = max(1, min(context, len(self.train) - self.sequences * context) // align)
        """How many different cuts there are."""
        self._bytes_of = np.array(
            [1] * BYTES if token_bytes is None else [len(token) for token in token_bytes]
        )
        self._seed = seed

    def batch(self, step: int, batch_size: int) -> Tensor:
        """The int64 tokens [B, T + 1] of a step, always the same."""
        places_B, numbers_B = drawn_places(step, batch_size, self.sequences, self._seed)
        cuts_B = (numbers_B % np.uint64(self._cuts)).astype(np.int64)
        return self._sequences(self.train, places_B * self.context + cuts_B * self._align)

    def validation_batches(self, batch_size: int, count: int) -> list[Tensor]:
        """`count` batches [B, T + 1], spread evenly over the validation text: the same for every seed."""
        starts = np.linspace(0, len(self.validation) - self.context - 1, batch_size * count).astype(np.int64)
        return [self._sequences(self.validation, part) for part in np.split(starts, count)]

    def bytes_per_token(self, batches: Sequence[Tensor], first: int = 1) -> float:
        """The mean over the predicted tokens of each sequence, which begin with number `first`."""
        return float(np.mean([self._bytes_of[tokens[:, first:].numpy()].mean() for tokens in batches]))

    def _sequences(self, tokens: Tokens, starts_B: NDArray[np.int64]) -> Tensor:
        places_BT = starts_B[:, None] + np.arange(self.context + 1)
        return torch.from_numpy(tokens[places_BT].astype(np.int64))


def drawn_places(
    step: int, batch_size: int, count: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
    """Which of `count` items are in a step's batch: [B]. In an epoch each comes once, and each epoch has its own order.
    Also returns a number for each, which is random for its epoch.
    """
    epochs_B, places_B = np.divmod(np.arange(step * batch_size, (step + 1) * batch_size), count)
    numbers_B = np.empty(batch_size, np.uint64)
    for epoch in np.unique(epochs_B):
        here = epochs_B == epoch
        *keys, number = np.random.SeedSequence([seed, int(epoch)]).generate_state(_ROUNDS + 1, np.uint64)
        places_B[here] = shuffled(places_B[here], count, keys)
        numbers_B[here] = number
    return places_B, numbers_B


def shuffled(indices_N: NDArray[np.int64], count: int, keys: Sequence[np.uint64]) -> NDArray[np.int64]:
    """The place of each index in a random permutation of `count` items, computed without listing it: int64 [N] -> [N].

    A Feistel cipher over the next power of 4, repeated until the result is below `count` (cycle walking: Black and
    Rogaway 2002, section 3). There is one key for each round.
    """
    half = np.uint64(max(1, ((count - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    places_N = indices_N.astype(np.uint64)
    walking_N = np.ones(len(places_N), dtype=np.bool_)
    while walking_N.any():
        left, right = places_N[walking_N] >> half, places_N[walking_N] & mask
        for key in keys:
            left, right = right, left ^ (_mixed(right ^ key) & mask)
        places_N[walking_N] = (left << half) | right
        walking_N = places_N >= count
    return places_N.astype(np.int64)


def _mixed(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of SplitMix64: each output bit depends on all input bits (Steele et al. 2014, figure 17)."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))
