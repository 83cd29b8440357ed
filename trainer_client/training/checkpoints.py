"""Checkpoints of a training run: what a run starts from, and everything that it needs to continue exactly.

Each checkpoint is one file, `<folder>/<step>.safetensors`: a safetensors file with a header and a checksum, like those
of experts.
"""

import hashlib
import logging
import math
import os
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
from pydantic import Field
from torch import Tensor, nn

from dht.manifest import Manifest
from peer.checkpoints import (
    CheckpointHeader,
    Outline,
    RotatingFiles,
    decode_checkpoint,
    encode_checkpoint,
    is_finite,
    read_checkpoint,
)
from peer.errors import CheckpointError, DataError, SettingsError, StateError
from peer.files import StateFolder, require_folder
from peer.formatting import counted
from peer.platform.files import lock, open_plainly
from trainer_client.averaging.dense_part import require_bounded, shared_buffers
from trainer_client.data.corpus import Corpus, encode_corpus, require_length
from trainer_client.data.questions import Question, digest_of, read_questions
from trainer_client.data.sources import find_files, read_text
from trainer_client.data.tokenizer import (
    BytePairTokenizer,
    Tokenizer,
    load_tokenizer,
    read_tokenizer,
)
from trainer_client.settings import MAX_STEPS, TrainerSettings
from trainer_client.training.loop import Training

logger: logging.Logger = logging.getLogger(__name__)

_EXPECTED = ("steps", "validate_every", "name")
"""Settings that may change on resume without a warning: changing them is how a run is continued."""
_FIXED = ("tokenizer", "vocabulary", "memory_chunk", "memory_layers", "objective")
"""Settings that can't change on resume, because the model would be a different one."""


class Header(CheckpointHeader):
    """The header of a checkpoint."""

    swarm_id: str
    manifest_sha256: str
    step: int = Field(ge=0)
    """How many steps were done."""
    age: int | None = Field(default=None, ge=0)
    """Steps that have gone into the dense part, including those of other trainers; None: only this run's steps."""
    saved_at: float = Field(ge=0, allow_inf_nan=False)
    """Unix time, in seconds."""
    tokenizer: str
    """The tokenizer, for `load_tokenizer`."""
    data_sha256: str
    """The hash of the data, as in `Corpus`; empty for a model that was imported."""
    settings: dict[str, Any]
    """The result of `TrainerSettings.saved`."""
    encoder: str | None = None
    """For a model that answers questions: the SHA-256, in hexadecimal, of the memory's encoder."""
    # not strict, because JSON has lists only
    unfinished: Annotated[
        tuple[Annotated[int, Field(ge=0, le=MAX_STEPS)], ...], Field(max_length=1024, strict=False)
    ] = ()
    """The numbers of steps that were in flight."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A header, and the tensors that `Training.export_state` returned."""

    header: Header
    tensors: dict[str, Tensor]

    def load_into(self, model: nn.Module) -> None:
        """Restores only the model. Raises CheckpointError if the checkpoint is of another model, or a bias would
        overflow.
        """
        tensors = {
            name.removeprefix("model."): tensor
            for name, tensor in self.tensors.items()
            if name.startswith("model.")
        }
        try:
            require_bounded({name: tensors[name] for name in shared_buffers(model) if name in tensors})
            model.load_state_dict(tensors)
        except (RuntimeError, StateError) as error:
            raise CheckpointError(
                f"the checkpoint of step {self.header.step} does not fit the swarm: {error}"
            ) from error

    def check_manifest(self, manifest: Manifest) -> None:
        """Raises CheckpointError if the swarm now has a different manifest."""
        if self.header.manifest_sha256 != manifest_sha256(manifest):
            raise CheckpointError(
                f"the checkpoint of step {self.header.step} belongs to another manifest of the swarm "
                f"{self.header.swarm_id}, so its model is different: train a new model"
            )


def manifest_sha256(manifest: Manifest) -> str:
    return hashlib.sha256(manifest.to_json()).hexdigest()


_LOCK = "lock"
"""The file that a trainer locks in its run's folder."""


class CheckpointWriter:
    """Writes the checkpoints of one run to its folder, and keeps the newest."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self._files = RotatingFiles(folder, keep)

    def open(self, resumes: bool) -> None:
        """Creates the folder. Raises CheckpointError if that fails, if another trainer uses it, or if there are
        checkpoints of another run.
        """
        with self.locked():
            self._files.sweep()
            if not resumes and (numbers := self._files.numbers()):
                raise CheckpointError(
                    f"{self.folder} has a checkpoint of step {numbers[0]}: pass --resume to continue from it, or "
                    "another --checkpoint"
                )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other trainers out of the folder while inside: each would remove the other's checkpoints. Raises
        CheckpointError as `open` does.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise CheckpointError(
                f"can't make the folder {self.folder}: {error.strerror}; pass another --checkpoint"
            ) from error
        try:
            file = os.fdopen(open_plainly(self.folder / _LOCK, os.O_WRONLY | os.O_CREAT, 0o666), "wb")
        except OSError as error:
            raise CheckpointError(
                f"can't write in {self.folder}: {error.strerror}; pass another --checkpoint"
            ) from error
        with file:
            try:
                lock(file.fileno())
            except BlockingIOError:
                raise CheckpointError(
                    f"another trainer saves its run in {self.folder}: stop it, or pass another --checkpoint"
                ) from None
            except OSError as error:  # some network file systems have no locks
                logger.debug("can't lock %s: %s", self.folder, error)
            yield

    def save(self, header: Header, tensors: dict[str, Tensor]) -> bool:
        """Returns True once it is safely on disk. A failure is logged, and an earlier checkpoint stays."""
        try:
            self._files.write(header.step, encode_checkpoint(header, tensors))
        except OSError as error:
            logger.warning(
                "could not save step %d in %s: %s; %s",
                header.step,
                self.folder,
                error.strerror or error,
                f"the checkpoint of step {numbers[0]} stays"
                if (numbers := self._files.numbers())
                else "nothing of this run is saved yet",
            )
            return False
        return True


def load_checkpoint(path: Path, swarm_id: str) -> Checkpoint:
    """Reads a checkpoint file, or the newest valid one in a folder; invalid ones are skipped with a warning.

    Raises CheckpointError if there is none, or if it belongs to another swarm.
    """
    if path.is_file():
        try:
            return _read(path, swarm_id)
        except StateError as error:
            raise CheckpointError(f"{path} is not a complete checkpoint: {error}") from error
    files, tried = RotatingFiles(path, keep=1), set[int]()
    # lists the folder each time, because a running trainer removes older ones in the meantime
    while untried := [number for number in files.numbers() if number not in tried]:
        tried.add(number := untried[0])
        try:
            checkpoint = _read(files.path(number), swarm_id)
            if checkpoint.header.step != number:
                raise StateError(f"its step is {checkpoint.header.step}")
        except StateError as error:
            logger.warning("skipping the checkpoint %s: %s", files.path(number), error)
        else:
            return checkpoint
    if tried:
        raise CheckpointError(
            f"no checkpoint in {path} can be read, as the warnings above say: pass another run's folder as "
            "--checkpoint, or train a new model, in another folder and without --resume"
        )
    raise CheckpointError(f"no checkpoint in {path}: give the folder that `talkoot train` named")


def _read(path: Path, swarm_id: str) -> Checkpoint:
    """Raises StateError if the file is incomplete."""

    def check(header: Header, outline: Outline) -> None:
        if header.swarm_id != swarm_id:
            raise CheckpointError(
                f"{path} belongs to the swarm {header.swarm_id}, but you are joining {swarm_id}: pass a --checkpoint "
                "of this swarm"
            )

    most = psutil.virtual_memory().total // 2  # the file and its tensors are in memory together
    header, tensors = decode_checkpoint(read_checkpoint(path, most), Header, check)
    # a history may contain the loss of a skipped step
    if not all(is_finite(t) for name, t in tensors.items() if not name.startswith("history.")):
        raise StateError("it has numbers that are not finite")
    return Checkpoint(header, tensors)


def new_run_folder(runs: Path) -> Path:
    """The folder for a new run. One process at a time uses `runs`, and starting one takes more than a second."""
    return runs / time.strftime("%Y%m%d-%H%M%S")


def newest_run_folder(runs: Path, can_train: bool = True) -> Path:
    """The run that saved last. The log names it, and an older run that has taken more steps. Raises CheckpointError if
    there is none. `can_train`: whether the user's invite allows it.
    """
    steps = _steps_of_runs(runs)
    if not steps:
        remedy = (
            "train first (`talkoot train` without --resume), or pass the --checkpoint DIR or --state DIR of a run"
            if can_train
            else "your invite is for a reader, who can't train, so ask a trainer for a copy of a run's folder and pass "
            "it as --checkpoint DIR"
        )
        raise CheckpointError(f"no checkpoint of this swarm in {runs}: {remedy}")
    newest, *older = steps
    longest = max(older, key=lambda folder: steps[folder], default=newest)
    hint = (
        f"; an older one has {counted(steps[longest], 'step', ',')}: --checkpoint {shlex.quote(str(longest))} uses that"
        if steps[longest] > steps[newest]
        else ""
    )
    logger.info("using the newest run %s, of %s%s", newest.name, counted(steps[newest], "step", ","), hint)
    return newest


def _steps_of_runs(runs: Path) -> dict[Path, int]:
    """The steps that each run has saved, the run that saved last first."""
    steps = dict[Path, int]()
    for path in sorted(runs.glob("*/*.safetensors"), key=_written_at, reverse=True):
        if path.stem.isdecimal():
            steps[path.parent] = max(steps.get(path.parent, 0), int(path.stem))
    return steps


def _written_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # its trainer is running, and has just removed it
        return -math.inf


@dataclass(frozen=True, eq=False)
class RunStart:
    """The start of a run: what is known before it joins the swarm."""

    settings: TrainerSettings
    swarm_id: str
    checkpoint: Checkpoint | None
    """None for a new run."""
    writer: CheckpointWriter
    tokenizer: Tokenizer
    corpus: Corpus
    """Empty if the model learns from questions."""
    questions: Sequence[Question]

    def restore(self, training: Training) -> None:
        """Restores the checkpoint, if there is one. Raises CheckpointError if it is of another model."""
        if self.checkpoint is None:
            return
        header = self.checkpoint.header
        try:
            age = header.step if header.age is None else header.age
            training.import_state(self.checkpoint.tensors, age, header.unfinished)
        except StateError as error:
            raise CheckpointError(f"the checkpoint of step {header.step} does not fit: {error}") from error
        logger.info("resuming after step %d", header.step)


def prepare_run(
    settings: TrainerSettings, resume: bool, swarm_id: str, state: Path, stage: Callable[[str], None]
) -> RunStart:
    """Reads the checkpoint and the text. `state`: the trainer's state folder. `stage`: called with each step, in words.

    Raises UserError.
    """
    require_folder(state)
    # before the state folder is made: if there is no run to resume, its path may be mistyped
    folder = checkpoint_folder(settings.checkpoint, state, swarm_id, newest=resume)
    if folder.is_file():
        raise CheckpointError(f"{folder} is a file: pass its folder instead")
    with closing(StateFolder(state)):
        if not resume and settings.checkpoint is None and (steps := _steps_of_runs(folder.parent)):
            newest = next(iter(steps))
            logger.info(
                "starting a new run; --resume would continue run %s, of %s",
                newest.name,
                counted(steps[newest], "step", ","),
            )
        checkpoint, given = load_checkpoint(folder, swarm_id) if resume else None, settings.data
        if checkpoint is not None:
            settings = _resumed(settings, checkpoint.header)
        writer = CheckpointWriter(folder, settings.checkpoints_kept)
        if resume or settings.checkpoint is not None:
            writer.open(resume)
        try:
            files = find_files(settings.data)
        except DataError as error:
            if given or checkpoint is None:
                raise
            raise DataError(
                f"{error}. The checkpoint names it: if the text is elsewhere now, pass --data"
            ) from error
        stage("reading the text")
        if checkpoint is None:
            tokenizer = _make_tokenizer(settings, files, stage)
        else:
            tokenizer = load_tokenizer(checkpoint.header.tokenizer)
        questions = read_questions(files) if settings.answers_questions else []
        if questions:
            corpus = Corpus(np.empty(0, np.uint8), digest_of(questions))
        else:
            corpus = encode_corpus(files, settings.field, tokenizer, state / "text")
            require_length(corpus.tokens, None, tokenizer.token_bytes)
            whence = counted(len(files), "file") if files else "Python's own help"
            logger.info("the text has %s, from %s", counted(len(corpus.tokens), "token", ","), whence)
    if checkpoint is not None and checkpoint.header.data_sha256 not in ("", corpus.sha256):
        logger.warning("the text differs from the text that the checkpoint was trained on")
    return RunStart(settings, swarm_id, checkpoint, writer, tokenizer, corpus, questions)


def checkpoint_folder(
    given: Path | None, state: Path, swarm_id: str, *, newest: bool, can_train: bool = True
) -> Path:
    """The folder of `--checkpoint` if it is given, else that of the newest run in the state folder, or of a new run.

    Raises CheckpointError if the newest run is wanted and there is none. `can_train`: whether the user's invite allows
    it.
    """
    if given is not None:
        return given
    runs = state / "runs" / swarm_id
    return newest_run_folder(runs, can_train) if newest else new_run_folder(runs)


class CheckpointSaver:
    """Saves a run: every `checkpoint_every` steps, and at the end."""

    def __init__(
        self, start: RunStart, training: Training, manifest: Manifest, seed: int, encoder: str | None = None
    ) -> None:
        """`encoder`: see `Header.encoder`."""
        self.folder: Path = start.writer.folder
        self.saved_step: int = training.step
        """The step of the run's newest checkpoint; before the first one, the step at which the run began."""
        self._tried_step = training.step
        self._start = start
        self._training = training
        self._manifest_sha256 = manifest_sha256(manifest)
        self._seed = seed
        self._encoder = encoder

    def save_if_due(self) -> None:
        every = self._start.settings.checkpoint_every
        if every and self._training.step % every == 0:
            self.save()

    def save(self) -> None:
        """Saves the last complete step, unless that was already tried. A failure is logged."""
        step = self._training.step
        tensors = self._training.export_state() if step > self._tried_step else None
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
            encoder=self._encoder,
            unfinished=self._training.unfinished,
        )
        is_saved = start.writer.save(header, tensors)
        self._tried_step = step  # not before: if a signal interrupts it, it is saved at the end
        if is_saved:
            self.saved_step = step
            logger.info("checkpoint of step %d in %s", step, self.folder)


def _resumed(settings: TrainerSettings, header: Header) -> TrainerSettings:
    """The checkpoint's settings, overridden by those given now. A warning names the differences."""
    resumed = settings.resumed(header.settings)
    now = resumed.saved(resumed.seed or 0)
    before = {name: value for name, value in header.settings.items() if name in now}
    changes = [
        f"{name} {now[name]}, not {value}"
        for name, value in before.items()
        if now[name] != value and name not in _EXPECTED
    ]
    if (now["memory"] is None) != (before.get("memory") is None):
        reads = (
            "reads no memory, and can't begin to" if now["memory"] else f"reads the memory {before['memory']}"
        )
        raise SettingsError(f"memory: the checkpoint's model {reads}: train a new model, without --resume")
    for name in _FIXED:
        if now[name] != before.get(name, now[name]):
            raise SettingsError(
                f"{name}: the checkpoint's model has {before[name]}, and can't change to {now[name]}"
            )
    if header.step >= resumed.steps:
        raise SettingsError(
            f"steps: the checkpoint has already taken all {resumed.steps} steps: pass a larger number, such as --steps "
            f"{2 * header.step}"
        )
    # an imported run has no settings of its own yet
    if changes and header.step > 0:
        logger.warning("resuming with other settings: %s", "; ".join(changes))
    return resumed


def _make_tokenizer(settings: TrainerSettings, files: list[Path], stage: Callable[[str], None]) -> Tokenizer:
    if settings.tokenizer != "bpe":
        return read_tokenizer(settings.tokenizer)
    stage("learning a tokenizer from the text")
    try:
        characters = sum(file.stat().st_size for file in files)
    except OSError as error:
        raise DataError(f"can't read {error.filename}: {error.strerror}; check its permissions") from error
    tokenizer = BytePairTokenizer.learn(read_text(files, settings.field), characters, settings.vocabulary)
    logger.info("the tokenizer has %d tokens", len(tokenizer.token_bytes))
    return tokenizer
