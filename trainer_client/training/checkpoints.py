"""Checkpoints of the dense part: all that training needs to go on exactly where it was, in one file for each.

A file is a safetensors file with a header and a checksum, as experts' are: `<folder>/<step>.safetensors`.

One run of training: what it starts from, and how it is saved.
"""

import hashlib
import logging
import math
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field
from torch import Tensor

from dht.manifest import Manifest
from peer.checkpoints import CheckpointHeader, RotatingFiles, decode_checkpoint, encode_checkpoint
from peer.errors import CheckpointError, DataError, SettingsError, StateError
from peer.files import StateFolder
from trainer_client.data.corpus import Corpus, encode_corpus
from trainer_client.data.sources import find_files, read_text
from trainer_client.data.tokenizer import (
    BytePairTokenizer,
    ByteTokenizer,
    Tokenizer,
    load_tokenizer,
    read_tokenizer,
)
from trainer_client.settings import TrainerSettings
from trainer_client.training.loop import Training

logger = logging.getLogger(__name__)


class Header(CheckpointHeader):
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
        self._files = RotatingFiles(folder, keep)

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
            self._files.write(header.step, encode_checkpoint(header, tensors))
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
    files, tried = RotatingFiles(path, keep=1), set[int]()
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

    header, tensors = decode_checkpoint(data, Header, check)
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


_FIXED = ("tokenizer", "vocabulary")
"""Settings that a resume can't change: the model would be another one."""


@dataclass(frozen=True, eq=False)
class RunStart:
    """What a run starts from. All of it is known before the swarm is joined."""

    settings: TrainerSettings
    swarm_id: str
    checkpoint: Checkpoint | None
    """None for a new run."""
    writer: CheckpointWriter
    tokenizer: Tokenizer
    corpus: Corpus

    def restore(self, training: Training) -> None:
        """Takes the checkpoint over, if there is one. Raises CheckpointError when it is of another model."""
        if self.checkpoint is None:
            return
        header = self.checkpoint.header
        try:
            training.import_state(self.checkpoint.tensors)
        except StateError as error:
            raise CheckpointError(f"the checkpoint of step {header.step} does not fit: {error}") from error
        training.part.age = header.step if header.age is None else header.age
        logger.info("goes on after step %d", header.step)


def prepare_run(
    settings: TrainerSettings, resume: bool, swarm_id: str, state: Path, stage: Callable[[str], None]
) -> RunStart:
    """`state`: the trainer's state folder. `stage` is told what happens. Raises UserError."""
    with closing(StateFolder(state)):
        folder = checkpoint_folder(settings.checkpoint, state, swarm_id, newest=resume)
        if folder.is_file():
            raise CheckpointError(f"{folder} is a file: give its folder, where more checkpoints can stand")
        checkpoint = load_checkpoint(folder, swarm_id) if resume else None
        if checkpoint is not None:
            settings = _resumed(settings, checkpoint.header)
        writer = CheckpointWriter(folder, settings.checkpoints_kept)
        if resume or settings.checkpoint is not None:
            writer.open(resume)
        files = find_files(settings.data)
        stage("reading the text")
        if checkpoint is None:
            tokenizer = _make_tokenizer(settings, files, stage)
        else:
            tokenizer = load_tokenizer(checkpoint.header.tokenizer)
        corpus = encode_corpus(files, settings.field, tokenizer, state / "text")
    if checkpoint is not None and checkpoint.header.data_sha256 != corpus.sha256:
        logger.warning("the text is not the one that the checkpoint was trained on")
    return RunStart(settings, swarm_id, checkpoint, writer, tokenizer, corpus)


def checkpoint_folder(given: Path | None, state: Path, swarm_id: str, *, newest: bool) -> Path:
    """What `--checkpoint` says, else that of the newest run in the state folder, or of a new one.

    Raises CheckpointError when there is no newest run.
    """
    if given is not None:
        return given
    runs = state / "runs" / swarm_id
    return newest_run_folder(runs) if newest else new_run_folder(runs)


class CheckpointSaver:
    """Saves a run's checkpoints: every so many steps, and at the end."""

    def __init__(self, start: RunStart, training: Training, manifest: Manifest, seed: int) -> None:
        self.folder = start.writer.folder
        self.saved_step = training.step
        """Of the newest checkpoint of this run; the one it began with before there is any."""
        self._start = start
        self._training = training
        self._manifest_sha256 = manifest_sha256(manifest)
        self._seed = seed

    def save_if_due(self) -> None:
        every = self._start.settings.checkpoint_every
        if every and self._training.step % every == 0:
            self.save()

    def save(self) -> None:
        """Saves the last whole step, if it is not saved yet. What fails is said."""
        step = self._training.step
        tensors = self._training.export_state() if step > self.saved_step else None
        if tensors is None:
            return
        start = self._start
        header = Header(
            swarm_id=start.swarm_id,
            manifest_sha256=self._manifest_sha256,
            step=step,
            age=self._training.part.age,
            saved_at=time.time(),
            tokenizer=start.tokenizer.to_json(),
            data_sha256=start.corpus.sha256,
            settings=start.settings.saved(self._seed),
        )
        if start.writer.save(header, tensors):
            self.saved_step = step


def _resumed(settings: TrainerSettings, header: Header) -> TrainerSettings:
    """Those of the checkpoint where nothing else is given now, and a warning that names what differs."""
    resumed = settings.resumed(header.settings)
    now = resumed.saved(resumed.seed or 0)
    changes = [
        f"{name} {now[name]}, not {value}" for name, value in header.settings.items() if now[name] != value
    ]
    for name in _FIXED:
        if now[name] != header.settings[name]:
            raise SettingsError(
                f"{name}: the checkpoint's model has {header.settings[name]}, and can't change to {now[name]}"
            )
    if header.step >= resumed.steps:
        raise SettingsError(
            f"steps: the checkpoint has done all of the {resumed.steps} steps: pass more, such as --steps "
            f"{2 * header.step}"
        )
    if changes:
        logger.warning("goes on otherwise than it would have done: %s", "; ".join(changes))
    return resumed


def _make_tokenizer(settings: TrainerSettings, files: list[Path], stage: Callable[[str], None]) -> Tokenizer:
    if settings.tokenizer == "bytes":
        return ByteTokenizer()
    if settings.tokenizer != "bpe":
        return read_tokenizer(Path(settings.tokenizer))
    stage("learning a tokenizer from the text")
    try:
        characters = sum(file.stat().st_size for file in files)
    except OSError as error:
        raise DataError(f"can't read {error.filename}: {error.strerror}; check who may read it") from error
    tokenizer = BytePairTokenizer.learn(read_text(files, settings.field), characters, settings.vocabulary)
    logger.info("the tokenizer has %d tokens", len(tokenizer.token_bytes))
    return tokenizer
