"""Checkpoints of the dense part: all that training needs to go on exactly where it was, in one file for each.

A file is a safetensors file with a header and a checksum, as experts' are: `<folder>/<step>.safetensors`.
"""

import hashlib
import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field
from torch import Tensor

from dht.manifest import Manifest
from peer.errors import CheckpointError, StateError
from peer.numbered import NumberedFiles
from peer.checkpoints import SealedHeader, seal, unseal

logger = logging.getLogger(__name__)


class Header(SealedHeader):
    """What a checkpoint says of itself."""

    swarm_id: str
    manifest_sha256: str
    step: int = Field(ge=0)
    """How many were done."""
    age: int | None = Field(default=None, ge=0)
    """Steps that the dense part has behind it, others' too; None: no more than were done, as releases had it that don't
    say."""
    saved_at: float = Field(ge=0, allow_inf_nan=False)
    """Unix time, in seconds."""
    tokenizer: str
    """See `load_tokenizer`."""
    data_sha256: str
    """See `Corpus`."""
    settings: dict[str, Any]
    """See `TrainerSettings.saved`."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A header, and the tensors that `Training.export_state` gave."""

    header: Header
    tensors: dict[str, Tensor]

    def model_tensors(self) -> dict[str, Tensor]:
        """The state dict of the model alone."""
        return {
            name.removeprefix("model."): tensor
            for name, tensor in self.tensors.items()
            if name.startswith("model.")
        }

    def check_manifest(self, manifest: Manifest) -> None:
        """Raises CheckpointError when the swarm has another manifest now."""
        if self.header.manifest_sha256 != manifest_sha256(manifest):
            raise CheckpointError(
                f"the checkpoint of step {self.header.step} is of another manifest of the swarm "
                f"{self.header.swarm_id}, so its model is another one: train a new one"
            )


def manifest_sha256(manifest: Manifest) -> str:
    return hashlib.sha256(manifest.to_json()).hexdigest()


class CheckpointWriter:
    """Saves the checkpoints of one run in its folder, and keeps the newest."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self._files = NumberedFiles(folder, keep)

    def open(self, resumes: bool) -> None:
        """Makes the folder. Raises CheckpointError when it can't, or when the checkpoints there are of another run."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise CheckpointError(
                f"can't make the folder {self.folder}: {error.strerror}; pass another --checkpoint"
            ) from error
        self._files.sweep()
        if not resumes and (numbers := self._files.numbers()):
            raise CheckpointError(
                f"{self.folder} has a checkpoint of step {numbers[0]}: pass --resume to go on from it, or another "
                "--checkpoint"
            )

    def save(self, header: Header, tensors: dict[str, Tensor]) -> bool:
        """Returns when it is safely on disk. What fails is said and costs no checkpoint before it; gives False then."""
        try:
            self._files.write(header.step, seal(header, tensors))
        except OSError as error:
            logger.warning(
                "could not save step %d in %s: %s; the checkpoints before it stay",
                header.step,
                self.folder,
                error.strerror or error,
            )
            return False
        return True


def load_checkpoint(path: Path, swarm_id: str) -> Checkpoint:
    """A checkpoint file, or the newest in a folder that is whole; those that are not are passed over with a warning.

    Raises CheckpointError when there is none, and when it is of another swarm.
    """
    if path.is_file():
        try:
            return _read(path, swarm_id)
        except StateError as error:
            raise CheckpointError(f"{path} is no whole checkpoint: {error}") from error
    files, tried = NumberedFiles(path, keep=1), set[int]()
    # looks each time anew: a trainer that goes on removes the older ones meanwhile
    while untried := [number for number in files.numbers() if number not in tried]:
        tried.add(number := untried[0])
        try:
            checkpoint = _read(files.path(number), swarm_id)
            if checkpoint.header.step != number:
                raise StateError(f"it is of step {checkpoint.header.step}")
        except StateError as error:
            logger.warning("passing over the checkpoint %s: %s", files.path(number), error)
        else:
            return checkpoint
    if tried:
        raise CheckpointError(
            f"no checkpoint in {path} is whole: give another run's folder as --checkpoint, or train a new one, in "
            "another folder and without --resume"
        )
    raise CheckpointError(f"no checkpoint in {path}: give the folder that `talkoot train` named")


def _read(path: Path, swarm_id: str) -> Checkpoint:
    """Raises StateError when it is not whole."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise StateError(f"it can't be read: {error.strerror}") from error

    def check(header: Header) -> None:
        if header.swarm_id != swarm_id:
            raise CheckpointError(
                f"{path} is of the swarm {header.swarm_id}, and you join {swarm_id}: pass a --checkpoint of this one"
            )

    header, tensors = unseal(data, Header, check)
    # a history may hold the loss of a step that was skipped
    if not all(t.isfinite().all() for name, t in tensors.items() if not name.startswith("history.")):
        raise StateError("it has numbers that are not finite")
    return Checkpoint(header, tensors)


def new_run_folder(runs: Path) -> Path:
    """For a run that begins now. One process at a time uses `runs`, and starting one takes over a second."""
    return runs / time.strftime("%Y%m%d-%H%M%S")


def newest_run_folder(runs: Path) -> Path:
    """The run that saved last. Raises CheckpointError when there is none."""
    newest = max(runs.glob("*/*.safetensors"), key=_written_at, default=None)
    if newest is None:
        raise CheckpointError(
            f"no checkpoint of this swarm in {runs}: train first, without --resume, or pass the --checkpoint DIR or "
            "--state DIR of a run"
        )
    return newest.parent


def _written_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # its trainer goes on, and has just removed it
        return -math.inf
